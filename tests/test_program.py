"""torch.export programs: rewritten as data, and run as the original by PyTorch's own loader."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from torch import Tensor, nn

import g3dswap
from g3dswap import choose, decided, program
from g3dswap.cli import main
from g3dswap.errors import CheckpointError, PlanError
from g3dswap.sniff import PROGRAM

pytestmark = pytest.mark.filterwarnings(  # PyTorch's own; and that default kernels are not kept in a cache
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::g3dswap.errors.G3DSwapWarning"
)
QUICK = ["--tune", "none", "--quiet"]


class Net(nn.Module):
    """Grouped layers of many kinds, one of them called twice, and a call of the function."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(2, 8, 1)
        self.grouped = nn.Conv3d(8, 8, 3, padding=1, groups=4)
        self.body = nn.Sequential(nn.Conv3d(8, 16, 3, stride=2, padding=1, groups=8, bias=False), nn.ReLU())
        self.same = nn.Conv3d(16, 16, 3, padding="same", groups=16)
        self.even = nn.Conv3d(16, 16, 2, padding="same", groups=16)
        self.ring = nn.Conv3d(16, 16, 3, padding=1, dilation=1, groups=16, padding_mode="circular")
        self.up = nn.ConvTranspose3d(16, 32, 3, stride=2, padding=1, output_padding=(0, 1, 1), groups=8)
        self.norm = nn.BatchNorm3d(16)
        self.weight = nn.Parameter(torch.randn(32, 1, 1, 1, 1))

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> dict[str, Tensor]:
        y = self.norm(self.body(self.grouped(self.grouped(self.stem(x)))))
        y = self.up(self.ring(self.even(self.same(y))))
        y = F.conv3d(y, self.weight, None, 1, "valid", 1, 32)
        return {"y": y if scale is None else y * scale}


NAMES = ["grouped", "conv3d_2", "body.0", "same", "ring", "up", "conv3d_7"]
"""Of the layers that can be swapped; the second call of a layer and the function have names of nodes."""


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="g3dswap")


def save(
    path: Path, model: nn.Module, *inputs: Any, change: Callable[[Any], Any] | None = None, **how: Any
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model, inputs, **how)
        torch.export.save(change(exported) if change else exported, path)


