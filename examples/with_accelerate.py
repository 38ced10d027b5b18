"""Train a VAE with accelerate, on one process or several.

    accelerate launch examples/with_accelerate.py
    torchrun --nproc-per-node 2 examples/with_accelerate.py

What `prepare` returns must see the call, so the loss is that of its output: ``model(x).loss(x)``. What goes past it, as
``accelerator.unwrap_model(model).loss(x)`` does, synchronises nothing.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

import fusedvae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64, help="samples a process and step")
    arguments = parser.parse_args()

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_seed(0)
    shape, latent_dim = (1, 12, 12), 8
    networks = fusedvae.networks.mlp(shape, latent_dim, hidden=(64,), mean_only=True)
    vae = fusedvae.VAE(*networks, latent_dim, recon_logvar="learned")
    images = torch.rand(arguments.steps * arguments.batch * accelerator.num_processes, *shape)
    loader = DataLoader(TensorDataset(images), batch_size=arguments.batch, shuffle=True)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(vae, optimizer, loader)

    losses = []
    for (x,) in loader:
        loss = model(x).loss(x)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())

    total = sum(p.detach().double().abs().sum().item() for p in model.parameters())
    rank = accelerator.process_index
    print(f"process {rank}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, parameters {total:.9f}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
