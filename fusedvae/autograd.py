"""Operations with their gradients, over whichever backend a call is for.

The rules: a scalar objective's gradients are made in the forward pass, up to the incoming factor, which only a kernel
looks at; values per sample and float16 gradients are made in the backward pass instead; a second derivative goes
through the reference formulas.

Each operation has two functions of autograd. A plain eager call goes straight to one that takes the call, and runs it.
Behind the dispatcher, where compilers and tracers must see operators, another takes what the call is; the gradients
that its forward pass makes are outputs there, as the operator's schema has it, and so not ours to write to.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import ops
from .backend import evaluation
from .backend.reference import GIVEN, replaced, working_dtype
from .backend.specs import (
    Objective,
    Placed,
    Sampling,
    SamplingGradient,
    TermGradient,
    dtype_of_sums,
    factor_of,
    unpacked,
)
from .calls import (
    KERNEL_DTYPES,
    LatentCall,
    LatentGradientCall,
    ObjectiveCall,
    Operand,
    Operands,
    ScaleCall,
    TermGradientCall,
    find,
    positions,
)
from .captures import current_capture
from .torch_private import (
    has_tangent,
    is_sharded,
    is_transformed,
    keeps_graph,
    likeness,
    record,
)

_Grads = tuple[Tensor | None, ...]


def wants_derivative(operands: Operands) -> bool:
    """Whether autograd must record what is done to these."""
    wanted = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in operands)
    # PyTorch has the formula say that it knows no forward mode, rather than lose a tangent.
    return wanted or any(map(has_tangent, operands))


def second_order(formula: Callable[..., Any], inputs: Operands, grads: Sequence[Tensor | None]) -> _Grads:
    """Gradients of a reference formula, None for the inputs that need none; differentiable if that is wanted here.

    ``formula`` takes the inputs and returns as many tensors as there are incoming ``grads``.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: inputs may be one tensor, or computed from each other, and no derivative may go on to the next.
        inputs = [t.view_as(t) if isinstance(t, Tensor) and t.requires_grad else t for t in inputs]
        wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
        outputs = formula(*inputs)
        pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=create_graph, allow_unused=True
            )
        )
    return tuple(next(found) if isinstance(t, Tensor) and t.requires_grad else None for t in inputs)


def _sum(*terms: Tensor | None) -> Tensor | None:
    present = [t for t in terms if t is not None]
    return sum(present[1:], present[0]) if present else None


# --- operands as kernels take them ------------------------------------------------------------------------------------


class Conversion(NamedTuple):
    """An operand that cannot be taken as it comes, and how it can."""

    operand: int
    convert: Callable[[Any], Tensor | float]


def _number_conversions(operands: Operands) -> list[Conversion]:
    """Those of NumPy's numbers, which would compute in their own precision."""
    return [
        Conversion(k, float)
        for k, operand in enumerate(operands)
        if isinstance(operand, numbers.Real) and type(operand) not in (float, int, bool)
    ]


def conversions_of(operands: Operands, dtype: torch.dtype, device: torch.device) -> list[Conversion]:
    """Those of some operands, for kernels' arithmetic in ``dtype`` on ``device``."""
    found = _number_conversions(operands)
    for k, operand in enumerate(operands):
        if not isinstance(operand, Tensor):
            continue
        if not torch.compiler.is_compiling() and operand.is_neg():  # a view that says: read me with the other sign
            found.append(Conversion(k, Tensor.resolve_neg))
        if operand.dtype not in KERNEL_DTYPES:
            found.append(Conversion(k, lambda t: t.to(dtype)))
        if operand.device != device:  # a number in memory
            is_read = (operand.device.type, device.type) == ("cpu", "cuda") and not operand.requires_grad
            is_read = is_read and not ops.needs_dispatcher((operand,))
            found.append(Conversion(k, _read if is_read else lambda t: t.to(device)))
    return found


