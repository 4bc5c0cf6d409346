"""Files in object stores, used through local copies.

A location is a path or a URI that pyarrow supports (`s3://bucket/arc?region=eu-west-1`,
`gs://...`). A URI has a copy under `$ARC_HYBRID_CACHE` (~/.cache/arc-hybrid), so that all code
opens, writes and renames plain files. `download` updates the copy before it is read; `upload`
sends a finished file. Both ignore other paths, because all nodes share those.

A store publishes each file atomically, but not several files together: upload the file that lists
the others last.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, unquote
from uuid import uuid4

import pyarrow as pa
from pyarrow import fs

from hybrid.errors import UserError, make_folder


def is_uri(location: str) -> bool:
    """Return whether a location is in an object store rather than a local file system."""
    return "://" in location


def join(location: str, *names: str) -> str:
    """Append names to a location; the options after `?` stay at the end of a URI."""
    if not is_uri(location):
        return "/".join((location.rstrip("/") or location, *names))
    path, mark, options = location.partition("?")
    return "/".join((path.rstrip("/"), *map(quote, names))) + mark + options


def folder(location: str) -> Path:
    """Return the local path of a location: the path itself, or the copy of a URI."""
    return _cache() / quote(location, safe="") if is_uri(location) else Path(location)


def child(location: str) -> Path:
    """Return the local path of a location inside the copy of its parent folder."""
    if not is_uri(location):
        return Path(location)
    path, mark, options = location.partition("?")
    parent, _, name = path.rpartition("/")
    return folder(parent + mark + options) / unquote(name)


def uri(path: Path) -> str:
    """Return the location of a local path, which other nodes can use; the inverse of `folder`."""
    parts = _uri_parts(path)
    return join(unquote(parts[0]), *parts[1:]) if parts else str(path)


def is_cached(path: Path) -> bool:
    """Return whether a path is the local copy of something in a store."""
    return _uri_parts(path) is not None


def download(path: Path) -> None:
    """Update the local copy of a file; delete it if the store has no such file."""
    remote = _remote(path)
    if not remote:
        return
    store, name = remote
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
    """Upload a finished file; `source`: the local file to upload as `path`, if not `path`."""
    remote = _remote(path)
    if remote:
        store, name = remote
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
    """Return the sorted names in a folder; none if the folder does not exist."""
    remote = _remote(path)
    if not remote:
        return sorted(os.listdir(path)) if path.is_dir() else []
    store, name = remote
    with _as_user_error(path):
        infos = store.get_file_info(fs.FileSelector(name, allow_not_found=True))
    return sorted(info.base_name for info in infos)


def exists(path: Path) -> bool:
    """Return whether a file or folder exists; a store has no empty folders."""
    remote = _remote(path)
    if not remote:
        return path.exists()
    store, name = remote
    with _as_user_error(path):
        return bool(store.get_file_info(name).type != fs.FileType.NotFound)


def modified(path: Path) -> float:
    """Return a file's modification time, in Unix seconds; of a copy, the store's."""
    remote = _remote(path)
    if not remote:
        return path.stat().st_mtime
    store, name = remote
    with _as_user_error(path):
        return float(store.get_file_info(name).mtime_ns) / 1e9


def remove(path: Path) -> None:
    """Delete a file or folder, both in the store and its local copy, if it exists."""
    remote = _remote(path)
    if remote and exists(path):
        store, name = remote
        with _as_user_error(path):
            is_file = store.get_file_info(name).type == fs.FileType.File
            (store.delete_file if is_file else store.delete_dir)(name)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.unlink()


def read(path: Path) -> bytes | None:
    """Return the content of a file without updating its copy; None if it does not exist."""
    remote = _remote(path)
    if not remote:
        return path.read_bytes() if path.is_file() else None
    store, name = remote
    with _as_user_error(path):
        if store.get_file_info(name).type != fs.FileType.File:
            return None
        with store.open_input_stream(name) as stream:
            return bytes(stream.read())


def filesystem(path: Path) -> tuple[fs.FileSystem | None, str]:
    """Return the pyarrow file system (None if local) and the name of a path in it."""
    return _remote(path) or (None, str(path))


def _cache() -> Path:
    folder = os.environ.get("ARC_HYBRID_CACHE") or "~/.cache/arc-hybrid"
    return Path(folder).expanduser().absolute()


def _uri_parts(path: Path) -> tuple[str, ...] | None:
    """Return a copy's quoted URI and the names below it; None for other paths."""
    try:
        parts = path.relative_to(_cache()).parts
    except ValueError:
        return None
    return parts if parts and is_uri(unquote(parts[0])) else None


def _remote(path: Path) -> tuple[fs.FileSystem, str] | None:
    parts = _uri_parts(path)
    if not parts:
        return None
    store, name = _open(unquote(parts[0]))
    return store, "/".join((name, *parts[1:]))


@lru_cache(maxsize=16)
def _open(uri: str) -> tuple[fs.FileSystem, str]:
    try:
        store, name = fs.FileSystem.from_uri(uri)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise UserError(f"{uri}: pyarrow does not support this URI ({error})") from error
    return store, name.rstrip("/")


@contextmanager
def _as_user_error(path: Path) -> Iterator[None]:
    """Turn OSErrors of a store into one-line UserErrors that name the URI."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{uri(path)}: {error}") from error
