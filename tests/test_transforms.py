"""What is no plain eager call: transforms of torch.func, batched gradients, tracing, hooks, views with a sign to come.

Each gives what the formulas written out give, on every backend: by its kernels where they can serve, else by the
reference formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import TARGETS, Target, kl_elements, nll_elements
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import fusedvae
from fusedvae import functional
from fusedvae.backend import philox
from fusedvae.distributions import DiagonalGaussianDistribution

pytestmark = [
    pytest.mark.parametrize("target", TARGETS, indirect=True),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # PyTorch's own
]


@pytest.fixture(autouse=True)
def _chosen(target: Target) -> Iterator[None]:
    """What a test calls runs on the target's backend."""
    with fusedvae.use_backend(target.backend):
        yield


def kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return functional.kl_standard_normal(mu, logvar)


def written_out(mu: Tensor, logvar: Tensor) -> Tensor:
    return (0.5 * (mu**2 + torch.expm1(logvar) - logvar)).sum() / len(mu)


def pair(*shape: int) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for _ in range(2)]


# --- torch.func -----------------------------------------------------------------------------------------------------


def test_vmap_of_values_and_of_gradients() -> None:
    mu, logvar = pair(4, 3)

    def one(mu: Tensor, logvar: Tensor) -> Tensor:
        return kl(mu[None], logvar[None])

    torch.testing.assert_close(vmap(one)(mu, logvar), kl_elements(mu, logvar).sum(1))
    torch.testing.assert_close(vmap(grad(one))(mu, logvar), mu)
    torch.testing.assert_close(vmap(grad(one, argnums=1))(mu, logvar), torch.expm1(logvar) / 2)


def test_vmap_of_what_was_called_with_such_sizes_before() -> None:
    means, targets = torch.randn(2, 3, 4, 6)
    expected = torch.stack([functional.gaussian_nll(*one) for one in zip(means, targets, strict=True)])
    torch.testing.assert_close(vmap(functional.gaussian_nll)(means, targets), expected)


def test_gradients_of_first_and_second_order() -> None:
    mu, logvar = pair(4, 3)
    torch.testing.assert_close(grad(kl)(mu, logvar), mu / 4)
    torch.testing.assert_close(jacrev(kl, argnums=1)(mu, logvar), torch.expm1(logvar) / 8)
    second = hessian(lambda m: kl(m[None], logvar[:1]))(mu[0])
    torch.testing.assert_close(second, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_mode(dtype: torch.dtype) -> None:
    mu, logvar, tangent, other = (torch.randn(4, 3).to(dtype) for _ in range(4))
    for reduction in ("batchmean", "none"):
        value, found = jvp(
            lambda m, v, r=reduction: functional.kl_standard_normal(m, v, reduction=r), (mu, logvar), (tangent, other)
        )
        per_sample = (mu * tangent + torch.expm1(logvar) / 2 * other).sum(1)
        assert value.dtype == found.dtype == dtype
        torch.testing.assert_close(found, per_sample.sum() / 4 if reduction == "batchmean" else per_sample)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(mu, tangent)
        loss = functional.elbo_loss(dual, logvar, mu, logvar)
        expected = ((mu - logvar) * tangent).sum() / 4
        torch.testing.assert_close(forward_ad.unpack_dual(loss).tangent, expected)


def test_noise_under_vmap_is_as_random_as_it_is_asked_to_be() -> None:
    zeros = torch.zeros(5, 3)
    draws: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "reparameterize": lambda m, v: functional.reparameterize(m[None], v[None])[0],
        "latent": lambda m, v: functional.latent(m[None], v[None]).z[0],
    }
    for draw in draws.values():
        different = vmap(draw, randomness="different")(zeros, zeros)
        assert len(different.unique()) == different.numel()
        same = vmap(draw, randomness="same")(zeros, zeros)
        assert torch.equal(same, same[:1].expand_as(same))
        with pytest.raises(RuntimeError, match="randomness"):
            vmap(draw)(zeros, zeros)
    generators = [torch.Generator().manual_seed(k) for k in range(2)]
    each = vmap(lambda m: functional.reparameterize(m, m, scale="std", generator=generators), randomness="different")(
        torch.ones(5, 2, 3)
    )
    assert len(each.unique()) == each.numel()


