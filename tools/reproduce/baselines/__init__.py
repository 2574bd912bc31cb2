"""The methods that DMin is compared with, as functions from gradients or images to scores.

    likeness    random_scores, ssim, clip_similarity        nothing of the model
    plain       inner_products                              DMin without compression, normalised or not
    trak        trak, d_trak, journey_trak                  a ridge over all training samples
    lissa       lissa                                       the inverse Hessian by a series
    datainf     datainf, datainf_identity                   the mean of inverses, and none
    published   published_timesteps, published_loss, ...    what DMin's published code computes for a DDPM

Gradients are computed once, by whoever calls, and given to every method: numpy arrays or CPU tensors, float32 or
float64. Q are the queries, N the training samples, P the elements of a gradient, T the timesteps. Scores are (Q, N)
float64, larger where a training sample lowers the loss of the query more. Every ridge or damping is relative to the
mean diagonal of the matrix that its docstring names.
"""

from .datainf import datainf, datainf_identity
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
    "clip_similarity",
    "d_trak",
    "datainf",
    "datainf_identity",
    "inner_products",
    "journey_trak",
    "lissa",
    "published_compression",
    "published_gradients",
    "published_loss",
    "published_noise",
    "published_timesteps",
    "random_scores",
    "ssim",
    "trak",
]
