"""A sweep from its command to its ranking, on Ray Tune in processes of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from helpers import STORE_KEYS

from hybrid import config as configs
from hybrid import storage

ROOT = Path(__file__).parents[2]
SWEEP = ROOT / "tune" / "sweep.py"
EXPERIMENT = """\
paths: {root: ROOT}
data: {training: [arc1-training], evaluation: [], variants: 2, max_side: 3, on_overlap: drop}
trm: {hidden_size: 32, num_heads: 2, expansion: 1, L_layers: 1, H_cycles: 1, L_cycles: 1,
      halt_max_steps: 2, puzzle_emb_ndim: 32, puzzle_emb_len: 1}
llama: {model: tiny-random}
adapter: {hidden: 16, prefix_tokens: 2}
training: {batch_size: 6, steps: 12, variants: 1, save_every: 4, train_accuracy_pairs: 0,
           lr: 1.0e-2, puzzle_lr: 0.1, lr_warmup_steps: 0, ema_rate: 0.5, max_attempts: 2}
evaluation: {variants: 1}
cluster: {num_workers: 0, cpus_per_worker: 0.5}
logging: {wandb: false, every: 4}
sweep:
  space:
    training.seed: {int: [0, 99]}
    training.lr: {loguniform: [5.0e-5, 5.0e-4]}
  samples: 3
  hold_out_tasks: 5
  scheduler: none
