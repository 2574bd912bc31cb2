"""The host of diffusers' scripts: found by its entry point; what it refuses; images only of a model that was saved."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dmin_trace.integrations.diffusers import HOST, host
from PIL import Image

from dmin_trace.capture import host as hosts
from dmin_trace.errors import ScriptError


def test_script_host_is_the_installed_one() -> None:
    assert hosts.script_host() is HOST


@pytest.mark.parametrize(("names", "found"), [([], "none"), (["kohya", "diffusers"], "kohya, diffusers")])
def test_script_host_refuses_none_and_several(monkeypatch: pytest.MonkeyPatch, names: list[str], found: str) -> None:
    entries = [EntryPoint(name, "nothing:HOST", hosts.ENTRY_POINT_GROUP) for name in names]
    monkeypatch.setattr(hosts, "entry_points", lambda group: entries)
    with pytest.raises(ScriptError, match=f"register {found} in the entry point group dmin_trace.hosts; expected one"):
        hosts.script_host()


BASE = ["--pretrained_model_name_or_path", "base"]


@pytest.mark.parametrize("arguments", [["--output_dir", "run"], BASE, [*BASE, "--output_dir=run"]])
def test_nothing_is_generated_without_a_saved_model(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(ValueError, match="does not name a model|holds neither"):
        host.generate(arguments, tmp_path, [("a cat", 0)])


def test_what_is_looked_up_by_batch_is_refused() -> None:
    class Given:
        cache_latents = True

    assert "latents by the number of the batch" in (host.refusal(Given(), {}) or "")
    assert "prompt_embeds_cache" in (host.refusal(None, {"prompt_embeds_cache": [1]}) or "")
    assert host.refusal(None, {"latents_cache": []}) is None
    # The newer scripts look up by the index of the sample.
    assert host.refusal(Given(), {"latents_cache": [1], "batch": {"indices": [3]}}) is None


class Pictures:
    """A data set as the newer DreamBooth scripts make it: its pictures are flipped and cropped once."""

    pixel_values = [torch.zeros(3, 8, 8)]

    def __init__(self, width: int) -> None:
        self.instance_images = [Image.new("RGB", (8, 8)), Image.new("RGB", (width, 8))]


EMBEDDED = {"prompt_embeds": torch.zeros(1, 77, 8), "model_input": torch.zeros(1, 4, 8, 8), "original_sizes": [(8, 9)]}
TOKENS = {"prompt_ids": torch.zeros(1, 77, dtype=torch.int64), "pixel_values": torch.zeros(1, 3, 8, 8)}


@pytest.mark.parametrize(
    ("args", "variables", "found"),
    [
        ({"random_flip": True, "center_crop": True}, {"train_dataset": Pictures(8)}, "is flipped"),
        ({"random_flip": False, "center_crop": False}, {"train_dataset": Pictures(9)}, "is cropped"),
        ({"random_flip": False, "center_crop": True}, {"train_dataset": Pictures(9)}, None),
        ({"random_flip": False, "center_crop": False}, {"train_dataset": Pictures(8)}, None),
        ({"center_crop": False}, {"batch": EMBEDDED}, "is cropped"),
        ({"center_crop": True, "proportion_empty_prompts": 0.1}, {"batch": EMBEDDED}, "caption is left out"),
        ({"center_crop": True, "proportion_empty_prompts": 0}, {"batch": EMBEDDED}, None),
        ({"random_flip": True, "center_crop": False, "proportion_empty_prompts": 0.1}, {"batch": TOKENS}, None),
    ],
)
def test_what_was_drawn_before_the_loop_is_named(
    args: dict[str, Any], variables: dict[str, Any], found: str | None
) -> None:
    drawn = host.drawn_before_loop(SimpleNamespace(**args), variables)
    assert drawn is None if found is None else found in (drawn or "")


def test_rows_of_a_sample() -> None:
    assert host.rows_of_sample(SimpleNamespace(with_prior_preservation=True)) == 2
    assert host.rows_of_sample(SimpleNamespace()) == host.rows_of_sample(None) == 1


def test_data_that_were_mapped_are_mapped_anew(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "script.py").write_text("from datasets import load_dataset")
    try:
        host.forget_drawn(tmp_path / "script.py")
        assert not datasets.is_caching_enabled()
    finally:
        datasets.enable_caching()
