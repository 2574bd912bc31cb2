"""From a generated image, and its prompt, to the training samples that made the model make it.

A query is a capture of a tiny dataset: the script that was traced, with the traced weights and its data argument
pointed at a folder with the queries, runs its loop body on them in a process of its own. Same code, same noise, same
timesteps, same projection; the inner products with the store's rows are the influences (paper, equations 7 to 9).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image

from dmin_trace import errors
from dmin_trace import search as kernel
from dmin_trace.capture.host import script_host
from dmin_trace.command import Command, Job, recall, script_of
from dmin_trace.errors import DminTraceError, QueryError, ScriptError, WeightsError
from dmin_trace.query.hits import Hit
from dmin_trace.query.inputs import QueryInput
from dmin_trace.search import (
    Ranking,
    Score,
    Unavailable,
    check_k,
    check_queries,
    open_directions,
    open_index,
    read_facts,
    search,
)
from dmin_trace.search import exact_top_k as scan
from dmin_trace.store import Store, check_script, open_store, weights_beside

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""What images are read as, whatever their names: of the formats that Pillow knows, one runs a program (EPS)."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The hits of all queries, and what found them.

    hits: for each query k of them, best first.
    recall: (depth, part): where the index answered, what part of the true `depth` best it found when it was calibrated;
        None where every sample was scanned.
    said: what answered, on one line; words of the index's own file may be in it.
    score: what the samples are ranked by.
    taken_out: what was taken out of the queries for that, in words; "" for the paper's score.
    """

    hits: list[list[Hit]]
    recall: tuple[int, float] | None
    said: str
    score: Score
    taken_out: str


def attribute(
    trace: Store | str | os.PathLike[str],
    images: Sequence[str | os.PathLike[str] | Image.Image],
    prompts: Sequence[str | None] | None = None,
    *,
    conditioning: Sequence[str | os.PathLike[str] | Image.Image | None] | None = None,
    k: int = 10,
    weights: str | os.PathLike[str] | None = None,
    command: Sequence[str] | None = None,
    score: Score = "deflated",
    exact: bool = False,
    edited_script: bool = False,
) -> list[list[Hit]]:
    """The training samples with the largest influence on each image, best first.

    The store's index answers if it is there, fresh, and serves k hits; all samples are scanned otherwise. Of a store
    that was opened unfinished, those that are done.

    Args:
        trace: the store, or its path.
        images: the images, as files or as PIL images, of the size that the model was trained on; or video files.
        prompts: the prompt of each image, for models that were trained with captions.
        conditioning: what each image was made from, for a ControlNet or a model that edits images.
        k: how many training samples for each image.
        weights: the traced weights; those beside the store if not given.
        command: the script and its arguments, as the traced run was started; what this user's machine remembers of
            that run if not given. `{data}` in an argument stands for the folder with the queries.
        score: "dmin" is the paper's sum of inner products; "deflated" takes what all samples share out of the query,
            along the principal directions that the store's index keeps.
        exact: scan all samples even if there is an index.
        edited_script: the script was edited since the trace was made, but neither its loss nor its data.

    Returns:
        A list of k hits for each image.

    Raises:
        QueryError: no such image, one that cannot be asked of this trace (of another size, or without a prompt where
            the model was trained with captions), k is out of range, or the trace cannot be asked for this score.
        WeightsError: the weights are missing or not those of the trace.
        ScriptError: the script failed on the queries.
        TraceError: there is no finished store, or the script is not the one that made it.
    """
    trace = trace if isinstance(trace, Store) else open_store(Path(trace))
    check_k(trace, k)
    check_score(trace, score)
    gradients = capture_queries(
        trace,
        images,
        prompts,
        conditioning=conditioning,
        weights=weights,
        command=command,
        edited_script=edited_script,
    )
    return answer_queries(trace, gradients, k=k, score=score, exact=exact).hits


