"""MONAI bundles: a folder, or a zip archive of one, with a network's description and its weights.

Without trust the description is data: only classes of networks and layers are called, with arguments that
stand in it. MONAI's own parser, which evaluates expressions and imports scripts, runs only with trust.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import os
import secrets
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torch import nn

from .containers import atomic_write, check_output, opened
from .errors import ArgumentError, CheckpointError, ConvertError, described
from .sniff import CONFIGS, WEIGHTS, bundle_root

NETWORK = "network_def"
"""Where a bundle's configuration describes its network."""

_PACKAGES = ("monai.networks.nets", "monai.networks.blocks", "monai.networks.layers", "torch.nn")
"""Where a class may come from that is called without trust."""
_LARGEST_CONFIG = 4 << 20  # bytes
_MOST_VALUES = 100_000  # of a network's description, references resolved
_DEEPEST = 50


@dataclass(frozen=True)
class Bundle:
    """A bundle on the disk."""

    path: Path
    root: str
    """In a zip archive, the folder that is the bundle, with its slash."""
    config: str
    """Name of the configuration, relative to the bundle."""

    @property
    def label(self) -> str:
        """What messages call the file of its weights."""
        return f"{self.path}/{self.root}{WEIGHTS}"

    @contextlib.contextmanager
    def folder(self, wanted: Callable[[str], bool]) -> Iterator[Path]:
        """The bundle as a folder; of a zip archive only those files are unpacked whose names are wanted."""
        if self.path.is_dir():
            yield self.path
            return
        with tempfile.TemporaryDirectory(prefix="g3dswap-") as place:
            with opened(self.path) as archive:
                for entry in archive.infolist():
                    if entry.filename.startswith(self.root) and wanted(entry.filename[len(self.root) :]):
                        archive.extract(entry, place)
            yield Path(place, self.root)

    def network(self, *, trust: bool = False) -> nn.Module:
        """The network that the configuration describes, with fresh weights.

        Raises:
            CheckpointError: it is damaged, describes no network, or would run code and is not trusted.
            ConvertError: building the network raised.
        """
        with self.folder(lambda name: name != WEIGHTS) as folder:
            if trust:
                return self._trusted(folder)
            arguments = _Plain(self, self._read(folder)).resolve(NETWORK)
        return self._built(lambda: _instance(arguments))

    def write(self, path: Path, fill: Callable[[IO[bytes]], None], *, force: bool) -> None:
        """A copy of the bundle whose weights are what ``fill`` writes; whole or not at all."""
        if self.path.is_dir():
            self._write_folder(check_output(path, force=force), fill)
            return

        def copy_all(file: IO[bytes]) -> None:
            with tempfile.TemporaryFile() as weights:
                fill(weights)
                weights.seek(0)
                with opened(self.path) as old, zipfile.ZipFile(file, "w") as new:
                    for entry in old.infolist():
                        with new.open(copy.copy(entry), "w", force_zip64=True) as target:
                            if entry.filename == self.root + WEIGHTS:
                                shutil.copyfileobj(weights, target)
                            else:
                                with old.open(entry) as source:
                                    shutil.copyfileobj(source, target)

        atomic_write(path, copy_all, force=force)

    def _write_folder(self, path: Path, fill: Callable[[IO[bytes]], None]) -> None:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        try:
            shutil.copytree(
                self.path,
                temporary,
                ignore=lambda folder, names: [n for n in names if Path(folder, n) == self.path / WEIGHTS],
            )
            atomic_write(temporary / WEIGHTS, fill)
            if path.exists():  # a file, and --force was given
                path.unlink()
            os.rename(temporary, path)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be written: {error.strerror or error}; nothing was changed."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _read(self, folder: Path) -> dict[str, Any]:
        """The configuration as data."""
        file = folder / self.config
        raw = file.read_bytes()[: _LARGEST_CONFIG + 1]
        if len(raw) > _LARGEST_CONFIG:
            raise CheckpointError(f"{self.path}: {self.config} is larger than {_LARGEST_CONFIG >> 20} MiB.")
        try:
            data = json.loads(raw) if file.suffix == ".json" else _module("yaml", self).safe_load(raw)
        except (ArgumentError, OSError):
            raise
        except Exception as error:  # YAML has a family of exceptions of its own
            raise CheckpointError(
                f"{self.path}: {self.config} is damaged ({type(error).__name__}); copy or download it again."
            ) from error
        if not isinstance(data, dict) or NETWORK not in data:
            raise CheckpointError(
                f"{self.path}: {self.config} describes no {NETWORK!r}; name the function that builds the "
                "network with --arch pkg.mod:factory."
            )
        return data

    def _trusted(self, folder: Path) -> nn.Module:
        """By MONAI's parser: expressions are evaluated, scripts of the bundle may be imported."""
        self._read(folder)
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))

        def build() -> Any:
            parser = _module("monai.bundle", self).ConfigParser()
            parser.read_config(str(folder / self.config))
            return parser.get_parsed_content(NETWORK)

        return self._built(build)

    def _built(self, build: Callable[[], Any]) -> nn.Module:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                network = build()
        except (ArgumentError, CheckpointError):
            raise
        except Exception as error:  # the network's own code may raise anything
            raise ConvertError(
                f"{self.path}: building its {NETWORK!r} raised {described(error)}; "
                "check that MONAI is as new as the bundle, or name another factory with --arch."
            ) from error
        if not isinstance(network, nn.Module):
            raise CheckpointError(
                f"{self.path}: {NETWORK!r} is a {type(network).__name__}, no torch.nn.Module; name the "
                "function that builds the network with --arch pkg.mod:factory."
            )
        return network


