"""Arrays: .npy files, mapped into memory and never read whole; .npz files; the cells of .h5ad files."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import CommandError, require
from .preparation import Preparation

CHANNELS = (1, 3, 4)
"""Sizes by which the channels of a four-dimensional array are recognised."""

_CHUNK = 2**23
"""Bytes that are read at a time."""

_STARTS = {".npy": np.lib.format.MAGIC_PREFIX, ".npz": b"PK"}
"""Of such files."""

LABELS = "labels"
"""The array of an .npz file that has the classes of its samples."""

_HASHED_ROWS = 4096
"""Of data that are not held in memory, so many go into the fingerprint."""


class Rows(Protocol):
    """An array of which rows can be read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray: ...


class NpyFile:
    """Rows of an .npy file, which is mapped anew in every process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped: np.ndarray | None = None
        self._read = 0
        mapped = self._map()
        self.shape, self.dtype = mapped.shape, mapped.dtype

    def _map(self) -> np.ndarray:
        if self._mapped is None:
            self._mapped = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return self._mapped

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        rows = np.array(self._map()[index])
        self._read += rows.nbytes
        if self._read > _CHUNK:  # pages that were read count as this process's memory for as long as they are mapped
            self._mapped, self._read = None, 0
        return rows


class CellsFile:
    """Rows of ``X`` in an .h5ad file, dense or sparse, as dense rows.

    Of all else that is in the file nothing is read. What is sparse by columns has no rows that could be read one by
    one: it is brought into memory, by rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: Any = None
        matrix = self._matrix()
        self.shape, self.dtype = tuple(map(int, matrix.shape)), np.dtype(matrix.dtype)

    def _matrix(self) -> Any:
        if self._opened is None:
            found = require("h5py").File(self.path, "r").get("X")
            if found is None or getattr(found, "shape", ()) is None:
                raise CommandError(f"{self.path} has no X")
            if not hasattr(found, "dtype"):  # a group of the arrays of a sparse matrix
                found = require("anndata.io").sparse_dataset(found)
                if found.format == "csc":
                    found = found.to_memory().tocsr()
            self._opened = found
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        if isinstance(index, slice):
            return self._dense(self._matrix()[index])
        rows, where = np.unique(index, return_inverse=True)  # HDF5 reads in ascending order
        return self._dense(self._matrix()[rows])[where]

    @staticmethod
    def _dense(rows: Any) -> np.ndarray:
        return rows.toarray() if hasattr(rows, "toarray") else np.asarray(rows)


