"""Mutated files and texts for all that reads what others wrote: a result or a g3dswap error, nothing else.

``python -m tests.fuzz --seconds 600`` looks for new failures, prints each with the input that shows it, and
how often every outcome was met. The suite runs a short, repeatable form (test_fuzz.py).
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import random
import resource
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import nn

import g3dswap
from g3dswap import checkpoint, program
from g3dswap.arch import parse_inputs, parse_kwargs
from g3dswap.choice import Record
from g3dswap.errors import G3DSwapError
from g3dswap.plan import read_plan
from g3dswap.show import parse_schedule
from g3dswap.sniff import PROGRAM
from g3dswap.tc.cache import Cache
from g3dswap.tc.entries import decode, encode, read
from g3dswap.tc.parser import parse

LONGEST = 30.0
"""Seconds after which one example counts as a hang: what was going on is printed, and the process ends."""

_WORDS = [
    b"", b"\0", b"\xff\xff\xff\xff", b"\x80\x02", b".", b"{", b"[" * 2000, b"}", b'"', b"-1", b"0", b"1e400",
    b"9" * 400, b"NaN", b"null", b"true", b"$x", b"@network_def", b"PK\x03\x04", b"PK\x05\x06", b"\n",
    b"\xc3", b"(", b")" * 50, b"+=!", b"-> (A)", b"sqrt(", b"where i in 0:9", b"/ 0",
    b"cbuiltins\neval\n",
    b"R", b"x" * 300,
]  # fmt: skip
_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, 1e308, "", "x", "\0", "same", [], {}, [1, 2, 3],
    [[]], {"as_int": 3}, {"as_ints": [1, 1, 1]}, {"as_tensor": {"name": "x"}}, "@network_def", "$1",
    ["a"] * 9,
]  # fmt: skip
_NOTATION = """def forward(float(N,G,C,T) I, float(G,F,C,K) A, float(G,F) B) -> (O) {
  O(n,g,f,t) +=! I(n,g,c, t*2 + k*1 - 1) * A(g,f,c,k) where k in 0:3, t in 0:4  # a comment
  O(n,g,f,t) = O(n,g,f,t) + B(g,f)
}"""

Mutation = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Target:
    """Valid inputs, and what reads them; a structured one is JSON, which is changed as such too."""

    name: str
    seeds: tuple[bytes, ...]
    run: Callable[[bytes], object]
    structured: bool = False


# Mutations


@st.composite
def mutated(draw: st.DrawFn, target: Target) -> bytes:
    """A seed of the target with some changes."""
    data = draw(st.sampled_from(target.seeds))
    for _ in range(draw(st.integers(1, 5))):
        if target.structured and draw(st.booleans()):
            data = draw(_changed_json(data))
        else:
            data = draw(_changed_bytes(data, target.seeds))
    return data


@st.composite
def _changed_bytes(draw: st.DrawFn, data: bytes, seeds: Sequence[bytes]) -> bytes:
    start = draw(st.integers(0, len(data)))
    # Most of what decides is short and near: a few bytes, a length, a token.
    end = min(len(data), start + draw(st.sampled_from([0, 1, 2, 4, 8, 64, 4096])))
    kind = draw(st.sampled_from(["cut", "word", "bytes", "flip", "end", "splice", "twice"]))
    if kind == "word":
        return data[:start] + draw(st.sampled_from(_WORDS)) + data[end:]
    if kind == "bytes":
        return data[:start] + draw(st.binary(max_size=12)) + data[end:]
    if kind == "flip":
        return (
            data[:start]
            + bytes(b ^ draw(st.integers(1, 255)) for b in data[start : start + 1])
            + data[start + 1 :]
        )
    if kind == "end":
        return data[:start]
    if kind == "splice":
        other = draw(st.sampled_from(seeds))
        at = draw(st.integers(0, len(other)))
        return data[:start] + other[at:]
    return (
        data[:start]
        + (data[start:end] if kind == "twice" else b"")
        + data[start + (kind == "cut") * (end - start) :]
    )


@st.composite
def _changed_json(draw: st.DrawFn, data: bytes) -> bytes:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return data
    places = list(_places(value))
    if not places:
        return data
    holder, key = draw(st.sampled_from(places))
    kind = draw(st.sampled_from(["value", "value", "delete", "swap"]))
    if kind == "value":
        holder[key] = draw(st.sampled_from(_VALUES))
    elif kind == "delete":
        del holder[key]
    else:
        other, at = draw(st.sampled_from(places))
        holder[key] = json.loads(json.dumps(other[at]))
    return json.dumps(value).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    stack = [value]
    while stack:
        item = stack.pop()
        if not isinstance(item, (dict, list)):
            continue
        pairs = list(item.items()) if isinstance(item, dict) else list(enumerate(item))
        for key, child in pairs:
            yield item, key
            stack.append(child)


# Targets


class Net(nn.Module):
    """What is saved as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 4, 3, groups=4)
        self.norm = nn.BatchNorm3d(4)


