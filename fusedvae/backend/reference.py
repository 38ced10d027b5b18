"""The formulas in plain PyTorch: the definition of correct, and the registry of all that an objective can be made of.

Differentiable any number of times, on any device. Formulas work elementwise, on operands that have been checked and
unpacked. Their sources are with them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)

# --- numbers and tensors ----------------------------------------------------------------------------------------------

Number = Tensor | float


def working_dtype(*operands: Tensor | float | None) -> torch.dtype:
    """The dtype arithmetic is done in: float64 if an operand is, else float32.

    As in PyTorch's arithmetic, 0-dim tensors have no say beside others.
    """
    tensors = [t for t in operands if isinstance(t, Tensor)]
    deciding = [t for t in tensors if t.dim() > 0] or tensors
    return torch.float64 if any(t.dtype == torch.float64 for t in deciding) else torch.float32


def _exp(x: Any) -> Any:
    if isinstance(x, Tensor):
        return torch.exp(x)
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _log(x: Any) -> Any:
    if isinstance(x, Tensor):
        return torch.log(x)
    return math.log(x) if x > 0 else -math.inf if x == 0 else math.nan


def _expm1(x: Any) -> Any:
    return torch.expm1(x) if isinstance(x, Tensor) else _exp(x) - 1.0 if abs(x) > 1.0 else math.expm1(x)


def _softplus(x: Any) -> Any:
    # Exact at every x; torch.nn.functional.softplus goes over to x at 20.
    return torch.logaddexp(x, torch.zeros_like(x)) if isinstance(x, Tensor) else max(x, 0.0) + math.log1p(_exp(-abs(x)))


def _inverse(x: Any) -> Any:
    return 1.0 / x if isinstance(x, Tensor) or x != 0 else math.copysign(math.inf, x)


# --- records ----------------------------------------------------------------------------------------------------------

_Record = TypeVar("_Record", bound=NamedTuple)


def replaced(record: _Record, **fields: Any) -> _Record:
    """``record._replace(**fields)``, into which the compiler of PyTorch 2.6 does not see."""
    kind = type(record)
    return kind(*(fields.get(name, value) for name, value in zip(kind._fields, record, strict=True)))


# --- the forms of a scale ---------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """What the tensor beside a mean holds: how it becomes the scale that a formula is written in.

    It is bounded by ``low`` and ``high`` first. The base is e^x, x or softplus(x), plus eps, or
    ("bounded") the larger of x and eps, of which the derivative knows nothing. The scale is the base, or its square.
    """

    map: str = "exponential"
    """"exponential", "linear", "softplus" or "bounded"."""
    squared: bool = False
    low: float = -math.inf
    high: float = math.inf
    eps: float = 0.0


PLAIN = Form()
"""The logarithm of the scale that a formula is written in."""

NORMAL_FORMS = {
    "logvar": PLAIN,
    "logstd": Form("exponential", squared=True),
    "std": Form("linear", squared=True),
    "var": Form("linear"),
    "softplus": Form("softplus", squared=True),
}
"""Of a normal distribution, whose formulas are written in the variance; by what users call them."""

LAPLACE_FORMS = {"logscale": PLAIN, "scale": Form("linear"), "softplus": Form("softplus")}

COUNT_EPS = 1e-8
"""What likelihoods of counts add to what they take the logarithm of, as scvi-tools and PyTorch do."""

RATE_FORMS = {"rate": Form("linear", eps=COUNT_EPS), "lograte": PLAIN, "softplus": Form("softplus", eps=COUNT_EPS)}
"""Of the rate of a Poisson distribution."""

DISPERSION_FORMS = {"theta": Form("linear"), "logtheta": PLAIN, "softplus": Form("softplus")}
"""Of the inverse dispersion of a negative binomial distribution."""


def _bounded(x: Tensor, low: float, high: float) -> Tensor:
    """torch.clamp, with the derivative 1 at the bounds themselves, where PyTorch has 0 from 2.15 on."""
    return torch.where((x >= low) & (x <= high), x, x.detach().clamp(low, high))


class Scale:
    """A scale as formulas take it: of a variance sigma^2, say, its logarithm, itself and its inverse."""

    def __init__(self, x: Number, form: Form) -> None:
        """The scale that ``x`` is a form of."""
        self._form = form
        if isinstance(x, Tensor):
            if form.low != -math.inf or form.high != math.inf:
                x = _bounded(x, form.low, form.high)
        elif not math.isnan(x):
            x = max(form.low, min(form.high, x))
        self._x = x
        self._base: Any = None if self.has_log else self._base_of(x)

    @property
    def has_log(self) -> bool:
        """Whether the logarithm is what it comes from."""
        return self._form.map == "exponential" and self._form.eps == 0

    def _base_of(self, x: Any) -> Any:
        form = self._form
        if form.map == "exponential":
            return _exp(x) + form.eps
        if form.map == "linear":
            return x + form.eps
        if form.map == "softplus":
            return _softplus(x) + form.eps
        if not isinstance(x, Tensor):
            return max(x, form.eps)
        bounded = x.clone()
        with torch.no_grad():
            bounded.clamp_(min=form.eps)
        return bounded

    @property
    def log(self) -> Any:
        log = self._x if self.has_log else _log(self._base)
        return 2.0 * log if self._form.squared else log

    @property
    def value(self) -> Any:
        """The scale itself."""
        if self.has_log:
            return _exp(self.log)
        return self._base * self._base if self._form.squared else self._base

    @property
    def inverse(self) -> Any:
        """1 / value."""
        if self.has_log:
            return _exp(-self.log)
        inverse = _inverse(self._base)
        return inverse * inverse if self._form.squared else inverse

    @property
    def minus_1(self) -> Any:
        """value - 1, near 1 to the last digit."""
        if self.has_log:
            return _expm1(self.log)
        more = self._base - 1.0
        return more * (self._base + 1.0) if self._form.squared else more

    @property
    def root(self) -> Any:
        """The square root of the value: a standard deviation, where that is a variance."""
        if self.has_log:
            return _exp(0.5 * self.log)
        if self._form.squared:
            return self._base
        return self._base.sqrt() if isinstance(self._base, Tensor) else self._base**0.5


_LARGEST = sys.float_info.max
"""Stands for no bound in the fields of forms: programs are stored in JSON, which knows no infinity."""


def forms_of(maps: Sequence[str], squared: Sequence[bool], limits: Sequence[float]) -> tuple[Form, ...]:
    """Forms from the fields that describe all of them."""
    limits = [math.copysign(math.inf, limit) if abs(limit) == _LARGEST else limit for limit in limits]
    return tuple(Form(m, s, *limits[3 * k : 3 * k + 3]) for k, (m, s) in enumerate(zip(maps, squared, strict=True)))


def form_fields(forms: Sequence[Form]) -> tuple[tuple[str, ...], tuple[bool, ...], tuple[float, ...]]:
    """The fields that describe some forms: maps, squared and limits."""
    limits = [limit for form in forms for limit in (form.low, form.high, form.eps)]
    return (
        tuple(form.map for form in forms),
        tuple(form.squared for form in forms),
        tuple(max(-_LARGEST, min(limit, _LARGEST)) for limit in limits),
    )


# --- the registry of formulas -----------------------------------------------------------------------------------------


class Formula(NamedTuple):
    """What a term of an objective is, element by element."""

    name: str
    inputs: tuple[str, ...]
    elements: Callable[..., Any]
    """Its value for each element, a function of the inputs: tensors of one dtype, numbers, and scales as `Scale`."""
    scales: tuple[int, ...]
    """Which of them are scales."""
    pairs: tuple[tuple[int, int], ...]
    """A mean and the scale beside it, which may come packed in one tensor."""
    forms: dict[str, Form]
    """Those that its scales may have, by what users call them; the first is what they are without a word."""
    likelihood: str | None
    """What users call it, if it is a likelihood that they can ask for."""
    is_divergence: bool
    """Whether it is one, which beta multiplies, and no likelihood."""
    constant: float
    """What ``full`` adds to each element."""
    in_full: str | None
    """Or the name of the formula with that, where it depends on the data."""
    at_sample: Callable[..., Any] | None
    """Of a divergence from q to p, log q(z) - log p(z): a function of z, its noise, and the inputs but for the mean."""

    def prepared(self, inputs: Sequence[Number], forms: Sequence[Form]) -> list[Any]:
        """Some inputs, none of them packed, as ``elements`` takes them."""
        dtype = working_dtype(*inputs)
        found: list[Any] = [t.to(dtype) if isinstance(t, Tensor) else t for t in inputs]
        for scale, form in zip(self.scales, forms, strict=True):
            found[scale] = Scale(found[scale], form)
        return found

    @property
    def usual_forms(self) -> list[Form]:
        """Those that its scales have without a word."""
        return [next(iter(self.forms.values()))] * len(self.scales)

    def __call__(self, inputs: Sequence[Number], forms: Sequence[Form] | None = None) -> Tensor:
        """The values of some inputs, none of them packed; in the usual forms, if these are not given."""
        found: Tensor = self.elements(*self.prepared(inputs, self.usual_forms if forms is None else forms))
        return found


FORMULAS: dict[str, Formula] = {}
"""Every formula, by its name: that of its function here, and the one that kernels know it by."""

LIKELIHOODS: dict[str, Formula] = {}
"""The likelihoods, by what users call them."""

GIVEN = Formula("given", ("kl",), lambda kl: kl, (), (), {}, None, True, 0.0, None, None)
"""Stands for a divergence that was computed before: a value per sample."""


def formula(
    *inputs: str,
    pairs: Sequence[tuple[str, str]] = (),
    scales: Sequence[str] | None = None,
    forms: dict[str, Form] | None = None,
    likelihood: str | None = None,
    is_divergence: bool = False,
    constant: float = 0.0,
    in_full: str | None = None,
    at_sample: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function, which takes the inputs; the scales are those of the pairs, if not given."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        positions = tuple((inputs.index(mean), inputs.index(scale)) for mean, scale in pairs)
        made = Formula(
            function.__name__,
            inputs,
            function,
            tuple(map(inputs.index, scales)) if scales is not None else tuple(scale for _, scale in positions),
            positions,
            NORMAL_FORMS if forms is None else forms,
            likelihood,
            is_divergence,
            constant,
            in_full,
            at_sample,
        )
        FORMULAS[made.name] = made
        if likelihood is not None:
            LIKELIHOODS[likelihood] = made
        return function

    return register


# --- the formulas -----------------------------------------------------------------------------------------------------


def sample(mu: Number, scale: Scale, noise: Tensor) -> Tensor:
    """z = mu + sigma * noise."""
    z: Tensor = mu + scale.root * noise
    return z


def kl_standard_normal_at_sample(z: Tensor, noise: Tensor, scale: Scale) -> Tensor:
    """log q(z) - log p(z) = (z^2 - noise^2 - log sigma^2) / 2, per element, with p = N(0, 1).

    Source: Burda et al. 2016 (arXiv:1509.00519).
    """
    value: Tensor = 0.5 * ((z - noise) * (z + noise) - scale.log)
    return value


@formula("mu", "logvar", pairs=[("mu", "logvar")], is_divergence=True, at_sample=kl_standard_normal_at_sample)
def kl_standard_normal(mu: Tensor, scale: Scale) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)) = (mu^2 + sigma^2 - 1 - log sigma^2) / 2, per element.

    Source: Kingma & Welling 2014 (arXiv:1312.6114), appendix B.
    """
    value: Tensor = 0.5 * (mu.square() + (scale.minus_1 - scale.log))
    return value


