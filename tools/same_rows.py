"""Checks that two versions of dmin_trace capture the same rows, bit for bit.

    python tools/same_rows.py --work DIR --old PYTHON --new PYTHON

Each PYTHON is an interpreter with one version installed. With each, small models are trained and captured under several
settings: the two examples (with the line and on demand, one in bfloat16, one in two processes), a Lightning module and
a plain loop. The stores are read with zarr-python and compared, nothing decoded. The exit code is 1 if a bit differs.

The stores stay in DIR/old and DIR/new. A side that is not given is taken from there, so the old one can be made once:

    python tools/same_rows.py --work DIR --old PYTHON
    python tools/same_rows.py --work DIR --new PYTHON

This program itself needs what `tools/tiny_models.py` needs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import tiny_models

Array = NDArray[Any]
Settings = Mapping[str, str | int]

ARRAYS = ("grad", "scale", "norm", "loss")
"""What a store holds for each sample, beside the sample's index."""

FINISHED = "finished.txt"
"""The file that ends a side's folder. It names the package that wrote the stores."""

SETTINGS: Mapping[str, Settings] = {
    "defaults": {},
    "paper": {"transform": "none", "projection": "uniform", "dtype": "float32"},
    "draws": {"dtype": "float16", "dimension": 4096, "draws": 2, "timesteps": "100,500,900"},
    "packed": {"transform": "none", "dimension": 1024, "timesteps": 3, "codec": "blosc"},
}

DIGITS = ("--max_train_samples", "48", "--max_train_steps", "6", "--train_batch_size", "16", "--lr_warmup_steps", "0")
LORA = ("--max_train_steps", "4", "--train_batch_size", "2", "--learning_rate", "1e-3", "--resolution", "64")


# -- what differs between the two versions -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The numbers of a store by sample, in the bits in which they are stored.

    sample: (N,) the data set index of each row, in the order of the rows.
    arrays: by name, each with N as its first dimension, in the same order.
    """

    sample: Array
    arrays: Mapping[str, Array]


def read_separate_arrays(path: Path) -> Rows:
    """Reads a store that has one Zarr array for each kind of number."""
    group = zarr.open_group(path, mode="r")
    arrays = {name: np.asarray(group[name]) for name in ARRAYS if name in group}
    return Rows(np.asarray(group["sample"]), arrays)


def read_one_array(path: Path) -> Rows:
    """Reads a store whose numbers per sample are one array: sample, T norms, T losses, T scales (float64)."""
    group = zarr.open_group(path, mode="r")
    grad, numbers = np.asarray(group["grad"]), np.asarray(group["numbers"])
    norm, loss, scale = np.split(numbers[:, 1:].astype(np.float32), 3, axis=1)
    arrays = {"grad": grad, "norm": norm, "loss": loss} | ({"scale": scale} if grad.dtype == np.int8 else {})
    return Rows(numbers[:, 0].astype(np.int64), arrays)


@dataclass(frozen=True)
class Side:
    """How one version is used and how its stores are read.

    name: of its folder.
    program: what follows the interpreter to start the command line.
    names: the names of settings that have another name in this version.
    timesteps: the attribute of a recording that its inner loop goes through.
    step: the method of a recording that opens a training step.
    read: reads one of its stores.
    """

    name: str
    program: tuple[str, ...]
    names: Mapping[str, str]
    timesteps: str
    step: str
    read: Callable[[Path], Rows]

    def name_of(self, setting: str) -> str:
        """The name of a setting in this version."""
        return self.names.get(setting, setting)

    def options(self, settings: Settings) -> list[str]:
        """The command line's options for settings."""
        return [word for name, value in settings.items() for word in (f"--{self.name_of(name)}", str(value))]

    def keywords(self, settings: Settings) -> str:
        """The keyword arguments for settings, as source text."""
        given = {self.name_of(name): _python_value(value) for name, value in settings.items()}
        return ", ".join(f"{name}={value!r}" for name, value in given.items())


OLD = Side("old", ("-m", "dmin_trace.cli"), {"transform": "precondition"}, "slots", "body", read_separate_arrays)
NEW = Side("new", ("-m", "dmin_trace"), {}, "timesteps", "step", read_one_array)


