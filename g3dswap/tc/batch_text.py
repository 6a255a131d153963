"""What C++ and CUDA C++ say of loops over the batch and its blocks, in the same words."""

from __future__ import annotations

from collections.abc import Mapping

from .nest import ENOUGH, Nest


def definitions(nest: Nest, kind: str) -> list[str]:
    """Lines that say how many steps a block has, and how many blocks there are, as integers of a kind."""
    blocks = nest.shares
    if not blocks:
        return []
    return [
        f"const long long wanted = (long long)batch * {blocks.others} / {ENOUGH};",
        f"const {kind} share = wanted < 1 ? 1 : wanted < {blocks.most} ? wanted : {blocks.most};",
        f"const {kind} blocks = (batch - 1) / share + 1;",
    ]


def count(nest: Nest, i: int, names: Mapping[str, str]) -> str:
    """How often a loop runs: in a block less where that is the last one."""
    known = nest.loops[i].count
    if known is None:
        return "blocks" if nest.shares else "batch"
    if not nest.is_in_block(i):
        return str(known)
    first = next(f"v{k}" for k, loop in enumerate(nest.loops) if loop.count is None)
    left = f"batch - {names.get(first, first)}"
    return f"({left} < share ? {left} : share)"
