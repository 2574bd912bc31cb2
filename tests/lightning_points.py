"""A LightningModule that denoises points, for tests."""

from __future__ import annotations

from typing import Any

import torch
import torchmetrics
from lightning.pytorch import LightningModule
from torch.nn.functional import mse_loss
from torch.utils.data import Dataset

from dmin_trace.settings import Settings

SMALL = Settings(timesteps=3, dimension=64, dtype="float32", transform="none")


class Points(Dataset[Any]):
    """Twelve points of 16 numbers, with captions."""

    def __init__(self) -> None:
        self.points = torch.randn(12, 16, generator=torch.Generator().manual_seed(5))
        self.caption = [f"point {k}" for k in range(12)]

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"point": self.points[index], "index": index}


class Inner(torch.nn.Module):
    """Guesses the noise in 16 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(17, 24)
        self.drop = torch.nn.Dropout(0.3)
        self.outer = torch.nn.Linear(24, 16)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        t = timestep.reshape(-1, 1).to(sample.dtype) / 1000
        guess: torch.Tensor = self.outer(self.drop(torch.tanh(self.inner(torch.cat([sample, t], 1)))))
        return guess


class Denoiser(LightningModule):
    """Keeps all kinds of records in its training_step, as modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = Inner()
        self.mean = torchmetrics.MeanMetric()
        self.register_buffer("seen", torch.zeros(()))
        self.losses: list[torch.Tensor] = []
        self.count = 0

    def draw(self, clean: torch.Tensor) -> torch.Tensor:
        return torch.randint(0, 1000, (len(clean),), device=clean.device)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        clean = batch["point"]
        noise = torch.randn_like(clean)
        t = self.draw(clean)
        loss = mse_loss(self.denoiser(clean + noise * t.reshape(-1, 1) / 1000, t), noise)
        self.losses.append(loss.detach())
        self.count += 1
        self.seen += len(clean)
        self.mean(loss)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"mean": self.mean})
        if self.logger is not None:
            self.logger.experiment.log_metrics({"by_hand": loss.item()}, step=self.count)
        return {"loss": loss, "more": loss.detach()}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2)}
