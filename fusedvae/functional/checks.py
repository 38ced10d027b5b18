"""Checks of arguments, before anything runs: errors name the argument, what was expected and what came."""

from __future__ import annotations

import enum
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend.specs import half_of
from ..layout import broadcasts
from ..typing import TermReduction

TOTALS = ("batchmean", "sum", "mean", "weighted_mean")
_FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


class _Absent(enum.Enum):  # (Of all objects with a name of their own, torch.compile knows these best.)
    """Stands for a log-variance that was not given: None says that it is packed in the mean."""

    LOGVAR = "<required>"
    PRIOR_LOGVAR = "<required with prior_mu>"

    def __repr__(self) -> str:
        return self.value


REQUIRED: Any = _Absent.LOGVAR
REQUIRED_WITH_PRIOR_MU: Any = _Absent.PRIOR_LOGVAR


def check_forgotten(kl: Tensor | None) -> None:
    """Whether a bound may do without a log-variance: only where its KL is given."""
    if kl is None:
        raise TypeError("logvar: expected a tensor beside mu, or None if both are packed in mu; got nothing")


def was_given(prior_logvar: Tensor | float | None) -> bool:
    return prior_logvar is not None and prior_logvar is not REQUIRED_WITH_PRIOR_MU


def check_tensor(name: str, value: object, *, integers: bool = False) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(f"{name}: expected a strided tensor, got a nested one")
    if value.dtype not in _FLOATS and not (
        integers and not value.dtype.is_complex and not value.dtype.is_floating_point
    ):
        kinds = "a float" + (" or integer" if integers else "")
        raise TypeError(f"{name}: expected {kinds} tensor, got {value.dtype}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a strided tensor, got one of layout {value.layout}")


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name}: expected on {other.device}, where {other_name} is; got it on {value.device}")


def check_batched(name: str, value: Tensor) -> None:
    if value.dim() == 0:
        raise ValueError(f"{name}: expected a batch dimension, got a 0-dim tensor")


def check_packed(
    name: str, value: Tensor, dim: int, expected: torch.Size | None = None, *, dim_name: str = "packed_dim"
) -> None:
    check_integer(dim_name, dim)
    if value.dim() >= 2 and (not -value.dim() <= dim < value.dim() or dim % value.dim() == 0):
        raise ValueError(
            f"{dim_name}: expected a dimension of {name}, of shape {tuple(value.shape)}, not the batch; got {dim}"
        )
    if value.dim() < 2 or value.shape[dim] % 2:
        raise ValueError(
            f"{name}: packed (no log-variance given), expected an even size along dimension {dim}, "
            f"got shape {tuple(value.shape)}"
        )
    if expected is not None and half_of(value.shape, dim) != expected:
        raise ValueError(
            f"{name}: packed (no log-variance given), expected the shape of x {tuple(expected)} with twice the size "
            f"along dimension {dim}, got {tuple(value.shape)}"
        )


def check_latents(mu: object, logvar: object, packed_dim: int) -> None:
    check_tensor("mu", mu)
    check_batched("mu", mu)  # type: ignore[arg-type]
    if logvar is None:
        check_packed("mu", mu, packed_dim)  # type: ignore[arg-type]
        return
    check_tensor("logvar", logvar)
    assert isinstance(mu, Tensor)
    assert isinstance(logvar, Tensor)
    if mu.shape != logvar.shape:
        hint = "; logvar.expand_as(mu) is" if broadcasts(logvar.shape, mu.shape) else ""
        raise ValueError(f"logvar: expected the shape of mu {tuple(mu.shape)}, got {tuple(logvar.shape)}{hint}")
    check_same_device("logvar", logvar, "mu", mu)


def check_parameter(name: str, value: object, shape: torch.Size, other_name: str, other: Tensor) -> None:
    """Check what may be a number, or a tensor that broadcasts to a shape and lies where another does."""
    if isinstance(value, Tensor):
        check_tensor(name, value)
        check_same_device(name, value, other_name, other)
        check_broadcast(name, value, shape)
    elif not is_number(value) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a tensor, a number or None, got {type(value).__name__}")


def check_broadcast(name: str, value: Tensor, shape: torch.Size) -> None:
    if not broadcasts(value.shape, shape):
        raise ValueError(f"{name}: expected a shape that broadcasts to {tuple(shape)}, got {tuple(value.shape)}")


def check_weight(name: str, weight: object, shape: torch.Size, of: str, mean: Tensor) -> None:
    if not isinstance(weight, Tensor):
        hint = f"; as a tensor it is torch.tensor({weight}, device={of}.device)" if is_number(weight) else ""
        raise TypeError(f"{name}: expected a tensor or None, got {type(weight).__name__}{hint}")
    check_tensor(name, weight, integers=True)
    check_same_device(name, weight, of, mean)
    if weight.shape == shape[:1] and not broadcasts(weight.shape, shape):
        each = "unsqueeze(1)" if len(shape) == 2 else f"view({', '.join(['-1', *['1'] * (len(shape) - 1)])})"
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {tuple(shape)}, got {tuple(weight.shape)}; one a sample is "
            f"{name}.{each}"
        )
    check_broadcast(name, weight, shape)


def checked_reduction(reduction: object) -> TermReduction:
    if not isinstance(reduction, str) or reduction not in (*TOTALS, "none"):
        expected = ", ".join(map(repr, TOTALS))
        raise ValueError(f"reduction: expected {expected} or 'none', got {reduction!r}")
    return reduction  # type: ignore[return-value]


