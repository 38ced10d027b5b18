"""Every likelihood of the registry, over broadcasts, layouts, dtypes and reductions: values and gradients.

What is right is the registry's formula in float64, differentiated by PyTorch; that the formula itself is right,
`test_formulas.py` says.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from conftest import KERNEL_TARGETS, Target, kl_elements, reduced
from test_operations import LAYOUTS, REDUCTIONS, check, with_gradients
from torch import Tensor

from fusedvae import functional
from fusedvae.backend import reference
from fusedvae.backend.reference import FORMULAS, LIKELIHOODS

pytestmark = pytest.mark.parametrize("target", KERNEL_TARGETS, indirect=True)
every_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)

SHAPE = (4, 3, 5, 7)
PATTERNS = {
    "each": SHAPE,
    "scalar": (),
    "one": (1,),
    "channel": (3, 1, 1),
    "pixel": (1, 3, 5, 7),
    "plane": (4, 1, 5, 7),
    "sample": (4, 1, 1, 1),
    "sample and channel": (4, 3, 1, 1),
    "column": (7,),
    "row": (5, 1),
}
OTHERS = {name: formula.inputs[2:] for name, formula in LIKELIHOODS.items()}
"""The inputs of each beside recon_x and x."""
COUNTS = ("poisson", "negative_binomial", "zero_inflated_negative_binomial")
PACKED = [name for name, formula in LIKELIHOODS.items() if formula.pairs]
"""Those that have a scale, which may be packed."""


def layouts_for(pattern: str, reduction: str) -> list[Callable[[Tensor], Tensor]]:
    """Two of the layouts: the reductions of a pattern have them all."""
    turn, arrange = list(PATTERNS).index(pattern) + 2 * REDUCTIONS.index(reduction), list(LAYOUTS.values())
    return [arrange[turn % 6], arrange[(turn + 1) % 6]]


def named(likelihood: str, inputs: list[Tensor]) -> dict[str, Tensor]:
    """The inputs beside recon_x and x by the names that elbo_loss has for them."""
    scales = ("recon_logvar", "log_scale", "theta")
    names = ["recon_logvar" if name in scales else name for name in OTHERS[likelihood]]
    return dict(zip(names, inputs[2:], strict=True))


def loss_of(likelihood: str, inputs: list[Tensor], reduction: str, backend: str, **options: object) -> Tensor:
    """The likelihood of inputs in the registry's order, with a divergence of nothing beside it."""
    nothing = torch.zeros(len(inputs[1]), 1, device=inputs[1].device)
    loss = functional.elbo_loss(
        *inputs[:2],
        nothing,
        nothing,
        likelihood=likelihood,
        reduction=reduction,
        backend=backend,
        **named(likelihood, inputs),
        **options,
    )
    assert isinstance(loss, Tensor)
    return loss


def exact(likelihood: str, inputs: list[Tensor], reduction: str, full: bool = False) -> Tensor:
    """The same by the formula in float64."""
    return reduced(elements_of(likelihood, inputs, full), reduction)


def elements_of(likelihood: str, inputs: list[Tensor], full: bool) -> Tensor:
    """What that is a sum of."""
    formula = LIKELIHOODS[likelihood]
    if full and formula.in_full:
        formula = FORMULAS[formula.in_full]
    elements = formula(inputs) + (formula.constant if full else 0.0)
    return elements.expand(inputs[0].shape)


