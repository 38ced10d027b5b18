"""The Triton kernels compiled for GPUs that need not be there: what becomes of registers and of memory accesses."""

from __future__ import annotations

import json
import operator
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
pytestmark = pytest.mark.slow

CHIPS = ["sm_80", "sm_90", "sm_100", "gfx942"]


def compile_for(chip: str, chosen: str = "", part: str = "0/1") -> list[dict[str, Any]]:
    """What became of variants: see the script."""
    script = Path(__file__).parent / "triton_ahead_of_time.py"
    done = subprocess.run([sys.executable, script, chip, chosen, part], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout)


def part_of(chip: str) -> str:
    """Every other variant is compiled, for one of the chips; all for each of them if TRITON_WHOLE=1, in ten minutes."""
    return "0/1" if os.environ.get("TRITON_WHOLE") == "1" else f"{CHIPS.index(chip)}/{2 * len(CHIPS)}"


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[str, Future]]:
    """What became of every launch of every variant, a list for each chip; two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {chip: pool.submit(compile_for, chip, "", part_of(chip)) for chip in CHIPS}


@pytest.fixture(params=CHIPS)
def launches(request: pytest.FixtureRequest, compiled: dict[str, Future]) -> list[dict[str, Any]]:
    return compiled[request.param].result()


def test_every_kernel_is_there(launches: list[dict[str, Any]]) -> None:
    names = {launch["kernel"] for launch in launches}
    assert names == {"normal_kernel", "latent_kernel", "elementwise_kernel", "objective_kernel", "scale_kernel"}


def test_nothing_is_spilled_and_threads_have_no_memory_of_their_own(
    launches: list[dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    found = [launch for launch in launches if launch["local"] != 0]
    if request.node.callspec.params["launches"] == "sm_100":
        # Of 16 elements with 64 registers, four words: to leave room for one more program is worth more than these.
        found = [launch for launch in found if (launch["kernel"], launch["local"]) != ("latent_kernel", 16)]
    assert found == []


@pytest.mark.parametrize("kind", ["ld", "st"])
def test_contiguous_operands_move_once_and_128_bits_at_a_time(launches: list[dict[str, Any]], kind: str) -> None:
    """The bytes that a program moves so are those of its tiles of the operands, no more and no less."""
    contiguous = [launch for launch in launches if launch["variant"].startswith("contiguous")]
    assert len(contiguous) >= 4 * 10
    assert any(launch[kind]["wanted"] > 0 for launch in contiguous)
    assert [launch for launch in contiguous if launch[kind]["wide"] != launch[kind]["wanted"]] == []
    # What is left are single values: a seed, a factor, sums.
    assert max(launch[kind]["others"] for launch in contiguous) <= 12


# No more than so many of an H100's own instructions an element, forward and backward, and how many elements a thread
# takes. While memory moves an element of bfloat16, a processor has time for some 80.
INSTRUCTIONS = {"float32": (86, 81), "bfloat16": (54, 53)}
A_THREAD = {"float32": 8, "bfloat16": 16}


@pytest.mark.skipif(VERSION < (3, 7), reason="older compilers make more of them")
def test_the_latent_executes_no_more_than_it_did() -> None:
    name = "contiguous analytic of logvar, "
    launches = compile_for("sm_90", f"^{name}({'|'.join(INSTRUCTIONS)})$")
    for dtype, limits in INSTRUCTIONS.items():
        passes = [launch for launch in launches if launch["variant"] == name + dtype]
        assert [launch["kernel"] for launch in passes] == ["latent_kernel"] * 2
        found = [launch["instructions"] / A_THREAD[dtype] for launch in passes]
        assert all(map(operator.le, found, limits)), (dtype, found, limits)
