"""The layers to measure: a JSON file, a list of objects with a layer's whole geometry each.

::

    {"model": "X3D-M (16x224x224)", "layer": "blocks.0.conv.conv_xy", "N": 8, "C": 24, "T": 16, "H": 112,
     "W": 112, "F": 24, "groups": 24, "kernel": [5, 1, 1], "stride": [1, 1, 1], "padding": [2, 0, 0],
     "dilation": [1, 1, 1], "bias": false, "count": 1, "kind": "depthwise"}

N is the batch, C and F are input and output channels.  ``count`` says how often the layer stands in its
model, and ``kind`` is a word for readers; these two and ``bias`` may be left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from g3dswap.errors import ArgumentError
from g3dswap.problem import Geometry, Triple
from g3dswap.tc.entries import strict_json

SHIPPED = Path(__file__).with_name("layers.json")

_NAMES = ("model", "layer")
_COUNTS = ("N", "C", "T", "H", "W", "F", "groups")
_TRIPLES = {"kernel": 1, "stride": 1, "padding": 0, "dilation": 1}
_OPTIONAL = ("bias", "count", "kind")


@dataclass(frozen=True)
class BenchLayer:
    """One convolution layer and where it stands."""

    model: str
    layer: str
    batch: int
    geometry: Geometry
    bias: bool = False
    count: int = 1
    kind: str = ""

    @property
    def name(self) -> str:
        """The model's name and the layer's."""
        return f"{self.model} {self.layer}"


def read_layers(path: Path | None = None, match: Sequence[str] = ()) -> list[BenchLayer]:
    """The layers of a file (None: the shipped one) whose name, or name in the model, fits a glob.

    Raises ArgumentError, which says what is wrong with which layer.
    """
    path = path or SHIPPED
    try:
        data = strict_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(
            f"{path} cannot be read ({error.strerror or error}); give a JSON file of layers."
        ) from None
    except ValueError as error:
        raise ArgumentError(f"{path} is no JSON ({error}); give a JSON list of layers.") from None
    if not isinstance(data, list) or not data:
        raise ArgumentError(f"{path} holds no list of layers; give a JSON list with one object a layer.")
    layers = [_layer(item, f"{path}, layer {number}") for number, item in enumerate(data, 1)]
    seen: dict[str, int] = {}
    for number, layer in enumerate(layers, 1):
        if layer.name in seen:
            raise ArgumentError(
                f"{path}, layer {number}: {layer.name!r} is layer {seen[layer.name]} already; "
                "give each its own name."
            )
        seen[layer.name] = number
    chosen = [layer for layer in layers if not match or any(_fits(layer, glob) for glob in match)]
    if not chosen:
        raise ArgumentError(
            f"No layer of {path} fits {' or '.join(map(repr, match))}; its first is {layers[0].name!r}, "
            "and * stands for anything."
        )
    return chosen


def _fits(layer: BenchLayer, glob: str) -> bool:
    return fnmatchcase(layer.name, glob) or fnmatchcase(layer.layer, glob)


def _layer(item: Any, where: str) -> BenchLayer:
    if not isinstance(item, dict):
        raise ArgumentError(f"{where}: {item!r} is no object; give one with the layer's geometry.")
    required = (*_NAMES, *_COUNTS, *_TRIPLES)
    if missing := [name for name in required if name not in item]:
        raise ArgumentError(f"{where}: {missing[0]!r} is missing; every layer needs {', '.join(required)}.")
    if unknown := [name for name in item if name not in (*required, *_OPTIONAL)]:
        known = ", ".join((*required, *_OPTIONAL))
        raise ArgumentError(f"{where}: {unknown[0]!r} is unknown; the fields are {known}.")
    for name in _NAMES:
        if not isinstance(item[name], str) or not item[name]:
            raise ArgumentError(f"{where}: {name} is {item[name]!r}; give its name as a string.")
    bias, kind = item.get("bias", False), item.get("kind", "")
    if not isinstance(bias, bool):
        raise ArgumentError(f"{where}: bias is {bias!r}; give true or false.")
    if not isinstance(kind, str):
        raise ArgumentError(f"{where}: kind is {kind!r}; give a word, or leave it out.")
    n, c, t, h, w, f, groups = (_integer(item, name, 1, where) for name in _COUNTS)
    kernel, stride, padding, dilation = (_triple(item, name, where) for name in _TRIPLES)
    try:
        geometry = Geometry(c, f, groups, (t, h, w), kernel, stride, padding, dilation)
    except ArgumentError as error:
        raise ArgumentError(f"{where}: {error}") from None
    count = _integer({"count": 1, **item}, "count", 1, where)
    return BenchLayer(item["model"], item["layer"], n, geometry, bias, count, kind)


def _integer(item: Mapping[str, Any], name: str, least: int, where: str) -> int:
    value = item[name]
    if type(value) is not int or value < least:
        raise ArgumentError(f"{where}: {name} is {value!r}; give an integer of at least {least}.")
    return value


def _triple(item: Mapping[str, Any], name: str, where: str) -> Triple:
    value, least = item[name], _TRIPLES[name]
    if not isinstance(value, list) or len(value) != 3 or any(type(x) is not int or x < least for x in value):
        raise ArgumentError(f"{where}: {name} is {value!r}; give three integers of at least {least}.")
    t, h, w = value
    return t, h, w
