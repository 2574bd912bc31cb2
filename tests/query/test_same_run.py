"""A query, and a capture that is continued, compute rows as the trace's were: frozen models, precision, device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import plain_script
from tiny import run as run_cold
from warm import Warm

from dmin_trace.command import recall
from dmin_trace.store import open_store

SETTINGS = ("--timesteps", "3", "--dimension", "64", "--dtype", "float32", "--transform", "none")
BF16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}
STOP = """
import os
import dmin_trace.store.layout; dmin_trace.store.layout.CHUNK_BYTES = 2 * 3 * 64
import dmin_trace.capture.recorder as r
sample = r.Recorder.sample
def seen(self, number, *rest):
    if number == 5: os.kill(os.getpid(), 15)
    sample(self, number, *rest)
r.Recorder.sample = seen
"""


class Run:
    """A module with a frozen encoder, started with bf16 as by `accelerate launch -m`, and the trace of its run."""

    def __init__(self, warm: Warm, folder: Path) -> None:
        self.warm, self.folder, self.trace = warm, folder, folder / "trace.zarr"
        self.script = folder / "pack" / "train.py"
        self.script.parent.mkdir()
        (folder / "pack" / "__init__.py").touch()
        (folder / "pack" / "parts.py").write_text("from safetensors.torch import save_file\n")
        text = plain_script(self.script, attach="", imports="from .parts import save_file").read_text()
        for before, after in {
            "self.points = torch.randn(count, 16, generator=torch.Generator().manual_seed(5))": "from PIL import Image;"
            "self.points = torch.stack([torch.from_numpy(np.array(Image.open(f).convert('L'), dtype=np.float32)) / 255 "
            "for f in sorted(Path(args.train_data_dir).glob('*.png'))])[:, None]; count = len(self.points)",
            'parser.add_argument("--count"': 'parser.add_argument("--train_data_dir"); parser.add_argument("--count"',
            'clean = batch["point"]': 'clean = encoder(batch["point"].flatten(1))',
            "model = Denoiser()": "model = Denoiser(); encoder = torch.nn.Linear(16, 16).requires_grad_(False); "
            "encoder.load_state_dict(torch.load('encoder.pt'))",
            '"/state.pt")': '"/state.pt"); save_file(dict(model.state_dict()), "w.safetensors")',
        }.items():
            assert text.count(before) == 1
            text = text.replace(before, after)
        self.script.write_text(text)
        self.encoder = torch.nn.Linear(16, 16)
        torch.save(self.encoder.state_dict(), folder / "encoder.pt")
        self.images = folder / "images"
        self.images.mkdir()
        for k in range(10):
            pixels = np.random.default_rng(k).integers(0, 255, (4, 4), dtype=np.uint8)
            Image.fromarray(pixels).save(self.images / f"{k:02d}.png")
        # Options are abbreviated, as argparse allows.
        self.arguments = ["--train_data", self.images]
        self.module = ["-m", "pack.train", *self.arguments]
        run_cold(self.module, folder, **BF16)
        self.capture(143, STOP, **BF16)

    def capture(self, code: int = 0, prelude: str = "", **environment: str) -> str:
        command = ["dmin-trace", "capture", "--weights", "w.safetensors", *SETTINGS, "--out", self.trace]
        return self.warm.run([*command, "--", "python", *self.module], self.folder, code, prelude, **environment)

    def query(self, *command: object, code: int = 0) -> str:
        """What a query with the image of sample 3 says, or else the sample that it finds, and its score."""
        ask = ["dmin-trace", "query", self.trace, self.images / "03.png", "-k", "1", "--score", "dmin"]
        said = self.warm.run([*ask, "--json", "answer.json", *command], self.folder, code)
        if code:
            return said
        [hit] = json.loads((self.folder / "answer.json").read_text())["queries"][0]["hits"]
        return f"{hit['sample']} {hit['score']:.2f}"

    @contextmanager
    def another_encoder(self) -> Iterator[None]:
        path = self.folder / "encoder.pt"
        before = path.read_bytes()
        torch.save(torch.nn.Linear(16, 16).state_dict(), path)
        yield
        path.write_bytes(before)


@pytest.fixture(scope="module")
def run(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(warm, tmp_path_factory.mktemp("same"))


def test_what_decides_a_row_is_recorded(run: Run) -> None:
    facts = open_store(run.trace, unfinished=True).header.run
    assert [(m.name, m.kind, m.numbers, m.in_steps) for m in facts.models] == [("encoder", "Linear", 272, True)]
    expected = {"device": "cpu", "mixed precision": "bf16", "autocast": "bfloat16", "models": "float32"}
    assert facts.conditions.items() >= expected.items()


def test_a_resumed_capture_has_the_traces_precision_and_frozen_models(run: Run) -> None:
    before = open_store(run.trace, unfinished=True).done.sum()
    said = run.capture(1)
    assert "its mixed precision is no, that of the trace is bf16" in said and len(said.splitlines()) == 1
    with run.another_encoder():
        said = run.capture(1, **BF16)
    assert "the 272 numbers of encoder (Linear) that do not train are not the same" in said
    assert open_store(run.trace, unfinished=True).done.sum() == before


def test_a_query_repeats_the_launch_and_refuses_another_run(run: Run) -> None:
    command = recall_in(run.folder, open_store(run.trace, unfinished=True).header.id)
    assert command is not None and command["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert run.query() == "3 3.00"
    with run.another_encoder():
        said = run.query(code=1)
    assert "the 272 numbers of encoder (Linear) that do not train are not the same" in said
    said = run.query("--", "python", *run.module, code=1)
    assert "its mixed precision is no, that of the trace is bf16" in said and len(said.splitlines()) == 1
    launch = ["accelerate", "launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no"]
    assert run.query("--", *launch, "--mixed_precision", "bf16", *run.module) == "3 3.00"
    said = run.query("--", run.script, *run.arguments, code=1)
    assert f"It is part of a package: start it in {run.folder} as python -m pack.train ARGS." in said


def test_a_launcher_is_run_as_given_and_its_jobs_refusal_is_one_line(run: Run) -> None:
    python = ["python", "-u", *run.module]
    ask = ["dmin-trace", "capture", "--weights", "w.safetensors", *SETTINGS, "--out", run.trace, "--", *python]
    said = run.warm.run(ask, run.folder, 1)
    assert "its mixed precision is no, that of the trace is bf16" in said and len(said.splitlines()) == 1
    running = run.warm.start(["dmin-trace", "estimate", *SETTINGS, "--", *python], run.folder)
    assert running.wait() == 0, running.said()
    assert "10 x 3" in running.out.read_text()


def recall_in(folder: Path, store_id: str) -> dict[str, str] | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        command = recall(store_id)
    return None if command is None else command.environment


def test_another_type_of_device_is_refused_unless_that_is_accepted(run: Run) -> None:
    from dmin_trace.capture.conditions import differing_condition

    theirs = open_store(run.trace, unfinished=True).header.run.conditions | {"device": "cuda"}
    ours = open_store(run.trace, unfinished=True).header.run.conditions
    refused = differing_condition(theirs, ours, any_device=False)
    assert refused.startswith("its device is cpu, that of the trace is cuda.") and "--any-device" in refused
    assert differing_condition(theirs, ours, any_device=True) == ""
