"""`with_settings`: a command gets one option for each setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from dmin_trace.cli.options import ScoreName, parse_timesteps, with_settings
from dmin_trace.errors import SettingsError
from dmin_trace.search import Score
from dmin_trace.settings import Settings


def received(*arguments: str) -> dict[str, Any]:
    """The settings that a command receives for these arguments."""
    got: dict[str, Any] = {}

    @with_settings
    def command(*, settings: Mapping[str, Any], verbose: bool = False) -> None:
        got.update(settings)

    app = typer.Typer()
    app.command()(command)
    ran = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    return got


def test_with_settings_gives_what_was_given_and_no_more() -> None:
    assert received() == {}
    assert received("--dtype", "float16", "--seed", "7", "--verbose") == {"dtype": "float16", "seed": 7}
    assert received("--column", "a", "--column", "b c") == {"columns": ["a", "b c"]}
    assert received("--rows", "2") == {"rows": 2}
    assert received("--timesteps", "5") == {"timesteps": 5}
    assert received("--timesteps", "100,500,900") == {"timesteps": [100, 500, 900]}


def test_with_settings_makes_an_option_of_each_field_with_its_help_and_default() -> None:
    @with_settings
    def command(*, settings: Mapping[str, Any]) -> None:
        pass

    app = typer.Typer(rich_markup_mode=None)
    app.command()(command)
    text = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    for field in fields(Settings):
        option = "--column" if field.name == "columns" else f"--{field.name}"
        assert option in text and field.metadata["help"].split(".")[0] in text
        assert field.default is None or f"Default: {field.default}." in text
    for choice in get_args(get_type_hints(Settings)["dtype"]):
        assert choice in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dimension", "1000"), "dimension is 1000"),
        (("--timesteps", "0"), "timesteps is 0"),
        (("--timesteps", "3", "--rows", "4"), "rows is 4; expected None, or a number from 1 to 3"),
        (("--timesteps", "many"), "--timesteps is 'many'; expected a number, or a list such as 100,500,900"),
        (("--column", "../up"), "columns is"),
    ],
)
def test_with_settings_checks_them_before_the_command_runs(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        received(*arguments)


def test_parse_timesteps() -> None:
    assert (parse_timesteps("12"), parse_timesteps("3,1")) == (12, [3, 1])


def test_score_names_are_the_built_in_scores() -> None:
    assert set(get_args(get_args(ScoreName)[0])) == set(get_args(Score))
