"""The forms of a scale: likelihoods, divergences and samples, against what people write, in torch's own operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TARGETS, Target
from torch import Tensor
from torch.distributions import Laplace, Normal, kl_divergence
from torch.nn.functional import softplus

import fusedvae
from fusedvae import functional

pytestmark = pytest.mark.parametrize("target", TARGETS, indirect=True)

Deviation = Callable[[Tensor, float], Tensor]

DEVIATIONS: dict[str, Deviation] = {
    "logvar": lambda s, eps: (s.exp() + eps).sqrt(),
    "logstd": lambda s, eps: s.exp() + eps,
    "std": lambda s, eps: s + eps,
    "var": lambda s, eps: (s + eps).sqrt(),
    "softplus": lambda s, eps: softplus(s) + eps,
}
"""The standard deviation of each form, and eps."""
LAPLACE_SCALES: dict[str, Deviation] = {
    "logscale": lambda s, eps: s.exp() + eps,
    "scale": lambda s, eps: s + eps,
    "softplus": lambda s, eps: softplus(s) + eps,
}
POSITIVE = ("std", "var", "scale")
"""Forms of which no exponential takes the sign away."""
LIMITS: list[dict[str, Any]] = [
    {},
    {"eps": 0.1},
    {"clamp": (0.5, 1.5)},
    {"clamp": (None, 1.0), "eps": 1e-4},
    {"clamp": (0.8, None)},
]
every_form = pytest.mark.parametrize("scale", DEVIATIONS)
every_limit = pytest.mark.parametrize("limits", LIMITS, ids=str)


@pytest.fixture(autouse=True)
def _chosen(target: Target) -> Iterator[None]:
    """What a test calls runs on the target's backend."""
    with fusedvae.use_backend(target.backend):
        yield


