"""Reductions and their dimensions, weights, and what gradients are scaled by, against torch's own operations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import TARGETS, Target
from test_forms import agree
from torch import Tensor
from torch.nn import functional as torch_functional

import fusedvae
from fusedvae import functional

pytestmark = pytest.mark.parametrize("target", TARGETS, indirect=True)

DIMS: list[Any] = [None, (), 0, 1, -1, (0, 1), (1, 2), [0, -1], (0, 1, 2, 3), (0, 2, 3), (2,), (-1, -2, -3)]
WEIGHTS = {
    "each": (4, 3, 5, 7),
    "channel": (3, 1, 1),
    "pixel": (1, 1, 5, 7),
    "sample": (4, 1, 1, 1),
    "step": (4, 3, 1, 1),
    "number": (),
}
TOTALS = ("batchmean", "sum", "mean", "weighted_mean")


@pytest.fixture(autouse=True)
def _chosen(target: Target) -> Iterator[None]:
    """What a test calls runs on the target's backend."""
    with fusedvae.use_backend(target.backend):
        yield


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def gaussian(m: Tensor, x: Tensor, l: Tensor) -> Tensor:  # noqa: E741 - as in the formula
    return 0.5 * (l + (m - x) ** 2 * (-l).exp())


def kl(mu: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    return 0.5 * (mu**2 + l.exp() - 1 - l)


def summed(elements: Tensor, dim: Any) -> Tensor:
    if dim is None:
        dim = tuple(range(1, elements.dim()))
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    return elements.sum(dims) if dims else elements


def total(elements: Tensor, reduction: str, weight: Tensor | None = None) -> Tensor:
    """A reduction of elements that are weighted by hand."""
    weight = torch.ones((), dtype=torch.float64) if weight is None else weight.double()
    value = (elements * weight).sum()
    if reduction == "weighted_mean":
        return value / weight.expand(elements.shape).sum()
    return value / {"batchmean": len(elements), "sum": 1, "mean": elements.numel()}[reduction]


@pytest.mark.parametrize("dim", DIMS, ids=str)
@pytest.mark.parametrize("is_last", [False, True], ids=["contiguous", "channels_last"])
def test_sums_over_any_dimensions(dim: Any, is_last: bool) -> None:
    m, x, l = leaves((4, 3, 5, 7), (4, 3, 5, 7), (3, 1, 1))  # noqa: E741
    mu, s, prior_mu, prior_s = leaves((4, 3, 5, 7), (4, 3, 5, 7), (3, 1, 1), ())
    if is_last:
        m, x, mu, s = (t.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for t in (m, x, mu, s))
    found = functional.gaussian_nll(m, x, l, reduction="none", dim=dim)
    agree(found, summed(gaussian(m, x, l), dim), [m, x, l])
    found = functional.kl_standard_normal(mu, s, reduction="none", dim=dim)
    agree(found, summed(kl(mu, s), dim), [mu, s])
    elements = 0.5 * (prior_s - s + (s.exp() + (mu - prior_mu) ** 2) * (-prior_s).exp() - 1)
    found = functional.kl_normal(mu, s, prior_mu, prior_s, reduction="none", dim=dim)
    agree(found, summed(elements, dim), [mu, s, prior_mu, prior_s])
    found = functional.laplace_nll(m, x, l, reduction="none", dim=dim)
    agree(found, summed((m - x).abs() * (-l).exp() + l, dim), [m, x, l])
    noise = torch.randn(4, 3, 5, 7, dtype=torch.float64)
    for estimator in ("analytic", "sample"):
        found = functional.latent(mu, s, prior_mu, prior_s, dim=dim, noise=noise, estimator=estimator).kl
        if estimator == "sample":
            elements = 0.5 * (prior_s - s - noise**2 + (z_of(mu, s, noise) - prior_mu) ** 2 * (-prior_s).exp())
        agree(found, summed(elements, dim), [mu, s, prior_mu, prior_s])


def z_of(mu: Tensor, s: Tensor, noise: Tensor) -> Tensor:
    return mu + (s / 2).exp() * noise


@pytest.mark.large  # that is, of more samples than a tile holds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [*range(1, 10), 17])
def test_values_of_short_samples(length: int, dtype: torch.dtype) -> None:
    samples = 2053
    mean, x, logvar = (torch.randn(samples, length).to(dtype).requires_grad_() for _ in range(3))
    mask = torch.rand(samples, length) < 0.8
    incoming = torch.randn(samples, dtype=torch.float64)
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, 1e-2)
    for weight in (None, mask):
        given = [t.detach().double().requires_grad_() for t in (mean, logvar)]
        elements = gaussian(given[0], x.detach().double(), given[1])
        expected = (elements if weight is None else elements * weight).sum(1)
        found = functional.gaussian_nll(mean, x.detach(), logvar, reduction="none", weight=weight)
        assert isinstance(found, Tensor)
        with torch.no_grad():  # values alone, and of a view whose samples are not side by side
            transposed = functional.gaussian_nll(
                mean.t().contiguous().t(), x, logvar.t().contiguous().t(), reduction="none", weight=weight
            )
        single = min(tolerance, 2e-6)  # values are float32, of whatever operands
        torch.testing.assert_close(found.double(), expected, rtol=single, atol=single)
        torch.testing.assert_close(transposed.double(), expected, rtol=single, atol=single)  # type: ignore[union-attr]
        made = torch.autograd.grad((found * incoming).sum(), (mean, logvar))
        for g, e in zip(made, torch.autograd.grad((expected * incoming).sum(), given), strict=True):
            torch.testing.assert_close(g.double(), e, rtol=tolerance, atol=tolerance)


