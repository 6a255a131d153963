"""Prints the copies of a stage as C++: a tensor's footprint to its buffer, and a result back.

Rows that lie outside the tensor are filled with zeros on the way in and left out on the way back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .buffers import Buffer, Flat, Source
from .nest import Nest
from .place import Env, resolve

MEMORY_TYPES = {"float32": "float", "float64": "double", "bfloat16": "bf16", "float16": "half"}


class CopyPrinter:
    """Collects the lines of a kernel and prints copies; the loops around them are a subclass's.

    The C++ variables `buf` and `mem` point into the buffer and the tensor; every scope moves its own.
    """

    def __init__(self, nest: Nest) -> None:
        self.nest = nest
        self.dtype = nest.tensors[0].dtype
        self.compute = "double" if self.dtype == "float64" else "float"
        self.lines: list[str] = []
        self.depth = 1
        self.names = 0

    def emit(self, line: str) -> None:
        self.lines.append("  " * self.depth + line)

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        self.emit(f"{head} {{")
        self.depth += 1
        yield
        self.depth -= 1
        self.emit("}")

    def fresh(self, prefix: str) -> str:
        self.names += 1
        return f"{prefix}{self.names}"

    def copy(self, buffer: Buffer, env: Env, out: bool) -> None:
        """Fill a buffer with the tensor's footprint, zero where the tensor ends; or write it back."""
        phases = [self.fresh("p") for _ in buffer.split]
        with self.block(""):
            for name, source in zip(phases, buffer.split):
                self.emit(f"for (int64_t {name} = 0; {name} < {source.phases}; ++{name})")
            with self.block(""):
                offset = "0"
                for name, source in zip(phases, buffer.split):
                    offset = f"({offset}) * {source.phases} + {name}"
                self.emit(f"{self.compute}* buf = {buffer.tensor.name}_buffer + ({offset}) * {buffer.block};")
                by_dim = {source.dim: name for name, source in zip(phases, buffer.split)}
                memory = self.compute if out and self.nest.partial_loops else MEMORY_TYPES[self.dtype]
                shift = " + shift" if out and self.nest.partial_loops else ""
                self.emit(f"{'' if out else 'const '}{memory}* mem = {buffer.tensor.name}{shift};")
                self.copy_rows(buffer, 0, by_dim, env, out)

    def copy_rows(self, buffer: Buffer, r: int, phase: dict[int, str], env: Env, out: bool) -> None:
        row = buffer.rows[r]
        last = r == len(buffer.rows) - 1
        stride = buffer.strides[r]
        if isinstance(row, Flat):
            self.copy_flat(buffer, row, phase, env, out)
            return
        source = row.source
        extent = buffer.tensor.shape[source.dim]
        memory_stride = buffer.tensor.strides[source.dim]
        first = self.first(source, phase, env)
        if last:
            self.copy_run(first, source.phases, extent, memory_stride, str(row.extent), out)
            return
        j = self.fresh("j")
        with self.block(f"for (int64_t {j} = 0; {j} < {row.extent}; ++{j})"):
            index = self.fresh("x")
            self.emit(f"const int64_t {index} = {first} + {j} * {source.phases};")
            inside = "true" if extent is None else f"(uint64_t){index} < {extent}u"
            with self.block(f"if ({inside})"), self.moved(f"{j} * {stride}", f"{index} * {memory_stride}"):
                self.copy_rows(buffer, r + 1, phase, env, out)
            if not out:
                self.emit(f"else fill_zero(buf + {j} * {stride}, {stride});")

    @contextmanager
    def moved(self, place: str, step: str) -> Iterator[None]:
        """A scope in which `buf` and `mem` point further on."""
        b, m = self.fresh("b"), self.fresh("m")
        self.emit(f"auto* {b} = buf + {place}; auto* {m} = mem + {step};")
        with self.block(""):
            self.emit(f"auto* buf = {b}; auto* mem = {m};")
            yield

    def copy_run(
        self, first: str, phases: int, extent: int | None, stride: int, count: str, out: bool
    ) -> None:
        """The innermost dimension: elements `first + j * phases` of the tensor, j < count."""
        limit = "batch" if extent is None else str(extent)
        call = "write_run" if out else "read_run"
        self.emit(f"{call}<{stride}, {phases}>(buf, mem, {first}, {limit}, {count});")

    def copy_flat(self, buffer: Buffer, row: Flat, phase: dict[int, str], env: Env, out: bool) -> None:
        """Runs of the last part between two carries of the flat index."""
        extents = row.fused.extents
        pitch = extents[-1]
        flat, run = self.fresh("x"), self.fresh("n")
        self.emit(f"const int64_t {flat}_end = ({resolve(row.base, env)}) + {row.extent};")
        with self.block(
            f"for (int64_t {flat} = {resolve(row.base, env)}, {run}; {flat} < {flat}_end; {flat} += {run})"
        ):
            column = f"{flat} % {pitch}" if len(extents) > 1 else flat
            self.emit(f"const int64_t {flat}_c = {column};")
            rest = f"{pitch} - {flat}_c" if len(extents) > 1 else f"{flat}_end - {flat}"
            self.emit(f"{run} = {rest} < {flat}_end - {flat} ? {rest} : {flat}_end - {flat};")
            inside, step = ["true"], ["0"]
            for position, source in enumerate(row.parts[:-1]):
                if source is None:
                    continue
                value = f"{flat} / {row.fused.weight(row.fused.parts[position])}"
                if position:
                    value = f"({value}) % {extents[position]}"
                index = self.fresh("x")
                self.emit(
                    f"const int64_t {index} = {self.first(source, phase, env)} + ({value}) * {source.phases};"
                )
                inside.append(f"(uint64_t){index} < {buffer.tensor.shape[source.dim]}u")
                step.append(f"{index} * {buffer.tensor.strides[source.dim]}")
            place = f"({flat} - ({resolve(row.base, env)}))"
            with self.block(f"if ({' && '.join(inside)})"), self.moved(place, " + ".join(step)):
                self.flat_run(buffer, row, f"{flat}_c", run, phase, env, out)
            if not out:
                self.emit(f"else fill_zero(buf + {place}, {run});")

    def first(self, source: Source, phase: dict[int, str], env: Env) -> str:
        return f"({resolve(source.base, env)}){' + ' + phase[source.dim] if source.dim in phase else ''}"

    def flat_run(
        self, buffer: Buffer, row: Flat, column: str, run: str, phase: dict[int, str], env: Env, out: bool
    ) -> None:
        source = row.parts[-1]
        if source is None:
            # The tensor is not indexed by the last part: its one element serves the whole run.
            self.emit(f"for (int64_t j = 0; j < {run}; ++j) buf[j] = widen(mem[0]);")
            return
        extent, stride = buffer.tensor.shape[source.dim], buffer.tensor.strides[source.dim]
        first = f"{self.first(source, phase, env)} + {column} * {source.phases}"
        self.copy_run(first, source.phases, extent, stride, run, out)
