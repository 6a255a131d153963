"""A short, repeatable form of the fuzz campaign; ``python -m tests.fuzz`` is the long one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from g3dswap.errors import ScheduleError
from g3dswap.show import parse_schedule
from tests.fuzz import examples, targets

NAMES = (
    "notation", "schedule", "inputs", "kwargs", "cache", "plan", "checkpoint", "pickle", "program", "graph",
    "bundle",
)  # fmt: skip
COUNT = 60


def test_an_infinite_hint_is_a_schedule_error() -> None:
    """Found by the long form: ``int`` of an infinity is an OverflowError."""
    text = '{"digits": [], "fuse": [], "stage": [], "hints": {"warps": 1e400}}'
    with pytest.raises(ScheduleError, match="1e400 is not a finite number"):
        parse_schedule(text)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")  # what PyTorch says about damaged files is its own affair
def test_mutations_are_read_or_refused(name: str, tmp_path: Path) -> None:
    known = targets(tmp_path)
    assert tuple(target.name for target in known) == NAMES
    target = known[NAMES.index(name)]
    for valid in target.seeds[:2]:
        target.run(valid)  # so that there is something to break
    tally: Counter[str] = Counter()
    examples(target, COUNT, tally, derandomize=True)()
    assert tally.total() >= COUNT // 2