def test_one_value_for_each_step_and_for_each_element_with_packed_tensors() -> None:
    (packed,) = leaves((4, 6, 10))
    mu, s = packed.chunk(2, -1)
    for dim in (-1, (), 0, 1):
        found = functional.kl_standard_normal(packed, None, packed_dim=-1, reduction="none", dim=dim)
        agree(found, summed(kl(mu, s), dim), [packed])


@pytest.mark.parametrize("reduction", TOTALS)
@pytest.mark.parametrize("pattern", WEIGHTS)
@pytest.mark.parametrize("kind", ["float", "bool", "integer"])
def test_weights(pattern: str, reduction: str, kind: str) -> None:
    m, x, l = leaves((4, 3, 5, 7), (4, 3, 5, 7), (3, 1, 1))  # noqa: E741
    mu, s = leaves((4, 3, 5, 7), (4, 3, 5, 7))
    weight = torch.rand(WEIGHTS[pattern], dtype=torch.float64) - 0.3
    weight = weight.clamp(min=0) if kind == "float" else (weight > 0 if kind == "bool" else (weight * 9).long().abs())
    if weight.sum() == 0:
        weight = torch.ones_like(weight)
    options = {"weight": weight, "reduction": reduction}
    agree(functional.gaussian_nll(m, x, l, **options), total(gaussian(m, x, l), reduction, weight), [m, x, l])
    agree(functional.kl_standard_normal(mu, s, **options), total(kl(mu, s), reduction, weight), [mu, s])
    probability = x.detach().sigmoid()
    cross_entropy = torch_functional.binary_cross_entropy_with_logits(m, probability, reduction="none")
    found = functional.bernoulli_nll(m, probability, **options)
    agree(found, total(cross_entropy, reduction, weight), [m])
    for dim in (None, (), -1, 0):
        found = functional.gaussian_nll(m, x, l, weight=weight, reduction="none", dim=dim, full=True)
        elements = (gaussian(m, x, l) + 0.5 * math.log(2 * math.pi)) * weight.double()
        agree(found, summed(elements, dim), [m, x, l])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_weight_in_float64_has_the_work_done_in_it(target: Target, reduction: str) -> None:
    """As in PyTorch's arithmetic, whose results have that dtype."""
    m, x, logvar = torch.randn(4, 6), torch.randn(4, 6), torch.randn(6)
    weight = torch.rand(6, dtype=torch.float64)
    for learned in (m, logvar):
        learned.requires_grad_()
    found = functional.gaussian_nll(m, x, logvar, weight=weight, reduction=reduction)
    assert found.dtype == torch.float64
    exact = (gaussian(m.double(), x.double(), logvar.double()) * weight).sum(1)
    exact = exact.sum() if reduction == "sum" else exact
    torch.testing.assert_close(found, exact, rtol=1e-13, atol=1e-13)
    for gradient, right in zip(*(torch.autograd.grad(v.sum(), [m, logvar]) for v in (found, exact)), strict=True):
        torch.testing.assert_close(gradient, right, rtol=2e-7, atol=2e-7)
    # A weight that float32 would round to nothing.
    huge = torch.full((4, 6), 1e30)
    tiny = functional.gaussian_nll(huge, torch.zeros(4, 6), weight=weight.new_full((6,), 1e-60), reduction="sum")
    torch.testing.assert_close(tiny.item(), 12.0)
    with fusedvae.use_backend("auto"):
        value = functional.elbo_loss(m, x, x[:, :2], x[:, 2:4], weight=weight.float())
    assert isinstance(value, Tensor)
    assert value.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spoilt", [math.nan, math.inf, -math.inf])
