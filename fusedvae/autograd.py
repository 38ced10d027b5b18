"""Gradients of the operators, over whichever backend ran the forward pass.

The rules (see the docstrings of `_scaled` and `_Elbo`): a scalar objective's gradients are made in the forward pass,
up to the incoming factor, which only a kernel looks at; values a sample and float16 gradients are made in the
backward pass instead; a second derivative goes through the reference formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend, ops
from .backend import Memo, reference
from .layout import described
from .ops import positions, unpack

_Grads = tuple[Tensor | None, ...]


def _second_order(formula: Callable[..., Any], inputs: list[Any], grads: list[Tensor | None]) -> _Grads:
    """Differentiable gradients of a reference formula, None for the inputs that need none.

    ``formula`` takes the inputs and returns as many tensors as there are incoming ``grads``.
    """
    with torch.enable_grad():
        wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
        outputs = formula(*inputs)
        pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True
            )
        )
    return tuple(next(found) if isinstance(t, Tensor) and t.requires_grad else None for t in inputs)


def _scaled(
    grads: Sequence[Tensor], factor: Tensor | None, in_place: bool, backend_name: str, memo: Memo
) -> Sequence[Tensor]:
    """The gradients made in the forward pass, times the incoming factor.

    Nobody reads the factor on the host. In place, by a kernel that returns at once when the factor is 1, unless
    the graph is kept: then a later backward pass needs the buffers as they are.
    """
    assert factor is not None
    if not in_place or torch._C._autograd._get_current_graph_task_keep_graph():
        return [g * factor for g in grads]
    backend.kernels(backend_name).scale_(grads, factor, memo)
    return grads


def _sum(*terms: Tensor | None) -> Tensor | None:
    present = [t for t in terms if t is not None]
    return sum(present[1:], present[0]) if present else None


class _Latent(torch.autograd.Function):
    """z and the per-sample KL; the noise is made again from the seed."""

    @staticmethod
    def forward(
        ctx: Any, memo: Memo | None, options: tuple[Any, ...], mu: Tensor, logvar: Tensor | None, seed: Tensor
    ) -> Any:
        z, kl = ops.latent.below_autograd(memo, options, mu, logvar, seed)
        ctx.save_for_backward(mu, logvar, seed)
        ctx.memo, ctx.name = memo, options[-1]
        ctx.set_materialize_grads(False)
        return z, kl

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None) -> Any:
        mu, logvar, seed = ctx.saved_tensors
        grads = _latent_gradients(ctx.memo, ctx.name, mu, logvar, seed, None, grad_z, grad_kl)
        return (None, None, *grads, None)


class _Reparameterize(torch.autograd.Function):
    """z alone, its noise from a seed or given."""

    @staticmethod
    def forward(
        ctx: Any,
        memo: Memo | None,
        options: tuple[Any, ...],
        mu: Tensor,
        logvar: Tensor | None,
        seed: Tensor | None,
        noise: Tensor | None,
    ) -> Tensor:
        z = ops.reparameterize.below_autograd(memo, options, mu, logvar, seed, noise)
        ctx.save_for_backward(mu, logvar, seed, noise)
        ctx.memo, ctx.name = memo, options[-1]
        return z

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor) -> Any:
        mu, logvar, seed, noise = ctx.saved_tensors
        grad_noise = None
        if noise is not None and noise.requires_grad:
            # z is linear in the noise, and hardly anybody asks: the formula will do.
            _, log_variance = unpack(mu, logvar)
            grad_noise = (grad_z * torch.exp(0.5 * log_variance)).to(noise.dtype)
        grads = _latent_gradients(ctx.memo, ctx.name, mu, logvar, seed, noise, grad_z, None)
        return (None, None, *grads, None, grad_noise)


def _latent_gradients(
    memo: Memo | None,
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
            dtype = reference.working_dtype(mu, logvar)
            noise = ops.normal(list(mean.shape), seed, options=(dtype, name))

        def formula(mu: Tensor, logvar: Tensor | None) -> tuple[Tensor, ...]:
            mu, logvar = unpack(mu, logvar)
            z = reference.sample(mu, logvar, noise) if noise is not None else mu
            return z, reference.reduce(reference.kl_standard_normal(mu, logvar), "sample")

        return _second_order(formula, [mu, logvar], [grad_z, grad_kl])
    operands, options = (mu, logvar, seed, noise, grad_z, grad_kl), (name,)
    if memo is None or ops.is_watched():
        grads = ops.latent_backward(*operands, options=options)
    else:
        # What comes in may be laid out otherwise than the last time, though the operands are not.
        own = memo.setdefault((described(grad_z), described(grad_kl)), {})
        grads = ops.latent_backward.kernel(own, options, *operands)
    return grads[0], None if logvar is None else grads[1]


_OPERANDS, _MU, _KL_IN, _BETA = 7, 3, 5, 6
"""How many operands an objective has, and positions among them."""
_REDUCTION, _TERMS, _NEEDED = 3, 5, 6
"""Positions among its options."""


class _ElboPlan(NamedTuple):
    """What is worked out once of an objective's derivative, for operands of some kinds and dtypes."""

    options_in_forward: tuple[Any, ...]
    """The options with those gradients needed that are made in the forward pass: all of them or none."""
    made: list[int]
    """The operands that these are of."""
    is_all: bool
    """Whether these are all that the loss has."""
    tensors: list[int]
    numbers: list[int]
    """The operands that are tensors, and those that are numbers."""


