"""Preconditioning: the oracle is plain autograd over what the optimizer itself divides by, read or watched apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import digit_gradients, digits_model, slot_seed, unshuffled
from safetensors.torch import load_file, save_file
from tiny import EXAMPLE, digit_folder, plain_script, run, without_the_line

import dmin_trace
from dmin_trace import moments
from dmin_trace.compress import signs_of
from dmin_trace.errors import AttachError, CaptureError, TraceError, WeightsError
from dmin_trace.precondition import Preconditioner
from dmin_trace.settings import Precondition
from dmin_trace.store import Trace, open_trace
from dmin_trace.weights import Trainable, find_trainable

CLI = ("-m", "dmin_trace.cli")
TIMESTEPS = [0, 250, 999]
WHOLE = ("--timesteps", "0,250,999", "--dimension", str(2**20), "--projection", "uniform", "--dtype", "float32")
"""A sketch as long as the gradient, which is then the gradient itself."""
STEPS = 3
"""So few that without bias correction a divisor would be eighteen times too small."""


def example(path: Path, kind: Precondition) -> Path:
    """A copy of the example whose line preconditions and keeps whole gradients."""
    line = "dmin_trace.attach(accelerator, args, timesteps=5)"
    settings = f"timesteps={TIMESTEPS}, dimension=2**20, projection='uniform', dtype='float32', precondition='{kind}'"
    text = EXAMPLE.read_text()
    if text.count(line) != 1:
        raise ValueError("the example has no such line")
    path.write_text(text.replace(line, f"dmin_trace.attach(accelerator, args, {settings})"))
    return path


@pytest.fixture(scope="module", params=["adam", "sign"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Precondition]:
    """A folder with four digits, a model trained on them for three steps, its last checkpoint and its trace."""
    folder, kind = tmp_path_factory.mktemp(request.param), request.param
    digit_folder(folder / "digits", 4)
    script = example(folder / "train.py", kind)
    steps = ("--max_train_steps", STEPS, "--checkpointing_steps", STEPS, "--learning_rate", "3e-3")
    run([script, "--train_data_dir", "digits", "--output_dir", "out", "--train_batch_size", 3, *steps], folder)
    return folder, kind


def roots(checkpoint: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """What AdamW divides by, from the state that accelerate saved: by its paper, in float64."""
    saved = torch.load(checkpoint / "optimizer.bin", weights_only=True)
    (group,) = saved["param_groups"]
    found = {}
    for name, number in zip(names, group["params"], strict=True):
        state = saved["state"][number]
        assert float(state["step"]) == STEPS
        found[name] = (state["exp_avg_sq"].double() / (1 - 0.999**STEPS)).sqrt() + 1e-8
    return found


def test_gradients_are_those_of_an_independent_reference_for_every_parameter(
    trained: tuple[Path, Precondition],
) -> None:
    folder, kind = trained
    trace = open_trace(folder / "out" / "trace.zarr")
    model = digits_model(folder / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    root = roots(folder / "out" / f"checkpoint-{STEPS}", [name for name, _ in model.named_parameters()])
    assert trace.header.precondition == kind
    for sample, image in enumerate(sorted((folder / "digits").iterdir())):
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
                expected = plain.double() / root[name] if kind == "adam" else plain.double().sign()
                if kind == "sign":
                    # Where rounding decides on the sign both are right.
                    noise = (found - expected).abs() > 0.5
                    assert not noise.any() or plain[noise].abs().max() <= 1e-7 * total, (sample, slot, name)
                    found = torch.where(noise, expected, found)
                assert (found - expected).norm() <= 1e-5 * expected.norm(), (sample, slot, name)
            assert at == trace.header.projection.length


def test_on_demand_is_as_at_the_end(trained: tuple[Path, Precondition]) -> None:
    folder, kind = trained
    first = open_trace(folder / "out" / "trace.zarr")
    bare = without_the_line(EXAMPLE, folder / "bare.py")
    checkpoint = f"out/checkpoint-{STEPS}"
    ways = [["--weights", checkpoint], ["--weights", "out/unet", "--optimizer", checkpoint]]
    for k, way in enumerate(ways if kind == "adam" else ways[:1]):
        command = [*CLI, "capture", *way, "--precondition", kind, *WHOLE, "--out", f"demand{k}.zarr", "--", bare]
        run([*command, "--train_data_dir", "digits", "--output_dir", "x"], folder)
        again = open_trace(folder / f"demand{k}.zarr")
        assert again.header.preconditioner == first.header.preconditioner
        for sample in range(4):
            a, b = first.rows(np.array([sample])), again.rows(np.array([sample]))
            assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(a), (way, sample)
        assert np.allclose(first.norm, again.norm, rtol=1e-6)
    assert (folder / "demand0.precondition.safetensors").exists() == (kind == "adam")
    assert bool(first.header.preconditioner) == (kind == "adam")


def test_a_copied_training_image_finds_itself_first(trained: tuple[Path, Precondition]) -> None:
    folder, kind = trained
    (folder / "copies").mkdir(exist_ok=True)
    for k in (1, 3):
        shutil.copy(folder / "digits" / f"000{k}.png", folder / "copies" / f"copy{k}.png")
    run([*CLI, "query", "--score", "dmin", "out/trace.zarr", "copies", "-k", "2", "--json", "hits.json"], folder)
    queries = json.loads((folder / "hits.json").read_text())["queries"]
    for query, sample in zip(queries, (1, 3), strict=True):
        assert query["hits"][0]["sample"] == sample
        assert query["hits"][0]["score"] == pytest.approx(len(TIMESTEPS), abs=1e-4)
        assert query["hits"][1]["score"] < len(TIMESTEPS) - 0.1
    shown = run([*CLI, "info", "out/trace.zarr"], folder).stdout
    assert kind in next(line for line in shown.splitlines() if "precondition" in line)


# -- files and states that are missing, damaged, or others' ----------------------------------------------------------


@pytest.fixture
def adam(trained: tuple[Path, Precondition], tmp_path: Path) -> Path:
    """A copy of that folder; for tests that ask for adam's alone."""
    return Path(shutil.copytree(trained[0], tmp_path / "copy"))


