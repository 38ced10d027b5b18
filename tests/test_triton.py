"""What is particular to the Triton kernels: tiles and their sums, 64-bit offsets, words far out in the noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import INTERPRETED, Target
from test_noise import philox4x32
from test_operations import check, with_gradients
from torch import Tensor

import fusedvae
from fusedvae import calls, functional, ops
from fusedvae.backend import LatentWork, Part, TermWork, philox
from fusedvae.backend.reference import FORMULAS, PLAIN
from fusedvae.random import normal

if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU or Triton's interpreter", allow_module_level=True)

triton = pytest.importorskip("triton")
tl = triton.language

from fusedvae.backend import triton as backend  # noqa: E402
from fusedvae.backend.triton.noise import words_of  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
SHAPES = {
    "each": (5, 3, 9, 11),
    "scalar": (),
    "channel": (3, 1, 1),
    "pixel": (1, 3, 9, 11),
    "sample": (5, 1, 1, 1),
    "sample and channel": (5, 3, 1, 1),
    "column": (11,),
    "row": (9, 1),
}


def objectives(scale: tuple[int, ...], name: str = "triton") -> list[Tensor]:
    """Values and gradients of objectives with a total and with values per sample."""
    generator = torch.Generator(DEVICE).manual_seed(3)
    shapes = ((5, 3, 9, 11), (5, 3, 9, 11), (5, 24), (5, 24), scale)
    t = [torch.randn(s, generator=generator, device=DEVICE).requires_grad_() for s in shapes]
    found = []
    weight = torch.rand(9, 11, generator=generator, device=DEVICE) > 0.3
    for options in ({}, {"reduction": "none"}, {"weight": weight, "reduction": "weighted_mean"}):
        found += with_gradients(functional.elbo_loss(*t, beta=0.3, backend=name, **options), t)
    return found


LATENTS: dict[str, tuple[tuple[int, ...] | None, dict[str, Any]]] = {
    "from the standard normal": (None, {}),
    "of each": ((3, 6, 50), {}),
    "of a learned prior": ((6, 50), {}),
    "with samples": ((50,), {"samples": 2}),
    "at samples": ((6, 1), {"samples": 2, "estimator": "sample", "scale": "softplus"}),
    "over a dimension": ((3, 1, 50), {"estimator": "sample", "dim": 1}),
}


def latents(prior: tuple[int, ...] | None = None, name: str = "triton", **options: Any) -> list[Tensor]:
    """A sample, its KL, and their gradients."""
    generator = torch.Generator(DEVICE).manual_seed(4)
    shapes = [(3, 6, 50)] * 2 + ([] if prior is None else [prior] * 2)
    t = [torch.randn(s, generator=generator, device=DEVICE).requires_grad_() for s in shapes]
    z, kl = functional.latent(*t, generator=generator, backend=name, **options)
    return [z, kl, *torch.autograd.grad((z**2).sum() + (kl**2).sum(), t)]


def no_counts_are_left() -> bool:
    """Whether all counters are zero again: a later launch would never see its last program otherwise."""
    return all(bool((workspace.counters == 0).all()) for workspace in backend.launch._workspaces.values())


def test_nothing_is_kept_behind_the_dispatcher(monkeypatch: pytest.MonkeyPatch, calls_anew: None) -> None:
    """A compiler that records launches in a CUDA graph owns all memory that is made meanwhile."""
    monkeypatch.setattr(backend.tiling, "_SMALL_TILE", 256)
    monkeypatch.setattr(backend.launch, "_workspaces", {})
    expected = objectives((3, 1, 1), "reference") + latents((6, 50), "reference")
    monkeypatch.setattr(ops, "needs_dispatcher", lambda operands: True)
    check(objectives((3, 1, 1)) + latents((6, 50)), expected, 4e-6)
    assert backend.launch._workspaces == {}


def test_what_is_large_is_not_kept(monkeypatch: pytest.MonkeyPatch, calls_anew: None) -> None:
    monkeypatch.setattr(backend.tiling, "_SMALL_TILE", 256)
    monkeypatch.setattr(backend.launch, "MOST_KEPT", -1)
    monkeypatch.setattr(backend.launch, "_workspaces", {})
    check(
        objectives((3, 1, 1)) + latents((6, 50)),
        objectives((3, 1, 1), "reference") + latents((6, 50), "reference"),
        4e-6,
    )
    assert backend.launch._workspaces == {}


@pytest.mark.parametrize("scale", SHAPES)
def test_sums_over_many_tiles(monkeypatch: pytest.MonkeyPatch, calls_anew: None, scale: str) -> None:
    monkeypatch.setattr(backend.tiling, "_SMALL_TILE", 256)
    monkeypatch.setattr(backend.tiling, "_COLUMN", 16)
    check(objectives(SHAPES[scale]), objectives(SHAPES[scale], "reference"), 4e-6)
    assert no_counts_are_left()


@pytest.mark.parametrize("kind", LATENTS)
def test_divergences_over_many_tiles(monkeypatch: pytest.MonkeyPatch, calls_anew: None, kind: str) -> None:
    monkeypatch.setattr(backend.tiling, "_SMALL_TILE", 64)
    monkeypatch.setattr(backend.tiling, "_COLUMN", 16)
    prior, options = LATENTS[kind]
    check(latents(prior, **options), latents(prior, "reference", **options), 4e-6)
    assert no_counts_are_left()


@pytest.mark.parametrize("scale", ["scalar", "column"])
def test_sums_of_parts_of_the_tiles(monkeypatch: pytest.MonkeyPatch, calls_anew: None, scale: str) -> None:
    """Many partial sums are added up by many programs, and then what these have found."""
    monkeypatch.setattr(backend.tiling, "_SMALL_TILE", 128)
    monkeypatch.setattr(backend.tiling, "_COLUMN", 4)
    monkeypatch.setattr(backend.arguments, "_MANY", 3)
    check(objectives(SHAPES[scale]), objectives(SHAPES[scale], "reference"), 4e-6)
    check(latents((50,)), latents((50,), "reference"), 4e-6)
    assert no_counts_are_left()


def told_of_a_likelihood(monkeypatch: pytest.MonkeyPatch, reduction: str, *shapes: tuple[int, ...]) -> dict[str, Any]:
    """What a kernel is told of operands of these shapes, over which it is not run; and the room for its sums."""
    found: dict[str, Any] = {}

    def see(self: Any, sources: Any) -> None:
        found.update({**self.fixed, **{f"room for {name}": count for name, _, count, _ in self._sums}})

    monkeypatch.setattr(backend.launch.KernelLauncher, "__call__", see)
    t = [torch.empty(1, device=DEVICE).expand(shape).requires_grad_() for shape in shapes]
    functional.gaussian_nll(*t, reduction=reduction, backend="triton")
    return found


def test_values_of_many_samples_are_finished_by_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    told = told_of_a_likelihood(monkeypatch, "none", *[(65_536, 16)] * 3)
    assert told["chunks"] >= 512
    assert told["rows"] * told["chunks"] == 65_536
    assert told["split"] is None  # 128 sums each, one a sample
    assert told["room for totals"] == 65_536


def test_no_program_adds_up_more_than_a_few_thousand_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    told = told_of_a_likelihood(monkeypatch, "sum", *[(1 << 14, 1 << 12)] * 3)
    assert told["room for totals"] == 1 << 15
    assert told["split"] == 256  # of 128 parts
    told = told_of_a_likelihood(monkeypatch, "sum", *[(65_536, 512)] * 2, (512,))
    assert told["a_tile_i"] * told["a_split"] <= 8192
    assert told["a_tile_i"] * told["a_tiles"] / (512 / told["a_tile_i"]) / told["a_split"] <= 8192
    told = told_of_a_likelihood(monkeypatch, "sum", *[(128, 20_000)] * 2, (20_000,))
    assert told["a_split"] is None
    assert told["a_tiles"] / -(-20_000 // told["a_tile_i"]) * told["a_tile_i"] <= 4096


def test_64_bit_offsets_change_nothing(monkeypatch: pytest.MonkeyPatch, calls_anew: None) -> None:
    def results() -> list[Tensor]:
        return [*objectives((3, 1, 1)), *latents(), normal(1001, 5, device=DEVICE, backend="triton")]

    narrow = results()
    calls._calls.clear()
    monkeypatch.setattr(backend.arguments, "_NARROW", 0)
    for f, e in zip(results(), narrow, strict=True):
        assert torch.equal(f, e)


@pytest.mark.parametrize(("size", "strides", "wide"), [(2**15, (2**16, 1), True), (2**15, (2**15, 1), False)])
def test_what_needs_64_bits(size: int, strides: tuple[int, int], wide: bool) -> None:
    """Offsets past 2^31 need 64 bits, though there are fewer elements; seen from the launch, without the memory."""
    mu, logvar, z = (Part(k, torch.Size((size, 2**15)), strides, torch.float32) for k in range(3))
    divergence = TermWork(FORMULAS["kl_standard_normal"], False, (mu, logvar), (None, None), (PLAIN,))
    work = LatentWork(divergence, z.shape, False, z=z)
    launch = backend.BACKEND.prepare_latent(work, 3, torch.device(DEVICE))
    assert launch.fixed["walk"] & 1 == wide


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("columns", [8, 6])
@pytest.mark.parametrize("offset", [0, 8, 6, 2**33 + 4, 2**33 + 1])
def test_an_offset_in_memory(offset: int, columns: int, dtype: torch.dtype, tolerance: float) -> None:
    """As a compiler has it; the kernel finds out whether a counter makes four neighbours."""
    shape, seed = torch.Size((3, columns)), torch.tensor(5, device=DEVICE)
    zeros, out = torch.zeros(shape, dtype=dtype, device=DEVICE), torch.empty(shape, dtype=dtype, device=DEVICE)
    for first in (offset, torch.tensor(offset, dtype=torch.float64, device=DEVICE)):
        sources = (zeros, zeros, seed, first, out)
        mu, logvar, seed_part, offset_part, z = calls.parts_of(sources)
        divergence = TermWork(FORMULAS["kl_standard_normal"], False, (mu, logvar), (None, None), (PLAIN,))
        work = LatentWork(divergence, shape, False, seed=seed_part, offset=offset_part, z=z)
        backend.BACKEND.prepare_latent(work, len(sources), zeros.device)(sources)
        check([out], [philox.normal(tuple(shape), seed, dtype, offset)], tolerance)


@triton.jit
def words_kernel(out, quad, seed, wide: tl.constexpr):
    """The four words of one counter."""
    w0, w1, w2, w3 = words_of(tl.load(quad), tl.load(seed), wide)
    tl.store(out, w0.to(tl.int64))
    tl.store(out + 1, w1.to(tl.int64))
    tl.store(out + 2, w2.to(tl.int64))
    tl.store(out + 3, w3.to(tl.int64))


@pytest.mark.parametrize("seed", [0, -1, 2**40 + 7])
@pytest.mark.parametrize("quad", [0, 2**32 - 1, 2**32, 2**40 + 5])
def test_counters_have_64_bits(quad: int, seed: int) -> None:
    out = torch.empty(4, dtype=torch.int64, device=DEVICE)
    words_kernel[(1,)](out, torch.tensor([quad], device=DEVICE), torch.tensor([seed], device=DEVICE), True)
    counter = np.array([[quad % 2**32, quad >> 32, 0, 0]], dtype=np.uint64)
    assert out.tolist() == philox4x32(counter, (seed % 2**32, (seed >> 32) % 2**32))[0].tolist()


def test_the_same_training_as_on_other_backends() -> None:
    x = torch.rand(32, 12, device=DEVICE)

    def losses(name: str) -> Tensor:
        torch.manual_seed(1)
        vae = fusedvae.VAE(torch.nn.Linear(12, 8), torch.nn.Linear(4, 24), 4).to(DEVICE)
        optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
        found = []
        with fusedvae.use_backend(name):
            for _ in range(8):
                optimizer.zero_grad()
                loss = vae.loss(x)
                loss.backward()
                optimizer.step()
                found.append(loss.detach())
        return torch.stack(found)

    found = losses("triton")
    assert found[-1] < found[0]
    for name in fusedvae.backends():
        torch.testing.assert_close(losses(name), found, rtol=2e-5, atol=1e-5)


def test_the_interpreter_is_never_the_first_choice() -> None:
    if INTERPRETED and "native" in fusedvae.backends():
        assert fusedvae.backend.resolve("cpu") == "native"
    assert fusedvae.backends()["triton"].devices == (Target("triton", DEVICE).device,)
