"""The paper's Table 2 at the size of one core: `python tools/reproduce/emoji.py --data emoji32.npz --work WORK`.

Two small text-to-image models, of Stable Diffusion's type and of Stable Diffusion 3's, are trained on captioned emoji,
and fine-tuned, with LoRA and in full, on emoji that they have not seen, among them three small categories. Then
pictures are made from prompts of each category, and dmin_trace is asked which samples of the fine-tuning set made
them. The detection rate at k is the share of the k samples found that are of the query's category.

What is done is kept in WORK, stage by stage, and not done again. `docs/results/emoji.md` and its pictures are written
at the end.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import emoji_page
import numpy as np
import torch
import typer
from emoji_models import (
    CHANNELS,
    GUIDANCE,
    KINDS,
    PATCH,
    Autoencoder,
    Kind,
    Words,
    add_lora,
    generate,
    make_tokenizer,
    quiet,
    token_ids,
    train,
    training_loss,
)
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import dmin_trace
from dmin_trace.search import Score

app = typer.Typer(add_completion=False)
console = Console()
progress = Console(stderr=True)

SMALL = ("heart", "time", "transport-ground")
"""The three small categories, by the names of their subcategories in the data."""
KS = (5, 10, 50, 100)
WAYS = ("lora", "full")
SCORES: tuple[Score, ...] = ("dmin", "deflated")
PICTURED = ("none, dmin", "sign, deflated")
"""What the picture shows beside the likeness of pixels: the paper's score and the default."""
DROPPED = 0.1
"""The share of captions that are left empty in training, for classifier-free guidance."""


@dataclass(frozen=True)
class Plan:
    """All that the numbers depend on, but for the code.

    others: samples of other categories in the fine-tuning set.
    base_steps, tune_steps: of training, for each kind of model.
    rates: learning rates of the base, of LoRA and of full fine-tuning.
    queries: generated pictures for each category.
    data: the fingerprint of the file of emoji.
    """

    kinds: tuple[str, ...]
    ways: tuple[str, ...]
    transforms: tuple[str, ...]
    others: int
    base_steps: dict[str, int]
    tune_steps: dict[str, int]
    rates: dict[str, float]
    batch: int
    queries: int
    sampling_steps: int
    timesteps: int
    dimension: int
    seed: int
    data: str


@dataclass(frozen=True)
class Emoji:
    """Some of the emoji: (N, 32, 32, 3) uint8, their names, and the categories they are counted by."""

    images: np.ndarray
    names: tuple[str, ...]
    categories: tuple[str, ...]

    @property
    def captions(self) -> tuple[str, ...]:
        """With the category, and the emoji's own name."""
        return tuple(
            f"a {category.replace('-', ' ')} emoji: {name}"
            for category, name in zip(self.categories, self.names, strict=True)
        )

    def of(self, places: Iterable[int]) -> Emoji:
        """Those at some places."""
        listed = list(places)
        return Emoji(
            self.images[listed], tuple(self.names[k] for k in listed), tuple(self.categories[k] for k in listed)
        )