def kl_normal_at_sample(z: Tensor, noise: Tensor, scale: Scale, prior_mu: Number, prior: Scale) -> Tensor:
    """log q(z) - log p(z) = (log sigma_p^2 - log sigma^2 - noise^2 + (z - mu_p)^2 / sigma_p^2) / 2, per element.

    Source: Burda et al. 2016 (arXiv:1509.00519).
    """
    value: Tensor = 0.5 * (((z - prior_mu).square() * prior.inverse - noise.square()) - (scale.log - prior.log))
    return value


@formula(
    "mu",
    "logvar",
    "prior_mu",
    "prior_logvar",
    pairs=[("mu", "logvar"), ("prior_mu", "prior_logvar")],
    is_divergence=True,
    at_sample=kl_normal_at_sample,
)
def kl_normal(mu: Tensor, scale: Scale, prior_mu: Number, prior: Scale) -> Tensor:
    """KL(N(mu, sigma^2) || N(mu_p, sigma_p^2)), per element.

    (sigma^2 / sigma_p^2 - 1 - d + (mu - mu_p)^2 / sigma_p^2) / 2 with d = log sigma^2 - log sigma_p^2. Source: Kingma &
    Welling 2014 (arXiv:1312.6114), appendix B, for any two normal distributions.
    """
    difference = scale.log - prior.log
    if scale.has_log and prior.has_log:
        growth = _expm1(difference)
    else:
        # Logarithms that were each rounded would not cancel what the ratio is more than 1.
        ratio = torch.as_tensor(scale.value, dtype=mu.dtype, device=mu.device) / prior.value
        is_usual = (ratio > 1e-30) & (ratio < 1e30)
        difference = torch.where(is_usual, torch.log(torch.where(is_usual, ratio, 1.0)), difference)
        growth = ratio - 1.0
    value: Tensor = 0.5 * ((growth - difference) + (mu - prior_mu).square() * prior.inverse)
    return value


