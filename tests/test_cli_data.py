"""The data of ``fusedvae train``: what is made of arrays, of folders of images and of tar shards, and in how much
memory."""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fusedvae
from fusedvae.cli import checkpoint, data, main, pictures, train
from fusedvae.cli.data import arrays
from fusedvae.cli.data import samples as samples_module
from fusedvae.cli.errors import CommandError
from fusedvae.cli.settings import Settings

SOURCE = Path(fusedvae.__file__).parent.parent
QUICK = ["--arch", "mlp", "--width", "8", "--latent", "2", "--batch", "8", "--threads", "1", "--quiet", "--epochs", "1"]


@pytest.fixture
def nothing_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small data too are read as they are asked for."""
    monkeypatch.setattr(samples_module, "MOST_IN_MEMORY", 0)


def saved(path: Path, values: np.ndarray) -> str:
    np.save(path, values)
    return str(path)


def all_of(samples: data.Samples) -> torch.Tensor:
    return samples.batch(slice(None), dtype=torch.float64)


# --- arrays -----------------------------------------------------------------------------------------------------


def test_digits_are_scaled_and_labelled() -> None:
    digits = data.load("digits")
    assert digits.shape == (1, 8, 8)
    assert len(digits) == 1797
    assert digits.values.dtype == torch.float32
    assert (digits.values.min(), digits.values.max()) == (0, 1)
    assert set(digits.labels.tolist()) == set(range(10))
    assert digits.preparation.classes == tuple("0123456789")


@pytest.mark.parametrize("held", [True, False], ids=["in-memory", "mapped"])
@pytest.mark.parametrize(
    ("values", "scaled"),
    [
        (np.array([[0, 255], [51, 102]], np.uint8), [[0, 1], [0.2, 0.4]]),
        (np.array([[0, 1], [1, 1]], np.uint8), [[0, 1], [1, 1]]),
        (np.array([[0, 16], [4, 8]], np.uint8), [[0, 1], [0.25, 0.5]]),
        (np.array([[0, 0], [0, 0]], np.uint8), [[0, 0], [0, 0]]),
        (np.array([[0.0, 1.0], [0.25, 0.5]]), [[0, 1], [0.25, 0.5]]),
        (np.array([[0.25, 0.5], [0.25, 0.5]]), [[0.25, 0.5], [0.25, 0.5]]),
        (np.array([[True, False], [True, True]]), [[1, 0], [1, 1]]),
        (np.array([[-1.0, 10], [0.0, 30], [1.0, 20]], np.float16), [[0, 0], [0.5, 1], [1, 0.5]]),
        (np.array([[-1.0, 7], [1.0, 7]], ">f4"), [[0, 0], [1, 0]]),
        (np.array([[[-1.0, 1.0]], [[0.0, 0.5]]], np.float32), [[[[0, 1]]], [[[0.5, 0.75]]]]),
    ],
    ids=["bytes", "binary", "levels", "black", "scaled", "constant", "bools", "columns", "one-constant", "images"],
)
def test_arrays_are_scaled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool, values: np.ndarray, scaled: list
) -> None:
    if not held:
        monkeypatch.setattr(samples_module, "MOST_IN_MEMORY", 0)
    samples = data.load(saved(tmp_path / "a.npy", values))
    torch.testing.assert_close(all_of(samples), torch.tensor(scaled, dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", ">i2", "longdouble"]
)
def test_numbers_of_all_kinds_are_scaled_by_their_range(tmp_path: Path, dtype: str) -> None:
    info = np.finfo if np.dtype(dtype).kind == "f" else np.iinfo
    low, high = (-2, 2) if info is np.finfo else (info(dtype).min, info(dtype).max)
    values = np.array([low, high, low // 2 + high // 2, low], dtype).reshape(2, 1, 2)
    batch = all_of(data.load(saved(tmp_path / "a.npy", values)))
    torch.testing.assert_close(batch.flatten(), torch.tensor([0, 1, 0.5, 0], dtype=torch.float64), rtol=0, atol=4e-3)
    assert batch.flatten()[[0, 1, 3]].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("shape", "channels", "expected"),
    [
        ((2, 5, 6), None, (1, 5, 6)),
        ((2, 3, 5, 6), None, (3, 5, 6)),
        ((2, 5, 6, 3), None, (3, 5, 6)),
        ((2, 5, 6, 1), None, (1, 5, 6)),
        ((2, 1, 4, 4), None, (1, 4, 4)),
        ((2, 4, 4, 1), None, (1, 4, 4)),
        ((2, 7, 5, 6), "first", (7, 5, 6)),
        ((2, 16, 16, 2), "last", (2, 16, 16)),
        ((2, 3, 5, 3), "last", (3, 3, 5)),
        ((2, 5, 6, 3), "first", (5, 6, 3)),
    ],
    ids=str,
)
def test_channels_are_found(
    tmp_path: Path, shape: tuple[int, ...], channels: str | None, expected: tuple[int, ...]
) -> None:
    values = np.random.default_rng(0).random(shape)
    samples = data.load(saved(tmp_path / "a.npy", values), channels=channels)
    assert samples.shape == expected
    last = len(shape) == 4 and expected != shape[1:]
    as_saved = all_of(samples).moveaxis(1, 3) if last else all_of(samples)
    torch.testing.assert_close(as_saved.reshape(shape), torch.from_numpy(values), rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(2, 16, 16, 2), (2, 16, 16, 5), (2, 7, 5, 6), (2, 3, 5, 3), (2, 3, 3, 3)], ids=str)
def test_channels_are_asked_about_rather_than_guessed(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(CommandError, match=r"where are the channels .* say --channels first or last"):
        data.load(saved(tmp_path / "a.npy", np.zeros(shape)))


def test_rows_become_the_images_that_they_are(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((4, 3 * 8 * 8)) * 4 - 2
    path = saved(tmp_path / "a.npy", values)
    assert data.load(path).preparation.description.endswith("if these are images: --image-shape 3,8,8")
    first = data.load(path, image_shape=(3, 8, 8))
    low, high = values.min(), values.max()
    expected = torch.from_numpy((values - low) / (high - low))
    torch.testing.assert_close(all_of(first), expected.view(4, 3, 8, 8), rtol=0, atol=1e-7)
    last = data.load(path, image_shape=(3, 8, 8), channels="last")
    torch.testing.assert_close(all_of(last), expected.view(4, 8, 8, 3).permute(0, 3, 1, 2), rtol=0, atol=1e-7)
    assert data.load(path, image_shape=(8, 24)).shape == (1, 8, 24)
    assert "--image-shape" not in data.load(path, image_shape=(8, 24)).preparation.description
    with pytest.raises(CommandError, match="--image-shape 8 x 8 is 64 values, rows have 192"):
        data.load(path, image_shape=(8, 8))
    with pytest.raises(CommandError, match="--image-shape is for rows of values"):
        data.load(saved(tmp_path / "b.npy", np.zeros((4, 8, 8))), image_shape=(8, 8))


def test_what_was_done_to_an_array_is_said(tmp_path: Path) -> None:
    def said(values: np.ndarray) -> str:
        return data.load(saved(tmp_path / "a.npy", values)).preparation.description

    assert said(np.array([[0, 1]] * 3, np.uint8)) == "3 x 2 of uint8: 0 to 1 become 0 to 1"
    assert said(np.array([[0, 200]] * 3, np.uint8)) == "3 x 2 of uint8: 0 to 255 become 0 to 1"
    assert said(np.zeros((3, 2))) == "3 x 2 of float64: left as they are, within 0 and 1"
    assert said(np.arange(12.0).reshape(3, 2, 2)) == "3 x 2 x 2 of float64: 0 to 11 become 0 to 1"
    table = np.array([[1.0, 5], [2.0, 5]])
    assert said(table) == "2 x 2 of float64: every column scaled by its own range to 0 to 1 (1 are constant)"


def test_an_npz_file_with_several_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", x=np.zeros((4, 2)))
    assert data.load(str(tmp_path / "one.npz")).shape == (2,)
    np.savez(tmp_path / "two.npz", x=np.zeros((4, 2)), y=np.zeros((4, 3)))
    assert data.load(str(tmp_path / "two.npz"), array="y").shape == (3,)
    with pytest.raises(CommandError, match="holds several arrays: choose one with --array: x, y"):
        data.load(str(tmp_path / "two.npz"))
    with pytest.raises(CommandError, match="has no array 'z': choose one with --array: x, y"):
        data.load(str(tmp_path / "two.npz"), array="z")


def test_the_whole_of_an_array_says_how_it_is_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_CHUNK", 30)  # three rows at a time
    values = np.zeros((10, 10), np.uint8)
    for high, full in ((20, 20), (200, 255)):
        values[1, 1], values[-1, -1] = 3, high
        assert data.load(saved(tmp_path / "a.npy", values)).preparation.high == full


def test_the_fingerprint_of_a_mapped_array_sees_its_rows(
    tmp_path: Path, nothing_in_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more rows than go into it the first, the last and some between, which lie apart."""
    monkeypatch.setattr(arrays, "_HASHED_ROWS", 4)
    values = np.random.default_rng(0).random((10, 3))
    path = saved(tmp_path / "a.npy", values)
    first = data.load(path).fingerprint()
    assert data.load(path).fingerprint() == first
    for row in (0, 6, 9):
        other = values.copy()
        other[row] /= 2
        saved(tmp_path / "a.npy", other)
        assert data.load(path).fingerprint() != first


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_mapped_array_is_that_in_memory(tmp_path: Path, nothing_in_memory: None, order: str) -> None:
    values = np.asarray(np.random.default_rng(0).normal(size=(70, 5, 3)), order=order)
    samples = data.load(saved(tmp_path / "a.npy", values))
    assert not isinstance(samples.source, samples_module.InMemory)
    indices = np.random.default_rng(1).permutation(70)
    scaled = (values - values.min()) / (values.max() - values.min())
    expected = torch.from_numpy(scaled[indices].astype(np.float32))[:, None]
    assert torch.equal(samples.batch(indices), expected)
    assert torch.equal(pickle.loads(pickle.dumps(samples)).batch(indices), expected)
    assert len(pickle.dumps(samples.source)) < 2000  # a process gets the name of the file
    first, _ = next(data.batches(samples, [indices], workers=1))
    assert torch.equal(first, expected)


