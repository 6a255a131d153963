"""The matrix products worth trying for a nest in CUDA C++, whose image is read in shared memory.

There every shift is a constant in an address, so that a product may be skewed along two axes, its rows be any
number of whole lines, and a fragment of few channels be the patch of a block of positions.  Positions are the
rows, or the depth in a gradient in the kernel; the sides of the kernel and windows of planes are unrolled.
Where neighbours in memory are single channels of other groups, each warp of a program has a group; where
they are the few channels of a group, it may have one.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from ..errors import ScheduleError
from .box import WIDEST
from .nest import ENOUGH, Access, Nest
from .product import Packs, Product, Side, Skews, batch_axis, by_tile, clusters, named, splits
from .program_cuda import COLS, MOST_ACCUMULATORS, ROWS, deep_of
from .roles import Roles, added, batches, by_step, image_and_other, nearest, possible, roles_of, sides
from .schedule import apply, fused_name, rewritten
from .skew import Skew, patch_name, shifted_by
from .source import source
from .space_cpp import phases, reduces
from .space_triton import BATCH, Split, Tile, of_reductions, steps_outside
from .words import ITEM_BYTES

FORMS = 6
"""Ways to pack and skew that are compared."""
TRIED = 3
"""Products of a form that are printed to see whether any can be."""
BLOCKS = (1, 2, 4, 8, 16)
WORDS = (8, 4, 2, 1)
MOST_COLS, MOST_DEPTH = 32, 128
MULTIPLIED, COPIED = 1.8, 15 / 4 / 32
"""Cycles of a multiprocessor for a product of fragments, and for a thread's copy of one word."""
LINES = (1, 2, 4, 8, 16, 32)
"""Lines of a program, beside those numbers that divide all of them."""
PLACES = 24, 784
"""Positions of a program, at least and at most."""
APART = 1.6
"""How many times as many positions the next choice has, where not all are compared."""
WINDOWS = (1, 2, 4, 8)
STRIPS = (2, 4)
"""Positions of a block, where the depth runs along blocks of them."""
WALKS = (2, 3, 4, 6, 8)
"""Steps of a walk: parts of the image that a program copies, each while it multiplies the one before."""
MOST_WARPS, FEW_WARPS = 8, (8, 4, 2)
"""Warps that share positions: at most, and at most where not all numbers of them are compared."""
TEAMS = (2, 4, 8)
"""Teams of warps, where there is a loop whose steps they can have."""
GROUPS = (2, 4, 8, 16)
WASTED = 1.2
"""Groups of a program, one for each warp, and how many times as many as there are they may be; and steps of
walks."""
PROGRAMS = 150, 400, 1200, 1
"""How many programs a split reduction is to give, at least: each writes all of its sums. The first stands for
all where tiles are compared."""
PRODUCTS = 1024
"""Products of the unrolled code of a warp."""

Form = tuple[Packs, Skews]


def families(
    nest: Nest, batch: int = BATCH
) -> Iterator[tuple[list[Product], Callable[[Container[Tile]], Iterator[Product]]]]:
    """For each way to pack and skew: every tile once, and all products of some tiles."""
    if not possible(nest):
        return
    for form in forms(nest):
        yield by_tile(products(nest, form, batch, thorough=False))


def forms(nest: Nest) -> list[Form]:
    """What may be packed and skewed so that sides are whole fragments; those that multiply and copy least."""
    roles = roles_of(nest)
    channels, filters = (steps_in(nest, axes) for axes in (roles.channels, roles.other))
    found: list[Form] = []
    deepest = deep_of(nest)
    if _is_single(nest) and channels == 1:
        return found  # sums of few products take vector units, which do not round factors
    if channels % deepest == 0 and filters % COLS == 0:
        found.append(((), ()))
    for axis in batches(nest):
        for count in BLOCKS[1:]:
            deep, wide = count * channels, count * filters
            whole = deep % deepest == 0 and wide % COLS == 0 and (nest.extent(axis) or 1) % count == 0
            if whole and deep <= 2 * deepest and wide <= MOST_COLS:
                found.append((((axis, count),), ()))
    if channels < deepest:
        found += [((), skews) for skews in _skewings(nest, roles, channels, filters)]
    ranked = sorted((rank, form) for form in found if (rank := _rank(nest, form)) < math.inf)
    printed = (form for _, form in ranked if _prints(nest, form))
    return list(itertools.islice(printed, FORMS))


