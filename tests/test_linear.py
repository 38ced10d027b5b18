"""A linear layer and the bound together: the numbers of the two apart, in a part of their memory."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import KERNEL_TARGETS, TARGETS, Target
from torch import Tensor, nn
from torch.nn.functional import linear

import fusedvae
from fusedvae import functional
from fusedvae.backend.reference import LIKELIHOODS
from fusedvae.cli.bench.measuring import profiled

every_target = pytest.mark.parametrize("target", TARGETS, indirect=True)
kernel_target = pytest.mark.parametrize("target", KERNEL_TARGETS, indirect=True)
COLUMNS, FEATURES = 37, 7


@pytest.fixture(autouse=True)
def _chosen(target: Target) -> Iterator[None]:
    """What a test calls runs on the target's backend."""
    with fusedvae.use_backend(target.backend):
        yield


class Operands:
    """Those of a call, in float64; what comes out of the layer is between 0 and 1, as every likelihood can take it."""

    def __init__(self, likelihood: str, lead: tuple[int, ...] = (5,), *, is_packed: bool = False) -> None:
        options = {"dtype": torch.float64}
        rows = (2 if is_packed else 1) * COLUMNS
        self.hidden = torch.rand(*lead, FEATURES, **options)
        self.weight = torch.rand(rows, FEATURES, **options) * 0.13 + 0.01
        self.bias = torch.rand(rows, **options) * 0.05
        self.x = (torch.rand(*lead, COLUMNS, **options) * 2).floor()
        self.mu, self.logvar = torch.randn(lead[0], 3, **options), torch.randn(lead[0], 3, **options)
        self.recon_logvar: Tensor | float | None = None if is_packed else 0.0
        self.others: dict[str, Any] = {"likelihood": likelihood, "beta": 0.3}
        inputs = LIKELIHOODS[likelihood].inputs
        for name, shape in (("extra", (COLUMNS,)), ("pos_weight", (COLUMNS,)), ("zi_logits", (*lead, 1))):
            if name in inputs:
                self.others[name] = torch.rand(shape, **options)
        if LIKELIHOODS[likelihood].pairs and not is_packed:
            self.recon_logvar = torch.rand(1, **options) + 0.1

    def leaves(self) -> list[Tensor]:
        candidates = [*vars(self).values(), *self.others.values()]
        return [t.requires_grad_() for t in candidates if isinstance(t, Tensor) and t is not self.x]

    def fused(self, **options: Any) -> Any:
        layer = self.hidden, self.weight, self.bias
        return functional.linear_elbo(
            *layer, self.x, self.mu, self.logvar, self.recon_logvar, **{**self.others, **options}
        )

    def apart(self, **options: Any) -> Any:
        mean, scale = linear(self.hidden, self.weight, self.bias), self.recon_logvar
        if scale is None:
            mean, scale = mean.chunk(2, -1)
        return functional.elbo_loss(mean, self.x, self.mu, self.logvar, scale, **{**self.others, **options})


def assert_same(operands: Operands, options: dict[str, Any], block: int | None, rtol: float = 1e-10) -> None:
    """Values, and the gradients of everything for some incoming ones."""
    leaves = operands.leaves()
    found, expected = operands.fused(block=block, **options), operands.apart(**options)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-12)
    incoming = torch.rand_like(expected)
    gradients = [torch.autograd.grad((value * incoming).sum(), leaves) for value in (found, expected)]
    for g, e in zip(*gradients, strict=True):
        torch.testing.assert_close(g, e, rtol=rtol, atol=1e-12)


# --- the same numbers -------------------------------------------------------------------------------------------------


@every_target
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood(name: str, reduction: str) -> None:
    for is_packed in (False, True) if LIKELIHOODS[name].pairs else (False,):
        for full in (False, True):
            assert_same(Operands(name, is_packed=is_packed), {"reduction": reduction, "full": full}, 16)