def drawn(scale: str, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """What a network may give in this form."""
    made = torch.randn(shape).to(dtype)
    return (made.abs() + 0.05 if scale in POSITIVE else made).requires_grad_()


def bounded(s: Tensor, low: float | None, high: float | None) -> Tensor:
    """torch.clamp with a derivative of 1 at the bounds, which it has with some releases of PyTorch."""
    inside = (s >= (-math.inf if low is None else low)) & (s <= (math.inf if high is None else high))
    return torch.where(inside, s, s.detach().clamp(low, high))


def deviation(forms: dict[str, Deviation], scale: str, s: Tensor, clamp: Any = None, eps: float = 0.0) -> Tensor:
    return forms[scale](s if clamp is None else bounded(s, *clamp), eps)


def agree(found: Tensor, expected: Tensor, leaves: list[Tensor], *, tolerance: float = 1e-11) -> None:
    """Values, and gradients by the leaves, of their weighted sums."""
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    weight = torch.linspace(0.5, 2.0, max(found.numel(), 1)).to(found)[: found.numel()].view(found.shape)
    pairs = zip(
        torch.autograd.grad((found * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves, retain_graph=True),
        strict=True,
    )
    for k, (f, e) in enumerate(pairs):
        torch.testing.assert_close(f, e, rtol=tolerance, atol=tolerance, msg=lambda m, k=k: f"gradient {k}: {m}")


@every_form
@every_limit
@pytest.mark.parametrize("shape", [(4, 3, 5), (3, 1), ()], ids=str)
def test_of_a_gaussian_likelihood(scale: str, limits: dict[str, Any], shape: tuple[int, ...]) -> None:
    m, x, s = drawn("", 4, 3, 5), drawn("", 4, 3, 5), drawn(scale, *shape)
    sigma = deviation(DEVIATIONS, scale, s, **limits)
    elements = -Normal(m, sigma).log_prob(x)
    for reduction in ("batchmean", "none"):
        found = functional.gaussian_nll(m, x, s, scale=scale, **limits, full=True, reduction=reduction)
        expected = elements.flatten(1).sum(1)
        agree(found, expected.mean() if reduction == "batchmean" else expected, [m, x, s])


@pytest.mark.parametrize("scale", LAPLACE_SCALES)
@every_limit
@pytest.mark.parametrize("shape", [(4, 3, 5), (3, 1), ()], ids=str)
def test_of_a_laplace_likelihood(scale: str, limits: dict[str, Any], shape: tuple[int, ...]) -> None:
    m, x, s = drawn("", 4, 3, 5), drawn("", 4, 3, 5), drawn(scale, *shape)
    elements = -Laplace(m, deviation(LAPLACE_SCALES, scale, s, **limits)).log_prob(x)
    found = functional.laplace_nll(m, x, s, scale=scale, **limits, full=True, reduction="sum")
    agree(found, elements.sum(), [m, x, s])


@every_form
@every_limit
def test_of_a_posterior(scale: str, limits: dict[str, Any]) -> None:
    mu, s = drawn("", 4, 6), drawn(scale, 4, 6)
    sigma = deviation(DEVIATIONS, scale, s, **limits)
    elements = kl_divergence(Normal(mu, sigma), Normal(torch.zeros(()).double(), torch.ones(()).double()))
    agree(functional.kl_standard_normal(mu, s, scale=scale, **limits), elements.sum() / 4, [mu, s])
    noise = torch.randn(4, 6, dtype=torch.float64)
    z = functional.reparameterize(mu, s, scale=scale, **limits, noise=noise)
    agree(z, mu + sigma * noise, [mu, s])
    z, kl = functional.latent(mu, s, scale=scale, **limits, noise=noise)
    agree(torch.cat((z, kl[:, None]), 1), torch.cat((mu + sigma * noise, elements.sum(1, keepdim=True)), 1), [mu, s])


@every_form
@pytest.mark.parametrize("prior_scale", DEVIATIONS)
@pytest.mark.parametrize("is_shared", [False, True])
def test_of_a_posterior_and_a_prior(scale: str, prior_scale: str, is_shared: bool) -> None:
    shape = (6,) if is_shared else (4, 6)
    mu, s, prior_mu, prior_s = drawn("", 4, 6), drawn(scale, 4, 6), drawn("", *shape), drawn(prior_scale, *shape)
    clamps = {"clamp": (-1.0, 1.2), "prior_clamp": (-0.5, None)}
    sigma = deviation(DEVIATIONS, scale, s, (-1.0, 1.2), 0.1)
    prior = Normal(prior_mu, deviation(DEVIATIONS, prior_scale, prior_s, (-0.5, None), 0.2))
    forms = {"scale": scale, "prior_scale": prior_scale, **clamps, "eps": 0.1, "prior_eps": 0.2}
    leaves = [mu, s, prior_mu, prior_s]
    elements = kl_divergence(Normal(mu, sigma), prior)
    agree(functional.kl_normal(mu, s, prior_mu, prior_s, **forms), elements.sum() / 4, leaves)
    noise = torch.randn(4, 6, dtype=torch.float64)
    expected_z = mu + sigma * noise
    z, kl = functional.latent(mu, s, prior_mu, prior_s, **forms, noise=noise)
    agree(torch.cat((z, kl[:, None]), 1), torch.cat((expected_z, elements.sum(1, keepdim=True)), 1), leaves)
    z, kl = functional.latent(mu, s, prior_mu, prior_s, **forms, noise=noise, estimator="sample")
    difference = Normal(mu, sigma).log_prob(expected_z) - prior.log_prob(expected_z)
    agree(torch.cat((z, kl[:, None]), 1), torch.cat((expected_z, difference.sum(1, keepdim=True)), 1), leaves)


def test_a_floor_is_the_priors_too_where_both_come_alike() -> None:
    mu, s, prior_mu, prior_s = (drawn("", 4, 6) for _ in range(4))
    both = functional.kl_normal(mu, s, prior_mu, prior_s, scale="softplus", prior_scale="softplus", eps=0.1)
    expected = kl_divergence(Normal(mu, softplus(s) + 0.1), Normal(prior_mu, softplus(prior_s) + 0.1)).sum() / 4
    agree(both, expected, [mu, s, prior_mu, prior_s])
    one = functional.kl_normal(mu, s, prior_mu, prior_s, scale="softplus", eps=0.1)
    agree(one, kl_divergence(Normal(mu, softplus(s) + 0.1), Normal(prior_mu, (prior_s / 2).exp())).sum() / 4, [mu, s])
    standard = functional.kl_normal(mu, s, 0.0, 0.0, eps=0.1)
    agree(standard, functional.kl_standard_normal(mu, s, eps=0.1), [mu, s])


@every_form
def test_of_packed_tensors_and_of_all_in_one(scale: str) -> None:
    m, x, s = drawn("", 4, 3, 5), drawn("", 4, 3, 5), drawn(scale, 4, 3, 5)
    mu, t = drawn("", 4, 6), drawn(scale, 4, 6)
    packed_x = torch.cat((m, s), 1).detach().requires_grad_()
    packed_z = torch.cat((mu, t), 1).detach().requires_grad_()
    options = {"clamp": (-0.7, 0.9), "eps": 0.01, "recon_clamp": (-1.0, 0.8), "recon_eps": 0.02}
    found = functional.elbo_loss(packed_x, x, packed_z, None, None, scale=scale, recon_scale=scale, **options)
    assert isinstance(found, Tensor)
    m, s = packed_x.chunk(2, 1)
    mu, t = packed_z.chunk(2, 1)
    sigma = deviation(DEVIATIONS, scale, s, (-1.0, 0.8), 0.02)
    q = Normal(mu, deviation(DEVIATIONS, scale, t, (-0.7, 0.9), 0.01))
    nll = 0.5 * (sigma.square().log() + ((m - x) / sigma).square())
    kl = kl_divergence(q, Normal(torch.zeros_like(mu), torch.ones_like(mu)))
    agree(found, (nll.sum() + kl.sum()) / 4, [packed_x, packed_z])


@every_form
def test_numbers(scale: str) -> None:
    m, x, mu, s = drawn("", 4, 5), drawn("", 4, 5), drawn("", 4, 6), drawn(scale, 4, 6)
    sigma = deviation(DEVIATIONS, scale, torch.tensor(0.3, dtype=torch.float64), (None, 0.25), 0.1)
    found = functional.gaussian_nll(m, x, 0.3, scale=scale, clamp=(None, 0.25), eps=0.1, full=True)
    agree(found, -Normal(m, sigma).log_prob(x).sum() / 4, [m, x])
    prior = Normal(0.5, deviation(DEVIATIONS, scale, torch.tensor(0.3, dtype=torch.float64)))
    found = functional.kl_normal(mu, s, 0.5, 0.3, scale=scale, prior_scale=scale)
    agree(found, kl_divergence(Normal(mu, deviation(DEVIATIONS, scale, s)), prior).sum() / 4, [mu, s])


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(scale: str, dtype: torch.dtype) -> None:
    """No less accurate than the same in float32, from the same operands."""
    m, x, s = drawn("", 8, 300, dtype=dtype), drawn("", 8, 300, dtype=dtype), drawn(scale, 8, 300, dtype=dtype)
    mu, t = drawn("", 8, 40, dtype=dtype), drawn(scale, 8, 40, dtype=dtype)
    leaves = [m, s, mu, t]
    options = {"scale": scale, "recon_scale": scale, "clamp": (-3.0, 2.0), "recon_clamp": (-2.0, 3.0)}
    loss = functional.elbo_loss(m, x, mu, t, s, **options)
    assert isinstance(loss, Tensor)
    assert loss.dtype == torch.float32
    twice = [v.detach().double().requires_grad_() for v in leaves]
    m_, s_, mu_, t_ = twice
    nll = -Normal(m_, deviation(DEVIATIONS, scale, s_, (-2.0, 3.0))).log_prob(x.double()) - 0.9189385332046727
    q = Normal(mu_, deviation(DEVIATIONS, scale, t_, (-3.0, 2.0)))
    expected = (nll.sum() + kl_divergence(q, Normal(torch.zeros_like(mu_), torch.ones_like(mu_))).sum()) / 8
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    tolerance = 2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    pairs = zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, twice), strict=True)
    for found, exact in pairs:
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())


