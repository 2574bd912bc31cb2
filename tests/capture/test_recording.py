"""`recording`: right gradients, nothing disturbed, resumed, queried, and every mistake one clear error."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from oracle import digit_gradients, digits_model, digits_unet, unshuffled
from pages import DOCS, run_page
from PIL import Image
from points import POINTS, Denoiser, denoiser, loss_of, record
from safetensors.torch import load_file
from tiny import digit_folder, run
from torch.nn.functional import mse_loss

import dmin_trace
from dmin_trace.errors import CaptureError, DminTraceError, QueryError, SettingsError, TraceError, WeightsError
from dmin_trace.settings import Settings
from dmin_trace.store import Writer, open_store

CLI = ("-m", "dmin_trace.cli.app")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The page's code, run in a folder of its own."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(0)
        yield folder, run_page("plain_loops.md")


def test_on_the_page_a_copied_training_image_finds_itself_first(page: tuple[Path, dict[str, Any]]) -> None:
    folder, names = page
    hits = names["trace"].top_k(names["queried"], 3, "dmin").hits
    assert [row[0].sample for row in hits] == [7, 19]
    assert all(row[0].score == pytest.approx(5, abs=0.05) and row[1].score < 4.97 for row in hits)
    assert [row[0].columns["label"] for row in hits] == [7, 9]
    trace = open_store(folder / "out" / "trace.zarr")
    assert trace.complete and trace.header.timesteps == (100, 300, 500, 700, 900)
    assert list(trace.column("label")) == names["digits"].target[:48].tolist()
    assert open_store(folder / "out" / "asked.zarr").header.timesteps == (100, 500, 900)


def test_the_command_line_reads_a_recorded_trace_and_names_query_loss(page: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = page
    ran = run([*CLI, "query", "--score", "dmin", "out/trace.zarr", "--sample", "17", "-k", "1"], folder)
    assert "17" in ran.stdout
    assert "48" in run([*CLI, "info", "out/trace.zarr"], folder).stdout
    Image.new("L", (8, 8)).save(folder / "image.png")
    ran = run([*CLI, "query", "--score", "dmin", "out/trace.zarr", "image.png"], folder, code=1)
    assert "Trace.query_loss(model, items, loss)" in ran.stderr and "Traceback" not in ran.stderr


def test_gradients_are_those_of_an_independent_reference_for_every_parameter(tmp_path: Path) -> None:
    files = sorted(digit_folder(tmp_path / "digits", 3).iterdir())
    images = torch.stack(
        [torch.from_numpy(np.asarray(Image.open(f).convert("L")) / np.float32(127.5) - 1)[None] for f in files]
    )
    schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    torch.manual_seed(3)
    model = digits_unet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    def training_loss(clean: torch.Tensor) -> torch.Tensor:
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (len(clean),))
        return mse_loss(model(schedule.add_noise(clean, noise, t), t).sample, noise)

    for _ in range(8):
        training_loss(images).backward()
        optimizer.step()
        optimizer.zero_grad()
    settings: dict[str, Any] = {"timesteps": [0, 250, 999], "dimension": 2**20, "projection": "uniform"}
    out = tmp_path / "trace.zarr"
    with dmin_trace.recording(model, samples=3, out=out, dtype="float32", transform="none", **settings) as recording:
        for i in recording.samples:
            for k in recording.timesteps:
                with recording.step(i, k):
                    training_loss(images[i : i + 1]).backward()
    trace = open_store(out)
    reference = digits_model(tmp_path / "trace.weights.safetensors")
    assert trace.header.timesteps == (0, 250, 999)
    for sample, file in enumerate(files):
        captured = unshuffled(trace, sample)
        for k, (loss, gradients) in enumerate(digit_gradients(reference, file, [0, 250, 999])):
            assert trace.loss[sample, k] == pytest.approx(loss, rel=1e-5)
            total = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
            at = 0
            for name, expected in gradients.items():
                found = torch.from_numpy(captured[k, at : at + expected.numel()]).reshape(expected.shape)
                at += expected.numel()
                if name.endswith("to_k.bias"):
                    # A softmax does not see a constant: this gradient is zero but for rounding, on both sides.
                    assert max(found.norm(), expected.norm()) <= 1e-8 * total
                else:
                    assert (found - expected).norm() <= 1e-5 * expected.norm(), (sample, k, name)
            assert at == trace.header.projection.length


def state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> list[Any]:
    """Everything that a recording must leave alone, as values that compare."""
    return [
        [value.tolist() for value in model.state_dict().values()],
        [{key: torch.as_tensor(v).tolist() for key, v in s.items()} for s in optimizer.state_dict()["state"].values()],
        [id(p.grad) for p in model.parameters()],
        [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        [m.training for m in model.modules()],
        [len(m._forward_pre_hooks) for m in model.modules()],
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # type: ignore[union-attr]
        random.getstate(),
        generator.get_state().tolist(),
        torch.amp.GradScaler.scale,
        torch.is_grad_enabled(),
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_recording_leaves_everything_as_it_was(tmp_path: Path, fails: bool) -> None:
    model = denoiser()
    model.inner.eval()
    model.outer.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(11)

    def loss(model: torch.nn.Module, clean: torch.Tensor) -> torch.Tensor:
        random.random()
        np.random.rand()
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randint(0, 1000, (len(clean),))
        if fails and torch.equal(clean, POINTS[4:5]):
            raise ZeroDivisionError
        return mse_loss(model(clean + noise * t.reshape(-1, 1) / 1000, t), noise)

    for _ in range(3):
        optimizer.zero_grad()
        loss(model, POINTS).backward()
        optimizer.step()
    before = state(model, optimizer, generator)
    if fails:
        with pytest.raises(ZeroDivisionError):
            record(model, tmp_path / "trace.zarr", loss)
    else:
        record(model, tmp_path / "trace.zarr", loss)
    assert state(model, optimizer, generator) == before
    # The training can go on.
    optimizer.step()
    loss(model, POINTS[:2]).backward()
    assert open_store(tmp_path / "trace.zarr", unfinished=True).complete != fails


KILLED = """
import os, sys, time, torch
sys.path.insert(0, {tests!r})
import dmin_trace
from points import POINTS, denoiser, loss_of
model, stop, seen = denoiser(), int(sys.argv[1]), []
settings = dict(timesteps=3, dimension=64, dtype="float32", transform="none")
with dmin_trace.recording(model, samples=12, out="trace.zarr", **settings) as recording:
    for i in recording.samples:
        seen.append(i)
        for k in recording.timesteps:
            if (i, k) == (stop, 1):
                # The chunk is written while the next samples run.
                for _ in range(1000):
                    if os.path.exists("trace.zarr/done/c/0"):
                        os._exit(7)
                    time.sleep(0.05)
            with recording.step(i, k):
                loss_of(model, POINTS[i : i + 1]).backward()
