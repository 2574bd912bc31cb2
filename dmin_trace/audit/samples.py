"""An audit of a trace's samples, which needs no query: near-copies, outliers, labels that do not fit, no influence.

Everything is from the rows of the store alone (`search.alike`). It says what a person should look at, and changes
nothing.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dmin_trace.audit.labels import LABEL_COLUMNS, Fit, fit_of_values
from dmin_trace.errors import EvaluationError, SettingsError, brief
from dmin_trace.query import Record, Trace, record_of
from dmin_trace.query.sample_pictures import SamplePictures
from dmin_trace.query.tables import Column, Table, column_of, to_pandas, with_columns, write_page, write_parquet
from dmin_trace.search import clusters, find_alike, own_parts
from dmin_trace.search.background import MIN_SAMPLES, NORMAL_QUARTILE
from dmin_trace.search.deflation import Progress
from dmin_trace.store import FAILED

if TYPE_CHECKING:
    import pandas

Kind = Literal["near-copy", "outlier", "label", "no influence"]
KINDS: tuple[Kind, ...] = get_args(Kind)

NEIGHBOURS = 10
"""The nearest samples that vote for a label."""
LEAST_SHARE, MOST_OF_OTHERS = 0.1, 0.5
"""A label does not fit if it gets less than the one of the votes, and another more than the other."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A sample that a person should look at.

    kind: what it is: the list that it is in.
    sample: the data set index.
    value: what the list is sorted by: the similarity to the sample that it is a near-copy of; self-influence, from 0 to
        1, for an outlier or a sample without influence; the share of the near samples that have its label or its words.
        None if it has no usable gradient.
    z: how far that is from the median of all samples, in units of their robust scale; None if it is not known.
    of: of a near-copy, the sample that it is alike.
    why: the reason, as a sentence.
    columns: the sample's readable columns.
    """

    kind: Kind
    sample: int
    value: float | None
    z: float | None
    of: int | None
    why: str
    columns: dict[str, str | int | float | None]


@dataclass(frozen=True, eq=False, repr=False)
class Audit:
    """What an audit of N training samples found.

    findings: all lists one after another, the strongest first in each.
    samples: how many samples were audited; those without a usable gradient are findings without influence.
    column: the column whose values were looked at; None if the trace has none of the usual names.
    clusters: the near-copies, (n,) int64 data set indices each; the first is the one that the others are alike.
    similarity, self_influence, fit: (N,) float64 by data set index: how alike the nearest other sample is; the deflated
        score of a sample for itself, from 0 to 1; how well its label or caption fits, from 0 to 1. NaN if not known.
    notes: what else a reader should know, as sentences.
    pictures: the pictures of the trace's samples, small, as of `Trace.thumbnails`.
    record: what the audit was made from.
    """

    findings: list[Finding]
    samples: int
    column: str | None
    clusters: list[NDArray[np.int64]]
    similarity: NDArray[np.float64]
    self_influence: NDArray[np.float64]
    fit: NDArray[np.float64]
    notes: tuple[str, ...]
    pictures: SamplePictures
    record: Record

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self.of_kind(kind)):,} {kind}" for kind in KINDS)
        return f"Audit({self.samples:,} samples: {counts})"

    def of_kind(self, kind: Kind) -> list[Finding]:
        """The findings of one list."""
        return [finding for finding in self.findings if finding.kind == kind]

    @property
    def table(self) -> Table:
        """One row for each finding; its columns are those of `to_pandas`."""
        found = self.findings
        table = {
            "kind": Column("string", [finding.kind for finding in found]),
            "sample": Column("integer", [finding.sample for finding in found]),
            "value": Column("number", [finding.value for finding in found]),
            "z": Column("number", [finding.z for finding in found]),
            "of": Column("integer", [finding.of for finding in found]),
            "why": Column("string", [finding.why for finding in found]),
        }
        names = dict.fromkeys(name for finding in found for name in finding.columns)
        columns = {name: column_of([finding.columns.get(name) for finding in found]) for name in names}
        return with_columns(table, columns)

    def to_pandas(self) -> "pandas.DataFrame":
        """A data frame with one row for each finding. Raises QueryError if pandas is not installed.

        Its columns: the fields of `Finding`, and the trace's readable columns, with `meta_` before a name that is
        taken.
        """
        return to_pandas(self.table)

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Writes the table of `to_pandas` to a Parquet file. Raises QueryError if pyarrow is not installed or the file
        cannot be written."""
        write_parquet(path, "audit", [self.table])

    def to_html(self, path: str | os.PathLike[str], k: int = 48) -> None:
        """Writes the first k findings of each list as one HTML page for people, with the pictures of the samples; it
        needs no other file. Raises SettingsError if k is below 1, and QueryError if the file cannot be written."""
        from dmin_trace.views.page import audit_page

        if k < 1:
            raise SettingsError(f"k is {k}; expected 1 or more.")
        write_page(path, audit_page(self, k))

    def _repr_html_(self) -> str:
        """What a notebook shows: the first findings of each list."""
        from dmin_trace.views.notebook import audit_html

        return audit_html(self)


