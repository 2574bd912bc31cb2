"""Command and Job: written as JSON, decoded strictly, and remembered in the user's own folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dmin_trace.command import Command, Job, launch_environment, recall, remember, script_of
from dmin_trace.errors import TraceError

COMMAND = Command("/runs/train.py", ("--name", "caf\u00e9", "not utf-8: \udcff"), "/runs")


def test_job_from_json_returns_what_to_json_wrote() -> None:
    job = Job(mode="now", command=COMMAND, settings={"timesteps": [100, 500], "dtype": "int8"}, like="/a", strict=True)
    assert Job.from_json(job.to_json()) == job


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "later"},
        {"repair": True},
        {"out": 3},
        {"strict": "yes"},
        {"command": {"script": "a"}},
        {"settings": []},
    ],
)
def test_job_from_json_refuses_what_is_no_job(change: dict[str, Any]) -> None:
    given = json.loads(Job(mode="final", command=COMMAND, settings={}).to_json())
    with pytest.raises(ValueError, match="at `|unknown field|missing required field"):
        Job.from_json(json.dumps(given | change))


def test_recall_returns_what_remember_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    launched = launch_environment()
    assert launched["ACCELERATE_MIXED_PRECISION"] == "bf16"
    remember("a" * 32, msgspec.structs.replace(COMMAND, launcher=("accelerate", "launch")))
    # The launch variables stand for the launcher.
    assert recall("a" * 32) == msgspec.structs.replace(COMMAND, environment=launched) and recall("b" * 32) is None
    [kept] = tmp_path.rglob("*.json")
    assert kept.stat().st_mode & 0o777 == 0o600
    for damaged in ("{", '{"script": "a", "arguments": "b", "folder": "c"}', "[]", '{"script": "a", "folder": "c"}'):
        kept.write_text(damaged)
        assert recall("a" * 32) is None
    with pytest.raises(TraceError, match="is not 32 hexadecimal digits"):
        recall("../../" + "a" * 26)


def test_script_of_a_missing_file_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("pass\n")
    found = script_of(tmp_path / "train.py")
    assert found.name == "train.py" and len(found.sha256) == 64
    assert script_of(tmp_path / "gone.py").name == "" == script_of(tmp_path / "gone.py").sha256
