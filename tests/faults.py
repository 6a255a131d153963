"""The fault campaign: what happens to processes, disks, clocks, compilers and kernels costs nothing but time.

``python -m tests.faults --rounds 100`` kills at a hundred random moments, and reports.  The short form is in
``test_faults.py``.  Faults happen in processes that are forked from a server which has imported g3dswap.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import g3dswap
from g3dswap import choose, stored
from g3dswap.cli import main as command
from g3dswap.errors import G3DSwapWarning
from g3dswap.plan import read_plan
from g3dswap.problem import Geometry, Problem
from g3dswap.tc import entries, objects
from g3dswap.tc.cache import Cache
from tests.apart import CONFIG, call, finished, left_running, started, wait_for
from tests.compilers import COMPILERS, EVERY_OTHER, compiler, use_compiler

FEW = 10  # rounds below which a scenario does less
NOBODY = 65534


# Tuning.


def problems(seed: int, count: int) -> list[Problem]:
    """Small ones; the same seed gives the same."""
    rng = random.Random(seed)
    sizes = [(rng.randint(1, 40), rng.randint(1, 40), rng.randint(1, 40)) for _ in range(count)]
    return [Problem("forward", Geometry(2, 2, 2, size, (1, 1, 1))) for size in sizes]


def tune(send: Callable[[Any], None], seed: int, count: int) -> None:
    """Tune, and send the key of what is stored."""
    warnings.simplefilter("error", G3DSwapWarning)
    chooser = choose.Chooser(stored.open_cache(), progress=False)
    for problem in problems(seed, count):
        chooser.choose(problem)
        send(json.dumps(chooser.key(problem), sort_keys=True))


def timed(work: Callable[[], Any]) -> float:
    """The seconds that it takes."""
    began = time.monotonic()
    work()
    return time.monotonic() - began


def keys(cache: Path) -> set[str]:
    """What a cache holds, all of it whole; a warning is an error."""
    for path in cache.glob("*.jsonl"):
        contents = entries.read(path)
        assert not contents.damaged and not contents.foreign, contents.reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {json.dumps(entry.key, sort_keys=True) for entry in Cache(cache).entries()}


def check_objects(cache: Path) -> None:
    """Compiled objects are what was sealed, or are not used."""
    sealed = [path for path in (cache / "objects").glob("*.so") if objects._seal_path(path).exists()]
    assert all(map(objects.intact, sealed))


def killed_while_tuning(rounds: int, rng: random.Random, folder: Path) -> Counter[str]:
    """kill -9 at random moments: the cache stays whole and keeps what was stored."""
    cache, tally, known = folder / "cache", Counter[str](), set[str]()
    usual = timed(lambda: call(tune, cache, rounds, 2))
    for number in range(rounds):
        process, connection = started(tune, cache, number, 2)
        # Joined and not slept: how long it took tells how long the next ones may be left alone.
        took = timed(functools.partial(process.join, rng.uniform(0.0, 1.1) * usual))
        usual = usual if process.is_alive() else took
        tally["killed" if process.is_alive() else "ended before"] += 1
        process.kill()
        stored = set(finished(process, connection).sent)
        now = keys(cache)
        assert known | stored <= now, f"lost {(known | stored) - now}"
        tally["entries"] = len(now)
        known = now
        check_objects(cache)
    wait_for(lambda: not left_running(cache))
    call(tune, cache, rounds + 1, 1)  # and it goes on
    assert not list(cache.glob(".*.tmp"))
    return tally


def eight_processes(rounds: int, rng: random.Random, folder: Path) -> Counter[str]:
    """Eight processes tune into one cache, of which one is killed: no entry is lost."""
    cache, tally = folder / "shared", Counter[str]()
    for _ in range(max(1, rounds // 25)):
        seeds = [rng.getrandbits(32) for _ in range(7)]
        running = [
            started(tune, cache, seed, 1 if rounds < FEW else 3) for seed in (*seeds, seeds[0])
        ]  # two of them the same
        time.sleep(rng.uniform(0.5, 4.0))
        running[3][0].kill()
        stored: set[str] = set()
        for place, one in enumerate(running):
            outcome = finished(*one)
            assert outcome.code == 0 or place == 3
            stored |= set(outcome.sent)
        assert stored <= keys(cache), f"lost {stored - keys(cache)}"
        tally["entries"] += len(stored)
        tally["processes"] += len(running)
    return tally


# Converting.


class Net(nn.Module):
    """What is converted; the table makes its file large enough to be killed in the middle of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(4, 4, 1)
        self.conv = nn.Conv3d(4, 4, 3, padding=1, groups=4)
        self.register_buffer("table", torch.zeros(4 << 20))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.stem(x))


