"""The cache of queries: entries come back as they were; what is damaged, hostile or another user's is missing."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dmin_trace.query.file_marks import FileMark, mark_of
from dmin_trace.query.gradient_cache import GradientCache

SHAPE = (3, 64)
KEY, OTHER = "a" * 64, "b" * 64


def gradients_of(seed: int, shape: tuple[int, int] = SHAPE) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def mark(path: Path) -> FileMark:
    found = mark_of(path)
    assert found is not None
    return found


@pytest.fixture
def cache(tmp_path: Path) -> GradientCache:
    """A cache with one entry."""
    made = GradientCache(tmp_path / "cache" / "queries")
    made.keep(KEY, gradients_of(0), [])
    return made


def entry(cache: GradientCache, key: str = KEY) -> Path:
    return cache.folder / f"{key}.npz"


def test_an_entry_comes_back_bit_for_bit(cache: GradientCache, caplog: pytest.LogCaptureFixture) -> None:
    found = cache.find(KEY, SHAPE)
    assert found is not None and found.dtype == np.float32 and found.tobytes() == gradients_of(0).tobytes()
    assert cache.find(OTHER, SHAPE) is None
    assert [file.name for file in cache.folder.iterdir()] == [f"{KEY}.npz"]
    cache.keep(KEY, gradients_of(1), [])
    found = cache.find(KEY, SHAPE)
    assert found is not None and np.array_equal(found, gradients_of(1))
    assert not caplog.records


def test_nothing_is_made_by_looking(tmp_path: Path) -> None:
    assert GradientCache(tmp_path / "none").find(KEY, SHAPE) is None
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_this_users_alone(cache: GradientCache) -> None:
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert entry(cache).stat().st_mode & 0o777 == 0o600


def test_a_changed_file_is_a_miss(cache: GradientCache, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights, link = tmp_path / "weights", tmp_path / "link"
    weights.write_bytes(b"1234")
    link.symlink_to(weights)
    times = weights.stat()
    for change in ("content", "replaced", "gone"):
        cache.keep(KEY, gradients_of(0), [mark(link)])
        assert cache.find(KEY, SHAPE) is not None
        if change == "content":
            weights.write_bytes(b"5678")
            # As a program does that hides it.
            os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
        elif change == "replaced":
            (tmp_path / "new").write_bytes(b"9999")
            (tmp_path / "new").replace(weights)
        else:
            weights.unlink()
        with caplog.at_level(logging.INFO):
            assert cache.find(KEY, SHAPE) is None, change
        assert f"{link} has changed since" in caplog.text
        caplog.clear()


def facts_of(path: Path) -> dict[str, object]:
    with np.load(path) as arrays:
        return dict(json.loads(arrays["facts"].tobytes()))


def rewrite(path: Path, facts: object = None, gradients: NDArray[np.generic] | None = None) -> None:
    """Writes an entry with other facts or other gradients."""
    text = facts if isinstance(facts, bytes) else json.dumps(facts_of(path) if facts is None else facts).encode()
    with path.open("wb") as file:
        array = gradients_of(0) if gradients is None else gradients
        np.savez(file, gradients=array, facts=np.frombuffer(text, np.uint8))


def pickled(path: Path) -> None:
    held = io.BytesIO()
    np.save(held, np.array([{"a": 1}], object), allow_pickle=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("gradients.npy", held.getvalue())
        archive.writestr("facts.npy", held.getvalue())


def claims_much(path: Path) -> None:
    held = io.BytesIO()
    np.lib.format.write_array_header_1_0(held, {"descr": "<f4", "fortran_order": False, "shape": (2**20, 2**20)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("gradients.npy", held.getvalue())
        archive.writestr("facts.npy", held.getvalue())


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = data.index(gradients_of(0).tobytes()) + 17
    data[at] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


HOSTILE = {
    "pickle": (pickled, "its gradients are object"),
    "a claim of much": (claims_much, "its gradients are float32 (1048576, 1048576)"),
    "a flipped bit": (flipped, "Bad CRC-32"),
    "cut short": (cut, "not a zip file"),
    "empty": (lambda path: path.write_bytes(b""), "not a zip file"),
    "a link": (linked, "it is no file, or a link to one"),
    "a pipe": (pipe, "it is no file, or a link to one"),
    "a folder": (folder, "it is no file, or a link to one"),
    "another shape": (lambda path: rewrite(path, gradients=gradients_of(0, (3, 32))), "(3, 32), expected float32"),
    "another dtype": (lambda path: rewrite(path, gradients=gradients_of(0).astype("f8")), "its gradients are float64"),
    "NaN": (lambda path: rewrite(path, gradients=gradients_of(0) * np.float32("nan")), "not finite"),
    "of another key": (lambda path: rewrite(path, facts_of(path) | {"key": OTHER}), f"it is the entry {OTHER}"),
    "another format": (lambda path: rewrite(path, facts_of(path) | {"format": "x"}), "Invalid enum value 'x'"),
    "another version": (lambda path: rewrite(path, facts_of(path) | {"version": 2}), "Invalid enum value 2"),
    "more facts": (lambda path: rewrite(path, facts_of(path) | {"run": "rm"}), "unknown field `run`"),
    "no facts": (lambda path: rewrite(path, {}), "missing required field"),
    "a file that is none": (lambda path: rewrite(path, facts_of(path) | {"files": [["a", "b"]]}), "$.files[0]"),
    "deep facts": (lambda path: rewrite(path, b"[" * 100_000), "it is too deep"),
    "facts twice": (lambda path: rewrite(path, b'{"key": 1, "key": 2}'), "it has a name twice"),
    "facts that are no text": (lambda path: rewrite(path, b"\xff\xfe"), "utf-8"),
}


@pytest.mark.parametrize(("spoil", "why"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_entry_is_missing_and_named(
    cache: GradientCache, spoil: object, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert callable(spoil)
    spoil(entry(cache))
    assert cache.find(KEY, SHAPE) is None
    [record] = caplog.records
    assert str(entry(cache)) in record.getMessage() and why in record.getMessage()
    # The next query that is captured puts it right, where that is possible.
    cache.keep(KEY, gradients_of(2), [])
    if spoil is not folder:
        found = cache.find(KEY, SHAPE)
        assert found is not None and np.array_equal(found, gradients_of(2))


def test_paths_in_an_entry_are_only_looked_at(cache: GradientCache, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in ("\0", "a" * 4000, str(tmp_path / "pipe"), "/dev/zero"):
        rewrite(entry(cache), facts_of(entry(cache)) | {"files": [[path, 0, 0, 0, 0]]})
        assert cache.find(KEY, SHAPE) is None


def unsafe(cache: GradientCache, caplog: pytest.LogCaptureFixture, why: str) -> None:
    """Nothing is read from the folder, and nothing is written to it."""
    before = sorted(cache.folder.resolve().iterdir())
    assert cache.find(KEY, SHAPE) is None
    assert why in caplog.text
    cache.keep(OTHER, gradients_of(0), [])
    assert sorted(cache.folder.resolve().iterdir()) == before


def test_another_users_folder_is_not_used(
    cache: GradientCache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.getuid() == 0:
        os.chown(cache.folder, 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    unsafe(cache, caplog, "it is another user's")


def test_another_users_entry_is_not_used(
    cache: GradientCache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(entry(cache), 12345, -1)
    assert cache.find(KEY, SHAPE) is None
    assert "it is another user's" in caplog.text


def test_a_folder_that_others_may_use_is_not_used(cache: GradientCache, caplog: pytest.LogCaptureFixture) -> None:
    cache.folder.chmod(0o770)
    unsafe(cache, caplog, "others may use it (chmod 700")


def test_a_link_in_place_of_the_folder_is_not_used(cache: GradientCache, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = cache.folder.with_name("elsewhere")
    cache.folder.rename(elsewhere)
    cache.folder.symlink_to(elsewhere)
    unsafe(cache, caplog, "it is no folder, or a link to one")


def test_a_file_in_place_of_the_folder_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache = GradientCache(tmp_path / "file" / "queries")
    assert cache.find(KEY, SHAPE) is None
    cache.keep(KEY, gradients_of(0), [])
    assert "cannot be kept in" in caplog.text


def test_an_entry_is_written_whole_or_not_at_all(
    cache: GradientCache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: io.BufferedWriter, **arrays: object) -> None:
        file.write(b"PK")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        cache.keep(KEY, gradients_of(1), [])
    assert "No space left on device" in caplog.text
    assert [file.name for file in cache.folder.iterdir()] == [f"{KEY}.npz"]
    found = cache.find(KEY, SHAPE)
    assert found is not None and np.array_equal(found, gradients_of(0))


def use_in_turn(cache: GradientCache, count: int) -> list[str]:
    keys = [f"{n:064x}" for n in range(count)]
    for n, key in enumerate(keys):
        cache.keep(key, gradients_of(n), [])
        if entry(cache, key).exists():
            # The clocks of file systems are coarse.
            os.utime(entry(cache, key), (1000 + n, 1000 + n))
    return keys


def test_the_size_is_bounded_and_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    probe = GradientCache(tmp_path / "probe")
    probe.keep(KEY, gradients_of(0), [])
    size = entry(probe).stat().st_size
    cache = GradientCache(tmp_path / "cache", max_bytes=4 * size + size // 2)
    keys = use_in_turn(cache, 4)
    assert all(cache.find(key, SHAPE) is not None for key in keys[:1])  # used again, so it is the last to go
    cache.keep(KEY, gradients_of(9), [])
    left = {file.name.removesuffix(".npz") for file in cache.folder.iterdir()}
    assert left == {keys[0], keys[2], keys[3], KEY}
    # What would take most of it is not kept.
    cache.keep(OTHER, gradients_of(9, (32, 64)), [])
    assert not entry(cache, OTHER).exists()


def test_the_number_of_entries_is_bounded(tmp_path: Path) -> None:
    cache = GradientCache(tmp_path / "cache", max_entries=3)
    keys = use_in_turn(cache, 6)
    assert {file.stem for file in cache.folder.iterdir()} == set(keys[3:])


def test_what_a_killed_process_left_is_removed(cache: GradientCache) -> None:
    left, new = cache.folder / ".x.1.partial", cache.folder / ".y.2.partial"
    for path in (left, new):
        path.write_bytes(b"PK")
    os.utime(left, (0, 0))
    cache.keep(OTHER, gradients_of(1), [])
    assert not left.exists() and new.exists()


def _write_and_read(folder: Path, seed: int) -> None:
    """Keeps entries that the other process keeps and removes too, and reads them; each has one of two values."""
    size = 2 * 8 * gradients_of(0).nbytes
    cache = GradientCache(folder, max_bytes=size)
    values = [gradients_of(0), gradients_of(1)]
    for n in range(200):
        key = f"{n % 20:064x}"
        cache.keep(key, values[seed], [])
        found = cache.find(key, SHAPE)
        if found is not None and not any(np.array_equal(found, value) for value in values):
            raise SystemExit(3)


def test_two_processes_may_use_it_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write_and_read, args=(tmp_path / "cache", seed)) for seed in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    files = list((tmp_path / "cache").iterdir())
    assert files and all(file.suffix == ".npz" for file in files)
    # Both may have removed some, so it is at most as large as it may be, and what is there is whole.
    cache = GradientCache(tmp_path / "cache")
    assert sum(file.stat().st_size for file in files) <= 2 * 8 * gradients_of(0).nbytes
    assert all(cache.find(file.stem, SHAPE) is not None for file in files)
