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
import torch

from g3dswap import comprehensions
from g3dswap.errors import CompileError, ProcessError, ScheduleError
from g3dswap.problem import Geometry, Problem
from g3dswap.tc import compile_cuda, compile_triton, objects, recipe, runtime_triton
from g3dswap.tc.compile_triton import Job, compiled
from g3dswap.tc.kernel import prepare, show
from g3dswap.tc.print_cuda import shared_bytes
from g3dswap.tc.schedule import Digit, Schedule, apply
from g3dswap.tc.space_staged import families
from g3dswap.tc.trial import COMPILE_ERROR, COMPILE_TIMEOUT, ILLEGAL, category
from tests.tc.test_print_cuda import GEOMETRIES, problem_of
from tests.texts import ENDLESS, of_text, workers

triton = pytest.importorskip("triton", reason="needs Triton")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton comes with ptxas on Linux only")

H100 = ("cuda", 90, 32)
TEXT = """
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["batch"])
def kernel(x, weight, out, batch, early: tl.constexpr = False):
    if early:
        tl.extra.cuda.gdc_wait()
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
def own_workers() -> Iterator[None]:
    """They compile texts."""
    with workers():
        yield


@pytest.fixture
def usual_workers() -> Iterator[None]:
    """They print what they compile."""
    with workers("g3dswap.tc.worker_triton"):
        yield


def printed(dtype: torch.dtype = torch.float32, lanes: int = 8, **hints: int) -> Job:
    """A small kernel that multiplies."""
    nest = comprehensions.nest(Problem("forward", Geometry(2, 2, 2, (1, 2, 8), (1, 1, 1)), dtype))
    digits = [Digit(a.name, None, "serial" if a.reduce else "grid") for a in nest.axes]
    schedule = Schedule((*digits, Digit("w", lanes, "lanes")), hints=tuple(hints.items()))
    return Job(apply(nest, schedule), schedule, H100)


def job(factor: int = 2, text: str = TEXT, warps: int = 1) -> Job:
    return of_text(printed(warps=warps, stages=1), text.replace("FACTOR", str(factor)))


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
    path = objects.folder() / f"{wanted.name}.py"
    program = (
        "import json, sys, pathlib, triton; from g3dswap.tc import compile_triton as c, recipe; "
        "from g3dswap.tc import worker_triton as w; path, text, files = json.loads(sys.argv[1]); "
        "job = c.Job(*recipe.read(text)); made = c.loaded(job, files); target = made.metadata.target; "
        "source = w.ast_source(w.import_kernel(pathlib.Path(path)), w.argument_types(job.nest), True); "
        "options = {'num_warps': 2, 'num_stages': 1, 'launch_pdl': True}; "
        "again = triton.compile(source, target=target, options=options); "
        "same = lambda k: {**k.metadata._asdict(), 'hash': ''} | {'size': len(k.kernel)}; "
        "assert same(again) == same(made), (same(again), same(made)); "
        "assert again.asm['ttir'].count('tt.divisibility = 16') == 3; "
        "print(target.arch, made.metadata.num_warps, made.metadata.shared, made.name)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(objects.folder() / "t")}
    command = [sys.executable, "-c", program, json.dumps([str(path), wanted.recipe, files])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["90", "2", "0", "kernel"], done.stderr


def test_layouts_that_need_no_search_are_those_that_it_finds(tmp_path: Path) -> None:
    """The tile of a depthwise layer, a lane to each thread: the same machine code, as often as one asks."""
    geometry = Geometry(8, 8, 8, (4, 14, 14), (3, 3, 3), padding=(1, 1, 1))
    digits = (
        "n rest grid|g rest grid|f rest grid|t rest grid|h*w rest grid|c rest serial|kt rest serial"
        "|kh rest serial|kw rest serial|kt 3 unroll|kh 3 unroll|kw 3 unroll|t 4 unroll|h*w 64 lanes"
        "|w 2 unroll phase"
    )
    how = {"digits": digits.split("|"), "fuse": [["h", "w"]], "stage": [], "hints": {"warps": 2}}
    nest = comprehensions.nest(Problem("forward", geometry, device="cuda"))
    path = tmp_path / "layer.py"
    path.write_text(show(nest, Schedule.from_json(how), "triton"))
    program = (
        "import hashlib, pathlib, sys; from g3dswap.tc import worker_triton as w; "
        "path, scratch = map(pathlib.Path, sys.argv[1:]); options = {'num_warps': 2, 'num_stages': 1}\n"
        "for single in (False, True, False, True):\n"
        "    w._compile_triton(path, ('*fp32',) * 3 + ('i32',), ('cuda', 90, 32), options, single, scratch)\n"
        "    print(hashlib.sha256((scratch / 'kernel.cubin').read_bytes()).hexdigest(), end=' ')\n"
        "    print(w.triton._C.libtriton.passes.ttgpuir.add_coalesce is w._coalesce(), end=' ')\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_ALWAYS_COMPILE": "1"}
    command = [sys.executable, "-c", program, str(path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    codes, searched = done.stdout.split()[::2], done.stdout.split()[1::2]
    assert len(set(codes)) == 1, done.stderr
    assert searched == ["True", "False"] * 2


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
    base = printed()
    others = [
        job(),
        job(3),
        printed(warps=2),
        printed(dtype=torch.bfloat16),
        printed(lanes=4),
        replace(base, target=("cuda", 80, 32)),
    ]
    assert printed().name == base.name
    names = {base.name, *(other.name for other in others)}
    assert len(names) == 7
    monkeypatch.setattr(recipe, "GENERATOR", "another")
    names.add(printed().name)
    monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")
    names.add(printed().name)
    assert len(names) == 9


def test_a_kernel_is_printed_where_it_is_compiled(usual_workers: None) -> None:
    wanted = printed()
    files = compiled(wanted, 60)
    assert Path(files["kernel.cubin"]).read_bytes()[:4] == b"\x7fELF"
    text = (objects.folder() / f"{wanted.name}.py").read_text()
    assert "@triton.jit" in text and str(wanted.nest).splitlines()[0] in text


def test_on_the_way_to_a_worker_nothing_is_printed(
    usual_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the sum of partial results, which is a kernel of its own."""
    nest = comprehensions.nest(Problem("grad_weight", Geometry(2, 2, 2, (1, 2, 8), (1, 1, 1))))
    digits = [Digit(a.name, None, "grid" if a.name == "n" or not a.reduce else "serial") for a in nest.axes]
    digits.sort(key=lambda digit: digit.bind)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(runtime_triton, "_job", lambda nest, schedule: Job(nest, schedule, H100))
    monkeypatch.setattr(sys.modules["g3dswap.tc.source"], "print_triton", lambda *_: pytest.fail("prints"))
    for _ in range(2):
        prepare(nest, Schedule((*digits, Digit("w", 8, "lanes"))), "triton")
        assert len(list(objects.folder().glob("*.cubin"))) == 2
        monkeypatch.setattr(compile_triton, "_ask_worker", lambda *_: pytest.fail("compiles again"))


