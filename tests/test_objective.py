"""The objective and the draws: the oracle is plain autograd over the model's output, with noises drawn apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from oracle import digits_model, unshuffled
from PIL import Image
from tiny import BODY, EXAMPLE, digit_folder, plain_script, run, without_the_line
from tiny_pipelines import caption, captioned_images, command_line, picture, tiny_pipeline
from torch.utils.checkpoint import checkpoint

import dmin_trace
from dmin_trace import compress, store
from dmin_trace.errors import CaptureError, QueryError, SettingsError, TraceError
from dmin_trace.pack import pack
from dmin_trace.randomness import make_slots
from dmin_trace.settings import Settings
from dmin_trace.store import Trace, open_trace

TIMESTEPS = [0, 250, 999]
WHOLE = (
    "--timesteps",
    "0,250,999",
    "--dimension",
    str(2**20),
    "--projection",
    "uniform",
    "--dtype",
    "float32",
    "--precondition",
    "none",
)
"""A sketch as long as the gradient, which is then the gradient itself."""
BOTH = ("--objective", "squared_output", "--draws", "3")
SHORT = ("--train_data_dir", "digits", "--max_train_steps", "3", "--train_batch_size", "3", "--learning_rate", "3e-3")


def noise_seed(slot: int, draw: int) -> int:
    """The documented seed of a draw: numpy's SeedSequence of (seed, slot + 1), with the draw from the second one on."""
    entropy = [0, slot + 1] if draw == 0 else [0, slot + 1, draw]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def mean_gradient(
    value: Callable[[torch.Generator], tuple[torch.Tensor, torch.Tensor]],
    parameters: list[torch.nn.Parameter],
    slot: int,
    draws: int,
) -> tuple[float, torch.Tensor]:
    """The mean over noises of the loss, and that of the objective's gradient, flat.

    value: gives loss and objective from a generator to draw noise with.
    """
    losses, total = [], torch.zeros((), dtype=torch.float64)
    for draw in range(draws):
        loss, objective = value(torch.Generator().manual_seed(noise_seed(slot, draw)))
        losses.append(loss.item())
        gradients = torch.autograd.grad(objective, parameters)
        total = total + torch.cat([g.flatten() for g in gradients]).double()
    return float(np.mean(losses)), total / draws


# -- a UNet that is trained whole ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four digits, and a model trained on them for three steps with its trace, by a script's line."""
    folder = tmp_path_factory.mktemp("trained")
    digit_folder(folder / "digits", 4)
    settings = f"timesteps={TIMESTEPS}, dimension=2**20, projection='uniform', dtype='float32', precondition='none'"
    line = "dmin_trace.attach(accelerator, args, "
    text = EXAMPLE.read_text()
    if text.count(f"{line}timesteps=5)") != 1:
        raise ValueError("the example has no such line")
    text = text.replace(f"{line}timesteps=5)", f"{line}{settings}, objective='squared_output', draws=3)")
    (folder / "train.py").write_text(text)
    run([folder / "train.py", *SHORT, "--output_dir", "out", "--checkpointing_steps", "3"], folder)
    return folder


