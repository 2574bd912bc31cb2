"""Arguments and options that several commands share. Those for settings are derived from the fields of `Settings`."""

import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_origin, get_type_hints

import typer

from dmin_trace.cli.console import show_log
from dmin_trace.command import Command
from dmin_trace.errors import QueryError, ScriptError, SettingsError
from dmin_trace.settings import Settings, make_settings
from dmin_trace.start import given_command

if TYPE_CHECKING:
    from dmin_trace.query import Trace


def check_folder(path: Path | None) -> Path | None:
    """Refuses a file in a folder that does not exist, before anything runs."""
    if path is not None and not path.parent.is_dir():
        raise QueryError(f"There is no folder {path.parent} to write {path.name} to.")
    return path


def _check_parquet(path: Path | None) -> Path | None:
    """Refuses a Parquet file that cannot be written, before anything runs."""
    if check_folder(path) is not None:
        from dmin_trace.query.tables import import_extra

        import_extra("pyarrow", "parquet")
    return path


def beside(path: Path, what: str) -> Path:
    """The file for another part of a result: out.csv has out.groups.csv beside it."""
    return path.with_name(f"{path.stem}.{what}{path.suffix}")


def absolute(path: str) -> str:
    """A path for a script that may run in another folder."""
    return str(Path(path).absolute())


ASKING, OUTPUT, INDEX, EXPERT, SETTINGS = "Asking", "Output", "Scores and index", "Expert", "Settings"
"""The panels of a command's help."""
EXPERT_SETTINGS = ("projection", "transform", "draws", "rows", "seed", "codec")

TracePath = Annotated[Path, typer.Argument(help="The store.")]
ImagePaths = Annotated[
    list[Path] | None,
    typer.Argument(help="Images, folders (with prompts in metadata.jsonl, .csv or .parquet), or such a list."),
]
Samples = Annotated[
    list[int] | None,
    typer.Option("--sample", help="A training sample as query. May be repeated.", rich_help_panel=ASKING),
]
Conditioning = Annotated[
    list[Path] | None,
    typer.Option(
        help="What each image was made from (ControlNet, InstructPix2Pix), or one for all.", rich_help_panel=ASKING
    ),
]
TracedWeights = Annotated[
    Path | None, typer.Option(help="The traced weights. Default: the weights beside the store.", rich_help_panel=EXPERT)
]
Out = Annotated[
    str | None,
    typer.Option(parser=absolute, metavar="PATH", help="The store. Default: OUTPUT_DIR.trace/trace.zarr."),
]
JsonPath = Annotated[
    Path | None,
    typer.Option("--json", callback=check_folder, help="Also write the result as JSON.", rich_help_panel=OUTPUT),
]
CsvPath = Annotated[
    Path | None,
    typer.Option("--csv", callback=check_folder, help="Also write the result as CSV.", rich_help_panel=OUTPUT),
]
HtmlPath = Annotated[
    Path | None,
    typer.Option(
        "--html", callback=check_folder, help="Also write a page with pictures, for people.", rich_help_panel=OUTPUT
    ),
]
Concepts = Annotated[
    list[str] | None,
    typer.Option(
        "--concept",
        help="Words of the prompt: show what taught the model these. One for each image, or for all.",
        rich_help_panel=ASKING,
    ),
]
WithoutConcepts = Annotated[
    list[str] | None,
    typer.Option(
        "--without",
        help="The same by the whole prompt without the concept, such as --without 'a heart'.",
        rich_help_panel=ASKING,
    ),
]
ParquetPath = Annotated[
    Path | None,
    typer.Option(
        "--parquet", callback=_check_parquet, help="Also write the result as Parquet.", rich_help_panel=OUTPUT
    ),
]
ScoreName = Annotated[
    Literal["deflated", "dmin"],
    typer.Option(
        "--score",
        help="deflated: without what all samples share. dmin: the paper's; finds likeness more.",
        rich_help_panel=INDEX,
    ),
]
ShownImages = Annotated[
    Literal["auto", "always", "never"],
    typer.Option(
        "--images",
        help="Pictures in the table: where the terminal can show them, or in any. Not in a pipe.",
        rich_help_panel=OUTPUT,
    ),
]
Exact = Annotated[
    bool, typer.Option("--exact", help="Scan every sample, even if there is an index.", rich_help_panel=INDEX)
]
EditedScript = Annotated[
    bool,
    typer.Option(
        "--edited-script", help="The script was edited, but its loss and its data are the same.", rich_help_panel=EXPERT
    ),
]
AnyDevice = Annotated[
    bool,
    typer.Option(
        "--any-device",
        help="Accept another type of device than the trace's: scores are much lower.",
        rich_help_panel=EXPERT,
    ),
]
NoCache = Annotated[
    bool,
    typer.Option(
        "--no-cache", help="Run the script, even for queries that are known from before.", rich_help_panel=EXPERT
    ),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", callback=show_log, help="Show the whole log.", rich_help_panel=EXPERT)
]


