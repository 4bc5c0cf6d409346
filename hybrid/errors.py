"""The one exception that means "the user's input is wrong", and checks that many rooms share."""

from __future__ import annotations

import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Wrong input from outside: one line that names the place. Mains turn it into exit code 2."""

    def __init__(self, message: str) -> None:
        # What is quoted in it comes from outside and may hold line breaks.
        super().__init__(" ".join(message.splitlines()))


class CollectiveUserError(UserError):
    """One that all training workers raise together: none is left waiting for another."""


class Stopped(BaseException):
    """A job was asked to end and has: nothing is lost, the same command goes on. Exit code 1.

    Like KeyboardInterrupt it is nothing that a library should take for an error of its own.
    """


def make_folder(path: Path) -> None:
    """Make a folder and those above it; UserError if it cannot be made or not be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: this folder cannot be made ({error})") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{path}: this folder cannot be written to")


def check_fields(config: Any, **limits: tuple[float | None, float | None]) -> list[str]:
    """Problems of numeric fields outside their inclusive `(low, high)` limits, one line each.

    A None limit is open, to finite numbers; a field whose value is None is not checked. Lines start
    with the field's name, so that `hybrid.config` can put the section in front of it.
    """
    problems = []
    known = {field.name for field in fields(config)}
    for name, (low, high) in limits.items():
        assert name in known, f"{type(config).__name__} has no field {name}"
        value = getattr(config, name)
        if value is None:
            continue
        # Written as "not inside" so that NaN, which compares false with everything, is refused.
        if low is not None and not value >= low:
            problems.append(f"{name} must be at least {low:g}, got {value!r}")
        elif not value <= (high if high is not None else sys.float_info.max):
            most = "finite" if high is None else f"at most {high:g}"
            problems.append(f"{name} must be {most}, got {value!r}")
    return problems
