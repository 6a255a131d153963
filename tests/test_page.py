"""Reports as files: what stands in them, no markup out of a name, and nothing overwritten."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import g3dswap
from g3dswap.entries import Functional, Kept, Skipped, Swapped, Untraced
from g3dswap.errors import ArgumentError, CheckpointError
from g3dswap.page import html, markdown, save_report
from g3dswap.report import Report
from tests.conftest import Golden
from tests.test_report import LAYER, full

EVIL = "<img src=x onerror=alert(1)>|`$a$`</td>&amp;[x](y)"
VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """The elements and the text of a page; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += f"{data} " if self.open[-1:] == ["td"] else data


def evil() -> Report:
    """Every text that comes from a model or a file is markup."""
    report = full()
    calls = report.swapped[0].calls
    return dataclasses.replace(
        report,
        swapped=[Swapped(EVIL, LAYER, calls, (EVIL,)), Swapped("b", LAYER, note=EVIL)],
        kept=[Kept(EVIL, LAYER, EVIL)],
        skipped=[Skipped(EVIL, EVIL, EVIL)],
        functional=[Functional(EVIL, "conv3d", 2, EVIL, reason=EVIL)],
        untraced=[Untraced(EVIL, EVIL)],
        machine=EVIL,
    )


def test_page_shows_everything() -> None:
    page = Page(html(full()))
    text = " ".join(page.text.split())
    for part in (
        "3 of 5 grouped layers swapped",
        "NVIDIA H200, PyTorch 2.11.0",
        "2.00x the speed of a training step",
        "75% of a training step was grouped convolutions",
        "training 800 ms +-5% 400 ms +-5% 2.00x 75% -> 25%",
        "2 x layer1.0.conv2 ... layer1.1.conv2",
        "layer1.0.conv2 layer1.1.conv2",  # all names, in what unfolds
        "64->64 g64 3x3x3 p1",
        "8x64x16x56x56 float32",
        "forward 3.1 ms 1 ms 3.10x tuned 1.0e-07",
        "grad-weight 1.2 ms 150 us 8.00x tuned 1.0e-07",
        "grad-input 4 ms kept",
        "nothing was faster",
        "MyConv is a subclass",
        "conv3d with groups=8 on 1x8x4x4x4, net.py:12",
        "control flow (net.py:40)",
        "12.3 s to choose the kernels",
    ):
        assert part in text, part
    assert page.tags.count("svg") == 4  # the steps and three passes
    assert text.count("8.5x") == 1  # beside its line in the picture


def test_page_needs_nothing_from_elsewhere() -> None:
    text = html(full())
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "default-src 'none'" in text
    addresses = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "action")]
    assert all(value.startswith("#") for value in addresses)
    assert not re.search(r"url\((?!#)|@import", text)


def test_page_of_nothing() -> None:
    page = Page(html(Report()))
    assert "no 3D convolution layer with groups > 1" in page.text
    assert "svg" not in page.tags and "table" not in page.tags


def test_nothing_in_a_page_is_markup_of_a_name() -> None:
    page = Page(html(evil()))
    assert "img" not in page.tags and not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(EVIL) >= 9
    assert page.text.count(EVIL[-12:]) > page.text.count(EVIL)  # in a picture too, cut


def test_nothing_in_markdown_is_markup_of_a_name() -> None:
    text = markdown(evil())
    assert "<img" not in text.replace("\\<img", "")
    for line in text.splitlines():
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line)
            assert len(cells) in (4, 7, 13), line  # two columns, the steps, the shapes


def test_markdown(golden: Golden) -> None:
    golden("report.md", markdown(full()))


def test_json_is_the_dictionary(tmp_path: Path) -> None:
    save_report(full(), tmp_path / "r.json")
    assert Report.from_dict(json.loads((tmp_path / "r.json").read_text())) == full()


@pytest.mark.parametrize(("name", "start"), [("r.html", "<!doctype html>"), ("r.MD", "# g3dswap report")])
def test_the_ending_says_the_format(tmp_path: Path, name: str, start: str) -> None:
    g3dswap.save_report(full(), tmp_path / name)
    assert (tmp_path / name).read_text(encoding="utf-8").startswith(start)


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "r.md"
    path.write_text("mine")
    with pytest.raises(
        CheckpointError, match=r"r\.md exists already; pass --force \(force=True\) to replace it"
    ):
        save_report(full(), path)
    assert path.read_text() == "mine"
    save_report(full(), path, force=True)
    assert path.read_text().startswith("# g3dswap report")


def test_pictures_are_only_imported_when_they_are_drawn() -> None:
    code = "import sys, g3dswap; assert 'matplotlib' not in sys.modules; print(g3dswap.save_report.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "save_report\n"
    with pytest.raises(AttributeError, match="module 'g3dswap' has no attribute 'nothing'"):
        g3dswap.nothing  # noqa: B018


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"r\.txt is no report; name it \*\.html, \*\.json, \*\.md"):
        save_report(full(), tmp_path / "r.txt")
    with pytest.raises(ArgumentError, match=r"takes a Report, not int; give it g3dswap\.report\(model\)"):
        save_report(3, tmp_path / "r.md")  # type: ignore[arg-type]
