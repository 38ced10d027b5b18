"""The emulation of CUDA's execution model in tests/cuda: right kernels give what a GPU gives, wrong ones are caught."""

from __future__ import annotations

import itertools
import math
import os
import platform
import runpy
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pybind11
import pytest
import torch
from test_noise import philox4x32

ROOT = Path(__file__).parent.parent
EMULATION = ROOT / "tests" / "cuda"
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or not (EMULATION / "emulation.cpp").exists(),
    reason="needs a checkout, on x86-64",
)

# The instrumentation alone, without ThreadSanitizer's library: emulation.cpp has what it calls.
INSTRUMENTATION = ["-fsanitize=thread", "-fno-threadsafe-statics"]
SEEDS = range(6)


class Build:
    """Compiles CUDA sources for the host, instrumented."""

    def __init__(self, folder: Path) -> None:
        build = runpy.run_path(str(ROOT / "setup.py"))
        try:
            self.compiler = build["find_compiler"]().command
        except build["BuildError"] as reason:
            pytest.skip(str(reason))
        self.folder = folder
        self.flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-Wall", "-Wextra", f"-I{EMULATION / 'include'}"]

    def cuda(self, source: Path, *flags: str) -> Path:
        macro = "-DFUSEDVAE_CUDA_EMULATION"
        return self.object(source, *INSTRUMENTATION, "-x", "c++", macro, f"-I{ROOT / 'csrc'}", *flags)

    def object(self, source: Path, *flags: str) -> Path:
        output = self.folder / f"{source.stem}.o"
        self.run([*self.compiler, *self.flags, *flags, "-c", str(source), "-o", str(output)])
        return output

    def link(self, name: str, objects: list[Path], *flags: str) -> Path:
        self.run([*self.compiler, *map(str, objects), "-o", str(self.folder / name), *flags])
        return self.folder / name

    @staticmethod
    def run(command: list[str]) -> None:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout


# --- the emulation itself ---------------------------------------------------------------------------------------


class Kernels:
    """The kernels of cuda/kernels.cu."""

    def __init__(self, folder: Path) -> None:
        build = Build(folder)
        objects = [build.object(EMULATION / "emulation.cpp"), build.cuda(EMULATION / "kernels.cu")]
        self.program = build.link("kernels", objects)

    def start(self, name: str, argument: int, seed: int, given: str = "") -> subprocess.CompletedProcess:
        environment = {**os.environ, "FUSEDVAE_EMULATION_SEED": str(seed)}
        return subprocess.run(
            [str(self.program), name, str(argument)], input=given, capture_output=True, text=True, env=environment
        )

    def run(self, name: str, argument: int = 0, seed: int = 0, given: str = "") -> list[float]:
        """What the kernel wrote."""
        done = self.start(name, argument, seed, given)
        assert done.returncode == 0, done.stderr
        return [float(line) for line in done.stdout.split()]

    def error(self, name: str, argument: int = 0, seed: int = 0) -> str:
        """The message with which the kernel was stopped."""
        done = self.start(name, argument, seed)
        assert done.returncode != 0, f"{name} was not stopped; it gave {done.stdout}"
        return done.stderr


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(tmp_path_factory.mktemp("kernels"))


def block_sums(count: int) -> list[float]:
    values = [i % 7 for i in range(count)]
    blocks = 2 * math.ceil(count / 192)
    return [sum(values[96 * b : 96 * (b + 1)]) for b in range(blocks)]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_kernel_passes_every_check(kernels: Kernels, seed: int) -> None:
    assert kernels.run("sums", 1000, seed) == block_sums(1000)
    assert kernels.run("reversed", 0, seed) == list(range(31, -1, -1))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "access"),
    [
        ("sums, no barrier before reading", "(reads|writes)"),
        ("sums, no barrier before writing again", "(reads|writes)"),
        ("reversed, no barrier", "(reads|writes)"),
    ],
)
def test_a_missing_barrier_is_a_race(kernels: Kernels, name: str, access: str, seed: int) -> None:
    message = kernels.error(name, 1000, seed)
    assert "shared memory that" in message
    assert "emulation: " in message


def test_a_wrong_mask_is_caught(kernels: Kernels) -> None:
    # The last lane may be gone before the others name it, or while they wait for it.
    for seed in SEEDS:
        message = kernels.error("sums, mask too wide", 1000, seed)
        assert "names lane 31, which has finished" in message or "waits for ever at __shfl_down_sync" in message
    assert "not in its own mask" in kernels.error("mask of another lane", 32)
    assert "names lanes that this warp does not have" in kernels.error("mask of more lanes", 40)
    assert kernels.run("mask of more lanes", 64) == []
    assert "with mask" in kernels.error("mask that others do not share", 32)


def test_other_mistakes_are_caught(kernels: Kernels) -> None:
    assert "waits for ever at __syncthreads" in kernels.error("divergent barrier")
    assert "has not written" in kernels.error("unwritten")
    assert kernels.run("vector by intrinsic", 4) == [26]
    assert "misaligned" in kernels.error("vector by intrinsic", 1)


