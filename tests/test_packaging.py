"""What a build makes: the sdist, the wheel, the extension in it, and the install that has to do without one.

Every build here works on a copy of the checkout.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import fusedvae

ROOT = Path(__file__).parent.parent
ONE_CHIP = os.environ.get("FUSEDVAE_CUDA_ARCHS") or "90"
"""What the wheel's CUDA kernels are compiled for: the install that these tests run with has them for every chip."""
GENERATED = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "*.so", "_build.json", "__pycache__")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout")


def run(*command: object, fails: bool = False, **environment: str) -> str:
    """What a command says; one that does not end as expected fails the test, and shows it."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        cwd="/",  # not the checkout, where the sources would be imported
        env={**os.environ, "PIP_CONSTRAINT": str(ROOT / "constraints.txt"), **environment},
    )
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT, tmp_path / "checkout", ignore=GENERATED))


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel made from it, each in an isolated build environment."""
    folder = tmp_path_factory.mktemp("dist")
    checkout = shutil.copytree(ROOT, folder / "checkout", ignore=GENERATED)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, checkout)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    source = folder / sdist.name.removesuffix(".tar.gz")
    # What this checkout's own build has left is compiled again only where a command differs, or a source or header: by
    # its time, or because it is not there.
    for built in (ROOT / "build").glob("native-*"):
        shutil.copytree(built, source / "build" / built.name)
    glibc = ""
    if shutil.which("gcc") and shutil.which("readelf") and sys.platform == "linux":
        glibc = run(sys.executable, source / "scripts" / "old_glibc.py", folder / "glibc", "2.28").strip()
    run(
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--outdir",
        folder,
        source,
        FUSEDVAE_REQUIRE_EXT="1",
        LDFLAGS=glibc,
        **({"FUSEDVAE_CUDA_ARCHS": ONE_CHIP} if shutil.which("nvcc") else {}),
    )
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (wheel,) = dist.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def extension(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extension")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if re.fullmatch(r"fusedvae/_C\..*\.so", name))
        return Path(archive.extract(name, folder))


class Venv:
    """An environment with nothing of its own; it sees what the tests run with, except the fusedvae there."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        (site_packages,) = folder.glob("lib/python*/site-packages")
        # A plain line adds the folder, but does not run the .pth files in it: that of an editable install, say.
        (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def install(self, *what: object, **environment: str) -> str:
        python = self.bin / "python"
        return run(sys.executable, "-m", "pip", "--python", python, "install", "-v", "--no-deps", *what, **environment)

    def run(self, command: str, *arguments: object) -> str:
        return run(self.bin / command, *arguments)


@pytest.fixture
def venv(tmp_path: Path) -> Venv:
    return Venv(tmp_path / "venv")


LOSS = "import torch, fusedvae; x = torch.ones(2, 3); print(fusedvae.__file__, fusedvae.ELBOLoss()(x, x, x, x).item())"


def test_setup_needs_only_the_build_requirements():
    tomllib = pytest.importorskip("tomllib")
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert {re.match(r"[\w-]+", requirement)[0] for requirement in requirements} == {"setuptools", "pybind11", "ninja"}
    without_torch = f"""
import os, runpy, sys
sys.modules["torch"] = sys.modules["fusedvae"] = None  # importing either raises
os.chdir({str(ROOT)!r})
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""
    assert run(sys.executable, "-W", "ignore", "-c", without_torch).split()[-1] == fusedvae.__version__


@pytest.mark.parametrize("command", ["g++", "ccache g++ -pthread", "g++ -pthread -B /opt/conda/compiler_compat"])
def test_nvcc_is_told_the_compiler_by_its_name_alone(command: str):
    build = runpy.run_path(str(ROOT / "setup.py"))
    assert build["Compiler"](command.split(), "", "").program == "g++"


def test_constraints_cover_the_requirements():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    required = {re.match(r"[\w-]+", r)[0] for r in [*project["dependencies"], *(r for extra in extras for r in extra)]}
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert required - {"fusedvae"} == pinned


def test_what_is_said_of_pythons_and_releases_agrees():
    tomllib = pytest.importorskip("tomllib")
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    said = re.findall(r"Python :: (3\.\d+)", "\n".join(pyproject["project"]["classifiers"]))
    assert pyproject["project"]["requires-python"] == f">={said[0]}"
    assert pyproject["tool"]["mypy"]["python_version"] == said[0]
    assert pyproject["tool"]["ruff"]["target-version"] == f"py{said[0].replace('.', '')}"
    wheels = pyproject["tool"]["cibuildwheel"]
    assert wheels["build"] == [f"cp{version.replace('.', '')}-*" for version in said]
    commands = " ".join(value for value in wheels.values() if isinstance(value, str))
    if not (ROOT / ".github").exists():  # it is in no sdist
        return
    texts = [commands, *(path.read_text() for path in (ROOT / ".github" / "workflows").glob("*.yml"))]
    named = {name for text in texts for name in re.findall(r"scripts/\w+\.\w+", text)}
    assert named >= {"scripts/test.sh", "scripts/test_torch.sh", "scripts/audit_wheel.sh", "scripts/try_wheel.py"}
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.slow
def test_sdist_has_what_a_build_and_a_reader_need(dist: Path):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert names >= sources | {"LICENSE", "README.md", "CHANGELOG.md", "constraints.txt", "scripts/test.sh"}
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build.json"))]


@pytest.mark.slow
def test_an_sdist_needs_no_network_but_for_its_requirements(small_checkout: Path, tmp_path: Path):
    """These are here: an index that is asked all the same, or anything else, is not."""
    offline = {"PIP_NO_INDEX": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, small_checkout)
    run(*build, **offline, FUSEDVAE_REQUIRE_EXT="0", FUSEDVAE_CUDA="0", FUSEDVAE_CUDA_ARCHS="")
    assert {path.suffix for path in tmp_path.glob("fusedvae-*")} == {".gz", ".whl"}


@pytest.mark.slow
def test_wheel_has_the_extension(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        record = json.loads(archive.read("fusedvae/_build.json"))
    assert any(re.fullmatch(r"fusedvae/_C\..*\.so", name) for name in names)
    assert "fusedvae/py.typed" in names
    folders = {name.partition("/")[0] for name in names}
    assert folders == {"fusedvae", f"fusedvae-{fusedvae.__version__}.dist-info"}
    assert record["version"] == fusedvae.__version__
    assert record["error"] is None
    assert "baseline" in record["cpu"]
    assert record["compiler"]
    if shutil.which("nvcc") and os.environ.get("FUSEDVAE_CUDA") != "0":
        assert record["cuda_absent"] is None
        assert {f"sm_{chip}" for chip in re.findall(r"\d+", ONE_CHIP)} <= set(record["cuda"])
        installed = json.loads((Path(fusedvae.__file__).parent / "_build.json").read_text())
        if installed["cuda_absent"] is None and "FUSEDVAE_CUDA_ARCHS" not in os.environ:
            assert {"sm_80", "sm_90"} <= set(installed["cuda"])


@pytest.mark.slow
def test_wheel_works_where_it_is_installed(wheel: Path, venv: Venv):
    venv.install(wheel)
    file, loss = venv.run("python", "-c", LOSS).split()
    assert Path(file).is_relative_to(venv.bin.parent)
    assert float(loss) == pytest.approx(3 * (1 + 2.718281828 - 1 - 1) / 2, rel=1e-6)
    info = venv.run("python", ROOT / "scripts" / "try_wheel.py")
    assert "CPU kernels for baseline" in info
    assert "uses native" in info


NO_COMPILER = {
    "absent": ("no-such-compiler", "no C++ compiler found (looked for no-such-compiler"),
    "failing": (shutil.which("false") or "false", "-dumpmachine failed: exit status 1"),
    "broken": ("{broken}", "csrc/cpu/dispatch.cpp:1:1: error: this compiler is broken"),
}
BROKEN = """#!/bin/sh
case $1 in
    -dumpmachine) echo x86_64-linux-gnu ;;
    --version) echo 'broken 1.0' ;;
    *) echo 'csrc/cpu/dispatch.cpp:1:1: error: this compiler is broken'; exit 1 ;;
esac
"""


@pytest.mark.parametrize("case", NO_COMPILER)
def test_a_build_without_a_compiler_says_why(case: str, small_checkout: Path, tmp_path: Path):
    broken = tmp_path / "broken"
    broken.write_text(BROKEN)
    broken.chmod(0o755)
    cxx, reason = NO_COMPILER[case]
    cxx = cxx.format(broken=broken)
    (warning,) = (line for line in built(small_checkout, CXX=cxx).splitlines() if "WARNING" in line)
    assert "installing without the native kernels" in warning
    assert reason in warning
    assert reason in built(small_checkout, fails=True, CXX=cxx, FUSEDVAE_REQUIRE_EXT="1")
    for asked in ({"FUSEDVAE_CUDA": "1"}, {"FUSEDVAE_CUDA": "", "FUSEDVAE_CUDA_ARCHS": "90"}):
        said = built(small_checkout, fails=True, CXX=cxx, **asked)
        assert "error: the native kernels were not compiled" in said


@pytest.mark.slow
def test_install_without_a_compiler(checkout: Path, venv: Venv, tmp_path: Path):
    cxx, reason = NO_COMPILER["absent"]
    environment = {"CXX": cxx, "CC": "false", "FUSEDVAE_CUDA": "0"}

    said = venv.install("--no-build-isolation", checkout, **environment, FUSEDVAE_REQUIRE_EXT="0")
    (warning,) = (line for line in said.splitlines() if "WARNING: installing without the native kernels" in line)
    assert reason in warning

    # It works all the same, and says what it lacks, why, and what to do.
    again = f"FUSEDVAE_REQUIRE_EXT=1 pip install --no-cache-dir --force-reinstall --no-deps {checkout}"
    said = venv.run("python", "-c", f"{LOSS}; fusedvae.ELBOLoss()(x.double(), x, x, x)")
    file, loss = next(line for line in said.splitlines() if "__init__.py 2.57" in line).split()
    assert said.count("UserWarning: fusedvae computes in plain PyTorch on 'cpu'") == 1
    assert reason in said
    assert again in said
    assert Path(file).is_relative_to(venv.bin.parent)
    assert float(loss) == pytest.approx(3 * (1 + 2.718281828 - 1 - 1) / 2, rel=1e-6)
    info = venv.run("fusedvae", "info")
    assert reason in info
    assert again in info
    assert "UserWarning" not in info
    assert "uses reference" in info

    # Unless it must not.
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, checkout]
    assert reason in run(*build, fails=True, **environment, FUSEDVAE_REQUIRE_EXT="1")


@pytest.mark.slow
def test_wheel_runs_on_the_distributions_that_a_release_is_for(wheel: Path, extension: Path):
    pytest.importorskip("auditwheel")
    if not shutil.which("readelf") or sys.platform != "linux":
        pytest.skip("needs binutils and Linux")
    said = run(sys.executable, "-m", "auditwheel", "show", wheel)
    tag = re.search(r'following platform\s+tag:\s+"manylinux_2_(\d+)_', said)
    assert tag, said
    assert int(tag[1]) <= 28, said
    # What has no version auditwheel does not see; the interpreter has its own names, and nobody else.
    symbols = [line.split() for line in run("readelf", "--dyn-syms", "--wide", extension).splitlines()]
    missing = [words[7] for words in symbols if words[4:5] == ["GLOBAL"] and words[6:7] == ["UND"]]
    assert missing
    assert not [name for name in missing if "@" not in name and not name.startswith(("Py", "_Py"))]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("readelf"), reason="needs binutils")
