"""The benchmark of whole networks: what it builds, steps, skips, stores and shows; on tiny networks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from g3dswap.bench import compare, network_results, network_run, networks, steps
from g3dswap.bench.compared import INFERENCE, TRAINING, Compared, Conversion, Side
from g3dswap.bench.measure import Ceilings
from g3dswap.bench.network_results import NetworkResults, NetworkRow
from g3dswap.bench.network_tables import section
from g3dswap.bench.networks import NETWORKS, Network, choose_networks
from g3dswap.bench.steps import Training
from g3dswap.errors import ArgumentError
from g3dswap.rounds import Times
from tests.fakes import FakeChooser, Net, faked
from tests.test_bench import invoke, load, succeeds, synthetic
from tests.test_bench_grouped import example
from tests.test_networks import roi_align  # noqa: F401  # a fixture

SHAPE = (2, 3, 4, 6, 6)
CPU = torch.device("cpu")
CEILINGS = Ceilings(1e10, {"ieee": 1e11})
COMMITTED = Path(compare.__file__).with_name("results") / "nvidia-h100-networks-float32.json"
COMMAND = ["bench", "--networks", "--device", "cpu", "--seconds", "0.001", "--steps", "3", "--quiet"]


def gone(tiny: bool) -> nn.Module:
    found: nn.Module = networks._from("no_such_package.models", "network")
    return found


MADE_UP = (
    Network("Net", "", lambda tiny: Net(), SHAPE, SHAPE),
    Network("Gone", "no-such-package", gone, SHAPE, SHAPE),
)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeChooser]:
    """Choices without compiling, made-up networks, and a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(networks, "NETWORKS", MADE_UP)
    monkeypatch.setattr(network_run, "ceilings", lambda device, dtype, seconds: CEILINGS)
    with faked(monkeypatch) as chooser:
        yield chooser


# One network.


def compared(model: nn.Module, amp: bool = False, count: int = 3) -> Compared:
    options = {"tune": "none", "progress": False}
    return compare.compare(model, SHAPE, CPU, amp, count, 0.001, options, lambda dtype: CEILINGS)


def test_both_models_take_the_same_steps(fake: FakeChooser) -> None:
    found = compared(Net(), count=6)
    assert len(found.before.losses) == len(found.after.losses) == 6
    assert found.before.losses == found.after.losses  # dropout too: the fake's kernels are PyTorch's
    assert found.difference == 0
    assert found.before.losses[0] > found.before.losses[4]  # the batches take turns; the model learns
    assert found.before.train.runs == 6 - steps.WARM_UP
    assert (found.conversion.swapped, found.conversion.kept) == (3, 0)
    assert found.conversion.sources == {"tuned": 9}
    assert found.parameters == sum(x.numel() for x in Net().parameters())
    assert found.before.memory is None
    assert found.before.train_graph is found.after.inference_graph is None
    assert sum(it.count for it in found.passes) == 9
    assert found.notes == []


def test_autocast_is_on_for_conversion_and_steps(fake: FakeChooser) -> None:
    seen: list[torch.dtype] = []

    class Watched(Net):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype)
            return super().forward(x)

    found = compared(Watched(), amp=True)
    assert {problem.dtype for problem, _, _ in fake.asked} == {torch.bfloat16}
    assert seen.count(torch.float32) == steps.BATCHES  # which only ask for the output's shape
    assert found.difference < 0.05


def test_losses_of_different_models_differ(fake: FakeChooser, monkeypatch: pytest.MonkeyPatch) -> None:
    real = compare.convert

    def other(model: nn.Module, inputs: Any, **options: Any) -> nn.Module:
        fast = real(model, inputs, **options)
        fast.register_forward_hook(lambda module, args, out: out * 1.5)
        return fast

    monkeypatch.setattr(compare, "convert", other)
    assert compared(Net()).difference > 1e-3


