"""Values and gradients of every operation against float64, over dtypes, layouts, sizes and threads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from conftest import INSTRUCTION_SETS, KERNEL_TARGETS, Target, kl_elements, nll_elements, reduced, threads
from torch import Tensor

from fusedvae import functional

REDUCTIONS = ["batchmean", "sum", "none"]
SHAPE = (5, 3, 9, 11)
SPREADS = {
    "each": SHAPE,
    "scalar": (),
    "channel": (3, 1, 1),
    "pixel": (1, 3, 9, 11),
    "plane": (5, 1, 9, 11),
    "sample": (5, 1, 1, 1),
    "sample and channel": (5, 3, 1, 1),
    "column": (11,),
    "row": (9, 1),
}
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda t: torch.stack((t, t), -1)[..., 0],
    "misaligned": lambda t: torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape),
    "half of a pair": lambda t: torch.cat((t, t), 1).chunk(2, 1)[0] if t.dim() > 1 else t,
}


def check(found: list[Tensor], expected: list[Tensor], tolerance: float, addends: Sequence[float] = ()) -> None:
    """Each close to its float64 counterpart, on the scale of its largest element. They may be sums that cancel:
    ``addends`` are sums of the sizes then, of what is rounded each by itself."""
    for f, e, rounded in zip(found, expected, addends or [0.0] * len(found), strict=True):
        assert f.shape == e.shape
        scale = max(e.abs().max().item() if e.numel() else 0.0, 0.1)
        atol = max(tolerance * scale, 2**-22 * rounded)
        torch.testing.assert_close(f.double(), e.double(), rtol=tolerance, atol=atol)


def with_gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The values and the gradients of a weighted sum of them (weights that differ, so that none can be mixed up)."""
    weights = torch.linspace(0.5, 2.0, loss.numel(), dtype=torch.float64).view(loss.shape)
    return [loss, *torch.autograd.grad((loss.double() * weights).sum(), inputs)]


def compare_elbo(target: Target, t: list[Tensor], reduction: str, tolerance: float, **options: object) -> None:
    """elbo_loss of (recon_x, x, mu, logvar, recon_logvar) against the formulas."""
    t = [v.detach().requires_grad_(v.is_floating_point()) for v in t]
    wanting = [v for v in t if v.requires_grad]
    loss = functional.elbo_loss(*t, beta=0.7, reduction=reduction, backend=target.backend, **options)
    exact = [v.detach().double().requires_grad_(v.requires_grad) for v in t]
    nll = reduced(
        nll_elements(exact[0], exact[1], exact[4], bool(options.get("full"))).expand(exact[0].shape), reduction
    )
    expected = nll + 0.7 * reduced(kl_elements(exact[2], exact[3]), reduction)
    check(with_gradients(loss, wanting), with_gradients(expected, [v for v in exact if v.requires_grad]), tolerance)


