"""Training and evaluation on several nodes, and after the loss of a node."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import STORE_KEYS, assert_close, metrics, predictions, tensors
from pyarrow import fs

from hybrid.checkpoint import newest
from hybrid.config import Config
from hybrid.launch import evaluate, pretrain

Experiment = Callable[..., Config]
Until = Callable[..., None]
Nodes = Callable[[int], list[Any]]

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = {
    "steps": 300,
    "save_every": 50,
    "keep_checkpoints": 1000,
    "train_accuracy_pairs": 0,
    "lr": 1e-5,
}
LAST = "checkpoints/step_00000300"
TWO = {"num_workers": 2, "cpus_per_worker": 2}


def step_of(config: Config) -> int:
    try:
        return max((line["step"] for line in metrics(config.run_folder)), default=0)
    except (OSError, ValueError):
        return 0


def starts(config: Config, rank: int = 0) -> list[int]:
    """Return the steps at which the workers of a run have started."""
    lines = (config.run_folder / f"train_{rank}.log").read_text().splitlines()
    return [int(line.split(" step ")[1].split()[0]) for line in lines if " of 300, " in line]


def max_difference(one: Path, other: Path) -> float:
    """Return the largest absolute difference between two checkpoints, including the carry."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def finished(process: subprocess.Popen[str], seconds: float) -> str:
    out, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, out
    return out


@pytest.fixture(scope="module")
def one_worker(shell: Any, experiment: Experiment) -> Path:
    """The last checkpoint of one worker without a cluster."""
    config = experiment("calm-nodes", training=STEPS)
    shell.run_local("pretrain.py", config)
    return config.run_folder / LAST


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., Any]) -> Any:
    """A head node with one CPU, for the data stream only."""
    return start_cluster(1, RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="0.5", **STORE_KEYS)


@pytest.fixture
def nodes(cluster: Any, tmp_path: Path, until: Until) -> Nodes:
    """nodes(n) returns n nodes besides the head, with CPUs for one worker each; it starts or kills
    nodes as needed. They share the file system, but each has its own cache of the object store.
    """

    def resize(count: int) -> list[Any]:
        workers = [node for node in cluster.nodes[1:] if node.process.poll() is None]
        for node in workers[count:]:
            node.kill()
        workers = workers[:count]
        until(lambda: len(cluster.alive()) == 1 + len(workers), 60, "Ray to notice dead nodes")
        for number in range(count - len(workers)):
            one_core = ("taskset", "-c", str(len(workers) % 2))
            cache = str(tmp_path / f"cache{number}")
            workers.append(cluster.add(2, one_core, ARC_HYBRID_CACHE=cache))
        return workers[:count]

    return resize


def node_of(nodes: list[Any], pid: int) -> Any:
    [found] = [n for n in nodes if pid in {process.pid for process in n.processes()}]
    return found


