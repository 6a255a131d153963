"""Reading and writing checkpoints, safely.

What a file is, is decided by its content (sniff.py), never by its extension. Without ``trust`` nothing in
a file is executed: PyTorch's restricted unpickler and the safetensors reader are the only ways in.
What is written goes back into the same container as it was read from: the same nesting, the same
key prefixes, the same metadata, and every entry that the conversion did not change bit for bit.
"""

from __future__ import annotations

import copy
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import bundle
from .bundle import Bundle
from .containers import dump, load, save
from .errors import CheckpointError
from .sniff import WEIGHTS, Container, Kind, sniff

KNOWN_KEYS = ("state_dict", "model", "model_state", "model_state_dict", "network_weights", "ema")
"""Where training scripts nest the state_dict."""

PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel, DistributedDataParallel, AveragedModel and torch.compile put before each key."""

LIGHTNING, LIGHTNING_PREFIX = "pytorch-lightning_version", "model."
"""The entry by which a file of Lightning is known, and what its users mostly call their network."""

_INNER = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What wrappers of parts of a model put in the middle of keys; nobody else uses such names."""

_WRAPPER_ENTRIES = frozenset({"n_averaged"})  # AveragedModel's own buffer has no prefix
_SEARCH_DEPTH = 3  # how deep a message looks for state_dicts to offer


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read: everything in the file, and where in it the weights are.

    ``nesting`` is the path of keys from ``payload`` to the weights, ``prefix`` what stands before
    each of their keys, ``inner`` whether wrappers' parts in the middle of keys belong to them (False:
    they are taken out), ``metadata`` the safetensors header's ``__metadata__``, ``bundle`` the MONAI bundle
    that the file is a part of.
    """

    path: Path
    container: Container
    payload: Any
    nesting: tuple[str, ...] = ()
    prefix: str = ""
    metadata: dict[str, str] | None = None
    bundle: Bundle | None = None
    asked: str = ""
    inner: bool = False

    @property
    def weights(self) -> Any:
        """The stored state_dict, keys as in the file, or the stored module."""
        return _descend(self.payload, self.nesting)

    @property
    def module(self) -> nn.Module | None:
        """The module, where a whole one was pickled."""
        return self.weights if isinstance(self.weights, nn.Module) else None

    @property
    def keys(self) -> dict[str, str]:
        """Name of a weight in a model without wrappers -> its key in the file.

        Of weights that share memory safetensors keeps one, and its metadata has the names of the others.
        """
        stored = [k for k, v in self.weights.items() if _is_weight(k, v) and k.startswith(self.prefix)]
        found = {self.name(key): key for key in stored}
        for alias, key in (self.metadata or {}).items():
            if alias.startswith(self.prefix) and key in self.weights:
                found.setdefault(self.name(alias), key)
        return found

    def name(self, key: str) -> str:
        """A key of the file, as a model without wrappers has it."""
        rest = key[len(self.prefix) :]
        return rest if self.inner else _INNER.sub("", rest)

    @property
    def state_dict(self) -> dict[str, Any]:
        """The weights as a model without wrappers names them."""
        if self.module is not None:
            return self.module.state_dict()
        state = OrderedDict((name, self.weights[key]) for name, key in self.keys.items())
        versions = getattr(self.weights, "_metadata", None)  # by which PyTorch loads old layouts
        if versions is not None:
            kept = [name for name in versions if f"{name}.".startswith(self.prefix)]
            state._metadata = {self.name(f"{name}.").rstrip("."): versions[name] for name in kept}  # type: ignore
        return state

    def fit(self, keys: Iterable[str]) -> Checkpoint:
        """The same checkpoint with the prefix under which a model's ``keys`` are found.

        That is whatever attribute the model had in the LightningModule or the trainer that was saved; what
        else was in it stays in the file. A model may have a real attribute named ``module``; then its keys
        keep that part. Raises CheckpointError where the model is found several times.
        """
        if self.module is not None:
            return self
        wanted = set(keys)
        stages = [self.prefix[: m.start()] for m in re.finditer(r"[^.]+\.", self.prefix)]
        near = [self, *(replace(self, prefix=p) for p in reversed(stages) if p.startswith(self.asked))]
        near += [replace(item, inner=True) for item in near]
        best = max(near, key=lambda c: len(wanted & c.keys.keys()))  # the first of equals
        if _expected(wanted) <= best.keys.keys():
            return best
        found = sorted(p for p in self._prefixes(wanted) if p.startswith(self.asked))
        if len(found) > 1:
            options = ", ".join(".".join([*self.nesting, p.removesuffix(".")]) for p in found)
            raise CheckpointError(
                f"{self.path} has weights of this model under several prefixes; choose one with --key: "
                f"{options}."
            )
        return replace(self, prefix=found[0]) if found else best

    def _prefixes(self, wanted: set[str]) -> list[str]:
        """The prefixes under which all of a model's keys are in the file."""
        needed = _expected(wanted)
        hits: Counter[str] = Counter()
        for key in (k for k, v in self.weights.items() if _is_weight(k, v)):
            cuts = (match.end() for match in re.finditer(r"\.", key))
            hits.update(key[:cut] for cut in cuts if _INNER.sub("", key[cut:]) in needed)
        # Of `a.` and `a._orig_mod.` the longer is a wrapper's; both have the same keys.
        full = [p for p, count in hits.items() if needed and count >= len(needed)]
        return [p for p in full if not any(_INNER.sub("", q) == p != q for q in full)]


