"""The models that a run calls, and a fingerprint of what in them does not train: `UsedModels`.

A row depends on every parameter and buffer that its training step uses: those of the denoiser below a LoRA, of the
autoencoder, of the text encoders. A model that runs before the loop (captions that are encoded in advance) counts too.
Each is read once, on its device, when it is first called: a script may delete it afterwards.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any
from weakref import WeakSet

import google_crc32c
import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from dmin_trace.store import ModelFacts

logger = logging.getLogger(__name__)
BLOCK_WORDS = 2**20
"""Numbers of 32 bits that have one checksum. A block takes 16 MiB on the device while it is read."""


class UsedModels:
    """Sees which models are called, from `watch_setup` to the loop, and from `watch_steps` to `stop`.

    variables: those of the loop, which give models names; they are let go with `stop`.
    facts: the models that were called, and their fingerprints.
    autocast, dtypes, attention: the dtypes under autocast and of the models in training steps; their attention.
    """

    def __init__(self, variables: Mapping[str, Any] | None = None) -> None:
        self.variables: Mapping[str, Any] = variables or {}
        self.facts: list[ModelFacts] = []
        self.autocast: set[str] = set()
        self.dtypes: set[str] = set()
        self.attention: set[str] = set()
        self._seen = WeakSet[torch.nn.Module]()
        self._trained: frozenset[int] = frozenset()
        self._in_steps = False
        self._hook: Any = None

    def watch_setup(self) -> None:
        """Begins to look at frozen models that are called before the script's loop."""
        self._start(in_steps=False)

    def watch_steps(self, trained: Sequence[torch.nn.Parameter]) -> None:
        """Begins to look at the models in training steps, less what is `trained`."""
        self._trained = frozenset(map(id, trained))
        self.dtypes |= {_short(p.dtype) for p in trained}
        self._start(in_steps=True)

    def stop(self) -> None:
        """Looks no longer. A second call does nothing."""
        if self._hook is not None:
            self._hook.remove()
        self._hook, self.variables = None, {}
        self._seen.clear()

    def _start(self, *, in_steps: bool) -> None:
        variables = self.variables
        self.stop()
        self.variables, self._in_steps = variables, in_steps
        self._hook = register_module_forward_pre_hook(self._see)

    def _see(self, module: torch.nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        try:
            if self._in_steps:
                self._note_autocast()
            # The parts of a model are called after it.
            if module not in self._seen:
                self._seen.update(module.modules())
                self._note(module)
        except Exception as error:
            # A kind of tensor without bytes, for example. The script's own call goes on.
            found = f"{type(module).__name__} has no fingerprint ({type(error).__name__}: {error})"
            logger.warning("%s: queries and continued captures will not compare it.", found)

    def _note_autocast(self) -> None:
        for kind in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(kind):
                self.autocast.add(_short(torch.get_autocast_dtype(kind)))

    def _note(self, module: torch.nn.Module) -> None:
        if not self._in_steps and any(p.requires_grad for p in module.parameters()):
            # What trains has its own fingerprint, and other values by the end of the training.
            return
        tensors = [t for t in chain(module.parameters(), module.buffers()) if id(t) not in self._trained]
        if self._in_steps:
            self.dtypes |= {_short(t.dtype) for t in tensors if t.is_floating_point()}
            self.attention |= _attention_in(module)
        if not tensors:
            return
        facts = ModelFacts(
            name=self._name(module),
            kind=type(_inside(module)).__name__,
            numbers=sum(t.numel() for t in tensors),
            sha256=fingerprint_on_device(tensors),
            in_steps=self._in_steps,
        )
        if facts not in self.facts:
            self.facts.append(facts)

    def _name(self, module: torch.nn.Module) -> str:
        """The script's name for a model or a part of one (`vae.encoder`), or the name of its class."""
        named = {name: value for name, value in self.variables.items() if isinstance(value, torch.nn.Module)}
        for name, value in named.items():
            if _inside(value) is _inside(module):
                return name
        for name, value in named.items():
            for path, part in value.named_modules():
                if part is module:
                    return f"{name}.{path}"
        return type(_inside(module)).__name__


def differing_model(theirs: Iterable[ModelFacts], ours: Iterable[ModelFacts]) -> ModelFacts | None:
    """The first model that only one of two runs has in its training steps; None if both have the same.

    A model that is called before the loop alone is compared with those of its class, if the other run called any: a
    script may find what it computes in a cache.
    """
    known, found = ({model.sha256: model for model in models} for models in (theirs, ours))
    kinds = {model.kind for model in known.values()}
    for model in found.values():
        if model.sha256 not in known and (model.in_steps or model.kind in kinds):
            return model
    return next((model for model in known.values() if model.in_steps and model.sha256 not in found), None)


def fingerprint_on_device(tensors: Iterable[torch.Tensor]) -> str:
    """Returns the SHA-256 over dtypes, shapes and checksums of all values, block by block, computed on the device.

    On a processor the checksum of a block is its crc32c; elsewhere it is a sum of products with fixed odd numbers,
    modulo 2^64. Both change with every change of one value, and any other change escapes them once in 2^32 times.
    """
    digest, keys = hashlib.sha256(), dict[torch.device, torch.Tensor]()
    with torch.no_grad():
        for tensor in tensors:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            if tensor.is_meta:
                continue
            if tensor.device.type == "cpu":
                digest.update(b"".join(_crc_of_blocks(tensor)))
            else:
                if tensor.device not in keys:
                    keys[tensor.device] = _block_keys().to(tensor.device)
                digest.update(block_sums(tensor, keys[tensor.device]).cpu().numpy().tobytes())
    return digest.hexdigest()


def block_sums(tensor: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Returns the checksum of each block of a tensor, int64, on its device."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if rest := data.numel() % 4:
        data = torch.nn.functional.pad(data, (0, 4 - rest))
    blocks = torch.split(data.view(torch.int32), BLOCK_WORDS)
    sums = [(words.long() * keys[: len(words)]).sum() for words in blocks]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64)


def _block_keys() -> torch.Tensor:
    # numpy's generator: the script's own generators must not be drawn from.
    drawn = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, BLOCK_WORDS, dtype=np.int64)
    return torch.from_numpy(drawn | 1)


def _crc_of_blocks(tensor: torch.Tensor) -> Iterator[bytes]:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    data.flags.writeable = False
    for start in range(0, len(data), 4 * BLOCK_WORDS):
        yield int(google_crc32c.value(data[start : start + 4 * BLOCK_WORDS])).to_bytes(4, "little")


def _attention_in(module: torch.nn.Module) -> set[str]:
    """The kinds of attention that the parts of a model are set to: diffusers' processors, transformers' settings."""
    found = set()
    for part in module.modules():
        if (processor := getattr(part, "processor", None)) is not None:
            found.add(type(processor).__name__)
        if (chosen := getattr(getattr(part, "config", None), "_attn_implementation", None)) is not None:
            found.add(str(chosen))
    return found


def _inside(module: torch.nn.Module) -> torch.nn.Module:
    """The model inside DistributedDataParallel or torch.compile's module."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            inner = module.module
        if not isinstance(inner, torch.nn.Module):
            return module
        module = inner


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
