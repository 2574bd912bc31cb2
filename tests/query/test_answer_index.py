"""Answers by the index: those of the scan, unless the index does not serve them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from clusters import indexed_store, like, opened_index, signed
from stores import make_header, make_rows, write_store
from test_way import with_settings
from tiny import digit_folder, run

import dmin_trace
from dmin_trace.cli.app import main
from dmin_trace.query import answer as query
from dmin_trace.search.build import build_index
from dmin_trace.search.exact import Ranking, exact_top_k
from dmin_trace.search.index import Index, search
from dmin_trace.search.index_files import Facts, index_beside, read_facts
from dmin_trace.store import Store, open_store
from dmin_trace.views.describe import describe_index

CLI = ("-m", "dmin_trace.cli.app")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of 240 digits, its trace, and twenty other digits."""
    folder = tmp_path_factory.mktemp("digits")
    digit_folder(folder / "digits", 240)
    digit_folder(folder / "others", 20, first=400)
    script = with_settings(folder / "train.py", "timesteps=3, dimension=1024")
    command = [script, "--train_data_dir", "digits", "--max_train_steps", "90", "--train_batch_size", "16"]
    run([*command, "--output_dir", "out", "--learning_rate", "2e-3"], folder)
    return folder


def test_real_gradients_are_found_by_images_that_were_not_trained_on(digits: Path) -> None:
    trace = open_store(digits / "out.trace" / "trace.zarr")
    others = sorted((digits / "others").iterdir())
    built = run([*CLI, "index", "out.trace/trace.zarr"], digits)
    assert "recall@10" in built.stdout and "up to 10 hits" in built.stdout
    assert opened_index(trace).facts.depths[0].recall >= 0.99
    said = {}
    for name, options in {"index": (), "scan": ("--exact",)}.items():
        ran = run(
            [*CLI, "query", "--score", "dmin", "out.trace/trace.zarr", *others, "--json", f"{name}.json", *options],
            digits,
        )
        said[name] = ran.stdout.strip().splitlines()[-1]
    assert said["index"].startswith("answered by the index (recall@10 ")
    assert said["scan"] == "scanned all 240 samples"
    answers = {name: json.loads((digits / f"{name}.json").read_text()) for name in said}
    assert [answers[name]["trace"]["answered_by"] for name in answers] == ["index", "scan"]
    assert answers["scan"]["trace"]["index_recall"] is None
    hits = {name: [{h["sample"]: h["score"] for h in q["hits"]} for q in answers[name]["queries"]] for name in answers}
    both = [(ours, true) for ours, true in zip(hits["index"], hits["scan"], strict=True)]
    assert np.mean([len(ours.keys() & true.keys()) / 10 for ours, true in both]) >= 0.98
    assert all(ours[sample] == true[sample] for ours, true in both for sample in ours.keys() & true.keys())
    assert "recall@10" in run([*CLI, "info", "out.trace/trace.zarr"], digits).stdout


def test_attribute_uses_the_index_unless_it_is_exact(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(digits / "state"))
    path = digits / "out.trace" / "trace.zarr"
    build_index(open_store(path))
    images = sorted((digits / "others").iterdir())[:2]
    searched: list[int] = []

    def watched(found: Index, queries: np.ndarray, k: int, *, kind: str, background: bool) -> Ranking:
        searched.append(k)
        return search(found, queries, k, kind=kind, background=background)

    monkeypatch.setattr(query.search, "search", watched)
    hits = dmin_trace.attribute(path, images, k=3, score="dmin")
    assert searched == [3]
    scanned = dmin_trace.attribute(path, images, k=3, score="dmin", exact=True)
    assert searched == [3]
    assert [hit.sample for hit in hits[0]] == [hit.sample for hit in scanned[0]]


def test_more_hits_than_were_calibrated_are_scanned_for(indexed: tuple[Store, np.ndarray]) -> None:
    trace, queries = indexed
    served = read_facts(trace)
    assert isinstance(served, Facts) and [depth.k for depth in served.depths if depth.score == "dmin"] == [10]
    assert "index (recall@10" in query.answer_queries(trace, queries, k=10, score="dmin").answered_by.description
    deep = query.answer_queries(trace, queries, k=11, score="dmin")
    assert deep.answered_by == query.AnsweredBy(None, "scanned all 160 samples: the index serves up to 10 hits")
    assert np.array_equal(deep.scores, exact_top_k(trace, queries, 11).scores)
    edited = json.loads((index_beside(trace.path) / "index.json").read_text())
    (index_beside(trace.path) / "index.json").write_text(signed(edited | {"m": 7}))
    damaged = query.answer_queries(trace, queries, k=10, score="dmin").answered_by
    assert damaged.recall is None and "scanned all 160 samples: the index is not used" in damaged.description


