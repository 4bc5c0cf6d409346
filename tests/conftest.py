"""Fixtures shared by all tests."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EVALUATED, TRAINED, config_of, object_store, write_tasks

from hybrid.arc import Task, load_tasks
from hybrid.config import Config

HERE = Path(__file__).parent
# A GPU machine without Ray runs `pytest -m gpu`; the other tests import missing packages.
collect_ignore = [
    path.name
    for path in HERE.iterdir()
    if find_spec("ray") is None and path.name not in ("conftest.py", "gpu")
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Accept the `timeout` setting if pytest-timeout is not installed."""
    if find_spec("pytest_timeout") is None:
        parser.addini("timeout", "seconds that a test may take")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Use one thread, because the order of summation depends on the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of reference values computed by the published code; see golden/extract.py."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def arc1() -> dict[str, Task]:
    """All tasks of ARC-AGI-1 by id."""
    sources = ("arc1-training", "arc1-evaluation")
    return {task.id: task for source in sources for task in load_tasks(source)}


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], str]]:
    """bucket() -> the URI of a new bucket on a local S3 server; its keys are STORE_KEYS."""
    with object_store(tmp_path_factory.mktemp("moto") / "log") as new:
        yield new


@pytest.fixture
def configure(tmp_path: Path, arc1: dict[str, Task]) -> Callable[..., Config]:
    """configure(section={key: value}) -> a tiny config with task files and no prepared dataset."""
    write_tasks(tmp_path / "training", [arc1[task] for task in TRAINED])
    write_tasks(tmp_path / "evaluation", [arc1[task] for task in EVALUATED])
    return partial(config_of, tmp_path)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., BaseProcess]]:
    """start(function, *args) -> a new process that shares no state with this one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers", "hybrid.evaluate"])
    started: list[BaseProcess] = []

    def start_process(function: Callable[..., Any], *args: Any) -> BaseProcess:
        process: BaseProcess = context.Process(target=function, args=args)
        process.start()
        started.append(process)
        return process

    yield start_process
    for process in started:
        process.kill()
        process.join()
