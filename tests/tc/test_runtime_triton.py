"""Loading of printed Triton kernels: the files, the missing compiler, the launch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from g3dswap.comprehensions import nest as nest_of
from g3dswap.errors import CompileError, NoCompilerError
from g3dswap.problem import Geometry, Problem
from g3dswap.tc import compile_triton, objects, recipe, runtime_triton, worker_triton
from g3dswap.tc.kernel import build, prepare
from g3dswap.tc.nest import Nest
from g3dswap.tc.schedule import Digit, Schedule, apply

triton = pytest.importorskip("triton", reason="needs Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def small() -> Nest:
    return nest_of(Problem("forward", Geometry(2, 2, 2, (1, 2, 8), (1, 1, 1)), device=DEVICE))


def along_w(nest: Nest, **hints: int) -> Schedule:
    parallel = [Digit(a.name, None, "grid") for a in nest.axes if not a.reduce]
    reductions = [Digit(a.name, None, "serial") for a in nest.axes if a.reduce]
    return Schedule((*parallel, *reductions, Digit("w", 8, "lanes")), hints=tuple(hints.items()))


def runs(nest: Nest, offset: int = 0) -> bool:
    """Whether a kernel built now gives what it should, with an input `offset` elements into its memory."""
    x = torch.randn(2 * 2 * 1 * 2 * 8 + offset, device=DEVICE)[offset:].view(2, 2, 1, 2, 8)
    weight = torch.randn(2, 1, 1, 1, 1, device=DEVICE)
    out = torch.full_like(x, torch.nan)
    build(nest, along_w(nest), "triton")(x, weight, out=out)
    return torch.allclose(out, x * weight.view(2, 1, 1, 1))


def test_a_source_is_kept_and_verified(fresh_cache: Path) -> None:
    assert runs(small())
    (path,) = objects.folder().glob("*.py")
    assert objects.intact(path)
    assert "@triton.jit" in path.read_text() and path.stat().st_mode & 0o022 == 0
    path.write_text("raise SystemExit('not what was sealed')\n")
    assert runs(small())
    assert objects.intact(path)
    assert not list(path.parent.rglob("*.pyc"))


def test_what_was_printed_before_is_not_printed_again(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runs(small())
    monkeypatch.setattr(runtime_triton, "source", lambda *_: pytest.fail("prints again"))
    assert runs(small())
    monkeypatch.setattr(recipe, "GENERATOR", "another")
    with pytest.raises(pytest.fail.Exception, match="prints again"):
        runs(small())


def test_a_bytecode_file_is_never_loaded(fresh_cache: Path) -> None:
    """Python would take it for the source that was verified."""
    assert runs(small())
    (path,) = objects.folder().glob("*.py")
    stamp = path.stat()
    program = "import py_compile, sys; py_compile.compile(sys.argv[1], doraise=True)"
    path.write_text("raise SystemExit".ljust(stamp.st_size))
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)
    assert list(path.parent.rglob("*.pyc"))
    assert runs(small())


def test_tensors_that_are_not_aligned() -> None:
    assert runs(small(), offset=1)


def test_a_source_that_is_no_module(fresh_cache: Path) -> None:
    assert runs(small())
    (path,) = objects.folder().glob("*.py")
    path.write_text("nothing\n")
    objects.seal(path)
    with pytest.raises(
        CompileError, match=r"the printed kernel .*\.py cannot be imported: NameError: name 'nothing'"
    ):
        runs(small())


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    nest = small()
    monkeypatch.setattr(runtime_triton, "triton", None)
    assert runtime_triton.version() == "none"
    with pytest.raises(NoCompilerError, match="need Triton, which is missing; pip install triton"):
        build(nest, along_w(nest), "triton")


def test_the_module_can_be_imported_without_triton() -> None:
    program = "import sys; sys.modules['triton'] = None; from g3dswap.tc import runtime_triton as r; "
    program += "print(r.version())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "none"


def test_preparing_needs_no_more_than_loading_will(fresh_cache: Path) -> None:
    """Where kernels are interpreted, the source is all that there is."""
    nest = small()
    prepare(nest, along_w(nest), "triton")
    suffixes = {path.suffix for path in objects.folder().iterdir()} - {".sha256"}
    assert suffixes == ({".py", ".json", ".cubin"} if torch.cuda.is_available() else {".py"})
    assert runs(nest)


@pytest.mark.parametrize(
    ("digits", "width", "single"),
    [
        ("h*w 64 lanes|w 2 unroll phase", 6, True),  # an element for each thread
        ("h*w 256 lanes|w 2 unroll phase", 6, False),  # two, which may lie side by side
        ("h*w 256 lanes|w 2 unroll phase", 7, True),  # rows of seven: no two are aligned
        ("h*w 64 rows|f 16 cols|c 16 depth", 6, False),
    ],
)
def test_which_tiles_need_no_layout(digits: str, width: int, single: bool) -> None:
    geometry = Geometry(32, 32, 2, (1, 6, width), (1, 1, 1))
    head = "n rest grid|g rest grid|f rest grid|t rest grid|h*w rest grid|c rest serial|kt rest serial"
    head += "|kh rest serial|kw rest serial"
    how = {"digits": f"{head}|{digits}".split("|"), "fuse": [["h", "w"]], "stage": [], "hints": {}}
    nest = apply(nest_of(Problem("forward", geometry, torch.bfloat16)), Schedule.from_json(how))
    assert worker_triton.is_single(nest, 128) == single


def test_version() -> None:
    assert runtime_triton.version() == triton.__version__


@pytest.mark.gpu
def test_compiles_once_for_every_batch_size(fresh_cache: Path) -> None:
    nest = small()
    kernel = build(nest, along_w(nest, warps=1, stages=1), "triton")
    launcher: Any = kernel.launch
    for batch in (1, 2, 16, 17):
        x, weight = torch.randn(batch, 2, 1, 2, 8, device="cuda"), torch.ones(2, 1, 1, 1, 1, device="cuda")
        out = torch.empty_like(x)
        kernel(x, weight, out=out)
        assert torch.equal(out, x)
    ((*_, compiled),) = launcher.compiled.values()
    assert compiled.metadata.num_warps == 1
    assert len(list(objects.folder().glob("*.cubin"))) == 1


@pytest.mark.gpu
def test_a_prepared_kernel_is_only_loaded(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nest = small()
    prepare(nest, along_w(nest), "triton")
    monkeypatch.setattr(compile_triton, "_ask_worker", lambda *_: pytest.fail("compiles again"))
    assert runs(nest)
    assert len(list(objects.folder().glob("*.cubin"))) == 1


@pytest.mark.gpu
def test_launches_on_the_current_stream() -> None:
    nest = small()
    kernel = build(nest, along_w(nest), "triton")
    x, weight = torch.randn(4, 2, 1, 2, 8, device="cuda"), torch.ones(2, 1, 1, 1, 1, device="cuda")
    out = torch.empty_like(x)
    graph = torch.cuda.CUDAGraph()
    kernel(x, weight, out=out)
    with torch.cuda.graph(graph):
        kernel(x, weight, out=out)
    x.fill_(3)
    out.zero_()
    graph.replay()
    assert torch.equal(out, x)


@pytest.mark.gpu
def test_what_triton_refuses_is_a_compile_error() -> None:
    nest = small()
    with pytest.raises(CompileError, match="Triton cannot compile a kernel: "):
        build(nest, along_w(nest, warps=3), "triton")


@pytest.mark.gpu
def test_triton_s_launch_hooks_are_called() -> None:
    """Profilers count launches through them."""
    nest = small()
    kernel = build(nest, along_w(nest), "triton")
    x, weight = torch.randn(4, 2, 1, 2, 8, device="cuda"), torch.ones(2, 1, 1, 1, 1, device="cuda")
    seen: list[str] = []

    def hook(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(hook)
    try:
        kernel(x, weight, out=torch.empty_like(x))
    finally:
        hooks.remove(hook)
    kernel(x, weight, out=torch.empty_like(x))
    assert seen == ["kernel"]
