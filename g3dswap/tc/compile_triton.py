"""Has GPU kernels printed and compiled by worker processes.

A process of its own can be stopped when it takes too long, may crash, and does not share a GIL with the
others.  What is compiled stays in the folder of compiled objects: binary and metadata, each sealed, under a
name that is known before anything is printed.  worker_triton.py is the other side.
"""

from __future__ import annotations

import functools
import os
import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ..errors import CompileError, NoCompilerError, ProcessError, ScheduleError
from . import worker_triton
from .builds import cores
from .children import Child, Message
from .nest import Nest
from .objects import digest, folder, intact, seal, workshop
from .print_cuda import is_cuda
from .recipe import recipe
from .schedule import Schedule
from .worker_triton import SUFFIXES, Target, argument_types

try:
    import triton
except ImportError:
    triton = None


@dataclass(frozen=True)
class Job:
    """The kernel of a scheduled nest and its schedule, for a target."""

    nest: Nest
    schedule: Schedule
    target: Target

    @functools.cached_property
    def recipe(self) -> str:
        """What a worker is sent."""
        return recipe(self.nest, self.schedule, self.target)

    @property
    def name(self) -> str:
        """The name of the compiled object: of all that it depends on."""
        assert triton is not None
        settings = triton._C.libtriton.get_cache_invalidating_env_vars()
        return digest(self.recipe, triton.__version__, *(f"{k}={settings[k]}" for k in sorted(settings)))


def compiled(job: Job, timeout: float) -> dict[str, str]:
    """The files of the compiled kernel, as a `CompiledKernel` of Triton takes them.

    ScheduleError: there is no such kernel.  CompileError: its compiler refuses it, or a worker died of it,
    or it took longer than `timeout` seconds (the cause is then a TimeoutError).  What was compiled before, by
    any process, is only looked up.
    """
    name, place = job.name, folder()
    files = {f"kernel{suffix}": place / f"{name}{suffix}" for suffix in (".json", SUFFIXES[job.target[0]])}
    if not all(intact(path) for path in files.values()):
        compiler, suffix = ("NVRTC", ".cu") if is_cuda(job.schedule) else ("Triton", ".py")
        with workshop(place) as scratch:
            printed = str(place / f"{name}{suffix}")
            request = {"recipe": job.recipe, "printed": printed, "scratch": str(scratch)}
            _ask_worker(request, compiler, timeout)
            for made, path in files.items():
                os.replace(scratch / made, path)
                seal(path)
    return {made: str(path) for made, path in files.items()}


def loaded(job: Job, files: dict[str, str]) -> Any:
    """Triton's `CompiledKernel`, from the files that `compiled` gave; the printed module is not imported."""
    assert triton is not None
    # Of what was compiled, a launcher needs the types only; to import it for them takes longer than the rest.
    signature = {str(i): name for i, name in enumerate(argument_types(job.nest))}
    stand_in = SimpleNamespace(signature=signature, constants={})
    return triton.compiler.CompiledKernel(stand_in, files, job.name)


def _ask_worker(request: Message, compiler: str, timeout: float) -> None:
    with _workers.places:
        worker = _workers.take()
        try:
            answer = worker.ask(request, timeout)
        except TimeoutError as error:
            what = f"{compiler} took longer than {timeout:g} s for one kernel; it is left out."
            raise CompileError(what) from error
        except ProcessError as error:
            raise CompileError(f"{compiler} crashed on a kernel, which is left out: {error}") from error
        _workers.give(worker)
    if "refused" in answer:
        raise ScheduleError(answer["refused"])
    if "failed" in answer:
        raise CompileError(f"{compiler} cannot compile a kernel: {answer['failed']}")


class _Workers:
    """The idle workers; there are never more than cores."""

    def __init__(self, module: str = worker_triton.__name__) -> None:
        self.module = module
        self.idle: list[Child] = []
        self.places = threading.BoundedSemaphore(cores())
        self.taking = threading.Lock()

    def take(self) -> Child:
        with self.taking:  # or two threads would want the last idle one
            while self.idle:
                worker = self.idle.pop()
                if worker.usable:
                    return worker
                worker.kill()
        return self.start()

    def start(self) -> Child:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        # Nothing that it does may touch a device, where a context would cost memory and seconds.
        environment["CUDA_VISIBLE_DEVICES"] = ""
        try:
            return Child(self.module, "compiles Triton kernels", whole=False, environment=environment)
        except ProcessError as error:
            raise NoCompilerError(str(error)) from error

    def give(self, worker: Child) -> None:
        self.idle.append(worker)


_workers = _Workers()


def _forked() -> None:
    global _workers
    _workers = _Workers()


os.register_at_fork(after_in_child=_forked)
