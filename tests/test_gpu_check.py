"""The GPU check runs on a CPU at tiny sizes, and a failing part costs only itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import summary
from benchmarks.gpu.__main__ import LIMITS, run_part
from benchmarks.gpu.session import Session
from benchmarks.measure import ROOT


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    # More threads than free cores wait for each other.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COMMIT": "given"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_whole_check_passes_at_tiny_sizes(tmp_path: Path) -> None:
    done = check("--device", "cpu", "--tiny", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = summary.read(tmp_path)
    assert {line["part"] for line in lines} == set(LIMITS)
    assert all(line["ended"] == 0 for line in lines if line["what"] == "part")
    assert not any("failed" in line for line in lines)
    assert lines[0]["commit"] == "given" and lines[0]["torch"] == torch.__version__
    checks = [line["part"] for line in lines if "ok" in line]
    assert checks == ["parity"] * 4 + ["resume"]
    assert len([line for line in lines if line["part"] == "curve"]) >= 4
    assert "5 of 5 checks passed" in done.stdout


def test_wrong_arguments_end_with_2(tmp_path: Path) -> None:
    done = check("--device", "cpu", "--out", str(tmp_path), "speed")
    assert done.returncode == 2 and "speed is none of machine" in done.stderr


def test_an_error_is_a_result_and_only_memory_is_no_failure(tmp_path: Path) -> None:
    session = Session(
        part="steps",
        device=torch.device("cpu"),
        tiny=True,
        out=tmp_path,
        scratch=tmp_path,
        seconds=10,
    )
    with session.measuring("large"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB\nmore")
    with session.measuring("small"):
        session.record("small", ms=1)
    with session.measuring("broken"):
        raise ValueError
    large, small, broken = summary.read(tmp_path)
    assert large["what"] == "large" and large["failed"].startswith("out of memory: CUDA")
    assert small["ms"] == 1
    assert not summary.failures([large, small])
    assert broken["failed"] == "ValueError: " and summary.failures([broken]) == ["steps: broken"]


@pytest.mark.parametrize(
    ("part", "code", "ended", "ok"),
    [
        ("steps", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9, False),
        ("steps", "raise SystemExit(3)", 3, False),
        ("steps", "import time; time.sleep(60)", "timeout", None),
        ("resume", "import time; time.sleep(60)", "timeout", False),
        ("resume", "pass", 0, None),
    ],
)
def test_how_a_part_ended_is_recorded(
    tmp_path: Path, part: str, code: str, ended: Any, ok: bool | None
) -> None:
    run_part(part, [sys.executable, "-c", code], 2.0, tmp_path)
    [line] = summary.read(tmp_path)
    assert line["ended"] == ended and line.get("ok") is ok
    assert summary.failures([line]) == ([f"{part}: part"] if ok is False else [])


def test_the_summary_has_every_result_and_names_what_failed(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"part": "parity", "what": "A", "difference": 1e-6, "ok": True},
        {"part": "parity", "what": "B", "difference": 1.0, "ok": False},
        {"part": "steps", "what": "eager, 192 rows", "samples/s": 390.0},
        {"part": "steps", "what": "plain, 384 rows", "failed": "out of memory"},
    ]
    (tmp_path / "gpu_check.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    text = summary.text(summary.read(tmp_path))
    assert all(line["what"] in text for line in lines)
    assert text.endswith("1 of 2 checks passed\nFAILED  parity: B")
