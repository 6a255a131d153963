"""A short form of the fault campaign; ``python -m tests.faults`` is the long one."""

from __future__ import annotations

import contextlib
import errno
import io
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from g3dswap.progress import Bar
from g3dswap.tc.trial import Progress
from tests.faults import SCENARIOS

pytestmark = pytest.mark.skipif(
    shutil.which("c++") is None or not sys.platform.startswith("linux"),
    reason="needs a C++ compiler and /proc",
)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not pytest's, into which no other user may look."""
    with tempfile.TemporaryDirectory(prefix="g3dswap-faults-") as place:
        yield Path(place)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_lost(name: str, folder: Path) -> None:
    assert SCENARIOS[name](2, random.Random(0), folder).total() > 0


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_progress_bar_that_cannot_be_written_is_given_up() -> None:
    """Its file may be on the disk that is full."""
    with contextlib.redirect_stderr(FullDisk()), Bar(passes=2) as bar:
        for trials in range(2):
            bar.update("forward", Progress(0.1, 1.0, trials, None, None))
            assert not bar.enabled
        bar.advance()
