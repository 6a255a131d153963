"""Times on a GPU: how many operands and calls, graphs that cannot be captured, what the driver says."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from g3dswap import native
from g3dswap.bench import device, graphs, measure
from g3dswap.bench.graphs import Rotation, call_count, set_count
from g3dswap.bench.markdown import document
from g3dswap.bench.results import Results
from g3dswap.choice import Choice
from g3dswap.problem import DIRECTIONS, LAYOUTS, Geometry, Problem
from g3dswap.rounds import Times
from g3dswap.tc import timing
from g3dswap.tc.timing import Call
from tests.apart import alone
from tests.test_bench import synthetic

MIB = 1 << 20


@given(
    size=st.integers(1, 1 << 33), cache=st.sampled_from([4 * MIB, 60 * MIB]), memory=st.integers(1, 1 << 37)
)
def test_operand_sets_exceed_the_cache_or_fill_their_share_of_the_memory(
    size: int, cache: int, memory: int
) -> None:
    sets = set_count(size, cache, memory)
    assert 1 <= sets <= graphs.MOST_CALLS
    assert sets == 1 or sets * size * graphs.SHARE <= memory
    cold = sets >= 2 and sets * size >= graphs.CACHES * cache
    assert cold or sets == graphs.MOST_CALLS or (sets + 1) * size * graphs.SHARE > memory


def test_set_counts() -> None:
    assert set_count(4 * MIB, 60 * MIB, 80 << 30) == 45
    assert set_count(1 << 30, 60 * MIB, 80 << 30) == 2
    assert set_count(8 << 30, 60 * MIB, 80 << 30) == 1
    assert set_count(16, 60 * MIB, 80 << 30) == graphs.MOST_CALLS


@given(sets=st.integers(1, graphs.MOST_CALLS), seconds=st.floats(0, 10))
def test_calls_that_are_timed_as_one_are_whole_turns(sets: int, seconds: float) -> None:
    calls = call_count(sets, seconds)
    assert calls % sets == 0
    assert sets <= calls <= max(sets, graphs.MOST_CALLS)
    assert calls * seconds >= graphs.SHORTEST or calls + sets > graphs.MOST_CALLS or seconds < 1e-7
    assert calls == sets or (calls - sets) * seconds < graphs.SHORTEST


def test_a_rotation_uses_its_operands_in_turn_and_keeps_the_results_of_one() -> None:
    seen: list[float] = []

    def run(x: Tensor, none: None) -> Tensor:
        seen.append(float(x))
        return x.clone()

    sets = [[torch.tensor(value), None] for value in (1.0, 2.0, 3.0)]
    rotation = Rotation(run, sets)
    rotation(7)
    assert seen == [1, 2, 3, 1, 2, 3, 1]
    assert [float(x) for x in rotation.results] == [2, 3, 1]
    assert len({x.data_ptr() for x in rotation.results}) == 3


def test_copies_keep_the_layout() -> None:
    x = torch.randn(2, 4, 3, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    first, second, third = graphs.copies([x, None], 3)
    assert first[0] is x
    for operands in (second, third):
        copy = operands[0]
        assert copy is not None and torch.equal(copy, x)
        assert copy.stride() == x.stride()
        assert copy.data_ptr() != x.data_ptr()
        assert operands[1] is None


class Device:
    """Stands for a GPU: a call takes its own time in a graph, and the host's where that is longer."""

    def __init__(self, durations: dict[str, float], host: float, refused: str = "") -> None:
        self.durations, self.host, self.refused = durations, host, refused
        self.spent = 0.0
        self.log: list[str] = []

    def rotation(self, name: str, sets: int) -> Rotation:
        def run() -> Tensor:
            self.spent += max(self.durations[name], self.host)
            return torch.empty(0)

        rotation = Rotation(run, [[]] * sets)
        rotation.name = name  # type: ignore[attr-defined]
        return rotation

    def capture(self, rotation: Rotation, count: int) -> Callable[[], None]:
        name = rotation.name  # type: ignore[attr-defined]
        if name == self.refused:
            raise RuntimeError("operation not permitted when stream is capturing\nadvice")

        def replay() -> None:
            self.log.append(name)
            self.spent += count * self.durations[name]

        return replay

    def sample(self, call: Callable[[], object]) -> float:
        before = self.spent
        call()
        return self.spent - before

    def measure(self, seconds: float, launches: bool = True) -> dict[str, Times]:
        contenders = {name: self.rotation(name, 4) for name in self.durations}
        return graphs.measure(
            contenders,
            seconds,
            eager=self.sample,
            graph=self.sample,
            captured=self.capture,
            launches=launches,
        )


