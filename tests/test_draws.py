"""Draws: a gradient is the mean over several noises. The oracle is plain autograd, with noises drawn apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from oracle import digits_model, unshuffled
from PIL import Image
from stores import change
from tiny import EXAMPLE, digit_folder, plain_script, run, without_the_line
from tiny_pipelines import command_line

import dmin_trace
from dmin_trace.capture.pinning import pinned_timesteps
from dmin_trace.errors import CaptureError, QueryError, SettingsError, TraceError
from dmin_trace.settings import Settings
from dmin_trace.store import Store, open_store, pack_store

TIMESTEPS = [0, 250, 999]
WHOLE = ("--timesteps", "0,250,999", "--dimension", str(2**20), "--projection", "uniform", "--dtype", "float32")
WHOLE += ("--transform", "none")
"""A sketch as long as the gradient, which is then the gradient itself."""
SHORT = ("--train_data_dir", "digits", "--max_train_steps", "3", "--train_batch_size", "3", "--learning_rate", "3e-3")


def noise_seed(slot: int, draw: int) -> int:
    """The documented seed of a draw: numpy's SeedSequence of (seed, slot + 1), with the draw from the second one on."""
    entropy = [0, slot + 1] if draw == 0 else [0, slot + 1, draw]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def mean_gradient(
    loss_of: Callable[[torch.Generator], torch.Tensor], parameters: list[torch.nn.Parameter], slot: int, draws: int
) -> tuple[float, torch.Tensor]:
    """The mean over noises of the loss, and that of its gradient, flat.

    loss_of: gives the loss from a generator to draw noise with.
    """
    losses, total = [], torch.zeros((), dtype=torch.float64)
    for draw in range(draws):
        loss = loss_of(torch.Generator().manual_seed(noise_seed(slot, draw)))
        losses.append(loss.item())
        total = total + torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double()
    return float(np.mean(losses)), total / draws


# -- a UNet that is trained whole ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four digits, and a model trained on them for three steps with its trace, by a script's line."""
    folder = tmp_path_factory.mktemp("trained")
    digit_folder(folder / "digits", 4)
    settings = f"timesteps={TIMESTEPS}, dimension=2**20, projection='uniform', dtype='float32', transform='none'"
    line = "dmin_trace.attach(accelerator, args, "
    text = EXAMPLE.read_text()
    if text.count(f"{line}timesteps=5)") != 1:
        raise ValueError("the example has no such line")
    text = text.replace(f"{line}timesteps=5)", f"{line}{settings}, draws=3)")
    (folder / "train.py").write_text(text)
    run([folder / "train.py", *SHORT, "--output_dir", "out", "--checkpointing_steps", "3"], folder)
    return folder


