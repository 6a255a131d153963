"""The benchmark: layer files, rounds, means, tables, and the command end to end on tiny layers."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from rich.console import Console
from torch import Tensor

from g3dswap import choose, cli, rounds, workload
from g3dswap.bench import markdown, measure, run, table, text
from g3dswap.bench.layers import SHIPPED, read_layers
from g3dswap.bench.measure import Ceilings, Check
from g3dswap.bench.results import Results
from g3dswap.bench.rows import Row
from g3dswap.bench.summary import summarize
from g3dswap.errors import ArgumentError
from g3dswap.problem import LAYOUTS, Geometry, Problem
from g3dswap.rounds import Times, alternate
from tests.conftest import Golden
from tests.fakes import SCHEDULE, FakeChooser, Wrong

DEPTHWISE: dict[str, Any] = {
    **{"model": "Tiny", "layer": "blocks.0.conv", "N": 2, "C": 4, "T": 3, "H": 5, "W": 6, "F": 4},
    **{"groups": 4, "kernel": [3, 3, 3], "stride": [1, 2, 2], "padding": [1, 1, 1], "dilation": [1, 1, 1]},
    "bias": True,
}
GROUPED = {**DEPTHWISE, "layer": "blocks.1.conv", "F": 8, "groups": 2, "stride": [1, 1, 1], "bias": False}

Write = Callable[[Any], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Puts a layer file into the test's folder."""

    def write(data: Any) -> Path:
        path = tmp_path / "layers.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return path

    return write


# Layer files.


def test_the_shipped_layers_are_all_there() -> None:
    layers = read_layers()
    assert len(layers) == len(json.loads(SHIPPED.read_text())) == 21
    first = layers[0]
    assert first.batch == 4
    assert first.geometry == Geometry(64, 64, 64, (50, 50, 50), (3, 3, 3))
    assert (first.bias, first.count, first.kind) == (False, 1, "depthwise")
    assert [layer.geometry.stride for layer in layers if layer.layer == "down_0.conv1"] == [(2, 2, 2)]


def test_globs_choose_layers(write: Write) -> None:
    path = write([DEPTHWISE, GROUPED])
    names = [layer.layer for layer in read_layers(path, ["Tiny *1*"])]
    assert names == ["blocks.1.conv"]
    assert [layer.layer for layer in read_layers(path, ["blocks.0.conv", "nothing"])] == ["blocks.0.conv"]
    assert len(read_layers(path, ["blocks*"])) == 2
    with pytest.raises(ArgumentError, match=r"No layer of .* fits 'x' or 'y'; its first is 'Tiny blocks"):
        read_layers(path, ["x", "y"])


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in DEPTHWISE.items() if key != name}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("[{", r"layers\.json is no JSON \(.*\); give a JSON list of layers\."),
        ("[NaN]", r"is no JSON \(nan is not a finite number\)|is no JSON \(NaN"),
        ({}, r"holds no list of layers; give a JSON list with one object a layer\."),
        ([], r"holds no list of layers"),
        ([DEPTHWISE, 3], r"layer 2: 3 is no object; give one with the layer's geometry\."),
        (
            [without("stride")],
            r"layer 1: 'stride' is missing; every layer needs model, layer, N, .*dilation\.",
        ),
        ([{**DEPTHWISE, "pad": 1}], r"layer 1: 'pad' is unknown; the fields are model, .*kind\."),
        ([{**DEPTHWISE, "model": ""}], r"layer 1: model is ''; give its name as a string\."),
        ([{**DEPTHWISE, "N": 0}], r"layer 1: N is 0; give an integer of at least 1\."),
        ([{**DEPTHWISE, "C": True}], r"layer 1: C is True; give an integer of at least 1\."),
        ([{**DEPTHWISE, "T": 2.0}], r"layer 1: T is 2\.0; give an integer"),
        ([{**DEPTHWISE, "kernel": [3, 3]}], r"kernel is \[3, 3\]; give three integers of at least 1\."),
        (
            [{**DEPTHWISE, "padding": [0, -1, 0]}],
            r"padding is \[0, -1, 0\]; give three integers of at least 0\.",
        ),
        ([{**DEPTHWISE, "bias": 1}], r"layer 1: bias is 1; give true or false\."),
        ([{**DEPTHWISE, "count": 0}], r"layer 1: count is 0; give an integer of at least 1\."),
        ([{**DEPTHWISE, "kind": None}], r"layer 1: kind is None; give a word, or leave it out\."),
        ([{**DEPTHWISE, "groups": 3}], r"layer 1: in_channels=4 is not divisible by groups=3;"),
        (
            [{**DEPTHWISE, "kernel": [9, 3, 3]}],
            r"layer 1: The dilated kernel .* is larger than the padded input",
        ),
        (
            [DEPTHWISE, DEPTHWISE],
            r"layer 2: 'Tiny blocks.0.conv' is layer 1 already; give each its own name\.",
        ),
    ],
)
def test_bad_layer_files(write: Write, data: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        read_layers(write(data))
    assert "\n" not in str(caught.value)


def test_a_layer_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        ArgumentError, match=r"cannot be read \(No such file.*\); give a JSON file of layers\."
    ):
        read_layers(tmp_path / "none.json")


