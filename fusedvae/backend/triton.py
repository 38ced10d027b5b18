"""Triton kernels: not part of this version yet."""

from __future__ import annotations


class _Unavailable:
    def unavailable(self, device_type: str) -> str | None:
        return "this version has no Triton kernels"


BACKEND = _Unavailable()
