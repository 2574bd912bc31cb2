"""Tiny random pipelines and pictures, for the upstream scripts that `tools/one_line.py` runs. Nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

SIZE = 64
SAMPLES = 10
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write_pictures(folder: Path) -> None:
    """`captioned` has captions, `pairs` conditioning images too, `plain` nothing but the same pictures.

    `class` has pictures of its own, for prior preservation.
    """
    folders = ("pairs", "captioned", "plain")
    lines = []
    for name in folders:
        (folder / name).mkdir(parents=True)
    digits = load_digits()
    (folder / "class").mkdir()
    for k in range(4):
        pixels = (digits.images[100 + k] * 255 / 16).astype(np.uint8)
        Image.fromarray(pixels).resize((SIZE, SIZE)).convert("RGB").save(folder / "class" / f"{k}.png")
    for k in range(SAMPLES):
        pixels = (digits.images[k] * 255 / 16).astype(np.uint8)
        picture = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")
        edges = Image.fromarray(np.where(pixels > 128, 255, 0).astype(np.uint8)).resize((SIZE, SIZE)).convert("RGB")
        for name in folders:
            picture.save(folder / name / f"{k:02d}.png")
        edges.save(folder / "pairs" / f"{k:02d}.edges.png")
        line = {"file_name": f"{k:02d}.png", "text": caption(k)}
        lines.append((line, {**line, "conditioning_image_file_name": f"{k:02d}.edges.png"}))
    for name, column in (("captioned", 0), ("pairs", 1)):
        text = "".join(json.dumps(line[column]) + "\n" for line in lines)
        (folder / name / "metadata.jsonl").write_text(text, encoding="utf-8")


def caption(sample: int) -> str:
    """What the picture shows, and which it is."""
    return f"a handwritten {NAMES[load_digits().target[sample]]} number {sample}"


def clip_tokenizer() -> CLIPTokenizer:
    """Knows letters and nothing longer."""
    characters = [chr(k) for k in range(33, 127)]
    pieces = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={p: k for k, p in enumerate(pieces)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5TokenizerFast:
    """Knows letters and nothing longer."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(chr(k) for k in range(33, 127))]
    return T5TokenizerFast(vocab=[(p, -float(k)) for k, p in enumerate(pieces)], extra_ids=0, model_max_length=77)


