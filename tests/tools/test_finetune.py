"""Fine-tuning, its truth, its gradients and what is made of them, in small and against slow ways."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from scipy.stats import spearmanr
from stores import make_header, make_rows, write_store
from torch.func import functional_call

from dmin_trace.search.deflation import choose_directions, principal_directions

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "reproduce"))

import finetune
import gradient_file
import hypotheses
import row_kernels
from emoji_points import TUNED, tiny_tuning, write_base, write_data
from finetune import Tuning
from finetune_truth import Truth, half, measure
from gradient_file import Asked, Gradients, Parameters, ask_tuned, capture, open_gradients
from row_kernels import Kernel, Row, deflated, kernel_of

ALL = np.arange(TUNED)
QUERIES = 4
"""Of each kind."""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the data and a base."""
    folder = tmp_path_factory.mktemp("finetune")
    write_data(folder / "data.npz")
    write_base(folder / "data.npz", folder / "bases", "sd3")
    return folder


@pytest.fixture(scope="module")
def tuning(given: Path) -> Tuning:
    return tiny_tuning(given / "data.npz", given / "bases")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few queries, quickly made."""
    monkeypatch.setattr(finetune, "QUERIES", QUERIES)
    monkeypatch.setattr(finetune, "SAMPLING_STEPS", 2)


# -- trainings and their truth -----------------------------------------------------------------------------------------


def losses(tuning: Tuning) -> np.ndarray:
    return tuning.losses(tuning.latents, tuning.words.at(slice(0, TUNED)))


def test_a_training_is_a_function_of_its_samples_and_seed(tuning: Tuning) -> None:
    found = []
    for samples, seed in ((ALL, 1), (ALL[:8], 1), (ALL, 2), (ALL, 1)):
        tuning.train(samples, seed)
        found.append(losses(tuning))
    assert np.array_equal(found[0], found[3])
    assert not np.allclose(found[0], found[1], rtol=1e-6) and not np.allclose(found[0], found[2], rtol=1e-6)


def test_the_base_is_where_every_training_begins(given: Path, tuning: Tuning) -> None:
    tuning.train(ALL, 1)
    tuning.reset(5)
    for name, tensor in tuning.trained.items():
        if "lora_B" in name:
            assert not tensor.any()
        elif "lora_A" in name:
            assert abs(float(tensor.detach().std()) * tensor.shape[0] - 1) < 0.1
    untrained = tiny_tuning(given / "data.npz", given / "bases")
    np.testing.assert_allclose(losses(tuning), losses(untrained), rtol=1e-6)


def test_the_model_that_is_asked_about_is_trained_once(given: Path, tuning: Tuning, tmp_path: Path) -> None:
    path = tmp_path / "truths" / "tiny.safetensors"
    tuning.full(path)
    first, content = losses(tuning), path.read_bytes()
    again = tiny_tuning(given / "data.npz", given / "bases")
    again.full(path)
    assert np.array_equal(losses(again), first)
    assert path.read_bytes() == content


def test_losses_are_means_over_timesteps_of_one_noise(tuning: Tuning) -> None:
    draws, expected = torch.Generator().manual_seed(7), np.zeros(TUNED)
    for t in (250, 750):
        noise = torch.randn((1, *tuning.latents.shape[1:]), generator=draws)
        for n in range(TUNED):
            here = slice(n, n + 1)
            noisy, target = tuning.kind.noised(tuning.latents[here], noise, torch.tensor([t]))
            with torch.no_grad():
                said = tuning.kind.predict(tuning.denoiser, noisy, torch.tensor([t]), tuning.words.at(here))
            expected[n] += float((said - target).square().mean()) / 2
    found = tuning.losses(tuning.latents, tuning.words.at(slice(0, TUNED)), (250, 750))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_halves_are_halves(tuning: Tuning) -> None:
    truth = Truth(TUNED, finetune.Queries(np.zeros((0, 32, 32, 3), np.uint8), [], []), np.zeros((1, 6, 0)))
    assert truth.masks.shape == (6, TUNED)
    assert (truth.masks.sum(1) == TUNED // 2).all()
    assert len({mask.tobytes() for mask in truth.masks}) == 6
    for m, mask in enumerate(truth.masks):
        assert np.array_equal(np.flatnonzero(mask), half(m, TUNED))


def test_a_truth_goes_on_where_a_training_is_missing(tuning: Tuning, few: None, tmp_path: Path) -> None:
    path = tmp_path / "tiny.npz"
    measure(tuning, path, models=2, seeds=1)
    truth = Truth.read(path)
    assert truth.losses.shape == (1, 2, 2 * QUERIES) and np.isfinite(truth.losses).all()
    tuning.train(half(1, TUNED), 0)
    latents, words = tuning.autoencoder.encode(truth.queries.images), tuning.words_of(truth.queries.captions)
    assert np.array_equal(truth.losses[0, 1], tuning.losses(latents, words))
    expected = truth.losses.copy()
    truth.losses[0, 0] = 5.0
    truth.losses[0, 1, 0] = np.nan
    truth.write(path)
    measure(tuning, path, models=1, seeds=2)
    again = Truth.read(path)
    # What is there is kept, and a missing training that is not asked for stays missing.
    assert (again.losses[0, 0] == 5.0).all() and np.isnan(again.losses[0, 1, 0])
    assert np.isfinite(again.losses[1, 0]).all() and np.isnan(again.losses[1, 1]).all()
    measure(tuning, path, models=2, seeds=1)
    assert np.array_equal(Truth.read(path).losses[0, 1], expected[0, 1])
    assert np.array_equal(Truth.read(path).queries.images, truth.queries.images)


# -- gradients ---------------------------------------------------------------------------------------------------------


def toy(samples: int = 5, queries: int = 2) -> tuple[Asked, list[tuple[int, int]]]:
    """A linear layer whose loss is a square, and the list of what was asked of it."""
    layer = torch.nn.Linear(4, 3)
    points = torch.randn(samples + queries, 4, generator=torch.Generator().manual_seed(0))
    calls: list[tuple[int, int]] = []

    def loss(parameters: Parameters, n: torch.Tensor, t: int, draw: int) -> torch.Tensor:
        calls.append((t, draw))
        said = functional_call(layer, parameters, (points.index_select(0, n[None]),))
        found: torch.Tensor = (said * t + draw).square().mean()
        return found

    return Asked(dict(layer.named_parameters()), loss, samples, queries), calls


PASSES = ((50, 0), (50, 1), (150, 0))


def test_gradients_are_those_of_autograd(tmp_path: Path) -> None:
    asked, _ = toy()
    capture(asked, tmp_path, PASSES)
    kept = open_gradients(tmp_path)
    assert kept.rows.shape == (7, 3, 15) and kept.samples == 5
    for n in range(7):
        for k, (t, draw) in enumerate(PASSES):
            expected = torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        asked.loss(asked.parameters, torch.tensor(n), t, draw), list(asked.parameters.values())
                    )
                ]
            )
            np.testing.assert_allclose(kept.rows[n, k] * kept.norms[n, k], expected, rtol=2e-3, atol=1e-2)
            np.testing.assert_allclose((kept.rows[n, k].astype(float) ** 2).mean(), 1, rtol=2e-3)
    assert kept.layers == [(slice(0, 12), (3, 4)), (slice(12, 15), (3,))]


def test_a_file_of_gradients_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, calls = toy()
    monkeypatch.setattr(gradient_file, "BATCH", 5)
    capture(asked, tmp_path, PASSES)
    assert len(calls) == 2 * len(PASSES)
    told = json.loads((tmp_path / "gradients.json").read_text(encoding="utf-8"))
    before = (tmp_path / "gradients.f16").read_bytes()
    (tmp_path / "gradients.json").write_text(json.dumps({**told, "done": 5}), encoding="utf-8")
    with pytest.raises(typer.BadParameter, match="has 5 of 7"):
        open_gradients(tmp_path)
    calls.clear()
    capture(asked, tmp_path, PASSES)
    assert len(calls) == len(PASSES)
    assert (tmp_path / "gradients.f16").read_bytes() == before
    with pytest.raises(typer.BadParameter, match="of another model or other passes"):
        capture(asked, tmp_path, PASSES[:2])


def test_gradients_of_a_tuned_model_are_of_its_samples_then_its_queries(
    given: Path, tuning: Tuning, few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(tuning, tmp_path / "sd3-lora.npz", models=1, seeds=1)
    monkeypatch.setattr(gradient_file, "Tuning", lambda *_, **__: tiny_tuning(given / "data.npz", given / "bases"))
    asked = ask_tuned("sd3-lora", given / "data.npz", tmp_path)
    assert (asked.samples, asked.queries) == (TUNED, 2 * QUERIES)
    assert set(asked.parameters) == set(tuning.trained)
    truth = Truth.read(tmp_path / "sd3-lora.npz")
    tuning.full(tmp_path / "sd3-lora.safetensors")
    noise = torch.randn((1, *tuning.latents.shape[1:]), generator=torch.Generator().manual_seed(1000 * 450 + 2))
    for n, image, caption in (
        (3, tuning.division.tuning.images[3], tuning.division.tuning.captions[3]),
        (TUNED + 1, truth.queries.images[1], truth.queries.captions[1]),
    ):
        latents, words = tuning.autoencoder.encode(image[None]), tuning.words_of([caption])
        noisy, target = tuning.kind.noised(latents, noise, torch.tensor([450]))
        said = tuning.kind.predict(tuning.denoiser, noisy, torch.tensor([450]), words)
        expected = (said - target).square().mean()
        torch.testing.assert_close(asked.loss(asked.parameters, torch.tensor(n), 450, 2), expected)
        gradients = torch.cat([g.flatten() for g in torch.autograd.grad(expected, list(tuning.trained.values()))])
        torch.testing.assert_close(asked.gradients(torch.tensor([0, n]), 450, 2)[1], gradients, rtol=1e-3, atol=1e-6)


# -- rows and their products -------------------------------------------------------------------------------------------


@pytest.fixture
def gradients(tmp_path: Path) -> Gradients:
    """Of five samples and two queries."""
    capture(toy()[0], tmp_path / "file", PASSES)
    return open_gradients(tmp_path / "file")


def test_a_row_averages_draws_as_they_are_and_timesteps_normalised(gradients: Gradients, tmp_path: Path) -> None:
    whole = gradients.rows.astype(np.float64) * gradients.norms[:, :, None]

    def unit(rows: np.ndarray) -> np.ndarray:
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))

    summed = unit(whole[:, 0] + whole[:, 1]) + unit(whole[:, 2])
    for transform, expected in (("none", unit(summed)), ("sign", unit(np.sign(summed)))):
        row = Row(PASSES, transform)
        for _ in range(2):  # computed, then read
            found = kernel_of(gradients, row, tmp_path / "kernels")
            np.testing.assert_allclose(found.samples, expected[:5] @ expected[:5].T, atol=1e-5)
            np.testing.assert_allclose(found.queries, expected[5:] @ expected[:5].T, atol=1e-5)
    assert len(list((tmp_path / "kernels").iterdir())) == 2


def layered(count: int, samples: int, shape: tuple[int, int]) -> tuple[torch.Tensor, Gradients]:
    """Rows of one matrix and a vector of four."""
    rows = torch.randn(count, shape[0] * shape[1] + 4, generator=torch.Generator().manual_seed(1))
    none = np.zeros((0, 0), np.float32)
    return rows, Gradients(
        rows=none.astype(np.float16), norms=none, passes=(), shapes={"weight": shape, "bias": (4,)}, samples=samples
    )


def test_each_parameter_is_scaled_and_small_elements_have_no_sign() -> None:
    rows, gradients = layered(6, 4, (3, 5))
    for transform in ("layers", "dead zone", "rms"):
        found = row_kernels.transformed(rows.clone(), transform, gradients)
        for place in (slice(0, 15), slice(15, 19)):
            part = rows[:, place]
            root = part.square().mean(1, keepdim=True).sqrt()
            expected = {
                "layers": part / root,
                "dead zone": torch.where(part.abs() > row_kernels.DEAD * root, part.sign(), torch.zeros(())),
                "rms": part / part[:4].square().mean(0).sqrt(),
            }[transform]
            torch.testing.assert_close(found[:, place], expected)
    with pytest.raises(ValueError, match="is not a transform"):
        row_kernels.transformed(rows.clone(), "sine", gradients)


@pytest.mark.parametrize("shape", [(3, 8), (8, 3)])
def test_orthogonal_rows_have_all_singular_values_near_to_each_other(shape: tuple[int, int]) -> None:
    rows, gradients = layered(6, 4, shape)
    found = row_kernels.transformed(rows.clone(), "orthogonal", gradients)
    size = shape[0] * shape[1]
    for one, given in zip(found, rows, strict=True):
        left, values, right = np.linalg.svd(given[:size].reshape(shape).double().numpy(), full_matrices=False)
        values /= np.linalg.norm(values)
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        assert values.max() / values.min() < 2
        expected = (left * values @ right).ravel()
        expected /= (expected**2).mean() ** 0.5
        np.testing.assert_allclose(one[:size], expected, atol=1e-4)


@pytest.mark.parametrize("transform", ["scaled", "turned", "whitened", "rotated"])
def test_rows_are_over_the_roots_of_second_moments(
    gradients: Gradients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transform: str
) -> None:
    known = row_kernels.MOMENTS[transform]
    if known.samples is not None:
        known = replace(known, samples=3)
        monkeypatch.setitem(row_kernels.MOMENTS, transform, known)
    assert known.factored == (transform in ("scaled", "turned")) and known.turned == (
        transform in ("turned", "rotated")
    )
    whole = gradients.rows.astype(np.float64) * gradients.norms[:, :, None]
    of_samples = np.sort(np.random.default_rng(0).permutation(5)[: known.samples])
    rows, seen = whole[:, [0, 2]].mean(1), whole[of_samples][:, [0, 2]].reshape(2 * len(of_samples), -1)
    moments = np.empty(whole.shape[2])
    for place, shape in gradients.layers:
        if len(shape) > 1 and known.turned:
            left, right = (
                np.linalg.eigh(sum(of(x.reshape(shape[0], -1)) for x in seen[:, place]))[1]
                for of in (lambda x: x @ x.T, lambda x: x.T @ x)
            )
            for part in (rows, seen):
                part[:, place] = [(left.T @ x.reshape(shape[0], -1) @ right).ravel() for x in part[:, place]]
        squares = (seen[:, place] ** 2).mean(0)
        if len(shape) > 1 and known.factored:
            flat = squares.reshape(shape[0], -1)
            products = [[flat[i].mean() * flat[:, j].mean() for j in range(flat.shape[1])] for i in range(len(flat))]
            squares = np.array(products).ravel() / flat.mean()
        moments[place] = squares
    rows /= np.sqrt(moments + known.damping * moments.mean())
    found = kernel_of(gradients, Row((PASSES[0], PASSES[2]), transform, divided=False), tmp_path / "kernels")
    lengths = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(found.lengths, lengths[:5] / lengths[:5].mean(), rtol=2e-3)
    unit = rows / lengths[:, None]
    np.testing.assert_allclose(found.queries, unit[5:] @ unit[:5].T, atol=3e-3)
    scores = row_kernels.with_lengths(row_kernels.plain([found]), [found])
    np.testing.assert_allclose(scores, unit[5:] @ rows[:5].T / lengths[:5].mean(), atol=5e-3)


def test_ridge_scores_are_those_of_kernel_ridge_regression() -> None:
    rows, queries = np.random.default_rng(0).standard_normal((2, 6, 9))
    kernel = Kernel(rows @ rows.T, queries @ rows.T, np.ones(6))
    expected = queries @ np.linalg.inv(rows.T @ rows + 2 * np.eye(9)) @ rows.T
    np.testing.assert_allclose(row_kernels.ridge([kernel], 2.0), expected, atol=1e-9)


@pytest.mark.parametrize("count", [None, 3])
def test_deflated_scores_are_those_of_dmin_trace(tmp_path: Path, count: int | None) -> None:
    header = make_header(40, timesteps=2, dimension=64, dtype="float32")
    draw = np.random.default_rng(0)
    grad = draw.standard_normal((40, 2, 64)) + 0.7 * draw.standard_normal((1, 2, 64))
    grad /= np.linalg.norm(grad, axis=2, keepdims=True)
    queries = grad[:5] + 0.1 * draw.standard_normal((5, 2, 64))
    queries /= np.linalg.norm(queries, axis=2, keepdims=True)
    store = write_store(tmp_path / "trace", header, make_rows(header)._replace(grad=grad.astype(np.float32)))
    valid = np.flatnonzero(store.valid)
    rows = store.gradients(valid).astype(np.float64)
    principal = principal_directions(store, count)
    if count is None:
        assert principal.eigenvalues.shape[1] == choose_directions(principal.eigenvalues)
    expected = np.einsum("qtv,ntv->qn", principal.deflate(queries.astype(np.float32)).astype(np.float64), rows)
    kernels = [Kernel(rows[:, t] @ rows[:, t].T, queries[:, t] @ rows[:, t].T, np.ones(len(rows))) for t in range(2)]
    np.testing.assert_allclose(deflated(kernels, count), expected, atol=1e-5)
    plain = np.einsum("qtv,ntv->qn", queries, rows)
    np.testing.assert_allclose(row_kernels.plain(kernels), plain, atol=1e-9)
    assert abs(expected - plain).max() > 0.01


def test_changes_of_scores() -> None:
    scores = np.array([[-4.0, -1.0, 0.0, 1.0, 3.0]])
    np.testing.assert_array_equal(row_kernels.signed_squares(scores), [[-16, -1, 0, 1, 9]])
    np.testing.assert_array_equal(row_kernels.strongest(scores, 0.4), [[-4, 0, 0, 0, 3]])
    scale = 1.4826 * 1.0
    np.testing.assert_allclose(row_kernels.shrunk(scores, 1.0), [[scale - 4, 0, 0, 0, 3 - scale]])


# -- hypotheses --------------------------------------------------------------------------------------------------------


def judge(seeds: int = 2, models: int = 30, samples: int = 12, queries: int = 8) -> tuple[hypotheses.Judge, np.ndarray]:
    """A truth that is linear in the samples, but for noise; and the scores it was made with."""
    draw = np.random.default_rng(0)
    masks = draw.random((models, samples)) < 0.5
    scores = draw.standard_normal((queries, samples))
    losses = -(masks @ scores.T) + 0.3 * draw.standard_normal((seeds, models, queries))
    return hypotheses.Judge("made", masks, losses, queries // 2, losses), scores


def test_a_hypothesis_is_judged_by_the_rank_correlation_of_sums() -> None:
    made, scores = judge()
    for q, found in enumerate(made.each(scores)):
        sums = [scores[q, mask].sum() for mask in made.masks]
        assert abs(found - spearmanr(sums, -made.losses.mean(0)[:, q]).statistic) < 1e-9
    kinds = made.kinds
    assert kinds["held out"].tolist() == [1, 3] and kinds["generated"].tolist() == [5, 7]
    assert not set(made.development) & set(kinds["reported"])


def test_the_distance_of_two_hypotheses_has_an_interval() -> None:
    made, scores = judge()
    worse = scores + np.random.default_rng(1).standard_normal(scores.shape)
    queries = made.kinds["reported"]
    assert hypotheses.paired(made, scores, scores, queries) == (0.0, 0.0)
    low, high = hypotheses.paired(made, scores, worse, queries)
    assert 0 < low < (made.each(scores) - made.each(worse))[queries].mean() < high


def test_hypotheses_have_names_of_their_own_and_passes_that_are_kept() -> None:
    listed = hypotheses.hypotheses()
    assert listed[0] is hypotheses.DEFAULT
    assert len({(one.group, one.name) for one in listed}) == len(listed)
    for one in listed:
        assert {p for row in one.rows for p in row.passes} <= set(gradient_file.PASSES)
        assert all(row.transform in row_kernels.TRANSFORMS for row in one.rows)


def test_only_halves_with_every_training_are_judged(tuning: Tuning, few: None, tmp_path: Path) -> None:
    path = tmp_path / "tiny.npz"
    measure(tuning, path, models=2, seeds=1)
    truth = Truth.read(path)
    more = np.concatenate([truth.losses, truth.losses[:, :1]], axis=1)
    more[0, 0, 3] = np.nan
    truth.losses = more
    truth.write(path)
    found = hypotheses.judge_tuned("tiny", tmp_path)
    assert found.masks.shape == (2, TUNED) and np.array_equal(found.masks, truth.masks[1:])
    assert np.array_equal(found.losses, more[:, 1:]) and found.held_out == QUERIES