@dataclass
class Work:
    """The folder of what is done, with the commit and the seconds (of the wall, of the processor) of each stage."""

    folder: Path
    log: dict[str, tuple[str, float, float]]

    @classmethod
    def enter(cls, folder: Path, plan: Plan) -> Work:
        """Goes on with a folder, or begins one. A folder of another plan is refused."""
        folder.mkdir(parents=True, exist_ok=True)
        path, told = folder / "plan.json", json.loads(json.dumps(asdict(plan)))
        if path.exists() and (kept := json.loads(path.read_text(encoding="utf-8"))) != told:
            other = [name for name in told if kept.get(name) != told[name]]
            raise typer.BadParameter(
                f"{folder} was begun with another {', '.join(other)}. Give the options it was begun with, or another "
                "folder.",
                param_hint="--work",
            )
        _write(path, json.dumps(told, indent=1))
        log = folder / "log.json"
        return cls(folder, json.loads(log.read_text(encoding="utf-8")) if log.exists() else {})

    def stage(self, name: str, make: Callable[[Path], None]) -> Path:
        """The folder of a stage, which is made if it is not there.

        `make` fills a folder that gets its name when it is full, so that half a stage is never taken for one. What an
        interrupted run left in it is there again: a recording goes on from it, the rest writes over it.
        """
        done = self.folder / name
        if done.exists():
            return done
        unfinished = self.folder / f"{name}.unfinished"
        unfinished.mkdir(parents=True, exist_ok=True)
        wall, cpu = time.perf_counter(), time.process_time()
        make(unfinished)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.log[name] = (commit(), wall, cpu)
        _write(self.folder / "log.json", json.dumps(self.log, indent=1))
        unfinished.rename(done)
        console.print(f"{name}: {wall:.0f} s, {cpu:.0f} s of the processor")
        return done


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def commit() -> str:
    """Of this checkout, and whether anything in it differs from that."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", ":/dmin_trace", ":/tools")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + (" with changes" if changed else "")


def _shown(sequence: Iterable[Any], name: str) -> Iterable[Any]:
    return track(sequence, name, console=progress, transient=True, disable=not progress.is_terminal)


# -- the data ----------------------------------------------------------------------------------------------------------


def read_emoji(path: Path) -> tuple[Emoji, str]:
    """The file's emoji, by subcategory, and the file's fingerprint."""
    try:
        fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
        with np.load(path, allow_pickle=False) as file:
            images, names, categories = file["images"], file["names"].tolist(), file["subcategories"].tolist()
    except (OSError, ValueError, KeyError) as error:
        raise typer.BadParameter(
            f"{path} is no file of emoji ({error}). Expected a .npz with images (N, 32, 32, 3) uint8, names and "
            "subcategories.",
            param_hint="--data",
        ) from error
    if images.dtype != np.uint8 or images.shape != (len(names), 32, 32, 3) or len(categories) != len(names):
        raise typer.BadParameter(
            f"images of {path} are {images.shape} {images.dtype}, for {len(names)} names; expected (N, 32, 32, 3) "
            "uint8.",
            param_hint="--data",
        )
    missing = [name for name in SMALL if name not in categories]
    if missing:
        raise typer.BadParameter(f"{path} has no emoji of {', '.join(missing)}.", param_hint="--data")
    return Emoji(images, tuple(names), tuple(categories)), fingerprint


def split(emoji: Emoji, others: int, seed: int) -> tuple[Emoji, Emoji]:
    """What the base is trained on, and what is fine-tuned on: all of the small categories, and some of the others."""
    small = [k for k, category in enumerate(emoji.categories) if category in SMALL]
    rest = [k for k, category in enumerate(emoji.categories) if category not in SMALL]
    if not 0 <= others < len(rest):
        raise typer.BadParameter(f"{others} was given; there are {len(rest)} in all.", param_hint="--others")
    order = np.random.default_rng(seed).permutation(rest).tolist()
    return emoji.of(sorted(order[others:])), emoji.of(sorted(small + order[:others]))


# -- the stages --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """One kind of model on the emoji: its stages, each of which needs those before it."""

    plan: Plan
    work: Work
    name: str
    tokenizer: PreTrainedTokenizerFast
    autoencoder: Autoencoder
    base: Emoji
    tuning: Emoji

    def run(self) -> None:
        """Does what is not done, each stage after those it needs."""
        self.train_base()
        for way in self.plan.ways:
            self.tune(way)
            self.make_queries(way)
            for transform in self.plan.transforms:
                self.capture(way, transform)
                self.ask(way, transform, swapped=False)
                self.ask(way, transform, swapped=True)

    @property
    def kind(self) -> Kind:
        """Of the model."""
        return KINDS[self.name]()

    def train_base(self) -> Path:
        """The model and its text encoder, trained together from nothing."""
        return self.work.stage(f"{self.name}/base", self._train_base)

    def _train_base(self, folder: Path) -> None:
        torch.manual_seed(self.plan.seed)
        kind = self.kind
        denoiser, encoder = kind.new(len(self.tokenizer))
        ids = self._with_empty(self.base.captions)

        def words_of(chosen: torch.Tensor) -> Words:
            return kind.encode(encoder, ids[_drop(chosen, len(ids) - 1)])

        steps = self.plan.base_steps[self.name]
        loss = train(
            kind,
            denoiser,
            self.autoencoder.encode(self.base.images),
            words_of,
            [*denoiser.parameters(), *encoder.parameters()],
            _shown(range(steps), f"train the base of {self.name}"),
            steps,
            learning_rate=self.plan.rates["base"],
            batch=self.plan.batch,
            seed=self.plan.seed + 1,
        )
        denoiser.save_pretrained(folder / "denoiser")
        encoder.save_pretrained(folder / "text_encoder")
        _write(folder / "facts.json", json.dumps({"loss": loss}))

    def tune(self, way: str) -> Path:
        """What is fine-tuned."""
        return self.work.stage(f"{self.name}/{way}", lambda folder: self._tune(folder, way))

    def _tune(self, folder: Path, way: str) -> None:
        denoiser, parameters = self._tunable(way)
        words = self._words(self.tuning.captions)
        last = len(words.tokens) - 1
        steps = self.plan.tune_steps[self.name]
        loss = train(
            self.kind,
            denoiser,
            self.autoencoder.encode(self.tuning.images),
            lambda chosen: words.at(_drop(chosen, last)),
            list(parameters.values()),
            _shown(range(steps), f"fine-tune {self.name}, {way}"),
            steps,
            learning_rate=self.plan.rates[way],
            batch=self.plan.batch,
            seed=self.plan.seed + 2,
        )
        save_file({name: parameter.detach() for name, parameter in parameters.items()}, folder / "weights.safetensors")
        facts = {"loss": loss, "parameters": sum(parameter.numel() for parameter in parameters.values())}
        _write(folder / "facts.json", json.dumps(facts))

    def make_queries(self, way: str) -> Path:
        """Pictures from prompts of each small category, one category after the other."""
        return self.work.stage(f"{self.name}/{way}-queries", lambda folder: self._make_queries(folder, way))

    def _make_queries(self, folder: Path, way: str) -> None:
        denoiser = self._tuned(way)
        words = self._words(self.prompts(self.asked))
        asked, empty = words.at(slice(0, -1)), words.at(slice(-1, None))
        made = generate(self.kind, denoiser, asked, empty, self.plan.sampling_steps, self.plan.seed + 3)
        np.save(folder / "images.npy", self.autoencoder.decode(made))

    def capture(self, way: str, transform: str) -> Path:
        """The trace of the fine-tuning set."""
        name = f"{self.name}/{way}-{transform}"
        return self.work.stage(name, lambda folder: self._capture(folder, way, transform))

    def _capture(self, folder: Path, way: str, transform: str) -> None:
        denoiser = self._tuned(way)
        kind, words, latents = self.kind, self._words(self.tuning.captions), self.autoencoder.encode(self.tuning.images)
        with dmin_trace.recording(
            denoiser,
            samples=len(latents),
            out=folder / "trace.zarr",
            timesteps=self.plan.timesteps,
            dimension=self.plan.dimension,
            dtype="int8",
            seed=self.plan.seed,
            transform=transform,
            columns={"category": self.tuning.categories, "caption": self.tuning.captions},
        ) as recording:
            for i in _shown(recording.samples, f"capture {self.name}, {way}, {transform}"):
                for k in recording.timesteps:
                    with recording.step(i, k):
                        here = slice(i, i + 1)
                        training_loss(kind, denoiser, latents[here], words.at(here)).backward()

    def ask(self, way: str, transform: str, *, swapped: bool) -> Path:
        """The samples found for each query, best first; `swapped`: each picture with the next category's prompt."""
        name = f"{self.name}/{way}-{transform}-{'swapped' if swapped else 'hits'}"
        return self.work.stage(name, lambda folder: self._ask(folder, way, transform, swapped))

    def _ask(self, folder: Path, way: str, transform: str, swapped: bool) -> None:
        denoiser = self._tuned(way)
        made = np.load(self.make_queries(way) / "images.npy", allow_pickle=False)
        categories = self.asked
        if swapped:
            categories = [SMALL[(SMALL.index(category) + 1) % len(SMALL)] for category in categories]
        kind, words, latents = self.kind, self._words(self.prompts(categories)), self.autoencoder.encode(made)
        trace = self.capture(way, transform) / "trace.zarr"
        with dmin_trace.recording(denoiser, samples=len(latents), like=trace) as recording:
            for i in _shown(recording.samples, f"ask {self.name}, {way}, {transform}"):
                for k in recording.timesteps:
                    with recording.step(i, k):
                        here = slice(i, i + 1)
                        training_loss(kind, denoiser, latents[here], words.at(here)).backward()
        opened, k = dmin_trace.open_trace(trace), min(max(KS), len(self.tuning.names))
        for score in SCORES:
            np.save(folder / f"{score}.npy", opened.top_k(recording.queries, k, score, exact=True).samples)

    def found(self, way: str, *, swapped: bool = False) -> dict[str, np.ndarray]:
        """By score, the samples (Q, at least the largest of KS) found for each query, best first."""
        return {
            f"{transform}, {score}": np.load(
                self.ask(way, transform, swapped=swapped) / f"{score}.npy", allow_pickle=False
            )
            for transform in self.plan.transforms
            for score in SCORES
        }

    @property
    def asked(self) -> list[str]:
        """The category of each query."""
        return [category for category in SMALL for _ in range(self.plan.queries)]

    def prompts(self, categories: Sequence[str]) -> list[str]:
        """For each query, a caption of its category: another each time, until there are no more."""
        seen = dict.fromkeys(categories, 0)
        drawn = []
        for category in categories:
            own = [c for c, of in zip(self.tuning.captions, self.tuning.categories, strict=True) if of == category]
            order = np.random.default_rng([self.plan.seed, SMALL.index(category)]).permutation(len(own))
            drawn.append(own[order[seen[category] % len(own)]])
            seen[category] += 1
        return drawn

    def _with_empty(self, captions: Iterable[str]) -> torch.Tensor:
        """Tokens of captions, and of the empty one at the end."""
        return token_ids(self.tokenizer, [*captions, ""])

    def _words(self, captions: Iterable[str]) -> Words:
        """Captions as the base's text encoder gives them, which stays as it is, and the empty one at the end."""
        kind = self.kind
        _, encoder = kind.load(self.train_base())
        with torch.no_grad():
            return kind.encode(encoder.eval(), self._with_empty(captions))

    def _tunable(self, way: str) -> tuple[torch.nn.Module, dict[str, torch.nn.Parameter]]:
        """The base, and what is trained of it."""
        torch.manual_seed(self.plan.seed)
        denoiser, _ = self.kind.load(self.train_base())
        if way == "lora":
            add_lora(self.kind, denoiser)
        else:
            denoiser.requires_grad_(True)
        return denoiser, {name: tensor for name, tensor in denoiser.named_parameters() if tensor.requires_grad}

    def _tuned(self, way: str) -> torch.nn.Module:
        """The model as fine-tuning left it."""
        folder = self.tune(way)
        denoiser, parameters = self._tunable(way)
        kept = load_file(folder / "weights.safetensors")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])
        return denoiser.eval()


