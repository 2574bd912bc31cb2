"""What looks like a generated digit: detection rates on MNIST, as in the paper's Table 5.

    python tools/reproduce/mnist.py --data mnist10k.npz --work WORK

The data is one .npz file with x, uint8 (n, 28, 28), and y, the labels. Resumable: WORK keeps models, stores and
rankings. The queries are generated, and labelled by a small classifier that was trained on the digits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import baselines
import ddpm
import numpy as np
import sketches
import torch
import typer
from numpy.typing import NDArray
from page import Page
from rich.progress import track

from dmin_trace import search as score
from dmin_trace.audit import detection_rate
from dmin_trace.search import Unavailable, build_index, open_index, search
from dmin_trace.search import deflation as kernel
from dmin_trace.settings import Transform
from dmin_trace.store import Store, open_store, pack_store

COSINE = ddpm.Recipe(size=16, channels=(24, 48, 48), attention=False, steps=2000, batch=64, rate=2e-3)
RECIPES = {"cosine": COSINE, "linear": replace(COSINE, schedule="linear")}
TRANSFORMS: tuple[Transform, ...] = ("none", "sign")
GENERATED, QUERIES = 400, 128
KS = (5, 10, 50, 100)


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 16, 16) in [-1, 1], their labels, and how a model is made of them."""

    images: torch.Tensor
    labels: NDArray[np.int64]
    recipe: ddpm.Recipe

    @property
    def kind(self) -> sketches.Kind:
        """What gradients are taken of."""
        return sketches.Kind(tuple(ddpm.evenly(5)), schedule=self.recipe.schedule)


@dataclass(frozen=True)
class Rates:
    """How one way of ranking did: the detection rate at each of KS and its interval, and seconds a query."""

    name: str
    rate: list[float]
    low: list[float]
    high: list[float]
    seconds: float


def read(path: Path, schedule: str) -> Digits:
    """The digits of a file, a pixel or two cut off at each side, and scaled to 16 by 16."""
    with np.load(path, allow_pickle=False) as data:
        pixels, labels = torch.from_numpy(data["x"]).float()[:, None, 2:26, 2:26], data["y"].astype(np.int64)
    scaled = torch.nn.functional.interpolate(pixels, size=16, mode="area")
    return Digits(scaled / 127.5 - 1, labels, RECIPES[schedule])


def trained(work: Path, digits: Digits, name: str = "model") -> Path:
    """The file of a model of these digits, trained if it is not there."""
    path = work / f"{name}.safetensors"
    if not path.exists():
        with_bar = iter(track(range(digits.recipe.steps), f"training {name}"))
        ddpm.save(path, ddpm.train(digits.recipe, digits.images, done=lambda: next(with_bar, None)))
    return path