# Where kernels take their time, of each two of these three every pair.
@pytest.mark.parametrize(
    ("layout", "spread", "reduction"),
    [
        pytest.param(layout, spread, reduction, marks=[] if (i + j + k) % 3 == 0 else pytest.mark.large)
        for i, layout in enumerate(LAYOUTS)
        for j, spread in enumerate(SPREADS)
        for k, reduction in enumerate(REDUCTIONS)
    ],
)
def test_elbo_over_layouts_and_broadcasts(target: Target, layout: str, spread: str, reduction: str) -> None:
    arrange = LAYOUTS[layout]
    t = [arrange(torch.randn(SHAPE)), arrange(torch.randn(SHAPE)), arrange(torch.randn(5, 4, 2, 3))]
    t += [arrange(torch.randn(5, 4, 2, 3)), torch.randn(SPREADS[spread])]
    compare_elbo(target, t, reduction, 2e-6, full=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_operands_of_different_layouts(target: Target, reduction: str) -> None:
    arrange = list(LAYOUTS.values())
    for k in range(len(arrange)):
        shapes = [SHAPE, SHAPE, (5, 4, 2, 3), (5, 4, 2, 3), SHAPE]
        compare_elbo(
            target, [arrange[(k + j) % len(arrange)](torch.randn(s)) for j, s in enumerate(shapes)], reduction, 2e-6
        )


@pytest.mark.parametrize(
    "size",
    [1, 3, 16, 17, 1024, 1025, *[pytest.param(n, marks=pytest.mark.large) for n in (15, 63, 1023, 4097, 50_001)]],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_sizes_around_the_edges_of_tiles(target: Target, batch: int, size: int) -> None:
    for reduction in REDUCTIONS:
        shapes = [(batch, size), (batch, size), (batch, size), (batch, size)]
        for spread in ((batch, size), (size,), ()):
            compare_elbo(target, [torch.randn(s) for s in (*shapes, spread)], reduction, 4e-6)


@pytest.mark.parametrize("shape", [(37, 64), (5, 260), (6, 3, 40), (70, 4)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_spread_a_column_of_whole_vectors(target: Target, shape: tuple[int, ...], reduction: str) -> None:
    latent = (shape[0], 8)
    compare_elbo(target, [torch.randn(s) for s in (shape, shape, latent, latent, shape[-1:])], reduction, 4e-6)


@pytest.mark.large
@pytest.mark.parametrize("shape", [(2500, 48), (300, 3), (1100, 1030), (9, 2, 2100), (40, 33_000)], ids=str)
def test_a_spread_a_column_over_many_rows(target: Target, shape: tuple[int, ...]) -> None:
    latent = (shape[0], 2)
    t = [torch.randn(s) for s in (shape, shape, latent, latent, shape[-1:])]
    compare_elbo(target, t, "batchmean", 4e-6)


@pytest.mark.parametrize(
    ("recon", "data", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-13),
        (torch.float32, torch.float64, 1e-6),
        (torch.bfloat16, torch.bfloat16, 8e-3),
        (torch.float16, torch.float16, 2e-3),
        (torch.bfloat16, torch.float32, 8e-3),
        (torch.float16, torch.uint8, 2e-3),
        (torch.float32, torch.uint8, 2e-6),
        (torch.float32, torch.int64, 2e-6),
        (torch.float32, torch.bool, 2e-6),
    ],
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_dtypes_and_mixtures(
    target: Target, recon: torch.dtype, data: torch.dtype, tolerance: float, reduction: str
) -> None:
    x = torch.randn(6, 3, 40) if data.is_floating_point else torch.randint(0, 2, (6, 3, 40))
    t = [torch.randn(6, 3, 40).to(recon), x.to(data), torch.randn(6, 10).to(recon), torch.randn(6, 10).to(recon)]
    compare_elbo(target, [*t, torch.randn(3, 1).to(recon)], reduction, tolerance)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_packed_tensors_are_their_halves(target: Target, reduction: str, channels_last: bool) -> None:
    form = torch.channels_last if channels_last else torch.contiguous_format
    recon, moments = (torch.randn(4, 6, 5, 7).to(memory_format=form).requires_grad_() for _ in range(2))
    x = torch.randn(4, 3, 5, 7).to(memory_format=form)
    packed = functional.elbo_loss(recon, x, moments, None, None, reduction=reduction, backend=target.backend)
    found = with_gradients(packed, [recon, moments])
    exact = [recon.detach().double().requires_grad_(), moments.detach().double().requires_grad_()]
    (m, spread), (mu, logvar) = (t.chunk(2, 1) for t in exact)
    nll, kl = reduced(nll_elements(m, x, spread), reduction), reduced(kl_elements(mu, logvar), reduction)
    check(found, with_gradients(nll + kl, exact), 2e-6)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(5, 8, 3, 7), (2, 6, 33, 34), (3, 2, 1, 1)])
def test_latent(target: Target, shape: tuple[int, ...], packed: bool, channels_last: bool) -> None:
    form = torch.channels_last if channels_last else torch.contiguous_format
    moments = torch.randn(shape).to(memory_format=form).requires_grad_()
    inputs = [moments] if packed else [t.detach().requires_grad_() for t in moments.chunk(2, 1)]
    # The noise of a seed has nothing to do with the layout: recover it from a plain sample.
    half = (shape[0], shape[1] // 2, *shape[2:])
    zero = torch.zeros(half)
    noise = functional.reparameterize(
        zero, zero, generator=torch.Generator(target.device).manual_seed(9), backend="reference"
    ).double()
    pair = (*inputs, None)[:2]
    z, kl = functional.latent(*pair, generator=torch.Generator(target.device).manual_seed(9), backend=target.backend)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    mu, logvar = exact[0].chunk(2, 1) if packed else exact
    expected_z = mu + torch.exp(logvar / 2) * noise
    expected_kl = kl_elements(mu, logvar).flatten(1).sum(1)
    weights = torch.rand(half)

    def gradients(z: Tensor, kl: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad((z * weights).sum() + (kl * weights.flatten(1)[:, 0]).sum(), inputs))

    check([z, kl], [expected_z, expected_kl], 2e-6)
    check(gradients(z, kl, inputs), gradients(expected_z, expected_kl, exact), 2e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("var", [(6, 3, 8), (6, 3, 1), (6, 3), (6, 1, 8), None])
def test_torchs_own_loss(target: Target, var: tuple[int, ...] | None, full: bool, reduction: str) -> None:
    mean, x = (torch.randn(6, 3, 8).requires_grad_() for _ in range(2))
    variance = 0.4 if var is None else (torch.rand(var) - 0.0).clamp(min=0).requires_grad_()
    inputs = [mean, x] if var is None else [mean, x, variance]
    options = {"full": full, "eps": 0.1, "reduction": reduction}
    found = functional.gaussian_nll_loss(mean, x, variance, backend=target.backend, **options)
    if var == (6, 1, 8):  # which PyTorch 2.6 does not take by itself
        variance = variance.expand(mean.shape)
    expected = torch.nn.functional.gaussian_nll_loss(mean, x, variance, **options)
    check(with_gradients(found, inputs), with_gradients(expected, inputs), 5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchs_own_loss_of_a_number_in_memory(target: Target, dtype: torch.dtype) -> None:
    many, one = torch.randn(6, 3).to(dtype), torch.tensor(0.5, dtype=torch.float64)
    for mean, x in ((many, one), (many, torch.tensor(2))):
        operands = mean.clone().requires_grad_(), x, torch.full((6, 3), 0.3, dtype=dtype)
        for reduction in ("mean", "none"):
            found = functional.gaussian_nll_loss(*operands, reduction=reduction, backend=target.backend)
            assert found.dtype == (torch.float32 if reduction == "mean" else dtype)
            expected = torch.nn.functional.gaussian_nll_loss(*[t.double() for t in operands], reduction=reduction)
            torch.testing.assert_close(found.double(), expected, rtol=8e-3, atol=8e-3)


def test_not_a_number_and_infinity_go_where_they_go_in_eager(target: Target) -> None:
    special = torch.tensor([0.0, 1.0, -1.0, 88.0, -88.0, torch.inf, -torch.inf, torch.nan])
    t = torch.cartesian_prod(special, special, special)

    def run(backend: str) -> list[Tensor]:
        recon_x, x, logvar = (v.clone().requires_grad_() for v in t.unbind(1))
        nll = functional.gaussian_nll(recon_x, x, logvar, reduction="none", backend=backend)
        kl = functional.kl_standard_normal(recon_x, logvar, reduction="none", backend=backend)
        grads = torch.autograd.grad(nll.sum(), [recon_x, x, logvar]) + torch.autograd.grad(kl.sum(), [recon_x, logvar])
        return [nll, kl, *grads]

    for f, e in zip(run(target.backend), run("reference"), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.large
def test_errors_no_larger_than_those_of_eager(target: Target) -> None:
    mu, x, logvar = torch.randn(3, 100_000).unbind(0)
    logvar = logvar * 3
    for function, exact, eager in (
        (functional.kl_standard_normal, kl_elements(mu, logvar), 0.5 * (mu**2 + logvar.exp() - 1 - logvar)),
        (
            lambda *t, **k: functional.gaussian_nll(t[0], x, t[1], **k),
            nll_elements(mu, x, logvar),
            0.5 * (logvar + (mu - x) ** 2 * torch.exp(-logvar)),
        ),
    ):
        found = function(mu, logvar, reduction="none", backend=target.backend)
        size = exact.abs() + 1
        assert ((found - exact).abs() / size).mean() <= 1.1 * ((eager - exact).abs() / size).mean()
        total = function(mu, logvar, reduction="sum", backend=target.backend)
        assert abs(total.item() - exact.sum().item()) <= 1e-6 * exact.abs().sum().item()


def run_everything(backend: str, device: str = "cpu") -> list[Tensor]:
    """Values and gradients of a mid-sized problem."""
    generator = torch.Generator(device).manual_seed(3)
    shapes = ((33, 3, 40, 41), (33, 3, 40, 41), (33, 700), (33, 700), (3, 1, 1))
    t = [torch.randn(s, generator=generator, device=device).requires_grad_() for s in shapes]
    z, kl = functional.latent(t[2], t[3], generator=generator, backend=backend)
    loss = functional.elbo_loss(*t, backend=backend)
    column = functional.gaussian_nll(t[0], t[1], torch.zeros(41, device=device).requires_grad_(), backend=backend)
    return [z, kl, loss, column, *torch.autograd.grad(loss + (z**2).sum() + kl.sum() + column, t)]


@pytest.mark.large
@pytest.mark.parametrize("target", KERNEL_TARGETS, indirect=True)
def test_bitwise_the_same_on_every_run_and_for_any_number_of_threads(target: Target) -> None:
    results = []
    for count in (1, 2, 3, 2):
        with threads(count):
            results.append(run_everything(target.backend, target.device))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.large
@pytest.mark.parametrize("target", KERNEL_TARGETS, indirect=True)
def test_sums_that_are_left_to_pytorch_do_not_depend_on_threads_either(target: Target) -> None:
    x = torch.randn(100, 3, 14, 14).to(memory_format=torch.channels_last)
    kl, weights, column = (torch.rand(100_000) for _ in range(3))
    hidden, layer = torch.randn(100_000, 2), (torch.randn(4, 2), torch.zeros(4))
    results = []
    for count in (1, 2, 3, 4, 7):
        logvar, beta = torch.zeros(3, 14, 14, requires_grad=True), torch.ones((), requires_grad=True)
        with threads(count):
            nll = functional.gaussian_nll(x, x + 0.5, logvar, backend=target.backend)
            each = functional.elbo_loss(
                column[:, None], column[:, None], None, None, kl=kl, beta=beta, reduction="none", backend=target.backend
            )
            linear = functional.linear_elbo(
                hidden, *layer, torch.zeros(100_000, 4), None, None, kl=kl, backend=target.backend, return_terms=True
            )
            results.append(
                [*torch.autograd.grad(nll, logvar), *torch.autograd.grad(each, beta, weights), linear.kl.detach()]
            )
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


_ISA_SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from fusedvae import _C
from test_operations import functional, run_everything
assert _C.cpu_isa() == sys.argv[1], _C.cpu_isa()
native, reference = run_everything("native"), run_everything("reference")
for a, b in zip(native, reference, strict=True):
    scale = b.abs().max().item()
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6 * scale)

# Exponentials in float64, from those that overflow to those that are nothing: the gradient where the error is 1.
logvar = torch.cat([torch.linspace(-746, 746, 20_011).double(), torch.randn(1000).double()])
logvar[5:9] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])
recon_x = torch.ones_like(logvar)[None].requires_grad_()
value = functional.gaussian_nll(recon_x, torch.zeros_like(recon_x), logvar[None], reduction="sum", backend="native")
(found,) = torch.autograd.grad(value, recon_x)
torch.testing.assert_close(found[0], torch.exp(-logvar), rtol=6e-16, atol=1e-323, equal_nan=True)

# All that float16 can hold: what is subnormal there is not in float32.
torch.set_flush_denormal(True)
halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
halves = halves[halves.isfinite()]
zero = torch.zeros_like(halves)
assert torch.equal(functional.reparameterize(halves, zero, noise=zero, backend="native"), halves)
"""


@pytest.mark.large
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    if isa not in INSTRUCTION_SETS:
        pytest.skip(f"this machine has no {isa}")
    here = os.path.dirname(__file__)
    run = subprocess.run(
        [sys.executable, "-c", _ISA_SCRIPT, isa, here],
        env={**os.environ, "FUSEDVAE_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.large
@pytest.mark.parametrize("isa", ["AVX2", "avx1024", " avx512"])
def test_an_instruction_set_that_there_is_not_is_refused(isa: str) -> None:
    script = "import torch, fusedvae; print(fusedvae.backends()); x = torch.ones(2, 3)\n"
    script += "fusedvae.functional.gaussian_nll(x, x, backend='native')"
    environment = {**os.environ, "FUSEDVAE_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    message = rf"FUSEDVAE_CPU_ISA: expected one of .*'baseline' on this machine; got '{isa}'"
    assert re.search(message, done.stdout)
    assert re.search(f"RuntimeError: {message}", done.stderr)


_MEMORY_SCRIPT = """
import resource, torch
from fusedvae import functional
torch.set_num_threads(1)
mean = torch.zeros(1, 1).expand(1 << 25, 2)  # one number; z takes 256 MiB, the KL 128 MiB, the kernel's sums 256 MiB
functional.kl_standard_normal(mean[:8], mean[:8], backend="native")
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29), -1))
try:
    functional.latent(mean, mean, backend="native")
