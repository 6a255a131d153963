"""The notation: what parses, what it parses to, how it prints back, and what every mistake says."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g3dswap.errors import NotationError
from g3dswap.tc.check import MAX_DEPTH
from g3dswap.tc.parser import parse
from g3dswap.tc.syntax import (
    DTYPES,
    FUNCTIONS,
    OPERATORS,
    Binary,
    Call,
    Comprehension,
    Expr,
    Name,
    Neg,
    Number,
    Param,
    Pos,
    Ref,
    Statement,
    Where,
    walk,
)
from tests.profiles import examples

CONV3D = """
# grouped
def conv3d_forward(float(N,G,C,T,H,W) I, float(G,F,C,KT,KH,KW) K, float(G,F) B) -> (O) {
  O(n,g,f,t,h,w) +=! I(n,g,c,t*ST+kt*DT-PT,h*SH+kh*DH-PH,w*SW+kw*DW-PW) * K(g,f,c,kt,kh,kw)
    where t in 0:TO, h in 0:HO, w in 0:WO  # the bias follows
  O(n,g,f,t,h,w) = O(n,g,f,t,h,w) + B(g,f)
}
"""


def value(text: str) -> Expr:
    """The expression alone, over tensors A (rank 2), B (rank 1), S (rank 0)."""
    [statement] = parse(f"def f(float(N,C) A, float(C) B, float S) -> (O) {{ O(n) +=! {text} }}").statements
    return statement.value


def test_conv3d() -> None:
    comp = parse(CONV3D)
    assert comp.name == "conv3d_forward"
    assert [str(param) for param in comp.params] == [
        "float(N,G,C,T,H,W) I",
        "float(G,F,C,KT,KH,KW) K",
        "float(G,F) B",
    ]
    assert comp.outputs == ("O",)
    product, bias = comp.statements
    assert (product.op, bias.op) == ("+=!", "=")
    assert [ref.tensor for ref in product.reads()] == ["I", "K"]
    assert product.where == tuple(
        Where(i, Number(0), Name(hi)) for i, hi in (("t", "TO"), ("h", "HO"), ("w", "WO"))
    )
    assert str(product.reads()[0].indices[3]) == "t * ST + kt * DT - PT"
    assert comp.indices(product) == ("n", "g", "f", "t", "h", "w", "c", "kt", "kh", "kw")
    assert comp.indices(bias) == ("n", "g", "f", "t", "h", "w")
    sizes = "N G C T H W F KT KH KW ST DT PT SH DH PH SW DW PW TO HO WO"
    assert comp.sizes() == tuple(sizes.split())


def test_prints_as_notation() -> None:
    assert str(parse(CONV3D)) == (
        "def conv3d_forward(float(N,G,C,T,H,W) I, float(G,F,C,KT,KH,KW) K, float(G,F) B) -> (O) {\n"
        "  O(n, g, f, t, h, w) +=! I(n, g, c, t*ST+kt*DT-PT, h*SH+kh*DH-PH, w*SW+kw*DW-PW)"
        " * K(g, f, c, kt, kh, kw) where t in 0:TO, h in 0:HO, w in 0:WO\n"
        "  O(n, g, f, t, h, w) = O(n, g, f, t, h, w) + B(g, f)\n"
        "}"
    )


def test_white_space_and_comments_do_not_matter() -> None:
    tight = "def f(float(N,C)A)->(O,P){O(n)+=!A(n,c)P(n)=O(n)*2}"
    loose = """def  f ( float ( N , C ) A ) -> ( O , P )  # where { def
    {\r\n\tO ( n )
    +=! A ( n
    , c )   P ( n ) = O ( n )
    * 2 } # end"""
    assert parse(tight) == parse(loose)


def test_several_outputs_may_be_written_in_turn() -> None:
    comp = parse("def f(float(N) A) -> (O, P) { O(i) = A(i) P() +=! A(i) O(i) = O(i) / P() P() += A(i) }")
    assert comp.outputs == ("O", "P")
    assert [(s.target.tensor, s.op) for s in comp.statements] == [
        ("O", "="),
        ("P", "+=!"),
        ("O", "="),
        ("P", "+="),
    ]


