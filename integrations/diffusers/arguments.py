"""The arguments of a training script's command line, read as argparse reads them."""

from __future__ import annotations

from collections.abc import Sequence


def value_of(arguments: Sequence[str], name: str) -> str | None:
    """The value of the last argument of this name, as argparse takes it."""
    values = [value for argument, value in zip(arguments, arguments[1:], strict=False) if argument == name]
    values += [argument.removeprefix(name + "=") for argument in arguments if argument.startswith(name + "=")]
    return values[-1] if values else None


def has_argument(arguments: Sequence[str], name: str) -> bool:
    return any(argument == name or argument.startswith(name + "=") for argument in arguments)


def without_arguments(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """The arguments less those of these names and their values."""
    kept: list[str] = []
    skip_value = False
    for argument in arguments:
        if skip_value:
            skip_value = False
            if not argument.startswith("--"):
                continue
        if argument in names:
            skip_value = True
        elif not argument.startswith(tuple(name + "=" for name in names)):
            kept.append(argument)
    return kept
