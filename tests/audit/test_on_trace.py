"""Measures of a store: of the right samples, by index and by scan, and the same through the command line."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clusters import clustered
from stores import Rows, make_header, make_rows, write_store
from tiny import EXAMPLE, digit_folder, run, without_the_line
from torch.nn.functional import mse_loss

import dmin_trace
from dmin_trace.audit import on_trace
from dmin_trace.audit.on_trace import read_retrained
from dmin_trace.cli.app import main
from dmin_trace.errors import EvaluationError, TraceError
from dmin_trace.query import Trace, open_trace
from dmin_trace.search import build_index

CLI = ("-m", "dmin_trace.cli.app")
CLASSES = np.arange(160) % 5

# The paper's score, whose values are known in advance.
measure_labels = partial(on_trace.measure_column, kind="labels", score="dmin")
measure_duplicates = partial(on_trace.measure_column, kind="duplicates", score="dmin")
measure_datamodeling = partial(on_trace.measure_datamodeling, score="dmin")


def labelled(path: Path, **changes: Any) -> tuple[Trace, Rows]:
    """A trace of 160 samples of five classes, in another order than the dataset, some of them without a label or a
    direction; every tenth of the dataset has the gradient of the one before, but for a little, and its caption."""
    header = make_header(samples=160, timesteps=2, dimension=64, rows=64)
    generator = np.random.default_rng(3)
    order = generator.permutation(160)
    centres = generator.standard_normal((5, 2, 64))
    grad = centres[CLASSES] + 1.5 * generator.standard_normal((160, 2, 64))
    grad[9::10] = grad[8::10] + 1e-3 * grad[9::10]
    grad /= np.linalg.norm(grad, axis=2, keepdims=True)
    rows = make_rows(header)
    rows.norm[5] = 0
    label = np.where(np.arange(160) % 7 == 6, -1, CLASSES)
    caption = [f"of {k - (k % 10 == 9)}" for k in range(160)]
    columns: dict[str, list[Any]] = {
        "caption": [caption[k] for k in order],
        "label": label[order].tolist(),
        "weight": [1.0] * 160,
    }
    rows = rows._replace(grad=grad[order].astype(np.float32), sample=order.astype(np.int64), columns=columns)
    rows = rows._replace(**changes)
    return Trace(write_store(path, header, rows)), rows


def by_hand(trace: Trace, rows: Rows, query: int) -> list[int]:
    """The other samples that are ranked, best first for a query, by plain numpy on what is stored."""
    stored = trace.store.gradients(np.arange(160)).astype(np.float64)
    row = rows.sample.tolist().index(query)
    scores = (stored * stored[row]).sum(axis=(1, 2))
    order = sorted(range(160), key=lambda other: (-scores[other], other))
    return [int(rows.sample[other]) for other in order if other != row and rows.norm[other, 0] > 0]


def test_measure_column_of_labels_is_the_rate_of_its_queries(tmp_path: Path) -> None:
    trace, rows = labelled(tmp_path / "trace.zarr")
    found = measure_labels(trace, "label", ks=[1, 7, 50], queries=31)
    labels = dict(zip(rows.sample.tolist(), rows.columns["label"], strict=True))
    chosen = found.values["queries"]
    assert len(set(chosen)) == 31 == len(chosen) and chosen == sorted(chosen)
    # From the first to the last of those that have a label and a direction.
    without = int(rows.sample[5])
    usable = [k for k in range(160) if labels[k] != -1 and k != without]
    assert (chosen[0], chosen[-1]) == (usable[0], usable[-1])
    assert set(chosen) <= set(usable)
    for of in found.values["rates"]:
        expected = [np.mean([labels[hit] == labels[q] for hit in by_hand(trace, rows, q)[: of["k"]]]) for q in chosen]
        assert np.allclose(of["each"], expected)
        assert of["value"] == pytest.approx(np.mean(expected))
        assert of["low"] < of["value"] < of["high"]
        # 158 other samples have a direction.
        alike = [sum(labels[k] == labels[q] for k in range(160) if k not in (q, without)) for q in chosen]
        assert of["chance"] == pytest.approx(np.mean(alike) / 158)
    assert found.values["rates"][0]["value"] > 0.5
    assert found.title == "Detection rate by label, dmin scores, 31 samples as queries"
    assert "Scanned all 160 samples." in found.meaning


def test_measure_column_of_labels_uses_all_that_have_a_label_if_they_are_few(tmp_path: Path) -> None:
    trace, rows = labelled(tmp_path / "trace.zarr")
    found = measure_labels(trace, "label", queries=1000)
    assert len(found.values["queries"]) == sum(value != -1 for value in np.delete(rows.columns["label"], 5))
    assert [of["k"] for of in found.values["rates"]] == [5, 10, 50, 100]


def test_measure_column_of_labels_in_batches_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, _ = labelled(tmp_path / "trace.zarr")
    whole = measure_labels(trace, "label", ks=[5], queries=20)
    monkeypatch.setattr(on_trace, "BATCH_NUMBERS", 7 * 2 * 64)
    parts = measure_labels(trace, "label", ks=[5], queries=20)
    assert parts.values == whole.values


def test_measure_column_of_duplicates_finds_them_and_leaves_the_query_out(tmp_path: Path) -> None:
    trace, rows = labelled(tmp_path / "trace.zarr")
    found = measure_duplicates(trace, "caption", ks=[1, 3])
    without = int(rows.sample[5])
    pairs = [(k, k + 1) for k in range(8, 160, 10) if without not in (k, k + 1)]
    assert found.values["queries"] == [k for pair in pairs for k in pair]
    assert found.values["rates"][0]["value"] == found.values["rates"][1]["value"] == 1
    assert found.values["rates"][1]["chance"] == pytest.approx(3 / 158)
    # By label, samples with the same label are duplicates.
    by_label = measure_duplicates(trace, "label", ks=[1, 158], queries=10)
    assert by_label.values["rates"][1]["value"] == 1
    labels = dict(zip(rows.sample.tolist(), rows.columns["label"], strict=True))
    others = [
        sum(labels[k] == labels[q] for k in range(160) if k not in (q, without)) for q in by_label.values["queries"]
    ]
    assert by_label.values["rates"][0]["best"] == pytest.approx(np.mean(1 / np.array(others)))


def test_measure_column_of_duplicates_with_more_of_them_than_k(tmp_path: Path) -> None:
    """Twenty equal gradients: the query itself may not be among the first of them."""
    grad = labelled(tmp_path / "first.zarr")[1].grad.copy()
    grad[20:40] = grad[20]
    trace, rows = labelled(tmp_path / "trace.zarr", grad=grad)
    caption = [f"{k}" for k in range(160)]
    caption[20:40] = ["same"] * 20
    columns = rows.columns | {"caption": caption}
    trace, _ = labelled(tmp_path / "again.zarr", grad=grad, columns=columns)
    found = measure_duplicates(trace, "caption", ks=[5, 19])
    assert len(found.values["queries"]) == 20
    assert [of["value"] for of in found.values["rates"]] == pytest.approx([5 / 19, 1])


def test_measure_column_of_labels_by_index_and_by_scan(tmp_path: Path) -> None:
    header = make_header(samples=1200, timesteps=3, dimension=512, rows=256)
    rows = clustered(header)._replace(sample=np.arange(1200))
    rows.columns["label"] = [k % 3 for k in range(1200)]
    trace = Trace(write_store(tmp_path / "trace.zarr", header, rows))
    served = build_index(trace.store).depths[-1].k
    by_index = measure_labels(trace, "label", ks=[5, served - 1], queries=30)
    by_scan = measure_labels(trace, "label", ks=[5, served - 1], queries=30, exact=True)
    assert (by_index.values["answered_by"], by_scan.values["answered_by"]) == ("index", "scan")
    assert "Answered by the index" in by_index.meaning and by_index.values["index_recall"][1] > 0.9
    assert np.allclose(by_index.values["rates"][0]["each"], by_scan.values["rates"][0]["each"], atol=0.21)
    more = measure_labels(trace, "label", ks=[served], queries=5)
    assert more.values["answered_by"] == "scan" and "the index serves up to" in more.meaning


def save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def test_measure_datamodeling_matches_subsets_by_sample(tmp_path: Path) -> None:
    """Losses that are minus the sums of the scores of the dataset's samples, whose rows are in another order."""
    trace, rows = labelled(tmp_path / "trace.zarr")
    queries = trace.query_samples([3, 50, 99])
    scores = np.zeros((3, 160))
    for row, sample in enumerate(rows.sample):
        if row != 5:
            scores[:, sample] = (queries.gradients * trace.store.gradients(np.array([row]))).sum(axis=(1, 2))
    subsets = np.random.default_rng(0).random((30, 160)) < 0.5
    read = read_retrained(save(tmp_path / "models.npz", subsets=subsets, losses=-(subsets @ scores.T)), 160, 3)
    found = measure_datamodeling(trace, queries, read)
    assert np.allclose(found.values["each"], 1)
    assert found.values["queries"] == ["sample 3", "sample 50", "sample 99"] and found.values["models"] == 30
    assert found.values["samples_without_score"] == 1 and "1 samples have no usable gradient" in found.meaning
    assert found.rows == (("3", "30", "1.000", "1.000 to 1.000", "0.000"),)
    subsets, losses = read
    assert measure_datamodeling(trace, queries, (subsets, losses[::-1])).values["value"] < 0.6