def compare(
    target: Target, likelihood: str, inputs: list[Tensor], reduction: str, tolerance: float, full: bool = True
) -> None:
    """Value and gradients of all inputs against the formula."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    found = with_gradients(
        loss_of(likelihood, leaves, reduction, target.backend, full=full), [t for t in leaves if t.requires_grad]
    )
    expected = with_gradients(exact(likelihood, doubles, reduction, full), [t for t in doubles if t.requires_grad])
    check(found, expected, tolerance, addends_of(likelihood, doubles, reduction, full))


def addends_of(likelihood: str, inputs: list[Tensor], reduction: str, full: bool) -> list[float]:
    """Sums of the sizes of what the value and the gradients of all inputs are sums of, the largest of each."""
    shape = inputs[0].shape
    wide = [t.detach().expand(shape).clone().requires_grad_(t.requires_grad) for t in inputs]
    elements = elements_of(likelihood, wide, full)
    weights = 1 / len(elements) if reduction == "batchmean" else 1
    gradients = torch.autograd.grad(elements.sum() * weights, [t for t in wide if t.requires_grad])
    narrow = [t for t in inputs if t.requires_grad]
    sums = [g.abs().sum_to_size(t.shape) for g, t in zip(gradients, narrow, strict=True)]
    return [s.max().item() for s in (reduced(elements.abs(), reduction), *sums)]


def inputs_of(likelihood: str, *patterns: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random ones, those beside recon_x and x of some patterns."""
    return [
        *means_of(likelihood, *SHAPE, dtype=dtype),
        *others_of(likelihood, *map(PATTERNS.get, patterns), dtype=dtype),
    ]


def means_of(likelihood: str, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A random recon_x and x of some shape."""
    recon_x, x = torch.randn(shape), torch.randn(shape)
    if likelihood.startswith("bernoulli"):
        x = x.sigmoid()
    if likelihood in COUNTS:
        recon_x, x = 3.0 * recon_x.exp(), torch.relu(4.0 * x)  # half of them zeros
        x = torch.where(x > 4.0, x.round(), x)
    return [(recon_x.sigmoid() if likelihood == "bernoulli_probs" else recon_x).to(dtype), x.to(dtype)]


def others_of(likelihood: str, *shapes: tuple[int, ...] | None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The other inputs, of these shapes: scales of any sign, all else positive."""
    found = []
    for name, shape in zip(OTHERS[likelihood], shapes, strict=False):
        made = torch.randn(shape)
        if name == "theta":
            made = made.exp()
        found.append((made if name in ("recon_logvar", "log_scale", "zi_logits") else made.abs()).to(dtype))
    return found


# Where an operand is read is the walk's business, and what becomes of it the formula's: in the interpreter one formula
# goes through all patterns, and all formulas through one.
@pytest.mark.parametrize(
    ("likelihood", "pattern"),
    [
        pytest.param(name, pattern, marks=[] if "gaussian" in name or pattern == "channel" else pytest.mark.large)
        for name in LIKELIHOODS
        for pattern in PATTERNS
    ],
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_broadcast_scales_in_any_layout(target: Target, likelihood: str, pattern: str, reduction: str) -> None:
    for layout in layouts_for(pattern, reduction):
        recon_x, x, *others = inputs_of(likelihood, pattern, "sample")
        compare(target, likelihood, [layout(recon_x), layout(x), *others], reduction, 2e-6)


@every_likelihood
def test_scales_a_column_of_whole_vectors(target: Target, likelihood: str) -> None:
    columns = [(24,)] * len(OTHERS[likelihood])
    for reduction in ("batchmean", "none"):
        inputs = [*means_of(likelihood, 9, 24), *others_of(likelihood, *columns)]
        compare(target, likelihood, inputs, reduction, 4e-6)


@every_likelihood
def test_inputs_that_are_broadcast_in_different_ways(target: Target, likelihood: str) -> None:
    """One launch makes all their sums, or what it cannot sum is added up afterwards."""
    patterns = ["each", "scalar", "channel", "sample", "column", "row"]
    others = patterns if len(OTHERS[likelihood]) > 1 else patterns[:1]
    for (k, pattern), (n, other) in itertools.product(enumerate(patterns), enumerate(others)):
        compare(target, likelihood, inputs_of(likelihood, pattern, other), ["sum", "none"][(k + n) % 2], 4e-6)


@every_likelihood
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.bfloat16, 8e-3), (torch.float16, 2e-3)], ids=str
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_dtypes(target: Target, likelihood: str, dtype: torch.dtype, tolerance: float, reduction: str) -> None:
    compare(target, likelihood, inputs_of(likelihood, "channel", "sample", dtype=dtype), reduction, tolerance)


