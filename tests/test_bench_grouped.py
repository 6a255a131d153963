"""The grouped layers in the benchmark of networks: which passes a step runs, and what could be saved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import g3dswap
from g3dswap.bench import grouped, measure
from g3dswap.bench.compared import INFERENCE, TRAINING, Compared, Conversion, Side
from g3dswap.bench.grouped import GroupedPass, Part, count_passes, measure_passes
from g3dswap.bench.measure import Ceilings
from g3dswap.choice import Choice
from g3dswap.choose import native
from g3dswap.problem import DIRECTIONS, Geometry, Problem
from g3dswap.rounds import Times
from tests.fakes import SCHEDULE, FakeChooser, Net, faked

SHAPE = (2, 3, 4, 6, 6)
CEILINGS = Ceilings(1e10, {"ieee": 1e11})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Choices without compiling."""
    with faked(monkeypatch) as chooser:
        yield chooser


def passes(model: nn.Module, inputs: Tensor, **options: Any) -> dict[tuple[str, int, str], int]:
    """Calls by pass, channels and source, of a model that is converted."""
    fast = g3dswap.convert(model, (inputs,), progress=False, verify=False, **options)
    counts = count_passes(model, fast, lambda: model(inputs))
    found = {
        (choice.problem.layer_pass, choice.problem.geometry.out_channels, choice.source): count
        for (choice, batch), count in counts.items()
    }
    assert len(found) == len(counts)
    assert {batch for _, batch in counts} == {inputs.shape[0]}
    return found


# Which passes.


def test_layers_of_the_same_shape_are_one_pass_with_as_many_calls(fake: FakeChooser) -> None:
    found = passes(Net(), torch.randn(SHAPE))
    assert found == {(it, size, "tuned"): 3 - size // 8 for it in DIRECTIONS for size in (8, 16)}


def test_kept_layers_and_native_passes_run_pytorchs_kernel(fake: FakeChooser) -> None:
    fake.native = lambda problem: problem.geometry.out_channels == 16 or problem.direction == "forward"
    found = passes(Net(), torch.randn(SHAPE))
    assert found == {
        ("forward", 8, "native"): 2,
        ("grad_input", 8, "tuned"): 2,
        ("grad_weight", 8, "tuned"): 2,
        **{(it, 16, "native"): 1 for it in DIRECTIONS},
    }


def test_what_swapped_and_kept_layers_share_is_one_kernel(fake: FakeChooser) -> None:
    fake.native = lambda problem: problem.direction == "forward"
    found = passes(Net(), torch.randn(SHAPE), exclude="layers.0.*")
    assert found[("forward", 8, "native")] == 2
    assert found[("grad_input", 8, "native")] == found[("grad_input", 8, "tuned")] == 1


def test_a_layer_that_is_called_again_counts_again(fake: FakeChooser) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(4, 4, 3, padding=1, groups=4)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x).relu())

    found = passes(Twice(), torch.randn(2, 4, 3, 5, 5))
    # The first call's input needs no gradient.
    assert [found[it, 4, "tuned"] for it in DIRECTIONS] == [2, 1, 2]


def test_the_count_leaves_no_hooks(fake: FakeChooser) -> None:
    model = Net()
    passes(model, torch.randn(SHAPE))
    assert not any(module._forward_pre_hooks for module in model.modules())


# Their times.


def test_passes_are_timed_in_the_layout_and_batch_of_the_layer(fake: FakeChooser) -> None:
    model = nn.Sequential(
        nn.Conv3d(3, 6, 1), nn.Conv3d(6, 6, 3, groups=6), nn.ConvTranspose3d(6, 6, 3, stride=2, groups=6)
    )
    model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    inputs = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last_3d)
    fast = g3dswap.convert(model, (inputs,), progress=False, verify=False)
    found = measure_passes(model, fast, lambda: model(inputs), lambda dtype: CEILINGS, 0.001)
    assert sorted((it.problem.layer_pass, it.problem.transposed) for it in found) == sorted(
        (it, transposed) for it in DIRECTIONS for transposed in (False, True)
    )
    assert {it.problem.layout for it in found} == {"channels_last_3d"}
    for it in found:
        assert it.roofline == CEILINGS.roofline(it.problem, 2) > 0
        assert it.torch.runs >= 3 and it.ours.runs >= 3
        assert it.torch is not it.ours  # the choice is said to be ours
        assert GroupedPass.from_json(it.to_json()) == it


