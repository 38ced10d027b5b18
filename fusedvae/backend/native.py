"""The compiled extension: C++ kernels for CPUs, CUDA kernels for NVIDIA GPUs.

Works out from sizes, strides and dtypes how the kernels walk a call's operands: a task of csrc/tasks.h. What is left to
a launch is to hand over the sources. The extension knows nothing of torch; torch is imported first, so that it finds
torch's OpenMP runtime in the process, where `openmp` has put it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import torch
from torch import Tensor

from fusedvae.layout import Strides
from fusedvae.torch_private import current_gpu, current_stream_address, is_capturing
from fusedvae.version import __version__

from . import MOST_KEPT, LatentWork, Launcher, ObjectiveWork, Part, TermWork, of_gpu, openmp
from .reference import GIVEN, Form
from .walk import Copy, Walk, walk_latent, walk_term, with_copies

openmp.share_runtime()
try:
    from fusedvae import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _import_error = str(error)

BUILD_RECORD = Path(__file__).parent.parent / "_build.json"
"""What the build compiled in, or why it compiled nothing; written by setup.py."""

# Codes of csrc/operand.h and csrc/tasks.h.
# (A seed, of another dtype, gets a code that no kernel looks at.)
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4, torch.bool: 4}
_VALUES = {"total": 0, "sample": 1, "element": 2}
_MAPS = {"exponential": 0, "linear": 1, "softplus": 2, "bounded": 3}

_Operand = tuple[int, ...] | None
"""A part as the extension describes it: see csrc/bindings.cpp."""


# --- tasks ------------------------------------------------------------------------------------------------------------


def _operand(part: Part | None, strides: Strides = (0, 0, 0)) -> _Operand:
    """A part that is walked with these strides."""
    if part is None:
        return None
    if part.dtype is None:
        return (part.source,)
    assert part.shape is not None
    return part.source, part.offset, part.shape.numel() > 0, _DTYPES.get(part.dtype, 0), *strides


def _values(part: Part | None) -> _Operand:
    """A vector of values per sample, or one value."""
    return _operand(part, (part.strides[0], 0, 0) if part is not None and part.strides else (0, 0, 0))


def _elementwise(term: TermWork, walked: Walk, operands: Sequence[_Operand], **more: _Operand) -> Any:
    """The extension's ElementwiseTask; the walk's operands end in value and gradients."""
    count = len(term.inputs)
    return _C.ElementwiseTask(
        term.in_double,
        walked.extent,
        inputs=tuple(operands[:count]),
        forms=tuple(map(_form, term.forms)),
        gains=term.gains or (),
        value=operands[-1 - count],
        grads=tuple(operands[-count:]),
        **more,
    )


def _form(form: Form) -> tuple[int, bool, float, float, float]:
    return _MAPS[form.map], form.squared, form.low, form.high, form.eps


def _term(term: TermWork, sources: int, *, keep_batch: bool) -> tuple[Any, list[Copy]]:
    """The extension's Term, and the copies around it."""
    common: dict[str, Any] = {
        "coefficient": _operand(term.coefficient),
        "factor": term.factor,
        "normalizer": _operand(term.normalizer),
        "out": _values(term.out),
    }
    if term.formula is GIVEN:
        (values,) = term.inputs
        assert values.shape is not None
        return _C.Term("", None, given=_values(values), given_count=values.shape.numel(), **common), []
    walked = walk_term(term, sources, keep_batch=keep_batch, can_sum=_C.can_sum)
    operands = tuple(map(_operand, walked.parts, walked.strides))
    count = len(term.inputs)
    task = _elementwise(term, walked, operands, weight=operands[count], incoming=operands[count + 1])
    return _C.Term(term.formula.name, task, constant=term.constant, **common), walked.copies


