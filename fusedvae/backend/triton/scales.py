"""The forms of a scale (see `codes`): how it is made of an input, and the derivatives of that. As csrc/math/scale.h."""

from __future__ import annotations

import triton
import triton.language as tl

from . import codes
from .arithmetic import divide, exponential, logarithm, root, sigma_and_expm1, softplus

LOG = tl.constexpr(codes.LOG)
EXPONENTIAL = tl.constexpr(codes.EXPONENTIAL)
LINEAR = tl.constexpr(codes.LINEAR)
SOFTPLUS = tl.constexpr(codes.SOFTPLUS)
BOUNDED = tl.constexpr(codes.BOUNDED)
MAP = tl.constexpr(codes.MAP)
SQUARED = tl.constexpr(codes.SQUARED)
ROUGH = tl.constexpr(codes.ROUGH)

BELOW = tl.constexpr(codes.BELOW)
ABOVE = tl.constexpr(codes.ABOVE)


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
    """The logarithm of a scale, its power (1, -1, or 2: itself, which divides), and the derivative of the logarithm."""
    if MAP & form == LOG:
        log, slope = log_of(x, form)
        scale = exponential(log) if power > 0 else exponential(-log)
    else:
        base, d_base = base_of(x, form, eps)
        inverse = divide(tl.full((), 1.0, x.dtype), base)
        log, slope = logarithm(base), d_base * inverse
        if power == 1:  # infinity less its logarithm is no number, and no more is the derivative
            slope += base - base
        scale = base if power > 0 else inverse
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
