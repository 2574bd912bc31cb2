"""What a capture takes from each training sample: the settings, checked when they are made.

Every setting but `columns` and `thumbnails` changes the numbers in a store. All are kept in its header, and a query
uses them again. The settings are listed here and nowhere else. The command line makes an option of each field that has
a `help` text.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypedDict, get_args

from dmin_trace.errors import SettingsError, brief

Dtype = Literal["int8", "float16", "float32"]
Projection = Literal["rotation", "uniform"]
Transform = Literal["sign", "none"]
Codec = Literal["none", "blosc"]

MIN_DIMENSION, MAX_DIMENSION = 2**4, 2**24
MAX_PASSES = 1000
"""Timesteps of a sample, and draws at a timestep, at most."""
MIN_THUMBNAIL, MAX_THUMBNAIL = 16, 512
"""Pixels of the longer side of a thumbnail."""
COLUMN_NAME = re.compile(r"\w[\w .-]{0,99}")
"""A column is kept in a folder of its name."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a capture takes from each training sample.

    timesteps: the number T of timesteps, spread evenly over those that the script draws (timestep k is the quantile
        (k + 1/2) / T of its draw), or the timesteps themselves, as the script draws them, if it draws integers.
    dimension: v, the length of a projected gradient; a power of two.
    dtype: how a projected gradient is stored. int8 has one float32 scale for each (sample, timestep).
    projection: the random projection. "rotation" needs little memory; "uniform" is OPORP as in the paper (section
        3.2): a permutation and a sign for each parameter, kept in memory.
    transform: what is done to each element of a gradient before the projection. "sign" takes its sign, which finds
        both similar samples and influential ones better than "none", the paper's (docs/quality.md). The norms in the
        store are those of the transformed gradient.
    draws: D, the number of noises drawn at each timestep, the same for all samples. The gradient is the mean of D, at
        the cost of D passes and of one more gradient in memory. The first draw is that of draws=1.
    rows: R, the number of projected gradients that are kept of each sample. None keeps one for each timestep. A number
        from 1 to T pools timesteps: those that follow each other in `timesteps` form R groups of sizes as equal as
        possible, the larger groups first; the mean of a group's gradients, which is the gradient of its mean loss, is
        transformed and projected. A capture makes as many passes, with one more gradient in memory; the store, its
        index and a query's scan are R / T as large. A number T is the same as None.
    seed: the seed of the projection, and of the noise that all samples share at a timestep.
    codec: how chunks of gradients are compressed on disk. "none" is read by memory map; "blosc" (Zstandard after a bit
        shuffle) is a few per cent smaller and slower to read, for archives.
    columns: the dataset columns kept for people to read. None keeps the script's column of captions and usual ones:
        text, label and the like. The file of each sample, file_name, is always kept if it is known.
    thumbnails: the pixels of the longer side of the small picture that is kept of each sample, as the model saw it or
        else of its file, for people to look at. A smaller picture is kept as it is. 0 keeps none.

    Raises SettingsError for a value that is out of range or of the wrong type.
    """

    timesteps: int | tuple[int, ...] = field(default=10, metadata={"help": "A number, or a list such as 100,500,900."})
    dimension: int = field(default=2**14, metadata={"help": "Length of a projected gradient, a power of two."})
    dtype: Dtype = field(default="int8", metadata={"help": "How projected gradients are stored."})
    projection: Projection = field(default="rotation", metadata={"help": "The random projection."})
    transform: Transform = field(
        default="sign", metadata={"help": "Applied to gradient elements. none is the paper's."}
    )
    draws: int = field(default=1, metadata={"help": "Noises drawn at each timestep; gradients are averaged."})
    rows: int | None = field(
        default=None,
        metadata={"help": "Rows kept of a sample; timesteps are pooled into them. Default: one for each timestep."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the projection and of the shared noise."})
    codec: Codec = field(default="none", metadata={"help": "Compression on disk. blosc is smaller and slower."})
    columns: tuple[str, ...] | None = field(default=None, metadata={"help": "A column to keep. May be repeated."})
    thumbnails: int = field(default=128, metadata={"help": "Pixels of the picture kept of a sample; 0 keeps none."})

    def __post_init__(self) -> None:
        for name, right, expected in self._checks():
            if not right:
                raise SettingsError(f"{name} is {brief(getattr(self, name))}; expected {expected}.")

    def _checks(self) -> Iterator[tuple[str, bool, str]]:
        """For each setting: whether it is right, and what is expected."""
        steps, size, columns = self.timesteps, self.dimension, self.columns
        listed = isinstance(steps, tuple) and bool(steps) and all(_is_integer(step, 0) for step in steps)
        expected = f"a number from 1 to {MAX_PASSES}, or a list of integers that are not negative"
        yield "timesteps", listed or _is_integer(steps, 1, MAX_PASSES), expected
        once = isinstance(steps, int) or len(set(steps)) == len(steps) <= MAX_PASSES
        yield "timesteps", once, f"at most {MAX_PASSES} timesteps, each once"
        power = _is_integer(size, MIN_DIMENSION, MAX_DIMENSION) and not size & (size - 1)
        yield "dimension", power, f"a power of two from {MIN_DIMENSION} to {MAX_DIMENSION}, such as 16384"
        yield "seed", _is_integer(self.seed, 0, 2**32 - 1), "an integer from 0 to 2**32 - 1"
        yield "draws", _is_integer(self.draws, 1, MAX_PASSES), f"a number from 1 to {MAX_PASSES}"
        count = self.timestep_count
        fitting = self.rows is None or _is_integer(self.rows, 1, count)
        yield "rows", fitting, f"None, or a number from 1 to {count}, the number of timesteps"
        for name, kind in {"dtype": Dtype, "projection": Projection, "transform": Transform, "codec": Codec}.items():
            yield name, getattr(self, name) in get_args(kind), f"one of {', '.join(get_args(kind))}"
        named = isinstance(columns, tuple) and all(isinstance(n, str) and COLUMN_NAME.fullmatch(n) for n in columns)
        expected = "names of dataset columns, made of letters, digits, '_', '-', '.' and spaces"
        yield "columns", columns is None or named, expected
        side = self.thumbnails
        fitting = _is_integer(side, 0, 0) or _is_integer(side, MIN_THUMBNAIL, MAX_THUMBNAIL)
        yield "thumbnails", fitting, f"0 for none, or a number of pixels from {MIN_THUMBNAIL} to {MAX_THUMBNAIL}"

    @property
    def timestep_count(self) -> int:
        """T, the number of timesteps captured for each sample."""
        return self.timesteps if isinstance(self.timesteps, int) else len(self.timesteps)

    @property
    def group_count(self) -> int | None:
        """R, the number of groups that timesteps are pooled into; None if each has a row of its own."""
        return None if self.rows == self.timestep_count else self.rows

    @property
    def groups(self) -> tuple[range, ...]:
        """For each of a sample's rows the numbers of its timesteps."""
        return group_timesteps(self.timestep_count, self.group_count)


