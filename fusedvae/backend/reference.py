"""The formulas in plain PyTorch: the definition of correct, and the eager baseline of every comparison.

Differentiable any number of times, on any device. Everything here takes operands as they come (no packing, no
validation: `fusedvae.functional` has done both) and works elementwise; `reduce` adds up.

Source of the formulas: Kingma & Welling 2014 (arXiv:1312.6114), appendix B. Source of the noise: Philox4x32-10,
Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", with the constants of Random123.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)

_LOW_WORD = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def working_dtype(*operands: Tensor | float | None) -> torch.dtype:
    """The dtype arithmetic is done in: float64 if any operand is, else float32."""
    doubles = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in operands)
    return torch.float64 if doubles else torch.float32


def sample(mu: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """z = mu + exp(logvar / 2) * noise."""
    dtype = working_dtype(mu, logvar, noise)
    return mu.to(dtype) + torch.exp(0.5 * logvar.to(dtype)) * noise.to(dtype)


def kl_standard_normal(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, e^logvar) || N(0, 1)) = (mu^2 + expm1(logvar) - logvar) / 2, an element."""
    dtype = working_dtype(mu, logvar)
    mu, logvar = mu.to(dtype), logvar.to(dtype)
    return 0.5 * (mu.square() + torch.expm1(logvar) - logvar)


def gaussian_nll(recon_x: Tensor, x: Tensor, recon_logvar: Tensor | float) -> Tensor:
    """(l + (recon_x - x)^2 * e^-l) / 2 with l = recon_logvar, an element, without the constant log(2 pi) / 2."""
    dtype = working_dtype(recon_x, x, recon_logvar)
    half_square = 0.5 * (recon_x.to(dtype) - x.to(dtype)).square()
    if isinstance(recon_logvar, Tensor):
        recon_logvar = recon_logvar.to(dtype)
        return 0.5 * recon_logvar + half_square * torch.exp(-recon_logvar)
    if recon_logvar == 0.0:
        return half_square
    return 0.5 * recon_logvar + half_square * _exp(-recon_logvar)


def gaussian_nll_of_variance(recon_x: Tensor, x: Tensor, var: Tensor | float, eps: float) -> Tensor:
    """(log v + (recon_x - x)^2 / v) / 2 with v = max(var, eps), an element; the clamp is invisible to autograd."""
    dtype = working_dtype(recon_x, x, var)
    if isinstance(var, Tensor):
        var = var.to(dtype, copy=True)
        with torch.no_grad():
            var.clamp_(min=eps)
    else:
        var = torch.full((), max(var, eps), dtype=dtype, device=recon_x.device)
    return 0.5 * (torch.log(var) + (recon_x.to(dtype) - x.to(dtype)).square() / var)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def reduce(elements: Tensor, reduction: str) -> Tensor:
    """Add elements up: "element" (as they are), "sample" (all but dimension 0), "sum", "batchmean", "mean"."""
    if reduction == "element":
        return elements
    if reduction == "sample":
        return elements.flatten(1).sum(1) if elements.dim() > 1 else elements
    total = elements.sum()
    return total * scale_of(reduction, elements.shape)


def scale_of(reduction: str, shape: torch.Size) -> float:
    """What a sum over all elements is multiplied by; NaN for a mean over nothing."""
    if reduction in ("sum", "sample", "element"):
        return 1.0
    count = shape[0] if reduction == "batchmean" else shape.numel()
    return 1.0 / count if count else math.nan


def normal(shape: tuple[int, ...], seed: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard normal noise: element i of the row-major output is lane i % 4 of Philox counter i // 4.

    ``seed`` is a 0-dim int64 tensor, on the device the noise is wanted on; it is never read by the host.
    The four words of a counter become two Box-Muller pairs. Evaluated in float64 and rounded to float32.
    """
    count = math.prod(shape)
    counter = torch.arange((count + 3) // 4, dtype=torch.int64, device=seed.device)
    words = _philox4x32(counter, seed)
    uniforms = [((word >> 1).to(torch.float32) * 2.0**-31 + 2.0**-32).double() for word in words]
    lanes = []
    for u0, u1 in (uniforms[:2], uniforms[2:]):
        radius = torch.sqrt(-2.0 * torch.log(u0))
        lanes += [radius * torch.cos(2 * math.pi * u1), radius * torch.sin(2 * math.pi * u1)]
    return torch.stack(lanes, dim=1).flatten()[:count].float().to(dtype).view(shape)


def _philox4x32(counter: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32 on counters (low32, high32, 0, 0) with the seed as key; words as int64 tensors.

    A product of two 32-bit words fills 64 bits; int64 wraps around to the same bits, and masks undo the sign.
    """
    c0, c1 = counter & _LOW_WORD, counter >> 32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _LOW_WORD, (seed >> 32) & _LOW_WORD
    for _ in range(10):
        p0, p1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _LOW_WORD) ^ c1 ^ k0,
            p1 & _LOW_WORD,
            ((p0 >> 32) & _LOW_WORD) ^ c3 ^ k1,
            p0 & _LOW_WORD,
        )
        k0, k1 = (k0 + _PHILOX_KEY_STEPS[0]) & _LOW_WORD, (k1 + _PHILOX_KEY_STEPS[1]) & _LOW_WORD
    return c0, c1, c2, c3
