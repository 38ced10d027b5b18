"""The variational autoencoder as a module: any encoder, any decoder, and the fused kernels between them.

    vae = fusedvae.VAE(encoder, decoder, latent_dim=16)
    vae.loss(x).backward()          # the negative evidence lower bound (ELBO)
    images = vae.generate(64)

Source of the model and its bound: Kingma & Welling 2014, "Auto-Encoding Variational Bayes", appendix B.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, distributed, nn

from . import functional
from .functional import ELBOTerms
from .torch_private import register_outputs

__all__ = ["VAE", "DiagonalGaussian", "VAEOutput"]


class DiagonalGaussian(NamedTuple):
    """A batch of normal distributions N(mu, diag e^logvar); unpacks as the pair (mu, logvar)."""

    mu: Tensor
    """Means, ``(batch, *)``."""
    logvar: Tensor
    """Log-variances, of ``mu``'s shape or broadcasting to it."""

    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``mu + e^(logvar/2) * eps``, differentiable in ``mu`` and ``logvar``."""
        return functional.reparameterize(self.mu, self.logvar.expand_as(self.mu), generator=generator)


class VAEOutput(NamedTuple):
    """All that one pass through a :class:`VAE` computes."""

    recon_x: Tensor
    """Mean of the reconstruction p(x|z), of the shape of x."""
    recon_logvar: Tensor
    """Its log-variance, of x's shape or broadcasting to it."""
    mu: Tensor
    """Mean of the posterior q(z|x), ``(batch, *latent)``."""
    logvar: Tensor
    """Its log-variance, ``(batch, *latent)``."""
    z: Tensor
    """A sample of the posterior, ``(batch, *latent)``."""
    kl: Tensor
    """KL(q(z|x) ‖ N(0, I)) of each sample, ``(batch,)``."""

    def loss(
        self,
        x: Tensor,
        *,
        beta: float | Tensor = 1.0,
        reduction: str = "batchmean",
        full: bool = False,
        return_terms: bool = False,
    ) -> Tensor | ELBOTerms:
        """The negative ELBO of ``x`` that this pass is of; arguments as :meth:`VAE.loss` takes them.

        Under a wrapper that synchronises gradients, this is how a loss is to be computed: ``wrapped(x).loss(x)``.
        """
        return functional.elbo_loss(
            self.recon_x,
            x,
            None,
            None,
            self.recon_logvar,
            kl=self.kl,
            beta=beta,
            reduction=reduction,
            full=full,
            return_terms=return_terms,
        )


# What an encoder or decoder gave, in the form the functional interface takes: a mean and a log-variance, or
# both packed along dimension 1 and None. Packed tensors stay whole on their way to the kernels: reading
# halves in place is free, but gradients of two halves would have to be put together again.
_Parameters = tuple[Tensor, Tensor | float | None]


