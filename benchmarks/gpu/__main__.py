"""Check a GPU machine: parity with the published code, exact resume, and speed.

    python -m benchmarks.gpu [--device cuda|cpu] [--tiny] [--out FOLDER] [PART ...]

Run from the repository's root; needs no Ray, git or network. Takes 9 minutes at most. Each part
runs in its own process and appends each result at once to FOLDER/gpu_check.jsonl; FOLDER is $OUT
or out/gpu. Exit code 0: all checks passed, 1: one failed or did not finish, 2: wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.session import RESULTS, append, unfinished
from benchmarks.gpu.summary import failures, not_finished, read, text
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
"""Time limit of each part in seconds. The curve trains for as long as it has."""
RESERVES = {"evaluation": 30.0, "joint": 60.0, "curve": 120.0}
"""Seconds that earlier parts must leave for a part that was requested."""
TOTAL = 530.0
MIN_SECONDS = 20.0
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
    for stop in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, lambda received, frame: sys.exit(128 + received))
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS).unlink(missing_ok=True)
    end = time.monotonic() + TOTAL
    for index, part in enumerate(parts):
        limit = time_limit(part, parts[index + 1 :], end - time.monotonic())
        if limit < MIN_SECONDS:
            append(out, part, "part", ended="no time left", seconds=0.0, **unfinished(part))
            continue
        _run(part, limit, out, arguments.device, tiny=arguments.tiny)
    lines = read(out)
    print(text(lines))
    return 1 if failures(lines) or not_finished(lines) else 0


def time_limit(part: str, later: Sequence[str], left: float) -> float:
    """Return the seconds that a part may take if `left` remain for it and the parts after it."""
    return min(LIMITS[part], left - sum(RESERVES.get(name, 0.0) for name in later))


def _run(part: str, limit: float, out: Path, device: str, *, tiny: bool) -> None:
    """Run a part with a scratch folder, which is removed even if the part is killed."""
    with tempfile.TemporaryDirectory(prefix=f"{part}-", dir=out, ignore_cleanup_errors=True) as tmp:
        command = [sys.executable, "-m", "benchmarks.gpu.part", part, device, str(out), tmp]
        command += [str(time.time() + limit - 1), *(["tiny"] if tiny else [])]
        run_part(part, command, limit, out)


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
        finally:  # also after SIGTERM, which raises SystemExit
            _kill_group(process)
    seconds = round(time.monotonic() - started, 1)
    if ended:
        print(log.read_text(errors="replace")[-1500:], flush=True)
    append(out, part, "part", ended=ended, seconds=seconds, **_verdict(part, ended))


def _verdict(part: str, ended: int | str) -> dict[str, bool]:
    """Return result keys: a crash fails the check, a timeout leaves checks unfinished."""
    if ended == 0:
        return {}
    return unfinished(part) if ended == "timeout" else {"ok": False}


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the part and the compiler's worker processes, which would keep GPU memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
