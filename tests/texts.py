"""A worker for the tests of `g3dswap.tc.compile_triton` that compiles any text: the name of the nest.

A text that is `ENDLESS` is never printed to its end.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

from g3dswap.tc import compile_triton, worker_triton
from g3dswap.tc.compile_triton import Job
from g3dswap.tc.nest import Nest
from g3dswap.tc.schedule import Schedule

ENDLESS = "endless"


def _text(nest: Nest, schedule: Schedule, target: str) -> str:
    while nest.name == ENDLESS:
        time.sleep(1)
    return nest.name


def main(fd: int) -> None:
    with mock.patch.object(worker_triton, "source", _text):
        worker_triton.main(fd)


def of_text(job: Job, text: str) -> Job:
    """The job of compiling a text, for all else like another one."""
    return replace(job, nest=replace(job.nest, name=text, _by_name={}))


@contextlib.contextmanager
def workers(module: str = __name__) -> Iterator[Any]:
    """Workers for these jobs, or the usual ones, but others than those that the process has."""
    own = compile_triton._Workers(module)
    with mock.patch.object(compile_triton, "_workers", own):
        yield own
    for worker in own.idle:
        worker.kill()