def _expected(wanted: set[str]) -> set[str]:
    """Without what files from before BatchNorm counted its batches may lack."""
    return {key for key in wanted if not key.endswith("num_batches_tracked")}


def read(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    trust: bool = False,
    safe_globals: Sequence[str] = (),
) -> Checkpoint:
    """Read a checkpoint: a state_dict (plain or nested), safetensors, a whole module, a MONAI bundle.

    ``key`` names the entry (dotted for deeper ones, and for a prefix of the weights' own keys) that holds
    the weights where that is not one of `KNOWN_KEYS`. ``trust=True`` unpickles the file without
    restriction, which runs any code in it; ``safe_globals`` allows only some classes more than PyTorch
    does, by their qualified names. Whole modules need one or the other. Raises CheckpointError.
    """
    path = Path(path)
    whole = None
    what = kind(path)
    if what == "program":
        raise CheckpointError(
            f"{path} is a torch.export program, no checkpoint; convert it with g3dswap convert."
        )
    try:
        if what == "bundle":
            whole = bundle.find(path)
            with whole.folder(lambda name: name == WEIGHTS) as folder:
                container = _container(folder / WEIGHTS, whole.label)
                payload, metadata = load(
                    folder / WEIGHTS, container, trust=trust, safe_globals=safe_globals, label=whole.label
                )
        else:
            container = what
            payload, metadata = load(path, container, trust=trust, safe_globals=safe_globals)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    nesting, asked = _locate(path, payload, key)
    weights = _descend(payload, nesting)
    if isinstance(weights, nn.Module):
        return Checkpoint(path, container, payload, nesting, "", metadata, whole)
    _refuse_shards(path, weights)
    usual = (
        (*PREFIXES, LIGHTNING_PREFIX) if isinstance(payload, Mapping) and LIGHTNING in payload else PREFIXES
    )
    prefix = asked + _common_prefix(weights, asked, usual)
    return Checkpoint(path, container, payload, nesting, prefix, metadata, whole, asked)


def kind(path: Path) -> Kind:
    """What a file or folder is. Raises CheckpointError for what cannot be read."""
    try:
        return sniff(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; give the path of a checkpoint file.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None


def _container(path: Path, label: str) -> Container:
    """What the file of a bundle's weights is."""
    try:
        what = kind(path)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(path), label, 1)) from None
    if what == "program" or what == "bundle":
        raise CheckpointError(f"{label} is a {what}, no state_dict; save model.state_dict() instead.")
    return what