def _read(number: Tensor) -> float:
    """A number that the host has in memory: nothing is copied to a device, nor waited for."""
    if torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "expected numbers of a captured graph in the device's memory, or in Python; got a 0-dim tensor on the CPU, "
            "whose changes the graph would not see"
        )
    return number.item()


def converted(conversions: Sequence[Conversion], operands: Operands) -> Operands:
    found = list(operands)
    for k, convert in conversions:
        found[k] = convert(found[k])
    return found


def _resolved(saved: Tensor) -> Tensor:
    """A saved tensor without a negative bit, as hooks may give it back, that needs a gradient still if it did."""
    if not saved.is_neg():
        return saved
    found = saved.resolve_neg()
    return found if found.requires_grad == saved.requires_grad else found.requires_grad_()


# --- the latent -------------------------------------------------------------------------------------------------------


class DifferentiableLatent:
    """A pass over the latent with its derivative: the call of its forward pass, and what its backward pass is."""

    def __init__(self, operands: Operands, spec: Sampling) -> None:
        *inputs, _, _, noise = operands
        first = inputs[0]
        assert isinstance(first, Tensor)
        self.spec = spec
        self.conversions = conversions_of((*inputs, None, None, noise), torch.float32, first.device)
        self.is_dispatched = ops.needs_dispatcher(operands)
        self.is_recorded = wants_derivative(operands)
        self.is_sharded = spec.backend != "reference" and is_sharded(operands)
        operands = converted(self.conversions, operands)
        self.gradient = _gradient_of(spec, operands)
        self.numbers = _numbers(operands)
        self.tensors = positions([isinstance(t, Tensor) and k != len(inputs) for k, t in enumerate(operands)])
        """The operands that are tensors, but the seed, which nobody else has."""
        self.kernel_call: LatentCall | None = None
        if not self.is_dispatched and spec.backend != "reference":
            self.kernel_call = LatentCall(operands, spec)
            self.are_alike = likeness([operands[k] for k in self.tensors])  # type: ignore[misc]
            """Tells whether others are like them."""


def _gradient_of(spec: Sampling, operands: Operands) -> SamplingGradient:
    return spec.gradient(tuple([isinstance(t, Tensor) and t.requires_grad for t in operands[:-3]]))


def _numbers(operands: Operands) -> list[int]:
    """The operands that are numbers."""
    return positions([t is not None and not isinstance(t, Tensor) for t in operands])


def latent(call: DifferentiableLatent, operands: Operands) -> Sequence[Tensor]:
    """The sample and, if the call has one, its divergence."""
    if call.conversions:
        operands = converted(call.conversions, operands)
    if call.kernel_call is None:
        compute = _sharded_latent if call.is_sharded else _latent_without_call
        return compute(call.spec, operands)
    return _record_latent(call, *operands) if call.is_recorded else call.kernel_call.outputs(operands)


def _latent_without_call(spec: Sampling, operands: Operands) -> Sequence[Tensor]:
    return evaluation.latent(spec, operands) if spec.backend == "reference" else ops.latent(operands, spec)


def _sharded_latent(spec: Sampling, operands: Operands) -> Sequence[Tensor]:
    from . import sharded  # which imports torch.distributed

    def run(spec: Sampling, operands: Operands) -> Sequence[Tensor]:
        return latent(find(DifferentiableLatent, operands, spec), operands)

    values = sharded.latent(spec, operands, run)
    return _latent_without_call(replaced(spec, backend="reference"), operands) if values is None else values


class _LatentFunction(torch.autograd.Function):
    """z and the divergence; the noise is made again from the seed."""

    @staticmethod
    def keep(
        ctx: Any,
        gradient: SamplingGradient,
        operands: Operands,
        numbers: list[int],
        call: DifferentiableLatent | None = None,
    ) -> None:
        ctx.gradient, ctx.call = gradient, call
        ctx.numbers = [(k, operands[k]) for k in numbers] if numbers else ()
        if numbers:
            operands = [None if k in numbers else t for k, t in enumerate(operands)]
        ctx.save_for_backward(*operands)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> Any:
        operands = [*ctx.saved_tensors]
        call = ctx.call
        # Hooks may give back something else than was saved, and so may a parameter that was given other data meanwhile.
        if call is not None and not call.are_alike(*[operands[k] for k in call.tensors]):
            call = None
            operands = [None if t is None else _resolved(t) for t in operands]
        for k, number in ctx.numbers:
            operands[k] = number
        grads = [g.resolve_neg() if g is not None and g.is_neg() else g for g in incoming]
        return (None, *_latent_gradients(ctx.gradient, operands, *grads, call=call))


