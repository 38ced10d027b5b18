"""The compiled extension: C++ kernels for CPUs, CUDA kernels for NVIDIA GPUs.

Works out from sizes, strides and dtypes how the kernels walk a call's operands, a task of csrc/tasks.h, and
keeps it: a training loop meets the same ones at every step. What is left to a call is to hand over the operands. The
extension knows nothing of torch; torch is imported first, so that it finds torch's OpenMP runtime in the process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedvae.layout import Described, Strides, described

from . import ElboOperands, LatentOperands, Memo, NllOperands, Objective
from .reference import HALF_LOG_2PI
from .walk import ABSENT, Copy, Part, copy_back, walk, walk_nll, with_stand_ins

try:
    from fusedvae import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _import_error = str(error)

BUILD_RECORD = Path(__file__).parent.parent / "_build.json"
"""What the build compiled in, or why it compiled nothing; written by setup.py."""

# Codes of csrc/operand.h.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}

# How the values of a reduction are laid out, as csrc/tasks.h has it.
_TOTAL, _SAMPLE, _ELEMENT = 0, 1, 2

_Form = tuple[int, ...] | None
"""An operand as the extension describes it: see csrc/bindings.cpp."""


class _Plan(NamedTuple):
    """A task of the extension, and what must be copied around its runs."""

    task: Any
    copies: tuple[Copy, ...] = ()
    unpacked: bool = False
    """Whether it takes packed operands apart, since their halves are among the copies."""
    gpu: int | None = None
    """The index of the GPU that it runs on; None for the CPU."""

    def run(self, operands: Any, *extra: int) -> None:
        """Run on operands of the sizes, strides and dtypes that the plan was made for."""
        if self.copies:
            self._run_with_copies(operands, *extra)
        else:
            if self.gpu is None:
                self.task.run(operands, *extra, torch.get_num_threads())
            else:
                self._launch(self.gpu, operands, *extra)

    def _launch(self, gpu: int, operands: tuple[Any, ...], *extra: int) -> None:
        stream = torch._C._cuda_getCurrentRawStream(gpu)
        size = self.task.workspace_bytes
        # Until the launch, the workspace must not become anyone else's; after it, the stream's order sees to that.
        workspace = _workspace(gpu, stream, size) if size else None
        self.task.launch(operands, *extra, gpu, stream, 0 if workspace is None else workspace.data_ptr())

    def _run_with_copies(self, operands: Any, *extra: int) -> None:
        if self.unpacked:
            operands = operands.unpacked()
        walked = with_stand_ins(operands, self.copies)
        _Plan(self.task, gpu=self.gpu).run(walked, *extra)
        copy_back(operands, walked, self.copies)


_workspaces: dict[tuple[int, int], Tensor] = {}
"""Memory for partial sums, one a GPU and stream: launches on one stream follow each other, and so may share it."""


def _workspace(gpu: int, stream: int, size: int) -> Tensor:
    """A workspace of at least ``size`` bytes that is zero, or that a launch on this stream has left."""
    if torch.cuda.is_current_stream_capturing():
        # Graphs are replayed on any stream, several at a time: each has its own, out of its own memory.
        return torch.zeros(size, dtype=torch.uint8, device=torch.device("cuda", gpu))
    found = _workspaces.get((gpu, stream))
    if found is None or found.numel() < size:
        device = torch.device("cuda", gpu)
        found = _workspaces[gpu, stream] = torch.zeros(max(size, 1 << 16), dtype=torch.uint8, device=device)
    return found


# --- plans, from descriptions of the operands -------------------------------------------------------------------------


class _Parts:
    """The parts of a call's operands, by field name."""

    def __init__(self, fields: Sequence[str], descriptions: Sequence[Described]) -> None:
        self._parts = {name: Part(k, d) for k, (name, d) in enumerate(zip(fields, descriptions, strict=True))}

    def __getitem__(self, name: str) -> Part:
        return self._parts.get(name, ABSENT)

    def pair(self, mean: str, logvar: str, *, packed: bool) -> tuple[Part, Part]:
        """The parts of a mean and a log-variance, or the halves of the field that has both."""
        whole = self[mean]
        if not packed or not whole.described:
            return whole, self[logvar]
        shape, strides, dtype = whole.described
        channels = shape[1] // 2
        half = torch.Size((shape[0], channels, *shape[2:])), strides, dtype
        return Part(whole.field, half), Part(whole.field, half, channels * strides[1] * dtype.itemsize)

    def form(self, part: Part, strides: Strides) -> _Form:
        """The form of a part that is walked with ``strides``."""
        if part.described is None:
            return None
        field = part.field
        return (field, part.offset, _DTYPES[part.described[2]], *strides) if part.described else (field,)

    def values(self, name: str) -> _Form:
        """The form of a vector of values a sample, or of one value."""
        part = self[name]
        return self.form(part, (part.described[1][0] if part.described[1] else 0, 0, 0) if part.described else ())