@every_form
def test_a_clamp_lets_no_gradient_through_outside(scale: str) -> None:
    """Whatever the operands hold there: diffusers bounds log-variances so that infinities stay harmless."""
    s = torch.tensor([-torch.inf, -31.0, -30.0, 0.5, 20.0, 21.0, torch.inf, torch.nan], dtype=torch.float64)
    if scale in ("std", "var"):
        s = s.where(s.isnan() | (s > 0), 1.0)
    s, mu = s.view(1, -1).requires_grad_(), torch.zeros(1, 8, dtype=torch.float64)
    noise = torch.ones_like(mu)
    z, kl = functional.latent(mu, s, scale=scale, clamp=(-30.0, 20.0), noise=noise, dim=())
    sigma = DEVIATIONS[scale](bounded(s, -30.0, 20.0), 0.0)
    expected = 0.5 * (sigma.square() - 1 - sigma.square().log())
    torch.testing.assert_close(kl, expected, equal_nan=True)
    torch.testing.assert_close(z, sigma, equal_nan=True)
    (found,) = torch.autograd.grad(z.sum() + kl.sum(), s)
    outside = (s < -30) | (s > 20) | s.isnan()
    assert torch.equal(found[outside], torch.zeros_like(found[outside]))
    (exact,) = torch.autograd.grad(sigma.sum() + expected.sum(), s)
    torch.testing.assert_close(found, exact)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_not_a_number_and_infinity_go_where_they_go_in_eager(scale: str, dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    scales = torch.tensor([8.0, 1.0, -1.0, -8.0, torch.nan], dtype=dtype)
    mu, noise, s = (t.clone() for t in torch.cartesian_prod(special, special[:3], scales).view(1, -1, 3).unbind(2))

    def run(backend: str) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (mu, s)]
        options = {"scale": scale, "dim": (), "backend": backend}
        nll = functional.gaussian_nll(leaves[0], noise, leaves[1], reduction="none", **options)
        z, kl = functional.latent(*leaves, noise=noise, **options)
        values = [nll, z, kl]
        return values + [g for v in values for g in torch.autograd.grad(v.sum(), leaves, retain_graph=True)]

    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for found, expected in zip(run(fusedvae.backend.current_choice()), run("reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-30, equal_nan=True)


@every_form
def test_first_and_second_derivatives_numerically(scale: str) -> None:
    m, x, s = drawn("", 3, 4), drawn("", 3, 4), drawn(scale, 4)
    mu, t, prior_mu, prior_t = drawn("", 3, 2), drawn(scale, 3, 2), drawn("", 2), drawn(scale, 2)
    noise = torch.randn(3, 2, dtype=torch.float64)

    def nll(*operands: Tensor) -> Tensor:
        return functional.gaussian_nll(*operands, scale=scale, eps=0.1)

    def sampled(*operands: Tensor) -> tuple[Tensor, Tensor]:
        options = {"scale": scale, "prior_scale": scale, "eps": 0.1, "noise": noise}
        return tuple(functional.latent(*operands, **options, estimator="sample"))

    for function, leaves in ((nll, [m, x, s]), (sampled, [mu, t, prior_mu, prior_t])):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": "sigma"}, ValueError, "scale: expected one of 'logvar', 'logstd', 'std', 'var', 'softplus'; got"),
        ({"scale": "logscale"}, ValueError, "scale: expected one of 'logvar'"),
        ({"scale": ["std"]}, ValueError, "scale: expected one of"),
        ({"clamp": 3.0}, TypeError, "clamp: expected a pair"),
        ({"clamp": (1.0, 2.0, 3.0)}, TypeError, "clamp: expected a pair"),
        ({"clamp": ("a", 2.0)}, TypeError, "clamp: expected numbers or None, got str"),
        ({"clamp": (3.0, 2.0)}, ValueError, "clamp: expected low <= high"),
        ({"eps": -1.0}, ValueError, "eps: expected at least 0, got -1.0"),
        ({"eps": None}, TypeError, "eps: expected a number, got NoneType"),
    ],
)
def test_wrong_forms(options: dict[str, Any], error: type[Exception], message: str) -> None:
    mu = torch.zeros(4, 6)
    for call in (functional.kl_standard_normal, functional.latent, functional.reparameterize):
        with pytest.raises(error, match=f"^{message}"):
            call(mu, mu, **options)
    with pytest.raises(error, match=f"^recon_{message}"):
        functional.elbo_loss(mu, mu, mu, mu, mu, **{f"recon_{name}": value for name, value in options.items()})
    if options == {"eps": None}:
        return  # of a prior it says: as the posterior's
    of_prior = {f"prior_{name}": value for name, value in options.items()}
    for prior in ((mu, mu), ()):  # and where there is none
        with pytest.raises(error, match=f"^prior_{message}"):
            functional.kl_normal(mu, mu, *prior, **of_prior)
        with pytest.raises(error, match=f"^prior_{message}"):
            functional.latent(mu, mu, *prior, **of_prior)