def targets(folder: Path) -> list[Target]:
    """All of them; files are written below ``folder``."""
    folder.mkdir(exist_ok=True)
    plans = _plan(folder, nn.Identity()), _plan(folder, nn.SiLU())
    entries = _entry(_SCHEDULE), _entry(_PACKED)
    pickles = tuple(_pickle(data) for data in _checkpoints()[:1])
    graph = _program(folder)
    return [
        Target("notation", (_NOTATION.encode(),), lambda data: parse(data.decode("utf-8", "replace"))),
        Target(
            "schedule",
            (_SCHEDULE, _PACKED),
            lambda data: parse_schedule(data.decode("utf-8", "replace")),
            True,
        ),
        Target("inputs", (b"8x3x16x112x112,1:int64",), lambda data: parse_inputs(data.decode("latin-1"))),
        Target("kwargs", (b'{"depth": 101}',), lambda data: parse_kwargs(data.decode("latin-1")), True),
        Target("cache", entries, lambda data: _read_cache(folder, data), True),
        Target("plan", plans, lambda data: read_plan(_file(folder, "plan.json", data)), True),
        Target("checkpoint", _checkpoints(), lambda data: _read_checkpoint(_file(folder, "in", data))),
        Target("pickle", pickles, lambda data: _read_checkpoint(_zip(folder, "archive/data.pkl", data))),
        Target("program", (_records(graph),), lambda data: _read_program(_file(folder, "in.pt2", data))),
        Target(
            "graph", (_graph(graph),), lambda data: _read_program(_zip(folder, f"in/{PROGRAM}", data)), True
        ),
        Target("bundle", (_BUNDLE,), lambda data: _read_bundle(folder, data), True),
    ]


_SCHEDULE = json.dumps(
    {
        "digits": ["n rest serial", "g 4 serial", "g rest serial"],
        "fuse": [],
        "stage": [],
        "hints": {"warps": 4},
    }
).encode()
_PACKED = json.dumps(
    {
        "digits": ["g rest grid", "gi*f 32 rows", "gj*c 32 cols", "h*w rest serial", "h*w 64 depth"],
        "fuse": [["gi", "f"], ["gj", "c"], ["h", "w"]],
        "stage": [],
        "hints": {"ahead": 8, "stages": 3, "warps": 2},
        "pack": {"g": 4},
    }
).encode()
_BUNDLE = json.dumps(
    {
        "network_def": {
            "_target_": "torch.nn.Conv3d",
            "in_channels": "@n::0",
            "out_channels": 4,
            "kernel_size": 3,
        },
        "n": [4, "@n::0"],
    }
).encode()


