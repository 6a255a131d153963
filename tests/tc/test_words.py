"""Blocks of an axis to each lane, and loads and stores of words, against the nest interpreter and PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from g3dswap import native
from g3dswap.comprehensions import nest as nest_of
from g3dswap.errors import ScheduleError
from g3dswap.problem import DIRECTIONS, Geometry, Problem
from g3dswap.tc.kernel import build, show
from g3dswap.tc.schedule import apply
from tests.profiles import examples
from tests.tc.test_print_triton import DEVICE, ROUNDING, check, schedule_of, used

pytest.importorskip("triton", reason="needs Triton")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OUTER = {
    "forward": "n rest grid | g rest grid | f rest grid | t rest grid | h*w rest grid | c rest serial",
    "grad_input": "n rest grid | g rest grid | c rest grid | t rest grid | h*w rest grid | f rest serial",
    "grad_weight": "g rest grid | f rest grid | c rest grid | n rest grid | t rest serial | h*w rest serial",
}
TAPS = "kt rest unroll | kh rest unroll | kw rest unroll"


def depthwise(
    direction: str, size: tuple[int, int, int], dtype: torch.dtype = torch.float32, padding: int = 1
) -> Problem:
    geometry = Geometry(2, 2, 2, size, (1, 3, 3), padding=(0, padding, padding))
    return Problem(direction, geometry, dtype, device=DEVICE)


def blocks(direction: str, rows: int, columns: int, lanes: int = 8) -> str:
    return f"{OUTER[direction]} | {TAPS} | h {rows} unroll | w {columns} unroll | h*w {lanes} lanes"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_neighbours_are_one_word(direction: str, dtype: torch.dtype) -> None:
    widest = 8 // dtype.itemsize
    problem = depthwise(direction, (2, 4, 8), dtype)
    source = check(problem, schedule_of(blocks(direction, 2, widest)))
    assert f"by{widest} = " in source and "tl.pointer_type(tl.int64)" in source
    if direction != "grad_weight":
        stores = [line for line in source.splitlines() if "tl.store(" in line]
        assert len(stores) == 2 and all(".to(tl.int64" in line for line in stores)


def test_shifted_reads_share_words() -> None:
    """Four columns with a border are three words, where single loads would be six."""
    problem = depthwise("forward", (1, 1, 32), torch.bfloat16)
    source = check(problem, schedule_of(blocks("forward", 1, 4)))
    assert sum(line.strip().startswith("w") and "tl.load(" in line for line in source.splitlines()) == 3


@pytest.mark.parametrize(("width", "block"), [(7, 4), (6, 3), (9, 2)])
def test_where_a_word_does_not_fit_elements_are_loaded(width: int, block: int) -> None:
    source = check(depthwise("forward", (2, 3, width)), schedule_of(blocks("forward", 2, block)))
    assert "pointer_type" not in source


def test_a_narrower_word_where_the_widest_does_not_fit() -> None:
    source = check(depthwise("forward", (2, 3, 6), torch.bfloat16), schedule_of(blocks("forward", 1, 2)))
    assert "tl.pointer_type(tl.int32)" in source and "tl.pointer_type(tl.int64)" not in source


@settings(max_examples=examples(30))
@given(
    direction=st.sampled_from(DIRECTIONS),
    dtype=st.sampled_from(DTYPES),
    size=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 12)),
    kernel=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2)),
    padding=st.integers(0, 2),
    channels=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    rows=st.integers(1, 3),
    columns=st.sampled_from((1, 2, 3, 4, 8)),
    layout=st.sampled_from(("contiguous", "channels_last_3d")),
)
def test_blocks_of_any_size(
    direction: str,
    dtype: torch.dtype,
    size: tuple[int, int, int],
    kernel: tuple[int, int, int],
    stride: tuple[int, int, int],
    padding: int,
    channels: tuple[int, int],
    rows: int,
    columns: int,
    layout: str,
) -> None:
    size = tuple(max(s, k) for s, k in zip(size, kernel))  # type: ignore[assignment]
    c, f = channels
    geometry = Geometry(2 * c, 2 * f, 2, size, kernel, stride, (padding,) * 3)
    problem = Problem(direction, geometry, dtype, layout, DEVICE)
    check(problem, schedule_of(blocks(direction, rows, columns)))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_infinities_do_not_spread_through_blocks_that_overshoot() -> None:
    """The second block of three rows out of five: what lies beyond must not be read."""
    problem = depthwise("grad_weight", (1, 5, 6))
    result, image, weight = native.random_operands(problem, 1, device=DEVICE)
    assert result is not None and image is not None
    image[0, 1] = torch.inf  # lies right behind channel 0
    out = torch.empty(problem.geometry.weight_shape(), device=DEVICE)
    kernel = build(nest_of(problem), schedule_of(blocks("grad_weight", 3, 4)), "triton")
    kernel(*used(problem, [result, image, weight]), out=out)
    assert torch.isfinite(out[0]).all()


def test_operands_that_are_not_aligned() -> None:
    """A view that begins in the middle of a word gives the same result."""
    problem = depthwise("forward", (2, 4, 8), torch.bfloat16)
    image, weight, _ = native.random_operands(problem, 2, device=DEVICE)
    assert image is not None and weight is not None
    kernel = build(nest_of(problem), schedule_of(blocks("forward", 2, 4)), "triton")
    wanted = torch.empty_like(image)
    kernel(image, weight, out=wanted)
    moved = torch.empty(image.numel() + 1, dtype=image.dtype, device=DEVICE)[1:].view(image.shape)
    moved.copy_(image)
    out = torch.empty(image.numel() + 3, dtype=image.dtype, device=DEVICE)[3:].view(image.shape)
    kernel(moved, weight, out=out)
    torch.testing.assert_close(out, wanted, rtol=0, atol=0)
    assert native.error(out.cpu(), native.reference(problem, image, weight, None).cpu()) < ROUNDING[out.dtype]


def test_blocks_are_unrolled_and_only_in_triton() -> None:
    nest = nest_of(depthwise("forward", (1, 4, 4)))
    with pytest.raises(ScheduleError, match="a block of w is bound"):
        apply(nest, schedule_of(blocks("forward", 1, 2).replace("w 2 unroll", "w 2 serial")))
    with pytest.raises(ScheduleError, match="C\\+\\+ flattens whole axes, but w has digits of its own"):
        show(nest, schedule_of(blocks("forward", 1, 2)), "cpp")