@pytest.mark.parametrize(
    ("name", "scale", "place"),
    [
        ("gaussian", "std", 2),
        ("laplace", "scale", 2),
        ("discretized_logistic", "scale", 2),
        ("poisson", "rate", 0),
        ("negative_binomial", "theta", 2),
        ("zero_inflated_negative_binomial", "theta", 2),
    ],
)
def test_every_likelihoods_own_function_has_every_option(name: str, scale: str, place: int) -> None:
    function: Callable[..., Tensor] = getattr(functional, f"{name}_nll")
    m, s, drop = (torch.rand(3, 4, 5, dtype=torch.float64) + 0.1 for _ in range(3))
    inputs = [m, torch.randint(0, 2, (3, 4, 5)).double(), s, drop]
    inputs = inputs[: {"poisson": 2, "zero_inflated_negative_binomial": 4}.get(name, 3)]
    formed = [t.clamp(0.3, 0.6) + 0.25 if k == place else t for k, t in enumerate(inputs)]
    weight = torch.rand(4, 1, dtype=torch.float64)
    each = function(*formed, scale=scale, reduction="none", dim=())
    for dim in ((), -1, (1, 2)):
        found = function(*inputs, scale=scale, clamp=(0.3, 0.6), eps=0.25, weight=weight, reduction="none", dim=dim)
        expected = (weight * each).sum(dim) if dim != () else weight * each
        torch.testing.assert_close(found, expected)