def _drop(chosen: torch.Tensor, empty: int) -> torch.Tensor:
    """Puts the empty caption in the place of some."""
    return torch.where(torch.rand(len(chosen)) < DROPPED, empty, chosen)


# -- the figures -------------------------------------------------------------------------------------------------------


def detected(found: np.ndarray, categories: list[str], tuning: Emoji, k: int) -> np.ndarray:
    """(Q,): of each query, the share of the k first samples found, (Q, at least k), that are of its category."""
    of = np.array(tuning.categories)
    return np.asarray((of[found[:, :k]] == np.array(categories)[:, None]).mean(axis=1))


def nearest_pixels(queries: np.ndarray, tuning: np.ndarray) -> np.ndarray:
    """(Q, N): training samples by the cosine of their pixels with the query's, each less the mean picture, best first.

    What likeness of the pictures alone would find.
    """
    mean = tuning.reshape(len(tuning), -1).mean(axis=0)
    rows = [pictures.reshape(len(pictures), -1) - mean for pictures in (queries, tuning)]
    asked, kept = (row / np.maximum(np.linalg.norm(row, axis=1, keepdims=True), 1e-9) for row in rows)
    return np.argsort(-asked @ kept.T, axis=1, kind="stable")


def rates_of(experiment: Experiment) -> list[emoji_page.Rates]:
    """The detection rates of a kind of model."""
    tuning, name, asked = experiment.tuning, experiment.name, experiment.asked
    ks = [k for k in KS if k <= len(tuning.names)]
    groups = [np.array(asked) == category for category in SMALL]

    def rates(way: str, score: str, found: np.ndarray, categories: list[str]) -> emoji_page.Rates:
        each = {k: detected(found, categories, tuning, k) for k in ks}
        return emoji_page.Rates(
            kind=name,
            way=way,
            score=score,
            rate={c: {k: float(each[k][g].mean()) for k in ks} for c, g in zip(SMALL, groups, strict=True)},
            error={k: sum(each[k][g].var(ddof=1) / g.sum() for g in groups) ** 0.5 / len(groups) for k in ks},
        )

    answers = []
    for way in experiment.plan.ways:
        made = np.load(experiment.make_queries(way) / "images.npy", allow_pickle=False)
        answers.append(rates(way, "pixels", nearest_pixels(made, tuning.images), asked))
        answers += [rates(way, score, found, asked) for score, found in experiment.found(way).items()]
    return answers


