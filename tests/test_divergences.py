"""The divergence to a Gaussian prior, over broadcasts, layouts, dtypes and reductions: values and all four gradients.

What is right is the registry's formula in float64, differentiated by PyTorch; that it is, `test_formulas.py` says.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import KERNEL_TARGETS, Target, nll_elements, reduced
from test_likelihoods import PATTERNS, SHAPE, layouts_for
from test_operations import REDUCTIONS, check, with_gradients
from torch import Tensor

from fusedvae import functional
from fusedvae.backend.reference import FORMULAS

pytestmark = pytest.mark.parametrize("target", KERNEL_TARGETS, indirect=True)


def compare(target: Target, inputs: list[Tensor], reduction: str, tolerance: float) -> None:
    """Value and gradients against the formula."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    found = with_gradients(functional.kl_normal(*leaves, reduction=reduction, backend=target.backend), leaves)
    exact = reduced(FORMULAS["kl_normal"]([*doubles]).expand(inputs[0].shape), reduction)
    check(found, with_gradients(exact, doubles), tolerance)


def inputs_of(pattern: str, other: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in (SHAPE, SHAPE, PATTERNS[pattern], PATTERNS[other])]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_broadcast_priors_in_any_layout(target: Target, pattern: str, reduction: str) -> None:
    for layout in layouts_for(pattern, reduction):
        mu, logvar, *prior = inputs_of(pattern, pattern)
        compare(target, [layout(mu), layout(logvar), *prior], reduction, 4e-6)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_means_and_variances_that_are_broadcast_in_different_ways(target: Target, reduction: str) -> None:
    names = ["each", "scalar", "channel", "sample", "column", "row"]
    for pattern, other in itertools.product(names, names):
        compare(target, inputs_of(pattern, other), reduction, 4e-6)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.bfloat16, 8e-3), (torch.float16, 3e-3)], ids=str
)
def test_dtypes(target: Target, dtype: torch.dtype, tolerance: float) -> None:
    for reduction in REDUCTIONS:
        compare(target, inputs_of("each", "channel", dtype), reduction, tolerance)


def test_packed_posteriors_and_priors(target: Target) -> None:
    for shape in ((4, 6, 5, 7), (1, 6, 1, 1)):
        packed, prior = torch.randn(4, 6, 5, 7).requires_grad_(), torch.randn(shape).requires_grad_()
        twice = [t.detach().double().requires_grad_() for t in (packed, prior)]
        (mu, logvar), (prior_mu, prior_logvar) = (t.chunk(2, 1) for t in twice)
        for reduction in REDUCTIONS:
            found = functional.kl_normal(packed, None, prior, None, reduction=reduction, backend=target.backend)
            exact = reduced(FORMULAS["kl_normal"]([mu, logvar, prior_mu, prior_logvar]), reduction)
            check(with_gradients(found, [packed, prior]), with_gradients(exact, twice), 4e-6)


def test_numbers_and_no_prior(target: Target) -> None:
    mu, logvar = torch.randn(5, 7).requires_grad_(), torch.randn(5, 7).requires_grad_()
    standard = functional.kl_standard_normal(mu, logvar, backend=target.backend)
    torch.testing.assert_close(functional.kl_normal(mu, logvar, backend=target.backend), standard)
    torch.testing.assert_close(functional.kl_normal(mu, logvar, 0.0, 0.0, backend=target.backend), standard)
    twice = [t.detach().double().requires_grad_() for t in (mu, logvar)]
    for prior in ((0.3, -1.2), (torch.tensor(0.3), torch.tensor(-1.2, dtype=torch.float64)), (1, 0)):
        found = functional.kl_normal(mu, logvar, *prior, backend=target.backend)
        assert found.dtype == torch.float32
        exact = reduced(FORMULAS["kl_normal"]([*twice, *map(float, prior)]), "batchmean")
        check(with_gradients(found, [mu, logvar]), with_gradients(exact, twice), 4e-6)


@pytest.mark.large
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_first_and_second_derivatives_numerically(target: Target, reduction: str) -> None:
    t = [v.requires_grad_() for v in inputs_of("channel", "sample", torch.float64)]
    t = [v[:2, :, :2, :2].detach().requires_grad_() if v.dim() == 4 and v.shape[2] > 1 else v for v in t[:3]]
    t.append(torch.randn(2, 1, 1, 1, dtype=torch.float64).requires_grad_())

    def divergence(*t: Tensor) -> Tensor:
        return functional.kl_normal(*t, reduction=reduction, backend=target.backend)

    assert torch.autograd.gradcheck(divergence, t)
    assert torch.autograd.gradgradcheck(divergence, t)


