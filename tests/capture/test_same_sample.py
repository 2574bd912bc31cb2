"""What a data set draws: samples and queries get the same, and one that gives other samples each time is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import plain_script
from warm import Warm

from dmin_trace.store import open_store

DRAWING = """class Drawing(torch.utils.data.Dataset):
    # Flips and empty captions, once before the loop and at each access, and crops.
    def __init__(self, count):
        generator = torch.Generator().manual_seed(5)
        points = torch.randn(count, 20, generator=generator)
        self.points = points[args.only:args.only + 1] if args.only is not None else points
        self.caption = ["point"] * len(self.points)
        self.flipped = [point.flip(0) if random.random() < 0.5 else point for point in self.points]
        self.emptied = [0.0 if random.random() < 0.2 else 1.0 for _ in self.points]
    def __len__(self):
        return len(self.points)
    def __getitem__(self, index):
        point = self.flipped[index] * self.emptied[index]
        at = int(torch.randint(0, 5, size=(1,)))
        point = point[at:at + 16]
        if torch.rand(1) < 0.5:
            point = -point
        return {"point": point * (np.random.rand() > 0.2), "index": index}"""


def test_flips_and_crops_drawn_before_the_loop_or_at_each_access_are_the_same_for_a_copy(
    tmp_path: Path, warm: Warm
) -> None:
    script = plain_script(tmp_path / "script.py")
    text = script.read_text().replace("Points(args.count)", "Drawing(args.count)")
    text = text.replace(
        "args = parser.parse_args()", 'parser.add_argument("--only", type=int)\nargs = parser.parse_args()'
    )
    script.write_text(text.replace("def main():", DRAWING + "\n\ndef main():").replace("manual_seed(0)", "seed()"))
    warm.run([script, "--output_dir", "out"], tmp_path)
    weights, settings = (
        "out.trace/trace.weights.safetensors",
        ["--timesteps", 2, "--dimension", 64, "--dtype", "float32"],
    )
    for seed in (0, 2):
        rows = []
        for name, only in (("all", []), ("copy", ["--only", 3])):
            out = tmp_path / f"{name}{seed}.zarr"
            capture = ["dmin-trace", "capture", "--weights", weights, "--out", out, *settings, "--seed", seed]
            warm.run([*capture, "--", script, *only], tmp_path)
            rows.append(open_store(out).gradients(np.array([3 if name == "all" else 0]))[0])
        assert np.allclose(rows[0], rows[1], atol=1e-6)


def test_a_data_set_that_gives_another_sample_each_time_is_refused(tmp_path: Path, warm: Warm) -> None:
    script = plain_script(tmp_path / "script.py")
    text = script.read_text().replace(
        'return {"point": self.points[index]', 'index = self.order.pop(); return {"point": self.points[index]'
    )
    text = text.replace('self.caption = ["point', 'self.order = list(range(count)) * 9; self.caption = ["point')
    script.write_text(text)
    told = warm.run([script, "--output_dir", "out"], tmp_path)
    assert "The data set gave sample 0 differently the second time" in told
    assert (
        not (tmp_path / "out.trace" / "trace.zarr").exists()
        or not open_store(tmp_path / "out.trace" / "trace.zarr", unfinished=True).done.any()
    )


@pytest.mark.parametrize("rows", [1, 2])
def test_a_sample_with_a_class_picture_makes_two_rows(tmp_path: Path, warm: Warm, rows: int) -> None:
    """Two rows are one sample's with prior preservation, and are said; without it they are refused."""
    script = plain_script(
        tmp_path / "script.py",
        accelerator="import logging; logging.basicConfig(level=20); accelerator = Accelerator();"
        f"args.with_prior_preservation = {rows == 2}",
    )
    text = script.read_text().replace('clean = batch["point"]', 'clean = batch["point"].repeat(2, 1)')
    script.write_text(text)
    told = warm.run([script, "--output_dir", "out"], tmp_path)
    if rows == 2:
        assert "of a training sample and of its class picture" in told
        assert open_store(tmp_path / "out.trace" / "trace.zarr").complete
    else:
        assert "was called with 2 rows" in told
