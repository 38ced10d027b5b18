"""Every operation, forward and backward, against float64, on operands of any shape, strides, dtype and broadcast."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from conftest import Target, kl_elements, nll_elements, reduced
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusedvae import functional

DTYPES = st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64))
TARGET_DTYPES = st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.bool, torch.int32))
REDUCTIONS = st.sampled_from(("batchmean", "sum", "none"))
SHAPES = st.lists(st.sampled_from((0, 1, 2, 3, 5, 9, 17)), min_size=1, max_size=4).map(tuple)
PACKED_SHAPES = st.lists(st.sampled_from((0, 1, 2, 3, 5, 9, 17)), min_size=2, max_size=4).map(tuple)


class Operand(NamedTuple):
    """A tensor, and the same values in float64, in whose graph the exact gradients are found."""

    tensor: Tensor
    exact: Tensor


@st.composite
def operands(draw: st.DrawFn, shape: tuple[int, ...], dtypes: st.SearchStrategy[torch.dtype] = DTYPES) -> Operand:
    """Fresh values in memory that has its dimensions in any order, with gaps, or expanded."""
    dtype = draw(dtypes)
    order = draw(st.permutations(range(len(shape)))) if draw(st.booleans()) else range(len(shape))
    sizes = [shape[d] for d in order]
    starts, steps = [0] * len(sizes), [1] * len(sizes)
    for k in range(len(sizes)):
        kind = draw(st.integers(0, 9))
        if kind == 0:
            starts[k] = draw(st.integers(1, 3))
        elif kind == 1:
            steps[k] = 2
        elif kind == 2 and sizes[k]:
            steps[k] = 0
    room = [1 if step == 0 else start + size * step for start, step, size in zip(starts, steps, sizes, strict=True)]
    generator = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(room, generator=generator)
    memory = (values.clamp(0, 1) * 255 if not dtype.is_floating_point else values).to(dtype)
    for k, (start, step) in enumerate(zip(starts, steps, strict=True)):
        memory = memory.narrow(k, start, room[k] - start)
        memory = memory.expand([*memory.shape[:k], sizes[k], *memory.shape[k + 1 :]]) if step == 0 else memory
        memory = memory[(slice(None),) * k + (slice(None, None, step or 1),)]
    view = memory.permute([list(order).index(d) for d in range(len(shape))])
    assert view.shape == shape
    tensor = view.detach()
    wanted = dtype.is_floating_point and draw(st.integers(0, 3)) > 0
    return Operand(tensor.requires_grad_(wanted), tensor.detach().double().requires_grad_(wanted))


@st.composite
def spreads(draw: st.DrawFn, shape: tuple[int, ...]) -> Operand | float:
    """A log-variance that broadcasts to the shape."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from((0.0, -1.5, 0.7)))
    sizes = [1 if draw(st.booleans()) else size for size in shape]
    return draw(operands(tuple(sizes[draw(st.integers(0, len(sizes))) :])))


def check(
    found: Tensor | tuple[Tensor, ...],
    expected: Tensor | tuple[Tensor, ...],
    inputs: list[Operand],
) -> None:
    """Values and, of a sum of them with unlike weights, gradients: to the rounding of their own dtype."""
    founds, expecteds = ((v,) if isinstance(v, Tensor) else v for v in (found, expected))
    coarsest = max(
        [torch.finfo(t.dtype).eps for t in (*founds, *(o.tensor for o in inputs)) if t.dtype.is_floating_point]
    )
    for f, e in zip(founds, expecteds, strict=True):
        assert f.shape == e.shape
        compare(f, e, coarsest)
    wanting = [o for o in inputs if o.tensor.requires_grad]
    if not wanting:
        assert not any(f.requires_grad for f in founds)
        return
    weighted = [
        sum((v.double() * weights_like(v)).sum() for v in values if v.requires_grad) for values in (founds, expecteds)
    ]
    grads = torch.autograd.grad(weighted[0], [o.tensor for o in wanting])
    exact = torch.autograd.grad(weighted[1], [o.exact for o in wanting])
    for operand, g, e in zip(wanting, grads, exact, strict=True):
        assert g.shape == operand.tensor.shape
        assert g.dtype == operand.tensor.dtype
        compare(g, e, max(coarsest, torch.finfo(g.dtype).eps))


