"""Weight files: finds a run's parameters among the tensors of safetensors files, whatever their keys are.

Only safetensors is read and written: a weight file can come from anywhere, and a pickle can run a program.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dmin_trace.errors import WeightsError
from dmin_trace.store import sync

KeyConverter = Callable[[str], str]
"""Turns a key of a host's weight file into the name of a module's parameter."""
Shape = tuple[int, ...]
ADAPTER_ENDING = re.compile(r"(\.lora_\w+)\.([^.]+)\.weight$")
"""The end of a parameter's name in an adapter of PEFT: `lora_A.default.weight`."""


@dataclass(frozen=True)
class SavedTensor:
    """Where a saved tensor is: the safetensors file, and its key in it."""

    file: Path
    key: str


def write_whole(path: Path, values: dict[str, torch.Tensor]) -> None:
    """Writes a safetensors file to the disk, whole or not at all. Raises WeightsError if it cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(values, partial)
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        why = error.strerror or error if isinstance(error, OSError) else error
        raise WeightsError(f"{path} cannot be written: {why}. Make room, or give another path.") from None


def find_files(path: Path) -> list[list[Path]]:
    """Returns the safetensors files that a path stands for, in groups of which the first that fits is used.

    A folder gives the files in it, then those in its subfolders. Raises WeightsError if there is none.
    """
    if path.is_file():
        return [[path]]
    if not path.is_dir():
        raise WeightsError(f"There are no weights at {path}. Give a .safetensors file or a folder that holds one.")
    # A training's checkpoints, with the weights of earlier steps, lie beside what it saved at its end.
    deeper = [file for file in path.glob("*/*.safetensors") if not file.parent.name.startswith("checkpoint")]
    groups = [sorted(path.glob("*.safetensors")), sorted(deeper)]
    if not any(groups):
        raise WeightsError(
            f"{path} holds no .safetensors file. Give a folder that a script saved its weights to (other formats can "
            "run a program when they are read, and are not)."
        )
    return [group for group in groups if group]


def list_saved(files: Sequence[Path], path: Path, convert: KeyConverter | None = None) -> dict[str, SavedTensor]:
    """Returns the tensors in the files by name, without reading them.

    The name of a subfolder of `path` (`unet`) goes in front of the names in its files, as does the number of the model
    in a checkpoint of several (`model_1.safetensors`). Raises WeightsError if a file is unreadable or repeats a name.
    """
    saved: dict[str, SavedTensor] = {}
    several = any(file.stem == "model_1" for file in files)
    for file in files:
        numbered = re.fullmatch(r"model(?:_(\d+))?", file.stem)
        prefix = f"{numbered.group(1) or 0}." if numbered and several else ""
        if file != path and file.parent != path:
            prefix = f"{file.parent.name}."
        try:
            if not file.is_file():
                # Opening a pipe would block.
                raise OSError("it is not a regular file")
            with safe_open(file, framework="pt") as opened:
                keys = list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise _unreadable(file, error) from None
        for key in keys:
            name = prefix + (convert(key) if convert is not None else key)
            if name in saved:
                raise WeightsError(f"{path} holds {key} twice, in {saved[name].file} and in {file}. Give one of them.")
            saved[name] = SavedTensor(file, key)
    return saved


def read(wanted: Iterable[SavedTensor]) -> Iterable[torch.Tensor]:
    """Yields saved tensors in order. Raises WeightsError for one that cannot be read."""
    with ExitStack() as entered:
        opened: dict[Path, Any] = {}
        for saved in wanted:
            try:
                if saved.file not in opened:
                    opened[saved.file] = entered.enter_context(safe_open(saved.file, framework="pt"))
                tensor = opened[saved.file].get_tensor(saved.key)
            except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
                # A dtype that this torch lacks, for example, raises various errors.
                raise _unreadable(saved.file, error) from None
            yield tensor


def match_models(
    path: Path, models: Mapping[int, Mapping[str, Shape]], saved: Mapping[str, SavedTensor]
) -> dict[int, list[SavedTensor]]:
    """Finds the saved tensors of every model's parameters, whatever prefix or adapter name they are saved under.

    `models` has the names and shapes of parameters by the model's number, `saved` the tensors in the files at `path`.
    Returns the saved tensors of each model. Raises WeightsError if some are missing, misshapen or ambiguous.
    """
    found: dict[int, dict[str, list[SavedTensor]]] = {}
    for k, parameters in models.items():
        sets = _complete_sets(list(parameters), saved)
        found[k] = {prefix: tensors for prefix, tensors in sets.items() if _shapes(tensors) == [*parameters.values()]}
        if not found[k]:
            raise _missing(path, parameters, saved)
    # A set that is the only one for a model is taken from the others. Repeated, since each choice may settle the next.
    for _ in models:
        taken = [tensors[0] for sets in found.values() if len(sets) == 1 for tensors in sets.values()]
        for k, sets in found.items():
            if len(sets) > 1:
                found[k] = {prefix: tensors for prefix, tensors in sets.items() if tensors[0] not in taken} or sets
    chosen: dict[int, list[SavedTensor]] = {}
    for k in models:
        # Models of one kind (two text encoders) are saved in the order in which they are prepared.
        candidates = list(found[k].values())
        alike = [j for j in models if list(found[j].values()) == candidates]
        if len(candidates) > len(alike):
            first, *others = candidates
            pairs = (pair for other in others for pair in zip(read(first), read(other), strict=True))
            if not all(torch.equal(a, b) for a, b in pairs):
                raise WeightsError(
                    f"{path} holds several weights that fit: {', '.join(prefix.strip('.') for prefix in found[k])}. "
                    "Give the file or folder that is to be used."
                )
        chosen[k] = candidates[min(alike.index(k), len(candidates) - 1)]
    return chosen


def wrong_shape(path: Path, name: str, found: Shape, expected: Shape) -> WeightsError:
    """Returns the error for a saved tensor that has another shape than its parameter."""
    shapes = f"with shape {found}, but the script's model has {expected}"
    return WeightsError(f"{path} holds {name} {shapes}. Give the weights that this script saved.")


def _complete_sets(names: list[str], saved: Mapping[str, SavedTensor]) -> dict[str, list[SavedTensor]]:
    """The saved tensors of all of a model's parameters, for every prefix that has them all."""
    # An adapter may have another name in the file, or none. The script's own name for it comes first.
    adapters = sorted({end.group(2) for key in saved if (end := ADAPTER_ENDING.search(key))})
    others = {adapter: [_with_adapter(name, adapter) for name in names] for adapter in ("", *adapters)}
    for spellings in ({"": names}, others):
        found: dict[str, list[SavedTensor]] = {}
        for adapter, spelled in spellings.items():
            first = spelled[0]
            prefixes = [key.removesuffix(first) for key in saved if key == first or key.endswith("." + first)]
            for prefix in sorted(prefixes):
                tensors = [saved[prefix + name] for name in spelled if prefix + name in saved]
                if len(tensors) == len(spelled) and tensors not in found.values():
                    found[prefix + adapter] = tensors
        if found:
            return found
    return {}


