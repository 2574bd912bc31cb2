"""Query images in a folder that the script can read, and the script's command line read and pointed at that folder."""

from __future__ import annotations

import json
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
    *("--dataset_config_name", "--image_column", "--max_train_samples", "--repeats"),
    *("--train_batch_size", "--class_data_dir", "--num_class_images", "--prior_loss_weight"),
    *("--resume_from_checkpoint", "--output_dir"),
)
"""Arguments with a value that make no sense for a folder of queries, or for a run that does not train."""

DROPPED_FLAGS = ("--push_to_hub",)

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


def query_arguments(arguments: Sequence[str], folder: Path, output: Path, prompt: str | None = None) -> list[str]:
    """A training command line, pointed at a folder of queries and an output folder.

    `prompt` replaces the one prompt of a DreamBooth command line.
    """
    if prompt is not None and takes_one_prompt(arguments):
        # In one argument: a prompt may begin with a dash.
        arguments = [*without_arguments(arguments, ("--instance_prompt",)), f"--instance_prompt={prompt}"]
    if any("{data}" in argument for argument in arguments):
        pointed = [argument.replace("{data}", str(folder)) for argument in arguments]
        if not has_argument(arguments, "--output_dir"):
            return pointed
        return [*without_arguments(pointed, ("--output_dir",)), "--output_dir", str(output)]
    data = next((name for name in DATA_ARGUMENTS if has_argument(arguments, name)), "--train_data_dir")
    kept = [a for a in without_arguments(arguments, (*DATA_ARGUMENTS, *REPLACED_ARGUMENTS)) if a not in DROPPED_FLAGS]
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
    """Copies the images into a folder, in order, and lists them with their prompts in `metadata.jsonl`.

    An image of a column `x` other than `image` is named by `x_file_name` there, as in `datasets`. Without `metadata`
    the folder holds nothing but the images. Raises OSError if a file cannot be copied.
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
            # In a folder of its own, where it is not taken for one of the images.
            within = f"conditioning/{k:06d}{source.suffix.lower()}"
            (folder / "conditioning").mkdir(exist_ok=True)
            shutil.copyfile(source, folder / within)
            row[f"{columns.conditioning}_file_name"] = within
        lines.append(json.dumps(row))
    if metadata and any(given is not None for given in (*prompts, *conditioning)):
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_videos(folder: Path, videos: Sequence[Path], prompts: Sequence[str | None]) -> None:
    """Copies the videos into a folder, with the two lists that the video scripts read."""
    folder.mkdir(parents=True)
    names = [f"{k:06d}{video.suffix.lower()}" for k, video in enumerate(videos)]
    for name, video in zip(names, videos, strict=True):
        shutil.copyfile(video, folder / name)
    for name, lines in zip(VIDEO_LISTS, ([" ".join((prompt or "").split()) for prompt in prompts], names), strict=True):
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
