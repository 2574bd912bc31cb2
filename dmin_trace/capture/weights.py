"""The trainable parameters of a run: which they are, their fingerprint, and how they are saved and loaded."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dmin_trace.capture import weight_files
from dmin_trace.capture.weight_files import KeyConverter, SavedTensor, Shape
from dmin_trace.errors import CaptureError, WeightsError


@dataclass(frozen=True)
class Trainable:
    """The parameters that training moves, in a fixed order.

    names, tensors: `module.parameter`, with the model's number in front if several models train; and the parameters.
    places: the number of the model that each belongs to, and its name in that model.
    """

    names: tuple[str, ...]
    tensors: tuple[torch.nn.Parameter, ...]
    places: tuple[tuple[int, str], ...]

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return tuple(tuple(p.shape) for p in self.tensors)

    @property
    def length(self) -> int:
        """L, the number of gradient elements."""
        return sum(p.numel() for p in self.tensors)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names and shapes, which tell what each gradient element belongs to."""
        return hashlib.sha256(repr((self.names, self.shapes)).encode()).hexdigest()

    def weights_fingerprint(self) -> str:
        """Returns the SHA-256 over all values, bit for bit. Reads every parameter once."""
        return _fingerprint(zip(self.names, self.tensors, strict=True))

    def equals_saved(self, path: Path) -> bool:
        """Whether the values are those in a file that `save` wrote, but for a cast to another dtype since then.

        Reads one tensor at a time. True if it can no longer be told: parameters that were freed. Raises WeightsError
        if the file cannot be read.
        """
        saved = weight_files.list_saved([path], path)
        for parameter, value in zip(self.tensors, weight_files.read([saved[name] for name in self.names]), strict=True):
            if parameter.device.type == "meta" or parameter.shape != value.shape:
                return True
            if not torch.equal(value.to(parameter.dtype), parameter.detach().cpu()):
                return False
        return True

    def save(self, path: Path) -> None:
        """Writes the values to a safetensors file, whole or not at all. Raises WeightsError if it cannot be written."""
        named = zip(self.names, self.tensors, strict=True)
        weight_files.write_whole(path, {name: tensor.detach().cpu().contiguous() for name, tensor in named})

    def load(self, path: Path, convert: KeyConverter | None = None) -> None:
        """Reads every value from a safetensors file, or from those in a folder or in its subfolders.

        Accepts a parameter's name with another adapter's name or none, alone or after a prefix (`unet.`) that all
        parameters of its model have, and no other model. Raises WeightsError, and changes nothing, if there is no such
        file, it cannot be read, a tensor is missing or has another shape, or more than one fits.
        """
        refusals: list[WeightsError] = []
        for files in weight_files.find_files(path):
            saved = weight_files.list_saved(files, path, convert)
            try:
                values = self._read(path, saved)
            except WeightsError as error:
                refusals.append(error)
                continue
            with torch.no_grad():
                for parameter, value in zip(self.tensors, values, strict=True):
                    parameter.copy_(value)
            return
        raise refusals[0]

    def _read(self, path: Path, saved: Mapping[str, SavedTensor]) -> list[torch.Tensor]:
        if all(name in saved for name in self.names):
            # The script's own names come first: a checkpoint may also hold the same weights in a release's format.
            chosen = [saved[name] for name in self.names]
        else:
            models: dict[int, dict[str, Shape]] = {owner: {} for owner, _ in sorted(self.places)}
            for (owner, name), shape in zip(self.places, self.shapes, strict=True):
                models[owner][name] = shape
            queues = {owner: iter(found) for owner, found in weight_files.match_models(path, models, saved).items()}
            chosen = [next(queues[owner]) for owner, _ in self.places]
        values = list(weight_files.read(chosen))
        for name, parameter, value in zip(self.names, self.tensors, values, strict=True):
            if value.shape != parameter.shape:
                raise weight_files.wrong_shape(path, name, tuple(value.shape), tuple(parameter.shape))
        return values


def fingerprint_of(path: Path, names: Sequence[str]) -> str:
    """Returns the fingerprint of weights in a file. Raises WeightsError if it cannot be read, or lacks a name."""
    saved = weight_files.list_saved([path], path)
    if missing := [name for name in names if name not in saved]:
        raise WeightsError(f"{path} lacks {len(missing)} of the {len(names)} tensors that the trace is of.")
    return _fingerprint(zip(names, weight_files.read([saved[name] for name in names]), strict=True))


def _fingerprint(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def find_trainable(models: Sequence[torch.nn.Module], optimizers: Sequence[torch.optim.Optimizer] | None) -> Trainable:
    """Returns the trainable parameters, those in the optimizers if they are known. Raises CaptureError for none."""
    groups = [group for optimizer in optimizers or () for group in optimizer.param_groups]
    optimized = {id(p) for group in groups for p in group["params"]}
    trainable = _choose(models, lambda name, p: p.requires_grad and (optimizers is None or id(p) in optimized))
    if trainable.tensors:
        return trainable
    if optimizers is None:
        raise CaptureError("No parameter of the model is trainable (requires_grad), so there is nothing to capture.")
    raise CaptureError(
        "No trainable parameter of a prepared model is in a prepared optimizer. Pass the model and its optimizer "
        "to accelerator.prepare, or to recording."
    )


def find_named(models: Sequence[torch.nn.Module], names: Sequence[str]) -> Trainable:
    """Returns the parameters with these names (see `Trainable`), trainable or not. Unknown names are left out."""
    wanted = set(names)
    return _choose(models, lambda name, parameter: name in wanted)


def _choose(models: Sequence[torch.nn.Module], accept: Callable[[str, torch.nn.Parameter], bool]) -> Trainable:
    """The parameters that `accept` takes by their full names, each once."""
    chosen: dict[int, tuple[str, torch.nn.Parameter, tuple[int, str]]] = {}
    for k, model in enumerate(models):
        for name, parameter in model.named_parameters():
            full = name if len(models) == 1 else f"{k}.{name}"
            if accept(full, parameter):
                chosen.setdefault(id(parameter), (full, parameter, (k, name)))
    columns = zip(*chosen.values(), strict=True) if chosen else [()] * 3
    return Trainable(*columns)
