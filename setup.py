"""Builds the native extension, ``fusedvae._C``: CPU kernels always, CUDA kernels where nvcc is found.

The extension takes raw pointers and knows nothing of torch, so neither does this file: a build needs setuptools,
pybind11 and ninja. Ninja compiles in parallel and, in a checkout, only what an edit touched.

Without a working compiler the package still installs, runs on its other backends and says why:
``fusedvae/_build.json`` records what was compiled in or the reason that nothing was; ``fusedvae info`` shows it. A
wheel without the extension is tagged py3-none-any: nobody takes it for a platform's, which installers prefer.

Environment:
    CXX, CXXFLAGS, LDFLAGS   as everywhere, but for options that would change results or what the code runs on
    MAX_JOBS                 compiler processes at a time (default: ninja's choice)
    FUSEDVAE_REQUIRE_EXT=1   fail, rather than install without the extension (0 or nothing: do not)
    FUSEDVAE_CUDA=0 | 1      leave the CUDA kernels out | fail without them (default: where nvcc is found)
    FUSEDVAE_CUDA_ARCHS      compute capabilities, such as "90" or "8.0;9.0", which fails where the CUDA kernels cannot
                             be compiled for them (default: see DEFAULT_CUDA_ARCHS)
    CUDA_HOME                where nvcc is, if not on PATH
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
BINDINGS = CSRC / "bindings.cpp"
KERNELS = CSRC / "cpu" / "kernels.cpp"

IS_WRITABLE = os.access(".", os.W_OK)
BUILD = Path("build") if IS_WRITABLE else Path(tempfile.mkdtemp(prefix="fusedvae-"))
"""What builds leave: beside the sources, so that the next build is incremental; nothing if these are read-only."""
if not IS_WRITABLE:
    atexit.register(shutil.rmtree, BUILD, ignore_errors=True)

# csrc/cpu/kernels.cpp is compiled once an instruction set; csrc/cpu/dispatch.cpp chooses between them at run time.
BASELINE = {"baseline": []}
X86_64 = {
    **BASELINE,
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
        # GCC 12 warns of its own _mm512_undefined_ps, a screen or two at every use.
        *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    ],
}

# No -ffast-math: NaN and infinity must propagate. What is given up instead, errno and floating-point traps, nobody
# sees, and without it loops do not vectorise. No -fopenmp either: it would link a second OpenMP runtime, where the
# kernels share the one that torch has loaded.
CXX_FLAGS = [
    *("-std=c++17", "-O3", "-DNDEBUG", "-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math"),
]
NVCC_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden"]

# One binary for each generation, which serves every later chip of that generation too; PTX of the newest serves
# what comes after. Those that the installed nvcc does not know are left out. PTX for sm_90 is kept besides: it is what
# tests/ptx executes, and costs nothing to make.
DEFAULT_CUDA_ARCHS = ["80", "90", "100", "120"]
EXECUTED_CUDA_ARCH = "90"
OLDEST_CUDA_ARCH = 80

# Of the environment's options, those that give other results: NaN and infinity are what users look for.
CHANGES_RESULTS = re.compile(
    "-ffast-math|-Ofast|-funsafe-math-optimizations|-ffinite-math-only|-fassociative-math|-freciprocal-math"
    "|-fno-signed-zeros|-fapprox-func|-ffp-model=fast|-mdaz-ftz"
)
# And those that let instructions into all code which dispatch.cpp keeps for processors that have them.
CHANGES_INSTRUCTIONS = re.compile("-m(arch|cpu)=.*|-m(avx|sse[34]|ssse|fma|f16c|bmi|xop|amx).*")


class BuildError(Exception):
    """What stopped the build, in one sentence."""


class Compiler(NamedTuple):
    command: list[str]
    target: str
    version: str

    @property
    def program(self) -> str:
        """The compiler itself: the first word, or what that starts (CXX="ccache g++"); behind it come options."""
        return list(takewhile(lambda word: not word.startswith("-"), self.command))[-1]


class Cuda(NamedTuple):
    nvcc: str
    version: str
    archs: list[str]

    @property
    def ptx_archs(self) -> list[str]:
        return [arch for arch in self.archs if arch in (EXECUTED_CUDA_ARCH, self.archs[-1])]


def output_of(*command: str) -> str:
    """What a command prints. Raises BuildError if it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{shlex.join(command)}: {error.strerror}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise BuildError(f"{shlex.join(command)} failed: {said[0] if said else f'exit status {done.returncode}'}")
    return done.stdout.strip()


