"""A pretended GPU, which raises where an operation mixes it with the CPU.

    python tests/gpu/pretended_device.py LIBRARY FOLDER SETTING

trains, resumes and evaluates a TRM and a hybrid on it, with the config changes of SETTING. It runs
in its own process, because a process can register only one such device.
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
from hybrid.evaluate.records import Prediction
from hybrid.evaluate.run import PredictAll
from hybrid.train import joint, pretrain

NAME = "pretended"
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "full": {},
    "bucketed": {"data": {"canvas": "bucketed"}},
    "micro-batches": {"data": {"canvas": "bucketed"}, "training": {"micro_batch_size": 2}},
    "learning": {"llama": {"frozen": False}},
}
"""Changes to the config by name."""


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
        predictor: TRMPredictor | HybridPredictor
        if job.checkpoint.state["kind"] == "hybrid":
            predictor = HybridPredictor(job.checkpoint, job.config, device)
        else:
            predictor = TRMPredictor(job.checkpoint, job.config.evaluation, device)
        for question in questions:
            yield predictor.predict(question)

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


def configure_run(
    make: Callable[..., Config], root: Path, setting: str, kind: str
) -> Callable[..., Config]:
    """Return a function that makes the config of a run of `kind` from sections of keys."""
    keys: dict[str, dict[str, Any]] = {
        "data": {"max_side": 12, "variants": 1},
        "paths": {
            "root": str(root),
            "data": str(root / "data"),
            "runs": str(root / kind),
        },
    }
    keys = merged(keys, SETTINGS[setting])
    return lambda **sections: make(root, **merged(keys, sections))


def merged(
    keys: dict[str, dict[str, Any]], changes: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return sections of keys with changes."""
    return {name: keys.get(name, {}) | changes.get(name, {}) for name in keys | changes}


def main() -> None:
    library, root, setting = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    device = register(library)
    if "llama" not in SETTINGS[setting]:
        train_resume_and_evaluate(pretrain, configure_run(config_of, root, setting, "trm"), device)
    train_resume_and_evaluate(joint, configure_run(hybrid_of, root, setting, "hybrid"), device)
    print("done")


if __name__ == "__main__":
    main()
