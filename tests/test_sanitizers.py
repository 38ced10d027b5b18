"""The CPU kernels under the sanitizers: sanitizers/driver.cpp, on every instruction set that this machine has.

And, where there are a compiler and an emulator for it, on aarch64.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import INSTRUCTION_SETS

ROOT = Path(__file__).parent.parent
CPU = ROOT / "csrc" / "cpu"
DRIVER = ROOT / "tests" / "sanitizers" / "driver.cpp"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CPU / "kernels.cpp").exists(), reason="needs a checkout"),
]

NO_SUCH_KERNELS = 77  # what the driver exits with

SANITIZERS = {
    "memory": ["-Og", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],  # compiles in half of -O1's time
    "threads": ["-fsanitize=thread"],
}

# For the linker, in the place of kernels that nothing is going to run.
NO_KERNELS = """
#include "cpu/kernels.h"
namespace fusedvae::FUSEDVAE_ISA {
extern const Kernels table;
const Kernels table = {""};
}
"""


class Driver:
    """The driver, compiled with some options and otherwise as the extension is, with the kernels of some instruction
    sets."""

    def __init__(self, folder: Path, options: list[str], isas: Sequence[str]) -> None:
        build = runpy.run_path(str(ROOT / "setup.py"))
        try:
            compiler = build["find_compiler"]()
        except build["BuildError"] as reason:
            pytest.skip(str(reason))
        # -w: the sanitizers' own code keeps GCC from seeing what is initialised. Without the attribute, functions are
        # called; inlined with all that sanitizers add to them, they would take minutes to compile.
        common = ["-O1", "-g1", "-w", "-Dalways_inline="]
        compile_ = [*compiler.command, *build["CXX_FLAGS"], *common, *options]
        no_kernels = folder / "no_kernels.cpp"
        no_kernels.write_text(NO_KERNELS)
        sources = []  # the longest first
        for isa, flags in build["instruction_sets"](compiler.target).items():
            path = CPU / "kernels.cpp" if isa in isas else no_kernels
            sources.append((path, [f"-DFUSEDVAE_ISA={isa}", *flags]))
        sources += [(DRIVER, []), *((path, []) for path in CPU.glob("*.cpp") if path.name != "kernels.cpp")]
        objects = [folder / f"{number}.o" for number in range(len(sources))]
        self.kernels = objects[0]

        def compile_source(source: tuple[Path, list[str]], output: Path) -> None:
            path, flags = source
            _succeed([*compile_, *flags, f"-I{ROOT / 'csrc'}", "-c", str(path), "-o", str(output)])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_source, sources, objects))
        self._driver = folder / "driver"
        _succeed([*compile_, "-pthread", *map(str, objects), "-o", str(self._driver)])

    def run(self, isa: str, *cases: str, emulator: Sequence[str] = ()) -> None:
        command = [*emulator, str(self._driver), *cases]
        if (setarch := shutil.which("setarch")) and not emulator:
            # The thread sanitizer needs fixed address ranges free, which randomised addresses may be in.
            command = [setarch, "--addr-no-randomize", *command]
        environment = {**os.environ, "FUSEDVAE_CPU_ISA": isa, "TSAN_OPTIONS": "halt_on_error=1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
        if done.returncode == NO_SUCH_KERNELS:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.startswith(f"{isa}:")


def _succeed(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    return Driver(tmp_path_factory.mktemp("memory"), SANITIZERS["memory"], INSTRUCTION_SETS)


@pytest.fixture(scope="module")
def threads(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    return Driver(tmp_path_factory.mktemp("threads"), SANITIZERS["threads"], ["baseline"])


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_memory_and_undefined_behaviour(memory: Driver, isa: str):
    if isa not in INSTRUCTION_SETS:
        pytest.skip(f"this machine has no {isa}")
    memory.run(isa, "600")


def test_threads(threads: Driver):
    threads.run("baseline", "600", "small")


AARCH64 = ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump", "qemu-aarch64")
VECTOR_INSTRUCTIONS = {
    "multiply and add": r"\sfml[as]\s+v\d+\.4s",
    "two words to their product": r"\sumull\s+v\d+\.2d",
    "half precision to float32": r"\sfcvtl\s+v\d+\.4s, v\d+\.4h",
    "float32 to half precision": r"\sfcvtn\s+v\d+\.4h, v\d+\.4s",
}


def test_aarch64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = [tool for tool in AARCH64 if not shutil.which(tool)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (on Debian: apt install g++-aarch64-linux-gnu qemu-user)")
    compiler, disassembler, emulator = AARCH64
    monkeypatch.setenv("CXX", compiler)
    options = ["-static", "-fexpensive-optimizations"]  # the second as -O3 has it, to multiply and add at once
    driver = Driver(tmp_path, options, ["baseline"])
    driver.run("baseline", "120", emulator=[emulator])
    command = [disassembler, "-d", str(driver.kernels)]
    code = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    assert [name for name, pattern in VECTOR_INSTRUCTIONS.items() if not re.search(pattern, code)] == []