def check_score(trace: Store, name: str) -> Score:
    """The score of this name. Raises QueryError if there is none, or the store cannot be asked for it."""
    if name == "deflated":
        facts = read_facts(trace)
        if isinstance(facts, Unavailable):
            _check_few(trace, facts.reason)
        elif not facts.principal:
            _check_few(trace, "")
        return "deflated"
    if name != "dmin":
        raise _no_score(name)
    return "dmin"


def _no_score(name: str) -> QueryError:
    return QueryError(f"score is {name!r}; expected dmin or deflated.")


@dataclass(frozen=True)
class QueryTransform:
    """What makes queries ready for a score of a store; `query_transform` makes one.

    score: the score.
    free: from (Q, T, v) to (Q, T, v).
    taken_out: what it takes out of them, in words; "" for the paper's score.
    """

    score: Score
    free: Callable[[np.ndarray], np.ndarray]
    taken_out: str


def query_transform(trace: Store, score: Score) -> QueryTransform:
    """What makes queries ready for a score: finds the principal directions, where the index does not keep them.

    Raises:
        QueryError: the trace cannot be asked for this score.
        TraceError: the store is damaged.
    """
    if score not in get_args(Score):
        raise _no_score(score)
    if score == "dmin":
        return QueryTransform(score, lambda queries: queries, "")
    directions = open_directions(trace)
    said = "kept by the index"
    if isinstance(directions, Unavailable):
        _check_few(trace, directions.reason)
        said = f"found for this query ({directions.reason})" if directions.reason else "found for this query"
        directions = kernel.principal_directions(trace)
    count = directions.eigenvalues.shape[1]
    return QueryTransform(score, directions.deflate, f"{count} principal directions of each timestep, {said}")


def answer_queries(
    trace: Store, gradients: np.ndarray, *, k: int, score: Score | QueryTransform = "deflated", exact: bool = False
) -> Answer:
    """The training samples with the largest influence on queries whose gradients are captured.

    Args:
        trace: the store.
        gradients: (Q, T, v), from `capture_queries`.
        k: how many training samples for each query.
        score: as for `attribute`; or, to ask again and again, what `query_transform` made of it.
        exact: scan all samples even if there is an index.

    Raises:
        QueryError: k is out of range, the gradients are not finite or not of the store's shape, or the trace cannot be
            asked for this score.
        TraceError: the store is damaged.
    """
    check_k(trace, k)
    check_queries(trace, gradients)
    made = score if isinstance(score, QueryTransform) else query_transform(trace, score)
    queries, kind = made.free(gradients), made.score
    index = Unavailable("") if exact or not trace.complete else open_index(trace)
    depth = None
    if not isinstance(index, Unavailable):
        depth = index.facts.depth(k, kind)
        if depth is not None:
            ranking = search(index, queries, k, kind=kind)
            said = f"answered by the index (recall@{depth.k} {depth.recall:.3f} when calibrated); --exact scans all"
        else:
            index = Unavailable(index.facts.unserved(kind))
    if isinstance(index, Unavailable):
        ranking = scan(trace, queries, k)
        searched = len(trace.rows_done)
        if trace.complete:
            said = f"scanned all {searched:,} samples" + (f": {index.reason}" if index.reason else "")
        else:
            said = f"searched {searched:,} of {trace.header.samples:,} samples; the capture is unfinished"
    return Answer(
        hits=hits_of(trace, ranking),
        recall=None if depth is None else (depth.k, depth.recall),
        said=said,
        score=kind,
        taken_out=made.taken_out,
    )


def _check_script(trace: Store, run: Command) -> None:
    """Raises TraceError if the command's script is not the one that made the trace, as far as that is known."""
    # Of one that is not there nothing is known; that is said where it is run.
    script = script_of(run.script)
    check_script(
        trace.path,
        trace.header,
        script.name,
        script.sha256,
        "Ask with the script as it was; or, if its loss and its data are the same, with --edited-script "
        "(edited_script=True).",
    )


