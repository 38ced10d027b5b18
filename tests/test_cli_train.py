"""``fusedvae train``: what it learns, writes, refuses, and how it goes on after an interruption."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import weakref
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fusedvae
from fusedvae.cli import checkpoint, data, errors, main, pictures, timing, train
from fusedvae.cli.errors import CommandError
from fusedvae.cli.settings import Settings
from fusedvae.cli.trainer import Trainer

TINY = ["--arch", "mlp", "--width", "8", "--latent", "2", "--batch", "8", "--threads", "1", "--quiet"]
SOURCE = Path(fusedvae.__file__).parent.parent


@pytest.fixture(autouse=True)
def quick(few_objects: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Time a step once; leave the process's thread count as it was."""
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    monkeypatch.setattr(timing, "ROUNDS", (1, 1))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "draw", lambda trainer, directory: None)


@pytest.fixture
def array(tmp_path: Path) -> Path:
    """40 tiny images of two kinds in a file."""
    generator = np.random.default_rng(0)
    kind = generator.integers(0, 2, (40, 1, 1))
    images = np.where(kind, np.eye(4), np.eye(4)[::-1]) * 0.8 + 0.1 * generator.random((40, 4, 4))
    path = tmp_path / "images.npy"
    np.save(path, images)
    return path


def rows(directory: Path) -> list[dict[str, float]]:
    with open(directory / "metrics.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def one_line_error(capsys: pytest.CaptureFixture[str], command: str = "train") -> str:
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith(f"fusedvae {command}: error: ")
    return captured.err


# --- a run ------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_model_metrics_and_pictures(
    array: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = [word for word in TINY if word != "--quiet"]
    assert main(["train", "--data", str(array), "--out", str(out), "--epochs", "3", *arguments]) == 0
    assert sorted(contents(out)) == sorted(train.RUN_FILES)
    printed = capsys.readouterr().out
    assert "36 samples of 1x4x4 to train on, 4 held out" in printed
    assert len(re.findall(r"^epoch \d/3  train .* \(NLL .*, KL .*\)  held-out", printed, re.M)) == 3
    assert re.search(r"held-out samples after epoch 3: loss -?[\d.]+, NLL -?[\d.]+, KL [\d.]+ nats", printed)
    table = rows(out)
    assert [row["epoch"] for row in table] == [1, 2, 3]
    for row in table:
        assert math.isclose(row["train_loss"], row["train_nll"] + row["train_kl"], rel_tol=1e-5, abs_tol=1e-4)
        assert math.isclose(row["heldout_loss"], row["heldout_nll"] + row["heldout_kl"], rel_tol=1e-5, abs_tol=1e-4)
    assert table[-1]["heldout_loss"] < table[0]["heldout_loss"]
    model = fusedvae.VAE.from_pretrained(out)
    assert not model.training
    assert model.generate(3).shape == (3, 1, 4, 4)


def test_the_end_compares_a_step_with_the_reference(
    array: Path, tmp_path: Path, no_pictures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--data", str(array), "--out", str(tmp_path / "a"), "--epochs", "1", *TINY]) == 0
    printed = capsys.readouterr().out
    if fusedvae.backend.resolve("cpu") != "reference":
        comparison = r"[\d.e+-]+ ms fused, [\d.e+-]+ ms reference \([\d.]+x\)"
        assert "medians of interleaved runs, with the fused kernels and with the reference" in printed
        assert re.search(rf"a training step of 8 samples: {comparison}", printed)
        assert re.search(rf"sampling, KL and NLL, forward and backward: {comparison}", printed)
        last = printed.splitlines()[-1]
        saves = (
            r"the loss is [\d.]+ times as fast as in eager PyTorch, which saves [\d.]+ [mµ]s of every step; there it"
        )
        none = r"none at this size: the fused loss takes [\d.]+ times as long as in eager PyTorch"
        assert re.match(
            rf"gain: ({saves} was \d+ % of a step, and the other \d+ %, networks and optimizer|{none})", last
        )
    command = ["train", "--data", str(array), "--out", str(tmp_path / "b"), "--epochs", "1", *TINY]
    assert main([*command, "--backend", "reference"]) == 0
    assert "no fused kernels are in use" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "getloadavg"), reason="no load average")
