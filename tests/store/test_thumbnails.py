"""Thumbnails in a store: what was written is read, by Zarr too; what is no plain small picture is not decoded."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from PIL import Image
from stores import change, content, make_header, make_rows, with_checksum

from dmin_trace.audit import verify_store
from dmin_trace.cli.app import main
from dmin_trace.errors import SettingsError, TraceError
from dmin_trace.query import open_trace
from dmin_trace.settings import Settings
from dmin_trace.store import (
    THUMBNAILS,
    Store,
    ThumbnailFacts,
    chunk_file,
    create,
    max_thumbnail_bytes,
    open_store,
    pack_store,
    quantise,
)
from dmin_trace.store.thumbnails import decode_webp, webp_size
from dmin_trace.views import describe_store

FACTS = ThumbnailFacts(side=32, entry="pixel_values", low=-1.0, high=1.0)


def pixels(sample: int, width: int = 20, height: int = 12) -> np.ndarray:
    """A picture that no other sample has."""
    return np.random.default_rng(sample).integers(0, 256, (height, width, 3), np.uint8)


def webp(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "WEBP", **{"lossless": True, **options})
    return file.getvalue()


def with_pictures(path: Path, **changes: Any) -> Store:
    """A finished store of ten rows, whose samples are not in the order of the rows; the third has no picture."""
    header = make_header(thumbnails=FACTS, settings=dataclasses.asdict(Settings(timesteps=3, dimension=32)), **changes)
    rows = make_rows(header)
    writer = create(path, header)
    for chunk in writer.pending():
        here = np.array(header.rows(chunk))
        columns = {name: [values[k] for k in here] for name, values in rows.columns.items()}
        pictures = [b"" if k == 2 else webp(pixels(int(rows.sample[k]))) for k in here]
        stored = quantise(rows.grad[here], header.dtype)
        writer.write(chunk, *stored, rows.norm[here], rows.loss[here], rows.sample[here], columns, pictures)
    writer.finish()
    return open_store(path)


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_pictures(tmp_path_factory.mktemp("genuine") / "trace.zarr").path


@pytest.fixture
def store(genuine: Path, tmp_path: Path) -> Store:
    """A copy to do harm to."""
    return open_store(Path(shutil.copytree(genuine, tmp_path / "trace.zarr")))


def put(store: Store, place: int, data: bytes) -> Store:
    """Puts other bytes in the place of a thumbnail of chunk 1, with a right checksum, as a forger would."""
    file = chunk_file(store.path, THUMBNAILS, 1)
    held = store.thumbnails.stored(range(4, 8))
    held[place] = data
    file.write_bytes(
        with_checksum(b"".join([struct.pack("<I", 4), *(struct.pack("<I", len(one)) + one for one in held)]))
    )
    return open_store(store.path)


# Plain Zarr says of bytes of any length that their format is young.
@pytest.mark.filterwarnings("ignore:.*does not have a Zarr V3 specification.*")
def test_what_was_written_is_read_and_zarr_reads_the_same(genuine: Path) -> None:
    store = open_store(genuine)
    for row in range(10):
        image = store.thumbnails.image(row)
        assert (image is None) == (row == 2)
        if image is not None:
            assert image.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(image), pixels(int(store.sample[row])))
            assert store.thumbnails.webp(row) == webp(pixels(int(store.sample[row])))
    group: Any = zarr.open_group(genuine, mode="r")
    assert list(group[THUMBNAILS][:]) == store.thumbnails.stored(range(10))
    assert group[THUMBNAILS].chunks == (4,)
    # One file a chunk, beside the metadata.
    files = [file for file in (genuine / THUMBNAILS).rglob("*") if file.is_file()]
    assert sorted(file.name for file in files) == ["0", "1", "2", "zarr.json"]
    size = sum(file.stat().st_size for file in files if file.name != "zarr.json")
    told = dict(describe_store(store))["thumbnails"]
    assert told.startswith("of at most 32 pixels, of pixel_values in the batch, from -1 to 1")
    assert f"{size:,} bytes, {size / 10:,.0f} a sample" in told


def test_a_trace_gives_them_by_sample(genuine: Path) -> None:
    store = open_store(genuine)
    # The samples of this store are 100 to 109; a trace has those of a data set, from 0.
    samples = store.sample - 100
    path = genuine.parent / "by-sample.zarr"
    shutil.copytree(genuine, path)
    for chunk in range(3):
        file = chunk_file(path, "numbers", chunk)
        table = np.frombuffer(file.read_bytes()[:-4], np.float64).reshape(4, -1).copy()
        table[:, 0] -= 100
        file.write_bytes(with_checksum(table.tobytes()))
    with open_trace(path) as trace:
        assert len(trace.thumbnails) == 10
        for row, sample in enumerate(samples.tolist()):
            image = trace.thumbnails[sample]
            assert (image is None) == (trace.thumbnails.webp(sample) is None) == (row == 2)
            if image is not None:
                np.testing.assert_array_equal(np.asarray(image), pixels(sample + 100))
        with pytest.raises(IndexError):
            trace.thumbnails[10]
        queries = trace.query_samples([int(samples[5])])
        for hit in trace.top_k(queries, 10).hits[0]:
            assert (hit.thumbnail is None) == (hit.sample == samples[2])
            if hit.thumbnail is not None:
                np.testing.assert_array_equal(np.asarray(hit.thumbnail), pixels(hit.sample + 100))


def test_a_store_without_thumbnails_says_so(tmp_path: Path) -> None:
    header = make_header()
    path = create(tmp_path / "trace.zarr", header).path
    store = open_store(path, unfinished=True)
    assert store.thumbnails.image(0) is None and store.thumbnails.webp(0) is None
    assert dict(describe_store(store))["thumbnails"] == "none"
    assert not (path / THUMBNAILS).exists()
    with pytest.raises(TraceError, match="has no thumbnails"):
        store.thumbnails.stored([0])


def test_a_writer_refuses_another_number_of_thumbnails(tmp_path: Path) -> None:
    for facts, given, expected in ((FACTS, 3, 4), (FACTS, 0, 4), (None, 4, 0)):
        header = make_header(thumbnails=facts)
        rows = make_rows(header)
        writer = create(tmp_path / f"{given}-{expected}.zarr", header)
        columns = {name: values[:4] for name, values in rows.columns.items()}
        stored = (*quantise(rows.grad[:4], "int8"), rows.norm[:4], rows.loss[:4], rows.sample[:4], columns)
        with pytest.raises(TraceError, match=rf"given thumbnails of shape \({given},\); expected \({expected},\)"):
            writer.write(0, *stored, [b""] * given)
        assert writer.pending() == [0, 1, 2]


ANIMATION = io.BytesIO()
Image.fromarray(pixels(1)).save(ANIMATION, "WEBP", save_all=True, append_images=[Image.fromarray(pixels(2))])
SEEN_THROUGH = webp(np.dstack([pixels(1), pixels(2)[:, :, 0]]), lossless=False)
"""With an alpha channel, which makes it an extended file."""
LARGE = webp(np.zeros((33, 8, 3), np.uint8))
HOSTILE = {
    "an animation": ANIMATION.getvalue(),
    "an extended file": SEEN_THROUGH,
    "more pixels than the store allows": LARGE,
    "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(60),
    "a file that is cut": webp(pixels(1))[:-9],
    "bytes behind the file": webp(pixels(1)) + b"evil",
    "bytes in a chunk behind the first": (webp(pixels(1)) + b"EXIF\x04\0\0\0evil"),
    "nothing but a header": webp(pixels(1))[:25],
    "rubbish in the picture": webp(pixels(1))[:30] + bytes(len(webp(pixels(1))) - 30),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n(victim) deletefile\nshowpage\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_plain_small_picture_is_not_shown(store: Store, name: str, caplog: pytest.LogCaptureFixture) -> None:
    store = put(store, 1, HOSTILE[name])
    with caplog.at_level(logging.WARNING, "dmin_trace"):
        assert store.thumbnails.image(5) is None
    [record] = caplog.records
    assert record.getMessage().startswith(f"The picture of row 5 in {store.path} is not shown: it ")
    assert store.thumbnails.webp(5) is None
    # The others are, and so is the answer.
    assert store.thumbnails.image(4) is not None and store.thumbnails.image(6) is not None


def claiming(width: int, height: int, kind: str) -> bytes:
    """A small file that claims a large picture."""
    data = bytearray(webp(np.zeros((8, 8, 3), np.uint8), lossless=kind == "lossless"))
    if kind == "lossless":
        data[21:25] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    else:
        data[26:30] = struct.pack("<HH", width, height)
    return bytes(data)


@pytest.mark.parametrize("kind", ["lossless", "lossy"])
def test_a_file_that_claims_many_pixels_takes_no_memory(store: Store, kind: str) -> None:
    bomb = claiming(16383, 16383, kind)
    assert webp_size(bomb) == (16383, 16383)
    assert webp_size(claiming(31, 7, kind)) == (31, 7)
    store = put(store, 1, bomb)
    tracemalloc.start()
    assert store.thumbnails.image(5) is None
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    with pytest.raises(ValueError, match="16383 x 16383 pixels; expected at most 32 either way"):
        decode_webp(bomb, 32)


def test_lengths_that_lie_allocate_nothing(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    file = chunk_file(store.path, THUMBNAILS, 1)
    whole, huge = file.read_bytes()[:-4], b"\xff\xff\xff\x7f"
    too_long = b"\x04\0\0\0" + struct.pack("<I", max_thumbnail_bytes(32) + 1) + bytes(max_thumbnail_bytes(32) + 13)
    for data in (huge + whole[4:], whole[:4] + huge + whole[8:], b"\x04\0\0\0" * 2, too_long):
        file.write_bytes(with_checksum(data))
        tracemalloc.start()
        with pytest.raises(TraceError, match="chunk 1 of thumbnails does not hold 4 thumbnails of 1024 bytes at most"):
            open_store(store.path).thumbnails.stored([5])
        assert open_store(store.path).thumbnails.image(5) is None
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()
    with file.open("wb") as opened:
        opened.truncate(2**34)
    with pytest.raises(TraceError, match=f"has {2**34} bytes, expected at most"):
        open_store(store.path).thumbnails.stored([5])


def test_a_damaged_chunk_is_named_and_costs_no_answer(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    file = chunk_file(store.path, THUMBNAILS, 1)
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)
    [damage] = verify_store(store.path).damages
    assert (damage.file, damage.array, damage.chunk) == ("trace.zarr/thumbnails/c/1", THUMBNAILS, 1)
    assert len(damage.samples) == 4
    opened = open_store(store.path)
    with caplog.at_level(logging.WARNING, "dmin_trace"):
        shown = [opened.thumbnails.image(row) is not None for row in range(10)]
    assert shown == [row not in (2, 4, 5, 6, 7) for row in range(10)]
    assert len(caplog.records) == 1 and "Samples are shown without their pictures" in caplog.text
    # What packs it is told, rather than that pictures are lost without a word.
    with pytest.raises(TraceError, match="chunk 1 of thumbnails does not have the numbers of its checksum"):
        pack_store(opened, store.path.with_name("packed.zarr"), dtype="float16")
    assert main(["verify", str(store.path), "--drop-damaged"]) == 1
    assert open_store(store.path, unfinished=True).chunks_done == [0, 2]


def test_a_link_or_a_hole_in_their_place_is_no_picture(store: Store, tmp_path: Path) -> None:
    file = chunk_file(store.path, THUMBNAILS, 1)
    file.rename(tmp_path / "outside")
    for make in (lambda: None, lambda: file.symlink_to(tmp_path / "outside"), lambda: file.mkdir()):
        make()
        assert open_store(store.path).thumbnails.image(5) is None
        assert [damage.array for damage in verify_store(store.path).damages] == [THUMBNAILS]
        if file.is_symlink():
            file.unlink()


@pytest.mark.parametrize(
    "facts", [{"side": 8}, {"side": 513}, {"side": True}, {"entry": 1}, {"entry": "x" * 201}, {"low": "0"}, None, 1]
)
def test_other_facts_are_refused(store: Store, facts: Any) -> None:
    kept = dataclasses.asdict(FACTS)
    wrong = kept | facts if isinstance(facts, dict) else facts
    if facts is None:
        wrong = {name: kept[name] for name in ("side", "entry")}
    change(store.path, lambda metadata: metadata["attributes"].update(thumbnails=wrong))
    with pytest.raises(TraceError, match="its attribute thumbnails.* is .*; expected "):
        open_store(store.path)


def test_pack_keeps_them_or_leaves_them_out(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    rows = np.arange(10)
    kept = pack_store(store, store.path.with_name("kept.zarr"), codec="blosc")
    assert kept.thumbnails.stored(rows) == store.thumbnails.stored(rows)
    assert (kept.header.thumbnails, kept.header.settings["thumbnails"]) == (FACTS, 128)
    out = store.path.with_name("without.zarr")
    assert main(["pack", str(store.path), "--out", str(out), "--no-thumbnails"]) == 0
    without = open_store(out)
    assert without.header.thumbnails is None and without.header.settings["thumbnails"] == 0
    assert not (out / THUMBNAILS).exists() and not verify_store(out).damages
    assert np.array_equal(without.gradients(rows), store.gradients(rows))
    assert not [name for name in content(out) if name.startswith(THUMBNAILS)]
    assert [without.column(name) for name in without.header.columns] == [
        store.column(name) for name in store.header.columns
    ]
    with pytest.raises(SettingsError, match="or --no-thumbnails for a store that has some"):
        pack_store(without, store.path.with_name("again.zarr"), thumbnails=False)


def test_the_state_is_of_the_pictures_too(store: Store) -> None:
    before = store.compute_state()
    assert json.loads((store.path / "zarr.json").read_text())["attributes"]["state"] == before
    changed = put(store, 1, webp(pixels(1)))
    assert changed.compute_state() != before
    [damage] = verify_store(store.path).damages
    assert "does not hold the state of these chunks" in damage.what
