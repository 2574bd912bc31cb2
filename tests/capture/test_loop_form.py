"""Which loops can take capture batches: told from their source and variables, before anything is changed."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from dmin_trace.capture.accelerate.loop_form import UnsuitableLoopError, check_loop

SCRIPT = """
def train(args, loader, accelerator, model, optimizer, scheduler, progress_bar, ema, other):
    global_step, losses, logs, state, seen = 0, [], {}, {"log": []}, None
LOOP
"""
STEP = """
with accelerator.accumulate(model):
    loss = model(batch).mean()
    accelerator.backward(loss)
    if accelerator.sync_gradients:
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step(); scheduler.step(); optimizer.zero_grad()
if accelerator.sync_gradients:
    ema.step(model)
    global_step += 1
"""


class Average:
    """An average of the script's own."""

    count = 0

    def step(self, model: Any) -> None:
        self.count += 1


class Arguments:
    use_ema: Any = None
    max_train_steps = 100
    report_to = "tensorboard"


def reason(tmp_path: Path, loop: str, loader: Any = None, **changes: Any) -> str:
    """Why capture batches cannot go through a loop; "" if they can. `STEP` in its text stands for a usual step."""
    found: list[str] = []
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 2)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, scheduler = accelerator.prepare(model, plain, torch.optim.lr_scheduler.StepLR(plain, 3))
    driven = [torch.ones(1, 2)]

    def backward(loss: torch.Tensor) -> None:
        frame: FrameType = sys._getframe(1)
        try:
            check_loop(frame, lambda value: value is driven)
            found.append("")
        except UnsuitableLoopError as why:
            found.append(str(why))

    accelerator.backward = backward
    indented = textwrap.indent(textwrap.dedent(loop).strip("\n"), "    ")
    lines: list[str] = []
    for line in indented.splitlines():
        if line.strip() == "STEP":
            lines += textwrap.indent(STEP.strip("\n"), line[: -len("STEP")]).splitlines()
        else:
            lines.append(line)
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.replace("LOOP", "\n".join(lines)), encoding="utf-8")
    names: dict[str, Any] = {"__name__": "script", "tqdm": tqdm, "torch": torch, "Average": Average}
    exec(compile(path.read_text(), str(path), "exec"), names)
    given = {"ema": Average(), "other": None, "args": Arguments(), "progress_bar": tqdm(disable=True), **changes}
    names["train"](
        loader=driven, accelerator=accelerator, model=model, optimizer=optimizer, scheduler=scheduler, **given
    )
    assert found
    return found[0]


