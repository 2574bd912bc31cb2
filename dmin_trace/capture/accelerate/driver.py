"""Drives the training script's own loop.

After the script's last optimizer step, and before its loop ends, the prepared dataloader goes on yielding *capture
batches*, one dataset item at one timestep each, to the script's own training step. So the script itself computes its
latents, conditioning, noise, weighting and loss; nothing of that is rebuilt here. At the first `accelerator.backward`
it is known which loader that is, and `loop_form` says whether its loop can take them; if not, the driver lets go.

A loop that runs out (`for epoch in range(num_epochs)`) gets them after the last batch of the last epoch. One that
breaks (`if global_step >= max_train_steps: break`) would be gone by then, so on leaving the last `accumulate` its
`sync_gradients` is set to False: the block that counts the step, saves and breaks is *deferred*. On leaving the last
capture's `accumulate` it is set back to True, with the loop's variables as the last training batch left them.
"""

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from dmin_trace.capture.accelerate.capture_batches import CaptureBatches
from dmin_trace.capture.accelerate.loop_form import UnsuitableLoopError, check_length, check_loop
from dmin_trace.capture.accelerate.loop_variables import LoopVariables, replace_attribute
from dmin_trace.capture.accelerate.training_run import TrainingRun
from dmin_trace.capture.used_models import UsedModels
from dmin_trace.errors import CaptureError, DminTraceError, message_of

if TYPE_CHECKING:
    from dmin_trace.capture.accelerate.attach import ScriptCapture