def _launcher(
    task: Any, device: torch.device, copies: Sequence[Copy] = (), *, keeps_workspace: bool = True
) -> Launcher:
    """What runs a task."""
    if device.type != "cuda":
        run, threads = task.run, torch.get_num_threads
        return with_copies(lambda sources: run(sources, threads()), copies)
    gpu: int = current_gpu() if device.index is None else device.index
    device = torch.device("cuda", gpu)
    size = task.workspace_bytes
    is_kept = keeps_workspace and size <= MOST_KEPT

    def launch(sources: tuple[Any, ...]) -> None:
        if current_gpu() != gpu:
            with torch.cuda.device(gpu):  # which makes no context on the GPU that was current before
                launch(sources)
            return
        stream = current_stream_address(gpu)
        if size == 0:
            task.launch(sources, gpu, stream, 0, 0)
            return
        # Until the launch, its memory must not become anyone else's; after it, the stream's order sees to that.
        workspace = _workspace(device, stream, size, is_kept=is_kept)
        task.launch(sources, gpu, stream, workspace.address, workspace.counter)

    return with_copies(launch, copies)


class _Workspace(NamedTuple):
    """What the blocks of a launch share."""

    sums: Tensor
    """Memory for partial sums."""
    address: int
    """Its address."""
    counter: int
    """The address of one that is 0 before a launch, and after it."""


_workspaces: dict[tuple[torch.device, int], _Workspace] = {}
_counters: dict[tuple[torch.device, int], int] = {}
"""One a GPU and stream: launches on one stream follow each other, and so may share them."""
_free_counters: dict[torch.device, Iterator[int]] = {}
"""By GPU, those of the extension's that no stream and no graph has."""


def _workspace(device: torch.device, stream: int, size: int, *, is_kept: bool) -> _Workspace:
    """A workspace with room for ``size`` bytes of sums, which stays for the stream if it ``is_kept``.

    Graphs are replayed on any stream, several at a time: each of their launches has its own, the sums in the graph's
    memory.
    """
    in_graph = is_capturing()
    stays = is_kept and not in_graph
    found = _workspaces.get((device, stream)) if stays else None
    if found is not None and found.sums.numel() >= size:
        return found
    counter = _counter(device, stream, in_graph=in_graph)
    if counter is None:
        zeros = torch.zeros(16 + size, dtype=torch.uint8, device=device)
        return _Workspace(zeros[16:], zeros.data_ptr() + 16, zeros.data_ptr())
    sums = torch.empty(max(size, 1 << 16) if stays else size, dtype=torch.uint8, device=device)
    found = _Workspace(sums, sums.data_ptr(), counter)
    if stays:
        _workspaces[device, stream] = found
    return found


def _counter(device: torch.device, stream: int, *, in_graph: bool) -> int | None:
    """The address of the stream's counter on the current GPU, or of one that a captured launch has for good. None where
    there are no more."""
    if in_graph:  # A GPU that has not been asked for its counters might have to load them, which captures forbid.
        return next(_free_counters.get(device, iter(())), None)
    found = _counters.get((device, stream))
    if found is None:
        if device not in _free_counters:
            first, count = _C.cuda_counters()
            # Unless another thread has been here meanwhile.
            _free_counters.setdefault(device, iter(range(first, first + 4 * count, 4)))
        found = next(_free_counters[device], None)
        if found is not None:
            _counters[device, stream] = found
    return found


# --- the backend ----------------------------------------------------------------------------------------------------


