"""The formulas in plain PyTorch: the definition of correct, and the registry of all that an objective can be made of.

Differentiable any number of times, on any device. Formulas take operands as they come (no packing, no validation:
`fusedvae.functional` has done both) and work elementwise; `reduce` adds up; `objective` puts terms together.

Source of the noise: Philox4x32-10, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", with the
constants of Random123. Sources of the formulas are with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)

# --- the registry of formulas -----------------------------------------------------------------------------------------


class Formula(NamedTuple):
    """What a term of an objective is, element by element."""

    name: str
    inputs: tuple[str, ...]
    elements: Callable[..., Tensor]
    """Its value for each element, a function of the inputs and, if it has one, the parameter."""
    pairs: tuple[tuple[int, int], ...]
    """Inputs that may come packed in one tensor: a mean and the scale beside it."""
    likelihood: str | None
    """What users call it, if it is a likelihood that they can ask for."""
    is_divergence: bool
    """Whether it is one, which beta multiplies, and no likelihood."""
    constant: float
    """What ``full`` adds to each element."""
    parameter: str | None
    """The name of a number that holds for all elements."""

    def __call__(self, inputs: Sequence[Tensor | float], parameter: float) -> Tensor:
        """The values of some inputs, none of them packed."""
        return self.elements(*inputs, parameter) if self.parameter else self.elements(*inputs)


FORMULAS: dict[str, Formula] = {}
"""Every formula, by its name: that of its function here, and the one that kernels know it by."""

LIKELIHOODS: dict[str, Formula] = {}
"""The likelihoods, by what users call them."""

GIVEN = Formula("given", ("kl",), lambda kl: kl, (), None, True, 0.0, None)
"""Stands for a divergence that was computed before: a value per sample."""


def formula(
    *inputs: str,
    pairs: Sequence[tuple[str, str]],
    likelihood: str | None = None,
    is_divergence: bool = False,
    constant: float = 0.0,
    parameter: str | None = None,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register the decorated function, which takes the inputs and the parameter."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        positions = tuple((inputs.index(mean), inputs.index(scale)) for mean, scale in pairs)
        made = Formula(function.__name__, inputs, function, positions, likelihood, is_divergence, constant, parameter)
        FORMULAS[made.name] = made
        if likelihood is not None:
            LIKELIHOODS[likelihood] = made
        return function

    return register


# --- the formulas -----------------------------------------------------------------------------------------------------


def working_dtype(*operands: Tensor | float | None) -> torch.dtype:
    """The dtype arithmetic is done in: float64 if an operand is, else float32.

    As in PyTorch's arithmetic, 0-dim tensors have no say beside others.
    """
    tensors = [t for t in operands if isinstance(t, Tensor)]
    deciding = [t for t in tensors if t.dim() > 0] or tensors
    return torch.float64 if any(t.dtype == torch.float64 for t in deciding) else torch.float32


def sample(mu: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """z = mu + exp(logvar / 2) * noise."""
    dtype = working_dtype(mu, logvar, noise)
    return mu.to(dtype) + torch.exp(0.5 * logvar.to(dtype)) * noise.to(dtype)


@formula("mu", "logvar", pairs=[("mu", "logvar")], is_divergence=True)
def kl_standard_normal(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, e^logvar) || N(0, 1)) = (mu^2 + expm1(logvar) - logvar) / 2, per element.

    Source: Kingma & Welling 2014 (arXiv:1312.6114), appendix B.
    """
    dtype = working_dtype(mu, logvar)
    mu, logvar = mu.to(dtype), logvar.to(dtype)
    return 0.5 * (mu.square() + torch.expm1(logvar) - logvar)


