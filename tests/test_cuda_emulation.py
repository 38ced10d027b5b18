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

from fusedvae.random import normal

ROOT = Path(__file__).parent.parent
EMULATION = ROOT / "tests" / "cuda"
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or not (EMULATION / "emulation.cpp").exists(),
    reason="needs a checkout, on x86-64",
)

CHECKS = {
    "memory": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    # The instrumentation alone, without ThreadSanitizer's library: emulation.cpp has what it calls.
    "races": ["-fsanitize=thread", "-fno-threadsafe-statics"],
}
SEEDS = range(6)


class Build:
    """Compiles CUDA sources for the host, with the instrumentation of one check."""

    def __init__(self, check: str, folder: Path) -> None:
        build = runpy.run_path(str(ROOT / "setup.py"))
        try:
            self.compiler = build["find_compiler"]().command
        except build["BuildError"] as reason:
            pytest.skip(str(reason))
        self.folder, self.check = folder, check
        self.flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-Wall", "-Wextra", f"-I{EMULATION / 'include'}"]

    def cuda(self, source: Path, *flags: str) -> Path:
        macro = "-DFUSEDVAE_CUDA_EMULATION"
        return self.object(source, *CHECKS[self.check], "-x", "c++", macro, f"-I{ROOT / 'csrc'}", *flags)

    def object(self, source: Path, *flags: str) -> Path:
        output = self.folder / f"{source.stem}.o"
        self.run([*self.compiler, *self.flags, *flags, "-c", str(source), "-o", str(output)])
        return output

    def link(self, name: str, objects: list[Path], *flags: str) -> Path:
        library = [] if self.check == "races" else CHECKS[self.check]
        self.run([*self.compiler, *library, *map(str, objects), "-o", str(self.folder / name), *flags])
        return self.folder / name

    @staticmethod
    def run(command: list[str]) -> None:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout


# --- the emulation itself ---------------------------------------------------------------------------------------


class Kernels:
    """The kernels of cuda/kernels.cu."""

    def __init__(self, check: str, folder: Path) -> None:
        build = Build(check, folder)
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
def memory(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels("memory", tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="module")
def races(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels("races", tmp_path_factory.mktemp("races"))


@pytest.fixture(params=["memory", "races"])
def checked(request: pytest.FixtureRequest) -> Kernels:
    """With either check."""
    return request.getfixturevalue(request.param)


def block_sums(count: int) -> list[float]:
    values = [i % 7 for i in range(count)]
    blocks = 2 * math.ceil(count / 192)
    return [sum(values[96 * b : 96 * (b + 1)]) for b in range(blocks)]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_kernel_passes_every_check(checked: Kernels, seed: int) -> None:
    assert checked.run("sums", 1000, seed) == block_sums(1000)
    assert checked.run("reversed", 0, seed) == list(range(31, -1, -1))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "access"),
    [
        ("sums, no barrier before reading", "(reads|writes)"),
        ("sums, no barrier before writing again", "(reads|writes)"),
        ("reversed, no barrier", "(reads|writes)"),
    ],
)
def test_a_missing_barrier_is_a_race(races: Kernels, name: str, access: str, seed: int) -> None:
    message = races.error(name, 1000, seed)
    assert "shared memory that" in message
    assert "emulation: " in message


def test_a_missing_barrier_gives_wrong_sums_in_some_order(memory: Kernels) -> None:
    for fault in ("no barrier before reading", "no barrier before writing again"):
        results = [memory.run(f"sums, {fault}", 1000, seed) for seed in SEEDS]
        assert any(found != block_sums(1000) for found in results), fault


def test_an_out_of_bounds_tail_is_caught(memory: Kernels) -> None:
    assert memory.run("sums, tail out of bounds", 192 * 5) == block_sums(192 * 5)
    assert "heap-buffer-overflow" in memory.error("sums, tail out of bounds", 1000)


def test_a_wrong_mask_is_caught(checked: Kernels) -> None:
    # The last lane may be gone before the others name it, or while they wait for it.
    for seed in SEEDS:
        message = checked.error("sums, mask too wide", 1000, seed)
        assert "names lane 31, which has finished" in message or "waits for ever at __shfl_down_sync" in message
    assert "not in its own mask" in checked.error("mask of another lane", 32)
    assert "names lanes that this warp does not have" in checked.error("mask of more lanes", 40)
    assert checked.run("mask of more lanes", 64) == []
    assert "with mask" in checked.error("mask that others do not share", 32)


def test_other_mistakes_are_caught(memory: Kernels, races: Kernels) -> None:
    assert "waits for ever at __syncthreads" in memory.error("divergent barrier")
    assert math.isnan(memory.run("unwritten")[0])
    assert memory.run("unwritten")[1:] == [1, 1, 1]
    assert "has not written" in races.error("unwritten")
    for load in ("vector", "vector by intrinsic"):
        assert memory.run(load, 4) == [26]
        assert "misaligned" in memory.error(load, 1)


def test_shuffles_and_votes(checked: Kernels) -> None:
    values = torch.tensor(checked.run("warp"), dtype=torch.float64).view(16, 32).tolist()
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


