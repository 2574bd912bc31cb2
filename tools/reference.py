"""Per-sample gradients of a training script's loss, the plain way: nothing of dmin_trace's loop driver is used.

    python tools/reference.py TRACE OUT.npy -- SCRIPT ARGS

Runs the script with a data loader that yields each sample alone, once for each timestep; the generators seeded as the
documentation says; the timestep draw replaced; an optimizer that does nothing; and a `backward` that takes the gradient
with autograd. The script must not end by itself before that: give it --max_train_steps 1000000. Writes the gradients as
a trace keeps them, compressed and of norm 1: (N, T, v) float32.
"""

from __future__ import annotations

import random
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any

import accelerate
import diffusers.training_utils
import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file

from dmin_trace.project import compress_gradient, make_plan
from dmin_trace.store import open_store


class Done(Exception):  # noqa: N818
    """All gradients are taken."""


class Reference:
    """Stands in for what accelerate and diffusers give to a script, while this is the only thing that runs."""

    def __init__(self, trace: Path) -> None:
        self.store = open_store(trace)
        header = self.store.header
        self.seed, self.timesteps = header.noise.seed, len(header.timesteps)
        facts = header.projection
        self.plan = make_plan(facts.length, header.dimension, facts.seed, facts.kind, facts.width)
        self.weights = load_file(trace.with_name(f"{trace.stem}.weights.safetensors"))
        self.rows: list[np.ndarray] = []
        self.slot = -1
        self.fetching = False
        self.models: list[torch.nn.Module] = []
        self.loader: Any = None
        self.random, self.choice = random.random, random.choice
        self.randint, self.rand, self.multinomial = torch.randint, torch.rand, torch.multinomial
        self.density = diffusers.training_utils.compute_density_for_timestep_sampling

    def seed_of(self, stream: int) -> int:
        """The seed of stream 0 is for the sample's augmentation, that of stream k + 1 for slot k."""
        return int(np.random.SeedSequence([self.seed, stream]).generate_state(1)[0])

    def seed_all(self, stream: int) -> None:
        """Seeds the global generators, and the script's own at its first draw after this."""
        seed = self.seed_of(stream)
        self.seeded = set[int]()
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def install(self) -> None:
        """Puts itself in the place of accelerate's preparation, backward and steps, and of the timestep draws."""
        prepare = accelerate.Accelerator.prepare

        def prepared(accelerator: Any, *objects: Any, **options: Any) -> Any:
            results = prepare(accelerator, *objects, **options)
            for result in results if isinstance(results, tuple) else (results,):
                if isinstance(result, torch.nn.Module):
                    self.models.append(result)
                elif isinstance(result, torch.utils.data.DataLoader) and self.loader is None:
                    self.loader = result
                    type(result).__iter__ = lambda loader: self.batches()
            return results

        accelerate.Accelerator.prepare = prepared
        accelerate.Accelerator.backward = lambda _, loss, **options: self.backward(loss)
        AcceleratedOptimizer.step = lambda _, closure=None: None
        torch.randint, torch.rand = self.pinned_randint, self.seeded_rand
        torch.multinomial = self.pinned_multinomial
        random.random, random.choice = self.median_random, self.median_choice
        diffusers.training_utils.compute_density_for_timestep_sampling = self.pinned_density

    def fraction(self) -> float:
        """Where in the schedule the slot is."""
        return (self.slot + 0.5) / self.timesteps

    def median_random(self) -> float:
        """While a sample is fetched, the median."""
        return 0.5 if self.fetching else self.random()

    def median_choice(self, among: Any) -> Any:
        """While a sample is fetched, the one in the middle."""
        return among[len(among) // 2] if self.fetching else self.choice(among)

    def pinned_randint(self, *args: Any, **options: Any) -> torch.Tensor:
        """A draw from a schedule of 1000 is the slot's timestep. While a sample is fetched, one is the median."""
        drawn = self.randint(*args, **options)
        if self.slot >= 0 and 1000 in args[:2]:
            drawn.fill_(int(self.fraction() * 1000))
        if self.fetching and drawn.numel() == 1:
            low, high = args[:2]
            drawn.fill_(low + (high - low) // 2)
        return drawn

    def pinned_multinomial(self, weights: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """The draw of the timesteps where some are preferred."""
        drawn = self.multinomial(weights, *args, **options)
        if self.slot < 0 or len(weights) != 1000:
            return drawn
        cumulative = np.cumsum(weights.double().numpy())
        return torch.full_like(drawn, int(np.sum(cumulative <= self.fraction() * cumulative[-1])))

    def seeded_rand(self, *args: Any, **options: Any) -> torch.Tensor:
        """A draw of one number is the slot's place, or the median while a sample is fetched.

        One from a generator of the script's own is not: InstructPix2Pix drops its conditioning by one.
        """
        generator = options.get("generator")
        if self.slot >= 0 and generator is not None and id(generator) not in self.seeded:
            self.seeded.add(id(generator))
            generator.manual_seed(self.seed_of(self.slot + 1))
        drawn = self.rand(*args, **options)
        if generator is None and drawn.numel() == 1 and (self.slot >= 0 or self.fetching):
            drawn.fill_(self.fraction() if self.slot >= 0 else 0.5)
        return drawn

    def pinned_density(self, *args: Any, **options: Any) -> torch.Tensor:
        """The flow-matching scripts' draw, a fraction of the schedule: its quantile."""
        drawn = self.density(*args, **options)
        if self.slot < 0:
            return drawn
        if options["weighting_scheme"] == "logit_normal":
            z = options["logit_mean"] + options["logit_std"] * NormalDist().inv_cdf(self.fraction())
            return torch.full_like(drawn, z).sigmoid()
        return torch.full_like(drawn, self.fraction())

    def batches(self) -> Iterator[Any]:
        """Each sample alone, once for each timestep."""
        named = {
            (name if len(self.models) == 1 else f"{k}.{name}"): parameter
            for k, model in enumerate(self.models)
            for name, parameter in model.named_parameters()
        }
        self.parameters = [named[name] for name in self.store.header.parameters.names]
        with torch.no_grad():
            for name, value in self.weights.items():
                named[name].copy_(value)
        for model in self.models:
            model.eval()
        for sample in range(len(self.loader.dataset)):
            for slot in range(self.timesteps):
                self.seed_all(0)
                self.fetching = True
                batch = self.loader.collate_fn([self.loader.dataset[sample]])
                self.fetching = False
                self.slot = slot
                self.seed_all(slot + 1)
                yield batch
                self.slot = -1
        raise Done

    def backward(self, loss: torch.Tensor) -> None:
        """Takes the gradient."""
        taken = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for g, p in zip(taken, self.parameters, strict=True)]
        sketch, _ = compress_gradient(filled, self.plan)
        self.rows.append((sketch / sketch.norm()).numpy())


def main() -> int:
    """Runs the script until all gradients are taken."""
    trace, out, marker, script, *arguments = sys.argv[1:]
    if marker != "--":
        print(__doc__)
        return 2
    reference = Reference(Path(trace))
    reference.install()
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(script, run_name="__main__")
    except Done:
        rows = np.stack(reference.rows).astype(np.float32)
        np.save(out, rows.reshape(-1, reference.timesteps, rows.shape[-1]))
        return 0
    print("The script ended before all gradients were taken.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