class _Latent(_LatentFunction):
    @staticmethod
    def forward(ctx: Any, call: DifferentiableLatent, *operands: Any) -> Any:
        assert call.kernel_call is not None
        _LatentFunction.keep(ctx, call.gradient, operands, call.numbers, call)
        return tuple(call.kernel_call.outputs(operands))


_record_latent = record(_Latent)


class _DispatchedLatent(_LatentFunction):
    @staticmethod
    def forward(ctx: Any, spec: Sampling, *operands: Any) -> Any:
        _LatentFunction.keep(ctx, _gradient_of(spec, operands), operands, [])
        return tuple(ops.latent.below_autograd(operands, spec))


def _latent_gradients(
    spec: SamplingGradient,
    operands: Sequence[Any],
    grad_z: Tensor | None,
    grad_kl: Tensor | None = None,
    *,
    call: DifferentiableLatent | None,
) -> _Grads:
    """Gradients of a pass's operands. A call says what these are like."""
    if grad_z is None and grad_kl is None:
        return (None,) * len(operands)
    *inputs, seed, offset, noise = operands
    # Hardly anybody asks for the noise's gradient: the formula will do.
    if torch.is_grad_enabled() or is_transformed((grad_z, grad_kl)) or (noise is not None and noise.requires_grad):
        if noise is None and seed is not None and offset is None:  # a stream from its beginning; else the formula's own
            mean: Any = unpacked(spec.formula, inputs, spec.packed_dim)[0]
            noise = ops.normal(list(spec.shape(mean.shape)), seed, working_dtype(*inputs), spec.backend)
        kl_dtype = None if grad_kl is None else grad_kl.dtype
        whole = spec.sampling(kl_dtype, "reference")

        def formula(*inputs: Any) -> list[Tensor]:
            return evaluation.latent(whole, inputs)

        return second_order(formula, [*inputs, seed, offset, noise], [grad_z, grad_kl][: 1 if kl_dtype is None else 2])
    needed = _needed_with(spec, grad_kl).needed
    if not any(needed):
        return (None,) * len(operands)
    sources = (*operands, grad_z, grad_kl)
    compared = sources if call is None else (grad_z, grad_kl)
    # A call is quicker to compare than all that it is.
    found = find(_latent_gradient, compared, spec if call is None else call, whole=sources).outputs(sources)
    gradients = iter(found)
    return (*[next(gradients) if is_needed else None for is_needed in needed], None, None, None)


def _needed_with(spec: SamplingGradient, grad_kl: Operand) -> SamplingGradient:
    """The same of the inputs that anything comes to: without a gradient of the divergence, its prior has none."""
    if grad_kl is not None or not any(spec.needed[2:]):
        return spec
    return replaced(spec, needed=(*spec.needed[:2], *[False] * len(spec.needed[2:])))


class _Dispatched:
    """A call that goes by way of the dispatcher, in the place of one that does not."""

    def __init__(self, operator: ops.Operator, spec: Any) -> None:
        self._operator, self._spec = operator, spec

    def outputs(self, operands: Operands) -> list[Tensor]:
        return self._operator(operands, self._spec)


def _latent_gradient(operands: Operands, what: SamplingGradient | DifferentiableLatent) -> Any:
    """The call of a latent's backward pass, which records no derivative; its forward pass says what it is."""
    spec = _needed_with(what.gradient if isinstance(what, DifferentiableLatent) else what, operands[-1])
    if ops.needs_dispatcher(operands):
        return _Dispatched(ops.latent_gradient, spec)
    return LatentGradientCall(operands, spec)


