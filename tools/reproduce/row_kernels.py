"""Inner products of rows made in many ways from one file of whole gradients (`gradient_file.py`).

A row is made from passes: the draws of a timestep are averaged as they are, the timesteps of a row are averaged as they
are or after each is normalised, and the sum is transformed and normalised. Scores need only the products of samples
with each other and with the queries, so whole gradients are read once for each kind of row, and the products are kept.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from gradient_file import Gradients
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
TRANSFORMS = ("none", "sign", "dead zone", "rms", "layers", "orthogonal", "scaled", "turned", "whitened", "rotated")
DEAD = 0.02
"""Elements below this part of their parameter's root mean square have no sign in the dead zone."""
LARGEST_SIDE = 3000
"""Of a matrix that is turned."""
BLOCK = 2**16
"""Elements of a gradient that are multiplied at a time."""


@dataclass(frozen=True)
class Moments:
    """What gradients are divided by: the roots of their second moments, means over samples and passes.

    samples: whose moments are known, drawn by chance; None for all.
    factored: each matrix's moments are known by its rows and columns alone, as in Adafactor (arXiv 1804.04235,
        equation 4).
    turned: each matrix is first turned to the eigenvectors of its gradients' covariances on both sides, as in SOAP
        (arXiv 2409.11321); the inner products are then those of EK-FAC (arXiv 1806.03884) without activations.
    damping: is added to the moments, as a part of the mean of all.
    """

    samples: int | None
    factored: bool
    turned: bool
    damping: float


MOMENTS = {
    "scaled": Moments(32, factored=True, turned=False, damping=0.03),
    "turned": Moments(32, factored=True, turned=True, damping=0.03),
    "whitened": Moments(None, factored=False, turned=False, damping=0.1),
    "rotated": Moments(None, factored=False, turned=True, damping=0.1),
}
"""Of the last transforms."""


@dataclass(frozen=True)
class Row:
    """How a row is made: the passes (timestep, draw) that are averaged, and the transform.

    divided: each timestep's gradient is divided by its norm before the mean. Otherwise the row is of the gradient of
        the mean loss.
    """

    passes: tuple[tuple[int, int], ...]
    transform: str = "sign"
    divided: bool = True

    @property
    def name(self) -> str:
        """Of the file of its products."""
        told = f"{self.transform} {sorted(self.passes)} {self.divided} with lengths"
        return hashlib.sha256(told.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Kernel:
    """Products of normalised rows: of samples (N, N), of queries with samples (Q, N).

    lengths: (N,) of the samples' rows before they were normalised, 1 in the mean.
    """

    samples: Doubles
    queries: Doubles
    lengths: Doubles


def kernel_of(gradients: Gradients, row: Row, kept: Path) -> Kernel:
    """The products of a kind of row, computed where they are not kept."""
    path = kept / f"{row.name}.npz"
    if not path.exists():
        kept.mkdir(parents=True, exist_ok=True)
        found = _kernel(made_rows(gradients, row), gradients.samples)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, samples=found.samples, queries=found.queries, lengths=found.lengths)
        partial.replace(path)
    with np.load(path, allow_pickle=False) as file:
        return Kernel(*(file[name].astype(np.float64) for name in ("samples", "queries", "lengths")))


def made_rows(gradients: Gradients, row: Row) -> torch.Tensor:
    """(N + Q, P) float32: transformed, not yet normalised."""
    total: torch.Tensor | None = None
    for _, drawn in groupby(sorted(row.passes), key=lambda p: p[0]):
        places = [gradients.passes.index(p) for p in drawn]
        if len(places) == 1 and row.divided:
            mean = torch.from_numpy(gradients.rows[:, places[0]].astype(np.float32))
        else:
            mean = torch.zeros(gradients.rows.shape[0], gradients.rows.shape[2])
            for k in places:
                weight = torch.from_numpy(np.array(gradients.norms[:, k : k + 1])) / len(places)
                mean += torch.from_numpy(gradients.rows[:, k].astype(np.float32)) * weight
        if row.divided:
            mean /= mean.norm(dim=1, keepdim=True)
        total = mean if total is None else total.add_(mean)
    if total is None:
        raise ValueError("A row needs a pass.")
    if row.transform in MOMENTS:
        return over_moments(total, gradients, row.passes, MOMENTS[row.transform])
    return transformed(total, row.transform, gradients)


def over_moments(
    rows: torch.Tensor, gradients: Gradients, passes: tuple[tuple[int, int], ...], known: Moments
) -> torch.Tensor:
    """Rows (n, P) over the roots of second moments of gradients as they are."""
    places = [gradients.passes.index(p) for p in passes]
    seen = np.sort(np.random.default_rng(0).permutation(gradients.samples)[: known.samples])
    scales = torch.from_numpy(np.array(gradients.norms[seen][:, places]))
    scales /= scales.mean()
    moments = torch.zeros(rows.shape[1])
    for place, shape in gradients.layers:
        listed = [gradients.rows[seen, k, place].astype(np.float32) for k in places]
        part = (torch.from_numpy(np.stack(listed, 1)) * scales[:, :, None]).flatten(0, 1)
        if known.turned and len(shape) > 1:
            sides = _eigenvectors(part.reshape(len(part), shape[0], -1))
            part, rows[:, place] = (_turned(x, shape, sides) for x in (part, rows[:, place]))
        of = part.square().mean(0)
        if known.factored and len(shape) > 1:
            of = of.reshape(shape[0], -1)
            of = (of.mean(1, keepdim=True) * of.mean(0) / of.mean().clamp_min(1e-30)).flatten()
        moments[place] = of
    return rows.div_((moments + known.damping * moments.mean()).sqrt())


