"""The module over an encoder, a decoder and perhaps a prior."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, distributed, nn

from .. import functional, ops, pretrained
from ..backend.reference import LIKELIHOODS, Form
from ..backend.specs import half_of
from ..functional import ELBOTerms, Latent
from ..functional.checks import check_packed
from ..layout import broadcasts
from ..losses import checked_latent_options, checked_recon_options, shown_value
from ..torch_private import is_in_forward_of_ddp, is_managed_by_fsdp
from ..typing import (
    Bound,
    Bounds,
    Estimator,
    Generator,
    LikelihoodName,
    LikelihoodScale,
    NormalScale,
    Reduction,
)
from .families import DiagonalGaussian, GivenScale, Likelihood, ZeroInflatedNegativeBinomial, distribution_of
from .output import Decoded, Kind, VAEOutput, negative_bound
from .parts import (
    broadcasts_to,
    called,
    check_generator,
    check_prior,
    checked_count,
    checked_latent_shape,
    fits,
    is_plain_number,
    mean_and_scale,
    repeated,
    shape_of,
    shown_shape,
    with_zi_logits,
)

_ELEMENTS_AT_A_TIME = 2**22
"""How many elements of x, those of all samples together, an estimate of log p(x) has in memory unless told."""


class VAE(nn.Module):
    """A variational autoencoder with a Gaussian posterior q(z|x), any of the likelihoods p(x|z) and a Gaussian prior.

    Args:
        encoder: a module from x to the posterior q(z|x): one packed tensor ``(batch, 2 * C, *)``, the means
            and then the log-variances along dimension 1, or a pair (mu, logvar) of ``(batch, C, *)`` each.
        decoder: a module from z to the likelihood p(x|z). What it gives is said by ``likelihood`` and ``recon_logvar``.
        latent_dim: number of latent variables ``C``, or the sizes ``(C, height, width)`` of a spatial latent.
            A size may be None for an encoder that takes images of any size; `generate` then cannot know
            it.
        likelihood: p(x|z), as `fusedvae.functional.elbo_loss` has it: "gaussian" (default) or "laplace", which
            have a scale; "bernoulli", of which the decoder gives logits, or "bernoulli_probs", probabilities; "mse",
            the squared error, which is a Gaussian of variance 1/2; "l1", the absolute error, which is a Laplace
            distribution of scale 1; "poisson", of which the decoder gives the rate, in the form ``recon_scale``;
            "negative_binomial", a mean and theta; "zero_inflated_negative_binomial", these and, as the last of a tuple,
            the logits of a dropout; "discretized_logistic", a mean and a log-scale. Where there is no scale, the
            decoder gives one tensor of x's shape.
        recon_logvar: where the log-variance of p(x|z) comes from, or what else ``recon_scale`` says (of a negative
            binomial likelihood theta; an ``nn.Parameter`` of one a gene is scvi-tools' ``px_r``).

            * ``None`` (default): the decoder gives it, in a packed tensor ``(batch, 2 * channels, *)`` or as
              the second of a pair (mean, logvar), which may be anything that broadcasts to the mean.
            * anything else: the decoder gives the mean only, a tensor of x's shape, and the log-variance is
              a float (fixed), a tensor (fixed, kept in the state_dict), an ``nn.Parameter`` (learned; give it
              shape ``(channels, 1, 1)`` for one value a channel), or ``"learned"`` (one learned number, of shape
              ``(1,)``, at first 0; 1 if it is a scale itself, for which 0 is none).
        recon_scale, recon_clamp, recon_eps: the form of that scale, as in `fusedvae.functional`: "logvar"
            (default), "logstd", "std", "var" or "softplus"; of a Laplace or discretized logistic likelihood "logscale"
            (default), "scale" or "softplus"; of a negative binomial one "theta" (default), "logtheta" or "softplus";
            of the rate of a Poisson distribution "rate" (default), "lograte" or "softplus"; bounds (low, high) that it
            is clamped to; and what is added to what the form names.
        scale, clamp, eps: the form of what the encoder gives beside the mean, likewise.
        prior: p(z): None for N(0, I); a pair (mean, log-variance) of numbers, tensors (fixed, kept in the state_dict
            as ``prior_mu`` and ``prior_logvar``) or ``nn.Parameter`` (learned), each of a sample's latent shape or
            broadcasting to it; or a module that gives a pair of tensors, or one packed, ``(batch, 2 * C, *)``, for
            the condition that it is called with.
        prior_scale, prior_clamp, prior_eps: the form of what the prior has beside its mean. Without a ``prior_eps``,
            it is ``eps`` where that is a tensor of the same form, else 0.

    It is ``recon_logvar``, never the shape of a tensor, that tells a packed output from a mean: the two look
    alike where no x is at hand to compare with. `loss` and `forward` do have x, and say so when
    the decoder's output does not fit it.

    Methods take a ``condition`` for conditional models (Sohn, Lee & Yan 2015): a tensor, or whatever else the modules
    take. Unless it is None they are called with it: ``encoder(x, condition)``, ``decoder(z, condition)``,
    ``prior(condition)``. Where there are several samples of z, those of its tensors whose first dimension is the
    batch are repeated for the decoder, also in tuples, lists and dicts.

    The state_dict holds the encoder's, the decoder's and the prior's entries and, if they are tensors,
    ``recon_logvar``, ``prior_mu`` and ``prior_logvar``: the same under every backend. Modules keep their mode: call
    ``eval()`` and use ``torch.no_grad()`` as with any other.

    Raises:
        TypeError: an argument, or what the encoder or decoder returned, is not of the kinds listed above.
        ValueError: sizes do not fit: those of ``latent_dim``, of the posterior, of the prior, or of the
            reconstruction; or an option has no such value.
    """

    recon_logvar: Tensor | float | None
    prior: nn.Module | None
    prior_mu: Tensor | float | None
    prior_logvar: Tensor | float | None

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int | Sequence[int | None],
        *,
        likelihood: LikelihoodName = "gaussian",
        recon_logvar: float | Tensor | Literal["learned"] | None = None,
        recon_scale: LikelihoodScale | None = None,
        recon_clamp: Bounds = None,
        recon_eps: float = 0.0,
        scale: NormalScale = "logvar",
        clamp: Bounds = None,
        eps: float = 0.0,
        prior: nn.Module | tuple[Tensor | float, Tensor | float] | None = None,
        prior_scale: NormalScale = "logvar",
        prior_clamp: Bounds = None,
        prior_eps: float | None = None,
    ) -> None:
        super().__init__()
        for name, module in (("encoder", encoder), ("decoder", decoder)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name}: expected a torch.nn.Module, got {type(module).__name__}")
        form = checked_recon_options(likelihood, recon_scale, recon_clamp, recon_eps)
        checked_latent_options(scale, clamp, eps, prior_scale, prior_clamp, prior_eps)
        if not LIKELIHOODS[likelihood].pairs and recon_logvar is not None:
            raise ValueError(f"recon_logvar: expected None, as the {likelihood} likelihood has no scale")
        self.encoder = encoder
        self.decoder = decoder
        self.latent_shape = checked_latent_shape(latent_dim)
        self.likelihood = likelihood
        self.recon_scale, self.recon_clamp, self.recon_eps = recon_scale, recon_clamp, recon_eps
        self.scale, self.clamp, self.eps = scale, clamp, eps
        self.prior_scale, self.prior_clamp, self.prior_eps = prior_scale, prior_clamp, prior_eps
        if isinstance(recon_logvar, str):
            if recon_logvar != "learned":
                raise ValueError(f"recon_logvar: expected None, a number, a tensor or 'learned', got {recon_logvar!r}")
            assert form is not None
            first = 1.0 if form.map == "linear" else 0.0
            recon_logvar = nn.Parameter(torch.full((1,), first))  # FSDP takes no 0-dim parameters
            self.register_load_state_dict_pre_hook(_with_a_dimension)
        if not (recon_logvar is None or is_plain_number(recon_logvar) or isinstance(recon_logvar, Tensor)):
            raise TypeError(
                f"recon_logvar: expected None, a number, a tensor or 'learned', got {type(recon_logvar).__name__}"
            )
        self._register_value("recon_logvar", recon_logvar)
        if prior is None or isinstance(prior, nn.Module):
            self.prior, self.prior_mu, self.prior_logvar = prior, None, None
        elif isinstance(prior, (tuple, list)) and len(prior) == 2:
            self.prior = None
            for name, value in zip(("prior_mu", "prior_logvar"), prior, strict=True):
                if not (is_plain_number(value) or isinstance(value, Tensor)):
                    raise TypeError(f"{name}: expected a number or a tensor, got {type(value).__name__}")
                if isinstance(value, Tensor) and not broadcasts_to(value.shape, (1, *self.latent_shape)):
                    raise ValueError(
                        f"{name}: expected a shape that broadcasts to latent_dim {shown_shape(self.latent_shape)}, "
                        f"got {tuple(value.shape)}"
                    )
                self._register_value(name, value)
        else:
            raise TypeError(f"prior: expected None, a pair or a torch.nn.Module, got {type(prior).__name__}")

    def _register_value(self, name: str, value: Tensor | float | None) -> None:
        """Keep a number, a tensor that is fixed or one that is learned."""
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self.register_buffer(name, value)
        else:
            setattr(self, name, value if value is None or isinstance(value, Tensor) else float(value))

    def encode(self, x: Tensor, condition: Any = None) -> DiagonalGaussian:
        """The posterior q(z|x) of ``x``: a pair (mu, logvar), each ``(batch, *latent)``.

        The second is a log-variance, in whatever form the encoder gives it.
        """
        return self._gaussian(self._posterior(x, condition))

    def decode(self, z: Tensor, condition: Any = None) -> Likelihood:
        """The likelihood p(x|z) of ``z``, ``(batch, *latent)``; its ``mu``, the mean, has the shape of x.

        A `DiagonalGaussian` (mu, logvar) for "gaussian" and "mse", a `DiagonalLaplace` (mu, log_scale) for "laplace"
        and "l1", a `Bernoulli` (mu, logits) for the two of these, and a `Poisson` (mu), `NegativeBinomial` (mu, theta),
        `ZeroInflatedNegativeBinomial` (mu, theta, zi_logits) or `DiscretizedLogistic` (mu, log_scale). The second has
        the mean's shape, or broadcasts to it, and is a log-variance, or logarithm of a scale, in whatever form the
        decoder gives it.
        """
        return self._distribution(self._decoded(z, condition))

    def forward(
        self,
        x: Tensor,
        condition: Any = None,
        *,
        samples: int = 1,
        bound: Bound = "elbo",
        offset: int = 0,
        generator: Generator = None,
        noise: Tensor | None = None,
    ) -> VAEOutput:
        """Encode ``x``, sample the posterior, decode the samples.

        To train under a wrapper that must see every call (DistributedDataParallel, FSDP, accelerate's), call the
        wrapper and its output: ``wrapped(x).loss(x)``. Elsewhere `loss` is the same in one call.

        Args:
            x, condition, offset, generator, noise: as for `loss`.
            samples, bound: what the output's loss is to be, as for `loss`.
        """
        posterior, latent, p = self._pass(x, condition, samples, bound, offset, generator, noise)
        recon_x, recon_logvar = p.mean, p.scale
        if recon_logvar is None:
            recon_x, recon_logvar = recon_x.chunk(2, dim=recon_x.dim() - x.dim() + 1)
        elif isinstance(recon_logvar, nn.Parameter):
            # A function of the parameter: wrappers find out from outputs what was used, and may take it away then.
            recon_logvar = recon_logvar.clone()
        elif not isinstance(recon_logvar, Tensor):
            # Half precision would round it: the loss of the output is that of the module.
            recon_logvar = recon_x.new_full((), recon_logvar, dtype=torch.promote_types(recon_x.dtype, torch.float32))
        return VAEOutput(
            recon_x, recon_logvar, *self._gaussian(posterior), latent.z, latent.kl, p.kind.numbers(), p.zi_logits
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            x: Tensor,
            condition: Any = None,
            *,
            samples: int = 1,
            bound: Bound = "elbo",
            offset: int = 0,
            generator: Generator = None,
            noise: Tensor | None = None,
        ) -> VAEOutput: ...

    @overload
    def loss(
        self,
        x: Tensor,
        condition: Any = ...,
        *,
        samples: int = ...,
        bound: Bound = ...,
        beta: float | Tensor = ...,
        reduction: Reduction = ...,
        full: bool = ...,
        weight: Tensor | None = ...,
        grad_scale: float | Tensor | None = ...,
        return_terms: Literal[False] = ...,
        inplace: bool = ...,
        offset: int = ...,
        generator: Generator = ...,
        noise: Tensor | None = ...,
    ) -> Tensor: ...

    @overload
    def loss(
        self,
        x: Tensor,
        condition: Any = ...,
        *,
        samples: int = ...,
        bound: Bound = ...,
        beta: float | Tensor = ...,
        reduction: Reduction = ...,
        full: bool = ...,
        weight: Tensor | None = ...,
        grad_scale: float | Tensor | None = ...,
        return_terms: Literal[True],
        inplace: bool = ...,
        offset: int = ...,
        generator: Generator = ...,
        noise: Tensor | None = ...,
    ) -> ELBOTerms: ...

    @overload
    def loss(
        self,
        x: Tensor,
        condition: Any = ...,
        *,
        samples: int = ...,
        bound: Bound = ...,
        beta: float | Tensor = ...,
        reduction: Reduction = ...,
        full: bool = ...,
        weight: Tensor | None = ...,
        grad_scale: float | Tensor | None = ...,
        return_terms: bool,
        inplace: bool = ...,
        offset: int = ...,
        generator: Generator = ...,
        noise: Tensor | None = ...,
    ) -> Tensor | ELBOTerms: ...

    def loss(
        self,
        x: Tensor,
        condition: Any = None,
        *,
        samples: int = 1,
        bound: Bound = "elbo",
        beta: float | Tensor = 1.0,
        reduction: Reduction = "batchmean",
        full: bool = False,
        weight: Tensor | None = None,
        grad_scale: float | Tensor | None = None,
        return_terms: bool = False,
        inplace: bool = False,
        offset: int = 0,
        generator: Generator = None,
        noise: Tensor | None = None,
    ) -> Tensor | ELBOTerms:
        """The negative evidence lower bound of ``x``, in nats: NLL + beta * KL.

        Args:
            x: data, ``(batch, *)``.
            condition: what the modules take beside their inputs: see `VAE`.
            samples: how many samples of the posterior there are of each sample of the batch. The decoder sees them all
                as one batch, the first sample of each first.
            bound: "elbo", the NLL averaged over the samples; or "iwae", -log mean exp of log p(x|z) + log p(z) -
                log q(z|x) over them: tighter, the more there are (Burda et al. 2016, equation 8).
            beta: weight of the KL term, a float or a 0-dim tensor (Higgins et al. 2017); 1 with "iwae".
            reduction: "batchmean" (mean over the batch), "sum", or "none" (one value per sample): within a sample both
                terms are sums. Or "mean" (over elements of x, and of the latent), "weighted_mean", or a pair, of
                the NLL's and of the KL's: these not with "iwae".
            full: add the NLL's constant, log(2 pi) / 2 per element of x for a Gaussian: nats of a normalised density.
            weight: of the elements of x: a float or bool tensor that broadcasts to its shape. Where it is 0, values and
                gradients of the likelihood are exactly 0.
            grad_scale: what gradients are made times, while the value is what it is: a number or a 0-dim tensor.
            return_terms: return ``ELBOTerms(loss, nll, kl)``, reduced alike, instead of the loss; not with "iwae".
            inplace: write the gradient of what the decoder gives first into its memory, as `fusedvae.functional`
                says. ValueError of a decoder whose output is kept, or seen, by something else.
            offset: position of the first element in the noise stream: a process that holds the rows from r0 of a batch
                passes r0 times the number of latent variables, and gets the noise that one process would have given
                them. With several samples, which lie in front of the batch, pass ``noise``.
            generator: where the noise comes from: one, or a list of one for each sample of the batch; torch's default
                generator if None.
            noise: the noise itself, in the place of the generator's: of z's shape, ``(batch, *latent)``; with several
                samples or "iwae" ``(samples, batch, *latent)``.

        Raises:
            TypeError, ValueError: an argument is not of these, does not go with the bound, or does not fit.

        Where several processes train together, it warns once: it goes past a wrapper around the module, which then
        synchronises no gradients. Call the wrapper, ``wrapped(x).loss(x)``, instead. Within a module that is wrapped as
        a whole, such as a LightningModule's ``training_step``, it is right and says nothing.
        """
        self._warn_if_unsynchronised()
        posterior, latent, p = self._pass(x, condition, samples, bound, offset, generator, noise)
        return negative_bound(
            p,
            x,
            latent,
            latent.z.dim() > posterior[0].dim(),
            beta=beta,
            reduction=reduction,
            full=full,
            weight=weight,
            grad_scale=grad_scale,
            return_terms=return_terms,
            inplace=inplace,
        )

    @torch.no_grad()
    def log_likelihood(
        self,
        x: Tensor,
        condition: Any = None,
        *,
        samples: int = 5000,
        chunk: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Estimate log p(x), or log p(x|condition), by importance sampling: nats, the likelihood's constant included.

        log mean exp of log p(x|z) + log p(z) - log q(z|x) over samples z of q(z|x): log p(x) in the limit of many, and
        on average below it, the less the more there are. Source: Burda et al. 2016 (arXiv:1509.00519), equation 8 and
        section 5, where there are 5000.

        Args:
            x: data, ``(batch, *)``.
            condition: what the modules take beside their inputs: see `VAE`.
            samples: how many samples of the posterior there are of each sample of the batch.
            chunk: how many of them are decoded at a time. It bounds the memory, and changes nothing but rounding.
                By default chunks have 4 million elements of x, or one sample.
            generator: where the noise comes from; torch's default generator if None.

        Returns:
            ``(batch,)``, float32 at least, without a gradient.

        Raises:
            TypeError, ValueError: ``samples`` or ``chunk`` is not a positive integer; or the modules' outputs do not
                fit, as for `loss`.
        """
        samples = checked_count("samples", samples)
        chunk = None if chunk is None else checked_count("chunk", chunk)
        check_generator(generator)
        posterior = self._posterior(x, condition)
        prior = self._prior(condition, shape_of(posterior))
        if chunk is None:
            chunk = max(1, _ELEMENTS_AT_A_TIME // max(x.numel(), 1))
        mu, scale = posterior
        elements = mu.numel() // (2 if scale is None else 1)
        # All chunks are of one stream of noise, each from where the one before ended.
        seed = int(ops.draw_seed(x.device, generator, by_dispatcher=False))
        stream = torch.Generator(x.device)
        total = None
        for start in range(0, samples, chunk):
            count = min(chunk, samples - start)
            latent = self._latent(posterior, prior, count, "sample", stream.manual_seed(seed), start * elements)
            p = self._decoded(latent.z, condition, of=x, samples=count)
            log_sum = torch.logsumexp(-(p.nll(x, True, None, "none") + latent.kl), 0)
            total = log_sum if total is None else torch.logaddexp(total, log_sum)
        assert total is not None
        return total - math.log(samples)

    def reconstruct(
        self, x: Tensor, condition: Any = None, *, sample: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """What the model makes of ``x``; a tensor of its shape.

        By default the mean of p(x|z) at the posterior's mean; with ``sample`` a draw from p(x|z) with z drawn
        from q(z|x).
        """
        posterior = self.encode(x, condition)
        z = posterior.sample(generator=generator) if sample else posterior.mu
        return self._image(self._distribution(self._decoded(z, condition, of=x)), sample, generator)

    def generate(
        self, n: int, condition: Any = None, *, sample: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Decode ``n`` draws from the prior; a tensor ``(n, *)``.

        Each is the mean of p(x|z), as usually shown, or with ``sample`` a draw from p(x|z). A condition is one of a
        batch of ``n``. The draws from the prior are of the package's noise, as samples of the posterior are: the same
        for a seed on every device. A generator must be on the model's device with ``sample``, where the likelihood is
        no Gaussian.
        """
        check_generator(generator)
        shape: tuple[int | None, ...] = (checked_count("n", n), *self.latent_shape)
        parameter = next(self.decoder.parameters(), torch.empty(()))
        like = torch.empty((), dtype=parameter.dtype, device=parameter.device)  # the parameter may be sharded
        prior = self._prior_distribution(condition, shape, like)
        if fits(prior.mu.shape, shape):  # it may know the sizes that were left open
            shape = tuple(prior.mu.shape)
        sizes = [size for size in shape if size is not None]
        if len(sizes) < len(shape):
            raise ValueError(
                f"latent_dim: generate needs every size, got {shown_shape(self.latent_shape)}; call "
                "decode(torch.randn(...)) with the sizes wanted"
            )
        for moment in prior:
            check_prior(moment.shape, sizes)
        moments = [moment.expand(sizes) for moment in prior]
        z = functional.reparameterize(*moments, generator=generator).to(like.dtype)
        return self._image(self.decode(z, condition), sample, generator)

    def embed(self, x: Tensor, condition: Any = None) -> Tensor:
        """Features of ``x`` for other uses: the posterior means, ``(batch, number of latent variables)``."""
        return self.encode(x, condition).mu.flatten(1)

    # --- models as files ---

    def save_pretrained(
        self, directory: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None, **options: Any
    ) -> str | None:
        """Write the model to ``directory``: ``config.json``, and its tensors in ``model.safetensors`` (without
        safetensors: ``model.pt``). `from_pretrained` reads both. Other files there are left alone. Of a model that is
        spread over processes (FSDP2) every process calls it and one writes, for which the others do not wait.

        Args:
            push_to_hub: also upload it, and return what `push_to_hub` does, which takes the other options.
            repo_id: its name there; by default that of the directory.
        """
        if options and not push_to_hub:
            raise TypeError(f"{next(iter(options))}: expected with push_to_hub=True only, which takes it")
        pretrained.save(self, Path(directory))
        return self.push_to_hub(repo_id or Path(directory).resolve().name, **options) if push_to_hub else None

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        prior: nn.Module | None = None,
        **options: Any,
    ) -> VAE:
        """The model that `save_pretrained` wrote, or ``fusedvae train``, on the CPU, in evaluation mode.

        No code of a file is run: networks of `fusedvae.networks` are made again as the file says; in the place of
        modules of another kind, pass new ones, which the values of the saved ones are copied to.

        Args:
            directory: where the model is; or its name on the Hugging Face Hub, if there is no such directory and
                huggingface_hub is installed.
            encoder, decoder, prior: modules of kinds that are not fusedvae's own.
            options: ``revision``, ``token``, ``cache_dir`` and others that ``huggingface_hub.snapshot_download`` takes.

        Raises:
            TypeError: ``directory`` is neither a path nor a name, or the class takes other arguments than `VAE`.
            FileNotFoundError: there is no model, or the Hub cannot be asked for it.
            ValueError: it is damaged, or one of its modules must be passed: the message says which.
            RuntimeError: the tensors do not fit the modules.
        """
        if not isinstance(directory, (str, os.PathLike)):
            raise TypeError(f"directory: expected a path or a name, got {type(directory).__name__}")
        path = Path(directory)
        if options or not path.is_dir():
            path = pretrained.downloaded(str(directory), **options)
        with torch.device("cpu"):  # whatever device is the default
            return pretrained.load(cls, path, {"encoder": encoder, "decoder": decoder, "prior": prior})

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model to the Hugging Face Hub, as what `save_pretrained` writes and a card that says how to
        use it, by huggingface_hub's own mixin; returns the address of the commit.

        Args:
            repo_id: "owner/model"; made if there is none.
            options: ``private``, ``token``, ``commit_message``, ``branch``, ``create_pr`` and what else
                ``huggingface_hub.ModelHubMixin.push_to_hub`` takes.

        Raises:
            ImportError: huggingface_hub is not installed.
        """
        return pretrained.upload(self, repo_id, **options)

    def extra_repr(self) -> str:
        latent_dim = self.latent_shape[0] if len(self.latent_shape) == 1 else self.latent_shape
        shown = [f"latent_dim={latent_dim}"]
        if self.likelihood != "gaussian":
            shown.append(f"likelihood={self.likelihood!r}")
        if LIKELIHOODS[self.likelihood].pairs:
            shown.append(f"recon_logvar={shown_value(self.recon_logvar)}")
        if self.prior_mu is not None:
            shown.append(f"prior=({shown_value(self.prior_mu)}, {shown_value(self.prior_logvar)})")
        for name in pretrained.OPTIONS:
            value = getattr(self, name)
            if name != "likelihood" and value != inspect.signature(VAE).parameters[name].default:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)

    @staticmethod
    def _image(p: Likelihood, sample: bool, generator: torch.Generator | None) -> Tensor:
        if sample:
            return p.sample(generator=generator)
        return p.mean if isinstance(p, ZeroInflatedNegativeBinomial) else p.mu

    def _warn_if_unsynchronised(self) -> None:
        """Say once that `loss` is no call of a wrapper."""
        global _has_warned
        if _has_warned or not (distributed.is_available() and distributed.is_initialized()):
            return
        # Past FSDP there are no whole parameters to compute with.
        is_synchronised = is_in_forward_of_ddp() or is_managed_by_fsdp(self)
        if distributed.get_world_size() > 1 and torch.is_grad_enabled() and not is_synchronised:
            _has_warned = True
            warnings.warn(
                "VAE.loss was called in a group of processes. It goes past DistributedDataParallel and the like, which "
                "do not synchronise its gradients then: call the wrapped module, wrapped(x).loss(x).",
                stacklevel=3,
            )

    # --- steps of a pass ---

    def _pass(
        self,
        x: Tensor,
        condition: Any,
        samples: int,
        bound: str,
        offset: int,
        generator: Generator,
        noise: Tensor | None,
    ) -> tuple[tuple[Tensor, Tensor | None], Latent, Decoded]:
        """Encode, sample and decode. One sample of an ELBO has no dimension of its own; others lie in front."""
        if bound not in ("elbo", "iwae"):
            raise ValueError(f"bound: expected 'elbo' or 'iwae', got {bound!r}")
        draws: int | None = checked_count("samples", samples)
        if draws == 1 and bound == "elbo":
            draws = None
        posterior = self._posterior(x, condition)
        estimator: Estimator = "analytic" if bound == "elbo" else "sample"
        prior = self._prior(condition, shape_of(posterior))
        latent = self._latent(posterior, prior, draws, estimator, generator, offset, noise)
        return posterior, latent, self._decoded(latent.z, condition, of=x, samples=draws)

    def _posterior(self, x: Tensor, condition: Any) -> tuple[Tensor, Tensor | None]:
        """Run the encoder and check what it gives against ``latent_dim``."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        if x.ndim == 0:
            raise ValueError("x: expected a batch dimension, got a 0-dim tensor")
        mu, logvar = mean_and_scale("encoder", called("encoder", self.encoder, x, condition=condition))
        if logvar is None:
            channels, *rest = self.latent_shape
            expected = (x.shape[0], None if channels is None else 2 * channels, *rest)
            if not fits(mu.shape, expected):
                hint = (
                    "; one that packs along another dimension gives a pair, chunk(2, dim=...)" if mu.dim() > 2 else ""
                )
                raise ValueError(
                    f"encoder: expected a packed posterior of shape {shown_shape(expected)}, means and "
                    f"log-variances along dimension 1 for latent_dim {shown_shape(self.latent_shape)}; "
                    f"got {tuple(mu.shape)}{hint}"
                )
        else:
            expected = (x.shape[0], *self.latent_shape)
            for name, tensor in (("mu", mu), ("logvar", logvar)):
                if not fits(tensor.shape, expected):
                    raise ValueError(
                        f"encoder: expected {name} of shape {shown_shape(expected)}, the batch and latent_dim; "
                        f"got {tuple(tensor.shape)}"
                    )
        return mu, logvar

    def _prior(
        self, condition: Any, shape: Sequence[int | None]
    ) -> tuple[Tensor | float, Tensor | float | None] | None:
        """The prior's mean and scale, or both packed and None, of latents of a shape; None for N(0, I)."""
        if self.prior is not None:
            mean, scale = mean_and_scale("prior", called("prior", self.prior, condition=condition))
            if scale is None:
                check_packed("prior", mean, 1)
                half = half_of(mean.shape, 1)
                check_prior(half, shape)
                if len(half) != len(shape) or shape[1] not in (None, half[1]):
                    raise ValueError(
                        f"prior: expected one packed tensor to have twice the latent's size {shown_shape(shape)} along "
                        f"dimension 1, means and log-variances, got {tuple(mean.shape)}"
                    )
            else:
                check_prior(mean.shape, shape)
                check_prior(scale.shape, shape)
            return mean, scale
        return None if self.prior_mu is None else (self.prior_mu, self.prior_logvar)

    def _latent(
        self,
        posterior: tuple[Tensor, Tensor | None],
        prior: tuple[Tensor | float, Tensor | float | None] | None,
        samples: int | None,
        estimator: Estimator,
        generator: Generator,
        offset: int = 0,
        noise: Tensor | None = None,
    ) -> Latent:
        prior_mu, prior_logvar = (None, None) if prior is None else prior
        return functional.latent(
            *posterior,
            prior_mu,
            prior_logvar,
            scale=self.scale,
            clamp=self.clamp,
            eps=self.eps,
            prior_scale=self.prior_scale,
            prior_clamp=self.prior_clamp,
            prior_eps=self.prior_eps,
            estimator=estimator,
            samples=samples,
            offset=offset,
            generator=generator,
            noise=noise,
        )

    def _decoded(self, z: Tensor, condition: Any, *, of: Tensor | None = None, samples: int | None = None) -> Decoded:
        """Run the decoder on one sample, or on several that lie in front, and take these apart again."""
        kind = Kind(self.likelihood, self.recon_scale, self.recon_clamp, self.recon_eps)
        if samples is None:
            mean, scale, zi_logits = self._likelihood(z, condition, of)
            return Decoded(mean, scale, kind, zi_logits)
        mean, scale, zi_logits = self._likelihood(z.flatten(0, 1), repeated(condition, samples, z.shape[1]), of)
        if isinstance(scale, Tensor) and scale.dim() == mean.dim() and scale.shape[0] == mean.shape[0]:
            scale = scale.unflatten(0, z.shape[:2])
        if zi_logits is not None and zi_logits.dim() == mean.dim() and zi_logits.shape[0] == mean.shape[0]:
            zi_logits = zi_logits.unflatten(0, z.shape[:2])
        return Decoded(mean.unflatten(0, z.shape[:2]), scale, kind, zi_logits)

    def _likelihood(
        self, z: Tensor, condition: Any, of: Tensor | None
    ) -> tuple[Tensor, Tensor | float | None, Tensor | None]:
        """Run the decoder and check what it gives against ``recon_logvar`` and, if there are some, the data."""
        output = called("decoder", self.decoder, z, condition=condition)
        zi_logits: Tensor | None = None
        if self.likelihood == "zero_inflated_negative_binomial":
            output, zi_logits = with_zi_logits(output)
        mean, logvar = mean_and_scale("decoder", output)
        has_scale = len(LIKELIHOODS[self.likelihood].pairs) > 0
        packed = has_scale and logvar is None and self.recon_logvar is None
        if logvar is not None and not has_scale:
            raise TypeError(
                f"decoder: expected one tensor, as the {self.likelihood} likelihood has no scale; got a pair"
            )
        if logvar is not None and self.recon_logvar is not None:
            raise TypeError("decoder: expected the mean only, as recon_logvar is given; got a pair (mean, logvar)")
        if mean.ndim < 2 or mean.shape[0] != z.shape[0]:
            raise ValueError(
                f"decoder: expected a tensor of shape (batch, channels, ...) for a batch of {z.shape[0]}, "
                f"got {tuple(mean.shape)}"
            )
        word = "log-variance" if self.likelihood == "gaussian" else "scale"
        if packed and zi_logits is not None and zi_logits.shape == mean.shape:
            raise TypeError(
                "decoder: expected (mu, theta, zi_logits) from it, as the likelihood is "
                "zero_inflated_negative_binomial; got two tensors of one shape: zi_logits is missing"
            )
        if packed and mean.shape[1] % 2:
            raise ValueError(
                f"decoder: expected a mean and a {word} packed along dimension 1, an even size, "
                f"got {tuple(mean.shape)}; if it gives the mean only, pass recon_logvar to the VAE"
            )
        if of is not None:
            if of.ndim < 2:
                raise ValueError(
                    f"x: expected shape (batch, channels, ...), got {tuple(of.shape)}; of one number a sample, "
                    "x.unsqueeze(1)"
                )
            expected = (z.shape[0], (2 if packed else 1) * of.shape[1], *of.shape[2:])
            if tuple(mean.shape) != expected:
                what, otherwise = "tensor", ""
                if packed:
                    what = f"packed mean and {word}"
                    otherwise = "; if it gives the mean only, pass recon_logvar to the VAE"
                    if zi_logits is not None:
                        otherwise = "; of (mu, theta), zi_logits is missing"
                elif has_scale:
                    what, otherwise = "mean", f"; if it gives the {word} too, leave recon_logvar None"
                raise ValueError(
                    f"decoder: expected a {what} of shape {expected} for x of shape {tuple(of.shape)}, "
                    f"got {tuple(mean.shape)}{otherwise}"
                )
        shape = half_of(mean.shape, 1) if packed else mean.shape
        for what, beside in ((word, logvar), ("zi_logits", zi_logits)):
            if beside is not None and not broadcasts(beside.shape, shape):
                raise ValueError(
                    f"decoder: expected {'a ' if beside is logvar else ''}{what} that broadcasts to {tuple(shape)}, "
                    f"got {tuple(beside.shape)}"
                )
        if not has_scale:
            return mean, 0.0, None
        return mean, (None if packed else self.recon_logvar if logvar is None else logvar), zi_logits

    def _gaussian(self, posterior: tuple[Tensor, Tensor | None]) -> DiagonalGaussian:
        """The posterior, taken apart and with a log-variance."""
        mu, scale = posterior
        if scale is None:
            mu, scale = mu.chunk(2, dim=1)
        if self.scale == "logvar" and self.clamp is None and self.eps == 0.0:
            return DiagonalGaussian(mu, scale)
        return DiagonalGaussian(mu, GivenScale(scale, mu, self._latent_forms(None)[0]).log)

    def _prior_distribution(self, condition: Any, shape: Sequence[int | None], like: Tensor) -> DiagonalGaussian:
        """The prior of latents of a shape, likewise; where it is of numbers, of tensors like another."""
        prior = self._prior(condition, shape)
        if prior is None:
            return DiagonalGaussian(like.new_zeros(()), like.new_zeros(()))
        mu, scale = prior
        if not isinstance(mu, Tensor):
            mu = like.new_full((), mu)
        if scale is None:
            mu, scale = mu.chunk(2, dim=1)
        return DiagonalGaussian(mu, GivenScale(scale, mu, self._latent_forms(scale)[1]).log)

    def _latent_forms(self, prior_scale: Tensor | float | None) -> tuple[Form, Form]:
        """Those of the posterior's scale and of the prior's."""
        return checked_latent_options(
            self.scale, self.clamp, self.eps, self.prior_scale, self.prior_clamp, self.prior_eps, prior_scale
        )

    def _distribution(self, p: Decoded) -> Likelihood:
        mean, scale = p.mean, p.scale
        if scale is None:
            mean, scale = mean.chunk(2, dim=1)
        zi_logits = () if p.zi_logits is None else (p.zi_logits,)
        return distribution_of(p.kind.likelihood, p.kind.form, mean, scale, *zi_logits)


_has_warned = False


def _with_a_dimension(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
    """Take the learned log-variance of an earlier version, which was 0-dim."""
    learned = state_dict.get(f"{prefix}recon_logvar")
    if isinstance(learned, Tensor) and learned.dim() == 0:
        state_dict[f"{prefix}recon_logvar"] = learned.view(1)
