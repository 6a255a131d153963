"""The private folder of compiled objects: content-addressed, owned by the user, verified before loading."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import CompileError
from .cache import default_directory

ROOM = 1 << 18
"""Bytes that must be free for a folder to be used: an object and what the compiler makes on its way."""
STALE_SECONDS = 86400.0
"""Nothing is compiled for a day."""


_writable: set[Path] = set()  # the folders that were tried


def folder() -> Path:
    """Where compiled objects lie; made with mode 0700. A temporary folder where that cannot be written.

    Whether it can be is tried once in a process, and again after something could not be made in it.

    CompileError: the folder belongs to somebody else or others may write to it, so that what is in it
    could be anybody's code.
    """
    path = default_directory() / "objects"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = path.stat()
        if path not in _writable:
            with tempfile.TemporaryFile(dir=path) as file:
                file.write(bytes(ROOM))  # it can be written, and is not full
                file.flush()
            _writable.add(path)
    except OSError:
        return _private()
    if state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise CompileError(
            f"compiled objects are not loaded from {path}, which others may write to; "
            f"run chmod 700 on it or name another folder in G3DSWAP_CACHE_DIR."
        )
    return path


def digest(*texts: str) -> str:
    """The name of an object: a hash of all that it is made from."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]


_temporary: list[tempfile.TemporaryDirectory[str]] = []


def _private() -> Path:
    """A folder for this process alone, where the cache folder cannot be written."""
    if not _temporary:
        _temporary.append(tempfile.TemporaryDirectory(prefix="g3dswap-"))
    path = Path(_temporary[0].name) / "objects"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


@contextlib.contextmanager
def workshop(place: Path) -> Iterator[Path]:
    """A new folder inside of one for compiled objects, which is gone afterwards.

    What fails in it may be the disk's fault: `folder` then looks at the disk again.
    """
    try:
        with tempfile.TemporaryDirectory(dir=place) as made:
            _sweep(place, os.stat(made).st_mtime)
            yield Path(made)
    except BaseException:
        _writable.clear()
        raise


@contextlib.contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """Where an object is to be made; if the block ends well, it is moved to its path and sealed."""
    with workshop(path.parent) as place:
        made = place / path.name
        yield made
        os.replace(made, path)
        seal(path)


_swept: set[Path] = set()


def _sweep(path: Path, now: float) -> None:
    """Remove the folders that processes left when they were killed; once in a process."""
    if path in _swept:
        return
    _swept.add(path)
    for left in path.iterdir():
        with contextlib.suppress(OSError):  # another process removed it
            if left.is_dir() and now - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left)


def seal(path: Path) -> None:
    """Write the content hash of a finished object beside it."""
    _seal_path(path).write_text(_hash(path))


def intact(path: Path) -> bool:
    """Whether an object is there and is what was sealed."""
    try:
        return _seal_path(path).read_text() == _hash(path)
    except OSError:
        return False


def _seal_path(path: Path) -> Path:
    return path.with_suffix(path.suffix + ".sha256")


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
