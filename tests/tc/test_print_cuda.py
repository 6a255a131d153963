"""Products in shared memory as CUDA C++, emulated: right for any geometry that the space has products of."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from g3dswap.comprehensions import nest as nest_of
from g3dswap.errors import ScheduleError
from g3dswap.problem import ACTIVATIONS, Geometry, Problem
from g3dswap.tc import model_staged, sums_cuda
from g3dswap.tc.kernel import Kernel, build, show
from g3dswap.tc.nest import Nest
from g3dswap.tc.print_cpp import print_cpp
from g3dswap.tc.print_triton import print_triton
from g3dswap.tc.product import Product
from g3dswap.tc.program_cuda import Settings
from g3dswap.tc.schedule import Schedule, apply
from g3dswap.tc.space_staged import families
from g3dswap.tc.space_triton import BATCH
from g3dswap.tc.sums_cuda import SHARED
from tests.emulated import emulated
from tests.geometries import TOLERANCE, Case, error, expected, layer_of, operands
from tests.tc.spaces import every

PASSES = ("forward", "grad_input", "grad_weight")
TF32 = 6e-4
"""Relative error of short sums whose factors are rounded to TF32."""
DTYPES = {torch.bfloat16: "ieee", torch.float16: "ieee", torch.float32: "tf32"}
"""And what a matrix unit may do with them."""
GEOMETRIES = {
    "depthwise 7x7x7": Geometry(2, 2, 2, (3, 9, 12), (7, 7, 7), padding=(3, 3, 3)),
    "depthwise 5x5x5": Geometry(3, 3, 3, (4, 6, 16), (5, 5, 5), padding=(2, 2, 2)),
    "lines of odd length": Geometry(2, 2, 2, (3, 6, 11), (3, 3, 3), padding=(1, 1, 1)),
    "four channels a group": Geometry(16, 16, 4, (4, 6, 8), (3, 3, 3), padding=(1, 1, 1)),
    "sixteen channels a group": Geometry(32, 32, 2, (2, 7, 7), (3, 3, 3), padding=(1, 1, 1)),
    "more filters than channels": Geometry(16, 32, 1, (2, 6, 6), (3, 3, 3), padding=(1, 1, 1)),
    "32 channels a group": Geometry(32, 32, 1, (1, 4, 4), (3, 3, 3), padding=(1, 1, 1)),
    "strided": Geometry(16, 16, 2, (4, 9, 12), (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    "dilated": Geometry(16, 16, 1, (3, 9, 9), (3, 3, 3), (1, 1, 1), (2, 2, 2), (2, 2, 2)),
    "a multiplier": Geometry(4, 8, 4, (3, 6, 16), (3, 3, 3), padding=(1, 1, 1)),
    "many single channels": Geometry(24, 24, 24, (3, 6, 13), (5, 5, 5), padding=(2, 2, 2)),
}


def problem_of(direction: str, geometry: Geometry, layout: str = "contiguous", bias: bool = False) -> Problem:
    return Problem(direction, geometry, torch.bfloat16, layout, bias=bias and direction == "forward")


def products(nest: Nest, batch: int = BATCH) -> list[Product]:
    """All that the space proposes for a nest."""
    return every(families(nest, batch))


def tolerance(problem: Problem) -> float:
    return TF32 if problem.precision == "tf32" else TOLERANCE[problem.dtype]


def check(case: Case, kernel: Kernel) -> None:
    tensors, out = operands(case)
    kernel(*tensors, out=out)
    assert error(out, expected(case, tensors)) <= tolerance(case.problem)


def checked(case: Case, found: list[Product], most: int = 8) -> Kernel | None:
    """The kernel of the first of these products that prints, which gave the right result."""
    nest = nest_of(case.problem)
    for product in found[:most]:
        schedule = product.schedule(nest)
        assert Product.of(schedule).schedule(nest) == schedule
        assert Schedule.from_json(schedule.to_json()) == schedule
        try:
            kernel = emulated(nest, schedule)
        except ScheduleError:
            continue
        check(case, kernel)
        return kernel
    return None


def right_on_a_gpu(case: Case, schedules: Iterable[Schedule]) -> int:
    """How many of these schedules print; their kernels gave the right result."""
    nest, (tensors, out) = nest_of(case.problem), operands(case)
    reference, done = expected(case, tensors), 0
    for schedule in schedules:
        try:
            kernel = build(nest, schedule, "triton")
        except ScheduleError:
            continue
        result = out.cuda()
        kernel(*(tensor.cuda() for tensor in tensors), out=result)
        assert error(result.cpu(), reference) <= tolerance(case.problem)
        done += 1
    return done


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small problems of few and of many channels a group, most of which have products in shared memory."""
    shapes = [(1, 16), (2, 16), (1, 32), (4, 4), (2, 8), (3, 1), (16, 1), (2, 2), (1, 3)]
    groups, channels = draw(st.sampled_from(shapes))
    filters = draw(st.sampled_from([channels, channels, 2 * channels, 8]))
    size = draw(st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(1, 12)))
    sides = [1, 3, 3, 5], [1, 1, 1, 2], [0, 1, 2], [1, 1, 1, 2]
    geometry = layer_of(draw, (groups, channels, filters), size, *sides)
    direction = draw(st.sampled_from(PASSES))
    dtype = draw(st.sampled_from([*DTYPES]))
    problem = Problem(
        direction,
        geometry,
        dtype,
        draw(st.sampled_from(["contiguous", "channels_last_3d"])),
        bias=direction == "forward" and draw(st.booleans()),
        precision=DTYPES[dtype],
    )
    return Case(problem, draw(st.integers(1, 2)), draw(st.integers(0, 2**31)))


