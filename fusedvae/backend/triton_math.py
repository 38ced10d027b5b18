"""The formulas in Triton: those of the terms with their registry, that of the sample, and the noise.

They compute what those of csrc/math/ do. Below them is the arithmetic that csrc/cpu/simd.h has for CPUs. Triton's own
exp and sincos are fast approximations (whose error grows with the argument) or use local memory, and have no expm1;
these are as accurate as the CPU's.

Everything here works element by element, on blocks of any shapes that broadcast to one: what is derived of one input
alone is derived once where that is broadcast.
"""

from __future__ import annotations

import triton
import triton.language as tl

# --- the formulas of the terms ----------------------------------------------------------------------------------------
#
# A function a formula, its name that of the formula. It takes four inputs, a weight, and the forms of its scales in
# their order, the numbers in the dtype of the arithmetic; it ignores what the formula has not. It returns the value,
# and the derivatives by the four inputs times the weight: 0 by those that it ignores.
#
# A form is None where the input is the logarithm that the formula is written in; else it is (map, squared, low, high,
# eps), as `reference.Form` has them, but that bounds are None where there are none, and that the map is "log" where the
# logarithm comes without a detour: e^x, nothing added.


@triton.jit
def gaussian_nll(recon_x, x, spread, in3, weight, form0: tl.constexpr, form1: tl.constexpr):
    """(l + (recon_x - x)^2 * e^-l) / 2 with l the logarithm of the variance.

    Source: Kingma & Welling 2014 (arXiv:1312.6114), appendix C.2.
    """
    log, precision, slope = scale_of(spread, -1, form0)
    error = recon_x - x
    pull = error * precision
    half_square = (0.5 * error) * pull
    d_recon_x = weight * pull
    d_spread = through(weight * (0.5 - half_square), slope, form0)
    return 0.5 * log + half_square, d_recon_x, -d_recon_x, d_spread, 0.0


@triton.jit
def laplace_nll(recon_x, x, spread, extra, weight, form0: tl.constexpr, form1: tl.constexpr):
    """(abs(recon_x - x) + extra) / b + log b with b the scale.

    Source: Kotz, Kozubowski & Podgórski 2001, "The Laplace distribution and generalizations", section 2.1.
    """
    log, inverse, slope = scale_of(spread, -1, form0)
    pull = weight * inverse
    distance, d_recon_x = absolute_error(recon_x, x, pull)
    relative = (distance + extra) * inverse
    d_spread = through(weight - weight * relative, slope, form0)
    return relative + log, d_recon_x, -d_recon_x, d_spread, pull


@triton.jit
def bernoulli_nll(recon_x, x, pos_weight, in3, weight, form0: tl.constexpr, form1: tl.constexpr):
    """softplus(a) - x a of logits a = recon_x; the part of x counts pos_weight times.

    (1 - x) a + (1 + (pos_weight - 1) x) softplus(-a). Source: Kingma & Welling 2014 (arXiv:1312.6114), appendix C.1.
    """
    more, rest = pos_weight - 1.0, 1.0 - x
    miss, d_miss = softplus(-recon_x)  # -log p
    share = more * x + 1.0
    d_recon_x = weight * (rest - share * d_miss)
    return rest * recon_x + share * miss, d_recon_x, weight * (more * miss - recon_x), weight * (x * miss), 0.0


@triton.jit
def bernoulli_nll_of_probabilities(recon_x, x, in2, in3, weight, form0: tl.constexpr, form1: tl.constexpr):
    """-x log p - (1 - x) log(1 - p) of probabilities p = recon_x.

    No logarithm is below -100, and p (1 - p) not below 1e-12 in the derivative, as PyTorch has it. Source: as above.
    """
    hit, miss = logarithm(recon_x), logarithm_of_1_plus(-recon_x)
    hit, miss = tl.where(hit < -100.0, -100.0, hit), tl.where(miss < -100.0, -100.0, miss)
    both = (1.0 - recon_x) * recon_x
    d_recon_x = divide(weight * (recon_x - x), tl.where(both < 1e-12, 1e-12, both))
    return (x - 1.0) * miss - x * hit, d_recon_x, weight * (miss - hit), 0.0, 0.0


@triton.jit
def mse(recon_x, x, in2, in3, weight, form0: tl.constexpr, form1: tl.constexpr):
    """(recon_x - x)^2."""
    error = recon_x - x
    d_recon_x = (weight + weight) * error
    return error * error, d_recon_x, -d_recon_x, 0.0, 0.0


@triton.jit
def l1(recon_x, x, in2, in3, weight, form0: tl.constexpr, form1: tl.constexpr):
    """abs(recon_x - x)."""
    distance, d_recon_x = absolute_error(recon_x, x, weight)
    return distance, d_recon_x, -d_recon_x, 0.0, 0.0


