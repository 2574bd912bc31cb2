"""attach: its settings, and the command that it remembers for queries."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import plain_script
from warm import Warm

from dmin_trace.store import open_store

NOTEBOOK = "import sys; sys.argv = ['/lib/ipykernel_launcher.py', '-f', 'kernel.json']; "


def test_attach_takes_settings_and_overrides_of_them(warm: Warm, tmp_path: Path) -> None:
    settings = "dmin_trace.Settings(timesteps=5, dimension=64, seed=3)"
    script = plain_script(
        tmp_path / "script.py", attach=f"dmin_trace.attach(accelerator, args, settings={settings}, timesteps=[10, 700])"
    )
    warm.run([script], tmp_path)
    header = open_store(tmp_path / "out.trace" / "trace.zarr").header
    assert (header.timesteps, header.dimension, header.noise.seed) == ((10, 700), 64, 3)


@pytest.mark.parametrize(
    ("before", "name", "remembered"),
    [("", "script.py", 1), (NOTEBOOK, "script.py", 0), ("", "ipykernel_launcher.py", 0)],
    ids=["script", "notebook", "kernel"],
)
def test_attach_remembers_the_command_of_a_script_and_none_in_a_notebook(
    warm: Warm, tmp_path: Path, before: str, name: str, remembered: int
) -> None:
    line = f"{before}dmin_trace.attach(accelerator, args, timesteps=2, dimension=64)"
    said = warm.run([plain_script(tmp_path / name, attach=line)], tmp_path)
    assert open_store(tmp_path / "out.trace" / "trace.zarr").complete
    assert len(list((tmp_path / "state").rglob("*.json"))) == remembered
    assert ("queries will not know how to repeat it" in said) == ("Trace.query_loss" in said) == (remembered == 0)
    assert len(said.splitlines()) == 1 - remembered
