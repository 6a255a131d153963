"""What all tests share: a cache of their own, seeds, hypothesis profiles, golden files."""

from __future__ import annotations

import difflib
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.profiles import PROFILE

GOLDEN = Path(__file__).parent / "golden"

Golden = Callable[[str, str], None]
"""Type of the ``golden`` fixture."""

# Compiling a kernel inside an example takes as long as it takes, so no deadline. The everyday profile draws
# the same examples every time: a failure in CI is a failure here. The deep one looks for new ones.
settings.register_profile(
    "ci", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "deep", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(PROFILE)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite tests/golden from what the code prints now",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Workers of pytest-xdist share their parent's folder, and so the kernels that were compiled into it.
    if not hasattr(config, "workerinput"):
        folder = tempfile.mkdtemp(prefix="g3dswap-tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        os.environ["G3DSWAP_CACHE_DIR"] = folder
    # The processes of one run share the cores. The variable is for the OpenMP of kernels and of children.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    threads = max(1, min(4, len(os.sched_getaffinity(0)) // workers))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen depends on no options that were tuned elsewhere."""
    from g3dswap import stored  # not before `pytest_configure` has set the environment

    monkeypatch.setattr(stored, "shipped_directories", list)


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for this test alone, already in ``$G3DSWAP_CACHE_DIR``."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("G3DSWAP_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def forgotten() -> Iterator[None]:
    """The process knows no choices, neither before this test nor after it."""
    from g3dswap import choose  # not before `pytest_configure` has set the environment

    choose.forget()
    yield
    choose.forget()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """``golden(name, text)`` compares text with ``tests/golden/<name>``; ``--update-golden`` writes it."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.exists():
            pytest.fail(f"{path} does not exist; write it with --update-golden and read what it says")
        wanted = path.read_text(encoding="utf-8")
        if text != wanted:
            lines = difflib.unified_diff(
                wanted.splitlines(), text.splitlines(), f"golden/{name}", "printed now", lineterm=""
            )
            pytest.fail("\n".join(lines) + "\nIf this is what it should print: --update-golden")

    return check