@formula(
    "recon_x",
    "x",
    "recon_logvar",
    pairs=[("recon_x", "recon_logvar")],
    likelihood="gaussian",
    constant=HALF_LOG_2PI,
)
def gaussian_nll(recon_x: Tensor, x: Tensor, scale: Scale) -> Tensor:
    """(log sigma^2 + (recon_x - x)^2 / sigma^2) / 2, per element, without the constant log(2 pi) / 2.

    Source: Kingma & Welling 2014 (arXiv:1312.6114), appendix C.2.
    """
    half_square, log = 0.5 * (recon_x - x).square(), scale.log
    if not isinstance(log, Tensor) and log == 0.0:
        return half_square
    return 0.5 * log + half_square * scale.inverse


@formula(
    "recon_x",
    "x",
    "log_scale",
    "extra",
    pairs=[("recon_x", "log_scale")],
    forms=LAPLACE_FORMS,
    likelihood="laplace",
    constant=math.log(2),
)
def laplace_nll(recon_x: Tensor, x: Tensor, scale: Scale, extra: Number) -> Tensor:
    """(abs(recon_x - x) + extra) / b + log b, per element, without the constant log 2.

    Source: Kotz, Kozubowski & Podgórski 2001, "The Laplace distribution and generalizations", section 2.1; `extra`, a
    perceptual loss that is divided by the scale with the absolute error: Esser et al. 2021 (arXiv:2012.09841).
    """
    return ((recon_x - x).abs() + extra) * scale.inverse + scale.log