def test_names_of_dimensions_are_sizes_in_any_case() -> None:
    comp = parse("def f(float(n,4) A, float x) -> (O) { O(i) +=! A(i,j) * n * Scale + x() }")
    assert comp.params == (Param("float", ("n", 4), "A"), Param("float", (), "x"))
    assert comp.sizes() == ("n", "Scale")
    assert comp.indices(comp.statements[0]) == ("i", "j")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("007", 7),
        ("1.5", 1.5),
        ("1.", 1.0),
        (".5", 0.5),
        ("1e-5", 1e-5),
        ("2.5E+3", 2500.0),
        ("0" * 5000, 0),
    ],
)
def test_numbers(text: str, number: float) -> None:
    found = value(text)
    assert isinstance(found, Number)
    assert found.value == number
    assert type(found.value) is type(number)


def test_precedence_and_association() -> None:
    a, b, c = Name("X"), Name("Y"), Name("Z")
    assert value("X - Y - Z") == Binary("-", Binary("-", a, b), c)
    assert value("X - (Y - Z)") == Binary("-", a, Binary("-", b, c))
    assert value("X + Y * Z") == Binary("+", a, Binary("*", b, c))
    assert value("(X + Y) * Z") == Binary("*", Binary("+", a, b), c)
    assert value("X / Y * Z") == Binary("*", Binary("/", a, b), c)
    assert value("-X * Y") == Binary("*", Neg(a), b)
    assert value("-(X * Y)") == Neg(Binary("*", a, b))
    assert value("X - -Y") == Binary("-", a, Neg(Neg(b)).operand)
    assert value("fmax(X, exp(Y))") == Call("fmax", (a, Call("exp", (b,))))
    assert value("S() + B(c)") == Binary("+", Ref("S", ()), Ref("B", (Name("c"),)))


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("((X))", "X"),
        ("(X * Y) + Z", "X * Y + Z"),
        ("(X + Y) + Z", "X + Y + Z"),
        ("X + (Y + Z)", "X + (Y + Z)"),
        ("X / (Y / Z)", "X / (Y / Z)"),
        ("(-X) * -(-Y)", "-X * --Y"),
        ("-(X + Y)", "-(X + Y)"),
        ("fmin((X), (Y - Z))", "fmin(X, Y - Z)"),
        ("A((n + P - k*D)/ST, -(c))", "A((n+P-k*D)/ST, -c)"),
    ],
)
def test_prints_only_the_parentheses_that_it_needs(text: str, printed: str) -> None:
    assert str(value(text)) == printed


def test_positions() -> None:
    comp = parse("# one\n\ndef f(float(N) A) -> (O) {\n\tO(i) = 2 *\n  A(i-1) where i in 1:N\n}")
    [statement] = comp.statements
    assert comp.pos == Pos(3, 1)
    assert comp.params[0].pos == Pos(3, 16)
    assert statement.pos == statement.target.pos == Pos(4, 2)
    assert isinstance(statement.value, Binary)
    assert statement.value.pos == Pos(4, 9)
    [read] = statement.reads()
    assert read.pos == Pos(5, 3)
    assert [node.pos for node in walk(read.indices[0])] == [Pos(5, 5), Pos(5, 5), Pos(5, 7)]
    assert statement.where[0].pos == Pos(5, 16)


def test_positions_do_not_count_in_comparisons() -> None:
    assert Name("i", pos=Pos(1, 2)) == Name("i", pos=Pos(3, 4))
    assert hash(Name("i", pos=Pos(1, 2))) == hash(Name("i"))
    assert not [f.name for f in fields(Statement) if f.name != "pos" and not f.compare]


HEAD = "def f(float(N,C) A, float(C) B) -> (O) {\n"