def swapped_of(experiment: Experiment) -> list[emoji_page.Swapped]:
    """With a picture of one category and the prompt of another: how much of each is found."""
    tuning, asked = experiment.tuning, experiment.asked
    told = [SMALL[(SMALL.index(category) + 1) % len(SMALL)] for category in asked]
    answers = []
    for way in experiment.plan.ways:
        for score, found in experiment.found(way, swapped=True).items():
            answers.append(
                emoji_page.Swapped(
                    kind=experiment.name,
                    way=way,
                    score=score,
                    picture=float(detected(found, asked, tuning, 10).mean()),
                    prompt=float(detected(found, told, tuning, 10).mean()),
                )
            )
    return answers


def examples_of(experiment: Experiment) -> list[emoji_page.Example]:
    """For each way and category, the first query and what was found."""
    tuning, asked = experiment.tuning, experiment.asked
    answers = []
    for way in experiment.plan.ways:
        made = np.load(experiment.make_queries(way) / "images.npy", allow_pickle=False)
        pixels = nearest_pixels(made, tuning.images)
        for category in SMALL:
            query = asked.index(category)
            found = {"pixels": pixels}
            found |= {score: rows for score, rows in experiment.found(way).items() if score in PICTURED}
            answers.append(
                emoji_page.Example(
                    title=f"{experiment.name}, {emoji_page.WAYS[way]}: {category}",
                    query=made[query],
                    found={
                        score: list(tuning.images[rows[query, : emoji_page.SHOWN]]) for score, rows in found.items()
                    },
                )
            )
    return answers


