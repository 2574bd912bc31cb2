"""How a training script is started: read from what stands after `--`, and run in a process of its own.

People start scripts as `python train.py`, `python -m package.train`, `accelerate launch train.py` and `torchrun
train.py`, each with options of its own. A launcher is run as it was given, with a job of ours in place of the script.
"""

import json
import os
import re
import signal
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from typing import BinaryIO

import msgspec

from dmin_trace import errors
from dmin_trace.command import Command, Job, is_launch_variable
from dmin_trace.errors import DminTraceError, ScriptError, StoppedError

JOB_FILE, REFUSAL_FILE, COST_FILE = "job.json", "refusal.json", "cost.json"
STAGES_FILE, READ_FILE = "stages.jsonl", "read.json"
"""What a job and the process that started it exchange: never by printed text, which the script's own may hide."""
LOADING, GRADIENTS = "Loading the model", "Gradients"
"""The stages that a job for queries tells, after it was started."""
POLL_SECONDS = 0.1
"""How often the stages of a job are looked at."""
Tell = Callable[[str, int, int], None]
"""Called with the stage that a job is in, how much of it is done, and how much there is; 0 and 0 if that is unknown."""
_PYTHON = re.compile(r"python[\d.]*(\.exe)?")
_OPTION = re.compile(r"""["'](--[A-Za-z][\w-]*)["']""")
"""An option's name, as a script gives it to argparse."""
_PYTHON_VALUES = ("-W", "-X", "--check-hash-based-pycs")
"""Options of python with a value of their own."""


def given_command(words: Sequence[str]) -> Command:
    """The command that a user gave: SCRIPT ARGS, or the launcher in front of it.

    Raises ScriptError if no script is in it, or the launcher's options cannot be read.
    """
    folder = str(Path.cwd())
    launcher, module, (script, *arguments) = _split(list(words))
    if module:
        return Command(_module_file(script, folder), tuple(arguments), folder, module=script, launcher=tuple(launcher))
    return Command(str(Path(script).absolute()), tuple(arguments), folder, launcher=tuple(launcher))


def with_full_names(command: Command) -> Command:
    """The same command line with every abbreviated option written out, as argparse reads it (`--train_d`).

    The names are those that stand in the script, or in the files beside it: abbreviated is what begins one of them.
    """
    script, own = Path(command.script), set[str]()
    for file in (script, *sorted(script.parent.glob("*.py"))):
        try:
            own |= set(_OPTION.findall(file.read_text(encoding="utf-8", errors="replace")))
        except OSError:
            continue
        if own:
            break
    return msgspec.structs.replace(command, arguments=tuple(_full_name(word, own) for word in command.arguments))


def _full_name(word: str, options: set[str]) -> str:
    name, equals, value = word.partition("=")
    if not name.startswith("--") or name == "--" or name in options:
        return word
    found = [option for option in options if option.startswith(name)]
    return found[0] + equals + value if len(found) == 1 else word


def start_job(job: Job, folder: Path, log: BinaryIO | None = None, tell: Tell | None = None) -> int:
    """Runs a job in a process of its own, and returns the exit code; `folder` is for the files that they exchange.

    The job's output goes to `log`, or to the terminal. `tell` is called with each stage of a job with a log. Raises the
    error that the job refused or failed with.
    """
    if tell is not None:
        job = msgspec.structs.replace(job, stages=str(folder / STAGES_FILE))
    (folder / JOB_FILE).write_text(job.to_json(), encoding="utf-8")
    command = job.command
    launch = [*(command.launcher or [sys.executable]), "-m", "dmin_trace.capture.launch", str(folder / JOB_FILE)]
    environment = job_environment(command)
    # Otherwise a folder named dmin_trace in the working directory would be imported.
    environment["PYTHONSAFEPATH"] = "1"
    if log is None:
        with _signals_left_to_the_job(), subprocess.Popen(launch, env=environment, cwd=command.folder) as process:
            code = process.wait()
    else:
        # `datasets` would keep a copy of every query.
        environment["HF_DATASETS_CACHE"] = str(folder / "cache")
        nothing = subprocess.DEVNULL
        with subprocess.Popen(
            launch, stdin=nothing, stdout=log, stderr=log, env=environment, cwd=command.folder
        ) as process:
            try:
                code = _wait(process, folder / STAGES_FILE, tell)
            except BaseException:
                process.kill()
                raise
    if (folder / REFUSAL_FILE).is_file():
        raise _read_refusal(folder / REFUSAL_FILE)
    return code


def job_environment(command: Command) -> dict[str, str]:
    """The environment variables that a command is started with: those of this process, or of the run it repeats."""
    environment = dict(os.environ)
    if command.environment is not None:
        environment = {name: value for name, value in environment.items() if not is_launch_variable(name)}
        environment |= command.environment
    return environment


def tell_stage(job: Job, stage: str, done: int = 0, total: int = 0) -> None:
    """Tells the process that started a job for queries what the job does now; nothing for another job."""
    if job.stages is not None:
        with Path(job.stages).open("a", encoding="utf-8") as file:
            file.write(json.dumps([stage, done, total]) + "\n")