def test_graphs_count_and_launches_stand_beside_them() -> None:
    gpu = Device({"small": 3e-6, "large": 1e-3}, host=2e-5)
    times = gpu.measure(0.01)
    assert times["small"].seconds == pytest.approx(3e-6)
    assert times["small"].eager_seconds == pytest.approx(2e-5)
    assert times["large"].seconds == pytest.approx(1e-3)
    assert times["large"].eager_seconds == pytest.approx(1e-3)
    assert times["large"].eager_spread == pytest.approx(0, abs=1e-6)
    assert gpu.log[:4] == ["small", "large", "large", "small"]
    assert {it.note for it in times.values()} == {""}


def test_what_cannot_be_captured_counts_by_its_launches() -> None:
    gpu = Device({"a": 3e-6, "b": 3e-6}, host=2e-5, refused="b")
    times = gpu.measure(0.01)
    assert times["a"].seconds == pytest.approx(3e-6)
    assert times["b"].seconds == times["b"].eager_seconds == pytest.approx(2e-5)
    assert times["b"].note == "RuntimeError: operation not permitted when stream is capturing"


def test_launches_may_count_only_where_there_is_no_graph() -> None:
    times = Device({"a": 3e-6, "b": 3e-6}, host=2e-5, refused="b").measure(0.01, launches=False)
    assert times["a"].seconds == pytest.approx(3e-6)
    assert times["a"].eager_seconds is None
    assert times["b"].seconds == times["b"].eager_seconds == pytest.approx(2e-5)
    assert times["b"].note and not times["a"].note


def test_nothing_can_be_captured() -> None:
    gpu = Device({"a": 3e-6}, host=2e-5, refused="a")
    assert gpu.measure(0.01)["a"].seconds == pytest.approx(2e-5)


# The recording of a graph, with PyTorch's part made up.