@every_likelihood
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool], ids=str)
def test_targets_of_integers(target: Target, likelihood: str, dtype: torch.dtype) -> None:
    for floats in (torch.float32, torch.float64):
        recon_x, x, *others = inputs_of(likelihood, "channel", "sample", dtype=floats)
        integers = ((x > 0.5) if likelihood.startswith("bernoulli") else x.abs() * 2).to(dtype)
        compare(
            target, likelihood, [recon_x, integers, *others], "batchmean", 4e-6 if floats == torch.float32 else 1e-13
        )


@every_likelihood
@pytest.mark.parametrize("size", [1, 17, *[pytest.param(n, marks=pytest.mark.large) for n in (1025, 4097)]])
def test_sizes_around_the_edges_of_tiles(target: Target, likelihood: str, size: int) -> None:
    shapes = [((3, size), (3, 1)), ((size,), ()), ((3, size), ())]
    for others, reduction in zip(shapes, REDUCTIONS, strict=True):
        inputs = [*means_of(likelihood, 3, size), *others_of(likelihood, *others)]
        compare(target, likelihood, inputs, reduction, 4e-6)


@pytest.mark.parametrize("likelihood", PACKED)
def test_packed_pairs_are_their_halves(target: Target, likelihood: str) -> None:
    recon_x, x, scale = inputs_of(likelihood, "each")[:3]
    packed = torch.cat([recon_x, scale], 1).requires_grad_()
    others = inputs_of(likelihood, "each", "channel")[3:]
    twice = packed.detach().double().requires_grad_()
    for reduction in REDUCTIONS:
        recon_x, scale = twice.chunk(2, 1)
        loss = loss_of(likelihood, [packed, x, None, *others], reduction, target.backend)  # type: ignore[list-item]
        expected = exact(likelihood, [recon_x, x.double(), scale, *[t.double() for t in others]], reduction)
        check(with_gradients(loss, [packed]), with_gradients(expected, [twice]), 2e-6)


@every_likelihood
def test_numbers_and_numbers_in_memory(target: Target, likelihood: str) -> None:
    recon_x, x, *others = inputs_of(likelihood, "scalar", "scalar")
    recon_x.requires_grad_()
    for given in ([t.item() for t in others], others, [t.double() for t in others]):
        loss = loss_of(likelihood, [recon_x, x, *given], "sum", target.backend)
        assert loss.dtype == torch.float32  # 0-dim tensors promote as in PyTorch's arithmetic
        twice = recon_x.detach().double().requires_grad_()
        expected = exact(likelihood, [twice, x.double(), *[t.double() for t in others]], "sum")
        check(with_gradients(loss, [recon_x]), with_gradients(expected, [twice]), 2e-6)


@every_likelihood
def test_any_subset_of_inputs(target: Target, likelihood: str) -> None:
    made = inputs_of(likelihood, "channel", "sample", dtype=torch.float64)
    for wanted in itertools.product([False, True], repeat=len(made)):
        if not any(wanted):
            continue
        inputs = [t.detach().requires_grad_(w) for t, w in zip(made, wanted, strict=True)]
        some = [t for t in inputs if t.requires_grad]
        reduction = ["batchmean", "none"][len(some) % 2]
        found = with_gradients(loss_of(likelihood, inputs, reduction, target.backend), some)
        check(found, with_gradients(exact(likelihood, inputs, reduction), some), 1e-13)


@pytest.mark.large
@every_likelihood
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_first_and_second_derivatives_numerically(target: Target, likelihood: str, reduction: str) -> None:
    t = inputs_of(likelihood, "channel", "sample", dtype=torch.float64)
    if likelihood in COUNTS:
        t[1] += 0.5  # differences go to either side
    t = [v.requires_grad_() for v in t]
    assert torch.autograd.gradcheck(lambda *t: loss_of(likelihood, list(t), reduction, target.backend), t)
    assert torch.autograd.gradgradcheck(
        lambda *t: loss_of(likelihood, list(t), reduction, target.backend), t, fast_mode=True
    )


