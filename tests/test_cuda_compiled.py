"""The CUDA kernels as compiled: what registers, memory and instructions they take, read off the extension itself.

Needs no GPU, but an extension with CUDA kernels and cuobjdump, which comes with CUDA and, too, with Triton.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch

from fusedvae import backend
from fusedvae.backend import ObjectiveWork, Part, TermWork
from fusedvae.backend.reference import FORMULAS, PLAIN

REGISTERS = 65536
"""Of a multiprocessor, on every architecture from sm_80 on."""
BLOCK = 256
THREADS = {"sm_120": 1536}
"""That a multiprocessor holds at most, where that is not 2048."""
# Blocks of a multiprocessor that each kernel must leave room for, by the elements of an access. Full occupancy is 8.
#
# The passes have less, on purpose. What a memory-bound kernel needs is bytes on their way: an H100 needs about 18 KB on
# each multiprocessor (3.35 TB/s for 700 ns, over 132). Over flat operands, four blocks of threads with three loads of
# 16 bytes each have 48 KB, three have 36 KB. Vectors of any dtypes, tasks in general (scales in any form, weights, any
# divergence), and the sums of columns have more work between loads, and take the registers for it: two blocks have 24
# KB. Float64 passes are bound by arithmetic.
BLOCKS = {
    ("normal", None): 8,
    ("scale", None): 8,
    ("finish", None): 4,
    ("latent", "f4"): 4,
    ("latent", "f8"): 4,
    ("latent in general", "f1 mixed"): 2,
    ("latent in general", "f4 mixed"): 2,
    ("latent in general", "d1 mixed"): 1,
    ("latent in general, by column", "f1 mixed"): 2,
    ("latent in general, by column", "f4 mixed"): 1,
    ("latent in general, by column", "d1 mixed"): 1,
    ("flat_objective", "f4"): 4,
    ("flat_objective", "f8"): 4,
    ("adapted_objective", "f4"): 2,
    ("adapted_objective", "f8"): 2,
    ("objective", "f1 mixed"): 2,
    ("objective", "f4 mixed"): 2,
    ("objective, by column", "f4"): 2,
    ("objective, by column", "f1 mixed"): 2,
    ("objective, by column", "f4 mixed"): 2,
    ("objective in general", "f1 mixed"): 2,
    ("objective in general", "f4 mixed"): 2,
    ("objective in general", "d1 mixed"): 1,
    ("objective in general, by column", "f1 mixed"): 2,
    ("objective in general, by column", "f4 mixed"): 2,
    ("objective in general, by column", "d1 mixed"): 1,
}
FLAT = ("flat_objective", "adapted_objective")
"""What there is of each formula: kernels for flat operands of the usual tasks, and of any."""
FEWER_BLOCKS = ("LaplaceNll", "BernoulliNll", "KlNormal")
"""Formulas with four inputs or a logistic function: flat operands leave room for one block less."""


def extension() -> Path:
    spec = importlib.util.find_spec("fusedvae._C")
    if spec is None or spec.origin is None or not hasattr(backend.native._C, "cuda_unavailable"):
        pytest.skip("the extension has no CUDA kernels")
    return Path(spec.origin)


def tools() -> Path:
    """The folder of cuobjdump; nvdisasm, which it calls, is beside it."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])
    for folder in map(Path, path.split(os.pathsep)):
        if all(shutil.which(name, path=str(folder)) for name in ("cuobjdump", "nvdisasm")):
            return folder
    pytest.skip("needs cuobjdump and nvdisasm")


