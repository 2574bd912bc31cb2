"""Drives the training script's own loop.

After the script's last optimizer step, and before its loop ends, the prepared dataloader goes on yielding *capture
batches*, one dataset item at one timestep each, to the script's own training step. So the script itself computes its
latents, conditioning, noise, weighting and loss; nothing of that is rebuilt here.

    LoopDriver wraps   prepare           to learn the models, the optimizers and the loader
                       accumulate        to count optimizer steps, and to hold the script's step counting still
                       backward          to take the gradient instead of accumulating it
                       log, clip_grad_*  to keep captures out of logs and out of `.grad`
                       load_state        to learn where a resumed run starts
                       skip_first_batches to drive the shortened loader of a resumed epoch too
                       init_trackers     to open no tracker for a capture on demand

Two kinds of loop end differently. One that runs out (`for epoch in range(num_epochs)`) gets its capture batches after
the last batch of the last epoch. One that breaks (`if global_step >= max_train_steps: break`) would be gone by then, so
on leaving the last `accumulate` its `sync_gradients` is set to False: the block that counts the step, saves and breaks
is *deferred*. On leaving the last capture's `accumulate` it is set back to True, with the loop's variables as the last
training batch left them, and the script goes on as if there had been no capture.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from dmin_trace.capture.accelerate.capture_batches import CaptureBatches
from dmin_trace.capture.accelerate.training_run import TrainingRun
from dmin_trace.errors import CaptureError

if TYPE_CHECKING:
    from dmin_trace.capture.accelerate.script_capture import ScriptCapture

logger = logging.getLogger(__name__)


class CaptureFinished(BaseException):
    """Ends the script after an on-demand capture, before it can train, save or log. Caught by the launcher."""


class LoopDriver:
    """Wraps one accelerator; `remove` takes every wrapper off again.

    run: what the script has prepared.
    batches: the capture batches.
    captured: the capture has begun, or can no longer begin.
    step_pending: the script has yet to count, average and save its last optimizer step.
    """

    def __init__(self, accelerator: Accelerator, capture: ScriptCapture) -> None:
        """Wraps an accelerator with which nothing is prepared yet.

        `capture` knows when the training ends, and gets the losses. If it is on demand, it begins at the first batch,
        and the script ends after it.
        """
        self.run = TrainingRun(accelerator)
        self.batches = CaptureBatches(self.run, capture)
        self.captured = False
        self.step_pending = False
        self._accelerator = accelerator
        self._capture = capture
        self._first_step = self._steps = self._epochs = 0
        self._undo = ExitStack()
        self._original: dict[str, Callable[..., Any]] = {}
        wrappers: dict[str, Callable[..., Any]] = {
            "prepare": self._prepare,
            "skip_first_batches": self._skip_first_batches,
            "accumulate": self._accumulate,
            "backward": self._backward,
            "log": self._log,
            "init_trackers": self._init_trackers,
            "load_state": self._load_state,
            "clip_grad_norm_": self._clip_grad_norm,
            "clip_grad_value_": self._clip_grad_value,
        }
        for name, wrapper in wrappers.items():
            self._wrap(name, wrapper)

    def on_remove(self, undo: Callable[[], None]) -> None:
        """Adds to what `remove` does."""
        self._undo.callback(undo)

    def remove(self) -> None:
        """Takes every wrapper off the accelerator and its loaders, and all else that attaching left."""
        self._undo.close()

    def _wrap(self, name: str, wrapper: Callable[..., Any]) -> None:
        accelerator = self._accelerator
        self._original[name] = getattr(accelerator, name)
        # An attribute of the instance hides the method; deleting it brings the method back.
        self._undo.callback(
            partial(setattr, accelerator, name, vars(accelerator)[name])
            if name in vars(accelerator)
            else partial(delattr, accelerator, name)
        )
        setattr(accelerator, name, wrapper)

    # -- what the script calls -------------------------------------------------------------------------------------

    @property
    def _capturing(self) -> bool:
        """Whether the script's loop is running, or about to run, on capture batches."""
        return self.batches.step is not None or self.step_pending

    def _prepare(self, *objects: Any, **options: Any) -> Any:
        prepared = self._original["prepare"](*objects, **options)
        if self.run.add(prepared):
            self._drive(self.run.loader)
        return prepared

    def _skip_first_batches(self, loader: Any, *args: Any, **options: Any) -> Any:
        skipping = self._original["skip_first_batches"](loader, *args, **options)
        if loader is self.run.loader and skipping is not loader:
            self._drive(skipping)
        return skipping

    @contextmanager
    def _accumulate(self, *models: Any) -> Iterator[None]:
        if self.batches.step is None:
            with self._original["accumulate"](*models):
                yield
            if self._accelerator.sync_gradients:
                self._count_step()
            return
        with self.batches.script_code():
            yield
        if self.batches.is_last and self.step_pending:
            # The rest of this training step is the deferred end of the last one: everything must be as it was then.
            self.batches.close_step()
            self._end_deferral()

    def _backward(self, loss: torch.Tensor, **options: Any) -> None:
        if self.batches.step is not None:
            self.batches.backward(loss)
        elif self._capture.on_demand:
            raise CaptureError(
                "The script trains on batches that are not capture batches: it never passed a DataLoader to "
                "accelerator.prepare, or iterates over another one. Nothing was captured, and nothing trained."
            )
        else:
            self.run.backwards += 1
            self._original["backward"](loss, **options)

    def _log(self, *args: Any, **options: Any) -> None:
        if not self._capturing:
            self._original["log"](*args, **options)

    def _init_trackers(self, *args: Any, **options: Any) -> None:
        if not self._capture.on_demand:
            self._original["init_trackers"](*args, **options)

    def _clip_grad_norm(self, *args: Any, **options: Any) -> Any:
        if self._capturing:
            return torch.zeros((), device=self._accelerator.device)
        return self._original["clip_grad_norm_"](*args, **options)

    def _clip_grad_value(self, *args: Any, **options: Any) -> None:
        if not self._capturing:
            self._original["clip_grad_value_"](*args, **options)

    def _load_state(self, input_dir: Any = None, *args: Any, **options: Any) -> None:
        # Diffusers' scripts keep the step that they resume from in the folder's name alone.
        found = re.findall(r"checkpoint[-_](\d+)", str(input_dir))
        self._first_step = int(found[-1]) if found else 0
        self._original["load_state"](input_dir, *args, **options)

    # -- when to capture -------------------------------------------------------------------------------------------

    def _drive(self, loader: Any) -> None:
        """Makes the loader yield capture batches after its own; it stays the same object, its class a subclass."""
        kind = type(loader)
        driver = self

        def iterate(self: Any) -> Iterator[Any]:
            return driver._batches_of(kind.__iter__(self))

        # accelerate's loaders answer __class__ by a property of their own; this is the one beneath it.
        set_class = vars(object)["__class__"].__set__
        set_class(loader, type(kind.__name__, (kind,), {"__iter__": iterate, "__module__": kind.__module__}))
        self._undo.callback(set_class, loader, kind)

    def _batches_of(self, own: Iterator[Any]) -> Iterator[Any]:
        """The batches of one pass over the loader, and the capture batches where the training ends in this pass."""
        if self._capture.on_demand:
            yield from self._capture_batches()
            raise CaptureFinished
        self._epochs += 1
        for batch in own:
            yield batch
            if self.step_pending:
                try:
                    yield from self._capture_batches()
                    if self.step_pending:
                        # The capture failed between two steps: the deferred end still needs one to run in.
                        self.batches.open_empty_step()
                        yield batch
                finally:
                    if self.step_pending:
                        # The loop was left in spite of the deferral.
                        self._end_deferral()
        if not self.captured and self._was_last_epoch():
            yield from self._capture_batches()

    def _capture_batches(self) -> Iterator[Any]:
        self.captured = True
        yield from self.batches
        if not self.step_pending:
            self.batches.leave()

    def _was_last_epoch(self) -> bool:
        epochs = self._capture.num_epochs
        if epochs is None:
            return False
        steps = -(-len(self.run.loader) // self._accelerator.gradient_accumulation_steps)
        return bool(self._first_step // max(steps, 1) + self._epochs >= epochs)

    def _count_step(self) -> None:
        self._steps += 1
        last = self._capture.max_train_steps
        if self.captured and not self.batches.failed:
            logger.warning("The script took another optimizer step after the capture; the trace is of the step before.")
        elif last is not None and self._first_step + self._steps >= last and not self.captured:
            self.step_pending = self.batches.remember()
            # Without what the script's variables are put back from, there is no capture.
            self.captured = not self.step_pending
            if self.step_pending:
                self.run.set_sync(False)

    def _end_deferral(self) -> None:
        """Lets the script finish its last optimizer step, with everything as that step left it."""
        self.batches.leave()
        self.step_pending = False
        self.run.set_sync(True)
