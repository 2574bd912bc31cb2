"""Where Adam's second moment is found: in the optimizer at the end of a training, or in a checkpoint of it on demand.

The divisor of a parameter is what its Adam or AdamW step divides by (torch.optim.adamw, arXiv 1711.05101):

    sqrt(exp_avg_sq) / sqrt(1 - beta2 ** step) + eps          max_exp_avg_sq in its place with amsgrad

NAdam has the same, and RAdam but for where eps goes. It is the moment of the weights that the optimizer moves, also
where averaged weights (EMA) are captured: the average has no moment of its own.

A checkpoint can come from anywhere: torch reads it with `weights_only`, which executes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dmin_trace import precondition
from dmin_trace.errors import AttachError, CaptureError, WeightsError
from dmin_trace.precondition import Preconditioner
from dmin_trace.weights import Trainable

OPTIMIZER = "optimizer.bin"
"""accelerate's name for an optimizer's state in a checkpoint; a second optimizer's is in `optimizer_1.bin`."""

_INSTEAD = "Train with AdamW, or precondition by sign, which needs no state."

Moment = tuple[torch.nn.Parameter, Any, Mapping[str, Any]]
"""A parameter, the optimizer's state of it (None if it never moved it), and the options of its group."""


def refuse_optimizers(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Before the training: raises AttachError for an optimizer that is known to keep no second moment as needed."""
    for optimizer in optimizers:
        # accelerate's wrapper passes these on, its class it does not.
        inner = getattr(optimizer, "optimizer", optimizer)
        kind = type(inner).__name__
        if any(parent.__module__.partition(".")[0] == "bitsandbytes" for parent in type(inner).__mro__):
            raise AttachError(f"precondition='adam' {_quantised(kind)}")
        if not all(_is_adams(group) for group in optimizer.param_groups):
            raise AttachError(f"precondition='adam' {_without(kind)}")


def has_state(optimizers: Sequence[torch.optim.Optimizer], trainable: Trainable) -> bool:
    """Whether the optimizers have moved any of the parameters."""
    return any(optimizer.state.get(tensor) for optimizer in optimizers for tensor in trainable.tensors)


def from_optimizers(trainable: Trainable, optimizers: Sequence[torch.optim.Optimizer]) -> Preconditioner:
    """Adam's scaling at this point of the training. Copies what it reads, and changes nothing.

    A parameter that no optimizer has moved gets the divisor 1; its gradient is zero anyway.

    Raises CaptureError where the optimizers keep no second moment, or not as plain numbers.
    """
    try:
        return _collect(trainable, optimizers, (_moments(optimizer) for optimizer in optimizers))
    except ValueError as error:
        raise CaptureError(f"precondition='adam' {error}") from None


def from_checkpoint(trainable: Trainable, optimizers: Sequence[torch.optim.Optimizer], path: Path) -> Preconditioner:
    """Adam's scaling as a checkpoint of accelerate holds it.

    Args:
        trainable: the trained parameters.
        optimizers: the script's own, in the order in which they were prepared; their states are not looked at. Saved
            states are numbered in the order of their parameters.
        path: `optimizer.bin`, with `optimizer_1.bin` and so on beside it if there are several.

    Raises WeightsError where a file is missing or damaged, or is not the state of such an optimizer.
    """
    files = [path.with_name(f"{path.stem}_{k}{path.suffix}") if k else path for k in range(len(optimizers))]
    if gone := [str(file) for file in files if not file.is_file()]:
        raise WeightsError(
            f"The script trains with {len(files)} optimizers, but there is no {', '.join(gone)}. Give a checkpoint "
            "that accelerator.save_state wrote, with --optimizer."
        )
    try:
        saved = (_saved_moments(optimizer, file) for optimizer, file in zip(optimizers, files, strict=True))
        return _collect(trainable, optimizers, saved)
    except ValueError as error:
        raise WeightsError(f"{path} is of no use: precondition='adam' {error}") from None


def find(
    trainable: Trainable,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    given: Path | None,
    weights: Path,
    beside: Path,
) -> Preconditioner:
    """Adam's scaling for a capture on demand.

    Args:
        trainable: the trained parameters, with the weights in them.
        optimizers: the script's own, as for `from_checkpoint`.
        given: where the user says it is: a file, or a folder with `optimizer.bin`.
        weights: where the weights were read from: a checkpoint has both.
        beside: what an earlier capture of these weights left beside the store.

    Raises WeightsError where there is nothing, saying what was looked for, or where what is there does not fit.
    """
    if given is not None:
        file = given / OPTIMIZER if given.is_dir() else given
        if not file.is_file():
            raise WeightsError(
                f"There is no optimizer state at {file}. Give the {OPTIMIZER} of a checkpoint that "
                "accelerator.save_state wrote, or its folder, with --optimizer."
            )
        if file.suffix == ".safetensors":
            return precondition.load(file, trainable)
        return from_checkpoint(trainable, optimizers, file)
    folders = [weights if weights.is_dir() else weights.parent]
    if folders[0].parent.name.startswith("checkpoint"):
        # diffusers' scripts keep a model of a checkpoint in a folder in it.
        folders.append(folders[0].parent)
    states = [folder / OPTIMIZER for folder in folders]
    for state in states:
        if state.is_file():
            return from_checkpoint(trainable, optimizers, state)
    kept = [beside]
    if weights.name.endswith(".weights.safetensors"):
        kept.insert(0, weights.with_name(weights.name.replace(".weights.safetensors", ".precondition.safetensors")))
    found = find_kept(trainable, kept)
    if found is None:
        looked = ", ".join(str(path) for path in dict.fromkeys((*states, *kept)))
        raise WeightsError(
            "precondition='adam' needs the optimizer's second moment at the end of the training, and none of these "
            f"weights was found; looked for {looked}. Give the last checkpoint that accelerator.save_state wrote, with "
            "--optimizer, or precondition by sign, which needs none."
        )
    return found


def find_kept(trainable: Trainable, paths: Sequence[Path]) -> Preconditioner | None:
    """What an earlier capture of the very weights in the trainables kept at one of the paths, or None.

    Raises WeightsError for a damaged file.
    """
    own: str | None = None
    for path in paths:
        of = precondition.weights_of(path)
        if of is None:
            continue
        own = own or trainable.weights_fingerprint()
        if of == own:
            return precondition.load(path, trainable)
    return None


def _moments(optimizer: torch.optim.Optimizer) -> Iterator[Moment]:
    """The state of each parameter in a live optimizer."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # .get: the state is a defaultdict, and must not grow.
            yield parameter, optimizer.state.get(parameter), group


def _saved_moments(optimizer: torch.optim.Optimizer, path: Path) -> Iterator[Moment]:
    """The same from a file."""
    try:
        # Mapped: what is not looked at, such as the first moment, is not read.
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(saved, dict):
            raise TypeError(f"it holds a {type(saved).__name__}")
        states, saved_groups = saved["state"], saved["param_groups"]
        numbers = [list(group["params"]) for group in saved_groups]
        found = [states.get(number) for group in numbers for number in group]
    except Exception as error:
        # What a damaged pickle raises is anything; what a strange one would do is not done.
        raise WeightsError(
            f"{path} cannot be read as the state of an optimizer: {_first_line(error)} Give the {OPTIMIZER} of a "
            "checkpoint that accelerator.save_state wrote, with --optimizer."
        ) from None
    groups = optimizer.param_groups
    ours, theirs = [len(group["params"]) for group in groups], [len(group) for group in numbers]
    if ours != theirs:
        raise WeightsError(
            f"{path} is the state of an optimizer of {_counts(theirs)} parameters, but the script's has "
            f"{_counts(ours)}. Give the checkpoint of this training."
        )
    parameters = [(p, saved) for group, saved in zip(groups, saved_groups, strict=True) for p in group["params"]]
    for (parameter, options), state in zip(parameters, found, strict=True):
        yield parameter, state, options


def _collect(
    trainable: Trainable, optimizers: Sequence[torch.optim.Optimizer], moments: Iterator[Iterator[Moment]]
) -> Preconditioner:
    """Raises ValueError with the end of a sentence for a state that is no use."""
    wanted = {id(tensor): name for name, tensor in zip(trainable.names, trainable.tensors, strict=True)}
    divisors: dict[str, torch.Tensor] = {}
    for optimizer, its_moments in zip(optimizers, moments, strict=True):
        kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
        for parameter, state, group in its_moments:
            name = wanted.get(id(parameter))
            if name is not None and state:
                divisors[name] = _divisor(name, tuple(parameter.shape), state, group, kind)
    if not divisors:
        kinds = " and ".join(dict.fromkeys(type(getattr(o, "optimizer", o)).__name__ for o in optimizers))
        raise ValueError(_without(kinds or "no optimizer"))
    return precondition.adam(
        trainable,
        [
            divisors[name] if name in divisors else torch.ones(shape)
            for name, shape in zip(trainable.names, trainable.shapes, strict=True)
        ],
    )


def _divisor(name: str, shape: tuple[int, ...], state: Any, group: Mapping[str, Any], kind: str) -> torch.Tensor:
    """What the optimizer's next step would divide a parameter's gradient by; float32, computed on the CPU.

    Raises ValueError with the end of a sentence for a state that is no use.
    """
    if not isinstance(state, Mapping):
        raise ValueError(_without(kind))
    if "state2" in state:
        raise ValueError(_quantised(kind))
    largest = group.get("amsgrad") is True and "max_exp_avg_sq" in state
    moment = state.get("max_exp_avg_sq" if largest else "exp_avg_sq")
    # apex counts the steps of a group.
    step = state.get("step", group.get("step"))
    if moment is None or step is None or not _is_adams(group):
        raise ValueError(_without(kind))
    if type(moment) is not torch.Tensor or not moment.is_floating_point() or moment.layout != torch.strided:
        what = f"{type(moment).__name__} of {getattr(moment, 'dtype', 'no dtype')}"
        raise ValueError(
            f"needs the second moment of {name} as plain numbers; the optimizer {kind} keeps a {what}. {_INSTEAD}"
        )
    if tuple(moment.shape) != shape:
        raise ValueError(
            f"needs a second moment for each parameter; that of {name} has shape {tuple(moment.shape)}, the parameter "
            f"{shape}. Give the checkpoint of this training."
        )
    beta, eps, count = (_number(value) for value in (group["betas"][1], group["eps"], step))
    correction = 1 - beta**count if 0 <= beta < 1 and count > 0 else 0.0
    # Rounded alike wherever the optimizer ran, and a copy of its own.
    root = moment.detach().to("cpu", torch.float32, copy=True).sqrt_()
    divisor = root.div_(correction**0.5).add_(eps) if correction > 0 else root.fill_(torch.nan)
    if not precondition.usable(divisor):
        raise ValueError(
            f"needs a second moment that is finite, after one step or more; that of {name} is not, after {count:g}. "
            f"Did the training diverge? {_INSTEAD}"
        )
    return divisor


def _is_adams(group: Mapping[str, Any]) -> bool:
    """Whether a group has the options of an Adam."""
    betas, eps = group.get("betas"), group.get("eps")
    if not isinstance(betas, (list, tuple)) or len(betas) != 2:
        return False
    return isinstance(betas[1], (float, torch.Tensor)) and isinstance(eps, (float, torch.Tensor))


def _number(value: Any) -> float:
    """A number of an optimizer's, which may keep it as a tensor; nan for anything else."""
    single = isinstance(value, (int, float)) or isinstance(value, torch.Tensor) and value.numel() == 1
    return float(value) if single else math.nan


def _without(kind: str) -> str:
    return (
        "needs the second moment of an Adam (exp_avg_sq, the count of steps, betas and eps), which the optimizer "
        f"{kind} does not have. {_INSTEAD}"
    )


def _quantised(kind: str) -> str:
    return (
        f"needs the second moment as numbers, but the optimizer {kind} (bitsandbytes) keeps it in a form of its own, "
        f"quantised to 8 bits or less (state2). {_INSTEAD}"
    )


def _counts(counts: Sequence[int]) -> str:
    return " + ".join(map(str, counts))


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}."
