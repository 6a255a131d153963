"""Compiles printed C++ with the system's compiler and loads it with ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..errors import CompileError, NoCompilerError
from .nest import Nest
from .objects import digest, folder, intact, seal
from .schedule import Schedule

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC", "-w")


@functools.cache
def _compiler(setting: str | None, path: str | None) -> tuple[str, str]:
    command = setting or "c++"
    found = shutil.which(command, path=path)
    if found is None:
        raise NoCompilerError(
            f"no C++ compiler {command!r} on the PATH; install one (g++ or clang++) or name it in CXX."
        )
    try:
        answer = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise NoCompilerError(
            f"the C++ compiler {found} does not run ({error}); name another one in CXX."
        ) from error
    return found, answer.stdout.splitlines()[0] if answer.stdout else found


def compiler() -> str:
    """The path of the C++ compiler: $CXX, else c++. NoCompilerError when there is none."""
    return _compiler(os.environ.get("CXX"), os.environ.get("PATH"))[0]


def version() -> str:
    """The compiler's version and the processor it compiles for, "none" without a compiler."""
    try:
        text = _compiler(os.environ.get("CXX"), os.environ.get("PATH"))[1]
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


def load(
    nest: Nest, schedule: Schedule, source: str, timeout: float
) -> Callable[[Sequence[torch.Tensor], torch.Tensor, int], None]:
    """The launch function of a printed kernel."""
    return _bind(prepare(nest, schedule, source, timeout), len(nest.operands), nest.name)


def prepare(nest: Nest, schedule: Schedule, source: str, timeout: float) -> Path:
    """The shared object of a kernel, compiled unless it was before, and not loaded."""
    del nest, schedule  # everything is in the source
    command = compiler()
    name = digest(source, version(), *FLAGS)
    path = folder() / f"{name}.so"
    if not intact(path):
        _compile(command, source, path, timeout)
    return path


def _compile(command: str, source: str, path: Path, timeout: float) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        text, made = Path(scratch, "kernel.cpp"), Path(scratch, path.name)
        text.write_text(source)
        try:
            done = subprocess.run(
                [command, *FLAGS, str(text), "-o", str(made)], capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired as error:
            raise CompileError(
                f"{command} took longer than {timeout:g} s for one kernel; it is left out."
            ) from error
        except OSError as error:
            raise NoCompilerError(
                f"{command} does not run ({error}); name another compiler in CXX."
            ) from error
        if done.returncode:
            first = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise CompileError(f"{command} failed with exit code {done.returncode}: {first}")
        os.replace(made, path)
    seal(path)


def _bind(
    path: Path, operands: int, name: str
) -> Callable[[Sequence[torch.Tensor], torch.Tensor, int], None]:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise CompileError(
            f"{path} cannot be loaded ({error}); delete it to have it compiled again."
        ) from error
    run = library.run
    run.argtypes = [ctypes.c_void_p * operands, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    pointers = ctypes.c_void_p * operands

    def launch(tensors: Sequence[torch.Tensor], out: torch.Tensor, batch: int) -> None:
        if run(pointers(*[t.data_ptr() for t in tensors]), out.data_ptr(), batch, torch.get_num_threads()):
            raise MemoryError(f"no memory for the buffers of {name}; use a smaller batch.")

    return launch
