"""The training comes first: whatever goes wrong in a capture at its end, the script ends as it would have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from captures import done, small_chunks
from loop_scripts import BREAK
from tiny import plain_script, without_the_line
from warm import Warm

from dmin_trace.cli.app import main
from dmin_trace.store import open_store

SETTINGS = "timesteps=3, dimension=64, transform='none'"
# A loop that breaks, whose last step is deferred until the capture is over: the most that there is to put back.
PARTS = {
    "attach": f"dmin_trace.attach(accelerator, args, {SETTINGS})",
    "accelerator": "accelerator = Accelerator(); args.max_train_steps = 5",
    # What the script's own step does on capture batches alone is in its environment.
    "imports": "import os, builtins\nimport dmin_trace",
    "body": BREAK.replace(
        "noise = torch.randn_like(clean)",
        "exec(os.environ.get('ON_CAPTURE', '')) if not model.training else None; noise = torch.randn_like(clean)",
    ).replace("accelerator.backward(loss)", "loss = loss * getattr(builtins, 'TIMES', 1); accelerator.backward(loss)"),
}
DATA = 'return {"point": self.points[index], "index": index'


# Whether a capture asks for the item, and not the training.
FETCHED = (
    "any(f.filename.endswith('dmin_trace/capture/accelerate/training_run.py') and f.name == 'fetch' "
    "for f in __import__('traceback').extract_stack())"
)


@pytest.fixture(scope="module")
def folder(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a script, and what it leaves without us in `without`, with an undisturbed capture in `whole`."""
    folder = tmp_path_factory.mktemp("training")
    script = plain_script(folder / "script.py", **PARTS)
    text = script.read_text()
    assert text.count(DATA) == 1
    script.write_text(text.replace(DATA, f"exec(os.environ.get('ON_ITEM', '')); {DATA}"))
    warm.run([without_the_line(script, folder / "bare.py"), "--output_dir", "without"], folder)
    assert warm.run([script, "--output_dir", "whole"], folder, prelude=small_chunks(2)) == ""
    check_files(folder, "whole")
    return folder


def check_files(folder: Path, name: str) -> None:
    """What the script wrote, byte for byte, and nothing else."""
    expected = sorted(path.name for path in (folder / "without").iterdir())
    assert expected == ["log.txt", "state.pt"]
    for file in expected:
        assert (folder / name / file).read_bytes() == (folder / "without" / file).read_bytes(), file
    assert {path.name for path in (folder / name).iterdir()} == set(expected)


def raising(error: str, where: str) -> str:
    """Python that has a function of dmin_trace raise."""
    home = where.rsplit(".", 1)[0]
    module = home if home.count(".") == 1 else home.rsplit(".", 1)[0]
    return f"import {module}\ndef fail(*given, **named): raise {error}\n{where} = fail\n"


# Has the disk refuse files of this kind.
SYNC = """
import os
real = os.fsync
def fsync(handle):
    if {part!r} in os.readlink(f"/proc/self/fd/{{handle}}"): raise OSError({number}, os.strerror({number}))
    real(handle)
os.fsync = fsync
"""
LATER = """
import dmin_trace.capture.recorder as r
compress, count = r.compress_gradient, []
def fail(*given, **named):
    count.append(1)
    if len(count) > 3 * 5: raise RuntimeError("the hook is broken")
    return compress(*given, **named)
r.compress_gradient = fail
"""
STOPS = {
    "raise in the hook": (
        raising("RuntimeError('the hook is broken')", "dmin_trace.capture.recorder.compress_gradient"),
        "broken",
    ),
    "no memory in the hook": (
        raising("MemoryError('no memory')", "dmin_trace.capture.recorder.take_gradient"),
        "no memory",
    ),
    "raise where the model is looked at": (
        raising("TypeError('no such')", "dmin_trace.capture.step.CaptureStep.see_call"),
        "no su",
    ),
    "raise where a random call is seen": (
        raising("TypeError('odd')", "dmin_trace.capture.random_calls.distribution_of"),
        "odd",
    ),
    "raise where variables are kept": (
        raising("ValueError('f')", "dmin_trace.capture.accelerate.capture_batches.LoopVariables"),
        "ValueError: f",
    ),
    "full disk for a chunk": (SYNC.format(part="/grad/c/2", number=28), "No space left on device"),
    "an error of the disk": (SYNC.format(part="/done/c/2", number=5), "Input/output error"),
    "full disk for the new store": (SYNC.format(part=".partial/", number=28), "No space left on device"),
    "full disk for the weights": (SYNC.format(part="safetensors.partial", number=28), "No space left on device"),
    "no permission": (
        raising("PermissionError(13, 'Permission denied')", "dmin_trace.store.writer.create_arrays"),
        "denied",
    ),
    "raise after some samples": (LATER, "the hook is broken"),
}