def weights_like(values: Tensor) -> Tensor:
    return torch.linspace(0.5, 2.0, values.numel(), dtype=torch.float64).view(values.shape)


def compare(found: Tensor, exact: Tensor, eps: float) -> None:
    """Within some roundings of each value, or of the largest: what cancels in a sum was as large as that. What the
    dtype cannot hold is as large as can be."""
    largest = torch.finfo(found.dtype).max
    found, exact = found.double().clamp(-largest, largest), exact.clamp(-largest, largest)
    finite = exact[exact.isfinite()]
    scale = max(finite.abs().max().item() if finite.numel() else 0.0, 1.0)
    torch.testing.assert_close(found, exact, rtol=12 * eps, atol=8 * eps * scale, equal_nan=True)


@given(data=st.data(), reduction=REDUCTIONS, full=st.booleans(), terms=st.booleans(), packed=st.booleans())
def test_elbo_loss(target: Target, data: st.DataObject, reduction: str, full: bool, terms: bool, packed: bool) -> None:
    shape = data.draw(PACKED_SHAPES if packed else SHAPES, "shape")
    latent = (shape[0], *data.draw(SHAPES, "latent shape"))
    x = data.draw(operands(shape, st.one_of(DTYPES, TARGET_DTYPES)), "x")
    mu, logvar = data.draw(operands(latent), "mu"), data.draw(operands(latent), "logvar")
    inputs = [x, mu, logvar]
    if packed:
        recon = data.draw(operands((shape[0], 2 * shape[1], *shape[2:])), "packed recon_x")
        inputs.append(recon)
        mean, spread = recon.exact.chunk(2, 1) if shape[1] else (recon.exact, recon.exact)
        found_spread = None
    else:
        recon = data.draw(operands(shape), "recon_x")
        inputs.append(recon)
        mean = recon.exact
        drawn = data.draw(spreads(shape), "recon_logvar")
        if isinstance(drawn, float):
            spread = found_spread = drawn
        else:
            inputs.append(drawn)
            spread, found_spread = drawn.exact, drawn.tensor
    found = functional.elbo_loss(
        recon.tensor, x.tensor, mu.tensor, logvar.tensor, found_spread,
        beta=0.7, full=full, reduction=reduction, return_terms=terms, backend=target.backend,
    )  # fmt: skip
    nll = reduced(nll_elements(mean, x.exact, spread, full).expand(shape), reduction)
    kl = reduced(kl_elements(mu.exact, logvar.exact), reduction)
    loss = nll + 0.7 * kl
    check(tuple(found) if terms else found, (loss, nll, kl) if terms else loss, inputs)


@given(data=st.data(), reduction=REDUCTIONS, full=st.booleans())
def test_gaussian_nll(target: Target, data: st.DataObject, reduction: str, full: bool) -> None:
    shape = data.draw(SHAPES, "shape")
    recon, x = data.draw(operands(shape), "recon_x"), data.draw(operands(shape, st.one_of(DTYPES, TARGET_DTYPES)), "x")
    drawn = data.draw(spreads(shape), "recon_logvar")
    spread, exact = (drawn, drawn) if isinstance(drawn, float) else drawn
    found = functional.gaussian_nll(
        recon.tensor, x.tensor, spread, full=full, reduction=reduction, backend=target.backend
    )
    expected = reduced(nll_elements(recon.exact, x.exact, exact, full).expand(shape), reduction)
    check(found, expected, [recon, x, *([] if isinstance(drawn, float) else [drawn])])


