"""What the tests share: the targets to run on, formulas in float64, and ways to make and compare operands."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fusedvae import calls
from fusedvae.backend import NAMES, device_types, unavailable
from fusedvae.backend.reference import PLAIN, form_fields
from fusedvae.backend.specs import Sampling

try:
    import hypothesis
except ModuleNotFoundError:  # as on a machine that has a GPU and no network
    hypothesis = None
    collect_ignore = ["test_layout.py", "test_properties.py"]

# The same examples at every run; how long one takes says more about the machine than about the code.
if hypothesis is not None:
    hypothesis.settings.register_profile(
        "fusedvae",
        derandomize=True,
        deadline=None,
        max_examples=100,
        database=None,
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    )
    hypothesis.settings.load_profile("fusedvae")

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
EPSILON = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}


_SETS = {"AVX2": ("baseline", "avx2"), "AVX512": ("baseline", "avx2", "avx512")}
INSTRUCTION_SETS = _SETS.get(torch.backends.cpu.get_cpu_capability(), ("baseline",))
"""Those of the CPU kernels that this machine has."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process is one for Triton's interpreter, and tests that alone: see test_triton_interpreted.py."""


def _round_in_the_interpreter() -> None:
    """Have Triton's interpreter round float32 to bfloat16, as GPUs do; by itself it cuts the bits off."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(values: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: object) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding)
        rounded = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)

    interpreter._convert_float = converted


def _patch_the_language_once() -> None:
    """Have the interpreter put its own functions in the place of Triton's once a launch; it would do so again at every
    call of a function within, which takes half of all the time."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    @functools.cache
    def languages(function: FunctionType) -> list[ModuleType]:
        seen = function.__globals__.values()
        return [language for language in (tl, tl.core) if any(value is language for value in seen)]

    def patched(function: FunctionType) -> object:
        is_patched = not any(tl.core.is_builtin(language.load) for language in languages(function))
        return None if is_patched else patch(function)

    interpreter._patch_lang = patched


def _compute_nothing_for_assertions() -> None:
    """Have the interpreter do integers' arithmetic once. It would do it in 64 bits, too, to see whether it overflows,
    and then assert nothing, as it is not debugging: half of all the time."""
    from triton.runtime import interpreter

    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)


if INTERPRETED:
    _round_in_the_interpreter()
    _patch_the_language_once()
    _compute_nothing_for_assertions()


class Target(NamedTuple):
    """Where a test runs."""

    backend: str
    device: str


def _targets() -> list:
    found = []
    for device in device_types():
        for backend in ["triton"] if INTERPRETED else NAMES:
            if unavailable(backend, device) is None:
                marks = [pytest.mark.gpu] if device == "cuda" else []
                found.append(pytest.param(Target(backend, device), id=f"{backend}-{device}", marks=marks))
    return found


TARGETS = _targets()
KERNEL_TARGETS = [target for target in TARGETS if target.values[0].backend != "reference"]


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Every backend on every device of this machine that it serves. Tensors that the test makes lie on that device."""
    with torch.device(request.param.device):
        yield request.param


FIRST = [
    "test_sanitizers.py",
    "test_ptx_kernels.py",
    "test_triton_interpreted.py",
    "test_triton_compiled.py",
    "test_packaging.py",
    "test_cli_files.py",
    "test_examples.py",
    "test_gpu_check.py",
    "test_cli_bench.py",
    "test_cli_processes.py",
    "test_cli_train.py",
    "test_wrappers.py",
    "test_cuda_compiled.py",
]
"""The files that take long, the longest in front: begun last, each would run alone, beside processors that have nothing
to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_collection_finish() -> None:
    """Have garbage collected seldom, and not among the million objects that libraries have made by now: a tenth of the
    tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 100)


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Every test starts from the same generator state, so that failures come back."""
    torch.manual_seed(20140501)


@pytest.fixture
def few_objects() -> None:
    """For tests of commands, which collect garbage before they measure: among the million objects that libraries have
    made that takes longer than all else, so the collector is to forget what is there now."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def calls_anew() -> Iterator[None]:
    """For a test that changes what launches are prepared from."""
    calls._calls.clear()
    yield
    calls._calls.clear()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """A block on that many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- formulas in float64, by plain torch ------------------------------------------------------------------------


def nll_elements(recon_x: Tensor, x: Tensor, recon_logvar: Tensor | float, full: bool = False) -> Tensor:
    """(l + (m - x)^2 e^-l) / 2 in float64, per element."""
    logvar = torch.as_tensor(recon_logvar, dtype=torch.float64, device=recon_x.device)
    squared = (recon_x.double() - x.double()) ** 2
    return (logvar + squared * torch.exp(-logvar)) / 2 + (HALF_LOG_2PI if full else 0.0)


def kl_elements(mu: Tensor, logvar: Tensor) -> Tensor:
    """(mu^2 + e^l - 1 - l) / 2 in float64, per element."""
    mu, logvar = mu.double(), logvar.double()
    return (mu**2 + torch.expm1(logvar) - logvar) / 2


def reduced(elements: Tensor, reduction: str) -> Tensor:
    """The three reductions of the package's losses."""
    per_sample = elements.flatten(1).sum(1) if elements.dim() > 1 else elements
    if reduction == "none":
        return per_sample
    return per_sample.sum() / (len(elements) if reduction == "batchmean" else 1)


# --- what calls are ---------------------------------------------------------------------------------------------


def sampling(kl_dtype: torch.dtype | None, backend: str) -> Sampling:
    """A pass over a latent of plain log-variances, (batch, features): z and, with a dtype for it, its KL per sample."""
    return Sampling("kl_standard_normal", *form_fields([PLAIN]), None, False, kl_dtype, (1,), 1, backend)


# --- operands and comparisons -----------------------------------------------------------------------------------


def leaf(tensor: Tensor) -> Tensor:
    """The same values in the same strides, as a leaf that wants a gradient."""
    return tensor.detach().requires_grad_()


def assert_close(actual: Tensor, expected: Tensor, *, ulps: float = 8, scale: float | None = None) -> None:
    """Within some ulps of the actual dtype, of each value or of a common scale; NaN and infinities in their places."""
    eps = EPSILON[actual.dtype]
    size = expected[expected.isfinite()].abs().max().item() if scale is None and expected.isfinite().any() else scale
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=ulps * eps, atol=ulps * eps * (size or 0.0) * 0.25, equal_nan=True
    )
