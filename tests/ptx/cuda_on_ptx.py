"""A pytest plugin: CPU tensors are served by the CUDA kernels' PTX, through the bindings' own launches.

    pytest -p cuda_on_ptx -k native tests/test_operations.py        # with tests/ptx in PYTHONPATH

The native backend takes the way that it takes to a GPU: a workspace, the stream's address, `launch` rather than `run`.
Each launch may touch what it was given, and nothing else.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

import executor
import torch
from torch import Tensor

STREAM = 0x5EA0
"""Of which launches must know."""


def _load() -> Any:
    """The extension, linked to the executor, in the place of the installed one."""
    spec = importlib.util.spec_from_file_location("fusedvae._C", executor.build_extension())
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["fusedvae._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "cuda_unavailable"):
        raise executor.UnavailableError("the extension was last built without CUDA kernels")
    ctypes.CDLL(module.__file__).ptx_expect_stream(ctypes.c_uint64(STREAM))
    for program in executor.cuda_programs().values():
        executor.library().offer(program)
    return module


def _watch(task: Any) -> None:
    """Have launches of a kind of task announce the memory that they are given."""
    launch = task.launch

    @functools.wraps(launch)
    def watched(self: Any, sources: Sequence[Any], device: int, stream: int, workspace: int, counter: int) -> None:
        library = executor.library()
        library.forget_all()
        library.allow(*(source for source in sources if isinstance(source, Tensor)))
        if workspace:
            library.allow((workspace, self.workspace_bytes), (counter, 4))
        launch(self, sources, device, stream, workspace, counter)
        # The count of the blocks that are done is as the next launch needs it.
        assert not workspace or ctypes.c_uint32.from_address(counter).value == 0

    task.launch = watched


def install() -> None:
    """Have the native backend serve CPU tensors by the CUDA kernels."""
    assert "fusedvae.backend.native" not in sys.modules, "too late: the extension has been imported"
    extension = _load()
    for task in (extension.LatentTask, extension.ObjectiveTask, extension.ScaleTask):
        _watch(task)

    from fusedvae.backend import native

    prepare = native._launcher
    bits = {code: dtype.itemsize for dtype, code in native._DTYPES.items()}

    def launcher(task: Any, device: torch.device, *more: Any, **options: Any) -> Any:
        return prepare(task, torch.device("cuda", 0), *more, **options)

    counter, _ = extension.cuda_counters()

    def workspace(device: torch.device, stream: int, size: int, **options: Any) -> Any:
        # Of just the size that was asked for, with nothing of use in it.
        sums = torch.full((size,), 0xFF, dtype=torch.uint8)
        return native._Workspace(sums, sums.data_ptr(), counter)

    def normal(out: int, dtype: int, count: int, seed: int, threads: int) -> None:
        library = executor.library()
        library.forget_all()
        library.allow((out, count * bits[dtype]), (seed, 8))
        extension.launch_normal(out, dtype, count, seed, 0, STREAM)

    native._launcher = launcher  # type: ignore[assignment]
    native._workspace = workspace
    native.current_stream_address = lambda gpu: STREAM  # type: ignore[assignment]
    extension.normal = normal
    assert extension.cuda_unavailable() == [""]


install()
