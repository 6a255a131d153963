"""Models, inputs and weights from what a command line can say."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from g3dswap import arch, checkpoint
from g3dswap.arch import Input
from g3dswap.errors import ArgumentError, ConvertError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, from which modules may be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("user_"):
            del sys.modules[name]


def test_inputs() -> None:
    assert arch.parse_inputs("8x3x16x112x112") == (Input((8, 3, 16, 112, 112)),)
    assert arch.parse_inputs("1x2, 3:int64,4x1:bf16") == (
        Input((1, 2)),
        Input((3,), torch.int64),
        Input((4, 1), torch.bfloat16),
    )


@pytest.mark.parametrize(
    "text", ["", "8x", "x8", "8x0", "8x-1", "8*3", "8X3", "8x3,", "8 x 3", "٣x3", "1e3", "9" * 30]
)
def test_what_is_no_shape(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"^'.*' is no shape: write positive extents joined by x"):
        arch.parse_inputs(text)


def test_unknown_dtype() -> None:
    for text in ("8x3:", "8x3:float33", "8x3:int64:bool"):
        with pytest.raises(ArgumentError, match=r"has an unknown dtype; use one of float32, "):
            arch.parse_inputs(text)


def test_triples() -> None:
    assert arch.parse_triple("3") == (3, 3, 3)
    assert arch.parse_triple("0") == (0, 0, 0)
    assert arch.parse_triple("1x2x3") == (1, 2, 3)
    for text in ("", "1x2", "1x2x3x4", "-1", "a", "1.5"):
        with pytest.raises(ArgumentError, match=r"is neither one integer nor three joined by x"):
            arch.parse_triple(text)


def test_kwargs() -> None:
    assert arch.parse_kwargs('{"depth": 101, "wide": [1, true]}') == {"depth": 101, "wide": [1, True]}
    for text in ("", "{", "depth=101", "[" * 100_000):
        with pytest.raises(ArgumentError, match=r"is no JSON \(.*\); write an object such as"):
            arch.parse_kwargs(text)
    with pytest.raises(ArgumentError, match=r"'\[1\]' is no JSON object; write one such as"):
        arch.parse_kwargs("[1]")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert arch.parse_device(None) == arch.parse_device("cpu") == torch.device("cpu")
    with pytest.raises(ArgumentError, match=r"^'cuda' is not on this machine, which has 0 CUDA devices"):
        arch.parse_device("cuda")
    for text in ("tpu", "meta", "cuda:", "cpu:0:1"):
        with pytest.raises(ArgumentError, match=r"is no device that has kernels; use cpu, cuda or"):
            arch.parse_device(text)


def test_made_inputs() -> None:
    specs = arch.parse_inputs("2x4x3x5x5,3:int64,2x2:float64,4:bool")
    cpu = torch.device("cpu")
    first = arch.make_inputs(specs, torch.bfloat16, cpu, torch.channels_last_3d)
    assert [x.dtype for x in first] == [torch.bfloat16, torch.int64, torch.float64, torch.bool]
    assert [tuple(x.shape) for x in first] == [spec.shape for spec in specs]
    assert first[0].is_contiguous(memory_format=torch.channels_last_3d)
    assert first[0].float().std() > 0.5
    again = arch.make_inputs(specs, torch.bfloat16, cpu, torch.contiguous_format)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


MODULE = """
import torch
from torch import nn
print("imported")
instance = nn.ReLU()
def net(width=4, *, fail=None):
    print("built")
    if fail: raise RuntimeError(fail + "\\nsecond line")
    return nn.Sequential(nn.Conv3d(width, width, 3, groups=width))
def number(): return 5
def leave(): raise SystemExit(2)
class Zoo:
    @staticmethod
    def net(width): return nn.Conv3d(width, width, 1)
