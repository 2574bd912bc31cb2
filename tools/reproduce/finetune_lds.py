"""LDS of our scores and of the strongest published ones on fine-tuned text-to-image models.

    python tools/reproduce/gradient_file.py --truth sd-lora --work WORK --data emoji32.npz
    (the same with --objective squared-output, for D-TRAK, and mean-output, for DAS)
    python tools/reproduce/finetune_lds.py --recipe sd-lora --work WORK --data emoji32.npz

Gradients are whole. Each method with a strength has the one that is best on the development half of the queries, as it
is or as signed squares, and is reported on the other half. WORK keeps the scores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import baselines
import numpy as np
import torch
import typer
from emoji_models import CHANNELS, SIDE
from finetune import RECIPES, Tuning, evenly
from finetune_truth import TRUTHS, Truth
from gradient_file import EVEN, Gradients, Objective, open_gradients
from hypotheses import DEFAULT, Judge, judge_tuned, paired, summed
from methods import pixels
from page import Page
from rich.progress import track
from row_kernels import Doubles, Row, deflated, kernel_of, plain, ridge, signed_squares, with_lengths

from dmin_trace.audit import linear_datamodeling_score

RIDGES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
"""Of EK-FAC, relative to the mean eigenvalue."""
CURVATURE_PASSES = 8
DIRECTIONS = (16, 32, 64, 128)
DEFAULT_NAME = "default: sign, deflated"


@dataclass(frozen=True)
class Method:
    """A way to score, at one strength: its name, the strength in words, and what gives (Q, N)."""

    name: str
    strength: str
    scores: Callable[[], Doubles]


def methods(recipe: str, work: Path, data: Path) -> Iterator[Method]:
    """All of them. Whole gradients are read when the first of a kind is scored."""
    gradients, kept = open_gradients(work / recipe), work / recipe / "kernels"
    yield Method(DEFAULT_NAME, "", lambda: deflated([kernel_of(gradients, row, kept) for row in DEFAULT.rows]))
    for count in DIRECTIONS:
        yield Method("sign, deflated, best r", f"{count}", partial(_deflated, gradients, kept, "sign", count))
        yield Method("none, deflated, best r", f"{count}", partial(_deflated, gradients, kept, "none", count))
    for count in (1, 2):
        yield Method(f"rows = {count}", "", partial(_summed, gradients, kept, count, 1))
        yield Method(f"rows = {count}, four noises", "", partial(_summed, gradients, kept, count, 4))
    for draws, told in ((1, ""), (4, ", four noises")):
        yield Method(f"rows = 1, scaled, lengths{told}", "", partial(_scaled, gradients, kept, draws))
    yield Method("rows = 1, turned, scaled, lengths, ridge 3", "", partial(_turned, gradients, kept))
    yield Method("sign, inner products", "", partial(_plain, gradients, kept, "sign"))
    yield Method("DMin (the paper): none, inner products", "", partial(_plain, gradients, kept, "none"))
    train, query = _means(gradients, normalised=False)
    for strength in RIDGES:
        yield Method("TRAK", f"{strength:g}", partial(baselines.trak, train, query, strength))
    four = [_means(gradients, normalised=False, draw=draw) for draw in range(4)]
    of_four = [np.mean(parts, axis=0) for parts in zip(*four, strict=True)]
    del four
    for strength in RIDGES:
        yield Method("TRAK, four noises", f"{strength:g}", partial(baselines.trak, of_four[0], of_four[1], strength))
    del of_four
    yield from _curvature(recipe, data, gradients, train, query)
    del train, query
    squared = _open(work, recipe, "squared-output")
    train, query = _means(squared, normalised=False)
    for strength in RIDGES:
        yield Method("D-TRAK", f"{strength:g}", partial(baselines.d_trak, train, query, strength))
    mean = _open(work, recipe, "mean-output")
    errors = baselines.das_errors(_losses(recipe, data))
    for normalised in (True, False):
        train, query = _means(mean, normalised=normalised)
        for strength in RIDGES:
            for square in (True, False):
                name = f"DAS{'' if normalised else ', gradients undivided'}{', squared' if square else ''}"
                yield Method(
                    name, f"{strength:g}", partial(baselines.das, train, query, errors, strength, squared=square)
                )
    yield Method("likeness of pixels", "", partial(_pixels, recipe, data))


def _open(work: Path, recipe: str, objective: Objective) -> Gradients:
    return open_gradients(work / f"{recipe}-{objective}")


def _deflated(gradients: Gradients, kept: Path, transform: str, count: int) -> Doubles:
    return deflated([kernel_of(gradients, Row(((t, 0),), transform), kept) for t in EVEN], count)


def _plain(gradients: Gradients, kept: Path, transform: str) -> Doubles:
    return plain([kernel_of(gradients, Row(((t, 0),), transform), kept) for t in EVEN])


def _summed(gradients: Gradients, kept: Path, count: int, draws: int) -> Doubles:
    return deflated([kernel_of(gradients, row, kept) for row in summed(count, draws)])


def _scaled(gradients: Gradients, kept: Path, draws: int) -> Doubles:
    """One row over the roots of second moments, deflated, times the samples' lengths."""
    kernels = [kernel_of(gradients, row, kept) for row in summed(1, draws, "scaled")]
    return with_lengths(deflated(kernels), kernels)


