"""The transforms: the oracle is the sign of what plain autograd gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import digit_gradients, digits_model, slot_seed, unshuffled
from stores import change
from tiny import EXAMPLE, digit_folder, run, without_the_line

import dmin_trace
from dmin_trace.errors import QueryError, TraceError
from dmin_trace.project.backend_torch import signs_of
from dmin_trace.store import open_store

CLI = ("-m", "dmin_trace.cli.app")
TIMESTEPS = [0, 250, 999]
WHOLE = ("--timesteps", "0,250,999", "--dimension", str(2**20), "--projection", "uniform", "--dtype", "float32")
"""A sketch as long as the gradient, which is then the gradient itself."""
STEPS = 3


def example(path: Path) -> Path:
    """A copy of the example whose line takes signs and keeps whole gradients."""
    line = "dmin_trace.attach(accelerator, args, timesteps=5)"
    settings = f"timesteps={TIMESTEPS}, dimension=2**20, projection='uniform', dtype='float32', transform='sign'"
    text = EXAMPLE.read_text()
    if text.count(line) != 1:
        raise ValueError("the example has no such line")
    path.write_text(text.replace(line, f"dmin_trace.attach(accelerator, args, {settings})"))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four digits, a model trained on them for three steps, its last checkpoint and its trace."""
    folder = tmp_path_factory.mktemp("sign")
    digit_folder(folder / "digits", 4)
    script = example(folder / "train.py")
    steps = ("--max_train_steps", STEPS, "--checkpointing_steps", STEPS, "--learning_rate", "3e-3")
    run([script, "--train_data_dir", "digits", "--output_dir", "out", "--train_batch_size", 3, *steps], folder)
    return folder


def test_transform_in_a_capture_equals_an_independent_reference(trained: Path) -> None:
    trace = open_store(trained / "out.trace" / "trace.zarr")
    model = digits_model(trained / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert trace.header.transform == "sign"
    for sample, image in enumerate(sorted((trained / "digits").iterdir())):
        captured = torch.from_numpy(unshuffled(trace, sample)).double()
        assert np.allclose(captured.norm(dim=1), trace.norm[sample], rtol=1e-5)
        for slot, (loss, gradients) in enumerate(digit_gradients(model, image, TIMESTEPS)):
            assert trace.loss[sample, slot] == pytest.approx(loss, rel=1e-5)
            total = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
            at = 0
            for name, plain in gradients.items():
                found = captured[slot, at : at + plain.numel()].reshape(plain.shape)
                at += plain.numel()
                if name.endswith("to_k.bias"):
                    # A softmax does not see a constant: this gradient is zero but for rounding, which has any sign.
                    continue
                expected = plain.double().sign()
                # Where rounding decides on the sign both are right.
                noise = (found - expected).abs() > 0.5
                assert not noise.any() or plain[noise].abs().max() <= 1e-7 * total, (sample, slot, name)
                found = torch.where(noise, expected, found)
                assert (found - expected).norm() <= 1e-5 * expected.norm(), (sample, slot, name)
            assert at == trace.header.projection.length


def test_transform_is_the_same_on_demand_and_at_the_end(trained: Path) -> None:
    first = open_store(trained / "out.trace" / "trace.zarr")
    bare = without_the_line(EXAMPLE, trained / "bare.py")
    weights = ("--weights", f"out/checkpoint-{STEPS}")
    command = [*CLI, "capture", *weights, "--transform", "sign", *WHOLE, "--out", "demand.zarr", "--", bare]
    run([*command, "--train_data_dir", "digits", "--output_dir", "x"], trained)
    again = open_store(trained / "demand.zarr")
    assert again.header.transform == "sign"
    for sample in range(4):
        a, b = first.gradients(np.array([sample])), again.gradients(np.array([sample]))
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(a), sample
    assert np.allclose(first.norm, again.norm, rtol=1e-6)


def test_a_copied_training_image_finds_itself_first(trained: Path) -> None:
    folder = trained
    (folder / "copies").mkdir(exist_ok=True)
    for k in (1, 3):
        shutil.copy(folder / "digits" / f"000{k}.png", folder / "copies" / f"copy{k}.png")
    run([*CLI, "query", "--score", "dmin", "out.trace/trace.zarr", "copies", "-k", "2", "--json", "hits.json"], folder)
    queries = json.loads((folder / "hits.json").read_text())["queries"]
    for query, sample in zip(queries, (1, 3), strict=True):
        assert query["hits"][0]["sample"] == sample
        assert query["hits"][0]["score"] == pytest.approx(len(TIMESTEPS), abs=1e-4)
        assert query["hits"][1]["score"] < len(TIMESTEPS) - 0.1
    shown = run([*CLI, "info", "out.trace/trace.zarr"], folder).stdout
    assert "sign" in next(line for line in shown.splitlines() if "transform" in line)


def test_signs_of_keeps_what_is_not_finite() -> None:
    given = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -2.0, 1e-30])
    signs = signs_of(given)
    assert [*map(torch.isfinite, signs)] == [False, False, False, True, True, True]
    assert signs[3:].tolist() == [0, -1, 1]
    assert given[4] == -2


POINTS = torch.randn(6, 16, generator=torch.Generator().manual_seed(5))


