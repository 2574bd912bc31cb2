"""Lightning: captures a `Trainer.fit` at its end by a callback, and a trained module on demand.

    Trainer(callbacks=[TraceCallback(out="trace.zarr")])    captures after the last training step
    capture(module, loader, out="trace.zarr")               captures a trained module
    attribute(module, "trace.zarr", items)                  the most influential training samples for items

All run the module's own `training_step` on one item of the dataset at a time, in a recording. The packages
`lightning.pytorch` and `pytorch_lightning` are both supported.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Unpack

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch.utils.data import DataLoader, default_collate

from dmin_trace import store
from dmin_trace.capture.accelerate.loop_variables import replace_attribute, undo_of
from dmin_trace.capture.accelerate.training_run import item_of, refuse_iterable
from dmin_trace.capture.encoder_cache import EncoderCache
from dmin_trace.capture.recording import Recording
from dmin_trace.errors import AttachError, CaptureError, DminTraceError, QueryError
from dmin_trace.query import Hit, ScoreMethod, Trace, open_trace
from dmin_trace.search import Score
from dmin_trace.settings import Settings, SettingsOverrides, given_settings, make_settings

try:
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.loggers.logger import DummyLogger
except ImportError:
    from pytorch_lightning.callbacks import Callback
    from pytorch_lightning.loggers.logger import DummyLogger

logger = logging.getLogger(__name__)

_ON_DEMAND = "Capture the trained module on demand: dmin_trace.integrations.lightning.capture(module, loader, out=%r)."
_SPLITTING_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAStrategy")


class TraceCallback(Callback):  # type: ignore[misc]
    """Captures the projected gradient of every training sample when the training is over.

    Nothing about the training changes: weights, optimizer, logged metrics and checkpoints are the same with and without
    it. It runs after all other callbacks, when checkpoints are written and averaged weights are in the module.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        settings: Settings | None = None,
        strict: bool = False,
        **overrides: Unpack[SettingsOverrides],
    ) -> None:
        """Raises SettingsError for an invalid setting.

        Args:
            out: the store. One that lies there is kept, as `trace-1.zarr`.
            settings: what to capture.
            strict: raise an error during the capture, instead of logging it.
            overrides: single settings by their names, instead of those in `settings`.
        """
        super().__init__()
        self.out, self.settings = Path(out), make_settings(given_settings(settings, overrides))
        self.strict = strict
        self._ended = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Raises, before the training, what would end a capture after it.

        AttachError if the trainer or the module is of a kind that is not supported, TraceError if `out` cannot be
        written.
        """
        if stage != "fit" or trainer.fast_dev_run:
            return
        if trainer.world_size > 1:
            raise AttachError(
                f"The trainer runs {trainer.world_size} processes, which is not supported. Train without "
                "TraceCallback, then capture in one process: dmin_trace.integrations.lightning.capture(module, loader, "
                "out='...')."
            )
        strategies = {kind.__name__ for kind in type(trainer.strategy).__mro__}
        if not strategies.isdisjoint(_SPLITTING_STRATEGIES):
            raise AttachError(f"{type(trainer.strategy).__name__} splits gradients, which cannot be captured.")
        _refuse_module(pl_module)
        store.check_writable(self.out)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuses a dataloader that could not be captured, and moves to the end of the callbacks.

        Raises AttachError for a dataloader whose samples have no index, or cannot be fetched one by one.
        """
        if trainer.fast_dev_run:
            return
        _refuse_loader(trainer.train_dataloader)
        # A new list: the trainer is iterating over the old one.
        trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self] + [self]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Captures. An error is logged, unless `strict`: the training has been done."""
        self._ended = True
        if trainer.fast_dev_run:
            logger.warning("fast_dev_run: nothing is captured.")
            return
        try:
            if (aside := store.set_aside(self.out.absolute())) is not None:
                logger.warning("%s is of this run. That of an earlier run is now %s.", self.out, aside.name)
            loader, optimizers = trainer.train_dataloader, trainer.optimizers
            capture(pl_module, loader, out=self.out, settings=self.settings, optimizers=optimizers, trainer=trainer)
        except Exception as error:
            if self.strict:
                raise
            if not isinstance(error, DminTraceError):
                logger.debug("The capture failed.", exc_info=True)
            found = str(error) if isinstance(error, DminTraceError) else f"{type(error).__name__}: {error}."
            advice = _ON_DEMAND % str(self.out)
            logger.error("dmin_trace could not capture this run; the training is not harmed. %s %s", found, advice)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Logs an error if there was no training."""
        if not self._ended:
            advice = _ON_DEMAND % str(self.out)
            logger.error("dmin_trace captured nothing: the trainer had nothing left to train. %s", advice)


def capture(
    module: Any,
    loader: Any,
    *,
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    optimizers: Sequence[torch.optim.Optimizer] | None = None,
    trainer: Any = None,
    **overrides: Unpack[SettingsOverrides],
) -> None:
    """Captures a trained module on demand; continues a capture that was interrupted.

    Args:
        module: the LightningModule, with the weights that are to be explained, on the device where it is to run.
        loader: the training dataloader; its dataset and its collate_fn are used.
        out: the store.
        settings: what to capture.
        optimizers: those that trained the module; what they train is captured. Without them every parameter with
            `requires_grad`.
        trainer: one with the precision of the training; by default the trainer that trained the module, if it did so
            in this process.
        overrides: single settings by their names, instead of those in `settings`.

    Raises:
        AttachError: the module or the loader is of a kind that is not supported.
        CaptureError: a training_step that would give wrong gradients.
        TraceError: the store is of another capture, or complete.
    """
    _refuse_module(module)
    _refuse_loader(loader)
    made, dataset = make_settings(given_settings(settings, overrides)), loader.dataset
    recording = Recording(
        [module],
        made,
        samples=len(dataset),
        out=Path(out),
        optimizers=optimizers,
        dataset=dataset,
        packages=("lightning",) if Callback.__module__.startswith("lightning.") else ("pytorch_lightning",),
        batch=lambda sample: loader.collate_fn([item_of(dataset, sample)]),
    )
    _record(recording, module, dataset, loader.collate_fn, trainer)