def test_the_choice_runs_beside_pytorchs_kernel() -> None:
    problem = Problem("forward", Geometry(4, 4, 4, (3, 5, 5), (3, 3, 3)))
    runs: list[str] = []

    class Ours:
        def __call__(self, *tensors: Tensor | None) -> Tensor:
            runs.append("ours")
            return torch.empty(0)

    candidate: Any = Ours()
    choice = Choice(problem, "tuned", "", schedule=SCHEDULE, candidate=candidate)
    theirs, ours = measure.time_choice(choice, 2, 0.001)
    assert len(runs) == ours.runs + 1  # the first is the warm-up
    theirs, ours = measure.time_choice(native(problem, ""), 2, 0.001)
    assert theirs is ours


def test_damaged_passes_are_refused() -> None:
    data = example(1.0).to_json()
    with pytest.raises(ValueError, match="has times that are no times"):
        GroupedPass.from_json({**data, "roofline": 0.0})


# What follows.


def example(seconds: float, direction: str = "forward", count: int = 1) -> GroupedPass:
    """PyTorch's kernel takes so long, ours half of that, and a tenth is the roofline."""
    problem = Problem(direction, Geometry(4, 4, 4, (3, 5, 5), (3, 3, 3)))
    torch, ours = (Times.of([it, it]) for it in (seconds, seconds / 2))
    return GroupedPass(problem, 2, count, "tuned", torch, ours, seconds / 10)


def sides(train: tuple[float, float], inference: tuple[float, float], graphs: bool) -> list[Side]:
    found = [Side(Times.of([a, a]), Times.of([b, b]), [1.0], None) for a, b in zip(train, inference)]
    if not graphs:
        return found
    return [replace(it, train_graph=Times.of([it.train.seconds / 2] * 2)) for it in found]


def test_the_share_of_what_could_be_saved() -> None:
    found = [example(1.0, count=2), example(3.0, "grad_input"), example(5.0, "grad_weight")]
    assert Part.of(found) == Part(10.0, 5.0, 1.0)
    before, after = sides((20.0, 14.0), (4.0, 3.1), graphs=True)
    compared = Compared(before, after, Conversion(1.0, 1, 0, 0, {}), 1, found)
    assert compared.part(INFERENCE) == Part(2.0, 1.0, 0.2)  # forward passes only
    assert compared.at_roofline(TRAINING) == pytest.approx(20 - 9)
    assert compared.share(TRAINING) == pytest.approx(6 / 9)
    assert compared.share(INFERENCE) == pytest.approx(0.9 / 1.8)
    assert compared.at_roofline(TRAINING, graphs=True) == pytest.approx(10 - 9)
    assert compared.share(TRAINING, graphs=True) == pytest.approx(3 / 9)
    assert compared.share(INFERENCE, graphs=True) is None
    assert compared.at_roofline(INFERENCE, graphs=True) is None
    assert compared.speedup(TRAINING, graphs=True) == pytest.approx(20 / 14)
    assert compared.speedup(INFERENCE, graphs=True) is None


def test_there_may_be_nothing_to_save() -> None:
    before, after = sides((20.0, 14.0), (4.0, 3.1), graphs=False)
    compared = Compared(before, after, Conversion(1.0, 1, 0, 0, {}), 1)
    assert (compared.part(TRAINING), compared.share(TRAINING), compared.at_roofline(TRAINING)) == (None,) * 3
    fast = replace(compared, passes=[replace(example(1.0), roofline=2.0)])
    assert fast.share(TRAINING) is None


def test_skipped_layers_are_no_part_of_it() -> None:
    """They cannot be converted, and so are nothing that a conversion could save."""

    class Own(nn.Conv3d):
        pass

    model = nn.Sequential(Own(4, 4, 3, groups=4))
    assert grouped.count_passes(model, model, lambda: model(torch.randn(1, 4, 3, 3, 3))) == {}
