"""Query images in a folder that the script can read, and the script's command line read and pointed at that folder."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from dmin_trace.capture.host import QueryColumns, QueryRun

DATA_ARGUMENTS = (
    *("--instance_data_dir", "--instance_data_root", "--train_data_dir", "--dataset_name"),
    "--instance_data_dataset",
)
"""The arguments that name the data. The first of them that a command has is pointed at the queries."""

REPLACED_ARGUMENTS = (
    # Datasets keep a copy of what they read in their cache.
    *("--dataset_config_name", "--image_column", "--max_train_samples", "--repeats", "--cache_dir"),
    *("--train_batch_size", "--class_data_dir", "--num_class_images", "--prior_loss_weight"),
    *("--resume_from_checkpoint", "--hub_model_id", "--hub_token"),
)
"""Arguments with a value that make no sense for a folder of queries, or for a run that does not train."""

DROPPED_FLAGS = ("--push_to_hub", "--hub_private_repo")

OUTPUT_ARGUMENTS = (
    *("--output_dir", "--output_path", "--output_folder", "--out_dir", "--save_dir", "--save_path", "--dump_path"),
    *("--logging_dir", "--log_dir"),
)
"""Arguments that name a place to write to. Those of a command are pointed elsewhere for queries."""

DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
"""How a prompt begins that may be read as a point in time."""

NO_LOSS_ARGUMENTS = (
    *("--pretrained_model_name_or_path", "--resolution", "--mixed_precision", "--instance_prompt", "--class_prompt"),
    *(
        "--max_train",
        "--num_train_epochs",
        "--num_epochs",
        "--learning_rate",
        "--lr_",
        "--adam_",
        "--scale_lr",
        "--seed",
    ),
    *("--use_8bit_adam", "--optimizer", "--max_grad_norm", "--gradient_", "--enable_", "--dataloader_", "--cache_dir"),
    *(
        "--checkpoint",
        "--validation_",
        "--num_validation",
        "--save_",
        "--report_to",
        "--logging_",
        "--log_",
        "--tracker",
    ),
    *("--push_to_hub", "--hub_", "--local_rank", "--use_ema", "--ema_", "--foreach_ema", "--preprocessing_num_workers"),
)
"""How arguments begin that choose data, places, the course of a training or what is compared by its values."""

VIDEO_LISTS = ("prompts.txt", "videos.txt")
"""The files with a folder's captions and video names, line by line, for the video scripts."""


def value_of(arguments: Sequence[str], name: str) -> str | None:
    """The value of the last argument of this name, as argparse takes it."""
    values = [value for argument, value in zip(arguments, arguments[1:], strict=False) if argument == name]
    values += [argument.removeprefix(name + "=") for argument in arguments if argument.startswith(name + "=")]
    return values[-1] if values else None


def has_argument(arguments: Sequence[str], name: str) -> bool:
    return any(argument == name or argument.startswith(name + "=") for argument in arguments)