def test_extension_links_neither_torch_nor_openmp(extension: Path):
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", extension))
    assert needed
    assert not [name for name in needed if re.search(r"torch|c10|omp|cudart", name)]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nm"), reason="needs binutils")
def test_extension_exports_only_its_entry(extension: Path):
    symbols = [line.split(maxsplit=2)[2] for line in run("nm", "-DC", "--defined-only", extension).splitlines()]
    # What a type is has one name in every library, and does not differ between them.
    own = [name for name in symbols if "std::" not in name and not name.startswith("typeinfo ")]
    assert own == ["PyInit__C"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("objdump"), reason="needs binutils")
def test_instruction_sets_stay_apart(extension: Path):
    """One binary runs on every x86-64: instructions of a set are in the functions that are chosen for it, only."""
    if "x86-64" not in run("objdump", "-f", extension):
        pytest.skip("needs an x86-64 build")
    wide: dict[str, set[str]] = {"avx2": set(), "avx512": set(), "elsewhere": set()}
    home, function = "elsewhere", ""
    for line in run("objdump", "-dC", "--no-show-raw-insn", extension).splitlines():
        if heading := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = heading[1]
            home = next((isa for isa in ("avx2", "avx512") if f"fusedvae::{isa}::" in function), "elsewhere")
        elif (instruction := re.search(r"\t(v\w+) .*%([xyz])mm", line)) and home == "elsewhere":
            wide[home].add(f"{function}: {line.strip()}")
        elif instruction:
            wide[home].add(f"{instruction[1]} {instruction[2]}mm")
    assert not wide["elsewhere"]
    # The noise is as wide as its registers: compilers do not find this multiplication by themselves.
    assert "vpmuludq ymm" in wide["avx2"]
    assert "vpmuludq zmm" in wide["avx512"]
    assert not [instruction for instruction in wide["avx2"] if "zmm" in instruction]