def test_shuffles_and_votes(kernels: Kernels) -> None:
    values = torch.tensor(kernels.run("warp"), dtype=torch.float64).view(16, 32).tolist()
    lanes, rows = range(32), iter(values)
    for width in (32, 8):
        first = [lane // width * width for lane in lanes]
        assert next(rows) == [f + 5 for f in first]
        assert next(rows) == [(lane - 3 if lane - 3 >= f else lane) + 0.5 for lane, f in zip(lanes, first, strict=True)]
        assert next(rows) == [
            (lane + 3 if lane + 3 < f + width else lane) + 0.25 for lane, f in zip(lanes, first, strict=True)
        ]
        assert next(rows) == [lane ^ 6 for lane in lanes]
    assert next(rows) == [sum(1 << lane for lane in lanes if lane % 3 == 0)] * 32
    assert next(rows) == [1] * 32
    assert next(rows) == [0] * 32
    assert next(rows) == [lane ^ 1 for lane in lanes]
    poisoned = next(rows)
    assert all(map(math.isnan, poisoned[:16]))
    assert poisoned[16:] == [20] * 16
    assert next(rows) == [9] * 32
    assert next(rows) == [1] * 32
    assert next(rows) == [0] * 32


def test_a_seed_is_an_order_of_threads_and_blocks(kernels: Kernels) -> None:
    orders = [kernels.run("order", seed=seed) for seed in SEEDS]
    assert orders[0] == kernels.run("order", seed=0)
    assert len(set(map(tuple, orders))) == len(SEEDS)
    for tickets in orders:
        assert sorted(tickets) == list(range(256))
        assert any(abs(a - b) > 1 for a, b in itertools.pairwise(tickets))
    first_blocks = {tickets.index(0) // 64 for tickets in orders}
    assert len(first_blocks) > 1


def test_grids(kernels: Kernels) -> None:
    assert kernels.run("grid") == [1] * (2 * 3 * 4 * 5 * 2 * 3)
    assert kernels.run("last block") == [3, 0]
    assert kernels.run("refused") == [9, 9, 9, 9, 9, 0]


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_conversions(kernels: Kernels, name: str, dtype: torch.dtype) -> None:
    every = torch.arange(65536, dtype=torch.int32)
    values = every.to(torch.int16).view(dtype).float()
    widened = torch.tensor(kernels.run(f"{name} to float", given="\n".join(map(str, every.tolist()))))
    found = torch.tensor(widened.tolist(), dtype=torch.int64).to(torch.int32).view(torch.float32)
    torch.testing.assert_close(found, values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit(), values.signbit())

    # Every value, its neighbours, the ties between values and what is next to them; and any bits.
    middles = (values[:-1].double() + values[1:].double()).float() / 2
    exact = torch.cat((values, middles))
    bits = exact[exact.isfinite()].view(torch.int32)
    bits = torch.cat((bits, bits + 1, bits - 1, torch.randint(-(2**31), 2**31, (100_000,)).to(torch.int32)))
    given = "\n".join(str(b & 0xFFFFFFFF) for b in bits.tolist())
    narrowed = torch.tensor(kernels.run(f"float to {name}", given=given)).to(torch.int32)
    expected = bits.view(torch.float32).to(dtype)
    found = narrowed.to(torch.int16).view(dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit()[~found.isnan()], expected.signbit()[~found.isnan()])


def test_the_integers_of_the_noise_are_bit_for_bit_those_of_philox(kernels: Kernels) -> None:
    generator = np.random.default_rng(20110101)
    count = 500
    numbers, seeds = (generator.integers(0, 2**64, count, dtype=np.uint64) for _ in range(2))
    given = "\n".join(f"{n} {s}" for n, s in zip(numbers.tolist(), seeds.tolist(), strict=True))
    words = np.array(kernels.run("philox", count, given=given)).astype(np.uint64).reshape(count, 4)
    for n, s, found in zip(numbers.tolist(), seeds.tolist(), words, strict=True):
        counter = np.array([[n % 2**32, n >> 32, 0, 0]], dtype=np.uint64)
        assert np.array_equal(found, philox4x32(counter, (s % 2**32, s >> 32))[0])


# --- the package's kernels --------------------------------------------------------------------------------------


class Extension:
    """``fusedvae._C``, with CUDA kernels that are emulated and serve CPU tensors: see cuda/serve_cpu.cpp."""

    def __init__(self, folder: Path) -> None:
        build = Build(folder)
        include = [f"-isystem{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
        csrc = f"-I{ROOT / 'csrc'}"
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            kernels = [pool.submit(build.cuda, source) for source in KERNELS]
            kernels += [
                pool.submit(build.object, EMULATION / "emulation.cpp"),
                pool.submit(build.object, EMULATION / "serve_cpu.cpp", csrc),
            ]
            bindings = pool.submit(build.object, ROOT / "csrc" / "bindings.cpp", csrc, "-O0", *include)
        build.link("libkernels.so", [k.result() for k in kernels], "-shared")
        library = [f"-L{folder}", "-lkernels", "-Wl,-rpath,$ORIGIN"]
        self.path = build.link("_C.so", [bindings.result()], "-shared", *library)

    def run(self, *command: str, seed: int = 0) -> str:
        """What Python prints that runs on this extension."""
        environment = {
            **os.environ,
            "FUSEDVAE_EMULATED_EXTENSION": str(self.path),
            "FUSEDVAE_EMULATION_SEED": str(seed),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(EMULATION), str(ROOT / "tests")]),
        }
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        return done.stdout

    def test(self, *arguments: str, seed: int = 0) -> None:
        """Run tests of this folder, those of the native backend."""
        options = ["-p", "emulated_extension", "-p", "no:cacheprovider", "-q", "-x"]
        self.run("-m", "pytest", *options, *arguments, seed=seed)


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Extension:
    return Extension(tmp_path_factory.mktemp("extension"))


needs_kernels = pytest.mark.skipif(not KERNELS, reason="this version has no CUDA kernels")


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("seed", [1, 2])
def test_no_order_of_threads_races(extension: Extension, seed: int) -> None:
    extension.test("tests/test_operations.py", "-k", "native and (layouts or sizes or dtypes or latent)", seed=seed)
    extension.test("tests/test_kernel_tasks.py", "-k", "native", seed=seed)