@cache
def dump(what: str, *options: str) -> str:
    folder = tools()
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [str(folder / "cuobjdump"), what, *options, str(extension())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Kernel:
    """A kernel's name and, of a template's, the access that it is compiled for."""

    def __init__(self, symbol: str) -> None:
        found = re.search(
            r"\d(normal|scale|finish|latent|flat_objective|adapted_objective|objective)_kernel(.*)", symbol
        )
        assert found, symbol
        self.name, arguments = found.groups()
        # As csrc/cuda/pass.h numbers them: of values, of all, of columns; and what a latent makes, 0 for anything.
        sums, makes = re.search(r"4SumsE(\d)E", arguments), re.search(r"LatentMakesE(\d)E", arguments)
        if re.search(r"4SumsE\dELb1E", arguments) or (makes and makes[1] == "0"):
            self.name += " in general"
        if sums and sums[1] == "2":
            self.name += ", by column"
        access = re.search(r"AccessI([fd])(v|[fd]|6__half|13__nv_bfloat16)Li(\d)E", arguments)
        self.access = f"{access[1]}{access[3]}{' mixed' if access[2] == 'v' else ''}" if access else None
        """Working type and elements at a time; mixed, if they may be of any dtypes."""
        self.makes = int(makes[1]) if makes else 0
        formula = re.search(r"6scalar\d+([A-Z]\w*?)EEEv", arguments)
        self.formula = formula[1] if formula and self.name in FLAT else None
        """What flat operands are compiled for."""

    def __repr__(self) -> str:
        return " ".join(filter(None, (self.name, self.access, self.formula)))


ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    if not re.search(rf"\.{request.param}\.", dump("-lelf")):
        pytest.skip(f"not compiled for {request.param}")
    return request.param


def resources(architecture: str) -> list[tuple[Kernel, dict[str, int]]]:
    listing = dump("-res-usage", "-arch", architecture)
    found = re.findall(r"Function (\S+):\n\s*(.*)", listing)
    assert found
    return [(Kernel(s), {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", figures)}) for s, figures in found]


@cache
def accesses(architecture: str) -> list[tuple[Kernel, Counter[str]]]:
    """How often each instruction that touches global or local memory is in each kernel."""
    functions = re.split(r"Function : (\S+)", dump("-sass", "-arch", architecture))[1:]
    found = []
    for symbol, code in zip(functions[::2], functions[1::2], strict=True):
        instructions = re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?((?:LDG|STG|LDL|STL|ATOMG|REDG?)\b[.\w]*)", code)
        # Partial sums are read past the caches: not an operand's accesses.
        found.append((Kernel(symbol), Counter(i for i in instructions if ".STRONG" not in i)))
    return found


def test_where_no_gpu_can_run_them_the_reason_is_a_sentence_and_others_serve():
    extension()
    reason = backend.unavailable("native", "cuda")
    if reason is None:
        pytest.skip("a GPU can")
    assert re.fullmatch(r"[^\n]*(driver|GPU)[^\n]*", reason)
    assert backend.resolve("cuda") in ("triton", "reference")
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        backend.resolve("cuda", "native")


@pytest.mark.parametrize("rows", [2**31 - 2**12, 2**31, 2**33])
def test_more_sums_than_a_lane_can_count_are_refused(rows: int):
    """Of a gradient for each row, each row has a sum of its own: the total would be of more than 32 bits count."""
    extension()
    shapes = [(rows, 3), (rows, 3), (rows, 1)]
    parts = [Part(k, torch.Size(shape), (shape[1], 1), torch.bfloat16) for k, shape in enumerate([*shapes, *shapes])]
    inputs, (mean, _, scale) = parts[:3], parts[3:]
    term = TermWork(FORMULAS["gaussian_nll"], False, tuple(inputs), (mean, None, scale), (PLAIN,))
    work = ObjectiveWork((term,), "total", Part(6, torch.Size(), (), torch.float32))
    gpu = torch.device("cuda", 0)
    if rows < 2**31:
        backend.kernels("native").prepare_objective(work, 7, gpu)
        return
    with pytest.raises(RuntimeError, match=r"fusedvae: more than 2\^3[12] sums"):
        backend.kernels("native").prepare_objective(work, 7, gpu)


def test_every_kernel_is_there(architecture: str):
    assert {(kernel.name, kernel.access) for kernel, _ in resources(architecture)} >= {
        key for key in BLOCKS if key[1] is not None
    }


def spills(architecture: str, kernel: Kernel) -> bool:
    """Scalars of any dtypes, two at a time: there the compiler wants a few registers more than two blocks leave.

    One element at a time would need none of it, and have half as many bytes on their way.
    """
    return architecture in ("sm_100", "sm_120") and (kernel.name, kernel.access) == ("objective", "f1 mixed")


def test_no_stack_frame_and_no_spills(architecture: str):
    for kernel, used in resources(architecture):
        assert used["STACK"] <= (80 if spills(architecture, kernel) else 0), kernel
        assert used["LOCAL"] == 0, kernel
    for kernel, instructions in accesses(architecture):
        if not spills(architecture, kernel):
            assert not [i for i in instructions if i.startswith(("LDL", "STL"))], kernel


def test_registers_leave_room_for_the_blocks(architecture: str):
    for kernel, used in resources(architecture):
        most = THREADS.get(architecture, 2048) // BLOCK
        blocks = min(BLOCKS[kernel.name, kernel.access] - (kernel.formula in FEWER_BLOCKS), most)
        per_thread = -(-used["REG"] // 8) * 8  # allocated by eights
        assert per_thread * BLOCK * blocks <= REGISTERS, kernel


def test_shared_memory_is_no_limit(architecture: str):
    for kernel, used in resources(architecture):
        assert used["SHARED"] <= 2048, kernel


MOST_INPUTS = 4
"""Of a formula: see csrc/math/formula.h."""
VECTORS = ("f4", "f8", "f4 mixed")
"""Accesses of 16 bytes."""


def operands(kernel: Kernel) -> tuple[int, int]:
    """How many operands the kernel reads and writes vectors of, in all: see the passes of csrc/cuda."""
    if kernel.name == "latent":
        # mu, logvar; z, the divergence. Or mu, logvar, grad_z; two gradients. Or logvar, grad_z, of the sample alone.
        return {1: (2, 2), 2: (3, 2), 3: (2, 2)}[kernel.makes]
    if kernel.name.startswith("latent"):
        return 7, 6  # the prior and noise too
    if kernel.name.startswith("objective in general"):
        return MOST_INPUTS + 2, MOST_INPUTS + 1  # the inputs, weight, incoming; the value, and the inputs' gradients
    # Of each formula: its inputs, and incoming; the value, and the inputs' gradients.
    each = sum(len(FORMULAS[name].inputs) + 1 for name in backend.native._C.formulas())
    return each, each


def test_vectors_are_read_and_written_once_by_instructions_of_16_bytes(architecture: str):
    """So the bytes that a launch moves are those of the operands that it is given, as in the table of the design:

    3N read and 2N written by the likelihood with its gradients (recon_x, x, recon_logvar; two gradients), 2M read and M
    written by the latent (mu, logvar; z), 3M and 2M by its backward pass (and grad_z; two gradients). Operands that are
    not given are skipped by a branch, and totals take 8 bytes for each chunk of 256 elements or more.

    (The kernels for flat operands have several loops each. What they move is counted where they are executed: see
    tests/ptx.)
    """
    seen = set()
    for kernel, instructions in accesses(architecture):
        if kernel.access not in VECTORS or kernel.formula:
            continue
        loads, stores = operands(kernel)
        assert instructions["LDG.E.128"] == loads, kernel
        assert instructions["STG.E.128"] == stores, kernel
        seen.add((kernel.name, kernel.access))
    assert seen == {key for key in BLOCKS if key[1] in VECTORS and key[0] not in FLAT}


def test_noise_and_scaling_move_16_bytes_at_a_time(architecture: str):
    for kernel, instructions in accesses(architecture):
        if kernel.name == "scale":
            assert instructions["LDG.E.128"] >= 4  # of each dtype
            assert instructions["STG.E.128"] >= 4
    noise = [instructions for kernel, instructions in accesses(architecture) if kernel.name == "normal"]
    assert sum(i["STG.E.128"] == 1 for i in noise) == 4  # of each dtype; the others are for misaligned outputs
    assert len(noise) == 8


def test_atomics_are_of_integers_only(architecture: str):
    """One, that counts the blocks that are done. Atomic sums of floats would differ from run to run."""
    for kernel, instructions in accesses(architecture):
        atomics = {i for i in instructions if i.startswith(("ATOM", "RED"))}
        assert not [i for i in atomics if re.search(r"\.F\d\d|\.BF", i)], kernel