def test_what_has_no_weight_has_no_say(spoilt: float, dtype: torch.dtype) -> None:
    """Whatever it is: values and gradients are exactly 0 there, and all else is as if it had been anything else."""
    mask = torch.rand(6, 50) > 0.4

    def run(hidden: float, reduction: Any) -> list[Tensor]:
        torch.manual_seed(3)
        operands = [torch.randn(6, 50).to(dtype).masked_fill(~mask, hidden).requires_grad_() for _ in range(5)]
        m, x, l, mu, s = operands  # noqa: E741
        loss = functional.elbo_loss(m, x, mu, s, l, weight=mask, latent_weight=mask.float(), reduction=reduction)
        each = functional.laplace_nll(m, x, l, extra=s, weight=mask, reduction="none", dim=())
        assert isinstance(loss, Tensor)
        found = [loss, each, *torch.autograd.grad(loss.sum() + each.sum(), operands)]
        assert torch.equal(each[~mask], torch.zeros_like(each[~mask]))
        assert all(torch.equal(g[~mask], torch.zeros_like(g[~mask])) for g in found[2:])
        return found

    for reduction in ("batchmean", "none", ("weighted_mean", "sum")):
        for found, expected in zip(run(spoilt, reduction), run(0.5, reduction), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [None, ()])
def test_a_gradient_of_zero_hides_nothing_but_what_has_no_weight(dim: Any, dtype: torch.dtype) -> None:
    mean, x, logvar = (torch.randn(3, 40, dtype=dtype) for _ in range(3))
    mean[1, ::5] = math.nan
    weight = torch.ones(3, 40, dtype=dtype)
    weight[1, ::10] = 0
    mean.requires_grad_()
    values = functional.gaussian_nll(mean, x, logvar, reduction="none", dim=dim, weight=weight)
    assert isinstance(values, Tensor)
    incoming = torch.zeros_like(values)
    incoming[0] = 1
    (found,) = torch.autograd.grad(values, mean, incoming)
    spoilt = mean.isnan() & (weight != 0)
    assert torch.equal(found.isnan(), spoilt)
    assert not found[1:][~spoilt[1:]].any()