def clip_text(projection: int | None = None) -> Any:
    """A text encoder, with a projection where SDXL's second and SD3's have one."""
    config = CLIPTextConfig(
        vocab_size=190,
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        projection_dim=projection or 32,
        bos_token_id=188,
        eos_token_id=189,
        pad_token_id=189,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def t5_text() -> T5EncoderModel:
    """A T5 encoder of width 32."""
    return T5EncoderModel(
        T5Config(vocab_size=98, d_model=32, d_ff=37, d_kv=8, num_heads=4, num_layers=2, decoder_start_token_id=0)
    )


def autoencoder(levels: int, channels: int = 4, **more: Any) -> AutoencoderKL:
    """Makes a picture 2^(levels - 1) times smaller."""
    return AutoencoderKL(
        block_out_channels=(32,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=channels,
        sample_size=SIZE,
        **more,
    )


def make_sure(vae: Any) -> None:
    """As sure of its latents as a trained one is: with half of its output for their means, the other for the variances.

    Some scripts draw latents once, before their loop, so a query's draw is not its sample's, and the draws of an
    untrained autoencoder are mostly noise.
    """
    with torch.no_grad():
        half = len(vae.quant_conv.bias) // 2
        vae.quant_conv.weight[half:] = 0
        vae.quant_conv.bias[half:] = -20


def unet(**more: Any) -> UNet2DConditionModel:
    """Stable Diffusion's kind of UNet."""
    given = {
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "sample_size": 8,
        "block_out_channels": (32, 64),
    } | more
    return UNet2DConditionModel(
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **given,
    )


def unconditional(folder: Path) -> None:
    """The configuration of a UNet without captions."""
    UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).save_config(folder)


def sd1(folder: Path, channels: tuple[int, int] = (32, 64)) -> None:
    """Stable Diffusion 1."""
    diffusers.StableDiffusionPipeline(
        vae=autoencoder(4),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        unet=unet(block_out_channels=channels),
        scheduler=DDPMScheduler(beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def sdxl(folder: Path, levels: int = 3) -> None:
    """Stable Diffusion XL."""
    vae = autoencoder(levels)
    make_sure(vae)
    diffusers.StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=clip_text(),
        text_encoder_2=clip_text(projection=32),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(
            cross_attention_dim=64,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=80,
            sample_size=16,
        ),
        scheduler=DDPMScheduler(beta_schedule="scaled_linear"),
    ).save_pretrained(folder)


def sd3(folder: Path, layers: int = 2) -> None:
    """Stable Diffusion 3."""
    diffusers.StableDiffusion3Pipeline(
        vae=autoencoder(3, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=clip_text(projection=32),
        text_encoder_2=clip_text(projection=32),
        text_encoder_3=t5_text(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
        transformer=SD3Transformer2DModel(
            sample_size=32,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=layers,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=32,
            pooled_projection_dim=64,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)


def flux(folder: Path) -> None:
    """Flux.1 dev."""
    diffusers.FluxPipeline(
        vae=autoencoder(
            3, 1, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035
        ),
        text_encoder=clip_text(),
        text_encoder_2=t5_text(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)


def sana(folder: Path) -> None:
    """Sana, with T5's tokenizer in the place of Gemma's."""
    blocks = ("ResBlock", "EfficientViTBlock")
    diffusers.SanaPipeline(
        vae=diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
        text_encoder=Gemma2Model(
            Gemma2Config(
                vocab_size=98,
                hidden_size=8,
                intermediate_size=64,
                head_dim=16,
                num_attention_heads=2,
                num_hidden_layers=1,
                num_key_value_heads=2,
                pad_token_id=0,
            )
        ),
        tokenizer=t5_tokenizer(),
        transformer=diffusers.SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=8,
            sample_size=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    ).save_pretrained(folder)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Knows bytes and nothing longer."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(vocab={p: k for k, p in enumerate(pieces)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def qwen_image(folder: Path) -> None:
    """Qwen-Image."""
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    make_sure(vae)
    diffusers.QwenImagePipeline(
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
                    "vocab_size": 300,
                },
                vision_config={
                    "depth": 2,
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_heads": 2,
                    "out_hidden_size": 16,
                },
            )
        ),
        tokenizer=qwen_tokenizer(),
        transformer=diffusers.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)


def cogvideox(folder: Path) -> None:
    """CogVideoX, for videos of 9 frames."""
    diffusers.CogVideoXPipeline(
        vae=diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        ),
        text_encoder=t5_text(),
        tokenizer=t5_tokenizer(),
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=2,
            text_embed_dim=32,
            num_layers=1,
            sample_width=2,
            sample_height=2,
            sample_frames=9,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=32,
        ),
        scheduler=diffusers.CogVideoXDPMScheduler(),
    ).save_pretrained(folder)


def sdxl_with_adapter(folder: Path) -> None:
    """Stable Diffusion XL, and a T2I adapter whose features have the sizes and channels of its UNet's blocks."""
    sdxl(folder)
    adapter = diffusers.T2IAdapter(
        in_channels=3,
        channels=[32, 64, 64, 64],
        num_res_blocks=1,
        downscale_factor=8,
        adapter_type="full_adapter_xl",
    )
    adapter.save_pretrained(folder / "t2iadapter")


def amused(folder: Path) -> None:
    """Amused, with 256 tokens a picture."""
    diffusers.AmusedPipeline(
        vqvae=diffusers.VQModel(
            block_out_channels=[8, 8, 8],
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            latent_channels=8,
            norm_num_groups=8,
            num_vq_embeddings=32,
            mid_block_add_attention=False,
            lookup_from_codebook=True,
        ),
        text_encoder=clip_text(projection=32),
        tokenizer=clip_tokenizer(),
        transformer=diffusers.UVit2DModel(
            hidden_size=8,
            hidden_dropout=0.0,
            cond_embed_dim=32,
            micro_cond_encode_dim=2,
            micro_cond_embed_dim=10,
            encoder_hidden_size=32,
            vocab_size=33,
            codebook_size=32,
            in_channels=8,
            block_out_channels=8,
            num_res_blocks=1,
            downsample=True,
            upsample=True,
            block_num_heads=1,
            num_hidden_layers=1,
            num_attention_heads=1,
            attention_dropout=0.0,
            intermediate_size=8,
        ),
        scheduler=diffusers.AmusedScheduler(mask_token_id=32),
    ).save_pretrained(folder)


def write_videos(folder: Path) -> None:
    """The pictures as videos that fade in, with the two lists that the video scripts read."""
    import av

    folder.mkdir(parents=True)
    digits = load_digits()
    for k in range(SAMPLES):
        pixels = np.kron(digits.images[k] * 255 / 16, np.ones((8, 8)))
        with av.open(folder / f"{k:02d}.mp4", "w") as container:
            stream = container.add_stream("mpeg4", rate=8)
            stream.width, stream.height = pixels.shape
            for n in range(9):
                shade = (pixels * (n + 1) / 9).astype(np.uint8)
                frame = av.VideoFrame.from_ndarray(np.repeat(shade[:, :, None], 3, axis=2), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    (folder / "prompts.txt").write_text("".join(f"{caption(k)}\n" for k in range(SAMPLES)))
    (folder / "videos.txt").write_text("".join(f"{k:02d}.mp4\n" for k in range(SAMPLES)))


BUILDERS: dict[str, Callable[[Path], None]] = {
    "unconditional": unconditional,
    "sd1": sd1,
    # Of the UNet's and the autoencoder's work, shares as they are at full size.
    "sd1_wide": partial(sd1, channels=(128, 256)),
    "sdxl": sdxl,
    "sdxl_with_adapter": sdxl_with_adapter,
    # A ControlNet makes its picture 8 times smaller, and so must the autoencoder.
    "sdxl_eighth": partial(sdxl, levels=4),
    "sd3": sd3,
    # A ControlNet for it copies the first 12 layers, the last of which may not be the transformer's last.
    "sd3_deep": partial(sd3, layers=13),
    "flux": flux,
    "sana": sana,
    "qwen_image": qwen_image,
    "cogvideox": cogvideox,
    "amused": amused,
}


def build(name: str, folder: Path) -> Path:
    """Saves a pipeline if it is not there yet, always with the same numbers."""
    if not folder.exists():
        torch.manual_seed(0)
        partial = folder.with_name(folder.name + ".partial")
        BUILDERS[name](partial)
        partial.rename(folder)
    return folder