def script_command(context: typer.Context) -> Command:
    """The script and its arguments, which stand after `--`. Raises ScriptError if there is none."""
    if not context.obj:
        line = f"dmin-trace {context.info_name} -- SCRIPT ARGS"
        raise ScriptError(f"No script was given. Write it after two dashes: {line}.")
    return given_command(context.obj)


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces the parameter `settings` of a command by one option for each field of `Settings`. The command receives a
    mapping of the settings that were given on the command line, already checked."""
    types = get_type_hints(Settings)
    options = {field.name: _settings_option(field, types[field.name]) for field in fields(Settings)}

    @wraps(command)
    def command_with_options(**arguments: Any) -> None:
        values: dict[str, Any] = {name: arguments.pop(name) for name in options}
        given = {name: value for name, value in values.items() if value not in (None, [])}
        make_settings(given)
        command(settings=given, **arguments)

    kept = [p for name, p in inspect.signature(command).parameters.items() if name != "settings"]
    signature = inspect.Signature([*kept, *options.values()], return_annotation=None)
    # typer reads both.
    command_with_options.__signature__ = signature  # type: ignore[attr-defined]
    command_with_options.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
    return command_with_options


def _settings_option(field: Field[Any], kind: Any) -> inspect.Parameter:
    """The option for one field. Its default is None, which means that it was not given."""
    name, text = f"--{field.name}", field.metadata["help"]
    if field.default is not None:
        text += f" Default: {field.default}."
    panel = EXPERT if field.name in EXPERT_SETTINGS else SETTINGS
    annotation: Any
    if kind in (int, int | None):
        annotation = Annotated[int | None, typer.Option(name, help=text, metavar="NUMBER", rich_help_panel=panel)]
    elif get_origin(kind) is Literal:
        annotation = Annotated[kind | None, typer.Option(name, help=text, rich_help_panel=panel)]
    elif field.name == "timesteps":
        option = typer.Option(name, help=text, parser=parse_timesteps, metavar="NUMBER|LIST", rich_help_panel=panel)
        annotation = Annotated[str | None, option]
    else:
        # One of several values: --column label --column caption.
        annotation = Annotated[
            list[str] | None, typer.Option(name.removesuffix("s"), help=text, metavar="NAME", rich_help_panel=panel)
        ]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def parse_timesteps(text: str) -> int | list[int]:
    """The value of --timesteps: a number of timesteps, or the timesteps with commas between them."""
    try:
        return [int(t) for t in text.split(",")] if "," in text else int(text)
    except ValueError:
        raise SettingsError(f"--timesteps is {text!r}; expected a number, or a list such as 100,500,900.") from None


def trace_facts(trace: "Trace") -> dict[str, object]:
    """What a JSON file says of the trace that it is about."""
    header = trace.store.header
    return {"id": header.id, "samples": header.samples, "weights": header.weights}
