"""A run that depends on more than its trained weights: a frozen encoder, a module beside the script, bf16."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny import plain_script
from tiny import run as run_cold
from warm import Warm

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


class EncodedRun:
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
