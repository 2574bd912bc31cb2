"""What makes rows comparable is checked for every sample. A check that fails ends the capture.

At each timestep, every sample and query must reach the denoiser with the same timestep, and its training step must make
the same random calls. The first sample is recorded twice, and must give the same row. Queries, and a capture that
continues a store, must also have its weights and settings, and draw the same values.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmin_trace.capture.chunk_queue import Row
from dmin_trace.capture.conditions import DEVICE, device_types
from dmin_trace.capture.dataset import CaptureSource, batch_shapes, hash_value
from dmin_trace.capture.pinning import Call, show_calls
from dmin_trace.capture.step import CaptureStep
from dmin_trace.capture.weights import Trainable
from dmin_trace.errors import CaptureError, QueryError, TraceError, WeightsError
from dmin_trace.project import Plan, make_plan
from dmin_trace.settings import Settings
from dmin_trace.store import Header, NoiseFacts, Store, check_data, check_files, check_script

logger = logging.getLogger(__name__)
MIN_COSINE = 0.999
"""Between two rows of one sample. Kernels that add in another order each time stay far above it."""
REPEATED_BATCHES = 2
"""The first samples whose batches are compared with those that the data set gives later."""
MAX_DIFFERENCE = 0.01
"""By what fraction the first sample's loss and norm may differ when a capture is continued."""


