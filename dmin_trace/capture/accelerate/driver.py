"""Drives the training script's own loop.

After the script's last optimizer step, and before its loop ends, the prepared dataloader goes on yielding *capture
batches*, one dataset item at one timestep each, to the script's own training step. So the script itself computes its
latents, conditioning, noise, weighting and loss; nothing of that is rebuilt here.

A loop that runs out (`for epoch in range(num_epochs)`) gets them after the last batch of the last epoch. One that
breaks (`if global_step >= max_train_steps: break`) would be gone by then, so on leaving the last `accumulate` its
`sync_gradients` is set to False: the block that counts the step, saves and breaks is *deferred*. On leaving the last
capture's `accumulate` it is set back to True, with the loop's variables as the last training batch left them.
"""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from dmin_trace.capture.accelerate.capture_batches import CaptureBatches
from dmin_trace.capture.accelerate.loop_variables import replace_attribute
from dmin_trace.capture.accelerate.training_run import TrainingRun
from dmin_trace.capture.used_models import UsedModels
from dmin_trace.errors import CaptureError, DminTraceError

if TYPE_CHECKING:
    from dmin_trace.capture.accelerate.attach import ScriptCapture

logger = logging.getLogger(__name__)


class CaptureFinished(BaseException):
    """Ends the script after an on-demand capture, before it can train, save or log. Caught by the launcher."""


class LoopDriver:
    """Wraps one accelerator; `remove` takes every wrapper off again.

    captured: the capture has begun, or can no longer begin.
    step_pending: the script has yet to count, average and save its last optimizer step.
    models: sees which models the script calls before its loop, and in the first training steps of a capture.
    """

    def __init__(self, accelerator: Accelerator, capture: "ScriptCapture") -> None:
        """Wraps an accelerator with which nothing is prepared yet. `capture` knows when the training ends."""
        self.run = TrainingRun(accelerator)
        self.batches = CaptureBatches(self.run, capture)
        self.captured = self.step_pending = False
        self._accelerator, self._capture = accelerator, capture
        self._first_step = self._steps = self._epochs = 0
        self.undo = ExitStack()
        self.models = UsedModels()
        self.models.watch_setup()
        self.undo.callback(self.models.stop)
        own = (self._prepare, self._skip_first_batches, self._accumulate, self._backward, self._load_state)
        wrappers: dict[str, Callable[..., Any]] = {method.__name__.removeprefix("_"): method for method in own}
        for name in ("log", "init_trackers", "clip_grad_norm_", "clip_grad_value_"):
            wrappers[name] = partial(self._skip_in_capture, name)
        self._original: dict[str, Callable[..., Any]] = {name: getattr(accelerator, name) for name in wrappers}
        for name, wrapper in wrappers.items():
            self.undo.callback(replace_attribute(accelerator, name, wrapper))

    def remove(self) -> None:
        """Takes every wrapper off the accelerator and its loaders, and all else that attaching left."""
        self.undo.close()

    def _prepare(self, *objects: Any, **options: Any) -> Any:
        prepared = self._original["prepare"](*objects, **options)
        try:
            if self.run.add(prepared):
                self._drive(self.run.loader)
        except DminTraceError as error:
            self._capture.refuse(error)
        return prepared

    def _skip_first_batches(self, loader: Any, *args: Any, **options: Any) -> Any:
        """Drives the shortened loader of a resumed epoch too."""
        skipping = self._original["skip_first_batches"](loader, *args, **options)
        if loader is self.run.loader and skipping is not loader:
            self._drive(skipping)
        return skipping

    @contextmanager
    def _accumulate(self, *models: Any) -> Iterator[None]:
        """Counts optimizer steps, and holds the script's own step counting still."""
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
        if (step := self.batches.step) is not None:
            self.batches.backward(step, loss)
        elif self._capture.on_demand:
            raise CaptureError(
                "The script trains on batches that are not capture batches: it never passed a DataLoader to "
                "accelerator.prepare, or iterates over another one. Nothing was captured, and nothing trained."
            )
        else:
            self.run.backwards += 1
            self._original["backward"](loss, **options)

    def _skip_in_capture(self, name: str, *args: Any, **options: Any) -> Any:
        """Keeps capture batches out of logs and out of `.grad`. A capture on demand opens no tracker either."""
        if self.batches.step is None and not self.step_pending and not self._capture.on_demand:
            return self._original[name](*args, **options)
        return torch.zeros((), device=self._accelerator.device) if name == "clip_grad_norm_" else None

    def _load_state(self, input_dir: Any = None, *args: Any, **options: Any) -> None:
        """Learns where a resumed run starts: diffusers' scripts keep that step in the folder's name alone."""
        found = re.findall(r"checkpoint[-_](\d+)", str(input_dir))
        self._first_step = int(found[-1]) if found else 0
        self._original["load_state"](input_dir, *args, **options)

    def _drive(self, loader: Any) -> None:
        """Makes the loader yield capture batches after its own; it stays the same object, its class a subclass."""
        kind = type(loader)
        # accelerate's loaders answer __class__ by a property of their own; this is the one beneath it.
        set_class = vars(object)["__class__"].__set__
        iterate = {"__iter__": lambda loader: self._batches_of(kind.__iter__(loader)), "__module__": kind.__module__}
        set_class(loader, type(kind.__name__, (kind,), iterate))
        self.undo.callback(set_class, loader, kind)

    def _batches_of(self, own: Iterator[Any]) -> Iterator[Any]:
        """The batches of one pass over the loader, and the capture batches where the training ends in this pass."""
        if not self.captured:
            # The loop begins. Training batches are not looked at.
            self.models.stop()
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
