"""Where an access of a scheduled nest reads or writes, at one point of the register tile.

Shared by the printers: it substitutes the unrolled loop variables, decides statically what can be
decided (terms that vanish, bounds that hold), and leaves the rest as run-time guards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ScheduleError
from .buffers import Buffer, index_over_loops, loop_counts
from .linear import Linear
from .nest import Access, Fused, Nest, digits

Env = Mapping[str, int]


@dataclass(frozen=True)
class Guard:
    """`0 <= value < extent`, with no lanes in the value."""

    value: Linear
    extent: int


@dataclass(frozen=True)
class Tail:
    """The lanes from `start` on that are inside `extent`."""

    start: Linear
    extent: int


@dataclass(frozen=True)
class Place:
    """tensor[address] in its buffer or in memory; `lanes` consecutive elements if the lanes step by one.

    exact: numerators that must divide by their number at run time.
    """

    tensor: str
    address: Linear
    lanes: bool
    guards: tuple[Guard, ...] = ()
    exact: tuple[tuple[Linear, int], ...] = ()
    tail: Tail | None = None


def resolve(value: Linear, env: Env) -> Linear:
    """Put the constants of unrolled loop variables in."""
    const = value.const + sum(c * env[s] for s, c in value.terms if s in env)
    return Linear(const, tuple((s, c) for s, c in value.terms if s not in env))


class Placer:
    """Finds places in one nest for a target with one-dimensional lanes."""

    def __init__(self, nest: Nest, buffers: Mapping[str, Buffer]) -> None:
        self.nest = nest
        self.buffers = buffers
        self.counts = loop_counts(nest)
        self.lane = next((f"v{i}" for i, p in enumerate(nest.loops) if p.bind == "lanes"), None)

    def place(self, access: Access, env: Env) -> Place | None:
        """The place of an access, or None where the term vanishes whatever the run-time loops do.

        ScheduleError: the lanes do not step by one element (or not at all) there.
        """
        exact: list[tuple[Linear, int]] = []
        values: list[Linear] = []
        if access.tensor not in self.buffers:
            self._require_unshifted(access)
        for index in access.indices:
            parts = frozenset(a for a in index.axes if self.nest.fusion_of(a) is not None)
            value = resolve(index_over_loops(self.nest, index, parts), env)
            if all(c % index.divisor == 0 for _, c in value.terms):
                if value.const % index.divisor:
                    return None
                terms = tuple((s, c // index.divisor) for s, c in value.terms)
                value = Linear(value.const // index.divisor, terms)
            else:
                if self.lane is not None and value.coefficient(self.lane):
                    raise ScheduleError(
                        f"{access} divides the lanes by {index.divisor}; split them by a phase."
                    )
                exact.append((value, index.divisor))
                value = Linear(0, ((f"(({value}) / {index.divisor})", 1),))
            values.append(value)
        # The place is worked out before it may turn out to be unneeded, so that one point of a tile
        # tells whether the access is possible at all.
        vanishes = self._vanishes(access, values)
        buffer = self.buffers.get(access.tensor)
        if buffer is not None:
            fused = next((f for a in access.axes if (f := self.nest.fusion_of(a))), None)
            flat = resolve(digits(self.nest, fused.name), env) if fused else Linear()
            address = buffer.address(tuple(values), flat, lambda linear: resolve(linear, env))
            place = self._finish(access, address, (), tuple(exact), None)
        else:
            place = self._in_memory(access, values, tuple(exact), env)
        return None if vanishes else place

    def _require_unshifted(self, access: Access) -> None:
        for index in access.indices:
            for axis in index.axes:
                if self.nest.fusion_of(axis) and not index.is_axis(axis):
                    raise ScheduleError(f"{access} shifts the flattened axis {axis}; stage {access.tensor}.")

    def _vanishes(self, access: Access, values: list[Linear]) -> bool:
        for index, value, extent in zip(access.indices, values, self.nest.tensor(access.tensor).shape):
            if extent is None or any(self.nest.fusion_of(a) for a in index.axes):
                continue
            if any(s not in self.counts for s, _ in value.terms):
                continue
            low, high = value.bounds(self.counts)
            if high < 0 or low >= extent:
                return True
        return False

    def _in_memory(
        self, access: Access, values: list[Linear], exact: tuple[tuple[Linear, int], ...], env: Env
    ) -> Place:
        tensor = self.nest.tensor(access.tensor)
        guards: list[Guard] = []
        tail: Tail | None = None
        address = Linear()
        fused_seen: dict[Fused, dict[str, int]] = {}
        for index, value, extent, stride in zip(access.indices, values, tensor.shape, tensor.strides):
            parts = [a for a in index.axes if self.nest.fusion_of(a) is not None]
            if parts:
                fused = self.nest.fusion_of(parts[0])
                assert fused is not None
                fused_seen.setdefault(fused, {})[parts[0]] = stride
                continue
            address = address + value * stride
            if extent is None:
                continue
            runtime = any(s not in self.counts for s, _ in value.terms)
            low, high = (-1, extent) if runtime else value.bounds(self.counts)
            if low >= 0 and high < extent:
                continue
            if self.lane is None or not value.coefficient(self.lane):
                guards.append(Guard(value, extent))
            elif low >= 0 and value.coefficient(self.lane) == 1:
                tail = Tail(value.without(self.lane), extent)
            else:
                raise ScheduleError(f"{access} leaves the tensor along the lanes; stage {access.tensor}.")
        for fused, strides in fused_seen.items():
            flat = resolve(digits(self.nest, fused.name), env)
            address = address + flat * self._flat_stride(access, fused, strides)
            if flat.bounds(self.counts)[1] >= fused.extent:
                if self.lane is not None and flat.coefficient(self.lane):
                    tail = Tail(flat.without(self.lane), fused.extent)
                else:
                    guards.append(Guard(flat, fused.extent))
        return self._finish(access, address, tuple(guards), exact, tail)

    def _flat_stride(self, access: Access, fused: Fused, strides: Mapping[str, int]) -> int:
        """The stride of a flattened axis in memory, where its parts lie as if they were one axis."""
        own = tuple(self.nest.axis(p).extent for p in fused.parts)
        last = strides.get(fused.parts[-1], 0)
        for part in fused.parts:
            expected = last * fused.weight(part)
            if strides.get(part) != expected and self.nest.axis(part).extent != 1:
                raise ScheduleError(f"{access} does not lie along {fused.name}; stage {access.tensor}.")
        if own[1:] != fused.extents[1:]:
            raise ScheduleError(f"{access} has no padded rows as {fused.name} has; stage {access.tensor}.")
        return last

    def _finish(
        self,
        access: Access,
        address: Linear,
        guards: tuple[Guard, ...],
        exact: tuple[tuple[Linear, int], ...],
        tail: Tail | None,
    ) -> Place:
        step = address.coefficient(self.lane) if self.lane is not None else 0
        if step not in (0, 1):
            raise ScheduleError(
                f"the lanes step by {step} elements in {access}; stage it or use another axis."
            )
        if self.lane is not None:
            address = address.without(self.lane)
        return Place(access.tensor, address, step == 1, guards, exact, tail if step == 1 else None)
