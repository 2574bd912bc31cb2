"""Many processes read one store, also while its index is made anew; a copy, however made, answers as the store does."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torture_stores import make_store

from dmin_trace import query
from dmin_trace.audit import verify_store
from dmin_trace.search import build_index
from dmin_trace.store import Store, open_store

ASK = """
import sys
import numpy as np
from dmin_trace import query
from dmin_trace.store import open_store
for _ in range(int(sys.argv[2])):
    trace = open_store(sys.argv[1])
    for exact in (True, False):
        answer = query.answer_queries(trace, trace.gradients(np.array([3, 77])), k=4, score="dmin", exact=exact)
        print([(hit.sample, hit.score) for hits in answer.hits for hit in hits])
"""


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with an index."""
    return make_store(tmp_path_factory.mktemp("readers"))


def asked(trace: Store) -> list[tuple[list[tuple[int, float, str]], bool]]:
    """The hits of two samples by the scan and by the index, and whether the index answered."""
    found = []
    for exact in (True, False):
        gradients = query.Trace(trace).query_samples([3, 77]).gradients
        answer = query.answer_queries(trace, gradients, k=4, score="dmin", exact=exact)
        hits = [(hit.sample, hit.score, str(hit.columns)) for of_one in answer.hits for hit in of_one]
        found.append((hits, answer.answered_by.recall is not None))
    return found


def test_readers_in_many_processes_answer_alike(trace: Store) -> None:
    command = [sys.executable, "-c", ASK, str(trace.path), "20"]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [reader.communicate(timeout=300)[0] for reader in readers]
    assert all(reader.returncode == 0 for reader in readers)
    [lines] = set(said)
    assert len(lines.splitlines()) == 40 and len(set(lines.splitlines())) == 1


def test_readers_have_an_answer_while_the_index_is_made_anew(trace: Store, tmp_path: Path) -> None:
    shutil.copytree(trace.path.parent, tmp_path / "copy")
    path = tmp_path / "copy" / "trace.zarr"
    expected = asked(open_store(path))
    command = [sys.executable, "-c", ASK, str(path), "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader:
        while reader.poll() is None:
            build_index(open_store(path), recall=0.5)
        said, errors = reader.communicate()
    assert reader.returncode == 0, errors
    assert len(set(said.splitlines())) == 1
    assert asked(open_store(path)) == expected


def cp(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", source, target], check=True)


def tar(source: Path, target: Path) -> None:
    packed = target.with_suffix(".tar.gz")
    subprocess.run(["tar", "-czf", packed, "-C", source.parent, source.name], check=True)
    target.mkdir()
    subprocess.run(["tar", "-xzf", packed, "-C", target, "--strip-components=1"], check=True)


def rsync(source: Path, target: Path) -> None:
    if shutil.which("rsync") is None:
        pytest.skip("there is no rsync")
    subprocess.run(["rsync", "-r", f"{source}/", target], check=True)


def archive(source: Path, target: Path) -> None:
    shutil.unpack_archive(shutil.make_archive(str(target), "zip", source), target)


def moved(source: Path, target: Path) -> None:
    shutil.copytree(source, target.with_name("between"))
    target.with_name("between").rename(target)


@pytest.mark.parametrize("copy", [cp, tar, rsync, archive, moved])
def test_a_copy_is_whole_and_answers_alike(trace: Store, tmp_path: Path, copy: Callable[[Path, Path], None]) -> None:
    """Its index too, which goes by what is in the files and not by their times."""
    copy(trace.path.parent, tmp_path / "copy")
    copied = open_store(tmp_path / "copy" / "trace.zarr")
    found = verify_store(copied.path)
    assert (found.damages, found.notes, found.complete) == ([], [], True)
    assert asked(copied) == asked(trace)
    assert asked(copied)[1][1]


def test_half_a_copy_is_named(trace: Store, tmp_path: Path) -> None:
    """As a copy that was broken off leaves it: some files are there, one is short, the rest is missing."""
    shutil.copytree(trace.path.parent, tmp_path / "copy")
    files = sorted(file for file in (tmp_path / "copy" / "trace.zarr" / "grad" / "c").rglob("*") if file.is_file())
    for file in files[3:]:
        file.unlink()
    files[2].write_bytes(files[2].read_bytes()[:1000])
    assert verify_store(tmp_path / "copy" / "trace.zarr").bad_chunks == [2, 3, 4]
