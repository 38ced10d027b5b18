"""Triton kernels, compiled when they are first needed: for GPUs of NVIDIA and AMD, with nothing to build.

Works out from sizes, strides and dtypes how `kernels` walk a call's operands: in what tiles (`tiling`), what they are
told of these (`arguments`), and how they are launched (`launch`). The kernels read and write operands by `access`, add
up by `sums`, and compute the formulas of `formulas` and the noise of `noise` in the arithmetic of `arithmetic`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from fusedvae.backend import LatentWork, Launcher, ObjectiveWork, Part, of_gpu
from fusedvae.backend.walk import Copy, walk_latent, with_copies

from . import codes
from .tiling import USUAL, cost_of, most_in_tile, options_for, tiles_of

try:
    import triton

    from . import kernels
    from .arguments import (
        TermArguments,
        absent_term,
        axes_of,
        extent_arguments,
        flat_arguments,
        form_arguments,
        may_be_rough,
        nibbles,
        quads_for,
        room_for,
        shared_sums,
        split_of,
        stride_arguments,
        stride_of,
        term_arguments,
        walk_flags,
        with_parts,
    )
    from .launch import KernelLauncher, LatentLauncher, is_interpreted, nothing
except ImportError as error:
    triton = None
    _import_error = str(error)

_OLDEST = 7, 0
"""The compute capability that atomic operations with an order need."""

_SCALED = 2 * codes.MOST_INPUTS
"""Tensors that a launch can scale: the gradients of an objective."""

_WAVE = 1024
"""Programs that scale: enough to fill a GPU, and no more, since all that most of them ever do is to read a 1."""


class _Triton:
    def unavailable(self, device_type: str, index: int | None = None) -> str | None:
        if triton is None:
            return f"Triton cannot be imported ({_import_error}); install it with `pip install triton`"
        if device_type == "cpu" and not is_interpreted():
            return "Triton has no compiler for CPUs; set TRITON_INTERPRET=1 to run its interpreter, which is slow"
        if device_type not in ("cpu", "cuda"):
            return f"there are no Triton kernels for {device_type!r} devices; use the reference"
        if is_interpreted() or not torch.cuda.is_available():  # without a GPU here, it is for compilers to see
            return None
        return of_gpu(_gpus_unavailable(), index)

    def describe(self, device_type: str) -> str:
        if is_interpreted():
            return "Triton kernels, interpreted"
        if torch.version.hip is not None:
            return f"Triton kernels, {torch.cuda.get_device_properties().gcnArchName.partition(':')[0]}"
        major, minor = torch.cuda.get_device_capability()
        return f"Triton kernels, sm_{major}{minor}"

    def normal(self, out: Tensor, seed: Tensor) -> None:
        count = out.numel()
        if count:
            fixed = {"count": count, **flat_arguments(count), "quads": quads_for(out.dtype), "out": out, "seed": seed}
            KernelLauncher(kernels.normal_kernel, -(-count // fixed["tile"]), out.device, fixed, {})(())

    def prepare_latent(
        self, work: LatentWork, sources: int, device: torch.device, *, keeps_workspace: bool = True
    ) -> Launcher:
        term, inputs = work.divergence, len(work.divergence.inputs)
        walked = walk_latent(work, sources, can_sum=lambda extent, strides: True)
        extent = walked.extent
        names = (*codes.INPUTS[:inputs], "noise", "grad_z", "incoming", "z", "value", *codes.GRADS[:inputs])
        axes = axes_of(names, walked)
        l0, l1, l2 = walked.logical
        has_quads = l2 == 1 and l0 % 4 == 0 and l1 % 4 == 0
        is_rough = may_be_rough(work)
        # Exact noise of 16 elements, as there are in a tile of 16 bits, would be too much for a thread.
        has_few = is_rough or most_in_tile(term, cost_of([term])) <= USUAL.tile
        is_light = has_quads and work.offset is None and not work.at_sample and has_few
        cost = cost_of([term], is_light=is_light)
        tiles = tiles_of(extent, axes, most_in_tile(term, cost))
        if not tiles.total:
            return with_copies(nothing, walked.copies)
        sums = shared_sums(axes, tiles)
        row = tiles.shape[2]
        fixed = {
            **{f"{name}_value": 0.0 for name in (*codes.INPUTS[1:], "incoming")},
            **extent_arguments(extent, tiles, term.in_double),
            **stride_arguments(names, walked.strides),
            **form_arguments(term, is_rough=is_rough),
            **sums.fixed,
            **options_for(tiles.elements, cost),
            "formula": term.formula.name,
            "at_sample": work.at_sample,
            "axes": nibbles([axes.get(name) for name in codes.LATENT_AXES]),
            "l0": l0,
            "l1": l1,
            "l2": l2,
            "quads": quads_for(term.inputs[0].dtype, row, cost) if has_quads and row >= 4 else 0,
            "walk": walk_flags(extent, tiles, [*walked.strides, walked.logical]),
        }
        parts = {**dict(zip(names, walked.parts, strict=True)), "seed": work.seed}
        launch = LatentLauncher(
            kernels.latent_kernel,
            tiles.total,
            device,
            fixed,
            parts,
            room_for("", sums, term.in_double),
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
            return nothing
        assert len(counts) <= _SCALED
        fixed = {**flat_arguments(max(counts)), "coefficient_value": 0.0}
        blocks = 1
        for k, (part, count) in enumerate(zip(tensors, counts, strict=True)):
            if count:
                parts[f"data_{k}"], fixed[f"count_{k}"] = part, count
                blocks = max(blocks, -(-count // fixed["tile"]))
        return KernelLauncher(kernels.scale_kernel, min(blocks, _WAVE), device, fixed, parts)


def _prepare_elements(work: ObjectiveWork, sources: int, device: torch.device, keeps_workspace: bool) -> Launcher:
    """A term element by element."""
    (term,) = work.terms
    cost = cost_of(work.terms)
    task = term_arguments(term, sources, cost, keep_batch=False)
    if not task.tiles.total:
        return with_copies(nothing, task.copies)
    fixed = {"incoming_value": 0.0, "grad_scale_value": 1.0, **task.fixed, "constant": term.constant}
    fixed.update(options_for(task.tiles.elements, cost))
    launch = KernelLauncher(
        kernels.elementwise_kernel,
        task.tiles.total,
        device,
        fixed,
        {**task.parts, "grad_scale": work.grad_scale},
        room_for("", task.sums, term.in_double),
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
    cost = cost_of(work.terms)
    copies: list[Copy] = []
    tasks: list[TermArguments] = []
    for term in work.terms:
        assert term.incoming is None, "what comes in for each element comes for values of elements"
        assert term.value is None
        tasks.append(term_arguments(term, sources + len(copies), cost, keep_batch=by_sample))
        copies += tasks[-1].copies
    if not values:
        return with_copies(nothing, copies)
    # What is finished at once: the samples of the larger tiles. A value's sums are of that many tiles.
    rows = max([task.tiles.shape[0] if task.tiles.total else 64 for task in tasks]) if by_sample else 1
    chunks = -(-values // rows)
    addends = [task.tiles.total // (task.tiles.counts[0] if by_sample else 1) for task in tasks if task.tiles.total]
    split = split_of(max(addends, default=0), rows)
    parts_of_sums = sum(with_parts(count, split)[0] - count for count in addends)
    fixed: dict[str, Any] = {
        "values": values,
        "loss_0": stride_of(loss),
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
            task = absent_term()
        else:
            shape = term.inputs[0].shape
            assert shape is not None
            addends_of_constant = (shape[1:] if by_sample else shape).numel() if term.weight is None else 1
            task.fixed.update(constant=term.constant * addends_of_constant, counters=counters)
            task.fixed.update(out_0=stride_of(term.out), tiles=task.tiles.total)
            task.parts.update(out=term.out)
            room.update(room_for(f"{prefix}_", task.sums, term.in_double))
        fixed.update({f"{prefix}_{name}": value for name, value in task.fixed.items()})
        parts.update({f"{prefix}_{name}": part for name, part in task.parts.items()})
        factors.update({f"{prefix}_{name}": part for name, part in task.factors.items()})
        counters += task.sums.total * task.sums.counters
    programs = sum(task.tiles.total for task in tasks)
    fixed.update(options_for(max(task.tiles.elements for task in tasks), cost))
    launch = KernelLauncher(
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


BACKEND = _Triton()
