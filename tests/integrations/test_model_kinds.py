"""SDXL, SD3 and Flux: small loops of their kinds, captured without a line in them, against gradients made here."""

from __future__ import annotations

import contextlib
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from oracle import slot_seed, unshuffled
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_pipelines import command_line

from dmin_trace.store import open_store

COUNT = 4
SLOTS = (166, 500, 833)
"""The quantiles 1/6, 1/2 and 5/6 of a schedule of 1000 steps."""

SCRIPT = '''
import argparse
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import {model}, {scheduler}, FluxPipeline
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from peft import LoraConfig
from safetensors.torch import save_file

class Encoded(torch.utils.data.Dataset):
    """Latents, and what the text encoders would have made of captions."""
    def __init__(self):
        draw = torch.Generator().manual_seed(11)
        self.latents = torch.randn({count}, 4, 8, 8, generator=draw)
        self.words = torch.randn({count}, 6, 32, generator=draw)
        self.pooled = torch.randn({count}, 16, generator=draw)
        self.caption = ["caption %d" % k for k in range({count})]
    def __len__(self):
        return len(self.latents)
    def __getitem__(self, k):
        return {{"latents": self.latents[k], "prompt_embeds": self.words[k], "pooled": self.pooled[k]}}

def main(args):
    accelerator = Accelerator()
    set_seed(1)
    torch.manual_seed(2)
    model = {model}(**{config!r})
    if {lora}:
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules={lora!r}))
    trained = {{name: p for name, p in model.named_parameters() if p.requires_grad}}
    scheduler = {scheduler}()
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    loader = torch.utils.data.DataLoader(Encoded(), batch_size=2, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    global_step = 0
    for epoch in range(100):
        model.train()
        for batch in loader:
            with accelerator.accumulate(model):
                latents = batch["latents"]
                words, pooled = batch["prompt_embeds"], batch["pooled"]
                noise = torch.randn_like(latents)
{loss}
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                global_step += 1
            if global_step >= args.max_train_steps:
                break
        if global_step >= args.max_train_steps:
            break
    save_file({{n: p.detach().contiguous() for n, p in trained.items()}}, args.output_dir + ".safetensors")

parser = argparse.ArgumentParser()
parser.add_argument("--output_dir")
parser.add_argument("--max_train_steps", type=int)
main(parser.parse_args())
'''

SDXL_LOSS = """
                timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),))
                sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).repeat(len(latents), 1)
                added = {"time_ids": sizes, "text_embeds": pooled}
                noisy = scheduler.add_noise(latents, noise, timesteps)
                predicted = model(noisy, timesteps, words, added_cond_kwargs=added, return_dict=False)[0]
                loss = torch.nn.functional.mse_loss(predicted, noise)"""

FLOW = """
                u = compute_density_for_timestep_sampling(
                    weighting_scheme="{scheme}", batch_size=len(latents),
                    logit_mean=0.0, logit_std=1.0, mode_scale=1.29)
                indices = (u * scheduler.config.num_train_timesteps).long()
                timesteps = scheduler.timesteps[indices]
                sigmas = scheduler.sigmas[indices].reshape(-1, 1, 1, 1)
                noisy = (1 - sigmas) * latents + sigmas * noise"""

SD3_LOSS = (
    FLOW.format(scheme="logit_normal")
    + """
                predicted = model(hidden_states=noisy, timestep=timesteps, encoder_hidden_states=words,
                                  pooled_projections=pooled, return_dict=False)[0]
                predicted = predicted * (-sigmas) + noisy
                weighting = compute_loss_weighting_for_sd3(weighting_scheme="sigma_sqrt", sigmas=sigmas)
                loss = (weighting * (predicted - latents) ** 2).reshape(len(latents), -1).mean(1).mean()"""
)

FLUX_LOSS = (
    FLOW.format(scheme="mode")
    + """
                places = FluxPipeline._prepare_latent_image_ids(len(latents), 4, 4, latents.device, latents.dtype)
                packed = FluxPipeline._pack_latents(noisy, len(latents), 4, 8, 8)
                predicted = model(hidden_states=packed, timestep=timesteps / 1000,
                                  guidance=torch.tensor([3.5]).expand(len(latents)), pooled_projections=pooled,
                                  encoder_hidden_states=words, txt_ids=torch.zeros(6, 3), img_ids=places,
                                  return_dict=False)[0]
                predicted = FluxPipeline._unpack_latents(predicted, height=64, width=64, vae_scale_factor=8)
                loss = ((predicted - (noise - latents)) ** 2).reshape(len(latents), -1).mean(1).mean()"""
)

