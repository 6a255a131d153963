"""The lane schedules that are proposed: right results, walks, lanes along reductions, and their ranking."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from g3dswap.comprehensions import nest as nest_of
from g3dswap.problem import DIRECTIONS, LAYOUTS, Geometry, Problem
from g3dswap.tc import model_triton, space
from g3dswap.tc.footprint import tile_of
from g3dswap.tc.kernel import show
from g3dswap.tc.nest import Nest
from g3dswap.tc.product import is_product
from g3dswap.tc.schedule import Digit, Schedule, apply
from g3dswap.tc.space import Space
from g3dswap.tc.space_triton import MAX_TERMS, Point, families, mutate, splits
from g3dswap.tc.words import WARP
from tests.tc.spaces import judged
from tests.tc.test_print_triton import DEVICE, check, schedule_of

pytest.importorskip("triton", reason="needs Triton")

GEOMETRIES = {
    "depthwise": Geometry(6, 6, 6, (6, 4, 5), (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    "strided": Geometry(4, 4, 4, (5, 4, 6), (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    "few channels": Geometry(4, 8, 2, (2, 3, 4), (1, 3, 3), (1, 1, 1), (0, 1, 1)),
    "along time": Geometry(6, 6, 6, (6, 3, 3), (5, 1, 1), (1, 1, 1), (2, 0, 0)),
}
MEASURED = json.loads(Path(__file__).with_name("measured_lanes.json").read_text(encoding="utf-8"))


def problem_of(direction: str, geometry: Geometry, layout: str = "contiguous", **more: Any) -> Problem:
    return Problem(direction, geometry, more.pop("dtype", torch.float32), layout, DEVICE, **more)


def points(nest: Nest) -> list[Point]:
    """All points of a space: those of every tile."""
    found = []
    for first, rest in families(nest):
        found += [*first, *rest({p.tile for p in first})]
    return list(dict.fromkeys(found))


def walks_of(nest: Nest, point: Point) -> list[tuple[str, int]]:
    return [(a, c) for a, c in point.split if c > 1 and not nest.is_reduce(a.split("*")[0])]


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_proposed_points_are_right(direction: str, name: str, layout: str) -> None:
    rng = random.Random(f"{direction} {name} {layout}")
    problem = problem_of(
        direction, GEOMETRIES[name], layout, dtype=rng.choice((torch.float32, torch.bfloat16, torch.float16))
    )
    nest = nest_of(problem)
    found = sorted(points(nest), key=lambda p: math.prod(c for _, c in p.tile))
    found = found[: len(found) // 3 + 2]  # the small tiles, which are quick to interpret
    walking = [p for p in found if walks_of(nest, p)]
    for point in (*rng.sample(found, 2), *rng.sample(walking, min(1, len(walking)))):
        schedule = point.schedule(nest)
        check(problem, schedule)
        assert Point.of(schedule).schedule(nest) == schedule
        assert Schedule.from_json(schedule.to_json()) == schedule


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_a_walk_the_weight_is_loaded_once(layout: str) -> None:
    problem = problem_of("forward", GEOMETRIES["depthwise"], layout)
    nest = nest_of(problem)
    walking = [p for p in points(nest) if walks_of(nest, p) and dict(p.tile).get("g", 1) == 1]
    point = min(walking, key=lambda p: math.prod(c for _, c in p.tile))
    source = check(problem, point.schedule(nest))
    head, body = source.split("for ", 1)
    assert head.count("tl.load(") == 27 and "k1" in head
    assert "tl.load(" in body and "k1 =" not in body


def test_no_walk_without_something_to_keep() -> None:
    weight_loops = nest_of(problem_of("forward", GEOMETRIES["few channels"]))
    for point in points(weight_loops):
        inside = {a for a, c in point.tile if weight_loops.is_reduce(a) and c == weight_loops.extent(a)}
        assert not walks_of(weight_loops, point) or {"c", "kh", "kw"} <= inside
    gradient = nest_of(problem_of("grad_weight", GEOMETRIES["depthwise"]))
    assert not any(walks_of(gradient, p) for p in points(gradient))


def test_a_walk_takes_no_more_steps_than_there_are() -> None:
    nest = nest_of(problem_of("forward", GEOMETRIES["depthwise"]))
    for point in points(nest):
        for axis, count in walks_of(nest, point):
            assert (count - 1) * dict(point.tile).get(axis, 1) < (nest.extent(axis) or 0)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_lanes_add_up_only_where_few_programs_share_a_result(direction: str) -> None:
    nest = nest_of(problem_of(direction, Geometry(64, 64, 64, (8, 8, 8), (3, 3, 3)), "channels_last_3d"))
    mixed = [p for p in points(nest) if len({nest.is_reduce(axes[0]) for axes, _ in p.lanes}) == 2]
    assert bool(mixed) == (direction == "grad_weight")
    for point in mixed:
        assert nest.is_reduce(point.lanes[0][0][0]) and point.lanes[-1][0] == ("g",)


def test_lanes_along_a_reduction_beside_channels_are_right() -> None:
    problem = problem_of("grad_weight", GEOMETRIES["depthwise"], "channels_last_3d", dtype=torch.bfloat16)
    nest = nest_of(problem)
    taps = (("kt", 3), ("kh", 3), ("kw", 3))
    for axis, others in (("w", 4), ("h", 2), ("t", 2)):
        lanes = (((axis,), others), (("g",), 8))
        for split in ((("n", 1),), (("n", 1), (axis, 1))):
            point = Point(lanes, (*taps, ("g", 2), (axis, 2)), split, 1)
            assert ", axis=0, keep_dims=True)" in check(problem, point.schedule(nest), batch=3)


def test_programs_of_one_warp_are_more() -> None:
    nest = nest_of(
        problem_of("grad_weight", Geometry(64, 64, 64, (64, 64, 64), (3, 3, 3)), "channels_last_3d")
    )
    tile = (("kt", 3), ("kh", 3), ("kw", 3), ("t", 4), ("h", 4))

    def programs(width: int) -> int:
        points = [
            Point(((("g",), width),), tile, split, 1) for split in splits(nest, ((("g",), width),), tile)
        ]
        loops = [apply(nest, p.schedule(nest)).loops for p in points]
        return max(math.prod(loop.count or 4 for loop in own if loop.bind == "grid") for own in loops)

    assert programs(32) >= 2 * programs(128)


def test_a_thread_has_a_bounded_tile() -> None:
    nest = nest_of(problem_of("forward", Geometry(8, 8, 8, (64, 64, 64), (3, 3, 3))))
    for point in points(nest):
        lanes = math.prod(width for _, width in point.lanes)
        assert math.prod(c for _, c in point.tile) * lanes <= MAX_TERMS * max(lanes, WARP * point.warps)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_mutations_are_legal_and_round_trip(direction: str) -> None:
    nest = nest_of(problem_of(direction, Geometry(64, 64, 64, (8, 8, 8), (3, 3, 3), padding=(1, 1, 1))))
    rng = random.Random(0)
    point = next(p for p in points(nest) if p.split or direction != "grad_weight")
    seen = {point}
    for _ in range(60):
        changed = mutate(nest, point, rng)
        schedule = changed.schedule(nest)
        if Space(nest, "triton").cost(schedule) < math.inf:
            assert Point.of(schedule).schedule(nest) == schedule
            point = changed
            seen.add(point)
    assert len(seen) > 10


def test_a_hopeless_kind_has_no_share() -> None:
    """A depthwise layer's packed products do sixteen times the work; 16 channels a group want no lanes."""
    depthwise = Geometry(64, 64, 64, (64, 64, 64), (3, 3, 3), padding=(1, 1, 1))
    wide = Geometry(512, 512, 32, (4, 14, 14), (3, 3, 3), padding=(1, 1, 1))
    for geometry, products in ((depthwise, False), (wide, True)):
        nest = nest_of(problem_of("forward", geometry, "channels_last_3d", dtype=torch.bfloat16))
        ranked = Space(nest, "triton").ranked(16, random.Random(0))
        assert {is_product(schedule) for schedule in ranked[:4]} == {products}


