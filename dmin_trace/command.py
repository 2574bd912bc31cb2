"""The command line of a captured run: remembered, recalled; and what a launched run is for.

A query repeats the run that made a trace, with its data argument pointed at the query. The command line for it is kept
under the user's own state folder by the store's id. It is never taken from the store: a store may come from somebody
else, and running a command found in it would run their program.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from platformdirs import user_state_path

from dmin_trace.errors import TraceError


@dataclass(frozen=True)
class Command:
    """A script's command line.

    script: the script's path, absolute; "" where no script runs, as in a notebook.
    arguments: what follows it.
    folder: where it was started.
    """

    script: str
    arguments: tuple[str, ...]
    folder: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a launched run is for.

    mode: "final" captures at the end of training, "now" at the first batch, and then leaves the script; "estimate" does
        so with two samples, and writes nothing.
    command: the script's command line, to be remembered.
    settings: the settings that were given explicitly; they go before the script's own line.
    out: the store, or None for the script's own choice.
    weights: the weights to load before a capture "now".
    edited_script: go on with a store that was begun with another state of the script.
    like: a store, for a query: the capture must be of the same kind as that one.
    max_train_steps, num_epochs: when training ends, for scripts whose arguments do not say so.
    strict: an error in the capture ends the training.
    """

    mode: Literal["final", "now", "estimate"]
    command: Command
    settings: Mapping[str, Any]
    out: str | None = None
    weights: str | None = None
    like: str | None = None
    max_train_steps: int | None = None
    num_epochs: int | None = None
    strict: bool = False
    edited_script: bool = False

    def to_json(self) -> str:
        """The job as text, for a process of its own."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job that `to_json` wrote."""
        kept = json.loads(text)
        return cls(**{**kept, "command": _command(kept["command"])})


def current_command() -> Command:
    """The command line of this process; one without a script if `sys.argv[0]` is not the script that runs.

    In a notebook `sys.argv` is the kernel's: it must not be taken for a training script.
    """
    running = getattr(sys.modules["__main__"], "__file__", None)
    if running is None or Path(running).name != Path(sys.argv[0]).name:
        return Command("", (), str(Path.cwd()))
    return Command(str(Path(sys.argv[0]).resolve()), tuple(sys.argv[1:]), str(Path.cwd()))


def remember(store_id: str, command: Command) -> None:
    """Keeps the command line of a captured run for later queries, readable by this user alone."""
    path = _command_path(store_id)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(asdict(command)), encoding="utf-8")
    partial.chmod(0o600)
    partial.replace(path)


def recall(store_id: str) -> Command | None:
    """The remembered command line of the run that made a store, or None if this user did not make it here."""
    try:
        return _command(json.loads(_command_path(store_id).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _command(kept: Mapping[str, Any]) -> Command:
    return Command(str(kept["script"]), tuple(str(a) for a in kept["arguments"]), str(kept["folder"]))


def _command_path(store_id: str) -> Path:
    # The id comes from the store: as a file name it must not lead out of the folder.
    if not re.fullmatch(r"[0-9a-f]{32}", store_id):
        raise TraceError(f"The store's id {store_id[:40]!r} is not 32 hexadecimal digits.")
    return user_state_path("dmin_trace", appauthor=False) / "commands" / f"{store_id}.json"


@dataclass(frozen=True)
class Script:
    """A script by its file.

    name: the file's, without its folder; "" where it is not known.
    sha256: of its bytes, 64 hexadecimal digits; "" where it is not known.
    """

    name: str = ""
    sha256: str = ""


def script_of(path: str | Path) -> Script:
    """The script in a file; an unknown one where there is no such file, as in a notebook."""
    path = Path(path)
    try:
        return Script(path.name, hashlib.sha256(path.read_bytes()).hexdigest())
    except OSError:
        return Script()
