"""The command line: what each verb calls, prints, writes and exits with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

import g3dswap
from g3dswap import cli, comprehensions, environment, show
from g3dswap.choice import Record
from g3dswap.choose import Chooser
from g3dswap.errors import ConvertError, G3DSwapWarning, VerificationError
from g3dswap.problem import Geometry
from g3dswap.tc.cache import Cache
from g3dswap.tc.schedule import serial

NETS = '''
import torch
from torch import nn
class Net(nn.Module):
    """A grouped layer between two others; says that it runs."""
    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv3d(2, width, 1)
        self.conv = nn.Conv3d(width, width, 3, padding=1, groups=width)
        self.norm = nn.BatchNorm3d(width)
    def forward(self, x, scale=None):
        print("forward of Net")
        y = self.norm(self.conv(self.stem(x)))
        return y if scale is None else y * scale
def net(width=8): return Net(width)
'''
ARCH = ["--arch", "user_nets:net", "--input", "2x2x4x6x6", "--device", "cpu"]


@dataclass
class FakeReport:
    """Stands in for what g3dswap.report and the like return."""

    ok: bool = True

    def to_dict(self) -> dict[str, Any]:
        return {"swapped": ["conv"]}

    def __str__(self) -> str:
        return "THE REPORT"

    def check(self) -> None:
        if not self.ok:
            raise VerificationError("1 of 9 tensors differ.")


@dataclass
class Api:
    """Records the calls of the package's functions; ``outcome`` is what convert raises, if anything."""

    calls: list[tuple[str, Any]] = field(default_factory=list)
    outcome: BaseException | None = None
    ok: bool = True

    def convert(self, model: nn.Module, example_inputs: Any = None, **options: Any) -> nn.Module:
        self.calls.append(("convert", (model, example_inputs, options)))
        if example_inputs is not None:
            model.eval()(*example_inputs)
        if self.outcome is not None:
            raise self.outcome
        return model

    def inspect(self, model: nn.Module, example_inputs: Any = None, cache: Any = None) -> FakeReport:
        self.calls.append(("inspect", (model, example_inputs)))
        return FakeReport()

    def report(self, model: nn.Module) -> FakeReport:
        return FakeReport()

    def save_plan(self, model: nn.Module, path: Path) -> None:
        Path(path).write_text("the plan")

    def verify(self, before: nn.Module, after: nn.Module, example_inputs: Any) -> FakeReport:
        self.calls.append(("verify", (before, after, example_inputs)))
        return FakeReport(self.ok)

    @property
    def options(self) -> dict[str, Any]:
        """Of the last call of convert."""
        options: dict[str, Any] = next(args[2] for name, args in reversed(self.calls) if name == "convert")
        return options


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with a module of networks and their weights in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "user_nets.py").write_text(NETS)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("user_")]:
        del sys.modules[name]


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    """The package's functions, replaced."""
    fake = Api()
    for name in ("convert", "inspect", "report", "save_plan", "verify"):
        monkeypatch.setattr(g3dswap, name, getattr(fake, name), raising=False)
    return fake


@pytest.fixture
def weights(folder: Path) -> dict[str, Tensor]:
    """Of a trained network, in ``model.pth`` as training left them."""
    state = net().state_dict()
    wrapped = {f"module.{name}": value for name, value in state.items()}
    torch.save(
        {"epoch": 3, "state_dict": wrapped, "history": torch.tensor([float("nan")])}, folder / "model.pth"
    )
    return state


def net() -> nn.Module:
    sys.path.insert(0, os.getcwd())
    import user_nets  # type: ignore[import-not-found]

    model: nn.Module = user_nets.Net()
    return model


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, [str(a) for a in arguments], prog_name="g3dswap")


