"""The host of diffusers' scripts: found by its entry point; what it refuses; images only of a model that was saved."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from dmin_trace.integrations.diffusers import HOST, host

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