class Denoiser(torch.nn.Module):
    """Guesses the noise in 8 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(9, 32)
        self.outer = torch.nn.Linear(32, 8)

    def forward(self, noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        hidden = torch.cat([noisy, timestep.reshape(-1, 1).float() / 1000], 1)
        return self.outer(torch.nn.functional.silu(self.inner(hidden)))  # type: ignore[no-any-return]


def loss_of(model: torch.nn.Module, clean: torch.Tensor) -> torch.Tensor:
    noise = torch.randn_like(clean)
    t = torch.randint(0, 1000, (len(clean),))
    part = t.reshape(-1, 1) / 1000
    return mse_loss(model((1 - part) * clean + part * noise, t), noise)


def trained_on(points: torch.Tensor, seed: int) -> Denoiser:
    torch.manual_seed(seed)
    model = Denoiser()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(250):
        optimizer.zero_grad()
        loss_of(model, points[torch.randint(len(points), (32,))]).backward()
        optimizer.step()
    return model


def test_measure_datamodeling_of_a_real_model_is_above_chance(tmp_path: Path) -> None:
    """A trace of a real model, and models that were really trained again on random halves of its samples."""
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(6, 8, generator=generator)
    points = centres[torch.arange(48) % 6] + 0.3 * torch.randn(48, 8, generator=generator)
    model = trained_on(points, 0)
    making = dmin_trace.recording(model, samples=48, out=tmp_path / "trace.zarr", timesteps=5, dimension=256)
    with making as recording:
        for i in recording.samples:
            for k in recording.timesteps:
                with recording.step(i, k):
                    loss_of(model, points[i : i + 1]).backward()
    trace = open_trace(tmp_path / "trace.zarr")
    subsets = np.random.default_rng(1).random((24, 48)) < 0.5
    chosen = list(range(0, 48, 2))
    losses = np.zeros((24, len(chosen)))
    for m, subset in enumerate(subsets):
        again = trained_on(points[torch.from_numpy(subset)], 1)
        for q, sample in enumerate(chosen):
            torch.manual_seed(7)
            with torch.no_grad():
                losses[m, q] = loss_of(again, points[sample].expand(500, -1))
    models = read_retrained(save(tmp_path / "models.npz", subsets=subsets, losses=losses), 48, len(chosen))
    queries = trace.query_samples(chosen)
    found = measure_datamodeling(trace, queries, models).values
    assert found["low"] > 0
    # What another cluster's queries are scored by foretells less.
    others = replace(queries, gradients=np.roll(queries.gradients, 1, axis=0))
    other = measure_datamodeling(trace, others, models).values
    assert other["value"] < found["low"]


FILES: dict[str, tuple[dict[str, Any], str]] = {
    "no losses": ({"subsets": np.ones((4, 160), bool)}, "There is no item named 'losses.npy'"),
    "other samples": (
        {"subsets": np.ones((4, 159), bool), "losses": np.ones((4, 3))},
        r"subsets, bool \(4, 159\), .*expected .* bool \(models, 160\), and losses \(models, 3\)",
    ),
    "losses turned": ({"subsets": np.ones((4, 160), bool), "losses": np.ones((3, 4))}, r"losses, float64 \(3, 4\)"),
    "subsets of numbers": ({"subsets": np.ones((4, 160)), "losses": np.ones((4, 3))}, r"subsets, float64 \(4, 160\)"),
    "subsets of one model": ({"subsets": np.ones(160, bool), "losses": np.ones((1, 3))}, r"subsets, bool \(160,\)"),
    "losses that are objects": (
        {"subsets": np.ones((4, 160), bool), "losses": np.array([[None] * 3] * 4)},
        r"losses, object \(4, 3\)",
    ),
    "too many models": (
        {"subsets": np.ones((10_001, 160), bool), "losses": np.ones((10_001, 3))},
        "is of 10001 models; expected 10000 or fewer",
    ),
}


@pytest.mark.parametrize(("arrays", "message"), FILES.values(), ids=FILES.keys())
def test_read_retrained_refuses_other_shapes(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    trace, _ = labelled(tmp_path / "trace.zarr")
    with pytest.raises(EvaluationError, match=message):
        read_retrained(save(tmp_path / "models.npz", **arrays), 160, 3)


def test_read_retrained_refuses_damaged_and_lying_files(tmp_path: Path) -> None:
    trace, _ = labelled(tmp_path / "trace.zarr")
    path = save(tmp_path / "models.npz", subsets=np.ones((4, 160), bool), losses=np.ones((4, 3)))
    whole = path.read_bytes()
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_retrained(tmp_path / "gone.npz", 160, 3)
    # Cut short, or with a byte changed: the end, a header, the numbers.
    for spoiled in (whole[:-30], whole[: len(whole) // 2], b"", whole.replace(b"NUMPY", b"NUMPX")):
        path.write_bytes(spoiled)
        with pytest.raises(EvaluationError, match="cannot be read"):
            read_retrained(path, 160, 3)
    np.save(tmp_path / "one.npy", np.ones((4, 160), bool))
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_retrained(tmp_path / "one.npy", 160, 3)

    # A header that claims 9,000 models of a file that is empty behind it.
    def claiming(shape: tuple[int, ...], descr: str) -> bytes:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"shape": shape, "fortran_order": False, "descr": descr})
        return header.getvalue()

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("subsets.npy", claiming((9000, 160), "|b1"))
        archive.writestr("losses.npy", claiming((9000, 3), "<f8"))
    with pytest.raises(EvaluationError, match="claims more numbers than it can hold"):
        read_retrained(path, 160, 3)


def without_labels(rows: Rows) -> dict[str, Any]:
    return {"columns": rows.columns | {"label": [-1] * 160}}


def of_one_label(rows: Rows) -> dict[str, Any]:
    return {"columns": rows.columns | {"label": [3] * 160}}


def twice(rows: Rows) -> dict[str, Any]:
    return {"sample": np.concatenate([rows.sample[:159], rows.sample[:1]])}


def each_its_own(rows: Rows) -> dict[str, Any]:
    return {"columns": rows.columns | {"label": list(range(160))}}


STORES: dict[str, tuple[Callable[[Rows], dict[str, Any]], Callable[[Trace], object], type[Exception], str]] = {
    "no such column": (
        dict,
        lambda trace: measure_labels(trace, "colour"),
        EvaluationError,
        "no column colour; it has caption",
    ),
    "labels all equal": (
        of_one_label,
        lambda t: measure_labels(t, "label"),
        EvaluationError,
        "All samples have the same value",
    ),
    "no labels": (
        without_labels,
        lambda trace: measure_labels(trace, "label"),
        EvaluationError,
        "No two samples have the same value",
    ),
    "k too large": (
        dict,
        lambda trace: measure_labels(trace, "label", ks=[5, 159]),
        EvaluationError,
        "k is 5, 159; expected numbers from 1 to 158",
    ),
    "k of nothing": (
        dict,
        lambda trace: measure_duplicates(trace, "caption", ks=[0]),
        EvaluationError,
        "k is 0; expected",
    ),
    "no k": (
        dict,
        lambda trace: measure_duplicates(trace, "caption", ks=[]),
        EvaluationError,
        "expected numbers from 1",
    ),
    "no queries": (dict, lambda t: measure_labels(t, "label", queries=0), EvaluationError, "0 queries were given"),
    "each its own label": (
        each_its_own,
        lambda t: measure_labels(t, "label"),
        EvaluationError,
        "No two samples",
    ),
    "no duplicates": (
        each_its_own,
        lambda t: measure_duplicates(t, "label"),
        EvaluationError,
        "No two samples have the same value",
    ),
    "all are duplicates": (
        of_one_label,
        lambda t: measure_duplicates(t, "label"),
        EvaluationError,
        "All samples have the same value",
    ),
    "a sample twice": (twice, lambda t: measure_labels(t, "label"), TraceError, "has samples twice"),
    "samples of other numbers": (
        lambda rows: {"sample": rows.sample + 1},
        lambda t: measure_labels(t, "label"),
        TraceError,
        "samples that are not in 0 to 159",
    ),
}


@pytest.mark.parametrize(("change", "measure", "kind", "message"), STORES.values(), ids=STORES.keys())
def test_measures_refuse_what_they_cannot_measure(
    tmp_path: Path,
    change: Callable[[Rows], dict[str, Any]],
    measure: Callable[[Trace], object],
    kind: type[Exception],
    message: str,
) -> None:
    changes = change(labelled(tmp_path / "first.zarr")[1]) if change is not dict else {}
    trace, _ = labelled(tmp_path / "trace.zarr", **changes)
    with pytest.raises(kind, match=message):
        measure(trace)


def test_measure_column_of_labels_of_few_samples_needs_k(tmp_path: Path) -> None:
    header = make_header(samples=5)
    rows = make_rows(header)._replace(sample=np.arange(5))
    rows.columns["label"] = [1, 2, 1, 2, 1]
    trace = Trace(write_store(tmp_path / "trace.zarr", header, rows))
    with pytest.raises(EvaluationError, match="k is 5; expected numbers from 1 to 4"):
        measure_labels(trace, "label")
    assert [of["k"] for of in measure_labels(trace, "label", ks=[2, 4]).values["rates"]] == [2, 4]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 digits, of which the last two are duplicates, a model trained on them, and its trace."""
    folder = tmp_path_factory.mktemp("made")
    images = sorted(digit_folder(folder / "digits", 24).iterdir())
    for n in (1, 2):
        images[-n].write_bytes(images[n].read_bytes())
    script = without_the_line(EXAMPLE, folder / "train.py")
    # Columns of a user's dataset: labels, and a value that duplicates share.
    text = script.read_text().replace(
        "self.file_name =",
        "self.label = [k % 10 for k in range(22)] + [2, 1]; self.original = list(range(22)) + [2, 1]\n"
        "            self.file_name =",
    )
    script.write_text(text)
    options = ["--timesteps", "2", "--dimension", "1024", "--column", "label", "--column", "original"]
    command = [script, "--train_data_dir", "digits", "--output_dir", "out", "--max_train_steps", "4"]
    run([*CLI, "run", *options, "--", *command], folder)
    return folder


