"""The command `dmin-trace`: all its commands, and what becomes of their errors."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dmin_trace.cli import audit, capture, evaluate, query, scores, store
from dmin_trace.cli.console import print_error
from dmin_trace.errors import DminTraceError, StoppedError
from dmin_trace.version import VERSION

app = typer.Typer(
    name="dmin-trace",
    help="Which training samples made the diffusion model make this image?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (capture.run, capture.capture, capture.estimate, query.query, scores.scores, audit.audit):
    app.command()(command)
for command in (store.index, store.info, store.verify, store.pack):
    app.command()(command)
app.add_typer(evaluate.app, name="evaluate")

DemoFolder = Annotated[Path, typer.Option(help="A folder for the model, the trace, the picture and the page.")]


@app.command()
def demo(out: DemoFolder = Path("dmin-trace-demo")) -> None:
    """Train on handwritten digits, generate some, and show which training digits influenced them. Takes minutes."""
    from dmin_trace.cli.demo import run_demo

    run_demo(out, Console())


def _print_version(value: bool) -> None:
    if value:
        print(f"dmin-trace {VERSION}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")]


@app.callback()
def _top(version: Version = False) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 1 for an error of dmin_trace, which is one red line, or 128 plus
    the signal that stopped a capture; 2 for a mistake in the options."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # The script's own command line stands after `--`; typer must not parse it.
    at = given.index("--") if "--" in given else len(given)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(args=given[:at], obj=given[at + 1 :], standalone_mode=False, prog_name="dmin-trace")
    except DminTraceError as error:
        print_error(error)
        return 128 + error.signal if isinstance(error, StoppedError) else 1
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        # typer's errors about the command line show themselves. Their class is not public.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            return int(error.exit_code)
        raise
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
