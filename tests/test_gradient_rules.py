"""When and where gradients are made: the incoming factor, kept graphs, single terms, second derivatives, tracing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import KERNEL_TARGETS, Target, sampling
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fusedvae
from fusedvae import autograd, calls, functional, ops
from fusedvae.backend.specs import Objective
from fusedvae.calls import Operands

pytestmark = pytest.mark.parametrize("target", KERNEL_TARGETS, indirect=True)


@pytest.fixture(autouse=True)
def _chosen(target: Target) -> Iterator[None]:
    """What a test calls runs on the target's backend."""
    with fusedvae.use_backend(target.backend):
        yield


def operands(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """recon_x, x, mu, logvar, recon_logvar, all wanting gradients."""
    shapes = ((4, 3, 5), (4, 3, 5), (4, 6), (4, 6), (3, 1))
    return [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]


def written_out(
    recon_x: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, recon_logvar: Tensor, beta: float | Tensor = 0.7
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, nll, kl), "batchmean", as the formulas have it."""
    nll = (0.5 * (recon_logvar + (recon_x - x) ** 2 * torch.exp(-recon_logvar))).sum() / len(x)
    kl = (0.5 * (mu**2 + torch.exp(logvar) - 1 - logvar)).sum() / len(x)
    return nll + beta * kl, nll, kl


def terms(*t: Tensor, beta: float | Tensor = 0.7) -> functional.ELBOTerms:
    """The same by the kernels."""
    found = functional.elbo_loss(*t, beta=beta, return_terms=True)
    assert isinstance(found, functional.ELBOTerms)
    return found


def assert_all_close(found: list, expected: list) -> None:
    """Pairwise closeness, None for None."""
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        assert (f is None) == (e is None)
        if f is not None:
            torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("factor", [1.0, 3.7, 0.0])
@pytest.mark.parametrize("term", [0, 1, 2])
def test_any_incoming_factor_on_any_term(factor: float, term: int) -> None:
    t = operands()
    found = torch.autograd.grad(terms(*t)[term] * factor, t, allow_unused=True)
    expected = torch.autograd.grad(written_out(*t)[term] * factor, t, allow_unused=True)
    assert_all_close(list(found), list(expected))


def test_terms_add_up_when_all_are_differentiated() -> None:
    t = operands()
    weights = (0.3, 1.1, -2.0)
    found = torch.autograd.grad(sum(w * v for w, v in zip(weights, terms(*t), strict=True)), t)
    expected = torch.autograd.grad(sum(w * v for w, v in zip(weights, written_out(*t), strict=True)), t)
    assert_all_close(list(found), list(expected))


@pytest.mark.parametrize("factor", [1.0, 3.7])
def test_a_kept_graph_gives_the_same_gradients_again(factor: float) -> None:
    t = operands()
    loss = terms(*t).loss * factor
    expected = list(torch.autograd.grad(written_out(*t)[0] * factor, t))
    first = torch.autograd.grad(loss, t, retain_graph=True)
    for g in first:
        g.mul_(0)  # whoever got them may do as they please
    assert_all_close(list(torch.autograd.grad(loss, t, retain_graph=True)), expected)
    assert_all_close(list(torch.autograd.grad(loss, t)), expected)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, t)


def test_gradients_are_given_away_once() -> None:
    mean, x = torch.randn(4, 6).requires_grad_(), torch.randn(4, 6)
    loss = functional.gaussian_nll(mean, x)  # nothing of PyTorch's beside it, that would say so first
    torch.autograd.grad(loss, mean)
    with pytest.raises(RuntimeError, match="gradients have been given away"):
        torch.autograd.grad(loss, mean, torch.full_like(loss, 2.0))


def test_operands_and_gradients_that_have_their_sign_to_come() -> None:
    plain = operands()
    signed = [torch._neg_view(-t.detach()).requires_grad_() for t in plain]
    torch.testing.assert_close(functional.elbo_loss(*signed), functional.elbo_loss(*plain))
    mu, logvar = plain[2:4]
    z = functional.reparameterize(mu, logvar, noise=torch.randn_like(mu))
    incoming = torch.randn_like(z)
    found = torch.autograd.grad(z, [mu, logvar], torch._neg_view(-incoming), retain_graph=True)
    assert_all_close(list(found), list(torch.autograd.grad(z, [mu, logvar], incoming)))


def test_integers_that_float32_cannot_hold_beside_a_weight_in_float64() -> None:
    mean, weight = torch.full((4, 6), 2.0**24), torch.ones(4, 6, dtype=torch.float64)
    assert functional.gaussian_nll(mean, torch.full((4, 6), 2**24 + 1), weight=weight, reduction="mean") == 0.5


def test_one_term_before_the_whole_as_adversarial_training_does() -> None:
    t = operands()
    found, expected = terms(*t), written_out(*t)
    assert_all_close(
        list(torch.autograd.grad(found.nll, t[0], retain_graph=True)),
        list(torch.autograd.grad(expected[1], t[0], retain_graph=True)),
    )
    assert_all_close(list(torch.autograd.grad(found.loss, t)), list(torch.autograd.grad(expected[0], t)))


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_terms_may_be_changed_in_place(reduction: str) -> None:
    """As annealing and free bits do, of whatever they were given."""
    t = operands()
    recon_x, x, mu, logvar, recon_logvar = t
    _, nll, kl = functional.elbo_loss(*t, reduction=reduction, return_terms=True)
    nll -= 3.0
    kl *= 0.1
    kl.clamp_(min=0.05)
    likelihood = (0.5 * (recon_logvar + (recon_x - x) ** 2 * (-recon_logvar).exp())).sum((1, 2))
    divergence = (0.5 * (mu**2 + logvar.exp() - 1 - logvar)).sum(1)
    if reduction == "batchmean":
        likelihood, divergence = likelihood.mean(), divergence.mean()
    expected = likelihood + (0.1 * divergence).clamp(min=0.05)
    assert_all_close(list(torch.autograd.grad((nll + kl).sum(), t)), list(torch.autograd.grad(expected.sum(), t)))


@pytest.mark.parametrize("wanting", range(1, 32))
def test_any_subset_of_inputs(wanting: int) -> None:
    t = [v.detach().requires_grad_(bool(wanting >> k & 1)) for k, v in enumerate(operands())]
    some = [v for v in t if v.requires_grad]
    assert_all_close(
        list(torch.autograd.grad(terms(*t).loss, some)), list(torch.autograd.grad(written_out(*t)[0], some))
    )


def test_nothing_is_made_without_need() -> None:
    t = operands()
    with torch.no_grad():
        assert not terms(*t).loss.requires_grad
    made = Allocations()
    with made, torch.no_grad():
        functional.elbo_loss(*t)
    assert max(made.sizes, default=0) <= 1


class Allocations(TorchDispatchMode):
    """Records the element counts of the tensors that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(t, Tensor):
                self.sizes.append(t.numel())
        return out


@pytest.mark.large
def test_extra_memory_is_the_two_gradients(target: Target) -> None:
    n = 1 << 22
    recon_x, recon_logvar = (torch.randn(4, n // 4).requires_grad_() for _ in range(2))
    x, mu, logvar = torch.randn(4, n // 4), torch.randn(4, 8), torch.randn(4, 8)

    def step() -> None:
        functional.elbo_loss(recon_x, x, mu, logvar, recon_logvar).backward()

    if target.device == "cuda":
        before = torch.cuda.memory_stats()["allocated_bytes.all.allocated"]
        step()
        allocated = torch.cuda.memory_stats()["allocated_bytes.all.allocated"] - before
        assert 2 * 4 * n <= allocated < 2 * 4 * n + n
        return
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    allocated = sum(event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > n)
    assert allocated == 2 * 4 * n


def test_learned_beta() -> None:
    t, beta = operands(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(terms(*t, beta=beta).loss, [beta, *t])
    assert_all_close(list(found), list(torch.autograd.grad(written_out(*t, beta=beta)[0], [beta, *t])))


def _gradients_in_three_ways(value: Tensor, leaves: list[Tensor]) -> list[list[Tensor]]:
    """Of a scalar: by the kernels, by formulas that can be differentiated again, and in a batch."""
    plain = torch.autograd.grad(value, leaves, retain_graph=True)
    again = torch.autograd.grad(value, leaves, create_graph=True)
    ones = torch.ones(1, dtype=value.dtype)
    batched = torch.autograd.grad(value, leaves, ones, is_grads_batched=True, retain_graph=True)
    return [list(plain), list(again), [g[0] for g in batched]]


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_inputs_that_are_computed_from_each_other(reduction: str) -> None:
    """As recon_x is from mu: no derivative by one goes on through another, and no hook is called twice."""
    x, noise = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    leaves = [torch.randn(4, 6, dtype=torch.float64).requires_grad_() for _ in range(2)]

    def fused(mu: Tensor, logvar: Tensor) -> Tensor:
        z, kl = functional.latent(mu, logvar, 0.5 * mu, 0.1 * logvar, noise=noise)
        loss = functional.elbo_loss(2.0 * z, x, mu, mu, 0.3 * mu, beta=0.7, reduction=reduction)
        assert isinstance(loss, Tensor)
        return loss.sum() + kl.sum()

    def apart(mu: Tensor, logvar: Tensor) -> Tensor:
        z, difference = mu + torch.exp(0.5 * logvar) * noise, 0.9 * logvar
        kl = 0.5 * (torch.expm1(difference) - difference + (0.5 * mu) ** 2 * torch.exp(-0.1 * logvar))
        return written_out(2.0 * z, x, mu, mu, 0.3 * mu)[0] * (4 if reduction == "none" else 1) + kl.sum()

    expected = torch.autograd.grad(apart(*leaves), leaves, create_graph=True)
    found = _gradients_in_three_ways(fused(*leaves), leaves)
    for gradients in found:
        assert_all_close(gradients, list(expected))
    second = [torch.autograd.grad(sum(g.square().sum() for g in first), leaves) for first in (found[1], expected)]
    assert_all_close(*map(list, second))

    hooked = [leaf.clone() for leaf in leaves]
    hooked[0].register_hook(lambda g: 2.0 * g)
    for gradients in _gradients_in_three_ways(fused(*hooked), leaves):
        assert_all_close(gradients, [2.0 * expected[0], expected[1]])


@pytest.mark.large
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_first_and_second_derivatives_numerically(reduction: str) -> None:
    def loss(*t: Tensor) -> tuple[Tensor, ...]:
        return functional.elbo_loss(*t, beta=0.7, reduction=reduction, return_terms=True)

    t = operands()
    assert torch.autograd.gradcheck(loss, t)
    assert torch.autograd.gradgradcheck(loss, t)


@pytest.mark.large
def test_derivatives_of_the_latent_numerically(target: Target) -> None:
    mu, logvar, noise = (torch.randn(3, 5, dtype=torch.float64).requires_grad_() for _ in range(3))
    packed = torch.randn(3, 6, 2, dtype=torch.float64).requires_grad_()

    def from_seed(*t: Tensor) -> tuple[Tensor, ...]:
        generator = torch.Generator(target.device).manual_seed(1)
        return functional.latent(*(*t, None)[:2], generator=generator)

    def given(mu: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        return functional.reparameterize(mu, logvar, noise=noise)

    for function, inputs in ((from_seed, (mu, logvar)), (from_seed, (packed,)), (given, (mu, logvar, noise))):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_weights_a_sample() -> None:
    t, weights = operands(), torch.rand(4, dtype=torch.float64)
    loss = functional.elbo_loss(*t, beta=0.7, reduction="none")
    each = [written_out(*(v[k : k + 1] for v in t[:4]), t[4])[0] for k in range(4)]
    assert_all_close([loss], [torch.stack(each)])
    expected = torch.autograd.grad((torch.stack(each) * weights).sum(), t)
    assert_all_close(list(torch.autograd.grad((loss * weights).sum(), t)), list(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
def test_a_divergence_that_is_given_has_the_gradient_of_its_coefficients(
    target: Target, reduction: str, dtype: torch.dtype
) -> None:
    x, recon_x = torch.randn(4, 6, dtype=dtype), torch.randn(4, 6, dtype=dtype).requires_grad_()
    kl = torch.rand(4, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
    for options in ({}, {"beta": 0.3}, {"beta": 0.3, "grad_scale": 8.0}, {"beta": torch.tensor(0.3)}):
        loss = functional.elbo_loss(
            recon_x, x, None, None, kl=kl, reduction=reduction, backend=target.backend, **options
        )
        factor = float(options.get("beta", 1.0)) * options.get("grad_scale", 1.0)
        expected = torch.full_like(kl, factor if reduction == "sum" else factor / 4)
        for is_kept in (True, False):
            found, of_mean = torch.autograd.grad(0.5 * loss, [kl, recon_x], retain_graph=is_kept)
            torch.testing.assert_close(found, 0.5 * expected)
            assert found.dtype == kl.dtype
            assert of_mean.any()
        for rows in (slice(0, 6), slice(0, 0)):  # and where nothing else has a gradient to be scaled
            t = recon_x[:, rows], x[:, rows], None, None
            loss = functional.elbo_loss(*t, kl=kl, reduction=(reduction, reduction), backend=target.backend, **options)
            found, of_mean = torch.autograd.grad(loss, [kl, recon_x])
            torch.testing.assert_close(found, expected)
            assert of_mean.any() == (rows.stop > 0)


def test_the_gradient_of_a_divergence_that_is_given_takes_no_operator_of_its_own(target: Target) -> None:
    if target.backend == "reference":
        pytest.skip("computes with operators")
    x, recon_x = torch.randn(4, 6), torch.randn(4, 6).requires_grad_()
    kl = torch.rand(4).requires_grad_()
    for incoming in (torch.tensor(1.0), torch.tensor(0.25)):
        loss = functional.elbo_loss(recon_x, x, None, None, kl=kl, beta=0.3, backend=target.backend)
        with torch.profiler.profile() as profile:
            found, of_mean = torch.autograd.grad(loss, [kl, recon_x], incoming)
        torch.testing.assert_close(found, (incoming * 0.3 / 4).expand(4))
        torch.testing.assert_close(of_mean, (incoming / 4) * (recon_x.detach() - x))
        assert "aten::mul" not in {event.name for event in profile.events()}


def test_the_latents_own_kl() -> None:
    recon_x, x, mu, logvar, recon_logvar = operands()
    kl = functional.latent(mu, logvar).kl
    loss = functional.elbo_loss(recon_x, x, None, None, recon_logvar, kl=kl, beta=0.7)
    expected = written_out(recon_x, x, mu, logvar, recon_logvar)[0]
    t = [recon_x, x, mu, logvar, recon_logvar]
    assert_all_close([loss, *torch.autograd.grad(loss, t)], [expected, *torch.autograd.grad(expected, t)])


def test_a_loss_scaler_does_not_underflow_float16() -> None:
    recon_x = (torch.rand(64, 32) * 1e-3).half().requires_grad_()
    x, mu = torch.zeros(64, 32), torch.zeros(64, 2)
    loss = functional.elbo_loss(recon_x, x, mu, mu)
    (scaled,) = torch.autograd.grad(loss * 65536, recon_x)
    torch.testing.assert_close(scaled.double(), recon_x.double() * 1024, rtol=1e-3, atol=0)


def test_one_pass_makes_all_that_float16_leaves_to_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[bool, ...]] = []
    run = calls.ObjectiveCall.run

    def recorded(call: calls.ObjectiveCall, operands: Operands) -> Any:
        made.append(call.spec.needed)
        return run(call, operands)

    def refuse(*_: Any) -> None:
        raise AssertionError("a term of its own")

    monkeypatch.setattr(calls.ObjectiveCall, "run", recorded)
    monkeypatch.setattr(calls, "TermGradientCall", refuse)
    monkeypatch.setattr(autograd, "TermGradientCall", refuse)
    t = operands(torch.float16)
    beta = torch.tensor(0.7, requires_grad=True)
    leaves = [*t, beta]
    loss = functional.elbo_loss(*t, beta=beta)
    assert isinstance(loss, Tensor)
    t64 = [v.detach().double().requires_grad_() for v in leaves]
    expected = torch.autograd.grad(written_out(*t64)[0] * 96, t64)
    for _ in range(2):  # of a graph that is kept
        found = torch.autograd.grad(loss * 96, leaves, retain_graph=True)
        assert made.pop() == (True,) * 5 + (False,) * 2
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f.double(), e, rtol=2e-3, atol=2e-2)
    assert made == [(False,) * 6]


def test_a_kl_of_one_s_own_beside_float16() -> None:
    recon_x, x, _, _, recon_logvar = t = operands(torch.float16)
    kl = torch.rand(4, requires_grad=True)
    loss = functional.elbo_loss(recon_x, x, None, None, recon_logvar, kl=kl, beta=0.5)
    found = torch.autograd.grad(loss * 8, [recon_x, recon_logvar, kl])
    t64 = [v.detach().double().requires_grad_() for v in t]
    nll = written_out(*t64)[1]
    expected = torch.autograd.grad(nll * 8, [t64[0], t64[4]])
    for f, e in zip(found, [*expected, torch.full((4,), 1.0)], strict=True):
        torch.testing.assert_close(f.double(), e.double(), rtol=2e-3, atol=2e-3)


@pytest.mark.large
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_rounded_as_pytorch_rounds(dtype: torch.dtype) -> None:
    at_edges = [0x7F800000, 0x7FC00000, 0x7FFFFFFF, 0x7F7FFFFF, 0x3F808000, 0x3F818000, 1, 0x8000, 0x18000, 0x477FF000]
    bits = torch.cat([torch.randint(1 << 31, (30011,)), torch.tensor(at_edges)]).to(torch.int32)
    x = torch.cat([bits.view(torch.float32), -bits.view(torch.float32)])[None]
    mean = torch.zeros_like(x, dtype=dtype).requires_grad_()
    loss = functional.gaussian_nll(mean, x, reduction="sum")
    assert isinstance(loss, Tensor)
    (found,) = torch.autograd.grad(loss, mean)
    torch.testing.assert_close(found, (-x).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_autocast_gives_float32_as_for_a_loss_of_pytorch(target: Target) -> None:
    layer, x = torch.nn.Linear(4, 4), torch.randn(3, 4)
    with torch.autocast(target.device, dtype=torch.bfloat16):
        out = layer(x)
        loss = functional.elbo_loss(out, x, out, out)
        assert out.dtype == torch.bfloat16
        assert loss.dtype == torch.nn.functional.mse_loss(out, x).dtype == torch.float32
    loss.backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()


def test_checkpointing_makes_the_same_noise_again() -> None:
    mu, logvar = (torch.randn(6, 7).requires_grad_() for _ in range(2))

    def gradients(run) -> list[Tensor]:
        torch.manual_seed(11)
        z, kl = run(mu, logvar)
        return [z, *torch.autograd.grad((z**2).sum() + kl.sum(), [mu, logvar])]

    def latent(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(functional.latent(mu, logvar))

    found = gradients(lambda *t: checkpoint(latent, *t, use_reentrant=False))
    for f, e in zip(found, gradients(latent), strict=True):
        assert torch.equal(f, e)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # PyTorch 2.15
def test_operators_pass_opcheck(target: Target) -> None:
    ops, seed = torch.ops.fusedvae, torch.tensor(5)
    recon_x, x, mu, logvar, spread = (t.detach() for t in operands(torch.float32))
    for t in (recon_x, mu, logvar, spread):
        t.requires_grad_()
    formulas = ["gaussian_nll", "kl_standard_normal"]
    inputs = [recon_x, x, spread, mu, logvar, torch.tensor(0.7, dtype=torch.float64)]
    needed = [True, False, True, True, True, False]
    forms = ["exponential"] * 2, [False] * 2, [-math.inf, math.inf, 0.0] * 2
    for reduction in ("batchmean", "none"):
        options = (1, True, [reduction] * 2, None, torch.float32, True, needed, False, target.backend)
        opcheck(ops.objective, (inputs, formulas, *forms, None, [False] * 2, [False] * 2, *options))
    opcheck(ops.latent, ([mu, logvar, seed, None, None], *sampling(torch.float32, target.backend)))
    opcheck(ops.latent, ([mu, logvar, None, None, torch.randn_like(mu)], *sampling(None, target.backend)))
    opcheck(ops.normal, ([4, 5], seed, torch.float32, target.backend))
    opcheck(ops.draw_seed, (seed,), test_utils=("test_schema", "test_faketensor"))
    recon_x, mu, logvar, spread = (t.detach() for t in (recon_x, mu, logvar, spread))
    term = [recon_x, x, spread, None, torch.tensor(2.0)]
    form = [["exponential"], [False], [-math.inf, math.inf, 0.0]]
    opcheck(ops.term_gradient, (term, "gaussian_nll", *form, [], None, 1, [True, False, True], target.backend))
    given = [mu, logvar, seed, None, None, mu, mu.sum(1)]
    opcheck(
        ops.latent_gradient, (given, "kl_standard_normal", *form, None, False, [1], 1, [True, True], target.backend)
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, from its compiler
def test_a_compiled_training_step_is_one_graph_and_agrees_with_eager() -> None:
    torch.manual_seed(0)
    encoder, decoder, beta = torch.nn.Linear(20, 12), torch.nn.Linear(6, 40), torch.tensor(0.5)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    x = torch.randn(8, 20)

    def step(x: Tensor) -> Tensor:
        z, kl = functional.latent(encoder(x), None)
        return functional.elbo_loss(decoder(z), x, None, None, None, kl=kl, beta=beta)

    def run(function) -> list[Tensor]:
        torch.manual_seed(3)
        loss = function(x)
        return [loss, *torch.autograd.grad(loss, parameters)]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    for value in (0.5, 0.9, 0.1):  # an annealed beta must not compile anything anew
        beta.fill_(value)
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = run(compiled)
        for f, e in zip(found, run(step), strict=True):
            torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)


COMPILED: dict[str, dict[str, Any]] = {
    "values per sample": {"reduction": "none"},
    "terms": {"return_terms": True},
    "forms": {"scale": "std", "clamp": (0.1, 3.0), "eps": 1e-3, "recon_scale": "softplus", "recon_clamp": (None, 2.0)},
    "a prior": {"prior_mu": 0.5, "prior_logvar": 0.3, "prior_clamp": (-1.0, 1.0), "eps": 0.1},
}


@pytest.mark.large
@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_way_to_a_call_compiles_into_one_graph(options: dict[str, Any], dtype: torch.dtype) -> None:
    """What checks arguments and makes calls is traced, with what the compiler of every release of PyTorch knows."""
    recon_x, x, mu, spread, recon_logvar = (t.detach().to(dtype) for t in operands(torch.float32))
    spread = spread.abs() + 0.2

    def loss(recon_x: Tensor, mu: Tensor) -> Tensor:
        found = functional.elbo_loss(recon_x, x, mu, spread, recon_logvar, **options)
        return sum(found) if isinstance(found, tuple) else found.sum()

    def run(function: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (recon_x, mu)]
        value = function(*leaves)
        return [value, *torch.autograd.grad(value, leaves)]

    torch._dynamo.reset()
    found = run(torch.compile(loss, backend="eager", fullgraph=True))
    for f, e in zip(found, run(loss), strict=True):
        torch.testing.assert_close(f, e)


# --- what only GPUs do, as far as it can be seen without one ----------------------------------------------------------


def test_behind_the_dispatcher_a_gpu_makes_no_gradients_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    # What would be made there is not ours to scale in place: 9N elements would be moved, and so 8N are.
    specs: list[Objective] = []
    made = autograd.forward_spec_of

    def recorded(spec: Objective, operands: Operands, **options: bool) -> Objective:
        specs.append(spec)
        return made(spec, operands, **options)

    monkeypatch.setattr(calls, "_calls", {})  # or the call may have been made before
    monkeypatch.setattr(autograd, "forward_spec_of", recorded)
    functional.gaussian_nll(*(torch.randn(2, 3, requires_grad=True) for _ in range(3)))
    for device, is_dispatched in itertools.product(("cpu", "cuda"), (False, True)):
        with FakeTensorMode():
            operands = [torch.empty(2, 3, device=device) for _ in range(3)]
        needed = made(specs[0], (*operands, 1.0), is_dispatched=is_dispatched).needed
        assert any(needed) == (device == "cpu" or not is_dispatched)


def test_a_number_on_the_cpu_is_read_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    beta = torch.tensor(0.75, device="cpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    (conversion,) = autograd.conversions_of((beta,), torch.float32, torch.device("cuda", 0))
    assert conversion.convert(beta) == 0.75
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="a 0-dim tensor on the CPU"):
        conversion.convert(beta)


def test_a_captured_graph_draws_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        ValueError, match=r"generator: expected one on cuda:0 where a graph is captured, .* got one on cpu"
    ):
        ops.draw_seed(torch.device("cuda", 0), torch.Generator("cpu"), by_dispatcher=False)