# Rounds and times.


class Clock:
    """Stands for a sampler: each call has a duration of its own, and is logged."""

    def __init__(self, durations: dict[str, float]) -> None:
        self.durations = durations
        self.log: list[str] = []

    def call(self, name: str) -> Callable[[], str]:
        return lambda: name

    def __call__(self, call: Callable[[], object]) -> float:
        name = str(call())
        self.log.append(name)
        return self.durations[name]


def in_rounds(durations: dict[str, float], seconds: float) -> tuple[dict[str, Times], list[str]]:
    clock = Clock(durations)
    times = alternate({name: clock.call(name) for name in durations}, clock, seconds)
    return times, clock.log


def test_rounds_alternate_in_rotated_order() -> None:
    times, log = in_rounds({"a": 0.1, "b": 0.1, "c": 0.1}, seconds=0.45)
    assert log == list("abcbcacababcbca")
    assert {name: item.runs for name, item in times.items()} == {"a": 5, "b": 5, "c": 5}


def test_a_slow_contender_runs_seldom_and_a_fast_one_often() -> None:
    times, log = in_rounds({"slow": 4.0, "middle": 0.3, "fast": 0.001}, seconds=0.5)
    assert times["slow"].runs == rounds.FEWEST
    assert times["middle"].runs == rounds.ENOUGH
    assert times["fast"].runs == rounds.MOST
    assert log[:9].count("slow") == 3


def test_times_are_a_median_or_a_quartile() -> None:
    times = Times.of([5.0, 1.0, 2.0, 4.0, 30.0])
    assert (times.seconds, times.low, times.median, times.high, times.runs) == (4.0, 2.0, 4.0, 5.0, 5)
    assert times.spread == 0.75
    assert times.by("quartile").seconds == 2.0
    assert times.by("quartile").spread == 1.5
    assert times.by("quartile").by("median") == times


def test_ceilings_are_measured(small_device: None) -> None:
    found = measure.ceilings("cpu", torch.float32, 0.01)
    assert 0 < found.bandwidth < math.inf
    assert list(found.product) == ["ieee"]


