"""Interrupted and resumed runs equal uninterrupted ones bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import change_weights, config_of, metrics, poison, write_tasks
from safetensors.torch import load_file

from hybrid.arc import Task
from hybrid.checkpoint import newest, read
from hybrid.config import Config
from hybrid.context import LocalContext
from hybrid.dataset import Stream, prepare
from hybrid.dataset.stream import Rows
from hybrid.errors import UserError
from hybrid.train import Result, pretrain

CopyRun = Callable[..., Config]
Train = Callable[[Config], Result]
Start = Callable[..., BaseProcess]
CPU = LocalContext(torch.device("cpu"))

WRITTEN = {
    "model.safetensors": "weights, H_init, L_init",
    "puzzle_table.safetensors": "puzzle table",
    "ema.safetensors": "EMA",
    "optimizer.safetensors": "moments",
    "slots_000000_000006.safetensors": "carry and position in the stream",
    "config.yaml": "config",
    "trained_on.json": "pairs trained on",
    "state.json": "metadata",
}


def folders(config: Config) -> dict[int, Path]:
    paths = sorted((config.run_folder / "checkpoints").glob("step_*[0-9]"))
    return {int(path.name.removeprefix("step_")): path for path in paths}


def assert_same_bits(one: Path, other: Path) -> None:
    assert {path.name for path in one.iterdir()} == WRITTEN.keys()
    for name, content in WRITTEN.items():
        if name.endswith(".safetensors"):
            a, b = load_file(one / name), load_file(other / name)
            assert a.keys() == b.keys(), name
            for key in a:
                assert torch.equal(a[key], b[key]), f"{content}: {key} differs"
    kept = ("format", "kind", "step", "world_size", "trm", "dataset", "versions")
    a, b = (read(folder).state for folder in (one, other))
    assert {key: a[key] for key in kept} == {key: b[key] for key in kept}


def step_metrics(config: Config) -> list[dict[str, Any]]:
    return [line for line in metrics(config.run_folder) if "loss" in line]


def test_rows_of_the_test_run_halt_at_different_times(copy_run: CopyRun, train: Train) -> None:
    """Precondition: otherwise a lost carry or stream position would not fail the tests below."""
    config = copy_run("a", training={"steps": 8, "save_every": 1})
    train(config)
    for step in (3, 4, 8):
        slots = load_file(folders(config)[step] / "slots_000000_000006.safetensors")
        assert len(set(slots["rows_consumed"].tolist())) > 1, step
        assert slots["halted"].any() and not slots["halted"].all(), step


def test_resumed_run_matches_uninterrupted_run(
    copy_run: CopyRun, train: Train, start: Start
) -> None:
    whole = copy_run("whole", training={"steps": 5, "save_every": 100})
    train(whole)
    for steps in (3, 5):
        halves = config_of(
            Path(whole.paths.root),
            training={"steps": steps, "save_every": 100},
            logging={"run": "halves"},
        )
        if steps == 3:
            shutil.copytree(whole.run_folder.parent / "base", halves.run_folder)
        process = start(pretrain, halves, CPU)
        process.join()
        assert process.exitcode == 0
    assert list(folders(halves)) == [1, 3, 5]
    assert_same_bits(folders(whole)[5], folders(halves)[5])
    assert step_metrics(halves) == step_metrics(whole)
    accuracies = [line for line in metrics(halves.run_folder) if "loss" not in line]
    assert [line["step"] for line in accuracies] == [0, 1, 3, 5]


def test_resuming_from_any_checkpoint_gives_the_same_run(copy_run: CopyRun, train: Train) -> None:
    """The checkpoint steps are no multiples of `logging.every`; metrics.jsonl must not change."""
    sections = {"training": {"steps": 8, "save_every": 3}, "logging": {"every": 4}}
    whole = copy_run("whole", **sections)
    train(whole)
    assert list(folders(whole)) == [1, 3, 6, 8]
    for last in (1, 3, 6):
        again = copy_run(f"from-{last}", **sections)
        shutil.rmtree(again.run_folder)
        shutil.copytree(whole.run_folder, again.run_folder)
        for step, folder in folders(again).items():
            if step > last:
                shutil.rmtree(folder)
        train(again)
        for step in (3, 6, 8):
            assert_same_bits(folders(whole)[step], folders(again)[step])
        assert metrics(again.run_folder) == metrics(whole.run_folder)


def test_run_killed_at_random_times_matches_uninterrupted_run(
    copy_run: CopyRun, train: Train, start: Start
) -> None:
    sections = {"training": {"steps": 100, "save_every": 3}, "logging": {"every": 2}}
    whole, killed = copy_run("whole", **sections), copy_run("killed", **sections)
    train(whole)
    delays: list[float] = []
    while len(delays) < 3:
        seen = len(folders(killed))
        process = start(pretrain, killed, CPU)
        while process.is_alive() and len(folders(killed)) == seen:
            time.sleep(0.002)
        delays.append(random.uniform(0, 0.1))
        time.sleep(delays[-1])
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert max(folders(killed)) < 100, f"the run finished before it was killed, {delays}"
    train(killed)
    assert_same_bits(folders(whole)[100], folders(killed)[100])
    assert metrics(killed.run_folder) == metrics(whole.run_folder), delays
    assert not list(killed.run_folder.glob("checkpoints/*.partial"))


def test_metrics_have_one_line_of_each_kind_per_step_after_a_restart(
    copy_run: CopyRun, train: Train
) -> None:
    """The run lost its checkpoints and was killed in the middle of a line."""
    config = copy_run("a", training={"steps": 5})
    shutil.rmtree(config.run_folder)
    train(config)
    first = metrics(config.run_folder)
    shutil.rmtree(config.run_folder / "checkpoints")
    with (config.run_folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    train(config)
    assert metrics(config.run_folder) == first
    counts = Counter((line["step"], "loss" in line) for line in first)
    assert set(counts.values()) == {1}
    assert [line["step"] for line in first if "loss" in line] == [1, 2, 3, 4, 5]


def test_damaged_newest_checkpoint_is_skipped(copy_run: CopyRun, train: Train) -> None:
    """With keep_checkpoints=1, its replacement is not pruned in its favour."""
    whole, config = (copy_run(name, training={"steps": 7}) for name in ("whole", "damaged"))
    train(whole)
    train(config)
    path = folders(config)[7] / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    stopping = config_of(
        Path(config.paths.root),
        training={"steps": 6, "keep_checkpoints": 1},
        logging={"run": config.logging.run},
    )
    shutil.rmtree(folders(config)[6])
    assert train(stopping).step == 6
    assert list(folders(config)) == [6]
    train(config)
    assert_same_bits(folders(whole)[7], folders(config)[7])
    assert step_metrics(config) == step_metrics(whole)


def test_partial_checkpoint_is_ignored_and_removed(copy_run: CopyRun, train: Train) -> None:
    """No file of a partial checkpoint, written by more workers, may get into the new one."""
    config = copy_run("a", training={"steps": 2})
    checkpoints = config.run_folder / "checkpoints"
    for step in (2, 9):
        partial = checkpoints / f"step_{step:08d}.partial"
        shutil.copytree(checkpoints / "step_00000001", partial)
        shutil.copy(
            partial / "slots_000000_000006.safetensors", partial / "slots_000000_000003.safetensors"
        )
    checkpoint = train(config).checkpoint
    assert {path.name for path in checkpoint.iterdir()} == WRITTEN.keys()
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step_00000001", "step_00000002"]


def test_stream_resumes_at_the_slowest_slot(copy_run: CopyRun, train: Train) -> None:
    """Rows that every slot has taken, millions late in a run, are not made again."""
    firsts: list[int] = []

    class Recorder(LocalContext):
        def rounds(self, stream: Stream, slots: range, total: int, first: int) -> Iterator[Rows]:
            firsts.append(first)
            return super().rounds(stream, slots, total, first)

    config = copy_run("a", training={"steps": 12})
    folder = train(config).checkpoint
    longer = replace(config, training=replace(config.training, steps=13))
    pretrain(longer, Recorder(CPU.device))
    slowest = int(load_file(folder / "slots_000000_000006.safetensors")["rows_consumed"].min())
    assert firsts == [slowest] and slowest > 0


def test_resume_names_changed_keys_with_both_values(copy_run: CopyRun, train: Train) -> None:
    config = copy_run("a", trm={"hidden_size": 16, "puzzle_emb_ndim": 16}, training={"lr": 0.002})
    with pytest.raises(UserError) as error:
        train(config)
    for part in (config.logging.run, "trm.hidden_size: 32 -> 16", "training.lr: 0.0001 -> 0.002"):
        assert part in str(error.value)
    assert "training.steps" not in str(error.value), "more steps are allowed"
    assert list(folders(config)) == [1]


def test_resuming_on_another_dataset_is_rejected(
    copy_run: CopyRun, train: Train, tmp_path: Path
) -> None:
    config = copy_run("a", data={"seed": 1}, paths={"data": str(tmp_path / "other")})
    prepare(config.data, config.data_folder, lambda line: None)
    with pytest.raises(UserError, match=r"holds a run on another dataset than .*other"):
        train(config)


def test_changed_answers_do_not_prevent_resuming(
    base_root: Path, copy_run: CopyRun, train: Train, tmp_path: Path, arc1: dict[str, Task]
) -> None:
    """Test answers, which no model sees, may be corrected during a run."""
    config = copy_run("a", training={"steps": 2}, paths={"data": str(tmp_path / "other")})
    tasks = [arc1[path.stem] for path in (base_root / "evaluation").iterdir()]
    write_tasks(base_root / "evaluation", map(poison, tasks))
    try:
        prepare(config.data, config.data_folder, lambda line: None)
    finally:
        write_tasks(base_root / "evaluation", tasks)
    assert train(config).step == 2


def test_old_checkpoints_are_pruned(copy_run: CopyRun, train: Train) -> None:
    config = copy_run("a", training={"steps": 7, "keep_checkpoints": 2})
    train(config)
    assert list(folders(config)) == [6, 7]


def test_rerunning_a_finished_run_changes_nothing(copy_run: CopyRun, train: Train) -> None:
    config = copy_run("a", training={"steps": 3})
    first = train(config)
    written = (config.run_folder / "metrics.jsonl").read_text()
    assert train(config) == first
    assert (config.run_folder / "metrics.jsonl").read_text() == written
    assert first.train_accuracy_before is not None and first.train_accuracy_after is not None


def test_diverged_run_raises_with_step_and_last_good_checkpoint(
    copy_run: CopyRun, train: Train
) -> None:
    config = copy_run("a", training={"steps": 9})

    def blow_up(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"].fill_(1e38)

    change_weights(folders(config)[1], blow_up)
    with pytest.raises(RuntimeError) as error:
        train(config)
    found = newest(config.run_folder / "checkpoints")
    assert found is not None and found.state["step"] == 1
    text = str(error.value)
    assert text.startswith("step 2: the loss or a gradient is not finite; puzzle identifiers of")
    assert text.endswith(f"last good checkpoint: {folders(config)[1]}")
    assert "Diverged: step 2" in (config.run_folder / "train_0.log").read_text()


def test_checkpoint_contains_no_pickle(copy_run: CopyRun, train: Train) -> None:
    folder = train(copy_run("a", training={"steps": 2})).checkpoint
    assert {path.name for path in folder.iterdir()} == WRITTEN.keys()
    for path in folder.glob("*.safetensors"):
        assert load_file(path)
    for path in set(folder.iterdir()) - set(folder.glob("*.safetensors")):
        assert not path.read_bytes().startswith((b"PK", b"\x80")), f"{path.name}: zip or pickle"
