"""Training data: scikit-learn's handwritten digits, a NumPy array in a file, or a folder of images.

Whatever the source, samples are scaled to [0, 1] and shaped (channels, height, width), or (features,) for
tables of vectors.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import CommandError, require

DIGITS = "digits"
"""The name of the default data."""

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
CHANNELS = (1, 3, 4)
"""Sizes by which the channels of a four-dimensional array are recognised."""


@dataclass(frozen=True)
class Samples:
    """Samples in memory, as uint8 (which stands for [0, 255]) or float32 in [0, 1]."""

    values: Tensor
    labels: Tensor | None = None
    """Classes, used for nothing but colouring a picture."""

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of one sample."""
        return tuple(self.values.shape[1:])

    def subset(self, indices: np.ndarray | slice) -> Samples:
        index = indices if isinstance(indices, slice) else torch.from_numpy(indices)
        return Samples(self.values[index], None if self.labels is None else self.labels[index])

    def batch(
        self,
        indices: np.ndarray | slice,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The samples at ``indices``, in [0, 1]."""
        values = self.values[indices if isinstance(indices, slice) else torch.from_numpy(indices)]
        batch = values.to(device).to(dtype)
        return batch / 255 if values.dtype == torch.uint8 else batch

    def fingerprint(self) -> str:
        """A hash of every value: two sets of samples with the same one are the same."""
        digest = hashlib.sha256(f"{self.values.dtype} {tuple(self.values.shape)}".encode())
        digest.update(self.values.contiguous().numpy().data)
        return digest.hexdigest()


def split(samples: Samples, heldout: float) -> tuple[Samples, Samples]:
    """Training and held-out samples. The choice depends on nothing but the number of samples, so that runs of
    different seeds are measured on the same ones."""
    count = round(len(samples) * heldout)
    if not 0 < count < len(samples):
        raise CommandError(
            f"--heldout {heldout} of {len(samples)} samples leaves {count} held out and "
            f"{len(samples) - count} to train on: both need at least one"
        )
    order = np.random.default_rng(0).permutation(len(samples))
    return samples.subset(np.sort(order[count:])), samples.subset(np.sort(order[:count]))


def load(source: str, *, array: str | None = None, image_size: int | None = None) -> Samples:
    """Read ``source``: "digits", an .npy or .npz file, or a folder of images.

    Args:
        array: the name of the array in an .npz file that holds several.
        image_size: resize and crop the images of a folder to squares of this side.
    """
    path = Path(source)
    try:
        exists, is_folder = path.exists(), bool(source) and path.is_dir()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise CommandError(f"cannot read {source}: {error.strerror}") from error
    if array is not None and path.suffix != ".npz":
        raise CommandError(f"--array names an array in an .npz file, but the data is {source}")
    if image_size is not None and not is_folder:
        raise CommandError(f"--image-size is for a folder of images, but the data is {source}")
    if source == DIGITS:
        return _digits()
    if is_folder:
        return _from_folder(path, image_size)
    if not source or not exists:
        raise CommandError(f"no such data: {source or repr(source)}")
    if path.suffix not in (".npy", ".npz"):
        raise CommandError(f"{source}: expected '{DIGITS}', an .npy or .npz file, or a folder of images")
    return _from_array(_read_array(path, array), str(path))


def _digits() -> Samples:
    """1797 digits of 8x8 pixels with 17 levels: UCI's Optical Recognition of Handwritten Digits."""
    found = require("sklearn.datasets").load_digits()
    return Samples(
        torch.from_numpy((found.images / 16).astype(np.float32)).unsqueeze(1), torch.from_numpy(found.target)
    )


def _read_array(path: Path, array: str | None) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            return loaded if isinstance(loaded, np.ndarray) else _chosen_array(path, loaded, array)
    except CommandError:
        raise
    except Exception as error:  # NumPy, zipfile, zlib and tokenize: each has its own for a file that is not whole
        raise CommandError(f"cannot read {path}: {error or type(error).__name__}") from error


def _chosen_array(path: Path, archive: Any, array: str | None) -> np.ndarray:
    names = [name for name in archive.files if f"{name}.npy" in archive.zip.namelist()]
    if array is None and len(names) == 1:
        array = names[0]
    if array not in names:
        if not names:
            raise CommandError(f"{path} holds no arrays")
        problem = "holds several arrays" if array is None else f"has no array {array!r}"
        raise CommandError(f"{path} {problem}: choose one with --array: {', '.join(names)}")
    return archive[array]


def _from_array(values: np.ndarray, name: str) -> Samples:
    """Check, shape and scale an array: uint8 from [0, 255]; others from their own range, or not at all if
    they lie within [0, 1], having been scaled already."""
    if values.dtype.kind not in "buif":
        raise CommandError(f"{name}: expected an array of numbers, got dtype {values.dtype}")
    if values.ndim not in (2, 3, 4):
        raise CommandError(
            f"{name}: expected an array of shape (samples, features), (samples, height, width) or "
            f"(samples, channels, height, width), got {values.shape}"
        )
    if 0 in values.shape or len(values) < 2:
        raise CommandError(f"{name}: expected at least two samples of at least one value, got shape {values.shape}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        bad = ~np.isfinite(values)
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise CommandError(f"{name}: {int(bad.sum())} values are NaN or infinite, the first at index {where}")
    if values.ndim == 3:
        values = values[:, None]
    elif values.ndim == 4 and values.shape[1] not in CHANNELS and values.shape[3] in CHANNELS:
        values = np.moveaxis(values, 3, 1)
    if values.dtype != np.uint8:
        low, high = float(values.min()), float(values.max())
        if low < 0 or high > 1:
            if low == high:
                raise CommandError(f"{name}: every value is {low:g}: there is nothing to learn")
            if not math.isfinite(high - low):
                raise CommandError(f"{name}: values from {low:g} to {high:g} are too far apart to be scaled to [0, 1]")
            values = (values.astype(np.float64) - low) / (high - low)
        values = values.astype(np.float32)
    return Samples(torch.from_numpy(np.ascontiguousarray(values)))


def _in_8_bits(image: Any, image_module: Any) -> Any:
    """The image in grey or in colour, a byte a channel; a transparency is left out."""
    if image.mode == "F" or image.mode.startswith("I"):  # Pillow's own conversion cuts these off at 255
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() >= 2**16:
            raise ValueError(f"its pixels (Pillow's mode {image.mode}) are not of 8 or 16 bits: make it an .npy file")
        return image_module.fromarray((values >> 8).astype(np.uint8))
    return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")


def _from_folder(folder: Path, image_size: int | None) -> Samples:
    """The images under ``folder``, in the order of their names; in colour if any of them is."""
    image_module = require("PIL.Image")
    operations = require("PIL.ImageOps")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if len(paths) < 2:
        raise CommandError(f"{folder}: expected at least two images ({', '.join(IMAGE_SUFFIXES)}), found {len(paths)}")
    images = []
    for path in paths:
        try:
            with image_module.open(path) as opened:
                image = _in_8_bits(operations.exif_transpose(opened), image_module)
        except Exception as error:  # Pillow's readers of some twenty formats raise what they come upon
            raise CommandError(f"cannot read the image {path}: {error or type(error).__name__}") from error
        if image_size is not None:
            image = operations.fit(image, (image_size, image_size))
        images.append(image)
        if image.size != images[0].size:
            sizes = [f"{name} is {i.width}x{i.height}" for name, i in ((paths[0], images[0]), (path, image))]
            raise CommandError(f"the images differ in size: {', '.join(sizes)}: choose one with --image-size")
    mode = "RGB" if any(image.mode == "RGB" for image in images) else "L"
    values = np.stack([np.asarray(image.convert(mode)) for image in images])
    values = values[:, None] if mode == "L" else np.moveaxis(values, 3, 1)
    return Samples(torch.from_numpy(np.ascontiguousarray(values)))