@triton.jit
def absolute_error(recon_x, x, weight):
    """abs(recon_x - x), and its derivative by recon_x times a weight: 0 at 0 and at NaN, as PyTorch has it."""
    error = recon_x - x
    d_recon_x = tl.where(error > 0.0, weight, tl.where(error < 0.0, -weight, 0.0 * weight))
    return tl.where(error < 0.0, -error, error), d_recon_x


@triton.jit
def kl_standard_normal(mu, spread, in2, in3, weight, form0: tl.constexpr, form1: tl.constexpr):
    """KL(N(mu, sigma^2) || N(0, 1)) = (mu^2 + sigma^2 - 1 - log sigma^2) / 2.

    Source: Kingma & Welling 2014 (arXiv:1312.6114), appendix B.
    """
    if form0 is None or form0[0] == "log":
        log, slope = log_of(spread, form0)
        _, growth = sigma_and_expm1(log)
    else:
        log, variance, slope = scale_of(spread, 1, form0)
        growth = variance - 1.0
    value = 0.5 * (mu * mu + (growth - log))
    return value, weight * mu, through(weight * (0.5 * growth), slope, form0), 0.0, 0.0


@triton.jit
def kl_normal(mu, spread, prior_mu, prior_spread, weight, form0: tl.constexpr, form1: tl.constexpr):
    """KL(N(mu, sigma^2) || N(prior_mu, prior_sigma^2)).

    (e^d - 1 - d + (mu - prior_mu)^2 / prior_sigma^2) / 2 with d = log sigma^2 - log prior_sigma^2. Source: as above,
    for any two normal distributions.
    """
    if (form0 is None or form0[0] == "log") and (form1 is None or form1[0] == "log"):
        log, slope = log_of(spread, form0)
        prior_log, precision, prior_slope = scale_of(prior_spread, -1, form1)
        difference = log - prior_log
        _, growth = sigma_and_expm1(difference)
    else:
        log, variance, slope = scale_of(spread, 1, form0)
        prior_log, precision, prior_slope = scale_of(prior_spread, -1, form1)
        difference = log - prior_log
        growth = variance * precision - 1.0
    error = mu - prior_mu
    pull = error * precision
    square = error * pull
    value = 0.5 * ((growth - difference) + square)
    d_mu, half_weight = weight * pull, 0.5 * weight
    d_spread = through(half_weight * growth, slope, form0)
    return value, d_mu, d_spread, -d_mu, through(-(half_weight * (growth + square)), prior_slope, form1)


@triton.jit
def formula_element(formula: tl.constexpr, in0, in1, in2, in3, weight, form0: tl.constexpr, form1: tl.constexpr):
    """The registry: what the formula of that name returns."""
    if formula == "gaussian_nll":
        value, d0, d1, d2, d3 = gaussian_nll(in0, in1, in2, in3, weight, form0, form1)
    elif formula == "laplace_nll":
        value, d0, d1, d2, d3 = laplace_nll(in0, in1, in2, in3, weight, form0, form1)
    elif formula == "bernoulli_nll":
        value, d0, d1, d2, d3 = bernoulli_nll(in0, in1, in2, in3, weight, form0, form1)
    elif formula == "bernoulli_nll_of_probabilities":
        value, d0, d1, d2, d3 = bernoulli_nll_of_probabilities(in0, in1, in2, in3, weight, form0, form1)
    elif formula == "mse":
        value, d0, d1, d2, d3 = mse(in0, in1, in2, in3, weight, form0, form1)
    elif formula == "l1":
        value, d0, d1, d2, d3 = l1(in0, in1, in2, in3, weight, form0, form1)
    elif formula == "kl_standard_normal":
        value, d0, d1, d2, d3 = kl_standard_normal(in0, in1, in2, in3, weight, form0, form1)
    elif formula == "kl_normal":
        value, d0, d1, d2, d3 = kl_normal(in0, in1, in2, in3, weight, form0, form1)
    else:
        tl.static_assert(False, "there is no such formula")
    return value, d0, d1, d2, d3


# --- divergences at a sample: Burda, Grosse & Salakhutdinov 2016 (arXiv:1509.00519) -----------------------------------
#
# log q(z) - log p(z) at the sample z = mu + sigma * noise: what has the divergence for its mean. These take z and its
# noise too. Their derivatives by the inputs are those where z stays the same; behind them comes that by z.


@triton.jit
def kl_standard_normal_at_sample(
    mu, spread, in2, in3, z, noise, weight, form0: tl.constexpr, form1: tl.constexpr
):  # fmt: skip
    """(z^2 - noise^2 - log sigma^2) / 2."""
    log, slope = scale_log_of(spread, form0)
    value = 0.5 * ((z - noise) * (z + noise) - log)
    return value, 0.0, through(-0.5 * weight, slope, form0), 0.0, 0.0, weight * z