# --- objectives -------------------------------------------------------------------------------------------------------


class Deferred(NamedTuple):
    """What is left to the backward pass of an objective."""

    operands: int
    """How many there are."""
    tensors: list[int]
    numbers: list[int]
    """The operands that are tensors, and those that are numbers."""


class GivenDivergence(NamedTuple):
    """A divergence that was computed before; its gradient is the incoming one, times a number."""

    operand: int
    factor: float
    """What makes a mean of its sum."""
    coefficients: list[int]
    """Beta, and grad_scale if there is one, among the numbers that are left to the backward pass."""
    shape: torch.Size
    dtype: torch.dtype

    def coefficient(self, numbers: Sequence[Any]) -> float:
        """That number, of those numbers."""
        found = self.factor
        for k in self.coefficients:
            found *= numbers[k]
        return found

    def gradient(self, product: Tensor) -> Tensor:
        """The product of the two, spread out."""
        return (product if product.dtype == self.dtype else product.to(self.dtype)).expand(self.shape)


def _given_divergence(spec: Objective, terms: Sequence[Placed], operands: Operands) -> GivenDivergence | None:
    """Of a total whose coefficients are numbers: the divergence, if it is given and its gradient wanted."""
    numbers = _numbers(operands)
    coefficients = [spec.beta] if spec.grad_scale is None else [spec.beta, spec.grad_scale]
    term = terms[-1]
    kl = operands[term.inputs.start]
    if not (isinstance(kl, Tensor) and kl.requires_grad and term.formula is GIVEN and spec.values == "total"):
        return None
    if any(k not in numbers for k in coefficients):
        return None
    factor, places = factor_of(term.reduction, kl.shape), [numbers.index(k) for k in coefficients]
    return GivenDivergence(term.inputs.start, factor, places, kl.shape, kl.dtype)


def forward_spec_of(
    spec: Objective, operands: Operands, *, is_dispatched: bool = False, in_place: bool = False
) -> Objective:
    """The objective with those gradients made with the values that are worth it: all of those needed, or none.

    Values per sample and per element would move more that way (9N elements against 8N), and so would a total behind
    the dispatcher, whose gradients are not ours to scale in place: there a GPU, which memory alone holds up, makes them
    in the backward pass. (A CPU has the exponentials to make but once that way.) Float16 gradients made before the
    incoming factor (a loss scaler's 65536) would underflow, unless they are scaled as they are made. And of which term
    they are to be nobody knows, where each can be differentiated: ``in_place``, they could not be made again.
    """
    is_on_gpu = any(isinstance(t, Tensor) and t.is_cuda for t in operands)
    deferred = (
        spec.values != "total"
        or (is_dispatched and is_on_gpu)
        or (in_place and spec.returns_terms)
        or (
            not spec.is_grad_scaled
            and any(
                isinstance(t, Tensor) and need and t.dtype == torch.float16
                for t, need in zip(operands, spec.needed, strict=True)
            )
        )
    )
    return replaced(spec, needed=(False,) * len(spec.needed)) if deferred else spec


def _is_learned(operand: Operand) -> TypeGuard[Tensor]:
    return isinstance(operand, Tensor) and operand.requires_grad


def _deferred(is_made: Sequence[bool], operands: Operands, *, in_place: bool = False) -> Deferred:
    """Of an objective some of whose gradients are made in the forward pass, perhaps the first in place."""
    return Deferred(
        len(operands),
        positions([isinstance(t, Tensor) and not (in_place and is_made[k] and k == 0) for k, t in enumerate(operands)]),
        _numbers(operands),
    )


