"""Which scores find causes: the linear datamodeling score of every method, on digits.

    python tools/reproduce/subsets.py --work WORK      the truth: models trained on random halves
    python tools/reproduce/lds.py --work WORK          the scores of all methods, and the page

Resumable: WORK keeps the stores, and the scores of each method. Where a method has a strength that must be chosen, it
is run at several, and each half of the queries is scored with the strength that is best on the other half. What is
chosen from the store alone never sees the truth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated

import baselines
import ceiling
import ddpm
import numpy as np
import sketches
import subsets
import torch
import typer
from numpy.typing import NDArray
from page import Page

from dmin_trace.audit import RESAMPLES, Datamodeling, linear_datamodeling_score
from dmin_trace.search import deflation as kernel
from dmin_trace.settings import Transform
from dmin_trace.store import open_store, pack_store

Scores = NDArray[np.float64]
Floats = NDArray[np.float32]
DIMENSION = 2**14
SMALLER = (2**12, 2**10)
TRANSFORMS: tuple[Transform, ...] = ("none", "sign")
EVEN = tuple(ddpm.evenly(10))
KINDS = {
    "loss": sketches.Kind(EVEN),
    "squared output": sketches.Kind(EVEN, "squared_output"),
    "loss, 4 draws": sketches.Kind(EVEN, draws=4),
    "loss, cubic t": sketches.Kind(tuple(baselines.published_timesteps(10, list(range(ddpm.STEPS - 1, -1, -1))))),
}
RIDGES = (0.001, 0.01, 0.1, 1.0, 10.0)
DEFAULT_RIDGE = 0.3
"""The strength of ridge scores that is chosen without the truth."""
DAMPINGS = (0.1, 10.0, 1000.0, 100_000.0)
CURVATURE_DAMPINGS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
"""Of EK-FAC, relative to the mean eigenvalue."""
CURVATURE_PASSES = 16
"""Draws of timestep and noise of each sample, for the factors and again for the eigenvalues."""
DIRECTIONS = (8, 16, 32, 64, 128, 256)


IN_SHORT = {
    *("store: loss, none: dmin", "store: loss, sign: dmin", "store: loss, sign: deflated", "store: loss, sign: ridge"),
    *("store: loss, none: deflated", "store: squared output, sign: deflated"),
    *("whole: loss, none: TRAK, best", "whole: loss, none: Journey-TRAK, best"),
    "whole: squared output, none: D-TRAK, best",
    *("whole: mean output, none: DAS, best", "whole: mean output, none: DAS, not squared, best"),
    "whole: loss, none: EK-FAC, best",
    *("whole: loss, none: LiSSA, best", "whole: loss, none: DataInf, best", "whole: loss, none: DataInf, identity"),
    *("whole: loss, none: inner products, normalised", "whole: loss, none: inner products"),
    *("other: DMin's published code, v = 2^14", "other: SSIM", "other: cosine of pixels, less the mean"),
    *("v = 2^12: loss, none: dmin", "v = 2^12: loss, sign: dmin", "v = 2^12: loss, sign: deflated"),
    "other: random",
}


@dataclass(frozen=True)
class Way:
    """A method at one strength.

    group: store, a smaller v, whole (uncompressed gradients) or other.
    method, strength: in words; strengths of one method compete.
    scores: gives (Q, N).
    """

    group: str
    method: str
    strength: str
    scores: Callable[[], Scores]

    @property
    def file(self) -> str:
        """Where its scores are kept."""
        return f"{self.group} {self.method} {self.strength}".replace("/", "_") + ".npy"


def of_stores(work: Path) -> Iterator[Way]:
    """Scores from dmin_trace's stores, int8 at v = 2^14."""
    for kind in KINDS:
        for transform in TRANSFORMS:
            yield from _of_store(work / "stores" / kind.replace(" ", "-"), kind, transform)


def _of_store(folder: Path, kind: str, transform: Transform) -> Iterator[Way]:
    trace = open_store(folder / f"{transform}.zarr")
    queries: NDArray[np.float32] = np.load(folder / f"{transform}.npy")
    rows, name = sketches.rows_of(trace), f"{kind}, {transform}"
    products = partial(_products, rows)
    gram = products(rows)
    found = kernel.principal_directions(trace, DIRECTIONS[-1])
    yield from _by_default("store", name, rows, queries, found)
    for count in DIRECTIONS:
        yield Way(
            "store",
            f"{name}: deflated, best r",
            f"{count}",
            lambda c=count: products(found.largest(c).deflate(queries)),
        )
        yield Way(
            "store",
            f"{name}: deflated, timesteps together, best r",
            f"{count}",
            lambda c=count: _deflated_together(gram, products(queries), c),
        )
    for ridge in RIDGES:
        yield Way(
            "store",
            f"{name}: ridge, best",
            f"{ridge:g}",
            lambda s=ridge: _ridge(rows, queries, s),
        )
        yield Way(
            "store",
            f"{name}: ridge of the mean over t, best",
            f"{ridge:g}",
            lambda s=ridge: baselines.trak(rows.mean(1), queries.mean(1), s),
        )


