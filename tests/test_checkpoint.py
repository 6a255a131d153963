"""Reading and writing checkpoints: what comes out is what went in, and nothing in a file is ever run."""

from __future__ import annotations

import copy
import errno
import io
import os
import pickle
import stat
import sys
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from g3dswap import checkpoint, containers
from g3dswap.errors import CheckpointError


class Net(nn.Module):
    """Two layers and a buffer of another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 8, 3, groups=4)
        self.norm = nn.BatchNorm3d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Wrapper(nn.Module):
    """A model whose own attribute has the name that DataParallel uses."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Net()


class Evil:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def bits(value: Any) -> Any:
    """Nested containers with each tensor replaced by its dtype, shape and bytes."""
    if isinstance(value, Tensor):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
        return str(value.dtype), tuple(value.shape), value.requires_grad, raw
    if isinstance(value, dict):
        return type(value), [(k, bits(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [bits(v) for v in value]
    return value


def training_state(model: nn.Module) -> dict[str, Any]:
    """What a training script saves: an optimizer with momenta, counters, a NaN."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.train()
    model(torch.randn(2, 4, 5, 5, 5)).sum().backward()
    optimizer.step()
    history = {"loss": torch.tensor([1.0, float("nan"), -0.0]), "note": "ünïcode", "best": None}
    return {"epoch": 3, "optimizer": optimizer.state_dict(), "history": history, "rates": (0.1, [1, 2])}


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def wrap(state: dict[str, Any], prefix: str) -> OrderedDict[str, Any]:
    return OrderedDict((prefix + k, v) for k, v in state.items())


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("key", [None, *checkpoint.KNOWN_KEYS])
def test_round_trip_is_bit_for_bit(tmp_path: Path, key: str | None, prefix: str, new_format: bool) -> None:
    model = Net()
    others = training_state(model) if key else {}
    state = wrap(model.state_dict(), prefix)
    state["norm.odd" if not prefix else prefix + "norm.odd"] = torch.tensor([float("nan"), -0.0, 1e-45])
    payload = {**others, key: state} if key else state
    torch.save(payload, tmp_path / "in.bin", _use_new_zipfile_serialization=new_format)

    read = checkpoint.read(tmp_path / "in.bin")
    assert read.prefix == prefix
    assert read.nesting == ((key,) if key else ())
    assert list(read.state_dict) == [*model.state_dict(), "norm.odd"]
    assert read.module is None
    checkpoint.write(tmp_path / "out.bin", read, read.state_dict)

    assert bits(load(tmp_path / "out.bin")) == bits(load(tmp_path / "in.bin"))
    assert zipfile.is_zipfile(tmp_path / "out.bin") == new_format
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.bin", "out.bin"]


def test_state_dict_metadata_is_kept(tmp_path: Path) -> None:
    model = Net()
    torch.save({"model": model.state_dict()}, tmp_path / "in")
    checkpoint.write(tmp_path / "out", checkpoint.read(tmp_path / "in"), model)
    assert load(tmp_path / "out")["model"]._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]


def test_old_layouts_are_loaded_as_pytorch_loads_them(tmp_path: Path) -> None:
    """Before version 2, BatchNorm had no ``num_batches_tracked``."""
    model = Net()
    state = wrap(model.state_dict(), "module.")
    del state["module.norm.num_batches_tracked"]
    versions = {"": {}, "module": {}, "module.conv": {"version": 1}, "module.norm": {"version": 1}}
    state._metadata = versions  # type: ignore[attr-defined]
    torch.save(state, tmp_path / "in")
    read = checkpoint.read(tmp_path / "in")
    assert read.state_dict._metadata == {"": {}, "conv": {"version": 1}, "norm": {"version": 1}}  # type: ignore
    model.load_state_dict(read.state_dict)
    state._metadata["module.norm"]["version"] = 2  # type: ignore[attr-defined]
    torch.save(state, tmp_path / "in")
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(checkpoint.read(tmp_path / "in").state_dict)


def test_only_changed_weights_are_written_anew(tmp_path: Path) -> None:
    model = Net()
    torch.save({"epoch": 7, "state_dict": wrap(model.state_dict(), "module.")}, tmp_path / "in")
    before = load(tmp_path / "in")
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.conv.weight.mul_(2)
    checkpoint.write(tmp_path / "out", checkpoint.read(tmp_path / "in"), changed)
    after = load(tmp_path / "out")
    assert torch.equal(after["state_dict"]["module.conv.weight"], 2 * model.conv.weight)
    del before["state_dict"]["module.conv.weight"], after["state_dict"]["module.conv.weight"]
    assert bits(before) == bits(after)


def test_weights_keep_their_dtype_when_the_model_was_moved(tmp_path: Path) -> None:
    model = Net()
    torch.save(model.state_dict(), tmp_path / "in")
    checkpoint.write(tmp_path / "out", checkpoint.read(tmp_path / "in"), model.to(torch.bfloat16))
    assert bits(load(tmp_path / "out")) == bits(load(tmp_path / "in"))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    weight = torch.randn(1000)
    torch.save({"a": weight, "b": weight}, tmp_path / "in")
    read = checkpoint.read(tmp_path / "in")
    checkpoint.write(tmp_path / "out", read, {k: v.clone() for k, v in read.state_dict.items()})
    after = load(tmp_path / "out")
    assert after["a"].data_ptr() == after["b"].data_ptr()


def test_the_input_is_left_alone(tmp_path: Path) -> None:
    model = Net()
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, tmp_path / "in")
    whole = (tmp_path / "in").read_bytes()
    read = checkpoint.read(tmp_path / "in")
    payload = bits(read.payload)
    checkpoint.write(tmp_path / "out", read, Net())
    assert (tmp_path / "in").read_bytes() == whole
    assert bits(read.payload) == payload


def test_extra_state_and_counters_beside_the_weights_are_kept(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.ones(2), "conv._extra_state": {"scale": 2}, "step": 5}, tmp_path / "in")
    read = checkpoint.read(tmp_path / "in")
    assert read.state_dict.keys() == {"conv.weight", "conv._extra_state"}
    checkpoint.write(
        tmp_path / "out", read, {"conv.weight": torch.zeros(2), "conv._extra_state": {"scale": 2}}
    )
    assert load(tmp_path / "out")["step"] == 5
    assert load(tmp_path / "out")["conv._extra_state"] == {"scale": 2}


def test_averaged_models_are_read_through_their_wrapper(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(Net())
    torch.save(averaged.state_dict(), tmp_path / "in")
    read = checkpoint.read(tmp_path / "in")
    Net().load_state_dict(read.state_dict)
    checkpoint.write(tmp_path / "out", read, read.state_dict)
    averaged.load_state_dict(load(tmp_path / "out"))


def test_fit_keeps_a_prefix_that_is_the_models_own(tmp_path: Path) -> None:
    model = Wrapper()
    torch.save(model.state_dict(), tmp_path / "own")
    torch.save(wrap(model.state_dict(), "module."), tmp_path / "wrapped")
    for name in ("own", "wrapped"):
        fitted = checkpoint.read(tmp_path / name).fit(model.state_dict())
        model.load_state_dict(fitted.state_dict)
        checkpoint.write(tmp_path / f"{name}.out", fitted, model)
        assert bits(load(tmp_path / f"{name}.out")) == bits(load(tmp_path / name))
    assert checkpoint.read(tmp_path / "own").prefix == "module."  # what the file alone suggests


def test_key_chooses_and_may_be_dotted(tmp_path: Path) -> None:
    first, second = Net().state_dict(), Net().state_dict()
    torch.save({"nets": {"g": first, "d.x": second}, "a.b": second, "ema": first}, tmp_path / "in")
    assert bits(checkpoint.read(tmp_path / "in", key="nets.g").state_dict) == bits(first)
    read = checkpoint.read(tmp_path / "in", key="a.b")
    assert bits(read.state_dict) == bits(second)
    checkpoint.write(tmp_path / "out", read, first)
    assert bits(load(tmp_path / "out")["a.b"]) == bits(load(tmp_path / "in")["ema"])
    assert bits(load(tmp_path / "out")["nets"]) == bits(load(tmp_path / "in")["nets"])


def refusal(path: Path, **options: Any) -> str:
    """The message with which a file is refused: one sentence of one line that begins with its name."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    assert "\n" not in message
    assert message.endswith(".")
    return message.removeprefix(f"{path} ").removesuffix(".")


@pytest.mark.parametrize(
    ("payload", "options", "message"),
    [
        (
            {"state_dict": {"w": torch.ones(1)}, "ema": {"w": torch.ones(1)}},
            {},
            "has weights under several keys (state_dict, ema); choose one with --key",
        ),
        (
            {"net": {"w": torch.ones(1)}, "epoch": 1},
            {},
            "has its weights under an unknown key; pass --key net if that is the model's",
        ),
        (
            {"nets": {"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}, "loss": torch.ones(1)},
            {"key": "nets.c"},
            "has no weights under --key nets.c; the keys that hold weights are nets.a, nets.b",
        ),
        ({"w": torch.ones(1)}, {"key": "net"}, "has no weights under --key net; leave --key out"),
        ({"epoch": 1}, {}, "holds no tensors that could be a state_dict; save model.state_dict() instead"),
        (
            {"state_dict": {}},
            {},
            "holds no tensors that could be a state_dict; save model.state_dict() instead",
        ),
        ([torch.ones(1)], {}, "holds a list, no state_dict; save model.state_dict() instead"),
        (torch.ones(1), {}, "holds a Tensor, no state_dict; save model.state_dict() instead"),
    ],
)
def test_what_cannot_be_located(tmp_path: Path, payload: Any, options: dict[str, Any], message: str) -> None:
    torch.save(payload, tmp_path / "in")
    assert refusal(tmp_path / "in", **options) == message


# safetensors


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "author": "ünknown"}])
def test_safetensors_round_trip(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    model = Net().to(torch.bfloat16)
    state = {"module." + k: v for k, v in model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "in.pth", metadata=metadata)  # the extension lies
    read = checkpoint.read(tmp_path / "in.pth")
    assert (read.container, read.prefix, read.metadata) == ("safetensors", "module.", metadata)
    checkpoint.write(tmp_path / "out", read, model)
    after = checkpoint.read(tmp_path / "out")
    assert (after.container, after.metadata) == ("safetensors", metadata)
    assert bits(after.payload) == bits(read.payload)
    assert bits({k: after.payload[k] for k in state}) == bits(state)


def test_damaged_safetensors(tmp_path: Path) -> None:
    whole = safetensors.torch.save({"w": torch.randn(100)})
    (tmp_path / "short").write_bytes(whole[:-8])
    assert refusal(tmp_path / "short").startswith("is a truncated or damaged safetensors file (")
    (tmp_path / "header").write_bytes(whole[:20])
    assert refusal(tmp_path / "header") == "is a truncated safetensors file; copy or download it again"
    (tmp_path / "json").write_bytes(whole[:8] + b"{" + b"}" * (len(whole) - 9))
    assert refusal(tmp_path / "json").startswith("is a truncated or damaged safetensors file (")


# Files that are something else


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.99])
def test_truncated_files(tmp_path: Path, share: float, new_format: bool) -> None:
    torch.save({"model": Net().state_dict()}, tmp_path / "in", _use_new_zipfile_serialization=new_format)
    whole = (tmp_path / "in").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: int(len(whole) * share)])
    message = refusal(tmp_path / "cut")
    assert message.startswith("is truncated or damaged (")
    assert message.endswith("copy or download it again")


