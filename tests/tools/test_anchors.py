"""DAS, EK-FAC and learned weights of layers, each against the same equation written another way."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from dmin_trace.errors import QueryError, SettingsError

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "reproduce"))

import baselines
import ddpm

N, Q, T, P = 12, 3, 4, 20


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape) + 0.5


# DAS


@pytest.mark.parametrize("width", [P, 5])
@pytest.mark.parametrize("leverage", [False, True])
def test_das_is_its_equation(width: int, leverage: bool) -> None:
    gradients, asked, losses = normal(N, T, width), normal(Q, T, width, seed=1), normal(N, 30, seed=2) ** 2
    features, of_queries = (
        np.array([np.mean([g / (np.linalg.norm(g) + 1e-8) for g in of], axis=0) for of in some])
        for some in (gradients, asked)
    )
    np.testing.assert_allclose(baselines.das_features(gradients), features, atol=1e-14)
    np.testing.assert_allclose(baselines.das_features(gradients, normalised=False), gradients.mean(1), atol=1e-14)
    errors = np.array([np.mean(np.sqrt(of) / (np.linalg.norm(np.sqrt(of)) + 1e-8)) for of in losses])
    np.testing.assert_allclose(baselines.das_errors(losses), errors, atol=1e-14)

    # The mean squared norm of a feature times 0.3, on the diagonal.
    strength = 0.3 * np.mean([f @ f for f in features])
    inverse = np.linalg.inv(sum(np.outer(f, f) for f in features) + strength * np.eye(width))
    expected = np.empty((Q, N))
    for q in range(Q):
        for i in range(N):
            one = of_queries[q] @ inverse @ features[i] * errors[i]
            expected[q, i] = one / (1 - features[i] @ inverse @ features[i]) if leverage else one
    given = features, of_queries, errors, 0.3
    np.testing.assert_allclose(baselines.das(*given, leverage=leverage, squared=False), expected, atol=1e-10)
    np.testing.assert_allclose(baselines.das(*given, leverage=leverage), expected**2, atol=1e-10)


def test_das_with_leverage_is_leaving_one_out() -> None:
    """With residuals of a linear model, what the prediction loses when it is fitted again without a sample."""
    train, asked, target = normal(N, 4), normal(Q, 4, seed=1), normal(N, seed=2)
    ridge = 0.1
    strength = ridge * np.mean([f @ f for f in train])

    def fitted(kept: np.ndarray) -> np.ndarray:
        moments = train[kept].T @ train[kept] + strength * np.eye(4)
        return np.linalg.solve(moments, train[kept].T @ target[kept])

    everything = fitted(np.arange(N))
    residuals = target - train @ everything
    found = baselines.das(train, asked, residuals, ridge, leverage=True, squared=False)
    for i in range(N):
        without = fitted(np.delete(np.arange(N), i))
        np.testing.assert_allclose(found[:, i], asked @ (everything - without), atol=1e-12)


def test_das_refuses() -> None:
    with pytest.raises(QueryError, match="errors"):
        baselines.das(normal(N, P), normal(Q, P), np.ones(N + 1), 0.1)
    with pytest.raises(QueryError, match="Losses"):
        baselines.das_errors(-np.ones((N, T)))


# EK-FAC


class Small(nn.Module):
    """Linear and convolutional layers of each kind, used by an image and a timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(1, 3)
        self.time = nn.Linear(2, 3, bias=False)
        self.mix = nn.Linear(3, 2)
        self.out = nn.Conv2d(2, 1, 1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.conv(x)) + self.time(torch.stack([t, t**2], 1))[:, :, None, None]
        mixed = self.mix(torch.tanh(hidden).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        found: torch.Tensor = self.out(torch.sin(mixed))
        return found


def samples(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn((count, 1, 4, 4), generator=generator, dtype=torch.float64)
    return images, torch.rand(count, generator=generator, dtype=torch.float64)


def small() -> Small:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Small().double().requires_grad_(False)


def by_output(model: nn.Module, x: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
    """The derivatives (C, n, *shape) of every output of each sample by every parameter."""
    parameters = dict(model.named_parameters())

    def one(given: dict[str, torch.Tensor], x: torch.Tensor, t: torch.Tensor, c: int) -> torch.Tensor:
        return functional_call(model, given, (x[None], t[None])).flatten()[c]

    size = model(x, t)[0].numel()
    found = [vmap(grad(one), in_dims=(None, 0, 0, None))(parameters, x, t, c) for c in range(size)]
    return {name: torch.stack([of[name] for of in found]) for name in parameters}


def test_the_curvature_of_a_linear_layer_is_exact() -> None:
    """The mean over samples of (2 / C) I x a a' is a Kronecker product: EK-FAC is the Gauss-Newton matrix itself."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 3, bias=False).double()
    x = torch.randn((40, 5), dtype=torch.float64)
    curvature = baselines.fit_ekfac(layer, lambda x, t: layer(x), lambda: [(x[:25], x[:25]), (x[25:], x)], exact=True)
    jacobians = torch.stack([torch.kron(torch.eye(3), a[None]) for a in x]).double()  # (n, 3, 15)
    matrix = torch.einsum("nci,ncj->ij", jacobians, jacobians) * 2 / 3 / 40
    train, query = torch.randn((6, 3, 5), dtype=torch.float64), torch.randn((2, 3, 5), dtype=torch.float64)
    inverse = torch.linalg.inv(matrix + 0.01 * torch.eye(15, dtype=torch.float64))
    expected = query.flatten(1) @ inverse @ train.flatten(1).T
    found = baselines.ekfac({"weight": train}, {"weight": query}, curvature, 0.01)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert curvature.mean_eigenvalue == pytest.approx(float(matrix.trace()) / 15)


def test_random_derivatives_stand_for_all() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False).double()
    x = torch.randn((20_000, 3), dtype=torch.float64)
    exact, drawn = (
        baselines.fit_ekfac(layer, lambda x, t: layer(x), lambda: [(x, x)], exact=exact) for exact in (True, False)
    )
    given = {"weight": torch.randn((4, 2, 3), dtype=torch.float64)}
    one, other = (curvature.precondition(given, 0.01)["weight"] for curvature in (exact, drawn))
    torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


def test_ekfac_is_its_equations() -> None:
    model = small()
    x, t = samples(9)
    curvature = baselines.fit_ekfac(model, model, lambda: [(x[:4], t[:4]), (x[4:], t[4:])], exact=True)
    assert set(curvature.blocks) == {n for n, _ in model.named_parameters() if "norm" not in n}
    every = by_output(model, x, t)
    size = model(x, t)[0].numel()
    inputs: dict[str, torch.Tensor] = {}
    for name in ("conv", "time", "mix", "out"):
        handle = getattr(model, name).register_forward_hook(
            lambda module, given, output, name=name: inputs.__setitem__(name, given[0])
        )
        model(x, t)
        handle.remove()
    for name, block in curvature.blocks.items():
        layer = getattr(model, name.split(".")[0])
        # All derivatives of all outputs, by the corrected eigenvalues' definition.
        of_outputs = every[name].flatten(3) if block.inputs is not None else every[name][..., None]
        right = block.inputs if block.inputs is not None else torch.ones((1, 1), dtype=torch.float64)
        turned = block.outputs.T @ of_outputs.reshape(size, 9, len(layer.weight), -1) @ right
        expected = turned.square().sum(0).mean(0) * 2 / size
        torch.testing.assert_close(block.eigenvalues.reshape(expected.shape), expected, rtol=1e-8, atol=1e-12)
        # The basis makes A diagonal.
        if block.inputs is not None:
            a = inputs[name.split(".")[0]]
            rows = (
                [a]
                if a.ndim == 2
                else [a.reshape(-1, a.shape[-1])]
                if isinstance(layer, nn.Linear)
                else patches(a, layer)
            )
            second = sum((of.T @ of for of in rows), torch.zeros(()))
            diagonal = block.inputs.T @ second @ block.inputs
            torch.testing.assert_close(diagonal, torch.diag(diagonal.diagonal()), atol=1e-9, rtol=0)
        # And it divides by the dense matrix of its own basis.
        whole = torch.kron(block.outputs, right)
        matrix = whole @ torch.diag(block.eigenvalues.flatten() + 0.003) @ whole.T
        given = {n: torch.randn((2, *p.shape), dtype=torch.float64) for n, p in model.named_parameters()}
        found = curvature.precondition(given, 0.003)[name]
        torch.testing.assert_close(found.flatten(1), given[name].flatten(1) @ torch.linalg.inv(matrix))


def patches(a: torch.Tensor, layer: nn.Conv2d) -> Iterator[torch.Tensor]:
    """The patches under a convolution, one position after another."""
    (high, wide), (down, along), (border, _) = layer.kernel_size, layer.stride, layer.padding
    assert isinstance(border, int)
    padded = nn.functional.pad(a, (border,) * 4)
    for top in range(0, padded.shape[2] - high + 1, down):
        for left in range(0, padded.shape[3] - wide + 1, along):
            yield padded[:, :, top : top + high, left : left + wide].flatten(1)


def test_output_covariances() -> None:
    """S, from the derivatives by a layer's outputs, position by position."""
    model = small()
    x, t = samples(5)
    block = baselines.fit_ekfac(model, model, lambda: [(x, t)], exact=True).blocks["mix.weight"]
    kept: list[torch.Tensor] = []
    handle = model.mix.register_forward_hook(lambda module, given, output: kept.append(output.requires_grad_()))
    output = model(x, t).flatten(1)
    handle.remove()
    total = torch.zeros((2, 2), dtype=torch.float64)
    for c in range(output.shape[1]):
        (d,) = torch.autograd.grad(output[:, c].sum(), kept[0], retain_graph=True)
        total += d.reshape(-1, 2).T @ d.reshape(-1, 2)
    diagonal = block.outputs.T @ total @ block.outputs
    torch.testing.assert_close(diagonal, torch.diag(diagonal.diagonal()), atol=1e-10, rtol=0)


def test_ekfac_of_the_experiments_models() -> None:
    recipe = ddpm.Recipe(size=8, channels=(8, 16), attention=True, steps=1, batch=2, rate=1e-3)
    model = ddpm.make_model(recipe).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(2):
            yield torch.randn((3, 1, 8, 8), generator=generator), torch.randint(0, 1000, (3,), generator=generator)

    curvature = baselines.fit_ekfac(model, lambda x, t: model(x, t).sample, batches)
    layers = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    assert {name.rsplit(".", 1)[0] for name in curvature.blocks} == set(layers)
    given = {name: torch.randn((2, *p.shape)) for name, p in model.named_parameters()}
    damping = 0.1 * curvature.mean_eigenvalue
    scores = baselines.ekfac(given, given, curvature, damping)
    assert np.isfinite(scores).all() and (scores.diagonal() > 0).all()
    np.testing.assert_allclose(scores, scores.T, rtol=1e-4, atol=1e-6 * scores.max())


def test_parameters_may_be_chosen() -> None:
    model = small()
    x, t = samples(4)
    curvature = baselines.fit_ekfac(model, model, lambda: [(x, t)], names=["mix.weight", "norm.weight"])
    assert set(curvature.blocks) == {"mix.weight"}
    with pytest.raises(SettingsError, match="no linear"):
        baselines.fit_ekfac(model, model, lambda: [(x, t)], names=["norm.weight"])
    with pytest.raises(QueryError, match=r"mix\.weight"):
        curvature.precondition({}, 0.1)
    with pytest.raises(SettingsError, match="twice"):
        baselines.fit_ekfac(model, lambda x, t: model(x, t) + model(x, t), lambda: [(x, t)])


# Learned weights of layers


def layered(informative: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Contributions (Q, N, 3) of which one layer's has a few large ones, and which samples these are."""
    generator = np.random.default_rng(0)
    parts = generator.standard_normal((20, 200, 3))
    causes = generator.random((20, 200)) < 0.03
    parts[:, :, informative] = 0.3 * parts[:, :, informative] + 4 * causes
    return parts, causes


def test_the_layer_that_singles_out_samples_gains_weight() -> None:
    parts, causes = layered()
    weights = baselines.layer_weights(parts, k=5)
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all() and weights[1] > 0.8

    def found(scores: np.ndarray) -> float:
        best = np.argsort(-scores, axis=1)[:, :5]
        return float(np.take_along_axis(causes, best, 1).mean())

    assert found(baselines.weighted(parts, weights)) > found(parts.sum(axis=2))


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_the_weights_are_the_best_ones(penalty: float) -> None:
    parts = layered()[0][:, :, :2]

    def loss(weight: float) -> float:
        weights = np.array([weight, 1 - weight])
        scores = parts @ weights
        top = np.sort(scores, axis=1)[:, -5:].mean(axis=1)
        return float(-(top / np.linalg.norm(scores, axis=1)).mean() + penalty * (weights**2).sum())

    found = baselines.layer_weights(parts, k=5, penalty=penalty, steps=2000)
    assert loss(found[0]) <= min(loss(w) for w in np.linspace(0, 1, 501)) + 1e-4


def test_layer_weights_refuse() -> None:
    for k in (0, 201):
        with pytest.raises(SettingsError):
            baselines.layer_weights(layered()[0], k=k)
    with pytest.raises(QueryError):
        baselines.weighted(layered()[0], np.ones(2))
