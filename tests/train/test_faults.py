"""Faults around a run: a full disk, W&B outages, a damaged checkpoint."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from helpers import EVALUATED, TRAINED, assert_close, config_of, train_as_rank, write_tasks

from hybrid.arc import Task
from hybrid.checkpoint import newest, read
from hybrid.config import Config, dump
from hybrid.dataset import prepare
from hybrid.errors import UserError
from hybrid.train import pretrain

PRETRAIN = Path(__file__).parents[2] / "jobs" / "pretrain.py"
STEPS, SAVE_EVERY = 6, 2
LAST = f"step_{STEPS:08d}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, arc1: dict[str, Task]) -> Path:
    root = tmp_path_factory.mktemp("faults")
    write_tasks(root / "training", [arc1[task] for task in TRAINED])
    write_tasks(root / "evaluation", [arc1[task] for task in EVALUATED])
    config = experiment(root, "unused")
    prepare(config.data, config.data_folder, say=lambda line: None)
    return root


def experiment(root: Path, run: str, **sections: Any) -> Config:
    training = {"steps": STEPS, "save_every": SAVE_EVERY} | sections.pop("training", {})
    logging = {"run": run} | sections.pop("logging", {})
    cluster = {"num_workers": 0}
    config = config_of(root, training=training, cluster=cluster, logging=logging, **sections)
    (root / f"{run}.yaml").write_text(dump(config))
    return config


def command(config: Config) -> list[str]:
    path = Path(config.paths.root) / f"{config.logging.run}.yaml"
    return [sys.executable, str(PRETRAIN), "--config", str(path)]


def on_one_core() -> None:
    """Pin the job to one core: it starts one thread per core, and they would compete."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})


def run(words: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
    settings = {"capture_output": True, "text": True, "timeout": 280} | more
    return subprocess.run(words, preexec_fn=on_one_core, **settings)


def checkpoints(config: Config) -> Path:
    return config.run_folder / "checkpoints"


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> Path:
    config = experiment(root, "undisturbed")
    run(command(config), check=True)
    return checkpoints(config)


@pytest.fixture(scope="module")
def apart() -> list[str]:
    """Command prefix that allows a command to mount a private file system."""
    for words in (["unshare", "-m"], ["unshare", "-Urm"]):
        trial = [*words, "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"]
        if shutil.which(words[0]) and run(trial).returncode == 0:
            return words
    pytest.skip("no small disk can be mounted here: unshare -m and unshare -Urm both fail")


SCRIPT = """
mkdir -p "$RUNS" && mount -t tmpfs -o size="$SIZE" none "$RUNS" || exit 9
"$@" >"$OUT/first.out" 2>"$OUT/first.err"; echo $? >"$OUT/first.code"
cp -a "$RUNS/." "$OUT/full"
{then}
mount -o remount,size=64m "$RUNS" && rm -f "$RUNS/filler"
"$@" >"$OUT/second.out" 2>"$OUT/second.err"; echo $? >"$OUT/second.code"
cp -a "$RUNS/." "$OUT/end"
"""


def on_a_small_disk(
    apart: list[str], config: Config, out: Path, size: str, then: str = ""
) -> tuple[tuple[int, list[str]], tuple[int, list[str]]]:
    """Run the job on a disk of `size`, then again with free space; return exit codes and stderr.

    out/full and out/end are copies of the runs folder after each.
    """
    (out / "full").mkdir(parents=True)
    (out / "end").mkdir()
    env = os.environ | {"RUNS": str(config.runs_folder), "SIZE": size, "OUT": str(out)}
    script = SCRIPT.format(then=then)
    done = run([*apart, "sh", "-c", script, "sh", *command(config)], env=env)
    assert done.returncode == 0, done.stderr
    first, second = (
        (int((out / f"{n}.code").read_text()), (out / f"{n}.err").read_text().splitlines())
        for n in ("first", "second")
    )
    return first, second


def test_run_on_a_full_disk_fails_and_resumes_when_there_is_space(
    apart: list[str], root: Path, undisturbed: Path, tmp_path: Path
) -> None:
    whole = sum(file.stat().st_size for file in (undisturbed / LAST).iterdir())
    config = experiment(root, "full", paths={"runs": str(root / "small")})
    size = f"{int(1.7 * whole) // 1024}k"  # for the first checkpoint and a part of the second
    (code, lines), (second_code, second_lines) = on_a_small_disk(apart, config, tmp_path, size)

    folder = checkpoints(config) / "step_00000004"
    assert code == 2, lines
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0]
    assert errors[0].startswith(f"error: {folder}: the checkpoint cannot be written (")
    assert "No space left" in errors[0]
    assert "the newest complete one is step_00000002; run the same command again" in errors[0]
    assert not any("Traceback" in line for line in lines)

    left = tmp_path / "full" / "full" / "checkpoints"
    assert [path.name for path in left.iterdir()] == ["step_00000002"]
    assert_close(left / "step_00000002", undisturbed / "step_00000002", 0, 0)

    assert (second_code, second_lines) == (0, [])
    end = tmp_path / "end" / "full" / "checkpoints"
    assert read(end / LAST).state["step"] == STEPS
    assert_close(end / LAST, undisturbed / LAST, 0, 0)


