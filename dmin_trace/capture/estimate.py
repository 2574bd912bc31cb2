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
from dmin_trace.store import bytes_of

FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class CaptureCost:
    """What a capture would cost, in seconds with one process, and in bytes.

    samples, timesteps, draws: N, T and D.
    parameters, tensors: the number of trained elements, and of the tensors that hold them.
    store, weights: the sizes of the store, and of the file of trained weights beside it.
    gradients: the size that all gradients would have as float32, not projected.
    memory, waiting: the peak of the process's memory, and the part of it that holds rows before they are on disk.
    gpu_memory: the peak of the GPU memory; 0 without a GPU.
    """

    samples: int
    timesteps: int
    draws: int
    parameters: int
    tensors: int
    seconds_per_sample: float
    store: int
    weights: int
    gradients: int
    memory: int
    waiting: int
    gpu_memory: int
    free_disk: int
    free_memory: int


def estimate_cost(recorder: Recorder, seconds_per_sample: float, folder: Path) -> CaptureCost:
    """Estimates the cost of a capture to `folder` from the recorder of a finished trial and its time per sample."""
    header, trainable = recorder.header(), recorder.trainable
    # One chunk is written while the next is recorded.
    waiting = min(2, header.chunks) * header.chunk_rows * header.sample_bytes
    return CaptureCost(
        samples=header.samples,
        timesteps=len(header.timesteps),
        draws=header.draws,
        parameters=trainable.length,
        tensors=len(trainable.names),
        seconds_per_sample=seconds_per_sample,
        store=bytes_of(header),
        weights=sum(tensor.numel() * tensor.element_size() for tensor in trainable.tensors),
        gradients=header.samples * len(header.timesteps) * trainable.length * FLOAT32_BYTES,
        memory=_peak_memory() + waiting,
        waiting=waiting,
        gpu_memory=torch.cuda.max_memory_allocated(),
        free_disk=shutil.disk_usage(folder if folder.is_dir() else ".").free,
        free_memory=psutil.virtual_memory().available,
    )


def describe_cost(cost: CaptureCost) -> Sequence[tuple[str, str]]:
    """Returns the names and values of a cost for a person to read."""
    several = cost.draws > 1
    mean = f", {decimal(cost.parameters * FLOAT32_BYTES)} are the mean of the draws" if several else ""
    draws = f", {cost.draws} draws each" if several else ""
    time = timedelta(seconds=max(1, round(cost.seconds_per_sample * cost.samples)))
    store = f"{decimal(cost.store)} for the store ({decimal(cost.store // cost.samples)} a sample)"
    times = f"{cost.gradients / cost.store:,.0f} times as much"
    rows = [
        ("samples x timesteps", f"{cost.samples:,} x {cost.timesteps}{draws}"),
        ("trained parameters", f"{cost.parameters:,} in {cost.tensors} tensors"),
        ("time", f"{time} ({cost.seconds_per_sample:.3g} s a sample, one process)"),
        ("disk", f"{store}, {decimal(cost.weights)} for the weights"),
        ("uncompressed", f"{decimal(cost.gradients)} would be the gradients as float32, {times}"),
        ("memory", f"{decimal(cost.memory)} at the peak, of which {decimal(cost.waiting)} wait for the disk{mean}"),
    ]
    if cost.gpu_memory:
        rows.append(("GPU memory", f"{decimal(cost.gpu_memory)} at the peak"))
    if cost.free_disk < cost.store + cost.weights:
        rows.append(("but", f"only {decimal(cost.free_disk)} are free on the disk"))
    if cost.free_memory < cost.waiting:
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
