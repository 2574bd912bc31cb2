"""The states of the global random generators: taken, compared and restored."""

from __future__ import annotations

import random

import numpy as np
import torch

from dmin_trace.capture.random_state import RandomState, seed_everything, seed_of


def test_restore_puts_back_every_global_generator() -> None:
    seed_everything(1)
    before = RandomState()
    first = (torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.randn(), random.random())
    seed_everything(2)
    torch.rand(5), np.random.randn(), random.random()
    before.restore()
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.randn(), random.random()) == first


def test_is_now_sees_a_draw_of_every_generator() -> None:
    for draw in (lambda: torch.rand(1), np.random.rand, np.random.randn, random.random):
        state = RandomState()
        assert state.is_now()
        draw()  # type: ignore[no-untyped-call]
        assert not state.is_now()


def test_seed_of_gives_every_stream_and_draw_its_own_seed() -> None:
    seeds = {seed_of(seed, stream, draw) for seed in (0, 1) for stream in range(5) for draw in range(3)}
    assert len(seeds) == 30 and all(0 <= seed < 2**32 for seed in seeds)
