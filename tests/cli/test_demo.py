"""`dmin-trace demo`, shortened: fewer digits and steps, every part of it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dmin_trace.cli import demo
from dmin_trace.errors import QueryError
from dmin_trace.store import open_store

# diffusers and scikit-learn deprecate things of their own from one version to the next.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_demo_ends_with_tables_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(demo, "TRAINING_ARGUMENTS", ("--max_train_samples", "150", "--max_train_steps", "60"))
    shown = io.StringIO()
    share = demo.run_demo(tmp_path / "demo", Console(file=shown, width=100))
    trace = open_store(tmp_path / "demo" / "model.trace" / "trace.zarr")
    assert trace.header.samples == 150
    labels = demo.training_digits()[1]
    assert trace.column("label") == labels[:150].tolist()
    text = shown.getvalue()
    generated = list((tmp_path / "demo").glob("generated-*.png"))
    assert text.count("Most influential training samples for generated-") == len(generated) >= 1
    assert f"Same digit as the query: {share:.0%} of the top 10; chance would give" in text
    page = (tmp_path / "demo" / "answer.html").read_text(encoding="utf-8")
    assert text.count(f"Page: {tmp_path / 'demo' / 'answer.html'}") == 1
    assert page.count("data-sample=") == len(generated) * (24 + 8) and "Influence by label" in page
    picture = np.asarray(Image.open(tmp_path / "demo" / "demo.png"))
    assert picture.shape[1] > 800
    assert picture.std() > 20
    with pytest.raises(QueryError, match="exists already"):
        demo.run_demo(tmp_path / "demo", Console(file=shown))
