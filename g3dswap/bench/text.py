"""Words and numbers of a benchmark's tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from g3dswap.bench.device import QUERIES, UNKNOWN
from g3dswap.bench.measure import Ceilings
from g3dswap.bench.results import Results
from g3dswap.bench.rows import Row
from g3dswap.problem import Problem
from g3dswap.quantities import ms as ms
from g3dswap.quantities import percent as percent
from g3dswap.quantities import times as times

_EXPLANATION = (
    "Times in ms, by the {statistic} of the runs; +- is the interquartile range. Speed-ups over PyTorch in "
    "the same layout (same), the better of its layouts (better) and NCDHW, of which the means are geometric. "
    "kept: PyTorch's own kernel is the choice. Roof: share of the roofline's speed."
)
_ON_A_GPU = (
    " Times are those of CUDA graphs of many calls on rotating operands, which together exceed the L2 cache "
    "several times; eager is the same calls launched one by one from Python, and counts where a call cannot "
    "be captured."
)


def explanation(results: Results) -> str:
    """What the columns are."""
    statistic = {"quartile": "lower quartile"}.get(results.header["statistic"], results.header["statistic"])
    eager = any(row.ours.eager_seconds is not None for row in results.rows)
    return _EXPLANATION.format(statistic=statistic) + (_ON_A_GPU if eager else "")


def verdict(results: Results) -> str:
    """How the results compared with float64."""
    ours = [row for row in results.rows if not row.kept]
    if wrong := results.wrong():
        return f"{len(wrong)} of the {len(ours)} kernels that are not PyTorch's gave WRONG results."
    if not ours:
        return "PyTorch's own kernels are the choice everywhere."
    worst = max(row.check.error / row.check.bound for row in ours)
    return (
        f"All {len(ours)} kernels that are not PyTorch's matched float64, with at most {worst:.0%} of the "
        "error that is allowed: twice that of PyTorch's kernel, or the dtype's floor."
    )


def headline(results: Results) -> str:
    """Device, versions and settings, on a few lines."""
    header, device = results.header, results.header["device"]
    settings = header["settings"]
    threads = f", {device['threads']} threads" if "threads" in device else ""
    versions = ", ".join(f"{name} {value}" for name, value in header["versions"].items())
    driver = [gpu(header["gpu"])] if "gpu" in header else []
    batch = f"batch {settings['batch']}" if settings["batch"] else "the layers' own batches"
    return "\n".join(
        [
            f"{device['device_name']}, {device['capability']}, {device['cores']} cores{threads}",
            *driver,
            ceilings(results.ceilings),
            f"{settings['dtype']}, {batch}, tune {settings['tune']}, {header['date']}",
            versions,
        ]
    )


def ceilings(limits: Ceilings) -> str:
    """``copy 2969.3 GB/s, matrix product 52210 GFLOP/s (ieee), 398205 GFLOP/s (tf32)``."""
    products = {name: f"{value / 1e9:.0f} GFLOP/s" for name, value in limits.product.items()}
    several = len(products) > 1
    product = ", ".join(f"{text} ({name})" if several else text for name, text in products.items())
    return f"copy {limits.bandwidth / 1e9:.1f} GB/s, matrix product {product}"


def gpu(facts: Mapping[str, Any]) -> str:
    """``driver 570.1, SM 1980 of 1980 MHz, memory 3201 of 3201 MHz, 700 W, L2 60 MiB``."""
    named = {name: facts.get(name, UNKNOWN) for name in QUERIES}
    return (
        f"driver {named['driver']}, SM {named['sm_mhz']} of {named['most_sm_mhz']} MHz, memory "
        f"{named['memory_mhz']} of {named['most_memory_mhz']} MHz, {named['power_limit_w']} W, "
        f"L2 {facts['l2_bytes'] / 2**20:.0f} MiB"
    )


def shape(problem: Problem, batch: int) -> str:
    """``4x64x50x50x50 g64 k3x3x3 s1x1x1``."""
    g = problem.geometry
    size, taps, stride = ("x".join(map(str, values)) for values in (g.input_shape(batch), g.kernel, g.stride))
    filters = f" f{g.out_channels}" if g.out_channels != g.in_channels else ""
    dilation = f" d{'x'.join(map(str, g.dilation))}" if set(g.dilation) != {1} else ""
    return f"{size}{filters} g{g.groups} k{taps} s{stride}{dilation}"


def error(row: Row) -> str:
    """Of our kernel, and whether it is wrong."""
    text = f"{row.check.error:.1e}" if math.isfinite(row.check.error) else "inf"
    return text if row.check.correct else f"WRONG {text}"
