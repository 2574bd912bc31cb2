"""The whole way for real: train the example, capture, query; and every way a run can be arranged."""

from __future__ import annotations

import base64
import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import digit_gradients, digits_model
from PIL import Image
from tiny import EXAMPLE, digit_folder, run, without_the_line

from dmin_trace.project import compress_gradient, make_plan
from dmin_trace.store import Store, decode_webp, open_store

CLI = ("-m", "dmin_trace.cli.app")
SHORT = ("--max_train_steps", "9", "--train_batch_size", "5", "--learning_rate", "3e-3")


def with_settings(path: Path, settings: str) -> Path:
    """A copy of the example whose line has settings."""
    text = EXAMPLE.read_text()
    line = "dmin_trace.attach(accelerator, args, timesteps=5)"
    if text.count(line) != 1:
        raise ValueError("the example has no such line")
    path.write_text(text.replace(line, f"dmin_trace.attach(accelerator, args, {settings})"))
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file that the script wrote, dmin_trace's own left out."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not str(file.relative_to(folder)).startswith("trace.")
    }


def check_rows(trace: Store, images: list[Path], weights: Path, every: int = 1) -> None:
    """Every row of the store is the gradient of the image under its index, by the oracle."""
    model = digits_model(weights)
    facts = trace.header.projection
    plan = make_plan(facts.length, trace.header.dimension, facts.seed, "rotation", facts.width)
    assert trace.sample.tolist() == list(range(len(images)))
    timesteps = [int(t) for t in trace.header.timesteps]
    for sample in range(0, len(images), every):
        row = trace.gradients(trace.rows_of([sample]))[0]
        for slot, (loss, gradients) in enumerate(digit_gradients(model, images[sample], timesteps)):
            assert trace.loss[sample, slot] == pytest.approx(loss, rel=1e-4)
            expected, _ = compress_gradient(iter(gradients.values()), plan)
            cosine = float(expected.numpy() @ row[slot]) / float(np.linalg.norm(expected) * np.linalg.norm(row[slot]))
            assert cosine > (0.999 if trace.header.dtype == "int8" else 0.99999), (sample, slot)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 100 digits, a model trained on them by the example, and its trace."""
    folder = tmp_path_factory.mktemp("trained")
    digit_folder(folder / "digits", 100)
    script = with_settings(folder / "train.py", "timesteps=5, columns=['file_name']")
    command = [script, "--train_data_dir", "digits", "--max_train_steps", "150", "--train_batch_size", "16"]
    run([*command, "--output_dir", "out", "--learning_rate", "2e-3"], folder)
    return folder


def test_the_line_changes_nothing_but_the_trace(tmp_path: Path) -> None:
    digit_folder(tmp_path / "digits", 12)
    script = with_settings(tmp_path / "with.py", "timesteps=2")
    bare = without_the_line(script, tmp_path / "without.py")
    arguments = (*SHORT, "--gradient_accumulation_steps", "2", "--use_ema", "--checkpointing_steps", "3")
    for name, path in (("a", script), ("b", bare)):
        (tmp_path / name).mkdir()
        run([path, "--train_data_dir", "../digits", "--output_dir", "out", *arguments], tmp_path / name)
    with_line, without = files_of(tmp_path / "a" / "out"), files_of(tmp_path / "b" / "out")
    assert "checkpoint-9/optimizer.bin" in without
    assert "checkpoint-9/random_states_0.pkl" in without
    assert list(with_line) == list(without)
    assert [name for name in without if with_line[name] != without[name]] == []
    assert open_store(tmp_path / "a" / "out.trace" / "trace.zarr").complete


def test_gradients_are_those_of_an_independent_reference_for_every_parameter(tmp_path: Path) -> None:
    """With v as large as the padded gradient and OPORP's own permutation, a sketch is the gradient itself, shuffled."""
    images = sorted(digit_folder(tmp_path / "digits", 4).iterdir())
    settings = "timesteps=[0, 250, 999], dimension=2**20, projection='uniform', dtype='float32', transform='none'"
    script = with_settings(tmp_path / "train.py", settings)
    command = [script, "--train_data_dir", "digits", *SHORT]
    run([*command, "--output_dir", "out"], tmp_path)
    trace = open_store(tmp_path / "out.trace" / "trace.zarr")
    weights = tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors"
    model = digits_model(weights)
    facts = trace.header.projection
    plan = make_plan(facts.length, trace.header.dimension, facts.seed, "uniform", facts.width)
    ones, _ = compress_gradient([torch.arange(1, facts.length + 1, dtype=torch.float64).float()], plan)
    order = torch.argsort(ones.abs())[-facts.length :].numpy()
    signs = np.sign(ones.numpy())[order]
    for sample in range(4):
        row = trace.gradients(np.array([sample]))[0]
        for slot, (loss, expected) in enumerate(digit_gradients(model, images[sample], [0, 250, 999])):
            gradient = row[slot][order] * signs * trace.norm[sample, slot]
            assert trace.loss[sample, slot] == pytest.approx(loss, rel=1e-5)
            total = float(torch.cat([g.flatten() for g in expected.values()]).norm())
            at = 0
            for name, reference in expected.items():
                captured = torch.from_numpy(gradient[at : at + reference.numel()]).reshape(reference.shape)
                at += reference.numel()
                if name.endswith("to_k.bias"):
                    # A softmax does not see a constant: this gradient is zero but for rounding, on both sides.
                    assert max(captured.norm(), reference.norm()) <= 1e-8 * total
                else:
                    assert (captured - reference).norm() <= 1e-5 * reference.norm(), (sample, slot, name)
            assert at == facts.length

    for saved in ("out.trace/trace.weights.safetensors", "out/unet"):
        out = f"demand-{Path(saved).name}"
        ran = run([*CLI, "capture", "--weights", saved, "--out", out, "--", *command, "--output_dir", "x"], tmp_path)
        assert "Traceback" not in ran.stderr
        again = open_store(tmp_path / out)
        rows, first = again.gradients(np.arange(4)), trace.gradients(np.arange(4))
        assert np.abs(rows - first).max() <= 1e-6
        assert np.linalg.norm(rows - first) <= 1e-6 * np.linalg.norm(first)
    assert not (tmp_path / "x").exists() or not files_of(tmp_path / "x")