def _can_sum(extent: tuple[int, int, int], strides: Strides) -> bool:
    """Whether the kernels can sum a gradient over what it is broadcast along (csrc/tasks.h, NllTask)."""
    (batch, outer, inner), (s0, s1, s2) = extent, strides
    summed_batch, summed_outer = s0 == 0 and batch > 1, s1 == 0 and outer > 1
    if s2 == 0 and inner > 1:
        return True
    kept = not summed_batch and not summed_outer
    return kept or (s2 == 1 and s0 == 0 and s1 == 0)


def _nll_arguments(
    parts: _Parts, objective: Objective, *, keep_batch: bool
) -> tuple[tuple[Any, ...], tuple[Copy, ...]]:
    """What makes the extension's NllTask, and the copies around it."""
    packed = parts["spread"].described is None
    mean, spread = parts.pair("recon_x", "spread", packed=packed)
    grad_mean, grad_spread = parts.pair("grad_recon_x", "grad_spread", packed=packed)
    value = parts["loss"] if objective.reduction == "element" else ABSENT
    operands = [mean, parts["x"], spread, parts["weight"], value, grad_mean, parts["grad_x"], grad_spread]
    assert mean.described
    walked = walk_nll(mean.described[0], operands, keep_batch=keep_batch, can_sum=_can_sum)
    forms = tuple(map(parts.form, operands, walked.strides))
    return (walked.extent, forms, objective.is_variance, objective.eps), walked.copies


def _latent_arguments(
    parts: _Parts, per_sample: tuple[_Form, _Form], *, keep_batch: bool, indexed: bool
) -> tuple[tuple[Any, ...], tuple[Copy, ...]]:
    """What makes the extension's LatentTask, and the copies around it; ``per_sample`` is grad_kl and kl."""
    packed = parts["logvar"].described is None
    mu, logvar = parts.pair("mu", "logvar", packed=packed)
    grad_mu, grad_logvar = parts.pair("grad_mu", "grad_logvar", packed=packed)
    operands = [mu, logvar, parts["noise"], parts["grad_z"], parts["z"], grad_mu, grad_logvar]
    assert mu.described
    walked = walk(mu.described[0], operands, 4, keep_batch=keep_batch, indexed=indexed)
    forms = (*map(parts.form, operands, walked.strides), *per_sample)
    return (walked.extent, walked.logical, forms), walked.copies


@lru_cache(maxsize=1024)
def _elbo_plan(descriptions: tuple[Described, ...], objective: Objective) -> _Plan:
    parts = _Parts(ElboOperands._fields, descriptions)
    by_element, by_sample = objective.reduction == "element", objective.reduction == "sample"
    nll = kl = None
    copies: tuple[Copy, ...] = ()
    if parts["recon_x"].described:
        nll, copies = _nll_arguments(parts, objective, keep_batch=by_sample)
    if parts["mu"].described:
        kl, more = _latent_arguments(parts, (None, None), keep_batch=by_sample, indexed=False)
        copies += more
    kl_in = parts["kl_in"].described
    others = ("kl_in", "beta") if by_element else ("kl_in", "beta", "loss", "nll", "kl")
    task = _C.ElboTask(
        nll,
        kl,
        tuple(map(parts.values, others)),
        kl_in[0].numel() if kl_in else 0,
        _ELEMENT if by_element else _SAMPLE if by_sample else _TOTAL,
        objective.scale,
        HALF_LOG_2PI if objective.full else 0.0,
    )
    return _Plan(task, copies)


@lru_cache(maxsize=1024)
def _nll_plan(descriptions: tuple[Described, ...], objective: Objective) -> _Plan:
    arguments, copies = _nll_arguments(_Parts(NllOperands._fields, descriptions), objective, keep_batch=False)
    return _Plan(_C.NllTask(*arguments), copies)


@lru_cache(maxsize=1024)
def _latent_plan(descriptions: tuple[Described, ...], indexed: bool) -> _Plan:
    parts = _Parts(LatentOperands._fields, descriptions)
    per_sample = parts.values("grad_kl"), parts.values("kl")
    arguments, copies = _latent_arguments(parts, per_sample, keep_batch=per_sample != (None, None), indexed=indexed)
    return _Plan(_C.LatentTask(*arguments), copies)


