"""What is particular to the training scripts of Hugging Face diffusers (its `examples/` and scripts made after them).

Nothing here imports diffusers unless the script has: the functions look at what the script's loop holds.

    pinned_density    the timestep draw of the flow-matching scripts, `compute_density_for_timestep_sampling`
    averaged_models   the EMA whose weights the script will save
    query_arguments   the script's command line, pointed at a folder with the queries
    write_queries     that folder, as `datasets` reads image folders (`metadata.jsonl`)
    query_columns     how the script calls the columns of that folder
    takes_prompts     whether the command line shows that the model learns captions
    generate          images from the model that the script saved
    parameter_keys    the keys of saved weight files, as names of parameters
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DENSITY = "compute_density_for_timestep_sampling"

DATA_ARGUMENTS = ("--train_data_dir", "--instance_data_dir")
"""The arguments that take a folder of images, the first being what is used where the command has neither."""

REPLACED_ARGUMENTS = (
    *("--dataset_name", "--dataset_config_name", "--image_column", "--max_train_samples", "--repeats"),
    *("--resume_from_checkpoint", "--output_dir"),
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


def takes_prompts(arguments: Sequence[str]) -> bool:
    """Whether a training command line names captions or a prompt."""
    return any(_has(arguments, name) for name in ("--caption_column", "--edit_prompt_column", "--instance_prompt"))


def takes_one_prompt(arguments: Sequence[str]) -> bool:
    """Whether a training command line gives one prompt for all images, as DreamBooth's does."""
    return _has(arguments, "--instance_prompt") and not _has(arguments, "--caption_column")


@dataclass(frozen=True)
class QueryColumns:
    """The data set's columns of the image, of its caption, and of the image that it was made from, if there is one."""

    image: str = "image"
    caption: str = "text"
    conditioning: str | None = None


def query_columns(arguments: Sequence[str], entries: Iterable[str]) -> QueryColumns:
    """The columns that a script reads, by its command line and, where that is silent, the scripts' defaults.

    Args:
        arguments: the script's arguments.
        entries: the names of its batches' entries, which tell a ControlNet's script and InstructPix2Pix's apart.
    """
    names = " ".join(entries)
    if _has(arguments, "--original_image_column") or "original_pixel_values" in names:
        return QueryColumns(
            image=_value(arguments, "--edited_image_column") or "edited_image",
            caption=_value(arguments, "--edit_prompt_column") or "edit_prompt",
            conditioning=_value(arguments, "--original_image_column") or "input_image",
        )
    given = _value(arguments, "--conditioning_image_column")
    return QueryColumns(
        caption=_value(arguments, "--caption_column") or "text",
        conditioning=given or ("conditioning_image" if "conditioning_pixel_values" in names else None),
    )


def query_arguments(arguments: Sequence[str], folder: Path, output: Path, prompt: str | None = None) -> list[str]:
    """A training command line, pointed at a folder with the queries and at an output folder of its own.

    Args:
        arguments: the script's arguments, as it was trained with. `{data}` in one of them stands for the folder.
        folder: holds the queries' images.
        output: where the script may write.
        prompt: goes in the place of the one prompt of a DreamBooth command line.
    """
    if prompt is not None and takes_one_prompt(arguments):
        # In one argument: a prompt may begin with a dash.
        arguments = [*_without(arguments, ("--instance_prompt",)), f"--instance_prompt={prompt}"]
    if any("{data}" in argument for argument in arguments):
        pointed = [argument.replace("{data}", str(folder)) for argument in arguments]
        return (
            _without(pointed, ("--output_dir",)) + ["--output_dir", str(output)]
            if _has(arguments, "--output_dir")
            else pointed
        )
    data = next((name for name in DATA_ARGUMENTS if _has(arguments, name)), DATA_ARGUMENTS[0])
    if _has(arguments, "--instance_prompt") and _has(arguments, "--dataset_name"):
        # DreamBooth's scripts read captions from a data set alone; a folder is one.
        data = "--dataset_name"
    kept = [a for a in _without(arguments, (*DATA_ARGUMENTS, *REPLACED_ARGUMENTS)) if a not in DROPPED_FLAGS]
    return [*kept, data, str(folder), "--output_dir", str(output)]


