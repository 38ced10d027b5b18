"""Measures cases, and keeps what was found as plain values: the format of ``--json``.

A result is {"format", "command", "date", "settings", "environment", "noise", "cases": [...]}; a case has its fields,
"status" ("done", "skipped"), "calibration" and "noisy" (see `judge_noise`), and "contestants", each with "status":

* "ok": "seconds" {"median", "q1", "q3", "rounds", "repeats"}, "times" (each round's), "ratios" {"eager", "compile"}
  (how many times as long the fastest of those takes: [value, low, high], of 95 %), "error", "memory_bytes", "launches",
  "bytes_per_second", "share_of_copy";
* "wrong", "failed": a "reason", and no times.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime, timezone
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cases import DTYPES, Case, cases, operands
from .checking import WrongAnswerError, check, check_fresh_noise, check_step
from .contestants import MLP, Function, Method, methods
from .measuring import (
    Contestant,
    Timings,
    available_bytes,
    cache_bytes,
    calibration,
    copying,
    interleaved,
    profiled,
)
from .statistics import Summary, ratio, summary

FORMAT = 1
"""Changes with the meaning of a result's entries."""
ROUNDS = (5, 101)
"""At least and at most so many of each case. An interruption leaves cases with fewer, but not with less than 3."""
FEWEST_ROUNDS = 3
TURN_SECONDS = 1e-3
QUEUED_SECONDS = 1e-2
"""A turn on a GPU: so long that work waits for the GPU in its queue, as it does in training, and not for Python."""
NOISY = 0.15
"""Where the middle half of the calibration's times spreads over more than this part of them, the machine was busy."""
SLOW = 1.5
"""Likewise where they are this many times as long as in another case."""
NOISY_CASES = 0.25
"""A result with more than this part of noisy cases is a noisy one."""
LEARNING_RATE = 1e-3

Result = dict[str, Any]


class Settings(NamedTuple):
    """What to measure, and for how long: the options of the command, under the same names."""

    presets: list[str]
    operations: list[str]
    dtypes: list[str]
    memory_formats: list[str]
    directions: list[str]
    contestants: list[str]
    """Patterns of names."""
    device: str
    threads: int
    seconds: float
    """Of timing, for each case."""
    seed: int

    def cases(self) -> list[Case]:
        return cases(self.presets, self.operations, self.dtypes, self.memory_formats, self.directions)

    def methods(self, case: Case) -> list[Method]:
        found = methods(case, torch.device(self.device))
        return [m for m in found if any(_matches(m.name, pattern) for pattern in self.contestants)]


