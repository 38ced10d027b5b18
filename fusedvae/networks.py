"""Ready encoders and decoders for `fusedvae.VAE`: `mlp` for vectors and tiny images,
`conv` for images from 8x8 to 64x64 and somewhat beyond.

    shape, latent_dim = (1, 28, 28), 16
    vae = fusedvae.VAE(*fusedvae.networks.conv(shape, latent_dim), latent_dim)

Encoders map ``(batch, *shape)`` to the packed posterior ``(batch, 2 * latent_dim)``: means, then
log-variances. Decoders map ``(batch, latent_dim)`` to the pair (mean, logvar), each ``(batch, *shape)``, or
with ``mean_only=True`` to the mean alone, for a VAE whose ``recon_logvar`` says the rest. What a network was made
with is in its ``arguments``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "ConvDecoder",
    "ConvEncoder",
    "LabelledDecoder",
    "LabelledEncoder",
    "MLPDecoder",
    "MLPEncoder",
    "conv",
    "mlp",
]

LOGVAR_FLOOR = -4.0
"""Default lower bound of a decoder's log-variance: a standard deviation of 0.14 for data in [0, 1].

An element that is the same in every sample (the border of most pictures of digits) has a likelihood without
an upper bound: its log-variance would go to minus infinity and take the gradients with it. A lower floor than
this gives a better bound, and latents that spend themselves on fine grain: samples of the prior look
worse."""


class _Heads(nn.Module):
    """The last layer of a decoder: a mean and, unless ``mean_only``, a log-variance above ``logvar_floor``.

    Two layers rather than one of twice the width: the outputs then are tensors of their own, and their
    gradients need not be put together again.
    """

    def __init__(self, mean: nn.Module, logvar: nn.Module | None, logvar_floor: float) -> None:
        super().__init__()
        self.mean, self.logvar, self.logvar_floor = mean, logvar, logvar_floor

    def forward(self, h: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        mean = self.mean(h)
        if self.logvar is None:
            return mean
        # A smooth floor: unlike clamp's, its gradient never vanishes for good.
        return mean, self.logvar_floor + nn.functional.softplus(self.logvar(h) - self.logvar_floor)


def _checked_sizes(name: str, sizes: Sequence[int], *, at_least: int = 0) -> tuple[int, ...]:
    """``sizes`` as a tuple of positive integers, ``at_least`` so many of them."""
    if isinstance(sizes, str) or not isinstance(sizes, Sequence):
        raise TypeError(f"{name}: expected a sequence of integers, got {sizes!r}")
    if any(isinstance(size, bool) or not isinstance(size, Integral) for size in sizes):
        raise TypeError(f"{name}: expected a sequence of integers, got {sizes!r}")
    if len(sizes) < at_least or any(size < 1 for size in sizes):
        raise ValueError(f"{name}: expected positive integers, at least {at_least} of them, got {tuple(sizes)}")
    return tuple(map(int, sizes))


def _checked_size(name: str, size: int) -> int:
    if isinstance(size, bool) or not isinstance(size, Integral):
        raise TypeError(f"{name}: expected an integer, got {size!r}")
    if size < 1:
        raise ValueError(f"{name}: expected at least 1, got {size}")
    return int(size)


def _checked_number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return float(value)


def _check_input(module: nn.Module, name: str, given: Tensor, sizes: tuple[int, ...]) -> None:
    if tuple(given.shape[1:]) != sizes:
        expected = ", ".join(("batch", *map(str, sizes)))
        raise ValueError(f"{name}: expected shape ({expected}) by {type(module).__name__}, got {tuple(given.shape)}")
    if not given.is_floating_point():
        raise TypeError(f"{name}: expected floating point by {type(module).__name__}, got {given.dtype}")


def _of_labels(module: nn.Module, table: nn.Embedding, labels: Tensor, batch: int) -> Tensor:
    """What a module knows of each label, ``(batch, width)``."""
    by = f"by {type(module).__name__}"
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a tensor {by}, got {type(labels).__name__}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels: expected int64 or int32 {by}, got {labels.dtype}")
    if tuple(labels.shape) != (batch,):
        raise ValueError(f"labels: expected shape ({batch},) {by}, got {tuple(labels.shape)}")
    if torch.compiler.is_compiling():
        return table(labels)
    try:
        return table(labels)
    except IndexError as error:
        low, high = labels.min().item(), labels.max().item()
        raise ValueError(
            f"labels: expected from 0 to {table.num_embeddings - 1} {by}, got from {low} to {high}"
        ) from error


def _dense_stack(sizes: Sequence[int]) -> list[nn.Module]:
    return [layer for n, m in pairwise(sizes) for layer in (nn.Linear(n, m), nn.SiLU())]


class MLPEncoder(nn.Module):
    """Fully connected encoder.

    Args:
        shape: sizes of one sample, without the batch: ``(784,)``, ``(1, 28, 28)``, ...
        latent_dim: number of latent variables.
        hidden: widths of the hidden layers, from the input to the output.

    Shapes: ``(batch, *shape)`` to ``(batch, 2 * latent_dim)``.
    """

    def __init__(self, shape: Sequence[int], latent_dim: int, *, hidden: Sequence[int] = (512, 256)) -> None:
        super().__init__()
        self.shape = _checked_sizes("shape", shape, at_least=1)
        latent_dim = _checked_size("latent_dim", latent_dim)
        hidden = _checked_sizes("hidden", hidden)
        self.arguments = {"shape": self.shape, "latent_dim": latent_dim, "hidden": hidden}
        widths = (math.prod(self.shape), *hidden)
        self.layers = nn.Sequential(*_dense_stack(widths), nn.Linear(widths[-1], 2 * latent_dim))

    def forward(self, x: Tensor) -> Tensor:
        _check_input(self, "x", x, self.shape)
        return self.layers(x.flatten(1))


class MLPDecoder(nn.Module):
    """Fully connected decoder.

    Args:
        latent_dim: number of latent variables.
        shape: sizes of one sample, without the batch.
        hidden: widths of the hidden layers, from the input to the output.
        mean_only: leave the log-variance to the VAE.
        logvar_floor: the log-variance is ``floor + softplus(output - floor)``, never below it.

    Shapes: ``(batch, latent_dim)`` to a pair of ``(batch, *shape)``, or one such tensor if ``mean_only``.
    """

    def __init__(
        self,
        latent_dim: int,
        shape: Sequence[int],
        *,
        hidden: Sequence[int] = (256, 512),
        mean_only: bool = False,
        logvar_floor: float = LOGVAR_FLOOR,
    ) -> None:
        super().__init__()
        self.latent_dim = _checked_size("latent_dim", latent_dim)
        shape = _checked_sizes("shape", shape, at_least=1)
        hidden = _checked_sizes("hidden", hidden)
        logvar_floor = _checked_number("logvar_floor", logvar_floor)
        self.arguments = {
            "latent_dim": self.latent_dim,
            "shape": shape,
            "hidden": hidden,
            "mean_only": bool(mean_only),
            "logvar_floor": logvar_floor,
        }
        widths = (self.latent_dim, *hidden)
        self.layers = nn.Sequential(*_dense_stack(widths))

        def head() -> nn.Module:
            return nn.Sequential(nn.Linear(widths[-1], math.prod(shape)), nn.Unflatten(1, shape))

        self.heads = _Heads(head(), None if mean_only else head(), logvar_floor)

    def forward(self, z: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        _check_input(self, "z", z, (self.latent_dim,))
        return self.heads(self.layers(z))


def mlp(
    shape: Sequence[int],
    latent_dim: int,
    *,
    hidden: Sequence[int] = (512, 256),
    mean_only: bool = False,
    logvar_floor: float = LOGVAR_FLOOR,
    classes: int | None = None,
) -> tuple[nn.Module, nn.Module]:
    """A matching `MLPEncoder` and `MLPDecoder`; ``hidden`` is the encoder's, the decoder
    mirrors it. With ``classes``, so many, a labelled pair that takes labels as its condition."""
    hidden = _checked_sizes("hidden", hidden)
    of_decoder: dict[str, Any] = {"mean_only": mean_only, "logvar_floor": logvar_floor, "hidden": hidden[::-1]}
    if classes is not None:
        encoder = LabelledEncoder("mlp", shape, latent_dim, classes, hidden=hidden)
        return encoder, LabelledDecoder("mlp", latent_dim, shape, classes, **of_decoder)
    return MLPEncoder(shape, latent_dim, hidden=hidden), MLPDecoder(latent_dim, shape, **of_decoder)


def _norm(channels: int) -> nn.Module:
    """Group normalisation: unlike batch normalisation it does not tie a sample's bound to its batch."""
    return nn.GroupNorm(math.gcd(channels, 8), channels)