def find_compiler() -> Compiler:
    """The C++ compiler: CXX if set, else the one that built Python, else one by its usual name."""
    usual = [sysconfig.get_config_var("CXX") or "g++", "g++", "clang++", "c++"]
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else usual
    candidates = [words for words in map(shlex.split, wanted) if words]
    words = next((words for words in candidates if shutil.which(words[0])), None)
    if words is None:
        names = ", ".join(dict.fromkeys(words[0] for words in candidates))
        raise BuildError(f"no C++ compiler found (looked for {names}; on Debian: apt install g++)")
    target = output_of(*words, "-dumpmachine")
    if not target:
        raise BuildError(f"{shlex.join(words)} is no C++ compiler: -dumpmachine prints nothing")
    command = [words[0], *harmless("CXX", words[1:], target)]
    return Compiler(command, target, output_of(*command, "--version").partition("\n")[0])


def harmless(name: str, words: list[str], target: str) -> list[str]:
    """Options of an environment variable, without those that would do harm: see above."""
    patterns = [CHANGES_RESULTS, *([CHANGES_INSTRUCTIONS] if len(instruction_sets(target)) > 1 else [])]
    dropped = [word for word in words if any(pattern.fullmatch(word) for pattern in patterns)]
    if dropped:
        warn(f"left out of {name}: {shlex.join(dropped)}; the kernels choose their instructions when they run, exactly")
    return [word for word in words if word not in dropped]


def find_ninja() -> str:
    """The ninja of the build requirement, whose folder need not be on PATH; else the one that is there."""
    try:
        import ninja

        own = shutil.which("ninja", path=ninja.BIN_DIR)
    except ImportError:
        own = None
    found = own or shutil.which("ninja")
    if found is None:
        raise BuildError("ninja not found (pip install --force-reinstall ninja)")
    return found


def find_pybind11() -> str:
    """The folder of the build requirement's headers."""
    try:
        import pybind11
    except ImportError:
        raise BuildError("pybind11 not found (pip install pybind11)") from None
    return pybind11.get_include()


def find_cuda() -> Cuda | str:
    """The CUDA compiler and the architectures to compile for, or the reason that there are none."""
    if os.environ.get("FUSEDVAE_CUDA") == "0":
        return "switched off by FUSEDVAE_CUDA=0"
    if not cuda_sources():
        return "this version has no CUDA kernels"
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    if nvcc is None:
        return f"no nvcc in CUDA_HOME ({home})" if home else "no nvcc on PATH, and CUDA_HOME not set"
    try:
        known = re.findall(r"compute_(\d+)", output_of(nvcc, "--list-gpu-arch"))
        version = output_of(nvcc, "--version").splitlines()[-1]
    except BuildError as error:
        return str(error)
    archs = asked_cuda_archs()
    for arch in archs:
        if int(re.match(r"\d*", arch)[0] or 0) < OLDEST_CUDA_ARCH or arch.rstrip("af") not in known:
            able = ", ".join(arch for arch in known if int(arch) >= OLDEST_CUDA_ARCH)
            raise BuildError(f"FUSEDVAE_CUDA_ARCHS: expected some of {able}, which {nvcc} knows; got {arch!r}")
    archs = archs or [arch for arch in DEFAULT_CUDA_ARCHS if arch in known]
    archs.sort(key=lambda arch: int(re.match(r"\d*", arch)[0]))
    return Cuda(nvcc, version, archs) if archs else f"{nvcc} knows no architecture from sm_80 up"


def asked_cuda_archs() -> list[str]:
    """What FUSEDVAE_CUDA_ARCHS says, without dots."""
    return re.findall(r"[^;,\s]+", os.environ.get("FUSEDVAE_CUDA_ARCHS", "").replace(".", ""))


def cuda_sources() -> list[Path]:
    return sorted((CSRC / "cuda").glob("*.cu"))


class NinjaFile:
    """Collects the statements of a build.ninja. ``$in``, ``$out`` and ``$flags`` are for ninja to fill in."""

    def __init__(self) -> None:
        self.text = "ninja_required_version = 1.3\n"

    def rule(self, name: str, command: list[str], **variables: str) -> None:
        words = (word if word.startswith("$") else self._shell([word]) for word in command)
        self._block(f"rule {name}", command=" ".join(words), **variables)

    def build(self, output: Path, rule: str, inputs: list[Path], flags: list[str] | None = None) -> Path:
        sources = " ".join(map(self._path, inputs))
        self._block(f"build {self._path(output)}: {rule} {sources}", flags=self._shell(flags or []))
        return output

    def _block(self, head: str, **variables: str) -> None:
        self.text += f"\n{head}\n" + "".join(f"  {name} = {value}\n" for name, value in variables.items())

    @staticmethod
    def _shell(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    @staticmethod
    def _path(path: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))


