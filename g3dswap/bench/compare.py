"""One network before and after its conversion: steps by Python and in CUDA graphs, and their kernels."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from g3dswap import direct
from g3dswap.bench.captured import sampler, time_graphs
from g3dswap.bench.compared import INFERENCE, TRAINING, Compared, Conversion, Side
from g3dswap.bench.grouped import GroupedPass, measure_passes
from g3dswap.bench.measure import Ceilings
from g3dswap.bench.steps import BATCHES, Batch, Training, infer, make_batch, train
from g3dswap.convert import convert
from g3dswap.errors import described
from g3dswap.report import report
from g3dswap.rounds import Times, synchronize

BEFORE, AFTER = "before", "after"
KERNEL_SECONDS = 0.02  # what each kernel of a grouped layer may take


def compare(
    model: nn.Module,
    shape: tuple[int, ...],
    device: torch.device,
    amp: bool,
    steps: int,
    seconds: float,
    options: Mapping[str, Any],
    ceilings: Callable[[torch.dtype], Ceilings],
) -> Compared:
    """Convert a model and run both: `steps` of training, inference for about `seconds` each.

    shape: of the input, the batch first. options: of `convert`. ceilings: the device's for a dtype. On a GPU
    both are also run in CUDA graphs, for about `seconds` each. The model itself is moved and trained.
    """
    model = model.to(device).train()
    batches = [make_batch(model, shape, device, number) for number in range(BATCHES)]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    synchronize(device)
    start = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        fast = convert(model, (batches[0][0],), **options)
    synchronize(device)
    conversion = Conversion.of(report(fast), time.perf_counter() - start)
    direct.begin(device.type, wait=True)  # which later steps do not wait for
    sides = {}
    for name, it in ((BEFORE, model), (AFTER, fast)):
        it.load_state_dict(weights)  # also the running means of what conversion ran
        sides[name] = Training(it.train(), amp)
    del weights
    train(sides, batches, steps)
    inference = infer(sides, batches[0][0], seconds)
    captured: dict[tuple[str, str], Times] = {}
    notes: list[str] = []
    if device.type == "cuda":
        captured, notes = time_graphs(sides, batches[0], seconds, sample=sampler())
    passes, missing = _grouped(sides, batches[0], ceilings)
    before, after = (
        Side(
            it.times,
            inference[name],
            it.losses,
            it.memory or None,
            captured.get((TRAINING, name)),
            captured.get((INFERENCE, name)),
        )
        for name, it in sides.items()
    )
    parameters = sum(x.numel() for x in model.parameters())
    return Compared(before, after, conversion, parameters, passes, [*notes, *missing])


def _grouped(
    sides: Mapping[str, Training], batch: Batch, ceilings: Callable[[torch.dtype], Ceilings]
) -> tuple[list[GroupedPass], list[str]]:
    """The passes of the grouped layers, and what is to be said of their times."""
    before, after = (sides[name].model.train() for name in (BEFORE, AFTER))
    forward = partial(sides[BEFORE].forward, batch[0])
    try:
        passes = measure_passes(before, after, forward, ceilings, KERNEL_SECONDS)
    except RuntimeError as error:  # too little memory, say: the steps were timed all the same
        return [], [f"no times of the grouped layers: {described(error)}"]
    reasons = dict.fromkeys(times.note for it in passes for times in (it.torch, it.ours) if times.note)
    return passes, [
        f"no CUDA graph of some kernels, whose launches from Python count: {why}" for why in reasons
    ]
