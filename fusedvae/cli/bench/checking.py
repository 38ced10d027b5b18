"""Whether a contestant's answer is right: its values and gradients against the formulas in float64.

The formulas are written down here once more, with their gradients, and share nothing with the contestants; but those of
likelihoods other than the Gaussian are the registry's, in float64, and their gradients autograd's, and so is what makes
a log-variance of another form of a scale. Noise is recovered from the sample, eps = (z - mu) / exp(logvar / 2): the
gradients must be those of that very noise, and it must look like noise.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...backend.reference import Form, Scale
from .cases import GAUSSIAN, Case, Operands, likelihood_inputs
from .contestants import MLP, Function

TOLERANCES = {"float32": 2e-4, "bfloat16": 2.0**-5, "float16": 2.0**-8}
"""Of an error, over the size of what it is an error of: careless summation stays within, a mistake does not."""

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
_CHUNK = 2**21
"""Elements to widen to float64 at a time."""
_SIGMAS = 7.0
"""How far the statistics of noise may be from their expectation."""


class WrongAnswerError(Exception):
    """What a contestant gives is not what the operation is: says what, and by how much."""


def check(
    case: Case,
    operands: Operands,
    outputs: tuple[Tensor, ...],
    grads: dict[str, Tensor] | None,
    *,
    constant: bool = False,
) -> float:
    """The largest error of outputs and gradients, relative to the size of each; raises `WrongAnswerError`.

    Args:
        grads: by the names of `Operands.leaves`; None where there are none to check.
        constant: whether the likelihood has the constant log(2 pi) / 2 per element.
    """
    errors = _Errors(TOLERANCES[case.dtype])
    loss, loss_size, factor = 0.0, 0.0, _factor(case, operands)
    summed: dict[str, tuple[Tensor, Tensor]] = {}
    """Gradients that all samples have a part in, so far, and the sizes of their terms."""
    z = outputs[0] if case.samples else None
    kl = outputs[1] if case.spec.kind == "latent" else None
    noise: list[Tensor] = []
    for start, end in _chunks(operands):
        part = operands.rows(start, end)
        expected: dict[str, Tensor] = {}
        slack: dict[str, Tensor] = {}
        size: dict[str, Tensor] = {}
        if case.uses_latent:
            sample = None if z is None else z[start:end]
            found = _latent(case, part, sample, factor)
            expected, slack = found.gradients, found.slack
            if found.noise is not None:
                noise.append(found.noise)
            if kl is not None:
                per_sample, of_rounding = (t.flatten(1).sum(1) for t in (found.elements, found.rounding))
                errors.compare("the KL", kl[start:end], per_sample, of_rounding)
            loss += found.elements.sum().item() * factor
            loss_size += found.elements.abs().sum().item() * factor
        if case.uses_x:
            elements, gradients = _likelihood(case, part)
            elements = elements + constant * HALF_LOG_2PI
            if part.weight is not None:
                weight = part.weight.double()
                elements, gradients = elements * weight, {name: g * weight for name, g in gradients.items()}
            loss += elements.sum().item() * factor
            loss_size += elements.abs().sum().item() * factor
            incoming: float | Tensor = factor
            if part.grad_values is not None:
                per_sample, terms = (t.flatten(1).sum(1) for t in (elements, elements.abs()))
                errors.compare("the values", outputs[0][start:end], per_sample, size=terms)
                incoming = part.grad_values.double().view(-1, *[1] * (elements.dim() - 1))
            for name, per_element in gradients.items():
                gradient, shape = per_element * incoming, part.leaves[name].shape
                if shape == gradient.shape:
                    expected[name] = gradient
                    continue
                total, total_size = gradient.sum_to_size(shape), gradient.abs().sum_to_size(shape)
                if name == "recon_logvar":
                    before, size_before = summed.get(name, (0.0, 0.0))
                    summed[name] = total + before, total_size + size_before
                else:
                    expected[name], size[name] = total, total_size
        if grads is not None:
            for name, gradient in expected.items():
                errors.compare(
                    f"the gradient of {name}", grads[name][start:end], gradient, slack.get(name), size.get(name)
                )
    if noise:
        _check_noise(torch.cat(noise))
    if not case.samples and operands.grad_values is None:
        expected_loss, terms = (outputs[0].new_tensor(value, dtype=torch.float64) for value in (loss, loss_size))
        errors.compare("the value", outputs[0], expected_loss, size=terms)
    if grads is not None:
        for name, (total, total_size) in summed.items():
            errors.compare(f"the gradient of {name}", grads[name], total, size=total_size)
    return errors.largest()


def _factor(case: Case, operands: Operands) -> float:
    """What the sum over everything is multiplied by; values per sample are not."""
    if case.spec.reduction == "weighted_mean":
        assert operands.weight is not None
        return 1.0 / operands.weight.double().sum().item()
    return {"batchmean": 1.0 / case.batch, "mean": 1.0 / case.elements}.get(case.spec.reduction, 1.0)


def _logarithm(scale: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """The logarithm of a scale, and its derivative."""
    leaf = scale.detach().double().requires_grad_()
    logarithm: Tensor = Scale(leaf, form).log
    (slope,) = torch.autograd.grad(logarithm.sum(), leaf)
    return logarithm.detach(), slope


class _Latent(NamedTuple):
    """What is right for some samples of the latent."""

    elements: Tensor
    """Of the divergence."""
    rounding: Tensor
    """How far off they may be, as the sample that they are taken at is rounded."""
    gradients: dict[str, Tensor]
    slack: dict[str, Tensor]
    """How far off gradients may be for the same reason."""
    noise: Tensor | None


def _latent(case: Case, part: Operands, sample: Tensor | None, factor: float) -> _Latent:
    """The divergence to the prior, and the gradients that come of it and of the sample."""
    assert part.mu is not None
    form = case.spec.forms[0]
    mu, scale = _moments(part.mu, part.logvar)
    mu = mu.detach().double()
    logvar, slope = _logarithm(scale, form)
    std = torch.exp(0.5 * logvar)
    prior_mu = prior_logvar = prior_slope = torch.zeros_like(mu)
    if part.prior_mu is not None:
        prior_mu, prior_scale = _moments(part.prior_mu, part.prior_logvar)
        prior_mu = prior_mu.detach().double()
        prior_logvar, prior_slope = _logarithm(prior_scale, form)
    precision = torch.exp(-prior_logvar)
    weight = torch.full((), 0.0 if case.samples else factor, dtype=mu.dtype, device=mu.device)
    if part.grad_values is not None:
        weight = part.grad_values.double().view(-1, *[1] * (mu.dim() - 1))
    z, noise, rounding, d_z = mu, *[torch.zeros_like(mu)] * 3
    if sample is not None:
        assert part.grad_z is not None
        z, d_z = sample.detach().double(), part.grad_z.double()
        noise = (z - mu) / std
        # z is rounded, and so is the noise that is recovered from it.
        rounding = torch.finfo(sample.dtype).eps * (z.abs() + mu.abs())
    distance = (z if case.spec.at_sample else mu) - prior_mu
    square, pull = distance.square() * precision, weight * distance * precision
    d_mu = d_z + pull
    if case.spec.at_sample:
        elements = 0.5 * (prior_logvar - logvar - noise.square() + square)
        d_logvar = 0.5 * (d_mu * noise * std - weight)  # along the path of z, on which the noise stays as it is
        d_prior_logvar = 0.5 * weight * (1 - square)
        off = rounding * (noise.abs() / std + distance.abs() * precision)
        off_pull = rounding * weight * precision
    else:
        growth = torch.expm1(logvar - prior_logvar)
        elements = 0.5 * (growth - (logvar - prior_logvar) + square)
        d_logvar = 0.5 * (d_z * noise * std + weight * growth)
        d_prior_logvar = -0.5 * weight * (growth + square)
        off = off_pull = torch.zeros_like(mu)
    off_logvar = rounding * d_z.abs() + 0.5 * off_pull * (noise.abs() * std + distance.abs())
    gradients = _by_name("mu", "logvar", part.logvar, d_mu, d_logvar * slope)
    slack = _by_name("mu", "logvar", part.logvar, off_pull, off_logvar * slope.abs())
    if part.prior_mu is not None:
        names = "prior_mu", "prior_logvar", part.prior_logvar
        gradients |= _by_name(*names, -pull, d_prior_logvar * prior_slope)
        slack |= _by_name(*names, off_pull, off_pull * distance.abs() * prior_slope.abs())
    return _Latent(elements, off, gradients, slack, None if sample is None else noise.flatten().float())


def _by_name(mean: str, scale: str, given: Tensor | None, first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """What belongs to a mean and to its scale, whether they came as two tensors or packed as one."""
    return {mean: torch.cat([first, second], dim=1)} if given is None else {mean: first, scale: second}


def _likelihood(case: Case, part: Operands) -> tuple[Tensor, dict[str, Tensor]]:
    """A likelihood's elements and, of each leaf that it depends on, the gradient of each element."""
    assert part.recon_x is not None
    assert part.x is not None
    x = part.x.double()
    if case.likelihood == GAUSSIAN:
        assert part.recon_logvar is not None
        logvar, slope = _logarithm(part.recon_logvar, case.spec.forms[0])
        difference = part.recon_x.detach().double() - x
        precision = torch.exp(-logvar)
        weighted = difference.square() * precision
        gradients = {"recon_x": difference * precision, "recon_logvar": 0.5 * (1 - weighted) * slope}
        return 0.5 * (logvar + weighted), gradients
    assert case.formula is not None
    names = [name for name in part.leaves if name in ("recon_x", "recon_logvar", "extra")]
    # Of x's shape, so that the gradients of what is broadcast come element by element.
    leaves = {name: part.leaves[name].detach().double().expand(x.shape).requires_grad_() for name in names}
    inputs = likelihood_inputs(case.formula, leaves["recon_x"], x, leaves.get("recon_logvar"), leaves.get("extra"))
    elements = case.formula(inputs, case.spec.forms)
    found = torch.autograd.grad(elements.sum(), list(leaves.values()))
    return elements.detach(), dict(zip(leaves, found, strict=True))


