"""The trainable tensors of a run: which they are, what they hold, written beside the store and read back.

Only safetensors is read or written: a weight file can come from anywhere, and a pickle can run a program.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dmin_trace.errors import CaptureError, WeightsError

KeyConverter = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
"""Turns the keys of a host's weight file into the names of its modules' parameters."""


@dataclass(frozen=True)
class Trainable:
    """The parameters that training moves, in a fixed order.

    names: `module.parameter`, with the model's number in front where several models train.
    tensors: the parameters themselves.
    """

    names: tuple[str, ...]
    tensors: tuple[torch.nn.Parameter, ...]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each parameter."""
        return tuple(tuple(p.shape) for p in self.tensors)

    @property
    def length(self) -> int:
        """L, the number of gradient elements."""
        return sum(p.numel() for p in self.tensors)

    @property
    def fingerprint(self) -> str:
        """Of names and shapes: what a gradient's elements belong to."""
        return hashlib.sha256(repr((self.names, self.shapes)).encode()).hexdigest()

    def weights_fingerprint(self) -> str:
        """Of the values, bit for bit. Reads every parameter once."""
        digest = hashlib.sha256()
        for name, tensor in zip(self.names, self.tensors, strict=True):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            raw = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu()
            digest.update(raw.numpy().data)
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Writes the values to a safetensors file, whole or not at all."""
        partial = path.with_name(f".{path.name}.partial")
        values = {n: p.detach().cpu().contiguous() for n, p in zip(self.names, self.tensors, strict=True)}
        save_file(values, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)

    def load(self, path: Path, convert: KeyConverter | None = None) -> None:
        """Reads every value from a safetensors file, or from the files in a folder.

        Accepts the parameter's name, alone or after a model's name (`unet.`), with or without an adapter's name.

        Raises:
            WeightsError: no such file, an unreadable one, or one that lacks a tensor or has it in another shape, or
                has them all under two models' names. Nothing is changed then.
        """
        found = read_weights(path)
        if convert is not None:
            found = convert(found)
        values = _find(self.names, found, path)
        missing = [name for name, value in zip(self.names, values, strict=True) if value is None]
        if missing:
            raise WeightsError(
                f"{path} lacks {len(missing)} of the {len(self.names)} trainable tensors, among them "
                f"{', '.join(missing[:3])}. Give the weights that this script saved, or a checkpoint of its training."
            )
        for name, parameter, value in zip(self.names, self.tensors, values, strict=True):
            if value is not None and value.shape != parameter.shape:
                raise WeightsError(
                    f"{path} holds {name} with shape {tuple(value.shape)}, but the script's model has "
                    f"{tuple(parameter.shape)}. Give the weights that this script saved."
                )
        with torch.no_grad():
            for parameter, value in zip(self.tensors, values, strict=True):
                if value is not None:
                    parameter.copy_(value)


def find_trainable(models: Sequence[torch.nn.Module], optimizers: Sequence[torch.optim.Optimizer]) -> Trainable:
    """The parameters of the models that are both trainable and in an optimizer, each once.

    Raises CaptureError if there are none.
    """
    optimized = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    names: list[str] = []
    tensors: list[torch.nn.Parameter] = []
    seen: set[int] = set()
    for k, model in enumerate(models):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) in optimized and id(parameter) not in seen:
                seen.add(id(parameter))
                names.append(name if len(models) == 1 else f"{k}.{name}")
                tensors.append(parameter)
    if not tensors:
        raise CaptureError(
            "No trainable parameter of a prepared model is in a prepared optimizer. Pass the model and its optimizer "
            "to accelerator.prepare."
        )
    return Trainable(tuple(names), tuple(tensors))


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file, or every one in a folder, or else in the folders directly in it.

    A key from a folder within (a pipeline's `unet`) has that folder's name in front, and one from accelerate's
    checkpoint of several models (`model.safetensors`, `model_1.safetensors`) the model's number.

    Raises WeightsError where there is none, or where one cannot be read.
    """
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*/*.safetensors"))
    else:
        raise WeightsError(f"There are no weights at {path}. Give a .safetensors file or a folder that holds one.")
    if not files:
        raise WeightsError(
            f"{path} holds no .safetensors file. Give a folder that a script saved its weights to (other formats can "
            "run a program when they are read, and are not)."
        )
    several = any(file.stem == "model_1" for file in files)
    found: dict[str, torch.Tensor] = {}
    source: dict[str, Path] = {}
    for file in files:
        try:
            tensors = {_place(file, path, several) + key: tensor for key, tensor in load_file(file).items()}
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file} cannot be read as safetensors: {error}.") from None
        if twice := next((key for key in tensors if key in found), None):
            raise WeightsError(
                f"{path} holds {twice} twice, in {source[twice]} and in {file}. Give the one of the two that is meant."
            )
        found.update(tensors)
        source.update(dict.fromkeys(tensors, file))
    return found


def _place(file: Path, path: Path, several: bool) -> str:
    """What is put before the keys of a file, found at `path`."""
    if file != path and file.parent != path:
        return f"{file.parent.name}."
    numbered = re.fullmatch(r"model(?:_(\d+))?", file.stem)
    return f"{numbered.group(1) or 0}." if numbered and several else ""


def _find(names: Sequence[str], found: Mapping[str, torch.Tensor], path: Path) -> list[torch.Tensor | None]:
    """The values of these names: all under one model's name, so that no tensor of another model is taken for one.

    Raises WeightsError where two models have all of them.
    """
    bare = {_without_adapter(key): tensor for key, tensor in found.items()}
    # The script's own names go first: a checkpoint may hold the same weights in the format of a release besides.
    prefixes = ["", *sorted({key.split(".")[0] + "." for key in found})]
    tried = {prefix: [bare.get(prefix + _without_adapter(name)) for name in names] for prefix in prefixes}
    missing = {prefix: sum(value is None for value in values) for prefix, values in tried.items()}
    complete = [prefix for prefix, count in missing.items() if not count]
    if len(complete) > 1 and complete[0]:
        raise WeightsError(
            f"{path} holds weights that fit more than once: {', '.join(p[:-1] for p in complete)}. Give the file or "
            "folder of the one that is meant."
        )
    return tried[min(prefixes, key=lambda prefix: missing[prefix])]


def _without_adapter(name: str) -> str:
    """A parameter's name less the name that PEFT gives the adapter: `lora_A.default.weight` is `lora_A.weight`."""
    return re.sub(r"\.(lora_\w+)\.[^.]+\.weight$", r".\1.weight", name)
