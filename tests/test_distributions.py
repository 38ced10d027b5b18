"""fusedvae.distributions against the classes that they take the place of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Target
from torch import Tensor
from torch.distributions import Independent, kl_divergence

import fusedvae
from fusedvae.distributions import DiagonalGaussianDistribution, Normal

TorchNormal = torch.distributions.Normal


@pytest.fixture(autouse=True)
def _on_target(request: pytest.FixtureRequest) -> Iterator[None]:
    if "target" not in request.fixturenames:
        yield
        return
    target: Target = request.getfixturevalue("target")
    with fusedvae.use_backend(target.backend):
        yield


# --- the posterior of diffusers ---------------------------------------------------------------------------------------


class Moments:
    """The same distribution in float64, by plain operations."""

    def __init__(self, mean: Tensor, logvar: Tensor, low: float | None = -30.0, high: float | None = 20.0) -> None:
        self.mean, self.logvar = mean.double(), logvar.double().clamp(low, high)
        self.std, self.var = (0.5 * self.logvar).exp(), self.logvar.exp()

    def kl(self, other: Moments | None = None) -> Tensor:
        """Of each element."""
        mean, var, logvar = (0.0, 1.0, 0.0) if other is None else (other.mean, other.var, other.logvar)
        return 0.5 * ((self.mean - mean) ** 2 / var + self.var / var - 1 - self.logvar + logvar)

    def nll(self, sample: Tensor) -> Tensor:
        """Of each element."""
        return 0.5 * (math.log(2 * math.pi) + self.logvar + (sample.double() - self.mean) ** 2 / self.var)


SHAPES = [(2, 6, 5), (3, 4, 7, 5), (2, 6, 3, 5, 4)]


def _agree(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


def _summed_dims(mean: Tensor) -> tuple[int, ...]:
    return (1, 2) if mean.dim() == 3 else (1, 2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_diagonal_gaussian(target: Target, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    parameters, prior = (10 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    p, q = DiagonalGaussianDistribution(parameters), DiagonalGaussianDistribution(prior)
    expected, other = Moments(*parameters.chunk(2, 1)), Moments(*prior.chunk(2, 1))
    sample = torch.randn(expected.mean.shape).to(dtype)
    for name in ("mean", "logvar"):
        assert torch.equal(getattr(p, name).double(), getattr(expected, name))
    assert torch.equal(p.mode(), p.mean)
    assert p.std.dtype == p.var.dtype == dtype
    dims = _summed_dims(expected.mean)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    _agree(p.kl(), expected.kl().sum(dims), kept)
    _agree(p.kl(q), expected.kl(other).sum(dims), kept)
    _agree(p.kl(SimpleNamespace(mean=q.mean, logvar=q.logvar)), expected.kl(other).sum(dims), kept)
    _agree(p.kl(reduction="mean"), expected.kl().mean(dims), kept)
    _agree(p.kl(q, (1,)), expected.kl(other).sum(1), kept)
    _agree(p.kl(dims=-1, reduction="mean"), expected.kl().mean(-1), kept)
    _agree(p.kl(no_sum=True), (2 * expected.kl()).to(dtype), dtype)  # float16 ends at 65504
    _agree(q.nll(sample), other.nll(sample).sum(dims), kept)
    _agree(p.kl(dims=np.int64(-1)), expected.kl().sum(-1), kept)
    _agree(q.nll(sample, dims=[1, 2]), other.nll(sample).sum((1, 2)), kept)
    _agree(q.nll(sample[:1]), other.nll(sample[:1]).sum(dims), kept)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_a_diagonal_gaussian(target: Target, shape: tuple[int, ...]) -> None:
    parameters = (10 * torch.randn(shape)).double().requires_grad_()
    sample = torch.randn(parameters.chunk(2, 1)[0].shape).double().requires_grad_()
    prior = torch.randn(shape).double().requires_grad_()

    def total(p: Any, q: Any, summed: Callable[[Tensor], Tensor]) -> Tensor:
        return summed(p.kl()) + 3 * summed(p.kl(q)) + summed(q.nll(sample))

    found = total(DiagonalGaussianDistribution(parameters), DiagonalGaussianDistribution(prior), Tensor.sum)
    expected = total(Moments(*parameters.chunk(2, 1)), Moments(*prior.chunk(2, 1)), Tensor.sum)
    operands = [parameters, sample, prior]
    for one, other in zip(torch.autograd.grad(found, operands), torch.autograd.grad(expected, operands), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_sample_is_of_the_moments_and_the_generator(target: Target) -> None:
    parameters = (10 * torch.randn(3, 4, 7, 5)).requires_grad_()
    p = DiagonalGaussianDistribution(parameters)
    device = parameters.device

    def seeded(seed: int, device: Any = device) -> torch.Generator:
        return torch.Generator(device).manual_seed(seed)

    z = p.sample(seeded(1))
    noise = fusedvae.functional.reparameterize(torch.zeros_like(z), torch.zeros_like(z), generator=seeded(1))
    expected = Moments(*parameters.chunk(2, 1))
    _agree(z, expected.mean + expected.std * noise)
    (found,) = torch.autograd.grad(z.sum(), parameters)
    (wanted,) = torch.autograd.grad((expected.mean + expected.std * noise).sum(), parameters)
    _agree(found, wanted)
    # One for each of the batch, as in a batch of its own; one alone in a list; one of the CPU.
    each = p.sample([seeded(k) for k in range(3)])
    for k, row in enumerate(each):
        assert torch.equal(row[None], DiagonalGaussianDistribution(parameters[k : k + 1]).sample(seeded(k)))
    assert torch.equal(p.sample([seeded(1)]), z)
    assert torch.equal(p.sample(seeded(1, "cpu")), p.sample(seeded(1, "cpu")))
    torch.manual_seed(5)
    unseeded = p.sample()
    torch.manual_seed(5)
    assert torch.equal(p.sample(), unseeded)
    assert not torch.equal(p.sample(), unseeded)


def test_a_pair_and_halves_along_another_dimension(target: Target) -> None:
    mean, logvar = 10 * torch.randn(2, 3, 5, 4), 10 * torch.randn(2, 3, 5, 4)
    expected, prior = Moments(mean, logvar, -1.0, None), torch.randn(2, 3, 5, 8)
    packed = torch.cat([mean, logvar], -1)
    for p in (
        DiagonalGaussianDistribution((mean, logvar), clamp=(-1.0, None)),
        DiagonalGaussianDistribution([mean, logvar], clamp=(-1.0, None)),
        DiagonalGaussianDistribution(packed, chunk_dim=-1, clamp=(-1.0, None)),
        DiagonalGaussianDistribution(packed.mT.contiguous().mT, chunk_dim=3, clamp=(-1.0, None)),
    ):
        assert torch.equal(p.mean, mean)
        _agree(p.std, expected.std)
        _agree(p.kl(), expected.kl().sum((1, 2, 3)))
        for q in (
            DiagonalGaussianDistribution(prior, chunk_dim=-1),
            DiagonalGaussianDistribution(prior.mT.reshape(2, 3, 8, 5), chunk_dim=-2),
        ):
            moments = Moments(*q.parameters.chunk(2, q._chunk_dim))
            if q.mean.shape == mean.shape:
                _agree(p.kl(q), expected.kl(moments).sum((1, 2, 3)))
    channels = torch.randn(2, 6, 5, 4)
    q = DiagonalGaussianDistribution(channels)
    _agree(
        DiagonalGaussianDistribution(packed, chunk_dim=-1).kl(q),
        Moments(mean, logvar).kl(Moments(*channels.chunk(2, 1))).sum((1, 2, 3)),
    )


def test_a_deterministic_one(target: Target) -> None:
    parameters = torch.randn(3, 4, 2, 2)
    p = DiagonalGaussianDistribution(parameters, deterministic=True)
    assert torch.equal(p.sample(), p.mean)
    assert torch.equal(p.std, torch.zeros_like(p.mean))
    assert torch.equal(p.var, torch.zeros_like(p.mean))
    for value in (p.kl(), p.kl(DiagonalGaussianDistribution(parameters)), p.nll(p.mean)):
        assert torch.equal(value, torch.zeros(1))
    drawn = p.sample()
    before = parameters.clone()
    drawn.add_(1.0)  # is nobody else's
    assert torch.equal(parameters, before)
    assert torch.equal(p.mean, before[:, :2])
    with pytest.raises(ValueError, match="other: expected a distribution that has a density"):
        DiagonalGaussianDistribution(parameters).kl(p)


def test_nothing_is_kept_of_what_is_read(target: Target) -> None:
    parameters = torch.randn(2, 4, 3, 3, requires_grad=True)
    p = DiagonalGaussianDistribution(parameters)
    with torch.no_grad():
        assert not p.logvar.requires_grad
    assert p.logvar.requires_grad


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: DiagonalGaussianDistribution(torch.zeros(2, 3, 4, 4)),
            ValueError,
            "^parameters: packed .* even size along dimension 1",
        ),
        (lambda: DiagonalGaussianDistribution(torch.zeros(4)), ValueError, "^parameters: packed"),
        (lambda: DiagonalGaussianDistribution(torch.zeros(())), ValueError, "^parameters: packed"),
        (
            lambda: DiagonalGaussianDistribution(torch.zeros(2, 4).numpy()),
            TypeError,
            "^parameters: expected a tensor, got ndarray",
        ),
        (lambda: DiagonalGaussianDistribution([1, 2]), TypeError, "mu: expected a tensor, got int"),
        (lambda: DiagonalGaussianDistribution([torch.zeros(2)]), ValueError, r"parameters: .* pair .* got 1"),
        (
            lambda: DiagonalGaussianDistribution((torch.zeros(2, 3), torch.zeros(2, 4))),
            ValueError,
            "logvar: expected the shape of mu",
        ),
        (lambda: DiagonalGaussianDistribution(torch.zeros(2, 4), chunk_dim=0), ValueError, "^chunk_dim: expected"),
        (
            lambda: DiagonalGaussianDistribution(torch.zeros(2, 4, 3, 3)).kl(reduction="batchmean"),
            ValueError,
            "reduction: expected 'sum' or 'mean', got 'batchmean'",
        ),
        (
            lambda: DiagonalGaussianDistribution(torch.zeros(2, 4, 3, 3)).kl(no_sum=True, dims=(1,)),
            ValueError,
            "no_sum",
        ),
        (
            lambda: DiagonalGaussianDistribution(torch.zeros(2, 4, 3, 3)).nll(torch.zeros(2, 4, 3, 3)),
            ValueError,
            r"sample: expected a shape that broadcasts to \(2, 2, 3, 3\)",
        ),
        (
            lambda: DiagonalGaussianDistribution(torch.zeros(2, 4, 3, 3)).kl("other"),
            TypeError,
            "other: expected a distribution with a mean and a logvar, got str",
        ),
        (
            lambda: DiagonalGaussianDistribution(torch.zeros(2, 4)).kl(DiagonalGaussianDistribution(torch.zeros(2, 6))),
            ValueError,
            r"other: expected a distribution of a shape that broadcasts to \(2, 2\), got one of \(2, 3\)",
        ),
        (
            lambda: DiagonalGaussianDistribution(torch.zeros(2, 4)).kl(dims=(9,)),
            ValueError,
            "dims: expected a dimension from -2 to 1, got 9",
        ),
        (
            lambda: DiagonalGaussianDistribution(torch.zeros(2, 4, 3, 3)).sample([torch.Generator()] * 3),
            ValueError,
            "generator: expected one for each of 2 samples, got 3",
        ),
        (
            lambda: DiagonalGaussianDistribution(torch.zeros(2, 4), clamp=(5.0, -5.0)),
            ValueError,
            "clamp: expected low <= high",
        ),
        (
            lambda: DiagonalGaussianDistribution(torch.zeros(2, 4), clamp=5.0),
            TypeError,
            "clamp: expected a pair",
        ),
    ],
    ids=[
        "odd",
        "1-dim",
        "0-dim",
        "array",
        "no tensors",
        "one",
        "shapes",
        "batch",
        "reduction",
        "no_sum",
        "sample",
        "other",
        "another shape",
        "dims",
        "generators",
        "clamp",
        "one bound",
    ],
)
def test_wrong_arguments(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# --- torch's normal distribution --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sample_shape", [(), (3,), (2, 3), (1,), (0,)], ids=str)
@pytest.mark.parametrize("shape", [(4, 5), (7,), ()], ids=str)
def test_samples_of_a_normal(
    target: Target, shape: tuple[int, ...], sample_shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    loc, scale = torch.randn(shape, dtype=dtype).requires_grad_(), torch.rand(shape, dtype=dtype).requires_grad_()
    torch.manual_seed(3)
    z = Normal(loc, scale).rsample(torch.Size(sample_shape))
    assert z.shape == (*sample_shape, *shape)
    assert z.dtype == dtype
    torch.manual_seed(3)
    noise = Normal(torch.zeros_like(loc), torch.ones_like(scale)).sample(torch.Size(sample_shape))
    assert not noise.requires_grad
    assert not Normal(loc, scale).sample(torch.Size(sample_shape)).requires_grad
    expected = loc + scale * noise
    _agree(z, expected, dtype)
    incoming = torch.randn(z.shape, dtype=dtype)
    if z.numel():
        found = torch.autograd.grad(z, [loc, scale], incoming)
        for one, other in zip(found, torch.autograd.grad(expected, [loc, scale], incoming), strict=True):
            _agree(one, other, dtype)


def test_moments_of_no_dimension_have_no_say_in_the_dtype(target: Target) -> None:
    one, many = torch.tensor(1.5, dtype=torch.float64), torch.rand(3) + 0.5
    for p, q in (((one, one), (many, many)), ((many, many), (one, one))):
        found = kl_divergence(Normal(*p), Normal(*q))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, kl_divergence(TorchNormal(*p), TorchNormal(*q)))
    for p, q in (((one, one), (one, one)), ((many.double(), many), (one, one))):
        assert kl_divergence(Normal(*p), Normal(*q)).dtype == torch.float64


def test_a_normal_has_the_moments_that_it_says(target: Target) -> None:
    drawn = Normal(2.0, torch.full((3,), 0.5)).sample((20_000,))
    assert drawn.mean().item() == pytest.approx(2.0, abs=0.01)
    assert drawn.std().item() == pytest.approx(0.5, abs=0.01)


PAIRS = {
    "both": (Normal, Normal),
    "to torch's": (Normal, TorchNormal),
    "from torch's": (TorchNormal, Normal),
}


@pytest.mark.parametrize("kinds", PAIRS.values(), ids=PAIRS.keys())
@pytest.mark.parametrize("shapes", [((4, 5), (4, 5)), ((4, 5), ()), ((5,), (4, 5)), ((), ())], ids=str)
def test_divergence_of_normals(
    target: Target, shapes: tuple[tuple[int, ...], tuple[int, ...]], kinds: tuple[type, type]
) -> None:
    moments = [
        (torch.rand(shape, dtype=torch.float64) + 0.1).requires_grad_() for shape in (shapes[0],) * 2 + (shapes[1],) * 2
    ]

    def divergence(p: type, q: type) -> Tensor:
        return kl_divergence(p(*moments[:2]), q(*moments[2:]))

    found, expected = divergence(*kinds), divergence(TorchNormal, TorchNormal)
    _agree(found, expected, torch.float64)
    incoming = torch.randn(found.shape, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(found, moments, incoming), torch.autograd.grad(expected, moments, incoming), strict=True
    ):
        _agree(one, other, torch.float64)
    p, q = kinds
    if len(found.shape) == 2:
        expanded = [p(*moments[:2]).expand(found.shape), q(*moments[2:]).expand(found.shape)]
        total = kl_divergence(*[Independent(d, 1) for d in expanded])
        _agree(total, expected.sum(-1), torch.float64)


def test_a_normal_is_torchs(target: Target) -> None:
    p = Normal(torch.zeros(2, 3), 2.0)
    q = TorchNormal(torch.zeros(2, 3), 2.0)
    value = torch.randn(2, 3)
    assert isinstance(p, TorchNormal)
    for name in ("log_prob", "cdf", "icdf"):
        given = value.sigmoid() if name == "icdf" else value
        assert torch.equal(getattr(p, name)(given), getattr(q, name)(given))
    assert torch.equal(p.entropy(), q.entropy())
    assert type(p.expand((4, 2, 3))) is Normal
    assert p.expand((4, 2, 3)).rsample((5,)).shape == (5, 4, 2, 3)
    assert repr(p) == repr(q)


def test_a_normal_looks_at_no_values_unless_told() -> None:
    bad = torch.tensor([1.0, -1.0, math.nan])
    p = Normal(bad, bad)
    assert p.log_prob(torch.tensor(math.inf)).shape == (3,)
    # A tensor whose values are not there to be looked at.
    absent = torch.zeros(3, device="meta")
    assert Normal(absent, absent).rsample().shape == (3,)
    assert kl_divergence(Normal(absent, absent), TorchNormal(absent, absent, validate_args=False)).shape == (3,)
    with pytest.raises(ValueError, match="loc"):
        Normal(bad, bad.abs(), validate_args=True)


@pytest.mark.gpu
def test_numbers_on_the_cpu_beside_a_gpus() -> None:
    p = Normal(torch.randn(3, 4, device="cuda"), torch.rand(3, 4, device="cuda"))
    q = TorchNormal(0.5, 2.0)
    on_gpu = TorchNormal(torch.tensor(0.5, device="cuda"), torch.tensor(2.0, device="cuda"))
    torch.testing.assert_close(kl_divergence(p, q), kl_divergence(p, on_gpu))
    with torch.cuda.device(p.loc.device):
        torch.cuda.set_sync_debug_mode("error")
        try:
            kl_divergence(Normal(p.loc, p.scale), on_gpu)
            Normal(p.loc, p.scale).rsample()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# --- torch's loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"full": True, "reduction": "sum"}, {"eps": 0.5, "reduction": "none"}], ids=str
)
def test_gaussian_nll_loss_module(target: Target, options: dict[str, Any]) -> None:
    mean, x = torch.randn(4, 5), torch.randn(4, 5)
    var = torch.rand(4, 5)
    for variance in (var, var[:, :1], 0.3):
        if isinstance(variance, float) and torch.__version__ < "2.7":
            continue
        operands = [mean.clone().requires_grad_(), x.clone().requires_grad_()]
        found = fusedvae.GaussianNLLLoss(**options)(*operands, variance)
        expected = torch.nn.GaussianNLLLoss(**options)(*operands, variance)
        torch.testing.assert_close(found, expected)
        for one, other in zip(
            torch.autograd.grad(found.sum(), operands), torch.autograd.grad(expected.sum(), operands), strict=True
        ):
            torch.testing.assert_close(one, other)


def test_gaussian_nll_loss_without_its_check() -> None:
    mean, x, var = torch.randn(4, 5), torch.randn(4, 5), torch.full((4, 5), -1.0)
    for look in (fusedvae.GaussianNLLLoss(), fusedvae.functional.gaussian_nll_loss):
        with pytest.raises(ValueError, match="var: has negative entries"):
            look(mean, x, var)
    found = fusedvae.GaussianNLLLoss(check=False, eps=0.5)(mean, x, var)
    torch.testing.assert_close(found, torch.nn.functional.gaussian_nll_loss(mean, x, torch.full((4, 5), 0.5)))
    assert isinstance(fusedvae.GaussianNLLLoss(), torch.nn.GaussianNLLLoss)
    with pytest.raises(ValueError, match="reduction"):
        fusedvae.GaussianNLLLoss(reduction="batchmean")
