"""Compresses a gradient with a `Plan`: its tensors are added up in the plan's bins, and the result is normalised.

A projection is linear, so tensors are added one after another at their place in the gradient, without a copy of the
whole. Rotation runs in C on a CPU (`backend_c`) and in Triton on a CUDA device (`backend_triton`). On other devices,
for the uniform kind, or where the C module was not built or Triton is missing, `backend_torch` runs. All add up the
same numbers, and differ by rounding only.
"""

from collections.abc import Iterable, Iterator
from itertools import chain

import torch

from dmin_trace.errors import CaptureError
from dmin_trace.project import backend_c, backend_triton
from dmin_trace.project.backend_c import CSums
from dmin_trace.project.backend_torch import TorchSums
from dmin_trace.project.backend_triton import TritonSums
from dmin_trace.project.plan import Plan


def project(tensors: Iterable[torch.Tensor], plan: Plan, *, signs: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds up the tensors, flattened and laid end to end, in the plan's bins.

    Sums are float32 for every dtype of the gradient. Squares are summed in float32 within a part of a row and in
    float64 beyond it: elements above 1e19 make the norm infinite, and those below 1e-23 are lost in it.

    Args:
        tensors: the gradient in parts, L elements in all. Each part is freed before the next is requested.
        plan: the projection.
        signs: replace each element by its sign; see `Settings.transform`.

    Returns:
        The projected gradient, (v,) float32, not normalised, and the squared L2 norm of the gradient, a float64
        scalar. Both are on the first tensor's device, which is not synchronised.

    Raises:
        CaptureError: the tensors do not hold L elements.
    """
    return _added(tensors, plan, signs).finish()


def compress_gradient(
    tensors: Iterable[torch.Tensor], plan: Plan, *, signs: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Projects the gradient and divides the result by its own norm, so that inner products estimate cosines.

    The paper divides by the gradient's norm before it projects (section 3.2), which gives norms of about one. Dividing
    by the projected gradient's norm is OPORP's normalised estimator. Its variance has the factor (1 - cos^2)^2 where
    the other has 1 + cos^2, so similar gradients are told apart best, and the product of a gradient with itself is
    one. On a trained model's gradients the errors of scores are 1.3 to 1.7 times smaller (docs/performance.md).

    Takes what `project` takes, and raises what it raises. With `signs`, the norm is that of the signs.

    Returns:
        The projected gradient, (v,) float32, with norm one, or all zeros if the gradient's norm is 0, infinite or NaN;
        and the gradient's norm, a float32 scalar.
    """
    return _added(tensors, plan, signs).finish_normalised()


def _added(tensors: Iterable[torch.Tensor], plan: Plan, signs: bool) -> CSums | TorchSums | TritonSums:
    """Returns the sums of a whole gradient."""
    rest = iter(tensors)
    first = next(rest, None)
    device = torch.device("cpu") if first is None else first.device
    sums: CSums | TorchSums | TritonSums
    if backend_c.KERNEL is not None and plan.kind == "rotation" and device.type == "cpu":
        sums = CSums(plan, backend_c.KERNEL, signs)
    elif plan.kind == "rotation" and device.type == "cuda" and (kernels := backend_triton.load_kernels()) is not None:
        sums = TritonSums(plan, device, kernels, signs)
    else:
        sums = TorchSums(plan, device, signs)
    rest = chain(_pop_all([] if first is None else [first]), rest)
    # Without this a tensor would stay alive while the next is made.
    del first
    count = sums.add(rest)
    if count != plan.length:
        more = " or more" if count > plan.length else ""
        raise CaptureError(
            f"The gradient has {count} elements{more}; expected {plan.length}, as its projection was made for. Give "
            "the gradients of all trained parameters, each once, in the order of the parameters."
        )
    return sums


def _pop_all(tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yields the tensors and keeps no reference to them."""
    while tensors:
        yield tensors.pop(0)
