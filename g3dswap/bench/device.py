"""What of a GPU a benchmark's figures hold for, beyond its name: driver, clocks, cache."""

from __future__ import annotations

import subprocess
from typing import Any

import torch

from g3dswap.bench.graphs import cache_bytes

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
