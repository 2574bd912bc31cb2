"""Rows are compared only if they were computed in the same precision, on the same device, with the same frozen models:
`RunChecks`."""

from dmin_trace.capture.conditions import DEVICE, conditions_before, conditions_in_steps, differing_condition
from dmin_trace.capture.dataset import CaptureSource
from dmin_trace.capture.used_models import differing_model
from dmin_trace.capture.weights import Trainable
from dmin_trace.errors import QueryError, TraceError, WeightsError
from dmin_trace.store import RunFacts, Store


class RunChecks:
    """How a run computes its rows, compared with how those of a trace were computed.

    facts: what is known of the run so far; its models are known after `finish`.
    """

    def __init__(self, trainable: Trainable, source: CaptureSource, like: Store | None) -> None:
        """`like` is the trace that the rows are queries of. Raises QueryError if the run differs from it."""
        self.facts = RunFacts(conditions=conditions_before(trainable.tensors, source.launch), models=())
        self._source, self._queries = source, like is not None
        # The trace whose rows these must be comparable with.
        self._same_as = like
        if like is not None and trainable.tensors:
            self._check(like)

    def continue_from(self, earlier: Store) -> None:
        """The capture continues a store. Raises TraceError if the run differs from the one that began it."""
        self._same_as = earlier
        self._check(earlier)

    def finish(self) -> None:
        """After the first row: takes over what its steps have shown, and compares that too.

        Raises QueryError or WeightsError for queries, TraceError for a capture that is continued.
        """
        models = self._source.models
        models.stop()
        conditions = self.facts.conditions | conditions_in_steps(models)
        self.facts = RunFacts(conditions=conditions, models=tuple(models.facts))
        if self._same_as is not None:
            self._check(self._same_as)

    def _check(self, trace: Store) -> None:
        """Models are compared if the run has any yet."""
        theirs, ours = trace.header.run, self.facts
        whose = "The query's run" if self._queries else "This run"
        any_device = self._queries and self._source.any_device
        if differs := differing_condition(theirs.conditions, ours.conditions, any_device=any_device):
            found = f"{whose} gives other rows than those in {trace.path}: {differs}"
            raise (QueryError if self._queries else TraceError)(found)
        # A fingerprint depends on the type of device that it was computed on.
        same_device = theirs.conditions.get(DEVICE) == ours.conditions.get(DEVICE)
        if ours.models and same_device and (model := differing_model(theirs.models, ours.models)) is not None:
            raise (WeightsError if self._queries else TraceError)(
                f"{whose} gives other rows than those in {trace.path}: the {model.numbers:,} numbers of {model.name} "
                f"({model.kind}) that do not train are not the same. Give the base model, the autoencoder and the text "
                "encoders that the traced run had, in the same precision."
            )