@given(cases())
@settings(max_examples=20, deadline=None)
def test_random_geometries(case: Case) -> None:
    found = products(nest_of(case.problem))
    random.Random(case.seed).shuffle(found)
    assume(checked(case, found) is not None)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("direction", PASSES)
def test_each_kind_of_layer_has_products(direction: str, name: str, layout: str) -> None:
    problem = problem_of(direction, GEOMETRIES[name], layout, bias=True)
    found = products(nest_of(problem))
    few = name in ("strided", "dilated") and layout == "contiguous" and direction != "forward"
    if not found:
        # In channels_last_3d, three groups would leave a warp of four idle; some others have no fragments.
        last = layout == "channels_last_3d"
        three = last and problem.geometry.groups == 3
        several = last and name == "a multiplier" and direction == "grad_weight"
        assert three or several or few or (name == "strided" and direction == "grad_input")
        return
    random.Random(name + direction).shuffle(found)
    assert checked(Case(problem, 2, 0), found, most=40) is not None


def test_the_next_part_is_on_its_way_while_one_is_multiplied() -> None:
    problem = problem_of("grad_weight", GEOMETRIES["depthwise 5x5x5"])
    kernel = checked(Case(problem, 3, 1), [p for p in products(nest_of(problem)) if p.stages == 2], most=40)
    assert kernel is not None
    assert "fetch(round + 1)" in kernel.source and "round % 2" in kernel.source


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("depthwise 5x5x5", "contiguous"),
        ("four channels a group", "contiguous"),
        ("four channels a group", "channels_last_3d"),
        ("many single channels", "channels_last_3d"),
    ],
)
def test_where_a_depth_has_blocks_taps_share_what_they_read(name: str, layout: str) -> None:
    problem = problem_of("grad_weight", GEOMETRIES[name], layout)
    found = [p for p in products(nest_of(problem)) if {axis for axis, _ in p.tile} & {*p.depth[0]}]
    random.Random(name).shuffle(found)

    def loads(product: Product) -> float | None:
        """Of the image, for each product of fragments."""
        kernel = checked(Case(problem, 2, 5), [product])
        body = kernel.source.split("kernel(")[1] if kernel else ""
        return body.count("transposed(a, ") / body.count("multiply(") if kernel else None

    for block in found:
        plain = replace(block, tile=tuple(t for t in block.tile if t[0] not in block.depth[0]))
        shared, alone = loads(block), loads(plain)
        if shared and alone:
            assert shared < alone
            return
    raise AssertionError("none of them prints.")


