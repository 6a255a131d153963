"""Packed nests mean what they meant, and are refused where packing has no meaning."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings

from g3dswap.comprehensions import nest as make_nest
from g3dswap.errors import NestError, ScheduleError
from g3dswap.problem import Geometry, Problem
from g3dswap.tc.interpret import interpret
from g3dswap.tc.lower import lower
from g3dswap.tc.nest import Access, Index, Nest, verify
from g3dswap.tc.pack import packed
from g3dswap.tc.parser import parse
from g3dswap.tc.print_cpp import print_cpp
from g3dswap.tc.schedule import Digit, Schedule, apply
from tests.geometries import Case, arrays, cases, expected, operands
from tests.profiles import examples

GEOMETRY = Geometry(12, 24, 6, (3, 4, 5), (3, 3, 3), (1, 1, 2), (1, 1, 1))


def of(direction: str = "forward", **more: bool) -> Nest:
    return make_nest(Problem(direction, GEOMETRY, **more))  # type: ignore[arg-type]


@settings(max_examples=examples(100))
@given(cases(longest=6, dtypes=(torch.float64,)))
def test_a_packed_nest_agrees_with_float64(case: Case) -> None:
    nest = make_nest(case.problem)
    groups = case.problem.geometry.groups
    count = next((c for c in (2, 3, 5, 17) if groups % c == 0), 1)
    assume(count > 1)
    tensors, _ = operands(case)
    want = expected(case, tensors).numpy()
    got = interpret(packed(nest, "g", count), arrays(nest, tensors, case.batch), case.batch)
    scale = max(1.0, np.abs(want).max(initial=0.0))
    np.testing.assert_allclose(got.reshape(want.shape), want, rtol=0, atol=1e-10 * scale)


def test_packing_splits_the_batch_axis_and_copies_its_steps() -> None:
    nest = packed(of(), "g", 3)
    assert [(a.name, a.extent, a.reduce) for a in nest.axes if a.name[0] == "g"] == [
        ("g", 2, False),
        ("gi", 3, False),
        ("gj", 3, True),
    ]
    image, kernel = nest.factors
    assert str(image).startswith("I(n, g, gj, c, ")
    assert str(kernel) == "K(g, gi, f, c, kt, kh, kw) [gi == gj]"
    assert nest.tensor("I").shape == (None, 2, 3, 2, 3, 4, 5)
    assert nest.tensor("I").strides == (720, 360, 120, 60, 20, 5, 1)
    assert "gj" in kernel.axes and "gj" not in nest.output.axes


def test_where_the_channels_are_parallel_the_output_is_tied() -> None:
    nest = packed(of("grad_weight"), "g", 2)
    assert not nest.axis("gj").reduce
    assert str(nest.output) == "dK(g, gi, f, c, kt, kh, kw) [gi == gj]"
    assert nest.output.axes == {a.name for a in nest.axes if not a.reduce}


def test_a_bias_is_packed_too() -> None:
    (bias,) = packed(of(bias=True), "g", 2).addends
    assert str(bias) == "B(g, gi, f)"


def test_functions_of_the_result_are_of_the_packed_one() -> None:
    nest = packed(make_nest(Problem("forward", GEOMETRY, activation="relu")), "g", 2)
    assert [str(expr) for expr in nest.pointwise] == ["fmax(O(n, g, gi, f, t, h, w), 0)"]


def test_a_batched_matrix_product_can_be_packed() -> None:
    text = "def bmm(float(B,M,K) A, float(B,K,N) X) -> (C) { C(b,i,j) +=! A(b,i,k) * X(b,k,j) }"
    strides = {"A": (15, 5, 1), "X": (20, 4, 1), "C": (12, 4, 1)}
    nest = lower(parse(text), {"B": 4, "M": 3, "K": 5, "N": 4}, strides, "float64")
    rng = np.random.default_rng(0)
    a, x = rng.standard_normal((4, 3, 5)), rng.standard_normal((4, 5, 4))
    got = interpret(packed(nest, "b", 2), {"A": a, "X": x})
    np.testing.assert_allclose(got.reshape(4, 3, 4), a @ x, atol=1e-12)


@pytest.mark.parametrize(
    ("axis", "count", "message"),
    [
        ("g", 4, "g of forward cannot be packed by 4, which must divide it"),
        ("g", 1, "cannot be packed by 1"),
        ("n", 2, "n of forward cannot be packed"),
        ("x", 2, "x of forward cannot be packed"),
        ("c", 2, "c does not index two factors and the output of forward"),
        ("t", 3, "t does not index two factors"),
    ],
)
def test_what_cannot_be_packed_says_why(axis: str, count: int, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        packed(of(), axis, count)


def test_an_axis_that_is_added_to_something_cannot_be_packed() -> None:
    text = "def f(float(N,M) A, float(N) X) -> (C) { C(b) +=! A(b + k, k) * X(b) where k in 0:2 }"
    nest = lower(parse(text), {"N": 4, "M": 2}, {"A": (2, 1), "X": (1,), "C": (1,)}, "float64")
    with pytest.raises(ScheduleError, match="b has no axis behind it"):
        packed(nest, "b", 2)


def test_a_tie_to_an_unknown_axis_is_a_broken_nest() -> None:
    nest = of()
    image, kernel = nest.factors
    broken = replace(nest, factors=(image, replace(kernel, ties=(("g", "y"),))), _by_name={})
    with pytest.raises(NestError, match="ties an axis that is not one of"):
        verify(broken)


def test_ties_belong_to_what_an_access_depends_on() -> None:
    access = Access("K", (Index((("a", 1),)),), (("a", "b"),))
    assert access.axes == {"a", "b"}
    assert str(access) == "K(a) [a == b]"


def test_a_schedule_packs_and_survives_json() -> None:
    names = ("n", "g", "gi", "f", "t", "h", "w", "gj", "c", "kt", "kh", "kw")
    schedule = Schedule(tuple(Digit(name, None, "serial") for name in names), pack=(("g", 2),))
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert str(schedule).startswith("pack g by 2; n rest serial | ")
    scheduled = apply(of(), schedule)
    assert math.prod(loop.count or 1 for loop in scheduled.loops if loop.axis[0] == "g") == 12
    assert "pack" not in replace(schedule, pack=()).to_json()
    with pytest.raises(ScheduleError, match="C\\+\\+ has no packed axes"):
        print_cpp(scheduled)
