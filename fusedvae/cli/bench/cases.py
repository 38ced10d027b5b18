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

from ...backend.reference import FORMULAS, LIKELIHOODS, Form, Formula, Number

GAUSSIAN = "gaussian"
"""The likelihood that people write in several ways, and that is part of the ELBO here."""
KL = FORMULAS["kl_standard_normal"]
"""The divergence whose forms of a scale the latent's operations have."""
CLAMP = (-30.0, 20.0)
"""What diffusers and CompVis/latent-diffusion bound log-variances by."""
DEFAULTS: dict[str, float] = {"extra": 0.0, "pos_weight": 1.0}
"""Inputs of likelihoods that hardly anybody gives, and what they are then."""
COUNTS = ("poisson", "negative_binomial", "zero_inflated_negative_binomial")
"""The likelihoods of counts."""


class Operation(NamedTuple):
    """What is done, but for the shapes it is done on."""

    kind: Literal["reparameterize", "kl", "nll", "latent", "elbo", "step"]
    description: str
    likelihood: str | None = None
    """The likelihood that it is or has in it, by the registry's name."""
    scale: str | None = "logvar"
    """The form of the scale, by the registry's name; None where there is no scale."""
    clamp: tuple[float, float] | None = None
    prior: bool = False
    """Whether the divergence is that to another normal distribution, with a mean and a variance an element."""
    at_sample: bool = False
    """Whether it is that at the sample, log q(z) - log p(z)."""
    weighted: bool = False
    """Whether elements have weights: a mask, of the data's shape."""
    reduction: Literal["batchmean", "sum", "mean", "weighted_mean", "none"] = "batchmean"

    @property
    def form(self) -> str | None:
        """What the scale comes from, in one word: the name of the form, or that the usual one is clamped."""
        return self.scale if self.clamp is None else "clamp"

    @property
    def is_plain(self) -> bool:
        """Whether its scale has the form that it has without a word, if any."""
        found = self.formula
        return not found.scales or (self.scale == next(iter(found.forms)) and self.clamp is None)

    @property
    def forms(self) -> list[Form]:
        """Those of the scales of its likelihood, or of its posterior, as formulas take them."""
        found = self.formula
        low, high = (-math.inf, math.inf) if self.clamp is None else self.clamp
        return [found.forms[self.scale]._replace(low=low, high=high) for _ in found.scales] if self.scale else []

    @property
    def formula(self) -> Formula:
        """That of its likelihood, or of the divergence to the standard normal."""
        return KL if self.likelihood is None else LIKELIHOODS[self.likelihood]


_TITLES = {
    "bernoulli": "binary cross-entropy of logits",
    "bernoulli_probs": "binary cross-entropy of probabilities",
    "mse": "squared error",
    "l1": "absolute error",
    "negative_binomial": "negative binomial negative log-likelihood",
    "zero_inflated_negative_binomial": "zero-inflated negative binomial negative log-likelihood",
    "discretized_logistic": "negative log-likelihood of a logistic distribution in bins",
}
"""What to call likelihoods whose names say little."""


def _plain_form(formula: Formula) -> str | None:
    return next(iter(formula.forms)) if formula.scales else None


def _other_forms(formula: Formula) -> dict[str, tuple[str, tuple[float, float] | None]]:
    """The forms of a formula's scale but for the first, by what operations are called: their names, and bounds."""
    if not formula.scales:
        return {}
    first, *others = formula.forms
    found: dict[str, tuple[str, tuple[float, float] | None]] = {name: (name, None) for name in others}
    if first == "logvar":
        found["clamp"] = first, CLAMP
    return found


def _of_form(scale: str, clamp: tuple[float, float] | None) -> str:
    return f"scale={scale!r}" if clamp is None else f"clamp={clamp}"


