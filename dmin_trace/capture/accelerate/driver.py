"""Drives the training script's own loop.

After the script's last optimizer step, and before its loop ends, the prepared dataloader goes on yielding *capture
batches*, one dataset item x one timestep slot each, into the script's own loop body. So the script itself computes its
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
training batch left them, and the script goes on as if nothing had been between.

The training comes first. Whatever goes wrong in here after the training is caught and handed to the work, and the
script goes on; also what goes wrong in its own body on a capture batch, inside `accumulate`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from types import FrameType
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, recursively_apply, send_to_device

from dmin_trace.capture.accelerate.loop_variables import LoopVariables, script_frame
from dmin_trace.capture.randomness import PinnedDraws, PinnedTimestep, RandomState, seed_everything
from dmin_trace.capture.step import CaptureStep, takes_timestep
from dmin_trace.errors import AttachError, CaptureError, DminTraceError

logger = logging.getLogger(__name__)


LOOKED_AT = 20
"""Samples among which the first that can be loaded must be."""


class CaptureFinished(BaseException):
    """Ends the script after an on-demand capture, before it can train, save or log. Caught by the launcher."""


@dataclass(frozen=True)
class Ending:
    """When the script's training ends. Read anew each time: scripts overwrite these after `prepare`.

    max_train_steps: gives the number of optimizer steps, or None.
    num_epochs: gives the number of epochs, or None.
    """

    max_train_steps: Callable[[], int | None]
    num_epochs: Callable[[], int | None]


class Work(Protocol):
    """What is done with the loop body's losses; `capture.Capture` is it."""

    @property
    def slots(self) -> tuple[PinnedTimestep, ...]:
        """The runs of the loop body for each sample."""

    @property
    def item_seed(self) -> int:
        """The seed under which every sample is fetched."""

    @property
    def strict(self) -> bool:
        """Whether an error may end the script's training."""

    def begin(self, driver: LoopDriver) -> list[int]:
        """Called once, before the first capture batch. Gives the dataset indices to capture, in order."""

    def batch(self, sample: int, item: Any, batch: Any) -> None:
        """Called with each sample's dataset item and the batch collated from it, before its loop bodies."""

    def missing(self, sample: int, error: Exception) -> None:
        """Called where a sample could not be loaded: its bodies are run on another one's batch, and count for nothing.

        Raises where that is not to be borne.
        """

    def hold(self, error: Exception) -> bool:
        """Called with an error in a body or around it. True if bodies are to be run on until the work itself raises it:
        other processes do so, and a loop that gathers must run as many in each."""

    def backward(self, body: CaptureStep, loss: torch.Tensor) -> None:
        """Called by the script's `accelerator.backward`."""

    def take(self, body: CaptureStep) -> None:
        """Called after each loop body."""

    def moved(self, parameters: list[torch.nn.Parameter]) -> bool:
        """Whether the values of these parameters, which a loop body wrote to, are others than at the beginning."""

    def finish(self) -> None:
        """Called once, after the last loop body."""

    def leave(self) -> None:
        """Called once after `begin`, whatever happened: puts back what `begin` changed."""

    def failed(self, error: Exception) -> None:
        """Called instead of raising, where the script's training must go on."""


