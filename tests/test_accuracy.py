"""What is small beside what it is computed of: no difference of larger numbers has taken its digits."""

from __future__ import annotations

import pytest
import torch
from conftest import TARGETS, Target

from fusedvae import functional

pytestmark = pytest.mark.parametrize("target", TARGETS, indirect=True)


@pytest.mark.parametrize("x", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("pos_weight", [1.0, 3.0])
def test_bernoulli_likelihoods_of_certain_logits(target: Target, x: float, pos_weight: float) -> None:
    """A background pixel of which a network is sure has a small gradient: e^a, and not 1 - (1 - e^a)."""
    a = torch.tensor([-80.0, -30.0, -20.0, -17.0, -12.0, -3.0, -1e-3, 0.0, 1e-3, 3.0, 12.0, 17.0, 20.0, 30.0, 80.0])
    a.requires_grad_()
    given, weight = torch.full_like(a, x), torch.tensor(pos_weight)
    value = functional.bernoulli_nll(a, given, pos_weight=weight, reduction="none", dim=(), backend=target.backend)
    (gradient,) = torch.autograd.grad(value.sum(), a)
    d = a.detach().double()
    hit, miss = torch.nn.functional.softplus(-d, threshold=100), torch.nn.functional.softplus(d, threshold=100)
    torch.testing.assert_close(value.double(), pos_weight * x * hit + (1 - x) * miss, rtol=1e-6, atol=0)
    right = (1 - x) * torch.sigmoid(d) - pos_weight * x * torch.sigmoid(-d)
    torch.testing.assert_close(gradient.double(), right, rtol=1e-6, atol=0 if x != 0.25 else 1e-7)


@pytest.mark.parametrize(
    "options",
    [{}, {"clamp": (-30.0, 20.0)}, {"clamp": (None, 20.0)}, {"scale": "logstd"}, {"scale": "logstd", "clamp": (-9, 9)}],
    ids=str,
)
@pytest.mark.parametrize("is_learned", [False, True], ids=["standard", "learned"])
def test_divergences_of_what_is_near(target: Target, is_learned: bool, options: dict) -> None:
    """Of a small d = log sigma^2 - log prior_sigma^2 it is about d^2 / 4, and not a difference of e^d and 1 + d."""
    d = torch.tensor([1e-5, -1e-4, 1e-4, -1e-3, 1e-3, -1e-2, 1e-2, -0.1, 0.1, -0.5, 0.5])
    prior = torch.full_like(d, 0.25 if is_learned else 0.0)
    spread, d = prior + d, (prior + d) - prior  # as much of it as float32 has
    spread.requires_grad_()
    distributions = [torch.zeros_like(d), spread, *([torch.zeros_like(d), prior] if is_learned else [])]
    divergence = functional.kl_normal if is_learned else functional.kl_standard_normal
    if is_learned and "scale" in options:
        options = {**options, "prior_scale": options["scale"]}
    value = divergence(*distributions, reduction="none", dim=(), backend=target.backend, **options)
    (gradient,) = torch.autograd.grad(value.sum(), spread)
    steps = 2.0 if options.get("scale") == "logstd" else 1.0
    d = steps * d.double()
    assert (value >= 0).all()
    assert ((value - 0.5 * (torch.expm1(d) - d)).abs() <= 1e-7 * d.abs()).all()
    # (PyTorch differentiates expm1 into e^d - 1.)
    atol = 1.3e-7 if target.backend == "reference" else 0.0
    torch.testing.assert_close(gradient.double(), steps * 0.5 * torch.expm1(d), rtol=1e-6, atol=atol)


@pytest.mark.parametrize(("rate", "x"), [(1e30, 1.0), (1e20, 3.0), (5e21, 1000.0), (1e-3, 0.0), (2.5, 3.0)])
def test_poisson_likelihoods_of_distant_counts(target: Target, rate: float, x: float) -> None:
    rates, counts = torch.full((2,), rate).requires_grad_(), torch.full((2,), x).requires_grad_()
    value = functional.poisson_nll(rates, counts, full=True, reduction="none", dim=(), backend=target.backend)
    d_rate, d_x = torch.autograd.grad(value.sum(), [rates, counts])
    r, k = rates.detach().double(), counts.detach().double()
    torch.testing.assert_close(value.double(), r - k * r.log() + torch.lgamma(k + 1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d_rate.double(), 1 - k / r, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d_x.double(), torch.digamma(k + 1) - r.log(), rtol=1e-5, atol=1e-6)