def records(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {entry.filename.partition("/")[2]: archive.read(entry) for entry in archive.infolist()}


def first_byte(raw: bytes | bytearray, entry: zipfile.ZipInfo) -> int:
    """Where the content of an archive's record begins: after its header, name and padding."""
    lengths = raw[entry.header_offset + 26 : entry.header_offset + 30]
    return entry.header_offset + 30 + sum(int.from_bytes(n, "little") for n in (lengths[:2], lengths[2:]))


def targets(path: Path) -> list[str]:
    nodes = json.loads(records(path)[PROGRAM])["graph_module"]["graph"]["nodes"]
    return [node["target"].removeprefix("torch.ops.") for node in nodes if "conv" in node["target"]]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A program with a dynamic batch."""
    batch = torch.export.Dim("batch", min=1, max=64)
    inputs = (torch.randn(2, 2, 4, 6, 6),)
    save(tmp_path / "in.pt2", Net().eval(), *inputs, dynamic_shapes={"x": {0: batch}})
    return tmp_path / "in.pt2"


def test_what_is_read(saved: Path) -> None:
    read = program.read(saved)
    assert [node.name for node in read.nodes] == NAMES
    first, _, strided, same, ring, up, function = read.nodes
    assert first.shape == (2, 8, 4, 6, 6)
    assert strided.arguments["stride"] == (2, 2, 2)
    assert strided.arguments["bias"] is False
    assert same.arguments["padding"] == (1, 1, 1)
    assert ring.shape == (2, 16, 4, 5, 5)
    assert function.arguments["kernel_size"] == (1, 1, 1)
    assert [node.name for node in read.nodes if node.transposed] == ["up"]
    assert (up.arguments["in_channels"], up.arguments["out_channels"]) == (16, 32)
    assert up.arguments["output_padding"] == (0, 1, 1)
    assert [(item.name, item.reason) for item in read.skipped] == [
        ("even", 'padding="same" adds more on one side; run_decompositions() makes a pad of its own of it'),
    ]


@pytest.mark.slow
def test_convert(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pt2"
    result = run("convert", saved, "-o", out, *QUICK)
    assert result.exit_code == 0, result.output
    assert "even" in result.stdout
    ours = "g3dswap.conv3d.default"
    assert targets(out) == [
        "aten.conv3d.default", ours, ours, ours, ours, "aten.conv3d.padding", ours,
        ours, ours,
    ]  # fmt: skip
    before, after = records(saved), records(out)
    assert list(before) == list(after)
    different = {name for name in before if before[name] != after[name]}
    assert different == {PROGRAM}
    theirs, mine = (torch.export.load(path).module() for path in (saved, out))
    for count in (1, 3):
        x = torch.randn(count, 2, 4, 6, 6)
        torch.testing.assert_close(mine(x), theirs(x))
    raw = out.read_bytes()
    with zipfile.ZipFile(out) as archive:
        for entry in archive.infolist():
            assert entry.compress_type == zipfile.ZIP_STORED
            begin = first_byte(raw, entry)
            assert begin % 64 == 0
            assert raw[begin : begin + entry.file_size] == archive.read(entry)


def test_a_failed_write_leaves_nothing(saved: Path, tmp_path: Path) -> None:
    read = program.read(saved)
    damaged = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith("weight_0"))
    damaged[first_byte(damaged, entry)] ^= 1
    saved.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"is truncated or damaged \(Bad CRC-32 for file"):
        read.write(tmp_path / "out.pt2", program.Layers(read))
    assert [p.name for p in tmp_path.iterdir()] == ["in.pt2"]


@pytest.mark.slow
def test_the_result_may_be_saved_lowered_and_converted_again(saved: Path, tmp_path: Path) -> None:
    run("convert", saved, "-o", tmp_path / "out.pt2", *QUICK)
    loaded = torch.export.load(tmp_path / "out.pt2")
    torch.export.save(loaded.run_decompositions(), tmp_path / "lowered.pt2")
    assert targets(tmp_path / "lowered.pt2").count("g3dswap.conv3d.default") == len(NAMES)
    x = torch.randn(2, 2, 4, 6, 6)
    lowered = torch.export.load(tmp_path / "lowered.pt2").module()
    torch.testing.assert_close(lowered(x), torch.export.load(saved).module()(x))
    result = run("convert", tmp_path / "out.pt2", "-o", tmp_path / "again.pt2", *QUICK)
    assert result.exit_code == 0, result.output
    assert records(tmp_path / "again.pt2")[PROGRAM] == records(tmp_path / "out.pt2")[PROGRAM]


@pytest.mark.slow
def test_lowered_programs(tmp_path: Path) -> None:
    path = tmp_path / "in.pt2"
    save(path, Net().eval(), torch.randn(1, 2, 4, 6, 6), change=lambda e: e.run_decompositions())
    read = program.read(path)
    assert len(read.nodes) == len(NAMES) + 1  # the pad of "same" is a node of its own now
    assert [node.name for node in read.nodes if node.transposed] == ["up"] and not read.skipped
    run("convert", path, "-o", tmp_path / "out.pt2", *QUICK)
    x = torch.randn(1, 2, 4, 6, 6)
    theirs, mine = (torch.export.load(p).module() for p in (path, tmp_path / "out.pt2"))
    torch.testing.assert_close(mine(x), theirs(x))


def test_more_output_padding_than_a_convolution_leaves(tmp_path: Path) -> None:
    model = nn.ConvTranspose3d(4, 4, 3, stride=1, dilation=2, output_padding=1, groups=4)
    save(tmp_path / "in.pt2", model, torch.randn(1, 4, 3, 3, 3))
    (item,) = program.read(tmp_path / "in.pt2").skipped
    assert item.reason == "its output_padding is not below its stride"


@pytest.mark.slow
def test_a_new_process_needs_only_the_import(saved: Path, tmp_path: Path) -> None:
    run("convert", saved, "-o", tmp_path / "out.pt2", *QUICK)
    code = (
        "import sys, torch\n"
        "{}\n"
        "x = torch.ones(2, 2, 4, 6, 6)\n"
        "old, new = (torch.export.load(path).module()(x)['y'] for path in sys.argv[1:])\n"
        "torch.testing.assert_close(new, old)\n"
    )
    for line, works in (("import g3dswap", True), ("", False)):
        words = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            code.format(line),
            str(saved),
            str(tmp_path / "out.pt2"),
        ]
        done = subprocess.run(words, capture_output=True, text=True)
        assert (done.returncode == 0) == works, done.stderr


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layouts_dtypes_and_images_without_a_batch(tmp_path: Path, dtype: torch.dtype) -> None:
    conv = nn.Conv3d(8, 8, 3, groups=8).to(dtype)
    last = torch.randn(2, 8, 4, 5, 6, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    for name, image, layout in (("a", last, "channels_last_3d"), ("b", last[0].contiguous(), "contiguous")):
        path = tmp_path / f"{name}.pt2"
        save(path, nn.Sequential(conv), image)
        (node,) = program.read(path).nodes
        assert (node.layout, node.arguments["dtype"]) == (layout, dtype)
        result = run("convert", path, "-o", tmp_path / f"{name}_out.pt2", *QUICK)
        assert result.exit_code == 0, result.output
        got = torch.export.load(tmp_path / f"{name}_out.pt2").module()(image)
        wanted = conv(image)
        assert (got.shape, got.stride(), got.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
        torch.testing.assert_close(got, wanted)


def test_branches(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Conv3d(4, 4, 3, groups=4) for _ in range(2))

        def forward(self, x: Tensor) -> Any:
            return torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x), (x,))

    path, model = tmp_path / "in.pt2", Branches().eval()
    with torch.no_grad():
        save(path, model, torch.ones(1, 4, 4, 4, 4))
    assert len(program.read(path).nodes) == 2
    assert run("convert", path, "-o", tmp_path / "out.pt2", *QUICK).exit_code == 0
    loaded = torch.export.load(tmp_path / "out.pt2").module()
    with torch.no_grad():
        for sign in (1, -1):
            x = sign * torch.ones(1, 4, 4, 4, 4)
            torch.testing.assert_close(loaded(x), model(x))


def test_plans(saved: Path, tmp_path: Path) -> None:
    """A plan beside the program brings its choices to processes that load it."""
    run("convert", saved, "-o", tmp_path / "out.pt2", *QUICK)
    plan = tmp_path / "out.plan.json"
    result = run("convert", saved, "-o", tmp_path / "again.pt2", "--plan", plan, "--quiet")
    assert result.exit_code == 0, result.output
    assert records(tmp_path / "again.pt2")[PROGRAM] == records(tmp_path / "out.pt2")[PROGRAM]
    choose.forget()
    g3dswap.use_plan(plan)
    loaded, x = torch.export.load(tmp_path / "out.pt2").module(), torch.randn(2, 2, 4, 6, 6)
    with warnings.catch_warnings():  # that nothing is tuned would be a warning
        warnings.simplefilter("error", g3dswap.errors.G3DSwapWarning)
        loaded(x)
    used = {choice.source for choice in decided.lookup().values()}
    assert used == {"default"}
    choose.forget()
    with pytest.raises(PlanError):
        g3dswap.use_plan(saved)


@pytest.mark.slow
def test_other_commands(saved: Path, tmp_path: Path) -> None:
    text = run("inspect", saved).stdout
    assert text.startswith("g3dswap: 7 of 8 grouped layers would be swapped, 0 kept, 1 skipped.")
    assert json.loads(run("inspect", saved, "--json").stdout)["skipped"][0]["name"] == "even"
    assert run("show", saved, "--layer", "body.0", "--stage", "notation").stdout.startswith("def forward(")
    assert run("tune", saved, *QUICK).exit_code == 0
    small = tmp_path / "small.pt2"
    save(small, nn.Sequential(nn.Conv3d(4, 4, 3, groups=4)), torch.randn(1, 4, 4, 5, 5))
    run("convert", small, "-o", tmp_path / "fast.pt2", *QUICK)
    assert run("verify", small, tmp_path / "fast.pt2").exit_code == 1
    result = run("verify", small, tmp_path / "fast.pt2", "--trust")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("g3dswap verification ok")


def test_a_program_without_grouped_layers(tmp_path: Path) -> None:
    save(tmp_path / "in.pt2", nn.Conv3d(2, 2, 1), torch.randn(1, 2, 2, 2, 2))
    result = run("convert", tmp_path / "in.pt2", "-o", tmp_path / "out.pt2", *QUICK)
    assert result.exit_code == 0, result.output
    assert records(tmp_path / "out.pt2")[PROGRAM] == records(tmp_path / "in.pt2")[PROGRAM]


# Files that lie


def forge(source: Path, target: Path, change: Callable[[dict[str, Any]], None] | bytes) -> Path:
    """A copy whose JSON is changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith(PROGRAM):
                data = json.loads(content)
                if not isinstance(change, bytes):
                    change(data)
                content = change if isinstance(change, bytes) else json.dumps(data).encode()
            new.writestr(entry.filename, content)
    return target


def conv_of(data: dict[str, Any]) -> dict[str, Any]:
    nodes = data["graph_module"]["graph"]["nodes"]
    found: dict[str, Any] = next(node for node in nodes if "conv3d" in node["target"])
    return found


@pytest.fixture
def depthwise(tmp_path: Path) -> Path:
    save(tmp_path / "in.pt2", nn.Sequential(nn.Conv3d(4, 4, 3, groups=4)), torch.randn(1, 4, 4, 5, 5))
    return tmp_path / "in.pt2"


def set_sizes(data: dict[str, Any], name: str, sizes: list[Any]) -> None:
    data["graph_module"]["graph"]["tensor_values"][name]["sizes"] = [{"as_int": size} for size in sizes]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (b"{", "is a truncated or damaged torch.export program (JSONDecodeError)"),
        (b"[" * 50_000, "is a truncated or damaged torch.export program (RecursionError)"),
        (lambda d: d.pop("graph_module"), "is a truncated or damaged torch.export program (KeyError)"),
        (
            lambda d: d.update(x=[]) or d["schema_version"].update(major=9),
            "has version 9 of torch.export's format",
        ),
        (lambda d: conv_of(d).update(inputs=3), "is a truncated or damaged torch.export program (TypeError)"),
        (
            lambda d: conv_of(d)["inputs"][3]["arg"].update(as_ints=[0, 1, 1]),
            "damaged torch.export program (Value",
        ),
        (
            lambda d: conv_of(d)["inputs"][3]["arg"].update(as_ints=["x"]),
            "damaged torch.export program (Value",
        ),
        (lambda d: set_sizes(d, "input", [1, 4, 2, 2, 2]), "damaged torch.export program (ValueError)"),
        (lambda d: set_sizes(d, "input", [1, 5, 4, 4, 4]), "damaged torch.export program (ValueError)"),
        (lambda d: set_sizes(d, "input", [2**40, 4, 4, 4, 4]), "damaged torch.export program (ValueError)"),
        (
            lambda d: set_sizes(d, "p_0_weight", [4 << 20, 1, 9, 9, 9]),
            "damaged torch.export program (ValueError)",
        ),
        (lambda d: set_sizes(d, "input", [1, 4, True, 5, 5]), "damaged torch.export program (ValueError)"),
    ],
)
def test_damaged_programs(depthwise: Path, tmp_path: Path, change: Any, message: str) -> None:
    forged = forge(depthwise, tmp_path / "forged.pt2", change)
    with pytest.raises(CheckpointError) as caught:
        program.read(forged)
    assert message in str(caught.value)
    result = run("inspect", forged)
    assert (result.exit_code, result.stderr) == (1, f"error: {caught.value}\n")


