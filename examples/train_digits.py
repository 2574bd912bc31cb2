"""Trains a small diffusion model on handwritten digits, and captures where its images will come from.

A complete training script in the manner of the diffusers examples: accelerate, gradient accumulation, EMA, checkpoints
and resuming. The data are scikit-learn's 1,797 digits of 8x8 pixels, or a folder of 8x8 images.
One line is dmin_trace's.

    python train_digits.py --output_dir digits
    dmin-trace query digits.trace/trace.zarr some_digit.png
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

import dmin_trace


def parse_args():
    parser = argparse.ArgumentParser(description="Train a small DDPM on handwritten digits.")
    parser.add_argument("--train_data_dir", help="A folder of 8x8 images instead of scikit-learn's digits.")
    parser.add_argument("--max_train_samples", type=int, help="Train on the first so many.")
    parser.add_argument("--output_dir", default="digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--num_epochs", type=int, default=60)
    parser.add_argument("--max_train_steps", type=int, help="Overrides num_epochs.")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--lr_warmup_steps", type=int, default=50)
    parser.add_argument("--use_ema", action="store_true")
    parser.add_argument("--ema_max_decay", type=float, default=0.999)
    parser.add_argument("--dataloader_num_workers", type=int, default=0)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--resume_from_checkpoint", help="The name of a folder in output_dir, such as checkpoint-500.")
    return parser.parse_args()


class Digits(Dataset):
    """8x8 grey images as tensors of (1, 8, 8) in [-1, 1], with their labels where they are known."""

    def __init__(self, folder=None, count=None):
        if folder is None:
            digits = load_digits()
            self.images = (digits.images[:count] * 255 / 16).round().astype(np.uint8)
            self.label = digits.target[:count].tolist()
        else:
            files = sorted(file for file in Path(folder).iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg"))
            self.images = [np.asarray(Image.open(file).convert("L")) for file in files[:count]]
            self.file_name = [file.name for file in files[:count]]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"input": torch.from_numpy(self.images[index] / np.float32(127.5) - 1)[None]}


def main(args):
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps, mixed_precision=args.mixed_precision
    )
    dmin_trace.attach(accelerator, args, timesteps=5)  # the one line
    set_seed(args.seed, device_specific=True)  # processes that drew the same noise would be one
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)

    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    ema_model = EMAModel(model.parameters(), decay=args.ema_max_decay) if args.use_ema else None
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)

    dataset = Digits(args.train_data_dir, args.max_train_samples)
    train_dataloader = DataLoader(
        dataset, batch_size=args.train_batch_size, shuffle=True, num_workers=args.dataloader_num_workers
    )
    batches = math.ceil(len(train_dataloader) / accelerator.num_processes)
    steps_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    if args.max_train_steps is None:
        args.max_train_steps = args.num_epochs * steps_per_epoch
    args.num_epochs = math.ceil(args.max_train_steps / steps_per_epoch)
    lr_scheduler = get_scheduler(
        "cosine",
        optimizer,
        # accelerate steps it once for each process.
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )
    model, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, lr_scheduler
    )
    if ema_model is not None:
        ema_model.to(accelerator.device)
        accelerator.register_for_checkpointing(ema_model)

    global_step = 0
    if args.resume_from_checkpoint:
        accelerator.load_state(output_dir / args.resume_from_checkpoint)
        global_step = int(args.resume_from_checkpoint.split("-")[1])
    first_epoch = global_step // steps_per_epoch
    skipped = (global_step - first_epoch * steps_per_epoch) * args.gradient_accumulation_steps

    quiet = None if accelerator.is_main_process else True  # None: quiet where there is no terminal
    progress_bar = tqdm(total=args.max_train_steps, initial=global_step, desc="train", unit="step", disable=quiet)
    train_loss = 0.0
    log = []
    for epoch in range(first_epoch, args.num_epochs):
        model.train()
        loader = train_dataloader
        if epoch == first_epoch and skipped:
            loader = accelerator.skip_first_batches(train_dataloader, skipped)
        for batch in loader:
            with accelerator.accumulate(model):
                clean = batch["input"]
                noise = torch.randn_like(clean)
                timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(clean),))
                timesteps = timesteps.to(clean.device)
                noisy = noise_scheduler.add_noise(clean, noise, timesteps)
                loss = F.mse_loss(model(noisy, timesteps).sample.float(), noise.float())
                train_loss += loss.detach().item() / args.gradient_accumulation_steps
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()

            if accelerator.sync_gradients:
                if ema_model is not None:
                    ema_model.step(model.parameters())
                progress_bar.update(1)
                global_step += 1
                log.append(f"{global_step},{train_loss:.9g},{lr_scheduler.get_last_lr()[0]:.9g}\n")
                accelerator.log({"train_loss": train_loss}, step=global_step)
                train_loss = 0.0
                if global_step % args.checkpointing_steps == 0:
                    accelerator.save_state(output_dir / f"checkpoint-{global_step}")
            progress_bar.set_postfix(loss=f"{loss.detach().item():.4f}", refresh=False)
            if global_step >= args.max_train_steps:
                break
    progress_bar.close()

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (output_dir / "log.csv").write_text("step,train_loss,lr\n" + "".join(log))
        unet = accelerator.unwrap_model(model)
        if ema_model is not None:
            ema_model.copy_to(unet.parameters())
        DDPMPipeline(unet, noise_scheduler).save_pretrained(output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
