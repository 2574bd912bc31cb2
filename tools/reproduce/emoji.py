"""The paper's Table 2 at the size of one core: `python tools/reproduce/emoji.py --data emoji32.npz --work WORK`.

Two small text-to-image models, of Stable Diffusion's type and of Stable Diffusion 3's, whose pictures can be read
(`emoji_base.py`), are fine-tuned, with LoRA and in full, on emoji that they have not seen, some of them of three small
categories. The fine-tuned models are those of `finetune_truth.py`; one that is not there is trained. Then pictures are
made from prompts of each category, and dmin_trace is asked which samples of the fine-tuning set made them. The
detection rate at k is the share of the k samples found that are of the query's category.

What is done is kept in WORK, stage by stage, and not done again. `docs/results/emoji.md` and its pictures are written
at the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import emoji_page
import numpy as np
import torch
import typer
from emoji_base import BASES
from emoji_data import SMALL, Emoji
from emoji_models import CHANNELS, GUIDANCE, PATCH, training_loss
from finetune import RECIPES, SAMPLING_STEPS, Tuning
from finetune_truth import TRUTHS
from numpy.typing import NDArray
from page import command_line
from rich.console import Console
from rich.progress import track
from stages import Work, machine

import dmin_trace
from dmin_trace.search import Score

app = typer.Typer(add_completion=False)
console = Console()
progress = Console(stderr=True)

KS = (5, 10, 50, 100)
SCORES: dict[str, tuple[Score, ...]] = {"none": ("dmin",), "sign": ("dmin", "deflated")}
"""For each transform of gradients, the scores that are asked for."""
PICTURED = ("none, dmin", "sign, deflated")
"""What the picture shows beside the likeness of pixels: the paper's score and the default."""
Found = NDArray[np.int64]
"""(Q, k) the samples found for each query, best first."""


@dataclass(frozen=True)
class Plan:
    """All that the numbers depend on, but for the code.

    models: the SHA-256 of each recipe's weights.
    queries: generated pictures for each category.
    data: the SHA-256 of the file of emoji.
    """

    models: dict[str, str]
    queries: int
    timesteps: int
    dimension: int
    seed: int
    data: str


