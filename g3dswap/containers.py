"""The files that checkpoints come in: what a file is, by its content, and getting it in and out whole.

Nothing here looks at what the loaded objects mean; that is checkpoint.py.
"""

from __future__ import annotations

import os
import pickle
import re
import secrets
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .errors import CheckpointError

Container = Literal["zip", "legacy", "safetensors"]

_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6: a pickled number
_SAFETENSORS_HEADER_LIMIT = 100_000_000  # the format's own limit, in bytes


def load(path: Path, *, trust: bool) -> tuple[Container, Any, dict[str, str] | None]:
    """What a checkpoint file is, all it holds, and its safetensors metadata. Raises CheckpointError."""
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        what = "a directory" if path.is_dir() else "no regular file"
        raise CheckpointError(f"{path} is {what}; give one checkpoint file.")
    try:
        with open(path, "rb") as file:
            container = _sniff(path, file)
            file.seek(0)
            if container == "safetensors":
                return container, *_load_safetensors(path)
            return container, (_load_trusted if trust else _load_safely)(path, file), None
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; give the path of a checkpoint file.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None


def save(
    path: Path, container: Container, payload: Any, metadata: dict[str, str] | None, *, force: bool
) -> None:
    """Write ``payload`` in the given container: whole or not at all. Raises CheckpointError."""

    def fill(file: IO[bytes]) -> None:
        if container == "safetensors":
            file.write(safetensors.torch.save(payload, metadata=metadata))
        else:
            torch.save(payload, file, _use_new_zipfile_serialization=container == "zip")

    atomic_write(path, fill, force=force)


def check_output(path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Raise CheckpointError now if ``path`` could not be written later; else return it as a Path."""
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory; give the name of a file to write.")
    if path.exists() and not path.is_file():  # replacing a device such as /dev/null would break the machine
        raise CheckpointError(f"{path} is no regular file; give the name of a file to write.")
    if not path.parent.is_dir():
        raise CheckpointError(
            f"{path} cannot be written: there is no directory {path.parent}; create it first."
        )
    if not force and os.path.lexists(path):
        raise CheckpointError(f"{path} exists already; pass --force (force=True) to replace it.")
    if not os.access(path.resolve().parent, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"{path} cannot be written: the directory {path.resolve().parent} is read-only for you."
        )
    return path


def atomic_write(
    path: str | os.PathLike[str], fill: Callable[[IO[bytes]], None], *, force: bool = False
) -> None:
    """Let ``fill`` write a file that replaces ``path`` only once it is complete and on the disk."""
    path = check_output(path, force=force)
    target = path.resolve()  # a link stays a link; what it points to is replaced
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        # O_EXCL and not tempfile: the file gets the permissions that the user's umask gives.
        with open(temporary, "xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        if force:
            if target.exists():
                os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
            os.replace(temporary, target)
        else:
            _publish(temporary, target)
        _sync_directory(target.parent)
    except FileExistsError:
        raise CheckpointError(f"{path} exists already; pass --force (force=True) to replace it.") from None
    except (OSError, RuntimeError, pickle.PicklingError, AttributeError, TypeError) as error:
        # PyTorch's zip writer reports a full disk as a RuntimeError; the rest is for what cannot be pickled.
        raise CheckpointError(
            f"{path} cannot be written: {_first_line(error)}; nothing was changed."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _publish(temporary: Path, target: Path) -> None:
    """Give a finished file its name, unless another process took that name meanwhile."""
    try:
        os.link(temporary, target)
    except OSError:  # also a file system without hard links
        if os.path.lexists(target):
            raise FileExistsError(target) from None
        os.replace(temporary, target)


def _sync_directory(directory: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# What kind of file it is.


def _sniff(path: Path, file: IO[bytes]) -> Container:
    """The container, by content; files that are something else are named in the error."""
    head = file.read(4096)
    size = os.fstat(file.fileno()).st_size
    if not head:
        raise CheckpointError(f"{path} is empty; copy or download it again.")
    if head.startswith(b"PK\x03\x04"):
        return _sniff_zip(path, file)
    if head.startswith(_LEGACY_MAGIC):
        return "legacy"
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header <= _SAFETENSORS_HEADER_LIMIT:
        if size < 8 + header:
            raise CheckpointError(f"{path} is a truncated safetensors file; copy or download it again.")
        return "safetensors"
    raise CheckpointError(f"{path} is {_describe(head)}.")


def _sniff_zip(path: Path, file: IO[bytes]) -> Container:
    try:
        with zipfile.ZipFile(file) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        raise CheckpointError(
            f"{path} is truncated or damaged (a zip archive without its end); copy or download it again."
        ) from None
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path} is a TorchScript archive, whose layers cannot be replaced; "
            "save the state_dict of the Python model instead."
        )
    if names & {"archive_format", "models/model.json", "serialized_exported_program.json"}:
        raise CheckpointError(
            f"{path} is a torch.export program, whose layers cannot be replaced; "
            "save the state_dict of the Python model instead."
        )
    if "data.pkl" not in names:
        raise CheckpointError(
            f"{path} is a zip archive that torch.save did not write; give the checkpoint file itself."
        )
    return "zip"


def _describe(head: bytes) -> str:
    """What a file that is no checkpoint seems to be, and what to do."""
    if head[:1] == b"\x80":
        return "a pickle that torch.save did not write, which is never loaded; use torch.save instead"
    if head.startswith(b"\x89HDF"):
        return "an HDF5 file; save the state_dict with torch.save or safetensors"
    if head.startswith((b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"(\xb5/\xfd")):
        return "compressed; decompress it first"
    if head[257:262] == b"ustar":
        return "a tar archive; give the checkpoint file inside it"
    if b"\0" not in head:
        text = head.decode("utf-8", "ignore").lstrip().lower()
        if text.startswith(("<!doctype html", "<html")):
            return "an HTML page, often what a download got instead of the file; download it again"
        if text.startswith("version https://git-lfs"):
            return "a Git LFS pointer; run `git lfs pull` to get the file itself"
        if len(text) > len(head) // 2:
            return "a text file; give a file that torch.save or safetensors wrote"
    return "no checkpoint that torch.save or safetensors wrote; give such a file"


# Loading.


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{path} is a truncated or damaged safetensors file ({_first_line(error)}); "
            "copy or download it again."
        ) from None


def _load_safely(path: Path, file: IO[bytes]) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the restricted unpickler raises whatever a damaged byte leads to
        # PyTorch's wording for what its restricted unpickler refuses.
        found = re.search(r"(?:GLOBAL|but got|unrecognized function) (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and found:
            raise CheckpointError(
                f"{path} holds the pickled object {found[1]}, and unpickling it can run any code; "
                "pass --trust (trust=True) only if you trust where the file comes from."
            ) from None
        raise _damaged(path, error) from None


def _load_trusted(path: Path, file: IO[bytes]) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{path} needs code that is not here ({_first_line(error)}); "
            "run this where the classes of its objects can be imported."
        ) from error
    except OSError:
        raise
    except Exception as error:  # the file's own code may raise anything
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = (
        "" if isinstance(error, pickle.UnpicklingError) else f": {_first_line(error)}"
    )  # a page of advice
    return CheckpointError(
        f"{path} is truncated or damaged ({type(error).__name__}{reason}); copy or download it again."
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__