def _matches(name: str, pattern: str) -> bool:
    """Whether a contestant's name matches: ``eager`` stands for ``eager/*``."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}/*")


def new_result(settings: Settings, command: str, environment: dict[str, Any]) -> Result:
    """A result without cases yet."""
    return {
        "format": FORMAT,
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": settings._asdict(),
        "environment": environment,
        "noise": {"spread": 0.0, "noisy_cases": 0, "noisy": False},
        "cases": [],
    }


def measure(
    settings: Settings,
    result: Result,
    *,
    progress: Callable[[str], object] = lambda what: None,
    after_case: Callable[[Result], object] = lambda case: None,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Measure every case of the settings into ``result``; False if stopped before the end.

    Args:
        progress: told what comes next.
        after_case: given each case's entry when it is complete.
        stop: asked often; what was measured by then is kept.
    """
    device = torch.device(settings.device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # events are of the current one
        return _measure_cases(settings, device, result, progress, after_case, stop)


def _measure_cases(
    settings: Settings,
    device: torch.device,
    result: Result,
    progress: Callable[[str], object],
    after_case: Callable[[Result], object],
    stop: Callable[[], bool],
) -> bool:
    for case in settings.cases():
        if stop():
            return False
        if any(method.family == "compile" for method in settings.methods(case)):
            # Compiled code of one case is of no use to the next, and too much of it makes the compiler give up.
            torch.compiler.reset()
        entry = _measure_case(case, settings, device, progress, stop)
        if entry is not None:
            result["cases"].append(entry)
            judge_noise(result)
            after_case(entry)
    return not stop()


def judge_noise(result: Result) -> None:
    """Say of each case, and of the whole result, whether the machine was busy with something else: from the times of a
    loop that never changes, which vary or are longer than in the best of the cases where it was."""
    measured = [entry for entry in result["cases"] if "calibration" in entry]
    fastest = min((entry["calibration"]["median"] for entry in measured), default=0.0)
    for entry in measured:
        middle = Summary(**entry["calibration"])
        entry["noisy"] = middle.spread > NOISY or middle.median > SLOW * fastest
    spreads = [Summary(**entry["calibration"]).spread for entry in measured]
    noisy = sum(entry["noisy"] for entry in measured)
    result["noise"] = {
        "spread": summary(spreads).median if spreads else 0.0,
        "noisy_cases": noisy,
        "noisy": noisy > NOISY_CASES * len(measured),
    }


def counts(result: Result) -> dict[str, int]:
    """How many contestants ended in each status."""
    found = {"ok": 0, "wrong": 0, "failed": 0}
    for entry in result["cases"]:
        for contestant in entry["contestants"]:
            found[contestant["status"]] += 1
    return found


class _Entrant(NamedTuple):
    """A method that gave the right answer, ready to be timed."""

    method: Method
    contestant: Contestant
    error: float
    peak_bytes: int | None
    """None for a CUDA graph, which keeps its memory."""
    launches: int


def _measure_case(
    case: Case,
    settings: Settings,
    device: torch.device,
    progress: Callable[[str], object],
    stop: Callable[[], bool],
) -> Result | None:
    """The case's entry; None if it was stopped too early to say anything."""
    entry: Result = {**vars(case), "elements": case.elements, "status": "done", "contestants": []}
    generator = torch.Generator(device).manual_seed(settings.seed)
    work = _StepWork(device, generator) if case.operation == "step" else OperationWork(case, device, generator)
    problem = work.problem()
    if problem:
        return {**entry, "status": "skipped", "reason": problem}
    work.make_sets()
    entry |= {"from": work.source, "sets": work.sets, "operand_bytes": work.set_bytes, "traffic_bytes": case.traffic()}
    with _autocast(case, device):
        entrants = []
        for method in settings.methods(case):
            if stop():
                return None
            progress(f"{case}: {method.name}")
            try:
                entrants.append(_enter(work, method, device))
            except WrongAnswerError as wrong:
                entry["contestants"].append(_without_times(method, "wrong", str(wrong)))
            except Exception as error:  # whatever a compiler may raise: the others can still compete
                entry["contestants"].append(_without_times(method, "failed", _in_one_line(error)))
        if not entrants:
            return entry
        progress(f"{case}: timing {len(entrants)} contestants")
        extra = [calibration(device)]
        traffic = case.traffic()
        if traffic is not None:
            extra.append(copying(traffic, work.sets, device))
        try:
            timings = interleaved(
                [*extra, *(entrant.contestant for entrant in entrants)],
                device,
                seconds=settings.seconds,
                rounds=ROUNDS,
                turn=_turn_seconds(case, device),
                stop=stop,
            )
        except Exception as error:  # out of memory, most likely: other cases may need less
            reason = _in_one_line(error)
            entry["contestants"] += [_without_times(entrant.method, "failed", reason) for entrant in entrants]
            return {**entry, "status": "skipped", "reason": reason}
    if len(timings.seconds["calibration"]) < FEWEST_ROUNDS:
        return None
    _record(entry, entrants, timings)
    order = [method.name for method in settings.methods(case)]
    entry["contestants"].sort(key=lambda contestant: order.index(contestant["name"]))
    return entry


def _in_one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _turn_seconds(case: Case, device: torch.device) -> float:
    # Before a backward pass alone, all forward passes of a turn are in memory at the same time.
    return QUEUED_SECONDS if device.type == "cuda" and case.direction != "backward" else TURN_SECONDS


def _without_times(method: Method, status: str, reason: str) -> Result:
    return {"name": method.name, "family": method.family, "status": status, "reason": reason}


def _autocast(case: Case, device: torch.device) -> AbstractContextManager[object]:
    if case.dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[case.dtype])