@dataclass(frozen=True)
class Experiment:
    """One recipe: its stages, each of which needs those before it. The trained weights are in the model."""

    plan: Plan
    work: Work
    name: str
    tuning: Tuning

    def run(self) -> None:
        """Does what is not done, each stage after those it needs."""
        self.make_queries()
        for transform in SCORES:
            self.capture(transform)
            self.ask(transform, swapped=False)
            self.ask(transform, swapped=True)

    @property
    def samples(self) -> Emoji:
        """The fine-tuning set."""
        return self.tuning.division.tuning

    def make_queries(self) -> NDArray[np.uint8]:
        """Pictures from prompts of each small category, one category after the other."""

        def make(folder: Path) -> None:
            np.save(folder / "images.npy", self.tuning.generate(self.prompts(self.asked), self.plan.seed + 3))

        found: NDArray[np.uint8] = np.load(self.work.stage(f"{self.name}/queries", make) / "images.npy")
        return found

    def capture(self, transform: str) -> Path:
        """The trace of the fine-tuning set."""

        def make(folder: Path) -> None:
            recording = dmin_trace.recording(
                self.tuning.denoiser,
                samples=len(self.samples.names),
                out=folder / "trace.zarr",
                timesteps=self.plan.timesteps,
                dimension=self.plan.dimension,
                dtype="int8",
                seed=self.plan.seed,
                transform=transform,
                columns={"category": self.samples.categories, "caption": self.samples.captions},
            )
            self._record(recording, self.samples.images, self.samples.captions, f"capture {self.name}, {transform}")

        return self.work.stage(f"{self.name}/{transform}", make) / "trace.zarr"

    def ask(self, transform: str, *, swapped: bool) -> dict[str, Found]:
        """By score, what is found for each query; `swapped`: each picture with the next category's prompt."""

        def make(folder: Path) -> None:
            trace, made = self.capture(transform), self.make_queries()
            prompts = self.prompts([_next(category) for category in self.asked] if swapped else self.asked)
            recording = dmin_trace.recording(self.tuning.denoiser, samples=len(made), like=trace)
            self._record(recording, made, prompts, f"ask {self.name}, {transform}")
            opened, k = dmin_trace.open_trace(trace), min(max(KS), len(self.samples.names))
            for score in SCORES[transform]:
                np.save(folder / f"{score}.npy", opened.top_k(recording.queries, k, score, exact=True).samples)

        folder = self.work.stage(f"{self.name}/{transform}-{'swapped' if swapped else 'hits'}", make)
        return {f"{transform}, {score}": np.load(folder / f"{score}.npy") for score in SCORES[transform]}

    def _record(self, opened: Any, images: NDArray[np.uint8], captions: Sequence[str], shown: str) -> None:
        """Goes through the training loss of pictures and captions, at each timestep."""
        kind, latents = self.tuning.kind, self.tuning.autoencoder.encode(images)
        words = self.tuning.words_of(list(captions))
        with opened as recording:
            for i in track(
                recording.samples, shown, console=progress, transient=True, disable=not progress.is_terminal
            ):
                for k in recording.timesteps:
                    with recording.step(i, k):
                        here = slice(i, i + 1)
                        loss = training_loss(kind, self.tuning.denoiser, latents[here], words.at(here))
                        loss.backward()  # type: ignore[no-untyped-call]

    def found(self, *, swapped: bool = False) -> dict[str, Found]:
        """By transform and score."""
        return {name: rows for transform in SCORES for name, rows in self.ask(transform, swapped=swapped).items()}

    @property
    def asked(self) -> list[str]:
        """The category of each query."""
        return [category for category in SMALL for _ in range(self.plan.queries)]

    def prompts(self, categories: Sequence[str]) -> list[str]:
        """For each query, a caption of its category: another each time, until there are no more."""
        seen = dict.fromkeys(categories, 0)
        drawn = []
        for category in categories:
            own = [c for c, of in zip(self.samples.captions, self.samples.categories, strict=True) if of == category]
            order = np.random.default_rng([self.plan.seed, SMALL.index(category)]).permutation(len(own))
            drawn.append(own[order[seen[category] % len(own)]])
            seen[category] += 1
        return drawn


def _next(category: str) -> str:
    return SMALL[(SMALL.index(category) + 1) % len(SMALL)]


# -- the figures -------------------------------------------------------------------------------------------------------


def detected(found: Found, categories: list[str], samples: Emoji, k: int) -> NDArray[np.float64]:
    """(Q,): of each query, the share of the k first samples found, (Q, at least k), that are of its category."""
    of = np.array(samples.categories)
    return np.asarray((of[found[:, :k]] == np.array(categories)[:, None]).mean(axis=1))


def nearest_pixels(queries: NDArray[np.uint8], samples: NDArray[np.uint8]) -> Found:
    """(Q, N): samples by the cosine of their pixels with the query's, each less the mean picture, best first.

    What likeness of the pictures alone would find.
    """
    mean = samples.reshape(len(samples), -1).mean(axis=0)
    rows = [pictures.reshape(len(pictures), -1) - mean for pictures in (queries, samples)]
    asked, kept = (row / np.maximum(np.linalg.norm(row, axis=1, keepdims=True), 1e-9) for row in rows)
    return np.argsort(-asked @ kept.T, axis=1, kind="stable")


