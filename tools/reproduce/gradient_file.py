"""Whole per-sample gradients of a truth's model, kept in a file, so that many scores are computed from the same passes.

    python tools/reproduce/gradient_file.py --truth digits --work WORK [--data emoji32.npz] [--objective squared-output]

A pass is a timestep and a draw of noise, the same noise for all samples and queries, as in a store. The file has for
each sample, then each query, and each pass the gradient of the loss with respect to all trained parameters, divided by
the root of its mean square, in float16. A run that was interrupted goes on with the next sample.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import ddpm
import numpy as np
import subsets
import torch
import typer
from emoji_models import CHANNELS, SIDE, Words
from finetune import RECIPES, Tuning
from finetune_truth import TRUTHS, Truth
from numpy.typing import NDArray
from rich.progress import track
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

EVEN = tuple(ddpm.evenly(10))
BETWEEN = tuple(range(100, 1000, 100))
DRAWS = 4
PASSES = tuple((t, draw) for t in EVEN for draw in range(DRAWS)) + tuple((t, 0) for t in BETWEEN)
"""Ten timesteps of four draws each, and nine between them of one."""

Objective = Literal["loss", "squared-output", "mean-output"]
"""What is differentiated: the loss of training, D-TRAK's mean square of the denoiser's output, or DAS's mean of it."""
Passes = tuple[tuple[int, int], ...]
ONCE: Passes = tuple((t, 0) for t in EVEN)
PASSES_OF: dict[Objective, Passes] = {"loss": PASSES, "squared-output": ONCE, "mean-output": ONCE}
Parameters = dict[str, torch.Tensor]
Loss = Callable[[Parameters, torch.Tensor, int, int], torch.Tensor]
"""With these parameters, of sample or query n (a tensor of one number) at a timestep with a draw."""
BATCH = 32
"""Samples whose gradients are taken at a time."""


@dataclass(frozen=True)
class Asked:
    """A model, its N samples and its Q queries.

    parameters: what is differentiated, by name.
    loss: of one of the N + Q, the samples first.
    """

    parameters: Parameters
    loss: Loss
    samples: int
    queries: int

    def gradients(self, places: torch.Tensor, t: int, draw: int) -> torch.Tensor:
        """(n, P) of some of the N + Q, at a timestep with a draw."""
        fixed = {name: tensor.detach() for name, tensor in self.parameters.items()}
        # vmap batches the attention that is made of matrix products, not the fused ones.
        with sdpa_kernel(SDPBackend.MATH):
            found = vmap(grad(self.loss), in_dims=(None, 0, None, None))(fixed, places, t, draw)
        return torch.cat([found[name].flatten(1) for name in self.parameters], 1)


def ask_digits(work: Path, objective: Objective = "loss") -> Asked:
    """The model of `subsets.py`."""
    model = ddpm.load(subsets.full_model(work), subsets.RECIPE).requires_grad_(True)
    images = torch.cat([subsets.digits().images, subsets.queries(work)])
    schedule, noises = ddpm.noise_schedule(), _noises(images[:1].shape)

    def loss(parameters: Parameters, n: torch.Tensor, t: int, draw: int) -> torch.Tensor:
        noise, steps = noises[t, draw], torch.tensor([t])
        found = functional_call(
            model, parameters, (schedule.add_noise(images.index_select(0, n[None]), noise, steps), steps)
        ).sample
        return _objective(found, noise, objective)

    return Asked(dict(model.named_parameters()), loss, subsets.SAMPLES, len(images) - subsets.SAMPLES)


def ask_tuned(recipe: str, data: Path, truths: Path = TRUTHS, objective: Objective = "loss") -> Asked:
    """The model of `finetune_truth.py`."""
    tuning = Tuning(RECIPES[recipe], data, compiled=False)
    truth = Truth.read(truths / f"{recipe}.npz")
    tuning.full(truths / f"{recipe}.safetensors")
    samples, queries = tuning.division.tuning, truth.queries
    images = np.concatenate([samples.images, queries.images])
    return ask_pictures(tuning, images, [*samples.captions, *queries.captions], truth.samples, objective)


def ask_pictures(
    tuning: Tuning, images: NDArray[np.uint8], captions: list[str], samples: int, objective: Objective = "loss"
) -> Asked:
    """The model that is in place, about any pictures, of which the first `samples` are samples."""
    latents, words, kind = tuning.autoencoder.encode(images), tuning.words_of(captions), tuning.kind
    noises = _noises((1, CHANNELS, SIDE, SIDE))

    def loss(parameters: Parameters, n: torch.Tensor, t: int, draw: int) -> torch.Tensor:
        def called(*given: Any, **named: Any) -> Any:
            return functional_call(tuning.denoiser, parameters, given, named)

        noise, steps = noises[t, draw], torch.tensor([t])
        noisy, target = kind.noised(latents.index_select(0, n[None]), noise, steps)
        found = kind.predict(called, noisy, steps, Words(*(part.index_select(0, n[None]) for part in words)))
        return _objective(found, target, objective)

    return Asked(tuning.trained, loss, samples, len(images) - samples)