def capture(folder: Path, *options: object, code: int = 1) -> str:
    """The last line of a capture on demand by adam."""
    line = [folder / "train.py", "--train_data_dir", "digits", "--output_dir", "x"]
    ran = run([*CLI, "capture", "--out", "new.zarr", *WHOLE, *options, "--", *line], folder, code=code)
    assert "Traceback" not in ran.stderr
    lines = [line for line in ran.stderr.splitlines() if line.strip()]
    assert code == 0 or len(lines) == 1, ran.stderr
    return "".join(lines)


@pytest.mark.parametrize("trained", ["adam"], indirect=True)
def test_where_nothing_is_found_it_says_what_was_looked_for(adam: Path) -> None:
    # The same weights by another name, without an optimizer; and divisors that were left by others.
    shutil.copy(adam / "out" / "trace.weights.safetensors", adam / "alone.safetensors")
    values = load_file(adam / "out" / "trace.precondition.safetensors")
    save_file(values, adam / "new.precondition.safetensors", metadata={"weights": "f" * 64})
    left = (adam / "new.precondition.safetensors").read_bytes()
    said = capture(adam, "--weights", "alone.safetensors")
    for part in (str(adam / "optimizer.bin"), "new.precondition.safetensors", "--optimizer", "sign"):
        assert part in said
    assert not (adam / "new.zarr").exists() and not (adam / "new.weights.safetensors").exists()
    assert (adam / "new.precondition.safetensors").read_bytes() == left
    optimizer = ("--optimizer", f"out/checkpoint-{STEPS}")
    assert "Leave it out" in capture(adam, "--weights", "out/unet", *optimizer, "--precondition", "sign")


