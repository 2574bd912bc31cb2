"""Runs the traced script on queries, each run in a process of its own and in a copy of its working directory."""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from dmin_trace.capture.host import Host, QueryColumns, QueryRun
from dmin_trace.command import Command, Job
from dmin_trace.errors import QueryError, ScriptError
from dmin_trace.query.file_marks import FileMark, run_marks
from dmin_trace.query.stages import Stages
from dmin_trace.start import GRADIENTS, READ_FILE, Tell, start_job
from dmin_trace.store import FILE_COLUMN, Store, open_store, query_gradients

logger = logging.getLogger(__name__)
STARTING = "Starting the script"
WORK = "work"
"""The copy of the script's working directory, full of links."""


@dataclass(frozen=True)
class ScriptQuery:
    """A query whose files are as the script reads them; None for what it has not."""

    name: str
    image: Path
    prompt: str | None
    conditioning: Path | None
    without: str | None


@dataclass(frozen=True)
class Captured:
    """What a run of the script gave: the numbers of queries, their gradients (n, R, v), and the files that the run
    depended on, if they are known."""

    queries: list[int]
    gradients: NDArray[np.float32]
    files: list[FileMark] | None


@dataclass(frozen=True)
class ScriptRuns:
    """Runs the script of a trace on queries. `run` has an argument for its data; `folder` is for temporary files."""

    store: Store
    host: Host
    columns: QueryColumns
    run: Command
    weights: Path
    any_device: bool
    folder: Path
    stages: Stages

    def of(self, queries: Sequence[ScriptQuery]) -> Iterator[Captured]:
        """Runs the script until all queries are captured."""
        wholes = [(k, one.prompt) for k, one in enumerate(queries) if one.without is None]
        # Of a query for a concept, one sample has the prompt, and the next one the prompt without the concept.
        pairs = [
            (k, text) for k, one in enumerate(queries) if one.without is not None for text in (one.prompt, one.without)
        ]
        done = 0
        for samples, differences in ((wholes, False), (pairs, True)):
            if not samples:
                continue
            place = self.folder / ("pairs" if differences else "wholes")
            place.mkdir()
            numbers = [k for k, _ in samples]
            images, sources = [queries[k].image for k in numbers], [queries[k].conditioning for k in numbers]
            of_samples = images, [text for _, text in samples], sources
            prepared = self.host.prepare_queries(self.run.arguments, self.columns, *of_samples, place)
            for n, query_run in enumerate(prepared):
                if differences:
                    check_pairs(query_run.queries)
                (part := place / f"part{n}").mkdir()
                files = self._run(query_run, part, differences, partial(self._tell, done, len(queries)))
                captured = open_store(part / "queries.zarr")
                group = [numbers[sample] for sample in query_run.queries[:: 2 if differences else 1]]
                group = [group[k] for k in _order(captured)]
                concepts = range(len(group)) if differences else ()
                names = [queries[k].name for k in group]
                done += len(group)
                yield Captured(group, query_gradients(captured, names, concepts), files)

    def _run(self, run: QueryRun, part: Path, differences: bool, tell: Tell) -> list[FileMark] | None:
        """Runs the script once; its store is in the folder `part`. Returns the marks of the files that it depended
        on, if they are known."""
        trace = self.store.path.absolute()
        job = Job(
            mode="now",
            command=msgspec.structs.replace(self.run, arguments=run.arguments),
            settings={},
            out=str(part / "queries.zarr"),
            weights=str(self.weights.absolute()),
            like=str(trace),
            any_device=self.any_device,
            samples=len(run.queries),
            differences=differences,
        )
        read, work, own = _run(job, part, tell), part / WORK, Path(self.run.folder)
        return None if read is None else run_marks(read, run.arguments, work, own, (self.folder, trace))

    def _tell(self, before: int, total: int, stage: str, done: int, of_run: int) -> None:
        """Shows a stage of a run, before which `before` of `total` queries were captured."""
        counts = (before + done, total) if stage == GRADIENTS else (0, 0)
        self.stages.begin(stage, *counts)


def check_pairs(samples: Sequence[int]) -> None:
    """Raises QueryError unless a run of the script has both samples of each difference, one after the other."""
    firsts = samples[::2]
    if list(samples) != [n for first in firsts for n in (first, first + 1)] or any(first % 2 for first in firsts):
        raise QueryError(
            "The script takes one prompt for all its images (--instance_prompt), so it cannot run two prompts on one "
            "picture. Query the whole image: leave out what is without the concept (--concept, --without)."
        )


def _order(captured: Store) -> list[int]:
    """For each captured sample the number of its query among those of the run, which is in the name of its file.

    A script may shuffle its data. Where files have no such names, samples are in the order of the queries.
    """
    count = captured.header.samples
    names = captured.column(FILE_COLUMN) if captured.header.columns.get(FILE_COLUMN) == "string" else []
    numbers = [int(stem) if (stem := Path(name).stem).isdecimal() else -1 for name in names]
    return numbers if sorted(numbers) == list(range(count)) else list(range(count))


def _run(job: Job, folder: Path, tell: Tell) -> list[str] | None:
    """Runs a script on queries, in a copy of its working directory. What it prints is shown only if it fails without
    saying why. Returns the files that it was seen to read, if that is known."""
    (work := folder / WORK).mkdir()
    own = Path(job.command.folder)
    try:
        for entry in own.iterdir():
            (work / entry.name).symlink_to(entry)
    except OSError as error:
        raise ScriptError(f"The script's folder {own} cannot be read: {error.strerror or error}.") from None
    arguments = tuple(_from_elsewhere(argument, own) for argument in job.command.arguments)
    command = msgspec.structs.replace(job.command, arguments=arguments, folder=str(work))
    tell(STARTING, 0, 0)
    with (folder / "log.txt").open("w+b") as log:
        code = start_job(msgspec.structs.replace(job, command=command), folder, log, tell)
    if made := sorted(entry.name for entry in work.iterdir() if not entry.is_symlink()):
        logger.warning("On the query the script wrote %s to its working directory; it is thrown away.", ", ".join(made))
    if code:
        said = _last_line((folder / "log.txt").read_text(encoding="utf-8", errors="replace"))
        raise ScriptError(f"{job.command.script} failed on the query with exit code {code}: {said}")
    if not (folder / READ_FILE).is_file():
        return None
    return list(json.loads((folder / READ_FILE).read_text(encoding="utf-8")))


def _last_line(log: str) -> str:
    """The last line of a script's output that is no progress bar."""
    lines = [line.strip() for line in re.split(r"[\r\n]", log)]
    return next((line for line in reversed(lines) if line and not re.search(r"\d+%\|", line)), "it printed nothing")


def _from_elsewhere(argument: str, folder: Path) -> str:
    """An argument, or the value in `--name=value`, with a path that leads out of its folder made absolute."""
    name, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    leads_out = value.startswith("..") and (folder / value).exists()
    return f"{name}{equals}{(folder / value).resolve()}" if leads_out else argument
