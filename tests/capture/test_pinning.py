"""The random calls of a training step: pinned and recorded."""

from __future__ import annotations

import pytest
import torch

from dmin_trace.capture.pinning import PinnedDraws, PinnedTimestep, pinned_timesteps
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


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.randint(0, 1000, (1,)),
        lambda: torch.randint(1000, (1,)),
        lambda: torch.randint(low=0, high=1000, size=(1,)),
        lambda: torch.randint(high=1000, size=(1,)),
        lambda: torch.randint(0, torch.tensor(1000), (1,)),  # type: ignore[call-overload]
        lambda: torch.multinomial(torch.ones(1000), 1),
    ],
)
def test_a_timestep_draw_is_pinned_whatever_its_form(draw: object) -> None:
    draws = PinnedDraws(TIMESTEP)
    draws.start()
    try:
        drawn = draw()  # type: ignore[operator]
    finally:
        draws.stop()
    assert drawn.tolist() == [250]
    assert draws.pins == 1
    assert [name[-1] for name, _ in draws.calls] == ["*"]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.randint(0, 10, (1,)),
        lambda: torch.randint(5, 1000, (1,)),
        lambda: torch.randint(0, 1000, (2, 3)),
        lambda: torch.multinomial(torch.ones(3, 100), 1),
        lambda: torch.rand(1),
        lambda: torch.randn(1, 4),
    ],
)
def test_other_draws_are_recorded_and_left(draw: object) -> None:
    torch.manual_seed(3)
    expected = draw()  # type: ignore[operator]
    draws = PinnedDraws(TIMESTEP)
    torch.manual_seed(3)
    draws.start()
    try:
        drawn = draw()  # type: ignore[operator]
    finally:
        draws.stop()
    assert torch.equal(drawn, expected)
    assert draws.pins == 0
    assert draws.calls[0][1] == tuple(expected.shape)


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
