"""Rewrites PyTorch models to use tuned grouped 3D convolutions.

``g3dswap.convert(model, example_inputs)`` returns the same model with its grouped ``nn.Conv3d``
layers replaced by `Grouped3D` and its grouped ``nn.ConvTranspose3d`` ones by `Grouped3DTranspose`;
``g3dswap.report(model)`` says what was done, and why.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .convert import convert, inspect, revert
from .endtoend import measure_steps
from .module import Grouped3D, Grouped3DTranspose
from .plan import save_plan, use_plan
from .report import Report, report
from .verify import Verification, verify

if TYPE_CHECKING:
    from .page import save_report

__version__ = "0.1.0"

__all__ = [
    "Grouped3D",
    "Grouped3DTranspose",
    "Report",
    "Verification",
    "convert",
    "inspect",
    "measure_steps",
    "report",
    "revert",
    "save_plan",
    "save_report",
    "use_plan",
    "verify",
]


def __getattr__(name: str) -> Any:
    # It imports matplotlib: half a second, which processes that compile and time kernels need not spend.
    if name == "save_report":
        return importlib.import_module(".page", __name__).save_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