@pytest.mark.parametrize("second", TOTALS)
@pytest.mark.parametrize("first", TOTALS)
def test_a_reduction_of_each_term(first: str, second: str) -> None:
    m, x, l, mu, s = leaves((4, 3, 5), (4, 3, 5), (5,), (4, 6), (4, 6))  # noqa: E741
    weight, latent_weight = torch.rand(4, 1, 5, dtype=torch.float64), torch.rand(4, 1, dtype=torch.float64)
    weights = {"weight": weight, "latent_weight": latent_weight}
    found = functional.elbo_loss(m, x, mu, s, l, **weights, reduction=(first, second), beta=0.3, return_terms=True)
    nll, divergence = total(gaussian(m, x, l), first, weight), total(kl(mu, s), second, latent_weight)
    for f, e in zip(found, (nll + 0.3 * divergence, nll, divergence), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)
    agree(found[0], nll + 0.3 * divergence, [m, x, l, mu, s])
    found = functional.elbo_loss(m, x, mu, s, l, reduction=[first, second])
    assert isinstance(found, Tensor)
    agree(found, total(gaussian(m, x, l), first) + total(kl(mu, s), second), [m, x, l, mu, s])
    given = functional.latent(mu, s).kl
    found = functional.elbo_loss(m, x, None, None, l, kl=given, reduction=(first, "batchmean"))
    assert isinstance(found, Tensor)
    agree(found, total(gaussian(m, x, l), first) + kl(mu, s).sum() / 4, [m, x, l])


@pytest.mark.parametrize("second", TOTALS)
@pytest.mark.parametrize("first", TOTALS)
def test_each_term_of_a_pair_may_be_of_a_batch_of_its_own(first: str, second: str) -> None:
    frames, x, l, mu, s = leaves((12, 3, 5), (12, 3, 5), (5,), (4, 6, 3), (4, 6, 3))  # noqa: E741
    weights = {"weight": torch.rand(12, 1, 5).double(), "latent_weight": torch.rand(4, 1, 1).double()}
    found = functional.elbo_loss(frames, x, mu, s, l, **weights, reduction=(first, second), beta=0.3)
    expected = total(gaussian(frames, x, l), first, weights["weight"])
    expected = expected + 0.3 * total(kl(mu, s), second, weights["latent_weight"])
    assert isinstance(found, Tensor)
    agree(found, expected, [frames, x, l, mu, s])
    loss = fusedvae.ELBOLoss(reduction=(first, "batchmean"))(frames, x, None, None, l, kl=functional.latent(mu, s).kl)
    agree(loss, total(gaussian(frames, x, l), first) + kl(mu, s).sum() / 4, [frames, x, l, mu, s])
    hidden, matrix = leaves((12, 3, 2), (5, 2))
    loss = functional.linear_elbo(hidden, matrix, None, x, mu, s, l, reduction=(first, second))
    assert isinstance(loss, Tensor)
    second = "mean" if second == "weighted_mean" else second
    expected = total(gaussian(hidden @ matrix.T, x, l), first) + total(kl(mu, s), second)
    agree(loss, expected, [hidden, matrix, x, l, mu, s])


def test_other_reductions_are_of_one_batch() -> None:
    frames, mu, logvar = torch.zeros(12, 5), torch.zeros(4, 6), torch.zeros(4, 6)
    for reduction in ("batchmean", "sum", "none", ("none", "none")):
        for given in ({"mu": mu, "logvar": logvar}, {"mu": None, "kl": mu[:, 0]}):
            with pytest.raises(ValueError, match="expected the batch size of x, 12, got 4; a pair of reductions"):
                functional.elbo_loss(frames, frames, **given, reduction=reduction)  # type: ignore[call-overload]
            layer = torch.zeros(5, 5), None
            with pytest.raises(ValueError, match="expected the batch size of x, 12, got 4; a pair of reductions"):
                functional.linear_elbo(frames, *layer, frames, **given, reduction=reduction)  # type: ignore[call-overload]


def test_a_weight_that_is_learned_has_its_gradient() -> None:
    m, x, weight, mu, s = leaves((4, 5), (4, 5), (5,), (4, 2), (4, 2))
    for reduction in ("batchmean", "weighted_mean"):
        found = functional.elbo_loss(m, x, mu, s, weight=weight, reduction=(reduction, "sum"))
        assert isinstance(found, Tensor)
        expected = total(gaussian(m, x, torch.zeros(()).double()), reduction, weight) + kl(mu, s).sum()
        agree(found, expected, [m, x, weight, mu, s])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "none", ("mean", "sum")], ids=str)
