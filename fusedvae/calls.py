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
from .backend.reference import FORMULAS, Formula, forms_of, working_dtype
from .backend.specs import Objective, Sampling, SamplingGradient, TermGradient, factor_of, unpacked
from .layout import broadcasts
from .torch_private import is_any_autocast_enabled, is_watched, likeness

Operand = Tensor | float | None
Operands = Sequence[Operand]

# --- the one place where calls are kept -------------------------------------------------------------------------------

_Found = TypeVar("_Found")


class _Entry(NamedTuple):
    """A call, and which of its operands are tensors, with a test of whether others are like them."""

    call: Any
    tensors: list[int]
    are_alike: Callable[..., bool]


_calls: dict[tuple[Any, ...], _Entry] = {}
"""Each by its kind (what makes it, its operands' types, options and settings) and what its tensors are like; and by its
kind alone the one that was found last. Mostly the next call is like it, and to test that is several times as quick as
to ask what each tensor is like."""
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
        context = (
            torch.is_grad_enabled(),
            is_any_autocast_enabled() and torch.is_autocast_enabled(_device_of(whole).type),
            backend.current_choice(),
        )
        kind = (make, *map(type, operands), *options, *context)
        kept = _calls.get(kind)
        if kept is not None:
            tensors: list[Any] = [operands[k] for k in kept.tensors]
            # To compare the strides that a nested tensor has not would end the process.
            if True not in [t.is_nested for t in tensors] and kept.are_alike(*tensors):
                return kept.call
        key = (
            kind,
            # All that may matter of an operand but the values in it.
            *[
                (t.shape, t.stride(), t.dtype, t.device, t.requires_grad, t.is_neg()) if isinstance(t, Tensor) else None
                for t in operands
            ],
        )
        kept = _calls.get(key)
    except (AttributeError, RuntimeError, TypeError):  # not a tensor, without strides, or unhashable
        return make(whole, *options)
    if kept is None:
        call = make(whole, *options)
        if len(_calls) >= _MOST_CALLS:
            _calls.clear()
        where = positions([isinstance(t, Tensor) for t in operands])
        kept = _calls[key] = _Entry(call, where, likeness([operands[k] for k in where]))  # type: ignore[misc]
    _calls[kind] = kept
    return kept.call


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


KERNEL_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.bool))
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


class _Description(NamedTuple):
    """An output, but for its memory."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype


def _allocated(descriptions: Sequence[_Description], device: torch.device) -> list[Tensor]:
    """Such outputs, with memory."""
    return [torch.empty_strided(shape, strides, dtype=dtype, device=device) for shape, strides, dtype in descriptions]


def _descriptions(tensors: Sequence[Tensor]) -> list[_Description]:
    return [_Description(t.shape, t.stride(), t.dtype) for t in tensors]


def empty_gradients(operands: Operands, needed: Sequence[bool], **options: Any) -> list[Tensor]:
    """A tensor for the gradient of each operand that is needed, uninitialised; ``options`` as torch's."""
    return [torch.empty_like(operands[k], **options) for k in positions(needed)]  # type: ignore[arg-type]


def _memory_of_gradients(operands: Operands, made: Sequence[int], in_place: bool) -> list[Tensor]:
    """Memory for the gradients of these operands; ``in_place``, that of the first operand is its own."""
    if in_place and made and made[0] == 0:
        first = operands[0].detach()  # type: ignore[union-attr]
        return [first, *[torch.empty_like(operands[k]) for k in made[1:]]]  # type: ignore[arg-type]
    return [torch.empty_like(operands[k]) for k in made]  # type: ignore[arg-type]


def _device_of(operands: Operands) -> torch.device:
    return operands[0].device  # type: ignore[union-attr]


# --- objectives -------------------------------------------------------------------------------------------------------


def _shape_without(shape: torch.Size, dim: Sequence[int]) -> torch.Size:
    """What is left of a shape when it is summed over some dimensions."""
    return torch.Size([size for d, size in enumerate(shape) if d not in dim])


def _spread_out(name: str, part: Part | None, shape: torch.Size | None, dim: Sequence[int] | None) -> Part | None:
    """A part that was summed over some dimensions of a shape (all but the first), as one that broadcasts to it."""
    if part is None or not part.shape or shape is None:
        return part
    dim = range(1, len(shape)) if dim is None else dim
    if len(part.shape) + len(dim) != len(shape):
        raise ValueError(f"{name}: expected {tuple(shape)} less the dimensions {tuple(dim)}, got {tuple(part.shape)}")
    return part.with_ones(dim)


