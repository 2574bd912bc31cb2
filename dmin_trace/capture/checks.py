"""What makes rows comparable is checked for every sample. A check that fails ends the capture.

At each timestep, every sample and query must reach the denoiser with the same timestep, and its training step must make
the same random calls. Queries, and a capture that continues a store, must also have its weights and settings.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmin_trace.capture.chunk_queue import Row
from dmin_trace.capture.conditions import DEVICE, differing_condition
from dmin_trace.capture.dataset import CaptureSource, batch_shapes
from dmin_trace.capture.pinning import Call, show_calls
from dmin_trace.capture.step import CaptureStep
from dmin_trace.capture.used_models import differing_model
from dmin_trace.capture.weights import Trainable
from dmin_trace.errors import CaptureError, QueryError, TraceError, WeightsError
from dmin_trace.project import Plan, make_plan
from dmin_trace.settings import Settings
from dmin_trace.store import Header, RunFacts, Store, check_data, check_files, check_script

logger = logging.getLogger(__name__)


class RowChecks:
    """Compares each sample's training steps with those of the first sample, and of the trace that a query is for.

    timesteps: the timesteps that reached the denoiser, (T,); empty before the first row.
    calls: the random calls of the first sample's training steps, T x D of them; empty before the first row.
    batch_shapes: the shapes of the images and texts in the first batch.
    reached: for each parameter whether a loss has depended on it.
    """

    def __init__(self, settings: Settings, trainable: Trainable, source: CaptureSource, like: Store | None) -> None:
        self.timesteps: tuple[float, ...] = ()
        self.calls: list[list[Call]] = []
        self.batch_shapes: dict[str, tuple[int, ...]] = {}
        self.reached = [False] * len(trainable.names)
        self._draws, self._trainable, self._source = settings.draws, trainable, source
        self._like = None if like is None else like.header
        self._first_sample = 0

    def check_batch(self, batch: Any) -> None:
        """Raises QueryError if the images of a query's batch have other shapes than those of the trace."""
        found = batch_shapes(batch)
        if self._like is not None and (ours := _show_images(found)) != (theirs := _show_images(self._like.batch)):
            raise QueryError(
                f"The query has images of shape {ours}, but those of the trace have {theirs}. Give an image of the "
                "size that the model was trained on."
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

    def check_row(self, steps: Sequence[CaptureStep]) -> Row:
        """Makes a row of a sample's T x D steps. Raises CaptureError or QueryError if they saw other timesteps."""
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
            self.timesteps, self._first_sample = timesteps, steps[0].sample
            self.calls = [step.draws.calls for step in steps]
        elif timesteps != self.timesteps:
            number = next(k for k, (a, b) in enumerate(zip(timesteps, self.timesteps, strict=True)) if a != b)
            raise CaptureError(
                f"At timestep {number} of the capture the denoiser saw timestep {timesteps[number]} for sample "
                f"{steps[0].sample}, and {self.timesteps[number]} for sample {self._first_sample}. The script draws "
                "timesteps in a way that is not pinned."
            )
        return Row(gradients, norms, np.asarray(losses.reshape(-1, self._draws).mean(axis=1)))

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


def check_run(trace: Store, run: RunFacts, *, queries: bool, any_device: bool = False) -> None:
    """Compares how a run computes its rows with how those of a trace were computed; models are compared if it has any.

    Raises QueryError for queries under another condition, WeightsError for another model; TraceError for a capture that
    is continued.
    """
    theirs, ours = trace.header.run, "The query's run" if queries else "This run"
    if differs := differing_condition(theirs.conditions, run.conditions, any_device=any_device):
        raise (QueryError if queries else TraceError)(f"{ours} gives other rows than those in {trace.path}: {differs}")
    # A fingerprint depends on the type of device that it was computed on.
    same_device = theirs.conditions.get(DEVICE) == run.conditions.get(DEVICE)
    if run.models and same_device and (model := differing_model(theirs.models, run.models)) is not None:
        raise (WeightsError if queries else TraceError)(
            f"{ours} gives other rows than those in {trace.path}: the {model.numbers:,} numbers of {model.name} "
            f"({model.kind}) that do not train are not the same. Give the base model, the autoencoder and the text "
            "encoders that the traced run had, in the same precision."
        )


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
    if (ours := _treatment(settings)) != (theirs := _treatment(header)):
        raise QueryError(
            f"The query's gradients have {ours}, those of {trace.path} have {theirs}, so its header contradicts its "
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
    same = ("weights are", header.weights, weights), ("gradients have", _treatment(header), _treatment(settings))
    for what, theirs, ours in same:
        if theirs != ours:
            found = f"its {what} {theirs:.32}, those of this run {ours:.32}"
            raise TraceError(f"{path} belongs to another capture: {found}. {move}")


def _treatment(facts: Settings | Header) -> str:
    """What is done to gradients before they are compressed, for a person to read."""
    return f"draws {facts.draws} and transform {facts.transform}"


def _show_images(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The shapes of the images in a batch, and not those of its texts, whose number may differ."""
    images = sorted((name, shape) for name, shape in shapes.items() if len(shape) >= 3)
    return ", ".join(f"{'x'.join(map(str, shape))} ({name})" for name, shape in images) or "no images"
