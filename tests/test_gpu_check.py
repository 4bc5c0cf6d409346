"""The GPU check runs on a CPU at tiny sizes, and a failing part does not stop the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.gpu import summary
from benchmarks.gpu.__main__ import LIMITS, RESERVES, TOTAL, run_part, time_limit
from benchmarks.gpu.session import Session, TimedContext
from benchmarks.measure import ROOT
from hybrid.context import Signal

CPU = torch.device("cpu")
COMMAND = (sys.executable, "-m", "benchmarks.gpu", "--device", "cpu")
# More threads than free cores wait for each other.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COMMIT": "given"}


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


def session_of(folder: Path, part: str, *, seconds: float = 10.0) -> Session:
    deadline = time.time() + seconds
    return Session(part=part, device=CPU, tiny=True, out=folder, scratch=folder, deadline=deadline)


def test_whole_check_passes_at_tiny_sizes(tmp_path: Path) -> None:
    done = check("--tiny", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = summary.read(tmp_path)
    assert {line["part"] for line in lines} == set(LIMITS)
    assert all(line["ended"] == 0 for line in lines if line["what"] == "part")
    assert not any("failed" in line for line in lines)
    assert lines[0]["commit"] == "given" and lines[0]["torch"] == torch.__version__
    checks = [line["part"] for line in lines if "ok" in line]
    assert checks == ["parity"] * 4 + ["resume"]
    for mode in ("full", "bucketed"):
        curve = [line for line in lines if line["what"] == f"curve, {mode} canvas"]
        assert len(curve) >= 2 and curve[-1]["seconds"] >= 1.0
        [score] = [line for line in lines if line["what"].startswith(f"curve, {mode} canvas, test")]
        assert score["of"] == 4
    assert "5 of 5 checks passed" in done.stdout
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "scratch folder left"


def test_wrong_arguments_exit_with_2(tmp_path: Path) -> None:
    done = check("--out", str(tmp_path), "speed")
    assert done.returncode == 2 and "speed is none of machine" in done.stderr


def test_sigterm_ends_the_running_part(tmp_path: Path) -> None:
    command = [*COMMAND, "--tiny", "--out", str(tmp_path), "joint"]
    parent = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while not (parts := psutil.Process(parent.pid).children()):
            assert time.monotonic() < end, "no part was started"
            time.sleep(0.1)
        time.sleep(1)
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(60) == 128 + signal.SIGTERM
    finally:
        parent.kill()
        parent.wait()
    assert not [part for part in parts if part.is_running()]
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "scratch folder left"


def test_parts_leave_time_for_the_curve() -> None:
    left, parts = TOTAL, list(LIMITS)
    for index, part in enumerate(parts[:-1]):
        left -= time_limit(part, parts[index + 1 :], left)
    assert parts[-1] == "curve" and left >= RESERVES["curve"]
    assert time_limit("steps", ["curve"], 150.0) == 150.0 - RESERVES["curve"]
    assert time_limit("steps", [], 150.0) == 150.0, "nothing to reserve for"


def test_errors_are_results_and_out_of_memory_is_no_failure(tmp_path: Path) -> None:
    session = session_of(tmp_path, "steps")
    with session.measuring("large"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB\nmore")
    with session.measuring("small"):
        session.record("small", ms=1)
    with session.measuring("broken"):
        raise ValueError
    large, small, broken = summary.read(tmp_path)
    assert large["what"] == "large" and large["failed"].startswith("out of memory: CUDA")
    assert small["ms"] == 1
    assert not summary.failures([large, small]) and not summary.not_finished([large, small])
    assert broken["failed"] == "ValueError: " and summary.failures([broken]) == ["steps: broken"]


def test_check_without_time_or_memory_is_not_finished(tmp_path: Path) -> None:
    session = session_of(tmp_path, "parity", seconds=5)
    assert session.has_time("eager", 4)
    assert not session.has_time("compiled", 6)
    with session.measuring("large"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    lines = summary.read(tmp_path)
    assert summary.not_finished(lines) == ["parity: compiled", "parity: large"]
    assert not summary.failures(lines)
    assert lines[0]["failed"] == "skipped: 5 s left of 6 s needed"


def test_curve_is_written_while_training() -> None:
    written: list[Mapping[str, float]] = []
    context = TimedContext(CPU, lambda: 0.2, lambda trained, metrics: written.append(metrics), 1)
    assert context.signal() is Signal.NONE, "the first step does not count"
    for step in (1, 2, 3):
        context.gauge({"step": step})
    assert written == [{"step": 1}], "one point per interval"
    time.sleep(0.2)
    assert context.signal() is Signal.STOP
    context.gauge({"step": 4})
    assert written == [{"step": 1}, {"step": 4}], "the last point is always written"


@pytest.mark.parametrize(
    ("part", "code", "ended", "failures", "not_finished"),
    [
        ("steps", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9, 1, 0),
        ("steps", "raise SystemExit(3)", 3, 1, 0),
        ("steps", "import time; time.sleep(60)", "timeout", 0, 0),
        ("resume", "import time; time.sleep(60)", "timeout", 0, 1),
        ("resume", "import sys; sys.stdout.buffer.write(b'\\xff'); sys.exit(1)", 1, 1, 0),
        ("resume", "pass", 0, 0, 0),
    ],
)
def test_exit_of_a_part_is_recorded(
    tmp_path: Path, part: str, code: str, ended: Any, failures: int, not_finished: int
) -> None:
    run_part(part, [sys.executable, "-c", code], 2.0, tmp_path)
    [line] = summary.read(tmp_path)
    assert line["ended"] == ended
    assert summary.failures([line]) == failures * [f"{part}: part"]
    assert summary.not_finished([line]) == not_finished * [f"{part}: part"]


def test_summary_has_every_result_and_names_failed_and_unfinished_checks(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"part": "parity", "what": "A", "difference": 1e-6, "ok": True},
        {"part": "parity", "what": "B", "difference": 1.0, "ok": False},
        {"part": "parity", "what": "C", "failed": "out of memory", "finished": False},
        {"part": "steps", "what": "eager, 192 rows", "samples/s": 390.0},
        {"part": "steps", "what": "plain, 384 rows", "failed": "out of memory"},
    ]
    (tmp_path / "gpu_check.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    text = summary.text(summary.read(tmp_path))
    assert all(line["what"] in text for line in lines)
    assert text.endswith("1 of 2 checks passed\nFAILED  parity: B\nNOT FINISHED  parity: C")
