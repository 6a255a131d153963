"""Compilers that hang, crash, or make something else, as scripts for ``$CXX``."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from g3dswap.tc import runtime_cpp
from tests.apart import CONFIG, hurry

REAL = '[ "$1" = --version ] && exec c++ --version\n'
OUTPUT = 'for word; do [ "$last" = -o ] && out=$word; last=$word; done\n'  # sets $out
CRASH = 'exec c++ -shared -fPIC {bad} -o "$out"'
COMPILERS = {
    "hangs": REAL + "sleep 600 & wait",
    "is killed": REAL + "kill -SEGV $$",
    "fails": REAL + "exit 1",
    "floods": REAL + "yes error | head -c 9000000 >&2; exit 1",
    "makes nothing": REAL,
    "makes something else": REAL + OUTPUT + 'echo no > "$out"',
    "makes kernels that crash": REAL + OUTPUT + f'case "$out" in *.so) {CRASH};; *) exec c++ "$@";; esac',
}
"""Scripts; ``{bad}`` is a source that defines a kernel which crashes."""
EVERY_OTHER = COMPILERS["makes kernels that crash"].replace("*.so)", "*[02468ace].so)")
BAD = 'extern "C" int run(void*, void*, long, int) { return *(volatile int*)8; }\n'


def use_compiler(path: str, patience: float = CONFIG.build_timeout) -> None:
    os.environ["CXX"] = path
    runtime_cpp.VERSION_SECONDS = 1.0
    hurry(replace(CONFIG, build_timeout=patience))


def compiler(folder: Path, name: str, text: str) -> Path:
    bad = folder / "bad.cpp"
    bad.write_text(BAD)
    script = folder / f"c++-{name.replace(' ', '-')}"
    script.write_text("#!/bin/sh\n" + text.replace("{bad}", str(bad)) + "\n")
    script.chmod(0o755)
    return script
