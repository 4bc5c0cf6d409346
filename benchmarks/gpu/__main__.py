"""Check a GPU machine: same numbers as the published code, exact resuming, and how fast it is.

    python -m benchmarks.gpu [--device cuda|cpu] [--tiny] [--out FOLDER] [PART ...]

Run from the repository's root; needs no Ray, git or network. Takes 9 minutes at most. Each part
runs in a process of its own and writes each result at once as a line of FOLDER/gpu_check.jsonl;
FOLDER is $OUT or out/gpu. Exit code 0: all checks passed, 1: one failed, 2: wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.session import RESULTS, append
from benchmarks.gpu.summary import failures, read, text
from benchmarks.measure import ROOT

LIMITS = {
    "machine": 40.0,
    "parity": 90.0,
    "resume": 75.0,
    "steps": 190.0,
    "evaluation": 60.0,
    "joint": 120.0,
    "curve": 210.0,
}
"""Seconds that each part may take at most. The curve trains for as long as it has."""
CHECKS = ("parity", "resume")
"""Parts that must end in time; the others measure, and a slow GPU may not get through them."""
TOTAL = 530.0
LEAST = 20.0
"""A part is not started with less time left."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(LIMITS))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out/gpu")))
    arguments = parser.parse_args()
    parts = arguments.parts or list(LIMITS)
    for part in parts:
        if part not in LIMITS:
            parser.error(f"{part} is none of {', '.join(LIMITS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --device cpu --tiny tries the check itself")
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS).unlink(missing_ok=True)
    end = time.monotonic() + TOTAL
    for part in parts:
        limit = min(LIMITS[part], end - time.monotonic())
        if limit < LEAST:
            append(out, part, "part", failed="no time left", **_verdict(part, "timeout"))
            continue
        seconds = str(limit - 1)
        command = [sys.executable, "-m", "benchmarks.gpu.part", part, arguments.device, str(out)]
        run_part(part, [*command, seconds, *(["tiny"] if arguments.tiny else [])], limit, out)
    lines = read(out)
    print(text(lines))
    return 1 if failures(lines) else 0


def run_part(part: str, command: Sequence[str], limit: float, out: Path) -> None:
    """Run a part and record how it ended: 0, its exit code, or `timeout`."""
    started = time.monotonic()
    log = out / f"{part}.log"
    print(f"{part}: at most {limit:.0f} s, log in {log}", flush=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            ended: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            ended = "timeout"
        finally:
            _kill_group(process)
    seconds = round(time.monotonic() - started, 1)
    if ended:
        print(log.read_text()[-1500:], flush=True)
    append(out, part, "part", ended=ended, seconds=seconds, **_verdict(part, ended))


def _verdict(part: str, ended: int | str) -> dict[str, bool]:
    """A crash fails the check, and so does a part with checks that does not get through them."""
    if ended == 0:
        return {}
    return {"ok": False} if part in CHECKS or ended != "timeout" else {}


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the part and the compiler's worker processes, which would keep GPU memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
