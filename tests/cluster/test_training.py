"""What only real Ray processes can show of training."""

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


def test_ray_data_gives_the_rows_of_the_local_stream_in_its_order(
    ray_cluster: None, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid.cluster import stream as ray_stream

    monkeypatch.setattr(ray_stream, "ROWS_PER_BLOCK", 8)
    monkeypatch.setattr(ray_stream, "BLOCKS_PER_PIPELINE", 5)
    stream = Stream(Dataset.open(prepared), seed=3)
    slots, first = range(2, 6), 7
    made = islice(ray_stream.ray_rounds(stream, slots, 8, first), 23)  # three pipelines
    wanted = islice(LocalContext(torch.device("cpu")).rounds(stream, slots, 8, first), 23)
    for ours, theirs in zip(made, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_nothing_runs_beside_training_while_rows_wait_to_be_taken(
    ray_cluster: None, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline that is slower than it could be keeps Ray Data's executor spinning."""
    from hybrid.cluster import stream as ray_stream

    # Half a megabyte each, as those of a 30 x 30 canvas are.
    monkeypatch.setattr(ray_stream, "ROWS_PER_BLOCK", 8192)

    def executors() -> list[str]:
        names = [thread.name for thread in threading.enumerate()]
        return [name for name in names if name.startswith("StreamingExecutor")]

    rounds = ray_stream.ray_rounds(Stream(Dataset.open(prepared), seed=3), range(4), 4, 0)
    assert len(next(rounds)["inputs"]) == 4
    waited = time.monotonic() + 30
    while executors() and time.monotonic() < waited:
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
def test_what_only_one_worker_refuses_ends_the_run_and_is_said(
    ray_cluster: None, experiment: Experiment
) -> None:
    """The others wait for it: once they did so for half an hour, or for ever."""
    config = experiment("odd", cluster={"num_workers": 2})
    (config.run_folder / "train_1.log").mkdir(parents=True)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"odd: cannot be written to \(.*train_1\.log"):
        pretrain(config)
    assert time.monotonic() - began < 150


def test_two_ray_workers_train_the_same_weights_to_rounding(
    ray_cluster: None, experiment: Experiment, local_run: Path
) -> None:
    config = experiment("two", cluster={"num_workers": 2})
    result = pretrain(config)
    alone, shared = tensors(local_run), tensors(result.checkpoint)
    for name in alone.keys() - {n for n in alone if n.startswith("slots_")}:
        torch.testing.assert_close(shared[name], alone[name], rtol=0, atol=5e-5, msg=name)
    for name in ("steps", "halted", "taken", "current.inputs", "current.puzzle_identifiers"):
        halves = [shared[f"slots_00000{a}_00000{b}/{name}"] for a, b in ((0, 4), (4, 8))]
        assert torch.equal(torch.cat(halves), alone[f"slots_000000_000008/{name}"]), name


def test_a_killed_worker_costs_nothing_but_time(ray_cluster: None, experiment: Experiment) -> None:
    steps = {"steps": 400, "save_every": 50, "train_accuracy_pairs": 0}
    undisturbed = pretrain(experiment("calm", training=steps, cluster={"num_workers": 0}))
    config = experiment("killed", training=steps)
    killed: list[int] = []
    killer = threading.Thread(target=kill_after_first_checkpoint, args=(config, killed))
    killer.start()
    result = pretrain(config)
    killer.join()
    assert killed, "nobody was killed: the run was over too soon"
    log = (config.run_folder / "train_0.log").read_text()
    assert log.count(" of 400, ") == 2, "the worker should have started twice"
    assert_same(undisturbed.checkpoint, result.checkpoint)


def kill_after_first_checkpoint(config: Config, killed: list[int]) -> None:
    from ray.util.state import list_actors

    while not newest(config.run_folder / "checkpoints"):
        time.sleep(0.05)
    for actor in list_actors(
        filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")]
    ):
        os.kill(actor.pid, signal.SIGKILL)
        killed.append(actor.pid)


def test_workers_that_can_never_fit_are_refused_before_anything_starts(
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


def test_wrong_input_found_by_a_worker_is_still_the_users_one_line(
    ray_cluster: None, experiment: Experiment
) -> None:
    config = experiment("odd", training={"batch_size": 1}, cluster={"num_workers": 2})
    with pytest.raises(UserError, match=r"training\.batch_size=1 leaves some of 2"):
        pretrain(config)
