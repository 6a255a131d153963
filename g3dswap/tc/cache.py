"""The options cache: what was tuned once is found again, by every process, whatever happens to the files.

One JSON-lines file a device (``nvidia-h200.jsonl``; ``entries.py`` has the format).

* Writers take a file lock, read what others wrote meanwhile, and replace the file atomically, so concurrent
  processes lose nothing and a killed one leaves a whole file.  Readers take no lock.
* A damaged file is set aside, its good lines are kept, and a warning says so once.
* Lines of another schema are ignored, which is said once, and stay in the file.
* What cannot be written stays in memory until the process ends, with one warning; every later write of the
  same file tries again.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock

from ..errors import CacheError
from ..once import warn_once
from . import entries
from .entries import SCHEMA, Contents, Entry, Lines, atomic_write_text, canonical, decode, strict_json

__all__ = ["SCHEMA", "Cache", "Entry", "atomic_write_text", "default_directory", "strict_json"]

LOCK_SECONDS = 30.0
"""A writer holds the lock for milliseconds; one that keeps it is stuck and must not stop the others."""


def default_directory() -> Path:
    """``$G3DSWAP_CACHE_DIR``, else the user's own cache directory; made with mode 0700 if it is missing."""
    asked = os.environ.get("G3DSWAP_CACHE_DIR")
    path = Path(asked).expanduser() if asked else platformdirs.user_cache_path("g3dswap", appauthor=False)
    with suppress(OSError):  # the first write says why, and goes on in memory
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