logger = logging.getLogger(__name__)
ON_DEMAND = (
    "Nothing of the training was changed. When it has ended, capture on demand: dmin-trace capture --weights DIR -- "
    "SCRIPT ARGS."
)
"""The way out for a loop that capture batches cannot go through."""
ENDED_EARLY = (
    "The script's loop ended before the capture was complete. Have it take more batches (such as by a larger "
    "--max_train_steps) and run this again: it continues where it stopped."
)
_BASE = "_dmin_trace_loader"
"""The attribute of a driven loader's class with the prepared loader."""


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
        # The loader that gave the last batch; and the number of backwards at which its pass began.
        self._current: Any = None
        self._pass_began = 0
        self._form_checked = False
        self.undo = ExitStack()
        self.models = UsedModels()
        self.models.watch_setup()
        self.undo.callback(self.models.stop)
        own = (
            *(self._prepare, self._skip_first_batches, self._accumulate, self._backward, self._load_state),
            self._end_training,
        )
        wrappers: dict[str, Callable[..., Any]] = {method.__name__.removeprefix("_"): method for method in own}
        for name in ("log", "init_trackers", "clip_grad_norm_", "clip_grad_value_", "save_state", "save_model", "save"):
            wrappers[name] = partial(self._skip_in_capture, name)
        self._original: dict[str, Callable[..., Any]] = {name: getattr(accelerator, name) for name in wrappers}
        for name, wrapper in wrappers.items():
            self.undo.callback(replace_attribute(accelerator, name, wrapper))

    def remove(self) -> None:
        """Takes every wrapper off the accelerator and its loaders, and all else that attaching left."""
        self.undo.close()

    def _prepare(self, *objects: Any, **options: Any) -> Any:
        prepared = self._original["prepare"](*objects, **options)
        for loader in self.run.add(prepared):
            self._drive(loader, loader)
        return prepared

    def _skip_first_batches(self, loader: Any, *args: Any, **options: Any) -> Any:
        """Drives the shortened loader of a resumed epoch too."""
        skipping = self._original["skip_first_batches"](loader, *args, **options)
        if skipping is not loader and any(loader is known for known in self.run.loaders):
            self._drive(skipping, loader)
        return skipping

    @contextmanager
    def _accumulate(self, *models: Any) -> Iterator[None]:
        """Counts optimizer steps, and holds the script's own step counting still."""
        if self.batches.step is None:
            with self._original["accumulate"](*models):
                if self._capture.on_demand:
                    self.run.set_sync(False)
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
            # The probe's steps are over, so it is known how many there are.
            if self._capture.on_demand and not self._form_checked and step.kept:
                self._check_length(sys._getframe(1))
            self.batches.backward(step, loss)
        elif self._capture.on_demand:
            # The batch by which the training loader is found; nothing is trained on it.
            if self._current is None or self.run.loader is not None:
                raise CaptureError(
                    "The script trains on batches that are not capture batches: it never passed a DataLoader to "
                    "accelerator.prepare, or iterates over another one. Nothing was captured, and nothing trained."
                )
            self.run.train_on(self._current)
        else:
            if not self.captured and (self._backwards_in_pass == 0 or self._is_last_step()):
                self._check_loop(sys._getframe(1))
            self.run.backwards += 1
            self._original["backward"](loss, **options)

    @property
    def _backwards_in_pass(self) -> int:
        return self.run.backwards - self._pass_began

    def _check_loop(self, frame: FrameType) -> None:
        """Lets go of the training if its loop cannot take capture batches. Called before anything is deferred."""
        why = self._why_unsuitable(frame)
        if self._accelerator.num_processes > 1:
            # All processes capture, or none.
            why = next((reason for reason in gather_object([why]) if reason), "")
        if why:
            self._capture.refuse(CaptureError(why))

    def _check_length(self, frame: FrameType) -> None:
        """Raises CaptureError if the loop would end before a capture on demand is complete, and the script save."""
        self._form_checked = True
        try:
            # The capture is completed when the loop takes one batch more.
            check_length(frame, self._capture.recorder.steps_needed + 1)
        except UnsuitableLoopError as error:
            raise CaptureError(f"{error}. Nothing was captured.") from None

    def _why_unsuitable(self, frame: FrameType) -> str:
        """Why the loop cannot take capture batches, and what to do; "" if it can."""
        try:
            if self._current is None:
                raise UnsuitableLoopError(
                    "The script trains on batches of a DataLoader that it never passed to accelerator.prepare, or it "
                    "never passed a DataLoader at all"
                )
            if self.run.loader is None:
                self.run.train_on(self._current)
            self.run.check_optimizer()
            check_loop(frame, lambda value: self._base_of(value) is self.run.loader)
            if not self._form_checked:
                self._capture.final_weights.watch(LoopVariables())
            self._form_checked = True
        except UnsuitableLoopError as error:
            return f"{error}. {ON_DEMAND}"
        except DminTraceError as error:
            return str(error)
        except Exception as error:
            logger.debug("The loop's form could not be found out.", exc_info=True)
            return f"The form of the script's loop was not recognised ({message_of(error)}). {ON_DEMAND}"
        return ""

    def let_go(self) -> None:
        """Leaves the training alone from here on."""
        self.captured = True
        self.remove()

    def _end_training(self) -> Any:
        self._capture.check_final_weights()
        return self._original["end_training"]()

    def _skip_in_capture(self, name: str, *args: Any, **options: Any) -> Any:
        """Keeps capture batches out of logs, files and `.grad`. A capture on demand opens no tracker either."""
        if self.batches.step is None and not self.step_pending and not self._capture.on_demand:
            return self._original[name](*args, **options)
        return torch.zeros((), device=self._accelerator.device) if name == "clip_grad_norm_" else None

    def _load_state(self, input_dir: Any = None, *args: Any, **options: Any) -> None:
        """Learns where a resumed run starts: diffusers' scripts keep that step in the folder's name alone."""
        found = re.search(r"checkpoint[-_](\d+)$", Path(str(input_dir)).name)
        self._first_step = int(found[1]) if found else 0
        self._original["load_state"](input_dir, *args, **options)

    def _drive(self, loader: Any, base: Any) -> None:
        """Makes a loader yield capture batches after its own; it stays the same object, its class a subclass.

        `base` is the prepared loader that it is, or that it is a part of.
        """
        kind = type(loader)
        # accelerate's loaders answer __class__ by a property of their own; this is the one beneath it.
        set_class = vars(object)["__class__"].__set__
        iterate = {
            "__iter__": lambda loader: self._batches_of(base, kind.__iter__(loader)),
            "__module__": kind.__module__,
            _BASE: base,
        }
        set_class(loader, type(kind.__name__, (kind,), iterate))
        self.undo.callback(set_class, loader, kind)

    def _base_of(self, value: Any) -> Any:
        return getattr(type(value), _BASE, None)

    def _batches_of(self, loader: Any, own: Iterator[Any]) -> Iterator[Any]:
        """The batches of one pass over a loader, and the capture batches where the training ends in this pass."""
        if not self.captured:
            # The loop begins. Training batches are not looked at.
            self.models.stop()
        if self._capture.on_demand:
            if self.captured:
                raise CaptureError(ENDED_EARLY)
            if len(self.run.loaders) == 1:
                self.run.train_on(loader)
            for batch in own if self.run.loader is None else ():
                # Several loaders were prepared: the one is wanted whose batch comes to a backward.
                self._current = loader
                self.run.set_sync(False)
                yield batch
                if self.run.loader is not None:
                    break
            if self.run.loader is not loader:
                return
            yield from self._capture_batches()
            raise CaptureFinished
        self._pass_began = self.run.backwards
        for batch in own:
            self._current = loader
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
        if loader is not self.run.loader or not self._backwards_in_pass:
            # A pass that trains nothing is no epoch.
            return
        self._epochs += 1
        if not self.captured and self._form_checked and self._was_last_epoch():
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

    def _is_last_step(self) -> bool:
        """Whether the optimizer step that comes next is the last one."""
        last = self._capture.max_train_steps
        return last is not None and self._first_step + self._steps + 1 >= last

    def _count_step(self) -> None:
        is_last = self._is_last_step()
        self._steps += 1
        if not self.captured and self._form_checked and is_last:
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