@kernel_target
@pytest.mark.parametrize("block", [1, 5, 36, 37, None])
@pytest.mark.parametrize("reduction", ["sum", "mean", "weighted_mean", "none", ("mean", "batchmean")], ids=str)
def test_every_reduction_and_weights(reduction: Any, block: int | None) -> None:
    for lead in ((5,), (3, 4), (1, 1)):
        for shape in ((*lead, COLUMNS), (COLUMNS,), (*lead, 1)):
            weight = (torch.rand(shape, dtype=torch.float64) > 0.4) * torch.rand(shape, dtype=torch.float64) + 1e-9
            options = {"reduction": reduction, "weight": weight, "grad_scale": torch.tensor(8.0)}
            assert_same(Operands("laplace", lead, is_packed=len(shape) == 1), options, block)


@kernel_target
@pytest.mark.parametrize("shape", [(), (1,), (COLUMNS,), (5, 1), (1, COLUMNS), (5, COLUMNS)], ids=str)
def test_a_scale_of_any_shape(shape: tuple[int, ...]) -> None:
    for reduction in ("batchmean", "none"):
        operands = Operands("gaussian")
        operands.recon_logvar = torch.rand(shape, dtype=torch.float64)
        assert_same(operands, {"reduction": reduction, "recon_scale": "softplus", "recon_eps": 0.1}, 10)


@kernel_target
def test_priors_and_given_divergences() -> None:
    operands = Operands("mse")
    prior = {"prior_mu": 0.3, "prior_logvar": torch.rand(3, dtype=torch.float64), "scale": "softplus", "eps": 0.1}
    assert_same(operands, {**prior, "latent_weight": torch.rand(3, dtype=torch.float64)}, 10)
    kl = functional.kl_standard_normal(operands.mu, operands.logvar, reduction="none")
    operands.mu = operands.logvar = None  # type: ignore[assignment]
    for reduction in ("batchmean", "sum", "mean", "none"):
        assert_same(operands, {"kl": kl.detach(), "reduction": reduction}, 10)
    with pytest.raises(ValueError, match="kl: expected on"):
        operands.fused(kl=kl.to("meta"))