class VAE(nn.Module):
    """A variational autoencoder with a Gaussian posterior, a Gaussian likelihood and the prior N(0, I).

    Args:
        encoder: a module from x to the posterior q(z|x): one packed tensor ``(batch, 2 * C, *)``, the means
            and then the log-variances along dimension 1, or a pair (mu, logvar) of ``(batch, C, *)`` each.
        decoder: a module from z to the likelihood p(x|z). What it gives is said by ``recon_logvar``.
        latent_dim: number of latent variables ``C``, or the sizes ``(C, height, width)`` of a spatial latent.
            A size may be None for an encoder that takes images of any size; :meth:`generate` then cannot know
            it.
        recon_logvar: where the log-variance of p(x|z) comes from.

            * ``None`` (default): the decoder gives it, in a packed tensor ``(batch, 2 * channels, *)`` or as
              the second of a pair (mean, logvar), which may be anything that broadcasts to the mean.
            * anything else: the decoder gives the mean only, a tensor of x's shape, and the log-variance is
              a float (fixed), a tensor (fixed, kept in the state_dict), an ``nn.Parameter`` (learned; give it
              shape ``(channels, 1, 1)`` for one value a channel), or ``"learned"`` (one learned number, of shape
              ``(1,)``, at first 0).

    It is this argument, never the shape of a tensor, that tells a packed output from a mean: the two look
    alike where no x is at hand to compare with. :meth:`loss` and :meth:`forward` do have x, and say so when
    the decoder's output does not fit it.

    The state_dict holds the encoder's and the decoder's entries and, if it is a tensor, ``recon_logvar``: the
    same under every backend. Modules keep their mode: call ``eval()`` and use ``torch.no_grad()`` as with any
    other.

    Raises:
        TypeError: an argument, or what the encoder or decoder returned, is not of the kinds listed above.
        ValueError: sizes do not fit: those of ``latent_dim``, of the posterior, or of the reconstruction.
    """

    recon_logvar: Tensor | float | None

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int | Sequence[int | None],
        *,
        recon_logvar: float | Tensor | Literal["learned"] | None = None,
    ) -> None:
        super().__init__()
        for name, module in (("encoder", encoder), ("decoder", decoder)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name}: expected a torch.nn.Module, got {type(module).__name__}")
        self.encoder = encoder
        self.decoder = decoder
        self.latent_shape = _latent_shape(latent_dim)
        if isinstance(recon_logvar, str):
            if recon_logvar != "learned":
                raise ValueError(f"recon_logvar: expected None, a number, a tensor or 'learned', got {recon_logvar!r}")
            recon_logvar = nn.Parameter(torch.zeros(1))  # FSDP takes no 0-dim parameters
            self.register_load_state_dict_pre_hook(_with_a_dimension)
        if isinstance(recon_logvar, nn.Parameter):
            self.recon_logvar = recon_logvar
        elif isinstance(recon_logvar, Tensor):
            self.register_buffer("recon_logvar", recon_logvar)
        elif recon_logvar is None or (isinstance(recon_logvar, Real) and not isinstance(recon_logvar, bool)):
            self.recon_logvar = recon_logvar if recon_logvar is None else float(recon_logvar)
        else:
            raise TypeError(
                f"recon_logvar: expected None, a number, a tensor or 'learned', got {type(recon_logvar).__name__}"
            )

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """The posterior q(z|x) of ``x``: a pair (mu, logvar), each ``(batch, *latent)``."""
        return _unpacked(self._posterior(x))

    def decode(self, z: Tensor) -> DiagonalGaussian:
        """The likelihood p(x|z) of ``z``, ``(batch, *latent)``: a pair (mean, logvar).

        The mean has the shape of x; the log-variance has it too, or broadcasts to it.
        """
        return _unpacked(self._likelihood(z))

    def forward(self, x: Tensor, *, generator: torch.Generator | None = None) -> VAEOutput:
        """Encode ``x``, sample the posterior, decode the sample.

        To train under a wrapper that must see every call (DistributedDataParallel, FSDP, accelerate's), call the
        wrapper and its output: ``wrapped(x).loss(x)``. Elsewhere :meth:`loss` is the same in one call.
        """
        posterior = self._posterior(x)
        latent = functional.latent(*posterior, generator=generator)
        recon_x, recon_logvar = _unpacked(self._likelihood(latent.z, of=x))
        if isinstance(recon_logvar, nn.Parameter):
            # A function of the parameter: wrappers find out from outputs what was used, and may take it away then.
            recon_logvar = recon_logvar.clone()
        mu, logvar = _unpacked(posterior)
        return VAEOutput(recon_x, recon_logvar, mu, logvar, latent.z, latent.kl)

    @overload
    def loss(
        self,
        x: Tensor,
        *,
        beta: float | Tensor = ...,
        reduction: str = ...,
        full: bool = ...,
        return_terms: Literal[False] = ...,
        generator: torch.Generator | None = ...,
    ) -> Tensor: ...

    @overload
    def loss(
        self,
        x: Tensor,
        *,
        beta: float | Tensor = ...,
        reduction: str = ...,
        full: bool = ...,
        return_terms: Literal[True],
        generator: torch.Generator | None = ...,
    ) -> ELBOTerms: ...

    def loss(
        self,
        x: Tensor,
        *,
        beta: float | Tensor = 1.0,
        reduction: str = "batchmean",
        full: bool = False,
        return_terms: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor | ELBOTerms:
        """The negative ELBO of ``x`` with one sample of the posterior: NLL + beta * KL.

        Args:
            x: data, ``(batch, *)``.
            beta: weight of the KL term, a float or a 0-dim tensor (Higgins et al. 2017).
            reduction: "batchmean" (mean over the batch), "sum", or "none" (one value per sample). Within a
                sample both terms are sums.
            full: add the NLL's constant, log(2 pi) / 2 per element of x: nats of a normalised density.
            return_terms: return ``ELBOTerms(loss, nll, kl)``, reduced alike, instead of the loss.
            generator: where the noise comes from; torch's default generator if None.

        Where several processes train together, it warns once: it goes past a wrapper around the module, which then
        synchronises no gradients. Call the wrapper, ``wrapped(x).loss(x)``, instead.
        """
        _warn_if_unsynchronised()
        latent = functional.latent(*self._posterior(x), generator=generator)
        recon_x, recon_logvar = self._likelihood(latent.z, of=x)
        return functional.elbo_loss(
            recon_x,
            x,
            None,
            None,
            recon_logvar,
            kl=latent.kl,
            beta=beta,
            full=full,
            reduction=reduction,
            return_terms=return_terms,
        )

    def reconstruct(self, x: Tensor, *, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """What the model makes of ``x``; a tensor of its shape.

        By default the decoder's mean at the posterior's mean; with ``sample`` a draw from p(x|z) with z drawn
        from q(z|x).
        """
        posterior = self.encode(x)
        z = posterior.sample(generator=generator) if sample else posterior.mu
        return self._image(_unpacked(self._likelihood(z, of=x)), sample, generator)

    def generate(self, n: int, *, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Decode ``n`` draws from the prior N(0, I); a tensor ``(n, *)``.

        Each is the decoder's mean, as usually shown, or with ``sample`` a draw from p(x|z). The generator
        must be on the model's device.
        """
        if isinstance(n, bool) or not isinstance(n, Integral):
            raise TypeError(f"n: expected an integer, got {type(n).__name__}")
        if n < 1:
            raise ValueError(f"n: expected at least 1, got {n}")
        sizes = [size for size in self.latent_shape if size is not None]
        if len(sizes) < len(self.latent_shape):
            raise ValueError(
                f"latent_dim: generate needs every size, got {_shown(self.latent_shape)}; call "
                "decode(torch.randn(...)) with the sizes wanted"
            )
        like = next(self.decoder.parameters(), torch.empty(()))
        z = torch.randn((n, *sizes), generator=generator, dtype=like.dtype, device=like.device)
        return self._image(self.decode(z), sample, generator)

    def embed(self, x: Tensor) -> Tensor:
        """Features of ``x`` for other uses: the posterior means, ``(batch, number of latent variables)``."""
        return self.encode(x).mu.flatten(1)

    def extra_repr(self) -> str:
        latent_dim = self.latent_shape[0] if len(self.latent_shape) == 1 else self.latent_shape
        fixed = "" if isinstance(self.recon_logvar, Tensor) else f", recon_logvar={self.recon_logvar}"
        return f"latent_dim={latent_dim}{fixed}"

    @staticmethod
    def _image(p: DiagonalGaussian, sample: bool, generator: torch.Generator | None) -> Tensor:
        return p.sample(generator=generator) if sample else p.mu

    def _posterior(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the encoder and check what it gives against ``latent_dim``."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        if x.ndim == 0:
            raise ValueError("x: expected a batch dimension, got a 0-dim tensor")
        mu, logvar = _mean_and_logvar("encoder", self.encoder(x))
        if logvar is None:
            channels, *rest = self.latent_shape
            expected = (x.shape[0], None if channels is None else 2 * channels, *rest)
            if not _fits(mu.shape, expected):
                raise ValueError(
                    f"encoder: expected a packed posterior of shape {_shown(expected)}, means and "
                    f"log-variances along dimension 1 for latent_dim {_shown(self.latent_shape)}; "
                    f"got {tuple(mu.shape)}"
                )
        else:
            expected = (x.shape[0], *self.latent_shape)
            for name, tensor in (("mu", mu), ("logvar", logvar)):
                if not _fits(tensor.shape, expected):
                    raise ValueError(
                        f"encoder: expected {name} of shape {_shown(expected)}, the batch and latent_dim; "
                        f"got {tuple(tensor.shape)}"
                    )
        return mu, logvar

    def _likelihood(self, z: Tensor, *, of: Tensor | None = None) -> _Parameters:
        """Run the decoder and check what it gives against ``recon_logvar`` and, if there is one, the data."""
        mean, logvar = _mean_and_logvar("decoder", self.decoder(z))
        packed = logvar is None and self.recon_logvar is None
        if logvar is not None and self.recon_logvar is not None:
            raise TypeError("decoder: expected the mean only, as recon_logvar is given; got a pair (mean, logvar)")
        if mean.ndim < 2 or mean.shape[0] != z.shape[0]:
            raise ValueError(
                f"decoder: expected a tensor of shape (batch, channels, ...) for a batch of {z.shape[0]}, "
                f"got {tuple(mean.shape)}"
            )
        if packed and mean.shape[1] % 2:
            raise ValueError(
                "decoder: expected a mean and a log-variance packed along dimension 1, an even size, "
                f"got {tuple(mean.shape)}; if it gives the mean only, pass recon_logvar to the VAE"
            )
        if of is not None:
            expected = (of.shape[0], 2 * of.shape[1], *of.shape[2:]) if packed else tuple(of.shape)
            if tuple(mean.shape) != expected:
                what, otherwise = (
                    ("packed mean and log-variance", "the mean only, pass recon_logvar to the VAE")
                    if packed
                    else ("mean", "the log-variance too, leave recon_logvar None")
                )
                raise ValueError(
                    f"decoder: expected a {what} of shape {expected} for x of shape {tuple(of.shape)}, "
                    f"got {tuple(mean.shape)}; if it gives {otherwise}"
                )
        return mean, (None if packed else self.recon_logvar if logvar is None else logvar)


_has_warned = False


def _warn_if_unsynchronised() -> None:
    """Say once that :meth:`VAE.loss` is no call of a wrapper."""
    global _has_warned
    if _has_warned or not (distributed.is_available() and distributed.is_initialized()):
        return
    if distributed.get_world_size() > 1:
        _has_warned = True
        warnings.warn(
            "VAE.loss was called in a group of processes. It goes past DistributedDataParallel and the like, which do "
            "not synchronise its gradients then: call the wrapped module, wrapped(x).loss(x).",
            stacklevel=3,
        )


def _with_a_dimension(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
    """Take the learned log-variance of an earlier version, which was 0-dim."""
    learned = state_dict.get(f"{prefix}recon_logvar")
    if isinstance(learned, Tensor) and learned.dim() == 0:
        state_dict[f"{prefix}recon_logvar"] = learned.view(1)


def _latent_shape(latent_dim: int | Sequence[int | None]) -> tuple[int | None, ...]:
    """Sizes of one sample's latent."""
    sizes = (latent_dim,) if isinstance(latent_dim, Integral) else latent_dim
    if isinstance(sizes, (str, bytes)) or not isinstance(sizes, Sequence) or isinstance(latent_dim, bool):
        raise TypeError(f"latent_dim: expected an integer or a sequence of them, got {type(latent_dim).__name__}")
    for size in sizes:
        if size is not None and (isinstance(size, bool) or not isinstance(size, Integral)):
            raise TypeError(f"latent_dim: expected an integer or a sequence of them, got {latent_dim!r}")
    if not sizes or any(size is not None and size < 1 for size in sizes):
        raise ValueError(f"latent_dim: expected positive sizes, got {latent_dim!r}")
    return tuple(None if size is None else int(size) for size in sizes)


def _mean_and_logvar(name: str, output: object) -> tuple[Tensor, Tensor | None]:
    """Take apart what a module gave: (tensor, None), or a pair of tensors."""
    if isinstance(output, Tensor):
        return output, None
    if isinstance(output, (tuple, list)) and len(output) == 2 and all(isinstance(o, Tensor) for o in output):
        return output[0], output[1]
    got = type(output).__name__
    if isinstance(output, (tuple, list)):
        got = f"{got} of ({', '.join(type(o).__name__ for o in output)})"
    raise TypeError(f"{name}: expected a tensor or a pair of tensors (mean, logvar) from it, got {got}")


def _unpacked(parameters: _Parameters) -> DiagonalGaussian:
    mu, logvar = parameters
    if logvar is None:
        return DiagonalGaussian(*mu.chunk(2, dim=1))
    return DiagonalGaussian(mu, logvar if isinstance(logvar, Tensor) else mu.new_full((), logvar))


def _fits(shape: Sequence[int], expected: Sequence[int | None]) -> bool:
    return len(shape) == len(expected) and all(e in (None, s) for s, e in zip(shape, expected, strict=True))


def _shown(sizes: Sequence[int | None]) -> str:
    """A shape as an error shows it: sizes that may be anything are ``*``."""
    inside = ", ".join("*" if size is None else str(size) for size in sizes)
    return f"({inside},)" if len(sizes) == 1 else f"({inside})"


register_outputs(DiagonalGaussian, VAEOutput, functional.Latent, ELBOTerms)
