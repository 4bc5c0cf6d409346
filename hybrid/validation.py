"""Validation of nested mappings against nested dataclasses: all problems at once, by dotted key."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from reprlib import repr as short_repr
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError


class _Loader(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys, of which YAML silently uses the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"duplicate key {key.value}", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Parse a YAML document; raise ValueError with a one-line message if it is invalid."""
    try:
        return yaml.load(text, Loader=_Loader)
    except Exception as error:  # PyYAML raises half a dozen unrelated types for a bad scalar
        raise ValueError(" ".join(str(error).split())) from error


def _section_type(hint: Any) -> Any:
    return hint if is_dataclass(hint) else None


def unknown_keys(
    cls: Any, raw: Any, derived: Mapping[str, str], renamed: Mapping[str, str], prefix: str = ""
) -> list[str]:
    """Return a line for each unknown key, misplaced section, and bool in place of a number.

    Pydantic would accept such a bool as a number. `derived`: dotted keys of `cls` that may not be
    set, and the source of their values. `renamed`: old dotted keys and their current names.
    """
    if raw is None:
        return []
    if not isinstance(raw, Mapping):
        return [f"{prefix.rstrip('.')}: must be a section of keys, got {short_repr(raw)}"]
    hints = typing.get_type_hints(cls)
    known = [name for name in hints if f"{prefix}{name}" not in derived]
    problems = []
    for key, value in raw.items():
        dotted = f"{prefix}{key}"
        if dotted in derived:
            problems.append(f"{dotted}: derived from {derived[dotted]} and cannot be set")
        elif dotted in renamed:
            problems.append(f"{dotted}: renamed, use {renamed[dotted]}")
        elif key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
            problems.append(f"{dotted}: unknown key, {hint}")
        elif _section_type(hints[key]):
            problems += unknown_keys(hints[key], value, derived, renamed, f"{dotted}.")
        elif isinstance(value, bool) and hints[key] not in (bool, bool | None):
            problems.append(f"{dotted}: must not be a boolean, got {value}")
    return problems


def known_only(cls: Any, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return `raw` without the keys that `unknown_keys` reports, to validate the rest."""
    hints = typing.get_type_hints(cls)
    known: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in hints:
            continue
        section = _section_type(hints[key])
        if section is None:
            known[key] = value
        elif isinstance(value, Mapping):
            known[key] = known_only(section, value)
    return known


@cache
def adapter(cls: Any) -> TypeAdapter[Any]:
    """Return the pydantic validator of a dataclass, cached because building it is slow."""
    return TypeAdapter(cls)


def wrong_values(cls: Any, values: Mapping[str, Any]) -> list[str]:
    """Return a line for each value of a wrong type or out of range."""
    try:
        adapter(cls).validate_python(values)
    except ValidationError as error:
        details = error.errors()
    else:
        return []
    problems = [line for detail in details for line in _explain(detail)]
    mistyped = {detail["loc"][:2] for detail in details if detail["type"] != "value_error"}
    if not mistyped:
        return problems
    # A section checks ranges only if all its types are valid. Validate again without the mistyped
    # keys, and ignore lines about them.
    rest = {
        section: {key: value for key, value in keys.items() if (section, key) not in mistyped}
        for section, keys in values.items()
    }
    for line in wrong_values(cls, rest):
        section, *words = re.findall(r"\w+", line)
        if line not in problems and not any((section, word) in mistyped for word in words):
            problems.append(line)
    return problems


def _explain(detail: Mapping[str, Any]) -> list[str]:
    dotted = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "value_error":
        # From a section's __post_init__: one problem per line, each starting with the key.
        return [f"{dotted}.{line}" for line in str(detail["ctx"]["error"]).splitlines()]
    message = detail["msg"].lower().replace("tuple", "list")
    return [f"{dotted}: {message}, got {short_repr(detail['input'])}"]