def _check_few(trace: Store, why: str) -> None:
    """Raises QueryError where no directions are kept, for this reason, and there are too many samples to find them."""
    numbers = int(trace.valid.sum()) * len(trace.header.timesteps) * trace.header.dimension
    if numbers > kernel.FOUND:
        if not trace.complete:
            raise QueryError(
                f"Deflated scores need the principal directions of the samples, which the index keeps once the capture "
                f"is finished; a query finds them in up to {kernel.FOUND:,} numbers, and what is done has {numbers:,}. "
                "Ask with --score dmin."
            )
        raise QueryError(
            "Deflated scores need the principal directions of the samples. The store's index keeps them, and here "
            f"{why or 'it has none'}; a query finds them in up to {kernel.FOUND:,} numbers, and this trace has "
            f"{numbers:,}. Make them with dmin-trace index {trace.path}, or ask with --score dmin."
        )


def sample_gradients(trace: Store, samples: Sequence[int]) -> np.ndarray:
    """The stored gradients of training samples, to ask with them: (Q, T, v). Needs no model.

    Raises TraceError for a sample that the store does not hold, QueryError for one whose gradients have no direction.
    """
    slots = np.array([trace.row_of(sample) for sample in samples])
    for sample, slot in zip(samples, slots, strict=True):
        if not trace.valid[slot]:
            raise QueryError(
                f"Sample {sample} has no gradient to ask with: it could not be loaded, or its gradient is zero or not "
                "finite. Ask with another."
            )
    return trace.gradients(slots)


def capture_queries(
    trace: Store,
    images: Sequence[str | os.PathLike[str] | Image.Image],
    prompts: Sequence[str | None] | None = None,
    *,
    conditioning: Sequence[str | os.PathLike[str] | Image.Image | None] | None = None,
    weights: str | os.PathLike[str] | None = None,
    command: Sequence[str] | None = None,
    edited_script: bool = False,
) -> np.ndarray:
    """The compressed gradients of queries, as `attribute` scores them: (Q, T, v) float32, of norm one or so for each t.

    Arguments and errors are those of `attribute`.
    """
    if not images:
        raise QueryError("No image was given. Give at least one.")
    prompts = [None] * len(images) if prompts is None else list(prompts)
    if len(prompts) != len(images):
        raise QueryError(f"{len(images)} images were given and {len(prompts)} prompts. Give one prompt for each image.")
    sources = [None] * len(images) if conditioning is None else list(conditioning)
    if len(sources) != len(images):
        raise QueryError(
            f"{len(images)} images were given and {len(sources)} conditioning images. Give one for each image."
        )
    run = _command(trace, command)
    if not edited_script:
        _check_script(trace, run)
    host = script_host()
    columns = host.query_columns(run.arguments, trace.header.batch)
    own_words = host.words_its_own_prompts(run.arguments)
    with_words = not own_words and (trained_with_words(trace) or host.takes_prompts(run.arguments))
    for k, (image, prompt, source) in enumerate(zip(images, prompts, sources, strict=True)):
        _check_whole(_name(image, k), prompt, source, with_words, own_words, columns.conditioning)
    loaded = Path(weights) if weights is not None else weights_beside(trace.path)
    if not loaded.exists():
        raise WeightsError(f"There are no weights at {loaded}. Give those that were traced, with --weights.")
    gradients = np.zeros((len(images), len(trace.header.timesteps), trace.header.dimension), np.float32)
    with tempfile.TemporaryDirectory(prefix="dmin-trace-query-") as name:
        folder = Path(name)
        videos = host.takes_videos(run.arguments)
        files = [_as_file(image, folder / f"given{k}.png", video=videos) for k, image in enumerate(images)]
        behind = [None if s is None else _as_file(s, folder / f"source{k}.png") for k, s in enumerate(sources)]
        runs = host.prepare_queries(run.arguments, columns, files, prompts, behind, folder)
        for n, query_run in enumerate(runs):
            part = folder / f"part{n}"
            part.mkdir()
            job = Job(
                mode="now",
                command=Command(run.script, query_run.arguments, run.folder),
                settings={},
                out=str(part / "queries.zarr"),
                weights=str(loaded.absolute()),
                like=str(trace.path.absolute()),
            )
            _run(job, part)
            group = list(query_run.queries)
            gradients[group] = _captured(part / "queries.zarr", [files[k] for k in group])
    return gradients