def operations() -> dict[str, Operation]:
    """Every operation: those that everything has, then more of the same in other forms, to priors, with weights.

    What the registry has more of, likelihoods and forms, has its operations by itself.
    """
    kl, both = "KL of the posterior to the standard normal, mean over the batch", "sample and KL (a value per sample)"
    alone, formed = {}, {}
    for name, formula in LIKELIHOODS.items():
        operation = "nll" if name == GAUSSIAN else f"nll-{name.replace('_', '-')}"
        title = _TITLES.get(name, f"{name.capitalize()} negative log-likelihood")
        alone[operation] = Operation("nll", f"{title}, mean over the batch", name, _plain_form(formula))
        for form, (scale, clamp) in _other_forms(formula).items():
            description = f"{title}, {_of_form(scale, clamp)}"
            formed[f"nll-{name.replace('_', '-')}-{form}"] = Operation("nll", description, name, scale, clamp)
    for form, (scale, clamp) in _other_forms(KL).items():
        formed[f"kl-{form}"] = Operation("kl", f"{kl}, {_of_form(scale, clamp)}", None, scale, clamp)
    for form, (scale, clamp) in _other_forms(KL).items():
        formed[f"latent-{form}"] = Operation("latent", f"{both} together, {_of_form(scale, clamp)}", None, scale, clamp)
    to_priors = {
        "kl-prior": Operation("kl", "KL of the posterior to a learned prior, mean over the batch", prior=True),
        "latent-prior": Operation("latent", f"{both} together, to a learned prior", prior=True),
        "latent-sample": Operation("latent", "sample z and log q(z) - log p(z) (a value per sample)", at_sample=True),
        "latent-prior-sample": Operation(
            "latent", "sample z and log q(z) - log p(z), of a learned prior", prior=True, at_sample=True
        ),
    }
    reduced = {
        "nll-gaussian-weight": Operation(
            "nll", "Gaussian negative log-likelihood under a mask, mean over the batch", GAUSSIAN, weighted=True
        ),
        "nll-gaussian-mean": Operation(
            "nll", "Gaussian negative log-likelihood, mean over the elements", GAUSSIAN, reduction="mean"
        ),
        "nll-gaussian-sum": Operation(
            "nll", "Gaussian negative log-likelihood, sum over everything", GAUSSIAN, reduction="sum"
        ),
        "nll-gaussian-none": Operation(
            "nll", "Gaussian negative log-likelihood, a value per sample", GAUSSIAN, reduction="none"
        ),
        "nll-mse-mean": Operation("nll", "squared error, mean over the elements", "mse", None, reduction="mean"),
        "nll-l1-weighted-mean": Operation(
            "nll", "absolute error, mean over what a mask leaves", "l1", None, weighted=True, reduction="weighted_mean"
        ),
    }
    return {
        "reparameterize": Operation("reparameterize", "sample z = mu + exp(logvar / 2) * eps"),
        "kl": Operation("kl", kl),
        **alone,
        "latent": Operation("latent", f"{both} together"),
        "elbo": Operation("elbo", "negative ELBO of given decoder and encoder outputs, mean over the batch", GAUSSIAN),
        "step": Operation("step", "a whole training step: networks, sampling, loss, backward pass, fused Adam"),
        **formed,
        **to_priors,
        **reduced,
    }


SPECS = operations()
"""Every operation, by its name."""
OPERATIONS = {name: operation.description for name, operation in SPECS.items()}
"""What each is, for people."""
STANDARD = ("reparameterize", "kl", "nll", "nll-laplace", "latent", "elbo", "step")
"""Those that are measured where nothing is said: the others say little more about a machine, and take much longer."""


