"""How fast the CPU kernels are against eager PyTorch and torch.compile, and how near to the memory's own speed.

    python benchmarks/cpu_speed.py [--threads 2] [--seconds 3] [--json FILE]

Every case is one forward and backward pass in float32. The contestants take turns (A B C A B C ...) in one process;
a figure is the ratio of the medians. The eager versions are what people write: see `eager_elbo`, `eager_latent`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fusedvae
from fusedvae import functional

Step = Callable[[], object]


def eager_elbo(recon_x: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, recon_logvar: Tensor) -> Tensor:
    """The loss in the usual idiom."""
    nll = 0.5 * (recon_logvar + (recon_x - x).pow(2) * torch.exp(-recon_logvar)).sum()
    kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum()
    return (nll + kl) / x.shape[0]


def eager_latent(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """The reparameterised sample and the KL in the usual idiom."""
    z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
    kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).flatten(1).sum(1)
    return z, kl


def fused_latent(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    z, kl = functional.latent(mu, logvar)
    return z, kl


def elbo_case(x_shape: tuple[int, ...], latent_shape: tuple[int, ...]) -> dict[str, Step]:
    """The contestants of an elbo_loss case: forward and backward from given decoder and encoder outputs."""
    recon_x, recon_logvar = (torch.randn(x_shape).requires_grad_() for _ in range(2))
    mu, logvar = (torch.randn(latent_shape).requires_grad_() for _ in range(2))
    x = torch.randn(x_shape)
    operands = [recon_x, recon_logvar, mu, logvar]

    def step(loss: Callable[..., Tensor]) -> None:
        for t in operands:
            t.grad = None
        loss(recon_x, x, mu, logvar, recon_logvar).backward()

    return {
        "fused": partial(step, functional.elbo_loss),
        "eager": partial(step, eager_elbo),
        "compile": partial(step, torch.compile(eager_elbo, dynamic=False)),
    }


def latent_case(elements: int) -> dict[str, Step]:
    """The contestants of a latent case: sample, KL, and the gradients of both."""
    shape = (elements // 1024, 1024)
    mu, logvar = (torch.randn(shape).requires_grad_() for _ in range(2))
    grad_z, grad_kl = torch.randn(shape), torch.randn(shape[0])

    def step(latent: Callable[..., tuple[Tensor, Tensor]]) -> None:
        mu.grad = logvar.grad = None
        torch.autograd.backward(latent(mu, logvar), (grad_z, grad_kl))

    return {
        "fused": partial(step, fused_latent),
        "eager": partial(step, eager_latent),
        "compile": partial(step, torch.compile(eager_latent, dynamic=False)),
    }


CASES: dict[str, tuple[Callable[[], dict[str, Step]], float, float]] = {
    # name: (contestants, goal against eager, goal against torch.compile)
    "elbo_loss 128x784, latent 32": (partial(elbo_case, (128, 784), (128, 32)), 3.5, 2.5),
    "elbo_loss 64x3x64x64, latent 128": (partial(elbo_case, (64, 3, 64, 64), (64, 128)), 7.0, 3.0),
    "elbo_loss 16x3x512x512, latent 4x64x64": (partial(elbo_case, (16, 3, 512, 512), (16, 4, 64, 64)), 7.0, 1.7),
    "latent 262,144": (partial(latent_case, 262_144), 3.0, 3.0),
    "latent 1,048,576": (partial(latent_case, 1_048_576), 3.0, 3.0),
    "elbo_loss 32x64, latent 8": (partial(elbo_case, (32, 64), (32, 8)), 1.6, 2.0),
}


def interleaved(steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """Times of each step, in microseconds, taken by turns for about `seconds` after a warm-up."""
    for step in steps.values():
        for _ in range(3):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times["fused"]) < 7:
        for name, step in steps.items():
            repeats = 1 if not times[name] or times[name][0] > 2000 else 20
            begin = time.perf_counter()
            for _ in range(repeats):
                step()
            times[name].append((time.perf_counter() - begin) / repeats * 1e6)
    return times


def memory_floor(seconds: float) -> float:
    """elbo_loss at 1.5 million elements over a torch operation that moves the same bytes and computes nothing."""
    n = 1_572_864
    recon_x, recon_logvar = (torch.randn(16, n // 16).requires_grad_() for _ in range(2))
    x, mu, logvar = torch.randn(16, n // 16), torch.zeros(16, 8), torch.zeros(16, 8)

    def fused() -> None:
        recon_x.grad = recon_logvar.grad = None
        functional.elbo_loss(recon_x, x, mu, logvar, recon_logvar).backward()

    moved = [recon_x.detach(), recon_logvar.detach()]
    grads: list[Tensor] = []

    def copy() -> None:  # reads 3N, writes 2N in fresh memory, as the loss does
        grads.clear()
        grads.append(torch.add(moved[0], x))
        grads.append(moved[1].clone())

    times = interleaved({"fused": fused, "copy": copy}, seconds)
    return statistics.median(times["fused"]) / statistics.median(times["copy"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each case")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    backend = fusedvae.backends().get("native")
    print(f"torch {torch.__version__}, {args.threads} threads, float32; {backend}, {platform.machine()}")
    print(f"{'case':42}{'fused':>11}{'vs eager':>10}{'(goal)':>8}{'vs compile':>12}{'(goal)':>8}")
    record = {}
    for name, (case, goal_eager, goal_compile) in CASES.items():
        if args.only not in name:
            continue
        torch._dynamo.reset()
        medians = {k: statistics.median(v) for k, v in interleaved(case(), args.seconds).items()}
        eager, compiled = medians["eager"] / medians["fused"], medians["compile"] / medians["fused"]
        record[name] = {"microseconds": medians, "vs_eager": eager, "vs_compile": compiled}
        print(
            f"{name:42}{medians['fused']:>9.0f}us{eager:>9.2f}x{goal_eager:>7.1f}x{compiled:>11.2f}x{goal_compile:>7.1f}x",
            flush=True,
        )
    if not args.only:
        floor = memory_floor(args.seconds)
        record["memory floor"] = {"ratio": floor}
        print(f"elbo_loss at 1.5 million elements takes {floor:.2f}x the time of moving its bytes (goal: 1.25x)")
    if args.json:
        figures = {"torch": torch.__version__, "threads": args.threads, "python": sys.version, "cases": record}
        with open(args.json, "w") as file:
            json.dump(figures, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
