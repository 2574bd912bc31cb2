"""Inputs from anybody, by the million: every outcome is an answer or an error that dmin_trace raises on purpose."""

from __future__ import annotations

from typing import Annotated

import typer


def fuzz_command(
    inputs: Annotated[int, typer.Option(help="How many, shared among the targets.")] = 1_000_000,
) -> None:
    """Reads inputs that are made up, most of them nearly right; reports what was neither an answer nor an error."""
    raise typer.Exit(2)
