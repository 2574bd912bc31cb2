"""Which weights a capture at the end of a training is of, and whether the training ends with them: `FinalWeights`.

A script may save an average of its weights (EMA): then the capture is of that. And what was captured must be what the
run ends with: a loop that goes on afterwards, or loads its best checkpoint, leaves a trace that explains another model.
"""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch

from dmin_trace import store
from dmin_trace.capture.accelerate.averages import Averages, evaluated, keeps_average
from dmin_trace.capture.accelerate.loop_variables import LoopVariables
from dmin_trace.capture.accelerate.training_run import TrainingRun
from dmin_trace.capture.host import Host
from dmin_trace.capture.weights import Trainable, find_trainable
from dmin_trace.errors import CaptureError, DminTraceError

logger = logging.getLogger(__name__)


class FinalWeights:
    """The weights of one training run, from its first step to its end.

    moved: the training has moved them after they were captured, and the trace is marked.
    """

    def __init__(self, run: TrainingRun) -> None:
        self.moved = False
        self._run = run
        self._averages: Averages | None = None
        # The fingerprint of the weights before an average takes their place.
        self._raw: str | None = None
        self._versions: list[tuple[int, int]] = []

    def watch(self, variables: LoopVariables) -> None:
        """Sees the loop's variables at its first training step, from which averages of weights are told later."""
        trained = find_trainable(self._models(), self._run.optimizers)
        self._averages = Averages(variables.named(), trained.tensors)

    def enter(
        self, trainable: Trainable, variables: LoopVariables, host: Host, undo: ExitStack, *, step_pending: bool
    ) -> str:
        """Puts averages of the weights that the script saves into the model; says which weights are captured.

        What takes them out again goes on `undo`. `step_pending`: the script has yet to average its last step.
        Raises CaptureError if it is not known which weights the script will save.
        """
        known = host.averaged_models(variables.values())
        by_optimizer = [optimizer for optimizer in self._run.optimizers if keeps_average(optimizer)]
        if known or by_optimizer:
            self._raw = trainable.weights_fingerprint()
        for ema in known:
            undo.enter_context(_averaged_weights(ema, self._models(), host, step_pending))
        for optimizer in by_optimizer:
            undo.enter_context(evaluated(optimizer))
        others = self._averages.changed(variables.named()) if self._averages is not None else {}
        shown = [f"{name} ({type(one).__name__})" for name, one in others.items() if not any(one is e for e in known)]
        if known:
            return f"the averaged weights ({', '.join(type(ema).__name__ for ema in known)})"
        if by_optimizer:
            return "the averaged weights, those of the optimizer in eval mode"
        if not shown:
            return "the trained weights"
        logger.warning(
            "The script averages weights in %s; the capture is of the trained weights, not of that average. To trace "
            "the average, capture it on demand: dmin-trace capture --weights DIR -- SCRIPT ARGS.",
            ", ".join(shown),
        )
        return f"the trained weights, not their average in {', '.join(shown)}"

    def check(self, trainable: Trainable, out: Path) -> None:
        """Marks the trace at `out` if the weights are neither those that were captured nor those that were averaged.

        Reading all weights takes seconds for a large model: a second call does so only if they were written to.
        """
        versions = [(tensor._version, tensor.data_ptr()) for tensor in trainable.tensors]
        if self.moved or versions == self._versions:
            return
        self._versions = versions
        try:
            same = self._raw is not None and trainable.weights_fingerprint() == self._raw
            if same or trainable.equals_saved(store.weights_beside(out)):
                return
            self.moved = True
            store.mark_not_final(out)
        except (DminTraceError, OSError) as error:
            logger.warning("Whether %s is of the final weights could not be found out: %s", out, error)
            return
        logger.error(
            "The trace in %s is not of the final weights, and is marked so: the training moved them after they were "
            "captured. Capture on demand: dmin-trace capture --weights DIR -- SCRIPT ARGS.",
            out,
        )

    def _models(self) -> list[torch.nn.Module]:
        return [self._run.unwrap(model) for model in self._run.models]


def _averaged_weights(
    ema: Any, models: Sequence[torch.nn.Module], host: Host, step_pending: bool
) -> AbstractContextManager[None]:
    shapes = [shadow.shape for shadow in ema.shadow_params]
    for model in models:
        parameters = list(model.parameters())
        if [parameter.shape for parameter in parameters] == shapes:
            logger.info("The capture is of the averaged (EMA) weights, which the script saves.")
            return host.averaged_weights(ema, parameters, step_pending)
    raise CaptureError(
        "The script averages weights (EMA) that are not all the parameters of a prepared model, so which weights it "
        "will save is not known. Capture on demand from the saved weights: dmin-trace capture."
    )
