"""Compiling Triton kernels in worker processes, for a GPU that need not be there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from g3dswap import comprehensions
from g3dswap.errors import CompileError, ProcessError
from g3dswap.problem import Geometry, Problem
from g3dswap.tc import compile_cuda, compile_triton, objects
from g3dswap.tc.compile_triton import Job, compiled, dtype_pointers
from g3dswap.tc.kernel import show
from g3dswap.tc.print_cuda import shared_bytes
from g3dswap.tc.schedule import Schedule
from g3dswap.tc.space_staged import families
from g3dswap.tc.trial import COMPILE_ERROR, COMPILE_TIMEOUT, category
from tests.tc.test_print_cuda import GEOMETRIES, problem_of

triton = pytest.importorskip("triton", reason="needs Triton")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton comes with ptxas on Linux only")

TEXT = """
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["batch"])
def kernel(x, out, batch):
    i = tl.program_id(0) * 16 + tl.arange(0, 16)
    tl.store(out + i, tl.load(x + i, mask=i < batch) * FACTOR, mask=i < batch)
"""
LONG = (
    TEXT.replace("FACTOR", "3")
    + "    acc = i\n    for n in tl.static_range(3000):\n        acc = acc * n + i\n"
)
LONG += "    tl.store(out + i, acc.to(tl.float32), mask=i < batch)\n"


@pytest.fixture(autouse=True)
def own_objects(fresh_cache: Path) -> None:
    """Nothing was compiled before."""


@pytest.fixture(autouse=True)
def own_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    workers = compile_triton._Workers()
    monkeypatch.setattr(compile_triton, "_workers", workers)
    yield
    for worker in workers.idle:
        worker.kill()


def job(factor: int = 2, text: str = TEXT, warps: int = 1) -> Job:
    text = text.replace("FACTOR", str(factor))
    path = objects.folder() / f"{objects.digest(text)}.py"
    path.write_text(text)
    types = dtype_pointers(["float32", "bfloat16"])
    return Job(str(path), text, types, ("cuda", 90, 32), {"num_warps": warps, "num_stages": 1})


def pids() -> list[int]:
    return [worker.pid for worker in compile_triton._workers.idle]


def test_a_kernel_is_compiled_for_a_gpu_that_is_not_here() -> None:
    wanted = job(warps=2)
    files = compiled(wanted, 60)
    assert Path(files["kernel.cubin"]).read_bytes()[:4] == b"\x7fELF"
    assert all(objects.intact(Path(path)) for path in files.values())
    assert Path(files["kernel.cubin"]).parent == objects.folder()
    assert not [path for path in objects.folder().iterdir() if path.is_dir()]  # no rests of the compilation


def test_what_triton_loads_is_what_it_would_have_compiled_itself() -> None:
    """In a process where kernels are no interpreted ones."""
    wanted = job(warps=2)
    files = compiled(wanted, 60)
    program = (
        "import json, sys, triton; from g3dswap.tc import compile_triton as c; path, types, files = "
        "json.loads(sys.argv[1]); source = c.source(c.import_kernel(path), types); "
        "made = c.loaded(c.Job(path, '', types, ('cuda', 90, 32), {}), files); "
        "target = made.metadata.target; "
        "again = triton.compile(source, target=target, options={'num_warps': 2, 'num_stages': 1}); "
        "same = lambda k: {**k.metadata._asdict(), 'hash': ''} | {'size': len(k.kernel)}; "
        "assert same(again) == same(made), (same(again), same(made)); "
        "assert again.asm['ttir'].count('tt.divisibility = 16') == 2; "
        "print(target.arch, made.metadata.num_warps, made.metadata.shared, made.name)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(objects.folder() / "t")}
    text = compile_triton.json.dumps([wanted.path, wanted.types, files])
    command = [sys.executable, "-c", program, text]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["90", "2", "0", "kernel"], done.stderr


def test_layouts_that_need_no_search_are_those_that_it_finds() -> None:
    """The tile of a depthwise layer, a lane to each thread: the same machine code, as often as one asks."""
    geometry = Geometry(8, 8, 8, (4, 14, 14), (3, 3, 3), padding=(1, 1, 1))
    digits = (
        "n rest grid|g rest grid|f rest grid|t rest grid|h*w rest grid|c rest serial|kt rest serial"
        "|kh rest serial|kw rest serial|kt 3 unroll|kh 3 unroll|kw 3 unroll|t 4 unroll|h*w 64 lanes"
        "|w 2 unroll phase"
    )
    how = {"digits": digits.split("|"), "fuse": [["h", "w"]], "stage": [], "hints": {"warps": 2}}
    nest = comprehensions.nest(Problem("forward", geometry, device="cuda"))
    text = show(nest, Schedule.from_json(how), "triton")
    path = objects.folder() / "layer.py"
    path.write_text(text)
    types = dtype_pointers(["float32"] * 3)
    first = Job(str(path), text, types, ("cuda", 90, 32), {"num_warps": 2, "num_stages": 1})
    codes = []
    for number, single in enumerate((False, True, False, True)):
        again = replace(first, single=single, types=(*types[:-1], "i64" if number > 1 else "i32"))
        codes.append(Path(compiled(again, 60)["kernel.cubin"]).read_bytes())
    assert codes[0] == codes[1] != codes[2] == codes[3]


def test_nothing_is_compiled_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    files = compiled(job(), 60)

    def refuse(*_: object) -> None:
        pytest.fail("compiles again")

    monkeypatch.setattr(compile_triton, "_ask_worker", refuse)
    assert compiled(job(), 60) == files


def test_a_damaged_object_is_compiled_again() -> None:
    files = compiled(job(), 60)
    binary = Path(files["kernel.cubin"])
    binary.write_bytes(b"anything")
    assert compiled(job(), 60) == files
    assert objects.intact(binary) and binary.read_bytes()[:4] == b"\x7fELF"


def test_whatever_the_binary_depends_on_is_in_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    base = job()
    others = [
        job(3),
        job(warps=2),
        replace(base, types=dtype_pointers(["float32", "float32"])),
        replace(base, target=("cuda", 80, 32)),
        replace(base, single=True),
    ]
    names = {base.name, *(other.name for other in others)}
    assert len(names) == 6
    monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")
    assert base.name not in names


def test_a_worker_serves_many_kernels_and_several_work_at_once() -> None:
    compiled(job(0), 60)
    (first,) = pids()
    compiled(job(1), 60)
    assert pids() == [first]
    threads = [threading.Thread(target=compiled, args=(job(i), 60)) for i in range(10, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert first in pids() and len(pids()) <= compile_triton.cores()


def test_workers_for_all_that_is_expected_start_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_triton, "cores", lambda: 3)
    compiled(job(0), 60)
    (first,) = pids()
    compile_triton.expect(5)
    compiled(job(0), 60)  # which is there
    assert pids() == [first]
    compiled(job(1), 60)
    assert first in pids() and len(set(pids())) == 3
    for number in (2, 3):
        compile_triton.expect(2)
        compiled(job(number), 60)
    assert len(set(pids())) == 3


def test_what_triton_refuses_is_a_compile_error_and_costs_no_worker() -> None:
    with pytest.raises(
        CompileError, match=r"^Triton cannot compile a kernel: .*num_warps must be a power of 2"
    ):
        compiled(job(warps=3), 60)
    before = pids()
    with pytest.raises(CompileError, match=r"^Triton cannot compile a kernel: CompileError: at .*NameError"):
        compiled(job(text=TEXT + "    tl.store(out + i, nothing)\n"), 60)
    compiled(job(), 60)
    assert pids() == before and len(before) == 1


def test_a_compilation_over_its_time_is_stopped_and_nothing_else_is() -> None:
    compiled(job(1), 60)
    (busy,) = pids()
    with pytest.raises(CompileError, match=r"Triton took longer than 0.3 s for one kernel") as caught:
        compiled(job(text=LONG), 0.3)
    assert category(caught.value) == COMPILE_TIMEOUT
    assert pids() == [] and not Path(f"/proc/{busy}").exists()
    compiled(job(2), 60)


def test_a_worker_that_dies_is_a_compile_error() -> None:
    compiled(job(1), 60)
    (worker,) = pids()
    timer = threading.Timer(0.5, os.kill, [worker, signal.SIGSEGV])
    timer.start()
    with pytest.raises(CompileError) as caught:
        compiled(job(text=LONG), 60)
    timer.join()
    assert str(caught.value).startswith(
        "Triton crashed on a kernel, which is left out: the process that compiles Triton kernels was killed"
    )
    assert category(caught.value) == COMPILE_ERROR and isinstance(caught.value.__cause__, ProcessError)
    compiled(job(2), 60)


def test_a_worker_that_died_meanwhile_is_replaced() -> None:
    compiled(job(1), 60)
    (worker,) = pids()
    os.kill(worker, signal.SIGKILL)
    os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)
    compiled(job(2), 60)
    assert pids() != [worker]


needs_nvrtc = pytest.mark.skipif(not compile_cuda.is_installed(), reason="needs NVRTC and its bindings")


@needs_nvrtc
def test_cuda_is_compiled_beside_what_triton_says_of_an_empty_kernel(tmp_path: Path) -> None:
    nest = comprehensions.nest(problem_of("forward", GEOMETRIES["depthwise 5x5x5"]))
    product = next(p for first, _ in families(nest) for p in first)
    text = show(nest, product.schedule(nest), "triton")
    path = tmp_path / "kernel.cu"
    path.write_text(text)
    types = dtype_pointers(["bfloat16"] * 3)
    options = {"num_warps": 3, "num_stages": 1}
    files = compiled(Job(str(path), text, types, ("cuda", 90, 32), options, True, shared_bytes(text)), 60)
    said = json.loads(Path(files["kernel.json"]).read_text())
    assert (said["name"], said["num_warps"], said["shared"]) == ("kernel", 3, shared_bytes(text))
    assert Path(files["kernel.cubin"]).read_bytes()[:4] == b"\x7fELF"


@needs_nvrtc
def test_what_nvrtc_refuses_is_said(tmp_path: Path) -> None:
    path = tmp_path / "kernel.cu"
    path.write_text("not C++")
    made = Job(
        str(path), "not C++", dtype_pointers(["bfloat16"]), ("cuda", 90, 32), {"num_warps": 1}, True, 0
    )
    with pytest.raises(CompileError, match="NVRTC cannot compile a kernel"):
        compiled(made, 60)
    with pytest.raises(CompileError, match="for NVIDIA's GPUs, not for hip"):
        compiled(replace(made, target=("hip", "gfx942", 64)), 60)