def objective_values(spec: Objective, operands: Operands, **options: Any) -> list[Tensor]:
    """The values of an objective, uninitialised; ``options`` as torch's."""
    first = operands[0]
    assert isinstance(first, Tensor)
    if spec.values == "element":
        assert spec.dim is not None
        (term,) = spec.terms()
        mean = unpacked(term.formula, operands[term.inputs], spec.packed_dim)[0]
        assert isinstance(mean, Tensor)
        if not spec.dim:
            return [torch.empty_like(mean, dtype=spec.dtype, **options)]
        return [mean.new_empty(_shape_without(mean.shape, spec.dim), dtype=spec.dtype, **options)]
    loss = first.new_empty(first.shape[:1] if spec.values == "sample" else (), dtype=spec.dtype, **options)
    return [loss, torch.empty_like(loss), torch.empty_like(loss)] if spec.returns_terms else [loss]


def objective_outputs(operands: Operands, spec: Objective, **options: Any) -> list[Tensor]:
    """The values, and the gradients that are made with them."""
    return [*objective_values(spec, operands, **options), *empty_gradients(operands, spec.needed, **options)]


class ObjectiveCall:
    """An objective: its values, and the gradients of the loss that are made with them.

    ``in_place`` has that of the first operand written into its memory.
    """

    def __init__(
        self, operands: Operands, spec: Objective, keeps_workspace: bool = True, in_place: bool = False
    ) -> None:
        self.spec = spec
        self._in_place = in_place
        self.with_gradient = positions(spec.needed)
        """The operands whose gradients are made with the values."""
        self.device = _device_of(operands)
        outputs = objective_outputs(operands, spec, device="meta")
        values = len(outputs) - len(self.with_gradient)
        self._values = _descriptions(outputs[:values])
        # Not on a GPU, where a compiler may record the call in a graph and owns all memory that is made meanwhile.
        is_plain = self._values[0].shape == () and self.device.type == "cpu"
        self._total = torch.empty((), dtype=spec.dtype, device=self.device) if is_plain else None
        sources = [*operands, *outputs]
        _check_devices(operands)
        work = _objective_work(spec, operands, parts_of(sources), values)
        self._launch = backend.kernels(spec.backend).prepare_objective(
            work, len(sources), self.device, keeps_workspace=keeps_workspace
        )

    def run(self, operands: Operands) -> tuple[list[Tensor], list[Tensor]]:
        """The values (the loss, or loss, likelihood and divergence), and the gradients."""
        # The large ones first: what lies above them keeps malloc from giving their pages back between two calls, and
        # each would be a fault at the next.
        gradients = _memory_of_gradients(operands, self.with_gradient, self._in_place)
        if self._total is not None:  # nothing allocates a number quicker than this
            values = [torch.empty_like(self._total) for _ in self._values]
        else:
            values = _allocated(self._values, self.device)
        self._launch((*operands, *values, *gradients))
        return values, gradients

    def outputs(self, operands: Operands) -> list[Tensor]:
        """Both in one list."""
        values, gradients = self.run(operands)
        return values + gradients


def _objective_work(spec: Objective, operands: Operands, parts: Sequence[Part | None], values: int) -> ObjectiveWork:
    count = len(operands)
    grads: list[Part | None] = [None] * count
    for k, made in zip(positions(spec.needed), parts[count + values :], strict=True):
        grads[k] = made
    grad_scale = None if spec.grad_scale is None else parts[spec.grad_scale]
    check_fit(["beta", "grad_scale"], [parts[spec.beta], grad_scale], torch.Size())
    terms, batches = [], set()
    for term in spec.terms():
        formula, span = term.formula, term.inputs
        inputs = _taken_apart(formula, parts[span], parts[span], spec.packed_dim)
        shape = inputs[0].shape if inputs[0] else None
        if shape is None or None in inputs:
            raise TypeError(f"{formula.name}: expected {', '.join(formula.inputs)}; got fewer")
        weight = None if term.weight is None else parts[term.weight]
        normalizer = None if term.normalizer is None else parts[term.normalizer]
        check_fit((*formula.inputs, "weight"), (*inputs, weight), shape)
        check_fit(["normalizer"], [normalizer], torch.Size())
        batches.add(shape[0] if spec.values == "sample" and len(shape) else 0)
        terms.append(
            TermWork(
                formula,
                _is_in_double(*operands[span], None if term.weight is None else operands[term.weight]),
                inputs,  # type: ignore[arg-type]
                _taken_apart(formula, grads[span], parts[span], spec.packed_dim),
                term.forms,
                term.gains,
                factor=factor_of(term.reduction, shape),
                normalizer=normalizer,
                constant=formula.constant if spec.full else 0.0,
                coefficient=parts[spec.beta] if formula.is_divergence else None,
                weight=weight,
                value=_spread_out("value", parts[count], shape, spec.dim) if spec.values == "element" else None,
                out=parts[count + 1 + formula.is_divergence] if spec.returns_terms else None,
            )
        )
    if len(batches) > 1:
        raise ValueError(f"operands: expected one batch size, got {', '.join(map(str, sorted(batches)))}")
    return ObjectiveWork(tuple(terms), spec.values, None if spec.values == "element" else parts[count], grad_scale)


