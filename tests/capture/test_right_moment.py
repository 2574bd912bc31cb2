"""A trace is of the final weights or says otherwise; and a loop that would be disturbed is left alone."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch
from loop_scripts import ACCUMULATE, BREAK
from safetensors.torch import load_file, save_file
from tiny import plain_script, without_the_line
from warm import Warm

import dmin_trace
from dmin_trace.errors import TraceError
from dmin_trace.store import open_store

PREPARE = "model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)"
LOOP = "for step, batch in enumerate(loader):"
END = "    Path(args.output_dir).mkdir"
FIVE = "accelerator = Accelerator(); args.max_train_steps = 5"
Changes = tuple[tuple[str, str], ...]


def both(folder: Path, warm: Warm, changes: Changes, parts: dict[str, str]) -> str:
    """Runs a script with and without the line, compares what it writes, and gives what it says with the line."""
    script = plain_script(folder / "with.py", **parts)
    text = script.read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    script.write_text(text)
    said = warm.run([script, "--output_dir", "with"], folder)
    warm.run([without_the_line(script, folder / "without.py"), "--output_dir", "without"], folder)
    for name in ("state.pt", "log.txt"):
        assert (folder / "with" / name).read_bytes() == (folder / "without" / name).read_bytes(), name
    assert sorted(p.name for p in (folder / "with").iterdir()) == ["log.txt", "state.pt"]
    return said


AVERAGE = """import dmin_trace
class Average:
    def __init__(self, model): self.values = {k: v.detach().clone() for k, v in model.state_dict().items()}
    def update(self, model):
        for k, v in model.state_dict().items(): self.values[k].lerp_(v.detach(), 0.1)"""
WITH_AVERAGE = f"{PREPARE}; average = Average(model)"
SAVED = ('"random":', '"average": average.values, "random":')
LEFT_ALONE: dict[str, tuple[Changes, dict[str, str], str]] = {
    "an average after every batch": (
        (SAVED,),
        {
            "imports": AVERAGE,
            "prepare": WITH_AVERAGE,
            "accelerator": FIVE,
            "body": BREAK + "\n            average.update(model)",
        },
        "`average.update(model)` outside",
    ),
    "next in a loop over range": (
        ((LOOP, "batches = iter(loader)\n        for step in range(3):\n            batch = next(batches)"),),
        {"accelerator": FIVE, "body": ACCUMULATE},
        "runs over range(3)",
    ),
    "a loader that is not prepared": (
        (),
        {"prepare": PREPARE.replace("loader, ", ""), "accelerator": FIVE, "body": BREAK},
        "never passed to accelerator.prepare",
    ),
    "a line after prepare": (
        (),
        {"attach": "pass", "prepare": f"{PREPARE}\n    dmin_trace.attach(accelerator, args)"},
        "stands after accelerator.prepare",
    ),
    "a count that does not wait": (
        (),
        {"accelerator": FIVE, "body": BREAK.replace("global_step += 1", "pass") + "\n            global_step += 1"},
        "is left by global_step",
    ),
}


@pytest.mark.parametrize(("changes", "parts", "words"), LEFT_ALONE.values(), ids=LEFT_ALONE.keys())
def test_a_loop_that_would_be_disturbed_is_left_alone_and_named(
    tmp_path: Path, warm: Warm, changes: Changes, parts: dict[str, str], words: str
) -> None:
    said = both(tmp_path, warm, changes, parts)
    assert words in said and "the training continues" in said and "dmin-trace capture --weights" in said
    assert len(said.strip().splitlines()) == 1, said
    assert not (tmp_path / "with.trace").exists()


def test_the_loader_that_is_trained_on_is_captured(tmp_path: Path, warm: Warm) -> None:
    held = "held = torch.utils.data.DataLoader(Points(4), batch_size=2); "
    prepare = PREPARE.replace("optimizer, loader", "optimizer, held, loader")
    changes = (("model.train()\n", "model.train(); [None for _ in held]\n"),)
    said = both(tmp_path, warm, changes, {"prepare": held + prepare, "accelerator": FIVE, "body": BREAK})
    trace = open_store(tmp_path / "with.trace" / "trace.zarr")
    assert said == "" and trace.complete and trace.final
    assert [trace.column("caption")[row] for row in trace.sample.argsort()] == [f"point {k}" for k in range(10)]
    weights = tmp_path / "with.trace" / "trace.weights.safetensors"
    capture = ["dmin-trace", "capture", "--weights", weights, "--out", "demand.zarr", "--dtype", "float32"]
    settings = ["--timesteps", 3, "--dimension", 64, "--transform", "none"]
    warm.run([*capture, *settings, "--", tmp_path / "without.py", "--output_dir", "demand"], tmp_path)
    again = open_store(tmp_path / "demand.zarr")
    assert again.sample.tolist() == trace.sample.tolist()
    assert abs(again.gradients(trace.sample) - trace.gradients(trace.sample)).max() <= 1e-6


def test_a_step_in_a_function_ends_as_it_would_have(tmp_path: Path, warm: Warm) -> None:
    """What the deferred end of the last step logs is of the last training batch, also from a function of its own."""
    text = textwrap.indent(textwrap.dedent("            " + ACCUMULATE), "        ")
    function = f"    def body(batch):\n        nonlocal total, global_step\n{text}        return loss\n"
    changes = (("    for epoch in", f"{function}    for epoch in"),)
    call = "loss = body(batch)\n            if global_step >= args.max_train_steps:\n                break"
    assert both(tmp_path, warm, changes, {"accelerator": FIVE, "body": call}) == ""
    assert open_store(tmp_path / "with.trace" / "trace.zarr").final


def test_a_loop_over_range_is_captured_on_demand_if_it_is_long_enough(tmp_path: Path, warm: Warm) -> None:
    script = plain_script(tmp_path / "script.py", imports="", attach="", accelerator=FIVE, body=ACCUMULATE)
    loop = "steps, batches = 10 * args.num_epochs, iter(loader)\n        for step in range(steps):\n            "
    script.write_text(script.read_text().replace(LOOP, f"{loop}batch = next(batches)"))
    layers = torch.nn.Linear(17, 24), torch.nn.Linear(24, 16)
    names = ("inner.weight", "inner.bias", "outer.weight", "outer.bias")
    values = [value.detach() for layer in layers for value in layer.parameters()]
    save_file(dict(zip(names, values, strict=True)), tmp_path / "weights.safetensors")
    options = ["--weights", "weights.safetensors", "--out", "a.zarr", "--timesteps", 3, "--dimension", 64]
    command = ["dmin-trace", "capture", *options, "--", script]
    said = " ".join(warm.run([*command, "--num_epochs", 2], tmp_path, code=1).split())
    assert "takes 20 batches; the capture needs 36" in said and "--max_train_steps" in said
    warm.run([*command, "--num_epochs", 4], tmp_path)
    assert open_store(tmp_path / "a.zarr").complete and not (tmp_path / "out").exists()


def test_a_pass_that_trains_nothing_is_no_epoch(tmp_path: Path, warm: Warm) -> None:
    extra = f"{PREPARE}\n    mean = sum(batch['point'].sum() for batch in loader)"
    assert both(tmp_path, warm, (), {"prepare": extra}) == ""
    state = torch.load(tmp_path / "with" / "state.pt", weights_only=False)["model"]
    captured = load_file(tmp_path / "with.trace" / "trace.weights.safetensors")
    assert all(torch.equal(captured[name], value) for name, value in state.items())


EARLY: dict[str, tuple[Changes, dict[str, str]]] = {
    "an epoch early": ((), {"attach": "dmin_trace.attach(accelerator, args, timesteps=3, dimension=64, num_epochs=1)"}),
    "moved after the loop": (((END, f"    with torch.no_grad(): model.inner.bias.add_(1)\n{END}"),), {}),
}


@pytest.mark.parametrize(("changes", "parts"), EARLY.values(), ids=EARLY.keys())
def test_a_trace_that_is_not_of_the_final_weights_is_marked_and_refused(
    tmp_path: Path, warm: Warm, changes: Changes, parts: dict[str, str]
) -> None:
    said = both(tmp_path, warm, changes, parts)
    assert "is not of the final weights" in said and "dmin-trace capture --weights" in said
    path = tmp_path / "with.trace" / "trace.zarr"
    with pytest.raises(TraceError, match="not of the final weights.*dmin-trace capture --weights"):
        dmin_trace.open_trace(path)
    with dmin_trace.open_trace(path, not_final=True) as trace:
        assert len(trace) == 10
    refused = warm.run(["dmin-trace", "query", path, "--sample", "3"], tmp_path, code=1)
    assert "not of the final weights" in " ".join(refused.split())
    warm.run(["dmin-trace", "verify", path], tmp_path)


def test_averages_of_other_classes_are_named(tmp_path: Path, warm: Warm) -> None:
    body = ACCUMULATE.replace(
        "global_step += 1", "global_step += 1; average.update(model); swa.update_parameters(inner)"
    )
    prepare = f"{WITH_AVERAGE}; inner = accelerator.unwrap_model(model)"
    parts = {
        "imports": AVERAGE,
        "prepare": f"{prepare}; swa = torch.optim.swa_utils.AveragedModel(inner); teacher = Average(model)",
        "body": body,
    }
    said = both(tmp_path, warm, (SAVED,), parts)
    assert "averages weights in average (Average), swa (AveragedModel); the capture is of the trained weights" in said
    header = open_store(tmp_path / "with.trace" / "trace.zarr").header
    assert header.weights_of == "the trained weights, not their average in average (Average), swa (AveragedModel)"
    (tmp_path / "plain").mkdir()
    assert both(tmp_path / "plain", warm, (), {}) == ""
    assert open_store(tmp_path / "plain" / "with.trace" / "trace.zarr").header.weights_of == "the trained weights"


SCHEDULE_FREE = """import dmin_trace
class ScheduleFree(torch.optim.SGD):
    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        for group in self.param_groups: group["train_mode"] = True
    def step(self, closure=None):
        assert self.param_groups[0]["train_mode"]
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("z", p.detach().clone())
        super().step(closure)
    def _turn(self, mode, weight):
        for group in self.param_groups:
            if group["train_mode"] is not mode:
                group["train_mode"] = mode
                with torch.no_grad():
                    for p in group["params"]: p.lerp_(self.state[p].get("z", p), weight)
    def eval(self): self._turn(False, 0.3)
    def train(self): self._turn(True, 1 - 1 / 0.7)"""


def test_schedule_free_optimizers_are_captured_in_eval_mode(tmp_path: Path, warm: Warm) -> None:
    changes = (("torch.optim.AdamW(", "ScheduleFree("), (END, f"    optimizer.eval()\n{END}"))
    parts = {"imports": SCHEDULE_FREE, "accelerator": FIVE, "body": BREAK}
    assert both(tmp_path, warm, changes, parts) == ""
    state = torch.load(tmp_path / "with" / "state.pt", weights_only=False)["model"]
    captured = load_file(tmp_path / "with.trace" / "trace.weights.safetensors")
    assert all(torch.equal(captured[name], value) for name, value in state.items())
    assert "eval mode" in open_store(tmp_path / "with.trace" / "trace.zarr").header.weights_of


def test_an_older_trace_is_kept_under_a_number(tmp_path: Path, warm: Warm) -> None:
    script = plain_script(tmp_path / "script.py")
    traces = [tmp_path / "out.trace" / name for name in ("trace.zarr", "trace-1.zarr", "trace-2.zarr")]
    ids = []
    for run in range(3):
        said = warm.run([script, "--num_epochs", run + 1], tmp_path)
        ids.append(open_store(traces[0]).header.id)
        assert ("is of this run" in said and f"trace-{run}.zarr" in said) == (run > 0)
    assert [open_store(path).header.id for path in traces] == [ids[2], ids[0], ids[1]]
    saved = [load_file(path.with_name(path.stem + ".weights.safetensors"))["inner.bias"] for path in traces]
    assert len({tuple(values.tolist()) for values in saved}) == 3
    assert (tmp_path / "out" / "state.pt").exists()
