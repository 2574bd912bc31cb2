"""What the index's settings do, as in the paper's Table 6, and what is stored, as in its Table 3.

python tools/reproduce/ablation.py --work WORK        after mnist.py with the same WORK
"""

from __future__ import annotations

import shutil
import time
from itertools import product
from pathlib import Path
from typing import Annotated

import mnist
import numpy as np
import torch
import typer
from numpy.typing import NDArray
from page import Page

from dmin_trace import search as score
from dmin_trace.search import Index, Unavailable, build_index, index_beside, open_index
from dmin_trace.search.exact import rerank
from dmin_trace.search.index_files import Depth
from dmin_trace.store import Store, open_store

DIMENSION = 2**14
LINKS = (8, 16, 32)
CONSTRUCTION = (50, 100, 200)
EFS = (100, 200, 400, 800, 1600)
CANDIDATES = 100


def main(
    work: Annotated[Path, typer.Option(help="Folder for what is done, that of mnist.py.")],
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("docs/results"),
) -> None:
    """Builds an index for each of the settings, and the page."""
    began = time.monotonic()
    torch.set_num_threads(1)
    copy = work / "ablation"
    built = []
    for transform in ("sign",):
        trace = _alone(work / f"v{DIMENSION}" / f"{transform}.zarr", copy)
        asked = mnist.asked_of(work, DIMENSION, transform)
        truth = score.exact_top_k(trace, asked, 10).rows
        for m, construction in product(LINKS, CONSTRUCTION):
            start = time.perf_counter()
            facts = build_index(trace, m=m, ef_construction=construction, directions=0)
            seconds = time.perf_counter() - start
            index = open_index(trace)
            figures = (
                ["none"] * len(EFS)
                if isinstance(index, Unavailable)
                else [_asked(index, asked, truth, ef) for ef in EFS]
            )
            built.append((transform, str(m), str(construction), f"{seconds:.0f}", f"{facts.bytes / 1e6:.0f}", *figures))
        shutil.rmtree(copy)
    page = Page(
        "The index's settings, and what is stored: MNIST",
        "python tools/reproduce/ablation.py --work WORK",
        time.monotonic() - began,
        f"The stores of mnist_linear.md at v = 2^{DIMENSION.bit_length() - 1}, int8, N = {trace.header.samples:,}, "
        f"T = {len(trace.header.timesteps)}, asked by {len(asked)} generated digits. In each column HNSW's search has "
        f"ef vectors in view, the {CANDIDATES} nearest are scored exactly; the figures are the recall of the ten "
        "best of the exact scan, and milliseconds a query, the exact scores with them. An index that is built without "
        "settings chooses ef and the number of candidates itself.",
    )
    page.heading("M, ef_construction and ef (the paper's Table 6)")
    page.table(("transform", "M", "ef_construction", "built, s", "MB", *(f"ef {ef}" for ef in EFS)), built)
    page.heading("Bytes (the paper's Table 3)")
    rows = []
    for dimension in sorted(int(folder.name[1:]) for folder in work.glob("v*")):
        trace = open_store(work / f"v{dimension}" / "none.zarr")
        samples, timesteps, length = (
            trace.header.samples,
            len(trace.header.timesteps),
            trace.header.projection.length,
        )
        index = sum(file.stat().st_size for file in index_beside(trace.path).glob("*"))
        rows.append(
            (
                f"2^{dimension.bit_length() - 1}",
                f"{trace.bytes / 1e6:,.0f}",
                f"{trace.bytes / samples:,.0f}",
                f"{4 * timesteps * length * samples / trace.bytes:,.0f}",
                f"{index / 1e6:,.0f}",
            )
        )
    page.table(("v, int8", "store, MB", "bytes a sample", "times smaller than float32 gradients", "index, MB"), rows)
    page.write(out / "ablation.md")


def _alone(path: Path, copy: Path) -> Store:
    """The same store in a folder of its own, whose index may be made anew."""
    copy.mkdir(exist_ok=True)
    (copy / path.name).symlink_to(path.resolve())
    return open_store(copy / path.name)


def _asked(index: Index, asked: NDArray[np.float32], truth: NDArray[np.int64], ef: int) -> str:
    depth = Depth(score="dmin", k=10, candidates=CANDIDATES, ef=ef, recall=0.0)
    began, found = time.perf_counter(), []
    for one in asked:
        found.append(rerank(index.store, one[None], index.candidates(one[None], depth), 10).rows[0])
    each = (time.perf_counter() - began) / len(asked)
    recall = np.mean([np.isin(best, ours).mean() for ours, best in zip(found, truth, strict=True)])
    return f"{recall:.3f}, {1000 * each:.1f}"


if __name__ == "__main__":
    typer.run(main)
