"""What is particular to the training scripts of Hugging Face diffusers (its `examples/` and scripts made after them).

Nothing here imports diffusers unless the script has: the functions look at what the script's loop holds.

    pinned_density    the timestep draw of the flow-matching scripts, `compute_density_for_timestep_sampling`
    averaged_models   the EMA whose weights the script will save
    refusal           why a run with these arguments cannot be attributed
    prepare_queries   folders with the queries, and the script's command lines pointed at them
    parameter_key     a key of a saved weight file, as the name of a parameter
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DENSITY = "compute_density_for_timestep_sampling"

DATA_ARGUMENTS = ("--instance_data_dir", "--train_data_dir", "--dataset_name")
"""The arguments that say where the images are; the first that a command has is the one that counts."""

REPLACED_ARGUMENTS = ("--dataset_config_name", "--max_train_samples", "--resume_from_checkpoint", "--output_dir")
"""With a value; meaningless or harmful where the data is a folder of queries and nothing is trained."""

DROPPED_FLAGS = ("--push_to_hub", "--cache_latents")

COLUMN_ARGUMENTS = {
    "--image_column": "image",
    "--edited_image_column": "image",
    "--caption_column": "text",
    "--edit_prompt_column": "text",
}
"""What the columns are called in a folder of queries."""

OWN_DEFAULTS = ("--edited_image_column", "--edit_prompt_column")
"""Column arguments whose default is not the first column, so that they must be given."""

COMPANION_ARGUMENTS = ("--conditioning_image_column", "--original_image_column")
"""The column arguments of models that are trained on pairs, for the image that is not generated."""


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


def refusal(args: Any) -> str | None:
    """Why a run with these arguments cannot be attributed, or None if nothing is known against it."""
    if getattr(args, "cache_latents", False):
        return (
            "With --cache_latents these scripts look latents up by the number of the batch, not of the sample, so a "
            "sample's own latents cannot be told. Leave --cache_latents out; it may be left out of the capture alone: "
            "dmin-trace capture --weights DIR -- SCRIPT ARGS."
        )
    return None


@dataclass(frozen=True)
class QueryRun:
    """One run of the script on queries.

    arguments: the script's command line.
    count: how many queries, and so how many samples its dataset must have.
    """

    arguments: tuple[str, ...]
    count: int


def prepare_queries(
    arguments: Sequence[str],
    source: str,
    images: Sequence[Path],
    prompts: Sequence[str | None],
    also: Sequence[Mapping[str, Path]],
    folder: Path,
) -> list[QueryRun]:
    """Copies the queries to where the script can read them, and says how to run it on them, in order.

    Args:
        arguments: the script's arguments, as it was trained with. `{data}` in one of them stands for the folder.
        source: the script's text, which tells the arguments that it takes.
        images, prompts: the queries.
        also: what else each query consists of, by the column that it is in (`conditioning_image`).
        folder: where the copies and the script's output may lie.

    Raises OSError where an image cannot be copied.
    """
    queries = list(zip(images, prompts, also, strict=True))
    # These scripts take every file of a folder for an image, in no order, and one prompt for all of them.
    alone = _has(arguments, "--instance_data_dir") or _has(arguments, "--placeholder_token")
    # And these read a dataset, but have one prompt for all of it.
    alone = alone or (_has(arguments, "--instance_prompt") and not _has(arguments, "--caption_column"))
    captions = not (alone and (_has(arguments, "--instance_data_dir") or _has(arguments, "--placeholder_token")))
    runs = []
    for k, group in enumerate([[query] for query in queries] if alone else [queries]):
        data = folder / f"data{k}"
        _write_images(data, group, captions)
        prompt = group[0][1] if alone else None
        companions = list(dict.fromkeys(column for _, _, pair in group for column in pair))
        pointed = _pointed(arguments, source, data, folder / "output", prompt, companions)
        runs.append(QueryRun(tuple(pointed), len(group)))
    return runs


def _pointed(
    arguments: Sequence[str], source: str, data: Path, output: Path, prompt: str | None, companions: Sequence[str]
) -> list[str]:
    """A training command line, pointed at a folder with queries and at an output folder of its own."""
    if any("{data}" in argument for argument in arguments):
        pointed = [argument.replace("{data}", str(data)) for argument in arguments]
        if _has(arguments, "--output_dir"):
            pointed = [*_without(pointed, ("--output_dir",)), "--output_dir", str(output)]
        return pointed
    where = next((name for name in DATA_ARGUMENTS if _has(arguments, name)), "--train_data_dir")
    if where == "--dataset_name" and _takes(source, "--train_data_dir"):
        where = "--train_data_dir"
    replaced = {name: column for name, column in COLUMN_ARGUMENTS.items() if _has(arguments, name)}
    replaced |= {name: COLUMN_ARGUMENTS[name] for name in OWN_DEFAULTS if _takes(source, name)}
    if len(companions) == 1:
        replaced |= {name: companions[0] for name in COMPANION_ARGUMENTS if _takes(source, name)}
    if _takes(source, "--repeats"):
        replaced["--repeats"] = "1"
    if prompt is not None and _has(arguments, "--instance_prompt"):
        replaced["--instance_prompt"] = prompt
    replaced |= {where: str(data), "--output_dir": str(output)}
    kept = _without(arguments, (*DATA_ARGUMENTS, *REPLACED_ARGUMENTS, *replaced))
    return [a for a in kept if a not in DROPPED_FLAGS] + [word for pair in replaced.items() for word in pair]


def _write_images(folder: Path, queries: Sequence[tuple[Path, str | None, Mapping[str, Path]]], captions: bool) -> None:
    """Copies images into a folder, with their captions and companions as `datasets` reads them (`metadata.jsonl`)."""
    folder.mkdir(parents=True)
    lines = []
    for k, (image, prompt, also) in enumerate(queries):
        # Numbered, since image folders are read in the order of their names.
        # In the order that these scripts suppose where columns are not named: image, caption, companion.
        line = {"file_name": _copy(image, folder, f"{k:06d}")} | ({} if prompt is None else {"text": prompt})
        for column, companion in also.items():
            line[f"{column}_file_name"] = _copy(companion, folder, f"{k:06d}.{column}")
        lines.append(json.dumps(line))
    if captions and any(prompt is not None or also for _, prompt, also in queries):
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _copy(image: Path, folder: Path, name: str) -> str:
    copied = name + image.suffix.lower()
    shutil.copyfile(image, folder / copied)
    return copied


def parameter_key(key: str) -> str:
    """Turns a key of an older LoRA file (`lora.down`, `to_q_lora.up`) into the name of PEFT's parameter."""
    key = re.sub(r"\.to_(q|k|v)_lora\.", r".to_\1.lora.", key).replace(".to_out_lora.", ".to_out.0.lora.")
    return re.sub(r"\.lora(_linear_layer)?\.(down|up)\.", lambda m: ".lora_A." if m[2] == "down" else ".lora_B.", key)


def _takes(source: str, name: str) -> bool:
    return f'"{name}"' in source or f"'{name}'" in source


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