@pytest.fixture
def small_checkout(checkout: Path) -> Path:
    """With the smallest of programs in the place of the kernels: what is built, and how, is the same, and at once."""
    csrc = checkout / "csrc"
    shutil.rmtree(csrc)
    for folder in ("cpu", "cuda"):
        (csrc / folder).mkdir(parents=True)
    (csrc / "formula.h").write_text("")
    (csrc / "bindings.cpp").write_text('extern "C" void* PyInit__C() { return nullptr; }')
    (csrc / "cpu" / "dispatch.cpp").write_text("")
    (csrc / "cpu" / "kernels.cpp").write_text('#include "formula.h"')
    return checkout


def built(checkout: Path, before: str = "", *, fails: bool = False, **environment: str) -> str:
    """What ``setup.py build`` says, after some lines of Python."""
    usual = {"FUSEDVAE_REQUIRE_EXT": "0", "FUSEDVAE_CUDA": "0", "FUSEDVAE_CUDA_ARCHS": ""}
    script = (
        f"import os, sys; os.chdir({str(checkout)!r}); sys.path.insert(0, '.'); sys.argv = ['setup.py', 'build']\n"
        f"{before}\nexec(open('setup.py').read())"
    )
    return run(sys.executable, "-W", "ignore", "-c", script, fails=fails, **{**usual, **environment})