def test_the_gradients_of_each_sample_of_a_module() -> None:
    layer = torch.nn.Linear(5, 6, dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return kl(*functional_call(layer, parameters, x[None]).chunk(2, 1))

    found = vmap(grad(loss), in_dims=(None, 0))({k: v.detach() for k, v in parameters.items()}, x)
    for k, sample in enumerate(x):
        expected = torch.autograd.grad(written_out(*layer(sample[None]).chunk(2, 1)), list(parameters.values()))
        for name, e in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name][k], e)


# --- batches of gradients -------------------------------------------------------------------------------------------


def test_jacobians_of_many_gradients_at_once() -> None:
    mu, logvar = pair(4, 3)
    recon_x, x = pair(4, 6)
    functions: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (lambda m: functional.kl_standard_normal(m, logvar, reduction="none"), mu),
        (lambda r: functional.elbo_loss(r, x, mu, logvar, reduction="none"), recon_x),
        (lambda r: functional.elbo_loss(r, x, mu, logvar), recon_x),
        (lambda v: functional.reparameterize(mu, v, noise=mu), logvar),
        (lambda r: functional.laplace_nll(r, x, reduction="none"), recon_x),
    ]
    for function, at in functions:
        torch.testing.assert_close(jacobian(function, at, vectorize=True), jacobian(function, at))


# --- tracing --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_programs_of_torch_jit_trace_compute_what_was_traced() -> None:
    mu, logvar = pair(8, 4)
    recon_x, x = pair(8, 6)
    cases: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (functional.kl_standard_normal, (mu, logvar)),
        (functional.kl_normal, (mu, logvar, logvar, mu)),
        (functional.gaussian_nll, (recon_x, x)),
        (functional.elbo_loss, (recon_x, x, mu, logvar)),
        (lambda *t: functional.elbo_loss(*t, reduction=("mean", "batchmean")), (recon_x, x, mu, logvar)),
        (lambda r, t: functional.laplace_nll(r, t, weight=x[0].square(), reduction="weighted_mean"), (recon_x, x)),
        (
            lambda *t: functional.elbo_loss(*t, reduction="weighted_mean", weight=x[0].square()),
            (recon_x, x, mu, logvar),
        ),
        (lambda a, b: functional.gaussian_nll_loss(a, b, 1.0), (recon_x, x)),
        (lambda p: DiagonalGaussianDistribution(p).kl(reduction="mean"), (torch.randn(8, 4, 2, 2),)),
        (lambda m, v, n: functional.reparameterize(m, v, noise=n), (mu, logvar, mu)),
    ]
    for function, inputs in cases:
        traced = torch.jit.trace(function, inputs, check_trace=False)
        others = tuple(torch.cat([t * 2, t[:3]]) for t in inputs)  # of another batch size
        torch.testing.assert_close(traced(*others), function(*others))
        doubles = tuple(t.double() for t in others)
        exact = torch.jit.trace(function, tuple(t.double() for t in inputs), check_trace=False)(*doubles)
        torch.testing.assert_close(exact, function(*doubles), rtol=1e-13, atol=0)
    drawn = torch.jit.trace(lambda m, v: functional.latent(m, v).z, (mu, logvar), check_trace=False)
    torch.manual_seed(3)
    first, second = drawn(mu, logvar), drawn(mu, logvar)
    assert not (first == second).any()
    torch.manual_seed(3)
    torch.testing.assert_close(drawn(mu, logvar), first)  # on a GPU the third run is in code of its compiler's own


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch's own
def test_compiled_transforms() -> None:
    mu, logvar = pair(4, 3)
    functions: list[Callable[[Tensor], Tensor]] = [
        grad(lambda m: kl(m, logvar)),
        vmap(lambda m: kl(m[None], logvar[:1])),
        vmap(grad(lambda m: kl(m[None], logvar[:1]))),
        lambda m: jvp(lambda m: kl(m, logvar), (m,), (logvar,))[1],
        hessian(lambda m: kl(m, logvar)),
        jacrev(lambda m: functional.elbo_loss(m, logvar, m, logvar, reduction="none")),
        lambda m: kl(m, logvar),
    ]
    for function in functions:
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(function, backend="eager")(mu), function(mu))