@triton.jit
def kl_normal_at_sample(
    mu, spread, prior_mu, prior_spread, z, noise, weight, form0: tl.constexpr, form1: tl.constexpr
):  # fmt: skip
    """(log prior_sigma^2 - log sigma^2 - noise^2 + (z - prior_mu)^2 / prior_sigma^2) / 2."""
    log, slope = scale_log_of(spread, form0)
    prior_log, precision, prior_slope = scale_of(prior_spread, -1, form1)
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
    formula: tl.constexpr, in0, in1, in2, in3, z, noise, weight, form0: tl.constexpr, form1: tl.constexpr
):  # fmt: skip
    """The registry: what the divergence of that name returns at a sample."""
    if formula == "kl_standard_normal":
        value, d0, d1, d2, d3, d_z = kl_standard_normal_at_sample(
            in0, in1, in2, in3, z, noise, weight, form0, form1
        )  # fmt: skip
    elif formula == "kl_normal":
        value, d0, d1, d2, d3, d_z = kl_normal_at_sample(
            in0, in1, in2, in3, z, noise, weight, form0, form1
        )  # fmt: skip
    else:
        tl.static_assert(False, "there is no such divergence")
    return value, d0, d1, d2, d3, d_z


# --- the forms of a scale ---------------------------------------------------------------------------------------------


@triton.jit
def within_bounds(x, form: tl.constexpr):
    """x within the bounds of a form, as torch.clamp does it; NaN stays NaN."""
    if form is not None:
        if form[2] is not None:
            x = tl.where(x < form[2], form[2], x)
        if form[3] is not None:
            x = tl.where(x > form[3], form[3], x)
    return x


@triton.jit
def slope_within_bounds(slope, x, form: tl.constexpr):
    """A derivative where x is within the bounds of a form; 0 elsewhere, and at NaN, if there are any."""
    if form is not None:
        if form[2] is not None:
            slope = tl.where(x >= form[2], slope, 0.0)
        if form[3] is not None:
            slope = tl.where(x <= form[3], slope, 0.0)
    return slope


@triton.jit
def through(gradient, slope, form: tl.constexpr):
    """A gradient by what a form has made of x, as one by x: none where the form is level, whatever the gradient is."""
    if form is not None:
        gradient = tl.where(slope == 0.0, 0.0, gradient * slope)
    return gradient


@triton.jit
def log_of(x, form: tl.constexpr):
    """The logarithm of a scale that comes from it, and its derivative."""
    log = within_bounds(x, form)
    slope = slope_within_bounds(tl.full((), 1.0, x.dtype), x, form)
    if form is not None and form[1]:
        log, slope = log + log, slope + slope
    return log, slope


@triton.jit
def base_of(x, form: tl.constexpr):
    """The base of a scale that does not come from its logarithm, and its derivative within the bounds."""
    bounded = within_bounds(x, form)
    if form[0] == "exponential":
        slope = exponential(bounded)
        base = slope + form[4]
    elif form[0] == "linear":
        base, slope = bounded + form[4], tl.full((), 1.0, x.dtype)
    elif form[0] == "softplus":
        base, slope = softplus(bounded)
        base = base + form[4]
    elif form[0] == "bounded":
        base, slope = tl.where(bounded < form[4], form[4], bounded), tl.full((), 1.0, x.dtype)
    else:
        tl.static_assert(False, "there is no such map")
    return base, slope


@triton.jit
def scale_of(x, power: tl.constexpr, form: tl.constexpr):
    """The logarithm of a scale, its power 1 or -1, and the derivative of the logarithm."""
    if form is None or form[0] == "log":
        log, slope = log_of(x, form)
        scale = exponential(log) if power == 1 else exponential(-log)
    else:
        base, d_base = base_of(x, form)
        inverse = divide(tl.full((), 1.0, x.dtype), base)
        log, slope = logarithm(base), slope_within_bounds(d_base * inverse, x, form)
        scale = base if power == 1 else inverse
        if form[1]:
            log, slope, scale = log + log, slope + slope, scale * scale
    return log, scale, slope


@triton.jit
def scale_log_of(x, form: tl.constexpr):
    """The logarithm of a scale, and its derivative."""
    if form is None or form[0] == "log":
        log, slope = log_of(x, form)
    else:
        log, _, slope = scale_of(x, 1, form)
    return log, slope


# --- the sample: Kingma & Welling 2014, section 2.4 -------------------------------------------------------------------


