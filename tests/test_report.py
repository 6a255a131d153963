"""Reports: what they hold, how they are stored, and what a terminal shows."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest
from torch import nn

from g3dswap.entries import Call, Functional, Kept, Layer, PassChoice, Skipped, Step, Swapped, Untraced
from g3dswap.errors import ArgumentError
from g3dswap.module import Grouped3D
from g3dswap.report import Report, forget, report, store, stored
from g3dswap.rounds import Times

LAYER = Layer(64, 64, 64, (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1))


def call(**passes: tuple[float, float]) -> Call:
    choices = tuple(
        PassChoice(name, "tuned", "tuned", ours, theirs, 1e-7) for name, (ours, theirs) in passes.items()
    )
    return Call((8, 64, 16, 56, 56), "float32", "contiguous", "cuda", choices)


def kept_call() -> Call:
    passes = tuple(
        PassChoice(name, "native", "", 4e-3, 4e-3, native=True) for name in ("forward", "grad_input")
    )
    return Call((8, 64, 16, 56, 56), "float32", "channels_last_3d", "cuda", passes)


def full() -> Report:
    calls = (call(forward=(1e-3, 3.1e-3), grad_input=(2e-3, 17e-3), grad_weight=(1.5e-4, 1.2e-3)),)
    return Report(
        swapped=[
            Swapped("layer1.0.conv2", LAYER, calls, verified=True),
            Swapped("layer1.1.conv2", LAYER, calls, ("twin.conv2",), verified=True),
            Swapped("late", dataclasses.replace(LAYER, stride=(1, 2, 2)), note="chooses at its first call"),
        ],
        kept=[Kept("tail", LAYER, "nothing was faster", (kept_call(),))],
        skipped=[Skipped("odd[0]", "MyConv", "MyConv is a subclass", 4)],
        functional=[
            Functional("mixer", "conv3d", 8, "net.py:12", (1, 8, 4, 4, 4)),
            Functional("fast", "conv3d", 64, "net.py:15", (), True, "", LAYER, (call(forward=(1e-3, 5e-3)),)),
        ],
        untraced=[Untraced("router", "control flow (net.py:40)", 2)],
        tuning_seconds=12.34,
        steps=(
            Step("training", Times(0.8, 0.8, 0.82, 0.84, 9), Times(0.4, 0.4, 0.41, 0.42, 9), 0.6, 0.1),
            Step("inference", Times(0.2, 0.2, 0.2, 0.2, 9), None, 0.05, None),
        ),
        machine="NVIDIA H200, PyTorch 2.11.0",
    )


def test_dictionary_is_plain_json_and_comes_back() -> None:
    data = full().to_dict()
    assert json.loads(json.dumps(data)) == data
    assert Report.from_dict(data) == full()
    speedups = [item["speedup"] for item in data["swapped"][0]["calls"][0]["passes"]]
    assert speedups == pytest.approx([3.1, 8.5, 8.0])
    assert data["functional"][1]["calls"][0]["passes"][0]["speedup"] == pytest.approx(5)
    first, second = data["steps"]
    assert [first[name] for name in ("speedup", "share_before", "share_after")] == pytest.approx(
        [2, 0.75, 0.25]
    )
    assert [second[name] for name in ("speedup", "share_before", "share_after")] == [None, 0.25, None]


def test_dictionary_of_another_schema_is_refused() -> None:
    with pytest.raises(ArgumentError, match="schema 99, this version of g3dswap reads 2: convert the model"):
        Report.from_dict({**full().to_dict(), "schema": 99})


def test_entries_cannot_be_changed() -> None:
    for item in (full().swapped[0], full().kept[0], full().skipped[0], full().functional[0]):
        with pytest.raises(dataclasses.FrozenInstanceError):
            item.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_table_fits_the_terminal_and_is_ascii(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = str(full())
    assert max(map(len, text.splitlines())) <= columns
    assert text.isascii() and "\x1b" not in text


def test_table_says_what_a_user_wants_to_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = str(full())
    assert " ".join(text.split()).startswith(
        "g3dswap: 3 of 5 grouped layers swapped, 1 kept, 1 skipped, 1 function call converted; choosing "
        "kernels took 12.3 s. NVIDIA H200, PyTorch 2.11.0 Steps of the model (training: forward and "
    )
    for part in (
        "2 x layer1.0.conv2 ...",  # the same shape: one row
        "layer1.1.conv2",
        "64->64 g64 3x3x3 p1",
        "8x64x16x56x56 float32",
        "verified against float64",
        "3.1x tuned",
        "3.1 ms ->",
        "150 us",
        "err 1.0e-07",
        "| training  | 800 ms +-5% | 400 ms +-5% | 2.00x    | 75% -> 25%",
        "| inference | 200 ms +-0% |             |          | 25% of it",
        "8x64x16x56x56 float32 channels_last: PyTorch takes 4 ms forward, 4",
        "8.5x tuned",
        "64->64 g64 3x3x3 s1x2x2 p1",
        "chooses at its first call",
        "nothing was faster",
        "odd[0]",  # not taken for markup
        "MyConv is a subclass",
        "conv3d with groups=8 on 1x8x4x4x4, net.py:12",
        "control flow (net.py:40) (2 grouped layers inside)",
    ):
        assert part in text, part


def test_shared_layer_shows_its_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert "a (shared with b)" in str(Report(kept=[Kept("a", LAYER, "because", (), ("b",))]))


def test_function_calls_say_what_became_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    plain = Functional("a", "conv3d", 2, "net.py:1")
    done = dataclasses.replace(plain, converted=True, verified=True, reason="chooses later")
    kept = dataclasses.replace(plain, reason="nothing was faster")
    text = str(Report(functional=[plain]))
    assert "Function calls with groups > 1, not converted: that takes functional=True" in text
    text = str(Report(functional=[done, kept]))
    assert "Function calls with groups > 1\n" in text
    assert "converted, verified against float64; chooses later" in text
    assert "not converted: nothing was faster" in text


def test_rows_put_equal_shapes_together() -> None:
    rows = full().rows
    assert [(row.outcome, row.names, len(row.members)) for row in rows] == [
        ("swapped", "2 x layer1.0.conv2 ... layer1.1.conv2", 2),
        ("swapped", "late", 1),
        ("converted", "fast", 1),
        ("kept", "tail", 1),
    ]
    assert rows[1].call is None and rows[1].choice("forward") is None
    choice = rows[0].choice("grad_input")
    assert choice is not None and choice.speedup == pytest.approx(8.5)


def test_control_characters_of_names_do_not_reach_the_terminal() -> None:
    text = str(Report(kept=[Kept("a\x1b[2Jb", LAYER, "because\x07")]))
    assert "\x1b" not in text and "\x07" not in text
    assert "a\\x1b[2Jb" in text


def test_inspection_speaks_of_what_would_be() -> None:
    text = str(Report(kind="inspected", swapped=[Swapped("a", LAYER)], kept=[Kept("b", LAYER, "x")]))
    assert "1 of 2 grouped layers would be swapped" in text
    assert "Would be swapped" in text and "Would be kept as they are" in text


def test_model_without_grouped_layers() -> None:
    assert str(Report()) == "g3dswap: no 3D convolution layer with groups > 1 in this model, nothing to swap."


def test_pass_speedup() -> None:
    assert PassChoice("forward", "tuned", "", 1.0, 2.0).speedup == 2
    assert PassChoice("forward", "native", "", 2.0, 2.0, native=True).speedup == 1
    assert PassChoice("forward", "default").speedup is None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"padding": "same"}, "4->8 g2 3x3x3 same"),
        ({"stride": 2, "dilation": (1, 2, 3)}, "4->8 g2 3x3x3 s2 d1x2x3"),
        ({"padding": (0, 1, 1), "padding_mode": "circular"}, "4->8 g2 3x3x3 p0x1x1 circular"),
    ],
)
def test_geometry_is_said_in_a_line(arguments: dict[str, Any], text: str) -> None:
    layer = Layer.of(nn.Conv3d(4, 8, 3, groups=2, **arguments))
    assert str(layer) == text
    assert Layer.from_dict(json.loads(json.dumps(dataclasses.asdict(layer)))) == layer


def test_stored_report_survives_copies() -> None:
    model = nn.Sequential(nn.ReLU())
    store(model, full())
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert report(other) == full()
    assert not model.state_dict()
    forget(model)
    assert stored(model) is None


def test_report_of_layers_that_were_put_in_by_hand() -> None:
    model = nn.Sequential(Grouped3D.from_conv(nn.Conv3d(4, 4, 3, groups=4), tune="none", cache=None))
    (item,) = report(model).swapped
    assert (item.name, item.geometry.groups, item.calls) == ("0", 4, ())


def test_report_of_something_else() -> None:
    with pytest.raises(ArgumentError, match=r"Linear was not converted by g3dswap\.convert: there is"):
        report(nn.Linear(1, 1))
    with pytest.raises(ArgumentError, match=r"report\(\) takes a converted torch\.nn\.Module, not int"):
        report(3)  # type: ignore[arg-type]
