"""Triton kernels, compiled when they are first needed: for GPUs of NVIDIA and AMD, with nothing to build.

Works out from sizes, strides and dtypes how the kernels of `triton_kernels` walk a call's operands, in what tiles and
with what workspace.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from math import inf, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedvae.layout import Strides

from . import LatentWork, Launcher, ObjectiveWork, Part, TermWork
from .reference import GIVEN, Form
from .walk import Copy, Extent, Walk, walk_latent, walk_term, with_copies

try:
    import triton
    import triton.language as tl

    from . import triton_kernels as kernels
except ImportError as error:
    triton = None
    _import_error = str(error)


_BATCH, _OUTER, _INNER, _ALL = 1, 2, 4, 7  # as in triton_kernels

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

    shape: Extent
    counts: Extent

    @property
    def total(self) -> int:
        return prod(self.counts)

    @property
    def elements(self) -> int:
        """Elements of a tile."""
        return prod(self.shape)


def _power(size: int, limit: int) -> int:
    """The smallest power of two from ``size`` on, at most ``limit``."""
    return min(1 << max(size - 1, 0).bit_length(), limit)


def _tiles(extent: Extent, summed: Sequence[int] = ()) -> _Tiles:
    """Tiles as long along inner as they can be; of columns, where a gradient is ``summed`` over other axes alone.

    ``summed`` has the axes that each gradient is summed over.
    """
    batch, outer, inner = extent
    size = _SMALL_TILE if prod(extent) < _SMALL else _TILE
    over = 0  # the axes that columns are summed over
    for axes in summed:
        over |= 0 if axes & _INNER else axes
    tile_i = _power(inner, _COLUMN if over else size)
    tile_o = _power(outer, size // tile_i) if not over or over & _OUTER else 1
    tile_b = _power(batch, size // (tile_i * tile_o)) if not over or over & _BATCH else 1
    shape = tile_b, tile_o, tile_i
    counts = tuple([-(-whole // part) for whole, part in zip(extent, shape, strict=True)])
    return _Tiles(shape, counts)  # type: ignore[arg-type]


_LANES = 64 if torch.version.hip else 32
"""Threads of a warp: those of a wavefront on AMD's CDNA chips, so that a thread takes as much there."""


_REGISTERS = 128
"""Enough for all kernels. Without a bound, NVIDIA's assembler spills to fit in one more program at a time."""