def succeeds(*arguments: str | Path) -> str:
    """Standard output of a command that must succeed."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def names() -> list[str]:
    return sorted(p.name for p in Path().iterdir() if p.name != "__pycache__")


def load(path: str) -> Any:
    return torch.load(path, weights_only=True)


# inspect


def test_inspect_without_arch_lists_the_weights(weights: dict[str, Tensor]) -> None:
    text = succeeds("inspect", "model.pth")
    assert [line.split() for line in text.splitlines()[:3]] == [
        ["weight", "filters", "channels/group", "kernel", "dtype"],
        ["stem.weight", "8", "2", "1x1x1", "float32"],
        ["conv.weight", "8", "1", "3x3x3", "float32"],
    ]
    assert text.splitlines()[3:] == [
        "2 five-dimensional weights in model.pth; their groups are unknown without the model: "
        "add --arch pkg.mod:factory."
    ]
    data = json.loads(succeeds("inspect", "model.pth", "--json"))
    assert data == {
        "file": "model.pth",
        "groups": None,
        "weights": [
            {"name": "stem.weight", "shape": [8, 2, 1, 1, 1], "dtype": "float32"},
            {"name": "conv.weight", "shape": [8, 1, 3, 3, 3], "dtype": "float32"},
        ],
    }


def test_inspect_with_arch(api: Api, weights: dict[str, Tensor]) -> None:
    assert succeeds("inspect", "model.pth", *ARCH) == "THE REPORT\n"
    [(name, (model, inputs))] = api.calls
    assert name == "inspect"
    assert torch.equal(model.conv.weight, weights["conv.weight"])
    assert [tuple(x.shape) for x in inputs] == [(2, 2, 4, 6, 6)]
    assert json.loads(succeeds("inspect", *ARCH, "--json")) == {"swapped": ["conv"]}


def test_inspect_without_input(api: Api) -> None:
    succeeds("inspect", "--arch", "user_nets:net", "--device", "cpu")
    assert api.calls[0][1][1] is None


def test_the_current_directory_is_importable_only_on_request(api: Api, weights: dict[str, Tensor]) -> None:
    """A file such as ./numpy.py beside a downloaded checkpoint must not be run by just looking at it."""
    sys.path.remove(os.getcwd())  # which the fixture needed
    succeeds("inspect", "model.pth")
    assert os.getcwd() not in sys.path
    succeeds("inspect", "model.pth", "--trust")
    assert sys.path[0] == os.getcwd()


# convert


def test_convert(api: Api, weights: dict[str, Tensor]) -> None:
    text = succeeds("convert", "model.pth", "-o", "fast.pth", *ARCH)
    assert text == "THE REPORT\nWrote fast.pth and fast.plan.json.\n"
    assert names() == ["fast.plan.json", "fast.pth", "model.pth", "user_nets.py"]
    before, after = load("model.pth"), load("fast.pth")
    assert list(before) == list(after)
    assert after["epoch"] == 3
    assert list(before["state_dict"]) == list(after["state_dict"])
    for key, value in before["state_dict"].items():
        assert torch.equal(value, after["state_dict"][key])
        assert value.dtype == after["state_dict"][key].dtype
    assert Path("fast.plan.json").read_text() == "the plan"


def test_convert_hands_all_options_on(api: Api, weights: dict[str, Tensor]) -> None:
    options = [
        "--tune",
        "full",
        "--cache",
        "here",
        "--plan",
        "a.json",
        "--include",
        "conv*",
        "--include",
        "stem",
        "--exclude",
        "n*",
        "--min-speedup",
        "1.5",
        "--strict",
        "--functional",
        "--quiet",
        "--dtype",
        "bf16",
        "--layout",
        "channels_last_3d",
        "--arch-kwargs",
    ]
    inputs = ["--input", "1x2x3x4x5,1:int64"]
    succeeds("convert", "model.pth", "-o", "fast.pth", *ARCH, *inputs, *options, '{"width": 8}')
    assert api.options == {
        "inplace": True,
        "verify": True,
        "tune": "full",
        "cache": Path("here"),
        "plan": Path("a.json"),
        "include": ["conv*", "stem"],
        "exclude": ["n*"],
        "min_speedup": 1.5,
        "strict": True,
        "functional": True,
        "progress": False,
    }
    model, (x, scale), _ = api.calls[0][1]
    assert (x.dtype, scale.dtype) == (torch.bfloat16, torch.int64)
    assert x.is_contiguous(memory_format=torch.channels_last_3d)
    assert model.conv.weight.dtype == torch.bfloat16
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert load("fast.pth")["state_dict"]["module.conv.weight"].dtype == torch.float32
    assert load("fast.pth")["state_dict"]["module.conv.weight"].is_contiguous()


def test_convert_defaults(api: Api, weights: dict[str, Tensor]) -> None:
    succeeds("convert", "model.pth", "-o", "fast.pth", *ARCH)
    assert api.options == {
        "inplace": True,
        "verify": True,
        "tune": "quick",
        "cache": None,
        "plan": None,
        "include": None,
        "exclude": None,
        "min_speedup": 1.05,
        "strict": False,
        "functional": False,
        "progress": True,
    }


def test_convert_verifies_the_whole_model_if_asked(api: Api, weights: dict[str, Tensor]) -> None:
    words = ["convert", "model.pth", "-o", "fast.pth", *ARCH, "--verify"]
    api.ok = False
    succeeds(*words, "none")
    assert (api.options["inplace"], api.options["verify"]) == (True, False)
    Path("fast.pth").unlink()
    Path("fast.plan.json").unlink()
    result = run(*words, "model")
    assert (api.options["inplace"], api.options["verify"]) == (False, True)
    assert [name for name, _ in api.calls] == ["convert", "convert", "verify"]
    assert result.exit_code == 3
    assert result.stderr.endswith("error: 1 of 9 tensors differ.\n")
    assert names() == ["model.pth", "user_nets.py"]
    api.ok = True
    succeeds(*words, "model")


def test_json_alone_is_on_stdout(api: Api, weights: dict[str, Tensor]) -> None:
    result = run("convert", "model.pth", "-o", "fast.pth", *ARCH, "--json")
    assert json.loads(result.stdout) == {"swapped": ["conv"], "output": "fast.pth", "plan": "fast.plan.json"}
    assert result.stderr == "forward of Net\n"


def test_convert_safetensors(api: Api, weights: dict[str, Tensor]) -> None:
    safetensors.torch.save_file(weights, "model.safetensors", metadata={"format": "pt"})
    succeeds("convert", "model.safetensors", "-o", "fast.safetensors", *ARCH)
    with safetensors.safe_open("fast.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name in file.keys():  # noqa: SIM118
            assert torch.equal(file.get_tensor(name), weights[name])
    assert set(names()) >= {"fast.safetensors", "fast.plan.json"}


def test_convert_a_whole_module(api: Api) -> None:
    torch.save({"model": net(), "epoch": 1}, "whole.pth")
    arguments = ["convert", "whole.pth", "-o", "fast.pth", "--input", "2x2x4x6x6", "--device", "cpu"]
    result = run(*arguments)
    assert result.exit_code == 1
    assert "user_nets.Net, and unpickling them can run any code" in result.stderr
    assert not Path("fast.pth").exists()
    kinds = ["user_nets.Net", *(f"torch.nn.modules.{n}" for n in ("conv.Conv3d", "batchnorm.BatchNorm3d"))]
    succeeds(*arguments, *(word for kind in kinds for word in ("--safe-global", kind)))
    assert type(torch.load("fast.pth", weights_only=False)["model"]).__name__ == "Net"
    succeeds(*arguments, "--trust", "--force")
    after = torch.load("fast.pth", weights_only=False)
    assert type(after["model"]).__name__ == "Net"
    assert after["epoch"] == 1


def test_convert_may_replace_its_input(api: Api, weights: dict[str, Tensor]) -> None:
    before = load("model.pth")
    assert run("convert", "model.pth", "-o", "model.pth", *ARCH).exit_code == 1
    succeeds("convert", "model.pth", "-o", "model.pth", *ARCH, "--force")
    assert before.keys() == load("model.pth").keys()


@pytest.mark.parametrize("existing", ["fast.pth", "fast.plan.json"])
def test_nothing_is_overwritten_without_force(api: Api, weights: dict[str, Tensor], existing: str) -> None:
    Path(existing).write_text("mine")
    before = names()
    result = run("convert", "model.pth", "-o", "fast.pth", *ARCH)
    assert result.exit_code == 1
    assert result.stderr == f"error: {existing} exists already; pass --force (force=True) to replace it.\n"
    assert not api.calls  # known before any work is done
    assert names() == before
    assert Path(existing).read_text() == "mine"
    succeeds("convert", "model.pth", "-o", "fast.pth", *ARCH, "--force")
    assert names() == ["fast.plan.json", "fast.pth", "model.pth", "user_nets.py"]


@pytest.mark.parametrize("before", [None, "old plan"])
def test_a_failed_write_leaves_neither_file(
    api: Api, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    if before:
        Path("fast.plan.json").write_text(before)
    existing = names()
    monkeypatch.setattr(torch, "save", full)
    result = run("convert", "model.pth", "-o", "fast.pth", *ARCH, "--force")
    assert result.exit_code == 1
    assert result.stderr.endswith(
        "error: fast.pth cannot be written: [Errno 28] No space left on device; nothing was changed.\n"
    )
    assert names() == existing
    assert not before or Path("fast.plan.json").read_text() == before


# tune and verify


def test_tune_a_model(api: Api, weights: dict[str, Tensor]) -> None:
    assert succeeds("tune", *ARCH) == "THE REPORT\n"
    assert succeeds("tune", "model.pth", *ARCH, "--cache", "here") == "THE REPORT\n"
    assert api.options["cache"] == Path("here")
    assert names() == ["model.pth", "user_nets.py"]


def test_tune_a_convolution(api: Api) -> None:
    shape = (
        "--channels 6 --filters 12 --groups 3 --size 4x5x6 --kernel 1x3x3 --stride 1x2x2 --padding 0x1x1 "
        "--dilation 2 --batch 2 --bias --device cpu --dtype float64"
    )
    succeeds("tune", *shape.split())
    model, (x,), _ = api.calls[0][1]
    conv = model.conv
    assert (conv.in_channels, conv.out_channels, conv.groups, conv.kernel_size) == (6, 12, 3, (1, 3, 3))
    assert (conv.stride, conv.padding, conv.dilation) == ((1, 2, 2), (0, 1, 1), (2, 2, 2))
    assert conv.bias is not None
    assert conv.weight.dtype == x.dtype == torch.float64
    assert x.shape == (2, 6, 4, 5, 6) and x.requires_grad  # all three passes are tuned
    succeeds("tune", *["--channels", "6", "--size", "4", "--device", "cpu"])
    conv = api.calls[1][1][0].conv
    assert (conv.out_channels, conv.groups, conv.kernel_size, conv.bias) == (6, 6, (3, 3, 3), None)


def test_verify(api: Api, weights: dict[str, Tensor]) -> None:
    torch.save({name: value + 1 for name, value in weights.items()}, "fast.pth")
    assert succeeds("verify", "model.pth", "fast.pth", *ARCH) == "THE REPORT\n"
    assert api.options["tune"] == "cached"
    assert api.options["plan"] is None
    assert api.options["verify"] is False
    before, after, inputs = api.calls[-1][1]
    assert torch.equal(before.conv.weight + 1, after.conv.weight)
    assert inputs[0].shape == (2, 2, 4, 6, 6)
    Path("fast.plan.json").write_text("{}")
    api.ok = False
    result = run("verify", "model.pth", "fast.pth", *ARCH)
    assert api.options["plan"] == Path("fast.plan.json")
    assert result.exit_code == 3
    assert result.stdout == "THE REPORT\n"
    assert result.stderr.endswith("error: 1 of 9 tensors differ.\n")


# show

SHAPE = ["--channels", "8", "--size", "4x6x6", "--padding", "1", "--device", "cpu"]


@pytest.mark.parametrize("direction", ["forward", "grad_input", "grad_weight"])
def test_show(direction: str, fresh_cache: Path) -> None:
    data = json.loads(succeeds("show", *SHAPE, "--pass", direction, "--json"))
    assert data["problem"].startswith(f"{direction} 8x4x6x6 to 8x4x6x6, groups 8, kernel 3x3x3, ")
    assert (data["target"], data["origin"]) == ("cpp", "default")
    assert data["notation"].startswith(f"def {direction}(")
    assert data["nest"].startswith(f"nest {direction}\n")
    assert "serial n += 1" in data["nest"]
    assert "grid   g += 1" in data["scheduled"]
    assert data["source"].startswith(f"// {direction}\n")


def test_show_options_reach_the_nest(fresh_cache: Path) -> None:
    words = ["--bias", "--dtype", "bf16", "--layout", "channels_last_3d", "--stage", "nest"]
    nest = succeeds("show", *SHAPE, *words)
    assert nest.startswith(
        "nest forward_bias\n  tensor I: bfloat16 batchx8x1x4x6x6 strides (1152, 1, 1, 288, 48, 8)"
    )


def test_show_takes_a_schedule(fresh_cache: Path) -> None:
    digits = [f"{axis} rest serial" for axis in (*"ngfthwc", "kt", "kh", "kw")]
    plain = {"digits": digits, "fuse": [], "stage": [], "hints": {}}
    data = json.loads(succeeds("show", *SHAPE, "--schedule", json.dumps(plain), "--json"))
    assert data["origin"] == "given"
    assert data["schedule"] == plain
    assert data["scheduled"] == data["nest"]
    for stage in show.STAGES:
        text = succeeds("show", *SHAPE, "--schedule", json.dumps(plain), "--stage", stage)
        assert text == f"{data[stage]}\n"
    text = succeeds("show", *SHAPE, "--schedule", json.dumps(plain))
    assert text.splitlines()[0] == data["problem"]
    assert text.splitlines()[1].startswith("cpp schedule (given): ")
    heads = [f"\n{stage}\n{'-' * len(stage)}\n{data[stage]}\n" for stage in show.STAGES]
    assert text.endswith("".join(heads))


def test_show_prefers_what_was_tuned(fresh_cache: Path) -> None:
    geometry = Geometry(8, 8, 8, (4, 6, 6), (3, 3, 3), padding=(1, 1, 1))
    problem = show.problem("forward", geometry, torch.float32, "contiguous", "cpu", False)
    schedule = serial(comprehensions.nest(problem)).to_json()
    record = Record(1, "quick", False, schedule, 1.0, 2.0, 1e-8, 1e-6)
    cache = Cache()
    cache.put(Chooser(cache, "cached").key(problem), record.to_json())
    data = json.loads(succeeds("show", *SHAPE, "--json"))
    assert (data["origin"], data["schedule"]) == ("tuned", schedule)
    assert json.loads(succeeds("show", *SHAPE, "--json", "--cache", "elsewhere"))["origin"] == "default"


# cache


def key(**fields: Any) -> dict[str, Any]:
    return {"device_name": "NVIDIA H200", "direction": "forward", "size": [1, 2, 3], "groups": 4, **fields}


@pytest.fixture
def store(fresh_cache: Path) -> Cache:
    """Two devices' entries in a cache of their own."""
    cache = Cache()
    cache.put(key(), {"seconds": 1.0})
    cache.put(key(direction="grad_input"), {"seconds": 2.0})
    cache.put(key(device_name="Some CPU"), {"seconds": 3.0})
    return cache


