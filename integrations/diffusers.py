"""What is particular to the training scripts of Hugging Face diffusers (its `examples/` and scripts made after them).

Nothing here imports diffusers unless the script has: the functions look at what the script's loop holds.

    pinned_density    the timestep draw of the flow-matching scripts, `compute_density_for_timestep_sampling`
    averaged_models   the EMA whose weights the script will save
    query_arguments   the script's command line, pointed at a folder with the queries
    write_queries     that folder, as `datasets` reads image folders (`metadata.jsonl`)
    parameter_keys    the keys of saved weight files, as names of parameters
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

DENSITY = "compute_density_for_timestep_sampling"

DATA_ARGUMENTS = ("--train_data_dir", "--instance_data_dir")
"""The arguments that take a folder of images, the first being what is used where the command has neither."""

REPLACED_ARGUMENTS = (
    *("--dataset_name", "--dataset_config_name", "--max_train_samples", "--resume_from_checkpoint", "--output_dir"),
)
"""With a value; meaningless or harmful where the data is a folder of queries and nothing is trained."""

DROPPED_FLAGS = ("--push_to_hub",)


@contextmanager
def pinned_density(
    modules: Iterable[dict[str, Any]], pin: Callable[[torch.Tensor, str], torch.Tensor]
) -> Iterator[None]:
    """Passes the density draws of the script's modules (their globals) through `pin`, as fractions of the schedule."""
    original = [(module, module[DENSITY]) for module in modules if DENSITY in module]

    def wrap(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **options: pin(draw(*args, **options), "density")

    for module, draw in original:
        module[DENSITY] = wrap(draw)
    try:
        yield
    finally:
        for module, draw in original:
            module[DENSITY] = draw


def averaged_models(values: Iterable[Any]) -> list[Any]:
    """The `EMAModel`s among a loop's variables, each once."""
    training_utils = sys.modules.get("diffusers.training_utils")
    if training_utils is None:
        return []
    found = {id(value): value for value in values if isinstance(value, training_utils.EMAModel)}
    return list(found.values())


@contextmanager
def averaged_weights(ema: Any, parameters: Sequence[torch.nn.Parameter], step_first: bool) -> Iterator[None]:
    """While entered, the parameters hold the average; afterwards they and the average are as before, bit for bit.

    Args:
        ema: an `EMAModel` over exactly these parameters.
        parameters: all parameters of the model, in the model's order.
        step_first: average the last optimizer step in first, where the script has yet to do so.
    """
    average = [shadow.clone() for shadow in ema.shadow_params]
    counters = {name: getattr(ema, name) for name in ("optimization_step", "cur_decay_value")}
    weights = [parameter.detach().clone() for parameter in parameters]
    try:
        if step_first:
            ema.step(parameters)
        ema.copy_to(parameters)
        yield
    finally:
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)
            for shadow, value in zip(ema.shadow_params, average, strict=True):
                shadow.copy_(value)
        for name, value in counters.items():
            setattr(ema, name, value)


def schedule_length(values: Iterable[Any]) -> int | None:
    """The number of training timesteps of the noise schedulers among a loop's variables, if they agree."""
    lengths = {
        value.config.num_train_timesteps
        for value in values
        if type(value).__name__.endswith("Scheduler") and hasattr(getattr(value, "config", None), "num_train_timesteps")
    }
    return int(lengths.pop()) if len(lengths) == 1 else None


def query_arguments(arguments: Sequence[str], folder: Path, output: Path) -> list[str]:
    """A training command line, pointed at a folder with the queries and at an output folder of its own.

    Args:
        arguments: the script's arguments, as it was trained with. `{data}` in one of them stands for the folder.
        folder: holds the queries' images.
        output: where the script may write.
    """
    if any("{data}" in argument for argument in arguments):
        pointed = [argument.replace("{data}", str(folder)) for argument in arguments]
        return (
            _without(pointed, ("--output_dir",)) + ["--output_dir", str(output)]
            if _has(arguments, "--output_dir")
            else pointed
        )
    data = next((name for name in DATA_ARGUMENTS if _has(arguments, name)), DATA_ARGUMENTS[0])
    kept = [a for a in _without(arguments, (*DATA_ARGUMENTS, *REPLACED_ARGUMENTS)) if a not in DROPPED_FLAGS]
    return [*kept, data, str(folder), "--output_dir", str(output)]


def write_queries(folder: Path, images: Sequence[Path], prompts: Sequence[str | None]) -> None:
    """Copies the images into a folder, in order, with their prompts in `metadata.jsonl`.

    Raises OSError where a file cannot be copied.
    """
    folder.mkdir(parents=True)
    lines = []
    for k, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        # Numbered, since image folders are read in the order of their names.
        name = f"{k:06d}{image.suffix.lower()}"
        shutil.copyfile(image, folder / name)
        lines.append(json.dumps({"file_name": name, "text": prompt}))
    if any(prompt is not None for prompt in prompts):
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def parameter_keys(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the keys of an old LoRA file (`lora.down`, `lora.up`) to the names of PEFT's parameters."""
    if any(".lora.down" in key or ".lora.up" in key for key in weights):
        from diffusers.utils import convert_unet_state_dict_to_peft

        converted: dict[str, torch.Tensor] = convert_unet_state_dict_to_peft(weights)
        return converted
    return weights


def _has(arguments: Sequence[str], name: str) -> bool:
    return any(argument == name or argument.startswith(name + "=") for argument in arguments)


def _without(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """The arguments less those of these names and their values."""
    kept: list[str] = []
    skip_value = False
    for argument in arguments:
        if skip_value:
            skip_value = False
            if not argument.startswith("--"):
                continue
        if argument in names:
            skip_value = True
        elif not argument.startswith(tuple(name + "=" for name in names)):
            kept.append(argument)
    return kept