def test_resumed_run_without_any_disk_space_fails_without_traceback(
    apart: list[str], root: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Even the log and metrics.jsonl cannot be written."""
    config = experiment(root, "brim", paths={"runs": str(root / "brim")})
    then = """
mount -o remount,size=8m "$RUNS"
sed -i 's/^  steps: .*/  steps: 4/' "$YAML"; "$@" >"$OUT/half.out" 2>"$OUT/half.err"
sed -i 's/^  steps: 4/  steps: 6/' "$YAML"
dd if=/dev/zero of="$RUNS/filler" bs=64k 2>/dev/null; dd if=/dev/zero bs=1 count=5000 2>/dev/null \
>>"$RUNS/filler"
"$@" >"$OUT/brim.out" 2>"$OUT/brim.err"; echo $? >"$OUT/brim.code"
"""
    os.environ["YAML"] = str(root / "brim.yaml")
    _, (second_code, _) = on_a_small_disk(apart, config, tmp_path, "64k", then)
    lines = (tmp_path / "brim.err").read_text().splitlines()
    assert int((tmp_path / "brim.code").read_text()) == 2, lines[-3:]
    assert not any("Traceback" in line for line in lines)
    assert second_code == 0
    assert_close(tmp_path / "end" / "brim" / "checkpoints" / LAST, undisturbed / LAST, 0, 0)


LIMIT = 6000
"""File size limit of the second worker, bytes: enough for its log, not for its slots."""


def train_with_a_limit(rank: int, store: Path, config: Config) -> None:
    if rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    try:
        train_as_rank(pretrain, rank, 2, store, config)
    except UserError as error:
        (store.parent / f"rank{rank}").write_text(str(error))
        sys.exit(2)


def test_write_failure_of_one_worker_raises_on_both(
    root: Path, tmp_path: Path, start: Callable[..., BaseProcess]
) -> None:
    wide = {"training": {"batch_size": 12, "train_accuracy_pairs": 0}}
    alone = experiment(root, "two-undisturbed", **wide)
    config = experiment(root, "two", **wide)
    both = [start(train_as_rank, pretrain, r, 2, tmp_path / "a", alone) for r in range(2)]
    for process in both:
        process.join(120)
    slots = checkpoints(alone) / LAST / "slots_000006_000012.safetensors"
    assert slots.stat().st_size > LIMIT

    shutil.copytree(alone.run_folder, config.run_folder)
    for name in ("step_00000004", LAST):
        shutil.rmtree(checkpoints(config) / name)
    began = time.monotonic()
    both = [start(train_with_a_limit, r, tmp_path / "b", config) for r in range(2)]
    for process in both:
        process.join(100)
    assert [process.exitcode for process in both] == [2, 2]
    assert time.monotonic() - began < 90
    for rank in range(2):
        message = (tmp_path / f"rank{rank}").read_text()
        assert message.startswith(f"{checkpoints(config) / 'step_00000004'}: the checkpoint cannot")
        assert "the newest complete one is step_00000002" in message
    assert [path.name for path in checkpoints(config).iterdir()] == ["step_00000002"]

    both = [start(train_as_rank, pretrain, r, 2, tmp_path / "c", config) for r in range(2)]
    for process in both:
        process.join(120)
    assert_close(checkpoints(config) / LAST, checkpoints(alone) / LAST, 0, 0)


def test_job_skips_a_damaged_newest_checkpoint(root: Path, undisturbed: Path) -> None:
    config = experiment(root, "rotten")
    shutil.copytree(undisturbed.parent, config.run_folder)
    shutil.rmtree(checkpoints(config) / LAST)
    path = checkpoints(config) / "step_00000004" / "optimizer.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
    done = run(command(config))
    assert done.returncode == 0
    assert f"checkpoint skipped: {path}: damaged" in done.stderr
    assert "step 2 of 6" in (config.run_folder / "train_0.log").read_text()
    for step in (4, 6):
        name = f"step_{step:08d}"
        assert_close(checkpoints(config) / name, undisturbed / name, 0, 0)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A port that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield server


def with_wandb(url: str) -> dict[str, str]:
    return os.environ | {"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online", "WANDB_BASE_URL": url}


@pytest.mark.slow
@pytest.mark.parametrize("answers", ["refuses", "never answers"])
def test_training_is_unaffected_by_a_wandb_outage(
    root: Path, undisturbed: Path, listener: socket.socket, answers: str
) -> None:
    port = 9 if answers == "refuses" else listener.getsockname()[1]
    config = experiment(root, answers.replace(" ", "-"), logging={"wandb": True})
    began = time.monotonic()
    done = run(command(config), env=with_wandb(f"http://127.0.0.1:{port}"))
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 180
    assert "W&B could not start, training continues" in done.stderr
    assert_close(checkpoints(config) / LAST, undisturbed / LAST, 0, 0)


def test_offline_wandb_writes_its_record_and_does_not_affect_training(
    root: Path, undisturbed: Path
) -> None:
    config = experiment(root, "offline", logging={"wandb": True})
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    env |= {"HOME": str(root), "WANDB_MODE": "offline"}
    done = run(command(config), env=env)
    assert done.returncode == 0, done.stderr
    [record] = (config.run_folder / "wandb").glob("offline-run-*/*.wandb")
    assert record.stat().st_size > 0
    assert_close(checkpoints(config) / LAST, undisturbed / LAST, 0, 0)
    found = newest(checkpoints(config))
    assert found is not None and found.state["step"] == STEPS
