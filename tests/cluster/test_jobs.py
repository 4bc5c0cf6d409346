"""Jobs started with `ray job submit`, and by clients with RAY_ADDRESS."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_close, metrics, predictions

from hybrid.checkpoint import newest, read
from hybrid.config import Config, dump
from hybrid.launch import evaluate, joint, pretrain

Experiment = Callable[..., Config]
Done = Any

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
LONG = {"steps": 20000, "save_every": 100000, "train_accuracy_pairs": 0}


@pytest.fixture(scope="module")
def head(start_cluster: Callable[..., Any]) -> Any:
    return start_cluster(4)


@pytest.fixture(scope="module")
def client(head: Any) -> Iterator[Any]:
    from ray.job_submission import JobSubmissionClient

    yield JobSubmissionClient(head.dashboard)


@pytest.fixture(scope="module")
def submit(head: Any) -> Callable[..., Done]:
    """submit(id, script, config, *overrides, wait=True) runs `ray job submit`."""

    def run(name: str, script: str, config: Config, *overrides: str, wait: bool = True) -> Done:
        file = Path(head.folder) / f"{name}.yaml"
        file.write_text(dump(config))
        return head.run(
            *("ray", "job", "submit", "--address", head.dashboard, "--working-dir", "."),
            *("--runtime-env", "configs/cluster/runtime_env.yaml", "--submission-id", name),
            *(() if wait else ("--no-wait",)),
            *("--", "python", f"jobs/{script}", "--config", str(file), *overrides),
        )

    return run


def output_of(client: Any, name: str) -> list[str]:
    """Return a job's output lines; assert that it has no escape codes, tracebacks or repeats."""
    text = client.get_job_logs(name)
    assert "\x1b" not in text and "Traceback" not in text, text
    lines = [line for line in text.splitlines() if line]
    lines = [
        line for line in lines if not re.match(r"\d{4}-\d\d-\d\d .*Runtime env|Running ", line)
    ]
    assert len(lines) == len(set(lines)), text
    return lines


def local(experiment: Experiment, run: str, **training: Any) -> Path:
    return pretrain(experiment(run, training=training, cluster={"num_workers": 0})).checkpoint


def test_submitted_job_trains_the_same_weights_as_a_local_run(
    head: Any, client: Any, submit: Callable[..., Done], experiment: Experiment
) -> None:
    config = experiment("submitted")
    done = submit("trains", "pretrain.py", config)
    assert done.code == 0, done.out
    lines = output_of(client, "trains")
    folder = config.run_folder / "checkpoints/step_00000008"
    assert lines[-1] == f"step 8: {folder}" and lines[-2].startswith(
        "exact match on training pairs"
    )
    # Progress lines appear only in a run that takes long enough.
    assert all(re.match(r"step \d/8 loss .* min left$", line) for line in lines[:-2])
    assert set(lines) <= set(done.out.splitlines())
    assert_close(local(experiment, "alone"), folder, 0, 0)
    packages = Path(head.folder) / "session_latest/runtime_resources/working_dir_files"
    [package] = [path for path in packages.glob("_ray_pkg_*") if path.is_dir()]
    names = {path.name for path in package.iterdir() if any(path.rglob("*"))}
    assert {"hybrid", "jobs", "configs"} <= names
    assert not names & {"tests", "docs", ".git", ".venv", ".hypothesis", ".mypy_cache"}
    size = sum(path.stat().st_size for path in package.rglob("*") if path.is_file())
    print(f"{done.seconds:.1f} s, {size / 1e6:.2f} MB unpacked")
    assert size < 3_000_000


@pytest.mark.slow
def test_invalid_config_fails_the_job_with_exit_code_2_and_one_line(
    head: Any, client: Any, submit: Callable[..., Done], experiment: Experiment
) -> None:
    done = submit("wrong", "pretrain.py", experiment("wrong"), "training.batch_size=x")
    assert done.code != 0
    [line] = output_of(client, "wrong")
    assert line.startswith("error: ") and "training.batch_size: input should be a valid" in line
    info = client.get_job_info("wrong")
    assert (info.status, info.driver_exit_code) == ("FAILED", 2)
    status = head.run("ray", "job", "status", "--address", head.dashboard, "wrong")
    assert "failed" in status.out + status.err


@pytest.mark.slow
def test_job_too_large_for_the_cluster_fails_with_one_line(
    client: Any, submit: Callable[..., Done], experiment: Experiment
) -> None:
    config = experiment("large", cluster={"num_workers": 8, "cpus_per_worker": 1})
    assert submit("large", "pretrain.py", config).code != 0
    [line] = output_of(client, "large")
    assert line.startswith("error: cluster.num_workers=8 of cpus_per_worker=1 need 8 CPUs")
    assert client.get_job_info("large").driver_exit_code == 2
    assert not config.run_folder.exists() or not any(config.run_folder.rglob("step_*"))


