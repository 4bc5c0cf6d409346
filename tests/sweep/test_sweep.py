"""End-to-end sweeps: the command runs in a subprocess and starts Ray Tune."""

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
  num_samples: 3
  hold_out_tasks: 5
  scheduler: none
"""
ENV = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

Sweep = Callable[..., subprocess.CompletedProcess[str]]


@contextlib.contextmanager
def started_sweep(root: Path, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """Start a sweep in a new session; kill all its processes at the end."""
    path = experiment(root)
    marker = {"ARC_HYBRID_TEST_SWEEP": str(root)}
    process = subprocess.Popen(
        [sys.executable, str(SWEEP), "--config", str(path), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ENV | marker,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill_all(root)
        process.communicate()


def experiment(root: Path) -> Path:
    """Write the experiment's YAML file if it does not exist; return its path."""
    path = root / "sweep.yaml"
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        path.write_text(EXPERIMENT.replace("ROOT", str(root)))
    return path


def kill_all(root: Path) -> None:
    """Kill every process whose environment has the marker of this test's sweep."""
    for _ in range(50):
        processes = [p for p in psutil.process_iter() if _belongs_to(p, root)]
        if not processes:
            return
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.1)
    pytest.fail(f"processes are still alive: {processes}")


def _belongs_to(process: psutil.Process, root: Path) -> bool:
    try:
        return (
            process.pid != os.getpid()
            and process.status() != psutil.STATUS_ZOMBIE
            and process.environ().get("ARC_HYBRID_TEST_SWEEP") == str(root)
        )
    except (psutil.Error, OSError):
        return False


