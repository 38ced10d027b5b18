"""The CPU kernels against the goals that were set for them, on the shapes that these name.

    python benchmarks/cpu_goals.py [--threads 2] [--seconds 3] [--processes 5] [--json FILE]

Every case is one forward and backward pass, in float32 unless it says otherwise (values per sample: the forward pass
alone), timed as `fusedvae bench` does (which measures much more, on shapes of real models). A ratio is that of the
medians; shown is the median over several processes, and the lowest and the highest: where the allocator happens to put
things decides some of them by a third. "MISSED" stands behind a median that is not what the goal asks for. The last
lines are about costs that have a limit: elbo_loss with its gradients, made in the forward pass, against PyTorch
operations that read and write the same bytes, in fresh memory too, and compute next to nothing; and the noise of plain
PyTorch, which an install without a compiler draws, against torch.randn.

FUSEDVAE_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 in the environment measures what processors without AVX-512 run: the
second is PyTorch's own variable, which its operators and its compiler go by. `--compare FILE` reads what `--json` wrote
before a change, and exits with 1 if a ratio has become worse than its range was there.
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
from fusedvae.backend import philox
from fusedvae.cli.bench.contestants import Handwritten, compile_for_processor, handwritten_nll
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


def eager_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """The KL of each sample in the usual idiom."""
    return (0.5 * (mu * mu + logvar.exp() - 1 - logvar)).sum(1)


def eager_nll(recon_x: Tensor, x: Tensor) -> Tensor:
    """Half of the squared error of each sample."""
    return (0.5 * (recon_x - x) ** 2).sum(1)


def competing(run: Callable, fused: Callable, eager: Callable) -> list[Contestant]:
    functions = {"fused": fused, "eager": eager, "compile": compile_for_processor(eager)}
    return [Contestant(name, lambda _, f=function: run(f)) for name, function in functions.items()]


def elbo_case(
    x_shape: tuple[int, ...], latent_shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> list[Contestant]:
    """elbo_loss of given decoder and encoder outputs."""
    recon_x, recon_logvar = (torch.randn(x_shape, dtype=dtype).requires_grad_() for _ in range(2))
    mu, logvar = (torch.randn(latent_shape, dtype=dtype).requires_grad_() for _ in range(2))
    x = torch.randn(x_shape, dtype=dtype)

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


ROWS = 300_000
"""Samples so many and so short that what each costs besides its elements decides."""
PER_SAMPLE: dict[str, tuple[Callable, Callable]] = {
    "kl": (partial(functional.kl_standard_normal, reduction="none"), eager_kl),
    "nll": (partial(functional.gaussian_nll, reduction="none"), eager_nll),
    "latent": (functional.latent, eager_latent),
}


def rows_case(operation: str, columns: int) -> list[Contestant]:
    """Values per sample of many short ones."""
    first, second = torch.randn(ROWS, columns), torch.randn(ROWS, columns)
    fused, eager = PER_SAMPLE[operation]

    def run(function: Callable[..., object]) -> None:
        with torch.no_grad():
            function(first, second)

    return competing(run, fused, eager)


def noise_case(elements: int = 1 << 20) -> list[Contestant]:
    """The noise of plain PyTorch against torch.randn."""
    seed = torch.tensor(20140501)
    return [
        Contestant("fused", lambda _: philox.normal((elements,), seed, torch.float32)),
        Contestant("randn", lambda _: torch.randn(elements)),
    ]


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


LARGE: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    # name: (shape of x, shape of the latent)
    "128x784, latent 32": ((128, 784), (128, 32)),
    "64x3x64x64, latent 128": ((64, 3, 64, 64), (64, 128)),
    "16x3x512x512, latent 4x64x64": ((16, 3, 512, 512), (16, 4, 64, 64)),
}
LARGE_GOALS = [(5.0, 3.0), (9.0, 3.2), (12.0, 3.0)]
OTHER_DTYPES = (torch.float64, torch.bfloat16, torch.float16)

Goals = tuple[float, float]
"""At least how many times as long as the fused operation eager takes, and torch.compile."""

CASES: dict[str, tuple[Callable[[], list[Contestant]], Goals]] = {
    **{
        f"elbo_loss {name}": (partial(elbo_case, *shapes), goals)
        for (name, shapes), goals in zip(LARGE.items(), LARGE_GOALS, strict=True)
    },
    "latent 262,144": (partial(latent_case, 262_144), (4.0, 8.0)),
    "latent 1,048,576": (partial(latent_case, 1_048_576), (3.0, 3.0)),
    "elbo_loss 32x64, latent 8": (partial(elbo_case, (32, 64), (32, 8)), (3.2, 3.0)),
    **{
        f"{operation} a sample, {ROWS:,}x{columns}": (partial(rows_case, operation, columns), (1.5, 1.0))
        for operation in PER_SAMPLE
        for columns in (1, 3, 8)
    },
    **{
        f"elbo_loss {name}, {str(dtype).removeprefix('torch.')}": (partial(elbo_case, *shapes, dtype), (goals[0], 1.0))
        for dtype in OTHER_DTYPES
        for (name, shapes), goals in zip(LARGE.items(), LARGE_GOALS, strict=True)
    },
}

LIMITS: dict[str, tuple[Callable[[], list[Contestant]], str, float]] = {
    # name: (contestants, the one that is compared with, at most how many times as long as that)
    "elbo_loss at 1.5 million elements": (memory_case, "move", 1.25),
    "noise of plain PyTorch, 1,048,576": (noise_case, "randn", 4.0),
}


def medians(contestants: list[Contestant], seconds: float) -> dict[str, float]:
    """Microseconds of each."""
    timings = interleaved(contestants, CPU, seconds=seconds, rounds=ROUNDS, turn=TURN_SECONDS)
    return {name: summary(times).median * 1e6 for name, times in timings.seconds.items()}


def measured(case: str, seconds: float) -> dict[str, float]:
    """Microseconds of each contestant."""
    torch.compiler.reset()
    return medians((CASES[case] if case in CASES else LIMITS[case])[0](), seconds)


def measured_anew(case: str, args: argparse.Namespace) -> dict[str, float]:
    """The same in a process of its own."""
    options = [f"--threads={args.threads}", f"--seconds={args.seconds}", f"--measure={case}"]
    done = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


Times = list[dict[str, float]]
"""Microseconds of each contestant, by process."""


def ratios_of(case: str, times: Times) -> dict[str, list[float]]:
    """By rival, how many times as long as the fused operation it took; each the better, the larger."""
    rivals = ("eager", "compile") if case in CASES else (LIMITS[case][1],)
    return {rival: [took[rival] / took["fused"] for took in times] for rival in rivals}


def goals_of(case: str) -> dict[str, float]:
    """What the medians of these must be at least."""
    if case in CASES:
        return dict(zip(("eager", "compile"), CASES[case][1], strict=True))
    _, rival, limit = LIMITS[case]
    return {rival: 1 / limit}


def median_and_range(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"


def line(case: str, times: Times) -> str:
    """What was measured, beside the goals."""
    text = f"{case:42}{statistics.median(took['fused'] for took in times):>9.0f}us"
    goals = goals_of(case)
    for rival, ratios in ratios_of(case, times).items():
        verdict = "" if statistics.median(ratios) >= goals[rival] else "MISSED"
        text += f"  {rival} {median_and_range(ratios)}, goal {goals[rival]:.2f}x {verdict:6}"
    return text.rstrip()


def worse(case: str, before: Times, now: Times) -> list[str]:
    """The rivals against which the median has fallen below all that was measured before."""
    earlier = ratios_of(case, before)
    return [
        f"{case}: {rival} {statistics.median(ratios):.2f}x, was {min(earlier[rival]):.2f}-{max(earlier[rival]):.2f}x"
        for rival, ratios in ratios_of(case, now).items()
        if statistics.median(ratios) < min(earlier[rival])
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each case in each process")
    parser.add_argument("--processes", type=int, default=5, help="how many measure each case, one after the other")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--compare", metavar="FILE", help="of --json, from before a change")
    parser.add_argument("--measure", choices=[*CASES, *LIMITS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        print(json.dumps(measured(args.measure, args.seconds)))
        return 0
    before = {}
    if args.compare:
        with open(args.compare) as file:
            before = json.load(file)["cases"]
    environment = {
        "torch": torch.__version__,
        "threads": args.threads,
        "python": sys.version,
        "backend": fusedvae.backends()["native"].description,
        "rivals": torch.backends.cpu.get_cpu_capability(),
    }
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    record: dict[str, dict[str, Times]] = {}
    slower: list[str] = []
    for case in [*CASES, *LIMITS]:
        if args.only not in case:
            continue
        times = [measured_anew(case, args) for _ in range(args.processes)]
        record[case] = {"microseconds": times}
        print(line(case, times), flush=True)
        if case in before:
            slower += worse(case, before[case]["microseconds"], times)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**environment, "cases": record}, file, indent=1)
            file.write("\n")
    print("\n".join(f"slower than before: {what}" for what in slower), end="\n" if slower else "")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
