"""Has kernels compiled for the current GPU, loads and launches them.

With TRITON_INTERPRET=1 in the environment before Triton is imported, kernels run on CPU tensors in
Triton's interpreter, slowly; this is how they are tested without a GPU.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import CompileError, NoCompilerError, ScheduleError, described
from .compile_triton import Job, compiled, loaded
from .launch import Entry, Launch
from .nest import Nest
from .objects import digest, folder, intact, scratch
from .print_cuda import is_cuda
from .recipe import recipe
from .schedule import Schedule
from .source import source
from .words import ALIGNMENT
from .worker_triton import import_kernel

try:
    import triton
except ImportError:
    triton = None

MAX_PROGRAMS = 2**31 - 1
SPECIAL = ("launch_cooperative_grid", "global_scratch_size", "profile_scratch_size")
"""What Triton says of kernels that are not just launched."""

_target_lock = threading.Lock()  # Triton sets its driver up at the first question


def version() -> str:
    """Triton's version, "none" without it."""
    return "none" if triton is None else str(triton.__version__)


def require() -> None:
    """NoCompilerError: there is no Triton."""
    if triton is None:
        raise NoCompilerError("kernels for this device need Triton, which is missing; pip install triton.")


def load(nest: Nest, schedule: Schedule, timeout: float) -> Launch:
    """What launches the kernel of a scheduled nest, compiled for the current device.

    NoCompilerError: no Triton or no GPU.  ScheduleError: there is no such kernel.  CompileError: it does not
    compile, in time.
    """
    require()
    if triton.knobs.runtime.interpret:
        return _Interpreted(import_kernel(_printed(nest, schedule)), Programs(nest))
    return _Launcher(Programs(nest), partial(_job, nest, schedule), timeout)


def prepare(nest: Nest, schedule: Schedule, timeout: float) -> None:
    """Compile a kernel for the current device, for a later `load` here or elsewhere; errors are the same."""
    require()
    if triton.knobs.runtime.interpret:
        _printed(nest, schedule)
    else:
        compiled(_job(nest, schedule), timeout)


def _job(nest: Nest, schedule: Schedule) -> Job:
    """What is to be compiled for the current device."""
    if not torch.cuda.is_available():
        raise NoCompilerError("Triton has no GPU to compile for; set TRITON_INTERPRET=1 to run without one.")
    with _target_lock:
        found = triton.runtime.driver.active.get_current_target()
    return Job(nest, schedule, (found.backend, found.arch, found.warp_size))


def _printed(nest: Nest, schedule: Schedule) -> Path:
    """The file of a printed kernel in the folder of compiled objects, where the interpreter finds it."""
    if is_cuda(schedule):
        raise CompileError("Triton's interpreter runs no CUDA C++.")
    path = folder() / f"{digest(recipe(nest, schedule, 'interpreter'), version())}.py"
    if not intact(path):
        text = source(nest, schedule, "triton")
        with scratch(path) as made:
            made.write_text(text, encoding="utf-8")
    return path


def _is_watched() -> bool:
    """Whether somebody has asked Triton to tell of launches."""
    hooks = triton.knobs.runtime
    return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)


class Programs:
    """The number of programs for a batch size."""

    def __init__(self, nest: Nest) -> None:
        self.name, self.steps, self.blocks = nest.name, nest.programs, nest.blocks

    def __call__(self, batch: int) -> int:
        number = self.steps * (self.blocks.number(batch) if self.blocks else 1)
        if number > MAX_PROGRAMS or batch > MAX_PROGRAMS:
            raise ScheduleError(
                f"{self.name} on a batch of {batch} needs {number} programs, but a grid has at most "
                f"{MAX_PROGRAMS}; use a smaller batch, or a schedule that maps less to the grid."
            )
        return number


class _Interpreted:
    """Runs one kernel in Triton's interpreter."""

    def __init__(self, kernel: Any, programs: Programs) -> None:
        self.kernel = kernel
        self.programs = programs

    def __call__(self, operands: Sequence[torch.Tensor], out: torch.Tensor, batch: int) -> None:
        number = self.programs(batch)
        if number:
            # A constexpr, since NumPy has no range over the arrays of one element that integers become.
            self.kernel[(number,)](*operands, out, triton.language.constexpr(batch))

    def entry(self) -> Entry | None:
        return None


class _Launcher:
    """Launches one kernel with as little Python as can be.

    Triton works out for each launch which of a kernel's compiled variants fits the arguments.  Here that
    is known: all pointers are aligned, as those of allocations are; of a view that is not, a copy is taken.
    """

    def __init__(self, programs: Programs, job: Callable[[], Job], timeout: float) -> None:
        self.programs = programs
        self.job = job
        self.timeout = timeout
        self.compiled: dict[int, tuple[Any, ...]] = {}
        self.compile(torch.cuda.current_device())

    def compile(self, device: int) -> tuple[Any, ...]:
        """What a launch on a device needs: the launcher, the function with its metadata, the stream.

        And the whole, for launches that are watched.
        """
        with torch.cuda.device(device):
            job = self.job()
            files = compiled(job, self.timeout)
            try:
                made = loaded(job, files)
                stream = triton.runtime.driver.active.get_current_stream
                entry = (made.run, made.function, made.packed_metadata, stream, made)
            except Exception as error:
                raise CompileError(f"Triton cannot load a kernel: {described(error)}") from error
        self.compiled[device] = entry
        return entry

    def entry(self) -> Entry | None:
        device = torch.cuda.current_device()
        function, made = operator.itemgetter(1, 4)(self.compiled.get(device) or self.compile(device))
        meta = made.metadata
        # What a launch of these needs, only Triton knows; and whoever watches launches is to see them.
        special = any(getattr(meta, name, 0) for name in SPECIAL) or meta.num_ctas != 1
        if torch.version.hip or special or _is_watched():
            return None
        threads = meta.num_warps * meta.target.warp_size
        most = self.programs.blocks.most if self.programs.blocks else 0
        early = bool(getattr(meta, "launch_pdl", False))
        return Entry(function, self.programs.steps, most, threads, meta.shared, early)

    def __call__(self, operands: Sequence[torch.Tensor], out: torch.Tensor, batch: int) -> None:
        number = self.programs(batch)
        if not number:
            return
        device = out.get_device()
        if device != torch.cuda.current_device():
            with torch.cuda.device_of(out):
                self(operands, out, batch)
            return
        addresses = [tensor.data_ptr() for tensor in (*operands, out)]
        bits = 0
        for address in addresses:
            bits |= address
        if bits % ALIGNMENT:
            result = torch.empty_like(out) if out.data_ptr() % ALIGNMENT else out
            self([x.clone() if x.data_ptr() % ALIGNMENT else x for x in operands], result, batch)
            if result is not out:
                out.copy_(result)
            return
        run, function, metadata, stream, made = self.compiled.get(device) or self.compile(device)
        if _is_watched():
            made[(number, 1, 1)](*operands, out, batch)
            return
        # Addresses instead of tensors, for each of which the driver would be asked where it lies.
        run(number, 1, 1, stream(device), function, metadata, None, None, None, *addresses, batch)
