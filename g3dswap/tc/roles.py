"""What the axes of a product of two factors are: positions and channels, and the sides of a kernel."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass

from .nest import Access, Nest
from .pack import image_of


def possible(nest: Nest) -> bool:
    """Whether a matrix unit multiplies the factors: in half precision, or where TF32 is allowed."""
    dtype = nest.tensors[0].dtype
    narrow = dtype in ("bfloat16", "float16") or (dtype == "float32" and nest.precision == "tf32")
    return narrow and len(nest.factors) == 2


def image_and_other(nest: Nest) -> tuple[Access, Access]:
    """The factor that packing copies an axis of, which is read at shifted positions; and the other."""
    place = image_of(nest)
    return nest.factors[place], nest.factors[1 - place]


def sides(nest: Nest) -> list[str]:
    """The sides of the kernel: of the axes that are added to others in an index, those without the batch.

    A convolution has the parallel ones as positions and the reductions as the sides of its kernel; its
    gradient in the kernel has them the other way round.  Patches of skewed axes are none: they are channels.
    """
    image, other = image_and_other(nest)
    batch = {a.name for a in nest.axes if a.extent is None}
    summed = not batch & other.axes  # the other factor is the kernel
    shifted = added(image) - _patches(nest)
    return [a.name for a in nest.axes if a.name in shifted and a.reduce == summed]


def batches(nest: Nest) -> list[str]:
    """The batch axis of both factors and the result that has steps, if any: blocks of it may be packed."""
    image, other = image_and_other(nest)
    shared = image.axes & other.axes & nest.output.axes
    return [axis.name for axis in nest.axes if axis.name in shared and (axis.extent or 1) > 1][:1]


def nearest(nest: Nest) -> frozenset[str]:
    """The axes along which elements of the image lie side by side."""
    image, _ = image_and_other(nest)
    tensor = nest.tensor(image.tensor)
    dims = zip(image.indices, tensor.strides, tensor.shape)
    return next((i.axes for i, stride, extent in dims if stride == 1 and extent != 1), frozenset())


def by_step(nest: Nest, access: Access, axes: Iterable[str]) -> list[str]:
    """Axes by how far apart their steps lie in the tensor of an access, the nearest last."""
    strides = nest.tensor(access.tensor).strides

    def step(axis: str) -> int:
        return min(abs(i.coefficient(axis)) * s for i, s in zip(access.indices, strides) if axis in i.axes)

    return sorted(axes, key=step, reverse=True)


def nearest_last(nest: Nest, names: Iterable[str]) -> list[str]:
    """Axes, flattened ones among them, by how far apart their steps lie in the image, else in the result.

    In this order on the grid, programs that run at a time share what comes from memory together.
    """
    image, _ = image_and_other(nest)

    def step(name: str) -> int:
        axis = name.rsplit("*", 1)[-1]  # the last of those that are flattened
        access = image if axis in image.axes else nest.output
        if nest.extent(axis) is None:
            return sys.maxsize
        strides = nest.tensor(access.tensor).strides
        return min(abs(i.coefficient(axis)) * s for i, s in zip(access.indices, strides) if axis in i.axes)

    return sorted(names, key=step, reverse=True)


def added(access: Access) -> set[str]:
    """The axes that are added to others in an index."""
    return {a for index in access.indices if len(index.terms) > 1 for a in index.axes}


def _patches(nest: Nest) -> set[str]:
    """The patches of skewed axes, and what such axes were split into: they are added elsewhere too."""
    return added(image_and_other(nest)[1]) | added(nest.output)


@dataclass(frozen=True)
class Roles:
    """image, other: parallel axes of one factor alone.  depth: reductions of both.

    along: whether the image's parallel axes are positions, along which shifted indices step; else the depth's
    are, and the image's are channels.
    """

    image: tuple[str, ...]
    other: tuple[str, ...]
    depth: tuple[str, ...]
    along: bool

    @property
    def positions(self) -> tuple[str, ...]:
        return self.image if self.along else self.depth

    @property
    def channels(self) -> tuple[str, ...]:
        return self.depth if self.along else self.image


def roles_of(nest: Nest) -> Roles:
    image, other = image_and_other(nest)
    kernel = sides(nest)
    usable = [a for a in nest.axes if a.extent is not None and a.name not in kernel]
    shifted = {a for i in image.indices if len(i.terms) > 1 or i.divisor > 1 for a in i.axes}
    own = tuple(a.name for a in usable if a.name in image.axes - other.axes and not a.reduce)
    mine = tuple(a.name for a in usable if a.name in other.axes - image.axes and not a.reduce)
    both = tuple(a.name for a in usable if a.name in image.axes & other.axes and a.reduce)
    return Roles(own, mine, both, bool((shifted - _patches(nest)) & set(own)))
