"""Small diffusion models of digits for the experiments: training on any subset, per-sample losses, and pictures.

Everything is a function of seeds. Models that are trained on different subsets begin with the same weights and see the
same timesteps and noise, so that what their losses differ by is the data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

STEPS = 1000
"""Timesteps of the noise schedule."""
COSINE = "squaredcos_cap_v2"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is made.

    size: pixels of a side.
    channels: of the UNet's blocks; all but the first have attention if `attention`.
    steps, batch, rate: of AdamW, whose rate falls to zero along a cosine.
    schedule: of the noise: diffusers' name for it.
    """

    size: int
    channels: tuple[int, ...]
    attention: bool
    steps: int
    batch: int
    rate: float
    schedule: str = COSINE


def make_model(recipe: Recipe, seed: int = 0) -> UNet2DModel:
    """A model with the weights that every training begins with."""
    kind = "Attn" if recipe.attention else ""
    inner = len(recipe.channels) - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=recipe.size,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=recipe.channels,
            down_block_types=("DownBlock2D", *(f"{kind}DownBlock2D",) * inner),
            up_block_types=(*(f"{kind}UpBlock2D",) * inner, "UpBlock2D"),
            norm_num_groups=8,
            add_attention=recipe.attention,
        )


def noise_schedule(name: str = COSINE) -> DDPMScheduler:
    """Of training and of all losses."""
    return DDPMScheduler(num_train_timesteps=STEPS, beta_schedule=name)


def train(recipe: Recipe, images: torch.Tensor, seed: int = 0, done: Callable[[], None] | None = None) -> UNet2DModel:
    """Trains a model on images (n, 1, size, size) in [-1, 1]."""
    model, schedule = make_model(recipe, seed), noise_schedule(recipe.schedule)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    draws, order = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    waiting = torch.empty(0, dtype=torch.int64)
    for _ in range(recipe.steps):
        while len(waiting) < recipe.batch:
            waiting = torch.cat([waiting, torch.randperm(len(images), generator=order)])
        batch, waiting = images[waiting[: recipe.batch]], waiting[recipe.batch :]
        timesteps = torch.randint(0, STEPS, (recipe.batch,), generator=draws)
        noise = torch.randn(batch.shape, generator=draws)
        found = model(schedule.add_noise(batch, noise, timesteps), timesteps).sample
        loss = torch.nn.functional.mse_loss(found, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        if done is not None:
            done()
    return model.eval().requires_grad_(False)


def losses(model: UNet2DModel, images: torch.Tensor, draws: int = 100, seed: int = 7) -> NDArray[np.float64]:
    """The loss of each image (n,): the mean over timesteps spread evenly, with the same noise for all images."""
    total = np.zeros(len(images))
    for column in losses_by_timestep(model, images, draws, seed).T:
        total += column
    return total / draws


@torch.no_grad()
def losses_by_timestep(
    model: UNet2DModel, images: torch.Tensor, draws: int = 100, seed: int = 7
) -> NDArray[np.float64]:
    """(n, draws): the same, at each of the timesteps."""
    schedule, generator = noise_schedule(), torch.Generator().manual_seed(seed)
    found = np.empty((len(images), draws))
    for column, timestep in enumerate(evenly(draws)):
        noise = torch.randn(images.shape[1:], generator=generator)
        timesteps = torch.full((len(images),), timestep)
        noisy = schedule.add_noise(images, noise.expand_as(images), timesteps)
        found[:, column] = (model(noisy, timesteps).sample - noise).square().mean((1, 2, 3)).numpy()
    return found


def evenly(count: int) -> list[int]:
    """So many timesteps, each in the middle of its part of the schedule, as dmin_trace spreads them."""
    return [int((k + 0.5) / count * STEPS) for k in range(count)]


def generate(model: UNet2DModel, count: int, steps: int = 100, seed: int = 0, schedule: str = COSINE) -> torch.Tensor:
    """Pictures (count, 1, size, size) in [-1, 1], by DDIM without noise of its own."""
    return followed(model, count, steps, seed, schedule)[0]


@torch.no_grad()
def followed(
    model: UNet2DModel, count: int, steps: int = 100, seed: int = 0, schedule: str = COSINE
) -> tuple[torch.Tensor, list[tuple[int, torch.Tensor]]]:
    """The pictures of `generate`, and for each step of their sampling its timestep and the pictures expected then."""
    sampler = DDIMScheduler(num_train_timesteps=STEPS, beta_schedule=schedule)
    sampler.set_timesteps(steps)
    size = model.config.sample_size
    images = torch.randn((count, 1, size, size), generator=torch.Generator().manual_seed(seed))
    seen = []
    for timestep in sampler.timesteps:
        step = sampler.step(model(images, timestep).sample, timestep, images)
        images = step.prev_sample
        seen.append((int(timestep), step.pred_original_sample.clamp(-1, 1)))
    return images.clamp(-1, 1), seen


def save(path: Path, model: UNet2DModel) -> None:
    """Writes the weights to a file, whole or not at all."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)


def load(path: Path, recipe: Recipe) -> UNet2DModel:
    """The model whose weights `save` wrote."""
    model = make_model(recipe)
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False)
