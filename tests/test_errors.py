"""What users do wrong: one clear sentence each, and nothing written or run that should not be.

Each row is a mistake with the wording that answers it. Rows of the command line also say the exit code: 1 for
an error (a single line on stderr), 2 for wrong usage (which is what click prints, ending in its sentence).
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import g3dswap
from g3dswap import checkpoint, cli
from g3dswap.arch import parse_inputs, parse_kwargs
from g3dswap.errors import (
    ArgumentError,
    CheckpointError,
    ConvertError,
    G3DSwapError,
    NotationError,
    PlanError,
)
from g3dswap.problem import Geometry, Problem
from g3dswap.tc.cache import Cache
from g3dswap.tc.parser import parse

NETS = """
from torch import nn
def net(width=4): return nn.Sequential(nn.Conv3d(width, width, 3, groups=width), nn.ReLU())
def plain(): return nn.Sequential(nn.Conv3d(4, 4, 3))
def number(): return 5
def broken(): raise ValueError("depth must be 50 or 101")
"""
MARKER = "harm"


class Evil:
    """Creates a folder, in the current directory, when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (MARKER,)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of every file."""
    folder = tmp_path_factory.mktemp("template")
    state = nn.Sequential(nn.Conv3d(4, 4, 3, groups=4), nn.ReLU()).state_dict()
    torch.save(state, folder / "model.pth")
    whole = (folder / "model.pth").read_bytes()
    files = {
        "empty.pth": b"",
        "cut.pth": whole[: len(whole) // 2],
        "text.pth": b"epochs: 90\n",
        "page.pth": b"<!DOCTYPE html>\n<html></html>",
        "lfs.pth": b"version https://git-lfs.github.com/spec/v1\n",
        "bare.pth": pickle.dumps(Evil()),
        "cut.safetensors": (1000).to_bytes(8, "little") + b'{"w":',
        "plan.json": b"{",
        "old.jsonl": b'{"schema": 1, "key"',
        "taken.pth": b"mine",
        "bad_nets.py": b"import no_such_module\n",
        "nets.py": NETS.encode(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    torch.save({"state_dict": state, "x": Evil()}, folder / "evil.pth")
    torch.save({"a": Evil()}, folder / "evil_old.pth", _use_new_zipfile_serialization=False)
    torch.save(nn.Sequential(nn.Conv3d(4, 4, 3, groups=4)), folder / "whole.pth")
    torch.save({"state_dict": state, "ema": state}, folder / "two.pth")
    torch.save({"net": state}, folder / "net.pth")
    torch.save([1, 2], folder / "list.pth")
    torch.save({"epoch": 1}, folder / "none.pth")
    torch.save({"2.weight": torch.ones(1)}, folder / "other.pth")
    torch.save({**state, "0.weight": torch.ones(4, 1, 5, 5, 5)}, folder / "wide.pth")
    with warnings.catch_warnings():  # torch.jit is deprecated
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.ReLU(), torch.ones(1)), folder / "script.pt")
        torch.export.save(torch.export.export(nn.ReLU(), (torch.ones(1),)), folder / "export.pt2")
    (folder / "folder.pth").mkdir()
    return folder


@pytest.fixture(autouse=True)
def folder(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, like the template, with a cache of its own beside it."""
    work = tmp_path / "work"
    shutil.copytree(template, work)
    monkeypatch.chdir(work)
    monkeypatch.setenv("G3DSWAP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield work
    for name in ("nets", "bad_nets"):
        sys.modules.pop(name, None)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """All files and folders below, with their content."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@dataclass(frozen=True)
class Mistake:
    """A command line, what it is answered, and how it ends."""

    words: str
    answer: str
    code: int = 1


GIVEN = "--arch nets:net --input 1x4x5x5x5 --device cpu"
CONVERT = f"convert model.pth -o fast.pth {GIVEN}"
AGAIN = "copy or download it again"
NO_LAYERS = "whose layers cannot be replaced; save the state_dict of the Python model instead"
TRUST = (
    "and unpickling it can run any code; pass --trust (trust=True) only if you trust "
    "where the file comes from"
)


def of_file(name: str, answer: str, options: str = "") -> Mistake:
    """What converting some other file answers."""
    return Mistake(f"convert {name} -o fast.pth {GIVEN} {options}", f"{name} {answer}.")


COMMAND_LINE = [
    # Usage
    Mistake(
        "convert model.pth -o fast.pth --arch nets:net",
        "Kernels are tuned for shapes: give the model's with --input, or a --plan.",
        2,
    ),
    Mistake(
        "convert model.pth",
        "Missing option '-o' / '--output'.",
        2,
    ),
    Mistake(
        "inspect --arch nets:net --input 8*3",
        "Invalid value for '--input': '8*3' is no shape: write positive extents joined by x, "
        "batch first, such as 8x3x16x112x112.",
        2,
    ),
    Mistake(
        "inspect --arch nets:net --input 8x0x3",
        "Invalid value for '--input': '8x0x3' is no shape: write positive extents joined by x, "
        "batch first, such as 8x3x16x112x112.",
        2,
    ),
    Mistake(
        "inspect --arch nets:net --input 8x3:int3",
        "Invalid value for '--input': '8x3:int3' has an unknown dtype; use one of float32, fp32, "
        "float, float64, fp64, double, bfloat16, bf16, float16, fp16, half, int64, long, int32, "
        "int, uint8, bool.",
        2,
    ),
    Mistake(
        "inspect --arch nets:net --arch-kwargs width=4",
        "Invalid value for '--arch-kwargs': 'width=4' is no JSON (Expecting value: line 1 column "
        "1 (char 0)); write an object such as '{\"depth\": 101}'.",
        2,
    ),
    Mistake(
        "inspect --arch nets:net --arch-kwargs [4]",
        "Invalid value for '--arch-kwargs': '[4]' is no JSON object; write one such as '{\"depth\": 101}'.",
        2,
    ),
    Mistake(
        "inspect --arch nets:net --device tpu",
        "Invalid value for '--device': 'tpu' is no device that has kernels; use cpu, cuda or cuda:INDEX.",
        2,
    ),
    Mistake(
        "inspect --arch nets:net --device cuda:99",
        "Invalid value for '--device': 'cuda:99' is not on this "
        f"machine, which has {torch.cuda.device_count()} CUDA devices; use another or cpu.",
        2,
    ),
    Mistake(
        f"{CONVERT} --tune fast",
        "Invalid value for '--tune': 'fast' is not one of 'none', 'cached', 'quick', 'full'.",
        2,
    ),
    Mistake(
        f"{CONVERT} --min-speedup 0.5",
        "Invalid value for '--min-speedup': 0.5 is not in the range x>=1.0.",
        2,
    ),
    Mistake(
        "tune --channels 4",
        "--channels describes a convolution, which needs --size too.",
        2,
    ),
    Mistake(
        "tune --size 4",
        "--size describes a convolution, which needs --channels too.",
        2,
    ),
    Mistake(
        "tune --channels 4 --size 4x4",
        "Invalid value for '--size': '4x4' is neither one integer nor three joined by x, such as 1x3x3.",
        2,
    ),
    Mistake(
        "tune --channels 4 --size 4 --arch nets:net",
        "Give either a model or a convolution (--channels ...), not both.",
        2,
    ),
    Mistake(
        "tune --arch nets:net",
        "Kernels are tuned for shapes: give the model's with --input.",
        2,
    ),
    Mistake(
        "verify model.pth model.pth --arch nets:net",
        "Outputs are compared on inputs: give their shapes with --input.",
        2,
    ),
    Mistake(
        "cache prune",
        "Say which: --all, --older-than, --id or --device-name.",
        2,
    ),
    # Architectures
    Mistake(
        "convert model.pth -o fast.pth --input 1x4x5x5x5",
        "model.pth holds weights only; name the function that builds it with --arch pkg.mod:factory.",
    ),
    Mistake(
        "inspect",
        "There is no model; name the function that builds it with --arch pkg.mod:factory.",
    ),
    Mistake(
        "inspect --arch nets",
        "--arch nets is not of the form pkg.mod:factory.",
    ),
    Mistake(
        "inspect --arch nets.py:net",
        "--arch nets.py:net names a file; name its module, nets:net, and run this there.",
    ),
    Mistake(
        "inspect --arch netz:net",
        "--arch netz:net: there is no module netz; install it or run this in its directory.",
    ),
    Mistake(
        "inspect --arch nets:nett",
        "--arch nets:nett: nets has no nett; did you mean net?",
    ),
    Mistake(
        "inspect --arch bad_nets:net",
        "--arch bad_nets:net: importing bad_nets raised ModuleNotFoundError: No module named "
        "'no_such_module'.",
    ),
    Mistake(
        "inspect --arch nets:number",
        "--arch nets:number returned a int, no torch.nn.Module.",
    ),
    Mistake(
        "inspect --arch nets:broken",
        "--arch nets:broken raised ValueError: depth must be 50 or 101; check --arch-kwargs.",
    ),
    Mistake(
        'inspect --arch nets:net --arch-kwargs {"depth":5}',
        "--arch nets:net: got an unexpected keyword argument 'depth'; set its arguments with --arch-kwargs.",
    ),
    # Checkpoints
    of_file(
        "missing.pth",
        "does not exist; give the path of a checkpoint file",
    ),
    of_file(
        "folder.pth",
        "is a directory; give one checkpoint file, or the folder of a MONAI bundle",
    ),
    of_file(
        "empty.pth",
        f"is empty; {AGAIN}",
    ),
    of_file(
        "cut.pth",
        f"is truncated or damaged (a zip archive without its end); {AGAIN}",
    ),
    of_file(
        "cut.safetensors",
        f"is a truncated safetensors file; {AGAIN}",
    ),
    of_file(
        "text.pth",
        "is a text file; give a file that torch.save or safetensors wrote",
    ),
    of_file(
        "page.pth",
        "is an HTML page, often what a download got instead of the file; download it again",
    ),
    of_file(
        "lfs.pth",
        "is a Git LFS pointer; run `git lfs pull` to get the file itself",
    ),
    of_file(
        "script.pt",
        f"is a TorchScript archive, {NO_LAYERS}",
    ),
    of_file(
        "export.pt2",
        "is a torch.export program, which has its shapes and dtypes in it; leave --arch, --input, --dtype "
        "and --layout out",
    ),
    of_file(
        "evil.pth",
        f"holds the pickled object posix.mkdir, {TRUST}",
    ),
    of_file(
        "evil_old.pth",
        f"holds the pickled object posix.mkdir, {TRUST}",
    ),
    of_file(
        "bare.pth",
        "is a pickle that torch.save did not write, which is never loaded; use torch.save instead",
        "--trust",
    ),
    of_file(
        "whole.pth",
        "holds the pickled objects torch.nn.modules.container.Sequential, torch.nn.modules.conv.Conv3d, and "
        "unpickling them can run any code; allow them alone with --safe-global NAME for each, or pass "
        "--trust (trust=True) only if you trust where the file comes from",
    ),
    of_file(
        "whole.pth",
        "holds the pickled object torch.nn.modules.conv.Conv3d, and unpickling it can run any code; allow it "
        "alone with --safe-global torch.nn.modules.conv.Conv3d, or pass --trust (trust=True) only if you "
        "trust where the file comes from",
        "--safe-global torch.nn.modules.container.Sequential",
    ),
    of_file(
        "whole.pth",
        "holds a whole module; leave --arch out",
        "--safe-global torch.nn.modules.container.Sequential --safe-global torch.nn.modules.conv.Conv3d",
    ),
    Mistake(
        "inspect evil.pth --safe-global posix.mkdir",
        "--safe-global posix.mkdir could do anything that you can; use --trust if you trust the file.",
    ),
    Mistake(
        "inspect evil.pth --safe-global nets.Missing",
        "--safe-global nets.Missing cannot be imported; run this where it can, or check the spelling.",
    ),
    Mistake(
        "inspect evil.pth --safe-global Net",
        "--safe-global 'Net' is no qualified name; write one such as pkg.mod.Class.",
    ),
    Mistake(
        "convert export.pt2 -o fast.pt2 --verify model",
        "A program is not run while it is converted: use g3dswap verify afterwards.",
        2,
    ),
    Mistake(
        "verify export.pt2 export.pt2",
        "export.pt2 has to be loaded to be run, and torch.export.load evaluates expressions that are in it; "
        "pass --trust (trust=True) only if you trust where the file comes from.",
    ),
    of_file(
        "whole.pth",
        "holds a whole module; leave --arch out",
        "--trust",
    ),
    of_file(
        "two.pth",
        "has weights under several keys (state_dict, ema); choose one with --key",
    ),
    of_file(
        "net.pth",
        "has its weights under an unknown key; pass --key net if that is the model's",
    ),
    of_file(
        "net.pth",
        "has no weights under --key nett; the keys that hold weights are net",
        "--key nett",
    ),
    of_file(
        "list.pth",
        "holds a list, no state_dict; save model.state_dict() instead",
    ),
    of_file(
        "none.pth",
        "holds no tensors that could be a state_dict; save model.state_dict() instead",
    ),
    of_file(
        "other.pth",
        "does not fit the model: it lacks 2 keys (0.weight, 0.bias), has 1 key (2.weight) too "
        "many; check --arch, --arch-kwargs and --key",
    ),
    of_file(
        "wide.pth",
        "does not fit the model: it has other shapes (0.weight of 4x1x5x5x5 where the model has "
        "4x1x3x3x3); check --arch, --arch-kwargs and --key",
    ),
    Mistake(
        "convert whole.pth -o fast.pth --trust --input 1x4x5x5x5 --dtype bf16",
        "whole.pth holds a whole module, which --dtype would change; leave --dtype out.",
    ),
    # Outputs
    Mistake(
        f"convert model.pth -o taken.pth {GIVEN}",
        "taken.pth exists already; pass --force (force=True) to replace it.",
    ),
    Mistake(
        f"convert model.pth -o model.pth {GIVEN}",
        "model.pth exists already; pass --force (force=True) to replace it.",
    ),
    Mistake(
        f"convert model.pth -o folder.pth {GIVEN} --force",
        "folder.pth is a directory; give the name of a file to write.",
    ),
    Mistake(
        f"convert model.pth -o nowhere/fast.pth {GIVEN}",
        "nowhere/fast.pth cannot be written: there is no directory nowhere; create it first.",
    ),
    Mistake(
        f"convert model.pth -o /dev/null {GIVEN} --force",
        "/dev/null is no regular file; give the name of a file to write.",
    ),
    # Geometries
    Mistake(
        "tune --channels 6 --groups 4 --size 5",
        "in_channels=6 is not divisible by groups=4; choose a group count that divides both channel counts.",
    ),
    Mistake(
        "tune --channels 6 --filters 9 --size 5",
        "out_channels=9 is not divisible by groups=6; choose a group count that divides both channel counts.",
    ),
    Mistake(
        "tune --channels 4 --kernel 7 --size 5",
        "The dilated kernel (7, 7, 7) is larger than the padded input (5, 5, 5); use a smaller "
        "kernel or dilation, or a larger input or padding.",
    ),
    Mistake(
        "tune --channels 4 --stride 0 --size 5",
        "stride=(0, 0, 0) must be three integers (time, height, width) of at least 1.",
    ),
    # Layers and plans
    Mistake(
        f"{CONVERT} --include conv1",
        "include='conv1' matches no convolution with groups > 1; there are '0'.",
    ),
    Mistake(
        f"{CONVERT} --plan plan.json",
        "The plan plan.json is not JSON (REASON); save it again with g3dswap.save_plan.",
    ),
    Mistake(
        f"{CONVERT} --plan missing.json",
        "The plan missing.json cannot be read (No such file or directory); check the path.",
    ),
    Mistake(
        f"{CONVERT} --input 1x3x5x5x5",
        "Sequential.forward raised on the example inputs (RuntimeError: REASON); pass inputs that"
        " it takes, or none (each layer then chooses at its first call).",
    ),
    # Schedules
    Mistake(
        "show",
        "Say which convolution: --channels and --size, or a model's with --input.",
        2,
    ),
    Mistake(
        f"show {GIVEN} --channels 4 --size 5",
        "Give either a model or a convolution (--channels ...), not both.",
        2,
    ),
    Mistake(
        f"show {GIVEN} --layer conv",
        "The model has no grouped layer 'conv'; there is 0.",
    ),
    Mistake(
        "show --arch nets:plain --input 1x4x5x5x5 --device cpu",
        "The model has no convolution with groups > 1 that could be swapped; give another --arch.",
    ),
    Mistake(
        "show --channels 4 --size 5 --schedule {",
        "Invalid value for '--schedule': '{' is no JSON (Expecting property name enclosed in "
        "double quotes: line 1 column 2 (char 1)); copy a schedule from `g3dswap cache show`.",
        2,
    ),
    Mistake(
        "show --channels 4 --size 5 --schedule {}",
        "Invalid value for '--schedule': a schedule is a mapping with digits, fuse, stage and "
        "hints, not '{}' ('digits'); tune the layer again.",
        2,
    ),
    # The cache
    Mistake(
        "cache prune --all --cache taken.pth",
        "Invalid value for '--cache': Directory 'taken.pth' is a file.",
        2,
    ),
    Mistake(
        "cache show abc",
        "no entry begins with abc in CACHE; `g3dswap cache ls` lists them.",
    ),
    Mistake(
        "cache import old.jsonl",
        "old.jsonl cannot be imported (REASON) and nothing was changed; export it again with a "
        "g3dswap that writes schema 1.",
    ),
    Mistake(
        "cache import missing.jsonl",
        "missing.jsonl cannot be imported: there is no such file.",
    ),
    Mistake(
        "cache export taken.pth",
        "taken.pth exists already; pass --force to replace it.",
    ),
]


@pytest.mark.parametrize("mistake", COMMAND_LINE, ids=lambda mistake: mistake.words)
def test_command_line(mistake: Mistake, folder: Path) -> None:
    before = snapshot(folder)
    result = CliRunner().invoke(cli.main, mistake.words.split(), prog_name="g3dswap")
    assert result.exit_code == mistake.code, result.output
    cache = folder.parent / "cache"
    answer = re.escape(mistake.answer).replace("REASON", "[^;]+").replace("CACHE", re.escape(str(cache)))
    if mistake.code == 1:
        assert re.fullmatch(rf"error: {answer}\n", result.stderr), result.stderr
    else:
        assert re.search(rf"\nError: {answer}\n\Z", result.stderr), result.stderr
    assert result.stdout == ""
    assert snapshot(folder) == before
    assert not Path(MARKER).exists()
    assert not snapshot(cache)


@dataclass(frozen=True)
class Call:
    """A mistake in Python."""

    name: str
    call: Callable[[], Any]
    error: type[G3DSwapError]
    answer: str


def geometry(**fields: Any) -> Geometry:
    return Geometry(
        **{"in_channels": 4, "out_channels": 4, "groups": 4, "size": (5, 5, 5), "kernel": (3, 3, 3), **fields}
    )


def conv() -> nn.Conv3d:
    return nn.Conv3d(4, 4, 3, groups=4)


def net() -> nn.Sequential:
    return nn.Sequential(conv())


def compiled() -> Any:
    with warnings.catch_warnings():  # PyTorch deprecates what its compiler imports
        warnings.simplefilter("ignore")
        return torch.compile(net())


class Special(nn.Conv3d):
    """A layer whose forward may do anything."""


def subclassed() -> nn.Sequential:
    return nn.Sequential(Special(4, 4, 3, groups=4))


def grouped() -> nn.Module:
    return g3dswap.Grouped3D(4, 4, 3, groups=4, tune="none")


PYTHON = [
    Call(
        "convert a list",
        lambda: g3dswap.convert([conv()]),  # type: ignore[arg-type]
        ArgumentError,
        "convert() takes a torch.nn.Module, not a list.",
    ),
    Call(
        "convert a class",
        lambda: g3dswap.convert(nn.Conv3d),  # type: ignore[arg-type]
        ArgumentError,
        "convert() takes a model, and Conv3d is a class; make an instance.",
    ),
    Call(
        "unknown tune",
        lambda: g3dswap.convert(conv(), tune="fast"),
        ArgumentError,
        "tune='fast' is unknown; use one of none, cached, quick, full.",
    ),
    Call(
        "no speed-up",
        lambda: g3dswap.convert(conv(), min_speedup=0),
        ArgumentError,
        "min_speedup=0 must be a number above 0, say 1.05.",
    ),
    Call(
        "unknown layer",
        lambda: g3dswap.convert(net(), include="conv1"),
        ArgumentError,
        "include='conv1' matches no convolution with groups > 1; there are '0'.",
    ),
    Call(
        "a prefix of layers",
        lambda: g3dswap.convert(nn.Sequential(net()), exclude="0"),
        ArgumentError,
        "exclude='0' matches no convolution with groups > 1; write '0.*' for the 1 inside it.",
    ),
    Call(
        "inputs of other channels",
        lambda: g3dswap.convert(net(), torch.ones(1, 3, 5, 5, 5)),
        ConvertError,
        "Sequential.forward raised on the example inputs (RuntimeError: REASON); pass inputs that"
        " it takes, or none (each layer then chooses at its first call).",
    ),
    Call(
        "too many inputs",
        lambda: g3dswap.convert(net(), (torch.ones(1), torch.ones(1))),
        ArgumentError,
        "example_inputs do not fit Sequential.forward(input): too many positional arguments.",
    ),
    Call(
        "a compiled model",
        lambda: g3dswap.convert(compiled()),
        ConvertError,
        "The model is wrapped by torch.compile; convert the original (its _orig_mod) and compile the result.",
    ),
    Call(
        "a layer that cannot be swapped",
        lambda: g3dswap.convert(subclassed(), strict=True),
        ConvertError,
        "With strict=True every grouped convolution has to be swapped, and '0' cannot be: Special"
        " is a subclass, whose forward may do more than nn.Conv3d's; exclude it, or leave strict "
        "out.",
    ),
    Call(
        "a missing plan",
        lambda: g3dswap.convert(net(), plan="missing.json"),
        PlanError,
        "The plan missing.json cannot be read (No such file or directory); check the path.",
    ),
    Call(
        "a damaged plan",
        lambda: g3dswap.convert(net(), plan="plan.json"),
        PlanError,
        "The plan plan.json is not JSON (REASON); save it again with g3dswap.save_plan.",
    ),
    Call(
        "a checkpoint as the plan",
        lambda: g3dswap.convert(net(), plan="model.pth"),
        PlanError,
        "The plan model.pth is not JSON (REASON); save it again with g3dswap.save_plan.",
    ),
    Call(
        "a report of nothing",
        lambda: g3dswap.report(net()),
        ArgumentError,
        "This Sequential was not converted by g3dswap.convert: there is nothing to report; "
        "g3dswap.inspect(model) shows what a conversion would do.",
    ),
    Call(
        "a plan of nothing",
        lambda: g3dswap.save_plan(net(), "new.json"),
        ArgumentError,
        "save_plan() takes a model that g3dswap.convert returned, and this Sequential is none; "
        "convert it first.",
    ),
    Call(
        "two different models",
        lambda: g3dswap.verify(net(), conv(), torch.ones(1, 4, 5, 5, 5)),
        ArgumentError,
        "before and after are not the same model: their parameter '0.bias' differs in name or "
        "shape; pass a model and its converted copy.",
    ),
    Call(
        "groups that do not divide",
        lambda: g3dswap.Grouped3D(6, 6, 3, groups=4),
        ArgumentError,
        "in_channels=6 is not divisible by groups=4; choose a group count that divides both channel counts.",
    ),
    Call(
        "filters that do not divide",
        lambda: g3dswap.Grouped3D(4, 6, 3, groups=4),
        ArgumentError,
        "out_channels=6 is not divisible by groups=4; choose a group count that divides both channel counts.",
    ),
    Call(
        "an input of two dimensions",
        lambda: grouped()(torch.ones(4, 5)),
        ArgumentError,
        "The input of shape (4, 5) has 2 dimensions; pass one of shape (4, T, H, W) or (N, 4, T, H, W).",
    ),
    Call(
        "an input of other channels",
        lambda: grouped()(torch.ones(1, 5, 5, 5, 5)),
        ArgumentError,
        "The input of shape (1, 5, 5, 5, 5) has 5 channels; pass one of shape (4, T, H, W) or (N,"
        " 4, T, H, W).",
    ),
    Call(
        "an input of another dtype",
        lambda: grouped()(torch.ones(1, 4, 5, 5, 5).double()),
        ArgumentError,
        "The input is float64 but the weight is float32; convert one of them with .to(dtype), or "
        "run under autocast.",
    ),
    Call(
        "kernel of two extents",
        lambda: geometry(kernel=(3, 3)),
        ArgumentError,
        "kernel=(3, 3) must be three integers (time, height, width) of at least 1.",
    ),
    Call(
        "unknown pass",
        lambda: Problem("backward", geometry()),
        ArgumentError,
        "direction='backward' is unknown; use one of forward, grad_input, grad_weight.",
    ),
    Call(
        "unknown dtype",
        lambda: Problem("forward", geometry(), torch.int8),
        ArgumentError,
        "dtype int8 has no kernels; use one of float32, float64, bfloat16, float16.",
    ),
    Call(
        "an input that is no shape",
        lambda: parse_inputs("3,"),
        ArgumentError,
        "'' is no shape: write positive extents joined by x, batch first, such as 8x3x16x112x112.",
    ),
    Call(
        "arguments that are no object",
        lambda: parse_kwargs("4"),
        ArgumentError,
        "'4' is no JSON object; write one such as '{\"depth\": 101}'.",
    ),
    Call(
        "an unknown key",
        lambda: checkpoint.read("two.pth", key="model"),
        CheckpointError,
        "two.pth has no weights under --key model; the keys that hold weights are state_dict, ema.",
    ),
    Call(
        "a cache key that is no JSON",
        lambda: Cache().get({"device_name": "x", "size": {1}}),
        ArgumentError,
        "{'device_name': 'x', 'size': {1}} is not a cache key: Object of type set is not JSON "
        "serializable; use JSON scalars and lists.",
    ),
    Call(
        "no notation",
        lambda: parse("def f(float(N) A) -> (B) {\n B(n) = A(n }"),
        NotationError,
        "line 2, column 13: expected ',' or ')' after a subscript, found '}'\n"
        "   B(n) = A(n }\n"
        "              ^",
    ),
]


@pytest.mark.parametrize("call", PYTHON, ids=lambda call: call.name)
def test_python(call: Call, folder: Path) -> None:
    before = snapshot(folder)
    with pytest.raises(call.error) as caught:
        call.call()
    assert re.fullmatch(re.escape(call.answer).replace("REASON", "[^;]+"), str(caught.value)), str(
        caught.value
    )
    assert snapshot(folder) == before
    assert not Path(MARKER).exists()


def test_there_are_enough_rows() -> None:
    assert len(COMMAND_LINE) + len(PYTHON) >= 40
    assert len({m.answer for m in COMMAND_LINE}) >= 40