def test_grouped_layers_that_cannot_be_timed_lose_nothing_else(
    fake: FakeChooser, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory\nadvice")

    monkeypatch.setattr(compare, "measure_passes", full)
    found = compared(Net())
    assert found.speedup(TRAINING) and found.speedup(INFERENCE)
    assert found.passes == []
    assert found.notes == ["no times of the grouped layers: OutOfMemoryError: CUDA out of memory"]


def test_kernels_without_a_graph_are_said_once(fake: FakeChooser, monkeypatch: pytest.MonkeyPatch) -> None:
    without = replace(example(1.0), torch=replace(example(1.0).torch, note="no stream"))
    monkeypatch.setattr(compare, "measure_passes", lambda *arguments: [example(1.0), without, without])
    found = compared(Net())
    said = "no CUDA graph of some kernels, whose launches from Python count: no stream"
    assert found.notes == [said]


def test_a_loss_that_is_no_number_differs_infinitely() -> None:
    once = Times.of([1.0, 1.0])
    before, after = (Side(once, once, losses, None) for losses in ([1.0, 2.0], [1.0, math.nan]))
    conversion = Conversion(1.0, 1, 0, 0, {})
    assert Compared(before, after, conversion, 1).difference == math.inf
    close = replace(after, losses=[1.0, 2.2])
    assert Compared(before, close, conversion, 1).difference == pytest.approx(0.1)


def test_models_take_turns_in_going_first(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int, float]] = []

    def step(self: Training, clips: Tensor, targets: Tensor, seed: int) -> None:
        order.append((self.model.name, seed, float(clips)))  # type: ignore[arg-type]

    monkeypatch.setattr(Training, "step", step)
    sides = {}
    for name in ("before", "after"):
        model = nn.Linear(1, 1)
        model.name = name  # type: ignore[assignment]
        sides[name] = Training(model, False)
    batches = [(torch.tensor(value), torch.tensor(0)) for value in (10.0, 20.0)]
    steps.train(sides, batches, 3)
    assert order == [
        *(("before", 0, 10.0), ("after", 0, 10.0)),
        *(("after", 1, 20.0), ("before", 1, 20.0)),
        *(("before", 2, 10.0), ("after", 2, 10.0)),
    ]


def test_a_class_for_each_voxel_where_the_output_is_an_image() -> None:
    clips, targets = steps.make_batch(nn.Conv3d(1, 7, 1), (2, 1, 3, 4, 5), CPU, 0)
    assert clips.shape == (2, 1, 3, 4, 5)
    assert targets.shape == (2, 3, 4, 5)
    assert int(targets.min()) >= 0 and int(targets.max()) == 6


def test_what_stays_between_steps_is_counted() -> None:
    training = Training(nn.Linear(10, 10), False)
    assert training.resident() == 110 * 4
    training.step(torch.randn(2, 10), torch.tensor([1, 2]), 0)
    assert training.resident() == 3 * 110 * 4  # gradients and momentum


# The command.


@pytest.mark.filterwarnings("always::g3dswap.errors.G3DSwapWarning")
def test_networks_end_to_end(fake: FakeChooser) -> None:
    result = invoke(*COMMAND, "-o", "out.json")
    assert result.exit_code == 0, result.output
    warning = (
        "warning: Gone: left out, for it cannot be built (No module named 'no_such_package'); "
        "pip install no-such-package.\n"
    )
    assert result.stderr == warning
    data = load()
    assert [(row["name"], row["dtype"], row["compared"] is None) for row in data["networks"]] == [
        ("Net", "float32", False),
        ("Net", "bfloat16", False),
        ("Gone", "float32", True),
        ("Gone", "bfloat16", True),
    ]
    first = data["networks"][0]
    assert first["shape"] == list(SHAPE)
    assert set(first["speedup"]) == {"training", "inference"}
    assert first["share_graph"] == {"training": None, "inference": None}
    assert all(it["count"] in (1, 2) for it in first["compared"]["passes"])
    assert set(data["ceilings"]) == {"float32", "bfloat16"}
    assert first["loss_difference"] == 0
    assert len(first["compared"]["before"]["losses"]) == 3
    settings = {"scale": "full", "steps": 3, "seconds": 0.001, "tune": "quick"}
    assert data["header"]["settings"] == settings
    rendered = succeeds("bench", "--render", "out.json")
    assert rendered in result.stdout
    assert "| Net (2x3x4x6x6) | float32 |" in rendered
    assert "Gone, bfloat16: left out" in rendered
    assert "| GiB before" not in rendered  # a CPU's memory is not measured
    assert "### In CUDA graphs" not in rendered
    lines = [line for line in rendered.splitlines() if line.startswith("| Net (2x3x4x6x6) | bfloat16 |")]
    assert [line.split(" | ")[2] for line in lines[1:3]] == ["training", "inference"]
    assert "float32: copy 10.0 GB/s, matrix product 100 GFLOP/s" in rendered