def write_ninja_file(folder: Path, library: Path, compiler: Compiler, cuda: Cuda | None) -> Path:
    """Write the build.ninja in ``folder`` that makes ``library``."""
    pybind11 = find_pybind11()
    ninja = NinjaFile()
    extra, ldflags = (
        harmless(name, shlex.split(os.environ.get(name, "")), compiler.target) for name in ("CXXFLAGS", "LDFLAGS")
    )
    dependencies = {"depfile": "$out.d", "deps": "gcc"}  # rebuild just what an edited header reaches
    compile_ = [*compiler.command, *CXX_FLAGS, f"-I{CSRC}", "$flags", *extra, "-MD", "-MF", "$out.d"]
    ninja.rule("cxx", [*compile_, "-c", "$in", "-o", "$out"], description="compile $out", **dependencies)

    # Headers that are not ours get -isystem: their warnings are not ours either.
    headers = [f"-isystem{path}" for path in (sysconfig.get_path("include"), pybind11)]
    macros = ["-DFUSEDVAE_WITH_CUDA"] if cuda else []
    objects = []
    if cuda:
        nvcc = [cuda.nvcc, "-ccbin", compiler.program]
        kinds = {arch: ["sm", "compute"] if arch in cuda.ptx_archs else ["sm"] for arch in cuda.archs}
        targets = [
            f"-gencode=arch=compute_{arch},code=[{','.join(f'{kind}_{arch}' for kind in kinds[arch])}]"
            for arch in cuda.archs
        ]
        own = [] if cuda.archs[-1].isdigit() else ["-DFUSEDVAE_NEWEST_ARCH_IS_ONE_CHIP"]
        ptx = [arch for arch in cuda.ptx_archs if arch.isdigit()]
        own += [f"-DFUSEDVAE_OLDEST_PTX={ptx[0]}0"] if ptx else []
        device = [*nvcc, *NVCC_FLAGS, f"-I{CSRC}", *targets, *own, "-MD", "-MF", "$out.d"]
        ninja.rule("nvcc", [*device, "-c", "$in", "-o", "$out"], description="compile $out", **dependencies)
        # Before all else, the longest first: what comes last is compiled while other processors have nothing to do.
        for source in sorted(cuda_sources(), key=lambda path: not path.stem.startswith("objective")):
            objects.append(ninja.build(folder / f"cuda_{source.stem}.o", "nvcc", [source]))
    objects += [ninja.build(folder / "bindings.o", "cxx", [BINDINGS], [*headers, *macros])]
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        if source != KERNELS:
            objects.append(ninja.build(folder / f"cpu_{source.stem}.o", "cxx", [source]))
    for isa, flags in instruction_sets(compiler.target).items():
        macro = f"-DFUSEDVAE_ISA={isa}"
        objects.append(ninja.build(folder / f"cpu_kernels_{isa}.o", "cxx", [KERNELS], [macro, *flags]))

    link = [*compiler.command, "-shared"]
    if "darwin" in compiler.target:
        link = [*compiler.command, "-bundle", "-undefined", "dynamic_lookup"]
    if cuda:
        # The CUDA runtime is linked in: the extension then works beside whichever one torch came with.
        link = [*nvcc, "-shared", "-cudart=static", "-Xlinker=--exclude-libs=ALL"]
    if cuda:  # to which commas separate options
        ldflags = ["-Xcompiler=" + flag.replace(",", "\\,") for flag in ldflags]
    ninja.rule("link", [*link, "$in", "-o", "$out", *ldflags], description="link $out")
    ninja.build(library, "link", objects)

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "build.ninja"
    path.write_text(f"builddir = {folder}\n{ninja.text}")
    return path


def instruction_sets(target: str) -> dict[str, list[str]]:
    return X86_64 if target.startswith(("x86_64", "amd64")) else BASELINE


def run_ninja(ninja: str, file: Path) -> None:
    """Run ninja, its output shown. Raises BuildError with the first error in it."""
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    command = [ninja, "-f", str(file), *jobs]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise BuildError(f"{ninja}: {error.strerror}") from error
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.strip())
    if process.wait():
        errors = (line for line in lines if re.search(r"\b(error|fatal)\b\s*:|undefined reference", line))
        first = next(errors, lines[-1] if lines else f"ninja: exit status {process.returncode}")
        hint = " (on Debian: apt install python3-dev)" if "Python.h" in first else ""
        raise BuildError(first + hint)


