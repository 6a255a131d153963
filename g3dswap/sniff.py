"""What a file or folder of a model is, by its content; what cannot be read is refused with what to do.

Nothing is loaded here: the first bytes, the names in a zip archive and the names in a folder tell enough.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Literal

from .errors import CheckpointError

Container = Literal["zip", "legacy", "safetensors"]
"""Files that hold tensors: what torch.save writes now, what it wrote before 1.6, and safetensors."""

Kind = Literal["zip", "legacy", "safetensors", "program", "bundle"]
"""A program is what torch.export.save writes, a bundle MONAI's folder or zip archive of a whole project."""

PROGRAM = "models/model.json"
CONFIGS = tuple(f"configs/{name}.{end}" for name in ("inference", "train") for end in ("json", "yaml", "yml"))
"""Where the network of a MONAI bundle is described; the first that is there counts."""
WEIGHTS = "models/model.pt"

_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a pickled number
_SAFETENSORS_HEADER_LIMIT = 100_000_000  # the format's own limit, in bytes
_MOST_EXPANSION = 100
"""So many times its size may an archive hold. torch.save stores tensors as they are, once each."""


def sniff(path: Path) -> Kind:
    """What ``path`` is. Raises CheckpointError for all that is not read, and OSError."""
    if path.is_dir():
        return _sniff_folder(path)
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise CheckpointError(f"{path} is no regular file; give one checkpoint file.")
    with open(path, "rb") as file:
        return _sniff_file(path, file)


def bundle_root(names: Iterable[str]) -> str | None:
    """The folder, with its slash, that is a MONAI bundle among these names of files; None if none is."""
    known = set(names)
    roots = [name.removesuffix(WEIGHTS) for name in known if f"/{name}".endswith(f"/{WEIGHTS}")]
    fitting = [root for root in roots if any(root + config in known for config in CONFIGS)]
    return min(fitting, key=len, default=None)


def _sniff_file(path: Path, file: IO[bytes]) -> Kind:
    head = file.read(4096)
    size = os.fstat(file.fileno()).st_size
    if not head:
        raise CheckpointError(f"{path} is empty; copy or download it again.")
    if head.startswith(b"PK\x03\x04"):
        return _sniff_zip(path, file, size)
    if head.startswith(_LEGACY_MAGIC):
        return "legacy"
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header <= _SAFETENSORS_HEADER_LIMIT:
        if size < 8 + header:
            raise CheckpointError(f"{path} is a truncated safetensors file; copy or download it again.")
        return "safetensors"
    raise CheckpointError(f"{path} is {_describe(head)}.")


def _sniff_zip(path: Path, file: IO[bytes], size: int) -> Kind:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, UnicodeDecodeError):
        raise CheckpointError(
            f"{path} is truncated or damaged (a zip archive without its end); copy or download it again."
        ) from None
    if sum(entry.file_size for entry in entries) > _MOST_EXPANSION * size:
        raise CheckpointError(
            f"{path} would unpack to more than {_MOST_EXPANSION} times its size, which no checkpoint does; "
            "do not use it."
        )
    if min(entry.header_offset for entry in entries) if entries else False:
        raise CheckpointError(f"{path} is {_SHARDED_FILE}.")
    full = [entry.filename for entry in entries]
    names = {name.partition("/")[2] for name in full}
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path} is a TorchScript archive, whose layers cannot be replaced; "
            "save the state_dict of the Python model instead."
        )
    if PROGRAM in names:
        return "program"
    _refuse_other_programs(path, names | set(full))
    if "data.pkl" in names:
        return "zip"
    if bundle_root(full) is not None:
        return "bundle"
    raise CheckpointError(
        f"{path} is a zip archive that torch.save did not write; give the checkpoint file itself."
    )


def _refuse_other_programs(path: Path, names: set[str]) -> None:
    if "serialized_exported_program.json" in names:
        raise CheckpointError(
            f"{path} is a torch.export program of an old format; load it with torch.export.load and save it "
            "again with torch.export.save of PyTorch 2.11 or newer."
        )
    if "archive_format" in names:
        raise CheckpointError(
            f"{path} is a package without a torch.export program named model (compiled by AOTInductor, say), "
            "whose layers cannot be replaced; convert the program before compiling it."
        )


_SHARDED_FILE = (
    "a part of a sharded checkpoint; merge its folder with `python -m "
    "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pth`"
)


def _describe(head: bytes) -> str:
    """What a file that is no checkpoint seems to be, and what to do."""
    if b"torch.distributed.checkpoint" in head[:200]:
        return _SHARDED_FILE
    if head[:1] in (b"\x80", b"(") and b"blobs" in head:
        return (
            "a Caffe2 pickle, which is never loaded; rename its blobs to the keys of a PyTorch model with "
            "the converter of its model zoo, and save that model's state_dict with torch.save"
        )
    if head[:1] == b"\x80":
        return "a pickle that torch.save did not write, which is never loaded; use torch.save instead"
    if head.startswith(b"\x89HDF"):
        return "an HDF5 file; save the state_dict with torch.save or safetensors"
    if head.startswith((b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"(\xb5/\xfd")):
        return "compressed; decompress it first"
    if head[257:262] == b"ustar":
        return "a tar archive; give the checkpoint file inside it"
    if b"\0" not in head:
        return _describe_text(head)
    return "no checkpoint that torch.save or safetensors wrote; give such a file"


def _describe_text(head: bytes) -> str:
    text = head.decode("utf-8", "ignore").lstrip().lower()
    if text.startswith(("<!doctype html", "<html")):
        return "an HTML page, often what a download got instead of the file; download it again"
    if text.startswith("version https://git-lfs"):
        return "a Git LFS pointer; run `git lfs pull` to get the file itself"
    if '"weight_map"' in text:
        return "the index of a sharded checkpoint; load all its shards and save the state_dict in one file"
    if len(text) > len(head) // 2:
        return "a text file; give a file that torch.save or safetensors wrote"
    return "no checkpoint that torch.save or safetensors wrote; give such a file"


def _sniff_folder(path: Path) -> Kind:
    names = {entry.name for entry in os.scandir(path)}
    inner = {name for name in (*CONFIGS, WEIGHTS) if (path / name).is_file()}
    if bundle_root(inner) is not None:
        return "bundle"
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        raise CheckpointError(
            f"{path} is a sharded checkpoint of torch.distributed; merge it with `python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {path} model.pth` and give that file."
        )
    if "zero_to_fp32.py" in names or any(name.startswith("zero_pp_rank") for name in names):
        raise CheckpointError(
            f"{path} is a sharded checkpoint of DeepSpeed; merge it with DeepSpeed's own zero_to_fp32.py and "
            "give the file that it writes."
        )
    files = sorted(names & {"model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors"})
    if files:
        raise CheckpointError(f"{path} is a directory; give the checkpoint file in it, {path / files[0]}.")
    raise CheckpointError(
        f"{path} is a directory; give one checkpoint file, or the folder of a MONAI bundle."
    )