def test_a_seed_is_an_order_of_threads_and_blocks(memory: Kernels) -> None:
    orders = [memory.run("order", seed=seed) for seed in SEEDS]
    assert orders[0] == memory.run("order", seed=0)
    assert len(set(map(tuple, orders))) == len(SEEDS)
    for tickets in orders:
        assert sorted(tickets) == list(range(256))
        assert any(abs(a - b) > 1 for a, b in itertools.pairwise(tickets))
    first_blocks = {tickets.index(0) // 64 for tickets in orders}
    assert len(first_blocks) > 1


def test_grids(memory: Kernels) -> None:
    assert memory.run("grid") == [1] * (2 * 3 * 4 * 5 * 2 * 3)
    assert memory.run("last block") == [3, 0]
    assert memory.run("refused") == [9, 9, 9, 9, 9, 0]


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_conversions(memory: Kernels, name: str, dtype: torch.dtype) -> None:
    every = torch.arange(65536, dtype=torch.int32)
    values = every.to(torch.int16).view(dtype).float()
    widened = torch.tensor(memory.run(f"{name} to float", given="\n".join(map(str, every.tolist()))))
    found = torch.tensor(widened.tolist(), dtype=torch.int64).to(torch.int32).view(torch.float32)
    torch.testing.assert_close(found, values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit(), values.signbit())

    # Every value, its neighbours, the ties between values and what is next to them; and any bits.
    middles = (values[:-1].double() + values[1:].double()).float() / 2
    exact = torch.cat((values, middles))
    bits = exact[exact.isfinite()].view(torch.int32)
    bits = torch.cat((bits, bits + 1, bits - 1, torch.randint(-(2**31), 2**31, (100_000,)).to(torch.int32)))
    given = "\n".join(str(b & 0xFFFFFFFF) for b in bits.tolist())
    narrowed = torch.tensor(memory.run(f"float to {name}", given=given)).to(torch.int32)
    expected = bits.view(torch.float32).to(dtype)
    found = narrowed.to(torch.int16).view(dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit()[~found.isnan()], expected.signbit()[~found.isnan()])


def test_the_integers_of_the_noise_are_bit_for_bit_those_of_philox(memory: Kernels) -> None:
    generator = np.random.default_rng(20110101)
    count = 500
    numbers, seeds = (generator.integers(0, 2**64, count, dtype=np.uint64) for _ in range(2))
    given = "\n".join(f"{n} {s}" for n, s in zip(numbers.tolist(), seeds.tolist(), strict=True))
    words = np.array(memory.run("philox", count, given=given)).astype(np.uint64).reshape(count, 4)
    for n, s, found in zip(numbers.tolist(), seeds.tolist(), words, strict=True):
        counter = np.array([[n % 2**32, n >> 32, 0, 0]], dtype=np.uint64)
        assert np.array_equal(found, philox4x32(counter, (s % 2**32, s >> 32))[0])


# --- the package's kernels --------------------------------------------------------------------------------------


class Extension:
    """``fusedvae._C``, with CUDA kernels that are emulated and serve CPU tensors: see cuda/serve_cpu.cpp."""

    def __init__(self, check: str, folder: Path) -> None:
        build = Build(check, folder)
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
        self._preloaded = ""
        if check == "memory":
            names = ("libasan.so", "libubsan.so")
            found = [subprocess.check_output([*build.compiler, f"-print-file-name={n}"], text=True) for n in names]
            self._preloaded = " ".join(path.strip() for path in found)

    def run(self, *command: str, seed: int = 0) -> str:
        """What Python prints that runs on this extension."""
        environment = {
            **os.environ,
            "FUSEDVAE_EMULATED_EXTENSION": str(self.path),
            "FUSEDVAE_EMULATION_SEED": str(seed),
            "LD_PRELOAD": self._preloaded,
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own are many
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
def checked_memory(tmp_path_factory: pytest.TempPathFactory) -> Extension:
    return Extension("memory", tmp_path_factory.mktemp("checked_memory"))


@pytest.fixture(scope="module")
def checked_races(tmp_path_factory: pytest.TempPathFactory) -> Extension:
    return Extension("races", tmp_path_factory.mktemp("checked_races"))


needs_kernels = pytest.mark.skipif(not KERNELS, reason="this version has no CUDA kernels")
TESTS = [
    f"tests/test_{name}.py"
    for name in (
        *("kernel_tasks", "operations", "divergences", "latents"),
        *("gradient_rules", "noise", "properties"),
    )
]


@pytest.mark.slow
@needs_kernels
def test_the_tests_of_the_kernels_pass_without_memory_errors(checked_memory: Extension) -> None:
    checked_memory.test(*TESTS, "-m", "not slow", "-k", "native")


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("seed", [1, 2])
def test_no_order_of_threads_races(checked_races: Extension, seed: int) -> None:
    checked_races.test("tests/test_operations.py", "-k", "native and (layouts or sizes or dtypes or latent)", seed=seed)
    checked_races.test("tests/test_kernel_tasks.py", "-k", "native", seed=seed)


@pytest.mark.slow
@needs_kernels
def test_no_order_of_threads_and_blocks_changes_a_bit(checked_races: Extension) -> None:
    digest = """
import hashlib, emulated_extension
from test_operations import run_everything
print(hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in run_everything("native"))).hexdigest())
"""
    assert len({checked_races.run("-c", digest, seed=seed) for seed in SEEDS}) == 1


@pytest.mark.slow
@needs_kernels
def test_normals_are_those_of_the_cpu_to_4_ulp(checked_races: Extension, tmp_path: Path) -> None:
    count, seed = 200_003, 20140501
    draw = f"import sys, torch; from fusedvae.random import normal; torch.save(normal({count}, {seed}), sys.argv[1])"
    checked_races.run("-c", f"import emulated_extension; {draw}", str(tmp_path / "emulated.pt"))
    emulated = torch.load(tmp_path / "emulated.pt").numpy()
    ours = normal(count, seed, backend="native").numpy()
    assert np.max(np.abs(emulated - ours) / np.spacing(np.abs(ours))) <= 4