MISTAKES = [
    ("def ¦(float(N) A) -> (O) {}", "expected the comprehension's name after 'def', found '('"),
    (
        "def f(¦flaot(N) A) -> (O) {}",
        "expected a parameter's element type, as in 'float(N,C) I' (did you mean 'float'?), found 'flaot'",
    ),
    ("def f(float(N) A ¦float(N) B) -> (O) {}", "expected ',' or ')' after a parameter, found 'float'"),
    ("def f(float(¦2.5) A) -> (O) {}", "expected a dimension (a size's name or a whole number), found '2.5'"),
    (
        "def f(float(N) ¦where) -> (O) {}",
        "expected the parameter's name after 'float', found the reserved word 'where'",
    ),
    ("def f(float(N) A) ¦(O) {}", "expected '->' between the parameters and the outputs, found '('"),
    ("def f(float(N) A) -> (¦) {}", "expected an output's name, found ')'"),
    (
        "def f(float(N) A, float(N) ¦A) -> (O) {}",
        "parameter 'A' has the name of another tensor; rename one of them",
    ),
    ("def f(float(N) A) -> (O, ¦A) {}", "output 'A' has the name of another tensor; rename one of them"),
    ("def f(float(N) ¦N) -> (O) {}", "parameter 'N' has the name of a size; rename one of them"),
    (
        "def f(float(N) A) -> (O, ¦P) { O(i) = A(i) }",
        "no statement writes the output 'P'; add one or drop the output",
    ),
    (
        "O(n) +=! A(n,c)\n} ¦}",
        "expected the end of the text after '}' (one text holds one comprehension), found '}'",
    ),
    ("O(n) = A(n,c¦", "expected ',' or ')' after a subscript, found the end of the text"),
    ("O(n) ¦A(n,0)", "expected '=', '+=' or '+=!' after the target O(...), found 'A'"),
    ("O(n) =¦! A(n,0)", "unexpected character '!'; to set to zero and then add, write '+=!'"),
    ("O¦[n] = A(n,0)", "unexpected character '['; subscripts are written in round brackets, as in I(n,c)"),
    ("O(n) = A(n,0)¦;", "unexpected character ';'; statements need no separator"),
    (
        "O(n) +=! A(n,c) ¦@ B(c)",
        "unexpected character '@'; names and numbers are made of ASCII letters, digits and '_'",
    ),
    (
        "O(n) +=! A(n,c) ¦B(c)",
        "'B' is a parameter and cannot be written; "
        "a statement begins with an output, and an expression goes on with an operator",
    ),
    ("O(n) +=! A(n,c) * \n¦}", "expected an expression, found '}'"),
    ("¦Q(n) +=! A(n,c)", "'Q' is not an output; a statement begins with an output"),
    ("O(n) +=! ¦a(n,c)", "'a' is neither a parameter, an output nor a function (did you mean 'A'?)"),
    ("O(n) +=! ¦A(n)", "'A' has 2 dimensions (it is declared float(N,C) A), not 1"),
    ("O(n) +=! A(n,c) ¦O(n,c) = A(n,c)", "'O' has 1 dimension (as its first statement wrote it), not 2"),
    ("O(¦n+1) +=! A(n,c)", "'n + 1' is not a plain index; a target's subscripts are names, as in O(n,c)"),
    (
        "O(¦N) +=! A(N,c)",
        "'N' is a size (a parameter's dimension) and cannot be an index; use another, lower-case name",
    ),
    (
        "O(¦To) +=! A(To,c)",
        "'To' is a size (it begins with a capital letter) and cannot be an index; "
        "use another, lower-case name",
    ),
    ("O(¦A) +=! A(0,c)", "'A' is a tensor and cannot be an index; rename the index"),
    ("O(n,¦n) +=! A(n,c)", "index 'n' is twice in the target; give each dimension its own"),
    (
        "\tO(n)\t=\tA(n,¦c)",
        "index 'c' is not in the target O(n), and '=' does not sum; "
        "write '+=!' or add the index to the target",
    ),
    ("¦O(n) += A(n,c)", "'+=' adds to 'O', which has no value yet; write '+=!' to begin at 0"),
    ("O(n) = ¦O(n) + 1", "output 'O' is read before a statement has written it"),
    (
        "O(n) +=! A(n,c) O(n) = ¦O(n-1)",
        "a statement may read its own target only with '=' and at the element that it writes, O(n); "
        "go through another output",
    ),
    ("O(n) +=! A(n,c) where c in 0:C ¦n in 0:N", "expected ',' between the where clauses, found 'n'"),
    ("O(n) +=! A(n,c) where c ¦= 0:C", "expected 'in' after the index 'c' of a where clause, found '='"),
    (
        "O(n) +=! A(n,c) where c in 0¦,C",
        "expected ':' between the bounds of 'c' (half open, as in 0:T), found ','",
    ),
    ("O(n) +=! A(n,kc) where ¦k in 0:C", "index 'k' is not in the statement (did you mean 'kc'?)"),
    ("O(n) +=! A(n,c) where c in 0:C, ¦c in 0:C", "index 'c' has two where clauses; keep one"),
    ("O(n) +=! A(n,c) where c in 0:¦n", "'n' is an index; a bound is made of sizes and whole numbers"),
    (
        "O(n) +=! A(n,c) where c in 0:¦1.5",
        "1.5 is not a whole number; a bound is made of sizes and whole numbers",
    ),
    ("O(n) +=! A(n,¦B(c))", "'B(c)' is a value; a subscript is made of indices, sizes and whole numbers"),
    ("O(n) +=! A(n,¦B)", "'B' is a tensor; a subscript is made of indices, sizes and whole numbers"),
    ("O(n) +=! A(n,c) * ¦B", "'B' is a tensor; give its subscripts, as in B(...)"),
    ("O(n) +=! ¦C(c)", "'C' is a size, not a tensor; an operator may be missing behind it"),
    ("O(n) +=! ¦fmax(A(n,c))", "'fmax' takes 2 arguments, not 1"),
    ("O(n) +=! exp ¦* A(n,c)", "expected '(' and the arguments after the function 'exp', found '*'"),
    ("O(n) +=! A(n,¦2c)", "the number 2 runs into 'c'; separate them"),
    ("O(n) +=! ¦9999999999999999999", "this whole number has more than 18 digits; write a float"),
    ("O(n) +=! ¦1e999", "the number 1e999 is beyond the range of a double"),
]