def test_a_cpu_computes_half_types_in_float32_where_that_is_faster(
    small_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {torch.bfloat16: 1e9, torch.float32: 1e11}
    monkeypatch.setattr(measure, "_product", lambda device, dtype, sample, seconds: speeds[dtype])
    assert measure.ceilings("cpu", torch.bfloat16, 0.01).product == {"ieee": 1e11}


def test_the_roofline_of_a_depthwise_layer_is_that_of_ieee_arithmetic() -> None:
    limits = Ceilings(1e30, {"ieee": 1e9, "tf32": 1e10})
    depthwise = Problem("forward", Geometry(4, 4, 4, (3, 5, 6), (1, 1, 1)), device="cuda", precision="tf32")
    grouped = Problem("forward", Geometry(4, 4, 2, (3, 5, 6), (1, 1, 1)), device="cuda", precision="tf32")
    assert limits.roofline(depthwise, 1) == depthwise.flops(1) / 1e9
    assert limits.roofline(grouped, 1) == grouped.flops(1) / 1e10


# Means and tables, on made-up results.


def times(milliseconds: float) -> Times:
    seconds = milliseconds / 1e3
    return Times(seconds, seconds * 0.5, seconds, seconds * 1.1, 7)


def row(layer: str, direction: str, layout: str, ours: float | None, ncdhw: float, last: float) -> Row:
    """`ours` None: PyTorch's kernel is kept. All in milliseconds."""
    native = {"contiguous": times(ncdhw), "channels_last_3d": times(last)}
    return Row(
        *("Made up | model (4x4x4)", layer, 1, "depthwise", 1),
        Problem(direction, Geometry(8, 8, 8, (4, 4, 4), (3, 3, 3), padding=(1, 1, 1)), layout=layout),
        "native" if ours is None else "tuned",
        "because",
        None if ours is None else SCHEDULE,
        native[layout] if ours is None else times(ours),
        native,
        Check(1e-7, 2e-7, 4e-7, True),
        roofline=1e-4,
    )


def synthetic() -> Results:
    header = {
        "date": "2026-01-02T03:04:05+00:00",
        "statistic": "median",
        "device": {"device_name": "A CPU", "capability": "AVX2", "cores": 2, "threads": 2},
        "versions": {"torch": "2.13.0", "generator": "1", "compiler": "c++ 12", "g3dswap": "0.1.0"},
        "settings": {"dtype": "float32", "batch": 1, "tune": "quick", "seconds": 0.5, "compile": False},
    }
    rows = [
        row("one", "forward", "contiguous", 1.0, 4.0, 2.0),
        row("one", "forward", "channels_last_3d", None, 4.0, 2.0),
        row("two", "forward", "contiguous", None, 9.0, 3.0),
        row("two", "forward", "channels_last_3d", 1.0, 9.0, 3.0),
        row("one", "grad_weight", "contiguous", 0.25, 128.0, 2.0),
    ]
    return Results(header, Ceilings(4e10, {"ieee": 1.2e11}), rows)


def test_geometric_means() -> None:
    first, weights, last = summarize(synthetic().rows)
    assert (first.layout, first.direction, first.layers, first.ours) == ("contiguous", "forward", 2, 1)
    assert first.same == pytest.approx(math.sqrt(4 * 1))
    assert first.better == pytest.approx(math.sqrt(2 * (3 / 9)))
    assert first.contiguous == pytest.approx(math.sqrt(4 * 1))
    assert (first.slowest, first.slowest_layer) == (1.0, "Made up | model (4x4x4) two")
    assert first.fraction == pytest.approx(math.sqrt(0.1 * 0.1 / 9))
    assert first.torch_fraction == pytest.approx(math.sqrt(0.1 / 2 * 0.1 / 3))
    assert (weights.direction, weights.layers) == ("grad_weight", 1)
    assert (weights.better, weights.contiguous) == pytest.approx((8.0, 512.0))
    assert (last.layout, last.ours) == ("channels_last_3d", 1)
    assert last.same == pytest.approx(math.sqrt(1 * 3))
    assert last.better == pytest.approx(math.sqrt(1 * 3))


def test_a_kept_row_is_as_fast_as_itself() -> None:
    kept = row("one", "forward", "contiguous", None, 3.0, 4.0)
    assert kept.kept
    assert (kept.same, kept.better, kept.contiguous) == (1.0, 1.0, 1.0)
    assert kept.gflops == pytest.approx(2 * 8 * 64 * 27 / 3e-3 / 1e9)


def test_markdown(golden: Golden) -> None:
    results = synthetic()
    golden("bench.md", markdown.document([results]))


def test_terminal_tables_fit_a_hundred_columns() -> None:
    results = synthetic()
    names = [layer.name for layer in read_layers()]
    long = max(names, key=len)
    results.rows = [
        Row(
            **{
                **vars(item),
                "model": long,
                "ours": times(1234.5),
                "check": Check(math.inf, 1e-7, 2e-7, False),
            }
        )
        for item in results.rows
    ]
    console = Console(file=io.StringIO(), width=100)
    with console.capture() as captured:
        for item in table.tables(results):
            console.print(item)
    printed = captured.get()
    assert "…" not in printed
    assert "1234" in printed or "1235" in printed
    assert "WRONG inf" in printed
    assert max(map(len, printed.splitlines())) <= 100


@pytest.mark.parametrize(
    ("milliseconds", "wanted"),
    [
        (1234.5, "1234"),
        (123.4, "123"),
        (12.34, "12.3"),
        (1.234, "1.23"),
        (0.01234, "0.0123"),
        (0.001, "0.0010"),
    ],
)
def test_milliseconds(milliseconds: float, wanted: str) -> None:
    assert text.ms(milliseconds / 1e3) == wanted


def test_results_survive_their_file(tmp_path: Path) -> None:
    results = synthetic()
    bad = results.rows[0]
    results.rows[0] = Row(**{**vars(bad), "check": Check(math.inf, 1e-7, 2e-7, False)})
    results.save(tmp_path / "out.json")
    again = Results.load(tmp_path / "out.json")
    assert again == results
    assert again.wrong() == [results.rows[0]]
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["rows"][1]["speedup"] == {
        **{"same": 1.0, "better": 1.0, "contiguous": 2.0, "same_eager": None, "compiled": None}
    }
    assert data["summary"][0]["layers"] == 2
    again.save_csv(tmp_path / "out.csv")
    lines = table_of(tmp_path / "out.csv")
    assert [line["ours_ms"] for line in lines] == ["1.0", "2.0", "9.0", "1.0", "0.25"]
    assert lines[0]["kept"] == "False"


def table_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def damaged(change: Callable[[Any], Any]) -> str:
    data = synthetic().to_json()
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"is no result of g3dswap bench \(.*\); measure again\."),
        ("[]", r"is no result of g3dswap bench"),
        (damaged(lambda d: d.update(schema=9)), r"its schema is 9, and this version reads 1"),
        (damaged(lambda d: d["header"]["device"].pop("cores")), r"KeyError: 'cores'"),
        (damaged(lambda d: d["header"].pop("statistic")), r"KeyError: 'statistic'"),
        (damaged(lambda d: d["header"].pop("date")), r"KeyError: 'date'"),
        (damaged(lambda d: d["rows"][0].pop("ours")), r"KeyError: 'ours'"),
        (damaged(lambda d: d["rows"][0]["torch"].pop("contiguous")), r"PyTorch's times are of the layouts"),
        (damaged(lambda d: d["rows"][0]["ours"].update(median=0)), r"has times that are no times"),
        (damaged(lambda d: d["rows"][0]["problem"].update(direction="up")), r"direction='up' is unknown"),
    ],
)
def test_damaged_results(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "out.json").write_text(content)
    with pytest.raises(ArgumentError, match=message):
        Results.load(tmp_path / "out.json")


