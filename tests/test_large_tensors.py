"""Tensors that no cache holds, for which the CPU kernels have ways of their own: the numbers are the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import EPSILON, KERNEL_TARGETS, Target, threads
from torch import Tensor

import fusedvae
from fusedvae import functional
from fusedvae.backend.reference import LIKELIHOODS
from fusedvae.functional.likelihoods import run_likelihood

pytestmark = pytest.mark.parametrize("target", KERNEL_TARGETS, indirect=True)


@pytest.fixture(autouse=True)
def _chosen(target: Target) -> Iterator[None]:
    """What a test calls runs on the target's backend."""
    with fusedvae.use_backend(target.backend):
        yield


ROWS, COLUMNS = 11, 300_007
"""Of operands that are 24 MiB together, with their gradients, even in 16 bits."""


@pytest.mark.parametrize(("dtype", "x_dtype"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float16",) * 2])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_half_precision_is_as_row_by_row(name: str, dtype: str, x_dtype: str) -> None:
    formula, half = LIKELIHOODS[name], getattr(torch, dtype)
    shape = ROWS, COLUMNS
    recon_x = (torch.rand(shape) * 0.8 + 0.1).to(half).requires_grad_()
    x = torch.randint(0, 2, shape).to(getattr(torch, x_dtype))
    others = [(torch.rand(shape) * 0.8 + 0.1).to(half).requires_grad_() for _ in formula.inputs[2:]]
    wanted = [recon_x, *others]

    def loss(*inputs: Tensor) -> Tensor:
        return run_likelihood(name, inputs, None, False, None, "sum", None, 1, None, False)

    value = loss(recon_x, x, *others)
    found = torch.autograd.grad(value, wanted)
    values, gradients = [], []
    for row in range(ROWS):
        rows = [t[row : row + 1].detach().requires_grad_() for t in wanted]
        values.append(loss(rows[0], x[row : row + 1], *rows[1:]))
        gradients.append(torch.autograd.grad(values[-1], rows))
    torch.testing.assert_close(value.double(), torch.stack(values).double().sum(), rtol=1e-6, atol=0)
    for k, gradient in enumerate(found):
        # The compiler may round a product and a sum at once in one of the two.
        expected = torch.cat([g[k] for g in gradients])
        torch.testing.assert_close(gradient, expected, rtol=EPSILON[half], atol=float(torch.finfo(half).tiny))
        assert gradient.isfinite().all()
        assert gradient.count_nonzero() > 0.1 * gradient.numel()


@pytest.mark.parametrize("shape", [(150, 5003), (65, 3, 2049), (2, 40_001)])
@pytest.mark.parametrize("name", ["gaussian", "laplace", "negative_binomial"])
def test_gradients_summed_over_long_rows(name: str, shape: tuple[int, ...], target: Target) -> None:
    formula = LIKELIHOODS[name]
    recon_x, x = torch.rand(shape) + 0.5, torch.randint(0, 4, shape).float()
    others = [torch.rand(shape[-1]) + 0.5 for _ in formula.inputs[2:]]

    def loss_and_gradients(backend: str, dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.to(dtype).requires_grad_() for t in (recon_x, x, *others)]
        loss = run_likelihood(name, inputs, None, False, None, "sum", None, 1, backend, False)
        return [loss.detach(), *torch.autograd.grad(loss, [inputs[0], *inputs[2:]])]

    found = loss_and_gradients(target.backend, torch.float32)
    for mine, exact in zip(found, loss_and_gradients("reference", torch.float64), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=2e-5, atol=2e-5 * float(exact.abs().max()))
    if target.device == "cpu":
        with threads(1):
            alone = loss_and_gradients(target.backend, torch.float32)
        assert all(map(torch.equal, found, alone))


def test_fresh_memory_and_memory_in_use_are_written_with_the_same_numbers() -> None:
    shape = 5, 2_000_003  # 40 MB, which an allocator maps anew
    given, x = torch.randn(shape), torch.randn(shape)

    def step(inplace: bool) -> tuple[Tensor, Tensor]:
        recon_x = given.clone().requires_grad_()
        loss = functional.elbo_loss(recon_x + 0, x, None, None, likelihood="mse", kl=x.new_zeros(5), inplace=inplace)
        (gradient,) = torch.autograd.grad(loss, recon_x)
        return loss.detach(), gradient

    for fresh, used in zip(step(False), step(True), strict=True):
        assert torch.equal(fresh, used)
    torch.testing.assert_close(step(True)[1], 2 * (given - x) / 5)
