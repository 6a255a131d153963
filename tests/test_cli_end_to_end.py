"""The command line with nothing replaced: a small network, untimed default kernels, real files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from torch import nn

from g3dswap import choose, cli
from g3dswap.errors import G3DSwapWarning

NETS = """
import torch
from torch import nn
class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 1, 3, 3, 3))
    def forward(self, x):
        return nn.functional.conv3d(x, self.weight, groups=2)
def net(width=8):
    return nn.Sequential(
        nn.Conv3d(2, width, 1), nn.Conv3d(width, width, 3, padding=1, groups=width), nn.BatchNorm3d(width)
    )
"""
GIVEN = ["--arch", "user_tiny:net", "--input", "2x2x3x5x6", "--device", "cpu"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with the weights of a network in it; the process knows no choices yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "user_tiny.py").write_text(NETS)
    state = {f"module.{name}": value for name, value in net().state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "model.pth")
    choose.forget()
    yield tmp_path
    choose.forget()
    sys.modules.pop("user_tiny", None)


def net() -> nn.Sequential:
    import user_tiny  # type: ignore[import-not-found]

    model: nn.Sequential = user_tiny.net()
    return model


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments, prog_name="g3dswap")


def succeeds(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def load(path: str) -> Any:
    return torch.load(path, weights_only=True)


def test_convert_then_verify_then_convert_by_the_plan() -> None:
    report = json.loads(
        succeeds("convert", "model.pth", "-o", "fast.pth", *GIVEN, "--tune", "none", "--json")
    )
    (layer,) = report["swapped"]
    assert (layer["name"], layer["verified"]) == ("1", True)
    assert {choice["source"] for choice in layer["calls"][0]["passes"]} == {"default"}

    before, after = load("model.pth"), load("fast.pth")
    assert after["epoch"] == 3
    assert list(after["state_dict"]) == list(before["state_dict"])
    assert all(torch.equal(after["state_dict"][k], v) for k, v in before["state_dict"].items())
    original = nn.DataParallel(net())  # where the original loads, what came out loads
    original.load_state_dict(after["state_dict"])

    verification = json.loads(succeeds("verify", "model.pth", "fast.pth", *GIVEN, "--json"))
    assert verification["ok"] is True
    assert any(item["name"] == "grad 1.weight" for item in verification["tensors"])

    words = [
        "convert",
        "model.pth",
        "-o",
        "again.pth",
        "--arch",
        "user_tiny:net",
        "--device",
        "cpu",
        "--json",
    ]
    again = json.loads(succeeds(*words, "--plan", "fast.plan.json"))
    assert [item["name"] for item in again["swapped"]] == ["1"]
    assert Path("again.plan.json").exists()


def test_verify_finds_other_weights() -> None:
    data = load("model.pth")
    data["state_dict"]["module.1.weight"] *= 1.01
    torch.save(data, "changed.pth")
    result = run("verify", "model.pth", "changed.pth", *GIVEN, "--tune", "none")
    assert result.exit_code == 3
    assert "FAILED" in result.stdout
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_inspect_and_show() -> None:
    report = json.loads(succeeds("inspect", "model.pth", *GIVEN, "--json"))
    assert [layer["name"] for layer in report["swapped"]] == ["1"]
    assert "would be swapped" in succeeds("inspect", "model.pth", *GIVEN)
    nest = succeeds("show", "model.pth", *GIVEN, "--stage", "nest", "--pass", "grad_input")
    assert nest.startswith("nest grad_input\n")
    assert nest == succeeds("show", *GIVEN, "--layer", "1", "--stage", "nest", "--pass", "grad_input")


def test_report_files_and_steps_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("g3dswap.endtoend.SHARES", 2)
    words = ["convert", "model.pth", "-o", "fast.pth", *GIVEN, "--tune", "none"]
    text = succeeds(*words, "--end-to-end", "--report", "fast.html")
    assert "Steps of the model" in text and "| training " in text
    assert text.endswith("Wrote fast.pth, fast.plan.json and fast.html.\n")
    assert "the speed of a training step" in Path("fast.html").read_text(encoding="utf-8")

    data = json.loads(
        succeeds("inspect", "model.pth", *GIVEN, "--end-to-end", "--report", "now.json", "--json")
    )
    assert data == json.loads(Path("now.json").read_text())
    assert [(step["kind"], step["after"]) for step in data["steps"]] == [
        ("training", None),
        ("inference", None),
    ]
    assert 0 < data["steps"][0]["share_before"] <= 1

    result = run("inspect", "model.pth", *GIVEN, "--report", "now.json")
    assert (result.exit_code, result.stderr) == (
        1,
        "error: now.json exists already; pass --force (force=True) to replace it.\n",
    )
    succeeds("inspect", "model.pth", *GIVEN, "--report", "now.json", "--force")
    assert json.loads(Path("now.json").read_text())["steps"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--report", "fast.txt"], "fast.txt is no report; name it *.html, *.json, *.md."),
        (
            ["--report", "fast.plan.json"],
            "fast.plan.json is what the conversion writes; name another --report.",
        ),
        (["--plan", "p.json", "--end-to-end"], "Steps are timed on inputs: give their shapes with --input."),
    ],
)
def test_report_options_that_cannot_be(words: list[str], message: str) -> None:
    given = GIVEN if "--plan" not in words else ["--arch", "user_tiny:net", "--device", "cpu"]
    result = run("convert", "model.pth", "-o", "fast.pth", *given, *words)
    assert result.exit_code in (1, 2) and message in result.stderr
    assert not Path("fast.pth").exists()


def test_weights_alone_give_no_report() -> None:
    result = run("inspect", "model.pth", "--report", "r.html")
    assert result.exit_code == 2
    assert "Weights alone give no report: name what builds the model with --arch." in result.stderr


def test_function_calls_on_request() -> None:
    torch.save({"weight": torch.rand(2, 1, 3, 3, 3)}, "mixer.pth")
    given = ["--arch", "user_tiny:Mixer", *GIVEN[2:], "--tune", "none", "--functional"]
    report = json.loads(succeeds("convert", "mixer.pth", "-o", "fast.pth", *given, "--json"))
    (call,) = report["functional"]
    assert (call["converted"], call["verified"], call["name"]) == (True, True, "(model)")
    assert {choice["source"] for choice in call["calls"][0]["passes"]} == {"default"}
    assert load("fast.pth").keys() == {"weight"}
    assert json.loads(succeeds("verify", "mixer.pth", "fast.pth", *given, "--json"))["ok"]


def test_a_whole_module_and_safetensors() -> None:
    torch.save(net(), "whole.pth")
    given = ["--input", "2x2x3x5x6", "--device", "cpu", "--tune", "none", "--trust"]
    succeeds("convert", "whole.pth", "-o", "fast.pth", *given)
    fast = torch.load("fast.pth", weights_only=False)
    assert type(fast[1]).__name__ == "Grouped3D"
    assert fast(torch.ones(1, 2, 3, 5, 6)).shape == (1, 8, 3, 5, 6)
    safetensors.torch.save_file(net().state_dict(), "model.safetensors")
    succeeds("convert", "model.safetensors", "-o", "tensors.safetensors", *GIVEN, "--tune", "none")
    assert safetensors.torch.load_file("tensors.safetensors").keys() == net().state_dict().keys()


def test_a_fused_checkpoint_and_its_verification() -> None:
    words = ["convert", "model.pth", "-o", "fused.pth", *GIVEN, "--tune", "none"]
    report = json.loads(succeeds(*words, "--fuse", "--verify", "model", "--json"))
    assert [(row["name"], row["norm"], row["activation"]) for row in report["fused"]] == [("1", "2", "")]
    assert "Fused for inference" in succeeds(*words, "--fuse", "--force")
    before, after = load("model.pth"), load("fused.pth")
    names = {key.removeprefix("module.") for key in after["state_dict"]}
    assert names == {"0.weight", "0.bias", "1.weight", "1.bias", "1.norm_is_folded"} and after["epoch"] == 3
    assert not torch.equal(after["state_dict"]["module.1.weight"], before["state_dict"]["module.1.weight"])
    verification = json.loads(succeeds("verify", "model.pth", "fused.pth", *GIVEN, "--json"))
    assert verification["ok"] and [item["name"] for item in verification["tensors"]] == ["output"]
    after["state_dict"]["module.1.bias"] += 1e-3
    torch.save(after, "fused.pth")
    assert run("verify", "model.pth", "fused.pth", *GIVEN).exit_code == 3
    torch.save(net(), "whole.pth")
    given = ["--input", "2x2x3x5x6", "--device", "cpu", "--tune", "none", "--trust"]
    succeeds("convert", "whole.pth", "-o", "fast.pth", *given, "--fuse")
    fast = torch.load("fast.pth", weights_only=False)
    assert [type(module).__name__ for module in fast] == ["Conv3d", "Fused3D", "Identity"]
    assert fast(torch.ones(1, 2, 3, 5, 6)).shape == (1, 8, 3, 5, 6)


def test_a_program_is_not_fused() -> None:
    torch.export.save(torch.export.export(net().eval(), (torch.ones(2, 2, 3, 5, 6),)), "model.pt2")
    result = run("convert", "model.pt2", "-o", "fast.pt2", "--fuse")
    assert result.exit_code == 2 and "A program's layers are not fused: fuse the model" in result.stderr


@pytest.mark.filterwarnings("always::g3dswap.errors.G3DSwapWarning")
def test_without_a_compiler_pytorchs_kernels_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    result = run("convert", "model.pth", "-o", "fast.pth", *GIVEN, "--quiet")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: PyTorch's own kernels run: no C++ compiler 'c++' on the PATH; ")
    assert result.stderr.count("\n") == 1
    assert "0 of 1 grouped layer swapped, 1 kept" in result.stdout
    assert load("fast.pth").keys() == load("model.pth").keys()


@pytest.mark.filterwarnings("always::g3dswap.errors.G3DSwapWarning")
def test_an_unwritable_cache_costs_no_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "cache").write_text("no directory")
    monkeypatch.setenv("G3DSWAP_CACHE_DIR", str(folder / "cache"))
    result = run("convert", "model.pth", "-o", "fast.pth", *GIVEN, "--tune", "cached", "--quiet")
    assert result.exit_code == 0, result.output
    assert f"warning: The options cache {folder}/cache" in result.stderr
    assert (folder / "cache").read_text() == "no directory"
    assert load("fast.pth").keys() == load("model.pth").keys()
    assert issubclass(G3DSwapWarning, UserWarning)
