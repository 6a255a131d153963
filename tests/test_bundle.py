"""MONAI bundles, as a folder and as a zip archive; what their configuration may do without trust."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from g3dswap import bundle, checkpoint, cli
from g3dswap.errors import ArgumentError, CheckpointError, ConvertError
from tests.test_checkpoint import bits, load

OPTIONS = ["--input", "1x1x16x16x16", "--tune", "none", "--quiet", "--device", "cpu"]
GROUPED = {"_target_": "torch.nn.Conv3d", "in_channels": 4, "out_channels": 4, "kernel_size": 3, "groups": 4}


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.main, [str(word) for word in words], prog_name="g3dswap")


def make(folder: Path, network: Any, **others: Any) -> Path:
    """A bundle of this description, with weights that are of no use."""
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "configs/inference.json").write_text(json.dumps({"network_def": network, **others}))
    torch.save({"weight": torch.ones(4, 1, 3, 3, 3)}, folder / "models/model.pt")
    return folder


def network(folder: Path, *, trust: bool = False) -> nn.Module:
    read = checkpoint.read(folder)
    assert read.bundle is not None
    return read.bundle.network(trust=trust)


def refusal(folder: Path) -> str:
    with pytest.raises((CheckpointError, ArgumentError)) as caught:
        network(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}: configs/inference.json ")
    return message.partition("configs/inference.json ")[2].removesuffix(".")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that MONAI made, of a network with depthwise convolutions."""
    monai = pytest.importorskip("monai.bundle")
    folder = tmp_path_factory.mktemp("monai") / "organ"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai.networks.nets import MedNeXt

        description: dict[str, Any] = {
            "spatial_dims": 3,
            "init_filters": 4,
            "in_channels": 1,
            "out_channels": 2,
            "encoder_expansion_ratio": 2,
            "decoder_expansion_ratio": 2,
            "bottleneck_expansion_ratio": 2,
            "kernel_size": 3,
            "blocks_down": [1],
            "blocks_bottleneck": 1,
            "blocks_up": [1],
        }
        monai.init_bundle(folder, network=MedNeXt(**description))
    path = folder / "configs/inference.json"
    config = json.loads(path.read_text())
    config["network_def"] = {"_target_": "MedNeXt", **description, "spatial_dims": "@dims"}
    config["dims"] = 3
    path.write_text(json.dumps(config))
    return folder


@pytest.fixture(params=["folder", "zip"])
def organ(request: pytest.FixtureRequest, original: Path, tmp_path: Path) -> Path:
    """It, or a zip archive of it."""
    if request.param == "folder":
        return Path(shutil.copytree(original, tmp_path / "organ"))
    archive = shutil.make_archive(str(tmp_path / "organ"), "zip", original.parent, "organ")
    return Path(archive).rename(tmp_path / "organ.bin")


def contents(path: Path) -> dict[str, bytes]:
    """Name -> content of all files but the weights."""
    if path.is_dir():
        files = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    else:
        with zipfile.ZipFile(path) as archive:
            files = {
                e.filename.partition("/")[2]: archive.read(e) for e in archive.infolist() if not e.is_dir()
            }
    return {name: content for name, content in files.items() if name != "models/model.pt"}


