"""What kernels can be asked for, in all its combinations, against the formulas in float64: forms of scales, gains,
weights, what comes in, normalizers, and sums over any dimensions, of operands of any sizes, dtypes and layouts.

Operations ask for some of these combinations only; here backends are asked directly.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from conftest import INTERPRETED, KERNEL_TARGETS, Target
from torch import Tensor

from fusedvae.backend import LatentWork, ObjectiveWork, Part, TermWork, kernels
from fusedvae.backend.philox import normal
from fusedvae.backend.reference import FORMULAS, PLAIN, Form, Formula, working_dtype

DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 2e-2, torch.float16: 4e-3}
SHAPES = [(3, 4, 8), (5, 3, 7), (2, 3, 4, 12), (6, 40), (4, 1, 300), (2, 2100), (33, 3), (7,), (70, 16), (1, 5, 16)]
FORMS = [
    PLAIN,
    Form("exponential", True, -1.0, 0.5),
    Form("exponential", False, eps=0.25),
    Form("exponential", True, eps=0.1),
    Form("linear", True),
    Form("linear", False, low=0.8, eps=1e-3),
    Form("softplus", True, high=0.5, eps=0.01),
    Form("softplus", False),
    Form("bounded", eps=0.9),
]

STEP = 8 if INTERPRETED else 1
"""Between the cases that are drawn: an interpreted kernel takes a thousand times as long."""

pytestmark = pytest.mark.parametrize("target", KERNEL_TARGETS, indirect=True)


class Case:
    """A case drawn from a seed, and the sources of its launch."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        torch.manual_seed(seed)
        self.is_usual = self.sometimes(0.4)
        """Whether dense operands of one dtype are the rule, and scales as formulas are written."""
        self.shape = self.draw.choice([shape for shape in SHAPES if not self.is_usual or shape[-1] % 4 == 0])
        self.sources: list[Any] = []

    def part(self, operand: Tensor | float | None) -> Part | None:
        """An operand as a source."""
        if operand is None:
            return None
        self.sources.append(operand)
        if isinstance(operand, Tensor):
            return Part(len(self.sources) - 1, operand.shape, operand.stride(), operand.dtype)
        return Part(len(self.sources) - 1, None, (), None)

    def sometimes(self, chance: float = 0.5) -> bool:
        return self.draw.random() < chance

    def broadcast(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape, or one that broadcasts to it."""
        if self.sometimes(0.9 if self.is_usual else 0.4):
            return tuple(shape)
        found = [size if self.sometimes() else 1 for size in shape]
        return tuple(found[self.draw.randrange(len(found) + 1) :] if self.sometimes() else found)

    def laid_out(self, t: Tensor) -> Tensor:
        """The same values, in memory in some way."""
        if t.dim() == 0 or self.is_usual or self.sometimes(0.6):
            return t
        if self.sometimes(0.3):
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        if self.sometimes():
            return torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape)  # misaligned
        return torch.cat((t, t), -1)[..., : t.shape[-1]]

    def output(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self.laid_out(torch.full(tuple(shape), math.nan)).to(dtype)

    def inputs(
        self, formula: Formula, forms: Sequence[Form], shape: Sequence[int], dtype: torch.dtype
    ) -> list[Tensor | float]:
        """Inputs that the formula and the forms allow; the first is of the shape itself."""
        found: list[Tensor | float] = []
        form_of = dict(zip(formula.scales, forms, strict=True))
        for k, name in enumerate(formula.inputs):
            form = form_of.get(k)
            t = torch.randn(tuple(shape) if k == 0 else self.broadcast(shape))
            if form is not None and form.map in ("linear", "bounded"):
                t = t.abs() + 0.4
            elif name in ("x", "recon_x") and formula.name.startswith("bernoulli"):
                t = torch.sigmoid(t) if name == "x" or formula.name.endswith("probabilities") else t
            elif name in ("extra", "pos_weight"):
                t = t.abs()
            elif name == "mu" and not formula.is_divergence:
                t = t.abs() + 0.3
            elif name == "x" and formula.name.startswith(("poisson", "negative", "zero")):
                t = torch.relu(3 * t).round()
            if k > 1 and self.sometimes(0.2):
                found.append(t.mean().item())
            elif name == "x" and self.sometimes(0.2):
                found.append(self.laid_out((t > 0.5).to(self.draw.choice([torch.uint8, torch.bool]))))
            else:
                # Data stay in float32 where networks are in half precision.
                is_like_others = self.sometimes(0.8) if name == "x" else self.is_usual or self.sometimes(0.9)
                found.append(self.laid_out(t.to(dtype if is_like_others else torch.float32)))
        return found


def forms_for(case: Case, formula: Formula) -> tuple[Form, ...]:
    plain = case.sometimes(0.6 if case.is_usual else 0.3)
    return tuple(PLAIN if plain else case.draw.choice(FORMS) for _ in formula.scales)


def doubles(inputs: Sequence[Tensor | float]) -> list[Tensor]:
    """The inputs in float64, as leaves."""
    return [torch.as_tensor(t).double().detach().requires_grad_() for t in inputs]


def check(found: Tensor, expected: Tensor, what: str, working: torch.dtype) -> None:
    eps = max(TOLERANCES[found.dtype], TOLERANCES[working])
    scale = max(expected.abs().max().item() if expected.numel() else 0.0, 1.0)
    torch.testing.assert_close(
        found.double(), expected, rtol=eps, atol=eps * scale, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


class Gradient(NamedTuple):
    found: Tensor
    of: Tensor
    """By what: an input, in float64."""
    gain: float


class Drawn(NamedTuple):
    """A term, and what it must give."""

    work: TermWork
    value: Tensor | None
    """Where the kernels put the values."""
    elements: Tensor
    """The weighted values, in float64."""
    incoming: Tensor
    """What their gradients are times."""
    grads: list[Gradient]
    working: torch.dtype
    """Of the arithmetic."""

    def check(self, factor: float = 1.0) -> None:
        """Check values and gradients, these times the factor."""
        if self.value is not None:
            check(self.value, self.elements.detach().sum_to_size(self.value.shape), "value", self.working)
        total = (self.elements * self.incoming).sum() * factor
        for k, grad in enumerate(self.grads):
            (expected,) = torch.autograd.grad(total, grad.of, retain_graph=True)
            check(grad.found, grad.gain * expected, f"gradient {k}", self.working)


def drawn(case: Case, formula: Formula, *, has_value: bool) -> Drawn:
    dtype = case.draw.choice(DTYPES)
    forms = forms_for(case, formula)
    inputs = case.inputs(formula, forms, case.shape, dtype)
    exact = doubles(inputs)
    working = working_dtype(*inputs)
    gains = None
    if formula.is_divergence and not case.is_usual and case.sometimes(0.3):
        gains = tuple(case.draw.uniform(-1, 2) for _ in inputs)
    constant = formula.constant if case.sometimes() else 0.0
    weight = incoming = None
    if case.sometimes(0.3 if case.is_usual else 0.5):
        weight = (torch.rand(case.broadcast(case.shape)) - 0.3).clamp(min=0)
        weight = weight > 0 if case.sometimes(0.3) else weight.to(dtype)
        counts = (weight != 0).expand(case.shape)
        # Whatever is where the weight is 0 has no say.
        spoilt = case.draw.choice(inputs)
        if isinstance(spoilt, Tensor) and spoilt.shape == counts.shape and spoilt.is_floating_point():
            spoilt[~counts] = case.draw.choice([math.nan, math.inf])
        exact = doubles([torch.where(counts, t, 1.0) if t.shape == counts.shape else t for t in exact])
    if has_value and case.sometimes(0.4):
        incoming, has_value = torch.randn(case.broadcast(case.shape)).to(dtype), False  # of gradients alone

    elements = (formula(exact, forms) + constant).expand(case.shape)
    if weight is not None:
        elements = torch.where(weight != 0, elements * weight.double(), 0.0)
    grads: list[Gradient | None] = []
    for k, t in enumerate(inputs):
        if isinstance(t, Tensor) and case.sometimes(0.8):
            found = case.output(t.shape, t.dtype if t.is_floating_point() else torch.float32)
            grads.append(Gradient(found, exact[k], 1.0 if gains is None else gains[k]))
        else:
            grads.append(None)
    value = case.output(case.broadcast(case.shape), dtype) if has_value and case.sometimes(0.8) else None
    work = TermWork(
        formula,
        working == torch.float64,
        tuple([case.part(t) for t in inputs]),  # type: ignore[misc]
        tuple([None if grad is None else case.part(grad.found) for grad in grads]),
        forms,
        gains,
        constant=constant,
        weight=case.part(weight),
        incoming=case.part(incoming),
        value=case.part(value),
    )
    factors = torch.ones(()) if incoming is None else incoming.double()
    return Drawn(work, value, elements, factors, [grad for grad in grads if grad is not None], working)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("seed", range(0, 40, STEP))
def test_values_and_gradients_of_elements(target: Target, name: str, seed: int) -> None:
    case = Case(seed)
    term = drawn(case, FORMULAS[name], has_value=True)
    work = ObjectiveWork((term.work,), "element", None)
    launch = kernels(target.backend).prepare_objective(work, len(case.sources), torch.device(target.device))
    launch(tuple(case.sources))
    term.check()


@pytest.mark.parametrize("values", ["total", "sample"])
@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("seed", range(0, 20, STEP))
def test_objectives_of_two_terms(target: Target, name: str, seed: int, values: str) -> None:
    case = Case(seed)
    others = [other for other in FORMULAS.values() if other.is_divergence != FORMULAS[name].is_divergence]
    formulas = [FORMULAS[name]] if case.sometimes(0.3) else [FORMULAS[name], case.draw.choice(others)]
    formulas.sort(key=lambda formula: formula.is_divergence)
    batch = case.shape[0]
    terms, factors, outs = [], [], []
    for formula in formulas:
        case.shape = (batch, *case.draw.choice([s for s in SHAPES if s[-1] % 4 == 0 or not case.is_usual])[1:])
        term = drawn(case, formula, has_value=False)
        numbers = [case.draw.uniform(0.2, 2) for _ in range(3)]
        operands = [torch.tensor(n, dtype=torch.float64) if case.sometimes() else n for n in numbers[1:]]
        factor = numbers[0]
        out = torch.full((batch,) if values == "sample" else (), math.nan)
        more = {"normalizer": case.part(operands[0]), "coefficient": case.part(operands[1]), "out": case.part(out)}
        given = {field: part for field, part in more.items() if case.sometimes(0.6)}
        factor *= numbers[1] if "normalizer" in given else 1
        factors.append((factor, numbers[2] if "coefficient" in given else 1.0))
        outs.append(out if "out" in given else None)
        terms.append(term._replace(work=term.work._replace(factor=numbers[0], **given)))
    loss = torch.full((batch,) if values == "sample" else (), math.nan)
    grad_scale = case.draw.uniform(0.2, 2) if case.sometimes() else None
    work = ObjectiveWork(tuple(t.work for t in terms), values, case.part(loss), case.part(grad_scale))
    launch = kernels(target.backend).prepare_objective(work, len(case.sources), torch.device(target.device))
    launch(tuple(case.sources))

    total = torch.zeros((), dtype=torch.float64)
    for term, (factor, coefficient), out in zip(terms, factors, outs, strict=True):
        elements = term.elements.detach()
        sums = factor * (elements.flatten(1).sum(1) if values == "sample" and elements.dim() > 1 else elements)
        sums = sums if values == "sample" else sums.sum()
        if out is not None:
            check(out, sums, "term", term.working)
        total = total + coefficient * sums
        term.check(factor * coefficient * (grad_scale or 1.0))
    check(loss, total, "loss", terms[0].working)


@pytest.mark.parametrize("name", [name for name, formula in FORMULAS.items() if formula.at_sample])
@pytest.mark.parametrize("at_sample", [False, True])
@pytest.mark.parametrize("seed", range(0, 60, STEP))
def test_the_latent(target: Target, name: str, at_sample: bool, seed: int) -> None:
    case, formula = Case(seed), FORMULAS[name]
    dtype = case.draw.choice(DTYPES)
    forms = forms_for(case, formula)
    inputs = case.inputs(formula, forms, case.shape, dtype)
    shape = (case.draw.choice([1, 3]), *case.shape) if case.sometimes(0.3) else case.shape
    exact = doubles(inputs)
    working = working_dtype(*inputs)
    seed_tensor = noise = offset = None
    first = 0
    if case.sometimes():
        seed_tensor = torch.tensor(case.draw.getrandbits(63))
        if case.sometimes():
            first = offset = case.draw.choice([4, 6, 2**33 + 1, 3])
        made, precision = normal(shape, seed_tensor, torch.float64, first), torch.float32
    else:
        noise = case.laid_out(torch.randn(shape).to(dtype))
        made, precision = noise.double(), working
    dtype_of_z = torch.promote_types(inputs[0].dtype, inputs[1].dtype)  # type: ignore[union-attr]
    z = case.output(shape, dtype_of_z) if case.sometimes(0.8) else None
    value = case.output(case.broadcast(shape), torch.float32) if case.sometimes(0.8) else None
    grad_z = case.laid_out(torch.randn(shape).to(dtype)) if case.sometimes(0.7) else None
    incoming = torch.randn(case.broadcast(shape)).to(dtype) if case.sometimes(0.7) else None
    grads = [case.output(t.shape, t.dtype) if isinstance(t, Tensor) and case.sometimes(0.8) else None for t in inputs]
    work = LatentWork(
        TermWork(
            formula,
            working == torch.float64,
            tuple([case.part(t) for t in inputs]),  # type: ignore[misc]
            tuple(map(case.part, grads)),
            forms,
            incoming=case.part(incoming),
            value=case.part(value),
        ),
        torch.Size(shape),
        at_sample,
        seed=case.part(seed_tensor),
        offset=case.part(offset),
        noise=case.part(noise),
        grad_z=case.part(grad_z),
        z=case.part(z),
    )
    launch = kernels(target.backend).prepare_latent(work, len(case.sources), torch.device(target.device))
    launch(tuple(case.sources))

    ready = formula.prepared(exact, forms)
    sample = exact[0] + ready[1].root * made
    if at_sample:
        assert formula.at_sample is not None
        elements = formula.at_sample(sample, made, *ready[1:])
    else:
        elements = formula.elements(*ready)
    elements = elements.expand(shape)
    if z is not None:
        check(z, sample.detach(), "z", precision)
    if value is not None:
        check(value, elements.detach().sum_to_size(value.shape), "value", precision)
    total = sum(t.sum() * 0 for t in exact)
    if grad_z is not None:
        total = total + (sample * grad_z.double()).sum()
    if incoming is not None:
        total = total + (elements * incoming.double()).sum()
    for k, grad in enumerate(grads):
        if grad is not None:
            (expected,) = torch.autograd.grad(total, exact[k], retain_graph=True)
            check(grad, expected, f"gradient {k}", precision)
