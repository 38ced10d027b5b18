"""What an encoder, a decoder and a prior take and give: calls of them, and checks of shapes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import networks
from ..backend.specs import shape_of_mean
from ..functional.checks import check_count


def called(name: str, module: nn.Module, *arguments: Tensor, condition: Any) -> object:
    """What a module gives, with an error of its own where it takes no condition, or must have one."""
    given = arguments if condition is None else (*arguments, condition)
    if torch.compiler.is_compiling():
        return module(*given)
    try:
        return module(*given)
    except TypeError as error:
        kind = type(module).__name__
        if _takes(module, given):  # the error is from inside
            raise
        if arguments and condition is None and isinstance(module, (networks.LabelledEncoder, networks.LabelledDecoder)):
            expected = f"labels of shape ({len(arguments[0])},), as the {name} is a {kind}"
        elif condition is None and _takes(module, (*given, None)):
            expected = f"one, as the {name} ({kind}) takes it"
        elif condition is not None and _takes(module, arguments):
            expected = f"None, as the {name} ({kind}) takes none"
        else:
            raise
        got = None if condition is None else type(condition).__name__
        raise TypeError(f"condition: expected {expected}; got {got}") from error


def _takes(module: nn.Module, arguments: Sequence[object]) -> bool:
    """Whether a module can be called with so many arguments, as far as that can be told."""
    try:
        inspect.signature(module.forward).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # it has no signature
        pass
    return True


_Condition = TypeVar("_Condition")


def repeated(condition: _Condition, times: int, batch: int) -> _Condition:
    """A condition of as many batches, one after the other: tensors of one of them, in tuples, lists and dicts."""
    found: Any = condition
    if isinstance(condition, Tensor) and condition.shape[:1] == (batch,):
        found = condition.expand(times, *condition.shape).flatten(0, 1)
    elif isinstance(condition, dict):
        found = copy.copy(condition)  # of its own kind, which may have more than its items
        for key, value in condition.items():
            found[key] = repeated(value, times, batch)
    elif isinstance(condition, (tuple, list)):
        values = [repeated(value, times, batch) for value in condition]
        found = type(condition)(*values) if hasattr(condition, "_fields") else type(condition)(values)
    return found


def mean_and_scale(name: str, output: object) -> tuple[Tensor, Tensor | None]:
    """Take apart what a module gave: (tensor, None), or a pair of tensors."""
    if isinstance(output, Tensor):
        return output, None
    if isinstance(output, (tuple, list)) and len(output) == 2 and all(isinstance(o, Tensor) for o in output):
        return output[0], output[1]
    got = type(output).__name__
    if isinstance(output, (tuple, list)):
        got = f"{got} of ({', '.join(type(o).__name__ for o in output)})"
    raise TypeError(f"{name}: expected a tensor or a pair of tensors (mean, logvar) from it, got {got}")


def with_zi_logits(output: object) -> tuple[object, Tensor]:
    """What a decoder gave before the logits of a dropout, and these."""
    if not isinstance(output, (tuple, list)) or not 2 <= len(output) <= 3 or not isinstance(output[-1], Tensor):
        raise TypeError(
            "decoder: expected (mu, theta, zi_logits) from it, or (mu, zi_logits) where recon_logvar is given, as the "
            f"likelihood is zero_inflated_negative_binomial; got {type(output).__name__}"
        )
    return (output[0] if len(output) == 2 else tuple(output[:2])), output[-1]


def checked_latent_shape(latent_dim: int | Sequence[int | None]) -> tuple[int | None, ...]:
    """Sizes of one sample's latent."""
    sizes = (latent_dim,) if isinstance(latent_dim, Integral) else latent_dim
    if isinstance(sizes, (str, bytes)) or not isinstance(sizes, Sequence) or isinstance(latent_dim, bool):
        raise TypeError(f"latent_dim: expected an integer or a sequence of them, got {type(latent_dim).__name__}")
    for size in sizes:
        if size is not None and (isinstance(size, bool) or not isinstance(size, Integral)):
            raise TypeError(f"latent_dim: expected an integer or a sequence of them, got {latent_dim!r}")
    if not sizes or any(size is not None and size < 1 for size in sizes):
        raise ValueError(f"latent_dim: expected positive sizes, got {latent_dim!r}")
    return tuple(None if size is None else int(size) for size in sizes)


def is_plain_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def checked_count(name: str, value: Any) -> int:
    check_count(name, value, optional=False)
    return int(value)


def broadcasts_to(shape: Sequence[int], expected: Sequence[int | None]) -> bool:
    """Whether one shape does to another, of which some sizes may be anything."""
    lead = len(expected) - len(shape)
    return lead >= 0 and all(s == 1 or t is None or s == t for s, t in zip(shape, expected[lead:], strict=True))


def check_prior(moment: torch.Size, shape: Sequence[int | None]) -> None:
    """Check the shape of a prior's mean, or scale, against that of latents."""
    if not broadcasts_to(moment, shape):
        raise ValueError(f"prior: expected moments that broadcast to {shown_shape(shape)}, got shape {tuple(moment)}")


def shape_of(posterior: tuple[Tensor, Tensor | None]) -> torch.Size:
    return shape_of_mean(*posterior, 1)


def fits(shape: Sequence[int], expected: Sequence[int | None]) -> bool:
    return len(shape) == len(expected) and all(e in (None, s) for s, e in zip(shape, expected, strict=True))


def shown_shape(sizes: Sequence[int | None]) -> str:
    """A shape as an error shows it: sizes that may be anything are ``*``."""
    inside = ", ".join("*" if size is None else str(size) for size in sizes)
    return f"({inside},)" if len(sizes) == 1 else f"({inside})"


def check_generator(generator: object) -> None:
    """Check what may be one generator, and no list of them."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
