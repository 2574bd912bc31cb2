"""subsets: a data set that every run draws anew is not captured on demand."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import plain_script
from torch.utils.data import random_split
from warm import Warm

from dmin_trace.capture.subsets import DrawnSubsets
from dmin_trace.errors import CaptureError
from dmin_trace.store import open_store


class Rows:
    """What `datasets.Dataset` has of use here."""

    def __len__(self) -> int:
        return 10

    def shuffle(self, seed: int | None = None, generator: Any = None) -> Rows:
        return self

    def train_test_split(self, test_size: float | None = None, shuffle: bool = True, seed: int | None = None) -> Rows:
        return self


DRAWS: list[tuple[Callable[[], Any], bool]] = [
    (lambda: Rows().shuffle(), True),
    (lambda: Rows().shuffle(seed=None), True),
    (lambda: Rows().shuffle(3), False),
    (lambda: (np.random.seed(3), Rows().shuffle()), False),
    (lambda: Rows().shuffle(generator=np.random.default_rng(3)), False),
    (lambda: Rows().train_test_split(0.4), True),
    (lambda: Rows().train_test_split(0.4, shuffle=False), False),
    (lambda: torch.utils.data.random_split(range(10), [6, 4]), True),
    (lambda: torch.utils.data.random_split(range(10), [6, 4], torch.Generator().manual_seed(0)), False),
    (lambda: (torch.manual_seed(5), torch.utils.data.random_split(range(10), [6, 4])), False),
    (lambda: random.sample(range(10), 6), True),
    (lambda: random.sample(range(10), 3), False),
    (lambda: (random.seed(3), random.sample(range(10), 6)), False),
]


@pytest.mark.parametrize("number", range(len(DRAWS)))
def test_a_subset_without_a_seed_is_refused(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, refused = DRAWS[number]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(Dataset=Rows))  # type: ignore[arg-type]
    own = Rows.shuffle, random.sample, random.seed
    torch.seed()
    subsets = DrawnSubsets()
    with subsets.watching():
        subsets.watch_datasets()
        subsets.watch_datasets()
        draw()
    assert (Rows.shuffle, random.sample, random.seed, torch.utils.data.random_split) == (*own, random_split)
    if refused:
        with pytest.raises(CaptureError, match=r"chose its 6 samples by .* without a seed.* Give the training's seed"):
            subsets.refuse(6)
    else:
        subsets.refuse(6)
    subsets.refuse(10)


def test_a_capture_on_demand_of_such_a_subset_ends_before_it_begins(warm: Warm, tmp_path: Path) -> None:
    pieces = {
        "attach": "",
        "prepare": "loader = torch.utils.data.DataLoader(torch.utils.data.Subset(loader.dataset, KEPT), batch_size=4); "
        "model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)",
    }
    script = plain_script(tmp_path / "script.py", imports="SEED\nKEPT = random.sample(range(10), 6)", **pieces)
    text = script.read_text()
    script.write_text(text.replace("SEED", "random.seed(3)"))
    settings = ["--timesteps", "2", "--dimension", "64"]
    warm.run(["dmin-trace", "run", *settings, "--out", "a.zarr", "--", script], tmp_path)
    weights = tmp_path / "a.weights.safetensors"
    capture = ["dmin-trace", "capture", "--weights", weights, *settings, "--out", "b.zarr", "--", script]
    warm.run(capture, tmp_path)
    assert open_store(tmp_path / "b.zarr").header.samples == 6
    script.write_text(text.replace("SEED", ""))
    said = warm.run([part if part != "b.zarr" else "c.zarr" for part in capture], tmp_path, 1)
    assert "The script chose its 6 samples by random.sample without a seed" in said and len(said.splitlines()) == 1
    assert not (tmp_path / "c.zarr").exists()
    # At the end of the training the samples are those of the training.
    warm.run(["dmin-trace", "run", *settings, "--out", "c.zarr", "--", script], tmp_path)
