"""Inputs from anybody, by the million: every outcome is an answer or an error that dmin_trace raises on purpose.

    python tools/torture.py fuzz --inputs 1000000

Each target is a reader and inputs that it takes gladly. They are changed, byte by byte or, for JSON, value by value, by
a seeded generator here, or by atheris, which is guided by what code an input reaches (`pip install atheris`). A target
runs in a process of its own with 2 GiB of addresses to spare: a crash, an endless loop or a large allocation is a
finding too.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Annotated, Any

import google_crc32c
import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from torture_stores import CAPTIONS, make_store

from dmin_trace import audit as examine
from dmin_trace import query
from dmin_trace import search as index
from dmin_trace import store as untrusted
from dmin_trace import views as report
from dmin_trace.capture import weight_files as weights
from dmin_trace.errors import DminTraceError
from dmin_trace.query import AnsweredBy, Hit, Record, TopK
from dmin_trace.query.file_marks import mark_of
from dmin_trace.query.gradient_cache import GradientCache
from dmin_trace.query.inputs import image_file
from dmin_trace.search import Background, Facts, hnsw
from dmin_trace.search.index import open_directions
from dmin_trace.settings import make_settings
from dmin_trace.store import Header, Store, chunk_file, open_store, weights_beside
from dmin_trace.store.metadata import DIGEST, digest_of
from dmin_trace.store.thumbnails import decode_webp
from dmin_trace.views import describe_store, summarize_index
from dmin_trace.views.page import answer_page

console = Console(width=120)
SPARE = 2**31
"""Bytes of addresses that a target may take beyond those it starts with."""
PATIENCE = 20
"""Seconds for an input."""
PAGE_TAGS = {
    *("html", "head", "meta", "title", "link", "style", "script", "body", "header", "main", "nav", "section", "footer"),
    *("div", "p", "h1", "h2", "h3", "ul", "li", "dl", "dt", "dd", "a", "img", "span", "i", "kbd", "dialog", "button"),
    *("input", "label", "select", "option", "table", "thead", "tbody", "tr", "th", "td", "svg", "path", "line", "rect"),
}
"""The elements that a page may have."""
GUIDED = """
import sys, atheris
with atheris.instrument_imports(include=["dmin_trace"]):
    import torture_fuzz
