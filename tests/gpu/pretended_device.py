"""A pretended GPU, which raises where an operation mixes it with the CPU.

    python tests/gpu/pretended_device.py LIBRARY FOLDER

trains, resumes and evaluates a TRM and a hybrid on it. A process of its own, because a process can
have one such device and keeps it.
"""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from helpers import assert_close, config_of, hybrid_of, predictions
from torch.utils import cpp_extension

from hybrid.config import Config
from hybrid.context import LocalContext
from hybrid.dataset import prepare
from hybrid.evaluate import HybridPredictor, Job, Question, TRMPredictor, evaluate
from hybrid.evaluate.run import PredictAll
from hybrid.evaluate.trm_predictor import Prediction
from hybrid.train import joint, pretrain

NAME = "pretended"


def build(folder: Path) -> Path:
    """Compile the device; returns its library."""
    library = folder / "pretended_device.so"
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC"]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    command += [str(Path(__file__).with_suffix(".cpp")), "-o", str(library)]
    command += [f"-L{path}" for path in cpp_extension.library_paths()]
    subprocess.run([*command, "-ltorch_cpu", "-lc10"], check=True)
    return library


def register(library: Path) -> torch.device:
    """Make the device known to torch."""
    torch.ops.load_library(str(library))
    torch.utils.rename_privateuse1_backend(NAME)
    torch.utils.generate_methods_for_privateuse1_backend()
    module = types.ModuleType(f"torch.{NAME}")
    functions: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.zeros(8, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "synchronize": lambda *device: None,
        "get_amp_supported_dtype": lambda: [torch.bfloat16],
    }
    for name, function in functions.items():
        setattr(module, name, function)
    torch._register_device_module(NAME, module)
    return torch.device(NAME, 0)


def solve_on(device: torch.device) -> PredictAll:
    """Answer questions in this process, on a device that no config names."""

    def predict_all(job: Job, questions: Sequence[Question]) -> Iterator[Prediction]:
        solver: TRMPredictor | HybridPredictor
        if job.checkpoint.state["kind"] == "hybrid":
            solver = HybridPredictor(job.checkpoint, job.config, device)
        else:
            solver = TRMPredictor(job.checkpoint, job.config.evaluation, device)
        for question in questions:
            yield solver.solve(question)

    return predict_all


def train_resume_and_evaluate(
    loop: Callable[..., Any], configure: Callable[..., Config], device: torch.device
) -> None:
    """Compare a run on the device with the same run on the CPU, and with itself in two halves."""
    cpu = torch.device("cpu")

    def run(name: str, steps: int, on: torch.device) -> Config:
        config = configure(training={"steps": steps}, logging={"run": name})
        prepare(config.data, config.data_folder, lambda line: None)
        loop(config, LocalContext(on))
        return config

    whole, expected = run("whole", 4, device), run("cpu", 4, cpu)
    run("halves", 2, device)
    halves = run("halves", 4, device)
    last = "checkpoints/step_00000004"
    assert_close(whole.run_folder / last, halves.run_folder / last, 0, 0)
    assert_close(whole.run_folder / last, expected.run_folder / last)
    answers = [
        predictions(evaluate(config, solve_on(on), say=lambda line: None).folder)
        for config, on in ((whole, device), (expected, cpu))
    ]
    assert answers[0].keys() == answers[1].keys() and answers[0]


def main() -> None:
    library, root = (Path(argument) for argument in sys.argv[1:])
    torch.set_num_threads(1)
    device = register(library)
    for canvas in ("full", "bucketed"):
        data = {"canvas": canvas, "max_side": 12, "variants": 1}

        def trm(canvas: str = canvas, data: Any = data, **sections: Any) -> Config:
            paths = {"root": str(root), "data": str(root / canvas)}
            paths["runs"] = str(root / f"trm-{canvas}")
            return config_of(root, data=data, paths=paths, **sections)

        def hybrid(canvas: str = canvas, data: Any = data, **sections: Any) -> Config:
            paths = {"root": str(root), "data": str(root / canvas)}
            paths["runs"] = str(root / f"hybrid-{canvas}")
            return hybrid_of(root, data=data, paths=paths, **sections)

        train_resume_and_evaluate(pretrain, trm, device)
        train_resume_and_evaluate(joint, hybrid, device)
    print("done")


if __name__ == "__main__":
    main()