def check_fresh_noise(first: Tensor, second: Tensor) -> None:
    """Two samples of one distribution must differ."""
    if torch.equal(first, second):
        raise WrongAnswerError("two samples have the same noise")


def check_step(model: MLP, function: Function, x: Tensor, *, constant: bool = False) -> float:
    """The largest error of a training step's loss and of the parameters' gradients; raises `WrongAnswerError`."""
    errors = _Errors(TOLERANCES["float32"])
    model.zero_grad()
    loss, z, mu, logvar = function(x)
    loss.backward()
    found = [parameter.grad for parameter in model.parameters()]
    eps = (z.detach().double() - mu.detach().double()) / torch.exp(0.5 * logvar.detach().double())
    _check_noise(eps.flatten().float())
    exact, data = copy.deepcopy(model).double(), x.double()
    exact.zero_grad()
    mu64, logvar64 = exact.encode(data)
    recon_x, recon_logvar = exact.decode(mu64 + torch.exp(0.5 * logvar64) * eps)
    nll = 0.5 * (recon_logvar + (recon_x - data).square() * torch.exp(-recon_logvar))
    total = (nll + constant * HALF_LOG_2PI).sum() + 0.5 * (mu64.square() + torch.expm1(logvar64) - logvar64).sum()
    expected_loss = total / len(x)
    expected_loss.backward()
    errors.compare("the loss", loss, expected_loss)
    for (name, parameter), gradient in zip(exact.named_parameters(), found, strict=True):
        if gradient is None or parameter.grad is None:
            raise WrongAnswerError(f"{name} has no gradient")
        errors.compare(f"the gradient of {name}", gradient, parameter.grad)
    return errors.largest()


