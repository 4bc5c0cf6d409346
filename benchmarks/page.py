"""Copies the tables from benchmarks/results/ into docs/performance.md.

    python -m benchmarks.page

A table is placed between the comment with its benchmark's name and the next `end` comment.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.measure import RESULTS, markdown

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BLOCK = re.compile(r"<!-- (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def filled(text: str) -> str:
    """Return the page with the current tables of benchmarks/results/."""
    return BLOCK.sub(lambda block: _table(block[1]), text)


def _table(name: str) -> str:
    report = json.loads((RESULTS / f"{name}.json").read_text())
    about = f"{report['date']}, commit {report['commit']}, {report['threads']} threads"
    processor = report["gpu" if name.endswith("-cuda") else "processor"]
    caption = f"{about}, torch {report['torch']}, {processor}"
    return f"<!-- {name} -->\n{markdown(report['found'])}\n\n*{caption}*\n<!-- end -->"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
