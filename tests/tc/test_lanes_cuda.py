"""Lanes that share memory, in CUDA C++, emulated: right for any geometry and for any of their schedules."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings

from g3dswap.comprehensions import nest as nest_of
from g3dswap.errors import ScheduleError
from g3dswap.problem import ACTIVATIONS, Geometry, Problem
from g3dswap.tc import model_lanes
from g3dswap.tc.nest import Nest
from g3dswap.tc.program_cuda import Settings
from g3dswap.tc.schedule import Digit, Schedule, apply
from g3dswap.tc.space import Space
from g3dswap.tc.space_lanes import Point, families, is_possible, lanes, mutate, tiles
from tests.emulated import emulated
from tests.geometries import Case, cases
from tests.profiles import examples
from tests.tc.spaces import every, judged, measured, walk
from tests.tc.test_print_cuda import check, right_on_a_gpu

GPU_DTYPES = torch.float32, torch.bfloat16, torch.float16
GEOMETRIES = {
    "depthwise 7x7x7": Geometry(2, 2, 2, (3, 9, 12), (7, 7, 7), padding=(3, 3, 3)),
    "depthwise 3x3x3": Geometry(6, 6, 6, (4, 7, 7), (3, 3, 3), padding=(1, 1, 1)),
    "whole lines": Geometry(3, 3, 3, (4, 6, 14), (3, 3, 3), padding=(1, 1, 1)),
    "along t": Geometry(2, 2, 2, (9, 5, 8), (5, 1, 1), padding=(2, 0, 0)),
    "eight channels a group, strided": Geometry(16, 16, 2, (4, 9, 12), (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    "a multiplier": Geometry(4, 8, 4, (3, 6, 16), (3, 3, 3), padding=(1, 1, 1)),
    "dilated": Geometry(3, 3, 3, (5, 8, 9), (3, 3, 3), (1, 1, 1), (2, 2, 2), (2, 2, 2)),
}


def nest_and_points(problem: Problem) -> tuple[Nest, list[Point]]:
    nest = nest_of(problem)
    return nest, every(families(nest))


def checked(case: Case, nest: Nest, point: Point) -> str:
    """The source of a point's kernel, which gives the right result."""
    schedule = point.schedule(nest)
    assert Point.of(schedule, nest) == point
    assert Schedule.from_json(schedule.to_json()) == schedule
    kernel = emulated(nest, schedule)
    check(case, kernel)
    return kernel.source


@given(cases(longest=6, dtypes=GPU_DTYPES))
@settings(max_examples=examples(30), deadline=None)
def test_random_geometries(case: Case) -> None:
    nest, points = nest_and_points(case.problem)
    if case.problem.direction == "grad_weight":
        assert not points
        return
    assume(points)  # a single result has no lanes
    checked(case, nest, random.Random(case.seed).choice(points))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("direction", ["forward", "grad_input"])
def test_each_kind_of_layer(direction: str, name: str, layout: str) -> None:
    forward = direction == "forward"
    dtype = torch.float32 if forward else torch.bfloat16
    activation = "relu" if forward else ""
    problem = Problem(direction, GEOMETRIES[name], dtype, layout, bias=forward, activation=activation)
    nest, points = nest_and_points(problem)
    checked(Case(problem, 2, 0), nest, random.Random(name + direction).choice(points))


def test_other_batches() -> None:
    problem = Problem("forward", GEOMETRIES["whole lines"], torch.float32, "contiguous")
    nest, points = nest_and_points(problem)
    kernel = emulated(nest, points[0].schedule(nest))
    for batch in (3, 1):
        check(Case(problem, batch, batch), kernel)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
