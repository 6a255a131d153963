"""The options cache against other processes, kill -9, damaged files and full disks.

Run as a program, this file is the writers of its own tests: ``crowd`` and ``campaign`` fork after one import.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
from filelock import FileLock

import g3dswap.tc.cache as cache_module
import g3dswap.tc.entries as format_module
from g3dswap.errors import ArgumentError, CacheError, G3DSwapWarning
from g3dswap.tc.cache import Cache, Entry, atomic_write_text, default_directory, strict_json

ROOT = Path(__file__).resolve().parents[2]
H200 = "nvidia-h200.jsonl"


def key(n: int = 0, **fields: Any) -> dict[str, Any]:
    return {"device_name": "NVIDIA H200", "kernel": [3, 3, 3], "channels": n, **fields}


def line(n: int, **fields: Any) -> str:
    record = {"schema": 1, "key": key(n), "value": {"n": n}, "created": "2026-01-01T00:00:00+00:00"}
    return json.dumps({**record, **fields})


def channels(cache: Cache) -> list[int]:
    return sorted(entry.key["channels"] for entry in cache.entries())


@contextmanager
def warned(*sentences: str) -> Iterator[None]:
    """Exactly these warnings, in order, each containing its text and being one sentence."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == len(sentences), messages
    for warning, message, sentence in zip(caught, messages, sentences):
        assert warning.category is G3DSwapWarning
        assert sentence in message
        assert message.endswith(".") and "\n" not in message
        assert warning.filename == __file__  # points at the caller


# Storing and finding.


