"""How users write the form of a scale, and the form that it is."""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

from torch import Tensor

from ..backend.reference import Form, Formula, replaced
from ..calls import Operand
from ..typing import Bounds


class Written(NamedTuple):
    """How users write the form of a scale."""

    scale: str | None
    clamp: Bounds
    eps: float


def as_written(scale: str | None, clamp: Bounds, eps: float) -> Written:
    """As users wrote it; hashable, as calls are found by it; None stands for the default."""
    return Written(scale, tuple(clamp) if isinstance(clamp, list) else clamp, eps)


def unless_usual(scale: str, clamp: Bounds, eps: float, usual: str) -> Written | None:
    """The same, or None of the usual form."""
    return None if scale == usual and clamp is None and eps == 0.0 else as_written(scale, clamp, eps)


def checked_form(names: tuple[str, str, str], written: Written | None, formula: Formula) -> Form:
    """The form of a formula's scale, of the arguments of these names."""
    scale, clamp, eps = written or (None, None, 0.0)
    try:
        form = next(iter(formula.forms.values())) if scale is None else formula.forms[scale]
    except (KeyError, TypeError):
        expected = ", ".join(map(repr, formula.forms))
        raise ValueError(f"{names[0]}: expected one of {expected}; got {scale!r}") from None
    low, high = -math.inf, math.inf
    if clamp is not None:
        if not isinstance(clamp, tuple) or len(clamp) != 2:
            raise TypeError(f"{names[1]}: expected a pair (low, high) or None, got {clamp!r}")
        for bound in clamp:
            if bound is not None and (not isinstance(bound, numbers.Real) or isinstance(bound, bool)):
                raise TypeError(f"{names[1]}: expected numbers or None, got {type(bound).__name__}")
        low = low if clamp[0] is None else float(clamp[0])
        high = high if clamp[1] is None else float(clamp[1])
        if not low <= high:
            raise ValueError(f"{names[1]}: expected low <= high, got {clamp!r}")
    if not isinstance(eps, numbers.Real) or isinstance(eps, bool):
        raise TypeError(f"{names[2]}: expected a number, got {type(eps).__name__}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{names[2]}: expected at least 0, got {eps}")
    return replaced(form, low=low, high=high, eps=form.eps + float(eps))


def checked_recon_form(formula: Formula, written: Written | None) -> Form | None:
    """The form of a likelihood's scale, of the arguments ``recon_scale``, ...; None of one that has no scale."""
    names = ("recon_scale", "recon_clamp", "recon_eps")
    if formula.scales:
        return checked_form(names, written, formula)
    absent = (None, None, 0.0)
    for name, value, nothing in zip(names, written or absent, absent, strict=True):
        if value != nothing:
            likelihood = formula.likelihood
            raise ValueError(f"{name}: expected none, as the {likelihood} likelihood has no scale; got {value!r}")
    return None


def checked_forms(
    formula: Formula, posterior: Written | None, prior: Written | None, prior_scale: Operand
) -> list[Form]:
    """The forms of a divergence's scales. ``eps`` is the prior's too, where that comes from a network as well.

    The prior's is checked where there is no prior, too, whose options a module may have for other calls.
    """
    forms = [checked_form(("scale", "clamp", "eps"), posterior, formula)]
    has_prior = len(formula.pairs) > 1
    if has_prior or prior is not None:
        prior = prior or Written("logvar", None, None)  # type: ignore[arg-type]
        eps = prior.eps
        if posterior is not None and eps is None:
            is_alike = posterior.scale == prior.scale and (prior_scale is None or isinstance(prior_scale, Tensor))
            eps = posterior.eps if is_alike else 0.0
        eps = 0.0 if eps is None else eps
        prior = replaced(prior, eps=eps)
        forms.append(checked_form(("prior_scale", "prior_clamp", "prior_eps"), prior, formula))
    return forms if has_prior else forms[:1]
