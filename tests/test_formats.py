"""Checkpoints as people's tools write them: converted, compared, and loaded where g3dswap is not."""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from g3dswap import checkpoint, cli
from g3dswap.arch import load_weights
from g3dswap.errors import CheckpointError
from tests.test_checkpoint import bits, load, refusal

NETS = '''
from torch import nn
class Net(nn.Module):
    """Two grouped layers; the second shares the weight of the first."""
    def __init__(self):
        super().__init__()
        self.a = nn.Conv3d(4, 4, 3, groups=4, padding=1, bias=False)
        self.b = nn.Conv3d(4, 4, 3, groups=4, padding=1, bias=False)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm3d(4)
    def forward(self, x):
        return self.norm(self.b(self.a(x).relu()))
'''
LIT = '''
import sys, torch, lightning
from torch import nn
from formats_nets import Net
class Lit(lightning.LightningModule):
    """A network, its criterion and a metric, as people write them."""
    def __init__(self, lr=0.1, kinds=("a", "b")):
        super().__init__()
        self.save_hyperparameters()
        self.model = Net()
        self.criterion = nn.BCEWithLogitsLoss(pos_weight=torch.ones(1, 4, 1, 1, 1))
        self.register_buffer("seen", torch.zeros(1))
    def forward(self, x):
        return self.model(x)
    def training_step(self, batch, index):
        y = self(batch)
        return self.criterion(y, (batch > 0).float())
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]
'''
OPTIONS = ["--tune", "none", "--quiet", "--device", "cpu", "--verify", "layers"]
ARCH = ["--arch", "formats_nets:Net", "--input", "1x4x4x5x5", *OPTIONS]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with modules of networks in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "formats_nets.py").write_text(NETS)
    (tmp_path / "formats_lit.py").write_text(LIT)
    yield tmp_path
    for name in ("formats_nets", "formats_lit"):
        sys.modules.pop(name, None)


def net() -> nn.Module:
    import formats_nets  # type: ignore[import-not-found]

    torch.manual_seed(0)
    model: nn.Module = formats_nets.Net()
    return model


def run(*words: str) -> str:
    result = CliRunner().invoke(cli.main, list(words), prog_name="g3dswap")
    assert result.exit_code == 0, result.output
    return result.stdout


def without_g3dswap(code: str) -> None:
    """Run a program where importing g3dswap fails."""
    block = "import sys; sys.modules['g3dswap'] = None\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", block + code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


LOADS = """
import torch, safetensors.torch
from formats_nets import Net
x = torch.ones(1, 4, 4, 5, 5)
before, after = Net(), Net()
for name, model in (("{0}", before), ("{1}", after)):
    {2}
assert torch.equal(before.eval()(x), after.eval()(x))
"""


# State dicts under any prefix


def test_a_state_dict_loads_without_g3dswap() -> None:
    torch.save({"state_dict": {f"module.{k}": v for k, v in net().state_dict().items()}}, "in.pth")
    run("convert", "in.pth", "-o", "out.pth", *ARCH)
    assert bits(load(Path("out.pth"))) == bits(load(Path("in.pth")))
    state = "{k[7:]: v for k, v in torch.load(name, weights_only=True)['state_dict'].items()}"
    body = f"model.load_state_dict({state})"
    without_g3dswap(LOADS.format("in.pth", "out.pth", body))


@pytest.mark.parametrize(
    "prefix", ["model.", "net.backbone.", "module.model._orig_mod.", "generator.module."]
)
def test_the_prefix_is_what_the_model_was_called(prefix: str) -> None:
    state = {f"{prefix}{k}": v for k, v in net().state_dict().items()}
    others = {"criterion.weight": torch.ones(2), "discriminator.a.weight": torch.ones(3)}
    torch.save({"state_dict": {**state, **others}, "epoch": 1}, "in.pth")
    read = checkpoint.read("in.pth").fit(net().state_dict())
    assert read.prefix == prefix
    net().load_state_dict(read.state_dict)
    changed = {k: v + 1 for k, v in read.state_dict.items()}
    checkpoint.write("out.pth", read, changed)
    after = load(Path("out.pth"))["state_dict"]
    assert list(after) == [*state, *others]
    assert bits({k: after[k] for k in others}) == bits(others)
    assert bits({k: after[k] for k in state}) == bits({k: v + 1 for k, v in state.items()})


