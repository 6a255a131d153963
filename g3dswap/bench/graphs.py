"""Times on a GPU: CUDA graphs of many calls on rotating operands, and the same calls one launch at a time.

A kernel of a few microseconds is shorter than its launch from Python, and hardly longer than the
resolution of an event. So a graph holds many calls, and the time of one is the graph's over their number.
The calls work on copies of the operands in turn, and write results of their own, so many of them that
each finds its data out of the L2 cache, as in a network, where other layers came between. The
same calls launched from Python tell what the host costs: what remains of a kernel's gain in a network that
runs eagerly.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from g3dswap.errors import described
from g3dswap.rounds import Key, Times, alternate
from g3dswap.tc.timing import Call, Sampler

Operands = Sequence[Tensor | None]
Run = Callable[..., Tensor]

CACHES = 3  # the operand sets of one rotation are together this many times the L2
SHARE = 8  # one set for each contender: all sets of one layout take this part of the free memory at most
SHORTEST = 2e-3  # seconds, as launched: of the calls that are timed as one
MOST_CALLS = 512  # in a graph
ESTIMATES = 3  # runs of a rotation that say how long a call takes


class Rotation:
    """Calls of one contender on several sets of operands in turn; the results live for one turn."""

    def __init__(self, run: Run, sets: Sequence[Operands]) -> None:
        self.run, self.sets = run, sets
        self.results: deque[Tensor] = deque(maxlen=len(sets))

    def __call__(self, count: int) -> None:
        """So many calls."""
        for number in range(count):
            self.results.append(self.run(*self.sets[number % len(self.sets)]))


def set_count(size: int, cache: int, memory: int) -> int:
    """How many sets of `size` bytes keep a cache cold, of those that the memory has room for.

    At least two, unless there is no room: a call then finds at most the end of what it used itself.
    """
    wanted = max(2, math.ceil(CACHES * cache / size))
    return max(1, min(wanted, MOST_CALLS, memory // (SHARE * size)))


def call_count(sets: int, seconds: float) -> int:
    """How many calls of `seconds` each to time as one: whole turns, long enough, MOST_CALLS at most."""
    turns = math.ceil(SHORTEST / (sets * max(seconds, 1e-7)))
    return sets * max(1, min(turns, MOST_CALLS // sets))


def copies(operands: Operands, count: int) -> list[Operands]:
    """The operands and `count` - 1 copies of them, in the same layout."""
    more = ([None if x is None else x.clone() for x in operands] for _ in range(count - 1))
    return [operands, *more]


def rotations(calls: Mapping[Key, tuple[Run, Operands]], size: int) -> dict[Key, Rotation]:
    """One for each contender; those with the same operands share the copies of them."""
    torch.cuda.empty_cache()  # what earlier graphs held is free, but only now for the driver to say
    count = set_count(size, cache_bytes(), torch.cuda.mem_get_info()[0])
    sets: dict[int, list[Operands]] = {}
    for _, operands in calls.values():
        if id(operands) not in sets:
            sets[id(operands)] = copies(operands, count)
    return {key: Rotation(run, sets[id(operands)]) for key, (run, operands) in calls.items()}


def cache_bytes() -> int:
    """The L2 cache of the current GPU."""
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def record(run: Callable[[], Sequence[Tensor]], warm_up: Call) -> Call:
    """A CUDA graph of `run`, as a function that replays it; RuntimeError if there can be none.

    warm_up: goes before, for what is searched, compiled or loaded at a first call on a stream. What `run`
    returns are results that each replay has to write, in finite numbers.
    """
    graph, stream, pool = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    stream.wait_stream(torch.cuda.current_stream())
    # The outer context also takes a failed capture back from its stream.
    with torch.cuda.stream(stream):
        warm_up()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                results = run()
        except RuntimeError:
            _abandon(graph, pool)
            raise
    torch.cuda.current_stream().wait_stream(stream)
    for result in results:
        result.fill_(math.nan)
    graph.replay()
    if not all(torch.isfinite(result).all() for result in results):
        raise RuntimeError("the graph does not write the result")
    return graph.replay


def _abandon(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
    """Let go of what a failed capture holds: its memory, and the generator of random numbers.

    Where it was cut short, PyTorch (2.11) goes on to take the device for one that captures.
    """
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):  # the capture may have come as far as this
        torch._C._cuda_endAllocateToPool(device, pool)
    try:
        graph.pool()
    except RuntimeError:  # it did not come to its end: the graph will not let go of anything
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_releasePool(device, pool)
    fresh = torch.Generator(torch.device("cuda", device))
    torch.cuda.default_generators[device].graphsafe_set_state(fresh.graphsafe_get_state())


def capture(rotation: Rotation, count: int) -> Call:
    """A CUDA graph of `count` calls that ran before, as a function that replays it; RuntimeError if not."""

    def warm_up() -> None:
        rotation(len(rotation.sets))
        rotation.results.clear()

    def run() -> list[Tensor]:
        rotation(count)
        return [rotation.results[-1]]

    replay = record(run, warm_up)
    rotation.results.clear()
    return replay


def measure(
    contenders: Mapping[Key, Rotation],
    seconds: float,
    *,
    eager: Sampler,
    graph: Sampler,
    captured: Callable[[Rotation, int], Call] = capture,
    launches: bool = True,
) -> dict[Key, Times]:
    """Time all contenders, which have run before, in graphs and launch by launch; each is rounds in turn.

    Every contender may take `seconds` in graphs, and half of that launch by launch. Without `launches` only
    those are timed so that have no graph.
    """
    counts = {key: call_count(len(it.sets), _estimate(it, eager)) for key, it in contenders.items()}
    graphs: dict[Key, Call] = {}
    notes: dict[Key, str] = {}
    for key, rotation in contenders.items():
        try:
            graphs[key] = captured(rotation, counts[key])
        except RuntimeError as error:  # PyTorch's, CUDA's and ours alike
            notes[key] = described(error)
    in_graphs = alternate(graphs, graph, seconds)
    calls = {k: partial(it, counts[k]) for k, it in contenders.items() if launches or k not in graphs}
    launched = alternate(calls, eager, seconds / 2)
    found = {key: times.each(counts[key]) for key, times in in_graphs.items()}
    for key, times in launched.items():
        alone = times.each(counts[key])
        found[key] = replace(
            found.get(key, alone),
            eager_seconds=alone.seconds,
            eager_spread=alone.spread,
            note=notes.get(key, ""),
        )
    return found


def _estimate(rotation: Rotation, sample: Sampler) -> float:
    """Seconds of a call."""
    calls = len(rotation.sets)
    return statistics.median(sample(partial(rotation, calls)) for _ in range(ESTIMATES)) / calls