PEAK = """
import re, resource, sys
import numpy as np
from fusedvae.cli import data
data.samples.MOST_IN_MEMORY = 2**20
def peak():  # Of itself a process asks /proc: getrusage has the peak of the one that started it, too.
    own = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
    return 1024 * max(int(own), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
samples = data.load(sys.argv[1]); before = peak()
samples = data.load(sys.argv[2])
samples.fingerprint()
for x, _ in data.batches(samples, data.in_order(samples, 2)): pass
print(peak() - before)
"""

measures_memory = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says what a process takes")


@measures_memory
def test_an_array_is_never_read_whole(tmp_path: Path) -> None:
    size = 2**27  # as float32 it would be twice this
    values = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.float16, (2**10, 2**16))
    values[-1, -1] = 5
    small = saved(tmp_path / "b.npy", np.eye(2))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, small, str(tmp_path / "a.npy")], cwd=SOURCE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 0.5 * size


# --- images -----------------------------------------------------------------------------------------------------


def noise(*shape: int, top: int = 255, seed: int = 0) -> np.ndarray:
    dtype = np.uint8 if top < 256 else np.uint16
    return np.random.default_rng(seed).integers(0, top + 1, shape).astype(dtype)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """12 grey images, and a file that is none, in two folders."""
    for index in range(12):
        path = tmp_path / "pictures" / "ab"[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(6, 8, seed=index)).save(path)
    (tmp_path / "pictures" / "README.txt").write_text("not an image")
    return tmp_path / "pictures"


