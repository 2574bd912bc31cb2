"""From a generated image, and its prompt, to the training samples that made the model make it.

A query is a capture of a tiny dataset: the script that was traced, with the traced weights and its data argument
pointed at a folder with the queries, runs its loop body on them in a process of its own. Same code, same noise, same
timesteps, same projection; the inner products with the store's rows are the influences (paper, equations 7 to 9).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dmin_trace import errors, score
from dmin_trace.commands import Command, Job, recall
from dmin_trace.errors import DminTraceError, QueryError, ScriptError, WeightsError
from dmin_trace.report import Hit
from dmin_trace.score import Ranking
from dmin_trace.store import Trace, open_trace


def attribute(
    trace: Trace | str | os.PathLike[str],
    images: Sequence[str | os.PathLike[str] | Image.Image],
    prompts: Sequence[str | None] | None = None,
    *,
    k: int = 10,
    also: Sequence[Mapping[str, str | os.PathLike[str]]] | None = None,
    weights: str | os.PathLike[str] | None = None,
    command: Sequence[str] | None = None,
) -> list[list[Hit]]:
    """The training samples with the largest influence on each image, best first.

    Args:
        trace: the store, or its path.
        images: the images, as files or as PIL images, of the size that the model was trained on.
        prompts: the prompt of each image, for models that were trained with captions.
        k: how many training samples for each image.
        also: for models that were trained on pairs, the other images of each query by the name of their dataset
            column, such as `{"conditioning_image": "edges.png"}`.
        weights: the traced weights; those beside the store if not given.
        command: the script and its arguments, as the traced run was started; what this user's machine remembers of
            that run if not given. `{data}` in an argument stands for the folder with the queries.

    Returns:
        A list of k hits for each image.

    Raises:
        QueryError: no such image, one that cannot be asked of this trace, or k is out of range.
        WeightsError: the weights are missing or not those of the trace.
        ScriptError: the script failed on the queries.
        TraceError: there is no finished store.
    """
    trace = trace if isinstance(trace, Trace) else open_trace(Path(trace))
    score.check_k(trace, k)
    gradients = capture_queries(trace, images, prompts, also=also, weights=weights, command=command)
    return hits_of(trace, score.exact(trace, gradients, k))


def attribute_samples(trace: Trace, samples: Sequence[int], *, k: int = 10) -> list[list[Hit]]:
    """The training samples with the largest influence on training samples of the same store. Needs no model.

    Raises QueryError for a sample that the store does not hold, or k out of range.
    """
    score.check_k(trace, k)
    gradients = trace.rows(np.array([trace.slot_of(sample) for sample in samples]))
    return hits_of(trace, score.exact(trace, gradients, k))


def capture_queries(
    trace: Trace,
    images: Sequence[str | os.PathLike[str] | Image.Image],
    prompts: Sequence[str | None] | None = None,
    *,
    also: Sequence[Mapping[str, str | os.PathLike[str]]] | None = None,
    weights: str | os.PathLike[str] | None = None,
    command: Sequence[str] | None = None,
) -> np.ndarray:
    """The compressed gradients of queries, as `attribute` scores them: (Q, T, v) float32, of norm one or so for each t.

    Arguments and errors are those of `attribute`.
    """
    if not images:
        raise QueryError("No image was given. Give at least one.")
    prompts = [None] * len(images) if prompts is None else list(prompts)
    if len(prompts) != len(images):
        raise QueryError(f"{len(images)} images were given and {len(prompts)} prompts. Give one prompt for each image.")
    also = [{} for _ in images] if also is None else also
    if len(also) != len(images):
        raise QueryError(f"{len(images)} images were given, and companions of {len(also)}. Give a mapping for each.")
    run = _command(trace, command)
    loaded = Path(weights) if weights is not None else weights_beside(trace.path)
    if not loaded.exists():
        raise WeightsError(f"There are no weights at {loaded}. Give those that were traced, with --weights.")
    with tempfile.TemporaryDirectory(prefix="dmin-trace-query-") as name:
        folder = Path(name)
        files = [_as_file(image, folder / f"given{k}.png") for k, image in enumerate(images)]
        others = [{name: _as_file(other, folder / "unused.png") for name, other in pair.items()} for pair in also]
        # The integration imports torch, which the command line needs for nothing else.
        from dmin_trace.integrations import diffusers

        script = Path(run.script)
        source = script.read_text(encoding="utf-8", errors="replace") if script.is_file() else ""
        runs = diffusers.prepare_queries(run.arguments, source, files, prompts, others, folder)
        parts = []
        for k, part in enumerate(runs):
            job = Job(
                mode="now",
                command=Command(run.script, part.arguments, run.folder),
                settings={},
                out=str(folder / f"queries{k}.zarr"),
                weights=str(loaded.absolute()),
                like=str(trace.path.absolute()),
            )
            parts.append(_captured(job, folder, part.count))
        norm = np.concatenate([captured.norm for captured in parts])
        bad = np.flatnonzero(~np.isfinite(norm).all(axis=1) | (norm == 0).any(axis=1))
        if bad.size:
            raise QueryError(f"The gradient of {files[bad[0]].name} is zero or not finite, so it has no direction.")
        return np.concatenate([captured.rows(np.arange(captured.header.samples)) for captured in parts])


def _captured(job: Job, folder: Path, count: int) -> Trace:
    """What a run of the script on so many queries captured."""
    _run(job, folder)
    captured = open_trace(Path(job.out or ""))
    if captured.header.samples != count:
        raise ScriptError(
            f"The script made {captured.header.samples} samples of {count} images, so it cannot be told which is "
            "which. Leave repeats and extra data out of its arguments."
        )
    return captured


def hits_of(trace: Trace, ranking: Ranking) -> list[list[Hit]]:
    """A ranking with what the store knows about its samples."""
    columns = {name: trace.column(name) for name in trace.header.columns}
    sample = trace.sample
    return [
        [
            Hit(
                rank=rank,
                sample=int(sample[slot]),
                score=float(value),
                shares=tuple(float(share) for share in shares),
                columns={name: values[slot] for name, values in columns.items()},
            )
            for rank, (slot, value, shares) in enumerate(zip(slots, values, all_shares, strict=True), start=1)
        ]
        for slots, values, all_shares in zip(ranking.slots, ranking.scores, ranking.shares, strict=True)
    ]


def weights_beside(path: Path) -> Path:
    """The file beside a store that holds the weights it was captured from."""
    return path.with_name(path.name.removesuffix(".zarr") + ".weights.safetensors")


def _command(trace: Trace, given: Sequence[str] | None) -> Command:
    if given:
        return Command(str(Path(given[0]).absolute()), tuple(given[1:]), str(Path.cwd()))
    remembered = recall(trace.header.id)
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


def _as_file(image: str | os.PathLike[str] | Image.Image, path: Path) -> Path:
    if isinstance(image, Image.Image):
        image.save(path)
        return path
    file = Path(image)
    if not file.is_file():
        raise QueryError(f"There is no image at {file}.")
    try:
        with warnings.catch_warnings():
            # An image that would unpack to hundreds of megapixels is an attack or a mistake.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                opened.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise QueryError(f"{file} cannot be read as an image: {error}. Give a PNG or JPEG file.") from None
    return file


def _run(job: Job, folder: Path) -> None:
    """Runs a job in a process of its own. What the script prints is shown only if it fails."""
    (folder / "job.json").write_text(job.to_json(), encoding="utf-8")
    with (folder / "log.txt").open("w+b") as log:
        code = subprocess.run(
            [sys.executable, "-m", "dmin_trace.launch", str(folder / "job.json")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
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