@formula("recon_x", "x", "pos_weight", likelihood="bernoulli")
def bernoulli_nll(recon_x: Tensor, x: Tensor, pos_weight: Number) -> Tensor:
    """softplus(a) - x a of the logits a = recon_x, per element; the part of x counts ``pos_weight`` times.

    (1 - x) a + (1 + (pos_weight - 1) x) softplus(-a), or for a < 0, where those cancel, -pos_weight x a +
    (1 + (pos_weight - 1) x) softplus(a). Source: Kingma & Welling 2014 (arXiv:1312.6114), appendix C.1;
    torch.nn.functional.binary_cross_entropy_with_logits.
    """
    is_negative = recon_x < 0
    one = torch.ones_like(recon_x)
    lead = torch.where(is_negative, 0.0, one) - torch.where(is_negative, pos_weight, one) * x
    tail = _softplus(torch.where(is_negative, recon_x, -recon_x))
    return lead * recon_x + (1.0 + (pos_weight - 1.0) * x) * tail


@formula("recon_x", "x", likelihood="bernoulli_probs")
def bernoulli_nll_of_probabilities(recon_x: Tensor, x: Tensor) -> Tensor:
    """-x log p - (1 - x) log(1 - p) of the probabilities p = recon_x, per element, no logarithm below -100.

    The derivative is (p - x) / (p (1 - p)), that product no less than 1e-12. Source:
    torch.nn.functional.binary_cross_entropy.
    """
    hit, miss = torch.log(recon_x).clamp(min=-100.0), torch.log1p(-recon_x).clamp(min=-100.0)
    value = (x - 1.0) * miss - x * hit
    # Next to 0 and 1 the derivative is another's: of a straight line through this point.
    steep = recon_x * (1.0 - recon_x) < 1e-12
    inside = torch.where(steep, 0.5, recon_x)
    curve = (x - 1.0) * torch.log1p(-inside) - x * torch.log(inside)
    at = recon_x.detach()
    line = (recon_x - at) * (at - x.detach()) * 1e12 + (x - x.detach()) * (miss - hit).detach() + value.detach()
    return torch.where(steep, line, curve)


@formula("recon_x", "x", likelihood="mse", constant=0.5 * math.log(math.pi))
def mse(recon_x: Tensor, x: Tensor) -> Tensor:
    """(recon_x - x)^2, per element: torch.nn.functional.mse_loss.

    The Gaussian of variance 1/2, without the constant log(pi) / 2.
    """
    return (recon_x - x).square()


@formula("recon_x", "x", likelihood="l1", constant=math.log(2))
def l1(recon_x: Tensor, x: Tensor) -> Tensor:
    """abs(recon_x - x), per element: torch.nn.functional.l1_loss.

    The Laplace distribution of scale 1, without the constant log 2.
    """
    return (recon_x - x).abs()