def _elbo_plan(options: tuple[Any, ...], operands: tuple[Any, ...]) -> _ElboPlan:
    needed = options[_NEEDED]
    deferred = options[_REDUCTION] in ("sample", "element") or any(
        need and t.dtype == torch.float16 for t, need in zip(operands, needed, strict=False)
    )
    others = [t for t in (operands[_KL_IN], operands[_BETA]) if isinstance(t, Tensor) and t.requires_grad]
    return _ElboPlan(
        (*options[:_NEEDED], [False] * len(needed), *options[_NEEDED + 1 :]) if deferred else options,
        [] if deferred else positions(needed),
        not deferred and not others,
        positions([isinstance(operand, Tensor) for operand in operands]),
        positions([operand is not None and not isinstance(operand, Tensor) for operand in operands]),
    )


class _Elbo(torch.autograd.Function):
    """loss = nll + beta * kl and its terms.

    Scalars arrive with their gradients made, and backward scales those. Per-sample and per-element values would
    move more that way (9N elements against 8N), and float16 gradients made before the incoming factor (a loss
    scaler's 65536) would underflow: those are made in backward, from the operands.

    Behind the dispatcher (no memo) the gradient buffers are outputs, as the operator's schema has it and compilers and
    tracers must see them, and so not ours to write to.
    """

    @staticmethod
    def forward(ctx: Any, memo: Memo | None, options: tuple[Any, ...], *operands: Any) -> Any:
        kept = {} if memo is None else memo
        plan = kept.get("elbo plan")
        if plan is None:
            plan = kept["elbo plan"] = _elbo_plan(options, operands)
        out = ops.elbo.below_autograd(memo, plan.options_in_forward, *operands)
        terms = options[_TERMS]
        # With the terms comes the KL: the gradient of beta.
        ctx.save_for_backward(*[operands[k] for k in plan.tensors], *out[2 if terms else 1 :])
        ctx.rest = plan, options, [operands[k] for k in plan.numbers], memo is not None, kept
        ctx.set_materialize_grads(False)
        values = 3 if terms else 1
        if memo is not None:
            return tuple(out[:values])
        ctx.mark_non_differentiable(*out[values:])
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> Any:
        plan, options, numbers, owns_buffers, kept = ctx.rest
        is_variance, eps, full, reduction, _, terms, needed, name = options
        saved = ctx.saved_tensors
        buffers = saved[len(plan.tensors) + terms :]
        g_loss, g_nll, g_kl = incoming[:3] if terms else (incoming[0], None, None)
        grads: list[Tensor | None] = [None] * _OPERANDS
        loss_alone = g_nll is None and g_kl is None
        if loss_alone and g_loss is None:
            return (None, None, *grads)
        are_made = loss_alone and bool(buffers) and not torch.is_grad_enabled()
        if are_made:
            _place(grads, plan.made, _scaled(buffers, g_loss, owns_buffers, name, kept))
            if plan.is_all:  # the usual step
                return (None, None, *grads)

        operands: list[Any] = [None] * _OPERANDS
        _place(operands, plan.tensors, saved)
        _place(operands, plan.numbers, numbers)
        recon_x, x, spread, mu, logvar, kl_in, beta = operands
        if torch.is_grad_enabled():

            def formula(*operands: Any) -> tuple[Tensor, ...]:
                how: tuple[Any, ...] = (is_variance, eps, full, reduction)
                return elbo_formula(*operands, *how)

            return (None, None, *_second_order(formula, operands, [g_loss, g_nll, g_kl]))

        def kl_factor(scale: float) -> Tensor:
            """What the KL, times ``scale``, is multiplied by on its way into whatever was differentiated."""
            through_loss = None if g_loss is None else g_loss * (beta * scale)
            factor = _sum(through_loss, None if g_kl is None else g_kl * scale)
            assert factor is not None
            return factor

        reaches_kl = g_loss is not None or g_kl is not None
        if not are_made:
            nlls = sum(k < _MU for k in plan.made)
            made_nll, made_kl = buffers[:nlls], buffers[nlls:]
            factor = _sum(g_loss, g_nll)
            if factor is not None and any(needed[:_MU]):
                if made_nll:
                    found = _scaled(made_nll, factor, owns_buffers, name, {})
                else:
                    weight = factor * reference.scale_of(reduction, x.shape)
                    how = (is_variance, eps, needed[:_MU], name)
                    found = ops.nll_backward(recon_x, x, spread, weight, options=how)
                _place(grads, positions(needed[:_MU]), found)
            if reaches_kl and any(needed[_MU:]):
                if made_kl and g_kl is None:  # made with beta in them
                    found = _scaled(made_kl, g_loss, owns_buffers, name, {})
                else:
                    weight = kl_factor(reference.scale_of(reduction, mu.shape)).expand(mu.shape[0])
                    found = ops.latent_backward(mu, logvar, None, None, None, weight, options=(name,))
                    if logvar is not None:
                        found = [g for g, need in zip(found, needed[_MU:], strict=True) if need]
                _place(grads, [_MU + k for k in positions(needed[_MU:])], found)
        if reaches_kl and kl_in is not None and kl_in.requires_grad:
            grads[_KL_IN] = kl_factor(reference.scale_of(reduction, kl_in.shape)).to(kl_in.dtype).expand_as(kl_in)
        if g_loss is not None and isinstance(beta, Tensor) and beta.requires_grad:
            kl = saved[len(plan.tensors)]
            grads[_BETA] = (g_loss * kl).sum().to(beta.dtype)
        return (None, None, *grads)


def _place(places: list[Any], positions: list[int], items: Sequence[Any]) -> None:
    """Put each of the first items where it belongs."""
    for k, item in zip(positions, items):  # noqa: B905 - a hot path
        places[k] = item


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


ops.latent.register_autograd(_Latent)
ops.reparameterize.register_autograd(_Reparameterize)
ops.elbo.register_autograd(_Elbo)
