"""Mistaken identity: a capture is known again, only one writes, and a query says how much it has read."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from captures import SETTINGS, Capture, check_same, content, done, stamps
from PIL import Image
from tiny import plain_script
from warm import Running, Warm

from dmin_trace.capture.dataset import data_fingerprint
from dmin_trace.command import Script, script_of

STOP = """
import os
import dmin_trace.capture.recorder as r
sample = r.Recorder.sample
def seen(self, number, *rest):
    if number == 7: os.kill(os.getpid(), 15)
    sample(self, number, *rest)
r.Recorder.sample = seen
"""
HELD = """
import os, time
import dmin_trace.capture.recorder as r
sample = r.Recorder.sample
def held(self, number, *rest):
    while number == 7 and not os.path.exists("go on"): time.sleep(0.02)
    sample(self, number, *rest)
r.Recorder.sample = held
"""


@pytest.fixture(scope="module")
def capture(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Capture:
    """20 samples in chunks of 2, whose script takes its data from the environment; and the whole of it."""
    made = Capture(warm, tmp_path_factory.mktemp("capture") / "run", count=20, rows=2)
    text = made.script.read_text()
    data = "self.points = torch.randn(count, 16, generator=torch.Generator().manual_seed(5))"
    assert text.count(data) == 1
    made.script.write_text(text.replace(data, f"{data}; import os; exec(os.environ.get('ON_DATA', ''))"))
    warm.run(made.command(made.folder / "whole" / "trace.zarr"), made.folder, prelude=made.prelude)
    return made


@pytest.fixture(scope="module")
def store(capture: Capture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that was stopped after four of its ten chunks. What is refused leaves it so."""
    path = tmp_path_factory.mktemp("stopped") / "out" / "trace.zarr"
    capture.warm.run(capture.command(path), capture.folder, 143, capture.prelude + STOP)
    assert done(path) == {0, 1, 2, 3}
    return path


@pytest.mark.parametrize(
    ("change", "theirs", "ours"),
    [
        ("self.points = self.points.flip(0)", "the fingerprint of its content is", "the fingerprint of its content is"),
        ("self.points[19, 3] += 1e-3", "the fingerprint of its content is", "the fingerprint of its content is"),
        ("count = 19; self.points = self.points[:19]", "it has 20 samples", "it has 19 samples"),
    ],
    ids=["order", "content", "count"],
)
def test_another_data_set_is_refused(capture: Capture, store: Path, change: str, theirs: str, ours: str) -> None:
    before = stamps(store)
    said = capture.warm.run(
        capture.command(store, "--edited-script"), capture.folder, 1, capture.prelude, ON_DATA=change
    )
    assert f"That of the trace: {theirs}" in said and f"that of this run: {ours}" in said
    found, expected = said.split("That of the trace: ")[1].split("; that of this run: ")
    assert found != expected.split(". Give")[0] and len(said.splitlines()) == 1
    assert stamps(store) == before


def test_other_settings_and_weights_are_refused_with_both_values(capture: Capture, store: Path, tmp_path: Path) -> None:
    before = stamps(store)
    other = [part if part != "64" else "128" for part in capture.command(store)]
    said = capture.warm.run(other, capture.folder, 1, capture.prelude)
    assert "its dimension is 64, that of this run is 128" in said
    from safetensors.torch import load_file, save_file

    weights = {name: value + 1 for name, value in load_file(capture.weights).items()}
    save_file(weights, tmp_path / "other.safetensors")
    other = [part if part != capture.weights else tmp_path / "other.safetensors" for part in capture.command(store)]
    said = capture.warm.run(other, capture.folder, 1, capture.prelude)
    assert "its weights are" in said and "those of this run" in said
    assert stamps(store) == before


def test_an_edited_script_is_refused_unless_that_is_meant(capture: Capture, store: Path) -> None:
    before = content(store.parent / "trace.zarr"), (store.parent / "trace.weights.safetensors").stat().st_mtime_ns
    text = capture.script.read_text()
    was = script_of(capture.script).sha256
    capture.script.write_text(text + "\n# edited\n")
    try:
        now = script_of(capture.script).sha256
        said = capture.warm.run(capture.command(store), capture.folder, 1, capture.prelude)
        assert f"the SHA-256 of script.py is {now[:16]}, that of the trace's 'script.py' is {was[:16]}" in said
        assert "continue with --edited-script" in said and len(said.splitlines()) == 1
        assert (content(store), (store.parent / "trace.weights.safetensors").stat().st_mtime_ns) == before
        capture.warm.run(capture.command(store, "--edited-script"), capture.folder, prelude=capture.prelude)
    finally:
        capture.script.write_text(text)
    check_same(store.parent, capture.folder / "whole")