def test_a_folder_of_images(folder: Path) -> None:
    samples = data.load(str(folder))
    assert samples.shape == (1, 6, 8)
    assert samples.values.dtype == torch.uint8
    assert torch.equal(samples.values[0, 0], torch.from_numpy(noise(6, 8, seed=0)))
    torch.testing.assert_close(samples.batch(slice(1)), samples.values[:1] / 255)
    assert samples.preparation.description == "12 images, grey: 0 to 255 become 0 to 1; 2 classes"
    assert data.load(str(folder), image_size=5).shape == (1, 5, 5)
    Image.new("RGBA", (8, 6), (255, 0, 0, 128)).save(folder / "b" / "99.png")
    coloured = data.load(str(folder))
    assert coloured.shape == (3, 6, 8)
    assert coloured.values[-1, :, 0, 0].tolist() == [255, 0, 0]
    assert torch.equal(coloured.values[0, 2], samples.values[0, 0])


def test_folders_are_classes(folder: Path) -> None:
    samples = data.load(str(folder))
    assert samples.preparation.classes == ("a", "b")
    assert samples.labels.tolist() == [0] * 6 + [1] * 6
    assert samples.subset(np.array([7, 2])).labels.tolist() == [1, 0]
    sample, label = samples[-1]
    assert (sample.shape, label.item()) == ((1, 6, 8), 1)
    (folder / "b" / "01.png").rename(folder / "01.png")  # then not all are in one
    assert data.load(str(folder)).labels is None
    assert data.load(str(folder / "a")).labels is None
    for name, renamed in (("a", "10"), ("b", "9")):
        (folder / name).rename(folder / renamed)
    (folder / "01.png").unlink()
    assert data.load(str(folder)).preparation.classes == ("9", "10")


def test_the_fingerprint_of_a_folder_sees_its_files(folder: Path, nothing_in_memory: None) -> None:
    """Their names, and their sizes."""
    found = [data.load(str(folder)).fingerprint()]
    renamed = (folder / "b" / "11.png").rename(folder / "b" / "12.png")
    found.append(data.load(str(folder)).fingerprint())
    with open(renamed, "ab") as file:
        file.write(b"more")
    found.append(data.load(str(folder)).fingerprint())
    assert len({*found}) == 3
    assert data.load(str(folder)).fingerprint() == found[2]


