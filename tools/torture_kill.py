"""Kills captures at random moments, resumes them, and compares what they leave with an uninterrupted one.

python tools/torture_kill.py kill --times 100       one process, one capture
python tools/torture_kill.py ranks --times 20       two processes, one of them killed each time
python tools/torture_kill.py crash                  every state of the disk after a crash at any point of the writing

Each command ends with the figures as one line of JSON, and with exit code 1 if anything was not as it must be.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

from captures import Capture, check_same, content, done, kept, scribble, stamps, start_ranks  # noqa: E402
from crashes import crashes, go_on, record, wrong  # noqa: E402
from stores import make_header  # noqa: E402
from warm import Running, Warm  # noqa: E402

app = typer.Typer(pretty_exceptions_enable=False, no_args_is_help=True)

Times = Annotated[int, typer.Option(help="How often to kill.")]
Seed = Annotated[int, typer.Option(help="Of the moments.")]


@app.command("kill")
def kill_command(times: Times = 100, seed: Seed = 0) -> None:
    """One process, killed at moments of its start and of its first few chunks, half of the times each."""
    _torture(1, times, seed, chunks=6 * times + 10)


@app.command("ranks")
def ranks_command(times: Times = 20, seed: Seed = 0) -> None:
    """Two processes fill one store; one of the two is killed, and the other must end by itself, with one line."""
    _torture(2, times, seed, chunks=6 * times + 10)


@app.command("crash")
def crash_command(
    seeds: Annotated[int, typer.Option(help="Random states after each operation.")] = 5,
    samples: Annotated[int, typer.Option(help="Of the store; 4 in a chunk.")] = 22,
) -> None:
    """A crash after each operation of a store's writing, in every state that the disk may hold then."""
    began = time.monotonic()
    header = make_header(samples=samples)
    counts: dict[str, int] = {}
    finished = 0
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        folder = Path(name)
        disk = record(folder / "whole", header)
        expected = content(folder / "whole" / "trace.zarr")
        for point, mode, place in crashes(disk, folder, seeds):
            found = wrong(place, expected, disk.promised(point))
            _check(not found, f"after {point} operations, {mode}: {found}")
            counts[mode] = counts.get(mode, 0) + 1
            if sum(counts.values()) % 10 == 0:
                finished += 1
                go_on(place / "trace.zarr", header)
                _check(content(place / "trace.zarr") == expected, f"after {point} operations, {mode}: not as it was")
                _check([left.name for left in place.iterdir()] == ["trace.zarr"], f"{point}, {mode}: something is left")
    figures = {
        "chunks": header.chunks,
        "operations": len(disk.operations),
        "states": sum(counts.values()),
        **{f"states, {mode}": count for mode, count in counts.items()},
        "states that were gone on with": finished,
        "states that were wrong": 0,
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(figures))


def _torture(processes: int, times: int, seed: int, chunks: int) -> None:
    generator = random.Random(seed)
    began = time.monotonic()
    progressed, before_any, written, waits = 0, 0, 0, []
    with tempfile.TemporaryDirectory(prefix="torture-") as name, Warm(Path(name) / "said") as warm:
        capture = Capture(warm, Path(name) / "run", count=2 * chunks, rows=2)

        def start(out: Path) -> list[Running]:
            if processes > 1:
                return start_ranks(capture, out, processes)
            return [warm.start(capture.command(out), capture.folder, prelude=capture.prelude)]

        whole = Path(name) / "whole" / "trace.zarr"
        first, came = time.monotonic(), 0.0
        for running in (group := start(whole)):
            while not came and running is group[0]:
                came = time.monotonic() - first if done(whole) else 0.0
                time.sleep(0.005)
            _check(running.wait(1200) == 0, running.said())
        each = (time.monotonic() - first - came) / chunks
        store = Path(name) / "out0" / "trace.zarr"
        before: dict[str, tuple[int, int]] = {}
        marks = captures = 0

        def end() -> None:
            """Runs the capture to its end, and compares."""
            over = _is_complete(store)
            for running in start(store):
                # Killed after its last word, and before it had removed its lock: the next one is refused, and does so.
                _check(running.wait(1200) == over and ("is complete" in running.said()) == over, running.said())
            kept(before, stamps(store))
            check_same(store.parent, whole.parent)

        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("kills", total=times)
            for _ in range(times):
                group = start(store)
                # Processes that have not met yet wait for each other as long as torch has them.
                if processes == 1 and generator.random() < 0.5:
                    time.sleep(generator.uniform(0, came))
                else:
                    # From its first chunk on: a start takes longer than many chunks.
                    until = time.monotonic() + 20 * came
                    while len(done(store)) <= marks < chunks and time.monotonic() < until:
                        time.sleep(0.01)
                    time.sleep(generator.uniform(0, 3 * each))
                chosen = generator.randrange(processes)
                group[chosen].kill()
                _check(group[chosen].wait() in (-signal.SIGKILL, 0), group[chosen].said())
                for other in (running for running in group if running is not group[chosen]):
                    at = time.monotonic()
                    code = other.wait(300)
                    waits.append(time.monotonic() - at)
                    _check(code in (0, 1) and "Traceback" not in other.said(), other.said())
                after = stamps(store)
                kept(before, after)
                now = len(done(store))
                progressed += now > marks
                before_any += now == 0
                written += now - marks
                before, marks = after, now
                scribble(store, generator)
                progress.advance(task)
                if marks == chunks:
                    # The rest of the kills are for another capture.
                    end()
                    captures += 1
                    store, before, marks = Path(name) / f"out{captures}" / "trace.zarr", {}, 0
        if not captures or store.parent.exists():
            end()
            captures += 1
    figures = {
        "processes": processes,
        "kills": times,
        "seed": seed,
        "captures": captures,
        "chunks": chunks,
        "kills before the first chunk was done": before_any,
        "runs that finished a chunk or more before they were killed": progressed,
        "chunks done by killed runs": written,
        "done chunks written again": 0,
        "files that differ from an uninterrupted capture": 0,
        "files left over": 0,
        "seconds": round(time.monotonic() - began),
    }
    if waits:
        figures["seconds until the other process ended, at most"] = round(max(waits), 1)
    print(json.dumps(figures))


def _is_complete(store: Path) -> bool:
    """Whether the last run was over before it was killed."""
    metadata = store / "zarr.json"
    return metadata.is_file() and json.loads(metadata.read_text())["attributes"]["complete"] is True


def _check(right: bool, said: str) -> None:
    if not right:
        raise SystemExit(f"not as it must be:\n{said[-4000:]}")


if __name__ == "__main__":
    app()