def test_two_captures_of_one_store_are_one_too_many(capture: Capture, tmp_path: Path) -> None:
    store = tmp_path / "out" / "trace.zarr"
    first = capture.warm.start(capture.command(store), capture.folder, capture.prelude + HELD)
    wait_for(store, 3, first)
    weights = (store.parent / "trace.weights.safetensors").stat()
    soon = "import dmin_trace.store.lock; dmin_trace.store.lock.WAIT_SECONDS = 0.3\n"
    said = capture.warm.run(capture.command(store), capture.folder, 1, capture.prelude + soon)
    assert f"Another capture is writing {store}" in said and len(said.splitlines()) == 1
    assert (store.parent / "trace.weights.safetensors").stat() == weights
    # While it runs, what is done can be asked.
    asked = capture.warm.start(
        ["dmin-trace", "query", store, "--sample", "1", "-k", "2", "--json", "answer.json"], tmp_path
    )
    assert asked.wait() == 0, asked.said()
    facts = json.loads((tmp_path / "answer.json").read_text())
    assert "searched 6 of 20 samples; the capture is unfinished" in asked.out.read_text()
    assert (facts["trace"]["samples_searched"], facts["trace"]["complete"]) == (6, False)
    (capture.folder / "go on").touch()
    assert first.wait() == 0
    check_same(tmp_path / "out", capture.folder / "whole")


def wait_for(store: Path, chunks: int, running: Running) -> None:
    until = time.monotonic() + 60
    while len(done(store)) < chunks:
        assert time.monotonic() < until, running.said()
        time.sleep(0.005)


def test_the_script_of_a_query_is_that_of_the_trace(warm: Warm, tmp_path: Path) -> None:
    """An image is asked of a capture that is not finished; its script is checked first."""
    script = plain_script(tmp_path / "script.py", attach="")
    text = script.read_text()
    for before, after in {
        "self.points = torch.randn(count, 16, generator=torch.Generator().manual_seed(5))": "from PIL import Image; "
        "self.points = torch.stack([torch.from_numpy(np.array(Image.open(file).convert('L'), dtype=np.float32)) / 255 "
        "for file in sorted(Path(args.train_data_dir).glob('*.png'))])[:, None]; count = len(self.points)",
        'parser.add_argument("--count"': 'parser.add_argument("--train_data_dir"); parser.add_argument("--count"',
        'clean = batch["point"]': 'clean = batch["point"].flatten(1)',
    }.items():
        assert text.count(before) == 1
        text = text.replace(before, after)
    script.write_text(text)
    images = tmp_path / "images"
    images.mkdir()
    for k in range(20):
        pixels = np.random.default_rng(k).integers(0, 255, (4, 4), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{k:02d}.png")
    give = "\n    import safetensors.torch; safetensors.torch.save_file(dict(model.state_dict()), 'w.safetensors')"
    trained = tmp_path / "trained.py"
    trained.write_text(text.replace("optimizer = torch.optim", "optimizer = torch.optim", 1) + "\n")
    trained.write_text(text.replace('"/state.pt")', f'"/state.pt"){give}', 1))
    warm.run([trained, "--train_data_dir", images], tmp_path)
    store = tmp_path / "trace.zarr"
    command = ["dmin-trace", "capture", "--weights", "w.safetensors", *SETTINGS, "--out", store, "--", script]
    rows = "import dmin_trace.store.layout; dmin_trace.store.layout.CHUNK_BYTES = 2 * 3 * 64\n"
    warm.run([*command, "--train_data_dir", images], tmp_path, 143, rows + STOP)
    ask = ["dmin-trace", "query", store, images / "03.png", "-k", "3", "--score", "dmin"]
    asked = warm.start(ask, tmp_path)
    assert asked.wait() == 0, asked.said()
    shown = asked.out.read_text()
    assert "searched 8 of 20 samples; the capture is unfinished" in shown
    # The image is sample 3, which is among what is done.
    first = next(line for line in shown.splitlines() if " 1 " in line or line.strip().startswith("1"))
    assert " 3 " in first.replace("│", " "), shown
    script.write_text(text + "\n# edited\n")
    said = warm.run(ask, tmp_path, 1)
    assert "the SHA-256 of script.py is" in said and "--edited-script" in said
    warm.run([*ask, "--edited-script"], tmp_path)


def test_a_data_set_is_known_by_its_count_order_and_content() -> None:
    points = torch.randn(100, 4, generator=torch.Generator().manual_seed(1))
    words = [f"point {k}" for k in range(100)]

    def of(values: torch.Tensor, texts: list[str]) -> str:
        return data_fingerprint(len(values), lambda k: {"x": values[k : k + 1], "text": [texts[k]], "n": k * 0.5})

    known = of(points, words)
    assert len(known) == 64 and of(points.clone(), list(words)) == known
    assert of(points[:99], words) != known and of(points.flip(0), words) != known
    assert of(points, [*words[:-1], "other"]) != known and of(points.double(), words) != known
    # One that gives something else each time has no fingerprint, nor one whose batches cannot be looked into.
    assert data_fingerprint(100, lambda k: {"x": torch.rand(3)}) == ""
    assert data_fingerprint(100, lambda k: {"x": torch.eye(3).to_sparse()}) == ""
    # A sample that fails to load is part of what is known.
    torn = data_fingerprint(8, lambda k: points[k] if k != 3 else points[1000])
    assert len(torn) == 64 and torn != data_fingerprint(8, lambda k: points[k])
    assert script_of("no such file") == Script()
