"""A gradient becomes v numbers: pure torch and numpy, no files.

    loss -> gradients -> transform (sign) -> compress -> projected gradient (v,) and norm

`gradients` takes the gradient of a loss, `plan` fixes the random projection, and `compress` projects and normalises.
"""

from dmin_trace.project.compress import Plan, compress_gradient, make_plan, project
from dmin_trace.project.gradients import LOSS_SCALE, Mean, take_gradient

__all__ = ["LOSS_SCALE", "Mean", "Plan", "compress_gradient", "make_plan", "project", "take_gradient"]
