"""A pytest plugin: CPU tensors are served by the Triton kernels' PTX, as Triton compiles it for sm_90.

    pytest -p triton_on_ptx -k triton tests/test_operations.py        # with tests and tests/ptx in PYTHONPATH

Kernels are compiled with the arguments that they are launched with. Each launch may touch what it was given, and
nothing else.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import executor
import triton
import triton_ahead_of_time as ahead
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fusedvae.backend import triton as backend

TARGET = GPUTarget("cuda", 90, 32)
OPTIONS = ahead.OPTIONS

_compiled: dict[tuple[Any, ...], tuple[int, Any]] = {}
"""Modules of the executor, and what Triton says of them."""


def _is_folded(parameter: Any, value: Any) -> bool:
    """Whether an argument is part of the kernel, and not passed."""
    is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
    return parameter.is_constexpr or value is None or is_one


def _key(kernel: Any, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """What the compiled kernel depends on: see triton_ahead_of_time.source_of."""
    key: list[Any] = [kernel, *(arguments.get(option) for option in OPTIONS)]
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if _is_folded(parameter, value):
            key.append(("folded", repr(value)))
        elif isinstance(value, Tensor):
            key.append((value.dtype, value.data_ptr() % 16 == 0))
        elif isinstance(value, float):
            key.append("float")
        else:
            key.append((value >= 2**31, value % 16 == 0))
    return tuple(key)


def _stages(backend: Any = None, stages: dict[str, Any] | None = None, *_: Any) -> tuple[str, str] | None:
    """Triton's hook: stop at the PTX. Without arguments, what tells results apart from others in Triton's cache."""
    if stages is None:
        return "PTX", "PTX alone"
    stages["cubin"] = lambda source, metadata: b""
    return None


def _compile(kernel: Any, arguments: dict[str, Any]) -> tuple[int, Any]:
    key = _key(kernel, arguments)
    if key not in _compiled:
        options = {name: arguments[name] for name in OPTIONS if name in arguments}
        made = triton.compile(ahead.source_of(kernel, arguments), target=TARGET, options=options)
        _compiled[key] = executor.library().load(made.asm["ptx"]), made.metadata
    return _compiled[key]


def _number(value: float, bytes_: int) -> Any:
    if isinstance(value, float):
        return ctypes.c_double(value) if bytes_ == 8 else ctypes.c_float(value)
    return ctypes.c_int64(value) if bytes_ == 8 else ctypes.c_int32(value)


def launch(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
    """As fusedvae.backend.triton's, on the executor."""
    module, metadata = _compile(kernel, arguments)
    values = [
        arguments[parameter.name] for parameter in kernel.params if not _is_folded(parameter, arguments[parameter.name])
    ]
    library = executor.library()
    name = kernel.fn.__name__
    sizes = library.parameter_sizes(module, name)
    given = [v if isinstance(v, Tensor) else _number(v, size) for v, size in zip(values, sizes, strict=False)]
    threads = metadata.num_warps * TARGET.warp_size
    library.launch(module, name, (programs,), (threads,), given, shared=metadata.shared)


def install() -> None:
    """Have the Triton backend serve CPU tensors."""
    assert "conftest" not in sys.modules, "too late: targets have been found"
    triton.knobs.runtime.add_stages_inspection_hook = _stages
    kind = type(backend.BACKEND)
    backend.launch._launch = launch
    backend.tiling.LANES = TARGET.warp_size
    kind.unavailable = lambda self, device_type, index=None: None  # type: ignore[method-assign]
    kind.describe = lambda self, device_type: "PTX"  # type: ignore[method-assign]


install()
