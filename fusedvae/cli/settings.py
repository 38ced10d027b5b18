"""What a training run is made with, and the model that follows from it."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch

from .. import networks
from ..backend.reference import LIKELIHOODS as REGISTRY
from ..typing import Backend, Bound, LikelihoodName, LikelihoodScale, NormalScale
from ..vae import VAE
from .errors import CommandError

ARCHITECTURES = ("auto", "conv", "mlp")
DTYPES = ("float32", "float64", "bfloat16", "float16")
MIXED = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes of mixed precision: parameters of their own would not feel the optimizer's small steps."""
LIKELIHOODS = ("gaussian", "laplace", "bernoulli", "mse", "l1")
"""Those of which the package's decoders give the parameters: probabilities they do not."""
SCALES = ("logvar", "logstd", "softplus")
RECON_SCALES = ("logvar", "logstd", "logscale", "softplus")
"""Forms of a scale that any number is of: the networks bound nothing."""
BOUNDS = ("elbo", "iwae")
CONDITIONS = ("none", "labels")
LR_SCHEDULES = ("constant", "linear", "cosine")
BETA_SCHEDULES = ("linear", "cosine", "cyclical")
LOGGERS = ("none", "tensorboard", "wandb")
EPOCHS, STEPS_A_RESOLUTION = 30, 375
"""Of a run that says nothing of them: through the data so often at least, and so many steps for each resolution at
which the convolutional networks see an image."""
CONV_WIDTH, LEAST_CONV_WIDTH, SMALL = 32, 8, 32
"""Channels at full resolution, where a step spends its time and memory: those of small images, of so many pixels a
side, and half of them with each doubling, down to the least."""
PIXELS_A_PART = 64 * 128 * 128
"""Of a batch that a convolutional network is given at a time, unless that was asked for: what it remembers of them for
the backward pass is some 2 GiB."""
MLP_WIDTH = 512
HELDOUT = 0.1
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
    heldout: float = HELDOUT
    test_data: str | None = None
    arch: str = "auto"
    latent: int = 8
    width: int | None = None
    condition: str = "none"
    likelihood: LikelihoodName = "gaussian"
    recon_logvar: float | Literal["per-pixel", "learned"] = PER_PIXEL
    logvar_floor: float = networks.LOGVAR_FLOOR
    recon_scale: LikelihoodScale | None = None
    recon_clamp: tuple[float | None, float | None] | None = None
    recon_eps: float = 0.0
    scale: NormalScale = "logvar"
    clamp: tuple[float | None, float | None] | None = None
    eps: float = 0.0
    bound: Bound = "elbo"
    samples: int = 1
    beta: float = 1.0
    warmup: float = 0.0
    beta_schedule: str = "linear"
    epochs: int | None = None
    batch: int = 64
    grad_accum: int | None = None
    lr: float = 1e-3
    lr_schedule: str = "constant"
    lr_warmup: float = 0.0
    lr_final: float = 0.0
    clip_grad: float | None = None
    ema: float | None = None
    seed: int = 0
    evaluate_every: int = 0
    evaluate_samples: int = 100
    logger: str = "none"
    dtype: str = "float32"
    device: str = "auto"
    threads: int | None = None
    workers: int | None = None
    backend: Backend = "auto"
    compile: bool = False
    fsdp: bool = False

    @property
    def data_dtype(self) -> torch.dtype:
        """Of the data and the parameters."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def network_dtype(self) -> torch.dtype:
        """Of what the networks give."""
        return MIXED.get(self.dtype, self.data_dtype)

    @property
    def has_scale(self) -> bool:
        """Whether the likelihood has one."""
        return self.likelihood in ("gaussian", "laplace")

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision, where that was asked for."""
        if self.dtype not in MIXED:
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, MIXED[self.dtype])

    def check(self, classes: int, tested_on_labels: bool) -> None:
        """Refuse options that do not go together, or with data of so many classes, of which those to test on may have
        none."""
        if self.test_data is not None and self.heldout != HELDOUT:
            raise CommandError(f"--heldout {self.heldout}: nothing is held out of the data beside --test-data")
        if self.beta == 0 and self.warmup > 0:
            raise CommandError(f"--warmup {self.warmup}: there is nothing to grow to with --beta 0")
        if self.bound == "iwae" and (self.beta != 1 or self.warmup > 0):
            raise CommandError("--bound iwae is a bound for --beta 1 only, without --warmup")
        if self.beta_schedule != "linear" and self.warmup == 0:
            raise CommandError(f"--beta-schedule {self.beta_schedule} needs --warmup, the epochs over which beta grows")
        if self.lr_final != 0 and self.lr_schedule == "constant":
            raise CommandError(f"--lr-final {self.lr_final} needs --lr-schedule linear or cosine")
        if self.recon_logvar != PER_PIXEL and not self.has_scale:
            raise CommandError(f"--recon-logvar {self.recon_logvar}: the {self.likelihood} likelihood has no scale")
        if self.logvar_floor != networks.LOGVAR_FLOOR and (self.recon_logvar != PER_PIXEL or not self.has_scale):
            given = f"--recon-logvar {self.recon_logvar}" if self.has_scale else f"the {self.likelihood} likelihood"
            raise CommandError(f"--logvar-floor bounds a {PER_PIXEL} log-variance, and {given} has none")
        if self.has_scale and self.recon_scale is not None:
            forms = [form for form in RECON_SCALES if form in REGISTRY[self.likelihood].forms]
            if self.recon_scale not in forms:
                raise CommandError(
                    f"--recon-scale: expected one of {', '.join(map(repr, forms))}, as the likelihood is "
                    f"{self.likelihood}; got {self.recon_scale!r}"
                )
        if self.condition == "labels" and classes == 0:
            raise CommandError(f"--condition labels needs labels of two classes at least, and {self.data} has none")
        if self.condition == "labels" and not tested_on_labels:
            if self.test_data is None:
                raise CommandError(f"--condition labels: {self.data} has other labels now than the run was begun with")
            raise CommandError(
                f"--condition labels needs those of {self.data}, and {self.test_data} has none or others"
            )
        if self.fsdp and self.compile:
            raise CommandError("--fsdp and --compile do not go together")

    def beta_at(self, step: int, steps_per_epoch: int) -> float:
        """The weight of the KL in step ``step`` (from 0) of the run.

        It grows over the warm-up and then stays; "cyclical": stays as long as it grew, and starts anew (Fu et al. 2019,
        arXiv:1903.10145).
        """
        ramp = self.warmup * steps_per_epoch
        if not ramp:
            return self.beta
        if self.beta_schedule == "cyclical":
            step %= max(round(2 * ramp), 1)
        part = min(1.0, (step + 1) / ramp)
        return self.beta * ((1 - math.cos(math.pi * part)) / 2 if self.beta_schedule == "cosine" else part)

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate in step ``step`` (from 0) of the run: it grows over its warm-up, then goes to ``lr_final``
        times itself in the last step, in a line or in half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983)."""
        assert self.epochs is not None
        ramp = self.lr_warmup * steps_per_epoch
        if step + 1 < ramp:
            return self.lr * (step + 1) / ramp
        if self.lr_schedule == "constant":
            return self.lr
        part = (step - ramp) / max(self.epochs * steps_per_epoch - 1 - ramp, 1)
        part = min(max(part, 0.0), 1.0)
        left = (1 + math.cos(math.pi * part)) / 2 if self.lr_schedule == "cosine" else 1 - part
        return self.lr * (self.lr_final + (1 - self.lr_final) * left)

    def epochs_of(self, samples: int, shape: tuple[int, ...]) -> int:
        """How often to go through so many samples of a shape: as often as was asked for; else 30 times, or, where these
        make few steps, as often as larger images take longer to learn."""
        if self.epochs is not None:
            return self.epochs
        halvings = 0 if len(shape) < 3 else max(0, math.ceil(math.log2(max(shape[1:]) / 4)))
        steps = STEPS_A_RESOLUTION * (1 + max(halvings, 1))
        return max(EPOCHS, -(-steps // -(-samples // self.batch)))

    def arch_of(self, shape: tuple[int, ...]) -> str:
        """The networks for samples of ``shape``."""
        if self.arch != "auto":
            return self.arch
        return "conv" if len(shape) == 3 and not _is_one_pixel(shape) else "mlp"

    def width_of(self, shape: tuple[int, ...]) -> int:
        """Their width, unless it was asked for."""
        if self.width is not None:
            return self.width
        if self.arch_of(shape) == "mlp":
            return MLP_WIDTH
        doublings = math.ceil(math.log2(max([*shape[1:], SMALL]) / SMALL))
        return max(CONV_WIDTH >> doublings, LEAST_CONV_WIDTH)

    def grad_accum_of(self, shape: tuple[int, ...], processes: int = 1) -> int:
        """In how many parts a step is computed: as was asked for; else as many as large images need."""
        if self.grad_accum is not None or self.arch_of(shape) == "mlp" or len(shape) != 3:
            return self.grad_accum or 1
        rows = -(-self.batch // processes)
        return min(max(1, -(-rows * shape[1] * shape[2] // PIXELS_A_PART)), rows)

    def build_model(self, shape: tuple[int, ...], classes: int = 0) -> VAE:
        """A new model for samples of ``shape``, on the CPU; ``classes`` are how many labels there are to be told."""
        recon_logvar = None if self.recon_logvar == PER_PIXEL else self.recon_logvar
        width = self.width_of(shape)
        options: dict[str, Any] = {"mean_only": recon_logvar is not None or not self.has_scale}
        options["logvar_floor"] = self.logvar_floor
        options["classes"] = classes if self.condition == "labels" else None
        if self.arch_of(shape) == "conv":
            if len(shape) != 3:
                raise CommandError(f"--arch conv needs images, the samples are of shape {shape}: use --arch mlp")
            if _is_one_pixel(shape):
                raise CommandError("--arch conv needs images of more than one pixel: use --arch mlp")
            encoder, decoder = networks.conv(shape, self.latent, width=width, **options)
        else:
            encoder, decoder = networks.mlp(shape, self.latent, hidden=(width, max(width // 2, 1)), **options)
        try:
            model = VAE(
                encoder,
                decoder,
                self.latent,
                likelihood=self.likelihood,
                recon_logvar=recon_logvar,
                recon_scale=self.recon_scale,
                recon_clamp=self.recon_clamp,
                recon_eps=self.recon_eps,
                scale=self.scale,
                clamp=self.clamp,
                eps=self.eps,
            )
        except ValueError as error:  # the forms: which of them a likelihood has
            raise CommandError(f"--{str(error).replace('_', '-', 1)}") from error
        return model.to(self.data_dtype)


def _is_one_pixel(shape: tuple[int, ...]) -> bool:
    """Of an image, of which a normalisation leaves nothing."""
    return shape[1:] == (1, 1)
