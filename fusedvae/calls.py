"""Calls: all that is worked out once of an operation on operands of some sizes, strides and dtypes.

Checking arguments, planning how kernels walk the operands and finding what runs them takes longer than many of the
kernels, and a training loop makes the same calls over and over. So each is worked out once, as an object that is kept
in one place: `find` makes it or finds it again. It allocates the outputs and launches; what it launches, a backend has
prepared. Nothing in it depends on values in tensors, or on numbers among the operands.

The sources of a launch are the operands, in order, and then the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import backend
from .backend import LatentWork, ObjectiveWork, Part, TermWork
from .backend.reference import FORMULAS, Formula, Objective, factor_of, unpack, working_dtype
from .layout import broadcasts
from .torch_private import is_any_autocast_enabled, is_watched

Operand = Tensor | float | None
Operands = Sequence[Operand]

# --- the one place where calls are kept -------------------------------------------------------------------------------

_Found = TypeVar("_Found")

_calls: dict[tuple[Any, ...], Any] = {}
_MOST_CALLS = 1024


def find(make: Callable[..., _Found], operands: Operands, *options: Any, whole: Operands | None = None) -> _Found:
    """What ``make(operands, *options)`` returned for operands of these types, sizes, strides and dtypes.

    ``make`` is the class of a call, or a function that checks the operands before it makes one. Where the options imply
    what some operands are like, ``whole`` has them too, for ``make`` to take.
    """
    whole = operands if whole is None else whole
    if is_watched():  # what a tracer's stand-ins are like says nothing of tensors
        return make(whole, *options)
    try:
        key = (
            make,
            # All that may matter of an operand but the values in it.
            *[
                (type(t), t.shape, t.stride(), t.dtype, t.device, t.requires_grad, t.is_neg())
                if isinstance(t, Tensor)
                else type(t)
                for t in operands
            ],
            *options,
            torch.is_grad_enabled(),
            is_any_autocast_enabled() and torch.is_autocast_enabled(_device_of(whole).type),
            backend.current_choice(),
        )
        call = _calls.get(key)
    except (AttributeError, RuntimeError, TypeError):  # not a tensor, without strides, or unhashable
        return make(whole, *options)
    if call is None:
        call = make(whole, *options)
        if len(_calls) >= _MOST_CALLS:
            _calls.clear()
        _calls[key] = call
    return call


# --- parts ------------------------------------------------------------------------------------------------------------


def parts_of(sources: Operands) -> list[Part | None]:
    """The sources of a launch as kernels take them; None where there is none."""
    return [
        Part(k, t.shape, t.stride(), t.dtype)
        if isinstance(t, Tensor)
        else None
        if t is None
        else Part(k, None, (), None)
        for k, t in enumerate(sources)
    ]


def _taken_apart(
    formula: Formula, parts: Sequence[Part | None], inputs: Sequence[Part | None], packed_dim: int
) -> tuple[Part | None, ...]:
    """Parts of a formula's inputs, or of their gradients, as halves where the inputs are packed."""
    found = list(parts)
    for mean, scale in formula.pairs:
        whole = found[mean]
        if inputs[scale] is None and whole is not None:
            found[mean], found[scale] = whole.halves(packed_dim)
    return tuple(found)


KERNEL_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8))
"""What kernels read."""


def check_fit(names: Sequence[str], parts: Sequence[Part | None], shape: torch.Size | None) -> None:
    """Check that operands broadcast to a shape, and are of dtypes that kernels read.

    Functions have checked theirs; operators may be called by anyone, and kernels read memory as they are told to.
    """
    for name, part in zip(names, parts, strict=True):
        if part is None or part.shape is None:
            continue
        if shape is None or not broadcasts(part.shape, shape):
            expected = "no tensor" if shape is None else f"a shape that broadcasts to {tuple(shape)}"
            raise ValueError(f"{name}: expected {expected}, got {tuple(part.shape)}")
        if part.dtype not in KERNEL_DTYPES:
            raise TypeError(f"{name}: expected a float tensor, got {part.dtype}")


def _check_seed(seed: Operand, needed: bool) -> None:
    if isinstance(seed, Tensor) and (seed.dim() != 0 or seed.dtype != torch.int64):
        raise ValueError(f"seed: expected a 0-dim int64 tensor, got shape {tuple(seed.shape)}, {seed.dtype}")
    if seed is None and needed:
        raise ValueError("seed: expected one, or noise; got neither")


