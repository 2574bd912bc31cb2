"""Everything dmin_trace raises on purpose.

    DminTraceError
      SettingsError      a setting that cannot be meant: found at birth, before anything runs
      AttachError        the training script does not have the shape that the loop driver needs
      CaptureError       a capture that would give wrong gradients, and so was stopped
        StoppedError     one that a signal ended, after the chunk in hand
      WeightsError       weights that are missing, damaged, or not those of the trace
      TraceError         a store that is missing, of another version, unfinished or damaged
      QueryError         a question that cannot be asked of this trace
      ScriptError        the training script itself failed while we drove it
      EvaluationError    a measure that cannot be taken of what was given

Each message says what was found, what was expected and what to do. The command line prints it as one red line and
exits with 1; with 130 or 143 for a signal.
"""

from __future__ import annotations

import reprlib


class DminTraceError(Exception):
    """The base of all errors that dmin_trace raises on purpose."""


class SettingsError(DminTraceError):
    """A setting that cannot be meant."""


class AttachError(DminTraceError):
    """The training script does not have the shape that the loop driver needs."""


class CaptureError(DminTraceError):
    """A capture that would give wrong gradients, and so was stopped."""


class StoppedError(CaptureError):
    """A capture that Ctrl-C or SIGTERM ended, after the chunk in hand.

    signal: the signal's number; a process that ends for it exits with 128 and this.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class WeightsError(DminTraceError):
    """Weights that are missing, damaged, or not those of the trace."""


class TraceError(DminTraceError):
    """A store that is missing, of another version, unfinished or damaged."""


class QueryError(DminTraceError):
    """A question that cannot be asked of this trace."""


class ScriptError(DminTraceError):
    """The training script itself failed while it was driven."""


class EvaluationError(DminTraceError):
    """A measure that cannot be taken of what was given."""


def brief(value: object) -> str:
    """A value from anybody on part of a line, however large or deep it is."""
    shortener = reprlib.Repr()
    shortener.maxlevel, shortener.maxlist, shortener.maxstring = 3, 12, 80
    text = shortener.repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