print(seen)
"""


def test_recording_after_a_kill_records_only_what_is_missing(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(KILLED.format(tests=str(Path(__file__).parents[1])))
    run([script, 10], tmp_path, code=7)
    assert open_store(tmp_path / "trace.zarr", unfinished=True).done.tolist() == [True, False]
    first = (tmp_path / "trace.zarr" / "grad" / "c" / "0" / "0" / "0").stat()
    ran = run([script, -1], tmp_path)
    # The first of those that are missing is probed, and recorded twice; the first of all is compared with what it was.
    assert ran.stdout.strip() == "[8, 0, 8, 8, 9, 10, 11]"
    assert (tmp_path / "trace.zarr" / "grad" / "c" / "0" / "0" / "0").stat().st_mtime_ns == first.st_mtime_ns
    trace, whole = open_store(tmp_path / "trace.zarr"), open_store(record(denoiser(), tmp_path / "whole.zarr"))
    assert trace.sample.tolist() == list(range(12))
    assert np.array_equal(trace.gradients(np.arange(12)), whole.gradients(np.arange(12)))
    ran = run([script, -1], tmp_path, code=1)
    assert "exists already and is complete" in ran.stderr


def test_a_recording_killed_before_the_store_is_complete_only_completes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "trace.zarr"

    def killed(writer: Writer) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Writer, "finish", killed)
        record(denoiser(), out)
    with pytest.raises(TraceError, match="unfinished"):
        open_store(out)
    with dmin_trace.recording(
        denoiser(), samples=12, out=out, timesteps=3, dimension=64, dtype="float32", transform="none"
    ) as recording:
        assert list(recording.samples) == []
    assert open_store(out).complete


def test_recording_refuses_an_unfinished_trace_of_other_weights(tmp_path: Path) -> None:
    out = tmp_path / "trace.zarr"
    model, making = denoiser(), dmin_trace.recording
    with (
        pytest.raises(CaptureError, match="4 of 12 samples were not recorded"),
        making(model, samples=12, out=out, timesteps=3, dimension=64, dtype="float32", transform="none") as recording,
    ):
        for i in recording.samples:
            if i == 8:
                break
            for k in recording.timesteps:
                with recording.step(i, k):
                    loss_of(model, POINTS[i : i + 1]).backward()
    weights = (tmp_path / "trace.weights.safetensors").read_bytes()
    with pytest.raises(TraceError, match="its weights are"):
        record(denoiser(1), out)
    assert (tmp_path / "trace.weights.safetensors").read_bytes() == weights


class Noisy(Denoiser):
    """Draws in its forward pass, also in eval mode: always, or for some data."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.always = always

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if self.always or sample.sum() > 0:
            sample = sample + 0.1 * torch.randn_like(sample)
        return super().forward(sample, timestep)