def rates_of(experiment: Experiment) -> list[emoji_page.Rates]:
    """The detection rates of a recipe."""
    samples, asked = experiment.samples, experiment.asked
    ks = [k for k in KS if k <= len(samples.names)]
    groups = [np.array(asked) == category for category in SMALL]

    def rates(score: str, found: Found) -> emoji_page.Rates:
        each = {k: detected(found, asked, samples, k) for k in ks}
        return emoji_page.Rates(
            model=experiment.name,
            score=score,
            rate={c: {k: float(each[k][g].mean()) for k in ks} for c, g in zip(SMALL, groups, strict=True)},
            error={k: sum(each[k][g].var(ddof=1) / g.sum() for g in groups) ** 0.5 / len(groups) for k in ks},
        )

    pixels = nearest_pixels(experiment.make_queries(), samples.images)
    return [rates(score, found) for score, found in {"pixels": pixels, **experiment.found()}.items()]


def swapped_of(experiment: Experiment) -> list[emoji_page.Swapped]:
    """With a picture of one category and the prompt of another: how much of each is found."""
    samples, asked = experiment.samples, experiment.asked
    told = [_next(category) for category in asked]
    return [
        emoji_page.Swapped(
            model=experiment.name,
            score=score,
            picture=float(detected(found, asked, samples, 10).mean()),
            prompt=float(detected(found, told, samples, 10).mean()),
        )
        for score, found in experiment.found(swapped=True).items()
    ]


def examples_of(experiment: Experiment) -> list[emoji_page.Example]:
    """For each category, the first query and what was found."""
    samples, made = experiment.samples, experiment.make_queries()
    found = {"pixels": nearest_pixels(made, samples.images)}
    found |= {score: rows for score, rows in experiment.found().items() if score in PICTURED}
    return [
        emoji_page.Example(
            title=f"{experiment.name}: {category}",
            query=made[query],
            found={score: list(samples.images[rows[query, : emoji_page.SHOWN]]) for score, rows in found.items()},
        )
        for category in SMALL
        for query in [experiment.asked.index(category)]
    ]


def report_of(experiments: Sequence[Experiment], command: str) -> emoji_page.Report:
    """All that the page says."""
    first = experiments[0]
    plan, work, samples, division = first.plan, first.work, first.samples, first.tuning.division
    groups = {"queries": "make pictures", "hits": "ask", "swapped": "ask"}
    seconds: dict[str, tuple[float, float]] = {}
    for name, (_, wall, cpu) in work.log.items():
        recipe, _, stage = name.partition("/")
        label = f"{recipe}: {groups.get(stage.rpartition('-')[2], 'capture')}"
        before = seconds.get(label, (0.0, 0.0))
        seconds[label] = (before[0] + wall, before[1] + cpu)
    recipes = {e.name: e.tuning.recipe for e in experiments}
    steps = "; ".join(f"{name} {recipe.steps} steps of {recipe.batch} samples" for name, recipe in recipes.items())
    count = sum(len(part.names) for part in (division.base, division.tuning, division.held_out))
    small = sum(samples.categories.count(category) for category in SMALL)
    setup = (
        f"Data: {count} Noto emoji of 32x32 pixels (Google, Apache 2.0; by way of the npm package "
        "`emoji-datasource-google` 16.0.0), by their Unicode subcategories; the file's SHA-256 begins with "
        f"{plan.data[:12]}.",
        f"The bases ([emoji_base.md](emoji_base.md)) were trained on {len(division.base.names)} emoji. Fine-tuning "
        f"learns {len(samples.names)} others, {small} of them of the small categories, of which the bases know other "
        f"pictures: {steps}. The models are those whose truth is known (`finetune_truth.py`).",
        f"The autoencoder is linear: the first {CHANNELS} principal components of patches of {PATCH}x{PATCH} pixels of "
        f"the base's emoji, which hold {first.tuning.autoencoder.kept:.0%} of their variance. The text encoder is a "
        "CLIP text model of two layers with a token for each word; fine-tuning leaves it as it is.",
        f"Prompts are captions of the fine-tuning set, such as `{first.prompts(first.asked)[0]}`: {plan.queries} of a "
        f"category, drawn by the seed, a picture for each ({SAMPLING_STEPS} steps, guidance {GUIDANCE:g}).",
        f"dmin_trace: T = {plan.timesteps} timesteps, v = {plan.dimension}, int8, exact search, "
        "`dmin_trace.recording` around the training loss.",
    )
    return emoji_page.Report(
        command=command,
        commits=sorted({made for made, _, _ in work.log.values()}),
        machine=machine(),
        setup=setup,
        kinds={e.name: e.tuning.kind.name for e in experiments},
        ways={name: recipe.way for name, recipe in recipes.items()},
        sizes={category: samples.categories.count(category) for category in SMALL},
        samples=len(samples.names),
        trained={e.name: sum(tensor.numel() for tensor in e.tuning.trained.values()) for e in experiments},
        rates=[row for e in experiments for row in rates_of(e)],
        swapped=[row for e in experiments for row in swapped_of(e)],
        seconds=seconds,
        examples=[example for e in experiments for example in examples_of(e)],
    )


