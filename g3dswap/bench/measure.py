"""Measures one pass of one layer in one run: the chosen kernels and PyTorch's, in one layout or in both.

On a CPU each run of a contender is one call on cold data (`tc.timing`); on a GPU it is a CUDA graph of many
(`bench.graphs`). All take turns (`bench.rounds`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from g3dswap import direct, native
from g3dswap.bench import graphs
from g3dswap.choice import Choice
from g3dswap.errors import described
from g3dswap.problem import Problem
from g3dswap.rounds import FEWEST, MOST, Key, Times, alternate
from g3dswap.tc import timing
from g3dswap.tc.timing import Call, Sampler
from g3dswap.workload import Sample, distance

Run = Callable[..., Tensor]
Operands = Sequence[Tensor | None]

OURS, TORCH, COMPILED = "ours", "torch", "compiled"
COMPILE_MODE = "max-autotune-no-cudagraphs"

# Bytes of one copied buffer, and the matrix product's extent: far beyond every cache, some ms a run.
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
PRODUCT_EXTENT = {"cpu": 1536, "cuda": 8192}


@dataclass(frozen=True)
class Ceilings:
    """What the device can do: bytes copied (read and written) a second, and flops of a matrix product.

    `product` has one figure for each precision of fp32 that PyTorch's switch may ask for.
    """

    bandwidth: float
    product: dict[str, float]

    def roofline(self, problem: Problem, batch: int) -> float:
        """Seconds below which a pass cannot go.

        A depthwise layer is held to IEEE arithmetic even where TF32 is allowed, for PyTorch computes it so.
        """
        exact = problem.precision == "ieee" or problem.geometry.depthwise
        return problem.roofline(batch, self.bandwidth, self.product["ieee" if exact else "tf32"])


@dataclass(frozen=True)
class Check:
    """Relative errors against float64 of our kernel and of PyTorch's, and what ours may be.

    `correct` also says that ours agrees with PyTorch's where no float64 result was computed.
    """

    error: float
    torch_error: float
    bound: float
    correct: bool


@dataclass(frozen=True)
class Measured:
    """What one run found about one pass, by layout."""

    torch: dict[str, Times]
    ours: dict[str, Times]  # PyTorch's own where the choice is its kernel
    checks: dict[str, Check]
    compiled: dict[str, Times] = field(default_factory=dict)  # PyTorch's under torch.compile, if asked for
    failed: dict[str, str] = field(default_factory=dict)  # why torch.compile gave nothing


def ceilings(device: str, dtype: torch.dtype, seconds: float) -> Ceilings:
    """Measure them, each for about `seconds`; of several runs the fastest counts."""
    sample = timing.sampler(device)
    source = torch.ones(COPY_BYTES[device] // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * COPY_BYTES[device] / _fastest(partial(target.copy_, source), sample, seconds)
    del source, target
    # Half types can be computed in float32, which is the faster on CPUs that have no instructions for them.
    dtypes = [dtype, torch.float32] if device == "cpu" and dtype.itemsize == 2 else [dtype]
    product = {}
    tf32 = device == "cuda" and dtype == torch.float32
    for precision in ("ieee", "tf32") if tf32 else ("ieee",):
        with _products_in(precision) if tf32 else contextlib.nullcontext():
            product[precision] = max(_product(device, it, sample, seconds) for it in dtypes)
    return Ceilings(bandwidth, product)


def _product(device: str, dtype: torch.dtype, sample: Sampler, seconds: float) -> float:
    """Flops a second of a matrix product."""
    extent = PRODUCT_EXTENT[device]
    a, b = (torch.randn(extent, extent, device=device).to(dtype) for _ in range(2))
    return 2 * extent**3 / _fastest(partial(torch.mm, a, b, out=torch.empty_like(a)), sample, seconds)


@contextlib.contextmanager
def _products_in(precision: str) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _fastest(call: Call, sample: Sampler, seconds: float) -> float:
    sample(call)
    samples = [sample(call) for _ in range(FEWEST)]
    while len(samples) < MOST and sum(samples) < seconds:
        samples.append(sample(call))
    return min(samples)


def measure_pass(
    choices: Mapping[str, Choice],
    problems: Mapping[str, Problem],
    batch: int,
    seconds: float,
    compiled: bool = False,
) -> Measured:
    """Check and time the choices, and PyTorch's kernels in every layout of `problems`.

    Both mappings are by layout; `seconds` is what each contender may take. `compiled` also times PyTorch's
    operator under torch.compile.
    """
    operands = {layout: native.random_operands(problem, batch) for layout, problem in problems.items()}
    runs: dict[tuple[str, str], Run] = {
        (TORCH, layout): partial(native.run, problem) for layout, problem in problems.items()
    }
    layout, problem = next(iter(problems.items()))
    failed: dict[str, str] = {}
    direct.begin(problem.device, wait=True)  # as layers have it
    with torch.no_grad(), native.switches(problem):
        runs |= {
            (OURS, name): direct.bound(choice, operands[name])
            for name, choice in choices.items()
            if not choice.is_native
        }
        sample = Sample(problem, operands[layout])  # the values are those of the other layouts too
        calls = {key: partial(run, *operands[key[1]]) for key, run in runs.items()}
        checks = {layout: _check(problem, sample, calls, layout) for layout, problem in problems.items()}
        del sample
        if compiled:
            found, failed = _compile(problems, operands)
            runs |= {(COMPILED, layout): run for layout, run in found.items()}
        times = _time({key: (run, operands[key[1]]) for key, run in runs.items()}, problem, batch, seconds)
    return Measured(
        torch={layout: times[TORCH, layout] for layout in problems},
        ours={layout: times.get((OURS, layout), times[TORCH, layout]) for layout in choices},
        checks={layout: checks[layout] for layout in choices},
        compiled={layout: times[COMPILED, layout] for layout in problems if (COMPILED, layout) in times},
        failed=failed,
    )


def time_choice(choice: Choice, batch: int, seconds: float) -> tuple[Times, Times]:
    """PyTorch's time of a pass, and that of the choice, which may be PyTorch's kernel; nothing is checked.

    Both in the layout of the choice's problem; `seconds` is what each may take. On a GPU calls from Python
    are timed only where there is no graph.
    """
    problem = choice.problem
    operands = native.random_operands(problem, batch)
    runs: dict[str, Run] = {TORCH: partial(native.run, problem)}
    if not choice.is_native:
        runs[OURS] = choice.run
    with torch.no_grad(), native.switches(problem):
        for run in runs.values():
            run(*operands)
        contenders = {name: (run, operands) for name, run in runs.items()}
        times = _time(contenders, problem, batch, seconds, launches=False)
    return times[TORCH], times.get(OURS, times[TORCH])


def _time(
    contenders: Mapping[Key, tuple[Run, Operands]],
    problem: Problem,
    batch: int,
    seconds: float,
    launches: bool = True,
) -> dict[Key, Times]:
    """Each on cold data; they have run before."""
    if problem.device == "cuda":
        found = graphs.rotations(contenders, problem.bytes(batch))
        eager, graph = timing.event_sampler(), timing.sampler("cuda")
        return graphs.measure(found, seconds, eager=eager, graph=graph, launches=launches)
    calls = {key: partial(run, *operands) for key, (run, operands) in contenders.items()}
    return alternate(calls, timing.sampler(problem.device), seconds)


def _compile(
    problems: Mapping[str, Problem], operands: Mapping[str, Operands]
) -> tuple[dict[str, Run], dict[str, str]]:
    """PyTorch's operator by torch.compile in each layout, compiled; and why not, where it fails."""
    found: dict[str, Run] = {}
    failed: dict[str, str] = {}
    torch._dynamo.reset()  # what earlier layers left counts against the limit of recompilations
    for layout, problem in problems.items():
        run = torch.compile(_operator(problem), mode=COMPILE_MODE, dynamic=False)
        try:
            run(*operands[layout])
        except RuntimeError as error:  # all of dynamo's and inductor's
            failed[layout] = described(error)
        else:
            found[layout] = run
    return found, failed


