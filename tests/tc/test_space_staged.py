"""Products in shared memory as the space proposes them: where there are any, and varied within the space."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from g3dswap.comprehensions import nest as nest_of
from g3dswap.problem import Geometry, Problem
from g3dswap.tc import compile_cuda, model_staged, space
from g3dswap.tc.print_cuda import is_cuda
from g3dswap.tc.roles import nearest_last
from g3dswap.tc.space import Space
from g3dswap.tc.space_staged import FORMS, families, forms
from tests.tc.spaces import every, judged, measured, walk
from tests.tc.test_print_cuda import GEOMETRIES, PASSES, problem_of

MEASURED = json.loads(Path(__file__).with_name("measured_staged.json").read_text(encoding="utf-8"))


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


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_older_gpus_have_none(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert space.has_cuda() == (capability >= (8, 0))


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.usefixtures("with_nvrtc")
def test_wide_bands_are_proposed_and_mutated(direction: str) -> None:
    layer, rng = Geometry(8, 8, 8, (24, 24, 24), (5, 5, 5), padding=(2, 2, 2)), random.Random(0)
    found = Space(nest_of(problem_of(direction, layer)), "triton")
    schedule = next(s for s in found.ranked(64, rng) if is_cuda(s))
    walk(found, schedule, rng, is_cuda)


@pytest.mark.usefixtures("with_nvrtc")
def test_what_does_not_fit_on_the_gpu_is_not_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    nest = nest_of(problem_of("forward", Geometry(8, 8, 8, (24, 24, 24), (5, 5, 5), padding=(2, 2, 2))))
    schedule = next(s for s in Space(nest, "triton").ranked(64, random.Random(0)) if is_cuda(s))
    monkeypatch.setattr(space, "shared_bytes", lambda: 4096)
    assert Space(nest, "triton").cost(schedule) == math.inf
    assert not any(map(is_cuda, Space(nest, "triton").ranked(64, random.Random(0))))


def test_half_types_and_where_it_is_allowed_tf32() -> None:
    layer = Geometry(32, 32, 32, (8, 16, 16), (3, 3, 3), padding=(1, 1, 1))
    half = problem_of("forward", layer)
    assert forms(nest_of(half))
    assert len(forms(nest_of(half))) <= FORMS
    single = replace(half, dtype=torch.float32)
    assert not list(families(nest_of(single)))
    assert not list(families(nest_of(replace(single, precision="tf32"))))  # of single channels a group
    few = replace(single, geometry=replace(layer, groups=8))
    assert not list(families(nest_of(few)))
    assert list(families(nest_of(replace(few, precision="tf32"))))


@pytest.mark.parametrize(
    ("channels", "wanted"), [(32, {2, 4, 8, 16}), (54, {2, 4, 8, 16}), (24, {2, 4, 8}), (3, set())]
)
@pytest.mark.parametrize("direction", PASSES)
def test_warps_have_a_group_each_where_neighbours_are_other_groups(
    direction: str, channels: int, wanted: set[int]
) -> None:
    layer = Geometry(channels, channels, channels, (4, 8, 16), (5, 5, 5), padding=(2, 2, 2))
    found = every(families(nest_of(problem_of(direction, layer, "channels_last_3d"))))
    assert {count for p in found if not p.pack for _, count in p.apart} == wanted
    assert all(p.apart == (("g", p.warps),) for p in found if not p.pack)
    assert not any(p.apart for p in every(families(nest_of(problem_of(direction, layer)))))


@pytest.mark.usefixtures("with_nvrtc")
def test_groups_of_warps_are_mutated() -> None:
    layer, rng = Geometry(16, 16, 16, (24, 24, 24), (7, 7, 7), padding=(3, 3, 3)), random.Random(0)
    found = Space(nest_of(problem_of("forward", layer, "channels_last_3d")), "triton")
    schedule = next(s for s in found.ranked(64, rng) if is_cuda(s))
    walk(found, schedule, rng, lambda s: is_cuda(s) and any(d.bind == "warps" for d in s.digits))


def test_the_grid_runs_along_what_is_near_in_memory() -> None:
    layer = Geometry(32, 32, 32, (8, 16, 16), (3, 3, 3), padding=(1, 1, 1))
    wanted = {"contiguous": ["n", "g", "t", "h*w"], "channels_last_3d": ["n", "t", "h*w", "g"]}
    for layout, order in wanted.items():
        nest = nest_of(problem_of("forward", layer, layout))
        assert nearest_last(nest, ("h*w", "g", "n", "t")) == order


def test_the_model_finds_the_fast_kernels_of_a_gpu() -> None:
    """Among its first four of 14 is one of the fastest, and it knows how long the fast ones take."""
    layers, first, four, ratio = judged(measured(layer, model_staged.cost) for layer in MEASURED["layers"])
    assert layers > 20
    assert first < 1.25
    assert four < 1.1
    assert ratio < 1.3


def test_the_model_prefers_what_multiplies_less_and_copies_more_at_once() -> None:
    nest = nest_of(
        Problem("forward", Geometry(64, 64, 64, (64, 64, 64), (7, 7, 7), padding=(3, 3, 3)), torch.bfloat16)
    )
    found = Space(nest, "triton")
    proposed = every(families(nest))

    def least(wanted: int) -> float:
        return min(found.cost(p.schedule(nest)) for p in proposed if dict(p.tile).get("t", 1) == wanted)

    assert least(8) < least(1)  # a fragment of the image serves eight planes