@triton.jit
def deviation_of(x, form: tl.constexpr):
    """The standard deviation of a variance in some form, and its derivative."""
    if form is None or form[0] == "log":
        log, slope = log_of(x, form)
        # A divergence computes this exponential too: the compiler sees that it is the same.
        deviation, _ = sigma_and_expm1(log)
        slope = through(0.5 * deviation, slope, form)
    else:
        base, d_base = base_of(x, form)
        if form[1]:
            deviation, slope = base, d_base
        else:
            deviation = root(base)
            slope = divide(0.5 * d_base, deviation)
        slope = slope_within_bounds(slope, x, form)
    return deviation, slope


# --- noise: Philox, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; constants of Random123 ------


@triton.jit
def philox4x32(c0, c1, c2, c3, seed):
    """Ten rounds on uint32 counter words, keyed by a 64-bit seed."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        h0, l0 = tl.umulhi(c0, 0xD2511F53), c0 * tl.full((), 0xD2511F53, tl.uint32)
        h1, l1 = tl.umulhi(c2, 0xCD9E8D57), c2 * tl.full((), 0xCD9E8D57, tl.uint32)
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
def box_muller(u0, u1):
    """Two uniforms to two normals: sqrt(-2 ln u0) * (cos 2 pi u1, sin 2 pi u1)."""
    radius = tl.sqrt_rn(-2.0 * tl.log(u0))
    sine, cosine = sincos_turns(u1)
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
def softplus(x):
    """ln(1 + e^x) and its derivative, the logistic function."""
    t = exponential(tl.where(x < 0.0, x, -x))
    sum = 1.0 + t
    inverse = divide(tl.full((), 1.0, x.dtype), sum)
    log = tl.log(sum) + (t - (sum - 1.0)) * inverse  # as above
    return tl.where(x < 0.0, log, x + log), tl.where(x < 0.0, t * inverse, inverse)


@triton.jit
def sincos_turns(u):
    """sin and cos of 2 pi u for u in [0, 1]: the nearest quarter turn comes off exactly, so no angle is rounded."""
    quarter = (u * 4.0 + 0.5).to(tl.int32)
    a = (u - quarter.to(tl.float32) * 0.25) * 6.28318531
    z = a * a
    s = z * -1.9515295891e-4 + 8.3321608736e-3
    s = s * z - 1.6666654611e-1
    s = s * z * a + a
    c = z * 2.443315711809948e-5 - 1.388731625493765e-3
    c = c * z + 4.166664568298827e-2
    c = c * z * z - 0.5 * z + 1.0
    odd = (quarter & 1) != 0
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    sine = tl.where((quarter & 2) != 0, -sine, sine)
    return sine, tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)


@triton.jit
def reduce_exp(x):
    """x = n ln 2 + r with |r| <= ln 2 / 2: n, and e^r - 1. Past the bounds e^x is 0 or infinity; NaN stays NaN."""
    x = tl.where(x < -104.0, -104.0, x)
    x = tl.where(x > 89.0, 89.0, x)
    n = tl.floor(x * 1.44269504 + 0.5)
    r = x - n * 0.693359375
    r = r + n * 2.12194440e-4
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    return n, p * (r * r) + r


@triton.jit
def scale_by_power(v, n):
    """v * 2^n for an integer n, in two steps: subnormal results and those next to the largest float included."""
    k = n.to(tl.int32)
    k1 = k >> 1
    k2 = k - k1
    return v * ((k1 + 127) << 23).to(tl.float32, bitcast=True) * ((k2 + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponential(x):
    """e^x to about an ulp, in float32 or float64."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    n, expm1_r = reduce_exp(x)
    return scale_by_power(expm1_r + 1.0, n)


@triton.jit
def sigma_and_expm1(logvar):
    """sigma = e^(logvar / 2) and e^logvar - 1.

    In float32 of one exponential: expm1(l) = t^2 + 2t with t = expm1(l / 2); what overflows in t^2 does so in e^l.
    """
    half = 0.5 * logvar
    if logvar.dtype == tl.float64:
        sigma = tl.exp(half)
        # Kahan's expm1: the rounding of e^x cancels in (e^x - 1) / ln e^x.
        exp = tl.exp(logvar)
        log = tl.log(exp)
        expm1 = tl.where(exp == 1.0, logvar, (exp - 1.0) * (logvar / tl.where(log == 0.0, 1.0, log)))
        expm1 = tl.where(exp == 0.0, -1.0, expm1)
        return sigma, tl.where(exp == float("inf"), exp, expm1)
    n, expm1_r = reduce_exp(half)
    sigma = scale_by_power(expm1_r + 1.0, n)
    near = scale_by_power(expm1_r, n) + (scale_by_power(tl.full((), 1.0, tl.float32), n) - 1.0)
    expm1 = tl.where(half > 16.0, sigma - 1.0, near)
    return sigma, expm1 * expm1 + (expm1 + expm1)
