"""Training on real Ray workers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from hybrid.checkpoint import newest, read
from hybrid.config import Config
from hybrid.context import LocalContext
from hybrid.dataset import Dataset, Stream
from hybrid.errors import UserError
from hybrid.launch import pretrain

Experiment = Callable[..., Config]

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = read(folder)
    names = [path.stem for path in checkpoint.files("")]
    return {f"{n}/{key}": t for n in names for key, t in checkpoint.tensors(n).items()}


def assert_same(one: Path, other: Path, tolerance: float = 0) -> None:
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    for name, value in left.items():
        if tolerance and value.is_floating_point():
            torch.testing.assert_close(value, right[name], rtol=0, atol=tolerance, msg=name)
        else:
            assert torch.equal(value, right[name]), name


@pytest.fixture(scope="module")
def local_run(experiment: Experiment) -> Path:
    config = experiment("local", cluster={"num_workers": 0})
    return pretrain(config).checkpoint


def test_ray_data_yields_the_rows_of_the_local_stream_in_order(
    ray_cluster: None, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid.cluster import stream as ray_stream

    monkeypatch.setattr(ray_stream, "ROWS_PER_BLOCK", 8)
    monkeypatch.setattr(ray_stream, "BLOCKS_PER_PIPELINE", 5)
    stream = Stream(Dataset.open(prepared), seed=3)
    slots, first = range(2, 6), 7
    actual = islice(ray_stream.ray_rounds(stream, slots, 8, first), 23)  # three pipelines
    expected = islice(LocalContext(torch.device("cpu")).rounds(stream, slots, 8, first), 23)
    for actual_rows, expected_rows in zip(actual, expected, strict=True):
        assert actual_rows.keys() == expected_rows.keys()
        for name in expected_rows:
            np.testing.assert_array_equal(actual_rows[name], expected_rows[name])


def test_ray_data_is_idle_while_its_rows_wait_to_be_consumed(
    ray_cluster: None, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline that waits for its consumer would keep Ray Data's executor spinning."""
    from hybrid.cluster import stream as ray_stream

    # Blocks of half a megabyte, as on a 30 x 30 canvas.
    monkeypatch.setattr(ray_stream, "ROWS_PER_BLOCK", 8192)

    def executors() -> list[str]:
        names = [thread.name for thread in threading.enumerate()]
        return [name for name in names if name.startswith("StreamingExecutor")]

    rounds = ray_stream.ray_rounds(Stream(Dataset.open(prepared), seed=3), range(4), 4, 0)
    assert len(next(rounds)["inputs"]) == 4
    deadline = time.monotonic() + 30
    while executors() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert executors() == []
    before = time.process_time()
    time.sleep(2)
    assert time.process_time() - before < 0.5
    assert len(next(rounds)["inputs"]) == 4


def test_one_ray_worker_trains_the_same_weights_as_no_cluster(
    ray_cluster: None, experiment: Experiment, local_run: Path
) -> None:
    config = experiment("one")
    assert_same(local_run, pretrain(config).checkpoint)


@pytest.mark.slow
def test_user_error_of_a_single_worker_ends_the_run(
    ray_cluster: None, experiment: Experiment
) -> None:
    """The other workers must not wait for it in a collective operation."""
    config = experiment("odd", cluster={"num_workers": 2})
    (config.run_folder / "train_1.log").mkdir(parents=True)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"odd: cannot be written to \(.*train_1\.log"):
        pretrain(config)
    assert time.monotonic() - started < 150


def test_two_ray_workers_train_the_same_weights_up_to_rounding(
    ray_cluster: None, experiment: Experiment, local_run: Path
) -> None:
    config = experiment("two", cluster={"num_workers": 2})
    result = pretrain(config)
    local, distributed = tensors(local_run), tensors(result.checkpoint)
    for name in local.keys() - {n for n in local if n.startswith("slots_")}:
        torch.testing.assert_close(distributed[name], local[name], rtol=0, atol=5e-5, msg=name)
    per_slot = ("steps", "halted", "rows_consumed", "current.inputs", "current.puzzle_identifiers")
    for name in per_slot:
        halves = [distributed[f"slots_00000{a}_00000{b}/{name}"] for a, b in ((0, 4), (4, 8))]
        assert torch.equal(torch.cat(halves), local[f"slots_000000_000008/{name}"]), name


def test_run_with_a_killed_worker_matches_uninterrupted_run(
    ray_cluster: None, experiment: Experiment
) -> None:
    steps = {"steps": 400, "save_every": 50, "train_accuracy_pairs": 0}
    uninterrupted = pretrain(experiment("calm", training=steps, cluster={"num_workers": 0}))
    config = experiment("killed", training=steps)
    killed: list[int] = []
    killer = threading.Thread(target=kill_after_first_checkpoint, args=(config, killed))
    killer.start()
    result = pretrain(config)
    killer.join()
    assert killed, "the run ended before a worker was killed"
    log = (config.run_folder / "train_0.log").read_text()
    assert log.count(" of 400, ") == 2, "the worker should have started twice"
    assert_same(uninterrupted.checkpoint, result.checkpoint)


def kill_after_first_checkpoint(config: Config, killed: list[int]) -> None:
    from ray.util.state import list_actors

    while not newest(config.run_folder / "checkpoints"):
        time.sleep(0.05)
    for actor in list_actors(
        filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")]
    ):
        os.kill(actor.pid, signal.SIGKILL)
        killed.append(actor.pid)


def test_too_many_workers_are_rejected_before_the_run_starts(
    ray_cluster: None, experiment: Experiment
) -> None:
    config = experiment(
        "many",
        training={"batch_size": 8},
        cluster={"num_workers": 8, "cpus_per_worker": 1},
    )
    with pytest.raises(UserError, match=r"cluster\.num_workers=8.*the cluster has 4"):
        pretrain(config)
    assert not (config.run_folder / "checkpoints").exists()


def test_user_error_of_a_worker_reaches_the_driver(
    ray_cluster: None, experiment: Experiment
) -> None:
    config = experiment("odd", training={"batch_size": 1}, cluster={"num_workers": 2})
    with pytest.raises(UserError, match=r"training\.batch_size=1 leaves some of 2"):
        pretrain(config)
