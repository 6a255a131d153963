"""The README keeps its word: its code runs, and what it names is there."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import click
import pytest

import g3dswap
from g3dswap.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def commands() -> list[list[str]]:
    lines = [line for block in blocks("") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("g3dswap ")]


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


def test_all_commands_are_shown() -> None:
    assert {words[0] for words in commands()} == set(main.commands)


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
