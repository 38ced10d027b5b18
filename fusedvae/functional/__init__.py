"""The operations as functions: what the modules are made of.

Every function checks its arguments before anything runs (TypeError and ValueError name the argument, what came and
what was expected), then runs on the backend chosen by ``backend=``, else by `fusedvae.use_backend`.

Common to all:

* a batch is dimension 0; the shapes are otherwise free. Any strides are taken; contiguous and channels_last
  tensors, halves of packed tensors and broadcast operands without a copy, others with one.
* dtypes float64, float32, bfloat16 and float16, mixed as in PyTorch's arithmetic (targets may also be integers and
  bools). Each term is computed in float32, or in float64 if an operand of it is. Sums have the promoted dtype of the
  operands, but no less than float32; values of elements have it, or float32 under autocast. Each gradient has its
  operand's dtype.
* a mean and its scale may come packed in one tensor, halves along dimension 1 (or ``packed_dim``, -1 for the tokens of
  a transformer): pass it in the mean's place and None, said out loud, in the scale's.
* ``scale`` says what the tensor beside a mean holds: "logvar" (sigma^2 = e^s), "logstd" (sigma = e^s), "std" (sigma =
  s), "var" (sigma^2 = s), "softplus" (sigma = softplus(s)); of a Laplace or discretized logistic distribution
  "logscale" (b = e^s), "scale" (b = s), "softplus"; of a negative binomial one "theta", "logtheta", "softplus"; of a
  Poisson distribution's rate "rate", "lograte", "softplus". ``clamp=(low, high)`` bounds s first, with no gradient
  outside; either may be None. ``eps`` is then added to what the form names (sigma^2 for "logvar" and "var", else sigma,
  b, theta or the rate).
* reductions: "batchmean" (sum over everything, divided by the batch size), "sum", "mean" (over elements),
  "weighted_mean" (sum of the weighted values, divided by the sum of the weights), "none" (sums over ``dim``: by default
  all but the batch, one value per sample; ``dim=()`` gives one an element).
* ``weight`` multiplies elements; a float or bool tensor that broadcasts to them. Where it is 0, values and gradients
  are exactly 0, whatever the operands hold. With a weight that needs a gradient itself, the reference's formulas
  compute.
* ``inplace=True`` has the gradient of the likelihood's first input (recon_x) written into the memory of that input, in
  the forward pass where gradients are made in it. So nobody may read recon_x after the loss; an operation before it
  that saved it for its own backward pass (a sigmoid, tanh or ReLU at a decoder's end) has autograd raise its error,
  unless it keeps it where autograd does not look, as callables of ``torch.cuda.make_graphed_callables`` do; and there
  are no second derivatives. With "none", ``return_terms``, or float16 without ``grad_scale``, it is written
  in the backward pass instead, unless the graph is kept. Where nothing needs that gradient, nothing is written.
  ValueError where it cannot be, or would be seen: recon_x is a leaf; its memory has gaps, is broadcast, or is another
  operand's too; it is a view of a tensor that something else holds; with the reference formulas, under torch.compile,
  torch.func and tracing.

Formulas: Kingma & Welling 2014, "Auto-Encoding Variational Bayes" (arXiv:1312.6114), appendix B.
"""

from ..torch_private import register_outputs
from .bounds import ELBOTerms, elbo_loss, importance_weighted_bound
from .divergences import kl_normal, kl_standard_normal
from .latents import Latent, latent, reparameterize
from .likelihoods import (
    bernoulli_nll,
    discretized_logistic_nll,
    gaussian_nll,
    gaussian_nll_loss,
    laplace_nll,
    negative_binomial_nll,
    poisson_nll,
    zero_inflated_negative_binomial_nll,
)
from .linear import linear_elbo

__all__ = [
    "ELBOTerms",
    "Latent",
    "bernoulli_nll",
    "discretized_logistic_nll",
    "elbo_loss",
    "gaussian_nll",
    "gaussian_nll_loss",
    "importance_weighted_bound",
    "kl_normal",
    "kl_standard_normal",
    "laplace_nll",
    "latent",
    "linear_elbo",
    "negative_binomial_nll",
    "poisson_nll",
    "reparameterize",
    "zero_inflated_negative_binomial_nll",
]

register_outputs(__name__, Latent, ELBOTerms)
