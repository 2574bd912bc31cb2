"""The loop driver on small real scripts: what it leaves untouched, in which loops it works, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from loop_scripts import ACCUMULATE, BREAK
from tiny import BODY, plain_script, run, without_the_line
from warm import Warm

from dmin_trace.store import open_store
from dmin_trace.views import describe_store

TRACKER = """from accelerate.tracking import GeneralTracker
class FileTracker(GeneralTracker):
    name, requires_logging_directory = "file", False
    @property
    def tracker(self):
        return None
    def store_init_configuration(self, values):
        self.log({"config": str(sorted(values))}, 0)
    def log(self, values, step, **options):
        Path(args.output_dir).mkdir(exist_ok=True)
        with Path(args.output_dir, "tracked.txt").open("a") as file:
            file.write(f"{step} {values}\\n")
import dmin_trace"""
TRACKED = BREAK.replace(
    "global_step += 1\n",
    """global_step += 1
                accelerator.log({'loss': losses[-1]}, step=global_step)
            accelerator.log({'lr': scheduler.get_last_lr()}, step=global_step)
""",
)
OWN_LOOPS = {
    "runs out, no accumulate": {},
    "runs out, through tqdm": {"loader": "tqdm(loader, disable=True)"},
    "runs out, accumulating": {
        "accelerator": "accelerator = Accelerator(gradient_accumulation_steps=2)",
        "body": ACCUMULATE,
    },
    "breaks": {"accelerator": "accelerator = Accelerator(); args.max_train_steps = 5", "body": BREAK},
    "breaks, accumulating, in the middle of an epoch": {
        "accelerator": "accelerator = Accelerator(gradient_accumulation_steps=2); args.max_train_steps = 3",
        "body": BREAK,
    },
    "breaks, numpy and python draws": {
        "accelerator": "accelerator = Accelerator(); args.max_train_steps = 4",
        "body": BREAK.replace("noise = ", "np.random.rand(); random.random(); noise = "),
    },
    "keeps its last gradients": {
        "body": BODY.replace("optimizer.zero_grad()", "").replace("clean = ", "optimizer.zero_grad(); clean = ")
    },
    "breaks, tracked": {
        "imports": TRACKER,
        "accelerator": "accelerator = Accelerator(log_with=FileTracker()); args.max_train_steps = 5;"
        "accelerator.init_trackers('run', {})",
        "body": TRACKED,
    },
    "breaks, resumed from a checkpoint in a folder named like one": {
        "accelerator": "accelerator = Accelerator(); args.max_train_steps = 7",
        "prepare": "model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler);"
        "accelerator.save_state('checkpoint-100/checkpoint-2'); accelerator.load_state('checkpoint-100/checkpoint-2')",
        "body": BREAK.replace("global_step >= args", "2 + global_step >= args"),
    },
    "an unprepared scheduler": {
        "prepare": "model, optimizer, loader = accelerator.prepare(model, optimizer, loader)",
    },
}


@pytest.mark.parametrize("parts", OWN_LOOPS.values(), ids=OWN_LOOPS.keys())
def test_a_script_ends_as_it_would_have_bit_for_bit(tmp_path: Path, warm: Warm, parts: dict[str, str]) -> None:
    script = plain_script(tmp_path / "with.py", **parts)
    bare = without_the_line(script, tmp_path / "without.py")
    warm.run([script, "--output_dir", "with"], tmp_path)
    run([bare, "--output_dir", "without"], tmp_path)
    written = sorted(path.name for path in (tmp_path / "without").iterdir())
    assert (
        written[-2:] == ["state.pt", "tracked.txt"] if "tracked" in str(parts) else written == ["log.txt", "state.pt"]
    )
    for name in written:
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes(), name
    trace = open_store(tmp_path / "with.trace" / "trace.zarr")
    assert trace.complete
    assert trace.sample.tolist() == list(range(10))
    assert trace.column("caption")[7] == "point 7"
    check_against_plain_autograd(trace.path, tmp_path / "with" / "state.pt")


def check_against_plain_autograd(path: Path, state: Path) -> None:
    """Norm, loss and direction of every captured gradient, from the weights that the script saved itself."""
    from dmin_trace.capture.pinning import pinned_timesteps
    from dmin_trace.project import compress_gradient, make_plan
    from dmin_trace.settings import make_settings

    trace = open_store(path)
    saved = torch.load(state, weights_only=False)["model"]
    weights = {name: value.clone().requires_grad_() for name, value in saved.items()}
    points = torch.randn(10, 16, generator=torch.Generator().manual_seed(5))
    facts = trace.header.projection
    plan = make_plan(facts.length, trace.header.dimension, facts.seed, "rotation", facts.width)
    rows = trace.gradients(np.arange(10))
    for pinned in pinned_timesteps(make_settings(trace.header.settings)):
        t = torch.tensor([pinned.index_in(1000)])
        assert trace.header.timesteps[pinned.number] == t.item()
        for sample in range(10):
            torch.manual_seed(pinned.seed)
            noise = torch.randn(1, 16)
            noisy = points[sample : sample + 1] + noise * t.reshape(-1, 1) / 1000
            hidden = torch.cat([noisy, t.reshape(-1, 1).float() / 1000], 1)
            hidden = torch.tanh(hidden @ weights["inner.weight"].T + weights["inner.bias"])
            loss = (hidden @ weights["outer.weight"].T + weights["outer.bias"] - noise).pow(2).mean()
            gradients = torch.autograd.grad(loss, list(weights.values()))
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            sketch, _ = compress_gradient(iter(gradients), plan)
            assert trace.norm[sample, pinned.number] == pytest.approx(norm.item(), rel=1e-5)
            assert trace.loss[sample, pinned.number] == pytest.approx(loss.item(), rel=1e-5)
            difference = np.linalg.norm(rows[sample, pinned.number] - sketch.numpy())
            assert difference <= 1e-5 * np.linalg.norm(sketch.numpy())


DRAW = "torch.randint(0, 1000, (len(clean),))"
WRONG = {
    "another backward": (
        {"body": BODY.replace("accelerator.backward(loss)", "loss.backward()")},
        "accelerator.backward",
    ),
    "an unpinned draw": (
        {"body": BODY.replace(DRAW, "torch.tensor([random.Random(5).randint(0, 999)] * len(clean))")},
        "timestep cannot be pinned in the training step of sample 0",
    ),
    "noise that differs": (
        {"body": BODY.replace("noise = torch", "torch.randn(2) if batch['index'][0] == 3 else 0; noise = torch")},
        "sample 3 the script drew randn",
    ),
    "timesteps that differ": (
        {"body": BODY.replace("t.reshape(-1, 1) / 1000, t)", "t.reshape(-1, 1) / 1000, t + batch['index'])")},
        "denoiser saw timestep",
    ),
    "no optimizer": (
        {"prepare": "model, loader, scheduler = accelerator.prepare(model, loader, scheduler)"},
        "No optimizer was passed",
    ),
    "parameters without a gradient": (
        {
            "body": BODY.replace(
                ".pow(2).mean()", ".pow(2).mean(); loss = loss if model.training else model.inner.weight.sum()"
            )
        },
        "does not depend on 3 of the 4",
    ),
    "no such column": ({"attach": "dmin_trace.attach(accelerator, args, columns=['nothing'])"}, "no readable column"),
    "another end": ({"attach": "dmin_trace.attach(accelerator, args, num_epochs=99)"}, "not recognised"),
    "a timestep beyond the schedule": (
        {"attach": "dmin_trace.attach(accelerator, args, timesteps=[5, 1000])"},
        "The settings have timestep 1000",
    ),
}


def test_parameters_that_the_training_does_not_reach_are_captured_as_zeros(tmp_path: Path) -> None:
    body = BODY.replace(".pow(2).mean()", ".pow(2).mean().detach() + model.inner.weight.pow(2).sum()")
    ran = run([plain_script(tmp_path / "with.py", body=body), "--output_dir", "with"], tmp_path)
    assert "does not depend on 3 of the 4" in ran.stderr and "gradients are zero" in ran.stderr
    trace = open_store(tmp_path / "with.trace" / "trace.zarr")
    assert trace.complete and trace.header.unreached == ("inner.bias", "outer.weight", "outer.bias")
    shown = dict(describe_store(trace))["never reached"]
    assert shown == "3 tensors, among them inner.bias, outer.weight, outer.bias; their gradients are zero"


def test_a_step_may_write_back_what_was_there(tmp_path: Path) -> None:
    back = "\n            with torch.no_grad(): model.inner.bias[1:] = model.inner.bias[1:].clone()"
    run([plain_script(tmp_path / "with.py", body=BODY + back), "--output_dir", "with"], tmp_path)
    assert open_store(tmp_path / "with.trace" / "trace.zarr").complete


def test_the_denoiser_may_be_one_that_is_not_trained(tmp_path: Path) -> None:
    body = BODY.replace("model(clean + noise", "denoiser(model, clean + noise")
    accelerator = """
    class Frozen(torch.nn.Module):
        def forward(self, trained, sample, timestep):
            return trained(sample, timestep)
    denoiser = Frozen()
    accelerator = Accelerator()"""
    imports = "import dmin_trace\ndef words(forward): return lambda self, sample, when: forward(self, sample, when)\n"
    rename = "Denoiser.forward = words(Denoiser.forward)\n    "
    script = plain_script(tmp_path / "with.py", body=body, accelerator=rename + accelerator.strip(), imports=imports)
    run([script, "--output_dir", "with"], tmp_path)
    assert open_store(tmp_path / "with.trace" / "trace.zarr").complete


@pytest.mark.parametrize(("parts", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_would_give_wrong_gradients_stops_the_capture_and_not_the_training(
    tmp_path: Path, warm: Warm, parts: dict[str, str], message: str
) -> None:
    script = plain_script(tmp_path / "with.py", **parts)
    bare = without_the_line(script, tmp_path / "without.py")
    said = warm.run([script, "--output_dir", "with"], tmp_path)
    warm.run([bare, "--output_dir", "without"], tmp_path)
    assert message in said
    assert "Traceback" not in said
    assert (tmp_path / "with" / "state.pt").read_bytes() == (tmp_path / "without" / "state.pt").read_bytes()
    assert (tmp_path / "with" / "log.txt").read_bytes() == (tmp_path / "without" / "log.txt").read_bytes()
    # The same by the command line is one red line and exit code 1.
    text = script.read_text()
    script.write_text(text.replace("num_epochs=99", ""))
    if "num_epochs=99" not in text:
        said = warm.run(["dmin-trace", "run", "--", script, "--output_dir", "again"], tmp_path, code=1)
        assert message in said
        assert "Traceback" not in said


def test_a_failure_inside_a_breaking_loop_still_runs_the_deferred_end(tmp_path: Path) -> None:
    parts = {
        "accelerator": "accelerator = Accelerator(); args.max_train_steps = 5",
        "body": BREAK.replace(
            "noise = torch", "noise = torch.randn(2) if batch['index'][0] == 3 else 0; noise = torch"
        ),
    }
    script = plain_script(tmp_path / "with.py", **parts)
    bare = without_the_line(script, tmp_path / "without.py")
    ran = run([script, "--output_dir", "with"], tmp_path)
    run([bare, "--output_dir", "without"], tmp_path)
    assert "could not capture this run; the training continues" in ran.stderr
    for name in ("state.pt", "log.txt"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes(), name


def test_strict_ends_the_training(tmp_path: Path, warm: Warm) -> None:
    script = plain_script(
        tmp_path / "script.py",
        attach="dmin_trace.attach(accelerator, args, strict=True)",
        body=BODY.replace(DRAW, "torch.tensor([random.Random(5).randint(0, 999)] * len(clean))"),
    )
    assert "cannot be pinned" in warm.run([script], tmp_path, code=1)
    assert not (tmp_path / "out" / "state.pt").exists()


PREPARE = "model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)"
STREAM = f"""class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(Points(args.count))
    loader = torch.utils.data.DataLoader(Stream(), batch_size=4)
    {PREPARE}"""
REFUSED_LINES = {
    "no end": ({"attach": "dmin_trace.attach(accelerator)"}, "does not know when the training ends"),
    "no place": ({"attach": "dmin_trace.attach(accelerator, num_epochs=2)"}, "does not know where to write"),
    "after prepare": (
        {"attach": "", "prepare": f"{PREPARE}\n    dmin_trace.attach(accelerator, args)"},
        "stands after accelerator.prepare",
    ),
    "a stream": ({"prepare": STREAM}, "is an IterableDataset, whose samples have no index"),
}


@pytest.mark.parametrize(("parts", "message"), REFUSED_LINES.values(), ids=REFUSED_LINES.keys())
def test_a_line_that_refuses_says_why_in_one_line_and_lets_the_training_run(
    tmp_path: Path, warm: Warm, parts: dict[str, str], message: str
) -> None:
    script = plain_script(tmp_path / "with.py", **parts)
    bare = without_the_line(script, tmp_path / "without.py")
    said = warm.run([script, "--output_dir", "with"], tmp_path)
    warm.run([bare, "--output_dir", "without"], tmp_path)
    assert "could not capture this run; the training continues." in said and message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "with" / "trace.zarr").exists()
    for name in ("state.pt", "log.txt"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes(), name


def test_an_invalid_setting_is_refused_before_the_training(tmp_path: Path, warm: Warm) -> None:
    script = plain_script(tmp_path / "script.py", attach="dmin_trace.attach(accelerator, args, dimension=1000)")
    assert "expected a power of two" in warm.run([script], tmp_path, code=1)


def test_a_second_line_changes_nothing(tmp_path: Path, warm: Warm) -> None:
    line = "dmin_trace.attach(accelerator, args, timesteps=2, dimension=64)"
    script = plain_script(tmp_path / "script.py", attach=f"{line}; {line.replace('64', '128')}")
    assert "called twice" in warm.run([script], tmp_path)
    assert open_store(tmp_path / "out.trace" / "trace.zarr").header.dimension == 64


def test_after_an_exception_of_the_scripts_own_nothing_is_said(tmp_path: Path, warm: Warm) -> None:
    body = BODY.replace("noise = torch", "raise RuntimeError('of its own'); noise = torch")
    said = warm.run([plain_script(tmp_path / "script.py", body=body)], tmp_path, code=1)
    assert said.splitlines()[-1] == "RuntimeError: of its own" and "captured nothing" not in said


def test_remove_takes_every_wrapper_off(tmp_path: Path, warm: Warm) -> None:
    script = plain_script(
        tmp_path / "script.py",
        attach="before = set(vars(accelerator)); driver = dmin_trace.attach(accelerator, args)",
        prepare="model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler);"
        "other = accelerator.prepare(torch.utils.data.DataLoader([1])); kind = type(other).__mro__[1];"
        "assert type(loader) is not kind;"
        "driver.remove(); assert set(vars(accelerator)) == before; assert type(loader) is kind",
    )
    warm.run([script], tmp_path)
    assert not (tmp_path / "out.trace" / "trace.zarr").exists()
