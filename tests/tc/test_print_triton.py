"""Printed Triton kernels against the nest interpreter and PyTorch, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from g3dswap import native
from g3dswap.comprehensions import nest as nest_of
from g3dswap.errors import ScheduleError
from g3dswap.problem import ACTIVATIONS, Geometry, Problem
from g3dswap.tc.interpret import interpret
from g3dswap.tc.kernel import build
from g3dswap.tc.nest import Nest
from g3dswap.tc.print_triton import print_triton
from g3dswap.tc.schedule import Digit, Schedule, apply, fused_name, rewritten, serial
from g3dswap.tc.skew import Skew
from tests.conftest import Golden
from tests.profiles import examples

pytest.importorskip("triton", reason="needs Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter cuts the last bits of a bfloat16 off, where a GPU rounds.
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 8e-3}
TF32 = 7e-4
"""Factors that were rounded to the nearest TF32; where they are cut off, sums are twice as far off."""
MOST_STEPS = 200
"""Tiles that a random schedule may run: the interpreter takes about a millisecond for each."""
MOST_CODE = 8192
"""Multiply-adds of one tile: beyond this a GPU's compiler takes minutes."""


def schedule_of(text: str, **hints: int) -> Schedule:
    """A schedule from its digits; axes joined by a star are fused."""
    data = [d.strip() for d in text.split("|")]
    fuse = {d.split()[0]: d.split()[0].split("*") for d in data if "*" in d.split()[0]}
    return Schedule.from_json({"digits": data, "fuse": list(fuse.values()), "stage": [], "hints": hints})


def random_schedule(nest: Nest, rng: random.Random) -> Schedule:
    """Any legal schedule: fused axes, orders, binds and counts that nobody would choose."""
    groups = nest.axis("g").extent or 1
    packs = [(("g", c),) for c in (2, 3, 4) if groups % c == 0]
    for _ in range(5000):
        dot = rng.random() < 0.15 and getattr(torch, nest.tensors[0].dtype) in PRODUCTS
        pack = rng.choice(packs) if packs and rng.random() < 0.3 else ()
        skew = _skews(rng) if rng.random() < 0.6 else ()
        across = rng.random() < 0.5
        try:
            whole = rewritten(nest, pack, skew)
            schedule = _dot_schedule(whole, rng) if dot else _any_schedule(whole, rng)
            schedule = replace(schedule, pack=pack, skew=skew, hints=(("across", across), *schedule.hints))
            scheduled = apply(nest, schedule)
            print_triton(scheduled, across=across)
        except ScheduleError:
            continue
        steps = math.prod(p.count or 2 for p in scheduled.loops if p.bind in ("grid", "serial", "unroll"))
        code = math.prod(p.count or 1 for p in scheduled.loops if p.bind in ("unroll", "lanes"))
        if steps <= MOST_STEPS and code <= MOST_CODE:
            return schedule
    raise AssertionError("no legal schedule was found")


def _skews(rng: random.Random) -> tuple[Skew, ...]:
    axes = rng.sample("thw", rng.choice((1, 1, 2, 3)))
    return tuple(Skew(axis, rng.choice((1, 2, 3, 4)), rng.choice((1, 2, 4))) for axis in axes)


def _fusions(nest: Nest, rng: random.Random) -> list[tuple[str, ...]]:
    """The axes, some neighbours among them fused."""
    found = []
    for reduce in (False, True):
        names = [a.name for a in nest.axes if a.reduce == reduce and a.extent is not None]
        while names:
            take = rng.choice((1, 1, 1, 2, 3, 4))
            found.append(tuple(names[:take]))
            names = names[take:]
    return found