class DifferentiableObjective:
    """An objective with its derivative: the call of its forward pass, and what is left to the backward pass."""

    def __init__(self, operands: Operands, spec: Objective, *, in_place: bool = False) -> None:
        first = operands[0]
        assert isinstance(first, Tensor)
        terms = spec.terms()
        weight = None if terms[0].weight is None else operands[terms[0].weight]
        if spec.backend == "reference":
            self.conversions = _number_conversions(operands)
        else:
            dtype = working_dtype(*operands[terms[0].inputs], weight)
            self.conversions = conversions_of(operands, dtype, first.device)
        operands = converted(self.conversions, operands)
        self.spec, self.terms = spec, terms
        self.is_dispatched = ops.needs_dispatcher(operands)
        self.is_recorded = wants_derivative(operands)
        self.is_sharded = spec.backend != "reference" and is_sharded(operands)
        self.in_place = in_place
        """Whether the gradient of the first operand is written into its memory."""
        forward_spec = forward_spec_of(spec, operands, in_place=in_place)
        self.overwrites = in_place and forward_spec.needed[0]
        """Whether that is done in the forward pass."""
        self.deferred = _deferred(forward_spec.needed, operands, in_place=in_place)
        self.given_divergence = _given_divergence(spec, terms, operands)
        quickly = positions(spec.needed)
        if self.given_divergence is not None:
            quickly.append(self.given_divergence.operand)
        self.needs_more = any(
            isinstance(t, Tensor) and t.requires_grad and k not in quickly for k, t in enumerate(operands)
        )
        """Whether there are gradients to make besides those that objectives make."""
        self.is_beta_learned = _is_learned(operands[spec.beta])
        """Whether the divergence, which is beta's gradient, is kept for that. (Else whoever asked for the terms may
        change it in place.)"""
        self.kernel_call: ObjectiveCall | None = None
        if not self.is_dispatched and spec.backend != "reference":
            self.kernel_call = ObjectiveCall(operands, forward_spec, in_place=in_place)
        self.rescaling: ScaleCall | None = None
        """Of the gradients made in the forward pass, which it takes to plan it."""
        self.backward_spec: Objective | None = None
        """What makes a total's gradients in the backward pass, if they are left to that: times the incoming factor."""
        if spec.values == "total" and not spec.is_grad_scaled and forward_spec.needed != spec.needed:
            self.backward_spec = replaced(spec, returns_terms=False, needed=(*spec.needed, False), is_grad_scaled=True)


def objective(call: DifferentiableObjective, operands: Operands) -> Sequence[Tensor]:
    """The values of an objective: the loss, or loss, likelihood and divergence."""
    if call.conversions:
        operands = converted(call.conversions, operands)
    if call.kernel_call is None:
        compute = _sharded_objective if call.is_sharded else _objective_without_call
        return compute(call.spec, operands)
    return _record_objective(call, *operands) if call.is_recorded else call.kernel_call.run(operands)[0]


def _objective_without_call(spec: Objective, operands: Operands) -> Sequence[Tensor]:
    if spec.backend == "reference":
        values = [value.to(spec.dtype) for value in evaluation.objective(spec, operands)]
    else:
        values = ops.objective(operands, spec)
    return values[: 3 if spec.returns_terms else 1]


def _sharded_objective(spec: Objective, operands: Operands) -> Sequence[Tensor]:
    from . import sharded  # which imports torch.distributed

    def run(spec: Objective, operands: Operands) -> Sequence[Tensor]:
        return objective(find(DifferentiableObjective, operands, spec), operands)

    values = sharded.objective(spec, operands, run)
    return _objective_without_call(replaced(spec, backend="reference"), operands) if values is None else values


