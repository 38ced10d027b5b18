"""Builds the executor of PTX, loads it, and gives what it runs a face in Python.

The library is executor/; it is built once into build/ptx of the checkout, by ninja. For CUDA kernels the extension is
linked again there, of the objects that its last build has left and of executor/cuda_runtime.cpp in the CUDA runtime's
place; their PTX is read off the same objects.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

ROOT = Path(__file__).parents[2]
SOURCES = Path(__file__).parent / "executor"
FOLDER = ROOT / "build" / "ptx"
ARCHITECTURE = "sm_90"

# Each operation rounded by itself, and what rounding modes do left where it is.
FLAGS = [
    *("-std=c++20", "-O2", "-ftree-vectorize", "-march=native", "-ffp-contract=off", "-frounding-math"),
    *("-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
]


class UnavailableError(Exception):
    """Why the executor cannot be had, in a sentence."""


# --- building ---------------------------------------------------------------------------------------------------


def _native_objects() -> list[Path]:
    """The objects of the extension's last build."""
    folders = sorted((ROOT / "build").glob(f"native-*-{sys.implementation.cache_tag}"))
    objects = sorted(folders[0].glob("*.o")) if folders else []
    if not any(path.name.startswith("cuda_") for path in objects):
        raise UnavailableError("build the extension with CUDA kernels first: python setup.py build_ext --inplace")
    return objects


def is_built() -> bool:
    """Whether the extension's last build was of the sources as they are now."""
    ninja = runpy.run_path(str(ROOT / "setup.py"))["find_ninja"]()
    file = _native_objects()[0].parent / "build.ninja"
    done = subprocess.run([ninja, "-n", "-f", str(file)], cwd=ROOT, capture_output=True, text=True)
    return "no work to do" in done.stdout


def _ninja(write: Any) -> None:
    """Run ninja on a file that ``write`` has made, one process at a time."""
    setup = runpy.run_path(str(ROOT / "setup.py"))
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            file, command = setup["NinjaFile"](), setup["find_ninja"]()
            name = write(setup, file)
        except setup["BuildError"] as reason:
            raise UnavailableError(str(reason)) from None
        path = FOLDER / f"{name}.ninja"
        path.write_text(f"builddir = {FOLDER / name}\n{file.text}")
        done = subprocess.run([command, "-f", str(path)], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stdout[-6000:] + done.stderr[-2000:])


def _compiler(setup: dict[str, Any], file: Any) -> Any:
    compiler = setup["find_compiler"]()
    compile_ = [*compiler.command, *FLAGS, "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out"]
    file.rule("cxx", compile_, depfile="$out.d", deps="gcc")
    return compiler


@functools.cache
def build_library() -> Path:
    """The executor as a library."""
    library = FOLDER / "libptx.so"

    def write(setup: dict[str, Any], file: Any) -> str:
        compiler = _compiler(setup, file)
        file.rule("link", [*compiler.command, "-shared", "$in", "-o", "$out"])
        sources = sorted(path for path in SOURCES.glob("*.cpp") if path.name != "cuda_runtime.cpp")
        # The longest first.
        sources.sort(key=lambda path: path.stem not in ("floats", "integers", "comparisons"))
        file.build(library, "link", [file.build(FOLDER / f"{path.stem}.o", "cxx", [path]) for path in sources])
        return "library"

    _ninja(write)
    return library


