"""Triton kernels, compiled when they are first needed: for GPUs of NVIDIA and AMD, with nothing to build.

Works out from sizes, strides and dtypes how the kernels of `triton_kernels` walk a call's operands, in what tiles and
with what workspace, and keeps it: a training loop meets the same ones at every step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedvae.layout import Described, Strides, described

from . import Latents, Memo, Reconstruction
from .reference import HALF_LOG_2PI
from .walk import Copy, Walk, copy_back, walk, walk_nll, with_stand_ins

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

A large one makes a thread load 16 elements of each operand before it uses any, 64 bytes in float32: with the five
streams of the likelihood enough in flight to keep HBM busy at half the occupancy. Larger ones cost registers."""

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


def _warps(elements: int, doubles: bool) -> int:
    """Warps of a program: threads get 16 elements of a full tile, in float64 (twice the registers) 8."""
    return max(1, min(elements // 512, 4)) * (2 if doubles else 1)


# --- plans, from descriptions of the operands -------------------------------------------------------------------------

_BATCH, _OUTER, _INNER, _ALL = 1, 2, 4, 7  # as in triton_kernels


def _axes(extent: tuple[int, int, int], strides: Strides) -> int:
    """The dimensions along which an operand varies (or might: those of size 1)."""
    return sum(1 << d for d in range(3) if strides[d] != 0 or extent[d] == 1)


class _Plan(NamedTuple):
    """A launch of a kernel: everything but the tensors."""

    kernel: Any
    parameters: tuple[str | None, ...]
    """What each operand is to the kernel; None for those it has no use for."""
    fixed: dict[str, Any]
    programs: int
    copies: tuple[Copy, ...] = ()
    partials: tuple[int, torch.dtype] | None = None
    totals: int = 0
    counters: int = 0

    def run(self, operands: Sequence[Tensor | float | None], device: torch.device) -> None:
        """Launch on operands of the sizes, strides and dtypes that the plan was made for."""
        given = operands
        if self.copies:
            operands = with_stand_ins(given, self.copies)
        arguments: dict[str, Any] = {
            name: operand for name, operand in zip(self.parameters, operands, strict=True) if name is not None
        }
        if self.partials is not None:
            arguments["partials"] = torch.empty(self.partials[0], dtype=self.partials[1], device=device)
        if self.totals:
            arguments["totals"] = torch.empty(self.totals, dtype=torch.float64, device=device)
        if self.counters:
            arguments["counters"] = _counters(self.counters, device)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            _launch(self.kernel, self.programs, {**arguments, **self.fixed})
        if self.copies:
            copy_back(given, operands, self.copies)


def _launch(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
    kernel[(programs,)](**arguments)


_zeros: dict[tuple[torch.device, int], Tensor] = {}


def _counters(count: int, device: torch.device) -> Tensor:
    """Counters that are zero. Kernels leave them so: those of a stream are made once.

    A captured graph, which may be replayed beside anything, gets its own.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _zeros.get((device, stream))
    if found is None or found.numel() < count:
        size = _power(count, 1 << 62)
        found = _zeros[device, stream] = torch.zeros(max(size, 64), dtype=torch.int32, device=device)
    return found


def _operands(walked: Walk, names: Sequence[str | None], outputs: int) -> dict[str, Any]:
    """Strides and axes of the named operands; ``outputs`` is the position of the first that varies along all axes."""
    fixed: dict[str, Any] = {}
    for k, name in enumerate(names):
        if name is None:
            continue
        strides = walked.strides[k] or (0, 0, 0)
        fixed[f"{name}_0"], fixed[f"{name}_1"] = strides[:2]
        if k < outputs:
            fixed[f"{name}_axes"] = _axes(walked.extent, strides)
    return fixed


def _shape(prefix: str, walked: Walk, tiles: _Tiles) -> dict[str, Any]:
    fixed: dict[str, Any] = dict(zip([f"{prefix}{d}" for d in ("batch", "outer", "inner")], walked.extent, strict=True))
    fixed.update(zip([f"{prefix}tile_{d}" for d in "boi"], tiles.shape, strict=True))
    return fixed


def _is_wide(*walks: Walk) -> bool:
    """Whether an offset or an index might not fit 32 bits."""
    return any(
        sum(max(size - 1, 0) * step for size, step in zip(w.extent, strides, strict=True)) >= _NARROW
        for w in walks
        for strides in (*w.strides, w.logical, (w.extent[1] * w.extent[2], w.extent[2], 1))
        if strides is not None
    )


def _doubles(*operands: Described) -> bool:
    return any(operand and operand[2] == torch.float64 for operand in operands)


def _arithmetic(doubles: bool) -> Any:
    return tl.float64 if doubles else tl.float32


def _partials(tiles: _Tiles, axes: int, doubles: bool) -> tuple[tuple[int, torch.dtype] | None, int]:
    """Workspace and counters for what is summed over the other axes; none if every tile has sums of its own."""
    members = prod(count for d, count in enumerate(tiles.counts) if not axes >> d & 1)
    if members <= 1:
        return None, 0
    lanes = prod(size for d, size in enumerate(tiles.shape) if axes >> d & 1)
    return (tiles.total * lanes, torch.float64 if doubles else torch.float32), tiles.total // members


class _Likelihood(NamedTuple):
    """The likelihood's half of a plan."""

    walked: Walk
    tiles: _Tiles
    doubles: bool
    fixed: dict[str, Any]
    partials: tuple[int, torch.dtype] | None
    counters: int


_NLL = ("recon_x", "x", "spread", "weight", "value", "grad_recon_x", "grad_x", "grad_spread")


def _likelihood(
    shape: torch.Size,
    names: Sequence[str | None],
    operands: tuple[Described, ...],
    is_variance: bool,
    eps: float,
    *,
    keep_batch: bool,
) -> _Likelihood:
    walked = walk_nll(shape, operands, keep_batch=keep_batch, can_sum=lambda extent, strides: True)
    fixed = _operands(walked, names, 4)
    strides = walked.strides[7]
    axes = _ALL if strides is None else _axes(walked.extent, strides)
    tiles = _tiles(walked.extent, _ALL & ~axes)
    doubles = _doubles(*operands[:3])
    partials, counters = _partials(tiles, axes, doubles)
    fixed.update(grad_spread_axes=axes, eps=float(eps), is_variance=is_variance)
    return _Likelihood(walked, tiles, doubles, fixed, partials, counters)


@lru_cache(maxsize=1024)
def _nll_plan(
    shape: torch.Size, operands: tuple[Described, ...], is_variance: bool, eps: float, constant: float
) -> _Plan:
    half = _likelihood(shape, _NLL, operands, is_variance, eps, keep_batch=False)
    fixed = {**half.fixed, **_shape("", half.walked, half.tiles)}
    fixed.update(constant=constant, dtype=_arithmetic(half.doubles), wide=_is_wide(half.walked))
    fixed["num_warps"] = _warps(prod(half.tiles.shape), half.doubles)
    if half.partials is None:
        fixed.update(partials=None, counters=None)
    names = (*_NLL, "spread_value")
    return _Plan(
        kernels.nll_kernel, names, fixed, half.tiles.total, half.walked.copies, half.partials, 0, half.counters
    )


_LATENT = ("mu", "logvar", "noise", "grad_z", None, "z", "grad_mu", "grad_logvar", None)
_GRAD_KL, _KL = 4, 8  # positions of those with one value a sample


@lru_cache(maxsize=1024)
def _latent_plan(shape: torch.Size, operands: tuple[Described, ...], indexed: bool) -> _Plan:
    per_sample = operands[_GRAD_KL] is not None or operands[_KL] is not None
    elements = [None if k in (_GRAD_KL, _KL) else operand for k, operand in enumerate(operands)]
    walked = walk(shape, elements, 5, keep_batch=per_sample, indexed=indexed)
    tiles = _tiles(walked.extent)
    doubles = _doubles(*operands[:3])
    l0, l1, l2 = walked.logical
    fixed = {**_operands(walked, _LATENT, 5), **_shape("", walked, tiles)}
    fixed.update(l0=l0, l1=l1, l2=l2, dtype=_arithmetic(doubles), wide=_is_wide(walked))
    fixed["in_quads"] = l2 == 1 and l0 % 4 == 0 and l1 % 4 == 0 and tiles.shape[2] >= 4
    fixed["num_warps"] = _warps(prod(tiles.shape), doubles)
    for k, name in ((_GRAD_KL, "grad_kl_0"), (_KL, "kl_0")):
        operand = operands[k]
        fixed[name] = operand[1][0] if operand else 0
    partials, counters = _partials(tiles, _BATCH, doubles) if operands[_KL] else (None, 0)
    if partials is None:
        fixed.update(partials=None, counters=None)
    names = ("mu", "logvar", "noise", "grad_z", "grad_kl", "z", "grad_mu", "grad_logvar", "kl", "seed")
    return _Plan(kernels.latent_kernel, names, fixed, tiles.total, walked.copies, partials, counters=counters)


_ELBO_NLL = tuple([name if name not in ("weight", "value") else None for name in _NLL])
_ELBO_KL = ("mu", "logvar", "grad_mu", "grad_logvar")
_ABSENT = Walk((1, 1, 1), (0, 0, 0), (None,) * 8, ())
"""The walk of half an objective that was not given."""


@lru_cache(maxsize=1024)
def _elbo_plan(
    likelihood: tuple[Described, ...],
    divergence: tuple[Described, ...],
    kl_in: Described,
    x_shape: torch.Size | None,
    latent_shape: torch.Size | None,
    is_variance: bool,
    eps: float,
    values: int,
    by_sample: bool,
    scale: float,
    constant: float,
) -> _Plan:
    nothing = _Tiles((1, 1, 1), (0, 0, 0))
    if x_shape is not None:
        nll = _likelihood(x_shape, _ELBO_NLL, likelihood, is_variance, eps, keep_batch=by_sample)
    else:
        absent = _operands(_ABSENT, _ELBO_NLL, 4)
        absent.update(grad_spread_axes=_ALL, eps=0.0, is_variance=False)
        nll = _Likelihood(_ABSENT, nothing, False, absent, None, 0)
    walked, tiles = _ABSENT, nothing
    if latent_shape is not None:
        walked = walk(latent_shape, divergence, 2, keep_batch=by_sample)
        tiles = _tiles(walked.extent)
    doubles = _doubles(*divergence[:2])
    fixed = {**nll.fixed, **_operands(walked, _ELBO_KL, 2)}
    fixed.update(_shape("nll_", nll.walked, nll.tiles), nll_tiles=nll.tiles.total, nll_dtype=_arithmetic(nll.doubles))
    fixed.update(_shape("kl_", walked, tiles), kl_tiles=tiles.total, kl_dtype=_arithmetic(doubles))
    fixed.update(
        kl_in_0=kl_in[1][0] if kl_in else 0,
        kl_in_count=kl_in[0].numel() if kl_in else 0,
        scale=scale,
        constant=constant * (x_shape[1:].numel() if by_sample else x_shape.numel()) if x_shape is not None else 0.0,
        values=values,
        by_sample=by_sample,
        wide=_is_wide(nll.walked, walked),
        num_warps=_warps(max(prod(nll.tiles.shape), prod(tiles.shape)), nll.doubles or doubles),
    )
    if nll.partials is None:
        fixed["partials"] = None
    lanes = (nll.tiles.shape[0], tiles.shape[0]) if by_sample else (1, 1)
    copies = (*nll.walked.copies, *[copy._replace(position=len(_NLL) + copy.position) for copy in walked.copies])
    return _Plan(
        kernels.elbo_kernel,
        (*_ELBO_NLL, *_ELBO_KL, "kl_in", "beta", "loss", "nll", "kl", "spread_value", "beta_value"),
        fixed,
        max(nll.tiles.total + tiles.total, 1),
        copies,
        nll.partials,
        max(nll.tiles.total * lanes[0] + tiles.total * lanes[1], 1),
        1 + nll.counters,
    )


@lru_cache(maxsize=1024)
def _scale_plan(counts: tuple[int, ...]) -> _Plan:
    size = _SMALL_TILE if sum(counts) < _SMALL else _TILE
    fixed: dict[str, Any] = {}
    programs = 0
    for k in range(5):
        count = counts[k] if k < len(counts) else 0
        fixed[f"count_{k}"], fixed[f"first_{k}"] = count, programs
        programs += -(-count // size)
    fixed.update(tile=size, wide=max(counts) >= _NARROW, num_warps=_warps(size, False))
    return _Plan(kernels.scale_kernel, ("factor", *[f"data_{k}" for k in range(5)]), fixed, programs)


# --- the backend ----------------------------------------------------------------------------------------------------


def _tensor_and_number(operand: Tensor | float | None) -> tuple[Tensor | None, float]:
    """What a kernel takes for an operand that may be a number."""
    return (operand, 0.0) if isinstance(operand, Tensor) or operand is None else (None, float(operand))


class _Triton:
    def unavailable(self, device_type: str) -> str | None:
        if triton is None:
            return f"Triton cannot be imported ({_import_error}); install it with `pip install triton`"
        if device_type == "cpu" and not triton.knobs.runtime.interpret:
            return "Triton has no compiler for CPUs; set TRITON_INTERPRET=1 to run its interpreter, for debugging"
        if device_type not in ("cpu", "cuda"):
            return f"no kernels for {device_type!r} devices"
        return None

    def describe(self, device_type: str) -> str:
        if triton.knobs.runtime.interpret:
            return "Triton kernels, interpreted"
        if torch.version.hip is not None:
            return f"Triton kernels, {torch.cuda.get_device_properties().gcnArchName.partition(':')[0]}"
        major, minor = torch.cuda.get_device_capability()
        return f"Triton kernels, sm_{major}{minor}"

    def normal(self, out: Tensor, seed: Tensor) -> None:
        count = out.numel()
        if count == 0:
            return
        size = _SMALL_TILE if count < _SMALL else _TILE
        fixed = {"count": count, "tile": size, "wide": count >= _NARROW, "num_warps": _warps(size, False)}
        _Plan(kernels.normal_kernel, ("out", "seed"), fixed, -(-count // size)).run((out, seed), out.device)

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
        if mu.numel() == 0:
            if kl is not None:
                kl.zero_()
            return
        operands = (mu, logvar, noise, grad_z, grad_kl, z, grad_mu, grad_logvar, kl)
        plan = memo.get("latent")
        if plan is None:
            plan = memo["latent"] = _latent_plan(mu.shape, tuple(map(described, operands)), seed is not None)
        plan.run((*operands, seed), mu.device)

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
        r = reconstruction
        constant = HALF_LOG_2PI if r is not None and r.full else 0.0
        if reduction == "element":
            assert r is not None
            self._nll(r, None, loss, constant)
            if nll is not None:
                nll.copy_(loss)
            return
        likelihood: tuple[Any, ...] = (None,) * len(_NLL)
        divergence: tuple[Any, ...] = (None,) * 4
        spread, spread_value = None, 0.0
        if r is not None:
            spread, spread_value = _tensor_and_number(r.spread)
            likelihood = (r.recon_x, r.x, spread, None, None, r.grad_recon_x, r.grad_x, r.grad_spread)
        if latents is not None:
            divergence = latents
        plan = memo.get("elbo")
        if plan is None:
            plan = memo["elbo"] = _elbo_plan(
                tuple(map(described, likelihood)),
                tuple(map(described, divergence)),
                described(kl_in),
                None if r is None else r.x.shape,
                None if latents is None else latents.mu.shape,
                r is not None and r.is_variance,
                0.0 if r is None else r.eps,
                loss.numel(),
                reduction == "sample",
                scale,
                constant,
            )
        weight, weight_value = _tensor_and_number(beta)
        plan.run((*likelihood, *divergence, kl_in, weight, loss, nll, kl, spread_value, weight_value), loss.device)

    def nll_backward(self, reconstruction: Reconstruction, weight: Tensor) -> None:
        if weight.dim() == 1:
            weight = weight.view(-1, *[1] * (reconstruction.x.dim() - 1))
        self._nll(reconstruction, weight, None, 0.0)

    def _nll(self, r: Reconstruction, weight: Tensor | None, value: Tensor | None, constant: float) -> None:
        if r.x.numel() == 0:
            if r.grad_spread is not None:
                r.grad_spread.zero_()
            return
        spread, spread_value = _tensor_and_number(r.spread)
        operands = (r.recon_x, r.x, spread, weight, value, r.grad_recon_x, r.grad_x, r.grad_spread)
        plan = _nll_plan(r.x.shape, tuple(map(described, operands)), r.is_variance, r.eps, constant)
        plan.run((*operands, spread_value), r.x.device)

    def scale_(self, tensors: list[Tensor], factor: Tensor, memo: Memo) -> None:
        tensors = [t for t in tensors if t.numel()]
        if tensors:
            plan = _scale_plan(tuple([t.numel() for t in tensors]))
            plan.run((factor, *tensors, *[None] * (5 - len(tensors))), factor.device)


BACKEND = _Triton()