def tar_archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pth"), io.BytesIO())
    return buffer.getvalue()


def zip_archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model.pth", b"x")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; copy or download it again"),
        (b"lr: 0.1\nepochs: 5\n", "is a text file; give a file that torch.save or safetensors wrote"),
        (
            b"\n<!DOCTYPE html><html><body>Sign in</body></html>",
            "is an HTML page, often what a download got instead of the file; download it again",
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            "is a Git LFS pointer; run `git lfs pull` to get the file itself",
        ),
        (b"\x89HDF\r\n\x1a\n\0\0", "is an HDF5 file; save the state_dict with torch.save or safetensors"),
        (b"\x1f\x8b\x08\0\0", "is compressed; decompress it first"),
        (tar_archive(), "is a tar archive; give the checkpoint file inside it"),
        (
            zip_archive(),
            "is a zip archive that torch.save did not write; give the checkpoint file itself",
        ),
        (
            pickle.dumps({"w": [1.0]}),
            "is a pickle that torch.save did not write, which is never loaded; use torch.save instead",
        ),
        (b"\0\1\2\3", "is no checkpoint that torch.save or safetensors wrote; give such a file"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "in.pth").write_bytes(content)
    assert refusal(tmp_path / "in.pth") == message
    assert refusal(tmp_path / "in.pth", trust=True) == message


