"""Which draw is the timestep's, and whether rows can be compared: what a recording finds out on its first sample."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from points import POINTS, denoiser, loss_of, record
from torch.nn.functional import mse_loss

import dmin_trace
from dmin_trace.errors import CaptureError, QueryError
from dmin_trace.store import Store, open_store


def loss_at(model: torch.nn.Module, clean: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    noise = torch.randn_like(clean)
    return mse_loss(model(clean + noise * t.reshape(-1, 1) / 1000, t), noise)


def drawn_by(draw: Callable[[], Any]) -> Callable[..., torch.Tensor]:
    """A loss whose timestep is drawn by a call, between draws of other single numbers."""

    def loss(model: torch.nn.Module, clean: torch.Tensor) -> torch.Tensor:
        label = torch.randint(0, 1000, (1,))  # a class, say
        strength = 0.01 * torch.randn(1)
        if random.random() < 0.1:
            clean = torch.zeros_like(clean)
        t = torch.as_tensor(draw()).reshape(1)
        return loss_at(model, clean + strength + 1e-6 * label, t)

    return loss


def recorded(tmp_path: Path, loss: Callable[..., torch.Tensor], **settings: Any) -> Store:
    return open_store(record(denoiser(), tmp_path / "trace.zarr", loss, **settings))


EVEN = (166, 500, 833)
CUBIC = [1000 * (1 - u**3) for u in (1 / 6, 1 / 2, 5 / 6)]
TIMESTEP_DRAWS: dict[str, tuple[Callable[[], Any], Any]] = {
    "randint": (lambda: torch.randint(0, 1000, (1,)), EVEN),
    "randint from one": (lambda: torch.randint(1, 1001, (1,)), (167, 501, 834)),
    "multinomial": (lambda: torch.multinomial(torch.ones(1000), 1), EVEN),
    "cubic": (lambda: 1000 * (1 - torch.rand(1) ** 3), CUBIC),
    "logit-normal": (lambda: 1000 * torch.sigmoid(torch.normal(0.0, 1.0, (1,))), (275.393, 500, 724.607)),
    "numpy": (lambda: np.random.randint(0, 1000), EVEN),
    "python": (lambda: random.randint(0, 999), EVEN),
}


@pytest.mark.parametrize("name", TIMESTEP_DRAWS)
def test_the_draw_that_moves_the_timestep_is_pinned_and_no_other(tmp_path: Path, name: str) -> None:
    draw, expected = TIMESTEP_DRAWS[name]
    trace = recorded(tmp_path, drawn_by(draw))
    assert trace.header.timesteps == pytest.approx(expected, abs=1e-2)
    for calls in trace.header.noise.draws:
        assert [call for call, _ in calls if call.endswith("*")] == [calls[3][0]]
    # Noise is drawn after the timestep, and is the same for all samples as long as all else is.
    assert len(set(trace.header.noise.digests)) == 3


def twice(model: torch.nn.Module, clean: torch.Tensor) -> torch.Tensor:
    return loss_at(model, clean, torch.randint(0, 500, (1,)) + torch.randint(0, 500, (1,)))


GENERATOR = np.random.default_rng(3)


def unseen(model: torch.nn.Module, clean: torch.Tensor) -> torch.Tensor:
    return loss_at(model, clean, torch.tensor([int(GENERATOR.integers(0, 1000))]))


def unseeded(model: torch.nn.Module, clean: torch.Tensor) -> torch.Tensor:
    t = torch.randint(0, 1000, (1,))
    noise = torch.from_numpy(GENERATOR.standard_normal(clean.shape, np.float32))
    return mse_loss(model(clean + noise * t.reshape(-1, 1) / 1000, t), noise)


def coarse(model: torch.nn.Module, clean: torch.Tensor) -> torch.Tensor:
    return loss_at(model, clean, 500 * torch.randint(0, 2, (1,)))


def folded(model: torch.nn.Module, clean: torch.Tensor) -> torch.Tensor:
    return loss_at(model, clean, (torch.randint(0, 1000, (1,)) - 450).abs())


def several_rows(model: torch.nn.Module, clean: torch.Tensor) -> torch.Tensor:
    return loss_of(model, clean.repeat(2, 1))


def several_noises(model: torch.nn.Module, clean: torch.Tensor) -> torch.Tensor:
    return loss_at(model, clean.repeat(4, 1), torch.randint(0, 1000, (1,)))


REFUSED = {
    twice: "several random calls move the timestep of the denoiser, randint.* and randint\\(1\\), number 2 of these",
    unseen: "no random call that is seen moves the timestep of the denoiser",
    unseeded: "Sample 0 was recorded twice, and its gradients at timestep 0 have a cosine of",
    coarse: "saw the timesteps \\(0.0, 500.0, 500.0\\); expected each to be larger",
    folded: "saw the timesteps \\(284.0, 50.0, 383.0\\); expected each to be larger",
    several_rows: "was called with 2 rows in the training step of sample 0, timestep 0; expected 1",
    several_noises: "was called with 4 rows",
}


@pytest.mark.parametrize(("loss", "message"), REFUSED.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_rows_that_cannot_be_compared_are_refused_before_any_is_stored(
    tmp_path: Path, loss: Callable[..., torch.Tensor], message: str
) -> None:
    with pytest.raises(CaptureError, match=message):
        record(denoiser(), tmp_path / "trace.zarr", loss)
    assert not (tmp_path / "trace.zarr").exists() or not open_store(tmp_path / "trace.zarr", unfinished=True).done.any()


def test_a_list_of_timesteps_may_come_in_any_order(tmp_path: Path) -> None:
    assert recorded(tmp_path, loss_of, timesteps=(900, 3, 400)).header.timesteps == (900, 3, 400)


def test_a_query_that_draws_other_values_by_the_same_calls_is_refused(tmp_path: Path) -> None:
    trace = dmin_trace.open_trace(record(denoiser(), tmp_path / "trace.zarr"))

    def reseeded(model: torch.nn.Module, clean: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(11)
        return loss_of(model, clean)

    copy = trace.top_k(trace.query_loss(denoiser(), [POINTS[5:6]], loss_of), 1, "dmin")
    assert (copy.samples[0, 0], copy.scores[0, 0]) == (5, pytest.approx(3, abs=1e-5))
    with pytest.raises(QueryError, match="drew other random values"):
        trace.query_loss(denoiser(), [POINTS[5:6]], reseeded)


def test_a_recording_is_continued_only_if_its_first_sample_gives_what_it_gave(tmp_path: Path) -> None:
    def begin(loss: Callable[..., torch.Tensor]) -> list[int]:
        seen, settings = [], {"timesteps": 3, "dimension": 64, "dtype": "float32", "transform": "none"}
        with dmin_trace.recording(denoiser(), samples=12, out=tmp_path / "trace.zarr", **settings) as recording:
            for i in recording.samples:
                seen.append(i)
                if len(seen) > 11:
                    break
                for k in recording.timesteps:
                    with recording.step(i, k):
                        loss(recording._models[0], POINTS[i : i + 1]).backward()
        return seen

    with pytest.raises(CaptureError, match="were not recorded"):
        begin(loss_of)
    kept = open_store(tmp_path / "trace.zarr", unfinished=True)
    facts = kept.header.noise
    assert (kept.done.tolist(), facts.first_sample) == ([True, False], 0)
    assert facts.losses == pytest.approx(kept.loss[0].tolist()) and facts.norms == pytest.approx(kept.norm[0].tolist())
    with pytest.raises(
        CaptureError, match="The loss of sample 0 at timestep 0 is .*, and was .* when the trace was begun"
    ):
        begin(lambda model, clean: 1.5 * loss_of(model, clean))
    assert begin(loss_of) == [8, 0, 8, 8, 9, 10, 11]
