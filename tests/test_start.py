"""How scripts are started: what stands after `--` is read, and jobs run in processes of their own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from dmin_trace.command import Command, Job
from dmin_trace.errors import ScriptError, StoppedError, WeightsError
from dmin_trace.start import REFUSAL_FILE, given_command, start_job, with_full_names, write_refusal

ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, which holds a package with a module."""
    (tmp_path / "trainer").mkdir()
    for name in ("__init__.py", "train.py", "__main__.py"):
        (tmp_path / "trainer" / name).write_text("raise RuntimeError('imported')" if name == "__init__.py" else "")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "launcher", "module", "script", "arguments"),
    [
        ("train.py --a 1", (), "", "train.py", ("--a", "1")),
        ("python train.py -m x", (), "", "train.py", ("-m", "x")),
        (f"{sys.executable} -m trainer.train --a", (), "trainer.train", "trainer/train.py", ("--a",)),
        ("/other/bin/python3.12 train.py", ("/other/bin/python3.12",), "", "train.py", ()),
        ("python -m trainer", (), "trainer", "trainer/__main__.py", ()),
        ("python -u -X dev train.py -u", (sys.executable, "-u", "-X", "dev"), "", "train.py", ("-u",)),
        (
            "accelerate launch --mixed_precision bf16 --num_processes=1 train.py --mixed_precision no",
            (*ACCELERATE, "--mixed_precision", "bf16", "--num_processes=1"),
            "",
            "train.py",
            ("--mixed_precision", "no"),
        ),
        ("accelerate-launch --cpu -m trainer.train", (*ACCELERATE, "--cpu"), "trainer.train", "trainer/train.py", ()),
        ("torchrun --nproc_per_node 2 train.py x", (*TORCHRUN, "--nproc_per_node", "2"), "", "train.py", ("x",)),
        ("python -m torch.distributed.run --standalone train.py", (*TORCHRUN, "--standalone"), "", "train.py", ()),
    ],
)
def test_what_stands_after_two_dashes_is_read_as_it_is_typed(
    package: Path, words: str, launcher: tuple[str, ...], module: str, script: str, arguments: tuple[str, ...]
) -> None:
    expected = Command(str(package / script), arguments, str(package), module=module, launcher=launcher)
    assert given_command(words.split()) == expected


@pytest.mark.parametrize("words", ["", "python", "python -c pass", "python -m", "accelerate launch", "torchrun --help"])
def test_a_command_without_a_script_is_refused(words: str) -> None:
    with pytest.raises(ScriptError, match="script"):
        given_command(words.split())


def test_a_module_that_is_not_there_is_refused() -> None:
    with pytest.raises(ScriptError, match=r"no module trainer\.gone in .*folder that holds trainer"):
        given_command(["python", "-m", "trainer.gone"])


def test_abbreviated_options_are_written_out_as_argparse_reads_them(package: Path) -> None:
    script = package / "train.py"
    script.write_text("add('--train_data_dir'); add(\"--train_batch_size\"); add('--output'); add('--output_dir')")
    given = ("--train_d", "a", "--train_b=3", "--output", "x", "--train=1", "--other", "--", "-t", "--output_=--tr")
    full = with_full_names(Command(str(script), given, str(package))).arguments
    assert full == (
        *("--train_data_dir", "a", "--train_batch_size=3", "--output", "x", "--train=1", "--other", "--", "-t"),
        "--output_dir=--tr",
    )


def test_a_refusal_reaches_whoever_started_the_job_whatever_is_printed(package: Path) -> None:
    (package / "train.py").write_text("print('Steps: 0%', end='')\nimport atexit; atexit.register(print, 'Steps: 5%')")
    job = Job(mode="now", command=Command(str(package / "train.py"), (), str(package)), settings={})
    with (package / "log").open("w+b") as log, pytest.raises(ScriptError, match="without making an accelerate"):
        start_job(job, package, log)
    assert "Steps: 5%" in (package / "log").read_text()


def test_a_script_that_ends_itself_gives_its_exit_code(package: Path) -> None:
    (package / "train.py").write_text("import os, sys; assert 'PYTHONSAFEPATH' not in os.environ; sys.exit(3)")
    command = Command(str(package / "train.py"), (), str(package), launcher=(sys.executable, "-X", "dev"))
    assert start_job(Job(mode="now", command=command, settings={}), package) == 3


def test_the_launch_variables_are_those_of_the_run_that_is_repeated(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_DEBUG_MODE", "true")
    show = "import os, sys; sys.exit(len([n for n in os.environ if n.startswith('ACCELERATE')]) * 10 + "
    (package / "train.py").write_text(f"{show} (os.environ['ACCELERATE_MIXED_PRECISION'] == 'bf16'))")
    command = Command(str(package / "train.py"), (), str(package), environment={"ACCELERATE_MIXED_PRECISION": "bf16"})
    with (package / "log").open("w+b") as log:
        assert start_job(Job(mode="now", command=command, settings={}), package, log) == 11
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "fp16"


def test_of_two_refusals_the_first_counts(package: Path) -> None:
    write_refusal(package, StoppedError("stopped", 15))
    write_refusal(package, WeightsError("other"))
    assert '"signal": 15' in (package / REFUSAL_FILE).read_text()
