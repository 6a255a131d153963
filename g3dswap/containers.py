"""Getting tensors into and out of files, whole.

What a file is, says sniff.py; what the loaded objects mean, checkpoint.py.
"""

from __future__ import annotations

import contextlib
import importlib
import lzma
import os
import pickle
import re
import secrets
import stat
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .errors import ArgumentError, CheckpointError, G3DSwapError, first_line
from .sniff import Container

_NEVER = ("builtins", "importlib", "nt", "os", "posix", "pty", "runpy", "shutil", "subprocess", "sys")
"""Modules whose functions a pickle may not call, short of trusting all of it."""
_SHOWN = 12  # so many names are listed in a message


def load(
    path: Path,
    container: Container,
    *,
    trust: bool = False,
    safe_globals: Sequence[str] = (),
    label: str | None = None,
) -> tuple[Any, dict[str, str] | None]:
    """All that a file holds, and its safetensors metadata.

    ``safe_globals`` are names of classes and functions, such as ``argparse.Namespace``, that may be used to
    load it beside what is always safe. ``label`` is what messages call the file. Raises CheckpointError and
    OSError.
    """
    label = label or str(path)
    if container == "safetensors":
        return _load_safetensors(path, label)
    with open(path, "rb") as file:
        return _load_trusted(label, file) if trust else _load_safely(label, file, safe_globals), None


def save(
    path: Path, container: Container, payload: Any, metadata: dict[str, str] | None, *, force: bool
) -> None:
    """Write ``payload`` in the given container: whole or not at all. Raises CheckpointError."""
    atomic_write(path, lambda file: dump(file, container, payload, metadata), force=force)


def dump(file: IO[bytes], container: Container, payload: Any, metadata: dict[str, str] | None) -> None:
    """Write ``payload`` in the given container to an open file."""
    if container == "safetensors":
        file.write(safetensors.torch.save(payload, metadata=metadata))
    else:
        torch.save(payload, file, _use_new_zipfile_serialization=container == "zip")


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


@contextlib.contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip archive to read; what is wrong with it is a CheckpointError, also while it is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except G3DSwapError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({_first_line(error)}); copy or download it again."
        ) from error


# Loading.


def _load_safetensors(path: Path, label: str) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # a dtype that this PyTorch lacks, a shape that overflows, ...
        raise CheckpointError(
            f"{label} is a truncated or damaged safetensors file ({_first_line(error)}); "
            "copy or download it again."
        ) from None


def _load_safely(label: str, file: IO[bytes], safe_globals: Sequence[str]) -> Any:
    allowed: list[Any] = [(_imported(name), name) for name in safe_globals]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the restricted unpickler raises whatever a damaged byte leads to
        # PyTorch's wording for what its restricted unpickler refuses.
        found = re.search(
            r"(?:GLOBAL|but got|unrecognized function|Trying to load) ([\w.]+\.\w+)", str(error)
        )
        if isinstance(error, pickle.UnpicklingError) and found:
            raise CheckpointError(_refusal(label, _unsafe(file, allowed) or [found[1]])) from None
        raise _damaged(label, error) from None


def _unsafe(file: IO[bytes], allowed: list[Any]) -> list[str]:
    """Every name that the pickle in a file refers to and that is not safe; none where PyTorch cannot say."""
    file.seek(0)
    try:
        with torch.serialization.safe_globals(allowed):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # a file of the old format, or a damaged one: the first name is known all the same
        return []


def _refusal(label: str, names: list[str]) -> str:
    if any(name.startswith("torch.distributed.") for name in names):
        return (
            f"{label} is one rank's part of a sharded model; gather its weights (FSDP: FULL_STATE_DICT, or "
            "get_model_state_dict of torch.distributed.checkpoint with full_state_dict=True) and save those."
        )
    shown = ", ".join(names[:_SHOWN]) + (f", ... and {len(names) - _SHOWN} more" if names[_SHOWN:] else "")
    what, it = ("pickled object", "it") if len(names) == 1 else ("pickled objects", "them")
    allow = f"allow {it} alone with --safe-global {'NAME' if names[1:] else names[0]}"
    allow += " for each, or " if names[1:] else ", or "
    if any(name.partition(".")[0] in _NEVER for name in names):
        allow = ""
    return (
        f"{label} holds the {what} {shown}, and unpickling {it} can run any code; "
        f"{allow}pass --trust (trust=True) only if you trust where the file comes from."
    )


def _imported(name: str) -> Any:
    """The class or function of a qualified name; imports its module."""
    parts = name.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ArgumentError(f"--safe-global {name!r} is no qualified name; write one such as pkg.mod.Class.")
    if parts[0] in _NEVER:
        raise ArgumentError(
            f"--safe-global {name} could do anything that you can; use --trust if you trust the file."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy.core, say, is a deprecated name in files that are not old
        for cut in range(len(parts) - 1, 0, -1):
            try:
                value: Any = importlib.import_module(".".join(parts[:cut]))
                for part in parts[cut:]:
                    value = getattr(value, part)
                return value
            except (ImportError, AttributeError):
                continue
    raise ArgumentError(
        f"--safe-global {name} cannot be imported; run this where it can, or check the spelling."
    )


def _load_trusted(label: str, file: IO[bytes]) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{label} needs code that is not here ({_first_line(error)}); "
            "run this where the classes of its objects can be imported."
        ) from error
    except OSError:
        raise
    except Exception as error:  # the file's own code may raise anything
        raise _damaged(label, error) from error


def _damaged(label: str, error: Exception) -> CheckpointError:
    reason = (
        "" if isinstance(error, pickle.UnpicklingError) else f": {_first_line(error)}"
    )  # a page of advice
    return CheckpointError(
        f"{label} is truncated or damaged ({type(error).__name__}{reason}); copy or download it again."
    )


def _first_line(error: BaseException) -> str:
    return first_line(error, type(error).__name__).rstrip(". ")