def _by_default(
    group: str,
    name: str,
    rows: Floats,
    queries: Floats,
    found: kernel.Directions,
) -> Iterator[Way]:
    """The two scores of the command line, and ridge scores, with strengths that are chosen without the truth."""
    products = partial(_products, rows)
    chosen = kernel.choose_directions(found.eigenvalues)
    yield Way(group, f"{name}: dmin", "", lambda: products(queries))
    yield Way(group, f"{name}: deflated", f"r = {chosen}", lambda: products(found.largest(chosen).deflate(queries)))
    yield Way(group, f"{name}: ridge", "default", lambda: _ridge(rows, queries, DEFAULT_RIDGE))


def _products(rows: Floats, asked: Floats) -> Scores:
    return np.asarray(asked.reshape(len(asked), -1) @ rows.reshape(len(rows), -1).T, np.float64)


def _ridge(rows: Floats, queries: Floats, strength: float) -> Scores:
    """Ridge scores (Q, N): deflation along all directions of each timestep, from rows (N, T, v) and queries (Q, T, v).

    At a timestep lambda (G G' + lambda I)^-1 G q, which is lambda times TRAK's score.
    """
    total = np.zeros((len(queries), len(rows)))
    for t in range(rows.shape[1]):
        total += strength * baselines.trak(rows[:, t], queries[:, t], strength)
    return total


def of_smaller_stores(work: Path) -> Iterator[Way]:
    """Scores from the stores of the script's loss, folded to fewer numbers."""
    for dimension, transform in product(SMALLER, ("none", "sign")):
        whole, folder = work / "stores" / "loss", work / "stores" / f"loss-v{dimension}"
        folder.mkdir(exist_ok=True)
        path = folder / f"{transform}.zarr"
        if not path.exists():
            pack_store(open_store(whole / path.name), path, dimension=dimension)
        trace = open_store(path)
        yield from _by_default(
            f"v = 2^{dimension.bit_length() - 1}",
            f"loss, {transform}",
            sketches.rows_of(trace),
            sketches.folded(np.load(whole / f"{transform}.npy"), dimension),
            kernel.principal_directions(trace, DIRECTIONS[-1]),
        )


def _deflated_together(gram: Scores, products: Scores, count: int) -> Scores:
    """Deflated scores (Q, N) of one kernel of all timesteps, from it and the queries' products with the samples."""
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[: -1 - count : -1], vectors[:, : -1 - count : -1]
    return products - products @ vectors * (values / (values + values[-1])) @ vectors.T


def of_whole_gradients(work: Path) -> Iterator[Way]:
    """Scores from uncompressed gradients, as the baselines have them."""
    model = ddpm.load(subsets.full_model(work), subsets.RECIPE)
    images, queries = subsets.digits().images, subsets.queries(work)
    yield from _of_losses(model, images, queries)
    train, query = (_means(sketches.batches(model, of, KINDS["squared output"])) for of in (images, queries))
    yield from _of_ridges("squared output, none: D-TRAK, best", baselines.d_trak, train, query)


def of_anchors(work: Path) -> Iterator[Way]:
    """DAS and EK-FAC influence, in their published forms but for timesteps, which are those of all others here."""
    model = ddpm.load(subsets.full_model(work), subsets.RECIPE)
    images, queries = subsets.digits().images, subsets.queries(work)
    yield from _of_das(model, images, queries)
    yield from _of_curvature(model, images, queries)


def _of_das(model: torch.nn.Module, images: torch.Tensor, queries: torch.Tensor) -> Iterator[Way]:
    kind = sketches.Kind(EVEN, "mean_output")
    train, query = (
        np.concatenate(
            [
                baselines.das_features(torch.stack([sketches.flat(of_t) for of_t in batch], 1))
                for batch in sketches.batches(model, of, kind)
            ]
        )
        for of in (images, queries)
    )
    errors = baselines.das_errors(ddpm.losses_by_timestep(model, images))
    for ridge in RIDGES:
        for squared, method in ((True, "DAS, best"), (False, "DAS, not squared, best")):
            scores = partial(baselines.das, train, query, errors, ridge, squared=squared)
            yield Way("whole", f"mean output, none: {method}", f"{ridge:g}", scores)