class Graph:
    """Of PyTorch's; a replay does what the test says."""

    replay: Call


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Says what happened of PyTorch's capture."""
    log: list[str] = []

    class Stream:
        def wait_stream(self, other: Any) -> None:
            pass

    @contextlib.contextmanager
    def capturing(graph: Graph, pool: Any, stream: Stream) -> Iterator[None]:
        log.append("begin")
        yield
        log.append("end")

    for name, value in {
        "CUDAGraph": Graph,
        "Stream": Stream,
        "graph_pool_handle": lambda: (0, 7),
        "current_stream": Stream,
        "stream": contextlib.nullcontext,
        "graph": capturing,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(graphs, "_abandon", lambda graph, pool: log.append(f"abandon {pool}"))
    return log


def test_a_replay_must_write_every_result(cuda: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    results = [torch.zeros(3), torch.zeros(2)]
    monkeypatch.setattr(Graph, "replay", lambda self: [x.fill_(1) for x in results], raising=False)

    def run() -> list[Tensor]:
        cuda.append("run")
        return results

    replay = graphs.record(run, lambda: cuda.append("warm up"))
    assert cuda == ["warm up", "begin", "run", "end"]
    for x in results:
        x.zero_()
    replay()
    assert all(torch.equal(x, torch.ones_like(x)) for x in results)
    monkeypatch.setattr(Graph, "replay", lambda self: results[0].fill_(1))
    with pytest.raises(RuntimeError, match="does not write the result"):
        graphs.record(run, lambda: None)


def test_a_failed_capture_is_cleared_away(cuda: list[str]) -> None:
    def run() -> list[Tensor]:
        raise RuntimeError("not permitted")

    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.record(run, lambda: None)
    assert cuda == ["begin", "abandon (0, 7)"]


# What stands in files and tables.


def on_a_gpu() -> Results:
    """The made-up results with times of launches, one of them without a graph, and torch.compile."""
    results = synthetic()
    results.header["device"] = {"device_name": "A GPU", "capability": "9.0", "cores": 16}
    results.header["gpu"] = {"l2_bytes": 60 * MIB, **dict.fromkeys(device.QUERIES, device.UNKNOWN)}

    def eager(times: Times, factor: float, note: str = "") -> Times:
        return Times(
            **{**vars(times), "eager_seconds": times.seconds * factor, "eager_spread": 0.1, "note": note}
        )

    results.rows = [
        type(row)(
            **{
                **vars(row),
                "ours": eager(row.ours, 1.5, "CUDA objects" if number == 4 else ""),
                "torch": {layout: eager(times, 1.25) for layout, times in row.torch.items()},
                "compiled": {"contiguous": eager(row.torch["contiguous"], 1.25)} if number == 0 else {},
            }
        )
        for number, row in enumerate(results.rows)
    ]
    return results


def test_times_of_launches_are_kept_and_shown(tmp_path: Path) -> None:
    results = on_a_gpu()
    results.save(tmp_path / "out.json")
    assert Results.load(tmp_path / "out.json") == results
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["rows"][0]["ours"]["eager_seconds"] == pytest.approx(1.5e-3)
    assert data["rows"][0]["speedup"]["same_eager"] == pytest.approx(4 * 1.25 / 1.5)
    assert data["rows"][0]["speedup"]["compiled"] == pytest.approx(4)
    assert data["rows"][1]["speedup"]["same_eager"] == 1  # it is PyTorch's own
    assert data["summary"][0]["slowest_eager"] == 1
    assert data["summary"][0]["compiled"] == pytest.approx(4)
    text = document([results])
    assert (
        "driver unknown, SM unknown of unknown MHz, memory unknown of unknown MHz, unknown W, L2 60 MiB"
        in text
    )
    assert "CUDA graphs of many calls on rotating operands" in text
    assert "| least same | least same, eager |" in text
    assert "No CUDA graph of ours: CUDA objects." in text
    assert "0.250 eager +-60%, 40%" in text
    assert "| torch.compile |" in text


def test_several_files_are_one_document() -> None:
    cpu, gpu = synthetic(), on_a_gpu()
    text = document([cpu, gpu])
    assert text == document([cpu]) + "\n" + document([gpu])
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## float32, A CPU",
        "## float32, A GPU",
    ]


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """What they had no notion of is left out: eager times, torch.compile, transposed layers."""
    data = json.loads((Path(device.__file__).with_name("results") / "cpu-xeon-2-cores.json").read_text())
    del data["best"], data["header"]["settings"]["compile"]
    for row in data["rows"]:
        del row["compiled"], row["problem"]["transposed"]
        del row["speedup"]["same_eager"], row["speedup"]["compiled"]
        for times in (row["ours"], *row["torch"].values()):
            for name in ("eager_seconds", "eager_spread", "note"):
                if times:
                    del times[name]
    (tmp_path / "earlier.json").write_text(json.dumps(data))
    stored = Results.load(tmp_path / "earlier.json")
    assert len(stored.rows) == 126
    assert stored.rows[0].same_eager is None
    assert stored.header["settings"]["compile"] is False
    assert "eager" not in document([stored])


@pytest.mark.parametrize(
    ("printed", "driver", "clock"),
    [
        ("570.1, 1980, 3201, 1980, 3201, 700.00\n", "570.1", "1980"),
        ("570.1, [N/A], 3201, 1980, 3201, 700.00\n", "570.1", "unknown"),
        ("No devices were found\n", "unknown", "unknown"),
        (None, "unknown", "unknown"),
    ],
)
def test_what_the_driver_says(
    monkeypatch: pytest.MonkeyPatch, printed: str | None, driver: str, clock: str
) -> None:
    def run(words: list[str], **options: Any) -> Any:
        assert words[-1] == "--id=GPU-1234"
        if printed is None:
            raise FileNotFoundError(words[0])
        return SimpleNamespace(stdout=printed)

    monkeypatch.setattr(subprocess, "run", run)
    found = device.queried("1234")
    assert set(found) == set(device.QUERIES)
    assert (found["driver"], found["sm_mhz"]) == (driver, clock)


# torch.compile.


def problems(direction: str, kind: str = "cpu") -> dict[str, Problem]:
    geometry = Geometry(4, 4, 4, (4, 6, 6), (3, 3, 3), padding=(1, 1, 1))
    return {layout: Problem(direction, geometry, layout=layout, device=kind) for layout in LAYOUTS}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_is_compiled_is_pytorchs_operator(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    found = problems(direction)
    operands = {layout: native.random_operands(problem, 2) for layout, problem in found.items()}
    compiled, failed = measure._compile(found, operands)
    assert failed == {}
    for layout, problem in found.items():
        assert torch.equal(compiled[layout](*operands[layout]), native.run(problem, *operands[layout]))


def test_torch_compile_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: Any, **options: Any) -> Any:
        def run(*tensors: Any) -> Any:
            raise RuntimeError("no backend\nat all")

        return run

    monkeypatch.setattr(torch, "compile", refuse)
    found = problems("forward")
    choices = {layout: Choice(problem, "native", "") for layout, problem in found.items()}
    measured = measure.measure_pass(choices, found, 1, 0.001, compiled=True)
    assert measured.compiled == {}
    assert set(measured.failed.values()) == {"RuntimeError: no backend"}
    assert set(measured.torch) == set(LAYOUTS)


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_graphs_on_a_gpu(direction: str) -> None:
    found = problems(direction, "cuda")
    choices = {layout: Choice(problem, "native", "") for layout, problem in found.items()}
    measured = measure.measure_pass(choices, found, 2, 0.01)
    for times in measured.torch.values():
        assert times.note == ""
        assert times.eager_seconds is not None
        assert 0 < times.seconds < 1e-3


@pytest.mark.gpu
def test_what_synchronizes_has_no_graph_and_stops_nothing() -> None:
    alone(what_synchronizes)  # what a failed capture leaves behind is no other test's business


def what_synchronizes() -> None:
    """What the test above checks."""
    x = torch.randn(1 << 20, device="cuda")

    def synchronizes(x: Tensor) -> Tensor:
        return x * float(x.sum())

    contenders = graphs.rotations({"good": (torch.neg, [x]), "bad": (synchronizes, [x])}, 8 << 20)
    stream = torch.cuda.current_stream()
    times = graphs.measure(contenders, 0.01, eager=timing.event_sampler(), graph=timing.sampler("cuda"))
    assert torch.cuda.current_stream() == stream
    assert times["good"].note == ""
    assert times["bad"].note
    assert times["bad"].seconds == times["bad"].eager_seconds
    torch.cuda.synchronize()
    assert torch.equal(torch.neg(x), -x)


@pytest.mark.gpu
def test_a_graph_that_misses_the_kernel_is_none() -> None:
    x = torch.randn(1 << 20, device="cuda")
    ready = torch.randn_like(x)
    rotation = Rotation(lambda x: (x.neg(), ready)[1], [[x]])
    with pytest.raises(RuntimeError, match="does not write the result"):
        graphs.capture(rotation, 1)


@pytest.mark.gpu
def test_facts_of_a_gpu() -> None:
    facts = device.gpu_facts()
    assert facts["l2_bytes"] > 0
    assert set(device.QUERIES) <= set(facts)
