"""Runs the training step of the script's loop on capture batches: one dataset item at one timestep each.

An error in this code or in the script's on a capture batch ends the capture, and on demand or if `strict` the script.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import recursively_apply, send_to_device

from dmin_trace.capture.accelerate.loop_variables import LoopVariables, replace_attribute
from dmin_trace.capture.accelerate.training_run import TrainingRun
from dmin_trace.capture.encoder_cache import EncoderCache
from dmin_trace.capture.random_state import RandomState, seed_of
from dmin_trace.capture.recorder import Turn
from dmin_trace.capture.step import Advice, CaptureStep, StepGuard
from dmin_trace.errors import CaptureError, DminTraceError

if TYPE_CHECKING:
    from dmin_trace.capture.accelerate.attach import ScriptCapture

logger = logging.getLogger(__name__)
MAX_FIRST_SAMPLES = 20
"""How many samples are tried, at most, to find a first one that loads."""
_ADVICE = Advice(
    backward="accelerator.backward(loss)",
    once="Gradients are taken there: call it instead of loss.backward(), once for each batch.",
    changed="Its optimizer did not wait for accelerator.sync_gradients: pass the optimizer to accelerator.prepare.",
    seen="Is this a diffusion model?",
)


class CaptureBatches:
    """The capture batches of one capture, and all that changes in the script's process while they last.

    failed: an error ended the capture.
    is_last: the batch that is under way is the last one.
    """

    def __init__(self, run: TrainingRun, capture: "ScriptCapture") -> None:
        self._variables: LoopVariables | None = None
        self.failed = self.is_last = False
        self._run, self._capture = run, capture
        self._encoder_cache = EncoderCache((), ())
        self._guard = StepGuard((), (), _ADVICE)
        self._batch: Any = None
        self._undo = ExitStack()

    @property
    def step(self) -> CaptureStep | None:
        """The training step that is under way on a capture batch, if one is."""
        return self._guard.step

    def remember(self) -> bool:
        """Remembers what the script's loop changes, to be put back. Gives whether that succeeded."""
        with self._guarded():
            self._undo.callback(RandomState().restore)
            self._variables = LoopVariables()
            self._undo.callback(self._variables.restore)
        return not self.failed

    def __iter__(self) -> Iterator[Any]:
        """The capture batches. The script's loop runs its training step on each before it takes the next."""
        samples = list[int]()
        if self._variables is None:
            self.remember()
        if self._variables is not None:
            with self._guarded():
                samples = self._begin(self._variables)
        for turn in self._capture.recorder.turns(samples) if samples else ():
            batch = None
            if (turn.begins or self._batch is None) and not self.failed:
                with self._guarded():
                    self._load(turn.sample, stored=turn.stored)
            with self._guarded():
                # A step may change its batch in place; each gets its own.
                batch = recursively_apply(torch.clone, self._batch)
            if self.failed:
                break
            self.is_last = turn.last
            self.open_step(turn)
            yield batch
            self.close_step()
        self._batch = None

    def open_step(self, turn: Turn) -> None:
        self._run.set_sync(False)
        observed, kept, sign = turn.observed, turn.kept, turn.sign
        self._guard.open(turn.sample, turn.timestep, turn.pin, observed=observed, kept=kept, sign=sign)

    def open_empty_step(self) -> None:
        """Begins a training step that is not captured: the capture has failed, and the script's loop must go on."""
        self.is_last = True
        self.open_step(Turn(-1, self._capture.timesteps[0], None))

    @contextmanager
    def script_code(self) -> Iterator[None]:
        """Around the script's code in a training step: its errors end the capture, and not the script."""
        self._run.set_sync(False)
        where = f"The script's own code failed in {self.step.name if self.step else 'a training step'}"
        try:
            yield
        except Exception as error:
            if self._raises:
                logger.error("%s.", where)
                self._abandon()
                raise
            # The script's variables are put back, so it can go on. Its error is not kept: it would keep its tensors.
            self._fail(CaptureError(f"{where}: {type(error).__name__}: {error}"))
        except BaseException:
            self._abandon()
            raise

    def backward(self, step: CaptureStep, loss: torch.Tensor) -> None:
        """The script's `accelerator.backward(loss)` in the step that is under way."""
        step.backwards += 1
        if not self.failed:
            # No random call of ours is to be seen; and looking at every call of torch takes time.
            with self._guarded(), step.draws.paused():
                self._capture.recorder.backward(step, loss, scaled=self._run.accelerator.scaler is not None)

    def close_step(self) -> None:
        """Ends the step that is under way, if one is, and hands it to the recorder."""
        step = self.step
        self._guard.close()
        if step is None or self.failed:
            return
        with self._guarded():
            self._guard.check(step, self._capture.recorder.moved)
        recorder = self._capture.recorder
        if not self.failed:
            with self._guarded():
                if not step.kept:
                    # Also after an error: all processes make the same steps until they meet.
                    recorder.probe.take(step)
                else:
                    recorder.take(step)
                if self.is_last:
                    recorder.finish()

    def leave(self) -> None:
        """Puts everything back, after the last step or after a failure. A second call does nothing."""
        with self._guarded():
            self._undo.close()
        self._variables = None

    def _begin(self, variables: LoopVariables) -> list[int]:
        run, accelerator = self._run, self._run.accelerator
        run.check_optimizer()
        state = accelerator.gradient_state
        # Otherwise accelerate counts a scheduler step for every skipped optimizer step.
        options = {**state.plugin_kwargs, "adjust_scheduler": False}
        self._undo.callback(replace_attribute(state, "plugin_kwargs", options))
        self._undo.callback(run.set_sync, accelerator.sync_gradients)
        run.set_sync(False)
        modules = list(dict.fromkeys(value for value in variables.values() if isinstance(value, torch.nn.Module)))
        self._guard = self._undo.enter_context(StepGuard(run.models, run.denoisers(modules), _ADVICE))
        for model in run.models:
            # DDP would wait for gradients that never come.
            self._undo.enter_context(accelerator.no_sync(model))
        samples = self._capture.begin(variables, self._undo)
        self._encoder_cache = self._undo.enter_context(EncoderCache(variables.values(), map(run.unwrap, run.models)))
        return samples

    def fetch(self, sample: int) -> tuple[Any, Any]:
        """A sample's dataset item and the batch collated from it. All samples get the same augmentation."""
        self._encoder_cache.forget()
        return self._run.fetch(sample, seed_of(self._capture.settings.seed, 0))

    def _load(self, sample: int, *, stored: bool) -> None:
        """Makes a sample's batch the one that steps run on; that of another, if it cannot be loaded.

        Before the first row that is `stored` it is the next one that can: always the same one.
        """
        recorder, count = self._capture.recorder, self._run.samples
        failure: Exception | None = None
        # Steps can run on the batch of an earlier sample, if there is one.
        tries = 1 if stored and self._batch is not None else min(MAX_FIRST_SAMPLES, count)
        for other in range(sample, sample + tries):
            try:
                item, batch = self.fetch(other % count)
            except Exception as error:
                failure = failure or error
                continue
            self._batch = send_to_device(batch, self._run.accelerator.device)
            recorder.sample(other % count, item, self._batch)
            break
        if failure is not None:
            recorder.missing(sample, failure)
        if self._batch is None:
            why = f"nor could those that follow it: {type(failure).__name__}: {failure}"
            raise CaptureError(f"Sample {sample} could not be loaded, {why}") from failure

    @property
    def _raises(self) -> bool:
        """Whether errors are raised, which ends the script."""
        return self._capture.on_demand or self._capture.job.strict

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Around code of ours: after an error the step under way runs on, and the loop ends as it would have."""
        try:
            yield
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Ends the capture, or the script too where errors are raised. Some errors wait until all processes meet."""
        if self._capture.ranks.hold(error):
            return
        self.failed = self.is_last = True
        if self._raises:
            self._abandon()
            raise error
        if not isinstance(error, DminTraceError):
            logger.debug("The capture failed.", exc_info=True)
        self._capture.failed(error)

    def _abandon(self) -> None:
        """Puts back what can be put back while an error ends the script."""
        self._guard.close()
        self._undo.close()
