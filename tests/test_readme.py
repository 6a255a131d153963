"""The README keeps its word: its code runs, and what it names is there."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

import g3dswap
from g3dswap.bench import run
from g3dswap.choice import Record
from g3dswap.choose import Chooser
from g3dswap.cli import main
from g3dswap.problem import Geometry
from g3dswap.show import problem
from g3dswap.stored import open_cache
from tests.fakes import SCHEDULE, faked

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def commands() -> list[list[str]]:
    lines = [line for block in blocks("") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("g3dswap ")] + [
        words for words, _ in examples()
    ]


def examples() -> list[tuple[list[str], str]]:
    """The commands that are shown with their output, and the output."""
    (text,) = blocks("console")
    parts = [part.partition("\n") for part in text.split("$ g3dswap ")[1:]]
    return [(shlex.split(command), output) for command, _, output in parts]


def test_first_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert type(names["fast"]) is type(names["model"])
    assert "1" in capsys.readouterr().out  # the layer's name


def test_public_functions_exist() -> None:
    (text,) = blocks("text")
    for name in re.findall(r"^(\w+)\(", text, flags=re.MULTILINE):
        assert callable(getattr(g3dswap, name)), name


@pytest.mark.parametrize("words", commands(), ids=lambda words: words[0])
def test_commands_parse(words: list[str], tmp_path: Path) -> None:
    """Every word of the command lines means something to the parser; nothing is run."""
    command: click.Command = main
    while isinstance(command, click.Group):
        name, *words = words
        assert name in command.commands, name
        command = command.commands[name]
    command.make_context("g3dswap", words)


def test_all_commands_are_shown_with_their_output() -> None:
    assert {words[0] for words, _ in examples()} == set(main.commands)
    assert all(output.strip(".\n") for _, output in examples())


NETS = """
from torch import nn
def net():
    return nn.Sequential(
        nn.Conv3d(3, 16, 1), nn.Conv3d(16, 16, 3, padding=1, groups=16), nn.BatchNorm3d(16), nn.ReLU()
    )
"""


@pytest.fixture
def folder(tmp_path: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the examples run: a model, its weights, and a cache; kernels are said to be faster, not tuned."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "nets.py").write_text(NETS)
    import nets  # type: ignore[import-not-found]

    torch.save({"state_dict": nets.net().state_dict()}, "model.pth")
    shape = problem(
        "forward", Geometry(16, 16, 16, (8, 28, 28), (3, 3, 3)), torch.float32, "contiguous", "cpu", False
    )
    cache = open_cache(None)
    for direction in ("forward", "grad_input"):
        key = Chooser(cache, "cached").key(dataclasses.replace(shape, direction=direction))
        cache.put(key, Record(1, "quick", False, SCHEDULE, 1.0, 2.0, 1e-8, 1e-6).to_json())
    with faked(monkeypatch) as fake:
        fake.interrupted = False  # type: ignore[attr-defined]
        monkeypatch.setattr(run, "Chooser", lambda cache, tune, progress: fake(cache, tune, 1.05, progress))
        yield tmp_path
    del sys.modules["nets"]


def alike(text: str) -> str:
    """Text in which numbers and units of time are all the same."""
    text = re.sub(r"\d+(\.\d+)?(e[+-]\d+)?", "#", text)
    return re.sub(r"(?<=# )(us|ms|s)\b", "s", text)


def test_examples_print_what_is_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("g3dswap.endtoend.SHARES", 2)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for words, wanted in examples():
        command = main.commands[words[0]]
        options = {name for parameter in command.params for name in parameter.opts}
        more = ["--device", "cpu"] if "--device" in options else []
        more += ["--seconds", "0.01"] if "--seconds" in options else []
        more += ["--quiet"] if "--quiet" in options else []
        result = CliRunner().invoke(main, [*words, *more], prog_name="g3dswap")
        assert result.exit_code == 0, result.output
        got = result.stdout
        same = doctest.OutputChecker().check_output(alike(wanted), alike(got), flags)
        assert same, f"{words}\n--- shown\n{wanted}\n--- printed\n{got}"
    assert (folder / "fast.html").exists() and (folder / "x3d.json").exists()


def test_every_public_name_is_documented() -> None:
    for name in g3dswap.__all__:
        thing = getattr(g3dswap, name)
        assert inspect.getdoc(thing), name
        if not isinstance(thing, type):
            unsaid = [
                it for it in inspect.signature(thing).parameters if not re.search(rf"\b{it}\b", thing.__doc__)
            ]
            assert not unsaid, f"{name} does not say what {unsaid} are"
            continue
        for attribute, value in vars(thing).items():
            value = getattr(value, "__func__", value)  # of a class method
            if not attribute.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                assert value.__doc__, f"{name}.{attribute}"


def test_every_command_and_option_has_a_help() -> None:
    pending: list[tuple[str, click.Command]] = [("g3dswap", main)]
    while pending:
        name, command = pending.pop()
        assert command.help, name
        pending += command.commands.items() if isinstance(command, click.Group) else ()
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.opts[0]}"


def test_map_names_every_file_and_no_other() -> None:
    package = ROOT / "g3dswap"
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    files -= {path for path in files if path.endswith("__init__.py")}
    table = README[README.index("| stage | files |") :].partition("\n\n")[0]
    named = re.findall(r"`([\w/]+\.py)`", table)
    assert sorted(named) == sorted(files)


def imported(path: Path) -> set[str]:
    """Files of the package that one of its files imports, relative to the package and without ``.py``."""
    package = ROOT / "g3dswap"
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = path.parents[node.level - 1].relative_to(ROOT).parts
        else:
            base = ()
        base = (*base, *(node.module or "").split(".")) if node.module else base
        if base[:1] == ("g3dswap",):
            for parts in (base, *((*base, alias.name) for alias in node.names)):
                if (ROOT.joinpath(*parts)).with_suffix(".py").exists():
                    found.add(ROOT.joinpath(*parts).relative_to(package).as_posix())
    return found


def test_map_is_in_order_of_import() -> None:
    """A file imports only from those above it."""
    table = README[README.index("| stage | files |") :].partition("\n\n")[0]
    named = re.findall(r"`([\w/]+)\.py`", table)
    edges = {name: imported(ROOT / "g3dswap" / f"{name}.py") for name in named}
    assert "tc/nest" in edges["tc/lower"]  # imports are found at all, relative ones too
    below = {name: edges[name] & set(named[position:]) for position, name in enumerate(named)}
    assert {name: files for name, files in below.items() if files} == {}


def test_table_names_every_environment_variable() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "g3dswap").rglob("*.py"))
    read = set(re.findall(r"""environ(?:\.get\(|\[)"(\w+)\"""", sources)) - {"PATH"}
    table = README[README.index("| variable |") :].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) == read
    assert len(read) <= 3


PROOFS = (ROOT / "docs" / "proofs.md").read_text(encoding="utf-8")


def names_in(path: Path) -> set[str]:
    """The names of a file's tests."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_promise_names_tests_that_exist() -> None:
    rows = [line.strip("|").split(" | ") for line in PROOFS.splitlines() if line.startswith("| ")][2:]
    headings = [promise for promise, tests in rows if promise.strip().startswith("**") and not tests.strip()]
    assert len(headings) == 10 and len(rows) > 50
    for promise, tests in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", tests)
        assert named or promise in headings, promise
        assert re.sub(r"`[\w/.]+::\w+`", "", tests).strip() == "", tests  # nothing that is no test
        for file, name in named:
            assert name in names_in(ROOT / "tests" / file), f"{file}::{name}"
