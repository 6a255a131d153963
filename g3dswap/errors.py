"""The exceptions that g3dswap raises.

Every message is one sentence that names the value, the rule it breaks and the remedy.
Where PyTorch users expect a built-in type (``ValueError`` for a bad argument, say), the class
derives from it as well.
"""

from __future__ import annotations


class G3DSwapError(Exception):
    """Base of every error that g3dswap raises on purpose."""


class G3DSwapWarning(UserWarning):
    """Something was survived (a damaged cache, a missing compiler) and the user should know, once."""


class ArgumentError(G3DSwapError, ValueError):
    """An argument has a value that its rule forbids."""


class InputError(ArgumentError, RuntimeError):
    """A tensor of a shape, dtype or device that a layer cannot take; nn.Conv3d raises a RuntimeError."""


class InputTypeError(ArgumentError, TypeError):
    """Something else where a layer needs a tensor; nn.Conv3d raises a TypeError."""


class NotationError(G3DSwapError, ValueError):
    """Text that is not a tensor comprehension; the message shows the line with a caret."""


class RangeError(G3DSwapError, ValueError):
    """The range of an index cannot be inferred, or contradicts a tensor's size."""


class NestError(G3DSwapError):
    """A loop nest breaks an invariant of the IR; always a defect in the pass that made it."""


class ScheduleError(G3DSwapError, ValueError):
    """A schedule that does not fit its nest or its target."""


class CompileError(G3DSwapError, RuntimeError):
    """A printed kernel could not be compiled or loaded."""


class NoCompilerError(CompileError):
    """No compiler for the target on this machine."""


class ProcessError(G3DSwapError, RuntimeError):
    """A child process that compiles or measures kernels ended, or cannot be started."""


class CacheError(G3DSwapError, OSError):
    """The options cache cannot be used as asked."""


class PlanError(G3DSwapError, ValueError):
    """A plan file is damaged or belongs to another model."""


class ConvertError(G3DSwapError, RuntimeError):
    """A model or layer cannot be converted under the asked rules."""


class FusedError(ConvertError):
    """A layer that was fused for inference is asked for something that only what it was made of can do."""


class CheckpointError(G3DSwapError, ValueError):
    """A checkpoint cannot be read, trusted or written as asked."""


class VerificationError(G3DSwapError, AssertionError):
    """Outputs or gradients differ from the float64 reference by more than the bound."""


def first_line(error: BaseException, otherwise: str = "") -> str:
    """The first line of an exception's message; many go on with advice or a trace."""
    return (str(error).strip().splitlines() or [otherwise])[0]


def described(error: BaseException, most: int | None = None) -> str:
    """An exception in one line, with its class; of its message so many characters at most."""
    first = first_line(error)[:most].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