def _of_curvature(model: torch.nn.Module, images: torch.Tensor, queries: torch.Tensor) -> Iterator[Way]:
    generator, schedule = torch.Generator().manual_seed(11), ddpm.noise_schedule()

    def drawn() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(CURVATURE_PASSES):
            for start in range(0, len(images), 50):
                batch = images[start : start + 50]
                timesteps = torch.randint(0, ddpm.STEPS, (len(batch),), generator=generator)
                noise = torch.randn(batch.shape, generator=generator)
                yield schedule.add_noise(batch, noise, timesteps), timesteps

    curvature = baselines.fit_ekfac(model, lambda noisy, timesteps: model(noisy, timesteps).sample, drawn)
    train, query = (_by_parameter(sketches.batches(model, of, KINDS["loss"])) for of in (images, queries))
    for damping in CURVATURE_DAMPINGS:
        scores = partial(baselines.ekfac, train, query, curvature, damping * curvature.mean_eigenvalue)
        yield Way("whole", "loss, none: EK-FAC, best", f"{damping:g}", scores)


def _by_parameter(batches: Iterator[list[sketches.Gradients]]) -> sketches.Gradients:
    """By parameter (n, *shape): means over timesteps."""
    found = [{name: torch.stack([of_t[name] for of_t in batch]).mean(0) for name in batch[0]} for batch in batches]
    return {name: torch.cat([of_batch[name] for of_batch in found]) for name in found[0]}


def _of_losses(model: torch.nn.Module, images: torch.Tensor, queries: torch.Tensor) -> Iterator[Way]:
    asked = sketches.whole(model, queries, KINDS["loss"], "none")
    lengths = np.linalg.norm(asked, axis=2, keepdims=True)
    plain, normalised, means = [], [], []
    for batch in sketches.batches(model, images, KINDS["loss"]):
        rows = np.stack([sketches.flat(of_t) for of_t in batch], 1)
        products = np.matmul(asked.transpose(1, 0, 2), rows.transpose(1, 2, 0))  # (T, Q, n)
        plain.append(products.sum(0))
        cosines = products / lengths.transpose(1, 0, 2) / np.linalg.norm(rows, axis=2).T[:, None]
        normalised.append(cosines.sum(0))
        means.append(rows.mean(1))
    train, query = np.concatenate(means), asked.mean(1)
    del asked
    name = "loss, none"
    yield Way("whole", f"{name}: inner products, normalised", "", lambda: np.concatenate(normalised, 1))
    yield Way("whole", f"{name}: inner products", "", lambda: np.concatenate(plain, 1))
    yield from _of_ridges(f"{name}: TRAK, best", baselines.trak, train, query)
    blocks = [p.numel() for p in model.parameters()]
    yield Way("whole", f"{name}: DataInf, identity", "", lambda: baselines.datainf_identity(train, query))
    for damping in DAMPINGS:
        yield Way(
            "whole",
            f"{name}: DataInf, best",
            f"{damping:g}",
            partial(baselines.datainf, train, query, damping, blocks),
        )
        yield Way(
            "whole", f"{name}: LiSSA, best", f"{damping:g}", partial(baselines.lissa, train, query, damping, depth=100)
        )
    journey = _journey(model)
    for ridge in RIDGES:
        yield Way("whole", f"{name}: Journey-TRAK, best", f"{ridge:g}", partial(_of_journey, train, journey, ridge))


def _of_ridges(
    method: str, scores: Callable[[Floats, Floats, float], Scores], train: Floats, query: Floats
) -> Iterator[Way]:
    for ridge in RIDGES:
        yield Way("whole", method, f"{ridge:g}", partial(scores, train, query, ridge))


def _of_journey(train: Floats, journey: Floats, ridge: float) -> Scores:
    """(Q, N): of held-out digits, which were not sampled, zeros."""
    return np.concatenate([np.zeros((subsets.QUERIES, len(train))), baselines.journey_trak(train, journey, ridge)])


def _means(batches: Iterator[list[sketches.Gradients]]) -> Floats:
    """(n, P): means over timesteps."""
    found = [torch.stack([sketches.flat(of_t) for of_t in batch]).mean(0) for batch in batches]
    return torch.cat(found).numpy()