def test_no_file_and_directories(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == "does not exist; give the path of a checkpoint file"
    (tmp_path / "folder").mkdir()
    assert refusal(tmp_path / "folder") == (
        "is a directory; give one checkpoint file, or the folder of a MONAI bundle"
    )
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == "is no regular file; give one checkpoint file"


def test_programs(tmp_path: Path) -> None:
    with warnings.catch_warnings():  # PyTorch deprecates parts of what it uses here itself
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.ReLU(), torch.ones(1)), tmp_path / "script")
        torch.export.save(torch.export.export(nn.ReLU(), (torch.ones(1),)), tmp_path / "export.pt2")
    remedy = "whose layers cannot be replaced; save the state_dict of the Python model instead"
    for options in ({}, {"trust": True}):
        assert refusal(tmp_path / "script", **options) == f"is a TorchScript archive, {remedy}"
        assert refusal(tmp_path / "export.pt2", **options) == (
            "is a torch.export program, no checkpoint; convert it with g3dswap convert"
        )


# Trust


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("place", ["weights", "beside"])
def test_a_malicious_pickle_is_not_run(tmp_path: Path, place: str, new_format: bool) -> None:
    state: dict[str, Any] = dict(Net().state_dict())
    payload = {"state_dict": state}
    (state if place == "weights" else payload)["x"] = Evil(tmp_path / "harm")  # type: ignore[assignment]
    torch.save(payload, tmp_path / "in", _use_new_zipfile_serialization=new_format)
    message = refusal(tmp_path / "in")
    assert message == (
        "holds the pickled object posix.mkdir, and unpickling it can run any code; "
        "pass --trust (trust=True) only if you trust where the file comes from"
    )
    assert not (tmp_path / "harm").exists()
    checkpoint.read(tmp_path / "in", trust=True)
    assert (tmp_path / "harm").is_dir()  # so the file is as malicious as the test says