def test_images_are_decoded_by_workers_as_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(noise(6, 8, 3)).save(folder / "a" / "00.png")
    held = data.load(str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(samples_module, "MOST_IN_MEMORY", 0)
        decoded = data.load(str(folder))
    assert not isinstance(decoded.source, samples_module.InMemory)
    assert (data.default_workers(held), data.default_workers(decoded) > 0) == (0, True)
    state = torch.get_rng_state()
    order = data.in_order(held, 5)
    for workers in (0, 2):
        found = list(data.batches(decoded, order, workers=workers))
        for (x, labels), indices in zip(found, order, strict=True):
            assert torch.equal(x, held.batch(indices))
            assert torch.equal(labels, held.labels[torch.from_numpy(indices)])
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_leave_signals_to_the_main_process(folder: Path, nothing_in_memory: None) -> None:
    samples = data.load(str(folder))
    loaded = data.batches(samples, data.in_order(samples, 1), workers=2)
    found = [next(loaded)[0]]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    found += [x for x, _ in loaded]
    assert torch.equal(torch.cat(found), samples.batch(slice(None)))


def test_a_worker_that_is_killed_is_one_line(
    folder: Path, nothing_in_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: data.images.ImageSource, indices: np.ndarray) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")

    samples = data.load(str(folder))
    monkeypatch.setattr(data.images.ImageSource, "read", killed)
    with pytest.raises(CommandError, match=r"a process that reads the data has ended: .*: try --workers 0$"):
        list(data.batches(samples, data.in_order(samples, 4), workers=1))


def test_an_image_that_breaks_while_training_is_one_line(folder: Path, nothing_in_memory: None) -> None:
    samples = data.load(str(folder))
    path = folder / "b" / "05.png"
    path.write_bytes(path.read_bytes()[:60])
    for workers in (0, 1):
        with pytest.raises(CommandError, match=r"^cannot read the image \S*05\.png: [^\n]*$"):
            list(data.batches(samples, data.in_order(samples, 4), workers=workers))
    Image.fromarray(noise(7, 8)).save(path)
    with pytest.raises(CommandError, match=r"05\.png: it is 8x7, the samples are 8x6$"):
        samples.batch(slice(None))


@pytest.mark.parametrize(("top", "full"), [(255, 255), (1, 1), (16, 16), (127, 127), (128, 255), (0, 255)])
def test_dark_images_are_scaled_by_the_largest_value_of_the_folder(tmp_path: Path, top: int, full: int) -> None:
    for index in range(3):
        values = noise(4, 5, top=top if index == 2 else top // 2, seed=index)
        values[0, 0] = top if index == 2 else 0
        Image.fromarray(values).save(tmp_path / f"{index}.png")
    samples = data.load(str(tmp_path))
    expected = torch.from_numpy(noise(4, 5, top=top // 2, seed=1)).double() / full
    expected[0, 0] = 0
    torch.testing.assert_close(all_of(samples)[1, 0], expected)
    assert f"grey: 0 to {full} become 0 to 1" in samples.preparation.description


@pytest.mark.parametrize(("top", "full"), [(255, 255), (4095, 4095), (32767, 32767), (65535, 65535), (40000, 65535)])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32], ids=["16-bit", "mode-I"])
def test_images_of_16_bits_keep_their_shades(tmp_path: Path, dtype: type, top: int, full: int) -> None:
    shades = np.linspace(0, top, 48).round().astype(dtype).reshape(6, 8)
    for index, values in enumerate((shades // 2, shades)):
        Image.fromarray(values).save(tmp_path / f"{index}.tif")
    samples = data.load(str(tmp_path))
    assert samples.values.dtype == torch.float32
    expected = torch.from_numpy((shades // 2).astype(np.float64) / full)
    torch.testing.assert_close(all_of(samples)[0, 0], expected, rtol=0, atol=1e-6)
    resized = data.load(str(tmp_path), image_size=4)
    assert 0 <= resized.values.min() < resized.values.max() <= 1
    assert abs(all_of(resized).mean() - all_of(samples).mean()) < 0.05


def test_images_of_8_and_16_bits_have_a_scale_each(folder: Path) -> None:
    before = all_of(data.load(str(folder)))
    shades = np.arange(48, dtype=np.uint16).reshape(6, 8) * 87
    Image.fromarray(shades).save(folder / "a" / "00.png")
    samples = data.load(str(folder))
    torch.testing.assert_close(all_of(samples)[1:], before[1:], rtol=0, atol=1e-7)
    torch.testing.assert_close(all_of(samples)[0, 0], torch.from_numpy(shades / 4089), rtol=0, atol=1e-7)
    assert "0 to 255 and 0 to 4089 (16 bits) become 0 to 1" in samples.preparation.description
    Image.fromarray(shades.astype(np.float32)).save(folder / "a" / "00.tiff")
    with pytest.raises(CommandError, match=r"00\.tiff: its pixels \(Pillow's mode F\) are not of 8 or 16 bits"):
        data.load(str(folder))


def test_every_page_is_a_sample(tmp_path: Path) -> None:
    stacks = [noise(count, 4, 5, seed=count) for count in (3, 1, 2)]
    for index, (kind, stack) in enumerate(zip("abb", stacks, strict=True)):
        (tmp_path / kind).mkdir(exist_ok=True)
        first, *others = map(Image.fromarray, stack)
        first.save(tmp_path / kind / f"{index}.tif", save_all=True, append_images=others)
    samples = data.load(str(tmp_path))
    assert torch.equal(samples.values[:, 0], torch.from_numpy(np.concatenate(stacks)))
    assert samples.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert samples.preparation.description.startswith("6 pages of 3 images, grey")


def test_other_views_of_a_photograph_are_no_samples(tmp_path: Path) -> None:
    """As phones save them: a small one in the same file."""
    image = Image.fromarray(noise(16, 16, 3))
    image.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[image.resize((8, 8))])
    with Image.open(tmp_path / "a.jpg") as found:
        assert (found.format, found.n_frames) == ("MPO", 2)
    Image.fromarray(noise(16, 16, 3, seed=1)).save(tmp_path / "b.jpg")
    assert len(data.load(str(tmp_path))) == 2


@pytest.mark.parametrize("suffix", ["pgm", "ppm", "pbm", "PNM"])
def test_netpbm_images(tmp_path: Path, suffix: str) -> None:
    values = np.random.default_rng(0).integers(0, 2, (3, 4, 5)).astype(np.uint8) * 255
    for index, image in enumerate(values):
        pixels = np.repeat(image[..., None], 3, axis=2) if suffix == "ppm" else image
        converted = Image.fromarray(pixels).convert("1") if suffix == "pbm" else Image.fromarray(pixels)
        converted.save(tmp_path / f"{index}.{suffix}", format="PPM")
    samples = data.load(str(tmp_path))
    assert samples.shape == (3 if suffix == "ppm" else 1, 4, 5)
    assert torch.equal(samples.values[:, -1], torch.from_numpy(values))


@pytest.mark.parametrize("name", [".ipynb_checkpoints/{}-checkpoint.png", "._{}.png", ".cache/a/{}.png"])
def test_hidden_files_are_left_out(folder: Path, name: str) -> None:
    before = data.load(str(folder)).values
    for index in range(3):
        path = folder / name.format(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((folder / "a" / "00.png").read_bytes() if "/" in name else b"\0\5\x16\7\0\2\0\0Mac OS X")
    assert torch.equal(data.load(str(folder)).values, before)


def test_folders_behind_links_are_entered_once(folder: Path) -> None:
    (folder / "c").symlink_to(folder / "a")
    (folder / "a" / "up").symlink_to(folder)
    assert len(data.load(str(folder))) == 12
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    Image.fromarray(noise(6, 8)).save(elsewhere / "0.png")
    (folder / "d").symlink_to(elsewhere)
    assert len(data.load(str(folder))) == 13


def test_photographs_stand_upright(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the camera was turned by a quarter
    Image.new("L", (6, 8), 9).save(folder / "a" / "00.png", exif=exif)
    assert data.load(str(folder)).values[0, 0].eq(9).all()


@measures_memory
def test_images_take_memory_for_a_batch_and_not_for_a_folder(tmp_path: Path) -> None:
    one = tmp_path / "one.jpg"
    Image.fromarray(noise(400, 500, 3)).save(one, quality=50)
    few, many = tmp_path / "few", tmp_path / "many"
    for directory, count in ((few, 2), (many, 200)):
        directory.mkdir()
        for index in range(count):
            (directory / f"{index}.jpg").symlink_to(one)
    done = subprocess.run([sys.executable, "-c", PEAK, str(few), str(many)], cwd=SOURCE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 0.5 * 200 * 400 * 500 * 3


# --- tar shards -------------------------------------------------------------------------------------------------


def shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("held", [True, False], ids=["in-memory", "decoded"])
def test_tar_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool) -> None:
    if not held:
        monkeypatch.setattr(samples_module, "MOST_IN_MEMORY", 0)
    values = noise(6, 4, 5, 3)
    for number in range(3):
        members = {}
        for index in (2 * number, 2 * number + 1):
            members[f"./{index:03d}.{'cls' if number else 'CLS'}"] = str(index % 2).encode()
            members[f"./{index:03d}.input.png"] = png(values[index])
            members[f"./{index:03d}.json"] = b"{}"
        shard(tmp_path / f"part-{number:02d}.tar", members)
    samples = data.load(str(tmp_path / "part-{00..02}.tar"))
    assert torch.equal(samples.values, torch.from_numpy(values).permute(0, 3, 1, 2))
    assert samples.labels.tolist() == [0, 1] * 3
    assert samples.preparation.description == "6 images, RGB: 0 to 255 become 0 to 1; 2 classes"
    order = [np.array([5, 0]), np.array([3])]
    first, _ = data.batches(samples, order, workers=1)
    assert torch.equal(first[0], samples.batch(order[0]))
    assert len(data.load(str(tmp_path / "part-01.tar"))) == 2
    assert data.load(str(tmp_path / "part-01.tar"), image_size=3).shape == (3, 3, 3)


def test_shards_that_are_not_whole_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with pytest.raises(CommandError, match=r"cannot read \S*a\.tar: .*No such file"):
        data.load(str(path))
    path.write_bytes(b"rubbish" * 200)
    with pytest.raises(CommandError, match=r"cannot read \S*a\.tar"):
        data.load(str(path))
    shard(path, {f"{number}.png": png(noise(4, 4)) for number in range(4)})
    whole = path.read_bytes()
    assert len(data.load(str(path))) == 4
    third = 2 * 1024  # a header and an image, each in blocks of 512 bytes
    wrong = bytes([whole[third + 150] ^ 1])  # in that header's checksum
    for content in (
        *(whole[:end] for end in (third - 512, third, third + 100, third + 512)),
        whole[: third + 150] + wrong + whole[third + 151 :],
    ):
        path.write_bytes(content)
        with pytest.raises(CommandError, match=r"cannot read \S*a\.tar: "):
            data.load(str(path))
    shard(path, {"0.png": png(noise(4, 4)), "1.txt": b"no image"})
    with pytest.raises(CommandError, match=r"a\.tar: /1 has no image"):
        data.load(str(path))
    shard(path, {"0.png": png(noise(4, 4)), "1.png": png(noise(4, 4)), "1.cls": b"3"})
    with pytest.raises(CommandError, match=r"1 of 2 samples have a class"):
        data.load(str(path))
    shard(path, {"0.png": png(noise(4, 4)), "1.png": b"rubbish"})
    with pytest.raises(CommandError, match=r"cannot read the image \S*a\.tar \(at byte \d+\)"):
        data.load(str(path))
    shard(path, {})
    with pytest.raises(CommandError, match="expected at least two images"):
        data.load(str(path))
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(CommandError, match=r"cannot read \S*a\.tar: .*: expected a tar file, not compressed"):
        data.load(str(path))
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.LNKTYPE, "0.png"
        archive.addfile(link)
    with pytest.raises(CommandError, match=r"a\.tar: 1\.png is a link"):
        data.load(str(path))
    with pytest.raises(CommandError, match=r"cannot read \S*\{00\.tar: Unbalanced braces"):
        data.load(str(tmp_path / "{00.tar"))
    shard(tmp_path / "{00.tar", {f"{number}.png": png(noise(4, 4)) for number in range(3)})
    assert len(data.load(str(tmp_path / "{00.tar"))) == 3  # it is the name of a file


# --- tables of cells --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [True, False], ids=["in-memory", "read"])
@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, held: bool) -> None:
    anndata = pytest.importorskip("anndata")
    scipy_sparse = pytest.importorskip("scipy.sparse")
    if not held:
        monkeypatch.setattr(samples_module, "MOST_IN_MEMORY", 0)
    counts = np.random.default_rng(0).poisson(2, (30, 7)).astype(np.float32)
    path = tmp_path / "cells.h5ad"
    x = counts if form == "dense" else getattr(scipy_sparse, f"{form}_matrix")(counts)
    anndata.AnnData(x, layers={"counts": x}, obs={"day": [1] * 30}).write_h5ad(path)
    samples = data.load(str(path))
    low, high = counts.min(0), counts.max(0)
    expected = torch.from_numpy(((counts - low) / (high - low).astype(np.float64)).astype(np.float32))
    indices = np.array([29, 3, 3, 7])
    assert torch.equal(samples.batch(indices), expected[torch.from_numpy(indices)])
    assert torch.equal(samples.batch(slice(4, 9)), expected[4:9])
    (x, _) = next(data.batches(samples, [indices], workers=1))
    assert torch.equal(x, expected[torch.from_numpy(indices)])


def test_broken_cells_are_one_line(tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata")
    (tmp_path / "a.h5ad").write_bytes(b"rubbish")
    with pytest.raises(CommandError, match=r"cannot read \S*a\.h5ad"):
        data.load(str(tmp_path / "a.h5ad"))
    anndata.AnnData(obs={"day": [1, 2]}, layers={"counts": np.ones((2, 3))}).write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(CommandError, match=r"a\.h5ad has no X"):
        data.load(str(tmp_path / "a.h5ad"))


@measures_memory
def test_of_a_file_of_cells_the_rows_that_are_asked_for_are_read(tmp_path: Path) -> None:
    """Not what else lies in it, which may be as large again."""
    anndata = pytest.importorskip("anndata")
    x = np.zeros((600, 100_000), np.float32)
    x[0, 0] = 1
    anndata.AnnData(x, layers={"counts": x}).write_h5ad(tmp_path / "a.h5ad", compression="lzf")
    anndata.AnnData(x[:10], layers={"counts": x[:10]}).write_h5ad(tmp_path / "b.h5ad")
    size = x.nbytes
    del x
    paths = [str(tmp_path / name) for name in ("b.h5ad", "a.h5ad")]
    done = subprocess.run([sys.executable, "-c", PEAK, *paths], cwd=SOURCE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 0.5 * size


# --- splits, other data and the record --------------------------------------------------------------------------


def test_the_split_depends_on_nothing_but_the_number_of_samples() -> None:
    values = torch.arange(40.0)[:, None]
    samples = data.Samples(samples_module.InMemory(values), data.Preparation((1,)))
    parts = data.split(samples, 0.25)
    assert (len(parts.train), len(parts.test)) == (30, 10)
    assert sorted([*parts.train.values.flatten().tolist(), *parts.test.values.flatten().tolist()]) == list(range(40))
    torch.manual_seed(1)
    assert torch.equal(parts.test.values, data.split(samples, 0.25).test.values)


def test_a_preparation_survives_json() -> None:
    for preparation in (
        data.Preparation((2,), (0.0, 1.5), (3.0, 4.0), description="a table"),
        data.Preparation((3, 4, 5), 0.0, 17.0, 4095.0, mode="RGB", image_size=4, classes=("a", "b")),
    ):
        assert data.Preparation.from_record(json.loads(json.dumps(preparation.record()))) == preparation


def test_other_data_are_prepared_alike(folder: Path, tmp_path: Path) -> None:
    table = data.load(saved(tmp_path / "a.npy", np.array([[0.0, 10], [2.0, 30]]))).preparation
    other = data.load(saved(tmp_path / "b.npy", np.array([[1.0, 10], [4.0, 20]])), preparation=table)
    assert all_of(other).tolist() == [[0.5, 0], [2, 0.5]]
    binary = data.load(saved(tmp_path / "a.npy", np.array([[[0, 1]]] * 2, np.uint8))).preparation
    other = data.load(saved(tmp_path / "b.npy", np.array([[0, 1], [1, 1]], np.uint8)), preparation=binary)
    assert all_of(other).tolist() == [[[[0, 1]]], [[[1, 1]]]]
    with pytest.raises(CommandError, match=r"b\.npy is of float64, the training data are of uint8"):
        data.load(saved(tmp_path / "b.npy", np.zeros((2, 2))), preparation=binary)
    with pytest.raises(CommandError, match=r"samples of 3, but the training data are of 2"):
        data.load(saved(tmp_path / "b.npy", np.zeros((2, 3))), preparation=table)
    with pytest.raises(CommandError, match="values are NaN or infinite"):
        data.load(saved(tmp_path / "b.npy", np.array([[np.nan, 0]] * 2)), preparation=table)
    grey = data.load(str(folder / "a"), image_size=4).preparation
    Image.fromarray(noise(9, 7, 3)).save(folder / "b" / "01.png")
    coloured = data.load(str(folder / "b"), preparation=grey)
    assert coloured.shape == (1, 4, 4)
    with pytest.raises(CommandError, match=r"images of 8x6, the training data are of 2x1"):
        data.load(str(folder / "a"), preparation=binary)


@pytest.mark.parametrize("shape", [(30, 6, 9, 1), (30, 1, 6, 9), (30, 3, 5, 5)], ids=str)
@pytest.mark.parametrize("channels", ["first", "last"])
def test_other_arrays_have_their_channels_where_the_first_has_them(
    tmp_path: Path, shape: tuple[int, ...], channels: str
) -> None:
    """Where somebody has said where they are; else they may be at the other end."""
    path = saved(tmp_path / "a.npy", np.random.default_rng(0).random(shape))
    first = data.load(path, channels=channels)
    again = data.load(path, preparation=first.preparation)
    assert torch.equal(again.values, first.values)
    turned = np.moveaxis(np.load(path), 1, 3) if channels == "first" else np.moveaxis(np.load(path), 3, 1)
    if first.shape[0] in (1, 3):
        other = data.load(saved(tmp_path / "b.npy", turned), preparation=first.preparation)
        assert torch.equal(other.values, first.values)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_resized_images_stay_within_their_own_values(tmp_path: Path, dtype: type) -> None:
    """And others that are brighter than those that a model was trained on are not cut off."""
    top = 60 if dtype == np.uint8 else 1000
    for name, scale in (("train", 1), ("test", 2)):
        (tmp_path / name).mkdir()
        for index in range(4):
            image = np.kron([[0, 1], [1, index % 2]], np.ones((21, 21))).astype(dtype) * top * scale
            Image.fromarray(image).save(tmp_path / name / f"{index}.png")
    samples = data.load(str(tmp_path / "train"), image_size=16)
    assert all_of(samples).min() == 0
    assert all_of(samples).max() == 1
    assert all_of(data.load(str(tmp_path / "test"), preparation=samples.preparation)).max() == 2


@pytest.mark.parametrize("kind", ["folder", "npz", "shard"])
def test_one_class_for_all_is_none_when_a_run_goes_on_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    monkeypatch.setattr(pictures, "draw", lambda *_: None)
    images = [noise(4, 5, seed=index) for index in range(20)]
    source = tmp_path / {"folder": "images", "npz": "a.npz", "shard": "a.tar"}[kind]
    if kind == "folder":
        (source / "all").mkdir(parents=True)
        for index, image in enumerate(images):
            Image.fromarray(image).save(source / "all" / f"{index}.png")
    elif kind == "npz":
        np.savez(source, x=np.stack(images), labels=np.zeros(20, int))
    else:
        labelled = {f"{index}.png": png(image) for index, image in enumerate(images)}
        shard(source, dict(sorted({**labelled, **{f"{index}.cls": b"7" for index in range(20)}}.items())))
    out = tmp_path / "run"
    assert main(["train", "--data", str(source), "--out", str(out), *QUICK]) == 0
    assert main(["train", "--resume", str(out), "--epochs", "2", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["train", "--data", str(source), "--condition", "labels", *QUICK]) == 2
    assert "--condition labels needs labels of two classes at least" in capsys.readouterr().err


def test_measuring_on_data_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pictures, "draw", lambda trainer, directory: None)
    learnt, test = (saved(tmp_path / f"{n}.npy", np.random.default_rng(n).normal(size=(20 + n, 3))) for n in (1, 2))
    out = tmp_path / "run"
    assert main(["train", "--data", learnt, "--test-data", test, "--out", str(out), *QUICK]) == 0
    printed = capsys.readouterr().out
    assert "21 samples of 3 to train on, 22 held out" in printed
    description = "21 x 3 of float64: every column scaled by its own range to 0 to 1"
    assert f"data: {description}\n" in printed
    record = checkpoint.load(out)["preparation"]
    assert record["description"] == description
    assert record["low"] == tuple(np.load(learnt).min(0))
    assert main(["train", "--resume", str(out), "--epochs", "2", "--quiet"]) == 0
    assert main(["train", "--resume", str(out), "--epochs", "3", "--quiet", "--test-data", learnt]) == 2
    assert "is not the data that this run was trained on" in capsys.readouterr().err


def test_a_condition_needs_labels_of_the_data_to_measure_on_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("learnt/a", "learnt/b", "others/a", "others/c", "none"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(2):
            (tmp_path / name / f"{number}.png").write_bytes(png(noise(4, 4)))
    for name in ("others", "none"):
        sources = ["--data", str(tmp_path / "learnt"), "--test-data", str(tmp_path / name)]
        assert main(["train", *sources, "--condition", "labels", "--out", str(tmp_path / "run"), *QUICK]) == 2
        message = f"--condition labels needs those of {tmp_path / 'learnt'}, and {tmp_path / name} has none or others"
        assert message in capsys.readouterr().err
    sources = ["--data", str(tmp_path / "learnt"), "--heldout", "0.5"]
    run = ["train", *sources, "--condition", "labels", "--out", str(tmp_path / "run"), *QUICK]
    assert main(run) == 0
    assert "log p(x|label) " in capsys.readouterr().out
    (tmp_path / "learnt/b").rename(tmp_path / "learnt/c")
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    message = f"--condition labels: {tmp_path / 'learnt'} has other labels now than the run was begun with"
    assert message in capsys.readouterr().err


def test_a_run_that_reads_as_it_goes_is_that_in_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "draw", lambda trainer, directory: None)
    tables = []
    for name, most, options in (("held", 2**28, []), ("read", 0, ["--workers", "0"]), ("workers", 0, [])):
        monkeypatch.setattr(samples_module, "MOST_IN_MEMORY", most)
        assert main(["train", "--data", str(folder), "--out", str(tmp_path / name), *QUICK, *options]) == 0
        tables.append((tmp_path / name / "metrics.csv").read_bytes())
    assert tables[0] == tables[1] == tables[2]


def test_images_of_one_pixel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "a.npy", np.arange(12.0).reshape(12, 1, 1))
    options = [word for word in QUICK if word not in ("--arch", "mlp")]
    assert main(["train", "--data", path, "--out", str(tmp_path / "a"), *options]) == 0
    capsys.readouterr()
    assert main(["train", "--data", path, "--out", str(tmp_path / "b"), *options, "--arch", "conv"]) == 2
    assert "--arch conv needs images of more than one pixel: use --arch mlp" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 TiB"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: f"{type(error).__name__}-{str(error)[:4].strip()}",
)
def test_too_little_memory_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def greedy(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(train, "prepare", greedy)
    assert main(["train"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("fusedvae train: error: not enough memory")
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-size", "100000"], "--image-size: expected an integer from 1 to 8192, got '100000'"),
        (["--image-size", "2147483648"], "--image-size: expected an integer from 1 to 8192"),
        (["--workers", "9999"], "--workers: expected an integer from 0 to 1024"),
        (["--workers", "-1"], "--workers: expected an integer from 0 to 1024"),
        (["--image-shape", "28"], "--image-shape: expected H,W or C,H,W, got '28'"),
        (["--image-shape", "0,28"], "--image-shape: expected H,W or C,H,W, got '0,28'"),
        (["--image-shape", "8,8"], "--image-shape is for arrays, but the data is digits"),
        (["--channels", "last"], "--channels is for arrays, but the data is digits"),
        (["--test-data", "absent.npy"], "no such data: absent.npy"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_one_line(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert main(["train", *options]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


# --- labels, and what one of two sources has --------------------------------------------------------------------------


def test_labels_of_an_npz(tmp_path: Path) -> None:
    path = tmp_path / "labelled.npz"
    np.savez(path, x=np.random.default_rng(0).random((6, 4)), labels=np.array([10, 9, 9, 10, 2, 2]))
    found = data.load(str(path))
    assert found.preparation.classes == ("2", "9", "10")
    assert found.labels is not None
    assert found.labels.tolist() == [2, 1, 1, 2, 0, 0]
    np.savez(path, x=np.random.default_rng(0).random((6, 4)), labels=np.arange(5))
    with pytest.raises(CommandError, match="labels: expected 6 integers or names, one a sample, got int64"):
        data.load(str(path))


def test_the_array_of_test_data_alone(tmp_path: Path) -> None:
    table = np.random.default_rng(0).random((40, 5)).astype("f4")
    np.save(tmp_path / "a.npy", table)
    np.savez(tmp_path / "t.npz", x=table[:7], z=table)
    given = {"data": str(tmp_path / "a.npy"), "array": "x"}
    assert len(data.prepare(Settings(**given, test_data=str(tmp_path / "t.npz"))).test) == 7
    with pytest.raises(CommandError, match=r"--array names an array in an \.npz file, but the data is"):
        data.prepare(Settings(**given))


def test_data_that_have_moved_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pictures, "draw", lambda *_: None)
    path, out = tmp_path / "a.npy", tmp_path / "run"
    np.save(path, np.random.default_rng(0).random((40, 5)).astype("f4"))
    assert main(["train", "--data", str(path), "--test-data", str(path), "--out", str(out), *QUICK]) == 0
    moved = path.rename(tmp_path / "b.npy")
    resume = ["train", "--resume", str(out), "--quiet"]
    for options, message in (
        ([], "if they have moved, say where: --data SOURCE"),
        (["--data", str(moved)], "if they have moved, say where: --test-data SOURCE"),
        (["--data", str(moved), "--test-data", "digits"], ""),
    ):
        capsys.readouterr()
        assert main([*resume, *options]) == 2
        assert message in capsys.readouterr().err
    assert main([*resume, "--data", str(moved), "--test-data", str(moved)]) == 0
    np.save(path, np.random.default_rng(1).random((40, 5)).astype("f4"))
    capsys.readouterr()
    assert main([*resume, "--data", str(moved), "--test-data", str(path)]) == 2
    assert f"{moved} with --test-data {path} is not the data" in capsys.readouterr().err