@functools.cache
def build_extension() -> Path:
    """``fusedvae._C`` on the executor."""
    build_library()
    objects = _native_objects()
    extension = FOLDER / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"

    def write(setup: dict[str, Any], file: Any) -> str:
        compiler = _compiler(setup, file)
        cuda = setup["find_cuda"]()
        if isinstance(cuda, str):
            raise UnavailableError(cuda)
        nvcc = [cuda.nvcc, "-ccbin", compiler.program, "-std=c++17", "-O1", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        file.rule("nvcc", [*nvcc, "-MD", "-MF", "$out.d", "-c", "$in", "-o", "$out"], depfile="$out.d", deps="gcc")
        libraries = [f"-L{FOLDER}", "-lptx", "-Wl,-rpath,$ORIGIN"]
        file.rule("link", [*compiler.command, "-shared", "$in", "-o", "$out", *libraries])
        runtime = file.build(FOLDER / "cuda_runtime.o", "nvcc", [SOURCES / "cuda_runtime.cpp"])
        file.build(extension, "link", [*objects, runtime])
        return "extension"

    _ninja(write)
    return extension


def _cuobjdump() -> str:
    """It comes with CUDA and, too, with Triton."""
    folders = [os.environ.get("PATH", ""), str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    found = shutil.which("cuobjdump", path=os.pathsep.join(folders))
    if found is None:
        raise UnavailableError("needs cuobjdump, which comes with CUDA or Triton")
    return found


def cuda_programs() -> dict[str, str]:
    """The PTX of the CUDA kernels, off the objects of the extension's last build: by the architecture it is for.

    That for ARCHITECTURE where it was compiled in, else what was.
    """
    programs = {}
    for path in _native_objects():
        if not path.name.startswith("cuda_"):
            continue
        dump = subprocess.run([_cuobjdump(), "-ptx", str(path)], capture_output=True, text=True, check=True).stdout
        parts = re.split(r"^Fatbin (?:ptx|elf) code:\n=+\narch = (\w+)\n", dump, flags=re.MULTILINE)[1:]
        texts = {arch: text for arch, text in zip(parts[::2], parts[1::2], strict=True) if ".entry" in text}
        if texts:
            arch = ARCHITECTURE if ARCHITECTURE in texts else max(texts)
            programs[f"{path.stem} for {arch}"] = texts[arch][texts[arch].index(".version") :]
    return programs


# --- running ----------------------------------------------------------------------------------------------------


class KernelError(RuntimeError):
    """What a kernel did wrong, with the instruction and the thread."""


class Counts(NamedTuple):
    launches: int
    instructions: int
    """Of warps."""
    lane_instructions: int
    """Of threads that took part."""
    bytes_read: int
    """Of global memory."""
    bytes_written: int


def extent(tensor: Tensor) -> tuple[int, int]:
    """The address and the bytes that a tensor's elements lie in."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


class Library:
    """The executor in this process."""

    def __init__(self, path: Path) -> None:
        self._c = c = ctypes.CDLL(str(path))
        c.ptx_error.restype = c.ptx_profile.restype = ctypes.c_char_p
        c.ptx_parameter_bytes.restype = ctypes.c_size_t
        c.ptx_allow.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
        c.ptx_seed.argtypes = [ctypes.c_uint64]
        c.ptx_launch.argtypes = [
            *(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p),
            *(ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int),
        ]
        if "PTX_SEED" in os.environ:
            self.seed(int(os.environ["PTX_SEED"]))
        self.approximate(int(os.environ.get("PTX_APPROXIMATION_ERROR", "0")))

    def load(self, text: str) -> int:
        """The number of a module of this PTX."""
        number = self._c.ptx_load(text.encode())
        if number < 0:
            raise KernelError(self._c.ptx_error().decode())
        return number

    def offer(self, text: str) -> None:
        """Have this PTX loaded when the CUDA runtime launches a kernel of it."""
        self._c.ptx_offer(text.encode())

    def allow(self, *memory: tuple[int, int] | Tensor) -> None:
        """Let kernels touch this memory: addresses and bytes, or tensors."""
        for one in memory:
            self._c.ptx_allow(*(extent(one) if isinstance(one, Tensor) else one))

    def forget_all(self) -> None:
        """Let kernels touch no memory."""
        self._c.ptx_forget_all()

    def launch(
        self,
        module: int,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Iterable[Any],
        *,
        shared: int = 0,
    ) -> None:
        """Run a kernel on arguments: ctypes' numbers, or tensors, which it may then touch, and nothing else."""
        self.forget_all()
        values = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                self.allow(argument)
                argument = ctypes.c_uint64(argument.data_ptr())
            values.append(argument)
        addresses = (ctypes.c_void_p * max(len(values), 1))(*map(ctypes.addressof, values))
        sizes = [(ctypes.c_uint32 * 3)(*size, *[1] * (3 - len(size))) for size in (grid, block)]
        if self._c.ptx_launch(module, kernel.encode(), *sizes, shared, addresses, len(values)):
            raise KernelError(self._c.ptx_error().decode())

    def parameter_sizes(self, module: int, kernel: str) -> list[int]:
        """Bytes of a kernel's parameters."""
        count = self._c.ptx_parameters(module, kernel.encode())
        return [self._c.ptx_parameter_bytes(module, kernel.encode(), k) for k in range(count)]

    def seed(self, seed: int) -> None:
        """Settle the order of warps and blocks of the launches to come."""
        self._c.ptx_seed(seed)

    def approximate(self, units: int) -> None:
        """Have approximate functions be off by up to so many units in the last place."""
        self._c.ptx_approximate(units)

    def reset_counts(self) -> None:
        self._c.ptx_reset_counts()

    def counts(self) -> Counts:
        """What has been run since the last reset."""
        counts = (ctypes.c_uint64 * 5)()
        self._c.ptx_counts(counts)
        return Counts(*counts)

    def profile(self) -> list[tuple[str, int, int, int, str]]:
        """(kernel, line of the PTX, how often warps and lanes ran it, instruction), of all that were run."""
        rows = [line.split("\t") for line in self._c.ptx_profile().decode().splitlines()]
        return [(name, int(line), int(warps), int(lanes), text) for name, line, warps, lanes, text in rows]


@functools.cache
def library() -> Library:
    """The executor, built if it must be. Raises UnavailableError."""
    if os.uname().machine != "x86_64":
        raise UnavailableError("the executor is for x86-64")
    return Library(build_library())