@kernel_target
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_divergence_in_half_precision_is_added_up_in_float32(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(6, 4).to(dtype), torch.randn(9, 4).to(dtype)
    x, kl = torch.zeros(6, 9), (torch.rand(6) * 1e4 + 5e4).to(dtype).requires_grad_()
    for reduction in ("sum", "mean", "none"):
        terms = functional.linear_elbo(
            hidden, weight, None, x, None, kl=kl, block=4, reduction=reduction, return_terms=True
        )
        assert terms.kl.dtype == torch.float32
        expected = kl.double() if reduction == "none" else getattr(kl.double(), reduction)()
        torch.testing.assert_close(terms.kl.double(), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(terms.loss, terms.nll + terms.kl)
        (gradient,) = torch.autograd.grad(terms.loss.sum(), kl)
        assert gradient.dtype == dtype
        torch.testing.assert_close(
            gradient.float(), torch.full((6,), 1 / 6 if reduction == "mean" else 1.0).to(dtype).float()
        )


@kernel_target
def test_terms_and_a_learned_beta() -> None:
    operands, beta = Operands("gaussian"), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    leaves = [*operands.leaves(), beta]
    for k, grad_scale in itertools.product(range(3), (None, 8.0)):
        gradients = []
        for run in (operands.fused, operands.apart):
            terms = run(beta=beta, return_terms=True, grad_scale=grad_scale)
            assert isinstance(terms, functional.ELBOTerms)
            gradients.append([*terms, *torch.autograd.grad(terms[k], leaves, allow_unused=True)])
        for found, expected in zip(*gradients, strict=True):
            assert (found is None) == (expected is None)
            if found is not None:
                torch.testing.assert_close(found, expected)


@kernel_target
@pytest.mark.parametrize("wanting", range(16))
def test_any_subset_of_gradients(wanting: int) -> None:
    for reduction in ("sum", "none"):
        operands = Operands("gaussian")
        wanted = [operands.hidden, operands.weight, operands.bias, operands.recon_logvar]
        leaves = [t.requires_grad_() for k, t in enumerate(wanted) if wanting >> k & 1]  # type: ignore[union-attr]
        found, expected = operands.fused(reduction=reduction, block=16), operands.apart(reduction=reduction)
        torch.testing.assert_close(found, expected)
        assert found.requires_grad == bool(leaves)
        if leaves:
            gradients = [torch.autograd.grad(value.sum(), leaves) for value in (found, expected)]
            torch.testing.assert_close(*gradients)


@kernel_target
@pytest.mark.parametrize("x_dtype", [torch.uint8, torch.int64, torch.bool, torch.float64], ids=str)
def test_data_of_any_dtype_without_a_bias(x_dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    x, mu = torch.randint(0, 2, (6, 9)).to(x_dtype), torch.zeros(6, 2)
    found = functional.linear_elbo(hidden, weight, None, x, mu, mu, likelihood="bernoulli", block=4)
    expected = functional.elbo_loss(linear(hidden, weight), x, mu, mu, likelihood="bernoulli")
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(value, [hidden, weight]) for value in (found, expected)]
    torch.testing.assert_close(*gradients)


@kernel_target
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_autocast", [False, True])
def test_half_precision(dtype: torch.dtype, is_autocast: bool, target: Target) -> None:
    kind = torch.float32 if is_autocast else dtype
    hidden, weight, bias = ((torch.randn(s) * 0.3).to(kind).requires_grad_() for s in ((32, 16), (90, 16), (90,)))
    x, mu = torch.rand(32, 45), torch.zeros(32, 2)
    with torch.autocast(target.device, dtype) if is_autocast else contextlib.nullcontext():
        found = functional.linear_elbo(hidden, weight, bias, x, mu, mu, None, block=16)
    assert found.dtype == torch.float32
    mean, logvar = linear(hidden.double(), weight.double(), bias.double()).chunk(2, 1)
    expected = functional.elbo_loss(mean, x.double(), mu, mu, logvar)
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=0)
    leaves = [hidden, weight, bias]
    for g, e in zip(*(torch.autograd.grad(v * 64, leaves) for v in (found, expected)), strict=True):
        assert g.dtype == kind
        torch.testing.assert_close(g.double(), e.double(), rtol=0, atol=2e-2 * float(e.abs().max()))


@kernel_target
def test_data_that_float32_cannot_hold_beside_float64() -> None:
    hidden, weight = torch.ones(4, 1, dtype=torch.float64), torch.full((6, 1), 2.0**24, dtype=torch.float64)
    x, kl = torch.full((4, 6), 2**24 + 1), torch.zeros(4, dtype=torch.float64)
    assert functional.linear_elbo(hidden, weight, None, x, None, None, kl=kl, block=2, reduction="mean") == 0.5


@kernel_target
def test_gradients_of_many_blocks_are_added_up_in_float32() -> None:
    hidden, weight = torch.randn(8, 16, dtype=torch.bfloat16), torch.randn(4096, 16, dtype=torch.bfloat16)
    x = torch.randn(8, 4096, dtype=torch.bfloat16)

    def gradient(dtype: torch.dtype, block: int | None) -> Tensor:
        leaf = hidden.to(dtype).requires_grad_()
        operands = leaf, weight.to(dtype), None, x.to(dtype), None, None
        loss = functional.linear_elbo(*operands, kl=x.new_zeros(8, dtype=dtype), reduction="sum", block=block)
        return torch.autograd.grad(loss, leaf)[0].double()

    exact = gradient(torch.float64, 4096)
    in_blocks, in_one = ((gradient(torch.bfloat16, block) - exact).abs().max() for block in (64, 4096))
    assert in_blocks <= 1.5 * in_one


@kernel_target
def test_a_weight_that_is_learned() -> None:
    operands = Operands("gaussian")
    weight = torch.rand(5, COLUMNS, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(operands.fused(weight=weight, block=16), weight)
    torch.testing.assert_close(found, torch.autograd.grad(operands.apart(weight=weight), weight)[0])


@kernel_target
def test_a_weighted_mean_of_no_weights_is_a_mean() -> None:
    operands = Operands("gaussian")
    torch.testing.assert_close(operands.fused(reduction="weighted_mean", block=16), operands.apart(reduction="mean"))


@kernel_target
def test_constants_of_counts() -> None:
    operands = Operands("poisson")
    operands.x = operands.x * 3
    torch.testing.assert_close(operands.fused(full=True, block=16), operands.apart(full=True))


@kernel_target
def test_a_beta_in_memory_has_no_say_in_the_dtype() -> None:
    beta = torch.tensor(0.5, dtype=torch.float64)
    for block in (16, None):
        operands = torch.rand(5, FEATURES), torch.rand(COLUMNS, FEATURES), None, torch.rand(5, COLUMNS), None, None
        loss = functional.linear_elbo(*operands, kl=torch.rand(5), beta=beta, block=block)
        assert loss.dtype == torch.float32


@kernel_target
def test_empty_operands() -> None:
    for rows, columns in ((0, 5), (4, 0)):
        hidden, weight = torch.randn(rows, 3, requires_grad=True), torch.randn(columns, 3, requires_grad=True)
        x, mu = torch.zeros(rows, columns), torch.zeros(rows, 2)
        value = functional.linear_elbo(hidden, weight, None, x, mu, mu, reduction="sum")
        assert value.item() == 0
        for g in torch.autograd.grad(value, [hidden, weight]):
            assert not g.any()


@kernel_target
def test_what_does_not_count_leaves_nothing_behind() -> None:
    operands = Operands("gaussian")
    operands.x[0] = torch.nan
    weight = torch.ones(5, 1)
    weight[0] = 0
    leaves = operands.leaves()
    value = operands.fused(weight=weight, block=16)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, leaves))