def marked(text: str) -> tuple[str, Pos]:
    """A text without its mark, and where the mark stood.

    Statements alone get a head; and an end, unless they bring one or the mark is the end.
    """
    if not text.startswith("def"):
        text = HEAD + text + ("" if text.endswith(("¦", "}")) else "\n}")
    before, after = text.split("¦")
    return before + after, Pos(before.count("\n") + 1, len(before) - before.rfind("\n"))


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_mistakes(text: str, message: str) -> None:
    source, pos = marked(text)
    with pytest.raises(NotationError) as caught:
        parse(source)
    line = source.split("\n")[pos.line - 1].replace("\t", " ")
    assert str(caught.value).split("\n") == [
        f"line {pos.line}, column {pos.column}: {message}",
        f"  {line}",
        f"  {' ' * (pos.column - 1)}^",
    ]


@pytest.mark.parametrize("text", ["", " \n\t", "# def f() -> (O) { }"])
def test_nothing_is_no_comprehension(text: str) -> None:
    with pytest.raises(
        NotationError, match=r"^line 1, column 1: expected 'def' .*, found the end of the text"
    ):
        parse(text)


def test_mistake_in_a_long_line_shows_its_part() -> None:
    terms = " + ".join(f"A(n,{i})" for i in range(30))
    with pytest.raises(NotationError) as caught:
        parse(f"{HEAD}O(n) = {terms} + $ + {terms}\n}}")
    _, shown, pointer = str(caught.value).split("\n")
    assert len(shown) < 120
    assert shown[pointer.index("^")] == "$"


def nested(depth: int, kind: str) -> str:
    match kind:
        case "parentheses":
            return "(" * depth + "1" + ")" * depth
        case "minus":
            return "-" * depth + "1"
        case "calls":
            return "exp(" * depth + "1" + ")" * depth
        case "subscripts":
            return f"A(0, {'-' * depth}1)"
        case "subscripts of subscripts":
            return "B(" * depth + "c" + ")" * depth
    return " + ".join(["1"] * depth)


KINDS = ["parentheses", "minus", "calls", "subscripts", "subscripts of subscripts", "sum"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 20_000])
def test_deep_expressions_are_refused(kind: str, depth: int) -> None:
    with pytest.raises(NotationError, match=f"nests more than {MAX_DEPTH} deep; split it"):
        value(nested(depth, kind))