class _Native:
    def unavailable(self, device_type: str, index: int | None = None) -> str | None:
        if _C is None:
            return _absence()
        if device_type == "cpu":
            return None
        if device_type != "cuda":
            return f"it has no kernels for {device_type!r}"
        return of_gpu(_gpus_unavailable(), index)

    def describe(self, device_type: str) -> str:
        if device_type == "cuda":
            return "CUDA kernels"
        try:
            return f"C++ kernels, {_C.cpu_isa()}"
        except RuntimeError as error:  # a wrong FUSEDVAE_CPU_ISA: whatever runs a kernel raises this
            return f"C++ kernels: {error}"

    def openmp(self) -> tuple[str | None, int]:
        """The file of the OpenMP runtime that runs the CPU kernels, and how many threads they get if they ask for all.

        Without a runtime None, and 1."""
        if _C is None:
            return None, 1
        return _C.openmp_runtime() or None, _C.working_threads(torch.get_num_threads())

    def normal(self, out: Tensor, seed: Tensor) -> None:
        arguments = out.data_ptr(), _DTYPES[out.dtype], out.numel(), seed.data_ptr()
        if out.is_cuda:
            gpu = out.device.index
            with torch.cuda.device(gpu):
                _C.launch_normal(*arguments, gpu, current_stream_address(gpu))
        else:
            _C.normal(*arguments, torch.get_num_threads())

    def prepare_latent(
        self, work: LatentWork, sources: int, device: torch.device, *, keeps_workspace: bool = True
    ) -> Launcher:
        walked = walk_latent(work, sources, can_sum=_C.can_sum)
        operands = tuple(map(_operand, walked.parts, walked.strides))
        term = work.divergence
        count = len(term.inputs)
        noise, grad_z, incoming, z = operands[count : count + 4]
        task = _C.LatentTask(
            term.formula.name + ("_at_sample" if work.at_sample else ""),
            _elementwise(term, walked, operands, incoming=incoming),
            walked.logical,
            seed=_operand(work.seed),
            offset=_operand(work.offset),
            noise=noise,
            grad_z=grad_z,
            z=z,
        )
        return _launcher(task, device, walked.copies, keeps_workspace=keeps_workspace)

    def prepare_objective(
        self, work: ObjectiveWork, sources: int, device: torch.device, *, keeps_workspace: bool = True
    ) -> Launcher:
        terms: list[Any] = []
        copies: list[Copy] = []
        for term in work.terms:
            made, more = _term(term, sources + len(copies), keep_batch=work.values == "sample")
            terms.append(made)
            copies += more
        task = _C.ObjectiveTask(tuple(terms), _VALUES[work.values], _values(work.loss), _operand(work.grad_scale))
        return _launcher(task, device, copies, keeps_workspace=keeps_workspace)

    def prepare_scale(
        self,
        tensors: Sequence[Part],
        factor: Part,
        device: torch.device,
        coefficient: Part | None = None,
        product: Part | None = None,
    ) -> Launcher:
        counts = tuple([part.shape.numel() for part in tensors if part.shape is not None])
        data = tuple([_operand(part, (0, 0, 1)) for part in tensors])
        task = _C.ScaleTask(data, counts, _operand(factor), _operand(coefficient), _operand(product))
        return _launcher(task, device)


@lru_cache(maxsize=1)  # the GPUs and the driver of a process do not change
def _gpus_unavailable() -> list[str | None]:
    """Why the CUDA kernels cannot serve each of this machine's GPUs, and the remedy; one reason where there is none."""
    if not hasattr(_C, "cuda_unavailable"):
        found = ["this build of the extension has CPU kernels only; install fusedvae again where nvcc is found"]
    else:
        found = _C.cuda_unavailable()
    reasons = [reason or None for reason in found]
    # There may be one reason for all.
    return reasons if len(reasons) > 1 else reasons * max(torch.cuda.device_count(), 1)


def _absence() -> str:
    """Why there is no extension, and the remedy."""
    reason = json.loads(BUILD_RECORD.read_text()).get("error") if BUILD_RECORD.exists() else None
    what = f"was not built ({reason})" if reason else f"cannot be loaded ({_import_error})"
    return f"the compiled extension {what}; install fusedvae again where a C++17 compiler is found: {install_command()}"


@lru_cache(maxsize=1)
def install_command() -> str:
    """The command that builds the extension into this install, or fails.

    Without pip's cache: that may keep a wheel which was built without the extension, for the same source.
    """
    try:
        origin = json.loads(metadata.distribution("fusedvae").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        return "python setup.py build_ext --inplace"
    url = origin.get("url", "")
    what = [url if url and not url.endswith(".whl") else f"fusedvae=={__version__}"]
    if "vcs_info" in origin:
        what = [f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"]
    elif "dir_info" in origin:
        folder = unquote(urlsplit(url).path)
        what = ["-e", folder] if origin["dir_info"].get("editable") else [folder]
    return f"FUSEDVAE_REQUIRE_EXT=1 pip install --no-cache-dir --force-reinstall --no-deps {shlex.join(what)}"


BACKEND = _Native()
