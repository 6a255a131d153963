"""The benchmark of whole networks: each in each dtype in turn, every result stored at once."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from g3dswap.bench.compare import KERNEL_SECONDS, compare
from g3dswap.bench.device import agree, describe, gpu_facts, prepared
from g3dswap.bench.measure import Ceilings, ceilings
from g3dswap.bench.network_results import NetworkResults, NetworkRow
from g3dswap.bench.networks import MissingPackage, Network
from g3dswap.errors import G3DSwapWarning
from g3dswap.problem import dtype_name

DTYPES = ("float32", "bfloat16")
SEED = 0


@dataclass(frozen=True)
class NetworkSettings:
    """What to measure, and how.

    dtypes:  "float32", or "bfloat16" for autocast.
    scale:   of the networks and their inputs, "full" or "tiny".
    steps:   of training; each model does all of them.
    seconds: what the inference of each model may take, and each kind of step in a CUDA graph.
    threads: PyTorch's and the kernels'; 0: as many as PyTorch takes.
    """

    networks: Sequence[Network]
    device: torch.device
    dtypes: Sequence[str] = DTYPES
    scale: str = "full"
    steps: int = 50
    seconds: float = 0.5
    tune: str = "quick"
    cache: Path | None = None
    threads: int = 0
    progress: bool = True

    def said(self) -> dict[str, Any]:
        """What a file says of them; the rest may differ between the runs that it is from."""
        return {"scale": self.scale, "steps": self.steps, "seconds": self.seconds, "tune": self.tune}


def bench_networks(settings: NetworkSettings, output: Path, resume: bool = False) -> NetworkResults:
    """Measure all networks and write `output` (JSON) after each.

    A network that cannot be measured here, for want of a package or of memory, is skipped with a warning
    that says why. With `resume`, what `output` has already is not measured again; ArgumentError if that was
    measured under other conditions.
    """
    with prepared(settings.device, settings.threads):
        header = describe(settings.device, settings.said())
        results = NetworkResults(header)
        if resume and output.exists():
            results = NetworkResults.load(output)
            agree(results.header, header, output)
        results.rows = [row for row in results.rows if row.compared]  # what was skipped is tried again
        results.save(output)
        known = {row.key for row in results.rows}
        todo = [(network, dtype) for network in settings.networks for dtype in settings.dtypes]
        todo = [(network, dtype) for network, dtype in todo if (network.name, dtype) not in known]
        kind = settings.device.type
        with tqdm(total=len(todo), unit="run", disable=not settings.progress, dynamic_ncols=True) as bar:
            for network, dtype in todo:
                bar.set_description_str(f"{network.name} {dtype}")
                results.rows.append(_row(settings, network, dtype, partial(_ceilings, results, kind)))
                if settings.device.type == "cuda":
                    results.header["gpu"] = gpu_facts()  # now, when its clocks are those of a busy device
                results.save(output)
                bar.update()
    for reason in dict.fromkeys(f"{row.name}: {row.skipped}" for row in results.rows if row.skipped):
        warnings.warn(reason, G3DSwapWarning, stacklevel=2)
    return results


def _ceilings(results: NetworkResults, device: str, dtype: torch.dtype) -> Ceilings:
    """The device's for a dtype, measured where they are first wanted."""
    known, name = results.ceilings, dtype_name(dtype)
    if name not in known:
        known[name] = ceilings(device, dtype, 4 * KERNEL_SECONDS)
    return known[name]


def _row(
    settings: NetworkSettings, network: Network, dtype: str, limits: Callable[[torch.dtype], Ceilings]
) -> NetworkRow:
    torch.manual_seed(SEED)
    shape = network.shape(settings.scale)
    options = {"tune": settings.tune, "cache": settings.cache, "progress": settings.progress}
    try:
        model = network.make(settings.scale)
        compared = compare(
            model,
            shape,
            settings.device,
            dtype == "bfloat16",
            settings.steps,
            settings.seconds,
            options,
            limits,
        )
    except MissingPackage as error:
        skipped = f"left out, for it cannot be built ({error}); pip install {network.packages}."
    except torch.OutOfMemoryError:
        skipped = "left out, for the device has too little memory; use a larger one, or --scale tiny."
    else:
        return NetworkRow(network.name, shape, dtype, compared)
    finally:
        gc.collect()  # models are full of cycles, and the next one needs the memory
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()
    return NetworkRow(network.name, shape, dtype, None, skipped)