@pytest.mark.parametrize("kind", ["parentheses", "minus", "calls", "sum"])
def test_expressions_below_the_bound_are_not(kind: str) -> None:
    expr = value(nested(MAX_DEPTH - 1, kind))
    assert value(str(expr)) == expr


def test_deep_target_without_an_operator_is_refused() -> None:
    with pytest.raises(NotationError, match="after the target O"):
        parse(f"{HEAD}O({'+'.join(['n'] * 20_000)}) A(n,c)\n}}")


# Random trees.  Each is right by construction: drawn over the tensors and indices that a statement may use.

SIZES = ("N", "C", "K2", "m")  # m is one because it is a dimension
INDICES = ("i", "j", "k", "_x", "iW")
FREE_SIZES = ("ST", "P")
whole_numbers = st.integers(0, 10**18 - 1).map(Number)
floats = (
    st.floats(min_value=0, allow_nan=False, allow_infinity=False)
    .filter(lambda x: math.copysign(1, x) > 0)
    .map(Number)
)


def expression(draw: st.DrawFn, leaf: st.SearchStrategy[Expr], depth: int, *, calls: bool) -> Expr:
    """A random tree; drawn by hand because ``st.recursive`` takes ten times as long."""
    kind = draw(st.integers(0, 6 if calls else 5)) if depth else 0
    if kind < 3:
        return draw(leaf)
    if kind == 3:
        return Neg(expression(draw, leaf, depth - 1, calls=calls))
    if kind == 6:
        function = draw(st.sampled_from(sorted(FUNCTIONS)))
        args = [expression(draw, leaf, depth - 1, calls=calls) for _ in range(FUNCTIONS[function])]
        return Call(function, tuple(args))
    left = expression(draw, leaf, depth - 1, calls=calls)
    return Binary(draw(st.sampled_from("+-*/")), left, expression(draw, leaf, depth - 1, calls=calls))


@st.composite
def expressions(draw: st.DrawFn, leaf: st.SearchStrategy[Expr], depth: int, *, calls: bool = False) -> Expr:
    return expression(draw, leaf, depth, calls=calls)


@st.composite
def comprehensions(draw: st.DrawFn) -> Comprehension:
    ranks = {}
    params = []
    for name in draw(st.lists(st.sampled_from(("A", "B", "x", "dO")), unique=True)):
        dims = draw(st.lists(st.sampled_from(SIZES) | st.integers(0, 10**18 - 1), max_size=3))
        params.append(Param(draw(st.sampled_from(DTYPES)), tuple(dims), name))
        ranks[name] = len(dims)
    sizes = [*FREE_SIZES, *{dim for param in params for dim in param.dims if isinstance(dim, str)}]
    outputs = draw(st.lists(st.sampled_from(("O", "out", "dI")), min_size=1, unique=True))
    order = outputs + draw(st.lists(st.sampled_from(outputs), max_size=2))
    statements = []
    for output in order:
        statements.append(draw(statement_of(output, ranks, sizes)))
        ranks[output] = len(statements[-1].target.indices)
    return Comprehension("name_1", tuple(params), tuple(outputs), tuple(statements))


@st.composite
def statement_of(draw: st.DrawFn, output: str, ranks: dict[str, int], sizes: list[str]) -> Statement:
    rank = ranks.get(output, draw(st.integers(0, 3)))
    target = Ref(output, tuple(map(Name, draw(st.permutations(INDICES))[:rank])))
    op = draw(st.sampled_from([op for op in OPERATORS if op != "+=" or output in ranks]))
    own = tuple(index for index in INDICES if op != "=" or Name(index) in target.indices)
    names = st.sampled_from((*own, *sizes)).map(Name)
    subscript = expressions(names | whole_numbers, 3)
    leaves: list[st.SearchStrategy[Expr]] = [names, whole_numbers, floats]
    for tensor, dims in ranks.items():
        if tensor != output:
            leaves.append(st.builds(Ref, st.just(tensor), st.tuples(*[subscript] * dims)))
        elif op == "=":
            leaves.append(st.just(target))
    value = draw(expressions(st.one_of(leaves), 4, calls=True))
    bound = expressions(st.sampled_from(sizes).map(Name) | whole_numbers, 2)
    used = [name for name in Statement(target, op, value).names() if name in INDICES]
    guarded = draw(st.lists(st.sampled_from(used), unique=True)) if used else []
    return Statement(target, op, value, tuple(Where(index, draw(bound), draw(bound)) for index in guarded))