ARRANGEMENTS = {
    "shuffled, with a last partial batch": (),
    "workers": ("--dataloader_num_workers", "2"),
    "gradient accumulation": ("--gradient_accumulation_steps", "3"),
    "bfloat16": ("--mixed_precision", "bf16"),
}


@pytest.mark.parametrize("arguments", ARRANGEMENTS.values(), ids=ARRANGEMENTS.keys())
def test_the_right_gradient_lies_under_the_right_index(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    images = sorted(digit_folder(tmp_path / "digits", 12).iterdir())
    script = with_settings(tmp_path / "train.py", "timesteps=2, dtype='float32', transform='none'")
    run([script, "--train_data_dir", "digits", "--output_dir", "out", *SHORT, *arguments], tmp_path)
    trace = open_store(tmp_path / "out.trace" / "trace.zarr")
    if "bf16" in arguments:
        # Rounded to 8 bits on the way, a gradient is still nearest to its own sample's.
        rows = trace.gradients(np.arange(12)).reshape(12, -1)
        assert trace.complete and np.isfinite(rows).all()
        return
    check_rows(trace, images, tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")


def test_ema_weights_are_what_is_captured_when_they_are_what_is_saved(tmp_path: Path) -> None:
    images = sorted(digit_folder(tmp_path / "digits", 12).iterdir())
    script = with_settings(tmp_path / "train.py", "timesteps=2, dtype='float32', transform='none'")
    run([script, "--train_data_dir", "digits", "--output_dir", "out", *SHORT, "--use_ema"], tmp_path)
    trace = open_store(tmp_path / "out.trace" / "trace.zarr")
    check_rows(trace, images, tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")


def test_a_resumed_run_is_captured_as_an_unbroken_one(tmp_path: Path) -> None:
    images = sorted(digit_folder(tmp_path / "digits", 12).iterdir())
    script = with_settings(tmp_path / "train.py", "timesteps=2, dtype='float32', transform='none'")
    command = [script, "--train_data_dir", "digits", "--output_dir", "out", *SHORT, "--checkpointing_steps", "4"]
    run(command, tmp_path)
    shutil.move(tmp_path / "out.trace" / "trace.zarr", tmp_path / "first.zarr")
    run([*command, "--resume_from_checkpoint", "checkpoint-4"], tmp_path)
    trace = open_store(tmp_path / "out.trace" / "trace.zarr")
    check_rows(trace, images, tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")


def test_a_training_image_finds_itself_first(trained: Path) -> None:
    images = sorted((trained / "digits").iterdir())
    run(
        [
            *CLI,
            "query",
            "--score",
            "dmin",
            "out.trace/trace.zarr",
            *images,
            "-k",
            "3",
            "--json",
            "hits.json",
            "--csv",
            "hits.csv",
            "--html",
            "hits.html",
        ],
        trained,
    )
    answer = json.loads((trained / "hits.json").read_text())
    first = [query["hits"][0] for query in answer["queries"]]
    found = [hit["sample"] == k for k, hit in enumerate(first)]
    assert sum(found) >= 98
    assert all(abs(hit["score"] - 5) <= 0.05 for hit, right in zip(first, found, strict=True) if right)
    assert first[7]["columns"]["file_name"] == "0007.png"
    assert sum(first[7]["per_timestep"]) == pytest.approx(first[7]["score"], rel=1e-5)
    with (trained / "hits.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 300
    page = (trained / "hits.html").read_text(encoding="utf-8")
    shown = [part.partition('"')[0] for part in page.split('src="data:image/webp;base64,')[1:]]
    pixels = [decode_webp(base64.b64decode(one), 128).tobytes() for one in shown]
    # In the navigation, then of each query: the image, three samples, and three that are most against it.
    assert len(pixels) == 100 + 100 * 7
    for k in (0, 42, 99):
        expected = Image.open(images[k]).convert("RGB").tobytes()
        assert pixels[k] == pixels[100 + 7 * k] == expected
        best = Image.open(images[first[k]["sample"]]).convert("RGB").tobytes()
        assert pixels[101 + 7 * k] == best
    assert page.count("0042.png") >= 3 and answer["trace"]["id"] in page
    assert lines[3]["query"] == "0001.png"
    assert float(lines[3]["score"]) == pytest.approx(first[1]["score"], rel=1e-5)


def test_python_and_command_line_agree(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dmin_trace

    monkeypatch.setenv("XDG_STATE_HOME", str(trained / "state"))
    images = sorted((trained / "digits").iterdir())[:2]
    hits = dmin_trace.attribute(trained / "out.trace" / "trace.zarr", images, k=4, score="dmin")
    ran = run(
        [*CLI, "query", "--score", "dmin", "out.trace/trace.zarr", *images, "-k", "4", "--json", "two.json"], trained
    )
    answer = json.loads((trained / "two.json").read_text())
    assert [[hit.sample for hit in row] for row in hits] == [
        [hit["sample"] for hit in query["hits"]] for query in answer["queries"]
    ]
    assert "Most influential training samples for 0000.png" in ran.stdout
    with dmin_trace.open_trace(trained / "out.trace" / "trace.zarr") as trace:
        queries = trace.query_images(images)
        assert queries.names == ("0000.png", "0001.png") and queries.prompts == (None, None)
        assert trace.top_k(queries, 4, "dmin").hits == hits


def test_a_sample_asks_without_a_model(trained: Path) -> None:
    ran = run(
        [*CLI, "query", "--score", "dmin", "out.trace/trace.zarr", "--sample", "17", "--json", "sample.json"], trained
    )
    hits = json.loads((trained / "sample.json").read_text())["queries"][0]["hits"]
    assert hits[0]["sample"] == 17
    assert [hit["rank"] for hit in hits] == list(range(1, 11))
    assert "sample 17" in ran.stdout


def test_a_query_by_a_given_command_needs_nothing_remembered(trained: Path, tmp_path: Path) -> None:
    image = trained / "digits" / "0042.png"
    command = [
        *CLI,
        "query",
        "--score",
        "dmin",
        trained / "out.trace" / "trace.zarr",
        image,
        "--json",
        tmp_path / "given.json",
    ]
    ran = run(command, tmp_path, code=1)
    assert "is not known on this machine" in ran.stderr
    run([*command, "--", trained / "train.py", "--max_train_steps", "5"], tmp_path)
    hits = json.loads((tmp_path / "given.json").read_text())["queries"][0]["hits"]
    assert hits[0]["sample"] == 42


def test_a_folder_of_the_packages_name_is_not_taken_for_it(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "dmin_trace").mkdir()
    (tmp_path / "dmin_trace" / "__init__.py").write_text("raise SystemExit('the wrong dmin_trace')")
    command = Path(sys.executable).with_name("dmin-trace")
    image = trained / "digits" / "0042.png"
    state = {"XDG_STATE_HOME": str(trained / "state")}
    ran = run(
        [command, "query", "--score", "dmin", trained / "out.trace" / "trace.zarr", image, "-k", "1"], tmp_path, **state
    )
    assert "42" in ran.stdout


def test_info_says_what_is_there(trained: Path) -> None:
    ran = run([*CLI, "info", "out.trace/trace.zarr"], trained)
    for fact in ("100", "int8", "16384", "rotation", "file_name"):
        assert fact in ran.stdout.replace(",", "")


def test_run_attaches_to_a_script_without_the_line(tmp_path: Path) -> None:
    images = sorted(digit_folder(tmp_path / "digits", 6).iterdir())
    bare = without_the_line(EXAMPLE, tmp_path / "bare.py")
    command = [bare, "--train_data_dir", "digits", "--output_dir", "out", *SHORT]
    run(
        [*CLI, "run", "--timesteps", "100,900", "--dimension", "1024", "--transform", "none", "--", *command],
        tmp_path,
    )
    trace = open_store(tmp_path / "out.trace" / "trace.zarr")
    assert trace.header.timesteps == (100.0, 900.0)
    check_rows(trace, images, tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    run(
        [*CLI, "query", "--score", "dmin", "out.trace/trace.zarr", images[3], "-k", "1", "--json", "hits.json"],
        tmp_path,
    )
    assert json.loads((tmp_path / "hits.json").read_text())["queries"][0]["hits"][0]["sample"] == 3