@pytest.mark.parametrize("trained", ["adam"], indirect=True)
def test_a_query_without_its_divisors_is_one_line(adam: Path) -> None:
    (adam / "out" / "trace.precondition.safetensors").unlink()
    ran = run([*CLI, "query", "--score", "dmin", "out/trace.zarr", "digits/0001.png", "-k", "1"], adam, code=1)
    (line,) = [line for line in ran.stderr.splitlines() if line.strip()]
    assert "divisors are not at" in line and "trace.precondition.safetensors" in line


class Evil:
    """A pickle that would run a program."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("evil"),)


@pytest.mark.parametrize("trained", ["adam"], indirect=True)
def test_a_checkpoint_that_is_a_program_is_not_run(adam: Path) -> None:
    torch.save({"state": Evil(), "param_groups": []}, adam / "out" / f"checkpoint-{STEPS}" / "optimizer.bin")
    assert "cannot be read as the state of an optimizer" in capture(adam, "--weights", f"out/checkpoint-{STEPS}")
    assert not list(adam.rglob("evil")) and not list(adam.rglob("new.*"))


@pytest.mark.parametrize("way", ["line", "run"])
def test_an_optimizer_without_second_moment_is_refused_before_the_training(tmp_path: Path, way: str) -> None:
    parts = {"attach": "dmin_trace.attach(accelerator, args, dimension=64, precondition='adam')"}
    script = plain_script(tmp_path / "script.py", **(parts if way == "line" else {"imports": "", "attach": ""}))
    script.write_text(script.read_text().replace("torch.optim.AdamW(", "torch.optim.SGD("))
    before = ("--precondition", "adam", "--")
    ran = run([script] if way == "line" else [*CLI, "run", *before, script], tmp_path, code=1)
    assert "which the optimizer SGD does not have. Train with AdamW, or precondition by sign" in ran.stderr
    assert ("Traceback" in ran.stderr) == (way == "line")
    assert not (tmp_path / "out").exists()


# -- what an optimizer divides by ------------------------------------------------------------------------------------


def moved_by(optimizer_of: Callable[..., torch.optim.Optimizer], steps: int, **options: Any) -> tuple[Any, ...]:
    """A model and its optimizer after some steps, and what the last one divided the gradient by, from what it did.

    Without a first moment (beta1 = 0) and decay, a step is the learning rate times the gradient over the divisor.
    """
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 4).double()
    optimizer = optimizer_of(model.parameters(), lr=1e-2, betas=(0.0, 0.99), eps=1e-4, weight_decay=0.0, **options)
    for step in range(steps):
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            # Smaller and smaller, so that the largest second moment (amsgrad) is an earlier one.
            p.grad = torch.randn_like(p) * 0.2**step
        optimizer.step()
    moved = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
    divided = [1e-2 * p.grad / m for p, m in zip(model.parameters(), moved, strict=True) if p.grad is not None]
    return model, optimizer, divided


@pytest.mark.parametrize(
    ("kind", "steps", "options"),
    [
        (torch.optim.AdamW, 1, {}),
        (torch.optim.AdamW, 2, {"foreach": True}),
        (torch.optim.AdamW, 8, {"fused": True}),
        (torch.optim.AdamW, 5, {"amsgrad": True}),
        (torch.optim.Adam, 3, {"amsgrad": True, "fused": True}),
        (torch.optim.Adam, 3, {"capturable": False, "foreach": False}),
        (torch.optim.NAdam, 3, {}),
        (torch.optim.RAdam, 9, {}),
    ],
)
def test_the_divisor_is_what_the_last_step_divided_by(kind: Any, steps: int, options: dict[str, Any]) -> None:
    model, optimizer, divided = moved_by(kind, steps, **options)
    state = repr(optimizer.state_dict())
    found = moments.from_optimizers(find_trainable([model], [optimizer]), [optimizer]).divisors
    assert repr(optimizer.state_dict()) == state
    ratio = torch.cat([(d / f).flatten() for d, f in zip(divided, found, strict=True)])
    # RAdam's rectification is one factor for all, and its eps comes before the bias correction.
    expected, tolerance = (ratio.mean(), 2e-2) if kind is torch.optim.RAdam else (torch.ones(()).double(), 1e-5)
    assert torch.allclose(ratio, expected.expand_as(ratio), rtol=tolerance)


def test_what_was_never_moved_is_divided_by_one() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    trainable = find_trainable([model], [optimizer])
    found = moments.from_optimizers(trainable, [optimizer])
    assert found.divisors[0].tolist() == [[pytest.approx(1.0)] * 3] * 2
    assert found.divisors[1].tolist() == [1, 1]
    assert list(optimizer.state) == [model.weight]


class Quantised(torch.optim.AdamW):
    """Keeps its second moment as bitsandbytes does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": 1, "state1": p.detach().byte(), "state2": p.detach().byte(), "qmap2": p}