def _enter(work: OperationWork | _StepWork, method: Method, device: torch.device) -> _Entrant:
    """Check a method's answer and see what it asks of the machine."""
    contestant, error = work.enter(method)
    prepared = 0 if contestant.prepare is None else contestant.prepare(0)
    profile = profiled(lambda: contestant.work(prepared), device)
    return _Entrant(method, contestant, error, None if method.captured else profile.peak_bytes, profile.launches)


def _record(entry: Result, entrants: list[_Entrant], timings: Timings) -> None:
    """Put figures into a case's entry."""
    seconds = timings.seconds
    entry["calibration"] = summary(seconds["calibration"])._asdict()
    fastest = {}
    for family in ("eager", "compile"):
        names = [e.method.name for e in entrants if e.method.family == family and not e.method.captured]
        if names:
            fastest[family] = min(names, key=lambda name: summary(seconds[name]).median)
    entry["fastest"] = fastest
    if "copy" in seconds:
        entry["copy_seconds"] = summary(seconds["copy"]).median
        entry["copy_bytes_per_second"] = entry["traffic_bytes"] / entry["copy_seconds"]
    for entrant in entrants:
        name = entrant.method.name
        middle = summary(seconds[name])
        figures: Result = {
            "name": name,
            "family": entrant.method.family,
            "status": "ok",
            "seconds": {**middle._asdict(), "rounds": len(seconds[name]), "repeats": timings.repeats[name]},
            "times": [float(f"{t:.5g}") for t in seconds[name]],
            "ratios": {family: list(ratio(seconds[other], seconds[name])) for family, other in fastest.items()},
            "error": entrant.error,
            "memory_bytes": entrant.peak_bytes,
            "launches": entrant.launches,
        }
        if "copy" in seconds:
            figures["bytes_per_second"] = entry["traffic_bytes"] / middle.median
            figures["share_of_copy"] = entry["copy_seconds"] / middle.median
        entry["contestants"].append(figures)


