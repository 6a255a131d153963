"""Prints a scheduled nest as CUDA C++, with its image in shared memory: a matrix product, or sums of lanes.

Triton gives a program no addresses in shared memory, so that a tile which is read at many shifts is loaded,
and laid out for the matrix unit, once for each of them.  Here a program copies what it reads of the image
once, and every shift is a constant in the address of a fragment, or of an element.
"""

from __future__ import annotations

from ..errors import ScheduleError
from .depth_cuda import DepthProgram
from .lanes_cuda import LanesProgram
from .nest import SIDE_BINDS, Nest
from .pointwise_cuda import pointwise_cuda
from .prelude_cuda import MEMORY, prelude_cuda
from .program_cuda import COLS, MOST_CLUSTER, MOST_SHARED, Program, Settings
from .roles import image_and_other, possible
from .rows_cuda import RowsProgram
from .schedule import Schedule

SHARED = "// bytes of shared memory: "


def is_cuda(schedule: Schedule) -> bool:
    """Whether a GPU's kernel is printed as CUDA C++: Triton has no stages."""
    return bool(schedule.stage)


def shared_bytes(source: str) -> int:
    """How much shared memory a printed kernel is to be launched with."""
    return int(source.split(SHARED, 1)[1].split("\n", 1)[0])


def print_cuda(nest: Nest, settings: Settings) -> str:
    """The source text of one function, ``kernel(operands..., out, batch)``.

    It is to be launched on one program for each step of the grid loops, in one dimension.

    ScheduleError: the schedule has no meaning for this target (a product of other types, no image in shared
    memory, sides that are no multiple of a fragment's, fragments that are not consecutive, more lanes than
    threads, ...).
    """
    program = _program(nest, settings)
    program.place_in_grid()
    program.write()
    if program.shared > MOST_SHARED:
        raise ScheduleError(f"{program.shared} bytes of shared memory, of {MOST_SHARED}; use fewer rows.")
    kinds = {tensor.name: program.kind for tensor in nest.tensors}
    result = nest.output.tensor
    if nest.partial_counts:
        kinds[result] = "float"
    cluster = f"__cluster_dims__({nest.cluster}, 1, 1) " if nest.cluster > 1 else ""
    parameters = [f"const {kinds[name]}* __restrict__ {name}" for name in nest.operands]
    parameters += [f"{kinds[result]}* __restrict__ {result}", "int batch"]
    return "\n".join(
        [
            *(f"// {line}" for line in str(nest).splitlines()),
            f"{SHARED}{program.shared}",
            prelude_cuda(nest.tensors[0].dtype),
            pointwise_cuda(nest),
            f'extern "C" __global__ void {cluster}__launch_bounds__({program.threads})',
            f"kernel({', '.join(parameters)}) {{",
            f"  {MEMORY}",
            *(["  let_others_begin();"] if nest.partial_counts else []),
            "  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;",
            *program.lines,
            "}",
            "",
        ]
    )


def _program(nest: Nest, settings: Settings) -> Program:
    """What a program of this nest is: of lanes, or of a product whose rows or whose depth are positions."""
    binds = {p.bind for p in nest.loops}
    if nest.cluster > MOST_CLUSTER:
        raise ScheduleError(
            f"a cluster of {nest.cluster} programs is larger than {MOST_CLUSTER}; split less."
        )
    if "lanes" in binds and binds.isdisjoint((*SIDE_BINDS, "warps")):
        kind: type[Program] = LanesProgram
    else:
        _check(nest, settings.warps)
        kind = DepthProgram if _sums_positions(nest) else RowsProgram
    if nest.cluster > 1 and kind is not DepthProgram:
        raise ScheduleError("only programs that sum positions are a cluster; split sums over the grid.")
    return kind(nest, settings)


def _sums_positions(nest: Nest) -> bool:
    """Whether the depth runs along the image's positions: the other factor has the batch, as no kernel."""
    _, other = image_and_other(nest)
    return any(nest.axis(name).extent is None for name in other.axes)


def _check(nest: Nest, warps: int) -> None:
    """The rules of a product."""
    dtype, lengths = nest.tensors[0].dtype, nest.lengths
    sides = [p.bind for p in nest.loops if p.bind in SIDE_BINDS]
    if sorted(sides) != sorted(SIDE_BINDS) or any(p.bind == "lanes" for p in nest.loops):
        raise ScheduleError(
            f"a product in shared memory has one loop each of rows, cols and depth, not {sides}."
        )
    if not possible(nest):
        raise ScheduleError(
            f"fragments are of two factors of a half type, or TF32, not {len(nest.factors)} of {dtype}."
        )
    if lengths["cols"] % COLS:
        raise ScheduleError(f"{lengths['cols']} cols are no multiple of {COLS}.")
    apart = [p for p in nest.loops if p.bind == "warps"]
    if apart and dtype == "float32":
        raise ScheduleError(f"warps have steps of {apart[0].axis} only where factors are of a half type.")
    if apart and ([p.count for p in apart] != [warps] or nest.is_reduce(apart[0].axis)):
        steps = " x ".join(str(p.count) for p in apart)
        raise ScheduleError(f"{steps} steps of {apart[0].axis} are not one for each of {warps} warps.")
    staged = {stage.tensor for stage in nest.stages}
    image, other = image_and_other(nest)
    wanted = {image.tensor, *([other.tensor] if _sums_positions(nest) else [])}
    if staged != wanted:
        raise ScheduleError(f"a product in shared memory stages {sorted(wanted)}, not {sorted(staged)}.")
