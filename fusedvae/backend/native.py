"""The compiled extension: C++ kernels for CPUs.

Works out from sizes, strides and dtypes how the kernels walk a call's operands, a task of csrc/cpu/kernels.h, and
keeps it: a training loop meets the same ones at every step. What is left to a call is to hand over addresses. The
extension knows nothing of torch; torch is imported first, so that it finds torch's OpenMP runtime in the process.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedvae.layout import Described, Strides, canonical, dense_strides, described, expanded

from . import Latents, Memo, Reconstruction
from .reference import HALF_LOG_2PI

try:
    from fusedvae import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _import_error = str(error)

BUILD_RECORD = Path(__file__).parent.parent / "_build.json"
"""What the build compiled in, or why it compiled nothing; written by setup.py."""

# Codes of csrc/operand.h.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}

# How the values of a reduction are laid out, as csrc/cpu/kernels.h has it.
_TOTAL, _SAMPLE, _ELEMENT = 0, 1, 2

_Form = tuple[int, ...] | None
"""An operand as the extension describes it: (dtype code, three strides), () for a number, None for nothing."""


class _Copy(NamedTuple):
    """An operand that the kernels cannot walk, and the tensor that stands in for it."""

    position: int
    is_output: bool
    shape: tuple[int, ...]
    strides: Strides


class _Plan(NamedTuple):
    """A task of the extension, and what must be copied around its runs."""

    task: Any
    copies: tuple[_Copy, ...] = ()

    def run(self, operands: Sequence[Tensor | float | None], *extra: int) -> None:
        """Run on operands of the sizes, strides and dtypes that the plan was made for."""
        originals = operands
        if self.copies:
            operands = list(originals)
            for copy in self.copies:
                operands[copy.position] = _stand_in(originals[copy.position], copy)
        values = tuple([t.data_ptr() if isinstance(t, Tensor) else t for t in operands if t is not None])
        self.task.run(values, *extra, torch.get_num_threads())
        for copy in self.copies:
            if copy.is_output:
                original, computed = originals[copy.position], operands[copy.position]
                assert isinstance(original, Tensor)
                assert isinstance(computed, Tensor)
                original.copy_(computed.sum_to_size(original.shape))


def _stand_in(original: Any, copy: _Copy) -> Tensor:
    dense = torch.empty_strided(copy.shape, copy.strides, dtype=original.dtype, device=original.device)
    return dense if copy.is_output else dense.copy_(original)


# --- plans, from descriptions of the operands in the order of csrc/cpu/kernels.h --------------------------------------


class _Walk(NamedTuple):
    extent: tuple[int, ...]
    logical: Strides
    forms: tuple[_Form, ...]
    copies: tuple[_Copy, ...]


def _walk(
    shape: torch.Size, operands: Sequence[Described], first_output: int, *, keep_batch: bool, indexed: bool = False
) -> _Walk:
    """How to walk operands that broadcast to ``shape``; those from ``first_output`` on are written to."""
    tensors = [(k, operand) for k, operand in enumerate(operands) if operand]
    strides = tuple([expanded(own, steps, shape) for _, (own, steps, _) in tensors])
    layout = canonical(tuple(shape), strides, keep_batch=keep_batch, indexed=indexed)
    forms: list[_Form] = [None if operand is None else () for operand in operands]
    for (k, (_, _, dtype)), steps in zip(tensors, layout.strides, strict=True):
        forms[k] = (_DTYPES[dtype], *steps)
    positions = [tensors[c][0] for c in sorted(layout.copies)]
    copies = tuple([_Copy(k, k >= first_output, shape, layout.dense) for k in positions])
    return _Walk(layout.extent, layout.logical, tuple(forms), copies)


_RECON_X, _GRAD_SPREAD = 0, 7  # positions in an NllTask


def _walk_nll(shape: torch.Size, operands: Sequence[Described], keep_batch: bool) -> _Walk:
    walk = _walk(shape, operands, 4, keep_batch=keep_batch)
    recon_x, grad_spread = operands[_RECON_X], operands[_GRAD_SPREAD]
    assert recon_x
    if not grad_spread or _can_sum(walk, grad_spread[0], shape):
        return walk
    # Broadcast in a pattern that the kernels cannot sum over: they write it out, and PyTorch adds it up.
    strides = dense_strides(shape, expanded(recon_x[0], recon_x[1], shape))
    written_out = (shape, strides, grad_spread[2])
    walk = _walk(shape, [*operands[:_GRAD_SPREAD], written_out], 4, keep_batch=keep_batch)
    if any(copy.position == _GRAD_SPREAD for copy in walk.copies):
        return walk
    return walk._replace(copies=(*walk.copies, _Copy(_GRAD_SPREAD, True, shape, strides)))


def _can_sum(walk: _Walk, own_shape: torch.Size, shape: torch.Size) -> bool:
    """Whether the kernels can sum this gradient over what it is broadcast along (csrc/cpu/kernels.h, NllTask)."""
    if own_shape == shape:
        return True
    form = walk.forms[_GRAD_SPREAD]
    # Sums of nothing are zero, but the kernels see no extent to make them for.
    if not form or shape.numel() == 0 or any(copy.position == _GRAD_SPREAD for copy in walk.copies):
        return False
    (batch, outer, inner), (s0, s1, s2) = walk.extent, form[1:]
    summed_batch, summed_outer = s0 == 0 and batch > 1, s1 == 0 and outer > 1
    if s2 == 0 and inner > 1:
        return True
    kept = not summed_batch and not summed_outer
    return kept or (s2 == 1 and s0 == 0 and s1 == 0)


_GRAD_KL, _KL = 4, 8  # positions in a LatentTask of those with one value a sample


def _walk_latent(shape: torch.Size, operands: Sequence[Described], keep_batch: bool, indexed: bool) -> _Walk:
    elements = [None if k in (_GRAD_KL, _KL) else operand for k, operand in enumerate(operands)]
    walk = _walk(shape, elements, 5, keep_batch=keep_batch, indexed=indexed)
    forms = [_values(operands[k]) if k in (_GRAD_KL, _KL) else form for k, form in enumerate(walk.forms)]
    return walk._replace(forms=tuple(forms))


def _values(operand: Described) -> _Form:
    """The form of a vector of values a sample, or of one value."""
    if not operand:
        return operand
    _, strides, dtype = operand
    return _DTYPES[dtype], strides[0] if strides else 0, 0, 0


@lru_cache(maxsize=1024)
def _nll_plan(shape: torch.Size, operands: tuple[Described, ...], is_variance: bool, eps: float) -> _Plan:
    walk = _walk_nll(shape, operands, keep_batch=False)
    return _Plan(_C.NllTask(walk.extent, walk.forms, is_variance, eps), walk.copies)


@lru_cache(maxsize=1024)
def _latent_plan(shape: torch.Size, operands: tuple[Described, ...], indexed: bool) -> _Plan:
    keep_batch = operands[_GRAD_KL] is not None or operands[_KL] is not None
    walk = _walk_latent(shape, operands, keep_batch, indexed)
    return _Plan(_C.LatentTask(walk.extent, walk.logical, walk.forms), walk.copies)


_NLL_OPERANDS, _LATENT_OPERANDS = 8, 9


@lru_cache(maxsize=1024)
def _elbo_plan(
    operands: tuple[Described, ...],
    x_shape: torch.Size | None,
    latent_shape: torch.Size | None,
    is_variance: bool,
    eps: float,
    values: int,
    scale: float,
    constant: float,
) -> _Plan:
    likelihood, rest = operands[:_NLL_OPERANDS], operands[_NLL_OPERANDS:]
    divergence, others = rest[:_LATENT_OPERANDS], rest[_LATENT_OPERANDS:]
    nll = kl = None
    copies: tuple[_Copy, ...] = ()
    if x_shape is not None:
        walk = _walk_nll(x_shape, likelihood, keep_batch=values == _SAMPLE)
        nll = (walk.extent, walk.forms, is_variance, eps)
        copies = walk.copies
    if latent_shape is not None:
        walk = _walk_latent(latent_shape, divergence, keep_batch=values == _SAMPLE, indexed=False)
        kl = (walk.extent, walk.logical, walk.forms)
        copies += tuple([copy._replace(position=_NLL_OPERANDS + copy.position) for copy in walk.copies])
    kl_in = others[0]
    kl_in_count = kl_in[0].numel() if kl_in else 0
    forms = tuple(map(_values, others))
    return _Plan(_C.ElboTask(nll, kl, forms, kl_in_count, values, scale, constant), copies)


@lru_cache(maxsize=1024)
def _scale_plan(tensors: tuple[tuple[int, torch.dtype], ...], factor: Described) -> _Plan:
    forms = tuple([(_DTYPES[dtype], 0, 0, 1) for _, dtype in tensors])
    return _Plan(_C.ScaleTask(forms, tuple([count for count, _ in tensors]), _values(factor)))


# --- the backend ----------------------------------------------------------------------------------------------------


class _Native:
    def unavailable(self, device_type: str) -> str | None:
        if _C is None:
            return f"{_absence()}; install fusedvae again where a C++17 compiler is found"
        if device_type != "cpu":
            return "this build of the extension has CPU kernels only; install fusedvae again where nvcc is found"
        return None

    def describe(self, device_type: str) -> str:
        return f"C++ kernels, {_C.cpu_isa()}"

    def normal(self, out: Tensor, seed: Tensor) -> None:
        _C.normal(out.data_ptr(), _DTYPES[out.dtype], out.numel(), seed.data_ptr(), torch.get_num_threads())

    def latent(
        self,
        latents: Latents,
        *,
        seed: Tensor | None = None,
        noise: Tensor | None = None,
        z: Tensor | None = None,
        kl: Tensor | None = None,
        grad_z: Tensor | None = None,
        grad_kl: Tensor | None = None,
        memo: Memo,
    ) -> None:
        mu, logvar, grad_mu, grad_logvar = latents
        operands = (mu, logvar, noise, grad_z, grad_kl, z, grad_mu, grad_logvar, kl)
        plan = memo.get("latent")
        if plan is None:
            plan = _latent_plan(mu.shape, tuple(map(described, operands)), seed is not None)
            memo["latent"] = plan
        plan.run(operands, 0 if seed is None else seed.data_ptr())

    def elbo(
        self,
        reconstruction: Reconstruction | None,
        latents: Latents | None,
        kl_in: Tensor | None,
        beta: Tensor | float,
        reduction: str,
        scale: float,
        loss: Tensor,
        nll: Tensor | None,
        kl: Tensor | None,
        memo: Memo,
    ) -> None:
        by_element = reduction == "element"
        likelihood: tuple[Any, ...] = (None,) * _NLL_OPERANDS
        divergence: tuple[Any, ...] = (None,) * _LATENT_OPERANDS
        if reconstruction is not None:
            recon_x, x, spread, _, _, _, *grads = reconstruction
            likelihood = (recon_x, x, spread, None, loss if by_element else None, *grads)
        if latents is not None:
            mu, logvar, grad_mu, grad_logvar = latents
            divergence = (mu, logvar, None, None, None, None, grad_mu, grad_logvar, None)
        values = (None, None, None) if by_element else (loss, nll, kl)
        operands = (*likelihood, *divergence, kl_in, beta, *values)
        plan = memo.get("elbo")
        if plan is None:
            r = reconstruction
            plan = memo["elbo"] = _elbo_plan(
                tuple(map(described, operands)),
                None if r is None else r.x.shape,
                None if latents is None else latents.mu.shape,
                r is not None and r.is_variance,
                0.0 if r is None else r.eps,
                {"sample": _SAMPLE, "element": _ELEMENT}.get(reduction, _TOTAL),
                scale,
                HALF_LOG_2PI if r is not None and r.full else 0.0,
            )
        plan.run(operands)
        if by_element:
            assert reconstruction is not None
            if reconstruction.full:
                loss += HALF_LOG_2PI
            if nll is not None:
                nll.copy_(loss)

    def nll_backward(self, r: Reconstruction, weight: Tensor) -> None:
        if weight.dim() == 1:
            weight = weight.view(-1, *[1] * (r.x.dim() - 1))
        operands = (r.recon_x, r.x, r.spread, weight, None, r.grad_recon_x, r.grad_x, r.grad_spread)
        _nll_plan(r.x.shape, tuple(map(described, operands)), r.is_variance, r.eps).run(operands)

    def scale_(self, tensors: list[Tensor], factor: Tensor, memo: Memo) -> None:
        plan = memo.get("scale")
        if plan is None:
            plan = memo["scale"] = _scale_plan(tuple([(t.numel(), t.dtype) for t in tensors]), described(factor))
        plan.run((*tensors, factor))


def _absence() -> str:
    """Why there is no extension."""
    if BUILD_RECORD.exists():
        reason = json.loads(BUILD_RECORD.read_text()).get("error")
        if reason:
            return f"the compiled extension was not built ({reason})"
    return f"the compiled extension cannot be loaded ({_import_error})"


BACKEND = _Native()