@pytest.fixture(scope="module")
def pair(cluster: Any, experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of an uninterrupted run of two workers on two nodes."""
    workers = [cluster.add(2, ("taskset", "-c", core)) for core in "01"]
    config = experiment("pair", training=STEPS, cluster=TWO)
    process = cluster.spawn(*cluster.job("pretrain.py", config), RAY_ADDRESS=cluster.address)
    deadline = time.monotonic() + 120
    while not step_of(config):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    used = {node_of(workers, pid) for pid in cluster.pids("RayTrainWorker")}
    assert len(used) == 2, "both workers are on one node"
    finished(process, 200)
    return config.run_folder / LAST


def test_two_nodes_train_the_same_weights_as_one_process_up_to_rounding(
    one_worker: Path, pair: Path
) -> None:
    print(f"two nodes differ from one process by {max_difference(one_worker, pair):.1e}")
    assert max_difference(one_worker, pair) < 2e-5


def test_spare_node_replaces_a_lost_one_and_weights_are_identical(
    cluster: Any,
    nodes: Nodes,
    experiment: Experiment,
    pair: Path,
    until: Until,
) -> None:
    workers = nodes(3)
    config = experiment("spare", training=STEPS, cluster=TWO)
    process = cluster.spawn(*cluster.job("pretrain.py", config), RAY_ADDRESS=cluster.address)
    until(lambda: step_of(config) > 110 or process.poll() is not None, 120, "steps")
    node_of(workers, cluster.pids("RayTrainWorker")[0]).kill()
    killed = time.monotonic()
    until(lambda: len(starts(config)) > 1 or process.poll() is not None, 200, "new workers")
    print(f"trains again {time.monotonic() - killed:.1f} s after a node was lost")
    finished(process, 300)
    print(
        f"started at {starts(config)}; difference: {max_difference(pair, config.run_folder / LAST)}"
    )
    assert_close(pair, config.run_folder / LAST, 0, 0)


def test_training_continues_on_remaining_nodes_with_the_same_batch(
    cluster: Any,
    nodes: Nodes,
    experiment: Experiment,
    pair: Path,
    until: Until,
) -> None:
    workers = nodes(2)
    config = experiment("elastic", training=STEPS, cluster={**TWO, "min_workers": 1})
    process = cluster.spawn(*cluster.job("pretrain.py", config), RAY_ADDRESS=cluster.address)
    until(lambda: step_of(config) > 110 or process.poll() is not None, 120, "steps")
    assert len(cluster.pids("RayTrainWorker")) == 2
    node_of(workers, cluster.pids("RayTrainWorker")[0]).kill()
    killed = time.monotonic()
    until(lambda: len(starts(config)) > 1 or process.poll() is not None, 200, "new workers")
    print(f"continues {time.monotonic() - killed:.1f} s after a node was lost")
    finished(process, 300)
    last = config.run_folder / LAST
    assert json.loads((last / "state.json").read_text())["world_size"] == 1
    print(f"started at {starts(config)}; difference: {max_difference(pair, last):.1e}")
    assert max_difference(pair, last) < 2e-5
    batches = {m["epoch"] / m["step"] for m in metrics(config.run_folder) if "epoch" in m}
    assert batches  # equal weights imply the same rows in the same order


def test_draining_a_node_saves_a_checkpoint_at_once(
    cluster: Any,
    nodes: Nodes,
    experiment: Experiment,
    pair: Path,
    until: Until,
) -> None:
    workers = nodes(3)
    config = experiment("drained", training={**STEPS, "save_every": 300}, cluster=TWO)
    process = cluster.spawn(*cluster.job("pretrain.py", config), RAY_ADDRESS=cluster.address)
    until(lambda: step_of(config) > 60 or process.poll() is not None, 120, "steps")
    pid = cluster.pids("RayTrainWorker")[0]
    leaving = node_of(workers, pid)
    [drained] = [
        node.node_id
        for node in cluster.alive()
        if pid in cluster.pids("RayTrainWorker", node.node_id)
    ]
    done = cluster.run(
        *("ray", "drain-node", "--address", cluster.address, "--node-id", drained),
        *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"),
        *("--deadline-remaining-seconds", "15"),
    )
    assert done.code == 0, done.out + done.err
    drain = time.monotonic()
    folder = config.run_folder / "checkpoints"
    until(lambda: list(folder.glob("step_*[0-9]")), 60, "a checkpoint")
    print(f"saved {time.monotonic() - drain:.1f} s after the warning")
    saved = newest(folder)
    assert saved is not None and 60 < saved.state["step"] < 300
    assert saved.state["world_size"] == 2
    time.sleep(max(0, drain + 15 - time.monotonic()))
    leaving.kill()  # even if the run has ended: Ray no longer schedules anything on it
    finished(process, 300)
    print(f"started at {starts(config)}")
    assert_close(pair, config.run_folder / LAST, 0, 0)


def test_lost_node_loses_no_evaluation_task(
    cluster: Any, nodes: Nodes, many_variants: Experiment, evaluated: Path, until: Until
) -> None:
    workers = nodes(2)
    checkpoint = evaluated.parents[1] / "checkpoints/step_00000004"
    config = many_variants("lost", num_workers=2, cpus_per_worker=2)
    process = cluster.spawn(
        *cluster.job("evaluate.py", config, f"evaluation.checkpoint={checkpoint}"),
        RAY_ADDRESS=cluster.address,
    )
    folders = config.run_folder / "evaluation"
    until(lambda: len(cluster.pids("Evaluator")) == 2, 120, "two actors")
    pids = cluster.pids("Evaluator")
    until(lambda: len(list(folders.glob("*/predictions/*.json"))) > 3, 120, "predictions")
    assert len({node_of(workers, pid) for pid in pids}) == 2
    node_of(workers, pids[0]).kill()
    answered = len(list(folders.glob("*/predictions/*.json")))
    out = process.communicate(timeout=300)[0]
    print(f"killed after {answered} predictions")
    assert process.returncode == 0, out
    [folder] = folders.iterdir()
    assert predictions(folder) == predictions(evaluated)
    printed = re.findall(r"^\d+/15 (\w+)", out, re.M)
    assert len(printed) == 15 == len(set(printed)), out


def test_root_that_a_node_cannot_see_is_rejected_before_the_run_starts(
    cluster: Any, nodes: Nodes, many_variants: Experiment, tmp_path: Path
) -> None:
    nodes(1)
    hide = 'mount -t tmpfs none $HIDDEN && exec "$@"'
    config = many_variants("blind", num_workers=1)
    blind = cluster.add(
        2,
        prefix=("unshare", "-m", "--propagation", "private", "sh", "-c", hide, "sh"),
        HIDDEN=config.paths.root,
    )
    done = cluster.run(*cluster.job("pretrain.py", config), RAY_ADDRESS=cluster.address)
    blind.kill()
    assert done.code == 2, done.out + done.err
    assert done.err == (
        f"error: paths.root={config.paths.root}: 1 of the cluster's 3 nodes do not see it; name a"
        " folder that all of them share, or a URI (s3://, gs://)\n"
    )
    assert not config.run_folder.exists() or not any(config.run_folder.iterdir())
    assert not list(Path(config.paths.root).glob(".seen*"))


def test_job_starts_although_a_node_has_just_died(
    cluster: Any, nodes: Nodes, experiment: Experiment
) -> None:
    nodes(2)[1].kill()
    config = experiment("moment", cluster={"num_workers": 1, "cpus_per_worker": 2})
    done = cluster.run(*cluster.job("pretrain.py", config), RAY_ADDRESS=cluster.address)
    assert done.code == 0, done.out + done.err
    assert "Traceback" not in done.err


def test_nodes_that_share_only_an_object_store_prepare_train_and_evaluate(
    cluster: Any,
    nodes: Nodes,
    experiment: Experiment,
    bucket: Callable[[], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in STORE_KEYS.items():
        monkeypatch.setenv(name, value)
    store = bucket()
    nodes(0)
    nodes(2)
    config = experiment("stored", paths={"root": store, "data": None}, cluster=TWO)
    env = {"RAY_ADDRESS": cluster.address, "ARC_HYBRID_CACHE": str(tmp_path / "driver")}
    for script in ("prepare.py", "pretrain.py", "evaluate.py"):
        done = cluster.run(*cluster.job(script, config), **env)
        print(script, f"{done.seconds:.1f} s", done.out[-400:], done.err[-400:])
        assert done.code == 0, done.out + done.err
    for cache in ("driver", "cache0", "cache1"):
        assert any((tmp_path / cache).rglob("*")), cache

    filesystem, name = fs.FileSystem.from_uri(store)
    fs.copy_files(
        f"{name}/runs/stored", str(tmp_path / "copy/runs/stored"), source_filesystem=filesystem
    )
    copy = tmp_path / "copy/runs/stored"
    assert newest(copy / "checkpoints").folder.name == "step_00000008"
    local = experiment(
        "alone",
        paths={"root": str(tmp_path / "local")},
        evaluation={"checkpoint": str(copy / "checkpoints/step_00000008")},
        cluster={"num_workers": 0},
    )
    trained = pretrain(local).checkpoint
    assert max_difference(trained, copy / "checkpoints/step_00000008") < 5e-5
    expected = evaluate(local)
    [folder] = (copy / "evaluation").iterdir()
    assert predictions(folder) == predictions(expected.folder)
    submissions = [(f / "submission.json").read_bytes() for f in (folder, expected.folder)]
    assert submissions[0] == submissions[1]