@pytest.mark.slow
def test_each_draw_of_a_compiled_program_is_one_of_its_own() -> None:
    """A compiler that takes two calls of an operator for one would have all latents of a program follow one noise."""
    mu, logvar = torch.randn(4, 3, requires_grad=True), torch.zeros(4, 3)

    def draws(mu: Tensor, logvar: Tensor) -> list[Tensor]:
        first, second = (functional.latent(mu, logvar).z for _ in range(2))
        return [first, second, functional.reparameterize(mu[:2], logvar[:2]), functional.reparameterize(mu, logvar)]

    compiled = torch.compile(draws, backend="aot_eager", fullgraph=True)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            torch.manual_seed(3)
            expected = draws(mu, logvar)
            torch.manual_seed(3)
            for found, z in zip(compiled(mu, logvar), expected, strict=True):
                torch.testing.assert_close(found, z)
    assert not torch.equal(expected[0], expected[1])


@pytest.mark.parametrize("needed", ["all", "data", "beta", "weight", "latent_weight", "none of those before"])
@pytest.mark.parametrize("before", ["none", "two"])
def test_traced_programs_make_the_gradients_that_their_operands_need(needed: str, before: str) -> None:
    """Whatever those needed that they were traced with."""
    operands = {
        **dict(zip(("recon_x", "x", "recon_logvar"), torch.randn(3, 5, 4), strict=True)),
        **dict(zip(("mu", "logvar"), torch.randn(2, 5, 2), strict=True)),
        "beta": torch.tensor(0.7),
        "weight": torch.rand(5, 4),
        "latent_weight": torch.rand(5, 2),
    }
    groups = {
        "all": list(operands),
        "data": ["x"],
        "none of those before": ["recon_logvar", "logvar"],
    }
    wanted = groups.get(needed, [needed])

    def loss(*values: Tensor) -> Tensor:
        given = dict(zip(operands, values, strict=True))
        first = [given.pop(name) for name in ("recon_x", "x", "mu", "logvar")]
        return functional.elbo_loss(*first, **given, reduction="weighted_mean")

    def like(names: list[str]) -> list[Tensor]:
        return [t.clone().requires_grad_(name in names) for name, t in operands.items()]

    program = make_fx(loss)(*like(["recon_x", "mu"] if before == "two" else []))
    for run, values in ((program, like(wanted)), (loss, like(wanted))):
        run(*values).backward()
        grads = [t.grad for t in values]
        if run is program:
            found = grads
    assert [g is not None for g in found] == [name in wanted for name in operands]
    for f, g in zip(found, grads, strict=True):
        assert f is None or g is not None
        if f is not None:
            torch.testing.assert_close(f, g)


def test_gradients_have_no_derivative_unless_it_is_asked_for() -> None:
    mu, logvar, noise = torch.randn(3, 4, 3)
    for t in (mu, noise):
        t.requires_grad_()
    kl = functional.latent(mu, logvar, noise=noise, estimator="sample").kl
    first, of_noise = torch.autograd.grad(kl.sum(), (mu, noise), retain_graph=True)
    assert not first.requires_grad
    assert not of_noise.requires_grad
    terms = torch.stack(functional.elbo_loss(mu, torch.zeros(4, 3), *torch.zeros(2, 4, 3), return_terms=True))
    assert not torch.autograd.grad(terms, mu, torch.eye(3), is_grads_batched=True)[0].requires_grad
    assert all(g.requires_grad for g in torch.autograd.grad(kl.sum(), (mu, noise), create_graph=True))


