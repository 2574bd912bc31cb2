"""kill -9 at random moments, Ctrl-C and SIGTERM: what is done stays, what is not is done again, nothing is left."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from captures import Capture, check_same, chunk_files, done, kept, scribble, stamps, start_ranks
from warm import Running, Warm

from dmin_trace.store import open_store


@pytest.fixture(scope="module")
def capture(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Capture:
    """40 samples in chunks of 2, captured once without interruption to `whole.zarr`."""
    made = Capture(warm, tmp_path_factory.mktemp("capture") / "run", count=40, rows=2)
    made.warm.run(made.command(made.folder / "whole" / "trace.zarr"), made.folder, prelude=made.prelude)
    return made


def wait_until_done(store: Path, chunks: int, running: Running) -> None:
    """Waits until so many chunks are done."""
    until = time.monotonic() + 60
    while len(done(store)) < chunks:
        assert time.monotonic() < until, running.said()
        time.sleep(0.005)


def test_a_capture_that_is_killed_again_and_again_is_the_whole_one(capture: Capture, tmp_path: Path) -> None:
    generator = random.Random(6)
    store = tmp_path / "out" / "trace.zarr"
    before: dict[str, tuple[int, int]] = {}
    for wanted in (0, 0, 1, 2, 3, 4):
        running = capture.warm.start(capture.command(store), capture.folder, prelude=capture.prelude)
        wait_until_done(store, wanted, running)
        time.sleep(generator.uniform(0, 0.3 if wanted == 0 else 0.02))
        running.kill()
        assert running.wait() == -signal.SIGKILL
        after = stamps(store)
        kept(before, after)
        before = after
        scribble(store, generator)
    assert 4 <= len(done(store)) < 20
    capture.warm.run(capture.command(store), capture.folder, prelude=capture.prelude)
    kept(before, stamps(store))
    check_same(tmp_path / "out", capture.folder / "whole")


@pytest.mark.parametrize(
    ("moment", "left"),
    [
        ("dmin_trace.store.writer.sync_tree = kill", ".trace.zarr.*.partial"),
        ("save = w.save_file; w.save_file = lambda *a, **o: (save(*a, **o), kill())", ".trace.weights.*.partial"),
        ("dmin_trace.store.Writer.finish = kill", "trace.zarr"),
    ],
)
def test_what_is_killed_where_it_leaves_something_is_swept(
    capture: Capture, tmp_path: Path, moment: str, left: str
) -> None:
    store = tmp_path / "out" / "trace.zarr"
    kill = (
        "import os, signal, dmin_trace.capture.weight_files as w\n"
        f"kill = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)\n{moment}\n"
    )
    # What the store itself holds of such files, a killed write left in a chunk that is done later.
    running = capture.warm.start(capture.command(store), capture.folder, prelude=capture.prelude + kill)
    assert running.wait() == -signal.SIGKILL
    assert list((tmp_path / "out").glob(left)) and (tmp_path / "out" / ".trace.zarr.lock").exists()
    if store.exists():
        (store / "grad" / "c" / "3" / "0" / "0.123.partial").write_bytes(b"torn")
    capture.warm.run(capture.command(store), capture.folder, prelude=capture.prelude)
    check_same(tmp_path / "out", capture.folder / "whole")


@pytest.mark.parametrize(("which", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_signal_finishes_the_chunk_in_hand_and_says_how_to_go_on(
    capture: Capture, tmp_path: Path, which: signal.Signals, name: str
) -> None:
    store = tmp_path / "out" / "trace.zarr"
    # Chunks of 16, so that one is in hand; the first sample of the second asks for the signal itself.
    signals = (
        "import os, signal, dmin_trace.capture.recorder as r\n"
        "dmin_trace.store.layout.CHUNK_BYTES = 16 * 3 * 64\n"
        "sample = r.Recorder.sample\n"
        "def seen(self, number, *rest):\n"
        f"    if number == 19: os.kill(os.getpid(), {int(which)})\n"
        "    sample(self, number, *rest)\n"
        "r.Recorder.sample = seen\n"
    )
    said = capture.warm.run(capture.command(store), capture.folder, 128 + which, capture.prelude + signals)
    assert said.count(f"{name}: the current chunk is finished first, 13 more samples; a second one stops at once.") == 1
    assert said.count(f"stopped by {name}: 32 of 40 samples are in") == 1 and "continues where it stopped" in said
    assert "Traceback" not in said
    assert done(store) == {0, 1} and not (tmp_path / "out" / ".trace.zarr.lock").exists()
    before = stamps(store)
    capture.warm.run(capture.command(store), capture.folder, prelude=capture.prelude)
    kept(before, stamps(store))
    trace, whole = open_store(store), open_store(capture.folder / "whole" / "trace.zarr")
    assert trace.complete and (trace.norm == whole.norm).all()


def test_a_second_signal_stops_at_once(capture: Capture, tmp_path: Path) -> None:
    store = tmp_path / "out" / "trace.zarr"
    slow = (
        "import time, dmin_trace.capture.recorder as r\n"
        "dmin_trace.store.layout.CHUNK_BYTES = 32 * 3 * 64\n"
        "take = r.Recorder.take\n"
        "r.Recorder.take = lambda self, body: (time.sleep(0.1), take(self, body))\n"
    )
    running = capture.warm.start(capture.command(store), capture.folder, capture.prelude + slow)
    until = time.monotonic() + 60
    while not store.exists() and time.monotonic() < until:
        time.sleep(0.01)
    running.kill(signal.SIGTERM)
    while "current chunk" not in running.said() and time.monotonic() < until:
        time.sleep(0.01)
    running.kill(signal.SIGTERM)
    assert running.wait(20) == -signal.SIGTERM
    assert done(store) == set()
    capture.warm.run(capture.command(store), capture.folder, prelude=capture.prelude)
    assert chunk_files(store)[0] and open_store(store).complete


def test_when_one_of_two_processes_is_killed_the_other_ends_with_one_line(capture: Capture, tmp_path: Path) -> None:
    store = tmp_path / "out" / "trace.zarr"
    group = start_ranks(capture, store, 2)
    wait_until_done(store, 3, group[0])
    group[1].kill()
    assert group[1].wait() == -signal.SIGKILL
    assert group[0].wait(60) == 1
    said = group[0].said()
    assert said.count("Process 0 of 2 no longer reaches the others, so one of them has ended") == 1
    assert "Traceback" not in said and len(said.strip().splitlines()) == 1
    before = stamps(store)
    assert 3 <= len(done(store)) < 20
    for running in start_ranks(capture, store, 2):
        assert running.wait() == 0, running.said()
    kept(before, stamps(store))
    check_same(tmp_path / "out", capture.folder / "whole")
