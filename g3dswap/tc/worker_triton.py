"""The process that prints GPU kernels and compiles them, without a GPU, without PyTorch and without NumPy.

It is sent recipes, one at a time.  For Triton a printed kernel has to be a file that stays: its name is in
the compiled kernel, where debuggers and profilers look for the lines.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import json
import math
import os
import tempfile
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

from ..errors import CompileError, ScheduleError, described
from .children import Message, serve
from .compile_cuda import cubin
from .nest import Nest
from .print_cuda import is_cuda, shared_bytes
from .recipe import read
from .source import source
from .triton_text import parts

try:
    import triton
except ImportError:
    triton = None

POINTERS = {"float32": "*fp32", "float64": "*fp64", "float16": "*fp16", "bfloat16": "*bf16"}
ALIGNED = [["tt.divisibility", 16]]  # the attribute of an argument that 16 divides
EMPTY = """import triton
import triton.language as tl

@triton.jit(do_not_specialize=["batch"])
def kernel({}, early: tl.constexpr = False):
    pass
"""
WAITING = 90
"""The architecture from which on a kernel can be launched before the one before it has ended, for which it
waits."""
SUFFIXES = {"cuda": ".cubin", "hip": ".hsaco"}  # of a backend's binaries

Target = tuple[str, Any, int]
"""Backend, architecture, lanes of a warp."""


def main(fd: int) -> None:
    if triton is not None:
        _hasten()
    serve(fd, answer)


def _hasten() -> None:
    """Leave out what takes Triton time and serves nobody here; kernels are the same without it."""
    triton.knobs.compilation.store_binary_only = True
    # Triton would look for what it compiled before, in an empty folder, under a hash of all its own code.
    triton.compiler.compiler.get_cache_key = lambda *_, **__: "kernel"
    gc.freeze()
    gc.set_threshold(100_000)  # a syntax tree has ten thousands of objects that all stay to the end


def answer(request: Message) -> Message:
    """Print the kernel of a `recipe` into the file `printed`, and leave its binary and metadata in `scratch`.

    Where the schedule has no such kernel, the answer is why it is `refused`.
    """
    nest, schedule, target = read(request["recipe"])
    scratch, printed = Path(request["scratch"]), Path(request["printed"])
    try:
        text = source(nest, schedule, "triton")
    except ScheduleError as error:
        return {"refused": str(error)}
    written = scratch / "printed"
    written.write_text(text, encoding="utf-8")
    os.replace(written, printed)
    types, warps = argument_types(nest), schedule.hint("warps", 4)
    if is_cuda(schedule):
        _compile_cuda(text, types, target, warps, scratch)
    else:
        options = {"num_warps": warps, "num_stages": schedule.hint("stages", 2)}
        single = is_single(nest, warps * target[2])
        _compile_triton(printed, types, target, options, single, scratch)
    return {}


def argument_types(nest: Nest) -> tuple[str, ...]:
    """The types of a kernel's arguments: pointers, aligned to 16 bytes, and the batch, any integer."""
    result = nest.tensor(nest.output.tensor).dtype
    compute = "float64" if result == "float64" else "float32"
    dtypes = [nest.tensor(name).dtype for name in nest.operands]
    dtypes.append(compute if nest.partial_counts else result)
    return (*(POINTERS[name] for name in dtypes), "i32")


def is_single(nest: Nest, threads: int) -> bool:
    """Whether no thread has two elements that one load could bring, so that they need not be laid out.

    Those of a tensor lie in aligned pairs only if all its steps are even.
    """
    if any(loop.bind == "depth" for loop in nest.loops):
        return False
    lanes = [loop for loop in nest.loops if loop.bind == "lanes"]
    if math.prod(loop.count or 1 for loop in lanes) <= threads:
        return True
    along = frozenset[str]().union(*(parts(nest, loop.axis) for loop in lanes))
    spread = [nest.tensor(access.tensor) for access in nest.accesses if access.axes & along]
    return not any(
        all(step % 2 == 0 for extent, step in zip(tensor.shape, tensor.strides) if extent != 1 and step != 1)
        for tensor in spread
    )