def groups() -> dict[str, list[str]]:
    """Names that stand for several operations."""
    return {
        "standard": list(STANDARD),
        "likelihoods": [
            name
            for name, o in SPECS.items()
            if o.kind == "nll" and o.is_plain and not o.weighted and o.reduction == "batchmean"
        ],
        "forms": [name for name, o in SPECS.items() if not o.is_plain],
        "priors": [name for name, o in SPECS.items() if o.prior or o.at_sample],
        "reductions": [name for name, o in SPECS.items() if o.weighted or o.reduction != "batchmean"],
        "all": list(SPECS),
    }


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

    def has(self, operation: Operation) -> bool:
        """Whether there are shapes for an operation."""
        if operation.kind == "step":
            return self.steps
        return self.x is not None or operation.likelihood is None


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
    def spec(self) -> Operation:
        return SPECS[self.operation]

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
        return self.spec.kind in ("reparameterize", "latent")

    @property
    def likelihood(self) -> str | None:
        """The likelihood that the operation is or has in it, by the registry's name."""
        return self.spec.likelihood

    @property
    def formula(self) -> Formula | None:
        """That of the likelihood."""
        return None if self.likelihood is None else LIKELIHOODS[self.likelihood]

    @property
    def uses_x(self) -> bool:
        return self.likelihood is not None

    @property
    def uses_latent(self) -> bool:
        return self.spec.kind != "nll"

    @property
    def elements(self) -> int:
        """Of the operation's largest operand (of x for a step)."""
        shape = self.shapes.x if self.uses_x or self.operation == "step" else self.shapes.latent
        assert shape is not None
        return math.prod(shape)

    @property
    def operand_count(self) -> int:
        """How many operands have so many elements, at most."""
        count = 0
        if self.uses_latent:
            count += 4 if self.spec.prior else 2
        if self.formula is not None:
            count += 2 + len(self.formula.pairs) + self.spec.weighted
        return count

    def traffic(self) -> int | None:
        """Bytes that a perfect implementation moves; None where that has no simple answer.

        Losses make their gradients in the forward pass: they read each operand once and write each gradient once.
        Samples read mu and logvar and write z; their backward pass reads what it needs again, and so does that of
        values per sample. What is fewer than the elements (a loss, a log-variance per feature) counts as nothing.
        """
        kind = self.spec.kind
        if kind == "step" or self.direction in ("forward", "backward"):
            return None
        m = math.prod(self.shapes.latent)
        n = math.prod(self.shapes.x or ())
        moments = 4 if self.spec.prior else 2
        # (read, written) by the values alone, then by everything.
        per_latent = {
            "reparameterize": ((2, 1), (4, 3)),
            "kl": ((moments, 0), (moments, moments)),
            "latent": ((moments, 1), (2 * moments + 1, moments + 1)),
            "elbo": ((2, 0), (2, 2)),
        }
        which = 0 if self.direction == "evaluate" else 1
        count = sum(per_latent[kind][which]) * m if self.uses_latent else 0
        if self.formula is not None:
            # recon_x and maybe the scale, which want gradients; x and maybe a weight.
            learned = 2 if self.formula.pairs and self.shapes.recon_logvar == "each" else 1
            read = learned + 1 + self.spec.weighted
            again = read if self.spec.reduction == "none" else 0
            count += (read, read + again + learned)[which] * n
        return count * DTYPES[self.dtype].itemsize

    def possible(self) -> bool:
        """Whether the preset has the operation, and the tensors such a memory format."""
        preset = PRESETS[self.preset]
        if not preset.has(self.spec):
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
    """Or what the operation's form has in its place; so with the other log-variances."""
    recon_x: Tensor | None = None
    x: Tensor | None = None
    recon_logvar: Tensor | None = None
    """Or the scale of another likelihood."""
    extra: Tensor | None = None
    """What a likelihood takes beside these, if it has no default: a value per sample."""
    prior_mu: Tensor | None = None
    """Of another prior than the standard normal: packed where the posterior is."""
    prior_logvar: Tensor | None = None
    weight: Tensor | None = None
    grad_z: Tensor | None = None
    grad_values: Tensor | None = None
    """Of values per sample: a divergence's, or a likelihood's."""

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gradients are wanted of."""
        names = ("mu", "logvar", "recon_x", "recon_logvar", "extra", "prior_mu", "prior_logvar")
        found = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in vars(self).values() if t is not None)

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        """What contestants take."""
        names = ("mu", "logvar", "recon_x", "x", "recon_logvar", "extra", "prior_mu", "prior_logvar", "weight")
        return tuple(getattr(self, name) for name in names)

    def gradients(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Of the leaves, by a backward pass."""
        return torch.autograd.grad(outputs, list(self.leaves.values()), self.grads_of(outputs))

    def grads_of(self, outputs: tuple[Tensor, ...]) -> list[Tensor | None]:
        """The gradients that come back to some outputs of the case, in their dtypes; None for the 1 of a loss."""
        given = [grad for grad in (self.grad_z, self.grad_values) if grad is not None]
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


def likelihood_inputs(
    formula: Formula, recon_x: Tensor, x: Tensor, scale: Tensor | None, extra: Tensor | None
) -> tuple[Number, ...]:
    """The inputs of a likelihood: the scale if it has one, and what else it takes."""
    first = (recon_x, x, scale) if formula.pairs else (recon_x, x)
    others = [DEFAULTS.get(name, extra) for name in formula.inputs[len(first) :]]
    return (*first, *others)


