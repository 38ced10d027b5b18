"""The latent: several samples, divergences at a sample, where its noise comes from, and importance weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import TARGETS, Target, threads
from test_forms import agree
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import fusedvae
from fusedvae import functional

pytestmark = pytest.mark.parametrize("target", TARGETS, indirect=True)


@pytest.fixture(autouse=True)
def _chosen(target: Target) -> Iterator[None]:
    """What a test calls runs on the target's backend."""
    with fusedvae.use_backend(target.backend):
        yield


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


PRIORS: dict[str, tuple[tuple[int, ...], ...]] = {
    "standard": (),
    "each": ((4, 3, 5), (4, 3, 5)),
    "shared": ((5,), (3, 1)),
    "per sample": ((4, 1, 1), ()),
}


def prior_of(parameters: list[Tensor]) -> Normal:
    if not parameters:
        return Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    return Normal(parameters[0], (parameters[1] / 2).exp())


@pytest.mark.parametrize("estimator", ["analytic", "sample"])
@pytest.mark.parametrize("samples", [None, 1, 3])
@pytest.mark.parametrize("prior", PRIORS)
def test_samples_and_divergences(prior: str, samples: int | None, estimator: str) -> None:
    mu, s, *parameters = operands = leaves((4, 3, 5), (4, 3, 5), *PRIORS[prior])
    noise = torch.randn(*(() if samples is None else (samples,)), 4, 3, 5, dtype=torch.float64)
    z, kl = functional.latent(*operands, samples=samples, estimator=estimator, noise=noise)
    q, p = Normal(mu, (s / 2).exp()), prior_of(parameters)
    expected_z = mu + (s / 2).exp() * noise
    at_sample = q.log_prob(expected_z) - p.log_prob(expected_z)
    elements = kl_divergence(q, p) if estimator == "analytic" else at_sample
    agree(z, expected_z, [mu, s])
    z, kl = functional.latent(*operands, samples=samples, estimator=estimator, noise=noise)
    agree(kl, elements.sum((-1, -2)), operands)
    z, kl = functional.latent(*operands, samples=samples, estimator=estimator, noise=noise)
    agree(z.sum() + kl.sin().sum(), expected_z.sum() + elements.sum((-1, -2)).sin().sum(), operands)


def test_samples_are_drawn_apart_and_in_the_order_of_the_stream() -> None:
    mu, s = leaves((4, 6), (4, 6), dtype=torch.float32)
    torch.manual_seed(1)
    several = functional.reparameterize(mu, s, samples=3)
    torch.manual_seed(1)
    long = functional.reparameterize(mu.repeat(3, 1), s.repeat(3, 1))
    assert torch.equal(several.flatten(0, 1), long)
    (found,) = torch.autograd.grad(several.square().sum(), s, retain_graph=True)
    (expected,) = torch.autograd.grad(long.square().sum(), s)
    torch.testing.assert_close(found, expected)
    torch.manual_seed(1)
    assert torch.equal(functional.latent(mu, s, samples=3, estimator="sample").z, several)
    packed = torch.cat((mu, s), 1)
    torch.manual_seed(1)
    assert torch.equal(functional.latent(packed, None, samples=3, estimator="sample").z, several)


@pytest.mark.large
def test_a_divergence_at_samples_has_the_divergence_for_its_mean() -> None:
    mu, s, prior_mu, prior_s = (torch.randn(2, 5) for _ in range(4))
    kl = functional.latent(mu, s, prior_mu, prior_s, samples=20000, estimator="sample").kl
    exact = functional.kl_normal(mu, s, prior_mu, prior_s, reduction="none")
    standard_error = kl.std(0) / math.sqrt(len(kl))
    assert ((kl.mean(0) - exact).abs() < 5 * standard_error).all()