@pytest.mark.parametrize("name", STOPS)
def test_an_error_in_the_capture_changes_nothing_of_the_training(warm: Warm, folder: Path, name: str) -> None:
    prelude, words = STOPS[name]
    out = name.replace(" ", "-")
    said = warm.run([folder / "script.py", "--output_dir", out], folder, prelude=small_chunks(2) + prelude)
    assert words in said and said.count("dmin_trace could not capture this run; the training continues.") == 1
    assert len(said.strip().splitlines()) == 1, said
    # An error of ours is caught where it is, and not by what catches the script's own.
    assert "own code" not in said
    check_files(folder, out)
    chunks = {"full disk for a chunk": 2, "an error of the disk": 2, "raise after some samples": 2}.get(name)
    if chunks is None:
        return
    # The store is resumed on demand, by what the message says.
    assert f"dmin-trace capture --weights {folder / out}" in said
    assert done(folder / f"{out}.trace" / "trace.zarr") >= set(range(chunks))
    settings = ["--timesteps", "3", "--dimension", "64", "--transform", "none"]
    weights = folder / f"{out}.trace" / "trace.weights.safetensors"
    command = ["dmin-trace", "capture", "--weights", weights, *settings, "--", folder / "script.py"]
    warm.run([*command, "--output_dir", out], folder, prelude=small_chunks(2))
    check_files(folder, out)
    check_rows(folder, out)


def check_rows(folder: Path, out: str) -> None:
    found, whole = (open_store(folder / f"{name}.trace" / "trace.zarr") for name in (out, "whole"))
    assert np.array_equal(found.gradients(np.arange(10)), whole.gradients(np.arange(10)))
    assert np.array_equal(found.norm, whole.norm) and np.array_equal(found.loss, whole.loss)


def test_a_training_step_that_fails_on_a_capture_batch_changes_nothing_of_the_training(
    warm: Warm, folder: Path
) -> None:
    """An accelerator that is out of memory raises in the script's own code, within accumulate."""
    fail = "if batch['index'][0] == 3: raise MemoryError('out of memory')"
    said = warm.run([folder / "script.py", "--output_dir", "body"], folder, ON_CAPTURE=fail, prelude=small_chunks(2))
    assert "own code failed in the training step of sample 3, timestep 0: MemoryError: out of memory" in said
    assert len(said.strip().splitlines()) == 1
    check_files(folder, "body")
    assert done(folder / "body.trace" / "trace.zarr") == {0}


def test_strict_ends_the_training_instead(warm: Warm, folder: Path) -> None:
    script = folder / "strict.py"
    script.write_text((folder / "script.py").read_text().replace(SETTINGS, f"{SETTINGS}, strict=True"))
    prelude = small_chunks(2) + STOPS["full disk for a chunk"][0]
    said = warm.run([script, "--output_dir", "strict"], folder, 1, prelude)
    assert "No space left on device" in said and not (folder / "strict" / "state.pt").exists()


