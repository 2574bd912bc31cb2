"""What is particular to the training scripts of Hugging Face diffusers (its `examples/` and scripts made after them).

Nothing here imports diffusers unless the script has: the functions look at what the script's loop holds.

    pinned_density    the timestep draw of the flow-matching scripts, `compute_density_for_timestep_sampling`
    averaged_models   the EMA whose weights the script will save
    refusal           why a run cannot be attributed
    prepare_queries   folders with the queries, and the script's command lines pointed at them
    query_columns     how the script calls the columns of such a folder
    takes_prompts     whether the command line shows that the model learns captions
    generate          images from the model that the script saved
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

DATA_ARGUMENTS = ("--instance_data_dir", "--instance_data_root", "--train_data_dir", "--dataset_name")
"""The arguments that say where the data is; of those that a command has, the first is pointed at the queries."""

REPLACED_ARGUMENTS = (
    *("--dataset_config_name", "--image_column", "--max_train_samples", "--repeats"),
    *("--train_batch_size", "--class_data_dir", "--num_class_images", "--prior_loss_weight"),
    *("--resume_from_checkpoint", "--output_dir"),
)
"""With a value; meaningless or harmful where the data is a folder of queries and nothing is trained."""

DROPPED_FLAGS = ("--push_to_hub",)

VIDEO_LISTS = ("prompts.txt", "videos.txt")
"""What the video scripts read a folder's captions and files from, line by line."""


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


def refusal(args: Any, variables: Mapping[str, Any]) -> str | None:
    """Why a run cannot be attributed, by its arguments and its loop's variables; None if nothing is known against it.

    Several DreamBooth scripts encode latents, and some captions too, once before the loop, and look them up by the
    number of the step in its epoch: batches in another order get those of other samples. The newer ones look them up
    by the sample's index, which their batches hold.
    """
    batch = variables.get("batch")
    if isinstance(batch, Mapping) and "indices" in batch:
        return None
    caches = [
        name for name, value in variables.items() if name.endswith("_cache") and isinstance(value, list) and value
    ]
    if not caches and not getattr(args, "cache_latents", False):
        return None
    return (
        f"The script looks up {' and '.join(caches) or 'latents'} by the number of the batch, not of the sample, so a "
        "sample's own cannot be told. Leave --cache_latents out, and with captions that are encoded in advance "
        "(--caption_column) give one --instance_prompt instead; for the capture alone if you like: dmin-trace capture "
        "--weights DIR -- SCRIPT ARGS."
    )


def takes_prompts(arguments: Sequence[str]) -> bool:
    """Whether a training command line names captions or a prompt."""
    return any(_has(arguments, name) for name in ("--caption_column", "--edit_prompt_column", "--instance_prompt"))


def takes_one_prompt(arguments: Sequence[str]) -> bool:
    """Whether a training command line gives one prompt for all images, as DreamBooth's does."""
    return _has(arguments, "--instance_prompt") and not _has(arguments, "--caption_column")


def words_its_own_prompts(arguments: Sequence[str]) -> bool:
    """Whether the script makes the captions up itself, as textual inversion's does around its new word."""
    return _has(arguments, "--placeholder_token")


def takes_videos(arguments: Sequence[str]) -> bool:
    """Whether the script trains on videos."""
    return _has(arguments, "--instance_data_root") or _has(arguments, "--video_column")


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


@dataclass(frozen=True)
class QueryRun:
    """One run of the script on queries.

    arguments: the script's command line.
    queries: the numbers of the queries, in the order of the samples that the script makes of them.
    """

    arguments: tuple[str, ...]
    queries: tuple[int, ...]


