"""The benchmark's pictures."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from click.testing import CliRunner

from g3dswap import cli
from g3dswap.bench import run
from g3dswap.bench.plot import draw
from g3dswap.bench.results import Results
from g3dswap.errors import ArgumentError
from tests.test_bench import synthetic

STORED = Path(run.__file__).with_name("results") / "cpu-xeon-2-cores.json"


def texts(path: Path) -> str:
    """What an SVG writes; matplotlib draws text as shapes and leaves it in comments."""
    ElementTree.parse(path)
    return path.read_text(encoding="utf-8")


def test_a_picture_names_every_layer_and_each_mean(tmp_path: Path) -> None:
    stored = Results.load(STORED)
    data = json.loads(STORED.read_text())
    (best,), means = (
        [it for it in data[name] if it["direction"] == "forward"] for name in ("best", "summary")
    )
    draw([stored], tmp_path / "a.svg")
    svg = texts(tmp_path / "a.svg")
    for row in stored.rows:
        assert row.layer.replace("res_blocks.", "").replace("branch2.", "") in svg
    for words in (
        "forward: share of the roofline",
        "grad_weight: speed-up",
        "geometric means {fraction:.0%}, PyTorch {torch_fraction:.0%}".format(**best).replace("%", " %"),
        "geometric means {:.2f}x, {:.2f}x".format(*(it["same"] for it in means)),
    ):
        assert words in svg


def test_several_results_are_one_picture(tmp_path: Path) -> None:
    other = synthetic()
    other.header["settings"]["dtype"] = "bfloat16"
    draw([synthetic(), other], tmp_path / "both.svg")
    svg = texts(tmp_path / "both.svg")
    assert "A CPU, float32" in svg and "A CPU, bfloat16" in svg
    assert "kept" in svg


def test_a_stored_result_is_drawn(tmp_path: Path) -> None:
    words = ["bench", "--render", str(STORED), "--plot", str(tmp_path / "a.png")]
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 1 and "exists already" in result.stderr


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"a\.txt is no picture; name it \*\.svg, \*\.png, \*\.pdf\."):
        draw([synthetic()], tmp_path / "a.txt")
    with pytest.raises(ArgumentError, match=r"There is nothing to draw: .* measure some layers first"):
        draw([Results(synthetic().header, synthetic().ceilings)], tmp_path / "a.svg")
    with pytest.raises(ArgumentError, match=r"cannot be written \(No such file or directory\)"):
        draw([synthetic()], tmp_path / "nowhere" / "a.svg")
