"""Arithmetic for the formulas, as csrc/cpu/simd.h has it for CPUs.

Triton's own exp and sincos are fast approximations (whose error grows with the argument) or use local memory, and have
no expm1; these are as accurate as the CPU's, but that results below the smallest normal float32 may be 0. They have no
branches and no tests for what cannot come: a memory-bound kernel on an H100 has time for some 100 instructions an
element. What is of the chip is for results in bfloat16, as ``codes.ROUGH`` says.
"""

from __future__ import annotations

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda.libdevice import fast_cosf, fast_log2f, fast_sinf
except ImportError:  # a Triton without NVIDIA's part, which does not ask for them
    fast_cosf = fast_log2f = fast_sinf = None


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
