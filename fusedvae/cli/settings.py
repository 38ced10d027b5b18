"""What a training run is made with, and the model that follows from it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import nn

from .. import networks
from ..vae import VAE
from .errors import CommandError

ARCHITECTURES = ("auto", "conv", "mlp")
DTYPES = ("float32", "float64", "bfloat16")
PER_PIXEL: Final = "per-pixel"
LEARNED: Final = "learned"


@dataclass(frozen=True)
class Settings:
    """The options of ``fusedvae train``, under the same names; the help texts there say what each means."""

    data: str = "digits"
    array: str | None = None
    image_size: int | None = None
    image_shape: tuple[int, ...] | None = None
    channels: str | None = None
    heldout: float = 0.1
    test_data: str | None = None
    arch: str = "auto"
    latent: int = 8
    width: int | None = None
    recon_logvar: float | Literal["per-pixel", "learned"] = PER_PIXEL
    logvar_floor: float = networks.LOGVAR_FLOOR
    beta: float = 1.0
    warmup: float = 0.0
    epochs: int = 30
    batch: int = 64
    lr: float = 1e-3
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"
    threads: int | None = None
    workers: int | None = None
    backend: str = "auto"

    @property
    def data_dtype(self) -> torch.dtype:
        """Of the data and the parameters."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision for bfloat16, whose own parameters would not feel the optimizer's small steps."""
        if self.dtype != "bfloat16":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, torch.bfloat16)

    def beta_at(self, step: int, steps_per_epoch: int) -> float:
        """The weight of the KL in step ``step`` (from 0) of the run: linear over the warm-up, then
        constant."""
        ramp = self.warmup * steps_per_epoch
        return self.beta * min(1.0, (step + 1) / ramp) if ramp else self.beta

    def build_model(self, shape: tuple[int, ...]) -> VAE:
        """A new model for samples of ``shape``, on the CPU."""
        recon_logvar = None if self.recon_logvar == PER_PIXEL else self.recon_logvar
        mean_only, floor = recon_logvar is not None, self.logvar_floor
        one_pixel = shape[1:] == (1, 1)  # of which a normalisation leaves nothing
        arch = ("conv" if len(shape) == 3 and not one_pixel else "mlp") if self.arch == "auto" else self.arch
        pair: tuple[nn.Module, nn.Module]
        if arch == "conv":
            if len(shape) != 3:
                raise CommandError(f"--arch conv needs images, the samples are of shape {shape}: use --arch mlp")
            if one_pixel:
                raise CommandError("--arch conv needs images of more than one pixel: use --arch mlp")
            pair = networks.conv(shape, self.latent, width=self.width or 32, mean_only=mean_only, logvar_floor=floor)
        else:
            width = self.width or 512
            hidden = (width, max(width // 2, 1))
            pair = networks.mlp(shape, self.latent, hidden=hidden, mean_only=mean_only, logvar_floor=floor)
        encoder, decoder = pair
        return VAE(encoder, decoder, self.latent, recon_logvar=recon_logvar).to(self.data_dtype)
