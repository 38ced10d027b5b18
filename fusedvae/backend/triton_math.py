"""The formulas in Triton: those of the terms with their registry, that of the sample, and the noise.

They compute what those of csrc/math/ do. Below them is the arithmetic that csrc/cpu/simd.h has for CPUs. Triton's own
exp and sincos are fast approximations (whose error grows with the argument) or use local memory, and have no expm1;
these are as accurate as the CPU's, but that results below the smallest normal float32 may be 0. They have no branches
and no tests for what cannot come: a memory-bound kernel on an H100 has time for some 100 instructions an element.

Everything here works element by element, on blocks of any shapes that broadcast to one: what is derived of one input
alone is derived once where that is broadcast.
"""

from __future__ import annotations

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda.libdevice import fast_cosf, fast_log2f, fast_sinf
except ImportError:  # a Triton without NVIDIA's part, which does not ask for them
    fast_cosf = fast_log2f = fast_sinf = None

# --- the formulas of the terms ----------------------------------------------------------------------------------------
#
# A function a formula, its name that of the formula. It takes four inputs, a weight, and the forms of its scales in
# their order, the numbers in the dtype of the arithmetic; it ignores what the formula has not. It returns the value,
# and the derivatives by the four inputs times the weight: 0 by those that it ignores.
#
# A form says how a scale is made of an input: a map, as `reference.Form` has it, or LOG where the logarithm that the
# formula is written in comes without a detour (e^x, nothing added); and SQUARED, where that gives a deviation. ``eps``
# is the form's. The bounds of an input are not the formula's concern. ROUGH says that what comes of a logarithm beside
# a sample is rounded to bfloat16, which keeps 8 bits: some 20 are enough then, and the chip's own functions have them.

LOG = tl.constexpr(0)
EXPONENTIAL = tl.constexpr(1)
LINEAR = tl.constexpr(2)
SOFTPLUS = tl.constexpr(3)
BOUNDED = tl.constexpr(4)
MAP = tl.constexpr(7)
SQUARED = tl.constexpr(8)
ROUGH = tl.constexpr(16)

BELOW = tl.constexpr(1)
ABOVE = tl.constexpr(2)


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
            prior_log, prior_variance, prior_slope = scale_of(prior_spread, 1, form1, eps1)
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


# --- the forms of a scale ---------------------------------------------------------------------------------------------


@triton.jit
def within_bounds(x, bounds: tl.constexpr, low, high):
    """x within those of its bounds that there are, as torch.clamp does it; NaN stays NaN."""
    if BELOW & bounds:
        x = tl.where(x < low, low, x)
    if ABOVE & bounds:
        x = tl.where(x > high, high, x)
    return x


@triton.jit
def through_bounds(gradient, x, bounds: tl.constexpr, low, high):
    """A gradient by `within_bounds`, as one by x: 0 outside the bounds, and at NaN if there are any."""
    if BELOW & bounds:
        gradient = tl.where(x >= low, gradient, 0.0)
    if ABOVE & bounds:
        gradient = tl.where(x <= high, gradient, 0.0)
    return gradient


@triton.jit
def through(gradient, slope, form: tl.constexpr):
    """A gradient by what a form has made of x, as one by x: none where the form is level, whatever the gradient is."""
    if (MAP | SQUARED) & form:
        gradient = tl.where(slope == 0.0, 0.0, gradient * slope)
    return gradient


@triton.jit
def log_of(x, form: tl.constexpr):
    """The logarithm of a scale that comes from it, and its derivative."""
    slope = tl.full((), 1.0, x.dtype)
    if SQUARED & form:
        x, slope = x + x, slope + slope
    return x, slope


@triton.jit
def base_of(x, form: tl.constexpr, eps):
    """The base of a scale that does not come from its logarithm, and its derivative."""
    slope = tl.full((), 1.0, x.dtype)
    if MAP & form == EXPONENTIAL:
        slope = exponential(x)
        base = slope + eps
    elif MAP & form == LINEAR:
        base = x + eps
    elif MAP & form == SOFTPLUS:
        base, slope = softplus(x)
        base = base + eps
    elif MAP & form == BOUNDED:
        base = tl.where(x < eps, eps, x)
    else:
        tl.static_assert(False, "there is no such map")
    return base, slope


@triton.jit
def scale_of(x, power: tl.constexpr, form: tl.constexpr, eps):
    """The logarithm of a scale, its power 1 or -1, and the derivative of the logarithm."""
    if MAP & form == LOG:
        log, slope = log_of(x, form)
        scale = exponential(log) if power == 1 else exponential(-log)
    else:
        base, d_base = base_of(x, form, eps)
        inverse = divide(tl.full((), 1.0, x.dtype), base)
        log, slope = logarithm(base), d_base * inverse
        scale = base if power == 1 else inverse
        if SQUARED & form:
            log, slope, scale = log + log, slope + slope, scale * scale
    return log, scale, slope


