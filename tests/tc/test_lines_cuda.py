"""Gradients in the kernel whose depth is read along lines, emulated: right for any geometry."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from g3dswap.comprehensions import nest as nest_of
from g3dswap.errors import ScheduleError
from g3dswap.problem import Geometry, Problem
from g3dswap.tc import model_staged, space
from g3dswap.tc.nest import Nest
from g3dswap.tc.product import Product
from g3dswap.tc.schedule import Schedule
from g3dswap.tc.space import Space
from g3dswap.tc.space_lines import FORMS, families, forms, products
from tests.emulated import emulated
from tests.geometries import Case, layer_of
from tests.profiles import examples
from tests.tc.spaces import every, judged, measured, walk
from tests.tc.test_print_cuda import checked, right_on_a_gpu

HALVES = torch.bfloat16, torch.float16
GEOMETRIES = {
    "small images": Geometry(3, 3, 3, (4, 14, 14), (3, 3, 3), padding=(1, 1, 1)),
    "lines of odd length": Geometry(4, 4, 4, (4, 7, 7), (3, 3, 3), padding=(1, 1, 1)),
    "lines of eight": Geometry(2, 2, 2, (5, 8, 8), (3, 3, 3), padding=(1, 1, 1)),
    "several pieces": Geometry(2, 2, 2, (3, 9, 36), (5, 5, 5), padding=(2, 2, 2)),
    "four channels a group": Geometry(8, 8, 2, (3, 6, 12), (3, 3, 3), padding=(1, 1, 1)),
    "sixteen channels a group": Geometry(32, 32, 2, (2, 7, 7), (3, 3, 3), padding=(1, 1, 1)),
    "a multiplier": Geometry(3, 6, 3, (3, 6, 10), (3, 3, 3), padding=(1, 1, 1)),
    "every other position": Geometry(8, 8, 1, (4, 9, 13), (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    "dilated": Geometry(3, 3, 3, (5, 8, 12), (3, 3, 3), (1, 1, 1), (2, 2, 2), (2, 2, 2)),
    "no padding": Geometry(2, 2, 2, (4, 9, 18), (3, 3, 3)),
}
MEASURED = json.loads(Path(__file__).with_name("measured_lines.json").read_text(encoding="utf-8"))


def problem_of(geometry: Geometry, dtype: torch.dtype = torch.bfloat16) -> Problem:
    return Problem("grad_weight", geometry, dtype, "contiguous")


def all_products(nest: Nest) -> list[Product]:
    """Of every form, those too that are not compared at first."""
    return [product for skews in forms(nest) for product in products(nest, skews, 2)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small problems of few and of many channels a group, nearly all of which have products along lines."""
    groups, channels = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3, 4, 8, 16]))
    filters = draw(st.sampled_from([channels, channels, 2 * channels, 8]))
    lengths = [1, 4, 6, 7, 8, 9, 11, 14, 16, 20, 28]
    size = draw(st.tuples(st.integers(1, 9), st.integers(1, 14), st.sampled_from(lengths)))
    sides = [1, 2, 3, 3, 5], [1, 1, 1, 2, 3], [0, 1, 2], [1, 1, 1, 2]
    geometry = layer_of(draw, (groups, channels, filters), size, *sides)
    problem = problem_of(geometry, draw(st.sampled_from(HALVES)))
    return Case(problem, draw(st.integers(1, 3)), draw(st.integers(0, 2**31)))


@given(cases())
@settings(max_examples=examples(30), deadline=None)
def test_random_geometries(case: Case) -> None:
    nest, rng = nest_of(case.problem), random.Random(case.seed)
    found = all_products(nest)
    printed = [checked(case, [product]) for product in rng.sample(found, min(3, len(found)))]
    assume(any(printed))