def _check_devices(operands: Operands) -> None:
    devices = {t.device for t in operands if isinstance(t, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"operands: expected on one device, got them on {', '.join(sorted(map(str, devices)))}")


def positions(flags: Sequence[object]) -> list[int]:
    """Of those that are set."""
    return [k for k, flag in enumerate(flags) if flag]


class _Like(NamedTuple):
    """An output, but for its memory."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype


def _made(likes: Sequence[_Like], device: torch.device) -> list[Tensor]:
    """Such outputs, with memory."""
    return [torch.empty_strided(shape, strides, dtype=dtype, device=device) for shape, strides, dtype in likes]


def _likes(tensors: Sequence[Tensor]) -> list[_Like]:
    return [_Like(t.shape, t.stride(), t.dtype) for t in tensors]


def _gradients(operands: Operands, needed: Sequence[bool], **options: Any) -> list[Tensor]:
    """A tensor for the gradient of each operand that is needed."""
    return [torch.empty_like(operands[k], **options) for k in positions(needed)]  # type: ignore[arg-type]


def _device_of(operands: Operands) -> torch.device:
    return operands[0].device  # type: ignore[union-attr]


# --- objectives -------------------------------------------------------------------------------------------------------


def objective_values(spec: Objective, operands: Operands, **options: Any) -> list[Tensor]:
    """The values of an objective, uninitialised; ``options`` as torch's."""
    first = operands[0]
    assert isinstance(first, Tensor)
    if spec.reduction == "element":
        loss = torch.empty_like(first, dtype=spec.dtype, **options)
    else:
        loss = first.new_empty(first.shape[:1] if spec.reduction == "sample" else (), dtype=spec.dtype, **options)
    return [loss, torch.empty_like(loss), torch.empty_like(loss)] if spec.returns_terms else [loss]


def objective_outputs(operands: Operands, spec: Objective, **options: Any) -> list[Tensor]:
    """The values, and the gradients that are made with them."""
    return [*objective_values(spec, operands, **options), *_gradients(operands, spec.needed, **options)]


class ObjectiveCall:
    """An objective: its values, and the gradients of the loss that are made with them."""

    def __init__(self, operands: Operands, spec: Objective) -> None:
        self.spec = spec
        self.made = positions(spec.needed)
        """The operands whose gradients are made with the values."""
        self.device = _device_of(operands)
        outputs = objective_outputs(operands, spec, device="meta")
        values = len(outputs) - len(self.made)
        self._values = _likes(outputs[:values])
        self._total = torch.empty((), dtype=spec.dtype, device=self.device) if self._values[0].shape == () else None
        sources = [*operands, *outputs]
        _check_devices(operands)
        work = _objective_work(spec, operands, parts_of(sources), values)
        self._launch = backend.kernels(spec.backend).prepare_objective(work, len(sources), self.device)

    def forward(self, operands: Operands) -> tuple[list[Tensor], list[Tensor]]:
        """The values (the loss, or loss, likelihood and divergence), and the gradients."""
        # The large ones first: what lies above them keeps malloc from giving their pages back between two calls, and
        # each would be a fault at the next.
        gradients = [torch.empty_like(operands[k]) for k in self.made]  # type: ignore[arg-type]
        if self._total is not None:  # nothing allocates a number quicker than this
            values = [torch.empty_like(self._total) for _ in self._values]
        else:
            values = _made(self._values, self.device)
        self._launch((*operands, *values, *gradients))
        return values, gradients

    def outputs(self, operands: Operands) -> list[Tensor]:
        """Both in one list."""
        values, gradients = self.forward(operands)
        return values + gradients


def _objective_work(spec: Objective, operands: Operands, parts: Sequence[Part | None], values: int) -> ObjectiveWork:
    count = len(operands)
    grads: list[Part | None] = [None] * count
    for k, made in zip(positions(spec.needed), parts[count + values :], strict=True):
        grads[k] = made
    check_fit(["beta"], [parts[spec.beta]], torch.Size())
    terms, batches = [], set()
    for formula, span in spec.terms():
        inputs = _taken_apart(formula, parts[span], parts[span], spec.packed_dim)
        shape = inputs[0].shape if inputs[0] else None
        if shape is None or None in inputs:
            raise TypeError(f"{formula.name}: expected {', '.join(formula.inputs)}; got fewer")
        check_fit(formula.inputs, inputs, shape)
        batches.add(shape[0] if spec.reduction == "sample" and len(shape) else 0)
        terms.append(
            TermWork(
                formula,
                spec.parameter,
                _is_in_double(*operands[span]),
                inputs,  # type: ignore[arg-type]
                _taken_apart(formula, grads[span], parts[span], spec.packed_dim),
                factor=factor_of(spec.reduction, shape),
                constant=formula.constant if spec.full else 0.0,
                coefficient=parts[spec.beta] if formula.is_divergence else None,
                value=parts[count] if spec.reduction == "element" else None,
                out=parts[count + 1 + formula.is_divergence] if spec.returns_terms else None,
            )
        )
    if len(batches) > 1:
        raise ValueError(f"operands: expected one batch size, got {', '.join(map(str, sorted(batches)))}")
    by_element = spec.reduction == "element"
    how = "element" if by_element else "sample" if spec.reduction == "sample" else "total"
    return ObjectiveWork(tuple(terms), how, None if by_element else parts[count])


def _is_in_double(*inputs: Operand) -> bool:
    return working_dtype(*inputs) == torch.float64


class TermGradientSpec(NamedTuple):
    """What the gradients of a term's weighted sum are, but for its operands: its inputs, and the weight."""

    formula: str
    parameter: float
    packed_dim: int
    needed: tuple[bool, ...]
    """The inputs that they are of."""
    backend: str


def term_gradients(operands: Operands, spec: TermGradientSpec, **options: Any) -> list[Tensor]:
    """The gradients, uninitialised."""
    return _gradients(operands, spec.needed, **options)


class TermGradientCall:
    """The gradients of sum(weight * value) of a formula; the weight broadcasts to its mean's shape."""

    def __init__(self, operands: Operands, spec: TermGradientSpec) -> None:
        self.needed = positions(spec.needed)
        formula = FORMULAS[spec.formula]
        count = len(operands)
        sources = [*operands, *term_gradients(operands, spec, device="meta")]
        parts = parts_of(sources)
        grads: list[Part | None] = [None] * len(formula.inputs)
        for k, made in zip(self.needed, parts[count:], strict=True):
            grads[k] = made
        inputs = _taken_apart(formula, parts[: count - 1], parts[: count - 1], spec.packed_dim)
        check_fit((*formula.inputs, "weight"), (*inputs, parts[count - 1]), inputs[0].shape if inputs[0] else None)
        _check_devices(operands)
        term = TermWork(
            formula,
            spec.parameter,
            _is_in_double(*operands[:-1]),
            inputs,  # type: ignore[arg-type]
            _taken_apart(formula, grads, parts[: count - 1], spec.packed_dim),
            weight=parts[count - 1],
        )
        work = ObjectiveWork((term,), "element", None)
        self._launch = backend.kernels(spec.backend).prepare_objective(work, len(sources), _device_of(operands))

    def outputs(self, operands: Operands) -> list[Tensor]:
        """The gradients."""
        gradients = [torch.empty_like(operands[k]) for k in self.needed]  # type: ignore[arg-type]
        self._launch((*operands, *gradients))
        return gradients


# --- the latent -------------------------------------------------------------------------------------------------------


class LatentSpec(NamedTuple):
    """What a pass over the latent is, but for its operands: mu, logvar, seed, noise (either of the two)."""

    kl_dtype: torch.dtype | None
    """Of the KL per sample; None for the sample alone."""
    packed_dim: int
    """The dimension along which mu and logvar are packed, if they are."""
    backend: str


def latent_outputs(operands: Operands, spec: LatentSpec, **options: Any) -> list[Tensor]:
    """The sample and its KL, uninitialised."""
    mu, logvar, _, _ = operands
    assert isinstance(mu, Tensor)
    mean, scale = unpack(mu, logvar, spec.packed_dim)  # type: ignore[arg-type]
    z = torch.empty_like(mean, dtype=torch.promote_types(mean.dtype, scale.dtype), **options)
    return [z] if spec.kl_dtype is None else [z, mu.new_empty(mu.shape[:1], dtype=spec.kl_dtype, **options)]


class LatentGradientSpec(NamedTuple):
    """What the gradients of a pass over the latent are; operands: those of the pass, then grad_z and grad_kl."""

    packed_dim: int
    backend: str


class LatentCall:
    """The sample of the latent and, with it, its KL per sample."""

    def __init__(self, operands: Operands, spec: LatentSpec) -> None:
        self.gradient = LatentGradientSpec(spec.packed_dim, spec.backend)
        self.device = _device_of(operands)
        outputs = latent_outputs(operands, spec, device="meta")
        self._outputs = _likes(outputs)
        sources = [*operands, *outputs]
        mu, logvar, seed, noise, z, *kl = parts_of(sources)
        mu, logvar = _pair(mu, logvar, logvar, spec.packed_dim)
        assert mu is not None
        assert logvar is not None
        check_fit(("mu", "logvar", "noise"), (mu, logvar, noise), mu.shape)
        _check_seed(operands[2], needed=noise is None)
        _check_devices(operands)
        in_double = _is_in_double(operands[0], operands[1], operands[3])
        work = LatentWork(in_double, mu, logvar, noise, seed, z=z, kl=kl[0] if kl else None)
        self._launch = backend.kernels(spec.backend).prepare_latent(work, len(sources), self.device)

    def outputs(self, operands: Operands) -> list[Tensor]:
        """The sample, and the KL if the call has one."""
        outputs = _made(self._outputs, self.device)
        self._launch((*operands, *outputs))
        return outputs


def latent_gradients(operands: Operands, spec: LatentGradientSpec, **options: Any) -> list[Tensor]:
    """The gradients of mu and logvar, or of the packed tensor, uninitialised."""
    return _gradients(operands, (True, operands[1] is not None), **options)


class LatentGradientCall:
    """The gradients of sum(grad_z * z) + sum(grad_kl * kl)."""

    def __init__(self, operands: Operands, spec: LatentGradientSpec) -> None:
        sources = [*operands, *latent_gradients(operands, spec, device="meta")]
        mu, logvar, seed, noise, grad_z, grad_kl, grad_mu, *grad_logvar = parts_of(sources)
        grad_mu, grad_of_logvar = _pair(grad_mu, grad_logvar[0] if grad_logvar else None, logvar, spec.packed_dim)
        mu, logvar = _pair(mu, logvar, logvar, spec.packed_dim)
        assert mu is not None
        assert logvar is not None
        check_fit(("mu", "logvar", "noise", "grad_z"), (mu, logvar, noise, grad_z), mu.shape)
        check_fit(["grad_kl"], [grad_kl], mu.shape and mu.shape[:1])
        _check_seed(operands[2], needed=noise is None and grad_z is not None)
        _check_devices(operands)
        in_double = _is_in_double(operands[0], operands[1], operands[3])
        work = LatentWork(
            in_double, mu, logvar, noise, seed, grad_z, grad_kl, grad_mu=grad_mu, grad_logvar=grad_of_logvar
        )
        self._launch = backend.kernels(spec.backend).prepare_latent(work, len(sources), _device_of(operands))

    def outputs(self, operands: Operands) -> list[Tensor]:
        """The gradients."""
        gradients = [torch.empty_like(t) for t in operands[:2] if t is not None]  # type: ignore[arg-type]
        self._launch((*operands, *gradients))
        return gradients


def _pair(
    mean: Part | None, scale: Part | None, second: Part | None, packed_dim: int
) -> tuple[Part | None, Part | None]:
    """A mean's part and its scale's, taken apart where there is no second operand."""
    return mean.halves(packed_dim) if second is None and mean is not None else (mean, scale)


# --- the incoming factor ----------------------------------------------------------------------------------------------


class ScaleCall:
    """Dense tensors times a 0-dim factor, in place; nobody looks at the factor on the host."""

    def __init__(self, operands: Operands, backend_name: str) -> None:
        *tensors, factor = parts_of(operands)
        assert factor is not None
        kernels = backend.kernels(backend_name)
        self._launch = kernels.prepare_scale([t for t in tensors if t is not None], factor, _device_of(operands))

    def run(self, tensors: Sequence[Tensor], factor: Tensor) -> None:
        self._launch((*tensors, factor))
