"""A workload whose kernels run in another process.

`RemoteWorkload` is to the tuner what `PassWorkload` is, but here nothing runs: kernels are compiled, and
the process of `trials.py` loads, times and checks them.  If a kernel crashes that process, hangs it or
poisons its CUDA context, the trial has failed, the next one starts a new process, and the search goes on.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from . import comprehensions
from .choice import problem_to_json
from .errors import ProcessError
from .problem import Problem
from .tc import kernel
from .tc.children import Child, Message
from .tc.objects import folder
from .tc.schedule import Schedule
from .tc.space import Space
from .tc.timing import Timing
from .tc.trial import Check, Workload
from .trials import settings
from .workload import PassWorkload

START_SECONDS = 180.0  # for a process to start, make its operands, and compute the reference
TRIAL_SECONDS = 20.0  # for loading a kernel and one check of it, or one timing beside the seconds it is given

_process: Child | None = None  # kept over problems: its start takes seconds


class RemoteWorkload:
    """A `tc.tuner.Workload`: tunes one problem at one batch size, in the trial process.

    A candidate is its schedule, None PyTorch's kernel.  The constructor only starts what takes time;
    whatever is wrong with the problem is raised by the first timing.
    """

    baseline: Schedule | None = None

    def __init__(self, problem: Problem, batch: int, seed: int = 0, patience: float = TRIAL_SECONDS) -> None:
        self.problem, self.patience = problem, patience
        self.nest, self.target = comprehensions.nest(problem), kernel.target_of(problem.device)
        self.space = Space(self.nest, self.target, torch.get_num_threads(), batch)
        self.settings = {**settings(problem), "objects": str(folder().parent)}
        self._opening: Message = {
            "request": "open",
            "problem": problem_to_json(problem),
            "batch": batch,
            "seed": seed,
            "settings": self.settings,
        }
        self._child: Child | None = None
        self._is_open = False
        self._begin()

    def build(self, schedule: Schedule, timeout: float) -> Schedule:
        """Compile a schedule, without loading it; errors are those of `tc.kernel.build`."""
        on_device = contextlib.nullcontext() if self.settings["device"] is None else self._on_device()
        with on_device:  # a thread that builds has a current device of its own
            kernel.prepare(self.nest, schedule, self.target, timeout)
        return schedule

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.device(self.settings["device"])

    def check(self, candidate: Schedule | None) -> Check:
        assert candidate
        answer = self._ask({"request": "check", "schedule": candidate.to_json()}, self.patience)
        return Check(**answer)

    def time(self, candidate: Schedule | None, seconds: float, above: float | None = None) -> Timing:
        schedule = candidate.to_json() if candidate else None
        request = {"request": "time", "schedule": schedule, "seconds": seconds, "above": above}
        # PyTorch's kernel may be slow, but it does not hang.
        limit = self.patience + 10 * seconds if candidate else START_SECONDS
        return Timing(**self._ask(request, limit))

    def close(self) -> None:
        """Free the memory of the operands; the process stays for the next problem, for a while."""
        if self._is_open and self._child and self._child.usable:
            with contextlib.suppress(ProcessError, TimeoutError):  # then it is gone, and so is the memory
                self._child.ask({"request": "close"}, self.patience)
        elif self._child:
            self._child.kill()
        self._child, self._is_open = None, False

    def _begin(self) -> None:
        """Have the problem opened, without waiting for it."""
        global _process
        if _process is None or not _process.usable:
            if _process:
                _process.kill()
            _process = Child("g3dswap.trials", "runs trials", whole=True)
        self._child, self._is_open = _process, False
        self._child.send(self._opening)

    def _ask(self, request: Message, seconds: float) -> Message:
        """An answer of the process, in which the problem is opened first if need be.

        ProcessError: it ended, or could not go on.  TimeoutError: it did not answer, and was ended.
        RuntimeError: what happened in it.
        """
        if self._child is None or not self._child.usable:
            self._begin()
        assert self._child
        if not self._is_open:
            self._receive(START_SECONDS)
            self._is_open = True
        self._child.send(request)
        return self._receive(seconds)

    def _receive(self, seconds: float) -> Message:
        assert self._child
        answer = self._child.receive(seconds)
        if "failed" in answer:
            if "fatal" in answer:
                self._child.kill()
                raise ProcessError(f"the process that runs trials had to be ended: {answer['failed']}")
            raise RuntimeError(answer["failed"])
        return answer


@contextlib.contextmanager
def opened(problem: Problem, batch: int) -> Iterator[Workload[Schedule, Any]]:
    """The problem as the tuner sees it, in this process or in another; its memory is freed at the end."""
    if not runs_apart(problem):
        yield PassWorkload(problem, batch)
        return
    with contextlib.closing(RemoteWorkload(problem, batch)) as workload:
        yield workload


def runs_apart(problem: Problem) -> bool:
    """Whether trials of a problem belong into a process of their own.

    A CUDA kernel with a bad address makes the context useless for everybody in its process, and one that
    hangs cannot be stopped.  On a CPU the search is not worth the start of another process.
    """
    return problem.device == "cuda"


def _forked() -> None:
    global _process
    _process = None


os.register_at_fork(after_in_child=_forked)