def test_a_malicious_bare_pickle_is_not_run_even_with_trust(tmp_path: Path) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "in").write_bytes(pickle.dumps(Evil(tmp_path / "harm"), protocol=protocol))
        for trust in (False, True):
            refusal(tmp_path / "in", trust=trust)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("key", [None, "model"])
def test_whole_modules_need_trust(tmp_path: Path, key: str | None) -> None:
    model = nn.Sequential(nn.Conv3d(4, 4, 3, groups=4), nn.ReLU())
    others = {"epoch": 3, "history": torch.tensor([float("nan")])}
    torch.save({key: model, **others} if key else model, tmp_path / "in")
    names = [
        f"torch.nn.modules.{name}" for name in ("activation.ReLU", "container.Sequential", "conv.Conv3d")
    ]
    assert refusal(tmp_path / "in").startswith(
        f"holds the pickled objects {', '.join(names)}, and unpickling"
    )
    narrow = checkpoint.read(tmp_path / "in", safe_globals=names)
    assert isinstance(narrow.module, nn.Sequential)
    assert bits(narrow.state_dict) == bits(model.state_dict())
    read = checkpoint.read(tmp_path / "in", trust=True)
    assert isinstance(read.module, nn.Sequential)
    assert bits(read.state_dict) == bits(model.state_dict())

    checkpoint.write(tmp_path / "out", read, nn.Sequential(nn.Identity()))
    after = torch.load(tmp_path / "out", weights_only=False)
    assert isinstance((after[key] if key else after)[0], nn.Identity)
    if key:
        assert bits({k: after[k] for k in others}) == bits(others)
    with pytest.raises(CheckpointError, match=r"in holds a whole module, so a module must be written"):
        checkpoint.write(tmp_path / "out2", read, read.state_dict)