def _refuse_shards(path: Path, weights: Mapping[Any, Any]) -> None:
    for key, value in weights.items():
        if type(value).__module__.startswith("torch.distributed."):
            raise CheckpointError(
                f"{path} has a part of a sharded tensor under {key!r}; save a full state_dict "
                "(get_model_state_dict of torch.distributed.checkpoint with full_state_dict=True)."
            )


def write(
    path: str | os.PathLike[str],
    checkpoint: Checkpoint,
    content: nn.Module | Mapping[str, Any],
    *,
    force: bool = False,
) -> None:
    """Write ``content`` to ``path`` in the container that ``checkpoint`` was read from.

    ``content`` is a model or its state_dict (keys without prefix); where a whole module was read, the
    model. A weight whose value did not change is written as it was read, with its dtype, and every
    other entry of the file too. The file appears whole or not at all; one that is there already is
    replaced only with ``force``. Raises CheckpointError.
    """
    if checkpoint.module is not None:
        if not isinstance(content, nn.Module):
            raise CheckpointError(
                f"{checkpoint.path} holds a whole module, so a module must be written, no state_dict."
            )
        weights: Any = content
    else:
        weights = _updated(checkpoint, content.state_dict() if isinstance(content, nn.Module) else content)
    payload = _replaced(checkpoint.payload, checkpoint.nesting, weights)
    metadata = checkpoint.metadata and {k: v for k, v in checkpoint.metadata.items() if k not in weights}
    if checkpoint.bundle is None:
        save(Path(path), checkpoint.container, payload, metadata, force=force)
    else:
        checkpoint.bundle.write(
            Path(path), lambda file: dump(file, checkpoint.container, payload, metadata), force=force
        )


# Where in the file the weights are.


def _is_weight(key: Any, value: Any) -> bool:
    return isinstance(key, str) and (isinstance(value, Tensor) or key.endswith("_extra_state"))


def _holds_weights(value: Any) -> bool:
    if isinstance(value, nn.Module):
        return True
    return isinstance(value, Mapping) and any(
        isinstance(v, Tensor) and isinstance(k, str) for k, v in value.items()
    )


def _locate(path: Path, payload: Any, key: str | None) -> tuple[tuple[str, ...], str]:
    """The keys that lead to the weights, and the prefix of theirs that was asked for."""
    if key is not None:
        return _locate_key(path, payload, key)
    if isinstance(payload, nn.Module):
        return (), ""
    if not isinstance(payload, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(payload).__name__}, no state_dict; save model.state_dict() instead."
        )
    known = [k for k in KNOWN_KEYS if _holds_weights(payload.get(k))]
    if len(known) == 1:
        return (known[0],), ""
    nested = [k for k in payload if isinstance(k, str) and _holds_weights(payload[k])]
    if not nested and _holds_weights(payload):
        return (), ""
    raise CheckpointError(_ask_for_key(path, known or _candidates(payload)))


def _locate_key(path: Path, payload: Any, key: str) -> tuple[tuple[str, ...], str]:
    parts = key.split(".")
    for nesting in ((key,), tuple(parts)):
        if _holds_weights(_reach(payload, nesting)):
            return nesting, ""
    for cut in reversed(range(len(parts))):  # the rest may be what the weights' own keys begin with
        weights, prefix = _reach(payload, tuple(parts[:cut])), ".".join(parts[cut:]) + "."
        if isinstance(weights, Mapping) and any(
            _is_weight(k, v) and k.startswith(prefix) for k, v in weights.items()
        ):
            return tuple(parts[:cut]), prefix
    offers = _candidates(payload)
    offer = f"the keys that hold weights are {', '.join(offers)}" if offers else "leave --key out"
    raise CheckpointError(f"{path} has no weights under --key {key}; {offer}.")


