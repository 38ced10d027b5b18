"""Wrong arguments: each raises before any kernel starts, and the message names it, what came and what was expected."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction

import pytest
import torch
from conftest import sampling
from torch import Tensor

import fusedvae
from fusedvae import backend as backend_module
from fusedvae import functional
from fusedvae.backend import current_choice, native, resolve
from fusedvae.backend.reference import PLAIN, form_fields

X = torch.zeros(4, 6)
LATENT = torch.zeros(4, 3)
META = torch.zeros(4, 6, device="meta")
META_LATENT = torch.zeros(4, 3, device="meta")
COMPLEX = torch.zeros(4, 6, dtype=torch.complex64)
INTEGERS = torch.zeros(4, 6, dtype=torch.int64)

ELBO = {"recon_x": X, "x": X, "mu": LATENT, "logvar": LATENT}
NLL = {"recon_x": X, "x": X}
MOMENTS = {"mu": LATENT, "logvar": LATENT}
TORCHS_NLL = {"input": X, "target": X, "var": 1.0}

# What is wrong with a reconstruction, wherever one is taken: (arguments, error, message).
RECONSTRUCTION = [
    ({"recon_x": [1.0]}, TypeError, "recon_x: expected a tensor, got list"),
    ({"recon_x": None}, TypeError, "recon_x: expected a tensor, got NoneType"),
    ({"recon_x": INTEGERS}, TypeError, "recon_x: expected a float tensor, got torch.int64"),
    ({"recon_x": COMPLEX}, TypeError, "recon_x: expected a float tensor, got torch.complex64"),
    ({"recon_x": torch.zeros(4, 5)}, ValueError, "x: expected the shape of recon_x (4, 5), got (4, 6)"),
    ({"recon_x": torch.zeros(6)}, ValueError, "x: expected the shape of recon_x (6,), got (4, 6)"),
    ({"recon_x": META}, ValueError, "x: expected on meta, where recon_x is; got it on cpu"),
    ({"x": 0.5}, TypeError, "x: expected a tensor, got float"),
    ({"x": COMPLEX}, TypeError, "x: expected a float or integer tensor, got torch.complex64"),
    ({"x": X.to_sparse()}, TypeError, "x: expected a strided tensor, got one of layout torch.sparse_coo"),
    ({"x": torch.zeros(4, 1)}, ValueError, "x: expected the shape of recon_x (4, 6), got (4, 1)"),
    ({"x": META}, ValueError, "x: expected on cpu, where recon_x is; got it on meta"),
    (
        {"recon_x": torch.zeros(()), "x": torch.zeros(())},
        ValueError,
        "x: expected a batch dimension, got a 0-dim tensor",
    ),
    ({"recon_logvar": "0"}, TypeError, "recon_logvar: expected a tensor, a number or None, got str"),
    ({"recon_logvar": False}, TypeError, "recon_logvar: expected a tensor, a number or None, got bool"),
    ({"recon_logvar": Fraction(1, 2)}, TypeError, "recon_logvar: expected a tensor, a number or None, got Fraction"),
    ({"recon_logvar": 1j}, TypeError, "recon_logvar: expected a tensor, a number or None, got complex"),
    ({"recon_logvar": COMPLEX}, TypeError, "recon_logvar: expected a float tensor, got torch.complex64"),
    ({"recon_logvar": INTEGERS}, TypeError, "recon_logvar: expected a float tensor, got torch.int64"),
    ({"recon_logvar": META}, ValueError, "recon_logvar: expected on cpu, where recon_x is; got it on meta"),
    (
        {"recon_logvar": torch.zeros(5)},
        ValueError,
        "recon_logvar: expected a shape that broadcasts to (4, 6), got (5,)",
    ),
    (
        {"recon_logvar": torch.zeros(1, 4, 6)},
        ValueError,
        "recon_logvar: expected a shape that broadcasts to (4, 6), got (1, 4, 6)",
    ),
    (
        {"recon_logvar": None, "recon_x": torch.zeros(4, 11)},
        ValueError,
        "recon_x: packed (no log-variance given), expected an even size along dimension 1, got shape (4, 11)",
    ),
    (
        {"recon_logvar": None, "recon_x": torch.zeros(8)},
        ValueError,
        "recon_x: packed (no log-variance given), expected an even size along dimension 1, got shape (8,)",
    ),
    (
        {"recon_logvar": None},
        ValueError,
        "recon_x: packed (no log-variance given), expected the shape of x (4, 6) with twice the size along "
        "dimension 1, got (4, 6)",
    ),
]
LATENTS = [
    ({"mu": 0.0}, TypeError, "mu: expected a tensor, got float"),
    ({"mu": None}, TypeError, "mu: expected a tensor, got NoneType"),
    ({"mu": LATENT.long()}, TypeError, "mu: expected a float tensor, got torch.int64"),
    ({"mu": LATENT.to(torch.complex64)}, TypeError, "mu: expected a float tensor, got torch.complex64"),
    ({"mu": LATENT.to_sparse()}, TypeError, "mu: expected a strided tensor, got one of layout torch.sparse_coo"),
    ({"mu": torch.zeros(4, 2)}, ValueError, "logvar: expected the shape of mu (4, 2), got (4, 3)"),
    ({"mu": META_LATENT}, ValueError, "logvar: expected on meta, where mu is; got it on cpu"),
    (
        {"mu": torch.zeros(()), "logvar": torch.zeros(())},
        ValueError,
        "mu: expected a batch dimension, got a 0-dim tensor",
    ),
    ({"logvar": 0.0}, TypeError, "logvar: expected a tensor, got float"),
    ({"logvar": LATENT.long()}, TypeError, "logvar: expected a float tensor, got torch.int64"),
    ({"logvar": torch.zeros(3)}, ValueError, "logvar: expected the shape of mu (4, 3), got (3,)"),
    ({"logvar": META_LATENT}, ValueError, "logvar: expected on cpu, where mu is; got it on meta"),
    (
        {"logvar": None},
        ValueError,
        "mu: packed (no log-variance given), expected an even size along dimension 1, got shape (4, 3)",
    ),
    (
        {"logvar": None, "mu": torch.zeros(4)},
        ValueError,
        "mu: packed (no log-variance given), expected an even size along dimension 1, got shape (4,)",
    ),
]
REDUCTION = [
    (
        {"reduction": "avg"},
        ValueError,
        "reduction: expected 'batchmean', 'sum', 'mean', 'weighted_mean' or 'none', got 'avg'",
    ),
    (
        {"reduction": None},
        ValueError,
        "reduction: expected 'batchmean', 'sum', 'mean', 'weighted_mean' or 'none', got None",
    ),
    (
        {"reduction": ["sum"]},
        ValueError,
        "reduction: expected 'batchmean', 'sum', 'mean', 'weighted_mean' or 'none', got ['sum']",
    ),
    (
        {"reduction": ("mean", "sum", "sum")},
        ValueError,
        "reduction: expected 'batchmean', 'sum', 'mean', 'weighted_mean' or 'none', got ('mean', 'sum', 'sum')",
    ),
]
GENERATOR = [
    ({"generator": 3}, TypeError, "generator: expected a torch.Generator, a list of them or None, got int"),
]
BACKEND = [
    ({"backend": "cuda"}, ValueError, "backend: expected one of 'auto', 'native', 'triton', 'reference'; got 'cuda'"),
    ({"backend": 1}, TypeError, "backend: expected a name, got int"),
    ({"backend": ["native"]}, TypeError, "backend: expected a name, got list"),
]
BETA = [
    ({"beta": "1"}, TypeError, "beta: expected a number or a 0-dim tensor, got str"),
    ({"beta": None}, TypeError, "beta: expected a number or a 0-dim tensor, got NoneType"),
    ({"beta": Fraction(1, 2)}, TypeError, "beta: expected a number or a 0-dim tensor, got Fraction"),
    ({"beta": torch.ones(1)}, ValueError, "beta: expected a number or a 0-dim float tensor, got shape (1,), torch.f"),
    (
        {"beta": torch.ones((), dtype=torch.int64)},
        ValueError,
        "beta: expected a number or a 0-dim float tensor, got sh",
    ),
]

CASES: dict[str, tuple[Callable, dict, list]] = {
    "reparameterize": (
        functional.reparameterize,
        MOMENTS,
        [
            *LATENTS,
            *GENERATOR,
            *BACKEND,
            ({"noise": 0.0}, TypeError, "noise: expected a tensor, got float"),
            ({"noise": LATENT.long()}, TypeError, "noise: expected a float tensor, got torch.int64"),
            ({"noise": torch.zeros(4, 1)}, ValueError, "noise: expected shape (4, 3), got (4, 1)"),
            (
                {"mu": torch.zeros(4, 6), "logvar": None, "noise": torch.zeros(4, 6)},
                ValueError,
                "noise: expected shape (4, 3), got (4, 6)",
            ),
            ({"noise": META_LATENT}, ValueError, "noise: expected on cpu, where mu is; got it on meta"),
            (
                {"noise": LATENT, "generator": torch.Generator()},
                ValueError,
                "generator: expected None when noise is given",
            ),
        ],
    ),
    "latent": (functional.latent, MOMENTS, [*LATENTS, *GENERATOR, *BACKEND]),
    "kl_standard_normal": (functional.kl_standard_normal, MOMENTS, [*LATENTS, *REDUCTION, *BACKEND]),
    "gaussian_nll": (functional.gaussian_nll, NLL, [*RECONSTRUCTION, *REDUCTION, *BACKEND]),
    "gaussian_nll_loss": (
        functional.gaussian_nll_loss,
        TORCHS_NLL,
        [
            *BACKEND,
            ({"input": 1.0}, TypeError, "input: expected a tensor, got float"),
            ({"input": INTEGERS}, TypeError, "input: expected a float tensor, got torch.int64"),
            ({"input": META}, ValueError, "target: expected on meta, where input is; got it on cpu"),
            ({"target": 1.0}, TypeError, "target: expected a tensor, got float"),
            ({"target": COMPLEX}, TypeError, "target: expected a float or integer tensor, got torch.complex64"),
            ({"target": torch.zeros(4, 5)}, ValueError, "target: expected a shape that broadcasts with"),
            ({"var": "1"}, TypeError, "var: expected a tensor or a number, got str"),
            ({"var": INTEGERS}, TypeError, "var: expected a float tensor, got torch.int64"),
            ({"var": META}, ValueError, "var: expected on cpu, where input is; got it on meta"),
            ({"var": -1.0}, ValueError, "var: expected at least 0, got -1.0"),
            ({"var": torch.full((4, 6), -1.0)}, ValueError, "var: has negative entries"),
            ({"var": torch.zeros(5)}, ValueError, "var: expected a shape that"),
            ({"var": torch.zeros(4, 2)}, ValueError, "var: expected a shape that"),
            ({"reduction": "batchmean"}, ValueError, "reduction: expected 'mean', 'sum' or 'none', got 'batchmean'"),
            ({"eps": "tiny"}, TypeError, "eps: expected a number, got str"),
        ],
    ),
    "elbo_loss": (
        functional.elbo_loss,
        ELBO,
        [
            *RECONSTRUCTION,
            *LATENTS,
            *BETA,
            *REDUCTION,
            *BACKEND,
            (
                {"mu": torch.zeros(2, 3), "logvar": torch.zeros(2, 3)},
                ValueError,
                "mu: expected the batch size of x, 4, got 2",
            ),
            (
                {"mu": META_LATENT, "logvar": META_LATENT},
                ValueError,
                "mu: expected on cpu, where x is; got it on meta",
            ),
            (
                {"reduction": ("mean", "sum", "sum")},
                ValueError,
                "reduction: expected 'batchmean', 'sum', 'mean', 'weighted_mean' or 'none', got ('mean', 'sum', 'sum')"
                "; or a pair of these, the likelihood's and the KL's",
            ),
            (
                {"prior_mu": False, "prior_logvar": 0.0},
                TypeError,
                "prior_mu: expected a tensor, a number or None, got bool",
            ),
            (
                {"beta": torch.zeros((), device="meta")},
                ValueError,
                "beta: expected on cpu, where x is; got it on meta",
            ),
            (
                {"grad_scale": torch.zeros((), device="meta")},
                ValueError,
                "grad_scale: expected on cpu, where x is; got it on meta",
            ),
            (
                {"weight": torch.ones(4)},
                ValueError,
                "weight: expected a shape that broadcasts to (4, 6), got (4,); one a sample is weight.unsqueeze(1)",
            ),
            (
                {"latent_weight": torch.ones(4)},
                ValueError,
                "latent_weight: expected a shape that broadcasts to (4, 3), got (4,); one a sample is "
                "latent_weight.unsqueeze(1)",
            ),
            ({"weight": torch.ones(5)}, ValueError, "weight: expected a shape that broadcasts to (4, 6), got (5,)"),
            (
                {
                    "recon_x": torch.zeros(4, 2, 3, 3),
                    "x": torch.zeros(4, 2, 3, 3),
                    "weight": torch.ones(4),
                },
                ValueError,
                "weight: expected a shape that broadcasts to (4, 2, 3, 3), got (4,); one a sample is "
                "weight.view(-1, 1, 1, 1)",
            ),
            (
                {"kl": torch.zeros(5, 4), "mu": None, "logvar": None},
                ValueError,
                "kl: expected one value per sample, shape (4,), got (5, 4); of several samples in front, take the "
                'likelihood by itself, one value each: reduction="none", dim=-1',
            ),
            (
                {
                    "recon_x": X.expand(5, 4, 6),
                    "x": X.expand(5, 4, 6),
                    "kl": torch.zeros(4),
                    "mu": None,
                    "logvar": None,
                },
                ValueError,
                "kl: expected the batch size of x, 5, got 4; of several samples in front, take the likelihood",
            ),
            ({"kl": torch.zeros(4)}, ValueError, "kl: expected None when mu or logvar is given"),
            ({"kl": torch.zeros(4), "mu": None}, ValueError, "kl: expected None when mu or logvar is given"),
            ({"kl": 0.0, "mu": None, "logvar": None}, TypeError, "kl: expected a tensor, got float"),
            (
                {"kl": torch.zeros(4, dtype=torch.int64), "mu": None, "logvar": None},
                TypeError,
                "kl: expected a float tensor, got torch.int64",
            ),
            (
                {"kl": torch.zeros(()), "mu": None, "logvar": None},
                ValueError,
                "kl: expected one value per sample, shape (4,), got ()",
            ),
            (
                {"kl": torch.zeros(5), "mu": None, "logvar": None},
                ValueError,
                "kl: expected the batch size of x, 4, got 5",
            ),
            (
                {"kl": torch.zeros(4, device="meta"), "mu": None, "logvar": None},
                ValueError,
                "kl: expected on cpu, where x is; got it on meta",
            ),
        ],
    ),
    "ELBOLoss": (
        fusedvae.ELBOLoss,
        {},
        [*BETA, *REDUCTION, *BACKEND],
    ),
    "random.normal": (
        fusedvae.random.normal,
        {"shape": (2, 3), "seed": 1},
        [
            *BACKEND,
            ({"shape": (2, -1)}, ValueError, "shape: expected sizes of at least 0, got (2, -1)"),
            ({"shape": "ab"}, TypeError, "shape: expected an integer or a sequence of them, got"),
            ({"shape": (2.5,)}, TypeError, "shape: expected an integer or a sequence of them, got"),
            ({"shape": None}, TypeError, "shape: expected an integer or a sequence of them, got"),
            ({"seed": 1.5}, TypeError, "seed: expected an integer or a 0-dim int64 tensor, got float"),
            ({"seed": True}, TypeError, "seed: expected an integer or a 0-dim int64 tensor, got bool"),
            ({"seed": 2**64}, ValueError, f"seed: expected an integer of 64 bits, got {2**64}"),
            ({"seed": -(2**63) - 1}, ValueError, f"seed: expected an integer of 64 bits, got {-(2**63) - 1}"),
            ({"seed": torch.zeros(1, dtype=torch.int64)}, ValueError, "seed: expected a 0-dim int64 tensor, got shape"),
            ({"seed": torch.zeros(())}, ValueError, "seed: expected a 0-dim int64 tensor, got shape (), torch.float32"),
            (
                {"seed": torch.zeros((), dtype=torch.int64, device="meta")},
                ValueError,
                "seed: expected on cpu, got it on meta",
            ),
            ({"dtype": torch.int32}, TypeError, "dtype: expected a float dtype, got torch.int32"),
            ({"dtype": "float32"}, TypeError, "dtype: expected a float dtype, got float32"),
        ],
    ),
    "use_backend": (
        fusedvae.use_backend,
        {},
        [({"name": case["backend"]}, error, message) for case, error, message in BACKEND],
    ),
}


@pytest.mark.parametrize(
    "call",
    [
        lambda: functional.elbo_loss(X, X, LATENT),
        lambda: fusedvae.ELBOLoss()(X, X, LATENT),
        lambda: functional.latent(LATENT),
        lambda: functional.reparameterize(LATENT),
        lambda: functional.kl_standard_normal(LATENT),
    ],
)
def test_a_forgotten_log_variance_is_an_error_and_not_half_of_the_mean(call: Callable) -> None:
    with pytest.raises(TypeError, match="logvar"):
        call()


PAIR = torch.zeros(8, 2)


def with_prior(*prior: object, **named: object) -> Iterator[Callable]:
    """Calls of all that takes a prior, whose latent has two dimensions: halves of it broadcast to it."""
    yield lambda: functional.kl_normal(PAIR, PAIR, *prior, **named)
    yield lambda: functional.latent(PAIR, PAIR, *prior, **named)
    named = {**dict(zip(("prior_mu", "prior_logvar"), prior, strict=False)), **named}
    yield lambda: functional.elbo_loss(PAIR, PAIR, PAIR, PAIR, **named)
    yield lambda: fusedvae.ELBOLoss()(PAIR, PAIR, PAIR, PAIR, **named)
    layer = torch.zeros(2, 2), None
    yield lambda: functional.linear_elbo(PAIR, *layer, PAIR, PAIR, PAIR, **named)
    yield lambda: fusedvae.LinearLikelihood(2, 2)(PAIR, PAIR, PAIR, PAIR, **named)


def test_a_forgotten_log_variance_of_the_prior_is_an_error_and_not_half_of_its_mean() -> None:
    forgotten = r"^prior_logvar: expected a tensor or number beside prior_mu, or None if both are packed .* got nothing"
    for mean in (PAIR, 0.5):
        for call in with_prior(mean):
            with pytest.raises(TypeError, match=forgotten):
                call()
    # Said, it is one size too small: halves of one element would broadcast to two.
    for call in with_prior(PAIR, None):
        with pytest.raises(ValueError, match=r"^prior_mu: packed .* have mu's size along it .* got \(8, 2\)"):
            call()
    with pytest.raises(ValueError, match=r"^prior_mu: packed .* along dimension -1 have mu's size .* got \(5, 2\)"):
        functional.kl_normal(torch.zeros(8, 5, 2), torch.zeros(8, 5, 2), torch.zeros(5, 2), None, packed_dim=-1)


def test_priors_that_are_said_as_a_whole() -> None:
    packed = torch.zeros(8, 4)
    for prior in ((), (None,), (None, None), (PAIR, PAIR), (0.0, 0.0), (packed, None), (packed[:1], None)):
        for call in with_prior(*prior):
            call()
    functional.kl_normal(torch.zeros(8, 5, 2), torch.zeros(8, 5, 2), torch.zeros(5, 4), None, packed_dim=-1)
    functional.elbo_loss(PAIR, PAIR, None, None, kl=torch.zeros(8))


def test_what_stands_for_nothing_can_be_read() -> None:
    shown = str(inspect.signature(functional.elbo_loss))
    assert "logvar: 'Tensor | None' = <required>, recon_logvar" in shown
    assert "prior_logvar: 'Tensor | float | None' = <required with prior_mu>, " in shown


def test_what_stands_for_nothing_breaks_no_graph() -> None:
    if backend_module.unavailable("native", "cpu"):
        pytest.skip("needs the extension")
    for call in (functional.kl_normal, lambda *t: fusedvae.ELBOLoss()(*t, *t, prior_mu=t[0], prior_logvar=t[1])):
        compiled = torch.compile(call, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(PAIR + 1, PAIR), call(PAIR + 1, PAIR))
    compiled = torch.compile(fusedvae.ELBOLoss(), backend="eager", fullgraph=True)
    assert compiled(PAIR, PAIR, PAIR, PAIR).item() == 0.0


def test_the_public_functions_are_named() -> None:
    own = {n for n, v in vars(functional).items() if getattr(v, "__module__", "").startswith("fusedvae.functional.")}
    assert own == set(functional.__all__)
    for name in functional.__all__:
        assert "see above" not in (getattr(functional, name).__doc__ or "")


@pytest.mark.parametrize(("dim", "error"), [(0, ValueError), (-2, ValueError), (2, ValueError), ("1", TypeError)])
def test_wrong_dimensions_of_packed_tensors(dim: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="packed_dim"):
        functional.latent(torch.zeros(4, 6), None, packed_dim=dim)  # type: ignore[arg-type]


@pytest.mark.parametrize("dim", ["1", None, 1.5])
def test_a_packed_dim_is_an_integer_where_nothing_is_packed_too(dim: object) -> None:
    t = torch.zeros(4, 6)
    for call in (functional.latent, functional.reparameterize, functional.kl_standard_normal):
        with pytest.raises(TypeError, match="packed_dim: expected an integer, got"):
            call(t, t, packed_dim=dim)  # type: ignore[operator]
    with pytest.raises(TypeError, match="packed_dim: expected an integer, got"):
        functional.elbo_loss(t, t, t, t, packed_dim=dim)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_by_name() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)])
    functional.kl_standard_normal(X, X)  # a call of the same kind: its tensors are not compared with these
    with pytest.raises(TypeError, match="mu: expected a strided tensor, got a nested one"):
        functional.kl_standard_normal(nested, nested)


def test_an_empty_batch_may_have_a_variance_for_each_column() -> None:
    x, var = torch.zeros(0, 3), torch.ones(1, 3)
    for reduction in ("sum", "none", "mean"):
        found = functional.gaussian_nll_loss(x, x, var, reduction=reduction)
        # PyTorch 2.6 does not take this variance by itself.
        expected = torch.nn.functional.gaussian_nll_loss(x, x, var.expand(0, 3), reduction=reduction)
        torch.testing.assert_close(found, expected, equal_nan=True)
    for wrong in ((1, 1), (2, 3)):
        with pytest.raises(ValueError, match="var: "):
            functional.gaussian_nll_loss(torch.zeros(4, 3), torch.zeros(4, 3), torch.ones(wrong))


SEED = torch.tensor(1)
GAUSSIAN = (["gaussian_nll"], *map(list, form_fields([PLAIN])), None, [False], [False], 1, False, ["sum"], None)
OPERATORS = {
    "logvar of another shape": ("latent", [X, LATENT, SEED, None, None], *sampling(None, "native")),
    "noise of another shape": ("latent", [X, X, None, None, LATENT[:1, :1].expand(9, 9)], *sampling(None, "native")),
    "neither seed nor noise": ("latent", [X, X, None, None, None], *sampling(None, "native")),
    "a seed that is none": ("latent", [X, X, torch.zeros(()), None, None], *sampling(None, "native")),
    "an offset that is none": ("latent", [X, X, SEED, X, None], *sampling(None, "native")),
    "a gradient of another shape": (
        "latent_gradient", [X, X, SEED, None, None, LATENT, None], "kl_standard_normal", *form_fields([PLAIN]), None,
        False, [1], 1, [True, True], "native",
    ),
    "a factor of another shape": (
        "term_gradient", [X, X, 0 * X, None, LATENT], "gaussian_nll", *form_fields([PLAIN]), [], (), 1,
        [True, False, False], "native",
    ),
    "weights of another shape": (
        "term_gradient", [X, X, 0 * X, LATENT, SEED.float()], "gaussian_nll", *form_fields([PLAIN]), [], (), 1,
        [True, False, False], "native",
    ),
    "values summed over other dimensions": (
        "term_gradient", [X, X, 0 * X, None, X], "gaussian_nll", *form_fields([PLAIN]), [], None, 1,
        [True, False, False], "native",
    ),
    "data of another shape": (
        "objective", [X, LATENT, X, None], *GAUSSIAN, torch.float32, False, [False] * 4, False, "native",
    ),
    "data of integers": (
        "objective", [X, X.long(), X, None], *GAUSSIAN, torch.float32, False, [False] * 4, False, "native",
    ),
    "an input too few": (
        "objective", [X, X, None, None], ["laplace_nll"], *GAUSSIAN[1:], torch.float32, False, [False] * 4, False,
        "native",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", OPERATORS)
def test_operators_that_anyone_may_call_read_nothing_out_of_bounds(wrong: str) -> None:
    if backend_module.unavailable("native", "cpu"):
        pytest.skip("needs the extension")
    name, *arguments = OPERATORS[wrong]
    with pytest.raises((ValueError, TypeError)):
        getattr(torch.ops.fusedvae, name)(*arguments)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that must not start."""

    def started(*args: object) -> None:
        raise AssertionError("a kernel started")

    monkeypatch.setattr(native, "_launcher", lambda *arguments: started)


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        pytest.param(function, {**right, **wrong}, error, message, id=f"{name}-{message[:60]}")
        for name, (function, right, wrongs) in CASES.items()
        for wrong, error, message in wrongs
    ],
)
@pytest.mark.usefixtures("no_kernels")
def test_wrong_arguments(function: Callable, arguments: dict, error: type[Exception], message: str) -> None:
    for _ in range(2):  # the second time as the first
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            function(**arguments)


