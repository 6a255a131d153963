"""Skewed nests mean what they meant, and are refused where skewing has no meaning."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from g3dswap.comprehensions import nest as make_nest
from g3dswap.errors import ScheduleError
from g3dswap.problem import Geometry, Problem
from g3dswap.tc.interpret import interpret
from g3dswap.tc.nest import Nest
from g3dswap.tc.print_cpp import print_cpp
from g3dswap.tc.schedule import Digit, Schedule, apply
from g3dswap.tc.skew import Skew, skewed
from tests.geometries import Case, arrays, cases, expected, operands
from tests.profiles import examples

GEOMETRY = Geometry(6, 6, 6, (3, 6, 8), (3, 5, 3), (1, 1, 1), (1, 2, 1))


def of(direction: str = "forward", geometry: Geometry = GEOMETRY, **more: bool) -> Nest:
    return make_nest(Problem(direction, geometry, **more))  # type: ignore[arg-type]


@settings(max_examples=examples(150))
@given(cases(longest=6, dtypes=(torch.float64,)))
def test_a_skewed_nest_agrees_with_float64(case: Case) -> None:
    nest, rng = make_nest(case.problem), random.Random(case.seed)
    whole = nest
    for axis in rng.sample("thw", rng.choice((1, 2, 3))):
        try:
            whole = skewed(whole, Skew(axis, rng.choice((1, 2, 3, 4)), rng.choice((1, 2, 4))))
        except ScheduleError:
            continue
    tensors, _ = operands(case)
    want = expected(case, tensors).numpy()
    got = interpret(whole, arrays(nest, tensors, case.batch), case.batch)
    scale = max(1.0, np.abs(want).max(initial=0.0))
    np.testing.assert_allclose(got.reshape(want.shape), want, rtol=0, atol=1e-10 * scale)


def test_skewing_reads_a_patch_for_each_block_of_positions() -> None:
    nest = skewed(of(), Skew("w", 4, 2))
    assert [(a.name, a.extent, a.reduce) for a in nest.axes if a.name[0] in "w" or a.name == "kw"] == [
        ("w", 2, False),
        ("wi", 4, False),
        ("ws", 8, True),
    ]
    image, kernel = nest.factors
    # The patch of six elements begins at an even one, and its length is even.
    assert str(image).endswith(", 4*w + ws - 2)")
    assert str(kernel).endswith(", ws + -1*wi - 1)")
    assert str(nest.output).endswith(", 4*w + wi)")
    assert not nest.replicas


def test_a_gradient_in_the_kernel_is_left_in_parts() -> None:
    nest = skewed(of("grad_weight"), Skew("w", 4))
    assert nest.replicas == ("wi",)
    assert str(nest.output).startswith("dK(wi, g, ") and str(nest.output).endswith(", ws + -1*wi)")
    assert nest.tensor("dK").shape == (4, 6, 1, 1, 3, 5, 3)
    assert nest.tensor("dK").strides == (270, 45, 45, 45, 15, 3, 1)
    assert nest.partial_counts == (4,)
    assert not nest.axis("ws").reduce and nest.axis("w").reduce


def test_functions_of_the_result_are_of_the_skewed_one() -> None:
    nest = skewed(make_nest(Problem("forward", GEOMETRY, activation="relu")), Skew("w", 4))
    assert [str(expr) for expr in nest.pointwise] == ["fmax(O(n, g, f, t, h, 4*w + wi), 0)"]


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("g", "g of forward cannot be skewed by 2"),
        ("n", "n of forward cannot be skewed"),
        ("x", "x of forward cannot be skewed"),
        ("kt", "sums of forward cannot be left in parts, as skewing kt would"),
    ],
)
def test_what_cannot_be_skewed_says_why(axis: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        skewed(of(), Skew(axis, 2))


@pytest.mark.parametrize("skew", [Skew("w", 0), Skew("w", 10**6), Skew("w", 2, 0), Skew("w", 2, 10**6)])
def test_counts_are_bounded(skew: Skew) -> None:
    with pytest.raises(ScheduleError, match="w of forward cannot be skewed"):
        skewed(of(), skew)


def test_a_step_of_a_block_beyond_its_end_would_be_another_block() -> None:
    text = "n rest grid | g rest grid | f rest grid | t rest grid | h rest grid | w rest grid | c rest serial"
    text += " | kt rest serial | kh rest serial | ws rest serial | wi 8 lanes"
    parts = map(str.split, text.split(" | "))
    digits = tuple(Digit(axis, None if n == "rest" else int(n), bind) for axis, n, bind in parts)
    with pytest.raises(ScheduleError, match="nothing ends wi"):
        apply(of(), Schedule(digits, skew=(Skew("w", 4),)))


def test_a_division_cannot_be_skewed() -> None:
    strided = Geometry(6, 6, 6, (3, 6, 8), (3, 3, 3), (1, 1, 2), (1, 1, 1))
    with pytest.raises(ScheduleError, match="w of grad_input cannot be skewed"):
        skewed(of("grad_input", strided), Skew("w", 2))


def test_a_schedule_skews_and_survives_json() -> None:
    names = ("n", "g", "f", "t", "h", "w", "wi", "c", "kt", "kh", "ws")
    schedule = Schedule(tuple(Digit(name, None, "serial") for name in names), skew=(Skew("w", 4, 2),))
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert str(schedule).startswith("skew w by 4 in words of 2; n rest serial | ")
    with pytest.raises(ScheduleError, match="C\\+\\+ has no skewed axes"):
        print_cpp(apply(of(), schedule))
    with pytest.raises(ScheduleError, match="a schedule is a mapping"):
        Schedule.from_json({**schedule.to_json(), "skew": [["w", 4]]})
