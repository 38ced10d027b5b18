"""Triton kernels, compiled when they are first needed: for GPUs of NVIDIA and AMD, with nothing to build.

Works out from sizes, strides and dtypes how the kernels of `triton_kernels` walk a call's operands, in what tiles and
with what workspace.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import zip_longest
from math import inf, isqrt, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedvae.layout import Strides
from fusedvae.torch_private import current_stream_address

from . import MOST_KEPT, LatentWork, Launcher, ObjectiveWork, Part, TermWork, of_gpu
from .reference import GIVEN, Form
from .walk import Copy, Extent, Walk, walk_latent, walk_term, with_copies

try:
    import triton
    import triton.language as tl

    from . import triton_kernels as kernels
except ImportError as error:
    triton = None
    _import_error = str(error)


# As in triton_kernels and triton_math.
_BATCH, _OUTER, _INNER, _ALL, _ABSENT = 1, 2, 4, 7, 8
_WIDE, _FLAT, _WHOLE = 1, 2, 4
_LOG, _SQUARED, _ROUGH, _BELOW, _ABOVE = 0, 8, 16, 1, 2
_MAPS = {"exponential": 1, "linear": 2, "softplus": 3, "bounded": 4}

# --- tiles: what a program takes --------------------------------------------------------------------------------------

_SMALL = 1 << 18
"""Elements below which tiles are small: a GPU has over a hundred processors, each of which should get one."""

_SMALL_TILE = 512
_TILES = 4096, 4096, 2048, 2048, 1024, 512
"""Elements of a tile, by their weight. Sums are made a tile at a time: these are part of a result's rounding, and the
same on all chips."""

_PLAIN = 2
"""The weight of what is neither light nor heavy."""

_LIGHT_BYTES = 8192
"""Of each operand in a tile of what is light, at most: 32 a thread. At half a GPU's occupancy 96 KiB a processor are on
their way for the three operands of the likelihood, where some 40 KiB keep its memory busy; and how long a program waits
in its end, to know whether it is the last, counts for little. Smaller ones would make more partial sums, too."""

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


def _tiles(extent: Extent, summed: Sequence[int] = (), limit: int = _TILES[_PLAIN]) -> _Tiles:
    """Tiles as long along inner as they can be; of columns, where a gradient is ``summed`` over other axes alone.

    ``summed`` has the axes that each gradient is summed over; ``limit`` is of a tile's elements.
    """
    batch, outer, inner = extent
    size = _SMALL_TILE if prod(extent) < _SMALL else limit
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


_A_THREAD = 8, 8, 8, 4, 4, 2
"""Elements that a thread takes at least, by their weight."""

_LIGHT_WARPS = 8
"""Of a program of what is light, at most: the larger its tile, the more a thread takes."""

_REGISTERS = 64, 80, 128, 128, 255, 255
"""Of a thread, by the weight of its elements. Without a bound, NVIDIA's assembler spills to fit in one more program at
a time. What is light is to fit in four times or three."""


def _options(elements: int, weight: int = _PLAIN) -> dict[str, Any]:
    """How the kernels are compiled for tiles of so many elements of some weight.

    A thread takes 8 elements, which is 128 bits of a 16-bit dtype and twice that of float32. More would take registers
    that the threads to hide memory's latency behind need, where an element is not light; and what is heavy takes more
    of them for each element, and 4 elements; what is heavy twice gets all that a processor has, and if that is not
    enough, 2 elements.
    """
    warps = max(1, elements // (_A_THREAD[weight] * _LANES))
    registers = _REGISTERS[weight]
    if weight < _PLAIN:
        warps = min(warps, _LIGHT_WARPS)
        if warps < _LIGHT_WARPS:  # of small programs there are too few to fill a processor
            registers = _REGISTERS[_PLAIN]
    # The formulas count on products and sums that are rounded once.
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return options if _LANES == 64 else {**options, "maxnreg": registers}


_LIGHT = {"given": 0, "gaussian_nll": 0, "kl_standard_normal": 0, "l1": 0, "laplace_nll": 1, "mse": 0}
_HEAVY = {"discretized_logistic_nll": 1, "negative_binomial_nll": 2, "zero_inflated_negative_binomial_nll": 2}
"""The weights of formulas that have few values to keep, by themselves; and how much more those weigh that have many."""


def _weight(term: TermWork) -> int:
    """How heavy an element is in registers: its formula is, it is float64, has two scales that are not logarithms."""
    forms = sum(form != Form() for form in term.forms)
    if term.formula.name in _LIGHT and not (forms or term.in_double or term.weight is not None):
        return _LIGHT[term.formula.name]
    return _PLAIN + min(term.in_double + (forms == 2) + _HEAVY.get(term.formula.name, 0), 3)


def _limit(term: TermWork, weight: int) -> int:
    """How many elements a tile has at most, in a kernel of some weight."""
    if weight >= _PLAIN:
        return _TILES[weight]
    widest = max((part.dtype.itemsize for part in term.inputs if part.dtype is not None), default=2)
    return min(_LIGHT_BYTES // widest, _TILES[weight])


# --- launches ---------------------------------------------------------------------------------------------------------


class _KernelLauncher:
    """A launch of a kernel, on sources of the sizes, strides and dtypes that it was prepared for.

    Triton looks at every argument of every launch, which takes longer than many a kernel: there are up to 150 of them,
    and all but a few addresses are the same each time. So only the first launch goes that way. What it compiles is kept
    with what it was compiled for: beside all that is the same here, which addresses are multiples of 16.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        device: torch.device,
        fixed: dict[str, Any],
        parts: dict[str, Part | None],
        sums: dict[str, tuple[int, torch.dtype]] | None = None,
        counters: int = 0,
        factors: dict[str, Part] | None = None,
        *,
        keeps_workspace: bool = True,
    ) -> None:
        """Prepare a launch.

        Args:
            fixed: the arguments that are the same for all sources. All that are in none of these are None.
            parts: the operands, by parameter.
            sums: how many partial sums there is room for, of what dtype, by parameter.
            counters: how many there are.
            factors: numbers that a fixed argument is multiplied by, by parameter.
            keeps_workspace: whether the memory for sums and counters stays for the next launch.
        """
        names = list(kernel.arg_names)
        self.fixed: dict[str, Any] = dict.fromkeys(names) | fixed
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._kernel, self._programs, self._device = kernel, programs, device
        given = [(name, part) for name, part in parts.items() if part is not None]
        self._numbers = [(f"{name}_value", part.source) for name, part in given if part.is_number]
        self._factors = [(name, part.source) for name, part in (factors or {}).items()]
        self._tensors = [(name, part) for name, part in given if not part.is_number]
        self._sums: list[tuple[str, int, int, torch.dtype]] = []
        end = 0
        for name, (count, dtype) in (sums or {}).items():
            self._sums.append((name, end, count, dtype))
            end += -(-count * dtype.itemsize // 16) * 16
        self._workspace = (end, counters) if end or counters else None
        self._keeps_workspace = keeps_workspace and end <= MOST_KEPT
        # The same by position, for launches without a look at the arguments.
        position = {name: k for k, name in enumerate(names)}
        self._values = [self.fixed[name] for name in names]
        self._addresses = [(position[name], part.source, part.offset) for name, part in self._tensors]
        self._number_positions = [(position[name], source) for name, source in self._numbers]
        self._factor_positions = [(position[name], source) for name, source in self._factors]
        self._sum_positions = [(position[name], offset) for name, offset, _, _ in self._sums]
        self._counters_position = position.get("counters", 0)
        self._compiled: dict[Any, _Run] = {}

    def __call__(self, sources: tuple[Any, ...]) -> None:
        device = self._device
        if _tracing.is_on:
            launch = torch.library.wrap_triton(self._kernel)[(self._programs,)]
            launch(**{k: v for k, v in self._arguments(sources, None).items() if k != "enable_fp_fusion"})
        elif device.type != "cuda":
            self._launch(sources, 0)
        elif torch.cuda.current_device() == device.index:
            self._launch(sources, current_stream_address(device.index))
        else:
            with torch.cuda.device(device):
                self._launch(sources, current_stream_address(device.index))

    def _launch(self, sources: tuple[Any, ...], stream: int) -> None:
        values = self._values.copy()
        together = 0
        for position, source, offset in self._addresses:
            address = sources[source].data_ptr()
            if not address and sources[source].numel():
                self._launch(_with_memory(sources), stream)
                return
            values[position] = address = address + offset
            together |= address
        key = self._key(sources, values)
        if together & 15:
            key = key, *[values[position] & 15 == 0 for position, _, _ in self._addresses]
        run = self._compiled.get(key)
        # Until the launch, the workspace must not become anyone else's; after it, the stream's order sees to that.
        workspace = None
        if self._workspace is not None:
            workspace = _workspace(*self._workspace, self._device, stream, is_kept=self._keeps_workspace)
        if run is None:
            compiled = _launch(self._kernel, self._programs, self._arguments(sources, workspace))
            run = _run_of(self._kernel, compiled, self._programs)
            if run is not None:
                self._compiled[key] = run
            return
        for position, source in self._number_positions:
            values[position] = float(sources[source])
        for position, source in self._factor_positions:
            values[position] *= float(sources[source])
        if workspace is not None:
            address = workspace.sums.data_ptr()
            for position, offset in self._sum_positions:
                values[position] = address + offset
            values[self._counters_position] = workspace.counters.data_ptr()
        run(values, stream)

    def _key(self, sources: tuple[Any, ...], values: list[Any]) -> Any:
        """What else a kernel is compiled for, whose arguments may be changed."""
        return None

    def _arguments(self, sources: tuple[Any, ...], workspace: _Workspace | None) -> dict[str, Any]:
        """All arguments, by name; without a workspace, this makes what it takes."""
        arguments = self.fixed.copy()
        for name, part in self._tensors:
            arguments[name] = part.of(sources)
        for name, source in self._numbers:
            arguments[name] = float(sources[source])
        for name, source in self._factors:
            arguments[name] *= float(sources[source])
        for name, offset, count, dtype in self._sums:
            if workspace is None:
                arguments[name] = torch.empty(count, dtype=dtype, device=self._device)
            else:
                arguments[name] = workspace.sums[offset : offset + count * dtype.itemsize].view(dtype)
        if self._workspace is not None and self._workspace[1]:
            if workspace is None:
                arguments["counters"] = torch.zeros(self._workspace[1], dtype=torch.int32, device=self._device)
            else:
                arguments["counters"] = workspace.counters
        return arguments


class _LatentLauncher(_KernelLauncher):
    """A launch over the latent, whose noise may begin anywhere in its stream."""

    def __init__(self, *arguments: Any, offset: Part | None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._offset = None if offset is None else offset.source
        names = list(self._kernel.arg_names)
        self._offset_position, self._quads_position = names.index("offset"), names.index("quads")

    def _key(self, sources: tuple[Any, ...], values: list[Any]) -> Any:
        if self._offset is None:
            return None
        offset, quads = self._offset_of(sources[self._offset])
        values[self._quads_position] = quads
        if isinstance(offset, Tensor):
            values[self._offset_position] = address = offset.data_ptr()
            return "in memory", address & 15 == 0, offset.dtype, quads
        values[self._offset_position] = offset
        return offset is None, offset is not None and offset >= 1 << 31, quads

    def _arguments(self, sources: tuple[Any, ...], workspace: _Workspace | None) -> dict[str, Any]:
        arguments = super()._arguments(sources, workspace)
        if self._offset is not None:
            arguments["offset"], arguments["quads"] = self._offset_of(sources[self._offset])
        return arguments

    def _offset_of(self, offset: Any) -> tuple[Any, int]:
        """The offset as the kernel takes it, and how many counters make neighbours for a thread."""
        quads: int = self.fixed["quads"]
        if isinstance(offset, Tensor):  # which only the kernel looks at
            return offset, quads
        return int(offset) or None, 0 if offset % 4 else quads


def _with_memory(sources: tuple[Any, ...]) -> tuple[Any, ...]:
    """The sources, autograd's zeros written out. Raises ValueError for a tensor that has lost its memory."""
    found = []
    for source in sources:
        if isinstance(source, Tensor) and source.numel() and not source.data_ptr():
            if not source._is_zerotensor():
                raise ValueError("a tensor has no memory: its storage has been freed")
            memory = torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device=source.device)
            source = memory.zero_()
        found.append(source)
    return tuple(found)


def _nothing(sources: tuple[Any, ...]) -> None:
    """The launcher of no work."""


def _launch(kernel: Any, programs: int, arguments: dict[str, Any]) -> Any:
    """Launch as Triton has it, which compiles what there is not yet. Returns what was compiled."""
    return kernel[(programs,)](**arguments)


_Run = Callable[[list[Any], int], None]
"""Launches a compiled kernel on a stream: its arguments in the order of its parameters, with addresses for tensors."""


def _run_of(kernel: Any, compiled: Any, programs: int) -> _Run | None:
    """What launches a compiled kernel; None where there is no such thing, as in the interpreter.

    All that depends on how Triton of some version launches.
    """
    try:
        launch = compiled[programs, 1, 1]
    except (AttributeError, TypeError):
        return None
    if _VERSION >= (3, 3):
        return lambda values, stream: launch(*values, stream=stream)
    given = [k for k, parameter in enumerate(kernel.params) if not parameter.is_constexpr]
    return lambda values, stream: launch(*[values[k] for k in given], stream=stream)


_VERSION = tuple(map(int, triton.__version__.split(".")[:2])) if triton else (0, 0)


class _Tracing(threading.local):
    """Whether a thread's launches are for a compiler to see, on tensors without memory."""

    is_on = False


_tracing = _Tracing()


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """A block whose launches are for a compiler to see."""
    before, _tracing.is_on = _tracing.is_on, True
    try:
        yield
    finally:
        _tracing.is_on = before


class _Workspace(NamedTuple):
    """What the programs of a launch share."""

    sums: Tensor
    """Bytes."""
    counters: Tensor
    """Zero before a launch, and after it."""


_workspaces: dict[tuple[torch.device, int], _Workspace] = {}
"""One a device and stream: launches on one stream follow each other, and so may share it."""


_graph_counters: dict[torch.device, Tensor] = {}
"""By device, those that no graph has."""
_graph_counters_lock = threading.Lock()
_GRAPH_COUNTERS = 1 << 16


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _workspace(size: int, counters: int, device: torch.device, stream: int, *, is_kept: bool) -> _Workspace:
    """A workspace of at least so many bytes for sums, and counters."""
    if not is_kept:
        return _new_workspace(size, counters, device)
    if _is_capturing(device):
        return _graph_workspace(size, counters, device)
    found = _workspaces.get((device, stream))
    if found is None or found.sums.numel() < size or found.counters.numel() < counters:
        found = _workspaces[device, stream] = _new_workspace(
            max(size, 1 << 16, found.sums.numel() if found else 0),
            max(counters, 1 << 10, found.counters.numel() if found else 0),
            device,
        )
        with _graph_counters_lock:
            if device not in _graph_counters:  # now: in a capture, it would be done at every replay
                _graph_counters[device] = torch.zeros(_GRAPH_COUNTERS, dtype=torch.int32, device=device)
                if device.type == "cuda":  # they are ready then, whatever stream a graph runs on
                    torch.cuda.current_stream(device).synchronize()
    return found


def _new_workspace(size: int, counters: int, device: torch.device) -> _Workspace:
    return _Workspace(
        torch.empty(size, dtype=torch.uint8, device=device),
        torch.zeros(counters, dtype=torch.int32, device=device),
    )


def _graph_workspace(size: int, counters: int, device: torch.device) -> _Workspace:
    """One for a launch that is being captured.

    Graphs are replayed on any stream, several at a time: each of their launches has its own, the bytes in the graph's
    memory. The counters are there before, as long as there are any, so that no replay needs to set them to zero.
    """
    with _graph_counters_lock:
        left, taken = _graph_counters.get(device), -(-counters // 4) * 4  # in whole 16 bytes, which kernels count on
        if left is None or left.numel() < taken:
            return _new_workspace(size, counters, device)
        _graph_counters[device] = left[taken:]
    return _Workspace(torch.empty(size, dtype=torch.uint8, device=device), left[:taken])


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


def _packed(fields: Sequence[int | None]) -> int:
    """Four bits each, as kernels take axes and slots."""
    return sum((_ABSENT if field is None else field) << 4 * k for k, field in enumerate(fields))


_MANY = 4096
"""Partial sums that one program may be left to add up: more are first added up in parts, by as many programs."""


def _split(members: int, lanes: int) -> int | None:
    """How many of ``members`` sums of ``lanes`` values make a part, and so about how many parts there are."""
    if members * lanes <= _MANY or members < 4:
        return None
    return 1 << (isqrt(members - 1).bit_length())


def _with_parts(members: int, split: int | None) -> tuple[int, int]:
    """How many sums there is room for in a group of so many members, its parts included; and how many counters."""
    parts = -(-members // split) if split else 0
    return members + parts, 1 + parts


class _Sums(NamedTuple):
    """The sums that tiles share, of some outputs."""

    slots: tuple[int | None, ...]
    """Of each of `_SUMMED`."""
    partials: int
    """How many partial sums a slot has room for."""
    counters: int
    """How many it takes."""
    split: int | None
    """How many are added up at first; None for all."""

    @property
    def total(self) -> int:
        """How many slots there are."""
        return sum(slot is not None for slot in self.slots)

    @property
    def fixed(self) -> dict[str, Any]:
        return {
            "slots": _packed(self.slots),
            "partials_step": self.partials,
            "counters_step": self.counters,
            "split": self.split,
        }


def _sums(axes: dict[str, int], tiles: _Tiles) -> _Sums:
    """Those of the outputs among operands with these axes."""
    slots: list[int | None] = []
    shared: list[tuple[int, int]] = []  # the members of a group, and the lanes of each
    for name in _SUMMED:
        members = prod([count for d, count in enumerate(tiles.counts) if not axes.get(name, _ALL) >> d & 1])
        slots.append(len(shared) if members > 1 else None)
        if members > 1:
            shared.append((members, prod([size for d, size in enumerate(tiles.shape) if axes[name] >> d & 1])))
    split = max([_split(members, lanes) or 0 for members, lanes in shared], default=0) or None
    partials = counters = 0
    for members, lanes in shared:
        groups, (sums, counts) = tiles.total // members, _with_parts(members, split)
        partials, counters = max(partials, groups * sums * lanes), max(counters, groups * counts)
    return _Sums(tuple(slots), partials, counters, split)


def _tiles_for(extent: Extent, axes: dict[str, int], limit: int) -> _Tiles:
    """Tiles of so many elements at most for operands with these axes."""
    return _tiles(extent, [_ALL & ~axes[name] for name in _SUMMED if name in axes], limit)


def _quads(dtype: torch.dtype | None, row: int = 8, weight: int = _PLAIN) -> int:
    """How many counters make four neighbours each for a thread that takes rows of a dtype and weight.

    They are as many as it moves at once, 128 bits: others it would have to get from other threads.
    """
    assert dtype is not None
    return 2 if dtype.itemsize == 2 and min(row, _A_THREAD[weight]) >= 8 else 1


def _may_be_rough(work: LatentWork) -> bool:
    """Whether the sample may be made with NVIDIA's own functions, which are exact to some 20 bits.

    It may where it is rounded to the 8 of bfloat16. With float16's 11 one would see it in what is near zero.
    """
    if _LANES == 64 or _interpreted() or work.divergence.in_double:
        return False
    return all(part.is_number or part.dtype == torch.bfloat16 for part in work.divergence.inputs[:2])


def _forms(term: TermWork, *, is_rough: bool = False) -> dict[str, Any]:
    """The forms of a term's scales."""
    arguments = dict(_NO_FORMS)
    for k, (scale, form) in enumerate(zip(term.formula.scales, term.forms, strict=True)):
        is_plain = form.map == "exponential" and form.eps == 0
        arguments[f"form{k}"] = (_LOG if is_plain else _MAPS[form.map]) | (_SQUARED if form.squared else 0)
        arguments[f"eps{k}"] = float(form.eps)
        for name, flag, bound in (("low", _BELOW, form.low), ("high", _ABOVE, form.high)):
            if bound not in (-inf, inf):
                arguments["bounds"] |= flag << 2 * scale
                arguments[f"{name}{k}"] = float(bound)
    if is_rough:
        arguments["form0"] |= _ROUGH
    return arguments


_NO_FORMS: dict[str, Any] = {
    "bounds": 0,
    **{f"form{k}": 0 for k in range(2)},
    **{f"{name}{k}": 0.0 for k in range(2) for name in ("low", "high", "eps")},
}


def _shape(extent: Extent, tiles: _Tiles, in_double: bool) -> dict[str, Any]:
    """What is walked, in what tiles, and in what arithmetic."""
    if in_double and (3, 0) < _VERSION < (3, 4):
        raise RuntimeError(
            f"float64 operands: the Triton kernels need Triton 3.4 or later for them, this is {triton.__version__}; "
            "use another backend"
        )
    arguments: dict[str, Any] = dict(zip(("batch", "outer", "inner"), extent, strict=True))
    arguments.update(zip(("tile_b", "tile_o", "tile_i"), tiles.shape, strict=True))
    arguments["dtype"] = tl.float64 if in_double else tl.float32
    return arguments


def _walk(extent: Extent, tiles: _Tiles, walked: Sequence[Strides]) -> int:
    """How tiles lie, as the kernels are told."""
    found = _WIDE if _is_wide(extent, walked) else 0
    if extent[:2] == (1, 1):
        found |= _FLAT
    if all(size % tile == 0 for size, tile in zip(extent, tiles.shape, strict=True)):
        found |= _WHOLE
    return found


def _is_wide(extent: Extent, walked: Sequence[Strides]) -> bool:
    """Whether an offset or an index might not fit 32 bits."""
    rows = (extent[1] * extent[2], extent[2], 1)
    return any(
        sum(max(size - 1, 0) * step for size, step in zip(extent, strides, strict=True)) >= _NARROW
        for strides in (*walked, rows)
        if strides
    )


def _stride(part: Part | None) -> int:
    """That of a vector of values per sample, or of one value."""
    return part.strides[0] if part is not None and part.strides else 0


class _Term(NamedTuple):
    """A term as the kernels take it."""

    fixed: dict[str, Any]
    parts: dict[str, Part | None]
    factors: dict[str, Part]
    copies: list[Copy]
    extent: Extent
    tiles: _Tiles
    sums: _Sums


def _absent_term() -> _Term:
    """No term; its numbers are there all the same, since a kernel's numbers have a type."""
    nothing: tuple[None, ...] = (None,) * len(_TERM_AXES)
    fixed: dict[str, Any] = {"factor": 0.0, "constant": 0.0, "coefficient_value": 1.0, "axes": _packed(nothing)}
    fixed.update({f"{name}_value": 0.0 for name in (*_INPUTS[1:], "weight")})
    fixed.update(_NO_FORMS)
    fixed.update(has_gains=False, walk=0, **{f"gain{k}": 1.0 for k in range(_MOST_INPUTS)})
    return _Term(fixed, {}, {}, [], (0, 0, 0), _Tiles((1, 1, 1), (0, 0, 0)), _Sums((), 0, 0, None))


def _term(term: TermWork, sources: int, weight: int, *, keep_batch: bool) -> _Term:
    """A term that is walked, or whose values are given; in a kernel of some weight."""
    found = _absent_term()
    found.fixed.update(factor=term.factor)
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
    tiles = _tiles_for(extent, axes, _limit(term, weight))
    sums = _sums(axes, tiles)
    found.fixed.update(
        {
            **_shape(extent, tiles, term.in_double),
            **_strides(names, walked.strides),
            **_forms(term),
            **_gains(term),
            **sums.fixed,
            "formula": term.formula.name,
            "axes": _packed([axes.get(name) for name in _TERM_AXES]),
            "walk": _walk(extent, tiles, walked.strides),
        }
    )
    parts = {**found.parts, **dict(zip(names, walked.parts, strict=True))}
    return found._replace(parts=parts, copies=walked.copies, extent=extent, tiles=tiles, sums=sums)


def _gains(term: TermWork) -> dict[str, Any]:
    """What the gradients are multiplied by."""
    if term.gains is None or set(term.gains) == {1.0}:
        return {}
    return {"has_gains": True, **{f"gain{k}": float(gain) for k, gain in enumerate(term.gains)}}


def _room(prefix: str, sums: _Sums, in_double: bool) -> dict[str, tuple[int, torch.dtype]]:
    """What shared sums take, in the dtype of the arithmetic."""
    count = sums.total * sums.partials
    return {f"{prefix}partials": (count, torch.float64 if in_double else torch.float32)} if count else {}


def _flat(count: int) -> dict[str, Any]:
    """Arguments for kernels that go through dense tensors of ``count`` elements."""
    tile = _SMALL_TILE if count < _SMALL else _TILES[_PLAIN]
    return {"tile": tile, "walk": _walk((1, 1, count), _Tiles((1, 1, tile), (1, 1, 1)), ()), **_options(tile)}


_SCALED = 2 * _MOST_INPUTS
"""Tensors that a launch can scale: the gradients of an objective."""

_WAVE = 1024
"""Programs that scale: enough to fill a GPU, and no more, since all that most of them ever do is to read a 1."""


# --- the backend ------------------------------------------------------------------------------------------------------

_OLDEST = 7, 0
"""The compute capability that atomic operations with an order need."""


class _Triton:
    def unavailable(self, device_type: str, index: int | None = None) -> str | None:
        if triton is None:
            return f"Triton cannot be imported ({_import_error}); install it with `pip install triton`"
        if device_type == "cpu" and not _interpreted():
            return "Triton has no compiler for CPUs; set TRITON_INTERPRET=1 to run its interpreter, which is slow"
        if device_type not in ("cpu", "cuda"):
            return f"there are no Triton kernels for {device_type!r} devices; use the reference"
        if _interpreted() or not torch.cuda.is_available():  # without a GPU here, it is for compilers to see
            return None
        return of_gpu(_gpus_unavailable(), index)

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
            fixed = {"count": count, **_flat(count), "quads": _quads(out.dtype), "out": out, "seed": seed}
            _KernelLauncher(kernels.normal_kernel, -(-count // fixed["tile"]), out.device, fixed, {})(())

    def prepare_latent(
        self, work: LatentWork, sources: int, device: torch.device, *, keeps_workspace: bool = True
    ) -> Launcher:
        term, inputs = work.divergence, len(work.divergence.inputs)
        walked = walk_latent(work, sources, can_sum=lambda extent, strides: True)
        extent = walked.extent
        names = (*_INPUTS[:inputs], "noise", "grad_z", "incoming", "z", "value", *_GRADS[:inputs])
        axes = _axes(names, walked)
        l0, l1, l2 = walked.logical
        has_quads = l2 == 1 and l0 % 4 == 0 and l1 % 4 == 0
        is_rough = _may_be_rough(work)
        # Exact noise of 16 elements would be too much for a thread.
        is_light = (
            has_quads and work.offset is None and not work.at_sample and (is_rough or _limit(term, 0) <= _TILES[_PLAIN])
        )
        weight = _weight(term) if is_light else max(_weight(term), _PLAIN)
        tiles = _tiles_for(extent, axes, _limit(term, weight))
        if not tiles.total:
            return with_copies(_nothing, walked.copies)
        sums = _sums(axes, tiles)
        row = tiles.shape[2]
        fixed = {
            **{f"{name}_value": 0.0 for name in (*_INPUTS[1:], "incoming")},
            **_shape(extent, tiles, term.in_double),
            **_strides(names, walked.strides),
            **_forms(term, is_rough=is_rough),
            **sums.fixed,
            **_options(tiles.elements, weight),
            "formula": term.formula.name,
            "at_sample": work.at_sample,
            "axes": _packed([axes.get(name) for name in _LATENT_AXES]),
            "l0": l0,
            "l1": l1,
            "l2": l2,
            "quads": _quads(term.inputs[0].dtype, row, weight) if has_quads and row >= 4 else 0,
            "walk": _walk(extent, tiles, [*walked.strides, walked.logical]),
        }
        parts = {**dict(zip(names, walked.parts, strict=True)), "seed": work.seed}
        launch = _LatentLauncher(
            kernels.latent_kernel,
            tiles.total,
            device,
            fixed,
            parts,
            _room("", sums, term.in_double),
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

    def prepare_scale(
        self,
        tensors: Sequence[Part],
        factor: Part,
        device: torch.device,
        coefficient: Part | None = None,
        product: Part | None = None,
    ) -> Launcher:
        parts = {"factor": factor, "coefficient": coefficient, "product": product}
        counts = [part.shape.numel() if part.shape is not None else 0 for part in tensors]
        if not any(counts) and product is None:
            return _nothing
        assert len(counts) <= _SCALED
        fixed = {**_flat(max(counts)), "coefficient_value": 0.0}
        blocks = 1
        for k, (part, count) in enumerate(zip(tensors, counts, strict=True)):
            if count:
                parts[f"data_{k}"], fixed[f"count_{k}"] = part, count
                blocks = max(blocks, -(-count // fixed["tile"]))
        return _KernelLauncher(kernels.scale_kernel, min(blocks, _WAVE), device, fixed, parts)


def _prepare_elements(work: ObjectiveWork, sources: int, device: torch.device, keeps_workspace: bool) -> Launcher:
    """A term element by element."""
    (term,) = work.terms
    task = _term(term, sources, _weight(term), keep_batch=False)
    if not task.tiles.total:
        return with_copies(_nothing, task.copies)
    fixed = {"incoming_value": 0.0, "grad_scale_value": 1.0, **task.fixed, "constant": term.constant}
    fixed.update(_options(task.tiles.elements, _weight(term)))
    launch = _KernelLauncher(
        kernels.elementwise_kernel,
        task.tiles.total,
        device,
        fixed,
        {**task.parts, "grad_scale": work.grad_scale},
        _room("", task.sums, term.in_double),
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
    values = loss.shape.numel()
    weight = max(map(_weight, work.terms))
    copies: list[Copy] = []
    tasks: list[_Term] = []
    for term in work.terms:
        assert term.incoming is None, "what comes in for each element comes for values of elements"
        assert term.value is None
        tasks.append(_term(term, sources + len(copies), weight, keep_batch=by_sample))
        copies += tasks[-1].copies
    if not values:
        return with_copies(_nothing, copies)
    # What is finished at once: the samples of the larger tiles. A value's sums are of that many tiles.
    rows = max([task.tiles.shape[0] if task.tiles.total else 64 for task in tasks]) if by_sample else 1
    chunks = -(-values // rows)
    addends = [task.tiles.total // (task.tiles.counts[0] if by_sample else 1) for task in tasks if task.tiles.total]
    split = _split(max(addends, default=0), rows)
    parts_of_sums = sum(_with_parts(count, split)[0] - count for count in addends)
    fixed: dict[str, Any] = {
        "values": values,
        "loss_0": _stride(loss),
        "grad_scale_value": 1.0,
        "by_sample": by_sample,
        "rows": rows,
        "chunks": chunks,
        "split": split,
        "has_tiles": bool(addends),
    }
    parts: dict[str, Part | None] = {"loss": loss, "grad_scale": work.grad_scale}
    factors: dict[str, Part] = {}
    totals = sum(task.tiles.total * (task.tiles.shape[0] if by_sample else 1) for task in tasks)
    room = {"totals": (max(totals, 1), torch.float64)}
    if split:
        room["again"] = parts_of_sums * chunks * rows, torch.float64
    counters = chunks * (1 + parts_of_sums)
    for prefix, task, term in zip_longest("ab", tasks, work.terms):
        if term is None:
            task = _absent_term()
        else:
            shape = term.inputs[0].shape
            assert shape is not None
            addends_of_constant = (shape[1:] if by_sample else shape).numel() if term.weight is None else 1
            task.fixed.update(constant=term.constant * addends_of_constant, counters=counters)
            task.fixed.update(out_0=_stride(term.out), tiles=task.tiles.total)
            task.parts.update(out=term.out)
            room.update(_room(f"{prefix}_", task.sums, term.in_double))
        fixed.update({f"{prefix}_{name}": value for name, value in task.fixed.items()})
        parts.update({f"{prefix}_{name}": part for name, part in task.parts.items()})
        factors.update({f"{prefix}_{name}": part for name, part in task.factors.items()})
        counters += task.sums.total * task.sums.counters
    programs = sum(task.tiles.total for task in tasks)
    fixed.update(_options(max(task.tiles.elements for task in tasks), weight))
    launch = _KernelLauncher(
        kernels.objective_kernel,
        programs or chunks,
        device,
        fixed,
        parts,
        room,
        counters,
        factors,
        keeps_workspace=keeps_workspace,
    )
    return with_copies(launch, copies)


@lru_cache(maxsize=1)  # the GPUs and the compilers of a process do not change
def _gpus_unavailable() -> list[str | None]:
    """Why Triton cannot serve each of this machine's GPUs, and the remedy."""
    count = torch.cuda.device_count()
    try:
        triton.runtime.driver.active.utils  # noqa: B018 - made now, by the C compiler that launches need, too
    except AttributeError:  # a Triton that has them elsewhere
        pass
    except Exception as error:  # of any kind, as compilers and searches for libraries fail
        return [f"Triton cannot launch kernels ({error}); install a C compiler, and the headers of Python"] * count
    if torch.version.hip is not None:
        return [None] * count
    return [
        None
        if capability >= _OLDEST
        else "compute capability {}.{} is older than {}.{}, the first that the Triton kernels run on".format(
            *capability, *_OLDEST
        )
        for capability in map(torch.cuda.get_device_capability, range(count))
    ]


def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which is settled when they are imported."""
    return not isinstance(kernels.objective_kernel, triton.runtime.JITFunction)


BACKEND = _Triton()
