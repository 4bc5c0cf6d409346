"""Small experiments on real tasks, and functions that tests run in separate processes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from hybrid import checkpoint
from hybrid.arc import Pair, Task
from hybrid.config import Config, from_dict
from hybrid.context import ProcessGroupContext
from hybrid.dataset import Dataset, Stream
from hybrid.dataset.stream import Rows
from hybrid.evaluate import Job, Outcome, Question, evaluate, predict_locally
from hybrid.evaluate.records import Prediction
from hybrid.evaluate.run import PredictAll
from hybrid.train import TrainState, state
from hybrid.train.loader import SlotLoader

TRAINED = ("49d1d64f", "74dd1130", "d631b094")
EVALUATED = ("25ff71a9", "44f52bb0", "d037b0a7")
"""Real tasks on a canvas of side 5, some with non-square grids; EVALUATED have 2, 2, 1 tests."""

STORE_KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""Environment variables for access to the local object store."""


@contextlib.contextmanager
def object_store(log: Path) -> Iterator[Callable[[], str]]:
    """Run a local S3 server in a separate process; yield bucket() -> the URI of a new root."""
    port, numbers = free_port(), count()
    options = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            end = time.monotonic() + 60
            while not _listens(port):
                assert time.monotonic() < end, "the S3 server does not listen"
                time.sleep(0.1)
            yield lambda: f"s3://bucket{next(numbers)}/arc?{options}&allow_bucket_creation=true"
        finally:
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """Return a free port of the loopback interface."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def config_of(root: Path, **sections: dict[str, Any]) -> Config:
    """Return the config of a tiny experiment on the tasks in root/training and root/evaluation."""
    raw: dict[str, dict[str, Any]] = {
        "paths": {"root": str(root)},
        "data": {
            "training": [str(root / "training")],
            "evaluation": [str(root / "evaluation")],
            "variants": 5,
            "max_side": 5,
        },
        "trm": {
            "hidden_size": 32,
            "num_heads": 2,
            "expansion": 1,
            "L_layers": 1,
            "H_cycles": 2,
            "L_cycles": 1,
            "halt_max_steps": 4,
            "puzzle_emb_ndim": 32,
            "puzzle_emb_len": 1,
        },
        "training": {
            "batch_size": 6,
            "steps": 4,
            "lr": 1e-4,
            "puzzle_lr": 1e-3,
            "lr_warmup_steps": 2,
            "ema_rate": 0.9,
            "save_every": 2,
            "keep_checkpoints": 100,
            "train_accuracy_pairs": 4,
        },
        "logging": {"run": "run", "every": 1, "wandb": False},
    }
    for section, keys in sections.items():
        raw.setdefault(section, {}).update(keys)
    return from_dict(raw)


def hybrid_of(root: Path, **sections: dict[str, Any]) -> Config:
    """Return the same config for a hybrid with the tiny-random model and three attempts."""
    keys: dict[str, dict[str, Any]] = {
        "llama": {"model": "tiny-random"},
        "adapter": {"hidden": 16, "prefix_tokens": 2, "lr": 1e-3},
        "training": {"max_attempts": 3},
    }
    return config_of(root, **{s: keys.get(s, {}) | sections.get(s, {}) for s in keys | sections})


def loader_of(state: TrainState, rounds: Iterator[Rows], first: int = 0) -> SlotLoader:
    """Return the loader of a state's slots."""
    return SlotLoader(rounds, first, state.rows_consumed, state.carry.current["side"])


def next_batch(loader: SlotLoader, state: TrainState) -> dict[str, Tensor]:
    """Return the batch of the next step."""
    return loader.refill(state.carry, state.halted)


def write_tasks(folder: Path, tasks: Iterable[Task]) -> None:
    """Write one JSON file per task as in the official repositories, omitting unknown outputs."""

    def pair(value: Pair) -> dict[str, Any]:
        names = ("input", "output")
        return {name: grid.tolist() for name, grid in zip(names, value.grids, strict=False)}

    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        text = {"train": [pair(p) for p in task.train], "test": [pair(p) for p in task.test]}
        (folder / f"{task.id}.json").write_text(json.dumps(text))


def poison(task: Task) -> Task:
    """Return the task with random answers of random shapes up to the maximum size."""
    rng = np.random.default_rng(list(task.id.encode()))

    def garbage(pair: Pair) -> Pair:
        shape = rng.integers(1, 31, 2)
        return replace(pair, output=rng.integers(0, 10, shape, dtype=np.uint8))

    return replace(task, test=tuple(garbage(pair) for pair in task.test))


