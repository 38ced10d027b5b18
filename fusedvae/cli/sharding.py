"""Tensors of which each process holds a part (FSDP2), and whole ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from .objective import Objective

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def shard(objective: Objective, device: torch.device) -> None:
    """Spread an objective's weights over all processes; a layer's are whole while it computes, and no longer."""
    # Imported where it is needed: it takes PyTorch a second, and every command would wait for it.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in [*_layers(objective.model.encoder), *_layers(objective.model.decoder)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(objective, mesh=mesh)


def _layers(network: nn.Module) -> Iterator[nn.Module]:
    """What a network does one after the other, as far as it has weights; residual blocks count as one."""
    for child in network.children():
        if isinstance(child, nn.Sequential) or hasattr(child, "arguments"):  # another network in it
            yield from _layers(child)
        elif next(child.parameters(), None) is not None:
            yield child


def _is_spread(value: Tensor) -> TypeGuard[DTensor]:
    """Whether a process has a part of it only. Where nothing has imported DTensors, there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def whole(value: Tensor, *, keep: bool) -> Tensor:
    """All of a tensor, which every process must ask for: of one that is spread, on the CPU; and, of processes that are
    not to ``keep`` it, nothing."""
    if not _is_spread(value):
        return value
    gathered = value.full_tensor()
    return gathered.cpu() if keep else torch.empty(0)


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, spread as ``parameter`` is if it has its shape."""
    if _is_spread(parameter) and value.shape == parameter.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def load(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load whole tensors into a model, whether it is spread or not."""
    own = model.state_dict()
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    if {name: tuple(value.shape) for name, value in state.items()} != shapes:
        raise ValueError("tensors of another model")
    model.load_state_dict({name: like(value, own[name]) for name, value in state.items()})
