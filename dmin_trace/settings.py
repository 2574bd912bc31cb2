"""What to capture and how: frozen, checked at birth.

Everything here changes the numbers in a store, so everything here is kept in the store and met again by a query.
Where the store lies and when the training run ends are arguments of `attach`, not settings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from dmin_trace.errors import SettingsError, brief

Dtype = Literal["int8", "float16", "float32"]
Projection = Literal["rotation", "uniform"]
Transform = Literal["none", "sign"]
Codec = Literal["none", "blosc"]

SMALLEST_DIMENSION = 2**4
LARGEST_DIMENSION = 2**24
MOST_TIMESTEPS = 1000
MOST_DRAWS = 1000
COLUMN_NAME = re.compile(r"\w[\w .-]{0,99}")
"""A column is kept in a folder of its name."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a capture takes from each training sample.

    timesteps: a count T, spread evenly over the schedule (slot k at the fraction (k + 1/2) / T of it), or the
        timesteps themselves, as the script's own timestep draw would give them.
    dimension: v, the length of a compressed gradient; a power of two.
    dtype: how a compressed gradient is stored; int8 carries one float32 scale for each (sample, timestep).
    projection: "rotation" (matrix-free, the default) or "uniform" (OPORP to the letter, paper section 3.2:
        one permutation and one sign for each parameter, kept in memory).
    seed: of the projection and of the noise that all samples share at a timestep.
    draws: D, how many noises are drawn at each timestep, the same for all samples. A gradient is then the mean of D, at
        the cost of D passes and of one more gradient in memory. The first draw is that of draws=1.
    transform: what is done to each element of a gradient before it is compressed and normalised; the norms in the
        store are of the transformed gradient. "sign" (the default) takes the sign of each element, "none" leaves the
        gradient as it is (the paper). Measurements of both are in docs/quality.md.
    codec: how the file of a chunk is packed: "none" (the default) is read as it lies; "blosc" (Zstandard after a bit
        shuffle) is smaller by a few per cent and slower, for archives where bytes cost more than time.
    columns: dataset columns kept for people to read; None keeps those of the usual names (caption, label, file_name
        and the like) that the dataset has.

    Raises SettingsError for a value that cannot be meant.
    """

    timesteps: int | tuple[int, ...] = 10
    dimension: int = 2**14
    dtype: Dtype = "int8"
    projection: Projection = "rotation"
    seed: int = 0
    draws: int = 1
    transform: Transform = "sign"
    codec: Codec = "none"
    columns: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        self._check_timesteps()
        if not _is_integer(self.dimension) or not (
            SMALLEST_DIMENSION <= self.dimension <= LARGEST_DIMENSION and self.dimension & (self.dimension - 1) == 0
        ):
            raise SettingsError(
                f"dimension is {brief(self.dimension)}; expected a power of two from {SMALLEST_DIMENSION} to "
                f"{LARGEST_DIMENSION}, such as 16384."
            )
        if not _is_integer(self.seed) or not 0 <= self.seed < 2**32:
            raise SettingsError(f"seed is {brief(self.seed)}; expected an integer from 0 to 2**32 - 1.")
        if not _is_integer(self.draws) or not 1 <= self.draws <= MOST_DRAWS:
            raise SettingsError(f"draws is {brief(self.draws)}; expected a count from 1 to {MOST_DRAWS}.")
        choices = {
            "dtype": Dtype,
            "projection": Projection,
            "transform": Transform,
            "codec": Codec,
        }
        for name, kind in choices.items():
            value = getattr(self, name)
            if value not in get_args(kind):
                raise SettingsError(f"{name} is {brief(value)}; expected one of {', '.join(get_args(kind))}.")
        if self.columns is not None and not (
            isinstance(self.columns, tuple)
            and all(isinstance(name, str) and COLUMN_NAME.fullmatch(name) for name in self.columns)
        ):
            raise SettingsError(
                f"columns is {brief(self.columns)}; expected names of dataset columns, made of letters, digits, '_', "
                "'-', '.' and spaces."
            )

    def _check_timesteps(self) -> None:
        if _is_integer(self.timesteps):
            if not 1 <= self.timesteps <= MOST_TIMESTEPS:  # type: ignore[operator]
                raise SettingsError(
                    f"timesteps is {brief(self.timesteps)}; expected a count from 1 to {MOST_TIMESTEPS}."
                )
            return
        given = self.timesteps
        if not isinstance(given, tuple) or not given or not all(_is_integer(t) and t >= 0 for t in given):
            raise SettingsError(
                f"timesteps is {brief(given)}; expected a count, or a list of integers that are not negative."
            )
        if len(set(given)) != len(given) or len(given) > MOST_TIMESTEPS:
            raise SettingsError(f"timesteps is {brief(given)}; expected at most {MOST_TIMESTEPS} timesteps, each once.")

    @property
    def timestep_count(self) -> int:
        """T, the number of timesteps captured for each sample."""
        return self.timesteps if isinstance(self.timesteps, int) else len(self.timesteps)


def make_settings(given: Mapping[str, Any]) -> Settings:
    """Settings from keywords or from JSON: lists become tuples, what is None or absent keeps its default.

    Raises SettingsError for a name that is no setting or a value that cannot be meant.
    """
    known = {field.name for field in fields(Settings)}
    if unknown := set(given) - known:
        names = ", ".join(sorted(unknown))
        raise SettingsError(f"{names[:120]} is no setting; expected {', '.join(sorted(known))}.")
    kept: dict[str, Any] = {
        name: tuple(value) if isinstance(value, (list, tuple)) else value
        for name, value in given.items()
        if value is not None
    }
    return Settings(**kept)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
