"""Sees the random calls of torch, numpy and python, and may replace what they draw: `RandomCalls`.

Seen are the calls that draw from torch's generators, also those of the script's own, and the functions of the modules
`random` and `numpy.random`. Not seen are calls inside compiled code, of numpy's `Generator` and of `random.Random`.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from dmin_trace.capture.distributions import CHOOSE, Distribution, distribution_of

_TORCH = frozenset(
    {"bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "multinomial", "normal"}
    | {"normal_", "poisson", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "random_"}
    | {"randperm", "uniform_", "dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout"}
)
_PYTHON: tuple[str, ...] = (
    "random",
    "uniform",
    "randint",
    "randrange",
    "gauss",
    "normalvariate",
    "choice",
    "choices",
    "betavariate",
)
_PYTHON += ("triangular", "expovariate", "sample", "shuffle")
_NUMPY: tuple[str, ...] = (
    "rand",
    "random",
    "random_sample",
    "uniform",
    "randint",
    "randn",
    "standard_normal",
    "normal",
    "choice",
)
_NUMPY += ("beta", "binomial", "exponential", "poisson", "permutation", "shuffle")
_MODULES = (vars(random), "random", _PYTHON), (vars(np.random), "numpy", _NUMPY)
_FROM_ARGUMENTS = frozenset(
    {"bernoulli", "bernoulli_", "multinomial", "poisson", "normal", "dropout", "alpha_dropout", "feature_alpha_dropout"}
    | {"native_dropout", "random.choice", "random.choices", "random.sample", "random.shuffle", "numpy.choice"}
    | {"numpy.permutation", "numpy.shuffle", "numpy.binomial", "numpy.poisson"}
)
"""What these give depends on the tensors or lists that they are given."""


MAX_MEDIANS = 10**6
"""Draws in one fetch, or before a loop, that are replaced by medians: code may draw again until it likes the draw."""


@dataclass(frozen=True)
class RandomCall:
    """One random call, and what it drew.

    name: torch's name; those of python and numpy begin with `random.` and `numpy.`.
    args, named: its arguments.
    drawn: what it gave: a tensor, an array, a number, or what `choice` chose.
    """

    name: str
    args: Sequence[Any]
    named: Mapping[str, Any]
    drawn: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(getattr(self.drawn, "shape", ()))

    @property
    def numbers(self) -> int:
        """How many numbers were drawn."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def distribution(self) -> Distribution | None:
        """What it draws from, if its inverse is known."""
        return distribution_of(self.name, self.args, self.named)

    @property
    def values(self) -> Any:
        """What was drawn, or None if that depends on a tensor or a list that was given, and so on the sample."""
        return None if self.name in _FROM_ARGUMENTS else self.drawn

    def replaced(self, value: float) -> Any:
        """Gives each of the numbers that were drawn this value, in place if they are in a tensor or an array."""
        if self.name in CHOOSE:
            among = self.args[0] if self.args else self.named["a"]
            value = among[int(value)] if hasattr(among, "__getitem__") else value
        if isinstance(self.drawn, torch.Tensor):
            self.drawn.detach().fill_(value)
            return self.drawn
        if isinstance(self.drawn, np.ndarray):
            self.drawn[...] = value
            return self.drawn
        return type(self.drawn)(value) if isinstance(self.drawn, (int, float, np.generic)) else value


class RandomCalls(TorchFunctionMode):
    """While entered, passes each random call to `take`, whose result the caller gets.

    use: called with a torch generator that is not a global one, before it is drawn from.
    backward: what is called instead of `Tensor.backward`, with the same arguments; None leaves it as it is.
    """

    def __init__(
        self,
        take: Callable[[RandomCall], Any],
        *,
        use: Callable[[torch.Generator], None] = lambda generator: None,
        backward: Callable[..., None] | None = None,
    ) -> None:
        super().__init__()
        self._take, self._use, self._backward = take, use, backward
        self._entered = ExitStack()
        self._active = False
        self._replaced: list[dict[str, Callable[..., Any]]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if self._backward is not None and func is torch.Tensor.backward:
            return self._backward(*args, **(kwargs or {}))
        if name not in _TORCH:
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = dict(kwargs or {})
        if isinstance(generator := kwargs.get("generator"), torch.Generator):
            self._use(generator)
        drawn = func(*args, **kwargs)
        if "dropout" in name and not kwargs.get("training", args[2] if len(args) > 2 else True):
            return drawn
        return self._take(RandomCall(name, args, kwargs, drawn))

    def start(self) -> None:
        """Enters the mode. Not a `with` block, since the code that it covers is the script's."""
        self._entered.enter_context(self)
        self._active = True
        self._replaced = self._replaced or [
            {name: self._seen(f"{prefix}.{name}", functions[name]) for name in names}
            for functions, prefix, names in _MODULES
        ]
        for (functions, _, names), replaced in zip(_MODULES, self._replaced, strict=True):
            self._entered.callback(functions.update, {name: functions[name] for name in names})
            functions.update(replaced)

    def stop(self) -> None:
        """Leaves the mode."""
        self._active = False
        self._entered.close()

    @contextmanager
    def during(self) -> Iterator[None]:
        """Enters the mode for a `with` block."""
        self.start()
        try:
            yield
        finally:
            self.stop()

    def _seen(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            drawn = original(*args, **named)
            # Code that is imported meanwhile may keep this function.
            return self._take(RandomCall(name, args, named, drawn)) if self._active else drawn

        return call


def medians() -> RandomCalls:
    """While entered, each draw of one number is the median of its distribution.

    A data set changes its samples by such draws: it flips a picture or leaves a caption out with a probability below
    one half, and crops at a corner. The median does neither, and crops in the middle: the same for samples and queries.
    """

    left = MAX_MEDIANS

    def take(call: RandomCall) -> Any:
        nonlocal left
        left -= 1
        distribution = call.distribution if call.numbers == 1 and call.drawn is not None and left >= 0 else None
        return call.drawn if distribution is None else call.replaced(distribution.quantile(0.5))

    return RandomCalls(take)
