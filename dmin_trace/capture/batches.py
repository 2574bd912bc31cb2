"""What a collated batch holds: its entries by name, and the shapes of those that are images or words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def named_entries(batch: Any) -> dict[str, Any]:
    """The entries of a collated batch by their names, or by their numbers where they have none."""
    if isinstance(batch, Mapping):
        return {str(name): value for name, value in batch.items()}
    values = batch if isinstance(batch, (list, tuple)) else [batch]
    return {str(k): value for k, value in enumerate(values)}


def image_shapes(entries: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of the image-like tensors (floating, three dimensions or more) of a batch."""
    return {
        name: tuple(value.shape)
        for name, value in entries.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 3
    }


def word_shapes(entries: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of what is made of words in a batch: rows of tokens (integers in two dimensions), lists of text.

    A named list of text is one of prompts only if its name says so: a batch may have file names.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in entries.items():
        if isinstance(value, torch.Tensor) and value.dim() == 2 and not value.is_floating_point():
            shapes[name] = tuple(value.shape)
        elif isinstance(value, (list, tuple)) and value and all(isinstance(text, str) for text in value):
            if not name.isdigit() and not any(word in name for word in ("caption", "prompt", "text")):
                continue
            shapes[name] = (len(value),)
    return shapes
