"""Child processes that work on request, and programs that run once; both may be killed at any time.

A request and its answer are JSON objects, framed by a `multiprocessing` connection over a socket pair;
nothing is pickled.  Each child leads a process group of its own: Ctrl-C in the terminal does not reach
it, and what it has started dies with it.  A guardian, one small process, kills the groups if this process
ends in a way that runs no clean-up.  Children are started afresh, never forked, so that no CUDA context and
no lock is copied.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ..errors import ProcessError, described

Message = dict[str, Any]
Answer = Callable[[Message], Message]

IDLE_SECONDS = 120.0
"""A child that is asked nothing for so long ends by itself, which gives its memory back."""

_PACKAGE = Path(__file__).parent.parent
# The paths are those of this process, so that the child finds the same packages.  Without the whole package a
# child starts in a fraction of the time: its root is then an empty module, and only what is asked for is run.
_BOOT = "import sys; sys.path[:] = {path!r}; {root}; from {module} import main; main({fd})"
_EMPTY_ROOT = "root = sys.modules[{name!r}] = type(sys)({name!r}); root.__path__ = [{place!r}]"
_GUARDIAN = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""


class Child:
    """A process that runs `main` of a module, which calls `serve`.

    whole:  import g3dswap with everything in it; otherwise the module and what it imports.
    name:   what messages call it.
    ProcessError: it cannot be started.
    """

    def __init__(
        self, module: str, name: str, *, whole: bool, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.used = time.monotonic()
        self._log = tempfile.TemporaryFile("a+b")  # noqa: SIM115  what it prints, for messages
        self._connection, theirs = Pipe()
        root = "" if whole else _EMPTY_ROOT.format(name=_PACKAGE.name, place=str(_PACKAGE))
        boot = _BOOT.format(path=sys.path, root=root or "pass", module=module, fd=theirs.fileno())
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", boot],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=None if environment is None else dict(environment),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except OSError as error:
            self._connection.close()
            self._log.close()
            raise ProcessError(f"the process that {name} cannot be started: {error}.") from error
        finally:
            theirs.close()
        with _lock:
            _live.add(self)
        _guard("+", self._process.pid)

    @property
    def pid(self) -> int:
        """Its process id, which is also that of its group."""
        return self._process.pid

    @property
    def usable(self) -> bool:
        """Whether it runs and has not been idle for so long that it may be about to end."""
        fresh = time.monotonic() - self.used < IDLE_SECONDS / 2
        return fresh and not self._connection.closed and self._process.poll() is None

    def ask(self, request: Message, seconds: float) -> Message:
        """The answer to a request; `receive` has the errors."""
        self.send(request)
        return self.receive(seconds)

    def send(self, request: Message) -> None:
        """Send a request, whose answer `receive` must fetch before the next one."""
        try:
            self._connection.send_bytes(json.dumps(request).encode())
        except OSError:
            raise self._ended() from None

    def receive(self, seconds: float) -> Message:
        """The answer to what was sent.

        ProcessError: the child ended.  TimeoutError: it did not answer in time.  In both cases, and
        whenever waiting is interrupted, the child is gone afterwards.
        """
        try:
            if not self._connection.poll(seconds):
                raise TimeoutError(f"the process that {self.name} did not answer within {seconds:g} s.")
            answer: Message = json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError):
            raise self._ended() from None
        except BaseException:
            self.kill()
            raise
        self.used = time.monotonic()
        self._log.truncate(0)
        return answer

    def kill(self) -> None:
        """End it and everything that it has started."""
        with _lock:
            if self not in _live:
                return
            _live.discard(self)
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may keep a dead process for a while
            self._process.wait(10)
        _guard("-", self.pid)
        self._connection.close()
        self._log.close()

    def abandon(self) -> None:
        """Forget it in a fork of this process: it belongs to the original."""
        self._connection.close()
        self._process.returncode = 0

    def _ended(self) -> ProcessError:
        """The error that says how it ended."""
        try:
            code = self._process.wait(5)
            how = f"ended with exit code {code}"
            if code < 0:
                how = f"was killed by {signal.Signals(-code).name}"
        except subprocess.TimeoutExpired:
            how = "closed its connection"
        try:
            self._log.seek(0)
            lines = self._log.read().decode(errors="replace").strip().splitlines()
        except ValueError:  # the log is closed: the child was ended before
            lines = []
        self.kill()
        return ProcessError(f"the process that {self.name} {how}{': ' + lines[-1] if lines else ''}.")


def run(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; its output is kept.

    subprocess.TimeoutExpired: it took longer, and was killed with all that it had started, as it is if this
    process ends.  OSError: it cannot be started.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        _guard("+", process.pid)
        try:
            out, err = process.communicate(timeout=seconds)
        finally:
            if process.poll() is None:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
            _guard("-", process.pid)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def serve(fd: int, answer: Answer, fit: Callable[[], bool] = lambda: True) -> None:
    """The life of a child: answer requests until the other side is gone or silent.

    An exception becomes an answer with `failed`; if the child is no longer `fit` after it, it also has
    `fatal`, and the child ends.
    """
    os.set_inheritable(fd, False)
    with Connection(fd) as connection:
        while connection.poll(IDLE_SECONDS):
            try:
                request = json.loads(connection.recv_bytes())
            except (EOFError, ConnectionError):
                return
            try:
                reply = answer(request)
            except Exception as error:
                reply = {"failed": described(error)}
                if not fit():
                    reply["fatal"] = True
            connection.send_bytes(json.dumps(reply).encode())
            if "fatal" in reply:
                return


# All children of this process.

_lock = threading.Lock()
_live: set[Child] = set()
_guardian: subprocess.Popen[str] | None = None


def _guard(sign: str, group: int) -> None:
    """Tell the guardian of a group that begins (+) or has ended (-)."""
    global _guardian
    with _lock:
        if _guardian is None or _guardian.poll() is not None:
            try:
                _guardian = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _GUARDIAN],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    start_new_session=True,
                )
            except OSError:
                return  # without one, the group ends by itself, or with the clean-up of this process
        assert _guardian.stdin
        with contextlib.suppress(BrokenPipeError):  # somebody killed it; the next group gets a new one
            _guardian.stdin.write(f"{sign}{group}\n")
            _guardian.stdin.flush()


def end_all() -> None:
    """End all children of this process."""
    global _guardian
    for child in list(_live):
        child.kill()
    with _lock:
        if _guardian is not None:
            _guardian.communicate()
            _guardian = None


def _forked() -> None:
    global _guardian, _lock
    _lock = threading.Lock()
    for child in _live:
        child.abandon()
    _live.clear()
    if _guardian is not None:
        assert _guardian.stdin
        _guardian.stdin.close()
        _guardian.returncode = 0
        _guardian = None


atexit.register(end_all)
os.register_at_fork(after_in_child=_forked)