def generate_images(
    trace: Store,
    prompts: Sequence[str],
    folder: Path,
    *,
    num: int = 1,
    seed: int = 0,
    command: Sequence[str] | None = None,
) -> list[QueryInput]:
    """Makes images with the model that the traced run saved, and keeps them, named after prompt and seed.

    Args:
        trace: the store.
        prompts: what to show.
        folder: where the images are written; made if it is not there.
        num: how many images for each prompt, the k-th with the seed `seed + k`.
        seed: of the first image of each prompt.
        command: as for `attribute`.

    Raises QueryError where the run saved nothing that images can be made with.
    """
    run = _command(trace, command)
    if num < 1:
        raise QueryError(f"{num} images were asked for. Give --num 1 or more.")
    wanted = [(prompt, seed + k) for prompt in prompts for k in range(num)]
    try:
        images = script_host().generate(run.arguments, Path(run.folder), wanted)
    except (ValueError, OSError) as error:
        raise QueryError(
            f"No image could be made from the prompt: {error} Make it yourself, and give it before --prompt."
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    asked = []
    for image, (prompt, used) in zip(images, wanted, strict=True):
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "image"
        path = folder / f"{words}-{used}.png"
        image.save(path)
        asked.append(QueryInput(path, prompt))
    return asked


def trained_with_words(trace: Store) -> bool:
    """Whether the script's batches held captions, tokens, or embeddings of them."""
    batch = trace.header.batch
    return any(len(shape) < 3 or "prompt" in name for name, shape in batch.items())


def hits_of(trace: Store, ranking: Ranking) -> list[list[Hit]]:
    """A ranking with what the store knows about its samples."""
    columns = {name: trace.column(name) for name in trace.header.columns}
    sample = trace.sample
    return [
        [
            Hit(
                rank=rank,
                sample=int(sample[slot]),
                score=float(value),
                per_timestep=tuple(float(share) for share in shares),
                columns={name: values[slot] for name, values in columns.items()},
            )
            for rank, (slot, value, shares) in enumerate(zip(slots, values, all_shares, strict=True), start=1)
        ]
        for slots, values, all_shares in zip(ranking.rows, ranking.scores, ranking.per_timestep, strict=True)
    ]


def _check_whole(
    name: str,
    prompt: str | None,
    source: str | os.PathLike[str] | Image.Image | None,
    with_words: bool,
    own_words: bool,
    conditioning: str | None,
) -> None:
    """Raises QueryError where a question lacks what the model was trained with, or has what it was not."""
    if with_words and prompt is None:
        raise QueryError(
            f"The model was trained with captions, but {name} came without its prompt. Give the prompt of each image "
            "with --prompt, an empty one for an image made without."
        )
    if own_words and prompt is not None:
        raise QueryError(
            f"A prompt was given with {name}, but the script makes up its own around --placeholder_token. Leave "
            "--prompt out."
        )
    if conditioning is not None and source is None:
        raise QueryError(
            f"The model makes images from a conditioning image ({conditioning}), but {name} came without the one that "
            "it was made from. Give it with --conditioning."
        )
    if conditioning is None and source is not None:
        raise QueryError(
            f"A conditioning image was given with {name}, but the model takes none. Leave --conditioning out."
        )


def query_rows(captured: Store, names: Sequence[str]) -> np.ndarray:
    """The rows of a capture of queries, (Q, T, v) float32, one for each name.

    Raises QueryError where a gradient has no direction.
    """
    bad = np.flatnonzero(~captured.valid)
    if bad.size:
        raise QueryError(f"The gradient of {names[bad[0]]} is zero or not finite, so it has no direction.")
    return captured.gradients(np.arange(len(names)))


def _captured(path: Path, files: Sequence[Path]) -> np.ndarray:
    captured = open_store(path)
    if captured.header.samples != len(files):
        raise ScriptError(
            f"The script made {captured.header.samples} samples of {len(files)} images, so it cannot be told "
            "which is which. Leave repeats and extra data out of its arguments."
        )
    return query_rows(captured, [file.name for file in files])


def _name(image: str | os.PathLike[str] | Image.Image, k: int) -> str:
    return f"image {k}" if isinstance(image, Image.Image) else Path(image).name


def _command(trace: Store, given: Sequence[str] | None) -> Command:
    if given:
        return Command(str(Path(given[0]).absolute()), tuple(given[1:]), str(Path.cwd()))
    remembered = recall(trace.header.id)
    if remembered is None and "accelerate" not in trace.header.writers:
        raise QueryError(
            "This trace was not recorded from a script's command but by code of its own, which is asked in Python: "
            f"with dmin_trace.recording(model, like={str(trace.path)!r}, samples=...), or with "
            "dmin_trace.integrations.lightning.attribute for a Lightning module."
        )
    if remembered is None:
        raise QueryError(
            "The command that made this trace is not known on this machine (it is never taken from a store). Give it "
            "after the images: dmin-trace query TRACE IMAGE -- SCRIPT ARGS."
        )
    if not Path(remembered.folder).is_dir():
        raise QueryError(
            f"The trace was made in {remembered.folder}, which is gone. Give the command after the images: dmin-trace "
            "query TRACE IMAGE -- SCRIPT ARGS."
        )
    return remembered


def _as_file(image: str | os.PathLike[str] | Image.Image, path: Path, *, video: bool = False) -> Path:
    if isinstance(image, Image.Image):
        image.save(path)
        return path
    file = Path(image)
    try:
        found = file.is_file()
    except (OSError, ValueError):  # a name that is longer than any
        found = False
    if not found:
        raise QueryError(f"There is no {'video' if video else 'image'} at {file}.")
    if video:
        # Read by the script alone, with the library that it has for that.
        return file
    try:
        with warnings.catch_warnings():
            # An image that would unpack to hundreds of megapixels is an attack or a mistake.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as opened:
                opened.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise QueryError(f"{file} is larger than any image to ask about: {error} Give a smaller one.") from None
    except Exception as error:
        # What decoders raise on bytes from anybody is anything.
        raise QueryError(f"{file} cannot be read as an image: {error}. Give a PNG or JPEG file.") from None
    return file


def _run(job: Job, folder: Path) -> None:
    """Runs a job in a process of its own. What the script prints is shown only if it fails."""
    (folder / "job.json").write_text(job.to_json(), encoding="utf-8")
    with (folder / "log.txt").open("w+b") as log:
        code = subprocess.run(
            # -P: without it a folder named dmin_trace where the user stands would be imported instead of this package.
            [sys.executable, "-P", "-m", "dmin_trace.capture.launch", str(folder / "job.json")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Otherwise `datasets` would keep a copy of every query for ever.
            env={**os.environ, "HF_DATASETS_CACHE": str(folder / "cache")},
            check=False,
        ).returncode
    if code == 0:
        return
    *words, last = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
    try:
        refusal = json.loads(last)
        kind, message = getattr(errors, refusal["error"]), str(refusal["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ScriptError(f"{job.command.script} failed on the query with exit code {code}: {last}") from None
    if kind is ScriptError and words:
        message = f"{message} Its last line was: {words[-1]}"
    raise kind(message) if issubclass(kind, DminTraceError) else ScriptError(message)
