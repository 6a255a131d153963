"""What of a machine matters to g3dswap, for bug reports: versions, devices, compiler, directories."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

from g3dswap.errors import NoCompilerError
from g3dswap.problem import device_facts
from g3dswap.tc import kernel, runtime_cpp
from g3dswap.tc.cache import Cache

_PACKAGES = ("g3dswap", "torch", "triton", "numpy", "safetensors", "click", "rich")


def describe() -> dict[str, Any]:
    """Plain data; asks devices nothing that changes them."""
    try:
        compiler: str | None = runtime_cpp.compiler()
    except NoCompilerError:
        compiler = None
    cache = Cache()
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        **{name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "cpu": device_facts("cpu"),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": [device_facts("cuda", i) for i in range(torch.cuda.device_count())],
        "compiler": compiler,
        "targets": {target: kernel.versions(target) for target in kernel.TARGETS},
        "cache": str(cache.directory),
        "entries": len(cache.entries()),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