def _with_adapter(name: str, adapter: str) -> str:
    """A parameter's name with another adapter's name, or with none, as files have it."""
    return ADAPTER_ENDING.sub(rf"\1.{adapter}.weight" if adapter else r"\1.weight", name)


def _shapes(tensors: Sequence[SavedTensor]) -> list[Shape]:
    with ExitStack() as entered:
        opened = {f: entered.enter_context(safe_open(f, framework="pt")) for f in {saved.file for saved in tensors}}
        return [tuple(opened[saved.file].get_slice(saved.key).get_shape()) for saved in tensors]


def _missing(path: Path, parameters: Mapping[str, Shape], saved: Mapping[str, SavedTensor]) -> WeightsError:
    """The error for parameters that cannot be read: a wrong shape, or how many are missing."""
    for tensors in _complete_sets(list(parameters), saved).values():
        for (name, shape), other in zip(parameters.items(), _shapes(tensors), strict=True):
            if shape != other:
                return wrong_shape(path, name, other, shape)
    split = [_with_adapter(key, "").split(".") for key in saved]
    endings = {".".join(parts[k:]) for parts in split for k in range(len(parts))}
    missing = [name for name in parameters if _with_adapter(name, "") not in endings] or list(parameters)
    return WeightsError(
        f"{path} lacks {len(missing)} of the {len(parameters)} trainable tensors, among them {', '.join(missing[:3])}. "
        "Give the weights that this script saved, or a checkpoint of its training."
    )


def _unreadable(file: Path, error: Exception) -> WeightsError:
    return WeightsError(f"{file} cannot be read as safetensors: {error}. Give the right file, or put it back.")