"""


def test_build(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "user_package").mkdir()
    (folder / "user_package" / "nets.py").write_text(MODULE)
    (folder / "user_package" / "other.py").write_text("raise RuntimeError")
    model = arch.build("user_package.nets:net", {"width": 6})
    assert isinstance(model, nn.Sequential)
    assert model.state_dict()["0.weight"].shape[0] == 6
    assert arch.build("user_package.nets:Zoo.net", {"width": 2}).state_dict()["weight"].shape[0] == 2
    assert capsys.readouterr() == ("", "imported\nbuilt\n")
    assert "user_package.other" not in sys.modules


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("user_nets", {}, r"^--arch user_nets is not of the form pkg\.mod:factory\.$"),
        ("user_nets:", {}, r"is not of the form pkg\.mod:factory\.$"),
        (":net", {}, r"is not of the form pkg\.mod:factory\.$"),
        (
            "user_nets.py:net",
            {},
            r"names a file; name its module, user_nets:net, and run this there\.$",
        ),
        ("../user_nets.py:net", {}, r"names a file; name its module, user_nets:net, and run"),
        ("user_nets:net()", {}, r"is not of the form"),
        ("user_none:net", {}, r"^--arch user_none:net: there is no module user_none; install it or run"),
        ("user_none.sub:net", {}, r"there is no module user_none; install it or run"),
        ("user_nets:nets", {}, r"^--arch user_nets:nets: user_nets has no nets; did you mean net\?$"),
        ("user_nets:zzzz", {}, r"user_nets has no zzzz; name a factory that is in it\.$"),
        ("user_nets:instance", {}, r"is a ReLU; name a class or function that returns a model\.$"),
        ("user_nets:torch", {}, r"is a module; name a class or function that returns a model\.$"),
        ("user_nets:number", {}, r"^--arch user_nets:number returned a int, no torch\.nn\.Module\.$"),
        (
            "user_nets:net",
            {"depth": 3},
            r"^--arch user_nets:net: got an unexpected keyword argument 'depth'; set its arguments with",
        ),
        (
            "user_nets:Zoo.net",
            {},
            r"missing a required argument: 'width'; set its arguments with",
        ),
    ],
)
def test_wrong_arch(folder: Path, name: str, kwargs: dict[str, Any], message: str) -> None:
    (folder / "user_nets.py").write_text(MODULE)
    with pytest.raises(ArgumentError, match=message):
        arch.build(name, kwargs)


@pytest.mark.parametrize(
    ("text", "name", "kwargs", "message"),
    [
        (
            "import user_missing",
            "net",
            {},
            r"raised ModuleNotFoundError: No module named 'user_missing'\.$",
        ),
        ("1 / 0", "net", {}, r"importing user_bad raised ZeroDivisionError: division by zero\.$"),
        (
            "raise SystemExit('usage: train')",
            "net",
            {},
            r"importing user_bad raised SystemExit: usage: train\.$",
        ),
        ("def f(:", "f", {}, r"importing user_bad raised SyntaxError: "),
        (
            MODULE,
            "net",
            {"fail": "first line"},
            r"^--arch user_bad:net raised RuntimeError: first line; check",
        ),
        (MODULE, "leave", {}, r"^--arch user_bad:leave raised SystemExit: 2; check --arch-kwargs\.$"),
    ],
)
def test_code_that_fails(folder: Path, text: str, name: str, kwargs: dict[str, Any], message: str) -> None:
    (folder / "user_bad.py").write_text(text)
    with pytest.raises(ConvertError, match=message) as caught:
        arch.build(f"user_bad:{name}", kwargs)
    assert "\n" not in str(caught.value)


def stored(state: dict[str, Any], folder: Path) -> checkpoint.Checkpoint:
    torch.save(state, folder / "in.pth")
    return checkpoint.read(folder / "in.pth")


def test_load_weights(folder: Path) -> None:
    trained, model = nn.Linear(3, 2), nn.Linear(3, 2)
    read = stored({f"module.{k}": v for k, v in trained.state_dict().items()}, folder)
    assert arch.load_weights(model, read).prefix == "module."
    assert torch.equal(model.weight, trained.weight)


def test_weights_that_do_not_fit(folder: Path) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(12)))
    state = {"0.weight": torch.ones(3, 3), "extra.a": torch.ones(1), "extra.b": torch.ones(1)}
    with pytest.raises(ConvertError) as caught:
        arch.load_weights(model, stored(state, folder))
    listed = ", ".join(f"{i}.weight" for i in range(1, 9))
    assert str(caught.value) == (
        f"{folder}/in.pth does not fit the model: it lacks 11 keys ({listed}, ... and 3 more), has 2 keys "
        "(extra.a, extra.b) too many; check --arch, --arch-kwargs and --key."
    )
    small = nn.Linear(3, 2)
    with pytest.raises(ConvertError) as caught:
        arch.load_weights(small, stored({"weight": torch.ones(4, 3), "c": torch.ones(1)}, folder))
    assert str(caught.value) == (
        f"{folder}/in.pth does not fit the model: it lacks 1 key (bias), has 1 key (c) too many, has "
        "other shapes (weight of 4x3 where the model has 2x3); check --arch, --arch-kwargs and --key."
    )