NVCC = """#!/bin/sh
case $1 in
    --list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\n' ;;
    --version) echo 'nvcc 99.1' ;;
    *) echo 'nvcc fatal   : a compiler that is none'; exit 1 ;;
esac
"""
UNSERVED = {
    "bogus": "FUSEDVAE_CUDA_ARCHS: expected some of 80, 90, which",
    "7.0": "got '70'",
    "75": "got '75'",
    "native": "got 'native'",
    "90": "FUSEDVAE_CUDA_ARCHS=90, but no CUDA kernels: compiling them failed: nvcc fatal   : a compiler that is none",
}


@pytest.mark.parametrize("archs", UNSERVED)
def test_chips_that_are_asked_for_and_cannot_be_served_are_an_error(
    archs: str, small_checkout: Path, tmp_path: Path
) -> None:
    (small_checkout / "csrc" / "cuda" / "device.cu").write_text("")
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").write_text(NVCC)
    (home / "bin" / "nvcc").chmod(0o755)
    environment = {"CUDA_HOME": str(home), "FUSEDVAE_CUDA": "", "FUSEDVAE_CUDA_ARCHS": archs}
    assert UNSERVED[archs] in built(small_checkout, fails=True, **environment)
    assert "no nvcc in CUDA_HOME" in built(small_checkout, fails=True, **{**environment, "CUDA_HOME": "/nowhere"})
    if archs == "90":  # who did not ask for any gets the other kernels, and a word
        said = built(small_checkout, **{**environment, "FUSEDVAE_CUDA_ARCHS": ""})
        assert "WARNING: the CUDA kernels were not compiled: compiling them failed: nvcc fatal" in said