@pytest.mark.filterwarnings("always::g3dswap.errors.G3DSwapWarning")
def test_resume_measures_what_is_missing(fake: FakeChooser) -> None:
    succeeds(*COMMAND, "-o", "out.json", "--dtype", "bfloat16")
    first = load()["networks"][0]
    asked = len(fake.asked)
    succeeds(*COMMAND, "-o", "out.json", "--resume")
    rows = load()["networks"]
    assert [(row["name"], row["dtype"]) for row in rows] == [
        ("Net", "bfloat16"),
        ("Net", "float32"),
        ("Gone", "float32"),
        ("Gone", "bfloat16"),
    ]
    assert rows[0] == first
    assert {problem.dtype for problem, _, _ in fake.asked[asked:]} == {torch.float32}
    result = invoke(*COMMAND, "-o", "out.json", "--resume", "--scale", "tiny")
    assert result.exit_code == 1
    assert "out.json was measured with scale 'full', and now it is 'tiny'" in result.stderr


@pytest.mark.filterwarnings("always::g3dswap.errors.G3DSwapWarning")
def test_a_network_that_is_too_large_is_skipped(fake: FakeChooser, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(network_run, "compare", full)
    result = invoke(*COMMAND, "-o", "out.json", "--match", "Net")
    assert result.exit_code == 0
    assert "Net: left out, for the device has too little memory" in result.stderr


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--networks", "-o", "out.json", "--csv", "a.csv"], 2, "--csv is for layers, not for --networks."),
        (["--networks", "-o", "out.json", "--layout", "contiguous"], 2, "--layout is for layers, not for"),
        (["-o", "out.json", "--scale", "tiny"], 2, "--scale is only for --networks."),
        (["--networks", "-o", "out.json", "--dtype", "float16"], 2, "--dtype float16 is not for --networks"),
        (["--networks", "-o", "out.json", "--match", "x"], 1, "No network fits 'x'; there are Net, Gone."),
    ],
)
def test_mistakes(fake: FakeChooser, words: list[str], code: int, message: str) -> None:
    result = invoke("bench", "--device", "cpu", *words)
    assert result.exit_code == code
    assert message in result.stderr


# Files and tables.


def made_up() -> NetworkResults:
    header = {
        "date": "2026-01-02T03:04:05+00:00",
        "device": {"device_name": "A GPU", "capability": "9.0", "cores": 16},
        "versions": {"torch": "2.13.0", "g3dswap": "0.1.0"},
        "settings": {"scale": "full", "steps": 50, "seconds": 0.5, "tune": "quick"},
    }
    before = Side(Times.of([0.2, 0.2]), Times.of([0.05, 0.05]), [2.0, 1.0], 3 << 30, Times.of([0.18, 0.18]))
    after = Side(Times.of([0.1, 0.1]), Times.of([0.02, 0.02]), [2.0, 1.001], 2 << 30, Times.of([0.09, 0.09]))
    passes = [example(0.02, count=2), example(0.12, "grad_input")]
    conversion = Conversion(12.3, 26, 1, 0, {"native": 3, "tuned": 75})
    found = Compared(before, after, conversion, 10, passes, ["no CUDA graph of inference after: why"])
    rows = [NetworkRow("X3D-M", (16, 3, 16, 224, 224), "float32", found)]
    return NetworkResults(
        header,
        [*rows, NetworkRow("MViTv2-S", (8, 3, 16, 224, 224), "float32", None, "gone.")],
        {"float32": Ceilings(3e12, {"ieee": 5e13, "tf32": 4e14})},
    )


def test_results_survive_their_file(tmp_path: Path) -> None:
    results = made_up()
    results.save(tmp_path / "out.json")
    assert NetworkResults.load(tmp_path / "out.json") == results
    assert network_results.of_networks(tmp_path / "out.json")
    assert not network_results.of_networks(tmp_path / "none.json")
    data = load(str(tmp_path / "out.json"))
    assert data["networks"][0]["speedup"] == {"training": 2.0, "inference": pytest.approx(2.5)}
    assert data["networks"][0]["speedup_graph"] == {"training": pytest.approx(2.0), "inference": None}
    assert data["networks"][0]["share"]["training"] == pytest.approx(0.1 / 0.144)