def in_form(logarithm: Tensor, form: Form) -> Tensor:
    """What a scale with this logarithm is in a form."""
    log_base = 0.5 * logarithm if form.squared else logarithm
    if form.map == "exponential":
        return log_base
    base = torch.exp(log_base)
    return torch.log(torch.expm1(base)) if form.map == "softplus" else base


def operands(case: Case, generator: torch.Generator) -> Operands:
    """Fresh random inputs of the sizes that trained models have: data in [0, 1] or their likelihood's range, variances
    below 1."""
    device, shapes, formula = generator.device, case.shapes, case.formula
    dtype: torch.dtype = getattr(torch, case.dtype)

    def arranged(tensor: Tensor) -> Tensor:
        if case.memory_format == "channels_last" and tensor.dim() in (4, 5):
            form = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
            tensor = tensor.to(memory_format=form)
        return tensor

    def normal(shape: tuple[int, ...], mean: float = 0.0, deviation: float = 1.0, form: Form | None = None) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device).mul_(deviation).add_(mean)
        return arranged((values if form is None else in_form(values, form)).to(dtype))

    def uniform(shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Tensor:
        values = torch.rand(shape, generator=generator, device=device).mul_(high - low).add_(low)
        return arranged(values.to(dtype))

    def moments(mean: float = -1.0) -> tuple[Tensor, Tensor | None]:
        """Of normal distributions, packed or not, with log-variances around ``mean``."""
        form = case.spec.forms[0]
        halves = normal(shapes.latent), normal(shapes.latent, mean, 0.5, form)
        if shapes.packed:
            return arranged(torch.cat(halves, dim=1)).requires_grad_(), None
        return halves[0].requires_grad_(), halves[1].requires_grad_()

    made = Operands()
    if case.uses_latent:
        made.mu, made.logvar = moments()
    if case.spec.prior:
        made.prior_mu, made.prior_logvar = moments(-0.5)
    if formula is not None:
        assert shapes.x is not None
        made.x = uniform(shapes.x)
        if case.likelihood in COUNTS:  # half of them zeros
            made.x = arranged(torch.relu(made.x.float() * 12 - 6).round().to(dtype))
        if case.likelihood == "discretized_logistic":  # pixels: between bins, rounding decides which is open
            made.x = arranged((made.x.float().mul_(255).round_() / 127.5 - 1).to(dtype))
        if case.likelihood == "bernoulli":
            made.recon_x = normal(shapes.x, 0.0, 2.0)
        elif case.likelihood == "bernoulli_probs":  # in no dtype rounded to 0 or 1
            made.recon_x = uniform(shapes.x, 0.01, 0.99)
        elif case.likelihood == "poisson":
            made.recon_x = normal(shapes.x, 0.0, 1.0, case.spec.forms[0])
        elif case.likelihood in COUNTS:
            made.recon_x = uniform(shapes.x, 0.1, 4.0)
        elif case.likelihood == "discretized_logistic":
            made.recon_x = uniform(shapes.x, -1.0, 1.0)
        else:
            made.recon_x = uniform(shapes.x)
        made.recon_x.requires_grad_()
        if formula.pairs:
            scale = {"each": shapes.x, "feature": shapes.x[1:], "scalar": ()}[shapes.recon_logvar]
            made.recon_logvar = normal(scale, -2.0, 0.5, case.spec.forms[0]).requires_grad_()
        if len(formula.inputs) > 2 + len(formula.pairs) + sum(name in DEFAULTS for name in formula.inputs):
            made.extra = uniform((case.batch, *[1] * (len(shapes.x) - 1))).requires_grad_()
        if case.spec.weighted:
            made.weight = arranged((torch.rand(shapes.x, generator=generator, device=device) < 0.8).to(dtype))
    if case.samples:
        made.grad_z = normal(shapes.latent)
    if case.spec.kind == "latent" or case.spec.reduction == "none":
        # Of the precision that losses are computed in.
        made.grad_values = torch.rand(shapes.latent[:1], generator=generator, device=device)
    return made
