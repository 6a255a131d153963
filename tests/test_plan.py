"""Plan files: written whole, read with suspicion, and refused for other models and machines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from g3dswap import decided, plan
from g3dswap.convert import convert, revert
from g3dswap.errors import ArgumentError, G3DSwapWarning, PlanError
from g3dswap.plan import read_plan, save_plan
from g3dswap.report import report
from tests.fakes import Block, FakeChooser, Net, faked
from tests.profiles import examples

X = torch.randn(2, 3, 4, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def chooser(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeChooser]:
    with faked(monkeypatch) as fake:
        fake.native = lambda problem: problem.geometry.stride == (2, 2, 2)
        yield fake


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A plan for ``Net``, whose last layer stays as it was."""
    place = tmp_path / "net.plan.json"
    save_plan(convert(Net(), X), place)
    return place


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def test_plan_repeats_the_choices(path: Path, chooser: FakeChooser) -> None:
    first = report(convert(Net(), X))
    chooser.asked.clear()
    fast = convert(Net(), plan=path)
    again = report(fast)
    assert [item.name for item in again.swapped] == ["layers.0.conv2", "layers.1.conv2"]
    assert again.swapped == first.swapped  # shapes and times too, and checked, without any inputs
    assert [(item.name, item.reason) for item in again.kept] == [(i.name, i.reason) for i in first.kept]
    planned = decided.planned
    assert {problem for problem, _, _ in chooser.asked} <= set(planned)
    assert {choice.source for choice in planned.values()} == {"tuned", "native"}


def test_plan_of_a_plan_is_the_same(path: Path, tmp_path: Path) -> None:
    save_plan(convert(Net(), plan=path), tmp_path / "again.json")
    first, again = json.loads(path.read_text()), json.loads((tmp_path / "again.json").read_text())
    assert first["layers"][:2] == again["layers"][:2] and first["machines"] == again["machines"]


def test_plan_with_other_inputs_chooses_for_them(path: Path, chooser: FakeChooser) -> None:
    chooser.asked.clear()
    fast = convert(Net(), torch.randn(1, 3, 8, 8, 8), plan=path)
    assert report(fast).swapped[0].calls[0].shape == (1, 8, 8, 8, 8)
    assert {problem.geometry.size for problem, _, _ in chooser.asked} == {(8, 8, 8)}


def test_plan_of_a_conversion_without_inputs(tmp_path: Path) -> None:
    save_plan(convert(Net()), tmp_path / "plan.json")
    fast = convert(Net(), plan=tmp_path / "plan.json")
    assert len(report(fast).swapped) == 3 and not report(fast).swapped[0].calls


def test_plan_of_a_layer(tmp_path: Path) -> None:
    layer = nn.Conv3d(4, 4, 3, groups=4)
    save_plan(convert(layer, torch.randn(1, 4, 5, 5, 5)), tmp_path / "plan.json")
    assert report(convert(layer, plan=tmp_path / "plan.json")).swapped[0].name == "(model)"


def test_plan_is_human_readable_data(path: Path) -> None:
    data = json.loads(path.read_text())
    assert list(data) == ["g3dswap_plan", "machines", "layers", "choices"]
    assert data["layers"][0]["geometry"]["kernel_size"] == [3, 3, 3]
    assert data["choices"][0]["problem"]["direction"] == "forward"
    assert data["choices"][0]["schedule"]["digits"][0] == "n rest grid"
    assert str(tmp := path.parent) not in path.read_text() and list(tmp.iterdir()) == [path]


def test_failed_write_leaves_the_old_plan(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_text()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(PlanError, match=r"The plan cannot be written to .* \(No space left on device\)"):
        save_plan(convert(Net(), X), path)
    assert path.read_text() == before and list(path.parent.iterdir()) == [path]


def test_plan_of_another_machine_is_not_trusted_to_be_fast(path: Path, chooser: FakeChooser) -> None:
    change(path, lambda data: data["machines"]["cpu"].update(device_name="Other CPU"))
    chooser.asked.clear()
    with pytest.warns(G3DSwapWarning, match=r"was made on another machine \(Other CPU\), where other"):
        fast = convert(Net(), plan=path)
    assert not decided.planned and chooser.asked
    assert len(report(fast).swapped) == 2


class Deeper(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers.append(Block(8))


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers[1].conv2 = nn.Conv3d(8, 8, 5, padding=2, groups=4, bias=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Deeper, "made for another model: the model's layer 'layers.2.conv2' is not in it; convert"),
        (lambda: Block(8), "made for another model: its layer 'down' is not in the model; convert"),
        (Wider, "layer 'layers.1.conv2' is 8->8 g4 3x3x3 p1 in the plan and 8->8 g4 5x5x5 p2 in the model;"),
        (lambda: nn.ReLU(), "its layer 'down' is not in the model"),
    ],
)
def test_plan_for_other_layers(path: Path, make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    with pytest.raises(PlanError) as caught:
        convert(model, plan=path, inplace=True)
    assert message in str(caught.value), caught.value
    assert not decided.planned


def drop(*keys: Any) -> Callable[[dict[str, Any]], None]:
    def edit(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return edit


def put(value: Any, *keys: Any) -> Callable[[dict[str, Any]], None]:
    def edit(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put(1, "g3dswap_plan"), "has schema 1, this version of g3dswap reads 2; convert without plan="),
        (drop("g3dswap_plan"), "is no plan of g3dswap; write one with g3dswap.save_plan(model, path)."),
        (drop("layers"), "is damaged (no field 'layers'); save it again with g3dswap.save_plan."),
        (drop("choices"), "is damaged (no field 'choices')"),
        (put({}, "layers"), "is damaged ('layers' is no list)"),
        (put(3, "layers", 0), "is damaged (a layer is no object)"),
        (put(3, "layers", 0, "name"), "is damaged ('name' is no text)"),
        (put("down", "layers", 0, "name"), "is damaged (a layer is in it twice)"),
        (put(1, "layers", 0, "swapped"), "is damaged ('swapped' is neither true nor false)"),
        (put([1, 1], "layers", 0, "geometry", "stride"), "('stride' is not a list of 3 integers of at"),
        (put("odd", "layers", 0, "geometry", "padding"), "(the padding 'odd' is unknown)"),
        (put(True, "layers", 0, "geometry", "groups"), "('groups' is no positive integer)"),
        (put("int8", "layers", 0, "calls", 0, "dtype"), "(the dtype 'int8' is none of float32, "),
        (put([1], "layers", 0, "calls", 0, "shape"), "('shape' is not a list of 5 integers of at least 0)"),
        (put(["up"], "layers", 0, "calls", 0, "passes"), "(the passes ['up'] are unknown)"),
        (put({"tpu": {}}, "machines"), "(the machine 'tpu' is unknown)"),
        (put({"digits": ["x"]}, "choices", 0, "schedule"), "no choice can be read from "),
        (put("magic", "choices", 0, "source"), "no choice can be read from "),
    ],
)
def test_damaged_plan(path: Path, edit: Callable[[dict[str, Any]], None], message: str) -> None:
    change(path, edit)
    with pytest.raises(PlanError) as caught:
        convert(Net(), plan=path)
    assert message in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON ("),
        (b"{", "is not JSON ("),
        (b"\xff\xfe", "is not JSON ("),
        (b'{"g3dswap_plan": NaN}', "is not JSON ("),
        (b"[" * 100_000, "is not JSON (it is nested too deeply)"),
        (b"[1]", "is no plan of g3dswap; write one with"),
        (b"\x80\x04\x95", "is not JSON ("),  # a pickle is only ever text to be parsed
    ],
)
def test_other_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError) as caught:
        read_plan(path)
    assert message in str(caught.value), caught.value


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match=r"none\.json cannot be read \(No such file or directory\); check"):
        convert(Net(), plan=tmp_path / "none.json")
    with pytest.raises(PlanError, match="Is a directory"):
        convert(Net(), plan=tmp_path)
    monkeypatch.setattr(plan, "LARGEST", 1 << 20)
    (tmp_path / "big.json").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(PlanError, match=r"big\.json is larger than 1 MiB; it is no plan of g3dswap"):
        read_plan(tmp_path / "big.json")


def test_only_converted_models_have_plans(tmp_path: Path) -> None:
    for model in (Net(), revert(convert(Net(), X))):
        with pytest.raises(ArgumentError, match=r"a model that g3dswap\.convert returned, and this Net"):
            save_plan(model, tmp_path / "plan.json")
    with pytest.raises(ArgumentError, match="and this str is none"):
        save_plan("net", tmp_path / "plan.json")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"cannot be written to .*no/plan\.json \(No such file or dir"):
        save_plan(convert(Net(), X), tmp_path / "no" / "plan.json")
    assert not list(tmp_path.iterdir())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("plan") / "plan.json"
    monkeypatch = pytest.MonkeyPatch()
    with faked(monkeypatch):
        save_plan(convert(Net(), X), place)
    monkeypatch.undo()
    data: dict[str, Any] = json.loads(place.read_text())
    return data


@settings(max_examples=examples(200))
@given(data=st.data())
def test_any_change_gives_a_plan_or_a_plan_error(
    sample: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    changed = json.loads(json.dumps(sample))
    at, value = changed, changed
    key: Any = None
    while isinstance(value, (dict, list)) and value and (key is None or data.draw(st.integers(0, 4))):
        at = value
        key = data.draw(st.sampled_from(list(at) if isinstance(at, dict) else range(len(at))))
        value = at[key]
    at[key] = data.draw(JSON)
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_text(json.dumps(changed))
    try:
        read_plan(path)
    except PlanError as error:
        assert "\n" not in str(error).strip() and str(error).endswith(".")
