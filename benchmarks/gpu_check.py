"""Everything there is to find out on a machine with a GPU, in one command of at most eight minutes, without a network.

    OUT=results python benchmarks/gpu_check.py [--steps build,tests,...] [--minutes 8]

Builds the extension for the device's own architecture, runs the tests marked `gpu`, looks for memory errors and races
with compute-sanitizer, times every operation against eager PyTorch and torch.compile, counts launches, captures CUDA
graphs, runs on two streams at once, and reads the memory throughput of the kernels with ncu.

Each step is a process of its own with a time limit: one that fails, hangs or crashes does not stop the others. The
folder $OUT (a temporary one without it) gets, as soon as each is known: STEP.log, STEP.json, and the whole in
gpu_check.json and gpu_check.txt. The exit status is 0 if every step that could run succeeded.

Operations, contestants, checks and timers are those of `fusedvae bench`.

With --device cpu the steps that need no GPU run, on small problems: a rehearsal of this script.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent

Step = Callable[[], object]


# --- what the benchmark has -----------------------------------------------------------------------------------------

# The package is imported in the processes of the steps alone: one of them builds it.

DTYPES = ("float32", "bfloat16")
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


# --- the parts of a step that run in a process of their own -------------------------------------------------------


class Report:
    """What a step has found so far, in a file that is whole at any time."""

    def __init__(self, path: Path) -> None:
        self.path, self.content = path, {}

    def add(self, key: str, value: object) -> None:
        self.content[key] = value
        partial_file = self.path.with_suffix(".part")
        partial_file.write_text(json.dumps(self.content, indent=1))
        partial_file.replace(self.path)


def speed(report: Report, device: str, deadline: float) -> None:
    """Every operation as `fusedvae bench` checks and times it: forward and backward, against eager PyTorch,
    torch.compile and a copy of the same bytes."""
    from fusedvae.cli.bench.contestants import usual_idiom
    from fusedvae.cli.bench.suite import Settings, measure, new_result

    backends, wrong = kernel_backends(device), []
    sizes = [14] if device == "cpu" else [24, 20, 26, 22]
    cases = list(itertools.product(sizes, DTYPES, operations(device)))
    for done, (exponent, dtype, operation) in enumerate(cases):
        # Compiling is the longest part by far, and the only one that can be left out.
        others = SECONDS_TO_COMPILE + SECONDS_OF_A_CASE * (len(cases) - done)
        rivals = ["eager", "compile"] if device != "cpu" and time.time() < deadline - others else ["eager"]
        names = {f"{rival}/{usual_idiom(operation)}": rival for rival in rivals}
        names |= {f"fusedvae/{name}": name for name in backends}
        settings = Settings(
            presets=[f"2^{exponent}"],
            operations=[operation],
            dtypes=[dtype],
            memory_formats=["contiguous"],
            directions=["both"],
            contestants=list(names),
            device=device,
            threads=torch.get_num_threads(),
            seconds=0.02 if device == "cpu" else 0.3,
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
        wrong += [f"{operation} {dtype} 2^{exponent}, {name}" for name in backends if name in problems]
    if wrong:
        sys.exit(f"wrong or failed: {'; '.join(wrong)}")


def exercise(report: Report, device: str, deadline: float) -> None:
    """Every operation once on small odd problems, in every dtype: what the sanitizers watch."""
    from fusedvae import functional
    from fusedvae.backend.reference import LIKELIHOODS

    def uniform(dtype: str, *shape: int) -> Tensor:  # what is a probability and a standard deviation, too
        return torch.empty(shape, device=device).uniform_(0.1, 0.9).to(getattr(torch, dtype)).requires_grad_()

    for backend, dtype in itertools.product(kernel_backends(device), ("float64", "float16", *DTYPES)):
        for operation, shape in itertools.product(operations(device), ((3, 1), (2, 1023), (5, 64 * 131))):
            passes(operation, shape, dtype, backend, device)()
        for scale, (name, formula) in itertools.product(((5, 1, 1), (9,), (3, 1, 7, 9), ()), LIKELIHOODS.items()):
            shapes = [(3, 5, 7, 9), (3, 5, 7, 9), scale, (3, 1, 1, 1)]
            inputs = tuple([uniform(dtype, *shape) for shape in shapes[: len(formula.inputs)]])
            for form, reduction in itertools.product(
                formula.forms if formula.scales else [None], ("batchmean", "none")
            ):
                written = functional._written(form, None, 0.0)
                nll = functional._likelihood(name, inputs, written, False, None, reduction, None, 1, backend)
                torch.autograd.grad(nll.sum(), inputs)
        report.add(f"{backend} torch.{dtype}", "done")


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

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()

        def replayed(seed: int, graph=graph, captured=captured) -> list[Tensor]:
            torch.manual_seed(seed)
            graph.replay()
            return [t.clone() for t in captured]

        first, again = replayed(1), replayed(1)
        graph.replay()
        assert not (captured[0] == again[0]).any(), "the noise of the second replay is that of the first"
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


CHILDREN = {f.__name__: f for f in (speed, exercise, large, launches, graphs, streams)}


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


def tests(check: Check, which: str, log: str) -> dict:
    """The tests marked `gpu` whose names fit; their outcomes are in the log one by one, in case time runs out."""
    # What another version of PyTorch warns of is no failure here.
    options = ["-m", "gpu", "-k", which, "-v", "--tb=short", "-p", "no:cacheprovider", "-W", "default"]
    result = check.run(log, [sys.executable, "-m", "pytest", *options, "tests"], 110)
    text = (check.out / f"{log}.log").read_text() if "log" in result else ""
    outcomes = re.findall(r"^(tests/\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.MULTILINE)
    counts = dict(Counter(outcome for _, outcome in outcomes))
    failures = [test for test, outcome in outcomes if outcome in ("FAILED", "ERROR")]
    found = {"summary": ", ".join(f"{n} {what.lower()}" for what, n in counts.items()), "failures": failures}
    if not counts.get("PASSED"):
        result |= {"ok": False, "reason": result.get("reason", "no test passed")}
    return {**result, "found": found}


def cuda_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit: on PATH, or beside nvcc."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=f"{home}/bin")


def sanitized(check: Check, tool: str) -> dict:
    sanitizer = cuda_tool("compute-sanitizer")
    if sanitizer is None:
        return {"skipped": "no compute-sanitizer"}
    wrapper = [sanitizer, "--tool", tool, "--error-exitcode", "86", "--print-limit", "20"]
    # Without torch's caching every tensor is an allocation of its own, whose ends memcheck knows.
    return check.child("exercise", 75, *wrapper, log=tool, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


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
    "tests_native": partial(tests, which="not triton-cuda", log="tests_native"),
    "tests_triton": partial(tests, which="triton-cuda", log="tests_triton"),
    "memcheck": partial(sanitized, tool="memcheck"),
    "speed": lambda check: check.child("speed", 200),
    "throughput": throughput,
    "racecheck": partial(sanitized, tool="racecheck"),
    "exercise": lambda check: check.child("exercise", 60),
}
WITHOUT_GPU = ("speed", "exercise")


# --- the report -----------------------------------------------------------------------------------------------------


def machine(device: str) -> dict:
    """What the figures were taken on."""
    about = {"torch": torch.__version__, "python": platform.python_version(), "cuda": torch.version.cuda}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {"device": properties.name, "multiprocessors": properties.multi_processor_count}
    return about


def speed_table(cases: dict[str, dict]) -> Iterator[str]:
    yield f"{'forward and backward':38}{'backend':>9}{'time':>11}{'vs eager':>10}{'vs compile':>12}{'of copy':>9}"
    for name, case in cases.items():
        times = case["microseconds"]
        for backend in times:
            if backend in ("eager", "compile", "copy"):
                continue
            ours = times[backend]
            eager, compiled = (f"{times[r] / ours:.2f}x" if r in times else "-" for r in ("eager", "compile"))
            yield (f"{name:38}{backend:>9}{ours:>9.1f}us{eager:>10}{compiled:>12}{100 * times['copy'] / ours:>8.0f}%")
        yield from (f"{name:38}{who:>9}  {reason}" for who, reason in case["problems"].items())


def launch_table(cases: dict[str, dict]) -> Iterator[str]:
    for name, case in cases.items():
        yield f"{name:38}{case['launches']:>3} launches, waits: {case['waits'] or 'none'}"


def throughput_table(kernels: dict[str, dict]) -> Iterator[str]:
    yield f"{'DRAM':>6}{'time':>11}{'read':>10}{'written':>10}{'registers':>11}{'occupancy':>11}  kernel"
    for k in kernels.values():
        yield (
            f"{k.get('dram_percent_of_peak', 0):>5.0f}%{k.get('nanoseconds', 0) / 1e3:>9.1f}us"
            f"{k.get('bytes_read', 0) / 1e6:>8.1f}MB{k.get('bytes_written', 0) / 1e6:>8.1f}MB"
            f"{k.get('registers', 0):>11.0f}{k.get('occupancy_percent', 0):>10.0f}%  {k['kernel'][:60]}"
        )


TABLES = {"speed": speed_table, "launches": launch_table, "throughput": throughput_table}


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
        CHILDREN[args.child](Report(Path(args.report)), args.device, float(args.ends))
        return 0

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu rehearses what needs none")
    check = Check(args)
    for name in args.steps.split(","):
        if args.device == "cpu" and name not in WITHOUT_GPU:
            check.results[name] = {"skipped": "needs a GPU"}
        else:
            print(f"{name} ...", flush=True)
            try:
                check.results[name] = STEPS[name](check)
            except Exception as error:  # whatever a step has met, the next ones are to run
                check.results[name] = {"ok": False, "reason": f"{type(error).__name__}: {error}"}
        everything = {"machine": machine(args.device), "steps": check.results}
        (check.out / "gpu_check.json").write_text(json.dumps(everything, indent=1))
        (check.out / "gpu_check.txt").write_text(describe(check))
    print(describe(check), f"\nin {check.out}", sep="")
    return 0 if all(result.get("ok", True) for result in check.results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