def _journey(model: torch.nn.Module) -> NDArray[np.float32]:
    """(QUERIES, S, P): the generated queries followed along their sampling, for Journey-TRAK."""
    _, seen = ddpm.followed(model, subsets.QUERIES)
    steps = []
    for timestep, expected in seen[4::10]:
        kind = sketches.Kind((timestep,))
        steps.append(sketches.whole(model, expected, kind, "none")[:, 0])
    return np.stack(steps, 1)


def of_pictures(work: Path) -> Iterator[Way]:
    """What knows nothing of the model."""
    images, queries = subsets.digits().images, subsets.queries(work)
    yield Way("other", "random", "", lambda: baselines.random_scores(len(queries), len(images), 0))
    as_pictures = [((x + 1) / 2).numpy() for x in (images, queries)]
    yield Way("other", "SSIM", "", lambda: baselines.ssim(*as_pictures))
    flat = [x.reshape(len(x), -1) - images.reshape(len(images), -1).mean(0) for x in (images, queries)]
    yield Way("other", "cosine of pixels, less the mean", "", lambda: _cosines(flat[1].numpy(), flat[0].numpy()))


def _cosines(queries: NDArray[np.float32], images: NDArray[np.float32]) -> Scores:
    queries, images = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, images))
    return (queries @ images.T).astype(np.float64)


def published(work: Path) -> Iterator[Way]:
    """DMin as its published code has it for a DDPM: its objective, timesteps, normalisation and permutation."""
    model = ddpm.load(subsets.full_model(work), subsets.RECIPE)
    images, queries = ((x + 1) / 2 for x in (subsets.digits().images, subsets.queries(work)))
    timesteps = baselines.published_timesteps(10, list(range(ddpm.STEPS - 1, -1, -1)))
    noise = baselines.published_noise((1, 8, 8))
    model.requires_grad_(True)

    def compressed(of: torch.Tensor) -> NDArray[np.float32]:
        rows = []
        for image in of:
            losses = [baselines.published_loss(model, ddpm.noise_schedule(), image, t, noise) for t in timesteps]
            whole = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
            flat = torch.stack([torch.cat([g.reshape(-1) for g in of_t]) for of_t in whole])
            rows.append(baselines.published_compression(flat, DIMENSION).numpy().reshape(-1))
        return np.stack(rows)

    yield Way("other", "DMin's published code, v = 2^14", "", lambda: compressed(queries) @ compressed(images).T)


def run(work: Path) -> dict[str, dict[str, Scores]]:
    """By method and strength the scores (Q, N), computed where they are not kept."""
    model = ddpm.load(subsets.full_model(work), subsets.RECIPE)
    digits, queries = subsets.digits(), subsets.queries(work)
    for name, kind in KINDS.items():
        sketches.capture(
            work / "stores" / name.replace(" ", "-"),
            model,
            digits.images,
            digits.labels,
            queries,
            kind,
            TRANSFORMS,
            DIMENSION,
        )
    kept = work / "scores"
    kept.mkdir(exist_ok=True)
    found: dict[str, dict[str, Scores]] = {}
    for part in (of_pictures, of_stores, of_smaller_stores, of_whole_gradients, of_anchors, published):
        listed = kept / f"{part.__name__}.txt"
        if not listed.exists():
            lines = []
            for way in part(work):
                if not (kept / way.file).exists():
                    np.save(kept / way.file, way.scores())
                lines.append("\t".join((way.group, way.method, way.strength)))
            listed.write_text("\n".join(lines))
        for line in listed.read_text().split("\n"):
            group, method, strength = line.split("\t")
            file = Way(group, method, strength, lambda: np.empty(0)).file
            found.setdefault(f"{group}: {method}", {})[strength] = np.load(kept / file)
    return found


