"""Kernels that are launched before the one before them has ended: they wait for it first."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from g3dswap.comprehensions import nest as nest_of
from g3dswap.problem import Geometry, Problem
from g3dswap.tc import compile_cuda, space_lanes, space_staged, totals
from g3dswap.tc.compile_triton import Job, compiled
from g3dswap.tc.kernel import Kernel, build
from g3dswap.tc.nest import Nest
from g3dswap.tc.schedule import Digit, Schedule, apply
from g3dswap.tc.space_triton import BATCH
from tests.tc.test_clusters_cuda import clustered
from tests.texts import workers

triton = pytest.importorskip("triton", reason="needs Triton")

H100, A100 = ("cuda", 90, 32), ("cuda", 80, 32)
WAITS, LETS_OTHERS_BEGIN = "ACQBULK", "PREEXIT"
MEMORY = re.compile(r"(LDG|LDGSTS|LD|STG|ST|RED|ATOMG?|UBLKCP)(\.|$)")
LAYER = Geometry(16, 16, 4, (4, 8, 8), (3, 3, 3), padding=(1, 1, 1))
DEPTHWISE = Geometry(32, 32, 32, (4, 8, 8), (3, 3, 3), padding=(1, 1, 1))


@pytest.fixture(autouse=True)
def own_objects(fresh_cache: Path) -> None:
    """Nothing was compiled before."""


@pytest.fixture(autouse=True)
def usual_workers() -> Iterator[None]:
    """They print what they compile."""
    with workers("g3dswap.tc.worker_triton"):
        yield


def problem_of(direction: str, geometry: Geometry = LAYER, dtype: torch.dtype = torch.bfloat16) -> Problem:
    return Problem(direction, geometry, dtype, device="cuda")


def lanes(nest: Nest) -> Schedule:
    """Triton's, one lane for each column."""
    digits = [Digit(a.name, None, "serial" if a.reduce and a.extent else "grid") for a in nest.axes]
    last = "w" if not nest.is_reduce("w") else "kw"
    digits.sort(key=lambda digit: digit.bind != "grid")
    return Schedule((*digits, Digit(last, 8, "lanes")), hints=(("warps", 1),))


def rows(nest: Nest) -> Schedule:
    return next(p for first, _ in space_staged.families(nest) for p in first).schedule(nest)


def shared_lanes(nest: Nest) -> Schedule:
    return next(p for first, _ in space_lanes.families(nest, BATCH) for p in first).schedule(nest)


def cluster(nest: Nest) -> Schedule:
    return clustered(nest)[0].schedule(nest)


KINDS: dict[str, tuple[Problem, Callable[[Nest], Schedule]]] = {
    "lanes in Triton": (problem_of("forward"), lanes),
    "partial results in Triton": (problem_of("grad_weight"), lanes),
    "positions as rows": (problem_of("forward"), rows),
    "positions as the depth": (problem_of("grad_weight"), rows),
    "a cluster": (problem_of("grad_weight"), cluster),
    "lanes that share memory": (problem_of("forward", DEPTHWISE, torch.float32), shared_lanes),
}


def job_of(kind: str, target: tuple[str, int, int] = H100) -> Job:
    problem, schedule_of = KINDS[kind]
    nest = nest_of(problem)
    schedule = schedule_of(nest)
    return Job(apply(nest, schedule), schedule, target)


def instructions(job: Job) -> list[str]:
    """Of the compiled kernel, in their order."""
    binary = compiled(job, 60)["kernel.cubin"]
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", binary]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", text)


def is_early(job: Job) -> bool:
    """Whether it is launched so."""
    return bool(json.loads(Path(compiled(job, 60)["kernel.json"]).read_text())["launch_pdl"])


def needs_nvrtc(kind: str) -> None:
    if "Triton" not in kind and not compile_cuda.is_installed():
        pytest.skip("needs NVRTC and its bindings")


@pytest.mark.parametrize("kind", KINDS)
def test_no_memory_is_touched_before_the_kernel_before_has_ended(kind: str) -> None:
    """The compiler may move what it takes for independent of that."""
    needs_nvrtc(kind)
    job = job_of(kind)
    found = instructions(job)
    touches = [i for i, name in enumerate(found) if MEMORY.match(name)]
    assert is_early(job) and touches and found.index(WAITS) < touches[0]


@pytest.mark.parametrize("kind", KINDS)
def test_what_adds_up_partial_results_is_launched_at_once(kind: str) -> None:
    needs_nvrtc(kind)
    job = job_of(kind)
    second = totals.total(job.nest)
    assert (LETS_OTHERS_BEGIN in instructions(job)) == (second is not None)
    if second is not None:
        found = instructions(Job(apply(*second), second[1], H100))
        assert WAITS in found and LETS_OTHERS_BEGIN not in found


@pytest.mark.parametrize("kind", ["lanes in Triton", "positions as rows"])
def test_older_gpus_launch_one_after_another(kind: str) -> None:
    needs_nvrtc(kind)
    job = job_of(kind, A100)
    assert not is_early(job) and WAITS not in instructions(job)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_read_what_the_one_before_writes(kind: str) -> None:
    """And are through with it when the next one writes it again, launched one by one and in a graph."""
    needs_nvrtc(kind)
    problem, schedule_of = KINDS[kind]
    nest = nest_of(problem)
    kernel = build(nest, schedule_of(nest), "triton")
    batch = 64
    tensors = [nest.tensor(name) for name in (*nest.operands, nest.output.tensor)]
    *operands, out = (
        torch.empty([batch if e is None else e for e in t.shape], dtype=problem.dtype, device="cuda")
        for t in tensors
    )
    steps = [torch.rand((), device="cuda") for _ in range(50)]

    def wanted(step: torch.Tensor) -> torch.Tensor:
        for operand in operands:
            operand.fill_(step)
        torch.cuda.synchronize()
        found = torch.empty_like(out)
        kernel(*operands, out=found)
        torch.cuda.synchronize()
        return found

    def chain() -> list[torch.Tensor]:
        found = []
        for step in steps:
            for operand in operands:
                operand.copy_(step.expand_as(operand))
            found.append(torch.empty_like(out))
            kernel(*operands, out=found[-1])
        return found

    expected = [wanted(step) for step in steps]
    _agree(kernel, chain(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain()
    for _ in range(3):
        graph.replay()
        _agree(kernel, found, expected)


def _agree(kernel: Kernel, found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), kernel.source
