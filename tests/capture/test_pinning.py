"""The random calls of a training step: pinned and recorded."""

from __future__ import annotations

import random
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch

from dmin_trace.capture.pinning import PinnedDraws, PinnedTimestep, pin_among, pinned_timesteps
from dmin_trace.errors import CaptureError
from dmin_trace.settings import Settings

TIMESTEP = PinnedTimestep(number=1, fraction=0.25, timestep=None, seed=7)


def test_pinned_timesteps_are_spread_evenly_and_have_seeds_of_their_own() -> None:
    timesteps = pinned_timesteps(Settings(timesteps=4))
    assert [timestep.index_in(1000) for timestep in timesteps] == [125, 375, 625, 875]
    assert len({timestep.seed for timestep in timesteps}) == 4
    assert pinned_timesteps(Settings(timesteps=4)) == timesteps
    assert {timestep.seed for timestep in timesteps}.isdisjoint(
        timestep.seed for timestep in pinned_timesteps(Settings(timesteps=4, seed=1))
    )


def test_given_timesteps_are_drawn_as_they_are() -> None:
    timesteps = pinned_timesteps(Settings(timesteps=(999, 0, 17)))
    assert [timestep.index_in(1000) for timestep in timesteps] == [999, 0, 17]
    with pytest.raises(CaptureError, match="The settings have timestep 999"):
        timesteps[0].index_in(500)


GIVEN = PinnedTimestep(number=1, fraction=0.25, timestep=900, seed=7)


def pinned(draw: Callable[[], Any], timestep: PinnedTimestep = TIMESTEP) -> Any:
    """What a draw gives that is found in a first run and pinned in a second, with one more such call after it."""
    first = PinnedDraws(timestep, observed=True)
    first.start()
    draw()
    first.stop()
    assert first.error is None
    (candidate,) = first.candidates
    draws = PinnedDraws(timestep, candidate.draw)
    draws.start()
    drawn = draw()
    draw()
    draws.stop()
    if draws.error is not None:
        raise draws.error
    assert (draws.pins, [name[-1] == "*" for name, _ in draws.calls]) == (1, [True, False])
    assert pin_among(draws.calls) == candidate.draw
    return drawn