def audit_trace(trace: Trace, column: str | None = None, *, progress: Progress | None = None) -> Audit:
    """Looks for training samples that a person should look at; it needs no query and no model.

    Four lists: near-copies of other samples; outliers, which share little with the others and so were likely learned by
    heart; labels or captions that the nearest samples by gradient do not have; and samples without influence of their
    own, all of which others have too, or without a usable gradient. Outliers and samples without influence are those
    that stand out from all samples.

    Args:
        column: the column of labels or captions; if not given, the first that the trace has of label, class,
            label_name, class_name, caption, text and prompt.
        progress: called with what is being done, how much of it is done, and how much there is.

    Raises EvaluationError if there is no such column; SettingsError if the trace has too many samples; TraceError if it
    is damaged or has no usable gradient.
    """
    if column is not None and column not in trace.columns:
        has = ", ".join(trace.columns) or "none"
        raise EvaluationError(f"{trace.path} has no column {brief(column)}; it has {has}.")
    chosen = column or next((name for name in LABEL_COLUMNS if name in trace.columns), None)
    parts = own_parts(trace.store, progress)
    samples = trace.store.sample[parts.rows]
    alike = find_alike(parts.vectors, NEIGHBOURS, progress=progress)
    values = None if chosen is None else trace.columns[chosen]
    fit = None if values is None else fit_of_values([values[n] for n in samples], alike.nearest, alike.similarity)

    def by_sample(found: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        whole = np.full(len(trace), np.nan)
        whole[samples] = found
        return whole

    alone = np.bincount(alike.original, minlength=len(samples))[alike.original] == 1
    nearest = alike.similarity[:, 0] if alike.similarity.shape[1] else np.full(len(samples), np.nan)
    found = [
        *_copies(alike.original, samples, parts.vectors),
        *_far(parts.self_influence, samples, alone),
        *(() if fit is None else _misfits(fit, samples, values or [])),
        *_unusable(trace),
    ]
    ordered = [finding for kind in KINDS for finding in found if finding.kind == kind]
    return Audit(
        findings=_with_columns(trace, ordered),
        samples=len(trace.store.rows_done),
        column=chosen,
        clusters=clusters(alike.original, samples),
        similarity=by_sample(nearest),
        self_influence=by_sample(parts.self_influence),
        fit=by_sample(np.full(len(samples), np.nan) if fit is None else fit.share),
        notes=_notes(trace, chosen, len(samples)),
        pictures=trace.thumbnails,
        record=record_of(trace.store),
    )


def _copies(original: NDArray[np.int64], samples: NDArray[np.int64], vectors: NDArray[np.float32]) -> list[Finding]:
    places = np.flatnonzero(original != np.arange(len(original)))
    alike = np.vecdot(vectors[places], vectors[original[places]])
    return [
        Finding(
            kind="near-copy",
            sample=int(samples[place]),
            value=min(float(similarity), 1.0),
            z=None,
            of=int(samples[original[place]]),
            why=f"It teaches the model nearly the same as sample {samples[original[place]]}.",
            columns={},
        )
        for similarity, place in sorted(
            zip(alike.tolist(), places.tolist(), strict=True), key=lambda of: (-of[0], of[1])
        )
    ]


def _far(self_influence: NDArray[np.float64], samples: NDArray[np.int64], alone: NDArray[np.bool_]) -> list[Finding]:
    """Samples whose self-influence is above or below that of all, beyond what chance gives once in n.

    Those that are not alone, (n,), are near-copies, and so have little of their own: that they are is said elsewhere.
    """
    count = len(samples)
    low, median, high = np.quantile(self_influence, (0.25, 0.5, 0.75))
    scale = (high - low) / (2 * NORMAL_QUARTILE)
    if count < MIN_SAMPLES or scale <= 1e-6:
        return []
    z, limit = (self_influence - median) / scale, NormalDist().inv_cdf(1 - 1 / count)
    kinds: tuple[tuple[Kind, int, str], ...] = (
        ("outlier", 1, "It shares little with the other samples: it is of another kind, or learned by heart."),
        ("no influence", -1, "It has little of its own: other samples teach the model the same."),
    )
    return [
        Finding(
            kind=kind,
            sample=int(samples[place]),
            value=float(self_influence[place]),
            z=float(z[place]),
            of=None,
            why=why,
            columns={},
        )
        for kind, sign, why in kinds
        for place in np.lexsort((samples, -sign * z))
        if sign * z[place] >= limit and alone[place]
    ]


def _misfits(fit: Fit, samples: NDArray[np.int64], values: Sequence[Any]) -> list[Finding]:
    # Most words of a caption are not in the captions of the nearest samples, so a caption is compared with the others.
    usual = float(np.nanmedian(fit.share)) if fit.captions and not np.isnan(fit.share).all() else 1.0
    found = np.flatnonzero((fit.share < LEAST_SHARE * usual) & (fit.other_share > MOST_OF_OTHERS))
    return [
        Finding(
            kind="label",
            sample=int(samples[place]),
            value=float(fit.share[place]),
            z=None,
            of=None,
            why=f"It has {brief(str(values[samples[place]]))}; of the samples nearest by gradient "
            f"{fit.other_share[place]:.0%} have {brief(fit.others[place])}.",
            columns={},
        )
        for place in found[np.lexsort((samples[found], -fit.other_share[found], fit.share[found]))]
    ]


def _unusable(trace: Trace) -> list[Finding]:
    """Samples without a usable gradient, by data set index."""
    store = trace.store
    found = []
    for row in store.rows_done[~store.valid[store.rows_done]]:
        norm = store.norm[row]
        failed = "It could not be loaded." if (norm == FAILED).any() else ""
        why = failed or ("Its gradient is not finite." if not np.isfinite(norm).all() else "Its gradient is zero.")
        sample = int(store.sample[row])
        found.append(Finding(kind="no influence", sample=sample, value=None, z=None, of=None, why=why, columns={}))
    return sorted(found, key=lambda finding: finding.sample)


def _with_columns(trace: Trace, findings: Sequence[Finding]) -> list[Finding]:
    if not findings:
        return []
    rows = trace.store.rows_of([finding.sample for finding in findings])
    columns = {name: trace.store.column_at(name, rows) for name in trace.columns}
    return [
        replace(finding, columns={name: values[n] for name, values in columns.items()})
        for n, finding in enumerate(findings)
    ]


def _notes(trace: Trace, column: str | None, usable: int) -> tuple[str, ...]:
    notes = []
    if not trace.complete:
        notes.append(
            f"The capture is unfinished: {len(trace.store.rows_done):,} of {len(trace):,} samples were audited."
        )
    if column is None:
        notes.append("The trace has no column of labels or captions, so it is not known whether these fit.")
    if usable < MIN_SAMPLES:
        notes.append(f"Which samples are outliers is not known: it takes {MIN_SAMPLES} samples or more to tell.")
    return tuple(notes)
