"""A denoiser of points and its plain loop, for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import mse_loss

import dmin_trace

POINTS = torch.randn(12, 16, generator=torch.Generator().manual_seed(5))


class Denoiser(torch.nn.Module):
    """Guesses the noise in 16 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(17, 24)
        self.drop = torch.nn.Dropout(0.3)
        self.outer = torch.nn.Linear(24, 16)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        t = timestep.reshape(-1, 1).float() / 1000
        return self.outer(self.drop(torch.tanh(self.inner(torch.cat([sample, t.expand(len(sample), 1)], 1)))))


def denoiser(seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser()


def loss_of(model: torch.nn.Module, clean: torch.Tensor) -> torch.Tensor:
    noise = torch.randn_like(clean)
    t = torch.randint(0, 1000, (len(clean),))
    return mse_loss(model(clean + noise * t.reshape(-1, 1) / 1000, t), noise)


def record(model: torch.nn.Module, out: Path, loss: Callable[..., torch.Tensor] = loss_of, **settings: Any) -> Path:
    """The documented loop over the twelve points."""
    settings = {"timesteps": 3, "dimension": 64, "dtype": "float32", "transform": "none"} | settings
    with dmin_trace.recording(model, samples=len(POINTS), out=out, **settings) as recording:
        for i in recording.samples:
            for k in recording.timesteps:
                with recording.step(i, k):
                    loss(model, POINTS[i : i + 1]).backward()
    return out
