"""Launches of the kernels: what is prepared once, which compiled kernel they go to, and what workspace they have."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fusedvae.backend import MOST_KEPT, Part
from fusedvae.torch_private import current_gpu, current_stream_address, is_capturing

from . import kernels

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which is settled when they are imported."""
    return not isinstance(kernels.objective_kernel, triton.runtime.JITFunction)


class KernelLauncher:
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
        self._gpu = device.index if device.type == "cuda" else None
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
        gpu = self._gpu
        if _tracing.is_on:
            launch = torch.library.wrap_triton(self._kernel)[(self._programs,)]
            launch(**{k: v for k, v in self._arguments(sources, None).items() if k != "enable_fp_fusion"})
        elif gpu is None:
            self._launch(sources, 0)
        elif current_gpu() == gpu:
            self._launch(sources, current_stream_address(gpu))
        else:
            with torch.cuda.device(gpu):
                self._launch(sources, current_stream_address(gpu))

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
            for position, offset in self._sum_positions:
                values[position] = workspace.address_of_sums + offset
            values[self._counters_position] = workspace.address_of_counters
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


class LatentLauncher(KernelLauncher):
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


def nothing(sources: tuple[Any, ...]) -> None:
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
    if VERSION >= (3, 3):
        return lambda values, stream: launch(*values, stream=stream)
    given = [k for k, parameter in enumerate(kernel.params) if not parameter.is_constexpr]
    return lambda values, stream: launch(*[values[k] for k in given], stream=stream)


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
    address_of_sums: int
    address_of_counters: int

    @classmethod
    def of(cls, sums: Tensor, counters: Tensor) -> _Workspace:
        return cls(sums, counters, sums.data_ptr(), counters.data_ptr())


_workspaces: dict[tuple[torch.device, int], _Workspace] = {}
"""One a device and stream: launches on one stream follow each other, and so may share it."""


_graph_counters: dict[torch.device, Tensor] = {}
"""By device, those that no graph has."""
_graph_counters_lock = threading.Lock()
_GRAPH_COUNTERS = 1 << 16


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and is_capturing()


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
    return _Workspace.of(
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
    return _Workspace.of(torch.empty(size, dtype=torch.uint8, device=device), left[:taken])