def refused(make: Callable[[Iterator[torch.nn.Parameter]], torch.optim.Optimizer]) -> tuple[Trainable, Any]:
    model = torch.nn.Linear(3, 2)
    optimizer = make(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return find_trainable([model], [optimizer]), optimizer


def test_optimizers_that_keep_it_otherwise_are_refused(tmp_path: Path) -> None:
    trainable, optimizer = refused(Quantised)
    with pytest.raises(CaptureError, match="Quantised .* quantised to 8 bits or less"):
        moments.from_optimizers(trainable, [optimizer])
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.bin")
    with pytest.raises(WeightsError, match="quantised to 8 bits or less"):
        moments.from_checkpoint(trainable, [optimizer], tmp_path / "optimizer.bin")
    with pytest.raises(AttachError, match="Adam8bit .* quantised"):
        moments.refuse_optimizers([refused(type("Adam8bit", (Quantised,), {"__module__": "bitsandbytes.optim"}))[1]])
    for kind in (torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta):
        with pytest.raises(AttachError, match=f"optimizer {kind.__name__} does not have"):
            moments.refuse_optimizers([refused(lambda p, kind=kind: kind(p, lr=0.1))[1]])  # type: ignore[misc]
    trainable, adamax = refused(torch.optim.Adamax)
    moments.refuse_optimizers([adamax])
    with pytest.raises(CaptureError, match="Adamax does not have"):
        moments.from_optimizers(trainable, [adamax])
    with pytest.raises(CaptureError, match="AdamW does not have"):
        moments.from_optimizers(trainable, [torch.optim.AdamW(trainable.tensors)])


def test_the_states_of_several_optimizers_and_groups_find_their_parameters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = [torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)]
    groups = [{"params": [models[0].bias], "betas": (0.9, 0.9)}, {"params": [models[0].weight]}]
    optimizers = [torch.optim.AdamW(groups, eps=1e-3), torch.optim.AdamW(models[1].parameters())]
    for k, optimizer in enumerate(optimizers):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.randn_like(p)
        optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / f"optimizer{f'_{k}' if k else ''}.bin")
    trainable = find_trainable(models, optimizers)
    live = moments.from_optimizers(trainable, optimizers)
    read = moments.from_checkpoint(trainable, optimizers, tmp_path / "optimizer.bin")
    assert live.fingerprint == read.fingerprint
    # After one step the second moment is the gradient's square.
    for tensor, divisor, eps in zip(trainable.tensors, live.divisors, (1e-3, 1e-3, 1e-8, 1e-8), strict=True):
        assert tensor.grad is not None and torch.allclose(divisor, tensor.grad.abs() + eps, rtol=1e-5)
    (tmp_path / "optimizer_1.bin").unlink()
    with pytest.raises(WeightsError, match="trains with 2 optimizers, but there is no .*optimizer_1.bin"):
        moments.from_checkpoint(trainable, optimizers, tmp_path / "optimizer.bin")


# -- the transformation ----------------------------------------------------------------------------------------------


def test_what_is_not_finite_stays_so() -> None:
    given = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -2.0, 1e-30])
    signs = signs_of(given)
    assert [*map(torch.isfinite, signs)] == [False, False, False, True, True, True]
    assert signs[3:].tolist() == [0, -1, 1]
    (divided,) = Preconditioner("adam", ("a",), (torch.full((6,), 0.5),)).apply([given])
    assert torch.isfinite(divided).tolist() == [False, False, False, True, True, True]
    assert divided[4] == -4
    assert given[4] == -2