def report_of(experiments: list[Experiment], command: str) -> emoji_page.Report:
    """All that the page says."""
    first = experiments[0]
    plan, work, tuning = first.plan, first.work, first.tuning
    facts = {
        (e.name, stage): json.loads((work.folder / e.name / stage / "facts.json").read_text(encoding="utf-8"))
        for e in experiments
        for stage in ("base", *plan.ways)
    }
    groups = {"base": "train the base", "queries": "make pictures", "hits": "ask", "swapped": "ask"}
    seconds: dict[str, tuple[float, float]] = {}
    for name, (_, wall, cpu) in work.log.items():
        kind, _, stage = name.partition("/")
        last = stage.rpartition("-")[2]
        group = groups.get(last, "fine-tune" if last in plan.ways else "capture")
        label = f"{kind}: {group}" if stage else kind
        before = seconds.get(label, (0.0, 0.0))
        seconds[label] = (before[0] + wall, before[1] + cpu)
    steps = "; ".join(f"{e.name} {plan.base_steps[e.name]} and {plan.tune_steps[e.name]}" for e in experiments)
    setup = (
        f"Data: {len(first.base.names) + len(tuning.names)} Noto emoji of 32x32 pixels (Google, Apache 2.0; by way of "
        "the npm package `emoji-datasource-google` 16.0.0), by their Unicode subcategories; the file's SHA-256 begins "
        f"with {plan.data[:12]}.",
        f"The base, denoiser and text encoder together, is trained from nothing on {len(first.base.names)} emoji, none "
        f"of them of the small categories; then it is fine-tuned on {len(tuning.names)} others: all of the small "
        f"categories, and {plan.others} of the rest. Steps of {plan.batch} samples: {steps}.",
        f"The autoencoder is linear: the first {CHANNELS} principal components of patches of {PATCH}x{PATCH} pixels of "
        f"the base's emoji, which hold {first.autoencoder.kept:.0%} of their variance. The text encoder is a CLIP text "
        "model of two layers with a token for each word; fine-tuning leaves it as it is. Training drops "
        f"{DROPPED:.0%} of the captions.",
        f"Prompts are captions of the fine-tuning set, such as `{first.prompts(first.asked)[0]}`: {plan.queries} of a "
        f"category, drawn by the seed, a picture for each ({plan.sampling_steps} steps, guidance {GUIDANCE:g}).",
        f"dmin_trace: T = {plan.timesteps} timesteps, v = {plan.dimension}, int8, exact search, "
        "`dmin_trace.recording` around the training loss.",
    )
    return emoji_page.Report(
        command=command,
        commits=sorted({made for made, _, _ in work.log.values()}),
        machine=machine(),
        setup=setup,
        names={e.name: e.kind.name for e in experiments},
        sizes={category: tuning.categories.count(category) for category in SMALL},
        samples=len(tuning.names),
        trained={(e.name, way): facts[e.name, way]["parameters"] for e in experiments for way in plan.ways},
        losses={key: fact["loss"] for key, fact in facts.items()},
        rates=[row for e in experiments for row in rates_of(e)],
        swapped=[row for e in experiments for row in swapped_of(e)],
        seconds=seconds,
        examples=[example for e in experiments for example in examples_of(e)],
    )