@pytest.mark.parametrize("whole", [False, True], ids=["with zeros around", "as it lies"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_each_kind_of_layer(name: str, whole: bool) -> None:
    problem = problem_of(GEOMETRIES[name])
    nest, rng = nest_of(problem), random.Random(name)
    found = [product for product in all_products(nest) if product.whole == whole]
    rng.shuffle(found)
    assert checked(Case(problem, 2, 0), found, most=40) is not None


def source_of(name: str, wanted: int, **choices: object) -> str:
    """The source of a product of so many positions whose fields are these."""
    problem = problem_of(GEOMETRIES[name])
    found = [p for p in all_products(nest_of(problem)) if p.depth[1] == wanted]
    fitting = [p for p in found if all(getattr(p, name) == value for name, value in choices.items())]
    kernel = checked(Case(problem, 2, 3), fitting, most=len(fitting))
    assert kernel is not None
    return kernel.source


def test_eight_positions_are_half_a_product() -> None:
    source = source_of("lines of eight", 8)
    assert "multiply_half(sum" in source and "far" not in source.split("kernel(")[1]


def test_what_is_beside_a_line_is_cleared_where_nothing_is_around_it() -> None:
    assert "mask" in source_of("small images", 16, whole=True)
    assert "mask" not in source_of("small images", 16, whole=False)


def test_lines_that_begin_at_odd_elements() -> None:
    source = source_of("lines of odd length", 8, whole=True)
    assert "_odd)" in source and "_even)" in source


def test_taps_share_the_words_of_a_line() -> None:
    body = source_of("small images", 16, whole=False, teams=1).split("kernel(")[1]
    words = [line for line in body.splitlines() if "= word(" in line]
    assert len(words) == len({line.split("=", 1)[1] for line in words})
    assert body.count("__byte_perm") > 0


def test_floats_have_none() -> None:
    few = replace(problem_of(GEOMETRIES["four channels a group"]), dtype=torch.float32, precision="tf32")
    assert not list(families(nest_of(few)))
    nest = nest_of(problem_of(GEOMETRIES["four channels a group"]))
    schedule = all_products(nest)[0].schedule(nest)
    with pytest.raises(ScheduleError, match="pairs of a half type"):
        emulated(nest_of(few), schedule)


@pytest.mark.parametrize(
    ("direction", "layout"),
    [("forward", "contiguous"), ("grad_input", "contiguous"), ("grad_weight", "channels_last_3d")],
)
def test_other_passes_and_layouts_have_none(direction: str, layout: str) -> None:
    problem = Problem(direction, GEOMETRIES["small images"], torch.bfloat16, layout)
    assert not list(families(nest_of(problem)))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_blocks_fill_their_fragments(name: str) -> None:
    nest = nest_of(problem_of(GEOMETRIES[name]))
    found = forms(nest)
    assert 0 < len(found) <= FORMS and len(found) == len({*found})
    assert every(families(nest))


def test_they_are_proposed_and_mutated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "is_available", lambda: True)
    layer, rng = Geometry(128, 128, 32, (8, 28, 28), (3, 3, 3), padding=(1, 1, 1)), random.Random(0)
    found = Space(nest_of(problem_of(layer)), "triton")

    def is_along_lines(schedule: Schedule) -> bool:
        return bool(schedule.hint("lines", 0))

    schedule = next(s for s in found.ranked(24, rng) if is_along_lines(s))
    walk(found, schedule, rng, is_along_lines)


def test_the_model_finds_the_fast_kernels_of_a_gpu() -> None:
    """Among its first four of 14, along lines or turned around, is one of the fastest."""
    layers, first, four, ratio = judged(measured(layer, model_staged.cost) for layer in MEASURED["layers"])
    assert layers > 15
    assert first < 1.3
    assert four < 1.15
    assert ratio < 1.4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    """What the emulation cannot show: instructions, copies that are under way, launches."""
    rng = random.Random(str(dtype))
    for geometry in GEOMETRIES.values():
        case = Case(problem_of(geometry, dtype), 3, rng.randrange(1000))
        nest = nest_of(case.problem)
        found = [product.schedule(nest) for product in all_products(nest)]
        assert right_on_a_gpu(case, rng.sample(found, min(12, len(found))))