class RowChecks:
    """Compares each sample's training steps with those of the first sample, and of the trace that a query is for.

    timesteps: the timesteps that reached the denoiser, (T,); empty before the first row.
    calls: the random calls of the first sample's training steps, T x D of them; empty before the first row.
    batch_shapes: the shapes of the images and texts in the first batch.
    noise: what the first sample's training steps drew, and what came of it; None before its row.
    reached: for each parameter whether a loss has depended on it.
    """

    def __init__(self, settings: Settings, trainable: Trainable, source: CaptureSource, like: Store | None) -> None:
        self.timesteps: tuple[float, ...] = ()
        self.calls: list[list[Call]] = []
        self.batch_shapes: dict[str, tuple[int, ...]] = {}
        self.reached = [False] * len(trainable.names)
        self.noise: NoiseFacts | None = None
        self._draws, self._seed, self._trainable, self._source = settings.draws, settings.seed, trainable, source
        # What a row is of, for errors.
        self._in_row = "at timestep" if settings.group_count is None else "in row"
        self._in_order = sorted(range(settings.timestep_count), key=lambda k: _order_key(settings, k))
        self._like = None if like is None else like.header
        # Generators of another type of device draw other values; whether that may be is known by now.
        device = device_types(trainable.tensors)
        self._same_device = like is not None and like.header.run.conditions.get(DEVICE) == device
        self._continued: NoiseFacts | None = None
        self._first_sample = 0
        self._batches: dict[int, str] = {}

    def continue_from(self, header: Header) -> None:
        """The capture continues a store: what it drew, and what came of it, must be met again."""
        self._continued = header.noise

    def check_batch(self, sample: int, batch: Any) -> None:
        """Raises QueryError if the images of a query's batch have other shapes than those of the trace.

        Raises CaptureError if one of the first samples' batches is another than it was before.
        """
        if sample in self._batches or len(self._batches) < REPEATED_BATCHES:
            digest = sha256()
            hash_value(digest.update, batch)
            if self._batches.setdefault(sample, digest.hexdigest()) != digest.hexdigest():
                raise CaptureError(
                    f"The data set gave sample {sample} differently the second time, with the same seeds, so rows are "
                    "not of the samples that were trained on. Does it shuffle its samples itself (buckets), or change "
                    "them by a generator of its own (numpy.random.default_rng, random.Random)? Leave that out for the "
                    "capture."
                )
        found = batch_shapes(batch)
        if self._like is not None and (ours := _show_images(found)) != (theirs := _show_images(self._like.batch)):
            raise QueryError(
                f"The query has images of shape {ours}, but those of the trace have {theirs}. Give an image of the "
                "size that the model was trained on, and the same arguments (--resolution)."
            )
        self.batch_shapes = self.batch_shapes or found

    def note_reached(self, reached: Sequence[bool]) -> None:
        self.reached = [a or b for a, b in zip(self.reached, reached, strict=True)]

    def check_step(self, step: CaptureStep, row: Sequence[CaptureStep]) -> None:
        """Raises QueryError or CaptureError if the random calls differ; `row` is the sample's earlier steps."""
        calls = show_calls(step.draws.calls)
        draw, number = step.pinned.draw, step.pinned.number
        if self._like is not None:
            if tuple(step.draws.calls) != (expected := self._like.noise.draws[number]):
                raise QueryError(
                    f"On the query the script drew {calls}, on the training samples {show_calls(expected)}, so their "
                    "noise differs. Give an image of the size that the model was trained on, and the same arguments."
                )
        elif self.calls and step.draws.calls != (first := self.calls[len(row)]):
            raise CaptureError(
                f"On sample {step.sample} the script drew {calls}, on sample {self._first_sample} {show_calls(first)}, "
                "so their noise differs. Samples of different sizes (buckets) or a random branch cannot be captured."
            )
        elif draw and step.draws.calls != (first := row[-draw].draws.calls):
            raise CaptureError(
                f"In draw {draw} of timestep {number} the script drew {calls}, in its first draw {show_calls(first)}. "
                "A random branch cannot be captured."
            )
        if step.rows > self._source.rows:
            raise CaptureError(
                f"The denoiser was called with {step.rows} rows in {step.name}; expected {self._source.rows}, so that "
                "a row of the trace is of one sample. Make one image of one sample in the training step."
            )
        if not step.draws.pins:
            raise CaptureError(
                f"The timestep was not drawn in {step.name}, though it was before on the same sample. Random calls in "
                f"it: {calls}. A random branch cannot be captured."
            )

    def check_difference(self, step: CaptureStep, subtracted: CaptureStep | None, row: Sequence[CaptureStep]) -> None:
        """Raises QueryError if a step and the one that was subtracted from it differ in more than their prompts, or in
        nothing; CaptureError if another step of the row is no difference, or if this one is and they are not."""
        if step.sign < 0:
            return
        if row and row[0].sign != step.sign:
            raise CaptureError(
                f"A gradient was subtracted at some timesteps of sample {step.sample}, and not in {step.name} or those "
                "before it. Subtract one at every timestep, or at none."
            )
        if subtracted is None:
            return
        ours, theirs = (tuple([] if one.seen is None else one.seen.tolist()) for one in (step, subtracted))
        if ours != theirs or step.draws.digest.digest() != subtracted.draws.digest.digest():
            raise QueryError(
                f"With the prompt and without the concept, {step.name} drew other noise, or another timestep: {ours} "
                f"and {theirs}. Both must be of one picture, computed in the same way."
            )
        if step.inputs and step.inputs == subtracted.inputs:
            raise QueryError(
                f"The two prompts make no difference: in {step.name} the model was called with the same values for "
                "both. They may be one text to it, if it ignores case or reads the first words of a long prompt alone."
            )

    def check_row(self, steps: Sequence[CaptureStep]) -> Row:
        """Makes a row of a sample's T x D steps, of which R have a gradient.

        Raises CaptureError or QueryError if they saw other timesteps.
        """
        if not self.calls:
            self._check_reached()
        # One transfer of each kind for a sample.
        gradients = torch.stack([step.gradient for step in steps if step.gradient is not None]).cpu().numpy()
        norms = torch.stack([step.norm.float() for step in steps if step.norm is not None]).cpu().numpy()
        losses = torch.stack([step.loss for step in steps if step.loss is not None]).cpu().numpy()
        # A batch of several rows (prior preservation) shows the same timestep in each.
        seen = tuple(torch.stack([step.seen[0] for step in steps if step.seen is not None]).cpu().tolist())
        timesteps = seen[:: self._draws]
        if any(timestep != timesteps[at // self._draws] for at, timestep in enumerate(seen)):
            raise CaptureError(
                f"The denoiser saw the timesteps {seen} for sample {steps[0].sample}; expected each {self._draws} "
                "times, once for each draw. The script draws timesteps in a way that is not pinned."
            )
        if not self.calls:
            if self._like is not None and timesteps != self._like.timesteps:
                raise QueryError(
                    f"The denoiser saw the timesteps {timesteps} on the query, {self._like.timesteps} on the training "
                    "samples. Repeat the command that made the trace, or its loop."
                )
            self._check_order(timesteps)
            self.timesteps, self._first_sample = timesteps, steps[0].sample
            self.calls = [step.draws.calls for step in steps]
        elif timesteps != self.timesteps:
            number = next(k for k, (a, b) in enumerate(zip(timesteps, self.timesteps, strict=True)) if a != b)
            raise CaptureError(
                f"At timestep {number} of the capture the denoiser saw timestep {timesteps[number]} for sample "
                f"{steps[0].sample}, and {self.timesteps[number]} for sample {self._first_sample}. The script draws "
                "timesteps in a way that is not pinned."
            )
        row = Row(gradients, norms, np.asarray(losses.reshape(-1, self._draws).mean(axis=1)))
        if self.noise is None:
            self.noise = self._check_noise(steps, row)
        return row

    def check_again(self, sample: int, before: Row, row: Row) -> None:
        """Raises CaptureError if the rows of a sample that was recorded twice differ."""
        for k, (a, b) in enumerate(zip(before.gradients, row.gradients, strict=True)):
            lengths = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
            # A gradient of zero, or one that is not finite, has no direction.
            if 0 < lengths < math.inf and (cosine := float(a.ravel() @ b.ravel()) / lengths) < MIN_COSINE:
                raise CaptureError(
                    f"Sample {sample} was recorded twice, and its gradients {self._in_row} {k} have a cosine of "
                    f"{cosine:.3f}; expected 1. The training step draws random numbers that are not seeded, so samples "
                    "do not share their noise: from a generator of its own (numpy.random.default_rng, random.Random, "
                    "torch.Generator inside a model). Draw from torch's, numpy's or python's global generator, or from "
                    "a torch.Generator outside the model."
                )

    def _check_order(self, timesteps: Sequence[float]) -> None:
        """Raises CaptureError unless the timesteps rise, or fall, from one to the next."""
        ordered = [timesteps[k] for k in self._in_order]
        steps = [b - a for a, b in zip(ordered, ordered[1:], strict=False)]
        if not (all(step > 0 for step in steps) or all(step < 0 for step in steps)):
            raise CaptureError(
                f"The denoiser saw the timesteps {tuple(ordered)}; expected each to be larger than the one before, or "
                "each to be smaller. The script draws from fewer timesteps than the settings have, or not by one draw. "
                "Give fewer timesteps."
            )

    def _check_noise(self, steps: Sequence[CaptureStep], row: Row) -> NoiseFacts:
        """What the first row's training steps drew. Raises QueryError if those of the trace of a query drew others."""
        digests = [step.draws.digest.hexdigest() for step in steps]
        of_timesteps = [digests[at : at + self._draws] for at in range(0, len(digests), self._draws)]
        noise = NoiseFacts(
            seed=self._seed,
            # Draws of one timestep make the same calls.
            draws=tuple(tuple(made) for made in self.calls[:: self._draws]),
            digests=tuple(sha256("".join(few).encode()).hexdigest() for few in of_timesteps),
            first_sample=steps[0].sample,
            losses=_finite(row.losses),
            norms=_finite(row.norms),
        )
        if self._like is not None and self._same_device and noise.digests != self._like.noise.digests:
            raise QueryError(
                "On the query the script drew other random values than on the training samples, by the same calls, so "
                "their noise differs. Query on the kind of device, and with the version of torch, that the trace was "
                "made with, and with the same arguments."
            )
        return noise

    def check_continued(self) -> None:
        """Raises CaptureError if what the first sample of a store that is continued gave is not what it gives now."""
        noise, earlier = self.noise, self._continued
        if noise is None or earlier is None:
            return
        if noise.first_sample == earlier.first_sample:
            named = (
                ("loss", "at timestep", noise.losses, earlier.losses),
                ("norm", self._in_row, noise.norms, earlier.norms),
            )
            for what, where, ours, theirs in named:
                for k, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
                    if not _close(mine, its):
                        raise CaptureError(
                            f"The {what} of sample {noise.first_sample} {where} {k} is {mine}, and was {its} when "
                            "the trace was begun: a model, the data or the precision has changed. Continue with those "
                            "of then, or give another path (out, --out)."
                        )

    def _check_reached(self) -> None:
        """After the first sample: raises CaptureError if no loss depends on a parameter that the training moved."""
        named = zip(self._trainable.names, self._trainable.tensors, self.reached, strict=True)
        never = [(name, tensor) for name, tensor, reached in named if not reached]
        names = ", ".join(name for name, _ in never[:3])
        count = f"{len(never)} of the {len(self.reached)} trainable tensors"
        what = f"The loss does not depend on {count}, among them {names},"
        optimizers = self._source.optimizers
        # Without optimizers it is not known who trains; requires_grad says what is not trained.
        moved = optimizers is None or any(tensor in o.state for _, tensor in never for o in optimizers)
        if len(never) == len(self.reached) or never and moved:
            raise CaptureError(
                f"{what} though the training moved them. Does the training step skip a part of the model in eval mode, "
                "or for some batches? In a loop of your own, set requires_grad=False for what is not trained."
            )
        if never:
            logger.warning("%s and the training did not move them; their gradients are zero.", what)


def _order_key(settings: Settings, k: int) -> int:
    """Puts timesteps in the order of a schedule: those of a list may come in any order."""
    return k if isinstance(settings.timesteps, int) else settings.timesteps[k]


def _finite(values: np.ndarray) -> tuple[float | None, ...]:
    return tuple(float(value) if math.isfinite(value) else None for value in values)


def _close(a: float | None, b: float | None) -> bool:
    return a == b if a is None or b is None else math.isclose(a, b, rel_tol=MAX_DIFFERENCE, abs_tol=1e-12)


def query_plan(settings: Settings, trainable: Trainable, weights: str, trace: Store) -> Plan:
    """Returns the projection of queries, which is that of the trace; `weights` is the fingerprint of their weights.

    Raises WeightsError if the trace is of other weights, QueryError if the model or the projection differs otherwise.
    """
    header, expected = trace.header, trace.header.parameters
    if trainable.fingerprint != expected.fingerprint:
        raise QueryError(
            f"The script trains {len(trainable.names)} tensors with {trainable.length:,} numbers, but the trace is of "
            f"{len(expected.names)} with {header.projection.length:,}. Repeat the command that made it, or give the "
            "model that it is of."
        )
    if weights != header.weights:
        raise WeightsError(
            f"The weights are not those of the trace: their fingerprint is {weights[:16]}, that of the trace "
            f"{header.weights[:16]}. Give the weights that were captured, which lie beside the trace."
        )
    for what, theirs in _treatment(header).items():
        if (ours := _treatment(settings)[what]) != theirs:
            raise QueryError(
                f"The query's {what} {ours}, those of {trace.path} have {theirs}, so its header contradicts its "
                "settings. The store was changed by hand: capture again."
            )
    width, made_by = header.projection.width, header.projection.fingerprint
    plan = make_plan(trainable.length, settings.dimension, settings.seed, settings.projection, width)
    if plan.fingerprint != made_by:
        raise QueryError(
            f"The projection's fingerprint is {plan.fingerprint[:16]}, that of the trace {made_by[:16]}. The "
            "trace was made by a version of dmin_trace that projects in another way; query it with that version."
        )
    return plan


def check_place(sample: int, file: object) -> None:
    """Raises QueryError if the file of a query says that it is another: of two, it would be the wrong one."""
    stem = Path(str(file)).stem
    if file is not None and stem.isdecimal() and int(stem) != sample:
        raise QueryError(
            f"The script takes its samples in an order of its own: number {sample} is the file {Path(str(file)).name}. "
            "So it is not known which two make a difference. Query the whole image, or have the script keep the order."
        )


def refuse_other_capture(path: Path, earlier: Store, settings: Settings, source: CaptureSource, weights: str) -> None:
    """Raises TraceError if the store at `path` is complete or of another capture; `weights` is the fingerprint here."""
    header, move = earlier.header, "Give another path (out, --out), or move it away."
    if earlier.complete:
        raise TraceError(f"{path} exists already and is complete. {move}")
    if not source.edited_script:
        advice = "Run the script as it was; or, if its loss and its data are the same, continue with --edited-script."
        check_script(path, header, source.script.name, source.script.sha256, advice)
    check_data(path, header, source.samples, "")
    check_files(path, header, source.files_sha256)
    treated = [(what, theirs, _treatment(settings)[what]) for what, theirs in _treatment(header).items()]
    for what, theirs, ours in [("weights are", header.weights, weights), *treated]:
        if theirs != ours:
            found = f"its {what} {theirs:.32}, those of this run {ours:.32}"
            raise TraceError(f"{path} belongs to another capture: {found}. {move}")


def _treatment(facts: Settings | Header) -> dict[str, str]:
    """What is done to gradients before they are compressed, for a person to read."""
    rows = "a row for each timestep" if facts.group_count is None else f"rows {facts.group_count}"
    return {"gradients have": f"draws {facts.draws} and transform {facts.transform}", "samples have": rows}


def _show_images(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The shapes of the images in a batch, and not those of its texts, whose number may differ."""
    images = sorted((name, shape) for name, shape in shapes.items() if len(shape) >= 3)
    return ", ".join(f"{'x'.join(map(str, shape))} ({name})" for name, shape in images) or "no images"
