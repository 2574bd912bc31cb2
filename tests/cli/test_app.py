"""`main`: mistakes are one clear line, exit code 1, and nothing touched; options are checked and completed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import BODY, EXAMPLE, digit_folder, plain_script, run, without_the_line

import dmin_trace
from dmin_trace.cli.app import main
from dmin_trace.store.metadata import set_finished

CLI = ("-m", "dmin_trace.cli.app")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 12 digits, a model trained on them, and its trace."""
    folder = tmp_path_factory.mktemp("made")
    digit_folder(folder / "digits", 12)
    bare = without_the_line(EXAMPLE, folder / "train.py")
    options = ("--timesteps", "2", "--dimension", "256", "--column", "file_name")
    command = [bare, "--train_data_dir", "digits", "--output_dir", "out", "--max_train_steps", "4"]
    run([*CLI, "run", *options, "--", *command], folder)
    Image.new("L", (16, 16)).save(folder / "large.png")
    (folder / "text.png").write_text("I am no image")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def changed_version(folder: Path) -> None:
    metadata = folder / "out.trace" / "trace.zarr" / "zarr.json"
    facts = json.loads(metadata.read_text())
    facts["attributes"]["version"] = 99
    metadata.write_text(json.dumps(facts))


def unfinished(folder: Path) -> None:
    set_finished(folder / "out.trace" / "trace.zarr", None)
    for done in (folder / "out.trace" / "trace.zarr" / "done" / "c").iterdir():
        done.unlink()


def other_weights(folder: Path) -> None:
    path = folder / "out.trace" / "trace.weights.safetensors"
    weights = load_file(path)
    weights["conv_in.weight"] = weights["conv_in.weight"] + 1e-3
    save_file(weights, folder / "other.safetensors")


def fewer_weights(folder: Path) -> None:
    weights = load_file(folder / "out.trace" / "trace.weights.safetensors")
    del weights["conv_in.weight"]
    save_file(weights, folder / "fewer.safetensors")


def overwriting_script(folder: Path) -> None:
    """The script writes a file that is there, by a name that no argument of it has."""
    script = folder / "train.py"
    marked = script.read_text().replace('clean = batch["input"]', 'open("text.png", "w"); clean = batch["input"]')
    script.write_text(marked)


def nothing(folder: Path) -> None:
    pass


MISTAKES: dict[str, tuple[Callable[[Path], None], tuple[str, ...], tuple[str, ...]]] = {
    "no such store": (nothing, ("query", "no.zarr", "digits/0001.png"), ("no.zarr",)),
    "info of no store": (nothing, ("info", "digits"), ("digits", "not")),
    "another version": (changed_version, ("query", "out.trace/trace.zarr", "digits/0001.png"), ("99", "expected")),
    "unfinished": (
        unfinished,
        ("query", "out.trace/trace.zarr", "digits/0001.png"),
        ("unfinished", "None of the trace's 12 samples"),
    ),
    "no image": (nothing, ("query", "out.trace/trace.zarr", "text.png"), ("text.png", "cannot be read as an image")),
    "no such image": (nothing, ("query", "out.trace/trace.zarr", "gone.png"), ("There is no image at gone.png",)),
    "another size": (nothing, ("query", "out.trace/trace.zarr", "large.png"), ("1x1x16x16", "1x1x8x8")),
    "other weights": (
        other_weights,
        ("query", "out.trace/trace.zarr", "digits/0001.png", "--weights", "other.safetensors"),
        ("not those of the trace", "fingerprint"),
    ),
    "fewer weights": (
        fewer_weights,
        ("query", "out.trace/trace.zarr", "digits/0001.png", "--weights", "fewer.safetensors"),
        ("lacks 1 of the", "conv_in.weight"),
    ),
    "no weights": (
        nothing,
        ("query", "out.trace/trace.zarr", "digits/0001.png", "--weights", "gone.safetensors"),
        ("There are no weights at",),
    ),
    "k is zero": (nothing, ("query", "out.trace/trace.zarr", "--sample", "1", "-k", "0"), ("0",)),
    "no such sample": (nothing, ("query", "out.trace/trace.zarr", "--sample", "12"), ("12",)),
    "no query": (nothing, ("query", "out.trace/trace.zarr"), ("Give images or prompts as queries",)),
    "a seed with an image": (
        nothing,
        ("query", "out.trace/trace.zarr", "digits/0001.png", "--seed", "3"),
        ("--seed is for images made from a prompt alone",),
    ),
    "a concept of a model without captions": (
        nothing,
        ("query", "out.trace/trace.zarr", "digits/0001.png", "--prompt", "a red digit", "--concept", "red"),
        ("trained without captions", "0001.png"),
    ),
    "a concept of a sample": (
        nothing,
        ("query", "out.trace/trace.zarr", "--sample", "1", "--without", "a digit"),
        ("--concept and --without are for images",),
    ),
    "a folder that is not there": (
        nothing,
        ("query", "out.trace/trace.zarr", "--sample", "1", "--json", "gone/hits.json"),
        ("There is no folder gone",),
    ),
    "no script": (nothing, ("run",), ("No script was given",)),
    "no such script": (nothing, ("run", "--", "gone.py"), ("There is no script at",)),
    "timesteps that are none": (nothing, ("run", "--timesteps", "many", "--", "train.py"), ("--timesteps is 'many'",)),
    "out exists on demand": (
        nothing,
        (
            *("capture", "--weights", "out.trace/trace.weights.safetensors", "--"),
            *("train.py", "--train_data_dir", "digits", "--output_dir", "out"),
        ),
        ("trace.zarr", "exists"),
    ),
    "an unwritable folder": (
        nothing,
        ("run", "--out", "/dev/null/trace.zarr", "--", "train.py", "--train_data_dir", "digits"),
        ("/dev/null",),
    ),
    "capture without weights that fit": (
        fewer_weights,
        (
            *("capture", "--weights", "fewer.safetensors", "--out", "new.zarr", "--"),
            *("train.py", "--train_data_dir", "digits"),
        ),
        ("lacks 1 of the",),
    ),
    "a script that overwrites a file": (
        overwriting_script,
        ("query", "out.trace/trace.zarr", "digits/0001.png", "--edited-script", "--", "train.py"),
        ("text.png", "was there before"),
    ),
    "the script fails": (
        nothing,
        ("query", "out.trace/trace.zarr", "digits/0001.png", "--", "train.py", "--log_nothing"),
        ("failed on the query with exit code 2", "log_nothing"),
    ),
}


