"""Proof that a converted model still computes what it computed: outputs and gradients against float64."""

from __future__ import annotations

import copy
import io
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from g3dswap.errors import ArgumentError, ConvertError, VerificationError, described
from g3dswap.fused import Fused
from g3dswap.guard import Inputs, a_type, example, named_tensors, untouched
from g3dswap.native import FLOORS
from g3dswap.replay import Record, Replay

SEED = 20261122
"""Every run of a model starts from it, so that dropout drops the same elements."""


@dataclass(frozen=True)
class Compared:
    """One output or gradient: the errors of both models, as ||x - ref|| / ||ref||."""

    name: str
    """``output...``, ``grad input...``, or ``grad`` and the parameter's name."""
    shape: tuple[int, ...]
    before: float
    after: float
    bound: float

    @property
    def ok(self) -> bool:
        """The converted model's error is within the bound (a NaN is not)."""
        return self.after <= self.bound

    @property
    def ratio(self) -> float:
        """Error over bound; more than 1 is a failure."""
        return self.after / self.bound if self.after == self.after else float("inf")


@dataclass(frozen=True)
class Verification:
    """Outputs and gradients of two models against a float64 copy of the first. ``str()`` is a table."""

    tensors: tuple[Compared, ...]

    @property
    def ok(self) -> bool:
        """Every output and every gradient is within its bound."""
        return all(item.ok for item in self.tensors)

    @property
    def worst(self) -> Compared:
        """The tensor nearest to its bound, or farthest above it."""
        return max(self.tensors, key=lambda item: item.ratio)

    def check(self) -> Verification:
        """Itself, if all is well.

        Raises:
            VerificationError: some tensor is out of its bound; names the worst one.
        """
        if not self.ok:
            failed = sum(not item.ok for item in self.tensors)
            raise VerificationError(
                f"{failed} of {len(self.tensors)} tensors differ from float64 by more than the bound, the "
                f"worst is {self.worst.name} with {self.worst.after:.2g} (bound {self.worst.bound:.2g}, "
                f"PyTorch {self.worst.before:.2g}); g3dswap.revert(model) gives the original layers back."
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dictionaries, strings and numbers, fit for ``json.dumps``."""
        rows = [{**asdict(item), "shape": list(item.shape), "ok": item.ok} for item in self.tensors]
        return {"ok": self.ok, "worst": self.worst.name, "tensors": rows}

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "FAILED"
        worst = self.worst
        gradients = any(_is_grad(item.name) for item in self.tensors)
        what = "outputs and gradients" if gradients else "outputs"
        lines = [
            f"g3dswap verification {verdict}: {len(self.tensors)} {what} against float64; "
            f"nearest to its bound is {worst.name} ({worst.after:.2g} of {worst.bound:.2g}).",
        ]
        table = Table(box=box.ASCII2, expand=True)
        table.add_column("tensor", ratio=1, overflow="fold")
        for title in ("before", "after", "bound", ""):
            table.add_column(title, justify="right", no_wrap=True)
        for item in self.tensors:
            cells = [f"{value:.2e}" for value in (item.before, item.after, item.bound)]
            table.add_row(Text(item.name), *cells, "ok" if item.ok else "FAILED")
        buffer = io.StringIO()
        Console(file=buffer, width=80, color_system=None, force_terminal=False).print(table)
        return "\n".join([*lines, *(line.rstrip() for line in buffer.getvalue().splitlines())])


def verify(
    before: nn.Module,
    after: nn.Module,
    example_inputs: Any,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Verification:
    """Compare outputs and all gradients of two models on the same input, both against float64.

    The reference is a deep copy of ``before`` in float64. A tensor's error is ``||x - ref|| / ||ref||``, and
    ``after`` may have twice the error of ``before``, which is the largest of three runs: on the input, and
    twice with rounding noise of its dtype added to input and parameters, because the rounding error of a
    single run is a matter of luck. No error has to be below ``native.FLOORS`` (4 eps in float32 and float64,
    eps / 2 in half types); for a tensor that vanishes but for rounding (the gradient of a bias before a batch
    norm: the error of ``before`` exceeds sqrt(eps)) that counts relative to the largest output or gradient.

    Both models run in the mode (train, eval) that they are in, from the same random seed and through the same
    branches of ReLUs and max poolings (see ``g3dswap.replay``), and are left untouched. Gradients are those
    of the sum of the outputs, weighted with fixed random numbers, in all parameters that require one and in
    all floating-point inputs. Of models with fused layers, which have other parameters, only the outputs are
    compared.

    Args:
        before, after: a model and its converted copy.
        example_inputs, example_kwargs: what their forwards take, as for ``convert``.

    Raises:
        ArgumentError: no modules, other parameters, other modes, or inputs that do not fit.
        VerificationError: ``before`` cannot run in float64.
        ConvertError: a forward or backward raised.
    """
    for role, model in (("before", before), ("after", after)):
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"verify() takes two torch.nn.Modules; {role} is {a_type(model)}.")
    inputs = example(before, example_inputs, example_kwargs)
    if inputs is None:
        raise ArgumentError("verify() needs example_inputs: what the model's forward takes.")
    gradients = not any(isinstance(item, Fused) for model in (before, after) for item in model.modules())
    _check_same(before, after, gradients)
    dtype = _dtype(before, inputs)
    record = Record(dtype)
    reference = _reference(before, inputs, record, gradients)
    runs = [_run(before, inputs, Replay(record), "before", gradients)]
    for seed in (1, 2):
        noise = _Noise(dtype, seed)
        noisy = noise.model(before)
        runs.append(_run(noisy, inputs.map(noise), Replay(record), "before", gradients))
    ours = _run(after, inputs, Replay(record), "after", gradients)
    return Verification(tuple(_compare(reference, runs, ours, dtype)))


def _check_same(before: nn.Module, after: nn.Module, parameters: bool) -> None:
    """Raise unless both have the same mode and, if wanted, the same parameters."""
    old, new = (
        {name: tuple(item.shape) for name, item in model.named_parameters()} for model in (before, after)
    )
    if parameters and old != new:
        names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        raise ArgumentError(
            f"before and after are not the same model: their parameter {names[0]!r} differs in name or "
            "shape; pass a model and its converted copy."
        )
    if before.training != after.training:
        modes = ["train" if model.training else "eval" for model in (before, after)]
        raise ArgumentError(
            f"before is in {modes[0]} mode and after in {modes[1]} mode; put both in the same, with "
            ".train() or .eval()."
        )


def _dtype(model: nn.Module, inputs: Inputs) -> torch.dtype:
    """The lowest floating-point precision in use: that of parameters, of the input, or of autocast."""
    tensors = [*model.parameters(), *(tensor for _, tensor in inputs.tensors())]
    dtypes = {item.dtype for item in tensors if item.is_floating_point()} or {torch.float32}
    for kind in {item.device.type for item in tensors}:
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtypes.add(torch.get_autocast_dtype(kind))
    return max(dtypes, key=lambda item: torch.finfo(item).eps)


class _Noise:
    """Rounding noise: relative, uniform, at most half a unit in the last place of ``dtype``."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.eps = torch.finfo(dtype).eps
        self.seed = seed

    def __call__(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        generator = torch.Generator(tensor.device).manual_seed(self.seed)
        shift = torch.rand(tensor.shape, generator=generator, device=tensor.device, dtype=torch.float64) - 0.5
        noisy = tensor.detach().double() * (1 + self.eps * shift)
        return noisy.to(tensor.dtype).requires_grad_(tensor.requires_grad)

    def model(self, model: nn.Module) -> nn.Module:
        """A copy of the model whose parameters have the noise."""
        noisy = copy.deepcopy(model)
        for item in noisy.parameters():
            item.data.copy_(self(item.data))
        return noisy


def _reference(
    before: nn.Module, inputs: Inputs, record: Record, gradients: bool
) -> dict[str, Tensor | None]:
    """Outputs and, if wanted, gradients of a float64 copy of the model."""
    try:
        model = copy.deepcopy(before).double()
        doubles = inputs.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        return _run(model, doubles, record, "before", gradients)
    except Exception as error:
        raise VerificationError(
            f"{type(before).__name__} cannot run in float64 ({described(error.__cause__ or error)}), which "
            "verify() needs as its reference; let its forward follow the dtype of its input, or verify a "
            "part of it."
        ) from error


def _run(
    model: nn.Module, inputs: Inputs, mode: TorchFunctionMode, role: str, gradients: bool
) -> dict[str, Tensor | None]:
    """Outputs and, if wanted, gradients by name, from a fixed seed; the model is left untouched."""
    try:
        with untouched(model), torch.inference_mode(False), torch.set_grad_enabled(gradients):
            random.seed(SEED)
            numpy.random.seed(SEED)
            torch.manual_seed(SEED)
            # One thread: where a backward recomputes a forward, it has to do so under this mode.
            with torch.autograd.set_multithreading_enabled(False), mode:
                return _outputs_and_gradients(model, inputs)
    except VerificationError:
        raise
    except Exception as error:
        raise ConvertError(
            f"Running the model {role!r} on the example inputs raised {described(error)}; "
            "verify() needs inputs that forward and backward take."
        ) from error


def _outputs_and_gradients(model: nn.Module, inputs: Inputs) -> dict[str, Tensor | None]:
    leaves = inputs.map(lambda tensor: tensor.detach().clone().requires_grad_(tensor.is_floating_point()))
    # Not the leaves themselves: a forward may change its input in place.
    given = leaves.map(lambda tensor: tensor.clone())
    outputs = [
        (name, tensor)
        for name, tensor in named_tensors(model(*given.args, **given.kwargs), "output")
        if tensor.is_floating_point()
    ]
    if not outputs:
        raise VerificationError(
            f"{type(model).__name__}.forward returned no floating-point tensor in a tuple, list, dict or "
            "dataclass, so that there is nothing to verify; wrap it in a module that returns its tensors."
        )
    found: dict[str, Tensor | None] = {name: tensor.detach() for name, tensor in outputs}
    targets = [(f"grad {name}", tensor) for name, tensor in leaves.tensors() if tensor.requires_grad]
    targets += [(f"grad {name}", item) for name, item in model.named_parameters() if item.requires_grad]
    recorded = [tensor for _, tensor in outputs if tensor.requires_grad]
    if recorded and targets:
        weights = numpy.random.default_rng(SEED)
        terms = []
        for tensor in recorded:
            weight = torch.from_numpy(numpy.asarray(weights.standard_normal(tensor.shape)))
            terms.append((tensor.double() * weight.to(tensor.device)).sum())
        total = terms[0]
        for term in terms[1:]:
            total = total + term.to(total.device)
        grads = torch.autograd.grad(total, [item for _, item in targets], allow_unused=True)
        found.update((name, grad) for (name, _), grad in zip(targets, grads))
    return found


def _compare(
    reference: Mapping[str, Tensor | None],
    runs: Sequence[Mapping[str, Tensor | None]],
    ours: Mapping[str, Tensor | None],
    dtype: torch.dtype,
) -> Iterator[Compared]:
    if list(reference) != list(ours):
        odd = sorted(set(reference) ^ set(ours))
        raise ArgumentError(
            f"before and after return different things: {odd[0] if odd else 'their order'} is not in both; "
            "pass a model and its converted copy."
        )
    eps = torch.finfo(dtype).eps
    floor = FLOORS.get(dtype, eps / 2)
    largest = {
        kind: max((_rms(item) for name, item in reference.items() if _is_grad(name) == kind), default=0.0)
        for kind in (False, True)
    }
    for name, wanted in reference.items():
        got = ours[name]
        if wanted is None and got is None:
            continue  # An unused parameter has no gradient in either.
        if wanted is None or got is None:
            yield Compared(name, (), 0.0, math.inf, floor)
            continue
        norm = float(torch.linalg.vector_norm(wanted))
        own = max(_distance(run.get(name), wanted, norm) for run in runs)
        bound = max(2 * own, floor)
        if own > math.sqrt(eps):
            # More than half of PyTorch's digits are wrong: what is left is the rounding of larger numbers.
            smallest = floor * largest[_is_grad(name)] * math.sqrt(wanted.numel())
            norm = max(norm, smallest)
            own = max(_distance(run.get(name), wanted, norm) for run in runs)
            bound = max(2 * own, smallest / norm)
        yield Compared(name, tuple(wanted.shape), own, _distance(got, wanted, norm), bound)


def _is_grad(name: str) -> bool:
    return name.startswith("grad ")


def _rms(tensor: Tensor | None) -> float:
    if tensor is None or not tensor.numel():
        return 0.0
    return float(torch.linalg.vector_norm(tensor)) / math.sqrt(tensor.numel())


def _distance(got: Tensor | None, wanted: Tensor, norm: float) -> float:
    """||got - wanted|| / norm; infinite for another shape or a value that is not finite in one only."""
    if got is None or got.shape != wanted.shape:
        return math.inf
    distance = float(torch.linalg.vector_norm(got.double() - wanted))
    if distance == 0:
        return 0.0
    relative = distance / norm if norm else math.inf
    return relative if relative == relative else math.inf
