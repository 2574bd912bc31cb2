"""What is done to each element of a gradient before the projection: `Settings.transform`.

    none   nothing, as in the paper
    sign   the element is replaced by its sign: -1, 0 or 1. An element that is exactly zero has sign 0, so parameters
           that the loss does not reach add nothing to inner products and norms.

The C kernel takes signs by itself, with the same results.
"""

from __future__ import annotations

import torch


def signs_of(gradient: torch.Tensor) -> torch.Tensor:
    """Returns the sign of each element, and NaN for an element that is not finite, so that the norm is NaN too."""
    # torch.sign gives 0 for NaN, and 1 for infinity.
    return torch.sign(gradient).masked_fill_(~torch.isfinite(gradient), torch.nan)