SUITABLE = {
    "a loop over the loader": """
        for batch in loader:
            STEP
    """,
    "epochs, enumerate, tqdm, a break by the counted steps": """
        for epoch in range(1):
            for step, batch in enumerate(tqdm(loader, disable=True)):
                if args.report_to is None and step < 3:
                    continue
                STEP
                logs = {"loss": loss.detach().item(), "lr": scheduler.get_last_lr()[0]}
                progress_bar.set_postfix(**logs)
                accelerator.log(logs, step=global_step)
                if global_step >= args.max_train_steps:
                    break
    """,
    "a progress bar that has a name": """
        bar = tqdm(loader, disable=True)
        for batch in bar:
            STEP
            bar.set_description(f"{loss.item():.3f}")
    """,
    "a body of its own": """
        def body(batch):
            nonlocal global_step
            torch.manual_seed(3)
            STEP
            return loss
        for batch in loader:
            loss = body(batch)
            losses.append(loss.item())
    """,
    "without accumulate, in variables and dicts": """
        for batch in loader:
            loss = model(batch).mean()
            accelerator.backward(loss)
            optimizer.step(); scheduler.step(); optimizer.zero_grad()
            losses.append(loss.item()); global_step += 1; state["step"] = global_step
    """,
    "what options turn off": """
        for batch in loader:
            STEP
            if args.use_ema:
                ema.step(model)
            if other is not None and global_step % 2:
                other.step(model)
            if args.report_to == "wandb" and not args.use_ema:
                ema.step(model)
    """,
    "a list that is made anew": """
        for batch in loader:
            parts = []
            for k in range(2):
                parts.append(model(batch))
            parts = torch.stack(parts)
            STEP
    """,
    "a count of optimizer steps": """
        for batch in loader:
            STEP
            global_step += accelerator.sync_gradients
            if global_step >= 3:
                break
    """,
    "the rest of the loop waits": """
        for batch in loader:
            loss = model(batch).mean()
            accelerator.backward(loss)
            optimizer.step()
            if not accelerator.sync_gradients:
                continue
            ema.step(model)
            global_step += 1
            if global_step >= 3:
                break
    """,
}
UNSUITABLE = {
    "an average outside": (
        """
        for batch in loader:
            STEP
            ema.step(model)
        """,
        "`ema.step(model)` outside",
    ),
    "an average inside accumulate": (
        """
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(batch).mean()
                accelerator.backward(loss)
                optimizer.step()
                ema.step(model)
        """,
        "`ema.step(model)` outside",
    ),
    "a preview before the step": (
        """
        for step, batch in enumerate(loader):
            if step % 3 == 0:
                torch.save(batch, str(step) + ".pt") if step else None
                ema.step(model)
            STEP
        """,
        "`ema.step(model)` outside",
    ),
    "a file after each batch": (
        """
        for batch in loader:
            STEP
            if len(losses) >= 0:
                torch.save(loss, "/dev/null")
        """,
        "`torch.save(loss, '/dev/null')` outside",
    ),
    "a count of an object": (
        """
        for batch in loader:
            STEP
            ema.count += 1
        """,
        "`ema.count += 1` outside",
    ),
    "a list inside a dict": (
        """
        for batch in loader:
            STEP
            state["log"].append(loss.item())
        """,
        "`state['log'].append(loss.item())` outside",
    ),
    "a flag that the loop sets": (
        """
        for batch in loader:
            STEP
            if seen:
                ema.step(model)
            seen = True
        """,
        "`ema.step(model)` outside",
    ),
    "a count that does not wait": (
        """
        for batch in loader:
            STEP
            losses = losses + [0]
            count = len(losses)
            if count >= 3:
                break
        """,
        "is left by count",
    ),
    "the number of the batch": (
        """
        for step, batch in enumerate(loader):
            STEP
            if step >= 3:
                break
        """,
        "is left by step",
    ),
    "next in a loop over range": (
        """
        batches = iter(loader)
        for step in range(1):
            batch = next(batches)
            STEP
        """,
        "runs over range(1)",
    ),
    "while": (
        """
        batches = iter(loader)
        while global_step < 1:
            batch = next(batches)
            STEP
        """,
        "takes its batches by itself",
    ),
    "zip": (
        """
        for step, batch in zip(range(1), loader):
            STEP
        """,
        "runs over zip(range(1), loader)",
    ),
    "a generator": (
        """
        def cycle(loader):
            while True:
                yield from loader
        for batch in cycle(loader):
            STEP
            break
        """,
        "runs over cycle(loader)",
    ),
    "another loader": (
        """
        for batch in [torch.ones(1, 2)]:
            STEP
        """,
        "runs over [torch.ones(1, 2)]",
    ),
    "several steps a batch": (
        """
        for batch in loader:
            for again in range(2):
                STEP
        """,
        "runs over range(2)",
    ),
    "no loop": (
        """
        batch = loader[0]
        STEP
        """,
        " ",
    ),
}


@pytest.mark.parametrize("loop", SUITABLE.values(), ids=SUITABLE.keys())
def test_loops_that_can_take_capture_batches(tmp_path: Path, loop: str) -> None:
    assert reason(tmp_path, loop) == ""


@pytest.mark.parametrize(("loop", "words"), UNSUITABLE.values(), ids=UNSUITABLE.keys())
def test_loops_that_would_be_disturbed_are_named(tmp_path: Path, loop: str, words: str) -> None:
    assert words in reason(tmp_path, loop)


def test_what_is_there_counts(tmp_path: Path) -> None:
    loop = SUITABLE["what options turn off"]
    assert "other.step(model)" in reason(tmp_path, loop, other=Average())


def test_a_loop_without_source_is_not_recognised() -> None:
    names: dict[str, Any] = {"why": _why, "loader": [1]}
    exec("for batch in loader:\n    found = why()", names)
    assert "cannot be read" in names["found"]


def _why() -> str:
    try:
        check_loop(sys._getframe(1), lambda value: True)
    except UnsuitableLoopError as why:
        return str(why)
    return ""
