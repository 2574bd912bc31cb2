"""The distribution that a random call of torch, numpy or python draws from, and its inverse.

Pinning a draw at a fraction u gives it the u-quantile of its own distribution, so T fractions that are spread evenly
give T draws that are distributed as the script's own are.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch

from dmin_trace.errors import CaptureError


@dataclass(frozen=True)
class Distribution:
    """What a call draws each of its numbers from.

    quantile: the number below which a fraction u of the draws lies, for 0 < u < 1.
    integers: the integers that are drawn, if it draws integers.
    """

    quantile: Callable[[float], float]
    integers: range | None = None

    def integer(self, value: int, name: str) -> int:
        """The value, if the call can draw it. Raises CaptureError if it cannot."""
        if self.integers is None:
            raise CaptureError(
                f"The settings list timesteps, but the script draws its timestep by {name}, which gives no integers. "
                "Give the number of timesteps, such as timesteps=10."
            )
        if value not in self.integers:
            raise CaptureError(
                f"The settings have timestep {value}, but the script draws its timesteps from {self.integers.start} to "
                f"{self.integers.stop - 1}. Give timesteps within the schedule."
            )
        return value


def distribution_of(name: str, args: Sequence[Any], named: Mapping[str, Any]) -> Distribution | None:
    """The distribution of a random call, by its name and arguments; None if its inverse is not known here.

    Names of python's and numpy's calls begin with `random.` and `numpy.`. Arguments may be tensors of one number.
    """
    make = _DISTRIBUTIONS.get(name)
    return None if make is None else make(args, named)


def _integers(low: Any, high: Any) -> Distribution:
    """The integers from low to high - 1, all equally likely."""
    low, high = int(low), int(high)
    return Distribution(lambda u: low + min(int(u * (high - low)), high - low - 1), range(low, high))


def _uniform(low: Any = 0.0, high: Any = 1.0) -> Distribution:
    low, high = float(low), float(high)
    return Distribution(lambda u: low + u * (high - low))


def _normal(mean: Any = 0.0, deviation: Any = 1.0) -> Distribution | None:
    if any(isinstance(value, torch.Tensor) and value.numel() != 1 for value in (mean, deviation)):
        return None
    mean, deviation = float(mean), float(deviation)
    return Distribution(lambda u: mean + deviation * NormalDist().inv_cdf(u))


def _weighted(weights: Any) -> Distribution | None:
    """The index of one of the weights."""
    weights = torch.as_tensor(weights)
    if weights.dim() != 1 or len(weights) == 0:
        return None
    # Up to each index, of all the weight.
    up_to = weights.detach().double().cpu().cumsum(0)
    last = len(weights) - 1
    return Distribution(
        lambda u: min(int(torch.searchsorted(up_to, u * float(up_to[-1]), right=True)), last), range(len(weights))
    )


def _argument(args: Sequence[Any], named: Mapping[str, Any], position: int, name: str, default: Any) -> Any:
    return named.get(name, args[position] if len(args) > position else default)


def _standard(make: Callable[[], Distribution | None]) -> Callable[[Sequence[Any], Mapping[str, Any]], Any]:
    """A call whose arguments say nothing of the distribution."""
    return lambda args, named: make()


def _pair(
    make: Callable[[Any, Any], Distribution | None], names: tuple[str, str], at: int = 0, defaults: Any = (0.0, 1.0)
) -> Callable[[Sequence[Any], Mapping[str, Any]], Distribution | None]:
    """A call with two numbers, from the argument `at` on."""
    return lambda args, named: make(
        *(_argument(args, named, at + k, name, defaults[k]) for k, name in enumerate(names))
    )


def _bounds(at: int, names: tuple[str, str]) -> Callable[[Sequence[Any], Mapping[str, Any]], Distribution | None]:
    """A call with one bound, which is the upper one, or with two, from the argument `at` on."""

    def make(args: Sequence[Any], named: Mapping[str, Any]) -> Distribution | None:
        found = [value for value in args[at : at + 2] if isinstance(value, (int, torch.Tensor)) or _is_number(value)]
        low = named.get(names[0], found[0] if len(found) == 2 or names[1] in named and found else 0)
        high = named.get(names[1], found[-1] if found else None)
        if high is None and names[0] in named:
            low, high = 0, named[names[0]]
        return None if high is None else _integers(low, high)

    return make


def _is_number(value: Any) -> bool:
    """A numpy integer, for example."""
    return hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0


def _choice(args: Sequence[Any], named: Mapping[str, Any]) -> Distribution | None:
    """The index of what python's or numpy's `choice` chooses."""
    among, weights = _argument(args, named, 0, "a", None), _argument(args, named, 3, "p", None)
    if weights is not None:
        return _weighted(weights)
    return _integers(0, among if isinstance(among, int) else len(among))


_DISTRIBUTIONS: dict[str, Callable[[Sequence[Any], Mapping[str, Any]], Distribution | None]] = {
    **dict.fromkeys(("rand", "rand_like", "random.random"), _standard(_uniform)),
    **dict.fromkeys(("numpy.rand", "numpy.random", "numpy.random_sample"), _standard(_uniform)),
    **dict.fromkeys(("randn", "randn_like", "numpy.randn", "numpy.standard_normal"), _standard(_normal)),
    "uniform_": _pair(_uniform, ("from", "to"), at=1),
    "random.uniform": _pair(_uniform, ("a", "b")),
    "numpy.uniform": _pair(_uniform, ("low", "high")),
    "normal_": _pair(_normal, ("mean", "std"), at=1),
    "normal": _pair(_normal, ("mean", "std")),
    "numpy.normal": _pair(_normal, ("loc", "scale")),
    **dict.fromkeys(("random.gauss", "random.normalvariate"), _pair(_normal, ("mu", "sigma"))),
    "randint": _bounds(0, ("low", "high")),
    "randint_like": _bounds(1, ("low", "high")),
    "random_": _bounds(1, ("from", "to")),
    "numpy.randint": _bounds(0, ("low", "high")),
    "random.randrange": lambda args, named: None if len(args) > 2 else _bounds(0, ("start", "stop"))(args, named),
    # Both ends are drawn.
    "random.randint": _pair(lambda a, b: _integers(a, int(b) + 1), ("a", "b")),
    "multinomial": lambda args, named: _weighted(_argument(args, named, 0, "input", None)),
    "random.choice": _choice,
    "numpy.choice": _choice,
}
CHOOSE = ("random.choice", "numpy.choice")
"""Calls whose quantile is the index of what they choose."""


def distance(a: float, b: float) -> float:
    """How far apart two draws are; numbers that cannot be compared are infinitely far."""
    return abs(a - b) if math.isfinite(a) and math.isfinite(b) else math.inf
