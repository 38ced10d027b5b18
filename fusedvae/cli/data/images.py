"""Images: files in a folder, or in tar shards as WebDataset writes them. Listed once, decoded as they are needed.

Every page of a file is a sample.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import CommandError, require
from .preparation import Preparation

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")

_SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's modes of grey images that may hold more than a byte a pixel."""
_GREY = ("1", "L", "LA", *_SIXTEEN_BITS)
_TURNED_BY_A_QUARTER = (5, 6, 7, 8)
_ORIENTATION = 0x0112
_THREADS = 8
_END_OF_TAR = bytes(tarfile.BLOCKSIZE)

T = TypeVar("T")
R = TypeVar("R")


class Files:
    """Image files by number: each a file of a folder, or a part of a tar file."""

    def __init__(self, root: Path, names: list[str], parts: list[tuple[int, int, int]] | None = None) -> None:
        # As arrays: a list of a million strings would be copied into every worker process, reference by reference.
        self.root = root
        self.names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        self.parts = None if parts is None else np.array(parts, np.int64).reshape(-1, 3)
        """File, offset and size, of images in tar files, whose names ``names`` has."""

    def __len__(self) -> int:
        return len(self.names if self.parts is None else self.parts)

    def name(self, number: int) -> str:
        if self.parts is None:
            return str(self.root / os.fsdecode(self.names[number].item()))
        shard, offset, _ = self.parts[number]
        return f"{self.root / os.fsdecode(self.names[shard].item())} (at byte {offset})"

    def open(self, number: int) -> Any:
        """The file, for Pillow."""
        if self.parts is None:
            return open(self.root / os.fsdecode(self.names[number].item()), "rb")
        shard, offset, size = map(int, self.parts[number])
        with open(self.root / os.fsdecode(self.names[shard].item()), "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))

    def size(self, number: int) -> int:
        if self.parts is None:
            return os.stat(self.root / os.fsdecode(self.names[number].item())).st_size
        return int(self.parts[number][2])


def in_folder(folder: Path) -> tuple[Files, list[str] | None]:
    """The images under ``folder`` in the order of their names, and the class of each if all are in folders of classes.

    Hidden files and folders are left out: these are copies that tools have made.
    """
    names = sorted(_walk(folder, "", set()), key=lambda name: name.split("/"))
    if len(names) == 0:
        raise CommandError(f"{folder}: expected at least two images ({', '.join(SUFFIXES)}), found 0")
    classes = [name.partition("/")[0] for name in names] if all("/" in name for name in names) else None
    return Files(folder, names), classes


def _walk(folder: Path, prefix: str, entered: set[str]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in entered:  # a link to a folder that has been seen, or that this one is in
        return
    entered.add(real)
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    yield from _walk(folder / entry.name, f"{prefix}{entry.name}/", entered)
                elif entry.name.lower().endswith(SUFFIXES) and entry.is_file():
                    yield prefix + entry.name
    except OSError as error:
        raise CommandError(f"cannot read {folder}: {error.strerror}") from error


def in_shards(pattern: str) -> tuple[Files, list[str] | None]:
    """The images of tar files, in their order: ``{000..099}`` in the pattern stands for numbers.

    As in WebDataset, files of the same name up to the first dot are one sample; of these the image is taken, and as its
    class the text of the .cls file.
    """
    paths = [pattern]
    if "{" in pattern and not os.path.exists(pattern):
        try:
            paths = list(require("braceexpand").braceexpand(pattern))
        except ValueError as error:
            raise CommandError(f"cannot read {pattern}: {error}") from error
    parts, classes = [], []
    for shard, path in enumerate(paths):
        for key, image, label in _members(path):
            if image is None:
                raise CommandError(f"{path}: {key} has no image ({', '.join(SUFFIXES)})")
            parts.append((shard, *image))
            classes.append(label)
    if not parts:
        raise CommandError(f"{pattern}: expected at least two images ({', '.join(SUFFIXES)}), found 0")
    labelled = [label for label in classes if label is not None]
    if labelled and len(labelled) < len(classes):
        raise CommandError(f"{pattern}: {len(labelled)} of {len(classes)} samples have a class (.cls)")
    return Files(Path(), paths, parts), labelled or None


def _members(path: str) -> Iterator[tuple[str, tuple[int, int] | None, str | None]]:
    """Of every sample of a tar file its name, where its image lies (offset, size), and its class."""
    key, image, label = None, None, None
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                archive.members.clear()  # type: ignore[attr-defined]  # of a million it would remember every one
                folder, _, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if not stem or not dot:
                    continue
                suffix = f".{suffix.lower()}"
                is_image, is_class = suffix.endswith(SUFFIXES), suffix == ".cls"
                if (member.islnk() or member.issym()) and (is_image or is_class):
                    raise CommandError(f"{path}: {member.name} is a link (GNU tar: pack with --hard-dereference -h)")
                if not member.isfile():
                    continue
                if f"{folder}/{stem}" != key:
                    if key is not None:
                        yield key, image, label
                    key, image, label = f"{folder}/{stem}", None, None
                if is_image and image is None:
                    if member.issparse():
                        raise CommandError(f"{path}: {member.name} is stored with holes")
                    image = member.offset_data, member.size
                elif is_class:
                    text = archive.extractfile(member)
                    label = "" if text is None else text.read().decode().strip()
            # At what is no header tarfile ends without a word, but for the first.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != _END_OF_TAR:
                raise CommandError(f"cannot read {path}: it is damaged or cut short at byte {archive.offset}")
    except CommandError:
        raise
    except tarfile.ReadError as error:
        raise CommandError(f"cannot read {path}: {error}: expected a tar file, not compressed") from error
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        raise CommandError(f"cannot read {path}: {error}") from error
    if key is not None:
        yield key, image, label


def labels_of(classes: list[str], names: tuple[str, ...]) -> tuple[list[int] | None, tuple[str, ...]]:
    """Numbers of classes and the names that they number: ``names`` if there are any, and then no numbers if other names
    are found."""
    found = set(classes)
    if not names:  # numbers in their order, other names in theirs
        numeric = all(name.isdecimal() for name in found)
        names = tuple(sorted(found, key=lambda name: (int(name) if numeric else 0, name)))
    number = {name: index for index, name in enumerate(names)}
    return ([number[name] for name in classes] if found <= set(names) else None), names


class ImageSource:
    """Samples that are pages of image files, decoded as they are read."""

    decodes = True

    def __init__(self, files: Files, pages: Pages, preparation: Preparation) -> None:
        self.files, self.pages, self.preparation = files, pages, preparation

    def __len__(self) -> int:
        return len(self.pages.of_file)

    def read(self, indices: np.ndarray | slice) -> Tensor:
        pages = self.pages.of_file[indices]
        shape = (len(pages), *self.preparation.shape)
        samples = np.empty(shape, np.float32 if self.pages.has_16_bits else np.uint8)
        for position, (number, page) in enumerate(pages.tolist()):
            with _naming(self.files, number):
                samples[position] = self._decoded(number, page)
        return torch.from_numpy(samples)

    def _decoded(self, number: int, page: int) -> np.ndarray:
        prepared = self.preparation
        side = prepared.image_size
        image = _decoded_page(self.files, number, page, side)
        if side is not None:
            image = _resized(image, side)
        height, width = prepared.shape[1:]
        if image.size != (width, height):
            raise ValueError(f"it is {image.width}x{image.height}, the samples are {width}x{height}")
        if image.mode == "F":
            return np.asarray(image) / np.float32(prepared.high_16)
        values = np.asarray(image.convert(prepared.mode))
        values = values[None] if values.ndim == 2 else np.moveaxis(values, 2, 0)
        return values / np.asarray(prepared.high, np.float32) if self.pages.has_16_bits else values

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.pages.of_file.tobytes())
        digest.update(np.array([self.files.size(number) for number in range(len(self.files))]).tobytes())
        if self.files.parts is None:
            digest.update(self.files.names.tobytes())
        return digest.hexdigest()


@contextmanager
def _naming(files: Files, number: int) -> Iterator[None]:
    """A block that reads an image: whatever it raises is the file's fault."""
    try:
        yield
    except CommandError:
        raise
    except Exception as error:  # Pillow's readers of some twenty formats raise what they come upon
        raise CommandError(f"cannot read the image {files.name(number)}: {error or type(error).__name__}") from error


def _decoded_page(files: Files, number: int, page: int, image_size: int | None = None) -> Any:
    """One page, upright, in Pillow's mode L or RGB, or F if it has 16 bits; a transparency is left out."""
    with files.open(number) as file, require("PIL.Image").open(file) as opened:
        if page:
            opened.seek(page)
        if (
            image_size is not None
        ):  # a JPEG of many times the size is decoded at a half, a quarter or an eighth of its own
            opened.draft(None, (2 * image_size, 2 * image_size))
        image = require("PIL.ImageOps").exif_transpose(opened)
        if image.mode in _SIXTEEN_BITS or image.mode == "F":
            values = np.asarray(image)
            if image.mode == "F" or values.min() < 0 or values.max() >= 2**16:
                raise ValueError(
                    f"its pixels (Pillow's mode {image.mode}) are not of 8 or 16 bits: make it an .npy file"
                )
            return require("PIL.Image").fromarray(values.astype(np.float32))  # Pillow's own conversion cuts off at 255
        return image.convert("L" if image.mode in _GREY else "RGB")


def _resized(image: Any, side: int) -> Any:
    """A square of it. What the filter overshoots at edges is cut off at the image's own smallest and largest value."""
    ends = np.ravel(image.getextrema()).tolist()
    values = np.asarray(require("PIL.ImageOps").fit(image, (side, side)))
    return require("PIL.Image").fromarray(values.clip(min(ends), max(ends)))


class Pages(NamedTuple):
    """The pages of some files: of each its file and its number in it, ``(pages, 2)``."""

    of_file: np.ndarray
    has_16_bits: bool
    """Whether any file has."""


class _Header(NamedTuple):
    """What a file says of itself before it is decoded."""

    size: tuple[int, int]
    mode: str
    pages: int


def _header(files: Files, number: int) -> _Header:
    with _naming(files, number), files.open(number) as file, require("PIL.Image").open(file) as image:
        # In a PNG file without it Pillow would decode the image to look for it behind that.
        orientation = image.getexif().get(_ORIENTATION) if image.format != "PNG" or "exif" in image.info else None
        width, height = image.size
        pages = (
            1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        )  # an MPO's second is another view, or small
        return _Header((height, width) if orientation in _TURNED_BY_A_QUARTER else (width, height), image.mode, pages)


def _parallel(function: Callable[[T], R], arguments: Iterable[T]) -> Iterator[R]:
    """``function`` of every argument, in order, by threads: Pillow decodes without Python's lock."""
    remaining = iter(arguments)
    with ThreadPoolExecutor(_THREADS) as threads:
        while some := list(islice(remaining, 16 * _THREADS)):
            yield from threads.map(function, some)


def prepare(
    files: Files, name: str, *, image_size: int | None, preparation: Preparation | None
) -> tuple[Pages, Preparation]:
    """Read every file's header, and, unless there is a preparation already, find out what is to be done to the images.

    They are in colour if any of them is. 0 to 255 become 0 to 1, or, where no image uses the upper half, 0 to the
    largest; with 16 bits likewise. All images are scaled alike.
    """
    image_size = image_size if preparation is None else preparation.image_size
    sizes: np.ndarray = np.zeros(len(files), np.int64)
    modes: set[str] = set()
    has_16_bits = np.zeros(len(files), bool)
    first: tuple[int, int] | None = None
    for number, header in enumerate(_parallel(lambda number: _header(files, number), range(len(files)))):
        first = first or header.size
        if header.size != first and image_size is None:
            shown = [f"{files.name(n)} is {w}x{h}" for n, (w, h) in ((0, first), (number, header.size))]
            raise CommandError(f"the images differ in size: {', '.join(shown)}: choose one with --image-size")
        sizes[number] = header.pages
        modes.add(header.mode)
        has_16_bits[number] = header.mode in _SIXTEEN_BITS
    assert first is not None
    count = int(sizes.sum())
    if count < 2:
        raise CommandError(f"{name}: expected at least two images ({', '.join(SUFFIXES)}), found {count}")
    numbers = np.repeat(np.arange(len(files)), sizes)
    page = np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    pages = Pages(np.stack([numbers, page], axis=1), bool(has_16_bits.any()))
    if preparation is not None:
        return pages, _prepared_alike(name, first, preparation)
    mode = "L" if modes <= {*_GREY, "F"} else "RGB"
    width, height = first if image_size is None else (image_size, image_size)
    high, high_16 = _largest(files, pages.of_file, has_16_bits)
    scales = [] if has_16_bits.all() else [f"0 to {high:g}"]
    scales += [f"0 to {high_16:g} (16 bits)"] if has_16_bits.any() else []
    description = (
        f"{count} {'images' if count == len(files) else f'pages of {len(files)} images'}, "
        f"{'grey' if mode == 'L' else 'RGB'}{'' if image_size is None else ', resized and cropped'}: "
        f"{' and '.join(scales)} become 0 to 1"
    )
    shape = (1 if mode == "L" else 3, height, width)
    return pages, Preparation(shape, 0.0, high, high_16, mode=mode, image_size=image_size, description=description)


def _prepared_alike(name: str, size: tuple[int, int], preparation: Preparation) -> Preparation:
    """``preparation`` of other data, for images of ``size``."""
    channels, height, width = preparation.shape if len(preparation.shape) == 3 else (0, 0, 0)
    if channels not in (1, 3) or preparation.dtype != "uint8":
        shape = "x".join(map(str, preparation.shape))
        raise CommandError(f"{name} is of images, the training data are of {preparation.dtype} of shape {shape}")
    if preparation.image_size is None and size != (width, height):
        raise CommandError(f"{name}: images of {size[0]}x{size[1]}, the training data are of {width}x{height}")
    return replace(preparation, mode="L" if channels == 1 else "RGB")


def _largest(files: Files, pages: np.ndarray, has_16_bits: np.ndarray) -> tuple[float, float]:
    """The largest value of images with a byte a channel, and of those with 16 bits; or 255 and 65535 where an image
    uses the upper half of that. No more images are decoded than it takes to know."""

    def largest(number_and_page: tuple[int, int]) -> float:
        number, page = number_and_page
        with _naming(files, number):
            return float(np.asarray(_decoded_page(files, number, page)).max())

    found = []
    for of_kind, full in ((~has_16_bits, 255.0), (has_16_bits, 65535.0)):
        top = 0.0
        for value in _parallel(largest, map(tuple, pages[of_kind[pages[:, 0]]].tolist())):
            top = max(top, value)
            if top > full / 2:
                break
        found.append(full if top > full / 2 or top == 0 else top)
    return found[0], found[1]