def test_wrappers_of_parts_are_taken_out_and_put_back() -> None:
    outer = nn.Sequential(net(), nn.ReLU())
    state = outer.state_dict()
    wrapped = {
        k.replace("0.a.", "0._orig_mod.a._checkpoint_wrapped_module."): v + 1 for k, v in state.items()
    }
    assert wrapped.keys() != state.keys()
    torch.save({f"module.{k}": v for k, v in wrapped.items()}, "in.pth")
    read = load_weights(outer, checkpoint.read("in.pth"))
    assert torch.equal(outer[0].a.weight, wrapped["0._orig_mod.a._checkpoint_wrapped_module.weight"])  # type: ignore
    checkpoint.write("out.pth", read, outer)
    assert bits(load(Path("out.pth"))) == bits(load(Path("in.pth")))


def test_several_prefixes_are_listed_and_chosen_by_key() -> None:
    state = net().state_dict()
    both = {f"{p}.{k}": v + i for i, p in enumerate(("model", "model_ema")) for k, v in state.items()}
    torch.save({"state_dict": both}, "in.pth")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read("in.pth").fit(state)
    assert str(caught.value) == (
        "in.pth has weights of this model under several prefixes; choose one with --key: "
        "state_dict.model, state_dict.model_ema."
    )
    read = checkpoint.read("in.pth", key="state_dict.model_ema").fit(state)
    assert torch.equal(read.state_dict["a.weight"], state["a.weight"] + 1)
    checkpoint.write("out.pth", read, read.state_dict)
    assert bits(load(Path("out.pth"))) == bits(load(Path("in.pth")))


def test_arguments_of_a_training_script_need_a_narrow_allowance() -> None:
    payload = {"model": net().state_dict(), "args": argparse.Namespace(lr=0.1, name="x"), "epoch": 4}
    torch.save(payload, "in.pth")
    assert refusal(Path("in.pth")).startswith(
        "holds the pickled object argparse.Namespace, and unpickling it"
    )
    run("convert", "in.pth", "-o", "out.pth", *ARCH, "--safe-global", "argparse.Namespace")
    after = torch.load("out.pth", weights_only=False)
    assert after["args"] == payload["args"]
    assert bits(after["model"]) == bits(payload["model"])


# safetensors


@pytest.mark.parametrize("metadata", [None, {"author": "me"}])
def test_safetensors_with_shared_tensors(metadata: dict[str, str] | None) -> None:
    safetensors.torch.save_model(net(), "in.safetensors", metadata)
    read = checkpoint.read("in.safetensors")
    assert set(read.state_dict) == set(net().state_dict())
    assert len(read.payload) == len(read.state_dict) - 1
    run("convert", "in.safetensors", "-o", "out.safetensors", *ARCH)
    after = checkpoint.read("out.safetensors")
    assert after.metadata == read.metadata  # in any order: safetensors writes it as it comes
    assert bits(after.payload) == bits(read.payload)
    without_g3dswap(
        LOADS.format("in.safetensors", "out.safetensors", "safetensors.torch.load_model(model, name)")
    )


def test_a_tied_weight_that_a_file_leaves_out_stays_out() -> None:
    state = {k: v.clone() for k, v in net().state_dict().items() if k != "b.weight"}
    safetensors.torch.save_file(state, "in.safetensors")
    run("convert", "in.safetensors", "-o", "out.safetensors", *ARCH)
    assert bits(safetensors.torch.load_file("out.safetensors")) == bits(
        safetensors.torch.load_file("in.safetensors")
    )


def test_a_shared_tensor_that_is_shared_no_more_gets_its_own_entry() -> None:
    safetensors.torch.save_model(net(), "in.safetensors")
    read = checkpoint.read("in.safetensors")
    state = {k: v.clone() for k, v in read.state_dict.items()}
    state["b.weight"] += 1
    checkpoint.write("out.safetensors", read, state)
    after = checkpoint.read("out.safetensors")
    assert bits({k: after.state_dict[k] for k in state}) == bits(state)


# Lightning


