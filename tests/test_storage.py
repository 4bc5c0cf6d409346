"""Object-store tests against a local S3 server: URIs, cached copies, and whole runs in a store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    EVALUATED,
    STORE_KEYS,
    TRAINED,
    assert_close,
    config_of,
    hybrid_of,
    metrics,
    predictions,
    tensors,
    train_as_rank,
    write_tasks,
)
from pyarrow import fs

from hybrid import storage
from hybrid.arc import Task
from hybrid.checkpoint import newest, read
from hybrid.config import Config, dump, load
from hybrid.context import LocalContext
from hybrid.dataset import Dataset, prepare
from hybrid.errors import UserError
from hybrid.evaluate.run import _compare_to
from hybrid.launch import pretrain as pretrain_with_progress
from hybrid.prompt_cache import PromptCacher, plan
from hybrid.train import initial_checkpoint, joint, pretrain, progress
from hybrid.train.state import create_state

JOBS = Path(__file__).parents[1] / "jobs"
CPU = LocalContext(torch.device("cpu"))
STEP = "runs/run/checkpoints/step_{:08d}"


@pytest.fixture
def root(bucket: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of an empty folder in the store; its cached copies are in tmp_path/cache."""
    for name, value in STORE_KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ARC_HYBRID_CACHE", str(tmp_path / "cache"))
    return bucket()


@pytest.fixture
def new_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """new_machine(): switch to an empty cache, as on another machine."""
    numbers = count()

    def switch() -> None:
        monkeypatch.setenv("ARC_HYBRID_CACHE", str(tmp_path / f"cache{next(numbers)}"))

    return switch


def config_in(root: str, tasks: Path, make: Callable[..., Config], **sections: Any) -> Config:
    """Return `make(tasks, ...)` with everything but the tasks under `root`."""
    sections["paths"] = {"root": root} | sections.get("paths", {})
    sections["cluster"] = {"num_workers": 0}
    return make(tasks, **sections)


@pytest.fixture
def tasks(tmp_path: Path, arc1: dict[str, Task]) -> Path:
    write_tasks(tmp_path / "training", [arc1[task] for task in TRAINED])
    write_tasks(tmp_path / "evaluation", [arc1[task] for task in EVALUATED])
    return tmp_path


def run(name: str, config: Path, cache: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(JOBS / f"{name}.py"), "--config", str(config), *overrides]
    env = os.environ | {"ARC_HYBRID_CACHE": str(cache)}
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=120, preexec_fn=on_one_core
    )