@triton.jit
def scale_log_of(x, form: tl.constexpr, eps):
    """The logarithm of a scale, and its derivative."""
    if MAP & form == LOG:
        log, slope = log_of(x, form)
    else:
        log, _, slope = scale_of(x, 1, form, eps)
    return log, slope


# --- the sample: Kingma & Welling 2014, section 2.4 -------------------------------------------------------------------


@triton.jit
def deviation_of(x, form: tl.constexpr, eps):
    """The standard deviation of a variance in some form, and its derivative."""
    if MAP & form == LOG:
        log, slope = log_of(x, form)
        # A divergence computes this exponential too: the compiler sees that it is the same.
        deviation, _ = sigma_and_expm1(log, ROUGH & form)
        slope = through(0.5 * deviation, slope, form)
    else:
        base, d_base = base_of(x, form, eps)
        if SQUARED & form:
            deviation, slope = base, d_base
        else:
            deviation = root(base)
            slope = divide(0.5 * d_base, deviation)
    return deviation, slope


# --- noise: Philox, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; constants of Random123 ------


@triton.jit
def product(word, factor: tl.constexpr):
    """The upper and the lower word of a product of words.

    In 64 bits, which is one instruction of NVIDIA's and of AMD's; with umulhi it would be two.
    """
    both = word.to(tl.uint64) * tl.full((), factor, tl.uint64)
    return (both >> 32).to(tl.uint32), both.to(tl.uint32)


@triton.jit
def philox4x32(c0, c1, c2, c3, seed):
    """Ten rounds on uint32 counter words, keyed by a 64-bit seed."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        h0, l0 = product(c0, 0xD2511F53)
        h1, l1 = product(c2, 0xCD9E8D57)
        c0, c2 = h1 ^ c1 ^ k0, h0 ^ c3 ^ k1
        c1, c3 = l1, l0
        k0 += tl.full((), 0x9E3779B9, tl.uint32)
        k1 += tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def unit_interval(word):
    """Uniform in (0, 1] of a word: float(word >> 1) * 2^-31 + 2^-32."""
    half_word = (word >> 1).to(tl.int32, bitcast=True).to(tl.float32)
    return half_word * 4.656612873077393e-10 + 2.3283064365386963e-10


@triton.jit
def box_muller(word0, word1, rough: tl.constexpr):
    """Two words, as uniforms, to two normals: sqrt(-2 ln u0) * (cos 2 pi u1, sin 2 pi u1)."""
    u0 = unit_interval(word0)
    if rough:
        radius = radius_of_the_chip(u0)
        sine, cosine = sincos_of_the_chip(word1)
    else:
        radius = tl.sqrt(-2.0 * log_unit(u0))
        sine, cosine = sincos_turns(unit_interval(word1))
    return radius * cosine, radius * sine


# --- arithmetic -----------------------------------------------------------------------------------------------------


@triton.jit
def divide(x, y):
    """x / y; Triton's own division of float32 is not rounded as IEEE 754 has it."""
    return x / y if y.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def root(x):
    """The square root, of which the same is true."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def logarithm(x):
    """ln x; Triton's own takes the subnormal numbers of float32 for 0."""
    if x.dtype == tl.float64:
        return tl.log(x)
    is_tiny = x < 1.1754943508222875e-38
    return tl.log(tl.where(is_tiny, x * 8388608.0, x)) - tl.where(is_tiny, 15.942385152878742, 0.0)


@triton.jit
def logarithm_of_1_plus(x):
    """ln(1 + x) for x >= -1: what the sum loses to rounding comes back as a correction."""
    sum = 1.0 + x
    return tl.where(sum == 0.0, float("-inf"), tl.log(sum) + divide(x - (sum - 1.0), sum))