def _ask_for_key(path: Path, offers: list[str]) -> str:
    if not offers:
        return f"{path} holds no tensors that could be a state_dict; save model.state_dict() instead."
    if len(offers) == 1:
        return f"{path} has its weights under an unknown key; pass --key {offers[0]} if that is the model's."
    return f"{path} has weights under several keys ({', '.join(offers)}); choose one with --key."


def _candidates(payload: Any, depth: int = _SEARCH_DEPTH) -> list[str]:
    """Dotted keys under which there are weights."""
    found: list[str] = []
    if isinstance(payload, Mapping) and depth:
        for key, value in payload.items():
            if isinstance(key, str):
                deeper = () if _holds_weights(value) else _candidates(value, depth - 1)
                found += [key] if _holds_weights(value) else [f"{key}.{k}" for k in deeper]
    return found


def _reach(payload: Any, nesting: tuple[str, ...]) -> Any:
    """What is there, or None."""
    for part in nesting:
        payload = payload.get(part) if isinstance(payload, Mapping) else None
    return payload


def _descend(payload: Any, nesting: tuple[str, ...]) -> Any:
    for key in nesting:
        payload = payload[key]
    return payload


def _common_prefix(weights: Mapping[Any, Any], asked: str, usual: Sequence[str]) -> str:
    """What stands before all keys that begin with ``asked``, as far as it is the usual prefixes."""
    keys = [k for k, v in weights.items() if _is_weight(k, v) and k not in _WRAPPER_ENTRIES]
    keys = [k[len(asked) :] for k in keys if k.startswith(asked)]
    prefix = ""
    while step := next((p for p in usual if keys and all(k.startswith(prefix + p) for k in keys)), None):
        prefix += step
    return prefix


# What is written.


def _updated(checkpoint: Checkpoint, state_dict: Mapping[str, Any]) -> Any:
    """The stored state_dict with the values that changed; all else is the very object that was read."""
    weights = copy.copy(checkpoint.weights)  # keeps an OrderedDict's _metadata
    keys = checkpoint.keys
    for key in set(keys.values()) - {keys[name] for name in keys.keys() & state_dict.keys()}:
        del weights[key]
    for name, value in state_dict.items():
        key = keys.get(name, checkpoint.prefix + name)
        if not isinstance(value, Tensor) or (key in weights and _same_value(weights[key], value)):
            continue
        if name not in keys and any(other in keys for other in _ties(state_dict, name)):
            continue  # the file left it out, since it is the same as one that it has
        key = key if checkpoint.name(key) == name else checkpoint.prefix + name  # no longer the same
        weights[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return weights


def _ties(state_dict: Mapping[str, Any], name: str) -> list[str]:
    """The other names of the very same tensor."""
    value = state_dict[name]
    return [k for k, v in state_dict.items() if k != name and is_same_tensor(v, value)]


def is_same_tensor(a: Any, b: Any) -> bool:
    """Both are one tensor in memory, under two names."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or not a.numel():
        return False
    same = a.data_ptr() == b.data_ptr() and a.dtype == b.dtype
    return same and a.shape == b.shape and a.stride() == b.stride()


def _same_value(old: Any, new: Tensor) -> bool:
    """Whether ``new`` is ``old``, up to the dtype and the device that the model was moved to."""
    if not isinstance(old, Tensor) or old.shape != new.shape or old.layout != new.layout:
        return False
    if old.layout is not torch.strided or old.is_quantized:
        return False
    moved = old.detach().to(new.dtype).contiguous().reshape(-1).view(torch.uint8)
    return torch.equal(moved, new.detach().cpu().contiguous().reshape(-1).view(torch.uint8))


def _replaced(payload: Any, nesting: tuple[str, ...], value: Any) -> Any:
    if not nesting:
        return value
    outer = copy.copy(payload)
    outer[nesting[0]] = _replaced(payload[nesting[0]], nesting[1:], value)
    return outer