def _objective(found: torch.Tensor, target: torch.Tensor, objective: Objective) -> torch.Tensor:
    if objective == "mean-output":
        return found.mean()
    return (found - target if objective == "loss" else found).square().mean()


def _noises(shape: tuple[int, ...] | torch.Size) -> dict[tuple[int, int], torch.Tensor]:
    """Of every pass. They are drawn here because nothing may be drawn inside vmap."""
    return {
        (t, draw): torch.randn(shape, generator=torch.Generator().manual_seed(1000 * t + draw)) for t, draw in PASSES
    }


@dataclass(frozen=True)
class Gradients:
    """An open file.

    rows: (N + Q, passes, P) float16, each of mean square one.
    norms: (N + Q, passes) float32 of what was divided by.
    passes: (timestep, draw) of each.
    shapes: of the parameters, in order; P is their size.
    """

    rows: NDArray[np.float16]
    norms: NDArray[np.float32]
    passes: Passes
    shapes: dict[str, tuple[int, ...]]
    samples: int

    @property
    def layers(self) -> list[tuple[slice, tuple[int, ...]]]:
        """Where each parameter is in P, and its shape."""
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes.values()]).tolist()
        return [
            (slice(end - int(np.prod(shape)), end), shape)
            for end, shape in zip(ends, self.shapes.values(), strict=True)
        ]


def open_gradients(folder: Path) -> Gradients:
    """Of a finished run."""
    told = json.loads((folder / "gradients.json").read_text(encoding="utf-8"))
    if told["done"] < told["shape"][0]:
        raise typer.BadParameter(f"{folder} has {told['done']} of {told['shape'][0]}; run gradient_file.py to its end.")
    rows = np.memmap(folder / "gradients.f16", np.float16, "r", shape=tuple(told["shape"]))
    norms = np.memmap(folder / "norms.f32", np.float32, "r", shape=tuple(told["shape"][:2]))
    shapes = {name: tuple(shape) for name, shape in told["shapes"].items()}
    return Gradients(rows, norms, tuple((t, draw) for t, draw in told["passes"]), shapes, told["samples"])


@dataclass
class _Kept:
    """What gradients.json says."""

    shape: list[int]
    shapes: dict[str, list[int]]
    samples: int
    passes: list[list[int]]
    done: int

    def write(self, folder: Path) -> None:
        partial = folder / "gradients.partial"
        partial.write_text(json.dumps(asdict(self)), encoding="utf-8")
        partial.replace(folder / "gradients.json")


def capture(asked: Asked, folder: Path, passes: Passes = PASSES) -> None:
    """Writes the file, or what is missing of it."""
    folder.mkdir(parents=True, exist_ok=True)
    count, size = asked.samples + asked.queries, sum(p.numel() for p in asked.parameters.values())
    shapes = {name: list(p.shape) for name, p in asked.parameters.items()}
    kept = _Kept([count, len(passes), size], shapes, asked.samples, [list(p) for p in passes], 0)
    told = folder / "gradients.json"
    if told.exists():
        before = _Kept(**json.loads(told.read_text(encoding="utf-8")))
        kept.done = before.done
        if before != kept:
            raise typer.BadParameter(f"{folder} is of another model or other passes; give another folder.")
    mode = "r+" if (folder / "gradients.f16").exists() else "w+"
    rows = np.memmap(folder / "gradients.f16", np.float16, mode, shape=tuple(kept.shape))
    norms = np.memmap(folder / "norms.f32", np.float32, mode, shape=tuple(kept.shape[:2]))
    for start in track(range(kept.done, count, BATCH), f"gradients of {folder.name}"):
        places = torch.arange(start, min(start + BATCH, count))
        for k, (t, draw) in enumerate(passes):
            flat = asked.gradients(places, t, draw)
            root = flat.square().mean(1).sqrt().clamp_min(1e-30)
            rows[start : start + BATCH, k] = (flat / root[:, None]).half().numpy()
            norms[start : start + BATCH, k] = root.numpy()
        kept.done = int(places[-1]) + 1
        rows.flush()
        norms.flush()
        kept.write(folder)


def main(
    truth: Annotated[str, typer.Option(help=f"digits, {', '.join(RECIPES)}.")],
    work: Annotated[Path, typer.Option(help="A folder; the file is written to WORK/TRUTH, or WORK/TRUTH-OBJECTIVE.")],
    data: Annotated[Path, typer.Option(help="The emoji: a .npz with images, names and subcategories.")] = Path(
        "emoji32.npz"
    ),
    objective: Annotated[Objective, typer.Option(help="What is differentiated.")] = "loss",
) -> None:
    """Writes the gradients of a truth's model."""
    torch.set_num_threads(1)
    if truth == "digits":
        (work / "model").mkdir(parents=True, exist_ok=True)
        subsets.unpack(TRUTHS, work / "model")
        asked = ask_digits(work / "model", objective)
    else:
        asked = ask_tuned(truth, data, objective=objective)
    capture(asked, work / (truth if objective == "loss" else f"{truth}-{objective}"), PASSES_OF[objective])


if __name__ == "__main__":
    typer.run(main)
