"""The process in which candidates are checked and timed, so that a bad kernel ends it and not the user's.

It answers one request at a time: `open` a problem, `time` or `check` one of its kernels, `close` it.  Its
workload is the one that a search in the user's process would have; its own are the CUDA context, the
operands and the kernels, which are loaded from the folder of compiled objects.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import _C

from .choice import problem_from_json
from .errors import ArgumentError
from .problem import Problem
from .tc.children import Message, serve
from .tc.schedule import Schedule
from .workload import Candidate, PassWorkload

BUILD_SECONDS = 60.0  # for what is not found in the folder of compiled objects


def settings(problem: Problem) -> dict[str, Any]:
    """What of this process the times and results of a problem depend on, beside the problem itself."""
    return {
        "objects": os.environ.get("G3DSWAP_CACHE_DIR"),
        "device": torch.cuda.current_device() if problem.device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": _C._get_cudnn_enabled(),
        "benchmark": _C._get_cudnn_benchmark(),
        "mkldnn": _C._get_mkldnn_enabled(),
    }


def adopt(values: Mapping[str, Any]) -> None:
    """Give this process the settings of another."""
    if values["objects"] is None:
        os.environ.pop("G3DSWAP_CACHE_DIR", None)
    else:
        os.environ["G3DSWAP_CACHE_DIR"] = values["objects"]
    if values["device"] is not None:
        torch.cuda.set_device(values["device"])
    torch.set_num_threads(values["threads"])
    torch.use_deterministic_algorithms(values["deterministic"], warn_only=values["warn_only"])
    _C._set_cudnn_enabled(values["cudnn"])
    _C._set_cudnn_benchmark(values["benchmark"])
    _C._set_mkldnn_enabled(values["mkldnn"])


class Trials:
    """Answers the requests of a `RemoteWorkload`."""

    def __init__(self) -> None:
        self.workload: PassWorkload | None = None
        self.built: dict[str, Candidate] = {}

    def answer(self, request: Message) -> Message:
        requests: dict[str, Callable[..., Message]] = {
            "open": self.open,
            "time": self.time,
            "check": self.check,
            "close": self.close,
        }
        return requests[request.pop("request")](**request)

    def open(self, problem: Message, batch: int, seed: int, settings: Message) -> Message:
        self.close()
        adopt(settings)
        self.workload = PassWorkload(problem_from_json(problem), batch, seed)
        return {}

    def time(self, schedule: Message | None, seconds: float, above: float | None) -> Message:
        workload = self.opened()
        return asdict(workload.time(self.candidate(workload, schedule), seconds, above))

    def check(self, schedule: Message) -> Message:
        workload = self.opened()
        return asdict(workload.check(self.candidate(workload, schedule)))

    def close(self) -> Message:
        self.workload = None
        self.built.clear()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return {}

    def opened(self) -> PassWorkload:
        if self.workload is None:
            raise ArgumentError("No problem is open; send an open request first.")
        return self.workload

    def candidate(self, workload: PassWorkload, schedule: Message | None) -> Candidate:
        """The kernel of a schedule; without one, PyTorch's."""
        if schedule is None:
            return workload.baseline
        name = json.dumps(schedule, sort_keys=True)
        if name not in self.built:
            self.built[name] = workload.build(Schedule.from_json(schedule), BUILD_SECONDS)
        return self.built[name]


def fit() -> bool:
    """Whether kernels still run here: after an illegal access, a CUDA context only repeats the error."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
            return True
        return False
    return True


def main(fd: int) -> None:
    serve(fd, Trials().answer, fit)
