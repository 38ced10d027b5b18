"""Train a VAE with Lightning, on one process or several.

    python examples/with_lightning.py --devices 2

Lightning runs `training_step` inside of its wrapper, so that there any of the VAE's methods may be called.
"""

from __future__ import annotations

import argparse

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fusedvae


class LightningVAE(lightning.LightningModule):
    """A VAE whose KL is annealed over the first steps."""

    def __init__(self, shape: tuple[int, ...], latent_dim: int, warmup: int = 10) -> None:
        super().__init__()
        networks = fusedvae.networks.mlp(shape, latent_dim, hidden=(64,), mean_only=True)
        self.vae = fusedvae.VAE(*networks, latent_dim, recon_logvar="learned")
        self.warmup = warmup
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        (x,) = batch
        beta = min(1.0, (self.global_step + 1) / self.warmup)
        terms = self.vae.loss(x, beta=beta, return_terms=True)
        self.log_dict({"loss": terms.loss, "nll": terms.nll, "kl": terms.kl}, sync_dist=True)
        self.losses.append(terms.nll.item())
        return terms.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64, help="samples a process and step")
    parser.add_argument("--devices", type=int, default=1)
    arguments = parser.parse_args()

    lightning.seed_everything(0, verbose=False)
    shape = (1, 12, 12)
    model = LightningVAE(shape, latent_dim=8)
    images = torch.rand(arguments.steps * arguments.batch * arguments.devices, *shape)
    trainer = lightning.Trainer(
        max_epochs=1,
        devices=arguments.devices,
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        strategy="ddp" if arguments.devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(images), batch_size=arguments.batch, shuffle=True))

    total = sum(p.detach().double().abs().sum().item() for p in model.parameters())
    first, last = model.losses[0], model.losses[-1]
    print(f"process {trainer.global_rank}: loss {first:.3f} -> {last:.3f}, parameters {total:.9f}", flush=True)


if __name__ == "__main__":
    main()