def metrics(run_folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without timings."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    times = ("samples_per_s", "seconds_per_step", "waiting_for_rows")
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint, with the slots of its workers concatenated in order."""
    slots = [load_file(file) for file in sorted(folder.glob("slots_*"))]
    joined = {name: torch.cat([part[name] for part in slots]) for name in slots[0]}
    for file in ("model", "ema", "optimizer", "puzzle_table"):
        joined |= {f"{file}.{k}": v for k, v in load_file(folder / f"{file}.safetensors").items()}
    return joined


def assert_close(one: Path, other: Path, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Assert that two checkpoints are equal to rounding (0, 0: bit for bit); integers exactly."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    for name in a:
        if a[name].is_floating_point() and atol:
            torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=name)
        else:
            assert torch.equal(a[name], b[name]), f"{name} differs"


def quietly(config: Config, predict_all: PredictAll = predict_locally) -> Outcome:
    """Evaluate without progress output."""
    return evaluate(config, predict_all, say=lambda line: None)


def predictions(folder: Path) -> dict[str, Any]:
    """Return the predictions by task, without timings."""
    by_task = {p.stem: json.loads(p.read_text()) for p in (folder / "predictions").glob("*.json")}
    for prediction in by_task.values():
        del prediction["spent"]["seconds"]
    return by_task


def recording(questions: list[Question], predict_all: PredictAll = predict_locally) -> PredictAll:
    """Wrap `predict_all` to append its questions to `questions`."""

    def record(job: Job, batch: Sequence[Question]) -> Iterator[Prediction]:
        questions.extend(batch)
        return predict_all(job, batch)

    return record


class StuckAt:
    """Progress callback that blocks at the first line that contains `word`."""

    def __init__(self, word: str, reached: Event) -> None:
        self.word, self.reached = word, reached

    def __call__(self, line: str) -> None:
        if self.word in line:
            self.reached.set()
            time.sleep(600)


def save_rows(dataset: Path, seed: int, positions: Mapping[str, list[int]], file: Path) -> None:
    """Save rows of a stream, made with another state of the global random generator."""
    np.random.seed(12345)
    rows = Stream(Dataset.open(dataset), seed).rows
    made = {part: rows(np.array(indices)) for part, indices in positions.items()}
    np.savez(file, **{f"{part}.{k}": v for part, batch in made.items() for k, v in batch.items()})


def train_as_rank(
    loop: Callable[..., Any],
    rank: int,
    world_size: int,
    store: Path,
    config: Config,
    adamw: bool = False,
    device: str = "cpu",
) -> None:
    """Run a training loop as one process of a process group on this machine (Gloo, or NCCL)."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    backend, own_device = "gloo", torch.device("cpu")
    if device == "cuda":
        backend, own_device = "nccl", torch.device("cuda", rank)
        torch.cuda.set_device(own_device)
    if adamw:
        state.AdamAtan2 = ClippedAdamW  # type: ignore[assignment, misc]
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=world_size
    )
    loop(config, ProcessGroupContext(own_device))
    dist.destroy_process_group()


class ClippedAdamW:
    """AdamW with gradient clipping and the interface of AdamAtan2, but not scale-invariant."""

    def __init__(
        self, parameters: Mapping[str, Tensor], *, betas: tuple[float, float], weight_decay: float
    ) -> None:
        self.parameters = dict(parameters)
        self.adamw = torch.optim.AdamW(
            self.parameters.values(), betas=betas, weight_decay=weight_decay, eps=1e-2
        )
        self.t = 0
        self.m = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.v = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    def step(self, lr: Mapping[str, float]) -> None:
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None
            self.m[name].copy_(parameter.grad)
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 0.3)
        [self.adamw.param_groups[0]["lr"]] = set(lr.values())
        self.adamw.step()


def stop_in_seal(partial: Path, folder: Path, reached: Event) -> None:
    """Seal a checkpoint, but block right before the rename."""

    def block(source: Path, target: Path) -> None:
        reached.set()
        time.sleep(600)

    os.replace = block  # type: ignore[assignment]
    checkpoint.seal(partial, folder, {"step": 4}, {"config.yaml": "a: 1\n"})


def change_weights(
    folder: Path,
    change: Callable[[dict[str, Tensor]], None],
    files: Sequence[str] = ("model", "ema"),
) -> None:
    """Rewrite a checkpoint after applying `change` to the tensors of `files`."""
    original, partial = checkpoint.read(folder), folder.with_suffix(".partial")
    for path in original.files(""):
        tensors = original.tensors(path.stem)
        if path.stem in files:
            change(tensors)
        checkpoint.write_tensors(partial, path.stem, tensors)
    texts = {name: (folder / name).read_text() for name in ("config.yaml", "trained_on.json")}
    state = {k: v for k, v in original.state.items() if k not in ("format", "files")}
    checkpoint.seal(partial, folder, state, texts)


def randomize_halt_head(tensors: dict[str, Tensor]) -> None:
    """Randomize the halt head so that it stops some rows early; a new one stops none."""
    generator = torch.Generator().manual_seed(11)  # the best mix among the first dozen seeds
    trm = "" if "q_head.weight" in tensors else "trm."  # inside a hybrid
    tensors[f"{trm}q_head.weight"].normal_(generator=generator)
    tensors[f"{trm}q_head.bias"].zero_()


def randomize_puzzle_table(tensors: dict[str, Tensor]) -> None:
    """Randomize all puzzle embeddings, including the blank one."""
    tensors["puzzle_table"].normal_(generator=torch.Generator().manual_seed(5))