Sample = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def sdxl_reference(model: Any, slot: int, sample: Sample, noise: torch.Tensor) -> torch.Tensor:
    latents, words, pooled = sample
    betas = torch.linspace(0.0001, 0.02, 1000)
    kept = torch.cumprod(1 - betas, 0)[slot]
    added = {"time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]]), "text_embeds": pooled}
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    predicted: torch.Tensor = model(noisy, torch.tensor([slot]), words, added_cond_kwargs=added).sample
    return (predicted - noise).square().mean()


def sd3_reference(model: Any, slot: int, sample: Sample, noise: torch.Tensor) -> torch.Tensor:
    latents, words, pooled = sample
    sigma = torch.tensor((1000 - slot) / 1000)
    velocity: torch.Tensor = model(
        hidden_states=torch.lerp(latents, noise, sigma),
        timestep=sigma[None] * 1000,
        encoder_hidden_states=words,
        pooled_projections=pooled,
    ).sample
    # Weighted by sigma**-2, the error of the preconditioned output is that of the velocity itself.
    return (velocity - (noise - latents)).square().mean()


def flux_reference(model: Any, slot: int, sample: Sample, noise: torch.Tensor) -> torch.Tensor:
    latents, words, pooled = sample
    sigma = torch.tensor((1000 - slot) / 1000)

    def patches(image: torch.Tensor) -> torch.Tensor:
        """(1, 4, 8, 8) as 16 patches of 2x2: (1, 16, 16)."""
        rows = [image[0, :, y : y + 2, x : x + 2].flatten() for y in range(0, 8, 2) for x in range(0, 8, 2)]
        return torch.stack(rows)[None]

    predicted: torch.Tensor = model(
        hidden_states=patches(torch.lerp(latents, noise, sigma)),
        timestep=sigma[None],
        guidance=torch.tensor([3.5]),
        pooled_projections=pooled,
        encoder_hidden_states=words,
        txt_ids=torch.zeros(6, 3),
        img_ids=torch.tensor([[0.0, y, x] for y in range(4) for x in range(4)]),
    ).sample
    return (predicted - patches(noise - latents)).square().mean()


@dataclass(frozen=True)
class Kind:
    """One kind of model: how it is made, trained by the script, and its loss on one sample, made here."""

    model: str
    scheduler: str
    config: dict[str, Any]
    loss: str
    reference: Callable[[Any, int, Sample, torch.Tensor], torch.Tensor]
    lora: tuple[str, ...] = ()
    slots: tuple[int, ...] = SLOTS


KINDS = {
    "SDXL, LoRA": Kind(
        model="UNet2DConditionModel",
        scheduler="DDPMScheduler",
        config={
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "cross_attention_dim": 32,
            "norm_num_groups": 8,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            # 6 time ids of 8 numbers each, and the pooled embedding.
            "projection_class_embeddings_input_dim": 6 * 8 + 16,
        },
        loss=SDXL_LOSS,
        reference=sdxl_reference,
        lora=("to_k", "to_q", "to_v", "to_out.0"),
    ),
    "SD3, every parameter": Kind(
        model="SD3Transformer2DModel",
        scheduler="FlowMatchEulerDiscreteScheduler",
        config={
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 8,
        },
        loss=SD3_LOSS,
        reference=sd3_reference,
        # Of a logit-normal distribution.
        slots=(275, 500, 724),
    ),
    "Flux, LoRA": Kind(
        model="FluxTransformer2DModel",
        scheduler="FlowMatchEulerDiscreteScheduler",
        config={
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 4, 8),
            "guidance_embeds": True,
        },
        loss=FLUX_LOSS,
        reference=flux_reference,
        # Of the distribution "mode", which falls as its draw rises.
        slots=(704, 500, 295),
        lora=("to_k", "to_q", "to_v", "to_out.0"),
    ),
}


def saved_model(kind: Kind, weights: Path) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """The model as the script makes it, with the values that the script saved for what it trained."""
    torch.manual_seed(2)
    model = getattr(diffusers, kind.model)(**kind.config)
    if kind.lora:
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=list(kind.lora)))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved = load_file(weights)
    assert set(saved) == set(trained)
    with torch.no_grad():
        for name, parameter in trained.items():
            assert not torch.equal(parameter, saved[name]), f"{name} was not trained"
            parameter.copy_(saved[name])
    return model.eval(), trained


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_loop_is_captured_and_not_disturbed(tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train.py"
    parts = {"model": kind.model, "scheduler": kind.scheduler, "config": kind.config, "lora": list(kind.lora)}
    script.write_text(SCRIPT.format(**parts, loss=kind.loss, count=COUNT))
    arguments = [str(script), "--max_train_steps", "5", "--output_dir"]
    with contextlib.chdir(tmp_path):
        monkeypatch.setattr(sys, "argv", [*arguments, "bare"])
        runpy.run_path(str(script), run_name="__main__")
    options = ("--dtype", "float32", "--transform", "none", "--projection", "uniform", "--dimension", 2**16)
    command_line(["run", "--timesteps", len(kind.slots), *options, "--", *arguments, "captured"], tmp_path)
    assert (tmp_path / "captured.safetensors").read_bytes() == (tmp_path / "bare.safetensors").read_bytes()

    trace = open_store(tmp_path / "captured.trace" / "trace.zarr")
    assert trace.complete and trace.sample.tolist() == list(range(COUNT))
    assert list(trace.column("caption")) == [f"caption {k}" for k in range(COUNT)]
    model, trained = saved_model(kind, tmp_path / "bare.safetensors")
    assert list(trace.header.parameters.names) == list(trained)
    draw = torch.Generator().manual_seed(11)
    latents = torch.randn(COUNT, 4, 8, 8, generator=draw)
    words = torch.randn(COUNT, 6, 32, generator=draw)
    pooled = torch.randn(COUNT, 16, generator=draw)
    for k in range(COUNT):
        captured = unshuffled(trace, k)
        for n, slot in enumerate(kind.slots):
            noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(slot_seed(0, n)))
            loss = kind.reference(model, slot, (latents[k : k + 1], words[k : k + 1], pooled[k : k + 1]), noise)
            taken = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            whole = [torch.zeros_like(p) if g is None else g for p, g in zip(trained.values(), taken, strict=True)]
            expected = torch.cat([gradient.flatten() for gradient in whole]).numpy()
            assert np.linalg.norm(captured[n] - expected) <= 1e-5 * np.linalg.norm(expected), (k, slot)
