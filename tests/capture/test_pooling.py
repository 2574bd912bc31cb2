"""Rows: gradients of several timesteps are averaged into one. The oracle is plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from points import POINTS, denoiser, loss_of, record
from stores import change
from tiny import plain_script, run

import dmin_trace
from dmin_trace.capture.pinning import pinned_timesteps
from dmin_trace.capture.pooling import GradientPool
from dmin_trace.cli.app import main
from dmin_trace.errors import CaptureError, QueryError, SettingsError, TraceError
from dmin_trace.project import compress_gradient, make_plan
from dmin_trace.search import build_index
from dmin_trace.settings import Settings
from dmin_trace.store import Store, open_store, pack_store

TIMESTEPS = [100, 300, 500, 700, 900]
Gradients = Callable[[int, int, int], tuple[float, torch.Tensor]]
"""From sample, timestep and seed to the loss and the gradient, flat."""


def seed_of(slot: int, draw: int) -> int:
    """The documented seed of a draw: numpy's SeedSequence of (seed, slot + 1), with the draw from the second one on."""
    return int(np.random.SeedSequence([0, slot + 1, draw][: 3 if draw else 2]).generate_state(1)[0])


def loss_at(forward: Any, parameters: list[torch.Tensor], points: torch.Tensor = POINTS) -> Gradients:
    """Loss and gradient of a denoiser of points, whose noise is drawn first."""

    def gradient(sample: int, timestep: int, seed: int) -> tuple[float, torch.Tensor]:
        noise, t = torch.randn(1, 16, generator=torch.Generator().manual_seed(seed)), torch.tensor([timestep])
        loss = (forward(points[sample : sample + 1] + noise * t.reshape(-1, 1) / 1000, t) - noise).square().mean()
        return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double()

    return gradient


def of_model(model: torch.nn.Module) -> Gradients:
    return loss_at(model.eval(), list(model.parameters()))


def check_rows(trace: Store, gradient: Gradients, rows: int, timesteps: list[int] | None = None) -> None:
    """The rows of a store are the projections of the oracle's, and the numbers beside them are its norms and losses."""
    header, timesteps = trace.header, timesteps or TIMESTEPS
    facts = header.projection
    plan = make_plan(facts.length, header.dimension, facts.seed, facts.kind, facts.width)
    groups = np.array_split(np.arange(len(timesteps)), rows)
    assert header.timesteps == tuple(timesteps)
    assert header.groups == tuple(tuple(timesteps[k] for k in group) for group in groups)
    stored = trace.gradients(np.arange(header.samples))
    assert stored.shape == (header.samples, rows, header.dimension) and trace.norm.shape == stored.shape[:2]
    assert trace.loss.shape == (header.samples, len(timesteps)) and trace.valid.all()
    for sample in range(header.samples):
        for row, group in enumerate(groups):
            pooled = torch.zeros(facts.length, dtype=torch.float64)
            for k in group.tolist():
                draws = [gradient(sample, timesteps[k], seed_of(k, draw)) for draw in range(header.draws)]
                assert trace.loss[sample, k] == pytest.approx(np.mean([loss for loss, _ in draws]), rel=1e-5)
                mean = torch.stack([found for _, found in draws]).mean(0)
                pooled += mean / len(group)
            if header.transform == "sign":
                pooled = pooled.sign()
            expected, _ = compress_gradient([pooled.float()], plan)
            assert trace.norm[sample, row] == pytest.approx(float(pooled.norm()), rel=1e-5)
            assert np.linalg.norm(stored[sample, row] - expected.numpy()) <= 1e-4, (sample, row)


@pytest.mark.parametrize(
    ("rows", "transform", "draws"),
    [(1, "sign", 1), (1, "none", 1), (2, "none", 3), (3, "sign", 2), (4, "none", 1)],
)
def test_rows_are_of_the_gradient_of_the_mean_loss(tmp_path: Path, rows: int, transform: str, draws: int) -> None:
    model = denoiser()
    path = record(
        model, tmp_path / "trace.zarr", timesteps=TIMESTEPS, rows=rows, transform=transform, draws=draws, dimension=256
    )
    check_rows(open_store(path), of_model(model), rows)


