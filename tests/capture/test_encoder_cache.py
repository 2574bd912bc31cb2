"""EncoderCache: what is cached, what is not, and that outputs are equal to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_pipelines import tiny_text_model, tiny_tokenizer, tiny_vae

from dmin_trace.capture.encoder_cache import MAX_CACHE_MISSES, MAX_CACHED_CALLS, EncoderCache


class Counting(torch.nn.Module):
    """A module that counts how often it really ran."""

    def __init__(self, work: Callable[[torch.Tensor], Any] = lambda x: x * 2) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.work = work
        self.ran = 0

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> Any:
        self.ran += 1
        return self.work(x * self.weight * scale)


def frozen(**options: Any) -> Counting:
    return Counting(**options).requires_grad_(False).eval()


def test_encoder_cache_runs_encoders_once_a_sample_with_equal_outputs() -> None:
    torch.manual_seed(0)
    vae, text = tiny_vae().requires_grad_(False), tiny_text_model(len(tiny_tokenizer())).requires_grad_(False)
    runs = {"vae": 0, "text": 0}
    vae.encoder.register_forward_pre_hook(lambda *_: None)

    def count(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            runs[name] += 1

        return hook

    vae.encoder.conv_in.register_forward_pre_hook(count("vae"))
    text.get_input_embeddings().register_forward_pre_hook(count("text"))
    samples = [(torch.randn(1, 3, 32, 32), torch.randint(2, 30, (1, 16))) for _ in range(2)]

    def encode(image: torch.Tensor, words: torch.Tensor) -> list[torch.Tensor]:
        torch.manual_seed(5)
        latent = vae.encode(image.to(torch.float32)).latent_dist.sample() * 0.18
        return [latent, text(words)[0], text(words.clone()).last_hidden_state, text(words, return_dict=False)[0]]

    plain = [encode(*sample) for sample in samples for _ in range(4)]
    assert runs == {"vae": 8, "text": 24}
    runs.update(vae=0, text=0)
    with EncoderCache([vae, text], []) as modules:
        remembered = []
        for sample in samples:
            modules.forget()
            remembered += [encode(*sample) for _ in range(4)]
    # With and without return_dict are two calls.
    assert runs == {"vae": 2, "text": 4}
    assert all(
        torch.equal(a, b) for one, other in zip(plain, remembered, strict=True) for a, b in zip(one, other, strict=True)
    )
    assert "forward" not in vars(vae.encoder) and "forward" not in vars(text)


def test_encoder_cache_compares_inputs() -> None:
    module, x = frozen(), torch.tensor([1.0, -2.0, 0.0])
    with EncoderCache([module], []):
        assert torch.equal(module(x), module(x.clone()))
        assert module.ran == 1
        module(x + 1), module(x, scale=2.0), module(x, 2.0), module(x.double()), module(-x * 0)
        assert module.ran == 6


def test_encoder_cache_forget_empties_the_cache() -> None:
    module, x = frozen(), torch.ones(3)
    with EncoderCache({"nested": [module]}.values(), []) as modules:
        module(x), module(x)
        modules.forget()
        module(x), module(x)
    assert module.ran == 2


@pytest.mark.parametrize("change", ["input", "output"])
def test_encoder_cache_drops_calls_whose_tensors_changed_in_place(change: str) -> None:
    module, x = frozen(), torch.ones(3)
    with EncoderCache([module], []):
        first = module(x)
        (x if change == "input" else first).add_(1)
        again = module(x)
        assert module.ran == 2
        assert torch.equal(again, x * 2)


def test_encoder_cache_compares_grad_mode_and_autocast() -> None:
    module, x = frozen(), torch.ones(3)
    with EncoderCache([module], []):
        module(x)
        with torch.no_grad():
            module(x)
        with torch.autocast("cpu", torch.bfloat16):
            module(x)
        assert module.ran == 3


def test_encoder_cache_skips_inputs_that_require_a_gradient() -> None:
    module, x = frozen(), torch.ones(3, requires_grad=True)
    with EncoderCache([module], []):
        for _ in range(2):
            (gradient,) = torch.autograd.grad(module(x).sum(), x)
            assert torch.equal(gradient, torch.full((3,), 2.0))
    assert module.ran == 2


@pytest.mark.parametrize(
    "draw", [torch.rand_like, lambda x: x + torch.nn.functional.dropout(x), lambda x: torch.normal(x, 1.0)]
)
def test_encoder_cache_skips_calls_that_draw_random_numbers(draw: Callable[[torch.Tensor], torch.Tensor]) -> None:
    module, x = frozen(work=draw), torch.ones(3)
    with EncoderCache([module], []):
        torch.manual_seed(0)
        found = [module(x), module(x), torch.rand(2)]
    torch.manual_seed(0)
    expected = [module(x), module(x), torch.rand(2)]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("kind", ["trains", "part of what trains", "in train mode", "returns an object"])
def test_encoder_cache_skips_modules_that_are_not_frozen_or_comparable(kind: str) -> None:
    module, x = frozen(), torch.ones(3)
    whole = torch.nn.ModuleList([module, torch.nn.Linear(2, 2)])
    if kind == "trains":
        module.requires_grad_(True)
    elif kind == "in train mode":
        module.train()
    elif kind == "returns an object":
        module.work = lambda x: object()
    with EncoderCache([module, whole], [whole] if kind == "part of what trains" else []):
        module(x), module(x)
    assert module.ran == 2


def test_encoder_cache_stops_after_max_cache_misses() -> None:
    module = frozen()
    with EncoderCache([module], []) as modules:
        for k in range(MAX_CACHE_MISSES + 2):
            module(torch.full((3,), float(k)))
            modules.forget()
        module(torch.ones(3)), module(torch.ones(3))
        assert module.ran == MAX_CACHE_MISSES + 4


def test_encoder_cache_keeps_max_cached_calls() -> None:
    module = frozen()
    with EncoderCache([module], []):
        for k in range(MAX_CACHED_CALLS + 1):
            module(torch.full((3,), float(k)))
        module(torch.full((3,), float(MAX_CACHED_CALLS)))
        assert module.ran == MAX_CACHED_CALLS + 1
        module(torch.zeros(3))
        assert module.ran == MAX_CACHED_CALLS + 2


def test_encoder_cache_restores_the_forward_of_an_instance() -> None:
    module = frozen()
    own = module.forward
    module.forward = own  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError), EncoderCache([module], []):
        module(torch.ones(3))
        raise ZeroDivisionError
    assert vars(module)["forward"] == own
