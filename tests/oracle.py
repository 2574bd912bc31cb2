"""The slow, obvious way to a digits model's per-sample gradients (saved weights and plain autograd), and what the tests
of other models need to compare theirs with a trace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file

from dmin_trace.project import compress_gradient, make_plan
from dmin_trace.store import Store


def digits_unet() -> UNet2DModel:
    """The example's model, untrained."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


def digits_model(weights: Path) -> UNet2DModel:
    """The example's model with weights from a safetensors file."""
    model = digits_unet()
    model.load_state_dict(load_file(weights))
    return model.eval()


def slot_seed(seed: int, slot: int) -> int:
    """The documented seed of a slot: the first 32 bits of numpy's SeedSequence of (seed, slot + 1)."""
    return int(np.random.SeedSequence([seed, slot + 1]).generate_state(1)[0])


def digit_gradients(
    model: UNet2DModel, image: Path, timesteps: list[int], seed: int = 0
) -> Iterator[tuple[float, dict[str, torch.Tensor]]]:
    """For each timestep the loss and the gradient with respect to every parameter, of one 8x8 image."""
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    pixels = torch.from_numpy(np.asarray(Image.open(image).convert("L")) / np.float32(127.5) - 1)[None, None]
    for slot, timestep in enumerate(timesteps):
        generator = torch.Generator().manual_seed(slot_seed(seed, slot))
        noise = torch.randn(pixels.shape, generator=generator)
        t = torch.tensor([timestep])
        predicted = model(scheduler.add_noise(pixels, noise, t), t).sample
        loss = F.mse_loss(predicted, noise)
        names, parameters = zip(*model.named_parameters(), strict=True)
        yield loss.item(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def unshuffled(trace: Store, sample: int) -> np.ndarray:
    """The captured gradients of a sample, (T, L), every element in its place.

    The sketch must be as long as the gradient and by OPORP's own permutation: then it is the gradient, shuffled.
    """
    facts = trace.header.projection
    plan = make_plan(facts.length, trace.header.dimension, facts.seed, "uniform", facts.width)
    numbers, _ = compress_gradient([torch.arange(1, facts.length + 1, dtype=torch.float64).float()], plan)
    order = torch.argsort(numbers.abs())[-facts.length :].numpy()
    signs = np.sign(numbers.numpy())[order]
    gradients: np.ndarray = trace.gradients(np.array([sample]))[0][:, order] * signs * trace.norm[sample][:, None]
    return gradients