def test_a_group_is_of_timesteps_that_follow_each_other_in_the_settings(tmp_path: Path) -> None:
    model = denoiser()
    path = record(model, tmp_path / "trace.zarr", timesteps=[900, 100, 500], rows=2)
    check_rows(open_store(path), of_model(model), 2, [900, 100, 500])


def test_as_many_rows_as_timesteps_are_the_rows_of_no_rows(tmp_path: Path) -> None:
    with_rows, without = (
        open_store(record(denoiser(), tmp_path / name / "trace.zarr", rows=rows, transform="sign", dtype="int8"))
        for name, rows in (("with", 3), ("without", None))
    )
    assert replace(with_rows.header, id=without.header.id, run=without.header.run) == without.header
    assert with_rows.header.group_count is None and without.header.gradient_count == 3
    for name in ("grad/c/0/0/0", "numbers/c/0/0"):
        assert (with_rows.path / name).read_bytes() == (without.path / name).read_bytes()
    assert "group_count" not in (without.path / "zarr.json").read_text()


def test_a_script_records_one_row_of_each_sample(tmp_path: Path) -> None:
    line = f"dmin_trace.attach(accelerator, args, timesteps={TIMESTEPS}, rows=1, dimension=64, dtype='float32')"
    run([plain_script(tmp_path / "script.py", attach=line), "--count", "5"], tmp_path)
    saved = torch.load(tmp_path / "out" / "state.pt", weights_only=False)["model"]
    weights = {name: value.clone().requires_grad_() for name, value in saved.items()}

    def forward(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        hidden = torch.cat([noisy, t.reshape(-1, 1).float() / 1000], 1)
        hidden = torch.tanh(hidden @ weights["inner.weight"].T + weights["inner.bias"])
        return hidden @ weights["outer.weight"].T + weights["outer.bias"]

    points = torch.randn(5, 16, generator=torch.Generator().manual_seed(5))
    trace = open_store(tmp_path / "out.trace" / "trace.zarr")
    assert (trace.complete, trace.header.transform, trace.header.settings["rows"]) == (True, "sign", 1)
    check_rows(trace, loss_at(forward, list(weights.values()), points), 1)


def interrupted(path: Path, model: torch.nn.Module, **settings: Any) -> None:
    """A store of which one chunk is done; the recording ends in the middle of a sample."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dmin_trace.store.layout.CHUNK_BYTES", 4 * 2 * 64 * 4)
        with dmin_trace.recording(model, samples=12, out=path, dimension=64, dtype="float32", **settings) as recording:
            for i in recording.samples:
                for k in recording.timesteps:
                    if (i, k) == (6, 2):
                        raise KeyboardInterrupt
                    with recording.step(i, k):
                        loss_of(model, POINTS[i : i + 1]).backward()


def test_a_recording_goes_on_with_the_same_rows_alone(tmp_path: Path) -> None:
    model, path = denoiser(), tmp_path / "trace.zarr"
    settings: dict[str, Any] = {"timesteps": TIMESTEPS, "transform": "sign"}
    interrupted(path, model, rows=2, **settings)
    begun = open_store(path, unfinished=True)
    assert 0 < len(begun.chunks_done) < begun.header.chunks
    for rows, shown in ((3, "rows 3"), (None, "a row for each timestep"), (5, "a row for each timestep")):
        with pytest.raises(TraceError, match=f"its samples have rows 2, those of this run {shown}"):
            record(model, path, rows=rows, **settings)
    record(model, path, rows=2, **settings)
    check_rows(open_store(path), of_model(model), 2)


def test_a_store_without_rows_is_not_gone_on_with_by_rows(tmp_path: Path) -> None:
    interrupted(tmp_path / "trace.zarr", denoiser(), timesteps=3)
    with pytest.raises(TraceError, match="its samples have a row for each timestep, those of this run rows 1"):
        record(denoiser(), tmp_path / "trace.zarr", rows=1, transform="sign")


def test_a_store_of_an_older_version_is_gone_on_with(tmp_path: Path) -> None:
    interrupted(tmp_path / "trace.zarr", denoiser(), timesteps=3)
    # It knows no such setting.
    change(tmp_path / "trace.zarr", lambda facts: facts["attributes"]["settings"].pop("rows"))
    assert open_store(record(denoiser(), tmp_path / "trace.zarr", transform="sign")).complete


# -- queries ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of twelve points with two rows each."""
    folder = tmp_path_factory.mktemp("recorded")
    names = [f"point {k}" for k in range(len(POINTS))]
    return record(
        denoiser(),
        folder / "trace.zarr",
        timesteps=TIMESTEPS,
        rows=2,
        transform="sign",
        dtype="int8",
        dimension=256,
        columns={"caption": names},
    )


def point_loss(model: torch.nn.Module, i: int) -> torch.Tensor:
    return loss_of(model, POINTS[i : i + 1])


def test_a_query_has_the_rows_of_its_trace(recorded: Path) -> None:
    trace = dmin_trace.open_trace(recorded)
    assert repr(trace) == "Trace(12 samples, T=5, R=2, v=256, int8, complete)"
    assert trace.groups == ((100, 300, 500), (700, 900)) and len(trace.timesteps) == 5
    queries = trace.query_loss(denoiser(), [3, 8], point_loss)
    stored = trace.gradients(range(12))
    assert queries.gradients.shape == (2, 2, 256) and np.abs(queries.gradients - stored[[3, 8]]).max() < 0.01
    products = np.einsum("qrv,nrv->qnr", queries.gradients, stored)
    by_row = trace.scores(queries, "dmin", per_timestep=True)
    assert by_row.shape == (2, 12, 2) and np.abs(by_row - products).max() < 1e-5
    assert np.abs(trace.scores(queries, "dmin") - products.sum(axis=2)).max() < 1e-5
    top = trace.top_k(queries, 3, "dmin")
    assert top.samples[:, 0].tolist() == [3, 8] and top.scores[:, 0] == pytest.approx(2, abs=0.01)
    assert top.per_timestep.shape == (2, 3, 2) and len(top.hits[0][0].per_timestep) == 2
    assert (top.groups, top.timesteps) == (trace.groups, trace.timesteps)
    assert {"t100-500", "t700-900"} < set(top.to_pandas().columns)
    assert trace.self_influence("dmin") == pytest.approx(2, abs=0.01)


def test_deflated_scores_are_deflated_row_by_row(recorded: Path) -> None:
    trace = dmin_trace.open_trace(recorded)
    queries, stored = trace.query_samples([4]), trace.gradients(range(12)).astype(np.float64)
    expected = np.zeros(12)
    top = trace.top_k(queries, 12, "deflated")
    count = int(top.deflation.split()[0])
    assert "principal directions of each group of timesteps" in top.deflation
    for row in range(2):
        eigenvalues, vectors = np.linalg.eigh(stored[:, row].T @ stored[:, row])
        d, basis = eigenvalues[::-1][:count], vectors[:, ::-1][:, :count]
        query = queries.gradients[0, row].astype(np.float64)
        expected += stored[:, row] @ (query - basis @ (d / (d + d[-1]) * (basis.T @ query)))
    assert top.scores[0] == pytest.approx(expected[top.samples[0]], abs=1e-4)


def test_a_query_of_other_rows_is_refused(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="rows was given with like"):
        dmin_trace.recording(denoiser(), samples=1, like=recorded, rows=1)
    trace = dmin_trace.open_trace(recorded)
    queries = trace.query_samples([4])
    with pytest.raises(QueryError, match=r"shape \(1, 1, 256\); expected \(queries, 2, 256\)"):
        trace.scores(replace(queries, gradients=queries.gradients[:, :1]), "dmin")
    path = record(denoiser(), tmp_path / "trace.zarr", rows=2)
    change(path, lambda facts: facts["attributes"]["settings"].update(rows=1))
    with pytest.raises(QueryError, match="The query's samples have rows 1, those of .* have rows 2"):
        dmin_trace.open_trace(path).query_loss(denoiser(), [3], point_loss)


def test_an_index_and_a_packed_copy_have_the_rows(recorded: Path, tmp_path: Path) -> None:
    packed = pack_store(open_store(recorded), tmp_path / "small.zarr", dimension=64, codec="blosc")
    assert packed.header.groups == open_store(recorded).header.groups and packed.header.settings["rows"] == 2
    whole = open_store(recorded)
    assert np.array_equal(packed.norm, whole.norm) and np.array_equal(packed.loss, whole.loss)
    folded = whole.gradients(np.arange(12)).reshape(12, 2, -1, 64).sum(axis=2)
    folded /= np.linalg.norm(folded, axis=2, keepdims=True)
    assert np.abs(packed.gradients(np.arange(12)) - folded).max() < 0.01
    queries = dmin_trace.open_trace(packed.path).query_loss(denoiser(), [5], point_loss)
    assert np.abs(queries.gradients[0] - folded[5]).max() < 0.01
    facts = build_index(packed)
    assert (facts.timesteps, facts.length) == (2, 2 * (facts.fold + facts.directions))
    trace = dmin_trace.open_trace(packed.path)
    assert trace.top_k(queries, 1, "dmin").samples.tolist() == [[5]]
    assert "kept by the index" in trace.top_k(queries, 1).deflation


def test_the_command_line_shows_the_rows(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(recorded)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 of a sample, of the mean gradient at the timesteps 100, 300, 500; 700, 900" in shown
    assert main(["verify", str(recorded)]) == 0
    assert main(["query", str(recorded), "--sample", "4", "-k", "2", "--csv", str(tmp_path / "hits.csv")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "t=100 900" in shown and "summed over 2 groups of 5 pooled timesteps" in shown
    assert (tmp_path / "hits.csv").read_text().splitlines()[0].endswith(",t100-500,t700-900,caption")


# -- what cannot be pooled -------------------------------------------------------------------------------------------


def test_a_sample_whose_gradient_is_infinite_at_one_timestep_is_never_ranked(tmp_path: Path) -> None:
    def loss(model: torch.nn.Module, clean: torch.Tensor) -> torch.Tensor:
        noise, t = torch.randn_like(clean), torch.randint(0, 1000, (1,))
        of_step = (model(clean + noise * t.reshape(-1, 1) / 1000, t) - noise).square().mean()
        zero = torch.equal(clean, POINTS[3:4]) and t.item() == 500
        return of_step * (0 if zero else torch.inf if torch.equal(clean, POINTS[7:8]) else 1)

    trace = open_store(record(denoiser(), tmp_path / "trace.zarr", loss, rows=1, transform="sign", dtype="int8"))
    # A gradient that is zero at one timestep, as that of sample 3, counts as zero in the mean.
    assert np.flatnonzero(~trace.valid).tolist() == [7]
    assert not trace.gradients([7]).any() and trace.unranked.infinite == 1
    scores = dmin_trace.open_trace(trace.path).scores(dmin_trace.open_trace(trace.path).query_samples([0]), "dmin")
    assert np.flatnonzero(np.isnan(scores[0])).tolist() == [7]


def test_a_pool_gives_a_row_after_the_last_step_of_its_group_alone() -> None:
    settings = Settings(timesteps=3, rows=2, draws=2)
    pool, rows = GradientPool(settings), []
    for pinned in pinned_timesteps(settings):
        given = torch.tensor([3.0 + pinned.draw * 2, 0.0] if pinned.number != 1 else [0.0, 8.0])
        row = pool.add(pinned, iter([given[:1], given[1:]]))
        rows.append(None if row is None else torch.cat(list(row)).tolist())
    assert rows == [None, None, None, [2.0, 4.0], None, [4.0, 0.0]]
    with pytest.raises(CaptureError, match="The first training step of a row is missing"):
        GradientPool(settings).add(pinned_timesteps(settings)[1], iter([torch.ones(2)]))