def group_timesteps(count: int, groups: int | None) -> tuple[range, ...]:
    """Groups of neighbours among timesteps 0 to count - 1, as equal as possible, the larger first; None: one each."""
    size, larger = divmod(count, groups or count)
    starts = [size * k + min(k, larger) for k in range((groups or count) + 1)]
    return tuple(range(start, stop) for start, stop in zip(starts, starts[1:], strict=False))


class RecordingOverrides(TypedDict, total=False):
    """The settings as keyword arguments of `recording`, whose columns are values: each means what its field does."""

    timesteps: int | tuple[int, ...] | list[int]
    dimension: int
    dtype: Dtype
    projection: Projection
    transform: Transform
    draws: int
    rows: int | None
    seed: int
    codec: Codec
    thumbnails: int


class SettingsOverrides(RecordingOverrides, total=False):
    """The settings as keyword arguments: each means what the field of `Settings` with its name does."""

    columns: tuple[str, ...] | list[str] | None


def make_settings(given: Mapping[str, Any]) -> Settings:
    """Settings from keywords or JSON: lists become tuples, and None is left out. Errors are as of `Settings`."""
    known = {field.name for field in fields(Settings)}
    if unknown := ", ".join(sorted(set(given) - known)):
        raise SettingsError(f"{unknown[:120]} is not a setting; expected {', '.join(sorted(known))}.")
    kept: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items() if v is not None}
    return Settings(**kept)


def given_settings(settings: Settings | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a caller gave, by name: overrides replace those of `settings`. Errors are as of `Settings`."""
    if settings is not None and not isinstance(settings, Settings):
        raise SettingsError(f"settings is a {type(settings).__name__}; expected dmin_trace.Settings(...).")
    pairs = [*({} if settings is None else asdict(settings)).items(), *overrides.items()]
    given = {name: value for name, value in pairs if value is not None}
    make_settings(given)
    return given


def _is_integer(value: object, lowest: int, highest: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest
