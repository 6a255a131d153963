from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from g3dswap.choice import problem_from_json, problem_to_json
from g3dswap.errors import ArgumentError
from g3dswap.problem import ACTIVATIONS, Geometry, Problem, device_facts, dtype_name

SEED = Geometry(64, 64, 64, (50, 50, 50), (3, 3, 3))
SMALL = Geometry(4, 6, 2, (5, 6, 7), (3, 2, 1), (2, 1, 1), (1, 0, 2), (1, 2, 3))


@given(
    size=st.tuples(*[st.integers(1, 9)] * 3),
    kernel=st.tuples(*[st.integers(1, 4)] * 3),
    stride=st.tuples(*[st.integers(1, 3)] * 3),
    padding=st.tuples(*[st.integers(0, 3)] * 3),
    dilation=st.tuples(*[st.integers(1, 3)] * 3),
)
def test_output_size_is_pytorchs(size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> None:
    x, w = torch.zeros(1, 2, *size, device="meta"), torch.zeros(2, 1, *kernel, device="meta")
    try:
        expected = F.conv3d(x, w, None, stride, padding, dilation, 2).shape
    except RuntimeError:
        with pytest.raises(ArgumentError, match="larger than the padded input"):
            Geometry(2, 2, 2, size, kernel, stride, padding, dilation)
        return
    geometry = Geometry(2, 2, 2, size, kernel, stride, padding, dilation)
    assert geometry.output_shape(1) == tuple(expected)


def test_shapes() -> None:
    assert SMALL.input_shape(3) == (3, 4, 5, 6, 7)
    assert SMALL.weight_shape() == (6, 2, 3, 2, 1)
    assert SMALL.output_shape(3) == (3, 6, 3, 4, 11)
    assert SMALL.extent == (3, 3, 1) and SMALL.padded == (7, 6, 11)
    assert SEED.depthwise and not SMALL.depthwise and not Geometry(1, 1, 1, (2, 2, 2), (1, 1, 1)).depthwise


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 3}, "in_channels=4 is not divisible by groups=3; choose a group count"),
        ({"in_channels": 6, "groups": 6, "out_channels": 4}, "out_channels=4 is not divisible by groups=6"),
        ({"groups": 0}, "groups=0 must be at least 1"),
        ({"stride": (1, 0, 1)}, r"stride=\(1, 0, 1\) must be three integers"),
        ({"padding": (-1, 0, 0)}, r"padding=\(-1, 0, 0\) must be three integers \(.*\) of at least 0"),
        ({"kernel": (3, 3)}, r"kernel=\(3, 3\) must be three integers"),
        ({"kernel": (9, 1, 1)}, r"dilated kernel \(9, 1, 1\) is larger than the padded input \(7, 6, 11\)"),
    ],
)
def test_bad_geometry(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direction": "sideways"}, "direction='sideways' is unknown; use one of forward, grad_input,"),
        ({"layout": "NCDHW"}, "layout='NCDHW' is unknown; use one of contiguous, channels_last_3d"),
        ({"precision": "bf16"}, "precision='bf16' is unknown; use one of ieee, tf32"),
        ({"dtype": torch.int64}, "dtype int64 has no kernels; use one of float32"),
        ({"direction": "grad_input", "bias": True}, "only a forward pass adds a bias"),
        ({"transposed": True, "bias": True}, "bias=True in a grad_input pass: only a forward pass adds"),
        ({"activation": "tanh"}, "activation='tanh' is unknown; use one of , relu, silu"),
        ({"direction": "grad_input", "activation": "relu"}, "in a grad_input pass: only a forward pass has"),
    ],
)
def test_bad_problem(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        replace(Problem("forward", SMALL), **changes)


@pytest.mark.parametrize("direction", ["forward", "grad_input", "grad_weight"])
def test_flops_and_bytes(direction: str) -> None:
    problem = Problem(direction, SEED)
    # The seed layer's figures: 64 channels of 48^3 outputs, 27 taps, an addition and a product each.
    assert problem.flops(4) == 2 * 4 * 64 * 48**3 * 27
    assert problem.bytes(4) == 4 * (4 * 64 * (50**3 + 48**3) + 64 * 27)
    assert replace(problem, dtype=torch.bfloat16).bytes(4) * 2 == problem.bytes(4)
    assert problem.roofline(4, bandwidth=4.27e12, peak=60e12) == pytest.approx(0.0565e-3, rel=0.01)
    assert problem.roofline(4, bandwidth=1e18, peak=1e9) == problem.flops(4) / 1e9


def test_flops_counts_a_groups_channels_only() -> None:
    problem = Problem("forward", SMALL, bias=True)
    assert problem.flops(1) == 2 * (6 * 3 * 4 * 11) * 2 * 6
    assert problem.bytes(1) == 4 * (4 * 5 * 6 * 7 + 6 * 2 * 6 + 6 * 3 * 4 * 11 + 6)


def test_key_is_flat_json_and_tells_problems_apart() -> None:
    problem = Problem("forward", SMALL)
    key = problem.key({"compiler": "c++ 13"})
    assert json.loads(json.dumps(key)) == key
    assert all(isinstance(v, str | int | bool) or all(isinstance(i, int) for i in v) for v in key.values())
    assert key["size"] == [5, 6, 7] and key["dtype"] == "float32" and key["compiler"] == "c++ 13"
    assert key["device_name"] and key["capability"] and key["threads"] == torch.get_num_threads()
    geometries: list[dict[str, Any]] = [
        {"in_channels": 8},
        {"out_channels": 8},
        {"groups": 1},
        {"size": (5, 6, 8)},
        {"kernel": (1, 2, 1)},
        {"stride": (1, 1, 1)},
        {"padding": (1, 1, 2)},
        {"dilation": (1, 1, 3)},
    ]
    changes: list[dict[str, Any]] = [
        {"direction": "grad_input"},
        {"dtype": torch.float64},
        {"layout": "channels_last_3d"},
        {"bias": True},
        {"precision": "tf32"},
        {"deterministic": True},
        {"transposed": True},
        *({"activation": name} for name in ACTIVATIONS),
        *({"geometry": replace(SMALL, **change)} for change in geometries),
    ]
    others = [replace(problem, **change) for change in changes]
    texts = {json.dumps(p.key(), sort_keys=True) for p in [problem, *others]}
    assert len(texts) == len(others) + 1
    assert problem.key() != key


def test_a_transposed_layers_forward_pass_adds_a_bias_for_each_channel_of_its_result() -> None:
    plain, bias = (Problem("grad_input", SMALL, transposed=True, bias=bias) for bias in (False, True))
    assert (plain.bias_size, bias.bias_size) == (0, 4) and bias.bytes(2) == plain.bytes(2) + 4 * 4
    assert bias.layer_pass == "forward" and str(bias).endswith("bias, transposed")


def test_an_activation_is_in_the_key_and_in_json_only_where_there_is_one() -> None:
    plain, relu = (Problem("forward", SMALL, activation=name) for name in ("", "relu"))
    assert "activation" not in plain.key() and relu.key() == {**plain.key(), "activation": "relu"}
    for problem in (plain, relu):
        assert problem_from_json(json.loads(json.dumps(problem_to_json(problem)))) == problem
    assert "activation" not in problem_to_json(plain) and str(relu).endswith("cpu, relu")
    with pytest.raises(ValueError, match="'tanh' is none of"):
        problem_from_json({**problem_to_json(relu), "activation": "tanh"})


def test_key_refuses_another_kind_of_device() -> None:
    with pytest.raises(ArgumentError, match="device=cuda:0 is not of the problem's kind 'cpu'"):
        Problem("forward", SMALL).key(device=torch.device("cuda:0"))


def test_text() -> None:
    assert str(Problem("forward", SEED, torch.bfloat16, bias=True)) == (
        "forward 64x50x50x50 to 64x48x48x48, groups 64, kernel 3x3x3, stride 1x1x1, padding 0x0x0, "
        "dilation 1x1x1, bfloat16, contiguous, cpu, bias"
    )
    assert dtype_name(torch.float16) == "float16"
    assert Problem("forward", SEED, layout="channels_last_3d").memory_format == torch.channels_last_3d


@pytest.mark.gpu
def test_cuda_facts() -> None:
    facts = device_facts("cuda")
    assert facts["device_name"] == torch.cuda.get_device_name() and facts["capability"].count(".") == 1