@pytest.mark.slow
def test_stopped_job_saves_its_last_step_and_the_same_command_resumes_it(
    head: Any,
    client: Any,
    submit: Callable[..., Done],
    experiment: Experiment,
    until: Callable[..., None],
) -> None:
    config = experiment("stopped", training=LONG)
    log = config.run_folder / "metrics.jsonl"
    assert submit("stopped", "pretrain.py", config, wait=False).code == 0
    until(lambda: log.exists() and len(log.read_text().splitlines()) > 20, 120, "steps")
    done = head.run("ray", "job", "stop", "--address", head.dashboard, "stopped")
    print(f"ray job stop took {done.seconds:.1f} s")
    assert done.code == 0, done.out + done.err
    info = client.get_job_info("stopped")
    assert info.status == "STOPPED"
    saved = newest(config.run_folder / "checkpoints")
    assert saved is not None
    step = saved.state["step"]
    assert step == metrics(config.run_folder)[-1]["step"]
    assert 20 < step < LONG["steps"]
    lines = output_of(client, "stopped")
    assert any(line.startswith("SIGTERM: saving a checkpoint") for line in lines), lines
    assert f"stopped: at step {step}: {saved.folder}; run the same command to resume" in lines[-1]

    steps = f"training.steps={step + 7}"
    assert submit("again", "pretrain.py", config, steps).code == 0
    assert output_of(client, "again")[-1].startswith(f"step {step + 7}: ")
    uninterrupted = experiment("whole", training=LONG)
    head.run_local("pretrain.py", uninterrupted, steps)
    last = f"checkpoints/step_{step + 7:08d}"
    assert_close(uninterrupted.run_folder / last, config.run_folder / last, 0, 0)


@pytest.mark.slow
def test_client_uploads_its_own_package_and_trains_the_same_weights(
    head: Any, experiment: Experiment, tmp_path: Path
) -> None:
    for name in ("hybrid", "jobs"):
        shutil.copytree(ROOT / name, tmp_path / "package" / name)
    init = tmp_path / "package/hybrid/__init__.py"
    init.write_text(re.sub(r'__version__ = ".*"', '__version__ = "0.travelled"', init.read_text()))
    config = experiment("client")
    command = list(head.job("pretrain.py", config))
    command[1] = str(tmp_path / "package/jobs/pretrain.py")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = head.run(
        *command, cwd=elsewhere, RAY_ADDRESS=head.address, PYTHONPATH=str(tmp_path / "package")
    )
    assert done.code == 0, done.out + done.err
    progress = [line for line in done.err.splitlines() if re.match(r"step \d/8 ", line)]
    assert done.err.splitlines() == progress  # a slow machine prints some
    folder = config.run_folder / "checkpoints/step_00000008"
    assert json.loads((folder / "state.json").read_text())["versions"]["arc-hybrid"] == (
        "0.travelled"
    )
    assert_close(local(experiment, "alone-client"), folder, 0, 0)
    assert not list(elsewhere.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "DASHBOARD", "127.0.0.1:9", "nobody"])
def test_address_without_a_cluster_fails_quickly_with_one_line(
    head: Any, experiment: Experiment, address: str
) -> None:
    address = head.dashboard if address == "DASHBOARD" else address
    command = head.job("pretrain.py", experiment("nowhere"))
    done = head.run(*command, RAY_ADDRESS=address, timeout=90)
    print(f"RAY_ADDRESS={address}: {done.seconds:.1f} s")
    assert done.code == 2, done.out + done.err
    assert done.err.startswith(f"error: RAY_ADDRESS={address}: ")
    assert len(done.err.splitlines()) == 1 and not done.out
    assert done.seconds < 60


@pytest.mark.slow
def test_submitted_jobs_train_and_evaluate_a_hybrid(
    client: Any, submit: Callable[..., Done], experiment: Experiment
) -> None:
    keys: dict[str, Any] = {
        "llama": {"model": "tiny-random"},
        "adapter": {"hidden": 16, "prefix_tokens": 2},
        "training": {"steps": 3, "variants": 2, "max_attempts": 2},
        "evaluation": {"limit": 4},
    }
    config = experiment("hybrid", **keys)
    assert submit("joint", "joint.py", config).code == 0
    assert output_of(client, "joint")[-1].startswith("step 3: ")
    local_config = experiment("hybrid-alone", **keys, cluster={"num_workers": 0})
    trained = joint(local_config).checkpoint
    assert_close(trained, config.run_folder / "checkpoints/step_00000003", 0, 0)

    assert submit("evaluate", "evaluate.py", config, "cluster.num_workers=2").code == 0
    lines = output_of(client, "evaluate")
    assert lines[-1].endswith("report.html") and "4/4" in " ".join(lines)
    [folder] = (config.run_folder / "evaluation").iterdir()
    expected = evaluate(local_config)
    assert predictions(folder) == predictions(expected.folder)
    scores = json.loads((folder / "results.json").read_text())["scores"]
    assert scores == json.loads((expected.folder / "results.json").read_text())["scores"]
    assert read(trained).state["kind"] == "hybrid"


PRINT_LISTENERS = """
import os, psutil
from hybrid.cluster.runtime import start_local
start_local(1)
processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
connections = [c for p in processes for c in p.net_connections("inet")]
print(*sorted({c.laddr.ip for c in connections if c.status == "LISTEN"}))
"""


def test_local_cluster_listens_on_the_loopback_only(shell: Any) -> None:
    """Any client that reaches a Ray port can run code."""
    env = {k: v for k, v in shell.env.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", PRINT_LISTENERS], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, done.stdout