def test_no_index_is_not_mentioned(tmp_path: Path) -> None:
    header = make_header(samples=10)
    trace = write_store(tmp_path / "trace.zarr", header, make_rows(header))
    answer = query.answer_queries(trace, trace.gradients(np.array([1])), k=2, score="dmin")
    assert answer.answered_by.description == "scanned all 10 samples"


@pytest.fixture
def indexed(tmp_path: Path) -> tuple[Store, np.ndarray]:
    """A store of 160 samples with an index, and queries."""
    trace, rows = indexed_store(tmp_path, 0.8)
    return trace, like(rows, 10)


def test_the_index_answers_deflated_queries_with_the_scores_of_the_scan(indexed: tuple[Store, np.ndarray]) -> None:
    trace, queries = indexed
    facts = read_facts(trace)
    assert isinstance(facts, Facts)
    depth = facts.depth(10, "deflated")
    assert (
        depth is not None
        and depth.recall >= 0.8
        and "deflated queries for up to 10" in str(describe_index(facts, trace))
    )
    ours = query.answer_queries(trace, queries, k=10, score="deflated")
    true = query.answer_queries(trace, queries, k=10, score="deflated", exact=True)
    assert ours.answered_by.recall == (10, depth.recall) and true.answered_by.recall is None
    found = [[{hit.sample: hit.score for hit in hits} for hits in top.hits] for top in (ours, true)]
    both = list(zip(*found, strict=True))
    assert np.mean([len(some.keys() & all_.keys()) / 10 for some, all_ in both]) >= 0.7
    assert all(some[row] == all_[row] for some, all_ in both for row in some.keys() & all_.keys())
    build_index(trace, recall=0.8, directions=0)
    scanned = query.answer_queries(trace, queries, k=10, score="deflated").answered_by.description
    assert scanned == "scanned all 160 samples: the index does not serve deflated scores"


def test_the_command_line_shows_which_score(
    indexed: tuple[Store, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, sample = str(indexed[0].path), str(int(indexed[0].sample[3]))
    assert main(["index", path, "--directions", "4", "--recall", "0.8"]) == 0
    assert "by 4 principal directions of each timestep" in " ".join(capsys.readouterr().out.split())
    words = "took out 4 principal directions"
    written = [tmp_path / "hits.json", tmp_path / "hits.csv"]
    options = ["--json", str(written[0]), "--csv", str(written[1])]
    assert main(["query", path, "--sample", sample, "--score", "deflated", *options]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "deflated score: inner product" in shown and words in shown and "perfect match" not in shown
    read = json.loads(written[0].read_text())
    assert read["scored_by"] == "deflated" and words[9:] in read["trace"]["taken_out"]
    assert ",deflated," in written[1].read_text().splitlines()[1]
    assert main(["query", path, "--sample", sample, "--score", "best"]) == 2
    assert "'best' is not one of 'deflated', 'dmin'" in capsys.readouterr().err


def test_words_from_an_index_do_nothing_to_a_terminal(tmp_path: Path) -> None:
    header = make_header(samples=10)
    trace = write_store(tmp_path / "trace.zarr", header, make_rows(header))
    build_index(trace)
    file = tmp_path / "trace.index" / "index.json"
    file.write_text(signed(json.loads(file.read_text()) | {"short": "\x1b[2J[red]x"}))
    ran = run([*CLI, "query", "--score", "dmin", "trace.zarr", "--sample", "100", "-k", "1"], tmp_path)
    assert "\x1b" not in ran.stdout and "\\x1b[2J[red]x" in ran.stdout
    assert "\x1b" not in run([*CLI, "info", "trace.zarr"], tmp_path).stdout


@pytest.mark.parametrize("arguments", [("--fold", "many"), ("--fold", "48"), ("--recall", "2")])
def test_a_mistake_on_the_command_line_gives_one_line(
    indexed: tuple[Store, np.ndarray], arguments: tuple[str, ...]
) -> None:
    ran = run([*CLI, "index", "trace.zarr", *arguments], indexed[0].path.parent, code=1)
    assert len(ran.stderr.strip().splitlines()) == 1 and arguments[1] in ran.stderr
