"""Texts are plain technical English: docstrings, comments, messages, README and documents."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = sorted(p for d in ("hybrid", "jobs", "tune", "benchmarks") for p in (ROOT / d).rglob("*.py"))
PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")]
PAGES += [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "log.md"]
FIRST_WORDS = re.compile(r"(What|Of|In|So|And|By|Nobody|Nothing|Beside)\b")
IDIOM = re.compile(r"\b(nobody|whoever|so many|goes on|stands|lies)\b", re.IGNORECASE)
EARLIER = "### Earlier entries"
"""Heading in CHANGELOG.md whose entries keep their text."""


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of every string literal, docstrings and parts of f-strings included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of docstrings, those of fields and constants included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.lineno, str(node.value.value)


def comments(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of every comment."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def test_docstrings_start_with_a_verb_or_a_noun() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in CODE
        for line, text in docstrings(path)
        if FIRST_WORDS.match(text)
    ]
    assert found == []


def test_texts_avoid_the_private_idiom() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {match[0]}"
        for path in CODE
        for line, text in (*strings(path), *comments(path))
        for match in IDIOM.finditer(text)
    ]
    for path in PAGES:
        text = path.read_text().split(EARLIER)[0]
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in IDIOM.finditer(text)]
    assert found == []
