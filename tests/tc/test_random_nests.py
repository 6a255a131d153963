"""Every schedule means the same: random geometries with random legal schedules against float64."""

from __future__ import annotations

import random

import numpy as np
import torch
from hypothesis import given, settings

from g3dswap.comprehensions import nest as make_nest
from g3dswap.tc.interpret import interpret
from g3dswap.tc.kernel import build
from g3dswap.tc.schedule import Schedule, apply
from g3dswap.tc.space import Space
from tests.geometries import TOLERANCE, Case, arrays, cases, error, expected, operands
from tests.profiles import examples


@settings(max_examples=examples(250))
@given(cases(longest=7, dtypes=(torch.float64,)))
def test_interpreted_nests_scheduled_and_not_agree_with_float64(case: Case) -> None:
    nest = make_nest(case.problem)
    tensors, _ = operands(case)
    want = expected(case, tensors).numpy()
    schedule = Space(nest, "cpp").any(random.Random(case.seed), printable=False)
    for candidate in (nest, apply(nest, schedule)):
        got = interpret(candidate, arrays(nest, tensors, case.batch), case.batch)
        np.testing.assert_allclose(
            got.reshape(want.shape), want, rtol=0, atol=1e-10 * max(1.0, np.abs(want).max())
        )


@settings(max_examples=examples(66))
@given(cases())
def test_compiled_cpp_with_random_schedules_agrees_with_float64(case: Case) -> None:
    nest = make_nest(case.problem)
    tensors, out = operands(case)
    schedule = Space(nest, "cpp").any(random.Random(case.seed))
    build(nest, schedule, "cpp")(*tensors, out=out)
    assert error(out, expected(case, tensors)) <= TOLERANCE[case.problem.dtype]


@settings(max_examples=examples(28))
@given(cases())
def test_the_default_schedule_agrees_with_float64(case: Case) -> None:
    nest = make_nest(case.problem)
    tensors, out = operands(case)
    build(nest, Space(nest, "cpp").default(), "cpp")(*tensors, out=out)
    assert error(out, expected(case, tensors)) <= TOLERANCE[case.problem.dtype]


@settings(max_examples=examples(28))
@given(cases(dtypes=(torch.float32,)))
def test_mutations_and_crossings_are_legal_and_schedules_survive_json(case: Case) -> None:
    space = Space(make_nest(case.problem), "cpp")
    rng = random.Random(case.seed)
    first, *others = space.ranked(4, rng)
    for schedule in (
        first,
        space.mutate(first, rng),
        space.crossover(first, others[-1] if others else first, rng),
    ):
        assert space.cost(schedule) < float("inf")
        assert Schedule.from_json(schedule.to_json()) == schedule