@pytest.mark.parametrize("kind", ["none", "sign", "adam"])
def test_one_tensor_at_a_time_is_alive(kind: Precondition) -> None:
    import weakref

    alive: list[weakref.ref[torch.Tensor]] = []

    def hand_out() -> Iterator[torch.Tensor]:
        for _ in range(4):
            assert sum(ref() is not None for ref in alive) <= 1
            tensor = torch.ones(3)
            alive.append(weakref.ref(tensor))
            yield tensor
            del tensor

    ones = tuple(torch.ones(3) for _ in range(4))
    for tensor in Preconditioner(kind, tuple("abcd"), ones).apply(hand_out()):
        assert tensor.tolist() == [1, 1, 1]
        del tensor


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
            for k in recording.slots:
                with recording.body(i, k):
                    loss = loss_of(model, POINTS[i : i + 1].to(dtype))
                    (scaler.scale(loss) if scaled else loss).backward()
    return recording


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["sign", "adam"])
def test_parameters_of_every_dtype(tmp_path: Path, kind: str, dtype: torch.dtype, scaled: bool) -> None:
    model, optimizer = trained_denoiser(dtype)
    before = repr(optimizer.state_dict())
    record(model, scaled, out=tmp_path / "trace.zarr", optimizer=optimizer, projection="uniform", precondition=kind)
    assert repr(optimizer.state_dict()) == before
    trace = open_trace(tmp_path / "trace.zarr")
    states = [optimizer.state[p] for p in model.parameters()]
    root = [(s["exp_avg_sq"].double() / (1 - 0.999 ** float(s["step"]))).sqrt() + 1e-4 for s in states]
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
            over = [g.sign() if kind == "sign" else g / r for g, r in zip(over, root, strict=True)]
            expected = torch.cat([g.flatten() for g in over])
            assert (found[slot] - expected).norm() <= 1e-5 * expected.norm()
            assert trace.norm[sample, slot] == pytest.approx(float(expected.norm()), rel=1e-5)


def test_a_recording_goes_on_by_what_was_kept(tmp_path: Path) -> None:
    model, optimizer = trained_denoiser()
    record(model, out=tmp_path / "whole.zarr", optimizer=optimizer, precondition="adam")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmin_trace.store.CHUNK_BYTES", 2 * 2 * 1024 * 4)
        with pytest.raises(KeyboardInterrupt):
            record(model, stop=3, out=tmp_path / "trace.zarr", optimizer=optimizer, precondition="adam")
    kept = tmp_path / "trace.precondition.safetensors"
    left = kept.read_bytes()
    with pytest.raises(TraceError, match="preconditioned by adam [0-9a-f]{16}, those of this run by sign"):
        record(model, out=tmp_path / "trace.zarr", precondition="sign")
    _, other = trained_denoiser()
    assert other.param_groups[0]["eps"] == 1e-4
    other.param_groups[0]["eps"] = 1e-3
    other_model = find_trainable([model], None)
    for tensor, state in zip(other_model.tensors, list(other.state.values()), strict=True):
        other.state[tensor] = state
    other.param_groups[0]["params"] = list(model.parameters())
    with pytest.raises(TraceError, match="preconditioned by adam [0-9a-f]{16}, those of this run by adam"):
        record(model, out=tmp_path / "trace.zarr", optimizer=other, precondition="adam")
    assert kept.read_bytes() == left
    record(model, out=tmp_path / "trace.zarr", precondition="adam")
    whole, resumed = open_trace(tmp_path / "whole.zarr"), open_trace(tmp_path / "trace.zarr")
    assert resumed.header.chunks == 3 and resumed.header.preconditioner == whole.header.preconditioner
    assert np.array_equal(resumed.rows(np.arange(6)), whole.rows(np.arange(6)))