@settings(max_examples=examples(200))
@given(comprehensions())
def test_round_trip(comp: Comprehension) -> None:
    printed = str(comp)
    again = parse(printed)
    assert again == comp
    assert str(again) == printed
    # 1 == 1.0, so the comparison above would not see an integer become a float.
    kinds = [
        [type(n.value) for s in c.statements for n in walk(s.value) if isinstance(n, Number)]
        for c in (comp, again)
    ]
    assert kinds[0] == kinds[1]
    # Every node of a parsed text knows its place.
    for statement in again.statements:
        assert all(node.pos.line >= 2 for expr in (statement.target, statement.value) for node in walk(expr))


def test_walk_goes_down_and_left_to_right() -> None:
    found = [str(node) for node in walk(value("-A(n, c+1) * fmax(B(c), 2)"))]
    assert found == [
        *("-A(n, c+1) * fmax(B(c), 2)", "-A(n, c+1)", "A(n, c+1)", "n", "c + 1", "c", "1"),
        *("fmax(B(c), 2)", "B(c)", "c", "2"),
    ]


def only_notation_errors(text: str) -> None:
    try:
        comp = parse(text)
    except NotationError as error:
        lines = str(error).split("\n")
        assert len(lines) == 3
        assert lines[2].strip() == "^"
    else:
        assert parse(str(comp)) == comp


@settings(max_examples=examples(200))
@given(st.text())
def test_any_text(text: str) -> None:
    only_notation_errors(text)


@settings(max_examples=examples(200))
@given(st.text(), st.text())
def test_any_text_inside_a_comprehension(before: str, after: str) -> None:
    only_notation_errors(f"def f(float(N) A) -> (O) {{ {before} O(i) = A(i {after}) }}")


SYMBOLS = [
    "(",
    ")",
    "{",
    "}",
    "->",
    ",",
    ":",
    "=",
    "+=",
    "+=!",
    "+",
    "-",
    "*",
    "/",
    "#",
    "\n",
    "\t",
    "!",
    "é",
]
WORDS = [
    "def",
    "f",
    "where",
    "in",
    "float",
    "half",
    "A",
    "B",
    "O",
    "N",
    "C",
    "i",
    "j",
    "exp",
    "fmax",
    "0",
    "2.5",
    "1e9",
]
words = st.sampled_from(SYMBOLS + WORDS)


@settings(max_examples=examples(200))
@given(st.lists(words, max_size=60))
def test_any_words(found: list[str]) -> None:
    only_notation_errors(" ".join(found))


@settings(max_examples=examples(200))
@given(st.data())
def test_any_change_of_a_good_text(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(CONV3D)))
    end = data.draw(st.integers(start, min(len(CONV3D), start + 12)))
    only_notation_errors(CONV3D[:start] + data.draw(words | st.just("") | st.text(max_size=3)) + CONV3D[end:])


@settings(max_examples=examples(200))
@given(
    st.integers(1, 400),
    st.sampled_from(["(", "-", "exp(", "A(", "A(0,", "1+", "fmax(1,", "{", "O(i)=", "where "]),
)
def test_any_repetition(times: int, piece: str) -> None:
    only_notation_errors(f"{HEAD}O(n) = {piece * times}")


def test_the_parser_leaves_room_on_the_stack() -> None:
    """The deepest text allowed parses from a caller that is itself deep."""
    text = f"{HEAD}O(n) = {nested(MAX_DEPTH - 1, 'calls')}\n}}"

    def deep(left: int) -> Comprehension:
        return deep(left - 1) if left else parse(text)

    spare = 450
    assert deep(spare - len(inspect.stack(0)))
