"""Per-sample gradients of the small models, whole or as dmin_trace's compressed gradients in a store.

The experiments want many kinds of gradient of one model, and whole ones beside compressed ones. So they are taken here,
a batch at a time, with `torch.func`; `tests/test_reproduce.py` shows that they are what dmin_trace captures. What comes
after, projection, store, scores and index, is the package's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ddpm
import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch.func import functional_call, grad, vmap

from dmin_trace.project import Plan, compress_gradient, make_plan
from dmin_trace.settings import Transform
from dmin_trace.store import (
    Header,
    NoiseFacts,
    ParameterFacts,
    ProjectionFacts,
    RunFacts,
    Store,
    choose_chunk_rows,
    create,
    open_store,
    quantise,
    resume,
)

Objective = Literal["loss", "squared_output", "mean_output"]
Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Kind:
    """What a gradient is taken of.

    timesteps: T of them.
    objective: the script's loss; or the mean square of the denoiser's output (D-TRAK, arXiv 2311.00500) or its mean
        (DAS, arXiv 2410.18639), which dmin_trace does not capture.
    schedule: of the noise, as the model was trained.
    draws: noises that are averaged over at each timestep; the same ones for all images.
    """

    timesteps: tuple[int, ...]
    objective: Objective = "loss"
    draws: int = 1
    schedule: str = ddpm.COSINE


def batches(
    model: torch.nn.Module, images: torch.Tensor, kind: Kind, size: int = 16, what: str = "gradients"
) -> Iterator[list[Gradients]]:
    """The gradients of images (n, C, H, W), some images at a time: for each timestep by parameter (images, *shape)."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    schedule = ddpm.noise_schedule(kind.schedule)

    def objective(given: Gradients, noisy: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        found = functional_call(model, given, (noisy[None], timestep[None])).sample
        error = found - noise[None] if kind.objective == "loss" else found
        value: torch.Tensor = error.mean() if kind.objective == "mean_output" else error.square().mean()
        return value

    of_images = vmap(grad(objective), in_dims=(None, 0, None, None))
    for start in track(range(0, len(images), size), what):
        some, taken = images[start : start + size], []
        for slot, timestep in enumerate(kind.timesteps):
            total: Gradients = {}
            for draw in range(kind.draws):
                noise = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(1000 * draw + slot))
                at = torch.tensor(timestep)
                noisy = schedule.add_noise(some, noise.expand_as(some), at.expand(len(some)))
                found = of_images(parameters, noisy, at, noise)
                total = {name: total[name] + g for name, g in found.items()} if total else found
            taken.append({name: g / kind.draws for name, g in total.items()})
        yield taken


def transformed(gradients: Gradients, transform: Transform) -> Gradients:
    """As the setting `transform` of dmin_trace does it."""
    return {name: torch.sign(g) for name, g in gradients.items()} if transform == "sign" else gradients


def flat(gradients: Gradients) -> torch.Tensor:
    """(images, P): all parameters laid end to end."""
    return torch.cat([g.flatten(1) for g in gradients.values()], 1)


def whole(model: torch.nn.Module, images: torch.Tensor, kind: Kind, transform: Transform) -> NDArray[np.float32]:
    """(n, T, P) float32, uncompressed."""
    taken = [
        torch.stack([flat(transformed(of_t, transform)) for of_t in batch], 1).numpy()
        for batch in batches(model, images, kind)
    ]
    return np.concatenate(taken)