def classifier(work: Path, digits: Digits) -> Callable[[torch.Tensor], torch.Tensor]:
    """Gives (n, 10) probabilities of images; a small convolutional net, trained on nine tenths of the digits."""
    from safetensors.torch import load_file, save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
            torch.nn.Flatten(), torch.nn.Linear(32 * 16, 10),
        )  # fmt: skip
        path = work / "classifier.safetensors"
        if path.exists():
            net.load_state_dict(load_file(path))
        else:
            optimizer, train = torch.optim.AdamW(net.parameters(), 2e-3), 9 * len(digits.images) // 10
            labels = torch.from_numpy(digits.labels)
            for _ in track(range(6), "training the classifier"):
                for batch in torch.randperm(train).split(64):
                    loss = torch.nn.functional.cross_entropy(net(digits.images[batch]), labels[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            save_file(net.state_dict(), path)
    net.requires_grad_(False)
    return lambda images: net(images).softmax(1)


def queries(work: Path, digits: Digits) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """(QUERIES, 1, 16, 16) generated digits, the surest of GENERATED, and their labels."""
    model = ddpm.load(trained(work, digits), digits.recipe)
    path = work / "generated.npy"
    if not path.exists():
        np.save(path, ddpm.generate(model, GENERATED, schedule=digits.recipe.schedule).numpy())
    images = torch.from_numpy(np.load(path))
    sure, labels = classifier(work, digits)(images).max(1)
    kept = sure.argsort(descending=True, stable=True)[:QUERIES].sort().values
    return images[kept], labels[kept].numpy()


def captured(work: Path, digits: Digits, dimensions: Sequence[int]) -> None:
    """Captures the stores of the first dimension, the largest, and packs the others from them."""
    model = ddpm.load(trained(work, digits), digits.recipe)
    asked, _ = queries(work, digits)
    whole = work / f"v{dimensions[0]}"
    sketches.capture(whole, model, digits.images, digits.labels, asked, digits.kind, TRANSFORMS, dimensions[0])
    for dimension in dimensions[1:]:
        folder = work / f"v{dimension}"
        folder.mkdir(exist_ok=True)
        for name in TRANSFORMS:
            if not (folder / f"{name}.zarr").exists():
                pack_store(open_store(whole / f"{name}.zarr"), folder / f"{name}.zarr", dimension=dimension)


def asked_of(work: Path, dimension: int, name: str) -> NDArray[np.float32]:
    """(Q, T, v) the queries' compressed gradients, folded and of norm one, as a capture at that dimension has them."""
    (captured_at,) = work.glob(f"v*/{name}.npy")
    return sketches.folded(np.load(captured_at), dimension)


def rankings(
    work: Path, digits: Digits, dimensions: Sequence[int], whole: bool
) -> Iterator[tuple[str, NDArray[np.int64], float]]:
    """Of each way its name, the slots (Q, 100) it puts first, and seconds a query."""
    images, _ = queries(work, digits)
    most = max(KS)
    yield "random", _best(baselines.random_scores(len(images), len(digits.images), 0), most), 0.0
    began = time.perf_counter()
    flat = [
        x.reshape(len(x), -1) - digits.images.reshape(len(digits.images), -1).mean(0) for x in (images, digits.images)
    ]
    unit = [torch.nn.functional.normalize(x, dim=1) for x in flat]
    yield "cosine of pixels, less the mean", _best((unit[0] @ unit[1].T).numpy(), most), _each(began, images)
    for dimension in dimensions:
        for name in TRANSFORMS:
            trace = open_store(work / f"v{dimension}" / f"{name}.zarr")
            asked = asked_of(work, dimension, name)
            shown = f"{name}, v = 2^{dimension.bit_length() - 1}"
            began = time.perf_counter()
            yield f"dmin {shown}, exact", score.exact_top_k(trace, asked, most).rows, _each(began, images)
            yield from _indexed(trace, asked, f"dmin {shown}, index", most)
            if dimension == 2**14:
                directions = kernel.principal_directions(trace, 256)
                chosen = kernel.choose_directions(directions.eigenvalues)
                for count in sorted({8, 64, 256, chosen}):
                    freed = directions.largest(count).deflate(asked)
                    mark = " (chosen by the store)" if count == chosen else ""
                    began = time.perf_counter()
                    yield (
                        f"deflated {shown}, r = {count}{mark}",
                        score.exact_top_k(trace, freed, most).rows,
                        _each(began, images),
                    )
                rows = sketches.rows_of(trace).mean(1)
                for ridge in (0.01, 1.0):
                    began = time.perf_counter()
                    found = baselines.trak(rows, asked.mean(1), ridge)
                    yield (
                        f"ridge of the mean over t (TRAK's form) {shown}, {ridge:g}",
                        _best(found, most),
                        _each(began, images),
                    )
    if whole:
        model = ddpm.load(trained(work, digits), digits.recipe)
        yield from _whole(model, digits, images, most)


def _whole(
    model: torch.nn.Module, digits: Digits, images: torch.Tensor, most: int
) -> Iterator[tuple[str, NDArray[np.int64], float]]:
    asked = torch.from_numpy(sketches.whole(model, images, digits.kind, "none"))
    plain, normalised = [], []
    began = time.perf_counter()
    for batch in sketches.batches(model, digits.images, digits.kind, what="whole gradients"):
        products = torch.stack([a @ sketches.flat(of_t).T for a, of_t in zip(asked.unbind(1), batch, strict=True)])
        norms = torch.stack([sketches.flat(of_t).norm(dim=1) for of_t in batch])
        plain.append(products.sum(0).numpy())
        normalised.append((products / norms[:, None] / asked.norm(dim=2).T[:, :, None]).sum(0).numpy())
    seconds = _each(began, images)
    yield "dmin none, uncompressed", _best(np.concatenate(normalised, 1), most), seconds
    yield "dmin none, uncompressed and not normalised", _best(np.concatenate(plain, 1), most), seconds


def _indexed(
    trace: Store, asked: NDArray[np.float32], name: str, most: int
) -> Iterator[tuple[str, NDArray[np.int64], float]]:
    index = open_index(trace)
    if isinstance(index, Unavailable):
        # What asks it here is not deflated.
        build_index(trace, directions=0)
        index = open_index(trace)
    if isinstance(index, Unavailable):
        return
    began = time.perf_counter()
    found = [search(index, one[None], most).rows[0] for one in asked]
    yield name, np.stack(found), _each(began, asked)


def _best(scores: NDArray[np.floating], most: int) -> NDArray[np.int64]:
    return np.argsort(-scores, axis=1, kind="stable")[:, :most]


def _each(began: float, queries: object) -> float:
    return (time.perf_counter() - began) / len(queries)  # type: ignore[arg-type]


def main(
    data: Annotated[Path, typer.Option(help="The digits, .npz.")],
    work: Annotated[Path, typer.Option(help="Folder for what is done.")],
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("docs/results"),
    schedule: Annotated[str, typer.Option(help="Of the noise: cosine or linear.")] = "cosine",
    dimensions: Annotated[str, typer.Option(help="v, the largest first.")] = "65536,16384,4096",
    whole: Annotated[bool, typer.Option(help="Uncompressed gradients too.")] = True,
) -> None:
    """Detection rates, and the page."""
    began = time.monotonic()
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    digits, sizes = read(data, schedule), [int(size) for size in dimensions.split(",")]
    captured(work, digits, sizes)
    images, labels = queries(work, digits)
    held_out = slice(9 * len(digits.images) // 10, None)
    right = (classifier(work, digits)(digits.images[held_out]).argmax(1).numpy() == digits.labels[held_out]).mean()
    kept = work / "rates.json"
    if not kept.exists():
        rows = []
        for name, slots, seconds in rankings(work, digits, sizes, whole):
            rates = detection_rate(digits.labels.tolist(), slots[1::2], labels[1::2].tolist(), KS)
            spread = [[getattr(rate.rate, part) for rate in rates] for part in ("value", "low", "high")]
            rows.append(Rates(name, *spread, seconds))
        kept.write_text(json.dumps([asdict(row) for row in rows]))
    found = [Rates(**row) for row in json.loads(kept.read_text())]
    page = Page(
        f"What looks like a generated digit? Detection rates on MNIST, {schedule} schedule",
        "python tools/reproduce/mnist.py --data mnist10k.npz --work WORK "
        f"--schedule {schedule} --dimensions {dimensions}" + ("" if whole else " --no-whole"),
        time.monotonic() - began,
        f"A DDPM of {sum(p.numel() for p in ddpm.make_model(digits.recipe).parameters()):,} parameters, trained with "
        f"a {schedule} noise schedule on {len(digits.images):,} MNIST digits of 16 by 16 pixels; "
        f"T = {len(digits.kind.timesteps)}. Queries: {len(images) // 2} generated digits, those of which a classifier "
        f"({right:.1%} right on digits it had not seen) is surest; every other one, the rest being there to choose "
        "settings by. The detection rate at k is the share of the k samples with the largest score that bear the "
        "query's label, as in the paper's Table 5; chance is 0.1. It measures "
        "likeness, not cause. Gradients divided as Adam divides them (adam) were measured at an earlier commit.",
    )
    page.table(
        ("way", *(f"top {k}" for k in KS), "95 % of top 10", "ms a query"),
        [
            (
                row.name,
                *(f"{rate:.3f}" for rate in row.rate),
                f"{row.low[1]:.2f} to {row.high[1]:.2f}",
                f"{1000 * row.seconds:.1f}",
            )
            for row in found
        ],
    )
    page.write(out / f"mnist_{schedule}.md")


if __name__ == "__main__":
    typer.run(main)