# The model


def measured(layer: dict[str, Any]) -> list[tuple[float, float]]:
    """Of each schedule of a layer that was measured, the model's seconds and the device's microseconds."""
    kernel = tuple(layer["kernel"])
    padding = tuple(k // 2 for k in kernel)
    channels = layer["channels"]
    geometry = Geometry(
        channels, channels, channels, tuple(layer["size"]), kernel, tuple(layer["stride"]), padding
    )
    nest = nest_of(
        problem_of(layer["direction"], geometry, layer["layout"], dtype=getattr(torch, layer["dtype"]))
    )
    found = []
    for text, microseconds in layer["microseconds"].items():
        digits, warps = text.split("; ")
        scheduled = apply(nest, schedule_of(digits))
        found.append((model_triton.cost(scheduled, int(warps), layer["batch"]), microseconds))
    return found


def test_a_glance_tells_which_families_are_promising(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a strided layer's gradient there are thirty-five, and the best schedule is in one of the first."""
    geometry = Geometry(256, 256, 32, (8, 28, 28), (3, 3, 3), (2, 2, 2), (1, 1, 1))
    nest = nest_of(Problem("grad_weight", geometry, torch.float32, device="cuda", precision="tf32"))
    monkeypatch.setattr(space, "TILES", 60)
    monkeypatch.setattr(space, "GLANCE", 12)
    quick, thorough = Space(nest, "triton"), Space(nest, "triton")
    found = quick.default(), sum(map(len, quick._families))
    monkeypatch.setattr(space, "PROMISING", 1000)
    assert thorough.cost(found[0]) == thorough.cost(thorough.default())
    assert found[1] < 0.6 * sum(map(len, thorough._families))


def test_the_model_finds_the_fast_kernels_of_a_gpu() -> None:
    """Among its first four of 24 is one of the fastest, the first is not far behind; it knows how long."""
    layers, first, four, ratio = judged(map(measured, MEASURED["layers"]))
    assert layers > 30
    assert first < 1.2
    assert four < 1.08
    assert ratio < 1.35


def cost_of(problem: Problem, digits: str, warps: int = 1, batch: int = 2) -> float:
    return model_triton.cost(apply(nest_of(problem), schedule_of(digits)), warps, batch)


OUTER = "n rest grid | g rest grid | f rest grid | t rest grid | h rest grid | w rest grid"
LOOPS = "c rest serial | kt rest serial | kh rest serial | kw rest serial"
TAPS = "kt 3 unroll | kh 3 unroll | kw 3 unroll"


def test_the_model_knows_what_costs() -> None:
    geometry = Geometry(64, 64, 64, (64, 64, 64), (3, 3, 3), padding=(1, 1, 1))
    half = problem_of("forward", geometry, "channels_last_3d", dtype=torch.bfloat16)
    whole = problem_of("forward", geometry, "channels_last_3d")
    plain = f"{OUTER} | {LOOPS} | {TAPS} | t 2 unroll | h 2 unroll | w 4 unroll | g 32 lanes"
    words = f"{plain} | g 2 unroll phase"
    assert cost_of(half, words) < cost_of(half, plain) < cost_of(whole, plain)
    looped = f"{OUTER} | {LOOPS} | kw 3 unroll | t 2 unroll | h 2 unroll | w 4 unroll | g 32 lanes"
    assert cost_of(half, plain) < cost_of(half, looped)
    huge = plain.replace("t 2 unroll | h 2 unroll", "t 16 unroll | h 16 unroll")
    assert cost_of(half, plain) < cost_of(half, huge)  # registers
    ragged = problem_of("forward", Geometry(54, 54, 54, (64, 64, 64), (3, 3, 3)), "channels_last_3d")
    row = plain.replace("g 32 lanes", "g 64 lanes")
    assert cost_of(ragged, row, 2) < cost_of(ragged, plain, 1)  # parts of a row tear its sectors


def test_a_thousand_channels_print() -> None:
    """What ranks first for a wide layer prints as it is."""
    nest = nest_of(
        problem_of("forward", Geometry(1024, 1024, 1024, (4, 4, 4), (3, 3, 3)), "channels_last_3d")
    )
    schedule = Space(nest, "triton").default()
    assert Digit("n", None, "grid") in schedule.digits
    assert "tl.store(" in show(nest, schedule, "triton")


def test_schedules_are_compared_at_the_batch_that_is_tuned() -> None:
    """At eight times the images a split into as many programs for each of them is a split too far."""
    problem = Problem("grad_weight", Geometry(32, 32, 32, (16, 28, 28), (3, 3, 3), padding=(1, 1, 1)))
    found = nest_of(problem)
    few, many = (Space(found, "triton", batch=batch) for batch in (2, 64))
    schedule = few.default()
    assert few.cost(schedule) < many.cost(schedule)
    assert many.cost(many.default()) < many.cost(schedule)


def test_of_a_strided_gradient_only_taps_of_the_same_phase_are_counted() -> None:
    """Loops of one step, as those around a kernel that is unrolled as a whole, decide nothing."""
    layer = Geometry(4, 4, 4, (3, 8, 8), (3, 3, 3), (1, 2, 2), (1, 1, 1))
    found = nest_of(Problem("grad_input", layer))
    taps = "kt rest serial | kh rest serial | kw rest serial | kt 3 unroll | kh 3 unroll | kw 3 unroll"
    grid = " | ".join(f"{axis} rest grid" for axis in "ngcthw")
    tile = "w 4 lanes | h 2 unroll phase | w 2 unroll phase"
    scheduled = apply(found, schedule_of(f"{grid} | f rest serial | {taps} | {tile}"))
    assert tile_of(scheduled).terms == 3 * 3 * 3  # of each axis with a stride, three of six taps and phases
