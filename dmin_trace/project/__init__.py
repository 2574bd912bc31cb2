"""A gradient becomes v numbers: torch and numpy, no files.

    loss -> gradients -> transform (sign) -> compress -> projected gradient (v,) and norm

`gradients` takes the gradient of a loss, `plan` fixes the random projection, and `compress` projects and normalises, in
C (`backend_c`), Triton (`backend_triton`) or torch (`backend_torch`). A plan needs no torch, so the other names are
imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dmin_trace.project.plan import Plan, make_plan

if TYPE_CHECKING:
    from dmin_trace.project.compress import compress_gradient, project
    from dmin_trace.project.gradients import LOSS_SCALE, Mean, take_gradient

__all__ = ["LOSS_SCALE", "Mean", "Plan", "compress_gradient", "make_plan", "project", "take_gradient"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "compress" if name in ("compress_gradient", "project") else "gradients"
    return getattr(import_module(f"{__name__}.{module}"), name)
