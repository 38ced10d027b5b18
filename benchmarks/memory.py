"""Memory and time of what takes less memory: ``inplace=True``, and a decoder's last layer together with the likelihood.

    python benchmarks/memory.py [--device cuda] [--threads 1] [--repeats 7]

Prints, for each way to do a step (the loss, and the gradients of the decoder's output or of its last layer), the most
memory that it takes beside what it returns, and its time: the smallest of some, taken in turn. On a CPU that is
processor time, all threads together, which a machine that is busy with something else changes little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from fusedvae import functional
from fusedvae.cli.bench.measuring import profiled

Step = Callable[[], tuple[Tensor, ...]]


def peak(step: Step, device: str) -> float:
    """Bytes that a step takes at most, beside what it returns."""
    returned: list[Tensor] = []
    most = profiled(lambda: returned.extend(step()), torch.device(device)).peak_bytes
    return most - sum(t.nbytes for t in returned)


def seconds(steps: dict[str, Step], device: str, repeats: int) -> dict[str, float]:
    """The shortest time of each step."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = clock()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            found[name].append(clock() - start)
    return {name: min(times[1:]) for name, times in found.items()}


def images(recon_logvar: Tensor) -> dict[str, Step]:
    """The bound of 16 images of 3x512x512, the gradients of the decoder's output and of the log-variance."""
    shape = (16, 3, 512, 512)
    x, mu, leaf = torch.rand(shape), torch.randn(16, 64), torch.randn(shape).requires_grad_()

    def step(inplace: bool) -> tuple[Tensor, ...]:
        recon_x = leaf + 0.0  # what a decoder gives: it is in memory in any case, and so returned
        loss = functional.elbo_loss(recon_x, x, mu, mu, recon_logvar, inplace=inplace)
        return recon_x.detach(), *torch.autograd.grad(loss, [recon_x, recon_logvar])[1:]

    return {"elbo_loss": lambda: step(False), "elbo_loss, inplace": lambda: step(True)}


def heads(batch: int, columns: int, features: int, is_packed: bool) -> dict[str, Step]:
    """A decoder's last layer and the bound, the gradients of the layer and of its input."""
    rows = (2 if is_packed else 1) * columns
    layer = [(torch.randn(s) * 0.05).requires_grad_() for s in ((batch, features), (rows, features), (rows,))]
    x, mu = torch.rand(batch, columns), torch.randn(batch, 10)
    kl = functional.kl_standard_normal(mu, mu, reduction="none")
    scale = None if is_packed else 0.0

    def apart() -> tuple[Tensor, ...]:
        return torch.autograd.grad(functional.elbo_loss(linear(*layer), x, None, None, scale, kl=kl), layer)

    def together() -> tuple[Tensor, ...]:
        return torch.autograd.grad(functional.linear_elbo(*layer, x, None, None, scale, kl=kl), layer)

    return {"linear, elbo_loss": apart, "linear_elbo": together}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with torch.device(options.device):
        cases = {
            "16x3x512x512, one log-variance": images(torch.zeros(1, requires_grad=True)),
            "16x3x512x512, a log-variance each": images(torch.zeros(16, 3, 512, 512, requires_grad=True)),
        }
        for sizes in ((128, 784, 400), (128, 2000, 128), (128, 20_000, 128), (512, 20_000, 128), (512, 20_000, 512)):
            for is_packed in (False, True):
                name = f"{sizes[0]}x{sizes[1]} of {sizes[2]} features" + (", a log-variance each" if is_packed else "")
                cases[name] = heads(*sizes, is_packed)
        print("| step | | MB beside what is returned | ms |\n| --- | --- | --- | --- |")
        for case, steps in cases.items():
            times = seconds(steps, options.device, options.repeats)
            for name, step in steps.items():
                memory = peak(step, options.device)
                print(f"| {case} | {name} | {memory / 1e6:.1f} | {times[name] * 1e3:.1f} |", flush=True)


if __name__ == "__main__":
    main()