def _eigenvectors(matrices: torch.Tensor) -> list[torch.Tensor | None]:
    """Of the covariances of both sides of matrices (n, o, i); None for a side that is too long."""
    products = ("nij,nkj->ik", "nij,nik->jk")
    return [
        torch.linalg.eigh(torch.einsum(product, matrices, matrices).double())[1].float()
        if matrices.shape[1 + k] <= LARGEST_SIDE
        else None
        for k, product in enumerate(products)
    ]


def _turned(part: torch.Tensor, shape: tuple[int, ...], sides: list[torch.Tensor | None]) -> torch.Tensor:
    matrices = part.reshape(len(part), shape[0], -1)
    left, right = sides
    if left is not None:
        matrices = left.T @ matrices
    if right is not None:
        matrices = matrices @ right
    return matrices.flatten(1)


def transformed(rows: torch.Tensor, transform: str, gradients: Gradients) -> torch.Tensor:
    """Rows (n, P) after one of the other TRANSFORMS; those that learn from samples use the first N alone."""
    if transform == "none":
        return rows
    if transform == "sign":
        return rows.sign_()
    if transform == "rms":
        return rows / rows[: gradients.samples].square().mean(0).sqrt().clamp_min(1e-30)
    for place, shape in gradients.layers:
        part = rows[:, place]
        root = part.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
        if transform == "dead zone":
            rows[:, place] = part.sign() * (part.abs() > DEAD * root)
        elif transform == "layers":
            rows[:, place] = part / root
        elif transform == "orthogonal":
            rows[:, place] = _orthogonal(part, shape) if len(shape) > 1 else part / root
        else:
            raise ValueError(f"{transform} is not a transform; expected one of {', '.join(TRANSFORMS)}.")
    return rows


def _orthogonal(part: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Each matrix's nearest orthogonal one, by five Newton-Schulz steps (as in the Muon optimizer), of unit RMS."""
    x = part.reshape(len(part), shape[0], -1)
    flipped = x.shape[1] > x.shape[2]
    if flipped:
        x = x.transpose(1, 2)
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None]
    for _ in range(5):
        square = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    if flipped:
        x = x.transpose(1, 2)
    flat = x.flatten(1)
    return flat / flat.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)


def _kernel(rows: torch.Tensor, samples: int) -> Kernel:
    lengths = rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
    rows /= lengths
    products = torch.zeros(len(rows), samples, dtype=torch.float64)
    for start in range(0, rows.shape[1], BLOCK):
        block = rows[:, start : start + BLOCK]
        products += block @ block[:samples].T
    of_samples = lengths[:samples, 0].double()
    return Kernel(products[:samples].numpy(), products[samples:].numpy(), (of_samples / of_samples.mean()).numpy())


# -- scores from kernels -----------------------------------------------------------------------------------------------


def deflated(kernels: list[Kernel], count: int | None = None) -> Doubles:
    """(Q, N) the deflated scores summed over rows, as `dmin_trace.search.deflation` has them.

    count: of directions; by default those of the row with the most eigenvalues above 3, the default's rule.
    """
    found = [np.linalg.eigh(k.samples) for k in kernels]
    if count is None:
        count = max(1, *(int((values > 3.0).sum()) for values, _ in found), 1)
    total = np.zeros_like(kernels[0].queries)
    for kernel, (values, vectors) in zip(kernels, found, strict=True):
        d, v = values[: -1 - count : -1], vectors[:, : -1 - count : -1]
        total += kernel.queries - kernel.queries @ v * (d / (d + d[-1])) @ v.T
    return total


def ridge(kernels: list[Kernel], strength: float) -> Doubles:
    """(Q, N) the scores of kernel ridge regression summed over rows; 1 is the mean of a kernel's diagonal."""
    total = np.zeros_like(kernels[0].queries)
    for kernel in kernels:
        total += np.linalg.solve(kernel.samples + strength * np.eye(len(kernel.samples)), kernel.queries.T).T
    return total


def with_lengths(scores: Doubles, kernels: list[Kernel]) -> Doubles:
    """Scores times the lengths of the samples' rows: a sample with a larger gradient has more influence."""
    return scores * np.mean([kernel.lengths for kernel in kernels], axis=0)


def plain(kernels: list[Kernel]) -> Doubles:
    """(Q, N) the paper's inner products summed over rows."""
    return np.sum([k.queries for k in kernels], axis=0)


def signed_squares(scores: Doubles) -> Doubles:
    """Squares with the scores' signs."""
    return scores * np.abs(scores)


def strongest(scores: Doubles, share: float) -> Doubles:
    """The scores of largest size alone, a share of a query's; the rest are zero."""
    least = np.quantile(np.abs(scores), 1 - share, axis=1, keepdims=True)
    return np.where(np.abs(scores) >= least, scores, 0.0)


def shrunk(scores: Doubles, by: float) -> Doubles:
    """Scores moved towards a query's median by so many of the background's scales; what is nearer becomes zero.

    The scale is 1.4826 times the median distance from the median, which is the standard deviation of normal noise.
    """
    middle = scores - np.median(scores, axis=1, keepdims=True)
    scale = 1.4826 * np.median(np.abs(middle), axis=1, keepdims=True)
    return np.sign(middle) * np.maximum(np.abs(middle) - by * scale, 0.0)