class OperationWork:
    """An operation on given operands: several sets of them, so that none is in a cache when its turn comes again,
    unless all of them fit into half of it. Such cases run from the cache, as they do in training, where the network
    has written the operands a moment ago."""

    def __init__(self, case: Case, device: torch.device, generator: torch.Generator) -> None:
        self.case, self.device, self._generator = case, device, generator
        elements = case.elements * DTYPES[case.dtype].itemsize
        self.set_bytes = case.operand_count * elements
        cache = cache_bytes(device)
        if 3 * self.set_bytes <= cache // 2:
            self.source, self.sets = "cache", 3
        else:
            self.source, self.sets = "memory", max(3, -(-2 * cache // self.set_bytes))

    def problem(self) -> str | None:
        """Why this machine cannot do it, if so."""
        available = available_bytes(self.device)
        # The sets, and what eager PyTorch and the check in float64 allocate beside them: at most a dozen tensors.
        elements = self.case.elements * DTYPES[self.case.dtype].itemsize
        needed = 2 * self.sets * self.set_bytes + 12 * elements
        if available is not None and needed > 0.8 * available:
            return f"needs about {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are available"
        return None

    def make_sets(self) -> None:
        self._operands = [operands(self.case, self._generator) for _ in range(self.sets)]
        self.set_bytes = self._operands[0].bytes

    def enter(self, method: Method) -> tuple[Contestant, float]:
        function = method.operation(self.case.operation)
        outputs, error = self._check(function, method.constant)
        contestant = self._contestant(method.name, function, outputs)
        # Their graph remembers the stream that the leaves were first used on. A capture must not wait for that.
        del outputs
        return (self._captured(contestant) if method.captured else contestant), error

    def _check(self, function: Function, constant: bool) -> tuple[tuple[Tensor, ...], float]:
        """What the function gives for the first operands, and the error of it."""
        given = self._operands[0]
        with torch.set_grad_enabled(self.case.direction != "evaluate"):
            # Copied, as a compiled CUDA graph writes to the same memory when it is replayed.
            before = function(*given.arguments)[0].detach().clone()
            outputs = function(*given.arguments)
            if self.case.samples:
                check_fresh_noise(before, outputs[0].detach())
        grads = None
        if self.case.direction != "evaluate":
            grads = dict(zip(given.leaves, given.gradients(outputs), strict=True))
        return outputs, check(self.case, given, outputs, grads, constant=constant)

    def _contestant(self, name: str, function: Function, outputs: tuple[Tensor, ...]) -> Contestant:
        """What is timed is the function and autograd, and as little Python as can be around them."""
        sets = self.sets
        arguments = [given.arguments for given in self._operands]
        leaves = [list(given.leaves.values()) for given in self._operands]
        grads = [given.grads_of(outputs) for given in self._operands]

        def both(index: int) -> object:
            k = index % sets
            return torch.autograd.grad(function(*arguments[k]), leaves[k], grads[k])

        def forward(index: int) -> object:
            return function(*arguments[index % sets])

        def evaluate(index: int) -> object:
            with torch.no_grad():
                return function(*arguments[index % sets])

        def prepare(index: int) -> tuple[int, tuple[Tensor, ...]]:
            return index % sets, function(*arguments[index % sets])

        def backward(prepared: tuple[int, tuple[Tensor, ...]]) -> object:
            k, outputs = prepared
            return torch.autograd.grad(outputs, leaves[k], grads[k])

        if self.case.direction == "backward":
            return Contestant(name, backward, prepare)
        return Contestant(name, {"both": both, "forward": forward, "evaluate": evaluate}[self.case.direction])

    def _captured(self, eager: Contestant) -> Contestant:
        """The same as CUDA graphs, one for each set. Results are not read, so that all can share one pool."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side), _refusing_to_wait():
            for _ in range(3):
                eager.work(0)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graphs, pool = [], torch.cuda.graph_pool_handle()
        for index in range(self.sets):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                eager.work(index)
            graphs.append(graph)
        return Contestant(eager.name, lambda index: graphs[index % len(graphs)].replay())


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """A block in which what waits for the GPU raises, as it would while a graph is captured: a capture that
    fails leaves PyTorch's generator unusable for everything after it."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class _StepWork:
    """A whole training step. The networks' parameters and activations come from wherever training leaves them."""

    source = "training"
    BATCH = 128

    def __init__(self, device: torch.device, generator: torch.Generator) -> None:
        self.device, self._generator = device, generator
        self.sets = 8
        self.set_bytes = self.BATCH * 784 * 4

    def problem(self) -> str | None:
        return None

    def make_sets(self) -> None:
        shape = (self.BATCH, 784)
        self._data = [torch.rand(shape, generator=self._generator, device=self.device) for _ in range(self.sets)]
        seed = int(torch.randint(2**31, (), generator=self._generator, device=self.device).item())
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            self._model = MLP().to(self.device)

    def enter(self, method: Method) -> tuple[Contestant, float]:
        model = copy.deepcopy(self._model)
        function = method.step(model)
        error = check_step(model, function, self._data[0], constant=method.constant)
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
        data = self._data

        def step(index: int) -> None:
            optimizer.zero_grad()
            loss = function(data[index % len(data)])[0]
            loss.backward()
            optimizer.step()

        step(0)  # makes the optimizer's moments
        optimizer.zero_grad()  # gradients count as a step's own memory
        return Contestant(method.name, step), error