def test_a_class_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(Net(), tmp_path / "in")
    monkeypatch.delattr(sys.modules[__name__], "Net")
    assert refusal(tmp_path / "in", trust=True).startswith("needs code that is not here (")


# Writing


@pytest.fixture
def small(tmp_path: Path) -> checkpoint.Checkpoint:
    torch.save({"w": torch.ones(3)}, tmp_path / "in")
    return checkpoint.read(tmp_path / "in")


def test_existing_files_are_kept_without_force(tmp_path: Path, small: checkpoint.Checkpoint) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(
        CheckpointError, match=r"out exists already; pass --force \(force=True\) to replace it\.$"
    ):
        checkpoint.write(tmp_path / "out", small, {"w": torch.zeros(3)})
    assert (tmp_path / "out").read_text() == "mine"
    (tmp_path / "out").chmod(0o640)
    checkpoint.write(tmp_path / "out", small, {"w": torch.zeros(3)}, force=True)
    assert load(tmp_path / "out")["w"].tolist() == [0, 0, 0]
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640
    assert not list(tmp_path.glob(".*"))


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    def fill(file: IO[bytes]) -> None:
        file.write(b"ours")
        (tmp_path / "out").write_text("theirs")

    with pytest.raises(CheckpointError, match="exists already"):
        containers.atomic_write(tmp_path / "out", fill)
    assert (tmp_path / "out").read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("links", [True, False])
def test_new_files_follow_the_umask(
    tmp_path: Path, small: checkpoint.Checkpoint, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    previous = os.umask(0o027)
    try:
        checkpoint.write(tmp_path / "out", small, {"w": torch.zeros(3)})
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640
    assert not list(tmp_path.glob(".*"))


def test_a_link_stays_a_link(tmp_path: Path, small: checkpoint.Checkpoint) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    checkpoint.write(tmp_path / "link", small, {"w": torch.zeros(3)}, force=True)
    assert (tmp_path / "link").is_symlink()
    assert load(tmp_path / "real")["w"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("force", [True, False])
def test_a_failed_write_leaves_nothing(
    tmp_path: Path,
    small: checkpoint.Checkpoint,
    force: bool,
    failure: BaseException,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def half(payload: Any, file: IO[bytes], **options: Any) -> None:
        file.write(b"half of it")
        raise failure

    if force:
        (tmp_path / "out").write_text("mine")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(torch, "save", half)
    expected = CheckpointError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        checkpoint.write(tmp_path / "out", small, {"w": torch.zeros(3)}, force=force)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    if isinstance(failure, OSError):
        assert str(caught.value).endswith(
            "out cannot be written: [Errno 28] No space left on device; nothing was changed."
        )


def test_a_module_that_cannot_be_pickled(tmp_path: Path) -> None:
    torch.save(nn.ReLU(), tmp_path / "in")
    read = checkpoint.read(tmp_path / "in", trust=True)
    model = nn.ReLU()
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(CheckpointError, match=r"out cannot be written: .*; nothing was changed\.$"):
        checkpoint.write(tmp_path / "out", read, model)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"is a directory; give the name of a file to write\.$"):
        containers.check_output(tmp_path, force=True)
    with pytest.raises(CheckpointError, match=r"there is no directory .*none; create it first\.$"):
        containers.check_output(tmp_path / "none" / "out")
    with pytest.raises(CheckpointError, match=r"is no regular file; give the name of a file to write\.$"):
        containers.check_output("/dev/null", force=True)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(CheckpointError, match=r"the directory .* is read-only for you\.$"):
        containers.check_output(tmp_path / "out")