@pytest.mark.slow
def test_a_bundle_of_monai_is_converted(organ: Path, original: Path, tmp_path: Path) -> None:
    assert "would be swapped" in run("inspect", organ, *OPTIONS[:2], *OPTIONS[-2:]).stdout
    result = run("convert", organ, "-o", tmp_path / "fast", *OPTIONS)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].endswith("fast.plan.json.")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([organ.name, "fast", "fast.plan.json"])
    assert contents(tmp_path / "fast") == contents(organ)
    before, after = (checkpoint.read(path) for path in (organ, tmp_path / "fast"))
    assert bits(after.payload) == bits(before.payload) == bits(load(original / "models/model.pt"))
    assert run("convert", organ, "-o", tmp_path / "fast", *OPTIONS).exit_code == 1
    # MONAI itself loads what came out.
    parser = sys.modules["monai.bundle"].ConfigParser()
    parser.read_config(str(original / "configs/inference.json"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser.get_parsed_content("network_def").load_state_dict(after.payload)


def test_changed_weights_are_written(organ: Path, tmp_path: Path) -> None:
    read = checkpoint.read(organ)
    changed = {name: value + 1 for name, value in read.state_dict.items()}
    checkpoint.write(tmp_path / "fast", read, changed)
    assert bits(checkpoint.read(tmp_path / "fast").state_dict) == bits(type(read.state_dict)(changed))


def test_a_failed_write_leaves_nothing(organ: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    read = checkpoint.read(organ)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left on device; nothing was changed"):
        checkpoint.write(tmp_path / "fast", read, read.state_dict)
    assert [p.name for p in tmp_path.iterdir()] == [organ.name]


def test_yaml(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    pytest.importorskip("monai")
    folder = make(tmp_path / "b", GROUPED)
    text = "network_def:\n  _target_: torch.nn.Conv3d\n  in_channels: 4\n  out_channels: '@n'\n"
    (folder / "configs/inference.json").rename(folder / "configs/inference.yaml")
    (folder / "configs/inference.yaml").write_text(f"{text}  kernel_size: [3, 3, 3]\nn: 4\n")
    assert isinstance(network(folder), nn.Conv3d)
    (folder / "configs/inference.yaml").write_text("network_def: !!python/object/apply:os.mkdir ['harm']\n")
    with pytest.raises(CheckpointError, match=r"inference.yaml is damaged \(ConstructorError\)"):
        network(folder)
    assert not Path("harm").exists()


def test_disabled_parts_and_descriptions(tmp_path: Path) -> None:
    layers = {"_desc_": "a layer", **GROUPED, "padding": "@pad::0", "device": {**GROUPED, "_disabled_": True}}
    built = network(make(tmp_path / "b", layers, pad=[1, 2]))
    assert isinstance(built, nn.Conv3d)
    assert built.padding == (1, 1, 1)


PASS = (
    "; pass --trust (trust=True) only if you trust where the bundle comes from, or name the function that "
    "builds the network with --arch pkg.mod:factory"
)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (
            {"_target_": "os.mkdir", "path": "harm"},
            "calls 'os.mkdir' at network_def, which is no known class of layers",
        ),
        (
            {"_target_": "torch.nn.modules.conv.os.mkdir", "path": "harm"},
            "calls 'torch.nn.modules.conv.os.mkdir' at network_def, which is no known class of layers",
        ),
        (
            {"_target_": "torch.nn.init.normal_"},
            "calls 'torch.nn.init.normal_' at network_def, which is no known class of layers",
        ),
        (
            "$__import__('os').mkdir('harm')",
            "has the expression \"$__import__('os').mkdir('harm')\" at network_def",
        ),
        ({**GROUPED, "bias": "$True"}, "has the expression '$True' at network_def::bias"),
        ({**GROUPED, "bias": "@other"}, "has the expression '$True' at other"),
        ({**GROUPED, "bias": "%other.json::x"}, "has the expression '%other.json::x' at network_def::bias"),
        ({**GROUPED, "_mode_": "debug"}, "uses _mode_ at network_def"),
        ({**GROUPED, "_requires_": "@other"}, "uses _requires_ at network_def"),
        ({**GROUPED, "pretrained": True}, "loads other weights (pretrained) at network_def"),
    ],
)
def test_what_needs_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, description: Any, message: str
) -> None:
    pytest.importorskip("monai")
    monkeypatch.chdir(tmp_path)
    assert refusal(make(Path("b"), description, other="$True")) == message + PASS
    assert not Path("harm").exists()


@pytest.mark.parametrize("description", ["@network_def", {"a": "@x"}, [["@y"]]])
def test_circles_and_missing_references(tmp_path: Path, description: Any) -> None:
    message = refusal(make(tmp_path / "b", description, x="@x", z=1))
    assert message in (
        "is nested too deeply, or refers to itself; repair it",
        "refers to 'y', which is not there; repair it",
    )


def test_references_that_multiply_are_bounded(tmp_path: Path) -> None:
    levels = {f"l{i}": [f"@l{i + 1}"] * 10 for i in range(20)}
    assert "nested too deeply" in refusal(make(tmp_path / "b", "@l0", **levels, l20=1))


def test_expressions_with_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("monai")
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = make(tmp_path / "b", {**GROUPED, "bias": "$1 > 2", "groups": "@four"}, four="$2 + 2")
    built = network(folder, trust=True)
    assert isinstance(built, nn.Conv3d)
    assert built.bias is None
    result = run("inspect", folder, "--trust", "--device", "cpu")
    assert "1 grouped layer" in result.stdout or "1 of 1" in result.stdout, result.output


def test_networks_that_cannot_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "a", {**GROUPED, "groups": 3})
    with pytest.raises(
        ConvertError, match=r"building its 'network_def' raised ValueError: in_channels must be"
    ):
        network(folder)
    with pytest.raises(
        CheckpointError, match=r"'network_def' is a list, no torch.nn.Module; name the function"
    ):
        network(make(tmp_path / "b", [1]))
    (folder / "configs/inference.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"describes no 'network_def'; name the function that builds"):
        network(folder)
    (folder / "configs/inference.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"inference.json is damaged \(JSONDecodeError\)"):
        network(folder)
    monkeypatch.setitem(sys.modules, "monai.networks.nets", None)
    with pytest.raises(ArgumentError, match=r"b needs the package monai, which is not here; install it, or"):
        network(make(tmp_path / "c/b", {"_target_": "UNet"}))


def test_an_archive_cannot_write_outside(tmp_path: Path) -> None:
    folder = make(tmp_path / "b", GROUPED)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for name in ("configs/inference.json", "models/model.pt"):
            archive.write(folder / name, name)
        archive.writestr("../harm", "x")
        archive.writestr("configs/../../../harm", "x")
    found = bundle.find(tmp_path / "b.zip")
    with found.folder(lambda name: True) as place:
        assert all(place in p.parents for p in place.rglob("*"))
        assert not (place.parent / "harm").exists()
    assert not place.exists()
    assert isinstance(network(tmp_path / "b.zip"), nn.Conv3d)


def test_weights_that_are_something_else(tmp_path: Path) -> None:
    folder = make(tmp_path / "b", GROUPED)
    (folder / "models/model.pt").write_bytes(b"lr: 0.1\n")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(folder)
    assert str(caught.value) == (
        f"{folder}/models/model.pt is a text file; give a file that torch.save or safetensors wrote."
    )