torture_fuzz.main()
"""
"""Atheris sees which code an input reaches where it was there first."""
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**53, 2**63, 2**64, 10**15, -(2**63), 10**400, 0.5, 1e308, -0.0),
    *(
        "",
        "x",
        "../../etc/passwd",
        "\x1b[31m",
        "\ud800",
        "\u202e",
        "a" * 10**5,
        "NaN",
        "0" * 32,
        "f" * 64,
        "int8",
        "|O",
    ),
    *([], {}, [[]], [0], [2**62] * 3, {"": 0}, {"x": {"y": {"z": []}}}, [[[[[[[[]]]]]]]]),
)


@dataclass(frozen=True)
class Target:
    """A reader: the part of all inputs that it is given, what to begin with, and the reader itself, which raises
    DminTraceError for what it refuses."""

    share: int
    seeds: list[bytes]
    read: Callable[[bytes], object]


class RefusedError(Exception):
    """What an inner reader raises on purpose, that never leaves the package."""


def fuzz_command(
    inputs: Annotated[int, typer.Option(help="How many, shared among the targets.")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Of what is changed.")] = 0,
    engine: Annotated[str, typer.Option(help="random, or atheris, which must be installed.")] = "random",
    only: Annotated[str | None, typer.Option(help="One target.")] = None,
) -> None:
    """Reads inputs that are made up, most of them nearly right; reports what was neither an answer nor an error."""
    if engine not in ("random", "atheris") or engine == "atheris" and importlib.util.find_spec("atheris") is None:
        raise typer.BadParameter("expected random, or atheris where it is installed: pip install atheris")
    table = Table(title=f"fuzz, {engine}", title_justify="left")
    for heading in ("target", "inputs", "answered", "refused", "findings"):
        table.add_column(heading, justify="left" if heading == "target" else "right")
    total, findings = np.zeros(3, np.int64), 0
    with tempfile.TemporaryDirectory(prefix="dmin-trace-fuzz-", dir=_memory()) as name:
        folder = Path(name)
        made = targets(folder / "names")
        shares = sum(target.share for target in made.values())
        for what, target in made.items():
            if only not in (None, what):
                continue
            count = inputs if only else max(1, inputs * target.share // shares)
            found, last = _in_a_process(what, count, seed, engine, folder / what)
            total += found
            findings += bool(last)
            table.add_row(what, *(f"{n:,}" for n in found), "1" if last else "0")
            if last:
                console.print(f"[bold red]{what}[/]", last, markup=True, highlight=False)
    table.add_row("all", *(f"{n:,}" for n in total), str(findings))
    console.print(table)
    raise typer.Exit(1 if findings else 0)


def targets(folder: Path) -> dict[str, Target]:
    """All of them, on a store that is made in a folder."""
    trace = make_store(folder / "plain")
    packed = make_store(folder / "packed", dimension=512, dtype="float32", codec="blosc", index=False)
    group = untrusted.parse((trace.path / "zarr.json").read_bytes())
    array = untrusted.parse((trace.path / "grad" / "zarr.json").read_bytes())
    kept = untrusted.parse((folder / "plain" / "trace.index" / "index.json").read_bytes())
    graph = (folder / "plain" / "trace.index" / "graph.hnsw").read_bytes()
    safetensors = weights_beside(trace.path).read_bytes()
    lines = [json.dumps({"file_name": f"{n}.png", "text": text}) for n, text in enumerate(CAPTIONS)]
    images = list(_images())
    small = [one for one in trace.thumbnails.stored([0, 40]) if one] + [images[2]]
    facts_of = index.read_facts(trace)
    if isinstance(facts_of, index.Unavailable):
        raise ValueError(facts_of.reason)
    harmed = folder / "harmed"

    def read_store(data: bytes) -> None:
        chosen = random.Random(data)
        of_group = _edited(group, data) if chosen.random() < 0.8 else group
        of_array = _edited(array, data) if chosen.random() < 0.3 else array
        _put(harmed / "trace.zarr" / "zarr.json", json.dumps(_with_digest(of_group)))
        _put(harmed / "trace.zarr" / "grad" / "zarr.json", json.dumps(of_array))
        _read_all(open_store(harmed / "trace.zarr", unfinished=True))

    def read_index(data: bytes) -> None:
        edited = _edited(kept, data)
        if isinstance(edited, dict):
            edited = _signed(edited)
        _put(harmed / "trace.index" / "index.json", json.dumps(edited))
        opened = open_store(harmed / "trace.zarr")
        for what in (index.open_index(opened), open_directions(opened)):
            if isinstance(what, index.Unavailable):
                raise RefusedError

    def read_facts(data: bytes) -> None:
        edited = _edited(kept, data)
        if isinstance(edited, dict):
            edited = _signed(edited)
        try:
            summarize_index(Facts.from_json(json.dumps(edited)))
        except hnsw.GraphError:
            raise RefusedError from None

    def read_graph(data: bytes) -> None:
        _put(harmed / "graph.hnsw", _spliced(graph, data))
        try:
            shape = (facts_of.length, facts_of.vectors, facts_of.samples)
            loaded, _ = hnsw.load_graph(harmed / "graph.hnsw", *shape, facts_of.m)
            loaded.set_ef(40)
            loaded.knn_query(np.ones((1, facts_of.length), np.float32), k=20)
        except (hnsw.GraphError, RuntimeError):
            raise RefusedError from None

    def read_chunk(data: bytes, name: str, of: Store, read: Callable[[Store], object]) -> None:
        place = chunk_file(harmed / of.path.parent.name / "trace.zarr", name, 1)
        genuine = chunk_file(of.path, name, 1).read_bytes()[:-4]
        frame = _spliced(genuine, data)
        _put(place, frame + google_crc32c.value(frame).to_bytes(4, "little"))
        read(Store(harmed / of.path.parent.name / "trace.zarr", of.header, of.done, None))

    def read_list(data: bytes) -> None:
        _put(harmed / "list.jsonl", data)
        for asked in query.read_inputs([harmed / "list.jsonl"]):
            try:
                image_file(asked.image, harmed / "made.png")
            except DminTraceError:
                continue

    def read_weights(data: bytes) -> None:
        _put(harmed / "w.safetensors", data)
        [files] = weights.find_files(harmed / "w.safetensors")
        for tensor in weights.read(weights.list_saved(files, harmed / "w.safetensors").values()):
            assert tensor.numel() * tensor.element_size() <= len(data)

    def read_arrays(data: bytes) -> None:
        _put(harmed / "retrained.npz", data)
        examine.read_retrained(harmed / "retrained.npz", trace.header.samples, 2)

    def read_entry(data: bytes) -> None:
        _put(cache.folder / f"{key}.npz", data)
        logging.disable()  # each refusal is a line
        try:
            found = cache.find(key, (2, 8))
        finally:
            logging.disable(logging.NOTSET)
        if found is None:
            raise RefusedError
        assert found.shape == (2, 8) and np.isfinite(found).all()

    def read_entry_facts(data: bytes) -> None:
        read_entry(_entry(json.dumps(_edited(entry_facts, data)).encode()))

    def read_image(data: bytes) -> None:
        _put(harmed / "image.png", data)
        image_file(harmed / "image.png", harmed / "made.png")

    key, cache = "a" * 64, GradientCache(folder / "cache")
    cache.keep(key, np.ones((2, 8), np.float32), [mark for mark in (mark_of(trace.path / "zarr.json"),) if mark])
    entry = (cache.folder / f"{key}.npz").read_bytes()
    with np.load(io.BytesIO(entry)) as arrays_of_entry:
        entry_facts = json.loads(arrays_of_entry["facts"].tobytes())
    shutil.copytree(folder / "plain", harmed)
    shutil.copytree(folder / "plain", harmed / "plain")
    shutil.copytree(folder / "packed", harmed / "packed")
    edits = [bytes([n]) * 8 for n in range(0, 256, 16)]
    texts = [text.encode() for text in CAPTIONS]
    return {
        "json": Target(25, [json.dumps(group).encode(), json.dumps(kept).encode(), *METADATA], _read_json),
        "header": Target(25, edits, lambda data: _read_header(_edited(group["attributes"], data))),
        "header text": Target(10, [json.dumps(group).encode()], lambda data: _read_header(_parsed(data, "attributes"))),
        "settings": Target(
            8, edits, lambda data: make_settings(_object(_edited(group["attributes"]["settings"], data)))
        ),
        "index facts": Target(10, edits, read_facts),
        "outputs": Target(8, texts, _write_all),
        "store": Target(1, edits, read_store),
        "index": Target(1, edits, read_index),
        "graph": Target(3, edits, read_graph),
        "captions": Target(
            3,
            edits,
            lambda data: read_chunk(data, "meta/caption", trace, lambda t: t.column_at("caption", t.header.rows(1))),
        ),
        "thumbnails": Target(3, edits, lambda data: read_chunk(data, "thumbnails", trace, _look_at_all)),
        "thumbnail": Target(3, small, _decode),
        "packed chunk": Target(3, edits, lambda data: read_chunk(data, "grad", packed, lambda t: t.grad_chunk(1))),
        "list": Target(4, ["\n".join(lines).encode(), *(line.encode() for line in lines)], read_list),
        "weights": Target(4, [safetensors], read_weights),
        "arrays": Target(3, [_arrays(trace.header.samples)], read_arrays),
        "image": Target(3, images, read_image),
        "cached query": Target(3, [entry], read_entry),
        "cached facts": Target(3, edits, read_entry_facts),
    }


METADATA = (b"[" * 40, b'{"a": NaN}', b'{"a": 1e999}', b'{"a": 1, "a": 2}', b"\xff", b'"\\ud800"', b"-0", b"[1E5]")


def _parsed(data: bytes, name: str) -> Any:
    try:
        found = untrusted.parse(data)
    except ValueError:
        raise RefusedError from None
    return found.get(name) if isinstance(found, dict) else None


def _signed(facts_of: dict[str, Any]) -> dict[str, Any]:
    """Facts of an index with their digest; what holds an infinity has none."""
    kept = {name: value for name, value in facts_of.items() if name != "digest"}
    try:
        return {**kept, "digest": untrusted.digest(kept)}
    except ValueError:
        return kept


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RefusedError
    return value


def _read_json(data: bytes) -> None:
    try:
        found = untrusted.parse(data)
    except ValueError:
        raise RefusedError from None
    again = untrusted.parse(json.dumps(found))
    if untrusted.digest(again) != untrusted.digest(found):
        raise AssertionError("what is parsed is not what is written")


def _read_header(attributes: Any) -> None:
    header = Header.from_attributes(_object(attributes), Path("trace.zarr"))
    again = Header.from_attributes(header.to_attributes(), Path("trace.zarr"))
    if again != header:
        raise AssertionError("a header is not what it says")


def _read_all(trace: Store) -> None:
    for name in trace.header.columns:
        trace.column(name)
    describe_store(trace)
    rows = trace.gradients(np.array([0, len(trace.sample) - 1]))
    query.answer_queries(trace, rows, k=3, score="dmin", exact=True)


def _look_at_all(trace: Store) -> None:
    rows = trace.header.rows(1)
    if not any(trace.thumbnails.image(row) is not None for row in rows):
        raise RefusedError


def _decode(data: bytes) -> None:
    try:
        image = decode_webp(data, 16)
    except ValueError:
        raise RefusedError from None
    if max(image.size) > 16:
        raise AssertionError("a thumbnail is larger than the store allows")


def _write_all(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    columns = {text or "x": text, "caption": text, "n": float("nan")}
    hits = [Hit(rank=1, sample=3, score=0.5, per_timestep=(0.5, -0.5), columns=columns)]
    none = np.empty((1, 0))
    by = AnsweredBy(None, text)
    background = Background(samples=2, scored=2, unknown=text)
    words = ((text,), (text,), (text,))
    record = Record(
        made=datetime.fromtimestamp(0, UTC),
        version=text,
        trace=text,
        samples=2,
        searched=2,
        queries=text,
        weights=text,
        weights_of=text,
        data=text,
        script=text,
        script_sha256=text,
        settings={text: text},
        writers={text: text},
    )
    groups = ((1.0,), (2.0,))
    top = TopK(none, none, none, [hits], *words, groups, "dmin", "", by, (background,), (None,), record)
    written = report.hits_json(top, {text: text})
    assert written.isascii()
    assert json.loads(written)["queries"][0]["prompt"] == text
    report.table_csv(top.table).encode("utf-8")
    shown = report.harmless(text, 80)
    assert len(shown) <= 80 and shown.isprintable()
    paper = Console(file=io.StringIO(), width=90, force_terminal=False)
    paper.print(report.hits_table(top, 0))
    said = paper.file.getvalue()  # type: ignore[attr-defined]
    assert said.replace("\n", "").isprintable()
    lowest = replace(top, backgrounds=(replace(background, largest=False),))
    for page in (answer_page(top, lowest), top._repr_html_()):
        page.encode("utf-8")
        Tags().feed(page)


class Tags(HTMLParser):
    """Refuses a page in which a text became an element, or an attribute that acts."""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        acting = [name for name, _ in attributes if name.startswith("on") or name == "style"]
        sources = [value or "" for name, value in attributes if name in ("src", "href")]
        others = [value for value in sources if not value.startswith(("data:", "#"))]
        if tag not in PAGE_TAGS or acting or others:
            raise AssertionError(f"a text became {tag} {attributes}")

    def handle_data(self, data: str) -> None:
        if not data.replace("\n", "").isprintable():
            raise AssertionError(f"a page shows {data!r}")


def _entry(facts: bytes) -> bytes:
    """An entry of the cache of queries, with these facts."""
    file = io.BytesIO()
    np.savez(file, gradients=np.ones((2, 8), np.float32), facts=np.frombuffer(facts, np.uint8))
    return file.getvalue()


def _arrays(samples: int) -> bytes:
    file = io.BytesIO()
    np.savez(file, subsets=np.ones((2, samples), np.bool_), losses=np.ones((2, 2)))
    packed = io.BytesIO()
    with zipfile.ZipFile(file) as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in plain.namelist():
            archive.writestr(name, plain.read(name))
    return packed.getvalue()


def _images() -> Iterator[bytes]:
    pixels = np.random.default_rng(0).integers(0, 255, (12, 12, 3), np.uint8)
    for kind in ("PNG", "JPEG", "WEBP", "BMP"):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        yield file.getvalue()


def _put(file: Path, data: bytes | str) -> None:
    file.write_bytes(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)


def _with_digest(group: Any) -> Any:
    """The metadata of a store with its digest; what holds an infinity keeps the old one."""
    attributes = group.get("attributes") if isinstance(group, dict) else None
    if not isinstance(attributes, dict):
        return group
    try:
        return {**group, "attributes": {**attributes, DIGEST: digest_of(attributes)}}
    except ValueError:
        return group


# -- changes -----------------------------------------------------------------------------------------------------------


def _edited(value: Any, data: bytes) -> Any:
    """A JSON value with some of what is in it replaced, taken away, or put elsewhere, as the bytes say."""
    chosen = random.Random(data)
    edited = copy.deepcopy(value)
    for _ in range(chosen.randint(1, 3)):
        holder: Any = None
        place: Any = None
        inner = edited
        while isinstance(inner, (dict, list)) and inner and (holder is None or chosen.random() < 0.7):
            holder, place = inner, chosen.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            inner = holder[place]
        if holder is None:
            return chosen.choice(NASTY)
        act = chosen.random()
        if act < 0.1:
            del holder[place]
        elif act < 0.3 and isinstance(inner, (int, float)) and not isinstance(inner, bool):
            holder[place] = chosen.choice(
                (inner + 1, inner - 1, inner * 2, -inner, inner / 1 if abs(inner) < 1e300 else 0.0, repr(inner)[:99])
            )
        elif act < 0.4 and isinstance(inner, str):
            at = chosen.randint(0, len(inner))
            holder[place] = inner[:at] + chosen.choice(("\x00", "\n", "x", "\ud800", "/", "é")) + inner[at + 1 :]
        elif act < 0.5 and isinstance(holder, list):
            holder.insert(chosen.randint(0, len(holder)), copy.deepcopy(inner))
        else:
            holder[place] = copy.deepcopy(chosen.choice(NASTY))
    return edited


def _spliced(whole: bytes, data: bytes) -> bytes:
    """Bytes with some of them replaced, as the data say: most of it near the start, where lengths are."""
    chosen = random.Random(data)
    changed = bytearray(whole)
    for _ in range(chosen.randint(1, 4)):
        at = min(chosen.choice((chosen.randint(0, 200), chosen.randrange(len(whole)))), len(changed) - 1)
        if at < 0:
            break
        act = chosen.random()
        if act < 0.5:
            changed[at] ^= 1 << chosen.randint(0, 7)
        elif act < 0.9:
            changed[at : at + 4] = chosen.choice((0, 1, 2, 255, 2**16, 2**31, 2**32 - 1)).to_bytes(4, "little")
        else:
            del changed[at : at + chosen.choice((1, 4, 100))]
    return bytes(changed)


def _changed(seed: bytes, chosen: random.Random) -> bytes:
    """A seed with some bytes changed, put in, taken out or repeated."""
    data = bytearray(seed)
    for _ in range(chosen.randint(1, 6)):
        at, act = chosen.randint(0, len(data)), chosen.random()
        if act < 0.35 and data:
            data[at % len(data)] ^= 1 << chosen.randint(0, 7)
        elif act < 0.5:
            data[at:at] = chosen.randbytes(chosen.randint(1, 4))
        elif act < 0.65:
            del data[at : at + chosen.randint(1, 8)]
        elif act < 0.8:
            start = chosen.randint(0, len(data))
            data[at:at] = data[start : start + chosen.randint(1, 64)]
        else:
            token = chosen.choice(
                (b'"', b"{", b"[", b"]", b"}", b",", b":", b"\\u", b"1e999", b"NaN", b"\x00", b"\xff")
            )
            data[at : at + len(token)] = token
    return bytes(data)


# -- a process for each target -----------------------------------------------------------------------------------------


def _memory() -> str | None:
    """A folder in memory, where there is one: most of the time would go to the disk."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _in_a_process(what: str, count: int, seed: int, engine: str, folder: Path) -> tuple[np.ndarray, str]:
    """How many inputs a target was given, answered and refused; and what it did that is a finding, or ""."""
    folder.mkdir(parents=True)
    counts = np.memmap(folder / "counts", np.int64, "w+", shape=3)
    start = [__file__] if engine == "random" else ["-c", GUIDED]
    command = [sys.executable, *start, what, str(count), str(seed), engine, str(folder)]
    ran = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, cwd=Path(__file__).parent
    )
    found = (folder / "finding.txt").read_text(errors="replace") if (folder / "finding.txt").exists() else ""
    if ran.returncode and not found:
        found = f"exit code {ran.returncode}: {ran.stderr[-3000:]}"
    numbers = np.array(counts)
    shutil.rmtree(folder, ignore_errors=True)
    return numbers, found