class _Objective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: DifferentiableObjective, *operands: Any) -> Any:
        assert call.kernel_call is not None
        values, gradients = call.kernel_call.run(operands)
        ctx.call, ctx.gradients = call, gradients
        deferred = call.deferred
        if call.overwrites:
            increment_version(operands[0])
            operands[0].is_overwritten = True
        ctx.overwrites = call.in_place and not call.overwrites
        ctx.capture = current_capture(call.kernel_call.device)
        divergence = values[2:] if call.is_beta_learned else ()
        ctx.save_for_backward(*[operands[k] for k in deferred.tensors], *divergence)
        ctx.numbers = [operands[k] for k in deferred.numbers]
        ctx.set_materialize_grads(False)
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> Any:
        call: DifferentiableObjective = ctx.call
        g_loss = incoming[0]
        grads: list[Tensor | None] = [None] * (1 + len(call.spec.needed))
        is_loss_alone = len(incoming) == 1 or all(g is None for g in incoming[1:])
        if is_loss_alone and g_loss is None:
            return tuple(grads)
        assert call.kernel_call is not None
        with_gradient = call.kernel_call.with_gradient
        is_factor = is_loss_alone and not torch.is_grad_enabled() and not is_transformed(incoming)
        made_already: Sequence[bool] = (False,) * len(call.spec.needed)
        given = call.given_divergence
        if is_factor and with_gradient:
            assert g_loss is not None
            found = scaled(ctx, g_loss, None if given is None else given.coefficient(ctx.numbers))
            for k, gradient in zip(with_gradient, found):  # noqa: B905 - a hot path
                grads[k + 1] = gradient
            if not call.needs_more:  # the usual step
                if given is not None:
                    grads[given.operand + 1] = given.gradient(found[-1])
                return tuple(grads)
            made_already = call.spec.needed
        elif call.overwrites:
            raise RuntimeError(
                f"{call.terms[0].formula.inputs[0]} has been overwritten with its gradient: second derivatives, and "
                "gradients in batches, cannot be computed of a fusedvae objective with inplace=True."
            )
        operands, rest = _restored(ctx, call.deferred, ctx.saved_tensors)
        divergence = rest[0] if rest else None
        in_place = ctx.overwrites and not _may_come_again(ctx, call.kernel_call.device)
        sources = [*operands, None if g_loss is None else g_loss.resolve_neg()]
        if is_factor and call.backward_spec is not None and not ops.needs_dispatcher(sources):
            assert g_loss is not None
            backward_call = find(ObjectiveCall, sources, call.backward_spec, True, in_place)
            for k, gradient in zip(backward_call.with_gradient, backward_call.run(sources)[1], strict=True):
                grads[k + 1] = gradient
            if in_place:
                increment_version(operands[0])  # type: ignore[arg-type]
            if not call.needs_more:
                if given is not None:
                    grads[given.operand + 1] = given.gradient(g_loss * given.coefficient(ctx.numbers))
                return tuple(grads)
            made_already = call.spec.needed
        more = _gradients_by_terms(
            call.spec, call.terms, made_already, operands, divergence, incoming, in_place=in_place
        )
        return None, *[g if m is None else m for g, m in zip(grads[1:], more, strict=True)]


_record_objective = record(_Objective)


def _may_come_again(ctx: Any, device: torch.device) -> bool:
    """Whether a backward pass may be run again on what its forward pass has left: where the graph is kept, and where a
    CUDA graph holds the backward pass and not the forward pass, as each replay is one more."""
    return keeps_graph() or current_capture(device) != ctx.capture


def scaled(ctx: Any, factor: Tensor, coefficient: float | None = None) -> Sequence[Tensor]:
    """The gradients made in the forward pass, times the incoming factor; after them a coefficient's product with it.

    Nobody reads the factor on the host. In place, by a kernel that returns at once when the factor is 1, unless a later
    backward pass may need the gradients as they are. They are not among the saved tensors: hooks could give back
    something else there, and what does not look at the operands may outlive a change of them.
    """
    call: DifferentiableObjective = ctx.call
    gradients = ctx.gradients
    if gradients is None:
        raise RuntimeError(
            "Trying to backward through the graph of a fusedvae objective a second time: its gradients have been given "
            "away. Specify retain_graph=True if you need to backward through it a second time."
        )
    if _may_come_again(ctx, factor.device):
        return [g * factor for g in (gradients if coefficient is None else [*gradients, coefficient])]
    ctx.gradients = None
    if factor.is_neg():
        factor = factor.resolve_neg()
    if call.rescaling is None:
        call.rescaling = find(ScaleCall, [*gradients, factor, coefficient], call.spec.backend)
    return call.rescaling.run(gradients, factor, coefficient)