def capture(
    folder: Path,
    model: torch.nn.Module,
    images: torch.Tensor,
    labels: NDArray[np.int64],
    queries: torch.Tensor,
    kind: Kind,
    transforms: Sequence[Transform],
    dimension: int,
) -> None:
    """Captures stores TRANSFORM.zarr of the images, and TRANSFORM.npy, (Q, T, v), of queries; goes on with those that
    are begun.

    One pass of gradients serves all transforms.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    plan = make_plan(sum(int(np.prod(shape)) for shape in parameters.values()), dimension, 0, "rotation")
    if not all((folder / f"{name}.npy").exists() for name in transforms):
        rows = [_rows(batch, transforms, plan) for batch in batches(model, queries, kind, what="queries")]
        for name in transforms:
            with (folder / f"{name}.npy").open("wb") as file:
                np.save(file, np.concatenate([batch[name][0] for batch in rows]))
    writers = {}
    for name in transforms:
        path = folder / f"{name}.zarr"
        if not (path.exists() and open_store(path, unfinished=True).complete):
            header = _header(path, parameters, plan, kind, name, len(images))
            writers[name] = resume(path, header) if path.exists() else create(path, header)
    missing = {name: set(writer.pending()) for name, writer in writers.items()}
    pending = sorted(set().union(*missing.values()))
    for chunk in track(pending, "chunks"):
        rows_of = next(iter(writers.values())).header.rows(chunk)
        here = slice(rows_of.start, rows_of.stop)
        done = [_rows(batch, transforms, plan) for batch in batches(model, images[here], kind)]
        for name, writer in writers.items():
            if chunk not in missing[name]:
                continue
            grads, norms = (np.concatenate([batch[name][part] for batch in done]) for part in (0, 1))
            number = np.arange(rows_of.start, rows_of.stop)
            writer.write(
                chunk, *quantise(grads, "int8"), norms, np.zeros_like(norms), number, {"label": labels[here].tolist()}
            )
    for writer in writers.values():
        writer.finish()


def _rows(
    batch: list[Gradients], transforms: Sequence[Transform], plan: Plan
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """By transform the compressed gradients (n, T, v) and their norms (n, T)."""
    found = {}
    for name in transforms:
        of_slots = [transformed(of_t, name) for of_t in batch]
        count = len(next(iter(batch[0].values())))
        pairs = [[compress_gradient([g[n] for g in of_t.values()], plan) for of_t in of_slots] for n in range(count)]
        found[name] = (
            torch.stack([torch.stack([sketch for sketch, _ in row]) for row in pairs]).numpy(),
            torch.tensor([[float(norm) for _, norm in row] for row in pairs]).numpy(),
        )
    return found


def _header(
    path: Path, parameters: Mapping[str, tuple[int, ...]], plan: Plan, kind: Kind, transform: Transform, n: int
) -> Header:
    slots = len(kind.timesteps)
    return Header(
        id=hashlib.sha256(f"{path.name}{kind}{plan.dimension}{n}".encode()).hexdigest()[:32],
        samples=n,
        timesteps=tuple(float(t) for t in kind.timesteps),
        dimension=plan.dimension,
        dtype="int8",
        chunk_rows=choose_chunk_rows(n, slots, plan.dimension, "int8"),
        projection=ProjectionFacts(
            kind="rotation", seed=0, length=plan.length, width=plan.width, fingerprint=plan.fingerprint
        ),
        parameters=ParameterFacts(names=tuple(parameters), shapes=tuple(parameters.values()), fingerprint="0" * 64),
        weights="0" * 64,
        noise=NoiseFacts(
            seed=0,
            draws=((),) * slots,
            digests=("0" * 64,) * slots,
            first_sample=0,
            losses=(1.0,) * slots,
            norms=(1.0,) * slots,
        ),
        transform=transform,
        batch={},
        columns={"label": "integer"},
        settings={},
        writers={},
        codec="none",
        draws=kind.draws,
        script="",
        script_sha256="",
        data_sha256="",
        unreached=(),
        run=RunFacts(conditions={}, models=()),
    )


def folded(rows: NDArray[np.float32], dimension: int) -> NDArray[np.float32]:
    """(Q, T, v) compressed gradients of norm one, as a capture at a smaller dimension has them."""
    sums: NDArray[np.float32] = rows.reshape(*rows.shape[:2], -1, dimension).sum(2)
    return sums / np.linalg.norm(sums, axis=2, keepdims=True)


def rows_of(trace: Store) -> NDArray[np.float32]:
    """(N, T, v) float32: everything in a store, for scores that want it in memory."""
    return trace.gradients(np.arange(trace.header.samples))
