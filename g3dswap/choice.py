"""What runs a pass and why (`Choice`), and what the options cache keeps about one (`Record`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import ArgumentError, PlanError, ScheduleError
from .problem import ACTIVATIONS, DTYPES, Geometry, Problem, dtype_name
from .tc.schedule import Schedule
from .tc.trial import Result
from .workload import Candidate

SOURCES = ("tuned", "cached", "shipped", "default", "nearest", "native")
EFFORTS = ("quick", "full")


@dataclass(frozen=True)
class Choice:
    """What runs one pass of one problem.

    source:  where the decision comes from; "native" is PyTorch's own kernel.
    reason:  why, in words.
    seconds, native_seconds: measured side by side; None where nothing was measured.
    error, bound: against float64 when it was tuned or checked, and what was allowed.
    schedule: the kernel's, as JSON; None for "native".
    """

    problem: Problem
    source: str
    reason: str
    seconds: float | None = None
    native_seconds: float | None = None
    error: float | None = None
    bound: float | None = None
    schedule: dict[str, Any] | None = field(default=None, hash=False)
    candidate: Candidate | None = field(default=None, repr=False, compare=False)

    @property
    def is_native(self) -> bool:
        """PyTorch's own kernel runs this pass."""
        return self.schedule is None

    @property
    def speedup(self) -> float | None:
        """PyTorch's time over this one's: 1 for "native", None where one of them was not measured."""
        if self.is_native:
            return 1.0
        return self.native_seconds / self.seconds if self.seconds and self.native_seconds else None

    def run(self, *tensors: Tensor | None) -> Tensor:
        """The pass; operands as for `native.run`, in the problem's layout; the result is newly allocated."""
        if self.candidate is None:
            raise ArgumentError(f"The choice for {self.problem} was read from a file; install it to run it.")
        return self.candidate(*tensors)

    def to_json(self) -> dict[str, Any]:
        """Everything but the compiled kernel, as JSON."""
        return {
            "problem": problem_to_json(self.problem),
            "source": self.source,
            "reason": self.reason,
            "seconds": self.seconds,
            "native_seconds": self.native_seconds,
            "error": self.error,
            "bound": self.bound,
            "schedule": self.schedule,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Choice:
        """The inverse of `to_json`; a kernel must be built before it can run. PlanError for anything else."""
        try:
            schedule = data["schedule"]
            choice = cls(
                problem_from_json(data["problem"]),
                _one_of(data["source"], SOURCES),
                str(data["reason"]),
                seconds=_number(data["seconds"]),
                native_seconds=_number(data["native_seconds"]),
                error=_number(data["error"]),
                bound=_number(data["bound"]),
                schedule=None if schedule is None else Schedule.from_json(schedule).to_json(),
            )
            if choice.is_native != (choice.source == "native"):
                raise ValueError(f"source {choice.source!r} with schedule {schedule!r}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(
                f"no choice can be read from {str(data)[:80]!r} ({error}); tune again."
            ) from error
        return choice


def problem_to_json(problem: Problem) -> dict[str, Any]:
    """A problem as a JSON object, without facts about the machine."""
    geometry = problem.geometry
    return {
        "direction": problem.direction,
        "geometry": {name: _plain(getattr(geometry, name)) for name in Geometry.__dataclass_fields__},
        "dtype": dtype_name(problem.dtype),
        "layout": problem.layout,
        "device": problem.device,
        "bias": problem.bias,
        "precision": problem.precision,
        "deterministic": problem.deterministic,
        "transposed": problem.transposed,
        # Only where there is one: other plans and requests stay as they were.
        **({"activation": problem.activation} if problem.activation else {}),
    }


def problem_from_json(data: Mapping[str, Any]) -> Problem:
    """The inverse of `problem_to_json`; KeyError, TypeError or ValueError for anything else."""
    fields = dict(data)
    geometry: dict[str, Any] = {
        name: tuple(map(_integer, value)) if isinstance(value, list) else _integer(value)
        for name, value in fields.pop("geometry").items()
    }
    dtypes: dict[str, torch.dtype] = {dtype_name(dtype): dtype for dtype in DTYPES}
    dtype = dtypes[_one_of(fields.pop("dtype"), tuple(dtypes))]
    _one_of(fields["device"], ("cpu", "cuda"))
    _one_of(fields.get("activation", ""), ("", *ACTIVATIONS))
    for flag in ("bias", "deterministic", "transposed"):
        if not isinstance(fields[flag], bool):
            raise ValueError(f"{flag} is {fields[flag]!r}")
    return Problem(geometry=Geometry(**geometry), dtype=dtype, **fields)


@dataclass(frozen=True)
class Record:
    """What the options cache keeps of one tuned problem.

    `schedule` is the fastest checked one, even where PyTorch was faster: what counts as a win is decided
    when the record is used. `seconds`, `error` and `bound` belong to it; None where nothing worked.
    """

    batch: int
    effort: str
    interrupted: bool
    schedule: dict[str, Any] | None
    seconds: float | None
    native_seconds: float
    error: float | None
    bound: float | None
    elapsed: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    trials: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, result: Result[Schedule, Candidate], batch: int, effort: str) -> Record:
        """The record of a finished or interrupted search."""
        best = result.best
        check = best.check if best else None
        return cls(
            batch=batch,
            effort=effort,
            interrupted=result.interrupted,
            schedule=best.schedule.to_json() if best else None,
            seconds=result.seconds,
            native_seconds=result.baseline.seconds,
            error=check.error if check else None,
            bound=check.bound if check else None,
            elapsed=round(result.elapsed, 3),
            counts=result.counts,
            trials=[
                {
                    "category": t.category,
                    "seconds": t.seconds,
                    "schedule": str(t.schedule),
                    "detail": t.detail,
                }
                for t in result.trials
            ],
        )

    @property
    def speedup(self) -> float:
        """PyTorch's time over the best schedule's; 0 where none worked."""
        return self.native_seconds / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """The value of a cache entry."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """The inverse of `to_json`; ValueError where the file says something else."""
        try:
            record = cls(**{name: data[name] for name in cls.__dataclass_fields__})
            for value in (record.seconds, record.native_seconds, record.error, record.bound):
                _number(value)
            if not record.native_seconds:
                raise ValueError("it has no time of PyTorch's kernel")
            _integer(record.batch)
            _one_of(record.effort, EFFORTS)
            if record.schedule is not None:
                Schedule.from_json(record.schedule)
                if not record.seconds:
                    raise ValueError("a schedule without a time")
        except (KeyError, TypeError, ScheduleError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        return record


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is no integer")
    return value


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _one_of(value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"{value!r} is none of {', '.join(known)}")
    return str(value)
