"""Training data: scikit-learn's handwritten digits, an array in a file, or images in a folder or in tar shards.

Whatever the source, samples are in [0, 1] and shaped (channels, height, width), or (features,) for tables. Small data
are held in memory; of others, batches are read as they are asked for, so that memory does not grow with their size.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..errors import CommandError, require
from ..settings import Settings
from . import arrays, images
from .preparation import Preparation
from .samples import InMemory, Samples, batches, default_workers, held_if_small, in_order

__all__ = [
    "DIGITS",
    "Data",
    "Preparation",
    "Samples",
    "batches",
    "default_workers",
    "in_order",
    "load",
    "prepare",
    "split",
]

DIGITS = "digits"
"""The name of the default data."""

ARRAY_SUFFIXES = (".npy", ".npz", ".h5ad")


@dataclass(frozen=True)
class Data:
    """What a model is trained on and what it is tested on, prepared in the same way."""

    train: Samples
    test: Samples

    @property
    def preparation(self) -> Preparation:
        return self.train.preparation

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of one sample."""
        return self.preparation.shape

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of what labels number; empty where there are no labels."""
        return self.preparation.classes

    @property
    def description(self) -> str:
        """One line: what was done to the data."""
        return self.preparation.description

    def fingerprint(self) -> str:
        """The same for the same data, wherever they lie."""
        if self.test.source is self.train.source:
            return self.train.fingerprint()
        return hashlib.sha256(f"{self.train.fingerprint()} {self.test.fingerprint()}".encode()).hexdigest()


def split(samples: Samples, heldout: float) -> Data:
    """Training and held-out samples. The choice depends on nothing but the number of samples, so that runs of
    different seeds are measured on the same ones."""
    count = round(len(samples) * heldout)
    if not 0 < count < len(samples):
        raise CommandError(
            f"--heldout {heldout} of {len(samples)} samples leaves {count} held out and "
            f"{len(samples) - count} to train on: both need at least one"
        )
    order = np.random.default_rng(0).permutation(len(samples))
    return Data(samples.subset(np.sort(order[count:])), samples.subset(np.sort(order[:count])))


def load(
    source: str,
    *,
    array: str | None = None,
    image_size: int | None = None,
    image_shape: tuple[int, ...] | None = None,
    channels: str | None = None,
    preparation: Preparation | None = None,
) -> Samples:
    """Find ``source``: "digits", an .npy, .npz or .h5ad file, a folder of images, or tar shards of them.

    Args:
        array: the name of the array in an .npz file that holds several.
        image_size: resize and crop images to squares of this side.
        image_shape: (channels, height, width) or (height, width) of images that are rows of an array.
        channels: where an array of images has its channels: "first" or "last"; None to go by their number.
        preparation: that of other data, to be done to these in the place of one found of their values; the three
            options above are then its own.
    """
    path = Path(source)
    try:
        exists, is_folder = path.exists(), bool(source) and path.is_dir()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise CommandError(f"cannot read {source}: {error.strerror}") from error
    is_shards = path.suffix == ".tar"
    is_array = path.suffix in ARRAY_SUFFIXES and not is_folder
    if array is not None and path.suffix != ".npz":
        raise CommandError(f"--array names an array in an .npz file, but the data is {source}")
    if image_size is not None and not (is_folder or is_shards):
        raise CommandError(f"--image-size is for a folder of images or tar files, but the data is {source}")
    for option, value in (("--image-shape", image_shape), ("--channels", channels)):
        if value is not None and not is_array:
            raise CommandError(f"{option} is for arrays, but the data is {source}")
    if source == DIGITS:
        return _digits()
    if is_folder or is_shards:
        return _images(source, is_folder, image_size, preparation)
    if not source or not exists:
        raise CommandError(f"no such data: {source or repr(source)}")
    if is_array:
        return _array(source, array, channels, image_shape, preparation)
    raise CommandError(
        f"{source}: expected '{DIGITS}', an .npy, .npz or .h5ad file, a folder of images, or .tar files of these"
    )


def _digits() -> Samples:
    """1797 digits of 8x8 pixels with 17 levels: UCI's Optical Recognition of Handwritten Digits."""
    found = require("sklearn.datasets").load_digits()
    values = torch.from_numpy((found.images / 16).astype(np.float32)).unsqueeze(1)
    preparation = Preparation(
        tuple(values.shape[1:]),
        0.0,
        16.0,
        classes=tuple(map(str, found.target_names)),
        description=f"{len(values)} handwritten digits: 0 to 16 become 0 to 1",
    )
    return Samples(InMemory(values), preparation, torch.from_numpy(found.target))


def _array(
    source: str,
    array: str | None,
    channels: str | None,
    image_shape: tuple[int, ...] | None,
    preparation: Preparation | None,
) -> Samples:
    rows = arrays.rows_of(Path(source), array)
    if preparation is None:
        found = arrays.prepare(rows, source, channels, image_shape)
    else:
        found = arrays.prepared_alike(rows, source, preparation)
    found, numbers = _labelled(found, arrays.classes_of(Path(source), array, rows.shape[0]), preparation)
    labels = None if numbers is None else torch.tensor(numbers)
    try:
        return Samples(held_if_small(arrays.ArraySource(rows, found), found), found, labels)
    except MemoryError as error:
        raise CommandError(f"cannot hold {source} in memory: {error or 'there is too little'}") from error


def _images(source: str, is_folder: bool, image_size: int | None, preparation: Preparation | None) -> Samples:
    require("PIL.Image")
    files, classes = images.in_folder(Path(source)) if is_folder else images.in_shards(source)
    pages, found = images.prepare(files, source, image_size=image_size, preparation=preparation)
    found, numbers = _labelled(found, classes, preparation)
    labels = None if numbers is None else torch.tensor(numbers)[torch.from_numpy(pages.of_file[:, 0])]
    return Samples(held_if_small(images.ImageSource(files, pages, found), found), found, labels)


def _labelled(
    found: Preparation, classes: list[str] | None, given: Preparation | None
) -> tuple[Preparation, list[int] | None]:
    """What was found of data of these classes, with their names unless it was ``given``; and their numbers. One class
    for all says nothing, and what is given without classes wants none."""
    if classes is None or (len(set(classes)) < 2 if given is None else not given.classes):
        return found, None
    numbers, names = images.labels_of(classes, found.classes)
    if given is None:
        found = replace(found, classes=names, description=f"{found.description}; {len(names)} classes")
    return found, numbers


def prepare(settings: Settings, preparation: Preparation | None = None) -> Data:
    """The data that ``settings`` name: ``--test-data``, or a part of ``--data`` that is held out, to test on.

    Args:
        preparation: that of the run that goes on.
    """
    sources = [source for source in (settings.data, settings.test_data) if source is not None]
    if settings.array is not None and all(Path(source).suffix != ".npz" for source in sources):
        raise CommandError(f"--array names an array in an .npz file, but the data is {' and '.join(sources)}")

    def array_of(source: str) -> str | None:
        return settings.array if Path(source).suffix == ".npz" else None

    samples = load(
        settings.data,
        array=array_of(settings.data),
        image_size=settings.image_size,
        image_shape=settings.image_shape,
        channels=settings.channels,
        preparation=preparation,
    )
    if settings.test_data is None:
        return split(samples, settings.heldout)
    return Data(samples, load(settings.test_data, array=array_of(settings.test_data), preparation=samples.preparation))
