"""The one line in two of upstream's own training scripts; `tools/one_line.py` runs all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "one_line.py"
NEEDED = ("torchvision", "datasets", "peft", "transformers", "diffusers")


@pytest.mark.skipif(
    not os.environ.get("DIFFUSERS_EXAMPLES"),
    reason="DIFFUSERS_EXAMPLES is not set to the examples folder of a checkout of huggingface/diffusers",
)
@pytest.mark.skipif(
    any(find_spec(name) is None for name in NEEDED), reason=f"upstream's scripts need {', '.join(NEEDED)}"
)
@pytest.mark.parametrize("script", ["train_unconditional", "train_dreambooth_lora_sd3"])
def test_the_one_line_works_in_an_upstream_script(script: str, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, TOOL, "--only", script, "--work", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