"""
ENV = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

Sweep = Callable[..., subprocess.CompletedProcess[str]]


@contextlib.contextmanager
def begun(root: Path, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """A sweep in a session of its own, of which nothing is left behind afterwards."""
    path = experiment(root)
    mark = {"ARC_HYBRID_TEST_SWEEP": str(root)}
    process = subprocess.Popen(
        [sys.executable, str(SWEEP), "--config", str(path), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ENV | mark,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill_all(root)
        process.communicate()


def experiment(root: Path) -> Path:
    """Its file."""
    path = root / "sweep.yaml"
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        path.write_text(EXPERIMENT.replace("ROOT", str(root)))
    return path


def kill_all(root: Path) -> None:
    """Every process whose environment says that a sweep of this test has started it."""
    for _ in range(50):
        mine = [p for p in psutil.process_iter() if _is_of(p, root)]
        if not mine:
            return
        for process in mine:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.1)
    pytest.fail(f"still there: {mine}")


def _is_of(process: psutil.Process, root: Path) -> bool:
    try:
        return (
            process.pid != os.getpid()
            and process.status() != psutil.STATUS_ZOMBIE
            and process.environ().get("ARC_HYBRID_TEST_SWEEP") == str(root)
        )
    except (psutil.Error, OSError):
        return False


def sweep(root: Path, *overrides: str, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    with begun(root, *overrides) as process:
        said, complained = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess([], process.returncode, said, complained)


def refused(root: Path, *overrides: str) -> str:
    done = sweep(root, *overrides)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def ranking(root: Path) -> list[dict[str, Any]]:
    path = root / "runs" / "sweep" / "sweep.parquet"
    storage.download(path)
    table = pq.read_table(path).to_pylist()
    return [{k: v for k, v in row.items() if k != "seconds"} for row in table]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    done = sweep(root)
    assert done.returncode == 0, done.stderr
    (root / "said").write_text(done.stdout)
    return root


def test_a_sweep_ranks_its_trials_and_writes_everything(finished: Path) -> None:
    said, folder = (finished / "said").read_text(), finished / "runs" / "sweep"
    rows = ranking(finished)
    assert len(rows) == 3 and {row["status"] for row in rows} == {"done"}
    assert [row["step"] for row in rows] == [12] * 3 and all(row["evaluated"] >= 5 for row in rows)
    objectives = [row["objective"] for row in rows]
    assert objectives == sorted(objectives, reverse=True)
    assert len(set(objectives)) > 1, "trials that end alike would rank alike whatever the code does"
    for name in ("sweep.parquet", "report.html", "best.yaml"):
        assert (folder / name).stat().st_size and str(folder / name) in said
    best = configs.load(folder / "best.yaml")
    assert best.training.seed == rows[0]["training.seed"]
    assert best.training.lr == rows[0]["training.lr"]
    assert best.logging.run == "sweep-best"


@pytest.mark.slow
def test_a_finished_sweep_run_again_runs_nothing(finished: Path) -> None:
    before = ranking(finished)
    folders = sorted((finished / "runs" / "sweep" / "trials").iterdir())
    times = [(folder / "trial.json").stat().st_mtime_ns for folder in folders]
    done = sweep(finished)
    assert done.returncode == 0, done.stderr
    assert "3 trials, 3 of them done" in done.stdout
    assert ranking(finished) == before
    assert sorted((finished / "runs" / "sweep" / "trials").iterdir()) == folders
    assert [(f / "trial.json").stat().st_mtime_ns for f in folders] == times


@pytest.mark.slow
def test_another_space_in_the_same_folder_is_refused(finished: Path) -> None:
    said = refused(finished, "sweep.space={adapter.hidden: {choice: [8, 16]}}")
    assert "holds another sweep (sweep.space:" in said and "another logging.run" in said
    said = refused(finished, "training.puzzle_lr=0.02")
    assert "training.puzzle_lr: 0.1 -> 0.02" in said


def test_a_sweep_that_was_refused_can_be_corrected(tmp_path: Path) -> None:
    """Nothing has run: what was wrong must not be held against what is right."""
    assert "hold_out_tasks=99" in refused(tmp_path, "sweep.hold_out_tasks=99")
    again = refused(tmp_path, "feedback.source=vote")
    assert "feedback.source=vote" in again and "another sweep" not in again


@pytest.mark.slow
def test_a_sweep_may_grow(finished: Path) -> None:
    before = {row["trial"]: row for row in ranking(finished)}
    done = sweep(finished, "sweep.num_samples=4")
    assert done.returncode == 0, done.stderr
    after = {row["trial"]: row for row in ranking(finished)}
    assert len(after) == 4 and before.items() <= after.items()


@pytest.mark.slow
def test_a_trial_that_can_never_fit_is_refused_beforehand(tmp_path: Path) -> None:
    said = refused(tmp_path, "cluster.num_workers=2", "cluster.cpus_per_worker=64")
    assert "need 128 CPUs" in said
    assert not (tmp_path / "runs" / "sweep" / "trials").exists()


@pytest.mark.slow
def test_optuna_ends_after_its_samples_and_does_not_begin_again(tmp_path: Path) -> None:
    """In a space of two trials: what it proposes twice is there once."""
    keys = ("sweep.search=optuna", "sweep.space={adapter.hidden: {choice: [8, 16]}}")
    done = sweep(tmp_path, *keys, "sweep.num_samples=4")
    assert done.returncode == 0, done.stderr
    rows = ranking(tmp_path)
    assert 1 <= len(rows) <= 2 and {row["status"] for row in rows} == {"done"}
    again = sweep(tmp_path, *keys, "sweep.num_samples=4")
    assert again.returncode == 0 and ranking(tmp_path) == rows
    assert "step 12:" not in again.stdout.split("right of held-out")[0], "nothing was run"


@pytest.mark.slow
def test_a_trial_that_fails_is_listed_and_the_others_end(tmp_path: Path) -> None:
    """llama.model names nothing: that is seen when a trial begins."""
    space = "sweep.space={llama.model: {choice: [tiny-random, /nowhere/at/all]}}"
    done = sweep(tmp_path, space, "sweep.num_samples=8")
    assert done.returncode == 0, done.stderr
    rows = ranking(tmp_path)
    assert [row["status"] for row in rows] == ["done", "failed"]
    assert "llama.model: /nowhere/at/all" in rows[1]["error"]
    assert done.stdout.count("failed: llama.model: /nowhere/at/all") == 2
    best = yaml.safe_load((tmp_path / "runs" / "sweep" / "best.yaml").read_text())
    assert best["llama"]["model"] == "tiny-random"


@pytest.mark.slow
def test_ended_by_hand_and_then_with_its_trials_killed_it_ends_as_undisturbed(
    finished: Path, tmp_path: Path
) -> None:
    """Ctrl-C is no end: the ranking is half of one, and the exit code says so."""
    trials = tmp_path / "runs" / "sweep" / "trials"

    def wait_for(process: subprocess.Popen[str], step: int) -> None:
        until = time.monotonic() + 240
        while not any(_reached(file, step) for file in trials.glob("*/metrics.jsonl")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.02)

    with begun(tmp_path, "sweep.max_concurrent_trials=1") as process:
        wait_for(process, 4)
        process.send_signal(signal.SIGINT)
        _, complained = process.communicate(timeout=200)
    assert process.returncode == 1 and "stopped:" in complained, complained
    assert "same command goes on" in complained
    killed: set[Path] = set()
    with begun(tmp_path, "sweep.max_concurrent_trials=1") as process:
        while process.poll() is None:
            for metrics in trials.glob("*/metrics.jsonl"):
                if metrics not in killed and _reached(metrics, 4) and not _reached(metrics, 12):
                    for trial in _trial_processes(tmp_path):
                        trial.kill()
                        killed.add(metrics)
            time.sleep(0.02)
        said, complained = process.communicate(timeout=300)
    assert process.returncode == 0, complained
    assert killed and "its process died" not in said
    wanted = ranking(finished)  # perhaps it has grown
    assert len(ranking(tmp_path)) == 3 and all(row in wanted for row in ranking(tmp_path))


def _trial_processes(root: Path) -> list[psutil.Process]:
    """Those that Tune trains trials in."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if _is_of(process, root) and process.name().startswith("ray::ImplicitFunc"):
                found.append(process)
    return found