@pytest.mark.parametrize("is_tensor", [False, True])
def test_gradients_are_made_scaled(dtype: torch.dtype, reduction: Any, is_tensor: bool) -> None:
    operands = [t.detach().to(dtype).requires_grad_() for t in leaves((4, 30), (4, 30), (30,), (4, 6), (4, 6))]
    m, x, l, mu, s = operands  # noqa: E741
    beta = torch.tensor(0.5, requires_grad=True)

    def run(scale: float | Tensor | None) -> list[Tensor]:
        loss = functional.elbo_loss(m, x, mu, s, l, beta=beta, reduction=reduction, grad_scale=scale)
        assert isinstance(loss, Tensor)
        return [loss, *torch.autograd.grad(loss.sum(), [*operands, beta])]

    loss, *gradients = run(torch.tensor(8.0) if is_tensor else 8.0)
    plain, *unscaled = run(None)
    # Where gradients are not made with the value, that may be summed in another order.
    torch.testing.assert_close(loss, plain, rtol=1e-6 if dtype != torch.float64 else 1e-14, atol=0)
    tolerance = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    for g, u in zip(gradients, unscaled, strict=True):
        assert g.dtype == u.dtype
        torch.testing.assert_close(g, 8 * u, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_are_made_scaled_where_the_loss_is_infinite(create_graph: bool) -> None:
    m, x, mu, s = operands = leaves((4, 5), (4, 5), (4, 2), (4, 2))
    with torch.no_grad():
        x[0, 0] = math.inf
    loss = functional.elbo_loss(m, x, mu, s, likelihood="mse", reduction="sum", grad_scale=8.0)
    assert isinstance(loss, Tensor)
    assert loss == math.inf
    of_m, _, of_mu, of_s = torch.autograd.grad(loss, operands, create_graph=create_graph)
    torch.testing.assert_close(of_m, 16 * (m - x))
    torch.testing.assert_close(of_mu, 8 * mu)
    torch.testing.assert_close(of_s, 4 * torch.expm1(s))


def test_an_infinite_loss_times_zero_stays(target: Target) -> None:
    recon_x = torch.tensor([[3e38, 1.0]]).requires_grad_()
    for factor in (0.0, torch.tensor(0.0)):
        loss = functional.elbo_loss(recon_x, -recon_x.detach(), *torch.zeros(2, 1, 1), grad_scale=factor)
        assert isinstance(loss, Tensor)
        (gradient,) = torch.autograd.grad(loss, recon_x)
        assert loss.item() == math.inf
        assert gradient[0, 1] == 0


@pytest.mark.parametrize("balance", [0.0, 0.2, 0.8, 1.0])
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_balanced_gradients(balance: float, reduction: str) -> None:
    """KL balancing as Dreamer has it: two divergences, each with one side detached."""
    mu, s, prior_mu, prior_s = operands = leaves((4, 6), (4, 6), (4, 6), (6,))
    found = functional.kl_normal(*operands, balance=balance, reduction=reduction)

    def divergence(mu: Tensor, s: Tensor, prior_mu: Tensor, prior_s: Tensor) -> Tensor:
        elements = 0.5 * (prior_s - s + (s.exp() + (mu - prior_mu) ** 2) * (-prior_s).exp() - 1)
        return elements.sum(1) if reduction == "none" else elements.sum() / 4

    to_q = divergence(mu, s, prior_mu.detach(), prior_s.detach())
    to_p = divergence(mu.detach(), s.detach(), prior_mu, prior_s)
    agree(found, (1 - balance) * to_q + balance * to_p, operands)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_of_half_precision_are_single(dtype: torch.dtype) -> None:
    """85,897 is beyond float16, and no KL of a large latent."""
    mu, s = torch.full((2, 4096), 8.0, dtype=dtype), torch.full((2, 4096), 2.0, dtype=dtype)
    exact = 4096 * 0.5 * (64 + math.exp(2) - 3)
    values = [
        functional.kl_standard_normal(mu, s),
        functional.kl_standard_normal(mu, s, reduction="none")[0],
        functional.latent(mu, s).kl[1],
        functional.kl_normal(mu, s, 0.0, 0.0, reduction="none", dim=-1)[1],
        functional.elbo_loss(mu, mu, mu, s),
    ]
    for value in values:
        assert isinstance(value, Tensor)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact, rel=1e-4)
    assert functional.kl_standard_normal(mu, s, reduction="none", dim=()).dtype == dtype
    assert functional.latent(mu, s).z.dtype == dtype


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim: expected None with reduction='batchmean'; it is for 'none'"),
        ({"reduction": "none", "dim": 2}, ValueError, "dim: expected a dimension from -2 to 1, got 2"),
        ({"reduction": "none", "dim": (0, -2)}, ValueError, "dim: expected each dimension once, got (0, -2)"),
        ({"reduction": "none", "dim": "1"}, TypeError, "dim: expected an integer or a sequence of them, got str"),
        ({"reduction": "none", "dim": (True,)}, TypeError, "dim: expected an integer or a sequence of them, got"),
        ({"weight": 2.0}, TypeError, "weight: expected a tensor or None, got float"),
        ({"weight": torch.zeros(5)}, ValueError, "weight: expected a shape that broadcasts to (4, 6), got (5,)"),
        ({"weight": torch.zeros(6, device="meta")}, ValueError, "weight: expected on cpu, where"),
        ({"weight": torch.zeros(6, dtype=torch.complex64)}, TypeError, "weight: expected a float or integer tensor"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    operand = torch.zeros(4, 6, device="cpu")
    for call in (functional.kl_standard_normal, functional.gaussian_nll, functional.kl_normal):
        with pytest.raises(error) as raised:
            call(operand, operand, **options)
        assert str(raised.value).startswith(message)


def test_wrong_pairs_and_numbers() -> None:
    t = torch.zeros(4, 6)
    with pytest.raises(ValueError, match="reduction: expected 'none' for both or for neither"):
        functional.elbo_loss(t, t, t, t, reduction=("none", "sum"))
    with pytest.raises(TypeError, match=r"weight: .* got float; as a tensor it is torch.tensor\(0.5, device=x.device"):
        functional.elbo_loss(t, t, t, t, weight=0.5)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"logvar: expected the shape of mu .*; logvar.expand_as\(mu\) is"):
        functional.elbo_loss(t, t, t, t[:, :1])
    with pytest.raises(ValueError, match="latent_weight: expected None when kl is given"):
        functional.elbo_loss(t, t, None, None, kl=t[:, 0], latent_weight=t)
    with pytest.raises(TypeError, match="grad_scale: expected a number or a 0-dim tensor, got str"):
        functional.elbo_loss(t, t, t, t, grad_scale="2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grad_scale: expected a number or a 0-dim float tensor"):
        functional.elbo_loss(t, t, t, t, grad_scale=t)
    with pytest.raises(TypeError, match="balance: expected a number or None, got str"):
        functional.kl_normal(t, t, t, t, balance="0.8")  # type: ignore[arg-type]
    for balance in (80, -0.1, float("nan")):
        with pytest.raises(ValueError, match=f"balance: expected a number from 0 to 1, got {balance}"):
            functional.kl_normal(t, t, t, t, balance=balance)
    with pytest.raises(ValueError, match="recon_logvar: expected none, as the mse likelihood has no scale"):
        functional.elbo_loss(t, t, t, t, t, likelihood="mse")
    with pytest.raises(ValueError, match="recon_scale: expected none, as the l1 likelihood has no scale"):
        functional.elbo_loss(t, t, t, t, likelihood="l1", recon_scale="std")
    with pytest.raises(ValueError, match="pos_weight: expected None with probabilities"):
        functional.bernoulli_nll(t, t, from_logits=False, pos_weight=2.0)
