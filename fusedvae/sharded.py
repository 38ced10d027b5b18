"""DTensors: batches that are shared out among processes, of which each computes its rows with the kernels.

Nothing but sums goes between processes, and that when somebody reads them: a total is a partial sum in each process
(`Partial`), what is one a sample lies where the sample does (`Shard(0)`). What has no row for each sample (a learned
scale, a prior) is replicated, and its gradient is again a partial sum. Noise is that of the whole batch, of the seed
that the first process drew.

Batches that lie in another way (split along their features, over several dimensions of a mesh, or as partial sums), and
several samples of the latent, go by the reference's formulas, whose operations DTensor shares out itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from .backend.reference import replaced
from .backend.specs import Objective, Sampling, factor_of, unpacked
from .calls import Operand, Operands
from .layout import dense_strides


class _Batch(NamedTuple):
    """How the rows of a batch are shared out."""

    mesh: DeviceMesh
    dim: int | None
    """The dimension of the mesh that they are split along; None if every process has them all."""

    def placements(self, split: Placement) -> list[Placement]:
        """Those of a tensor that is ``split`` where the batch is."""
        return [split if k == self.dim else Replicate() for k in range(self.mesh.ndim)]

    def start(self, size: int) -> int:
        """The first row that this process has, of ``size``."""
        if self.dim is None:
            return 0
        rows = -(-size // self.mesh.size(self.dim))
        return min(rows * self.mesh.get_local_rank(self.dim), size)

    def local(self, operand: Operand, has_rows: bool) -> Operand:
        """This process's part of an operand: its rows, or all of what has none."""
        if not isinstance(operand, DTensor):
            return operand
        if has_rows:
            return operand.redistribute(self.mesh, self.placements(Shard(0))).to_local()
        whole = operand.redistribute(self.mesh, self.placements(Replicate()))
        return whole.to_local(grad_placements=self.placements(Partial()))

    def rows(self, value: Tensor, size: int) -> Tensor:
        """A tensor of which every process has made its rows."""
        shape = torch.Size((size, *value.shape[1:]))
        placements, stride = self.placements(Shard(0)), dense_strides(shape, value.stride())
        return DTensor.from_local(value, self.mesh, placements, run_check=False, shape=shape, stride=stride)

    def total(self, value: Tensor) -> Tensor:
        """A sum of which every process has made its part."""
        return DTensor.from_local(value, self.mesh, self.placements(Partial()), run_check=False)


def _batch(operands: Operands, has_rows: Sequence[bool]) -> _Batch | None:
    """How the operands' batch is shared out; None if in no way that is known here.

    Raises:
        ValueError: some tensors are not shared out.
    """
    shared = [t for t in operands if isinstance(t, DTensor)]
    mesh, dims = shared[0].device_mesh, set()
    for operand, is_of_rows in zip(operands, has_rows, strict=True):
        if not isinstance(operand, Tensor):
            continue
        if not isinstance(operand, DTensor):
            if operand.dim() > 0:
                raise ValueError(
                    f"operands: expected DTensors, as others are, got a plain tensor of shape {tuple(operand.shape)}: "
                    "torch.distributed.tensor.distribute_tensor shares it out (or, if the others are parameters of a "
                    "sharded module, they are whole within its own call)"
                )
            if operand.requires_grad:
                return None
        elif operand.device_mesh != mesh:
            raise ValueError(f"operands: expected DTensors of one mesh, got {mesh} and {operand.device_mesh}")
        else:
            for k, placement in enumerate(operand.placements):
                if type(placement) is Shard and placement.dim == 0 and is_of_rows:
                    dims.add(k)
                elif not placement.is_replicate():
                    return None
    return None if len(dims) > 1 else _Batch(mesh, next(iter(dims), None))


def _has_rows(operand: Operand, shape: torch.Size) -> bool:
    """Whether an operand has a row for each of a batch of this shape, and is not broadcast along it."""
    return isinstance(operand, Tensor) and operand.dim() == len(shape) > 0 and operand.shape[0] == shape[0]


def objective(
    spec: Objective, operands: Operands, run: Callable[[Objective, Operands], Sequence[Tensor]]
) -> Sequence[Tensor] | None:
    """The values of an objective; None if kernels cannot compute them of what each process has.

    Args:
        run: computes an objective of plain operands.
    """
    if spec.values == "element" and spec.dim is not None and 0 in spec.dim:
        return None
    terms = spec.terms()
    has_rows, shapes = [False] * len(operands), []
    for term in terms:
        mean = unpacked(term.formula, operands[term.inputs], spec.packed_dim)[0]
        assert isinstance(mean, Tensor)
        shapes.append(mean.shape)
        for k in (*range(term.inputs.start, term.inputs.stop), term.weight):
            if k is not None:
                has_rows[k] = _has_rows(operands[k], mean.shape)
    batch = _batch(operands, has_rows)
    if batch is None:
        return None
    local = [batch.local(t, rows) for t, rows in zip(operands, has_rows, strict=True)]
    if spec.values != "total":
        return [batch.rows(value, shapes[0][0]) for value in run(spec, local)]
    # A process knows the sum over its rows; means are over those of all.
    factors = [factor_of(term.reduction, shape) for term, shape in zip(terms, shapes, strict=True)]
    if factors[-1] != factors[0]:
        local[spec.beta] = local[spec.beta] * (factors[-1] / factors[0])  # type: ignore[operator]
    sums = tuple([r if r == "weighted_mean" else "sum" for r in spec.reductions])
    values = run(replaced(spec, reductions=sums), local)
    of_terms = (factors[0], factors[0], factors[-1])  # the loss, the likelihood, the divergence
    return [batch.total(v * f) for v, f in zip(values, of_terms[: len(values)], strict=True)]


def latent(
    spec: Sampling, operands: Operands, run: Callable[[Sampling, Operands], Sequence[Tensor]]
) -> Sequence[Tensor] | None:
    """The sample and its divergence, likewise."""
    if spec.samples is not None or 0 in spec.kl_dim:
        return None
    *inputs, seed, offset, noise = operands
    mean = unpacked(spec.formula, inputs, spec.packed_dim)[0]
    assert isinstance(mean, Tensor)
    data = [*inputs, noise]
    has_rows = [_has_rows(t, mean.shape) for t in data]
    batch = _batch(data, has_rows)
    if batch is None:
        return None
    *inputs, noise = [batch.local(t, rows) for t, rows in zip(data, has_rows, strict=True)]
    if seed is not None:
        assert isinstance(seed, Tensor)
        seed = _of_the_first(seed, batch.mesh)
        first = batch.start(mean.shape[0]) * mean.shape[1:].numel()
        if first:
            offset = first + (0.0 if offset is None else offset)
    return [batch.rows(value, mean.shape[0]) for value in run(spec, [*inputs, seed, offset, noise])]


def _of_the_first(seed: Tensor, mesh: DeviceMesh) -> Tensor:
    everywhere: Any = distribute_tensor(seed, mesh, [Replicate()] * mesh.ndim)
    return everywhere.to_local()
