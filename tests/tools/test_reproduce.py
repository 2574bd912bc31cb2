"""The experiments' own parts, in small: gradients, stores, trainings and measures."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dmin_trace.project import compress_gradient, make_plan
from dmin_trace.store import open_store
from dmin_trace.store.metadata import set_finished

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "reproduce"))

import ddpm
import lds
import removal
import sketches
import subsets

RECIPE = ddpm.Recipe(size=8, channels=(8, 16), attention=False, steps=3, batch=4, rate=1e-3)


@pytest.fixture(scope="module")
def trained() -> tuple[torch.nn.Module, torch.Tensor]:
    images = subsets.digits().images[:5]
    return ddpm.train(RECIPE, images), images


def by_hand(
    model: torch.nn.Module, image: torch.Tensor, timestep: int, slot: int, draw: int, objective: sketches.Objective
) -> torch.Tensor:
    """The gradient of one image at one timestep, by autograd."""
    schedule = ddpm.noise_schedule()
    kept = schedule.alphas_cumprod[timestep]
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(1000 * draw + slot))
    parameters = [p.detach().requires_grad_(True) for p in model.parameters()]
    named = dict(zip([n for n, _ in model.named_parameters()], parameters, strict=True))
    found = torch.func.functional_call(
        model, named, ((kept.sqrt() * image + (1 - kept).sqrt() * noise)[None], torch.tensor([timestep]))
    ).sample[0]
    value = {
        "loss": (found - noise).square().mean(),
        "squared_output": found.square().mean(),
        "mean_output": found.mean(),
    }[objective]
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, parameters)])


@pytest.mark.parametrize("objective", ["loss", "squared_output", "mean_output"])
def test_gradients_are_those_of_autograd(
    trained: tuple[torch.nn.Module, torch.Tensor], objective: sketches.Objective
) -> None:
    model, images = trained
    kind = sketches.Kind((100, 700), objective, draws=2)
    plain = sketches.whole(model, images, kind, "none")
    assert plain.shape == (5, 2, sum(p.numel() for p in model.parameters()))
    for slot, timestep in enumerate(kind.timesteps):
        expected = sum(by_hand(model, images[3], timestep, slot, draw, objective) for draw in range(2)) / 2
        torch.testing.assert_close(torch.from_numpy(plain[3, slot]), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(sketches.whole(model, images, kind, "sign"), np.sign(plain))


def test_stores_hold_their_compressed_gradients(trained: tuple[torch.nn.Module, torch.Tensor], tmp_path: Path) -> None:
    model, images = trained
    kind, labels = sketches.Kind((100, 700)), np.arange(5)
    sketches.capture(tmp_path, model, images, labels, images[:2], kind, ("none", "sign"), 64)
    plan = make_plan(sum(p.numel() for p in model.parameters()), 64, 0, "rotation")
    for name in ("none", "sign"):
        trace = open_store(tmp_path / f"{name}.zarr")
        assert trace.complete and trace.header.transform == name
        whole = torch.from_numpy(sketches.whole(model, images, kind, name))  # type: ignore[arg-type]
        expected = np.stack([[compress_gradient([g], plan)[0].numpy() for g in of] for of in whole])
        # int8; and numbers that are zero but for rounding differ with the batch, and so do their signs.
        least = 0.9 if name == "sign" else 0.99
        assert (sketches.rows_of(trace) * expected).sum(2).min() > least
        assert (np.load(tmp_path / f"{name}.npy") * expected[:2]).sum(2).min() > least


def test_a_capture_that_was_stopped_goes_on(trained: tuple[torch.nn.Module, torch.Tensor], tmp_path: Path) -> None:
    model, images = trained
    kind, labels = sketches.Kind((100, 700)), np.arange(5)

    def capture() -> None:
        sketches.capture(tmp_path, model, images, labels, images[:2], kind, ("none", "sign"), 64)

    capture()
    files = [path for path in (tmp_path / "sign.zarr").rglob("*") if path.is_file()]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    set_finished(tmp_path / "sign.zarr", None)
    (tmp_path / "sign.zarr" / "done" / "c" / "1").unlink()
    capture()
    assert open_store(tmp_path / "sign.zarr").complete
    assert {path: path.read_bytes() for path in before} == {path: content for path, (content, _) in before.items()}
    first = tmp_path / "sign.zarr" / "grad" / "c" / "0" / "0" / "0"
    assert first.stat().st_mtime_ns == before[first][1]


def test_trainings_are_functions_of_seeds(trained: tuple[torch.nn.Module, torch.Tensor], tmp_path: Path) -> None:
    model, images = trained
    again = ddpm.train(RECIPE, images)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    ddpm.save(tmp_path / "model.safetensors", again)
    kept = ddpm.load(tmp_path / "model.safetensors", RECIPE)
    np.testing.assert_array_equal(ddpm.losses(kept, images, 5), ddpm.losses(model, images, 5))
    assert torch.equal(ddpm.generate(kept, 2, steps=3), ddpm.generate(model, 2, steps=3))


def test_losses_are_means_over_timesteps(
    trained: tuple[torch.nn.Module, torch.Tensor],
) -> None:
    model, images = trained
    generator, schedule = torch.Generator().manual_seed(7), ddpm.noise_schedule()
    expected = torch.zeros(5)
    for timestep in (250, 750):
        noise = torch.randn((1, 8, 8), generator=generator)
        for n, image in enumerate(images):
            kept = schedule.alphas_cumprod[timestep]
            noisy = kept.sqrt() * image + (1 - kept).sqrt() * noise
            expected[n] += (model(noisy[None], torch.tensor([timestep])).sample[0] - noise).square().mean() / 2
    np.testing.assert_allclose(ddpm.losses(model, images, 2), expected, rtol=1e-4)
    by_timestep = ddpm.losses_by_timestep(model, images, 2)
    assert by_timestep.shape == (5, 2) and not np.allclose(by_timestep[:, 0], by_timestep[:, 1])
    np.testing.assert_array_equal(by_timestep.mean(axis=1), ddpm.losses(model, images, 2))


def test_the_width_of_strokes() -> None:
    images = torch.full((3, 1, 16, 16), -1.0)
    for n, width in enumerate((1, 2, 4)):
        images[n, 0, 2:14, 6 : 6 + width] = 1
    widths = removal.thickness(images)
    np.testing.assert_allclose(widths, [1, 2, 4], rtol=0.35)
    assert widths[0] < widths[1] < widths[2]


def test_each_model_has_a_half_of_its_own() -> None:
    halves = np.stack([subsets.subset(number) for number in range(4)])
    assert (halves.sum(axis=1) == subsets.SAMPLES // 2).all()
    assert len({half.tobytes() for half in halves}) == 4


def test_each_half_may_be_trained_on_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subsets, "RECIPE", RECIPE)
    queries = subsets.digits().validation[:4]
    monkeypatch.setattr(subsets, "queries", lambda work: queries)
    assert subsets.waiting(tmp_path, 2, 2) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    for number in range(2):
        subsets.train_one(tmp_path, number, 0)
    assert subsets.seeds_there(tmp_path, 2) == 1 and subsets.seeds_there(tmp_path, 3) == 0
    assert sorted(path.name for path in (tmp_path / "subsets").iterdir()) == ["0000.npy", "0001.npy"]
    first = {path: path.read_bytes() for path in (tmp_path / "subsets").iterdir()}
    for one in subsets.waiting(tmp_path, 2, 2):
        subsets.train_one(tmp_path, *one)
    assert {path: path.read_bytes() for path in (tmp_path / "subsets").iterdir()} == first
    assert subsets.seeds_there(tmp_path, 2) == 2 and not subsets.waiting(tmp_path, 2, 2)

    masks, losses = subsets.truth(tmp_path, 2, 2)
    assert masks.shape == (2, subsets.SAMPLES) and losses.shape == (2, 2, 4)
    np.testing.assert_array_equal(subsets.truth(tmp_path, 2)[1], losses[:1])
    of_half = subsets.digits().images[masks[1]]
    np.testing.assert_array_equal(losses[0, 1], ddpm.losses(ddpm.train(RECIPE, of_half), queries))
    np.testing.assert_array_equal(losses[1, 1], ddpm.losses(ddpm.train(RECIPE, of_half, seed=2), queries))
    assert not np.allclose(losses[0], losses[1])


def test_a_second_training_shares_nothing_with_the_first() -> None:
    # A training takes its seed and the next one: first weights, timesteps and noise, order.
    taken = [{subsets.training_seed(seed), subsets.training_seed(seed) + 1} for seed in range(4)]
    assert len(set.union(*taken)) == 8 and subsets.training_seed(0) == 0


def test_the_anchors_score(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images = subsets.digits().images[:6]
    monkeypatch.setattr(subsets, "RECIPE", RECIPE)
    monkeypatch.setattr(subsets, "queries", lambda work: images[:3])
    monkeypatch.setattr(subsets, "digits", lambda: subsets.Digits(images, np.arange(6), images, np.arange(6)))
    monkeypatch.setattr(lds, "EVEN", (100, 700))
    monkeypatch.setitem(lds.KINDS, "loss", sketches.Kind((100, 700)))
    monkeypatch.setattr(lds, "CURVATURE_PASSES", 1)
    found = {(way.method, way.strength): way.scores() for way in lds.of_anchors(tmp_path)}
    assert {method for method, _ in found} <= {name.removeprefix("whole: ") for name in lds.IN_SHORT}
    assert len(found) == 2 * len(lds.RIDGES) + len(lds.CURVATURE_DAMPINGS)
    for scores in found.values():
        assert scores.shape == (3, 6) and np.isfinite(scores).all() and scores.any(axis=1).all()
