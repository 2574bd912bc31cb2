"""Everything that dmin_trace raises on purpose.

Each message says what was found, what was expected and what to do. The command line prints it as one red line and
exits with 1, or with 130 or 143 after a signal.
"""

import reprlib


class DminTraceError(Exception):
    """The base class of all errors that dmin_trace raises on purpose."""


class SettingsError(DminTraceError):
    """Raised for an invalid setting, when it is given, before anything runs."""


class AttachError(DminTraceError):
    """Raised if the training script does not have the structure that the loop driver needs."""


class CaptureError(DminTraceError):
    """Raised for a capture that would give wrong gradients, and so was stopped."""


class StoppedError(CaptureError):
    """Raised after Ctrl-C or SIGTERM, when the current chunk is written. `signal` is the signal's number."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class WeightsError(DminTraceError):
    """Raised for weights that are missing, damaged, or not those of the trace."""


class TraceError(DminTraceError):
    """Raised for a store that is missing, of another version, unfinished or damaged."""


class QueryError(DminTraceError):
    """Raised for a query that does not fit the trace."""


class ScriptError(DminTraceError):
    """Raised if the training script itself fails while it is driven."""


class EvaluationError(DminTraceError):
    """Raised for data from which a measure cannot be computed."""


def brief(value: object) -> str:
    """The repr of an untrusted value on one line, at most 120 characters long."""
    shortener = reprlib.Repr()
    shortener.maxlevel, shortener.maxlist, shortener.maxstring = 3, 12, 80
    text = shortener.repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def message_of(error: BaseException) -> str:
    """An error's message, with its type in front if it is not one of ours."""
    return str(error) if isinstance(error, DminTraceError) else f"{type(error).__name__}: {error}"
