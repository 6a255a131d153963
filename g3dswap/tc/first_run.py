"""The first run of a C++ kernel, in a process of its own, so that a bad one ends that and not the user's.

A small program loads the kernel and runs it once on zeros.  Every tensor ends where the memory that may be
touched ends, so that reading or writing a single element behind it is a crash there and not damage here.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import ProcessError
from .children import run
from .nest import Nest, Tensor

FLAGS = ("-std=c++17", "-O1", "-w")
LIBRARIES = ("-ldl",)

# Whatever the program itself cannot do is no fault of the kernel's, and shows again, with a message, where
# the kernel is loaded and run.
SOURCE = r"""
#include <cstdint>
#include <cstdlib>
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

static void* tensor(size_t bytes) {
    const size_t page = sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page;
    char* const base = (char*)mmap(nullptr, whole + 2 * page, PROT_NONE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED || mprotect(base + page, whole, PROT_READ | PROT_WRITE)) _exit(0);
    return base + page + whole - bytes;
}

// path of the kernel, batch, threads, bytes of the result, bytes of each operand
int main(int count, char** words) {
    void* const library = dlopen(words[1], RTLD_NOW);
    void* const symbol = library ? dlsym(library, "run") : nullptr;
    if (!symbol) _exit(0);
    void* const out = tensor(strtoull(words[4], nullptr, 10));
    const void* operands[64];
    for (int i = 5; i < count && i < 69; ++i) operands[i - 5] = tensor(strtoull(words[i], nullptr, 10));
    using Run = int(const void* const*, void*, int64_t, int);
    ((Run*)symbol)(operands, out, strtoll(words[2], nullptr, 10), atoi(words[3]));
    _exit(0);
}
"""

LARGE = 1 << 28  # bytes of all tensors above which one image must do


def check(program: Path, kernel: Path, nest: Nest, seconds: float) -> None:
    """Run a compiled kernel of a scheduled nest once; ProcessError: it crashed, or did not end in time."""
    sizes = _bytes(nest, 2)
    batch = 2 if sum(sizes) < LARGE else 1
    numbers = [batch, torch.get_num_threads(), *_bytes(nest, batch)]
    try:
        done = run([str(program), str(kernel), *map(str, numbers)], seconds)
    except subprocess.TimeoutExpired:
        raise ProcessError(
            f"a kernel did not end its first run within {seconds:.3g} s; it is left out."
        ) from None
    except OSError:
        return  # no process can be started, and the kernel is not to blame
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise ProcessError(f"a kernel was killed by {name} in its first run; it is left out.")


def _bytes(nest: Nest, batch: int) -> Sequence[int]:
    """The sizes of the result, or of all partial results, and of the operands."""

    def elements(tensor: Tensor) -> int:
        extents = [batch if extent is None else extent for extent in tensor.shape]
        return 1 + sum((extent - 1) * step for extent, step in zip(extents, tensor.strides))

    def width(tensor: Tensor) -> int:
        return int(getattr(torch, tensor.dtype).itemsize)

    out = nest.tensor(nest.output.tensor)
    result = elements(out) * width(out)
    if nest.partial_counts:
        result = elements(out) * nest.parts(batch) * max(4, width(out))
    return [result, *(elements(t) * width(t) for t in map(nest.tensor, nest.operands))]