def _prints(nest: Nest, form: Form) -> bool:
    """Whether fragments of a form lie together: those of a small product do if those of any do."""
    for product in sorted(
        products(nest, form, BATCH, thorough=False), key=lambda p: math.prod(n for _, n in p.sides.values())
    )[:TRIED]:
        schedule = product.schedule(nest)
        try:
            source(apply(nest, schedule), schedule, "triton")
        except ScheduleError:
            continue
        return True
    return False


def steps_in(nest: Nest, axes: Sequence[str]) -> int:
    return math.prod(nest.extent(axis) or 1 for axis in axes)


def _skewings(nest: Nest, roles: Roles, channels: int, filters: int) -> Iterator[Skews]:
    """Blocks of the last one or two positions; of equally deep patches, those that begin at wide words."""
    shifted = ((axis, shifted_by(nest, axis)) for axis in roles.positions)
    axes = [axis for axis, found in shifted if found is not None and (nest.extent(found[1]) or 1) > 1]
    for own in (axes[-1:], axes[-2:])[: len(axes)]:
        for counts in itertools.product(BLOCKS, repeat=len(own)):
            wide = filters * math.prod(counts)
            if wide > MOST_COLS or wide % COLS or (len(own) > 1 and min(counts) == 1):
                continue
            depths = set()
            for word in WORDS:
                skews = tuple(Skew(a, c, word if a == own[-1] else 1) for a, c in zip(own, counts))
                try:
                    whole = rewritten(nest, (), skews)
                except ScheduleError:
                    continue
                deep = channels * steps_in(whole, [patch_name(axis) for axis in own])
                # A single patch may be read past its end.
                fits = deep % deep_of(nest) == 0 or (len(own) == 1 and channels == 1)
                if deep <= MOST_DEPTH and fits and deep not in depths:
                    depths.add(deep)
                    yield skews