@pytest.mark.parametrize("rows", [(0, 4), (1, 3), (2, 10), (9, 10)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_share_of_the_rows_has_its_share_of_the_noise(rows: tuple[int, int], layout: str) -> None:
    """What several processes draw, each for its rows, is what one would have drawn for all."""
    mu, s = torch.randn(10, 3, 2, 7), torch.randn(10, 3, 2, 7)
    torch.manual_seed(5)
    whole = functional.latent(mu, s, estimator="sample")
    first, last = rows
    share = [t[first:last].clone() for t in (mu, s)]
    if layout == "channels_last":
        share = [t.contiguous(memory_format=torch.channels_last) for t in share]
    leaf, other = (t.requires_grad_() for t in share)
    torch.manual_seed(5)
    part = functional.latent(leaf, other, estimator="sample", offset=first * 42)
    torch.testing.assert_close(part.z, whole.z[first:last], rtol=0, atol=0)
    torch.testing.assert_close(part.kl, whole.kl[first:last])
    (found,) = torch.autograd.grad(part.z.sum(), other)  # the noise is made again at the same place
    torch.testing.assert_close(found, (part.z - leaf).detach() / 2)
    torch.manual_seed(5)
    assert torch.equal(functional.reparameterize(*share, offset=first * 42), part.z)


@pytest.mark.large
@pytest.mark.parametrize("prior", [(), (1,), (1, 64)], ids=str)
def test_gradients_of_a_prior_do_not_depend_on_the_number_of_threads(prior: tuple[int, ...]) -> None:
    t = [torch.randn(shape).requires_grad_() for shape in ((256, 64), (256, 64), prior, prior)]
    noise, incoming = torch.randn(8, 256, 64), torch.rand(8, 256)

    def gradients(count: int) -> tuple[Tensor, ...]:
        with threads(count):
            _, kl = functional.latent(*t, estimator="sample", samples=8, noise=noise)
            return torch.autograd.grad([kl], t, [incoming])

    for one, several in zip(gradients(1), gradients(4), strict=True):
        assert torch.equal(one, several)


def test_several_samples_have_the_divergence_of_all_that_is_said_of_it() -> None:
    posterior, prior = (torch.randn(3, 4, 5), torch.rand(3, 4, 5)), (torch.randn(5), torch.rand(5))
    forms: dict[str, Any] = {"scale": "std", "eps": 0.1, "prior_scale": "softplus", "prior_clamp": (0.2, None)}
    kl = functional.latent(*posterior, *prior, **forms, prior_eps=0.3, dim=-1, samples=2).kl
    expected = functional.kl_normal(*posterior, *prior, **forms, prior_eps=0.3, reduction="none", dim=-1)
    torch.testing.assert_close(kl, expected)


def test_far_into_the_stream() -> None:
    mu = torch.zeros(3, 5)
    with torch.no_grad():
        torch.manual_seed(2)
        found = functional.reparameterize(mu, mu, offset=2**34 + 3)
        torch.manual_seed(2)
        expected = functional.reparameterize(mu, mu, offset=2**34 + 3, backend="reference")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_generator_for_each_sample() -> None:
    """Each sample is what it would be alone, as diffusers has it."""
    mu, s = leaves((3, 4, 5), (3, 4, 5), dtype=torch.float32)
    generators = [torch.Generator(mu.device).manual_seed(k) for k in (3, 1, 2)]
    z, kl = functional.latent(mu, s, generator=generators)
    for k, seed in enumerate((3, 1, 2)):
        generator = torch.Generator(mu.device).manual_seed(seed)
        alone = functional.latent(mu[k : k + 1], s[k : k + 1], generator=generator)
        torch.testing.assert_close(z[k : k + 1], alone.z)
        torch.testing.assert_close(kl[k : k + 1], alone.kl)
    (found,) = torch.autograd.grad(z.sum(), s)
    torch.testing.assert_close(found, (z - mu).detach() / 2)
    several = functional.reparameterize(mu, s, samples=2, generator=[torch.Generator(mu.device).manual_seed(7)] * 3)
    generator = torch.Generator(mu.device).manual_seed(7)
    for k in range(3):
        alone = functional.reparameterize(mu[k : k + 1], s[k : k + 1], samples=2, generator=generator)
        torch.testing.assert_close(several[:, k : k + 1], alone)
    generators = [torch.Generator(mu.device).manual_seed(k) for k in (3, 1, 2)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(functional.reparameterize(mu, s, generator=generators), z)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clamp", [(-0.5, 0.5), (None, 0.25), (-1.0, None)], ids=str)
def test_bounds_of_dense_latents(target: Target, clamp: tuple[float | None, float | None], dtype: torch.dtype) -> None:
    """The same noise, so all is that of the reference: at the bounds and beyond, infinite and no number, too."""
    special = [math.nan, math.inf, -math.inf, 0.5, -0.5, 0.25, -1.0]
    for shape in ((9, 24), (2, 4, 8, 4)):
        mu, logvar = torch.randn(2, *shape).to(dtype).unbind()
        logvar.view(-1)[: 4 * len(special) : 4] = torch.tensor(special)
        results = []
        for backend in (target.backend, "reference"):
            inputs = [t.clone().requires_grad_() for t in (mu, logvar)]
            torch.manual_seed(3)
            outputs = functional.latent(*inputs, clamp=clamp, backend=backend)
            incoming = [torch.linspace(-1, 2, o.numel()).view(o.shape).to(o.dtype) for o in outputs]
            results.append([*outputs, *torch.autograd.grad(outputs, inputs, incoming)])
        tolerance = 2e-5 if dtype == torch.float32 else 2e-2
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_divergences_of_one_dimension_are_scalars_whatever_computes_them() -> None:
    mu, logvar = torch.randn(2, 4).bfloat16()
    assert functional.kl_standard_normal(mu, logvar, reduction="none").dtype == torch.float32
    for options in ({}, {"samples": 2}, {"samples": 2, "estimator": "sample"}):
        assert functional.latent(mu, logvar, **options).kl.dtype == torch.float32
    assert functional.latent(mu, logvar, dim=()).kl.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"estimator": "mean"}, ValueError, "estimator: expected 'analytic' or 'sample', got 'mean'"),
        ({"samples": 0}, ValueError, "samples: expected at least 1, got 0"),
        ({"samples": 2.0}, TypeError, "samples: expected an integer or None, got float"),
        ({"offset": 1.5}, TypeError, "offset: expected an integer, got float"),
        ({"offset": -1}, ValueError, "offset: expected at least 0, got -1"),
        ({"generator": [torch.Generator()]}, ValueError, "generator: expected one for each of 4 samples, got 1"),
        ({"generator": [1, 2, 3, 4]}, TypeError, "generator: expected a torch.Generator, a list of them or None"),
        (
            {"generator": [torch.Generator(), 2, 3, 4]},
            TypeError,
            "generator: expected a torch.Generator, a list of them or None, got int",
        ),
        ({"generator": [torch.Generator()] * 4, "samples": 2.0}, TypeError, "samples: expected an integer or None"),
        (
            {"generator": [torch.Generator()] * 4, "offset": 8},
            ValueError,
            "offset: expected 0 with generators that each have a stream of their own, got 8",
        ),
        ({"offset": 2**53}, ValueError, "offset: expected less than 2^53, got 9007199254740992"),
        ({"noise": torch.zeros(4, 6), "samples": 2}, ValueError, "noise: expected shape (2, 4, 6), got (4, 6)"),
        (
            {"noise": torch.zeros(4, 6), "offset": 3},
            ValueError,
            "offset: expected 0 when noise is given, which is no part of a stream; got 3",
        ),
        ({"dim": 5}, ValueError, "dim: expected a dimension from -2 to 1, got 5"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    mu = torch.zeros(4, 6)
    with pytest.raises(error) as raised:
        functional.latent(mu, mu, **{"estimator": "sample", **options})
    assert str(raised.value).startswith(message)


# --- importance weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_importance_weighted_bound(dim: int, dtype: torch.dtype) -> None:
    log_weights = (30 * torch.randn(5, 4, 3)).to(dtype).requires_grad_()
    bound = functional.importance_weighted_bound(log_weights, dim)
    wide = log_weights.detach().double()
    weights = wide.softmax(dim)
    torch.testing.assert_close(bound.double(), wide.exp().mean(dim).log(), rtol=1e-5, atol=1e-5)
    (found,) = torch.autograd.grad(bound.sum(), log_weights)
    torch.testing.assert_close(found.double(), weights, rtol=0, atol=max(1e-5, torch.finfo(dtype).eps))
    assert bound.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_importance_weights_of_no_use_and_wrong_dimensions() -> None:
    dead = torch.full((3, 2), -torch.inf)
    assert torch.equal(functional.importance_weighted_bound(dead), torch.full((2,), -torch.inf))
    with pytest.raises(ValueError, match="dim: expected a dimension from -2 to 1, got 2"):
        functional.importance_weighted_bound(dead, 2)
    with pytest.raises(TypeError, match="dim: expected an integer, got str"):
        functional.importance_weighted_bound(dead, "0")  # type: ignore[arg-type]


def test_bounds_rise_with_the_number_of_samples() -> None:
    mu, s, m = torch.randn(64, 3), torch.randn(64, 3), torch.randn(3, 20)
    x = torch.randn(64, 20)
    bounds = []
    for samples in (1, 5, 50):
        z, kl = functional.latent(mu, s, samples=samples, estimator="sample")
        recon_x, data = z @ m, x.expand(samples, 64, 20)
        nll = functional.gaussian_nll(recon_x, data, full=True, reduction="none", dim=-1)
        bounds.append(functional.importance_weighted_bound(-nll - kl).mean().item())
    assert bounds[0] < bounds[1] < bounds[2]
