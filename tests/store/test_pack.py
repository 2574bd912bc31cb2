"""Packing: the same answers from another codec, dtype or fewer dimensions; whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from stores import DTYPES, Rows, change, content, dequantised, make_header, make_rows, with_checksum, write_store
from tiny import EXAMPLE, digit_folder, run, without_the_line

from dmin_trace import command as commands
from dmin_trace.command import Command
from dmin_trace.errors import SettingsError, TraceError
from dmin_trace.project import compress_gradient, make_plan
from dmin_trace.search import exact_top_k
from dmin_trace.settings import Codec, Dtype, Projection
from dmin_trace.store import (
    ProjectionFacts,
    Store,
    Writer,
    chunk_file,
    create,
    open_store,
    pack_store,
    quantise,
    weights_beside,
)

CLI = ("-m", "dmin_trace.cli.app")
CODECS: tuple[Codec, ...] = ("none", "blosc")


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own records, of this test alone."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def projected(
    folder: Path, kind: Projection = "rotation", dimension: int = 256, dtype: Dtype = "int8", length: int = 5000
) -> tuple[Store, list[list[torch.Tensor]]]:
    """A store of real sketches of 23 samples at 3 timesteps, and their gradients, each in two tensors."""
    generator = torch.Generator().manual_seed(2)
    gradients = [[torch.randn(length, generator=generator) for _ in range(3)] for _ in range(23)]
    plan = make_plan(length, dimension, 3, kind)
    facts = ProjectionFacts(kind=kind, seed=3, length=length, width=plan.width, fingerprint=plan.fingerprint)
    header = make_header(23, 3, dimension, dtype, rows=4, projection=facts)
    header = dataclasses.replace(
        header, settings={"timesteps": 3, "columns": None, "dtype": dtype, "dimension": dimension, "codec": "none"}
    )
    rows = make_rows(header)
    for sample, row in enumerate(gradients):
        for t, gradient in enumerate(row):
            sketch, norm = compress_gradient([gradient[:1234], gradient[1234:]], plan)
            rows.grad[sample, t], rows.norm[sample, t] = sketch.numpy(), float(norm)
    return write_store(folder / "trace.zarr", header, rows), gradients


def same_facts(old: Store, new: Store) -> None:
    """Everything but the sketches is the same."""
    assert new.complete
    for name in ("norm", "loss", "sample", "valid"):
        assert np.array_equal(getattr(old, name), getattr(new, name), equal_nan=True)
    assert list(old.header.columns) == list(new.header.columns)
    for name in old.header.columns:
        assert repr(old.column(name)) == repr(new.column(name))
    kept = {"samples", "timesteps", "parameters", "weights", "noise", "transform", "batch", "columns", "writers"}
    for name in kept:
        assert getattr(old.header, name) == getattr(new.header, name)
    assert old.header.id != new.header.id


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_codec_holds_the_same_numbers_to_the_bit(tmp_path: Path, dtype: Dtype) -> None:
    header = make_header(samples=37, timesteps=3, dimension=64, dtype=dtype, rows=4)
    rows = make_rows(header)
    rows.norm[5, 1] = np.nan
    old = write_store(tmp_path / "trace.zarr", header, rows)
    packed = pack_store(old, tmp_path / "packed.zarr", codec="blosc")
    back = pack_store(packed, tmp_path / "back.zarr", codec="none")
    assert (packed.header.codec, back.header.codec) == ("blosc", "none")
    for trace in (packed, back):
        same_facts(old, trace)
        assert trace.header.projection == header.projection
        # By plain Zarr, which knows nothing of us.
        ours, theirs = (zarr.open_group(t.path, mode="r") for t in (old, trace))
        for name in ("grad", "numbers"):
            assert np.array_equal(ours[name][:], theirs[name][:], equal_nan=True)  # type: ignore[index]
        assert np.array_equal(trace.gradients(np.arange(37)), old.gradients(np.arange(37)))
    assert len({old.header.id, packed.header.id, back.header.id}) == 3


@pytest.mark.parametrize("old_dtype", DTYPES)
@pytest.mark.parametrize("new_dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_another_dtype_is_off_by_its_own_rounding(
    tmp_path: Path, old_dtype: Dtype, new_dtype: Dtype, codec: Codec
) -> None:
    if old_dtype == new_dtype and codec == "none":
        return
    header = make_header(samples=37, timesteps=3, dimension=64, dtype=old_dtype, rows=4)
    old = write_store(tmp_path / "trace.zarr", header, make_rows(header))
    new = pack_store(old, tmp_path / "new.zarr", codec=codec, dtype=new_dtype)
    same_facts(old, new)
    before, after = dequantised(old.path), dequantised(new.path)
    largest = np.abs(before).max(axis=2, keepdims=True)
    bound = {"int8": largest / 254 + 0.01 * np.abs(before), "float16": 2**-11 * np.abs(before) + 2**-25}
    bound["float32"] = 2**-24 * np.abs(before)
    assert (np.abs(after - before) <= bound[new_dtype] * (1 + 1e-5)).all()
    assert new.header.dtype == new_dtype


@pytest.mark.parametrize("dimension", [128, 64, 16])
@pytest.mark.parametrize("old_dtype, new_dtype", [("float32", "float32"), ("float32", "int8"), ("int8", "float16")])
def test_a_folded_store_is_the_capture_of_fewer_dimensions(
    tmp_path: Path, dimension: int, old_dtype: Dtype, new_dtype: Dtype
) -> None:
    old, gradients = projected(tmp_path, dtype=old_dtype)
    new = pack_store(old, tmp_path / "new.zarr", dimension=dimension, dtype=new_dtype)
    same_facts(old, new)
    plan = make_plan(5000, dimension, 3, "rotation")
    assert new.header.projection.fingerprint == plan.fingerprint
    assert (new.header.dimension, new.header.settings["dimension"]) == (dimension, dimension)
    expected = np.array([[compress_gradient([g], plan)[0].numpy() for g in row] for row in gradients])
    # int8 before the fold: each of the v / dimension numbers that are added is off by half a step at most.
    steps = {"float32": 1e-5, "float16": 1e-3, "int8": 0.02}
    assert np.abs(new.gradients(np.arange(23)) - expected).max() < steps[old_dtype] + steps[new_dtype]
    norms = np.linalg.norm(new.gradients(np.arange(23)), axis=2)
    assert np.allclose(norms, 1, atol=0.02)


def test_what_has_no_direction_stays_so(tmp_path: Path) -> None:
    old, _ = projected(tmp_path, dtype="float32")
    rows = Rows(
        old.gradients(np.arange(23)),
        old.norm.copy(),
        old.loss,
        old.sample,
        {n: old.column(n) for n in old.header.columns},
    )
    rows.grad[7, 1], rows.norm[7, 1] = 0, 0
    rows.grad[20], rows.norm[20] = np.nan, np.nan
    broken = write_store(tmp_path / "broken.zarr", old.header, rows)
    new = pack_store(broken, tmp_path / "new.zarr", dimension=64)
    same_facts(broken, new)
    assert not new.gradients(np.array([20])).any() and not new.gradients(np.array([7]))[0, 1].any()
    assert new.gradients(np.array([7]))[0, 0].any()
    assert np.flatnonzero(~new.valid).tolist() == [7, 20]


def test_what_does_not_fold_is_refused_with_the_reason(tmp_path: Path) -> None:
    def line(trace: Store, **wanted: Any) -> str:
        before = content(tmp_path)
        with pytest.raises(SettingsError) as caught:
            pack_store(trace, tmp_path / "new.zarr", **wanted)
        assert content(tmp_path) == before and "\n" not in str(caught.value)
        return str(caught.value)

    rotation, _ = projected(tmp_path)
    assert "what was not kept cannot be made. Give 128" in line(rotation, dimension=512)
    assert "expected a power of two" in line(rotation, dimension=100)
    assert "dimension 256 already" in line(rotation)
    assert "dimension 256 already" in line(rotation, dimension=256, dtype="int8", codec="none")
    uniform, _ = projected(tmp_path / "uniform", "uniform")
    assert "The projection is uniform, which does not fold" in line(uniform, dimension=128)
    other = dataclasses.replace(rotation.header.projection, fingerprint="0" * 64)
    change(rotation.path, lambda metadata: metadata["attributes"].update(projection=dataclasses.asdict(other)))
    assert "Fold the trace with the version" in line(open_store(rotation.path), dimension=128)
    # The other changes need no plan.
    assert pack_store(open_store(uniform.path), tmp_path / "f16.zarr", dtype="float16").complete


def test_answers_are_those_of_the_original(tmp_path: Path) -> None:
    old, _ = projected(tmp_path, dimension=4096, length=50_000)
    queries = old.gradients(np.array([3, 11]))
    whole = exact_top_k(old, queries, 10)
    for number, wanted in enumerate(({"codec": "blosc"}, {"dtype": "float32"}, {"dimension": 2048, "codec": "blosc"})):
        new = pack_store(old, tmp_path / f"{number}.zarr", **wanted)  # type: ignore[arg-type]
        again = exact_top_k(new, new.gradients(np.array([3, 11])), 10)
        assert again.rows[:, 0].tolist() == [3, 11]
        if "dimension" not in wanted:
            assert np.array_equal(again.rows, whole.rows)
            assert np.allclose(again.scores, whole.scores, atol=1e-4)


def test_the_command_and_the_weights_are_found(tmp_path: Path) -> None:
    old, _ = projected(tmp_path)
    command = Command(
        "/somewhere/train.py", ("--output_dir", "out"), "/somewhere", environment=commands.launch_environment()
    )
    commands.remember(old.header.id, command)
    weights_beside(old.path).write_bytes(b"weights")
    (tmp_path / "deep").mkdir()
    new = pack_store(old, tmp_path / "deep" / "new.zarr", codec="blosc")
    assert commands.recall(new.header.id) == command
    beside = weights_beside(new.path)
    assert beside.read_bytes() == b"weights"
    assert beside.stat().st_ino == weights_beside(old.path).stat().st_ino
    names = ["new.weights.safetensors", "new.zarr"]
    assert sorted(found.name for found in beside.parent.iterdir()) == names


def test_weights_on_another_disk_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def no_link(source: Path, target: Path) -> None:
        if str(target).endswith(".safetensors"):
            raise OSError(18, "Invalid cross-device link")
        link(source, target)

    old, _ = projected(tmp_path)
    weights_beside(old.path).write_bytes(b"weights")
    monkeypatch.setattr("os.link", no_link)
    new = pack_store(old, tmp_path / "new.zarr", codec="blosc")
    beside = weights_beside(new.path)
    assert beside.read_bytes() == b"weights" and beside.stat().st_nlink == 1


def test_nothing_is_left_of_a_store_that_could_not_be_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, _ = projected(tmp_path)
    weights_beside(old.path).write_bytes(b"weights")
    before = content(tmp_path)
    real = Writer.write

    def fail(self: Writer, chunk: int, *values: Any) -> None:
        if chunk == 3:
            raise KeyboardInterrupt
        real(self, chunk, *values)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", fail)
        patch.setattr("dmin_trace.store.layout.CHUNK_BYTES", 4 * 3 * 256)
        with pytest.raises(KeyboardInterrupt):
            pack_store(old, tmp_path / "new.zarr", codec="blosc")
    assert content(tmp_path) == before
    # Damage found in the last chunk.
    grad = chunk_file(old.path, "grad", 5)
    whole = grad.read_bytes()
    grad.write_bytes(whole[:-9])
    with pytest.raises(TraceError, match="chunk 5 of grad has"):
        pack_store(old, tmp_path / "new.zarr", codec="blosc")
    grad.write_bytes(whole)
    numbers = chunk_file(old.path, "numbers", 5)
    table = np.frombuffer(numbers.read_bytes()[:-4]).reshape(4, 10).copy()
    table[0, 7] = np.inf
    numbers.write_bytes(with_checksum(table.tobytes()))
    with pytest.raises(TraceError, match="chunk 5 holds numbers that are not finite"):
        pack_store(old, tmp_path / "new.zarr", dimension=128)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["trace.weights.safetensors", "trace.zarr"]


def test_what_is_there_already_is_left_alone(tmp_path: Path) -> None:
    old, _ = projected(tmp_path)
    weights_beside(old.path).write_bytes(b"weights")
    (tmp_path / "taken.zarr").mkdir()
    (tmp_path / "new.weights.safetensors").write_bytes(b"others")
    before = content(tmp_path)
    for out, line in (
        ("taken.zarr", "exists already"),
        ("trace.zarr", "exists already"),
        ("new.zarr", "weights.* exists"),
    ):
        with pytest.raises(TraceError, match=line):
            pack_store(old, tmp_path / out, codec="blosc")
    assert content(tmp_path) == before
    change(old.path, lambda metadata: metadata["attributes"].update(complete=False))
    with pytest.raises(TraceError, match="is unfinished"):
        pack_store(open_store(old.path, unfinished=True), tmp_path / "other.zarr", codec="blosc")


def test_memory_does_not_grow_with_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmin_trace.store.layout.CHUNK_BYTES", 2**20)
    peaks = []
    for samples in (256, 2048):
        header = make_header(samples=samples, timesteps=2, dimension=4096, rows=128)
        few = make_rows(make_header(samples=128, timesteps=2, dimension=4096, rows=128))
        writer = create(tmp_path / f"{samples}", header)
        for chunk in writer.pending():
            writer.write(chunk, *quantise(few.grad, "int8"), few.norm, few.loss, few.sample, few.columns)
        writer.finish()
        trace = open_store(writer.path)
        tracemalloc.start()
        pack_store(trace, tmp_path / f"{samples}-packed", dtype="float16", codec="blosc")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The larger store has 16 MiB as int8 and 64 as float32.
    assert peaks[1] < peaks[0] + 2**21


def test_the_whole_way_by_the_command_line(tmp_path: Path) -> None:
    """A capture with a codec, packed and folded: a sample, and an image, find themselves."""
    images = sorted(digit_folder(tmp_path / "digits", 24).iterdir())
    bare = without_the_line(EXAMPLE, tmp_path / "train.py")
    training = ("--train_data_dir", "digits", "--output_dir", "out", "--max_train_steps", "30")
    options = ("--timesteps", "3", "--dimension", "4096", "--codec", "blosc")
    run([*CLI, "run", *options, "--", bare, *training], tmp_path)
    assert open_store(tmp_path / "out.trace" / "trace.zarr").header.codec == "blosc"
    run(
        [*CLI, "pack", "out.trace/trace.zarr", "--out", "small/trace.zarr", "--dimension", "2048", "--codec", "none"],
        tmp_path,
    )
    told = run([*CLI, "info", "small/trace.zarr"], tmp_path).stdout.replace(",", "")
    assert "codec none" in told and "2048 numbers of int8" in told

    def ask(trace: str, *question: object) -> list[int]:
        run([*CLI, "query", "--score", "dmin", trace, *question, "--json", "hits.json"], tmp_path)
        hits = json.loads((tmp_path / "hits.json").read_text())["queries"][0]["hits"]
        return [hit["sample"] for hit in hits]

    for question in (("--sample", "17"), (images[5],)):
        first, second = ask("out.trace/trace.zarr", *question), ask("small/trace.zarr", *question)
        assert first[0] == second[0] == (17 if len(question) == 2 else 5)
        assert len(set(first) & set(second)) >= 7
    before = content(tmp_path)
    for wanted, code, line in (
        (("--dtype", "int4"), 2, "'int4' is not one of 'int8'"),
        ((), 1, "already. Give another --codec"),
    ):
        refused = run([*CLI, "pack", "small/trace.zarr", "--out", "no.zarr", *wanted], tmp_path, code=code)
        assert line in " ".join(refused.stderr.split()) and "Traceback" not in refused.stderr
    assert content(tmp_path) == before
