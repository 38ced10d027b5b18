"""What is measured: operations, on shapes of real models, in several dtypes and layouts.

A preset is a model's shapes, with their source. A case is one operation of one preset in one dtype, memory format and
direction; `operands` makes its inputs, `Case.traffic` says what a perfect implementation would move.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...backend.reference import LIKELIHOODS, Formula

GAUSSIAN = "gaussian"
"""The likelihood that people write in several ways, and that is part of the ELBO here."""


def likelihoods() -> dict[str, str]:
    """The operations that are a likelihood alone, and which of the registry's: "nll" and, of all others, "nll-NAME"."""
    return {"nll" if name == GAUSSIAN else f"nll-{name}": name for name in LIKELIHOODS}


def operations() -> dict[str, str]:
    """Every operation, and what it is."""
    alone = {
        operation: f"{name.capitalize()} negative log-likelihood, mean over the batch"
        for operation, name in likelihoods().items()
    }
    return {
        "reparameterize": "sample z = mu + exp(logvar / 2) * eps",
        "kl": "KL of the posterior to the standard normal, mean over the batch",
        **alone,
        "latent": "sample and KL (a value per sample) together",
        "elbo": "negative ELBO of given decoder and encoder outputs, mean over the batch",
        "step": "a whole training step: networks, sampling, loss, backward pass, fused Adam",
    }