def prepare_queries(
    arguments: Sequence[str],
    columns: QueryColumns,
    images: Sequence[Path],
    prompts: Sequence[str | None],
    conditioning: Sequence[Path | None],
    folder: Path,
) -> list[QueryRun]:
    """Copies the queries to where the script can read them, and says how to run it on them.

    Args:
        arguments: the script's arguments, as it was trained with. `{data}` in one of them stands for the folder.
        columns: how the script calls what a query consists of.
        images, prompts, conditioning: the queries.
        folder: where the copies and the script's output may lie.

    Raises OSError where a file cannot be copied.
    """
    every_file = _has(arguments, "--instance_data_dir") or words_its_own_prompts(arguments)
    if every_file:
        # These scripts take every file of a folder for an image, in no order.
        groups = [[k] for k in range(len(images))]
    elif takes_one_prompt(arguments):
        groups = [[k for k, other in enumerate(prompts) if other == prompt] for prompt in dict.fromkeys(prompts)]
    else:
        groups = [list(range(len(images)))]
    runs = []
    for n, group in enumerate(groups):
        data = folder / f"data{n}"
        chosen, said, behind = [images[k] for k in group], [prompts[k] for k in group], [conditioning[k] for k in group]
        if takes_videos(arguments):
            _write_videos(data, chosen, said)
        else:
            write_queries(data, chosen, said, columns, behind, metadata=not every_file)
        pointed = query_arguments(arguments, data, folder / f"output{n}", said[0])
        if _has(arguments, "--with_prior_preservation"):
            # The class images that the batch has besides: any picture, with no weight in the loss.
            (folder / f"class{n}").mkdir()
            shutil.copyfile(chosen[0], folder / f"class{n}" / f"0{chosen[0].suffix.lower()}")
            pointed += ["--class_data_dir", str(folder / f"class{n}"), "--num_class_images", "1"]
            pointed += ["--prior_loss_weight", "0"]
        runs.append(QueryRun(tuple(pointed), tuple(group)))
    return runs


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
    data = next((name for name in DATA_ARGUMENTS if _has(arguments, name)), "--train_data_dir")
    kept = [a for a in _without(arguments, (*DATA_ARGUMENTS, *REPLACED_ARGUMENTS)) if a not in DROPPED_FLAGS]
    if takes_videos(arguments):
        data, named = "--instance_data_root", zip(("--caption_column", "--video_column"), VIDEO_LISTS, strict=True)
        kept = _without(kept, ("--caption_column", "--video_column")) + [word for pair in named for word in pair]
    # Textual inversion repeats every image a hundred times unless it is told not to; DreamBooth's newer scripts drop a
    # last batch that is not full.
    one = {
        "--repeats": words_its_own_prompts(arguments),
        "--train_batch_size": words_its_own_prompts(arguments) or _has(arguments, "--instance_prompt"),
    }
    ones = [word for name, known in one.items() if known or _has(arguments, name) for word in (name, "1")]
    return [*kept, *ones, data, str(folder), "--output_dir", str(output)]


def write_queries(
    folder: Path,
    images: Sequence[Path],
    prompts: Sequence[str | None],
    columns: QueryColumns,
    conditioning: Sequence[Path | None],
    *,
    metadata: bool = True,
) -> None:
    """Copies the images into a folder, in order, and names them with their prompts in `metadata.jsonl`.

    An image of a column `x` that is not the usual `image` goes by `x_file_name` there, as `datasets` has it. Without
    `metadata` there is nothing in the folder but the images. Raises OSError where a file cannot be copied.
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
    if metadata and any(said is not None for said in (*prompts, *conditioning)):
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_videos(folder: Path, videos: Sequence[Path], prompts: Sequence[str | None]) -> None:
    """Copies the videos into a folder, with the two lists that the video scripts read."""
    folder.mkdir(parents=True)
    names = [f"{k:06d}{video.suffix.lower()}" for k, video in enumerate(videos)]
    for name, video in zip(names, videos, strict=True):
        shutil.copyfile(video, folder / name)
    for name, lines in zip(VIDEO_LISTS, ([" ".join((prompt or "").split()) for prompt in prompts], names), strict=True):
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


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


def parameter_key(key: str) -> str:
    """Turns a key of an older LoRA file (`lora.down`, `to_q_lora.up`), or of a DoRA, into PEFT's name."""
    if key.endswith(".lora_magnitude_vector"):
        # A module whose only parameter is its weight; files leave that out.
        return key + ".weight"
    key = re.sub(r"\.to_(q|k|v)_lora\.", r".to_\1.lora.", key).replace(".to_out_lora.", ".to_out.0.lora.")
    return re.sub(r"\.lora(_linear_layer)?\.(down|up)\.", lambda m: ".lora_A." if m[2] == "down" else ".lora_B.", key)


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
