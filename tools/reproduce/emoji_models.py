"""The two text-to-image models of the emoji experiments, which fit one core: how they are made, trained and asked.

`Sd` is of Stable Diffusion's type: a UNet2DConditionModel that attends to the tokens of a caption, with diffusers'
v-prediction loss. `Sd3` is of Stable Diffusion 3's: a SD3Transformer2DModel that is given the tokens and a pooled
caption, with flow matching. The autoencoder is a linear one, fitted in closed form: the principal components of
patches of 4x4 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from peft import LoraConfig
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast

PATCH = 4
SIDE = 32 // PATCH
CHANNELS = 8
STEPS = 1000
"""Of the noise schedule."""
WIDTH = 64
"""Of a token's embedding."""
TOKENS = 16
START, END, UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"
RANK = 8
GUIDANCE = 4.0
"""Of pictures that are made; `emoji_base_page.py` compares it with others."""


class Words(NamedTuple):
    """Captions as a denoiser is given them: (B, TOKENS, WIDTH) and (B, WIDTH) float32."""

    tokens: torch.Tensor
    pooled: torch.Tensor

    def at(self, places: Any) -> Words:
        """Some of them."""
        return Words(self.tokens[places], self.pooled[places])


# -- pictures and captions ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Autoencoder:
    """Patches of 4x4 pixels to and from their first principal components, all divided by one number.

    mean: (48,), of a patch.
    components: (48, CHANNELS), orthonormal.
    scale: the standard deviation of all components together, as Stable Diffusion's scaling factor has it.
    kept: the share of the pixels' variance that the components hold.
    """

    mean: torch.Tensor
    components: torch.Tensor
    scale: float
    kept: float

    @classmethod
    def fit(cls, images: np.ndarray) -> Autoencoder:
        """To (N, 32, 32, 3) uint8."""
        rows = _patches(images).permute(0, 2, 3, 1).flatten(0, 2).double()
        mean = rows.mean(dim=0)
        variance, directions = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
        held = float(variance[-CHANNELS:].sum())
        components = directions[:, -CHANNELS:].flip(1)
        return cls(mean.float(), components.float(), (held / CHANNELS) ** 0.5, held / float(variance.sum()))

    def encode(self, images: np.ndarray) -> torch.Tensor:
        """(B, 32, 32, 3) uint8 -> (B, CHANNELS, 8, 8) float32."""
        rows = _patches(images).permute(0, 2, 3, 1) - self.mean
        return ((rows @ self.components) / self.scale).permute(0, 3, 1, 2).contiguous()

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """The way back, rounded: (B, CHANNELS, 8, 8) float32 -> (B, 32, 32, 3) uint8."""
        rows = latents.permute(0, 2, 3, 1) * self.scale @ self.components.T + self.mean
        pixels = functional.pixel_shuffle(rows.permute(0, 3, 1, 2), PATCH).clamp(-1, 1)
        return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _patches(images: np.ndarray) -> torch.Tensor:
    """(B, 32, 32, 3) uint8 -> (B, 48, 8, 8) float32 from -1 to 1."""
    return functional.pixel_unshuffle(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, PATCH)


def make_tokenizer(captions: Iterable[str]) -> PreTrainedTokenizerFast:
    """A token for each word; a caption is filled up to `TOKENS` with END, as CLIP's are."""
    split = pre_tokenizers.Whitespace()
    words = sorted({word for caption in captions for word, _ in split.pre_tokenize_str(caption.lower())})
    vocabulary = {word: k for k, word in enumerate([START, END, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, vocabulary[START]), (END, vocabulary[END])]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        unk_token=UNKNOWN,
        pad_token=END,
        model_max_length=TOKENS,
    )


