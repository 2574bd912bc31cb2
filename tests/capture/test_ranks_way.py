"""Several processes: every sample once, whatever the number of processes, and the same rows as in one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rank_scripts import GATHER
from tiny import plain_script, run
from tiny_pipelines import captioned_images, command_line, tiny_pipeline

from dmin_trace.store import open_store

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_text_to_image_lora.py"


def torchrun(processes: int, script: Path, *arguments: object) -> list[object]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    return [*launch, script, *arguments]


def check_same_rows(several: Path, one: Path, samples: int) -> None:
    """The rows of several processes are those of one, which captured the same weights; their order may differ."""
    found, expected = open_store(several), open_store(one)
    assert found.complete and found.header.weights == expected.header.weights
    order = np.argsort(found.sample)
    assert found.sample[order].tolist() == list(range(samples)) == expected.sample.tolist()
    a, b = found.gradients(order), expected.gradients(np.arange(samples))
    assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)
    assert np.allclose(found.norm[order], expected.norm, rtol=1e-5)
    for name in expected.header.columns:
        assert [found.column(name)[k] for k in order] == list(expected.column(name))


@pytest.mark.parametrize(("processes", "samples"), [(2, 7), (2, 10), (3, 7), (3, 10)])
def test_a_loop_that_gathers(tmp_path: Path, processes: int, samples: int) -> None:
    # A gather hangs unless every process runs as many loop bodies.
    script = plain_script(tmp_path / "script.py", body=GATHER)
    run(torchrun(processes, script, "--output_dir", "several", "--count", samples), tmp_path, ACCELERATE_USE_CPU="true")
    weights = tmp_path / "several.trace" / "trace.weights.safetensors"
    settings = (
        "--timesteps",
        "3",
        "--dimension",
        "64",
        "--dtype",
        "float32",
        "--transform",
        "none",
        "--out",
        "one.zarr",
    )
    bare = plain_script(tmp_path / "bare.py", body=GATHER, attach="")
    command_line(["capture", "--weights", weights, *settings, "--", bare, "--count", samples], tmp_path)
    check_same_rows(tmp_path / "several.trace" / "trace.zarr", tmp_path / "one.zarr", samples)


@pytest.mark.parametrize(("processes", "samples"), [(2, 7), (3, 10)])
def test_text_to_image(tmp_path: Path, processes: int, samples: int) -> None:
    tiny_pipeline(tmp_path / "sd")
    captioned_images(tmp_path / "images", samples, column="text")
    text = EXAMPLE.read_text()
    gathers = "accelerator.backward(loss)", "accelerator.gather(loss.repeat(2)); accelerator.backward(loss)"
    line = (
        "dmin_trace.attach(accelerator, args",
        "dmin_trace.attach(accelerator, args, timesteps=3, dtype='float32', transform='none'",
    )
    if text.count(gathers[0]) != 1 or text.count(line[0]) != 1:
        raise ValueError("the example has no such lines")
    script = tmp_path / "train.py"
    script.write_text(text.replace(*gathers).replace(*line))
    arguments = ["--pretrained_model_name_or_path", "sd", "--train_data_dir", "images", "--resolution", "32"]
    arguments += ["--rank", "2", "--train_batch_size", "2", "--max_train_steps", "3", "--learning_rate", "1e-2"]
    run(torchrun(processes, script, *arguments, "--output_dir", "several"), tmp_path, ACCELERATE_USE_CPU="true")
    weights = tmp_path / "several.trace" / "trace.weights.safetensors"
    command = ["--out", "one.zarr", "--", script, *arguments]
    settings = ("--timesteps", "3", "--dtype", "float32", "--transform", "none")
    command_line(["capture", "--weights", weights, *settings, *command], tmp_path)
    check_same_rows(tmp_path / "several.trace" / "trace.zarr", tmp_path / "one.zarr", samples)
