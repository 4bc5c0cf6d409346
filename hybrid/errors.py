"""The one exception that means "the user's input is wrong", and range checks for configs."""

from __future__ import annotations

from dataclasses import fields
from typing import Any


class UserError(Exception):
    """Wrong input from outside: one line that names the place. Mains turn it into exit code 2."""


def check_fields(config: Any, **limits: tuple[float | None, float | None]) -> list[str]:
    """Problems of numeric fields outside their inclusive `(low, high)` limits, one line each.

    A None limit is open; a field whose value is None is not checked. Lines start with the field's
    name, so that `hybrid.config` can put the section in front of it.
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
        elif high is not None and not value <= high:
            problems.append(f"{name} must be at most {high:g}, got {value!r}")
    return problems
