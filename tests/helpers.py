"""Small experiments on real tasks, and what tests run in processes of their own."""

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
from hybrid.evaluate.run import PredictAll
from hybrid.evaluate.trm_predictor import Prediction
from hybrid.train import TrainState, state
from hybrid.train.loader import SlotLoader

TRAINED = ("49d1d64f", "74dd1130", "d631b094")
ASKED = ("25ff71a9", "44f52bb0", "d037b0a7")
"""Real tasks on a canvas of side 5. Not all grids are square; ASKED have 2, 2 and 1 tests."""

STORE_KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""The environment of whoever uses an object store."""


@contextlib.contextmanager
def object_store(log: Path) -> Iterator[Callable[[], str]]:
    """A server that speaks S3, in a process of its own: bucket() -> the URI of a new root."""
    port, numbers = free_port(), count()
    options = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            end = time.monotonic() + 60
            while not _listens(port):
                assert time.monotonic() < end, "the server of objects does not listen"
                time.sleep(0.1)
            yield lambda: f"s3://bucket{next(numbers)}/arc?{options}&allow_bucket_creation=true"
        finally:
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def config_of(root: Path, **sections: dict[str, Any]) -> Config:
    """A tiny experiment under `root`, on the tasks in root/training and root/evaluation."""
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
    """The same around a language model that knows nothing, three attempts a puzzle."""
    keys: dict[str, dict[str, Any]] = {
        "llama": {"model": "tiny-random"},
        "adapter": {"hidden": 16, "prefix_tokens": 2, "lr": 1e-3},
        "training": {"max_attempts": 3},
    }
    return config_of(root, **{s: keys.get(s, {}) | sections.get(s, {}) for s in keys | sections})


def feed_of(state: TrainState, rounds: Iterator[Rows], first: int = 0) -> SlotLoader:
    """The feed of a state's slots."""
    return SlotLoader(rounds, first, state.rows_consumed, state.carry.current["side"])


def next_batch(feed: SlotLoader, state: TrainState) -> dict[str, Tensor]:
    """The batch of a state's next step."""
    return feed.refill(state.carry, state.halted)


def write_tasks(folder: Path, tasks: Iterable[Task]) -> None:
    """One JSON file a task, as in the official repositories; unknown outputs have no key."""

    def pair(value: Pair) -> dict[str, Any]:
        names = ("input", "output")
        return {name: grid.tolist() for name, grid in zip(names, value.grids, strict=False)}

    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        text = {"train": [pair(p) for p in task.train], "test": [pair(p) for p in task.test]}
        (folder / f"{task.id}.json").write_text(json.dumps(text))


def poison(task: Task) -> Task:
    """The task with garbage for answers, of any shape up to the largest there is."""
    rng = np.random.default_rng(list(task.id.encode()))

    def garbage(pair: Pair) -> Pair:
        shape = rng.integers(1, 31, 2)
        return replace(pair, output=rng.integers(0, 10, shape, dtype=np.uint8))

    return replace(task, test=tuple(garbage(pair) for pair in task.test))


def metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    times = ("samples_per_s", "seconds_per_step", "waiting_for_rows")
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


def tensors(folder: Path) -> dict[str, Tensor]:
    """All of a checkpoint, the slots of its workers joined in order."""
    slots = [load_file(file) for file in sorted(folder.glob("slots_*"))]
    joined = {name: torch.cat([part[name] for part in slots]) for name in slots[0]}
    for file in ("model", "ema", "optimizer", "puzzle_table"):
        joined |= {f"{file}.{k}": v for k, v in load_file(folder / f"{file}.safetensors").items()}
    return joined


def assert_close(one: Path, other: Path, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Two checkpoints are the same to rounding; whole numbers are the same. 0, 0: bit for bit."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    for name in a:
        if a[name].is_floating_point() and atol:
            torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=name)
        else:
            assert torch.equal(a[name], b[name]), f"{name} differs"


