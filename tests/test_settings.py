"""Settings are checked at birth."""

from __future__ import annotations

import dataclasses
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from dmin_trace.errors import SettingsError
from dmin_trace.settings import Settings, SettingsOverrides, given_settings, make_settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dimension": 1000}, "power of two"),
        ({"dimension": 8}, "power of two"),
        ({"dimension": True}, "power of two"),
        ({"dimension": 2**14 + 0.0}, "power of two"),
        ({"timesteps": 0}, "number from 1"),
        ({"timesteps": []}, "not negative"),
        ({"timesteps": [-1]}, "not negative"),
        ({"timesteps": [1.5]}, "not negative"),
        ({"timesteps": [5, 5]}, "each once"),
        ({"timesteps": "10"}, "not negative"),
        ({"seed": -1}, "2\\*\\*32"),
        ({"seed": 2**32}, "2\\*\\*32"),
        ({"dtype": "bfloat16"}, "int8, float16, float32"),
        ({"projection": "dense"}, "rotation, uniform"),
        ({"transform": "adam"}, "sign, none"),
        ({"codec": "zstd"}, "none, blosc"),
        ({"draws": 0}, "number from 1 to 1000"),
        ({"draws": True}, "number from 1 to 1000"),
        ({"draws": 2.0}, "number from 1 to 1000"),
        ({"rows": 0}, "rows is 0; expected None, or a number from 1 to 10, the number of timesteps"),
        ({"rows": True}, "from 1 to 10"),
        ({"rows": 3, "timesteps": [5, 900]}, "from 1 to 2"),
        ({"columns": "label"}, "names of dataset columns"),
        ({"columns": ["../label"]}, "names of dataset columns"),
        ({"size": 3}, "size is not a setting"),
    ],
)
def test_invalid_values_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_settings(given)


@pytest.mark.parametrize(("timesteps", "rows"), [(10, 1), (10, 3), (7, 4), (5, 5), (1000, 7), (6, None)])
def test_groups_of_timesteps_are_those_of_array_split(timesteps: int, rows: int | None) -> None:
    settings = Settings(timesteps=timesteps, rows=rows)
    expected = np.array_split(np.arange(timesteps), rows or timesteps)
    assert [list(group) for group in settings.groups] == [group.tolist() for group in expected]
    assert settings.group_count == (None if rows in (None, timesteps) else rows)


def test_settings_survive_json_and_stay_as_they_are() -> None:
    settings = make_settings({"timesteps": [1, 2], "columns": ["label", "名"], "seed": None})
    assert settings == Settings(timesteps=(1, 2), columns=("label", "名"))
    assert settings.timestep_count == 2
    assert make_settings(dataclasses.asdict(settings)) == settings
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 1  # type: ignore[misc]


def test_the_keyword_overrides_are_the_settings() -> None:
    assert set(SettingsOverrides.__annotations__) == {field.name for field in fields(Settings)}


def test_overrides_replace_settings_that_were_given() -> None:
    assert given_settings(None, {}) == {}
    assert given_settings(None, {"timesteps": [1, 5]}) == {"timesteps": [1, 5]}
    given = given_settings(Settings(timesteps=3, seed=7), {"seed": 8, "dtype": None})
    assert (given["timesteps"], given["seed"], given["dtype"]) == (3, 8, "int8")
    with pytest.raises(SettingsError, match="settings is a dict; expected dmin_trace.Settings"):
        given_settings({"timesteps": 3}, {})  # type: ignore[arg-type]
