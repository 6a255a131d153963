"""The folder of compiled objects: when it is looked at, and what remains of what fails in it."""

from __future__ import annotations

import errno
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from g3dswap.tc import objects


class Disk:
    """Stands for `tempfile.TemporaryFile`: counts the trials, and may be full."""

    def __init__(self) -> None:
        self.trials, self.full, self.real = 0, False, tempfile.TemporaryFile

    def __call__(self, **more: Any) -> Any:
        self.trials += 1
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.real(**more)


@pytest.fixture
def disk(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk()
    monkeypatch.setattr(tempfile, "TemporaryFile", made)
    return made


def test_a_folder_is_tried_once(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = objects.folder()
    assert [objects.folder() for _ in range(3)] == [first] * 3 and disk.trials == 1
    monkeypatch.setenv("G3DSWAP_CACHE_DIR", str(tmp_path / "other"))
    assert objects.folder() != first and disk.trials == 2


def test_a_folder_that_was_removed_is_made_again(disk: Disk) -> None:
    shutil.rmtree(objects.folder())
    assert objects.folder().is_dir()


def test_a_disk_that_fills_up_is_noticed_after_the_failure(disk: Disk) -> None:
    place = objects.folder()
    disk.full = True
    with pytest.raises(OSError, match="No space left"), objects.scratch(place / "kernel.so"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(place.iterdir())
    elsewhere = objects.folder()
    assert elsewhere != place and objects.folder() == elsewhere and disk.trials == 3
    disk.full = False
    assert objects.folder() == place == objects.folder() and disk.trials == 4


def test_what_fails_leaves_nothing(disk: Disk) -> None:
    path = objects.folder() / "kernel.so"
    with pytest.raises(ValueError, match="fails"), objects.scratch(path) as made:
        made.write_text("half")
        raise ValueError("fails")
    assert not list(path.parent.iterdir()) and not objects.intact(path)
    with objects.scratch(path) as made:
        made.write_text("whole")
    assert objects.intact(path) and disk.trials == 1