def test_a_recording_without_the_optimizer_says_so(tmp_path: Path) -> None:
    model, optimizer = trained_denoiser()
    with pytest.raises(CaptureError, match="Give it: recording\\(..., optimizer=optimizer\\)"):
        record(model, out=tmp_path / "trace.zarr", precondition="adam")
    with pytest.raises(CaptureError, match="the one given has no state"):
        fresh = torch.optim.AdamW(model.parameters())
        record(model, out=tmp_path / "trace.zarr", optimizer=fresh, precondition="adam")
    with pytest.raises(CaptureError, match="SGD does not have"):
        sgd = torch.optim.SGD(model.parameters(), momentum=0.9)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        sgd.step()
        record(model, out=tmp_path / "trace.zarr", optimizer=sgd, precondition="adam")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["sign", "adam"])
def test_queries_of_a_recording_are_preconditioned_alike(tmp_path: Path, kind: str) -> None:
    model, optimizer = trained_denoiser()
    record(model, out=tmp_path / "trace.zarr", optimizer=optimizer, precondition=kind)
    hits = record(model, like=tmp_path / "trace.zarr").hits(score="dmin", k=2)
    assert [row[0].sample for row in hits] == list(range(6))
    assert all(row[0].score == pytest.approx(2, abs=1e-5) and row[1].score < 1.9 for row in hits)


def changed(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def prepare(path: Path) -> None:
        values = load_file(path)
        change(values)
        save_file(values, path)

    return prepare


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (Path.unlink, "divisors are not at"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot be read as safetensors"),
    "a pickle": (lambda path: torch.save({"x": torch.ones(2)}, path), "cannot be read as safetensors"),
    "another's": (changed(lambda v: v["inner.bias"].mul_(1.0001)), "is not what the trace's gradients were divided by"),
    "zero": (changed(lambda v: v["inner.bias"].zero_()), "not finite and above zero"),
    "nan": (changed(lambda v: v["inner.bias"].fill_(torch.nan)), "not finite and above zero"),
    "fewer": (changed(lambda v: v.pop("inner.bias")), "does not hold one float32 tensor for each of the 4"),
    "another shape": (changed(lambda v: v.update({"inner.bias": torch.ones(25)})), "does not hold one float32"),
    "another dtype": (changed(lambda v: v.update({"inner.bias": torch.ones(24).half()})), "does not hold one float32"),
}


@pytest.mark.parametrize(("prepare", "message"), FILES.values(), ids=FILES.keys())
def test_divisors_that_are_not_the_traces_are_refused(
    tmp_path: Path, prepare: Callable[[Path], Any], message: str
) -> None:
    model, optimizer = trained_denoiser()
    record(model, out=tmp_path / "trace.zarr", optimizer=optimizer, precondition="adam")
    prepare(tmp_path / "trace.precondition.safetensors")
    with pytest.raises(WeightsError, match=message):
        record(model, like=tmp_path / "trace.zarr")


def sgds() -> dict[str, Any]:
    return refused(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))[1].state_dict()


def state_with(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def prepare(path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        change(saved)
        torch.save(saved, path)

    return prepare


STATES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "garbage": (lambda path: path.write_bytes(b"garbage"), "cannot be read as the state"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-99]), "cannot be read as the state"),
    "a tensor": (lambda path: torch.save(torch.ones(3), path), "cannot be read as the state"),
    "lists": (lambda path: torch.save({"state": [1], "param_groups": [1]}, path), "cannot be read as the state"),
    "SGD's": (state_with(lambda saved: saved.update(state=sgds()["state"])), "does not have"),
    "no state": (state_with(lambda saved: saved["state"].clear()), "does not have"),
    "another shape": (state_with(lambda s: s["state"][1].update(exp_avg_sq=torch.ones(2, 2))), "has shape \\(2, 2\\)"),
    "whole numbers": (state_with(lambda s: s["state"][1].update(exp_avg_sq=torch.ones(2).int())), "plain numbers"),
    "not finite": (state_with(lambda s: s["state"][0]["exp_avg_sq"].fill_(torch.inf)), "that is finite"),
    "negative": (state_with(lambda s: s["state"][0]["exp_avg_sq"].fill_(-1)), "that is finite"),
    "no step": (state_with(lambda s: s["state"][0].update(step=0)), "after one step or more"),
    "steps": (state_with(lambda s: s["state"][0].update(step=torch.ones(2))), "after one step or more"),
    "no betas": (state_with(lambda s: s["param_groups"][0].pop("betas")), "does not have"),
    "fewer": (state_with(lambda s: s["param_groups"][0]["params"].pop()), "of 1 parameters, but the script's has 2"),
}