def test_put_and_get(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.get(key()) is None
    cache.put(key(), {"schedule": {"unroll": [4, 1]}, "seconds": 1e-4})
    for reader in (cache, Cache(tmp_path)):
        entry = reader.get(key())
        assert entry is not None
        assert entry.key == key()
        assert entry.value == {"schedule": {"unroll": [4, 1]}, "seconds": 1e-4}
        assert entry.when.utcoffset() is not None
        assert reader.get(key(1)) is None
    cache.put(key(), {"seconds": 2e-4})
    assert [entry.value for entry in cache.entries()] == [{"seconds": 2e-4}]


def test_one_file_a_device(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put(key(), {})
    cache.put(key(device_name="Intel(R) Xeon(R) @ 2.1GHz"), {})
    cache.put(key(device_name="../../etc/passwd"), {})
    cache.put(key(device_name="?"), {})
    names = ["device.jsonl", "etc-passwd.jsonl", "intel-r-xeon-r-2-1ghz.jsonl", H200]
    assert [path.name for path in cache.files()] == names
    record = json.loads((tmp_path / H200).read_text())
    assert record.keys() == {"schema", "key", "value", "created"}
    assert record["schema"] == 1 and record["key"] == key()


def test_keys_compare_as_sorted_json(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put({"kernel": (3, 3, 3), "device_name": "x", "bias": True, "none": None}, {"a": (1,)})
    entry = cache.get({"none": None, "bias": True, "device_name": "x", "kernel": [3, 3, 3]})
    assert entry is not None and entry.value == {"a": [1]}
    assert cache.get({"none": None, "bias": 1, "device_name": "x", "kernel": [3, 3, 3]}) is None
    assert cache.near({"none": None, "bias": 1, "device_name": "x", "kernel": [3, 3, 3]}, ["none"]) == []


def test_results_are_the_callers_own(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    value = {"trials": [1]}
    cache.put(key(), value)
    value["trials"].append(2)
    entry = cache.get(key())
    assert entry is not None
    entry.value["trials"].append(3)
    again = cache.get(key())
    assert again is not None and again.value == {"trials": [1]}


@pytest.mark.parametrize(
    ("bad", "rule"),
    [
        ({"channels": 1}, "device_name"),
        ({"device_name": 3}, "device_name"),
        ({"device_name": "x", "size": {"T": 1}}, "'size' is neither a scalar nor a list of scalars"),
        ({"device_name": "x", "size": [[1]]}, "'size' is neither"),
        ({"device_name": "x", "size": float("nan")}, "not JSON compliant"),
        ({"device_name": "x", "size": b"1"}, "bytes is not JSON serializable"),
    ],
)
def test_bad_keys(tmp_path: Path, bad: dict[str, Any], rule: str) -> None:
    cache = Cache(tmp_path)
    calls: list[Callable[[], object]] = [
        lambda: cache.get(bad),
        lambda: cache.put(bad, {}),
        lambda: cache.near(bad, []),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match=rule):
            call()
    assert list(tmp_path.iterdir()) == []


def test_bad_values(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(100):
        deep = [deep]
    cases: list[tuple[Any, str]] = [(float("inf"), "not JSON"), ({1}, "set"), (deep, "too deeply")]
    for value, rule in cases:
        with pytest.raises(ArgumentError, match=f"must be a JSON object, but .*{rule}"):
            Cache(tmp_path).put(key(), {"x": value})
    assert list(tmp_path.iterdir()) == []


def test_fallbacks_come_after_the_users(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    Cache(first).put(key(1), {"from": "first"})
    Cache(second).put(key(1), {"from": "second"})
    Cache(second).put(key(2), {"from": "second"})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    cache = Cache(tmp_path / "user", [first, second, tmp_path / "absent"])

    def sources() -> list[str]:
        return [found.value["from"] for found in (cache.get(key(n)) for n in (1, 2)) if found]

    assert sources() == ["first", "second"]
    cache.put(key(2), {"from": "user"})
    assert sources() == ["first", "user"]
    assert [entry.value["from"] for entry in cache.near(key(), ["channels"])] == ["user", "first"]
    assert len(cache.entries()) == 1 and len(cache.entries(shipped=True)) == 2
    assert cache.prune(lambda entry: True) == 1
    assert sources() == ["first", "second"]
    assert before == {path: path.read_bytes() for path in before}


def test_near(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put(key(1, size=[8, 8, 8]), {"n": 1})
    cache.put(key(1, size=[9, 9, 9]), {"n": 2})
    cache.put(key(2, size=[8, 8, 8]), {"n": 3})
    cache.put(key(1), {"n": 4})
    cache.put(key(1, size=[8, 8, 8], device_name="CPU"), {"n": 5})

    def near(ignore: list[str]) -> list[int]:
        return sorted(entry.value["n"] for entry in cache.near(key(1, size=[8, 8, 8]), ignore))

    assert near([]) == [1]
    assert near(["size"]) == [1, 2, 4]
    assert near(["size", "channels"]) == [1, 2, 3, 4]
    assert near(["device_name"]) == [1, 5]
    assert near(["no such field"]) == [1]


def test_a_change_by_another_is_seen(tmp_path: Path) -> None:
    reader, writer = Cache(tmp_path), Cache(tmp_path)
    assert reader.get(key()) is None
    for n in range(20):
        writer.put(key(), {"n": n % 10})
        entry = reader.get(key())
        assert entry is not None and entry.value == {"n": n % 10}
    (tmp_path / H200).unlink()
    assert reader.get(key()) is None


def test_prune(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for n in range(6):
        cache.put(key(n, device_name="ab"[n % 2]), {"n": n})
    assert cache.prune(lambda entry: entry.value["n"] < 3) == 3
    assert channels(cache) == channels(Cache(tmp_path)) == [3, 4, 5]
    untouched = (tmp_path / "a.jsonl").stat()
    assert cache.prune(lambda entry: False) == 0
    assert (tmp_path / "a.jsonl").stat() == untouched
    assert Cache(tmp_path / "absent").prune(lambda entry: True) == 0


# Import and export.


def test_export_and_import(tmp_path: Path) -> None:
    source = Cache(tmp_path / "source")
    for n in range(4):
        source.put(key(n, device_name="ab"[n % 2]), {"n": n})
    (tmp_path / "folder").mkdir()
    assert source.export(tmp_path / "all.jsonl") == source.export(tmp_path / "folder") == 4
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["a.jsonl", "b.jsonl"]
    for exported in ("all.jsonl", "folder"):
        cache = Cache(tmp_path / f"from {exported}")
        assert cache.load(tmp_path / exported) == 4
        assert cache.entries() == source.entries()
    # What `caches/` ships is found as it was exported.
    assert Cache(tmp_path / "empty", [tmp_path / "folder"]).get(key(2, device_name="a")) == source.get(
        key(2, device_name="a")
    )


def test_import_keeps_the_younger(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    cache.put(key(1), {"from": "here"})
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    old.write_text(line(1, created="2020-01-01T00:00:00") + "\n" + line(2))
    new.write_text(line(1, created="2999-01-01T00:00:00+00:00"))
    assert cache.load(old) == 2
    assert [entry.value for entry in cache.entries()] == [{"from": "here"}, {"n": 2}]
    assert cache.load(new) == 1
    assert [entry.value for entry in cache.entries()] == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"{line(1)}\n{line(2)[:-9]}", r"line 2: "),
        (f"{line(1)}\n{line(2, schema=7)}", "1 entries of schema 7"),
        (line(1, key={}), "line 1: 'key' is not an object with a string 'device_name'"),
        (line(1, value=float("nan")), "NaN is not a finite number"),
        (None, "there is no such file"),
    ],
)
def test_import_is_validated(tmp_path: Path, text: str | None, reason: str) -> None:
    if text is not None:
        (tmp_path / "in.jsonl").write_text(text)
    cache = Cache(tmp_path / "cache")
    with pytest.raises(CacheError, match=f"in.jsonl cannot be imported.*{reason}"):
        cache.load(tmp_path / "in.jsonl")
    assert not (tmp_path / "cache").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == (["in.jsonl"] if text is not None else [])


def test_export_that_fails(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put(key(), {})
    with pytest.raises(CacheError, match=r"cannot be exported to .*missing.*: No such file or directory"):
        cache.export(tmp_path / "missing" / "out.jsonl")


# Damage.

BAD_LINES = {
    "text": "not json",
    "truncated": line(9)[:-20],
    "binary": bytes(range(128, 256)).decode("latin-1"),
    "scalar": "3",
    "no schema": '{"key": {}}',
    "schema is a bool": line(9, schema=True),
    "key is a list": line(9, key=[]),
    "key is nested": line(9, key={"device_name": "x", "a": {"b": 1}}),
    "value is a string": line(9, value="fast"),
    "created is a number": line(9, created=3),
    "created is no time": line(9, created="yesterday"),
    "unknown field": line(9, extra=1),
    "infinite": line(9).replace('"n": 9', '"n": 1e999'),
    "deep": line(9).replace('"n": 9', '"n": ' + "[" * 100_000 + "]" * 100_000),
    "deep enough": line(9).replace('"n": 9', '"n": ' + "[" * 50 + "]" * 50),
    "long integer": line(9).replace('"n": 9', '"n": ' + "9" * 5000),
}


@pytest.mark.parametrize("touch", ["get", "put", "entries"])
@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_damaged_line(tmp_path: Path, bad: str, touch: str) -> None:
    path = tmp_path / H200
    damaged = "\n".join([line(1), BAD_LINES[bad], line(2)]).encode("latin-1")
    path.write_bytes(damaged)
    cache = Cache(tmp_path)
    with warned("is damaged (line 2: "):
        if touch == "get":
            assert cache.get(key(1)) is not None
        elif touch == "put":
            cache.put(key(3), {})
        assert channels(cache) == ([1, 2, 3] if touch == "put" else [1, 2])
    assert (tmp_path / f"{H200}.damaged-1").read_bytes() == damaged
    assert path.read_text().startswith(f"{line(1)}\n{line(2)}\n")
    with warned():  # whole again, so nothing to say
        assert channels(Cache(tmp_path)) == channels(cache)


def test_a_truncated_last_line_and_then_another(tmp_path: Path) -> None:
    path = tmp_path / H200
    cache = Cache(tmp_path)
    for n in (1, 2):
        path.write_text(f"{line(1)}\n{line(2)}"[:-n])
        with warned(f"1 good entries were kept and the damaged file was set aside as {H200}.damaged-{n}"):
            assert cache.get(key(1)) is not None
            assert cache.get(key(2)) is None
    assert len(list(tmp_path.glob("*.damaged-*"))) == 2


def test_a_missing_last_newline_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / H200).write_text(f"\r\n{line(1)}\r\n\n{line(2)}")
    assert channels(Cache(tmp_path)) == [1, 2]


def test_an_empty_file_is_an_empty_cache(tmp_path: Path) -> None:
    (tmp_path / H200).touch()
    cache = Cache(tmp_path)
    assert cache.get(key()) is None
    cache.put(key(1), {})
    assert channels(Cache(tmp_path)) == [1]


def test_binary_garbage(tmp_path: Path) -> None:
    garbage = random.Random(0).randbytes(100_000)
    (tmp_path / H200).write_bytes(garbage)
    with warned(" 0 good entries were kept"):
        Cache(tmp_path).put(key(1), {})
    assert channels(Cache(tmp_path)) == [1]
    assert (tmp_path / f"{H200}.damaged-1").read_bytes() == garbage


def test_a_directory_or_a_pipe_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / H200).mkdir()
    (tmp_path / H200 / "precious").write_text("kept")
    os.mkfifo(tmp_path / "cpu.jsonl")
    cache = Cache(tmp_path)
    with warned(
        "it is not a regular file; 1 in all): 0 good entries were kept and the damaged file was set aside"
    ):
        assert cache.get(key(1)) is None
        cache.put(key(1), {})
    with warned("it is not a regular file"):
        cache.put(key(2, device_name="cpu"), {})
    assert channels(Cache(tmp_path)) == [1, 2]
    assert (tmp_path / f"{H200}.damaged-1" / "precious").read_text() == "kept"
    assert stat.S_ISFIFO((tmp_path / "cpu.jsonl.damaged-1").stat().st_mode)


def test_an_over_long_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"{line(n)}\n" for n in range(10))
    (tmp_path / H200).write_text(text)
    monkeypatch.setattr(format_module, "MAX_BYTES", len(line(0)) * 4)
    cache = Cache(tmp_path)
    with warned(f"it is longer than {len(line(0)) * 4} bytes"):
        assert channels(cache) == [0, 1, 2]
    assert (tmp_path / f"{H200}.damaged-1").read_text() == text
    with warned(
        "(more than",
    ):
        cache.put(key(3), {"text": "x" * 1000})
    assert channels(cache) == [0, 1, 2, 3]
    assert channels(Cache(tmp_path)) == [0, 1, 2]


@pytest.mark.parametrize("touch_first", ["get", "put"])
def test_other_schemas_are_ignored_and_preserved(tmp_path: Path, touch_first: str) -> None:
    path = tmp_path / H200
    foreign = [line(1, schema=0, key="older"), '{"schema": 2, "newer": "\N{GREEK SMALL LETTER MU}s"}']
    path.write_text("\n".join([foreign[0], line(1), foreign[1]]), encoding="utf-8")
    cache = Cache(tmp_path)
    with warned("holds 2 entries of schema 0, 2, which this g3dswap ignores, for it reads schema 1,"):
        if touch_first == "get":
            assert cache.get(key(1)) is not None
        cache.put(key(2), {})
        cache.prune(lambda entry: entry.key["channels"] == 1)
        assert channels(cache) == channels(Cache(tmp_path)) == [2]
    assert not list(tmp_path.glob("*.damaged-*"))
    assert path.read_text(encoding="utf-8").splitlines()[1:] == foreign


def test_a_damaged_shipped_file_is_left_alone(tmp_path: Path) -> None:
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / H200).write_text(f"{line(1)}\nnonsense\n")
    cache = Cache(tmp_path / "user", [shipped])
    with warned("1 good entries were kept and the damaged file was left as it is, being read-only"):
        assert cache.get(key(1)) is not None
        assert cache.get(key(2)) is None
    assert [path.name for path in shipped.iterdir()] == [H200]


# Disks that do not write.


def fail(number: int) -> Callable[..., NoReturn]:
    def failing(*args: Any, **kwargs: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return failing


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("step", ["replace", "fsync", "open", "mkdir"])  # os.open is how a lock is made
def test_what_cannot_be_written_stays_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    cache = Cache(tmp_path / "cache")
    cache.put(key(0), {"n": 0})
    with monkeypatch.context() as patch:
        owner: Any = Path if step == "mkdir" else os
        patch.setattr(owner, step, fail(number))
        with warned(f"cannot be written ({os.strerror(number)}): results are kept in memory"):
            for n in (1, 2, 0):
                cache.put(key(n), {"n": n + 10})
        for n in (0, 1, 2):
            entry = cache.get(key(n))
            assert entry is not None and entry.value == {"n": n + 10}
        assert channels(cache) == [0, 1, 2]
        assert [entry.value["n"] for entry in cache.near(key(), ["channels"])].count(10) == 1
        assert [entry.value for entry in Cache(tmp_path / "cache").entries()] == [{"n": 0}]
        assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [H200, f"{H200}.lock"]
    cache.put(key(3), {"n": 13})  # the disk is back: everything is written
    assert channels(Cache(tmp_path / "cache")) == [0, 1, 2, 3]


def test_no_directory_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = Cache(tmp_path / "file" / "cache")
    with warned("cannot be written (Not a directory)", "cannot be read (Not a directory) and is ignored"):
        cache.put(key(1), {})
        assert cache.get(key(1)) is not None
        assert cache.get(key(2)) is None
    with pytest.raises(CacheError, match="cannot be pruned: Not a directory"), warned("cannot be read"):
        cache.prune(lambda entry: True)
    with pytest.raises(CacheError, match="cannot be listed: Not a directory"):
        cache.files()


def test_an_unreadable_file_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / H200).write_text(line(1))
    with monkeypatch.context() as patch:
        patch.setattr(format_module, "open", fail(errno.EACCES), raising=False)
        cache = Cache(tmp_path)
        with warned("cannot be read (Permission denied)"):
            assert cache.get(key(1)) is None
        with warned("cannot be written (Permission denied)"):
            cache.put(key(2), {})
    assert channels(cache) == [1, 2]
    assert (tmp_path / H200).read_text() == line(1)


def test_a_damaged_file_on_a_disk_that_does_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / H200).write_text(f"{line(1)}\nnonsense")
    cache = Cache(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail(errno.ENOSPC))
        with warned("could not be set aside (No space left on device)", "cannot be written (No space left"):
            for n in (2, 3):
                assert cache.get(key(1)) is not None
                cache.put(key(n), {})
        assert len(list(tmp_path.glob("*.damaged-*"))) <= 1  # one copy, not one an attempt
    with warned("was set aside"):
        cache.put(key(4), {})
    assert channels(Cache(tmp_path)) == [1, 2, 3, 4]
    assert (tmp_path / f"{H200}.damaged-1").read_text() == f"{line(1)}\nnonsense"


def test_setting_aside_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / H200).write_text(f"{line(1)}\nnonsense")
    monkeypatch.setattr(os, "link", fail(errno.EPERM))
    with warned("was set aside"):
        assert channels(Cache(tmp_path)) == [1]
    assert (tmp_path / f"{H200}.damaged-1").read_text() == f"{line(1)}\nnonsense"


def test_a_writer_that_is_stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "LOCK_SECONDS", 0.05)
    cache = Cache(tmp_path)
    with FileLock(tmp_path / f"{H200}.lock"), warned("could not be acquired"):
        cache.put(key(1), {})
        assert channels(cache) == [1]
    cache.put(key(2), {})
    assert channels(Cache(tmp_path)) == [1, 2]