def _log_of_ratio(ratio: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """log(1 + t) and t - log(1 + t) of a ratio 1 + t."""
    is_near = t.abs() < 0.5
    log = torch.where(is_near, torch.log1p(torch.where(is_near, t, 0.0)), torch.log(torch.where(is_near, 1.0, ratio)))
    return log, t - log


def _binet(z: Tensor) -> Tensor:
    """ln gamma(z) - (z - 1/2) ln z + z - ln(2 pi) / 2 for z >= 1, what Stirling's formula leaves out.

    Source of the series: Abramowitz & Stegun 1964, 6.1.40.
    """
    is_small = z < (16.0 if z.dtype == torch.float64 else 4.0)
    small, inverse = torch.where(is_small, z, 1.0), 1.0 / torch.where(is_small, 16.0, z)
    y, series = inverse.square(), torch.zeros_like(z)
    for coefficient in (1 / 1188, -1 / 1680, 1 / 1260, -1 / 360, 1 / 12):
        series = series * y + coefficient
    below = torch.lgamma(small) - (small - 0.5) * torch.log(small) + (small - HALF_LOG_2PI)
    return torch.where(is_small, below, inverse * series)


def _known(value: Tensor, is_known: Tensor) -> Tensor:
    """The value, and NaN in it and its derivatives where it is not known."""
    return value * torch.where(is_known, 1.0, torch.nan).to(value.dtype)


@formula("rate", "x", scales=["rate"], forms=RATE_FORMS, likelihood="poisson", in_full="poisson_nll_in_full")
def poisson_nll(rate: Scale, x: Tensor) -> Tensor:
    """rate - x log rate, per element, without log x!: torch.nn.functional.poisson_nll_loss."""
    value: Tensor = rate.value - x * rate.log
    return value


@formula("rate", "x", scales=["rate"], forms=RATE_FORMS)
def poisson_nll_in_full(rate: Scale, x: Tensor) -> Tensor:
    """rate - x log rate + log x!, per element: -torch.distributions.Poisson(rate).log_prob(x). NaN for x < 0.

    These cancel where x is near the rate. By Stirling's formula of k = x + 1, with r = rate / k and Binet's function b:
    k (r - 1 - log r) + log r + log(2 pi k) / 2 + b(k). Source of the method: Loader 2000, "Fast and accurate
    computation of binomial probabilities".
    """
    k = x + 1.0
    t, log_k = (rate.value - k) / k, torch.log(k)
    is_near = t.abs() < 0.5
    near = torch.where(is_near, t, 0.0)
    log_near, log_far = torch.log1p(near), rate.log - log_k
    gap = torch.where(is_near, k * (near - log_near), (rate.value - k) - k * log_far)
    value = gap + torch.where(is_near, log_near, log_far) + (0.5 * log_k + HALF_LOG_2PI) + _binet(k)
    # Where there is one term, nothing of it is lost. Its first two derivatives by x are the other's.
    at_zero = rate.value - x * (rate.log - torch.digamma(1.0 + 0.5 * torch.where(x == 0, x, 0.0)))
    return _known(torch.where(x == 0, at_zero, value), x >= 0)


@formula(
    "mu",
    "x",
    "theta",
    pairs=[("mu", "theta")],
    forms=DISPERSION_FORMS,
    likelihood="negative_binomial",
)
def negative_binomial_nll(mu: Tensor, x: Tensor, scale: Scale) -> Tensor:
    """-log NB(x; mean mu, inverse dispersion theta), log x! included, per element; scvi-tools' log_nb_positive.

    theta log(s / (theta + eps)) + x log(s / (mu + eps)) - lgamma(x + theta) + lgamma(theta) + lgamma(x + 1), with s =
    theta + mu + eps and eps = 1e-8. NaN but for finite mu >= 0, theta > 0, x >= 0. Log-gamma functions of a large theta
    would cancel, all but a part in a million: csrc/math/negative_binomial.h says what is computed. Sources: Lopez et
    al. 2018 (doi:10.1038/s41592-018-0229-2); Loader 2000, "Fast and accurate computation of binomial probabilities".
    """
    theta, eps = torch.as_tensor(scale.value, dtype=x.dtype, device=x.device), COUNT_EPS
    mu, x, theta = torch.broadcast_tensors(mu, x, theta)
    is_known = (mu >= 0) & (mu < math.inf) & (theta > 0) & (theta < math.inf) & (x >= 0) & (x < math.inf)
    low = (theta < 1).to(x.dtype)
    k, t, m, total = x + 1.0, theta + low, mu + eps, x + theta
    n, s = x + t, theta + m
    more = theta / t * ((x - mu) / s) + (eps * x - low * mu) / t / s
    log_v, gap_v = _log_of_ratio((theta + eps) / t * (n / s), more)
    log_w, gap_w = _log_of_ratio(m / s * (n / k), (theta / s * (m - k) - (1.0 - low) * (m / s)) / k)
    high_part = (theta * gap_v + k * gap_w) + (log_w - eps * (total / s)) + 0.5 * torch.log(k * (n / t))
    above = torch.where(low > 0, total / theta, 1.0)
    low_part = -(theta * log_v + x * log_w) - 1.0 + 0.5 * torch.log(k * (t / n)) + torch.log(above)
    others = HALF_LOG_2PI + (_binet(k) + (_binet(t) - _binet(n)))
    value = torch.where(low > 0, low_part, high_part) + others
    # Of x = 0 there is one term. Its first two derivatives by x are the other's.
    half = 0.5 * torch.where(x == 0, x, 0.0)
    d_x = torch.log(s / m) - torch.digamma(torch.where(x == 0, theta, 1.0) + half) + torch.digamma(1.0 + half)
    at_zero = theta * torch.log1p(mu / (theta + eps)) + x * d_x
    return _known(torch.where(x == 0, at_zero, value), is_known)


@formula(
    "mu",
    "x",
    "theta",
    "zi_logits",
    pairs=[("mu", "theta")],
    forms=DISPERSION_FORMS,
    likelihood="zero_inflated_negative_binomial",
)
def zero_inflated_negative_binomial_nll(mu: Tensor, x: Tensor, scale: Scale, zi_logits: Number) -> Tensor:
    """-log((1 - p) NB(x)), and where x < 1e-8 of p + (1 - p) NB(0), with p = sigmoid(zi_logits), per element.

    scvi-tools' log_zinb_positive. Source: Lopez et al. 2018 (doi:10.1038/s41592-018-0229-2).
    """
    a = torch.as_tensor(zi_logits, dtype=x.dtype, device=x.device)
    is_zero = ((x < COUNT_EPS) & (x >= 0)).expand(mu.shape)
    nb = negative_binomial_nll(mu, torch.where(is_zero, torch.zeros_like(x), x), scale)
    dropout = _softplus(a)
    # log(p + (1 - p) e^-nb) = log(1 + lost), or where hardly anything is left of the 1, log(e^a + e^-nb) - dropout.
    lost = torch.sigmoid(-a) * torch.expm1(-nb)
    is_near = lost > -0.5
    of_zero = torch.where(
        is_near,
        -torch.log1p(torch.where(is_near, lost, 0.0)),
        dropout - torch.logaddexp(*torch.broadcast_tensors(a, -nb)),
    )
    return torch.where(is_zero, of_zero, nb + dropout)


@formula(
    "recon_x",
    "x",
    "log_scale",
    pairs=[("recon_x", "log_scale")],
    forms=LAPLACE_FORMS,
    likelihood="discretized_logistic",
)
def discretized_logistic_nll(recon_x: Tensor, x: Tensor, scale: Scale) -> Tensor:
    """-log of the logistic distribution's mass in x's bin of 256 in [-1, 1], those at the ends open, per element.

    With the bin's edges (x +- 1/255 - recon_x) / s: softplus(-upper) + softplus(lower) - log(1 - e^-(upper - lower)); a
    bin that is open lacks what the absent edge has in it. Source: Salimans et al. 2017 (arXiv:1701.05517), section 2.1,
    whose approximation of narrow bins is the limit of this.
    """
    half = 1.0 / 255
    error, inverse = x - recon_x, scale.inverse
    above = _softplus(-((error + half) * inverse))
    below = _softplus((error - half) * inverse)
    width, log = (torch.as_tensor(t, dtype=x.dtype, device=x.device) for t in (2 * half * inverse, scale.log))
    is_narrow = width < 1e-4
    narrow = math.log(2 * half) - log + width * (width / 24 - 0.5)
    log_mass = torch.where(is_narrow, narrow, torch.log(-torch.expm1(-torch.where(is_narrow, 1.0, width))))
    is_first, is_last = x < -0.999, x > 0.999
    value = torch.where(is_last, 0.0, above) + torch.where(is_first, 0.0, below)
    return value - torch.where(is_first | is_last, 0.0, log_mass)
