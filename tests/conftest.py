"""What every room's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden() -> Path:
    """Small extracts of what the published code computed; see golden/extract.py."""
    return Path(__file__).parent / "golden"
