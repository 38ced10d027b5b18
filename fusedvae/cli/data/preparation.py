"""What is done to data before a model sees them: found once of the training data, kept in the checkpoint, and done in
the same way to whatever comes later."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Preparation:
    """How values become samples of ``shape`` in [0, 1]: ``(value - low) / (high - low)``.

    Held in memory and sent between processes they are float32 so scaled, or uint8, of which ``high`` is what 1 is.
    """

    shape: tuple[int, ...]
    """Of one sample: (channels, height, width), or (features,)."""
    low: float | tuple[float, ...] = 0.0
    """What becomes 0; one number, or one a column of a table."""
    high: float | tuple[float, ...] = 1.0
    """What becomes 1; of image files, in those with a byte a channel."""
    high_16: float = 65535.0
    """What becomes 1 in image files of 16 bits."""
    dtype: str = "uint8"
    """Of the values before; images have a byte a channel, more or less."""
    channels: str | None = None
    """Where an array has its channels, "first" or "last"; None where it has none."""
    mode: str | None = None
    """Of images: "L" (grey) or "RGB"."""
    image_size: int | None = None
    """The side of the squares to which images are resized and cropped; None leaves them as they are."""
    classes: tuple[str, ...] = ()
    """Names of what labels number."""
    description: str = ""
    """All this in one line."""

    def record(self) -> dict[str, Any]:
        """Plain values, for checkpoints and JSON."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Preparation:
        """The inverse of `record`, also of one that JSON has made lists of."""
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in record.items()}
        return cls(**values)

    @property
    def changes_values(self) -> bool:
        return self.low != 0 or self.high != 1

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """``values`` of an array, whose columns are in the last dimension, as float32."""
        if not self.changes_values:
            return values.astype(np.float32)
        low = np.asarray(self.low, np.float64)
        span = np.asarray(self.high, np.float64) - low
        scaled = values.astype(np.float64)
        scaled -= low
        scaled /= np.where(span == 0, 1, span)  # a column that is the same everywhere becomes 0
        return scaled.astype(np.float32)

    def finished(self, stored: Tensor, device: str | torch.device, dtype: torch.dtype) -> Tensor:
        """A batch as it is stored, on the device and in [0, 1]."""
        if stored.dtype != torch.uint8:
            return stored.to(device, non_blocking=True).to(dtype)
        top: Any = self.high  # a number: a table of bytes has one scale
        if torch.device(device).type == "cpu":
            # By NumPy: memory as PyTorch aligns it, glibc before 2.38 often cannot use again, and ever more is taken.
            numbers = np.float64 if dtype == torch.float64 else np.float32
            return torch.from_numpy(np.divide(stored.numpy(), top, dtype=numbers)).to(dtype)
        return stored.to(device, non_blocking=True).to(dtype).div_(top)
