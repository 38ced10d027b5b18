"""How good a model is on data that it has not seen: its likelihood, the latent variables that it uses, and how alike
images and their reconstructions are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..vae import VAE
from .data import Samples, batches, in_order
from .errors import require

ACTIVE = 0.01
"""The variance from which on a posterior mean is said to depend on the data: Burda et al. 2016, section 5.2."""

PIXELS_AT_A_TIME = 2**19
"""Of which `ssim` takes some fifty times the memory."""

SMALLEST_FOR_SSIM = 11
"""Pixels of a side: the window of Wang et al. 2004 must lie within the image."""


def log_likelihood(
    model: VAE,
    samples: Samples,
    *,
    particles: int = 1000,
    seed: int = 0,
    batch: int = 64,
    workers: int | None = None,
    conditional: bool = False,
) -> float:
    """The mean over ``samples`` of the importance-weighted estimate of log p(x), in nats.

    Args:
        particles: samples of the posterior for each sample of the data; see `fusedvae.VAE.log_likelihood`.
        seed: of their noise.
        batch: how many samples are taken at a time. It changes which noise each of them gets.
        workers: processes that read the data, as in `fusedvae.cli.data.batches`.
        conditional: whether the model is told the samples' labels; log p(x|label) then.
    """
    total = 0.0
    with _evaluating(model):
        generator = torch.Generator(_device(model)).manual_seed(seed)
        for x, condition in _batches(model, samples, batch, workers, conditional):
            total += model.log_likelihood(x, condition, samples=particles, generator=generator).double().sum().item()
    return total / len(samples)


def active_units(
    model: VAE,
    samples: Samples,
    *,
    threshold: float = ACTIVE,
    batch: int = 64,
    workers: int | None = None,
    conditional: bool = False,
) -> int:
    """How many latent variables have posterior means whose variance over ``samples`` is above ``threshold``: the
    variables that the encoder uses (Burda et al. 2016, arXiv:1509.00519, section 5.2)."""
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    with _evaluating(model):
        for x, condition in _batches(model, samples, batch, workers, conditional):
            # Means and squared deviations of the samples so far and of these together: Chan et al. 1979.
            means = model.embed(x, condition).double().cpu()
            shift = means.mean(0) - mean
            squares = squares + means.var(0, correction=0) * len(x) + shift**2 * (count * len(x) / (count + len(x)))
            mean = mean + shift * (len(x) / (count + len(x)))
            count += len(x)
    return int((squares / count > threshold).sum())


def psnr(
    model: VAE, samples: Samples, *, batch: int = 64, workers: int | None = None, conditional: bool = False
) -> float:
    """The mean over ``samples`` of the peak signal-to-noise ratio of their reconstructions, in decibels: -10 log10 of
    the mean squared error, for a peak of 1. Reconstructions are cut off at 0 and 1."""
    measure = require("torchmetrics.functional.image").peak_signal_noise_ratio

    def of_each(reconstruction: Tensor, x: Tensor) -> Tensor:
        return measure(reconstruction, x, data_range=1.0, dim=tuple(range(1, x.ndim)), reduction="none")

    total = 0.0
    for reconstruction, x in _reconstructions(model, samples, batch, workers, conditional):
        total += of_each(reconstruction, x).double().sum().item()
    return total / len(samples)


def ssim(
    model: VAE, samples: Samples, *, batch: int = 64, workers: int | None = None, conditional: bool = False
) -> float:
    """The mean over ``samples`` of the structural similarity of their reconstructions (Wang et al. 2004), with a
    Gaussian window of 11 pixels, for a peak of 1: 1 is the same image. Reconstructions are cut off at 0 and 1.

    Raises:
        ValueError: the samples are no images of at least 11x11 pixels.
    """
    if not has_ssim(samples.shape):
        raise ValueError(
            f"samples: expected images of at least {SMALLEST_FOR_SSIM}x{SMALLEST_FOR_SSIM}, got shape {samples.shape}"
        )
    measure = require("torchmetrics.functional.image").structural_similarity_index_measure
    total = 0.0
    few = max(1, PIXELS_AT_A_TIME // math.prod(samples.shape))
    for pair in _reconstructions(model, samples, batch, workers, conditional):
        for reconstruction, x in zip(*(images.split(few) for images in pair), strict=True):
            total += measure(reconstruction, x, data_range=1.0, reduction="none").double().sum().item()
    return total / len(samples)


def has_ssim(shape: tuple[int, ...]) -> bool:
    """Whether `ssim` is defined for samples of ``shape``."""
    return len(shape) == 3 and min(shape[1:]) >= SMALLEST_FOR_SSIM


def _device(model: VAE) -> torch.device:
    return next(model.parameters()).device


def _batches(
    model: VAE, samples: Samples, batch: int, workers: int | None, conditional: bool
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches, and what the model is told of them."""
    dtype = next(model.parameters()).dtype
    order = in_order(samples, batch)
    for x, labels in batches(samples, order, workers=workers, device=_device(model), dtype=dtype):
        yield x, labels if conditional else None


def _reconstructions(
    model: VAE, samples: Samples, batch: int, workers: int | None, conditional: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of reconstructions in [0, 1] and samples, a batch of each."""
    with _evaluating(model):
        for x, condition in _batches(model, samples, batch, workers, conditional):
            yield model.reconstruct(x, condition).to(x.dtype).clamp(0, 1), x


@contextmanager
def _evaluating(model: VAE) -> Iterator[None]:
    """A block in evaluation mode, without gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
