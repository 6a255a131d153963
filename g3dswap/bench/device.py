"""What a benchmark's figures hold for: the device, its state, versions, settings."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from g3dswap import native
from g3dswap.bench.graphs import cache_bytes
from g3dswap.errors import ArgumentError
from g3dswap.problem import device_facts
from g3dswap.tc import kernel

HEADER: dict[str, tuple[str, ...]] = {
    "device": ("device_name", "capability", "cores"),
    "versions": ("torch", "compiler", "g3dswap"),
    "settings": ("dtype", "batch", "tune", "seconds"),
}
"""What a header has at least; beside it `date` and `statistic`."""

UNKNOWN = "unknown"
QUERIES = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "most_sm_mhz": "clocks.max.sm",
    "most_memory_mhz": "clocks.max.mem",
    "power_limit_w": "power.limit",
}
PATIENCE = 30  # seconds for the driver's tool


def gpu_facts() -> dict[str, Any]:
    """Of the current GPU, now; what the driver's tool does not say is "unknown"."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "l2_bytes": cache_bytes(),
        "memory_bytes": properties.total_memory,
        **queried(str(properties.uuid)),
    }


def queried(uuid: str) -> dict[str, str]:
    """What nvidia-smi says of the GPU with this identifier."""
    words = ["nvidia-smi", f"--query-gpu={','.join(QUERIES.values())}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(
            [*words, f"--id=GPU-{uuid}"], capture_output=True, text=True, timeout=PATIENCE, check=True
        )
    except (OSError, subprocess.SubprocessError):  # no such tool, or it objects
        return dict.fromkeys(QUERIES, UNKNOWN)
    values = [value.strip() for value in said.stdout.split(",")]
    if len(values) != len(QUERIES):
        return dict.fromkeys(QUERIES, UNKNOWN)
    return {name: UNKNOWN if "N/A" in value else value for name, value in zip(QUERIES, values, strict=True)}


def describe(device: torch.device, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The header of a file: device, versions and settings, and the date."""
    kind = device.type
    versions: dict[str, Any] = {
        "torch": torch.__version__,
        **kernel.versions(kernel.target_of(kind)),
        "g3dswap": version("g3dswap"),
        "python": platform.python_version(),
    }
    if kind == "cuda":
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        versions["triton"] = version("triton")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": {**device_facts(kind), "cores": cores},
        "versions": versions,
        "settings": dict(settings),
    }


def agree(before: Mapping[str, Any], header: Mapping[str, Any], path: Path) -> None:
    """ArgumentError: figures of different conditions do not belong in one file."""
    for part in HEADER:
        known = before.get(part)
        for name, value in header[part].items():
            then = known.get(name) if isinstance(known, dict) else None
            if then != value:
                raise ArgumentError(
                    f"{path} was measured with {name} {then!r}, and now it is {value!r}: "
                    "do not --resume it, or make them agree."
                )


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@contextlib.contextmanager
def prepared(device: torch.device, threads: int) -> Iterator[None]:
    """The device, the threads (0: PyTorch's) and, on a GPU, cuDNN's search for its fastest kernels."""
    before = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, before)
        torch.set_num_threads(threads or before)
        if device.type == "cuda":
            stack.enter_context(native.searching())
            stack.enter_context(torch.cuda.device(device))
        yield
