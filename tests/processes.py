"""Fresh processes, in which a test has something computed."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def results_of_processes(count: int, store: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``work(*arguments)`` gives in each of so many processes, by their ranks.

    gloo connects them, by way of the file ``store``, which is not there yet.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_report, args=(rank, count, store, results, work, *arguments)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    found = {}
    try:
        for _ in processes:
            rank, result, failure = results.get(timeout=120)
            assert failure is None, failure
            found[rank] = result
    finally:
        for process in processes:
            process.kill()
            process.join(10)
    return [found[rank] for rank in range(count)]


def _report(rank: int, count: int, store: Path, results: Any, work: Callable[..., Any], *arguments: Any) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
        results.put((rank, work(*arguments), None))
        dist.barrier()  # whoever is done first stays for the others
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