# The command.


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings that are measured on little data."""
    monkeypatch.setattr(measure, "COPY_BYTES", {"cpu": 1 << 16, "cuda": 1 << 20})
    monkeypatch.setattr(measure, "PRODUCT_EXTENT", {"cpu": 32, "cuda": 256})


@pytest.fixture
def folder(
    tmp_path: Path, write: Write, small_device: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The current directory, with a file of two tiny layers; the process knows no choices yet."""
    monkeypatch.chdir(tmp_path)
    write([DEPTHWISE, GROUPED])
    choose.forget()
    yield tmp_path
    choose.forget()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeChooser:
    """Choices without compiling: PyTorch's kernels, said to be ours."""
    made = FakeChooser()
    made.interrupted = False  # type: ignore[attr-defined]
    monkeypatch.setattr(run, "Chooser", lambda cache, tune, progress: made(cache, tune, 1.05, progress))
    return made


COMMAND = ["bench", "--layers", "layers.json", "--device", "cpu", "--seconds", "0.001", "--quiet"]


def invoke(*words: str) -> Result:
    return CliRunner().invoke(cli.main, words, prog_name="g3dswap")


def succeeds(*words: str) -> str:
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def load(name: str = "out.json") -> Any:
    return json.loads(Path(name).read_text())


