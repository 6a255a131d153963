"""Imports printed Triton kernels, compiles them for the current GPU and launches them.

With TRITON_INTERPRET=1 in the environment before Triton is imported, kernels run on CPU tensors in
Triton's interpreter, slowly; this is how they are tested without a GPU.
"""

from __future__ import annotations

import importlib.util
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

import torch

from ..errors import CompileError, NoCompilerError, ScheduleError
from .nest import Nest
from .objects import digest, folder, intact, seal
from .schedule import Schedule

try:
    import triton
except ImportError:
    triton = None

MAX_PROGRAMS = 2**31 - 1

Launch = Callable[[Sequence[torch.Tensor], torch.Tensor, int], None]


def version() -> str:
    """Triton's version, "none" without it."""
    return "none" if triton is None else str(triton.__version__)


def require() -> None:
    """NoCompilerError: there is no Triton."""
    if triton is None:
        raise NoCompilerError("kernels for this device need Triton, which is missing; pip install triton.")


def load(nest: Nest, schedule: Schedule, source: str, timeout: float) -> Launch:
    """The launch function of a printed kernel, compiled for the current device.

    NoCompilerError: no Triton or no GPU.  CompileError: the kernel does not compile.
    """
    del timeout  # Triton compiles in this process; a compilation that must be stopped runs in a child
    require()
    kernel = _import(source)
    options = {"num_warps": schedule.hint("warps", 4), "num_stages": schedule.hint("stages", 2)}
    if not isinstance(kernel, triton.JITFunction):
        return _interpreted(kernel, _programs(nest))
    if not torch.cuda.is_available():
        raise NoCompilerError("Triton has no GPU to compile for; set TRITON_INTERPRET=1 to run without one.")
    return _Launcher(nest, kernel, options).launch


def _import(source: str) -> Any:
    """The kernel of a module that is written to, and read back from, the folder of compiled objects."""
    name = digest(source, version())
    path = folder() / f"{name}.py"
    if not intact(path):
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch, path.name)
            made.write_text(source, encoding="utf-8")
            os.replace(made, path)
        seal(path)
    module_name = f"g3dswap_kernel_{name}"
    loader = _SourceLoader(module_name, str(path))
    spec = importlib.util.spec_from_loader(module_name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    try:
        loader.exec_module(module)
    except Exception as error:
        raise CompileError(f"the printed kernel {path} cannot be imported: {_first_line(error)}") from error
    return module.kernel


class _SourceLoader(SourceFileLoader):
    """Compiles the text that was verified, never a cached bytecode file beside it."""

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {text}"


def _programs(nest: Nest) -> Callable[[int], int]:
    """The number of programs for a batch size."""
    counts = [p.count for p in nest.loops if p.bind == "grid"]
    steps = math.prod(c for c in counts if c is not None)
    batched = None in counts

    def programs(batch: int) -> int:
        number = steps * batch if batched else steps
        if number > MAX_PROGRAMS or batch > MAX_PROGRAMS:
            raise ScheduleError(
                f"{nest.name} on a batch of {batch} needs {number} programs, but a grid has at most "
                f"{MAX_PROGRAMS}; use a smaller batch, or a schedule that maps less to the grid."
            )
        return number

    return programs


def _interpreted(kernel: Any, programs: Callable[[int], int]) -> Launch:
    def launch(operands: Sequence[torch.Tensor], out: torch.Tensor, batch: int) -> None:
        number = programs(batch)
        if number:
            # A constexpr, since NumPy has no range over the arrays of one element that integers become.
            kernel[(number,)](*operands, out, triton.language.constexpr(batch))

    return launch


class _Launcher:
    """Launches one kernel with as little Python as can be.

    Triton works out for each launch which of a kernel's compiled variants fits the arguments.  Here that
    is known: all pointers are aligned to 16 bytes, as those of allocations are, or else Triton is asked.
    """

    def __init__(self, nest: Nest, kernel: Any, options: dict[str, int]) -> None:
        self.programs = _programs(nest)
        self.kernel = kernel
        self.options = options
        dtype = getattr(torch, nest.tensors[0].dtype)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        self.dtypes = [dtype] * len(nest.operands) + [compute if nest.partial_loops else dtype]
        self.compiled: dict[int, tuple[Any, ...]] = {}
        self.compile(torch.cuda.current_device())

    def compile(self, device: int) -> tuple[Any, ...]:
        """What a launch on a device needs: the launcher, the function with its metadata, the stream."""
        try:
            with torch.cuda.device(device):
                # A batch of 2, because it must be a plain integer; any other would give the same code.
                compiled = self.kernel.warmup(*self.dtypes, 2, grid=(1,), **self.options)
                stream = triton.runtime.driver.active.get_current_stream
                entry = (compiled.run, compiled.function, compiled.packed_metadata, stream)
        except Exception as error:
            raise CompileError(f"Triton cannot compile a kernel: {_first_line(error)}") from error
        self.compiled[device] = entry
        return entry

    def launch(self, operands: Sequence[torch.Tensor], out: torch.Tensor, batch: int) -> None:
        number = self.programs(batch)
        if not number:
            return
        device = out.get_device()
        if device != torch.cuda.current_device():
            with torch.cuda.device_of(out):
                self.launch(operands, out, batch)
            return
        addresses = out.data_ptr()
        for tensor in operands:
            addresses |= tensor.data_ptr()
        hooks = triton.knobs.runtime
        if addresses % 16 or hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            self.kernel[(number,)](*operands, out, batch, **self.options)
            return
        run, function, metadata, stream = self.compiled.get(device) or self.compile(device)
        run(number, 1, 1, stream(device), function, metadata, None, None, None, *operands, out, batch)