def _wait(process: subprocess.Popen[bytes], stages: Path, tell: Tell | None) -> int:
    """Waits until a job ends, and tells its stages meanwhile. Returns its exit code."""
    told = 0
    while True:
        try:
            code = process.wait(None if tell is None else POLL_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        if tell is not None and stages.is_file():
            # The last line may be half written.
            lines = stages.read_text(encoding="utf-8").split("\n")[:-1]
            for line in lines[told:]:
                tell(*json.loads(line))
            told = len(lines)
        if code is not None:
            return code


def write_refusal(folder: Path, error: DminTraceError) -> None:
    """Hands an error to the process that started the job. Of several processes the first one's counts."""
    told = {"error": type(error).__name__, "message": str(error), "signal": getattr(error, "signal", 0)}
    partial = folder / f".{REFUSAL_FILE}.{os.getpid()}"
    partial.write_text(json.dumps(told), encoding="utf-8")
    if not (folder / REFUSAL_FILE).exists():
        partial.replace(folder / REFUSAL_FILE)


def _read_refusal(path: Path) -> DminTraceError:
    told = json.loads(path.read_text(encoding="utf-8"))
    kind, message = getattr(errors, told["error"]), str(told["message"])
    return StoppedError(message, int(told["signal"])) if kind is StoppedError else kind(message)


def _split(words: list[str]) -> tuple[list[str], bool, list[str]]:
    """The launcher that runs a script in a process of its own, if any; whether it is a module; the script, and its
    arguments."""
    first, *rest = words or [""]
    name = Path(first).name
    if name == "accelerate" and rest[:1] == ["launch"]:
        return _split_launcher("accelerate.commands.launch", "accelerate launch", rest[1:])
    if name in ("accelerate-launch", "torchrun"):
        is_torch = name == "torchrun"
        return _split_launcher("torch.distributed.run" if is_torch else "accelerate.commands.launch", name, rest)
    if not _PYTHON.fullmatch(name):
        if not first:
            raise ScriptError("No script was given. Write it after two dashes: -- SCRIPT ARGS.")
        return [], False, words
    options: list[str] = []
    while rest and rest[0].startswith("-") and rest[0] not in ("-m", "-c", "-"):
        options += rest[: 2 if rest[0] in _PYTHON_VALUES else 1]
        rest = rest[2 if rest[0] in _PYTHON_VALUES else 1 :]
    module = rest[:1] == ["-m"]
    rest = rest[1:] if module else rest
    if not rest or rest[0] in ("-c", "-"):
        raise ScriptError(f"{' '.join(words)[:200]} runs no script. Write it after two dashes: -- {first} SCRIPT ARGS.")
    if module and rest[0] in ("accelerate.commands.launch", "torch.distributed.run", "torch.distributed.launch"):
        return _split_launcher(rest[0], f"{first} -m {rest[0]}", rest[1:])
    # A bare `python` is the one that runs dmin_trace, even where another is first on the path.
    python = first if Path(first).is_absolute() or len(Path(first).parts) > 1 else sys.executable
    return ([] if _is_this_python(python) and not options else [python, *options]), module, rest


def _split_launcher(module: str, shown: str, words: list[str]) -> tuple[list[str], bool, list[str]]:
    """The same for a launcher, whose own parser says where its options end."""
    parser: ArgumentParser
    if module == "accelerate.commands.launch":
        from accelerate.commands.launch import launch_command_parser

        parser = launch_command_parser()
    else:
        from torch.distributed.run import get_args_parser

        parser = get_args_parser()
    try:
        found = parser.parse_args(words)
    except SystemExit:
        found = None
    if found is None or not found.training_script or getattr(found, "no_python", False):
        raise ScriptError(
            f"No python script was found in {' '.join([shown, *words])[:200]}. Give it as it was started."
        )
    arguments = list(found.training_script_args)
    options = words[: len(words) - len(arguments) - 1]
    kept = [option for option in options if option not in ("-m", "--module")]
    # By this python, whatever the launcher on the path is of.
    return [sys.executable, "-m", module, *kept], bool(found.module), [found.training_script, *arguments]


def _is_this_python(path: str) -> bool:
    ours, theirs = Path(sys.executable), Path(path)
    return (ours.parent.resolve(), ours.resolve()) == (theirs.parent.resolve(), theirs.resolve())


def _module_file(name: str, folder: str) -> str:
    """The file of a module that `python -m` would run, found without importing its packages."""
    path: Sequence[str] | None = [folder, *sys.path]
    spec = None
    for part in (parts := name.split(".")):
        spec = None if path is None else PathFinder.find_spec(part, path)
        path = None if spec is None else spec.submodule_search_locations
    if path is not None:
        spec = PathFinder.find_spec("__main__", path)
    if spec is None or spec.origin is None:
        raise ScriptError(f"There is no module {name} in {folder}. Start from the folder that holds {parts[0]}.")
    return spec.origin


@contextmanager
def _signals_left_to_the_job() -> Iterator[None]:
    """While entered, Ctrl-C does nothing here: it reaches the job as well, which finishes its chunk and says so."""
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
