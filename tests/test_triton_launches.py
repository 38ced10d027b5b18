"""Launches of the compiled Triton kernels, up to the driver: what reaches it, what is compiled for it, and how soon."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import INTERPRETED
from torch import Tensor

from fusedvae import calls, functional

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

from triton.backends.compiler import GPUTarget  # noqa: E402

from fusedvae.backend import triton as backend  # noqa: E402
from fusedvae.backend.reference import Form  # noqa: E402


class Driver:
    """A driver of a GPU that is not there: it loads kernels and writes down their launches."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.launches: list[tuple[Any, ...]] = []
        """Programs, the function, and the arguments, with addresses for tensors."""
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1 << 18},
            load_binary=self.load_binary,
            unload_module=lambda module: None,  # of Triton from 3.9 on
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def load_binary(self, name: str, *binary: Any) -> tuple[Any, ...]:
        self.loaded.append(name)
        found = object(), len(self.loaded), 0, 0, 1024  # the module, the function, registers, spills, threads at most
        return found if backend.launch.VERSION >= (3, 4) else found[:4]

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return self.launch

    def launch(self, x: int, y: int, z: int, stream: int, function: Any, *arguments: Any) -> None:
        values = arguments[4:]  # behind what is packed of the kernel, of the launch, and two hooks
        self.launches.append(
            ((x, y, z), stream, function, *[v.data_ptr() if isinstance(v, Tensor) else v for v in values])
        )


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    driver = Driver()
    use(driver, monkeypatch)
    monkeypatch.setattr(type(backend.BACKEND), "unavailable", lambda self, device_type, index=None: None)
    forget()
    yield driver
    forget()


def use(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where Triton keeps the one that it has; to ask for it would be to look for a GPU.
    where = "_active" if hasattr(triton.runtime.driver, "_active") else "active"
    monkeypatch.setattr(triton.runtime.driver, where, driver)


def forget() -> None:
    """Forget what was compiled for another driver, and what launches it."""
    calls._calls.clear()
    for kernel in vars(backend.kernels).values():
        if isinstance(kernel, triton.runtime.JITFunction):
            (kernel.device_caches if hasattr(kernel, "device_caches") else kernel.cache).clear()


def step(operands: list[Tensor], **options: Any) -> None:
    recon_x, x, spread, mu, logvar = operands
    z, kl = functional.latent(mu, logvar, backend="triton", **options)
    loss = functional.elbo_loss(recon_x, x, mu, logvar, spread, beta=0.5, backend="triton")
    torch.autograd.backward([z, kl, loss], [torch.ones_like(z), torch.ones_like(kl), torch.ones(())])


def operands(shift: int = 0) -> list[Tensor]:
    """Those of a step, each behind so many unused elements of its memory."""
    shapes = [(8, 16)] * 2 + [(16,)] + [(8, 4)] * 2
    found = [torch.zeros(shift + torch.Size(s).numel())[shift:].view(s) for s in shapes]
    return [t.requires_grad_() for t in found]


class DriverWithoutCompiler:
    @property
    def utils(self) -> None:
        raise RuntimeError("no gcc")


@pytest.mark.parametrize(
    ("driver", "reasons"),
    [
        (Driver(), [None, "compute capability 6.1 is older than 7.0, the first that the Triton kernels run on"]),
        (
            DriverWithoutCompiler(),
            ["Triton cannot launch kernels (no gcc); install a C compiler, and the headers of Python"] * 2,
        ),
    ],
    ids=["old GPU", "no compiler"],
)
def test_every_gpu_that_cannot_be_served_has_its_reason(
    driver: Any, reasons: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(driver, monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (6, 1)][index])
    backend._gpus_unavailable.cache_clear()
    try:
        assert [backend.BACKEND.unavailable("cuda", index) for index in (0, 1)] == reasons
        assert backend.BACKEND.unavailable("cuda") == reasons[0]
    finally:
        backend._gpus_unavailable.cache_clear()


def test_a_tensor_without_memory_is_an_error_or_zeros(driver: Driver) -> None:
    recon_x, x, logvar = (torch.randn(8, 16) for _ in range(3))
    for target in (x, torch._efficientzerotensor((8, 16), dtype=torch.float32), x):
        functional.gaussian_nll(recon_x, target, logvar, backend="triton")
    known, of_zeros, again = ([value == 0 for value in launch] for launch in driver.launches)
    assert of_zeros == again == known
    logvar.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="a tensor has no memory: its storage has been freed"):
        functional.gaussian_nll(recon_x, x, logvar, backend="triton")
    assert len(driver.launches) == 3


