"""A query that was asked before is answered without the script, bit for bit the same; after any change it is not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoded_run import EncodedRun
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from warm import Warm

import dmin_trace
from dmin_trace.errors import TraceError, WeightsError
from dmin_trace.query.script_runs import STARTING
from dmin_trace.start import LOADING


@dataclass
class Asked:
    """Queries of a run, in this process.

    stages: what the last query did, as it showed it.
    """

    run: EncodedRun
    stages: list[str] = field(default_factory=list)

    def __call__(self, *samples: int, **options: Any) -> NDArray[np.float32]:
        """The gradients of the images of samples."""
        self.stages = []
        images = [self.run.images / f"{sample:02d}.png" for sample in samples]
        with dmin_trace.open_trace(self.run.trace, unfinished=True) as trace:
            queries = trace.query_images(images, progress=self.stages.append, **options)
        assert queries.names == tuple(image.name for image in images)
        return queries.gradients

    @property
    def script_ran(self) -> bool:
        return STARTING in self.stages


@pytest.fixture(scope="module")
def run(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> EncodedRun:
    return EncodedRun(warm, tmp_path_factory.mktemp("again"))


@pytest.fixture
def ask(run: EncodedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    """Asks with an empty cache, and leaves the run as it was."""
    monkeypatch.setenv("XDG_STATE_HOME", str(run.folder / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept = {path: path.read_bytes() for path in (*run.folder.rglob("*.p[yt]"), *run.folder.rglob("*.safetensors"))}
    yield Asked(run)
    for path, content in kept.items():
        if path.read_bytes() != content:
            path.write_bytes(content)


def test_it_is_answered_without_the_script_and_bit_for_bit_the_same(ask: Asked) -> None:
    first = ask(3)
    assert [stage for stage in ask.stages if stage.startswith(("Starting", "Loading", "Gradients"))] == [
        *(STARTING, LOADING, "Gradients 0 of 1", "Gradients 1 of 1")
    ]
    again = ask(3)
    assert not ask.script_ran
    assert again.tobytes() == first.tobytes() and again.dtype == first.dtype
    # Of three queries, two are new.
    three = ask(5, 3, 4)
    assert "Gradients 2 of 2" in ask.stages
    assert three[1].tobytes() == first[0].tobytes()
    assert not np.array_equal(three[0], three[2])
    # Each is what it is alone.
    alone = ask(4, cache=False)
    assert ask.script_ran and alone[0].tobytes() == three[2].tobytes()
    assert ask(4, 5, 4).tobytes() == three[[2, 0, 2]].tobytes()
    assert not ask.script_ran


def test_without_the_cache_nothing_is_kept(ask: Asked) -> None:
    ask(3, cache=False)
    assert not Path(os.environ["XDG_CACHE_HOME"]).exists()


def test_what_changes_is_captured_again_or_refused_as_before(ask: Asked, tmp_path: Path) -> None:
    run, weights = ask.run, ask.run.folder / "trace.weights.safetensors"
    first = ask(3)
    # Another image under the same name.
    image = run.images / "03.png"
    before = image.read_bytes()
    shutil.copyfile(run.images / "07.png", image)
    assert not np.array_equal(ask(3), first) and ask.script_ran
    image.write_bytes(before)
    assert ask(3).tobytes() == first.tobytes() and not ask.script_ran
    # The same weights elsewhere, and others in their place.
    copy = Path(shutil.copyfile(weights, tmp_path / "copy.safetensors"))
    assert ask(3, weights=copy).tobytes() == first.tobytes() and ask.script_ran
    ask(3, weights=copy)
    assert not ask.script_ran
    values = load_file(weights)
    save_file(values | {"inner.bias": values["inner.bias"] + np.float32(1e-3)}, copy)
    with pytest.raises(WeightsError, match="The weights are not those of the trace"):
        ask(3, weights=copy)
    assert ask(3).tobytes() == first.tobytes() and not ask.script_ran
    # A module beside the script is read again.
    (run.script.parent / "parts.py").write_text("from safetensors.torch import save_file\nMORE = 1\n")
    ask(3)
    assert ask.script_ran
    # A model that the script loads.
    with run.another_encoder(), pytest.raises(WeightsError, match=r"of encoder \(Linear\) that do not train"):
        ask(3)
    assert ask(3).tobytes() == first.tobytes() and ask.script_ran
    # The script itself.
    text = run.script.read_text()
    run.script.write_text(text + "# edited\n")
    with pytest.raises(TraceError, match="The script is not the one that made"):
        ask(3)
    assert ask(3, edited_script=True).tobytes() == first.tobytes() and ask.script_ran
    ask(3, edited_script=True)
    assert not ask.script_ran
    with pytest.raises(TraceError, match="The script is not the one that made"):
        ask(3)


def test_a_damaged_entry_is_made_again(ask: Asked, caplog: pytest.LogCaptureFixture) -> None:
    first = ask(3)
    [entry] = Path(os.environ["XDG_CACHE_HOME"]).rglob("*.npz")
    entry.write_bytes(entry.read_bytes()[:500])
    assert ask(3).tobytes() == first.tobytes() and ask.script_ran
    assert f"{entry} cannot be used" in caplog.text
    ask(3)
    assert not ask.script_ran


def test_the_command_line_says_what_takes_the_time(run: EncodedRun, tmp_path: Path) -> None:
    command = ["dmin-trace", "query", run.trace, run.images / "03.png"]
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}

    def said(*options: str) -> str:
        return run.warm.run([*command, *options], run.folder, **cache)

    first = said("-v")
    for stage in ("Checking the queries", STARTING, LOADING, "Gradients", "Searching"):
        assert f"dmin-trace: {stage}: " in first, stage
    assert "0 of 1 queries are known from before" in first
    again = said("-v", "-k", "2", "--score", "dmin")
    assert "1 of 1 queries are known from before" in again
    assert "Searching" in again and STARTING not in again
    assert STARTING in said("-v", "--no-cache")
    assert said() == ""
    # Other commands ask in the same way.
    command[1] = "scores"
    assert STARTING not in said("-v", "--out", "scores.npy")
    assert STARTING in said("-v", "--out", "scores.npy", "--no-cache")
