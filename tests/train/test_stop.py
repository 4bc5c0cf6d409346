"""A run that is asked to stop, by a signal or a file, ends with a checkpoint and loses nothing."""

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
"""A few milliseconds each: long enough to be stopped in."""
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
    """A job computes with as many threads as it has cores, and threads wait for each other."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever runs the tests may ignore it


@pytest.fixture
def job() -> Iterator[Job]:
    """job(name, config, *overrides): the job as a process."""
    started: list[Popen] = []

    def begin(name: str, config: Config, *overrides: str) -> Popen:
        path = Path(config.paths.root) / f"{config.logging.run}.yaml"
        command = [sys.executable, str(JOBS / f"{name}.py"), "--config", str(path), *overrides]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, stdout=pipe, stderr=pipe, text=True, preexec_fn=as_from_a_terminal
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> Path:
    """The last checkpoint of a run that nobody stops."""
    config = experiment(root, "undisturbed")
    command = [sys.executable, str(JOBS / "pretrain.py"), "--config"]
    path = str(root / "undisturbed.yaml")
    subprocess.run([*command, path], check=True, timeout=120, preexec_fn=as_from_a_terminal)
    return config.run_folder / "checkpoints" / f"step_{STEPS:08d}"


def wait_for(process: Popen, config: Config, step: int) -> None:
    """Until the run says it has taken a step."""
    path = config.run_folder / "metrics.jsonl"
    for _ in range(3000):
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    pytest.fail(f"step {step} was not taken")


def ended(process: Popen) -> tuple[int, list[str]]:
    """Exit code, and what it said but for its progress."""
    said = process.communicate(timeout=60)[1].splitlines()
    return process.returncode, [line for line in said if " samples/s " not in line]


def stopped_at(config: Config) -> int:
    found = newest(config.run_folder / "checkpoints")
    assert found is not None
    return int(found.state["step"])


ASKS: list[Any] = [
    pytest.param(signal.SIGTERM, id="SIGTERM"),
    pytest.param(signal.SIGINT, id="Ctrl-C", marks=pytest.mark.slow),
    pytest.param("stop", id="a file put by hand", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("ask", ASKS)
def test_a_stopped_run_goes_on_to_the_weights_of_one_that_was_not(
    root: Path, undisturbed: Path, job: Job, ask: Any, request: pytest.FixtureRequest
) -> None:
    config = experiment(root, f"asked-{ask if ask == 'stop' else ask.name}")
    process = job("pretrain", config)
    wait_for(process, config, 20)
    if ask == "stop":
        (config.run_folder / "stop").touch()
    else:
        process.send_signal(ask)
    code, said = ended(process)
    step = stopped_at(config)
    folder = config.run_folder / "checkpoints" / f"step_{step:08d}"
    last = f"stopped: at step {step}: {folder}; run the same command to resume"
    before = [] if ask == "stop" else [f"{ask.name}: saving a checkpoint, then stopping"]
    assert (code, said) == (1, [*before, last])
    assert 20 <= step < STEPS and step % 150, "in the middle, not where one was due anyway"
    assert not (config.run_folder / "stop").exists()

    code, said = ended(job("pretrain", config))
    assert (code, said) == (0, [])
    assert_close(undisturbed, config.run_folder / "checkpoints" / undisturbed.name, 0, 0)
    steps = [line["step"] for line in metrics(config.run_folder)]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_the_second_signal_ends_a_run_at_once(root: Path, job: Job, number: signal.Signals) -> None:
    """In a step that would take minutes: the first one is not obeyed before its end."""
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
    assert process.poll() is None, "the first one waits for the step"
    started = time.monotonic()
    process.send_signal(number)
    code, said = ended(process)
    assert time.monotonic() - started < 10
    assert (code, said[-1]) == (1, "stopped: run the same command to resume")
    assert not any("Traceback" in line for line in said)
    assert newest(config.run_folder / "checkpoints") is None
    assert not (config.run_folder / "stop").exists()


def test_a_stop_that_was_meant_for_an_earlier_run_does_not_stop_this_one(
    root: Path, undisturbed: Path, job: Job
) -> None:
    config = experiment(root, "stale")
    config.run_folder.mkdir(parents=True)
    (config.run_folder / "stop").touch()
    assert ended(job("pretrain", config)) == (0, [])
    assert_close(undisturbed, config.run_folder / "checkpoints" / undisturbed.name, 0, 0)


def test_a_folder_named_stop_does_not_stop_the_next_run_either(root: Path, job: Job) -> None:
    """Whatever is named `stop` asks; the rerun takes it away, a folder as well."""
    config = experiment(root, "folder", steps=60, save_every=60)
    (config.run_folder / "stop" / "inside").mkdir(parents=True)
    assert ended(job("pretrain", config)) == (0, [])
    assert stopped_at(config) == 60 and not (config.run_folder / "stop").exists()


@pytest.mark.slow
def test_joint_training_is_stopped_and_goes_on_in_the_same_way(root: Path, job: Job) -> None:
    alone = experiment(root, "joint-alone", hybrid_of, steps=40, save_every=40)
    assert ended(job("joint", alone)) == (0, [])
    config = experiment(root, "joint-asked", hybrid_of, steps=40, save_every=40)
    process = job("joint", config)
    wait_for(process, config, 5)
    process.send_signal(signal.SIGTERM)
    code, said = ended(process)
    assert code == 1 and said[-1].startswith("stopped: at step ")
    assert 5 <= stopped_at(config) < 40
    assert ended(job("joint", config)) == (0, [])
    name = Path("checkpoints") / "step_00000040"
    assert_close(alone.run_folder / name, config.run_folder / name, 0, 0)
    assert read(config.run_folder / name).state["kind"] == "hybrid"
