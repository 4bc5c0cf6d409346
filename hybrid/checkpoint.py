"""Checkpoint folders: written at once or not at all, and never trusted unread.

    step_00000100/
        *.safetensors   tensors; one file per concern and, for the carry, per worker
        config.yaml     the resolved config
        state.json      plain values, and size and SHA-256 of every other file

A folder is written as `step_00000100.partial` and renamed when `state.json` stands. Nothing is ever
unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hybrid.errors import UserError

log = logging.getLogger(__name__)

STATE = "state.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint folder whose files are the ones that were written."""

    folder: Path
    state: dict[str, Any]

    @property
    def digest(self) -> str:
        """Identifies the content: SHA-256 of state.json, which holds those of all other files."""
        return hashlib.sha256((self.folder / STATE).read_bytes()).hexdigest()

    def files(self, prefix: str) -> list[Path]:
        """The tensor files whose name starts with `prefix`, in order."""
        return sorted(self.folder.glob(f"{prefix}*.safetensors"))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All tensors of `name`.safetensors, on the CPU."""
        with safe_open(self.folder / f"{name}.safetensors", "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def write_tensors(partial: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """One worker's part of a checkpoint: `name`.safetensors in the folder being written."""
    partial.mkdir(parents=True, exist_ok=True)
    plain = {key: value.detach().contiguous().cpu() for key, value in tensors.items()}
    save_file(plain, partial / f"{name}.safetensors")


def seal(partial: Path, folder: Path, state: Mapping[str, Any], texts: Mapping[str, str]) -> None:
    """Finish a checkpoint: add `texts`, then state.json, then rename; one worker calls this."""
    for name, text in texts.items():
        (partial / name).write_text(text)
    files = {path.name: _fingerprint(path) for path in sorted(partial.iterdir())}
    body = json.dumps({"format": FORMAT, **state, "files": files}, indent=1)
    (partial / STATE).write_text(body)
    for path in partial.iterdir():
        _sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    _sync(folder.parent)


def read(folder: str | Path) -> Checkpoint:
    """The checkpoint in `folder`; UserError if it is missing, incomplete or was changed."""
    folder = Path(folder)
    try:
        state = json.loads((folder / STATE).read_text())
    except FileNotFoundError:
        raise UserError(f"{folder}: no checkpoint here ({STATE} is missing)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / STATE}: cannot be read ({error})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or "files" not in state:
        raise UserError(f"{folder / STATE}: not a checkpoint of format {FORMAT}")
    for name, expected in state["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing")
        if _fingerprint(path) != expected:
            raise UserError(f"{path}: damaged (not the file that was written)")
        if path.suffix == ".safetensors":
            _check_header(path)
    return Checkpoint(folder=folder, state=state)


def newest(checkpoints: Path) -> Checkpoint | None:
    """The newest whole checkpoint in a folder of them; damaged ones are passed over and logged."""
    for folder in sorted(checkpoints.glob("step_*[0-9]"), reverse=True):
        try:
            return read(folder)
        except UserError as error:
            log.warning("checkpoint passed over: %s", error)
    return None


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what killed runs left half written."""
    folders = sorted(checkpoints.glob("step_*[0-9]"))
    for folder in (*folders[:-keep], *checkpoints.glob("step_*.partial")):
        shutil.rmtree(folder, ignore_errors=True)


def _fingerprint(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _check_header(path: Path) -> None:
    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file ({error})") from error


def _sync(path: Path) -> None:
    """To the disk itself: a rename must not overtake the data it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