def _python_value(value: str | int) -> object:
    """An option's value as Python code gives it: "100,500" is a tuple of integers."""
    if isinstance(value, str) and "," in value:
        return tuple(int(part) for part in value.split(","))
    return value


# -- the captures ------------------------------------------------------------------------------------------------------

PLAIN = """
import sys
import torch
import dmin_trace

class Denoiser(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Conv2d(2, 12, 3, padding=1)
        self.norm = torch.nn.GroupNorm(3, 12)
        self.drop = torch.nn.Dropout(0.2)
        self.outer = torch.nn.Conv2d(12, 1, 3, padding=1)

    def forward(self, sample, timestep):
        t = timestep.reshape(-1, 1, 1, 1).float() / 1000
        hidden = self.inner(torch.cat([sample, t.expand_as(sample)], 1))
        return self.outer(self.drop(torch.nn.functional.silu(self.norm(hidden))))

torch.manual_seed(0)
images = torch.randn(21, 1, 8, 8)
# A weight whose channels are last has a gradient that is laid out likewise.
model = Denoiser().to(memory_format=torch.channels_last)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

def training_loss(clean):
    noise = torch.randn_like(clean)
    t = torch.randint(0, 1000, (len(clean),))
    noisy = clean + noise * t.reshape(-1, 1, 1, 1) / 1000
    return (model(noisy, t) - noise).pow(2).mean()

for _ in range(5):
    training_loss(images[torch.randperm(21)[:7]]).backward()
    optimizer.step()
    optimizer.zero_grad()

def record(out, **settings):
    with dmin_trace.recording(model, samples=len(images), out=out, **settings) as recording:
        for i in recording.samples:
            for k in recording.TIMESTEPS:
                with recording.STEP(i, k):
                    training_loss(images[i : i + 1]).backward()

"""

LIGHTNING = """
import torch
from dmin_trace.integrations.lightning import TraceCallback
from lightning.pytorch import LightningModule, Trainer

class Points(torch.utils.data.Dataset):
    def __init__(self):
        self.points = torch.randn(13, 16, generator=torch.Generator().manual_seed(5))

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        return {"point": self.points[index] + 0.01 * torch.randn(16)}

class Inner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(17, 24), torch.nn.Tanh(), torch.nn.Linear(24, 16))

    def forward(self, sample, timestep):
        return self.layers(torch.cat([sample, timestep.reshape(-1, 1) / 1000], 1))

class Denoiser(LightningModule):
    def __init__(self):
        super().__init__()
        self.denoiser = Inner()

    def training_step(self, batch, batch_idx):
        clean = batch["point"]
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (len(clean),), device=clean.device)
        return (self.denoiser(clean + noise * t.reshape(-1, 1) / 1000, t) - noise).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

def record(out, **settings):
    torch.manual_seed(0)
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[TraceCallback(out, **settings)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(Denoiser(), torch.utils.data.DataLoader(Points(), batch_size=4, shuffle=True))

"""


