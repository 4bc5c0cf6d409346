"""Exceptions for invalid user input and for stopping, and checks shared by all packages."""

from __future__ import annotations

import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Invalid user input, in one line that names file, key or task. Jobs exit with code 2."""

    def __init__(self, message: str) -> None:
        # Quoted user input may contain line breaks.
        super().__init__(" ".join(message.splitlines()))


class CollectiveUserError(UserError):
    """A UserError that all training workers raise together, so that none waits for another."""


class Stopped(BaseException):
    """A job stopped on request; the same command resumes it. Exit code 1.

    A BaseException like KeyboardInterrupt, so that libraries do not handle it as an error.
    """


def make_folder(path: Path) -> None:
    """Create a folder and its parents; raise UserError if that fails or it is not writable."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot create this folder ({error})") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{path}: this folder is not writable")


def check_fields(config: Any, **limits: tuple[float | None, float | None]) -> list[str]:
    """Return one line for each numeric field outside its inclusive `(low, high)` limits.

    A limit of None allows any finite number; fields whose value is None are not checked. Lines
    start with the field's name, so that `hybrid.config` can prepend the section.
    """
    problems = []
    known = {field.name for field in fields(config)}
    for name, (low, high) in limits.items():
        assert name in known, f"{type(config).__name__} has no field {name}"
        value = getattr(config, name)
        if value is None:
            continue
        # Negated comparisons, so that NaN, which compares false with everything, is rejected.
        if low is not None and not value >= low:
            problems.append(f"{name} must be at least {low:g}, got {value!r}")
        elif not value <= (high if high is not None else sys.float_info.max):
            limit = "finite" if high is None else f"at most {high:g}"
            problems.append(f"{name} must be {limit}, got {value!r}")
    return problems
