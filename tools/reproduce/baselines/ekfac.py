"""EK-FAC influence for diffusion models: the Gauss-Newton matrix, layer by layer, as Kronecker factors.

Mlodozeniec et al., arXiv 2410.13850, and its code, github.com/BrunoKM/diffusion-influence, which leaves the factors to
github.com/f-dangel/curvlinops; George et al. 2018 (arXiv 1806.03884) for the corrected eigenvalues. For a weight W of a
linear or convolutional layer, whose gradient for one sample is the sum over positions s of d(s) a(s)', with a the
layer's inputs (for a convolution: patches) and d the derivative of the loss with respect to its outputs:

    A = mean over samples and positions of a a',    S = mean over samples of the sum over positions of d d'
    A = U_A diag U_A',    S = U_S diag U_S'
    e = mean over samples of the squares of  U_S' G U_A,  G a sample's gradient          (the corrected eigenvalues)
    preconditioned G = U_S [ (U_S' G U_A) / (e + damping) ] U_A'

As the code has it:

    - The loss of a sample is the mean square of output - noise over all C numbers of an output, so that its Hessian
      with respect to the output is (2 / C) I. For S and e one random derivative is drawn for each sample from
      N(0, (2 / C) I) and carried back through the model: its covariance is that Hessian ("mc", one draw). Noise and
      timestep are drawn anew for each pass over the samples, timesteps from all: 125 passes for the factors, and again
      for e.
    - Every position of a layer counts as a sample of its own in A and S ("expand"), and not in e, which is exact.
    - Weight and bias have a block each. That of a bias has S alone.
    - Only linear and 2d convolutional layers are counted. All other parameters, as those of norms, are left out, of the
      scores too.
    - damping is an absolute number, added to every e; the paper sweeps 1e-11 to 1e-2, and takes 1e-8.
    - Scores are inner products of the preconditioned gradient of the query's loss with the training sample's, each the
      mean over 250 draws of timestep and noise. The code keeps one of the two in 8 bits; here nothing is rounded.

What differs here: the timesteps, noises and numbers of draws are the caller's; and so are the sign (larger is more
influence) and the average over training samples, which is not divided by N.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dmin_trace.errors import QueryError, SettingsError

from .products import Scores, positive, products

Gradients = Mapping[str, torch.Tensor]
Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Batches = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]]


@dataclass(frozen=True)
class Block:
    """The curvature of one parameter.

    outputs: (o, o), eigenvectors of S in columns.
    inputs: (i, i), those of A; none for a bias.
    eigenvalues: (o, i), or (o,) for a bias: e.
    """

    outputs: torch.Tensor
    inputs: torch.Tensor | None
    eigenvalues: torch.Tensor

    def precondition(self, gradients: torch.Tensor, damping: float) -> torch.Tensor:
        """(n, *shape), each multiplied by the inverse of this block."""
        rows = gradients.flatten(2) if self.inputs is not None else gradients[..., None]
        rows = rows.to(self.eigenvalues.dtype)
        inputs = self.inputs if self.inputs is not None else rows.new_ones((1, 1))
        rotated = self.outputs.T @ rows @ inputs
        divided = rotated / (self.eigenvalues.reshape(rotated.shape[1:]) + damping)
        return (self.outputs @ divided @ inputs.T).reshape(gradients.shape)


@dataclass(frozen=True)
class Ekfac:
    """The curvature of a model.

    blocks: by the name of the parameter.
    """

    blocks: dict[str, Block]

    @property
    def mean_eigenvalue(self) -> float:
        """Of all blocks: the scale for a relative damping, which the paper does not have."""
        found = torch.cat([block.eigenvalues.flatten() for block in self.blocks.values()])
        return float(found.mean())

    def precondition(self, gradients: Gradients, damping: float) -> dict[str, torch.Tensor]:
        """Gradients multiplied by the inverse of the curvature.

        Args:
            gradients: by the name of the parameter (n, *shape). Those that have no block are left out.
            damping: added to every eigenvalue.

        Raises:
            QueryError: a block has no gradients.
            SettingsError: a damping that is not above 0.
        """
        positive(damping, "damping")
        if missing := sorted(self.blocks.keys() - gradients.keys()):
            raise QueryError(f"There are no gradients of {missing[0]}, and {len(missing) - 1} others.")
        return {name: block.precondition(gradients[name], damping) for name, block in self.blocks.items()}


def fit(
    model: nn.Module,
    predict: Predict,
    batches: Batches,
    *,
    names: Collection[str] | None = None,
    exact: bool = False,
    seed: int = 0,
) -> Ekfac:
    """The curvature of a model, from two passes over batches.

    Args:
        model: its layers are watched. No parameter needs to ask for gradients.
        predict: gives the output (n, ...) of the model for noised images (n, ...) and timesteps (n,).
        batches: called once for each pass; gives noised images and their timesteps, best each training sample many
            times with other timesteps and noises, and other ones in the second pass.
        names: parameters that are counted, as the LoRA weights of an adapter. Default: weights and biases of all linear
            and 2d convolutional layers.
        exact: carry every output back by itself, in the place of one random mixture of them: C backward passes. For
            tests, and for outputs of few numbers.
        seed: of the random derivatives.

    Raises:
        SettingsError: no such layer, or a layer that is not counted: a grouped or padded-by-reflection convolution, or
            one that is used twice in a pass.
    """
    layers = _layers(model, names)
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    for layer, a, d in _derivatives(layers, predict, batches, exact, seed):
        # A's and S's scales are lost with their eigenvalues: sums do.
        _add(inputs, layer, torch.einsum("nsi,nsj->ij", a, a))
        _add(outputs, layer, torch.einsum("vnso,vnsp->op", d, d))
    bases = {
        layer: (torch.linalg.eigh(outputs[layer]).eigenvectors, torch.linalg.eigh(inputs[layer]).eigenvectors)
        for layer in layers
    }
    squares: dict[str, torch.Tensor] = {}
    of_bias: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    for layer, a, d in _derivatives(layers, predict, batches, exact, seed + 1):
        left, right = d @ bases[layer][0], a @ bases[layer][1]
        for of_vector in left:
            _add(squares, layer, torch.einsum("nso,nsi->noi", of_vector, right).square().sum(0))
            _add(of_bias, layer, of_vector.sum(1).square().sum(0))
        counts[layer] = counts.get(layer, 0) + len(a)
    blocks = {}
    for layer, (_, parameters) in layers.items():
        if "weight" in parameters:
            blocks[parameters["weight"]] = Block(*bases[layer], squares[layer] / counts[layer])
        if "bias" in parameters:
            blocks[parameters["bias"]] = Block(bases[layer][0], None, of_bias[layer] / counts[layer])
    return Ekfac(blocks)


def ekfac(train: Gradients, query: Gradients, curvature: Ekfac, damping: float) -> Scores:
    """EK-FAC influence of training samples on the loss of queries.

    Args:
        train: by the name of the parameter (N, *shape), gradients of the loss, means over draws of timestep and noise.
        query: (Q, *shape), the queries'.
        curvature: of `fit`.
        damping: added to every eigenvalue; `curvature.mean_eigenvalue` times a share for a relative one.

    Returns:
        (Q, N).

    Raises:
        QueryError: gradients are missing, or not finite.
        SettingsError: a damping that is not above 0.
    """
    asked = curvature.precondition(query, damping)
    if missing := sorted(curvature.blocks.keys() - train.keys()):
        raise QueryError(f"There are no gradients of {missing[0]}, and {len(missing) - 1} others.")
    parts = (products(asked[name].flatten(1).numpy(), train[name].flatten(1).numpy()) for name in asked)
    first = next(parts)
    return sum(parts, start=first)


Layers = dict[str, tuple[nn.Linear | nn.Conv2d, dict[str, str]]]


def _layers(model: nn.Module, names: Collection[str] | None) -> Layers:
    """By name the layers, and the names of their parameters that are counted, by weight or bias."""
    found: Layers = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        own = {kind: f"{path}.{kind}" if path else kind for kind, _ in layer.named_parameters(recurse=False)}
        counted = {kind: name for kind, name in own.items() if names is None or name in names}
        if not counted:
            continue
        if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
            raise SettingsError(f"{path} is a convolution with groups or other padding than zeros.")
        found[path] = (layer, counted)
    if not found:
        raise SettingsError("There is no linear or 2d convolutional layer of these names.")
    return found


def _derivatives(
    layers: Layers, predict: Predict, batches: Batches, exact: bool, seed: int
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """For each batch and layer its inputs (n, s, i), and derivatives (v, n, s, o) of losses by its outputs.

    s are positions; v are the random derivatives of a sample, one, or all outputs.
    """
    generator = torch.Generator().manual_seed(seed)
    for noisy, timesteps in batches():
        with torch.enable_grad(), _watched(layers) as seen:
            output = predict(noisy, timesteps).flatten(1)
            size = output.shape[1]
            if exact:
                vectors = torch.eye(size).to(output)[:, None].expand(size, len(output), size)
            else:
                vectors = torch.randn((1, *output.shape), generator=generator).to(output)
            vectors = vectors * (2 / size) ** 0.5
            of_layers = [
                torch.autograd.grad(output, [z for _, z in seen.values()], vector, retain_graph=True)
                for vector in vectors
            ]
        for number, (name, (a, _)) in enumerate(seen.items()):
            layer = layers[name][0]
            derivatives = torch.stack([_positions(of_vector[number], layer) for of_vector in of_layers])
            yield name, _patches(a, layer).double(), derivatives.double()


@contextmanager
def _watched(layers: Layers) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """The input and output of each layer in the next pass, outputs as part of a graph."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def keep(module: nn.Module, given: Any, output: torch.Tensor) -> None:
            if name in seen:
                raise SettingsError(f"{name} is used twice in a pass.")
            if not output.requires_grad:
                output.requires_grad_()
            seen[name] = (given[0].detach(), output)

        return keep

    handles = [layer.register_forward_hook(watch(name)) for name, (layer, _) in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _patches(a: torch.Tensor, layer: nn.Linear | nn.Conv2d) -> torch.Tensor:
    """Inputs (n, s, i): of a convolution the patch under each position."""
    if isinstance(layer, nn.Linear):
        return a.reshape(len(a), -1, a.shape[-1])
    padding = layer.padding
    if isinstance(padding, str):
        raise SettingsError(f"A convolution with padding {padding!r} is not counted.")
    return nn.functional.unfold(a, layer.kernel_size, layer.dilation, padding, layer.stride).transpose(1, 2)


def _positions(d: torch.Tensor, layer: nn.Linear | nn.Conv2d) -> torch.Tensor:
    """Derivatives (n, s, o)."""
    return d.reshape(len(d), -1, d.shape[-1]) if isinstance(layer, nn.Linear) else d.flatten(2).transpose(1, 2)


def _add(sums: dict[str, torch.Tensor], name: str, found: torch.Tensor) -> None:
    sums[name] = sums[name] + found if name in sums else found
