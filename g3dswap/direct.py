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
from typing import Any

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

call: Callable[..., Tensor | None] | None = None
"""``call(input, weight, bias, conf)``: the layer's result, or None for a call that Python has to see to.

conf is ``(stride, padding, dilation, groups, tune, cache, transposed, output_padding, activation)``. None
until it is compiled, as the next two are.
"""

forward: Callable[..., Tensor | None] | None = None
"""The same for tensors that the dispatcher has seen: there is no autocast and nothing to record."""

backward: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None] | None] | None = None
"""``backward(grad_output, input, weight, conf, *output_mask)``, with bools in the mask: the gradients."""

_learn: Callable[..., bool] | None = None
_module: Any = None
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


def begin(device: str) -> None:
    """Have it compiled in the background, if calls on such a device gain by it.

    On a CPU a call is short beside its kernel.
    """
    if device == "cuda":
        load(wait=False)


def learn(
    choice: Choice, name: str, conf: tuple[Any, ...], input: Tensor, weight: Tensor, third: Tensor | None
) -> None:
    """Run calls like this one directly from now on; ``third`` is the bias, or the gradient of the result."""
    begin(choice.problem.device)
    if _learn is None:
        return
    if choice.is_native:
        # On a CPU some calls of PyTorch's kernels need a detour, and activations are PyTorch's too.
        if choice.problem.device == "cuda" and not conf[-1]:
            _learn(conf, KINDS[name], input, weight, third, None)
        return
    with torch.cuda.device_of(input):
        plan = _plan(choice)
    if plan is not None:
        _learn(conf, KINDS[name], input, weight, third, plan)


def bound(choice: Choice, operands: Sequence[Tensor | None]) -> Callable[..., Tensor]:
    """The pass of a choice as a layer runs it, for operands like these, which are those of ``choice.run``.

    Not of a transposed layer.
    """
    problem, geometry = choice.problem, choice.problem.geometry
    options = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    conf = *options, "bound", "", False, (0, 0, 0), problem.activation
    place = ("grad_input", "grad_weight", "forward").index(problem.direction)
    input, weight, third = operands if problem.direction == "forward" else (*operands[1:], operands[0])
    assert input is not None and weight is not None
    learn(choice, problem.direction, conf, input, weight, third)

    def run_forward(*tensors: Tensor | None) -> Tensor:
        out = forward(*tensors, conf) if forward else None
        return choice.run(*tensors) if out is None else out

    def run_backward(*tensors: Tensor | None) -> Tensor:
        found = backward(*tensors, conf, place == 0, place == 1, False) if backward else None
        out = found[place] if found else None
        return choice.run(*tensors) if out is None else out

    return run_forward if problem.direction == "forward" else run_backward


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
    counts = first.partial_counts or (0,)
    parts = math.prod(count for count in counts if count is not None)
    channels_last = candidate.format == torch.channels_last_3d
    result = tuple(candidate.shape), candidate.batched, channels_last
    return places, *result, step, parts, None in counts, total


def _entry(kernel: Kernel) -> tuple[Any, ...] | None:
    found = kernel.launch.entry()
    return None if found is None else astuple(found)


def counts() -> tuple[int, int, int]:
    """How many forward passes, gradients of inputs and gradients of weights went this way."""
    return _module.counts() if _module is not None else (0, 0, 0)


def _load() -> None:
    global call, forward, backward, _learn, _module
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
    _module, _learn = module, module.learn
    call, forward, backward = module.call, module.forward, module.backward
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


def _imported(path: Path) -> Any:
    loader = ExtensionFileLoader("direct", str(path))
    spec = spec_from_loader("direct", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module
