"""Records a training loop of one's own, without accelerate and without a trainer: `recording`.

In a training step `loss.backward()` gives the gradient to the recorder. Afterwards all is as it was before.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self, Unpack, runtime_checkable

import numpy as np
import torch

from dmin_trace.capture.dataset import CaptureSource, Columns
from dmin_trace.capture.output import CaptureOutput
from dmin_trace.capture.pictures import Pictures
from dmin_trace.capture.pinning import pinned_timesteps
from dmin_trace.capture.random_state import RandomState, seed_everything, seed_of
from dmin_trace.capture.recorder import Recorder
from dmin_trace.capture.step import Advice, CaptureStep, StepGuard, takes_timestep
from dmin_trace.capture.used_models import UsedModels
from dmin_trace.capture.weights import Trainable, find_named, find_trainable
from dmin_trace.errors import CaptureError, QueryError, SettingsError
from dmin_trace.settings import RecordingOverrides, Settings, given_settings, make_settings
from dmin_trace.store import Queries, Store, open_store, query_gradients

Values = Sequence[str | int | float] | np.ndarray | torch.Tensor


@runtime_checkable
class OpenedTrace(Protocol):
    """A trace that is open for reading, such as `dmin_trace.open_trace` gives."""

    @property
    def store(self) -> Store: ...


_TAKE_THE_TIMESTEP = "Take it from the step: with recording.step(i, k) as step, step.timestep(n) or step.fraction()."
_ADVICE = Advice(
    backward="loss.backward()",
    once="Call loss.backward() once in each training step; add several losses up first.",
    changed="Compute the loss and its gradient in the training step, and nothing more.",
    seen=_TAKE_THE_TIMESTEP,
)


def recording(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    *,
    samples: int,
    out: str | os.PathLike[str] | None = None,
    like: OpenedTrace | Store | str | os.PathLike[str] | None = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    columns: Mapping[str, Values] | None = None,
    settings: Settings | None = None,
    **overrides: Unpack[RecordingOverrides],
) -> "Recording":
    """Records the projected gradient of every sample of a training loop, or those of queries.

    Use it as a context manager when the training is over, with the weights that are to be explained in the model:

        with dmin_trace.recording(model, samples=len(dataset), out="trace.zarr", timesteps=10) as recording:
            for i in recording.samples:                 # those that are not in the store yet
                for k in recording.timesteps:
                    with recording.step(i, k):
                        loss = training_loss(model, dataset[i])     # draws noise and timestep as in training
                        loss.backward()                             # goes to the store; nothing reaches .grad

    The weights are written beside the store before anything is recorded. A recording that was interrupted goes on
    where it stopped when it is run again. For queries, run the same loop over the query images, `like` the trace:

        with dmin_trace.recording(model, samples=len(images), like="trace.zarr") as recording:
            ...
        trace.top_k(recording.queries, 10)

    Args:
        model: what was trained, one module or several; the modules inside DistributedDataParallel and torch.compile.
        samples: N, the number of samples.
        out: the store.
        like: for queries, the trace that they are compared with, instead of `out` and of settings.
        optimizer: one or several; what they train is recorded. Without it, every parameter with `requires_grad`.
        columns: what a person reads about the samples, such as captions: N values for each name.
        settings, overrides: what to record; a single setting by its name replaces that in `settings`.

    Raises SettingsError for an invalid argument, TraceError if `like` is no finished store.
    """
    like = like.store if isinstance(like, OpenedTrace) else like
    trace = like if like is None or isinstance(like, Store) else open_store(Path(like))
    if not isinstance(samples, int) or samples < 0:
        raise SettingsError(f"samples is {samples!r}; expected the number of samples.")
    columns = dict(columns or {})
    given = given_settings(settings, overrides)
    if columns:
        given["columns"] = tuple(columns)
    if (trace is None) == (out is None):
        raise SettingsError("recording takes out='...' for a new trace, or like='...' for queries; give one of both.")
    if trace is not None and given:
        raise SettingsError(f"{', '.join(given)} was given with like: queries have the settings of their trace.")
    for name, values in columns.items():
        if len(values) != samples:
            raise SettingsError(f"The column {name} has {len(values)} values, but there are {samples} samples.")
    made = make_settings(trace.header.settings if trace is not None else given)
    return Recording(
        _listed(model, torch.nn.Module, "model", "modules"),
        made,
        samples=samples,
        out=None if out is None else Path(out),
        like=trace,
        optimizers=None if optimizer is None else _listed(optimizer, torch.optim.Optimizer, "optimizer", "optimizers"),
        item=None if trace is not None else lambda i: {name: values[i] for name, values in columns.items()},
    )


class Recording:
    """A recording under way; made by `recording`."""

    def __init__(
        self,
        models: Sequence[torch.nn.Module],
        settings: Settings,
        *,
        samples: int,
        out: Path | None = None,
        like: Store | None = None,
        optimizers: Sequence[torch.optim.Optimizer] | None = None,
        item: Callable[[int], Any] | None = None,
        dataset: Any = None,
        packages: Sequence[str] = (),
        batch: Callable[[int], Any] | None = None,
    ) -> None:
        """Begins nothing yet; `__enter__` does. Arguments as for `recording`, and `settings` of the trace for queries.

        Columns are looked for in `dataset`, and in what `item` gives for a sample, unless `describe` is called. `batch`
        gives a sample's batch, for the data set's fingerprint. The versions of `packages` are kept in the store.
        """
        self._models, self._optimizers, self._out, self._like = list(models), optimizers, out, like
        self._source = CaptureSource(
            samples=samples,
            columns=Columns(
                dataset,
                settings.columns if like is None else None,
                pictures=None if dataset is None else Pictures(dataset),
            ),
            optimizers=optimizers,
            models=UsedModels({"model" if k == 0 else f"model {k + 1}": m for k, m in enumerate(self._models)}),
            fetch=None if batch is None else partial(self._fetch, batch),
            packages=packages,
        )
        self._settings, self._item = settings, item
        self._timesteps = pinned_timesteps(settings)
        self._guard = StepGuard(self._models, _denoisers(self._models), _ADVICE, self._backward)
        self._entered: ExitStack | None = None
        self._recorder: Recorder | None = None
        # Samples of the passes before the rows: those of the probe, if any, and of the rehearsals.
        self._ahead: list[int] = []
        self._probing = False
        self._pending: list[int] = []
        # Training steps: those of rows, those of the pass that is under way before the rows, and all of them.
        self._done = self._done_ahead = self._taken = 0
        self._differences = set[int]()
        self._scaled = self._failed = False
        self._queries: Queries | None = None

    @property
    def timesteps(self) -> range:
        """The numbers of a sample's training steps: 0 to T - 1, or to T x D - 1 with D draws at each timestep."""
        return range(len(self._timesteps))

    @property
    def samples(self) -> Iterator[int]:
        """The samples still to be recorded, in order. Before each the same seed is set, for its augmentation.

        Unless they are queries, the first one comes several times: its training steps tell which random call draws the
        timestep, and its gradients are compared with themselves. A recording that is continued also begins with the
        sample that it began with.
        """
        before = -1
        while self._taken != before and (following := self._next()) is not None:
            before = self._taken
            seed_everything(seed_of(self._settings.seed, 0))
            yield following[0]

    @contextmanager
    def step(self, sample: int, timestep: int, *, subtract: bool = False) -> Iterator[CaptureStep]:
        """The training step of one sample at one timestep: compute the loss in it, and call `loss.backward()` once.

        Gives a `CaptureStep`, for loops that take their timestep from it. `sample` is the next of `samples`, and
        `timestep` the next of `timesteps`.

        A query can be the difference that two prompts make on one picture: compute the loss without the concept in a
        step with `subtract`, and right after it the loss with the whole prompt in a step of the same sample and
        timestep. Their noise is the same, and the first gradient is subtracted from the second before it is
        compressed. Do so at every timestep.

        Raises CaptureError if another step is next, or this one gave no gradient, or one that cannot be compared with
        those of other samples, or changed the model; QueryError if a query's step drew other noise than the trace's, or
        if two prompts make no difference.
        """
        recorder = self._check_turn(sample, timestep)
        sign = self._sign(recorder, subtract)
        if timestep == 0 and self._item is not None:
            recorder.sample(sample, self._item(sample))
        self._scaled = False
        step = self._open(recorder, sample, timestep, sign)
        try:
            yield step
        finally:
            self._guard.close()
        if step.seen is None and step.given is not None:
            step.seen = torch.tensor([step.given], dtype=torch.float32)
        # Until all is checked: a row that lost a step must not be filled up with those of another sample.
        self._failed = True
        self._guard.check(step, recorder.moved)
        if step.kept:
            recorder.take(step)
        elif not recorder.probe.done:
            recorder.probe.take(step)
        if sign:
            self._differences.add(sample)
        if not subtract:
            self._advance(recorder, 1)
        self._failed = False

    def describe(self, sample: int, item: Any, batch: Any) -> None:
        """Tells of the next sample's item, with its columns, and of its batch: a query's has the trace's shapes."""
        self._check_turn(sample, 0).sample(sample, item, batch)

    def missing(self, sample: int, error: Exception) -> None:
        """Tells of a sample that cannot be loaded, instead of its training steps: its row in the trace stays empty.

        It is never ranked, and `dmin-trace info` lists it. Raises CaptureError if another sample is next, or if most
        of the first samples could not be loaded; for a query, the error itself.
        """
        recorder = self._check_turn(sample, 0)
        recorder.missing(sample, error)
        if self._ahead and sample != self._pending[self._done // len(self._timesteps)]:
            raise CaptureError(
                f"Sample {sample}, the first of this trace, could not be loaded now: {type(error).__name__}: {error}. "
                "The data set has changed; give another path (out, --out)."
            )
        recorder.skip()
        ahead, self._ahead = self._ahead, []
        self._advance(recorder, len(self._timesteps))
        # The next sample takes its place.
        self._ahead = (
            [other if other != sample else following[0] for other in ahead] if (following := self._next()) else []
        )

    @property
    def queries(self) -> Queries:
        """The gradients of a finished recording `like` a trace. Raises QueryError for any other recording."""
        if self._queries is None:
            raise QueryError(
                "There are no queries: this recording makes a trace, or has not recorded all its samples. Record with "
                "recording(model, like='...', samples=...), and take the queries when its loop is over."
            )
        return self._queries

    def __enter__(self) -> Self:
        if self._entered is not None:
            raise CaptureError("This recording was entered already. Make another with recording(...).")
        self._refuse_models()
        with ExitStack() as entering:
            entering.callback(RandomState().restore)
            out = self._out
            if out is None:
                out = Path(entering.enter_context(tempfile.TemporaryDirectory(prefix="dmin-trace-"))) / "queries.zarr"
            output = CaptureOutput(out=out, like=self._like)
            recorder = Recorder(self._settings, self._find_trainable(), self._source, output)
            entering.enter_context(self._guard)
            entering.callback(setattr, torch.amp.GradScaler, "scale", torch.amp.GradScaler.scale)
            torch.amp.GradScaler.scale = self._scale  # type: ignore[method-assign,assignment]
            entering.callback(recorder.stop)
            self._pending = recorder.begin()
            self._probing = not recorder.probe.done
            self._ahead = recorder.rehearsals[-1:] * self._probing + recorder.rehearsals
            self._recorder, self._entered = recorder, entering.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._entered is None:
            return
        self._recorder = None
        with self._entered:
            left = len(self._pending) - self._done // len(self._timesteps)
            if kind is None and left:
                raise CaptureError(
                    f"{left} of {self._source.samples} samples were not recorded. Loop over all recording.samples and "
                    "recording.timesteps. What is in the store is kept, and left out when the recording is run again."
                )

    def _refuse_models(self) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_rank() != 0:
            raise CaptureError("A recording runs in one process. Make it in the one of rank 0 alone.")
        for model in self._models:
            if isinstance(model, torch.nn.parallel.DistributedDataParallel) or hasattr(model, "_fsdp_wrapped_module"):
                raise CaptureError(f"The model is inside {type(model).__name__}. Give the module inside, model.module.")

    def _find_trainable(self) -> Trainable:
        if self._like is None:
            return find_trainable(self._models, self._optimizers)
        # The trace says which parameters were trained; no optimizer is needed.
        found = find_named(self._models, self._like.header.parameters.names)
        if not all(tensor.requires_grad for tensor in found.tensors):
            raise QueryError(
                "The trace is of parameters that have requires_grad=False now, so they have no gradients. Set it, as "
                "it was in the training: model.requires_grad_(True)."
            )
        return found

    def _check_turn(self, sample: int, timestep: int) -> Recorder:
        """Raises CaptureError unless this sample and timestep are the next."""
        if self._recorder is None:
            raise CaptureError("The recording is not under way. Loop inside `with dmin_trace.recording(...)`.")
        if self._failed:
            raise CaptureError("An earlier training step failed. Fix what its error names, and make another recording.")
        if self._guard.step is not None:
            raise CaptureError(f"A training step was opened inside {self._guard.step.name}. Close that one first.")
        if (following := self._next()) != (sample, timestep):
            expected = f"sample {following[0]}, timestep {following[1]} is next" if following else "all are recorded"
            raise CaptureError(
                f"Sample {sample}, timestep {timestep} came where {expected}. Loop over recording.samples, which are "
                "those that are not recorded yet, the first of them several times, and over recording.timesteps, in "
                "their order."
            )
        return self._recorder

    def _next(self) -> tuple[int, int] | None:
        """The sample and the number of the training step that come next; None after the last."""
        if self._ahead:
            return self._ahead[0], self._done_ahead
        row, number = divmod(self._done, len(self._timesteps))
        return (self._pending[row], number) if row < len(self._pending) else None

    def _sign(self, recorder: Recorder, subtract: bool) -> int:
        """Of which sign the next gradient is in a difference, 0 if it is in none."""
        if subtract and self._like is None:
            raise CaptureError("subtract=True was given for a sample of a trace. Only a query can be a difference.")
        if subtract and recorder.subtracted is not None:
            raise CaptureError(
                "subtract=True was given twice. The step that it is subtracted from is next, without it."
            )
        return -1 if subtract else 0 if recorder.subtracted is None else 1

    def _open(self, recorder: Recorder, sample: int, number: int, sign: int) -> CaptureStep:
        timestep, pin, probe = self._timesteps[number], recorder.probe.pin, recorder.probe
        if self._probing and not probe.done:
            timestep, pin = probe.next(self._timesteps[0])
        kept = not self._probing
        return self._guard.open(sample, timestep, pin, observed=recorder.observes, kept=kept, sign=sign)

    def _backward(self, loss: torch.Tensor, *args: Any, **options: Any) -> None:
        step, recorder = self._guard.step, self._recorder
        if step is None or recorder is None:
            raise CaptureError("loss.backward() was called outside a step. This is an error of dmin_trace; report it.")
        step.backwards += 1
        if step.backwards > 1:
            raise CaptureError(f"loss.backward() was called twice in {step.name}; expected once. {_ADVICE.once}")
        if args or options.get("gradient") is not None or options.get("inputs") is not None:
            raise CaptureError("loss.backward() was given a gradient or inputs; expected none, on a scalar loss.")
        if not step.kept:
            return
        # A loop may call it where its autocast has not ended.
        with torch.autocast(loss.device.type, enabled=False):
            recorder.backward(step, loss, scaled=self._scaled)

    def _scale(self, losses: Any) -> Any:
        """The loop's `scaler.scale(loss)`: its scale changes during training, so the recorder uses one of its own."""
        self._scaled = True
        return losses

    def _fetch(self, batch: Callable[[int], Any], sample: int) -> Any:
        seed_everything(seed_of(self._settings.seed, 0))
        return batch(sample)

    def _advance(self, recorder: Recorder, steps: int) -> None:
        """Goes on to the next step. After the last one, completes the store, and reads the queries in it."""
        self._taken += steps
        if self._ahead:
            self._done_ahead += steps
            if self._done_ahead == len(self._timesteps):
                self._done_ahead = 0
                if not self._probing or recorder.probe.done:
                    del self._ahead[0]
                    self._probing = False
            return
        self._done += steps
        if self._done < len(self._pending) * len(self._timesteps):
            return
        recorder.finish()
        if self._like is not None:
            captured = open_store(recorder.output.out)
            count = captured.header.samples
            names = tuple(f"{'difference' if k in self._differences else 'query'} {k}" for k in range(count))
            gradients = query_gradients(captured, names, self._differences)
            self._queries = Queries(gradients, names, (None,) * count, self._like.header.id)


def _denoisers(models: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """The outermost modules that are called with a timestep."""
    found: list[torch.nn.Module] = []
    for model in models:
        found += [model] if takes_timestep(model) else _denoisers(list(model.children()))
    return list(dict.fromkeys(found))


def _listed(given: Any, kind: type, name: str, names: str) -> list[Any]:
    """One thing or several as a list. Raises SettingsError if they are of another kind."""
    listed = [given] if isinstance(given, kind) else list(given) if isinstance(given, (list, tuple)) else []
    if not listed or not all(isinstance(one, kind) for one in listed):
        raise SettingsError(f"{name} is a {type(given).__name__}; expected a {kind.__name__}, or a list of {names}.")
    return listed
