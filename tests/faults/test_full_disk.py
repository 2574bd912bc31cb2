"""Full disks and quotas: one clear line, nothing torn, and the capture goes on when there is room."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from captures import Capture, check_same, done, kept, names, small_chunks, stamps
from tiny import plain_script
from warm import Warm


@pytest.fixture(scope="module")
def capture(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Capture:
    """64 samples in chunks of 32, and the whole of it."""
    made = Capture(warm, tmp_path_factory.mktemp("capture") / "run", count=64, rows=32)
    warm.run(made.command(made.folder / "whole" / "trace.zarr"), made.folder, prelude=made.prelude)
    return made


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 480 kB that is full soon. Only who may mount one has it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=480k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs can be mounted here: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (5000, "Chunk 0 of {store} cannot be written: File too large. Make room and run the capture again on demand"),
        (2500, "trace.weights.safetensors cannot be written: "),
    ],
    ids=["a chunk", "the weights"],
)
def test_a_file_that_may_not_grow_so_large(capture: Capture, tmp_path: Path, limit: int, words: str) -> None:
    """A quota by another name, for everybody who may not mount a disk: the limit on the size of a file."""
    store = tmp_path / "out" / "trace.zarr"
    small = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    said = capture.warm.run(capture.command(store), capture.folder, 1, capture.prelude + small)
    assert words.format(store=store) in said and len(said.splitlines()) == 1, said
    assert not [name for name in names(store.parent) if "partial" in name or "lock" in name]
    capture.warm.run(capture.command(store), capture.folder, prelude=capture.prelude)
    check_same(store.parent, capture.folder / "whole")


def test_a_disk_that_is_full_in_the_middle(capture: Capture, small_disk: Path) -> None:
    store = small_disk / "out" / "trace.zarr"
    rows = small_chunks(2)
    said = capture.warm.run(capture.command(store), capture.folder, 1, rows)
    assert "cannot be written: No space left on device. Make room" in said and "Traceback" not in said
    before, marks = stamps(store), done(store)
    assert 3 <= len(marks) < 32
    assert not [name for name in names(store.parent) if "partial" in name or "lock" in name]
    # Still full: the same line, and nothing is lost.
    said = capture.warm.run(capture.command(store), capture.folder, 1, rows)
    assert "No space left on device" in said
    kept(before, stamps(store))
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    capture.warm.run(capture.command(store), capture.folder, prelude=rows)
    kept(before, stamps(store))
    whole = capture.folder / "small" / "trace.zarr"
    capture.warm.run(capture.command(whole), capture.folder, prelude=rows)
    check_same(store.parent, whole.parent)


def test_a_training_that_is_captured_keeps_the_room_to_save_its_model(warm: Warm, small_disk: Path) -> None:
    """A trace that would fill the disk, on which the script saves afterwards, is not begun."""
    line = "dmin_trace.attach(accelerator, args, timesteps=3, dimension=2**14)"
    script = plain_script(small_disk / "script.py", attach=line)
    said = warm.run([script, "--output_dir", "out", "--count", "20"], small_disk)
    assert "The trace would take" in said and "to save what it trained" in said
    assert "the training continues" in said and len(said.splitlines()) == 1
    assert (small_disk / "out" / "state.pt").exists() and not (small_disk / "out.trace" / "trace.zarr").exists()
