"""Everything there is to find out on a machine with a GPU, in one command of at most eight minutes, without a network.

    OUT=results python benchmarks/gpu_check.py [--steps build,tests,...] [--minutes 8]

Builds the extension for the device's own architecture, runs the tests marked `gpu`, looks for memory errors and races
with compute-sanitizer, times every operation against eager PyTorch and torch.compile, counts launches, captures CUDA
graphs (of first calls and of whole training steps, too), runs on two streams at once and under torch.compile's
"reduce-overhead", scales gradients, takes values a sample, and reads the memory throughput of the kernels with ncu.

Each step is a process of its own with a time limit: one that fails, hangs or crashes does not stop the others. The
folder $OUT (a temporary one without it) gets, as soon as each is known: STEP.log, STEP.json, and the whole in
gpu_check.json and gpu_check.txt. The exit status is 0 if every step that could run succeeded. The text ends with the
goals, and whether each was reached: a goal that was missed is no failure of the step that found it out.

Operations, contestants, checks and timers are those of `fusedvae bench`.

With --device cpu the steps that need no GPU run, on small problems: a rehearsal of this script.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.util
import io
import itertools
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent

Step = Callable[[], object]


# --- what the benchmark has -----------------------------------------------------------------------------------------

# The package is imported in the processes of the steps alone: one of them builds it.

DTYPES = ("float32", "bfloat16")
RIVALS = ("eager", "compile", "copy")
CAPTURED = ", captured"
"""After a backend's name: as a CUDA graph, whose time is the GPU's alone."""
SECONDS_OF_A_CASE = 2.0
"""What checking and timing a case takes at most, compiled code aside."""
SECONDS_TO_COMPILE = 15.0
"""What torch.compile takes at most for one."""


def kernel_backends(device: str) -> list[str]:
    from fusedvae.backend import NAMES, unavailable

    return [name for name in NAMES if name != "reference" and unavailable(name, device) is None]


def operations(device: str) -> list[str]:
    """The benchmark's, but for whole training steps: on a GPU, where minutes are few, those that it has by default."""
    from fusedvae.cli.bench import cases

    return [name for name in (cases.OPERATIONS if device == "cpu" else cases.STANDARD) if name != "step"]


