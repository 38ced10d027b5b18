"""The compiled GPU kernels, executed on this machine's CPU: nvcc's and Triton's PTX for sm_90, by the executor in ptx.

The CUDA kernels are launched by the bindings' own code; see ptx/cuda_on_ptx.py and ptx/triton_on_ptx.py. An access out
of the bounds of what a launch was given, a misaligned one, a wrong mask: all are errors here.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from fusedvae.random import normal

ROOT = Path(__file__).parent.parent
PTX = ROOT / "tests" / "ptx"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64" or not PTX.exists(), reason="needs a checkout, on x86-64"),
]


@cache
def reason_without(backend: str) -> str | None:
    """Why the executor cannot run a backend's kernels."""
    build = "build_extension" if backend == "cuda" else "build_library"
    script = f"import executor\ntry: executor.{build}()\nexcept executor.UnavailableError as reason: print(reason)"
    return python("-c", script).strip() or None


def python(*command: str, seed: int = 1, approximation_error: int = 0) -> str:
    """What Python prints, the executor's modules and the tests' at hand."""
    environment = {
        **os.environ,
        "PTX_SEED": str(seed),
        "PTX_APPROXIMATION_ERROR": str(approximation_error),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(PTX), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    if reason := reason_without(request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def cuda() -> None:
    if reason := reason_without("cuda"):
        pytest.skip(reason)


# --- the tests of the kernels -----------------------------------------------------------------------------------

CUDA_TESTS = [
    f"tests/test_{name}.py"
    for name in (
        *("kernel_tasks", "operations", "divergences", "latents", "likelihoods", "forms", "reductions"),
        *("gradient_rules", "noise", "properties", "accuracy"),
    )
]
# Compiling takes Triton a third of a second a kernel: those of these tests are some eighty. PTX_WHOLE=1 takes all.
TRITON_TESTS = {
    "operations": ["tests/test_operations.py", "-k", "triton and (dtypes or infinity or bitwise)"],
    "noise": ["tests/test_noise.py", "-k", "triton"],
}
if os.environ.get("PTX_WHOLE") == "1":
    TRITON_TESTS = {Path(file).stem: [file, "-k", "triton"] for file in CUDA_TESTS}


def run_tests(backend: str, *arguments: str, seed: int = 1, approximation_error: int = 0) -> None:
    options = ["-p", f"{backend}_on_ptx", "-p", "no:cacheprovider", "-q", "-x", "-m", "not slow and not large"]
    printed = python("-m", "pytest", *options, *arguments, seed=seed, approximation_error=approximation_error)
    assert re.search(r"\b[1-9]\d* passed", printed), printed[-500:]


@pytest.mark.usefixtures("cuda")
def test_the_cuda_kernels_pass_their_tests() -> None:
    run_tests("cuda", *CUDA_TESTS, "-k", "native")


IN_16_BITS = "tests/test_accuracy.py::test_samples_and_divergences_in_16_bits"
TESTS_OF_APPROXIMATIONS = {
    "cuda": ["tests/test_operations.py", "tests/test_noise.py", IN_16_BITS, "-k", "native"],
    "triton": ["tests/test_noise.py", IN_16_BITS, "-k", "triton and (half_precisions or 16_bits)"],
}


def test_approximations_may_be_off_by_what_they_are_on_a_gpu(backend: str) -> None:
    run_tests(backend, *TESTS_OF_APPROXIMATIONS[backend], approximation_error=2)


@pytest.mark.parametrize("name", TRITON_TESTS)
def test_the_triton_kernels_pass_their_tests(name: str) -> None:
    pytest.importorskip("triton")
    if reason := reason_without("triton"):
        pytest.skip(reason)
    run_tests("triton", *TRITON_TESTS[name])


@pytest.mark.usefixtures("cuda")
def test_no_order_of_warps_and_blocks_changes_a_bit() -> None:
    digest = """
import cuda_on_ptx, executor, hashlib
from test_operations import run_everything
for seed in range(6):
    executor.library().seed(seed)
    print(hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in run_everything("native"))).hexdigest())
"""
    printed = python("-c", digest).split()
    assert len(printed) == 6
    assert len(set(printed)) == 1


@pytest.mark.usefixtures("cuda")
def test_normals_are_those_of_the_cpu(tmp_path: Path) -> None:
    count, seed = 200_003, 20140501
    draw = f"""
import cuda_on_ptx, executor, sys, torch
from fusedvae.random import normal
for units, file in zip((0, 2), sys.argv[1:]):
    executor.library().approximate(units)
    torch.save(normal({count}, {seed}), file)
"""
    files = [tmp_path / "exact.pt", tmp_path / "approximate.pt"]
    python("-c", draw, *map(str, files))
    ours = normal(count, seed, backend="native").numpy()
    for file, ulps in zip(files, (4, 6), strict=True):
        found = torch.load(file).numpy()
        assert np.max(np.abs(found - ours) / np.spacing(np.abs(ours))) <= ulps


SHARED = """
import cuda_on_ptx, executor, torch
from concurrent.futures import ThreadPoolExecutor
from fusedvae import functional
from fusedvae.backend import native

# As on a GPU: all memory is there for all kernels, and what launches share is kept between them.
for task in (native._C.ObjectiveTask, native._C.ScaleTask):
    task.launch = task.launch.__wrapped__
executor.library().forget_all()
executor.library().allow((1 << 12, 1 << 47))
sums = torch.empty(1 << 20, dtype=torch.uint8)
workspace = native._Workspace(sums, sums.data_ptr(), native._C.cuda_counters()[0])
native._workspace = lambda *where, **options: workspace

def step(mean, target, logvar):
    loss = functional.gaussian_nll(mean, target, logvar, backend="native")
    return loss, *torch.autograd.grad(loss, [mean, logvar])

def count_wrong(operands):
    right = before[operands[0].shape]
    return sum(not all(map(torch.equal, step(*operands), right)) for _ in range(12))

# Sums for each column are finished by a second kernel.
problems = [[torch.randn(size).requires_grad_() for size in ((rows, columns), (rows, columns), (columns,))]
            for rows, columns in ((40, 1200), (24, 900))]
before = {operands[0].shape: step(*operands) for operands in problems}
with ThreadPoolExecutor(2) as threads:
    print(*threads.map(count_wrong, problems))
"""


@pytest.mark.usefixtures("cuda")
def test_threads_that_share_a_stream_do_not_come_between_the_kernels_of_a_launch() -> None:
    assert python("-c", SHARED).split() == ["0", "0"]


# --- faults -----------------------------------------------------------------------------------------------------

SHORTENED = """
import json, sys, torch, {plugin}, executor
from fusedvae import functional

name, extent, messages = sys.argv[1], executor.extent, []
for size in (64, 67):
    mean, target, spread = (torch.randn(3, size).requires_grad_(k != 1) for k in range(3))
    inputs = {{t.data_ptr() for t in (mean, target, spread)}}

    def is_target(tensor):
        return tensor.data_ptr() == target.data_ptr()

    def is_output(tensor):
        return tensor.numel() == 3 * size and tensor.data_ptr() not in inputs

    for is_meant in (is_target, is_output):
        executor.extent = extent
        functional.gaussian_nll(mean, target, spread, backend=name)
        executor.extent = lambda t: (extent(t)[0], extent(t)[1] - 4 * is_meant(t))
        try:
            functional.gaussian_nll(mean, target, spread, backend=name)
            messages.append("no error")
        except RuntimeError as fault:
            messages.append(str(fault))
print(json.dumps(messages))
"""


def test_an_access_past_the_last_element_is_caught(backend: str) -> None:
    """The kernels are right: it is the buffer that is shorter, by one element, than they are told."""
    name = "native" if backend == "cuda" else backend
    messages = json.loads(python("-c", SHORTENED.format(plugin=f"{backend}_on_ptx"), name))
    cases = itertools.product((64, 67), (("a read", "ld.global"), ("a write", "st.global")))
    for (size, (kind, opcode)), message in zip(cases, messages, strict=True):
        end = f"the end of the buffer of {3 * size * 4 - 4} bytes"
        where = rf"by: .*{re.escape(opcode)}.*\n  in: .*objective_kernel.*thread \(\d+, 0, 0\)"
        assert re.search(rf"{kind} out of bounds: .* {end} at 0x\w+\n  {where}", message), message


# --- instructions and bytes -------------------------------------------------------------------------------------

# No more than so many PTX instructions an element.
INSTRUCTIONS = {
    ("cuda", "nll with gradients", "float32"): 40,
    ("cuda", "nll with gradients", "bfloat16"): 40,
    ("cuda", "clamped nll with gradients", "float32"): 105,
    ("cuda", "clamped nll with gradients", "bfloat16"): 105,
    ("cuda", "masked nll with gradients", "float32"): 86,
    ("cuda", "masked nll with gradients", "bfloat16"): 86,
    ("cuda", "float32 data's nll with gradients", "float32"): 40,
    ("cuda", "float32 data's nll with gradients", "bfloat16"): 75,
    ("cuda", "latent forward", "float32"): 105,
    ("cuda", "latent forward", "bfloat16"): 72,
    ("cuda", "latent backward", "float32"): 105,
    ("cuda", "latent backward", "bfloat16"): 72,
    ("cuda", "clamped latent forward", "float32"): 120,
    ("cuda", "clamped latent forward", "bfloat16"): 82,
    ("cuda", "clamped latent backward", "float32"): 132,
    ("cuda", "clamped latent backward", "bfloat16"): 100,
    ("triton", "nll with gradients", "float32"): 45,
    ("triton", "nll with gradients", "bfloat16"): 38,
    ("triton", "clamped nll with gradients", "float32"): 50,
    ("triton", "clamped nll with gradients", "bfloat16"): 50,
    ("triton", "masked nll with gradients", "float32"): 52,
    ("triton", "masked nll with gradients", "bfloat16"): 52,
    ("triton", "float32 data's nll with gradients", "float32"): 45,
    ("triton", "float32 data's nll with gradients", "bfloat16"): 45,
    ("triton", "latent forward", "float32"): 100,
    ("triton", "latent forward", "bfloat16"): 72,
    ("triton", "latent backward", "float32"): 100,
    ("triton", "latent backward", "bfloat16"): 70,
    ("triton", "clamped latent forward", "float32"): 103,
    ("triton", "clamped latent forward", "bfloat16"): 84,
    ("triton", "clamped latent backward", "float32"): 104,
    ("triton", "clamped latent backward", "bfloat16"): 86,
}
# Operands of a pass, read and written, by elements; the noise's seed, factors and sums come to little more.
OPERANDS = {"nll with gradients": 5, "latent forward": 3, "latent backward": 5}
ALLOWANCE = 1.02


def test_kernels_execute_no_more_than_they_did(backend: str) -> None:
    rows = json.loads(python(str(PTX / "count.py"), "--backend", backend, "--json"))
    assert {(row[0], row[1], row[2]) for row in rows} == {key for key in INSTRUCTIONS if key[0] == backend}
    above = [row for row in rows if row[3] > INSTRUCTIONS[row[0], row[1], row[2]]]
    assert not above, "\n".join(f"{row}: the limit is {INSTRUCTIONS[row[0], row[1], row[2]]}" for row in above)
    for _, case, dtype, _, moved in rows:
        kind, size = case.split(" ", 1)[0], getattr(torch, dtype).itemsize
        others = {"masked": 1, "float32": 4 - size}.get(kind, 0)  # bytes of what has another dtype
        operands = next(count for name, count in OPERANDS.items() if case.endswith(name))
        least = operands * size + others
        assert least <= moved <= ALLOWANCE * least, (case, dtype, moved)


def test_a_training_step_takes_at_most_five_launches(cuda: None) -> None:
    script = """
import cuda_on_ptx, executor, fusedvae, torch

encoder, decoder = torch.nn.Linear(24, 10), torch.nn.Linear(5, 24)
for recon_logvar in (0.0, "learned"):
    model = fusedvae.VAE(encoder, decoder, 5, recon_logvar=recon_logvar)
    for _ in range(2):
        executor.library().reset_counts()
        model.loss(torch.rand(16, 24)).backward()
        print(executor.library().counts().launches)
"""
    launches = [int(line) for line in python("-c", script).split()]
    assert len(launches) == 4
    assert max(launches) <= 5
