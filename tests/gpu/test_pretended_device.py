"""Nothing is left on the CPU: training and evaluation on a pretended GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gpu.pretended_device import SETTINGS, build
from helpers import EVALUATED, TRAINED, write_tasks

from hybrid.arc import Task

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("device"))


def run(*command: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(path) for path in (HERE.parents[1], HERE.parent))
    environment = os.environ | {"PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )


def test_mix_of_devices_raises(library: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from gpu.pretended_device import register;"
        "one = torch.ones(3, device=register(Path(sys.argv[1])));"
        "assert float(one @ one) == 3; one @ torch.ones(3)"
    )
    done = run("-c", code, str(library))
    assert "Expected all tensors to be on the same device: aten::dot" in done.stderr


@pytest.mark.parametrize("setting", SETTINGS)
def test_trm_and_hybrid_train_resume_and_answer(
    library: Path, tmp_path: Path, arc1: dict[str, Task], setting: str
) -> None:
    # One task is on another canvas than the others.
    write_tasks(tmp_path / "training", [arc1[task] for task in (*TRAINED, "0962bcdd")])
    write_tasks(tmp_path / "evaluation", [arc1[task] for task in EVALUATED])
    done = run(str(HERE / "pretended_device.py"), str(library), str(tmp_path), setting)
    assert done.stdout.endswith("done\n"), done.stderr[-3000:]
