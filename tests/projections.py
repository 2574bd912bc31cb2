"""Plans, gradients and the slow definition of a projection for the tests of `project`."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from dmin_trace.project import Plan, backend_c, make_plan
from dmin_trace.settings import Projection

needs_kernel = pytest.mark.skipif(backend_c.KERNEL is None, reason="_rows was not built: is there a compiler?")

KIND_PARAMS = [pytest.param("rotation", marks=needs_kernel), "rotation in torch", "uniform"]


def kind_of(param: str, monkeypatch: pytest.MonkeyPatch) -> Projection:
    """Both kinds; rotation by the compiled kernel, and as where that is missing."""
    if param == "rotation in torch":
        monkeypatch.setattr(backend_c, "KERNEL", None)
    return "uniform" if param == "uniform" else "rotation"


def small_plan(kind: Projection, length: int = 1000, dimension: int = 16, seed: int = 0, width: int = 128) -> Plan:
    """A plan of many rows: those of `make_plan` are too wide for a quick test."""
    plan = make_plan(length, dimension, seed, kind)
    return replace(plan, width=width) if kind == "rotation" else plan


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oracle(x: np.ndarray, plan: Plan) -> np.ndarray:
    """The definition, one element at a time, in float64."""
    if plan.kind == "uniform":
        # The published code: pad, permute, signs, sum groups; only the numbers are ours.
        seed = hashlib.sha256(f"dmin_trace uniform {plan.seed} order".encode()).digest()
        padded = np.zeros(-(-plan.length // plan.dimension) * plan.dimension)
        padded[: plan.length] = x * plan.signs()
        order = np.random.RandomState(np.frombuffer(seed, "<u4")).permutation(len(padded))
        return padded[order].reshape(plan.dimension, -1).sum(-1)
    sums, sketch = np.zeros(plan.width), np.zeros(plan.dimension)
    shifts, row_signs, column_signs, signs = plan.shifts(), plan.row_signs(), plan.column_signs(), plan.signs()
    for i, value in enumerate(x):
        r, c = divmod(i, plan.width)
        sums[(c + shifts[r]) % plan.width] += value * row_signs[r] * column_signs[c]
    for k, place in enumerate(plan.order()):
        sketch[k % plan.dimension] += sums[place] * signs[place]
    return sketch