def test_a_prior_that_took_no_part_has_no_gradient() -> None:
    mu, prior = torch.randn(2, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    for estimator in ("analytic", "sample"):
        z, kl = functional.latent(mu, torch.zeros(2, 3), prior, 0.0, estimator=estimator)
        assert torch.autograd.grad(z.sum(), (mu, prior), allow_unused=True, retain_graph=True)[1] is None
        assert torch.autograd.grad(z.sum(), prior, allow_unused=True, retain_graph=True) == (None,)
        assert torch.autograd.grad(kl.sum() + z.sum(), prior)[0].abs().sum() > 0


@pytest.mark.slow
def test_a_number_that_changes_at_each_step_does_not_recompile_at_each_step() -> None:
    recon_x, x = pair(8, 6)
    recon_x.requires_grad_()
    mu, logvar = pair(8, 4)
    steps: list[Callable[[float], Tensor]] = [
        lambda b: functional.elbo_loss(recon_x, x, mu, logvar, beta=b),
        lambda b: functional.elbo_loss(recon_x, x, mu, logvar, grad_scale=b, reduction="sum"),
        lambda b: (
            functional.elbo_loss(recon_x, x, mu, logvar, b, prior_mu=-b, prior_logvar=2 * b, return_terms=True).nll
        ),
        lambda b: functional.gaussian_nll(recon_x, x, -b),
        lambda b: functional.gaussian_nll_loss(recon_x, x, b + 0.1),
        lambda b: functional.elbo_loss(recon_x, x, mu, logvar, beta=b, backend="reference"),
    ]
    for step in steps:
        torch._dynamo.reset()
        # (A program of Dynamo's alone, backend="eager", would keep any number.)
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        for k in range(12):  # more than a function may be compiled for
            found, expected = compiled(k / 11 + 0.01), step(k / 11 + 0.01)
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(torch.autograd.grad(found, recon_x), torch.autograd.grad(expected, recon_x))


# --- saved tensors, and tensors changed afterwards ------------------------------------------------------------------


def gradients_of_all(format: torch.memory_format) -> list[Tensor]:
    """Of the latent and of the bound, for operands in that format."""
    shapes = ((2, 3, 4, 5), (2, 3, 4, 5), (2, 4, 3, 2), (2, 4, 3, 2))
    generator = torch.Generator().manual_seed(5)
    device = torch.get_default_device()
    made = [torch.randn(s, generator=generator, device="cpu").to(device) for s in shapes]
    recon_x, x, mu, logvar = (t.contiguous(memory_format=format).requires_grad_() for t in made)
    weights = torch.randn(2, 4, 3, 2, generator=generator, device="cpu").to(device).contiguous(memory_format=format)
    z, divergence = functional.latent(mu, logvar, generator=torch.Generator(device).manual_seed(1))
    total = (z * weights).sum() + divergence.sum()
    for reduction in ("batchmean", "none"):
        total = total + 3 * functional.elbo_loss(recon_x, x, mu, logvar, -0.5, reduction=reduction).sum()
    return list(torch.autograd.grad(total, [recon_x, x, mu, logvar]))


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_hooks_may_give_saved_tensors_back_in_other_strides(format: torch.memory_format) -> None:
    expected = gradients_of_all(format)

    def pack(t: Tensor) -> tuple[Tensor, torch.device]:
        return t.detach().cpu().contiguous(), t.device

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[0].to(packed[1])):
        found = gradients_of_all(format)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