def test_a_worker_imports_neither_pytorch_nor_numpy() -> None:
    """It would take several times as long to start."""
    package = Path(compile_triton.__file__).parent.parent
    program = (
        "import sys, types; root = sys.modules['g3dswap'] = types.ModuleType('g3dswap'); "
        "root.__path__ = [sys.argv[1]]; import g3dswap.tc.worker_triton; print(*sys.modules)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program, str(package)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    modules = set(done.stdout.split())
    assert "g3dswap.tc.print_triton" in modules and not {"torch", "numpy"} & modules


def test_what_does_not_print_is_a_schedule_error(usual_workers: None) -> None:
    """The printer's own, with all its lines."""
    refused = printed(lanes=1 << 17)
    with pytest.raises(ScheduleError) as here:
        show(refused.nest.unscheduled(), refused.schedule, "triton")
    with pytest.raises(ScheduleError) as there:
        compiled(refused, 60)
    assert str(there.value) == str(here.value) and category(there.value) == ILLEGAL
    compiled(printed(), 60)
    assert len(pids()) == 1  # it costs no worker


def test_a_worker_with_other_code_prints_nothing(
    usual_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be stored as what this process's code prints."""
    monkeypatch.setattr(recipe, "GENERATOR", "another")
    with pytest.raises(CompileError, match="files of g3dswap have changed since this process began"):
        compiled(printed(), 60)
    assert not [path for path in objects.folder().iterdir() if path.is_file()]


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


@pytest.mark.parametrize("how", ["killed", "late"])
def test_a_worker_may_end_while_it_prints(how: str) -> None:
    compiled(job(1), 60)
    (worker,) = pids()
    if how == "killed":
        timer = threading.Timer(0.5, os.kill, [worker, signal.SIGKILL])
        timer.start()
    with pytest.raises(CompileError) as caught:
        compiled(job(text=ENDLESS), 60 if how == "killed" else 0.3)
    assert category(caught.value) == (COMPILE_ERROR if how == "killed" else COMPILE_TIMEOUT)
    assert pids() == [] and not [path for path in objects.folder().iterdir() if path.is_dir()]
    compiled(job(2), 60)


def test_a_worker_that_died_meanwhile_is_replaced() -> None:
    compiled(job(1), 60)
    (worker,) = pids()
    os.kill(worker, signal.SIGKILL)
    os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)
    compiled(job(2), 60)
    assert pids() != [worker]


needs_nvrtc = pytest.mark.skipif(not compile_cuda.is_installed(), reason="needs NVRTC and its bindings")


def staged() -> Job:
    nest = comprehensions.nest(problem_of("forward", GEOMETRIES["depthwise 5x5x5"]))
    schedule = next(p for first, _ in families(nest) for p in first).schedule(nest)
    return Job(apply(nest, schedule), schedule, H100)


@needs_nvrtc
def test_cuda_is_compiled_beside_what_triton_says_of_an_empty_kernel(usual_workers: None) -> None:
    wanted = staged()
    files = compiled(wanted, 60)
    said = json.loads(Path(files["kernel.json"]).read_text())
    shared = shared_bytes((objects.folder() / f"{wanted.name}.cu").read_text())
    warps = wanted.schedule.hint("warps", 4)
    assert (said["name"], said["num_warps"], said["shared"]) == ("kernel", warps, shared)
    assert Path(files["kernel.cubin"]).read_bytes()[:4] == b"\x7fELF"


@needs_nvrtc
def test_what_nvrtc_refuses_is_said() -> None:
    made = of_text(staged(), "// bytes of shared memory: 0\nnot C++")
    with pytest.raises(CompileError, match="NVRTC cannot compile a kernel"):
        compiled(made, 60)
    with pytest.raises(CompileError, match="for NVIDIA's GPUs, not for hip"):
        compiled(replace(made, target=("hip", "gfx942", 64)), 60)