WALKED = {
    "single": Geometry(3, 3, 3, (5, 8, 12), (3, 3, 3), padding=(1, 1, 1)),
    "several": Geometry(16, 16, 4, (5, 8, 8), (3, 3, 3), padding=(1, 1, 1)),
    "strided": Geometry(16, 16, 1, (9, 8, 12), (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    "many": Geometry(24, 24, 24, (5, 8, 13), (3, 3, 3), padding=(1, 1, 1)),
}


@pytest.mark.parametrize(
    ("name", "layout", "axis"),
    [
        ("single", "contiguous", "t"),
        ("several", "contiguous", "h"),
        ("strided", "contiguous", "t"),
        ("several", "channels_last_3d", "t"),
        ("many", "channels_last_3d", "h"),
    ],
)
@pytest.mark.parametrize("direction", ["forward", "grad_input"])
def test_on_a_walk_the_next_part_is_on_its_way(direction: str, name: str, layout: str, axis: str) -> None:
    problem = problem_of(direction, WALKED[name], layout, bias=True)
    found = [p for p in products(nest_of(problem)) if any(n.startswith(axis) for n, _ in p.split)]
    random.Random(name + direction).shuffle(found)
    kernel = checked(Case(problem, 2, 8), found, most=40)
    assert kernel is not None and "fetch(step + 1)" in kernel.source and "step % 2" in kernel.source


@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
@pytest.mark.parametrize("name", ["sixteen channels a group", "a multiplier"])
@pytest.mark.parametrize("direction", PASSES)
def test_a_program_has_a_block_of_the_batch(
    direction: str, name: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one is short, and may have one image only; a smaller batch is a part of one block."""
    monkeypatch.setattr("g3dswap.tc.nest.ENOUGH", 1)
    monkeypatch.setattr("g3dswap.tc.batch_text.ENOUGH", 1)
    problem = problem_of(direction, GEOMETRIES[name], layout, bias=True)
    found = [
        replace(p, split=(("n", 3), *(pair for pair in p.split if pair[0] != "n")))
        for p in products(nest_of(problem))
    ]
    random.Random(name + direction).shuffle(found)
    kernel = checked(Case(problem, 8, 5), found, most=40)
    assert kernel is not None and kernel.nest.blocks is not None and kernel.nest.blocks.most == 3
    assert "const int share = " in kernel.source and kernel.nest.blocks.number(8) == 3
    assert (kernel.partial_counts or (0,))[0] == (None if direction == "grad_weight" else 0)
    for batch in (7, 2, 1):
        check(Case(problem, batch, batch), kernel)


@pytest.mark.parametrize(("batch", "longest"), [(64, 8), (16, 2), (8, 1)])
def test_blocks_leave_programs_enough(batch: int, longest: int) -> None:
    geometry = replace(GEOMETRIES["sixteen channels a group"], in_channels=256, out_channels=256, groups=16)
    nest = nest_of(problem_of("forward", geometry))
    whole = [p for p in products(nest, batch) if p.rows[1] == 98 and p.cols[1] == 16 and not p.apart]
    assert max(dict(p.split).get("n", 1) for p in whole) == longest


def test_sums_of_blocks_are_as_long_as_each_other() -> None:
    geometry = replace(GEOMETRIES["sixteen channels a group"], in_channels=256, out_channels=256, groups=16)
    nest = nest_of(problem_of("grad_weight", geometry))
    blocks = {dict(p.split)["n"] for p in products(nest, 30) if "n" in dict(p.split)}
    assert blocks >= {1, 8, 15} and 16 not in blocks  # 30 images in 30, 4 and 2 blocks


def wholes(problem: Problem) -> list[Product]:
    """The products that copy a part as it lies."""
    return [product for product in products(nest_of(problem)) if product.whole]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["sixteen channels a group", "lines of odd length", "strided"])
@pytest.mark.parametrize("direction", PASSES)
def test_what_lies_together_is_copied_as_it_lies(direction: str, name: str, dtype: torch.dtype) -> None:
    plain = problem_of(direction, GEOMETRIES[name], bias=True)
    problem = replace(plain, dtype=dtype, precision=DTYPES[dtype])
    found = wholes(problem)
    if dtype == torch.float32 and name == "lines of odd length":
        assert not found  # single channels are no products in TF32
        return
    random.Random(name + direction).shuffle(found)
    kernel = checked(Case(problem, 3, 4), found, most=40)
    assert (
        kernel is not None
        and "gather<" in kernel.source
        and ">(to + (x0 * 1), from + (x0 * 1), true)" in kernel.source
    )


def test_walks_gather_each_image() -> None:
    """The zeros around it stay; what is copied meanwhile lies elsewhere."""
    problem = problem_of("forward", GEOMETRIES["sixteen channels a group"], bias=True)
    whole = next(p for p in wholes(problem) if p.rows[1] == 98 and not p.split)
    kernel = checked(Case(problem, 5, 4), [replace(whole, split=(("n", 8),))])
    assert kernel is not None and kernel.source.count("clear(memory") == 1


@pytest.mark.parametrize("direction", PASSES)
def test_parts_that_do_not_lie_together_are_refused(direction: str) -> None:
    """Channels beside each other need no gathering, and a few lines of each channel lie apart."""
    geometry = GEOMETRIES["sixteen channels a group"]
    assert not wholes(problem_of(direction, geometry, "channels_last_3d"))
    for layout, most in (("channels_last_3d", 98), ("contiguous", 28)):
        nest = nest_of(problem_of(direction, geometry, layout))
        sides = ((p, p.depth if direction == "grad_weight" else p.rows) for p in products(nest))
        part = next(p for p, side in sides if side[1] <= most and not p.apart)
        schedule = replace(part, whole=True).schedule(nest)
        assert model_staged.cost(apply(nest, schedule), Settings.of(schedule)) == math.inf
        with pytest.raises(ScheduleError, match="reads no whole part of a tensor"):
            emulated(nest, schedule)


def test_walks_that_are_none_are_refused() -> None:
    nest = nest_of(problem_of("forward", WALKED["single"]))
    product = next(p for p in products(nest) if p.split == (("t", 2),))
    groups = replace(product, split=(("g", 3),)).schedule(nest)
    with pytest.raises(ScheduleError, match="another at each step of a walk"):
        emulated(nest, groups)
    schedule = product.schedule(nest)
    with pytest.raises(ScheduleError, match="a walk is along positions, outside of all sums"):
        emulated(nest, replace(schedule, stage=(("I", schedule.stage[0][1] - 1),)))
    place = next(i for i, digit in enumerate(schedule.digits) if digit.bind == "serial")
    batch, *others = schedule.digits
    others.insert(place, replace(batch, bind="serial"))
    with pytest.raises(ScheduleError, match="a walk is along positions, outside of all sums"):
        emulated(nest, replace(schedule, digits=tuple(others), stage=(("I", place + 1),)))
    weights = nest_of(problem_of("grad_weight", WALKED["single"]))
    with pytest.raises(ScheduleError, match="has the same results throughout"):
        emulated(weights, replace(products(weights)[0], split=(("g", 3),)).schedule(weights))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
@pytest.mark.parametrize("name", ["sixteen channels a group", "strided", "32 channels a group"])
def test_teams_of_warps_have_parts_of_their_own(name: str, layout: str) -> None:
    problem = problem_of("grad_weight", GEOMETRIES[name], layout)
    for stages in (1, 2):
        found = [p for p in products(nest_of(problem)) if p.teams > 1 and p.stages == stages and not p.split]
        kernel = checked(Case(problem, 5, 3), found, most=40)  # not all teams have as many parts
        assert kernel is not None and re.search(r"meet<\d+>\(team\)", kernel.source)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
def test_programs_share_channels_and_filters_of_a_gradient(layout: str) -> None:
    problem = problem_of("grad_weight", GEOMETRIES["32 channels a group"], layout)
    made = [p for p in products(nest_of(problem)) if not p.split]
    for rows, cols in ((32, 8), (16, 32), (16, 8)):
        kernel = checked(
            Case(problem, 3, 2), [p for p in made if (p.rows[1], p.cols[1]) == (rows, cols)], most=40
        )
        assert kernel is not None


def test_unequal_teams_are_refused() -> None:
    nest = nest_of(problem_of("grad_weight", GEOMETRIES["sixteen channels a group"]))
    product = replace(next(p for p in products(nest) if p.teams > 1), warps=4, teams=3)
    with pytest.raises(ScheduleError, match="3 teams of 4 warps"):
        emulated(nest, product.schedule(nest))


@pytest.mark.parametrize("name", ["depthwise 5x5x5", "four channels a group"])
@pytest.mark.parametrize("room", [SHARED, 8 * 1024])
def test_replicas_and_the_sums_of_all_warps_are_added_up(
    name: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums_cuda, "SHARED", room)  # where there is little, warps take turns
    problem = problem_of("grad_weight", GEOMETRIES[name])
    found = [p for p in products(nest_of(problem)) if p.skew and p.warps > 2 and not p.split]
    kernel = checked(Case(problem, 2, 1), found, most=40)
    assert kernel is not None and kernel.nest.replicas and kernel.partial_counts is None


def test_replicas_in_several_programs_are_refused() -> None:
    nest = nest_of(problem_of("grad_weight", GEOMETRIES["depthwise 5x5x5"]))
    product = next(p for p in products(nest) if p.cols == (("wi",), 16))
    schedule = product.schedule(nest)
    digits = tuple(replace(d, count=8) if d.bind == "cols" else d for d in schedule.digits)
    with pytest.raises(ScheduleError, match="wi is split over programs"):
        emulated(nest, replace(schedule, digits=digits))


def test_partial_results_of_a_split_sum() -> None:
    problem = problem_of("grad_weight", GEOMETRIES["sixteen channels a group"], "channels_last_3d")
    found = [p for p in products(nest_of(problem)) if p.split == (("n", 1),)]
    kernel = checked(Case(problem, 3, 2), found, most=40)
    assert kernel is not None and kernel.partial_counts == (None,)


@pytest.mark.parametrize("direction", ["forward", "grad_input"])
def test_a_program_has_several_groups_whose_channels_lie_together(direction: str) -> None:
    problem = problem_of(direction, GEOMETRIES["four channels a group"], "channels_last_3d")
    found = [p for p in products(nest_of(problem)) if ("g", 4) in p.tile]
    assert checked(Case(problem, 2, 3), found, most=40) is not None


@pytest.mark.parametrize(("channels", "word"), [(32, 8), (54, 2), (20, 4), (23, 1)])
@pytest.mark.parametrize("direction", PASSES)
def test_warps_have_a_group_each(direction: str, channels: int, word: int) -> None:
    """What they read lies side by side, and comes and goes in words of as many channels as are aligned."""
    geometry = Geometry(channels, channels, channels, (2, 5, 9), (3, 3, 3), padding=(1, 1, 1))
    problem = problem_of(direction, geometry, "channels_last_3d", bias=True)
    found = [p for p in products(nest_of(problem)) if p.apart == (("g", 8),)]
    random.Random(channels).shuffle(found)
    kernel = checked(Case(problem, 2, 6), found, most=40)
    assert kernel is not None
    assert f" turn<{word}>(" in kernel.source
    assert (f" put<{word}>(" in kernel.source) == (direction != "grad_weight")


@pytest.mark.parametrize(
    ("channels", "filters", "groups"), [(4, 4, 8), (8, 8, 4), (16, 16, 4), (4, 8, 7), (2, 4, 5), (3, 3, 16)]
)
@pytest.mark.parametrize("direction", PASSES)
def test_warps_have_a_group_of_several_channels(
    direction: str, channels: int, filters: int, groups: int
) -> None:
    """What lies behind each other are groups, and their results are written together."""
    geometry = Geometry(channels * groups, filters * groups, groups, (2, 5, 9), (3, 3, 3), padding=(1, 1, 1))
    problem = problem_of(direction, geometry, "channels_last_3d", bias=True)
    nest, read = nest_of(problem), filters if direction == "grad_input" else channels
    written = channels + filters - read
    # A program that has a part of a group's filters writes them as others do.
    found = [p for p in products(nest) if p.apart and (p.cols[1] >= written or direction == "grad_weight")]
    random.Random(channels).shuffle(found)
    kernel = checked(Case(problem, 2, 7), found, most=40)
    assert kernel is not None
    assert f" copy<{2 * math.gcd(8, read)}>(" in kernel.source
    assert (" put<" in kernel.source) == (direction != "grad_weight")


def test_what_no_warps_can_share_is_refused() -> None:
    nest = nest_of(problem_of("forward", GEOMETRIES["many single channels"], "channels_last_3d"))
    product = next(p for p in products(nest) if p.apart == (("g", 8),))
    with pytest.raises(ScheduleError, match="8 steps of g are not one for each of 4 warps"):
        emulated(nest, replace(product, warps=4).schedule(nest))
    scheduled = apply(nest, replace(product, warps=8).schedule(nest))
    with pytest.raises(ScheduleError, match="Triton has no loops over warps"):
        print_triton(replace(scheduled, stages=(), _by_name={}))
    with pytest.raises(ScheduleError, match="C\\+\\+ has one axis of lanes"):
        print_cpp(scheduled)


@pytest.mark.parametrize("name", ["depthwise 5x5x5", "sixteen channels a group", "four channels a group"])
def test_sides_of_the_kernel_may_be_loops(name: str) -> None:
    problem = problem_of("grad_input", GEOMETRIES[name])
    looped = [replace(p, tile=tuple(t for t in p.tile if t[0] != "kt")) for p in products(nest_of(problem))]
    kernel = checked(Case(problem, 2, 5), looped, most=40)
    assert kernel is not None and "for (int kt_" in kernel.source


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_functions_of_the_result(activation: str) -> None:
    plain = problem_of("forward", GEOMETRIES["four channels a group"], bias=True)
    problem = replace(plain, activation=activation)
    assert checked(Case(problem, 1, 4), products(nest_of(problem)), most=40) is not None


@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
@pytest.mark.parametrize("name", ["four channels a group", "strided"])
@pytest.mark.parametrize("direction", PASSES)
def test_floats_are_rounded_to_tf32(direction: str, name: str, layout: str) -> None:
    half = problem_of(direction, GEOMETRIES[name], layout, bias=True)
    problem = replace(half, dtype=torch.float32, precision="tf32")
    found = products(nest_of(problem))
    assert not any(product.apart for product in found)
    kernel = checked(Case(problem, 3, 5), found, most=40)
    assert kernel is not None and "tf32" in kernel.source and "u16* " not in kernel.source


@pytest.mark.parametrize("direction", PASSES)
def test_infinities_and_nans_stay(direction: str) -> None:
    """The greatest float of TF32 and what rounds beyond it, too."""
    half = problem_of(direction, GEOMETRIES["32 channels a group"], "channels_last_3d")
    problem = replace(half, dtype=torch.float32, precision="tf32")
    case = Case(problem, 1, 0)
    tensors, out = operands(case)
    nest = nest_of(problem)
    kernel = emulated(nest, products(nest)[0].schedule(nest))
    for value in (math.inf, -math.inf, math.nan, 3.4028e38):
        special = tensors[0].clone()
        special[0, 0, 0, 0, 0] = value
        kernel(special, *tensors[1:], out=out)
        assert not out.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
@pytest.mark.parametrize("direction", PASSES)
def test_on_a_gpu(direction: str, layout: str, dtype: torch.dtype) -> None:
    """What the emulation cannot show: instructions, copies that are under way, launches."""
    rng = random.Random(f"{direction} {layout} {dtype}")
    for geometry in GEOMETRIES.values():
        activation = rng.choice(("", *ACTIVATIONS)) if direction == "forward" else ""
        plain = problem_of(direction, geometry, layout, bias=True)
        problem = replace(plain, dtype=dtype, activation=activation, precision=DTYPES[dtype])
        case, nest = Case(problem, 3, rng.randrange(1000)), nest_of(problem)
        found = [p.schedule(nest) for p in products(nest)]
        right_on_a_gpu(case, rng.sample(found, min(3, len(found))))


def test_the_image_is_copied_once_in_wide_words() -> None:
    nest = nest_of(problem_of("forward", GEOMETRIES["depthwise 7x7x7"]))
    product = next(p for p in products(nest) if p.skew and max(s.word for s in p.skew) == 4)
    source = show(nest, product.schedule(nest), "triton")
    assert source.count("copy<8>(") == 1  # of a line of 12, eight bytes at a time
    assert "I + " not in source.split("committed();", 2)[2]  # and not read from memory after that


def test_what_does_not_fit_is_refused() -> None:
    nest = nest_of(problem_of("forward", GEOMETRIES["sixteen channels a group"]))
    product = next(p for p in products(nest) if p.rows[0] == ("h", "w") and dict(p.tile).get("t", 1) == 1)
    schedule = product.schedule(nest)
    emulated(nest, schedule)

    def refused(changed: Schedule, message: str) -> None:
        with pytest.raises(ScheduleError, match=message):
            emulated(nest, changed)

    def with_count(bind: str, count: int) -> Schedule:
        digits = (replace(d, count=count) if d.bind == bind else d for d in schedule.digits)
        return replace(schedule, digits=tuple(digits))

    refused(with_count("cols", 12), "12 cols are no multiple of 8")
    refused(with_count("depth", 24), "a depth of 24 is no multiple of 16")
    refused(with_count("rows", 10), "along lines that a program has a part of")
    refused(replace(schedule, stage=(("K", 5),)), r"stages \['I'\], not \['K'\]")
    wide = nest_of(
        replace(problem_of("forward", GEOMETRIES["sixteen channels a group"]), dtype=torch.float32)
    )
    with pytest.raises(ScheduleError, match="two factors of a half type, or TF32, not 2 of float32"):
        emulated(wide, schedule)