def test_hooks_that_give_back_something_else_do_no_harm() -> None:
    one = torch.ones(())  # on the device of this thread, which is not the backward pass's
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.shape, lambda shape: one.expand(shape)):
        t = [torch.randn(64, 64, requires_grad=True) for _ in range(4)]
        loss = functional.elbo_loss(*t)
    found = torch.autograd.grad(loss * 2, t)
    assert all(g.shape == (64, 64) for g in found)


def test_hooks_that_give_back_views_with_the_other_sign() -> None:
    def unpack(t: Tensor) -> Tensor:
        return torch._neg_view(-t) if t.is_floating_point() else t

    mu, logvar = (torch.randn(6, 5, requires_grad=True) for _ in range(2))
    found = []
    for unpacked in (lambda t: t, unpack):
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpacked):
            z, divergence = functional.latent(mu, logvar)
            nll = functional.gaussian_nll(mu, torch.ones(6, 5), logvar, reduction="none")
        found.append(torch.autograd.grad(z.sum() + divergence.sum() + nll.sum(), (mu, logvar)))
    assert unpack(mu).is_neg()
    torch.testing.assert_close(*found, rtol=0, atol=0)
    beta, kl, noise = torch.ones((), requires_grad=True), torch.ones(6, requires_grad=True), torch.randn(6, 5)
    noise.requires_grad_()
    target = torch.zeros(6, 5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        learned = functional.elbo_loss(mu, target, mu, logvar, beta=beta)
        given = functional.elbo_loss(target, target, None, None, kl=kl, beta=torch.tensor(0.5))
        z = functional.reparameterize(mu, logvar, noise=noise)
    expected = functional.kl_standard_normal(mu, logvar), torch.full((6,), 0.5 / 6), torch.exp(logvar / 2)
    for (value, of), gradient in zip(((learned, beta), (given, kl), (z.sum(), noise)), expected, strict=True):
        torch.testing.assert_close(torch.autograd.grad(value, of)[0], gradient)


@pytest.mark.parametrize("change", [Tensor.double, lambda t: t.t().contiguous().t()], ids=["dtype", "strides"])
def test_parameters_that_are_given_other_data_before_the_backward_pass(change: Callable[[Tensor], Tensor]) -> None:
    """As `Module.to` gives it to them: the calls of steps before it are not those of the new data."""
    for is_changed in (False, True):
        mu, logvar = (torch.nn.Parameter(torch.randn(64, 64)) for _ in range(2))
        z, divergence = functional.latent(mu, logvar)
        total = (z.sum() + divergence.sum()) / 8
        expected = (mu.detach() + 1) / 8
        for parameter in (mu, logvar) if is_changed else ():
            parameter.data = change(parameter.data)
        total.backward()
        assert mu.grad is not None
        torch.testing.assert_close(mu.grad, expected, check_dtype=False)


def test_parameters_that_lose_elements_before_the_backward_pass() -> None:
    for is_changed in (False, True):
        mu, logvar = (torch.nn.Parameter(torch.randn(64, 64)) for _ in range(2))
        divergence = functional.latent(mu, logvar).kl
        if not is_changed:
            divergence.sum().backward()
    mu.data, logvar.data = mu.data[:2, :2].clone(), logvar.data[:2, :2].clone()
    with pytest.raises((RuntimeError, ValueError)):
        divergence.sum().backward()


def test_operands_may_change_once_their_gradients_are_made(target: Target) -> None:
    if target.backend == "reference":
        pytest.skip("the formulas read their operands again")
    w, x = torch.rand(4, 6, requires_grad=True), torch.rand(4, 6)
    recon_x = w * 1
    expected = (recon_x - x).detach() / 4
    loss = functional.gaussian_nll(recon_x, x)
    with torch.no_grad():
        recon_x.clamp_(0, 0.5)
        x.fill_(7)
    loss.backward()
    torch.testing.assert_close(w.grad, expected)
    recon_x = w * 1
    each = functional.gaussian_nll(recon_x, x, reduction="none")  # its gradients are made from the operands
    with torch.no_grad():
        recon_x.clamp_(0, 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        each.sum().backward()


def test_views_with_a_sign_to_come_are_read_with_it() -> None:
    def negated(values: Tensor) -> Tensor:
        view = torch.complex(torch.zeros_like(values), -values).conj().imag
        assert view.is_neg()
        return view

    values = [torch.randn(4, 6, dtype=torch.float64) for _ in range(5)]
    plain, views = ([f(v).requires_grad_() for v in values] for f in (torch.clone, negated))
    for reduction in ("batchmean", "none"):
        found, expected = (functional.elbo_loss(*t, reduction=reduction) for t in (views, plain))
        torch.testing.assert_close(found, expected)
        incoming = torch.rand(expected.shape, dtype=torch.float64)
        for f, e in zip(
            torch.autograd.grad(found, views, negated(incoming)),
            torch.autograd.grad(expected, plain, incoming),
            strict=True,
        ):
            torch.testing.assert_close(f, e)
    half = values[0].half().requires_grad_()  # whose gradients are left to the backward pass
    loss = functional.elbo_loss(half, values[1].half(), *plain[2:4])
    factor = torch.full((), -2.0)
    (found,) = torch.autograd.grad(loss, half, negated(factor), retain_graph=True)
    assert torch.equal(found, torch.autograd.grad(loss, half, factor)[0])
    recon_x, x, mu, logvar, noise = values
    found = functional.reparameterize(negated(mu), negated(logvar), noise=negated(noise))
    torch.testing.assert_close(found, mu + torch.exp(logvar / 2) * noise)
    torch.testing.assert_close(
        functional.gaussian_nll(negated(recon_x), negated(x), negated(logvar)),
        nll_elements(recon_x, x, logvar).sum() / 4,
    )


def test_devices_without_float64_can_sample(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = philox.normal((3, 1001), torch.tensor(7), torch.float32)

    def refused(tensor: Tensor) -> Tensor:
        raise TypeError("no float64 here")

    monkeypatch.setattr(Tensor, "double", refused)
    found = philox.normal((3, 1001), torch.tensor(7), torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# --- packed along any dimension -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [-1, 2, 1, -3])
def test_halves_along_any_dimension(dim: int) -> None:
    packed, x = torch.randn(4, 6, 8, 2, dtype=torch.float64).requires_grad_(), None
    mu, logvar = packed.chunk(2, dim)
    x = torch.randn_like(mu)
    generator = torch.Generator(packed.device)
    z, divergence = functional.latent(packed, None, packed_dim=dim, generator=generator.manual_seed(2))
    noise = functional.reparameterize(
        torch.zeros_like(mu), torch.zeros_like(mu), generator=generator.manual_seed(2), backend="reference"
    )
    expected = [mu + torch.exp(logvar / 2) * noise, kl_elements(mu, logvar).flatten(1).sum(1)]
    for found, e in zip((z, divergence), expected, strict=True):
        torch.testing.assert_close(found, e, rtol=1e-6, atol=1e-6)
    for f, e in zip(
        torch.autograd.grad((z**2).sum() + divergence.sum(), packed),
        torch.autograd.grad((expected[0] ** 2).sum() + expected[1].sum(), packed),
        strict=True,
    ):
        torch.testing.assert_close(f, e, rtol=1e-6, atol=1e-6)
    for reduction in ("batchmean", "none"):
        found = functional.elbo_loss(packed, x, packed, None, None, reduction=reduction, packed_dim=dim)
        exact = nll_elements(mu, x, logvar).flatten(1).sum(1) + kl_elements(mu, logvar).flatten(1).sum(1)
        exact = exact if reduction == "none" else exact.mean()
        torch.testing.assert_close(found, exact)
        torch.testing.assert_close(
            torch.autograd.grad(found.sum(), packed)[0], torch.autograd.grad(exact.sum(), packed, retain_graph=True)[0]
        )