def begins_early(target: Target) -> bool:
    """Whether kernels for a GPU are launched before the one before them has ended."""
    backend, arch, _ = target
    return backend == "cuda" and arch >= WAITING and hasattr(triton.language.extra.cuda, "gdc_wait")


def import_kernel(path: Path) -> Any:
    """The kernel in a printed module. CompileError: the file is no such module."""
    name = f"g3dswap_kernel_{path.stem}"
    loader = _SourceLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    try:
        loader.exec_module(module)
    except Exception as error:
        raise CompileError(f"the printed kernel {path} cannot be imported: {described(error)}") from error
    return module.kernel


class _SourceLoader(SourceFileLoader):
    """Compiles the text that was verified, never a cached bytecode file beside it."""

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code


def ast_source(kernel: Any, types: Sequence[str], early: bool) -> Any:
    """What Triton compiles: the kernel with types and attributes of its arguments, and whether it waits."""
    attributes = {(i,): ALIGNED for i, name in enumerate(types) if name.startswith("*")}
    signature = dict(zip(kernel.arg_names, (*types, "constexpr")))
    return triton.compiler.ASTSource(kernel, signature, {"early": early}, attributes)


def _compile_triton(
    path: Path, types: Sequence[str], target: Target, options: dict[str, int], single: bool, scratch: Path
) -> None:
    _lay_out(not single)
    triton.knobs.cache.dir = str(scratch)
    early = begins_early(target)
    what = ast_source(import_kernel(path), types, early)
    options = {**options, **({"launch_pdl": True} if early else {})}
    try:
        made = triton.compile(what, target=triton.backends.compiler.GPUTarget(*target), options=options)
    except triton.CompilationError as error:
        first, *_, last = str(error).strip().splitlines()  # where, the kernel as far as that, and why
        raise CompileError(f"{first} {last}") from error
    for suffix in (".json", SUFFIXES[target[0]]):
        (found,) = (path for name, path in made.metadata_group.items() if name.endswith(suffix))
        os.replace(found, scratch / f"kernel{suffix}")


@functools.cache
def _coalesce() -> Any:
    """Triton's own pass of that name; None where it has none."""
    return getattr(triton._C.libtriton.passes.ttgpuir, "add_coalesce", None)


def _lay_out(wanted: bool) -> None:
    """Whether Triton looks for the layout in which a thread's elements lie side by side in memory.

    The time of this pass grows with the square of the accesses: nine of the 10 s in which a large tile
    compiles.  Where a thread has one element, the order of the lanes is the layout: nothing is to be found.
    """
    if own := _coalesce():
        triton._C.libtriton.passes.ttgpuir.add_coalesce = own if wanted else lambda manager: None


def _compile_cuda(text: str, types: tuple[str, ...], target: Target, warps: int, scratch: Path) -> None:
    """Triton loads and launches the kernel as one of its own: as it would a kernel that does nothing."""
    backend, arch, _ = target
    if backend != "cuda":
        raise CompileError(f"CUDA C++ kernels are for NVIDIA's GPUs, not for {backend}.")
    known = _said_of_an_empty_kernel(types, target)
    own = {"name": "kernel", "shared": shared_bytes(text), "num_warps": warps}
    (scratch / "kernel.json").write_text(json.dumps({**known, **own}), encoding="utf-8")
    (scratch / f"kernel{SUFFIXES[backend]}").write_bytes(cubin(text, arch))


@functools.cache
def _said_of_an_empty_kernel(types: tuple[str, ...], target: Target) -> dict[str, Any]:
    """Triton's metadata of a kernel with arguments of these types."""
    names = [*(f"a{i}" for i in range(len(types) - 1)), "batch"]
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        empty = scratch / "empty.py"
        empty.write_text(EMPTY.format(", ".join(names)), encoding="utf-8")
        _compile_triton(empty, types, target, {"num_warps": 1}, True, scratch)
        known: dict[str, Any] = json.loads((scratch / "kernel.json").read_text(encoding="utf-8"))
    return known
