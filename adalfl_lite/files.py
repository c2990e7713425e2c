"""Files that are either whole or absent: written beside their destination, then moved over it."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path`` (made if missing); move it to ``path`` if the block succeeds.

    A block that raises leaves an earlier file at ``path`` untouched and no temporary file behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike) -> None:
    """Make the folder of ``path`` and raise ``OSError`` if a file cannot be written there: now, not after the work."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror} ({error.filename}); name another place") from error


def atomic_save(payload: Any, path: str | os.PathLike) -> None:
    """``torch.save(payload, path)``, atomically. The payload must be loadable with ``weights_only=True``.

    NumPy's numbers, which are not, become Python's.

    Raises:
        OSError: it cannot be written, because the disk is full for one; an earlier file at ``path`` is kept.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(_plain(payload), file)
        except RuntimeError as error:  # torch's writer hides what the file said
            raise OSError(f"cannot write {path}: {error.__context__ or error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {_plain(key): _plain(part) for key, part in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def load_payload(path: str | os.PathLike, format: str) -> dict:
    """Load a dictionary written by :func:`atomic_save` whose "format" entry equals ``format``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, foreign, or of another format or version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch does not look at the checksums it writes
                raise ValueError(f"the checksum of {damaged} is wrong")
        payload = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many types for damaged and foreign files
        raise ValueError(
            f"{path} cannot be read as a {format} file, it is foreign or damaged; give another, or delete a damaged one"
        ) from error
    found = payload.get("format") if isinstance(payload, dict) else None
    if found != format:
        if found is None:
            raise ValueError(f"{path} is no {format} file; give one that this package wrote")
        raise ValueError(f"{path} holds format {found!r}, expected {format!r}; write it again with this version")
    return payload
