"""Rot: what is damaged is named, no answer is made with it, and what is repaired is what was there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from points import denoiser, loss_of, record
from stores import content, make_header, make_rows, write, write_store
from tiny import plain_script, run
from torture_rot import attack
from torture_stores import make_store

from dmin_trace import query
from dmin_trace.audit import verify_store
from dmin_trace.cli.app import main
from dmin_trace.errors import TraceError
from dmin_trace.search import Index, open_index, search
from dmin_trace.search import exact as score
from dmin_trace.settings import Codec, Dtype
from dmin_trace.store import Store, chunk_file, create, drop_damaged, open_store, untrusted

CLI = ("-m", "dmin_trace.cli.app")
KINDS: list[tuple[Dtype, Codec]] = [("int8", "none"), ("float32", "blosc")]


def flip(file: Path, at: int = 100, bit: int = 1) -> None:
    """Changes one bit."""
    data = bytearray(file.read_bytes())
    data[at % len(data)] ^= bit
    file.write_bytes(data)


@pytest.fixture
def trace(tmp_path: Path) -> Store:
    """A store of 160 samples in 5 chunks with an index, to do harm to."""
    return make_store(tmp_path)


@pytest.mark.parametrize(("dtype", "codec"), KINDS)
def test_every_harm_is_named_and_no_answer_is_made_with_it(tmp_path: Path, dtype: Dtype, codec: Codec) -> None:
    found = attack(tmp_path, 100, 1, dtype=dtype, codec=codec)
    assert not [what for what in found if what.startswith("WRONG")], found
    assert found["named"] > 90 and found["queries refused"] > 30 and found["queries answered as before"] > 30


READS: dict[str, Callable[[Store], object]] = {
    "numbers": lambda trace: trace.norm,
    "numbers, a chunk": lambda trace: trace.numbers_of(3),
    "numbers, some rows": lambda trace: trace.numbers([100]),
    "meta/caption": lambda trace: trace.column("caption"),
    "meta/label": lambda trace: trace.column("label"),
    "grad": lambda trace: trace.grad_chunk(3),
    "grad, in parts": lambda trace: list(parts_of_plain(trace, 3)),
    "grad, some rows": lambda trace: trace.gradients(np.array([100])),
    "grad, a row": lambda trace: trace.stored_row(127),
}


def parts_of_plain(trace: Store, chunk: int) -> list[np.ndarray]:
    return [part.copy() for part in trace.grad_parts(chunk, 5, np.empty(5 * trace.header.sample_bytes, np.uint8))]


@pytest.mark.parametrize("name", READS)
def test_each_array_is_compared_with_its_checksum(trace: Store, name: str) -> None:
    array = name.split(",")[0]
    READS[name](open_store(trace.path))
    for at in (0, -1, 40):
        flip(chunk_file(trace.path, array, 3), at)
        with pytest.raises(TraceError, match=f"chunk 3 of {array} does not have the numbers of its checksum.*verify"):
            READS[name](open_store(trace.path))
        flip(chunk_file(trace.path, array, 3), at)


def test_what_the_last_chunk_is_padded_with_is_compared_too(tmp_path: Path) -> None:
    header = make_header()
    stored = write_store(tmp_path / "trace.zarr", header, make_rows(header))
    file = chunk_file(stored.path, "grad", 2)
    flip(file, -20)
    for read in (lambda trace: trace.grad_chunk(2), lambda trace: list(parts_of_plain(trace, 2))):
        with pytest.raises(TraceError, match="chunk 2 of grad does not have the numbers of its checksum"):
            read(open_store(stored.path))


def test_a_scan_stops_before_it_answers(trace: Store) -> None:
    queries = trace.gradients(np.array([5]))
    for chunk in range(5):
        flip(chunk_file(trace.path, "grad", chunk), 7)
        for ask in (score.exact_top_k, lambda trace, queries, k: list(score.scores_by_chunk(trace, queries))):
            with pytest.raises(TraceError, match=f"chunk {chunk} of grad"):
                ask(open_store(trace.path), queries, 3)
        flip(chunk_file(trace.path, "grad", chunk), 7)
    assert score.exact_top_k(open_store(trace.path), queries, 1).rows.tolist() == [[5]]


def test_an_index_checks_the_rows_that_it_ranks_and_reads_no_others(trace: Store) -> None:
    queries = trace.gradients(np.array([5]))
    row = trace.header.sample_bytes
    ranked = search(_opened(trace), queries, 3)
    for slot in ranked.rows[0]:
        chunk, place = divmod(int(slot), 32)
        flip(chunk_file(trace.path, "grad", chunk), place * row + 9)
        with pytest.raises(TraceError, match=f"chunk {chunk} of grad .* in its row {place}"):
            search(_opened(trace), queries, 3)
        flip(chunk_file(trace.path, "grad", chunk), place * row + 9)
    # A row that is no candidate is not read, and the answer is as it was.
    opened = _opened(trace)
    depth = opened.facts.depth(3)
    assert depth is not None
    other = next(slot for slot in range(160) if slot not in opened.candidates(queries, depth)[0])
    flip(chunk_file(trace.path, "grad", other // 32), other % 32 * row)
    assert np.array_equal(search(_opened(trace), queries, 3).scores, ranked.scores)


def _opened(trace: Store) -> Index:
    index = open_index(open_store(trace.path))
    assert isinstance(index, Index), index
    return index


def test_metadata_that_rots_is_named(trace: Store) -> None:
    group = trace.path / "zarr.json"
    facts = json.loads(group.read_text())
    for name, value in (("weights", "d" * 64), ("timesteps", [1, 2, 3]), ("note", "mine"), ("complete", False)):
        changed = {**facts, "attributes": {**facts["attributes"], name: value}}
        group.write_text(json.dumps(changed))
        with pytest.raises(TraceError, match=r"zarr.json is not what was written, by its own digest"):
            open_store(trace.path)
        assert "by its own digest" in verify_store(trace.path).damages[0].what
    group.write_text(json.dumps(facts).replace('"sha256"', '"sha257"'))
    with pytest.raises(TraceError, match="is not what was written, by its own digest"):
        open_store(trace.path)
    # Other white space and another order are the same metadata.
    numbers = trace.path / "numbers" / "zarr.json"
    numbers.write_text(json.dumps(dict(reversed(json.loads(numbers.read_text()).items())), indent=1))
    group.write_text(json.dumps(facts, indent=7))
    assert verify_store(trace.path).damages == []
    flip(trace.path / "grad" / "zarr.json", 30)
    assert verify_store(trace.path).bad_arrays == ["grad"]


def test_a_mark_that_rots_is_no_mark(trace: Store) -> None:
    mark = chunk_file(trace.path, "done", 2)
    whole = mark.read_bytes()
    for harmed in (b"", whole[:4], whole + b"x", bytes([0]) + whole[1:], whole[:4] + bytes([whole[4] ^ 8])):
        mark.write_bytes(harmed)
        with pytest.raises(TraceError, match="4 of 5 chunks are done; it was complete once, and marks were"):
            open_store(trace.path)
        assert [(d.array, d.chunk) for d in verify_store(trace.path).damages] == [("done", 2)]


def test_verify_names_all_damage(
    trace: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "trace.zarr"]) == 0
    assert "all is whole; 38 files," in capsys.readouterr().out.replace("\n", " ")
    for file in (
        chunk_file(trace.path, "grad", 1),
        chunk_file(trace.path, "meta/caption", 4),
        tmp_path / "trace.index" / "graph.hnsw",
        tmp_path / "trace.weights.safetensors",
    ):
        flip(file, -3)
    chunk_file(trace.path, "meta/label", 0).unlink()
    chunk_file(trace.path, "numbers", 3).write_bytes(b"")
    assert main(["verify", "trace.zarr", "--json", "found.json"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["format"], found["version"], found["whole"], found["done"]) == ("dmin_trace.verified", 1, False, 5)
    assert [(d["file"], d["array"], d["chunk"], len(d["samples"])) for d in found["damages"]] == [
        ("trace.zarr/meta/label/c/0", "meta/label", 0, 32),
        ("trace.zarr/grad/c/1/0/0", "grad", 1, 32),
        ("trace.zarr/numbers/c/3/0", "numbers", 3, 0),
        ("trace.zarr/meta/caption/c/4", "meta/caption", 4, 32),
        ("trace.index/graph.hnsw", None, None, 0),
        ("trace.weights.safetensors", None, None, 0),
    ]
    for words in ("trace.zarr/grad/c/1/0/0 32-63 does not have", "rows 96-127 has 0 bytes", "6 files are damaged"):
        assert words in shown
    (trace.path / "zarr.json").write_text("{")
    assert main(["verify", "trace.zarr"]) == 1
    assert "Nothing else can be checked" in capsys.readouterr().out
    assert main(["verify", "nowhere.zarr"]) == 1
    assert "There is no store at nowhere.zarr" in capsys.readouterr().err
    assert main(["verify", "trace.zarr", "--json", "no/where.json"]) == 1


def test_what_is_not_damage_is_said(tmp_path: Path) -> None:
    header = make_header()
    writer = create(tmp_path / "trace.zarr", header)
    write(writer, make_rows(header), 1)
    found = verify_store(tmp_path / "trace.zarr")
    assert (found.damages, found.complete, found.done, found.chunks) == ([], False, 1, 3)
    assert found.notes[0] == "The store is unfinished: 1 of 3 chunks are done."
    assert "There are no weights at" in found.notes[1]


def test_drop_damaged_and_the_capture_again_make_the_damaged_chunks_anew_and_no_others(tmp_path: Path) -> None:
    script = plain_script(tmp_path / "train.py")
    run([script, "--count", "10"], tmp_path)
    path = tmp_path / "out.trace" / "trace.zarr"
    before = content(tmp_path / "out.trace")
    again = [*CLI, "capture", "--weights", "saved.safetensors", "--out", path, "--", script, "--count", "10"]
    shutil.copy(tmp_path / "out.trace" / "trace.weights.safetensors", tmp_path / "saved.safetensors")
    flip(chunk_file(path, "grad", 1), 50)
    flip(tmp_path / "out.trace" / "trace.weights.safetensors", -1)
    assert [d.file for d in verify_store(path).damages] == ["trace.zarr/grad/c/1/0/0", "trace.weights.safetensors"]
    assert "is complete" in run(again, tmp_path, code=1).stderr
    touched = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in path.rglob("*") if file.is_file()}
    said = run([*CLI, "verify", path, "--drop-damaged"], tmp_path, code=1).stdout
    assert "1 chunks are no longer done: 1." in " ".join(said.split())
    # Another training's weights cannot make them anew, and change nothing.
    run([script, "--count", "10", "--num_epochs", "1", "--output_dir", "other"], tmp_path)
    harmed = content(path)
    other = [*again]
    other[4] = "other.trace/trace.weights.safetensors"
    assert "belongs to another capture: its weights are" in run(other, tmp_path, code=1).stderr
    assert content(path) == harmed

    run(again, tmp_path)
    after = content(tmp_path / "out.trace")
    assert {name for name in before if after.get(name) != before[name]} == set()
    assert set(after) == set(before)
    assert not verify_store(path).damages
    new = {file for file, stamp in touched.items() if (file.stat().st_ino, file.stat().st_mtime_ns) != stamp}
    arrays = ("grad", "numbers", "done", "meta/caption", "thumbnails")
    assert new == {chunk_file(path, name, 1) for name in arrays} | {path / "zarr.json"}


def test_a_loop_of_ones_own_makes_its_damaged_chunks_anew(tmp_path: Path) -> None:
    out = record(denoiser(), tmp_path / "trace.zarr")
    before = content(out)
    flip(chunk_file(out, "grad", 1), 50)
    with pytest.raises(TraceError, match="is complete"):
        record(denoiser(), out)
    assert drop_damaged(out) == [1]
    with pytest.raises(TraceError, match="belongs to another capture"):
        record(denoiser(1), out)
    seen: list[int] = []

    def counted(model: torch.nn.Module, clean: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        return loss_of(model, clean)

    record(denoiser(), out, counted)
    assert content(out) == before
    # T of each of the last four of twelve samples, of the first of the store, and of the first of these once more; and
    # three that find the draw of the timestep.
    assert len(seen) == 3 * 4 + 3 * 2 + 3


def test_an_answer_of_the_index_is_the_scans_after_rot_in_the_index(trace: Store) -> None:
    queries = trace.gradients(np.array([5]))
    for name in ("graph.hnsw", "common.f32", "copies.i64", "rows.u32", "index.json"):
        file = trace.path.parent / "trace.index" / name
        if file.stat().st_size == 0:
            continue
        flip(file, 60)
        answer = query.answer_queries(open_store(trace.path), queries, k=3, score="dmin")
        assert answer.answered_by.recall is None and answer.hits[0][0].sample == 5, name
        flip(file, 60)
    assert query.answer_queries(open_store(trace.path), queries, k=3, score="dmin").answered_by.recall is not None


def test_a_digest_is_of_what_is_said_and_not_of_how(tmp_path: Path) -> None:
    assert untrusted.digest({"a": [1, 2.5], "b": "é"}) == untrusted.digest(json.loads('{"b":"\\u00e9","a":[1,2.50]}'))
    assert untrusted.digest({"a": 1}) != untrusted.digest({"a": 2}) != untrusted.digest({"a": "2"})
