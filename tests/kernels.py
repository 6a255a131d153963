"""Kernels for the tests of what is above them: choices that are made without compiling or measuring."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from g3dswap import native
from g3dswap.choice import Choice
from g3dswap.problem import Problem


class Recorder:
    """Stands in for ``choose.resolve``: chooses "ours", a float64 computation in the problem's layout.

    It records what was resolved, and each run as (pass of the layer, layout, batch).
    """

    def __init__(self, use_native: bool = False) -> None:
        self.use_native = use_native
        self.resolved: list[tuple[Problem, int, str, str]] = []
        self.runs: list[tuple[str, str, int]] = []

    def __call__(self, problem: Problem, batch: int = 1, tune: str = "cached", cache: str = "") -> Choice:
        self.resolved.append((problem, batch, tune, cache))
        if self.use_native:
            return Choice(problem, "native", "the test wants PyTorch's")

        def kernel(*tensors: Any) -> Tensor:
            return self.run(problem, *tensors)

        return Choice(problem, "tuned", "the test wants ours", schedule={"a": 1}, candidate=kernel)  # type: ignore[arg-type]

    def run(self, problem: Problem, *tensors: Any) -> Tensor:
        """What one of our kernels promises and asks: operands in the problem's layout, so the result."""
        first = tensors[0]
        shapes = {
            "forward": (problem.geometry.input_shape, lambda n: problem.geometry.weight_shape()),
            "grad_input": (problem.geometry.output_shape, problem.geometry.input_shape),
            "grad_weight": (problem.geometry.output_shape, problem.geometry.input_shape),
        }[problem.direction]
        # The forward pass of a transposed layer has no tensor of its output's shape.
        missing = [1] if problem.layer_pass == "forward" and problem.transposed else []
        for i, (x, shape) in enumerate(zip(tensors, shapes)):
            assert x is None if i in missing else tuple(x.shape) == shape(first.shape[0])
        for x in tensors:
            assert x is None or x.dim() == 1 or x.is_contiguous(memory_format=problem.memory_format)
            assert x is None or x.dtype == problem.dtype
        if problem.layer_pass == "forward":
            assert (tensors[-1] is not None) == problem.bias
        self.runs.append((problem.layer_pass, problem.layout, first.shape[0]))
        result = native.reference(problem, *tensors)
        out = torch.empty(result.shape, dtype=problem.dtype, memory_format=problem.memory_format)
        return out.copy_(result)

    def directions(self) -> list[str]:
        """The passes of the runs so far, in order; forgets them."""
        runs, self.runs = self.runs, []
        return [name for name, _, _ in runs]
