"""The tests of the CPU's kernels over the Triton kernels, run in Triton's interpreter.

Whether kernels are compiled or interpreted is settled when they are imported, so this takes processes of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

SELECTIONS = {  # about as long as each other
    "kernels": ["triton", "kernel_tasks"],
    "likelihoods": ["likelihoods", "divergences", "accuracy"],
    "operations": ["operations", "latents"],
    "gradients and noise": ["gradient_rules", "inplace", "noise"],
}


def run(selection: list[str]) -> subprocess.CompletedProcess[str]:
    # The interpreter computes with numpy, which warns of the infinities and NaNs that these tests are after.
    options = [
        "-q",
        "-m",
        "not slow and not large",
        "-W",
        "ignore::RuntimeWarning",
        "-p",
        "no:cacheprovider",
        "--show-capture=no",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", *options, *(f"test_{name}.py" for name in selection)]
    return subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Future]]:
    """All selections, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, selection) for name, selection in SELECTIONS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", SELECTIONS)
def test_in_the_interpreter(runs: dict[str, Future], name: str) -> None:
    done = runs[name].result()
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert re.search(r"\b[1-9]\d* passed", done.stdout), done.stdout[-500:]
