"""The CPU kernels against the goals that were set for them, on the shapes that these name.

    python benchmarks/cpu_goals.py [--threads 2] [--seconds 3] [--processes 5] [--json FILE]

Every case is one forward and backward pass in float32, timed as `fusedvae bench` does (which measures much more, on
shapes of real models). A ratio is that of the medians; shown is the median over several processes, and the lowest and
the highest: where the allocator happens to put things decides some of them by a third. The last line is about the
kernel alone: elbo_loss with its gradients, made in the forward pass, against PyTorch operations that read and write the
same bytes, in fresh memory too, and compute next to nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fusedvae
from fusedvae import functional
from fusedvae.cli.bench.contestants import Handwritten, handwritten_nll
from fusedvae.cli.bench.measuring import Contestant, interleaved
from fusedvae.cli.bench.statistics import summary

CPU = torch.device("cpu")
ROUNDS = (15, 2000)
TURN_SECONDS = 2e-2  # so long that the caches are as the contestant itself leaves them for nearly all of it


def eager_elbo(recon_x: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, recon_logvar: Tensor) -> Tensor:
    """The loss in the usual idiom."""
    return (handwritten_nll(recon_x, x, recon_logvar) + Handwritten(mu, logvar).kl(torch.sum)) / x.shape[0]


def eager_latent(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """The reparameterised sample and the KL in the usual idiom."""
    posterior = Handwritten(mu, logvar)
    return posterior.sample(), posterior.kl(lambda elements: elements.flatten(1).sum(1))


def competing(run: Callable, fused: Callable, eager: Callable) -> list[Contestant]:
    compiled = torch.compile(eager, dynamic=False)
    functions = {"fused": fused, "eager": eager, "compile": compiled}
    return [Contestant(name, lambda _, f=function: run(f)) for name, function in functions.items()]


def elbo_case(x_shape: tuple[int, ...], latent_shape: tuple[int, ...]) -> list[Contestant]:
    """elbo_loss of given decoder and encoder outputs."""
    recon_x, recon_logvar = (torch.randn(x_shape).requires_grad_() for _ in range(2))
    mu, logvar = (torch.randn(latent_shape).requires_grad_() for _ in range(2))
    x = torch.randn(x_shape)

    def run(loss: Callable[..., Tensor]) -> None:
        for t in (recon_x, recon_logvar, mu, logvar):
            t.grad = None
        loss(recon_x, x, mu, logvar, recon_logvar).backward()

    return competing(run, functional.elbo_loss, eager_elbo)


def latent_case(elements: int) -> list[Contestant]:
    """Sample and KL, and the gradients of both."""
    shape = (elements // 1024, 1024)
    mu, logvar = (torch.randn(shape).requires_grad_() for _ in range(2))
    grads = torch.randn(shape), torch.randn(shape[0])

    def run(latent: Callable[..., tuple[Tensor, Tensor]]) -> None:
        mu.grad = logvar.grad = None
        torch.autograd.backward(tuple(latent(mu, logvar)), grads)

    return competing(run, functional.latent, eager_latent)


def memory_case(elements: int = 1_572_864, sets: int = 4) -> list[Contestant]:
    """The kernel against moving its bytes: 3 reads and 2 writes an element, over more memory than a cache holds."""
    shape = (16, elements // 16)
    recon_x, recon_logvar, x = ([torch.randn(shape) for _ in range(sets)] for _ in range(3))
    leaves = [[t.detach().requires_grad_() for t in tensors] for tensors in (recon_x, recon_logvar)]
    mu, logvar = torch.zeros(16, 8), torch.zeros(16, 8)

    def fused(k: int) -> object:
        return functional.elbo_loss(leaves[0][k % sets], x[k % sets], mu, logvar, leaves[1][k % sets])

    def move(k: int) -> object:
        return torch.add(recon_x[k % sets], x[k % sets]), recon_logvar[k % sets].clone()

    return [Contestant("fused", fused), Contestant("move", move)]


CASES: dict[str, tuple[Callable[[], list[Contestant]], float, float]] = {
    # name: (contestants, goal against eager, goal against torch.compile)
    "elbo_loss 128x784, latent 32": (partial(elbo_case, (128, 784), (128, 32)), 3.5, 2.5),
    "elbo_loss 64x3x64x64, latent 128": (partial(elbo_case, (64, 3, 64, 64), (64, 128)), 7.0, 3.0),
    "elbo_loss 16x3x512x512, latent 4x64x64": (partial(elbo_case, (16, 3, 512, 512), (16, 4, 64, 64)), 7.0, 1.7),
    "latent 262,144": (partial(latent_case, 262_144), 3.0, 3.0),
    "latent 1,048,576": (partial(latent_case, 1_048_576), 3.0, 3.0),
    "elbo_loss 32x64, latent 8": (partial(elbo_case, (32, 64), (32, 8)), 1.6, 2.0),
}
MEMORY = "elbo_loss at 1.5 million elements"
MEMORY_GOAL = 1.25


def medians(contestants: list[Contestant], seconds: float) -> dict[str, float]:
    """Microseconds of each."""
    timings = interleaved(contestants, CPU, seconds=seconds, rounds=ROUNDS, turn=TURN_SECONDS)
    return {name: summary(times).median * 1e6 for name, times in timings.seconds.items()}


def measured(case: str, seconds: float) -> dict[str, float]:
    """Microseconds of each contestant in a case, or in the comparison with moving the bytes."""
    torch.compiler.reset()
    return medians(memory_case() if case == MEMORY else CASES[case][0](), seconds)


def measured_anew(case: str, args: argparse.Namespace) -> dict[str, float]:
    """The same in a process of its own."""
    options = [f"--threads={args.threads}", f"--seconds={args.seconds}", f"--measure={case}"]
    done = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def median_and_range(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each case in each process")
    parser.add_argument("--processes", type=int, default=5, help="how many measure each case, one after the other")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--measure", choices=[*CASES, MEMORY], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        print(json.dumps(measured(args.measure, args.seconds)))
        return 0
    environment = {
        "torch": torch.__version__,
        "threads": args.threads,
        "python": sys.version,
        "backend": fusedvae.backends()["native"].description,
    }
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    print(f"{'case':40}{'fused':>9}{'vs eager':>20}{'goal':>6}{'vs compile':>20}{'goal':>6}")
    record: dict[str, dict[str, object]] = {}
    for name in [*CASES, MEMORY]:
        if args.only not in name:
            continue
        times = [measured_anew(name, args) for _ in range(args.processes)]
        fused = statistics.median(took["fused"] for took in times)
        record[name] = {"microseconds": times}
        if name == MEMORY:
            ratios = median_and_range([took["fused"] / took["move"] for took in times])
            print(f"{name} takes {ratios} as long as moving its bytes (at most {MEMORY_GOAL}x)")
            continue
        eager, compiled = (
            median_and_range([took[rival] / took["fused"] for took in times]) for rival in ("eager", "compile")
        )
        _, eager_goal, compile_goal = CASES[name]
        goals = f"{eager:>20}{eager_goal:>5.1f}x{compiled:>20}{compile_goal:>5.1f}x"
        print(f"{name:40}{fused:>7.0f}us{goals}", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**environment, "cases": record}, file, indent=1)
            file.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
