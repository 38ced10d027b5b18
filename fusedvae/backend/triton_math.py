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
# A function a formula, its name that of the formula. It takes four inputs, the parameter and a weight, in the dtype of
# the arithmetic, and ignores what the formula has not. It returns the value, and the derivatives by the four inputs
# times the weight: 0 by those that it ignores.


@triton.jit
def gaussian_of(recon_x, x, logvar, precision, weight):
    """(logvar + (recon_x - x)^2 * precision) / 2 with precision = 1 / variance, and its derivatives by the first three.

    Source: Kingma & Welling 2014 (arXiv:1312.6114), appendix C.2.
    """
    error = recon_x - x
    pull = error * precision
    half_square = (0.5 * error) * pull
    d_recon_x = weight * pull
    return 0.5 * logvar + half_square, d_recon_x, -d_recon_x, weight * (0.5 - half_square)


@triton.jit
def gaussian_nll(recon_x, x, recon_logvar, in3, parameter, weight):
    """Of a log-variance."""
    value, d_recon_x, d_x, d_logvar = gaussian_of(recon_x, x, recon_logvar, exponential(-recon_logvar), weight)
    return value, d_recon_x, d_x, d_logvar, 0.0


@triton.jit
def gaussian_nll_of_variance(recon_x, x, variance, in3, bound, weight):
    """Of a variance and its lower bound, of which the derivatives know nothing."""
    bounded = tl.where(variance < bound, bound, variance)
    precision = 1.0 / bounded
    value, d_recon_x, d_x, d_logvar = gaussian_of(recon_x, x, tl.log(bounded), precision, weight)
    return value, d_recon_x, d_x, d_logvar * precision, 0.0


@triton.jit
def laplace_nll(recon_x, x, log_scale, extra, parameter, weight):
    """(abs(recon_x - x) + extra) * e^-log_scale + log_scale.

    Source: Kotz, Kozubowski & Podgórski 2001, "The Laplace distribution and generalizations", section 2.1.
    """
    error = recon_x - x
    inverse = exponential(-log_scale)
    relative = (tl.where(error < 0.0, -error, error) + extra) * inverse
    pull = weight * inverse
    d_recon_x = tl.where(error > 0.0, pull, tl.where(error < 0.0, -pull, 0.0 * pull))
    return relative + log_scale, d_recon_x, -d_recon_x, weight - weight * relative, pull


@triton.jit
def kl_standard_normal(mu, logvar, in2, in3, parameter, weight):
    """KL(N(mu, e^logvar) || N(0, 1)) = (mu^2 + expm1(logvar) - logvar) / 2.

    Source: Kingma & Welling 2014 (arXiv:1312.6114), appendix B.
    """
    _, expm1_logvar = sigma_and_expm1(logvar)
    value = 0.5 * (mu * mu + (expm1_logvar - logvar))
    return value, weight * mu, weight * (0.5 * expm1_logvar), 0.0, 0.0


@triton.jit
def kl_normal(mu, logvar, prior_mu, prior_logvar, parameter, weight):
    """KL(N(mu, e^logvar) || N(prior_mu, e^prior_logvar)).

    (expm1(d) - d + (mu - prior_mu)^2 * e^-prior_logvar) / 2 with d = logvar - prior_logvar. Source: as above, for any
    two normal distributions.
    """
    error, difference = mu - prior_mu, logvar - prior_logvar
    pull = error * exponential(-prior_logvar)
    square = error * pull
    _, growth = sigma_and_expm1(difference)
    value = 0.5 * ((growth - difference) + square)
    d_mu, half_weight = weight * pull, 0.5 * weight
    return value, d_mu, half_weight * growth, -d_mu, -(half_weight * (growth + square))


@triton.jit
def formula_element(formula: tl.constexpr, in0, in1, in2, in3, parameter, weight):
    """The registry: what the formula of that name returns."""
    if formula == "gaussian_nll":
        value, d0, d1, d2, d3 = gaussian_nll(in0, in1, in2, in3, parameter, weight)
    elif formula == "gaussian_nll_of_variance":
        value, d0, d1, d2, d3 = gaussian_nll_of_variance(in0, in1, in2, in3, parameter, weight)
    elif formula == "laplace_nll":
        value, d0, d1, d2, d3 = laplace_nll(in0, in1, in2, in3, parameter, weight)
    elif formula == "kl_standard_normal":
        value, d0, d1, d2, d3 = kl_standard_normal(in0, in1, in2, in3, parameter, weight)
    elif formula == "kl_normal":
        value, d0, d1, d2, d3 = kl_normal(in0, in1, in2, in3, parameter, weight)
    else:
        tl.static_assert(False, "there is no such formula")
    return value, d0, d1, d2, d3


# --- the sample: Kingma & Welling 2014, section 2.4 -------------------------------------------------------------------


@triton.jit
def sample(mu, sigma, noise):
    """mu + sigma * noise with sigma = e^(logvar / 2); d_logvar."""
    deviation = sigma * noise
    return mu + deviation, 0.5 * deviation


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
