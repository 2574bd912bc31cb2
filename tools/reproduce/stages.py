"""The folder of an experiment that is done stage by stage: what is done is kept, and not done again."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

console = Console()


@dataclass
class Work:
    """The folder of what is done, with the commit and the seconds (of the wall, of the processor) of each stage."""

    folder: Path
    log: dict[str, tuple[str, float, float]]

    @classmethod
    def enter(cls, folder: Path, plan: Mapping[str, Any]) -> Work:
        """Goes on with a folder, or begins one. A folder of another plan is refused.

        plan: all that the numbers depend on, but for the code.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path, told = folder / "plan.json", json.loads(json.dumps(plan))
        if path.exists() and (kept := json.loads(path.read_text(encoding="utf-8"))) != told:
            other = [name for name in told if kept.get(name) != told[name]]
            raise typer.BadParameter(
                f"{folder} was begun with another {', '.join(other)}. Give the options it was begun with, or another "
                "folder.",
                param_hint="--work",
            )
        _write(path, json.dumps(told, indent=1))
        log = folder / "log.json"
        return cls(folder, json.loads(log.read_text(encoding="utf-8")) if log.exists() else {})

    def stage(self, name: str, make: Callable[[Path], None]) -> Path:
        """The folder of a stage, which is made if it is not there.

        `make` fills a folder that gets its name when it is full, so that half a stage is never taken for one. What an
        interrupted run left in it is there again: a recording goes on from it, the rest writes over it.
        """
        done = self.folder / name
        if done.exists():
            return done
        unfinished = self.folder / f"{name}.unfinished"
        unfinished.mkdir(parents=True, exist_ok=True)
        wall, cpu = time.perf_counter(), time.process_time()
        make(unfinished)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.log[name] = (commit(), wall, cpu)
        _write(self.folder / "log.json", json.dumps(self.log, indent=1))
        unfinished.rename(done)
        console.print(f"{name}: {wall:.0f} s, {cpu:.0f} s of the processor")
        return done


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def commit() -> str:
    """Of this checkout, and whether anything in it differs from that."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", ":/dmin_trace", ":/tools")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + (" with changes" if changed else "")


def machine() -> str:
    """What it runs on."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft", "transformers"))
    return f"{torch.get_num_threads()} thread(s) of {cpu}, {libraries}"
