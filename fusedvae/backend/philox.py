"""The noise in plain PyTorch, and so the definition of it.

Source: Philox4x32-10, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", with the constants of
Random123.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..torch_private import is_traced, is_watched
from .reference import Number

_LOW_WORD = 0xFFFFFFFF
_PHILOX_ROUNDS = 10
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_COUNTERS_A_THREAD = 1 << 14
"""How many each thread of a CPU has at a time: PyTorch gives it no fewer words, and in its cache there is room for
them."""


def normal(shape: tuple[int, ...], seed: Tensor, dtype: torch.dtype, offset: Number = 0) -> Tensor:
    """Standard normal noise: element i of the row-major output is lane (i + offset) % 4 of counter (i + offset) // 4.

    ``seed`` is a 0-dim int64 tensor, on the device the noise is wanted on; it is never read by the host.
    The four words of a counter become two Box-Muller pairs. Evaluated in float64, where the device has it, and rounded
    to float32.
    """
    count = math.prod(shape)
    first = offset.to(torch.int64) if isinstance(offset, Tensor) else int(offset)
    skip = first % 4
    counters, keys = (count + 6) // 4, _philox_keys(seed)
    block = counters
    if seed.device.type == "cpu" and not is_watched():
        block = _COUNTERS_A_THREAD * torch.get_num_threads()

    def lanes(start: int, end: int) -> Tensor:
        """Of the counters [start, end) after the first."""
        return _lanes(torch.arange(start, end, dtype=torch.int64, device=seed.device) + first // 4, keys)

    if counters <= block:
        stream = lanes(0, counters)
    else:
        stream = torch.empty(4 * counters, dtype=torch.float32, device=seed.device)
        for start in range(0, counters, block):
            end = min(start + block, counters)
            stream[4 * start : 4 * end] = lanes(start, end)
    stream = stream.to(dtype)
    if isinstance(skip, Tensor):
        return stream[torch.arange(count, device=seed.device) + skip].view(shape)
    return stream[skip : skip + count].view(shape)


def _lanes(counter: Tensor, keys: Tensor) -> Tensor:
    """The four normals of each counter, side by side, in float32."""
    second, first = _box_muller(*_philox4x32(counter, keys))
    return torch.view_as_real(torch.stack([first, second], dim=1)).flatten()


def _box_muller(w0: Tensor, w1: Tensor) -> Tensor:
    """sqrt(-2 ln u0) (cos 2 pi u1 + i sin 2 pi u1) of the words' uniforms, in complex64.

    The nearest quarter turn comes off exactly, so that float32 rounds no large angle. It swaps sine and cosine and
    turns their signs: as bits, which `torch.where` takes four times as long for. Within an eighth of a turn the cosine
    is what the sine leaves of the square, with all its digits and in less time.
    """
    u0, u1 = _in_float64(_unit_interval(w0)), _in_float64(_unit_interval(w1))
    square = torch.log(u0).mul_(-2.0)
    turned = u1 * 4.0
    quarter = torch.round(turned)
    sine = turned.sub_(quarter).mul_(0.5 * math.pi).sin_().mul_(square.sqrt())
    cosine = square.addcmul_(sine, sine, value=-1.0).sqrt_()
    sine, cosine = (_bits(tensor.to(torch.float32)) for tensor in (sine, cosine))
    turns = quarter.to(torch.int32)
    swap = (sine ^ cosine).bitwise_and_((turns & 1).neg_())
    real = (turns + 1).bitwise_and_(2).bitwise_left_shift_(30).bitwise_xor_(cosine).bitwise_xor_(swap)
    imaginary = (turns & 2).bitwise_left_shift_(30).bitwise_xor_(sine).bitwise_xor_(swap)
    return torch.complex(_bits(real, torch.float32), _bits(imaginary, torch.float32))


def _bits(tensor: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    """The same bits; copied for torch.jit.trace, which has no word for such a view, and PyTorch 2.6's vmap likewise."""
    if not is_traced():
        try:
            return tensor.view(dtype)
        except RuntimeError:
            pass
    return torch.view_copy(tensor, dtype=dtype)


def _unit_interval(word: Tensor) -> Tensor:
    """A word as a uniform number in (0, 1]: of its upper 31 bits."""
    return (word & (_LOW_WORD - 1)).to(torch.float32).mul_(2.0**-32).add_(2.0**-32)


def _in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64; as it is, on devices that have none (Apple's, some of Intel's)."""
    try:
        return tensor.double()
    except (TypeError, RuntimeError):
        return tensor


def _philox_keys(seed: Tensor) -> Tensor:
    """The key's words 1 and 0 in each round, with more bits on top: (rounds, 2, 1)."""
    rounds = torch.arange(_PHILOX_ROUNDS, dtype=torch.int64, device=seed.device)
    words = [part + rounds * step for part, step in zip((seed >> 32, seed), reversed(_PHILOX_KEY_STEPS), strict=True)]
    return torch.stack(words, dim=1).unsqueeze(-1)


def _philox4x32(counter: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Philox4x32 on counters (low32, high32, 0, 0): words 2 and 0, and words 3 and 1, as the low halves of int64.

    A product of two 32-bit words fills 64 bits, and int64 wraps around to the same ones. What is above a word is
    masked away just before it is multiplied, for only there it matters.
    """
    m0, m1 = _PHILOX_MULTIPLIERS
    multipliers = torch.arange(2, dtype=torch.int64, device=counter.device).mul_(m1 - m0).add_(m0).unsqueeze(-1)
    (k1, k0), *others = keys.unbind()
    product = (counter & _LOW_WORD).mul_(m0)  # the first round, in which the other product is 0
    even = torch.stack([(product >> 32) ^ k1, (counter >> 32) ^ k0])
    odd = torch.stack([product, torch.zeros_like(product)])
    for key in others:
        products = even.flip(0).bitwise_and_(_LOW_WORD).mul_(multipliers)
        even, odd = (products >> 32).bitwise_xor_(key).bitwise_xor_(odd), products
    return even, odd
