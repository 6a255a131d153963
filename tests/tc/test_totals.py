"""The second stage of split reductions: which have one, and what it adds up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from g3dswap.comprehensions import nest as nest_of
from g3dswap.problem import Geometry, Problem
from g3dswap.tc.kernel import build, show
from g3dswap.tc.schedule import apply
from g3dswap.tc.source import source
from g3dswap.tc.totals import total
from tests.tc.test_print_triton import DEVICE, check, schedule_of

GEOMETRY = Geometry(2, 4, 2, (2, 3, 4), (2, 3, 3), (1, 1, 1), (1, 1, 1))
SPLIT = (
    "g rest grid | {} | f rest grid | c rest grid | {}"
    " | kt rest unroll | kh rest unroll | kw rest unroll | w 8 lanes"
)


def problem_of(direction: str = "grad_weight", **more: Any) -> Problem:
    return Problem(direction, GEOMETRY, device=DEVICE, **more)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("contiguous", torch.bfloat16), ("channels_last_3d", torch.float32), ("contiguous", torch.float64)],
)
@pytest.mark.parametrize(
    ("grid", "serial"),
    [
        ("n rest grid", "t rest serial | h rest serial"),
        ("t rest grid", "n rest serial | h rest serial"),
        ("n rest grid | t rest grid | h rest grid", "h 2 serial"),
        ("t rest grid | n rest grid", "h rest serial"),  # PyTorch adds these up
    ],
)
def test_split_sums(grid: str, serial: str, layout: str, dtype: torch.dtype) -> None:
    check(problem_of(dtype=dtype, layout=layout), schedule_of(SPLIT.format(grid, serial)), batch=3)


def test_the_sum_is_one_kernel_with_all_partial_results() -> None:
    nest = nest_of(problem_of(dtype=torch.bfloat16))
    schedule = schedule_of(SPLIT.format("n rest grid | t rest grid", "h rest serial"))
    found = total(apply(nest, schedule))
    assert found is not None
    summing, _ = found
    assert [(t.name, t.shape, t.dtype) for t in summing.tensors] == [
        ("P", (None, 3, 72), "float32"),
        ("O", (72,), "bfloat16"),
    ]
    kernel = build(nest, schedule, "triton")
    assert kernel.total is not None and kernel.total.total is None
    assert show(nest, schedule, "triton") == f"{kernel.source}\n\n{kernel.total.source}"


def test_few_elements_are_summed_by_many_threads() -> None:
    """A program has 256 threads: the fewer elements of the result, the more parts of each at a time."""
    split = (
        "g rest grid | f rest grid | c rest grid | kt rest grid | kh rest grid | kw rest grid | n rest grid"
    )
    for groups, tile in ((4, "s 32 lanes | i 8 lanes"), (512, "s 4 lanes | i 64 lanes")):
        geometry = Geometry(groups, groups, groups, (40, 3, 3), (3, 3, 3), padding=(1, 1, 1))
        nest = nest_of(Problem("grad_weight", geometry, device=DEVICE))
        schedule = schedule_of(f"{split} | t rest grid | h rest serial | w 8 lanes")
        found = total(apply(nest, schedule))
        assert found is not None
        assert str(found[1]).endswith(f"{tile}; ahead=8; warps=8")


@pytest.mark.parametrize(
    ("grid", "serial", "loop"),
    [("n rest grid", "t rest serial", "range(batch, "), ("t rest grid", "n rest serial", "range(7, ")],
)
def test_several_parts_are_loaded_together(grid: str, serial: str, loop: str) -> None:
    """Whatever the innermost loop runs over that has more than one step."""
    problem = replace(problem_of(), geometry=replace(GEOMETRY, size=(200, 3, 4)))
    schedule = schedule_of(SPLIT.format(grid, f"{serial} | h rest serial"))
    found = total(apply(nest_of(problem), schedule))
    assert found is not None
    assert f"{loop}loop_unroll_factor=8)" in source(apply(*found), found[1], "triton")


FORWARD = (
    "n rest grid | g rest grid | f rest grid | t rest grid | h rest grid | w rest grid | c rest grid"
    " | kt rest serial | kh rest serial | kw rest serial"
)


@pytest.mark.parametrize(
    ("direction", "text", "has"),
    [
        # Static parts alone.
        ("grad_weight", SPLIT.format("t rest grid", "n rest serial | h rest serial"), True),
        # The batch inside other parts, or in the result, leaves no fixed strides.
        ("grad_weight", SPLIT.format("t rest grid | n rest grid", "h rest serial"), False),
        ("forward", FORWARD, False),
    ],
)
def test_which_have_a_second_stage_of_their_own(direction: str, text: str, has: bool) -> None:
    found = total(apply(nest_of(problem_of(direction)), schedule_of(text)))
    assert (found is not None) == has