@lru_cache(maxsize=1024)
def _scale_plan(descriptions: tuple[Described, ...]) -> _Plan:
    names = [str(k) for k in range(len(descriptions))]
    parts = _Parts(names, descriptions)
    forms = tuple([parts.form(parts[name], (0, 0, 1)) for name in names[:-1]])
    counts = tuple([d[0].numel() if d else 0 for d in descriptions[:-1]])
    return _Plan(_C.ScaleTask(forms, counts, parts.values(names[-1])))


def _planned(make: Callable[..., _Plan], device: torch.device, operands: Any, *options: Any) -> _Plan:
    plan = make(tuple(map(described, operands)), *options)
    if plan.copies and (unpacked := operands.unpacked()) is not operands:
        plan = make(tuple(map(described, unpacked)), *options)._replace(unpacked=True)
    return plan._replace(gpu=device.index) if device.type == "cuda" else plan


# --- the backend ----------------------------------------------------------------------------------------------------


class _Native:
    def unavailable(self, device_type: str) -> str | None:
        if _C is None:
            return f"{_absence()}; install fusedvae again where a C++17 compiler is found"
        if device_type == "cpu":
            return None
        if device_type != "cuda":
            return f"it has no kernels for {device_type!r}"
        return _gpus_unavailable()

    def describe(self, device_type: str) -> str:
        return f"C++ kernels, {_C.cpu_isa()}" if device_type == "cpu" else "CUDA kernels"

    def normal(self, out: Tensor, seed: Tensor) -> None:
        arguments = out.data_ptr(), _DTYPES[out.dtype], out.numel(), seed.data_ptr()
        if out.is_cuda:
            gpu = out.device.index
            _C.launch_normal(*arguments, gpu, torch._C._cuda_getCurrentRawStream(gpu))
        else:
            _C.normal(*arguments, torch.get_num_threads())

    def latent(self, operands: LatentOperands, seed: Tensor | None, memo: Memo) -> None:
        plan = memo.get("latent")
        if plan is None:
            plan = memo["latent"] = _planned(_latent_plan, operands.mu.device, operands, seed is not None)
        plan.run(operands, 0 if seed is None else seed.data_ptr())

    def elbo(self, objective: Objective, operands: ElboOperands, memo: Memo) -> None:
        plan = memo.get("elbo")
        if plan is None:
            witness = operands.mu if operands.x is None else operands.x
            assert witness is not None
            plan = memo["elbo"] = _planned(_elbo_plan, witness.device, operands, objective)
        plan.run(operands)
        if objective.reduction == "element":
            self._finish_elements(objective, operands)

    @staticmethod
    def _finish_elements(objective: Objective, operands: ElboOperands) -> None:
        """The constant, which the kernels add to sums only, and the term that is the loss over again."""
        assert operands.loss is not None
        if objective.full:
            operands.loss.add_(HALF_LOG_2PI)
        if operands.nll is not None:
            operands.nll.copy_(operands.loss)

    def nll_backward(self, objective: Objective, operands: NllOperands, memo: Memo) -> None:
        weight = operands.weight
        if weight.dim() == 1:
            weight = weight.view(-1, *[1] * (operands.x.dim() - 1))
            operands = operands._replace(weight=weight)
        _planned(_nll_plan, operands.x.device, operands, objective).run(operands)

    def scale_(self, tensors: Sequence[Tensor], factor: Tensor, memo: Memo) -> None:
        operands = (*tensors, factor)
        plan = memo.get("scale")
        if plan is None:
            plan = memo["scale"] = _planned(_scale_plan, factor.device, operands)
        plan.run(operands)


@lru_cache(maxsize=1)  # the GPUs and the driver of a process do not change
def _gpus_unavailable() -> str | None:
    """Why the CUDA kernels cannot serve this machine's GPUs, and the remedy."""
    if not hasattr(_C, "cuda_unavailable"):
        return "this build of the extension has CPU kernels only; install fusedvae again where nvcc is found"
    return _C.cuda_unavailable() or None


def _absence() -> str:
    """Why there is no extension."""
    if BUILD_RECORD.exists():
        reason = json.loads(BUILD_RECORD.read_text()).get("error")
        if reason:
            return f"the compiled extension was not built ({reason})"
    return f"the compiled extension cannot be loaded ({_import_error})"


BACKEND = _Native()