def checked_reductions(reduction: object) -> tuple[TermReduction, TermReduction]:
    """Those of the likelihood and of the divergence."""
    if not isinstance(reduction, (tuple, list)):
        return (checked_reduction(reduction),) * 2
    if len(reduction) != 2:
        expected = ", ".join(map(repr, TOTALS))
        raise ValueError(
            f"reduction: expected {expected} or 'none', got {reduction!r}; or a pair of these, the likelihood's and "
            "the KL's"
        )
    first, second = map(checked_reduction, reduction)
    if (first == "none") != (second == "none"):
        raise ValueError(f"reduction: expected 'none' for both or for neither, got {reduction!r}")
    return first, second


def checked_dim(dim: object, dims: int, reduction: str) -> tuple[int, ...] | None:
    """Dimensions to sum over, of so many; None for all but the first."""
    if dim is None:
        return None
    if reduction != "none":
        raise ValueError(f"dim: expected None with reduction={reduction!r}; it is for 'none'")
    found = dimensions("dim", dim, dims)
    return None if found and found == tuple(range(1, dims)) else found


def dimensions(name: str, dim: object, dims: int) -> tuple[int, ...]:
    given = (dim,) if isinstance(dim, numbers.Integral) else dim
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"{name}: expected an integer or a sequence of them, got {type(dim).__name__}")
    found = set()
    for d in given:
        if not isinstance(d, numbers.Integral) or isinstance(d, bool):
            raise TypeError(f"{name}: expected an integer or a sequence of them, got {dim!r}")
        if not -dims <= int(d) < dims:
            raise ValueError(f"{name}: expected a dimension from {-dims} to {dims - 1}, got {d}")
        found.add(int(d) % dims)
    if len(found) != len(given):
        raise ValueError(f"{name}: expected each dimension once, got {dim!r}")
    return tuple(sorted(found))


def shown(value: object) -> str:
    """What came, as errors say it."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def check_number(name: str, value: object) -> None:
    if isinstance(value, Tensor):
        if value.dim() != 0 or not value.dtype.is_floating_point:
            raise ValueError(
                f"{name}: expected a number or a 0-dim float tensor, got shape {tuple(value.shape)}, {value.dtype}"
            )
    elif not is_number(value):
        raise TypeError(f"{name}: expected a number or a 0-dim tensor, got {type(value).__name__}")


def check_factor(name: str, value: object, x: Tensor) -> None:
    """Check a coefficient; a tensor of one has a value, wherever it is."""
    check_number(name, value)
    if isinstance(value, Tensor) and value.device.type == "meta" != x.device.type:
        check_same_device(name, value, "x", x)


def is_number(value: object) -> bool:
    """Whether it is a number as PyTorch takes them: no fraction. (A bool counts where it is a coefficient.)"""
    return isinstance(value, numbers.Real) and (
        isinstance(value, numbers.Integral) or not isinstance(value, numbers.Rational)
    )


def check_integer(name: str, value: object) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")


def check_count(name: str, value: object, *, optional: bool = True) -> None:
    """Check how many of something there shall be: one at least; or None, as usual."""
    if optional and value is None:
        return
    if type(value) is not int and (not isinstance(value, numbers.Integral) or isinstance(value, bool)):
        raise TypeError(f"{name}: expected an integer{' or None' if optional else ''}, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def check_nothing_beside_kl(
    mu: object, logvar: object, prior_mu: object, prior_logvar: Any, latent_weight: object
) -> None:
    """Check that nothing is given that a KL, which is given, was made of."""
    if mu is not None or logvar is not None:
        raise ValueError("kl: expected None when mu or logvar is given; they say the same thing")
    if prior_mu is not None or was_given(prior_logvar):
        raise ValueError("kl: expected None when prior_mu or prior_logvar is given; it is to a prior already")
    if latent_weight is not None:
        raise ValueError("latent_weight: expected None when kl is given, whose elements are summed already")


def check_kl(kl: Tensor, x: Tensor, reduction: object) -> None:
    """Check a KL that is given: one value per sample of its batch, as `check_batch_size` says."""
    several = '; of several samples in front, take the likelihood by itself, one value each: reduction="none", dim=-1'
    if kl.dim() != 1:
        hint = several if kl.dim() == 2 and kl.shape[1] == x.shape[0] else ""
        raise ValueError(f"kl: expected one value per sample, shape ({x.shape[0]},), got {tuple(kl.shape)}{hint}")
    # (Sizes that differ alone are compared further: a compiler would hold on to what it saw of others.)
    is_of_several = kl.shape[0] != x.shape[0] and x.dim() > 2 and kl.shape[0] == x.shape[1]
    check_batch_size("kl", kl, x, reduction, hint=several if is_of_several else "")


def check_batch_size(name: str, value: Tensor, x: Tensor, reduction: object, *, hint: str = "") -> None:
    """Check that the KL is of the samples of x. Of a pair of totals, each is of a batch of its own.

    (The frames of a video are one batch, and the latents of videos another.)
    """
    is_pair_of_totals = isinstance(reduction, (tuple, list)) and "none" not in reduction
    if value.shape[0] != x.shape[0] and not is_pair_of_totals:
        hint = hint or "; a pair of reductions, of the likelihood's and of the KL's, is of a batch each"
        raise ValueError(f"{name}: expected the batch size of x, {x.shape[0]}, got {value.shape[0]}{hint}")
