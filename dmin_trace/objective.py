"""What the gradient is taken of where it is not the script's loss: the denoiser's output, squared (D-TRAK).

    mean over all elements of f(x_t, t)^2          arXiv 2311.00500, the squared L2 norm over the count of elements

The output is seen by a forward hook on the model as the script calls it, so what autocast, PEFT or a conditioning does
to it is in it. A loop may call several models that take a timestep (a ControlNet and its UNet, a student and its
teacher): the denoiser is the one called last of those whose output the script's loss depends on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import Node

from dmin_trace.errors import CaptureError


@dataclass(frozen=True)
class Output:
    """What a model answered, as a part of the graph.

    model: its class, for a person to read.
    kind: what it returned, likewise.
    node: where it stands in the graph.
    sample: a copy that follows no change in place; None where no one tensor is the answer.
    """

    model: str
    kind: str
    node: Node
    sample: torch.Tensor | None


def seen(module: torch.nn.Module, output: Any) -> Output | None:
    """The output of a call, or None where no gradient goes through it.

    Args:
        module: what was called.
        output: a tensor, a container with the tensor `sample`, as diffusers' models give, or a tuple that begins with
            the tensor.
    """
    sample = _sample(output)
    nodes = [tensor.grad_fn for tensor in ([sample] if sample is not None else _tensors(output))]
    through = [node for node in nodes if node is not None]
    if not through:
        return None
    return Output(type(module).__name__, type(output).__name__, through[0], None if sample is None else sample.clone())


def squared_output(outputs: Sequence[Output], loss: torch.Tensor) -> torch.Tensor:
    """The mean of the squares of the denoiser's output, a float32 scalar.

    Args:
        outputs: of the models that were called for the loss, in order.
        loss: the script's own.

    Raises CaptureError where it cannot be told which output is the denoiser's, or which part of it is.
    """
    for output in reversed(outputs):
        if not _depends_on(loss, output.node):
            continue
        if output.sample is None:
            raise CaptureError(
                f"objective='squared_output': the last model whose output the loss depends on, {output.model}, gave "
                f"a {output.kind}; expected a tensor, a tuple that begins with one, or an output with .sample. If it "
                "serves another model, that one must be among the variables of the loop, or given to the recording. "
                "Otherwise capture with objective='loss'."
            )
        return output.sample.float().square().mean()
    called = ", ".join(dict.fromkeys(output.model for output in outputs)) or "none with a gradient"
    raise CaptureError(
        "objective='squared_output': it cannot be told which model is the denoiser. It must take a timestep, be called "
        f"as model(...), and the loss must depend on its output; of those that take one were called: {called}. Capture "
        "with objective='loss'."
    )


def _sample(output: Any) -> torch.Tensor | None:
    """The one tensor that is a model's answer, or None."""
    if isinstance(output, torch.Tensor):
        return output
    found = output.get("sample") if isinstance(output, Mapping) else getattr(output, "sample", None)
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    return found if isinstance(found, torch.Tensor) else None


def _tensors(output: Any) -> list[torch.Tensor]:
    """The tensors in nested containers."""
    if isinstance(output, torch.Tensor):
        return [output]
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _depends_on(loss: torch.Tensor, node: Node) -> bool:
    """Whether the node is in the loss's graph. It mostly is near the loss, and found after a few steps."""
    known: set[Node] = set()
    waiting = [loss.grad_fn]
    while waiting:
        further: list[Node | None] = []
        for one in waiting:
            if one is node:
                return True
            if one is not None and one not in known:
                known.add(one)
                further += [before for before, _ in one.next_functions]
        waiting = further
    return False
