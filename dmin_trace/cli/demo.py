"""The whole way on handwritten digits: train with `examples/train_digits.py`, capture, generate, query, show."""

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

from dmin_trace.errors import QueryError, ScriptError
from dmin_trace.query import Hit, open_trace
from dmin_trace.store import core_count
from dmin_trace.views import hits_table

GENERATED_COUNT, QUERY_COUNT, HIT_COUNT = 40, 5, 10
PAGE_COUNT, AGAINST_COUNT = 24, 8
TRAINING_ARGUMENTS = ("--num_epochs", "40", "--learning_rate", "2e-3", "--seed", "0")
BATCH_SIZE = 64


def run_demo(folder: Path, console: Console) -> float:
    """Trains, captures, generates and queries in a new folder; prints the tables, and where a picture and a page are.
    Returns the fraction of the training samples shown that have the digit of their query. Raises QueryError if the
    folder exists or the demo's packages are not installed, and ScriptError if the training fails."""
    missing = [name for name in ("diffusers", "sklearn") if find_spec(name) is None]
    if missing:
        install = "python -m pip install 'dmin_trace[demo]'"
        raise QueryError(f"The demo needs {' and '.join(missing)}. Install them: {install}.")
    if folder.exists():
        raise QueryError(f"{folder} exists already. Remove it, or give another folder with --out.")

    console.print("1. Train a small diffusion model on 1,797 digits, with one line of dmin_trace in the script.")
    with as_file(files("dmin_trace.examples") / "train_digits.py") as script:
        launch, environment = [sys.executable], {"OMP_NUM_THREADS": "1"}
        # Two processes, since the layers are too small for threads. On other systems than Linux, gloo may not find the
        # address of the machine.
        processes = 2 if sys.platform == "linux" and core_count() > 1 and not torch.cuda.is_available() else 1
        if processes > 1:
            launch += ["-P", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
            environment["ACCELERATE_USE_CPU"] = "true"
        batch = ["--train_batch_size", str(BATCH_SIZE // processes)]
        command = [*launch, str(script), "--output_dir", str(folder / "model"), *TRAINING_ARGUMENTS, *batch]
        if subprocess.run(command, check=False, env=os.environ | environment).returncode:
            raise ScriptError(f"{script} failed; its own message is above.")
        trace = open_trace(folder / "model.trace" / "trace.zarr")

        console.print("2. Generate digits, and keep those that a classifier is surest of.")
        images, digits = generate(folder / "model")
        paths = [folder / f"generated-{k}.png" for k in range(len(images))]
        for path, image in zip(paths, images, strict=True):
            image.save(path)
        console.print("3. Ask where they come from.\n")
        with Console(stderr=True).status("Capturing the gradients of the generated digits"):
            queries = trace.query_images(paths)
            names = tuple(f"{path.name} (a {digit})" for path, digit in zip(paths, digits, strict=True))
            queries = replace(queries, names=names)
            top = trace.top_k(queries, HIT_COUNT)

    for number in range(len(top)):
        console.print(hits_table(top, number, ascii_only=console.options.ascii_only))
        console.print()
    labels = np.array(trace.columns["label"])
    share = float(np.mean(labels[top.samples] == np.array(digits)[:, None]))
    chance = float(np.mean(labels == np.array(digits)[:, None]))
    picture = folder / "demo.png"
    draw_hits(images, top.hits).save(picture)
    console.print(f"Same digit as the query: {share:.0%} of the top {HIT_COUNT}; chance would give {chance:.0%}.")
    console.print(f"Picture: {picture}", soft_wrap=True)
    page = folder / "answer.html"
    trace.top_k(queries, PAGE_COUNT).to_html(
        page, lowest=trace.top_k(queries, AGAINST_COUNT, largest=False), totals=trace.totals(queries, "label")
    )
    console.print(f"Page: {page}", soft_wrap=True)
    console.print(f"Ask more: dmin-trace query {trace.path} {paths[0]}", soft_wrap=True)
    return share


def generate(folder: Path) -> tuple[list[Image.Image], list[int]]:
    """Generates images of 8x8 with the pipeline in `folder`. Returns those of different digits of which a classifier is
    surest, and the digits that it sees."""
    from diffusers import DDIMPipeline, logging
    from sklearn.svm import SVC

    logging.disable_progress_bar()
    pipeline = DDIMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    seeded = torch.Generator().manual_seed(0)
    with Console(stderr=True).status("Generating"):
        images = pipeline(batch_size=GENERATED_COUNT, generator=seeded, num_inference_steps=100).images

    training, labels = training_digits()
    classifier = SVC(C=10, gamma=0.001).fit(training.reshape(len(training), -1) / 16, labels)
    flat = np.stack(images).reshape(GENERATED_COUNT, -1) / 16
    decisions = np.sort(classifier.decision_function(flat), axis=1)
    surest = np.argsort(decisions[:, -2] - decisions[:, -1])
    seen = classifier.predict(flat)
    _, first = np.unique(seen[surest], return_index=True)
    chosen = surest[np.sort(first)[:QUERY_COUNT]]
    return [images[k] for k in chosen], [int(digit) for digit in seen[chosen]]


def training_digits() -> tuple[np.ndarray, np.ndarray]:
    """The digits as the example trains on them: (1797, 8, 8) uint8, and their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images * 255 / 16).round().astype(np.uint8), digits.target


def draw_hits(images: list[Image.Image], hits: list[list[Hit]]) -> Image.Image:
    """A picture with a row for each query: the generated digit, then its training digits with scores, best first."""
    tile, gap, left, top = 64, 12, 24, 44
    training, _ = training_digits()
    first = left + tile + 3 * gap
    size = (first + HIT_COUNT * (tile + gap) - gap + left, top + len(images) * (tile + 34))
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)

    def paste(image: Image.Image, x: int, y: int, frame: str) -> None:
        picture.paste(image.resize((tile, tile), Image.Resampling.NEAREST).convert("RGB"), (x, y))
        draw.rectangle((x - 1, y - 1, x + tile, y + tile), outline=frame)

    heading, font = ImageFont.load_default(15), ImageFont.load_default(12)
    draw.text((left, 14), "generated", fill="black", font=heading)
    draw.text((first, 14), "training digits with the largest influence: label and score", fill="black", font=heading)
    for row, (image, answer) in enumerate(zip(images, hits, strict=True)):
        y = top + row * (tile + 34)
        paste(image, left, y, "black")
        for column, hit in enumerate(answer):
            x = first + column * (tile + gap)
            paste(Image.fromarray(training[hit.sample]), x, y, "silver")
            draw.text((x, y + tile + 4), f"{hit.columns['label']}   {hit.score:.2f}", fill="dimgray", font=font)
    return picture