class Denoiser(torch.nn.Module):
    """Guesses the noise in 16 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(17, 24)
        self.outer = torch.nn.Linear(24, 16)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        t = (timestep.reshape(-1, 1) / 1000).to(sample)
        return self.outer(torch.tanh(self.inner(torch.cat([sample, t.expand(len(sample), 1)], 1))))


def loss_of(model: torch.nn.Module, clean: torch.Tensor) -> torch.Tensor:
    noise = torch.randn_like(clean)
    t = torch.randint(0, 1000, (len(clean),))
    return (model(clean + noise * (t.reshape(-1, 1) / 1000).to(clean), t).float() - noise.float()).pow(2).mean()


def trained_denoiser(dtype: torch.dtype = torch.float32) -> tuple[Denoiser, torch.optim.AdamW]:
    torch.manual_seed(1)
    model = Denoiser().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    for _ in range(STEPS):
        (loss_of(model, POINTS.to(dtype)) * 16).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def record(model: torch.nn.Module, scaled: bool = False, stop: int | None = None, **settings: Any) -> Any:
    """The documented loop over the points, which may stop early."""
    like = {} if "like" in settings else {"timesteps": [100, 900], "dimension": 1024, "dtype": "float32"}
    scaler, dtype = torch.amp.GradScaler("cpu"), next(model.parameters()).dtype
    with dmin_trace.recording(model, samples=len(POINTS), **like, **settings) as recording:
        for i in recording.samples:
            if i == stop:
                raise KeyboardInterrupt
            for k in recording.timesteps:
                with recording.step(i, k):
                    loss = loss_of(model, POINTS[i : i + 1].to(dtype))
                    (scaler.scale(loss) if scaled else loss).backward()
    return recording


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["sign", "none"])
def test_transform_in_a_recording_for_every_dtype(tmp_path: Path, kind: str, dtype: torch.dtype, scaled: bool) -> None:
    model, optimizer = trained_denoiser(dtype)
    before = repr(optimizer.state_dict())
    record(model, scaled, out=tmp_path / "trace.zarr", optimizer=optimizer, projection="uniform", transform=kind)
    assert repr(optimizer.state_dict()) == before
    trace = open_store(tmp_path / "trace.zarr")
    scale = 1024.0 if scaled else 1.0
    for sample in range(len(POINTS)):
        found = torch.from_numpy(unshuffled(trace, sample))
        for slot, timestep in enumerate((100, 900)):
            torch.manual_seed(slot_seed(0, slot))
            clean = POINTS[sample : sample + 1].to(dtype)
            noise, t = torch.randn_like(clean), torch.tensor([timestep])
            predicted = model(clean + noise * (t.reshape(-1, 1) / 1000).to(clean), t)
            loss = (predicted.float() - noise.float()).pow(2).mean()
            gradients = torch.autograd.grad(loss * scale, list(model.parameters()))
            over = [g.double() / scale for g in gradients]
            expected = torch.cat([(g.sign() if kind == "sign" else g).flatten() for g in over])
            assert (found[slot] - expected).norm() <= 1e-5 * expected.norm()
            assert trace.norm[sample, slot] == pytest.approx(float(expected.norm()), rel=1e-5)


@pytest.mark.parametrize("kind", ["sign", "none"])
def test_transform_of_queries_is_that_of_the_trace(tmp_path: Path, kind: str) -> None:
    model, _ = trained_denoiser()
    record(model, out=tmp_path / "trace.zarr", transform=kind)
    queries = record(model, like=tmp_path / "trace.zarr").queries
    hits = dmin_trace.open_trace(tmp_path / "trace.zarr").top_k(queries, 2, "dmin").hits
    assert [row[0].sample for row in hits] == list(range(6))
    assert all(row[0].score == pytest.approx(2, abs=1e-5) and row[1].score < 1.999 for row in hits)


def test_transform_of_a_continued_recording_must_be_the_same(tmp_path: Path) -> None:
    model, _ = trained_denoiser()
    record(model, out=tmp_path / "whole.zarr", transform="none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmin_trace.store.layout.CHUNK_BYTES", 2 * 2 * 1024 * 4)
        with pytest.raises(KeyboardInterrupt):
            record(model, stop=3, out=tmp_path / "trace.zarr", transform="none")
    with pytest.raises(
        TraceError, match="have draws 1 and transform none, those of this run draws 1 and transform sign"
    ):
        record(model, out=tmp_path / "trace.zarr")
    record(model, out=tmp_path / "trace.zarr", transform="none")
    whole, resumed = open_store(tmp_path / "whole.zarr"), open_store(tmp_path / "trace.zarr")
    assert resumed.header.chunks == 3
    assert np.array_equal(resumed.gradients(np.arange(6)), whole.gradients(np.arange(6)))


def test_transform_that_contradicts_the_settings_is_refused(tmp_path: Path) -> None:
    model, _ = trained_denoiser()
    path = tmp_path / "trace.zarr"
    record(model, out=path)
    before = (path / "zarr.json").read_text()
    for value in ("adam", "", None, 3):
        change(path, lambda facts, value=value: facts["attributes"].update(transform=value))  # type: ignore[misc]
        with pytest.raises(TraceError, match="its attribute transform is"):
            open_store(path)
        (path / "zarr.json").write_text(before)
    change(path, lambda facts: facts["attributes"].update(transform="none"))
    with pytest.raises(QueryError, match="draws 1 and transform sign, those of .* draws 1 and transform none"):
        record(model, like=path)
