"""Checkpoint folders, written atomically and verified by their digests when read.

    step_00000100/
        *.safetensors   tensors; one file per concern and, for the carry, per worker
        config.yaml     the resolved config
        state.json      plain values, size and SHA-256 of every other file, and its own SHA-256

A folder is written as `step_00000100.partial` and renamed once `state.json` is written. Object
stores have no rename, so there `state.json` is uploaded last. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hybrid import storage
from hybrid.errors import UserError

log = logging.getLogger(__name__)

STATE = "state.json"
TRAINED_ON = "trained_on.json"
FORMAT = 2
"""Version 1 predates the renames listed in CHANGELOG.md."""
Fingerprint = list[Any]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint folder whose files match their recorded digests."""

    folder: Path
    state: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of state.json, which contains the digests of all other files."""
        return hashlib.sha256((self.folder / STATE).read_bytes()).hexdigest()

    @property
    def trained_on(self) -> list[str]:
        """Content hashes `input|output` of all pairs that the weights were ever trained on."""
        hashes: list[str] = json.loads((self.folder / TRAINED_ON).read_text())
        return hashes

    @property
    def name(self) -> str:
        """Name of the folder: `step_00000100`."""
        uri = storage.uri(self.folder)
        return (uri.partition("?")[0] if storage.is_uri(uri) else uri).rpartition("/")[2]

    def files(self, prefix: str) -> list[Path]:
        """Return the sorted paths of the tensor files whose name starts with `prefix`."""
        names = [n for n in sorted(self.state["files"]) if n.startswith(prefix)]
        return [self.folder / name for name in names if name.endswith(".safetensors")]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Load all tensors of `name`.safetensors to the CPU."""
        with safe_open(self.folder / f"{name}.safetensors", "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def write_tensors(partial: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write one worker's part of a checkpoint: `name`.safetensors in the partial folder."""
    partial.mkdir(parents=True, exist_ok=True)
    plain = {key: value.detach().contiguous().cpu() for key, value in tensors.items()}
    try:
        save_file(plain, partial / f"{name}.safetensors")
    except SafetensorError as error:  # wraps the OSError
        raise OSError(str(error)) from error


def seal(
    partial: Path,
    folder: Path,
    state: Mapping[str, Any],
    texts: Mapping[str, str],
    parts: Mapping[str, Fingerprint] | None = None,
) -> None:
    """Complete a checkpoint: write `texts` and state.json, then rename; call on rank 0 only.

    `parts`: files that other workers have written and, if in a store, uploaded.
    """
    for name, text in texts.items():
        (partial / name).write_text(text)
    local = [path.name for path in sorted(partial.iterdir()) if path.name not in (parts or {})]
    files = {name: fingerprint(partial / name) for name in local} | dict(parts or {})
    sealed = {"format": FORMAT, **state, "files": dict(sorted(files.items()))}
    (partial / STATE).write_text(json.dumps({**sealed, "sha256": _checksum(sealed)}, indent=1))
    for path in (*partial.iterdir(), partial):
        _sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    _sync(folder.parent)
    for name in (*local, STATE):
        storage.upload(folder / name)


def read(folder: str | Path, *, verified: bool = False) -> Checkpoint:
    """Load the checkpoint in `folder`; raise UserError if it is missing, incomplete or damaged.

    `verified`: skip the digests of local files, because another process has just checked them.
    """
    folder = Path(folder)
    where = storage.uri(folder / STATE)
    storage.download(folder / STATE)
    try:
        state = json.loads((folder / STATE).read_text())
    except FileNotFoundError:
        raise UserError(f"{storage.uri(folder)}: no checkpoint here ({STATE} is missing)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read ({error})") from error
    if not isinstance(state, dict) or "files" not in state:
        raise UserError(f"{where}: not a checkpoint of format {FORMAT}")
    if state.get("format") != FORMAT:
        raise UserError(
            f"{where}: checkpoint format {state.get('format')}, but this version reads format"
            f" {FORMAT}; train again or use the version that wrote it"
        )
    if state.pop("sha256", None) != _checksum(state):
        raise UserError(f"{where}: damaged (SHA-256 differs)")
    trusted = verified and not storage.is_cached(folder)
    for name, expected in () if trusted else state["files"].items():
        path = folder / name
        intact = _matches(path, expected)
        if not intact and storage.is_cached(path):
            storage.download(path)
            intact = _matches(path, expected)
        if not path.is_file():
            raise UserError(f"{storage.uri(path)}: missing")
        if not intact:
            raise UserError(f"{storage.uri(path)}: damaged (size or SHA-256 differs)")
        if path.suffix == ".safetensors":
            _check_header(path)
    return Checkpoint(folder=folder, state=state)


def newest(checkpoints: Path) -> Checkpoint | None:
    """Load the newest intact checkpoint in a folder; log and skip damaged ones.

    Return None if there is no checkpoint; raise UserError if all are damaged. Incomplete uploads
    of killed runs do not count as checkpoints.
    """
    damaged: list[UserError] = []
    for name in reversed(_steps(checkpoints)):
        if _is_partial_upload(checkpoints / name):
            log.warning("checkpoint skipped: %s is incomplete", storage.uri(checkpoints / name))
            continue
        try:
            checkpoint = read(checkpoints / name)
        except UserError as error:
            damaged.append(error)
            continue
        for problem in damaged:
            log.warning("checkpoint skipped: %s", problem)
        return checkpoint
    if damaged:
        raise damaged[0]
    return None


def prune(written: Path, keep: int) -> None:
    """Keep the checkpoint just written and the `keep` - 1 before it; delete all others.

    Later ones are damaged, or the run would have resumed from them. Partial checkpoints of killed
    runs are deleted too.
    """
    names = _steps(written.parent)
    kept = [name for name in names if name <= written.name][-keep:]
    for name in names:
        if name not in kept:
            storage.remove(written.parent / name)
    for folder in written.parent.glob("step_*"):  # also partial and stale local ones
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def _steps(checkpoints: Path) -> list[str]:
    """Return the names of checkpoint folders, oldest first."""
    return [name for name in storage.names(checkpoints) if re.fullmatch(r"step_\d+", name)]


def _is_partial_upload(folder: Path) -> bool:
    """Return whether a checkpoint in a store lacks STATE, the last file to be uploaded."""
    return storage.is_cached(folder) and not storage.exists(folder / STATE)


def _checksum(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def fingerprint(path: Path) -> Fingerprint:
    """Return the size in bytes and the SHA-256 of a file."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _matches(path: Path, expected: Fingerprint) -> bool:
    return path.is_file() and fingerprint(path) == expected


def _check_header(path: Path) -> None:
    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file ({error})") from error


def _sync(path: Path) -> None:
    """Flush to disk, because a rename must not overtake the data."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
