"""DTensors: what processes compute of their rows is what one computes of all."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import results_of_processes
from torch import Tensor

from fusedvae import functional
from fusedvae.backend import evaluation, resolve

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="a PyTorch without torch.distributed")

BATCH = 7  # of which the first of two processes has four rows
Shared = Callable[..., Tensor]


def _operands(share: Shared) -> dict[str, Tensor]:
    """Those of all cases; ``share(tensor, split)`` makes one of all rows, or of what has none."""
    torch.manual_seed(0)
    made = {name: share(torch.randn(BATCH, 6)) for name in ("recon_x", "x", "spread")}
    made |= {name: share(torch.randn(BATCH, 4)) for name in ("mu", "logvar")}
    made["packed"] = share(torch.randn(BATCH, 8))
    made["kl"] = share(torch.rand(BATCH))
    made["features"] = share(torch.randn(6), split=False)
    made["prior"] = share(torch.randn(4), split=False)
    made["scale"] = share(torch.randn(1), split=False)
    made["weight"] = share((torch.rand(BATCH, 1) > 0.4).float()).detach()
    made["beta"] = share(torch.rand(()), split=False)
    made["theta"] = share(torch.rand(6) + 0.5, split=False)
    made["counts"] = share(torch.randint(0, 5, (BATCH, 6)).float()).detach()
    made["rates"] = share(torch.rand(BATCH, 6) + 0.5)
    return made


def _elbo(t: dict[str, Tensor], **options: Any) -> Tensor:
    return functional.elbo_loss(t["recon_x"], t["x"], t["mu"], t["logvar"], **options)


def _latent(t: dict[str, Tensor], *prior: Tensor, **options: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(7 + dist.get_rank())  # the noise is the first process's
    return functional.latent(t["mu"], t["logvar"], *prior, **options)


CASES: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "elbo": _elbo,
    "elbo, mean and sum": lambda t: _elbo(t, reduction=("mean", "sum"), beta=0.7),
    "elbo, a sample": lambda t: _elbo(t, reduction="none", beta=0.7),
    "elbo, terms": lambda t: tuple(_elbo(t, reduction=("sum", "mean"), beta=t["beta"], return_terms=True)),
    "elbo, weighted": lambda t: _elbo(t, reduction="weighted_mean", weight=t["weight"], latent_weight=t["weight"]),
    "elbo, learned scale": lambda t: _elbo(t, recon_logvar=t["scale"], full=True, grad_scale=3.0),
    "elbo, prior": lambda t: _elbo(t, prior_mu=t["prior"], prior_logvar=0.3, likelihood="laplace"),
    "elbo, of a divergence": lambda t: functional.elbo_loss(t["recon_x"], t["x"], None, None, kl=t["kl"], beta=0.5),
    "gaussian": lambda t: functional.gaussian_nll(t["recon_x"], t["x"], t["features"], reduction="mean"),
    "gaussian, an element": lambda t: functional.gaussian_nll(
        t["recon_x"], t["x"], t["spread"], reduction="none", dim=(), clamp=(-1, 1)
    ),
    "negative binomial": lambda t: functional.negative_binomial_nll(t["rates"], t["counts"], t["theta"]),
    "kl, packed": lambda t: functional.kl_standard_normal(t["packed"], None, reduction="sum"),
    "kl, prior": lambda t: functional.kl_normal(t["mu"], t["logvar"], t["prior"], t["prior"], balance=0.2),
    "latent": _latent,
    "latent, at the sample": lambda t: _latent(t, t["prior"], t["prior"], estimator="sample", offset=3),
    "latent, an element": lambda t: _latent(t, dim=()),
    # By the reference's formulas:
    "latent, samples": lambda t: _latent(t, samples=3),
    "latent, generators": lambda t: _latent(t, generator=[torch.Generator().manual_seed(k) for k in range(BATCH)]),
    "elbo, learned weight": lambda t: _elbo(t, reduction="weighted_mean", weight=t["spread"].exp()),
    "kl, over the batch": lambda t: functional.kl_standard_normal(t["mu"], t["logvar"], reduction="none", dim=(0, 1)),
}
BY_REFERENCE = ("latent, samples", "elbo, learned weight", "kl, over the batch")


def _computed(case: Callable[[dict[str, Tensor]], Any], operands: dict[str, Tensor]) -> list[Tensor | None]:
    """The values of a case, and the gradients of all operands."""
    found = case(operands)
    values = list(found) if isinstance(found, tuple) else [found]
    loss = sum((value * value).sum() for value in values)
    wanted = [t for t in operands.values() if t.requires_grad]
    return [*values, *torch.autograd.grad(loss, wanted, allow_unused=True)]


def _differences() -> list[str]:
    """All that is wrong."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    plain = _operands(lambda tensor, split=True: tensor.requires_grad_())
    ways = {
        "rows": lambda split: [Shard(0) if split else Replicate()],
        "whole": lambda split: [Replicate()],
        "features": lambda split: [Shard(1) if split else Replicate()],
    }
    wrong, formulas = [], []
    has_kernels = resolve("cpu") != "reference"
    for name, computes in (("objective", evaluation.objective), ("latent", evaluation.latent)):
        setattr(evaluation, name, lambda *given, computes=computes: formulas.append(given) or computes(*given))
    for way, placements in ways.items():
        cases = {name: CASES[name] for name in ("elbo", "latent")} if way == "features" else CASES

        def share(tensor: Tensor, split: bool = True) -> Tensor:
            where = placements(split and (tensor.dim() > 1 or way != "features"))  # noqa: B023
            return distribute_tensor(tensor, mesh, where).requires_grad_()

        for name, case in cases.items():
            try:
                formulas.clear()
                found = _computed(case, _operands(share))
                is_by_reference = way == "features" or name in BY_REFERENCE
                if bool(formulas) != (is_by_reference or not has_kernels):
                    wrong.append(f"{way}, {name}: formulas {len(formulas)} times")
                expected = _computed(case, plain)
                whole = [f.full_tensor() if isinstance(f, DTensor) else f for f in found]  # all, lest the other waits
                for k, (f, e) in enumerate(zip(whole, expected, strict=True)):
                    if dist.get_rank() == 0 or "latent" not in name:
                        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5, msg=lambda m, k=k: f"{k}: {m}")
            except Exception as error:
                wrong.append(f"{way}, {name}: {error}\n{traceback.format_exc()[-600:]}")
    share_rows = lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)])  # noqa: E731
    try:
        functional.kl_standard_normal(share_rows(torch.randn(4, 2)), torch.randn(4, 2))
        wrong.append("plain tensors are taken")
    except (ValueError, RuntimeError) as error:  # RuntimeError: of PyTorch's own operations
        if has_kernels and "expected DTensors, as others are, got a plain tensor of shape (4, 2)" not in str(error):
            wrong.append(str(error))
    mu, logvar = (share_rows(t.detach()).requires_grad_() for t in (plain["mu"], plain["logvar"]))
    several = functional.reparameterize(mu, logvar, samples=3)
    if several.placements != (Shard(1),):  # type: ignore[attr-defined]
        wrong.append(f"samples are {several.placements}")  # type: ignore[attr-defined]
    total = functional.kl_standard_normal(mu, logvar)
    if has_kernels and not total.placements[0].is_partial():
        wrong.append(f"a total is {total.placements}")
    total.backward()
    functional.kl_standard_normal(plain["mu"], plain["logvar"]).backward()
    for found, expected in ((mu.grad, plain["mu"].grad), (logvar.grad, plain["logvar"].grad)):
        assert found.placements == (Shard(0),)
        torch.testing.assert_close(found.full_tensor(), expected)
    return wrong


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over files")
def test_processes_compute_what_one_does(tmp_path: Path) -> None:
    found = results_of_processes(2, tmp_path / "store", _differences)
    assert found == [[], []], "\n".join(found[0] + found[1])