def check_digits(trace: Store, folder: Path) -> None:
    model = digits_model(folder / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    for sample, image in enumerate(sorted((folder / "digits").iterdir())):
        clean = torch.from_numpy(np.asarray(Image.open(image).convert("L")) / np.float32(127.5) - 1)[None, None]
        captured = torch.from_numpy(unshuffled(trace, sample))
        for slot, timestep in enumerate(TIMESTEPS):

            def loss_of(
                generator: torch.Generator, clean: torch.Tensor = clean, timestep: int = timestep
            ) -> torch.Tensor:
                noise, t = torch.randn(clean.shape, generator=generator), torch.tensor([timestep])
                return (model(scheduler.add_noise(clean, noise, t), t).sample - noise).square().mean()

            loss, expected = mean_gradient(loss_of, list(model.parameters()), slot, trace.header.draws)
            assert trace.loss[sample, slot] == pytest.approx(loss, rel=1e-5)
            assert trace.norm[sample, slot] == pytest.approx(float(expected.norm()), rel=1e-5)
            assert (captured[slot] - expected).norm() <= 1e-5 * expected.norm(), (sample, slot)


def test_the_line_changes_nothing_but_the_trace(trained: Path) -> None:
    bare = without_the_line(trained / "train.py", trained / "bare.py")
    run([bare, *SHORT, "--output_dir", "without", "--checkpointing_steps", "3"], trained)
    written = sorted(path for path in (trained / "without").rglob("*") if path.is_file())
    assert any(path.name == "random_states_0.pkl" for path in written)
    for path in written:
        other = trained / "out" / path.relative_to(trained / "without")
        assert path.read_bytes() == other.read_bytes(), path


def test_gradients_are_those_of_an_independent_reference(trained: Path) -> None:
    trace = open_store(trained / "out.trace" / "trace.zarr")
    assert (trace.complete, trace.header.draws) == (True, 3)
    check_digits(trace, trained)


def test_on_demand_gradients_are_those_of_the_reference_too(trained: Path) -> None:
    options = [*WHOLE, "--draws", 3, "--weights", "out/unet", "--out", "demand.zarr"]
    command_line(["capture", *options, "--", trained / "train.py", *SHORT, "--output_dir", "x"], trained)
    trace = open_store(trained / "demand.zarr")
    assert trace.header.draws == 3
    first, again = (
        open_store(trained / "out.trace" / "trace.zarr").gradients(np.arange(4)),
        trace.gradients(np.arange(4)),
    )
    assert np.linalg.norm(again - first) <= 1e-6 * np.linalg.norm(first)


def test_the_command_line_shows_what_is_not_usual(trained: Path) -> None:
    shown, _ = command_line(["info", "out.trace/trace.zarr"], trained)
    assert any("draws" in line and "3 at each timestep" in line for line in shown.splitlines())
    command = ["--", trained / "train.py", *SHORT, "--output_dir", "x"]
    said, _ = command_line(["estimate", "--draws", "3", *command], trained)
    assert "4 x 3, 3 draws each" in said and "are the mean of the draws" in said


# -- a plain loop ----------------------------------------------------------------------------------------------------

POINTS = torch.randn(5, 16, generator=torch.Generator().manual_seed(5))


class Denoiser(torch.nn.Module):
    """Guesses the noise in 16 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(17, 24)
        self.outer = torch.nn.Linear(24, 16)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        t = (timestep.reshape(-1, 1) / 1000).to(sample)
        return self.outer(torch.tanh(self.inner(torch.cat([sample, t.expand(len(sample), 1)], 1))))


def denoiser() -> Denoiser:
    torch.manual_seed(1)
    return Denoiser()


Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From the noisy points, the timestep and the noise to the loss."""


def record(model: Any, step: Step | None = None, stop: int | None = None, **settings: Any) -> Any:
    """The documented loop over the points, which may stop early."""
    if "like" not in settings:
        settings = {
            "timesteps": [100, 900],
            "dimension": 1024,
            "dtype": "float32",
            "transform": "none",
            "projection": "uniform",
        } | settings

    def usual(noisy: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return (model(noisy, t) - noise).square().mean()

    with dmin_trace.recording(model, samples=len(POINTS), **settings) as recording:
        for i in recording.samples:
            if i == stop:
                raise KeyboardInterrupt
            for k in recording.timesteps:
                with recording.step(i, k):
                    noise, t = torch.randn(1, 16), torch.randint(0, 1000, (1,))
                    (step or usual)(POINTS[i : i + 1] + noise * t.reshape(-1, 1) / 1000, t, noise).backward()
    return recording


def check_points(path: Path, model: torch.nn.Module) -> None:
    """The gradients in a store are the means that plain autograd gives."""
    trace = open_store(path)
    for sample in range(len(POINTS)):
        for slot, timestep in enumerate((100, 900)):

            def loss_of(generator: torch.Generator, sample: int = sample, timestep: int = timestep) -> torch.Tensor:
                noise, t = torch.randn(1, 16, generator=generator), torch.tensor([timestep])
                return (model(POINTS[sample : sample + 1] + noise * t.reshape(-1, 1) / 1000, t) - noise).square().mean()

            _, expected = mean_gradient(loss_of, list(model.parameters()), slot, trace.header.draws)
            captured = torch.from_numpy(unshuffled(trace, trace.rows_of([sample])[0]))[slot]
            assert (captured - expected).norm() <= 1e-5 * expected.norm(), (sample, slot)


def test_two_processes_capture_what_one_does(tmp_path: Path) -> None:
    line = "dmin_trace.attach(accelerator, args, timesteps=[100, 900], dimension=1024, dtype='float32', "
    line += "transform='none', projection='uniform', draws=2)"
    script = plain_script(tmp_path / "script.py", attach=line)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run([*launch, script, "--output_dir", "several", "--count", "5"], tmp_path, ACCELERATE_USE_CPU="true")
    model = Denoiser().eval()
    saved = torch.load(tmp_path / "several" / "state.pt", weights_only=False)["model"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in saved.items()})
    trace = open_store(tmp_path / "several.trace" / "trace.zarr")
    assert sorted(trace.sample.tolist()) == list(range(5))
    check_points(trace.path, model)


def test_the_first_draw_is_that_of_one_draw() -> None:
    one, three = (pinned_timesteps(Settings(timesteps=4, seed=9, draws=draws)) for draws in (1, 3))
    assert three[::3] == one
    assert len({timestep.seed for timestep in three}) == 12
    assert [(timestep.number, timestep.draw) for timestep in three] == [(k, d) for k in range(4) for d in range(3)]


def test_tensors_that_autograd_shares_are_not_added_twice(tmp_path: Path) -> None:
    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (torch.nn.Parameter(torch.zeros(16)) for _ in range(2))
            self.c = torch.nn.Parameter(torch.zeros(()))

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return (sample[0] + self.a + self.b + self.c)[None]

    model = Shared()
    record(model, out=tmp_path / "trace.zarr", draws=4)
    check_points(tmp_path / "trace.zarr", model)


def test_the_mean_comes_before_the_sign(tmp_path: Path) -> None:
    model = denoiser()
    for name in ("none", "sign"):
        record(model, out=tmp_path / f"{name}.zarr", draws=3, transform=name)
    for sample in range(5):
        mean, signs = (
            torch.from_numpy(unshuffled(open_store(tmp_path / f"{name}.zarr"), sample)) for name in ("none", "sign")
        )
        assert (signs - mean.sign()).norm() <= 1e-4 * mean.sign().norm()


def test_a_random_branch_between_draws_is_refused(tmp_path: Path) -> None:
    model = denoiser()

    def step(noisy: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        if np.random.rand() < 0.5:
            noise = noise + 0.1 * torch.randn(1, 16)
        return (model(noisy, t) - noise).square().mean()

    with pytest.raises(CaptureError, match="In draw [1-7] of timestep [01] the script drew randn\\(1, 16\\)"):
        record(model, step, out=tmp_path / "trace.zarr", draws=8)


# -- kept, met again, refused ----------------------------------------------------------------------------------------


def interrupted(folder: Path, **settings: Any) -> Denoiser:
    """A store of which one chunk of three is done."""
    model = denoiser()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmin_trace.store.layout.CHUNK_BYTES", 2 * 2 * 1024 * 4)
        with pytest.raises(KeyboardInterrupt):
            record(model, stop=3, out=folder / "trace.zarr", **settings)
    return model


def test_a_recording_goes_on_with_the_same_draws_alone(tmp_path: Path) -> None:
    model = interrupted(tmp_path, draws=2)
    with pytest.raises(
        TraceError, match="have draws 2 and transform none, those of this run draws 1 and transform none"
    ):
        record(model, out=tmp_path / "trace.zarr")
    record(model, out=tmp_path / "trace.zarr", draws=2)
    check_points(tmp_path / "trace.zarr", model)
    queries = record(model, like=tmp_path / "trace.zarr").queries
    hits = dmin_trace.open_trace(tmp_path / "trace.zarr").top_k(queries, 2, "dmin").hits
    assert [row[0].sample for row in hits] == list(range(5))
    assert all(row[0].score == pytest.approx(2, abs=1e-5) for row in hits)
    with pytest.raises(SettingsError, match="draws was given with like"):
        record(model, like=tmp_path / "trace.zarr", draws=1)


def test_a_header_of_other_draws_is_refused(tmp_path: Path) -> None:
    model, path = denoiser(), tmp_path / "trace.zarr"
    record(model, out=path)
    before = (path / "zarr.json").read_text()
    for value in (0, True, 10**9, None):
        change(path, lambda facts, value=value: facts["attributes"].update(draws=value))  # type: ignore[misc]
        with pytest.raises(TraceError, match="its attribute draws is"):
            open_store(path)
        (path / "zarr.json").write_text(before)
    change(path, lambda facts: facts["attributes"].update(draws=2))
    with pytest.raises(QueryError, match="draws 1 and transform none, those of .* draws 2 and transform none"):
        record(model, like=path)


def test_the_width_of_a_store_is_gone_on_with_and_folded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"projection": "rotation", "dimension": 64}
    with monkeypatch.context() as patch:
        patch.setattr("dmin_trace.project.plan.MIN_ROW_WIDTH", 1024)
        model = interrupted(tmp_path, **settings)
    # Rows of a new plan are of 256 now.
    monkeypatch.setattr("dmin_trace.project.plan.MIN_ROW_WIDTH", 256)
    path = tmp_path / "trace.zarr"
    for other, shown in (
        ({"dimension": 2048}, "its dimension is 64"),
        ({"projection": "uniform"}, "its projection.fi"),
    ):
        with pytest.raises(TraceError, match=f"belongs to another capture: {shown}"):
            record(model, out=path, **settings | other)
    record(model, out=path, **settings)
    record(model, out=tmp_path / "new.zarr", **settings)
    pack_store(open_store(path), tmp_path / "folded.zarr", dimension=32)
    for name, width in (("trace", 1024), ("folded", 1024), ("new", 256)):
        assert open_store(tmp_path / f"{name}.zarr").header.projection.width == width
        queries = record(model, like=tmp_path / f"{name}.zarr").queries
        hits = dmin_trace.open_trace(tmp_path / f"{name}.zarr").top_k(queries, 1, "dmin").hits
        assert [row[0].sample for row in hits] == list(range(5))
        assert all(row[0].score == pytest.approx(2, abs=1e-5) for row in hits)


def test_a_width_that_a_store_cannot_have_is_refused(tmp_path: Path) -> None:
    model, path = denoiser(), tmp_path / "trace.zarr"
    record(model, out=path, projection="rotation", dimension=64)
    change(path, lambda facts: facts["attributes"]["projection"].update(width=2**40))
    with pytest.raises(SettingsError, match=f"width is {2**40}, which does not fit"):
        record(model, like=path)
    for width in (0, -1):
        change(path, lambda facts, width=width: facts["attributes"]["projection"].update(width=width))  # type: ignore[misc]
        with pytest.raises(TraceError, match=f"its attribute projection.width is {width}"):
            record(model, like=path)