class ArraySource:
    """Samples that are rows of an array, scaled as they are read."""

    decodes = False

    def __init__(self, rows: Rows, preparation: Preparation) -> None:
        self.rows, self.preparation = rows, preparation

    def __len__(self) -> int:
        return self.rows.shape[0]

    def read(self, indices: np.ndarray | slice) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self._shaped(self._scaled(self.rows[indices]))))

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        return values if values.dtype == np.uint8 else self.preparation.scaled(values)

    def _shaped(self, values: np.ndarray) -> np.ndarray:
        shape = self.preparation.shape
        if self.preparation.channels == "last":
            return np.moveaxis(values.reshape(len(values), *shape[1:], shape[0]), 3, 1)
        return values.reshape(len(values), *shape)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.rows.dtype} {self.rows.shape}".encode())
        some = np.unique(np.linspace(0, len(self) - 1, _HASHED_ROWS).astype(np.int64))
        for part in np.array_split(some, -(-len(some) // 64)):
            digest.update(np.ascontiguousarray(self.rows[part]).data)
        return digest.hexdigest()


def rows_of(path: Path, array: str | None) -> Rows:
    """The rows of an .npy, .npz or .h5ad file."""
    try:
        if path.suffix == ".h5ad":
            return CellsFile(path)
        with open(path, "rb") as file:
            start = _STARTS[path.suffix]
            if file.read(len(start)) != start:  # NumPy would call it a pickle
                raise CommandError(f"cannot read {path}: it is no {path.suffix} file")
            file.seek(0)
            if path.suffix == ".npz":
                return _chosen_array(path, np.load(file, allow_pickle=False), array)
        return NpyFile(path)
    except CommandError:
        raise
    except Exception as error:  # NumPy, zipfile, zlib, HDF5: each has its own for a file that is not whole
        raise CommandError(f"cannot read {path}: {error or type(error).__name__}") from error


def _chosen_array(path: Path, archive: Any, array: str | None) -> np.ndarray:
    names = [name for name in archive.files if f"{name}.npy" in archive.zip.namelist()]
    values = [name for name in names if name != LABELS] or names
    if array is None and len(values) == 1:
        array = values[0]
    if array not in names:
        if not names:
            raise CommandError(f"{path} holds no arrays")
        problem = "holds several arrays" if array is None else f"has no array {array!r}"
        raise CommandError(f"{path} {problem}: choose one with --array: {', '.join(names)}")
    return archive[array]


def classes_of(path: Path, array: str | None, count: int) -> list[str] | None:
    """What an .npz file says of its samples' classes: its array "labels", of integers or names, one a sample."""
    if path.suffix != ".npz" or array == LABELS:
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            if LABELS not in archive.files:
                return None
            found = archive[LABELS]
    except Exception as error:
        raise CommandError(f"cannot read {path}: {error or type(error).__name__}") from error
    if found.dtype.kind not in "biuU" or found.shape != (count,):
        raise CommandError(
            f"{path}: labels: expected {count} integers or names, one a sample, got {found.dtype} of shape "
            f"{found.shape}"
        )
    return [str(int(label)) if found.dtype.kind in "biu" else str(label) for label in found.tolist()]


def prepare(rows: Rows, name: str, channels: str | None, image_shape: tuple[int, ...] | None) -> Preparation:
    """Find out what is to be done to an array, going over it once, a part at a time.

    uint8 stands for 0 to 255, or, where no value uses the upper half, for 0 to the largest. Other values stay as they
    are if all lie within [0, 1]; else they are scaled by their range, of which the columns of a table have one each.
    """
    shape, channels = _sample_shape(rows, name, channels, image_shape)
    is_table = len(shape) == 1 and rows.dtype != np.uint8
    hint = _hint(shape[0]) if len(shape) == 1 else ""
    low, high = _range(rows, name, by_column=is_table)
    least, largest = low.min(), high.max()
    about = f"{' x '.join(map(str, rows.shape))} of {rows.dtype}{', channels last' if channels == 'last' else ''}"
    found = Preparation(shape, dtype=str(rows.dtype), channels=channels)
    if rows.dtype == np.uint8:
        top = 255.0 if largest > 127 else float(largest) or 1.0
        return replace(found, high=top, description=f"{about}: 0 to {top:g} become 0 to 1{hint}")
    if least >= 0 and largest <= 1:
        return replace(found, description=f"{about}: left as they are, within 0 and 1{hint}")
    if (low == high).all():
        same = f"every value is {least:g}" if least == largest else "every sample is the same"
        raise CommandError(f"{name}: {same}: there is nothing to learn")
    with np.errstate(over="ignore"):
        if not np.isfinite(high - low).all():
            raise CommandError(f"{name}: values from {least:g} to {largest:g} are too far apart to be scaled to [0, 1]")
    if not is_table:
        how = f"{least:g} to {largest:g} become 0 to 1"
        return replace(found, low=float(least), high=float(largest), description=f"{about}: {how}")
    constant = int((low == high).sum())
    how = "every column scaled by its own range to 0 to 1" + (f" ({constant} are constant)" if constant else "")
    return replace(found, low=tuple(low.tolist()), high=tuple(high.tolist()), description=f"{about}: {how}{hint}")


def prepared_alike(rows: Rows, name: str, preparation: Preparation) -> Preparation:
    """``preparation`` of other data, for these, whose images may be laid out differently."""
    if (rows.dtype == np.uint8) != (preparation.dtype == "uint8"):
        raise CommandError(
            f"{name} is of {rows.dtype}, the training data are of {preparation.dtype}: they would not be scaled alike"
        )
    image_shape = preparation.shape if len(rows.shape) == 2 and len(preparation.shape) == 3 else None
    by_name = preparation.channels if image_shape or len(rows.shape) == 4 else None
    shape, channels = _sample_shape(rows, name, by_name, image_shape)
    # These images may have their channels at the other end.
    if shape != preparation.shape and len(rows.shape) == 4 and _recognised_channels(rows.shape):
        shape, channels = _sample_shape(rows, name, None, None)
    if shape != preparation.shape:
        sizes = ["x".join(map(str, sizes)) for sizes in (shape, preparation.shape)]
        raise CommandError(f"{name}: samples of {sizes[0]}, but the training data are of {sizes[1]}")
    _range(rows, name, by_column=False)
    return replace(preparation, channels=channels)


def _hint(length: int) -> str:
    """What to say of rows that may be images."""
    for channels in (1, 3):
        side = math.isqrt(length // channels)
        if side >= 8 and channels * side**2 == length:
            shape = f"{side},{side}" if channels == 1 else f"{channels},{side},{side}"
            return f"; if these are images: --image-shape {shape}"
    return ""


def _sample_shape(
    rows: Rows, name: str, channels: str | None, image_shape: tuple[int, ...] | None
) -> tuple[tuple[int, ...], str | None]:
    """The shape of a sample, and where the array has its channels."""
    shape = rows.shape
    if rows.dtype.kind not in "buif":
        raise CommandError(f"{name}: expected an array of numbers, got dtype {rows.dtype}")
    if len(shape) not in (2, 3, 4):
        raise CommandError(
            f"{name}: expected an array of shape (samples, features), (samples, height, width) or "
            f"(samples, channels, height, width), got {shape}"
        )
    if 0 in shape or shape[0] < 2:
        raise CommandError(f"{name}: expected at least two samples of at least one value, got shape {shape}")
    if image_shape is not None:
        if len(shape) != 2:
            raise CommandError(f"{name}: --image-shape is for rows of values, the array is of shape {shape}")
        if math.prod(image_shape) != shape[1]:
            sizes = " x ".join(map(str, image_shape))
            raise CommandError(
                f"{name}: --image-shape {sizes} is {math.prod(image_shape)} values, rows have {shape[1]}"
            )
        return (1, *image_shape) if len(image_shape) == 2 else image_shape, channels
    if channels is not None and len(shape) != 4:
        raise CommandError(f"{name}: --channels is for arrays of four dimensions, the array is of shape {shape}")
    if len(shape) == 2:
        return shape[1:], None
    if len(shape) == 3:
        return (1, *shape[1:]), None
    channels = channels or _recognised_channels(shape)
    if channels is None:
        raise CommandError(f"{name}: where are the channels of an array of shape {shape}? say --channels first or last")
    return (shape[1:] if channels == "first" else (shape[3], *shape[1:3])), channels


def _recognised_channels(shape: tuple[int, ...]) -> str | None:
    first, last = shape[1] in CHANNELS, shape[3] in CHANNELS
    if first and last:  # then only a square says which
        first, last = shape[2] == shape[3], shape[1] == shape[2]
    return None if first == last else "first" if first else "last"


def _chunks(rows: Rows) -> Iterator[tuple[int, np.ndarray]]:
    """All rows, some at a time, each with the index of the first."""
    step = max(1, _CHUNK // (math.prod(rows.shape[1:]) * rows.dtype.itemsize))
    for start in range(0, rows.shape[0], step):
        yield start, rows[start : start + step]


def _range(rows: Rows, name: str, *, by_column: bool) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest value in float64, of each column or of all; refuses what is not finite."""
    axis = 0 if by_column else None
    low, high = np.asarray(np.inf), np.asarray(-np.inf)
    bad, first_bad = 0, None
    for start, chunk in _chunks(rows):
        if chunk.dtype.kind == "f" and not (finite := np.isfinite(chunk)).all():
            if first_bad is None:
                where = np.argwhere(~finite)[0]
                first_bad = (start + int(where[0]), *map(int, where[1:]))
            bad += int(chunk.size - finite.sum())
        if bad == 0:
            low = np.minimum(low, chunk.min(axis=axis).astype(np.float64))
            high = np.maximum(high, chunk.max(axis=axis).astype(np.float64))
            if chunk.dtype == np.uint8 and high.max() > 127:
                break  # all that there is to know
    if bad:
        raise CommandError(f"{name}: {bad} values are NaN or infinite, the first at index {first_bad}")
    return low, high
