"""What is done to a gradient before it is compressed: nothing, its sign, or Adam's scaling.

    gradients -> Preconditioner.apply -> compress

A model that Adam trained did not move along its gradients: a step is the gradient over the root of its second moment.
Dividing by it, or taking the sign, which needs no state, keeps a few large elements from drowning all others. The norm
that a store keeps is that of the preconditioned gradient.

Adam's divisors are kept beside the store as safetensors, and are the same for training samples and queries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dmin_trace.errors import WeightsError
from dmin_trace.settings import Precondition
from dmin_trace.weights import Trainable, places, read, write_whole


@dataclass(frozen=True)
class Preconditioner:
    """Transforms a gradient tensor by tensor, element by element.

    kind: as in `Settings`.
    names: the trained parameters, for "adam"; none otherwise.
    divisors: what the gradient of each is divided by: float32, of its shape and on its device, finite and above zero.
    """

    kind: Precondition
    names: tuple[str, ...] = ()
    divisors: tuple[torch.Tensor, ...] = ()

    def apply(self, gradients: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The gradient over adam's divisors, one tensor after another, each let go before the next is asked for.

        Of the other kinds it is handed on as it is: `compress` takes signs on its way, which is several times as fast
        for the many small tensors of a model. What is not finite stays so, for the norm to tell of.

        Args:
            gradients: of all trained parameters in their order, unscaled.
        """
        if self.kind != "adam":
            return iter(gradients)
        return (gradient / divisor for gradient, divisor in zip(gradients, self.divisors, strict=True))

    @property
    def fingerprint(self) -> str:
        """Of names, shapes and values, bit for bit; empty where there is nothing to keep."""
        if self.kind != "adam":
            return ""
        return _fingerprint(zip(self.names, self.divisors, strict=True))

    def save(self, path: Path, weights: str) -> None:
        """Writes the divisors to a safetensors file, whole or not at all; nothing where there are none.

        Args:
            path: the file.
            weights: fingerprint of the weights that they belong to.

        Raises WeightsError if it cannot be written.
        """
        if self.kind != "adam":
            return
        values = {n: d.cpu().contiguous() for n, d in zip(self.names, self.divisors, strict=True)}
        write_whole(path, values, metadata={"weights": weights})


def adam(trainable: Trainable, divisors: Sequence[torch.Tensor]) -> Preconditioner:
    """Division by these, one for each trained parameter and of its shape; they are put where the parameters are."""
    placed = [d.to(p.device, torch.float32) for d, p in zip(divisors, trainable.tensors, strict=True)]
    return Preconditioner("adam", trainable.names, tuple(placed))


def fingerprint_of(path: Path, names: Sequence[str]) -> str:
    """The fingerprint of the divisors in a file that `save` wrote. Raises WeightsError where it cannot be read."""
    saved = places([path], path)
    if set(saved) != set(names):
        raise WeightsError(f"{path} does not hold one tensor for each of the {len(names)} trained parameters.")
    return _fingerprint(zip(names, read([saved[name] for name in names]), strict=True))


def _fingerprint(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, divisor in named:
        digest.update(repr((name, tuple(divisor.shape))).encode())
        digest.update(divisor.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def load(path: Path, trainable: Trainable) -> Preconditioner:
    """Reads what `save` wrote.

    Raises WeightsError where there is no such file, or it is damaged, or not of these parameters.
    """
    if not path.is_file():
        raise WeightsError(
            f"The gradients are preconditioned by adam, but its divisors are not at {path}, where the capture left "
            "them. Put the file back, or capture again."
        )
    expected = dict(zip(trainable.names, trainable.shapes, strict=True))
    try:
        with safe_open(path, framework="pt") as opened:
            # Shapes first: a file from anybody is not believed before it fits.
            names = list(opened.keys())
            found = {name: tuple(opened.get_slice(name).get_shape()) for name in names}
            fits = found == expected and all(opened.get_slice(name).get_dtype() == "F32" for name in found)
            divisors = [opened.get_tensor(name) for name in trainable.names] if fits else []
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors: {error}. Put the right file back.") from None
    if not fits:
        raise WeightsError(
            f"{path} does not hold one float32 tensor for each of the {len(expected)} trained parameters, of its name "
            "and shape, so it belongs to another model. Put the right file back, or capture again."
        )
    if not all(usable(divisor) for divisor in divisors):
        raise WeightsError(
            f"{path} is damaged: it holds divisors that are not finite and above zero. Put the right file back."
        )
    return adam(trainable, divisors)


def weights_of(path: Path) -> str | None:
    """The fingerprint of the weights that a file of divisors belongs to, or None where there is no such file.

    Raises WeightsError where the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as opened:
            return str((opened.metadata() or {}).get("weights", ""))
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors: {error}. Remove it, or put it back.") from None


def usable(divisor: torch.Tensor) -> bool:
    """Whether every element is finite and above zero."""
    return bool((torch.isfinite(divisor) & (divisor > 0)).all())