def test_bounds_in_a_list() -> None:
    mu, s = torch.rand(2, 4, 5)
    found = functional.kl_standard_normal(mu, s, clamp=[0.2, 0.4])  # type: ignore[arg-type]
    torch.testing.assert_close(found, functional.kl_standard_normal(mu, s.clamp(0.2, 0.4)))


def test_a_number_that_is_none_stays_so() -> None:
    m = torch.zeros(2, 3)
    for clamp in (None, (-1.0, 1.0)):
        for scale in DEVIATIONS:
            assert functional.gaussian_nll(m, m + 1, math.nan, scale=scale, clamp=clamp).isnan()
            assert functional.kl_normal(m, m, 0.0, math.nan, prior_scale=scale, prior_clamp=clamp).isnan().all()


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16])
def test_numbers_of_numpy_are_numbers(kind: type[np.floating]) -> None:
    m, small, number = torch.randn(2, 3, dtype=torch.float64), kind(1e-4), kind(1.7)
    for scale in POSITIVE[:2]:
        for given in (small, number):
            found = functional.gaussian_nll(m, m + 1, given, scale=scale)
            assert torch.equal(found, functional.gaussian_nll(m, m + 1, float(given), scale=scale))
    for options in ({"beta": number}, {"grad_scale": number}):
        plain = {name: float(value) for name, value in options.items()}
        mean, twin = (m.clone().requires_grad_() for _ in range(2))
        for t, given in ((mean, options), (twin, plain)):
            functional.elbo_loss(t, m, m, m, **given).backward()
        assert torch.equal(mean.grad, twin.grad)
    packed = torch.randn(3, 4, 6)
    for dim in (1, -1):
        found = functional.kl_standard_normal(packed, None, packed_dim=np.int64(dim))
        assert torch.equal(found, functional.kl_standard_normal(packed, None, packed_dim=dim))
    assert functional.reparameterize(packed, packed, offset=np.int64(5)).shape == packed.shape


@pytest.mark.parametrize("scale", ["std", "var", "softplus"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_no_number_has_no_derivative_that_is_one(target: Target, scale: str, dtype: torch.dtype) -> None:
    """Of an infinite scale: a gradient of 0 would hide from a loss scaler that something has overflowed."""
    mu = torch.zeros(2, 5, dtype=dtype)
    s = torch.full((2, 5), torch.inf, dtype=dtype).requires_grad_()
    prior = torch.full((5,), 0.5, dtype=dtype)
    values = [
        functional.kl_standard_normal(mu, s, scale=scale),
        functional.kl_normal(mu, s, 0.0, prior, scale=scale, prior_scale="std"),
        functional.latent(mu, s, scale=scale, noise=torch.ones_like(mu), estimator="sample")[1],
        functional.poisson_nll(s, mu + 1, scale="rate"),
        functional.poisson_nll(s, mu + 1, scale="rate", full=True),
        functional.negative_binomial_nll(mu + 1, mu + 1, s, scale="theta"),
    ]
    for value in values:
        assert value.isnan().all()
        (found,) = torch.autograd.grad(value.sum(), s)
        assert not found.isfinite().any() or target.backend == "reference"
