"""The package's noise: one stream a seed, the same on every backend, device and thread count."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from . import ops
from .backend import philox, resolve
from .typing import Backend


def normal(
    shape: Sequence[int] | int,
    seed: int | Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: Backend | None = None,
) -> Tensor:
    """Standard normal noise of a seed: element i of the row-major output is a function of (seed, i) alone.

    Philox4x32-10 (Salmon et al. 2011) keyed by the seed, counter i // 4, lane i % 4; two Box-Muller pairs a counter,
    computed in float32 and rounded (or, for float64, widened) to ``dtype``.

    Args:
        shape: the output's.
        seed: a 64-bit integer (negative ones count as their two's complement), or a 0-dim int64 tensor on ``device``.
        dtype: float32, float64, bfloat16 or float16.
        device: the output's.
        backend: overrides the process's choice for this call.

    Raises:
        TypeError, ValueError: a shape or dtype that is not one of these, a seed that does not fit.
    """
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"dtype: expected a float dtype, got {dtype}")
    device = torch.device(device)
    if not isinstance(shape, Sequence):
        shape = (shape,)
    if not all(isinstance(size, Integral) for size in shape):
        raise TypeError(f"shape: expected an integer or a sequence of them, got {shape!r}")
    shape = [int(size) for size in shape]
    if any(size < 0 for size in shape):
        raise ValueError(f"shape: expected sizes of at least 0, got {tuple(shape)}")
    if isinstance(seed, Tensor):
        if seed.dim() != 0 or seed.dtype != torch.int64:
            raise ValueError(f"seed: expected a 0-dim int64 tensor, got shape {tuple(seed.shape)}, {seed.dtype}")
        if seed.device.type != device.type or device.index not in (None, seed.device.index):
            raise ValueError(f"seed: expected on {device}, got it on {seed.device}")
    elif isinstance(seed, Integral) and not isinstance(seed, bool):
        seed = int(seed)
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed: expected an integer of 64 bits, got {seed}")
        signed = seed - 2**64 if seed >= 2**63 else seed
        seed = torch.full((), signed, dtype=torch.int64, device=device)  # which no host waits for
    else:
        raise TypeError(f"seed: expected an integer or a 0-dim int64 tensor, got {type(seed).__name__}")
    name = resolve(device.type, backend, index=device.index)
    if name == "reference":
        return philox.normal(tuple(shape), seed, dtype)
    return ops.normal(shape, seed, dtype, name)
