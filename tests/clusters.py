"""Stores whose rows lie in clusters, for tests of search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from stores import Rows, make_header, make_rows, write_store

from dmin_trace.search import Index, build_index, open_index
from dmin_trace.store import Header, Store, digest, open_store


def clustered(header: Header, seed: int = 0, clusters: int = 30) -> Rows:
    """Rows that share a direction at each timestep and lie in clusters, as gradients do; of norm one."""
    generator = np.random.default_rng(seed)
    shape = (len(header.timesteps), header.dimension)
    shared = generator.standard_normal((1, *shape)) * 1.5
    centres = generator.standard_normal((clusters, *shape))
    own = generator.standard_normal((header.samples, *shape)) * 0.8
    grad = shared + centres[generator.integers(clusters, size=header.samples)] + own
    grad /= np.linalg.norm(grad, axis=2, keepdims=True)
    return make_rows(header, seed)._replace(grad=grad.astype(np.float32))


def like(rows: Rows, count: int, seed: int = 9) -> np.ndarray:
    """Queries near to rows, and none of them."""
    generator = np.random.default_rng(seed)
    near = rows.grad[generator.integers(len(rows.grad), size=count)]
    queries: np.ndarray = near + generator.standard_normal(near.shape) * 0.7 / near.shape[2] ** 0.5
    return (queries / np.linalg.norm(queries, axis=2, keepdims=True)).astype(np.float32)


def signed(facts: dict[str, Any]) -> str:
    """index.json with its digest, as whoever changes it can make it."""
    facts.pop("digest", None)
    return json.dumps({**facts, "digest": digest(facts)})


def indexed_store(folder: Path, recall: float = 0.9) -> tuple[Store, Rows]:
    """A small store with an index."""
    header = make_header(samples=160, timesteps=2, dimension=64, rows=64)
    rows = clustered(header, clusters=8)
    store = write_store(folder / "trace.zarr", header, rows)
    assert build_index(store, recall=recall).depths
    return store, rows


def opened_index(store: Store) -> Index:
    """The index of a store, which must be one to use."""
    found = open_index(open_store(store.path))
    assert isinstance(found, Index), found
    return found


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    """What part of the true best was found."""
    return float(np.mean([np.isin(best, ours).mean() for ours, best in zip(found, truth, strict=True)]))
