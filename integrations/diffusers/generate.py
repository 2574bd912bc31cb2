"""Images made with the model that a training run saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmin_trace.integrations.diffusers.queries import value_of


def generate(arguments: Sequence[str], folder: Path, wanted: Sequence[tuple[str, int]]) -> list[Any]:
    """Makes a PIL image of each prompt and seed with the pipeline, or the LoRA, that a training command line saved.

    Only files on this machine are read, and of weights only safetensors. Raises ValueError if the command line names no
    model, or its output folder, relative to `folder`, holds none; OSError if a file is missing.
    """
    base, output = value_of(arguments, "--pretrained_model_name_or_path"), value_of(arguments, "--output_dir")
    if base is None or output is None:
        raise ValueError(
            "the script's command line does not name a model and where it was saved to "
            "(--pretrained_model_name_or_path, --output_dir)."
        )
    saved = folder / output
    lora = sorted(saved.glob("*lora*.safetensors"))
    if not (saved / "model_index.json").is_file() and not lora:
        raise ValueError(f"{saved} holds neither a pipeline (model_index.json) nor a LoRA (*lora*.safetensors).")
    import torch
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
    resolution = value_of(arguments, "--resolution")
    size = {"height": int(resolution), "width": int(resolution)} if resolution else {}
    images = []
    for prompt, seed in wanted:
        made = pipeline(prompt, generator=torch.Generator("cpu").manual_seed(seed), **size)
        if any(getattr(made, "nsfw_content_detected", None) or ()):
            raise ValueError(f"the pipeline's safety checker blacked out the image of {prompt!r}, seed {seed}.")
        images.append(made.images[0])
    return images