def test_draws_inside_a_model_are_recorded_and_must_be_those_of_every_sample(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Noisy(always=True)
    trace = dmin_trace.open_trace(record(model, tmp_path / "always.zarr"))
    for made in trace.store.header.noise.draws:
        assert [name for name, _ in made] == ["randn_like", "randint*", "model"]
    with dmin_trace.recording(model, samples=1, like=trace) as again:
        for k in again.timesteps:
            with again.step(0, k):
                loss_of(model, POINTS[5:6]).backward()
    hit = trace.top_k(again.queries, 1, "dmin").hits[0][0]
    assert (hit.sample, hit.score) == (5, pytest.approx(3, abs=1e-5))
    model.always = False
    with pytest.raises(CaptureError, match="noise differs"):
        record(model, tmp_path / "sometimes.zarr")


def test_weights_are_put_back_by_the_lines_of_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = re.compile(r"^(?:model|module)\.load_state_dict\(load_file\(.*$", flags=re.M)
    lines = {text for page in DOCS.glob("*.md") for text in line.findall(page.read_text())}
    assert len(lines) == 3

    def trained(seed: int) -> Denoiser:
        model = denoiser(seed)
        model.inner.load_state_dict(denoiser(0).inner.state_dict())
        model.inner.requires_grad_(False)
        return model

    trace = dmin_trace.open_trace(record(trained(1), tmp_path / "out" / "trace.zarr"))
    shutil.copytree(tmp_path / "out", tmp_path / "out.trace")
    for text in lines:
        model = trained(2)
        with pytest.raises(WeightsError):
            trace.query_loss(model, [POINTS[3:4]], loss_of)
        exec(text, {"model": model, "module": model, "load_file": load_file})
        assert trace.top_k(trace.query_loss(model, [POINTS[3:4]], loss_of), 1).samples.tolist() == [[3]]
    # Several modules are a list of modules.
    models = [trained(k) for k in range(2)]
    with dmin_trace.recording(models, samples=1, out="both.zarr", timesteps=1, dimension=64) as recording:
        for i in recording.samples:
            with recording.step(i, 0):
                (loss_of(models[0], POINTS[:1]) + models[1].outer.weight.sum() + models[1].outer.bias.sum()).backward()
    others = torch.nn.ModuleList([trained(k) for k in (5, 6)])
    others.load_state_dict(load_file("both.weights.safetensors"), strict=False)
    assert all(map(torch.equal, others.state_dict().values(), torch.nn.ModuleList(models).state_dict().values()))


def test_step_timestep_and_fraction_give_the_rows_of_a_pinned_draw(tmp_path: Path) -> None:
    model = denoiser()
    drawn = open_store(record(model, tmp_path / "drawn.zarr"))

    def asked(model: torch.nn.Module, out: Path, ask: Callable[[Any], float]) -> dmin_trace.Store:
        settings: dict[str, Any] = {"timesteps": 3, "dimension": 64, "dtype": "float32", "transform": "none"}
        with dmin_trace.recording(model, samples=12, out=out, **settings) as recording:
            for i in recording.samples:
                for k in recording.timesteps:
                    with recording.step(i, k) as step:
                        clean = POINTS[i : i + 1]
                        noise = torch.randn_like(clean)
                        t = torch.tensor([ask(step)])
                        mse_loss(model(clean + noise * t.reshape(-1, 1) / 1000, t), noise).backward()
        return open_store(out)

    given = asked(model, tmp_path / "asked.zarr", lambda step: step.timestep(1000))
    assert given.header.timesteps == drawn.header.timesteps == (166, 500, 833)
    assert np.array_equal(given.gradients(np.arange(12)), drawn.gradients(np.arange(12)))

    class Inner(torch.nn.Module):
        """A model whose timestep has a name that is not looked for."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(16))

        def forward(self, sample: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
            return sample * self.weight * when

    named = asked(Inner(), tmp_path / "named.zarr", lambda step: step.fraction())
    assert named.header.timesteps == pytest.approx([1 / 6, 1 / 2, 5 / 6])


def test_recording_with_a_grad_scaler_and_an_outer_module_gives_the_same_rows(tmp_path: Path) -> None:
    model = denoiser()
    plain = open_store(record(model, tmp_path / "plain.zarr"))
    scaler = torch.amp.GradScaler("cpu", init_scale=3.0)
    whole = torch.nn.ModuleDict({"denoiser": model, "unused": torch.nn.Identity()})
    scaled = record(whole, tmp_path / "scaled.zarr", lambda m, x: scaler.scale(loss_of(m["denoiser"], x)))
    assert open_store(scaled).header.parameters.names[0] == "denoiser.inner.weight"
    assert np.allclose(open_store(scaled).norm, plain.norm, rtol=1e-6)
    assert scaler.scale(torch.ones(())).item() == 3.0
    assert np.allclose(open_store(scaled).gradients(np.arange(12)), plain.gradients(np.arange(12)), atol=1e-6)


def test_step_runs_backward_in_the_precision_of_its_forward(tmp_path: Path) -> None:
    model, rows = denoiser(), []
    for outer in (False, True):
        out = tmp_path / f"{outer}.zarr"
        with dmin_trace.recording(
            model, samples=2, out=out, timesteps=2, dimension=64, dtype="float32", transform="none"
        ) as recording:
            for i in recording.samples:
                for k in recording.timesteps:
                    with recording.step(i, k), torch.autocast("cpu", torch.bfloat16, enabled=outer):
                        with torch.autocast("cpu", enabled=False):
                            loss = loss_of(model, POINTS[i : i + 1])
                        loss.backward()
        rows.append(open_store(out).gradients(np.arange(2)))
    assert np.array_equal(rows[0], rows[1])


def test_recording_takes_what_an_optimizer_trains_in_several_modules(tmp_path: Path) -> None:
    one, other = denoiser(), denoiser(1)
    optimizer = torch.optim.SGD([*one.outer.parameters(), other.inner.weight])
    out = tmp_path / "trace.zarr"
    with dmin_trace.recording([one, other], samples=1, out=out, timesteps=2, optimizer=optimizer) as recording:
        for i in recording.samples:
            for k in recording.timesteps:
                with recording.step(i, k):
                    (loss_of(one, POINTS[i : i + 1]) + loss_of(other, POINTS[i : i + 1])).backward()
    names = open_store(out).header.parameters.names
    assert names == ("0.outer.weight", "0.outer.bias", "1.inner.weight")


def unpinned(model: torch.nn.Module, clean: torch.Tensor) -> torch.Tensor:
    noise = torch.randn_like(clean)
    t = torch.tensor([500])
    return mse_loss(model(clean + noise, t), noise)


def unseen(model: Denoiser, clean: torch.Tensor) -> torch.Tensor:
    torch.randint(0, 1000, (1,))
    return model.inner(torch.randn(1, 17)).mean() + model.outer(torch.randn(1, 24)).mean()


def several_draws(model: torch.nn.Module, clean: torch.Tensor) -> torch.Tensor:
    if torch.equal(clean, POINTS[3:4]):
        torch.randn(2)
    return loss_of(model, clean)


def shifted(model: torch.nn.Module, clean: torch.Tensor) -> torch.Tensor:
    t = torch.randint(0, 1000, (1,)) + int(torch.equal(clean, POINTS[3:4]))
    return model(clean, t).pow(2).mean()


def half_reached(model: Denoiser, clean: torch.Tensor) -> torch.Tensor:
    loss = loss_of(model, clean)
    return loss if model.training else model.inner.weight.sum() + 0 * loss.detach()


def twice(model: torch.nn.Module, clean: torch.Tensor) -> torch.Tensor:
    loss = loss_of(model, clean)
    loss.backward(retain_graph=True)
    return loss


def stepping(model: torch.nn.Module, clean: torch.Tensor) -> torch.Tensor:
    torch.optim.AdamW(model.parameters()).step()
    return loss_of(model, clean)


def writing(model: Denoiser, clean: torch.Tensor) -> torch.Tensor:
    loss = loss_of(model, clean)
    with torch.no_grad():
        model.inner.bias += 1
    return loss


def by_another_way(model: torch.nn.Module, clean: torch.Tensor) -> torch.Tensor:
    loss = loss_of(model, clean)
    torch.autograd.backward(loss, retain_graph=True)
    return loss


def without_gradient(model: torch.nn.Module, clean: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return loss_of(model, clean)


def not_a_scalar(model: torch.nn.Module, clean: torch.Tensor) -> torch.Tensor:
    return loss_of(model, clean).repeat(2)


WRONG_LOSSES: dict[Callable[..., torch.Tensor], str] = {
    unpinned: "timestep cannot be pinned in the training step of sample 0, timestep 0",
    unseen: "No model was called with a timestep in the training step of sample 0",
    several_draws: "On sample 3 the script drew randn",
    shifted: "denoiser saw timestep 167.0 for sample 3",
    half_reached: "does not depend on 3 of the 4",
    twice: "called twice in the training step of sample 0, timestep 0",
    stepping: "An optimizer stepped during the capture",
    writing: "parameters were changed in the training step of sample 0",
    by_another_way: "reached .grad in the training step of sample 0",
    without_gradient: "has no gradient",
    not_a_scalar: "has shape",
}


@pytest.mark.parametrize(("loss", "message"), WRONG_LOSSES.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_step_refuses_a_loss_that_would_give_wrong_gradients(
    tmp_path: Path, loss: Callable[..., torch.Tensor], message: str
) -> None:
    model = denoiser()
    with pytest.raises(CaptureError, match=message):
        record(model, tmp_path / "trace.zarr", loss)
    assert all(p.grad is None for p in model.parameters())
    assert not (tmp_path / "trace.zarr").exists() or not open_store(tmp_path / "trace.zarr", unfinished=True).complete


def no_backward(recording: Any) -> None:
    with recording.step(0, 0):
        loss_of(recording._models[0], POINTS[:1])


def step_twice(recording: Any) -> None:
    for _ in range(2):
        with recording.step(0, 0):
            loss_of(recording._models[0], POINTS[:1]).backward()


def step_in_step(recording: Any) -> None:
    with recording.step(0, 0), recording.step(0, 1):
        pass


def out_of_range(recording: Any) -> None:
    with recording.step(12, 0):
        pass


def no_such_timestep(recording: Any) -> None:
    with recording.step(0, 3):
        pass


def out_of_turn(recording: Any) -> None:
    with recording.step(0, 1):
        pass


def entered_twice(recording: Any) -> None:
    with recording:
        pass


def forgotten(recording: Any) -> None:
    with recording.step(0, 0):
        loss_of(recording._models[0], POINTS[:1]).backward()


def inputs_given(recording: Any) -> None:
    with recording.step(0, 0):
        loss = loss_of(recording._models[0], POINTS[:1])
        loss.backward(inputs=list(recording._models[0].parameters()))


def queries_of_a_trace_in_the_making(recording: Any) -> None:
    assert recording.queries


WRONG_LOOPS: dict[Callable[[Any], None], str] = {
    no_backward: "was called 0 times in the training step of sample 0, timestep 0",
    step_twice: "Sample 0, timestep 0 came where sample 0, timestep 1 is next",
    step_in_step: "opened inside the training step of sample 0, timestep 0",
    out_of_range: "Sample 12, timestep 0 came where sample 0, timestep 0 is next",
    no_such_timestep: "Sample 0, timestep 3 came where sample 0, timestep 0 is next",
    out_of_turn: "Sample 0, timestep 1 came where sample 0, timestep 0 is next",
    entered_twice: "was entered already",
    forgotten: "12 of 12 samples were not recorded",
    inputs_given: "given a gradient or inputs",
    queries_of_a_trace_in_the_making: "There are no queries",
}


@pytest.mark.parametrize(("loop", "message"), WRONG_LOOPS.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_recording_refuses_a_wrong_loop(tmp_path: Path, loop: Callable[[Any], None], message: str) -> None:
    recording = dmin_trace.recording(denoiser(), samples=12, out=tmp_path / "trace.zarr", timesteps=3, dimension=64)
    with pytest.raises(DminTraceError, match=message), recording:
        loop(recording)
    with pytest.raises(CaptureError, match="not under way"), recording.step(0, 0):
        pass


def test_step_after_a_failed_step_is_refused(tmp_path: Path) -> None:
    model, making = denoiser(), dmin_trace.recording
    with (
        pytest.raises(CaptureError, match="12 of 12 samples were not recorded"),
        making(model, samples=12, out=tmp_path / "a.zarr", timesteps=3, dimension=64) as recording,
    ):
        with pytest.raises(CaptureError, match="cannot be pinned"), recording.step(0, 0):
            unpinned(model, POINTS[:1]).backward()
        with pytest.raises(CaptureError, match="An earlier training step failed"), recording.step(0, 0):
            loss_of(model, POINTS[:1]).backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 12}, "out='...'"),
        ({"samples": 12, "out": "a", "like": "TRACE"}, "out='...'"),
        ({"samples": 12, "like": "TRACE", "timesteps": 3}, "timesteps was given with like"),
        ({"samples": 12, "like": "TRACE", "settings": Settings()}, "was given with like"),
        ({"samples": -1, "out": "a"}, "samples is -1"),
        ({"samples": 12, "out": "a", "dimension": 1000}, "power of two"),
        ({"samples": 12, "out": "a", "columns": {"label": [1, 2]}}, "label has 2 values"),
        ({"samples": 12, "out": "a", "model": "unet"}, "model is a str"),
        ({"samples": 12, "out": "a", "optimizer": [3]}, "optimizer is a list"),
    ],
)
def test_recording_refuses_invalid_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    if arguments.get("like"):
        arguments = arguments | {"like": record(denoiser(), tmp_path / "trace.zarr")}
    with pytest.raises(SettingsError, match=message):
        dmin_trace.recording(**({"model": denoiser()} | arguments))


def test_recording_refuses_no_samples_and_a_model_without_parameters(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="empty"), dmin_trace.recording(denoiser(), samples=0, out=tmp_path / "a"):
        pass
    none = torch.nn.Identity()
    with pytest.raises(CaptureError, match="requires_grad"), dmin_trace.recording(none, samples=1, out=tmp_path / "b"):
        pass


def ask(model: torch.nn.Module, like: Path, points: torch.Tensor, loss: Callable[..., torch.Tensor] = loss_of) -> Any:
    with dmin_trace.recording(model, samples=len(points), like=like) as recording:
        for i in recording.samples:
            for k in recording.timesteps:
                with recording.step(i, k):
                    loss(model, points[i : i + 1]).backward()
    return recording


def test_queries_must_be_comparable_with_their_trace(tmp_path: Path) -> None:
    model = denoiser()
    like = record(model, tmp_path / "trace.zarr", columns={"caption": [f"point {i}" for i in range(12)]})
    recording = ask(model, like, POINTS[[9, 2]])
    assert recording.queries.names == ("query 0", "query 1") and recording.queries.gradients.shape == (2, 3, 64)
    hits = dmin_trace.open_trace(like).top_k(recording.queries, 4, "dmin").hits
    assert [[row[0].sample, row[0].columns["caption"]] for row in hits] == [[9, "point 9"], [2, "point 2"]]
    assert [len(row) for row in hits] == [4, 4]
    assert np.isclose(hits[0][0].score, 3, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace.weights.safetensors", "trace.zarr"]
    with pytest.raises(WeightsError, match="not those of the trace"):
        ask(denoiser(1), like, POINTS[:1])
    with pytest.raises(QueryError, match="but the trace is of"):
        ask(torch.nn.Linear(2, 2), like, POINTS[:1])
    with pytest.raises(QueryError, match="On the query the script drew"):
        ask(model, like, POINTS[:1], lambda m, x: loss_of(m, x.repeat(2, 1)))
    with pytest.raises(QueryError, match="The denoiser saw the timesteps"):
        ask(model, like, POINTS[:1], lambda m, x: mse_loss(m(x, torch.randn_like(x)[:, 0] * 0 + drawn() + 1), x))
    with pytest.raises(QueryError, match="requires_grad=False"):
        ask(denoiser().requires_grad_(False), like, POINTS[:1])
    with (
        pytest.raises(CaptureError, match="1 of 2 samples were not recorded"),
        dmin_trace.recording(model, samples=2, like=like) as unfinished,
    ):
        for k in unfinished.timesteps:
            with unfinished.step(0, k):
                loss_of(model, POINTS[:1]).backward()
    with pytest.raises(QueryError, match="no queries"):
        assert unfinished.queries


def drawn() -> torch.Tensor:
    return torch.randint(0, 1000, (1,))


def test_samples_seeds_the_generators_alike_for_every_sample(tmp_path: Path) -> None:
    model, seen = denoiser(), []
    with dmin_trace.recording(model, samples=12, out=tmp_path / "a.zarr", timesteps=2, dimension=64) as recording:
        for i in recording.samples:
            seen.append((torch.rand(1).item(), random.random(), np.random.rand()))
            for k in recording.timesteps:
                with recording.step(i, k):
                    loss_of(model, POINTS[i : i + 1]).backward()
    assert len(set(seen)) == 1
