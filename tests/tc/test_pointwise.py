"""Functions of a result: in the notation, the IR, the interpreter, and both printers."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from g3dswap.comprehensions import nest as nest_of
from g3dswap.errors import NestError, ScheduleError
from g3dswap.native import activate
from g3dswap.problem import ACTIVATIONS, Geometry, Problem
from g3dswap.tc.interpret import interpret
from g3dswap.tc.kernel import Kernel, build, show
from g3dswap.tc.lower import lower
from g3dswap.tc.nest import Nest, verify
from g3dswap.tc.parser import parse
from g3dswap.tc.schedule import Schedule, apply, serial
from g3dswap.tc.space import Space
from g3dswap.tc.syntax import Binary, Call, Name, Number, Ref
from tests.conftest import Golden

FUNCTIONS: dict[str, Any] = {
    "exp(S(i,j))": torch.exp,
    "log(fabs(S(i,j)))": lambda x: x.abs().log(),
    "sqrt(fabs(S(i,j)))": lambda x: x.abs().sqrt(),
    "tanh(S(i,j))": torch.tanh,
    "erf(S(i,j))": torch.erf,
    "fmax(S(i,j), 2) - fmin(-S(i,j), N / 2)": lambda x: x.clamp_min(2) - (-x).clamp_max(1.5),
    "1 / (1 + S(i,j) * S(i,j))": lambda x: 1 / (1 + x * x),
}
TRITON = "i rest grid | k rest serial | j 16 lanes"
CPP = "i rest grid | j rest serial | k rest serial | j {} lanes"


def schedule(digits: str) -> Schedule:
    return Schedule.from_json({"digits": digits.split(" | "), "fuse": [], "stage": [], "hints": {}})


def product(value: str, dtype: str = "float32") -> Nest:
    """A matrix product of 40x1 and 1x16 whose elements go through a function."""
    text = f"def f(float(M,K) A, float(K,L) B) -> (S) {{ S(i,j) +=! A(i,k) * B(k,j) \n S(i,j) = {value} }}"
    sizes = {"M": 40, "K": 1, "L": 16, "N": 3}
    return lower(parse(text), sizes, {"A": (1, 1), "B": (16, 1), "S": (16, 1)}, dtype)


def run(kernel: Kernel, *operands: Tensor) -> Tensor:
    out = torch.full((40, 16), torch.nan, dtype=operands[0].dtype, device=operands[0].device)
    kernel(*operands, out=out)
    return out.cpu()


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # of Triton's interpreter
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", FUNCTIONS)
def test_every_function_element_by_element(value: str, dtype: str) -> None:
    nest = product(value, dtype)
    near = torch.tensor([0.0, 1e-4, -1e-3, 0.3, 0.64, 0.66, 0.99, 1.01, 50])
    a = torch.cat([torch.linspace(-6, 6, 31), near]).to(getattr(torch, dtype)).view(40, 1)
    b = torch.tensor([1.0, -1.0, 0.5, 1.7], dtype=a.dtype).repeat(4).view(1, 16)
    exact = (a @ b).double()
    want = FUNCTIONS[value](exact)
    found = torch.from_numpy(interpret(nest, {"A": a.double().numpy(), "B": b.double().numpy()}))
    torch.testing.assert_close(found, FUNCTIONS[value](a.double() @ b.double()), rtol=1e-14, atol=0)
    eps = torch.finfo(a.dtype).eps
    # Whole registers have instructions of their own.
    targets = [("cpp", CPP.format(lanes), "cpu") for lanes in (2, 64 // a.itemsize)]
    if _has_triton():
        targets.append(("triton", TRITON, "cuda" if torch.cuda.is_available() else "cpu"))
    for target, digits, device in targets:
        got = run(build(nest, schedule(digits), target), a.to(device), b.to(device)).double()
        # Of each element, since a norm would hide the small ones; exp magnifies its argument's error.
        allowed = 8 * eps * want.abs() * (1 + exact.abs() * ("exp" in value))
        wrong = ~((got - want).abs() <= allowed) & (got != want) & (want.abs() < torch.finfo(a.dtype).max)
        assert not wrong.any(), f"{target}: {exact[wrong]} gives {got[wrong]}, not {want[wrong]}"


def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_no_number_or_very_large_is_as_pytorch_has_it(activation: str) -> None:
    geometry = Geometry(2, 2, 2, (1, 1, 8), (1, 1, 1))
    problem = Problem("forward", geometry, activation=activation)
    x = (
        torch.tensor([math.nan, 1e4, -1e4, 200.0, -200.0, 0.0, -0.0, 1e-30])
        .expand(1, 2, 1, 1, 8)
        .contiguous()
    )
    out = torch.empty_like(x)
    nest = nest_of(problem)
    build(nest, Space(nest, "cpp").default(), "cpp")(x, torch.ones(geometry.weight_shape()), out=out)
    torch.testing.assert_close(out, activate(activation, x), rtol=1e-6, atol=1e-37, equal_nan=True)


def test_sums_over_lanes_and_half_types_go_through_the_function_once() -> None:
    geometry = Geometry(16, 4, 2, (2, 3, 4), (1, 1, 1))
    problem = Problem("forward", geometry, torch.bfloat16, "channels_last_3d", bias=True, activation="silu")
    nest = nest_of(problem)
    outer = "n rest grid | g rest grid | f rest serial | t rest serial | h rest serial | w rest serial"
    digits = schedule(
        f"{outer} | c rest serial | kt rest serial | kh rest serial | kw rest serial | c 8 lanes"
    )
    x = torch.randn(geometry.input_shape(2)).bfloat16().contiguous(memory_format=torch.channels_last_3d)
    w, b = torch.randn(geometry.weight_shape()).bfloat16(), torch.randn(4).bfloat16()
    out = torch.empty(geometry.output_shape(2), dtype=torch.bfloat16, memory_format=torch.channels_last_3d)
    build(nest, digits, "cpp")(x, w, b, out=out)
    want = torch.nn.functional.silu(torch.nn.functional.conv3d(x.double(), w.double(), b.double(), groups=2))
    assert float((out - want).norm() / want.norm()) < 3e-3


def test_the_nest_says_what_it_does_to_its_result() -> None:
    nest = product("fmax(S(i,j) * (L - 1), 0) / sqrt(4)")
    assert [str(expr) for expr in nest.pointwise] == ["fmax(S(i, j) * 15.0, 0) / 2.0"]
    assert str(nest).endswith("  S(i, j) = fmax(S(i, j) * 15.0, 0) / 2.0")
    large = product("S(i,j) - 999999999999999999 * 999999999999999999")
    assert str(large.pointwise[0]) == "S(i, j) - 1e+36"
    two = lower(
        parse("def f(float(N) A) -> (O) { O(i) +=! A(i) \n O(i) = O(i) + O(i) \n O(i) = exp(-O(i)) }"),
        {"N": 3}, {"A": (1,), "O": (1,)}, "float64",
    )  # fmt: skip
    np.testing.assert_allclose(interpret(two, {"A": np.arange(3.0)}), np.exp(-2 * np.arange(3.0)))


OWN = Ref("S", (Name("i"), Name("j")))


@pytest.mark.parametrize(
    ("expr", "message"),
    [
        (Number(1), r"1 is no function of S\(i, j\)"),
        (Binary("+", OWN, Ref("A", (Name("i"), Name("j")))), r"reads A\(i, j\), not S\(i, j\) alone"),
        (Binary("+", OWN, Ref("S", (Name("j"), Name("i")))), r"reads S\(j, i\), not"),
        (Binary("*", OWN, Name("N")), "has N, which is no number"),
        (Call("sin", (OWN,)), r"sin\(S\(i, j\)\) is no function of the notation"),
        (Call("exp", (OWN, OWN)), "is no function of the notation"),
    ],
)
def test_what_is_no_function_of_the_result_is_illegal(expr: Any, message: str) -> None:
    with pytest.raises(NestError, match=message):
        verify(replace(product("exp(S(i,j))"), pointwise=(expr,), _by_name={}))


@pytest.mark.parametrize("target", ["cpp", "triton"])
def test_a_sum_that_is_split_over_the_grid_has_no_function(target: str) -> None:
    problem = Problem("forward", Geometry(8, 8, 2, (2, 3, 4), (1, 1, 1)), activation="relu")
    nest = nest_of(problem)
    split = "n rest grid | g rest grid | c rest grid | f rest serial | t rest serial | h rest serial"
    digits = schedule(f"{split} | w rest serial | kt rest serial | kh rest serial | kw rest serial")
    assert apply(nest_of(replace(problem, activation="")), digits).partial_loops
    with pytest.raises(ScheduleError, match="a pointwise expression of a sum that is split over the grid"):
        apply(nest, digits)
    space, rng = Space(nest, target, 64), random.Random(0)
    drawn = [space.any(rng) for _ in range(20)] + space.ranked(6, rng)
    assert space.cost(digits) == math.inf
    assert not any(apply(nest, candidate).partial_loops for candidate in drawn)


def test_golden_sources(golden: Golden) -> None:
    golden(
        "cpp_pointwise.cpp.txt", show(product("S(i,j) / (1 + exp(-S(i,j)))"), schedule(CPP.format(16)), "cpp")
    )
    golden("triton_pointwise.py.txt", show(product("tanh(fmax(S(i,j), 0))"), schedule(TRITON), "triton"))


def test_sources_without_a_function_hold_nothing_of_it() -> None:
    problem = Problem("forward", Geometry(2, 2, 2, (2, 3, 4), (1, 1, 1)))
    for target in ("cpp", "triton"):
        plain = show(nest_of(problem), serial(nest_of(problem)), target)
        assert "pointwise" not in plain and not re.search(r"\bexp", plain) and "maximum" not in plain
    relu = nest_of(replace(problem, activation="relu"))
    assert "exp_v" not in show(relu, serial(relu), "cpp")
