"""What the checks of identity cost: `python tools/check_cost.py --help`.

`capture`: of a whole capture of the digits example, the share of each check. `start`: the fingerprint of a model of a
billion random parameters, beside one plain read of the same bytes. Machines are shared and differ: read the ratios.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

import dmin_trace
from dmin_trace.capture import recorder
from dmin_trace.capture.accelerate.attach import ScriptCapture
from dmin_trace.capture.accelerate.averages import Averages
from dmin_trace.capture.accelerate.capture_batches import CaptureBatches
from dmin_trace.capture.accelerate.driver import LoopDriver
from dmin_trace.capture.checks import RowChecks
from dmin_trace.capture.pictures import Pictures
from dmin_trace.capture.recorder import Turn
from dmin_trace.capture.thumbnails import SampleThumbnails
from dmin_trace.capture.used_models import UsedModels, fingerprint_on_device
from dmin_trace.capture.weights import Trainable
from dmin_trace.cli.app import main

app = typer.Typer(add_completion=False, no_args_is_help=True)
console = Console(width=110)
CHECKS: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("each step's random calls", RowChecks, ("check_step",)),
    ("each row: timesteps, norms, losses, taken to the processor", RowChecks, ("check_row", "check_again")),
    ("batches: shapes, and the first fetched again", RowChecks, ("check_batch",)),
    ("frozen models", UsedModels, ("_see",)),
    ("trained weights", Trainable, ("weights_fingerprint",)),
    ("the data set's content", recorder, ("data_fingerprint",)),
    ("the data set's files and repeats", Pictures, ("__init__", "leave_out_repeats")),
    ("the loop's form, before the deferral", LoopDriver, ("_why_unsuitable",)),
    ("thumbnails", SampleThumbnails, ("begin", "decide", "make", "_note")),
    ("averages of weights", Averages, ("__init__", "changed")),
    ("the weights at the end", ScriptCapture, ("check_final_weights",)),
)
"""What is timed: its name, and where its functions are."""


class Seconds:
    """Seconds that were spent in functions, by name; a function that calls another one counts without it."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._inner = [0.0]

    @contextlib.contextmanager
    def timing(self, name: str, owner: Any, function: str) -> Iterator[None]:
        """While entered, calls of a function are timed."""
        own: Callable[..., Any] = getattr(owner, function)

        @wraps(own)
        def timed(*args: Any, **named: Any) -> Any:
            began = time.perf_counter()
            self._inner.append(0.0)
            try:
                return own(*args, **named)
            finally:
                taken = time.perf_counter() - began
                self.spent[name] = self.spent.get(name, 0.0) + taken - self._inner.pop()
                self._inner[-1] += taken

        setattr(owner, function, timed)
        try:
            yield
        finally:
            setattr(owner, function, own)


@app.command("capture")
def capture_command(
    samples: Annotated[int, typer.Option(help="N.")] = 1000,
    timesteps: Annotated[int, typer.Option(help="T.")] = 5,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 1,
) -> None:
    """The share of each check, and of thumbnails, in a whole capture of the digits example."""
    torch.set_num_threads(threads)
    seconds, opened = Seconds(), list[tuple[float, bool]]()
    open_step = CaptureBatches.open_step

    def noted(self: CaptureBatches, turn: Turn) -> None:
        opened.append((time.perf_counter(), turn.stored))
        open_step(self, turn)

    examples = Path(dmin_trace.__file__).parent.parent / "examples"
    with tempfile.TemporaryDirectory() as made, contextlib.ExitStack() as undo:
        os.environ |= {"XDG_STATE_HOME": made, "TQDM_DISABLE": "1"}
        for name, owner, functions in CHECKS:
            for function in functions:
                undo.enter_context(seconds.timing(name, owner, function))
        undo.callback(setattr, CaptureBatches, "open_step", open_step)
        CaptureBatches.open_step = noted  # type: ignore[method-assign]
        command = ["run", "--timesteps", timesteps, "--", examples / "train_digits.py", "--output_dir", f"{made}/out"]
        command += ["--max_train_samples", samples, "--max_train_steps", 4]
        with contextlib.redirect_stdout(io.StringIO()):
            code = main([str(word) for word in command])
        ended = time.perf_counter()
    if code:
        raise SystemExit(code)
    began, stored = opened[0][0], next(moment for moment, is_stored in opened if is_stored)
    extra = sum(not is_stored for _, is_stored in opened)
    # The first step is that of a process that has computed no gradient yet, whichever step it is.
    warm_up = opened[1][0] - opened[0][0]
    rows = [(f"{extra} training steps before the first row, less the first, which warms up", stored - began - warm_up)]
    rows += seconds.spent.items()
    whole = ended - began
    table = Table("check", "s", "%", title=f"a capture of {samples:,} digits, T = {timesteps}: {whole:.1f} s")
    for name, taken in rows:
        table.add_row(name, f"{taken:.3f}", f"{100 * taken / whole:.3f}")
    total = sum(taken for _, taken in rows)
    table.add_row("all", f"{total:.3f}", f"{100 * total / whole:.2f}")
    console.print(table)


@app.command("start")
def start_command(
    parameters: Annotated[int, typer.Option(help="Random ones, in tensors of 16 million.")] = 10**9,
    turns: Annotated[int, typer.Option()] = 3,
) -> None:
    """The fingerprint of a frozen model, beside one plain read of its bytes: the fastest of some turns."""
    table = Table("dtype", "GB", "fingerprint, s", "of the processor, s", "plain read, s", "x read")
    table.title = f"{parameters:,} frozen parameters, one thread"
    torch.set_num_threads(1)
    for dtype in (torch.bfloat16, torch.float32):
        tensors = [torch.randn(2**24).to(dtype) for _ in range(max(1, parameters // 2**24))]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        found = []
        for _ in range(turns):
            began, used = time.perf_counter(), time.process_time()
            fingerprint_on_device(tensors)
            taken, used = time.perf_counter() - began, time.process_time() - used
            began = time.perf_counter()
            for tensor in tensors:
                np.bitwise_xor.reduce(tensor.view(torch.int64).numpy())
            found.append((taken, used, time.perf_counter() - began))
        taken, used, read = np.min(found, axis=0)
        shown = (str(dtype).removeprefix("torch."), f"{size / 1e9:.1f}")
        table.add_row(*shown, f"{taken:.2f}", f"{used:.2f}", f"{read:.2f}", f"{taken / read:.2f}")
        del tensors
    console.print(table)


if __name__ == "__main__":
    app()
