"""What ``fusedvae train`` can be asked for: schedules, averages, bounds, conditions, files of options, loggers."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_cli_train import TINY, array, interrupt_after, no_pictures, one_line_error, quick, rows  # noqa: F401
from torch.distributions import Normal, kl_divergence
from torch.optim.swa_utils import get_ema_multi_avg_fn

import fusedvae
from fusedvae.cli import checkpoint, data, errors, main, metrics
from fusedvae.cli.settings import Settings
from fusedvae.cli.train import options
from fusedvae.cli.trainer import Trainer

SMALL = {"arch": "mlp", "width": 8, "latent": 2, "batch": 8, "device": "cpu"}


@pytest.fixture
def samples(array: Path) -> data.Data:
    return data.split(data.load(str(array)), 0.1)


# --- schedules --------------------------------------------------------------------------------------------------


def test_beta_schedules() -> None:
    linear = Settings(beta=2.0, warmup=1.0)
    assert [linear.beta_at(step, 4) for step in range(6)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    cosine = Settings(beta=2.0, warmup=1.0, beta_schedule="cosine")
    expected = [1 - math.cos(math.pi * part / 4) for part in (1, 2, 3, 4, 4)]
    assert [cosine.beta_at(step, 4) for step in range(5)] == pytest.approx(expected)
    cyclical = Settings(beta=2.0, warmup=1.0, beta_schedule="cyclical")
    cycle = [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert [cyclical.beta_at(step, 4) for step in range(20)] == pytest.approx([*cycle, *cycle, *cycle[:4]])


def test_learning_rates_are_those_of_torch() -> None:
    """After a warm-up of one epoch of 4 steps, 12 more."""
    expected = {
        "constant": lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        "linear": lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=11),
        "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=11, eta_min=0.05),
    }
    for schedule, make in expected.items():
        settings = Settings(epochs=4, lr=0.5, lr_schedule=schedule, lr_warmup=1.0, lr_final=0.1)
        rates = [settings.lr_at(step, 4) for step in range(16)]
        assert rates[:3] == pytest.approx([0.125, 0.25, 0.375])
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        scheduler, others = make(optimizer), []
        for _ in range(12):
            others.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        assert rates[4:] == pytest.approx(others, rel=1e-6), schedule


@pytest.mark.parametrize(
    ("count", "shape", "epochs"),
    [
        (1617, (1, 8, 8), 30),
        (50_000, (3, 32, 32), 30),
        (450, (3, 64, 64), 235),
        (450, (1, 16, 16), 141),
        (10, (7,), 750),
    ],
)
def test_few_data_are_gone_through_more_often(count: int, shape: tuple[int, ...], epochs: int) -> None:
    assert Settings().epochs_of(count, shape) == epochs
    assert Settings(epochs=3).epochs_of(count, shape) == 3


def test_the_default_width_is_that_of_the_images_and_is_kept():
    widths = {(1, 28, 28): 32, (3, 32, 32): 32, (3, 64, 64): 16, (3, 20, 40): 16, (3, 65, 9): 8, (3, 300, 300): 8}
    widths |= {(784,): 512, (1, 1, 1): 512}
    assert {shape: Settings().width_of(shape) for shape in widths} == widths
    assert Settings(width=8).width_of((3, 64, 64)) == 8
    assert Settings(arch="mlp").width_of((3, 64, 64)) == 512
    assert Settings(arch="conv").width_of((784,)) == 32
    run = Trainer(Settings(device="cpu"), data.split(data.load("digits"), 0.1))
    assert run.state()["settings"]["width"] == 32
    assert run.model.encoder.arguments["width"] == 32


def steps(run: Trainer) -> Iterator[torch.Tensor]:
    """All steps of all epochs of a run, as ``Trainer.run`` takes them."""
    for epoch in range(run.epochs):
        run.epoch, run.step = epoch, 0
        for batch in run._batches(run.train_samples, run._order()):
            yield run._train_step(batch)
            run.step += 1


def test_schedules_go_on_from_epoch_to_epoch(samples: data.Data, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Trainer(Settings(**SMALL, epochs=2, lr=0.1, lr_warmup=2.0, beta=2.0, warmup=2.0), samples)
    rates, betas, forward = [], [], run.objective.forward

    def recorded(x: torch.Tensor, condition: None, beta: float, *others: Any) -> Any:
        betas.append(beta)
        return forward(x, condition, beta, *others)

    monkeypatch.setattr(run.objective, "forward", recorded)
    for _ in steps(run):
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.01 * done for done in range(1, 11)])
    assert betas == pytest.approx([0.2 * done for done in range(1, 11)])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gradients_are_bounded(samples: data.Data, dtype: str) -> None:
    """As the optimizer sees them; in float16 it divides them by the scaler's factor, unless that has been done."""
    run = Trainer(Settings(**SMALL, epochs=1, clip_grad=1e-3, dtype=dtype), samples)
    run.scaler.scale(torch.ones(()))  # makes its factor, if it has one
    if run.scaler.is_enabled():
        run.scaler.update(2.0**4)
    norms = []

    def record(optimizer: torch.optim.Optimizer, *_: object) -> None:
        left = getattr(optimizer, "grad_scale", None)
        squares = [parameter.grad.square().sum().item() for parameter in run.model.parameters()]
        norms.append(math.sqrt(sum(squares)) / (1.0 if left is None else left.item()))

    run.optimizer.register_step_pre_hook(record)
    for _ in steps(run):
        pass
    assert norms == pytest.approx([1e-3] * 5, rel=1e-3 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("options", [{}, {"bound": "iwae", "samples": 3}, {"grad_accum": 2}], ids=str)
def test_gradients_are_those_of_the_mean_loss(samples: data.Data, options: dict[str, Any]) -> None:
    """Of the last step of an epoch, too, which has fewer samples."""
    run = Trainer(Settings(**SMALL, epochs=1, lr=0.0, **options), samples)
    *_, last = run._order()
    assert len(last) == 4
    ((x, _),) = run._batches(run.train_samples, [last])
    run.step = run.steps_per_epoch - 1
    torch.manual_seed(5)
    run._train_step((x, None))
    found = [parameter.grad.clone() for parameter in run.model.parameters()]
    torch.manual_seed(5)
    given = {name: value for name, value in options.items() if name != "grad_accum"}
    loss = run.model.loss(x, **given, noise=run._noise(len(x)), full=True)
    torch.testing.assert_close(found, [*torch.autograd.grad(loss, [*run.model.parameters()])], rtol=1e-4, atol=1e-6)


def test_each_epoch_has_an_order_of_its_own(samples: data.Data) -> None:
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        run = Trainer(Settings(**SMALL, epochs=2, seed=seed), samples)
        run.epoch = epoch
        batches = run._order()
        assert [len(batch) for batch in batches] == [8, 8, 8, 8, 4]
        orders.append(np.concatenate(batches).tolist())
        assert sorted(orders[-1]) == list(range(36))
    assert len({*map(tuple, orders), tuple(range(36))}) == 4


def test_the_average_of_the_weights_is_evaluated_and_saved(
    array: Path,
    tmp_path: Path,
    no_pictures: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, weights = tmp_path / "run", []
    step = Trainer._train_step

    def recorded(self: Trainer, batch: Any) -> torch.Tensor:
        sums = step(self, batch)
        weights.append([parameter.detach().clone() for parameter in self.model.parameters()])
        return sums

    monkeypatch.setattr(Trainer, "_train_step", recorded)
    command = ["train", "--data", str(array), "--out", str(out), *TINY, "--ema", "0.75"]
    assert main([*command, "--epochs", "1"]) == 0
    assert main(["train", "--resume", str(out), "--epochs", "2", "--quiet"]) == 0
    average = weights[0]
    for later in weights[1:]:
        get_ema_multi_avg_fn(0.75)(average, later, torch.tensor(1))
    for found, expected in zip(fusedvae.VAE.from_pretrained(out).parameters(), average, strict=True):
        torch.testing.assert_close(found, expected)
    run = Trainer(options.checked(checkpoint.load(out)["settings"]), data.split(data.load(str(array)), 0.1))
    run.restore(checkpoint.load(out))
    torch.testing.assert_close(run.evaluate(run.heldout_samples)[0].item(), rows(out)[-1]["heldout_loss"])


# --- bounds, precision, compilers -------------------------------------------------------------------------------


def test_parts_of_a_step_make_the_step(samples: data.Data) -> None:
    found = []
    for parts in (1, 3, 8, 20):
        run = Trainer(Settings(**SMALL, epochs=1, grad_accum=parts), samples)
        sums = [run._train_step(batch) for batch in run._batches(run.train_samples, run._order())]
        found.append((torch.stack(sums), [parameter.detach() for parameter in run.model.parameters()]))
    for sums, weights in found[1:]:
        torch.testing.assert_close(sums, found[0][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(weights, found[0][1], rtol=0, atol=1e-5)


def test_the_importance_weighted_bound_is_above_the_other(samples: data.Data) -> None:
    run = Trainer(Settings(**SMALL, epochs=1, bound="iwae", samples=20), samples)
    loss, nll, kl = run.evaluate(run.train_samples)
    assert loss < nll + kl - 1e-3
    terms = run._train_step(run.first_part())
    assert terms[1].isnan()
    assert terms[[0, 2]].isfinite().all()


def test_the_importance_weighted_bound_of_one_sample_is_the_other_at_it(samples: data.Data) -> None:
    run = Trainer(Settings(**SMALL, epochs=1, bound="iwae"), samples)
    found = run.evaluate(run.heldout_samples)
    x = run.heldout_samples.batch(slice(None))
    noise = run._noise(len(x), torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = run.model.eval()(x, noise=noise[0])
    q, p = Normal(out.mu, (out.logvar / 2).exp()), Normal(out.recon_x, (out.recon_logvar / 2).exp())
    nll = -p.log_prob(x).sum() / len(x)
    kl = kl_divergence(q, Normal(0, 1)).sum() / len(x)
    at_sample = (q.log_prob(out.z) - Normal(0, 1).log_prob(out.z)).sum() / len(x)
    torch.testing.assert_close(found.float(), torch.stack([nll + at_sample, nll, kl]), rtol=1e-5, atol=1e-5)


def test_gradients_of_float16_are_scaled_and_steps_that_overflow_are_left_out(samples: data.Data) -> None:
    run = Trainer(Settings(**SMALL, epochs=1, dtype="float16"), samples)
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    run.scaler.scale(torch.ones(()))  # makes its factor
    run.scaler.update(2.0**40)
    run._train_step(run.first_part())
    assert all(torch.equal(one, same) for one, same in zip(run.model.parameters(), before, strict=True))
    assert run.scaler.get_scale() == 2.0**39
    run.scaler.update(2.0**4)
    run._train_step(run.first_part())
    assert not torch.equal(next(run.model.parameters()), before[0])
    state = run.state()
    again = Trainer(run.settings, samples)
    again.restore(state)
    assert again.scaler.state_dict() == run.scaler.state_dict()


def test_a_condition_is_told_to_the_networks(tmp_path: Path, no_pictures: None) -> None:
    out = tmp_path / "run"
    command = ["train", "--out", str(out), "--epochs", "4", *TINY, "--width", "64", "--batch", "64", "--lr", "0.005"]
    assert main([*command, "--condition", "labels"]) == 0
    model = fusedvae.VAE.from_pretrained(out)
    digits = data.load("digits")
    x, labels = digits.batch(slice(500)), digits.labels[:500]
    with torch.no_grad():
        right, wrong = (model.loss(x, told, generator=torch.manual_seed(0)) for told in (labels, (labels + 1) % 10))
    assert right + 2 < wrong


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_run_has_the_curve_of_another(
    array: Path,
    tmp_path: Path,
    no_pictures: None,
) -> None:
    for name, extra in (("eager", []), ("compiled", ["--compile"])):
        command = ["train", "--data", str(array), "--out", str(tmp_path / name), "--epochs", "2", *TINY, *extra]
        assert main([*command, "--warmup", "1"]) == 0
    for row, same in zip(rows(tmp_path / "eager"), rows(tmp_path / "compiled"), strict=True):
        assert row == pytest.approx(same, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("extra", [["--ema", "0.9", "--lr-schedule", "cosine"], ["--samples", "2", "--amp", "fp16"]])
def test_such_runs_go_on_bit_for_bit(
    array: Path,
    tmp_path: Path,
    no_pictures: None,
    monkeypatch: pytest.MonkeyPatch,
    extra: list[str],
) -> None:
    command = ["train", "--data", str(array), "--epochs", "2", *TINY, *extra]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert main([*command, "--out", str(tmp_path / "broken")]) == 130
    assert main(["train", "--resume", str(tmp_path / "broken"), "--quiet"]) == 0
    for name in ("metrics.csv", "model.safetensors" if (tmp_path / "whole/model.safetensors").exists() else "model.pt"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--bound", "iwae", "--beta", "2"], "--bound iwae is a bound for --beta 1 only"),
        (["--beta-schedule", "cyclical"], "--beta-schedule cyclical needs --warmup"),
        (["--beta-schedule", "cosine"], "--beta-schedule cosine needs --warmup"),
        (["--lr-final", "0.5"], "--lr-final 0.5 needs --lr-schedule"),
        (["--likelihood", "mse", "--recon-logvar", "0.5"], "--recon-logvar 0.5: the mse likelihood has no scale"),
        (["--likelihood", "l1", "--logvar-floor", "-6"], "--logvar-floor bounds a per-pixel log-variance, and the l1"),
        (["--recon-logvar", "learned", "--logvar-floor", "-6"], "and --recon-logvar learned has none"),
        (["--condition", "labels"], "--condition labels needs labels"),
        (["--fsdp"], "--fsdp is for several processes"),
        (["--likelihood", "bernoulli", "--recon-scale", "logvar"], "--recon-scale: expected none, as the bernoulli"),
        (
            ["--likelihood", "laplace", "--recon-scale", "logvar"],
            "--recon-scale: expected one of 'logscale', 'softplus', as",
        ),
        (["--clamp", "3,2"], "--clamp: expected LOW,HIGH, LOW no higher than HIGH, got '3,2'"),
        (["--clamp", ","], "--clamp: expected LOW,HIGH, of which one may be empty"),
        (["--amp", "fp8"], "--amp: expected bf16 or fp16"),
        (["--amp", "bf16", "--dtype", "float64"], "argument --dtype: not allowed with argument --amp"),
        (["--ema", "1"], "--ema: expected a number above 0 and below 1"),
        (["--grad-accum", "0"], "--grad-accum: expected an integer of at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_do_not_go_together(
    array: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    message: str,
) -> None:
    out = tmp_path / "run"
    assert main(["train", "--data", str(array), "--out", str(out), *TINY, *extra]) == 2
    assert message in one_line_error(capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("--clamp", "-8,8", (-8.0, 8.0)),
        ("--recon-clamp", "-.5,", (-0.5, None)),
        ("--recon-logvar", "-1e-3", -0.001),
        ("--logvar-floor", "-1.5e0", -1.5),
    ],
)
def test_negative_values_are_no_options(
    array: Path, tmp_path: Path, no_pictures: None, option: str, text: str, value: object
) -> None:
    out = tmp_path / "run"
    assert main(["train", "--data", str(array), "--out", str(out), "--epochs", "1", *TINY, option, text]) == 0
    assert getattr(Settings(**checkpoint.load(out)["settings"]), option[2:].replace("-", "_")) == value


# --- files of options -------------------------------------------------------------------------------------------


def test_a_run_writes_its_options_and_another_reads_them(
    array: Path,
    tmp_path: Path,
    no_pictures: None,
) -> None:
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    extra = ["--recon-logvar", "-1.5", "--clamp=,3", "--lr", "1e-05", "--ema", "0.5"]
    assert main(["train", "--data", str(array), "--out", str(one), "--epochs", "1", *TINY, *extra]) == 0
    config = str(one / options.OPTIONS)
    assert main(["train", "--config", config, "--out", str(same), "--quiet"]) == 0
    assert (same / options.OPTIONS).read_bytes() == (one / options.OPTIONS).read_bytes()
    assert (same / "metrics.csv").read_bytes() == (one / "metrics.csv").read_bytes()
    assert main(["train", "--config", config, "--out", str(other), "--quiet", "--lr", "0.5", "--clamp=-1,"]) == 0
    settings = json.loads((other / options.OPTIONS).read_text())
    assert (settings["lr"], settings["clamp"], settings["ema"]) == (0.5, [-1.0, None], 0.5)


def test_options_in_yaml(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "run.yaml"
    path.write_text(
        "# mine\nlr: 1e-4\nrecon-logvar: learned\nclamp: [-5, 2]\ncompile: true\nimage_size: 32\nfsdp: no\namp: bf16\n"
    )
    expected = {"lr": 1e-4, "recon_logvar": "learned", "clamp": (-5.0, 2.0), "compile": True, "image_size": 32}
    assert options.read(path) == {**expected, "fsdp": False, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: -1", "argument --lr: expected a number above 0, got '-1'"),
        ("learning_rate: 1", "--learning-rate is no option of a run's settings"),
        ("lr: [1, 2]", "argument --lr: expected a number above 0"),
        ("resume: x", "--resume is no option of a run's settings"),
        ("amp: fp32", "argument --amp: expected bf16 or fp16, got 'fp32'"),
        ("fsdp: 3", "--fsdp: expected true or false, got 3"),
        ("lr: yes", "--lr: expected a value, got True"),
        ("- lr", "expected a mapping of options to values, got list"),
        ("a: b: c", "mapping values are not allowed"),
    ],
)
def test_a_wrong_file_of_options_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert main(["train", "--config", str(path)]) == 2
    error = one_line_error(capsys)
    assert f"--config {path}: " in error
    assert message in error
    assert main(["train", "--config", str(tmp_path / "absent.yaml")]) == 2
    assert "--config: cannot read" in one_line_error(capsys)


def test_every_setting_survives_a_file(tmp_path: Path) -> None:
    settings = Settings(
        **{**SMALL, "clamp": (None, 2.5), "recon_logvar": -1.25, "lr": 1e-7, "compile": True, "image_shape": (1, 2, 3)},
        recon_scale="softplus",
        epochs=7,
    )
    path = tmp_path / "options.json"
    path.write_text(options.text_of(settings))
    assert Settings(**options.read(path)) == settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--test-data", "digits", "--heldout", "0.3"], "--heldout 0.3: nothing is held out of the data"),
        (["--beta", "0", "--warmup", "1"], "--warmup 1.0: there is nothing to grow to with --beta 0"),
    ],
)
def test_options_that_change_nothing_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["train", "--out", str(tmp_path / "run"), *TINY, *options]) == 2
    assert message in one_line_error(capsys)


def test_large_images_are_computed_in_parts() -> None:
    assert [Settings().grad_accum_of((3, size, size)) for size in (64, 128, 256, 512)] == [1, 1, 4, 16]
    assert Settings().grad_accum_of((3, 256, 256), processes=4) == 1
    assert Settings(batch=2).grad_accum_of((3, 4096, 4096)) == 2
    assert Settings(grad_accum=2).grad_accum_of((3, 256, 256)) == 2
    assert Settings(arch="mlp").grad_accum_of((3, 256, 256)) == 1


# --- loggers ----------------------------------------------------------------------------------------------------


def test_tensorboard_has_the_metrics(
    array: Path,
    tmp_path: Path,
    no_pictures: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    command = ["train", "--data", str(array), "--out", str(out), *TINY, "--logger", "tensorboard"]
    assert main([*command, "--epochs", "2"]) == 0
    assert main(["train", "--resume", str(out), "--epochs", "3", "--quiet"]) == 0
    found = EventAccumulator(str(out / "events")).Reload()
    values = {event.step: event.value for event in found.Scalars("heldout/loss")}
    assert values == pytest.approx({row["epoch"]: row["heldout_loss"] for row in rows(out)}, rel=1e-6)
    # A finished run is evaluated once more, and has one value an epoch.
    assert main(["train", "--resume", str(out), "--quiet"]) == 0
    found = EventAccumulator(str(out / "events")).Reload()
    assert [event.step for event in found.Scalars("heldout/loss")] == [1, 2, 3]
    assert [event.step for event in found.Scalars("log_likelihood")] == [2, 3]
    assert main([*command, "--epochs", "1", "--overwrite"]) == 0
    found = EventAccumulator(str(out / "events")).Reload()
    assert [event.step for event in found.Scalars("train/kl")] == [1]


def test_wandb_has_the_metrics(
    array: Path,
    tmp_path: Path,
    no_pictures: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logged: list[Any] = []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end"))
    wandb = SimpleNamespace(init=lambda **options: logged.append(options["config"]["latent"]) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    out = tmp_path / "run"
    assert main(["train", "--data", str(array), "--out", str(out), "--epochs", "2", *TINY, "--logger", "wandb"]) == 0
    latent, *steps, (last, evaluation), end = logged
    assert (latent, [step for step, _ in steps], last, end) == (2, [1, 2], 2, "end")
    assert [values["train/loss"] for _, values in steps] == [row["train_loss"] for row in rows(out)]
    assert evaluation.keys() >= {"epoch", "log_likelihood", "active_units"}


def test_a_logger_that_is_missing_is_one_line(
    array: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["train", "--data", str(array), "--out", str(tmp_path / "a"), *TINY, "--logger", "wandb"]) == 2
    assert errors.extra_command("wandb") in one_line_error(capsys)
    assert not (tmp_path / "a").exists()


# --- evaluation -------------------------------------------------------------------------------------------------


def test_a_run_ends_with_more_than_its_loss(
    array: Path, tmp_path: Path, no_pictures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["train", "--data", str(array), "--out", str(out), "--epochs", "3", *TINY, "--evaluate-samples", "50"]
    assert main([*command, "--evaluate-every", "2"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^log p\(x\) -?[\d.]+ nats per sample \(50 importance samples\), \d of 2 latent", printed, re.M)
    with open(out / "evaluation.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["epoch"] for row in table] == ["2", "3"]
    model, heldout = fusedvae.VAE.from_pretrained(out), data.split(data.load(str(array)), 0.1).test
    expected = metrics.log_likelihood(model, heldout, particles=50, batch=8)
    assert float(table[1]["log_likelihood"]) == pytest.approx(expected, rel=1e-5)
    assert float(table[1]["log_likelihood"]) > -rows(out)[-1]["heldout_loss"] - 0.1
    assert float(table[1]["psnr"]) == pytest.approx(metrics.psnr(model, heldout, batch=8), rel=1e-5)
    assert int(table[1]["active_units"]) == metrics.active_units(model, heldout, batch=8)
    assert table[1]["ssim"] == ""  # of 4x4 pixels
    for _ in range(2):  # the second time it is at its end already
        assert main(["train", "--resume", str(out), "--epochs", "4", "--quiet"]) == 0
        with open(out / "evaluation.csv", newline="") as file:
            assert [row["epoch"] for row in csv.DictReader(file)] == ["2", "3", "4"]


def test_metrics_of_a_conditional_model_are_told_the_labels() -> None:
    torch.manual_seed(0)
    model = fusedvae.VAE(*fusedvae.networks.mlp((1, 8, 8), 2, hidden=(8,), classes=10), 2)
    with torch.no_grad():  # a class that is far from the others
        model.decoder.labels.weight.mul_(10)  # type: ignore[union-attr, operator]
        model.encoder.labels.weight.mul_(10)  # type: ignore[union-attr, operator]
    samples = data.load("digits").subset(slice(20))
    x, labels = samples.batch(slice(None)), samples.labels
    how: dict[str, Any] = {"batch": 20, "conditional": True}
    expected = model.log_likelihood(x, labels, samples=7, generator=torch.Generator().manual_seed(3)).mean().item()
    assert metrics.log_likelihood(model, samples, particles=7, seed=3, **how) == pytest.approx(expected, rel=1e-5)
    errors = (model.reconstruct(x, labels).clamp(0, 1) - x).square().flatten(1).mean(1)
    assert metrics.psnr(model, samples, **how) == pytest.approx((-10 * errors.log10()).mean().item(), rel=1e-4)
    means = model.embed(x, labels)
    assert metrics.active_units(model, samples, **how) == int((means.var(0, correction=0) > 0.01).sum())