def _is_in_double(*inputs: Operand) -> bool:
    return working_dtype(*inputs) == torch.float64


class TermGradientCall:
    """The gradients of sum(incoming * weight * value) of a formula; both factors broadcast to its mean's shape.

    ``in_place`` has that of the first operand written into its memory.
    """

    def __init__(
        self, operands: Operands, spec: TermGradient, keeps_workspace: bool = True, in_place: bool = False
    ) -> None:
        self._in_place = in_place
        self.needed = positions(spec.needed)
        formula = FORMULAS[spec.formula]
        count = len(operands)
        sources = [*operands, *empty_gradients(operands, spec.needed, device="meta")]
        parts = parts_of(sources)
        grads: list[Part | None] = [None] * len(formula.inputs)
        for k, made in zip(self.needed, parts[count:], strict=True):
            grads[k] = made
        given = parts[: count - 2]
        inputs = _taken_apart(formula, given, given, spec.packed_dim)
        weight, incoming = parts[count - 2 : count]
        shape = inputs[0].shape if inputs[0] else None
        incoming = _spread_out("incoming", incoming, shape, spec.dim)
        check_fit((*formula.inputs, "weight", "incoming"), (*inputs, weight, incoming), shape)
        _check_devices(operands)
        term = TermWork(
            formula,
            _is_in_double(*operands[:-1]),  # the weight, too
            inputs,  # type: ignore[arg-type]
            _taken_apart(formula, grads, given, spec.packed_dim),
            forms_of(spec.maps, spec.squared, spec.limits),
            spec.gains or None,
            weight=weight,
            incoming=incoming,
        )
        work = ObjectiveWork((term,), "element", None)
        self._launch = backend.kernels(spec.backend).prepare_objective(
            work, len(sources), _device_of(operands), keeps_workspace=keeps_workspace
        )

    def outputs(self, operands: Operands) -> list[Tensor]:
        """The gradients."""
        gradients = _memory_of_gradients(operands, self.needed, self._in_place)
        self._launch((*operands, *gradients))
        return gradients


# --- the latent -------------------------------------------------------------------------------------------------------


def latent_outputs(operands: Operands, spec: Sampling, **options: Any) -> list[Tensor]:
    """The sample and its divergence, uninitialised."""
    mean, scale = unpacked(spec.formula, operands[:-3], spec.packed_dim)[:2]
    assert isinstance(mean, Tensor)
    assert isinstance(scale, Tensor)
    dtype = torch.promote_types(mean.dtype, scale.dtype)
    shape = spec.shape(mean.shape)
    if spec.samples is None:
        z = torch.empty_like(mean, dtype=dtype, **options)
    else:
        z = mean.new_empty(shape, dtype=dtype, **options)
    if spec.kl_dtype is None:
        return [z]
    return [z, mean.new_empty(_shape_without(shape, spec.kl_dim), dtype=spec.kl_dtype, **options)]


