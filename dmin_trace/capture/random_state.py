"""The global random generators: their seeds during a capture, and their states before and after it."""

import pickle
import random
import zlib

import numpy as np
import torch


def seed_of(seed: int, stream: int, draw: int = 0) -> int:
    """A 32-bit seed for each stream (0 for the samples' augmentation, k + 1 for timestep k) and draw of its noise."""
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


def generator_marks() -> tuple[int, ...]:
    """Numbers that tell how far torch's global generators are: equal seeds with equal draws since give equal numbers.

    Nothing waits for a device: a CUDA generator counts its draws on the processor.
    """
    states = [torch.default_generator.get_state()]
    if torch.backends.mps.is_available():
        states.append(torch.mps.get_rng_state())
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    offsets = [generator.get_offset() for generator in torch.cuda.default_generators] if started else []
    return *(zlib.crc32(state.numpy().tobytes()) for state in states), *offsets


class RandomState:
    """The states of all global generators at the moment when this is made, to be restored later."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        # Reading its state would start an uninitialised CUDA.
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        self._mps = [torch.mps.get_rng_state()] if torch.backends.mps.is_available() else []
        self._numpy = dict(np.random.get_state(legacy=False))
        self._python = random.getstate()

    def is_now(self) -> bool:
        """Whether the states are the same now: nothing was drawn since."""
        now = RandomState()
        mine, others = ([state._cpu, *state._cuda, *state._mps] for state in (self, now))
        same = len(mine) == len(others) and all(map(torch.equal, mine, others)) and self._python == now._python
        return same and pickle.dumps(self._numpy) == pickle.dumps(now._numpy)

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        torch.cuda.set_rng_state_all(self._cuda)
        for state in self._mps:
            torch.mps.set_rng_state(state)
        np.random.set_state(self._numpy)
        random.setstate(self._python)