@triton.jit
def binet(inverse):
    """Binet's function of z >= 1, of which the inverse is given, and its derivative: see csrc/math/gamma.h."""
    y = inverse * inverse
    if y.dtype == tl.float64:
        value = y * 0.012299899347407984019 + 0.90399395566993606937
        value = value * y + 10.132052401473506168
        value = value * y + 36.659076162591562041
        value = value * y + 54.795764794216287449
        value = value * y + 37.474827894949182812
        value = value * y + 12.00390897360027098
        value = value * y + 1.699568641901633913
        value = value * y + 0.083333333333333332708
        p = y * 0.26673323077912195796 + 13.218542166333262904
        p = p * y + 132.66031288633142716
        p = p * y + 458.81399080341701663
        p = p * y + 671.4512045153452642
        p = p * y + 454.33446780036699691
        p = p * y + 144.71832244155957155
        p = p * y + 20.428157036152914986
        p = p * y + 1.0
        value = value / p
        slope = y * 0.029982130593297672924 + 2.116406874290534301
        slope = slope * y + 21.004448730536242091
        slope = slope * y + 66.662552767808492163
        slope = slope * y + 87.512149658423467484
        slope = slope * y + 52.797689873554892946
        slope = slope * y + 15.001534800040488539
        slope = slope * y + 1.8947475899705531379
        slope = slope * y + 0.083333333333333327527
        p = y * 1.1057126041821516151 + 38.839326895341300087
        p = p * y + 308.76281074899510364
        p = p * y + 887.01116227007189775
        p = p * y + 1107.5939759821893247
        p = p * y + 650.76025322373338545
        p = p * y + 182.25449566092115438
        p = p * y + 22.836971079646385015
        p = p * y + 1.0
        slope = slope / p
    else:
        value = inverse * 0.0001422189407 + -0.0006456698628
        value = value * inverse + 0.001063533093
        value = value * inverse + -6.090973309e-5
        value = value * inverse + -0.002770688113
        value = value * inverse + -3.497345344e-7
        value = value * inverse + 0.08333333672
        slope = inverse * -0.0003225929695 + 0.002006198234
        slope = slope * inverse + -0.005104469462
        slope = slope * inverse + 0.006051482821
        slope = slope * inverse + -0.0004654275852
        slope = slope * inverse + -0.008280495156
        slope = slope * inverse + -2.380851643e-6
        slope = slope * inverse + 0.08333335173
    return inverse * value, -y * slope


@triton.jit
def log_of_ratio(ratio, t):
    """log(1 + t) and t - log(1 + t) of a ratio 1 + t, by the series of 2 artanh(t / (2 + t)) next to 1."""
    is_near = (t < 0.25) & (t > -0.25)
    s = divide(t, t + 2.0)
    z = s * s
    p = z * (1.0 / 17.0) + 1.0 / 15.0
    p = p * z + 1.0 / 13.0
    p = p * z + 1.0 / 11.0
    p = p * z + 1.0 / 9.0
    p = p * z + 1.0 / 7.0
    p = p * z + 1.0 / 5.0
    p = p * z + 1.0 / 3.0
    gap, log = s * (t - (z + z) * p), logarithm(ratio)
    return tl.where(is_near, t - gap, log), tl.where(is_near, gap, t - log)


@triton.jit
def softplus(x):
    """ln(1 + e^x) and its derivative, the logistic function."""
    t = exponential(tl.where(x < 0.0, x, -x))
    sum = 1.0 + t
    inverse = divide(tl.full((), 1.0, x.dtype), sum)
    log = tl.log(sum) + (t - (sum - 1.0)) * inverse  # as above
    return tl.where(x < 0.0, log, x + log), tl.where(x < 0.0, t * inverse, inverse)


@triton.jit
def log_unit(u):
    """ln u for u in [2^-32, 1], of a power of two and a polynomial in what is left, between -1/3 and 1/3."""
    bits = u.to(tl.int32, bitcast=True)
    power = (bits - 0x3F2AAAAB) & -0x800000  # the exponent that leaves a mantissa from 2/3 on
    m = (bits - power).to(tl.float32, bitcast=True) - 1.0
    p = m * -0.13021013140678406 + 0.14084610342979431
    p = p * m - 0.12148627638816833
    p = p * m + 0.13980610668659210
    p = p * m - 0.16684235632419586
    p = p * m + 0.20012299716472626
    p = p * m - 0.24999669194221497
    p = p * m + 0.33333182334899902
    p = (p * m - 0.5) * m
    p = p * m + m
    return power.to(tl.float32) * 8.262958405176314e-08 + p  # 2^-23 ln 2


@triton.jit
def nearest(x):
    """The integer next to x, |x| < 2^22, as a float32 and in the last bits of an int32."""
    shifted = x + 12582912.0  # 1.5 * 2^23: floats there are integers
    return shifted - 12582912.0, shifted.to(tl.int32, bitcast=True)


