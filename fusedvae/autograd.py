"""Gradients of the operators, over whichever backend ran the forward pass.

The rules (see the docstrings of `_scaled` and `_Elbo`): a scalar objective's gradients are made in the forward pass,
up to the incoming factor, which only a kernel looks at; values a sample and float16 gradients are made in the
backward pass instead; a second derivative goes through the reference formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backend
from .backend import reference
from .ops import _library, unpack

_ops = torch.ops.fusedvae
_Grads = tuple[Tensor | None, ...]


def _register(name: str, function: type[torch.autograd.Function]) -> None:
    """Make ``function`` the autograd formula of the operator: a drop to it where a gradient is wanted, else past it."""
    operator = getattr(_ops, name).default
    returns_list = len(operator._schema.returns) == 1 and "List" in str(operator._schema.returns[0].type)

    def kernel(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            out = function.apply(*args)
            return list(out) if returns_list else out
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    _library.impl(name, kernel, "Autograd")


def _second_order(formula: Callable[..., Any], inputs: list[Tensor | None], grads: list[Tensor | None]) -> _Grads:
    """Differentiable gradients of a reference formula, None for the inputs that need none.

    ``formula`` takes the inputs and returns as many tensors as there are incoming ``grads``.
    """
    with torch.enable_grad():
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        outputs = formula(*inputs)
        pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True
            )
        )
    return tuple(next(found) if t is not None and t.requires_grad else None for t in inputs)


def _plain(*tensors: Tensor | None) -> bool:
    """Whether these are real tensors, not the stand-ins of a tracer, whose memory no kernel may touch."""
    return all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def _scaled(grads: list[Tensor], factor: Tensor, backend_name: str) -> list[Tensor]:
    """The gradients made in the forward pass, times the incoming factor.

    Nobody reads the factor on the host. In place, by a kernel that returns at once when the factor is 1, unless
    the graph is kept: then a later backward pass needs the buffers as they are. Traced programs multiply, which
    their compiler fuses into whatever comes next.
    """
    if not grads:
        return grads
    if not _plain(factor, *grads) or torch._C._autograd._get_current_graph_task_keep_graph():
        return [g * factor for g in grads]
    backend.kernels(backend_name).scale_(grads, factor)
    return grads


def _sum(*terms: Tensor | None) -> Tensor | None:
    present = [t for t in terms if t is not None]
    return sum(present[1:], present[0]) if present else None


class _Latent(torch.autograd.Function):
    """z and the per-sample KL; the noise is made again from the seed."""

    @staticmethod
    def forward(ctx: Any, mu: Tensor, logvar: Tensor | None, seed: Tensor, kl_dtype: torch.dtype, name: str) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            z, kl = _ops.latent.default(mu, logvar, seed, kl_dtype, name)
        ctx.save_for_backward(mu, logvar, seed)
        ctx.name = name
        ctx.set_materialize_grads(False)
        return z, kl

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None) -> Any:
        mu, logvar, seed = ctx.saved_tensors
        grads = _latent_gradients(ctx.name, mu, logvar, seed, None, grad_z, grad_kl)
        return (*grads, None, None, None)


class _Reparameterize(torch.autograd.Function):
    """z alone, its noise from a seed or given."""

    @staticmethod
    def forward(
        ctx: Any, mu: Tensor, logvar: Tensor | None, seed: Tensor | None, noise: Tensor | None, name: str
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            z = _ops.reparameterize.default(mu, logvar, seed, noise, name)
        ctx.save_for_backward(mu, logvar, seed, noise)
        ctx.name = name
        return z

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor) -> Any:
        mu, logvar, seed, noise = ctx.saved_tensors
        grad_noise = None
        if noise is not None and noise.requires_grad:
            # z is linear in the noise, and hardly anybody asks: the formula will do.
            _, l = unpack(mu, logvar)
            grad_noise = (grad_z * torch.exp(0.5 * l)).to(noise.dtype)
        grads = _latent_gradients(ctx.name, mu, logvar, seed, noise, grad_z, None)
        return (*grads, None, grad_noise, None)


def _latent_gradients(
    name: str,
    mu: Tensor,
    logvar: Tensor | None,
    seed: Tensor | None,
    noise: Tensor | None,
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
) -> _Grads:
    """Gradients of mu and logvar (None where it is packed into mu)."""
    if grad_z is None and grad_kl is None:
        return None, None
    if torch.is_grad_enabled():
        mean, _ = unpack(mu, logvar)
        if noise is None and seed is not None:
            noise = _ops.normal.default(list(mean.shape), seed, reference.working_dtype(mu, logvar), name)

        def formula(mu: Tensor, logvar: Tensor | None) -> tuple[Tensor, ...]:
            m, l = unpack(mu, logvar)
            z = reference.sample(m, l, noise) if noise is not None else m
            return z, reference.reduce(reference.kl_standard_normal(m, l), "sample")

        return _second_order(formula, [mu, logvar], [grad_z, grad_kl])
    grads = _ops.latent_backward.default(mu, logvar, seed, noise, grad_z, grad_kl, name)
    return grads[0], None if logvar is None else grads[1]


class _Elbo(torch.autograd.Function):
    """loss = nll + beta * kl and its terms.

    Scalars arrive with their gradients made, and backward scales those. Per-sample and per-element values would
    move more that way (9N elements against 8N), and float16 gradients made before the incoming factor (a loss
    scaler's 65536) would underflow: those are made in backward, from the operands.
    """

    @staticmethod
    def forward(
        ctx: Any,
        recon_x: Tensor | None,
        x: Tensor | None,
        spread: Tensor | None,
        spread_value: float | None,
        mu: Tensor | None,
        logvar: Tensor | None,
        kl_in: Tensor | None,
        beta: Tensor | None,
        beta_value: float,
        is_variance: bool,
        eps: float,
        full: bool,
        reduction: str,
        dtype: torch.dtype,
        terms: bool,
        needed: list[bool],
        name: str,
    ) -> Any:
        operands = (recon_x, x, spread, mu, logvar)
        deferred = reduction in ("sample", "element") or any(
            t is not None and need and t.dtype == torch.float16 for t, need in zip(operands, needed, strict=True)
        )
        made = [False] * 5 if deferred else list(needed)
        with torch._C._AutoDispatchBelowAutograd():
            out = _ops.elbo.default(
                recon_x, x, spread, spread_value, mu, logvar, kl_in, beta, beta_value,
                is_variance, eps, full, reduction, dtype, terms, made, name,
            )  # fmt: skip
        values, grads = out[: 3 if terms else 1], out[3 if terms else 1 :]
        ctx.save_for_backward(*operands, kl_in, beta, values[-1] if terms else None, *grads)
        ctx.options = (spread_value, beta_value, is_variance, eps, full, reduction, terms, needed, made, name)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*grads)
        return (*values, *grads)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> Any:
        spread_value, beta_value, is_variance, eps, full, reduction, terms, needed, made, name = ctx.options
        recon_x, x, spread, mu, logvar, kl_in, beta, kl, *grads = ctx.saved_tensors
        g_loss, g_nll, g_kl = (*incoming[:3],) if terms else (incoming[0], None, None)
        trailing = (None,) * 9  # beta_value and the options
        if g_loss is None and g_nll is None and g_kl is None:
            return (None,) * 17

        if torch.is_grad_enabled():

            def formula(*t: Tensor | None) -> tuple[Tensor, ...]:
                recon_x, x, spread, mu, logvar, kl_in, beta = t
                weight = beta_value if beta is None else beta
                return elbo_formula(
                    recon_x, x, spread if spread is not None else spread_value, mu, logvar, kl_in, weight,
                    is_variance, eps, full, reduction,
                )  # fmt: skip

            inputs = [recon_x, x, spread, mu, logvar, kl_in, beta]
            found = _second_order(formula, inputs, [g_loss, g_nll, g_kl])
            return (*found[:3], None, *found[3:], *trailing)

        to_nll = _sum(g_loss, g_nll)
        weight = beta_value if beta is None else beta
        to_kl = _sum(None if g_loss is None else g_loss * weight, g_kl)
        result: list[Tensor | None] = [None] * 5  # recon_x, x, spread, mu, logvar
        slots = [k for k in range(5) if made[k]]
        buffers = dict(zip(slots, grads, strict=True))

        if recon_x is not None and to_nll is not None and any(needed[:3]):
            wanted = [k for k in range(3) if needed[k]]
            if any(made):
                found = _scaled([buffers[k] for k in wanted], to_nll, name)
            else:
                scaled = to_nll * reference.scale_of(reduction, x.shape)
                found = _ops.nll_backward.default(
                    recon_x, x, spread, spread_value, scaled, is_variance, eps, needed[:3], name
                )
            for k, g in zip(wanted, found, strict=True):
                result[k] = g
        if mu is not None and to_kl is not None and any(needed[3:]):
            wanted = [k for k in (3, 4) if needed[k]]
            if any(made) and g_kl is None and g_loss is not None:
                found = _scaled([buffers[k] for k in wanted], g_loss, name)
            else:
                each = (to_kl * reference.scale_of(reduction, mu.shape)).expand(mu.shape[0])
                both = _ops.latent_backward.default(mu, logvar, None, None, None, each, name)
                found = [both[k - 3] for k in wanted]
            for k, g in zip(wanted, found, strict=True):
                result[k] = g
        grad_kl_in = grad_beta = None
        if kl_in is not None and ctx.needs_input_grad[6] and to_kl is not None:
            count = x.shape if x is not None else kl_in.shape
            grad_kl_in = (to_kl * reference.scale_of(reduction, count)).to(kl_in.dtype).expand_as(kl_in)
        if beta is not None and ctx.needs_input_grad[7] and g_loss is not None:
            grad_beta = (g_loss * kl).sum().to(beta.dtype)
        return (*result[:3], None, *result[3:], grad_kl_in, grad_beta, *trailing)


def elbo_formula(
    recon_x: Tensor | None,
    x: Tensor | None,
    spread: Tensor | float | None,
    mu: Tensor | None,
    logvar: Tensor | None,
    kl_in: Tensor | None,
    beta: Tensor | float,
    is_variance: bool,
    eps: float,
    full: bool,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, nll, kl) by the reference formulas; operands as the operator takes them. Absent terms are 0."""
    nll = kl = None
    if recon_x is not None and x is not None:
        if spread is None:
            recon_x, spread = unpack(recon_x, None)
        if is_variance:
            elements = reference.gaussian_nll_of_variance(recon_x, x, spread, eps)
        else:
            elements = reference.gaussian_nll(recon_x, x, spread)
        if full:
            elements = elements + reference.HALF_LOG_2PI
        nll = reference.reduce(elements, reduction)
    if mu is not None:
        kl = reference.reduce(reference.kl_standard_normal(*unpack(mu, logvar)), reduction)
    elif kl_in is not None:
        kl = kl_in if reduction == "sample" else kl_in.sum() * reference.scale_of(reduction, kl_in.shape)
    zero = torch.zeros_like(nll if nll is not None else kl)  # type: ignore[arg-type]
    loss = zero if nll is None else nll
    if kl is not None:
        loss = loss + beta * kl if nll is not None else beta * kl
    return loss, zero if nll is None else nll, zero if kl is None else kl


_register("latent", _Latent)
_register("reparameterize", _Reparameterize)
_register("elbo", _Elbo)