@pytest.mark.parametrize("likelihood", ["poisson", "negative_binomial"])
def test_second_derivatives_by_counts_of_zero(target: Target, likelihood: str) -> None:
    """There the value has one term, and its derivatives are those of the others."""
    mu, theta = (torch.rand(5, dtype=torch.float64) + 0.5 for _ in range(2))
    x = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    if likelihood == "poisson":
        value = functional.poisson_nll(mu, x, full=True, reduction="sum", backend=target.backend)
        right = torch.polygamma(1, torch.ones_like(x))
    else:
        value = functional.negative_binomial_nll(mu, x, theta, reduction="sum", backend=target.backend)
        right = torch.polygamma(1, torch.ones_like(x)) - torch.polygamma(1, theta)
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, right.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("full", [False, True])
def test_a_negative_rate_has_no_density(target: Target, full: bool) -> None:
    options = {"full": full, "reduction": "none", "dim": (), "backend": target.backend}
    x = torch.tensor([[0.0, 1.0, 3.0]])
    assert functional.poisson_nll(-torch.ones(1, 3), x, **options).isnan().all()
    assert functional.poisson_nll(torch.zeros(1, 3), x, **options)[0, 0].abs() < 1e-7


@every_likelihood
def test_not_a_number_and_infinity_go_where_they_go_in_eager(target: Target, likelihood: str) -> None:
    special = torch.tensor([0.0, 1.0, -1.0, 88.0, -88.0, torch.inf, -torch.inf, torch.nan])
    t = torch.cartesian_prod(*[special] * (2 + len(OTHERS[likelihood])))
    is_newer = likelihood in (*COUNTS, "discretized_logistic")

    def run(backend: str) -> list[Tensor]:
        inputs = [v.clone().requires_grad_() for v in t.unbind(1)]
        loss = loss_of(likelihood, inputs, "none", backend)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), inputs)]

    value, *gradients = run(target.backend)
    expected, *others = run("reference")
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7 if is_newer else 1e-30, equal_nan=True)
    for found, other in zip(gradients, others, strict=True):
        # In these, kernels have limits where a product of the chain rule has none.
        told = expected.isfinite() & other.isfinite() if is_newer else torch.ones_like(expected, dtype=torch.bool)
        torch.testing.assert_close(
            found[told], other[told], rtol=3e-5 if is_newer else 1e-5, atol=3e-7 if is_newer else 1e-30, equal_nan=True
        )
        assert found[told].isfinite().all() or not is_newer


@every_likelihood
def test_with_a_divergence_and_its_terms(target: Target, likelihood: str) -> None:
    inputs = [t.requires_grad_() for t in inputs_of(likelihood, "channel", "sample", dtype=torch.float64)]
    mu, logvar = (torch.randn(4, 6, dtype=torch.float64).requires_grad_() for _ in range(2))
    terms = functional.elbo_loss(
        *inputs[:2],
        mu,
        logvar,
        likelihood=likelihood,
        beta=0.3,
        return_terms=True,
        backend=target.backend,
        **named(likelihood, inputs),
    )
    nll, kl = exact(likelihood, inputs, "batchmean"), reduced(kl_elements(mu, logvar), "batchmean")
    for found, expected in zip(terms, (nll + 0.3 * kl, nll, kl), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    leaves = [*inputs, mu, logvar]
    found, expected = torch.autograd.grad(terms[0], leaves), torch.autograd.grad(nll + 0.3 * kl, leaves)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)


def test_every_backend_has_every_formula(target: Target) -> None:
    if target.backend == "native":
        from fusedvae import _C

        assert set(_C.formulas()) == set(FORMULAS)
        beside_samples = {f"{f.name}{end}" for f in FORMULAS.values() if f.at_sample for end in ("", "_at_sample")}
        assert set(_C.divergences()) == beside_samples
    for name, formula in FORMULAS.items():
        assert formula.elements is getattr(reference, name)
