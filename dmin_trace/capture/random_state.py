"""The global random generators: their seeds during a capture, and their states before and after it."""

import pickle
import random
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch


def seed_of(seed: int, stream: int, draw: int = 0) -> int:
    """A 32-bit seed for each stream of a capture: 0 for the samples' augmentation, k + 1 for timestep k.

    `draw` is d of a timestep's noise. The first has the same seed whatever the number of draws.
    """
    return int(np.random.SeedSequence([seed, stream, *([draw] if draw else [])]).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Seeds the generators of torch (all devices), numpy and python."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        # torch.manual_seed records a stack trace for a later start of a GPU, which takes time in each training step.
        torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@dataclass(frozen=True)
class RandomState:
    """The states of all global generators at one moment, to be restored later."""

    torch_cpu: torch.Tensor
    torch_cuda: list[torch.Tensor]
    torch_mps: torch.Tensor | None
    numpy: dict[str, Any]
    python: tuple[Any, ...]

    @classmethod
    def take(cls) -> Self:
        """Copies the states of all global generators."""
        return cls(
            torch_cpu=torch.get_rng_state(),
            # Reading its state would start an uninitialised CUDA.
            torch_cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
            torch_mps=torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
            numpy=dict(np.random.get_state(legacy=False)),
            python=random.getstate(),
        )

    def is_now(self) -> bool:
        """Whether the states are the same now: nothing was drawn since."""
        now = RandomState.take()
        mine, others = self._tensors(), now._tensors()
        return (
            len(mine) == len(others)
            and all(map(torch.equal, mine, others))
            and pickle.dumps(self.numpy) == pickle.dumps(now.numpy)
            and self.python == now.python
        )

    def _tensors(self) -> list[torch.Tensor]:
        return [self.torch_cpu, *self.torch_cuda, *([] if self.torch_mps is None else [self.torch_mps])]

    def restore(self) -> None:
        """Puts all global generators back."""
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda:
            torch.cuda.set_rng_state_all(self.torch_cuda)
        if self.torch_mps is not None:
            torch.mps.set_rng_state(self.torch_mps)
        np.random.set_state(self.numpy)
        random.setstate(self.python)