def test_end_to_end_with_real_kernels(folder: Path) -> None:
    words = ["--match", "*0.conv", "--passes", "forward,grad_weight", "--tune", "none", "--threads", "1"]
    out = succeeds(*COMMAND, *words, "-o", "out.json", "--csv", "out.csv")
    data = load()
    assert len(data["rows"]) == 2 * 2
    assert all(item["check"]["correct"] for item in data["rows"])
    assert {item["source"] for item in data["rows"]} <= {"default", "native"}
    assert "default" in {item["source"] for item in data["rows"]}
    assert all(item["check"]["error"] < 1e-6 for item in data["rows"])
    assert all(item["ours"]["runs"] >= rounds.FEWEST for item in data["rows"])
    assert {item["problem"]["bias"] for item in data["rows"]} == {True, False}
    assert data["header"]["device"]["threads"] == 1
    settings = {"dtype": "float32", "batch": 1, "tune": "none", "seconds": 0.001, "compile": False}
    assert data["header"]["settings"] == settings
    assert len(data["summary"]) == 4
    for layout in LAYOUTS:
        for direction in ("forward", "grad_weight"):
            assert f"{direction}, {layout}" in out
    assert len(table_of(Path("out.csv"))) == 4
    assert succeeds("bench", "--render", "out.json") == markdown.document([Results.load(Path("out.json"))])


@pytest.mark.slow
def test_end_to_end_with_tuning(folder: Path) -> None:
    words = ["--match", "*0.conv", "--passes", "grad_weight", "--layout", "contiguous", "--cache", "tuned"]
    succeeds(*COMMAND, "-o", "out.json", *words)
    (item,) = load()["rows"]
    assert item["source"] in ("tuned", "native")
    assert "tuned" in item["reason"]
    choose.forget()
    succeeds(*COMMAND, "-o", "again.json", *words, "--tune", "cached")
    (item,) = load("again.json")["rows"]
    assert item["source"] in ("cached", "native")


def test_what_is_chosen_is_measured(folder: Path, fake: FakeChooser) -> None:
    fake.native = lambda problem: problem.layout == "contiguous"
    before = torch.get_num_threads()
    succeeds(
        *COMMAND, "-o", "out.json", "--passes", "forward,grad_weight", "--batch", "0", "--dtype", "float64"
    )
    assert torch.get_num_threads() == before
    assert fake.expected == 2 * 2 * 2
    assert fake.prepared == fake.asked  # what is tuned already is compiled side by side, before
    assert {(problem.direction, batch) for problem, batch, _ in fake.asked} == {
        ("forward", 2),
        ("grad_weight", 2),
    }
    for item in load()["rows"]:
        kept = item["problem"]["layout"] == "contiguous"
        assert (item["source"] == "native") is kept
        assert item["batch"] == 2
        assert item["problem"]["dtype"] == "float64"
        if kept:
            assert item["ours"] == item["torch"]["contiguous"]
            assert item["speedup"]["same"] == 1.0


def test_resume_measures_what_is_missing(folder: Path, fake: FakeChooser) -> None:
    succeeds(*COMMAND, "-o", "out.json", "--match", "blocks.0*", "--passes", "forward")
    first = load()
    assert len(fake.asked) == 2
    assert "exists already" in invoke(*COMMAND, "-o", "out.json").stderr
    succeeds(*COMMAND, "-o", "out.json", "--passes", "forward,grad_input", "--resume")
    asked = {(label, problem.direction) for problem, _, label in fake.asked[2:]}
    assert asked == {
        ("blocks.0.conv", "grad_input"),
        ("blocks.1.conv", "forward"),
        ("blocks.1.conv", "grad_input"),
    }
    second = load()
    assert second["rows"][:2] == first["rows"]
    assert len(second["rows"]) == 8
    assert second["ceilings"] == first["ceilings"]
    assert len(second["header"]["resumed"]) == 1
    asked_before = len(fake.asked)
    succeeds(*COMMAND, "-o", "out.json", "--passes", "forward", "--resume", "--statistic", "quartile")
    assert len(fake.asked) == asked_before
    times = [item["ours"] for item in load()["rows"]]
    assert all(item["seconds"] == item["low"] for item in times)