def test_second_derivatives_of_a_balanced_divergence(target: Target) -> None:
    """They are those of two divergences, each of which sees the other distribution as it stands."""
    for other in (torch.randn(3, 6), torch.tensor(0.7)):
        t = [torch.randn(3, 6), torch.randn(3, 6), other, torch.rand_like(other)]
        t = [v.double().requires_grad_() for v in t]
        fixed = [v.detach() for v in t]
        found = functional.kl_normal(*t, balance=0.8, reduction="sum", backend=target.backend)
        q = functional.kl_normal(*t[:2], *fixed[2:], reduction="sum", backend="reference")
        p = functional.kl_normal(*fixed[:2], *t[2:], reduction="sum", backend="reference")
        right = 0.2 * q + 0.8 * p
        torch.testing.assert_close(found, right)
        firsts = [torch.autograd.grad(value, t, create_graph=True) for value in (found, right)]
        for first, expected in zip(*firsts, strict=True):
            torch.testing.assert_close(first, expected)
        seconds = [torch.autograd.grad(sum((g**2).sum() for g in first), t) for first in firsts]  # type: ignore[arg-type]
        for second, expected in zip(*seconds, strict=True):
            torch.testing.assert_close(second, expected)


def test_the_bound_with_a_prior_that_the_batch_shares(target: Target) -> None:
    shapes = ((4, 9), (4, 9), (4, 6), (4, 6), (1, 6), (6,))
    t = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    recon_x, x, mu, logvar, prior_mu, prior_logvar = t
    for reduction in REDUCTIONS:
        terms = functional.elbo_loss(
            recon_x,
            x,
            mu,
            logvar,
            prior_mu=prior_mu,
            prior_logvar=prior_logvar,
            beta=0.4,
            reduction=reduction,
            return_terms=True,
            backend=target.backend,
        )
        nll = reduced(nll_elements(recon_x, x, 0.0), reduction)
        kl = reduced(FORMULAS["kl_normal"]([mu, logvar, prior_mu, prior_logvar]), reduction)
        for found, expected in zip(terms, (nll + 0.4 * kl, nll, kl), strict=True):
            check([found], [expected], 1e-12)
        check(with_gradients(terms[0], t), with_gradients(nll + 0.4 * kl, t), 1e-12)


def test_not_a_number_and_infinity_go_where_they_go_in_eager(target: Target) -> None:
    special = torch.tensor([0.0, 1.0, -1.0, 40.0, -40.0, torch.inf, -torch.inf, torch.nan])
    t = torch.cartesian_prod(*[special] * 4)

    def run(backend: str) -> list[Tensor]:
        inputs = [v.clone().requires_grad_() for v in t.unbind(1)]
        kl = functional.kl_normal(*inputs, reduction="none", backend=backend)
        return [kl, *torch.autograd.grad(kl.sum(), inputs)]

    for found, expected in zip(run(target.backend), run("reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize(
    ("prior", "error", "message"),
    [
        ((torch.zeros(4, 3), 0.0), ValueError, r"prior_mu: expected a shape that broadcasts to \(4, 6\), got \(4, 3\)"),
        ((0.0, "wide"), TypeError, "prior_logvar: expected a tensor, a number or None, got str"),
        ((None, 0.0), ValueError, "prior_logvar: expected None without prior_mu"),
        ((torch.zeros(4, 3), None), ValueError, "prior_mu: packed .* expected an even size"),
        ((torch.zeros(4, 6), None), ValueError, r"prior_mu: packed .* broadcast to \(4, 6\), got \(4, 6\)"),
        ((0.0, None), TypeError, "prior_mu: expected a tensor, got float"),
    ],
)
def test_wrong_priors(target: Target, prior: tuple, error: type[Exception], message: str) -> None:
    prior = tuple([p.to(target.device) if isinstance(p, torch.Tensor) else p for p in prior])
    with pytest.raises(error, match=message):
        functional.kl_normal(torch.zeros(4, 6), torch.zeros(4, 6), *prior, backend=target.backend)
    with pytest.raises(error, match=message):
        functional.elbo_loss(
            torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(4, 6), torch.zeros(4, 6),
            prior_mu=prior[0], prior_logvar=prior[1], backend=target.backend,
        )  # fmt: skip
