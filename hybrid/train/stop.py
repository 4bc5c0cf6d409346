"""Ending a run early without losing a step: a file named `stop` in the run folder asks for it.

Whoever sees the run folder can ask: a signal to the job's process does, and so does a hand.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hybrid import storage
from hybrid.context import Signal
from hybrid.errors import UserError

log = logging.getLogger(__name__)

STOP = "stop"
LOOK_EVERY_S = 0.2
LOOK_EVERY_S_IN_A_STORE = 2.0


class StopFile:
    """Looks for the file, not too often."""

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / STOP
        self.every = LOOK_EVERY_S_IN_A_STORE if storage.is_cached(self.path) else LOOK_EVERY_S
        self.next = 0.0

    def signal(self) -> Signal:
        """STOP if the file is there."""
        now = time.monotonic()
        if now < self.next:
            return Signal.NONE
        self.next = now + self.every
        try:
            return Signal.STOP if storage.exists(self.path) else Signal.NONE
        except UserError as error:  # a store that is away for a moment ends nothing
            log.warning("%s", error)
            return Signal.NONE


@contextmanager
def stoppable(run_folder: Path) -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C ask the run to save and end; again, they end it at once."""
    path = run_folder / STOP
    storage.remove(path)

    def ask(number: int, frame: FrameType | None) -> None:
        signal.signal(number, before[number])
        print(f"{signal.Signals(number).name}: saving a checkpoint, then stopping", file=sys.stderr)
        # Not in the handler: what it has interrupted may hold a lock of the file system's library.
        threading.Thread(target=_write, args=(path,)).start()

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are not ours here
        return
    # What is ignored stays so: a job in the background is not meant by Ctrl-C.
    heard = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) != signal.SIG_IGN]
    before: dict[int, Any] = {number: signal.signal(number, ask) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        storage.remove(path)


def _write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    storage.upload(path)
