"""Real local clusters for all tests marked `ray`, and a tiny experiment on real ARC tasks."""

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
"""The command `ray`, which else refuses a second node where all listen on the loopback alone."""


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A cluster in this process. A module has this one or `start_cluster`, never both: two at a
    time on a machine disturb each other.
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
    """experiment(run, section={key: value}) -> a tiny config on the prepared tasks."""
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
def many_views(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """Configs on the same tasks with many variants, whose answers take a while."""
    root = tmp_path_factory.mktemp("views")

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
def solved(alone: Shell, many_views: Callable[..., Config]) -> Path:
    """An evaluation of these that nobody disturbs: its folder, in that of the run it asks."""
    config = many_views("calm")
    alone.here("pretrain.py", config)
    done = alone.here("evaluate.py", config)
    print(f"evaluation undisturbed, one process: {done.seconds:.1f} s")
    [folder] = (config.run_folder / "evaluation").iterdir()
    return folder


class Node:
    """A node of a cluster: `ray start` and all that it has started."""

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
            me = psutil.Process(self.process.pid)
            return [me, *me.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """As if the machine were switched off."""
        for process in self.processes():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


class Shell:
    """Runs commands as users do, in an environment that knows of no cluster."""

    def __init__(self, env: dict[str, str]) -> None:
        self.folder = tempfile.mkdtemp(prefix="arc")  # short: sockets are in it
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin stand still on a busy machine
            **env,
        }

    def run(self, *command: str, cwd: Path = ROOT, timeout: float = 300, **env: str) -> Done:
        """A command, its output and its time."""
        started = time.monotonic()
        done = subprocess.run(
            command, cwd=cwd, env=self.env | env, capture_output=True, text=True, timeout=timeout
        )
        return Done(done.returncode, done.stdout, done.stderr, time.monotonic() - started)

    def spawn(self, *command: str, cwd: Path = ROOT, **env: str) -> subprocess.Popen[str]:
        """The same in the background."""
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def here(self, script: str, config: Config, *overrides: str) -> Done:
        """A job in one process, without a cluster; fails if it fails."""
        command = self.job(script, config, *overrides, "cluster.num_workers=0")
        done = self.run(*command)
        assert done.code == 0, done.out + done.err
        return done

    def job(self, script: str, config: Config, *overrides: str) -> tuple[str, ...]:
        """A job of ours as a plain client runs it, with RAY_ADDRESS=self.address."""
        file = Path(self.folder) / f"{config.logging.run}.yaml"
        file.write_text(dump(config))
        return (sys.executable, str(ROOT / "jobs" / script), "--config", str(file), *overrides)


class Cluster(Shell):
    """Nodes on the loopback, which a test talks to from outside."""

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
        """One more node; `prefix`: a command that runs its command."""
        arguments = f"--address={self.address}", f"--num-cpus={cpus:g}"
        return self._start(*arguments, prefix=prefix, **env)

    def _start(self, *arguments: str, prefix: tuple[str, ...] = (), **env: str) -> Node:
        before = self.names()
        node = Node(*arguments, prefix=prefix, env=self.env | env)
        self.nodes.append(node)
        wait_for(lambda: node.process.poll() or self.names() - before, 90, "a node")
        assert node.process.poll() is None, "a node does not start"
        return node

    def names(self) -> set[str]:
        return {node.node_id for node in self.alive()}

    def alive(self) -> list[Any]:
        """What the state API says of the nodes."""
        from ray.util.state import list_nodes

        try:
            # Filtered here: asked to filter, Ray fails once a node is dead.
            return [node for node in list_nodes(self.dashboard) if node.state == "ALIVE"]
        except Exception:  # not up yet
            return []

    def pids(self, actor: str, node: str | None = None) -> list[int]:
        """Processes of the living actors of a class."""
        from ray.util.state import list_actors

        filters = [("class_name", "=", actor), ("state", "=", "ALIVE")]
        return [
            a.pid
            for a in list_actors(self.dashboard, filters=filters)
            if a.pid and node in (None, a.node_id)
        ]

    def gauges(self) -> dict[str, float]:
        """What the nodes tell Prometheus of our runs: name{run} -> value."""
        found = {}
        for node in self.nodes:
            with urlopen(f"http://127.0.0.1:{node.metrics}/metrics", timeout=5) as page:
                text = page.read().decode()
            for name, tags, value in re.findall(
                r"^ray_(arc_hybrid_\w+)\{(.*)\} (\S+)$", text, re.M
            ):
                [run] = re.findall(r'\brun="(.*?)"', tags)
                found[f"{name}{{{run}}}"] = float(value)
        return found

    def stop(self) -> None:
        for node in reversed(self.nodes):
            if node.process.poll() is None:
                node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class Done:
    """A command that has ended."""

    def __init__(self, code: int, out: str, err: str, seconds: float) -> None:
        self.code, self.out, self.err, self.seconds = code, out, err, seconds


@pytest.fixture(scope="module")
def start_cluster() -> Iterator[Callable[..., Cluster]]:
    """start_cluster(cpus of the head, NAME=environment of all nodes) -> a cluster of its own."""
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
def alone() -> Iterator[Shell]:
    """Commands without a cluster: jobs start their own."""
    shell = Shell({})
    yield shell
    shutil.rmtree(shell.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """until(condition, seconds, what): wait for something, fail if it does not come."""
    return wait_for


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)