def find(path: Path) -> Bundle:
    """The bundle that sniff.py saw in a folder or zip archive."""
    if path.is_dir():
        names = [name for name in (*CONFIGS, WEIGHTS) if (path / name).is_file()]
    else:
        with opened(path) as archive:
            names = archive.namelist()
    root = bundle_root(names)
    if root is None:
        raise CheckpointError(f"{path} is no MONAI bundle any more; give it again when it is whole.")
    return Bundle(path, root, next(config for config in CONFIGS if root + config in names))


def _module(name: str, bundle: Bundle) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = {"yaml": "pyyaml"}.get(name, "monai")
        raise ArgumentError(
            f"{bundle.path} needs the package {package}, which is not here; install it, or name the function "
            "that builds the network with --arch pkg.mod:factory."
        ) from error


@dataclass(frozen=True)
class _Instance:
    """A class to call, with its arguments."""

    target: type[nn.Module]
    arguments: dict[str, Any]


def _instance(value: Any) -> Any:
    if isinstance(value, _Instance):
        return value.target(**{name: _instance(item) for name, item in value.arguments.items()})
    if isinstance(value, dict):
        return {name: _instance(item) for name, item in value.items()}
    return [_instance(item) for item in value] if isinstance(value, list) else value


class _Plain:
    """What a configuration says without running anything: references followed, classes looked up."""

    def __init__(self, bundle: Bundle, config: dict[str, Any]) -> None:
        self.bundle = bundle
        self.config = config
        self.left = _MOST_VALUES

    def resolve(self, place: str) -> Any:
        """The value at a place such as ``network_def`` or ``a::b#0``."""
        return self._value(self._at(place), place, _DEEPEST)

    def _at(self, place: str) -> Any:
        value: Any = self.config
        for part in place.replace("#", "::").split("::"):
            try:
                value = value[int(part)] if isinstance(value, list) else value[part]
            except (KeyError, IndexError, ValueError, TypeError):
                raise self._refuse(f"refers to {place!r}, which is not there", "repair it") from None
        return value

    def _value(self, value: Any, place: str, depth: int) -> Any:
        self.left -= 1
        if self.left < 0 or depth < 0:
            raise self._refuse("is nested too deeply, or refers to itself", "repair it")
        if isinstance(value, str):
            return self._text(value, place, depth)
        if isinstance(value, list):
            return [self._value(item, f"{place}::{i}", depth - 1) for i, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        items = {k: self._value(v, f"{place}::{k}", depth - 1) for k, v in value.items() if not _is_ours(k)}
        return self._call(value, items, place) if "_target_" in value else items

    def _text(self, value: str, place: str, depth: int) -> Any:
        if value.startswith("@"):
            name = value[1:]
            found = self._value(self._at(name), name, depth - 1)
            if isinstance(found, _Instance):
                raise self._refuse(f"shares the object {value!r} at {place}", _TRUST)
            return found
        if value.startswith(("$", "%")):
            raise self._refuse(f"has the expression {value[:60]!r} at {place}", _TRUST)
        return value

    def _call(self, value: dict[str, Any], arguments: dict[str, Any], place: str) -> _Instance | None:
        if value.get("_disabled_") is True:
            return None
        unknown = sorted(k for k in value if _is_ours(k) and k not in ("_target_", "_desc_", "_disabled_"))
        if unknown:
            raise self._refuse(f"uses {unknown[0]} at {place}", _TRUST)
        fetched = sorted(k for k, v in arguments.items() if "pretrained" in str(k) and v)
        if fetched:
            raise self._refuse(f"loads other weights ({fetched[0]}) at {place}", _TRUST)
        arguments = {k: v for k, v in arguments.items() if not _is_disabled(value[k])}
        return _Instance(self._class(value["_target_"], place), arguments)

    def _class(self, target: Any, place: str) -> type[nn.Module]:
        """A module class of `_PACKAGES`, by its full name or, as MONAI allows, its own."""
        text = str(target)
        package, _, name = text.rpartition(".")
        for home in _PACKAGES:
            if package and not f"{package}.".startswith(f"{home}."):
                continue
            found = getattr(_module(home, self.bundle), name, None)
            if isinstance(found, type) and issubclass(found, nn.Module):
                return found
        raise self._refuse(f"calls {text[:80]!r} at {place}, which is no known class of layers", _TRUST)

    def _refuse(self, what: str, remedy: str) -> CheckpointError:
        return CheckpointError(f"{self.bundle.path}: {self.bundle.config} {what}; {remedy}.")


_TRUST = (
    "pass --trust (trust=True) only if you trust where the bundle comes from, or name the function that "
    "builds the network with --arch pkg.mod:factory"
)


def _is_ours(key: Any) -> bool:
    """A key that is an instruction to MONAI's parser."""
    return isinstance(key, str) and key.startswith("_") and key.endswith("_")


def _is_disabled(value: Any) -> bool:
    return isinstance(value, dict) and value.get("_disabled_") is True