class _Errors:
    """Compares, and keeps the largest error of each thing compared."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self._largest: dict[str, float] = {}

    def compare(
        self, what: str, found: Tensor, expected: Tensor, slack: Tensor | None = None, size: Tensor | None = None
    ) -> None:
        """Errors beyond ``slack`` count relative to ``size``: that of the terms, for a sum of terms of either sign; by
        default that of the element and, so that zeros have one, of the root mean square of all."""
        if found.shape != expected.shape:
            raise WrongAnswerError(f"{what} has shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
        expected = expected.detach()
        if size is None:
            size = expected.abs() + expected.square().mean().sqrt()
        distance = (found.detach().double() - expected).abs()
        if slack is not None:
            distance = (distance - slack).clamp(min=0)
        error = (distance / (size + torch.finfo(torch.float32).tiny)).max().item()
        self._largest[what] = max(self._largest.get(what, 0.0), math.inf if math.isnan(error) else error)

    def largest(self) -> float:
        """Of all; raises `WrongAnswerError` if any is larger than the tolerance."""
        wrong = [f"{what} ({error:.2g})" for what, error in self._largest.items() if error > self.tolerance]
        if wrong:
            raise WrongAnswerError(f"off by more than {self.tolerance:.2g} of its size: {', '.join(wrong)}")
        return max(self._largest.values(), default=0.0)


def _moments(mu: Tensor, logvar: Tensor | None) -> tuple[Tensor, Tensor]:
    if logvar is None:
        mean, log_variance = mu.chunk(2, dim=1)
        return mean, log_variance
    return mu, logvar


def _chunks(operands: Operands) -> Iterator[tuple[int, int]]:
    """Ranges of samples that have about `_CHUNK` elements."""
    largest = max(operands.leaves.values(), key=torch.numel)
    witness = operands.mu if operands.mu is not None else operands.x
    assert witness is not None
    batch = len(witness)
    rows = max(1, _CHUNK * batch // max(largest.numel(), 1))
    for start in range(0, batch, rows):
        yield start, min(start + rows, batch)


def _check_noise(eps: Tensor) -> None:
    """Whether values can be independent standard normal ones: finite, of mean 0 and variance 1, uncorrelated."""
    if not eps.isfinite().all():
        raise WrongAnswerError("the sample has values that are not finite")
    count = eps.numel()
    if count < 2:
        return
    eps = eps.double()
    for what, found, deviation in (
        ("the mean of the noise", eps.mean(), math.sqrt(1 / count)),
        ("the variance of the noise, less 1,", eps.square().mean() - 1, math.sqrt(2 / count)),
        ("the correlation of neighbours in the noise", (eps[1:] * eps[:-1]).mean(), math.sqrt(1 / count)),
    ):
        # Noise recovered from a rounded sample is not quite the noise that was drawn.
        if abs(found.item()) > _SIGMAS * deviation + 1e-3:
            raise WrongAnswerError(f"{what} is {found.item():.3g}, which chance does not explain")
