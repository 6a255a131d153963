"""The IR's invariants, lowering, schedules and buffers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from g3dswap.comprehensions import FORWARD, nest
from g3dswap.errors import NestError, NotationError, ScheduleError
from g3dswap.problem import Geometry, Problem
from g3dswap.tc.buffers import Flat, make_buffer
from g3dswap.tc.interpret import interpret
from g3dswap.tc.linear import Linear
from g3dswap.tc.lower import lower
from g3dswap.tc.nest import Index, Loop, Nest, Stage, verify
from g3dswap.tc.parser import parse
from g3dswap.tc.schedule import Digit, Schedule, apply, serial

GEOMETRY = Geometry(6, 12, 3, (5, 7, 9), (3, 3, 3), (1, 1, 2), (1, 1, 1))


def of(direction: str = "forward", layout: str = "contiguous", bias: bool = False) -> Nest:
    return nest(Problem(direction, GEOMETRY, layout=layout, bias=bias))


def schedule(text: str, *fuse: tuple[str, ...], stage: tuple[tuple[str, int], ...] = ()) -> Schedule:
    data = {"digits": text.split(" | "), "fuse": fuse, "stage": stage, "hints": {}}
    return Schedule.from_json(data)


FORWARD_LOOPS = "n rest grid | g rest grid | f rest serial | t rest serial | h rest serial | w rest serial | "
REDUCTIONS = "c rest serial | kt rest serial | kh rest serial | kw rest serial"


def test_lowering_names_axes_bounds_and_strides() -> None:
    found = of()
    assert [(a.name, a.extent, a.reduce) for a in found.axes] == [
        ("n", None, False), ("g", 3, False), ("f", 4, False),
        ("t", 5, False), ("h", 7, False), ("w", 5, False),
        ("c", 2, True), ("kt", 3, True), ("kh", 3, True), ("kw", 3, True),
    ]  # fmt: skip
    assert found.tensor("I").shape == (None, 3, 2, 5, 7, 9)
    assert found.tensor("I").strides == (1890, 630, 315, 63, 9, 1)
    assert found.factors[0].indices[5] == Index((("kw", 1), ("w", 2)), -1)
    assert of(layout="channels_last_3d").tensor("I").strides == (1890, 2, 1, 378, 54, 6)
    assert [str(a) for a in of(bias=True).addends] == ["B(g, f)"]


def test_an_exact_division_survives_lowering() -> None:
    assert str(of("grad_input").factors[0].indices[5]) == "(-1*kw + w + 1)/2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(float(N) A) -> (O) { O(i) = A(i) }", "does not begin with '\\+=!'"),
        ("def f(float(N) A, float(N) B) -> (O) { O(i) +=! A(i) + B(i) }", "is not a product of tensors"),
        ("def f(float(N) A) -> (O) { O(i) +=! A(i) \n O(i) = O(i) * A(i) }", "is not a sum of tensors"),
        ("def f(float(N) A) -> (O) { O(i) +=! A(i) \n O(i) = A(i) + A(i) }", "does not add to"),
        (
            "def f(float(N) A) -> (O) { O(i) +=! A(i) \n O(i) = exp(O(i)) \n O(i) = O(i) + A(i) }",
            "'O\\(i\\) = O\\(i\\) \\+ A\\(i\\)' adds to what 'O\\(i\\) = exp\\(O\\(i\\)\\)' made; add before",
        ),
        (
            "def f(float(N) A) -> (O) { O(i) +=! A(i) \n O(i) = exp(O(i)) where i in 0:2 }",
            "covers a part of O\\(i\\)",
        ),
        (
            "def f(float(N) A) -> (O) { O(i) +=! A(i) \n O(i) = O(i) + A(i) where i in 1:N }",
            "covers a part of O\\(i\\)",
        ),
        ("def f(float(N) A) -> (O) { O(i) +=! A(i) \n O(i) = O(i) + log(0) }", "'log\\(0\\)' is -inf"),
        ("def f(float(N) A) -> (O) { O(i) +=! A(i) \n O(i) = O(i) + i }", "'i' has no value when"),
    ],
)
def test_what_is_no_contraction_with_sums_is_refused(text: str, message: str) -> None:
    with pytest.raises(NotationError, match=message):
        lower(parse(text), {"N": 4}, {"A": (1,), "B": (1,), "O": (1,)}, "float32")


def test_a_matrix_product_needs_no_convolution() -> None:
    text = "def mm(float(M,K) A, float(K,N) B) -> (C) { C(i,j) +=! A(i,k) * B(k,j) }"
    found = lower(parse(text), {"M": 3, "K": 5, "N": 4}, {"A": (5, 1), "B": (4, 1), "C": (4, 1)}, "float64")
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 5)), rng.standard_normal((5, 4))
    np.testing.assert_allclose(interpret(found, {"A": a, "B": b}), a @ b, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: replace(n, loops=n.loops[:-1], _by_name={}), "miss or repeat axes"),
        (
            lambda n: replace(n, loops=(*n.loops[:-1], Loop("kw", 2, 1, "serial")), _by_name={}),
            "kw reach 2 of 3",
        ),
        (
            lambda n: replace(n, loops=(*n.loops[:-1], Loop("kw", 3, 1, "magic")), _by_name={}),
            "unknown bind magic",
        ),
        (lambda n: replace(n, loops=(n.loops[-1], *n.loops[:-1]), _by_name={}), "outside a parallel loop"),
        (
            lambda n: replace(n, loops=(*n.loops[:1], Loop("g", 2, 1, "serial"), *n.loops[1:]), _by_name={}),
            "overlap",
        ),
        (lambda n: replace(n, stages=(Stage("X", 3),), _by_name={}), "X cannot be staged"),
        (lambda n: replace(n, stages=(Stage("O", 9),), _by_name={}), "O is staged at 9"),
        (lambda n: replace(n, addends=n.factors[:1], _by_name={}), "depends on a reduction"),
        (lambda n: replace(n, axes=(*n.axes, n.axes[0]), _by_name={}), "not distinct"),
    ],
)
def test_the_verifier_sees_broken_nests(change, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(NestError, match=message):
        verify(change(of()))


@pytest.mark.parametrize(
    ("text", "fuse", "stage", "message"),
    [
        ("n 2 grid | " + FORWARD_LOOPS[14:] + REDUCTIONS, (), (), "digits of the batch n are"),
        (FORWARD_LOOPS + "n 2 serial | n 2 serial | " + REDUCTIONS, (), (), "digits of the batch n are"),
        (FORWARD_LOOPS + REDUCTIONS + " | n 2 unroll", (), (), "a part of the batch n is bound to unroll"),
        (
            FORWARD_LOOPS + "n 2 serial | " + REDUCTIONS,
            (),
            (("I", 6),),
            "I is staged for blocks of the batch n",
        ),
        (FORWARD_LOOPS + REDUCTIONS + " | x 4 unroll", (), (), "has no axis 'x'"),
        (FORWARD_LOOPS + REDUCTIONS + " | w rest lanes", (), (), "only the first digit of w"),
        (FORWARD_LOOPS + REDUCTIONS, (("n", "g"),), (), "batch axis n cannot be flattened"),
        (FORWARD_LOOPS + REDUCTIONS, (("w", "c"),), (), "mixes kinds"),
        (FORWARD_LOOPS + REDUCTIONS, (), (("I", 0),), "I is staged at 0"),
    ],
)
def test_schedules_that_do_not_fit_say_why(
    text: str, fuse: tuple[tuple[str, ...], ...], stage: tuple[tuple[str, int], ...], message: str
) -> None:
    with pytest.raises(ScheduleError, match=message):
        apply(of(), schedule(text, *fuse, stage=stage))


@pytest.mark.parametrize(
    "data", [{}, [], {"digits": ["n"]}, {"digits": ["n rest magic"], "fuse": [], "stage": [], "hints": {}}]
)
def test_json_that_is_no_schedule_is_refused(data) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ScheduleError, match="tune the layer again"):
        Schedule.from_json(data)


def test_a_schedule_is_independent_of_the_extents() -> None:
    text = FORWARD_LOOPS + REDUCTIONS + " | t 4 unroll | w 16 lanes"
    small, large = (
        apply(nest(Problem("forward", Geometry(4, 4, 4, size, (3, 3, 3)))), schedule(text))
        for size in ((5, 7, 9), (20, 30, 70))
    )
    assert [p.count for p in small.loops if p.axis in "tw"] == [1, 1, 4, 16]
    assert [p.count for p in large.loops if p.axis in "tw"] == [5, 5, 4, 16]
    assert [p.step for p in large.loops if p.axis in "tw"] == [4, 16, 1, 1]


def test_blocks_of_the_batch_add_up_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many programs are enough: the last block is short, or every one is a single step."""
    plain = nest(Problem("forward", Geometry(2, 2, 2, (1, 3, 4), (1, 3, 3), padding=(0, 1, 1))))
    blocked = apply(plain, schedule(FORWARD_LOOPS + "n 3 serial | " + REDUCTIONS))
    rng = np.random.default_rng(0)
    arrays = {
        tensor.name: rng.standard_normal([7 if e is None else e for e in tensor.shape])
        for tensor in map(plain.tensor, plain.operands)
    }
    expected = interpret(plain, arrays, 7)
    for enough, share in ((1, 3), (7, 2), (100, 1)):
        monkeypatch.setattr("g3dswap.tc.nest.ENOUGH", enough)
        assert blocked.blocks is not None and blocked.blocks.share(7) == share
        assert blocked.blocks.number(7) == -(-7 // share) and blocked.blocks.number(0) == 0
        np.testing.assert_allclose(interpret(blocked, arrays, 7), expected, atol=1e-12)


def test_a_phase_is_the_least_significant_digit_wherever_it_stands() -> None:
    digits = [*serial(of("grad_input")).digits, Digit("w", 4, "unroll"), Digit("w", 2, "unroll", True)]
    loops = apply(of("grad_input"), Schedule(tuple(digits))).loops
    assert [(p.count, p.step) for p in loops if p.axis == "w"] == [(2, 8), (4, 2), (2, 1)]


def test_a_flat_buffer_pads_its_rows_so_that_a_shift_is_one_step() -> None:
    plain = nest(Problem("forward", Geometry(4, 4, 4, (5, 7, 9), (3, 3, 3), padding=(1, 1, 1))))
    text = (
        "n rest grid | g rest grid | f rest serial | t rest serial | h*w rest serial | "
        + REDUCTIONS
        + " | h*w 16 lanes"
    )
    scheduled = apply(plain, schedule(text, ("h", "w"), stage=(("I", 2), ("O", 5))))
    assert scheduled.fused[0].extents == (7, 11)
    buffer = make_buffer(scheduled, scheduled.stages[0])
    flat = buffer.rows[-1]
    assert isinstance(flat, Flat) and flat.extent == 80 + 2 * 11 + 2
    w = Linear(0, (("v4", 16), ("v9", 1)))
    indices = [Linear(), Linear(), Linear(), Linear(-1), Linear(-1), Linear(-1)]
    origin = buffer.address(tuple(indices), w, lambda linear: linear)
    down = buffer.address((*indices[:4], Linear(0), Linear(-1)), w, lambda linear: linear)
    right = buffer.address((*indices[:4], Linear(-1), Linear(0)), w, lambda linear: linear)
    assert (down - origin).const == 11 and (right - origin).const == 1


def test_nests_print_readably() -> None:
    text = str(apply(of(), schedule(FORWARD_LOOPS + REDUCTIONS + " | w 8 lanes", stage=(("I", 4),))))
    assert "axis n in [0, batch) parallel" in text and "stage I" in text and "lanes  w += 1 * [0, 8)" in text
    assert text.index("stage I") > text.index("serial t")


def test_the_notation_of_the_passes_round_trips() -> None:
    assert parse(str(parse(FORWARD))) == parse(FORWARD)
