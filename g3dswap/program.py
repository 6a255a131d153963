"""``torch.export`` programs (.pt2): their grouped 3D convolutions become ``torch.ops.g3dswap.conv3d``.

A program file is a zip archive with the graph as JSON. It is never loaded here (loading evaluates expressions
that stand in it): the shapes that its convolutions meet are read, kernels are chosen for layers of the same
shapes, and the nodes of those that were swapped are rewritten in the JSON. Every other record stays as it is.
The result is loaded with ``torch.export.load`` after ``import g3dswap``.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from .containers import atomic_write, opened
from .entries import Skipped
from .errors import ArgumentError, CheckpointError, described
from .module import Grouped
from .problem import LAYOUTS, transposed_size
from .sniff import PROGRAM

SCHEMA = 8
"""Major version of torch.export's format, of the releases of PyTorch that are supported."""

OPERATOR = "torch.ops.g3dswap.conv3d.default"

_TRANSPOSED = "aten.conv_transpose3d.input"
_CONVOLUTIONS = ("aten.conv3d.default", "aten.conv3d.padding", "aten.convolution.default", _TRANSPOSED)
_DTYPES = {6: torch.float16, 7: torch.float32, 8: torch.float64, 13: torch.bfloat16}  # the format's numbers
_LARGEST_GRAPH = 256 << 20  # bytes of JSON
_DEEPEST = 100  # level of nesting in it
_MOST_ELEMENTS = 1 << 36  # of a tensor; more than any accelerator holds
_MOST_WEIGHTS = 1 << 24  # of a convolution, where the file is smaller than they are
_ALIGNMENT = 64  # of the records of PyTorch's archives, so that their tensors can be mapped into memory


@dataclass(frozen=True)
class Node:
    """A grouped 3D convolution of a program: where it stands, and what it meets."""

    name: str
    """Of the module that it was traced from, else of the node."""
    data: dict[str, Any] = field(repr=False)
    """The node in the program's JSON."""
    arguments: dict[str, Any] = field(repr=False)
    """Those of ``nn.Conv3d`` or, where it is transposed, ``nn.ConvTranspose3d``."""
    transposed: bool
    shape: tuple[int, ...]
    layout: str


@dataclass(frozen=True)
class Program:
    """A program file: its JSON and the convolutions in it."""

    path: Path
    graph: dict[str, Any] = field(repr=False)
    nodes: tuple[Node, ...]
    skipped: tuple[Skipped, ...]
    """Those that stay what they are, and why."""

    def write(self, path: Path, layers: nn.Module, *, force: bool = False) -> None:
        """A copy in which the nodes whose layer in ``layers`` was swapped call our operator.

        Raises CheckpointError.
        """
        fresh = read(self.path)
        if fresh != self:
            raise CheckpointError(f"{self.path} was changed meanwhile; convert it again.")
        for node in fresh.nodes:
            if isinstance(layers.get_submodule(node.name), Grouped):
                node.data.update(target=OPERATOR, inputs=_inputs(node))
        graph = json.dumps(fresh.graph).encode()

        def copy(file: IO[bytes]) -> None:
            with opened(self.path) as old, zipfile.ZipFile(file, "w") as new:
                for entry in old.infolist():
                    content = graph if _record(entry) == PROGRAM else old.read(entry)
                    _add(new, file.tell(), entry.filename, content)

        atomic_write(path, copy, force=force)


class Layers(nn.Module):
    """Stands for a program while kernels are chosen: its convolutions, each with the input that it meets.

    The weights are random, since no choice depends on them, and need no gradient: exported programs infer.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        if not torch.cuda.is_available() and any(n.arguments["device"].type == "cuda" for n in program.nodes):
            raise ArgumentError(
                f"{program.path} was exported on a GPU, and this machine has none; convert it where it runs."
            )
        self.nodes = program.nodes
        for node in program.nodes:
            parent: nn.Module = self
            *path, name = node.name.split(".")
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            kind = nn.ConvTranspose3d if node.transposed else nn.Conv3d
            parent.add_module(name, kind(**node.arguments).requires_grad_(False))
        self.eval()

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """Each convolution of its input."""
        return [self.get_submodule(node.name)(inputs[i]) for i, node in enumerate(self.nodes)]

    def inputs(self) -> tuple[Tensor, ...]:
        """Inputs of the shapes, dtypes and layouts that the convolutions meet."""
        return tuple(
            torch.randn(
                node.shape, dtype=node.arguments["dtype"], device=node.arguments["device"]
            ).contiguous(memory_format=LAYOUTS[node.layout])
            for node in self.nodes
        )


def read(path: Path) -> Program:
    """Read a program file as data. Raises CheckpointError for a damaged one or one of another format."""
    try:
        with opened(path) as archive:
            entry = next(entry for entry in archive.infolist() if _record(entry) == PROGRAM)
            if entry.file_size > _LARGEST_GRAPH:
                raise CheckpointError(f"{path} has a graph of more than {_LARGEST_GRAPH >> 20} MiB.")
            text = archive.read(entry)
        graph = json.loads(text)
        version = graph["schema_version"]["major"]
        if version != SCHEMA:
            raise CheckpointError(
                f"{path} has version {version} of torch.export's format, and {SCHEMA} is read; export the "
                "model again with this PyTorch."
            )
        return _program(path, graph)
    except CheckpointError:
        raise
    except Exception as error:  # whatever damaged bytes or a graph that was made up lead to
        raise CheckpointError(
            f"{path} is a truncated or damaged torch.export program ({type(error).__name__}); copy or export "
            "it again."
        ) from error


def load(path: Path, *, trust: bool) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A program as a module that runs, with the inputs that it was exported on.

    Raises:
        ArgumentError: it is not trusted.
        CheckpointError: PyTorch cannot load it.
    """
    if not trust:
        raise ArgumentError(
            f"{path} has to be loaded to be run, and torch.export.load evaluates expressions that are in it; "
            "pass --trust (trust=True) only if you trust where the file comes from."
        )
    try:
        program = torch.export.load(path)
        arguments, keywords = program.example_inputs or ((), {})
        return program.module(), tuple(arguments), dict(keywords)
    except Exception as error:  # the file's own code may raise anything
        raise CheckpointError(
            f"{path} cannot be loaded by torch.export ({described(error)}); export it again."
        ) from error


