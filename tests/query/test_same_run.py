"""A query, and a capture that is continued, compute rows as the trace's were: frozen models, precision, device."""

from __future__ import annotations

from pathlib import Path

import pytest
from encoded_run import BF16, SETTINGS, EncodedRun
from warm import Warm

from dmin_trace.command import recall
from dmin_trace.store import open_store


@pytest.fixture(scope="module")
def run(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> EncodedRun:
    return EncodedRun(warm, tmp_path_factory.mktemp("same"))


def test_what_decides_a_row_is_recorded(run: EncodedRun) -> None:
    facts = open_store(run.trace, unfinished=True).header.run
    assert [(m.name, m.kind, m.numbers, m.in_steps) for m in facts.models] == [("encoder", "Linear", 272, True)]
    expected = {"device": "cpu", "mixed precision": "bf16", "autocast": "bfloat16", "models": "float32"}
    assert facts.conditions.items() >= expected.items()


def test_a_resumed_capture_has_the_traces_precision_and_frozen_models(run: EncodedRun) -> None:
    before = open_store(run.trace, unfinished=True).done.sum()
    said = run.capture(1)
    assert "its mixed precision is no, that of the trace is bf16" in said and len(said.splitlines()) == 1
    with run.another_encoder():
        said = run.capture(1, **BF16)
    assert "the 272 numbers of encoder (Linear) that do not train are not the same" in said
    assert open_store(run.trace, unfinished=True).done.sum() == before


def test_a_query_repeats_the_launch_and_refuses_another_run(run: EncodedRun) -> None:
    command = recall_in(run.folder, open_store(run.trace, unfinished=True).header.id)
    assert command is not None and command["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert run.query() == "3 3.00"
    with run.another_encoder():
        said = run.query(code=1)
    assert "the 272 numbers of encoder (Linear) that do not train are not the same" in said
    said = run.query("--", "python", *run.module, code=1)
    assert "its mixed precision is no, that of the trace is bf16" in said and len(said.splitlines()) == 1
    launch = ["accelerate", "launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no"]
    assert run.query("--", *launch, "--mixed_precision", "bf16", *run.module) == "3 3.00"
    said = run.query("--", run.script, *run.arguments, code=1)
    assert f"It is part of a package: start it in {run.folder} as python -m pack.train ARGS." in said


def test_a_launcher_is_run_as_given_and_its_jobs_refusal_is_one_line(run: EncodedRun) -> None:
    python = ["python", "-u", *run.module]
    ask = ["dmin-trace", "capture", "--weights", "w.safetensors", *SETTINGS, "--out", run.trace, "--", *python]
    said = run.warm.run(ask, run.folder, 1)
    assert "its mixed precision is no, that of the trace is bf16" in said and len(said.splitlines()) == 1
    running = run.warm.start(["dmin-trace", "estimate", *SETTINGS, "--", *python], run.folder)
    assert running.wait() == 0, running.said()
    assert "10 x 3" in running.out.read_text()


def recall_in(folder: Path, store_id: str) -> dict[str, str] | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        command = recall(store_id)
    return None if command is None else command.environment


def test_another_type_of_device_is_refused_unless_that_is_accepted(run: EncodedRun) -> None:
    from dmin_trace.capture.conditions import differing_condition

    theirs = open_store(run.trace, unfinished=True).header.run.conditions | {"device": "cuda"}
    ours = open_store(run.trace, unfinished=True).header.run.conditions
    refused = differing_condition(theirs, ours, any_device=False)
    assert refused.startswith("its device is cpu, that of the trace is cuda.") and "--any-device" in refused
    assert differing_condition(theirs, ours, any_device=True) == ""
