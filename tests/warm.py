"""Processes that begin with torch and accelerate imported: forked from one that has done nothing else.

A capture of a tiny model takes a fraction of a second, and the imports before it seconds. With these a test can kill
a hundred captures, and its kills fall into the captures.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

_SERVER = """
import json, os, runpy, select, signal, sys
import numpy, torch, torch._dynamo, accelerate, zarr, safetensors.torch, rich.progress, filelock, tqdm.auto
import dmin_trace.capture.launch, dmin_trace.capture.recording, dmin_trace.cli.app, dmin_trace.query

def become(job):
    os.setpgid(0, 0)
    # A shell that starts the tests in the background has their Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(job["folder"])
    os.environ.update(job["environment"])
    for number, name in ((1, "out"), (2, "complaints")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    what, *rest = job["command"]
    exec(compile(job["prelude"], "prelude", "exec"), {"__name__": "prelude"})
    sys.argv = [what, *rest]
    if what == "dmin-trace":
        sys.exit(dmin_trace.cli.app.main(rest))
    sys.path[0] = os.path.dirname(what)
    runpy.run_path(what, run_name="__main__")

open_end = True
while open_end:
    ready = select.select([0], [], [], 0.01)[0]
    if ready:
        line = bytearray()
        while not line.endswith(b"\\n"):
            byte = os.read(0, 1)
            if not byte:
                open_end = False
                break
            line += byte
        if open_end:
            child = os.fork()
            if child == 0:
                become(json.loads(line))
                sys.exit(0)
            os.write(1, b"%d -1\\n" % child)
    try:
        child, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        continue
    if child:
        os.write(1, b"%d %d\\n" % (child, status))
"""


@dataclass
class Running:
    """A process that was started.

    number: its process id.
    out, complaints: the files that it prints and complains to.
    """

    warm: Warm
    number: int
    out: Path
    complaints: Path

    def kill(self, which: signal.Signals = signal.SIGKILL) -> None:
        """Sends it a signal, if it has not ended."""
        if self.number not in self.warm.ended:
            with suppress(ProcessLookupError):
                os.kill(self.number, which)

    def wait(self, seconds: float = 120) -> int:
        """Waits until it ends; gives its exit code, or the signal's number below zero."""
        until = time.monotonic() + seconds
        while self.number not in self.warm.ended:
            self.warm.listen(until - time.monotonic())
            if time.monotonic() > until and self.number not in self.warm.ended:
                self.kill()
                raise AssertionError(f"still running after {seconds} seconds\n{self.said()}")
        return os.waitstatus_to_exitcode(self.warm.ended[self.number])

    def said(self) -> str:
        """What it complained of so far."""
        return self.complaints.read_text(encoding="utf-8", errors="replace") if self.complaints.exists() else ""


class Warm:
    """Starts processes; as a context manager, ends with all of them."""

    def __init__(self, folder: Path) -> None:
        """What processes print is kept in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._count = 0
        self.ended: dict[int, int] = {}
        self._running: list[Running] = []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def __enter__(self) -> Warm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for running in self._running:
            running.kill()
            running.wait()
        self._server.communicate(timeout=60)

    def start(self, command: Sequence[Any], folder: Path, prelude: str = "", **environment: str) -> Running:
        """Starts a script, or `dmin-trace`, with arguments, after the lines of python in `prelude`."""
        self._count += 1
        out, complaints = (self._folder / f"{self._count:04d}.{name}" for name in ("out", "complaints"))
        job = {
            "command": [str(part) for part in command],
            "folder": str(folder),
            "prelude": prelude,
            "environment": {"XDG_STATE_HOME": str(folder / "state"), **environment},
            "out": str(out),
            "complaints": str(complaints),
        }
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(job).encode() + b"\n")
        self._server.stdin.flush()
        # Others may end meanwhile.
        number = None
        while number is None:
            number = self.listen(300)
        running = Running(self, number, out, complaints)
        self._running.append(running)
        return running

    def run(self, command: Sequence[Any], folder: Path, code: int = 0, prelude: str = "", **environment: str) -> str:
        """Starts one, waits for it, and gives what it complained of. Fails where it ends otherwise."""
        running = self.start(command, folder, prelude, **environment)
        ended = running.wait()
        if ended != code:
            raise AssertionError(f"exit code {ended}, expected {code}\n{running.said()[-4000:]}")
        return running.said()

    def listen(self, seconds: float) -> int | None:
        """Waits for the server's next word: gives a process that was started, or notes one that ended."""
        import select

        assert self._server.stdout is not None
        if not select.select([self._server.stdout], [], [], max(seconds, 0))[0]:
            return None
        line = bytearray()
        while not line.endswith(b"\n"):
            byte = os.read(self._server.stdout.fileno(), 1)
            if not byte:
                raise AssertionError("the process that starts the others has ended")
            line += byte
        number, status = map(int, line.split())
        if status == -1:
            return number
        self.ended[number] = status
        return None