@pytest.mark.parametrize("direction", ["forward", "grad_input"])
def test_on_a_gpu(direction: str, layout: str, dtype: torch.dtype) -> None:
    """What the emulation cannot show: instructions, copies that are under way, launches."""
    rng, forward = random.Random(f"{direction} {layout} {dtype}"), direction == "forward"
    for geometry in GEOMETRIES.values():
        activation = rng.choice(("", *ACTIVATIONS)) if forward else ""
        problem = Problem(direction, geometry, dtype, layout, bias=forward, activation=activation)
        case, (nest, points) = Case(problem, 3, rng.randrange(1000)), nest_and_points(problem)
        assert right_on_a_gpu(case, (point.schedule(nest) for point in rng.sample(points, 3))) == 3


def forward_of(name: str, dtype: torch.dtype = torch.float32) -> tuple[Case, Nest]:
    problem = Problem("forward", GEOMETRIES[name], dtype, "contiguous")
    return Case(problem, 2, 7), nest_of(problem)


@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_results_that_lie_apart_are_collected(dtype: torch.dtype) -> None:
    """Lanes along a line write it together, as words of what each has; lanes that have lines do not."""
    case, nest = forward_of("depthwise 3x3x3", dtype)
    taps = (("kt", 3), ("kh", 3), ("kw", 3))
    lines = checked(case, nest, Point((("g", 2), ("t", 4), ("h", 7)), (*taps, ("w", 7))))
    columns = checked(case, nest, Point((("t", 4), ("h", 7), ("w", 7)), taps))
    assert "results + " in lines and "put<" in lines
    assert "results + " not in columns
    case, nest = forward_of("whole lines", dtype)
    words = checked(case, nest, Point((("t", 4), ("h", 6), ("w", 7)), (*taps, ("w", 2))))
    assert "write(O" in words and "results + " not in words


def test_neighbours_are_read_as_words() -> None:
    case, nest = forward_of("depthwise 7x7x7")
    source = checked(case, nest, Point((("h", 9), ("w", 3)), (("kh", 7), ("kw", 7), ("w", 4))))
    assert "float I_4[4];" in source and "#pragma unroll 1\n    for (int kt_" in source


def test_threads_without_lanes_help_to_copy_only() -> None:
    case, nest = forward_of("depthwise 3x3x3")
    source = checked(case, nest, Point((("h", 7), ("w", 7)), (("kt", 3), ("kh", 3), ("kw", 3), ("t", 4))))
    assert "if (thread < 49) {" in source and "nth * 64" in source


def test_what_has_no_lanes() -> None:
    weights = nest_of(Problem("grad_weight", GEOMETRIES["dilated"], torch.float32, "contiguous"))
    doubles = nest_of(Problem("forward", GEOMETRIES["dilated"], torch.float64, "contiguous"))
    assert not is_possible(weights) and not is_possible(doubles)
    assert not [*families(weights)] and not [*families(doubles)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hints": (("warps", 1),)}, "49 lanes are more than 32 threads"),
        ({"stage": (("I", 7),)}, "share I, which is staged once for all their sums"),
        ({"stage": (("K", 6),)}, "share I, which is staged once for all their sums"),
    ],
)
def test_schedules_that_are_refused(change: dict[str, Any], message: str) -> None:
    _, nest = forward_of("depthwise 3x3x3")
    schedule = Point((("h", 7), ("w", 7)), (("kt", 3), ("kh", 3), ("kw", 3))).schedule(nest)
    with pytest.raises(ScheduleError, match=message):
        emulated(nest, replace(schedule, **change))


def test_more_lanes_than_lines() -> None:
    case, nest = forward_of("depthwise 3x3x3")
    checked(case, nest, Point((("h", 8), ("w", 8)), (("kt", 3), ("kh", 3), ("kw", 3))))


def test_a_schedule_of_another_size() -> None:
    """What was tuned for one image serves another: lanes beyond its end have nothing to do."""
    _, larger = forward_of("whole lines")
    point = Point((("t", 2), ("h", 6), ("w", 7)), (("kt", 3), ("kh", 3), ("kw", 3), ("t", 2), ("w", 2)))
    schedule = point.schedule(larger)
    for size in ((3, 5, 9), (5, 9, 20)):
        geometry = replace(GEOMETRIES["whole lines"], size=size)
        problem = Problem("forward", geometry, torch.float32, "contiguous")
        check(Case(problem, 2, 5), emulated(nest_of(problem), schedule))


