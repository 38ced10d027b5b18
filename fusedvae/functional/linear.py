"""A decoder's last linear layer and the bound together: what the layer gives is never stored whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from .. import ops
from ..backend.evaluation import with_gradient_times
from ..backend.reference import LIKELIHOODS, Number, form_fields
from ..backend.specs import Objective, factor_of
from ..calls import Operand
from ..linear import Factors, LinearLikelihoodCall, linear_likelihood, usual_block
from ..torch_private import is_any_autocast_enabled
from ..typing import Backend, Bounds, LikelihoodName, LikelihoodScale, NormalScale, Reduction, TermReduction
from .bounds import ELBOTerms
from .checks import (
    REQUIRED,
    REQUIRED_WITH_PRIOR_MU,
    check_batch_size,
    check_count,
    check_forgotten,
    check_kl,
    check_nothing_beside_kl,
    check_number,
    check_same_device,
    check_tensor,
    checked_reductions,
)
from .divergences import divergence_of, run_divergence
from .forms import Written, as_written, checked_recon_form
from .likelihoods import check_likelihood, checked_likelihood, inputs_of, run_likelihood
from .objective import backend_for, summed_kl, value_dtype, weighting_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..typing import LinearELBOArguments


@overload
def linear_elbo(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    x: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None = ...,
    recon_logvar: Tensor | float | None = ...,
    *,
    return_terms: Literal[False] = ...,
    **arguments: Unpack[LinearELBOArguments],
) -> Tensor: ...


@overload
def linear_elbo(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    x: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None = ...,
    recon_logvar: Tensor | float | None = ...,
    *,
    return_terms: Literal[True],
    **arguments: Unpack[LinearELBOArguments],
) -> ELBOTerms: ...


@overload
def linear_elbo(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    x: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None = ...,
    recon_logvar: Tensor | float | None = ...,
    *,
    return_terms: bool,
    **arguments: Unpack[LinearELBOArguments],
) -> Tensor | ELBOTerms: ...


def linear_elbo(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    x: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None = REQUIRED,
    recon_logvar: Tensor | float | None = 0.0,
    *,
    likelihood: LikelihoodName = "gaussian",
    scale: NormalScale = "logvar",
    clamp: Bounds = None,
    eps: float = 0.0,
    recon_scale: LikelihoodScale | None = None,
    recon_clamp: Bounds = None,
    recon_eps: float = 0.0,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = REQUIRED_WITH_PRIOR_MU,
    prior_scale: NormalScale = "logvar",
    prior_clamp: Bounds = None,
    prior_eps: float | None = None,
    kl: Tensor | None = None,
    beta: float | Tensor = 1.0,
    full: bool = False,
    extra: Tensor | float | None = None,
    pos_weight: Tensor | float | None = None,
    zi_logits: Tensor | float | None = None,
    weight: Tensor | None = None,
    latent_weight: Tensor | None = None,
    reduction: Reduction = "batchmean",
    grad_scale: float | Tensor | None = None,
    return_terms: bool = False,
    block: int | None = None,
    packed_dim: int = 1,
    backend: Backend | None = None,
) -> Tensor | ELBOTerms:
    """`elbo_loss` of ``recon_x = hidden @ linear_weight.T + linear_bias``, of which only some columns are ever stored.

    The decoder's last linear layer and the likelihood, a block of columns at a time: neither the layer's output nor its
    gradient is in memory as a whole. The gradients of hidden, linear_weight and linear_bias are made on the way, in the
    forward pass. With "none", and for float16 without ``grad_scale``, the backward pass makes them, and multiplies out
    the output once more. Values, gradients and derivatives of any order are those of `torch.nn.functional.linear` and
    `elbo_loss`, up to the order of sums.

    It saves memory where x has many columns, and time where the output is larger than the caches. Of 20,000 columns,
    each with a scale, it takes 4 MB beside the gradients in the place of 143 at batch 512, and 0.8 of the time of a
    CPU's core; at batch 128 a fifth of the memory, in the same time, give or take a tenth. Where all columns are one
    block (784, or 2,000, at batch 128) there is nothing to save, and it is the two functions one after the other.
    So it is where something has to see operations of PyTorch, or there are no kernels: with the reference formulas,
    under torch.compile, torch.func and tracing, for tensors that are made of others, and for a ``weight`` that needs a
    gradient.

    Args:
        hidden: the layer's input, shape (batch, ..., in_features).
        linear_weight: its weight, shape (out_features, in_features), as `torch.nn.Linear` has it; with
            ``recon_logvar=None`` (2 * out_features, in_features): the rows of the mean, then those of its scale.
        linear_bias: its bias, of as many elements as the weight has rows, or None.
        x: data, shape (batch, ..., out_features).
        recon_logvar: as `elbo_loss` takes it: a number, a tensor that broadcasts to x's shape (one a column, say), or
            None for one that the layer gives.
        mu, logvar, kl, beta, weight, reduction and all others: as `elbo_loss` takes them.
        block: how many columns of x are computed at a time; by default so many that a block has about 2^19 elements (on
            a GPU, 2^20).

    Under autocast, the products are in its dtype, as those of `torch.nn.functional.linear`.
    """
    if logvar is REQUIRED:
        check_forgotten(kl)
        logvar = None
    of_nll, of_kl = checked_reductions(reduction)
    check_number("beta", beta)
    written = as_written(recon_scale, recon_clamp, recon_eps)
    check_linear(hidden, linear_weight, linear_bias, x, recon_logvar, likelihood)
    if kl is None:
        formula, inputs = divergence_of(mu, logvar, prior_mu, prior_logvar)
        posterior = as_written(scale, clamp, eps)
        prior = as_written(prior_scale, prior_clamp, prior_eps)  # type: ignore[arg-type]
        divergence = run_divergence(
            inputs, formula, posterior, prior, latent_weight, None, of_kl, None, packed_dim, backend
        )
        check_batch_size("mu", inputs[0], x, reduction)  # type: ignore[arg-type]
    else:
        check_nothing_beside_kl(mu, logvar, prior_mu, prior_logvar, latent_weight)
        check_tensor("kl", kl)
        check_kl(kl, x, reduction)
        check_same_device("kl", kl, "x", x)
        kl = kl.to(torch.promote_types(kl.dtype, torch.float32))
        divergence = kl if of_kl == "none" else summed_kl(kl, of_kl)
    # By far the most of the work, and so the last.
    nll = run_linear_likelihood(
        hidden,
        linear_weight,
        linear_bias,
        x,
        recon_logvar,
        likelihood=likelihood,
        written=written,
        full=full,
        extra=extra,
        pos_weight=pos_weight,
        zi_logits=zi_logits,
        weight=weight,
        reduction=of_nll,
        grad_scale=grad_scale,
        block=block,
        backend=backend,
    )
    weighted = (divergence * beta).to(divergence.dtype)
    if grad_scale is not None:  # of beta, too
        weighted, divergence = [with_gradient_times(value, grad_scale) for value in (weighted, divergence)]
    loss = nll + weighted
    return ELBOTerms(loss, nll, divergence) if return_terms else loss


def run_linear_likelihood(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    x: Tensor,
    recon_logvar: Tensor | float | None,
    *,
    likelihood: LikelihoodName,
    written: Written,
    full: bool,
    reduction: TermReduction,
    extra: Tensor | float | None = None,
    pos_weight: Tensor | float | None = None,
    zi_logits: Tensor | float | None = None,
    weight: Tensor | None = None,
    grad_scale: float | Tensor | None = None,
    block: int | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """The likelihood of what a linear layer gives, which has been checked."""
    check_count("block", block)
    if grad_scale is not None:
        check_number("grad_scale", grad_scale)
    # What the layer gives, as far as checks go: it has no memory.
    stand_in = hidden.new_empty(()).expand(*hidden.shape[:-1], len(linear_weight))
    inputs = inputs_of(likelihood, stand_in, x, recon_logvar, extra, pos_weight, zi_logits)
    formula = LIKELIHOODS[likelihood]
    names = ["recon_logvar" if (0, k) in formula.pairs else name for k, name in enumerate(formula.inputs)]
    check_likelihood(formula, inputs, names, -1)
    form = checked_recon_form(formula, written)
    weighting = () if weight is None else weighting_of("weight", weight, reduction, "x", x, 0.0, 1)
    is_cast = is_any_autocast_enabled() and torch.amp.is_autocast_available(hidden.device.type)
    if is_cast and torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, linear_weight = hidden.to(dtype), linear_weight.to(dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(dtype)
    if linear_weight.dtype != hidden.dtype:
        raise TypeError(f"linear_weight: expected {hidden.dtype}, as hidden is, got {linear_weight.dtype}")
    if linear_bias is not None and linear_bias.dtype != hidden.dtype:
        raise TypeError(f"linear_bias: expected {hidden.dtype}, as hidden is, got {linear_bias.dtype}")
    operands = (hidden, linear_weight, linear_bias, x, *inputs[2:], weight)
    name = backend_for(operands, backend)
    is_weight_learned = weight is not None and weight.requires_grad
    if name == "reference" or is_weight_learned or ops.needs_dispatcher(operands):
        block = x.shape[-1]  # whatever that is: a compiler may not know
    elif block is None:
        block = usual_block(x.shape[:-1].numel(), x.device.type)
    if block >= x.shape[-1]:
        out = torch.nn.functional.linear(hidden, linear_weight, linear_bias)
        options = (written, full, weight, reduction, None, max(out.dim() - 1, 1), backend)
        nll = run_likelihood(likelihood, (out, *inputs[1:]), *options)
        return nll if grad_scale is None else with_gradient_times(nll, grad_scale)
    lead = x.shape[:-1]
    factor: Number = factor_of(reduction if weight is not None or reduction != "weighted_mean" else "mean", x.shape)
    for normalizer in weighting[1:]:
        factor = factor * normalizer  # type: ignore[operator]
    rows = [_rows(t, lead) for t in (*operands[3:-1], *weighting[:1])]
    enabled = torch.is_grad_enabled()
    maps, squared, limits = form_fields([form] if form else [])
    spec = Objective(
        formulas=(formula.in_full if full and formula.in_full else formula.name,),
        maps=maps,
        squared=squared,
        limits=limits,
        balance=None,
        weighted=(weight is not None,),
        normalized=(False,),
        packed_dim=1,
        full=full,
        reductions=("none" if reduction == "none" else "sum",),
        dim=None,
        dtype=value_dtype(x.device.type, hidden, *rows),
        returns_terms=False,
        needed=(False,) * (len(rows) + 3),  # (the layer's output, and beta and grad_scale)
        is_grad_scaled=True,
        backend=name,
    )
    taken = (hidden.reshape(-1, hidden.shape[-1]), linear_weight, linear_bias, *rows)
    call = LinearLikelihoodCall(
        spec,
        block,
        [enabled and isinstance(t, Tensor) and t.requires_grad for t in taken],
        is_deferred=reduction == "none" or (hidden.dtype == torch.float16 and grad_scale is None),
    )
    if isinstance(grad_scale, Tensor):  # a factor of one over so many has more digits than float32
        grad_scale = grad_scale.to(x.device, torch.float64)
    factors = Factors(factor, factor if grad_scale is None else factor * grad_scale)
    value = linear_likelihood(call, factors, taken)
    if reduction == "none":
        return value if len(lead) == 1 else value.view(lead).flatten(1).sum(1)
    return value


def _rows(operand: Operand, lead: torch.Size) -> Operand:
    """An operand that broadcasts to (*lead, columns), as a matrix that broadcasts to (rows, columns)."""
    if not isinstance(operand, Tensor) or operand.dim() == 0:
        return operand
    if operand.shape[:-1].numel() != 1:
        operand = operand.expand(*lead, operand.shape[-1])
    return operand.reshape(-1, operand.shape[-1]) if operand.dim() != 2 else operand


def check_linear(
    hidden: object, weight: object, bias: object, x: object, recon_logvar: object, likelihood: LikelihoodName
) -> None:
    """Check a linear layer, and x against what it gives: a scale too, if the likelihood has one and none is given."""
    is_packed = recon_logvar is None and bool(checked_likelihood(likelihood).pairs)
    check_tensor("hidden", hidden)
    check_tensor("linear_weight", weight)
    check_tensor("x", x, integers=True)
    assert isinstance(hidden, Tensor)
    assert isinstance(weight, Tensor)
    assert isinstance(x, Tensor)
    if hidden.dim() < 2:
        raise ValueError(f"hidden: expected shape (batch, ..., in_features), got {tuple(hidden.shape)}")
    if x.shape[:-1] != hidden.shape[:-1]:
        expected = ", ".join(map(str, hidden.shape[:-1]))
        raise ValueError(f"x: expected shape ({expected}, out_features) beside hidden, got {tuple(x.shape)}")
    expected_weight = ((2 if is_packed else 1) * x.shape[-1], hidden.shape[-1])
    if tuple(weight.shape) != expected_weight:
        why = "a mean and a scale for each column of x" if is_packed else "as many rows as x has columns"
        raise ValueError(f"linear_weight: expected shape {expected_weight}, {why}, got {tuple(weight.shape)}")
    check_same_device("linear_weight", weight, "hidden", hidden)
    check_same_device("x", x, "hidden", hidden)
    if bias is not None:
        check_tensor("linear_bias", bias)
        assert isinstance(bias, Tensor)
        if tuple(bias.shape) != expected_weight[:1]:
            raise ValueError(f"linear_bias: expected shape {expected_weight[:1]}, got {tuple(bias.shape)}")
        check_same_device("linear_bias", bias, "hidden", hidden)