NORMAL = NormalDist().inv_cdf(0.25)
DRAWS: dict[str, tuple[Callable[[], Any], float]] = {
    "randint": (lambda: torch.randint(0, 1000, (1,)), 250),
    "randint of one bound": (lambda: torch.randint(1000, (1,)), 250),
    "randint by name": (lambda: torch.randint(low=0, high=1000, size=(1,)), 250),
    "randint of one bound by name": (lambda: torch.randint(high=1000, size=(1,)), 250),
    "randint of a tensor": (lambda: torch.randint(0, torch.tensor(1000), (1,)), 250),  # type: ignore[call-overload]
    "randint from one": (lambda: torch.randint(1, 1001, (1,)), 251),
    "randint of few": (lambda: torch.randint(0, 4, (1,)), 1),
    "randint_like": (lambda: torch.randint_like(torch.zeros(1), 1, 1001), 251),
    "random_": (lambda: torch.empty(1, dtype=torch.int64).random_(0, 1000), 250),
    "multinomial": (lambda: torch.multinomial(torch.ones(1000), 1), 250),
    "multinomial, biased": (lambda: torch.multinomial(torch.tensor([1.0, 0, 1, 6]), 1), 3),
    "rand": (lambda: torch.rand(1), 0.25),
    "rand of a column": (lambda: torch.rand(1, 1, 1, 1), 0.25),
    "rand_like": (lambda: torch.rand_like(torch.zeros(1)), 0.25),
    "uniform_": (lambda: torch.empty(1).uniform_(2, 6), 3),
    "randn": (lambda: torch.randn(1), NORMAL),
    "normal": (lambda: torch.normal(mean=1.0, std=2.0, size=(1,)), 1 + 2 * NORMAL),
    "normal_": (lambda: torch.empty(1).normal_(1, 2), 1 + 2 * NORMAL),
    "numpy.random.rand": (lambda: np.random.rand(), 0.25),
    "numpy.random.uniform": (lambda: np.random.uniform(2, 6, size=1), 3),
    "numpy.random.randint": (lambda: np.random.randint(1, 1001), 251),
    "numpy.random.randint of one bound": (lambda: np.random.randint(1000, size=(1,)), 250),
    "numpy.random.normal": (lambda: np.random.normal(1, 2), 1 + 2 * NORMAL),
    "numpy.random.choice": (lambda: np.random.choice([5, 6, 7, 8]), 6),
    "numpy.random.choice of a range": (lambda: np.random.choice(1000), 250),
    "random.random": (lambda: random.random(), 0.25),
    "random.uniform": (lambda: random.uniform(2, 6), 3),
    "random.randint": (lambda: random.randint(1, 1000), 251),
    "random.randrange": (lambda: random.randrange(1000), 250),
    "random.gauss": (lambda: random.gauss(1, 2), 1 + 2 * NORMAL),
    "random.choice": (lambda: random.choice([5, 6, 7, 8]), 6),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_is_pinned_to_a_quantile_of_its_own_distribution(name: str) -> None:
    draw, expected = DRAWS[name]
    drawn = pinned(draw)
    assert np.asarray(drawn).flatten().tolist() == pytest.approx([expected], rel=1e-6)


@pytest.mark.parametrize("name", ["randint", "multinomial", "numpy.random.randint", "random.randint"])
def test_a_draw_is_pinned_to_a_timestep_that_is_given(name: str) -> None:
    assert int(pinned(DRAWS[name][0], GIVEN)) == 900


@pytest.mark.parametrize(("name", "message"), [("rand", "which gives no integers"), ("randint of few", "from 0 to 3")])
def test_a_timestep_that_the_draw_cannot_give_is_refused(name: str, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        pinned(DRAWS[name][0], GIVEN)


def test_quantiles_are_those_of_many_draws() -> None:
    """The pinned draws of many timesteps are distributed as the script's own draws are."""
    weights = torch.tensor([3.0, 1, 0, 4])
    draws = [
        pinned(lambda: torch.multinomial(weights, 1), PinnedTimestep(0, (k + 0.5) / 80, None, 7)) for k in range(80)
    ]
    assert torch.bincount(torch.cat(draws), minlength=4).tolist() == [30, 10, 0, 40]


@pytest.mark.parametrize("draw", [lambda: torch.randint(0, 1000, (2, 3)), lambda: torch.randn(1, 4)])
def test_draws_of_many_numbers_are_recorded_and_left(draw: Callable[[], torch.Tensor]) -> None:
    torch.manual_seed(3)
    expected = draw()
    draws = PinnedDraws(TIMESTEP, observed=True)
    torch.manual_seed(3)
    draws.start()
    drawn = draw()
    draws.stop()
    assert torch.equal(drawn, expected)
    assert (draws.pins, draws.candidates) == (0, [])
    assert draws.calls[0][1] == tuple(expected.shape)


def test_the_digest_is_of_values_and_not_of_names_alone() -> None:
    digests = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws = PinnedDraws(TIMESTEP, observed=True)
        draws.start()
        torch.randn(4)
        torch.nn.functional.dropout(torch.rand(4), 0.5)
        draws.stop()
        digests.append(draws.digest.hexdigest())
    assert digests[0] == digests[1] != digests[2]


def test_modules_are_as_before_when_the_draws_are_stopped() -> None:
    before = random.random, np.random.randint
    draws = PinnedDraws(TIMESTEP)
    draws.start()
    draws.enter_model()
    assert (random.random, np.random.randint) == before
    draws.leave_model()
    draws.stop()
    assert (random.random, np.random.randint) == before


def test_calls_are_recorded_in_order_with_their_shapes() -> None:
    draws = PinnedDraws(TIMESTEP)
    draws.start()
    x = torch.randn(2, 3)
    torch.randn_like(x)
    x.normal_()
    torch.nn.functional.dropout(x, 0.5, training=True)
    torch.nn.functional.dropout(x, 0.5, training=False)
    draws.stop()
    torch.randn(9)
    assert [name for name, _ in draws.calls] == ["randn", "randn_like", "normal_", "dropout"]
    assert all(shape == (2, 3) for _, shape in draws.calls)


def test_a_generator_of_the_scripts_own_is_seeded_and_put_back() -> None:
    generator = torch.Generator().manual_seed(99)
    torch.randn(2, generator=generator)
    expected_next = torch.randn(3, generator=torch.Generator().set_state(generator.get_state()))
    drawn = []
    for _ in range(2):
        draws = PinnedDraws(TIMESTEP)
        draws.start()
        drawn.append(torch.randn(4, generator=generator))
        draws.stop()
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(torch.randn(3, generator=generator), expected_next)