except MemoryError:
    print("an exception")
"""


@pytest.mark.large
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_memory_that_cannot_be_had_is_an_exception() -> None:
    if os.environ.get("LD_PRELOAD"):
        pytest.skip("sanitizers take memory of their own")
    done = subprocess.run([sys.executable, "-c", _MEMORY_SCRIPT], capture_output=True, text=True)
    assert done.stdout.strip() == "an exception", done.stderr[-1000:]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_in_gives_sums_of_nothing(target: Target, reduction: str) -> None:
    t = [torch.empty(0, 3), torch.empty(0, 3), torch.empty(0, 2), torch.empty(0, 2)]
    loss = functional.elbo_loss(*t, reduction=reduction, backend=target.backend)
    expected = {"batchmean": torch.tensor(torch.nan), "sum": torch.tensor(0.0), "none": torch.empty(0)}[reduction]
    torch.testing.assert_close(loss, expected, equal_nan=True)


@pytest.mark.parametrize("spread", [(), (3,), (1, 0, 3), (2, 1, 1), (2, 0, 3)])
def test_the_gradient_of_a_sum_of_nothing_is_zero(target: Target, spread: tuple[int, ...]) -> None:
    recon_x, recon_logvar = torch.empty(2, 0, 3), torch.randn(spread).requires_grad_()
    nll = functional.gaussian_nll(recon_x, recon_x, recon_logvar, backend=target.backend)
    (grad,) = torch.autograd.grad(nll, recon_logvar)
    assert torch.equal(grad, torch.zeros(spread))
