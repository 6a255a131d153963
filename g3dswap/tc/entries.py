"""What a line and a file of the options cache are: one entry a line, as JSON, the whole key beside the value.

::

    {"schema": 1, "key": {"device_name": "NVIDIA H200", ...}, "value": {...}, "created": "2026-01-31T..."}

Reading checks everything and never hides a good line behind a bad one; lines of another schema belong to
another release of g3dswap and are carried along unread.  It is data only: nothing here is ever executed or
unpickled.  Writing replaces a file atomically.  Who may write when is ``cache.py``'s business.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import Any

from ..errors import ArgumentError

SCHEMA = 1
MAX_BYTES = 64 * 2**20
"""The longest file that is read or written: some ten thousand entries with all their trials."""
MAX_DEPTH = 32
"""The deepest nesting that is read, so that no later pass over a value exhausts the stack."""

Stamp = tuple[int, int, int]  # modification time, size, inode
Lines = dict[str, str]  # canonical key -> the line that holds the entry


@dataclass(frozen=True)
class Entry:
    """One tuned result.  ``key`` holds JSON scalars and lists of them, ``value`` is any JSON object."""

    key: dict[str, Any]
    value: dict[str, Any]
    created: str

    @property
    def when(self) -> datetime:
        """``created`` as a time; one without a zone is UTC."""
        time = datetime.fromisoformat(self.created)
        return time if time.tzinfo else time.replace(tzinfo=timezone.utc)


@dataclass
class Contents:
    """What a file held when its ``stamp`` was taken; no stamp, no file."""

    lines: Lines = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)  # lines of another schema
    damaged: int = 0
    reason: str = ""  # of the first damage
    stamp: Stamp | None = None

    def damage(self, reason: str) -> None:
        self.damaged += 1
        self.reason = self.reason or reason

    def schemas(self) -> str:
        """``2 entries of schema 0, 7``, for messages."""
        numbers = sorted({json.loads(line)["schema"] for line in self.foreign})
        return f"{len(self.foreign)} entries of schema {', '.join(map(str, numbers))}"


def canonical(key: Mapping[str, Any]) -> str:
    """The text by which keys compare: sorted JSON, so a tuple equals a list and the order does not matter."""
    try:
        text = json.dumps(dict(key), sort_keys=True, allow_nan=False)
        _check_key(json.loads(text))
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"{key!r} is not a cache key: {error}; use JSON scalars and lists.") from None
    return text


def file_name(key: Mapping[str, Any]) -> str:
    """The file of the key's device: ``NVIDIA H200`` -> ``nvidia-h200.jsonl``."""
    slug = re.sub(r"[^a-z0-9]+", "-", key["device_name"].lower()).strip("-")[:100]
    return f"{slug or 'device'}.jsonl"


def encode(key: Mapping[str, Any], value: Mapping[str, Any]) -> str:
    """The line of a new entry; ArgumentError unless reading it would give the entry back."""
    fields = json.loads(canonical(key))
    created = datetime.now(timezone.utc).isoformat()
    try:
        record = {"schema": SCHEMA, "key": fields, "value": dict(value), "created": created}
        line = json.dumps(record, allow_nan=False)
        _check_entry(strict_json(line))
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"A cached value must be a JSON object, but {error}.") from None
    return line


def decode(line: str) -> Entry:
    """A fresh Entry from a line that was checked before."""
    record = json.loads(line)
    return Entry(record["key"], record["value"], record["created"])


def merge(lines: Lines, incoming: Lines) -> None:
    """Add ``incoming``; of two entries with the same key, the younger stays."""
    for at, line in incoming.items():
        if at not in lines or decode(lines[at]).when <= decode(line).when:
            lines[at] = line


def stamp(path: Path) -> Stamp | None:
    """Changes whenever the file was replaced; None if there is no file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def read(path: Path) -> Contents:
    """Parse a file that may be absent, damaged, too long or no file at all; OSError if it cannot be read."""
    try:
        # Asked before opening, for opening a pipe would wait for its writer.
        if not stat.S_ISREG(path.stat().st_mode):
            return Contents(damaged=1, reason="it is not a regular file", stamp=stamp(path))
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return Contents()
    contents = Contents(stamp=(status.st_mtime_ns, status.st_size, status.st_ino))
    if len(data) > MAX_BYTES:
        contents.damage(f"it is longer than {MAX_BYTES} bytes")
        data = data[: data.rfind(b"\n", 0, MAX_BYTES) + 1]
    for number, raw in enumerate(data.split(b"\n"), 1):
        try:
            if raw.strip():
                _parse(raw.decode("utf-8").strip(), contents)
        except ValueError as error:
            contents.damage(f"line {number}: {error}")
    return contents


def write(path: Path, contents: Contents) -> None:
    """Replace a cache file, whose lock the caller holds; OSError leaves it as it was."""
    text = as_text([*contents.lines.values(), *contents.foreign])
    if len(text.encode()) > MAX_BYTES:
        raise OSError(errno.EFBIG, f"more than {MAX_BYTES} bytes; `g3dswap cache prune` makes room")
    for left_by_killed in path.parent.glob(f".{path.name}.*.tmp"):
        left_by_killed.unlink(missing_ok=True)
    atomic_write_text(path, text)


def as_text(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def set_aside(path: Path) -> Path:
    """Keep a damaged file, whose lock the caller holds, under a free name; a file also stays where it is."""
    for n in count(1):
        aside = path.with_name(f"{path.name}.damaged-{n}")
        if not os.path.lexists(aside):
            break
        if aside.exists() and aside.samefile(path):
            return aside  # from a repair that was stopped after this step
    if not path.is_file():
        return path.rename(aside)
    try:
        os.link(path, aside)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, aside)
    return aside


def atomic_write_text(path: Path | str, text: str) -> None:
    """Replace ``path`` by a file that holds ``text``: wholly and durably, or, with an OSError, not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # some file systems cannot sync a directory; the file is whole either way
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def strict_json(text: str) -> Any:
    """``json.loads``, with a ValueError also for NaN, infinities and nesting deeper than ``MAX_DEPTH``."""
    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(value, MAX_DEPTH)
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def _check_depth(value: Any, depth: int) -> None:
    if depth == 0:
        raise ValueError("it is nested too deeply")
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        _check_depth(child, depth - 1)


def _parse(line: str, contents: Contents) -> None:
    record = strict_json(line)
    if not isinstance(record, dict) or type(record.get("schema")) is not int:
        raise ValueError("it is not an object with an integer 'schema'")
    if record["schema"] != SCHEMA:
        contents.foreign.append(line)
    else:
        _check_entry(record)
        contents.lines[canonical(record["key"])] = line


def _check_entry(record: dict[str, Any]) -> None:
    if record.keys() != {"schema", "key", "value", "created"}:
        raise ValueError("its fields are not schema, key, value and created")
    _check_key(record["key"])
    if not isinstance(record["value"], dict):
        raise ValueError("'value' is not an object")
    if not isinstance(record["created"], str):
        raise ValueError("'created' is not a string")
    datetime.fromisoformat(record["created"])


def _check_key(key: Any) -> None:
    if not isinstance(key, dict) or not isinstance(key.get("device_name"), str):
        raise ValueError("'key' is not an object with a string 'device_name'")
    for name, value in key.items():
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, (dict, list)) for item in items):
            raise ValueError(f"the key's {name!r} is neither a scalar nor a list of scalars")