def without_arguments(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
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


def find_data_argument(arguments: Sequence[str], source: str) -> str | None:
    """The argument with which a script takes its data, by its command line, or else by the text of the script."""
    if any("{data}" in argument for argument in arguments):
        return "{data}"
    given = (name for name in DATA_ARGUMENTS if has_argument(arguments, name))
    return next(given, next((name for name in DATA_ARGUMENTS if name in source), None))


def takes_prompts(arguments: Sequence[str]) -> bool:
    """Whether a training command line names captions or a prompt."""
    names = ("--caption_column", "--edit_prompt_column", "--instance_prompt")
    return any(has_argument(arguments, name) for name in names)


def takes_one_prompt(arguments: Sequence[str]) -> bool:
    """Whether a training command line gives one prompt for all images, as DreamBooth's does."""
    return has_argument(arguments, "--instance_prompt") and not has_argument(arguments, "--caption_column")


def words_its_own_prompts(arguments: Sequence[str]) -> bool:
    """Whether the script makes the captions itself, as textual inversion does around its new word."""
    return has_argument(arguments, "--placeholder_token")


def takes_videos(arguments: Sequence[str]) -> bool:
    """Whether the script trains on videos."""
    return has_argument(arguments, "--instance_data_root") or has_argument(arguments, "--video_column")


def loss_difference(traced: Sequence[str], given: Sequence[str]) -> tuple[str, str] | None:
    """The first argument that may change a loss and differs in two command lines, as each has it; None without one.

    A path, or a model of the hub, is compared by what is read there, and `{data}` stands for the queries.
    """
    theirs, ours = _by_name(traced), _by_name(given)
    others = (*DATA_ARGUMENTS, *REPLACED_ARGUMENTS, *OUTPUT_ARGUMENTS, *NO_LOSS_ARGUMENTS)
    for name in sorted(theirs.keys() | ours.keys()):
        values = [found.get(name) for found in (theirs, ours)]
        is_place = any("/" in value or "\\" in value or "{data}" in value for value in values if value)
        if values[0] != values[1] and not is_place and not name.startswith(others):
            first, second = (f"no {name}" if value is None else f"{name} {value}".strip() for value in values)
            return first, second
    return None


def _by_name(arguments: Sequence[str]) -> dict[str, str]:
    """The values of a command line's options; "" for a flag."""
    found: dict[str, str] = {}
    name = ""
    for argument in arguments:
        if argument.startswith("--"):
            name, _, found[name] = argument.partition("=")
        elif name:
            found[name] = f"{found[name]} {argument}".strip()
    return found


def query_columns(arguments: Sequence[str], entries: Iterable[str]) -> QueryColumns:
    """The columns that a script reads: those in its command line, or else the scripts' defaults.

    The entries of its batches distinguish the scripts of ControlNet and InstructPix2Pix.
    """
    names = " ".join(entries)
    if has_argument(arguments, "--original_image_column") or "original_pixel_values" in names:
        return QueryColumns(
            image=value_of(arguments, "--edited_image_column") or "edited_image",
            caption=value_of(arguments, "--edit_prompt_column") or "edit_prompt",
            conditioning=value_of(arguments, "--original_image_column") or "input_image",
        )
    given = value_of(arguments, "--conditioning_image_column")
    return QueryColumns(
        image=value_of(arguments, "--image_key") or "image",
        caption=value_of(arguments, "--caption_column") or value_of(arguments, "--prompt_key") or "text",
        conditioning=given or ("conditioning_image" if "conditioning_pixel_values" in names else None),
    )


def prepare_queries(
    arguments: Sequence[str],
    columns: QueryColumns,
    images: Sequence[Path],
    prompts: Sequence[str | None],
    conditioning: Sequence[Path | None],
    folder: Path,
) -> list[QueryRun]:
    """Copies the queries into `folder`, where the script also writes, and gives its runs on them.

    `{data}` in an argument stands for the folder with the images. Raises OSError if a file cannot be copied.
    """
    every_file = has_argument(arguments, "--instance_data_dir") or words_its_own_prompts(arguments)
    if every_file:
        # These scripts take every file of a folder for an image, in any order.
        groups = [[k] for k in range(len(images))]
    elif takes_one_prompt(arguments):
        groups = [[k for k, other in enumerate(prompts) if other == prompt] for prompt in dict.fromkeys(prompts)]
    else:
        groups = [list(range(len(images)))]
    runs = []
    for n, group in enumerate(groups):
        data = folder / f"data{n}"
        chosen, texts = [images[k] for k in group], [prompts[k] for k in group]
        if takes_videos(arguments):
            _write_videos(data, chosen, texts)
        else:
            sources = [conditioning[k] for k in group]
            write_queries(data, chosen, texts, columns, sources, metadata=not every_file)
        pointed = query_arguments(arguments, data, folder / f"output{n}", texts[0])
        if has_argument(arguments, "--with_prior_preservation"):
            # The class images that the batch also has: any picture, with no weight in the loss.
            (classes := folder / f"class{n}").mkdir()
            shutil.copyfile(chosen[0], classes / f"0{chosen[0].suffix.lower()}")
            pointed += ["--class_data_dir", str(classes), "--num_class_images", "1", "--prior_loss_weight", "0"]
        runs.append(QueryRun(tuple(pointed), tuple(group)))
    return runs


def on_demand_arguments(arguments: Sequence[str]) -> list[str]:
    """A training command line for a capture on demand, which neither uploads nor goes on with an earlier run."""
    kept = without_arguments(arguments, ("--resume_from_checkpoint", "--hub_model_id", "--hub_token"))
    return [argument for argument in kept if argument not in DROPPED_FLAGS]


def query_arguments(arguments: Sequence[str], folder: Path, output: Path, prompt: str | None = None) -> list[str]:
    """A training command line, pointed at a folder of queries and an output folder.

    `prompt` replaces the one prompt of a DreamBooth command line.
    """
    if prompt is not None and takes_one_prompt(arguments):
        # In one argument: a prompt may begin with a dash.
        arguments = [*without_arguments(arguments, ("--instance_prompt",)), f"--instance_prompt={prompt}"]
    others = [name for name in OUTPUT_ARGUMENTS[1:] if has_argument(arguments, name)]
    outputs = [part for name in others for part in (name, str(output / name.lstrip("-")))]
    if any("{data}" in argument for argument in arguments):
        pointed = [argument.replace("{data}", str(folder)) for argument in arguments]
        named = ["--output_dir", str(output)] if has_argument(arguments, "--output_dir") else []
        # Datasets keep a copy of what they read in their cache.
        dropped = ("--cache_dir", *OUTPUT_ARGUMENTS)
        return [*without_arguments(on_demand_arguments(pointed), dropped), *outputs, *named]
    data = next((name for name in DATA_ARGUMENTS if has_argument(arguments, name)), "--train_data_dir")
    replaced = (*DATA_ARGUMENTS, *REPLACED_ARGUMENTS, *OUTPUT_ARGUMENTS)
    kept = [a for a in without_arguments(arguments, replaced) if a not in DROPPED_FLAGS] + outputs
    if takes_videos(arguments):
        captions, videos = VIDEO_LISTS
        data, kept = "--instance_data_root", without_arguments(kept, ("--caption_column", "--video_column"))
        kept += ["--caption_column", captions, "--video_column", videos]
    # Textual inversion repeats every image a hundred times unless it is told not to; DreamBooth's newer scripts drop a
    # last batch that is not full.
    words_its_own = words_its_own_prompts(arguments)
    if words_its_own or has_argument(arguments, "--repeats"):
        kept += ["--repeats", "1"]
    if words_its_own or has_argument(arguments, "--instance_prompt") or has_argument(arguments, "--train_batch_size"):
        kept += ["--train_batch_size", "1"]
    return [*kept, data, str(folder), "--output_dir", str(output)]


def write_queries(
    folder: Path,
    images: Sequence[Path],
    prompts: Sequence[str | None],
    columns: QueryColumns,
    conditioning: Sequence[Path | None],
    *,
    metadata: bool = True,
) -> None:
    """Copies the images into a folder, in order, and lists them with their prompts in `metadata.jsonl` or `.csv`.

    An image of a column `x` other than `image` is named by `x_file_name` there, as in `datasets`. Without `metadata`
    the folder holds nothing but the images. Raises OSError if a file cannot be copied.
    """
    folder.mkdir(parents=True)
    rows: list[dict[str, str]] = []
    for k, (image, prompt, source) in enumerate(zip(images, prompts, conditioning, strict=True)):
        # Numbered, since image folders are read in the order of their names.
        name = f"{k:06d}{image.suffix.lower()}"
        shutil.copyfile(image, folder / name)
        row = {"file_name" if columns.image == "image" else f"{columns.image}_file_name": name}
        if prompt is not None:
            row[columns.caption] = prompt
        if source is not None and columns.conditioning is not None:
            # In a folder of its own, where it is not taken for one of the images.
            within = f"conditioning/{k:06d}{source.suffix.lower()}"
            (folder / "conditioning").mkdir(exist_ok=True)
            shutil.copyfile(source, folder / within)
            row[f"{columns.conditioning}_file_name"] = within
        rows.append(row)
    if not metadata or all(given is None for given in (*prompts, *conditioning)):
        return
    if all(prompt is not None and DATE.match(prompt) for prompt in prompts):
        # Of JSON lines, `datasets` would make points in time; of CSV, only of what is a number.
        with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as table:
            writer = csv.DictWriter(table, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = [json.dumps(row) for row in rows]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_videos(folder: Path, videos: Sequence[Path], prompts: Sequence[str | None]) -> None:
    """Copies the videos into a folder, with the two lists that the video scripts read."""
    folder.mkdir(parents=True)
    names = [f"{k:06d}{video.suffix.lower()}" for k, video in enumerate(videos)]
    for name, video in zip(names, videos, strict=True):
        shutil.copyfile(video, folder / name)
    for name, lines in zip(VIDEO_LISTS, ([" ".join((prompt or "").split()) for prompt in prompts], names), strict=True):
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
