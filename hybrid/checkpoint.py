"""Checkpoint folders: written at once or not at all, and never trusted unread.

    step_00000100/
        *.safetensors   tensors; one file per concern and, for the carry, per worker
        config.yaml     the resolved config
        state.json      plain values, size and SHA-256 of every other file, and its own SHA-256

A folder is written as `step_00000100.partial` and renamed when `state.json` stands; in a store,
which renames nothing, `state.json` comes last. Nothing is ever unpickled.
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
"""1 was written by versions before the renames of CHANGELOG.md."""
Fingerprint = list[Any]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint folder whose files are the ones that were written."""

    folder: Path
    state: dict[str, Any]

    @property
    def digest(self) -> str:
        """Identifies the content: SHA-256 of state.json, which holds those of all other files."""
        return hashlib.sha256((self.folder / STATE).read_bytes()).hexdigest()

    @property
    def trained_on(self) -> list[str]:
        """Content hashes `input|output` of all pairs that its weights were ever trained on."""
        hashes: list[str] = json.loads((self.folder / TRAINED_ON).read_text())
        return hashes

    @property
    def name(self) -> str:
        """Of its folder: `step_00000100`."""
        place = storage.uri(self.folder)
        return (place.partition("?")[0] if storage.is_uri(place) else place).rpartition("/")[2]

    def files(self, prefix: str) -> list[Path]:
        """The tensor files whose name starts with `prefix`, in order."""
        names = [n for n in sorted(self.state["files"]) if n.startswith(prefix)]
        return [self.folder / name for name in names if name.endswith(".safetensors")]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All tensors of `name`.safetensors, on the CPU."""
        with safe_open(self.folder / f"{name}.safetensors", "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def write_tensors(partial: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """One worker's part of a checkpoint: `name`.safetensors in the folder being written."""
    partial.mkdir(parents=True, exist_ok=True)
    plain = {key: value.detach().contiguous().cpu() for key, value in tensors.items()}
    try:
        save_file(plain, partial / f"{name}.safetensors")
    except SafetensorError as error:  # it wraps the disk's own complaint
        raise OSError(str(error)) from error


def seal(
    partial: Path,
    folder: Path,
    state: Mapping[str, Any],
    texts: Mapping[str, str],
    parts: Mapping[str, Fingerprint] | None = None,
) -> None:
    """Finish a checkpoint: add `texts`, then state.json, then rename; one worker calls this.

    `parts`: files that other workers have written and, to a store, published.
    """
    for name, text in texts.items():
        (partial / name).write_text(text)
    mine = [path.name for path in sorted(partial.iterdir()) if path.name not in (parts or {})]
    files = {name: fingerprint(partial / name) for name in mine} | dict(parts or {})
    sealed = {"format": FORMAT, **state, "files": dict(sorted(files.items()))}
    (partial / STATE).write_text(json.dumps({**sealed, "sha256": _checksum(sealed)}, indent=1))
    for path in (*partial.iterdir(), partial):
        _sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    _sync(folder.parent)
    for name in (*mine, STATE):
        storage.upload(folder / name)


def read(folder: str | Path, *, verified: bool = False) -> Checkpoint:
    """The checkpoint in `folder`; UserError if it is missing, incomplete or was changed.

    `verified`: another process has just read these very files, gigabytes need no second hashing.
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
            f"{where}: a checkpoint of format {state.get('format')}, this version reads format"
            f" {FORMAT}; train again, or use the version that wrote it"
        )
    if state.pop("sha256", None) != _checksum(state):
        raise UserError(f"{where}: damaged (not the file that was written)")
    trusted = verified and not storage.is_cached(folder)
    for name, expected in () if trusted else state["files"].items():
        path = folder / name
        whole = _is(path, expected)
        if not whole and storage.is_cached(path):
            storage.download(path)
            whole = _is(path, expected)
        if not path.is_file():
            raise UserError(f"{storage.uri(path)}: missing")
        if not whole:
            raise UserError(f"{storage.uri(path)}: damaged (not the file that was written)")
        if path.suffix == ".safetensors":
            _check_header(path)
    return Checkpoint(folder=folder, state=state)


def newest(checkpoints: Path) -> Checkpoint | None:
    """The newest whole checkpoint in a folder of them; damaged ones are passed over and logged.

    None where there is no checkpoint; UserError where there are some and all are damaged. One that
    was still on its way to a store when its run was killed counts as none.
    """
    damaged: list[UserError] = []
    for name in reversed(_steps(checkpoints)):
        if _on_its_way(checkpoints / name):
            log.warning("checkpoint passed over: %s is not whole", storage.uri(checkpoints / name))
            continue
        try:
            whole = read(checkpoints / name)
        except UserError as error:
            damaged.append(error)
            continue
        for problem in damaged:
            log.warning("checkpoint passed over: %s", problem)
        return whole
    if damaged:
        raise damaged[0]
    return None


def prune(written: Path, keep: int) -> None:
    """Keep the checkpoint just written and the `keep` - 1 before it; remove the others.

    Later ones are damaged, or the run would have resumed from them. What killed runs left half
    written goes too.
    """
    names = _steps(written.parent)
    kept = [name for name in names if name <= written.name][-keep:]
    for name in names:
        if name not in kept:
            storage.remove(written.parent / name)
    for folder in written.parent.glob("step_*"):  # and here what is left of what is gone
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def _steps(checkpoints: Path) -> list[str]:
    """Names of checkpoint folders, oldest first."""
    return [name for name in storage.names(checkpoints) if re.fullmatch(r"step_\d+", name)]


def _on_its_way(folder: Path) -> bool:
    """On disk a checkpoint appears whole; into a store its files go one by one, STATE last."""
    return storage.is_cached(folder) and not storage.exists(folder / STATE)


def _checksum(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def fingerprint(path: Path) -> Fingerprint:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _is(path: Path, expected: Fingerprint) -> bool:
    return path.is_file() and fingerprint(path) == expected


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