def _latent_work(
    spec: Sampling | SamplingGradient,
    operands: Operands,
    parts: Sequence[Part | None],
    *,
    grads: Sequence[Part | None] = (),
    incoming: Part | None = None,
    grad_z: Part | None = None,
    z: Part | None = None,
    value: Part | None = None,
) -> LatentWork:
    """The work of a pass, of all operands' parts, and those of what comes in and goes out."""
    formula = spec.formula
    count = len(formula.inputs)
    given, (seed, offset, noise) = parts[:count], parts[count : count + 3]
    inputs = _taken_apart(formula, given, given, spec.packed_dim)
    mean = inputs[0].shape if inputs[0] else None
    if mean is None or None in inputs:
        raise TypeError(f"{formula.name}: expected {', '.join(formula.inputs)}; got fewer")
    shape = spec.shape(mean)
    incoming = _spread_out("grad_kl", incoming, shape, spec.kl_dim)
    value = _spread_out("kl", value, shape, spec.kl_dim)
    check_fit(formula.inputs, inputs, mean)
    check_fit(("noise", "grad_z", "grad_kl"), (noise, grad_z, incoming), shape)
    check_fit(["offset"], [offset], torch.Size())
    needs_noise = noise is None and (z is not None or grad_z is not None or spec.at_sample)
    _check_seed(operands[count], needed=needs_noise)
    _check_devices(operands)
    term = TermWork(
        formula,
        _is_in_double(*operands[:count], operands[count + 2]),
        inputs,  # type: ignore[arg-type]
        _taken_apart(formula, grads, given, spec.packed_dim) if grads else (None,) * count,
        spec.forms,
        incoming=incoming,
        value=value,
    )
    return LatentWork(term, shape, spec.at_sample, seed, offset, noise, grad_z, z)


class LatentCall:
    """The sample of the latent and, with it, its divergence."""

    def __init__(self, operands: Operands, spec: Sampling, keeps_workspace: bool = True) -> None:
        self.spec = spec
        self.device = _device_of(operands)
        outputs = latent_outputs(operands, spec, device="meta")
        self._outputs = _descriptions(outputs)
        sources = [*operands, *outputs]
        parts = parts_of(sources)
        z, *value = parts[len(operands) :]
        work = _latent_work(spec, operands, parts, z=z, value=value[0] if value else None)
        self._launch = backend.kernels(spec.backend).prepare_latent(
            work, len(sources), self.device, keeps_workspace=keeps_workspace
        )

    def outputs(self, operands: Operands) -> list[Tensor]:
        """The sample, and the divergence if the call has one."""
        outputs = _allocated(self._outputs, self.device)
        self._launch((*operands, *outputs))
        return outputs


class LatentGradientCall:
    """The gradients of sum(grad_z * z) + sum(grad_kl * divergence)."""

    def __init__(self, operands: Operands, spec: SamplingGradient, keeps_workspace: bool = True) -> None:
        self.needed = positions(spec.needed)
        sources = [*operands, *empty_gradients(operands, spec.needed, device="meta")]
        parts = parts_of(sources)
        grads: list[Part | None] = [None] * len(spec.formula.inputs)
        for k, made in zip(self.needed, parts[len(operands) :], strict=True):
            grads[k] = made
        grad_z, incoming = parts[len(operands) - 2 : len(operands)]
        work = _latent_work(spec, operands, parts, grads=grads, incoming=incoming, grad_z=grad_z)
        self._launch = backend.kernels(spec.backend).prepare_latent(
            work, len(sources), _device_of(operands), keeps_workspace=keeps_workspace
        )

    def outputs(self, operands: Operands) -> list[Tensor]:
        """The gradients."""
        gradients = [torch.empty_like(operands[k]) for k in self.needed]  # type: ignore[arg-type]
        self._launch((*operands, *gradients))
        return gradients


# --- the incoming factor ----------------------------------------------------------------------------------------------


class ScaleCall:
    """Dense tensors times a 0-dim factor, in place; nobody looks at the factor on the host.

    Operands: the tensors; the factor; and None, or a number whose product with the factor is wanted, too.
    """

    def __init__(self, operands: Operands, backend_name: str) -> None:
        factor, number = operands[-2:]
        *tensors, of_factor, coefficient, product = parts_of([*operands, None if number is None else factor])
        assert of_factor is not None
        kernels = backend.kernels(backend_name)
        given = [t for t in tensors if t is not None]
        self._launch = kernels.prepare_scale(given, of_factor, _device_of(operands), coefficient, product)

    def run(self, tensors: Sequence[Tensor], factor: Tensor, coefficient: float | None = None) -> Sequence[Tensor]:
        """The tensors, and the product after them."""
        if coefficient is None:
            self._launch((*tensors, factor))
            return tensors
        product = torch.empty_like(factor)
        self._launch((*tensors, factor, coefficient, product))
        return [*tensors, product]
