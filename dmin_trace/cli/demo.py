"""The whole way on handwritten digits: train, capture, generate, query, show. What `dmin-trace demo` runs.

The training script is the example `examples/train_digits.py`, run as a user runs it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import track

from dmin_trace.errors import QueryError, ScriptError
from dmin_trace.query import Hit, open_trace
from dmin_trace.store import core_count
from dmin_trace.views import hits_table

GENERATED_COUNT = 40
QUERY_COUNT = 5
HIT_COUNT = 10
TRAINING_ARGUMENTS = ("--num_epochs", "40", "--learning_rate", "2e-3", "--seed", "0")
BATCH_SIZE = 64


def run_demo(folder: Path, console: Console) -> float:
    """Trains, captures, generates and queries; prints the tables and the path of a picture.

    Args:
        folder: a new folder for the model, the trace and the picture.
        console: where to print.

    Returns:
        The fraction of the training samples shown that have the same digit as their query.

    Raises:
        QueryError: the folder is there already, or the demo's packages are not installed.
        ScriptError: the training failed; its own message is above.
    """
    missing = [name for name in ("diffusers", "sklearn") if find_spec(name) is None]
    if missing:
        raise QueryError(
            f"The demo needs {' and '.join(missing)}. Install them: python -m pip install 'dmin_trace[demo]'."
        )
    if folder.exists():
        raise QueryError(f"{folder} exists already. Remove it, or give another folder with --out.")

    console.print("1. Train a small diffusion model on 1,797 digits, with one line of dmin_trace in the script.")
    with as_file(files("dmin_trace.examples") / "train_digits.py") as script:
        # The layers are too small for several threads, which would wait for each other.
        processes = _processes()
        launch = [sys.executable]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if processes > 1:
            launch += ["-P", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
            environment |= {"ACCELERATE_USE_CPU": "true"}
        batch = ["--train_batch_size", str(BATCH_SIZE // processes)]
        command = [*launch, str(script), "--output_dir", str(folder), *TRAINING_ARGUMENTS, *batch]
        if subprocess.run(command, check=False, env=environment).returncode:
            raise ScriptError(f"{script} failed; its own message is above.")
        trace = open_trace(folder / "trace.zarr")

        console.print("2. Generate digits, and keep those that a classifier is surest of.")
        images, digits = generate(folder)
        paths = [folder / f"generated-{k}.png" for k in range(len(images))]
        for path, image in zip(paths, images, strict=True):
            image.save(path)

        console.print("3. Ask where they come from.\n")
        with Console(stderr=True).status("Capturing the gradients of the generated digits"):
            queries = trace.query_images(paths)
            names = tuple(f"{path.name} (a {digit})" for path, digit in zip(paths, digits, strict=True))
            top = trace.top_k(replace(queries, names=names), HIT_COUNT)

    for number in range(len(top)):
        console.print(hits_table(top, number, ascii_only=console.options.ascii_only))
        console.print()
    labels = np.array(trace.columns["label"])
    share = float(
        np.mean([hit.columns["label"] == digit for digit, row in zip(digits, top.hits, strict=True) for hit in row])
    )
    chance = float(np.mean([np.mean(labels == digit) for digit in digits]))
    picture = folder / "demo.png"
    draw_hits(images, top.hits).save(picture)
    console.print(f"Same digit as the query: {share:.0%} of the top {HIT_COUNT}; chance would give {chance:.0%}.")
    console.print(f"Picture: {picture}", soft_wrap=True)
    console.print(f"Ask more: dmin-trace query {trace.path} {paths[0]}", soft_wrap=True)
    return share


def _processes() -> int:
    """The number of processes that train and capture: two if there are two cores and no GPU."""
    # On other systems than Linux, gloo may not find the address of the machine.
    two = sys.platform == "linux" and core_count() > 1 and not torch.cuda.is_available()
    return 2 if two else 1


def generate(folder: Path) -> tuple[list[Image.Image], list[int]]:
    """Generates digits, and picks those that a classifier is surest of, each of another digit.

    Args:
        folder: holds the trained pipeline.

    Returns:
        `QUERY_COUNT` images of 8x8, of as many digits, and the digits that the classifier sees in them.
    """
    import diffusers
    from diffusers import DDIMScheduler, DDPMPipeline
    from sklearn.svm import SVC

    diffusers.utils.logging.disable_progress_bar()
    pipeline = DDPMPipeline.from_pretrained(folder)
    model = pipeline.unet.eval()
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(100)
    sample = torch.randn(GENERATED_COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in track(scheduler.timesteps, description="generate", console=Console(stderr=True), transient=True):
            sample = scheduler.step(model(sample, t).sample, t, sample).prev_sample
    pixels = ((sample[:, 0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()

    training, labels = training_digits()
    classifier = SVC(C=10, gamma=0.001).fit(training.reshape(len(training), -1) / 16, labels)
    decisions = np.sort(classifier.decision_function(pixels.reshape(GENERATED_COUNT, -1) / 16), axis=1)
    sureness = decisions[:, -1] - decisions[:, -2]
    seen = classifier.predict(pixels.reshape(GENERATED_COUNT, -1) / 16)
    chosen: list[int] = []
    for k in np.argsort(-sureness):
        if seen[k] not in seen[chosen] and len(chosen) < QUERY_COUNT:
            chosen.append(int(k))
    return [Image.fromarray(pixels[k]) for k in chosen], [int(seen[k]) for k in chosen]


def training_digits() -> tuple[np.ndarray, np.ndarray]:
    """The digits as the example trains on them: (1797, 8, 8) uint8, and their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images * 255 / 16).round().astype(np.uint8), digits.target


def draw_hits(images: list[Image.Image], hits: list[list[Hit]]) -> Image.Image:
    """A picture with a row for each query: the generated digit, then its training digits with scores, best first."""
    tile, gap, left, top = 64, 12, 24, 44
    row = tile + 34
    training, _ = training_digits()
    width = left * 2 + tile + 3 * gap + HIT_COUNT * (tile + gap) - gap
    picture = Image.new("RGB", (width, top + len(images) * row), "white")
    draw = ImageDraw.Draw(picture)
    heading, font = ImageFont.load_default(15), ImageFont.load_default(12)
    first = left + tile + 3 * gap
    draw.text((left, 14), "generated", fill="black", font=heading)
    draw.text((first, 14), "training digits with the largest influence: label and score", fill="black", font=heading)
    for y, (image, answer) in enumerate(zip(images, hits, strict=True)):
        at = top + y * row
        _paste(picture, image, left, at, tile, "black")
        for x, hit in enumerate(answer):
            place = first + x * (tile + gap)
            _paste(picture, Image.fromarray(training[hit.sample]), place, at, tile, "silver")
            draw.text((place, at + tile + 4), f"{hit.columns['label']}   {hit.score:.2f}", fill="dimgray", font=font)
    return picture


def _paste(picture: Image.Image, image: Image.Image, x: int, y: int, tile: int, frame: str) -> None:
    picture.paste(image.resize((tile, tile), Image.Resampling.NEAREST).convert("RGB"), (x, y))
    ImageDraw.Draw(picture).rectangle((x - 1, y - 1, x + tile, y + tile), outline=frame)
