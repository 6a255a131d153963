"""Products in shared memory as the space proposes them: where there are any, and varied within the space."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from g3dswap.comprehensions import nest as nest_of
from g3dswap.problem import Geometry, Problem
from g3dswap.tc import compile_cuda, space
from g3dswap.tc.print_cuda import is_cuda
from g3dswap.tc.space import Space
from g3dswap.tc.space_staged import FORMS, families, forms
from tests.tc.test_print_cuda import GEOMETRIES, PASSES, problem_of


@pytest.fixture
def with_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "is_available", lambda: True)


def test_without_nvrtc_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    nest = nest_of(problem_of("forward", GEOMETRIES["depthwise 7x7x7"]))
    monkeypatch.setattr(space, "is_available", lambda: False)
    assert not any(map(is_cuda, Space(nest, "triton").ranked(64, random.Random(0))))


def test_the_interpreter_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_cuda.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not compile_cuda.is_available()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert compile_cuda.is_available()


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.usefixtures("with_nvrtc")
def test_wide_bands_are_proposed_and_mutated(direction: str) -> None:
    layer, rng = Geometry(8, 8, 8, (24, 24, 24), (5, 5, 5), padding=(2, 2, 2)), random.Random(0)
    found = Space(nest_of(problem_of(direction, layer)), "triton")
    schedule = next(s for s in found.ranked(64, rng) if is_cuda(s))
    seen = {schedule}
    for _ in range(30):
        schedule = found.mutate(schedule, rng)
        assert is_cuda(schedule) and found.cost(schedule) < math.inf
        seen.add(schedule)
    assert len(seen) > 10


def test_only_half_types_and_neighbouring_channels() -> None:
    layer = Geometry(32, 32, 32, (8, 16, 16), (3, 3, 3), padding=(1, 1, 1))
    half = problem_of("forward", layer)
    assert forms(nest_of(half))
    assert len(forms(nest_of(half))) <= FORMS
    assert not list(families(nest_of(replace(half, dtype=torch.float32))))
    assert not list(families(nest_of(replace(half, activation="relu"))))
    apart = [form for form in forms(nest_of(problem_of("forward", layer, "channels_last_3d"))) if not form[0]]
    assert not apart  # what a program reads of one channel has no neighbours there


def test_the_model_prefers_what_multiplies_less_and_copies_more_at_once() -> None:
    nest = nest_of(
        Problem("forward", Geometry(64, 64, 64, (64, 64, 64), (7, 7, 7), padding=(3, 3, 3)), torch.bfloat16)
    )
    found = Space(nest, "triton")
    every = [p for first, rest in families(nest) for p in rest({q.tile for q in first})]

    def least(wanted: int) -> float:
        return min(found.cost(p.schedule(nest)) for p in every if dict(p.tile).get("t", 1) == wanted)

    assert least(8) < least(1)  # a fragment of the image serves eight planes
