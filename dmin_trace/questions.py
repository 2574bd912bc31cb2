"""What is asked: images with their prompts, given one by one, as a folder, or as a list in a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmin_trace.errors import QueryError

IMAGE_KEYS = ("file_name", "image")
PROMPT_KEYS = ("text", "prompt", "caption")
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


@dataclass(frozen=True)
class Asked:
    """One image to ask about.

    image: its file.
    prompt: what it was made from, or None if that was not said.
    """

    image: Path
    prompt: str | None


def read_questions(given: Sequence[Path], prompts: Sequence[str] = ()) -> list[Asked]:
    """Reads what a person asks about.

    Args:
        given: each an image; a folder of images, with prompts in its `metadata.jsonl` if it has one; or a JSON-lines
            file of {"file_name" or "image": FILE, "text" or "prompt": PROMPT}, its paths relative to the file.
        prompts: one for each image in order, or one for all of them; none where the files say them.

    Raises QueryError if there is nothing to ask, a line cannot be read, or the prompts do not fit the images.
    """
    asked = [question for path in given for question in _expand(path)]
    if not prompts:
        return asked
    if said := next((question for question in asked if question.prompt is not None), None):
        raise QueryError(
            f"A prompt was given, but the list that names {said.image} has one for it already. Leave --prompt out."
        )
    if len(prompts) not in (1, len(asked)):
        raise QueryError(
            f"{len(asked)} images were given and {len(prompts)} prompts. Give one prompt for each image, in their "
            "order, or one for all."
        )
    every = list(prompts) * len(asked) if len(prompts) == 1 else prompts
    return [Asked(question.image, prompt) for question, prompt in zip(asked, every, strict=True)]


def _expand(path: Path) -> Iterator[Asked]:
    if path.is_dir():
        metadata = path / "metadata.jsonl"
        if metadata.is_file():
            yield from _read_list(metadata)
            return
        images = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise QueryError(f"The folder {path} holds no images. Give images, or a folder with PNG or JPEG files.")
        yield from (Asked(image, None) for image in images)
    elif path.suffix.lower() in (".jsonl", ".json") and path.is_file():
        yield from _read_list(path)
    else:
        yield Asked(path, None)


def _read_list(path: Path) -> Iterator[Asked]:
    expected = 'expected one such as {"file_name": "a.png", "text": "a prompt"}'
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise QueryError(f"{path} cannot be read: {error}.") from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise QueryError(f"{path} has no lines; {expected}.")
    for number, line in numbered:
        try:
            row: Any = json.loads(line)
        except ValueError:
            row = None
        image = _text(row, IMAGE_KEYS)
        if image is None:
            raise QueryError(f"Line {number} of {path} is {line.strip()[:60]!r}; {expected}.")
        yield Asked(path.parent / image, _text(row, PROMPT_KEYS))


def _text(row: Any, keys: Sequence[str]) -> str | None:
    if not isinstance(row, dict):
        return None
    return next((row[key] for key in keys if isinstance(row.get(key), str)), None)