# Reading


def _program(path: Path, graph: dict[str, Any]) -> Program:
    nodes: list[Node] = []
    skipped: list[Skipped] = []
    for tensors, data in _convolutions(graph["graph_module"]):
        arguments = _arguments(data)
        groups = arguments["groups"]["as_int"]
        weight = _tensor(tensors, arguments["weight"]["as_tensor"]["name"])
        if type(groups) is not int or groups < 2 or len(weight["sizes"]) != 5:
            continue
        name = _name(data, [node.name for node in nodes])
        reason = _reason(arguments, weight)
        if reason is None:
            most = max(_MOST_WEIGHTS, path.stat().st_size)
            nodes.append(_node(name, data, arguments, weight, tensors, groups, most))
        else:
            skipped.append(Skipped(name, data["target"], reason, groups))
    return Program(path, graph, tuple(nodes), tuple(skipped))


def _convolutions(value: Any) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every convolution in a JSON value, with the tensors of its graph; graphs may be nested."""
    stack: list[tuple[int, dict[str, Any], Any]] = [(0, {}, value)]
    while stack:
        depth, tensors, item = stack.pop()
        if depth > _DEEPEST:
            raise ValueError("it is nested too deeply")
        if isinstance(item, dict):
            if isinstance(item.get("tensor_values"), dict):
                tensors = {**tensors, **item["tensor_values"]}
            target = item.get("target")
            if isinstance(target, str) and target.removeprefix("torch.ops.") in _CONVOLUTIONS:
                yield tensors, item
            else:
                stack.extend((depth + 1, tensors, child) for child in reversed(item.values()))
        elif isinstance(item, list):
            stack.extend((depth + 1, tensors, child) for child in reversed(item))


_DEFAULTS: dict[str, Any] = {
    "bias": {"as_none": True},
    "stride": {"as_ints": [1, 1, 1]},
    "padding": {"as_ints": [0, 0, 0]},
    "dilation": {"as_ints": [1, 1, 1]},
    "groups": {"as_int": 1},
    "transposed": {"as_bool": False},
    "output_padding": {"as_ints": [0, 0, 0]},
}


def _arguments(data: dict[str, Any]) -> dict[str, Any]:
    transposed = data["target"].removeprefix("torch.ops.") == _TRANSPOSED
    given = {item["name"]: item["arg"] for item in data["inputs"]}
    return _DEFAULTS | {"transposed": {"as_bool": transposed}} | given


def _tensor(tensors: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = tensors[name]
    return found


def _reason(arguments: dict[str, Any], weight: dict[str, Any]) -> str | None:
    """Why a convolution stays what it is, if it does."""
    if weight["dtype"] not in _DTYPES:
        return "there are no kernels for its dtype"
    kinds = ("cpu", "cuda")
    if weight["device"]["type"] not in kinds:
        return f"there are no kernels for {weight['device']['type']} devices"
    lists = [arguments[name] for name in ("stride", "padding", "dilation", "output_padding")]
    if any("as_ints" not in item and "as_string" not in item for item in lists):
        return "its stride, padding or dilation depends on the input"
    more, steps = _triple(arguments["output_padding"]), _triple(arguments["stride"])
    if arguments["transposed"]["as_bool"] and any(m >= s for m, s in zip(more, steps)):
        return "its output_padding is not below its stride"
    if arguments["padding"].get("as_string") == "same":
        kernel, dilation = _sizes(weight)[2:], _triple(arguments["dilation"])
        if any(d * (k - 1) % 2 for d, k in zip(dilation, kernel)):
            return 'padding="same" adds more on one side; run_decompositions() makes a pad of its own of it'
    return None


def _node(
    name: str,
    data: dict[str, Any],
    arguments: dict[str, Any],
    weight: dict[str, Any],
    tensors: dict[str, Any],
    groups: int,
    most_weights: int,
) -> Node:
    image = _tensor(tensors, arguments["input"]["as_tensor"]["name"])
    shape, sizes = _sizes(image), _sizes(weight)
    strides = [_integer(item) for item in image["strides"]]
    batched = shape if len(shape) == 5 else (1, *shape)
    for counts, most in ((shape, _MOST_ELEMENTS), (sizes, most_weights)):
        if min(counts) < 1 or prod(counts) > most:
            raise ValueError(f"a tensor of shape {counts}")
    transposed = arguments["transposed"]["as_bool"]
    filters, channels = (sizes[1] * groups, sizes[0]) if transposed else (sizes[0], sizes[1] * groups)
    if len(batched) != 5 or batched[1] != channels or sizes[0] % groups:
        raise ValueError(f"a convolution of {shape} by {sizes}")
    kind, index = weight["device"]["type"], weight["device"]["index"]
    last = len(shape) == 5 and shape[1] > 1 and strides[1] == 1
    options: dict[str, Any] = {
        "in_channels": batched[1],
        "out_channels": filters,
        "kernel_size": sizes[2:],
        "stride": _triple(arguments["stride"]),
        "padding": _padding(arguments["padding"], sizes[2:], _triple(arguments["dilation"])),
        "dilation": _triple(arguments["dilation"]),
        "groups": groups,
        "bias": "as_tensor" in arguments["bias"],
        "dtype": _DTYPES[weight["dtype"]],
        "device": torch.device(kind, index),
    }
    kernel, stride, padding, dilation = (
        options[key] for key in ("kernel_size", "stride", "padding", "dilation")
    )
    size: Sequence[int] = batched[2:]
    if transposed:  # the convolution's input is what comes out
        more = options["output_padding"] = _triple(arguments["output_padding"])
        size = transposed_size(size, kernel, stride, padding, dilation, more)
    if any(
        s < 1 or d < 1 or n + 2 * p <= d * (k - 1)
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation)
    ):
        raise ValueError(f"a convolution of {shape} by {sizes}")
    return Node(name, data, options, transposed, batched, "channels_last_3d" if last else "contiguous")


def _sizes(tensor: dict[str, Any]) -> tuple[int, ...]:
    return tuple(_integer(item) for item in tensor["sizes"])


def _integer(item: dict[str, Any]) -> int:
    """A size; of a dynamic one, what it was when the program was exported."""
    value = item["as_int"] if "as_int" in item else item["as_expr"]["hint"]["as_int"]
    if type(value) is not int:
        raise ValueError(f"{value!r} is no size")
    return value


def _triple(argument: dict[str, Any]) -> tuple[int, ...]:
    values = argument["as_ints"]
    if len(values) not in (1, 3) or any(
        type(value) is not int or not 0 <= value < 1 << 31 for value in values
    ):
        raise ValueError(f"{values!r} are no three integers")
    return tuple(values * 3 if len(values) == 1 else values)


def _padding(argument: dict[str, Any], kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    if argument.get("as_string") == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel))
    return (0, 0, 0) if argument.get("as_string") == "valid" else _triple(argument)


def _name(data: dict[str, Any], taken: list[str]) -> str:
    """The path of the module that a node was traced from, unless that is no unique name for it."""
    stack = data.get("metadata", {}).get("nn_module_stack", "")
    path = [*stack.split(";")[-1].split(","), ""][1]
    usable = all(part.isidentifier() or part.isdecimal() for part in path.split("."))
    clash = any(f"{a}.".startswith(f"{b}.") for other in taken for a, b in ((path, other), (other, path)))
    if usable and not clash and path.partition(".")[0] not in dir(nn.Module):
        return path
    own = "".join(c if c.isalnum() else "_" for c in str(data.get("name") or "conv"))
    return next(name for i in range(len(taken) + 1) if (name := f"{own}_{i}" if i else own) not in taken)


# Writing


def _inputs(node: Node) -> list[dict[str, Any]]:
    """The arguments of our operator, in its order; ``tune`` and ``cache`` keep their defaults."""
    given = _arguments(node.data) | {"tune": {"as_string": "cached"}, "cache": {"as_string": ""}}
    given["padding"] = {"as_ints": list(node.arguments["padding"])}
    names = ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    if node.transposed:
        names += ["tune", "cache", "transposed", "output_padding"]
    return [{"name": name, "arg": given[name], "kind": 1} for name in names]


def _record(entry: zipfile.ZipInfo) -> str:
    """The name of an archive's record, without the folder that all are in."""
    return entry.filename.partition("/")[2]


def _add(archive: zipfile.ZipFile, place: int, name: str, content: bytes) -> None:
    """Add a record, aligned as PyTorch's own writer does it: with a field of padding in its header."""
    large = len(content) * 1.05 > zipfile.ZIP64_LIMIT  # then zipfile adds a field of 20 bytes of its own
    begin = place + 30 + len(name.encode()) + (20 if large else 0) + 4
    padding = -begin % _ALIGNMENT
    entry = zipfile.ZipInfo(name)
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    archive.writestr(entry, content)
