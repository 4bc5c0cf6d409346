"""Stopping a run by a signal or a stop file saves a checkpoint and loses no step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import EVALUATED, TRAINED, assert_close, config_of, hybrid_of, metrics, write_tasks

from hybrid.arc import Task
from hybrid.checkpoint import newest, read
from hybrid.config import Config, dump
from hybrid.dataset import prepare

JOBS = Path(__file__).parents[2] / "jobs"
STEPS = 400
"""Steps take a few milliseconds: the run is long enough to be stopped."""
Popen = subprocess.Popen[str]
Job = Callable[..., Popen]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, arc1: dict[str, Task]) -> Path:
    root = tmp_path_factory.mktemp("stopped")
    write_tasks(root / "training", [arc1[task] for task in TRAINED])
    write_tasks(root / "evaluation", [arc1[task] for task in EVALUATED])
    config = experiment(root, "unused")
    prepare(config.data, config.data_folder, say=lambda line: None)
    return root


def experiment(
    root: Path, run: str, make: Callable[..., Config] = config_of, **training: Any
) -> Config:
    training = {"steps": STEPS, "save_every": 150, "train_accuracy_pairs": 0} | training
    config = make(root, training=training, cluster={"num_workers": 0}, logging={"run": run})
    (root / f"{run}.yaml").write_text(dump(config))
    return config


def as_from_a_terminal() -> None:
    """Pin the job to one core, where its threads do not compete, and enable Ctrl-C."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent may ignore it


@pytest.fixture
def job() -> Iterator[Job]:
    """job(name, config, *overrides): start the job as a process."""
    started: list[Popen] = []

    def start(name: str, config: Config, *overrides: str) -> Popen:
        path = Path(config.paths.root) / f"{config.logging.run}.yaml"
        command = [sys.executable, str(JOBS / f"{name}.py"), "--config", str(path), *overrides]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, stdout=pipe, stderr=pipe, text=True, preexec_fn=as_from_a_terminal
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> Path:
    """Last checkpoint of an uninterrupted run."""
    config = experiment(root, "undisturbed")
    command = [sys.executable, str(JOBS / "pretrain.py"), "--config"]
    path = str(root / "undisturbed.yaml")
    subprocess.run([*command, path], check=True, timeout=120, preexec_fn=as_from_a_terminal)
    return config.run_folder / "checkpoints" / f"step_{STEPS:08d}"


def wait_for(process: Popen, config: Config, step: int) -> None:
    """Wait until metrics.jsonl has the step."""
    path = config.run_folder / "metrics.jsonl"
    for _ in range(3000):
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    pytest.fail(f"step {step} was not taken")


def ended(process: Popen) -> tuple[int, list[str]]:
    """Return exit code and stderr lines without progress."""
    lines = process.communicate(timeout=60)[1].splitlines()
    return process.returncode, [line for line in lines if " samples/s " not in line]


def stopped_at(config: Config) -> int:
    found = newest(config.run_folder / "checkpoints")
    assert found is not None
    return int(found.state["step"])


REQUESTS: list[Any] = [
    pytest.param(signal.SIGTERM, id="SIGTERM"),
    pytest.param(signal.SIGINT, id="Ctrl-C", marks=pytest.mark.slow),
    pytest.param("stop", id="stop file", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("request_by", REQUESTS)
def test_stopped_and_resumed_run_matches_uninterrupted_run(
    root: Path, undisturbed: Path, job: Job, request_by: Any
) -> None:
    config = experiment(root, f"stopped-{request_by if request_by == 'stop' else request_by.name}")
    process = job("pretrain", config)
    wait_for(process, config, 20)
    if request_by == "stop":
        (config.run_folder / "stop").touch()
    else:
        process.send_signal(request_by)
    code, lines = ended(process)
    step = stopped_at(config)
    folder = config.run_folder / "checkpoints" / f"step_{step:08d}"
    last = f"stopped: at step {step}: {folder}; run the same command to resume"
    if request_by != "stop":
        assert lines.pop(0) == f"{request_by.name}: saving a checkpoint, then stopping"
    assert (code, lines) == (1, [last])
    assert 20 <= step < STEPS and step % 150, "the step of a regular checkpoint"
    assert not (config.run_folder / "stop").exists()

    assert ended(job("pretrain", config)) == (0, [])
    assert_close(undisturbed, config.run_folder / "checkpoints" / undisturbed.name, 0, 0)
    steps = [line["step"] for line in metrics(config.run_folder)]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_second_signal_ends_the_process_at_once(
    root: Path, job: Job, number: signal.Signals
) -> None:
    """A step takes minutes; the first signal takes effect only at its end."""
    config = config_of(
        root,
        trm={"H_cycles": 3000, "L_cycles": 50},
        training={"train_accuracy_pairs": 0},
        cluster={"num_workers": 0},
        logging={"run": f"twice-{number.name}"},
    )
    (root / f"{config.logging.run}.yaml").write_text(dump(config))
    process = job("pretrain", config)
    log = config.run_folder / "train_0.log"
    while not (log.exists() and "new run" in log.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    assert process.stderr is not None
    assert process.stderr.readline() == f"{number.name}: saving a checkpoint, then stopping\n"
    time.sleep(1)
    assert process.poll() is None, "the first signal ended the process"
    started = time.monotonic()
    process.send_signal(number)
    code, lines = ended(process)
    assert time.monotonic() - started < 10
    assert (code, lines[-1]) == (1, "stopped: run the same command to resume")
    assert not any("Traceback" in line for line in lines)
    assert newest(config.run_folder / "checkpoints") is None
    assert not (config.run_folder / "stop").exists()


def test_stop_file_of_an_earlier_run_is_ignored(root: Path, undisturbed: Path, job: Job) -> None:
    config = experiment(root, "stale")
    config.run_folder.mkdir(parents=True)
    (config.run_folder / "stop").touch()
    assert ended(job("pretrain", config)) == (0, [])
    assert_close(undisturbed, config.run_folder / "checkpoints" / undisturbed.name, 0, 0)


def test_folder_named_stop_of_an_earlier_run_is_ignored(root: Path, job: Job) -> None:
    """A rerun removes anything named `stop`, even a folder."""
    config = experiment(root, "folder", steps=60, save_every=60)
    (config.run_folder / "stop" / "inside").mkdir(parents=True)
    assert ended(job("pretrain", config)) == (0, [])
    assert stopped_at(config) == 60 and not (config.run_folder / "stop").exists()


@pytest.mark.slow
def test_stopped_and_resumed_joint_run_matches_uninterrupted_run(root: Path, job: Job) -> None:
    alone = experiment(root, "joint-alone", hybrid_of, steps=40, save_every=40)
    assert ended(job("joint", alone)) == (0, [])
    config = experiment(root, "joint-stopped", hybrid_of, steps=40, save_every=40)
    process = job("joint", config)
    wait_for(process, config, 5)
    process.send_signal(signal.SIGTERM)
    code, lines = ended(process)
    assert code == 1 and lines[-1].startswith("stopped: at step ")
    assert 5 <= stopped_at(config) < 40
    assert ended(job("joint", config)) == (0, [])
    name = Path("checkpoints") / "step_00000040"
    assert_close(alone.run_folder / name, config.run_folder / name, 0, 0)
    assert read(config.run_folder / name).state["kind"] == "hybrid"
