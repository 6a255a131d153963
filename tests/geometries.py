"""Random convolution problems and their data, for every test that compares a kernel with float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import grad as conv_grad

from g3dswap.errors import ArgumentError
from g3dswap.native import activate
from g3dswap.problem import ACTIVATIONS, DTYPES, Geometry, Problem
from g3dswap.tc.nest import Nest

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
"""Relative error that rounding explains, for the short sums of small geometries."""


@dataclass(frozen=True)
class Case:
    """A problem, a batch size and the seed of its data and of the schedules that are drawn for it."""

    problem: Problem
    batch: int
    seed: int


def layer_of(
    draw: st.DrawFn,
    channels: tuple[int, int, int],
    size: tuple[int, ...],
    kernels: list[int],
    strides: list[int],
    paddings: list[int],
    dilations: list[int],
) -> Geometry:
    """A layer of so many groups, and channels and filters of each, whose sides are drawn from these."""

    def three(values: list[int]) -> tuple[int, int, int]:
        t, h, w = (draw(st.sampled_from(values)) for _ in range(3))
        return t, h, w

    groups, own, filters = channels
    sides = three(kernels), three(strides), three(paddings), three(dilations)
    t, h, w = size
    try:
        return Geometry(groups * own, groups * filters, groups, (t, h, w), *sides)
    except ArgumentError:
        assume(False)
        raise


@st.composite
def cases(draw: st.DrawFn, longest: int = 9, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Case:
    """Any small problem: odd sizes, one-element axes, strides beyond the kernel, multipliers, dilation."""
    groups = draw(st.sampled_from([1, 2, 3, 5, 17]))
    channels, filters = draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([1, 1, 2, 4]))
    size = draw(st.tuples(*[st.integers(1, longest)] * 3))
    sides = [1, 2, 3, 5], [1, 1, 2, 3, 4], [0, 0, 1, 2], [1, 1, 2, 3]
    geometry = layer_of(draw, (groups, channels, filters), size, *sides)
    direction = draw(st.sampled_from(["forward", "grad_input", "grad_weight"]))
    forward = direction != "grad_weight"
    problem = Problem(
        direction,
        geometry,
        draw(st.sampled_from(dtypes)),
        draw(st.sampled_from(["contiguous", "channels_last_3d"])),
        bias=forward and draw(st.booleans()),
        transposed=direction == "grad_input",  # the layer for which that is a forward pass
        activation=draw(st.sampled_from(["", "", *ACTIVATIONS])) if forward else "",
    )
    return Case(problem, draw(st.integers(1, 3)), draw(st.integers(0, 2**31)))


def operands(case: Case) -> tuple[list[Tensor], Tensor]:
    """Random operands in the problem's layout, and a result that is full of NaN."""
    problem, geometry = case.problem, case.problem.geometry
    generator = torch.Generator().manual_seed(case.seed)

    def tensor(shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=generator).to(problem.dtype)
        return values.contiguous(memory_format=problem.memory_format) if len(shape) == 5 else values

    image = tensor(geometry.input_shape(case.batch))
    weight = tensor(geometry.weight_shape())
    result = tensor(geometry.output_shape(case.batch))
    bias = [tensor((problem.bias_size,))] if problem.bias else []
    if problem.direction == "forward":
        return [image, weight, *bias], torch.full_like(result, torch.nan)
    if problem.direction == "grad_input":
        return [result, weight, *bias], torch.full_like(image, torch.nan)
    return [result, image], torch.full_like(weight, torch.nan)


def expected(case: Case, tensors: list[Tensor]) -> Tensor:
    """The result in float64 by PyTorch, from the same (rounded) operands."""
    geometry = case.problem.geometry
    wide = [t.double().contiguous() for t in tensors]
    rest = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    if case.problem.direction == "grad_weight":
        return conv_grad.conv3d_weight(wide[1], geometry.weight_shape(), wide[0], *rest)
    if case.problem.direction == "forward":
        out = torch.nn.functional.conv3d(wide[0], wide[1], None, *rest)
    else:
        out = conv_grad.conv3d_input(geometry.input_shape(case.batch), wide[1], wide[0], *rest)
    if case.problem.bias:
        out = out + wide[2].view(-1, 1, 1, 1)
    return activate(case.problem.activation, out)


def arrays(nest: Nest, tensors: list[Tensor], batch: int) -> dict[str, NDArray[Any]]:
    """The operands as the comprehension sees them: grouped, float64."""
    found = {}
    for name, tensor in zip(nest.operands, tensors, strict=True):
        shape = [batch if extent is None else extent for extent in nest.tensor(name).shape]
        found[name] = np.ascontiguousarray(tensor.double().reshape(shape).numpy())
    return found


def error(out: Tensor, reference: Tensor) -> float:
    """Relative error in the Euclidean norm; the absolute one where the reference is zero."""
    norm = reference.norm().item()
    return ((out.double() - reference).norm() / (norm or 1.0)).item()
