"""Triton kernels, compiled when they are first needed: for GPUs of NVIDIA and AMD, with nothing to build.

Works out from sizes, strides and dtypes how the kernels of `triton_kernels` walk a call's operands, in what tiles and
with what workspace, and keeps it: a training loop meets the same ones at every step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedvae.layout import Described, Strides, described

from . import ElboOperands, LatentOperands, Memo, NllOperands, Objective
from .reference import HALF_LOG_2PI
from .walk import Copy, Part, Walk, copy_back, walk, walk_nll, with_stand_ins

try:
    import triton
    import triton.language as tl

    from . import triton_kernels as kernels
except ImportError as error:
    triton = None
    _import_error = str(error)


# --- tiles: what a program takes --------------------------------------------------------------------------------------

_SMALL = 1 << 18
"""Elements below which tiles are small: a GPU has over a hundred processors, each of which should get one."""

_SMALL_TILE, _TILE = 512, 2048
"""Elements of a tile. Sums are made a tile at a time: these are part of a result's rounding, and the same on all chips.

A large one has 256 threads with 32 bytes of each float32 operand in flight: at half an H100's occupancy 96 KiB a
processor for the three operands of the likelihood, where some 40 KiB keep its memory busy. Larger ones would not be
faster; smaller ones would make more partial sums."""

_COLUMN = 128
"""Elements of a row in a tile that is summed over its columns: 512 bytes in float32, whole sectors; the fewer there
are, the more rows are summed in a program, and the less goes through the workspace."""

_NARROW = (1 << 31) - (1 << 16)
"""Offsets from which on the kernels count in 64 bits; the difference is room for the last tile."""


class _Tiles(NamedTuple):
    """The tiles of an extent."""

    shape: tuple[int, int, int]
    counts: tuple[int, int, int]

    @property
    def total(self) -> int:
        return prod(self.counts)


def _power(size: int, limit: int) -> int:
    """The smallest power of two from ``size`` on, at most ``limit``."""
    return min(1 << max(size - 1, 0).bit_length(), limit)


def _tiles(extent: tuple[int, int, int], summed: int = 0) -> _Tiles:
    """Tiles as long along inner as they can be; of columns, where a gradient is ``summed`` over other axes alone."""
    batch, outer, inner = extent
    size = _SMALL_TILE if prod(extent) < _SMALL else _TILE
    columns = summed != 0 and not summed & _INNER
    tile_i = _power(inner, _COLUMN if columns else size)
    tile_o = _power(outer, size // tile_i) if not columns or summed & _OUTER else 1
    tile_b = _power(batch, size // (tile_i * tile_o)) if not columns or summed & _BATCH else 1
    shape = tile_b, tile_o, tile_i
    counts = tuple([-(-whole // part) for whole, part in zip(extent, shape, strict=True)])
    return _Tiles(shape, counts)  # type: ignore[arg-type]


_LANES = 64 if torch.version.hip else 32
"""Threads of a warp: those of a wavefront on AMD's CDNA chips, so that a thread takes as much there."""


