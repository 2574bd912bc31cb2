"""An audit finds what was planted, leaves everything as it is, and says what it does not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from stores import CAPTIONS, content, make_header, make_rows, write, write_store

import dmin_trace
from dmin_trace.audit.labels import fit_of_values
from dmin_trace.cli.app import main
from dmin_trace.errors import EvaluationError
from dmin_trace.search.alike import own_parts
from dmin_trace.store import create

KINDS = 4


def planted(path: Path, labels: list[Any] | None = None) -> dmin_trace.Trace:
    """200 samples of four classes: 30 to 33 are copies of 10, 50 to 53 have the label of another class, 70 is of none,
    71 has nothing of its own, 80 has no gradient and 81 could not be loaded. Rows are in another order."""
    header = make_header(
        samples=200, timesteps=2, dimension=512, rows=16, columns={"label": "string", "note": "string"}
    )
    rows = make_rows(header)
    random = np.random.default_rng(4)
    common, of_class = (random.standard_normal((n, 2, 512)) / 512**0.5 for n in (1, KINDS))
    own = random.standard_normal((200, 2, 512)) / 512**0.5
    grad = 2 * common + 1.2 * of_class[np.arange(200) % KINDS] + own
    grad[70] = own[70]
    grad[71] = common[0]
    grad[[31, 32, 33]] = grad[30] = grad[10]
    grad /= np.linalg.norm(grad, axis=2, keepdims=True)
    names = [f"class {n % KINDS}" for n in range(200)] if labels is None else labels
    if labels is None:
        for n in range(50, 54):
            names[n] = f"class {(n + 1) % KINDS}"
        names[30:34] = [names[10]] * 4
        names[55] = ""
    samples = rows.sample - 100
    place = np.argsort(samples)
    rows.norm[place[80], 1], rows.norm[place[81]] = 0, -1
    columns = {"label": [names[n] for n in samples], "note": [CAPTIONS[n % len(CAPTIONS)] for n in samples]}
    return dmin_trace.Trace(
        write_store(path, header, rows._replace(grad=grad[samples].astype(np.float32), sample=samples, columns=columns))
    )


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> dmin_trace.Trace:
    return planted(tmp_path_factory.mktemp("audit") / "t.zarr")


def test_an_audit_finds_what_was_planted(trace: dmin_trace.Trace) -> None:
    before = content(trace.path)
    found = dmin_trace.audit_trace(trace)
    assert content(trace.path) == before
    assert isinstance(found, dmin_trace.Audit) and (found.samples, found.column, found.notes) == (200, "label", ())
    (cluster,) = found.clusters
    assert sorted(cluster) == [10, 30, 31, 32, 33]
    copies = found.of_kind("near-copy")
    assert {one.sample for one in copies} == set(cluster[1:]) and {one.of for one in copies} == {cluster[0]}
    assert all(one.value is not None and one.value > 0.95 for one in copies)
    misfits = found.of_kind("label")
    # What is of no class, or has nothing of its own, has no near samples of its label.
    assert {50, 51, 52, 53} <= {one.sample for one in misfits} <= {50, 51, 52, 53, 70, 71}
    assert all(f"have 'class {one.sample % KINDS}'" in one.why for one in misfits if one.sample < 60)
    assert found.of_kind("outlier")[0].sample == 70
    assert found.self_influence[70] == np.nanmax(found.self_influence)
    least = found.of_kind("no influence")
    assert [(one.sample, one.value, one.why) for one in least[-2:]] == [
        (80, None, "Its gradient is zero."),
        (81, None, "It could not be loaded."),
    ]
    assert least[0].sample == 71 and least[0].z is not None and least[0].z < -3
    assert repr(found) == (
        f"Audit(200 samples: 4 near-copy, {len(found.of_kind('outlier'))} outlier, "
        f"{len(misfits)} label, {len(least)} no influence)"
    )
    parts = own_parts(trace.store)
    np.testing.assert_array_equal(found.self_influence[trace.store.sample[parts.rows]], parts.self_influence)
    for values in (found.self_influence, found.fit, found.similarity):
        assert values.shape == (200,) and np.isnan(values[[80, 81]]).all()
    assert np.isnan(found.fit[55]) and found.fit[50] < 0.1 < np.nanmedian(found.fit)
    assert all(one.columns["note"] == trace.columns["note"][one.sample] for one in found.findings)


def test_labels_fit_by_hand() -> None:
    nearest = np.array([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])
    similarity = np.array([[0.5, 0.25, 0.25], [1.0, 0.0, -1.0], [0.5, 0.5, 0.5], [0.1, 0.1, 0.2]], np.float32)
    fit = fit_of_values(["a", "a", "b", ""], nearest, similarity)
    np.testing.assert_allclose(fit.share, [2 / 3, 1.0, 0.0, np.nan], atol=1e-6)
    assert fit.others == ["b", "", "a", ""] and not fit.captions
    np.testing.assert_allclose(fit.other_share, [1 / 3, 0, 1, 0], atol=1e-6)
    assert np.isnan(fit_of_values([-1, float("nan"), "", 0], nearest, similarity).share).all()


def test_captions_are_read_word_by_word() -> None:
    captions = ["a red fox", "a red cat", "the red dog", "blue birds, a pair"]
    nearest = np.array([[1, 2], [0, 2], [0, 1], [0, 1]])
    fit = fit_of_values(captions, nearest, np.ones((4, 2), np.float32))
    assert fit.captions
    weights = {word: np.log(1 + 4 / count) for word, count in {"a": 3, "red": 3, "fox": 1}.items()}
    expected = (weights["a"] * 0.5 + weights["red"] * 1.0) / sum(weights.values())
    np.testing.assert_allclose(fit.share[0], expected)
    assert fit.share[3] < fit.share[0] and fit.others[3] == "red" and fit.other_share[3] == 1
    long = ["word " * 100_000, "x" * 1_000_000, "a b", "\x1b[31m \ud800"]
    assert fit_of_values(long, nearest, np.ones((4, 2), np.float32)).captions


@pytest.mark.parametrize("count", [1, 2, 12])
def test_what_is_not_known_is_said(tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    header = make_header(samples=count, dimension=64, columns={"depth": "number"})
    rows = make_rows(header)
    trace = dmin_trace.Trace(write_store(tmp_path / "t.zarr", header, rows._replace(sample=rows.sample - 100)))
    found = dmin_trace.audit_trace(trace)
    assert found.column is None and not found.findings and np.isnan(found.fit).all()
    assert "not known whether these fit" in found.notes[0] and "30 samples or more" in found.notes[1]
    with pytest.raises(EvaluationError, match="has no column 'label'; it has depth"):
        dmin_trace.audit_trace(trace, "label")
    assert main(["audit", str(trace.path)]) == 0
    assert "audited; 0 findings. Nothing was changed." in " ".join(capsys.readouterr().out.split())


def test_an_unfinished_trace_is_audited_as_far_as_it_is(tmp_path: Path) -> None:
    header = make_header(samples=100, dimension=64, rows=16)
    rows = make_rows(header)
    writer = create(tmp_path / "t.zarr", header)
    for chunk in range(3):
        write(writer, rows._replace(sample=rows.sample - 100), chunk)
    found = dmin_trace.audit_trace(dmin_trace.open_trace(tmp_path / "t.zarr", unfinished=True))
    assert found.samples == 48 and "48 of 100 samples were audited" in found.notes[0]
    assert np.isfinite(found.self_influence).sum() == 48


def test_the_command_shows_and_writes_the_audit(
    trace: dmin_trace.Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(trace.path)
    files = {kind: str(tmp_path / f"a.{kind}") for kind in ("json", "csv", "parquet", "html")}
    written = [part for kind, path in files.items() for part in (f"--{kind}", path)]
    command = ["audit", str(trace.path), "-k", "2", "--out", str(tmp_path / "list.jsonl"), *written]
    assert main(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "Near-copies: 4, the first 2 of them",
        "Labels or captions that do not fit: ",
        "Outliers",
        "changed.",
    ):
        assert words in shown
    assert "\x1b" not in shown and content(trace.path) == before
    found = dmin_trace.audit_trace(trace)
    read = json.loads((tmp_path / "a.json").read_text())
    assert (read["format"], read["version"], read["samples"], read["column"]) == ("dmin_trace.audit", 1, 200, "label")
    assert read["clusters"] == [found.clusters[0].tolist()]
    assert [one["sample"] for one in read["findings"]] == [one.sample for one in found.findings]
    lines = [json.loads(line) for line in (tmp_path / "list.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["sample"], line["of"]) for line in lines] == [
        (one.kind, one.sample, one.of) for one in found.findings
    ]
    assert all(line["format"] == "dmin_trace.audit_list" and line["trace"] == trace.store.header.id for line in lines)
    parquet = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    assert parquet.column_names == ["kind", "sample", "value", "z", "of", "why", "label", "note"]
    assert parquet["sample"].to_pylist() == [one.sample for one in found.findings]
    assert parquet.schema.metadata[b"dmin_trace.format"] == b"dmin_trace.audit"
    assert (tmp_path / "a.csv").read_text().splitlines()[0] == "kind,sample,value,z,of,why,label,note"
    page = (tmp_path / "a.html").read_text()
    assert page.count("data-sample=") == len(found.findings) < 48 and found.findings[0].why in page
    assert main(["audit", str(trace.path), "-k", "0"]) == 1
    assert main(["audit", str(trace.path), "--column", "no"]) == 1


@pytest.mark.parametrize("text", ["[bold red]x[/]", "\x1b[31mred", "a\u202eb", "=1+1", "\ud800", "<script>x</script>"])
def test_hostile_labels_stay_text(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    labels = [text if n % KINDS == 0 else f"class {n % KINDS}" for n in range(200)]
    labels[50] = text
    trace = planted(tmp_path / "t.zarr", labels)
    out = tmp_path / "list.jsonl"
    assert main(["audit", str(trace.path), "--out", str(out), "--csv", str(tmp_path / "a.csv"), "-k", "50"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\u202e" not in shown
    if text.isprintable() and text.isascii():
        assert text in shown
    assert out.read_text().isascii()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    # A store keeps no lone surrogates.
    assert text.encode(errors="replace").decode() in {line["columns"]["label"] for line in lines}
    if text == "=1+1":
        assert "'=1+1" in (tmp_path / "a.csv").read_text() and ",=1" not in (tmp_path / "a.csv").read_text()