# --- derivatives ------------------------------------------------------------------------------------------------------


@kernel_target
def test_second_derivatives_and_gradients_in_batches() -> None:
    for reduction in ("batchmean", "none"):
        operands = Operands("gaussian", is_packed=True)
        leaves = operands.leaves()[:3]
        results = []
        for run in (operands.fused, operands.apart):
            value = run(reduction=reduction, grad_scale=2.0).sum()
            first = torch.autograd.grad(value, leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
            value = run(reduction=reduction).sum()
            results.append([*first, *second, *torch.autograd.grad(value, leaves, torch.ones(2), is_grads_batched=True)])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)


@kernel_target
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_second_derivatives_of_what_is_scaled(reduction: str) -> None:
    operands = Operands("gaussian", is_packed=True)
    leaves = operands.leaves()[:3]
    results = []
    for run in (functools.partial(operands.fused, block=16), operands.apart):
        first = torch.autograd.grad(run(reduction=reduction, grad_scale=2.0).sum(), leaves, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@kernel_target
def test_inputs_that_are_computed_from_each_other() -> None:
    """No derivative by one of them goes on through another."""
    operands = Operands("gaussian")
    leaves = [operands.hidden.requires_grad_(), operands.weight.requires_grad_()]
    operands.bias, operands.recon_logvar = operands.weight.sum(1), operands.hidden.sum(1, keepdim=True)
    expected = torch.autograd.grad(operands.apart(), leaves, retain_graph=True)
    for options in ({"create_graph": True}, {"is_grads_batched": True, "grad_outputs": torch.ones(1)}):
        found = torch.autograd.grad(operands.fused(block=16), leaves, retain_graph=True, **options)
        torch.testing.assert_close([g.view_as(e) for g, e in zip(found, expected, strict=True)], list(expected))


@kernel_target
def test_a_kept_graph() -> None:
    operands = Operands("gaussian")
    leaves = operands.leaves()
    for reduction in ("sum", "none"):
        expected = torch.autograd.grad(3 * operands.apart(reduction=reduction).sum(), leaves)
        value = 3 * operands.fused(reduction=reduction, block=16).sum()
        for is_kept in (True, True, False):
            found = torch.autograd.grad(value, leaves, retain_graph=is_kept)
            torch.testing.assert_close(found, expected)
            for g in found:
                g.mul_(0)  # whoever got it may do as they please
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(value, leaves)


@kernel_target
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
def test_where_operations_of_pytorch_are_seen() -> None:
    operands = Operands("gaussian", is_packed=True)

    def loss(weight: Tensor) -> Tensor:
        return functional.linear_elbo(
            operands.hidden, weight, operands.bias, operands.x, operands.mu, operands.logvar, None
        )

    weight = operands.weight.requires_grad_()
    (expected,) = torch.autograd.grad(loss(weight), weight)
    torch.testing.assert_close(torch.func.grad(loss)(weight), expected)
    torch.testing.assert_close(torch.vmap(loss)(weight.expand(2, *weight.shape)), loss(weight).expand(2))
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weight), loss(weight))
    torch.testing.assert_close(torch.autograd.grad(compiled(weight), weight)[0], expected)