def reproduce(
    tunings: Mapping[str, Tuning],
    truths: Path,
    work: Path,
    out: Path,
    command: str,
    *,
    queries: int,
    timesteps: int,
    dimension: int,
    seed: int,
) -> Path:
    """Does what is not done, for each recipe, and writes the page."""
    models = {}
    for name, tuning in tunings.items():
        path = truths / f"{name}.safetensors"
        tuning.full(path)
        models[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    fingerprint = next(iter(tunings.values())).fingerprint
    plan = Plan(models, queries, timesteps, dimension, seed, fingerprint)
    done = Work.enter(work, asdict(plan))
    experiments = [Experiment(plan, done, name, tuning) for name, tuning in tunings.items()]
    for experiment in experiments:
        experiment.run()
    return emoji_page.write_page(report_of(experiments, command), out)


# -- the command -------------------------------------------------------------------------------------------------------


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="The emoji: a .npz with images, names and subcategories.")],
    work: Annotated[Path, typer.Option(help="A folder for what is done; a run that was interrupted goes on there.")],
    out: Annotated[Path, typer.Option(help="Where emoji.md and its pictures are written.")] = Path("docs/results"),
    recipes: Annotated[str, typer.Option(help="With commas between.")] = "sd-lora,sd-full,sd3-lora,sd3-full",
    queries: Annotated[int, typer.Option(help="Pictures of each category.", min=2)] = 10,
    timesteps: Annotated[int, typer.Option(help="T, of a trace.", min=1)] = 10,
    dimension: Annotated[int, typer.Option(help="v, of a trace.")] = 2**14,
    seed: Annotated[int, typer.Option(help="Of prompts, pictures and traces.", min=0)] = 0,
    bases: Annotated[Path, typer.Option(help="The folder of the bases' weights.")] = BASES,
    truths: Annotated[Path, typer.Option(help="The folder of the fine-tuned weights.")] = TRUTHS,
    compiled: Annotated[bool, typer.Option(help="Use torch.compile, which needs a C++ compiler.")] = True,
) -> None:
    """Detection rates of small categories of emoji, by model, way of fine-tuning and score."""
    torch.set_num_threads(1)
    listed = recipes.split(",")
    if unknown := set(listed) - set(RECIPES):
        raise typer.BadParameter(
            f"{', '.join(sorted(unknown))} is none of {', '.join(RECIPES)}; give some of these, with commas between.",
            param_hint="--recipes",
        )
    tunings = {name: Tuning(RECIPES[name], data, compiled=compiled, bases=bases) for name in listed}
    page = reproduce(
        tunings,
        truths,
        work,
        out,
        command_line("emoji.py"),
        queries=queries,
        timesteps=timesteps,
        dimension=dimension,
        seed=seed,
    )
    console.print(f"written: {page}", soft_wrap=True)


if __name__ == "__main__":
    app()