def _rank(nest: Nest, form: Form) -> float:
    """Cycles for a result, about; infinite where nothing that is read lies together."""
    try:
        whole = rewritten(nest, *form)
    except ScheduleError:
        return math.inf
    roles = roles_of(whole)
    near, positions = nearest(whole), {*roles.positions}
    together = near & {*positions, *roles.channels} or _apart(whole)
    if not all((roles.image, roles.other, roles.depth, together)):
        return math.inf
    deep, taps = steps_in(whole, roles.channels), steps_in(whole, sides(whole))
    # Of channels that lie together, a program reads those of several groups.
    words = max((skew.word for skew in form[1]), default=1) if near & positions else deep
    width = min(WIDEST // ITEM_BYTES[nest.tensors[0].dtype], words)
    copied = COPIED / width * steps_in(nest, roles_of(nest).channels) / steps_in(nest, roles_of(nest).other)
    return taps * -(-deep // deep_of(nest)) / (ROWS * COLS) * MULTIPLIED + copied


@functools.lru_cache(maxsize=64)
def products(nest: Nest, form: Form, batch: int, thorough: bool = True) -> list[Product]:
    """The products of a nest that is packed and skewed in one way: all, or some of each tile."""
    whole = rewritten(nest, *form)
    roles = roles_of(whole)
    if not all((roles.image, roles.other, roles.depth)):
        return []
    return list(_products(whole, batch, roles, form, thorough))


def _products(nest: Nest, batch: int, roles: Roles, form: Form, thorough: bool) -> Iterator[Product]:
    image, other = image_and_other(nest)
    high, wide = steps_in(nest, roles.channels), steps_in(nest, roles.other)
    whole = deep_of(nest) if roles.along else ROWS
    channels = by_steps(nest, image, roles.channels), -(-high // whole) * whole
    # Results that lie together are pairs of columns; or what is turned around is read together.
    others = by_steps(nest, nest.output if roles.along else other, roles.other), wide
    heights, shares = [channels], [others]
    if roles.along or not form[1]:  # replicas of a skewed axis are added up in one program
        shares = _shares(others, COLS)
        heights = [channels] if roles.along else _shares(channels, ROWS)
    taps = tuple((a, nest.extent(a) or 1) for a in sides(nest) if (nest.extent(a) or 1) > 1)
    unrolled = [taps] if roles.along else [taps[start:] for start in range(min(3, len(taps) + 1))]
    workers = _workers(nest, form)
    turned = not nearest(nest).isdisjoint(roles.positions)  # channels have to be gathered
    for place, outside, block in _places(nest, roles, thorough):
        blocks = tuple((a, p) for a, p in phases(nest).items() if a in place[0]) + block
        sharing = sharing_of(-(-place[1] // ROWS), thorough)
        choices = itertools.product(unrolled, windows_of(nest, outside), heights, shares, workers)
        for own, window, height, share, (group, apart) in choices:
            rows, depth = (place, height) if roles.along else (height, place)
            tile = (*own, *window, *group, *blocks)
            if not _is_shared(nest, block, own) or not is_small(nest, tile, rows, share, depth, roles.along):
                continue
            three = rows, share, depth
            steps = _steps_outside(nest, batch, three, (*tile, *apart)) if roles.along or turned else {}
            if roles.along:
                found = [(split, False) for split in _walks(nest, steps, place, outside, thorough)]
            else:
                found = divisions(nest, three, (*tile, *apart), batch, thorough)
            copies = (False, True) if turned and _are_all_inside(steps, three, roles.positions) else (False,)
            for split, clustered in found:
                made = Product(*three, *form, tile, split, 1, 1, 0, staged=True, apart=apart)
                looped = not roles.along and made.loops(nest, batch)
                buffers = (1, 2) if looped else (1,)
                numbers = [(count, 1) for _, count in apart] or teams_of(sharing, looped, thorough)
                for (warps, teams), stages, lies in itertools.product(numbers, buffers, copies):
                    yield replace(
                        made, warps=warps, stages=stages, teams=teams, whole=lies, clustered=clustered
                    )


def divisions(
    nest: Nest, own: tuple[Side, ...], tile: Tile, batch: int, thorough: bool
) -> list[tuple[Split, bool]]:
    """Ways to split a reduction, each with whether those programs are a cluster."""
    found = [(split, False) for split in splits(nest, own, tile, batch, PROGRAMS, blocks=True)]
    return found + [(split, True) for split in clusters(nest, own, tile, batch, *(() if thorough else (1,)))]


def _shares(side: Side, unit: int) -> list[Side]:
    """All of a side, or what each of several programs has of it: whole fragments of one axis."""
    axes, count = side
    divided = [n for n in (2, 4) if len(axes) == 1 and count % (n * unit) == 0]
    return [(axes, count // n) for n in (1, *divided)]


def _are_all_inside(steps: Mapping[str, int], sides: Sequence[Side], axes: Iterable[str]) -> bool:
    """Whether a program with these sides has all of some axes, of which there are so many steps outside."""
    named = {axis: fused_name(own) for own, _ in sides for axis in own}
    return all(steps[named.get(axis, axis)] == 1 for axis in axes)


def _steps_outside(nest: Nest, batch: int, sides: Sequence[Side], tile: Tile) -> dict[str, int]:
    """How many steps each axis, flattened or not, has outside of a program with these sides and a tile."""
    parts = {a for axes, _ in sides for a in axes}
    inside = phases(nest)
    inside |= {axis: inside.get(axis, 1) * count for axis, count in tile if axis not in parts}
    return steps_outside(nest, named(sides), inside, batch)


def _workers(nest: Nest, form: Form) -> list[tuple[Tile, Tile]]:
    """Groups of a program: one after another, or each with a warp of its own."""
    apart: list[tuple[Tile, Tile]] = [((), (step,)) for step in _apart(nest)]
    if apart and nearest(nest) <= {*batches(nest)}:
        return apart
    return apart + [(group, ()) for group in _groups(nest, form)]


def sharing_of(tiles: int, thorough: bool) -> list[int]:
    """Numbers of warps that share so many tiles, where fewer would take longer: all, or a few; most first."""
    found = {-(-tiles // rounds) for rounds in range(1, tiles + 1)}
    most = range(MOST_WARPS, 0, -1) if thorough else FEW_WARPS
    return list(dict.fromkeys(max(n for n in found if n <= limit) for limit in most))


def teams_of(sharing: Sequence[int], looped: bool, thorough: bool) -> list[tuple[int, int]]:
    """Warps and teams of them: one of so many warps, or several, each of which has steps of the loop."""
    found = [(warps, 1) for warps in sharing]
    for warps in sharing if looped else ():
        more = [teams for teams in TEAMS if warps * teams <= MOST_WARPS]
        found += [(warps * teams, teams) for teams in (more if thorough else more[-1:])]
    return found


def by_steps(nest: Nest, access: Access, axes: Sequence[str]) -> tuple[str, ...]:
    """Axes of more than one step, those last that are the nearest in memory."""
    found = by_step(nest, access, (a for a in axes if (nest.extent(a) or 1) > 1))
    return tuple(found) or tuple(axes[-1:])


def _places(nest: Nest, roles: Roles, thorough: bool) -> Iterator[tuple[Side, str | None, Tile]]:
    """Whole lines of the last one, two or three positions, the position outside that has windows, and the
    block of positions that each step of the depth has."""
    shifted, split = added(image_and_other(nest)[0]), phases(nest)
    long = [a for a in roles.positions if (nest.extent(a) or 1) > 1] or list(roles.positions[-1:])
    for start in range(len(long)):
        axes = tuple(long[start:])
        outside = next((a for a in reversed(long[:start]) if a in shifted), None)
        for block in [()] if roles.along else _blocks(nest, axes):
            parts = {**split, **dict(block)}
            first, *inner = (-(-(nest.extent(a) or 1) // parts.get(a, 1)) for a in axes)
            last = 0
            for lines in range(1, first + 1):
                count = lines * math.prod(inner)
                small = count < PLACES[0] and lines < first
                near = not thorough and count < APART * last
                if (first % lines == 0 or lines in LINES) and not small and not near and count <= PLACES[1]:
                    last = count
                    yield (axes, count), outside, block


def _blocks(nest: Nest, axes: Sequence[str]) -> list[Tile]:
    """Of a depth along these axes: none, or blocks of one that is read at shifted positions."""
    shifted = added(image_and_other(nest)[0])
    found: list[Tile] = [()]
    for axis in axes:
        if axis in shifted:
            found += [((axis, count),) for count in STRIPS if 2 * count <= (nest.extent(axis) or 1)]
    return found


def _is_shared(nest: Nest, block: Tile, taps: Tile) -> bool:
    """Whether what a block reads is shared by unrolled taps."""
    found = (shifted_by(nest, axis) for axis, _ in block)
    return all(own is not None and own[1] in dict(taps) for own in found)


def windows_of(nest: Nest, axis: str | None) -> list[Tile]:
    """One step of a position, or a few, which are unrolled."""
    if axis is None:
        return [()]
    steps = -(-(nest.extent(axis) or 1) // phases(nest).get(axis, 1))
    return [((axis, count),) if count > 1 else () for count in WINDOWS if count < 2 * steps]


def _walks(
    nest: Nest, steps: Mapping[str, int], place: Side, outside: str | None, thorough: bool
) -> list[Split]:
    """No walk, and walks of steps that leave little over: along the positions outside of a program's, and
    along the batch where that leaves programs enough; there only if there are no others, or for a thorough
    look."""
    found: list[Split] = [()]
    programs = math.prod(count for axis, count in steps.items() if not reduces(nest, axis))

    def add(axis: str, most: int) -> None:
        extent = steps[axis]
        fitting = [n for n in WALKS if n <= min(most, extent) and -(-extent // n) * n <= WASTED * extent]
        found.extend(((axis, n),) for n in (fitting if thorough else fitting[-1:]))

    for axis in filter(None, (outside, fused_name(place[0]))):
        add(axis, steps[axis])
    if thorough or len(found) == 1:
        images = batch_axis(nest)
        if images:
            add(images, programs // ENOUGH)
    return found


def _groups(nest: Nest, form: Form) -> list[Tile]:
    """Steps of the batch axis, where its few channels lie together with those of the next."""
    found: list[Tile] = [()]
    if form[0] or not roles_of(nest).along:
        return found
    image, _ = image_and_other(nest)
    together = steps_in(nest, [*nearest(nest)]) * ITEM_BYTES[nest.tensor(image.tensor).dtype]
    for axis in _following(nest):
        whole = (count for count in (2, 4) if (nest.extent(axis) or 1) % count == 0)
        found += [((axis, count),) for count in whole if together * count <= 2 * WIDEST]
    return found


def _apart(nest: Nest) -> list[tuple[str, int]]:
    """A batch axis and numbers of its steps, one for each warp, where these follow each other in memory."""
    extents = [(axis, nest.extent(axis) or 1) for axis in _following(nest) if not _is_single(nest)]
    return [
        (axis, count)
        for axis, extent in extents
        for count in GROUPS
        if -(-extent // count) * count <= WASTED * extent
    ]


def _is_single(nest: Nest) -> bool:
    """Whether factors are no half types, but floats that are rounded to TF32."""
    return nest.tensors[0].dtype == "float32"


def _following(nest: Nest) -> list[str]:
    """The batch axis, if its steps follow each other in the image: one element each, or all its channels."""
    image, _ = image_and_other(nest)
    tensor, channels, batch = nest.tensor(image.tensor), {*roles_of(nest).channels}, batches(nest)
    size = 1
    dims = zip(tensor.strides, tensor.shape, image.indices)
    for stride, extent, index in sorted(dims, key=lambda dim: dim[0]):
        if extent == 1:
            continue
        if stride == size and index.axes <= {*batch}:
            return batch
        if stride != size or extent is None or not index.axes <= channels:
            return []
        size *= extent
    return []


def is_small(nest: Nest, tile: Tile, rows: Side, cols: Side, depth: Side, along: bool) -> bool:
    """Whether a warp's sums have registers, and its unrolled products are not too many."""
    split = phases(nest)
    sums = math.prod(count for axis, count in tile if not nest.is_reduce(axis))
    sums *= math.prod(count for axis, count in split.items() if axis not in dict(tile))
    high = 1 if along else rows[1] // ROWS
    deep = depth[1] // deep_of(nest) if along else 1
    taps = math.prod(count for axis, count in tile if nest.is_reduce(axis))
    divided = math.prod(split.values())
    wide = cols[1] // COLS
    return (
        sums * high * wide * 4 <= MOST_ACCUMULATORS and sums * high * wide * taps * deep <= PRODUCTS * divided
    )


def mutate(nest: Nest, product: Product, rng: random.Random, batch: int = BATCH) -> Product:
    """A product of the same form that differs in a choice: positions, tile, split, warps or buffers."""
    form = product.pack, product.skew
    own = choices_of(rewritten(nest, *form), product)
    every = _described(nest, form, batch)
    return varied(product, own, every, rng)


def varied(
    product: Product,
    own: tuple[object, ...],
    every: Iterable[tuple[tuple[object, ...], Product]],
    rng: random.Random,
) -> Product:
    """One of the products, each with its choices, that differs in a choice; or the product itself."""
    near = [other for choices, other in every if sum(a != b for a, b in zip(own, choices)) == 1]
    return rng.choice(near) if near else product


@functools.lru_cache(maxsize=64)
def _described(nest: Nest, form: Form, batch: int) -> list[tuple[tuple[object, ...], Product]]:
    """All products of a form, each with its choices."""
    whole = rewritten(nest, *form)
    return [(choices_of(whole, product), product) for product in products(nest, form, batch)]


def choices_of(nest: Nest, product: Product) -> tuple[object, ...]:
    split = {*of_reductions(nest, product.split)}
    sides = product.rows, product.cols, product.depth
    workers = product.apart or (product.warps, product.teams)
    return sides, product.tile, (split, product.clustered), workers, product.stages, product.whole
