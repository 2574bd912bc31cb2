"""What a whole capture would cost, estimated from a trial of two samples: time, disk and memory."""

import shutil
import sys
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from rich.filesize import decimal

from dmin_trace.capture.recorder import Recorder
from dmin_trace.store import Header, bytes_of, max_thumbnails_bytes


def estimate_cost(recorder: Recorder, folder: Path) -> list[tuple[str, str]]:
    """Returns what a capture to `folder` would cost, for a person to read; `recorder` is that of a finished trial."""
    *_, warm, last = recorder.row_ends
    return describe_cost(
        recorder.header(),
        weights=sum(tensor.numel() * tensor.element_size() for tensor in recorder.trainable.tensors),
        # All timesteps of the last sample: the first one warms up.
        seconds_per_sample=last - warm,
        memory=_peak_memory(),
        gpu_memory=torch.cuda.max_memory_allocated(),
        free_disk=shutil.disk_usage(next(f for f in (folder, *folder.absolute().parents) if f.is_dir())).free,
        free_memory=psutil.virtual_memory().available,
    )


def describe_cost(
    header: Header,
    *,
    weights: int,
    seconds_per_sample: float,
    memory: int,
    gpu_memory: int,
    free_disk: int,
    free_memory: int,
) -> list[tuple[str, str]]:
    """Returns the names and values of a cost. It is given in bytes (the trial's peaks of memory) and seconds."""
    size, gradient = bytes_of(header), header.projection.length * torch.float32.itemsize
    thumbnails = max_thumbnails_bytes(header)
    gradients = header.samples * header.gradient_count * gradient
    # One chunk is written while the next is recorded.
    waiting = min(2, header.chunks) * header.chunk_rows * header.sample_bytes
    peak = f"{decimal(memory + waiting)} at the peak, of which {decimal(waiting)} wait for the disk"
    mean = f", {decimal(gradient)} are the mean of the draws" if header.draws > 1 else ""
    mean += "" if header.group_count is None else f", {decimal(gradient)} are the mean of the timesteps of a row"
    passes = f"{header.samples:,} x {len(header.timesteps)}"
    passes += f", {header.draws} draws each" if header.draws > 1 else ""
    rows = header.group_count
    passes += "" if rows is None else f", pooled into {rows} {'row' if rows == 1 else 'rows'} a sample"
    time = timedelta(seconds=max(1, round(seconds_per_sample * header.samples)))
    store = f"{decimal(size)} for the store ({decimal(size // header.samples)} a sample)"
    pictures = f", {decimal(thumbnails)} at most for the thumbnails" if thumbnails else ""
    times = f"{gradients / size:,.0f} times as much"
    cost = [
        ("samples x timesteps", passes),
        ("trained parameters", f"{header.projection.length:,} in {len(header.parameters.names)} tensors"),
        ("time", f"{time} ({seconds_per_sample:.3g} s a sample, one process)"),
        ("disk", f"{store}, {decimal(weights)} for the weights{pictures}"),
        ("uncompressed", f"{decimal(gradients)} would be the gradients as float32, {times}"),
        ("memory", peak + mean),
    ]
    if gpu_memory:
        cost.append(("GPU memory", f"{decimal(gpu_memory)} at the peak"))
    if free_disk < size + weights + thumbnails:
        cost.append(("but", f"only {decimal(free_disk)} are free on the disk"))
    if free_memory < waiting:
        cost.append(("but", f"only {decimal(free_memory)} of memory are free"))
    return cost


def _peak_memory() -> int:
    """The largest memory that this process has had, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB.
    return peak if sys.platform == "darwin" else peak * 1024
