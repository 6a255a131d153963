"""Reductions that the programs of a cluster share, in CUDA C++, emulated: right for any geometry."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings

from g3dswap.comprehensions import nest as nest_of
from g3dswap.errors import ScheduleError
from g3dswap.problem import Geometry, Problem
from g3dswap.tc import model_staged, space, space_lines, space_staged
from g3dswap.tc.nest import Nest
from g3dswap.tc.product import Product, clusters
from g3dswap.tc.program_cuda import MOST_CLUSTER
from g3dswap.tc.schedule import Digit, Schedule, apply, rewritten
from g3dswap.tc.source import source
from g3dswap.tc.space import Space
from tests.emulated import FAULTS, Emulated, emulated
from tests.geometries import TOLERANCE, Case, error, expected, operands
from tests.profiles import examples
from tests.tc.spaces import judged, measured
from tests.tc.test_lines_cuda import cases as cases_of_lines
from tests.tc.test_print_cuda import GEOMETRIES, cases, checked, right_on_a_gpu

SMALL = Geometry(3, 3, 3, (4, 14, 14), (3, 3, 3), padding=(1, 1, 1))


def problem_of(geometry: Geometry = SMALL, layout: str = "contiguous") -> Problem:
    return Problem("grad_weight", geometry, torch.bfloat16, layout)


def clustered(nest: Nest) -> list[Product]:
    """All products of clusters that the spaces propose for a nest."""
    found: Iterable[Product] = (
        product
        for kind in (space_staged, space_lines)
        for form in kind.forms(nest)
        for product in kind.products(nest, form, 2)
    )
    return [product for product in found if product.clustered]


def are_right(case: Case) -> bool:
    """Whether some of a few products of clusters of this case's layer print; all that do are right."""
    case = replace(case, problem=replace(case.problem, direction="grad_weight", bias=False))
    found = clustered(nest_of(case.problem))
    few = random.Random(case.seed).sample(found, min(3, len(found)))
    printed = [checked(case, [product]) for product in few]
    return any(printed)


@given(cases())
@settings(max_examples=examples(10), deadline=None)
def test_random_geometries(case: Case) -> None:
    assume(are_right(case))


@given(cases_of_lines())
@settings(max_examples=examples(10), deadline=None)
def test_random_lines(case: Case) -> None:
    assume(are_right(case))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("depthwise 5x5x5", "contiguous"),
        ("four channels a group", "contiguous"),
        ("four channels a group", "channels_last_3d"),
        ("strided", "channels_last_3d"),
        ("many single channels", "channels_last_3d"),
    ],
)
def test_results_are_whole(name: str, layout: str) -> None:
    problem = problem_of(GEOMETRIES[name], layout=layout)
    found = clustered(nest_of(problem))
    random.Random(name).shuffle(found)
    kernel = checked(Case(problem, 3, 0), found, most=40)
    assert kernel is not None and kernel.partial_counts is None
    assert 1 < kernel.nest.cluster <= MOST_CLUSTER
    assert f"__cluster_dims__({kernel.nest.cluster}, 1, 1)" in kernel.source


def test_the_batch_may_be_split_too() -> None:
    """Each cluster's sums are then one partial result."""
    problem = problem_of()
    found = [replace(p, split=(("n", 1), *p.split)) for p in clustered(nest_of(problem))]
    kernel = checked(Case(problem, 3, 1), found, most=40)
    assert kernel is not None and kernel.partial_counts == (None,) and kernel.nest.cluster > 1


def test_no_program_ends_while_others_read_what_it_has_found() -> None:
    problem = problem_of(GEOMETRIES["four channels a group"])
    nest = nest_of(problem)
    product = next(p for p in clustered(nest) if p.warps == 1)  # so that all programs write results
    schedule = product.schedule(nest)
    scheduled = apply(nest, schedule)
    text = source(scheduled, schedule, "triton")
    before, _, behind = text.rpartition("meet_cluster();")
    case = Case(problem, 2, 0)
    tensors, out = operands(case)
    reference = expected(case, tensors)

    def result(text: str) -> torch.Tensor:
        Emulated(scheduled, schedule, text)(tensors, out, 2)
        return out

    assert error(result(text), reference) <= TOLERANCE[problem.dtype]
    assert result(before + behind).isnan().any()
    with pytest.raises(AssertionError, match=FAULTS[1]):
        result(text.replace("meet_cluster();", "if (blockIdx.x % 2) meet_cluster();", 1))