def test_cache_path_and_ls(store: Cache, fresh_cache: Path) -> None:
    assert succeeds("cache", "path") == f"{fresh_cache}\n"
    assert succeeds("cache", "path", "--cache", "elsewhere") == "elsewhere\n"
    *rows, last = succeeds("cache", "ls").splitlines()
    assert last == f"3 entries in {fresh_cache}."
    assert rows[0].split() == ["id", "device", "key", "created"]
    assert "NVIDIA H200" in rows[1]
    assert "forward groups=4 size=1x2x3" in rows[1]
    data = json.loads(succeeds("cache", "ls", "--json"))
    assert [entry["key"] for entry in data] == [entry.key for entry in store.entries()]
    assert [row.split()[0] for row in rows[1:]] == [entry["id"] for entry in data]
    assert not Path("elsewhere").exists()


def test_cache_show(store: Cache) -> None:
    first = json.loads(succeeds("cache", "ls", "--json"))[0]
    assert json.loads(succeeds("cache", "show", first["id"])) == first
    assert json.loads(succeeds("cache", "show", first["id"][:8])) == first


def test_cache_export_and_import(store: Cache, fresh_cache: Path) -> None:
    assert succeeds("cache", "export", "all.jsonl") == "Exported 3 entries to all.jsonl.\n"
    Path("folder").mkdir()
    succeeds("cache", "export", "folder")
    assert sorted(p.name for p in Path("folder").iterdir()) == ["nvidia-h200.jsonl", "some-cpu.jsonl"]
    for target in ("all.jsonl", "folder"):
        result = run("cache", "export", target)
        assert result.exit_code == 1
        assert "exists already; pass --force to replace it.\n" in result.stderr
        succeeds("cache", "export", target, "--force")
        assert succeeds("cache", "import", target, "--cache", f"to-{target}").startswith("Imported 3 entries")
        assert len(Cache(f"to-{target}").entries()) == 3


