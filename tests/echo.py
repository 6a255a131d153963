"""A child process for the tests of `g3dswap.tc.children`: it does what it is told."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from g3dswap.tc.children import Message, serve

state = {"fit": True}


def answer(request: Message) -> Message:
    if "sleep" in request:
        time.sleep(request["sleep"])
    if "print" in request:
        sys.stdout.write(request["print"])
        sys.stdout.flush()
    if "kill" in request:
        os.kill(os.getpid(), request["kill"])
    if "exit" in request:
        os._exit(request["exit"])
    if "raise" in request:
        raise ValueError(request["raise"])
    if "poison" in request:
        state["fit"] = False
        raise RuntimeError("an illegal memory access")
    if "start" in request:
        return {"pid": subprocess.Popen(["sleep", "1000"]).pid}
    return {"echo": request, "pid": os.getpid(), "modules": sorted(sys.modules)}


def main(fd: int) -> None:
    serve(fd, answer, lambda: state["fit"])
