"""The formulas in Triton, with their registry: they compute what those of csrc/math/ do.

A function a formula, its name that of the formula. It takes four inputs, a weight, and the forms of its scales in their
order (see `codes`), the numbers in the dtype of the arithmetic; it ignores what the formula has not. ``eps0`` is what
the first form adds; the bounds of an input are not the formula's concern. It returns the value, and the derivatives by
the four inputs times the weight: 0 by those that it ignores.

Everything here works element by element, on blocks of any shapes that broadcast to one: what is derived of one input
alone is derived once where that is broadcast.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import (
    binet,
    divide,
    exponential,
    log_of_ratio,
    logarithm,
    logarithm_of_1_plus,
    root,
    sigma_and_expm1,
    softplus,
)
from .scales import LOG, MAP, ROUGH, SQUARED, base_of, log_of, scale_log_of, scale_of, through


@triton.jit
def gaussian_nll(recon_x, x, spread, in3, weight, form0: tl.constexpr, eps0, form1: tl.constexpr, eps1):
    """(l + (recon_x - x)^2 * e^-l) / 2 with l the logarithm of the variance.

    Source: Kingma & Welling 2014 (arXiv:1312.6114), appendix C.2.
    """
    log, precision, slope = scale_of(spread, -1, form0, eps0)
    error = recon_x - x
    pull = error * precision
    half_square = (0.5 * error) * pull
    d_recon_x = weight * pull
    d_spread = through(weight * (0.5 - half_square), slope, form0)
    return 0.5 * log + half_square, d_recon_x, -d_recon_x, d_spread, 0.0


@triton.jit
def laplace_nll(recon_x, x, spread, extra, weight, form0: tl.constexpr, eps0, form1: tl.constexpr, eps1):
    """(abs(recon_x - x) + extra) / b + log b with b the scale.

    Source: Kotz, Kozubowski & Podgórski 2001, "The Laplace distribution and generalizations", section 2.1.
    """
    log, inverse, slope = scale_of(spread, -1, form0, eps0)
    pull = weight * inverse
    distance, d_recon_x = absolute_error(recon_x, x, pull)
    relative = (distance + extra) * inverse
    d_spread = through(weight - weight * relative, slope, form0)
    return relative + log, d_recon_x, -d_recon_x, d_spread, pull


@triton.jit
def bernoulli_nll(recon_x, x, pos_weight, in3, weight, form0: tl.constexpr, eps0, form1: tl.constexpr, eps1):
    """softplus(a) - x a of logits a = recon_x; the part of x counts pos_weight times.

    (1 - x) a + (1 + (pos_weight - 1) x) softplus(-a), of a < 0 without a difference: see csrc/math/bernoulli.h. Source:
    Kingma & Welling 2014 (arXiv:1312.6114), appendix C.1.
    """
    more, is_negative = pos_weight - 1.0, recon_x < 0.0
    share, by_x = more * x + 1.0, tl.where(is_negative, -pos_weight, -1.0)
    lead = tl.where(is_negative, by_x * x, 1.0 - x)
    tail, d_tail = softplus(tl.where(is_negative, recon_x, -recon_x))
    d_recon_x = weight * (lead + tl.where(is_negative, share, -share) * d_tail)
    d_pos_weight = weight * tl.where(is_negative, x * tail - x * recon_x, x * tail)
    return lead * recon_x + share * tail, d_recon_x, weight * (by_x * recon_x + more * tail), d_pos_weight, 0.0


@triton.jit
def bernoulli_nll_of_probabilities(recon_x, x, in2, in3, weight, form0: tl.constexpr, eps0, form1: tl.constexpr, eps1):
    """-x log p - (1 - x) log(1 - p) of probabilities p = recon_x.

    No logarithm is below -100, and p (1 - p) not below 1e-12 in the derivative, as PyTorch has it. Source: as above.
    """
    hit, miss = logarithm(recon_x), logarithm_of_1_plus(-recon_x)
    hit, miss = tl.where(hit < -100.0, -100.0, hit), tl.where(miss < -100.0, -100.0, miss)
    both = (1.0 - recon_x) * recon_x
    d_recon_x = divide(weight * (recon_x - x), tl.where(both < 1e-12, 1e-12, both))
    return (x - 1.0) * miss - x * hit, d_recon_x, weight * (miss - hit), 0.0, 0.0


@triton.jit
def mse(recon_x, x, in2, in3, weight, form0: tl.constexpr, eps0, form1: tl.constexpr, eps1):
    """(recon_x - x)^2."""
    error = recon_x - x
    d_recon_x = (weight + weight) * error
    return error * error, d_recon_x, -d_recon_x, 0.0, 0.0


@triton.jit
def l1(recon_x, x, in2, in3, weight, form0: tl.constexpr, eps0, form1: tl.constexpr, eps1):
    """abs(recon_x - x)."""
    distance, d_recon_x = absolute_error(recon_x, x, weight)
    return distance, d_recon_x, -d_recon_x, 0.0, 0.0


@triton.jit
def discretized_logistic_nll(recon_x, x, spread, in3, weight, form0: tl.constexpr, eps0, form1: tl.constexpr, eps1):
    """-log of the logistic distribution's mass in x's bin, one of 256 in [-1, 1], of which those at the ends are open.

    softplus(-upper) + softplus(lower) - log(1 - e^-width), with edges (x +- 1/255 - recon_x) / s; an open bin lacks
    what the absent edge has in it. Source: Salimans et al. 2017 (arXiv:1701.05517), section 2.1.
    """
    log, inverse, slope = scale_of(spread, -1, form0, eps0)
    width = inverse * (2.0 / 255.0)
    _, fall = sigma_and_expm1(-width, False)
    is_narrow = width < 1e-4
    narrow = (-4.8481163645984613 - log) + (width * (1.0 / 24.0) - 0.5) * width  # log(2 / 255)
    log_mass = tl.where(is_narrow, narrow, logarithm(tl.where(is_narrow, 1.0, -fall)))
    d_wide = divide(width * (fall + 1.0), tl.where(is_narrow, 1.0, -fall))
    d_log_mass = tl.where(is_narrow, 1.0 + (width * (1.0 / 12.0) - 0.5) * width, tl.where(width > 100.0, 0.0, d_wide))
    error = x - recon_x
    is_first, is_last = x < -0.999, x > 0.999
    is_open = is_first | is_last
    upper, lower = (error + 1.0 / 255.0) * inverse, (error - 1.0 / 255.0) * inverse
    above, d_above = softplus(-upper)
    below, d_below = softplus(lower)
    d_above, d_below = tl.where(is_last, 0.0, d_above), tl.where(is_first, 0.0, d_below)
    value = tl.where(is_last, 0.0, above) + tl.where(is_first, 0.0, below) - tl.where(is_open, 0.0, log_mass)
    d_recon_x = (weight * inverse) * (d_above - d_below)
    moved = tl.where(d_above == 0.0, 0.0, upper * d_above) - tl.where(d_below == 0.0, 0.0, lower * d_below)
    d_spread = through(weight * (moved + tl.where(is_open, 0.0, d_log_mass)), slope, form0)
    return value, d_recon_x, -d_recon_x, d_spread, 0.0


@triton.jit
def poisson_nll(spread, x, in2, in3, weight, form0: tl.constexpr, eps0, form1: tl.constexpr, eps1):
    """rate - x log rate, by the rate: torch.nn.functional.poisson_nll_loss."""
    log, rate, slope = scale_of(spread, 1, form0, eps0)
    return rate - x * log, through(weight * (rate - x), slope, form0), -(weight * log), 0.0, 0.0


@triton.jit
def poisson_nll_in_full(spread, x, in2, in3, weight, form0: tl.constexpr, eps0, form1: tl.constexpr, eps1):
    """rate - x log rate + log x!, put together from small terms: see csrc/math/poisson.h."""
    log, rate, slope = scale_of(spread, 1, form0, eps0)
    next = x + 1.0
    inverse = divide(tl.full((), 1.0, x.dtype), next)
    log_next = logarithm(next)
    t = (rate - next) * inverse
    log_ratio, gap = log_of_ratio(rate * inverse, t)
    is_usual = (rate > 1e-30) & (rate < 1e30)
    log_ratio = tl.where(is_usual, log_ratio, log - log_next)
    gap = tl.where(is_usual, gap, t - log_ratio)
    rest, d_rest = binet(inverse)
    value = (next * gap + log_ratio) + ((0.5 * log_next + 0.91893853320467274) + rest)
    of_0 = tl.where(rate >= 0.0, rate, float("nan"))
    value = tl.where(x == 0.0, of_0, tl.where(x >= 0.0, value, float("nan")))
    return (
        value,
        through(weight * (rate - x), slope, form0),
        weight * ((d_rest - 0.5 * inverse) - log_ratio),
        0.0,
        0.0,
    )


@triton.jit
def negative_binomial(mu, x, theta):
    """-log NB(x; mu, theta), and its derivatives by mu, x and theta: see csrc/math/negative_binomial.h."""
    one = tl.full((), 1.0, x.dtype)
    is_low = theta < 1.0
    low = tl.where(is_low, one, 0.0)
    k, t, m, total = x + 1.0, theta + low, mu + 1e-8, x + theta
    n, s = x + t, theta + m
    k_inverse, t_inverse, n_inverse, s_inverse = divide(one, k), divide(one, t), divide(one, n), divide(one, s)
    total_inverse = divide(low, total)
    log_v, gap_v = log_of_ratio(
        ((theta + 1e-8) * t_inverse) * (n * s_inverse),
        (theta * t_inverse) * ((x - mu) * s_inverse) + ((1e-8 * x - low * mu) * t_inverse) * s_inverse,
    )
    log_w, gap_w = log_of_ratio(
        (m * s_inverse) * (n * k_inverse),
        ((theta * s_inverse) * (m - k) - (1.0 - low) * (m * s_inverse)) * k_inverse,
    )
    spread = root(6.28318530717958648 * k * tl.where(is_low, t * n_inverse, n * t_inverse))
    log_spread = logarithm(tl.where(is_low, spread * divide(total, theta), spread))
    of_k, d_k = binet(k_inverse)
    of_t, d_t = binet(t_inverse)
    of_n, d_n = binet(n_inverse)
    slopes = tl.where(x == 0.0, 0.0, d_n - d_t)  # of two that are equal, one may be rounded once more
    high_part = (theta * gap_v + k * gap_w) + (log_w - 1e-8 * (total * s_inverse))
    low_part = -(theta * log_v + x * log_w) - 1.0
    value = tl.where(is_low, low_part, high_part) + (log_spread + (of_k + (of_t - of_n)))
    d_mu = (theta * s_inverse) * divide(m - x, m)
    d_theta = (gap_v + (low - 1e-8) * (x * t_inverse) * s_inverse + divide(1e-8 * (mu * s_inverse), theta + 1e-8)) - (
        (0.5 * x * n_inverse) * t_inverse + slopes + divide(x * total_inverse, theta)
    )
    d_x = (d_k - d_n) - 0.5 * (k_inverse - n_inverse) - log_w + total_inverse
    # 1 of what is finite and in its range; 0 times an infinity is NaN.
    known = tl.where(mu >= 0.0, 1.0 + 0.0 * mu, float("nan")) * tl.where(x >= 0.0, 1.0 + 0.0 * x, float("nan"))
    known = known * tl.where(theta > 0.0, 1.0 + 0.0 * theta, float("nan"))
    return known * tl.where(x == 0.0, -theta * log_v, value), known * d_mu, known * d_x, known * d_theta


@triton.jit
def negative_binomial_nll(mu, x, spread, in3, weight, form0: tl.constexpr, eps0, form1: tl.constexpr, eps1):
    """-log NB(x; mu, theta), by mean and inverse dispersion, as scvi-tools has it.

    Source: Lopez et al. 2018 (doi:10.1038/s41592-018-0229-2).
    """
    _, theta, slope = scale_of(spread, 1, form0, eps0)
    value, d_mu, d_x, d_theta = negative_binomial(mu, x, theta)
    return value, weight * d_mu, weight * d_x, through(weight * (d_theta * theta), slope, form0), 0.0


@triton.jit
def zero_inflated_negative_binomial_nll(
    mu, x, spread, zi_logits, weight, form0: tl.constexpr, eps0, form1: tl.constexpr, eps1
):
    """-log of (1 - p) NB(x), and for x < 1e-8 of p + (1 - p) NB(0), with the logits of p.

    Source: as above; csrc/math/negative_binomial.h says what is computed.
    """
    _, theta, slope = scale_of(spread, 1, form0, eps0)
    is_zero = (x < 1e-8) & (x >= 0.0)
    nb, d_mu, d_x, d_theta = negative_binomial(mu, tl.where(is_zero, 0.0, x), theta)
    dropout, d_dropout = softplus(zi_logits)
    _, kept = softplus(-zi_logits)
    _, fall = sigma_and_expm1(-nb, False)
    lost, reached = kept * fall, zi_logits + nb
    is_near = lost > -0.5
    smaller = exponential(tl.where(reached < 0.0, reached, -reached))
    log = logarithm_of_1_plus(tl.where(is_near, lost, smaller))
    of_zero = tl.where(is_near, -log, (dropout - tl.where(reached < 0.0, -nb, zi_logits)) - log)
    half = divide(tl.full((), 1.0, x.dtype), 1.0 + smaller)
    share, rest = tl.where(reached < 0.0, half, smaller * half), tl.where(reached < 0.0, smaller * half, half)
    d_zi_logits = tl.where(is_near, divide(lost * d_dropout, tl.where(is_near, 1.0 + lost, 1.0)), d_dropout - rest)
    of_nb = weight * tl.where(is_zero, share, 1.0)
    return (
        tl.where(is_zero, of_zero, nb + dropout),
        of_nb * d_mu,
        tl.where(is_zero, 0.0, of_nb * d_x),
        through(of_nb * (d_theta * theta), slope, form0),
        weight * tl.where(is_zero, d_zi_logits, d_dropout),
    )


@triton.jit
def absolute_error(recon_x, x, weight):
    """abs(recon_x - x), and its derivative by recon_x times a weight: 0 at 0 and at NaN, as PyTorch has it."""
    error = recon_x - x
    d_recon_x = tl.where(error > 0.0, weight, tl.where(error < 0.0, -weight, 0.0 * weight))
    return tl.where(error < 0.0, -error, error), d_recon_x


@triton.jit
def kl_standard_normal(mu, spread, in2, in3, weight, form0: tl.constexpr, eps0, form1: tl.constexpr, eps1):
    """KL(N(mu, sigma^2) || N(0, 1)) = (mu^2 + sigma^2 - 1 - log sigma^2) / 2.

    Source: Kingma & Welling 2014 (arXiv:1312.6114), appendix B.
    """
    if MAP & form0 == LOG:
        log, slope = log_of(spread, form0)
        _, growth = sigma_and_expm1(log, ROUGH & form0)
    else:
        log, _, slope = scale_of(spread, 1, form0, eps0)
        base, _ = base_of(spread, form0, eps0)
        growth = base - 1.0  # near 1 to the last digit, which its square has not
        if SQUARED & form0:
            growth = growth * (base + 1.0)
    value = 0.5 * (mu * mu + (growth - log))
    return value, weight * mu, through(weight * (0.5 * growth), slope, form0), 0.0, 0.0


@triton.jit
def kl_normal(mu, spread, prior_mu, prior_spread, weight, form0: tl.constexpr, eps0, form1: tl.constexpr, eps1):
    """KL(N(mu, sigma^2) || N(prior_mu, prior_sigma^2)).

    (e^d - 1 - d + (mu - prior_mu)^2 / prior_sigma^2) / 2 with d = log sigma^2 - log prior_sigma^2. Source: as above,
    for any two normal distributions.
    """
    if (MAP & form0 == LOG) and (MAP & form1 == LOG):
        log, slope = log_of(spread, form0)
        prior_log, precision, prior_slope = scale_of(prior_spread, -1, form1, eps1)
        difference = log - prior_log
        _, growth = sigma_and_expm1(difference, False)
    else:
        log, variance, slope = scale_of(spread, 1, form0, eps0)
        if MAP & form1 == LOG:
            prior_log, precision, prior_slope = scale_of(prior_spread, -1, form1, eps1)
            ratio = variance * precision
        else:
            prior_log, prior_variance, prior_slope = scale_of(prior_spread, 2, form1, eps1)
            precision = divide(tl.full((), 1.0, prior_variance.dtype), prior_variance)
            ratio = divide(variance, prior_variance)
        # Logarithms that were each rounded would not cancel what the ratio is more than 1.
        is_usual = (ratio > 1e-30) & (ratio < 1e30)
        difference = tl.where(is_usual, logarithm(tl.where(is_usual, ratio, 1.0)), log - prior_log)
        growth = ratio - 1.0
    error = mu - prior_mu
    pull = error * precision
    square = error * pull
    value = 0.5 * ((growth - difference) + square)
    d_mu, half_weight = weight * pull, 0.5 * weight
    d_spread = through(half_weight * growth, slope, form0)
    return value, d_mu, d_spread, -d_mu, through(-(half_weight * (growth + square)), prior_slope, form1)


@triton.jit
def formula_element(
    formula: tl.constexpr, in0, in1, in2, in3, weight, form0: tl.constexpr, eps0, form1: tl.constexpr, eps1
):
    """The registry: what the formula of that name returns."""
    if formula == "gaussian_nll":
        value, d0, d1, d2, d3 = gaussian_nll(in0, in1, in2, in3, weight, form0, eps0, form1, eps1)
    elif formula == "laplace_nll":
        value, d0, d1, d2, d3 = laplace_nll(in0, in1, in2, in3, weight, form0, eps0, form1, eps1)
    elif formula == "bernoulli_nll":
        value, d0, d1, d2, d3 = bernoulli_nll(in0, in1, in2, in3, weight, form0, eps0, form1, eps1)
    elif formula == "bernoulli_nll_of_probabilities":
        value, d0, d1, d2, d3 = bernoulli_nll_of_probabilities(in0, in1, in2, in3, weight, form0, eps0, form1, eps1)
    elif formula == "mse":
        value, d0, d1, d2, d3 = mse(in0, in1, in2, in3, weight, form0, eps0, form1, eps1)
    elif formula == "l1":
        value, d0, d1, d2, d3 = l1(in0, in1, in2, in3, weight, form0, eps0, form1, eps1)
    elif formula == "poisson_nll":
        value, d0, d1, d2, d3 = poisson_nll(in0, in1, in2, in3, weight, form0, eps0, form1, eps1)
    elif formula == "poisson_nll_in_full":
        value, d0, d1, d2, d3 = poisson_nll_in_full(in0, in1, in2, in3, weight, form0, eps0, form1, eps1)
    elif formula == "negative_binomial_nll":
        value, d0, d1, d2, d3 = negative_binomial_nll(in0, in1, in2, in3, weight, form0, eps0, form1, eps1)
    elif formula == "zero_inflated_negative_binomial_nll":
        value, d0, d1, d2, d3 = zero_inflated_negative_binomial_nll(
            in0, in1, in2, in3, weight, form0, eps0, form1, eps1
        )
    elif formula == "discretized_logistic_nll":
        value, d0, d1, d2, d3 = discretized_logistic_nll(in0, in1, in2, in3, weight, form0, eps0, form1, eps1)
    elif formula == "kl_standard_normal":
        value, d0, d1, d2, d3 = kl_standard_normal(in0, in1, in2, in3, weight, form0, eps0, form1, eps1)
    elif formula == "kl_normal":
        value, d0, d1, d2, d3 = kl_normal(in0, in1, in2, in3, weight, form0, eps0, form1, eps1)
    else:
        tl.static_assert(False, "there is no such formula")
    return value, d0, d1, d2, d3


# --- divergences at a sample: Burda, Grosse & Salakhutdinov 2016 (arXiv:1509.00519) -----------------------------------
#
# log q(z) - log p(z) at the sample z = mu + sigma * noise: what has the divergence for its mean. These take z and its
# noise too. Their derivatives by the inputs are those where z stays the same; behind them comes that by z.


@triton.jit
def kl_standard_normal_at_sample(
    mu, spread, in2, in3, z, noise, weight, form0: tl.constexpr, eps0, form1: tl.constexpr, eps1
):  # fmt: skip
    """(z^2 - noise^2 - log sigma^2) / 2."""
    log, slope = scale_log_of(spread, form0, eps0)
    value = 0.5 * ((z - noise) * (z + noise) - log)
    return value, 0.0, through(-0.5 * weight, slope, form0), 0.0, 0.0, weight * z


@triton.jit
def kl_normal_at_sample(
    mu, spread, prior_mu, prior_spread, z, noise, weight, form0: tl.constexpr, eps0, form1: tl.constexpr, eps1
):  # fmt: skip
    """(log prior_sigma^2 - log sigma^2 - noise^2 + (z - prior_mu)^2 / prior_sigma^2) / 2."""
    log, slope = scale_log_of(spread, form0, eps0)
    prior_log, precision, prior_slope = scale_of(prior_spread, -1, form1, eps1)
    error = z - prior_mu
    pull = error * precision
    square = error * pull
    value = 0.5 * ((square - noise * noise) - (log - prior_log))
    half_weight, d_z = 0.5 * weight, weight * pull
    d_spread = through(-half_weight, slope, form0)
    d_prior_spread = through(half_weight - half_weight * square, prior_slope, form1)
    return value, 0.0, d_spread, -d_z, d_prior_spread, d_z


@triton.jit
def element_at_sample(
    formula: tl.constexpr, in0, in1, in2, in3, z, noise, weight, form0: tl.constexpr, eps0, form1: tl.constexpr, eps1
):  # fmt: skip
    """The registry: what the divergence of that name returns at a sample."""
    if formula == "kl_standard_normal":
        value, d0, d1, d2, d3, d_z = kl_standard_normal_at_sample(
            in0, in1, in2, in3, z, noise, weight, form0, eps0, form1, eps1
        )  # fmt: skip
    elif formula == "kl_normal":
        value, d0, d1, d2, d3, d_z = kl_normal_at_sample(
            in0, in1, in2, in3, z, noise, weight, form0, eps0, form1, eps1
        )  # fmt: skip
    else:
        tl.static_assert(False, "there is no such divergence")
    return value, d0, d1, d2, d3, d_z
