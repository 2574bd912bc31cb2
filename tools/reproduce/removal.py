"""Thick strokes without the samples that made them, as in the paper's Figure 5.

    python tools/reproduce/removal.py --data mnist10k.npz --work WORK        after mnist.py with the same WORK

The generated digits with the thickest strokes ask; the samples with the largest score for them, summed, are left out;
the model is trained again and makes pictures from the same noise. Random samples, as many, are left out beside it.
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import ddpm
import mnist
import numpy as np
import torch
import typer
from numpy.typing import NDArray
from page import Page
from scipy.ndimage import distance_transform_edt

from dmin_trace.search import deflation as kernel
from dmin_trace.store import open_store

THICK = 16
"""Queries: those of the generated ones with the thickest strokes."""
REMOVED = 2000
SHOWN = 32
WAYS = {"dmin none": ("none", False), "deflated sign": ("sign", True)}


def thickness(images: torch.Tensor) -> NDArray[np.float64]:
    """(n,): the width of the strokes in pixels: twice the mean distance to the paper along the middle of the ink.

    Images are enlarged four times, and what is lighter than half is ink; along the middle the distance is largest.
    """
    large = torch.nn.functional.interpolate(images, scale_factor=4, mode="bicubic")[:, 0].numpy() > 0
    widths = []
    for ink in large:
        distance = distance_transform_edt(ink)
        around = torch.nn.functional.max_pool2d(torch.from_numpy(distance)[None], 3, 1, 1)[0].numpy()
        middle = ink & (distance >= around)
        widths.append(2 * distance[middle].mean() / 4 if middle.any() else 0.0)
    return np.array(widths)


def _without(work: Path, data: Path, schedule: str, name: str, removed: NDArray[np.int64]) -> None:
    torch.set_num_threads(1)
    digits = mnist.read(data, schedule)
    kept = np.setdiff1d(np.arange(len(digits.images)), removed)
    mnist.trained(work, mnist.Digits(digits.images[kept], digits.labels[kept], digits.recipe), f"without-{name}")


def main(
    data: Annotated[Path, typer.Option(help="The digits, .npz.")],
    work: Annotated[Path, typer.Option(help="Folder for what is done, that of mnist.py.")],
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("docs/results"),
    schedule: Annotated[str, typer.Option(help="That of mnist.py.")] = "cosine",
    processes: Annotated[int, typer.Option(help="As many trainings at a time, each on one thread.")] = 2,
) -> None:
    """Trains without the most influential samples, and writes the page."""
    began = time.monotonic()
    torch.set_num_threads(1)
    digits = mnist.read(data, schedule)
    images, _ = mnist.queries(work, digits)
    widths = thickness(images)
    asked = np.argsort(-widths, kind="stable")[:THICK]
    removed = {"random": np.random.default_rng(3).permutation(len(digits.images))[:REMOVED]}
    for name, (transform, deflated) in WAYS.items():
        trace = open_store(work / f"v{2**14}" / f"{transform}.zarr")
        rows = mnist.asked_of(work, 2**14, transform)[asked]
        if deflated:
            rows = kernel.principal_directions(trace).deflate(rows)
        stored = np.concatenate(
            [
                trace.gradients(np.arange(a, min(a + 500, len(digits.images)))).reshape(-1, rows[0].size)
                @ rows.sum(0).reshape(-1)
                for a in range(0, len(digits.images), 500)
            ]
        )
        removed[name] = np.argsort(-stored, kind="stable")[:REMOVED]
    of_samples = thickness(digits.images)
    with ProcessPoolExecutor(processes) as pool:
        list(
            pool.map(
                _without,
                [work] * len(removed),
                [data] * len(removed),
                [schedule] * len(removed),
                removed,
                removed.values(),
            )
        )
    pictures = {
        "all samples": ddpm.generate(
            ddpm.load(mnist.trained(work, digits), digits.recipe), mnist.GENERATED, schedule=digits.recipe.schedule
        )
    }
    for name in removed:
        model = ddpm.load(work / f"without-{name}.safetensors", digits.recipe)
        pictures[name] = ddpm.generate(model, mnist.GENERATED, schedule=digits.recipe.schedule)
    full = thickness(pictures["all samples"])
    thick = np.argsort(-full, kind="stable")[: mnist.GENERATED // 10]
    page = Page(
        "Thick strokes without the samples that made them: MNIST",
        "python tools/reproduce/removal.py --data mnist10k.npz --work WORK",
        time.monotonic() - began,
        f"As in the paper's Figure 5. The {THICK} generated digits with the thickest strokes ask; the {REMOVED:,} of "
        f"{len(digits.images):,} samples with the largest summed score are left out, the model is trained again from "
        f"the same beginning, and makes {mnist.GENERATED} pictures from the same noise. Widths are of strokes, in "
        "pixels of 16 by 16; intervals are two standard errors over pictures. One training each.",
    )
    rows = []
    for name, made in pictures.items():
        found = thickness(made)
        change = found - full
        left = of_samples[removed[name]].mean() if name in removed else float("nan")
        rows.append(
            (
                name,
                "" if np.isnan(left) else f"{left:.2f}",
                f"{found.mean():.3f}",
                f"{change.mean():+.3f} ± {2 * change.std() / len(change) ** 0.5:.3f}",
                f"{found[thick].mean():.3f}",
            )
        )
    page.table(
        ("left out", "width of what was left out", "width of what is made", "change", "of the tenth that was thickest"),
        rows,
    )
    page.text(f"Mean width of the training samples: {of_samples.mean():.2f}.")
    _picture(pictures, thick[:SHOWN], out / "removal.png")
    page.picture(out / "removal.png", "Pictures from the same noise: a row for each model")
    page.write(out / "removal.md")


def _picture(pictures: dict[str, torch.Tensor], shown: NDArray[np.int64], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.55 * len(pictures) + 0.2), layout="constrained")
    for axes, (name, made) in zip(figure.subplots(len(pictures), 1), pictures.items(), strict=True):
        axes.imshow(np.concatenate([one[0] for one in made[shown].numpy()], 1), cmap="gray_r", vmin=-1, vmax=1)
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axes.set(xticks=[], yticks=[])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    typer.run(main)
