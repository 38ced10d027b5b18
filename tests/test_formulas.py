"""The registry's formulas, against other sources: they are what all else is measured by."""

from __future__ import annotations

import math

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


def counts(mean: Tensor) -> Tensor:
    """Of these means, half of them near it, and others that are zero or no integers."""
    drawn = torch.where(torch.rand_like(mean) < 0.5, torch.poisson(mean), torch.rand_like(mean) * 8)
    return torch.where(torch.rand_like(mean) < 0.3, 0.0, drawn)


def test_poisson_nll_is_that_of_the_poisson_distribution() -> None:
    (log_rate,) = drawn(1)
    rate, x = torch.exp(2 * log_rate), counts(torch.exp(2 * log_rate))
    plain, in_full = FORMULAS["poisson_nll"], FORMULAS["poisson_nll_in_full"]
    assert plain.in_full == in_full.name
    for form, given in (("rate", rate - 1e-8), ("lograte", 2 * log_rate), ("softplus", torch.expm1(rate - 1e-8).log())):
        expected = torch.nn.functional.poisson_nll_loss(rate, x, log_input=False, eps=0.0, reduction="none")
        torch.testing.assert_close(plain([given, x], [plain.forms[form]]), expected)
        expected = -torch.distributions.Poisson(rate, validate_args=False).log_prob(x)
        torch.testing.assert_close(in_full([given, x], [plain.forms[form]]), expected)


def log_nb_positive(x: Tensor, mu: Tensor, theta: Tensor, eps: float = 1e-8) -> Tensor:
    """scvi-tools, src/scvi/distributions/_negative_binomial.py, in its order of operations."""
    log_theta_mu_eps = torch.log(theta + mu + eps)
    return (
        theta * (torch.log(theta + eps) - log_theta_mu_eps)
        + x * (torch.log(mu + eps) - log_theta_mu_eps)
        + torch.lgamma(x + theta)
        - torch.lgamma(theta)
        - torch.lgamma(x + 1)
    )


def moments(low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """mu, x and theta, the powers of ten between these."""
    mu, theta = (10 ** (torch.rand(200, dtype=torch.float64) * (high - low) + low) for _ in range(2))
    return mu, counts(mu), theta


def test_negative_binomial_nll_is_that_of_the_distribution_and_scvi_tools() -> None:
    nll = FORMULAS["negative_binomial_nll"]
    mu, x, theta = moments(-2.0, 3.0)
    by_torch = torch.distributions.NegativeBinomial(theta, probs=mu / (mu + theta), validate_args=False)
    torch.testing.assert_close(nll([mu, x, theta]), -by_torch.log_prob(x), rtol=1e-6, atol=1e-6)  # without eps
    for low, high in ((-8.0, -2.0), (-2.0, 3.0)):
        mu, x, theta = moments(low, high)
        torch.testing.assert_close(nll([mu, x, theta]), -log_nb_positive(x, mu, theta), rtol=1e-9, atol=1e-11)
        for form, given in (("logtheta", theta.log()), ("softplus", torch.expm1(theta.clamp(max=30.0)).log())):
            of = theta.clamp(max=30.0)
            torch.testing.assert_close(
                nll([mu, x, given], [nll.forms[form]])
                if form == "softplus"
                else nll([mu, x, of.log()], [nll.forms[form]]),
                -log_nb_positive(x, mu, of),
                rtol=1e-7,
                atol=1e-9,
            )


def test_negative_binomial_nll_of_a_large_theta_is_that_of_the_poisson_distribution() -> None:
    rate, x, _ = moments(-2.0, 3.0)
    found = FORMULAS["negative_binomial_nll"]([rate - 1e-8, x, 1e15])
    expected = FORMULAS["poisson_nll_in_full"]([rate.log(), x], [Form()])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=2e-8)  # what eps is


def test_zero_inflated_negative_binomial_nll_is_that_of_scvi_tools() -> None:
    for low, high in ((-8.0, -2.0), (-2.0, 3.0)):
        mu, x, theta = moments(low, high)
        pi = 8 * torch.randn_like(mu)
        # scvi-tools, log_zinb_positive.
        log_theta_mu_eps, softplus_pi = torch.log(theta + mu + 1e-8), torch.nn.functional.softplus(-pi)
        pi_theta_log = -pi + theta * (torch.log(theta + 1e-8) - log_theta_mu_eps)
        of_zero = torch.nn.functional.softplus(pi_theta_log) - softplus_pi
        of_others = log_nb_positive(x, mu, theta) - softplus_pi - pi
        expected = torch.where(x < 1e-8, of_zero, of_others)
        found = FORMULAS["zero_inflated_negative_binomial_nll"]([mu, x, theta, pi])
        torch.testing.assert_close(found, -expected, rtol=1e-9, atol=1e-11)


def test_discretized_logistic_nll_is_the_mass_of_bins() -> None:
    nll = FORMULAS["discretized_logistic_nll"]
    mean, log_scale = 0.5 * torch.randn(256, dtype=torch.float64), torch.rand(256, dtype=torch.float64) * 3 - 3
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    # The bins share out all of the mass.
    mass = torch.exp(-nll([mean[:, None].expand(-1, 256), x.expand(256, -1), log_scale[:, None]]))
    torch.testing.assert_close(mass.sum(1), torch.ones(256, dtype=torch.float64))
    # PixelCNN++ (Salimans et al. 2017), where it does not go over to an approximation.
    inverse = torch.exp(-log_scale)
    upper, lower = (torch.sigmoid(inverse * (x - mean + half)) for half in (1 / 255, -1 / 255))
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    is_exact = inside > 1e-5
    assert is_exact.sum() > 100
    found = nll([mean, x, log_scale])
    torch.testing.assert_close(found[is_exact], -torch.log(inside)[is_exact], rtol=1e-9, atol=1e-10)
    # And where it does, for bins that are narrow.
    wide = nll([mean, x, 3.0])
    middle = (x - mean) / math.exp(3.0)
    density = middle - 3.0 - 2 * torch.nn.functional.softplus(middle) - math.log(127.5)
    torch.testing.assert_close(wide[1:-1], -density[1:-1], rtol=1e-7, atol=1e-8)


def test_likelihoods_begin_with_the_reconstruction_the_data_and_the_scale() -> None:
    for formula in LIKELIHOODS.values():
        assert formula.inputs[0] in ("recon_x", "mu", "rate")
        assert formula.inputs[1] == "x"
        assert not formula.is_divergence
        assert all(pair == (0, 2) for pair in formula.pairs)
        assert formula.scales in ((), (0,), (2,))
