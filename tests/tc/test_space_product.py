"""Matrix products as the space proposes them: legal, right, and varied without leaving the space."""

from __future__ import annotations

import math
import random

import pytest
import torch

from g3dswap.comprehensions import nest as nest_of
from g3dswap.problem import Geometry, Problem
from g3dswap.tc.product import Product, is_product
from g3dswap.tc.roles import possible
from g3dswap.tc.schedule import Schedule, apply
from g3dswap.tc.space import Space
from g3dswap.tc.space_product import families, packings
from tests.tc.spaces import every, walk
from tests.tc.test_print_triton import DEVICE, PRODUCTS, check

PASSES = ("forward", "grad_input", "grad_weight")
LAYOUTS = ("contiguous", "channels_last_3d")
GEOMETRIES = {
    "few channels": Geometry(16, 16, 4, (2, 4, 5), (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    "strided": Geometry(16, 32, 2, (3, 5, 4), (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    "one image is smaller than the kernel": Geometry(32, 32, 2, (1, 2, 2), (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    "pointwise": Geometry(16, 8, 4, (2, 3, 5), (1, 1, 1)),
    "depthwise": Geometry(16, 16, 16, (2, 3, 5), (1, 3, 3), (1, 1, 1), (0, 1, 1)),
}


def problem_of(direction: str, geometry: Geometry, layout: str, dtype: torch.dtype) -> Problem:
    return Problem(direction, geometry, dtype, layout, DEVICE, precision="tf32")


def products(problem: Problem) -> list[Product]:
    """All that the space proposes for a problem."""
    return every(families(nest_of(problem)))


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_proposed_products_are_right(direction: str, name: str, layout: str) -> None:
    rng = random.Random(f"{direction} {name} {layout}")
    problem = problem_of(direction, GEOMETRIES[name], layout, rng.choice(PRODUCTS))
    nest = nest_of(problem)
    found = products(problem)
    assert found
    for product in rng.sample(found, 2):
        schedule = product.schedule(nest)
        assert "tl.dot(" in check(problem, schedule)
        assert Product.of(schedule).schedule(nest) == schedule
        assert Schedule.from_json(schedule.to_json()) == schedule


@pytest.mark.parametrize("direction", PASSES)
def test_mutations_stay_products(direction: str) -> None:
    problem = problem_of(direction, GEOMETRIES["few channels"], "channels_last_3d", torch.float16)
    space, rng = Space(nest_of(problem), "triton"), random.Random(0)
    schedule = next(s for s in space.ranked(64, rng) if is_product(s))
    walk(space, schedule, rng, is_product)


def test_a_block_has_the_channels_of_a_matrix_unit() -> None:
    for channels, counts in ((1, (16, 32, 64)), (4, (4, 8, 16)), (16, (1, 2, 4)), (32, (1, 2))):
        geometry = Geometry(64 * channels, 64 * channels, 64, (4, 8, 8), (3, 3, 3))
        for direction in PASSES:
            found = packings(nest_of(problem_of(direction, geometry, "contiguous", torch.float16)))
            assert tuple(dict(pack).get("g", 1) for pack in found) == counts


def test_an_image_smaller_than_the_kernel_is_told_from_it_by_the_batch() -> None:
    geometry = GEOMETRIES["one image is smaller than the kernel"]
    for direction in ("forward", "grad_weight"):
        problem = problem_of(direction, geometry, "contiguous", torch.float16)
        along = {axis for product in products(problem) for axes, _ in product.sides.values() for axis in axes}
        assert {"h", "w"} <= along and not {"kt", "kh", "kw"} & along


def test_no_products_in_full_precision() -> None:
    geometry = GEOMETRIES["few channels"]
    assert not possible(nest_of(Problem("forward", geometry, torch.float32, device=DEVICE)))
    assert not possible(nest_of(Problem("forward", geometry, torch.float64, device=DEVICE)))
    assert possible(nest_of(Problem("forward", geometry, torch.float32, device=DEVICE, precision="tf32")))


def test_stages_fit_into_shared_memory() -> None:
    """Of 27 taps of 32 x 256 elements, two stages would take 900 KiB."""
    geometry = Geometry(64, 64, 64, (16, 32, 32), (3, 3, 3), padding=(1, 1, 1))
    nest = nest_of(problem_of("grad_weight", geometry, "channels_last_3d", torch.bfloat16))
    pack, split = (("g", 32),), (("n", 1), ("t*h*w", 8))
    rows, cols, depth = (("gi", "f"), 32), (("gj", "c"), 32), (("t", "h", "w"), 256)
    space = Space(nest, "triton")
    taps = (("kt", 3), ("kh", 3), ("kw", 3))
    for tile, stages, fits in ((taps, 3, False), (taps[2:], 3, True), (taps, 1, True)):
        product = Product(rows, cols, depth, pack, (), tile, split, 8, stages, 0)
        assert (space.cost(product.schedule(nest)) < math.inf) == fits


def test_what_is_no_loop_loads_ahead_and_what_is_one_is_pipelined() -> None:
    problem = problem_of("forward", GEOMETRIES["few channels"], "channels_last_3d", torch.float16)
    nest = nest_of(problem)
    for product in products(problem):
        scheduled = apply(nest, product.schedule(nest))
        serial = math.prod(p.count or 4 for p in scheduled.loops if p.bind == "serial")
        assert (product.stages > 2, product.ahead > 0) == (serial > 1, serial == 1)
