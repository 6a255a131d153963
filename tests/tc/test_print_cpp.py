"""What the C++ printer prints, what it refuses, and how a kernel is compiled, loaded and called."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from g3dswap.comprehensions import nest
from g3dswap.errors import ArgumentError, CompileError, NoCompilerError, ScheduleError
from g3dswap.problem import Geometry, Problem
from g3dswap.tc import objects, recipe, runtime_cpp
from g3dswap.tc.kernel import build, show, versions
from g3dswap.tc.schedule import Schedule
from g3dswap.tc.space import Space
from tests.conftest import Golden
from tests.geometries import TOLERANCE, Case, error, expected, operands

GEOMETRY = Geometry(4, 4, 4, (4, 6, 18), (3, 3, 3), (1, 1, 1), (1, 1, 1))
OUTER = "n rest grid | g rest grid | {c} rest serial | t rest serial | h rest serial | w rest serial | "
INNER = "{f} rest serial | kt rest serial | kh rest serial | kw rest serial | kt 3 unroll | kw 3 unroll | "


def schedule(text: str, *fuse: tuple[str, ...], stage: tuple[tuple[str, int], ...] = ()) -> Schedule:
    return Schedule.from_json({"digits": text.split(" | "), "fuse": fuse, "stage": stage, "hints": {}})


WINDOW = schedule((OUTER + INNER).format(c="f", f="c") + "t 2 unroll | w 16 lanes", stage=(("I", 2),))


def test_golden_sources(golden: Golden) -> None:
    golden("cpp_forward.cpp.txt", show(nest(Problem("forward", GEOMETRY, bias=True)), WINDOW, "cpp"))
    strided = Geometry(2, 2, 2, (5, 6, 9), (3, 3, 3), (2, 2, 2), (1, 1, 1))
    phases = schedule(
        (OUTER + INNER).format(c="c", f="f").replace("| kt 3 unroll | kw 3 unroll ", "| kw 3 unroll ")
        + "w 8 lanes | t 2 unroll phase | h 2 unroll phase | w 2 unroll phase",
        stage=(("dO", 2), ("dI", 5)),
    )
    golden("cpp_grad_input.cpp.txt", show(nest(Problem("grad_input", strided)), phases, "cpp"))
    weight = schedule(
        "g rest grid | n rest grid | f rest serial | c rest serial | kt rest serial | kh rest serial | "
        "kw rest serial | t rest serial | h rest serial | w rest serial | "
        "kh 3 unroll | kw 3 unroll | h 2 unroll | w 16 lanes",
        stage=(("I", 2), ("dO", 8)),
    )
    golden(
        "cpp_grad_weight.cpp.txt", show(nest(Problem("grad_weight", GEOMETRY, torch.bfloat16)), weight, "cpp")
    )


def test_an_unrolled_window_loads_each_row_once() -> None:
    text = show(nest(Problem("forward", GEOMETRY)), WINDOW, "cpp")
    body = text[text.index("extern") :]
    # Two outputs along t and three taps along kt need four rows, each at three shifts along kw.
    assert body.count("= load(") == 4 * 3
    assert body.count("+= x") == 2 * 9


@pytest.mark.parametrize(
    ("digits", "message"),
    [
        ("t 4 lanes | w 16 lanes", "one axis of lanes and no matrix unit"),
        ("w 32 lanes", "32 lanes of float are no vector of up to 64 bytes"),
        ("w 3 lanes", "3 lanes of float are no vector"),
        ("h 4 lanes", "the lanes step by|leaves the tensor along the lanes"),
        ("t 16 unroll | h 16 unroll | w 16 unroll", "is too large"),
        ("w 16 lanes", "leaves the tensor along the lanes; stage I"),
    ],
)
def test_what_cpp_cannot_do_is_refused(digits: str, message: str) -> None:
    text = OUTER + "c rest serial | kt rest serial | kh rest serial | kw rest serial | "
    with pytest.raises(ScheduleError, match=message):
        show(nest(Problem("forward", GEOMETRY)), schedule(text.format(c="f") + digits), "cpp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_result_that_is_split_over_the_batch_is_added_up(dtype: torch.dtype, batch: int) -> None:
    problem = Problem("grad_weight", GEOMETRY, dtype)
    text = (
        "g rest grid | n rest grid | t rest grid | f rest serial | c rest serial | kt rest serial | "
        "kh rest serial | kw rest serial | h rest serial | w rest serial | w 8 lanes"
    )
    case = Case(problem, batch, 5)
    tensors, out = operands(case)
    build(nest(problem), schedule(text, stage=(("I", 3), ("dO", 3))), "cpp")(*tensors, out=out)
    assert error(out, expected(case, tensors)) <= TOLERANCE[dtype]


def test_long_sums_are_carried_over() -> None:
    problem = Problem("grad_weight", Geometry(1, 1, 1, (64, 128, 128), (1, 1, 1)))
    case = Case(problem, 1, 1)
    generator = torch.Generator().manual_seed(3)
    # All of one sign: a sum in a row of a million terms would lose three more digits.
    tensors = [torch.rand(1, 1, 64, 128, 128, generator=generator) for _ in range(2)]
    out = torch.empty(1, 1, 1, 1, 1)
    plain = schedule(
        "g rest serial | f rest serial | c rest serial | kt rest serial | kh rest serial | kw rest serial | "
        "n rest serial | t rest serial | h rest serial | w rest serial"
    )
    build(nest(problem), plain, "cpp")(*tensors, out=out)
    assert error(out, expected(case, tensors)) < 1e-6


def test_bfloat16_is_rounded_to_nearest_even_and_keeps_nan_and_infinity() -> None:
    problem = Problem("forward", Geometry(2, 2, 2, (1, 1, 8), (1, 1, 1)), torch.bfloat16)
    values = torch.tensor(
        [1.0, 1.00390625, 1.01171875, -0.0, 3e38, float("inf"), float("-inf"), float("nan")]
    )
    image = values.bfloat16().repeat(2).reshape(1, 2, 1, 1, 8)
    weight = torch.tensor([1.0, 1.0078125]).bfloat16().reshape(2, 1, 1, 1, 1)
    out = torch.empty_like(image)
    build(nest(problem), Space(nest(problem), "cpp").default(), "cpp")(image, weight, out=out)
    want = (image.double() * weight.double().reshape(1, 2, 1, 1, 1)).float().bfloat16()
    assert torch.equal(out.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))


def test_the_number_of_threads_does_not_change_the_result() -> None:
    problem = Problem("grad_weight", GEOMETRY)
    kernel = build(nest(problem), Space(nest(problem), "cpp").default(), "cpp")
    tensors, out = operands(Case(problem, 2, 9))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            kernel(*tensors, out=out)
            results.append(out.clone())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_kernel_takes_as_many_operands_as_its_notation() -> None:
    problem = Problem("forward", GEOMETRY)
    kernel = build(nest(problem), WINDOW, "cpp")
    with pytest.raises(ArgumentError, match="forward takes 2 operands, not 1"):
        kernel(torch.zeros(1), out=torch.zeros(1))


def test_a_second_build_is_a_load(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("forward", GEOMETRY)
    build(nest(problem), WINDOW, "cpp")
    monkeypatch.setattr(runtime_cpp, "_compile", lambda *_: pytest.fail("compiled again"))
    monkeypatch.setattr(runtime_cpp, "source", lambda *_: pytest.fail("printed again"))
    kernel = build(nest(problem), WINDOW, "cpp")
    assert 'extern "C"' in kernel.source


def test_what_other_code_printed_is_made_again(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("forward", GEOMETRY)
    build(nest(problem), WINDOW, "cpp")
    monkeypatch.setattr(recipe, "GENERATOR", "another")
    build(nest(problem), WINDOW, "cpp")
    assert len(list((fresh_cache / "objects").glob("*.so"))) == 2


def test_a_changed_object_is_not_loaded_but_compiled_again(fresh_cache: Path) -> None:
    problem = Problem("forward", Geometry(3, 3, 3, (2, 3, 5), (1, 1, 3)))
    default = Space(nest(problem), "cpp").default()
    build(nest(problem), default, "cpp")
    (made,) = (fresh_cache / "objects").glob("*.so")
    whole = made.read_bytes()
    made.unlink()  # a new file: the loaded one stays mapped
    made.write_bytes(whole[:100] + b"evil" + whole[104:])
    assert not objects.intact(made)
    case = Case(problem, 1, 2)
    tensors, out = operands(case)
    build(nest(problem), default, "cpp")(*tensors, out=out)
    assert objects.intact(made) and error(out, expected(case, tensors)) < 1e-6


def test_objects_are_private_and_a_shared_folder_is_refused(fresh_cache: Path) -> None:
    folder = objects.folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(CompileError, match="which others may write to; run chmod 700"):
        objects.folder()


def test_no_compiler_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        NoCompilerError, match="no C\\+\\+ compiler 'no-such-compiler' on the PATH; install one"
    ):
        build(nest(Problem("forward", GEOMETRY)), WINDOW, "cpp")
    assert versions("cpp")["compiler"] == "none"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "#!/bin/sh\n[ \"$1\" = --version ] && echo c 1 && exit\necho 'line 3: bad'  >&2; exit 7\n",
            "exit code 7: line 3: bad",
        ),
        (
            '#!/bin/sh\n[ "$1" = --version ] && echo c 1 && exit\nsleep 60\n',
            "took longer than 0.5 s for one kernel",
        ),
    ],
)
def test_a_compiler_that_fails_or_hangs(
    script: str, message: str, tmp_path: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "cc"
    command.write_text(script)
    command.chmod(0o755)
    monkeypatch.setenv("CXX", str(command))
    with pytest.raises(CompileError, match=message):
        build(nest(Problem("forward", GEOMETRY)), WINDOW, "cpp", timeout=0.5)
    assert not list((fresh_cache / "objects").glob("*.so"))


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(ArgumentError, match="target 'fpga' is unknown"):
        build(nest(Problem("forward", GEOMETRY)), WINDOW, "fpga")
    with pytest.raises(ArgumentError, match="target 'fpga' is unknown"):
        Space(nest(Problem("forward", GEOMETRY)), "fpga")


def test_ranked_schedules_are_distinct_ordered_and_printable() -> None:
    found = nest(Problem("grad_input", Geometry(8, 8, 8, (6, 12, 12), (3, 3, 3), (2, 2, 2), (1, 1, 1))))
    space = Space(found, "cpp", threads=2)
    ranked = space.ranked(12, random.Random(0))
    costs = [space.cost(s) for s in ranked]
    assert len(set(ranked)) == len(ranked) > 1 and costs == sorted(costs)
    assert space.default() == ranked[0] and ranked == space.ranked(12, random.Random(1))
    assert all(show(found, s, "cpp") for s in ranked)
