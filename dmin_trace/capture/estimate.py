"""What a whole capture would take, from a trial of two samples: time, disk and memory, before anyone commits to it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from datetime import timedelta

import torch
from rich.filesize import decimal

from dmin_trace.capture.accelerate.script_capture import ScriptCapture
from dmin_trace.store import bytes_of

NUMBER = 4
"""Bytes of a float32."""


def facts(trial: ScriptCapture) -> Sequence[tuple[str, str]]:
    """Names and values for a person to read.

    Args:
        trial: a finished capture of mode "estimate".
    """
    recorder = trial.recorder
    header = recorder.header()
    samples, timesteps = header.samples, len(header.timesteps)
    length = recorder.trainable.length
    stored = bytes_of(header)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in recorder.trainable.tensors)
    whole = samples * timesteps * length * NUMBER
    a_sample = decimal(stored // samples)
    # The rows of a chunk are gathered as float32 before they are written.
    waiting = header.chunk_rows * timesteps * header.dimension * NUMBER
    draws = header.draws
    # The trial had that gradient too.
    summed = f", {decimal(length * NUMBER)} are the mean of the draws" if draws > 1 else ""
    rows = [
        ("samples x timesteps", f"{samples:,} x {timesteps}" + (f", {draws} draws each" if draws > 1 else "")),
        ("trained parameters", f"{length:,} in {len(recorder.trainable.names)} tensors"),
        ("time", f"{_time(trial.seconds_a_sample * samples)} ({trial.seconds_a_sample:.3g} s a sample, one process)"),
        (
            "disk",
            f"{decimal(stored)} for the store ({a_sample} a sample), {decimal(weights)} for the weights",
        ),
        ("uncompressed", f"{decimal(whole)} would be the gradients as float32, {whole / stored:,.0f} times as much"),
        (
            "memory",
            f"{decimal(_peak_memory() + waiting)} at the peak, of which {decimal(waiting)} wait for the disk{summed}",
        ),
    ]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        rows.append(("GPU memory", f"{decimal(torch.cuda.max_memory_allocated())} at the peak"))
    free = shutil.disk_usage(trial.out.parent if trial.out and trial.out.parent.is_dir() else ".").free
    if free < stored + weights:
        rows.append(("but", f"only {decimal(free)} are free on the disk"))
    return rows


def _peak_memory() -> int:
    """The most bytes of memory that this process has had."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB.
    return peak if sys.platform == "darwin" else peak * 1024


def _time(seconds: float) -> str:
    return str(timedelta(seconds=max(1, round(seconds))))
