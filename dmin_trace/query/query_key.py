"""What decides the gradients of a query, as one fingerprint: its key in the cache.

Whatever may give other gradients, or have the run of the script refused, is in the key, or among the files whose marks
are kept with the gradients (`file_marks`). The trace's header is in it, with the fingerprints of the weights and of the
frozen models that the run was compared with.
"""

import hashlib
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from dmin_trace.command import Command, Script
from dmin_trace.query.file_marks import FileMark, package_versions
from dmin_trace.start import job_environment
from dmin_trace.store import Header, digest
from dmin_trace.version import VERSION

TERMINAL_VARIABLES = re.compile(
    r"_|PWD|OLDPWD|SHLVL|TERM\w*|COLORTERM|COLUMNS|LINES|DISPLAY|WAYLAND_DISPLAY|WINDOWID|WINDOWPATH|STY|TMUX\w*|PS\d|"
    r"SSH_\w+|GPG_\w+|DBUS_\w+|XDG_SESSION_\w+|XDG_VTNR|XDG_SEAT\w*|VTE_\w+|KITTY_\w+|ITERM_\w+|WT_\w+|WEZTERM_\w+|"
    r"ALACRITTY_\w+|GNOME_TERMINAL_\w+|KONSOLE_\w+|VSCODE_\w+|LC_TERMINAL\w*|LS_COLORS|LESS\w*|PAGER|NO_COLOR|"
    r"FORCE_COLOR|CLICOLOR\w*|JPY_\w+|SECURITYSESSIONID"
)
"""Environment variables that differ from one terminal to the next, and change no number."""


def run_key(header: Header, command: Command, script: Script, weights: Sequence[FileMark], *, any_device: bool) -> str:
    """The fingerprint of what all queries of a run share."""
    environment = job_environment(command)
    return digest(
        {
            "version": VERSION,
            "trace": header.to_attributes(),
            "weights": msgspec.to_builtins(list(weights)),
            "script": script.sha256,
            "command": msgspec.to_builtins(msgspec.structs.replace(command, environment=None)),
            "environment": {name: environment[name] for name in environment if not _is_terminals(name)},
            "packages": package_versions(),
            "machine": [platform.node(), platform.platform(), platform.python_version(), *_accelerators()],
            "any_device": any_device,
        }
    )


def query_key(run: str, image: Path, prompt: str | None, without: str | None, conditioning: Path | None) -> str:
    """The fingerprint of a query of a run; `image` and `conditioning` are the files that the script reads.

    Raises OSError if one cannot be read.
    """
    files: Mapping[str, object] = {
        "image": _content(image),
        "conditioning": None if conditioning is None else _content(conditioning),
    }
    return digest({"run": run, "prompt": prompt, "without": without, **files})


def _content(file: Path) -> list[str]:
    """The ending of a file's name, by which scripts tell images, and the SHA-256 of its bytes."""
    with file.open("rb") as opened:
        return [file.suffix.lower(), hashlib.file_digest(opened, "sha256").hexdigest()]


def _is_terminals(name: str) -> bool:
    return TERMINAL_VARIABLES.fullmatch(name) is not None


def _accelerators() -> list[str]:
    """The devices that the system shows, of which torch chooses one. It would take seconds to ask torch."""
    return sorted(file.name for pattern in ("nvidia[0-9]*", "kfd", "accel*") for file in Path("/dev").glob(pattern))
