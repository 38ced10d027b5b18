"""The compiled extension: C++ kernels for CPUs.

Turns tensors into what the extension takes, a pointer, a dtype code and three strides each, and leaves everything
else to it. The extension knows nothing of torch; torch is imported first, so that it finds torch's OpenMP runtime
in the process.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fusedvae.layout import Strides, canonical

from . import Latents, Reconstruction
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

_Operand = tuple[int, int, int, int, int] | float | None
_Inputs = Sequence[Tensor | float | None]


class _Walk:
    """Tensors of one logical shape, as the extension takes them. Outputs are complete after `finish`.

    Operands that have no canonical form are copied into one that has; outputs likewise, and copied back.
    """

    def __init__(
        self,
        shape: torch.Size,
        inputs: _Inputs,
        outputs: list[Tensor | None],
        *,
        keep_batch: bool = False,
        indexed: bool = False,
    ) -> None:
        operands = (*inputs, *outputs)
        tensors = [t for t in operands if isinstance(t, Tensor)]
        self.extent, self.index, forms, copies, dense_strides = _plan(
            shape, tuple([(t.shape, t.stride(), t.dtype) for t in tensors]), keep_batch, indexed
        )
        self._copy_back: list[tuple[Tensor, Tensor]] = []
        for k in copies:
            dense = torch.empty_strided(shape, dense_strides, dtype=tensors[k].dtype, device=tensors[k].device)
            if k >= len(tensors) - sum(t is not None for t in outputs):
                self._copy_back.append((tensors[k], dense))
            else:
                dense.copy_(tensors[k])
            tensors[k] = dense
        self._keep_alive = tensors
        described = iter([(t.data_ptr(), *form) for t, form in zip(tensors, forms, strict=True)])
        walked = [next(described) if isinstance(t, Tensor) else t for t in operands]
        self.inputs, self.outputs = walked[: len(inputs)], walked[len(inputs) :]

    def is_copied(self, tensor: Tensor) -> bool:
        """Whether an output is computed in a copy."""
        return any(target is tensor for target, _ in self._copy_back)

    def finish(self) -> None:
        """Complete the outputs, after the kernel."""
        for target, dense in self._copy_back:
            target.copy_(dense)


@lru_cache(maxsize=4096)
def _plan(
    shape: torch.Size, tensors: tuple[tuple[torch.Size, Strides, torch.dtype], ...], keep_batch: bool, indexed: bool
) -> tuple[tuple[int, int, int], Strides, list[tuple[int, ...]], list[int], Strides]:
    """Extent, index strides, (dtype code, strides) of each tensor, tensors to copy, and the copies' strides.

    Tensors are given as (shape, strides, dtype), and are expanded to ``shape``.
    """
    expanded = []
    for own, strides, _ in tensors:
        lead = len(shape) - len(own)
        sizes = zip(own, shape[lead:], strides, strict=True)
        expanded.append((0,) * lead + tuple(0 if size == 1 != whole else step for size, whole, step in sizes))
    layout = canonical(tuple(shape), tuple(expanded), keep_batch=keep_batch, indexed=indexed)
    forms = [(_DTYPES[dtype], *walk) for (_, _, dtype), walk in zip(tensors, layout.strides, strict=True)]
    return layout.extent, layout.logical, forms, sorted(layout.copies), layout.dense


def _values(t: Tensor | None) -> _Operand:
    """A contiguous vector of per-sample values, or one value."""
    if t is None:
        return None
    return t.data_ptr(), _DTYPES[t.dtype], t.stride(0) if t.dim() else 0, 0, 0


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
        _C.normal((out.data_ptr(), _DTYPES[out.dtype], 0, 0, 1), out.numel(), seed.data_ptr(), torch.get_num_threads())

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
    ) -> None:
        inputs = [latents.mu, latents.logvar, noise, grad_z]
        outputs = [z, latents.grad_mu, latents.grad_logvar]
        per_sample = kl is not None or grad_kl is not None
        walk = _Walk(latents.mu.shape, inputs, outputs, keep_batch=per_sample, indexed=seed is not None)
        _C.latent(
            walk.extent,
            walk.index,
            *walk.inputs,
            0 if seed is None else seed.data_ptr(),
            _values(grad_kl),
            *walk.outputs,
            _values(kl),
            torch.get_num_threads(),
        )
        walk.finish()

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
    ) -> None:
        values = {"sample": _SAMPLE, "element": _ELEMENT}.get(reduction, _TOTAL)
        by_element, by_sample = values == _ELEMENT, values == _SAMPLE
        likelihood = divergence = None
        constant = 0.0
        if reconstruction is not None:
            likelihood = _Likelihood(reconstruction, value=loss if by_element else None, keep_batch=by_sample)
            constant = HALF_LOG_2PI if reconstruction.full else 0.0
        if latents is not None:
            inputs = [latents.mu, latents.logvar]
            divergence = _Walk(latents.mu.shape, inputs, [latents.grad_mu, latents.grad_logvar], keep_batch=by_sample)
        _C.elbo(
            None if likelihood is None else likelihood.task,
            None if divergence is None else (divergence.extent, *divergence.inputs, *divergence.outputs),
            _values(kl_in),
            0 if kl_in is None else kl_in.numel(),
            _values(beta) if isinstance(beta, Tensor) else beta,
            values,
            scale,
            constant,
            None if by_element else _values(loss),
            None if by_element else _values(nll),
            None if by_element else _values(kl),
            torch.get_num_threads(),
        )
        if likelihood is not None:
            likelihood.finish()
        if divergence is not None:
            divergence.finish()
        if by_element:
            if constant:
                loss += constant
            if nll is not None:
                nll.copy_(loss)

    def nll_backward(self, reconstruction: Reconstruction, weight: Tensor) -> None:
        likelihood = _Likelihood(reconstruction, weight=weight)
        _C.nll_backward(likelihood.task, likelihood.weight, torch.get_num_threads())
        likelihood.finish()

    def scale_(self, tensors: list[Tensor], factor: Tensor) -> None:
        operands = [((t.data_ptr(), _DTYPES[t.dtype], 0, 0, 1), t.numel()) for t in tensors]
        _C.scale(operands, _values(factor), torch.get_num_threads())


class _Likelihood:
    """The likelihood half of a call: its arguments, and what remains to be done after it."""

    def __init__(
        self,
        r: Reconstruction,
        *,
        value: Tensor | None = None,
        weight: Tensor | None = None,
        keep_batch: bool = False,
    ) -> None:
        if weight is not None and weight.dim() == 1:
            weight = weight.view(-1, *[1] * (r.x.dim() - 1))
        self._summed: tuple[Tensor, Tensor] | None = None
        grad_spread = r.grad_spread
        if grad_spread is not None and r.x.numel() == 0:  # sums of nothing, of which the kernels see no extent
            grad_spread.zero_()
            grad_spread = None
        while True:
            outputs = [value, r.grad_recon_x, r.grad_x, grad_spread]
            walk = _Walk(r.x.shape, [r.recon_x, r.x, r.spread, weight], outputs, keep_batch=keep_batch)
            if grad_spread is None or self._summed is not None or _can_sum(walk, grad_spread, r.x.shape):
                break
            # Broadcast in a pattern that the kernels cannot sum over: write it out, and let PyTorch add it up.
            grad_spread = torch.empty_like(r.recon_x, dtype=grad_spread.dtype)
            assert r.grad_spread is not None
            self._summed = (r.grad_spread, grad_spread)
        self._walk = walk
        self.task = (walk.extent, *walk.inputs[:3], *walk.outputs, r.is_variance, r.eps)
        self.weight = walk.inputs[3]

    def finish(self) -> None:
        self._walk.finish()
        if self._summed is not None:
            target, elements = self._summed
            target.copy_(elements.sum_to_size(target.shape))


def _can_sum(walk: _Walk, grad_spread: Tensor, shape: torch.Size) -> bool:
    """Whether the kernels can sum this gradient over what it is broadcast along (csrc/cpu/kernels.h, NllTask)."""
    if grad_spread.shape == shape:
        return True
    operand = walk.outputs[3]
    if walk.is_copied(grad_spread) or not isinstance(operand, tuple):
        return False
    (batch, outer, inner), (s0, s1, s2) = walk.extent, operand[2:]
    summed_batch, summed_outer = s0 == 0 and batch > 1, s1 == 0 and outer > 1
    if s2 == 0 and inner > 1:
        return True
    kept = not summed_batch and not summed_outer
    return kept or (s2 == 1 and s0 == 0 and s1 == 0)


def _absence() -> str:
    """Why there is no extension."""
    if BUILD_RECORD.exists():
        reason = json.loads(BUILD_RECORD.read_text()).get("error")
        if reason:
            return f"the compiled extension was not built ({reason})"
    return f"the compiled extension cannot be loaded ({_import_error})"


BACKEND = _Native()