def _options(elements: int, *, is_heavy: bool = False) -> dict[str, Any]:
    """How the kernels are compiled for tiles of so many elements.

    A thread takes 8 elements, which is 128 bits of a 16-bit dtype and twice that of float32. More would take registers
    (with 16, a few kernels spill) that the threads to hide memory's latency behind need; and what is heavy, as float64
    is, takes more of them for each element, and 4 elements.
    """
    options = {"num_warps": max(1, elements // ((4 if is_heavy else 8) * _LANES))}
    return options if _LANES == 64 else {**options, "maxnreg": _REGISTERS}


def _is_heavy(term: TermWork) -> bool:
    """Whether an element takes many registers: it is float64, or has two scales that are not logarithms."""
    return term.in_double or sum(form != Form() for form in term.forms) == 2


# --- launches ---------------------------------------------------------------------------------------------------------


class _KernelLauncher:
    """A launch of a kernel, on sources of the sizes, strides and dtypes that it was prepared for."""

    def __init__(
        self,
        kernel: Any,
        programs: int,
        device: torch.device,
        fixed: dict[str, Any],
        parts: dict[str, Part | None],
        workspace: dict[str, tuple[int, torch.dtype]] | None = None,
        counters: int = 0,
        factors: dict[str, Part] | None = None,
        *,
        keeps_workspace: bool = True,
    ) -> None:
        """Prepare a launch.

        Args:
            fixed: the arguments that are the same for all sources. All that are in none of these are None.
            parts: the operands, by parameter.
            workspace: how many partial sums there is room for, of what dtype, by parameter.
            counters: how many there are.
            factors: numbers that a fixed argument is multiplied by, by parameter.
            keeps_workspace: whether counters stay for the next launch.
        """
        self.fixed: dict[str, Any] = dict.fromkeys(kernel.arg_names) | fixed
        self._kernel, self._programs, self._device = kernel, programs, device
        given = [(name, part) for name, part in parts.items() if part is not None]
        self._numbers = [(f"{name}_value", part.source) for name, part in given if part.is_number]
        self._tensors = [(name, part.source) for name, part in given if not part.is_number and part.half is None]
        self._halves = [(name, part) for name, part in given if part.half is not None]
        self._workspace = [(name, *size) for name, size in (workspace or {}).items()]
        self._counters, self._keeps_workspace = counters, keeps_workspace
        self._factors = [(name, part.source) for name, part in (factors or {}).items()]

    def __call__(self, sources: tuple[Any, ...]) -> None:
        device, arguments = self._device, self._arguments(sources)
        if _is_traced:
            torch.library.wrap_triton(self._kernel)[(self._programs,)](**arguments)
        else:
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                _launch(self._kernel, self._programs, arguments)

    def _arguments(self, sources: tuple[Any, ...]) -> dict[str, Any]:
        device, arguments = self._device, self.fixed.copy()
        for name, source in self._tensors:
            arguments[name] = sources[source]
        for name, source in self._numbers:
            arguments[name] = float(sources[source])
        for name, source in self._factors:
            arguments[name] *= float(sources[source])
        for name, part in self._halves:
            arguments[name] = part.of(sources)
        for name, size, dtype in self._workspace:
            arguments[name] = torch.empty(size, dtype=dtype, device=device)
        if self._counters:
            arguments["counters"] = _counters(self._counters, device, are_kept=self._keeps_workspace)
        return arguments


class _LatentLauncher(_KernelLauncher):
    """A launch over the latent, whose noise may begin anywhere in its stream."""

    def __init__(self, *arguments: Any, offset: Part | None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._offset = None if offset is None else offset.source

    def _arguments(self, sources: tuple[Any, ...]) -> dict[str, Any]:
        arguments = super()._arguments(sources)
        if self._offset is None:
            return arguments
        offset = sources[self._offset]
        if isinstance(offset, Tensor):  # which only the kernel looks at
            arguments["offset"] = offset
        elif offset:
            arguments["offset"] = int(offset)
            arguments["in_quads"] = arguments["in_quads"] and offset % 4 == 0
        return arguments


def _nothing(sources: tuple[Any, ...]) -> None:
    """The launcher of no work."""


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


def _counters(count: int, device: torch.device, *, are_kept: bool) -> Tensor:
    """Counters that are zero. Kernels leave them so: those of a stream are made once.

    A captured graph or a compiled program, which may run beside anything, gets its own.
    """
    if not are_kept or _is_traced or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _zeros.get((device, stream))
    if found is None or found.numel() < count:
        size = _power(count, 1 << 62)
        found = _zeros[device, stream] = torch.zeros(max(size, 64), dtype=torch.int32, device=device)
    return found


# --- what kernels are told of a walk ----------------------------------------------------------------------------------

_MOST_INPUTS = 4
"""What a formula takes: see triton_math."""

_INPUTS = tuple([f"in{k}" for k in range(_MOST_INPUTS)])
_GRADS = tuple([f"g{k}" for k in range(_MOST_INPUTS)])

# The operands whose axes the kernels are told, in this order: see triton_kernels.
_SUMMED = ("value", *_GRADS)
_TERM_AXES = (*_INPUTS, "incoming", *_SUMMED, "weight")
_LATENT_AXES = (*_INPUTS, "incoming", *_SUMMED, "noise", "grad_z")


def _strides(names: Sequence[str], strides: Sequence[Strides]) -> dict[str, int]:
    """The strides of operands."""
    arguments: dict[str, int] = {}
    for name, steps in zip(names, strides, strict=True):
        if steps:
            arguments[f"{name}_0"], arguments[f"{name}_1"] = steps[:2]
    return arguments


def _axes(names: Sequence[str], walked: Walk) -> dict[str, int]:
    """The dimensions that operands vary along, or that have size 1; of a number, none."""
    return {
        name: sum(1 << d for d in range(3) if steps[d] != 0 or walked.extent[d] == 1) if steps else 0
        for name, part, steps in zip(names, walked.parts, walked.strides, strict=True)
        if part is not None
    }


class _Sums(NamedTuple):
    """The sums that tiles share, of some outputs."""

    slots: tuple[int | None, ...]
    """Of each of `_SUMMED`."""
    partials: int
    """How many partial sums a slot has room for."""
    counters: int
    """How many it takes."""

    @property
    def total(self) -> int:
        """How many slots there are."""
        return sum(slot is not None for slot in self.slots)

    @property
    def fixed(self) -> dict[str, Any]:
        return {"slots": self.slots, "partials_step": self.partials, "counters_step": self.counters}


def _sums(axes: dict[str, int], tiles: _Tiles) -> _Sums:
    """Those of the outputs among operands with these axes."""
    slots: list[int | None] = []
    sizes = [(0, 0)]
    for name in _SUMMED:
        size = _partial_sums(tiles, axes[name]) if name in axes else (0, 0)
        slots.append(len(sizes) - 1 if size[0] else None)
        sizes += [size] if size[0] else []
    return _Sums(tuple(slots), max(partials for partials, _ in sizes), max(counters for _, counters in sizes))


def _tiles_for(extent: Extent, axes: dict[str, int]) -> _Tiles:
    """Tiles for operands with these axes."""
    return _tiles(extent, [_ALL & ~axes[name] for name in _SUMMED if name in axes])


_ScaleForm = tuple[str, bool, float | None, float | None, float] | None
"""The form of a scale as triton_math has it."""


def _scale_form(form: Form) -> _ScaleForm:
    bounds = tuple([None if bound in (-inf, inf) else float(bound) for bound in (form.low, form.high)])
    name = "log" if form.map == "exponential" and form.eps == 0 else form.map
    if (name, form.squared, *bounds) == ("log", False, None, None):
        return None
    return name, form.squared, *bounds, float(form.eps)  # type: ignore[return-value]


def _forms(term: TermWork) -> dict[str, _ScaleForm]:
    return {f"form{k}": _scale_form(form) for k, form in enumerate(term.forms)}


def _shape(extent: Extent, tiles: _Tiles, in_double: bool) -> dict[str, Any]:
    """What is walked, in what tiles, and in what arithmetic."""
    arguments: dict[str, Any] = dict(zip(("batch", "outer", "inner"), extent, strict=True))
    arguments.update(zip(("tile_b", "tile_o", "tile_i"), tiles.shape, strict=True))
    arguments["dtype"] = tl.float64 if in_double else tl.float32
    return arguments


def _is_wide(extent: Extent, walked: Sequence[Strides]) -> bool:
    """Whether an offset or an index might not fit 32 bits."""
    rows = (extent[1] * extent[2], extent[2], 1)
    return any(
        sum(max(size - 1, 0) * step for size, step in zip(extent, strides, strict=True)) >= _NARROW
        for strides in (*walked, rows)
        if strides
    )


def _partial_sums(tiles: _Tiles, axes: int) -> tuple[int, int]:
    """How many partial sums and counters sums over all but ``axes`` take: none if every tile has sums of its own."""
    members = prod(count for d, count in enumerate(tiles.counts) if not axes >> d & 1)
    if members <= 1:
        return 0, 0
    lanes = prod(size for d, size in enumerate(tiles.shape) if axes >> d & 1)
    return tiles.total * lanes, tiles.total // members


def _stride(part: Part | None) -> int:
    """That of a vector of values per sample, or of one value."""
    return part.strides[0] if part is not None and part.strides else 0


class _Term(NamedTuple):
    """A term as the kernels take it."""

    fixed: dict[str, Any]
    parts: dict[str, Part | None]
    factors: dict[str, Part]
    copies: list[Copy]
    tiles: _Tiles
    is_wide: bool = False
    sums: _Sums = _Sums((), 0, 0)


def _absent_term() -> _Term:
    """No term; its numbers are there all the same, since a kernel's numbers have a type."""
    fixed: dict[str, Any] = {"factor": 0.0, "constant": 0.0, "coefficient_value": 1.0}
    fixed.update({f"{name}_value": 0.0 for name in (*_INPUTS[1:], "weight")})
    return _Term(fixed, {}, {}, [], _Tiles((1, 1, 1), (0, 0, 0)))


def _term(term: TermWork, sources: int, *, keep_batch: bool) -> _Term:
    """A term that is walked, or whose values are given."""
    found = _absent_term()
    found.fixed.update(factor=term.factor, axes=(None,) * len(_TERM_AXES))
    found.parts.update(coefficient=term.coefficient)
    if term.normalizer is not None and term.normalizer.is_number:
        found.factors.update(factor=term.normalizer)
    else:
        found.parts.update(normalizer=term.normalizer)
    if term.formula is GIVEN:
        (values,) = term.inputs
        assert values.shape is not None
        found.fixed.update(batch=values.shape.numel(), in0_0=_stride(values))
        found.parts.update(in0=values)
        return found
    walked = walk_term(term, sources, keep_batch=keep_batch, can_sum=lambda extent, strides: True)
    extent, inputs = walked.extent, len(term.inputs)
    names = (*_INPUTS[:inputs], "weight", "incoming", "value", *_GRADS[:inputs])
    axes = _axes(names, walked)
    tiles = _tiles_for(extent, axes)
    sums = _sums(axes, tiles)
    fixed = {
        **found.fixed,
        **_shape(extent, tiles, term.in_double),
        **_strides(names, walked.strides),
        **_forms(term),
        **sums.fixed,
        "formula": term.formula.name,
        "gains": _gains(term),
        "axes": tuple([axes.get(name) for name in _TERM_AXES]),
    }
    return found._replace(
        fixed=fixed,
        parts={**found.parts, **dict(zip(names, walked.parts, strict=True))},
        copies=walked.copies,
        tiles=tiles,
        is_wide=_is_wide(extent, walked.strides),
        sums=sums,
    )


def _gains(term: TermWork) -> tuple[float, ...] | None:
    """What the gradients are multiplied by, one for every input that kernels have; None for nothing."""
    if term.gains is None or set(term.gains) == {1.0}:
        return None
    return (*term.gains, *[1.0] * (_MOST_INPUTS - len(term.gains)))


def _workspace(prefix: str, sums: _Sums, in_double: bool) -> dict[str, tuple[int, torch.dtype]]:
    """That of shared sums, in the dtype of the arithmetic."""
    count = sums.total * sums.partials
    return {f"{prefix}partials": (count, torch.float64 if in_double else torch.float32)} if count else {}


def _flat(count: int) -> dict[str, Any]:
    """Arguments for kernels that go through dense tensors of ``count`` elements."""
    tile = _SMALL_TILE if count < _SMALL else _TILE
    return {"tile": tile, "wide": count >= _NARROW, **_options(tile)}


_SCALED = 2 * _MOST_INPUTS
"""Tensors that a launch can scale: the gradients of an objective."""


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
        count = out.numel()
        if count:
            fixed = {"count": count, **_flat(count), "out": out, "seed": seed}
            _KernelLauncher(kernels.normal_kernel, -(-count // fixed["tile"]), out.device, fixed, {})(())

    def prepare_latent(
        self, work: LatentWork, sources: int, device: torch.device, *, keeps_workspace: bool = True
    ) -> Launcher:
        term, inputs = work.divergence, len(work.divergence.inputs)
        walked = walk_latent(work, sources, can_sum=lambda extent, strides: True)
        extent = walked.extent
        names = (*_INPUTS[:inputs], "noise", "grad_z", "incoming", "z", "value", *_GRADS[:inputs])
        axes = _axes(names, walked)
        tiles = _tiles_for(extent, axes)
        if not tiles.total:
            return with_copies(_nothing, walked.copies)
        sums = _sums(axes, tiles)
        l0, l1, l2 = walked.logical
        fixed = {
            **{f"{name}_value": 0.0 for name in (*_INPUTS[1:], "incoming")},
            **_shape(extent, tiles, term.in_double),
            **_strides(names, walked.strides),
            **_forms(term),
            **sums.fixed,
            **_options(tiles.elements, is_heavy=_is_heavy(term)),
            "formula": term.formula.name,
            "at_sample": work.at_sample,
            "axes": tuple([axes.get(name) for name in _LATENT_AXES]),
            "l0": l0,
            "l1": l1,
            "l2": l2,
            "in_quads": l2 == 1 and l0 % 4 == 0 and l1 % 4 == 0 and tiles.shape[2] >= 4,
            "wide": _is_wide(extent, [*walked.strides, walked.logical]),
        }
        parts = {**dict(zip(names, walked.parts, strict=True)), "seed": work.seed}
        launch = _LatentLauncher(
            kernels.latent_kernel,
            tiles.total,
            device,
            fixed,
            parts,
            _workspace("", sums, term.in_double),
            sums.total * sums.counters,
            offset=work.offset,
            keeps_workspace=keeps_workspace,
        )
        return with_copies(launch, walked.copies)

    def prepare_objective(
        self, work: ObjectiveWork, sources: int, device: torch.device, *, keeps_workspace: bool = True
    ) -> Launcher:
        prepare = _prepare_elements if work.values == "element" else _prepare_values
        return prepare(work, sources, device, keeps_workspace)

    def prepare_scale(self, tensors: Sequence[Part], factor: Part, device: torch.device) -> Launcher:
        parts: dict[str, Part | None] = {"factor": factor}
        counts = [part.shape.numel() if part.shape is not None else 0 for part in tensors]
        if not any(counts):
            return _nothing
        assert len(counts) <= _SCALED
        fixed = _flat(max(counts))
        programs = 0
        for k, (part, count) in enumerate(zip(tensors, counts, strict=True)):
            if count:
                parts[f"data_{k}"] = part
                fixed[f"count_{k}"], fixed[f"first_{k}"] = count, programs
                programs += -(-count // fixed["tile"])
        return _KernelLauncher(kernels.scale_kernel, programs, device, fixed, parts)


def _prepare_elements(work: ObjectiveWork, sources: int, device: torch.device, keeps_workspace: bool) -> Launcher:
    """A term element by element."""
    (term,) = work.terms
    task = _term(term, sources, keep_batch=False)
    if not task.tiles.total:
        return with_copies(_nothing, task.copies)
    fixed = {"incoming_value": 0.0, "grad_scale_value": 1.0, **task.fixed, "constant": term.constant}
    fixed.update(wide=task.is_wide, **_options(task.tiles.elements, is_heavy=_is_heavy(term)))
    launch = _KernelLauncher(
        kernels.elementwise_kernel,
        task.tiles.total,
        device,
        fixed,
        {**task.parts, "grad_scale": work.grad_scale},
        _workspace("", task.sums, term.in_double),
        task.sums.total * task.sums.counters,
        task.factors,
        keeps_workspace=keeps_workspace,
    )
    return with_copies(launch, task.copies)


def _prepare_values(work: ObjectiveWork, sources: int, device: torch.device, keeps_workspace: bool) -> Launcher:
    """Up to two terms, with a total or with values per sample."""
    by_sample, loss = work.values == "sample", work.loss
    assert loss is not None
    assert loss.shape is not None
    fixed: dict[str, Any] = {"values": loss.shape.numel(), "loss_0": _stride(loss), "by_sample": by_sample}
    fixed["grad_scale_value"] = 1.0
    parts: dict[str, Part | None] = {"loss": loss, "grad_scale": work.grad_scale}
    factors: dict[str, Part] = {}
    workspace: dict[str, tuple[int, torch.dtype]] = {}
    copies: list[Copy] = []
    tasks: list[_Term] = []
    counters = 1  # the first counts all programs
    for prefix, term in zip_longest("ab", work.terms):
        task = _absent_term()
        if term is not None:
            assert term.incoming is None, "what comes in for each element comes for values of elements"
            assert term.value is None
            task = _term(term, sources + len(copies), keep_batch=by_sample)
            shape = term.inputs[0].shape
            assert shape is not None
            addends = (shape[1:] if by_sample else shape).numel() if term.weight is None else 1
            task.fixed.update(constant=term.constant * addends, counters=counters)
            task.fixed.update(out_0=_stride(term.out), tiles=task.tiles.total)
            task.parts.update(out=term.out)
            workspace.update(_workspace(f"{prefix}_", task.sums, term.in_double))
        fixed.update({f"{prefix}_{name}": value for name, value in task.fixed.items()})
        parts.update({f"{prefix}_{name}": part for name, part in task.parts.items()})
        factors.update({f"{prefix}_{name}": part for name, part in task.factors.items()})
        counters += task.sums.total * task.sums.counters
        copies += task.copies
        tasks.append(task)
    programs = sum(task.tiles.total for task in tasks)
    totals = sum(task.tiles.total * (task.tiles.shape[0] if by_sample else 1) for task in tasks)
    workspace["totals"] = max(totals, 1), torch.float64
    elements, is_heavy = max(task.tiles.elements for task in tasks), any(map(_is_heavy, work.terms))
    fixed.update(wide=any(task.is_wide for task in tasks), **_options(elements, is_heavy=is_heavy))
    launch = _KernelLauncher(
        kernels.objective_kernel,
        max(programs, 1),
        device,
        fixed,
        parts,
        workspace,
        counters,
        factors,
        keeps_workspace=keeps_workspace,
    )
    return with_copies(launch, copies)


def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which is settled when they are imported."""
    return not isinstance(kernels.objective_kernel, triton.runtime.JITFunction)


BACKEND = _Triton()
