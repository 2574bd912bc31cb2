"""Settings are checked at birth."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dmin_trace.errors import SettingsError
from dmin_trace.settings import Settings, make_settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dimension": 1000}, "power of two"),
        ({"dimension": 8}, "power of two"),
        ({"dimension": True}, "power of two"),
        ({"dimension": 2**14 + 0.0}, "power of two"),
        ({"timesteps": 0}, "count from 1"),
        ({"timesteps": []}, "not negative"),
        ({"timesteps": [-1]}, "not negative"),
        ({"timesteps": [1.5]}, "not negative"),
        ({"timesteps": [5, 5]}, "each once"),
        ({"timesteps": "10"}, "not negative"),
        ({"seed": -1}, "2\\*\\*32"),
        ({"seed": 2**32}, "2\\*\\*32"),
        ({"dtype": "bfloat16"}, "int8, float16, float32"),
        ({"projection": "dense"}, "rotation, uniform"),
        ({"transform": "adam"}, "none, sign"),
        ({"codec": "zstd"}, "none, blosc"),
        ({"draws": 0}, "count from 1 to 1000"),
        ({"draws": True}, "count from 1 to 1000"),
        ({"draws": 2.0}, "count from 1 to 1000"),
        ({"columns": "label"}, "names of dataset columns"),
        ({"columns": ["../label"]}, "names of dataset columns"),
        ({"size": 3}, "size is no setting"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_settings(given)


def test_settings_survive_json_and_stay_as_they_are() -> None:
    settings = make_settings({"timesteps": [1, 2], "columns": ["label", "名"], "seed": None})
    assert settings == Settings(timesteps=(1, 2), columns=("label", "名"))
    assert settings.timestep_count == 2
    assert make_settings(dataclasses.asdict(settings)) == settings
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 1  # type: ignore[misc]