def _run_target(what: str, count: int, seed: int, engine: str, folder: Path) -> None:
    target = targets(folder / "made")[what]
    counts = np.memmap(folder / "counts", np.int64, "r+", shape=3)
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + SPARE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, _too_slow)

    def one(data: bytes) -> None:
        counts[0] += 1
        signal.alarm(PATIENCE)
        try:
            target.read(data)
            counts[1] += 1
        except (DminTraceError, RefusedError):
            counts[2] += 1
        except BaseException:
            (folder / "finding.txt").write_text(f"{data[:2000]!r}\n{traceback.format_exc()}", errors="replace")
            raise
        finally:
            signal.alarm(0)

    for data in target.seeds:
        one(data)
    left = count - len(target.seeds)
    if engine == "atheris":
        import atheris

        corpus = folder / "corpus"
        corpus.mkdir()
        for n, data in enumerate(target.seeds):
            (corpus / str(n)).write_bytes(data)
        atheris.Setup(["fuzz", f"-runs={max(1, left)}", f"-seed={seed + 1}", "-max_len=20000", str(corpus)], one)
        atheris.Fuzz()
    else:
        chosen = random.Random(f"{what} {seed}")
        for _ in range(left):
            one(_changed(chosen.choice(target.seeds), chosen))


def _too_slow(*_: object) -> None:
    raise TimeoutError(f"an input took more than {PATIENCE} seconds")


def main() -> None:
    """A target's own process: its name, inputs, seed, engine and folder."""
    what, count, seed, engine, folder = sys.argv[1:]
    _run_target(what, int(count), int(seed), engine, Path(folder))


if __name__ == "__main__":
    main()
