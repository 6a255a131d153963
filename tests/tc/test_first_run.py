"""The first run of a kernel: what is wrong with it shows in another process, and only what ran is kept."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from filelock import FileLock

from g3dswap.comprehensions import nest
from g3dswap.errors import ProcessError
from g3dswap.problem import Geometry, Problem
from g3dswap.tc import first_run, objects, runtime_cpp
from g3dswap.tc.kernel import build
from g3dswap.tc.nest import Nest
from g3dswap.tc.schedule import Schedule, apply
from g3dswap.tc.space import Space
from g3dswap.tc.trial import RUN_ERROR, category
from tests import apart

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")

PROBLEM = Problem("forward", Geometry(4, 8, 4, (3, 6, 7), (3, 3, 3), padding=(1, 1, 1)), bias=True)
IMAGE, WEIGHT, BIAS, RESULT = 4 * 3 * 6 * 7, 8 * 27, 8, 8 * 3 * 6 * 7


def kernel(body: str) -> str:
    head = 'extern "C" int run(const void* const* operands, void* out, long batch, int threads) {'
    tensors = "const float* x = (const float*)operands[0]; volatile float* y = (volatile float*)out;"
    return f"#include <cstdlib>\n{head} {tensors} {body} return 0; }}"


def scheduled(name: str = "") -> tuple[Nest, Schedule]:
    plain = nest(PROBLEM)
    schedule = Space(plain, "cpp").default()
    return replace(apply(plain, schedule), name=name, _by_name={}), schedule


def prepare(body: str, timeout: float = 20) -> Path:
    """Compile something else in the place of a kernel."""
    with mock.patch.object(runtime_cpp, "source", lambda nest, *_: nest.name):
        return runtime_cpp.prepare(*scheduled(kernel(body)), timeout)


def path_of(body: str) -> Path:
    return runtime_cpp.path_of(*scheduled(kernel(body)))


def test_an_object_is_compiled_once_and_a_lock_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = "int main() { return 7; }", ("-O0",), (), 2.0, "the test"
    path = objects.folder() / objects.digest(arguments[0], runtime_cpp.version(), "-O0", "the test")
    with FileLock(f"{path}.lock"):  # whose holder is stuck
        assert runtime_cpp.built(*arguments) == path
    assert subprocess.run([path]).returncode == 7
    path.write_bytes(b"damaged")
    assert subprocess.run([runtime_cpp.built(*arguments)]).returncode == 7
    monkeypatch.setattr(runtime_cpp, "_compile", lambda *_: pytest.fail("compiled again"))
    assert runtime_cpp.built(*arguments) == path


def test_sizes_are_those_of_the_tensors() -> None:
    sizes = first_run._bytes(scheduled()[0], 3)
    assert sizes == [4 * 3 * RESULT, 4 * 3 * IMAGE, 4 * WEIGHT, 4 * BIAS]


def test_partial_results_have_room() -> None:
    """One for each image, in float32."""
    geometry = Geometry(4, 4, 4, (4, 6, 18), (3, 3, 3))
    plain = nest(Problem("grad_weight", geometry, torch.bfloat16))
    axes = [f"{axis} rest serial" for axis in ("f", "c", "kt", "kh", "kw", "t", "h", "w")]
    digits = ["g rest grid", "n rest grid", *axes, "kh 3 unroll", "kw 3 unroll", "w 16 lanes"]
    schedule = Schedule.from_json({"digits": digits, "fuse": [], "stage": [], "hints": {}})
    assert first_run._bytes(apply(plain, schedule), 2)[0] == 4 * 2 * 4 * 27
    build(plain, schedule, "cpp")  # it would crash if there were not


@pytest.mark.parametrize(
    "body",
    [
        f"y[batch * {RESULT} - 1] = x[batch * {IMAGE} - 1];",
        "return 1;",  # no memory, which is an error where it is called
        "((volatile float*)operands[1])[0] = 0;",
    ],
)
def test_a_kernel_that_keeps_to_its_tensors_passes(body: str) -> None:
    assert objects.intact(path_of(body)) is False
    assert prepare(body) == path_of(body) and objects.intact(path_of(body))


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("*(volatile int*)8 = 1;", "SIGSEGV"),
        ("abort();", "SIGABRT"),
        (f"y[0] = x[batch * {IMAGE}];", "SIGSEGV"),
        (f"y[batch * {RESULT}] = 0;", "SIGSEGV"),
        (f"y[0] = ((const float*)operands[1])[{WEIGHT}];", "SIGSEGV"),
    ],
)
def test_a_kernel_that_crashes_is_an_error_and_not_kept(body: str, name: str) -> None:
    wanted = f"a kernel was killed by {name} in its first run; it is left out."
    with pytest.raises(ProcessError, match=re.escape(wanted)) as caught:
        prepare(body)
    assert category(caught.value) == RUN_ERROR
    assert not path_of(body).exists()


def test_rows_that_end_within_a_register_are_not_read_beyond(fresh_cache: Path) -> None:
    """GCC 12 made a read of eight elements of what says five, where it knew the number."""
    plain = nest(Problem("forward", Geometry(2, 2, 2, (37, 12, 5), (1, 1, 1))))
    rest = [f"{axis} rest serial" for axis in ("h", "t", "w", "c", "kt", "kh", "kw")]
    grid = [f"{axis} rest grid" for axis in ("n", "g", "f")]
    digits = [*grid, *rest, "h 3 unroll", "t 8 unroll", "w 8 lanes"]
    build(plain, Schedule.from_json({"digits": digits, "fuse": [], "stage": [], "hints": {}}), "cpp")


def test_a_kernel_that_hangs_is_ended() -> None:
    began = time.monotonic()
    with pytest.raises(ProcessError, match=r"did not end its first run within [\d.]+ s; it is left out\."):
        prepare("for (volatile int i = 0;; ++i) {}", timeout=2)
    assert time.monotonic() - began < 15


def test_where_no_process_can_be_started_the_kernel_is_not_to_blame(tmp_path: Path) -> None:
    first_run.check(tmp_path / "missing", tmp_path / "kernel.so", scheduled()[0], 1)


def test_what_a_killed_process_left_is_removed(fresh_cache: Path) -> None:
    folder = objects.folder()
    for name, age in (("tmpold", 2 * objects.STALE_SECONDS), ("tmpnew", 0.0)):
        (folder / name).mkdir()
        (folder / name / "kernel.cpp").touch()
        os.utime(folder / name, (time.time() - age,) * 2)
    prepare("")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["tmpnew"]


def test_compilers_die_with_the_process_that_was_killed(tmp_path: Path, fresh_cache: Path) -> None:
    """A hung one would stay for ever."""
    slow = tmp_path / "slow-compiler"
    slow.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec c++ --version\necho $$ > {tmp_path}/pid\nsleep 600 & wait\n'
    )
    slow.chmod(0o755)
    program = "from tests.tc.test_first_run import prepare; prepare('', 600)"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "CXX": str(slow), "PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, "-c", program], env=environment) as process:
        apart.wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip() != "")
        group = int((tmp_path / "pid").read_text())
        os.killpg(group, 0)
        process.send_signal(signal.SIGKILL)
    apart.wait_for(lambda: not alive(group))


def alive(group: int) -> bool:
    """Whether a group has a process that is more than a zombie."""
    states = [path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat")]
    return any(fields[0] != "Z" and int(fields[2]) == group for fields in states)
