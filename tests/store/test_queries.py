"""Queries are saved and loaded as one .npz file, which may come from anybody."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmin_trace.errors import QueryError
from dmin_trace.store import Queries, encode_webp


def some_queries() -> Queries:
    gradients = np.random.default_rng(0).standard_normal((3, 2, 16)).astype(np.float32)
    return Queries(gradients, ("a.png", "猫\n", ""), ("a cat", None, ""), "0" * 32)


def rewrite(path: Path, name: str, content: bytes) -> None:
    """Replaces one member of a zip file."""
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for member, old in members.items():
            archive.writestr(member, content if member == name else old)


def test_save_and_load_give_the_same_queries(tmp_path: Path) -> None:
    queries = some_queries()
    queries.save(tmp_path / "queries")
    loaded = Queries.load(tmp_path / "queries")
    assert np.array_equal(loaded.gradients, queries.gradients) and loaded.gradients.dtype == np.float32
    assert (loaded.names, loaded.prompts, loaded.trace_id) == (queries.names, queries.prompts, queries.trace_id)
    assert len(loaded) == 3
    assert repr(loaded) == "Queries(3 queries, R=2, v=16)"


def test_the_prompt_without_a_concept_is_kept(tmp_path: Path) -> None:
    old = some_queries()
    assert old.without == (None, None, None)
    queries = replace(old, without=("a", None, None))
    queries.save(tmp_path / "queries")
    assert Queries.load(tmp_path / "queries").without == ("a", None, None)
    # A file without concepts is as it was before there were any.
    old.save(tmp_path / "old")
    with np.load(tmp_path / "old") as arrays:
        assert b"without" not in arrays["texts"].tobytes()
    assert Queries.load(tmp_path / "old").without == (None, None, None)
    with pytest.raises(QueryError, match="3 prompts and 2 without a concept"):
        replace(old, without=("a", None))
    with pytest.raises(QueryError, match="has no prompt, but a prompt without a concept"):
        replace(old, without=(None, "a", None))


def test_pictures_are_kept_and_read_as_what_they_are(tmp_path: Path) -> None:
    old = some_queries()
    assert old.pictures == (None, None, None)
    picture = encode_webp(Image.new("RGB", (8, 6), (1, 2, 3)), 128)
    queries = replace(old, pictures=(picture, None, None))
    queries.save(tmp_path / "queries")
    assert Queries.load(tmp_path / "queries").pictures == queries.pictures == queries[:3].pictures
    old.save(tmp_path / "old")
    with np.load(tmp_path / "old") as arrays:
        assert b"pictures" not in arrays["texts"].tobytes()
    with pytest.raises(QueryError, match="3 prompts and 1 pictures"):
        replace(old, pictures=(picture,))
    with pytest.raises(QueryError, match=r"picture of the query 'a\.png' is no plain WebP file of at most 512 pixels"):
        replace(old, pictures=(b"<svg onload=x>", None, None))
    # A file whose header is right and whose pixels are not.
    broken = picture[:25] + bytes(len(picture) - 25)
    replace(old, pictures=(broken, None, None)).save(tmp_path / "broken")
    with pytest.raises(QueryError, match="cannot be decoded"):
        Queries.load(tmp_path / "broken")


def test_load_runs_no_pickle(tmp_path: Path) -> None:
    path = tmp_path / "queries.npz"
    some_queries().save(path)
    pickled = io.BytesIO()
    np.save(pickled, np.array([{"a": 1}], object), allow_pickle=True)
    rewrite(path, "texts.npy", pickled.getvalue())
    with pytest.raises(QueryError, match="its texts are object"):
        Queries.load(path)


def test_load_allocates_nothing_on_the_word_of_a_header(tmp_path: Path) -> None:
    path = tmp_path / "queries.npz"
    some_queries().save(path)
    claimed = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        claimed, {"descr": "<f4", "fortran_order": False, "shape": (2**20, 2**10, 2**10)}
    )
    rewrite(path, "gradients.npy", claimed.getvalue())
    with pytest.raises(QueryError, match="claims more numbers than it can hold"):
        Queries.load(path)


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (b"[]", "object"),
        (b'{"format":"x","version":1,"trace_id":"","names":[],"prompts":[]}', "Invalid enum value 'x'"),
        (b'{"format":"dmin_trace queries","version":1,"trace_id":3,"names":[],"prompts":[]}', "trace_id"),
        (b"[" * 100_000, "cannot be read"),
    ],
)
def test_load_refuses_other_texts(tmp_path: Path, texts: bytes, reason: str) -> None:
    path = tmp_path / "queries.npz"
    some_queries().save(path)
    array = io.BytesIO()
    np.save(array, np.frombuffer(texts, np.uint8))
    rewrite(path, "texts.npy", array.getvalue())
    with pytest.raises(QueryError, match=reason):
        Queries.load(path)


def test_load_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no zip file")
    np.savez(tmp_path / "other.npz", subsets=np.zeros(3))
    for name in ("text", "other.npz", "missing", "."):
        with pytest.raises(QueryError, match="cannot be read as queries"):
            Queries.load(tmp_path / name)
    with pytest.raises(QueryError, match="cannot be written"):
        some_queries().save(tmp_path / "no" / "folder.npz")


def test_save_refuses_a_text_that_is_not_unicode(tmp_path: Path) -> None:
    queries = Queries(np.ones((1, 2, 16), np.float32), ("\udc80.png",), (None,), "")
    with pytest.raises(QueryError, match="cannot be written: .*surrogates"):
        queries.save(tmp_path / "queries.npz")


def test_queries_are_finite_and_of_one_length() -> None:
    with pytest.raises(QueryError, match="not finite"):
        Queries(np.full((1, 2, 16), np.nan, np.float32), ("a",), (None,), "")
    with pytest.raises(QueryError, match="expected gradients"):
        Queries(np.ones((2, 2, 16), np.float32), ("a",), (None,), "")
    with pytest.raises(QueryError, match="expected float32"):
        Queries(np.ones((1, 2, 16)), ("a",), (None,), "")  # type: ignore[arg-type]