def test_explicit_requests_fail_loudly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    cache.put(key(1), {})
    cache.export(tmp_path / "out")
    (tmp_path / "more").write_text(line(5))
    monkeypatch.setattr(os, "replace", fail(errno.EROFS))
    for request in (lambda: cache.prune(lambda entry: True), lambda: cache.load(tmp_path / "more")):
        with pytest.raises(CacheError, match=r"cannot be (pruned|imported): Read-only file system"):
            request()
    assert channels(cache) == [1]


def test_a_warning_that_is_an_error_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / H200).write_text(f"{line(1)}\nnonsense")
    cache = Cache(tmp_path)
    with pytest.raises(G3DSwapWarning, match="is damaged"):
        cache.put(key(2), {})
    assert channels(cache) == channels(Cache(tmp_path)) == [1, 2]


# Threads and processes.


def test_threads(tmp_path: Path) -> None:
    shared = Cache(tmp_path)
    failures: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            cache = shared if thread % 2 else Cache(tmp_path)
            for n in range(8):
                cache.put(key(100 * thread + n), {"n": n})
                entry = cache.get(key(100 * thread + n))
                assert entry is not None and entry.value == {"n": n}
                cache.near(key(), ["channels"])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert channels(shared) == channels(Cache(tmp_path)) == [100 * t + n for t in range(6) for n in range(8)]