@pytest.mark.slow
def test_killed_in_the_middle_with_all_its_processes_it_ends_as_undisturbed(
    tmp_path: Path,
) -> None:
    keys = ("cluster.num_workers=1", "sweep.num_samples=2")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    done = sweep(undisturbed, *keys)
    assert done.returncode == 0, done.stderr
    with begun(killed, *keys) as process:
        trials = killed / "runs" / "sweep" / "trials"
        until = time.monotonic() + 240
        while not any(_reached(file, 4) for file in trials.glob("*/metrics.jsonl")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        kill_all(killed)
    assert not (killed / "runs" / "sweep" / "sweep.parquet").exists()
    notes = [json.loads(file.read_text()) for file in trials.glob("*/trial.json")]
    assert any(note["status"] == "unfinished" for note in notes)
    done = sweep(killed, *keys)
    assert done.returncode == 0, done.stderr
    assert ranking(killed) == ranking(undisturbed)


@pytest.mark.slow
def test_a_sweep_in_a_store_starts_from_a_run_there_and_goes_on_on_another_machine(
    tmp_path: Path, bucket: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed with all its processes; what goes on has an empty cache, and ends as undisturbed."""
    for name, value in STORE_KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ARC_HYBRID_CACHE", str(tmp_path / "one"))
    here, there, store = tmp_path / "here", tmp_path / "there", bucket()
    places = {here: f"paths.root={here}", there: f"paths.root={store}"}
    for root, place in places.items():
        begin = (place, "logging.run=start", "training.steps=2", "data.hold_out_tasks=5")
        for job in ("prepare", "pretrain"):
            command = [sys.executable, ROOT / "jobs" / f"{job}.py", "--config", experiment(root)]
            subprocess.run([*command, *begin], check=True, timeout=100)
    # One after the other: which trials ASHA ends early depends on who came before.
    keys = ("trm.init_from=start", "sweep.scheduler=asha", "sweep.max_concurrent_trials=1")
    done = sweep(here, places[here], *keys)
    assert done.returncode == 0, done.stderr
    with begun(there, places[there], *keys) as process:
        until = time.monotonic() + 240
        while not any(_reached(file, 8) for file in (tmp_path / "one").rglob("*/metrics.jsonl")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.05)
        kill_all(there)
    monkeypatch.setenv("ARC_HYBRID_CACHE", str(tmp_path / "two"))
    # What the first trial began from is what the others begin from, though the start goes on.
    subprocess.run([*command, *begin, "training.steps=3"], check=True, timeout=100)
    done = sweep(there, places[there], *keys)
    assert done.returncode == 0, done.stderr
    assert ranking(storage.folder(store)) == ranking(here)
    assert {row["status"]: row["step"] for row in ranking(here)} == {"done": 12, "stopped early": 4}
    best = storage.folder(store) / "runs" / "sweep" / "best.yaml"
    storage.download(best)
    assert configs.load(best).trm.init_from == "start"
    logs = [log.read_text() for log in (tmp_path / "two").rglob("train_0.log")]
    assert any(re.search(r" step [48] of 12,", log) for log in logs), "nothing was resumed"


def _reached(metrics: Path, step: int) -> bool:
    return any(f'"step": {step},' in line for line in metrics.read_text().splitlines())
