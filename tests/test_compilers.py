"""The CPU kernels as compilers other than GCC for x86-64 see them."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout")


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_clang_understands_the_kernels(isa: str) -> None:
    clang = shutil.which("clang++")
    if clang is None:
        pytest.skip("needs clang++")
    build = runpy.run_path(str(ROOT / "setup.py"))
    target = subprocess.run([clang, "-dumpmachine"], capture_output=True, text=True, check=True).stdout.strip()
    sets = build["instruction_sets"](target)
    if isa not in sets:
        pytest.skip(f"{target} has no {isa}")
    # GCC's names of warnings are not all Clang's.
    flags = [*build["CXX_FLAGS"], *sets[isa], "-Werror", "-Wno-unknown-warning-option", f"-DFUSEDVAE_ISA={isa}"]
    sources = [str(path) for path in (ROOT / "csrc" / "cpu").glob("*.cpp")]
    command = [clang, *flags, f"-I{ROOT / 'csrc'}", "-fsyntax-only", *sources]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
