"""Places in an object store, on a server that speaks S3: what is worked on is a copy, and whole."""

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
    ASKED,
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
from hybrid.launch import pretrain as watched
from hybrid.prompt_cache import PromptCacher, plan
from hybrid.train import initial_checkpoint, joint, pretrain, progress
from hybrid.train.state import fresh

JOBS = Path(__file__).parents[1] / "jobs"
CPU = LocalContext(torch.device("cpu"))
STEP = "runs/run/checkpoints/step_{:08d}"


@pytest.fixture
def root(bucket: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new place in the store; copies of it are in tmp_path/cache."""
    for name, value in STORE_KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ARC_HYBRID_CACHE", str(tmp_path / "cache"))
    return bucket()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """elsewhere(): from here on this is another machine, with an empty cache."""
    numbers = count()

    def move() -> None:
        monkeypatch.setenv("ARC_HYBRID_CACHE", str(tmp_path / f"cache{next(numbers)}"))

    return move


def config_in(root: str, tasks: Path, make: Callable[..., Config], **sections: Any) -> Config:
    """Of helpers, with everything but the tasks under `root`."""
    sections["paths"] = {"root": root} | sections.get("paths", {})
    sections["cluster"] = {"num_workers": 0}
    return make(tasks, **sections)


@pytest.fixture
def tasks(tmp_path: Path, arc1: dict[str, Task]) -> Path:
    write_tasks(tmp_path / "training", [arc1[task] for task in TRAINED])
    write_tasks(tmp_path / "evaluation", [arc1[task] for task in ASKED])
    return tmp_path


def run(name: str, config: Path, cache: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(JOBS / f"{name}.py"), "--config", str(config), *overrides]
    env = os.environ | {"ARC_HYBRID_CACHE": str(cache)}
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=120, preexec_fn=on_one_core
    )


def on_one_core() -> None:
    """A job computes with as many threads as it has cores, and threads wait for each other."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})


def ok(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "place",
    ["s3://b/arc?region=eu-west-1&scheme=http", "gs://b", "s3://b/a%20b/c d?x=1", "/data/arc"],
)
def test_a_folder_and_its_place_are_each_other_s_reverse(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARC_HYBRID_CACHE", str(tmp_path))
    assert storage.uri(storage.folder(place)) == place
    inside = storage.folder(place) / "runs" / "a b" / "x.json"
    assert storage.uri(inside) == storage.join(place, "runs", "a b", "x.json")
    assert storage.folder(storage.uri(inside)) != tmp_path
    assert storage.is_cached(inside) == storage.is_uri(place)
    # A place inside a place has a copy of its own, under the same cache.
    assert storage.uri(storage.folder(storage.uri(inside))) == storage.uri(inside)


def test_what_was_published_is_obtained_elsewhere(root: str, elsewhere: Callable[[], None]) -> None:
    sent = storage.folder(root) / "a" / "b.bin"
    sent.parent.mkdir(parents=True)
    sent.write_bytes(bytes(range(256)) * 1000)
    storage.upload(sent)
    other = storage.folder(root) / "a" / "renamed.bin"
    storage.upload(other, sent)
    elsewhere()
    for name in ("b.bin", "renamed.bin"):
        got = storage.folder(root) / "a" / name
        assert not got.exists()
        storage.download(got)
        assert got.read_bytes() == bytes(range(256)) * 1000
    assert os.listdir(got.parent) == ["b.bin", "renamed.bin"] or len(os.listdir(got.parent)) == 2
    assert storage.names(storage.folder(root) / "a") == ["b.bin", "renamed.bin"]
    assert storage.exists(storage.folder(root) / "a")
    assert not storage.exists(storage.folder(root) / "nothing")
    assert storage.names(storage.folder(root) / "nothing") == []


def test_names_that_a_uri_cannot_hold_are_quoted_in_it(
    root: str, elsewhere: Callable[[], None]
) -> None:
    """The place of a run called `my run?` is handed to other nodes as a URI."""
    sent = storage.folder(root) / "my run? #1" / "50%41 é.yaml"
    sent.parent.mkdir(parents=True)
    sent.write_text("logging: {run: x}")
    storage.upload(sent)
    place, holder = storage.uri(sent), storage.uri(sent.parent)
    elsewhere()
    assert place.startswith("s3://")
    assert storage.read(storage.folder(place)) == b"logging: {run: x}"
    assert storage.names(storage.folder(holder)) == ["50%41 é.yaml"]
    assert load(place).logging.run == "x"


def test_the_newest_evaluation_in_a_store_is_not_the_one_that_was_fetched_last(
    root: str, tasks: Path, elsewhere: Callable[[], None]
) -> None:
    config = config_in(root, tasks, config_of)
    for name in ("b", "a", "c"):
        path = config.runs_folder / "other" / "evaluation" / name / "results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"title": name, "protocol": {"evaluated": 3 - (name == "c")}}))
        storage.upload(path)
        time.sleep(1.1)  # the store knows seconds
    elsewhere()
    assert _compare_to(config, "other", {"evaluated": 3})["title"] == "a"


def test_a_config_that_is_not_in_the_store_is_named(root: str) -> None:
    with pytest.raises(UserError, match=r"^s3://.*/none\.yaml\?.*: no such config file$"):
        load(storage.join(root, "none.yaml"))


def test_an_obtained_file_is_the_store_s_not_the_copy_s(root: str) -> None:
    """Also where the store has none: a stale copy would be taken for what is there."""
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


def test_what_is_removed_is_gone_here_and_there(root: str) -> None:
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


def test_of_a_plain_path_nothing_is_obtained_and_nothing_sent(tmp_path: Path) -> None:
    path = tmp_path / "x"
    storage.download(path)
    assert not path.exists()
    path.write_text("x")
    storage.upload(path)
    storage.download(path)
    assert path.read_text() == "x" and storage.names(tmp_path) == ["x"]
    assert storage.filesystem(path) == (None, str(path))


@pytest.mark.parametrize("place", ["nosuch://b/arc", "://x", "s3a:/b://x"])
def test_a_place_of_an_unknown_kind_is_named(place: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        storage.names(storage.folder(place))
    assert place in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_store_that_does_not_answer_is_named_in_one_line(
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


def test_a_run_moves_from_machine_to_machine_and_is_the_run_that_stayed(
    root: str, tasks: Path, tmp_path: Path
) -> None:
    """Every job in a process and with a cache of its own: they share nothing but the store."""
    here = config_of(tasks, cluster={"num_workers": 0})
    (tmp_path / "here.yaml").write_text(dump(here))
    (tmp_path / "there.yaml").write_text(dump(config_in(root, tasks, config_of)))
    for name in ("prepare", "pretrain", "evaluate"):
        ok(run(name, tmp_path / "here.yaml", tmp_path / "none"))
    there = tmp_path / "there.yaml"
    ok(run("prepare", there, tmp_path / "one"))
    ok(run("pretrain", there, tmp_path / "two", "training.steps=2"))
    said = ok(run("pretrain", there, tmp_path / "three"))
    assert "runs/run/checkpoints/step_00000004?" in said and root.partition("?")[2] in said
    ok(run("evaluate", there, tmp_path / "four"))

    os.environ["ARC_HYBRID_CACHE"] = str(tmp_path / "five")
    mine = storage.folder(root)
    # storage.join keeps the options behind the path: paths.runs is a place of its own.
    runs = storage.folder(storage.join(root, "runs"))
    found = newest(runs / "run" / "checkpoints")
    assert found is not None and found.state["step"] == 4
    assert_close(here.run_folder / "checkpoints" / "step_00000004", found.folder, 0, 0)
    storage.download(runs / "run" / "metrics.jsonl")
    # What ended at step 2 was probed there.
    losses = [
        [line for line in metrics(folder) if "loss" in line]
        for folder in (runs / "run", here.run_folder)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert mine != runs

    local = json.loads(next(here.run_folder.glob("evaluation/*/results.json")).read_text())
    [name] = storage.names(runs / "run" / "evaluation")
    stored = runs / "run" / "evaluation" / name
    for path in ("results.json", "report.html", "submission.json"):
        storage.download(stored / path)
    for task in ASKED:
        storage.download(stored / "predictions" / f"{task}.json")
    [compare_to] = here.run_folder.glob("evaluation/*")
    assert predictions(stored) == predictions(compare_to) and len(predictions(stored)) == len(ASKED)
    assert json.loads((stored / "results.json").read_text())["scores"] == local["scores"]
    assert (stored / "submission.json").read_text() == (compare_to / "submission.json").read_text()

    first = stored / "predictions" / f"{ASKED[0]}.json"
    storage.remove(first)
    assert "3 tasks, 2 already answered" in ok(run("evaluate", there, tmp_path / "six"))
    # Written and not sent, when a process was killed: it is asked again, and sent.
    store, name = storage.filesystem(first)
    assert store is not None
    store.delete_file(name)
    assert "3 tasks, 2 already answered" in ok(run("evaluate", there, tmp_path / "six"))
    assert storage.exists(first)


@pytest.fixture
def begun(root: str, tasks: Path) -> Config:
    """A run in the store with checkpoints of steps 2 and 4."""
    config = config_in(root, tasks, config_of)
    prepare(config.data, config.data_folder, say=lambda line: None)
    pretrain(config, CPU)
    return config


def test_a_run_starts_from_another_in_the_store_by_its_name_or_by_its_place(
    begun: Config, tasks: Path, elsewhere: Callable[[], None]
) -> None:
    """A sweep hands its trials the place: their runs lie in another folder."""
    place = storage.join(begun.paths.runs, "run", "checkpoints", "step_00000002")
    wanted = {"run": 4, place: 2}
    for start, step in wanted.items():
        elsewhere()
        config = config_in(
            begun.paths.root, tasks, config_of, trm={"init_from": start}, logging={"run": "next"}
        )
        found = initial_checkpoint(config)
        assert found is not None and found.state["step"] == step
        assert storage.uri(found.folder).endswith(begun.paths.runs.partition("?")[2])
        average = found.tensors("ema")
        trm = fresh(config, Dataset.open(config.data_folder), range(2), CPU.device).trm
        for name, value in trm.state_dict().items():
            if name in average:
                assert torch.equal(value, average[name]), name


def longer(config: Config, tasks: Path) -> Config:
    return config_in(config.paths.root, tasks, config_of, training={"steps": 6})


def damage(config: Config, step: int, name: str, change: Callable[[bytes], bytes | None]) -> None:
    """Change a file of a checkpoint where it is kept, not in a copy."""
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
        ("model.safetensors", lambda whole: whole[:-1] + bytes([whole[-1] ^ 1])),
        ("optimizer.safetensors", lambda whole: None),
        ("state.json", lambda whole: None),
    ],
    ids=["flipped", "missing", "killed before state.json"],
)
def test_a_newest_checkpoint_that_is_not_whole_in_the_store_is_passed_over(
    begun: Config,
    tasks: Path,
    elsewhere: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
    name: str,
    change: Callable[[bytes], bytes | None],
) -> None:
    damage(begun, 4, name, change)
    elsewhere()
    config = longer(begun, tasks)
    with caplog.at_level("WARNING"):
        assert pretrain(config, CPU).step == 6
    [said] = [line for line in caplog.messages if "passed over" in line]
    assert "s3://" in said and "step_00000004" in said
    local = config_of(tasks, training={"steps": 6})
    prepare(local.data, local.data_folder, say=lambda line: None)
    pretrain(local, CPU)
    elsewhere()
    for step in (4, 6):
        stored = read(config.run_folder / "checkpoints" / f"step_{step:08d}")
        assert_close(stored.folder, local.run_folder / "checkpoints" / f"step_{step:08d}", 0, 0)


def test_a_run_killed_while_its_first_checkpoint_was_sent_begins_again(
    begun: Config, elsewhere: Callable[[], None]
) -> None:
    before = tensors(newest(begun.run_folder / "checkpoints").folder)
    for step in (2, 4):
        damage(begun, step, "state.json", lambda whole: None)
    elsewhere()
    assert newest(begun.run_folder / "checkpoints") is None
    again = tensors(pretrain(begun, CPU).checkpoint)
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_damage_in_the_store_is_seen_where_there_is_a_whole_copy_only_by_its_digest(
    begun: Config,
) -> None:
    """A copy whose digest is the one that state.json names is as good as the store's."""
    damage(begun, 4, "model.safetensors", lambda whole: whole[:-1])
    assert read(begun.run_folder / "checkpoints" / "step_00000004").state["step"] == 4
    damage(begun, 4, "state.json", lambda whole: None)
    with pytest.raises(UserError, match="no checkpoint here"):
        read(begun.run_folder / "checkpoints" / "step_00000004")


def test_state_json_reaches_the_store_last(
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


def train_on_a_machine_of_its_own(cache: str, *args: Any) -> None:
    # The server that forks was started before this module's environment was set.
    os.environ.update(STORE_KEYS, ARC_HYBRID_CACHE=cache)
    train_as_rank(*args)


def test_two_machines_that_share_only_the_store_write_one_checkpoint(
    root: str,
    tasks: Path,
    tmp_path: Path,
    start: Callable[..., BaseProcess],
    elsewhere: Callable[[], None],
) -> None:
    config = config_in(root, tasks, config_of)
    prepare(config.data, config.data_folder, say=lambda line: None)
    for steps in (2, 4):
        part = config_in(root, tasks, config_of, training={"steps": steps})
        ranks = [
            start(
                train_on_a_machine_of_its_own,
                str(tmp_path / f"machine{rank}"),
                pretrain,
                rank,
                2,
                tmp_path / f"meet{steps}",
                part,
            )
            for rank in range(2)
        ]
        for process in ranks:
            process.join(100)
        assert [process.exitcode for process in ranks] == [0, 0]
    elsewhere()
    whole = newest(config.run_folder / "checkpoints")
    assert whole is not None and whole.state["step"] == 4 and whole.state["world_size"] == 2
    assert [path.stem for path in whole.files("slots_")] == [
        "slots_000000_000003",
        "slots_000003_000006",
    ]
    local = config_of(tasks)
    prepare(local.data, local.data_folder, say=lambda line: None)
    pretrain(local, CPU)
    assert_close(whole.folder, local.run_folder / "checkpoints" / "step_00000004")
    more = longer(config, tasks)
    assert pretrain(more, CPU).step == 6


def test_encodings_are_shared_through_the_store(
    root: str, tasks: Path, elsewhere: Callable[[], None]
) -> None:
    llama = {"llama": {"prompt_cache": True}}
    config = config_in(root, tasks, hybrid_of, **llama)
    prepare(config.data, config.data_folder, say=lambda line: None)
    problems = plan(config)[:12]
    assert PromptCacher(config, CPU.device).add(problems) > 0
    elsewhere()
    assert PromptCacher(config, CPU.device).add(problems) == 0
    stored = joint(config, CPU).checkpoint
    local = hybrid_of(tasks)
    prepare(local.data, local.data_folder, say=lambda line: None)
    # Other problems were beside them in their batch: the same to rounding.
    assert_close(stored, joint(local, CPU).checkpoint)


def test_the_metrics_of_a_run_in_a_store_survive_being_watched(
    root: str, tasks: Path, elsewhere: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever shows progress brings the file up to date that the run is writing to."""
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.05)
    monkeypatch.setattr(progress._Lines, "every", 0.05)
    training = {"steps": 60, "save_every": 20, "train_accuracy_pairs": 0}
    config = config_in(root, tasks, config_of, training=training)
    prepare(config.data, config.data_folder, say=lambda line: None)
    watched(config)
    elsewhere()
    storage.download(config.run_folder / "metrics.jsonl")
    assert [m["step"] for m in metrics(config.run_folder)] == list(range(1, 61))