@formula(
    "mu",
    "logvar",
    "prior_mu",
    "prior_logvar",
    pairs=[("mu", "logvar"), ("prior_mu", "prior_logvar")],
    is_divergence=True,
)
def kl_normal(mu: Tensor, logvar: Tensor, prior_mu: Tensor | float, prior_logvar: Tensor | float) -> Tensor:
    """KL(N(mu, e^logvar) || N(prior_mu, e^prior_logvar)), per element.

    (expm1(d) - d + (mu - prior_mu)^2 * e^-prior_logvar) / 2 with d = logvar - prior_logvar. Source: Kingma & Welling
    2014 (arXiv:1312.6114), appendix B, for any two normal distributions.
    """
    dtype = working_dtype(mu, logvar, prior_mu, prior_logvar)
    mu, logvar = mu.to(dtype), logvar.to(dtype)
    prior_mu = prior_mu.to(dtype) if isinstance(prior_mu, Tensor) else prior_mu
    if isinstance(prior_logvar, Tensor):
        prior_logvar = prior_logvar.to(dtype)
        precision: Tensor | float = torch.exp(-prior_logvar)
    else:
        precision = _exp(-prior_logvar)
    difference = logvar - prior_logvar
    return 0.5 * ((torch.expm1(difference) - difference) + (mu - prior_mu).square() * precision)


@formula(
    "recon_x",
    "x",
    "recon_logvar",
    pairs=[("recon_x", "recon_logvar")],
    likelihood="gaussian",
    constant=HALF_LOG_2PI,
)
def gaussian_nll(recon_x: Tensor, x: Tensor, recon_logvar: Tensor | float) -> Tensor:
    """(l + (recon_x - x)^2 * e^-l) / 2 with l = recon_logvar, per element, without the constant log(2 pi) / 2.

    Source: Kingma & Welling 2014 (arXiv:1312.6114), appendix C.2.
    """
    dtype = working_dtype(recon_x, x, recon_logvar)
    half_square = 0.5 * (recon_x.to(dtype) - x.to(dtype)).square()
    if isinstance(recon_logvar, Tensor):
        recon_logvar = recon_logvar.to(dtype)
        return 0.5 * recon_logvar + half_square * torch.exp(-recon_logvar)
    if recon_logvar == 0.0:
        return half_square
    return 0.5 * recon_logvar + half_square * _exp(-recon_logvar)


@formula(
    "recon_x",
    "x",
    "var",
    pairs=[],
    constant=HALF_LOG_2PI,
    parameter="eps",
)
def gaussian_nll_of_variance(recon_x: Tensor, x: Tensor, var: Tensor | float, eps: float) -> Tensor:
    """(log v + (recon_x - x)^2 / v) / 2 with v = max(var, eps), an element; the clamp is invisible to autograd.

    Source: torch.nn.functional.gaussian_nll_loss.
    """
    dtype = working_dtype(recon_x, x, var)
    if isinstance(var, Tensor):
        var = var.to(dtype, copy=True)
        with torch.no_grad():
            var.clamp_(min=eps)
    else:
        var = torch.full((), max(var, eps), dtype=dtype, device=recon_x.device)
    return 0.5 * (torch.log(var) + (recon_x.to(dtype) - x.to(dtype)).square() / var)


@formula(
    "recon_x",
    "x",
    "log_scale",
    "extra",
    pairs=[("recon_x", "log_scale")],
    likelihood="laplace",
    constant=math.log(2),
)
def laplace_nll(recon_x: Tensor, x: Tensor, log_scale: Tensor | float, extra: Tensor | float) -> Tensor:
    """(abs(recon_x - x) + extra) / b + log b with b = e^log_scale, per element, without the constant log 2.

    Source: Kotz, Kozubowski & Podgórski 2001, "The Laplace distribution and generalizations", section 2.1; `extra`, a
    perceptual loss that is divided by the scale with the absolute error: Esser et al. 2021 (arXiv:2012.09841).
    """
    dtype = working_dtype(recon_x, x, log_scale, extra)
    distance = (recon_x.to(dtype) - x.to(dtype)).abs()
    distance = distance + (extra.to(dtype) if isinstance(extra, Tensor) else extra)
    if isinstance(log_scale, Tensor):
        log_scale = log_scale.to(dtype)
        return distance * torch.exp(-log_scale) + log_scale
    return distance * _exp(-log_scale) + log_scale


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


# --- objectives -------------------------------------------------------------------------------------------------------


