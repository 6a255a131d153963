"""Affine subscripts and index ranges, against enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g3dswap.errors import NotationError, RangeError
from g3dswap.tc.parser import parse
from g3dswap.tc.ranges import Affine, Bound, Range, affine, bind, infer
from g3dswap.tc.syntax import Binary, Call, Expr, Name, Neg, Number, Ref, Statement, names
from tests.profiles import examples

INDICES = ("t", "k", "n", "c", "h", "w")


def subscript(text: str) -> Expr:
    [statement] = parse(f"def f(float(X) A) -> (O) {{ O() +=! A({text}) }}").statements
    return statement.reads()[0].indices[0]


def statement(text: str, params: str = "float(X) A, float(Y) B, float(X,Y) M") -> Statement:
    return parse(f"def f({params}) -> (O) {{ {text} }}").statements[0]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("7", Affine({}, 7, 1)),
        ("t", Affine({"t": 1}, 0, 1)),
        ("S", Affine({}, 2, 1)),
        ("-t + P", Affine({"t": -1}, 1, 1)),
        ("t*S + k*D - P", Affine({"t": 2, "k": 3}, -1, 1)),
        ("S*(t + D*(k - P)) + S*D", Affine({"t": 2, "k": 6}, 0, 1)),
        ("(t + P - k*D)/S", Affine({"t": 1, "k": -3}, 1, 2)),
        ("(t + P - k*D)/-S", Affine({"t": -1, "k": 3}, -1, 2)),
        ("(t + P - k*D)/P", Affine({"t": 1, "k": -3}, 1, 1)),
        ("t/S + k", Affine({"t": 1, "k": 2}, 0, 2)),
        ("(t/S + k)/D", Affine({"t": 1, "k": 2}, 0, 6)),
        ("t/S - k/D", Affine({"t": 3, "k": -2}, 0, 6)),
        ("D*(t/S)", Affine({"t": 3}, 0, 2)),
        ("(S*t + 4)/S", Affine({"t": 1}, 2, 1)),
        ("(4*t + 6)/8", Affine({"t": 2}, 3, 4)),
        ("t - t + 5", Affine({}, 5, 1)),
        ("t*Z + k", Affine({"k": 1}, 0, 1)),
        ("(t - t + S)*k", Affine({"k": 2}, 0, 1)),
        ("(S + D + P)/S", Affine({}, 3, 1)),
    ],
)
def test_affine(text: str, wanted: Affine) -> None:
    assert affine(subscript(text), {"S": 2, "D": 3, "P": 1, "Z": 0}, ("t", "k")) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "t*(k + 1)",
            "'t * (k + 1)' multiplies 't' by 'k', and a subscript is affine; "
            "multiply indices by sizes and integers only",
        ),
        ("1 + t*t", "'t * t' multiplies 't' by 't', and a subscript is affine; "),
        ("S/t", "'S / t' divides by 't'; divide by sizes and integers only"),
        ("t/(S - 2)", "'t / (S - 2)' divides by zero; bind the divisor to another value"),
        ("t + D/S", "'D / S' is 3/2, not a whole number; bind sizes that divide"),
        (
            "(t/S)*4",
            "'t / S * 4' multiplies a quotient by 4, which has a divisor in common with 2; "
            "divide after the multiplication",
        ),
        (
            "t/S + k/S",
            "'t / S + k / S' adds two quotients that no single division equals; divide once, after adding",
        ),
        ("t + Q", "size 'Q' is not bound; give its value in sizes"),
    ],
)
def test_what_is_not_affine(text: str, message: str) -> None:
    with pytest.raises(RangeError) as caught:
        affine(subscript(text), {"S": 2, "D": 3}, ("t", "k"))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("expr", [Number(1.5), Ref("A", ()), Call("exp", (Number(1),))])
def test_values_are_no_subscripts(expr: Expr) -> None:
    with pytest.raises(
        RangeError, match="is not a whole number; subscripts are made of indices, sizes and integers"
    ):
        affine(expr, {}, ())


# A subscript has a value only where each of its divisions is exact.


def evaluate(expr: Expr, env: Mapping[str, int]) -> int | None:
    match expr:
        case Number(value=int(value)):
            return value
        case Name(name=name):
            return env[name]
        case Neg(operand=operand):
            value_or_none = evaluate(operand, env)
            return None if value_or_none is None else -value_or_none
        case Binary(op=op, left=left, right=right):
            a, b = evaluate(left, env), evaluate(right, env)
            if a is None or b is None:
                return None
            if op == "/":
                return a // b if a % b == 0 else None
            return {"+": a + b, "-": a - b, "*": a * b}[op]
    raise AssertionError(expr)


SIZES = {"S": 2, "D": 3, "P": 1, "Z": 0, "M": -2}
leaves = st.one_of(
    st.sampled_from(("t", "k")).map(Name),
    st.sampled_from(sorted(SIZES)).map(Name),
    st.integers(0, 5).map(Number),
)


@st.composite
def subscripts(draw: st.DrawFn, depth: int = 4) -> Expr:
    kind = draw(st.integers(0, 7)) if depth else 0
    if kind < 2:
        return draw(leaves)
    inner = subscripts(depth - 1)
    if kind == 2:
        return Neg(draw(inner))
    return Binary(draw(st.sampled_from("++-*//")), draw(inner), draw(inner))


@settings(max_examples=examples(400))
@given(subscripts())
def test_affine_has_the_values_of_its_expression(expr: Expr) -> None:
    try:
        terms, offset, divisor = affine(expr, SIZES, ("t", "k"))
    except RangeError:
        return
    assert divisor > 0
    assert all(terms.values())
    assert math.gcd(divisor, offset, *terms.values()) == 1
    for t, k in itertools.product(range(-7, 8), repeat=2):
        env = {"t": t, "k": k}
        top = sum(factor * env[index] for index, factor in terms.items()) + offset
        try:
            wanted = evaluate(expr, SIZES | env)
        except ZeroDivisionError:
            pytest.fail(f"{expr} divides by zero")
        assert (top // divisor if top % divisor == 0 else None) == wanted


@settings(max_examples=examples(200))
@given(st.integers(1, 4), st.integers(0, 4), st.integers(1, 4))
def test_the_subscripts_of_convolutions_are_affine(stride: int, padding: int, dilation: int) -> None:
    sizes = {"ST": stride, "PT": padding, "DT": dilation}
    forward = affine(subscript("t*ST + kt*DT - PT"), sizes, ("t", "kt"))
    assert forward == ({"t": stride, "kt": dilation}, -padding, 1)
    back = affine(subscript("(t + PT - kt*DT)/ST"), sizes, ("t", "kt"))
    assert back == ({"t": 1, "kt": -dilation}, padding, stride)


# Ranges.

SHAPES = {"A": (7,), "B": (3,), "M": (7, 3)}
BOUND = {"X": 7, "Y": 3, "S": 2, "P": 1, "Z": 0}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("O(i) = A(i)", {"i": (0, 7)}),
        ("O(i) = A(i) where i in 2:X-P", {"i": (2, 6)}),
        ("O(i) = A(i-20) where i in 0:40", {"i": (0, 40)}),
        ("O(i) +=! M(i,c)", {"i": (0, 7), "c": (0, 3)}),
        ("O(t) +=! A(t+k) * B(k)", {"t": (0, 5), "k": (0, 3)}),
        ("O(t) +=! B(k) * A(t*S+k)", {"t": (0, 3), "k": (0, 3)}),
        ("O(t) +=! B(k) * A(k-t+P)", {"t": (0, 2), "k": (0, 3)}),
        ("O() +=! B(k) * A(t+k-P)", {"k": (0, 3), "t": (1, 6)}),
        ("O() +=! A(k-2)", {"k": (2, 9)}),
        ("O(k) +=! A(k+2)", {"k": (0, 5)}),
        ("O() +=! A(5-2*k)", {"k": (0, 3)}),
        ("O() +=! A(k/2)", {"k": (0, 13)}),
        ("O(t) +=! B(k) * A((t+P-k)/S)", {"t": (1, 12), "k": (0, 3)}),
        ("O() +=! A(k+1) * B(k-1)", {"k": (1, 4)}),
        ("O(i) = i * 2 where i in 0:S*X", {"i": (0, 14)}),
        ("O(i) = A(i) where i in 3:3", {"i": (3, 3)}),
        ("O() = A(X)", {}),
        # Whole subscripts decide, and the read of A may leave it.
        ("O(t) +=! A(t+3*k) * B(t) * B(k)", {"t": (0, 3), "k": (0, 3)}),
        # Two rounds: k and j are known from the first, t and u from what they leave.
        ("O(u) +=! A(t+k) * B(k) * M(u+t,j)", {"u": (0, 3), "t": (0, 5), "k": (0, 3), "j": (0, 3)}),
    ],
)
def test_ranges(text: str, wanted: dict[str, Range]) -> None:
    found = infer(statement(text), SHAPES, BOUND)
    assert found == wanted
    assert list(found) == list(wanted)


def test_the_given_shape_of_a_target_counts() -> None:
    up = statement("O(t) +=! A((t+P-k)/S) * B(k)")
    assert infer(up, SHAPES | {"O": (14,)}, BOUND) == {"t": (0, 14), "k": (0, 3)}
    assert infer(statement("O(i) = 1"), {"O": (4,)}, BOUND) == {"i": (0, 4)}


def test_empty_tensors_have_empty_ranges() -> None:
    assert infer(statement("O(i) +=! M(i,c)"), {"M": (0, 3)}, BOUND) == {"i": (0, 0), "c": (0, 3)}
    assert infer(statement("O(t) +=! A(t+k) * B(k)"), {"A": (0,), "B": (3,)}, BOUND) == {
        "t": (0, 0),
        "k": (0, 3),
    }


MISTAKES = [
    (
        "O(i) +=! A(i) * M(i,c) * B(i)",
        "index 'i' ranges over 7 in A(i) and over 3 in B(i); make the sizes agree or add 'where i in lo:hi'",
    ),
    ("O(i) = i", "nothing bounds index 'i', no subscript depends on it; add 'where i in lo:hi'"),
    ("O(i) = A(Z*i)", "nothing bounds index 'i', no subscript depends on it; add 'where i in lo:hi'"),
    (
        "O(t) +=! A(t+k)",
        "the ranges of 't' and 'k' depend on one another in 't + k' in A(t+k); add 'where t in lo:hi'",
    ),
    (
        "O(t) +=! B(t+k) * A(k)",
        "no value of index 't' keeps 't + k' in B(t+k) inside its 3; "
        "enlarge the tensor or add 'where t in lo:hi'",
    ),
    (
        "O(t) +=! B(t+1) * A(t-5)",
        "no value of index 't' keeps 't + 1' in B(t+1) inside its 3 and 't - 5' in A(t-5) inside its 7; "
        "enlarge the tensor or add 'where t in lo:hi'",
    ),
    (
        "O(t) +=! A(2*t) * A(k-1) * A(t+k)",
        "the ranges of 't' and 'k' that other subscripts allow take 't + k' in A(t+k) outside its 7; "
        "add 'where t in lo:hi'",
    ),
    (
        "O(t) +=! A(t+k) * B(k) where k in 2:2",
        "index 'k' in 't + k' in A(t+k) has an empty range, which bounds nothing; "
        "give the other indices of the subscript where clauses",
    ),
    ("O(t) = A(t) where t in S:P", "the range of index 't', 't in S:P', is 2:1; give bounds in order"),
    ("O(t) = A(t) where t in 0:X/S", "'X / S' is 7/2, not a whole number; bind sizes that divide"),
    ("O(t) = A(t) where t in -P:X", "index 't' ranges over -1:7 and writes O(t) below 0; narrow its range"),
    ("O(t) = A(t*Q)", "size 'Q' in 'O(t) = A(t*Q)' is not bound; give its value in sizes"),
    (
        "O(t) +=! A(t*k)",
        "'t * k' multiplies 't' by 'k', and a subscript is affine; "
        "multiply indices by sizes and integers only",
    ),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=[text for text, _ in MISTAKES])
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(RangeError) as caught:
        infer(statement(text), SHAPES, BOUND)
    assert str(caught.value) == message


def test_mistakes_in_what_is_given() -> None:
    copy = statement("O(i) = A(i)")
    with pytest.raises(
        RangeError, match=r"the shape of 'A', read by 'O\(i\) = A\(i\)', is not known; give it in tensors"
    ):
        infer(copy, {}, {})
    with pytest.raises(
        RangeError, match=r"the shape given for A\(i\) is \(2, 3\); give one size a subscript"
    ):
        infer(copy, {"A": (2, 3)}, {})
    with pytest.raises(
        RangeError, match=r"index 'i' of 'O\(i\) = A\(i\)' is bound as a size; rename one of them"
    ):
        infer(copy, {"A": (2,)}, {"i": 3})
    with pytest.raises(
        RangeError, match=r"index 'i' ranges over 0:7 and writes O\(i\) outside 0:5; narrow its range"
    ):
        infer(statement("O(i) = A(i) where i in 0:X"), SHAPES | {"O": (5,)}, BOUND)


# The definition, by enumeration: of the values that keep every read inside for all values of the other
# indices, the longest run.


def inside(use: Expr, extent: int, env: Mapping[str, int]) -> bool:
    def fraction(expr: Expr) -> Fraction:
        match expr:
            case Number(value=value):
                return Fraction(value)
            case Name(name=name):
                return Fraction(env[name])
            case Neg(operand=operand):
                return -fraction(operand)
            case Binary(op=op, left=left, right=right):
                a, b = fraction(left), fraction(right)
                return a / b if op == "/" else {"+": a + b, "-": a - b, "*": a * b}[op]
        raise AssertionError(expr)

    return 0 <= fraction(use) <= extent - 1


def by_enumeration(
    found: Statement,
    shapes: Mapping[str, tuple[int, ...]],
    sizes: Mapping[str, int],
    known: Mapping[str, Range],
) -> list[int]:
    """The values of the index t, of a wide window, that keep every read with t inside."""
    reads = [
        (expr, extent)
        for ref in found.reads()
        for expr, extent in zip(ref.indices, shapes[ref.tensor])
        if "t" in names(expr)
    ]
    others = [
        dict(zip(known, values))
        for values in itertools.product(*(range(*limits) for limits in known.values()))
    ]
    target = names(found.target)
    return [
        t
        for t in range(0 if "t" in target else -80, 81)
        if all(inside(expr, extent, {**sizes, **env, "t": t}) for expr, extent in reads for env in others)
    ]


signed = st.integers(-3, 3)


@st.composite
def reads_of_t(draw: st.DrawFn) -> str:
    """A subscript with t, and perhaps with k and h, whose ranges are known: ``(a*t + b*k + c*h + d)/e``."""
    factor = draw(signed.filter(bool))
    text = f"{factor}*t".replace("1*t", draw(st.sampled_from(["1*t", "t*1", "S*t"])))
    for index in draw(st.lists(st.sampled_from(("k", "h")), unique=True)):
        text += f" + ({draw(signed)})*{index}"
    text += f" + ({draw(st.integers(-6, 6))})"
    return draw(st.sampled_from([text, f"({text})/2", f"({text})/D", f"-(({text})/3)"]))


@settings(max_examples=examples(400))
@given(
    st.lists(reads_of_t(), min_size=1, max_size=2),
    st.booleans(),
    st.lists(st.integers(1, 9), min_size=3, max_size=3),
    st.tuples(st.integers(-2, 2), st.integers(1, 3)),
)
def test_solved_ranges_are_the_largest(
    reads: list[str], written: bool, extents: list[int], guard: Range
) -> None:
    sizes = {"S": 2, "D": 4, "LO": guard[0], "HI": sum(guard)}
    shapes = {"A": (extents[0],), "C": (extents[1],), "K": (extents[2],)}
    value = " * ".join(f"{tensor}({read})" for tensor, read in zip("AC", reads))
    # k is known as a whole subscript, h by its clause.
    text = f"O({'t' if written else ''}) +=! {value} * K(k) * h where h in LO:HI"
    found = statement(text, "float(X) A, float(Y) C, float(Z) K")
    known = {"k": (0, extents[2]), "h": (guard[0], sum(guard))}
    wanted = by_enumeration(found, shapes, sizes, known)
    if not wanted:
        with pytest.raises(RangeError, match="no value of index 't' keeps"):
            infer(found, shapes, sizes)
        return
    assert wanted == list(range(wanted[0], wanted[-1] + 1))
    assert wanted[-1] < 80
    assert infer(found, shapes, sizes) == {**known, "t": (wanted[0], wanted[-1] + 1)}


SEVERAL = [
    "O(t) +=! A(t+k) * B(k) * M(u+t,k)",
    "O(t,u) +=! A(2*t+k) * A(u-1) * B(k)",
    "O(u) +=! A(t+k) * B(k) * M(u+2*t,j+1)",
    "O(t) +=! A(t+k) * B(u-1) * A(k+u)",
    "O(t) +=! A(t+u) * M(u,v-2) * A(t-v)",
    "O(t) +=! A(t/2) * A(u+t) * B(u)",
]


@settings(max_examples=examples(200))
@given(st.sampled_from(SEVERAL), st.tuples(st.integers(1, 12), st.integers(1, 4)))
def test_no_solved_index_reads_outside(text: str, extents: tuple[int, int]) -> None:
    """Whatever the rounds, a subscript with a solved index stays inside; else inference says no."""
    shapes = {"A": (extents[0],), "B": (extents[1],), "M": extents}
    found = statement(text)
    try:
        ranges = infer(found, shapes, BOUND)
    except RangeError:
        return
    whole = {e.name for ref in found.reads() for e in ref.indices if isinstance(e, Name)}
    for env in (
        dict(zip(ranges, values)) for values in itertools.product(*(range(*r) for r in ranges.values()))
    ):
        for ref in found.reads():
            for expr, extent in zip(ref.indices, shapes[ref.tensor]):
                if not set(names(expr)) <= whole:
                    assert inside(expr, extent, env), (expr, env)


# Whole comprehensions.

GRADIENTS = """
def conv(float(N,C,T) I, float(F,C,K) W, float(F) B) -> (O, dI) {
  O(n,f,t) +=! I(n,c,t*S+k*D-P) * W(f,c,k) where t in 0:TO
  O(n,f,t) = O(n,f,t) + B(f)
  dI(n,c,t) +=! O(n,f,(t+P-k*D)/S) * W(f,c,k) where t in 0:T
}
"""


def test_bind() -> None:
    sizes = {"N": 2, "C": 4, "T": 9, "F": 5, "K": 3, "S": 2, "D": 1, "P": 1, "TO": 5}
    bound = bind(parse(GRADIENTS), sizes)
    shapes = {"I": (2, 4, 9), "W": (5, 4, 3), "B": (5,), "O": (2, 5, 5), "dI": (2, 4, 9)}
    assert bound == Bound(
        shapes,
        (
            {"n": (0, 2), "f": (0, 5), "t": (0, 5), "c": (0, 4), "k": (0, 3)},
            {"n": (0, 2), "f": (0, 5), "t": (0, 5)},
            {"n": (0, 2), "c": (0, 4), "t": (0, 9), "f": (0, 5), "k": (0, 3)},
        ),
    )


def test_bind_takes_the_shapes_of_outputs() -> None:
    comp = parse("def up(float(X) A) -> (O) { O(t) +=! A(t/2) }")
    assert bind(comp, {"X": 3}).tensors["O"] == (5,)
    assert bind(comp, {"X": 3}, {"O": (6,)}).ranges == ({"t": (0, 6)},)


def test_bind_of_empty_batches() -> None:
    sizes = {"N": 0, "C": 4, "T": 9, "F": 5, "K": 3, "S": 2, "D": 1, "P": 1, "TO": 5}
    bound = bind(parse(GRADIENTS), sizes)
    assert bound.tensors["O"] == (0, 5, 5)
    assert bound.ranges[0]["n"] == (0, 0)


def test_mistakes_in_binding() -> None:
    copy = parse("def copy(float(N,4) A) -> (O) { O(i,j) = A(i,j) * S }")
    with pytest.raises(RangeError, match="sizes N, S of 'copy' are not bound; give their values"):
        bind(copy, {})
    with pytest.raises(
        RangeError, match=r"parameter 'float\(N,4\) A' has the shape \(-1, 4\); bind its dimensions to 0"
    ):
        bind(copy, {"N": -1, "S": 1})
    late = parse("def late(float(N) A) -> (O) { O(i) = A(i) where i in 1:N }")
    with pytest.raises(
        RangeError, match=r"index 'i' ranges over 1:4, so .* leaves a part of 'O' without a value"
    ):
        bind(late, {"N": 4})
    part = parse("def part(float(N) A) -> (O) { O(i) = A(i) where i in 0:N }")
    with pytest.raises(RangeError, match=r"leaves a part of 'O' without a value; write all of 0:9 first"):
        bind(part, {"N": 4}, {"O": (9,)})


@settings(max_examples=examples(200))
@given(st.text(alphabet="tk()+-*/ SPZ02", max_size=12))
def test_any_subscript_is_affine_or_refused(text: str) -> None:
    try:
        expr = subscript(text)
    except NotationError:
        return
    try:
        affine(expr, BOUND, INDICES)
    except RangeError:
        return
