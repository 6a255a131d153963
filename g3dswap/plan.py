"""Plan files: which layers of a model are swapped and the choices made for them, without tuning again.

A plan is JSON and data only. It is read with a bounded size and checked field by field; the kernels that it
names are printed, compiled and checked against float64 here like any other.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from g3dswap.choice import Choice
from g3dswap.decided import install
from g3dswap.discover import Meeting
from g3dswap.entries import ROOT, Call, Kept, Layer, PassChoice, Swapped
from g3dswap.errors import ArgumentError, G3DSwapWarning, PlanError
from g3dswap.problem import DIRECTIONS, DTYPES, LAYOUTS, device_facts, dtype_name
from g3dswap.report import Report, stored
from g3dswap.tc.entries import atomic_write_text, strict_json

SCHEMA = 2
LARGEST = 16 << 20
"""Bytes of a plan file that are read at most; a layer takes some hundred."""

ATTRIBUTE = "_g3dswap_choices"
"""Name of the attribute of the converted root module that holds its choices as JSON."""

_INTEGERS = ("in_channels", "out_channels", "groups")
_TRIPLES = ("kernel_size", "stride", "dilation")
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class PlannedLayer:
    """One grouped layer of the model that the plan was made for."""

    name: str
    geometry: Layer
    swapped: bool
    reason: str
    """Why it is kept, if it is."""
    calls: tuple[Call, ...]
    """The inputs it met; of their passes only the directions count."""


@dataclass(frozen=True)
class Plan:
    """What a plan file says."""

    path: Path
    layers: dict[str, PlannedLayer]
    choices: tuple[Choice, ...]
    machines: dict[str, dict[str, Any]]
    """Device kind (``cpu``, ``cuda``) -> name and capability of the device that the choices are for."""

    def foreign(self) -> str | None:
        """The machine that the choices were made on, if it is not this one."""
        for kind, facts in self.machines.items():
            if kind == "cuda" and not torch.cuda.is_available():
                return str(facts["device_name"])
            if facts != _machine(kind):
                return str(facts["device_name"])
        return None

    def meetings(self, name: str, device: torch.device) -> list[Meeting]:
        """What a layer met when the plan was made, on a device of the same kind."""
        dtypes = {dtype_name(dtype): dtype for dtype in DTYPES}
        return [
            Meeting(
                batch=call.shape[0],
                size=(call.shape[2], call.shape[3], call.shape[4]),
                dtype=dtypes[call.dtype],
                layout=call.layout,
                device=device,
                grad_input=any(item.direction == "grad_input" for item in call.passes),
                grad_weight=any(item.direction == "grad_weight" for item in call.passes),
                output_padding=call.output_padding,
            )
            for call in self.layers[name].calls
            if call.device == device.type
        ]

    def check(self, layers: Mapping[str, Layer]) -> None:
        """Raise PlanError unless the plan was made for these layers (name -> geometry)."""
        missing = sorted(set(self.layers) - set(layers))
        if missing:
            self._refuse(f"its layer {missing[0]!r} is not in the model")
        unknown = sorted(set(layers) - set(self.layers))
        if unknown:
            self._refuse(f"the model's layer {unknown[0]!r} is not in it")
        for name, layer in layers.items():
            planned = self.layers[name].geometry
            if planned != layer:
                self._refuse(f"layer {name!r} is {planned} in the plan and {layer} in the model")

    def _refuse(self, why: str) -> None:
        raise PlanError(
            f"The plan {self.path} was made for another model: {why}; convert without plan= and save a new "
            "one."
        )


def save_plan(model: nn.Module, path: str | Path) -> None:
    """Write the choices of a converted model to a JSON file; ``convert(model, plan=path)`` repeats them.

    The file is replaced as a whole or not at all.

    Raises:
        ArgumentError: the model was not converted by ``g3dswap.convert``.
        PlanError: the file cannot be written.
    """
    report = stored(model) if isinstance(model, nn.Module) else None
    if report is None:
        raise ArgumentError(
            f"save_plan() takes a model that g3dswap.convert returned, and this {type(model).__name__} is "
            "none; convert it first."
        )
    choices = model.__dict__.get(ATTRIBUTE, [])
    kinds = sorted({choice["problem"]["device"] for choice in choices})
    data = {
        "g3dswap_plan": SCHEMA,
        "machines": {kind: _machine(kind) for kind in kinds},
        "layers": _layers(report),
        "choices": choices,
    }
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    try:
        atomic_write_text(Path(path), text)
    except OSError as error:
        raise PlanError(
            f"The plan cannot be written to {path} ({error.strerror or error}); choose another place."
        ) from error


def keep_choices(model: nn.Module, choices: Iterable[Choice]) -> None:
    """Leave the choices on a converted model, for :func:`save_plan`."""
    model.__dict__[ATTRIBUTE] = [choice.to_json() for choice in choices]


def forget_choices(model: nn.Module) -> None:
    """Take them off again."""
    model.__dict__.pop(ATTRIBUTE, None)


def _machine(kind: str) -> dict[str, Any]:
    """What decides which kernel is the fastest; the thread count may change from run to run."""
    facts = device_facts(kind)
    return {name: facts[name] for name in ("device_name", "capability")}


def _layers(report: Report) -> list[dict[str, Any]]:
    rows = [_layer(item, True, "") for item in report.swapped]
    return rows + [_layer(item, False, item.reason) for item in report.kept]


def _layer(item: Swapped | Kept, swapped: bool, reason: str) -> dict[str, Any]:
    calls = [
        {
            "shape": list(call.shape),
            "dtype": call.dtype,
            "layout": call.layout,
            "device": call.device,
            "output_padding": list(call.output_padding),
            "passes": [choice.direction for choice in call.passes],
        }
        for call in item.calls
    ]
    return {
        "name": "" if item.name == ROOT else item.name,
        "geometry": asdict(item.geometry),
        "swapped": swapped,
        "reason": reason,
        "calls": calls,
    }


# Reading


def read_plan(path: str | Path) -> Plan:
    """Read and check a plan file.

    Raises:
        PlanError: it cannot be read, is too large, is no JSON, or not the JSON of a plan.
    """
    place = Path(path)
    try:
        with place.open("rb") as file:
            raw = file.read(LARGEST + 1)
    except OSError as error:
        why = error.strerror or error
        raise PlanError(f"The plan {place} cannot be read ({why}); check the path.") from error
    if len(raw) > LARGEST:
        raise PlanError(f"The plan {place} is larger than {LARGEST >> 20} MiB; it is no plan of g3dswap.")
    try:
        data = strict_json(raw.decode("utf-8"))
    except ValueError as error:
        raise PlanError(
            f"The plan {place} is not JSON ({error}); save it again with g3dswap.save_plan."
        ) from error
    if not isinstance(data, dict) or type(data.get("g3dswap_plan")) is not int:
        raise PlanError(f"{place} is no plan of g3dswap; write one with g3dswap.save_plan(model, path).")
    if data["g3dswap_plan"] != SCHEMA:
        raise PlanError(
            f"The plan {place} has schema {data['g3dswap_plan']}, this version of g3dswap reads {SCHEMA}; "
            "convert without plan= and save a new one."
        )
    try:
        return _plan(place, data)
    except (KeyError, TypeError, ValueError) as error:
        why = f"no field {error}" if type(error) is KeyError else str(error)
        remedy = "save it again with g3dswap.save_plan"
        raise PlanError(f"The plan {place} is damaged ({why}); {remedy}.") from error


def _plan(path: Path, data: dict[str, Any]) -> Plan:
    layers = [_planned(item) for item in _list(data, "layers")]
    machines = data["machines"]
    if not isinstance(machines, dict):
        raise ValueError("'machines' is no object")
    for kind, facts in machines.items():
        if kind not in ("cpu", "cuda") or not isinstance(facts, dict):
            raise ValueError(f"the machine {kind!r} is unknown")
        for name in ("device_name", "capability"):
            _text(facts, name)
    names = [layer.name for layer in layers]
    if len(set(names)) != len(names):
        raise ValueError("a layer is in it twice")
    choices = tuple(Choice.from_json(item) for item in _list(data, "choices"))
    return Plan(path, dict(zip(names, layers)), choices, machines)


def _planned(item: Any) -> PlannedLayer:
    if not isinstance(item, dict):
        raise ValueError("a layer is no object")
    if not isinstance(item["swapped"], bool):
        raise ValueError("'swapped' is neither true nor false")
    calls = tuple(_call(call) for call in _list(item, "calls"))
    return PlannedLayer(
        _text(item, "name"), _geometry(item["geometry"]), item["swapped"], _text(item, "reason"), calls
    )


def _geometry(item: Any) -> Layer:
    if not isinstance(item, dict):
        raise ValueError("'geometry' is no object")
    padding = item["padding"]
    if not isinstance(padding, str):
        padding = _integers(item, "padding", 3, 0)
    elif padding not in ("same", "valid"):
        raise ValueError(f"the padding {padding!r} is unknown")
    if item["padding_mode"] not in _PADDING_MODES:
        raise ValueError(f"the padding mode {item['padding_mode']!r} is unknown")
    for name in ("bias", "transposed"):
        if not isinstance(item[name], bool):
            raise ValueError(f"{name!r} is neither true nor false")
    for name in _INTEGERS:
        if type(item[name]) is not int or item[name] < 1:
            raise ValueError(f"{name!r} is no positive integer")
    return Layer(
        in_channels=item["in_channels"],
        out_channels=item["out_channels"],
        groups=item["groups"],
        padding=padding,
        padding_mode=item["padding_mode"],
        bias=item["bias"],
        transposed=item["transposed"],
        output_padding=_integers(item, "output_padding", 3, 0),
        **{name: _integers(item, name, 3, 1) for name in _TRIPLES},
    )


def _call(item: Any) -> Call:
    if not isinstance(item, dict):
        raise ValueError("a call is no object")
    dtypes = [dtype_name(dtype) for dtype in DTYPES]
    for name, known in (("dtype", dtypes), ("layout", list(LAYOUTS)), ("device", ["cpu", "cuda"])):
        if item[name] not in known:
            raise ValueError(f"the {name} {item[name]!r} is none of {', '.join(known)}")
    directions = _list(item, "passes")
    if any(direction not in DIRECTIONS for direction in directions):
        raise ValueError(f"the passes {directions} are unknown")
    passes = tuple(PassChoice(direction, "planned") for direction in directions)
    extra = _integers(item, "output_padding", 3, 0) if item["output_padding"] else ()
    return Call(_integers(item, "shape", 5, 0), item["dtype"], item["layout"], item["device"], passes, extra)


def _list(item: Mapping[str, Any], name: str) -> list[Any]:
    value = item[name]
    if not isinstance(value, list):
        raise ValueError(f"{name!r} is no list")
    return value


def _text(item: Mapping[str, Any], name: str) -> str:
    value = item[name]
    if not isinstance(value, str):
        raise ValueError(f"{name!r} is no text")
    return value


def _integers(item: Mapping[str, Any], name: str, count: int, least: int) -> tuple[int, ...]:
    value: Sequence[Any] = _list(item, name)
    if len(value) != count or any(type(number) is not int or number < least for number in value):
        raise ValueError(f"{name!r} is not a list of {count} integers of at least {least}")
    return tuple(value)


# Deciding


def use_plan(path: str | Path) -> None:
    """Let the choices of a plan file decide in this process, for programs loaded with ``torch.export.load``.

    Their operators ask for a choice at the first call of a shape. ``convert(model, plan=path)`` does the same
    for the layers that it swaps.

    Raises:
        PlanError: the plan cannot be read.
    """
    install_plan(read_plan(path))


def install_plan(planned: Plan) -> None:
    """Let the plan decide, unless its times are those of another machine."""
    foreign = planned.foreign()
    if foreign is None:
        install(planned.choices)
        return
    warnings.warn(
        f"The plan {planned.path} was made on another machine ({foreign}), where other kernels are fast: its "
        "layers are swapped, but their kernels are chosen anew.",
        G3DSwapWarning,
        stacklevel=3,
    )