def halves(packed: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The mean half and the scale half of a tensor that is packed along a dimension, as views."""
    first, second = packed.chunk(2, dim)
    return first, second


def half_of(shape: torch.Size, dim: int) -> torch.Size:
    """The shape of either half of a packed tensor."""
    sizes = list(shape)
    sizes[dim] //= 2
    return torch.Size(sizes)


def unpack(mean: Tensor, scale: Tensor | None, packed_dim: int) -> tuple[Tensor, Tensor]:
    """A mean and its scale, whether they came as two tensors or packed as one."""
    return halves(mean, packed_dim) if scale is None else (mean, scale)


def unpacked(formula: Formula, inputs: Sequence[Tensor | float | None], packed_dim: int) -> list[Tensor | float]:
    """A formula's inputs, the packed ones taken apart."""
    found = list(inputs)
    for mean, scale in formula.pairs:
        whole = found[mean]
        if found[scale] is None and isinstance(whole, Tensor):
            found[mean], found[scale] = halves(whole, packed_dim)
    return found  # type: ignore[return-value]


def reduce(elements: Tensor, reduction: str) -> Tensor:
    """Add elements up: "element" (as they are), "sample" (all but dimension 0), "sum", "batchmean", "mean"."""
    if reduction == "element":
        return elements
    if reduction == "sample":
        return elements.flatten(1).sum(1) if elements.dim() > 1 else elements
    total = elements.sum()
    return _times(total, factor_of(reduction, elements.shape))


def _times(value: Tensor, number: Tensor | float) -> Tensor:
    """A product in the value's dtype; PyTorch's forward mode takes a 0-dim tensor times a number to float64."""
    return value * (number if isinstance(number, Tensor) else value.new_full((), number))


def factor_of(reduction: str, shape: torch.Size) -> float:
    """What a sum over all elements is multiplied by; NaN for a mean over nothing."""
    if reduction in ("sum", "sample", "element"):
        return 1.0
    count = shape[0] if reduction == "batchmean" else shape.numel()
    return 1.0 / count if count else math.nan


class Objective(NamedTuple):
    """What an objective is, but for its operands: the inputs of each of its terms, one after the other, and beta.

    loss = the likelihood + beta * the divergence; either may be absent.
    """

    formulas: tuple[str, ...]
    """The names of its terms' formulas."""
    parameter: float
    """That of the formula which has one."""
    packed_dim: int
    """The dimension along which means and scales are packed, of operands that are."""
    full: bool
    """Whether terms have their constants."""
    reduction: str
    """"sample" gives a value per sample, "element" a value per element (of a single term), all else a total."""
    dtype: torch.dtype
    """Of the values."""
    returns_terms: bool
    """Whether the values are the loss, the likelihood and the divergence, or the loss alone."""
    needed: tuple[bool, ...]
    """The operands whose gradients are made with the values; of those with which that is possible."""
    backend: str

    def terms(self) -> list[tuple[Formula, slice]]:
        """Each formula and where its inputs are among the operands."""
        found, start = [], 0
        for name in self.formulas:
            formula = GIVEN if name == GIVEN.name else FORMULAS[name]
            found.append((formula, slice(start, start + len(formula.inputs))))
            start += len(formula.inputs)
        return found

    @property
    def beta(self) -> int:
        """Beta's position among the operands, the last."""
        return sum(len(formula.inputs) for formula, _ in self.terms())


def objective(spec: Objective, operands: Sequence[Tensor | float | None]) -> list[Tensor]:
    """The values of an objective by the formulas, differentiable, in the dtype of the arithmetic.

    Loss, likelihood and divergence, whatever ``spec`` says of the terms; those that are absent are 0.
    """
    likelihood = divergence = None
    if torch.compiler.is_compiling():  # a program that knew numbers would be compiled anew for others
        device = next(t.device for t in operands if isinstance(t, Tensor))
        operands = [
            t if t is None or isinstance(t, Tensor) else torch.full((), t, dtype=torch.float64, device=device)
            for t in operands
        ]
    for formula, inputs in spec.terms():
        if formula is GIVEN:
            (kl,) = operands[inputs]
            assert isinstance(kl, Tensor)
            divergence = kl if spec.reduction == "sample" else _times(kl.sum(), factor_of(spec.reduction, kl.shape))
            continue
        elements = formula(unpacked(formula, operands[inputs], spec.packed_dim), spec.parameter)
        if spec.full and formula.constant:
            elements = elements + formula.constant
        value = reduce(elements, spec.reduction)
        if formula.is_divergence:
            divergence = value
        else:
            likelihood = value
    if divergence is None:
        assert likelihood is not None
        return [likelihood, likelihood, torch.zeros_like(likelihood)]
    beta = operands[spec.beta]
    assert beta is not None
    weighted = _times(divergence, beta)
    loss = weighted if likelihood is None else likelihood + weighted
    return [loss, torch.zeros_like(loss) if likelihood is None else likelihood, divergence]


def latent(operands: Sequence[Tensor | float | None], kl_dtype: torch.dtype | None, packed_dim: int) -> list[Tensor]:
    """The sample of mu, logvar and a seed or noise, in their promoted dtype; with a dtype for it, its KL per sample."""
    mu, logvar, seed, noise = operands
    assert isinstance(mu, Tensor)
    mean, scale = unpack(mu, logvar, packed_dim)  # type: ignore[arg-type]
    if noise is None:
        assert isinstance(seed, Tensor)
        noise = _laid_out_as(normal(tuple(mean.shape), seed, working_dtype(mean, scale)), mean)
    z = sample(mean, scale, noise).to(torch.promote_types(mean.dtype, scale.dtype))  # type: ignore[arg-type]
    return [z] if kl_dtype is None else [z, reduce(kl_standard_normal(mean, scale), "sample").to(kl_dtype)]


def _laid_out_as(noise: Tensor, mean: Any) -> Tensor:
    """The noise, shared out among processes as a DTensor is: that which the first one drew."""
    if type(mean) is Tensor or not hasattr(mean, "device_mesh"):
        return noise
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(noise, mean.device_mesh, mean.placements)


# --- noise ------------------------------------------------------------------------------------------------------------

_LOW_WORD = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def normal(shape: tuple[int, ...], seed: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard normal noise: element i of the row-major output is lane i % 4 of Philox counter i // 4.

    ``seed`` is a 0-dim int64 tensor, on the device the noise is wanted on; it is never read by the host.
    The four words of a counter become two Box-Muller pairs. Evaluated in float64, where the device has it, and rounded
    to float32.
    """
    count = math.prod(shape)
    counter = torch.arange((count + 3) // 4, dtype=torch.int64, device=seed.device)
    words = _philox4x32(counter, seed)
    uniforms = [_in_float64((word >> 1).to(torch.float32) * 2.0**-31 + 2.0**-32) for word in words]
    lanes = []
    for u0, u1 in (uniforms[:2], uniforms[2:]):
        radius = torch.sqrt(-2.0 * torch.log(u0))
        sine, cosine = _sincos_turns(u1)
        lanes += [radius * cosine, radius * sine]
    return torch.stack(lanes, dim=1).flatten()[:count].float().to(dtype).view(shape)


def _in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64; as it is, on devices that have none (Apple's, some of Intel's)."""
    try:
        return tensor.double()
    except (TypeError, RuntimeError):
        return tensor


def _sincos_turns(turns: Tensor) -> tuple[Tensor, Tensor]:
    """sin and cos of 2 pi u: the nearest quarter turn comes off exactly, so that float32 rounds no large angle."""
    quarter = torch.floor(turns * 4.0 + 0.5)
    angle = (turns - quarter * 0.25) * (2 * math.pi)
    sine, cosine = torch.sin(angle), torch.cos(angle)
    odd, upper = quarter.remainder(2) == 1, quarter.remainder(4) >= 2
    sine, cosine = torch.where(odd, cosine, sine), torch.where(odd, -sine, cosine)
    return torch.where(upper, -sine, sine), torch.where(upper, -cosine, cosine)


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