def test_threads_take_turns(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put(key(1), {})
    other = threading.Thread(target=cache.get, args=[key(1)])
    waited: list[bool] = []

    def predicate(entry: Entry) -> bool:
        other.start()
        other.join(0.1)
        waited.append(other.is_alive())
        return False

    cache.prune(predicate)
    other.join()
    assert waited == [True]


def test_threads_on_a_disk_that_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the threads share in memory is consistent while every other write fails."""
    cache = Cache(tmp_path)
    failures: list[BaseException] = []
    replace, calls = os.replace, iter(range(10_000))

    def every_other(*paths: Any) -> None:
        if next(calls) % 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(*paths)

    def work(thread: int) -> None:
        try:
            for n in range(15):
                cache.put(key(100 * thread + n), {"n": n})
                assert cache.get(key(100 * thread + n)) is not None
                cache.entries()
        except BaseException as error:
            failures.append(error)

    monkeypatch.setattr(os, "replace", every_other)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        with warned("cannot be written (No space left on device)"):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
    monkeypatch.undo()
    cache.put(key(999), {})
    assert channels(Cache(tmp_path)) == [*(100 * t + n for t in range(4) for n in range(15)), 999]


def run_as_program(*arguments: object) -> None:
    command = [sys.executable, __file__, *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_eight_processes_lose_nothing(tmp_path: Path) -> None:
    run_as_program("crowd", tmp_path, 8, 15)
    assert channels(Cache(tmp_path)) == [100 * process + n for process in range(8) for n in range(15)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [H200, f"{H200}.lock"]


def test_kill_9_loses_nothing_that_was_put(tmp_path: Path) -> None:
    run_as_program("campaign", tmp_path, 15)


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_kill_9_between_the_steps_of_a_write(tmp_path: Path, step: str) -> None:
    Cache(tmp_path).put(key(1), {})
    before = (tmp_path / H200).read_bytes()
    run_as_program("die", tmp_path, step)
    assert (tmp_path / H200).read_bytes() == before
    assert len(list(tmp_path.glob(".*.tmp"))) == 1
    Cache(tmp_path).put(key(2), {})  # the lock is free, and what the dead one left is swept up
    assert channels(Cache(tmp_path)) == [1, 2]
    assert not list(tmp_path.glob(".*.tmp"))


def fork(work: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException as error:
        os.write(2, f"{error!r}\n".encode())
        os._exit(1)
    os._exit(0)


def crowd(directory: Path, processes: int, puts: int) -> None:
    def write(process: int) -> None:
        cache = Cache(directory)
        for n in range(puts):
            cache.put(key(100 * process + n), {"text": "x" * 500})

    children = [fork(lambda process=process: write(process)) for process in range(processes)]  # type: ignore[misc]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * processes


def campaign(directory: Path, kills: int) -> None:
    """Kills two writers a round, and asks after each round for everything that a put() returned from."""
    rng = random.Random(os.getpid())
    acknowledged = os.open(directory / "acknowledged", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def write(start: int) -> None:
        cache = Cache(directory)
        for n in range(start, start + 1000):
            cache.put(key(n), {"text": "x" * 20_000})
            os.write(acknowledged, f"{n}\n".encode())

    for kill in range(kills):
        children = [fork(lambda start=1000 * (2 * kill + i): write(start)) for i in (0, 1)]  # type: ignore[misc]
        for child in children:
            time.sleep(rng.uniform(0.02, 0.15))
            os.kill(child, signal.SIGKILL)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
        promised = set(map(int, (directory / "acknowledged").read_text().split()))
        lines = (directory / H200).read_text().splitlines() if promised else []
        kept = {json.loads(line)["key"]["channels"] for line in lines}
        assert promised <= kept, f"lost after {kill} kills: {promised - kept}"
        assert kept <= set(channels(Cache(directory)))
    assert len(promised) > kills, "the writers hardly wrote: the campaign shows nothing"
    assert not list(directory.glob("*.damaged-*"))


def die(directory: Path, step: str) -> None:
    """Dies by SIGKILL at one step of a write."""

    def write() -> None:
        setattr(os, step, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
        Cache(directory).put(key(2), {})

    assert os.waitpid(fork(write), 0)[1] == signal.SIGKILL


# The helpers that others use.


def test_default_directory(fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_directory() == fresh_cache == Cache().directory
    assert stat.S_IMODE(fresh_cache.stat().st_mode) == 0o700
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("G3DSWAP_CACHE_DIR", "~/mine")
    assert default_directory() == tmp_path / "mine"
    monkeypatch.delenv("G3DSWAP_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert default_directory() == tmp_path / "xdg" / "g3dswap"
    (tmp_path / "file").touch()
    monkeypatch.setenv("G3DSWAP_CACHE_DIR", str(tmp_path / "file" / "x"))
    assert default_directory() == tmp_path / "file" / "x"  # the first put says that it cannot be made


def test_atomic_write_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    atomic_write_text(path, "one\n")
    atomic_write_text(path, "two \N{GREEK SMALL LETTER MU}\n")
    assert path.read_bytes() == "two \N{GREEK SMALL LETTER MU}\n".encode()
    monkeypatch.setattr(os, "replace", fail(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        atomic_write_text(path, "three")
    assert path.read_text(encoding="utf-8").startswith("two")
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_strict_json() -> None:
    assert strict_json('{"a": [1, 2.5, null, true, "x"]}') == {"a": [1, 2.5, None, True, "x"]}
    for text in ("NaN", "-Infinity", "1e999", "[" * 33 + "]" * 33, "[" * 100_000, "", "{'a': 1}"):
        with pytest.raises(ValueError):
            strict_json(text)


def test_entry_times_compare_with_and_without_a_zone() -> None:
    naive = Entry({}, {}, "2026-01-01T00:00:00")
    assert naive.when == Entry({}, {}, "2026-01-01T01:00:00+01:00").when


if __name__ == "__main__":
    task, folder, *rest = sys.argv[1:]
    if task == "die":
        die(Path(folder), *rest)
    elif task == "crowd":
        crowd(Path(folder), *map(int, rest))
    else:
        campaign(Path(folder), *map(int, rest))