@dataclass(frozen=True)
class Captures:
    """Makes the stores of one side.

    side: the version.
    python: the interpreter in which it is installed.
    inputs: the folder of the pictures and of the pipeline that both sides train on.
    folder: where the stores go.
    console: says what is made.
    """

    side: Side
    python: Path
    inputs: Path
    folder: Path
    console: Console

    def make(self) -> None:
        """Makes all stores anew. Raises RuntimeError if a process fails."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        where = self.run("where", ["-c", "import dmin_trace, dmin_trace.examples as e; print(*e.__path__)"])
        examples = Path(where.splitlines()[-1])
        digits = examples / "train_digits.py"
        lora = examples / "train_text_to_image_lora.py"
        base, data = self.inputs / "model", self.inputs / "data" / "captioned"
        pictures = ["--pretrained_model_name_or_path", base, "--train_data_dir", data, *LORA]
        two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")

        self.train("digits", digits, DIGITS)
        self.capture("digits", digits, DIGITS)
        self.train("lora", lora, pictures)
        self.capture("lora", lora, pictures)
        self.train("lora-bf16", lora, (*pictures, "--mixed_precision", "bf16"))
        self.train("digits-two-processes", digits, DIGITS, launch=two)
        self.program("plain", PLAIN.replace("TIMESTEPS", self.side.timesteps).replace("STEP", self.side.step))
        self.program("lightning", LIGHTNING)
        (self.folder / FINISHED).write_text(f"{examples.parent}\n", encoding="utf-8")

    def train(self, name: str, script: Path, arguments: Sequence[object], launch: Sequence[object] = ()) -> None:
        """Trains with a script that has the line, which captures at the end: NAME/trained.trace/trace.zarr."""
        command = [*launch, script, *arguments, "--output_dir", self.folder / name / "trained"]
        self.run(f"{name}-trained", command)

    def capture(self, name: str, script: Path, arguments: Sequence[object]) -> None:
        """Captures what `train` trained, with all settings: NAME/SETTINGS.zarr."""
        folder = self.folder / name
        for kind, settings in SETTINGS.items():
            given = [*self.side.program, "capture", "--weights", folder / "trained", *self.side.options(settings)]
            rest = ["--out", folder / f"{kind}.zarr", "--", script, *arguments, "--output_dir", folder / "unused"]
            self.run(f"{name}-{kind}", [*given, *rest])

    def program(self, name: str, text: str) -> None:
        """Writes and runs a program that defines `record(out, **settings)`, with all settings: NAME/SETTINGS.zarr."""
        folder = self.folder / name
        folder.mkdir()
        calls = [
            f"record({str(folder / f'{kind}.zarr')!r}, {self.side.keywords(settings)})\n"
            for kind, settings in SETTINGS.items()
        ]
        source = folder / "record_all.py"
        source.write_text(text.lstrip() + "".join(calls), encoding="utf-8")
        self.run(name, [source])

    def run(self, name: str, command: Sequence[object]) -> str:
        """Runs the interpreter and gives what it printed. Raises RuntimeError if it fails."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
            # Sums in another order, by other threads, have other bits.
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
            "XDG_STATE_HOME": str(self.folder / "state"),
        }
        started = time.perf_counter()
        ran = subprocess.run(
            [str(self.python), *map(str, command)],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        (logs / f"{name}.txt").write_text(ran.stdout, encoding="utf-8")
        if ran.returncode:
            raise RuntimeError(f"{self.side.name}, {name}: exit code {ran.returncode}\n{ran.stdout[-3000:]}")
        self.console.print(f"{self.side.name}: {name} ({time.perf_counter() - started:.0f} s)")
        return ran.stdout


def make_inputs(folder: Path) -> None:
    """Writes the pictures and the Stable Diffusion pipeline that both sides train on, if they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data").exists():
        partial = folder / "data.partial"
        shutil.rmtree(partial, ignore_errors=True)
        tiny_models.write_pictures(partial)
        partial.rename(folder / "data")
    tiny_models.build("sd1", folder / "model")


# -- the comparison ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """What was found about the stores of one capture.

    store: the path under a side's folder.
    shape: of the gradients, (N, T, v), and their dtype.
    cells: by column of the table, "same" or how it differs.
    """

    store: str
    shape: str
    cells: Mapping[str, str]

    @property
    def same(self) -> bool:
        """Whether all rows are the same, bit for bit."""
        return all(cell in ("same", "-") for cell in self.cells.values())


COLUMNS = (*ARRAYS, "order", "weights")


def compare(store: str, old: Path, new: Path) -> Comparison:
    """Compares the stores of one capture by data set index; `order` says whether the rows come in the same order."""
    missing = [side.name for side, folder in ((OLD, old), (NEW, new)) if not (folder / store).exists()]
    if missing:
        return Comparison(store, "", {"grad": f"no store in {', '.join(missing)}"})
    expected, found = OLD.read(old / store), NEW.read(new / store)
    cells = {}
    by_sample = np.argsort(expected.sample), np.argsort(found.sample)
    for name in ARRAYS:
        pair = expected.arrays.get(name), found.arrays.get(name)
        if pair[0] is None and pair[1] is None:
            cells[name] = "-"
        elif pair[0] is None or pair[1] is None:
            cells[name] = f"only in {'new' if pair[0] is None else 'old'}"
        elif len(pair[0]) != len(expected.sample) or len(pair[1]) != len(found.sample):
            cells[name] = f"{len(pair[0])} and {len(pair[1])} rows, expected one for each sample"
        else:
            cells[name] = differ(pair[0][by_sample[0]], pair[1][by_sample[1]])
    # Several processes write their chunks in any order.
    in_order = "two-processes" not in store
    same_samples = sorted(expected.sample.tolist()) == sorted(found.sample.tolist()) == list(range(len(found.sample)))
    same_order = expected.sample.tolist() == found.sample.tolist()
    cells["order"] = "same" if same_order or (same_samples and not in_order) else "differs"
    cells["weights"] = _differ_weights(_weights_of(old / store), _weights_of(new / store))
    gradients = expected.arrays["grad"]
    shape = " x ".join(f"{size:,}" for size in gradients.shape)
    return Comparison(store, f"{shape} {gradients.dtype}", cells)


def differ(expected: Array, found: Array) -> str:
    """How two arrays differ in their bits; "same" if they do not."""
    if (expected.shape, expected.dtype) != (found.shape, found.dtype):
        return f"{expected.dtype} {expected.shape} and {found.dtype} {found.shape}"
    bits = f"u{expected.dtype.itemsize}"
    unequal = np.ascontiguousarray(expected).view(bits) != np.ascontiguousarray(found).view(bits)
    if not unequal.any():
        return "same"
    apart = np.abs(expected[unequal].astype(np.float64) - found[unequal].astype(np.float64)).max()
    return f"{int(unequal.sum()):,} of {unequal.size:,} differ, by {apart:.2g} at most"


def _weights_of(store: Path) -> dict[str, torch.Tensor]:
    return load_file(store.with_name(f"{store.stem}.weights.safetensors"))


def _differ_weights(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> str:
    """How the captured weights differ: rows of other weights say nothing about the capture."""
    if expected.keys() != found.keys():
        return f"{len(expected.keys() ^ found.keys())} names differ"
    unequal = [
        name
        for name, tensor in expected.items()
        if differ(*(t.contiguous().view(-1).view(torch.uint8).numpy() for t in (tensor, found[name]))) != "same"
    ]
    return f"{len(unequal)} of {len(expected)} differ" if unequal else "same"


def as_table(comparisons: Sequence[Comparison]) -> Table:
    """The comparisons for a terminal."""
    table = Table(title="Rows of two versions, bit for bit")
    for heading in ("store", "gradients", *COLUMNS):
        table.add_column(heading, overflow="fold")
    for one in comparisons:
        table.add_row(one.store, one.shape, *(one.cells.get(column, "") for column in COLUMNS))
    return table


def main() -> int:
    """Makes the stores of the sides that are given and compares both sides if both are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="The folder of the stores.")
    parser.add_argument("--old", type=Path, help="The interpreter with the old version; its stores are made anew.")
    parser.add_argument("--new", type=Path, help="The interpreter with the new version; its stores are made anew.")
    given = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 180)
    work = given.work.absolute()
    make_inputs(work / "inputs")
    for side, python in ((OLD, given.old), (NEW, given.new)):
        if python is not None:
            # The path of a virtual environment's interpreter is a link, which must not be followed.
            Captures(side, python.absolute(), work / "inputs", work / side.name, console).make()
    old, new = work / OLD.name, work / NEW.name
    for folder in (old, new):
        if not (folder / FINISHED).exists():
            console.print(f"{folder} has no finished captures: nothing is compared. Give --{folder.name} PYTHON.")
            return 2
        console.print(f"{folder.name}: {(folder / FINISHED).read_text(encoding='utf-8').strip()}")
    stores = sorted({str(path.relative_to(folder)) for folder in (old, new) for path in folder.glob("*/**/*.zarr")})
    comparisons = [compare(store, old, new) for store in stores]
    console.print(as_table(comparisons))
    same = sum(one.same for one in comparisons)
    console.print(f"{same} of {len(comparisons)} stores are the same, bit for bit.")
    return int(same < len(comparisons) or not comparisons)


if __name__ == "__main__":
    sys.exit(main())
