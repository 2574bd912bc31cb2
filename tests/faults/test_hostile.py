"""Stores, lists, images and captions from anybody: one clear error or an answer, bounded memory, and no way out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import answer
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from stores import change, make_header, make_rows, write, write_store
from torture_stores import make_store

from dmin_trace import query, views
from dmin_trace.audit import read_retrained, verify_store
from dmin_trace.capture.weight_files import find_files, list_saved, read
from dmin_trace.cli.app import main
from dmin_trace.errors import DminTraceError, EvaluationError, QueryError, TraceError, WeightsError
from dmin_trace.query import Hit, read_inputs
from dmin_trace.query.inputs import image_file
from dmin_trace.search import Unavailable, open_index
from dmin_trace.store import Store, chunk_file, create, open_store, resume, untrusted
from dmin_trace.store.chunks import DONE


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with its index and weights, to be copied."""
    return make_store(tmp_path_factory.mktemp("genuine"))


@pytest.fixture
def trace(genuine: Store, tmp_path: Path) -> Store:
    """A copy to do harm to."""
    shutil.copytree(genuine.path.parent, tmp_path / "copy")
    return open_store(tmp_path / "copy" / "trace.zarr")


def answers(trace: Store) -> list[str]:
    """What the ways of reading a store say that must not be led out of it; "" for one that answers."""
    said = []
    checksums = np.fromfile(trace.path.parent / "trace.index" / "rows.u32", "<u4")
    for look in (
        lambda: open_store(trace.path).grad_chunk(1),
        lambda: open_store(trace.path).stored_row(40, int(checksums[40])),
        lambda: list(open_store(trace.path).grad_parts(1, 32, np.empty(10**5, np.uint8))),
        lambda: open_store(trace.path).norm,
        lambda: open_store(trace.path).column("caption"),
    ):
        try:
            look()
            said.append("")
        except TraceError as error:
            said.append(str(error))
    return said


LINKED: dict[str, int] = {
    "grad/c/1/0/0": 3,
    "grad/c/1": 3,
    "grad/c": 3,
    "numbers/c/1/0": 2,
    "meta/caption/c/1": 1,
    "meta/caption/c": 1,
    "grad": 3,
    "meta": 1,
    "done/c": 5,
    "done": 5,
    "numbers/zarr.json": 0,
    "zarr.json": 5,
}


@pytest.mark.parametrize("name", LINKED)
def test_a_link_in_a_store_is_not_followed(trace: Store, tmp_path: Path, name: str) -> None:
    """Whatever it leads to: here what was in its place, so that only the link can be what is refused."""
    place = trace.path / name
    outside = tmp_path / "outside"
    place.rename(outside)
    place.symlink_to(outside)
    said = [line for line in answers(trace) if line]
    assert len(said) == LINKED[name]
    assert all("symbolic link" in line for line in said), said
    assert name == "zarr.json" or verify_store(trace.path).damages


def test_nothing_is_written_where_a_link_leads(tmp_path: Path) -> None:
    header = make_header()
    rows = make_rows(header)
    writer = create(tmp_path / "trace.zarr", header)
    write(writer, rows, 0)
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "trace.zarr" / "numbers" / "c" / "1").symlink_to(outside)
    with pytest.raises(TraceError, match="symbolic link"):
        write(resume(tmp_path / "trace.zarr", header), rows, 1)
    assert not list(outside.iterdir())
    assert open_store(tmp_path / "trace.zarr", unfinished=True).chunks_done == [0]


def test_a_link_to_a_store_is_the_users_word(trace: Store, tmp_path: Path) -> None:
    (tmp_path / "link.zarr").symlink_to(trace.path)
    assert np.array_equal(open_store(tmp_path / "link.zarr").norm, trace.norm)


def test_a_link_in_an_index_is_not_followed(trace: Store, tmp_path: Path) -> None:
    for name in ("graph.hnsw", "index.json", "rows.u32"):
        place = trace.path.parent / "trace.index" / name
        place.rename(tmp_path / name)
        place.symlink_to(tmp_path / name)
        why = open_index(open_store(trace.path))
        assert isinstance(why, Unavailable) and "symbolic link" in why.reason
        place.unlink()
        (tmp_path / name).rename(place)


