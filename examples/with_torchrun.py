"""Train a VAE on several processes with PyTorch's own wrappers: DistributedDataParallel, or FSDP.

    torchrun --nproc-per-node 2 examples/with_torchrun.py
    torchrun --nproc-per-node 2 examples/with_torchrun.py --wrapper fsdp

The wrapper must see the call, so the loss is that of its output: ``wrapped(x).loss(x)``. What goes past it, as
``vae.loss(x)`` does, synchronises nothing.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import fusedvae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wrapper", choices=["ddp", "fsdp"], default="ddp")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64, help="samples a process and step")
    arguments = parser.parse_args()

    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank = torch.distributed.get_rank()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")

    torch.manual_seed(0)  # the same parameters everywhere
    shape, latent_dim = (1, 12, 12), 8
    networks = fusedvae.networks.mlp(shape, latent_dim, hidden=(64,), mean_only=True)
    vae = fusedvae.VAE(*networks, latent_dim, recon_logvar="learned").to(device)
    wrapped: nn.Module
    if arguments.wrapper == "ddp":
        wrapped = DistributedDataParallel(vae)
    else:
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        for part in (vae.encoder, vae.decoder, vae):
            fully_shard(part, mesh=mesh)
        wrapped = vae
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=1e-3)

    torch.manual_seed(1 + rank)  # other data, and other noise
    losses = []
    for _ in range(arguments.steps):
        x = torch.rand(arguments.batch, *shape, device=device)
        loss = wrapped(x).loss(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in vae.parameters()]
    total = sum(p.detach().double().abs().sum().item() for p in whole)
    print(f"process {rank}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, parameters {total:.9f}", flush=True)
    # The wrapper before its group: were it the last to hold that, PyTorch would end the group under the interpreter's
    # lock, and wait for a thread that may want it.
    del wrapped
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