class _Residual(nn.Module):
    """Pre-activation residual block (He et al. 2016): two 3x3 convolutions around a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            _norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, h: Tensor) -> Tensor:
        return h + self.layers(h)


class _Pyramid:
    """The resolutions and widths of a convolutional network over images of ``shape``.

    Each level halves the resolution (rounding up, so that any size works) and doubles the width, until the
    longer side is 4 or less.
    """

    def __init__(self, shape: Sequence[int], width: int) -> None:
        self.shape = _checked_sizes("shape", shape, at_least=3)
        if len(self.shape) != 3:
            raise ValueError(f"shape: expected (channels, height, width), got {self.shape}")
        self.channels, *size = self.shape
        self.sizes = [tuple(size)]
        while max(self.sizes[-1]) > 4:
            self.sizes.append(tuple((side + 1) // 2 for side in self.sizes[-1]))
        self.width = width = _checked_size("width", width)
        self.widths = [min(width * 2**level, 8 * width) for level in range(len(self.sizes))]
        self.bottom = (self.widths[-1], *self.sizes[-1])


class ConvEncoder(nn.Module):
    """Convolutional encoder: residual blocks, halving the resolution between them down to 4x4 or less.

    Args:
        shape: ``(channels, height, width)`` of the images; any height and width.
        latent_dim: number of latent variables.
        width: channels at full resolution; they double with each halving, up to 8 times.

    Shapes: ``(batch, channels, height, width)`` to ``(batch, 2 * latent_dim)``.
    """

    def __init__(self, shape: Sequence[int], latent_dim: int, *, width: int = 32) -> None:
        super().__init__()
        pyramid = _Pyramid(shape, width)
        self.shape = pyramid.shape
        latent_dim = _checked_size("latent_dim", latent_dim)
        self.arguments = {"shape": self.shape, "latent_dim": latent_dim, "width": pyramid.width}
        layers: list[nn.Module] = [nn.Conv2d(pyramid.channels, pyramid.width, 3, padding=1)]
        for narrow, wide in pairwise(pyramid.widths):
            layers += [_Residual(narrow), nn.Conv2d(narrow, wide, 3, stride=2, padding=1)]
        layers += [_Residual(pyramid.widths[-1]), _norm(pyramid.widths[-1]), nn.SiLU(), nn.Flatten()]
        layers += [nn.Linear(math.prod(pyramid.bottom), 2 * latent_dim)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        _check_input(self, "x", x, self.shape)
        return self.layers(x)


class ConvDecoder(nn.Module):
    """Convolutional decoder: the mirror image of `ConvEncoder`.

    Resolution grows by nearest-neighbour upsampling before a convolution, which leaves none of the
    checkerboards of transposed convolutions (Odena et al. 2016).

    Args:
        latent_dim: number of latent variables.
        shape: ``(channels, height, width)`` of the images; any height and width.
        width: channels at full resolution; they double with each halving, up to 8 times.
        mean_only: leave the log-variance to the VAE.
        logvar_floor: the log-variance is ``floor + softplus(output - floor)``, never below it.

    Shapes: ``(batch, latent_dim)`` to a pair of ``(batch, channels, height, width)``, or one if
    ``mean_only``.
    """

    def __init__(
        self,
        latent_dim: int,
        shape: Sequence[int],
        *,
        width: int = 32,
        mean_only: bool = False,
        logvar_floor: float = LOGVAR_FLOOR,
    ) -> None:
        super().__init__()
        self.latent_dim = _checked_size("latent_dim", latent_dim)
        pyramid = _Pyramid(shape, width)
        logvar_floor = _checked_number("logvar_floor", logvar_floor)
        self.arguments = {
            "latent_dim": self.latent_dim,
            "shape": pyramid.shape,
            "width": pyramid.width,
            "mean_only": bool(mean_only),
            "logvar_floor": logvar_floor,
        }
        layers: list[nn.Module] = [
            nn.Linear(self.latent_dim, math.prod(pyramid.bottom)),
            nn.Unflatten(1, pyramid.bottom),
            _Residual(pyramid.widths[-1]),
        ]
        for level in reversed(range(len(pyramid.sizes) - 1)):
            narrow, wide = pyramid.widths[level], pyramid.widths[level + 1]
            layers += [
                nn.Upsample(size=pyramid.sizes[level], mode="nearest"),
                nn.Conv2d(wide, narrow, 3, padding=1),
                _Residual(narrow),
            ]
        self.layers = nn.Sequential(*layers, _norm(pyramid.width), nn.SiLU())

        def head() -> nn.Module:
            return nn.Conv2d(pyramid.width, pyramid.channels, 3, padding=1)

        self.heads = _Heads(head(), None if mean_only else head(), logvar_floor)

    def forward(self, z: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        _check_input(self, "z", z, (self.latent_dim,))
        return self.heads(self.layers(z))


class LabelledEncoder(nn.Module):
    """An encoder that is told a class: the class's own plane lies beside the channels of an image, and a few values of
    its own beside those of a vector (Sohn, Lee & Yan 2015).

    Args:
        network: "conv" or "mlp", the encoder that then comes.
        shape: sizes of one sample, ``(channels, height, width)`` or ``(features,)``.
        latent_dim: number of latent variables.
        classes: how many there are.
        options: the network's.

    Shapes: ``(batch, *shape)`` and labels ``(batch,)``, integers from 0, to ``(batch, 2 * latent_dim)``.
    """

    def __init__(self, network: str, shape: Sequence[int], latent_dim: int, classes: int, **options: Any) -> None:
        super().__init__()
        self.shape = _checked_sizes("shape", shape, at_least=1)
        latent_dim, classes = _checked_size("latent_dim", latent_dim), _checked_size("classes", classes)
        self.beside = (1, *self.shape[1:]) if len(self.shape) > 1 else (_WIDTH_OF_LABELS,)
        self.labels = nn.Embedding(classes, math.prod(self.beside))
        seen = (self.shape[0] + self.beside[0], *self.shape[1:])
        self.network = _NETWORKS[_checked_network(network)][0](seen, latent_dim, **options)
        self.arguments = {
            "network": network,
            "shape": self.shape,
            "latent_dim": latent_dim,
            "classes": classes,
            **_as_checked(self.network, options),
        }

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        _check_input(self, "x", x, self.shape)
        beside = _of_labels(self, self.labels, labels, x.shape[0]).unflatten(1, self.beside)
        return self.network(torch.cat([x, beside.to(x.dtype)], dim=1))


class LabelledDecoder(nn.Module):
    """A decoder that is told a class, by a few values beside the latent variables.

    Args:
        network: "conv" or "mlp", the decoder that then comes.
        latent_dim, shape, classes, options: as for `LabelledEncoder`.

    Shapes: ``(batch, latent_dim)`` and labels ``(batch,)`` to what the network gives.
    """

    def __init__(self, network: str, latent_dim: int, shape: Sequence[int], classes: int, **options: Any) -> None:
        super().__init__()
        self.latent_dim = _checked_size("latent_dim", latent_dim)
        shape, classes = _checked_sizes("shape", shape, at_least=1), _checked_size("classes", classes)
        self.labels = nn.Embedding(classes, _WIDTH_OF_LABELS)
        self.network = _NETWORKS[_checked_network(network)][1](self.latent_dim + _WIDTH_OF_LABELS, shape, **options)
        self.arguments = {
            "network": network,
            "latent_dim": self.latent_dim,
            "shape": shape,
            "classes": classes,
            **_as_checked(self.network, options),
        }

    def forward(self, z: Tensor, labels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        _check_input(self, "z", z, (self.latent_dim,))
        return self.network(torch.cat([z, _of_labels(self, self.labels, labels, z.shape[0]).to(z.dtype)], dim=1))


_WIDTH_OF_LABELS = 8
"""How many values a class has of its own beside those of a vector."""

_NETWORKS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "mlp": (MLPEncoder, MLPDecoder),
    "conv": (ConvEncoder, ConvDecoder),
}


def _checked_network(network: str) -> str:
    if network not in _NETWORKS:
        raise ValueError(f"network: expected one of {', '.join(map(repr, _NETWORKS))}, got {network!r}")
    return network


def _as_checked(network: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """The options that a network was made with, as it keeps them."""
    arguments: Any = network.arguments
    return {name: arguments[name] for name in options}


def conv(
    shape: Sequence[int],
    latent_dim: int,
    *,
    width: int = 32,
    mean_only: bool = False,
    logvar_floor: float = LOGVAR_FLOOR,
    classes: int | None = None,
) -> tuple[nn.Module, nn.Module]:
    """A matching `ConvEncoder` and `ConvDecoder`. With ``classes``, so many, a labelled pair that takes
    labels as its condition."""
    of_decoder: dict[str, Any] = {"width": width, "mean_only": mean_only, "logvar_floor": logvar_floor}
    if classes is not None:
        encoder = LabelledEncoder("conv", shape, latent_dim, classes, width=width)
        return encoder, LabelledDecoder("conv", latent_dim, shape, classes, **of_decoder)
    return ConvEncoder(shape, latent_dim, width=width), ConvDecoder(latent_dim, shape, **of_decoder)
