"""The tables of docs/performance.md, from benchmarks/results/.

    python -m benchmarks.page

Writes them into the page, each between the two comments that carry its benchmark's name.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.measure import RESULTS, markdown

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
PLACE = re.compile(r"<!-- (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def filled(text: str) -> str:
    """The page with what benchmarks/results/ has now."""
    return PLACE.sub(lambda place: _table(place[1]), text)


def _table(name: str) -> str:
    report = json.loads((RESULTS / f"{name}.json").read_text())
    about = f"{report['date']}, commit {report['commit']}, {report['threads']} threads"
    processor = report["gpu" if name.endswith("-cuda") else "processor"]
    said = f"{about}, torch {report['torch']}, {processor}"
    return f"<!-- {name} -->\n{markdown(report['found'])}\n\n*{said}*\n<!-- end -->"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
