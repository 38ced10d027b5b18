"""Timing, memory, launches: what is measured, and how.

Contestants take turns (A B C A B C ...), so that whatever else the machine does falls on all of them alike. A turn
begins with work that is not timed, after which caches and allocator are as the contestant itself leaves them; then it
repeats the work until that is long enough for the clock, and what it takes is divided by the repeats.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

WARM_UPS = 3
"""Repeats that are not counted: they fill caches, grow the allocator's pools and find the number of repeats."""
LONG_SECONDS = 0.2
"""Work that takes longer than this warms up twice, and its turns have no work that is not timed."""
MOST_REPEATS = 1000
DEFAULT_CACHE = 32 * 2**20
"""Bytes of the last cache where the system does not say."""


class Contestant(NamedTuple):
    """Something to be timed. Each repeat has an index of its own, to take other buffers than the last one did."""

    name: str
    work: Callable[[Any], object]
    """Timed. Takes what ``prepare`` gave, or the index."""
    prepare: Callable[[int], Any] | None = None
    """Not timed."""


def seconds_of(contestant: Contestant, device: torch.device, repeats: int = 1, first: int = 0) -> float:
    """Seconds that the contestant's work takes once, the mean over ``repeats`` in a row; 0 for none."""
    if not repeats:
        return 0.0
    indices = range(first, first + repeats)
    prepare, work = contestant.prepare, contestant.work
    prepared = list(indices) if prepare is None else [prepare(index) for index in indices]
    if device.type != "cuda":
        started = time.perf_counter()
        for item in prepared:
            work(item)
        return (time.perf_counter() - started) / repeats
    # Events are stamped by the GPU itself, between the kernels: the way from there to the host is not in the time.
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    for item in prepared:
        work(item)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / repeats


class Timings(NamedTuple):
    """Seconds of each contestant in each round, and how often a turn repeated its work."""

    seconds: dict[str, list[float]]
    repeats: dict[str, int]


def interleaved(
    contestants: Sequence[Contestant],
    device: torch.device,
    *,
    seconds: float,
    rounds: tuple[int, int],
    turn: float = 0.0,
    stop: Callable[[], bool] = lambda: False,
) -> Timings:
    """Time contestants by turns for about ``seconds``, at least and at most so many ``rounds`` of each.

    Args:
        turn: seconds that a turn should last; shorter work is repeated.
        stop: asked after each round; rounds that were finished by then count.
    """
    repeats, untimed = {}, {}
    for contestant in contestants:
        seconds_of(contestant, device)  # may compile, which says nothing about the work
        taken = [seconds_of(contestant, device)]
        while len(taken) < WARM_UPS - 1 and taken[0] < LONG_SECONDS:
            taken.append(seconds_of(contestant, device))
        repeats[contestant.name] = max(1, min(MOST_REPEATS, round(turn / max(min(taken), 1e-9))))
        untimed[contestant.name] = int(taken[0] < LONG_SECONDS)
    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    at_least, at_most = rounds
    collecting = gc.isenabled()
    gc.collect()
    _pass_over_what_is_left()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        for number in range(at_most):
            if stop() or (number >= at_least and time.perf_counter() > end):
                break
            for contestant in contestants:
                count, before = repeats[contestant.name], untimed[contestant.name]
                first = number * (before + count)
                seconds_of(contestant, device, before, first)
                times[contestant.name].append(seconds_of(contestant, device, count, first + before))
    finally:
        if collecting:
            gc.enable()
    return Timings(times, repeats)


@functools.cache
def _pass_over_what_is_left() -> None:
    """Have the collections before other timings not look again at what was there before the first: at the million
    objects that libraries make as they are imported, which takes longer than many a case."""
    gc.freeze()


class Profile(NamedTuple):
    """What some work asks of the machine, besides time."""

    peak_bytes: int
    """The most memory allocated at a time, beyond what was there before."""
    launches: int
    """Kernels, copies and fills launched on a GPU; operators dispatched by PyTorch on a CPU."""


def profiled(work: Callable[[], object], device: torch.device) -> Profile:
    """Run ``work`` once under PyTorch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with _silent_stderr():
        with torch.profiler.profile(activities=activities, profile_memory=device.type != "cuda") as profiler:
            result = work()  # kept, so that outputs count as allocated until the end
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    if device.type == "cuda":
        launches = sum(event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") for event in events)
        return Profile(torch.cuda.max_memory_allocated(device) - before, launches)
    return Profile(_peak(events), sum(event.get("cat") == "cpu_op" and _is_operator(event["name"]) for event in events))


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """A block without what the profiler's library, below Python, writes to stderr at every start and stop."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _is_operator(name: str) -> bool:
    """Whether a profiler's event is an operator, not a range that autograd or the compiler marks."""
    return "::" in name and not name.startswith("autograd::")


def _peak(events: list[dict[str, Any]]) -> int:
    """The most bytes held at a time, of those that were allocated within a trace.

    Releases are matched by address: the profiler also reports those of memory that was allocated before the trace.
    """
    changes = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    held: dict[int, int] = {}
    allocated = peak = 0
    for change in sorted(changes, key=lambda event: event["ts"]):
        address, count = change["args"]["Addr"], change["args"]["Bytes"]
        if count > 0:
            held[address] = count
            allocated += count
        else:
            allocated -= held.pop(address, 0)
        peak = max(peak, allocated)
    return peak


def calibration(device: torch.device) -> Contestant:
    """Work that never changes, on as many threads as everything else: what its times vary by is the machine's doing."""
    a, b = torch.rand(2, 2**17, device=device)
    out = torch.empty_like(a)
    return Contestant("calibration", lambda _: torch.mul(a, b, out=out))


def copying(count: int, sets: int, device: torch.device) -> Contestant:
    """A copy that moves ``count`` bytes, half of them read, half written, over as many buffers as the case has."""
    half = max(count // 2, 1)
    sources = [torch.ones(half, dtype=torch.uint8, device=device) for _ in range(sets)]
    targets = [torch.zeros(half, dtype=torch.uint8, device=device) for _ in range(sets)]
    return Contestant("copy", lambda index: targets[index % sets].copy_(sources[index % sets]))


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before the memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [DEFAULT_CACHE]
    found = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    if found:
        units = {"K": 2**10, "M": 2**20, "G": 2**30}
        texts = [path.read_text().strip() for path in found]
        sizes = [int(text.rstrip("KMG")) * units.get(text[-1:], 1) for text in texts]
    return max(sizes)


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return next((int(kibibytes) * 1024 for kibibytes in found), None)