OPERATIONS = operations()
DIRECTIONS = {
    "both": "forward and backward pass",
    "forward": "forward pass of training (where gradients are made in it, with them)",
    "backward": "backward pass alone (where gradients are made in the forward pass, what is left to do)",
    "evaluate": "values only, under torch.no_grad",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEMORY_FORMATS = ("contiguous", "channels_last")


class Preset(NamedTuple):
    """The shapes of a model."""

    description: str
    source: str
    latent: tuple[int, ...]
    """Of mu, with the batch."""
    x: tuple[int, ...] | None = None
    """Of the data, with the batch; None where only the latent is of interest."""
    recon_logvar: Literal["each", "feature", "scalar"] = "each"
    """A decoder log-variance for each element, one for each feature, or one for all."""
    packed: bool = False
    """Whether the encoder emits mean and log-variance as one tensor."""
    steps: bool = False
    """Whether its whole training step is measured too."""
    objective_latent: tuple[int, ...] | None = None
    """The latent of the elbo operation, if it is another."""

    @property
    def operations(self) -> tuple[str, ...]:
        of_x = likelihoods() if self.x is not None else ()
        found = ("reparameterize", "kl", *of_x, "latent")
        if self.x is not None:
            found = (*found, "elbo")
        return (*found, "step") if self.steps else found


MODELS = {
    "mnist-mlp": Preset(
        "MLP on MNIST: batch 128, 784 pixels, 20 latent variables, a log-variance a pixel",
        "pytorch/examples, vae/main.py (784-400-20-400-784, batch 128, Adam 1e-3), with the Gaussian decoder of "
        "Kingma & Welling 2014, appendix C.2, in the place of the Bernoulli one",
        latent=(128, 20),
        x=(128, 784),
        steps=True,
    ),
    "cifar-conv": Preset(
        "convolutional VAE on CIFAR-10: batch 100, 3x32x32, 128 latent variables, a log-variance a pixel",
        "Ghosh et al. 2020, 'From variational to deterministic autoencoders' (CIFAR-10: latent 128, batch 100)",
        latent=(100, 128),
        x=(100, 3, 32, 32),
    ),
    "latent-diffusion": Preset(
        "image autoencoder of latent diffusion: batch 12, 3x256x256, packed 4x32x32 moments, one learned log-variance",
        "Rombach et al. 2022; CompVis/latent-diffusion, configs/autoencoder/autoencoder_kl_32x32x4.yaml (batch 12), "
        "whose loss (LPIPSWithDiscriminator) learns one log-variance for all",
        latent=(12, 4, 32, 32),
        x=(12, 3, 256, 256),
        recon_logvar="scalar",
        packed=True,
    ),
    "single-cell-2k": Preset(
        "single-cell VAE on variable genes: batch 128, 2,000 genes, 30 latent variables, a log-variance a gene",
        "Lopez et al. 2018 (scVI); scvi-tools: batch 128, dispersion='gene'; 2,000 genes and 30 latents as in its "
        "model of the Human Lung Cell Atlas",
        latent=(128, 30),
        x=(128, 2000),
        recon_logvar="feature",
    ),
    "single-cell-20k": Preset(
        "single-cell VAE on all genes: batch 128, 20,000 genes, 10 latent variables, a log-variance a gene",
        "Lopez et al. 2018 (scVI); scvi-tools' defaults: batch 128, n_latent=10, dispersion='gene'",
        latent=(128, 10),
        x=(128, 20000),
        recon_logvar="feature",
    ),
    "video-latent": Preset(
        "latent of a video autoencoder: packed 16x13x60x90 moments of 49 frames of 480x720",
        "Yang et al. 2024 (CogVideoX), AutoencoderKLCogVideoX: 16 channels, 8x8 in space, 4 in time",
        latent=(1, 16, 13, 60, 90),
        packed=True,
    ),
}
SWEEP_EXPONENTS = range(8, 27, 2)
SWEEP_BATCH = 64
SWEEP = "sweep"
"""Stands for all of the sweep's presets."""


def _sweep(exponent: int) -> Preset:
    columns = 2**exponent // SWEEP_BATCH
    shape = (SWEEP_BATCH, columns)
    return Preset(
        f"2^{exponent} elements: {SWEEP_BATCH}x{columns}, a log-variance an element; in elbo a latent of a sixteenth",
        "a sweep over sizes",
        latent=shape,
        x=shape,
        objective_latent=(SWEEP_BATCH, max(columns // 16, 1)),
    )


PRESETS = {**MODELS, **{f"2^{exponent}": _sweep(exponent) for exponent in SWEEP_EXPONENTS}}


@dataclass(frozen=True)
class Case:
    """One line of work for all contestants."""

    preset: str
    operation: str
    dtype: str = "float32"
    memory_format: str = "contiguous"
    direction: str = "both"

    def __str__(self) -> str:
        parts = [self.preset, self.operation]
        defaults = Case(self.preset, self.operation)
        for name in ("dtype", "memory_format", "direction"):
            if getattr(self, name) != getattr(defaults, name):
                parts.append(getattr(self, name))
        return " ".join(parts)

    @property
    def shapes(self) -> Preset:
        preset = PRESETS[self.preset]
        if self.operation == "elbo" and preset.objective_latent is not None:
            return preset._replace(latent=preset.objective_latent)
        return preset

    @property
    def batch(self) -> int:
        return self.shapes.latent[0]

    @property
    def samples(self) -> bool:
        """Whether the operation draws noise."""
        return self.operation in ("reparameterize", "latent")

    @property
    def likelihood(self) -> str | None:
        """The likelihood that the operation is or has in it, by the registry's name."""
        return GAUSSIAN if self.operation == "elbo" else likelihoods().get(self.operation)

    @property
    def formula(self) -> Formula | None:
        """That of the likelihood."""
        return None if self.likelihood is None else LIKELIHOODS[self.likelihood]

    @property
    def uses_x(self) -> bool:
        return self.likelihood is not None

    @property
    def uses_latent(self) -> bool:
        return self.operation not in likelihoods()

    @property
    def elements(self) -> int:
        """Of the operation's largest operand (of x for a step)."""
        shape = self.shapes.x if self.uses_x or self.operation == "step" else self.shapes.latent
        assert shape is not None
        return math.prod(shape)

    def traffic(self) -> int | None:
        """Bytes that a perfect implementation moves; None where that has no simple answer.

        Losses make their gradients in the forward pass: they read each operand once and write each gradient once.
        Samples read mu and logvar and write z; their backward pass reads what it needs again. Values that are fewer
        than the elements (a loss, a log-variance per feature) count as nothing.
        """
        if self.operation == "step" or self.direction in ("forward", "backward"):
            return None
        m = math.prod(self.shapes.latent)
        n = math.prod(self.shapes.x or ())
        # (read, written) by the values alone, then by everything.
        per_latent = {
            "reparameterize": ((2, 1), (4, 3)),
            "kl": ((2, 0), (2, 2)),
            "latent": ((2, 1), (5, 3)),
            "elbo": ((2, 0), (2, 2)),
        }
        which = 0 if self.direction == "evaluate" else 1
        count = sum(per_latent[self.operation][which]) * m if self.uses_latent else 0
        if self.formula is not None:
            # recon_x, x and maybe the scale; all of them but x want a gradient.
            read = 3 if len(self.formula.inputs) > 2 and self.shapes.recon_logvar == "each" else 2
            count += (read, read + read - 1)[which] * n
        return count * DTYPES[self.dtype].itemsize

    def possible(self) -> bool:
        """Whether the preset has the operation, and the tensors such a memory format."""
        preset = PRESETS[self.preset]
        if self.operation not in preset.operations:
            return False
        if self.operation == "step" and (self.dtype, self.memory_format, self.direction) != (
            "float32", "contiguous", "both",
        ):  # fmt: skip
            return False
        if self.memory_format == "channels_last":
            return len(self._layout_shape()) in (4, 5)
        return True

    def _layout_shape(self) -> tuple[int, ...]:
        shape = self.shapes.x if self.uses_x else self.shapes.latent
        assert shape is not None
        return shape


def cases(
    presets: list[str], operations: list[str], dtypes: list[str], memory_formats: list[str], directions: list[str]
) -> list[Case]:
    """Every possible combination, presets slowest."""
    found = [
        Case(preset, operation, dtype, memory_format, direction)
        for preset in presets
        for operation in operations
        for dtype in dtypes
        for memory_format in memory_formats
        for direction in directions
    ]
    return [case for case in found if case.possible()]


@dataclass
class Operands:
    """The inputs of a case, and the gradients that come back to its outputs."""

    mu: Tensor | None = None
    """The mean, or mean and log-variance packed."""
    logvar: Tensor | None = None
    recon_x: Tensor | None = None
    x: Tensor | None = None
    recon_logvar: Tensor | None = None
    """Or the scale of another likelihood."""
    extra: Tensor | None = None
    """What a likelihood takes beside it: a value per sample."""
    grad_z: Tensor | None = None
    grad_kl: Tensor | None = None

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gradients are wanted of."""
        names = ("mu", "logvar", "recon_x", "recon_logvar", "extra")
        found = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in vars(self).values() if t is not None)

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        """What contestants take."""
        return self.mu, self.logvar, self.recon_x, self.x, self.recon_logvar, self.extra

    def gradients(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Of the leaves, by a backward pass."""
        return torch.autograd.grad(outputs, list(self.leaves.values()), self.grads_of(outputs))

    def grads_of(self, outputs: tuple[Tensor, ...]) -> list[Tensor | None]:
        """The gradients that come back to some outputs of the case, in their dtypes; None for the 1 of a loss."""
        given = [grad for grad in (self.grad_z, self.grad_kl) if grad is not None]
        if not given:
            return [None] * len(outputs)
        return [grad.to(output.dtype) for grad, output in zip(given, outputs, strict=True)]

    def rows(self, start: int, end: int) -> Operands:
        """The operands of some samples of the batch."""
        batched = {
            name: tensor[start:end]
            for name, tensor in vars(self).items()
            if tensor is not None and name != "recon_logvar"
        }
        recon_logvar = self.recon_logvar
        if recon_logvar is not None and self.x is not None and recon_logvar.shape == self.x.shape:
            recon_logvar = recon_logvar[start:end]
        return replace(self, recon_logvar=recon_logvar, **batched)


def operands(case: Case, generator: torch.Generator) -> Operands:
    """Fresh random inputs of the sizes that trained models have: data in [0, 1], variances below 1."""
    device, shapes, formula = generator.device, case.shapes, case.formula
    dtype: torch.dtype = getattr(torch, case.dtype)

    def arranged(tensor: Tensor) -> Tensor:
        if case.memory_format == "channels_last" and tensor.dim() in (4, 5):
            form = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
            tensor = tensor.to(memory_format=form)
        return tensor

    def normal(shape: tuple[int, ...], mean: float = 0.0, deviation: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device)
        return arranged(values.mul_(deviation).add_(mean).to(dtype))

    def uniform(shape: tuple[int, ...]) -> Tensor:
        return arranged(torch.rand(shape, generator=generator, device=device).to(dtype))

    made = Operands()
    if case.uses_latent:
        if shapes.packed:
            halves = [normal(shapes.latent), normal(shapes.latent, -1.0, 0.5)]
            made.mu = arranged(torch.cat(halves, dim=1)).requires_grad_()
        else:
            made.mu = normal(shapes.latent).requires_grad_()
            made.logvar = normal(shapes.latent, -1.0, 0.5).requires_grad_()
    if formula is not None:
        assert shapes.x is not None
        made.x, made.recon_x = uniform(shapes.x), uniform(shapes.x).requires_grad_()
        if len(formula.inputs) > 2:
            scale = {"each": shapes.x, "feature": shapes.x[1:], "scalar": ()}[shapes.recon_logvar]
            made.recon_logvar = normal(scale, -2.0, 0.5).requires_grad_()
        if len(formula.inputs) > 3:
            made.extra = uniform((case.batch, *[1] * (len(shapes.x) - 1))).requires_grad_()
    if case.samples:
        made.grad_z = normal(shapes.latent)
    if case.operation == "latent":
        # Of the precision that losses are computed in.
        made.grad_kl = torch.rand(shapes.latent[:1], generator=generator, device=device)
    return made