def token_ids(tokenizer: PreTrainedTokenizerFast, captions: Sequence[str]) -> torch.Tensor:
    """(B, TOKENS) int64."""
    found = tokenizer(list(captions), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    ids: torch.Tensor = found.input_ids
    return ids


def text_config(vocabulary: int) -> CLIPTextConfig:
    """Of a text encoder of two layers."""
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=TOKENS,
        projection_dim=WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


# -- the models --------------------------------------------------------------------------------------------------------


class Sd:
    """Stable Diffusion's type."""

    name = "SD type (UNet2DConditionModel, v-prediction)"
    lora = (
        *("to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "proj_in", "proj_out"),
    )

    def __init__(self) -> None:
        # Latents reach beyond -1 and 1, where the schedule would clip pixels.
        self.schedule = DDPMScheduler(
            STEPS, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False
        )

    def new(self, vocabulary: int) -> tuple[torch.nn.Module, torch.nn.Module]:
        """A denoiser and a text encoder that know nothing."""
        unet = UNet2DConditionModel(
            sample_size=SIDE,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            layers_per_block=1,
            block_out_channels=(48, 96),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            # How many heads, whatever its name says.
            attention_head_dim=4,
            norm_num_groups=8,
        )
        return unet, CLIPTextModel(text_config(vocabulary))

    def encode(self, encoder: torch.nn.Module, ids: torch.Tensor) -> Words:
        """The denoiser is given the tokens alone; the pooled caption is CLIP's."""
        found = encoder(ids)
        return Words(found.last_hidden_state, found.pooler_output)

    def predict(self, denoiser: torch.nn.Module, noisy: torch.Tensor, t: torch.Tensor, words: Words) -> torch.Tensor:
        """What the denoiser says at timesteps t, (B,)."""
        said: torch.Tensor = denoiser(noisy, t, words.tokens, return_dict=False)[0]
        return said

    def draw(self, count: int) -> torch.Tensor:
        """Timesteps of training, evenly."""
        return torch.randint(0, STEPS, (count,))

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the denoiser is given, and what it should say."""
        return self.schedule.add_noise(clean, noise, t), self.schedule.get_velocity(clean, noise, t)

    def sampler(self) -> Any:
        """The scheduler to make pictures with."""
        return DDIMScheduler.from_config(self.schedule.config)


class Sd3:
    """Stable Diffusion 3's type."""

    name = "SD3 type (SD3Transformer2DModel, flow matching)"
    lora = tuple(
        f"attn.{part}"
        for part in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v")
    )

    def new(self, vocabulary: int) -> tuple[torch.nn.Module, torch.nn.Module]:
        """A denoiser and a text encoder that know nothing."""
        transformer = SD3Transformer2DModel(
            sample_size=SIDE,
            patch_size=1,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=4,
            num_attention_heads=3,
            attention_head_dim=32,
            joint_attention_dim=WIDTH,
            caption_projection_dim=96,
            pooled_projection_dim=WIDTH,
            pos_embed_max_size=SIDE,
        )
        return transformer, CLIPTextModelWithProjection(text_config(vocabulary))

    def encode(self, encoder: torch.nn.Module, ids: torch.Tensor) -> Words:
        """Tokens, and the pooled caption after CLIP's projection."""
        found = encoder(ids)
        return Words(found.last_hidden_state, found.text_embeds)

    def predict(self, denoiser: torch.nn.Module, noisy: torch.Tensor, t: torch.Tensor, words: Words) -> torch.Tensor:
        """What the denoiser says at timesteps t, (B,)."""
        said: torch.Tensor = denoiser(
            hidden_states=noisy,
            timestep=t.float(),
            encoder_hidden_states=words.tokens,
            pooled_projections=words.pooled,
            return_dict=False,
        )[0]
        return said

    def draw(self, count: int) -> torch.Tensor:
        """Timesteps of training, evenly."""
        return torch.randint(0, STEPS, (count,)) + 1

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the denoiser is given, and what it should say."""
        sigma = (t / STEPS).reshape(-1, 1, 1, 1)
        return (1 - sigma) * clean + sigma * noise, noise - clean

    def sampler(self) -> Any:
        """The scheduler to make pictures with."""
        return FlowMatchEulerDiscreteScheduler(STEPS)


Kind = Sd | Sd3
KINDS: dict[str, Callable[[], Kind]] = {"sd": Sd, "sd3": Sd3}


def losses_at(
    kind: Kind, denoiser: torch.nn.Module, clean: torch.Tensor, words: Words, noise: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """(B,) the losses of samples at timesteps t (B,), with a noise (B, CHANNELS, 8, 8)."""
    noisy, target = kind.noised(clean, noise, t)
    return (kind.predict(denoiser, noisy, t, words) - target).square().mean((1, 2, 3))


def training_loss(kind: Kind, denoiser: torch.nn.Module, clean: torch.Tensor, words: Words) -> torch.Tensor:
    """The mean loss of a batch: draws noise and timesteps."""
    noise = torch.randn_like(clean)
    return losses_at(kind, denoiser, clean, words, noise, kind.draw(len(clean))).mean()


def add_lora(kind: Kind, denoiser: Any) -> None:
    """Freezes the model, and gives the layers of `kind.lora` LoRA layers to train."""
    denoiser.requires_grad_(False)
    denoiser.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=list(kind.lora))
    )


# -- training and sampling ---------------------------------------------------------------------------------------------


def train(
    kind: Kind,
    denoiser: torch.nn.Module,
    latents: torch.Tensor,
    words_of: Callable[[torch.Tensor], Words],
    parameters: Sequence[torch.nn.Parameter],
    steps: Iterable[int],
    total: int,
    *,
    learning_rate: float,
    batch: int,
    seed: int,
) -> float:
    """Trains with AdamW, a warm-up over a twentieth of the steps and a cosine to zero.

    The models have no dropout, so the mode of training and that of evaluation are the same.

    Args:
        latents: (N, CHANNELS, 8, 8).
        words_of: gives the captions of some samples; it is the one to leave some of them out.
        steps: 0 to total - 1, perhaps with a bar that shows them.
        batch: samples in a step, drawn from a shuffled set, each once before any comes again.

    Returns:
        The mean loss of the last tenth of the steps.
    """
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-2)
    warm = max(1, total // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (1 + math.cos(math.pi * step / total)) / 2)
    )
    queue = torch.empty(0, dtype=torch.int64)
    losses: list[float] = []
    for _ in steps:
        while len(queue) < batch:
            queue = torch.cat([queue, torch.randperm(len(latents))])
        chosen, queue = queue[:batch], queue[batch:]
        loss = training_loss(kind, denoiser, latents[chosen], words_of(chosen))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return float(np.mean(losses[-max(1, total // 10) :]))


@torch.no_grad()
def generate(
    kind: Kind,
    denoiser: torch.nn.Module,
    words: Words,
    empty: Words,
    steps: int,
    seed: int,
    guidance: float = GUIDANCE,
) -> torch.Tensor:
    """Makes a picture for each caption, with classifier-free guidance.

    Args:
        words: of the captions, B of them.
        empty: of the empty caption, one.

    Returns:
        Latents, (B, CHANNELS, 8, 8).
    """
    count = len(words.tokens)
    x = torch.randn(count, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    both = Words(*(torch.cat([part, none.expand_as(part)]) for part, none in zip(words, empty, strict=True)))
    sampler = kind.sampler()
    sampler.set_timesteps(steps)
    for t in sampler.timesteps:
        said = kind.predict(denoiser, torch.cat([x, x]), t.expand(2 * count), both)
        told, untold = said.chunk(2)
        x = sampler.step(untold + guidance * (told - untold), t, x, return_dict=False)[0]
    return x
