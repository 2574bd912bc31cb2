"""Small real things for tests to run: images, training scripts, and a way to run a script as a user would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_digits.py"

PLAIN_SCRIPT = """
import argparse
import random
from pathlib import Path
import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
{imports}

class Denoiser(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(17, 24)
        self.drop = torch.nn.Dropout(0.3)
        self.outer = torch.nn.Linear(24, 16)
    def forward(self, sample, timestep):
        t = timestep.reshape(-1, 1).float() / 1000
        return self.outer(self.drop(torch.tanh(self.inner(torch.cat([sample, t.expand(len(sample), 1)], 1)))))

class Points(torch.utils.data.Dataset):
    def __init__(self, count):
        self.points = torch.randn(count, 16, generator=torch.Generator().manual_seed(5))
        self.caption = ["point %d" % i for i in range(count)]
    def __len__(self):
        return len(self.points)
    def __getitem__(self, index):
        return {{"point": self.points[index], "index": index, "image": self.points[index].reshape(1, 4, 4)}}

parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", default="out")
parser.add_argument("--num_epochs", type=int, default=2)
parser.add_argument("--count", type=int, default=10)
args = parser.parse_args()

def main():
    torch.manual_seed(0); random.seed(0); np.random.seed(0)
    {accelerator}
    {attach}
    model = Denoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    loader = torch.utils.data.DataLoader(Points(args.count), batch_size=4, shuffle=True)
    {prepare}
    losses, total = [], torch.zeros(())
    global_step = 0
    for epoch in range(args.num_epochs):
        model.train()
        for step, batch in enumerate({loader}):
            {body}
    Path(args.output_dir).mkdir(exist_ok=True)
    torch.save({{"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                 "scheduler": scheduler.state_dict(), "random": [torch.rand(3), random.random(), np.random.rand()],
                 "grads": [p.grad for p in model.parameters()], "modes": [m.training for m in model.modules()]}},
               args.output_dir + "/state.pt")
    Path(args.output_dir, "log.txt").write_text(
        repr([losses, total.item(), global_step, loss.item(), epoch, step, batch["index"].tolist()]))
main()
"""

BODY = """clean = batch["point"]
            noise = torch.randn_like(clean)
            t = torch.randint(0, 1000, (len(clean),))
            loss = (model(clean + noise * t.reshape(-1, 1) / 1000, t) - noise).pow(2).mean()
            accelerator.backward(loss)
            optimizer.step(); scheduler.step(); optimizer.zero_grad()
            losses.append(loss.item()); total += loss.detach(); global_step += 1"""


def plain_script(path: Path, **parts: str) -> Path:
    """Writes a small accelerate script without diffusers; `parts` replaces pieces of it."""
    pieces = {
        "imports": "import dmin_trace",
        "accelerator": "accelerator = Accelerator()",
        "attach": "dmin_trace.attach(accelerator, args, timesteps=3, dimension=64, dtype='float32', transform='none')",
        "prepare": "model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)",
        "loader": "loader",
        "body": BODY,
    } | parts
    path.write_text(PLAIN_SCRIPT.format(**pieces), encoding="utf-8")
    return path


def digit_folder(folder: Path, count: int, first: int = 0) -> Path:
    """Writes scikit-learn's digits `first` to `first + count` as 8x8 PNG files."""
    folder.mkdir(parents=True)
    for k, pixels in enumerate(load_digits().images[first : first + count]):
        Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)).save(folder / f"{k:04d}.png")
    return folder


def without_the_line(script: Path, path: Path) -> Path:
    """A copy of a script that does not know dmin_trace."""
    text, removed = re.subn(r"^\s*(import dmin_trace|dmin_trace\.attach\(.*)\n", "", script.read_text(), flags=re.M)
    if removed != 2 or "dmin_trace.attach" in text:
        raise ValueError(f"{script} does not have one import and one line to remove")
    path.write_text(text, encoding="utf-8")
    return path


def run(command: Sequence[object], folder: Path, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a Python script or `-m module` with arguments as a user would, warnings being errors in our own code."""
    ran = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**os.environ, "XDG_STATE_HOME": str(folder / "state"), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    if ran.returncode != code:
        raise AssertionError(f"exit code {ran.returncode}, expected {code}\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}")
    return ran
