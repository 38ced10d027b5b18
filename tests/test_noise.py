"""The noise stream: bit-exact words, Box-Muller values, statistics, and what must not change it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import Target, leaf, sampling, threads
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusedvae import functional
from fusedvae.backend import philox
from fusedvae.random import normal

SEEDS = [0, 1, -1, 20140501, 2**31, 2**32 - 1, 2**32, -(2**63), 2**63 - 1, 2**63, 2**64 - 1, 0x299F31D0A4093822]


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 by its paper: counters (n, 4) to words (n, 4)."""
    c = counter.astype(np.uint64).T.copy()
    k0, k1 = key
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        low, high = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = np.stack(
            [
                (high >> shift) ^ c[1] ^ np.uint64(k0),
                high & mask,
                (low >> shift) ^ c[3] ^ np.uint64(k1),
                low & mask,
            ]
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c.T


def distance_from_normal(values: np.ndarray) -> float:
    """Kolmogorov and Smirnov's, times the root of the count: beyond 1.95 once in 1000 times, beyond 2.23 in 10000."""
    ordered = torch.special.ndtr(torch.from_numpy(np.sort(values.ravel()))).numpy()
    steps = np.arange(len(ordered) + 1) / len(ordered)
    return max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max()) * np.sqrt(len(ordered))