def quietly(config: Config, predict_all: PredictAll = predict_locally) -> Outcome:
    """Evaluate without a word."""
    return evaluate(config, predict_all, say=lambda line: None)


def predictions(folder: Path) -> dict[str, Any]:
    """By task, without the seconds they took."""
    found = {p.stem: json.loads(p.read_text()) for p in (folder / "predictions").glob("*.json")}
    for prediction in found.values():
        del prediction["spent"]["seconds"]
    return found


def recording(asked: list[Question], predict_all: PredictAll = predict_locally) -> PredictAll:
    """Answers as `predict_all` does, and keeps the questions."""

    def record(job: Job, questions: Sequence[Question]) -> Iterator[Prediction]:
        asked.extend(questions)
        return predict_all(job, questions)

    return record


class StuckAt:
    """A `say` that never returns from the first line with `word` in it."""

    def __init__(self, word: str, reached: Event) -> None:
        self.word, self.reached = word, reached

    def __call__(self, line: str) -> None:
        if self.word in line:
            self.reached.set()
            time.sleep(600)


def save_rows(dataset: Path, seed: int, positions: Mapping[str, list[int]], file: Path) -> None:
    """Rows of a stream as another process makes them, its global generator in another state."""
    np.random.seed(12345)
    rows = Stream(Dataset.open(dataset), seed).rows
    made = {part: rows(np.array(places)) for part, places in positions.items()}
    np.savez(file, **{f"{part}.{k}": v for part, found in made.items() for k, v in found.items()})


def train_as_rank(
    loop: Callable[..., Any],
    rank: int,
    world_size: int,
    store: Path,
    config: Config,
    adamw: bool = False,
    device: str = "cpu",
) -> None:
    """One of several training processes that meet over the loopback, or of several GPUs."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    backend, mine = "gloo", torch.device("cpu")
    if device == "cuda":
        backend, mine = "nccl", torch.device("cuda", rank)
        torch.cuda.set_device(mine)
    if adamw:
        state.AdamAtan2 = ClippedAdamW  # type: ignore[assignment, misc]
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=world_size
    )
    loop(config, ProcessGroupContext(mine))
    dist.destroy_process_group()


class ClippedAdamW:
    """AdamW behind a clipped gradient, in the shape of AdamAtan2: unlike it, not scale-free."""

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
    """Seal a checkpoint, but never get past the moment before the rename."""

    def stuck(source: Path, target: Path) -> None:
        reached.set()
        time.sleep(600)

    os.replace = stuck  # type: ignore[assignment]
    checkpoint.seal(partial, folder, {"step": 4}, {"config.yaml": "a: 1\n"})


def change_weights(
    folder: Path,
    change: Callable[[dict[str, Tensor]], None],
    files: Sequence[str] = ("model", "ema"),
) -> None:
    """Write a checkpoint again, `change` applied to the model's tensors and to their average."""
    whole, partial = checkpoint.read(folder), folder.with_suffix(".partial")
    for path in whole.files(""):
        tensors = whole.tensors(path.stem)
        if path.stem in files:
            change(tensors)
        checkpoint.write_tensors(partial, path.stem, tensors)
    texts = {name: (folder / name).read_text() for name in ("config.yaml", "trained_on.json")}
    described = {k: v for k, v in whole.state.items() if k not in ("format", "files")}
    checkpoint.seal(partial, folder, described, texts)


def undecided(tensors: dict[str, Tensor]) -> None:
    """Give a model a halt head that stops some rows early: a new one stops none."""
    generator = torch.Generator().manual_seed(11)  # of the first dozen the one that mixes best
    trm = "" if "q_head.weight" in tensors else "trm."  # inside a hybrid
    tensors[f"{trm}q_head.weight"].normal_(generator=generator)
    tensors[f"{trm}q_head.bias"].zero_()


def scattered(tensors: dict[str, Tensor]) -> None:
    """Give every puzzle a row of its own, the blank one included."""
    tensors["puzzle_table"].normal_(generator=torch.Generator().manual_seed(5))