def figures(rate: dict[str, Any]) -> list[str]:
    """The cells of a rate's line in the table."""
    low, high = (f"{rate[end]:.3f}" for end in ("low", "high"))
    return [str(rate["k"]), f"{rate['value']:.3f}", low, "to", high, f"{rate['chance']:.3f}", f"{rate['best']:.3f}"]


def shown_rates(shown: str) -> list[list[str]]:
    """The lines of a table that begin with a number."""
    lines = [line.split() for line in shown.splitlines()]
    return [cells for cells in lines if cells and cells[0].isdigit()]


def test_evaluate_labels_and_duplicates(made: Path) -> None:
    options = ["-k", "1", "-k", "5", "--score", "dmin", "--json", "found.json"]
    ran = run([*CLI, "evaluate", "labels", "out.trace/trace.zarr", "label", *options], made)
    for words in ("Detection rate by label, dmin scores, 24 samples as queries", "95 %"):
        assert words in ran.stdout
    assert "not whether they have influence" in " ".join(ran.stdout.split())
    found = json.loads((made / "found.json").read_text())
    assert (found["format"], found["version"]) == ("dmin_trace.measures", 1)
    (rates,) = found["measures"]
    assert rates["measure"] == "detection_rate"
    assert shown_rates(ran.stdout) == [figures(rate) for rate in rates["rates"]]
    assert rates == measure_labels(open_trace(made / "out.trace" / "trace.zarr"), "label", ks=[1, 5]).values
    ran = run([*CLI, "evaluate", "duplicates", "out.trace/trace.zarr", "original", *options], made)
    assert "Recall of duplicates by original, dmin scores, 4 samples" in ran.stdout
    (recalls,) = json.loads((made / "found.json").read_text())["measures"]
    # A duplicate has its original's gradient, but for rounding.
    assert (recalls["measure"], recalls["queries"]) == ("duplicate_recall", [1, 2, 22, 23])
    assert [of["value"] for of in recalls["rates"]] == [1, 1]
    assert shown_rates(ran.stdout) == [figures(rate) for rate in recalls["rates"]]
    assert ran.stderr == ""


