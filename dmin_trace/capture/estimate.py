"""What a whole capture would cost, estimated from a trial of two samples: time, disk and memory."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from rich.filesize import decimal

from dmin_trace.capture.recorder import Recorder
from dmin_trace.store import Header, bytes_of

FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class CaptureCost:
    """What a capture would cost, in seconds with one process, and in bytes.

    header: the header that its store would have.
    weights: the size of the file of trained weights beside the store.
    memory, gpu_memory: the peaks in the trial; without a GPU 0.
    """

    header: Header
    weights: int
    seconds_per_sample: float
    memory: int
    gpu_memory: int
    free_disk: int
    free_memory: int


def estimate_cost(recorder: Recorder, seconds_per_sample: float, folder: Path) -> CaptureCost:
    """Estimates the cost of a capture to `folder` from the recorder of a finished trial and its time per sample."""
    return CaptureCost(
        header=recorder.header(),
        weights=sum(tensor.numel() * tensor.element_size() for tensor in recorder.trainable.tensors),
        seconds_per_sample=seconds_per_sample,
        memory=_peak_memory(),
        gpu_memory=torch.cuda.max_memory_allocated(),
        free_disk=shutil.disk_usage(folder if folder.is_dir() else ".").free,
        free_memory=psutil.virtual_memory().available,
    )


def describe_cost(cost: CaptureCost) -> Sequence[tuple[str, str]]:
    """Returns the names and values of a cost for a person to read."""
    header, size = cost.header, bytes_of(cost.header)
    gradient = header.projection.length * FLOAT32_BYTES
    gradients = header.samples * len(header.timesteps) * gradient
    # One chunk is written while the next is recorded.
    waiting = min(2, header.chunks) * header.chunk_rows * header.sample_bytes
    several = header.draws > 1
    memory = f"{decimal(cost.memory + waiting)} at the peak, of which {decimal(waiting)} wait for the disk"
    mean = f", {decimal(gradient)} are the mean of the draws" if several else ""
    draws = f", {header.draws} draws each" if several else ""
    time = timedelta(seconds=max(1, round(cost.seconds_per_sample * header.samples)))
    store = f"{decimal(size)} for the store ({decimal(size // header.samples)} a sample)"
    times = f"{gradients / size:,.0f} times as much"
    rows = [
        ("samples x timesteps", f"{header.samples:,} x {len(header.timesteps)}{draws}"),
        ("trained parameters", f"{header.projection.length:,} in {len(header.parameters.names)} tensors"),
        ("time", f"{time} ({cost.seconds_per_sample:.3g} s a sample, one process)"),
        ("disk", f"{store}, {decimal(cost.weights)} for the weights"),
        ("uncompressed", f"{decimal(gradients)} would be the gradients as float32, {times}"),
        ("memory", memory + mean),
    ]
    if cost.gpu_memory:
        rows.append(("GPU memory", f"{decimal(cost.gpu_memory)} at the peak"))
    if cost.free_disk < size + cost.weights:
        rows.append(("but", f"only {decimal(cost.free_disk)} are free on the disk"))
    if cost.free_memory < waiting:
        rows.append(("but", f"only {decimal(cost.free_memory)} of memory are free"))
    return rows


def _peak_memory() -> int:
    """The largest memory that this process has had, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB.
    return peak if sys.platform == "darwin" else peak * 1024