@pytest.mark.parametrize(("prepare", "arguments", "messages"), MISTAKES.values(), ids=MISTAKES.keys())
def test_main_reports_a_mistake_in_one_line(
    made: Path,
    tmp_path: Path,
    prepare: Callable[[Path], None],
    arguments: tuple[str, ...],
    messages: tuple[str, ...],
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    prepare(folder)
    before = contents(folder)
    # The remembered command names the folder that the trace was made in, which is still there.
    ran = run([*CLI, *arguments], folder, code=1)
    assert "Traceback" not in ran.stderr + ran.stdout
    lines = [line for line in ran.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, ran.stderr
    for message in messages:
        assert message in lines[0]
    assert contents(folder) == before


PLAIN = {
    "no Accelerator": ({}, "print('nothing here')", "without making an accelerate.Accelerator"),
    "no backward": (
        {"body": BODY.replace("accelerator.backward(loss)", "loss.backward()")},
        None,
        "accelerator.backward",
    ),
    "timestep not pinned": (
        {
            "body": BODY.replace(
                "torch.randint(0, 1000, (len(clean),))", "torch.tensor([random.Random(5).randint(0, 999)] * len(clean))"
            )
        },
        None,
        "cannot be pinned",
    ),
    "no loader": (
        {"prepare": "model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)"},
        None,
        "never passed a DataLoader",
    ),
}


@pytest.mark.parametrize(("parts", "text", "message"), PLAIN.values(), ids=PLAIN.keys())
@pytest.mark.parametrize("way", ["run", "capture"])
def test_main_reports_a_script_that_cannot_be_captured(
    tmp_path: Path, way: str, parts: dict[str, str], text: str | None, message: str
) -> None:
    script = plain_script(tmp_path / "script.py", **{"imports": "", "attach": "", **parts})
    if text is not None:
        script.write_text(text)
    import torch

    values = torch.nn.Sequential(torch.nn.Linear(17, 24), torch.nn.Linear(24, 16)).state_dict()
    names = ("inner.weight", "inner.bias", "outer.weight", "outer.bias")
    save_file(dict(zip(names, values.values(), strict=True)), tmp_path / "weights.safetensors")
    options = ("--weights", "weights.safetensors") if way == "capture" else ()
    ran = run([*CLI, way, *options, "--", script], tmp_path, code=1)
    assert message in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "out.trace" / "trace.zarr").exists()
    assert (tmp_path / "out" / "state.pt").exists() == (way == "run" and text is None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--dtype", "int4", "--", "train.py"), "'int4' is not one of"),
        (("query", "out.zarr", "--score", "ridge", "--sample", "1"), "'ridge' is not one of"),
        (("evaluate", "labels", "out.zarr", "label", "-k", "five"), "Invalid value for '-k'"),
        (("evaluate", "labels", "out.zarr", "label", "--seed", "-1"), "Invalid value for '--seed'"),
        (("capture", "--", "train.py"), "Missing option '--weights'"),
    ],
)
def test_main_shows_the_usage_for_a_wrong_option(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(list(arguments)) == 2
    said = capsys.readouterr().err
    assert said.startswith("Usage: dmin-trace") and message in " ".join(said.split())


def test_python_m_dmin_trace_is_the_command_line(tmp_path: Path) -> None:
    ran = run(["-m", "dmin_trace", "--version"], tmp_path)
    assert ran.stdout == f"dmin-trace {dmin_trace.__version__}\n"


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("dmin-trace ve", "verify"),
        ("dmin-trace run --dtype flo", "float16"),
        ("dmin-trace capture --tim", "--timesteps"),
    ],
)
def test_main_completes_commands_options_and_choices(tmp_path: Path, words: str, completed: str) -> None:
    environment = {
        **os.environ,
        "_DMIN_TRACE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    command = [sys.executable, "-m", "dmin_trace"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert completed in ran.stdout.split(), ran.stderr
