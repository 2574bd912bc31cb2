"""Whatever decides the gradients of a query changes its key; where it is asked from does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from stores import make_header

from dmin_trace.command import Command, Script
from dmin_trace.query.file_marks import mark_of, run_marks, weight_marks
from dmin_trace.query.query_key import query_key, run_key
from dmin_trace.store import Header

SCRIPT = Script("train.py", "5" * 64)


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(str(tmp_path / "train.py"), ("--resolution", "32"), str(tmp_path), environment={"ACCELERATE_X": "1"})


def key(command: Command, header: Header | None = None, script: Script = SCRIPT, *, any_device: bool = False) -> str:
    return run_key(make_header() if header is None else header, command, script, [], any_device=any_device)


def test_a_run_is_known_again(command: Command) -> None:
    assert key(command) == key(command)
    assert len(key(command)) == 64


def test_each_thing_that_decides_a_run_changes_its_key(command: Command, tmp_path: Path) -> None:
    header = make_header()
    (tmp_path / "w.safetensors").write_bytes(b"1")
    keys = [
        key(command),
        key(command, replace(header, id="0" * 31 + "1")),
        key(command, replace(header, weights="1" * 64)),
        key(command, replace(header, settings=header.settings | {"seed": 99})),
        key(command, script=replace(SCRIPT, sha256="6" * 64)),
        key(Command(command.script, ("--resolution", "64"), command.folder, environment=command.environment)),
        key(Command(command.script, command.arguments, "/elsewhere", environment=command.environment)),
        key(Command(command.script, command.arguments, command.folder, module="x", environment=command.environment)),
        key(Command(command.script, command.arguments, command.folder, environment={"ACCELERATE_X": "2"})),
        key(command, any_device=True),
        run_key(header, command, SCRIPT, weight_marks(tmp_path), any_device=False),
    ]
    assert len(set(keys)) == len(keys)


def test_the_environment_counts_but_for_the_terminals(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(command)
    for name in ("PWD", "COLUMNS", "TERM", "SSH_CONNECTION", "KITTY_WINDOW_ID", "_"):
        monkeypatch.setenv(name, "other")
    # The run's own launch variables count, and not those of this process.
    monkeypatch.setenv("ACCELERATE_X", "3")
    assert key(command) == before
    for name in ("CUDA_VISIBLE_DEVICES", "HF_HOME", "MY_OWN"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "other")
            assert key(command) != before, name


def test_each_thing_that_decides_a_query_changes_its_key(tmp_path: Path) -> None:
    image, other, edges, jpeg = (tmp_path / name for name in ("a.png", "b.png", "edges.png", "a.jpg"))
    for file, content in ((image, b"a"), (other, b"b"), (edges, b"c"), (jpeg, b"a")):
        file.write_bytes(content)
    keys = [
        query_key("run", image, None, None, None),
        query_key("other", image, None, None, None),
        query_key("run", other, None, None, None),
        query_key("run", jpeg, None, None, None),
        query_key("run", image, "", None, None),
        query_key("run", image, "a cat", None, None),
        query_key("run", image, "a cat", "", None),
        query_key("run", image, "a cat", "a", None),
        query_key("run", image, None, None, edges),
        query_key("run", image, None, None, other),
    ]
    assert len(set(keys)) == len(keys)
    # The bytes of an image count, and not its name.
    copy = tmp_path / "copy.png"
    copy.write_bytes(b"a")
    assert query_key("run", copy, None, None, None) == keys[0]


def test_the_weights_of_a_folder_are_all_that_may_be_meant(tmp_path: Path) -> None:
    for name in ("unet/a.safetensors", "b.safetensors", "deep/er/c.safetensors", "d.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    names = [Path(mark.path).relative_to(tmp_path).as_posix() for mark in weight_marks(tmp_path)]
    assert names == ["b.safetensors", "unet/a.safetensors"]
    assert [mark.path for mark in weight_marks(tmp_path / "d.bin")] == [str(tmp_path / "d.bin")]
    assert weight_marks(tmp_path / "gone") == []


def test_a_run_depends_on_what_it_read_and_on_what_lies_beside_that(tmp_path: Path) -> None:
    own, temporary, trace = tmp_path / "own", tmp_path / "temporary", tmp_path / "trace.zarr"
    work = temporary / "wholes" / "part0" / "work"
    for file in (
        *(
            "own/parts.py",
            "own/unet/config.json",
            "own/unet/w.safetensors",
            "own/unet/notes.txt",
            "own/far.safetensors",
        ),
        *("own/vae/v.safetensors", "temporary/data/0.png", "trace.zarr/zarr.json", "blobs/1", "hub/config.json"),
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"x")
    # As the cache of a hub has it: names that are links to contents.
    (tmp_path / "hub" / "model.safetensors").symlink_to(tmp_path / "blobs" / "1")
    work.mkdir(parents=True)
    (work / "unet").symlink_to(own / "unet")
    (work / "parts.py").symlink_to(own / "parts.py")
    read = [
        *(str(work / "unet" / "config.json"), str(work / "parts.py"), str(work / "gone.txt")),
        *(str(temporary / "data" / "0.png"), str(trace / "zarr.json"), str(tmp_path / "hub" / "config.json")),
        *("/proc/self/maps", pytest.__file__, json_file()),
    ]
    arguments = ("--vae", "vae", "--name=far.safetensors", "--prompt", "a" * 5000, "--rate", "1e-4", "--nul", "\0")
    marks = run_marks(read, arguments, work, own, (temporary, trace))
    assert [Path(mark.path).relative_to(tmp_path).as_posix() for mark in marks] == [
        *("hub/config.json", "hub/model.safetensors", "own/far.safetensors", "own/parts.py"),
        *("own/unet/config.json", "own/unet/w.safetensors", "own/vae/v.safetensors"),
    ]
    held = next(mark for mark in marks if mark.path.endswith("model.safetensors"))
    (tmp_path / "blobs" / "1").write_bytes(b"yy")
    assert mark_of(Path(held.path)) != held


def json_file() -> str:
    """A file of python's own modules."""
    import json

    return str(json.__file__)
