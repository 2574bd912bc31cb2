"""Which models a run calls, and their fingerprints."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from dmin_trace.capture.conditions import conditions_in_steps
from dmin_trace.capture.used_models import (
    UsedModels,
    block_sums,
    differing_model,
    fingerprint_on_device,
)
from dmin_trace.store import ModelFacts


class Autoencoder(torch.nn.Module):
    """As diffusers': its encoder is called by a method, and its decoder by none."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        encoded: torch.Tensor = self.encoder(image)
        return encoded


class Denoiser(torch.nn.Module):
    """A frozen layer, a trained one, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.lora = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.base.requires_grad_(False)
        self.register_buffer("scale", torch.ones(3), persistent=False)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        moved: torch.Tensor = self.base(latent) * self.scale + self.lora(latent)
        return moved


Models = dict[str, torch.nn.Module]


def made() -> Models:
    torch.manual_seed(0)
    return {"vae": Autoencoder().requires_grad_(False), "unet": Denoiser(), "text": torch.nn.Embedding(5, 3)}


def seen(models: Models) -> list[ModelFacts]:
    """What is seen of a script that encodes its captions before its loop."""
    used = UsedModels()
    used.watch_setup()
    models["text"].requires_grad_(False)(torch.tensor([2]))
    used.stop()
    models["vae"].decoder(torch.ones(3))
    used.variables = models
    used.watch_steps(list(models["unet"].lora.parameters()))
    for _ in range(2):
        models["unet"](models["vae"].encode(torch.ones(1, 3)))
    used.stop()
    assert used.variables == {}
    models["vae"].decoder(torch.ones(3))
    return used.facts


def test_every_model_that_is_called_has_one_fingerprint_less_what_trains() -> None:
    facts = [(model.name, model.kind, model.numbers, model.in_steps) for model in seen(made())]
    assert facts == [
        ("Embedding", "Embedding", 15, False),
        ("vae.encoder", "Linear", 12, True),
        ("unet", "Denoiser", 15, True),
    ]


def _add(place: Callable[[Models], torch.Tensor]) -> Callable[[Models], None]:
    def change(models: Models) -> None:
        with torch.no_grad():
            place(models).view(-1)[-1] += 1e-3

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_add(lambda m: m["vae"].encoder.bias), "vae.encoder"),
        (_add(lambda m: m["unet"].base.weight), "unet"),
        (_add(lambda m: m["unet"].scale), "unet"),
        (_add(lambda m: m["text"].weight), "Embedding"),
        (_add(lambda m: m["vae"].decoder.weight), None),
        (_add(lambda m: m["unet"].lora.weight), None),
    ],
    ids=["autoencoder", "base", "buffer", "text encoder", "decoder", "what trains"],
)
def test_a_change_in_what_is_used_is_named_and_no_other(change: Callable[[Models], None], named: str | None) -> None:
    models = made()
    change(models)
    found = differing_model(seen(made()), seen(models))
    assert (None if found is None else found.name) == named


def facts(name: str, digest: str, *, in_steps: bool) -> ModelFacts:
    return ModelFacts(name=name, kind=name, numbers=1, sha256=digest * 64, in_steps=in_steps)


@pytest.mark.parametrize(
    ("theirs", "ours", "named"),
    [
        # What one run calls in its loop, the other may call before it.
        ([facts("vae", "a", in_steps=True)], [facts("vae", "a", in_steps=False)], None),
        # What runs before the loop may come from a cache.
        ([facts("text", "a", in_steps=False)], [], None),
        ([], [facts("text", "a", in_steps=False)], None),
        ([facts("text", "a", in_steps=False)], [facts("text", "b", in_steps=False)], "text"),
        ([facts("vae", "a", in_steps=True)], [], "vae"),
        ([], [facts("vae", "a", in_steps=True)], "vae"),
    ],
)
def test_two_runs_have_the_same_models(theirs: Sequence[ModelFacts], ours: Sequence[ModelFacts], named: object) -> None:
    found = differing_model(theirs, ours)
    assert (None if found is None else found.name) == named


def test_a_fingerprint_depends_on_every_value_and_on_dtype_and_shape() -> None:
    one = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    other = one.clone()
    other[4, 6] = torch.nextafter(other[4, 6], torch.tensor(9.0))
    tensors = [one, other, one.T, one.reshape(35), one.bfloat16(), one.bool(), torch.zeros(0), one.T.contiguous()]
    digests = [fingerprint_on_device([tensor]) for tensor in tensors]
    assert len(set(digests)) == 7 and digests[2] == digests[7]


def test_the_checksum_of_an_accelerator_changes_with_every_value() -> None:
    """The code for other devices, run on the processor."""
    keys = torch.randint(-(2**62), 2**62, (2**20,), generator=torch.Generator().manual_seed(0)) | 1
    values = torch.randn(2**20 + 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    sums = block_sums(values, keys)
    assert sums.shape == (1,) and block_sums(torch.cat([values, values, values]), keys).shape == (2,)
    for place in (0, 1, 2**20 + 4):
        other = values.clone()
        other[place] = -other[place]
        assert block_sums(other, keys)[0] != sums[0]
    # Two changes of sign do not make up for each other.
    other = values.clone()
    other[[3, 9]] = -other[[3, 9]]
    assert block_sums(other, keys)[0] != sums[0]


def test_autocast_is_seen_where_the_models_run() -> None:
    used, models = UsedModels(), made()
    used.watch_steps(list(models["unet"].lora.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        models["unet"](torch.ones(1, 3))
    used.stop()
    assert conditions_in_steps(used) == {"autocast": "bfloat16", "models": "float32", "attention": "none"}


def test_a_model_without_a_fingerprint_is_said_and_still_called(caplog: pytest.LogCaptureFixture) -> None:
    used, model = UsedModels(), torch.nn.Identity()
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    used.watch_steps([])
    assert model(7) == 7
    used.stop()
    assert used.facts == [] and "Identity has no fingerprint" in caplog.text and len(caplog.records) == 1