@pytest.mark.parametrize("name", [name for name in CASES if name != "use_backend"])
def test_the_right_arguments_are_right(name: str) -> None:
    """Else the cases above could fail for another reason than theirs."""
    function, right, _ = CASES[name]
    function(**right)


@pytest.mark.parametrize("name", ["reparameterize", "latent", "kl_standard_normal", "gaussian_nll", "elbo_loss"])
def test_right_calls_do_not_make_wrong_ones_right(name: str) -> None:
    """What a call has learnt is for operands like its own."""
    function, right, wrongs = CASES[name]
    function(**right)
    for wrong, error, _ in wrongs:
        with pytest.raises(error):
            function(**{**right, **wrong})
        function(**right)


# --- the choice of a backend --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _choice_stays() -> Iterator[None]:
    before = current_choice()
    yield
    fusedvae.use_backend(before)


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose extension was never compiled."""
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_import_error", "No module named 'fusedvae._C'", raising=False)
    monkeypatch.setattr(native, "BUILD_RECORD", native.BUILD_RECORD.with_name("absent.json"))


def test_a_call_sets_and_a_block_restores() -> None:
    fusedvae.use_backend("reference")
    assert current_choice() == resolve("cpu") == "reference"
    with fusedvae.use_backend("auto"):
        assert current_choice() == "auto"
        with fusedvae.use_backend("reference"):
            assert current_choice() == "reference"
        assert current_choice() == "auto"
    assert current_choice() == "reference"
    fusedvae.use_backend("auto")
    assert current_choice() == "auto"


def test_an_exception_in_a_block_restores_too() -> None:
    fusedvae.use_backend("auto")
    with pytest.raises(KeyError), fusedvae.use_backend("reference"):
        raise KeyError
    assert current_choice() == "auto"


def test_a_wrong_name_leaves_the_choice_alone() -> None:
    fusedvae.use_backend("reference")
    with pytest.raises(ValueError, match="backend"):
        fusedvae.use_backend("best")
    assert current_choice() == "reference"


def test_a_tensor_whose_memory_is_gone_is_not_zeros() -> None:
    """As offloading and sharding leave parameters, between the forward and the backward pass too."""
    if backend_module.unavailable("native", "cpu"):
        pytest.skip("needs the extension")
    recon_x, x, logvar = (torch.randn(8, 60).requires_grad_() for _ in range(3))
    value = functional.gaussian_nll(recon_x, x.detach(), logvar, reduction="none", backend="native")
    logvar.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="a tensor has no memory: its storage has been freed"):
        value.sum().backward()
    with pytest.raises(ValueError, match="a tensor has no memory: its storage has been freed"):
        functional.gaussian_nll(recon_x, x.detach(), logvar, backend="native")
    # Autograd's own zeros have none either.
    zeros = torch._efficientzerotensor((8, 60), dtype=torch.float32)
    found = functional.gaussian_nll(recon_x, zeros, reduction="sum", backend="native")
    torch.testing.assert_close(found, 0.5 * recon_x.square().sum())


@pytest.mark.parametrize("found", [["there is no NVIDIA driver"], ["", "it is too old"], ["", ""]])
def test_every_gpu_has_its_reason(monkeypatch: pytest.MonkeyPatch, found: list[str]) -> None:
    """Where the driver says nothing of single ones, there is one for all that PyTorch knows of."""
    if native._C is None:
        pytest.skip("needs the extension")
    monkeypatch.setattr(native._C, "cuda_unavailable", lambda: found, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    native._gpus_unavailable.cache_clear()
    try:
        reasons = [backend_module.unavailable("native", "cuda", index) for index in (0, 1)]
        assert reasons == [(found * 2)[index] or None for index in (0, 1)]
        assert backend_module.unavailable("native", "cuda") == (None if None in reasons else reasons[0])
    finally:
        native._gpus_unavailable.cache_clear()


def node_of(loss: Tensor) -> str:
    assert loss.grad_fn is not None
    return loss.grad_fn.name()


def test_the_choice_is_what_runs_and_a_call_may_have_its_own() -> None:
    if backend_module.unavailable("native", "cpu"):
        pytest.skip("needs the extension")
    mu, logvar = (torch.randn(4, 3).requires_grad_() for _ in range(2))

    def ran(**options: str) -> bool:
        """Whether the kernels did."""
        return "Objective" in node_of(functional.kl_standard_normal(mu, logvar, **options))

    with fusedvae.use_backend("reference"):
        assert not ran()
        assert ran(backend="native")
        assert ran(backend="auto")
        assert not ran()
    with fusedvae.use_backend("native"):
        assert ran()
        assert not ran(backend="reference")
        assert ran()


@pytest.mark.usefixtures("no_extension")
def test_what_falls_back_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "_has_warned", False)
    mu, logvar = torch.randn(2, 11, 5)
    with pytest.warns(UserWarning, match=r"plain PyTorch on 'cpu'.*install fusedvae again where .*: .+"):
        functional.kl_standard_normal(mu, logvar, backend="auto")
    functional.gaussian_nll(mu, logvar, backend="auto")  # warnings are errors
    monkeypatch.setattr(backend_module, "_has_warned", False)
    functional.kl_standard_normal(mu, logvar, backend="reference")  # was asked for


@pytest.mark.usefixtures("no_extension")
def test_an_unavailable_backend_says_why_and_what_to_do() -> None:
    with pytest.raises(
        RuntimeError,
        match=r"^backend 'native' is unavailable: cpu: .*No module named 'fusedvae._C'.*install fusedvae again",
    ):
        fusedvae.use_backend("native")
    with pytest.raises(RuntimeError, match=r"^backend 'native' is unavailable for 'cpu' tensors: .*install fusedvae"):
        functional.kl_standard_normal(torch.randn(7, 5), torch.randn(7, 5), backend="native")


@pytest.mark.usefixtures("no_extension")
@pytest.mark.filterwarnings("ignore:fusedvae computes in plain PyTorch")
def test_auto_never_fails() -> None:
    assert fusedvae.backends()["reference"].devices[0] == "cpu"
    assert "native" not in fusedvae.backends()
    with fusedvae.use_backend("auto"):
        t = [torch.randn(11, 5).requires_grad_() for _ in range(4)]
        functional.elbo_loss(*t).backward()
        assert t[0].grad is not None
        assert fusedvae.random.normal(3, 1).shape == (3,)


def test_backends_lists_what_serves_which_device() -> None:
    found = fusedvae.backends()
    assert list(found)[-1] == "reference"
    assert found["reference"].description == "plain PyTorch"
    for name, info in found.items():
        assert info.devices
        with fusedvae.use_backend(name):
            assert resolve(info.devices[0]) == name


def in_a_process_with(choice: str, code: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "FUSEDVAE_BACKEND": choice}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_the_environment_sets_the_first_choice() -> None:
    code = "import fusedvae.backend as b; print(b.current_choice(), b.resolve('cpu'))"
    assert in_a_process_with("reference", code).stdout.split() == ["reference", "reference"]
    wrong = in_a_process_with("fastest", code)
    assert wrong.returncode
    assert "FUSEDVAE_BACKEND: expected one of 'auto', 'native', 'triton', 'reference'; got 'fastest'" in wrong.stderr


def test_the_package_can_be_imported_in_inference_mode() -> None:
    script = "import torch\nwith torch.inference_mode():\n    import fusedvae"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(("arguments", "error", "message"), REDUCTION)
def test_reductions_beside_a_weight(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        functional.elbo_loss(**ELBO, weight=X, **arguments)


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("wrong", [{"prior_mu": torch.zeros(7), "prior_logvar": 0.0}, {"dim": 5}], ids=str)
def test_what_is_refused_draws_from_no_generator(samples: int | None, wrong: dict) -> None:
    generator = torch.Generator()
    before = generator.get_state()
    with pytest.raises(ValueError, match=r"^(prior_mu|dim): "):
        functional.latent(LATENT, LATENT, samples=samples, generator=generator, **wrong)
    assert torch.equal(generator.get_state(), before)