def test_cache_prune(store: Cache, fresh_cache: Path) -> None:
    assert run("cache", "prune").exit_code == 2
    assert succeeds("cache", "prune", "--older-than", "1") == f"Removed 0 entries from {fresh_cache}.\n"
    assert succeeds("cache", "prune", "--device-name", "Some CPU").startswith("Removed 1 ")
    first = json.loads(succeeds("cache", "ls", "--json"))[0]["id"]
    assert succeeds("cache", "prune", "--id", first, "--device-name", "Some CPU").startswith("Removed 0 ")
    assert succeeds("cache", "prune", "--id", first).startswith("Removed 1 ")
    assert succeeds("cache", "prune", "--all").startswith("Removed 1 ")
    assert Cache().entries() == []


# env, help, exit codes


def test_env(fresh_cache: Path) -> None:
    data = json.loads(succeeds("env", "--json"))
    assert data == environment.describe()
    assert data["torch"] == torch.__version__
    assert data["cache"] == str(fresh_cache)
    text = succeeds("env")
    assert f"torch        {torch.__version__}\n" in text
    assert [line.split()[0] for line in text.splitlines()] == list(data)


def test_env_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert json.loads(succeeds("env", "--json"))["compiler"] is None


def test_help() -> None:
    text = succeeds("--help")
    for line in (
        "0    done",
        "1    error: one line on stderr says what and what to do",
        "2    wrong usage",
        "3    verification failed",
        "130  interrupted",
    ):
        assert f"  {line}\n" in text
    assert "--arch imports the module it names" in text
    for name, command in cli.main.commands.items():
        assert command.help, name
        assert succeeds(name, "--help").startswith(f"Usage: g3dswap {name} ")
    assert succeeds("-h") == text


