"""What DMin's published code computes for a DDPM, so that its figures can be compared with like.

Read and run at github.com/huawei-lin/DMin, commit a550120 (May 2025): DMIN/pipelines/pipeline_ddpm.py and
DMIN/dim_reducer.py; nothing of it is copied. It holds no code for the paper's baselines. For each image alone, with the
model in eval mode:

- The image is in [0, 1], from 8 bits, at its own size: not in [-1, 1], where diffusers' DDPMs are trained.
- One noise tensor, (C, H, W), for all samples, all queries *and all timesteps*; drawn once from the global generator,
  kept in a file. (main.py seeds that with 42, but what draws before it depends on the model's loading and the device.)
- The timesteps are spaced by cubes, dense where the noise is strong: `published_timesteps`.
- The model is fed the image noised to t by the scheduler (not noise alone), and the loss is the mean squared error of
  its output to the noise: `published_loss`. Whatever the model predicts: no v-prediction, no weights by timestep.
- The gradient is of all parameters that have one, or of those with "lora" in their names where there are any, in the
  order of `named_parameters`, float32: `published_gradients`.
- Each timestep's gradient is divided by its L2 norm, padded with zeros to a multiple of the largest v, permuted,
  multiplied by random signs, and summed in v groups of neighbours: `published_compression`.
- The score of whole gradients is the mean over timesteps of the inner products, of compressed ones their sum:
  `inner_products(..., normalised=True)` up to the factor T.

Its pipelines for Stable Diffusion keep only parameters named "transformer_blocks", draw the latents anew for each
image, and regress on the noise too, SD3's flow included. SD1's timesteps are the cubic ones without the first, less 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dmin_trace.errors import SettingsError


def published_timesteps(count: int, schedule: Sequence[int] | torch.Tensor) -> list[int]:
    """The timesteps that the published code takes: entries of the schedule at M (j / count)^3, rounded down.

    Of 1000: 999, 991, 935, 783, 487 for 5; 999, 998, 991, 972, 935, 874, 783, 656, 487, 270 for 10. From 11 on the
    first ones coincide.

    Args:
        count: how many, T ("num_estimate_steps").
        schedule: all M timesteps of the scheduler in its own order, from noise to image: `DDPMScheduler().timesteps`.

    Raises:
        SettingsError: a count below 1, or a schedule that does not go down.
    """
    if count < 1:
        raise SettingsError(f"count is {count}; 1 or more is expected.")
    steps = [int(t) for t in schedule]
    if any(later >= earlier for earlier, later in zip(steps, steps[1:], strict=False)):
        raise SettingsError("The schedule must go down, from noise to image, as DDPMScheduler().timesteps does.")
    # The same operations in the same order as the original, so that rounding down meets the same floats.
    cubes = np.linspace(0, 1, count + 1) ** 3
    places = (cubes / cubes.max() * len(steps)).astype(np.int32)[:-1]
    return [steps[place] for place in places]


def published_noise(shape: Sequence[int], seed: int = 42) -> torch.Tensor:
    """The one noise of a run: standard normal, float32, by a generator of its own.

    Args:
        shape: (C, H, W) of the images.
        seed: the original's is 42, but its draw is not repeatable: see above.
    """
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def published_loss(
    model: torch.nn.Module, scheduler: Any, image: torch.Tensor, timestep: int, noise: torch.Tensor
) -> torch.Tensor:
    """The published code's objective at one timestep, of one image.

    Args:
        model: `UNet2DModel`, or what is called like it, in eval mode.
        scheduler: `DDPMScheduler`, or what has its `add_noise`.
        image: (C, H, W) in [0, 1].
        timestep: t.
        noise: (C, H, W), the same for all images and timesteps.

    Returns:
        A scalar, float32.

    Raises:
        SettingsError: an image of another shape or range: the original takes 8-bit images over 255.
    """
    if image.ndim != 3 or image.shape != noise.shape:
        raise SettingsError(f"image is {tuple(image.shape)}, noise {tuple(noise.shape)}; both must be one (C, H, W).")
    if not (image.min() >= 0 and image.max() <= 1):
        raise SettingsError(f"image lies in [{image.min():g}, {image.max():g}]; the published objective takes [0, 1].")
    t = torch.tensor([timestep], device=image.device)
    noisy = scheduler.add_noise(image[None], noise[None], t)
    return F.mse_loss(model(noisy, t).sample.float(), noise[None].float())


def published_gradients(
    model: torch.nn.Module, scheduler: Any, image: torch.Tensor, timesteps: Sequence[int], noise: torch.Tensor
) -> torch.Tensor:
    """The gradients of `published_loss` at each timestep, before anything else is done to them.

    Args:
        model, scheduler, image, noise: as for `published_loss`.
        timesteps: T of them, as of `published_timesteps`.

    Returns:
        (T, P) float32, on the model's device. `.grad` is left alone.

    Raises:
        SettingsError: as `published_loss`.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    adapters = [parameter for name, parameter in named if "lora" in name]
    parameters = adapters or [parameter for _, parameter in named]
    rows = []
    for timestep in timesteps:
        loss = published_loss(model, scheduler, image, timestep, noise)
        taken = torch.autograd.grad(loss, parameters, allow_unused=True)
        rows.append(torch.cat([gradient.reshape(-1) for gradient in taken if gradient is not None]))
    return torch.stack(rows)


def published_compression(
    gradients: torch.Tensor, dimension: int, seed: int = 42, largest: int | None = None
) -> torch.Tensor:
    """The published normalisation and compression: the paper's OPORP, in v groups of neighbours.

    The same numbers as the original's, permutation and signs included, on a CPU.

    Args:
        gradients: (T, P).
        dimension: v ("K").
        seed: of the signs and the permutation.
        largest: the largest v of the run where there are several: gradients are padded to a multiple of it. Default: v.

    Returns:
        (T, v), not normalised again.

    Raises:
        SettingsError: a dimension that does not divide the largest.
    """
    largest = dimension if largest is None else largest
    if dimension < 1 or largest % dimension:
        raise SettingsError(f"A dimension of {dimension} does not divide {largest}, the largest of the run.")
    length = -(-gradients.shape[1] // largest) * largest
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (length,), generator=generator) * 2 - 1
    order = torch.randperm(length, generator=generator)
    padded = F.pad(F.normalize(gradients, dim=1), (0, length - gradients.shape[1]))
    mixed = padded[:, order.to(padded.device)] * signs.to(padded.device)
    return mixed.reshape(len(padded), dimension, -1).sum(dim=2)
