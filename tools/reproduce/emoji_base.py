"""The bases of the text-to-image experiments: `python tools/reproduce/emoji_base.py --data emoji32.npz --work WORK`.

A model of Stable Diffusion's type and one of Stable Diffusion 3's are trained from nothing, each with its text encoder,
until their pictures can be read. WORK keeps a checkpoint every CHECKPOINT steps; a run that was interrupted goes on
from it. The averaged weights (EMA) are written to `tools/reproduce/bases/KIND.safetensors` in float16. They are part of
the checkout, so no experiment has to train them again.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from emoji_data import divide, read_emoji
from emoji_models import KINDS, Autoencoder, Kind, Words, make_tokenizer, token_ids, training_loss
from rich.progress import track
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

BASES = Path(__file__).parent / "bases"
CHECKPOINT = 1000
BATCH = 16
RATE = 1e-3
WARM = 500
DROPPED = 0.1
"""The share of captions that are left empty in training, for classifier-free guidance."""
AVERAGE = 0.999
"""Of the averaged weights, the share that a step keeps."""


def load_base(name: str, vocabulary: int, folder: Path = BASES) -> tuple[Kind, torch.nn.Module, torch.nn.Module]:
    """The kind of model, its denoiser and its text encoder, in float32, as the base was left.

    Raises FileNotFoundError if it was not trained yet.
    """
    kind = KINDS[name]()
    denoiser, encoder = kind.new(vocabulary)
    kept = load_file(folder / f"{name}.safetensors")
    for part, module in (("denoiser", denoiser), ("text_encoder", encoder)):
        module.load_state_dict(
            {key.removeprefix(f"{part}."): x.float() for key, x in kept.items() if key.startswith(part)}
        )
        module.eval().requires_grad_(False)
    return kind, denoiser, encoder


@torch.no_grad()
def encode(
    kind: Kind, encoder: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, captions: list[str] | tuple[str, ...]
) -> Words:
    """Captions as the base's text encoder gives them."""
    return kind.encode(encoder, token_ids(tokenizer, list(captions)))


class Base:
    """A base in training, with its optimizer and its averaged weights, which are what is kept of it."""

    def __init__(self, name: str, vocabulary: int, steps: int) -> None:
        torch.manual_seed(0)
        self.kind = KINDS[name]()
        denoiser, encoder = self.kind.new(vocabulary)
        self.parts = torch.nn.ModuleDict({"denoiser": denoiser, "text_encoder": encoder})
        self.average = {key: tensor.clone() for key, tensor in self.parts.state_dict().items()}
        self.optimizer = torch.optim.AdamW(self.parts.parameters(), RATE, weight_decay=1e-2)
        self.steps, self.done = steps, 0

    def save(self, path: Path) -> None:
        partial = path.with_suffix(".partial")
        state: dict[str, Any] = {
            "parts": self.parts.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "done": self.done,
        }
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.parts.load_state_dict(state["parts"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.done = state["average"], state["done"]

    def step(self, denoiser: Any, latents: torch.Tensor, ids: torch.Tensor) -> float:
        """One step of training, whose draws depend on its number alone; `ids` has the empty caption last."""
        torch.manual_seed(self.done)
        left = (1 - self.done / self.steps) ** 0.5
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * min((self.done + 1) / WARM, left)
        chosen = torch.randint(0, len(latents), (BATCH,))
        captions = torch.where(torch.rand(BATCH) < DROPPED, len(ids) - 1, chosen)
        words = self.kind.encode(self.parts["text_encoder"], ids[captions])
        loss = training_loss(self.kind, denoiser, latents[chosen], words)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parts.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        share = min(AVERAGE, (1 + self.done) / (10 + self.done))
        with torch.no_grad():
            for key, tensor in self.parts.state_dict().items():
                if tensor.is_floating_point():
                    self.average[key].lerp_(tensor, 1 - share)
        return loss.item()

    def export(self, path: Path) -> None:
        """The averaged weights in float16."""
        path.parent.mkdir(parents=True, exist_ok=True)
        halved = {key: x.half().contiguous() if x.is_floating_point() else x for key, x in self.average.items()}
        partial = path.with_suffix(".partial")
        save_file(halved, partial)
        partial.replace(path)


def main(
    data: Annotated[Path, typer.Option(help="The emoji: a .npz with images, names and subcategories.")],
    work: Annotated[Path, typer.Option(help="A folder for checkpoints; an interrupted run goes on from there.")],
    kind: Annotated[str, typer.Option(help="sd or sd3.")] = "sd",
    steps: Annotated[int, typer.Option(help="Of training.", min=1)] = 12_000,
    out: Annotated[Path, typer.Option(help="Where the weights are written.")] = BASES,
    compiled: Annotated[bool, typer.Option(help="Use torch.compile, which needs a C++ compiler.")] = True,
) -> None:
    """Trains a base, and writes its weights."""
    torch.set_num_threads(1)
    emoji, _ = read_emoji(data)
    division = divide(emoji)
    autoencoder = Autoencoder.fit(division.base.images)
    tokenizer = make_tokenizer(emoji.captions)
    latents = autoencoder.encode(division.base.images)
    ids = token_ids(tokenizer, [*division.base.captions, ""])
    base = Base(kind, len(tokenizer), steps)
    work.mkdir(parents=True, exist_ok=True)
    kept = work / f"{kind}.checkpoint"
    if kept.exists():
        base.load(kept)
    denoiser = torch.compile(base.parts["denoiser"]) if compiled else base.parts["denoiser"]
    began, mean = time.monotonic(), 1.0
    for _ in track(range(base.done, steps), f"train the base of {kind}"):
        mean += (base.step(denoiser, latents, ids) - mean) / 200
        if not base.done % CHECKPOINT or base.done == steps:
            base.save(kept)
            print(f"{base.done} steps: loss {mean:.4f}, {time.monotonic() - began:.0f} s", flush=True)
    base.export(out / f"{kind}.safetensors")


if __name__ == "__main__":
    typer.run(main)
