"""Stop a run early without losing a step.

A file named `stop` in the run folder requests it. SIGTERM or Ctrl-C to the job creates the file, or
the user does.
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
POLL_EVERY_S = 0.2
POLL_STORE_EVERY_S = 2.0


class StopFile:
    """Poll for the stop file at a limited rate."""

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / STOP
        self.every = POLL_STORE_EVERY_S if storage.is_cached(self.path) else POLL_EVERY_S
        self.next = 0.0

    def signal(self) -> Signal:
        """Return STOP if the file exists."""
        now = time.monotonic()
        if now < self.next:
            return Signal.NONE
        self.next = now + self.every
        try:
            return Signal.STOP if storage.exists(self.path) else Signal.NONE
        except UserError as error:  # an unreachable store must not end the run
            log.warning("%s", error)
            return Signal.NONE


@contextmanager
def stop_on_signals(run_folder: Path) -> Iterator[None]:
    """Make SIGTERM and Ctrl-C request a stop; a second signal ends the process at once.

    Removes the stop file of an earlier run first.
    """
    path = run_folder / STOP
    storage.remove(path)

    def request_stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, previous[number])
        print(f"{signal.Signals(number).name}: saving a checkpoint, then stopping", file=sys.stderr)
        # In a thread: the code that the handler interrupted may hold a lock of the file system.
        threading.Thread(target=_write, args=(path,)).start()

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can set signal handlers
        return
    # Ignored signals stay ignored: Ctrl-C must not stop a job in the background.
    handled = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) != signal.SIG_IGN]
    previous: dict[int, Any] = {number: signal.signal(number, request_stop) for number in handled}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        storage.remove(path)


def _write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    storage.upload(path)
