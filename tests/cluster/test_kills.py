"""Real kills at any moment: what comes out is what comes out undisturbed, bit for bit."""

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
def calm(alone: Any, experiment: Experiment) -> Path:
    """The last checkpoint of a run that nobody disturbs, without a cluster."""
    config = experiment("calm", training=STEPS)
    alone.here("pretrain.py", config)
    return config.run_folder / LAST


@pytest.fixture(scope="module")
def head(start_cluster: Callable[..., Any]) -> Any:
    return start_cluster(4)


def step_of(config: Config) -> int:
    """The last step in metrics.jsonl."""
    try:
        lines = metrics(config.run_folder)
    except (OSError, ValueError):
        return 0
    return max((line["step"] for line in lines), default=0)


def starts(config: Config) -> list[int]:
    """The steps at which workers of a run have begun."""
    lines = (config.run_folder / "train_0.log").read_text().splitlines()
    return [int(line.split(" step ")[1].split()[0]) for line in lines if " of 800, " in line]


def tree(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = psutil.Process(process.pid)
    return [found, *found.children(recursive=True)]


def kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def finished(process: subprocess.Popen[str], seconds: float) -> str:
    """What a background job has said; fails if its exit code is not 0."""
    out, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, out
    return out


def test_a_driver_killed_with_its_cluster_at_any_moment_is_resumed_bit_for_bit(
    experiment: Experiment, calm: Path, until: Until, alone: Any
) -> None:
    config = experiment("driver", training=STEPS)
    partials = config.run_folder / "checkpoints"
    dice = random.Random(1)

    def after_some_steps() -> None:
        begun = step_of(config)
        until(lambda: step_of(config) > begun + 30, 120, "steps")
        time.sleep(dice.random() * 2)

    def in_the_middle_of_a_checkpoint() -> None:
        begun = step_of(config)
        until(lambda: step_of(config) > begun, 120, "steps")
        end = time.monotonic() + 30
        while not list(partials.glob("*.partial")):
            assert time.monotonic() < end, "no checkpoint is being written"

    def while_it_starts() -> None:
        time.sleep(4 + dice.random() * 4)

    for moment in (after_some_steps, in_the_middle_of_a_checkpoint, while_it_starts):
        process = alone.spawn(*alone.job("pretrain.py", config))
        moment()
        kill_all([p for p in reversed(tree(process)) if "ray::" in " ".join(p.cmdline())])
        kill_all(tree(process))
        out, _ = process.communicate(timeout=30)
        assert process.returncode == -signal.SIGKILL, out
        print(f"killed {moment.__name__}: at step {step_of(config)}")
    finished(alone.spawn(*alone.job("pretrain.py", config)), 200)
    assert len(starts(config)) == 3, "two were killed while they trained, one before it did"
    assert_close(calm, config.run_folder / LAST, 0, 0)
    assert not list(partials.glob("*.partial"))


def test_a_training_worker_killed_ten_times_costs_nothing_but_time(
    head: Any, experiment: Experiment, calm: Path, until: Until
) -> None:
    config = experiment("worker", training=STEPS, cluster={"max_failures": -1})
    dice = random.Random(2)
    process = head.spawn(*head.job("pretrain.py", config), RAY_ADDRESS=head.address)
    seen: set[int] = set()
    moments = []
    for _ in range(KILLS):
        until(lambda: set(head.pids("RayTrainWorker")) - seen or process.poll(), 120, "a worker")
        assert process.poll() is None, process.communicate()[0]
        [pid] = set(head.pids("RayTrainWorker")) - seen
        came = time.monotonic()
        if dice.random() < 0.7:  # else while it starts
            before = step_of(config)
            until(lambda before=before: step_of(config) != before, 120, "steps")
        end, begun = time.monotonic() + dice.random() * 1.5, step_of(config)
        while time.monotonic() < end and step_of(config) < begun + 30:
            time.sleep(0.01)
        seen.add(pid)
        os.kill(pid, signal.SIGKILL)
        moments.append((step_of(config), round(time.monotonic() - came, 1)))
    print(f"killed at (step, s after it came): {moments}")
    finished(process, 300)
    print(f"started at steps {starts(config)}")
    assert_close(calm, config.run_folder / LAST, 0, 0)
    assert [m["step"] for m in metrics(config.run_folder)] == [
        m["step"] for m in metrics(calm.parents[1])
    ]


def test_sigterm_loses_no_step_of_a_worker_nor_of_its_driver(
    head: Any, experiment: Experiment, calm: Path, until: Until
) -> None:
    config = experiment("told", training={**STEPS, "save_every": 800})
    process = head.spawn(*head.job("pretrain.py", config), RAY_ADDRESS=head.address)
    until(lambda: step_of(config) > 50, 120, "steps")
    name = "arc_hybrid_{}{{told}}".format
    until(lambda: name("loss") in head.gauges() or step_of(config) > 400, 60, "gauges")
    gauges = head.gauges()
    print(gauges)
    [pid] = head.pids("RayTrainWorker")
    os.kill(pid, signal.SIGTERM)
    told = time.monotonic()
    until(lambda: len(starts(config)) == 2, 120, "another worker")
    print(f"another worker trains after {time.monotonic() - told:.1f} s")
    first = newest(config.run_folder / "checkpoints")
    assert first is not None and first.state["step"] == starts(config)[1]
    until(lambda: step_of(config) > first.state["step"] + 20, 120, "steps")

    process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    out, _ = process.communicate(timeout=60)
    print(f"the driver ends after {time.monotonic() - told:.1f} s")
    assert process.returncode == 1, out
    second = newest(config.run_folder / "checkpoints")
    assert second is not None and second.state["step"] == step_of(config)
    assert f"stopped: at step {second.state['step']}" in out and "Traceback" not in out, out
    until(lambda: not head.pids("RayTrainWorker"), 30, "the end of the workers")

    finished(head.spawn(*head.job("pretrain.py", config), RAY_ADDRESS=head.address), 200)
    assert starts(config) == [0, first.state["step"], second.state["step"]]
    assert_close(calm, config.run_folder / LAST, 0, 0)
    for shown in ("loss", "samples_per_s", "exact_accuracy", "step"):
        assert name(shown) in gauges
    assert 0 < gauges[name("step")] < 800


def test_a_killed_driver_leaves_no_worker_behind_on_a_cluster_that_lives_on(
    head: Any, experiment: Experiment, calm: Path, until: Until
) -> None:
    config = experiment("orphans", training=STEPS)
    process = head.spawn(*head.job("pretrain.py", config), RAY_ADDRESS=head.address)
    until(lambda: step_of(config) > 50, 120, "steps")
    process.kill()
    process.communicate()
    killed = time.monotonic()
    again = head.spawn(*head.job("pretrain.py", config), RAY_ADDRESS=head.address)
    until(lambda: len(head.pids("RayTrainWorker")) == 0, 60, "the end of the worker")
    print(f"the worker of a killed driver is gone after {time.monotonic() - killed:.1f} s")
    finished(again, 200)
    assert_close(calm, config.run_folder / LAST, 0, 0)


def checkpoint_of(evaluated: Path) -> Path:
    return evaluated.parents[1] / "checkpoints/step_00000004"


def test_evaluation_actors_killed_ten_times_change_no_score_and_no_answer(
    head: Any, many_views: Experiment, solved: Path, until: Until
) -> None:
    config = many_views("kills", num_workers=2, max_failures=-1)
    dice = random.Random(3)
    process = head.spawn(
        *head.job("evaluate.py", config, f"evaluation.checkpoint={checkpoint_of(solved)}"),
        RAY_ADDRESS=head.address,
    )
    found = config.run_folder / "evaluation"
    until(lambda: list(found.glob("*/predictions/*.json")), 120, "a first answer")
    gauges: dict[str, float] = {}
    killed = []
    while len(killed) < KILLS:
        until(lambda: head.pids("Evaluator") or process.poll() is not None, 60, "an actor")
        assert process.poll() is None, f"over after {killed}: {process.communicate()[0]}"
        time.sleep(dice.random() * 4)
        pids = head.pids("Evaluator")
        if pids:
            os.kill(dice.choice(pids), signal.SIGKILL)
            killed.append(len(list(found.glob("*/predictions/*.json"))))
            gauges |= head.gauges()
    print(f"killed when so many were answered: {killed}; {gauges}")
    out = finished(process, 300)
    [folder] = found.iterdir()
    assert predictions(folder) == predictions(solved)
    assert len(predictions(folder)) == 15
    answered = re.findall(r"^\d+/15 (\w+)", out, re.M)
    assert len(answered) == 15 == len(set(answered)), out
    results, wanted = (json.loads((f / "results.json").read_text()) for f in (folder, solved))
    for name in ("scores", "protocol"):
        assert results[name] == wanted[name], name
    submissions = [(f / "submission.json").read_bytes() for f in (folder, solved)]
    assert submissions[0] == submissions[1]
    assert gauges["arc_hybrid_tasks_total{kills}"] == 15
    assert 0 <= gauges["arc_hybrid_tasks_done{kills}"] < 15


def test_actors_that_die_too_often_end_an_evaluation_that_a_rerun_resumes(
    head: Any, many_views: Experiment, solved: Path, until: Until
) -> None:
    config = many_views("often", num_workers=1, max_failures=0)
    command = head.job("evaluate.py", config, f"evaluation.checkpoint={checkpoint_of(solved)}")
    process = head.spawn(*command, RAY_ADDRESS=head.address)
    found = config.run_folder / "evaluation"
    until(lambda: len(list(found.glob("*/predictions/*.json"))) > 1, 120, "answers")
    os.kill(head.pids("Evaluator")[0], signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    print(out)
    assert process.returncode == 1
    answered = len(list(found.glob("*/predictions/*.json")))
    again = head.run(*command, RAY_ADDRESS=head.address)
    assert again.code == 0 and f"{answered} already answered" in again.out, again.out
