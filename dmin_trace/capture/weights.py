"""The trainable tensors of a run: which they are, what they hold, written beside the store and read back.

Only safetensors is read or written: a weight file can come from anywhere, and a pickle can run a program.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dmin_trace.errors import CaptureError, WeightsError

KeyConverter = Callable[[str], str]
"""Turns a key of a host's weight file into the name of a module's parameter."""


def write_whole(path: Path, values: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all: it is kept by the disk when this returns.

    Raises WeightsError if it cannot be written.
    """
    partial = partial_of(path)
    try:
        save_file(dict(values), partial, metadata=metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        why = error.strerror or error if isinstance(error, OSError) else error
        raise WeightsError(f"{path} cannot be written: {why}. Make room, or give another path.") from None


def partial_of(path: Path) -> Path:
    """Where `write_whole` writes a file before it has its name."""
    return path.with_name(f".{path.name}.partial")


@dataclass(frozen=True)
class Place:
    """Where a saved tensor lies.

    file: the safetensors file.
    key: its key there.
    """

    file: Path
    key: str


@dataclass(frozen=True)
class Trainable:
    """The parameters that training moves, in a fixed order.

    names: `module.parameter`, with the model's number in front where several models train.
    tensors: the parameters themselves.
    owners: the number of the model that each belongs to.
    own_names: their names in that model.
    """

    names: tuple[str, ...]
    tensors: tuple[torch.nn.Parameter, ...]
    owners: tuple[int, ...]
    own_names: tuple[str, ...]

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
        return _fingerprint(zip(self.names, self.tensors, strict=True))

    def save(self, path: Path) -> None:
        """Writes the values to a safetensors file, whole or not at all. Raises WeightsError if it cannot be written."""
        values = {n: p.detach().cpu().contiguous() for n, p in zip(self.names, self.tensors, strict=True)}
        write_whole(path, values)

    def load(self, path: Path, convert: KeyConverter | None = None) -> None:
        """Reads every value from a safetensors file, or from the files in a folder, or in the folders in it.

        Accepts a parameter's name with or without an adapter's name, alone or after any other words (`unet.`), as long
        as they are the same for all parameters of one model, and told apart from those of the others.

        Raises:
            WeightsError: no such file, an unreadable one, one that lacks a tensor or has it in another shape, or more
                than one that would do. Nothing is changed then.
        """
        refusal: WeightsError | None = None
        for files in weight_files(path):
            saved = places(files, path, convert)
            try:
                values = self._choose(path, saved)
            except WeightsError as error:
                refusal = refusal or error
                continue
            with torch.no_grad():
                for parameter, value in zip(self.tensors, values, strict=True):
                    parameter.copy_(value)
            return
        if refusal is not None:
            raise refusal

    def _choose(self, path: Path, saved: Mapping[str, Place]) -> list[torch.Tensor]:
        """The saved value of each parameter."""
        if all(name in saved for name in self.names):
            # The script's own names go first: a checkpoint may hold the same weights in a release's format besides.
            return self._read(path, [saved[name] for name in self.names])
        models = sorted(set(self.owners))
        own = {k: [n for n, owner in zip(self.own_names, self.owners, strict=True) if owner == k] for k in models}
        shapes = {k: [s for s, owner in zip(self.shapes, self.owners, strict=True) if owner == k] for k in models}
        chosen: dict[int, list[Place]] = {}
        found: dict[int, dict[str, list[Place]]] = {}
        for k in models:
            found[k] = {start: c for start, c in _candidates(own[k], saved).items() if _shapes(c) == shapes[k]}
            if not found[k]:
                raise WeightsError(_why_not(path, own[k], shapes[k], saved))
        # What can only be one model's is no other's. Once for each model, since it may settle the next.
        for _ in models:
            taken = [c[0] for starts in found.values() if len(starts) == 1 for c in starts.values()]
            found = {
                k: starts if len(starts) == 1 else {s: c for s, c in starts.items() if c[0] not in taken} or starts
                for k, starts in found.items()
            }
        for k in models:
            # Models of one kind (two text encoders) are saved in the order in which they are prepared.
            candidates = list(found[k].values())
            alike = [j for j in models if list(found[j].values()) == candidates]
            if len(candidates) > len(alike) and not _all_equal(candidates):
                raise WeightsError(
                    f"{path} holds weights that fit more than once: {', '.join(s.strip('.') for s in found[k])}. Give "
                    "the file or folder of the one that is meant."
                )
            chosen[k] = candidates[min(alike.index(k), len(candidates) - 1)]
        queues = {k: iter(chosen[k]) for k in models}
        return self._read(path, [next(queues[owner]) for owner in self.owners])

    def _read(self, path: Path, chosen: Sequence[Place]) -> list[torch.Tensor]:
        values = list(read(chosen))
        for name, parameter, value in zip(self.names, self.tensors, values, strict=True):
            if value.shape != parameter.shape:
                raise WeightsError(_wrong_shape(path, name, tuple(value.shape), tuple(parameter.shape)))
        return values


def fingerprint_of(path: Path, names: Sequence[str]) -> str:
    """The fingerprint of the values in a file that `Trainable.save` wrote, as `Trainable.weights_fingerprint` gives it.

    Raises WeightsError where the file cannot be read, or lacks one of the names.
    """
    saved = places([path], path)
    if missing := [name for name in names if name not in saved]:
        raise WeightsError(f"{path} lacks {len(missing)} of the {len(names)} tensors that the trace is of.")
    return _fingerprint(zip(names, read([saved[name] for name in names]), strict=True))


def _fingerprint(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu()
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def find_trainable(models: Sequence[torch.nn.Module], optimizers: Sequence[torch.optim.Optimizer] | None) -> Trainable:
    """The parameters of the models that are both trainable and in an optimizer, each once.

    Without optimizers (None) all that are trainable.

    Raises CaptureError if there are none.
    """
    if optimizers is None:
        optimized = {id(p) for model in models for p in model.parameters()}
    else:
        optimized = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    trainable = _choose_parameters(models, lambda name, p: p.requires_grad and id(p) in optimized)
    if trainable.tensors:
        return trainable
    if optimizers is None:
        raise CaptureError("No parameter of the model is trainable (requires_grad), so there is nothing to capture.")
    raise CaptureError(
        "No trainable parameter of a prepared model is in a prepared optimizer. Pass the model and its optimizer "
        "to accelerator.prepare, or to recording."
    )


def find_named(models: Sequence[torch.nn.Module], names: Sequence[str]) -> Trainable:
    """The parameters of these names, as `Trainable` has them, that the models hold, whether they are trainable or not.

    Which of the names are missing is for the caller to see.
    """
    wanted = set(names)
    return _choose_parameters(models, lambda name, parameter: name in wanted)


def _choose_parameters(
    models: Sequence[torch.nn.Module], choose: Callable[[str, torch.nn.Parameter], bool]
) -> Trainable:
    """Those that are chosen, each once, by their names among those of all the models."""
    names: list[str] = []
    tensors: list[torch.nn.Parameter] = []
    owners: list[int] = []
    own_names: list[str] = []
    seen: set[int] = set()
    for k, model in enumerate(models):
        for name, parameter in model.named_parameters():
            full = name if len(models) == 1 else f"{k}.{name}"
            if id(parameter) not in seen and choose(full, parameter):
                seen.add(id(parameter))
                names.append(full)
                tensors.append(parameter)
                owners.append(k)
                own_names.append(name)
    return Trainable(tuple(names), tuple(tensors), tuple(owners), tuple(own_names))


def weight_files(path: Path) -> list[list[Path]]:
    """The safetensors files that a path stands for: itself, those in a folder, and failing these those one deeper.

    Raises WeightsError where there is none.
    """
    if path.is_file():
        return [[path]]
    if not path.is_dir():
        raise WeightsError(f"There are no weights at {path}. Give a .safetensors file or a folder that holds one.")
    # A training's checkpoints lie beside what it saved at its end, with the weights of earlier steps.
    deeper = [file for file in path.glob("*/*.safetensors") if not file.parent.name.startswith("checkpoint")]
    tiers = [sorted(path.glob("*.safetensors")), sorted(deeper)]
    if not any(tiers):
        raise WeightsError(
            f"{path} holds no .safetensors file. Give a folder that a script saved its weights to (other formats can "
            "run a program when they are read, and are not)."
        )
    return [tier for tier in tiers if tier]


def places(files: Iterable[Path], path: Path, convert: KeyConverter | None = None) -> dict[str, Place]:
    """Where each saved tensor lies, by its name. Reads no tensor.

    The name of a folder inside `path` (a pipeline's `unet`) goes in front of those in its files, and the number of the
    model where the files are accelerate's checkpoint of several (`model.safetensors`, `model_1.safetensors`).

    Raises WeightsError where a file cannot be read, or two files of one folder hold the same name.
    """
    saved: dict[str, Place] = {}
    files = list(files)
    several = any(file.stem == "model_1" for file in files)
    for file in files:
        within = _within(file, path, several)
        try:
            if not file.is_file():
                raise OSError("it is no file")  # a pipe would block whoever opens it
            with safe_open(file, framework="pt") as opened:
                keys = list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{file} cannot be read as safetensors: {error}. Give the right file, or put it back."
            ) from None
        for key in keys:
            name = within + (convert(key) if convert is not None else key)
            if name in saved:
                raise WeightsError(
                    f"{path} holds {key} twice, in {saved[name].file} and in {file}. Give the one of the two that is "
                    "meant."
                )
            saved[name] = Place(file, key)
    return saved


def read(wanted: Iterable[Place]) -> Iterable[torch.Tensor]:
    """The tensors at these places, in order. Raises WeightsError for one that cannot be read."""
    with ExitStack() as entered:
        opened: dict[Path, Any] = {}
        for place in wanted:
            try:
                if place.file not in opened:
                    opened[place.file] = entered.enter_context(safe_open(place.file, framework="pt"))
                tensor = opened[place.file].get_tensor(place.key)
            except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
                # Dtypes that this torch does not have, and the like: it says so in many ways.
                raise WeightsError(
                    f"{place.file} cannot be read as safetensors: {error}. Give the right file, or put it back."
                ) from None
            yield tensor


def _within(file: Path, path: Path, several: bool) -> str:
    """What goes in front of the keys of a file, found at `path`."""
    if file != path and file.parent != path:
        return f"{file.parent.name}."
    numbered = re.fullmatch(r"model(?:_(\d+))?", file.stem)
    return f"{numbered.group(1) or 0}." if numbered and several else ""


def _candidates(names: Sequence[str], saved: Mapping[str, Place]) -> dict[str, list[Place]]:
    """The places of all of a model's parameters, for every start of a name that has them all.

    An adapter may have another name in the file, or none; the script's own goes before.
    """
    adapters = sorted({end.group(2) for key in saved if (end := ADAPTER.search(key))})
    others = {adapter: [_with_adapter(name, adapter) for name in names] for adapter in ("", *adapters)}
    for spellings in ({"": list(names)}, others):
        found: dict[str, list[Place]] = {}
        for adapter, spelled in spellings.items():
            first = spelled[0]
            starts = [key.removesuffix(first) for key in saved if key == first or key.endswith("." + first)]
            for start in sorted(starts):
                chosen = [saved[start + name] for name in spelled if start + name in saved]
                if len(chosen) == len(spelled) and chosen not in found.values():
                    found[start + adapter] = chosen
        if found:
            return found
    return {}


ADAPTER = re.compile(r"(\.lora_\w+)\.([^.]+)\.weight$")
"""The end of a parameter's name in an adapter of PEFT: `lora_A.default.weight`."""


def _with_adapter(name: str, adapter: str) -> str:
    """A parameter's name with another adapter's name, or with none, as files have it."""
    return ADAPTER.sub(rf"\1.{adapter}.weight" if adapter else r"\1.weight", name)


def _shapes(chosen: Sequence[Place]) -> list[tuple[int, ...]]:
    with ExitStack() as entered:
        opened = {f: entered.enter_context(safe_open(f, framework="pt")) for f in {place.file for place in chosen}}
        return [tuple(opened[place.file].get_slice(place.key).get_shape()) for place in chosen]


def _all_equal(candidates: Sequence[Sequence[Place]]) -> bool:
    first = candidates[0]
    return all(torch.equal(a, b) for other in candidates[1:] for a, b in zip(read(first), read(other), strict=True))


def _why_not(path: Path, names: Sequence[str], shapes: Sequence[tuple[int, ...]], saved: Mapping[str, Place]) -> str:
    """What keeps a model's parameters from being read: a wrong shape, or how many are missing."""
    for candidate in _candidates(names, saved).values():
        for name, shape, other in zip(names, shapes, _shapes(candidate), strict=True):
            if shape != other:
                return _wrong_shape(path, name, other, shape)
    ends = set()
    for key in saved:
        parts = _with_adapter(key, "").split(".")
        ends |= {".".join(parts[k:]) for k in range(len(parts))}
    missing = [name for name in names if _with_adapter(name, "") not in ends] or list(names)
    return (
        f"{path} lacks {len(missing)} of the {len(names)} trainable tensors, among them {', '.join(missing[:3])}. Give "
        "the weights that this script saved, or a checkpoint of its training."
    )


def _wrong_shape(path: Path, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    return (
        f"{path} holds {name} with shape {found}, but the script's model has {expected}. Give the weights that this "
        "script saved."
    )