class LoopDriver:
    """Wraps one accelerator; `remove` takes every wrapper off again."""

    def __init__(self, accelerator: Accelerator, ending: Ending, work: Work, *, on_demand: bool) -> None:
        """Wraps the accelerator, which must not be wrapped already.

        Args:
            accelerator: the script's accelerator, nothing prepared yet.
            ending: when training ends.
            work: what is done with the losses.
            on_demand: capture at once, at the first batch, then leave the script.
        """
        self.accelerator = accelerator
        self.ending = ending
        self.work = work
        self.on_demand = on_demand
        self.models: list[torch.nn.Module] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self.loader: Any = None
        self.variables: LoopVariables | None = None
        self.captured = False
        self.failed = False
        self._first_step = 0
        self._steps = 0
        self._epochs = 0
        self._backwards = 0
        self._deferred = False
        self._body: CaptureStep | None = None
        self._last_body = False
        self._last_batch: Any = None
        self._capture_batch: Any = None
        self._parameters: list[torch.nn.Parameter] = []
        self._random_state: RandomState | None = None
        self._leaving = ExitStack()
        self._handles: list[Callable[[], None]] = []
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
        """Adds what else `remove` takes off."""
        self._handles.append(undo)

    def remove(self) -> None:
        """Takes every wrapper off the accelerator and its loaders, and all else that attaching left."""
        while self._handles:
            self._handles.pop()()

    @property
    def attached(self) -> bool:
        """Whether the wrappers are on."""
        return bool(self._handles)

    @property
    def body(self) -> CaptureStep | None:
        """The run of the loop body that is under way on a capture batch, if one is."""
        return self._body

    @property
    def step_pending(self) -> bool:
        """Whether the script has yet to count, average and save its last optimizer step."""
        return self._deferred

    @property
    def capturing(self) -> bool:
        """Whether the script's loop is running, or about to run, on capture batches."""
        return self._body is not None or self._deferred

    def _wrap(self, name: str, wrapper: Callable[..., Any]) -> None:
        own = vars(self.accelerator)
        self._original[name] = getattr(self.accelerator, name)
        if name in own:
            self._handles.append(partial(setattr, self.accelerator, name, own[name]))
        else:
            # An attribute of the instance hides the method; deleting it brings the method back.
            self._handles.append(partial(delattr, self.accelerator, name))
        setattr(self.accelerator, name, wrapper)

    # -- what the script calls -------------------------------------------------------------------------------------

    def _prepare(self, *objects: Any, **options: Any) -> Any:
        given = self._original["prepare"](*objects, **options)
        prepared = given if isinstance(given, (tuple, list)) else [given]
        self.models += [p for p in prepared if isinstance(p, torch.nn.Module)]
        optimizers = [p for p in prepared if isinstance(p, torch.optim.Optimizer)]
        self.optimizers += [optimizer for optimizer in optimizers if optimizer not in self.optimizers]
        loaders = [p for p in prepared if isinstance(p, torch.utils.data.DataLoader)]
        if loaders and self.loader is None:
            self.loader = loaders[0]
            self._refuse_what_cannot_be_driven()
            self._drive(self.loader)
        return given

    def _skip_first_batches(self, loader: Any, *args: Any, **options: Any) -> Any:
        skipping = self._original["skip_first_batches"](loader, *args, **options)
        if loader is self.loader and skipping is not loader:
            self._drive(skipping)
        return skipping

    @contextmanager
    def _accumulate(self, *models: Any) -> Iterator[None]:
        body = self._body
        if body is None:
            with self._original["accumulate"](*models):
                yield
            if self.accelerator.sync_gradients:
                self._count_step()
            return
        self._set_sync(False)
        try:
            yield
        except Exception as error:
            where = (
                f"The script's own loop body failed on the capture batch of sample {body.sample}, timestep slot "
                f"{body.slot.number}"
            )
            if self.on_demand or self.work.strict:
                logger.error("%s.", where)
                self._abandon()
                raise
            # What the body has done so far counts for nothing, and its variables are put back: the script can go on.
            failure = CaptureError(f"{where}: {type(error).__name__}: {error}")
            if not self.work.hold(failure):
                self._fail(failure)
        except BaseException:
            self._abandon()
            raise
        if self._last_body and self._deferred:
            # The rest of this body is the deferred end of the last training step: everything must stand as it did.
            self._close_body()
            self._leave()
            self._deferred = False
            self._set_sync(True)

    def _backward(self, loss: torch.Tensor, **options: Any) -> None:
        if self._body is None and self.on_demand:
            raise CaptureError(
                "The script trains on batches that are not capture batches: it never passed a DataLoader to "
                "accelerator.prepare, or iterates over another one. Nothing was captured, and nothing trained."
            )
        if self._body is None:
            self._backwards += 1
            self._original["backward"](loss, **options)
            return
        body = self._body
        body.backwards += 1
        if not self.failed:
            # What happens in here is ours and draws nothing, and a mode that looks at each of its calls costs as much
            # as they do.
            with body.draws.paused():
                self._guarded(partial(self.work.backward, body, loss))

    def _log(self, *args: Any, **options: Any) -> None:
        if not self.capturing:
            self._original["log"](*args, **options)

    def _init_trackers(self, *args: Any, **options: Any) -> None:
        if not self.on_demand:
            self._original["init_trackers"](*args, **options)

    def _clip_grad_norm(self, *args: Any, **options: Any) -> Any:
        if self.capturing:
            return torch.zeros((), device=self.accelerator.device)
        return self._original["clip_grad_norm_"](*args, **options)

    def _clip_grad_value(self, *args: Any, **options: Any) -> None:
        if not self.capturing:
            self._original["clip_grad_value_"](*args, **options)

    def _load_state(self, input_dir: Any = None, *args: Any, **options: Any) -> None:
        # The folder's name is the only place where diffusers' scripts keep the step they resume from.
        found = re.search(r"checkpoint[-_](\d+)", str(input_dir))
        self._first_step = int(found.group(1)) if found else 0
        self._original["load_state"](input_dir, *args, **options)

    # -- when to capture -------------------------------------------------------------------------------------------

    def _refuse_what_cannot_be_driven(self) -> None:
        unsupported = {
            DistributedType.DEEPSPEED,
            DistributedType.FSDP,
            DistributedType.MEGATRON_LM,
            DistributedType.XLA,
        }
        if self.accelerator.distributed_type in unsupported:
            raise AttachError(
                f"This run is distributed with {self.accelerator.distributed_type.value}, which splits gradients in a "
                "way that cannot be captured yet. Capture on demand in one process: dmin-trace capture."
            )
        if isinstance(self.loader.dataset, torch.utils.data.IterableDataset):
            raise AttachError(
                "The training data is an IterableDataset, whose samples have no index to attribute to. Use a dataset "
                "with __len__ and __getitem__."
            )
        if self.loader.collate_fn is None:
            raise AttachError("The dataloader has no collate_fn, so a batch of one sample cannot be made.")

    def _drive(self, loader: Any) -> None:
        """Makes the loader yield capture batches after its own; it stays the same object, its class a subclass."""
        kind = type(loader)
        driver = self

        def iterate(self: Any) -> Iterator[Any]:
            return driver._batches(kind.__iter__(self))

        # accelerate's loaders answer __class__ by a property of their own; this is the one beneath it.
        set_class = vars(object)["__class__"].__set__
        set_class(loader, type(kind.__name__, (kind,), {"__iter__": iterate, "__module__": kind.__module__}))
        self._handles.append(partial(set_class, loader, kind))

    def _batches(self, own: Iterator[Any]) -> Iterator[Any]:
        if self.on_demand:
            yield from self._capture_batches()
            raise CaptureFinished
        self._epochs += 1
        for batch in own:
            self._last_batch = batch
            yield batch
            if self._deferred:
                try:
                    yield from self._capture_batches()
                    if self._deferred:
                        # The capture failed between two bodies: the deferred end of the step still needs one to run in.
                        self._last_body = True
                        self._open_body(-1, self.work.slots[0])
                        yield self._last_batch
                finally:
                    self._give_up_deferral()
        self._last_batch = None
        if not self.captured and self._was_last_epoch():
            yield from self._capture_batches()

    def _was_last_epoch(self) -> bool:
        epochs = self.ending.num_epochs()
        if epochs is None:
            return False
        steps = -(-len(self.loader) // self.accelerator.gradient_accumulation_steps)
        return bool(self._first_step // max(steps, 1) + self._epochs >= epochs)

    def _count_step(self) -> None:
        self._steps += 1
        last = self.ending.max_train_steps()
        if self.captured and not self.failed:
            logger.warning("The script took another optimizer step after the capture; the trace is of the step before.")
        elif last is not None and self._first_step + self._steps >= last and not self.captured:
            self._guarded(partial(self._remember, script_frame()))
            # Without what the script's variables are put back from, there is no capture.
            self._deferred = not self.failed
            self.captured = self.failed
            if self._deferred:
                self._set_sync(False)

    def _give_up_deferral(self) -> None:
        """After a loop that left in spite of the deferral: nothing may stay changed."""
        if self._deferred:
            self._deferred = False
            self._leave()
            self._set_sync(True)

    # -- capture batches -------------------------------------------------------------------------------------------

    def _remember(self, frame: FrameType) -> None:
        self._random_state = RandomState.take()
        self.variables = LoopVariables(frame)

    def _capture_batches(self) -> Iterator[Any]:
        self.captured = True
        if self.variables is None:
            self._guarded(partial(self._remember, script_frame()))
        samples = [] if self.failed else self._guarded(self._begin) or []
        for n, (sample, slot) in enumerate(product(samples, self.work.slots)):
            batch = self._next_batch(sample, slot)
            if self.failed:
                break
            self._last_body = n == len(samples) * len(self.work.slots) - 1
            self._open_body(sample, slot)
            yield batch
            self._close_body()
        self._capture_batch = None
        if not self._deferred:
            self._leave()

    def _begin(self) -> list[int]:
        if not self.optimizers:
            raise CaptureError(
                "No optimizer was passed to accelerator.prepare, so capture batches would train the model. Prepare the "
                "optimizer."
            )
        if not self.on_demand and not self._backwards:
            raise CaptureError(
                "The script trained without calling accelerator.backward(loss), which is where gradients are taken. "
                "Call it instead of loss.backward()."
            )
        adjust = self.accelerator.gradient_state.plugin_kwargs
        before = adjust.get("adjust_scheduler")
        # Otherwise accelerate counts a scheduler step for every skipped optimizer step.
        adjust["adjust_scheduler"] = False
        self._leaving.callback(lambda: adjust.update(adjust_scheduler=before))
        if before is None:
            self._leaving.callback(lambda: adjust.pop("adjust_scheduler"))
        self._leaving.callback(self._set_sync, self.accelerator.sync_gradients)
        self._set_sync(False)
        self._parameters = [parameter for model in self.models for parameter in model.parameters()]
        for model in self.models:
            for module in model.modules():
                self._leaving.callback(setattr, module, "training", module.training)
            model.eval()
            # DDP would wait for gradients that never come.
            self._leaving.enter_context(self.accelerator.no_sync(model))
        for module in self._denoisers():
            handle = module.register_forward_pre_hook(self._see_timestep, with_kwargs=True)
            self._leaving.callback(handle.remove)
        self._leaving.callback(self.work.leave)
        return self.work.begin(self)

    def _denoisers(self) -> list[torch.nn.Module]:
        """The prepared models that take a timestep, or, where only others are trained, the loop's own that do."""
        prepared = [self.unwrap(model) for model in self.models]
        for modules in (prepared, self._own_modules()):
            if found := [module for module in modules if takes_timestep(module)]:
                return found
        return prepared

    def _own_modules(self) -> list[torch.nn.Module]:
        """The modules among the loop's variables, each once."""
        values = self.variables.values() if self.variables else ()
        return list(dict.fromkeys(value for value in values if isinstance(value, torch.nn.Module)))

    def fetch(self, sample: int) -> tuple[Any, Any]:
        """A sample's dataset item and the batch collated from it, under the same seed for all.

        Raises whatever the data set and its collate_fn raise.
        """
        seed_everything(self.work.item_seed)
        dataset = self.loader.dataset
        items = dataset.__getitems__([sample]) if hasattr(dataset, "__getitems__") else [dataset[sample]]
        return items[0], self.loader.collate_fn(items)

    def _next_batch(self, sample: int, slot: PinnedTimestep) -> Any:
        """What the next body is run on; nothing once the capture has failed."""
        if not self.failed and slot == self.work.slots[0]:
            self._guarded(partial(self._load, sample))
        if self.failed:
            return None
        # A body may change its batch in place; each gets its own.
        return self._guarded(partial(recursively_apply, torch.clone, self._capture_batch))

    def _load(self, sample: int) -> None:
        """Makes a sample's batch the one that bodies are run on; one that cannot be loaded leaves that of another."""
        try:
            item, batch = self.fetch(sample)
        except Exception as error:
            self.work.missing(sample, error)
            if self._capture_batch is None:
                self._load_another(sample, error)
                # What was said last is that the other one is there.
                self.work.missing(sample, error)
        else:
            self._take_batch(sample, item, batch)

    def _load_another(self, sample: int, error: Exception) -> None:
        """Loads one of the samples that follow, where none was loaded so far. Raises CaptureError if none can be."""
        count = len(self.loader.dataset)
        for step in range(1, min(LOOKED_AT, count)):
            other = (sample + step) % count
            try:
                item, batch = self.fetch(other)
            except Exception:
                continue
            self._take_batch(other, item, batch)
            return
        raise CaptureError(
            f"Sample {sample} could not be loaded, nor could those that follow it: {type(error).__name__}: {error}"
        ) from error

    def _take_batch(self, sample: int, item: Any, batch: Any) -> None:
        self._capture_batch = send_to_device(batch, self.accelerator.device)
        self.work.batch(sample, item, self._capture_batch)

    def _open_body(self, sample: int, slot: PinnedTimestep) -> None:
        self._set_sync(False)
        self._body = CaptureStep(sample, slot, PinnedDraws(slot), versions=self._versions())
        seed_everything(slot.seed)
        self._body.draws.start()

    def _close_body(self) -> None:
        body = self._body
        if body is not None:
            self._end_body()
            if not self.failed:
                self._guarded(partial(self._take, body))

    def _end_body(self) -> None:
        if self._body is not None:
            self._body.draws.stop()
            self._body = None

    def _take(self, body: CaptureStep) -> None:
        try:
            self._check_body(body)
        except Exception as error:
            if not self.work.hold(error):
                raise
        self.work.take(body)
        if self._last_body:
            self.work.finish()

    def _check_body(self, body: CaptureStep) -> None:
        if body.draws.error is not None:
            raise body.draws.error
        if body.backwards != 1:
            raise CaptureError(
                f"The loop body called accelerator.backward {body.backwards} times on a capture batch; expected once. "
                "Gradients are taken there: call accelerator.backward(loss) instead of loss.backward(), once a batch."
            )
        written = [p for p, before in zip(self._parameters, body.versions, strict=True) if p._version != before]
        # Writing back what was there is no harm: textual inversion does so to the words that it does not train.
        if written and self.work.moved(written):
            raise CaptureError(
                "The loop body changed the model's parameters on a capture batch, so its optimizer did not wait for "
                "accelerator.sync_gradients. Pass the optimizer to accelerator.prepare."
            )

    def _leave(self) -> None:
        """Puts everything back. Called after the last body, or after a failure; a second call does nothing."""
        self._guarded(self._leaving.close)
        if self.variables is not None:
            self._guarded(self.variables.restore)
        if self._random_state is not None:
            self._guarded(self._random_state.restore)
        self.variables = self._random_state = None

    def _abandon(self) -> None:
        """Puts back what can be put back while an error is on its way out through the script."""
        self._end_body()
        self._leaving.close()

    def _guarded(self, step: Callable[[], Any]) -> Any:
        """Runs a step of ours. Its errors are the work's to report where the script's training must go on."""
        try:
            return step()
        except Exception as error:
            if self.work.hold(error):
                return None
            if self.on_demand or self.work.strict:
                self.failed = True
                self._abandon()
                raise
            self._fail(error)
            return None

    def _fail(self, error: Exception) -> None:
        """Ends the capture, and not the script: the body under way runs on, and the loop ends as it would have."""
        self.failed = True
        if not isinstance(error, DminTraceError):
            logger.debug("The capture failed.", exc_info=True)
        self.work.failed(error)
        self._last_body = True

    # -- small things ----------------------------------------------------------------------------------------------

    def unwrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The script's own module inside DDP's or torch.compile's."""
        inner: torch.nn.Module = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        return inner

    def _versions(self) -> list[int]:
        """How often each parameter was changed in place."""
        return [parameter._version for parameter in self._parameters]

    def _set_sync(self, sync: bool) -> None:
        self.accelerator.gradient_state._set_sync_gradients(sync)

    def _see_timestep(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._body is not None and not self.failed:
            self._guarded(partial(self._body.see_timestep, module, args, kwargs))