@given(data=st.data(), reduction=REDUCTIONS)
def test_kl_standard_normal(target: Target, data: st.DataObject, reduction: str) -> None:
    shape = data.draw(SHAPES, "shape")
    mu, logvar = data.draw(operands(shape), "mu"), data.draw(operands(shape), "logvar")
    found = functional.kl_standard_normal(mu.tensor, logvar.tensor, reduction=reduction, backend=target.backend)
    check(found, reduced(kl_elements(mu.exact, logvar.exact), reduction), [mu, logvar])


@given(data=st.data())
def test_reparameterize_with_noise(target: Target, data: st.DataObject) -> None:
    shape = data.draw(SHAPES, "shape")
    mu, logvar, noise = (data.draw(operands(shape), name) for name in ("mu", "logvar", "noise"))
    found = functional.reparameterize(mu.tensor, logvar.tensor, noise=noise.tensor, backend=target.backend)
    assert found.dtype == torch.promote_types(mu.tensor.dtype, logvar.tensor.dtype)
    check(found, mu.exact + torch.exp(logvar.exact / 2) * noise.exact, [mu, logvar, noise])


@given(data=st.data(), packed=st.booleans(), seed=st.integers(0, 2**63 - 1))
def test_latent(target: Target, data: st.DataObject, packed: bool, seed: int) -> None:
    shape = data.draw(PACKED_SHAPES if packed else SHAPES, "shape")
    if packed:
        moments = data.draw(operands((shape[0], 2 * shape[1], *shape[2:])), "moments")
        inputs, arguments = [moments], (moments.tensor, None)
        mu, logvar = moments.exact.split(max(shape[1], 1), 1) if shape[1] else (moments.exact, moments.exact)
    else:
        inputs = [data.draw(operands(shape), "mu"), data.draw(operands(shape), "logvar")]
        arguments = tuple(o.tensor for o in inputs)
        mu, logvar = (o.exact for o in inputs)
    z, kl = functional.latent(
        *arguments, generator=torch.Generator(target.device).manual_seed(seed), backend=target.backend
    )
    zeros = torch.zeros(shape, dtype=torch.float64)
    noise = functional.reparameterize(
        zeros, zeros, generator=torch.Generator(target.device).manual_seed(seed), backend=target.backend
    )
    expected = mu + torch.exp(logvar / 2) * noise, reduced(kl_elements(mu, logvar), "none")
    check((z, kl), expected, inputs)


# --- operands that are computed from each other -----------------------------------------------------------------------

RELATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # of two that are there already: values stay small
    "itself": lambda t, _: t,
    "a view": lambda t, _: t.view_as(t),
    "detached": lambda t, _: t.detach(),
    "tanh": lambda t, _: torch.tanh(t),
    "mean": lambda t, u: 0.5 * (t + u),
    "product": lambda t, u: torch.tanh(t) * u,
    "half of a packed one": lambda t, u: torch.cat([t, u], 1).chunk(2, 1)[1],
    "every other element": lambda t, u: torch.stack([t, u], -1)[..., 0],
    "expanded": lambda t, _: t.mean(0, keepdim=True).expand_as(t),
    "in another order": lambda t, _: (1.5 * t).transpose(0, -1).contiguous().transpose(0, -1),
}
Plan = list[tuple[str, int, int]]
PLANS = st.lists(st.tuples(st.sampled_from(list(RELATIONS)), *[st.integers(0, 9)] * 2), min_size=8, max_size=8)


