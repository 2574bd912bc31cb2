"""Several processes, one of which fails, is stopped, or cannot load a sample: all of them end at the same body."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
from captures import Capture, check_same, done, kept, small_chunks, stamps, start_ranks
from rank_scripts import GATHER
from tiny import plain_script, without_the_line
from warm import Running, Warm

from dmin_trace.store import open_store

RANK_1 = "import os\nif os.environ['RANK'] == '1':\n    "


def ended(group: list[Running]) -> list[int]:
    return [running.wait(90) for running in group]


def test_both_stop_for_a_signal_or_an_error_of_one_and_go_on(
    warm: Warm, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    capture = Capture(warm, tmp_path_factory.mktemp("capture") / "run", count=20, rows=2)
    text = capture.script.read_text()
    capture.script.write_text(text.replace("losses.append", "accelerator.gather(loss.detach()); losses.append"))
    warm.run(capture.command(capture.folder / "whole" / "trace.zarr"), capture.folder, prelude=capture.prelude)
    store = tmp_path / "out" / "trace.zarr"
    # Rank 1 has the chunks 1, 3, 5 and so on; its sample 6 is in chunk 3.
    told = (
        "import dmin_trace.capture.recorder as r; sample = r.Recorder.sample\n"
        "def seen(self, number, *rest):\n"
        "    if number == 6: os.kill(os.getpid(), 15)\n"
        "    sample(self, number, *rest)\n"
        "r.Recorder.sample = seen\n"
    ).replace("\n", "\n    ")
    group = start_ranks(capture, store, 2, RANK_1 + told + "\n")
    assert ended(group) == [128 + signal.SIGTERM] * 2, [running.said() for running in group]
    assert "SIGTERM: the current chunk is finished first" in group[1].said()
    assert "stopped by a signal to another process: 8 of 20 samples" in group[0].said()
    before = stamps(store)
    assert done(store) == {0, 1, 2, 3}

    # Pending are 4 to 9, so rank 1 has 5, 7 and 9.
    broken = "import dmin_trace.store.writer as s; write = s.Writer._write_files\n"
    broken += "def fail(self, chunk, *rest):\n    if chunk == 7: raise OSError(28, 'No space left on device')\n"
    broken += "    write(self, chunk, *rest)\ns.Writer._write_files = fail"
    group = start_ranks(capture, store, 2, RANK_1 + broken.replace("\n", "\n    ") + "\n")
    assert ended(group) == [1, 1], [running.said() for running in group]
    assert "Process 1 of 2 failed: Chunk 7 of" in group[0].said()
    assert "Chunk 7 of" in group[1].said() and "No space left on device" in group[1].said()
    assert all(len(running.said().strip().splitlines()) == 1 for running in group)
    # Chunk 8 was recorded while 7 was to be written.
    assert done(store) == {0, 1, 2, 3, 4, 5, 6, 8}
    kept(before, stamps(store))
    assert ended(start_ranks(capture, store, 2)) == [0, 0]
    check_same(store.parent, capture.folder / "whole")


def start_scripts(warm: Warm, script: Path, folder: Path, prefix: str, prelude: str = "") -> list[Running]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    return [
        warm.start(
            [script, "--output_dir", f"{prefix}{k}"],
            folder,
            small_chunks(2) + prelude,
            **common,
            RANK=str(k),
            LOCAL_RANK=str(k),
        )
        for k in range(2)
    ]


def test_in_a_training_an_error_of_one_ends_the_capture_of_both_and_neither_training(
    warm: Warm, tmp_path: Path
) -> None:
    line = "dmin_trace.attach(accelerator, args, timesteps=3, dimension=64, out='trace.zarr')"
    script = plain_script(tmp_path / "script.py", body=GATHER, attach=line)
    bare = without_the_line(script, tmp_path / "bare.py")
    assert ended(start_scripts(warm, bare, tmp_path, "without")) == [0, 0]
    hook = (
        "import dmin_trace.capture.recorder as r; compress, n = r.compress_gradient, []\n"
        "def fail(*a, **o):\n"
        "    n.append(1)\n"
        "    if len(n) == 7: raise RuntimeError('the hook is broken')\n"
        "    return compress(*a, **o)\n"
        "r.compress_gradient = fail"
    )
    group = start_scripts(warm, script, tmp_path, "with", RANK_1 + hook.replace("\n", "\n    ") + "\n")
    assert ended(group) == [0, 0], [running.said() for running in group]
    assert "failed: RuntimeError: the hook is broken" in group[0].said()
    assert all(running.said().count("the training continues") == 1 for running in group)
    for rank in (0, 1):
        for name in ("state.pt", "log.txt"):
            without = (tmp_path / f"without{rank}" / name).read_bytes()
            assert (tmp_path / f"with{rank}" / name).read_bytes() == without, (rank, name)
    assert done(tmp_path / "trace.zarr") == {0}


def test_a_sample_that_one_cannot_load_keeps_nobody_waiting(warm: Warm, tmp_path: Path) -> None:
    line = "dmin_trace.attach(accelerator, args, timesteps=3, dimension=64, out='trace.zarr')"
    script = plain_script(tmp_path / "script.py", body=GATHER, attach=line)
    torn = (
        "import dmin_trace.capture.accelerate.training_run as l; fetch = l.TrainingRun.fetch\n"
        "def fail(self, sample, seed):\n"
        "    if sample in (2, 7): raise OSError('torn')\n"
        "    return fetch(self, sample, seed)\n"
        "l.TrainingRun.fetch = fail\n"
    )
    group = start_scripts(warm, script, tmp_path, "with", torn)
    assert ended(group) == [0, 0], [running.said() for running in group]
    trace = open_store(tmp_path / "trace.zarr")
    assert trace.unranked.failed == (2, 7)
    assert np.flatnonzero(~trace.valid).tolist() == [2, 7]
    assert len(json.loads((trace.path / "zarr.json").read_text())["attributes"]["data_sha256"]) == 64