def test_a_signal_ends_the_capture_and_not_the_training(warm: Warm, folder: Path) -> None:
    signal = "import os\nif batch['index'][0] == 4 and once: once.clear(); os.kill(os.getpid(), 15)"
    prelude = small_chunks(4) + "import builtins; builtins.once = [1]\n"
    said = warm.run([folder / "script.py", "--output_dir", "signal"], folder, ON_CAPTURE=signal, prelude=prelude)
    assert "SIGTERM: the current chunk is finished first, 4 more samples" in said
    assert said.count("dmin_trace stopped capturing this run; the training continues.") == 1
    assert "8 of 10 samples are in" in said and "dmin-trace capture --weights" in said
    check_files(folder, "signal")


def test_by_the_command_line_a_signal_is_the_exit_code_of_a_training_that_was_saved(warm: Warm, folder: Path) -> None:
    signal = "import os\nif batch['index'][0] == 4 and once: once.clear(); os.kill(os.getpid(), 2)"
    prelude = small_chunks(4) + "import builtins; builtins.once = [1]\n"
    command = ["dmin-trace", "run", "--", folder / "script.py", "--output_dir", "run"]
    said = warm.run(command, folder, 130, prelude, ON_CAPTURE=signal)
    assert "Traceback" not in said and "8 of 10 samples are in" in said
    check_files(folder, "run")


def test_numbers_that_are_none_do_not_end_a_capture(
    warm: Warm, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = (
        "import builtins; builtins.TIMES = {1: float('nan'), 2: float('inf'), 3: 0.0, 4: 1e38 * 10}"
        ".get(int(batch['index'][0]), 1)"
    )
    said = warm.run([folder / "script.py", "--output_dir", "numbers"], folder, ON_CAPTURE=odd, prelude=small_chunks(2))
    assert said == ""
    check_files(folder, "numbers")
    trace = open_store(folder / "numbers.trace" / "trace.zarr")
    assert np.flatnonzero(~trace.valid).tolist() == [1, 2, 3, 4]
    assert main(["info", str(trace.path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "not finite 3 samples have a gradient with NaN or infinity; never ranked" in shown, shown
    assert "zero 1 samples have a gradient that is zero; never ranked" in shown


def test_samples_that_fail_to_load_are_listed_and_the_capture_goes_on(
    warm: Warm, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fail = f"if index in (0, 6, 9) and {FETCHED}: raise OSError('the file is torn')"
    said = warm.run([folder / "script.py", "--output_dir", "failed"], folder, ON_ITEM=fail, prelude=small_chunks(2))
    assert said.count("could not be loaded: OSError: the file is torn") == 3
    assert [f"Sample {number} could not be loaded" in said for number in (0, 6, 9)] == [True] * 3
    check_files(folder, "failed")
    trace, whole = open_store(folder / "failed.trace" / "trace.zarr"), open_store(folder / "whole.trace" / "trace.zarr")
    good = [1, 2, 3, 4, 5, 7, 8]
    assert trace.complete and np.flatnonzero(trace.valid).tolist() == good and trace.unranked.failed == (0, 6, 9)
    assert np.array_equal(trace.gradients(np.array(good)), whole.gradients(np.array(good)))
    assert np.isnan(trace.loss[[0, 6, 9]]).all() and not trace.gradients(np.array([0, 6, 9])).any()
    assert trace.column("caption")[5:8] == ["point 5", "", "point 7"]
    assert main(["info", str(trace.path)]) == 0
    assert "failed to load 3 samples: 0, 6, 9; never ranked" in " ".join(capsys.readouterr().out.split())


def test_a_data_set_most_of_which_fails_is_an_error_and_the_training_goes_on(warm: Warm, folder: Path) -> None:
    fail = f"if {FETCHED}: raise OSError('nothing is there')"
    said = warm.run([folder / "script.py", "--output_dir", "none"], folder, ON_ITEM=fail)
    assert "Sample 0 could not be loaded, nor could those that follow it: OSError: nothing is there" in said
    check_files(folder, "none")
