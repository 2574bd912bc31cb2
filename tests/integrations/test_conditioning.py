"""A model that makes images from an image and a caption: a query says both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import digit_folder
from tiny_pipelines import command_line

from dmin_trace.store import open_store

SCRIPT = """
import argparse
import json
from pathlib import Path
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

parser = argparse.ArgumentParser()
parser.add_argument("--train_data_dir")
parser.add_argument("--conditioning_image_column")
parser.add_argument("--caption_column")
parser.add_argument("--output_dir")
parser.add_argument("--max_train_steps", type=int)
args = parser.parse_args()

class Denoiser(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(256, 8)
        self.inner, self.outer = torch.nn.Linear(64 + 64 + 8 + 1, 32), torch.nn.Linear(32, 64)
    def forward(self, sample, timestep, source, tokens):
        seen = [sample, source, self.words(tokens).mean(1), timestep[:, None] / 1000]
        return self.outer(torch.tanh(self.inner(torch.cat(seen, 1))))

class Pairs(torch.utils.data.Dataset):
    def __init__(self, folder):
        self.folder = Path(folder)
        self.rows = [json.loads(line) for line in (self.folder / "metadata.jsonl").read_text().splitlines()]
    def __len__(self):
        return len(self.rows)
    def pixels(self, name):
        with Image.open(self.folder / name) as image:
            return torch.from_numpy(np.asarray(image) / np.float32(127.5) - 1)[None]
    def __getitem__(self, k):
        row = self.rows[k]
        return {
            "pixel_values": self.pixels(row["file_name"]),
            "conditioning_pixel_values": self.pixels(row[args.conditioning_image_column + "_file_name"]),
            "input_ids": torch.tensor(list(row[args.caption_column].encode().ljust(12)[:12])),
        }

accelerator = Accelerator()
torch.manual_seed(0)
model = Denoiser()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = torch.utils.data.DataLoader(Pairs(args.train_data_dir), batch_size=2)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
step = 0
while step < args.max_train_steps:
    for batch in loader:
        with accelerator.accumulate(model):
            clean, source = batch["pixel_values"].flatten(1), batch["conditioning_pixel_values"].flatten(1)
            noise = torch.randn_like(clean)
            t = torch.randint(0, 1000, (len(clean),))
            loss = (model(clean + noise * t[:, None] / 1000, t, source, batch["input_ids"]) - noise).pow(2).mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        step += accelerator.sync_gradients
        if step >= args.max_train_steps:
            break
"""


def test_a_query_is_of_an_image_its_source_and_its_caption(tmp_path: Path) -> None:
    digit_folder(tmp_path / "data", 12)
    rows = [
        {"file_name": f"{k:04d}.png", "edges_file_name": f"{k + 6:04d}.png", "says": f"digit {k}"} for k in range(6)
    ]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "train.py").write_text(SCRIPT)
    columns = ("--conditioning_image_column", "edges", "--caption_column", "says")
    command = ("train.py", "--train_data_dir", "data", "--output_dir", "out", *columns, "--max_train_steps", "7")
    settings = ("--timesteps", "3", "--dimension", "8192", "--dtype", "float32", "--transform", "none")
    command_line(["run", *settings, "--", *command], tmp_path)
    trace = open_store(tmp_path / "out.trace" / "trace.zarr")
    assert trace.header.batch["input_ids"] == (1, 12)

    ask = ("query", "--score", "dmin", "out.trace/trace.zarr", "data/0002.png")
    _, said = command_line([*ask, "-k", 1, "--prompt", "digit 2"], tmp_path, code=1)
    assert "0002.png came without the one that it was made from" in said and "--conditioning" in said
    _, said = command_line([*ask, "-k", 1, "--conditioning", "data/0008.png"], tmp_path, code=1)
    assert "0002.png came without its prompt" in said

    sources, prompts = ("0008", "0009", "0008"), ("digit 2", "digit 2", "digit 3")
    given = [value for source in sources for value in ("--conditioning", f"data/{source}.png")]
    given += [value for prompt in prompts for value in ("--prompt", prompt)]
    command_line([*ask, *ask[4:] * 2, *given, "-k", 6, "--json", "hits.json"], tmp_path)
    answers = [answer["hits"] for answer in json.loads((tmp_path / "hits.json").read_text())["queries"]]
    best = [answer[0]["score"] for answer in answers]
    assert answers[0][0]["sample"] == 2
    assert best[0] == pytest.approx(3, abs=1e-4)
    # With another source or another caption it is no longer the training sample.
    assert np.all(np.array(best[1:]) < 3 - 1e-3)