def test_evaluate_lds(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Queries are captured by the script itself; the losses are minus the sums of the scores of their samples."""
    trace = open_trace(made / "out.trace" / "trace.zarr")
    chosen = [4, 11, 7]
    scores = trace.scores(trace.query_samples(chosen), "dmin")
    subsets = np.random.default_rng(0).random((12, 24)) < 0.5
    save(made / "models.npz", subsets=subsets, losses=-(subsets @ scores.T))
    images = [f"digits/{sample:04d}.png" for sample in chosen]
    lds = ["evaluate", "lds", "--score", "dmin", "out.trace/trace.zarr", "models.npz"]
    ran = run([*CLI, *lds, *images, "--json", "images.json"], made)
    assert "Linear datamodeling score" in ran.stdout and "predict" in ran.stdout
    by_images = json.loads((made / "images.json").read_text())["measures"][0]
    assert by_images["queries"] == ["0004.png", "0011.png", "0007.png"]
    value, low, high = (f"{by_images[key]:.3f}" for key in ("value", "low", "high"))
    assert shown_rates(ran.stdout) == [["3", "12", value, low, "to", high, "0.000"]]
    # What is captured anew is what is stored, but for int8.
    assert min(by_images["each"]) > 0.98
    monkeypatch.chdir(made)
    samples = [option for sample in chosen for option in ("--sample", str(sample))]
    assert main([*lds, *samples, "--json", "samples.json"]) == 0
    by_samples = json.loads((made / "samples.json").read_text())["measures"][0]
    assert by_samples["queries"] == [f"sample {k}" for k in chosen] and by_samples["each"] == pytest.approx([1, 1, 1])
    capsys.readouterr()
    # Before the script is run.
    assert main([*lds, *images[:2]]) == 1
    said = capsys.readouterr().err
    assert "losses (models, 2)" in said and len(said.strip().splitlines()) == 1


LABELS = ("labels", "out.trace/trace.zarr", "label")
LDS = ("lds", "out.trace/trace.zarr", "models.npz")

MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "no such column": (("labels", "out.trace/trace.zarr", "colour"), "has no column colour; it has label, original"),
    "no queries for lds": (LDS, "Give the queries: images, or stored samples"),
    "two kinds of queries": ((*LDS, "digits/0001.png", "--sample", "3"), "and not both"),
    "a prompt without images": ((*LDS, "--sample", "3", "--prompt", "x"), "--weights are for images"),
    "k too large": ((*LABELS, "-k", "5", "-k", "24"), "k is 5, 24; expected numbers from 1 to 23"),
    "no queries": ((*LABELS, "--queries", "0"), "0 queries were given"),
    "no such folder": ((*LABELS, "--json", "gone/m.json"), "There is no folder gone"),
    "no such file": (("lds", "out.trace/trace.zarr", "gone.npz", "--sample", "3"), "gone.npz cannot be read"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_evaluate_mistakes_give_one_line(
    made: Path,
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(made)
    assert main(["evaluate", *arguments, "--score", "dmin"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.strip().splitlines()) == 1
    assert message in said.err
