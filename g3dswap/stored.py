"""What the options cache has for a problem: the record of its own, and those of similar problems."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .choice import Record
from .nearest import similar
from .once import warn_once
from .problem import Problem
from .tc import kernel
from .tc.cache import Cache, Entry, default_directory
from .tc.schedule import Schedule

EFFORTS = {"none": 0, "cached": 0, "quick": 1, "full": 2}


def shipped_directories() -> list[Path]:
    """Where the shipped options are: in an installed package, or beside it in the repository."""
    package = Path(__file__).parent
    return [place for place in (package / "caches", package.parent / "caches") if place.is_dir()]


_caches: dict[Path, Cache] = {}
_lock = threading.Lock()


def open_cache(directory: Path | str | None = None) -> Cache:
    """The options cache in a directory (None: the default one), with the shipped ones behind it."""
    path = default_directory() if directory is None else Path(directory).expanduser()
    with _lock:
        if path not in _caches:
            _caches[path] = Cache(path, shipped_directories())
        return _caches[path]


def close_caches() -> None:
    """Forget what is open: a cache is read anew when it is asked for again."""
    with _lock:
        _caches.clear()


def key_of(problem: Problem) -> dict[str, Any]:
    """The cache key of a problem on this machine."""
    return problem.key(kernel.versions(kernel.target_of(problem.device)))


FAR = 2
"""The ratio of batch sizes up to which times at one say which kernel is faster at the other."""


@dataclass(frozen=True)
class Stored:
    """A record that may serve a problem.

    source, what: where it comes from (of `choice.SOURCES`) and how, in words.
    timed:        its times are of the problem's very size, on this kind of device.
    """

    record: Record
    source: str
    what: str
    timed: bool = True

    @property
    def effort(self) -> int:
        """What a choice of it rests on, of EFFORTS: a similar problem's says little."""
        return 0 if self.source == "nearest" else EFFORTS[self.record.effort]

    def tells_of(self, batch: int) -> bool:
        """Whether its times say which kernel is faster at this batch size."""
        less, more = sorted((batch, self.record.batch))
        return self.timed and more <= FAR * less

    def raced(self, batch: int, seconds: float, native_seconds: float) -> Stored:
        """The same with the times that its kernel and PyTorch's have here at a batch size."""
        record = replace(self.record, batch=batch, seconds=seconds, native_seconds=native_seconds)
        return Stored(record, self.source, f"{self.what}; at batch {batch} here")


class Options:
    """Looks problems up in one cache and the shipped ones behind it."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self._shipped = Cache(cache.directory / "no such directory", cache.fallbacks)

    def usable(self, problem: Problem, wanted: int) -> Iterator[Stored]:
        """What serves a problem without tuning it, in the order in which it is tried.

        wanted: the effort that is asked for; similar problems' serve only those who would not tune.
        """
        own = self.own(problem)
        if own and _worth(own.record) >= wanted:
            yield own
        if not wanted:
            yield from self.similar(problem)

    def own(self, problem: Problem) -> Stored | None:
        """The record of the very problem."""
        entry = self.cache.get(key_of(problem))
        record = entry and self._record(entry, problem)
        if not entry or not record:
            return None
        shipped = self._shipped.get(entry.key) == entry
        return Stored(record, "shipped" if shipped else "cached", f"tuned at batch {record.batch}")

    def similar(self, problem: Problem) -> Iterator[Stored]:
        """The records of the most similar problems, the nearest first."""
        for entry in similar(self.cache, key_of(problem)):
            record = self._record(entry, problem)
            if record:
                size, groups = "x".join(map(str, entry.key["size"])), entry.key["groups"]
                others = f"{groups} groups, " if groups != problem.geometry.groups else ""
                where = f"on {entry.key['device_name']} at size {size}, {others}{entry.key['dtype']}"
                yield Stored(record, "nearest", f"tuned {where}, batch {record.batch}", timed=False)

    def seeds(self, problem: Problem, tried: Sequence[Record]) -> list[Schedule]:
        """What was best for a problem so far, unless it was tried and failed, and for similar ones."""
        own = self.own(problem)
        found = [*([own] if own else []), *self.similar(problem)]
        records = [stored.record for stored in found if stored.record not in tried]
        texts = {json.dumps(item.schedule): item.schedule for item in records if item.schedule}
        return [Schedule.from_json(schedule) for schedule in texts.values()]

    def _record(self, entry: Entry, problem: Problem) -> Record | None:
        try:
            return Record.from_json(entry.value)
        except ValueError as error:
            warn_once(
                f"record {entry.key}",
                f"The cache entry for {problem} is malformed and not used ({error}); tune it again.",
            )
            return None


def _worth(record: Record) -> int:
    """What a record is worth; one that was cut short serves only those who would not tune."""
    return 0 if record.interrupted else EFFORTS[record.effort]
