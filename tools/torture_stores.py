"""A small store with all that can lie beside one: an index, and the weights. What is attacked is a copy of it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dmin_trace.capture.weights import find_trainable
from dmin_trace.search import build_index
from dmin_trace.settings import Codec, Dtype
from dmin_trace.store import (
    ParameterFacts,
    ProjectionFacts,
    Store,
    ThumbnailFacts,
    create,
    encode_webp,
    open_store,
    quantise,
    weights_beside,
)

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from stores import make_header

CAPTIONS = ("a cat", "", "naïve 猫", "two\nlines", "\x1b[31mred", "[bold]markup[/]", "\u202ereversed", "x" * 300)


def make_store(
    folder: Path,
    *,
    samples: int = 160,
    timesteps: int = 3,
    dimension: int = 64,
    rows: int = 32,
    dtype: Dtype = "int8",
    codec: Codec = "none",
    index: bool = True,
) -> Store:
    """A finished store at `folder`/trace.zarr of samples that form clusters, with pictures; its weights; and an index
    that serves."""
    torch.manual_seed(0)
    model = torch.nn.Linear(7, 5)
    trainable = find_trainable([model], None)
    header = dataclasses.replace(
        make_header(samples, timesteps, dimension, dtype, rows, codec=codec),
        projection=ProjectionFacts(kind="rotation", seed=3, length=trainable.length, width=2**15, fingerprint="a" * 64),
        parameters=ParameterFacts(names=trainable.names, shapes=trainable.shapes, fingerprint=trainable.fingerprint),
        weights=trainable.weights_fingerprint(),
        thumbnails=ThumbnailFacts(side=16, entry="pixel_values", low=-1.0, high=1.0),
    )
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((20, timesteps, dimension))
    grad = centres[generator.integers(0, 20, samples)] + 0.7 * generator.standard_normal(
        (samples, timesteps, dimension)
    )
    grad = (grad / np.linalg.norm(grad, axis=2, keepdims=True)).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trace.zarr"
    trainable.save(weights_beside(path))
    writer = create(path, header)
    for chunk in range(writer.header.chunks):
        here = np.array(writer.header.rows(chunk))
        writer.write(
            chunk,
            *quantise(grad[here], dtype),
            1 + generator.random((len(here), timesteps), np.float32),
            generator.random((len(here), timesteps), np.float32),
            here.astype(np.int64),
            {
                "caption": [CAPTIONS[slot % len(CAPTIONS)] for slot in here],
                "label": [int(slot) % 20 for slot in here],
                "weight": [float(slot) / 3 for slot in here],
            },
            [encode_webp(Image.new("RGB", (4, 4), (int(slot), 0, 255)), 16) for slot in here],
        )
    writer.finish()
    trace = open_store(path)
    if index:
        build_index(trace, recall=0.5)
    return trace