def passes(operation: str, shape: tuple[int, int], dtype: str, backend: str, device: str) -> Step:
    """What makes a forward and a backward pass of an operation, on operands of this shape, and gives the gradients."""
    from fusedvae.cli.bench.cases import PRESETS, Case, operands
    from fusedvae.cli.bench.contestants import fused

    name = "x".join(map(str, shape))
    latent = (shape[0], max(shape[1] // 16, 1))
    PRESETS[name] = PRESETS["2^8"]._replace(latent=shape, x=shape, objective_latent=latent)
    given = operands(Case(name, operation, dtype), torch.Generator(device).manual_seed(0))
    function = fused(backend, operation)
    return lambda: given.gradients(function(*given.arguments))


def batches(elements: int) -> tuple[int, int]:
    """The shape of so many elements."""
    return 64, elements // 64


def seconds_of_timing(device: str) -> float:
    """For all that take turns with each other."""
    return 0.02 if device == "cpu" else 0.3


def in_float64(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies, which want the gradients that the tensors want."""
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def require_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """What was found is what was expected in float64, to the benchmark's tolerance: of an element and of the root mean
    square of all, for those that are small because terms cancel."""
    from fusedvae.cli.bench.checking import TOLERANCES

    tolerance = TOLERANCES["float32"]
    for number, (ours, exact) in enumerate(zip(found, expected, strict=True)):
        size = exact.detach().square().mean().sqrt().item()
        torch.testing.assert_close(
            ours.detach().double(),
            exact.detach(),
            rtol=tolerance,
            atol=tolerance * size,
            msg=lambda message, number=number: f"result {number}: {' '.join(message.split())}",
        )


def recorded(step: Callable[[], list[Tensor]], device: str, *, warm_ups: int = 3) -> Callable[[], list[Tensor]]:
    """What does a step again, as a captured CUDA graph if on a GPU, and gives its results: there, the same tensors.

    It keeps the step, and so the tensors that the graph reads and writes.
    """
    if device == "cpu":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_ups):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay(kept: object = step) -> list[Tensor]:
        graph.replay()
        return results

    return replay


# --- the parts of a step that run in a process of their own -------------------------------------------------------


class Report:
    """What a step has found so far, in a file that is whole at any time."""

    def __init__(self, path: Path) -> None:
        self.path, self.content = path, {}
        self.failures: list[str] = []

    def add(self, key: str, value: object) -> None:
        self.content[key] = value
        partial_file = self.path.with_suffix(".part")
        partial_file.write_text(json.dumps(self.content, indent=1))
        partial_file.replace(self.path)

    def attempt(self, key: str, check: Callable[[], object]) -> bool:
        """Whether a check raises nothing: what it gives is reported, or that it failed, and the step goes on."""
        try:
            self.add(key, check())
            return True
        except Exception as error:  # whatever it may be: the other checks are to run
            traceback.print_exc(limit=-4)
            first_line = next(iter(str(error).strip().splitlines()), "")
            self.failures.append(f"{key}: {type(error).__name__}: {first_line}")
            self.add("failures", self.failures)
            return False


def timed(
    report: Report, operation: str, dtype: str, exponent: int, rivals: list[str], device: str, deadline: float
) -> list[str]:
    """Report an operation as `fusedvae bench` checks and times it, forward and backward, on a GPU as a CUDA graph too:
    a host that launches slowly would pass for the kernels. Name the backends that are wrong or fail."""
    from fusedvae.cli.bench.contestants import usual_idiom
    from fusedvae.cli.bench.suite import Settings, measure, new_result

    backends = kernel_backends(device)
    names = {f"{rival}/{usual_idiom(operation)}": rival for rival in rivals}
    names |= {f"fusedvae/{name}": name for name in backends}
    if device == "cuda":
        names |= {f"fusedvae/{name}+graph": f"{name}{CAPTURED}" for name in backends}
    settings = Settings(
        presets=[f"2^{exponent}"],
        operations=[operation],
        dtypes=[dtype],
        memory_formats=["contiguous"],
        directions=["both"],
        contestants=list(names),
        device=device,
        threads=torch.get_num_threads(),
        seconds=seconds_of_timing(device),
        seed=0,
    )
    result = new_result(settings, "", {})
    if not measure(settings, result, stop=lambda: time.time() > deadline - SECONDS_OF_A_CASE):
        sys.exit(f"no time was left from {operation} {dtype} 2^{exponent} on")
    (entry,) = result["cases"]
    found = {names[c["name"]]: c for c in entry["contestants"]}
    times = {name: c["seconds"]["median"] * 1e6 for name, c in found.items() if c["status"] == "ok"}
    problems = {name: c["reason"] for name, c in found.items() if c["status"] != "ok"}
    if "copy_seconds" in entry:
        times["copy"] = entry["copy_seconds"] * 1e6
    if entry["status"] == "skipped":
        problems["all"] = entry["reason"]
    case = {"operation": operation, "dtype": dtype, "elements": entry["elements"], "microseconds": times}
    report.add(f"{operation} {dtype} 2^{exponent}", {**case, "problems": problems})
    return [f"{operation} {dtype} 2^{exponent}, {name}" for name in backends if name in problems]


def speed(report: Report, device: str, deadline: float) -> None:
    """Every operation against eager PyTorch, torch.compile and a copy of the same bytes: first those with a goal."""
    wrong = []
    sizes = [14] if device == "cpu" else [26, 20]
    cases = list(itertools.product(sizes, DTYPES, operations(device)))
    rivals_of_goals: dict[str, set[str]] = {}
    for goal in GOALS:
        rivals_of_goals.setdefault(goal.case, set()).add(goal.rival)

    def name_of(case: tuple[int, str, str]) -> str:
        return f"{case[2]} {case[1]} 2^{case[0]}"

    cases.sort(key=lambda case: name_of(case) not in rivals_of_goals)
    for done, (exponent, dtype, operation) in enumerate(cases):
        # Compiling is the longest part by far, and all that can be left out, where no goal asks for it.
        is_asked = "compile" in rivals_of_goals.get(name_of(cases[done]), ())
        others = SECONDS_TO_COMPILE + SECONDS_OF_A_CASE * (len(cases) - done)
        compiles = device != "cpu" and (is_asked or time.time() < deadline - others)
        rivals = ["eager", "compile"] if compiles else ["eager"]
        wrong += timed(report, operation, dtype, exponent, rivals, device, deadline)
    if wrong:
        sys.exit(f"wrong or failed: {'; '.join(wrong)}")


def exercise(report: Report, device: str, deadline: float, backends: Sequence[str] = ()) -> None:
    """Every operation once on small odd problems, in every dtype."""
    from fusedvae.backend.reference import LIKELIHOODS
    from fusedvae.functional.forms import as_written
    from fusedvae.functional.likelihoods import run_likelihood

    def uniform(dtype: str, *shape: int) -> Tensor:  # what is a probability and a standard deviation, too
        return torch.empty(shape, device=device).uniform_(0.1, 0.9).to(getattr(torch, dtype)).requires_grad_()

    for backend, dtype in itertools.product(backends or kernel_backends(device), ("float64", "float16", *DTYPES)):
        for operation, shape in itertools.product(operations(device), ((3, 1), (2, 1023), (5, 64 * 131))):
            passes(operation, shape, dtype, backend, device)()
        for scale, (name, formula) in itertools.product(((5, 1, 1), (9,), (3, 1, 7, 9), ()), LIKELIHOODS.items()):
            shapes = [(3, 5, 7, 9), (3, 5, 7, 9), scale, (3, 1, 1, 1)]
            inputs = tuple([uniform(dtype, *shape) for shape in shapes[: len(formula.inputs)]])
            for form, reduction in itertools.product(
                formula.forms if formula.scales else [None], ("batchmean", "none")
            ):
                written = as_written(form, None, 0.0)
                nll = run_likelihood(name, inputs, written, False, None, reduction, None, 1, backend)
                torch.autograd.grad(nll.sum(), inputs)
        report.add(f"{backend} torch.{dtype}", "done")


def exercise_native(report: Report, device: str, deadline: float) -> None:
    """What the sanitizers watch. Under them Triton compiles for minutes; tests/ptx finds what they would in it."""
    exercise(report, device, deadline, ["native"])


def large(report: Report, device: str, deadline: float) -> None:
    """Every operation once on a large problem: what the profiler watches."""
    for operation, dtype in itertools.product(operations(device), DTYPES):
        passes(operation, batches(2**25), dtype, "native", device)()
        report.add(f"{operation} {dtype}", "done")


def training_step(backend: str, device: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A whole ELBO, sample included, from the encoder's and the decoder's outputs; and what it is a function of."""
    from fusedvae import functional

    mu, logvar = (torch.randn(64, 128, device=device).requires_grad_() for _ in range(2))
    recon_x, recon_logvar = (torch.randn(64, 12288, device=device).requires_grad_() for _ in range(2))
    x = torch.randn(64, 12288, device=device)

    def loss() -> Tensor:
        z, kl = functional.latent(mu, logvar, backend=backend)
        loss = functional.elbo_loss(recon_x, x, None, None, recon_logvar, kl=kl, backend=backend)
        return loss + 0 * z.detach()[0, 0]  # the decoder would be between

    return loss, [mu, logvar, recon_x, recon_logvar]


def launches(report: Report, device: str, deadline: float) -> None:
    """The kernels that each pass launches, and how often the host waits for the device."""
    from torch.profiler import ProfilerActivity, profile

    def kernels_of(step: Step) -> dict[str, object]:
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            step()
        events = profiler.events()
        on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        waits = Counter(e.name for e in events if "Synchronize" in e.name or e.name == "cudaMemcpy")
        waits["cudaDeviceSynchronize"] -= 1  # the profiler's own
        kernels = [{"name": e.name[:120], "microseconds": e.time_range.elapsed_us()} for e in on_device]
        return {"launches": len(kernels), "kernels": kernels, "waits": dict(+waits)}

    for backend in kernel_backends(device):
        cases = {name: passes(name, batches(2**20), "float32", backend, device) for name in operations(device)}
        loss, inputs = training_step(backend, device)
        cases["training step"] = lambda loss=loss, inputs=inputs: torch.autograd.grad(loss(), inputs)
        for name, step in cases.items():
            for _ in range(3):
                step()
            report.add(f"{name}, {backend}", kernels_of(step))


def graphs(report: Report, device: str, deadline: float) -> None:
    """CUDA graphs: fresh noise at each replay, which follows torch's generator, and the right gradients."""
    from fusedvae import functional

    for backend in kernel_backends(device):
        mu, logvar = (torch.randn(64, 129, device=device).requires_grad_() for _ in range(2))
        recon_x = torch.randn(64, 1023, device=device).requires_grad_()
        x, weight, beta = torch.randn(64, 1023, device=device), torch.randn(64, 129, device=device), torch.tensor(0.5)
        beta = beta.to(device)

        def step(backend=backend, mu=mu, logvar=logvar, recon_x=recon_x, x=x, weight=weight, beta=beta):
            z, kl = functional.latent(mu, logvar, backend=backend)
            loss = functional.elbo_loss(recon_x, x, None, None, 0.0, kl=kl, beta=beta, backend=backend)
            return [z, loss, *torch.autograd.grad(loss + (z * weight).sum(), [mu, logvar, recon_x])]

        replay = recorded(step, device)

        def replayed(seed: int, replay=replay) -> list[Tensor]:
            torch.manual_seed(seed)
            return [t.clone() for t in replay()]

        first, again = replayed(1), replayed(1)
        assert not (replay()[0] == again[0]).any(), "the noise of the second replay is that of the first"
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "the seed does not give the noise"

        with torch.no_grad():  # new values in the captured tensors
            mu.mul_(0.5)
            recon_x.add_(1)
            beta.fill_(0.25)
        z, loss, d_mu, d_logvar, d_recon = (t.double() for t in replayed(2))
        m, v = mu.detach().double(), logvar.detach().double()
        noisy = z - m
        kl = (m**2 + torch.expm1(v) - v).sum() / 2
        expected = {
            "loss": (loss, ((recon_x - x).detach().double() ** 2).sum() / 2 / 64 + 0.25 * kl / 64),
            "d mu": (d_mu, weight + 0.25 * m / 64),
            "d logvar": (d_logvar, weight * noisy / 2 + 0.25 * torch.expm1(v) / 2 / 64),
            "d recon_x": (d_recon, (recon_x - x).detach().double() / 64),
        }
        for what, (found, wanted) in expected.items():
            torch.testing.assert_close(found, wanted.double(), rtol=1e-4, atol=1e-5, msg=lambda m, w=what: f"{w}: {m}")
        report.add(backend, "fresh noise, right gradients")


def streams(report: Report, device: str, deadline: float) -> None:
    """Two streams at once give, bit for bit, what each gives alone."""
    for backend in kernel_backends(device):
        steps = [passes("elbo", batches(elements), "float32", backend, device) for elements in (2**20, 2**18 + 64)]
        alone = [step() for step in steps]
        torch.cuda.synchronize()
        side = [torch.cuda.Stream() for _ in steps]
        for _ in range(100):
            found = []
            for stream, step in zip(side, steps, strict=True):
                with torch.cuda.stream(stream):
                    found.append(step())
            torch.cuda.synchronize()
            for ours, expected in zip(found, alone, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True)), backend
        report.add(backend, "bitwise the same, 100 times")


def first_calls(report: Report, device: str, deadline: float) -> None:
    """First calls inside the capture of a CUDA graph, replayed with other values: the first of the process, for which
    kernels have to be loaded, and the first of a shape, for which the call has to be worked out."""
    from fusedvae import functional

    def bound(backend: str, *operands: Tensor) -> list[Tensor]:
        *others, beta = operands
        loss = functional.elbo_loss(*others, beta=beta, backend=backend)
        return [loss, *torch.autograd.grad(loss, [t for t in operands if t.requires_grad])]

    def latent(backend: str, mu: Tensor, logvar: Tensor, d_z: Tensor, d_kl: Tensor) -> list[Tensor]:
        outputs = functional.latent(mu, logvar, backend=backend)
        return [*outputs, *torch.autograd.grad(outputs, [mu, logvar], [d_z, d_kl])]

    def operands(operation: Callable, batch: int, columns: int) -> list[Tensor]:
        x, z = (batch, columns), (batch, columns // 8)
        # recon_x, x, mu, logvar, recon_logvar, beta; or mu, logvar and the gradients of z and of its KL.
        shapes, data = ([x, x, z, z, (columns,), ()], (1, 5)) if operation is bound else ([x, x, x, (batch,)], (2, 3))
        made = [torch.randn(shape, device=device) for shape in shapes]
        return [t.requires_grad_(number not in data) for number, t in enumerate(made)]

    def replayed(operation: Callable, backend: str, batch: int, columns: int) -> str:
        given = operands(operation, batch, columns)
        replay = recorded(lambda: operation(backend, *given), device, warm_ups=0)
        for seed in range(3):
            with torch.no_grad():
                for t in given:
                    t.normal_()
            # The noise of a seed is the same on every backend, in a graph or not.
            torch.manual_seed(seed)
            found = [t.clone() for t in replay()]
            torch.manual_seed(seed)
            require_close(found, operation("reference", *in_float64(given)))
        if operation is latent:
            assert not torch.equal(replay()[0], found[0]), "the noise of a replay is that of the one before"
        return "right"

    # That PyTorch itself has made a backward pass before is taken for granted.
    torch.ones(8, device=device, requires_grad=True).square().sum().backward()
    for backend, operation in itertools.product(kernel_backends(device), (bound, latent)):
        key = f"{operation.__name__}, {backend}"
        report.attempt(f"{key}, first of the process", partial(replayed, operation, backend, 33, 520))
        report.attempt(
            f"{key}, another shape, outside", lambda o=operation, b=backend: o(b, *operands(o, 32, 512)) and "done"
        )
        report.attempt(f"{key}, first of a shape", partial(replayed, operation, backend, 31, 776))


def compiled(report: Report, device: str, deadline: float) -> None:
    """A step under torch.compile(mode="reduce-overhead"), which replays CUDA graphs: the values and gradients of each
    of several steps, with new operands, while beta, a tensor on the device, is annealed. Nothing is compiled anew."""
    from torch.profiler import ProfilerActivity, profile

    from fusedvae import functional

    def bound(
        backend: str,
        noise: Tensor | None,
        mu: Tensor,
        logvar: Tensor,
        weight: Tensor,
        recon_logvar: Tensor,
        x: Tensor,
        beta: Tensor,
    ) -> tuple[Tensor, Tensor]:
        z, kl = functional.latent(mu, logvar, noise=noise, backend=backend)
        loss = functional.elbo_loss(z @ weight, x, None, None, recon_logvar, kl=kl, beta=beta, backend=backend)
        return loss, z

    def steps(backend: str) -> dict[str, int]:
        shapes = [(64, 33), (64, 33), (33, 777), (777,), (64, 777)]
        *leaves, x = (torch.randn(shape, device=device) for shape in shapes)
        beta = torch.zeros((), device=device)
        for leaf in leaves:
            leaf.requires_grad_()
        torch.compiler.reset()
        function = torch.compile(
            lambda *operands: bound(backend, None, *operands), mode="reduce-overhead", fullgraph=True
        )

        def step() -> list[Tensor]:
            torch.compiler.cudagraph_mark_step_begin()
            loss, z = function(*leaves, x, beta)
            # Copied, as the next step writes to the same memory.
            return [t.detach().clone() for t in (loss, z, *torch.autograd.grad(loss, leaves))]

        before = None
        for number in range(6):
            with torch.no_grad():
                for t in (*leaves, x):
                    t.normal_()
                leaves[2].mul_(0.2)
                beta.fill_(0.1 + 0.15 * number)
            with torch._dynamo.config.patch(error_on_recompile=number > 0):
                found = step()
            mu, logvar, *others = in_float64(leaves)
            noise = ((found[1].double() - mu) / torch.exp(0.5 * logvar)).detach()
            assert before is None or not torch.equal(noise, before), "the noise is that of the step before"
            assert abs(noise.mean().item()) < 0.2, "the noise is not centred"
            assert abs(noise.std().item() - 1) < 0.2, "the noise has another variance than 1"
            loss, z = bound("reference", noise, mu, logvar, *others, *in_float64([x, beta]))
            require_close(found, [loss, z, *torch.autograd.grad(loss, [mu, logvar, *others])])
            before = noise
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
        return {"steps": 6, "graph_launches": sum("GraphLaunch" in e.name for e in profiler.events())}

    for backend in kernel_backends(device):
        report.attempt(backend, partial(steps, backend))


def turns(contestants: Sequence, device: str) -> dict[str, float]:
    """The medians of the times that the benchmark's contestants take, in microseconds."""
    from fusedvae.cli.bench.measuring import interleaved
    from fusedvae.cli.bench.statistics import summary
    from fusedvae.cli.bench.suite import ROUNDS, TURN_SECONDS

    seconds = seconds_of_timing(device)
    found = interleaved(contestants, torch.device(device), seconds=seconds, rounds=ROUNDS, turn=TURN_SECONDS).seconds
    return {name: summary(times).median * 1e6 for name, times in found.items()}


def factors(report: Report, device: str, deadline: float) -> None:
    """Backward passes of the bound that a factor comes into, as in (loss * 0.5).backward(): whether it multiplies the
    gradients, which are there already, and how long that takes, against PyTorch's multiplication of the same."""
    from fusedvae.cli.bench.cases import Case, operands
    from fusedvae.cli.bench.contestants import fused
    from fusedvae.cli.bench.measuring import Contestant

    exponent = 14 if device == "cpu" else 24
    given = operands(Case(f"2^{exponent}", "elbo"), torch.Generator(device).manual_seed(0))
    leaves = list(given.leaves.values())

    def scaled(function: Callable) -> str:
        whole = given.gradients(function(*given.arguments))
        for factor in (0.5, 0.3, 0.0):
            loss = function(*given.arguments)[0] * factor
            kept = torch.autograd.grad(loss, leaves, retain_graph=True)
            for found in (kept, torch.autograd.grad(loss, leaves)):  # into other memory, then in place
                require_close(found, [g.double() * factor for g in whole])
                if factor == 0.5:
                    assert all(torch.equal(f, g * 0.5) for f, g in zip(found, whole, strict=True)), "0.5 is not exact"
        return "right"

    gradients, half = [torch.ones_like(leaf) for leaf in leaves], torch.full((), 0.5, device=device)
    contestants = [Contestant("torch x0.5", lambda _: [g.mul_(half) for g in gradients])]
    for backend in kernel_backends(device):
        function = fused(backend, "elbo")
        if not report.attempt(backend, partial(scaled, function)):
            continue
        for name, factor in ((backend, None), (f"{backend} x0.5", 0.5)):

            def prepare(_: int, function=function, factor=factor) -> Tensor:
                (loss,) = function(*given.arguments)
                return loss if factor is None else loss * factor

            contestants.append(Contestant(name, lambda loss: torch.autograd.grad(loss, leaves), prepare))
    report.add(f"elbo float32 2^{exponent}, backward", {"microseconds": turns(contestants, device), "problems": {}})


def none(report: Report, device: str, deadline: float) -> None:
    """Values a sample (reduction="none"), forward and backward: of many short samples, and of few long ones with a
    log-variance a column, whose gradient is a sum. On a GPU all are timed as CUDA graphs, without the host's part."""
    from fusedvae import functional
    from fusedvae.cli.bench.contestants import Handwritten, handwritten_nll
    from fusedvae.cli.bench.measuring import Contestant, copying

    def per_sample(elements: Tensor) -> Tensor:
        return elements.flatten(1).sum(1)

    def kl(backend: str, mu: Tensor, logvar: Tensor) -> Tensor:
        if backend == "eager":
            return Handwritten(mu, logvar).kl(per_sample)
        return functional.kl_standard_normal(mu, logvar, reduction="none", backend=backend)

    def nll(backend: str, recon_x: Tensor, recon_logvar: Tensor, x: Tensor) -> Tensor:
        if backend == "eager":
            return per_sample(handwritten_nll(recon_x, x, recon_logvar, "none"))
        return functional.gaussian_nll(recon_x, x, recon_logvar, reduction="none", backend=backend)

    short, long = ((256, 16), (16, 300)) if device == "cpu" else ((65536, 16), (128, 20000))
    # What is read in each of the two passes and written in the second, in tensors of the shape.
    for function, shape, scale, tensors in ((kl, short, short, 6), (nll, short, short, 8), (nll, long, long[1:], 5)):
        leaves = [torch.randn(shape, device=device), torch.randn(scale, device=device)]
        for leaf in leaves:
            leaf.requires_grad_()
        data = [torch.randn(shape, device=device)] if function is nll else []
        incoming = torch.randn(shape[:1], device=device)

        def both(
            backend: str, leaves: list[Tensor], data: list[Tensor], incoming: Tensor, function=function
        ) -> list[Tensor]:
            values = function(backend, *leaves, *data)
            return [values.detach(), *torch.autograd.grad(values, leaves, incoming)]

        exact = both("reference", in_float64(leaves), in_float64(data), incoming.double())
        key = f"{function.__name__} {'x'.join(map(str, shape))}{'' if scale == shape else ', a scale a column'}"

        def checked(backend: str, both=both, given=(leaves, data, incoming), exact=exact) -> str:
            require_close(both(backend, *given), exact)
            return "right"

        copy_once = copying(4 * tensors * leaves[0].numel(), 1, torch.device(device)).work
        copied = recorded(lambda copy_once=copy_once: [copy_once(0)], device)
        contestants = [Contestant("copy", lambda _, copied=copied: copied())]
        for name in ("eager", *kernel_backends(device)):
            if report.attempt(f"{key}, {name}", partial(checked, name)):
                again = recorded(partial(both, name, leaves, data, incoming), device)
                contestants.append(Contestant(name, lambda _, again=again: again()))
        report.add(key, {"microseconds": turns(contestants, device), "problems": {}})


LIKELIHOODS = ("poisson", "negative_binomial", "zero_inflated_negative_binomial", "discretized_logistic")


def likelihoods(report: Report, device: str, deadline: float) -> None:
    """Those of counts and of pixels in bins, in every form of their scales: values a sample and gradients against
    float64; then their times."""
    from fusedvae import functional
    from fusedvae.backend.reference import LIKELIHOODS as FORMULAS

    def operands(name: str) -> list[Tensor]:
        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.empty(shape or (37, 1003), device=device).uniform_(low, high)

        if name == "discretized_logistic":
            x = torch.randint(256, (37, 1003), device=device) / 127.5 - 1
            made = [uniform(-1, 1), x, uniform(0.2, 2, 1003)]
        else:  # half of the counts are zeros
            x = torch.relu(uniform(-6, 6)).round()
            made = [uniform(0.2, 4), x, uniform(0.2, 2, 1003), uniform(-2, 2)][: len(FORMULAS[name].inputs)]
        return [t.requires_grad_(t is not x) for t in made]

    def both(name: str, form: str, backend: str, given: list[Tensor]) -> list[Tensor]:
        values = getattr(functional, f"{name}_nll")(*given, scale=form, reduction="none", backend=backend)
        return [values, *torch.autograd.grad(values.sum(), [t for t in given if t.requires_grad])]

    def checked(name: str, form: str, backend: str) -> str:
        given = operands(name)
        require_close(both(name, form, backend, given), both(name, form, "reference", in_float64(given)))
        return "right"

    for backend, name in itertools.product(kernel_backends(device), LIKELIHOODS):
        for form in FORMULAS[name].forms:
            report.attempt(f"{name}, {form}, {backend}", partial(checked, name, form, backend))
    exponent, wrong = 14 if device == "cpu" else 24, []
    for name in LIKELIHOODS:
        wrong += timed(report, f"nll-{name.replace('_', '-')}", "float32", exponent, ["eager"], device, deadline)
    if wrong:
        sys.exit(f"wrong or failed: {'; '.join(wrong)}")


TRAINING = "training step of mnist-mlp"


def training(report: Report, device: str, deadline: float) -> None:
    """Whole training steps of the benchmark's VAE (networks, sample, loss, backward pass, Adam), each a CUDA graph on a
    GPU: loss and gradients of one against float64, and what the package is worth where the host takes no time."""
    from fusedvae import functional
    from fusedvae.cli.bench.contestants import IDIOMS, MLP, fused_step, idiomatic_step
    from fusedvae.cli.bench.measuring import Contestant
    from fusedvae.cli.bench.suite import LEARNING_RATE

    torch.manual_seed(0)
    x, start = torch.rand(128, 784, device=device), MLP().to(device)

    def trained(name: str) -> Callable[[], list[Tensor]]:
        """A step that has been found right."""
        model = copy.deepcopy(start)
        function = idiomatic_step(IDIOMS["handwritten"], model) if name == "eager" else fused_step(name, model)
        on_gpu = {"fused": True, "capturable": True} if device == "cuda" else {}
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, **on_gpu)

        def step() -> list[Tensor]:
            optimizer.zero_grad()
            outputs = function(x)
            outputs[0].backward()
            optimizer.step()
            return [t.detach() for t in outputs]

        again = recorded(step, device)
        first = again()[0].item()
        exact = copy.deepcopy(model).double()
        loss, z, mu, logvar = again()
        noise = (z.double() - mu.double()) / torch.exp(0.5 * logvar.double())
        exact_mu, exact_logvar = exact.encode(x.double())
        recon_x, recon_logvar = exact.decode(exact_mu + torch.exp(0.5 * exact_logvar) * noise)
        expected = functional.elbo_loss(recon_x, x.double(), exact_mu, exact_logvar, recon_logvar, backend="reference")
        wanted = torch.autograd.grad(expected, list(exact.parameters()))
        require_close([loss, *(p.grad for p in model.parameters())], [expected, *wanted])
        for _ in range(30):
            loss = again()[0]
        assert loss.item() < first, f"30 steps took the loss from {first} to {loss.item()}"
        return again

    contestants = []
    for name in ("eager", *kernel_backends(device)):

        def enter(name: str = name) -> str:
            again = trained(name)
            contestants.append(Contestant(name, lambda _: again()))
            return "right"

        report.attempt(name, enter)
    report.add(TRAINING, {"microseconds": turns(contestants, device), "problems": {}})


class Goal(NamedTuple):
    """How many times as long a rival is to take as each backend; a copy takes less, and kernels alone are its rivals:
    those of a CUDA graph, where there is one."""

    step: str
    case: str
    rival: str
    at_least: float

    def reached(self, times: dict[str, float]) -> dict[str, float]:
        """What each backend reached, of microseconds that were measured; empty if none were."""
        if self.rival not in times:
            return {}
        captured = [name for name in times if name.endswith(CAPTURED)]
        ours = [name for name in times if name not in RIVALS and name not in captured]
        if self.rival == "copy" and captured:
            ours = captured
        return {name: times[self.rival] / times[name] for name in ours}


GOALS = [
    *(Goal("speed", f"elbo {dtype} 2^26", "copy", 0.90) for dtype in DTYPES),
    *(Goal("speed", f"latent {dtype} 2^26", "copy", 0.85) for dtype in DTYPES),
    *(Goal("speed", f"elbo {dtype} 2^26", "compile", 1.5) for dtype in DTYPES),
    *(Goal("speed", f"elbo {dtype} 2^26", "eager", 7.0) for dtype in DTYPES),
    Goal("training", TRAINING, "eager", 1.3),
]


CHILDREN = {
    f.__name__: f
    for f in (
        *(speed, exercise, exercise_native, large, launches, graphs, streams),
        *(first_calls, compiled, factors, none, likelihoods, training),
    )
}


# --- the steps ----------------------------------------------------------------------------------------------------


class Check:
    """What the steps share: where results go, and how much time is left."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device: str = args.device
        self.out = Path(os.environ.get("OUT") or tempfile.mkdtemp(prefix="gpu_check_")).resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.deadline = time.time() + 60 * args.minutes
        self.results: dict[str, dict] = {}

    def run(self, step: str, command: list[str], seconds: float, **environment: str) -> dict:
        """Run a command with its output in a file: whether it succeeded, and in what time."""
        seconds = min(seconds, self.deadline - time.time())
        if seconds < 5:
            return {"ok": False, "reason": "no time was left"}
        variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        begin = time.time()
        with open(self.out / f"{step}.log", "w") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status = process.wait(seconds)
                result = {"ok": status == 0, **({"reason": f"exit status {status}"} if status else {})}
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
                result = {"ok": False, "reason": f"stopped after {seconds:.0f} s"}
        return {**result, "seconds": round(time.time() - begin, 1), "log": f"{step}.log"}

    def child(self, name: str, seconds: float, *wrapper: str, log: str = "", **environment: str) -> dict:
        """Run one of CHILDREN, behind a wrapper if given; with what it found."""
        log = log or name
        report = self.out / f"{log}.json"
        report.unlink(missing_ok=True)  # of an earlier call
        command = [*wrapper, sys.executable, __file__, "--child", name, "--report", str(report)]
        ends = min(time.time() + seconds, self.deadline)
        result = self.run(log, [*command, "--device", self.device, "--ends", str(ends)], seconds, **environment)
        return {**result, "found": json.loads(report.read_text()) if report.exists() else {}}


def build(check: Check) -> dict:
    major, minor = torch.cuda.get_device_capability()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return check.run("build", command, 180, FUSEDVAE_CUDA="1", FUSEDVAE_CUDA_ARCHS=f"{major}{minor}")


WORKERS = 8
"""Processes that run tests at a time, if pytest-xdist is there and the machine has as many processors twice."""


def tests(check: Check, which: str, log: str) -> dict:
    """The tests marked `gpu` whose names fit. In case time runs out, outcomes are in the log one by one, and what was
    raised in a file of its own."""
    # There may be more than time suffices for: they come in another order every time, so that none is always the last.
    # What another version of PyTorch warns of is no failure here.
    options = ["-m", "gpu", "-k", which, "-v", "--tb=short", "-p", "no:cacheprovider", "-W", "default"]
    options += ["-p", Path(__file__).stem]  # see the functions below
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(max(1, min(WORKERS, (os.cpu_count() or 1) // 2)))]
    failures = check.out / f"{log}.failures"
    failures.unlink(missing_ok=True)  # of an earlier call
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    command = [sys.executable, "-m", "pytest", *options, "tests"]
    result = check.run(log, command, 110, PYTHONPATH=path, **{FAILURES: str(failures), ORDER: str(time.time_ns())})
    text = (check.out / f"{log}.log").read_text() if "log" in result else ""
    # "tests/test_name.py::test_name PASSED" or, of workers, "[gw0] [ 12%] PASSED tests/test_name.py::test_name".
    outcomes = re.findall(r"(?:^\S+\.py::.* |^\[gw\d+\].*\] )(PASSED|FAILED|ERROR|SKIPPED)\b", text, re.MULTILINE)
    summary = ", ".join(f"{n} {what.lower()}" for what, n in Counter(outcomes).items())
    found = {"summary": summary, "failures": failures.read_text().splitlines() if failures.exists() else []}
    if "PASSED" not in outcomes:
        result |= {"ok": False, "reason": result.get("reason", "no test passed")}
    return {**result, "found": found}


FAILURES, ORDER = "GPU_CHECK_FAILURES", "GPU_CHECK_ORDER"


def pytest_collection_modifyitems(items: list) -> None:
    """As a plugin of the tests, shuffles them, in the same way in each of their processes."""
    if ORDER in os.environ:
        random.Random(os.environ[ORDER]).shuffle(items)


def pytest_runtest_logreport(report: Any) -> None:
    """As a plugin of the tests, notes each failure when it happens: a test's name and what it raised."""
    if report.failed and FAILURES in os.environ and "PYTEST_XDIST_WORKER" not in os.environ:
        raised = [line[1:].strip() for line in str(report.longrepr).splitlines() if line.startswith("E ")]
        with open(os.environ[FAILURES], "a") as file:
            file.write(f"{report.nodeid}: {raised[0] if raised else 'see the log'}\n")


def cuda_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit: on PATH, or beside nvcc."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=f"{home}/bin")


def sanitized(check: Check, tool: str) -> dict:
    sanitizer = cuda_tool("compute-sanitizer")
    if sanitizer is None:
        return {"skipped": "no compute-sanitizer"}
    wrapper = [sanitizer, "--tool", tool, "--error-exitcode", "86", "--print-limit", "20"]
    wrapper += ["--kernel-regex", "kns=fusedvae"]  # PyTorch's own are not watched
    # Without torch's caching every tensor is an allocation of its own, whose ends memcheck knows.
    return check.child("exercise_native", 75, *wrapper, log=tool, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


METRICS = {
    "gpu__time_duration.sum": "nanoseconds",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent_of_peak",
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
}


def figures_of(table: str) -> dict[str, dict]:
    """The METRICS of each launch in ncu's table of comma-separated values, which messages may precede."""
    launches: dict[str, dict] = {}
    for row in csv.DictReader(io.StringIO(table[max(table.find('"ID"'), 0) :])):
        if row.get("Metric Name") in METRICS:
            launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"][:160]})
            launch[METRICS[row["Metric Name"]]] = float(row["Metric Value"].replace(",", ""))
    return launches


def throughput(check: Check) -> dict:
    ncu = cuda_tool("ncu")
    if ncu is None:
        return {"skipped": "no ncu"}
    table = check.out / "throughput.csv"
    wrapper = [ncu, "--csv", "--log-file", str(table), "--print-units", "base", "--metrics", ",".join(METRICS)]
    wrapper += ["--clock-control", "none"]  # as everything else is timed
    wrapper += ["--kernel-name-base", "demangled", "--kernel-name", "regex:fusedvae"]
    result = check.child("large", 75, *wrapper, log="throughput")
    found = figures_of(table.read_text()) if table.exists() else {}
    if not found:
        return {**result, "ok": False, "reason": "ncu gave no figures; see throughput.log and throughput.csv"}
    return {**result, "found": found}


STEPS: dict[str, Callable[[Check], dict]] = {
    "build": build,
    "graphs": lambda check: check.child("graphs", 60),
    "streams": lambda check: check.child("streams", 60),
    "launches": lambda check: check.child("launches", 60),
    "first_calls": lambda check: check.child("first_calls", 45),
    "factors": lambda check: check.child("factors", 30),
    "none": lambda check: check.child("none", 30),
    "training": lambda check: check.child("training", 30),
    "compiled": lambda check: check.child("compiled", 75),
    "speed": lambda check: check.child("speed", 130),
    "tests_native": partial(tests, which="not triton-cuda", log="tests_native"),
    "tests_triton": partial(tests, which="triton-cuda", log="tests_triton"),
    "likelihoods": lambda check: check.child("likelihoods", 45),
    "memcheck": partial(sanitized, tool="memcheck"),
    "throughput": throughput,
    "racecheck": partial(sanitized, tool="racecheck"),
    "exercise": lambda check: check.child("exercise", 60),
}
"""In the order of what is most to be known, in case time runs out."""
WITHOUT_GPU = ("speed", "exercise", "first_calls", "factors", "none", "training", "likelihoods")


# --- the report -----------------------------------------------------------------------------------------------------


def machine(device: str) -> dict:
    """What the figures were taken on."""
    about = {"torch": torch.__version__, "python": platform.python_version(), "cuda": torch.version.cuda}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {"device": properties.name, "multiprocessors": properties.multi_processor_count}
    return about


def time_table(cases: dict[str, dict]) -> Iterator[str]:
    yield f"{'forward and backward':44}{'backend':>18}{'time':>11}{'vs eager':>10}{'vs compile':>12}{'of copy':>9}"
    for name, case in cases.items():
        if "microseconds" not in case:  # only checked
            continue
        times = case["microseconds"]
        for backend in times:
            if backend in RIVALS:
                continue
            ours = times[backend]
            eager, compiled = (f"{times[r] / ours:.2f}x" if r in times else "-" for r in ("eager", "compile"))
            share = f"{100 * times['copy'] / ours:.0f}%" if "copy" in times else "-"
            yield f"{name:44}{backend:>18}{ours:>9.1f}us{eager:>10}{compiled:>12}{share:>9}"
        yield from (f"{name:44}{who:>18}  {reason}" for who, reason in case["problems"].items())


def launch_table(cases: dict[str, dict]) -> Iterator[str]:
    for name, case in cases.items():
        yield f"{name:38}{case['launches']:>3} launches, waits: {case['waits'] or 'none'}"


def compiled_table(backends: dict[str, dict]) -> Iterator[str]:
    for name, found in backends.items():
        if name != "failures":
            yield f"{name:38}{found['steps']} steps are right, {found['graph_launches']} graphs launched in one"


def throughput_table(kernels: dict[str, dict]) -> Iterator[str]:
    yield f"{'DRAM':>6}{'time':>11}{'read':>10}{'written':>10}{'registers':>11}{'occupancy':>11}  kernel"
    for k in kernels.values():
        yield (
            f"{k.get('dram_percent_of_peak', 0):>5.0f}%{k.get('nanoseconds', 0) / 1e3:>9.1f}us"
            f"{k.get('bytes_read', 0) / 1e6:>8.1f}MB{k.get('bytes_written', 0) / 1e6:>8.1f}MB"
            f"{k.get('registers', 0):>11.0f}{k.get('occupancy_percent', 0):>10.0f}%  {k['kernel'][:60]}"
        )


TABLES = {
    **dict.fromkeys(("speed", "none", "likelihoods", "factors", "training"), time_table),
    "launches": launch_table,
    "compiled": compiled_table,
    "throughput": throughput_table,
}


def goals_table(results: dict[str, dict]) -> Iterator[str]:
    """Of each goal what the backends reached, from the results of the steps."""
    for goal in GOALS:
        times = results.get(goal.step, {}).get("found", {}).get(goal.case, {}).get("microseconds", {})
        reached = goal.reached(times)
        what = f"{goal.case}, {goal.rival}'s time over ours at least {goal.at_least:.2f}"
        if not reached:
            yield f"{'?':8}{what}: not measured"
        for name, ratio in reached.items():
            yield f"{'pass' if ratio >= goal.at_least else 'MISSED':8}{what}: {ratio:.2f} ({name})"


def describe(check: Check) -> str:
    """Everything as text."""
    lines = [", ".join(f"{key} {value}" for key, value in machine(check.device).items()), ""]
    for step, result in check.results.items():
        if "skipped" in result:
            lines.append(f"{step:14}skipped: {result['skipped']}")
            continue
        state = "ok" if result["ok"] else f"FAILED: {result['reason']}"
        found = result.get("found", {})
        lines.append(f"{step:14}{state} ({result.get('seconds', 0)} s) {found.get('summary', '')}".rstrip())
        lines += [f"    {test}" for test in found.get("failures", [])[:20]]
    for step, table in TABLES.items():
        if found := check.results.get(step, {}).get("found"):
            lines += ["", f"--- {step} ---", *table(found)]
    if check.device == "cuda" and any(goal.step in check.results for goal in GOALS):
        lines += ["", "--- goals ---", *goals_table(check.results)]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", default=",".join(s for s in STEPS if s != "exercise"), help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all steps together")
    for name in ("--child", "--report", "--ends"):  # of a step's own process
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        if args.device == "cpu":
            torch.set_num_threads(1)  # two are slow on a machine that has something else to do
        report = Report(Path(args.report))
        CHILDREN[args.child](report, args.device, float(args.ends))
        return 1 if report.failures else 0

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu rehearses what needs none")
    check = Check(args)
    about = machine(args.device)
    for name in args.steps.split(","):
        if args.device == "cpu" and name not in WITHOUT_GPU:
            check.results[name] = {"skipped": "needs a GPU"}
        else:
            print(f"{name} ...", flush=True)
            try:
                check.results[name] = STEPS[name](check)
            except Exception as error:  # whatever a step has met, the next ones are to run
                check.results[name] = {"ok": False, "reason": f"{type(error).__name__}: {error}"}
        everything = {"machine": about, "steps": check.results}
        (check.out / "gpu_check.json").write_text(json.dumps(everything, indent=1))
        (check.out / "gpu_check.txt").write_text(describe(check))
    print(describe(check), f"\nin {check.out}", sep="")
    return 0 if all(result.get("ok", True) for result in check.results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
