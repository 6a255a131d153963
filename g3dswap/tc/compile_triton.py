"""Compiles printed GPU kernels in worker processes, without a GPU and without PyTorch.

A process of its own can be stopped when it takes too long, may crash, and does not share a GIL with the
others.  This file is both sides: `compiled` is called by whoever wants a kernel, `main` is the worker.  What
is compiled stays in the folder of compiled objects: binary and metadata, each sealed.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

from ..errors import CompileError, NoCompilerError, ProcessError, described
from .builds import cores
from .children import Child, Message, serve
from .compile_cuda import cubin
from .objects import digest, folder, intact, seal

try:
    import triton
except ImportError:
    triton = None

POINTERS = {"float32": "*fp32", "float64": "*fp64", "float16": "*fp16", "bfloat16": "*bf16"}
ALIGNED = [["tt.divisibility", 16]]  # the attribute of an argument that 16 divides
EMPTY = """import triton

@triton.jit(do_not_specialize=["batch"])
def kernel({}):
    pass
"""
SUFFIXES = {"cuda": ".cubin", "hip": ".hsaco"}  # of a backend's binaries


@dataclass(frozen=True)
class Job:
    """All that a compiled kernel depends on.

    text:     the printed module, which is in the file `path`.
    types:    of the kernel's arguments: pointers, aligned to 16 bytes, and at last the batch, any integer.
    target:   backend, architecture, lanes of a warp.
    options:  Triton's, such as num_warps.
    single:   no thread has elements of a tile that one load could bring, so that they need not be laid out.
    shared:   bytes of shared memory of a kernel in CUDA C++; None: it is a Triton module.
    """

    path: str
    text: str
    types: tuple[str, ...]
    target: tuple[str, Any, int]
    options: dict[str, int]
    single: bool = False
    shared: int | None = None

    @property
    def name(self) -> str:
        """The name of the compiled object."""
        assert triton is not None
        settings = triton._C.libtriton.get_cache_invalidating_env_vars()
        rest = [self.types, self.target, self.options, self.single, settings]
        if self.shared is not None:
            rest.append(self.shared)
        return digest(self.text, triton.__version__, json.dumps(rest, sort_keys=True))


def dtype_pointers(dtypes: Sequence[str]) -> tuple[str, ...]:
    """The types of a kernel's arguments from those of its tensors."""
    return (*(POINTERS[name] for name in dtypes), "i32")


def import_kernel(path: str) -> Any:
    """The kernel in a printed module. CompileError: the file is no such module."""
    name = f"g3dswap_kernel_{Path(path).stem}"
    loader = _SourceLoader(name, path)
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


def source(kernel: Any, types: Sequence[str]) -> Any:
    """What Triton compiles: the kernel with the types and attributes of its arguments."""
    attributes = {(i,): ALIGNED for i, name in enumerate(types) if name.startswith("*")}
    return triton.compiler.ASTSource(kernel, dict(zip(kernel.arg_names, types)), {}, attributes)


def compiled(job: Job, timeout: float) -> dict[str, str]:
    """The files of the compiled kernel, as a `CompiledKernel` of Triton takes them.

    CompileError: its compiler refuses it, or a worker died of it, or it took longer than `timeout` seconds
    (the cause is then a TimeoutError).  What was compiled before, by any process, is only looked up.
    """
    name, place = job.name, folder()
    files = {f"kernel{suffix}": place / f"{name}{suffix}" for suffix in (".json", SUFFIXES[job.target[0]])}
    if not all(intact(path) for path in files.values()):
        with tempfile.TemporaryDirectory(dir=place) as scratch:
            _ask_worker({**asdict(job), "text": "", "scratch": scratch}, timeout)
            for made, path in files.items():
                os.replace(Path(scratch, made), path)
                seal(path)
    return {made: str(path) for made, path in files.items()}


def loaded(job: Job, files: dict[str, str]) -> Any:
    """Triton's `CompiledKernel`, from the files that `compiled` gave; the printed module is not imported."""
    assert triton is not None
    # Of what was compiled, a launcher needs the types only; to import it for them takes longer than the rest.
    signature = {str(i): name for i, name in enumerate(job.types)}
    stand_in = SimpleNamespace(signature=signature, constants={})
    return triton.compiler.CompiledKernel(stand_in, files, job.name)