class Cache:
    """The user's cache in ``directory`` (None: :func:`default_directory`), then read-only ``fallbacks``.

    Thread-safe.  Keys compare as sorted JSON; every key needs a string ``device_name``, which names the file.
    ArgumentError: a key or value is not JSON.  CacheError: ``prune``, ``export`` or ``load``, which somebody
    asked for by name, failed.  ``get``, ``near``, ``put`` and ``entries`` survive any state of the files.
    """

    def __init__(self, directory: Path | str | None = None, fallbacks: Sequence[Path | str] = ()) -> None:
        self.directory = default_directory() if directory is None else Path(directory).expanduser()
        self.fallbacks = tuple(Path(fallback) for fallback in fallbacks)
        self._mutex = threading.RLock()
        self._known: dict[Path, Contents] = {}
        self._unsaved: dict[str, Lines] = {}  # by file name
        self._notes: list[tuple[str, str]] = []  # topic and message of the warnings to come

    def get(self, key: Mapping[str, Any]) -> Entry | None:
        """The entry of exactly this key: the user's, else a shipped one, else None."""
        at = canonical(key)
        with self._session():
            layers = self._layers(entries.file_name(key), shipped=True)
            return next((decode(layer[at]) for layer in layers if at in layer), None)

    def near(self, key: Mapping[str, Any], ignore: Sequence[str]) -> list[Entry]:
        """The entries that equal ``key`` on every field outside ``ignore``."""
        ignored = frozenset(ignore)
        wanted = _rest(canonical(key), ignored)
        with self._session():
            names = self._names(shipped=True) if "device_name" in ignore else [entries.file_name(key)]
            found = self._merged(names, shipped=True)
            return [decode(line) for at, line in found.items() if _rest(at, ignored) == wanted]

    def put(self, key: Mapping[str, Any], value: Mapping[str, Any]) -> None:
        """Store ``value``; it is on disk when this returns, or kept in memory with one warning."""
        at, line, name = canonical(key), entries.encode(key, value), entries.file_name(key)
        with self._session():
            self._unsaved.setdefault(name, {})[at] = line
            try:
                # The last write wins, whatever the clocks say.
                self._update(name, lambda lines: lines.update({at: line}))
            except OSError as error:
                self._note(
                    f"unwritable {self.directory}",
                    f"The options cache {self.directory / name} cannot be written ({_why(error)}): results "
                    "are kept in memory until this process ends; make room there, or choose another "
                    "directory with G3DSWAP_CACHE_DIR.",
                )

    def entries(self, shipped: bool = False) -> list[Entry]:
        """The user's entries; with ``shipped``, also the shipped ones that they do not replace."""
        with self._session():
            return [decode(line) for line in self._merged(self._names(shipped), shipped).values()]

    def files(self) -> list[Path]:
        """The user's cache files."""
        with _explicit(f"The options cache {self.directory} cannot be listed"):
            return [path for path in _listing(self.directory) if path.is_file()]

    def prune(self, predicate: Callable[[Entry], bool]) -> int:
        """Remove the user's entries for which ``predicate`` is true; their number."""
        removed: list[str] = []

        def drop(lines: Lines) -> None:
            chosen = [at for at, line in lines.items() if predicate(decode(line))]
            removed.extend(lines.pop(at) for at in chosen)

        with self._session(), _explicit(f"The options cache {self.directory} cannot be pruned"):
            for name in self._names(shipped=False):
                self._update(name, drop)
        return len(removed)

    def export(self, path: Path | str) -> int:
        """Write the user's entries to a file or, if ``path`` is a directory, to one file a device there.

        Replaces what is there already.  Returns the number of entries.
        """
        path = Path(path)
        with self._session(), _explicit(f"The options cache cannot be exported to {path}"):
            names = self._names(shipped=False)
            parts = {path / name: [name] for name in names} if path.is_dir() else {path: names}
            written = 0
            for target, sources in parts.items():
                lines = self._merged(sources, shipped=False)
                atomic_write_text(target, entries.as_text(lines.values()))
                written += len(lines)
            return written

    def load(self, path: Path | str) -> int:
        """Import an exported file, or a directory of them; nothing is changed if any line of it is bad.

        Where the cache has the key already, the younger entry stays.  Returns the number of entries read.
        """
        path = Path(path)
        with self._session(), _explicit(f"{path} cannot be imported"):
            devices: dict[str, Lines] = {}
            sources = _listing(path) if path.is_dir() else [path]
            for source in sources:
                contents = entries.read(source)
                if contents.stamp is None:
                    raise FileNotFoundError(errno.ENOENT, "there is no such file")
                if contents.damaged or contents.foreign:
                    reason = contents.reason or f"it holds {contents.schemas()}"
                    raise CacheError(
                        f"{source} cannot be imported ({reason}) and nothing was changed; export it again "
                        f"with a g3dswap that writes schema {SCHEMA}."
                    )
                for at, line in contents.lines.items():
                    entries.merge(devices.setdefault(entries.file_name(json.loads(at)), {}), {at: line})
            for name, new in devices.items():
                self._update(name, lambda lines, new=new: entries.merge(lines, new))  # type: ignore[misc]
        return sum(map(len, devices.values()))

    # What follows runs under the mutex.

    @contextmanager
    def _session(self) -> Iterator[None]:
        """Holds the mutex; warns when the work is done, because a warning may be an error to the caller."""
        with self._mutex:
            yield
            notes, self._notes = self._notes, []
        for topic, message in notes:
            warn_once(topic, message, stacklevel=4)

    def _note(self, topic: str, message: str) -> None:
        self._notes.append((topic, message))

    def _names(self, shipped: bool) -> list[str]:
        names = set(self._unsaved)
        for directory in (self.directory, *(self.fallbacks if shipped else ())):
            try:
                names.update(path.name for path in _listing(directory))
            except OSError as error:
                self._note_unreadable(directory, error)
        return sorted(names)

    def _layers(self, name: str, shipped: bool) -> list[Lines]:
        """What a file name stands for, in the order of lookup."""
        own = [self._unsaved.get(name, {}), self._current(self.directory / name).lines]
        return own + [self._current(folder / name).lines for folder in (self.fallbacks if shipped else ())]

    def _merged(self, names: Sequence[str], shipped: bool) -> Lines:
        merged: Lines = {}
        for layer in zip(*(self._layers(name, shipped) for name in names)):  # the user's of all files first
            for lines in layer:
                merged.update((at, line) for at, line in lines.items() if at not in merged)
        return merged

    def _current(self, path: Path) -> Contents:
        """The contents of ``path``, read again when it has changed; the user's own is repaired if damaged."""
        try:
            known = self._known.get(path)
            if known and known.stamp == entries.stamp(path):
                return known
            contents = self._known[path] = entries.read(path)
        except OSError as error:
            self._note_unreadable(path, error)
            return Contents()
        self._note_foreign(path, contents)
        if contents.damaged and path.parent == self.directory:
            try:
                self._update(path.name, lambda lines: None)
            except OSError as error:
                self._note_damage(path, contents, f"could not be set aside ({_why(error)})")
        elif contents.damaged:
            self._note_damage(path, contents, "was left as it is, being read-only")
        return self._known[path]

    def _update(self, name: str, change: Callable[[Lines], None]) -> None:
        """Apply ``change`` to what the file holds now and to what is unsaved, under the file's lock."""
        path = self.directory / name
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(f"{path}.lock").acquire(timeout=LOCK_SECONDS, poll_interval=0.01):
            # Read even if the stamp is the one we know: clocks are coarse and inodes are used again.
            contents = entries.read(path)
            self._note_foreign(path, contents)
            now = Contents(dict(contents.lines), contents.foreign)
            entries.merge(now.lines, self._unsaved.get(name, {}))
            change(now.lines)
            if contents.damaged:
                aside = entries.set_aside(path)
            if contents.damaged or now.lines != contents.lines:
                entries.write(path, now)
            if contents.damaged:
                self._note_damage(path, contents, f"was set aside as {aside.name}")
            now.stamp = entries.stamp(path)
            self._known[path] = now
            self._unsaved.pop(name, None)

    def _note_unreadable(self, path: Path, error: OSError) -> None:
        message = (
            f"The options cache {path} cannot be read ({_why(error)}) and is ignored; repair or remove it."
        )
        self._note(f"unreadable {path}", message)

    def _note_foreign(self, path: Path, contents: Contents) -> None:
        if contents.foreign:
            self._note(
                f"foreign {path}",
                f"The options cache {path} holds {contents.schemas()}, which this g3dswap ignores, for it "
                f"reads schema {SCHEMA}, and leaves in the file.",
            )

    def _note_damage(self, path: Path, contents: Contents, what: str) -> None:
        message = (
            f"The options cache {path} is damaged ({contents.reason}; {contents.damaged} in all): "
            f"{len(contents.lines)} good entries were kept and the damaged file {what}."
        )
        self._note(message, message)


@functools.lru_cache(maxsize=1 << 13)  # every entry of a device is looked at for every problem
def _rest(at: str, ignored: frozenset[str]) -> str:
    """A canonical key without some of its fields."""
    fields = json.loads(at)
    return json.dumps({name: fields[name] for name in sorted(fields) if name not in ignored})


def _listing(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if path.suffix == ".jsonl")
    except FileNotFoundError:
        return []


def _why(error: OSError) -> str:
    return error.strerror or str(error)


@contextmanager
def _explicit(what: str) -> Iterator[None]:
    """Turns OSError into a CacheError that begins with ``what``."""
    try:
        yield
    except CacheError:
        raise
    except OSError as error:
        raise CacheError(f"{what}: {_why(error)}.") from error
