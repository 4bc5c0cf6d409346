"""Data-parallel training: any number of workers trains and resumes the same run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import ClippedAdamW, assert_close, metrics, tensors

from hybrid.config import Config
from hybrid.context import worker_slots
from hybrid.errors import UserError
from hybrid.train import Result
from hybrid.train.update import exploration

CopyRun = Callable[..., Config]
Train = Callable[[Config], Result]
TrainOnTwo = Callable[..., None]

SIX_STEPS = {"steps": 7, "save_every": 3}


def folder(config: Config, step: int) -> Path:
    return config.run_folder / "checkpoints" / f"step_{step:08d}"


def test_one_and_two_workers_and_switching_between_them_agree(
    copy_run: CopyRun, train: Train, train_on_two: TrainOnTwo
) -> None:
    """The run `base` was trained by one worker, so `two` already switches from one to two."""
    one, two, back = (copy_run(name, training=SIX_STEPS) for name in ("one", "two", "back"))
    train(one)
    train_on_two(two)
    rows_consumed = tensors(folder(one, 7))["rows_consumed"]
    assert len(set(rows_consumed.tolist())) > 1, "all rows halted in the same steps"
    parts = ["slots_000000_000003.safetensors", "slots_000003_000006.safetensors"]
    assert sorted(path.name for path in folder(two, 7).glob("slots_*")) == parts
    for step in (3, 6, 7):
        assert_close(folder(one, step), folder(two, step))
    shutil.rmtree(back.run_folder)
    shutil.copytree(two.run_folder, back.run_folder)
    for step in (6, 7):
        shutil.rmtree(folder(back, step))
    train(back)
    assert_close(folder(one, 7), folder(back, 7))
    for ours, theirs in zip(metrics(one.run_folder), metrics(two.run_folder), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_gradients_are_summed_over_workers_not_averaged(
    copy_run: CopyRun, train: Train, train_on_two: TrainOnTwo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clipped AdamW depends on the gradient scale, unlike Adam-atan2 and sign-SGD."""
    one, two = (copy_run(name, training={"steps": 3, "save_every": 1}) for name in ("one", "two"))
    train_on_two(two, adamw=True)
    monkeypatch.setattr("hybrid.train.state.AdamAtan2", ClippedAdamW)
    train(one)
    for step in (2, 3):
        assert_close(folder(one, step), folder(two, step))
        norm = torch.stack(
            [
                g.norm()
                for n, g in tensors(folder(one, step)).items()
                if n.startswith("optimizer.m.")
            ]
        ).norm()
        assert norm > 0.1, "gradients too small to tell"


def test_worker_slots_split_the_batch_evenly_or_raise() -> None:
    with pytest.raises(UserError, match=r"training\.batch_size=2 leaves some of 3 workers without"):
        worker_slots(2, 0, 3)
    assert [list(worker_slots(6, rank, 3)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    for batch in range(3, 50):
        parts = [worker_slots(batch, rank, 3) for rank in range(3)]
        assert [slot for part in parts for slot in part] == list(range(batch))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("workers", [1, 2, 3, 6])
def test_exploration_does_not_depend_on_the_number_of_workers(workers: int) -> None:
    whole = exploration(0, 5, 6, range(6))
    parts = [exploration(0, 5, 6, worker_slots(6, rank, workers)) for rank in range(workers)]
    for draw in range(2):
        assert torch.equal(torch.cat([part[draw] for part in parts]), whole[draw])
    assert not torch.equal(whole[0], whole[1])
    for other in (exploration(0, 6, 6, range(6)), exploration(1, 5, 6, range(6))):
        assert not torch.equal(whole[0], other[0])
