"""Tiny random pipelines, built here and downloaded from nowhere, and small captioned images to train them on."""

from __future__ import annotations

import colorsys
import contextlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dmin_trace.cli.app import main

SHAPES = ("disc", "square", "cross", "stripes")


def tiny_tokenizer(length: int = 16) -> CLIPTokenizer:
    """A CLIP tokenizer that knows the letters and no merges: words are spelled."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [str(digit) for digit in range(10)]
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(
        vocab={name: k for k, name in enumerate(names)},
        merges=[],
        model_max_length=length,
    )


def tiny_text_model(vocabulary: int, width: int = 32, length: int = 16) -> CLIPTextModel:
    """A CLIP text model of two layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=37,
            num_attention_heads=4,
            num_hidden_layers=2,
            max_position_embeddings=length,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).eval()


def tiny_vae(channels: int = 4) -> AutoencoderKL:
    """A VAE that halves the image."""
    return AutoencoderKL(
        block_out_channels=(16, 16),
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=32,
    ).eval()


def tiny_pipeline(folder: Path) -> Path:
    """Writes a Stable Diffusion pipeline for images of 32x32 pixels."""
    torch.manual_seed(3)
    tokenizer = tiny_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_model(len(tokenizer)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def captioned_images(folder: Path, count: int, column: str = "text") -> Path:
    """Writes images of 32x32 pixels, each of another shape and colour, with their captions in `metadata.jsonl`."""
    folder.mkdir(parents=True)
    lines = []
    for k in range(count):
        name = f"{k:04d}.png"
        picture(k).save(folder / name)
        lines.append(json.dumps({"file_name": name, column: caption(k)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def caption(k: int) -> str:
    """What the k-th picture shows."""
    return f"{SHAPES[k % len(SHAPES)]} {k}"


def picture(k: int) -> Image.Image:
    """A shape on a noisy ground."""
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    inside = (x**2 + y**2 < 0.4, np.maximum(abs(x), abs(y)) < 0.6, np.minimum(abs(x), abs(y)) < 0.2, np.sin(9 * x) > 0)
    pixels = np.random.default_rng(k).uniform(0, 80, (32, 32, 3))
    pixels[inside[k % len(SHAPES)]] += 160 * np.array(colorsys.hsv_to_rgb((k * 0.38) % 1, 0.9, 1.0))
    return Image.fromarray(pixels.round().astype(np.uint8))


def command_line(arguments: Sequence[object], folder: Path, code: int = 0) -> tuple[str, str]:
    """Runs `dmin-trace` in this process, where the heavy imports are done already; gives what it prints and complains.

    State is kept in `folder / "state"`, as by `tiny.run`.
    """
    out, complaints = io.StringIO(), io.StringIO()
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(folder / "state")
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(complaints):
            ended = main([str(argument) for argument in arguments])
    finally:
        if before is None:
            del os.environ["XDG_STATE_HOME"]
        else:
            os.environ["XDG_STATE_HOME"] = before
    if ended != code:
        raise AssertionError(f"exit code {ended}, expected {code}\n{out.getvalue()}\n{complaints.getvalue()}")
    return out.getvalue(), complaints.getvalue()
