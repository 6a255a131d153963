"""Other processes for tests: two ranks, or ones in which something may happen.

The latter are forked from a server which has imported g3dswap, and hurry.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from g3dswap import choose
from g3dswap.tc.trial import TunerConfig

CONFIG = TunerConfig(
    trials=3,
    generations=2,
    population=2,
    elites=1,
    mutation_rate=1.0,
    seconds=3.0,
    build_timeout=3.0,
    workers=2,
    sample_seconds=0.001,
    final_rounds=1,
)
"""So quick that a process which is killed has stored something before."""
LONGEST = 120.0  # seconds that any process may take

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["g3dswap.cli", "g3dswap.verify"])


@dataclass
class Outcome:
    """What a process has sent before it ended, and how it ended."""

    sent: list[Any] = field(default_factory=list)
    code: int | None = None


def started(task: Callable[..., None], cache: Path, *arguments: Any) -> tuple[Any, Connection]:
    here, there = _context.Pipe()
    process = _context.Process(target=_run, args=(there, task, str(cache), arguments))
    process.start()
    there.close()
    return process, here


def _run(there: Connection, task: Callable[..., None], cache: str, arguments: tuple[Any, ...]) -> None:
    os.environ["G3DSWAP_CACHE_DIR"] = cache
    torch.set_num_threads(1)
    hurry(CONFIG)
    try:
        task(there.send, *arguments)
    except BaseException:
        there.send({"failed": traceback.format_exc()})
        raise


def hurry(config: TunerConfig) -> None:
    """Let tuning cost no more than this."""

    def preset(target: str = "cpp") -> TunerConfig:
        return config

    choose.CONFIGS = dict.fromkeys(choose.CONFIGS, preset)


def finished(process: Any, connection: Connection, seconds: float = LONGEST) -> Outcome:
    """Wait for the end of a process; one that takes longer is killed, which its exit code tells."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join(10)
    outcome = Outcome(code=process.exitcode)
    with contextlib.suppress(EOFError, OSError):
        while connection.poll():
            outcome.sent.append(connection.recv())
    for message in outcome.sent:
        assert not (isinstance(message, dict) and "failed" in message), message["failed"]
    return outcome


def call(task: Callable[..., None], cache: Path, *arguments: Any) -> Any:
    """What a process that must end well has sent at last."""
    outcome = finished(*started(task, cache, *arguments))
    assert outcome.code == 0, f"{task.__name__} ended with {outcome.code}"
    return outcome.sent[-1]


def alone(task: Callable[[], None]) -> None:
    """Call a function of a module in a new Python, which has to end well."""
    code = f"from {task.__module__} import {task.__name__}; {task.__name__}()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def left_running(cache: Path) -> list[str]:
    """The command lines of processes that work for this cache folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found += [words] * (str(cache) in words and int(path.parent.name) != os.getpid())
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.05)


# Ranks.


def ranks(
    target: Callable[..., None],
    directory: Path,
    *arguments: Any,
    answers: int = 2,
    codes: tuple[int, int] = (0, 0),
    meanwhile: Callable[[], None] = lambda: None,
) -> list[Any]:
    """What two processes put into a queue, in that order; they must end with these codes.

    Each calls ``target(rank, directory, queue, *arguments)``; ``meanwhile`` is called after the first answer.
    """
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    processes = [
        context.Process(target=target, args=(rank, str(directory), results, *arguments)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=LONGEST)]
    meanwhile()
    found += [results.get(timeout=LONGEST) for _ in range(answers - 1)]
    for process, code in zip(processes, codes, strict=True):
        process.join(60)
        assert process.exitcode == code
    return found