def test_tables_of_networks() -> None:
    text = section(made_up())
    name = "| X3D-M (16x3x16x224x224) | float32 |"
    assert f"{name} 200 +-0% | 100 +-0% | 2.00x | 50.0 +-0% | 20.0 +-0% | 2.50x |" in text
    assert f"{name} 180 +-0% | 90.0 +-0% | 2.00x |\n" in text  # inference has no graphs
    assert f"{name} training | 160 | 80.0 | 16.0 | 56.0 | 69% | 36.0 | 62% |" in text
    assert f"{name} inference | 40.0 | 20.0 | 4.00 | 14.0 | 83% |  |  |" in text
    assert f"{name} 3.00 | 2.00 | 1.0e-03 | 26 / 1 / 0 | 3 native, 75 tuned | 12.3 s |" in text
    assert "X3D-M, float32: no CUDA graph of inference after: why." in text
    assert "MViTv2-S, float32: gone." in text
    said = "float32: copy 3000.0 GB/s, matrix product 50000 GFLOP/s (ieee), 400000 GFLOP/s (tf32)"
    assert said in text


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """They have neither times of graphs nor of grouped layers, and their tables have none."""
    path = tmp_path / "out.json"
    made_up().save(path)
    data = load(str(path))
    del data["ceilings"]
    for row in data["networks"][:1]:
        del row["compared"]["passes"], row["compared"]["notes"]
        for side in ("before", "after"):
            del row["compared"][side]["train_graph"], row["compared"][side]["inference_graph"]
    path.write_text(json.dumps(data))
    text = section(NetworkResults.load(path))
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "## Whole networks, A GPU",
        "### Launched from Python",
        "### Conversion",
    ]
    committed = NetworkResults.load(COMMITTED)
    assert len(committed.rows) == 5
    assert "| MedNeXt-B k5 (2x1x128x128x128) | float32 |" in section(committed)


def test_layers_and_networks_are_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    synthetic().save(tmp_path / "layers.json")
    made_up().save(tmp_path / "networks.json")
    text = succeeds("bench", "--render", "layers.json", "--render", "networks.json")
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## float32, A CPU",
        "## Whole networks, A GPU",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 9}, "ValueError: it is of 'networks' in schema 9"),
        ({"networks": [{"name": "x"}]}, "KeyError: 'compared'"),
        (
            {"networks": [{"name": "x", "shape": [], "dtype": "", "compared": None, "skipped": ""}]},
            "ValueError: x has neither times nor a reason",
        ),
    ],
)
def test_damaged_results(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "out.json"
    made_up().save(path)
    path.write_text(json.dumps({**load(str(path)), **change}))
    with pytest.raises(ArgumentError, match=f"is no result of g3dswap bench --networks \\({message}"):
        NetworkResults.load(path)


# The real ones.


def test_globs_choose_networks() -> None:
    assert [it.name for it in choose_networks(["MedNeXt*"])] == ["MedNeXt-S k3", "MedNeXt-B k5"]
    assert len(choose_networks([])) == len(NETWORKS) == 6


@pytest.mark.filterwarnings("ignore")  # what other packages warn about is theirs
@pytest.mark.usefixtures("roi_align")
@pytest.mark.parametrize("network", NETWORKS, ids=lambda it: it.name)
@pytest.mark.parametrize("scale", ["tiny", "full"])
def test_a_network_takes_its_input(network: Network, scale: str) -> None:
    try:
        with torch.device("meta" if scale == "full" else "cpu"):
            model = network.make(scale)
    except networks.MissingPackage as error:
        pytest.skip(f"{network.packages}: {error}")
    if scale == "full":  # without computing anything; other packages have operators without shapes alone
        layers = [it for it in model.modules() if isinstance(it, nn.Conv3d) and it.groups > 1]
        assert len(layers) >= 16
    else:
        assert model.eval()(torch.randn(network.tiny)).shape[0] == network.tiny[0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", network_run.DTYPES)
def test_a_real_network_with_real_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*COMMAND, "--scale", "tiny", "--tune", "none", "--match", "3D ResNeXt*", "--dtype", dtype]
    succeeds(*words, "-o", "out.json")
    (row,) = load()["networks"]
    assert row["compared"]["conversion"]["swapped"] == 4
    first, ours = (row["compared"][side]["losses"][0] for side in ("before", "after"))
    assert ours == pytest.approx(first, rel=1e-4 if dtype == "float32" else 0.05)


@pytest.mark.gpu
def test_a_network_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["bench", "--networks", "--device", "cuda", "--scale", "tiny", "--tune", "none", "--steps", "6"]
    succeeds(*words, "--seconds", "0.01", "--quiet", "--match", "3D ResNeXt*", "-o", "out.json")
    for row in load()["networks"]:
        assert row["compared"]["before"]["memory"] > 0
        assert row["compared"]["conversion"]["swapped"] == 4
        assert row["compared"]["notes"] == []
        for side in ("before", "after"):
            found = row["compared"][side]
            assert 0 < found["train_graph"]["seconds"] < found["train"]["seconds"]
            assert 0 < found["inference_graph"]["seconds"] < found["inference"]["seconds"]
        assert None not in [*row["share"].values(), *row["share_graph"].values()]
    rendered = succeeds("bench", "--render", "out.json")
    assert "GiB before" in rendered and "### In CUDA graphs" in rendered