ARCH = ["--arch", "tests.faults:Net", "--input", "1x4x3x5x6", "--tune", "none", "--quiet"]


def convert_file(send: Callable[[Any], None], source: str, target: str) -> None:
    """The command, as it is called from a terminal; sends its exit code and what it says on stderr."""
    told = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told):
        code = command(["convert", source, "-o", target, *ARCH, "--force"], standalone_mode=False)
    send((code or 0, told.getvalue()))


def weights(path: Path) -> Tensor:
    state = torch.load(path, weights_only=True)
    assert list(state) == list(Net().state_dict())
    return state["conv.weight"]


def killed_while_converting(rounds: int, rng: random.Random, folder: Path) -> Counter[str]:
    """kill -9 at random moments: input, output and plan stay whole, the output is the old or the new one."""
    source, target, cache = folder / "model.pth", folder / "fast.pth", folder / "cache-converting"
    tally, before = Counter[str](), None
    torch.save(Net().state_dict(), source)
    first = str(source), str(folder / "first.pth")
    assert call(convert_file, cache, *first) == (0, "")  # compiles
    usual = timed(lambda: call(convert_file, cache, *first))
    for _ in range(rounds):
        model = Net()
        torch.save(model.state_dict(), source)
        process, connection = started(convert_file, cache, str(source), str(target))
        time.sleep(rng.uniform(0.2, 1.1) * usual)
        process.kill()
        has_ended = (0, "") in finished(process, connection).sent
        assert torch.equal(weights(source), model.conv.weight)
        if target.exists():
            found = weights(target)
            is_new = torch.equal(found, model.conv.weight)
            assert is_new or (before is not None and torch.equal(found, before))
            assert read_plan(target.with_suffix(".plan.json")).choices
            tally["new" if is_new else "old"] += 1
            before = found
        else:
            is_new = False
            tally["none yet"] += 1
        assert is_new or not has_ended
    return tally


# Disks, homes, clocks, compilers, kernels.


def convert_model(send: Callable[[Any], None], prepare: Callable[[], Any]) -> None:
    """Convert for inference under a fault, and run; sends where the choice comes from and what was said."""
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        with contextlib.redirect_stderr(io.StringIO()), prepare() or contextlib.nullcontext():
            model, clip = Net(), torch.randn(1, 4, 3, 5, 6)
            fast = g3dswap.convert(model, clip, min_speedup=1e-6, progress=True)
            torch.testing.assert_close(fast(clip), model(clip))
    report = g3dswap.report(fast)
    calls = [call for row in report.swapped for call in row.calls]
    calls += [call for row in report.kept for call in row.calls]
    sources = sorted({choice.source for call in calls for choice in call.passes})
    send((sources, [str(warning.message) for warning in caught]))


def survived(prepare: Callable[[], Any], cache: Path, *wanted: str) -> tuple[str, ...]:
    """Where the choices of a conversion under a fault come from; what was ``wanted`` was said, and once."""
    sources, said = call(convert_model, cache, prepare)
    assert len(said) == len(wanted), said
    for text in wanted:
        assert sum(text in message for message in said) == 1, said
    return tuple(sources)


def nothing() -> None:
    """No fault."""


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


UNSAVED = "results are kept in memory until this process ends"
FAILED = "could be compiled and run"


