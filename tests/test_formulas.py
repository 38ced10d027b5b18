"""The registry's formulas, against other sources: they are what all else is measured by."""

from __future__ import annotations

import torch
from conftest import HALF_LOG_2PI
from torch import Tensor
from torch.distributions import Laplace, Normal, kl_divergence

from fusedvae.backend.reference import FORMULAS, LIKELIHOODS, Form


def drawn(count: int) -> list[Tensor]:
    return [torch.randn(50, dtype=torch.float64) for _ in range(count)]


def test_gaussian_nll_is_that_of_the_normal_distribution() -> None:
    recon_x, x, logvar = drawn(3)
    expected = -Normal(recon_x, torch.exp(logvar / 2)).log_prob(x)
    torch.testing.assert_close(FORMULAS["gaussian_nll"]([recon_x, x, logvar]) + HALF_LOG_2PI, expected)
    assert FORMULAS["gaussian_nll"].constant == HALF_LOG_2PI


def test_gaussian_nll_of_a_variance_is_pytorchs_own() -> None:
    recon_x, x, variance = drawn(3)
    variance = variance.abs()
    found = FORMULAS["gaussian_nll"]([recon_x, x, variance], [Form("bounded", eps=0.5)])
    expected = torch.nn.functional.gaussian_nll_loss(recon_x, x, variance, eps=0.5, reduction="none")
    torch.testing.assert_close(found, expected)


def test_laplace_nll_is_that_of_the_laplace_distribution() -> None:
    recon_x, x, log_scale, extra = drawn(4)
    expected = -Laplace(recon_x, torch.exp(log_scale)).log_prob(x)
    found = FORMULAS["laplace_nll"]([recon_x, x, log_scale, 0.0]) + FORMULAS["laplace_nll"].constant
    torch.testing.assert_close(found, expected)
    # CompVis/taming-transformers, losses/contperceptual.py: the perceptual loss joins the absolute error.
    torch.testing.assert_close(
        FORMULAS["laplace_nll"]([recon_x, x, log_scale, extra]),
        (torch.abs(x - recon_x) + extra) / torch.exp(log_scale) + log_scale,
    )


def test_kl_standard_normal_is_that_of_normal_distributions() -> None:
    mu, logvar = drawn(2)
    expected = kl_divergence(Normal(mu, torch.exp(logvar / 2)), Normal(torch.zeros_like(mu), torch.ones_like(mu)))
    torch.testing.assert_close(FORMULAS["kl_standard_normal"]([mu, logvar]), expected)


def test_kl_normal_is_that_of_normal_distributions() -> None:
    mu, logvar, prior_mu, prior_logvar = drawn(4)
    expected = kl_divergence(Normal(mu, torch.exp(logvar / 2)), Normal(prior_mu, torch.exp(prior_logvar / 2)))
    torch.testing.assert_close(FORMULAS["kl_normal"]([mu, logvar, prior_mu, prior_logvar]), expected)
    torch.testing.assert_close(
        FORMULAS["kl_normal"]([mu, logvar, 0.0, 0.0]), FORMULAS["kl_standard_normal"]([mu, logvar])
    )


def test_likelihoods_begin_with_the_reconstruction_the_data_and_the_scale() -> None:
    for formula in LIKELIHOODS.values():
        assert formula.inputs[:2] == ("recon_x", "x")
        assert not formula.is_divergence
        assert all(pair == (0, 2) for pair in formula.pairs)