def test_lanes_of_a_sum_are_refused() -> None:
    _, nest = forward_of("depthwise 3x3x3")
    schedule = Point((("w", 7),), (("kt", 3), ("kh", 3))).schedule(nest)
    digits = tuple(replace(d, bind="lanes") if d.axis == "kw" else d for d in schedule.digits)
    moved = (*(d for d in digits if d.axis != "kw"), Digit("kw", None, "lanes"))
    with pytest.raises(ScheduleError, match="have results of their own"):
        emulated(nest, replace(schedule, digits=moved))


@pytest.mark.parametrize("bind", ["rows", "warps"])
def test_lanes_beside_a_product_are_refused(bind: str) -> None:
    _, nest = forward_of("depthwise 3x3x3")
    schedule = Point((("h", 7), ("w", 7)), (("kt", 3), ("kh", 3), ("kw", 3))).schedule(nest)
    digits = tuple(
        replace(d, bind=bind) if (d.axis, d.bind) == ("h", "lanes") else d for d in schedule.digits
    )
    with pytest.raises(ScheduleError, match="has one loop each of rows, cols and depth"):
        emulated(nest, replace(schedule, digits=digits))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_what_is_proposed_is_legal(name: str) -> None:
    """Each fits, runs on few idle threads, and is estimated; a thread has no more than its registers hold."""
    _, nest = forward_of(name)
    points = every(families(nest))
    assert points and len({*points}) == len(points)
    for point in random.Random(name).sample(points, min(60, len(points))):
        assert point.warps == 1 or math.prod(count for _, count in point.lanes) > point.warps * 32 / 1.3
        schedule = point.schedule(nest)
        assert 1e-6 < model_lanes.cost(apply(nest, schedule), Settings.of(schedule)) < 1e-3


def test_mutations_stay_lanes() -> None:
    nest = nest_of(
        Problem("grad_input", GEOMETRIES["eight channels a group, strided"], torch.float32, "contiguous")
    )
    space, points = Space(nest, "triton"), every(families(nest))
    start = points[len(points) // 2].schedule(nest)
    walk(space, start, random.Random(3), lambda s: bool(s.stage) and any(d.bind == "lanes" for d in s.digits))


def test_more_memory_than_there_is_costs_infinitely() -> None:
    nest = nest_of(
        Problem(
            "forward",
            Geometry(8, 8, 8, (64, 64, 64), (3, 3, 3), padding=(1, 1, 1)),
            torch.float32,
            "contiguous",
        )
    )
    point = Point((("t", 8), ("h", 8), ("w", 8)), (("t", 4), ("h", 4), ("w", 8)))
    schedule = point.schedule(nest)
    assert model_lanes.cost(apply(nest, schedule), Settings.of(schedule)) == math.inf
    assert all(p.warps <= 16 for tile in tiles(nest)[:4] for p in lanes(nest, tile))


def test_a_tile_without_lanes_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("g3dswap.tc.space_lanes.lanes", lambda *_: [])
    _, nest = forward_of("dilated")
    point = Point((("w", 9),), (("kt", 3), ("kh", 3), ("kw", 3)))
    assert all(mutate(nest, point, random.Random(seed)) == point for seed in range(6))


def test_the_model_finds_the_fast_kernels_of_a_gpu() -> None:
    """Among its first four of 12 is one of the fastest, and it knows how long the fast ones take."""
    found = json.loads(Path(__file__).with_name("measured_shared.json").read_text(encoding="utf-8"))
    layers, first, four, ratio = judged(measured(layer, model_lanes.cost) for layer in found["layers"])
    assert layers > 20
    assert first < 1.25
    assert four < 1.1
    assert ratio < 1.3
