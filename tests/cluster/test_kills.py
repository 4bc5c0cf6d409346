"""Runs whose processes are killed give bit-identical results to uninterrupted runs."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import assert_close, metrics, predictions

from hybrid.checkpoint import newest
from hybrid.config import Config

Experiment = Callable[..., Config]
Until = Callable[..., None]

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = {"steps": 800, "save_every": 25, "keep_checkpoints": 1000, "train_accuracy_pairs": 0}
LAST = "checkpoints/step_00000800"
KILLS = 10


@pytest.fixture(scope="module")
def uninterrupted(shell: Any, experiment: Experiment) -> Path:
    """The last checkpoint of an uninterrupted run without a cluster."""
    config = experiment("calm", training=STEPS)
    shell.run_local("pretrain.py", config)
    return config.run_folder / LAST


@pytest.fixture(scope="module")
def head(start_cluster: Callable[..., Any]) -> Any:
    return start_cluster(4)


def step_of(config: Config) -> int:
    """Return the last step in metrics.jsonl."""
    try:
        lines = metrics(config.run_folder)
    except (OSError, ValueError):
        return 0
    return max((line["step"] for line in lines), default=0)


def starts(config: Config) -> list[int]:
    """Return the steps at which the workers of a run have started."""
    lines = (config.run_folder / "train_0.log").read_text().splitlines()
    return [int(line.split(" step ")[1].split()[0]) for line in lines if " of 800, " in line]


def tree(process: subprocess.Popen[str]) -> list[psutil.Process]:
    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


def kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def finished(process: subprocess.Popen[str], seconds: float) -> str:
    """Wait for a background job, assert that it succeeds, and return its output."""
    out, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, out
    return out


def test_run_resumes_bit_identically_after_driver_and_cluster_are_killed(
    experiment: Experiment, uninterrupted: Path, until: Until, shell: Any
) -> None:
    config = experiment("driver", training=STEPS)
    partials = config.run_folder / "checkpoints"
    dice = random.Random(1)

    def after_some_steps() -> None:
        first = step_of(config)
        until(lambda: step_of(config) > first + 30, 120, "steps")
        time.sleep(dice.random() * 2)

    def while_a_checkpoint_is_written() -> None:
        first = step_of(config)
        until(lambda: step_of(config) > first, 120, "steps")
        deadline = time.monotonic() + 30
        while not list(partials.glob("*.partial")):
            assert time.monotonic() < deadline, "no checkpoint is being written"

    def during_startup() -> None:
        time.sleep(4 + dice.random() * 4)

    for moment in (after_some_steps, while_a_checkpoint_is_written, during_startup):
        process = shell.spawn(*shell.job("pretrain.py", config))
        moment()
        kill_all([p for p in reversed(tree(process)) if "ray::" in " ".join(p.cmdline())])
        kill_all(tree(process))
        out, _ = process.communicate(timeout=30)
        assert process.returncode == -signal.SIGKILL, out
        print(f"killed {moment.__name__}: at step {step_of(config)}")
    finished(shell.spawn(*shell.job("pretrain.py", config)), 200)
    assert len(starts(config)) == 3, "two kills should hit training and one the startup"
    assert_close(uninterrupted, config.run_folder / LAST, 0, 0)
    assert not list(partials.glob("*.partial"))


def test_run_with_ten_killed_workers_matches_uninterrupted_run(
    head: Any, experiment: Experiment, uninterrupted: Path, until: Until
) -> None:
    config = experiment("worker", training=STEPS, cluster={"max_failures": -1})
    dice = random.Random(2)
    process = head.spawn(*head.job("pretrain.py", config), RAY_ADDRESS=head.address)
    killed: set[int] = set()
    moments = []
    for _ in range(KILLS):
        until(lambda: set(head.pids("RayTrainWorker")) - killed or process.poll(), 120, "a worker")
        assert process.poll() is None, process.communicate()[0]
        [pid] = set(head.pids("RayTrainWorker")) - killed
        appeared = time.monotonic()
        if dice.random() < 0.7:  # else kill it during startup
            before = step_of(config)
            until(lambda before=before: step_of(config) != before, 120, "steps")
        deadline, first = time.monotonic() + dice.random() * 1.5, step_of(config)
        while time.monotonic() < deadline and step_of(config) < first + 30:
            time.sleep(0.01)
        killed.add(pid)
        os.kill(pid, signal.SIGKILL)
        moments.append((step_of(config), round(time.monotonic() - appeared, 1)))
    print(f"killed at (step, seconds after its start): {moments}")
    finished(process, 300)
    print(f"started at steps {starts(config)}")
    assert_close(uninterrupted, config.run_folder / LAST, 0, 0)
    assert [m["step"] for m in metrics(config.run_folder)] == [
        m["step"] for m in metrics(uninterrupted.parents[1])
    ]


def test_sigterm_to_worker_or_driver_loses_no_step(
    head: Any, experiment: Experiment, uninterrupted: Path, until: Until
) -> None:
    config = experiment("sigterm", training={**STEPS, "save_every": 800})
    process = head.spawn(*head.job("pretrain.py", config), RAY_ADDRESS=head.address)
    until(lambda: step_of(config) > 50, 120, "steps")
    name = "arc_hybrid_{}{{sigterm}}".format
    until(lambda: name("loss") in head.gauges() or step_of(config) > 400, 60, "gauges")
    gauges = head.gauges()
    print(gauges)
    [pid] = head.pids("RayTrainWorker")
    os.kill(pid, signal.SIGTERM)
    signalled = time.monotonic()
    until(lambda: len(starts(config)) == 2, 120, "another worker")
    print(f"another worker trains after {time.monotonic() - signalled:.1f} s")
    first = newest(config.run_folder / "checkpoints")
    assert first is not None and first.state["step"] == starts(config)[1]
    until(lambda: step_of(config) > first.state["step"] + 20, 120, "steps")

    process.send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    out, _ = process.communicate(timeout=60)
    print(f"the driver ends after {time.monotonic() - signalled:.1f} s")
    assert process.returncode == 1, out
    second = newest(config.run_folder / "checkpoints")
    assert second is not None and second.state["step"] == step_of(config)
    assert f"stopped: at step {second.state['step']}" in out and "Traceback" not in out, out
    until(lambda: not head.pids("RayTrainWorker"), 30, "the end of the workers")

    finished(head.spawn(*head.job("pretrain.py", config), RAY_ADDRESS=head.address), 200)
    assert starts(config) == [0, first.state["step"], second.state["step"]]
    assert_close(uninterrupted, config.run_folder / LAST, 0, 0)
    for shown in ("loss", "samples_per_s", "exact_accuracy", "step"):
        assert name(shown) in gauges
    assert 0 < gauges[name("step")] < 800


def test_killed_driver_leaves_no_workers_on_the_cluster(
    head: Any, experiment: Experiment, uninterrupted: Path, until: Until
) -> None:
    config = experiment("orphans", training=STEPS)
    process = head.spawn(*head.job("pretrain.py", config), RAY_ADDRESS=head.address)
    until(lambda: step_of(config) > 50, 120, "steps")
    process.kill()
    process.communicate()
    killed = time.monotonic()
    rerun = head.spawn(*head.job("pretrain.py", config), RAY_ADDRESS=head.address)
    until(lambda: len(head.pids("RayTrainWorker")) == 0, 60, "the end of the worker")
    print(f"the worker of a killed driver is gone after {time.monotonic() - killed:.1f} s")
    finished(rerun, 200)
    assert_close(uninterrupted, config.run_folder / LAST, 0, 0)


def checkpoint_of(evaluation: Path) -> Path:
    return evaluation.parents[1] / "checkpoints/step_00000004"


def test_evaluation_with_ten_killed_actors_matches_uninterrupted_evaluation(
    head: Any, many_variants: Experiment, evaluated: Path, until: Until
) -> None:
    config = many_variants("kills", num_workers=2, max_failures=-1)
    dice = random.Random(3)
    process = head.spawn(
        *head.job("evaluate.py", config, f"evaluation.checkpoint={checkpoint_of(evaluated)}"),
        RAY_ADDRESS=head.address,
    )
    folders = config.run_folder / "evaluation"
    until(lambda: list(folders.glob("*/predictions/*.json")), 120, "a first prediction")
    gauges: dict[str, float] = {}
    killed = []
    while len(killed) < KILLS:
        until(lambda: head.pids("Evaluator") or process.poll() is not None, 60, "an actor")
        assert process.poll() is None, f"ended after {killed}: {process.communicate()[0]}"
        time.sleep(dice.random() * 4)
        pids = head.pids("Evaluator")
        if pids:
            os.kill(dice.choice(pids), signal.SIGKILL)
            killed.append(len(list(folders.glob("*/predictions/*.json"))))
            gauges |= head.gauges()
    print(f"predictions at each kill: {killed}; {gauges}")
    out = finished(process, 300)
    [folder] = folders.iterdir()
    assert predictions(folder) == predictions(evaluated)
    assert len(predictions(folder)) == 15
    printed = re.findall(r"^\d+/15 (\w+)", out, re.M)
    assert len(printed) == 15 == len(set(printed)), out
    results, expected = (json.loads((f / "results.json").read_text()) for f in (folder, evaluated))
    for name in ("scores", "protocol"):
        assert results[name] == expected[name], name
    submissions = [(f / "submission.json").read_bytes() for f in (folder, evaluated)]
    assert submissions[0] == submissions[1]
    assert gauges["arc_hybrid_tasks_total{kills}"] == 15
    assert 0 <= gauges["arc_hybrid_tasks_done{kills}"] < 15


def test_evaluation_ended_by_too_many_lost_actors_is_resumed_by_a_rerun(
    head: Any, many_variants: Experiment, evaluated: Path, until: Until
) -> None:
    config = many_variants("often", num_workers=1, max_failures=0)
    command = head.job("evaluate.py", config, f"evaluation.checkpoint={checkpoint_of(evaluated)}")
    process = head.spawn(*command, RAY_ADDRESS=head.address)
    folders = config.run_folder / "evaluation"
    until(lambda: len(list(folders.glob("*/predictions/*.json"))) > 1, 120, "predictions")
    os.kill(head.pids("Evaluator")[0], signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    print(out)
    assert process.returncode == 1
    predicted = len(list(folders.glob("*/predictions/*.json")))
    rerun = head.run(*command, RAY_ADDRESS=head.address)
    assert rerun.code == 0 and f"{predicted} already predicted" in rerun.out, rerun.out