def test_options_that_change_results_or_instructions_are_left_out(small_checkout: Path) -> None:
    compiler = os.environ.get("CXX") or "g++"
    if not shutil.which(compiler):
        pytest.skip("needs g++")
    said = built(
        small_checkout,
        CXX=f"{compiler} -Ofast",
        CXXFLAGS="-g -ffast-math -march=native -mavx512f",
        LDFLAGS="-ffast-math -Wl,-O1",
    )
    assert "left out of CXX: -Ofast" in said
    assert "left out of CXXFLAGS: -ffast-math" in said
    assert "left out of LDFLAGS: -ffast-math;" in said
    (ninja,) = small_checkout.glob("build/native-*/build.ninja")
    text = ninja.read_text()
    assert not [word for word in ("fast", "native ", "-march", "-Ofast") if word in text]
    assert " -g " in text
    assert "-Wl,-O1" in text
    kernels = [line for line in text.splitlines() if "FUSEDVAE_ISA=baseline" in line]
    assert kernels
    assert not [line for line in kernels if "-mavx" in line]
    if "x86_64" in ninja.parent.name:
        assert "-march=native -mavx512f" in said
        assert not re.search(r"command = .*-mavx", text)


def test_what_only_looks_like_a_compiler_or_ninja_is_said(small_checkout: Path) -> None:
    said = built(small_checkout, CXX="true")
    assert "installing without the native kernels" in said
    assert "true is no C++ compiler: -dumpmachine prints nothing" in said
    hollow = "import types; sys.modules['ninja'] = types.SimpleNamespace(BIN_DIR='/nowhere')"
    said = built(small_checkout, hollow, PATH="/nowhere")
    assert "ninja not found (pip install --force-reinstall ninja)" in said


def test_sources_that_cannot_be_written_to_are_built_elsewhere(small_checkout: Path, tmp_path: Path) -> None:
    before = {str(path) for path in small_checkout.rglob("*")}
    elsewhere, wheels = tmp_path / "elsewhere", tmp_path / "wheels"
    elsewhere.mkdir()
    read_only = f"os.access = lambda path, mode: path != '.'; sys.argv[1:] = ['bdist_wheel', '-d', {str(wheels)!r}]"
    said = built(small_checkout, read_only, TMPDIR=str(elsewhere), FUSEDVAE_REQUIRE_EXT="1")
    assert str(elsewhere) in said
    assert {str(path) for path in small_checkout.rglob("*")} == before
    assert list(elsewhere.iterdir()) == []
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert any(re.fullmatch(r"fusedvae/_C\..*\.so", name) for name in archive.namelist())


