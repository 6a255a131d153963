"""Rewrites PyTorch models to use tuned grouped 3D convolutions.

``g3dswap.convert(model, example_inputs)`` returns the same model with its grouped ``nn.Conv3d``
layers replaced by `Grouped3D` and its grouped ``nn.ConvTranspose3d`` ones by `Grouped3DTranspose`;
``g3dswap.report(model)`` says what was done, and why.
"""

from __future__ import annotations

from .convert import convert, inspect, revert, use_plan
from .module import Grouped3D, Grouped3DTranspose
from .plan import save_plan
from .report import Report, report
from .verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "Grouped3D",
    "Grouped3DTranspose",
    "Report",
    "Verification",
    "convert",
    "inspect",
    "report",
    "revert",
    "save_plan",
    "use_plan",
    "verify",
]
