"""Compiles printed CUDA C++ with NVRTC, through NVIDIA's Python bindings, which PyTorch brings."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from ..errors import CompileError, NoCompilerError

try:
    import triton
except ImportError:
    triton = None

MOST_CHARACTERS = 400  # of what the compiler says


def is_available() -> bool:
    """Whether a GPU's kernels may be CUDA C++: not in Triton's interpreter, which runs none."""
    return triton is not None and not triton.knobs.runtime.interpret and is_installed()


def is_installed() -> bool:
    """Whether there are bindings of NVRTC; nothing is loaded for the answer."""
    try:
        return importlib.util.find_spec("cuda.bindings.nvrtc") is not None
    except ModuleNotFoundError:
        return False


def cubin(text: str, arch: int) -> bytes:
    """The machine code of a printed kernel for GPUs of a compute capability, 90 for 9.0.

    NoCompilerError: there is no NVRTC.  CompileError: it refuses the text.
    """
    try:
        nvrtc: Any = importlib.import_module("cuda.bindings.nvrtc")
    except ImportError as error:
        raise NoCompilerError(f"CUDA C++ kernels need NVRTC; pip install cuda-bindings ({error}).") from error

    def call(function: Any, *args: Any) -> Any:
        status, *found = function(*args)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"{function.__name__} says {status.name}{log()}")
        return found[0] if found else None

    def log() -> str:
        if program is None:
            return ""
        size = nvrtc.nvrtcGetProgramLogSize(program)[1]
        said = b" " * size
        nvrtc.nvrtcGetProgramLog(program, said)
        return ": " + said.decode(errors="replace").strip("\0 \n")[:MOST_CHARACTERS]

    program = None
    program = call(nvrtc.nvrtcCreateProgram, text.encode(), b"kernel.cu", 0, [], [])
    options = [f"--gpu-architecture=sm_{arch}".encode(), b"--std=c++17", b"--disable-warnings"]
    try:
        call(nvrtc.nvrtcCompileProgram, program, len(options), options)
        code = b" " * call(nvrtc.nvrtcGetCUBINSize, program)
        call(nvrtc.nvrtcGetCUBIN, program, code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return code
