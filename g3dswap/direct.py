"""The direct way of a call: ``direct.cpp``, compiled once for this PyTorch, and told what was decided.

A call through Python takes some tens of microseconds more than one of PyTorch's own operators, and several
times that in a network, where nothing of it is in the processor's caches. Where a GPU waits for the host that
is what a step takes. So what a call needs is handed to C++ as soon as it is known. Until that is compiled, in
the background, and wherever it cannot be, Python does the same.
"""

from __future__ import annotations

import math
import sys
import sysconfig
import threading
from collections.abc import Callable, Sequence
from dataclasses import astuple
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from . import decided, native
from .choice import Choice
from .errors import G3DSwapError
from .once import warn_once
from .tc import runtime_cpp
from .tc.kernel import Kernel
from .workload import Candidate

SECONDS = 300.0  # for the compiler, which takes 15 on an idle machine
KINDS = {"forward": 0, "grad_input": 1, "grad_weight": 2}
FLAGS = ("-std=c++20", "-O2", "-shared", "-fPIC", "-w", "-DAT_PER_OPERATOR_HEADERS")
LIBRARIES = ("-ltorch_python", "-ltorch_cpu", "-lc10")

Conf = tuple[Any, ...]
"""Of a call: ``(stride, padding, dilation, groups, tune, cache, transposed, output_padding, activation)``."""


class Extension(Protocol):
    """What ``direct.cpp`` is as a module. Results are None where Python has to see to a call."""

    def call(self, input: Tensor, weight: Tensor, bias: Tensor | None, conf: Conf) -> Tensor | None:
        """A layer's result."""

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None, conf: Conf) -> Tensor | None:
        """The same for tensors that the dispatcher has seen: there is no autocast and nothing to record."""

    def backward(
        self, grad_output: Tensor, input: Tensor, weight: Tensor, conf: Conf, *output_mask: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:
        """The gradients in input, weight and bias that the mask asks for."""

    def learn(
        self, conf: Conf, kind: int, input: Tensor, weight: Tensor, third: Tensor | None, plan: Any
    ) -> None:
        """Run calls like this one so from now on."""

    def forget(self) -> None:
        """Run none of those that were learnt."""

    def counts(self) -> tuple[int, int, int]:
        """How many forward passes, gradients of inputs and gradients of weights went this way."""


extension: Extension | None = None
"""None until it is compiled."""

_lock = threading.Lock()
_loading: threading.Thread | None = None


def load(wait: bool = True) -> None:
    """Compile it if need be and load it, in the background unless ``wait``; a failure is said once."""
    global _loading
    with _lock:
        if _loading is None:
            _loading = threading.Thread(target=_load, name="g3dswap direct", daemon=True)
            _loading.start()
    if wait:
        _loading.join()


def begin(device: str, wait: bool = False) -> None:
    """Load it if calls on such a device gain by it; on a CPU a call is short beside its kernel."""
    if device == "cuda":
        load(wait)


def learn(choice: Choice, name: str, conf: Conf, input: Tensor, weight: Tensor, third: Tensor | None) -> None:
    """Run calls like this one directly from now on; ``third`` is the bias, or the gradient of the result."""
    begin(choice.problem.device)
    if extension is None:
        return
    if choice.is_native:
        # On a CPU some calls of PyTorch's kernels need a detour, and activations are PyTorch's too.
        if choice.problem.device == "cuda" and not conf[-1]:
            extension.learn(conf, KINDS[name], input, weight, third, None)
        return
    with torch.cuda.device_of(input):
        plan = _plan(choice)
    if plan is not None:
        extension.learn(conf, KINDS[name], input, weight, third, plan)


def bound(choice: Choice, operands: Sequence[Tensor | None]) -> Callable[..., Tensor]:
    """The pass of a choice as a layer runs it, for operands like these, which are those of ``choice.run``.

    Not of a transposed layer.
    """
    problem, geometry = choice.problem, choice.problem.geometry
    options = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    conf = *options, "bound", "", False, (0, 0, 0), problem.activation
    kind = KINDS[problem.direction]
    input, weight, third = operands if problem.direction == "forward" else (*operands[1:], operands[0])
    assert input is not None and weight is not None
    learn(choice, problem.direction, conf, input, weight, third)

    def run(first: Any, second: Any, third: Any) -> Tensor:
        out = None
        if extension and kind == 0:
            out = extension.forward(first, second, third, conf)
        elif extension:
            found = extension.backward(first, second, third, conf, kind == 1, kind == 2, False)
            out = found and found[kind - 1]
        return choice.run(first, second, third) if out is None else out

    return run


def _plan(choice: Choice) -> tuple[Any, ...] | None:
    """How one of our kernels runs a pass, as ``direct.cpp`` takes it; None where only Python can run it."""
    candidate = choice.candidate
    first = candidate.kernel if isinstance(candidate, Candidate) else None
    if candidate is None or not isinstance(first, Kernel):
        return None
    step = _entry(first)
    total = None if first.total is None else _entry(first.total)
    if step is None or (first.total is not None and total is None):
        return None
    places = candidate.reads(native.operands(choice.problem, 0, 1, 2))
    partial = first.partial_counts or (0,)
    parts = math.prod(count for count in partial if count is not None)
    channels_last = candidate.format == torch.channels_last_3d
    result = tuple(candidate.shape), candidate.batched, channels_last
    return places, *result, step, parts, None in partial, total


def _entry(kernel: Kernel) -> tuple[Any, ...] | None:
    found = kernel.launch.entry()
    return None if found is None else astuple(found)


def _load() -> None:
    global extension
    try:
        module = _imported(_built())
    except (G3DSwapError, ImportError, OSError) as error:
        warn_once(
            "direct",
            "Calls of converted layers go through Python, which costs some tens of microseconds each, "
            f"because direct.cpp cannot be used: {error}",
        )
        return
    decided.on_change(module.forget)
    extension = module
    decided.changed()  # so that what was decided before is learnt at its next call


def _built() -> Path:
    root = Path(torch.__file__).parent
    headers = root / "include", root / "include" / "torch" / "csrc" / "api" / "include"
    paths = *map(str, headers), sysconfig.get_path("include")
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    flags = *FLAGS, abi, *(f"-I{path}" for path in paths)
    source = Path(__file__).with_suffix(".cpp").read_text(encoding="utf-8")
    return runtime_cpp.built(
        source, flags, (f"-L{root / 'lib'}", *LIBRARIES), SECONDS, torch.__version__, sys.version
    )


def _imported(path: Path) -> Extension:
    name = f"{__name__}_cpp"  # Python keeps it among all modules under this name
    loader = ExtensionFileLoader(name, str(path))
    spec = spec_from_loader(name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    found: Any = module
    return found
