"""The CPU kernels' threads: PyTorch's, wherever its OpenMP runtime is to be seen from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fusedvae

pytestmark = [
    pytest.mark.skipif("native" not in fusedvae.backends(), reason="no compiled extension here"),
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux"),
]

HIDE = """
import ctypes
load = ctypes.CDLL
ctypes.CDLL = lambda name, mode=ctypes.DEFAULT_MODE, **more: load(name, ctypes.DEFAULT_MODE, **more)
import torch
ctypes.CDLL = load
"""
"""Imports PyTorch as it is on processors where its runtime is not in the global scope."""

WORK = """
import ctypes, json, time
from pathlib import Path
import torch
is_global = hasattr(ctypes.CDLL(None), "GOMP_parallel")
from fusedvae import functional
from fusedvae.backend import native

def ticks():
    found = {}
    for stat in Path("/proc/self/task").glob("*/stat"):
        user, system = stat.read_text().rpartition(")")[2].split()[11:13]
        found[stat.parent.name] = int(user) + int(system)
    return found

torch.set_num_threads(2)
mu, logvar = torch.randn(2, 1 << 20)
functional.kl_standard_normal(mu, logvar)
before, start = ticks(), time.process_time()
while time.process_time() - start < 0.6:
    functional.kl_standard_normal(mu, logvar)
took = sorted(count - before.get(thread, 0) for thread, count in ticks().items())
runtime, working = native.BACKEND.openmp()
print(json.dumps({"is_global": is_global, "ticks": took, "runtime": runtime, "working": working}))
"""


def run(program: str) -> dict[str, Any]:
    # Threads that wait sleep, and so have no ticks.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2", "FUSEDVAE_BACKEND": "native"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=300, check=True
    )
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("before", ["", HIDE], ids=["as it comes", "hidden"])
def test_every_thread_works(before: str) -> None:
    found = run(before + WORK)
    if before:
        assert not found["is_global"]
    assert "omp" in Path(found["runtime"]).name
    assert found["working"] == 2
    *_, second, first = found["ticks"]
    assert second >= first / 3, found