def _any_schedule(nest: Nest, rng: random.Random) -> Schedule:
    divided = {a for f in nest.factors for i in f.indices if i.divisor > 1 for a in i.axes}
    outer: dict[str, list[Digit]] = {"grid": [], "parallel": [], "reduce": []}
    tile: list[Digit] = []
    for axis in (a for a in nest.axes if a.extent is None):
        bind = rng.choice(("grid", "serial"))
        kind = "grid" if bind == "grid" else "reduce" if axis.reduce else "parallel"
        outer[kind].append(Digit(axis.name, None, bind))
    fused = _fusions(nest, rng)
    for parts in fused:
        name, reduce = fused_name(parts), nest.axis(parts[0]).reduce
        bind = (
            "grid" if rng.random() < (0.2 if reduce else 0.6) else rng.choice(("serial", "serial", "unroll"))
        )
        kind = "grid" if bind == "grid" else "reduce" if reduce else "parallel"
        # An unrolled loop among the tile's, or one outside it, which repeats the code.
        (tile if bind == "unroll" and (reduce or rng.random() < 0.5) else outer[kind]).append(
            Digit(name, None, bind)
        )
        if rng.random() < 0.4:
            tile.append(Digit(name, rng.choice((2, 4, 8, 16)), "lanes"))
        if rng.random() < 0.3:
            tile.append(Digit(name, rng.choice((2, 3)), "unroll", parts[0] in divided and rng.random() < 0.7))
        if len(parts) > 1 and rng.random() < 0.4:
            tile.append(Digit(rng.choice(parts), rng.choice((2, 3, 4)), "unroll"))
    for digits in (*outer.values(), tile):
        rng.shuffle(digits)
    groups = tuple(parts for parts in fused if len(parts) > 1)
    return Schedule(
        (*outer["grid"], *outer["parallel"], *outer["reduce"], *tile), groups, (), (("warps", 1),)
    )