def write_queries(
    folder: Path,
    images: Sequence[Path],
    prompts: Sequence[str | None],
    columns: QueryColumns,
    conditioning: Sequence[Path | None],
) -> None:
    """Copies the images into a folder, in order, and names them with their prompts in `metadata.jsonl`.

    An image of a column `x` that is not the usual `image` goes by `x_file_name` there, as `datasets` has it.
    Raises OSError where a file cannot be copied.
    """
    folder.mkdir(parents=True)
    lines = []
    for k, (image, prompt, source) in enumerate(zip(images, prompts, conditioning, strict=True)):
        # Numbered, since image folders are read in the order of their names.
        name = f"{k:06d}{image.suffix.lower()}"
        shutil.copyfile(image, folder / name)
        row = {"file_name" if columns.image == "image" else f"{columns.image}_file_name": name}
        if prompt is not None:
            row[columns.caption] = prompt
        if source is not None and columns.conditioning is not None:
            # In a folder of its own, where no reader of a folder's images takes it for one of them.
            within = f"conditioning/{k:06d}{source.suffix.lower()}"
            (folder / "conditioning").mkdir(exist_ok=True)
            shutil.copyfile(source, folder / within)
            row[f"{columns.conditioning}_file_name"] = within
        lines.append(json.dumps(row))
    if any(said is not None for said in (*prompts, *conditioning)):
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def generate(arguments: Sequence[str], folder: Path, wanted: Sequence[tuple[str, int]]) -> list[Any]:
    """Makes an image of each prompt and seed with the pipeline, or the LoRA, that a training command line saved.

    Only files that are on this machine are read, and no weights but safetensors.

    Args:
        arguments: the script's arguments, as it was trained with.
        folder: where it was started.
        wanted: prompts and seeds.

    Returns:
        PIL images.

    Raises:
        ValueError: the command line names no model, or its output folder holds none.
        OSError: a file is missing.
    """
    base, output = _value(arguments, "--pretrained_model_name_or_path"), _value(arguments, "--output_dir")
    if base is None or output is None:
        raise ValueError(
            "the script's command line does not name a model and where it was saved to "
            "(--pretrained_model_name_or_path, --output_dir)."
        )
    saved = folder / output
    lora = sorted(saved.glob("*lora*.safetensors"))
    if not (saved / "model_index.json").is_file() and not lora:
        raise ValueError(f"{saved} holds neither a pipeline (model_index.json) nor a LoRA (*lora*.safetensors).")
    from diffusers import DiffusionPipeline

    if (saved / "model_index.json").is_file():
        lora, base = [], str(saved)
    elif (folder / base).is_dir():
        base = str(folder / base)
    pipeline = DiffusionPipeline.from_pretrained(base, use_safetensors=True, local_files_only=True)
    if lora:
        pipeline.load_lora_weights(str(saved), weight_name=lora[0].name, local_files_only=True)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    resolution = _value(arguments, "--resolution")
    size = {"height": int(resolution), "width": int(resolution)} if resolution else {}
    images = []
    for prompt, seed in wanted:
        made = pipeline(prompt, generator=torch.Generator("cpu").manual_seed(seed), **size)
        if any(getattr(made, "nsfw_content_detected", None) or ()):
            raise ValueError(f"the pipeline's safety checker blacked the image of {prompt!r}, seed {seed}, out.")
        images.append(made.images[0])
    return images


def parameter_keys(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the keys of an old LoRA file (`lora.down`, `lora.up`) to the names of PEFT's parameters."""
    if any(".lora.down" in key or ".lora.up" in key for key in weights):
        from diffusers.utils import convert_unet_state_dict_to_peft

        converted: dict[str, torch.Tensor] = convert_unet_state_dict_to_peft(weights)
        return converted
    return weights


def _value(arguments: Sequence[str], name: str) -> str | None:
    """The value of the last argument of this name, as argparse takes it."""
    values = [value for argument, value in zip(arguments, arguments[1:], strict=False) if argument == name]
    values += [argument.removeprefix(name + "=") for argument in arguments if argument.startswith(name + "=")]
    return values[-1] if values else None


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