def check_digits(trace: Trace, folder: Path) -> None:
    model = digits_model(folder / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    header = trace.header
    for sample, image in enumerate(sorted((folder / "digits").iterdir())):
        clean = torch.from_numpy(np.asarray(Image.open(image).convert("L")) / np.float32(127.5) - 1)[None, None]
        captured = torch.from_numpy(unshuffled(trace, sample))
        for slot, timestep in enumerate(TIMESTEPS):

            def value(
                generator: torch.Generator, clean: torch.Tensor = clean, timestep: int = timestep
            ) -> tuple[torch.Tensor, torch.Tensor]:
                noise, t = torch.randn(clean.shape, generator=generator), torch.tensor([timestep])
                predicted = model(scheduler.add_noise(clean, noise, t), t).sample
                loss = (predicted - noise).square().mean()
                return loss, loss if header.objective == "loss" else predicted.square().sum() / predicted.numel()

            loss, expected = mean_gradient(value, list(model.parameters()), slot, header.draws)
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
    trace = open_trace(trained / "out" / "trace.zarr")
    assert (trace.complete, trace.header.objective, trace.header.draws) == (True, "squared_output", 3)
    check_digits(trace, trained)


@pytest.mark.parametrize(("objective", "draws"), [("squared_output", 3), ("squared_output", 1), ("loss", 3)])
def test_on_demand_gradients_are_those_of_the_reference_too(trained: Path, objective: str, draws: int) -> None:
    out = trained / f"{objective}{draws}.zarr"
    options = [*WHOLE, "--objective", objective, "--draws", draws, "--weights", "out/unet", "--out", out]
    command_line(["capture", *options, "--", trained / "train.py", *SHORT, "--output_dir", "x"], trained)
    trace = open_trace(out)
    assert (trace.header.objective, trace.header.draws) == (objective, draws)
    if (objective, draws) != ("squared_output", 3):
        check_digits(trace, trained)
        return
    first, again = open_trace(trained / "out" / "trace.zarr").rows(np.arange(4)), trace.rows(np.arange(4))
    assert np.linalg.norm(again - first) <= 1e-6 * np.linalg.norm(first)


def test_a_copied_training_image_finds_itself_first(trained: Path) -> None:
    (trained / "copies").mkdir()
    for k in (1, 3):
        shutil.copy(trained / "digits" / f"000{k}.png", trained / "copies" / f"copy{k}.png")
    command_line(["query", "--score", "dmin", "out/trace.zarr", "copies", "-k", "2", "--json", "hits.json"], trained)
    queries = json.loads((trained / "hits.json").read_text())["queries"]
    for query, sample in zip(queries, (1, 3), strict=True):
        assert query["hits"][0]["sample"] == sample
        assert query["hits"][0]["score"] == pytest.approx(len(TIMESTEPS), abs=1e-4)
        assert query["hits"][1]["score"] < len(TIMESTEPS) - 1e-3


def test_the_command_line_shows_what_is_not_usual(trained: Path) -> None:
    shown, _ = command_line(["info", "out/trace.zarr"], trained)
    assert any("objective" in line and "squared_output" in line for line in shown.splitlines())
    assert any("draws" in line and "3 at each timestep" in line for line in shown.splitlines())
    command = ["--", trained / "train.py", *SHORT, "--output_dir", "x"]
    said, _ = command_line(["estimate", *BOTH, *command], trained)
    assert "4 x 3, 3 draws each" in said and "are the mean of the draws" in said
    _, complaint = command_line(["capture", "--weights", "out/unet", "--objective", "square", *command], trained, 1)
    assert "objective is 'square'; expected one of loss, squared_output." in complaint


# -- a LoRA, with encoders that are remembered -----------------------------------------------------------------------


def test_a_lora_with_frozen_encoders(tmp_path: Path) -> None:
    tiny_pipeline(tmp_path / "sd")
    captioned_images(tmp_path / "images", 3)
    script = EXAMPLE.parent / "train_text_to_image_lora.py"
    text = script.read_text()
    line = "dmin_trace.attach(accelerator, args)"
    prepare = "    unet, optimizer, train_dataloader, lr_scheduler = accelerator.prepare("
    if text.count(line) != 1 or text.count(prepare) != 1:
        raise ValueError("the example has no such lines")
    settings = "timesteps=[100, 900], dimension=2**13, projection='uniform', dtype='float32', precondition='none'"
    text = text.replace(line, f"{line[:-1]}, {settings}, objective='squared_output', draws=2)")
    # Its hooks run a block twice, and throw away what was in between.
    text = text.replace(prepare, "    unet.enable_gradient_checkpointing()\n" + prepare)
    (tmp_path / "train.py").write_text(text)
    command = ["--pretrained_model_name_or_path", "sd", "--train_data_dir", "images", "--resolution", "32"]
    command += ["--max_train_steps", "6", "--train_batch_size", "3", "--learning_rate", "1e-2"]
    run([tmp_path / "train.py", *command, "--output_dir", "out"], tmp_path)
    trace = open_trace(tmp_path / "out" / "trace.zarr")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "sd", safety_checker=None)
    pipeline.load_lora_weights(tmp_path / "out", adapter_name="default")
    unet = pipeline.unet.eval()
    parameters = [p.requires_grad_() for name, p in unet.named_parameters() if "lora" in name]
    scheduler = DDPMScheduler.from_pretrained(tmp_path / "sd", subfolder="scheduler")
    for sample in range(3):
        pixels = torch.from_numpy(np.asarray(picture(sample)) / np.float32(127.5) - 1).permute(2, 0, 1)[None]
        tokens = pipeline.tokenizer(caption(sample), padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            posterior = pipeline.vae.encode(pixels).latent_dist
            words = pipeline.text_encoder(tokens)[0]
        for slot, timestep in enumerate((100, 900)):

            def value(
                generator: torch.Generator, posterior: Any = posterior, words: Any = words, timestep: int = timestep
            ) -> tuple[torch.Tensor, torch.Tensor]:
                latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
                noise = torch.randn(latents.shape, generator=generator)
                kept = scheduler.alphas_cumprod[timestep]
                noisy = kept.sqrt() * latents * pipeline.vae.config.scaling_factor + (1 - kept).sqrt() * noise
                predicted = unet(noisy, torch.tensor([timestep]), words).sample
                return (predicted - noise).square().mean(), predicted.square().mean()

            loss, expected = mean_gradient(value, parameters, slot, 2)
            assert trace.loss[sample, slot] == pytest.approx(loss, rel=1e-5)
            captured = torch.from_numpy(unshuffled(trace, sample))[slot]
            assert (captured - expected).norm() <= 1e-5 * expected.norm(), (sample, slot)


# -- which output is the denoiser's ----------------------------------------------------------------------------------

POINTS = torch.randn(5, 16, generator=torch.Generator().manual_seed(5))
WRAPPED = {
    "tensor": lambda output: output,
    "tuple": lambda output: (output, output.detach()),
    "list": lambda output: [output],
    "sample": lambda output: Answer(output),
    "dict": lambda output: {"other": output + 1, "sample": output},
}


class Answer:
    """As diffusers' models answer."""

    def __init__(self, sample: torch.Tensor) -> None:
        self.sample = sample


class Denoiser(torch.nn.Module):
    """Guesses the noise in 16 numbers."""

    def __init__(self, wrap: Callable[[torch.Tensor], Any] = WRAPPED["tensor"]) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(17, 24)
        self.outer = torch.nn.Linear(24, 16)
        self.wrap = wrap

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> Any:
        t = (timestep.reshape(-1, 1) / 1000).to(sample)
        return self.wrap(self.outer(torch.tanh(self.inner(torch.cat([sample, t.expand(len(sample), 1)], 1)))))


class Changed(torch.nn.Module):
    """A second model: adds to the first one's answer."""

    def __init__(self) -> None:
        super().__init__()
        self.more = torch.nn.Linear(16, 16)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> Any:
        return sample + self.more(sample) * timestep.reshape(-1, 1) / 1000


def denoiser(*args: Any) -> Denoiser:
    torch.manual_seed(1)
    return Denoiser(*args)


def unwrapped(output: Any) -> torch.Tensor:
    if isinstance(output, dict):
        output = output["sample"]
    output = getattr(output, "sample", output)
    found: torch.Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return found


Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From the noisy points, the timestep and the noise to the loss."""


def record(model: Any, step: Step | None = None, stop: int | None = None, **settings: Any) -> Any:
    """The documented loop over the points, which may stop early."""
    if "like" not in settings:
        settings = {
            "timesteps": [100, 900],
            "dimension": 1024,
            "dtype": "float32",
            "precondition": "none",
            "projection": "uniform",
        } | settings

    def usual(noisy: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return (unwrapped(model(noisy, t)).float() - noise).square().mean()

    with dmin_trace.recording(model, samples=len(POINTS), **settings) as recording:
        for i in recording.samples:
            if i == stop:
                raise KeyboardInterrupt
            for k in recording.slots:
                with recording.body(i, k):
                    noise, t = torch.randn(1, 16), torch.randint(0, 1000, (1,))
                    (step or usual)(POINTS[i : i + 1] + noise * t.reshape(-1, 1) / 1000, t, noise).backward()
    return recording


def check_points(
    path: Path, output_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], trained: torch.nn.Module
) -> None:
    """The gradients in a store are those of the squared output."""
    trace = open_trace(path)
    parameters = [p for p in trained.parameters() if p.requires_grad]
    for sample in range(len(POINTS)):
        for slot, timestep in enumerate((100, 900)):

            def value(
                generator: torch.Generator, sample: int = sample, timestep: int = timestep
            ) -> tuple[torch.Tensor, torch.Tensor]:
                noise, t = torch.randn(1, 16, generator=generator), torch.tensor([timestep])
                output = output_of(POINTS[sample : sample + 1] + noise * t.reshape(-1, 1) / 1000, t)
                return (output - noise).square().mean(), output.square().sum() / output.numel()

            _, expected = mean_gradient(value, parameters, slot, trace.header.draws)
            captured = torch.from_numpy(unshuffled(trace, trace.slot_of(sample)))[slot]
            assert (captured - expected).norm() <= 1e-5 * expected.norm(), (sample, slot)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`-wrapped function")
@pytest.mark.parametrize("way", [*WRAPPED, "changed in place", "checkpointed", "compiled", "two", "scaled"])
def test_the_output_is_found_however_it_is_handed_out(tmp_path: Path, way: str) -> None:
    model = denoiser(WRAPPED.get(way, WRAPPED["tensor"]))
    step: Step | None = None
    if way == "changed in place":

        def step(noisy: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            # A weighting, say; the output was another.
            return (model(noisy, t).mul_(3).add_(1) - noise).square().mean()
    elif way == "checkpointed":

        def step(noisy: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            return (checkpoint(model, noisy, t, use_reentrant=False) - noise).square().mean()
    elif way == "compiled":
        compiled = torch.compile(model, backend="aot_eager")

        def step(noisy: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            return (compiled(noisy, t) - noise).square().mean()
    elif way == "two":

        def step(noisy: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            # A guess that is fed back, and one that is only looked at.
            loss = (model(noisy - model(noisy, t).detach(), t) - noise).square().mean()
            return loss + 0 * model(noisy, t).detach().sum() + 0 * unused(model, noisy, t)
    elif way == "scaled":
        scaler = torch.amp.GradScaler("cpu")

        def step(noisy: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            return scaler.scale((model(noisy, t) - noise).square().mean())

    record(model, step, out=tmp_path / "trace.zarr", objective="squared_output", draws=2)

    def output_of(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return unwrapped(model(noisy - model(noisy, t).detach() if way == "two" else noisy, t))

    check_points(tmp_path / "trace.zarr", output_of, model)


def unused(model: torch.nn.Module, noisy: torch.Tensor, t: torch.Tensor) -> float:
    """The loss does not depend on this call, though a gradient goes through its output."""
    return model(noisy * 2, t).detach().sum().item()


def test_the_denoiser_is_the_last_model_that_the_loss_depends_on(tmp_path: Path) -> None:
    first, second = denoiser(), Changed()
    for parameter in second.parameters():
        parameter.requires_grad = False

    def step(noisy: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return (second(first(noisy, t), t) - noise).square().mean()

    record([first, second], step, out=tmp_path / "trace.zarr", objective="squared_output")
    check_points(tmp_path / "trace.zarr", lambda noisy, t: second(first(noisy, t), t), first)


def test_bfloat16_autocast_is_that_of_the_loop(tmp_path: Path) -> None:
    model = denoiser()

    def step(noisy: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (model(noisy, t) - noise).square().mean()

    record(model, step, out=tmp_path / "trace.zarr", objective="squared_output")
    trace = open_trace(tmp_path / "trace.zarr")
    for slot, timestep in enumerate((100, 900)):
        noise, t = (
            torch.randn(1, 16, generator=torch.Generator().manual_seed(noise_seed(slot, 0))),
            torch.tensor([timestep]),
        )
        with torch.autocast("cpu", torch.bfloat16):
            output = model(POINTS[:1] + noise * t.reshape(-1, 1) / 1000, t)
        assert output.dtype == torch.bfloat16
        gradients = torch.autograd.grad(output.float().square().mean(), list(model.parameters()))
        expected = torch.cat([g.flatten() for g in gradients])
        captured = torch.from_numpy(unshuffled(trace, 0))[slot]
        assert (captured - expected).norm() <= 1e-5 * expected.norm()


def test_what_cannot_be_told_is_refused(tmp_path: Path) -> None:
    model = denoiser(lambda output: ([output, output], output.sum()))
    step: Step

    def step(noisy: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return (model(noisy, t)[0][1] - noise).square().mean()

    with pytest.raises(CaptureError, match="Denoiser, gave a tuple; expected a tensor, a tuple that begins with one"):
        record(model, step, out=tmp_path / "a.zarr", objective="squared_output")
    other = denoiser()

    def past(noisy: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return (other.forward(noisy, t) - noise).square().mean() + float(other(noisy, t).detach().sum()) * 0

    with pytest.raises(CaptureError, match="cannot be told which model is the denoiser.* were called: Denoiser"):
        record(other, past, out=tmp_path / "b.zarr", objective="squared_output")
    assert not list(tmp_path.glob("*.zarr"))


# -- accelerate's loops ----------------------------------------------------------------------------------------------

ATTACH = (
    "dmin_trace.attach(accelerator, args, timesteps=[100, 900], dimension=1024, dtype='float32', precondition='none'"
)
LINE = f"{ATTACH}, projection='uniform', objective='squared_output', draws=2)"
LOOPS = {
    "its own": {},
    "in bfloat16": {"accelerator": "accelerator = Accelerator(mixed_precision='bf16')"},
    "compiled": {
        "accelerator": "accelerator = Accelerator(dynamo_backend='aot_eager')",
    },
    "a denoiser that is not trained": {
        "imports": "import dmin_trace\n"
        "def words(forward): return lambda self, sample, when: forward(self, sample, when)",
        "accelerator": "Denoiser.forward = words(Denoiser.forward)\n    "
        "denoiser = Frozen(); accelerator = Accelerator()",
        "body": BODY.replace("model(clean + noise", "denoiser(model, clean + noise"),
    },
}
FROZEN = """
class Frozen(torch.nn.Module):
    def forward(self, trained, sample, timestep):
        return trained(sample, timestep) * 2
"""


@pytest.mark.parametrize("way", LOOPS)
def test_a_loop_is_captured_and_not_disturbed(tmp_path: Path, way: str) -> None:
    parts = {"imports": "import dmin_trace"} | LOOPS[way]
    script = plain_script(tmp_path / "with.py", **parts | {"imports": parts["imports"] + FROZEN, "attach": LINE})
    bare = without_the_line(script, tmp_path / "without.py")
    for name, path in (("with", script), ("without", bare)):
        run([path, "--output_dir", name, "--count", "5"], tmp_path)
    for name in ("state.pt", "log.txt"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    model = Denoiser().eval()
    saved = torch.load(tmp_path / "with" / "state.pt", weights_only=False)["model"]
    model.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in saved.items()})

    def output_of(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in way):
            output = model(noisy, t)
        return output.float() * 2 if "not trained" in way else output.float()

    check_points(tmp_path / "with" / "trace.zarr", output_of, model)


def test_a_loop_whose_output_cannot_be_told_ends_as_it_would_have(tmp_path: Path) -> None:
    body = BODY.replace("(model(clean", "(model.forward(clean")
    # The timestep is seen by a call that the loss does not depend on.
    body = body.replace("loss =", "model(clean, t); loss =")
    script = plain_script(tmp_path / "with.py", body=body, attach=LINE)
    bare = without_the_line(script, tmp_path / "without.py")
    ran = run([script, "--output_dir", "with"], tmp_path)
    run([bare, "--output_dir", "without"], tmp_path)
    assert "cannot be told which model is the denoiser" in ran.stderr and "Traceback" not in ran.stderr
    for name in ("state.pt", "log.txt"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_two_processes_capture_what_one_does(tmp_path: Path) -> None:
    script = plain_script(tmp_path / "script.py", attach=LINE)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run([*launch, script, "--output_dir", "several", "--count", "5"], tmp_path, ACCELERATE_USE_CPU="true")
    model = Denoiser().eval()
    saved = torch.load(tmp_path / "several" / "state.pt", weights_only=False)["model"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in saved.items()})
    trace = open_trace(tmp_path / "several" / "trace.zarr")
    assert sorted(trace.sample.tolist()) == list(range(5))
    check_points(trace.path, model, model)


# -- draws -----------------------------------------------------------------------------------------------------------


def test_the_first_draw_is_that_of_one_draw() -> None:
    one, three = (make_slots(Settings(timesteps=4, seed=9, draws=draws)) for draws in (1, 3))
    assert three[::3] == one
    assert len({slot.seed for slot in three}) == 12
    assert [(slot.number, slot.draw) for slot in three] == [(k, d) for k in range(4) for d in range(3)]


def test_tensors_that_autograd_shares_are_not_added_twice(tmp_path: Path) -> None:
    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (torch.nn.Parameter(torch.zeros(16)) for _ in range(2))
            self.c = torch.nn.Parameter(torch.zeros(()))

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return (sample[0] + self.a + self.b + self.c)[None]

    model = Shared()
    record(model, out=tmp_path / "trace.zarr", objective="squared_output", draws=4)
    check_points(tmp_path / "trace.zarr", model, model)


@pytest.mark.parametrize("kind", ["sign", "adam"])
def test_the_mean_comes_before_preconditioning(tmp_path: Path, kind: str) -> None:
    model = denoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(POINTS, torch.full((5,), 500)).square().mean().backward()
    optimizer.step()
    model.zero_grad()
    for name, settings in (("mean", {}), ("done", {"precondition": kind, "optimizer": optimizer})):
        record(model, out=tmp_path / f"{name}.zarr", objective="loss", draws=3, **settings)
    divisors = torch.cat([(s["exp_avg_sq"] / 0.001).sqrt().flatten() + 1e-8 for s in optimizer.state.values()])
    for sample in range(5):
        mean, done = (
            torch.from_numpy(unshuffled(open_trace(tmp_path / f"{name}.zarr"), sample)) for name in ("mean", "done")
        )
        expected = mean.sign() if kind == "sign" else mean / divisors
        assert (done - expected).norm() <= 1e-4 * expected.norm()


def test_a_random_branch_between_draws_is_refused(tmp_path: Path) -> None:
    model = denoiser()

    def step(noisy: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        if np.random.rand() < 0.5:
            noise = noise + 0.1 * torch.randn(1, 16)
        return (model(noisy, t) - noise).square().mean()

    with pytest.raises(CaptureError, match="In draw [1-7] of slot [01] the script drew randn\\(1, 16\\)"):
        record(model, step, out=tmp_path / "trace.zarr", draws=8)


# -- kept, met again, refused ----------------------------------------------------------------------------------------


def interrupted(folder: Path, **settings: Any) -> Denoiser:
    """A store of which one chunk of three is done."""
    model = denoiser()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmin_trace.store.CHUNK_BYTES", 2 * 2 * 1024 * 4)
        with pytest.raises(KeyboardInterrupt):
            record(model, stop=3, out=folder / "trace.zarr", **settings)
    return model


def test_a_recording_goes_on_with_the_same_alone(tmp_path: Path) -> None:
    model = interrupted(tmp_path, objective="squared_output", draws=2)
    for settings, shown in (
        ({}, "loss, draws 1"),
        ({"objective": "squared_output"}, "squared_output, draws 1"),
        ({"draws": 2}, "loss, draws 2"),
    ):
        with pytest.raises(TraceError, match=f"are of squared_output, draws 2, those of this run of {shown}"):
            record(model, out=tmp_path / "trace.zarr", **settings)
    record(model, out=tmp_path / "trace.zarr", objective="squared_output", draws=2)
    check_points(tmp_path / "trace.zarr", model, model)
    hits = record(model, like=tmp_path / "trace.zarr").hits(score="dmin", k=2)
    assert [row[0].sample for row in hits] == list(range(5))
    assert all(row[0].score == pytest.approx(2, abs=1e-5) for row in hits)
    for name, value in (("objective", "loss"), ("draws", 1)):
        with pytest.raises(SettingsError, match=f"{name} was given with like"):
            record(model, like=tmp_path / "trace.zarr", **{name: value})


def change(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    facts = json.loads((path / "zarr.json").read_text())
    change(facts["attributes"])
    facts["attributes"].pop("checksums", None)
    (path / "zarr.json").write_text(json.dumps(facts))


def test_a_store_from_before_is_of_the_loss_and_one_draw(tmp_path: Path) -> None:
    model = interrupted(tmp_path)
    path = tmp_path / "trace.zarr"

    def older(attributes: dict[str, Any]) -> None:
        for name in ("objective", "draws"):
            del attributes[name], attributes["settings"][name]

    change(path, older)
    header = open_trace(path, unfinished=True).header
    assert (header.objective, header.draws) == ("loss", 1)
    for settings in ({"objective": "squared_output"}, {"draws": 2}):
        with pytest.raises(TraceError, match="are of loss, draws 1, those of this run of"):
            record(model, out=path, **settings)
    record(model, out=path)
    assert [row[0].sample for row in record(model, like=path).hits(score="dmin", k=1)] == list(range(5))
    shown = dict(store.facts(open_trace(path)))
    assert "objective" not in shown and "draws" not in shown


def test_a_store_from_before_its_width_was_kept_is_gone_on_with_asked_and_folded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All rows were wide then; today's of this model's gradient are of 256.
    settings = {"projection": "rotation", "dimension": 64}
    with monkeypatch.context() as patch:
        patch.setattr("dmin_trace.compress.NARROW", compress.WIDTH)
        model = interrupted(tmp_path, **settings)
    monkeypatch.setattr("dmin_trace.compress.NARROW", 256)
    path = tmp_path / "trace.zarr"
    change(path, lambda attributes: attributes["projection"].pop("width"))
    for other, shown in (
        ({"dimension": 2048}, "its dimension is 64"),
        ({"projection": "uniform"}, "its projection.fi"),
    ):
        with pytest.raises(TraceError, match=f"belongs to another capture: {shown}"):
            record(model, out=path, **settings | other)
    record(model, out=path, **settings)
    record(model, out=tmp_path / "new.zarr", **settings)
    pack(open_trace(path), tmp_path / "folded.zarr", dimension=32)
    for name, width in (("trace", 0), ("folded", 1024), ("new", 256)):
        header = open_trace(tmp_path / f"{name}.zarr").header
        assert header.projection.width == width
        # An index knows its store by its attributes.
        assert ("width" in header.to_attributes()["projection"]) == bool(width)
        hits = record(model, like=tmp_path / f"{name}.zarr").hits(score="dmin", k=1)
        assert [row[0].sample for row in hits] == list(range(5))
        assert all(row[0].score == pytest.approx(2, abs=1e-5) for row in hits)


def test_a_width_that_a_store_cannot_have_is_refused(tmp_path: Path) -> None:
    model, path = denoiser(), tmp_path / "trace.zarr"
    record(model, out=path, projection="rotation", dimension=64)
    change(path, lambda attributes: attributes["projection"].update(width=2**40))
    with pytest.raises(SettingsError, match=f"width is {2**40}, which does not fit"):
        record(model, like=path)
    change(path, lambda attributes: attributes["projection"].update(width=-1))
    with pytest.raises(TraceError, match="its attribute projection.width is -1"):
        record(model, like=path)


def test_a_header_that_cannot_be_meant_is_damaged(tmp_path: Path) -> None:
    model = denoiser()
    path = tmp_path / "trace.zarr"
    record(model, out=path, objective="squared_output")
    for name, value in (("objective", "root"), ("objective", None), ("draws", 0), ("draws", True), ("draws", 10**9)):
        before = (path / "zarr.json").read_text()
        change(path, lambda attributes, name=name, value=value: attributes.update({name: value}))  # type: ignore[misc]
        with pytest.raises(TraceError, match=f"its attribute {name} is"):
            open_trace(path)
        (path / "zarr.json").write_text(before)
    change(path, lambda attributes: attributes.update({"objective": "loss"}))
    with pytest.raises(QueryError, match="are of squared_output, draws 1, those of .* of loss, draws 1"):
        record(model, like=path)