def test_reductions_are_shared_out_evenly() -> None:
    nest = nest_of(problem_of(Geometry(54, 54, 54, (16, 56, 56), (3, 3, 3), padding=(1, 1, 1))))
    product = next(p for p in clustered(nest) if len(p.split) == 1)
    whole = rewritten(nest, product.pack, product.skew)
    found = clusters(whole, (product.rows, product.cols, product.depth), product.tile, 8, 100)
    numbers = [apply(nest, replace(product, split=split).schedule(nest)).cluster for split in found]
    assert numbers == sorted(numbers, reverse=True) and numbers[0] == MOST_CLUSTER and min(numbers) > 1
    assert not any("n" in dict(split) for split in found)


def test_what_is_no_cluster_is_refused() -> None:
    nest = nest_of(problem_of())
    schedule = next(p for p in clustered(nest) if p.split == (("t", 1),)).schedule(nest)
    places = {(digit.axis, digit.bind): i for i, digit in enumerate(schedule.digits)}

    def refused(message: str, *moved: tuple[str, str, str], geometry: Geometry = SMALL) -> None:
        digits = list(schedule.digits)
        for axis, bind, wanted in moved:
            digits[places[axis, bind]] = replace(digits[places[axis, bind]], bind=wanted)
        with pytest.raises(ScheduleError, match=message):
            emulated(nest_of(problem_of(geometry)), replace(schedule, digits=tuple(digits)))

    refused("programs of a cluster that do not follow each other", ("g", "grid", "cluster"))
    refused("the batch n is bound to cluster", ("n", "serial", "cluster"))
    refused("programs inside another loop", ("h*w", "serial", "cluster"), ("t", "cluster", "serial"))
    refused(
        "a cluster adds up wi, which is not summed", ("wi", "grid", "cluster"), ("t", "cluster", "serial")
    )
    steps = 9 * {d.axis: d.count or 1 for d in schedule.digits if d.bind == "unroll"}.get("t", 1)
    refused("a cluster of 9 programs is larger than 8", geometry=replace(SMALL, size=(steps, 14, 14)))


def test_only_gradients_in_the_kernel_have_clusters() -> None:
    nest = nest_of(replace(problem_of(GEOMETRIES["four channels a group"]), direction="forward"))
    assert not clustered(nest)
    for target in ("cpp", "triton"):
        digits = [Digit(a.name, None, "serial" if a.reduce else "grid") for a in nest.axes]
        place = next(i for i, digit in enumerate(digits) if digit.bind == "serial")
        digits[place] = replace(digits[place], bind="cluster")
        with pytest.raises(ScheduleError, match="no clusters that add up sums"):
            source(apply(nest, Schedule(tuple(digits))), Schedule(tuple(digits)), target)


def test_the_model_finds_the_fast_kernels_of_a_gpu() -> None:
    """Among its first four of up to 14, half of them of clusters, is one of the fastest."""
    text = Path(__file__).with_name("measured_clusters.json").read_text(encoding="utf-8")
    found = (measured(layer, model_staged.cost) for layer in json.loads(text)["layers"])
    layers, first, four, ratio = judged(found)
    assert layers > 15
    assert first < 1.1
    assert four < 1.05
    assert ratio < 1.4


def test_older_gpus_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    nest = nest_of(problem_of())
    schedule = clustered(nest)[0].schedule(nest)
    assert Space(nest, "triton").cost(schedule) < math.inf
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(space, "shared_bytes", lambda: 99 * 1024)
    assert Space(nest, "triton").cost(schedule) == math.inf


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
def test_on_a_gpu(layout: str) -> None:
    """What the emulation cannot show: that programs of a cluster meet, and see each other's memory."""
    rng, done = random.Random(layout), 0
    for geometry in GEOMETRIES.values():
        case = Case(problem_of(geometry, layout=layout), 3, rng.randrange(1000))
        nest = nest_of(case.problem)
        found = [product.schedule(nest) for product in clustered(nest)]
        done += right_on_a_gpu(case, rng.sample(found, min(6, len(found))))
    assert done > 20
