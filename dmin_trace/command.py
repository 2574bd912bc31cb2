"""The command line of a captured run, and the job that a launched run does.

A query repeats the run that made a trace, with its data argument pointed at the query. The command line for it is kept
in the user's own state folder, under the store's id. It is never taken from the store: a store may come from anyone,
and running a command found in it would run their program.
"""

import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import msgspec
from platformdirs import user_state_path

from dmin_trace.errors import TraceError

LAUNCH_VARIABLES = re.compile(r"(ACCELERATE|DIFFUSERS|XFORMERS|CUBLAS|TORCH_ALLOW_TF32|NVIDIA_TF32)_\w+")
"""Environment variables by which a launcher tells a script its precision, its device and its kernels."""
KERNELS = ("ipykernel_launcher.py", "colab_kernel_launcher.py")
"""Programs that run a notebook: to run one again is to run no script."""


class Command(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a script was started.

    script, arguments, folder: its absolute path ("" if no script runs), its arguments, and where it was started.
    module: the module's name, if it was started by `python -m`.
    launcher: what starts it in a process of its own, such as `accelerate launch` with options; empty for this process.
    environment: the launch variables of the run that is repeated; None for those that are set now.
    """

    script: str
    arguments: tuple[str, ...]
    folder: str
    module: str = ""
    launcher: tuple[str, ...] = ()
    environment: dict[str, str] | None = None


class Job(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a launched run does.

    mode: "final" captures at the end of training; "now" captures at the first batch and then leaves the script;
        "estimate" does so with two samples and writes nothing.
    command, settings: the script's command line; the settings given explicitly, which override those of its line.
    out, weights: the store, or None for the script's own choice; the weights to load before a capture "now".
    like, samples: a finished store, for a query, whose capture must be of the same kind; the number of its samples.
    differences: each query is the difference of two samples, which follow each other.
    max_train_steps, num_epochs: when training ends, for scripts whose arguments do not tell.
    strict: an error in the capture ends the training.
    edited_script: continue a store that was begun with another state of the script.
    any_device: queries may run on another type of device than the trace's.
    stages: a file to which a job for queries writes what it does, a line for each stage.
    """

    mode: Literal["final", "now", "estimate"]
    command: Command
    settings: dict[str, Any]
    out: str | None = None
    weights: str | None = None
    like: str | None = None
    samples: int | None = None
    differences: bool = False
    max_train_steps: int | None = None
    num_epochs: int | None = None
    strict: bool = False
    edited_script: bool = False
    any_device: bool = False
    stages: str | None = None

    def to_json(self) -> str:
        """The job as text, for another process."""
        # Unlike msgspec's encoder, json takes the surrogates by which python gives arguments that are not UTF-8.
        return json.dumps(msgspec.to_builtins(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The job that `to_json` wrote. Raises ValueError for other text."""
        return msgspec.convert(json.loads(text), type=cls)


def current_command() -> Command:
    """The command line of this process; without a script if `sys.argv[0]` is not what runs, as in a notebook."""
    main, name, folder = sys.modules["__main__"], Path(sys.argv[0]).name, str(Path.cwd())
    running = getattr(main, "__file__", None)
    if running is None or Path(running).name != name or name in KERNELS:
        return Command("", (), folder)
    spec = getattr(main, "__spec__", None)
    module = "" if spec is None else spec.name.removesuffix(".__main__")
    return Command(str(Path(sys.argv[0]).resolve()), tuple(sys.argv[1:]), folder, module=module)


def is_launch_variable(name: str) -> bool:
    return LAUNCH_VARIABLES.fullmatch(name) is not None


def launch_environment() -> dict[str, str]:
    """The launch variables of this process, which repeat what its launcher was told."""
    return {name: value for name, value in os.environ.items() if is_launch_variable(name)}


def remember(store_id: str, command: Command) -> None:
    """Keeps the command line of a captured run for later queries, readable by this user only.

    A query needs one process: the launch variables stand for the launcher.
    """
    command = msgspec.structs.replace(command, launcher=(), environment=launch_environment())
    path = _command_path(store_id)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(msgspec.to_builtins(command)), encoding="utf-8")
    partial.chmod(0o600)
    partial.replace(path)


def recall(store_id: str) -> Command | None:
    """The command line of the run that made a store; None if this user did not make it on this machine."""
    try:
        return msgspec.convert(json.loads(_command_path(store_id).read_text(encoding="utf-8")), type=Command)
    except (OSError, ValueError):
        return None


def _command_path(store_id: str) -> Path:
    # The id comes from the store: as a file name it must not lead out of the folder.
    if not re.fullmatch(r"[0-9a-f]{32}", store_id):
        raise TraceError(f"The store's id {store_id[:40]!r} is not 32 hexadecimal digits.")
    return user_state_path("dmin_trace", appauthor=False) / "commands" / f"{store_id}.json"


@dataclass(frozen=True)
class Script:
    """A script, identified by its file: the name without its folder, and the SHA-256 of its bytes; "" if not known."""

    name: str = ""
    sha256: str = ""


def script_of(path: str | Path) -> Script:
    """The script in a file; an unknown one if there is no such file, as in a notebook."""
    path = Path(path)
    try:
        return Script(path.name, hashlib.sha256(path.read_bytes()).hexdigest())
    except OSError:
        return Script()