def _turned(gradients: Gradients, kept: Path) -> Doubles:
    kernels = [kernel_of(gradients, row, kept) for row in summed(1, transform="turned")]
    return with_lengths(ridge(kernels, 3.0), kernels)


def _means(gradients: Gradients, *, normalised: bool, draw: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(N, P) and (Q, P) float32, means over the ten even timesteps of one draw."""
    total = np.zeros((gradients.rows.shape[0], gradients.rows.shape[2]), np.float32)
    for t in EVEN:
        k = gradients.passes.index((t, draw))
        rows = gradients.rows[:, k].astype(np.float32)
        scale = np.linalg.norm(rows, axis=1, keepdims=True) if normalised else 1 / gradients.norms[:, k : k + 1]
        total += rows / scale
    total /= len(EVEN)
    return total[: gradients.samples], total[gradients.samples :]


def _losses(recipe: str, data: Path) -> Doubles:
    """(N, 10) the losses of the fine-tuning set at even timesteps, for DAS's residuals."""
    tuning = _tuned(recipe, data)
    words = tuning.words.at(slice(0, len(tuning.latents)))
    return np.stack([tuning.losses(tuning.latents, words, (t,)) for t in evenly(10)], 1)


def _tuned(recipe: str, data: Path) -> Tuning:
    tuning = Tuning(RECIPES[recipe], data, compiled=False)
    tuning.full(TRUTHS / f"{recipe}.safetensors")
    return tuning


def _curvature(recipe: str, data: Path, gradients: Gradients, train: np.ndarray, query: np.ndarray) -> Iterator[Method]:
    """EK-FAC influence, from the mean gradients of the ten timesteps."""
    named = zip(gradients.shapes, gradients.layers, strict=True)
    parts = [(name, place, shape) for name, (place, shape) in named]
    of_train, of_query = (
        {name: torch.from_numpy(rows[:, place].reshape(-1, *shape)) for name, place, shape in parts}
        for rows in (train, query)
    )
    fitted = cache(lambda: _fit_curvature(recipe, data, set(gradients.shapes)))

    def scores(damping: float) -> Doubles:
        curvature = fitted()
        return baselines.ekfac(of_train, of_query, curvature, damping * curvature.mean_eigenvalue)

    for damping in DAMPINGS:
        yield Method("EK-FAC", f"{damping:g}", partial(scores, damping))


def _fit_curvature(recipe: str, data: Path, names: set[str]) -> baselines.Ekfac:
    """Of the model in place, from CURVATURE_PASSES passes over the samples."""
    tuning = _tuned(recipe, data)
    draws, current = torch.Generator().manual_seed(11), [tuning.words]

    def drawn() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in track(range(CURVATURE_PASSES), "curvature"):
            for places in torch.arange(len(tuning.latents)).split(20):
                t = torch.randint(1, 1000, (len(places),), generator=draws)
                noise = torch.randn((len(places), CHANNELS, SIDE, SIDE), generator=draws)
                current[0] = tuning.words.at(places)
                yield tuning.kind.noised(tuning.latents[places], noise, t)[0], t

    return baselines.fit_ekfac(
        tuning.denoiser,
        lambda noisy, t: tuning.kind.predict(tuning.denoiser, noisy, t, current[0]),
        drawn,
        names=names,
    )


def _pixels(recipe: str, data: Path) -> Doubles:
    tuning = Tuning(RECIPES[recipe], data, compiled=False)
    return pixels(tuning.division.tuning.images, Truth.read(TRUTHS / f"{recipe}.npz").queries.images)


def scored(recipe: str, work: Path, data: Path) -> dict[str, dict[str, Doubles]]:
    """By method and strength (Q, N), computed where they are not kept."""
    folder = work / recipe / "scores"
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Doubles]] = {}
    for method in methods(recipe, work, data):
        path = folder / f"{method.name} {method.strength}.npy"
        if not path.exists():
            partial_path = path.with_suffix(".partial")
            with partial_path.open("wb") as file:
                np.save(file, method.scores())
            partial_path.replace(path)
        found.setdefault(method.name, {})[method.strength] = np.load(path)
    return found


