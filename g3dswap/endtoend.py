"""Whole steps of a model before and after its conversion, in turn, and what its grouped convolutions take."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from g3dswap import direct
from g3dswap.convert import revert
from g3dswap.entries import Step
from g3dswap.errors import ArgumentError, ConvertError, described
from g3dswap.guard import Inputs, example, named_tensors, untouched
from g3dswap.module import Grouped
from g3dswap.report import store, stored
from g3dswap.rounds import Times, alternate, clock
from g3dswap.selection import check_model
from g3dswap.tc.timing import Call, Sampler, event_sampler

SECONDS = 2.0
"""What the steps of one kind and one model may take, beside the warm-up."""
WARM_UP = 2  # steps that no time counts of: they allocate memory, search algorithms and choose kernels
SHARES = 5  # steps in which the grouped convolutions are timed one by one
ASLEEP = 400_000  # cycles of a GPU, some 0.2 ms
STATISTIC = "quartile"  # the lower one: on a machine that others keep busy the median is a time of theirs

BEFORE, AFTER = "before", "after"


def measure_steps(
    model: nn.Module,
    example_inputs: Any,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    seconds: float = SECONDS,
) -> tuple[Step, ...]:
    """Time whole steps of a converted model against those of the same model with PyTorch's layers.

    A training step is a forward and a backward pass to all parameters and inputs that require a gradient,
    without loss and optimizer; it is left out in eval mode, under ``torch.no_grad()``, and where nothing
    requires one. An inference step is a forward in eval mode without gradients. The two models share their
    parameters, run in turn on the inputs, and are left untouched. The grouped convolutions are timed one by
    one in steps of their own; times are lower quartiles. The ``report`` of a converted model shows the steps
    from then on; of a model that is not converted only ``before`` is measured.

    Args:
        example_inputs, example_kwargs: what the forward takes, as for ``convert``; the batch decides.
        seconds: what the steps of one kind and one model may take.

    Raises:
        ArgumentError: no module, or inputs that do not fit.
        ConvertError: the model cannot be deep-copied, or a step raised.
    """
    check_model(model, "measure_steps")
    inputs = example(model, example_inputs, example_kwargs)
    if inputs is None:
        raise ArgumentError("measure_steps() needs example_inputs: what the model's forward takes.")
    known = stored(model)
    converted = known is not None or any(isinstance(module, Grouped) for module in model.modules())
    models = {BEFORE: revert(_twin(model)), AFTER: model} if converted else {BEFORE: model}
    device = next(inputs.tensors())[1].device
    steps = tuple(_step(kind, models, inputs, device, seconds) for kind in _kinds(model, inputs))
    if known is not None:
        store(model, replace(known, steps=steps))
    return steps


def _twin(model: nn.Module) -> nn.Module:
    """A copy that holds the very same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        return copy.deepcopy(model, dict(shared))
    except Exception as error:
        raise ConvertError(
            f"{type(model).__name__} cannot be deep-copied ({described(error)}), which "
            "measuring the steps before the conversion takes; time a training step of yours instead."
        ) from error


def _kinds(model: nn.Module, inputs: Inputs) -> Iterator[str]:
    tensors = [*model.parameters(), *(tensor for _, tensor in inputs.tensors())]
    if model.training and torch.is_grad_enabled() and any(item.requires_grad for item in tensors):
        yield "training"
    yield "inference"


def _step(
    kind: str, models: Mapping[str, nn.Module], inputs: Inputs, device: torch.device, seconds: float
) -> Step:
    calls: dict[str, Call] = {}
    grouped: dict[str, float] = {}
    if AFTER in models:
        direct.begin(device.type, wait=True)  # which later steps do not wait for
    with _prepared(kind, models):
        for name, model in models.items():
            calls[name] = partial(_train if kind == "training" else _infer, model, inputs.fresh())
            for _ in range(WARM_UP):
                _guarded(calls[name], kind, model)
        times = alternate(calls, clock(device), seconds)
        for name, call in calls.items():
            found = Times.of([_grouped_seconds(call, device) for _ in range(SHARES)])
            grouped[name] = found.by(STATISTIC).seconds
    after = times[AFTER].by(STATISTIC) if AFTER in times else None
    return Step(kind, times[BEFORE].by(STATISTIC), after, grouped[BEFORE], grouped.get(AFTER))


@contextmanager
def _prepared(kind: str, models: Mapping[str, nn.Module]) -> Iterator[None]:
    """Both models in the step's mode, and afterwards as they were."""
    # The twin first: what is restored last is the state of the tensors that both hold.
    with untouched(models[BEFORE]), untouched(list(models.values())[-1]):
        for model in models.values() if kind == "inference" else ():
            for module in model.modules():
                # Not through train(), which user classes override.
                module.__dict__["training"] = False
        with torch.set_grad_enabled(kind == "training"):
            yield


def _infer(model: nn.Module, inputs: Inputs) -> None:
    model(*inputs.args, **inputs.kwargs)


def _train(model: nn.Module, inputs: Inputs) -> None:
    """Not through ``backward``, which would run hooks that a user put on the accumulation of gradients."""
    outputs = [x for _, x in named_tensors(model(*inputs.args, **inputs.kwargs), "") if x.requires_grad]
    leaves = [*model.parameters(), *(tensor for _, tensor in inputs.tensors())]
    targets = [item for item in leaves if item.requires_grad]
    if outputs and targets:
        torch.autograd.grad(outputs, targets, [torch.ones_like(x) for x in outputs], allow_unused=True)


def _guarded(call: Call, kind: str, model: nn.Module) -> None:
    try:
        call()
    except Exception as error:
        raise ConvertError(
            f"A step of {kind} of {type(model).__name__} raised {described(error)}; "
            "measure_steps() needs inputs that forward and backward take."
        ) from error


# What the grouped convolutions take


def _grouped_seconds(call: Call, device: torch.device) -> float:
    """The seconds that 3D convolutions with groups > 1 take in one call."""
    # One thread: a backward pass on a GPU would otherwise run in one that has no such mode.
    with torch.autograd.set_multithreading_enabled(False), _Grouped(device) as mode:
        call()
    return mode.seconds


def _sampler(device: torch.device) -> Sampler:
    """The function that times an operator amid the others of a step: as warm as they left its operands."""
    # The sleep keeps a GPU busy while the host launches what is timed.
    return event_sampler(partial(torch.cuda._sleep, ASLEEP)) if device.type == "cuda" else clock(device)


class _Grouped(TorchDispatchMode):
    """Times the operators that are 3D convolutions with groups > 1, whoever calls them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.seconds = 0.0
        self.sample = _sampler(device)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        run: Callable[[], Any] = partial(func, *args, **(kwargs or {}))
        if not _is_grouped(func, args, kwargs or {}):
            return run()
        results: list[Any] = []
        self.seconds += self.sample(lambda: results.append(run()))
        return results[0]


def _is_grouped(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    names = [item.name for item in func._schema.arguments]
    given = {**dict(zip(names, args)), **kwargs}
    weight, groups = given.get("weight"), given.get("groups", 1)
    return isinstance(weight, Tensor) and weight.dim() == 5 and groups > 1