def _operator(problem: Problem) -> Run:
    """PyTorch's operator for a pass as a plain function, which torch.compile sees through."""
    g = problem.geometry
    rest = g.stride, g.padding, g.dilation, False, (0, 0, 0), g.groups
    if problem.direction == "forward":
        return lambda input, weight, bias: torch.convolution(input, weight, bias, *rest)
    mask = [problem.direction == "grad_input", problem.direction == "grad_weight", False]
    backward = torch.ops.aten.convolution_backward
    return lambda grad, input, weight: backward(grad, input, weight, None, *rest, mask)[mask.index(True)]


def _check(
    problem: Problem, sample: Sample, calls: Mapping[tuple[str, str], Callable[[], Tensor]], layout: str
) -> Check:
    """Compare both kernels of a layout with float64; these runs are also the warm-up of the measurement."""
    theirs = calls[TORCH, layout]()
    own = native.error(sample.of(theirs), sample.reference)
    bound = max(2 * own, native.FLOORS[problem.dtype])
    if (OURS, layout) not in calls:
        return Check(own, own, bound, True)
    out = calls[OURS, layout]()
    error = native.error(sample.of(out), sample.reference)
    # Both are within their errors of the exact result, so they cannot be further apart than this.
    correct = error <= bound and distance(out, theirs) <= 2 * bound
    return Check(error, own, bound, correct)