def test_expressions_in_a_program_are_not_evaluated(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def change(data: dict[str, Any]) -> None:
        def walk(value: Any) -> None:
            if isinstance(value, dict):
                if "expr_str" in value:
                    value["expr_str"] = "__import__('os').mkdir('harm')"
                for item in value.values():
                    walk(item)
            elif isinstance(value, list):
                for item in value:
                    walk(item)

        walk(data)

    evil = forge(saved, tmp_path / "evil.pt2", change)
    assert run("inspect", evil).exit_code == 0
    assert run("convert", evil, "-o", "out.pt2", *QUICK).exit_code == 0
    assert run("verify", evil, "out.pt2").exit_code == 1
    assert not Path("harm").exists()


def test_a_file_that_changes_meanwhile(depthwise: Path, tmp_path: Path) -> None:
    read = program.read(depthwise)
    forge(depthwise, tmp_path / "other.pt2", lambda d: d.update(opset_version={}))
    (tmp_path / "other.pt2").replace(depthwise)
    with pytest.raises(CheckpointError, match=r"was changed meanwhile; convert it again\.$"):
        read.write(tmp_path / "out.pt2", program.Layers(read))
    assert not (tmp_path / "out.pt2").exists()


def test_programs_of_another_time(tmp_path: Path) -> None:
    for name, record, message in (
        (
            "old",
            "serialized_exported_program.json",
            "is a torch.export program of an old format; load it with",
        ),
        ("aot", "x/archive_format", "is a package without a torch.export program named model (compiled by"),
    ):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(record, "pt2")
        result = run("inspect", tmp_path / name)
        assert message in result.stderr