def on_one_core() -> None:
    """Pin the job to one core, because it starts one compute thread per core."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})


def stdout_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "location",
    ["s3://b/arc?region=eu-west-1&scheme=http", "gs://b", "s3://b/a%20b/c d?x=1", "/data/arc"],
)
def test_uri_is_the_inverse_of_folder(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARC_HYBRID_CACHE", str(tmp_path))
    assert storage.uri(storage.folder(location)) == location
    inside = storage.folder(location) / "runs" / "a b" / "x.json"
    assert storage.uri(inside) == storage.join(location, "runs", "a b", "x.json")
    assert storage.folder(storage.uri(inside)) != tmp_path
    assert storage.is_cached(inside) == storage.is_uri(location)
    # A location inside another has its own copy in the same cache.
    assert storage.uri(storage.folder(storage.uri(inside))) == storage.uri(inside)


def test_uploaded_files_can_be_downloaded_on_another_machine(
    root: str, new_machine: Callable[[], None]
) -> None:
    sent = storage.folder(root) / "a" / "b.bin"
    sent.parent.mkdir(parents=True)
    sent.write_bytes(bytes(range(256)) * 1000)
    storage.upload(sent)
    other = storage.folder(root) / "a" / "renamed.bin"
    storage.upload(other, sent)
    new_machine()
    for name in ("b.bin", "renamed.bin"):
        received = storage.folder(root) / "a" / name
        assert not received.exists()
        storage.download(received)
        assert received.read_bytes() == bytes(range(256)) * 1000
    assert sorted(os.listdir(received.parent)) == ["b.bin", "renamed.bin"]
    assert storage.names(storage.folder(root) / "a") == ["b.bin", "renamed.bin"]
    assert storage.exists(storage.folder(root) / "a")
    assert not storage.exists(storage.folder(root) / "nothing")
    assert storage.names(storage.folder(root) / "nothing") == []


def test_special_characters_in_names_are_quoted_in_the_uri(
    root: str, new_machine: Callable[[], None]
) -> None:
    """The path of a run named `my run?` is passed to other nodes as a URI."""
    sent = storage.folder(root) / "my run? #1" / "50%41 é.yaml"
    sent.parent.mkdir(parents=True)
    sent.write_text("logging: {run: x}")
    storage.upload(sent)
    uri, parent = storage.uri(sent), storage.uri(sent.parent)
    new_machine()
    assert uri.startswith("s3://")
    assert storage.read(storage.folder(uri)) == b"logging: {run: x}"
    assert storage.names(storage.folder(parent)) == ["50%41 é.yaml"]
    assert load(uri).logging.run == "x"


def test_the_newest_evaluation_is_by_time_of_upload_not_of_download(
    root: str, tasks: Path, new_machine: Callable[[], None]
) -> None:
    config = config_in(root, tasks, config_of)
    for name in ("b", "a", "c"):
        path = config.runs_folder / "other" / "evaluation" / name / "results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"title": name, "protocol": {"evaluated": 3 - (name == "c")}}))
        storage.upload(path)
        time.sleep(1.1)  # the store's times have a resolution of one second
    new_machine()
    assert _compare_to(config, "other", {"evaluated": 3})["title"] == "a"


def test_a_config_missing_from_the_store_is_reported_by_uri(root: str) -> None:
    with pytest.raises(UserError, match=r"^s3://.*/none\.yaml\?.*: no such config file$"):
        load(storage.join(root, "none.yaml"))


def test_download_replaces_or_deletes_a_stale_copy(root: str) -> None:
    """Without the deletion, a stale copy would be mistaken for a file in the store."""
    path = storage.folder(root) / "x"
    path.parent.mkdir(parents=True)
    path.write_text("one")
    storage.upload(path)
    path.write_text("two")
    storage.download(path)
    assert path.read_text() == "one"
    stale = path.with_name("stale")
    stale.write_text("only here")
    storage.download(stale)
    assert not stale.exists()


def test_remove_deletes_the_copy_and_the_original(root: str) -> None:
    folder = storage.folder(root) / "runs"
    for name in ("a/x", "a/b/y", "c"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
        storage.upload(folder / name)
    storage.remove(folder / "a")
    assert storage.names(folder) == ["c"] and not (folder / "a").exists()
    storage.remove(folder / "c")
    storage.remove(folder / "never there")
    assert not storage.exists(folder / "c") and not (folder / "c").exists()


def test_local_paths_are_neither_downloaded_nor_uploaded(tmp_path: Path) -> None:
    path = tmp_path / "x"
    storage.download(path)
    assert not path.exists()
    path.write_text("x")
    storage.upload(path)
    storage.download(path)
    assert path.read_text() == "x" and storage.names(tmp_path) == ["x"]
    assert storage.filesystem(path) == (None, str(path))


@pytest.mark.parametrize("uri", ["nosuch://b/arc", "://x", "s3a:/b://x"])
def test_an_unsupported_uri_is_reported(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        storage.names(storage.folder(uri))
    assert uri in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_an_unreachable_store_is_reported_in_one_line(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in STORE_KEYS.items():
        monkeypatch.setenv(name, value)
    root = "s3://b/arc?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    (tmp_path / "c.yaml").write_text(dump(config_in(root, tasks, config_of)))
    started = time.monotonic()
    for name in ("prepare", "pretrain"):
        done = run(name, tmp_path / "c.yaml", tmp_path / "cache")
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: s3://b/arc")
    assert time.monotonic() - started < 60


def test_a_run_moved_between_machines_matches_a_local_run(
    root: str, tasks: Path, tmp_path: Path
) -> None:
    """Each job is a process with its own cache, so jobs share only the store."""
    local_config = config_of(tasks, cluster={"num_workers": 0})
    local, remote = tmp_path / "local.yaml", tmp_path / "remote.yaml"
    local.write_text(dump(local_config))
    remote.write_text(dump(config_in(root, tasks, config_of)))
    for name in ("prepare", "pretrain", "evaluate"):
        stdout_of(run(name, local, tmp_path / "none"))
    stdout_of(run("prepare", remote, tmp_path / "one"))
    stdout_of(run("pretrain", remote, tmp_path / "two", "training.steps=2"))
    output = stdout_of(run("pretrain", remote, tmp_path / "three"))
    assert "runs/run/checkpoints/step_00000004?" in output and root.partition("?")[2] in output
    stdout_of(run("evaluate", remote, tmp_path / "four"))

    os.environ["ARC_HYBRID_CACHE"] = str(tmp_path / "five")
    # storage.join keeps the options after the path, so paths.runs is cached separately.
    runs = storage.folder(storage.join(root, "runs"))
    checkpoint = newest(runs / "run" / "checkpoints")
    assert checkpoint is not None and checkpoint.state["step"] == 4
    local_checkpoint = local_config.run_folder / "checkpoints" / "step_00000004"
    assert_close(local_checkpoint, checkpoint.folder, 0, 0)
    storage.download(runs / "run" / "metrics.jsonl")
    # Compare losses only: the run that ended at step 2 also logged train accuracy there.
    losses = [
        [line for line in metrics(folder) if "loss" in line]
        for folder in (runs / "run", local_config.run_folder)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert storage.folder(root) != runs

    local_results = json.loads(
        next(local_config.run_folder.glob("evaluation/*/results.json")).read_text()
    )
    [name] = storage.names(runs / "run" / "evaluation")
    stored = runs / "run" / "evaluation" / name
    for path in ("results.json", "report.html", "submission.json"):
        storage.download(stored / path)
    for task in EVALUATED:
        storage.download(stored / "predictions" / f"{task}.json")
    [local_folder] = local_config.run_folder.glob("evaluation/*")
    assert predictions(stored) == predictions(local_folder)
    assert len(predictions(stored)) == len(EVALUATED)
    assert json.loads((stored / "results.json").read_text())["scores"] == local_results["scores"]
    for_kaggle = [folder / "submission.json" for folder in (stored, local_folder)]
    assert for_kaggle[0].read_text() == for_kaggle[1].read_text()

    first = stored / "predictions" / f"{EVALUATED[0]}.json"
    storage.remove(first)
    assert "3 tasks, 2 already predicted" in stdout_of(run("evaluate", remote, tmp_path / "six"))
    # As if the process was killed before the upload: the task is evaluated and uploaded again.
    store, name = storage.filesystem(first)
    assert store is not None
    store.delete_file(name)
    assert "3 tasks, 2 already predicted" in stdout_of(run("evaluate", remote, tmp_path / "six"))
    assert storage.exists(first)


@pytest.fixture
def trained(root: str, tasks: Path) -> Config:
    """Config of a run in the store with checkpoints at steps 2 and 4."""
    config = config_in(root, tasks, config_of)
    prepare(config.data, config.data_folder, say=lambda line: None)
    pretrain(config, CPU)
    return config


def test_init_from_accepts_the_name_or_the_uri_of_a_run_in_the_store(
    trained: Config, tasks: Path, new_machine: Callable[[], None]
) -> None:
    """A sweep passes the URI to its trials, because their runs are in another folder."""
    uri = storage.join(trained.paths.runs, "run", "checkpoints", "step_00000002")
    for start, step in {"run": 4, uri: 2}.items():
        new_machine()
        config = config_in(
            trained.paths.root, tasks, config_of, trm={"init_from": start}, logging={"run": "next"}
        )
        checkpoint = initial_checkpoint(config)
        assert checkpoint is not None and checkpoint.state["step"] == step
        assert storage.uri(checkpoint.folder).endswith(trained.paths.runs.partition("?")[2])
        ema = checkpoint.tensors("ema")
        trm = create_state(config, Dataset.open(config.data_folder), range(2), CPU.device).trm
        for name, value in trm.state_dict().items():
            if name in ema:
                assert torch.equal(value, ema[name]), name


def longer(config: Config, tasks: Path) -> Config:
    return config_in(config.paths.root, tasks, config_of, training={"steps": 6})


def damage(config: Config, step: int, name: str, change: Callable[[bytes], bytes | None]) -> None:
    """Change a checkpoint file in the store but not its local copy."""
    store, path = storage.filesystem(config.run_folder / "checkpoints" / f"step_{step:08d}" / name)
    assert isinstance(store, fs.S3FileSystem)
    with store.open_input_stream(path) as file:
        changed = change(file.read())
    store.delete_file(path)
    if changed is not None:
        with store.open_output_stream(path) as file:
            file.write(changed)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        ("optimizer.safetensors", lambda data: None),
        ("state.json", lambda data: None),
    ],
    ids=["flipped", "missing", "killed before state.json"],
)
def test_a_damaged_newest_checkpoint_in_the_store_is_skipped(
    trained: Config,
    tasks: Path,
    new_machine: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
    name: str,
    change: Callable[[bytes], bytes | None],
) -> None:
    damage(trained, 4, name, change)
    new_machine()
    config = longer(trained, tasks)
    with caplog.at_level("WARNING"):
        assert pretrain(config, CPU).step == 6
    [warning] = [line for line in caplog.messages if "skipped" in line]
    assert "s3://" in warning and "step_00000004" in warning
    local = config_of(tasks, training={"steps": 6})
    prepare(local.data, local.data_folder, say=lambda line: None)
    pretrain(local, CPU)
    new_machine()
    for step in (4, 6):
        stored = read(config.run_folder / "checkpoints" / f"step_{step:08d}")
        assert_close(stored.folder, local.run_folder / "checkpoints" / f"step_{step:08d}", 0, 0)


def test_a_run_killed_during_its_first_upload_starts_from_scratch(
    trained: Config, new_machine: Callable[[], None]
) -> None:
    before = tensors(newest(trained.run_folder / "checkpoints").folder)
    for step in (2, 4):
        damage(trained, step, "state.json", lambda data: None)
    new_machine()
    assert newest(trained.run_folder / "checkpoints") is None
    again = tensors(pretrain(trained, CPU).checkpoint)
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_an_intact_local_copy_is_used_if_the_store_is_damaged(
    trained: Config,
) -> None:
    """A copy that matches the digest in state.json is not downloaded again."""
    damage(trained, 4, "model.safetensors", lambda data: data[:-1])
    assert read(trained.run_folder / "checkpoints" / "step_00000004").state["step"] == 4
    damage(trained, 4, "state.json", lambda data: None)
    with pytest.raises(UserError, match="no checkpoint here"):
        read(trained.run_folder / "checkpoints" / "step_00000004")


def test_state_json_is_uploaded_last(
    root: str, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(root, tasks, config_of, training={"steps": 2})
    prepare(config.data, config.data_folder, say=lambda line: None)
    sent: list[str] = []
    upload = storage.upload

    def record(path: Path, source: Path | None = None) -> None:
        if "checkpoints" in path.parts:
            sent.append(path.name)
        upload(path, source)

    monkeypatch.setattr(storage, "upload", record)
    folder = pretrain(config, CPU).checkpoint
    assert sent[-1] == "state.json" and sent.count("state.json") == 1
    assert set(sent) == set(read(folder).state["files"]) | {"state.json"}


def test_old_checkpoints_are_pruned_in_the_store(root: str, tasks: Path) -> None:
    training = {"steps": 4, "save_every": 1, "keep_checkpoints": 2}
    config = config_in(root, tasks, config_of, training=training)
    prepare(config.data, config.data_folder, say=lambda line: None)
    pretrain(config, CPU)
    assert storage.names(config.run_folder / "checkpoints") == ["step_00000003", "step_00000004"]


def train_with_own_cache(cache: str, *args: Any) -> None:
    # The fork server was started before this test set the environment.
    os.environ.update(STORE_KEYS, ARC_HYBRID_CACHE=cache)
    train_as_rank(*args)


def test_two_machines_that_share_only_the_store_write_a_joint_checkpoint(
    root: str,
    tasks: Path,
    tmp_path: Path,
    start: Callable[..., BaseProcess],
    new_machine: Callable[[], None],
) -> None:
    config = config_in(root, tasks, config_of)
    prepare(config.data, config.data_folder, say=lambda line: None)
    for steps in (2, 4):
        part = config_in(root, tasks, config_of, training={"steps": steps})
        ranks = [
            start(
                train_with_own_cache,
                str(tmp_path / f"machine{rank}"),
                pretrain,
                rank,
                2,
                tmp_path / f"rendezvous{steps}",
                part,
            )
            for rank in range(2)
        ]
        for process in ranks:
            process.join(100)
        assert [process.exitcode for process in ranks] == [0, 0]
    new_machine()
    checkpoint = newest(config.run_folder / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.state["step"] == 4 and checkpoint.state["world_size"] == 2
    assert [path.stem for path in checkpoint.files("slots_")] == [
        "slots_000000_000003",
        "slots_000003_000006",
    ]
    local = config_of(tasks)
    prepare(local.data, local.data_folder, say=lambda line: None)
    pretrain(local, CPU)
    assert_close(checkpoint.folder, local.run_folder / "checkpoints" / "step_00000004")
    assert pretrain(longer(config, tasks), CPU).step == 6


def test_the_prompt_cache_is_shared_through_the_store(
    root: str, tasks: Path, new_machine: Callable[[], None]
) -> None:
    llama = {"llama": {"prompt_cache": True}}
    config = config_in(root, tasks, hybrid_of, **llama)
    prepare(config.data, config.data_folder, say=lambda line: None)
    problems = plan(config)[:12]
    assert PromptCacher(config, CPU.device).add(problems) > 0
    new_machine()
    assert PromptCacher(config, CPU.device).add(problems) == 0
    stored = joint(config, CPU).checkpoint
    local = hybrid_of(tasks)
    prepare(local.data, local.data_folder, say=lambda line: None)
    # The prompts were batched with others, so the results agree only up to rounding.
    assert_close(stored, joint(local, CPU).checkpoint)


def test_showing_progress_does_not_corrupt_metrics_in_the_store(
    root: str, tasks: Path, new_machine: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The progress display downloads the file that the run is writing."""
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.05)
    monkeypatch.setattr(progress._Lines, "every", 0.05)
    training = {"steps": 60, "save_every": 20, "train_accuracy_pairs": 0}
    config = config_in(root, tasks, config_of, training=training)
    prepare(config.data, config.data_folder, say=lambda line: None)
    pretrain_with_progress(config)
    new_machine()
    storage.download(config.run_folder / "metrics.jsonl")
    assert [m["step"] for m in metrics(config.run_folder)] == list(range(1, 61))
