"""Which capture of a CUDA graph work is recorded in: PyTorch tells whether it is in one, and the driver in which."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache

import torch

from .torch_private import current_gpu, current_stream_address, is_capturing


def current_capture(device: torch.device) -> object:
    """That of the device's current stream: the same for all that is recorded in one, and None outside of captures.

    Where the driver does not tell, each call's is like no other: nobody may take two captures for one.
    """
    if device.type != "cuda" or not is_capturing():
        return None
    status, number = ctypes.c_int(), ctypes.c_uint64()
    ask = _question()
    if ask is None or ask(current_stream_address(current_gpu()), status, number, None, None, None) != 0:
        return object()
    return number.value


@cache
def _question() -> Callable[..., int] | None:
    """The driver's function that tells; None where there is none, as with AMD's."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        ask = driver.cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return None
    # A stream; its status and the number of its capture; and what else it may be asked for.
    ask.argtypes = [
        *(ctypes.c_void_p, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_uint64)),
        *[ctypes.c_void_p] * 3,
    ]
    ask.restype = ctypes.c_int
    return ask
