"""Folders that lie in an object store, and their copies on this machine.

A place is a path or a URI that pyarrow knows (`s3://bucket/arc?region=eu-west-1`, `gs://...`). What
is at a URI is worked on in a copy under `$ARC_HYBRID_CACHE` (~/.cache/arc-hybrid): everybody opens,
writes and renames plain files. `download` brings a file before it is read, `upload` sends one when
it is finished. Of a path that is no copy of anything they do nothing: all nodes see it as it is.

A store shows a file whole or not at all; of several files the one that names the others is
published last.
"""

from __future__ import annotations

import os
import shutil
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, unquote
from uuid import uuid4

import pyarrow as pa
from pyarrow import fs

from hybrid.errors import UserError, make_folder


def is_uri(place: str) -> bool:
    """Whether a place is in a store and not in a file system of this machine."""
    return "://" in place


def join(place: str, *names: str) -> str:
    """A place inside another; what follows `?` in a URI stays behind."""
    if not is_uri(place):
        return "/".join((place.rstrip("/") or place, *names))
    path, mark, options = place.partition("?")
    return "/".join((path.rstrip("/"), *map(quote, names))) + mark + options


def folder(place: str) -> Path:
    """Where a place is worked on: itself, or its copy on this machine."""
    return _cache() / quote(place, safe="") if is_uri(place) else Path(place)


def child(place: str) -> Path:
    """Like `folder`, as part of the copy of the place that holds it."""
    if not is_uri(place):
        return Path(place)
    path, mark, options = place.partition("?")
    holder, _, name = path.rpartition("/")
    return folder(holder + mark + options) / unquote(name)


def uri(path: Path) -> str:
    """The reverse of `folder`, for files in it as well: what another machine can find."""
    inside = _inside(path)
    return join(unquote(inside[0]), *inside[1:]) if inside else str(path)


def is_cached(path: Path) -> bool:
    """Whether a path is here only as the copy of something in a store."""
    return _inside(path) is not None


def download(path: Path) -> None:
    """Bring a file's copy up to date; where the store has none there is none here afterwards."""
    found = _home(path)
    if not found:
        return
    store, name = found
    with _as_user_error(path):
        if store.get_file_info(name).type != fs.FileType.File:
            path.unlink(missing_ok=True)
            return
        make_folder(path.parent)
        partial = path.with_name(f".{path.name}.{uuid4().hex}")
        try:
            fs.copy_files(name, str(partial), source_filesystem=store)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def upload(path: Path, source: Path | None = None) -> None:
    """Send a finished file to the store; `source`: the file that is to be there as `path`."""
    found = _home(path)
    if found:
        store, name = found
        with _as_user_error(path):
            store.create_dir(os.path.dirname(name), recursive=True)
            fs.copy_files(
                str(source or path),
                name,
                source_filesystem=fs.LocalFileSystem(),
                destination_filesystem=store,
            )


def write(path: Path, data: str | bytes) -> None:
    """Write a file atomically (temporary file, then `os.replace`) and upload it.

    Text is encoded as UTF-8. The parent folder must exist.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    upload(path)


def names(path: Path) -> list[str]:
    """What is in a folder, sorted; nothing where there is none."""
    found = _home(path)
    if not found:
        return sorted(os.listdir(path)) if path.is_dir() else []
    store, name = found
    with _as_user_error(path):
        inside = store.get_file_info(fs.FileSelector(name, allow_not_found=True))
    return sorted(info.base_name for info in inside)


def exists(path: Path) -> bool:
    """Whether a file or a folder with something in it is there."""
    found = _home(path)
    if not found:
        return path.exists()
    store, name = found
    with _as_user_error(path):
        return bool(store.get_file_info(name).type != fs.FileType.NotFound)


def modified(path: Path) -> float:
    """When a file that is there was last written, in seconds; of a copy, when the original was."""
    found = _home(path)
    if not found:
        return path.stat().st_mtime
    store, name = found
    with _as_user_error(path):
        return float(store.get_file_info(name).mtime_ns) / 1e9


def remove(path: Path) -> None:
    """Take away a file or a folder, copy and original; it need not be there."""
    found = _home(path)
    if found and exists(path):
        store, name = found
        with _as_user_error(path):
            is_file = store.get_file_info(name).type == fs.FileType.File
            (store.delete_file if is_file else store.delete_dir)(name)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.unlink()


def read(path: Path) -> bytes | None:
    """What a file holds in the store, its copy left alone; None where there is none."""
    found = _home(path)
    if not found:
        return path.read_bytes() if path.is_file() else None
    store, name = found
    with _as_user_error(path):
        if store.get_file_info(name).type != fs.FileType.File:
            return None
        with store.open_input_stream(name) as stream:
            return bytes(stream.read())


def filesystem(path: Path) -> tuple[fs.FileSystem | None, str]:
    """For libraries that write to stores themselves: pyarrow's file system and the name in it."""
    return _home(path) or (None, str(path))


def _cache() -> Path:
    place = os.environ.get("ARC_HYBRID_CACHE") or "~/.cache/arc-hybrid"
    return Path(place).expanduser().absolute()


def _inside(path: Path) -> tuple[str, ...] | None:
    """The quoted URI that a path is under and the names below it; None if it is no copy."""
    try:
        parts = path.relative_to(_cache()).parts
    except ValueError:
        return None
    return parts if parts and is_uri(unquote(parts[0])) else None


def _home(path: Path) -> tuple[fs.FileSystem, str] | None:
    inside = _inside(path)
    if not inside:
        return None
    store, name = _open(unquote(inside[0]))
    return store, "/".join((name, *inside[1:]))


@lru_cache(maxsize=16)
def _open(uri: str) -> tuple[fs.FileSystem, str]:
    try:
        store, name = fs.FileSystem.from_uri(uri)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise UserError(f"{uri}: no file system that pyarrow knows ({error})") from error
    return store, name.rstrip("/")


class _as_user_error:
    """What a store complains of is the user's to know, in one line that names the place."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, UserError):
            raise UserError(f"{uri(self.path)}: {error}") from error