def test_timings_of_a_busy_machine_say_so(
    array: Path, tmp_path: Path, no_pictures: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if fusedvae.backend.resolve("cpu") == "reference":
        pytest.skip("nothing to time")
    for name, waiting, said in (("quiet", 0.5, False), ("busy", 1.5, True)):
        load = (os.cpu_count() or 1) + waiting
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert main(["train", "--data", str(array), "--out", str(tmp_path / name), "--epochs", "1", *TINY]) == 0
        assert ("busy with other work" in capsys.readouterr().out) == said


@pytest.mark.parametrize("recon_logvar", ["per-pixel", "learned", -2.0], ids=str)
def test_timing_leaves_the_model_as_it_is(array: Path, recon_logvar: str | float) -> None:
    run = Trainer(
        Settings(arch="mlp", width=8, latent=2, recon_logvar=recon_logvar, device="cpu"),
        data.split(data.load(str(array)), 0.1),
    )
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    times = timing.step_times(run.model, run.train_samples.batch(slice(8)), run.settings)
    assert (times is None) == (fusedvae.backend.resolve("cpu") == "reference")
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_timing_takes_no_more_memory_than_a_step(array: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if fusedvae.backend.resolve("cpu") == "reference":
        pytest.skip("nothing to time")

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    saved: list[weakref.ref] = []

    def pack(tensor: torch.Tensor) -> Saved:
        kept = Saved(tensor)
        saved.append(weakref.ref(kept))
        return kept

    left = []

    def compare(*args: object) -> timing.Comparison:
        left.append(sum(kept() is not None for kept in saved))
        return timing.Comparison(1.0, 1.0)

    monkeypatch.setattr(timing, "_compare", compare)
    settings = Settings(arch="mlp", width=8, latent=2, device="cpu")
    run = Trainer(settings, data.split(data.load(str(array)), 0.1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        timing.step_times(run.model, run.train_samples.batch(slice(8)), settings)
    assert saved
    assert left == [0, 0]  # nothing of the pass that found the shapes


def test_what_is_timed_is_what_is_computed_at_a_time(array: Path) -> None:
    samples = data.split(data.load(str(array)), 0.1)
    for batch, parts, expected in ((7, 1, 7), (7, 3, 3), (10**6, 1, len(samples.train))):
        settings = Settings(arch="mlp", width=8, latent=2, batch=batch, grad_accum=parts, device="cpu")
        x, labels = Trainer(settings, samples).first_part()
        assert (len(x), labels) == (expected, None)
        assert torch.equal(x, samples.train.batch(slice(expected)))


def test_the_metrics_are_means_over_samples_of_the_bound(array: Path) -> None:
    # With a learning rate of nearly nothing, training and evaluating differ in their noise only.
    settings = Settings(arch="mlp", width=8, latent=2, batch=7, lr=1e-12, epochs=1, device="cpu")
    run = Trainer(settings, data.split(data.load(str(array)), 0.1))
    x = run.train_samples.batch(slice(None))
    with torch.no_grad():
        expected = torch.stack([torch.stack(run.model.loss(x, full=True, return_terms=True)) for _ in range(300)]).mean(
            0
        )
    evaluated = torch.stack([run.evaluate(run.train_samples) for _ in range(2)])
    assert torch.equal(evaluated[0], evaluated[1])
    torch.testing.assert_close(evaluated[0].float(), expected, rtol=0.05, atol=0.5)


def test_digits_train(tmp_path: Path, no_pictures: None) -> None:
    command = ["train", "--out", str(tmp_path / "run"), "--arch", "mlp", "--epochs", "3", "--threads", "1", "--quiet"]
    assert main(command) == 0
    assert rows(tmp_path / "run")[-1]["heldout_loss"] < 5  # a model of independent pixels has 14


def test_backends_train_alike_compared_with_seeds(tmp_path: Path, no_pictures: None) -> None:
    def heldout_losses(seed: str, backend: str) -> np.ndarray:
        out = tmp_path / f"{backend}-{seed}"
        options = [*TINY, "--width", "32", "--batch", "64", "--epochs", "2", "--seed", seed, "--backend", backend]
        assert main(["train", "--out", str(out), *options]) == 0
        return np.array([row["heldout_loss"] for row in rows(out)])

    first = {name: heldout_losses("0", name) for name, info in fusedvae.backends().items() if "cpu" in info.devices}
    between_seeds = np.abs(first["reference"] - heldout_losses("1", "reference"))
    for losses in first.values():
        assert (np.abs(losses - first["reference"]) < 0.01 * between_seeds).all()


def test_pictures_are_pictures(array: Path, tmp_path: Path) -> None:
    for options in (["--latent", "1"], ["--latent", "2"], ["--latent", "12", "--recon-logvar", "learned"]):
        out = tmp_path / options[1]
        assert main(["train", "--data", str(array), "--out", str(out), "--epochs", "1", *TINY, *options]) == 0
        for name in pictures.PICTURES:
            with Image.open(out / name) as image:
                assert image.format == "PNG"
                assert image.width > 500
                assert len(image.convert("L").getcolors(256)) > 3, f"{name} is blank"


@pytest.mark.parametrize("latent", ["1", "2", "8"])
def test_pictures_of_hardly_any_samples(tmp_path: Path, latent: str) -> None:
    np.save(tmp_path / "a.npy", np.eye(2))
    out = tmp_path / "run"
    command = ["train", "--data", str(tmp_path / "a.npy"), "--out", str(out), "--epochs", "1", *TINY]
    assert main([*command, "--heldout", "0.5", "--latent", latent]) == 0
    assert sorted(contents(out)) == sorted(train.RUN_FILES)


def test_vectors_are_strips_however_long_they_are() -> None:
    short = torch.arange(12.0).view(2, 6)
    assert torch.equal(pictures._as_images(short), short[:, None, None].expand(2, 1, 2, 6))
    long = torch.arange(2 * 24000.0).view(2, 24000)
    images = pictures._as_images(long)
    assert images.shape == (2, 1, 40, 120)
    assert torch.equal(images[:, 0, 7], long.view(2, 120, 200).mean(2))


def test_tiles_are_laid_out_in_rows() -> None:
    images = torch.arange(6).view(6, 1, 1, 1).expand(6, 1, 2, 3) / 10
    grid = pictures._tiles(images, columns=4)
    assert grid.shape == (2 * 4, 4 * 5, 3)
    assert grid[1, 1].tolist() == pytest.approx([0.0] * 3)
    assert grid[2, 18].tolist() == pytest.approx([0.3] * 3)
    assert grid[5, 8].tolist() == pytest.approx([0.5] * 3)
    assert (grid[4:, 10:] == pictures._GAP_SHADE).all()
    assert pictures._centres(4, grid.shape[1]) == [2, 7, 12, 17]


# --- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--arch", "conv", "--width", "2"],
        ["--arch", "mlp", "--width", "1"],
        ["--recon-logvar", "learned"],
        ["--recon-logvar", "-2.5"],
        ["--recon-logvar=-1e-1"],
        ["--logvar-floor", "-6"],
        ["--beta", "4"],
        ["--beta", "0"],
        ["--warmup", "1.5"],
        ["--batch", "1000"],
        ["--lr", "0.01"],
        ["--seed", "4294967295"],
        ["--dtype", "float64"],
        ["--dtype", "bfloat16"],
        ["--device", "cpu"],
        ["--threads", "2"],
        ["--backend", "reference"],
        ["--heldout", "0.5"],
        ["--likelihood", "laplace"],
        ["--likelihood", "bernoulli"],
        ["--likelihood", "mse"],
        ["--likelihood", "l1"],
        ["--recon-scale", "softplus"],
        ["--recon-eps", "0.01"],
        ["--scale", "logstd"],
        ["--eps", "0.01"],
        ["--samples", "3"],
        ["--grad-accum", "3"],
        ["--clip-grad", "0.5"],
        ["--lr-schedule", "cosine"],
        ["--lr-schedule", "linear"],
        ["--lr-warmup", "0.5"],
        ["--ema", "0.9"],
        ["--dtype", "float16"],
    ],
    ids=" ".join,
)
def test_options(array: Path, tmp_path: Path, no_pictures: None, options: list[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", "--data", str(array), "--out", str(out), "--epochs", "2", *TINY, *options]) == 0
    table = rows(out)
    assert len(table) == 2
    assert all(math.isfinite(value) for row in table for value in row.values())
    settings = Settings(**checkpoint.load(out)["settings"])
    name, value = re.split("[ =]", " ".join(options), maxsplit=2)[:2]
    assert str(getattr(settings, name[2:].replace("-", "_"))) == str(value) or float(value) == float(
        getattr(settings, name[2:].replace("-", "_"))
    )


def test_dtypes_mean_what_they_say(array: Path) -> None:
    samples = data.split(data.load(str(array)), 0.1)
    for dtype, parameters, hidden in (
        ("float32", torch.float32, torch.float32),
        ("float64", torch.float64, torch.float64),
        ("bfloat16", torch.float32, torch.bfloat16),
    ):
        run = Trainer(Settings(arch="mlp", width=8, latent=2, dtype=dtype, device="cpu"), samples)
        seen = []
        run.model.encoder.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output.dtype))
        run.evaluate(run.heldout_samples)
        assert {parameter.dtype for parameter in run.model.parameters()} == {parameters}
        assert set(seen) == {hidden}


def test_beta_warms_up_in_steps() -> None:
    settings = Settings(beta=2.0, warmup=1.5)
    assert [settings.beta_at(step, 4) for step in range(8)] == pytest.approx(
        [2 / 6, 4 / 6, 6 / 6, 8 / 6, 10 / 6, 2.0, 2.0, 2.0]
    )
    assert Settings(beta=2.0).beta_at(0, 4) == 2.0
    assert Settings(beta=2.0, warmup=1e308).beta_at(0, 4) == 0.0
    assert Settings(beta=2.0, warmup=1e-308).beta_at(0, 4) == 2.0


def test_warm_up_shows_in_the_metrics(array: Path, tmp_path: Path, no_pictures: None) -> None:
    out = tmp_path / "run"
    command = ["train", "--data", str(array), "--out", str(out), "--epochs", "3", *TINY]
    assert main([*command, "--warmup", "2", "--beta", "0.5"]) == 0
    assert [row["beta"] for row in rows(out)] == [0.25, 0.5, 0.5]
    # Held-out losses are comparable: all with the final beta.
    for row in rows(out):
        assert math.isclose(row["heldout_loss"], row["heldout_nll"] + 0.5 * row["heldout_kl"], rel_tol=1e-5)


def test_seeds_differ_and_repeat(array: Path, tmp_path: Path, no_pictures: None) -> None:
    tables = []
    for out, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        command = ["train", "--data", str(array), "--out", str(tmp_path / out), "--epochs", "1", *TINY]
        assert main([*command, "--seed", seed]) == 0
        tables.append((tmp_path / out / "metrics.csv").read_bytes())
    assert tables[0] == tables[1] != tables[2]


def test_runs_without_a_directory_get_new_ones(
    array: Path, tmp_path: Path, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["train", "--data", str(array), "--epochs", "1", *TINY]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["images-001", "images-002"]


# --- going on ---------------------------------------------------------------------------------------------------


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send the process a SIGINT during the training step of that number."""
    original, count = Trainer._train_step, 0

    def counted(self: Trainer, x: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == step:
            signal.raise_signal(signal.SIGINT)
        return original(self, x)

    monkeypatch.setattr(Trainer, "_train_step", counted)


@pytest.mark.parametrize("step", [1, 4, 5, 6, 12, 15])  # 5 steps make an epoch
@pytest.mark.parametrize("options", [[], ["--arch", "conv", "--dtype", "bfloat16", "--warmup", "2"]], ids=str)
def test_an_interrupted_run_goes_on_bit_for_bit(
    array: Path,
    tmp_path: Path,
    no_pictures: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: int,
    options: list[str],
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = ["train", "--data", str(array), "--epochs", "3", *TINY, *options]
    assert main([*command, "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, step)
        assert main([*command, "--out", str(broken)]) == 130
    assert f"fusedvae train --resume {broken}" in capsys.readouterr().out
    state = checkpoint.load(broken)
    assert state["epoch"] * 5 + state["step"] == step
    torch.manual_seed(12345)  # whatever happens in between
    assert main(["train", "--resume", str(broken), "--quiet"]) == 0
    assert (broken / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    one, other = checkpoint.load(whole), checkpoint.load(broken)
    assert one.keys() == other.keys()
    for key in one["model"]:
        assert torch.equal(one["model"][key], other["model"][key]), key
    for parameter, moments in one["optimizer"]["state"].items():
        for key, value in moments.items():
            assert torch.equal(value, other["optimizer"]["state"][parameter][key])
    assert torch.equal(one["rng"]["cpu"], other["rng"]["cpu"])
    assert one["history"] == other["history"]


def test_a_finished_run_can_be_made_longer(array: Path, tmp_path: Path, no_pictures: None) -> None:
    command = ["train", "--data", str(array), *TINY]
    assert main([*command, "--epochs", "4", "--out", str(tmp_path / "whole")]) == 0
    assert main([*command, "--epochs", "2", "--out", str(tmp_path / "parts")]) == 0
    assert main(["train", "--resume", str(tmp_path / "parts"), "--epochs", "4", "--quiet"]) == 0
    first, second = (tmp_path / name / "metrics.csv" for name in ("whole", "parts"))
    assert first.read_bytes() == second.read_bytes()


def test_going_on_needs_neither_the_old_place_of_the_data_nor_its_own(
    array: Path, tmp_path: Path, no_pictures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out, moved = tmp_path / "run", tmp_path / "run2"
    assert main(["train", "--data", str(array), "--out", str(out), "--epochs", "1", *TINY]) == 0
    out.rename(moved)
    other = array.rename(tmp_path / "elsewhere.npy")
    assert main(["train", "--resume", str(moved), "--epochs", "2", "--quiet"]) == 2
    assert "no such data" in one_line_error(capsys)
    assert main(["train", "--resume", str(moved), "--epochs", "2", "--data", str(other), "--quiet"]) == 0
    assert len(rows(moved)) == 2
    np.save(other, np.load(other) * 0.5)
    before = contents(moved)
    assert main(["train", "--resume", str(moved), "--epochs", "3", "--quiet"]) == 2
    assert "is not the data that this run was trained on" in one_line_error(capsys)
    assert contents(moved) == before


def test_going_on_finds_the_data_from_another_folder(
    array: Path, tmp_path: Path, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(array.parent)
    assert main(["train", "--data", array.name, "--out", "run", "--epochs", "1", *TINY]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "--resume", str(tmp_path / "run"), "--epochs", "2", "--quiet"]) == 0


@pytest.mark.parametrize("classes", [["a", "b", "c"], [0, 1, 2]], ids=str)
def test_going_on_needs_the_labels_that_were_there(
    tmp_path: Path, no_pictures: None, capsys: pytest.CaptureFixture[str], classes: list
) -> None:
    out, path = tmp_path / "run", tmp_path / "digits.npz"
    x, y = np.random.default_rng(0).random((30, 6), dtype=np.float32), np.repeat(classes, 10)
    np.savez(path, x=x, labels=y)
    options = ["--condition", "labels", "--epochs", "1", *TINY]
    assert main(["train", "--data", str(path), "--out", str(out), *options]) == 0
    other_names = np.where(y == classes[0], "d" if isinstance(classes[0], str) else 7, y)
    for changed in (y[::-1], other_names):
        np.savez(path, x=x, labels=changed)
        assert main(["train", "--resume", str(out), "--epochs", "2", "--quiet"]) == 2
        assert re.search("not the data that this run was trained on|has other labels now", one_line_error(capsys))
    np.savez(path, x=x, labels=y)
    assert main(["train", "--resume", str(out), "--epochs", "2", "--quiet"]) == 0


def test_a_checkpoint_is_written_while_training(
    array: Path, tmp_path: Path, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(step=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    saved = []
    original = checkpoint.save
    monkeypatch.setattr(
        checkpoint,
        "save",
        lambda directory, state: (saved.append((state["epoch"], state["step"])), original(directory, state)),
    )
    assert main(["train", "--data", str(array), "--out", str(tmp_path / "a"), "--epochs", "1", *TINY]) == 0
    assert saved[0] == (0, 0)
    assert saved[-1] == (1, 0)
    assert len(saved) > 2


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_in_a_real_process(array: Path, tmp_path: Path, no_pictures: None) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = ["--data", str(array), *TINY]
    process = subprocess.Popen(
        [sys.executable, "-m", "fusedvae", "train", *options, "--out", str(broken), "--epochs", "1000000"],
        cwd=SOURCE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for _ in range(600):
            if (broken / "metrics.csv").exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "to go on: fusedvae train --resume" in out
    assert "Traceback" not in err
    state = checkpoint.load(broken)
    epochs = str(state["epoch"] + 2)
    assert state["step"] > 0 or state["epoch"] > 0
    assert not list(broken.glob("*.unfinished"))
    assert main(["train", "--resume", str(broken), "--epochs", epochs, "--quiet"]) == 0
    assert main(["train", *options, "--out", str(whole), "--epochs", epochs]) == 0
    assert (broken / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


def test_a_second_ctrl_c_stops_at_once_and_leaves_the_last_checkpoint(
    array: Path, tmp_path: Path, no_pictures: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def impatient(self: Trainer, x: torch.Tensor) -> torch.Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("unreachable")

    monkeypatch.setattr(Trainer, "_train_step", impatient)
    assert main(["train", "--data", str(array), "--out", str(out), "--epochs", "1", *TINY]) == 130
    assert capsys.readouterr().err == "fusedvae train: interrupted\n"
    assert checkpoint.load(out)["step"] == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_ctrl_c_after_the_last_epoch_leaves_the_pictures_too(
    array: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, drawn = tmp_path / "a run", []
    monkeypatch.setattr(pictures, "draw", lambda trainer, directory: drawn.append(directory))

    def interrupted(self: Trainer, samples: data.Samples, evaluate: object = Trainer.evaluate) -> torch.Tensor:
        signal.raise_signal(signal.SIGINT)
        return evaluate(self, samples)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", interrupted)
        assert main(["train", "--data", str(array), "--out", str(out), "--epochs", "1", *TINY]) == 130
    expected = f"interrupted after the last epoch; to go on: fusedvae train --resume '{out}'\n"
    assert capsys.readouterr().out.endswith(expected)
    assert (len(rows(out)), drawn) == (1, [out])
    assert main(["train", "--resume", str(out), "--quiet"]) == 0
    assert (len(rows(out)), drawn) == (1, [out, out])


def test_a_run_that_is_interrupted_before_its_first_epoch_ends_has_pictures_and_a_model(
    array: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(monkeypatch, 2)
    assert main(["train", "--data", str(array), "--out", str(tmp_path / "a"), "--epochs", "3", *TINY]) == 130
    assert sorted(contents(tmp_path / "a")) == sorted({*train.RUN_FILES} - {"evaluation.csv"})


def test_ctrl_c_during_the_last_checkpoint_is_not_lost(
    array: Path, tmp_path: Path, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, save = tmp_path / "run", Trainer.save

    def interrupted(self: Trainer, directory: Path) -> None:
        save(self, directory)
        if self.epoch == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "save", interrupted)
    assert main(["train", "--data", str(array), "--out", str(out), "--epochs", "1", *TINY]) == 130
    assert checkpoint.load(out)["epoch"] == 1


def test_sigterm_saves_too(array: Path, tmp_path: Path, no_pictures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminated(self: Trainer, x: torch.Tensor, step: object = Trainer._train_step) -> torch.Tensor:
        signal.raise_signal(signal.SIGTERM)
        return step(self, x)

    monkeypatch.setattr(Trainer, "_train_step", terminated)
    assert main(["train", "--data", str(array), "--out", str(tmp_path / "a"), "--epochs", "1", *TINY]) == 143
    assert checkpoint.load(tmp_path / "a")["step"] == 1


# --- files ------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    checkpoint.write_atomically(path, lambda file: file.write(b"old"))

    def fails(file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("No space left on device")

    with pytest.raises(CommandError, match=r"cannot write .*No space left on device"):
        checkpoint.write_atomically(path, fails)
    assert contents(tmp_path) == {"file": b"old"}

    def interrupted(file: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_atomically(path, interrupted)
    assert contents(tmp_path) == {"file": b"old"}
    checkpoint.write_atomically(path, lambda file: file.write(b"new"))
    assert contents(tmp_path) == {"file": b"new"}


@pytest.mark.parametrize("count", [1000, 100_000])
def test_what_the_system_refused_is_said_and_not_what_torch_makes_of_it(tmp_path: Path, count: int) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(CommandError, match=r"cannot write .*checkpoint\.pt: \[Errno 27\] File too large"):
            checkpoint.save(tmp_path, {"value": torch.zeros(count)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == {}


def test_a_process_killed_while_writing_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"epoch": 3})
    script = (
        "import os, sys, pathlib\n"
        "from fusedvae.cli import checkpoint\n"
        "def dies(file):\n"
        "    file.write(b'x' * 100000); file.flush(); os.kill(os.getpid(), 9)\n"
        "checkpoint.write_atomically(pathlib.Path(sys.argv[1]) / checkpoint.CHECKPOINT, dies)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=SOURCE)
    assert done.returncode == -signal.SIGKILL
    assert checkpoint.load(tmp_path)["epoch"] == 3
    checkpoint.save(tmp_path, {"epoch": 4})
    assert checkpoint.load(tmp_path)["epoch"] == 4
    assert list(contents(tmp_path)) == [checkpoint.CHECKPOINT]


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path: Path) -> None:
    class Mean:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"format": checkpoint.FORMAT, "model": Mean()}, tmp_path / checkpoint.CHECKPOINT)
    with pytest.raises(CommandError, match="cannot read"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_an_earlier_run_is_replaced_only_when_asked(
    array: Path, tmp_path: Path, no_pictures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["train", "--data", str(array), "--out", str(out), "--epochs", "1", *TINY]
    assert main([*command, "--seed", "1"]) == 0
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    capsys.readouterr()
    assert main([*command, "--seed", "2"]) == 2
    message = one_line_error(capsys)
    assert "holds a run (checkpoint.pt, metrics.csv)" in message
    assert "--overwrite" in message
    assert contents(out) == before
    # Bad input is found before anything is removed.
    assert main([*command, "--overwrite", "--data", str(tmp_path / "absent.npy")]) == 2
    assert main([*command, "--overwrite", "--device", "nonsense"]) == 2
    assert contents(out) == before
    assert main([*command, "--seed", "2", "--overwrite"]) == 0
    after = contents(out)
    assert after["notes.txt"] == b"mine"
    assert after["metrics.csv"] != before["metrics.csv"]


@pytest.mark.parametrize("batch", ["8", "1000"])  # in one step an epoch, only the held-out loss shows it
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    array: Path, tmp_path: Path, no_pictures: None, capsys: pytest.CaptureFixture[str], batch: str
) -> None:
    out = tmp_path / "run"
    options = [*TINY, "--lr", "1e30", "--batch", batch]
    assert main(["train", "--data", str(array), "--out", str(out), *options]) == 2
    assert "the loss is not finite any more in epoch 1: try a lower --lr" in one_line_error(capsys)
    state = checkpoint.load(out)
    assert (state["epoch"], state["step"]) == (0, 0)
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (["--recon-logvar", "-200"], "a lower --lr or a higher --recon-logvar ("),
        (["--recon-logvar", "learned", "--lr", "1e30"], "a lower --lr or a --recon-clamp ("),
        (["--likelihood", "mse", "--lr", "1e30"], "a lower --lr ("),
    ],
    ids=["number", "learned", "none"],
)
def test_remedies_are_those_of_the_runs_own_likelihood(
    array: Path,
    tmp_path: Path,
    no_pictures: None,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    remedy: str,
) -> None:
    assert main(["train", "--data", str(array), "--out", str(tmp_path / "run"), *TINY, *options]) == 2
    assert f"in epoch 1: try {remedy}" in one_line_error(capsys)


def test_parameters_that_are_not_finite_never_replace_a_checkpoint(array: Path, tmp_path: Path) -> None:
    run = Trainer(Settings(arch="mlp", width=8, latent=2, device="cpu"), data.split(data.load(str(array)), 0.1))
    run.save(tmp_path)
    before = contents(tmp_path)
    with torch.no_grad():
        next(run.model.parameters()).fill_(math.nan)
    with pytest.raises(CommandError, match="not finite any more"):
        run.save(tmp_path)
    assert contents(tmp_path) == before


# --- data -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """12 grey images, and a file that is none, in two folders."""
    generator = np.random.default_rng(0)
    for index in range(12):
        path = tmp_path / "pictures" / "ab"[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (6, 8), np.uint8)).save(path)
    (tmp_path / "pictures" / "README.txt").write_text("not an image")
    return tmp_path / "pictures"


def test_a_run_among_its_images_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    options = ["--arch", "mlp", "--width", "8", "--epochs", "1", "--threads", "1", "--quiet"]
    for out in (folder, folder / "run"):
        assert main(["train", "--data", str(folder), "--out", str(out), "--overwrite", *options]) == 2
        assert "the folder of images to learn: choose another --out" in one_line_error(capsys)
    monkeypatch.chdir(folder)
    assert main(["train", "--data", ".", *options]) == 2
    assert "runs/-001 is in ., the folder of images" in one_line_error(capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_on_a_folder(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--arch", "conv", "--width", "2", "--latent", "2", "--threads", "1", "--quiet", "--epochs", "1"]
    assert main(["train", "--data", str(folder), "--out", str(out), "--image-size", "8", *options]) == 0
    assert fusedvae.VAE.from_pretrained(out).generate(2).shape == (2, 1, 8, 8)


def test_a_run_on_vectors(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(50, 33)))
    out = tmp_path / "run"
    options = ["--latent", "2", "--threads", "1", "--quiet", "--epochs", "1", "--width", "8"]
    assert main(["train", "--data", str(tmp_path / "a.npy"), "--out", str(out), *options]) == 0
    assert fusedvae.VAE.from_pretrained(out).generate(2).shape == (2, 33)
    assert sorted(contents(out)) == sorted(train.RUN_FILES)


# --- bad input --------------------------------------------------------------------------------------------------


def save(name: str, values: np.ndarray) -> object:
    return lambda folder: np.save(folder / name, values)


def with_nan() -> np.ndarray:
    values = np.zeros((5, 4, 4))
    values[3, 1, 2] = np.nan
    values[4, 0, 0] = np.inf
    return values


BAD_INPUT = {
    "missing file": (None, ["--data", "absent.npy"], "no such data: absent.npy"),
    "missing folder": (None, ["--data", "absent/"], "no such data: absent/"),
    "not a data file": (
        lambda folder: (folder / "a.txt").write_text("1 2 3"),
        ["--data", "a.txt"],
        "a.txt: expected 'digits', an .npy, .npz or .h5ad file, a folder of images, or .tar files of these",
    ),
    "not an array": (
        lambda folder: (folder / "a.npy").write_text("1 2 3"),
        ["--data", "a.npy"],
        "cannot read a.npy",
    ),
    "empty file": (lambda folder: (folder / "a.npy").touch(), ["--data", "a.npy"], "cannot read a.npy"),
    "broken npz": (
        lambda folder: (folder / "a.npz").write_bytes(b"PK\x03\x04rubbish"),
        ["--data", "a.npz"],
        "cannot read a.npz",
    ),
    "truncated array": (
        lambda folder: (
            np.save(folder / "a.npy", np.zeros((9, 9))),
            os.truncate(folder / "a.npy", 200),
        ),
        ["--data", "a.npy"],
        "cannot read a.npy",
    ),
    "damaged npz": (
        lambda folder: (
            np.savez_compressed(folder / "a.npz", x=np.arange(99.0)),
            (folder / "a.npz").write_bytes((folder / "a.npz").read_bytes()[:80] + b"\xff" * 9),
        ),
        ["--data", "a.npz"],
        "cannot read a.npz",
    ),
    "npz of other files": (
        lambda folder: (
            np.savez(folder / "a.npz"),
            zipfile.ZipFile(folder / "a.npz", "w").writestr("notes.txt", "no array"),
        ),
        ["--data", "a.npz"],
        "a.npz holds no arrays",
    ),
    "damaged header": (
        lambda folder: (
            np.save(folder / "a.npy", np.zeros((9, 9))),
            (folder / "a.npy").write_bytes((folder / "a.npy").read_bytes().replace(b"(9, 9)", b"(9, 9 ")),
        ),
        ["--data", "a.npy"],
        "cannot read a.npy",
    ),
    "more than fits in memory": (
        lambda folder: (
            np.save(folder / "a.npy", np.zeros((9, 9))),
            (folder / "a.npy").write_bytes(
                (folder / "a.npy").read_bytes().replace(b"(9, 9), }       ", b"(9, 9999999999999), }".ljust(15))
            ),
        ),
        ["--data", "a.npy"],
        "cannot read a.npy",
    ),
    "too far apart": (
        save("a.npy", np.array([[-1.7e308, 1.7e308], [1.7e308, -1.7e308]] * 4)),
        ["--data", "a.npy"],
        "values from -1.7e+308 to 1.7e+308 are too far apart",
    ),
    "no name": (None, ["--data", ""], "no such data: ''"),
    "a name too long": (None, ["--data", "x" * 300], "cannot read xxx"),
    "objects": (
        save("a.npy", np.array([{}, {}], dtype=object)),
        ["--data", "a.npy"],
        "cannot read a.npy: Array can't be memory-mapped: Python objects",
    ),
    "text file": (lambda folder: (folder / "a.npy").write_text("x"), ["--data", "a.npy"], "a.npy: it is no .npy file"),
    "text": (save("a.npy", np.array([["a"], ["b"]])), ["--data", "a.npy"], "expected an array of numbers"),
    "complex": (save("a.npy", np.zeros((4, 4), complex)), ["--data", "a.npy"], "numbers, got dtype complex128"),
    "too few dimensions": (save("a.npy", np.zeros(5)), ["--data", "a.npy"], "got (5,)"),
    "too many dimensions": (save("a.npy", np.zeros((2, 1, 1, 2, 2))), ["--data", "a.npy"], "got (2, 1, 1, 2, 2)"),
    "no samples": (save("a.npy", np.zeros((0, 4))), ["--data", "a.npy"], "at least two samples"),
    "no values": (save("a.npy", np.zeros((4, 0))), ["--data", "a.npy"], "at least one value, got shape (4, 0)"),
    "NaN": (
        save("a.npy", with_nan()),
        ["--data", "a.npy"],
        "a.npy: 2 values are NaN or infinite, the first at index (3, 1, 2)",
    ),
    "constant": (save("a.npy", np.full((4, 4), 7)), ["--data", "a.npy"], "every value is 7"),
    "conv on vectors": (save("a.npy", np.eye(20)), ["--data", "a.npy", "--arch", "conv"], "use --arch mlp"),
    "empty folder": (lambda folder: (folder / "d").mkdir(), ["--data", "d"], "at least two images"),
    "broken image": (
        lambda folder: (
            (folder / "d").mkdir(),
            Image.new("L", (4, 4)).save(folder / "d" / "0.png"),
            (folder / "d" / "1.png").write_bytes(b"rubbish"),
        ),
        ["--data", "d"],
        "cannot read the image d/1.png",
    ),
    "images of several sizes": (
        lambda folder: (
            (folder / "d").mkdir(),
            Image.new("L", (4, 4)).save(folder / "d" / "0.png"),
            Image.new("L", (4, 5)).save(folder / "d" / "1.png"),
        ),
        ["--data", "d"],
        "d/0.png is 4x4, d/1.png is 4x5: choose one with --image-size",
    ),
    "array of digits": (None, ["--array", "x"], "--array names an array in an .npz file, but the data is digits"),
    "size of digits": (None, ["--image-size", "8"], "--image-size is for a folder of images"),
    "nothing held out": (None, ["--heldout", "0.0001"], "--heldout 0.0001 of 1797 samples leaves 0 held out"),
    "all held out": (None, ["--heldout", "1"], "--heldout: expected a number above 0 and below 1, got '1'"),
    "architecture": (None, ["--arch", "transformer"], "argument --arch: invalid choice: 'transformer'"),
    "latent": (None, ["--latent", "0"], "argument --latent: expected an integer from 1 to 16777216, got '0'"),
    "latent text": (
        None,
        ["--latent", "many"],
        "argument --latent: expected an integer from 1 to 16777216, got 'many'",
    ),
    "width": (None, ["--width", "-3"], "argument --width: expected an integer from 1 to 16777216, got '-3'"),
    "recon_logvar": (None, ["--recon-logvar", "x"], "expected 'per-pixel', 'learned' or a number, got 'x'"),
    "recon_logvar nan": (None, ["--recon-logvar", "nan"], "expected 'per-pixel', 'learned' or a number, got 'nan'"),
    "floor": (None, ["--logvar-floor", "inf"], "argument --logvar-floor: expected a number, got 'inf'"),
    "beta": (None, ["--beta", "-1"], "argument --beta: expected a number of at least 0, got '-1'"),
    "warmup": (None, ["--warmup", "soon"], "argument --warmup: expected a number of at least 0, got 'soon'"),
    "epochs": (None, ["--epochs", "1.5"], "argument --epochs: expected an integer of at least 1, got '1.5'"),
    "batch": (None, ["--batch", "0"], "argument --batch: expected an integer of at least 1, got '0'"),
    "learning rate": (None, ["--lr", "0"], "argument --lr: expected a number above 0, got '0'"),
    "seed": (None, ["--seed", "-1"], "--seed: expected an integer from 0 to 4294967295, got '-1'"),
    "dtype": (None, ["--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
    "device": (None, ["--device", "tpu9"], "--device tpu9 cannot be used"),
    "device without values": (None, ["--device", "meta"], "--device meta cannot be used"),
    "threads": (None, ["--threads", "0"], "argument --threads: expected an integer from 1 to 1024, got '0'"),
    "backend": (None, ["--backend", "magic"], "argument --backend: invalid choice: 'magic'"),
    "unknown option": (None, ["--learning-rate", "1"], "unrecognized arguments: --learning-rate 1"),
    "abbreviated option": (None, ["--epoch", "1"], "unrecognized arguments: --epoch 1"),
    "nothing to replace": (None, ["--overwrite", "--epochs", "1", *TINY], "--overwrite needs --out"),
    "out is a file": (
        lambda folder: (folder / "f").touch(),
        ["--out", "f", "--epochs", "1", *TINY],
        "cannot use f",
    ),
    "out without a name": (None, ["--out", ""], "argument --out: expected the name of a directory, got ''"),
    "out in a place that takes none": (None, ["--out", "/proc/x", *TINY], "cannot use /proc/x"),
    "a model too large": (
        None,
        ["--arch", "mlp", "--width", "16777216"],
        "cannot make a model of --latent 8 and --width 16777216: ",
    ),
    "a model beyond all sizes": (None, ["--latent", "1" + "0" * 30], "--latent: expected an integer from 1 to"),
    "more threads than can be": (None, ["--threads", "100000"], "--threads: expected an integer from 1 to 1024"),
    "a device of another kind": (None, ["--device", "mps"], "--device mps cannot be used: expected auto, cpu, cuda"),
    "nothing to resume": (None, ["--resume", "absent"], "absent holds no run to continue: there is no checkpoint.pt"),
    "broken checkpoint": (
        lambda folder: ((folder / "r").mkdir(), (folder / "r" / "checkpoint.pt").write_bytes(b"rubbish")),
        ["--resume", "r"],
        "cannot read r/checkpoint.pt",
    ),
    "empty checkpoint": (
        lambda folder: ((folder / "r").mkdir(), (folder / "r" / "checkpoint.pt").touch()),
        ["--resume", "r"],
        "cannot read r/checkpoint.pt: it is damaged",
    ),
    "pickle instead of a checkpoint": (
        lambda folder: ((folder / "r").mkdir(), (folder / "r" / "checkpoint.pt").write_bytes(pickle.dumps(min))),
        ["--resume", "r"],
        "cannot read r/checkpoint.pt: it is damaged",
    ),
    "module instead of a checkpoint": (
        lambda folder: ((folder / "r").mkdir(), torch.save(torch.nn.ReLU(), folder / "r" / "checkpoint.pt")),
        ["--resume", "r"],
        "cannot read r/checkpoint.pt: it is damaged",
    ),
    "another checkpoint": (
        lambda folder: ((folder / "r").mkdir(), torch.save({"epoch": 1}, folder / "r" / "checkpoint.pt")),
        ["--resume", "r"],
        "r/checkpoint.pt is not a checkpoint: this version of fusedvae continues those of format 3",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    prepare, arguments, message = BAD_INPUT[case]
    monkeypatch.chdir(tmp_path)
    if prepare is not None:
        prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", *arguments]) == 2
    assert message in one_line_error(capsys)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--device", "cuda"]) == 2
    assert "--device cuda cannot be used" in one_line_error(capsys)


def test_an_unavailable_backend_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuses(device_type: str, name: str | None) -> None:
        raise RuntimeError(f"backend {name!r} is unavailable: no chip of that kind")

    monkeypatch.setattr(train, "resolve", refuses)
    assert main(["train", "--backend", "triton"]) == 2
    assert "--backend triton: backend 'triton' is unavailable: no chip of that kind" in one_line_error(capsys)


def test_the_environments_backend_is_that_of_a_run_with_none_of_its_own(
    array: Path, tmp_path: Path, no_pictures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--data", str(array), "--epochs", "1", *TINY]
    with fusedvae.use_backend("reference"):  # what FUSEDVAE_BACKEND=reference does when the package is imported
        assert main([*command, "--out", str(tmp_path / "a")]) == 0
    assert "reference backend" in capsys.readouterr().out
    for name in fusedvae.backends():
        with fusedvae.use_backend("reference"):
            assert main([*command, "--out", str(tmp_path / name), "--backend", name]) == 0
        assert f"{name} backend" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("train", 2, "fusedvae train: error: --backend auto: FUSEDVAE_BACKEND: expected one of 'auto', 'native', "),
        ("info", 0, "uses nothing: FUSEDVAE_BACKEND: expected one of 'auto', 'native', 'triton', 'reference'; got 'x'"),
    ],
)
def test_a_wrong_backend_in_the_environment_is_said_by_commands(command: str, status: int, message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fusedvae", command],
        cwd=SOURCE,
        env={**os.environ, "FUSEDVAE_BACKEND": "x"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status
    assert message in done.stdout + done.stderr
    assert done.stderr.count("\n") == (status == 2)


@pytest.mark.skipif("native" not in fusedvae.backends(), reason="no extension")
def test_a_wrong_instruction_set_in_the_environment_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fusedvae", "train", "--out", str(tmp_path / "run")],
        cwd=SOURCE,
        env={**os.environ, "FUSEDVAE_CPU_ISA": "x"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fusedvae train: error: --backend auto: FUSEDVAE_CPU_ISA: expected one of ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_backend_of_a_run_ends_with_it(array: Path, tmp_path: Path, no_pictures: None) -> None:
    before = fusedvae.backend.resolve("cpu")
    command = ["train", "--data", str(array), "--out", str(tmp_path / "a"), "--epochs", "1", *TINY]
    assert main([*command, "--backend", "reference"]) == 0
    assert fusedvae.backend.resolve("cpu") == before


def test_a_checkpoint_that_lacks_something_is_one_line(
    array: Path, tmp_path: Path, no_pictures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["train", "--data", str(array), "--out", str(out), "--epochs", "1", *TINY]) == 0
    whole = checkpoint.load(out)
    (name, _), *_ = whole["model"].items()
    damaged = [{key: value for key, value in whole.items() if key != missing} for missing in whole]
    damaged += [
        {**whole, "settings": {**whole["settings"], "depth": 3}},
        {**whole, "model": {**whole["model"], name: torch.zeros(3)}},
        {**whole, "optimizer": None},
        {**whole, "rng": {"cpu": torch.zeros(3, dtype=torch.uint8)}},
    ]
    for state in damaged:
        torch.save(state, out / checkpoint.CHECKPOINT)
        before = contents(out)
        capsys.readouterr()
        assert main(["train", "--resume", str(out), "--quiet"]) == 2
        assert "checkpoint.pt" in one_line_error(capsys)
        assert contents(out) == before


def test_a_checkpoint_cut_short_anywhere_or_with_one_wrong_bit_in_a_tensor_is_refused(tmp_path: Path) -> None:
    weight = torch.arange(50.0)
    checkpoint.save(tmp_path, {"model": {"weight": weight}, "epoch": 3})
    whole = (tmp_path / checkpoint.CHECKPOINT).read_bytes()
    at = whole.index(weight.numpy().tobytes())
    damaged = [whole[:length] for length in range(0, len(whole), 37)]
    damaged += [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(at, at + weight.nbytes, 13)]
    for content in damaged:
        (tmp_path / checkpoint.CHECKPOINT).write_bytes(content)
        with pytest.raises(CommandError, match=r"cannot read .*checkpoint\.pt: it is damaged"):
            checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "0.5"], "--lr 0.5 differs from the run's own 0.001: with --resume only --data, --array"),
        (["--recon-logvar", "learned"], "--recon-logvar learned differs from the run's own per-pixel"),
        (["--out", "b"], "--resume goes on in the run's own directory"),
        (["--overwrite"], "--resume goes on in the run's own directory"),
        (["--epochs", "1"], "--epochs 1: the run is in epoch 2 already"),
    ],
)
def test_a_run_that_goes_on_stays_what_it_is(
    array: Path,
    tmp_path: Path,
    no_pictures: None,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    out = tmp_path / "run"
    assert main(["train", "--data", str(array), "--out", str(out), "--epochs", "2", *TINY]) == 0
    before = contents(out)
    capsys.readouterr()
    assert main(["train", "--resume", str(out), *options]) == 2
    assert message in one_line_error(capsys)
    assert contents(out) == before
    assert main(["train", "--resume", str(out), "--lr", "0.001", "--quiet"]) == 0  # the same value is no change


@pytest.mark.parametrize("module", ["tqdm", "matplotlib.figure"])
@pytest.mark.parametrize("command", ["train", "bench"])
def test_a_missing_package_is_named_with_its_extra(
    module: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    words = ["bench", "--quick", "--report", str(tmp_path / "report")] if command == "bench" else ["train"]
    assert main(words) == 2
    message = one_line_error(capsys, command)
    assert f"this needs {module.partition('.')[0]} (" in message
    assert message.endswith(f"install it with {errors.extra_command(command)}\n")


def test_the_command_of_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name of the package that is installed, which compiles nothing; else by the checkout's folder."""

    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", lambda name: None)
    assert errors.extra_command("train") == "pip install 'fusedvae[train]'"
    monkeypatch.setattr(metadata, "distribution", missing)
    assert shlex.split(errors.extra_command("h5ad")) == ["pip", "install", f"{SOURCE}[h5ad]"]


def test_commands_import_heavy_packages_only_when_they_run() -> None:
    names = {"PIL", "matplotlib", "sklearn", "tqdm", "sympy", "torch._dynamo", "torch.distributed.fsdp"}
    script = (
        "import sys, torch; before = set(sys.modules); import fusedvae.cli as c; c._parser(); "
        f"print(sorted({names} & (set(sys.modules) - before)))"  # PyTorch itself imports one or the other
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=SOURCE, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


# --- the command line itself ------------------------------------------------------------------------------------


def test_every_setting_is_an_option_and_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(Settings):
        assert re.search(rf"--{field.name.replace('_', '-')}\b", shown), field.name
        if field.default is not None:
            assert f"(default: {field.default})" in re.sub(r"\s+", " ", shown), field.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "fusedvae: error: the following arguments are required: COMMAND\n"),
        (["fly"], "fusedvae: error: argument COMMAND: invalid choice: 'fly'"),
        (["train", "--nonsense"], "fusedvae train: error: unrecognized arguments: --nonsense\n"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    said = "Train a VAE on digits, arrays, .h5ad files, folders of images, or .tar files of images."
    assert said in " ".join(shown.split())
    assert "Show versions" in shown


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fusedvae {fusedvae.__version__}\n"


def test_a_run_in_a_folder_that_may_not_be_entered_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refused)  # not by its mode: root enters every folder
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert f"cannot read {tmp_path}: Permission denied" in one_line_error(capsys)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_output_that_nobody_reads_is_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fusedvae", "info"], cwd=SOURCE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 128 + signal.SIGPIPE)
    process.stderr.close()


def test_ctrl_c_before_training_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "prepare", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "fusedvae train: interrupted\n"


def test_a_full_disk_is_one_line(
    array: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "run"
    assert main(["train", "--data", str(array), "--out", str(out), "--epochs", "1", *TINY]) == 2
    assert "No space left on device" in one_line_error(capsys)
    shutil.rmtree(out)