def main(
    work: Annotated[Path, typer.Option(help="Folder for what is done.")],
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("docs/results"),
    models: Annotated[int, typer.Option(help="M, of subsets.py.")] = 64,
) -> None:
    """Scores of all methods, and the page."""
    began = time.monotonic()
    torch.set_num_threads(1)
    digits, found = subsets.digits(), run(work)
    # The mean of two trainings of each subset, where both are there, has less chance in it than one.
    seeds = max(1, min(2, subsets.seeds_there(work, models)))
    of_models, by_seed = subsets.truth(work, models, seeds)
    losses = by_seed.mean(axis=0)
    limit = ceiling.ceiling(by_seed) if seeds == 2 else None
    count = 2 * subsets.QUERIES
    halves = np.arange(0, count, 2), np.arange(1, count, 2)
    rows = []
    for method, by_strength in found.items():
        # Journey-TRAK has no scores of pictures that were not sampled.
        has = np.flatnonzero(next(iter(by_strength.values())).any(axis=1))
        scores, strengths = np.zeros((count, len(digits.images))), []
        for half, other in zip(halves, halves[::-1], strict=True):
            strengths.append(best_strength(by_strength, of_models, losses, np.intersect1d(other, has)))
            scores[half] = by_strength[strengths[-1]][half]
        kinds = [has[has < subsets.QUERIES], has[has >= subsets.QUERIES]]
        draws = RESAMPLES if method in IN_SHORT else 1
        both = _lds(scores, of_models, losses, has, draws)
        each = [_lds(scores, of_models, losses, part, 1) if len(part) else None for part in kinds]
        alike = _same_label(scores[kinds[0]], digits.labels, digits.validation_labels) if len(kinds[0]) else None
        rows.append((method, " and ".join(dict.fromkeys(strengths)), both, each, alike))
    rows.sort(key=lambda row: -row[2].score.value)
    page = Page(
        "Which scores find causes? LDS on digits",
        f"python tools/reproduce/subsets.py --work WORK --models {models} --seeds {seeds}\n"
        "python tools/reproduce/lds.py --work WORK",
        time.monotonic() - began,
        f"{models} models, each trained on a random half of {len(digits.images):,} digits of 8 by 8 pixels. A score is "
        "good if the sum over a model's training samples foretells how low its loss on a query is: the linear "
        "datamodeling score (LDS) is the mean over queries of Spearman's correlation, with a 95 % interval that "
        f"resamples queries and models. Queries: {count}, half of them held-out digits (validation), half generated. "
        "Strengths called best: each half of the queries has the one that is best on the other half. Same digit: of "
        "the ten best for held-out digits. Store: dmin_trace's int8 rows of v = 2^14, T = 10, or folded to the v that "
        "is named; whole: uncompressed gradients. Gradients divided as Adam divides them (adam) were measured at an "
        "earlier commit." + (_of_two(limit) if limit else ""),
    )
    of_ceiling = ("of ceiling",) if limit else ()
    columns = ("method", "strength", "LDS", "95 %", *of_ceiling, "validation", "generated", "same digit, top 10")
    shown = {
        method: (
            method,
            strength,
            f"{both.score.value:.3f}",
            f"{both.score.low:.2f} to {both.score.high:.2f}" if method in IN_SHORT else "",
            *((f"{both.score.value / limit.mean.value:.2f}",) if limit else ()),
            *(f"{part.score.value:.3f}" if part else "" for part in each),
            f"{alike:.2f}" if alike is not None else "",
        )
        for method, strength, both, each, alike in rows
    }
    page.table(columns, [row for method, row in shown.items() if method in IN_SHORT])
    page.heading("All that was tried")
    page.table(columns, list(shown.values()))
    page.write(out / "lds.md")


def _of_two(limit: ceiling.Ceiling) -> str:
    """What the page says of the ceiling."""
    r, one, mean = limit.reliability, limit.one, limit.mean
    return (
        " Each half is trained on twice, with other first weights, order and noise, and the losses are the means of "
        f"both. Over the halves the two trainings' losses correlate at {r.value:.2f} (Spearman's, mean over queries; "
        f"{r.low:.2f} to {r.high:.2f}), so that a perfect score would have an LDS of about {mean.value:.2f} "
        f"({mean.low:.2f} to {mean.high:.2f}), the ceiling, and of {one.value:.2f} with one training of each."
    )


def best_strength(
    by_strength: dict[str, Scores], of_models: NDArray[np.bool_], losses: Scores, queries: NDArray[np.int64]
) -> str:
    """The strength with the largest LDS on these queries."""
    return max(by_strength, key=lambda s: _lds(by_strength[s], of_models, losses, queries, 1).score.value)


def _lds(
    scores: Scores,
    of_models: NDArray[np.bool_],
    losses: NDArray[np.float64],
    queries: NDArray[np.int64],
    resamples: int = RESAMPLES,
) -> Datamodeling:
    return linear_datamodeling_score(scores[queries], of_models, losses[:, queries], resamples=resamples)


def _same_label(scores: Scores, labels: NDArray[np.int64], asked: NDArray[np.int64]) -> float:
    best = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    return float((labels[best] == asked[:, None]).mean())


if __name__ == "__main__":
    typer.run(main)
