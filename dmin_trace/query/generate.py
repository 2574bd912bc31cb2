"""Prompts in, query images out: made with the model that the traced run saved."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dmin_trace.capture.host import script_host
from dmin_trace.errors import QueryError
from dmin_trace.query.capture import traced_command
from dmin_trace.query.inputs import QueryInput
from dmin_trace.store import Store


def generate_images(
    store: Store,
    prompts: Sequence[str],
    folder: Path,
    *,
    num: int = 1,
    seed: int = 0,
    command: Sequence[str] | None = None,
) -> list[QueryInput]:
    """Makes images with the model that the traced run saved, and writes them to files named by prompt and seed.

    The folder is created if it is missing. Of each prompt `num` images are made; image k has the seed `seed + k`.
    `command` is as for `attribute`. Raises QueryError if the run saved no model that makes images.
    """
    run = traced_command(store, command)
    if num < 1:
        raise QueryError(f"The number of images is {num}. Give --num 1 or more.")
    wanted = [(prompt, seed + k) for prompt in prompts for k in range(num)]
    try:
        images = script_host().generate(run.arguments, Path(run.folder), wanted)
    except (ValueError, OSError) as error:
        raise QueryError(
            f"No image could be made from the prompt: {error} Make it yourself, and give it before --prompt."
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    inputs = []
    for image, (prompt, image_seed) in zip(images, wanted, strict=True):
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "image"
        inputs.append(QueryInput(folder / f"{words}-{image_seed}.png", prompt))
        image.save(inputs[-1].image)
    return inputs