@pytest.mark.parametrize("options", [{}, {"offset": 4}, {"offset": 2**33 + 1}], ids=["plain", "offset", "far"])
def test_a_launch_without_a_look_is_the_same_as_triton_s_own(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Arguments for arguments, for addresses of any alignment; outputs are the same memory each time."""
    mu, logvar, seed = torch.zeros(8, 4), torch.zeros(8, 4), torch.tensor(3)
    z, kl = torch.empty(33)[1:].view(8, 4), torch.empty(8)
    offset = options.get("offset")
    sources = (mu, logvar, seed, offset, z, kl)
    work = latent_work(sources)
    prepared = backend.BACKEND.prepare_latent(work, len(sources), mu.device)
    for sources in ((mu, logvar, seed, offset, z, kl), (mu, logvar, seed, offset, torch.empty(8, 4), kl)):
        driver.launches.clear()
        direct = backend.BACKEND.prepare_latent(work, len(sources), mu.device)
        for _ in range(3):
            direct(sources)
        prepared(sources)
        assert len(set(driver.launches)) == 1, "all four launches are one and the same"
        assert len(driver.launches) == 4
    assert len(driver.loaded) == 2, "one kernel for all addresses that are multiples of 16, one for others"


def test_what_cannot_be_launched_directly_is_launched_as_triton_has_it(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a Triton whose compiled kernels are something else."""
    original, seen = backend.launch._launch, []

    def launch(kernel: Any, programs: int, arguments: dict[str, Any]) -> object:
        seen.append(kernel.fn.__name__)
        original(kernel, programs, arguments)
        return object()

    monkeypatch.setattr(backend.launch, "_launch", launch)
    data, factor = torch.ones(100), torch.tensor(2.0)
    scale = calls.ScaleCall([data, factor, None], "triton")
    for _ in range(3):
        scale.run([data], factor)
    assert seen == ["scale_kernel"] * 3
    assert len(set(driver.launches)) == 1
    assert len(driver.launches) == 3


def test_float64_asks_for_a_triton_that_passes_its_numbers(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    t = [torch.zeros(4, 3, dtype=torch.float64) for _ in range(3)]
    monkeypatch.setattr(backend.arguments, "VERSION", (3, 3))
    with pytest.raises(RuntimeError, match=r"float64 operands: .*Triton 3\.4 or later"):
        functional.gaussian_nll(*t, backend="triton")
    assert driver.launches == []


def latent_work(sources: tuple[Any, ...]) -> Any:
    mu, logvar, seed, offset, z, kl = calls.parts_of(sources)
    divergence = calls.TermWork(
        calls.FORMULAS["kl_standard_normal"],
        False,
        (mu, logvar),
        (None, None),
        (Form(),),
        value=kl.with_ones([1]),
    )
    return calls.LatentWork(divergence, z.shape, False, seed=seed, offset=offset, z=z)


def test_steps_of_any_alignment_launch_what_fits_their_addresses(driver: Driver) -> None:
    """A kernel that was compiled for addresses that are multiples of 16 must not see others."""
    names = ["latent_kernel", "objective_kernel", "scale_kernel", "latent_kernel"]
    step(operands())
    assert driver.loaded == names
    step(operands(4))  # 16 bytes
    assert driver.loaded == names
    step(operands(1))
    assert len(driver.loaded) > len(names)
    loaded = len(driver.loaded)
    functions = [launch[2] for launch in driver.launches]
    for shift in (0, 4, 1, 1, 0):
        step(operands(shift))
    assert len(driver.loaded) == loaded
    again = [launch[2] for launch in driver.launches][len(functions) :]
    assert again[:4] == again[4:8] == again[16:] == functions[:4]
    assert again[8:12] == again[12:16] == functions[8:]


def test_numbers_that_change_compile_nothing(driver: Driver) -> None:
    """An annealed weight, clamp, eps, beta or balance: the same kernels for all values."""
    mu, logvar, prior_mu, prior_logvar = (torch.zeros(8, 4).requires_grad_() for _ in range(4))
    x = torch.zeros(8, 16)
    recon_x, spread = (torch.zeros(8, 16).requires_grad_() for _ in range(2))
    loaded = []
    for k in range(1, 11):
        a = k / 11
        options = {"scale": "std", "clamp": (a, 1 + a), "eps": 1e-3 * a, "backend": "triton"}
        functional.kl_normal(mu, logvar, prior_mu, prior_logvar, balance=a, backend="triton").backward()
        functional.kl_normal(
            mu, logvar, prior_mu, prior_logvar, balance=a, **options, reduction="none"
        ).sum().backward()
        functional.gaussian_nll(recon_x, x, spread, **options).backward()
        z, kl = functional.latent(mu, logvar, **options)
        (z.sum() + kl.sum()).backward()
        functional.elbo_loss(recon_x, x, mu, logvar, spread, beta=a, recon_clamp=(-a, a), backend="triton").backward()
        loaded.append(len(driver.loaded))
    assert loaded == loaded[:1] * 10


def test_a_launch_takes_a_few_microseconds(driver: Driver) -> None:
    """Of Python, before the driver: the best of many, since others run here too, for seconds at a time."""
    driver.launch = lambda *arguments: None  # type: ignore[method-assign]
    launchers: dict[str, tuple[Any, Any]] = {}
    original = backend.launch.KernelLauncher.__call__

    def seen(self: Any, sources: Any) -> None:
        launchers[self._kernel.fn.__name__] = self, sources
        original(self, sources)

    backend.launch.KernelLauncher.__call__ = seen  # type: ignore[method-assign]
    try:
        step(operands())
    finally:
        backend.launch.KernelLauncher.__call__ = original  # type: ignore[method-assign]
    for name, (launch, sources) in launchers.items():
        best, end = math.inf, time.monotonic() + 30
        while best >= 15e-6 and time.monotonic() < end:
            best = min(best, timed(launch, sources))
        assert best < 15e-6, f"{name}: {best * 1e6:.1f} µs"


def timed(launch: Any, sources: Any) -> float:
    """Seconds a launch, of ten."""
    start = time.perf_counter()
    for _ in itertools.repeat(None, 10):
        launch(sources)
    return (time.perf_counter() - start) / 10
