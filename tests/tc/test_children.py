"""Child processes: answers, every way to end, and that nothing outlives the process that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from g3dswap.errors import ProcessError
from g3dswap.tc import children
from g3dswap.tc.children import Child

ROOT = Path(__file__).parents[2]


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child("tests.echo", "echoes", whole=False)
    yield child
    child.kill()


def gone(pid: int) -> bool:
    """Whether a process has ended, or does within some seconds; one that nobody has waited for counts."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_it_answers_what_it_is_asked(child: Child) -> None:
    for text in ("one", "zwei \u2713", "x" * 100_000):
        answer = child.ask({"text": text}, 30)
        assert answer["echo"] == {"text": text} and answer["pid"] == child.pid
    assert child.usable
    assert child.ask({"value": float("inf")}, 30)["echo"] == {"value": float("inf")}


def test_without_the_whole_package_it_imports_no_pytorch(child: Child) -> None:
    modules = set(child.ask({}, 30)["modules"])
    assert "g3dswap.tc.children" in modules and not {"torch", "numpy", "g3dswap.convert"} & modules


def test_an_exception_is_an_answer(child: Child) -> None:
    assert child.ask({"raise": "so\nmuch"}, 30) == {"failed": "ValueError: so"}
    assert child.ask({"raise": ""}, 30) == {"failed": "ValueError"}
    assert child.usable


def test_what_it_prints_is_no_answer(child: Child, capfd: pytest.CaptureFixture[str]) -> None:
    assert child.ask({"print": "noise"}, 30)["echo"] == {"print": "noise"}
    assert capfd.readouterr() == ("", "")


def test_one_that_is_not_fit_any_more_says_so_and_ends(child: Child) -> None:
    assert child.ask({"poison": 1}, 30) == {"failed": "RuntimeError: an illegal memory access", "fatal": True}
    assert gone(child.pid)
    assert not child.usable


@pytest.mark.parametrize(
    ("request_", "how"),
    [
        ({"kill": signal.SIGSEGV}, "was killed by SIGSEGV."),
        ({"exit": 3}, "ended with exit code 3."),
        ({"print": "one\nlast words\n", "exit": 1}, "ended with exit code 1: last words."),
    ],
)
def test_a_death_is_described(child: Child, request_: children.Message, how: str) -> None:
    with pytest.raises(ProcessError) as caught:
        child.ask(request_, 30)
    assert str(caught.value) == f"the process that echoes {how}"
    assert not child.usable
    with pytest.raises(ProcessError):
        child.ask({}, 30)


def test_one_that_does_not_answer_in_time_is_ended_with_all_that_it_started(child: Child) -> None:
    started = child.ask({"start": 1}, 30)["pid"]
    with pytest.raises(TimeoutError, match=r"the process that echoes did not answer within 0.2 s\."):
        child.ask({"sleep": 1000}, 0.2)
    assert not child.usable and gone(child.pid) and gone(started)


def test_an_interrupt_while_waiting_ends_it(child: Child) -> None:
    """The answer that is under way must not be taken for that to the next request."""
    child.ask({}, 30)
    main = threading.main_thread().ident
    assert main
    timer = threading.Timer(0.5, signal.pthread_kill, [main, signal.SIGINT])
    # Where the tests run in the background, they inherit that interrupts are ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            child.ask({"sleep": 1000}, 60)
    finally:
        signal.signal(signal.SIGINT, before)
    timer.join()
    assert not child.usable and gone(child.pid)


def test_the_terminal_s_interrupt_does_not_reach_it(child: Child) -> None:
    child.ask({}, 30)
    assert os.getpgid(child.pid) == child.pid == os.getsid(child.pid) != os.getpgrp()


def test_one_that_nobody_asks_ends(monkeypatch: pytest.MonkeyPatch, child: Child) -> None:
    child.ask({}, 30)
    assert child.usable
    monkeypatch.setattr(children, "IDLE_SECONDS", 0.0)
    assert not child.usable  # it may end at any moment, so it must not be asked


def test_one_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(ProcessError, match=r"the process that echoes cannot be started: .*/no/such/python"):
        Child("tests.echo", "echoes", whole=False)


PARENT = """
import os, signal, sys, time
from g3dswap.tc.children import Child
child = Child("tests.echo", "echoes", whole=False)
print(child.pid, child.ask({"start": 1}, 30)["pid"], flush=True)
END
"""
BUSY = 'child.send({"sleep": 1000}); time.sleep(0.2); '


@pytest.mark.parametrize(
    "end",
    [
        "",
        "os._exit(0)",
        "raise SystemExit(3)",
        BUSY + "os.kill(os.getpid(), signal.SIGKILL)",
        BUSY + "os.kill(os.getpid(), signal.SIGTERM)",
        BUSY + "os.kill(os.getpid(), signal.SIGINT)",
    ],
)
def test_nothing_outlives_the_parent(end: str) -> None:
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + PARENT.replace("END", end)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2 and all(gone(pid) for pid in pids)


def test_a_fork_leaves_the_children_to_the_original(child: Child) -> None:
    child.ask({}, 30)
    # From a process without threads, which Python would warn of.
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + PARENT.replace(
        "END",
        "forked = os.fork()\n"
        "if not forked: sys.exit(5 if child.usable else 0)\n"
        "_, status = os.waitpid(forked, 0)\n"
        "print(status, child.ask({}, 30)['pid'] == child.pid)",
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[2:] == ["0", "True"], done.stderr
    assert not done.stderr