# --- memory -----------------------------------------------------------------------------------------------------------


@kernel_target
@pytest.mark.large
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("is_packed", [False, True], ids=["", "packed"])
def test_a_tenth_of_the_memory(is_packed: bool, reduction: str, target: Target) -> None:
    batch, columns, features = 512, 20_000, 4
    rows = (2 if is_packed else 1) * columns
    leaves = [torch.randn(s).requires_grad_() for s in ((batch, features), (rows, features), (rows,))]
    x, mu = torch.rand(batch, columns), torch.zeros(batch, 2)

    def step(inner: Callable[..., Any]) -> None:
        torch.autograd.grad(inner(*leaves).sum(), leaves)

    def apart(*layer: Tensor) -> Any:
        out = linear(*layer)
        return (
            functional.elbo_loss(out, x, mu, mu, 0.0, reduction=reduction)
            if not is_packed
            else (functional.gaussian_nll(out, x, None, reduction=reduction))
        )

    def fused(*layer: Tensor) -> Any:
        return functional.linear_elbo(*layer, x, mu, mu, None if is_packed else 0.0, reduction=reduction)

    device = torch.device(target.device)
    most, least = (profiled(functools.partial(step, way), device).peak_bytes for way in (apart, fused))
    assert most >= 2 * batch * rows * 4  # the output, and its gradient
    assert least <= most / 10


# --- the module -------------------------------------------------------------------------------------------------------


@every_target
def test_the_module() -> None:
    torch.manual_seed(3)
    module = fusedvae.LinearLikelihood(FEATURES, COLUMNS, block=16)
    assert repr(module) == (
        "LinearLikelihood(in_features=7, out_features=37, bias=True, likelihood='gaussian', recon_logvar=None)"
    )
    assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == {"weight": (74, 7), "bias": (74,)}
    hidden, x, mu = torch.randn(5, FEATURES), torch.rand(5, COLUMNS), torch.randn(5, 3)
    packed = module(hidden)
    torch.testing.assert_close(packed, linear(hidden, module.weight, module.bias))
    nll = functional.gaussian_nll(packed, x, None)
    torch.testing.assert_close(module(hidden, x), nll)
    kl = functional.kl_standard_normal(mu, mu, reduction="none")
    torch.testing.assert_close(module(hidden, x, mu, mu, beta=0.5), nll + 0.5 * kl.mean())
    torch.testing.assert_close(module(hidden, x, kl=kl, beta=0.5), nll + 0.5 * kl.mean())
    module(hidden, x, kl=kl).backward()
    torch.testing.assert_close(module.weight.grad, torch.autograd.grad(nll, module.weight)[0])


@every_target
def test_the_form_of_the_modules_scale_and_a_value_that_goes_with_it() -> None:
    fixed = fusedvae.LinearLikelihood(FEATURES, COLUMNS, recon_logvar=torch.zeros(COLUMNS))
    assert "recon_logvar" in fixed.state_dict()
    assert fixed.to(torch.float64).recon_logvar.dtype == torch.float64  # type: ignore[union-attr]
    form = {"recon_scale": "std", "recon_clamp": (0.5, None), "recon_eps": 0.25}
    layer = fusedvae.LinearLikelihood(FEATURES, COLUMNS, **form)  # type: ignore[arg-type]
    hidden, x = torch.rand(4, FEATURES), torch.rand(4, COLUMNS)
    torch.testing.assert_close(layer(hidden, x), layer(hidden, x, kl=torch.zeros(4)))