def _ask_worker(request: Message, timeout: float) -> None:
    compiler = "Triton" if request["shared"] is None else "NVRTC"
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
    if "failed" in answer:
        raise CompileError(f"{compiler} cannot compile a kernel: {answer['failed']}")


def expect(kernels: int) -> None:
    """Say how many are asked for at once: if one has to be compiled, workers for all of them are started.

    A worker takes seconds to start, about as long as it takes to print what the others will ask for.
    """
    _workers.expected = min(kernels, cores())


class _Workers:
    """The idle workers; there are never more than cores."""

    def __init__(self) -> None:
        self.idle: list[Child] = []
        self.places = threading.BoundedSemaphore(cores())
        self.expected = 0
        self.taking = threading.Lock()

    def take(self) -> Child:
        with self.taking:  # or two threads would want the last idle one
            expected, self.expected = self.expected, 0
            self.idle += [self.start() for _ in range(expected - len(self.idle))]
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
            return Child(__name__, "compiles Triton kernels", whole=False, environment=environment)
        except ProcessError as error:
            raise NoCompilerError(str(error)) from error

    def give(self, worker: Child) -> None:
        if len(self.idle) < cores():
            self.idle.append(worker)
        else:  # others were started meanwhile, for those who were expected
            worker.kill()


_workers = _Workers()


def _forked() -> None:
    global _workers
    _workers = _Workers()


os.register_at_fork(after_in_child=_forked)


# In the worker.


def main(fd: int) -> None:
    serve(fd, _compile)


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


def _compile(job: Message) -> Message:
    """Leave the kernel's binary and metadata in the folder `scratch`."""
    if job["shared"] is None:
        _compile_triton(job)
    else:
        _compile_cuda(job)
    return {}


def _compile_triton(job: Message) -> None:
    scratch = job["scratch"]
    _lay_out(not job["single"])
    triton.knobs.cache.dir = scratch
    backend, arch, lanes = job["target"]
    target = triton.backends.compiler.GPUTarget(backend, arch, lanes)
    what = source(import_kernel(job["path"]), job["types"])
    try:
        made = triton.compile(what, target=target, options=job["options"])
    except triton.CompilationError as error:
        first, *_, last = str(error).strip().splitlines()  # where, the kernel as far as that, and why
        raise CompileError(f"{first} {last}") from error
    for suffix in (".json", SUFFIXES[backend]):
        (found,) = (path for name, path in made.metadata_group.items() if name.endswith(suffix))
        os.replace(found, Path(scratch, f"kernel{suffix}"))


def _compile_cuda(job: Message) -> None:
    """Triton loads and launches the kernel as one of its own: as it would a kernel that does nothing."""
    backend, arch, _ = job["target"]
    if backend != "cuda":
        raise CompileError(f"CUDA C++ kernels are for NVIDIA's GPUs, not for {backend}.")
    known = _said_of_an_empty_kernel(tuple(job["types"]), tuple(job["target"]))
    own = {"name": "kernel", "shared": job["shared"], "num_warps": job["options"]["num_warps"]}
    Path(job["scratch"], "kernel.json").write_text(json.dumps({**known, **own}), encoding="utf-8")
    text = Path(job["path"]).read_text(encoding="utf-8")
    Path(job["scratch"], f"kernel{SUFFIXES[backend]}").write_bytes(cubin(text, arch))


@functools.cache
def _said_of_an_empty_kernel(types: tuple[str, ...], target: tuple[str, Any, int]) -> dict[str, Any]:
    """Triton's metadata of a kernel with arguments of these types."""
    names = [*(f"a{i}" for i in range(len(types) - 1)), "batch"]
    with tempfile.TemporaryDirectory() as scratch:
        empty = Path(scratch, "empty.py")
        empty.write_text(EMPTY.format(", ".join(names)), encoding="utf-8")
        same = {"types": types, "target": target, "options": {"num_warps": 1}, "single": True}
        _compile_triton({**same, "path": str(empty), "scratch": scratch})
        known: dict[str, Any] = json.loads(Path(scratch, "kernel.json").read_text(encoding="utf-8"))
    return known
