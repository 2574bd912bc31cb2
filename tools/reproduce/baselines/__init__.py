"""The methods that DMin is compared with, as functions from gradients or images to scores.

    likeness    random_scores, ssim, clip_similarity        nothing of the model
    plain       inner_products                              DMin without compression, normalised or not
    trak        trak, d_trak, journey_trak                  a ridge over all training samples
    das         das_features, das_errors, das               the same of the output, with residuals
    lissa       lissa                                       the inverse Hessian by a series
    datainf     datainf, datainf_identity                   the mean of inverses, and none
    ekfac       fit_ekfac, ekfac                            the Gauss-Newton matrix as Kronecker factors
    layer_weights   layer_weights, weighted                 a weight for each layer, from the scores alone
    published   published_timesteps, published_loss, ...    what DMin's published code computes for a DDPM

Gradients are computed once, by whoever calls, and given to every method: numpy arrays or CPU tensors, float32 or
float64. Q are the queries, N the training samples, P the elements of a gradient, T the timesteps. Scores are (Q, N)
float64, larger where a training sample lowers the loss of the query more. Every ridge or damping is relative to the
mean diagonal of the matrix that its docstring names, but for EK-FAC's, which is absolute as published.
"""

from .das import das, das_errors, das_features
from .datainf import datainf, datainf_identity
from .ekfac import Ekfac, ekfac
from .ekfac import fit as fit_ekfac
from .layer_weights import layer_weights, weighted
from .likeness import clip_similarity, random_scores, ssim
from .lissa import lissa
from .plain import inner_products
from .published import (
    published_compression,
    published_gradients,
    published_loss,
    published_noise,
    published_timesteps,
)
from .trak import d_trak, journey_trak, trak

__all__ = [
    "Ekfac",
    "clip_similarity",
    "d_trak",
    "das",
    "das_errors",
    "das_features",
    "datainf",
    "datainf_identity",
    "ekfac",
    "fit_ekfac",
    "inner_products",
    "journey_trak",
    "layer_weights",
    "lissa",
    "published_compression",
    "published_gradients",
    "published_loss",
    "published_noise",
    "published_timesteps",
    "random_scores",
    "ssim",
    "trak",
    "weighted",
]