def test_lightning() -> None:
    lightning = pytest.importorskip("lightning")
    import formats_lit  # type: ignore[import-not-found]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=2,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(dirpath=".", filename="in")],
        )
        clips: Any = torch.randn(4, 4, 3, 4, 4)
        data: Any = torch.utils.data.DataLoader(clips, batch_size=2)
        trainer.fit(formats_lit.Lit(), data)
    assert checkpoint.read("in.ckpt").prefix == ""  # the criterion has none of it
    run("convert", "in.ckpt", "-o", "out.ckpt", *ARCH)
    before, after = load(Path("in.ckpt")), load(Path("out.ckpt"))
    assert bits(before) == bits(after)
    assert {"optimizer_states", "lr_schedulers", "hyper_parameters", "loops"} <= after.keys()
    without_g3dswap(
        "import torch; from formats_lit import Lit\n"
        "a, b = (Lit.load_from_checkpoint(name, map_location='cpu').eval() for name in "
        "('in.ckpt', 'out.ckpt'))\n"
        "x = torch.ones(1, 4, 4, 5, 5)\n"
        "assert torch.equal(a(x), b(x))\n"
    )
    assert "a.weight" in run("inspect", "out.ckpt")


def test_the_prefix_of_a_plain_lightning_module() -> None:
    state = {f"model.{k}": v for k, v in net().state_dict().items()}
    torch.save({"pytorch-lightning_version": "2.6", "state_dict": state}, "in.ckpt")
    assert checkpoint.read("in.ckpt").prefix == "model."
    assert "model." not in run("inspect", "in.ckpt").partition("\n")[2].partition("in in.ckpt")[0]


# What is refused


def test_sharded_checkpoints() -> None:
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": net().state_dict(), "epoch": 3}, checkpoint_id="dcp", no_dist=True)
    command = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
    assert refusal(Path("dcp")) == (
        f"is a sharded checkpoint of torch.distributed; merge it with `{command} dcp model.pth` and give "
        "that file"
    )
    for name in ("__0_0.distcp", ".metadata"):
        assert refusal(Path("dcp", name)) == (
            f"is a part of a sharded checkpoint; merge its folder with `{command} FOLDER model.pth`"
        )
    words = ["-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch", "dcp", "model.pth"]
    subprocess.run([sys.executable, "-W", "ignore", *words], check=True, capture_output=True)
    assert checkpoint.read("model.pth").nesting == ("model",)  # the advice works


class _ShardedTensor:
    """Pickles as one rank's part of a tensor does."""

    def __reduce__(self) -> Any:
        return sharded, ()


def sharded() -> None:
    """Never called."""


def test_one_rank_of_a_sharded_model(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "torch.distributed._shard.sharded_tensor.api"
    module = pytest.importorskip(name)
    monkeypatch.setattr(sharded, "__module__", name)
    monkeypatch.setattr(module, "sharded", sharded, raising=False)
    torch.save({"model": {"a.weight": _ShardedTensor(), "b": torch.ones(1)}}, "in.pth")
    assert refusal(Path("in.pth")).startswith(
        "is one rank's part of a sharded model; gather its weights (FSDP"
    )


def test_folders_that_hold_checkpoints() -> None:
    for folder, name, words in (
        ("hf", "model.safetensors", "is a directory; give the checkpoint file in it, hf/model.safetensors"),
        ("zero", "zero_to_fp32.py", "is a sharded checkpoint of DeepSpeed; merge it with DeepSpeed's own "),
        ("other", "notes.txt", "is a directory; give one checkpoint file, or the folder of a MONAI bundle"),
    ):
        os.mkdir(folder)
        Path(folder, name).touch()
        assert refusal(Path(folder)).startswith(words)
    Path("hf/model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": "b"}}')
    assert refusal(Path("hf/model.safetensors.index.json")).startswith("is the index of a sharded checkpoint")


@pytest.mark.parametrize("protocol", [0, 2])
def test_caffe2_pickles(protocol: int) -> None:
    Path("in.pkl").write_bytes(pickle.dumps({"blobs": {"conv1_w": [1.0]}}, protocol))
    assert refusal(Path("in.pkl")).startswith("is a Caffe2 pickle, which is never loaded; rename its blobs")


def test_archives_that_would_burst() -> None:
    import zipfile

    with zipfile.ZipFile("in.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    assert refusal(Path("in.pth")) == (
        "would unpack to more than 100 times its size, which no checkpoint does; do not use it"
    )


def test_scalars_and_empty_tensors_are_never_taken_for_tied() -> None:
    empty: Tensor = torch.empty(0)
    assert not checkpoint.is_same_tensor(empty, empty)
    assert not checkpoint.is_same_tensor(1, 1)
