"""Scores that know nothing of the model: chance, and how alike two images look."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from dmin_trace.errors import QueryError, SettingsError, WeightsError

from .products import Array, Scores, as_matrix

BATCH = 64


def random_scores(queries: int, samples: int, seed: int) -> Scores:
    """Standard normal numbers: what a method must beat.

    Args:
        queries: how many, Q.
        samples: how many, N.
        seed: of numpy's default generator.

    Returns:
        (Q, N).
    """
    return np.random.default_rng(seed).standard_normal((queries, samples))


def ssim(train: Array, query: Array, window: int | None = None) -> Scores:
    """The structural similarity of each query to each training image, by scikit-image.

    Wang et al. 2004, equation 13 with a uniform window and the sample covariance, averaged over the positions where the
    window lies within the image, and over channels. One comparison takes some tenths of a millisecond; there are Q N.

    Args:
        train: (N, C, H, W) in [0, 1].
        query: (Q, C, H, W) in [0, 1].
        window: side of the window in pixels, odd. Default: 7, which is scikit-image's, where the shorter side has 16
            pixels or more, and 3 below: on an 8x8 image a window of 7 has 4 positions, one of 3 has 36.

    Returns:
        (Q, N), at most 1.

    Raises:
        QueryError: other shapes, or values outside [0, 1].
        SettingsError: a window that does not fit, or no scikit-image.
    """
    try:
        from skimage.metrics import structural_similarity
    except ModuleNotFoundError as error:
        raise SettingsError("ssim needs scikit-image: python -m pip install 'dmin_trace[bench]'.") from error
    samples, queries = _images(train, "train"), _images(query, "query")
    if samples.shape[1:] != queries.shape[1:]:
        raise QueryError(f"train has images of {samples.shape[1:]}, query of {queries.shape[1:]}; both must be alike.")
    side = min(samples.shape[2:])
    if window is None:
        window = 7 if side >= 16 else 3
    if window % 2 == 0 or not 3 <= window <= side:
        raise SettingsError(f"The window is {window}; an odd number from 3 to {side}, the shorter side, is expected.")
    compare: Callable[..., float] = structural_similarity
    rows = [[compare(q, i, win_size=window, channel_axis=0, data_range=1.0) for i in samples] for q in queries]
    return np.array(rows, dtype=np.float64)


def clip_similarity(train: Array, query: Array, model: Path) -> Scores:
    """The cosine of the CLIP image embeddings of each query and each training image.

    Radford et al. 2021 (arXiv 2103.00020), by transformers' `CLIPModel`; images are resized and normalised as the
    model's own `preprocessor_config.json` says.

    Args:
        train: (N, C, H, W) in [0, 1], C of 1 (shown as grey) or 3.
        query: (Q, C, H, W) in [0, 1].
        model: a folder that `CLIPModel.save_pretrained` and `CLIPProcessor.save_pretrained` wrote, or a download of
            one, as of openai/clip-vit-base-patch32; weights as safetensors. Nothing is fetched.

    Returns:
        (Q, N), from -1 to 1.

    Raises:
        QueryError: other shapes, or values outside [0, 1].
        WeightsError: no such weights there.
        SettingsError: no transformers.
    """
    samples, queries = _images(train, "train"), _images(query, "query")
    if not (model / "config.json").is_file():
        raise WeightsError(
            f"{model} has no config.json: clip_similarity needs a local folder of a CLIP model with its processor, as "
            "`hf download openai/clip-vit-base-patch32 --local-dir FOLDER` makes."
        )
    similarity: Scores = _clip_embeddings(queries, model) @ _clip_embeddings(samples, model).T
    return similarity


@torch.inference_mode()
def _clip_embeddings(images: np.ndarray, folder: Path) -> np.ndarray:
    """(n, D) float64 of norm 1."""
    try:
        from transformers import CLIPImageProcessor, CLIPModel
    except ModuleNotFoundError as error:
        raise SettingsError("clip_similarity needs transformers: python -m pip install 'dmin_trace[bench]'.") from error
    try:
        loaded: Any = CLIPModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{folder} holds no CLIP model that transformers can load: {error}") from error
    model, info = loaded
    if info["missing_keys"]:
        raise WeightsError(
            f"{folder} lacks weights of a CLIP model: {', '.join(sorted(info['missing_keys'])[:3])}, ..."
        )
    model.eval()
    parts = []
    for start in range(0, len(images), BATCH):
        shown = [_picture(image) for image in images[start : start + BATCH]]
        seen = model.vision_model(**processor(images=shown, return_tensors="pt")).pooler_output
        parts.append(model.visual_projection(seen).double())
    embeddings = torch.cat(parts)
    normal: np.ndarray = (embeddings / embeddings.norm(dim=1, keepdim=True)).numpy()
    return normal


def _picture(image: np.ndarray) -> Image.Image:
    """(C, H, W) in [0, 1] as a picture of three channels of 8 bits, what the processor is made for."""
    pixels = (image * 255).round().astype(np.uint8)
    return Image.fromarray(np.repeat(pixels, 3 // len(pixels), axis=0).transpose(1, 2, 0))


def _images(images: Array, name: str) -> np.ndarray:
    """(n, C, H, W), checked."""
    pixels = as_matrix(images, name, "n C H W")
    if pixels.shape[1] not in (1, 3):
        raise QueryError(f"{name} has images of {pixels.shape[1]} channels; 1 or 3 is expected.")
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= 1):
        raise QueryError(f"{name} has values from {low:g} to {high:g}; images in [0, 1] are expected.")
    return pixels