@pytest.mark.slow
def test_a_wheel_without_kernels_is_not_one_of_a_platform_and_the_command_gets_past_it(
    small_checkout: Path, venv: Venv, tmp_path: Path
) -> None:
    """pip keeps a wheel for a name and source that it has built, whatever was not there then."""
    if not shutil.which(os.environ.get("CXX") or "g++"):
        pytest.skip("needs g++")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, small_checkout)
    (sdist,) = tmp_path.glob("*.tar.gz")
    cache = {"PIP_CACHE_DIR": str(tmp_path / "cache"), "FUSEDVAE_CUDA": "0", "FUSEDVAE_CUDA_ARCHS": ""}
    installed = venv.bin.parent / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"

    def tags() -> str:
        (record,) = installed.glob("fusedvae-*.dist-info/WHEEL")
        return record.read_text()

    how = ("--no-build-isolation", "--force-reinstall", f"fusedvae @ file://{sdist}")
    venv.install(*how, **cache, CXX="/nowhere", FUSEDVAE_REQUIRE_EXT="0")
    assert "Tag: py3-none-any" in tags()
    assert "Root-Is-Purelib: true" in tags()
    assert not list(installed.glob("fusedvae/_C.*.so"))
    venv.install(*how, **cache, FUSEDVAE_REQUIRE_EXT="1")
    assert "Tag: py3-none-any" in tags()  # that of the cache: nothing was built, and nothing could fail

    command = venv.run("fusedvae", "info").partition("where a C++17 compiler is found: ")[2].splitlines()[0]
    environment, pip, what, *options, source = command.split()
    assert (environment, pip, what, options) == (
        "FUSEDVAE_REQUIRE_EXT=1",
        "pip",
        "install",
        ["--no-cache-dir", "--force-reinstall", "--no-deps"],
    )
    assert source == f"file://{sdist}"
    venv.install("--no-build-isolation", *options, source, **cache, FUSEDVAE_REQUIRE_EXT="1")
    assert "Tag: py3-none-any" not in tags()
    assert list(installed.glob("fusedvae/_C.*.so"))


@pytest.mark.slow
def test_a_missing_build_requirement_is_named_and_the_package_installs_without_it(checkout: Path):
    hidden = (
        "import sys; sys.modules['pybind11'] = None; sys.argv = ['setup.py', 'build']; exec(open('setup.py').read())"
    )
    environment = {**os.environ, "FUSEDVAE_CUDA": "0", "FUSEDVAE_REQUIRE_EXT": "0"}
    done = subprocess.run([sys.executable, "-c", hidden], cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "pybind11 not found (pip install pybind11)" in done.stderr
    required = {**environment, "FUSEDVAE_REQUIRE_EXT": "1"}
    done = subprocess.run([sys.executable, "-c", hidden], cwd=checkout, env=required, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_build_repeats_only_what_an_edit_reaches(small_checkout: Path):
    def compiled() -> set[str]:
        command = f"cd '{small_checkout}' && exec '{sys.executable}' -W ignore setup.py build_ext --inplace"
        return set(re.findall(r"compile .*/(\w+)\.o", run("bash", "-c", command, FUSEDVAE_CUDA_ARCHS="")))

    everything = compiled()
    assert everything >= {"bindings", "cpu_dispatch", "cpu_kernels_baseline"}
    assert compiled() == set()
    os.utime(small_checkout / "csrc" / "formula.h", (2**32, 2**32))
    assert compiled() == {name for name in everything if name.startswith("cpu_kernels")}


@pytest.mark.slow
def test_kernels_compile_for_aarch64(tmp_path: Path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("needs aarch64-linux-gnu-g++")
    build = runpy.run_path(str(ROOT / "setup.py"))
    (isa,) = build["instruction_sets"]("aarch64-linux-gnu")
    for source in ("dispatch", "kernels"):
        flags = [*build["CXX_FLAGS"], "-O1", f"-DFUSEDVAE_ISA={isa}", f"-I{ROOT / 'csrc'}"]
        run(compiler, *flags, "-c", ROOT / "csrc" / "cpu" / f"{source}.cpp", "-o", tmp_path / f"{source}.o")


def test_an_import_brings_no_compiler_and_little_else() -> None:
    """PyTorch's own import takes a second; what it leaves for later stays for later."""
    script = """
import sys, torch
before = set(sys.modules)
import fusedvae
print(*sorted(set(sys.modules) - before))
"""
    brought = run(sys.executable, "-c", script).split()
    assert not [name for name in brought if name.startswith(("torch.", "sympy", "triton"))]
    assert len([name for name in brought if not name.startswith("fusedvae")]) < 10