@dataclass(frozen=True)
class Chosen:
    """A method with the strength and the sum that are best on the development half."""

    name: str
    strength: str
    scores: Doubles
    development: float


def choose(judge: Judge, name: str, by_strength: dict[str, Doubles], *, squares: bool) -> Chosen:
    """The strength that is best on the development half."""
    tried = [
        Chosen(
            name + (", signed squares" if squares else ""),
            strength,
            changed,
            float(judge.each(changed)[judge.development].mean()),
        )
        for strength, scores in by_strength.items()
        for changed in [signed_squares(scores) if squares else scores]
    ]
    return max(tried, key=lambda one: one.development)


def main(
    data: Annotated[Path, typer.Option(help="The emoji: a .npz with images, names and subcategories.")],
    work: Annotated[Path, typer.Option(help="The folder of gradient_file.py.")],
    recipe: Annotated[str, typer.Option(help=f"One of {', '.join(RECIPES)}.")] = "sd-lora",
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("docs/results"),
) -> None:
    """LDS of every method, and the page."""
    began = time.monotonic()
    torch.set_num_threads(1)
    found, judge = scored(recipe, work, data), judge_tuned(recipe)
    default = found[DEFAULT_NAME][""]
    ceilings = {kind: judge.ceiling(of) for kind, of in judge.kinds.items()}
    page = Page(
        f"Which scores find causes in a fine-tuned model? {recipe}",
        f"python tools/reproduce/finetune_lds.py --data emoji32.npz --work WORK --recipe {recipe}",
        time.monotonic() - began,
        f"{len(judge.masks)} random halves of {judge.masks.shape[1]} captioned emoji, each fine-tuned on with "
        f"{len(judge.losses)} seeds; the truth is their mean. LDS of {len(judge.kinds['reported'])} reported queries; "
        "the strength of each method is the best of the other, the development half. Whole gradients, ten even "
        "timesteps, one noise. A perfect score could reach "
        + ", ".join(f"{c.value:.3f} ({c.low:.2f} to {c.high:.2f}; {kind})" for kind, c in ceilings.items() if c)
        + ".",
    )
    lines = []
    for name, by_strength in found.items():
        for squares in (False, True):
            one = choose(judge, name, by_strength, squares=squares)
            each = judge.each(one.scores)
            values = {kind: float(each[of].mean()) for kind, of in judge.kinds.items()}
            of = judge.kinds["reported"]
            whole = linear_datamodeling_score(one.scores[of], judge.masks, judge.losses.mean(0)[:, of]).score
            low, high = paired(judge, one.scores, default, of)
            lines.append(
                (
                    values["reported"],
                    (
                        one.name,
                        one.strength,
                        f"{one.development:.3f}",
                        f"{values['reported']:.3f}",
                        f"{whole.low:.2f} to {whole.high:.2f}",
                        f"{low:+.3f} to {high:+.3f}",
                        f"{values['reported'] / highest.value:.0%}" if (highest := ceilings["reported"]) else "",
                        f"{values['held out']:.3f}",
                        f"{values['generated']:.3f}",
                    ),
                )
            )
    lines.sort(key=lambda line: -line[0])
    page.table(
        (
            "method",
            "strength",
            "development",
            "LDS",
            "95 %",
            "less the default, 95 %",
            "of the ceiling",
            "held out",
            "generated",
        ),
        [line for _, line in lines],
    )
    page.write(out / f"lds_{recipe}.md")


if __name__ == "__main__":
    typer.run(main)
