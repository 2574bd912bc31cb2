"""Caches the outputs of frozen modules for the length of one sample.

A training step encodes a sample's image and caption, which a capture would do again at each of the T timesteps. The
cache runs a module in which no parameter trains once for each call: inputs, compared bit by bit, and conditions. Not
cached are calls that draw random numbers or need a gradient, modules without hits, and modules in train mode.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch

from dmin_trace.capture.accelerate.loop_variables import replace_attribute
from dmin_trace.capture.random_state import RandomState

logger = logging.getLogger(__name__)
MAX_CACHED_CALLS, MAX_CACHE_MISSES = 4, 16
"""Calls of one module that are cached within a sample (a script may encode a prompt and an empty one), and misses
without a hit after which a module is no longer cached."""


@dataclass(frozen=True)
class _Call:
    """A call of a module and its output. The entry is invalid once one of their tensors has another version."""

    inputs: list[Any]
    output: Any
    versions: list[tuple[torch.Tensor, int]]

    def matches(self, inputs: list[Any]) -> bool:
        unchanged = all(tensor._version == version for tensor, version in self.versions)
        return unchanged and len(self.inputs) == len(inputs) and all(map(_same, self.inputs, inputs))


@dataclass
class _CachedModule:
    """A frozen module, its forward, its cached calls, and misses since a hit."""

    module: torch.nn.Module
    forward: Callable[..., Any]
    calls: list[_Call] = field(default_factory=list)
    misses: int = 0


class EncoderCache:
    """While entered, caches the outputs of frozen modules."""

    def __init__(self, values: Iterable[Any], trained: Iterable[torch.nn.Module]) -> None:
        """Finds frozen modules among values, and in lists, tuples and dicts among them, but no parts of `trained`."""
        own = {id(part) for model in trained for part in model.modules()}
        roots = {id(m): m for m in _modules_in(values) if _is_frozen(m) and own.isdisjoint(map(id, m.modules()))}
        # `vae.encode` calls the encoder without the module's own forward, so children are cached too.
        parts = {id(part): part for root in roots.values() for part in root.children() if _is_frozen(part)}
        self._cached = [_CachedModule(module, module.forward) for module in (roots | parts).values()]
        self._undo = ExitStack()
        self._inside = False

    def __enter__(self) -> Self:
        for cached in self._cached:
            self._undo.callback(replace_attribute(cached.module, "forward", partial(self._forward, cached)))
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()
        self._cached.clear()

    def forget(self) -> None:
        """Empties the cache, at the end of a sample."""
        for cached in self._cached:
            cached.calls.clear()

    def _forward(self, cached: _CachedModule, /, *args: Any, **named: Any) -> Any:
        # The calls of a cached module's parts are part of its own.
        if self._inside or cached.misses >= MAX_CACHE_MISSES:
            return cached.forward(*args, **named)
        try:
            kind = next(cached.module.parameters()).device.type
            autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            # In train mode batch norms would count a batch less.
            trains = any(part.training for part in cached.module.modules())
            inputs = None if trains else _contents((args, named, torch.is_grad_enabled(), *autocast))
            hit = None if inputs is None else next((call for call in cached.calls if call.matches(inputs)), None)
            if hit is not None:
                cached.misses = 0
                return _own_container(hit.output)
            before = RandomState()
        except Exception:
            # The cache only saves time: a call that cannot be compared is made.
            logger.debug("A frozen module's inputs could not be compared.", exc_info=True)
            inputs = None
        if inputs is None:
            return cached.forward(*args, **named)
        cached.misses += 1
        self._inside = True
        try:
            output = cached.forward(*args, **named)
        finally:
            self._inside = False
        try:
            made = _contents(output)
            if made is not None and before.is_now():
                versions = [(value, value._version) for value in inputs + made if isinstance(value, torch.Tensor)]
                cached.calls = [_Call(inputs, output, versions), *cached.calls][:MAX_CACHED_CALLS]
                return _own_container(output)
        except Exception:
            logger.debug("A frozen module's output could not be cached.", exc_info=True)
        return output


def _own_container(output: Any) -> Any:
    """The output in a new container. Its tensors are not copied: a copy would have a version of its own."""
    return output if isinstance(output, torch.Tensor) else copy.copy(output)


def _modules_in(values: Iterable[Any]) -> Iterator[torch.nn.Module]:
    for value in values:
        items = value.values() if type(value) is dict else value if type(value) in (list, tuple) else [value]
        yield from (item for item in items if isinstance(item, torch.nn.Module))


def _is_frozen(module: torch.nn.Module) -> bool:
    # Compiled modules do not call an instance's forward.
    compiled = isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod")
    parameters = list(module.parameters())
    return not compiled and bool(parameters) and not any(p.requires_grad for p in parameters)


def _contents(value: Any) -> list[Any] | None:
    """The tensors, scalars and containers in nested containers; None if there are others, or a tensor with a graph."""
    if isinstance(value, torch.Tensor):
        return None if value.requires_grad or value.is_inference() else [value]
    if isinstance(value, (type(None), bool, int, float, str, torch.dtype, torch.device)):
        return [value]
    if not isinstance(value, (list, tuple, Mapping)):
        return None
    found: list[Any] = [list(value) if isinstance(value, Mapping) else type(value), len(value)]
    for item in value.values() if isinstance(value, Mapping) else value:
        inside = _contents(item)
        if inside is None:
            return None
        found += inside
    return found


def _same(a: Any, b: Any) -> bool:
    """Whether two values are the same, tensors compared bit by bit."""
    if type(a) is not type(b):
        return False
    if not isinstance(a, torch.Tensor):
        return bool(a == b)
    alike = (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())
    return a is b or (alike and torch.equal(*(one.contiguous().view(-1).view(torch.uint8) for one in (a, b))))