@triton.jit
def sincos_turns(u):
    """sin and cos of 2 pi u for u in [0, 1]: the nearest quarter turn comes off exactly, so no angle is rounded."""
    quarters, quarter = nearest(u * 4.0)
    a = (u - quarters * 0.25) * 6.28318531
    z = a * a
    s = z * -1.9515295891e-4 + 8.3321608736e-3
    s = s * z - 1.6666654611e-1
    s = s * z * a + a
    c = z * 2.443315711809948e-5 - 1.388731625493765e-3
    c = c * z + 4.166664568298827e-2
    c = c * z * z + (z * -0.5 + 1.0)
    is_odd = (quarter & 1) != 0
    return with_sign_of(tl.where(is_odd, c, s), quarter), with_sign_of(tl.where(is_odd, s, c), quarter + 1)


@triton.jit
def radius_of_the_chip(u):
    """sqrt(-2 ln u) for u in [2^-32, 1] to 20 bits.

    The error of the chip's logarithm stays the same next to 1, where -2 ln u is small: a polynomial of 1 - u has it
    there.
    """
    rest = 1.0 - u
    p = rest * 0.5538218 + 0.66451675
    p = p * rest + 1.0000271
    p = p * rest + 2.0
    return tl.sqrt(tl.where(rest < 0.0625, p * rest, fast_log2f(u) * -1.38629436))


@triton.jit
def sincos_of_the_chip(word):
    """sin and cos of the angle word * 2 pi / 2^32 to 20 bits; the chip's are as exact as that from -pi to pi."""
    angle = word.to(tl.int32, bitcast=True).to(tl.float32) * 1.46291807927e-09  # 2 pi / 2^32
    return fast_sinf(angle), fast_cosf(angle)


@triton.jit
def with_sign_of(x, quarter):
    """x, its sign turned in the second half of four quarters."""
    sign = (quarter << 30) & -0x80000000
    return (x.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def reduce_exp(x, least: tl.constexpr):
    """x = n ln 2 + r, in float32: r and 2^n, for n from ``least`` to 127.

    Where x is within these bounds |r| is at most ln 2 / 2. 2^-127 comes as 0.
    """
    shifted = x * 1.44269504 + 12583039.0  # as in `nearest`, and 127 more: what a float's exponent begins at
    shifted = tl.minimum(shifted, 12583166.0)
    if least > -127:
        shifted = tl.maximum(shifted, 12583039.0 + least)
    n = shifted - 12583039.0
    r = x - n * 0.693359375
    r = r + n * 2.12194440e-4
    return r, (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponential(x):
    """e^x to about two ulp, in float32 or float64."""
    if x.dtype == tl.float64:
        result = tl.exp(x)
    else:
        # What overflows or underflows, infinities and NaN too, does so in r.
        r, power = reduce_exp(x, -126)
        result = tl.exp2(r * 1.44269504) * power
    return result


@triton.jit
def sigma_and_expm1(logvar, rough: tl.constexpr):
    """sigma = e^(logvar / 2) and e^logvar - 1; ``rough``: to 18 bits."""
    half = 0.5 * logvar
    if rough:
        sigma = tl.exp2(logvar * 0.72134752)
        # Next to 0, where 1 would cancel: (e^l - 1 - l) / l^2 to 19 bits.
        p = logvar * 0.008345744 + 0.041753557
        p = p * logvar + 0.16666657
        p = p * logvar + 0.4999993
        is_near = (logvar < 0.25) & (logvar > -0.25)
        expm1 = tl.where(is_near, p * logvar * logvar + logvar, sigma * sigma - 1.0)
    elif logvar.dtype == tl.float64:
        sigma = tl.exp(half)
        # Kahan's expm1: the rounding of e^x cancels in (e^x - 1) / ln e^x.
        exp = tl.exp(logvar)
        log = tl.log(exp)
        expm1 = tl.where(exp == 1.0, logvar, (exp - 1.0) * (logvar / tl.where(log == 0.0, 1.0, log)))
        expm1 = tl.where(exp == 0.0, -1.0, expm1)
        expm1 = tl.where(exp == float("inf"), exp, expm1)
    else:
        # Of one exponential: expm1(l) = t^2 + 2t with t = expm1(l / 2); what overflows in t^2 does so in e^l.
        half = tl.maximum(half, -88.0296919, propagate_nan=tl.PropagateNan.ALL)  # -127 ln 2: sigma is 0 from there on
        r, power = reduce_exp(half, -127)
        p = r * 1.9875691500e-4 + 1.3981999507e-3
        p = p * r + 8.3334519073e-3
        p = p * r + 4.1665795894e-2
        p = p * r + 1.6666665459e-1
        p = p * r + 5.0000001201e-1
        expm1_r = p * (r * r) + r
        sigma = expm1_r * power + power
        t = expm1_r * power + (power - 1.0)
        expm1 = t * t + (t + t)
    return sigma, expm1
