"""Recipes: that they hold all of a kernel, and change with the code that prints it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from g3dswap import comprehensions
from g3dswap.errors import CompileError
from g3dswap.problem import ACTIVATIONS, Geometry, Problem
from g3dswap.tc import recipe
from g3dswap.tc.nest import Access, Nest, Tensor
from g3dswap.tc.schedule import Digit, Schedule, apply, serial
from g3dswap.tc.skew import Skew
from g3dswap.tc.source import source
from g3dswap.tc.syntax import Number

GEOMETRY = Geometry(4, 8, 4, (3, 6, 8), (3, 3, 3), (2, 1, 1), (1, 1, 1))
DIGITS = (
    "n rest grid|g rest grid|f*hi*wi rest grid|t rest grid|h*w rest grid|c*hs*ws rest serial"
    "|kt rest unroll|t 2 unroll|h*w 16 rows|f*hi*wi 16 cols|c*hs*ws 32 depth|ws 2 depth phase"
)
SKEWED = Schedule.from_json(
    {
        "digits": DIGITS.split("|"),
        "fuse": [["f", "hi", "wi"], ["h", "w"], ["c", "hs", "ws"]],
        "stage": [],
        "hints": {"warps": 2, "ahead": 1},
        "skew": [["h", 2, 1], ["w", 4, 2]],
    }
)


def scheduled(direction: str = "forward", **more: Any) -> tuple[Nest, Schedule]:
    nest = comprehensions.nest(Problem(direction, GEOMETRY, **more))
    return apply(nest, serial(nest)), serial(nest)


@pytest.mark.parametrize(
    "made",
    [
        *[scheduled(bias=True, activation=name) for name in ACTIVATIONS],
        scheduled("grad_input", dtype=torch.float64),
        scheduled("grad_weight", layout="channels_last_3d"),
        (apply(comprehensions.nest(Problem("forward", GEOMETRY, torch.bfloat16)), SKEWED), SKEWED),
    ],
    ids=lambda made: made[0].name,
)
def test_what_is_read_is_what_was_written(made: tuple[Nest, Schedule]) -> None:
    nest, schedule = made
    text = recipe.recipe(nest, schedule, ("cuda", 90, 32))
    again = recipe.read(text)
    assert again == (nest, schedule, ("cuda", 90, 32)) and repr(again[0]) == repr(nest)
    assert recipe.recipe(*again) == text
    target = "triton" if schedule.skew else "cpp"
    assert source(*again[:2], target) == source(nest, schedule, target)


def varied(value: Any) -> Any:
    """Something else."""
    if isinstance(value, bool):
        return not value
    return (*value, "x") if isinstance(value, tuple) else f"{value}x"


@pytest.mark.parametrize(
    "part",
    [
        scheduled()[0],
        Tensor("I", (None, 2), (2, 1), "float32"),
        Access("I", (), ()),
        Digit("w", 4, "lanes"),
        Schedule((), skew=(Skew("w", 2),)),
        Skew("w", 2),
        Number(1),
    ],
    ids=lambda part: type(part).__name__,
)
def test_every_field_is_in_it(part: Any) -> None:
    """Those of a nest's cache and of positions in a text apart, which tell no nests apart."""
    names = [name for name in part.__dataclass_fields__ if name not in ("_by_name", "pos")]
    texts = {json.dumps(recipe._plain(part))}
    for name in names:
        changed = object.__new__(type(part))
        changed.__dict__.update({**vars(part), name: varied(getattr(part, name))})
        texts.add(json.dumps(recipe._plain(changed)))
    assert len(texts) == len(names) + 1 > 1


def test_a_whole_number_is_no_float() -> None:
    """They print differently."""
    assert recipe._plain(Number(1)) == recipe._plain(Number(1.0))
    nest, schedule = scheduled()
    texts = {
        recipe.recipe(replace(nest, pointwise=(Number(n),), _by_name={}), schedule, "cpp") for n in (1, 1.0)
    }
    assert len(texts) == 2


def test_other_code_has_other_recipes_and_reads_none(monkeypatch: pytest.MonkeyPatch) -> None:
    nest, schedule = scheduled()
    text = recipe.recipe(nest, schedule, "cpp")
    monkeypatch.setattr(recipe, "GENERATOR", "another")
    assert recipe.recipe(nest, schedule, "cpp") != text
    with pytest.raises(CompileError, match="have changed since this process began; start it again"):
        recipe.read(text)


def test_the_code_is_all_files_by_name_and_content(tmp_path: Path) -> None:
    found = [recipe.digest_of(tmp_path)]
    for name, text in (("a.py", ""), ("a.py", "1"), ("b.py", ""), ("b.py", "1"), ("c.pyc", "")):
        (tmp_path / name).write_text(text)
        found.append(recipe.digest_of(tmp_path))
    (tmp_path / "notes.txt").touch()
    assert len(set(found)) == 6 and recipe.digest_of(tmp_path) == found[-1]
    assert recipe.digest_of(Path(recipe.__file__).parent) == recipe.GENERATOR