def full_disks(rounds: int, rng: random.Random, folder: Path) -> Counter[str]:
    """No room for the cache, the objects, the output; afterwards, with room, it goes on."""
    tally = Counter[str]()
    for number in range(max(1, rounds // 20)):
        cache = folder / f"limit{number}"
        # Too little for an object: the compiler fails, and nothing is to be stored.
        assert survived(functools.partial(limit_files, rng.randrange(4096)), cache, FAILED) == ("native",)
        assert survived(nothing, cache) == ("tuned",)
        tally["limits"] += 1
    with small_disk(folder / "disk") as disk:
        if disk is None:
            tally["no file system of one's own"] += 1
            return tally
        (disk / "full").write_bytes(bytes((1 << 20) - (16 << 10)))
        with contextlib.suppress(OSError), open(disk / "rest", "wb") as rest:
            rest.write(bytes(1 << 20))
        assert survived(nothing, disk / "cache", UNSAVED) == ("tuned",)  # objects go elsewhere
        check_output_on(disk, folder)
        (disk / "full").unlink()
        (disk / "rest").unlink()
        assert survived(nothing, disk / "cache") == ("tuned",)
        assert len(keys(disk / "cache")) == 1
        tally["disks"] += 1
    return tally


def check_output_on(disk: Path, folder: Path) -> None:
    """The command fails with a message and leaves nothing."""
    torch.save(Net().state_dict(), folder / "in.pth")
    before = sorted(disk.rglob("*"))
    code, told = call(convert_file, folder / "cache", str(folder / "in.pth"), str(disk / "out.pth"))
    assert code == 1 and told.startswith("error: ") and "cannot be written" in told and told.count("\n") == 1
    assert sorted(disk.rglob("*")) == before


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Path | None]:
    """A file system of one megabyte; None where this user may not mount one."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def as_nobody(home: Path) -> None:
    """A user who may write nowhere but in the temporary folder."""
    os.environ.pop("G3DSWAP_CACHE_DIR", None)
    os.environ.pop("XDG_CACHE_HOME", None)
    os.environ["HOME"] = str(home)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def read_only_home(rounds: int, rng: random.Random, folder: Path) -> Counter[str]:
    """Nothing can be kept, and all of it is used."""
    home = folder / "home"
    home.mkdir()
    home.chmod(0o555)
    for parent in (folder, *folder.parents):
        if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
    assert survived(functools.partial(as_nobody, home), folder, UNSAVED) == ("tuned",)
    assert list(home.iterdir()) == []
    return Counter(homes=1)


@contextlib.contextmanager
def jumping_clock(seed: int) -> Iterator[None]:
    """Whoever asks for the time of day is told any, within some fifty years."""
    rng, real = random.Random(seed), (time.time, entries.datetime)

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return datetime.datetime.fromtimestamp(time.time(), tz)

    time.time = lambda: rng.uniform(0.0, 2.0e9)
    entries.datetime = Jumping  # type: ignore[misc]
    try:
        yield
    finally:
        time.time, entries.datetime = real  # type: ignore[misc]


def clocks(rounds: int, rng: random.Random, folder: Path) -> Counter[str]:
    """Tuning, storing and finding do not depend on the time of day."""
    tally = Counter[str]()
    for number in range(max(1, rounds // 20)):
        cache = folder / f"clock{number}"
        jumping = functools.partial(jumping_clock, rng.getrandbits(32))
        assert survived(jumping, cache) == ("tuned",)
        assert survived(jumping, cache) == ("cached",)
        Cache(cache).export(folder / "export.jsonl")
        assert Cache(cache).load(folder / "export.jsonl") == len(keys(cache)) == 1
        tally["clocks"] += 1
    return tally


def compilers(rounds: int, rng: random.Random, folder: Path) -> Counter[str]:
    """Whatever the compiler does, PyTorch's kernels run, and one warning says why."""
    tally = Counter[str]()
    # Each within `LONGEST`, or its process is killed, which is a failure.
    for name in COMPILERS if rounds >= FEW else ("hangs", "makes kernels that crash"):
        script = compiler(folder, name, COMPILERS[name])
        patience = 0.5 if name == "hangs" else CONFIG.build_timeout
        use = functools.partial(use_compiler, str(script), patience)
        assert survived(use, folder / f"cache-{script.name}", FAILED) == ("native",)
        tally[name] += 1
    for name, text in (("never answers", "sleep 600"), ("cannot even say its version", "exit 1")):
        use = functools.partial(use_compiler, str(compiler(folder, name, text)))
        assert survived(use, folder / "cache-none", "PyTorch's own kernels run") == ("native",)
        tally[name] += 1
    return tally


def kernels(rounds: int, rng: random.Random, folder: Path) -> Counter[str]:
    """Half of the kernels crash: another one is chosen, and the process lives."""
    use = functools.partial(use_compiler, str(compiler(folder, "every other crashes", EVERY_OTHER)))
    tally = Counter[str]()
    for number in range(max(1, rounds // 20)):
        sources, said = call(convert_model, folder / f"kernels{number}", use)
        assert set(sources) <= {"tuned", "native"} and len(said) <= 1
        for entry in Cache(folder / f"kernels{number}").entries():
            tally.update(entry.value["counts"])
    return tally


SCENARIOS: dict[str, Callable[[int, random.Random, Path], Counter[str]]] = {
    scenario.__name__: scenario
    for scenario in (
        killed_while_tuning,
        killed_while_converting,
        eight_processes,
        full_disks,
        read_only_home,
        clocks,
        compilers,
        kernels,
    )
}


def main() -> int:
    """The long form; the exit code is the number of scenarios that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100, help="how often to kill; others are repeated less")
    parser.add_argument("--only", action="append", choices=SCENARIOS, help="may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    failed = 0
    for name in arguments.only or SCENARIOS:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="g3dswap-faults-") as folder:
            try:
                tally = SCENARIOS[name](arguments.rounds, random.Random(arguments.seed), Path(folder))
                outcome = ", ".join(f"{count} {what}" for what, count in tally.items())
            except Exception:
                failed += 1
                outcome = f"FAILED\n{traceback.format_exc()}"
        print(f"{name:25}{time.monotonic() - began:7.0f} s  {outcome}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