@pytest.mark.parametrize(
    ("outcome", "code", "stderr"),
    [
        (ConvertError("No."), 1, "error: No.\n"),
        (VerificationError("Differs."), 3, "error: Differs.\n"),
        (KeyboardInterrupt(), 130, "interrupted; what was tuned is in the cache.\n"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nmore"),
            1,
            "error: OutOfMemoryError: CUDA out of memory; use a smaller --input.\n",
        ),
    ],
)
def test_exit_codes(
    api: Api, weights: dict[str, Tensor], outcome: BaseException, code: int, stderr: str
) -> None:
    api.outcome = outcome
    result = run("convert", "model.pth", "-o", "fast.pth", *ARCH)
    assert result.exit_code == code
    assert result.stderr == f"forward of Net\n{stderr}"
    assert result.stdout == ""
    assert names() == ["model.pth", "user_nets.py"]


def test_a_defect_is_not_hidden(api: Api, weights: dict[str, Tensor]) -> None:
    api.outcome = ZeroDivisionError()
    assert isinstance(run("convert", "model.pth", "-o", "fast.pth", *ARCH).exception, ZeroDivisionError)


def test_warnings_are_lines(monkeypatch: pytest.MonkeyPatch, weights: dict[str, Tensor]) -> None:
    script = (
        "import warnings, g3dswap\n"
        "from g3dswap import cli, errors\n"
        "def inspect(*_, **__):\n"
        "    warnings.warn('Careful.', errors.G3DSwapWarning)\n"
        "    raise errors.ConvertError('No.')\n"
        "g3dswap.inspect = inspect\n"
        "cli.main(['inspect', '--arch', 'user_nets:net'])\n"
    )
    root = Path(g3dswap.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "warning: Careful.\nerror: No.\n")
    assert issubclass(G3DSwapWarning, UserWarning)
