"""Nested mappings against nested dataclasses: every problem at once, by its dotted path."""

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
    """Refuses a key written twice, of which YAML would take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"{key.value} is there twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The document in `text`; ValueError, in one line, for what is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except Exception as error:  # PyYAML raises half a dozen unrelated types for a bad scalar
        raise ValueError(" ".join(str(error).split())) from error


def _section_type(hint: Any) -> Any:
    return hint if is_dataclass(hint) else None


def unknown_keys(
    cls: Any, raw: Any, derived: Mapping[str, str], renamed: Mapping[str, str], prefix: str = ""
) -> list[str]:
    """Return a line for each unknown key, misplaced section, and bool where a number belongs.

    Pydantic would accept such a bool as a number. `derived`: dotted keys of `cls` that may not be
    set, and what decides them. `renamed`: dotted keys of earlier versions and their names now.
    """
    if raw is None:
        return []
    if not isinstance(raw, Mapping):
        return [f"{prefix.rstrip('.')}: must be a section of keys, got {short_repr(raw)}"]
    hints = typing.get_type_hints(cls)
    known = [name for name in hints if f"{prefix}{name}" not in derived]
    found = []
    for key, value in raw.items():
        dotted = f"{prefix}{key}"
        if dotted in derived:
            found.append(f"{dotted}: follows from {derived[dotted]} and cannot be set")
        elif dotted in renamed:
            found.append(f"{dotted}: renamed, use {renamed[dotted]}")
        elif key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
            found.append(f"{dotted}: unknown key, {hint}")
        elif _section_type(hints[key]):
            found += unknown_keys(hints[key], value, derived, renamed, f"{dotted}.")
        elif isinstance(value, bool) and hints[key] not in (bool, bool | None):
            found.append(f"{dotted}: must not be a truth value, got {value}")
    return found


def known_only(cls: Any, raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` without what `unknown_keys` complained of, so that the other errors show as well."""
    hints = typing.get_type_hints(cls)
    kept: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in hints:
            continue
        section = _section_type(hints[key])
        if section is None:
            kept[key] = value
        elif isinstance(value, Mapping):
            kept[key] = known_only(section, value)
    return kept


@cache
def adapter(cls: Any) -> TypeAdapter[Any]:
    """Pydantic's validator of a dataclass; making one takes milliseconds."""
    return TypeAdapter(cls)


def wrong_values(cls: Any, values: Mapping[str, Any]) -> list[str]:
    """Every value of a wrong type, and every one out of range."""
    try:
        adapter(cls).validate_python(values)
    except ValidationError as error:
        details = error.errors()
    else:
        return []
    found = [line for detail in details for line in _explain(detail)]
    mistyped = {detail["loc"][:2] for detail in details if detail["type"] != "value_error"}
    if not mistyped:
        return found
    # A section checks ranges only when all its types are right: ask again without the wrong ones,
    # and pass over what is now said about these.
    rest = {
        section: {key: value for key, value in of.items() if (section, key) not in mistyped}
        for section, of in values.items()
    }
    for line in wrong_values(cls, rest):
        section, *words = re.findall(r"\w+", line)
        if line not in found and not any((section, word) in mistyped for word in words):
            found.append(line)
    return found


def _explain(detail: Mapping[str, Any]) -> list[str]:
    place = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "value_error":
        # A section's __post_init__: one problem a line, each beginning with the key's name.
        return [f"{place}.{line}" for line in str(detail["ctx"]["error"]).splitlines()]
    message = detail["msg"].lower().replace("tuple", "list")
    return [f"{place}: {message}, got {short_repr(detail['input'])}"]