def attribute(
    module: Any,
    trace: Trace | str | os.PathLike[str],
    items: Sequence[Any],
    *,
    collate_fn: Callable[[list[Any]], Any] = default_collate,
    trainer: Any = None,
    k: int = 10,
    score: Score | ScoreMethod = "deflated",
) -> list[list[Hit]]:
    """The most influential training samples for each item, best first.

    Args:
        module: the LightningModule with the traced weights.
        trace: an opened trace, or its path.
        items: for each query image, what the training dataset's `__getitem__` would give for it.
        collate_fn: the training dataloader's.
        trainer: as for `capture`.
        k: how many training samples for each item.
        score: as for `dmin_trace.Trace.top_k`.

    Raises:
        QueryError: an item that is not like those of the training, or k below 1.
        WeightsError: the module's weights are not those of the trace.
        TraceError: there is no finished store.
    """
    _refuse_module(module)
    opened = trace if isinstance(trace, Trace) else open_trace(trace)
    if not items:
        raise QueryError("No item was given. Give at least one.")
    settings = make_settings(opened.store.header.settings)
    recording = Recording([module], settings, samples=len(items), like=opened.store)
    _record(recording, module, items, collate_fn, trainer)
    return opened.top_k(recording.queries, k, score).hits


def _record(recording: Recording, module: Any, dataset: Any, collate: Callable[[list[Any]], Any], trainer: Any) -> None:
    """Runs the module's training_step on every sample at every timestep."""
    trainer = trainer or module._trainer
    precision = trainer.precision_plugin if trainer is not None else None
    scaler = getattr(precision, "scaler", None)
    takes_number = len(inspect.signature(module.training_step).parameters) > 1
    with recording, _restored(module), _silent(module, trainer), EncoderCache(_frozen_in(module), ()) as frozen:
        for i in recording.samples:
            frozen.forget()
            try:
                given = item_of(dataset, i)
                batch = collate([given])
            except Exception as error:
                recording.missing(i, error)
                continue
            batch = batch if precision is None else precision.convert_input(batch)
            batch = module._apply_batch_transfer_handler(module._on_before_batch_transfer(batch), module.device)
            recording.describe(i, given, batch)
            for k in recording.timesteps:
                # A step may change its batch in place; each gets its own.
                own = apply_to_collection(batch, torch.Tensor, torch.clone)
                with recording.step(i, k):
                    with nullcontext() if precision is None else precision.train_step_context():
                        loss = _loss(module.training_step(own, 0) if takes_number else module.training_step(own))
                    (loss if scaler is None else scaler.scale(loss)).backward()


def _frozen_in(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The outermost modules in which no parameter trains: autoencoders, text encoders."""
    for child in module.children():
        if any(parameter.requires_grad for parameter in child.parameters()):
            yield from _frozen_in(child)
        else:
            yield child


def _loss(output: Any) -> torch.Tensor:
    """The loss that a training_step gives, by itself or in a dict."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, torch.Tensor):
        raise CaptureError(f"training_step gave {type(output).__name__}; expected a loss, or a dict with one.")
    return loss


@contextmanager
def _silent(module: Any, trainer: Any) -> Iterator[None]:
    """Keeps captures out of the trainer's logs."""
    with ExitStack() as undo:
        for name in ("log", "log_dict"):
            undo.callback(replace_attribute(module, name, lambda *args, **options: None))
        if trainer is not None and trainer.loggers:
            undo.callback(setattr, trainer, "loggers", trainer.loggers)
            # A step may call its logger's experiment.
            trainer.loggers = [DummyLogger()]
        yield


@contextmanager
def _restored(module: torch.nn.Module) -> Iterator[None]:
    """Restores what a training_step keeps in its module besides parameters: buffers, metrics, lists of losses."""
    bindings = [(one, dict(vars(one))) for one in module.modules()]
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in module.buffers()]
    undos = [undo for _, kept in bindings for value in kept.values() if (undo := undo_of(value)) is not None]
    try:
        yield
    finally:
        for one, kept in bindings:
            for name in vars(one).keys() - kept.keys():
                del vars(one)[name]
            vars(one).update(kept)
        for undo in undos:
            undo()
        with torch.no_grad():
            for buffer, version, old in buffers:
                if buffer._version != version:
                    buffer.copy_(old)


def _refuse_module(module: Any) -> None:
    if not module.automatic_optimization:
        raise AttachError(
            f"{type(module).__name__} has automatic_optimization=False, so its training_step cannot be run without "
            "training. Record its loss in a loop of your own: dmin_trace.recording(module, ...)."
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise AttachError("training_step takes a dataloader_iter, so it cannot be given a sample. Take a batch.")


def _refuse_loader(loader: Any) -> None:
    if not isinstance(loader, DataLoader):
        raise AttachError(
            f"The training data is a {type(loader).__name__}; expected one DataLoader, whose samples have an index."
        )
    refuse_iterable(loader.dataset)
    if loader.batch_sampler is None:
        raise AttachError("The dataset gives whole batches (batch_size=None); expected single samples.")
