"""A command line with one prompt for all images: a query's prompt takes its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import digit_folder, run
from tiny_pipelines import command_line

import dmin_trace
from dmin_trace.errors import QueryError
from dmin_trace.query.capture import capture_queries
from dmin_trace.store import open_store

SCRIPT = """
import argparse
import zlib
from pathlib import Path
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

parser = argparse.ArgumentParser()
parser.add_argument("--instance_data_dir")
parser.add_argument("--instance_prompt")
parser.add_argument("--repeats", type=int, default=1)
parser.add_argument("--train_batch_size", type=int, default=2)
parser.add_argument("--output_dir")
parser.add_argument("--max_train_steps", type=int)
args = parser.parse_args()

class Denoiser(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(64 + 8 + 1, 32), torch.nn.Linear(32, 64)
    def forward(self, sample, timestep, words):
        seen = torch.cat([sample, words, timestep[:, None] / 1000], 1)
        return self.outer(torch.tanh(self.inner(seen)))

class Digits(torch.utils.data.Dataset):
    def __init__(self, folder):
        self.files = sorted(Path(folder).glob("*.png")) * args.repeats
    def __len__(self):
        return len(self.files)
    def __getitem__(self, k):
        return {"image": torch.from_numpy(np.asarray(Image.open(self.files[k])) / np.float32(127.5) - 1)[None]}

accelerator = Accelerator()
torch.manual_seed(0)
model = Denoiser()
words = torch.randn(1, 8, generator=torch.Generator().manual_seed(zlib.crc32(args.instance_prompt.encode())))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = torch.utils.data.DataLoader(Digits(args.instance_data_dir), batch_size=args.train_batch_size, drop_last=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
step = 0
while step < args.max_train_steps:
    for batch in loader:
        with accelerator.accumulate(model):
            clean = batch["image"].flatten(1)
            noise = torch.randn_like(clean)
            t = torch.randint(0, 1000, (len(clean),))
            loss = (model(clean + noise * t[:, None] / 1000, t, words.expand(len(clean), 8)) - noise).pow(2).mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        step += accelerator.sync_gradients
        if step >= args.max_train_steps:
            break
"""


def test_several_prompts_are_captured_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = sorted(digit_folder(tmp_path / "digits", 4).iterdir())
    (tmp_path / "train.py").write_text(SCRIPT)
    arguments = ["--instance_data_dir", "digits", "--instance_prompt", "a sks digit", "--output_dir", "out"]
    settings = ["--timesteps", "3", "--dimension", "8192", "--dtype", "float32", "--transform", "none"]
    # Each image twice in the training set: each is one sample, and one query.
    command = [tmp_path / "train.py", *arguments, "--max_train_steps", "5", "--repeats", "2"]
    run(["-m", "dmin_trace.cli.app", "run", *settings, "--", *command], tmp_path)
    path = tmp_path / "out.trace" / "trace.zarr"
    trace = open_store(path)
    assert trace.header.samples == 4
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with pytest.raises(dmin_trace.DminTraceError, match="came without its prompt"):
        dmin_trace.attribute(path, [images[2]], k=1)
    asked = [(images[2], "a sks digit"), (images[2], "-- a cat"), (images[1], "a sks digit")]
    found = capture_queries(trace, [image for image, _ in asked], [prompt for _, prompt in asked]).gradients
    for query, sample in ((0, 2), (2, 1)):
        assert np.allclose(found[query], trace.gradients(np.array([sample]))[0], atol=1e-6), query
    assert not np.allclose(found[1], found[0], atol=1e-2)
    # The answer names the files, and has them all if k is larger than their number.
    hits = dmin_trace.attribute(path, [images[2]], ["a sks digit"], k=10, score="dmin")[0]
    assert len(hits) == 4 and hits[0].score > 2.999
    assert [hit.columns["file_name"] for hit in hits] == [f"digits/{images[hit.sample].name}" for hit in hits]
    # The prompt stands on the command line, so one run has one prompt.
    with pytest.raises(QueryError, match="takes one prompt for all its images .* two prompts on one picture"):
        dmin_trace.attribute(path, [images[2]], ["a digit"], without=["a"])
    # A script that does not read the queries ends before it is captured on its own data.
    own = (
        (tmp_path / "train.py")
        .read_text()
        .replace("Digits(args.instance_data_dir)", f"Digits({str(tmp_path / 'digits')!r})")
    )
    (tmp_path / "own.py").write_text(own)
    command = ["own.py", *arguments, "--max_train_steps", "5"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QueryError, match=r"The script has 4 samples on 1 queries.* \{data\} .*dmin_trace.recording"):
        dmin_trace.attribute(path, [images[2]], ["p"], command=command, edited_script=True)
    # One that takes no data is not even started.
    (tmp_path / "own.py").write_text(own.replace("--instance_data_dir", "--pictures"))
    command = ["own.py", "--pictures", "digits", "--instance_prompt", "a sks digit", "--output_dir", "out"]
    with pytest.raises(QueryError, match=r"own.py is not known to take its data .* \{data\}"):
        dmin_trace.attribute(path, [images[2]], ["p"], command=command, edited_script=True)


def test_the_command_line_shows_how_to_give_prompts(tmp_path: Path) -> None:
    said, _ = command_line(["query", "--help"], tmp_path)
    for words in ("--prompt", "metadata.jsonl", "--num", "--seed"):
        assert words in said