def test_resume_refuses_other_conditions(folder: Path, fake: FakeChooser) -> None:
    words = [*COMMAND, "--match", "blocks.0*", "--passes", "forward", "-o", "out.json"]
    succeeds(*words)
    before = Path("out.json").read_bytes()
    result = invoke(*words, "--resume", "--batch", "3")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: out.json was measured with batch 1, and now it is 3: do not --resume it, "
        "or make them agree.\n"
    )
    assert Path("out.json").read_bytes() == before


def test_ctrl_c_keeps_what_was_measured(folder: Path, fake: FakeChooser) -> None:
    def stop(problem: Problem) -> bool:
        if len(fake.asked) > 4:
            raise KeyboardInterrupt
        return False

    fake.native = stop
    result = invoke(*COMMAND, "-o", "out.json", "--csv", "out.csv")
    assert result.exit_code == 130
    assert "out.json has what was measured; --resume goes on with it.\n" in result.stderr
    done = [(item["layer"], item["problem"]["direction"]) for item in load()["rows"]]
    assert done == [("blocks.0.conv", "forward")] * 2 + [("blocks.0.conv", "grad_input")] * 2
    assert len(table_of(Path("out.csv"))) == 4


def test_a_choice_that_was_cut_short_is_no_row(folder: Path, fake: FakeChooser) -> None:
    def stop(problem: Problem) -> bool:
        fake.interrupted = len(fake.asked) > 2  # type: ignore[attr-defined]  # as the real one does
        return False

    fake.native = stop
    assert invoke(*COMMAND, "-o", "out.json").exit_code == 130
    assert len(load()["rows"]) == 2


@pytest.mark.parametrize("away", ["everywhere", "outside the sample"])
def test_a_wrong_kernel_is_found(
    folder: Path, fake: FakeChooser, monkeypatch: pytest.MonkeyPatch, away: str
) -> None:
    class Elsewhere(workload.Candidate):
        def __call__(self, *tensors: Tensor | None) -> Tensor:
            out = super().__call__(*tensors)
            out[0, 0] *= 1.001
            return out

    fake.candidate = Wrong if away == "everywhere" else Elsewhere
    if away != "everywhere":  # only the last group has a float64 result
        monkeypatch.setattr(workload, "REFERENCE_FLOPS", {"cpu": 1})
    result = invoke(*COMMAND, "-o", "out.json", "--passes", "forward", "--layout", "contiguous")
    assert result.exit_code == 3
    assert "error: 2 of 2 kernels were wrong, the first forward 4x3x5x6 to " in result.stderr
    assert "WRONG" in result.stdout
    assert [item["check"]["correct"] for item in load()["rows"]] == [False, False]
    assert "WRONG" in succeeds("bench", "--render", "out.json")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "Say where the results go, with -o."),
        (
            ["-o", "out.json", "--passes", "forward,back"],
            2,
            "'back' is unknown; give some of forward, grad_input",
        ),
        (["-o", "out.json", "--layout", ""], 2, "'' is unknown; give some of contiguous, channels_last_3d"),
        (["-o", "out.json", "--seconds", "0"], 2, "--seconds"),
        (["-o", "out.json", "--match", "nothing"], 1, "error: No layer of layers.json fits 'nothing'"),
        (["-o", "nowhere/out.json"], 1, "error: nowhere/out.json cannot be written: there is no directory"),
        (["-o", "out.json", "--csv", "layers.json"], 1, "error: layers.json exists already; pass --force"),
        (["--render", "layers.json"], 1, "error: layers.json is no result of g3dswap bench"),
        (["--render", "none.json"], 1, "error: none.json cannot be read (No such file or directory)"),
    ],
)
def test_mistakes(folder: Path, words: list[str], code: int, message: str) -> None:
    result = invoke(*COMMAND, *words)
    assert result.exit_code == code
    assert message in result.stderr
    assert not Path("out.json").exists()


@pytest.mark.gpu
def test_on_a_gpu(folder: Path) -> None:
    words = ["bench", "--layers", "layers.json", "--device", "cuda", "--seconds", "0.001", "--quiet"]
    succeeds(*words, "--tune", "none", "-o", "out.json")
    data = load()
    assert {item["batch"] for item in data["rows"]} == {2}
    assert set(data["ceilings"]["product"]) == {"ieee", "tf32"}
    assert all(item["check"]["correct"] for item in data["rows"])
