"""Compiles printed C++ with the system's compiler, has it run once apart, and loads it with ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock

from ..errors import CompileError, NoCompilerError
from . import first_run
from .children import run
from .launch import Entry, Launch
from .nest import Nest
from .objects import digest, folder, intact, scratch
from .recipe import recipe
from .schedule import Schedule
from .source import source

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC", "-w")
VERSION_SECONDS = 30.0
PROGRAM_SECONDS = 20.0
FIRST_RUN_SECONDS = 0.5  # at least, even if compiling took all the time there was

_printing = threading.Lock()


@functools.cache
def _probed(setting: str | None, path: str | None) -> tuple[str, str] | str:
    """The compiler's path and what it says of its version, or why there is none; asked once."""
    command = setting or "c++"
    found = shutil.which(command, path=path)
    if found is None:
        return f"no C++ compiler {command!r} on the PATH; install one (g++ or clang++) or name it in CXX."
    try:
        answer = run([found, "--version"], VERSION_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        return f"the C++ compiler {found} does not run ({error}); name another one in CXX."
    if answer.returncode:
        how = _ended(answer)
        return f"the C++ compiler {found} does not run ({found} --version {how}); name another one in CXX."
    return found, answer.stdout.splitlines()[0] if answer.stdout else found


def _compiler() -> tuple[str, str]:
    found = _probed(os.environ.get("CXX"), os.environ.get("PATH"))
    if isinstance(found, str):
        raise NoCompilerError(found)
    return found


def compiler() -> str:
    """The path of the C++ compiler: $CXX, else c++. NoCompilerError when there is none."""
    return _compiler()[0]


def version() -> str:
    """The compiler's version and the processor it compiles for, "none" without a compiler."""
    try:
        text = _compiler()[1]
    except NoCompilerError:
        return "none"
    return f"{text}; {_processor()}"


@functools.cache
def _processor() -> str:
    """What -march=native depends on: an object made elsewhere may hold instructions this one lacks."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def load(nest: Nest, schedule: Schedule, timeout: float) -> Launch:
    """What launches the kernel of a scheduled nest."""
    return _Launcher(prepare(nest, schedule, timeout), nest)


def prepare(nest: Nest, schedule: Schedule, timeout: float) -> Path:
    """The shared object of a scheduled nest's kernel, compiled unless it was before, and not loaded.

    An object that was compiled has also been run once, in a process of its own.
    """
    command, path = compiler(), path_of(nest, schedule)
    if not intact(path):
        # Threads that print at once all end late. One after another, the first compiles while others print.
        with _printing:
            text = source(nest, schedule, "cpp")
        deadline = time.monotonic() + timeout
        with scratch(path) as made:
            _compile([command, *FLAGS], text, made, timeout)
            program = _first_run_program()
            first_run.check(program, made, nest, max(deadline - time.monotonic(), FIRST_RUN_SECONDS))
    return path


def path_of(nest: Nest, schedule: Schedule) -> Path:
    """Where the shared object of a scheduled nest's kernel is, or will be."""
    return folder() / f"{digest(recipe(nest, schedule, 'cpp'), version(), *FLAGS)}.so"


def _first_run_program() -> Path:
    """The program that runs a kernel for the first time."""
    return built(first_run.SOURCE, first_run.FLAGS, first_run.LIBRARIES, PROGRAM_SECONDS)


def built(source: str, flags: Sequence[str], libraries: Sequence[str], timeout: float, *needs: str) -> Path:
    """What the compiler makes of a source, compiled unless it was before; `needs`: what else it depends on.

    NoCompilerError: there is no compiler.  CompileError: it fails, or takes longer than so many seconds.
    """
    command = compiler()
    path = folder() / digest(source, version(), *flags, *libraries, *needs)
    with contextlib.ExitStack() as turn:
        # One thread of one process compiles. One that is stuck, or a disk without locks, stops nobody.
        with contextlib.suppress(OSError, NotImplementedError):
            turn.enter_context(FileLock(f"{path}.lock").acquire(timeout=timeout))
        if not intact(path):
            with scratch(path) as made:
                _compile([command, *flags], source, made, timeout, libraries)
    return path


def _compile(
    command: Sequence[str], source: str, made: Path, timeout: float, libraries: Sequence[str] = ()
) -> None:
    text = made.with_name("source.cpp")
    text.write_text(source)
    try:
        done = run([*command, str(text), "-o", str(made), *libraries], timeout)
    except subprocess.TimeoutExpired as error:
        raise CompileError(
            f"{command[0]} took longer than {timeout:g} s for one kernel; it is left out."
        ) from error
    except OSError as error:
        raise NoCompilerError(
            f"{command[0]} does not run ({error}); name another compiler in CXX."
        ) from error
    if done.returncode:
        first = (done.stderr.strip().splitlines() or ["no message"])[0]
        raise CompileError(f"{command[0]} {_ended(done)}: {first}")
    if not made.exists():
        raise CompileError(f"{command[0]} made no file and said nothing; name another compiler in CXX.")


def _ended(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"was killed by {signal.Signals(-done.returncode).name}"
    return f"failed with exit code {done.returncode}"


class _Launcher:
    """Launches the kernel in one shared object."""

    def __init__(self, path: Path, nest: Nest) -> None:
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise CompileError(
                f"{path} cannot be loaded ({error}); delete it to have it compiled again."
            ) from error
        self._run = library.run
        self._pointers = ctypes.c_void_p * len(nest.operands)
        self._run.argtypes = [self._pointers, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        self._name, self._blocks = nest.name, nest.blocks

    def __call__(self, operands: Sequence[torch.Tensor], out: torch.Tensor, batch: int) -> None:
        pointers = self._pointers(*[t.data_ptr() for t in operands])
        if self._run(pointers, out.data_ptr(), batch, torch.get_num_threads()):
            raise MemoryError(f"no memory for the buffers of {self._name}; use a smaller batch.")

    def entry(self) -> Entry | None:
        address = ctypes.cast(self._run, ctypes.c_void_p).value or 0
        return Entry(address, self._blocks.others, self._blocks.most) if self._blocks else Entry(address)