def build_native() -> tuple[Path, dict]:
    """Build the extension in a folder that outlives the command, so that the next build is incremental.

    Returns its path and what is in it, as ``_build.json`` records it. Raises BuildError.
    """
    ninja, compiler, cuda = find_ninja(), find_compiler(), find_cuda()
    folder = BUILD / f"native-{compiler.target}-{sys.implementation.cache_tag}"
    library = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"

    if isinstance(cuda, Cuda):
        try:
            run_ninja(ninja, write_ninja_file(folder, library, compiler, cuda))
        except BuildError as error:
            cuda = f"compiling them failed: {error}"
    if isinstance(cuda, str):
        if asked := request_for_cuda():
            raise BuildError(f"{asked}, but no CUDA kernels: {cuda}")
        if cuda_sources():
            warn(f"the CUDA kernels were not compiled: {cuda}")
        run_ninja(ninja, write_ninja_file(folder, library, compiler, None))

    if not library.exists():
        raise BuildError(f"{shlex.join(compiler.command)} has made nothing")
    record = {"cpu": list(instruction_sets(compiler.target)), "compiler": compiler.version}
    if isinstance(cuda, Cuda):
        archs = [*(f"sm_{arch}" for arch in cuda.archs), *(f"compute_{arch}" for arch in cuda.ptx_archs)]
        return library, {**record, "cuda": archs, "cuda_compiler": cuda.version, "cuda_absent": None}
    return library, {**record, "cuda": None, "cuda_compiler": None, "cuda_absent": cuda}


def request_for_cuda() -> str | None:
    """The variable that asks for CUDA kernels, and what it says."""
    names = ("FUSEDVAE_CUDA", "FUSEDVAE_CUDA_ARCHS")
    said = {name: os.environ.get(name, "").strip() for name in names}
    if said["FUSEDVAE_CUDA"] == "0":
        return None
    return next((f"{name}={value}" for name, value in said.items() if value), None)


def warn(message: str) -> None:
    print(f"\nfusedvae: WARNING: {message}\n", file=sys.stderr, flush=True)


class BuildNative(build_ext):
    """``build_ext`` through ninja, which also leaves ``_build.json``, the record of what it built, beside ``_C``."""

    def run(self) -> None:
        version = self.distribution.get_version()
        library, record, error = None, {}, None
        try:
            library, record = build_native()
        except BuildError as failure:
            error = str(failure)
            # What was asked for by name cannot be had: nothing else takes its place.
            required = os.environ.get("FUSEDVAE_REQUIRE_EXT", "").strip() not in ("", "0") or bool(request_for_cuda())
            # Whoever builds in place by hand is at work on the kernels: for them a failure is a failure.
            if required or (self.inplace and not self.editable_mode):
                raise SystemExit(f"error: the native kernels were not compiled: {error}") from None
            warn(f"installing without the native kernels, which were not compiled: {error}")

        self.has_built = library is not None
        folders = [Path(self.build_lib) / "fusedvae"]
        if self.inplace or self.editable_mode:
            folders.append(Path("fusedvae"))
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            # Never written over in place: a running process may have it mapped. Nor left from an earlier build.
            installed = folder / Path(self.get_ext_filename("fusedvae._C")).name
            installed.unlink(missing_ok=True)
            if library:
                shutil.copy2(library, installed)
            text = json.dumps({"version": version, "error": error, **record}, indent=2)
            (folder / "_build.json").write_text(f"{text}\n")

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "fusedvae"
        extension = folder / Path(self.get_ext_filename("fusedvae._C")).name
        return [str(path) for path in (extension, folder / "_build.json") if path.exists()]


class TaggedWheel(bdist_wheel):
    """``bdist_wheel`` that says of a wheel without the extension that it has none."""

    def get_tag(self) -> tuple[str, str, str]:
        if getattr(self.get_finalized_command("build_ext"), "has_built", True):
            return super().get_tag()
        self.root_is_pure = True
        return "py3", "none", "any"


if __name__ == "__main__":
    elsewhere = {"build": {"build_base": str(BUILD)}, "egg_info": {"egg_base": str(BUILD)}}
    setup(
        ext_modules=[Extension("fusedvae._C", sources=[str(BINDINGS)])],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": TaggedWheel},
        options={} if IS_WRITABLE else elsewhere,
    )
