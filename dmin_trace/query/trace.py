"""The face for programs: `Trace`, an opened trace with everything by data set index, and `open_trace`."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

import numpy as np
from numpy.typing import NDArray

from dmin_trace import search
from dmin_trace.errors import QueryError, TraceError, brief
from dmin_trace.query.answer import Hit, ScoreMethod, TopK, answer_queries
from dmin_trace.query.capture import capture_queries
from dmin_trace.query.columns import Columns
from dmin_trace.query.groups import Groups, group_samples
from dmin_trace.query.inputs import ImageInput, small_picture
from dmin_trace.query.sample_pictures import SamplePictures
from dmin_trace.query.scores_file import write_scores
from dmin_trace.query.totals import Totals, total_groups
from dmin_trace.search import BuiltInScore, Score
from dmin_trace.store import Queries, Store, open_store

if TYPE_CHECKING:
    import torch


class Trace:
    """A trace opened for reading: the projected gradients of N training samples at T timesteps, v numbers each.

    A sample has R projected gradients: one for each timestep (R = T), or one for each of `groups` where timesteps were
    pooled (`Settings.rows`).

    Made by `open_trace`. Everything is by data set index: place i of an array is sample i of the data set. Use it as a
    context manager, or call `close`, to free its files.

    A sample has no usable gradient if it could not be loaded or is not done, or if its gradient is zero or not finite
    at some timestep. Such a sample has NaN for its scores, and is in no ranking.
    """

    def __init__(self, store: Store) -> None:
        self._store: Store | None = store
        self._fitted: dict[str | int, BuiltInScore | ScoreMethod] = {}

    @property
    def store(self) -> Store:
        """The store on disk; its interface may change with any version. Raises TraceError if the trace is closed."""
        if self._store is None:
            raise TraceError("The trace is closed. Open it again with open_trace.")
        return self._store

    @property
    def path(self) -> Path:
        """Where the trace is."""
        return self.store.path

    @property
    def complete(self) -> bool:
        """Whether the capture is finished."""
        return self.store.complete

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The T timesteps, as numbers of the training schedule."""
        return self.store.header.timesteps

    @property
    def groups(self) -> tuple[tuple[float, ...], ...]:
        """For each of a sample's R projected gradients its timesteps: one, or several that were pooled."""
        return self.store.header.groups

    def __len__(self) -> int:
        """N, the number of training samples."""
        return self.store.header.samples

    def __repr__(self) -> str:
        if self._store is None:
            return "Trace(closed)"
        header = self.store.header
        state = "complete" if self.complete else f"unfinished: {len(self.store.rows_done):,} done"
        rows = "" if header.group_count is None else f", R={header.group_count}"
        size = f"{header.samples:,} samples, T={len(header.timesteps)}{rows}, v={header.dimension:,}"
        return f"Trace({size}, {header.dtype}, {state})"

    def _repr_html_(self) -> str:
        """What a notebook shows: what the trace holds, and the pictures of its first samples."""
        from dmin_trace.views.notebook import trace_html

        return trace_html(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the files of the trace. It cannot be used afterwards."""
        self._store, self._fitted = None, {}
        self.__dict__.pop("_index", None)

    @property
    def columns(self) -> Columns:
        """The readable columns, such as captions: from each name to the N values, or as a table by `to_pandas()`."""
        return Columns(self.store, self._rows)

    @property
    def thumbnails(self) -> SamplePictures:
        """The pictures of the samples, small: `trace.thumbnails[17]` is a PIL image, or None without one."""
        return SamplePictures(self.store, self._rows)

    @property
    def norms(self) -> NDArray[np.float32]:
        """(N, R) float32: the L2 norm by which each transformed gradient was divided. NaN for a sample that could not
        be loaded or is not done."""
        norms = self.store.norm[self._rows]
        return np.where(norms < 0, np.float32(np.nan), norms)

    @property
    def losses(self) -> NDArray[np.float32]:
        """(N, T) float32: the training loss. NaN for a sample that could not be loaded or is not done."""
        return self.store.loss[self._rows]

    def gradients(self, samples: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """The projected gradients of training samples: (n, R, v) float32, of norm about one each; NaN for a sample
        without a usable gradient. Raises TraceError for a sample that the trace does not hold."""
        rows = self.store.rows_of(np.asarray(samples).tolist())
        gradients = self.store.gradients(rows)
        gradients[~search.has_direction(self.store.numbers(rows).norm)] = np.nan
        return gradients

    def self_influence(self, score: Score | ScoreMethod = "deflated") -> NDArray[np.float32]:
        """The score of each training sample with itself as the query: (N,) float32.

        The score "dmin" is about R for each sample. The deflated score is high for a sample that shares little with the
        others. NaN for a sample without a usable gradient. Raises QueryError and TraceError as `scores` does.
        """
        store, fitted = self.store, self._fitted_score(score)
        by_row = np.full(len(self), np.nan, np.float32)
        rows = np.flatnonzero(store.valid)
        for here in search.row_blocks(store, rows):
            gradients = store.gradients(rows[here])
            by_row[rows[here]] = np.vecdot(fitted.transform(gradients), gradients).sum(axis=1)
        return by_row[self._rows]

    def query_images(
        self,
        images: Sequence[ImageInput],
        prompts: Sequence[str | None] | None = None,
        *,
        without: Sequence[str | None] | None = None,
        conditioning: Sequence[ImageInput | None] | None = None,
        weights: str | os.PathLike[str] | None = None,
        command: Sequence[str] | None = None,
        edited_script: bool = False,
        any_device: bool = False,
        cache: bool = True,
        progress: Callable[[str], None] | None = None,
    ) -> Queries:
        """The gradients of images, from one more run of the traced script, or from an earlier one.

        Args:
            images: files or PIL images, of the size that the model was trained on; or video files.
            prompts: the prompt of each image, for models that were trained with captions.
            without: the prompt of each image without a concept, for queries for that concept: which training samples
                taught the model what the prompt has beyond this one. Such a query is the difference between the
                gradients with both prompts. None for a query for the whole image.
            conditioning: what each image was made from, for a ControlNet or a model that edits images.
            weights: the traced weights; those beside the trace if not given.
            command: the script and its arguments, as the traced run was started; what this user's machine remembers of
                that run if not given. `{data}` in an argument stands for the folder with the queries.
            edited_script: the script was edited since the trace was made, but neither its loss nor its data.
            any_device: accept another type of device than the trace's, whose generators draw other noise.
            cache: keep the gradients in the user's cache folder, and use those that are there: the script is run for
                the queries that were not asked before, or of which something has changed.
            progress: called with what the query does now, in words, such as "Gradients 3 of 8".

        Raises QueryError if an image is missing, of another size, or lacks its prompt, if the two prompts of a query
        for a concept make no difference or the script takes one prompt for all images, or the command is not known;
        WeightsError if the weights are missing or not those of the trace, nor the frozen models; ScriptError if the
        script failed on the queries; TraceError if it is not the script that made the trace. A precision or a device
        that is not the trace's is a QueryError.
        """
        queries = capture_queries(
            self.store,
            images,
            prompts,
            conditioning,
            weights,
            command,
            edited_script,
            any_device,
            without,
            cache,
            progress,
        )
        return replace(queries, pictures=tuple(map(small_picture, images)))

    def query_samples(self, samples: Sequence[int]) -> Queries:
        """The stored gradients of training samples, as queries. Raises TraceError for a sample that the trace does not
        hold, QueryError for one without a usable gradient."""
        if not len(samples):
            raise QueryError("No sample was given. Give at least one.")
        rows = self.store.rows_of(samples)
        usable = search.has_direction(self.store.numbers(rows).norm)
        if not usable.all():
            found = f"Sample {samples[int(np.argmin(usable))]} has no gradient to use as a query"
            why = "it could not be loaded, or its gradient is zero or not finite"
            raise QueryError(f"{found}: {why}. Give another sample.")
        names = tuple(f"sample {sample}" for sample in samples)
        pictures = tuple(self.store.thumbnails.webp(int(row)) for row in rows)
        return Queries(self.store.gradients(rows), names, (None,) * len(names), self.store.header.id, (), pictures)

    def query_loss(
        self,
        model: "torch.nn.Module | Sequence[torch.nn.Module]",
        items: Sequence[Any],
        loss: Callable[[Any, Any], Any],
        *,
        without: Sequence[Any] | None = None,
        pictures: Sequence[ImageInput | None] | None = None,
    ) -> Queries:
        """The gradients of a loss on items, computed in this process: for a trace that `recording` made.

        Args:
            model: what was recorded, with the traced weights.
            items: Q items, as the loop of the recording took them from its data set.
            loss: `loss(model, item)` is the loss that the recording called `backward` on. It draws its noise and its
                timestep in the same way; both are pinned to those of the trace.
            without: for queries for a concept, each item again with a prompt without that concept, and otherwise the
                same; None for a query for the whole item. Such a query is the difference between both gradients.
            pictures: what each item shows, a file or a PIL image, for people to look at beside its samples.

        Raises QueryError if there are no items, the two prompts of a query for a concept make no difference, or the
        gradients cannot be compared with those of the trace,
        CaptureError if the loss cannot be recorded, WeightsError if the model's weights are not those of the trace.
        """
        from dmin_trace.capture.recording import recording  # only here does a query run a model in this process

        if not len(items):
            raise QueryError("No item was given. Give at least one.")
        if without is not None and len(without) != len(items):
            raise QueryError(f"{len(items)} items were given and {len(without)} without a concept. Give one for each.")
        if pictures is not None and len(pictures) != len(items):
            raise QueryError(f"{len(items)} items were given and {len(pictures)} pictures. Give one for each.")
        with recording(model, samples=len(items), like=self.store) as record:
            for i in record.samples:
                for k in record.timesteps:
                    if without is not None and without[i] is not None:
                        with record.step(i, k, subtract=True):
                            loss(model, without[i]).backward()
                    with record.step(i, k):
                        loss(model, items[i]).backward()
        shown = () if pictures is None else tuple(None if one is None else small_picture(one) for one in pictures)
        return replace(record.queries, pictures=shown)

    def scores(
        self,
        queries: Queries,
        score: Score | ScoreMethod = "deflated",
        *,
        per_timestep: bool = False,
        out: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """The influence score of every training sample for each query.

        Args:
            score: "dmin" is the paper's sum of inner products; "deflated" first takes out of the query what all
                samples share, along their principal directions; or a score of one's own (`ScoreMethod`).
            per_timestep: give the inner product at each timestep, not their sum; for each of `groups`, where timesteps
                are pooled.
            out: where the scores are written; an array of `numpy.memmap` if they do not fit into memory.

        Returns (Q, N) float32, or (Q, N, R) per timestep, in `out` if given; NaN if a sample has no usable gradient.

        Raises QueryError if the queries are of another trace, `out` is of another shape or dtype, or the trace is too
        large for deflated scores without an index; TraceError if the trace is damaged.
        """
        self._check_queries(queries)
        transformed = self._fitted_score(score).transform(queries.gradients)
        shape = (len(queries), len(self), len(self.groups))[: 3 if per_timestep else 2]
        if out is not None and (out.shape != shape or out.dtype != np.float32):
            raise QueryError(f"out is {out.dtype} of shape {out.shape}; expected float32 of shape {shape}.")
        scores = np.empty(shape, np.float32) if out is None else out
        if not self.complete:
            scores[...] = np.nan
        samples = np.argsort(self._rows)  # by row
        for rows, of_chunk in search.scores_by_chunk(self.store, transformed, per_timestep=per_timestep):
            scores[:, samples[rows.start : rows.stop]] = of_chunk
        return scores

    def totals(
        self,
        queries: Queries,
        by: str | None = None,
        groups: Groups | str | os.PathLike[str] | None = None,
        *,
        merge: bool = False,
        score: Score | ScoreMethod = "deflated",
    ) -> Totals:
        """What groups of training samples, such as an artist's or a folder's, have of the influence on each query.

        Args:
            by: the name of a column; "folder" for the folder of each file, if no column has that name. A value may name
                several groups, with a ";" between them: the sample counts in each.
            groups: in place of a column, the group of each file, or several; or a CSV or JSON file with them. In CSV
                `by` is the heading of the groups.
            merge: count near-copies once, with the mean of their scores.
            score: as for `scores`.

        Raises QueryError if there is no such column, the file cannot be read, no sample is in a group, and otherwise
        what `scores` raises.
        """
        search.usable_k(self.store, 1)
        self._check_queries(queries)
        grouping = group_samples(self, by, groups)
        copies = search.near_copies(self.store) if merge else None
        return total_groups(self, queries, grouping, score, copies=copies)

    def write_scores(
        self,
        queries: Queries,
        path: str | os.PathLike[str],
        score: Score | ScoreMethod = "deflated",
        *,
        per_timestep: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Writes the influence score of every training sample for each query to a file, whole or not at all.

        Args:
            path: a .npy file has what `scores` gives. A .parquet file has a row for each query and sample, with the
                columns of `TopK.to_pandas`; rank, score, z and stands_out are missing where a sample has no usable
                gradient, and equal scores are ranked by the data set index.
            score, per_timestep: as of `scores`.
            progress: called with how many queries are written.

        Raises QueryError if the file has another ending or cannot be written, or pyarrow is not installed for Parquet,
        and what `scores` raises.
        """
        write_scores(self, queries, path, score, per_timestep, progress)

    def top_k(
        self,
        queries: Queries,
        k: int = 10,
        score: Score | ScoreMethod = "deflated",
        *,
        largest: bool = True,
        exact: bool = False,
    ) -> TopK:
        """The k training samples with the largest influence score for each query, largest first; all, if k is larger.

        With `largest` False they are those with the smallest, smallest first, which speak most against the query. The
        index answers if it matches the trace and serves k samples; otherwise, and with `exact`, all are scanned.
        `score` is as for `scores`. Raises QueryError if k is below 1, and what `scores` raises.
        """
        k = search.usable_k(self.store, k)
        self._check_queries(queries)
        return answer_queries(
            self.store,
            queries.gradients,
            k=k,
            score=self._fitted_score(score),
            names=queries.names,
            prompts=queries.prompts,
            without=queries.without,
            pictures=queries.pictures,
            largest=largest,
            exact=exact,
            index=self._index if largest and not exact and self.complete else None,
        )

    @cached_property
    def _rows(self) -> NDArray[np.int64]:
        """(N,) the row of each data set index. Samples that are not done get the rows that are not done."""
        count, done = len(self), self.store.rows_done
        samples = self.store.sample[done]
        if not np.array_equal(np.unique(samples[(samples >= 0) & (samples < count)]), np.sort(samples)):
            held = f"{self.path} has samples twice, or samples that are not in 0 to {count - 1}"
            raise TraceError(f"{held}. Use its rows: Trace.store.")
        rows = np.full(count, -1, np.int64)
        rows[samples] = done
        rows[rows < 0] = np.setdiff1d(np.arange(count), done)
        return rows

    @cached_property
    def _index(self) -> search.Index | search.Unavailable:
        return search.open_index(self.store)

    def _check_queries(self, queries: Queries) -> None:
        if queries.trace_id != self.store.header.id:
            raise QueryError(
                f"The queries are of the trace {brief(queries.trace_id)}, and {self.path} is {self.store.header.id}. "
                "Their gradients cannot be compared. Make queries with the methods of this trace."
            )

    def _fitted_score(self, score: Score | ScoreMethod) -> BuiltInScore | ScoreMethod:
        """The score, fitted to this trace once."""
        key = score if isinstance(score, str) else id(score)
        if key not in self._fitted:
            if isinstance(score, str):
                self._fitted[key] = search.fit_score(self.store, score)
            elif score.name in get_args(Score):
                raise QueryError(f"Your score has the name {score.name}, which is built in. Give it another.")
            else:
                score.fit(self)
                self._fitted[key] = score
        return self._fitted[key]


def open_trace(path: str | os.PathLike[str], *, unfinished: bool = False, not_final: bool = False) -> Trace:
    """Opens a trace for reading.

    Args:
        path: the store.
        unfinished: open it even if its capture is not finished.
        not_final: open it even if the training moved the weights after they were captured, so that it does not
            explain the model that was trained.

    Raises TraceError if there is no trace at `path`, or it is of another version, unfinished, not of the final weights
    or damaged.
    """
    store = open_store(path, unfinished=unfinished)
    if not (store.final or not_final):
        raise TraceError(
            f"{path} is not of the final weights: the training moved them after they were captured. Capture the model "
            "that it ended with: dmin-trace capture --weights DIR -- SCRIPT ARGS; or, for the weights that were "
            "captured, open_trace(path, not_final=True)."
        )
    return Trace(store)


def attribute(
    trace: Trace | str | os.PathLike[str],
    images: Sequence[ImageInput],
    prompts: Sequence[str | None] | None = None,
    *,
    without: Sequence[str | None] | None = None,
    conditioning: Sequence[ImageInput | None] | None = None,
    k: int = 10,
    weights: str | os.PathLike[str] | None = None,
    command: Sequence[str] | None = None,
    score: Score | ScoreMethod = "deflated",
    exact: bool = False,
    edited_script: bool = False,
    any_device: bool = False,
    cache: bool = True,
) -> list[list[Hit]]:
    """The k training samples with the largest influence score for each image, best first. `trace` may be a path.

    It is `Trace.query_images` and `Trace.top_k` in one call, with their arguments, and raises what they raise.
    """
    opened = trace if isinstance(trace, Trace) else open_trace(trace)
    # Before the images are captured, which takes long.
    k = search.usable_k(opened.store, k)
    if isinstance(score, str):
        search.check_score(opened.store, score)
    queries = opened.query_images(
        images,
        prompts,
        without=without,
        conditioning=conditioning,
        weights=weights,
        command=command,
        edited_script=edited_script,
        any_device=any_device,
        cache=cache,
    )
    return opened.top_k(queries, k, score, exact=exact).hits