@pytest.mark.parametrize(
    "name",
    ["trace.zarr/zarr.json", "trace.zarr/grad/zarr.json", "trace.zarr/grad/c/1/0/0", "trace.zarr/numbers/c/1/0"]
    + ["trace.zarr/meta/caption/c/1", "trace.zarr/done/c/1", "trace.index/index.json", "trace.index/graph.hnsw"]
    + ["trace.weights.safetensors"],
)
def test_a_pipe_in_place_of_a_file_blocks_nobody(trace: Store, name: str) -> None:
    """Whoever opens one waits for a writer, for ever."""
    place = trace.path.parent / name
    place.unlink()
    os.mkfifo(place)
    finished = threading.Event()

    def ask() -> None:
        try:
            opened = open_store(trace.path)
            query.answer_queries(opened, opened.gradients(np.array([0])), k=3, score="dmin")
        except DminTraceError:
            pass
        try:
            answers(trace)
            verify_store(trace.path)
        except DminTraceError:
            pass
        finished.set()

    threading.Thread(target=ask, daemon=True).start()
    if not finished.wait(20):
        os.close(os.open(place, os.O_RDWR))  # lets the thread go
        pytest.fail("somebody waits for the pipe")


METADATA = {
    "no object": b"[]",
    "deep lists": b"[" * 40 + b"]" * 40,
    "deep objects": b'{"a":' * 60 + b"1" + b"}" * 60,
    "very deep": b"[" * 10**6,
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": -Infinity}',
    "a float beyond all": b'{"a": 1e999}',
    "an integer beyond all": b'{"a": 1' + b"0" * 5000 + b"}",
    "something twice": b'{"attributes": {}, "attributes": {}}',
    "nothing": b"",
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("name", METADATA)
def test_strange_json_is_one_line(trace: Store, name: str) -> None:
    (trace.path / "grad" / "zarr.json").write_bytes(METADATA[name])
    [damage] = verify_store(trace.path).damages
    assert damage.array == "grad" and len(damage.what) < 500 and "\n" not in damage.what
    (trace.path / "zarr.json").write_bytes(METADATA[name])
    with pytest.raises(TraceError, match="damaged") as caught:
        open_store(trace.path)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_metadata_that_is_huge_is_not_parsed(trace: Store) -> None:
    with (trace.path / "zarr.json").open("ab") as file:
        file.truncate(untrusted.MAX_JSON_BYTES + 1)
    tracemalloc.start()
    with pytest.raises(TraceError, match=f"expected at most {untrusted.MAX_JSON_BYTES}"):
        open_store(trace.path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_deep_metadata_is_refused_where_it_would_be_walked(trace: Store) -> None:
    deep: Any = 1
    for _ in range(40):
        deep = {"a": deep}
    change(trace.path, lambda metadata: metadata["attributes"]["settings"].update(deep=deep))
    with pytest.raises(TraceError, match="it is too deep"):
        open_store(trace.path)


CLAIMS: dict[str, dict[str, Any]] = {
    "10^15 rows": {"samples": 10**15},
    "2^40 rows in chunks that are allowed": {"samples": 2**40, "chunk_rows": 2**18},
    "a chunk that holds everything": {"samples": 2**40, "chunk_rows": 2**40},
    "10^9 timesteps": {"timesteps": list(range(2000))},
    "a sketch of 2^60": {"dimension": 2**60},
    "chunks without number": {"samples": 2**40, "chunk_rows": 1},
}


@pytest.mark.parametrize("name", CLAIMS)
def test_memory_is_bounded_whatever_the_metadata_claims(trace: Store, name: str) -> None:
    """In a process that may have 2 GiB of addresses beyond those it starts with: a large allocation fails there."""
    change(trace.path, lambda metadata: metadata["attributes"].update(CLAIMS[name]))

    def agree(metadata: dict[str, Any]) -> None:
        attributes = json.loads((trace.path / "zarr.json").read_text())["attributes"]
        count, rows, slots = (attributes[name] for name in ("samples", "chunk_rows", "timesteps"))
        shape, grid = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
        new = [count, len(slots), attributes["dimension"]] if len(shape) == 3 else [count, *shape[1:]]
        metadata["shape"] = new
        metadata["chunk_grid"]["configuration"]["chunk_shape"] = [rows, *new[1:]] if grid != [1] else grid

    for array in ("grad", "numbers", "meta/caption", "meta/label", "meta/weight"):
        change(trace.path / array, agree)
    change(trace.path / "done", lambda metadata: metadata.update(shape=[-(-(2**40) // 2**18)]))
    code = """
import resource, sys
import numpy as np
from dmin_trace.store import open_store
from dmin_trace.views import describe_store
from dmin_trace.errors import DminTraceError
from dmin_trace import query
from dmin_trace.audit import verify_store
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**31, now + 2**31))
for read in (lambda t: t.norm, lambda t: t.valid, lambda t: t.column("caption"), lambda t: t.gradients(np.array([0])),
             lambda t: query.answer_queries(t, np.ones((1, 3, 64), np.float32), k=3, score="dmin"), describe_store,
             lambda t: verify_store(t.path)):
    try:
        read(open_store(sys.argv[1], unfinished=True))
    except DminTraceError as error:
        print(str(error)[:300])
"""
    ran = subprocess.run([sys.executable, "-c", code, str(trace.path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    # verify names the damage, and does not raise.
    assert len(ran.stdout.splitlines()) >= 6, ran.stdout


def test_a_few_rows_do_not_vouch_for_many(tmp_path: Path) -> None:
    """An unfinished store of one chunk that claims a thousand times as much; its files may be holes in a disk."""
    header = make_header(samples=999 * 2**19, rows=2**19, timesteps=1, dimension=16)
    path = create(tmp_path / "trace.zarr", header).path
    for name, size in (("numbers", 32), ("grad", 16)):
        file = chunk_file(path, name, 0)
        file.parent.mkdir(parents=True)
        with file.open("wb") as opened:
            opened.truncate(2**19 * size + 4)
    (path / "done" / "c").mkdir()
    (path / "done" / "c" / "0").write_bytes(DONE)
    tracemalloc.start()
    with pytest.raises(TraceError, match="too few to read"):
        open_store(path, unfinished=True).norm  # noqa: B018
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


# -- what is asked with ------------------------------------------------------------------------------------------------


def bomb(path: Path, side: int, kind: str = "PNG") -> Path:
    """An image of side x side pixels in a file of a few kilobytes."""
    Image.new("1", (side, side)).save(path, kind)
    return path


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_image_bombs_are_refused_before_they_are_unpacked(tmp_path: Path, side: int) -> None:
    """The first is one that Pillow warns of, the second one that it refuses."""
    file = bomb(tmp_path / "bomb.png", side)
    assert file.stat().st_size < 2**17
    for write_to in ("given0.png", "source0.png"):
        tracemalloc.start()
        with pytest.raises(QueryError, match=r"bomb.png is too large for a query: .* Give a smaller image\."):
            image_file(file, tmp_path / write_to)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()


def test_an_image_is_what_its_bytes_are_and_no_program(tmp_path: Path) -> None:
    """Pillow would hand a PostScript file to Ghostscript, whatever its name."""
    file = tmp_path / "image.png"
    file.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(victim) deletefile\nshowpage\n"
    )
    with pytest.raises(QueryError, match="cannot be read as an image: cannot identify"):
        image_file(file, tmp_path / "out.png")
    good = tmp_path / "good.png"
    Image.new("RGB", (8, 8)).save(good)
    assert image_file(good, tmp_path / "out.png") == good


def test_a_text_in_an_image_that_unpacks_to_much_is_one_line(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("comment", "x" * 2**24, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    assert (tmp_path / "a.png").stat().st_size < 2**16
    with pytest.raises(QueryError, match="cannot be read as an image: Decompressed data too large"):
        image_file(tmp_path / "a.png", tmp_path / "out.png")


def test_images_of_broken_bytes_are_one_line(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for kind in ("png", "jpg", "gif", "tif"):
        good = tmp_path / f"good.{kind}"
        Image.fromarray(generator.integers(0, 255, (16, 16, 3), np.uint8)).save(good)
        whole = good.read_bytes()
        for _ in range(150):
            harmed = bytearray(whole)
            for _ in range(int(generator.integers(1, 4))):
                harmed[generator.integers(0, len(harmed))] = generator.integers(0, 256)
            file = tmp_path / f"harmed{good.suffix}"
            file.write_bytes(bytes(harmed[: generator.integers(1, len(harmed) + 1)]))
            try:
                image_file(file, tmp_path / "out.png")
            except QueryError as error:
                assert "cannot be read as an image" in str(error) or "is too large for a query" in str(error)


@pytest.mark.parametrize(
    "line",
    ["[" * 10**5, "[" * 40 + "]" * 40, '{"file_name": "a.png", "file_name": "b.png"}', '{"file_name": NaN}', "null"]
    + ['"' + "x" * 10**6, '{"file_name": 1}', "\x00", '{"file_name": "a.png", "x": 1e999}', "\u202e"],
)
def test_lists_from_anybody_are_one_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "list.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(QueryError, match=r"Line 1 of .*; expected one such as"):
        read_inputs([tmp_path / "list.jsonl"])


@pytest.mark.parametrize("name", ["x" * 5000, "a\x00b", "\ud800", "../" * 2000 + "etc/passwd"])
def test_names_that_no_file_has_are_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "list.jsonl").write_text(json.dumps({"file_name": name}), encoding="utf-8")
    [asked] = read_inputs([tmp_path / "list.jsonl"])
    with pytest.raises(QueryError, match="There is no image at|cannot be read as an image"):
        image_file(asked.image, tmp_path / "out.png")
    with pytest.raises(QueryError):
        [image_file(asked.image, tmp_path / "out.png") for asked in read_inputs([Path(name)])]


def test_a_list_that_is_huge_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "list.jsonl").open("wb") as file:
        file.truncate(2**30)
    tracemalloc.start()
    with pytest.raises(QueryError, match="expected a list of at most"):
        read_inputs([tmp_path / "list.jsonl"])
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


# -- weights and arrays ------------------------------------------------------------------------------------------------


def safetensors(header: bytes, data: bytes = bytes(16), length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


WEIGHTS = {
    "nothing": b"",
    "a header that is longer than the file": safetensors(b"{}", length=2**40),
    "a header of 2^63": safetensors(b"{}", length=2**63),
    "no JSON": safetensors(b"{"),
    "offsets beyond the file": safetensors(b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,1600]}}'),
    "a shape that does not fit": safetensors(b'{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,16]}}'),
    "a shape that overflows": safetensors(
        b'{"w":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]}}'
    ),
    "a dtype that is none": safetensors(b'{"w":{"dtype":"O","shape":[4],"data_offsets":[0,16]}}'),
    "a pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weight_files_from_anybody_are_one_line(tmp_path: Path, name: str) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(WEIGHTS[name])
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        [files] = find_files(file)
        list(read(list_saved(files, file).values()))


def test_a_pipe_of_weights_blocks_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.safetensors")
    code = """
import pathlib, sys
from dmin_trace.capture.weight_files import find_files, list_saved
folder = pathlib.Path(sys.argv[1])
list_saved(find_files(folder)[0], folder)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert "WeightsError" in ran.stderr and "it is not a regular file" in ran.stderr


def test_arrays_of_objects_are_refused(genuine: Store, tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Runs:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.mkdir, (str(ran),)

    np.savez(tmp_path / "a.npz", subsets=np.array([[Runs()]], object), losses=np.ones((1, 1)), allow_pickle=True)
    with pytest.raises(EvaluationError, match="holds subsets, object"):
        read_retrained(tmp_path / "a.npz", genuine.header.samples, 1)
    subsets = np.ones((3, genuine.header.samples), np.bool_)
    np.savez(tmp_path / "b.npz", subsets=subsets, losses=np.array([[Runs()]] * 3, object), allow_pickle=True)
    with pytest.raises(EvaluationError, match="and losses, object"):
        read_retrained(tmp_path / "b.npz", genuine.header.samples, 1)
    assert not ran.exists()
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        for name in ("subsets", "losses"):
            archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + b"\xff\xff" + b"(" * 65535)
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_retrained(tmp_path / "c.npz", genuine.header.samples, 1)


# -- what is shown -----------------------------------------------------------------------------------------------------

TEXTS = {
    "terminal escapes": "\x1b[2J\x1b]0;title\x07\x1b]8;;http://x\x1b\\link",
    "C1 controls": "\x9b31m\x85\x90",
    "markup": "[bold red]x[/] [link=http://x]y[/link] [@click=app.bell]z",
    "right to left": "\u202egnp.exe\u2066\u2069\u200f",
    "unseen": "a\u200b\u200d\ufeff\u00ad\u2060b",
    "lone surrogates": "\ud800x\udfff",
    "a megabyte": "\x1b[31m" * 200_000,
    "lines": "a\r\nb\u2028c\u2029d\x0be",
    "a formula": "=cmd|' /C calc'!A0",
}
ACTS = set(map(chr, [*range(0x20), 0x7F, *range(0x80, 0xA0), 0x200B, 0x200F, 0x202E, 0x2066, 0x2069, 0x2028, 0xFEFF]))


def shown(renderable: Any) -> str:
    console = Console(width=100, force_terminal=True, color_system=None, legacy_windows=False)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


@pytest.mark.parametrize("name", TEXTS)
def test_captions_and_names_do_nothing_wherever_they_are_shown(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = TEXTS[name]
    hits = [
        Hit(rank=1, sample=3, score=0.5, per_timestep=(0.5,), columns={"caption": text, "file_name": text, "n": None})
    ]
    top = answer([hits], (1.0,), names=(text,), prompts=(text,))
    tables = [
        shown(views.hits_table(top, 0)),
        shown(views.hits_table(top, 0, ascii_only=True)),
        shown(views.facts_table([(text, text)], text)),
        shown(views.measure_table(text, [text], [[text]], text)),
    ]
    for table in tables:
        assert not (set(table) & ACTS - {"\n", "\x1b"}), name
        assert all(
            part.startswith(("[0m", "[1m", "[2m", "[3m", "[1;", "[2;", "[3;")) for part in table.split("\x1b")[1:]
        )
        assert len(table) < 20_000
    written = views.hits_json(top, {})
    assert written.isascii() and json.loads(written)["queries"][0]["hits"][0]["columns"]["caption"] == text
    table = views.table_csv(top.table)
    table.encode("utf-8")
    assert not set(table) & {"\x1b", "\r", "\x9b", "\x85", "\u2028", "\x07", "\ud800"}
    # A message of an error.
    if "\0" not in text and len(text) < 200 and "\ud800" not in text:
        assert main(["info", text]) == 1
        said = capsys.readouterr().err
        assert not (set(said) & ACTS - {"\n"}), said


def test_a_store_of_such_captions_is_asked_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    header = make_header(
        samples=9, columns={"caption": "string", "file_name": "string"}, writers={"x\x1b[31m": "\u202e"}
    )
    rows = make_rows(header)
    texts = list(TEXTS.values())
    stored = rows._replace(columns={"caption": texts, "file_name": texts[::-1]})
    write_store(tmp_path / "trace.zarr", header, stored)
    assert main(["query", "trace.zarr", "--sample", "100", "--score", "dmin", "-k", "9", "--csv", "hits.csv"]) == 0
    assert main(["info", "trace.zarr"]) == 0
    said = capsys.readouterr()
    assert not set(said.out + said.err) & ACTS - {"\n"}
