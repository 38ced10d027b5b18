"""The CPU kernels under the sanitizers: sanitizers/driver.cpp, on every instruction set that this machine has."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CPU = ROOT / "csrc" / "cpu"
DRIVER = ROOT / "tests" / "sanitizers" / "driver.cpp"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CPU / "kernels.cpp").exists(), reason="needs a checkout"),
]

NO_SUCH_KERNELS = 77  # what the driver exits with

SANITIZERS = {
    "memory": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
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


class Sanitized:
    """The driver, compiled with a sanitizer and otherwise as the extension is, with the kernels of some instruction
    sets, or of all."""

    def __init__(self, sanitizer: str, folder: Path, *isas: str) -> None:
        build = runpy.run_path(str(ROOT / "setup.py"))
        try:
            compiler = build["find_compiler"]()
        except build["BuildError"] as reason:
            pytest.skip(str(reason))
        # -w: the sanitizers' own code keeps GCC from seeing what is initialised. Without the attribute, functions are
        # called; inlined with all that sanitizers add to them, they would take minutes to compile.
        options = ["-O1", "-g1", "-w", "-Dalways_inline="]
        compile_ = [*compiler.command, *build["CXX_FLAGS"], *options, *SANITIZERS[sanitizer]]
        no_kernels = folder / "no_kernels.cpp"
        no_kernels.write_text(NO_KERNELS)
        sources = []  # the longest first
        for isa, flags in build["instruction_sets"](compiler).items():
            path = CPU / "kernels.cpp" if not isas or isa in isas else no_kernels
            sources.append((path, [f"-DFUSEDVAE_ISA={isa}", *flags]))
        sources += [(DRIVER, []), *((path, []) for path in CPU.glob("*.cpp") if path.name != "kernels.cpp")]
        objects = [folder / f"{number}.o" for number in range(len(sources))]

        def compile_source(source: tuple[Path, list[str]], output: Path) -> None:
            path, flags = source
            _succeed([*compile_, *flags, f"-I{ROOT / 'csrc'}", "-c", str(path), "-o", str(output)])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_source, sources, objects))
        self._driver = folder / "driver"
        _succeed([*compile_, "-pthread", *map(str, objects), "-o", str(self._driver)])

    def run(self, isa: str, cases: int) -> None:
        command = [str(self._driver), str(cases)]
        if setarch := shutil.which("setarch"):
            # The thread sanitizer needs fixed address ranges free, which randomised addresses may be in.
            command = [setarch, "--addr-no-randomize", *command]
        environment = {**os.environ, "FUSEDVAE_CPU_ISA": isa, "TSAN_OPTIONS": "halt_on_error=1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode == NO_SUCH_KERNELS:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.startswith(f"{isa}:")


def _succeed(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Sanitized:
    return Sanitized("memory", tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="module")
def threads(tmp_path_factory: pytest.TempPathFactory) -> Sanitized:
    return Sanitized("threads", tmp_path_factory.mktemp("threads"), "baseline")


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_memory_and_undefined_behaviour(memory: Sanitized, isa: str):
    memory.run(isa, cases=2000)


def test_threads(threads: Sanitized):
    threads.run("baseline", cases=300)