def relatives(plan: Plan, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """Tensors of one shape, each computed from two of the leaves and those before it."""
    found = list(leaves)
    for name, first, second in plan:
        found.append(RELATIONS[name](found[first % len(found)], found[second % len(found)]))
    return found[len(leaves) :]


def derivatives(function: Callable[..., Tensor], leaves: list[Tensor], way: str) -> list[Tensor]:
    """The value, and gradients of it or, of the second order, of what gradients make."""
    if way == "torch.func":
        grads, value = torch.func.grad_and_value(function, tuple(range(len(leaves))))(*[t.detach() for t in leaves])
        return [value, *grads]
    value = function(*leaves)
    if way == "batched":
        factors = torch.tensor([1.0, -3.0], dtype=value.dtype)
        grads = torch.autograd.grad(value, leaves, factors, is_grads_batched=True)
        return [value, *[-g[1] / 3 for g in grads]]
    if way == "twice":
        torch.autograd.grad(value, leaves, retain_graph=True)
    grads = torch.autograd.grad(value, leaves, create_graph=way == "second order")
    if way == "second order":
        return [value, *grads, *torch.autograd.grad(sum(g.sin().sum() for g in grads), leaves)]
    return [value, *grads]


@settings(max_examples=150)
@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=3).map(tuple),
    dtype=st.sampled_from((torch.float64, torch.float64, torch.float32)),
    plan=PLANS,
    reduction=REDUCTIONS,
    used=st.sets(st.integers(0, 2), min_size=1),
    way=st.sampled_from(("plain", "twice", "second order", "batched", "torch.func")),
)
def test_operands_computed_from_each_other(
    target: Target,
    data: st.DataObject,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    plan: Plan,
    reduction: str,
    used: set[int],
    way: str,
) -> None:
    """As recon_x is from mu in every autoencoder: no derivative by one is another's too, or is lost."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(data.draw(st.integers(0, 2**31)))
    first, second, x, noise = (torch.randn(shape, dtype=dtype, generator=generator) for _ in range(4))
    learned_beta, is_packed, has_weight = (data.draw(st.booleans()) for _ in range(3))

    def total(values: tuple[Tensor, ...], z: Tensor, kl: Tensor, leaves: tuple[Tensor, ...]) -> Tensor:
        found = sum((k + 1.0) * values[k].sum() for k in used) + (z * z).mean() + kl.square().mean()
        return found + sum(leaf.square().sum() for leaf in leaves)  # each leaf has a gradient, and that another

    def fused(*leaves: Tensor) -> Tensor:
        mu, logvar, prior_mu, prior_logvar, mean, spread, mask, other = relatives(plan, leaves)
        z, kl = functional.latent(mu, logvar, prior_mu, prior_logvar, noise=noise, backend=target.backend)
        recon = (torch.cat([z, spread], 1), None) if is_packed else (z, spread)
        values = functional.elbo_loss(
            recon[0], x, mean, other, recon[1], beta=mean.mean() if learned_beta else 0.7,
            weight=mask.detach() > -1.0 if has_weight else None, reduction=reduction, return_terms=True,
            backend=target.backend,
        )  # fmt: skip
        return total(values, z, kl, leaves)

    def exact(*leaves: Tensor) -> Tensor:
        mu, logvar, prior_mu, prior_logvar, mean, spread, mask, other = relatives(plan, leaves)
        z, precision = mu + torch.exp(logvar / 2) * noise, torch.exp(-prior_logvar)
        difference = logvar - prior_logvar
        kl = 0.5 * (torch.expm1(difference) - difference + (mu - prior_mu) ** 2 * precision)
        nll = nll_elements(z, x, spread)
        nll = torch.where(mask > -1.0, nll, 0.0) if has_weight else nll
        nll, divergence = reduced(nll, reduction), reduced(kl_elements(mean, other), reduction)
        loss = nll + (mean.mean() if learned_beta else 0.7) * divergence
        return total((loss, nll, divergence), z, reduced(kl, "none"), leaves)

    found = derivatives(fused, [t.clone().requires_grad_() for t in (first, second)], way)
    expected = derivatives(exact, [t.double().requires_grad_() for t in (first, second)], way)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-3
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.double(), e, rtol=tolerance, atol=tolerance * max(e.abs().max().item(), 1.0))