def _file(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def _checkpoints() -> tuple[bytes, ...]:
    model = Net()
    state = model.state_dict()
    found = []
    nested = {
        "state_dict": {f"module.{k}": v for k, v in state.items()},
        "epoch": 3,
        "pytorch-lightning_version": "2",
    }
    for payload in (nested, state, model, {"model": state, "args": argparse.Namespace(lr=1)}):
        for new in (True, False):
            buffer = io.BytesIO()
            torch.save(payload, buffer, _use_new_zipfile_serialization=new)
            found.append(buffer.getvalue())
    found.append(safetensors.torch.save(dict(state), {"alias": "conv.weight"}))
    return tuple(found)


def _read_checkpoint(path: Path) -> None:
    stored = checkpoint.read(path)
    fitted = stored.fit(["conv.weight", "conv.bias", "norm.weight"])
    checkpoint.write(path.with_name("out"), fitted, fitted.state_dict, force=True)


def _pickle(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read("archive/data.pkl")


def _zip(folder: Path, name: str, data: bytes) -> Path:
    """The archive of the valid file with one record replaced, so that its sum is right again."""
    valid = folder / ("valid.pt2" if name.endswith(PROGRAM) else "valid.pth")
    if not valid.exists():
        valid.write_bytes(_checkpoints()[0])
    buffer = io.BytesIO()
    with zipfile.ZipFile(valid) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            same = entry.filename.partition("/")[2] == name.partition("/")[2]
            new.writestr(entry.filename, data if same else old.read(entry))
    return _file(folder, "zipped", buffer.getvalue())


def _program(folder: Path) -> Path:
    path = folder / "valid.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = torch.export.Dim("batch", min=1, max=9)
        model, image = nn.Sequential(Net().conv, nn.ReLU()), torch.randn(2, 4, 4, 4, 4)
        torch.export.save(torch.export.export(model, (image,), dynamic_shapes=({0: batch},)), path)
    return path


def _records(path: Path) -> bytes:
    return path.read_bytes()


def _graph(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return next(archive.read(e) for e in archive.infolist() if e.filename.endswith(PROGRAM))


def _read_program(path: Path) -> None:
    if checkpoint.kind(path) == "program":
        stored = program.read(path)
        layers = program.Layers(stored)
        stored.write(path.with_name("out.pt2"), layers, force=True)


def _read_bundle(folder: Path, data: bytes) -> None:
    root = folder / "bundle"
    for part in ("configs", "models"):
        (root / part).mkdir(parents=True, exist_ok=True)
    (root / "configs/inference.json").write_bytes(data)
    torch.save(Net().state_dict(), root / "models/model.pt")
    stored = checkpoint.read(root)
    assert stored.bundle is not None
    stored.bundle.network()


def _plan(folder: Path, after: nn.Module) -> bytes:
    """Of a model with that after its convolutions; what can be fused is."""
    model = nn.Sequential(nn.Conv3d(4, 4, 3, groups=4), nn.Conv3d(4, 4, 1, groups=2), after).eval()
    image = torch.randn(1, 4, 4, 4, 4)
    fast = g3dswap.convert(model, image, tune="none", fuse=True, verify=False, progress=False)
    g3dswap.save_plan(fast, folder / "plan.json")
    return (folder / "plan.json").read_bytes()


def _entry(schedule: bytes) -> bytes:
    record = Record(2, "quick", False, json.loads(schedule), 1.0, 2.0, 1e-8, 1e-6)
    key = {"device_name": "Some CPU", "direction": "forward", "size": [1, 2, 3], "activation": "silu"}
    return encode(key, record.to_json()).encode()


def _read_cache(folder: Path, data: bytes) -> None:
    place = folder / "cache"
    place.mkdir(exist_ok=True)
    path = _file(place, "some-cpu.jsonl", data)
    for line in read(path).lines.values():
        try:
            Record.from_json(decode(line).value)
        except ValueError:
            continue  # what the chooser sets aside
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Cache(place).entries()


# Running


def examples(target: Target, count: int, tally: Counter[str], **options: Any) -> Callable[[], None]:
    """A test of that many mutations, which notes what came of them."""

    @settings(
        max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck), **options
    )
    @given(mutated(target))
    def check(data: bytes) -> None:
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        try:
            target.run(data)
            tally["read"] += 1
        except G3DSwapError as error:
            assert str(error).strip(), "a message of nothing"
            tally[type(error).__name__] += 1
        finally:
            faulthandler.cancel_dump_traceback_later()

    return check


def main() -> int:
    """The long form; the exit code is the number of targets that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="how long to look")
    parser.add_argument("--only", action="append", help="a target; may be repeated")
    parser.add_argument("--seed", type=int, default=None, help="begin with the same mutations as another run")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))  # a file must not take all memory
    warnings.simplefilter("ignore")
    rng = random.Random(arguments.seed)
    failed: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="g3dswap-fuzz-") as place:
        known = targets(Path(place))
        chosen = [t for t in known if not arguments.only or t.name in arguments.only]
        tallies = {target.name: Counter[str]() for target in chosen}
        end = time.monotonic() + arguments.seconds
        while time.monotonic() < end:
            for target in chosen:
                test = examples(
                    target, 400, tallies[target.name], phases=(Phase.generate, Phase.shrink), print_blob=True
                )
                try:
                    seed(rng.getrandbits(64))(test)()
                except Exception as error:  # any other exception is the finding
                    failed.add(target.name)
                    notes = "\n".join(getattr(error, "__notes__", []))
                    print(f"{target.name}: {type(error).__name__}: {error}\n{notes}", file=sys.stderr)
    for name, tally in tallies.items():
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in tally.most_common())
        print(f"{name:12}{'FAILED' if name in failed else 'ok':8}{tally.total():8} examples: {outcomes}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