def _dot_schedule(nest: Nest, rng: random.Random) -> Schedule:
    """A matrix product: rows, cols and depth along whatever `_fusions` gives."""
    fused = _fusions(nest, rng)
    parallel = [parts for parts in fused if not nest.axis(parts[0]).reduce]
    sides = dict(zip(rng.sample(parallel, min(2, len(parallel))), ("rows", "cols")))
    sides[rng.choice([parts for parts in fused if nest.axis(parts[0]).reduce])] = "depth"
    outer = [Digit(a.name, None, "serial" if a.reduce else "grid") for a in nest.axes if a.extent is None]
    tile = []
    for parts in fused:
        reduce = nest.axis(parts[0]).reduce
        outer.append(Digit(fused_name(parts), None, "serial" if reduce else "grid"))
        if parts in sides:
            block = rng.choice((1, 2, 4)) if len(parts) > 1 else 1
            tile.append(Digit(fused_name(parts), rng.choice((16, 16, 32)) // block, sides[parts]))
            if block > 1:
                tile.append(Digit(rng.choice(parts), block, sides[parts], True))
        elif rng.random() < 0.3:
            tile.append(Digit(fused_name(parts), 2, "unroll"))
    rng.shuffle(tile)
    outer.sort(key=lambda d: d.bind != "grid")
    groups = tuple(parts for parts in fused if len(parts) > 1)
    return Schedule((*outer, *tile), groups, (), (("warps", rng.choice((1, 4))),))


def plain(x: torch.Tensor, nest: Nest, name: str) -> Any:
    """A tensor of PyTorch's shape as the float64 array that the nest's comprehension reads."""
    shape = [e if e is not None else -1 for e in nest.tensor(name).shape]
    return x.detach().double().cpu().contiguous().reshape(shape).numpy()


def used(problem: Problem, tensors: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """What a kernel takes of PyTorch's operands: not the tensor whose gradient it makes."""
    unused = {"forward": None, "grad_input": 1, "grad_weight": 2}[problem.direction]
    return [t for i, t in enumerate(tensors) if t is not None and i != unused]


def check(problem: Problem, schedule: Schedule, batch: int = 2) -> str:
    """The kernel and the nest interpreter give what PyTorch gives; the printed source is returned."""
    nest = nest_of(problem)
    tensors = native.random_operands(problem, batch, device=DEVICE)
    operands = used(problem, tensors)
    ref = native.reference(problem, *tensors).cpu()
    scheduled = apply(nest, schedule)
    arrays = {name: plain(t, nest, name) for name, t in zip(nest.operands, operands)}
    interpreted = torch.from_numpy(interpret(scheduled, arrays, batch)).reshape(ref.shape)
    # PyTorch's hardswish on a GPU multiplies by a sixth in single precision, float64 or not.
    single = DEVICE == "cuda" and problem.activation == "hardswish"
    assert native.error(interpreted, ref) < (1e-7 if single else 1e-13)
    kernel = build(nest, schedule, "triton")
    out = torch.full(ref.shape, torch.nan, dtype=problem.dtype, device=DEVICE)
    out = out.contiguous(memory_format=problem.memory_format)
    kernel(*operands, out=out)
    tf32 = "tl.dot(" in kernel.source and problem.precision == "tf32" and problem.dtype == torch.float32
    limit = TF32 if tf32 else ROUNDING[problem.dtype]
    # Of what is added up: a sum may cancel.
    sizes = native.reference(replace(problem, activation=""), *(t if t is None else t.abs() for t in tensors))
    scale = ref.norm().item() / max(ref.norm().item(), sizes.norm().item(), 1e-300)
    assert native.error(out.cpu(), ref) * scale < limit, f"{problem}\n{schedule}\n{kernel.source}"
    return kernel.source


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Small problems; kernels no larger than the padded input."""
    groups, channels, filters = (draw(st.integers(1, most)) for most in (4, 3, 2))
    sides = []
    for most in (3, 5, 6):
        kernel, dilation, padding = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 2))
        extent = dilation * (kernel - 1) + 1
        least = max(1, extent - 2 * padding)
        size = draw(st.integers(least, max(least, most)))
        sides.append((size, kernel, draw(st.integers(1, 3)), padding, dilation))
    direction = draw(st.sampled_from(("forward", "grad_input", "grad_weight")))
    return Problem(
        direction,
        Geometry(groups * channels, groups * filters, groups, *zip(*sides)),
        dtype=draw(st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16))),
        layout=draw(st.sampled_from(("contiguous", "channels_last_3d"))),
        device=DEVICE,
        bias=direction == "forward" and draw(st.booleans()),
        activation=draw(st.sampled_from(("", *ACTIVATIONS))) if direction == "forward" else "",
        precision=draw(st.sampled_from(("ieee", "tf32"))),
    )


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the interpreter: a GPU says nothing
@settings(max_examples=examples(25))
@given(problems(), st.integers(1, 3), st.integers(0, 2**32))
def test_random_schedules(problem: Problem, batch: int, seed: int) -> None:
    check(problem, random_schedule(nest_of(problem), random.Random(seed)), batch)


SAME = Geometry(4, 4, 2, (3, 3, 5), (3, 3, 3), (1, 1, 1), (1, 1, 1))
FLAT = Geometry(4, 4, 2, (2, 4, 5), (1, 3, 3), (1, 1, 1), (0, 1, 1))
STRIDED = Geometry(2, 4, 2, (2, 6, 7), (1, 3, 2), (1, 2, 2), (0, 1, 0))
WIDE = Geometry(16, 32, 1, (3, 4, 5), (2, 3, 3), (1, 1, 2), (1, 1, 0), (1, 1, 2))
# Triton 3.6's interpreter multiplies the bit patterns of bfloat16 matrices as if they were integers.
PRODUCTS = (torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else []))

TAPS = "kt rest unroll | kh rest unroll | kw rest unroll"


def problem_of(direction: str, geometry: Geometry, **more: Any) -> Problem:
    return Problem(direction, geometry, device=DEVICE, **more)


@pytest.mark.parametrize("dtype", PRODUCTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
@pytest.mark.parametrize(
    ("direction", "text"),
    [
        (
            "forward",
            "n rest grid | g rest grid | t*h*w rest grid | f rest grid | c*kt*kh*kw rest serial"
            " | t*h*w 16 rows | f 16 cols | c*kt*kh*kw 32 depth",
        ),
        (
            "forward",
            "n rest grid | g rest grid | t rest grid | h*w rest grid | f rest grid"
            " | kt rest serial | c rest serial | kh rest unroll | kw rest unroll"
            " | f 32 rows | h*w 16 cols | c 16 depth",
        ),
        (
            "grad_input",
            "n rest grid | g rest grid | t*h*w rest grid | c rest grid | f*kt*kh*kw rest serial"
            " | c 16 cols | t*h*w 32 rows | f*kt*kh*kw 16 depth",
        ),
        (
            "grad_weight",
            "g rest grid | f rest grid | c*kt*kh*kw rest grid | n rest grid | t*h*w rest serial"
            " | f 16 rows | c*kt*kh*kw 32 cols | t*h*w 16 depth",
        ),
    ],
)
def test_matrix_products(direction: str, text: str, layout: str, dtype: torch.dtype) -> None:
    problem = problem_of(direction, WIDE, layout=layout, dtype=dtype, bias=direction == "forward")
    source = check(problem, schedule_of(text))
    assert "tl.dot(" in source
    assert ('input_precision="ieee"' in source) == (dtype == torch.float32)


def test_a_matrix_product_may_use_tf32() -> None:
    text = (
        "n rest grid | g rest grid | t*h*w rest grid | f rest grid | c*kt*kh*kw rest serial"
        " | t*h*w 16 rows | f 16 cols | c*kt*kh*kw 32 depth"
    )
    assert 'input_precision="tf32"' in check(problem_of("forward", WIDE, precision="tf32"), schedule_of(text))


def test_tf32_is_rounded_to_nearest_and_keeps_what_is_no_number() -> None:
    text = (
        "n rest grid | g rest grid | t*h*w rest grid | f rest grid | c rest serial | kt*kh*kw rest serial"
        " | t*h*w 16 rows | f 16 cols | c 16 depth"
    )
    geometry = Geometry(16, 16, 1, (1, 1, 8), (1, 1, 1))
    kernel = build(nest_of(problem_of("forward", geometry, precision="tf32")), schedule_of(text), "triton")
    image = torch.zeros(1, 16, 1, 1, 8)
    canonical = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)[0]
    image[0, 0, 0, 0] = torch.tensor(
        [1 + 2**-11, 1 + 2**-11 - 2**-20, -(1 + 2**-11), torch.inf, -torch.inf, torch.nan, canonical, 3e38]
    )
    weight = torch.zeros(16, 16, 1, 1, 1)
    weight[:, 0] = 1
    out = torch.empty(1, 16, 1, 1, 8, device=DEVICE)
    kernel(image.to(DEVICE), weight.to(DEVICE), out=out)
    one, less, minus, up, down, nan, other, large = out[0, 3, 0, 0].tolist()
    assert (one, less, minus) == (1 + 2**-10, 1.0, -(1 + 2**-10))
    assert (up, down) == (math.inf, -math.inf)
    assert math.isnan(nan) and math.isnan(other)
    assert large == pytest.approx(3e38, rel=2**-11)


def test_loads_ahead_of_products() -> None:
    """The order of the loads changes, and nothing else."""
    text = (
        "n rest grid | g rest grid | t rest grid | h*w rest grid | f rest grid | c rest serial"
        " | kt rest unroll | kh rest unroll | kw rest unroll | h*w 16 rows | f 16 cols | c 16 depth"
    )
    problem = problem_of("forward", WIDE, dtype=torch.float16)
    sources = [check(problem, schedule_of(text, ahead=ahead)) for ahead in (0, 2, 99)]
    lines = [[line.strip() for line in source.splitlines()] for source in sources]
    products = [[i for i, line in enumerate(found) if "tl.dot(" in line] for found in lines]
    loads = [[i for i, line in enumerate(found) if line.startswith("x")] for found in lines]
    before = [sum(i < dots[0] for i in found) for found, dots in zip(loads, products)]
    assert before[0] == 1 and before[1] == 3 and before[2] == len(loads[2])
    assert len({len(found) for found in loads}) == 1


def test_unrolled_points_share_loads() -> None:
    text = "n rest grid | g rest grid | f rest grid | h rest serial | c rest serial"
    problem = problem_of("forward", SAME, bias=True)
    source = check(problem, schedule_of(f"{text} | {TAPS} | t rest unroll | w 8 lanes"))
    # 27 weights, one bias, and three planes of the input in each of nine positions: not one for each use.
    assert source.count("tl.load(") == 27 + 1 + 3 * 9
    assert source.count("tl.zeros(") == 3
    assert len(re.findall(r"^ +acc_\d \+= x\d+ \* k\d+$", source, re.MULTILINE)) == 7 * 9


def test_lanes_over_channels_and_positions() -> None:
    text = (
        "n rest grid | t rest grid | h*w rest grid | c rest serial | kt rest serial | kh rest serial"
        " | kw rest unroll | h*w 8 lanes | g 2 lanes | f 2 lanes"
    )
    source = check(problem_of("forward", FLAT, layout="channels_last_3d", bias=True), schedule_of(text))
    assert "tl.zeros((8, 2, 2), tl.float32)" in source
    assert "tl.arange(0, 8)[:, None, None]" in source


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sums_over_lanes(dtype: torch.dtype) -> None:
    """A reduction beside a parallel dimension, and reductions with nothing beside them."""
    problem = problem_of("grad_weight", FLAT, dtype=dtype)
    outer = "g rest grid | f rest grid | c rest grid | kt rest grid | kh rest grid"
    source = check(
        problem,
        schedule_of(f"{outer} | n rest serial | h*w rest serial | t 2 lanes | kw 4 lanes | h*w 16 lanes"),
    )
    assert "axis=0, keep_dims=True" in source and "axis=2, keep_dims=True" in source
    source = check(
        problem, schedule_of(f"{outer} | kw rest grid | n rest serial | t 2 lanes | h 4 lanes | w 8 lanes")
    )
    assert "axis=" not in source and "tl.sum(acc)" in source


@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
def test_a_reduction_split_over_the_grid(layout: str) -> None:
    problem = problem_of("grad_weight", STRIDED, layout=layout, dtype=torch.bfloat16)
    text = (
        "g rest grid | n rest grid | t rest grid | f rest grid | c rest grid | kt rest grid | h rest serial"
    )
    source = check(problem, schedule_of(f"{text} | kh rest unroll | kw rest unroll | w 4 lanes"), batch=3)
    assert "partial = (n) * 2 + t" in source
    problem = problem_of("forward", FLAT, layout=layout, bias=True)
    text = "n rest grid | g rest grid | c rest grid | f rest grid | t rest grid | kt rest serial"
    source = check(problem, schedule_of(f"{text} | kh rest serial | kw rest serial | h*w 32 lanes"))
    assert re.search(r"(m\d+) = partial == 0\n(?s:.*)mask=\1, other=0.0", source)


def test_a_phase_makes_divisions_static() -> None:
    text = (
        "n rest grid | g rest grid | t rest grid | c rest grid | h rest grid | w rest serial | f rest serial"
    )
    problem = problem_of("grad_input", STRIDED)
    lanes = f"{text} | {TAPS} | w 4 lanes"
    assert "% 2 == 0" in check(problem, schedule_of(lanes))
    assert "% 2 == 0" not in check(problem, schedule_of(f"{lanes} | h 2 unroll phase | w 2 unroll phase"))


def test_divisions_at_run_time_in_flattened_lanes() -> None:
    text = "n rest grid | g rest grid | h*w rest grid | c rest grid | t rest serial | f rest serial"
    digits = schedule_of(f"{text} | kh*kw rest serial | kt rest unroll | h*w 16 lanes")
    assert check(problem_of("grad_input", STRIDED), digits).count("% 2 == 0") == 2


def test_flattened_rows_that_follow_each_other_are_read_as_one() -> None:
    """No decoding in the address: Triton sees neighbours there, and loads them together."""
    text = "n rest grid | g rest grid | h*w rest grid | f rest serial | t rest serial | c rest serial"
    source = check(problem_of("forward", FLAT), schedule_of(f"{text} | {TAPS} | h*w 32 lanes"))
    assert "% 5" in source and "// 5" not in source


def test_masks_only_where_they_are_needed() -> None:
    inside = Geometry(2, 2, 2, (3, 4, 9), (1, 1, 2))
    text = (
        "n rest grid | g rest grid | f rest grid | t rest grid | h rest grid | c rest serial | {} | w 8 lanes"
    )
    whole = text.format("kt rest unroll | kh rest unroll | kw rest unroll")
    assert "mask" not in check(problem_of("forward", inside), schedule_of(whole))
    over = whole.replace("8 lanes", "16 lanes")
    assert "w < 8" in check(problem_of("forward", inside), schedule_of(over))


def test_infinities_do_not_spread_through_overshoot() -> None:
    """A step beyond a reduction reads nothing: zero times infinity would be no number."""
    problem = problem_of("forward", Geometry(1, 1, 1, (1, 1, 8), (1, 1, 3)))
    text = (
        "n rest grid | g rest grid | f rest grid | t rest grid | h rest grid | c rest serial | kt rest serial"
    )
    kernel = build(
        nest_of(problem), schedule_of(f"{text} | kh rest serial | kw 4 lanes | w 8 lanes"), "triton"
    )
    x = torch.ones(1, 1, 1, 1, 8, device=DEVICE)
    x[..., 7] = torch.inf
    out = torch.empty(1, 1, 1, 1, 6, device=DEVICE)
    kernel(x, torch.ones(1, 1, 1, 1, 3, device=DEVICE), out=out)
    assert out.flatten().tolist() == [3, 3, 3, 3, 3, torch.inf]


@pytest.mark.parametrize("bind", ["grid", "serial"])
def test_empty_batches(bind: str) -> None:
    problem = problem_of("grad_weight", FLAT)
    operands = native.random_operands(problem, 0, device=DEVICE)
    dy, x, weight = (t for t in operands if t is not None)
    grid = "g rest grid | f rest grid | c rest grid | kt rest grid"
    text = (
        f"{grid} | n rest {bind} | kh rest grid"
        if bind == "grid"
        else f"{grid} | kh rest grid | n rest serial"
    )
    digits = f"{text} | t rest serial | h*w rest serial | kw rest unroll | h*w 16 lanes"
    out = torch.full_like(weight, torch.nan)
    build(nest_of(problem), schedule_of(digits), "triton")(dy, x, out=out)
    assert torch.equal(out, torch.zeros_like(out))


def test_large_images_are_addressed_in_64_bits() -> None:
    text = "n rest grid | g rest grid | f rest grid | t rest grid | h rest grid | w rest grid | c rest serial"
    digits = schedule_of(f"{text} | {TAPS} | w 128 lanes")
    small, large = (
        print_triton(apply(nest_of(problem_of("forward", Geometry(2, 2, 2, size, (1, 1, 1)))), digits))
        for size in ((1000, 1000, 1000), (1100, 1000, 1000))
    )
    # The batch alone; the batch, the group, the time, the row, the column's block and the lanes.
    assert small.count("tl.int64") == 1
    assert large.count("tl.int64") == 6


def test_more_programs_than_a_grid_holds_are_refused() -> None:
    kernel = build(nest_of(problem_of("forward", SAME)), serial_but("n", "grid"), "triton")
    x = torch.zeros(1, device=DEVICE)
    with pytest.raises(
        ScheduleError, match=r"batch of 2147483648 needs 2147483648 programs, .* at most 2147483647"
    ):
        kernel.launch([x, x], x, 2**31)


def serial_but(axis: str, bind: str) -> Schedule:
    plain = serial(nest_of(problem_of("forward", SAME)))
    return Schedule(tuple(Digit(d.axis, None, bind) if d.axis == axis else d for d in plain.digits))


def test_a_nest_without_lanes_runs() -> None:
    tiny = problem_of("forward", Geometry(2, 2, 2, (1, 2, 2), (1, 1, 2)), bias=True, dtype=torch.float16)
    check(tiny, serial(nest_of(tiny)))
    check(tiny, serial_but("n", "grid"), batch=3)


LANES = "n rest grid | g rest grid | f rest grid | t rest grid | h rest grid | w rest grid | c rest serial"
SERIAL_TAPS = "kt rest serial | kh rest serial | kw rest serial"
DOT = LANES.replace("h rest grid | w rest grid", "h*w rest grid").replace("c rest", "c*kt*kh*kw rest")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{LANES} | {SERIAL_TAPS} | w 3 lanes", "3 lanes of w are no power of two"),
        (f"{LANES} | {SERIAL_TAPS} | w 1024 lanes | f 1024 lanes", "a tile of 1048576 elements is too large"),
        (f"{DOT} | h*w 16 rows | f 16 cols", "one loop each of rows, cols and depth, not .*rows.*cols"),
        (
            f"{DOT} | h*w 16 rows | f 16 cols | c*kt*kh*kw 16 depth | t 2 lanes",
            "one loop each of rows, cols and depth",
        ),
        (f"{DOT} | h*w 16 rows | f 8 cols | c*kt*kh*kw 16 depth", "8 cols of f are too few; use 16 or more"),
        (
            f"{DOT} | h*w 16 rows | c*kt*kh*kw 16 cols | f 16 depth",
            "cols run along c.* must run along a parallel axis",
        ),
        (
            f"{DOT} | h*w 16 rows | t 16 cols | c*kt*kh*kw 16 depth",
            "over rows, depth and cols, depth; the factors are",
        ),
        (
            f"{LANES} | {SERIAL_TAPS} | t 6 unroll | w 4096 lanes | h 4 lanes",
            "in 98304 registers, where a program has 65536; use fewer lanes",
        ),
        (
            f"{LANES} | {TAPS} | t 6 unroll | h 6 unroll | w 6 unroll",
            "5832 unrolled terms are more than 2000",
        ),
        (
            f"{LANES} | {SERIAL_TAPS} | t 5 unroll | h 5 unroll | w 6 unroll",
            "150 accumulators are more than 128",
        ),
    ],
)
def test_what_this_target_cannot_do(text: str, message: str) -> None:
    large = Geometry(4, 4, 2, (6, 6, 6), (3, 3, 3), (1, 1, 1), (1, 1, 1))
    scheduled = apply(nest_of(problem_of("forward", large)), schedule_of(text))
    with pytest.raises(ScheduleError, match=message):
        print_triton(scheduled)


def test_stages_and_float64_products_are_refused() -> None:
    nest = nest_of(problem_of("forward", SAME, dtype=torch.float64))
    plain = schedule_of(f"{LANES} | {SERIAL_TAPS} | w 4 lanes")
    with pytest.raises(ScheduleError, match="Triton has no stages, but I has one"):
        print_triton(apply(nest, Schedule(plain.digits, stage=(("I", 7),))))
    with pytest.raises(ScheduleError, match="no matrix unit multiplies 2 factors of float64"):
        print_triton(apply(nest, schedule_of(f"{DOT} | h*w 16 rows | f 16 cols | c*kt*kh*kw 16 depth")))


def test_golden_sources(golden: Golden) -> None:
    """Twice each, from different objects: the text is a function of the nest."""
    cases = {
        "forward": (
            Problem("forward", SAME, dtype=torch.bfloat16, bias=True),
            "n rest grid | g rest grid | h*w rest grid | f rest serial | t rest serial | c rest serial"
            " | kh rest serial | kt rest unroll | kw rest unroll | t 2 unroll | h*w 8 lanes",
        ),
        "grad_input": (
            Problem("grad_input", STRIDED),
            "n rest grid | g rest grid | t rest grid | c rest grid | h rest grid | w rest serial"
            " | f rest serial | kt rest serial | kh rest unroll | kw rest unroll | w 4 lanes"
            " | h 2 unroll phase | w 2 unroll phase",
        ),
        "grad_weight": (
            Problem("grad_weight", WIDE, dtype=torch.float16, layout="channels_last_3d"),
            "g rest grid | f rest grid | c*kt*kh*kw rest grid | n rest grid | t*h*w rest serial"
            " | f 16 rows | c*kt*kh*kw 32 cols | t*h*w 16 depth",
        ),
        "skewed": (
            Problem("forward", Geometry(2, 2, 2, (2, 4, 8), (3, 3, 3), (1, 1, 1), (1, 1, 1)), torch.bfloat16),
            "n rest grid | g rest grid | f*hi*wi rest grid | t rest grid | h*w rest grid"
            " | c*hs*ws rest serial | kt rest unroll | t 2 unroll"
            " | h*w 16 rows | f*hi*wi 16 cols | c*hs*ws 32 depth | ws 2 depth phase",
        ),
    }
    skews = {"skewed": (Skew("h", 4), Skew("w", 4, 2))}
    for name, (problem, text) in cases.items():
        schedule = replace(schedule_of(text), skew=skews.get(name, ()))
        source = print_triton(apply(nest_of(problem), schedule), across=True)
        assert source == print_triton(apply(nest_of(problem), schedule), across=True)
        golden(f"triton_{name}.py.txt", source)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("direction", "layout", "text"),
    [
        (
            "forward",
            "contiguous",
            "n rest grid | g rest grid | f rest grid | t rest grid | h*w rest grid | c rest serial | {taps}"
            " | t 4 unroll | h*w 128 lanes",
        ),
        (
            "forward",
            "channels_last_3d",
            "n rest grid | t rest grid | h*w rest grid | f rest grid | c rest serial | {taps}"
            " | h*w 8 lanes | g 64 lanes",
        ),
        (
            "grad_input",
            "contiguous",
            "n rest grid | g rest grid | c rest grid | t rest grid | h rest grid | w rest grid"
            " | f rest serial | {taps} | t 2 unroll | h 4 unroll | w 64 lanes",
        ),
        (
            "grad_weight",
            "contiguous",
            "g rest grid | f rest grid | c rest grid | n rest grid | t rest grid | h*w rest serial | {taps}"
            " | h*w 128 lanes",
        ),
    ],
)
def test_a_layer_of_real_size(direction: str, layout: str, text: str, dtype: torch.dtype) -> None:
    problem = problem_of(direction, Geometry(64, 64, 64, (50, 50, 50), (3, 3, 3)), layout=layout, dtype=dtype)
    nest = nest_of(problem)
    tensors = native.random_operands(problem, 4)
    operands = used(problem, tensors)
    ref = native.reference(problem, *tensors)
    out = torch.full(ref.shape, torch.nan, dtype=dtype, device=DEVICE)
    out = out.contiguous(memory_format=problem.memory_format)
    build(nest, schedule_of(text.format(taps=TAPS), warps=4), "triton")(*operands, out=out)
    assert native.error(out, ref) < ROUNDING[dtype]