def machine() -> str:
    """What it ran on."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft", "transformers"))
    return f"{torch.get_num_threads()} thread(s) of {cpu}, {libraries}"


# -- the command -------------------------------------------------------------------------------------------------------


def _listed(given: str, known: Iterable[str], option: str) -> tuple[str, ...]:
    listed = tuple(given.split(","))
    if unknown := set(listed) - set(known):
        raise typer.BadParameter(
            f"{', '.join(sorted(unknown))} is none of {', '.join(known)}; give some of these, with commas between.",
            param_hint=option,
        )
    return listed


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="The emoji: a .npz with images, names and subcategories.")],
    work: Annotated[Path, typer.Option(help="A folder for what is done; a run that was interrupted goes on there.")],
    out: Annotated[Path, typer.Option(help="Where emoji.md and its pictures are written.")] = Path("docs/results"),
    kinds: Annotated[str, typer.Option(help="Of models.")] = "sd,sd3",
    ways: Annotated[str, typer.Option(help="Of fine-tuning.")] = "lora,full",
    transforms: Annotated[str, typer.Option(help="Of gradients.")] = "none,sign",
    others: Annotated[int, typer.Option(help="Samples of other categories to fine-tune on.", min=0)] = 100,
    base_steps: Annotated[tuple[int, int], typer.Option(help="Of training the base: of sd, of sd3.")] = (1600, 2000),
    tune_steps: Annotated[tuple[int, int], typer.Option(help="Of fine-tuning: of sd, of sd3.")] = (600, 800),
    queries: Annotated[int, typer.Option(help="Pictures of each category.", min=2)] = 10,
    sampling_steps: Annotated[int, typer.Option(help="To make a picture.", min=1)] = 25,
    timesteps: Annotated[int, typer.Option(help="T, of a trace.", min=1)] = 5,
    dimension: Annotated[int, typer.Option(help="v, of a trace.")] = 2**14,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Of torch.", min=1)] = 1,
) -> None:
    """Detection rates of small categories of emoji, by model, way of fine-tuning and transform."""
    emoji, fingerprint = read_emoji(data)
    plan = Plan(
        kinds=_listed(kinds, KINDS, "--kinds"),
        ways=_listed(ways, WAYS, "--ways"),
        transforms=_listed(transforms, ("none", "sign"), "--transforms"),
        others=others,
        base_steps=dict(zip(KINDS, base_steps, strict=True)),
        tune_steps=dict(zip(KINDS, tune_steps, strict=True)),
        rates={"base": 1e-3, "lora": 2e-3, "full": 5e-4},
        batch=16,
        queries=queries,
        sampling_steps=sampling_steps,
        timesteps=timesteps,
        dimension=dimension,
        seed=seed,
        data=fingerprint,
    )
    base, tuning = split(emoji, others, seed)
    done = Work.enter(work, plan)
    torch.set_num_threads(threads)
    quiet()
    words = done.stage("tokenizer", lambda folder: make_tokenizer(emoji.captions).save_pretrained(folder))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(words)
    # Fitted in less than a second, so it is no stage.
    autoencoder = Autoencoder.fit(base.images)
    experiments = [Experiment(plan, done, name, tokenizer, autoencoder, base, tuning) for name in plan.kinds]
    for experiment in experiments:
        experiment.run()
    command = f"python tools/reproduce/emoji.py {shlex.join(_portable(sys.argv[1:]))}"
    page = emoji_page.write_page(report_of(experiments, command), out)
    console.print(f"written: {page}", soft_wrap=True)


def _portable(arguments: Iterable[str]) -> list[str]:
    """Without the folders of this machine."""
    return [Path(argument).name if argument.startswith("/") else argument for argument in arguments]


if __name__ == "__main__":
    app()
