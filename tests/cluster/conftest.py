"""Fixtures for tests marked `ray`: local clusters, and a tiny experiment on real ARC tasks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import pytest
from helpers import free_port

from hybrid.config import Config, dump, from_dict
from hybrid.dataset import prepare

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
RAY = """
import types
from ray.scripts import scripts
known = vars(scripts.ray_constants)
scripts.ray_constants = types.SimpleNamespace(**{**known, "ENABLE_RAY_CLUSTER": True})
scripts.cli()
"""
"""The `ray` command, patched to allow a second node although all listen on the loopback only."""


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A cluster that this process starts. A module uses either this or `start_cluster`, because two
    clusters on one machine disturb each other.
    """
    import ray

    from hybrid.cluster.runtime import start_local

    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"
    start_local(num_cpus=4)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 15 ARC-1 training tasks that fit a 3 x 3 canvas, their tests held out."""
    folder = tmp_path_factory.mktemp("data") / "processed"
    config = make_experiment(folder.parent, "unused")
    prepare(config.data, folder, say=lambda line: None)
    return folder


@pytest.fixture(scope="session")
def experiment(prepared: Path) -> Callable[..., Config]:
    """experiment(run, section={key: value}) returns a tiny config on the prepared tasks."""
    return partial(make_experiment, prepared.parent)


def make_experiment(root: Path, run: str, **sections: dict[str, Any]) -> Config:
    raw: dict[str, dict[str, Any]] = {
        "paths": {"root": str(root), "data": str(root / "processed")},
        "data": {"training": [], "evaluation": ["arc1-training"], "variants": 3, "max_side": 3},
        "trm": {
            "hidden_size": 32,
            "num_heads": 2,
            "expansion": 2,
            "H_cycles": 2,
            "L_cycles": 1,
            "halt_max_steps": 3,
            "puzzle_emb_ndim": 32,
            "puzzle_emb_len": 1,
        },
        "training": {
            "batch_size": 8,
            "steps": 8,
            "save_every": 4,
            "lr": 1e-3,
            "lr_warmup_steps": 2,
            "train_accuracy_pairs": 8,
        },
        "cluster": {"num_workers": 1, "cpus_per_worker": 0.5},
        "logging": {"run": run, "every": 2, "wandb": False},
    }
    for section, keys in sections.items():
        raw.setdefault(section, {}).update(keys)
    return from_dict(raw)


@pytest.fixture(scope="session")
def many_variants(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """Configs on the same tasks with many variants, so that an evaluation takes a while."""
    root = tmp_path_factory.mktemp("variants")

    def make(run: str, **cluster: Any) -> Config:
        return make_experiment(
            root,
            run,
            data={"variants": 300},
            trm={"halt_max_steps": 16},
            training={"steps": 4},
            evaluation={"batch_size": 8},
            cluster=cluster,
        )

    prepare(make("unused").data, root / "processed", say=lambda line: None)
    return make


@pytest.fixture(scope="session")
def evaluated(shell: Shell, many_variants: Callable[..., Config]) -> Path:
    """Folder of an uninterrupted evaluation of `many_variants`, inside the run folder."""
    config = many_variants("calm")
    shell.run_local("pretrain.py", config)
    done = shell.run_local("evaluate.py", config)
    print(f"uninterrupted evaluation, one process: {done.seconds:.1f} s")
    [folder] = (config.run_folder / "evaluation").iterdir()
    return folder


class Node:
    """A cluster node: `ray start` and its child processes."""

    def __init__(self, *arguments: str, prefix: tuple[str, ...], env: dict[str, str]) -> None:
        self.metrics = free_port()
        self.process = subprocess.Popen(
            [
                *prefix,
                *(sys.executable, "-c", RAY, "start", "--block", "--object-store-memory=150000000"),
                f"--dashboard-agent-listen-port={free_port()}",
                f"--metrics-export-port={self.metrics}",
                *arguments,
            ],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def processes(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """Kill all processes, as a power failure would."""
        for process in self.processes():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


class Shell:
    """Runs commands in an environment without a cluster."""

    def __init__(self, env: dict[str, str]) -> None:
        self.folder = tempfile.mkdtemp(prefix="arc")  # short, because socket paths are limited
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads starve on a busy machine
            **env,
        }

    def run(self, *command: str, cwd: Path = ROOT, timeout: float = 300, **env: str) -> Done:
        """Run a command; return its output and duration."""
        started = time.monotonic()
        done = subprocess.run(
            command, cwd=cwd, env=self.env | env, capture_output=True, text=True, timeout=timeout
        )
        return Done(done.returncode, done.stdout, done.stderr, time.monotonic() - started)

    def spawn(self, *command: str, cwd: Path = ROOT, **env: str) -> subprocess.Popen[str]:
        """Start a command in the background."""
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run_local(self, script: str, config: Config, *overrides: str) -> Done:
        """Run a job in one process, without a cluster; assert that it succeeds."""
        command = self.job(script, config, *overrides, "cluster.num_workers=0")
        done = self.run(*command)
        assert done.code == 0, done.out + done.err
        return done

    def job(self, script: str, config: Config, *overrides: str) -> tuple[str, ...]:
        """Return the command line of a job. With RAY_ADDRESS it joins a cluster as a client."""
        file = Path(self.folder) / f"{config.logging.run}.yaml"
        file.write_text(dump(config))
        return (sys.executable, str(ROOT / "jobs" / script), "--config", str(file), *overrides)


class Cluster(Shell):
    """Nodes on the loopback interface, controlled from outside."""

    def __init__(self, cpus: float, env: dict[str, str]) -> None:
        super().__init__(env)
        self.address = f"127.0.0.1:{free_port()}"
        self.dashboard = f"http://127.0.0.1:{free_port()}"
        self.nodes: list[Node] = []
        self._start(
            "--head",
            f"--port={self.address.split(':')[1]}",
            f"--dashboard-port={self.dashboard.split(':')[2]}",
            f"--ray-client-server-port={free_port()}",
            f"--num-cpus={cpus:g}",
            f"--temp-dir={self.folder}",
        )

    def add(self, cpus: float, prefix: tuple[str, ...] = (), **env: str) -> Node:
        """Add a node; `prefix` is a command that wraps `ray start`."""
        arguments = f"--address={self.address}", f"--num-cpus={cpus:g}"
        return self._start(*arguments, prefix=prefix, **env)

    def _start(self, *arguments: str, prefix: tuple[str, ...] = (), **env: str) -> Node:
        before = self.names()
        node = Node(*arguments, prefix=prefix, env=self.env | env)
        self.nodes.append(node)
        wait_for(lambda: node.process.poll() or self.names() - before, 90, "a node")
        assert node.process.poll() is None, "the node did not start"
        return node

    def names(self) -> set[str]:
        return {node.node_id for node in self.alive()}

    def alive(self) -> list[Any]:
        """Return the state API's records of living nodes."""
        from ray.util.state import list_nodes

        try:
            # Filter here, because Ray's own filter fails once a node is dead.
            return [node for node in list_nodes(self.dashboard) if node.state == "ALIVE"]
        except Exception:  # the dashboard is not up yet
            return []

    def pids(self, actor: str, node: str | None = None) -> list[int]:
        """Return the process ids of the living actors of a class."""
        from ray.util.state import list_actors

        filters = [("class_name", "=", actor), ("state", "=", "ALIVE")]
        return [
            a.pid
            for a in list_actors(self.dashboard, filters=filters)
            if a.pid and node in (None, a.node_id)
        ]

    def gauges(self) -> dict[str, float]:
        """Return the gauges that the nodes export to Prometheus: name{run} -> value."""
        gauges = {}
        for node in self.nodes:
            with urlopen(f"http://127.0.0.1:{node.metrics}/metrics", timeout=5) as page:
                text = page.read().decode()
            for name, tags, value in re.findall(
                r"^ray_(arc_hybrid_\w+)\{(.*)\} (\S+)$", text, re.M
            ):
                [run] = re.findall(r'\brun="(.*?)"', tags)
                gauges[f"{name}{{{run}}}"] = float(value)
        return gauges

    def stop(self) -> None:
        for node in reversed(self.nodes):
            if node.process.poll() is None:
                node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class Done:
    """Exit code, output and duration of a command."""

    def __init__(self, code: int, out: str, err: str, seconds: float) -> None:
        self.code, self.out, self.err, self.seconds = code, out, err, seconds


@pytest.fixture(scope="module")
def start_cluster() -> Iterator[Callable[..., Cluster]]:
    """start_cluster(head CPUs, NAME=value for the environment of all nodes) starts a cluster."""
    started: list[Cluster] = []

    def start(cpus: float = 4, **env: str) -> Cluster:
        for cluster in started:
            cluster.stop()
        started.clear()
        started.append(Cluster(cpus, env))
        return started[0]

    yield start
    for cluster in started:
        cluster.stop()


@pytest.fixture(scope="session")
def shell() -> Iterator[Shell]:
    """Runs commands without a cluster; jobs start their own."""
    local = Shell({})
    yield local
    shutil.rmtree(local.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """until(condition, seconds, description) waits for a condition and fails after a timeout."""
    return wait_for


def wait_for(condition: Callable[[], Any], seconds: float, description: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {description}"
        time.sleep(0.1)