def expected_noise(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The first values of a seed's stream in float64, and the radius each was scaled by."""
    blocks = np.arange((count + 3) // 4, dtype=np.uint64)
    zeros = np.zeros_like(blocks)
    counter = np.stack([blocks & np.uint64(0xFFFFFFFF), blocks >> np.uint64(32), zeros, zeros], axis=1)
    words = philox4x32(counter, (seed % 2**32, (seed >> 32) % 2**32))
    u = (words >> np.uint64(1)).astype(np.float32) * np.float32(2**-31) + np.float32(2**-32)
    assert u.dtype == np.float32
    assert ((u > 0) & (u <= 1)).all()
    u = u.astype(np.float64)
    values, radii = np.empty((len(blocks), 4)), np.empty((len(blocks), 4))
    for first in (0, 2):
        radius = np.sqrt(-2 * np.log(u[:, first]))
        angle = 2 * np.pi * u[:, first + 1]
        values[:, first], values[:, first + 1] = radius * np.cos(angle), radius * np.sin(angle)
        radii[:, first] = radii[:, first + 1] = radius
    return values.reshape(-1)[:count], radii.reshape(-1)[:count]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_the_philox_of_these_tests_gives_the_known_answers_of_random123(counter: str, key: str, words: str) -> None:
    counters = np.array([[int(word, 16) for word in counter.split()]], dtype=np.uint64)
    k0, k1 = (int(word, 16) for word in key.split())
    assert [f"{word:08x}" for word in philox4x32(counters, (k0, k1))[0]] == words.split()


def assert_is_the_stream(values: Tensor, seed: int) -> None:
    found = values.cpu().double().numpy()
    expected, radius = expected_noise(len(found), seed)
    # A float32 angle is known to half an ulp of a turn, so errors go with the radius, not with the value.
    assert np.max(np.abs(found - expected) / np.maximum(radius, 1e-6)) < 4 * 2.0**-24
    # Where the value is not near a zero of the sine or cosine, a few ulp of the value itself.
    large = np.abs(expected) > 0.1 * radius
    assert np.max(np.abs(found - expected)[large] / np.abs(expected[large])) < 8 * 2.0**-24


@pytest.mark.parametrize("seed", SEEDS)
def test_the_stream_is_box_muller_over_philox_words(target: Target, seed: int) -> None:
    assert_is_the_stream(normal(10_007, seed, device=target.device, backend=target.backend), seed)


def test_the_stream_of_devices_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(philox, "_in_float64", lambda tensor: tensor)
    assert_is_the_stream(philox.normal((10_007,), torch.tensor(5), torch.float32), 5)


def test_a_known_word_reaches_the_output(target: Target) -> None:
    """Key and counter zero: the published words, through the transform by hand."""
    u0, u1 = ((w >> 1) / 2**31 + 2**-32 for w in (0x6627E8D5, 0xE169C58D))
    first = np.sqrt(-2 * np.log(u0)) * np.cos(2 * np.pi * u1)
    assert normal(1, 0, device=target.device, backend=target.backend).item() == pytest.approx(first, rel=1e-6)


def test_every_length_gives_a_prefix_of_the_same_stream(target: Target) -> None:
    whole = normal(4096, 11, device=target.device, backend=target.backend)
    for count in (*range(131), 255, 256, 257, 1023, 1024, 1025, 4095):
        part = normal(count, 11, device=target.device, backend=target.backend)
        assert part.shape == (count,)
        assert torch.equal(part, whole[:count]), count


def test_the_shape_does_not_matter(target: Target) -> None:
    flat = normal(3 * 5 * 7, 12, device=target.device, backend=target.backend)
    assert torch.equal(normal((3, 5, 7), 12, device=target.device, backend=target.backend), flat.view(3, 5, 7))
    assert normal((), 12, device=target.device, backend=target.backend).item() == flat[0].item()
    assert normal((4, 0, 2), 12, device=target.device, backend=target.backend).shape == (4, 0, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_the_float32_values_converted(target: Target, dtype: torch.dtype) -> None:
    single = normal(5003, 13, device=target.device, backend=target.backend)
    assert torch.equal(normal(5003, 13, dtype=dtype, device=target.device, backend=target.backend), single.to(dtype))


def test_a_seed_is_its_64_bits(target: Target) -> None:
    def first(seed: int | torch.Tensor) -> torch.Tensor:
        return normal(64, seed, device=target.device, backend=target.backend)

    assert torch.equal(first(-1), first(2**64 - 1))
    assert torch.equal(first(-(2**63)), first(2**63))
    assert torch.equal(first(7 + 2**40), first(torch.tensor(7 + 2**40, device=target.device)))
    assert not torch.equal(first(7), first(7 + 2**32)), "the high word of the seed is ignored"
    assert not torch.equal(first(7), first(7 + 2**63)), "the top bit of the seed is ignored"


@pytest.mark.large
@pytest.mark.parametrize("count", [5, 1021, 70_001, 300_007])
def test_the_thread_count_changes_nothing(target: Target, count: int) -> None:
    results = []
    for n in (1, 2, 3):
        with threads(n):
            results.append(normal(count, 14, device=target.device, backend=target.backend))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.large
def test_moments_and_distribution_are_those_of_a_standard_normal(target: Target) -> None:
    count = 1_000_000
    values = normal(count, 15, device=target.device, backend=target.backend).cpu().double().numpy()
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((values**power).mean() - moment) < 4.5 * np.sqrt(variance / count), power
    assert distance_from_normal(values) < 1.95
    for lane in range(4):
        assert distance_from_normal(values[lane::4]) < 2.23, lane
    assert 4.3 < np.abs(values).max() < 6.7


@pytest.mark.large
def test_neighbours_and_lanes_are_uncorrelated(target: Target) -> None:
    values = normal(400_000, 16, device=target.device, backend=target.backend).cpu().double().numpy()
    lanes = values.reshape(-1, 4)
    correlations = np.corrcoef(lanes.T) - np.eye(4)
    assert np.abs(correlations).max() < 5 / np.sqrt(len(lanes))
    squares = np.corrcoef((lanes**2).T) - np.eye(4)
    assert np.abs(squares).max() < 5 / np.sqrt(len(lanes))
    for lag in (1, 2, 3, 4, 8, 16, 1024):
        assert abs(np.mean(values[:-lag] * values[lag:])) < 5 / np.sqrt(len(values)), lag


@pytest.mark.large
def test_streams_of_different_seeds_are_independent(target: Target) -> None:
    count = 40_000
    seeds = [0, 1, 2, 3, 2**32, 2**32 + 1, 2**63, -1]
    streams = [normal(count, s, device=target.device, backend=target.backend).cpu().double().numpy() for s in seeds]
    correlations = np.corrcoef(np.stack(streams)) - np.eye(len(seeds))
    assert np.abs(correlations).max() < 5 / np.sqrt(count)
    assert distance_from_normal(np.stack(streams)) < 1.95
    assert len(np.unique(np.stack(streams).reshape(-1, 4), axis=0)) == len(seeds) * count // 4


@pytest.mark.slow
def test_nothing_repeats_within_2_to_the_24_elements(target: Target) -> None:
    values = normal(2**24, 17, device=target.device, backend=target.backend).cpu().numpy()
    pairs = values.view(np.uint64).reshape(-1, 2)
    with np.errstate(over="ignore"):
        mixed = pairs[:, 0] * np.uint64(0x9E3779B97F4A7C15) + (pairs[:, 1] ^ (pairs[:, 1] >> np.uint64(29)))
    assert len(np.unique(mixed)) == 2**22


# --- through the operations -------------------------------------------------------------------------------------


def drawn(shape: tuple[int, ...], target: Target, generator: torch.Generator | None = None) -> torch.Tensor:
    zeros = torch.zeros(shape, device=target.device)
    return functional.reparameterize(zeros, zeros, generator=generator, backend=target.backend)


def test_the_seed_of_an_operation_comes_from_torch(target: Target) -> None:
    torch.manual_seed(18)
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=target.device)
    torch.manual_seed(18)
    assert torch.equal(drawn((6, 37), target), normal((6, 37), seed, device=target.device, backend=target.backend))


def test_manual_seed_repeats_and_calls_differ(target: Target) -> None:
    torch.manual_seed(19)
    first, second = drawn((4, 9), target), drawn((4, 9), target)
    torch.manual_seed(19)
    assert torch.equal(first, drawn((4, 9), target))
    assert torch.equal(second, drawn((4, 9), target))
    assert not (first == second).any()


def test_a_generator_is_used_and_leaves_the_default_one_alone(target: Target) -> None:
    before = torch.get_rng_state()
    first = drawn((4, 9), target, torch.Generator(target.device).manual_seed(3))
    again = drawn((4, 9), target, torch.Generator(target.device).manual_seed(3))
    other = drawn((4, 9), target, torch.Generator(target.device).manual_seed(4))
    assert torch.equal(first, again)
    assert not (first == other).any()
    assert torch.equal(before, torch.get_rng_state())
    zeros = torch.zeros(4, 9, device=target.device)
    generator = torch.Generator(target.device).manual_seed(3)
    assert torch.equal(first, functional.latent(zeros, zeros, generator=generator, backend=target.backend).z)


def test_memory_layouts_get_the_same_noise(target: Target) -> None:
    shape = (3, 10, 5, 7)
    expected = normal(shape, 20, device=target.device, backend=target.backend)
    seed = torch.tensor(20, device=target.device)
    zeros = torch.zeros(shape, device=target.device)
    layouts = {
        "channels_last": zeros.contiguous(memory_format=torch.channels_last),
        "transposed": torch.zeros(7, 10, 5, 3, device=target.device).transpose(0, 3),
        "strided": torch.zeros(3, 20, 5, 14, device=target.device)[:, ::2, :, ::2],
        "expanded": torch.zeros(1, 10, 1, 1, device=target.device).expand(shape),
    }
    for name, layout in layouts.items():
        torch.manual_seed(21)
        z = functional.reparameterize(layout, layout, backend=target.backend)
        torch.manual_seed(21)
        plain = functional.reparameterize(zeros, zeros, backend=target.backend)
        assert torch.equal(z, plain), name
        if target.backend != "reference":
            spec = sampling(None, target.backend)
            (direct,) = torch.ops.fusedvae.latent([layout, layout, seed, None, None], *spec)
            assert torch.equal(direct, expected), name
    packed = torch.zeros(3, 20, 5, 7, device=target.device).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(21)
    assert torch.equal(functional.latent(packed, None, backend=target.backend).z, plain)


def test_backends_agree_to_rounding(target: Target) -> None:
    torch.manual_seed(22)
    ours = drawn((5, 1001), target)
    torch.manual_seed(22)
    reference = drawn((5, 1001), Target("reference", target.device))
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(6, 1001), (77, 16), (1003, 4), (501, 7), (48, 1024)])
def test_the_noise_of_half_precisions(target: Target, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Half an ulp from the noise, and 2^-20 of the radius, as a GPU's own functions are exact; and mostly the
    float32 values converted."""
    zeros = torch.zeros(shape, dtype=dtype, device=target.device)
    torch.manual_seed(24)
    z, _ = functional.latent(zeros, zeros, backend=target.backend)
    torch.manual_seed(24)
    seed = int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=target.device))
    values, radii = (torch.from_numpy(found) for found in expected_noise(z.numel(), seed))
    found, limits = z.flatten().cpu(), torch.finfo(dtype)
    half_ulp = 0.5 * limits.eps * (values.abs() + limits.smallest_normal)
    assert ((found.double() - values).abs() <= half_ulp + 2.0**-20 * radii).all()
    assert (found != values.float().to(dtype)).double().mean() < 0.01


def test_layouts_get_the_same_noise_in_bfloat16(target: Target) -> None:
    """Whether a thread makes neighbours of two counters, of one, or each element by itself."""
    if target.backend == "native":
        pytest.skip("on a GPU, its noise is exact where tensors are not flat")

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    layouts = {
        "samples apart": zeros(12, 6, 4)[::2],
        "short rows": zeros(6, 6, 8)[:, :, :4],
        "strided": zeros(6, 6, 8)[:, :, ::2],
        "transposed": zeros(4, 6, 6).transpose(0, 2),
    }

    def sampled(mean: Tensor, **options: int) -> Tensor:
        torch.manual_seed(25)
        return functional.latent(mean, mean, backend=target.backend, **options).z

    plain = sampled(zeros(6, 6, 4))
    for name, layout in layouts.items():
        assert torch.equal(sampled(layout), plain), name
    for offset in (4, 5, 8):
        part = sampled(zeros(1, 100), offset=offset)
        assert torch.equal(part, plain.view(1, -1)[:, offset : 100 + offset]), offset


def test_activation_checkpointing_makes_the_same_noise_again(target: Target) -> None:
    def block(mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
        z, kl = functional.latent(mu, logvar, backend=target.backend)
        return z.sin().sum() + kl.sum()

    results = []
    for checkpointed in (False, True):
        torch.manual_seed(23)
        mu, logvar = (leaf(torch.linspace(-1, 1, 60, device=target.device).view(4, 15)) for _ in range(2))
        value = checkpoint(block, mu, logvar, use_reentrant=False) if checkpointed else block(mu, logvar)
        torch.manual_seed(999)  # what happens in between must not matter
        value.backward()
        results.append((value.detach(), mu.grad, logvar.grad))
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_the_default_dtype_has_no_say() -> None:
    count = 1 << 17
    with threads(1):
        expected = normal(count, 7, backend="reference")
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            found = normal(count, 7, backend="reference")
        finally:
            torch.set_default_dtype(before)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
