"""Reading and writing checkpoints, safely.

What a file is, is decided by its content, never by its extension. Without ``trust`` nothing in a
file is executed: PyTorch's restricted unpickler and the safetensors reader are the only ways in.
What is written goes back into the same container as it was read from: the same nesting, the same
key prefixes, the same metadata, and every entry that the conversion did not change bit for bit.
"""

from __future__ import annotations

import copy
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .containers import Container, load, save
from .errors import CheckpointError

KNOWN_KEYS = ("state_dict", "model", "model_state", "model_state_dict", "network_weights", "ema")
"""Where training scripts nest the state_dict."""

PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel, DistributedDataParallel, AveragedModel and torch.compile put before each key."""

_WRAPPER_ENTRIES = frozenset({"n_averaged"})  # AveragedModel's own buffer has no prefix
_SEARCH_DEPTH = 3  # how deep a message looks for state_dicts to offer


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read: everything in the file, and where in it the weights are.

    ``nesting`` is the path of keys from ``payload`` to the weights, ``prefix`` what stands before
    each of their keys, ``metadata`` the safetensors header's ``__metadata__``.
    """

    path: Path
    container: Container
    payload: Any
    nesting: tuple[str, ...] = ()
    prefix: str = ""
    metadata: dict[str, str] | None = None

    @property
    def weights(self) -> Any:
        """The stored state_dict, keys as in the file, or the stored module."""
        return _descend(self.payload, self.nesting)

    @property
    def module(self) -> nn.Module | None:
        """The module, where a whole one was pickled."""
        return self.weights if isinstance(self.weights, nn.Module) else None

    @property
    def state_dict(self) -> dict[str, Any]:
        """The weights as a model without wrappers names them."""
        if self.module is not None:
            return self.module.state_dict()
        entries = {k: v for k, v in self.weights.items() if _is_weight(k, v) and k.startswith(self.prefix)}
        state = OrderedDict((k[len(self.prefix) :], v) for k, v in entries.items())
        versions = getattr(self.weights, "_metadata", None)  # by which PyTorch loads old layouts
        if versions is not None:
            names = {f"{name}."[len(self.prefix) :].rstrip("."): name for name in versions}
            kept = {k: versions[name] for k, name in names.items() if f"{name}.".startswith(self.prefix)}
            state._metadata = kept  # type: ignore[attr-defined]
        return state

    def fit(self, keys: Iterable[str]) -> Checkpoint:
        """The same checkpoint with the prefix under which most of a model's ``keys`` are found.

        A model may have a real attribute named ``module``; then its keys keep that part.
        """
        if self.module is not None:
            return self
        wanted = set(keys)
        stages = [self.prefix[: m.start()] for m in re.finditer(r"[^.]+\.", self.prefix)]
        candidates = [self, *(replace(self, prefix=p) for p in reversed(stages))]
        return max(candidates, key=lambda c: len(wanted & c.state_dict.keys()))  # the first of equals


def read(path: str | os.PathLike[str], *, key: str | None = None, trust: bool = False) -> Checkpoint:
    """Read a checkpoint: a state_dict (plain or nested), safetensors, or a whole module.

    ``key`` names the entry (dotted for deeper ones) that holds the weights where that is not one of
    `KNOWN_KEYS`. ``trust=True`` unpickles the file without restriction, which runs any code in it;
    whole modules need that. Raises CheckpointError.
    """
    path = Path(path)
    container, payload, metadata = load(path, trust=trust)
    nesting = _locate(path, payload, key)
    weights = _descend(payload, nesting)
    prefix = "" if isinstance(weights, nn.Module) else _common_prefix(weights)
    return Checkpoint(path, container, payload, nesting, prefix, metadata)


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
    save(Path(path), checkpoint.container, payload, checkpoint.metadata, force=force)


# Where in the file the weights are.


def _is_weight(key: Any, value: Any) -> bool:
    return isinstance(key, str) and (isinstance(value, Tensor) or key.endswith("_extra_state"))


def _holds_weights(value: Any) -> bool:
    if isinstance(value, nn.Module):
        return True
    return isinstance(value, Mapping) and any(
        isinstance(v, Tensor) and isinstance(k, str) for k, v in value.items()
    )


def _locate(path: Path, payload: Any, key: str | None) -> tuple[str, ...]:
    if key is not None:
        return _locate_key(path, payload, key)
    if isinstance(payload, nn.Module):
        return ()
    if not isinstance(payload, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(payload).__name__}, no state_dict; save model.state_dict() instead."
        )
    known = [k for k in KNOWN_KEYS if _holds_weights(payload.get(k))]
    if len(known) == 1:
        return (known[0],)
    nested = [k for k in payload if isinstance(k, str) and _holds_weights(payload[k])]
    if not nested and _holds_weights(payload):
        return ()
    raise CheckpointError(_ask_for_key(path, known or _candidates(payload)))


def _locate_key(path: Path, payload: Any, key: str) -> tuple[str, ...]:
    for nesting in ((key,), tuple(key.split("."))):
        value = payload
        for part in nesting:
            value = value.get(part) if isinstance(value, Mapping) else None
        if _holds_weights(value):
            return nesting
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


def _descend(payload: Any, nesting: tuple[str, ...]) -> Any:
    for key in nesting:
        payload = payload[key]
    return payload


def _common_prefix(weights: Mapping[Any, Any]) -> str:
    keys = [k for k, v in weights.items() if _is_weight(k, v) and k not in _WRAPPER_ENTRIES]
    prefix = ""
    while step := next((p for p in PREFIXES if keys and all(k.startswith(prefix + p) for k in keys)), None):
        prefix += step
    return prefix


# What is written.


def _updated(checkpoint: Checkpoint, state_dict: Mapping[str, Any]) -> Any:
    """The stored state_dict with the values that changed; all else is the very object that was read."""
    weights = copy.copy(checkpoint.weights)  # keeps an OrderedDict's _metadata
    for name in checkpoint.state_dict.keys() - state_dict.keys():
        del weights[checkpoint.prefix + name]
    for name, value in state_dict.items():
        key = checkpoint.prefix + name
        if isinstance(value, Tensor) and not (key in weights and _same_value(weights[key], value)):
            weights[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return weights


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
