"""Fine-tunes Stable Diffusion on your captioned images with LoRA, and captures where its images will come from.

A complete training script in the manner of diffusers' `train_text_to_image_lora.py`: the VAE and the text encoder stay
as they are, the UNet gets PEFT LoRA layers, and these alone are trained and saved. The data are a folder of images with
a `metadata.jsonl` of lines such as {"file_name": "cat.png", "text": "a cat"}.
One line is dmin_trace's.

    python train_text_to_image_lora.py --pretrained_model_name_or_path MODEL --train_data_dir images --output_dir lora
    dmin-trace query lora.trace/trace.zarr generated.png --prompt "a cat"
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

import dmin_trace


def parse_args():
    parser = argparse.ArgumentParser(description="Fine-tune Stable Diffusion on captioned images with LoRA.")
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--train_data_dir", required=True, help="A folder of images with a metadata.jsonl.")
    parser.add_argument("--caption_column", default="text", help="The key of the caption in metadata.jsonl.")
    parser.add_argument("--output_dir", default="lora")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train_batch_size", type=int, default=4)
    parser.add_argument("--num_train_epochs", type=int, default=100)
    parser.add_argument("--max_train_steps", type=int, help="Overrides num_train_epochs.")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--lr_warmup_steps", type=int, default=0)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--resume_from_checkpoint", help="The name of a folder in output_dir, such as checkpoint-500.")
    return parser.parse_args()


class CaptionedImages(Dataset):
    """The images of a folder, cropped to a square, with the tokens of their captions."""

    def __init__(self, folder, caption_column, resolution, tokenizer):
        self.folder = Path(folder)
        lines = (self.folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        self.file_name = [row["file_name"] for row in rows]
        self.text = [row[caption_column] for row in rows]
        self.resolution = resolution
        self.input_ids = tokenizer(
            self.text, max_length=tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids

    def __len__(self):
        return len(self.file_name)

    def __getitem__(self, index):
        image = ImageOps.exif_transpose(Image.open(self.folder / self.file_name[index])).convert("RGB")
        image = ImageOps.fit(image, (self.resolution, self.resolution), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(image) / np.float32(127.5) - 1).permute(2, 0, 1)
        return {"pixel_values": pixels.contiguous(), "input_ids": self.input_ids[index]}


def lora_weights(unet):
    return convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))


def main(args):
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps, mixed_precision=args.mixed_precision
    )
    dmin_trace.attach(accelerator, args)  # the one line
    set_seed(args.seed)
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)

    base = args.pretrained_model_name_or_path
    noise_scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(args.mixed_precision, torch.float32)
    text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder").to(dtype)
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae", torch_dtype=dtype)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=dtype)
    for frozen in (text_encoder, vae, unet):
        frozen.requires_grad_(False)
        frozen.to(accelerator.device)
    unet.add_adapter(
        LoraConfig(
            r=args.rank,
            lora_alpha=args.rank,
            init_lora_weights="gaussian",
            target_modules=["to_k", "to_q", "to_v", "to_out.0"],
        )
    )
    lora_parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in lora_parameters:
        # What is trained stays in full precision, or small updates would be rounded away.
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(lora_parameters, lr=args.learning_rate, weight_decay=1e-2)

    dataset = CaptionedImages(args.train_data_dir, args.caption_column, args.resolution, tokenizer)
    train_dataloader = DataLoader(dataset, batch_size=args.train_batch_size, shuffle=True)
    steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * steps_per_epoch
    args.num_train_epochs = math.ceil(args.max_train_steps / steps_per_epoch)
    lr_scheduler = get_scheduler(
        "constant_with_warmup",
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
    )
    unet, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        unet, optimizer, train_dataloader, lr_scheduler
    )

    global_step = 0
    if args.resume_from_checkpoint:
        accelerator.load_state(output_dir / args.resume_from_checkpoint)
        global_step = int(args.resume_from_checkpoint.split("-")[1])
    first_epoch = global_step // steps_per_epoch

    progress_bar = tqdm(total=args.max_train_steps, initial=global_step, desc="train", unit="step", disable=None)
    for _ in range(first_epoch, args.num_train_epochs):
        unet.train()
        for batch in train_dataloader:
            with accelerator.accumulate(unet):
                latents = vae.encode(batch["pixel_values"].to(dtype)).latent_dist.sample()
                latents = latents * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                timesteps = torch.randint(
                    0, noise_scheduler.config.num_train_timesteps, (len(latents),), device=latents.device
                )
                noisy = noise_scheduler.add_noise(latents, noise, timesteps)
                words = text_encoder(batch["input_ids"], return_dict=False)[0]
                if noise_scheduler.config.prediction_type == "v_prediction":
                    target = noise_scheduler.get_velocity(latents, noise, timesteps)
                else:
                    target = noise
                predicted = unet(noisy, timesteps, words, return_dict=False)[0]
                loss = F.mse_loss(predicted.float(), target.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(lora_parameters, args.max_grad_norm)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()

            if accelerator.sync_gradients:
                progress_bar.update(1)
                global_step += 1
                accelerator.log({"train_loss": loss.detach().item()}, step=global_step)
                if global_step % args.checkpointing_steps == 0:
                    accelerator.save_state(output_dir / f"checkpoint-{global_step}")
            progress_bar.set_postfix(loss=f"{loss.detach().item():.4f}", refresh=False)
            if global_step >= args.max_train_steps:
                break
    progress_bar.close()

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        StableDiffusionPipeline.save_lora_weights(output_dir, lora_weights(accelerator.unwrap_model(unet)))
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