@every_target
def test_the_modules_scales() -> None:
    hidden, x = torch.randn(5, FEATURES), torch.rand(5, COLUMNS)
    learned = fusedvae.LinearLikelihood(FEATURES, COLUMNS, recon_logvar=nn.Parameter(torch.rand(COLUMNS)))
    assert [*learned.state_dict()] == ["weight", "bias", "recon_logvar"]
    expected = functional.gaussian_nll(learned(hidden), x, learned.recon_logvar)
    torch.testing.assert_close(learned(hidden, x), expected)
    learned(hidden, x).backward()
    assert isinstance(learned.recon_logvar, nn.Parameter)
    torch.testing.assert_close(learned.recon_logvar.grad, torch.autograd.grad(expected, learned.recon_logvar)[0])
    fixed = fusedvae.LinearLikelihood(FEATURES, COLUMNS, bias=False, likelihood="laplace", recon_logvar=0.5)
    torch.testing.assert_close(fixed(hidden, x), functional.laplace_nll(fixed(hidden), x, 0.5))
    numpys = fusedvae.LinearLikelihood(FEATURES, COLUMNS, recon_logvar=np.float32(0.5))
    torch.testing.assert_close(numpys(hidden, x), functional.gaussian_nll(numpys(hidden), x, 0.5))
    counted = fusedvae.LinearLikelihood(FEATURES, COLUMNS, likelihood="poisson", recon_scale="lograte", full=True)
    expected = functional.poisson_nll(counted(hidden), x, scale="lograte", full=True)
    torch.testing.assert_close(counted(hidden, x), expected)
    with pytest.raises(ValueError, match="recon_logvar: expected None, as the mse likelihood has no scale"):
        fusedvae.LinearLikelihood(FEATURES, COLUMNS, likelihood="mse", recon_logvar=0.0)
    with pytest.raises(ValueError, match=r"recon_logvar: expected a shape that broadcasts to \(1, 37\), got \(36,\)"):
        fusedvae.LinearLikelihood(FEATURES, COLUMNS, recon_logvar=torch.zeros(36))
    with pytest.raises(TypeError, match="recon_logvar: expected None, a number or a tensor, got str"):
        fusedvae.LinearLikelihood(FEATURES, COLUMNS, recon_logvar="learned")  # type: ignore[arg-type]


def test_the_module_names_what_the_likelihood_alone_does_not_take() -> None:
    module = fusedvae.LinearLikelihood(4, 12)
    hidden, x = torch.rand(8, 4), torch.rand(8, 12)
    alone: Any
    for alone in ({"beta": 0.5}, {"return_terms": True}, {"latent_weight": x}, {"kl": None}, {"packed_dim": -1}):
        (name,) = alone
        with pytest.raises(TypeError, match=f"^{name}: expected with mu and logvar, or kl, only; .*likelihood alone"):
            module(hidden, x, **alone)
    with pytest.raises(TypeError, match=r"^LinearLikelihood got an unexpected keyword argument 'wieght'"):
        module(hidden, x, wieght=x)
    with pytest.raises(TypeError, match=r"^LinearLikelihood got an unexpected keyword argument 'likelihood'"):
        module(hidden, x, likelihood="mse")
    each = module(hidden, x, reduction="none", block=3, full=True, weight=torch.ones(12), backend="reference")
    torch.testing.assert_close(each, functional.gaussian_nll(module(hidden), x, None, full=True, reduction="none"))
    summed = functional.gaussian_nll(module(hidden), x, None, reduction="sum")
    torch.testing.assert_close(module(hidden, x, reduction=("sum", "mean")), summed)


