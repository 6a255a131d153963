"""Banded products as the space proposes them: legal, right, read in words, and varied within the space."""

from __future__ import annotations

import math
import random

import pytest
import torch

from g3dswap.comprehensions import nest as nest_of
from g3dswap.problem import Geometry, Problem
from g3dswap.tc.product import Product
from g3dswap.tc.schedule import Digit, Schedule, apply, rewritten
from g3dswap.tc.skew import Skew
from g3dswap.tc.space import Space
from g3dswap.tc.space_banded import families, skewings
from tests.tc.spaces import every, walk
from tests.tc.test_print_triton import DEVICE, check

PASSES = ("forward", "grad_input", "grad_weight")
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # see PRODUCTS of test_print_triton
GEOMETRIES = {
    "depthwise 5x5x5": Geometry(3, 3, 3, (3, 6, 8), (5, 5, 5), (1, 1, 1), (2, 2, 2)),
    "depthwise 7x7 that patches do not fit": Geometry(2, 2, 2, (2, 9, 12), (1, 7, 7), (1, 1, 1), (0, 3, 3)),
    "four channels a group": Geometry(8, 8, 2, (3, 6, 8), (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    "lines of odd length": Geometry(6, 9, 3, (2, 5, 7), (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    "dilated": Geometry(4, 4, 2, (3, 9, 12), (3, 3, 3), (1, 1, 1), (2, 2, 2), (2, 2, 2)),
    "a multiplier": Geometry(4, 12, 4, (3, 6, 16), (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    "one line": Geometry(4, 4, 4, (3, 6, 8), (1, 1, 5), (1, 1, 1), (0, 0, 2)),
}
STRIDED = Geometry(8, 8, 2, (3, 9, 12), (3, 3, 3), (1, 2, 2), (1, 1, 1))


def problem_of(direction: str, geometry: Geometry, layout: str = "contiguous") -> Problem:
    return Problem(direction, geometry, HALF, layout, DEVICE)


def products(problem: Problem) -> list[Product]:
    """All that the space proposes for a problem."""
    return every(families(nest_of(problem)))


@pytest.mark.parametrize("name", [*GEOMETRIES, "strided"])
@pytest.mark.parametrize("direction", PASSES)
def test_proposed_products_are_right(direction: str, name: str) -> None:
    rng = random.Random(f"{direction} {name}")
    problem = problem_of(direction, GEOMETRIES.get(name, STRIDED))
    nest = nest_of(problem)
    found = products(problem)
    if name == "strided" and direction == "grad_input":
        assert not found  # its image divides
        return
    words = [product for product in found if product.words]
    assert bool(words) == (name != "lines of odd length")
    for product in (rng.choice(found), rng.choice(words or found)):
        schedule = product.schedule(nest)
        source = check(problem, schedule)
        assert "tl.dot(" in source
        assert Product.of(schedule).schedule(nest) == schedule
        assert Schedule.from_json(schedule.to_json()) == schedule


@pytest.mark.parametrize("direction", PASSES)
def test_a_patch_is_read_in_words(direction: str) -> None:
    problem = problem_of(direction, GEOMETRIES["depthwise 5x5x5"])
    product = next(p for p in products(problem) if p.words == {"ws": 4} and p.across)
    source = check(problem, product.schedule(nest_of(problem)))
    image = "I" if direction != "grad_input" else "dO"
    loads = [line for line in source.splitlines() if "tl.load(" in line]
    # Each load of the image is one of words, in lanes that follow its blocks, and shared by all that need it.
    assert f"{image}_by4 = " in source and "tl.join(tl.join(" in source
    assert all("max_contiguous" in line for line in loads if line.strip().startswith("w"))
    planes = sum(line.strip().startswith("w") for line in loads)
    window = dict(product.tile).get("t", 1)
    assert planes == window + 4


@pytest.mark.parametrize("direction", PASSES)
def test_mutations_stay_banded(direction: str) -> None:
    space, rng = (
        Space(nest_of(problem_of(direction, GEOMETRIES["depthwise 5x5x5"])), "triton"),
        random.Random(0),
    )
    schedule = next(s for s in space.ranked(64, rng) if s.skew)
    walk(space, schedule, rng, lambda schedule: bool(schedule.skew))


def test_any_skewed_schedule_has_a_cost() -> None:
    for layout in ("contiguous", "channels_last_3d"):
        nest = nest_of(problem_of("forward", GEOMETRIES["four channels a group"], layout))
        for axis in "thw":
            skews = (Skew(axis, 4),)
            whole = rewritten(nest, (), skews)
            product = [Digit("w", 16, "rows"), Digit("f", 16, "cols"), Digit("c", 16, "depth")]
            outer = [Digit(a.name, None, "serial" if a.reduce else "grid") for a in whole.axes]
            for digits in (outer, [*outer, *product]):
                schedule = Schedule(tuple(digits), skew=skews)
                assert 0 < Space(nest, "triton").cost(schedule) < math.inf


def test_only_few_channels_whose_positions_are_consecutive_are_skewed() -> None:
    size, kernel, padding = (8, 16, 16), (3, 3, 3), (1, 1, 1)
    for direction in PASSES:
        few, many = (Geometry(8 * c, 8 * c, 8, size, kernel, padding=padding) for c in (4, 16))
        assert skewings(nest_of(problem_of(direction, few)))
        assert not skewings(nest_of(problem_of(direction, many)))
        assert not skewings(nest_of(problem_of(direction, few, "channels_last_3d")))
        full = Problem(direction, few, torch.float32, device=DEVICE, precision="tf32")
        assert not list(families(nest_of(full)))


def test_partial_results_of_a_block_are_left_to_the_sum_behind() -> None:
    problem = problem_of("grad_weight", GEOMETRIES["depthwise 5x5x5"])
    nest = nest_of(problem)
    scheduled = apply(nest, products(problem)[0].schedule(nest))
    counts = [scheduled.extent(name) for name in ("wi", "hi")]
    assert list(scheduled.partial_counts[-2:]) == counts
