"""The long attacks on what keeps a trace right; CI runs short forms of them (tests/faults).

    python tools/torture.py --help

Each attack is a file of its own, torture_<name>.py, and a line here.
"""

from __future__ import annotations

import typer
from torture_fuzz import fuzz_command
from torture_kill import crash_command, kill_command, ranks_command
from torture_rot import rot_command

app = typer.Typer(add_completion=False, no_args_is_help=True)
app.command("fuzz")(fuzz_command)
app.command("rot")(rot_command)
app.command("kill")(kill_command)
app.command("ranks")(ranks_command)
app.command("crash")(crash_command)


@app.callback()
def _top() -> None:
    """Long attacks on captures, stores and readers."""


if __name__ == "__main__":
    app()