class _DispatchedObjective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: Objective, *operands: Any) -> Any:
        # A program may be run on operands that need other gradients than those that it was traced with.
        ctx.spec = replaced(spec, needed=_needed(spec, operands))
        ctx.forward_spec = forward_spec_of(spec, operands, is_dispatched=True)
        ctx.deferred = _deferred(ctx.forward_spec.needed, operands)
        outputs = ops.objective.below_autograd(operands, ctx.forward_spec)
        values = 3 if spec.returns_terms else 1
        ctx.keeps_divergence = spec.returns_terms and _is_learned(operands[spec.beta])
        divergence = outputs[2:3] if ctx.keeps_divergence else ()
        ctx.save_for_backward(*[operands[k] for k in ctx.deferred.tensors], *divergence, *outputs[values:])
        ctx.numbers = [operands[k] for k in ctx.deferred.numbers]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[values:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> Any:
        spec: Objective = ctx.spec
        values = incoming[: 3 if spec.returns_terms else 1]
        grads: list[Tensor | None] = [None] * (1 + len(spec.needed))
        is_loss_alone = all(g is None for g in values[1:])
        if is_loss_alone and values[0] is None:
            return tuple(grads)
        with_gradient = positions(ctx.forward_spec.needed)
        saved = ctx.saved_tensors
        operands, rest = _restored(ctx, ctx.deferred, saved)
        divergence = rest[0] if ctx.keeps_divergence else None
        are_enough = all(
            is_made or not need for need, is_made in zip(spec.needed, ctx.forward_spec.needed, strict=True)
        )
        if is_loss_alone and with_gradient and are_enough and not torch.is_grad_enabled():
            for k, gradient in zip(with_gradient, saved[-len(with_gradient) :], strict=True):
                grads[k + 1] = gradient * values[0]
            made_already = ctx.forward_spec.needed
        else:
            made_already = (False,) * len(spec.needed)
        more = _gradients_by_terms(spec, spec.terms(), made_already, operands, divergence, values)
        return None, *[g if m is None else m for g, m in zip(grads[1:], more, strict=True)]


def _needed(spec: Objective, operands: Operands) -> tuple[bool, ...]:
    """Which of some operands need gradients that objectives make."""
    found = [False] * len(spec.needed)
    for term in spec.terms():
        if term.formula is not GIVEN:
            found[term.inputs] = [isinstance(t, Tensor) and t.requires_grad for t in operands[term.inputs]]
    return tuple(found)


def _restored(ctx: Any, deferred: Deferred, saved: Any) -> tuple[list[Operand], Sequence[Tensor]]:
    """The operands of a forward pass, and what else was saved."""
    operands: list[Operand] = [None] * deferred.operands
    for k, tensor in zip(deferred.tensors, saved, strict=False):
        operands[k] = _resolved(tensor)
    for k, number in zip(deferred.numbers, ctx.numbers, strict=True):
        operands[k] = number
    return operands, saved[len(deferred.tensors) :]


def _gradients_by_terms(
    spec: Objective,
    terms: Sequence[Placed],
    made_already: Sequence[bool],
    operands: Operands,
    divergence: Tensor | None,
    incoming: Sequence[Tensor | None],
    *,
    in_place: bool = False,
) -> _Grads:
    """The gradients of an objective's operands, for gradients of its values, but for those that are made already.

    ``in_place`` has that of the first operand written into its memory.
    """
    grads: list[Tensor | None] = [None] * len(operands)
    g_loss, g_likelihood, g_divergence = [*map(as_weight, incoming), None, None][:3]
    # Kernels know no gradients of weights, which a traced program may be run with all the same.
    weights = [operands[k] for term in terms for k in (term.weight, term.normalizer) if k is not None]
    is_weight_learned = any(map(_is_learned, weights))
    if torch.is_grad_enabled() or is_transformed(incoming) or is_weight_learned:

        def values(*operands: Operand) -> list[Tensor]:
            return evaluation.objective(spec, operands)

        return second_order(values, operands, [g_loss, g_likelihood, g_divergence])
    beta = operands[spec.beta]
    scale = 1.0 if spec.grad_scale is None else as_weight(operands[spec.grad_scale])
    for term in terms:
        formula, span = term.formula, term.inputs
        if any(made_already[span]):
            continue
        coefficients = [scale] if term.normalizer is None else [scale, as_weight(operands[term.normalizer])]
        if not formula.is_divergence:
            factor = _sum(g_loss, g_likelihood)
        elif g_divergence is None:
            factor = g_loss
            coefficients.append(as_weight(beta))
        else:
            factor = _sum(None if g_loss is None else g_loss * as_weight(beta), g_divergence)
        if factor is None:
            continue
        inputs = operands[span]
        if formula is GIVEN:
            (kl,) = inputs
            if isinstance(kl, Tensor) and kl.requires_grad:
                incoming_kl = _times(factor, *coefficients, factor_of(term.reduction, kl.shape))
                grads[span.start] = incoming_kl.to(kl.dtype).expand_as(kl)
        elif any(spec.needed[span]):
            mean = unpacked(formula, inputs, spec.packed_dim)[0]
            assert isinstance(mean, Tensor)
            gradient = spec.gradient(term, spec.needed[span])
            weight = None if term.weight is None else operands[term.weight]
            sources = [*inputs, weight, _times(factor, *coefficients, factor_of(term.reduction, mean.shape))]
            overwrites = in_place and span.start == 0
            found = find(_term_gradient, sources, gradient, overwrites).outputs(sources)
            if overwrites:
                increment_version(sources[0])  # type: ignore[arg-type]
            for k, g in zip(positions(spec.needed[span]), found, strict=True):
                grads[span.start + k] = g
    if g_loss is not None and _is_learned(beta):
        if divergence is None:  # as a traced program was run with a number before
            divergence = ops.objective(
                operands, replaced(spec, returns_terms=True, needed=(False,) * len(spec.needed))
            )[2]
        product = _times(g_loss * divergence, scale)
        grads[spec.beta] = product.sum(dtype=dtype_of_sums(product.device)).to(beta.dtype)
    return tuple(grads)


def _term_gradient(operands: Operands, spec: TermGradient, in_place: bool) -> Any:
    """The call of a term's backward pass, which records no derivative."""
    if ops.needs_dispatcher(operands):
        return _Dispatched(ops.term_gradient, spec)
    return TermGradientCall(operands, spec, in_place=in_place)


def as_weight(value: Any) -> Any:
    """An incoming gradient or a coefficient as gradients can be multiplied by.

    Numbers, and values per sample, which are few, go on in float32: divided by the batch, 16 bits would lose them.
    """
    if not isinstance(value, Tensor):
        return value
    value = value.resolve_neg()
    return value.to(torch.promote_types(value.dtype, torch.float32)) if value.dim() < 2 else value


def _times(weight: Tensor, *coefficients: Any) -> Tensor:
    """A product, in as few operations as that takes: numbers become one."""
    number = 1.0
    for coefficient in coefficients:
        if isinstance(coefficient, Tensor):
            weight = weight * coefficient
        else:
            number *= coefficient
    return weight if number == 1.0 else weight * number


# --- behind the dispatcher --------------------------------------------------------------------------------------------


def _dispatched(
    function: type[torch.autograd.Function], operator: ops.Operator
) -> Callable[[Operands, Any], list[Tensor]]:
    def run(operands: Operands, spec: Any) -> list[Tensor]:
        if wants_derivative(operands):
            return list(function.apply(spec, *operands))
        return operator.below_autograd(operands, spec)

    return run


ops.latent.register_autograd(_dispatched(_DispatchedLatent, ops.latent))
ops.objective.register_autograd(_dispatched(_DispatchedObjective, ops.objective))