@pytest.mark.parametrize(("prepare", "message"), STATES.values(), ids=STATES.keys())
def test_a_saved_state_that_is_no_use_is_refused(tmp_path: Path, prepare: Callable[[Path], Any], message: str) -> None:
    trainable, optimizer = refused(torch.optim.AdamW)
    path = tmp_path / "optimizer.bin"
    torch.save(optimizer.state_dict(), path)
    assert moments.from_checkpoint(trainable, [optimizer], path).names == ("weight", "bias")
    prepare(path)
    with pytest.raises(WeightsError, match=message):
        moments.from_checkpoint(trainable, [optimizer], path)


def test_a_moment_is_found_where_it_is_and_nowhere_else(tmp_path: Path) -> None:
    trainable, optimizer = refused(torch.optim.AdamW)
    expected = moments.from_optimizers(trainable, [optimizer])
    fresh = torch.optim.AdamW(trainable.tensors)
    for name in ("checkpoint-3/unet", "alone", "saved"):
        (tmp_path / name).mkdir(parents=True)
    torch.save(optimizer.state_dict(), tmp_path / "checkpoint-3" / "optimizer.bin")
    own = trainable.weights_fingerprint()
    expected.save(tmp_path / "saved" / "trace.precondition.safetensors", own)
    expected.save(tmp_path / "others.precondition.safetensors", "f" * 64)
    nothing, others = tmp_path / "gone.safetensors", tmp_path / "others.precondition.safetensors"

    def find(weights: str, given: str | None = None, beside: Path = nothing) -> Preconditioner:
        path = None if given is None else tmp_path / given
        return moments.find(trainable, [fresh], given=path, weights=tmp_path / weights, beside=beside)

    for weights in (
        "checkpoint-3",
        "checkpoint-3/unet",
        "checkpoint-3/model.safetensors",
        "saved/trace.weights.safetensors",
    ):
        assert find(weights).fingerprint == expected.fingerprint
    for given in ("checkpoint-3", "checkpoint-3/optimizer.bin", "saved/trace.precondition.safetensors"):
        assert find("alone", given).fingerprint == expected.fingerprint
    kept = tmp_path / "saved" / "trace.precondition.safetensors"
    assert find("alone", beside=kept).fingerprint == expected.fingerprint
    for beside in (nothing, others):
        with pytest.raises(WeightsError, match="looked for .*alone/optimizer.bin, .*--optimizer"):
            find("alone", beside=beside)
    with pytest.raises(WeightsError, match="There is no optimizer state at"):
        find("checkpoint-3", "alone")
    with torch.no_grad():
        trainable.tensors[0][0] += 1
    with pytest.raises(WeightsError, match="none of these weights was found"):
        find("saved/trace.weights.safetensors", beside=kept)


def test_a_header_that_contradicts_itself_is_damaged(tmp_path: Path) -> None:
    model, optimizer = trained_denoiser()
    record(model, out=tmp_path / "trace.zarr", optimizer=optimizer, precondition="adam")
    trace: Trace = open_trace(tmp_path / "trace.zarr")
    metadata = trace.path / "zarr.json"
    facts = json.loads(metadata.read_text())
    for changes in ({"preconditioner": ""}, {"precondition": "sign"}, {"precondition": "root"}, {"preconditioner": 3}):
        attributes = {**facts["attributes"], **changes}
        metadata.write_text(json.dumps({**facts, "attributes": attributes}))
        with pytest.raises(TraceError, match="its attribute precondition"):
            open_trace(tmp_path / "trace.zarr")