def test_all_is_checked_before_the_layer_is_multiplied_out(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["fusedvae.functional.linear"]
    monkeypatch.setattr(module, "run_linear_likelihood", lambda *arguments, **options: pytest.fail("it runs"))
    layer = torch.rand(8, 4), torch.rand(12, 4), None, torch.rand(8, 12)
    wrong_kl = {"mu": None, "logvar": None, "kl": torch.rand(3)}
    wrong: Any
    for wrong, message in (
        ((torch.rand(3, 2), torch.rand(3, 2)), "^mu: expected the batch size of x, 8, got 3"),
        ((torch.rand(8, 2), torch.rand(8, 3)), "^logvar: "),
    ):
        with pytest.raises(ValueError, match=message):
            functional.linear_elbo(*layer, *wrong)
    with pytest.raises(ValueError, match=r"^kl: "):
        functional.linear_elbo(*layer, **wrong_kl)


def test_the_module_names_its_own_sizes() -> None:
    module = fusedvae.LinearLikelihood(4, 12)
    for arguments in ((torch.rand(8, 5),), (torch.rand(8, 5), torch.rand(8, 12))):
        with pytest.raises(ValueError, match=r"^hidden: expected in_features 4, got 5"):
            module(*arguments)
    with pytest.raises(ValueError, match=r"^x: expected out_features 12, got 7"):
        module(torch.rand(8, 4), torch.rand(8, 7))


# --- wrong arguments --------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hidden": torch.zeros(7)}, ValueError, r"hidden: expected shape \(batch, ..., in_features\), got \(7,\)"),
    ({"hidden": 1.0}, TypeError, "hidden: expected a tensor, got float"),
    ({"linear_weight": torch.zeros(37, 6)}, ValueError, r"linear_weight: expected shape \(37, 7\), .* got \(37, 6\)"),
    ({"linear_weight": torch.zeros(37, 7).double()}, TypeError, "linear_weight: expected torch.float32, as hidden is"),
    ({"recon_logvar": None}, ValueError, r"linear_weight: expected shape \(74, 7\), a mean and a scale for each"),
    ({"linear_bias": torch.zeros(36)}, ValueError, r"linear_bias: expected shape \(37,\), got \(36,\)"),
    ({"linear_bias": torch.zeros(37).half()}, TypeError, "linear_bias: expected torch.float32, as hidden is"),
    ({"x": torch.zeros(4, 37)}, ValueError, r"x: expected shape \(5, out_features\) beside hidden, got \(4, 37\)"),
    ({"mu": torch.zeros(4, 3), "logvar": torch.zeros(4, 3)}, ValueError, "mu: expected the batch size of x, 5, got 4"),
    ({"recon_logvar": torch.zeros(5)}, ValueError, "recon_logvar: expected a shape that broadcasts"),
    ({"likelihood": "normal"}, ValueError, "likelihood: expected one of"),
    ({"reduction": "median"}, ValueError, "reduction: expected"),
    ({"weight": torch.zeros(36)}, ValueError, r"weight: expected a shape that broadcasts to \(5, 37\)"),
    ({"block": 0}, ValueError, "block: expected at least 1, got 0"),
    ({"block": 1.5}, TypeError, "block: expected an integer or None, got float"),
    ({"beta": "1"}, TypeError, "beta: expected a number or a 0-dim tensor, got str"),
    ({"grad_scale": torch.zeros(2)}, ValueError, "grad_scale: expected a number or a 0-dim float tensor"),
    ({"kl": torch.zeros(5)}, ValueError, "kl: expected None when mu or logvar is given"),
]


@pytest.mark.parametrize("target", TARGETS[:1], indirect=True)
@pytest.mark.parametrize("case", range(len(WRONG)))
def test_wrong_arguments(case: int, target: Target) -> None:
    changes, error, message = WRONG[case]
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(5, 7),
        "linear_weight": torch.zeros(37, 7),
        "linear_bias": torch.zeros(37),
        "x": torch.zeros(5, 37),
        "mu": torch.zeros(5, 3),
        "logvar": torch.zeros(5, 3),
    }
    with pytest.raises(error, match=message):
        functional.linear_elbo(**{**arguments, **changes})