def _warps(elements: int) -> int:
    """Warps of a program: a thread takes 8 elements, which is 128 bits of a 16-bit dtype and twice that of float32.

    More would take registers (with 16, a few kernels spill) that the threads to hide memory's latency behind need.
    """
    return max(1, elements // (8 * _LANES))


_REGISTERS = 128
"""More than any kernel needs. Without a bound, NVIDIA's assembler spills to fit in one more program at a time."""


def _options(elements: int) -> dict[str, Any]:
    """How the kernels are compiled for tiles of so many elements."""
    options = {"num_warps": _warps(elements)}
    return options if _LANES == 64 else {**options, "maxnreg": _REGISTERS}


# --- launches ---------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """A launch of a kernel: everything but the operands."""

    kernel: Any
    fields: tuple[str, ...]
    """The kernel's parameters for the operands; it may have none for some."""
    fixed: dict[str, Any]
    """All other arguments."""
    programs: int
    copies: tuple[Copy, ...] = ()
    partials: tuple[int, torch.dtype] | None = None
    totals: int = 0
    counters: int = 0

    def run(self, operands: Sequence[Tensor | float | None], device: torch.device) -> None:
        """Launch on operands of the sizes, strides and dtypes that the plan was made for."""
        walked = with_stand_ins(operands, self.copies) if self.copies else operands
        arguments = dict.fromkeys(self.kernel.arg_names) | self.fixed
        for name, operand in zip(self.fields, walked, strict=True):
            parameter = name if isinstance(operand, Tensor) else f"{name}_value"
            if operand is not None and parameter in arguments:
                arguments[parameter] = operand if isinstance(operand, Tensor) else float(operand)
        if self.partials is not None:
            arguments["partials"] = torch.empty(self.partials[0], dtype=self.partials[1], device=device)
        if self.totals:
            arguments["totals"] = torch.empty(self.totals, dtype=torch.float64, device=device)
        if self.counters:
            arguments["counters"] = _counters(self.counters, device)
        if _is_traced:
            torch.library.wrap_triton(self.kernel)[(self.programs,)](**arguments)
        else:
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                _launch(self.kernel, self.programs, arguments)
        if self.copies:
            copy_back(operands, walked, self.copies)


def _launch(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
    kernel[(programs,)](**arguments)


_is_traced = False
"""Whether launches are for a compiler to see, on tensors without memory."""


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """A block whose launches are for a compiler to see."""
    global _is_traced
    before, _is_traced = _is_traced, True
    try:
        yield
    finally:
        _is_traced = before


_zeros: dict[tuple[torch.device, int], Tensor] = {}


def _counters(count: int, device: torch.device) -> Tensor:
    """Counters that are zero. Kernels leave them so: those of a stream are made once.

    A captured graph or a compiled program, which may run beside anything, gets its own.
    """
    if _is_traced or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _zeros.get((device, stream))
    if found is None or found.numel() < count:
        size = _power(count, 1 << 62)
        found = _zeros[device, stream] = torch.zeros(max(size, 64), dtype=torch.int32, device=device)
    return found


# --- plans, from descriptions of the operands -------------------------------------------------------------------------

_BATCH, _OUTER, _INNER, _ALL = 1, 2, 4, 7  # as in triton_kernels


class _Task(NamedTuple):
    """A walk, in tiles, and the sum that is made on the way, if there is one."""

    walked: Walk
    tiles: _Tiles
    doubles: bool
    """Whether the arithmetic is done in float64."""
    fixed: dict[str, Any]
    """Strides and axes of the operands, and options."""
    partials: tuple[int, torch.dtype] | None = None
    counters: int = 0

    def shape(self, prefix: str = "") -> dict[str, Any]:
        """The arguments that say what is walked, and in what arithmetic."""
        arguments: dict[str, Any] = {f"{prefix}dtype": tl.float64 if self.doubles else tl.float32}
        arguments.update(zip([prefix + d for d in ("batch", "outer", "inner")], self.walked.extent, strict=True))
        arguments.update(zip([f"{prefix}tile_{d}" for d in "boi"], self.tiles.shape, strict=True))
        return arguments

    @property
    def elements(self) -> int:
        """Elements of a tile."""
        return prod(self.tiles.shape)

    @property
    def is_wide(self) -> bool:
        """Whether an offset or an index might not fit 32 bits."""
        extent, logical = self.walked.extent, self.walked.logical
        rows = (extent[1] * extent[2], extent[2], 1)
        return any(
            sum(max(size - 1, 0) * step for size, step in zip(extent, strides, strict=True)) >= _NARROW
            for strides in (*self.walked.strides, logical, rows)
            if strides
        )


_NOTHING = _Task(Walk((1, 1, 1), (0, 0, 0), [], ()), _Tiles((1, 1, 1), (0, 0, 0)), False, {})
"""Half an objective that was not given."""


def _parts(fields: Sequence[str], descriptions: Sequence[Described]) -> dict[str, Part]:
    return {name: Part(k, d) for k, (name, d) in enumerate(zip(fields, descriptions, strict=True))}


def _axes(extent: tuple[int, int, int], strides: Strides) -> int:
    """The dimensions along which an operand varies, or which have size 1."""
    return sum(1 << d for d in range(3) if strides[d] != 0 or extent[d] == 1)


def _strides(walked: Walk, names: Sequence[str], first_output: int) -> dict[str, Any]:
    """Strides of the operands; and the axes of inputs, as outputs vary along all."""
    arguments: dict[str, Any] = {}
    for k, (name, strides) in enumerate(zip(names, walked.strides, strict=True)):
        if strides:
            arguments[f"{name}_0"], arguments[f"{name}_1"] = strides[:2]
            if k < first_output:
                arguments[f"{name}_axes"] = _axes(walked.extent, strides)
    return arguments


def _doubles(*parts: Part) -> bool:
    return any(part.described and part.described[2] == torch.float64 for part in parts)


def _sum(tiles: _Tiles, axes: int, doubles: bool) -> tuple[tuple[int, torch.dtype] | None, int]:
    """Workspace and counters of sums over all but ``axes``; none if every tile has sums of its own."""
    members = prod(count for d, count in enumerate(tiles.counts) if not axes >> d & 1)
    if members <= 1:
        return None, 0
    lanes = prod(size for d, size in enumerate(tiles.shape) if axes >> d & 1)
    return (tiles.total * lanes, torch.float64 if doubles else torch.float32), tiles.total // members


def _likelihood(parts: dict[str, Part], objective: Objective, *, keep_batch: bool) -> _Task:
    absent = Part(-1, None)
    names = ("recon_x", "x", "spread", "weight", "loss", "grad_recon_x", "grad_x", "grad_spread")
    operands = [parts.get(name, absent) for name in names]
    if objective.reduction != "element":
        operands[4] = absent  # the loss is no array of elements
    described_x = parts["x"].described
    assert described_x
    walked = walk_nll(described_x[0], operands, keep_batch=keep_batch, can_sum=lambda extent, strides: True)
    doubles = _doubles(*operands[:3])
    fixed = _strides(walked, names, 4)
    axes = _axes(walked.extent, walked.strides[-1]) if walked.strides[-1] else _ALL
    tiles = _tiles(walked.extent, _ALL & ~axes)
    fixed.update(grad_spread_axes=axes, eps=float(objective.eps), is_variance=objective.is_variance, spread_value=0.0)
    return _Task(walked, tiles, doubles, fixed, *_sum(tiles, axes, doubles))


@lru_cache(maxsize=1024)
def _nll_plan(fields: tuple[str, ...], descriptions: tuple[Described, ...], objective: Objective) -> _Plan:
    task = _likelihood(_parts(fields, descriptions), objective, keep_batch=False)
    fixed = {**task.fixed, **task.shape(), "wide": task.is_wide, **_options(task.elements)}
    fixed["constant"] = HALF_LOG_2PI if objective.full else 0.0
    kernel = kernels.nll_kernel
    return _Plan(kernel, fields, fixed, task.tiles.total, task.walked.copies, task.partials, 0, task.counters)


@lru_cache(maxsize=1024)
def _latent_plan(descriptions: tuple[Described, ...], indexed: bool) -> _Plan:
    parts = _parts(LatentOperands._fields, descriptions)
    names = ("mu", "logvar", "noise", "grad_z", "z", "grad_mu", "grad_logvar")
    operands = [parts[name] for name in names]
    mu, kl, grad_kl = parts["mu"].described, parts["kl"].described, parts["grad_kl"].described
    assert mu
    per_sample = kl is not None or grad_kl is not None
    walked = walk(mu[0], operands, 4, keep_batch=per_sample, indexed=indexed)
    doubles = _doubles(*operands[:3])
    tiles = _tiles(walked.extent)
    task = _Task(walked, tiles, doubles, _strides(walked, names, 4), *(_sum(tiles, _BATCH, doubles) if kl else ()))
    l0, l1, l2 = walked.logical
    fixed = {**task.fixed, **task.shape(), "wide": task.is_wide, **_options(task.elements)}
    fixed.update(l0=l0, l1=l1, l2=l2, kl_0=kl[1][0] if kl else 0, grad_kl_0=grad_kl[1][0] if grad_kl else 0)
    fixed["in_quads"] = l2 == 1 and l0 % 4 == 0 and l1 % 4 == 0 and tiles.shape[2] >= 4
    fields = (*LatentOperands._fields, "seed")
    return _Plan(kernels.latent_kernel, fields, fixed, tiles.total, walked.copies, task.partials, 0, task.counters)


@lru_cache(maxsize=1024)
def _elbo_plan(descriptions: tuple[Described, ...], objective: Objective) -> _Plan:
    parts = _parts(ElboOperands._fields, descriptions)
    by_sample = objective.reduction == "sample"
    nll = kl = _NOTHING
    constant = 0.0
    if x := parts["x"].described:
        nll = _likelihood(parts, objective, keep_batch=by_sample)
        constant = HALF_LOG_2PI * (x[0][1:] if by_sample else x[0]).numel() if objective.full else 0.0
    if mu := parts["mu"].described:
        names = ("mu", "logvar", "grad_mu", "grad_logvar")
        operands = [parts[name] for name in names]
        walked = walk(mu[0], operands, 2, keep_batch=by_sample)
        kl = _Task(walked, _tiles(walked.extent), _doubles(*operands[:2]), _strides(walked, names, 2))
    kl_in, loss = parts["kl_in"].described, parts["loss"].described
    assert loss
    fixed = {"eps": 0.0, "spread_value": 0.0, "beta_value": 0.0, "scale": objective.scale, "constant": constant}
    fixed.update({**nll.fixed, **kl.fixed, **nll.shape("nll_"), **kl.shape("kl_")})
    fixed.update(nll_tiles=nll.tiles.total, kl_tiles=kl.tiles.total, values=loss[0].numel(), by_sample=by_sample)
    fixed.update(kl_in_0=kl_in[1][0] if kl_in else 0, kl_in_count=kl_in[0].numel() if kl_in else 0)
    fixed.update(wide=nll.is_wide or kl.is_wide, **_options(max(nll.elements, kl.elements)))
    tiles = nll.tiles, kl.tiles
    return _Plan(
        kernels.elbo_kernel,
        ElboOperands._fields,
        fixed,
        programs=max(sum(t.total for t in tiles), 1),
        copies=(*nll.walked.copies, *kl.walked.copies),
        partials=nll.partials,
        totals=max(sum(t.total * (t.shape[0] if by_sample else 1) for t in tiles), 1),
        counters=1 + nll.counters,
    )


def _flat(count: int) -> dict[str, Any]:
    """Arguments for kernels that walk dense tensors of ``count`` elements."""
    tile = _SMALL_TILE if count < _SMALL else _TILE
    return {"tile": tile, "wide": count >= _NARROW, **_options(tile)}


@lru_cache(maxsize=1024)
def _normal_plan(count: int) -> _Plan:
    fixed = {"count": count, **_flat(count)}
    return _Plan(kernels.normal_kernel, ("out", "seed"), fixed, -(-count // fixed["tile"]))


_SCALED = 5
"""Tensors that a launch can scale: the gradients of an objective."""


@lru_cache(maxsize=1024)
def _scale_plan(counts: tuple[int, ...]) -> _Plan:
    fixed = _flat(max(counts))
    programs = 0
    for k in range(_SCALED):
        fixed[f"count_{k}"], fixed[f"first_{k}"] = counts[k] if k < len(counts) else 0, programs
        programs += -(-fixed[f"count_{k}"] // fixed["tile"])
    return _Plan(kernels.scale_kernel, (*[f"data_{k}" for k in range(len(counts))], "factor"), fixed, programs)


# --- the backend ------------------------------------------------------------------------------------------------------


class _Triton:
    def unavailable(self, device_type: str) -> str | None:
        if triton is None:
            return f"Triton cannot be imported ({_import_error}); install it with `pip install triton`"
        if device_type == "cpu" and not _interpreted():
            return "Triton has no compiler for CPUs; set TRITON_INTERPRET=1 to run its interpreter, which is slow"
        if device_type not in ("cpu", "cuda"):
            return f"there are no Triton kernels for {device_type!r} devices; use the reference"
        return None

    def describe(self, device_type: str) -> str:
        if _interpreted():
            return "Triton kernels, interpreted"
        if torch.version.hip is not None:
            return f"Triton kernels, {torch.cuda.get_device_properties().gcnArchName.partition(':')[0]}"
        major, minor = torch.cuda.get_device_capability()
        return f"Triton kernels, sm_{major}{minor}"

    def normal(self, out: Tensor, seed: Tensor) -> None:
        if out.numel():
            _normal_plan(out.numel()).run((out, seed), out.device)

    def latent(self, operands: LatentOperands, seed: Tensor | None, memo: Memo) -> None:
        operands = operands.unpacked()
        if operands.mu.numel() == 0:
            if operands.kl is not None:
                operands.kl.zero_()
            return
        plan = memo.get("latent")
        if plan is None:
            plan = memo["latent"] = _latent_plan(tuple(map(described, operands)), seed is not None)
        plan.run((*operands, seed), operands.mu.device)

    def elbo(self, objective: Objective, operands: ElboOperands, memo: Memo) -> None:
        operands = operands.unpacked()
        assert operands.loss is not None
        if objective.reduction != "element":
            plan = memo.get("elbo")
            if plan is None:
                plan = memo["elbo"] = _elbo_plan(tuple(map(described, operands)), objective)
            plan.run(operands, operands.loss.device)
            return
        self._run_elements(objective, operands)
        if operands.nll is not None:
            operands.nll.copy_(operands.loss)

    def nll_backward(self, objective: Objective, operands: NllOperands, memo: Memo) -> None:
        operands = operands.unpacked()
        if operands.weight.dim() == 1:
            weight = operands.weight.view(-1, *[1] * (operands.x.dim() - 1))
            operands = operands._replace(weight=weight)
        self._run_elements(objective, operands)

    def _run_elements(self, objective: Objective, operands: ElboOperands | NllOperands) -> None:
        assert operands.x is not None
        if operands.x.numel():
            plan = _nll_plan(operands._fields, tuple(map(described, operands)), objective)
            plan.run(operands, operands.x.device)
        elif operands.grad_spread is not None:
            operands.grad_spread.zero_()

    def scale_(self, tensors: Sequence[Tensor], factor: Tensor, memo: Memo) -> None:
        tensors = [t for t in tensors if t.numel()]
        if tensors:
            _scale_plan(tuple([t.numel() for t in tensors])).run((*tensors, factor), factor.device)


def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which is settled when they are imported."""
    return not isinstance(kernels.elbo_kernel, triton.runtime.JITFunction)


BACKEND = _Triton()