def sweep(root: Path, *overrides: str, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    with started_sweep(root, *overrides) as process:
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess([], process.returncode, out, err)


def error_of(root: Path, *overrides: str) -> str:
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
    (root / "stdout").write_text(done.stdout)
    return root


def test_sweep_ranks_its_trials_and_writes_all_outputs(finished: Path) -> None:
    stdout, folder = (finished / "stdout").read_text(), finished / "runs" / "sweep"
    rows = ranking(finished)
    assert len(rows) == 3 and {row["status"] for row in rows} == {"done"}
    assert [row["step"] for row in rows] == [12] * 3 and all(row["evaluated"] >= 5 for row in rows)
    objectives = [row["objective"] for row in rows]
    assert objectives == sorted(objectives, reverse=True)
    assert len(set(objectives)) > 1, "with equal objectives this test cannot detect a wrong order"
    for name in ("sweep.parquet", "report.html", "best.yaml"):
        assert (folder / name).stat().st_size and str(folder / name) in stdout
    best = configs.load(folder / "best.yaml")
    assert best.training.seed == rows[0]["training.seed"]
    assert best.training.lr == rows[0]["training.lr"]
    assert best.logging.run == "sweep-best"


@pytest.mark.slow
def test_rerun_of_a_finished_sweep_trains_nothing(finished: Path) -> None:
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
def test_different_sweep_in_the_same_run_folder_is_rejected(finished: Path) -> None:
    error = error_of(finished, "sweep.space={adapter.hidden: {choice: [8, 16]}}")
    assert "holds another sweep (sweep.space:" in error and "another logging.run" in error
    error = error_of(finished, "training.puzzle_lr=0.02")
    assert "training.puzzle_lr: 0.1 -> 0.02" in error


def test_config_of_a_rejected_sweep_can_be_corrected(tmp_path: Path) -> None:
    """No trial has run, so the corrected config may differ from the rejected one."""
    assert "hold_out_tasks=99" in error_of(tmp_path, "sweep.hold_out_tasks=99")
    second = error_of(tmp_path, "feedback.source=vote")
    assert "feedback.source=vote" in second and "another sweep" not in second


@pytest.mark.slow
def test_finished_sweep_accepts_a_larger_num_samples(finished: Path) -> None:
    before = {row["trial"]: row for row in ranking(finished)}
    done = sweep(finished, "sweep.num_samples=4")
    assert done.returncode == 0, done.stderr
    after = {row["trial"]: row for row in ranking(finished)}
    assert len(after) == 4 and before.items() <= after.items()


@pytest.mark.slow
def test_trial_too_large_for_the_cluster_is_rejected_before_training(tmp_path: Path) -> None:
    error = error_of(tmp_path, "cluster.num_workers=2", "cluster.cpus_per_worker=64")
    assert "need 128 CPUs" in error
    assert not (tmp_path / "runs" / "sweep" / "trials").exists()


@pytest.mark.slow
def test_optuna_stops_at_its_samples_and_a_rerun_trains_nothing(tmp_path: Path) -> None:
    """The space has only two trials, so duplicate suggestions must be dropped."""
    keys = ("sweep.search=optuna", "sweep.space={adapter.hidden: {choice: [8, 16]}}")
    done = sweep(tmp_path, *keys, "sweep.num_samples=4")
    assert done.returncode == 0, done.stderr
    rows = ranking(tmp_path)
    assert 1 <= len(rows) <= 2 and {row["status"] for row in rows} == {"done"}
    rerun = sweep(tmp_path, *keys, "sweep.num_samples=4")
    assert rerun.returncode == 0 and ranking(tmp_path) == rows
    assert "step 12:" not in rerun.stdout.split("right of held-out")[0], "a trial was trained"


@pytest.mark.slow
def test_failed_trial_is_listed_and_the_others_finish(tmp_path: Path) -> None:
    """The missing llama.model is detected only when its trial starts."""
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
def test_sweep_after_ctrl_c_and_killed_trials_matches_uninterrupted_sweep(
    finished: Path, tmp_path: Path
) -> None:
    """After Ctrl-C the ranking is incomplete and the exit code is 1."""
    trials = tmp_path / "runs" / "sweep" / "trials"

    def wait_for(process: subprocess.Popen[str], step: int) -> None:
        deadline = time.monotonic() + 240
        while not any(_reached(file, step) for file in trials.glob("*/metrics.jsonl")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    with started_sweep(tmp_path, "sweep.max_concurrent_trials=1") as process:
        wait_for(process, 4)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=200)
    assert process.returncode == 1 and "stopped:" in err, err
    assert "run the same command to resume" in err
    killed: set[Path] = set()
    with started_sweep(tmp_path, "sweep.max_concurrent_trials=1") as process:
        while process.poll() is None:
            for metrics in trials.glob("*/metrics.jsonl"):
                if metrics not in killed and _reached(metrics, 4) and not _reached(metrics, 12):
                    for trial in _trial_processes(tmp_path):
                        trial.kill()
                        killed.add(metrics)
            time.sleep(0.02)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert killed and "its process died" not in out
    expected = ranking(finished)  # another test may have added trials
    assert len(ranking(tmp_path)) == 3 and all(row in expected for row in ranking(tmp_path))


def _trial_processes(root: Path) -> list[psutil.Process]:
    """Return the processes in which Tune trains trials."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if _belongs_to(process, root) and process.name().startswith("ray::ImplicitFunc"):
                processes.append(process)
    return processes


@pytest.mark.slow
def test_sweep_resumed_after_sigkill_matches_uninterrupted_sweep(
    tmp_path: Path,
) -> None:
    keys = ("cluster.num_workers=1", "sweep.num_samples=2")
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    done = sweep(uninterrupted, *keys)
    assert done.returncode == 0, done.stderr
    with started_sweep(killed, *keys) as process:
        trials = killed / "runs" / "sweep" / "trials"
        deadline = time.monotonic() + 240
        while not any(_reached(file, 4) for file in trials.glob("*/metrics.jsonl")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        kill_all(killed)
    assert not (killed / "runs" / "sweep" / "sweep.parquet").exists()
    records = [json.loads(file.read_text()) for file in trials.glob("*/trial.json")]
    assert any(record["status"] == "unfinished" for record in records)
    done = sweep(killed, *keys)
    assert done.returncode == 0, done.stderr
    assert ranking(killed) == ranking(uninterrupted)


@pytest.mark.slow
def test_sweep_in_an_object_store_resumes_on_another_machine_from_the_same_start(
    tmp_path: Path, bucket: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first machine is killed; the second has an empty cache and gets the same ranking."""
    for name, value in STORE_KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ARC_HYBRID_CACHE", str(tmp_path / "one"))
    local, remote, store = tmp_path / "local", tmp_path / "remote", bucket()
    roots = {local: f"paths.root={local}", remote: f"paths.root={store}"}
    for folder, root in roots.items():
        start = (root, "logging.run=start", "training.steps=2", "data.hold_out_tasks=5")
        for job in ("prepare", "pretrain"):
            command = [sys.executable, ROOT / "jobs" / f"{job}.py", "--config", experiment(folder)]
            subprocess.run([*command, *start], check=True, timeout=100)
    # One trial at a time, because ASHA's early stopping depends on the order of reports.
    keys = ("trm.init_from=start", "sweep.scheduler=asha", "sweep.max_concurrent_trials=1")
    done = sweep(local, roots[local], *keys)
    assert done.returncode == 0, done.stderr
    with started_sweep(remote, roots[remote], *keys) as process:
        deadline = time.monotonic() + 240
        while not any(_reached(file, 8) for file in (tmp_path / "one").rglob("*/metrics.jsonl")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        kill_all(remote)
    monkeypatch.setenv("ARC_HYBRID_CACHE", str(tmp_path / "two"))
    # All trials use the start checkpoint of the first, although that run has a newer one.
    subprocess.run([*command, *start, "training.steps=3"], check=True, timeout=100)
    done = sweep(remote, roots[remote], *keys)
    assert done.returncode == 0, done.stderr
    assert ranking(storage.folder(store)) == ranking(local)
    assert {row["status"]: row["step"] for row in ranking(local)} == {
        "done": 12,
        "stopped early": 4,
    }
    best = storage.folder(store) / "runs" / "sweep" / "best.yaml"
    storage.download(best)
    assert configs.load(best).trm.init_from == "start"
    logs = [log.read_text() for log in (tmp_path / "two").rglob("train_0.log")]
    assert any(re.search(r" step [48] of 12,", log) for log in logs), "no trial was resumed"


def _reached(metrics: Path, step: int) -> bool:
    return any(f'"step": {step},' in line for line in metrics.read_text().splitlines())
