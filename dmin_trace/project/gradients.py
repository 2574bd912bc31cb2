"""The gradient of a loss with respect to the trained parameters, one tensor after another.

Paper, equation 3: the gradient is taken at the final parameters. `torch.autograd.grad` does not touch `.grad`, the
GradScaler, the division for gradient accumulation or DDP's synchronisation.
"""

from collections.abc import Iterator, Sequence

import torch

LOSS_SCALE = 1024.0
"""Under float16 autocast the loss is multiplied by this constant, so that small gradients do not vanish. A GradScaler's
own scale changes during training, so a query's gradients would be rounded differently from those of the trace."""


def take_gradient(
    loss: torch.Tensor, parameters: Sequence[torch.Tensor], scale: float = 1.0
) -> tuple[Iterator[torch.Tensor], list[bool]]:
    """Takes the gradient of a scalar with respect to the parameters.

    The loss is multiplied by `scale` before the backward pass, and the gradients are divided by it.

    Returns:
        An iterator over the gradients, each with its parameter's shape, zeros if the loss does not depend on the
        parameter; each is freed before the next is made. And for each parameter whether the loss depends on it.
    """
    scaled = loss * scale if scale != 1.0 else loss
    taken: list[torch.Tensor | None] = [*torch.autograd.grad(scaled, parameters, allow_unused=True)]
    reached = [gradient is not None for gradient in taken]
    taken.reverse()

    def hand_out() -> Iterator[torch.Tensor]:
        for parameter in parameters:
            gradient = taken.pop()
            if gradient is None:
                # One zero, expanded to the shape: no memory.
                gradient = torch.zeros((), device=parameter.device).expand(parameter.shape)
            elif scale != 1.0:
                gradient = gradient.float() / scale
            yield gradient
            # Without this it would stay alive while the next is made.
            del gradient

    return hand_out(), reached


class Mean:
    """The mean of several gradients, which are added one tensor at a time. It holds one gradient in float32.

    Gradients may be subtracted too: then it is the mean of the differences.
    """

    def __init__(self, count: int) -> None:
        """Begins the mean of `count` gradients, or of `count` differences of two."""
        self._count = count
        self._sums: list[torch.Tensor] = []

    def add(self, taken: Iterator[torch.Tensor], sign: int = 1) -> None:
        """Adds a gradient, or subtracts it if `sign` is -1. Its tensors come in the order of those before."""
        if self._sums:
            for total, gradient in zip(self._sums, taken, strict=True):
                total.add_(gradient, alpha=sign)
        else:
            # Copies: autograd may give one tensor for two parameters, or an expanded number.
            layout = torch.contiguous_format
            copies = (gradient.to(torch.float32, copy=True, memory_format=layout) for gradient in taken)
            self._sums = [copy if sign == 1 else copy.neg_() for copy in copies]

    def hand_out(self) -> Iterator[torch.Tensor]:
        """Yields the mean, one tensor after another, and keeps none."""
        sums, self._sums = self._sums[::-1], []
        while sums:
            yield sums.pop().div_(self._count)
