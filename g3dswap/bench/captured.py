"""Steps of networks in CUDA graphs: what a GPU takes for them where no host limits it.

A graph holds a whole step, as PyTorch's notes on CUDA graphs describe it. One is captured, timed and freed at
a time: the memory of a large network's step is a good part of a GPU's.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from g3dswap.bench import graphs
from g3dswap.bench.compared import INFERENCE, TRAINING
from g3dswap.bench.steps import Batch, Training
from g3dswap.errors import described
from g3dswap.rounds import Times, alternate
from g3dswap.tc.timing import Call, Sampler, event_sampler

Run = Callable[[], Sequence[Tensor]]

ASLEEP = 10_000_000  # cycles of a GPU, some 5 ms: a host launches a graph of thousands of kernels meanwhile


def time_graphs(
    sides: Mapping[str, Training],
    batch: Batch,
    seconds: float,
    *,
    sample: Sampler,
    record: Callable[[Run, Call], Call] = graphs.record,
) -> tuple[dict[tuple[str, str], Times], list[str]]:
    """Times by kind of step and side, for about `seconds` each; and why there is none of some.

    The models have run both kinds of step. Their weights are trained further.
    """
    found: dict[tuple[str, str], Times] = {}
    failed: dict[str, list[str]] = {}
    gc.collect()  # what earlier steps left would tie their stream to that of a capture
    for kind in (INFERENCE, TRAINING):
        for name, side in sides.items():
            side.model.train(kind == TRAINING)
            run: Run = partial(_update if kind == TRAINING else _infer, side, batch)
            try:
                found[kind, name] = alternate({name: record(run, run)}, sample, seconds)[name]
            except RuntimeError as error:  # PyTorch's, CUDA's and ours alike, and too little memory
                failed.setdefault(described(error), []).append(f"{kind} {name}")
            finally:
                side.optimizer.zero_grad()
                gc.collect()
                if batch[0].is_cuda:
                    torch.cuda.empty_cache()
    return found, [f"no CUDA graph of {', '.join(what)}: {why}" for why, what in failed.items()]


def sampler() -> Sampler:
    """The function that times a graph on the current GPU, without what its launch takes."""
    return event_sampler(partial(torch.cuda._sleep, ASLEEP))


def _update(side: Training, batch: Batch) -> list[Tensor]:
    """A training step. A backward pass computes the first parameter's gradient last."""
    loss = side.update(*batch)
    return [loss, *[x.grad for x in side.model.parameters() if x.grad is not None][:1]]


def _infer(side: Training, batch: Batch) -> list[Tensor]:
    with torch.no_grad():
        return [side.forward(batch[0])]
