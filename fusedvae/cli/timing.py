"""How long a training step takes with the fused kernels and with plain PyTorch."""

from __future__ import annotations

import copy
import os
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import functional
from ..backend import resolve, use_backend
from ..vae import VAE
from .bench.measuring import Contestant, interleaved
from .settings import Settings

SECONDS = 0.5
"""Time to spend on each comparison: a run ends with two of them, whether anyone asked how fast it was or not."""
ROUNDS = (3, 200)
"""At least and at most so many runs of each side."""


class Comparison(NamedTuple):
    """Median seconds of the same work done in two ways."""

    fused: float
    reference: float

    def __str__(self) -> str:
        return (
            f"{1e3 * self.fused:.3g} ms fused, {1e3 * self.reference:.3g} ms reference "
            f"({self.reference / self.fused:.2f}x)"
        )


class StepTimes(NamedTuple):
    """A whole training step, and the part of it that is not the networks'."""

    step: Comparison
    objective: Comparison
    """Sampling, KL and NLL, forward and backward, on given outputs of the networks."""


def step_times(model: VAE, x: Tensor, settings: Settings, condition: Tensor | None = None) -> StepTimes | None:
    """Time steps on the batch ``x`` with a copy of ``model``; None where the fused kernels are not in use.

    The reference is what people write: plain PyTorch with noise from ``torch.randn``.
    """
    if resolve(x.device.type) == "reference":
        return None
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0, fused=True)
    how: dict[str, Any] = {"samples": settings.samples, "bound": settings.bound}
    with settings.autocast():
        out = model(x, condition, **how)

    def noise() -> Tensor:
        return torch.randn_like(out.z)

    def step(noise: Tensor | None) -> None:
        optimizer.zero_grad(set_to_none=True)
        with settings.autocast():
            loss = model(x, condition, **how, noise=noise).loss(x)
        loss.backward()
        optimizer.step()

    def fused_step() -> None:
        step(None)

    def reference_step() -> None:
        with use_backend("reference"):
            step(noise())

    operands = (out.mu, out.logvar, out.recon_x, out.recon_logvar)
    mu, logvar, recon_x, recon_logvar = (o.detach().requires_grad_(o.requires_grad) for o in operands)
    # Without the graph, which has all that the networks remember, and would make the steps take twice their memory.
    detached: dict[str, Any] = {name: o.detach() for name, o in out._asdict().items() if isinstance(o, Tensor)}
    out = out._replace(**detached)
    del operands
    # A log-variance that is fixed takes no gradient.
    leaves = [operand for operand in (mu, logvar, recon_x, recon_logvar) if operand.requires_grad]
    ones = [torch.ones((), device=x.device), torch.ones_like(out.z)]
    several = out.z.dim() > out.mu.dim()

    def objective(noise: Tensor | None) -> None:
        z, kl = functional.latent(
            mu,
            logvar,
            samples=settings.samples if several else None,
            estimator="sample" if settings.bound == "iwae" else "analytic",
            noise=noise,
        )
        loss = out._replace(recon_x=recon_x, recon_logvar=recon_logvar, z=z, kl=kl).loss(x)
        torch.autograd.grad([loss, z], leaves, [ones[0].to(loss.dtype), ones[1]])

    def fused_objective() -> None:
        objective(None)

    def reference_objective() -> None:
        with use_backend("reference"):
            objective(noise())

    return StepTimes(
        _compare(fused_step, reference_step, x.device),
        _compare(fused_objective, reference_objective, x.device),
    )


def waiting_processes() -> float:
    """How many more threads have wanted to run in the last minute than there are processors: with one or more, timings
    say as much about these as about the code. 0 where the system does not count them."""
    return max(0.0, os.getloadavg()[0] - (os.cpu_count() or 1)) if hasattr(os, "getloadavg") else 0.0


def _compare(fused: Callable[[], None], reference: Callable[[], None], device: torch.device) -> Comparison:
    """Medians of runs that take turns: what else the machine does falls on both alike."""
    sides = [Contestant("fused", lambda _: fused()), Contestant("reference", lambda _: reference())]
    times = interleaved(sides, device, seconds=SECONDS, rounds=ROUNDS).seconds
    return Comparison(statistics.median(times["fused"]), statistics.median(times["reference"]))
