"""``fusedvae bench``: that its figures mean what they say, that wrong answers get none, and what it writes."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import INSTRUCTION_SETS, threads
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fusedvae
from fusedvae.backend.reference import FORMULAS, LIKELIHOODS, NORMAL_FORMS, PLAIN, Form, Scale
from fusedvae.cli import bench, main
from fusedvae.cli.bench import cases, checking, compare, contestants, measuring, report, statistics, suite, table
from fusedvae.cli.bench.cases import Case

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
FAST = ["--presets", "2^8", "--operations", "kl", "--contestants", "eager/handwritten,fusedvae/*", "--seconds", "0.01"]


@pytest.fixture(autouse=True)
def quick(few_objects: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few rounds, and one thread: two are slow on a machine that has something else to do."""
    monkeypatch.setattr(suite, "ROUNDS", (5, 9))
    monkeypatch.setattr(suite, "TURN_SECONDS", 0.0)
    with threads(1):
        yield


def run_bench(*options: object) -> int:
    return main(["bench", "--quiet", *map(str, options)])


@pytest.fixture
def recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The file of a small measurement."""
    path = tmp_path / "run.json"
    assert run_bench(*FAST, "--json", path) == 0
    capsys.readouterr()
    return path


# --- statistics -------------------------------------------------------------------------------------------------


def test_median_and_quartiles() -> None:
    found = statistics.summary([5.0, 1.0, 3.0, 2.0, 4.0])
    assert found == (3.0, 2.0, 4.0)
    assert found.spread == pytest.approx(2 / 3)


def test_a_ratio_of_medians_and_its_interval() -> None:
    rng = np.random.default_rng(1)
    fast = rng.lognormal(0.0, 0.1, 101)
    slow = 3 * rng.lognormal(0.0, 0.1, 101)
    value, low, high = statistics.ratio(list(slow), list(fast))
    assert value == np.median(slow) / np.median(fast)
    assert low < 3 < high
    assert 0.02 < (high - low) / value < 0.2
    again = statistics.ratio(list(slow), list(fast))
    assert again == (value, low, high)


def test_what_falls_on_a_whole_round_does_not_widen_the_interval() -> None:
    weather = np.random.default_rng(2).lognormal(0.0, 1.0, 50)
    value, low, high = statistics.ratio(list(2 * weather), list(weather))
    assert (value, low, high) == pytest.approx((2, 2, 2))


def test_a_ratio_needs_the_same_rounds() -> None:
    with pytest.raises(ValueError, match="expected times of 2 rounds, got 3"):
        statistics.ratio([1.0, 2.0], [1.0, 2.0, 3.0])


def test_the_machine_is_taken_out_of_a_change() -> None:
    rng = np.random.default_rng(3)
    old, control = rng.lognormal(0, 0.02, 40), rng.lognormal(1, 0.02, 40)
    slower_machine = statistics.change(list(old), list(2 * old), [list(control)], [list(2 * control)])
    assert slower_machine.value == pytest.approx(1)
    slower_code = statistics.change(list(old), list(2 * old), [list(control)], [list(control)])
    assert slower_code.value == pytest.approx(2)
    noisy = statistics.change(list(old), list(2 * rng.permutation(old)), [list(control)], [list(control)])
    assert 1.9 < noisy.low < 2 < noisy.high < 2.1
    without_controls = statistics.change(list(old), list(2 * old), [], [])
    assert without_controls.value == pytest.approx(2)


# --- measuring --------------------------------------------------------------------------------------------------


class Clock:
    """One that the work of a test moves, in the place of the machine's."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, Any]] = []

    def perf_counter(self) -> float:
        return self.now

    def work(self, name: str, seconds: float, prepare: Callable[[int], Any] | None = None) -> measuring.Contestant:
        """Work that takes so long."""

        def takes(item: Any) -> None:
            self.calls.append((name, item))
            self.now += seconds

        return measuring.Contestant(name, takes, prepare)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measuring, "time", clock)
    return clock


def test_contestants_take_turns(clock: Clock) -> None:
    works = [clock.work("A", 0.25), clock.work("B", 0.125), clock.work("C", 2.0**-10)]
    timings = measuring.interleaved(works, CPU, seconds=0, rounds=(4, 9))
    # Warm-up, less of what takes long; then turns, each of work that is not timed, if it is short, and work that is.
    assert [name for name, _ in clock.calls] == [*("A" * 2), *("B" * 3), *("C" * 3), *("ABBCC" * 4)]
    assert [index for name, index in clock.calls[8:] if name == "B"] == list(range(8))
    assert timings.seconds == {"A": [0.25] * 4, "B": [0.125] * 4, "C": [2.0**-10] * 4}
    assert set(timings.repeats.values()) == {1}


def test_short_work_is_repeated_on_other_buffers(clock: Clock) -> None:
    timings = measuring.interleaved([clock.work("short", 2.0**-15)], CPU, seconds=0, rounds=(2, 2), turn=2.0**-10)
    assert timings == ({"short": [2.0**-15] * 2}, {"short": 32})
    assert [index for _, index in clock.calls][measuring.WARM_UPS :] == list(range(2 * (1 + 32)))


def test_time_and_a_request_to_stop_end_the_rounds(clock: Clock) -> None:
    work = clock.work("work", 0.125)
    # A round takes 0.25 s, with the work that is not timed: after the fifth, 1.25 s have gone by.
    assert len(measuring.interleaved([work], CPU, seconds=1.125, rounds=(1, 99)).seconds["work"]) == 5
    stops = iter([False, False, True])
    times = measuring.interleaved([work], CPU, seconds=9, rounds=(5, 99), stop=lambda: next(stops)).seconds["work"]
    assert len(times) == 2


def test_preparation_is_not_timed(clock: Clock) -> None:
    def prepare(index: int) -> int:
        clock.now += 4.0
        return index + 1

    assert measuring.seconds_of(clock.work("work", 0.5, prepare), CPU, repeats=2, first=5) == 0.5
    assert clock.calls == [("work", 6), ("work", 7)]


def test_memory_and_operators_of_some_work() -> None:
    x = torch.ones(1000)

    def work() -> Tensor:
        y = x + x  # 4000 bytes
        z = y * y  # 4000 more, then y goes
        del y
        return z.exp()

    found = measuring.profiled(work, CPU)
    assert 8000 <= found.peak_bytes < 8200
    assert found.launches == 3


def test_memory_of_before_that_some_work_releases_does_not_count() -> None:
    def change(time: float, address: int, count: int) -> dict:
        return {"name": "[memory]", "ts": time, "args": {"Device Type": 0, "Addr": address, "Bytes": count}}

    earlier, fresh = 0x10, 0x20
    trace = [change(3, fresh, -400), change(1, earlier, -8), change(2, fresh, 400), change(4, fresh, 300)]
    assert measuring._peak(trace) == 400


def test_a_copy_moves_as_many_bytes_as_it_says() -> None:
    copy_of = measuring.copying(4096, 2, CPU)
    assert copy_of.work(0).numel() == 2048
    assert copy_of.work(0).data_ptr() == copy_of.work(2).data_ptr() != copy_of.work(1).data_ptr()
    assert copy_of.work(1).unique().tolist() == [1]


# --- cases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "elements"),
    [
        (Case("mnist-mlp", "latent"), 8 * 128 * 20),  # 2M + M forward, 3M + 2M backward
        (Case("mnist-mlp", "reparameterize"), 7 * 128 * 20),
        (Case("mnist-mlp", "kl"), 4 * 128 * 20),
        (Case("mnist-mlp", "nll"), 5 * 128 * 784),  # 3N + 2N
        (Case("mnist-mlp", "elbo"), 5 * 128 * 784 + 4 * 128 * 20),
        (Case("single-cell-2k", "nll"), 3 * 128 * 2000),  # the log-variances are few
        (Case("latent-diffusion", "nll", direction="evaluate"), 2 * 12 * 3 * 256 * 256),
        (Case("mnist-mlp", "latent", direction="evaluate"), 3 * 128 * 20),
        (Case("2^20", "elbo"), 5 * 2**20 + 4 * 2**16),
        (Case("mnist-mlp", "nll-gaussian-std"), 5 * 128 * 784),
        (Case("mnist-mlp", "nll-mse"), 3 * 128 * 784),
        (Case("mnist-mlp", "nll-l1", direction="evaluate"), 2 * 128 * 784),
        (Case("mnist-mlp", "nll-gaussian-weight"), 6 * 128 * 784),
        (Case("mnist-mlp", "nll-gaussian-none"), 8 * 128 * 784),  # 3N forward, 3N + 2N backward
        (Case("mnist-mlp", "kl-prior"), 8 * 128 * 20),
        (Case("mnist-mlp", "latent-prior-sample"), 14 * 128 * 20),  # 4M + M forward, 5M + 4M backward
        (Case("mnist-mlp", "latent-softplus"), 8 * 128 * 20),
    ],
)
def test_traffic_is_that_of_a_perfect_implementation(case: Case, elements: int) -> None:
    assert case.traffic() == 4 * elements
    half = Case(case.preset, case.operation, "bfloat16", direction=case.direction)
    assert half.traffic() == 2 * elements


def test_traffic_that_has_no_simple_answer_has_none() -> None:
    assert Case("mnist-mlp", "step").traffic() is None
    assert Case("mnist-mlp", "elbo", direction="backward").traffic() is None


def test_only_possible_cases() -> None:
    found = cases.cases(
        list(cases.PRESETS), list(cases.OPERATIONS), ["float32", "float16"], list(cases.MEMORY_FORMATS), ["both"]
    )
    assert {case.preset for case in found} == set(cases.PRESETS)
    assert [case for case in found if case.operation == "step"] == [Case("mnist-mlp", "step")]
    assert Case("video-latent", "latent", memory_format="channels_last") in found
    assert not [case for case in found if case.preset == "video-latent" and case.operation == "elbo"]
    assert not [case for case in found if case.preset == "mnist-mlp" and case.memory_format == "channels_last"]


def test_operands_have_the_layout_and_the_dtype() -> None:
    case = Case("latent-diffusion", "elbo", "bfloat16", "channels_last")
    made = cases.operands(case, torch.Generator().manual_seed(0))
    assert made.mu is not None
    assert made.mu.shape == (12, 8, 32, 32)
    assert list(made.leaves) == ["mu", "recon_x", "recon_logvar"]
    for tensor in (made.mu, made.recon_x, made.x):
        assert tensor is not None
        assert tensor.dtype == torch.bfloat16
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    other = cases.operands(case, torch.Generator().manual_seed(1))
    assert other.x is not None
    assert not torch.equal(other.x, made.x)


@pytest.mark.parametrize("operation", [name for name, spec in cases.SPECS.items() if spec.kind != "step"])
def test_operands_are_what_the_operation_takes(operation: str) -> None:
    case, made = Case("2^12", operation), cases.operands(Case("2^12", operation), torch.Generator().manual_seed(0))
    for scale, mean in ((made.logvar, -1.0), (made.recon_logvar, -2.0)):
        if scale is not None:
            logarithm = Scale(scale.detach().double(), case.spec.forms[0]).log
            assert logarithm.mean().item() == pytest.approx(mean, abs=0.05)
            assert logarithm.std().item() == pytest.approx(0.5, abs=0.05)
    assert (made.recon_logvar is not None) == (case.formula is not None and bool(case.formula.pairs))
    if made.x is not None and made.recon_x is not None:
        is_binned = case.likelihood == "discretized_logistic"
        low, high = (-1, 1) if is_binned else (0, 6 if case.likelihood in cases.COUNTS else 1)
        assert low <= made.x.min() < made.x.max() <= high
        if is_binned:
            assert set(made.x.unique().tolist()) == set((torch.arange(256) / 127.5 - 1).tolist())
        if case.likelihood in cases.COUNTS:
            assert 0.2 < (made.x == 0).double().mean() < 0.8
            assert torch.equal(made.x, made.x.round())
            assert case.spec.scale != "theta" or made.recon_x.min() > 0
        elif case.likelihood == "bernoulli":
            assert made.recon_x.min() < -1 < 1 < made.recon_x.max()
        else:
            assert (-1 if is_binned else 0) < made.recon_x.min() < made.recon_x.max() < 1
    assert (made.prior_mu is not None) == case.spec.prior
    assert (made.weight is not None) == case.spec.weighted
    if made.weight is not None:
        assert set(made.weight.unique().tolist()) == {0.0, 1.0}
        assert "weight" not in made.leaves


def test_groups_of_operations() -> None:
    groups = cases.groups()
    assert set().union(*(groups[name] for name in ("standard", "likelihoods", "forms", "priors", "reductions"))) == set(
        cases.OPERATIONS
    )
    assert groups["all"] == list(cases.OPERATIONS)
    assert {LIKELIHOODS[str(cases.SPECS[name].likelihood)].name for name in groups["likelihoods"]} == {
        formula.name for formula in LIKELIHOODS.values()
    }
    for form in list(NORMAL_FORMS)[1:]:
        assert {f"nll-gaussian-{form}", f"kl-{form}", f"latent-{form}"} <= set(groups["forms"])
    assert {"nll-laplace-scale", "nll-laplace-softplus", "nll-gaussian-clamp", "kl-clamp"} <= set(groups["forms"])
    assert groups["priors"] == ["kl-prior", "latent-prior", "latent-sample", "latent-prior-sample"]
    parse = bench.some_of(list(cases.OPERATIONS), groups)
    assert parse("priors,kl,latent-prior") == [*groups["priors"], "kl"]


# --- checking ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models' presets with tensors of fewer elements, and of as many kinds."""
    for name, preset in cases.MODELS.items():

        def smaller(shape: tuple[int, ...]) -> tuple[int, ...]:
            return (min(shape[0], 8), *(min(size, 12) for size in shape[1:]))

        small = preset._replace(latent=smaller(preset.latent), x=preset.x and smaller(preset.x))
        monkeypatch.setitem(cases.PRESETS, name, small)


def entered(case: Case) -> dict[str, float]:
    """The error of every contestant that compiles nothing; raises if one is wrong."""
    work = suite.OperationWork(case, CPU, torch.Generator().manual_seed(5))
    work.make_sets()
    with suite._autocast(case, CPU):
        return {m.name: work.enter(m)[1] for m in contestants.methods(case, CPU) if m.family != "compile"}


def assert_every_contestant_is_right(case: Case) -> None:
    errors = entered(case)
    assert {f"eager/{contestants.usual_idiom(case.operation)}", "fusedvae/reference"} <= set(errors)
    assert all(0 <= error <= checking.TOLERANCES[case.dtype] for error in errors.values())


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("preset", cases.MODELS)
@pytest.mark.usefixtures("small_models")
def test_every_contestant_gives_the_right_answer(preset: str, dtype: str) -> None:
    for case in cases.cases([preset], list(cases.STANDARD), [dtype], list(cases.MEMORY_FORMATS), ["both", "evaluate"]):
        if case.operation != "step":
            assert_every_contestant_is_right(case)


@pytest.mark.parametrize(
    ("preset", "dtype"),
    [("latent-diffusion", "float32"), ("single-cell-2k", "float32"), *(("mnist-mlp", dtype) for dtype in cases.DTYPES)],
)
@pytest.mark.usefixtures("small_models")
def test_every_contestant_gives_the_right_answer_to_the_rest(preset: str, dtype: str) -> None:
    rest = [name for name in cases.OPERATIONS if name not in cases.STANDARD]
    for case in cases.cases([preset], rest, [dtype], list(cases.MEMORY_FORMATS), ["both"]):
        assert_every_contestant_is_right(case)


def test_values_alone_are_checked_too() -> None:
    for operation in (
        "kl-prior",
        "latent-prior-sample",
        "nll-gaussian-softplus",
        "nll-l1-weighted-mean",
        "nll-gaussian-none",
    ):
        assert_every_contestant_is_right(Case("2^8", operation, direction="evaluate"))


def test_large_batches_are_checked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "_CHUNK", 3000)
    for operation in (
        "latent",
        "kl",
        "elbo",
        "latent-prior-sample",
        "nll-gaussian-std",
        "nll-l1-weighted-mean",
        "nll-gaussian-none",
    ):
        for preset in ("mnist-mlp", "single-cell-2k"):
            assert max(entered(Case(preset, operation)).values()) <= checking.TOLERANCES["float32"]


class _Called(TorchFunctionMode):
    """Which functions of PyTorch somebody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: set[object] = set()

    def __torch_function__(
        self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.functions.add(function)
        return function(*args, **(kwargs or {}))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("operation", "function"),
    [
        ("nll-bernoulli", nn.functional.binary_cross_entropy_with_logits),
        ("nll-bernoulli-probs", nn.functional.binary_cross_entropy),
        ("nll-mse", nn.functional.mse_loss),
        ("nll-mse-mean", nn.functional.mse_loss),
        ("nll-l1", nn.functional.l1_loss),
        ("nll-l1-weighted-mean", nn.functional.l1_loss),
        ("latent-softplus", nn.functional.softplus),
        ("kl-clamp", torch.clamp),
    ],
)
def test_eager_is_what_people_write(operation: str, function: object) -> None:
    case = Case("2^8", operation)
    (method,) = [m for m in contestants.methods(case, CPU) if m.name == "eager/handwritten"]
    with _Called() as called:
        method.operation(operation)(*cases.operands(case, torch.Generator().manual_seed(0)).arguments)
    assert function in called.functions


class _HalvedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad / 2


def spoilt(spoil: Callable[..., tuple[Tensor, ...]]) -> Callable[[str], contestants.Function]:
    """The handwritten idiom with something done to it."""

    def operation(name: str) -> contestants.Function:
        right = contestants.idiomatic(contestants.IDIOMS["handwritten"], name)
        return lambda *arguments: spoil(right, *arguments)

    return operation


def _one_noise(right: contestants.Function, mu: Tensor, logvar: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    return (mu + torch.exp(0.5 * logvar) * torch.randn(mu.shape, generator=torch.Generator().manual_seed(1)),)


def _too_little_noise(right: contestants.Function, mu: Tensor, logvar: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    return (mu + torch.exp(0.25 * logvar) * torch.randn_like(mu),)


def _repeated_noise(right: contestants.Function, mu: Tensor, logvar: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    return (mu + torch.exp(0.5 * logvar) * torch.randn(mu.shape[0], mu.shape[1] // 2).repeat_interleave(2, 1),)


WRONG = {
    "value": ("kl", lambda right, *a: (right(*a)[0] * 1.001,), r"size: the gradient of mu \(.*, the value \(0\.00"),
    "not a number": ("nll", lambda right, *a: (right(*a)[0] * torch.nan,), r"the value \(inf\)"),
    "gradient": (
        "elbo",
        lambda right, mu, *a: right(_HalvedGradient.apply(mu), *a),
        r"size: the gradient of mu \(0\.3",
    ),
    "constant": ("nll", lambda right, *a: (right(*a)[0] + 784 * checking.HALF_LOG_2PI,), r"size: the value \("),
    "shape": ("kl", lambda right, *a: (right(*a)[0].view(1),), r"the value has shape \(1,\), expected \(\)"),
    "same noise twice": ("reparameterize", _one_noise, "two samples have the same noise"),
    "narrow noise": ("reparameterize", _too_little_noise, "the variance of the noise"),
    "noise in pairs": ("reparameterize", _repeated_noise, "the correlation of neighbours in the noise"),
    "KL": ("latent", lambda right, *a: (right(*a)[0], 1.01 * right(*a)[1]), r"size: the KL \("),
    "form": ("nll-gaussian-std", lambda right, *a: right(*a[:4], a[4].sqrt(), *a[5:]), "the value"),
    "gradient of a form": (
        "kl-softplus",
        lambda right, mu, scale, *a: right(mu, _HalvedGradient.apply(scale), *a),
        r"size: the gradient of logvar \(0\.\d+\)$",
    ),
    "gradient of a sample's form": (
        "latent-std",
        lambda right, mu, scale, *a: right(mu, _HalvedGradient.apply(scale), *a),
        r"size: the gradient of logvar \(0\.\d+\)$",
    ),
    "gradient of a prior": (
        "kl-prior",
        lambda right, *a: right(*a[:7], _HalvedGradient.apply(a[7]), a[8]),
        r"size: the gradient of prior_logvar \(0\.\d+\)$",
    ),
    "KL at the sample": (
        "latent-prior-sample",
        lambda right, *a: (lambda z, kl: (z, 1.01 * kl))(*right(*a)),
        r"size: the KL \(",
    ),
    "gradient at the sample": (
        "latent-prior-sample",
        lambda right, *a: right(*a[:6], _HalvedGradient.apply(a[6]), *a[7:]),
        r"size: the gradient of prior_mu \(0\.\d+\)$",
    ),
    "no mask": ("nll-gaussian-weight", lambda right, *a: right(*a[:8], torch.ones_like(a[8])), "the value"),
    "a mean for a sum": ("nll-gaussian-sum", lambda right, *a: (right(*a)[0] / 128,), "the value"),
    "values in another order": ("nll-gaussian-none", lambda right, *a: (right(*a)[0].flip(0),), "the values"),
    "gradient of a sum for one per sample": (
        "nll-gaussian-none",
        lambda right, *a: ((v := right(*a)[0]).detach() + (v - v.detach()).mean(),),
        r"the gradient of recon_x .*, the gradient of recon_logvar",
    ),
    "another mean": ("nll-gaussian-mean", lambda right, *a: (right(*a)[0] * 784,), "the value"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_answer_is_noticed(mistake: str) -> None:
    operation, spoil, message = WRONG[mistake]
    method = contestants.Method("wrong", "eager", spoilt(spoil), lambda model: lambda x: ())
    work = suite.OperationWork(Case("mnist-mlp", operation), CPU, torch.Generator().manual_seed(5))
    work.make_sets()
    with pytest.raises(checking.WrongAnswerError, match=message):
        work.enter(method)


def test_a_wrong_training_step_is_noticed() -> None:
    work = suite._StepWork(CPU, torch.Generator().manual_seed(5))
    work.make_sets()
    methods = [m for m in contestants.methods(Case("mnist-mlp", "step"), CPU) if m.family != "compile"]
    for method in methods:
        assert work.enter(method)[1] <= checking.TOLERANCES["float32"]

    def twice(model: contestants.MLP) -> contestants.Function:
        right = methods[0].step(model)
        return lambda x: (_HalvedGradient.apply((out := right(x))[0]), *out[1:])

    with pytest.raises(checking.WrongAnswerError, match=r"size: the gradient of fc1.weight \(0\.\d"):
        work.enter(methods[0]._replace(step=twice))


def test_a_step_is_a_step() -> None:
    work = suite._StepWork(CPU, torch.Generator().manual_seed(5))
    work.make_sets()
    models = []
    method = contestants.methods(Case("mnist-mlp", "step"), CPU)[0]

    def watched(model: contestants.MLP) -> contestants.Function:
        models.append(model)
        return method.step(model)

    contestant, _ = work.enter(method._replace(step=watched))
    before = copy.deepcopy(models[0].state_dict())
    contestant.work(1)
    assert all(not torch.equal(value, before[name]) for name, value in models[0].state_dict().items())


# --- likelihoods that the registry gets ---------------------------------------------------------------------------


def _shifted_laplace(recon_x: Tensor, x: Tensor, scale: Scale, shift: Tensor) -> Tensor:
    return ((recon_x - x).abs() + shift) * scale.inverse + scale.log


def add_new_operations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the benchmark know what the registry has got since."""
    new = {name: spec for name, spec in cases.operations().items() if name not in cases.SPECS}
    for name, spec in new.items():
        monkeypatch.setitem(cases.SPECS, name, spec)
        monkeypatch.setitem(cases.OPERATIONS, name, spec.description)
    return list(new)


@pytest.fixture
def another_likelihood(monkeypatch: pytest.MonkeyPatch) -> str:
    """The operation of a likelihood that nobody has written kernels for."""
    inputs, pairs, forms = ("recon_x", "x", "log_scale", "shift"), ((0, 2),), {"logscale": PLAIN, "b": Form("linear")}
    formula = LIKELIHOODS["laplace"]._replace(
        name="throwaway_nll", inputs=inputs, elements=_shifted_laplace, pairs=pairs, forms=forms, likelihood="throwaway"
    )
    monkeypatch.setitem(FORMULAS, formula.name, formula)
    monkeypatch.setitem(LIKELIHOODS, "throwaway", formula)
    operation, of_form = add_new_operations(monkeypatch)
    assert of_form == f"{operation}-b"
    return operation


def test_a_likelihood_of_the_registry_is_an_operation(
    another_likelihood: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert another_likelihood == "nll-throwaway"
    assert main(["bench", "--list"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"  nll-throwaway +Throwaway negative log-likelihood, mean over the batch\n", out)
    assert "  eager/reference\n" in out
    path = tmp_path / "run.json"
    options = ["--presets", "2^8,video-latent", "--operations", another_likelihood, "--seconds", "0.01"]
    assert run_bench(*options, "--contestants", "eager,fusedvae/reference", "--json", path) == 0
    (entry,) = json.loads(path.read_text())["cases"]
    assert (entry["preset"], entry["traffic_bytes"]) == ("2^8", 4 * 5 * 256)
    assert [c["name"] for c in entry["contestants"]] == ["eager/reference", "fusedvae/reference"]
    assert {c["status"] for c in entry["contestants"]} == {"ok"}


def entered_by(method_names: str, case: Case) -> dict[str, float]:
    """The errors of the contestants whose names begin so."""
    work = suite.OperationWork(case, CPU, torch.Generator().manual_seed(5))
    work.make_sets()
    with suite._autocast(case, CPU):
        return {m.name: work.enter(m)[1] for m in contestants.methods(case, CPU) if m.name.startswith(method_names)}


@pytest.mark.usefixtures("small_models")
def test_contestants_agree_on_a_likelihood_of_the_registry(
    another_likelihood: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "_CHUNK", 30)
    combinations = [list(cases.DTYPES), list(cases.MEMORY_FORMATS), list(cases.DIRECTIONS)]
    found = cases.cases(list(cases.MODELS), [another_likelihood, f"{another_likelihood}-b"], *combinations)
    assert {case.preset for case in found} == {name for name, preset in cases.MODELS.items() if preset.x}
    for case in found:
        errors = entered_by("eager", case) | entered_by("fusedvae/reference", case)
        assert set(errors) == {"eager/reference", "fusedvae/reference"}
        assert all(0 <= error <= checking.TOLERANCES[case.dtype] for error in errors.values())


@pytest.mark.parametrize("number", [0, 2, 3])
@pytest.mark.parametrize("preset", ["mnist-mlp", "single-cell-2k"])
def test_a_wrong_gradient_of_a_likelihood_of_the_registry_is_noticed(
    another_likelihood: str, preset: str, number: int
) -> None:
    def operation(name: str) -> contestants.Function:
        right = contestants.registered(name)

        def wrong(mu: None, logvar: None, *inputs: Tensor) -> tuple[Tensor, ...]:
            return right(mu, logvar, *(_HalvedGradient.apply(t) if i == number else t for i, t in enumerate(inputs)))

        return wrong

    work = suite.OperationWork(Case(preset, another_likelihood), CPU, torch.Generator().manual_seed(5))
    work.make_sets()
    name = {0: "recon_x", 2: "recon_logvar", 3: "extra"}[number]
    with pytest.raises(checking.WrongAnswerError, match=rf"size: the gradient of {name} \(0\.\d+\)$"):
        work.enter(contestants.Method("wrong", "eager", operation, lambda model: lambda x: ()))


def test_a_wrong_value_of_a_likelihood_of_the_registry_is_noticed(another_likelihood: str) -> None:
    def operation(name: str) -> contestants.Function:
        return lambda *arguments: (contestants.registered(name)(*arguments)[0] + 784 * math.log(2),)

    work = suite.OperationWork(Case("mnist-mlp", another_likelihood), CPU, torch.Generator().manual_seed(5))
    work.make_sets()
    with pytest.raises(checking.WrongAnswerError, match=r"size: the value \("):
        work.enter(contestants.Method("wrong", "eager", operation, lambda model: lambda x: ()))


def test_a_form_of_the_registry_has_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NORMAL_FORMS, "log_sigma", Form("exponential", squared=True))
    added = add_new_operations(monkeypatch)
    assert added == ["nll-gaussian-log_sigma", "kl-log_sigma", "latent-log_sigma"]
    for operation in added:
        assert contestants.usual_idiom(operation) == "reference"
        assert_every_contestant_is_right(Case("2^8", operation))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_likelihood_of_the_registry_can_be_compiled(another_likelihood: str) -> None:
    assert list(entered_by("compile", Case("2^8", another_likelihood))) == ["compile/reference"]


# --- the command ------------------------------------------------------------------------------------------------


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bench("--presets", "2^8,2^10", *FAST[2:]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["vs", "eager", "(95", "%)"]
    assert lines[1].startswith("2^8 kl  (256 elements, from cache, a copy reaches ")
    assert re.match(r"  eager/handwritten +1\.00x +1\.00-1\.00 ", lines[2])
    assert any(line.startswith("  fusedvae/reference ") for line in lines)
    right = 2 * (1 + len([b for b in fusedvae.backends().values() if "cpu" in b.devices]))
    assert f"2 cases: {right} right answers, 0 wrong, 0 failed to run" in lines


def test_json_has_every_figure_and_the_environment(recorded: Path) -> None:
    result = json.loads(recorded.read_text())
    assert result["environment"]["versions"]["torch"] == torch.__version__
    assert result["settings"]["presets"] == ["2^8"]
    (entry,) = result["cases"]
    assert (entry["preset"], entry["operation"], entry["dtype"], entry["from"]) == ("2^8", "kl", "float32", "cache")
    assert entry["traffic_bytes"] == 4 * 4 * 256
    eager, *ours = entry["contestants"]
    assert [eager["name"], eager["family"]] == ["eager/handwritten", "eager"]
    assert entry["fastest"] == {"eager": "eager/handwritten"}
    for contestant in (eager, *ours):
        seconds = contestant["seconds"]
        assert 5 <= seconds["rounds"] == len(contestant["times"]) <= 9
        assert seconds["q1"] <= seconds["median"] <= seconds["q3"]
        assert seconds["median"] == pytest.approx(np.median(contestant["times"]), rel=1e-4)
        value, low, high = contestant["ratios"]["eager"]
        assert low <= value <= high
        assert value == pytest.approx(eager["seconds"]["median"] / seconds["median"])
        assert contestant["bytes_per_second"] == pytest.approx(entry["traffic_bytes"] / seconds["median"])
        assert contestant["share_of_copy"] == pytest.approx(
            contestant["bytes_per_second"] / entry["copy_bytes_per_second"]
        )
        assert contestant["memory_bytes"] >= 2 * 4 * 256
        assert contestant["launches"] > 0


def test_the_command_of_a_run_measures_the_same(recorded: Path, tmp_path: Path) -> None:
    command = json.loads(recorded.read_text())["command"]
    assert command.startswith("fusedvae bench --presets ")
    assert run_bench(*shlex.split(command)[2:], "--json", tmp_path / "again.json") == 0
    first, again = (json.loads(path.read_text()) for path in (recorded, tmp_path / "again.json"))
    assert again["settings"] == first["settings"]
    assert again["command"] == command


def test_csv_has_what_json_has(recorded: Path, tmp_path: Path) -> None:
    assert run_bench("--from", recorded, "--csv", tmp_path / "run.csv") == 0
    result = json.loads(recorded.read_text())
    rows = list(csv.DictReader(io.StringIO((tmp_path / "run.csv").read_text())))
    (entry,) = result["cases"]
    assert [row["contestant"] for row in rows] == [contestant["name"] for contestant in entry["contestants"]]
    for row, contestant in zip(rows, entry["contestants"], strict=True):
        assert row["preset"] == "2^8"
        assert float(row["seconds"]) == contestant["seconds"]["median"]
        found = [float(row[name]) for name in ("vs_eager", "vs_eager_low", "vs_eager_high")]
        assert found == contestant["ratios"]["eager"]
        assert float(row["share_of_copy"]) == contestant["share_of_copy"]
        assert int(row["memory_bytes"]) == contestant["memory_bytes"]


def test_a_recorded_run_is_shown_as_it_was(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bench("--from", recorded, "--json", tmp_path / "copy.json") == 0
    assert "2^8 kl  (256 elements" in capsys.readouterr().out
    assert (tmp_path / "copy.json").read_bytes() == recorded.read_bytes()


class _References(HTMLParser):
    """What a page refers to, and whether its elements are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.outside += [value for name, value in attributes if name in ("src", "href", "xlink:href") and value]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_needs_nothing_beside_it(tmp_path: Path) -> None:
    options = ["--presets", "2^8,2^10,mnist-mlp", "--operations", "nll,step", *FAST[4:]]
    assert run_bench(*options, "--report", tmp_path / "report") == 0
    assert [path.name for path in (tmp_path / "report").iterdir()] == [bench.REPORT]
    page = (tmp_path / "report" / bench.REPORT).read_text()
    parser = _References()
    parser.feed(page)
    assert parser.open == []
    assert all(reference.startswith("#") for reference in parser.outside)
    assert not parser.seen & {"script", "link", "img", "iframe", "object"}
    assert "url(" not in re.sub(r"url\(#", "", page)
    for name in ("speedup-by-size", "share-by-size", "speedup-by-preset", "memory-by-preset", "step"):
        assert f'<figure id="{name}">' in page
    for case in ("2^8 nll", "mnist-mlp step", "mnist-mlp nll"):
        assert f"<summary>{case} " in page
    assert "Source: pytorch/examples" in page


def test_plots_of_the_same_run_are_the_same(recorded: Path) -> None:
    result = json.loads(recorded.read_text())
    result["cases"].append({**result["cases"][0], "preset": "2^10"})
    assert [plot.name for plot in report.plots(result)] == ["speedup-by-size", "share-by-size"]
    assert report.plots(result) == report.plots(result)


@pytest.fixture
def with_a_wrong_contestant(monkeypatch: pytest.MonkeyPatch) -> None:
    original = suite.methods

    def methods(case: Case, device: torch.device) -> list[contestants.Method]:
        wrong = contestants.Method("eager/wrong", "eager", spoilt(WRONG["value"][1]), lambda model: lambda x: ())
        return [*original(case, device), wrong]

    monkeypatch.setattr(suite, "methods", methods)


@pytest.mark.usefixtures("with_a_wrong_contestant")
def test_a_wrong_contestant_gets_no_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--json", tmp_path / "run.json", "--csv", tmp_path / "run.csv", "--report", tmp_path]
    assert run_bench(*FAST, *options, "--contestants", "eager/handwritten,eager/wrong") == 1
    out = capsys.readouterr().out
    assert re.search(r"  eager/wrong +WRONG: off by more than 0.0002 of its size: .*the value \(0\.00", out)
    assert "1 right answers, 1 wrong, 0 failed" in out
    right, wrong = json.loads((tmp_path / "run.json").read_text())["cases"][0]["contestants"]
    assert right["status"] == "ok"
    assert set(wrong) == {"name", "family", "status", "reason"}
    assert wrong["status"] == "wrong"
    rows = list(csv.DictReader(io.StringIO((tmp_path / "run.csv").read_text())))
    assert [(row["status"], row["seconds"]) for row in rows if row["contestant"] == "eager/wrong"] == [("wrong", "")]
    assert "wrong: off by more than 0.0002 of its size" in (tmp_path / bench.REPORT).read_text()


@pytest.mark.usefixtures("with_a_wrong_contestant")
def test_a_wrong_answer_is_said_of_a_case_that_could_not_be_timed_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interleaved(*arguments: object, **options: object) -> None:
        raise RuntimeError("out of memory\nand a long story")

    monkeypatch.setattr(suite, "interleaved", interleaved)
    path = tmp_path / "run.json"
    assert run_bench(*FAST, "--json", path, "--contestants", "eager/handwritten,eager/wrong", "--report", tmp_path) == 1
    out = capsys.readouterr().out
    assert "2^8 kl  skipped: RuntimeError: out of memory\n" in out
    assert re.search(r"  eager/wrong +WRONG: off by more", out)
    assert re.search(r"  eager/handwritten +FAILED: RuntimeError: out of memory\n", out)
    assert "0 right answers, 1 wrong, 1 failed" in out
    assert run_bench("--from", path) == 1


def test_a_contestant_that_cannot_run_is_no_wrong_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(right: contestants.Function, *arguments: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("no compiler\nand a long story")

    method = contestants.Method("compile/broken", "compile", spoilt(broken), lambda model: lambda x: ())
    original = suite.methods
    monkeypatch.setattr(suite, "methods", lambda case, device: [*original(case, device), method])
    assert run_bench(*FAST, "--contestants", "eager/handwritten,compile/broken") == 0
    assert "  compile/broken                     FAILED: RuntimeError: no compiler\n" in capsys.readouterr().out


def test_an_interrupted_run_has_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = suite._measure_case

    def interrupted(case: Case, *rest: object) -> suite.Result | None:
        if case.preset == "2^10":
            os.kill(os.getpid(), signal.SIGINT)
        return original(case, *rest)

    monkeypatch.setattr(suite, "_measure_case", interrupted)
    path = tmp_path / "run.json"
    assert run_bench("--presets", "2^8,2^10,2^12", *FAST[2:], "--json", path) == 130
    assert "interrupted after 1 of 3 cases" in capsys.readouterr().out
    assert [entry["preset"] for entry in json.loads(path.read_text())["cases"]] == ["2^8"]


def test_rounds_before_an_interruption_count() -> None:
    settings = suite.Settings(
        ["2^8"], ["kl"], ["float32"], ["contiguous"], ["both"], ["eager/handwritten"], "cpu", 1, 9.0, 0
    )
    answers = iter([False] * 6 + [True] * 9)
    result = suite.new_result(settings, "", {})
    assert not suite.measure(settings, result, stop=lambda: next(answers))
    (entry,) = result["cases"]
    assert len(entry["contestants"][0]["times"]) == 4


def test_a_case_that_does_not_fit_is_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "available_bytes", lambda device: 2**20)
    assert run_bench("--presets", "2^20", *FAST[2:], "--csv", tmp_path / "run.csv", "--report", tmp_path) == 0
    reason = "skipped: needs about 0.2 GiB, 0.0 GiB are available"
    assert f"2^20 kl  {reason}\n" in capsys.readouterr().out
    (row,) = csv.DictReader(io.StringIO((tmp_path / "run.csv").read_text()))
    assert row["status"] == "skipped"


def calibrated(*middles: tuple[float, float]) -> suite.Result:
    """A result whose cases have calibration loops of these medians and spreads."""
    found = [{"calibration": {"median": m, "q1": m, "q3": m * (1 + spread)}} for m, spread in middles]
    result = {"cases": [*found, {"status": "skipped"}]}
    suite.judge_noise(result)
    return result


def test_noise_is_what_varies_or_takes_longer() -> None:
    quiet = calibrated((1.0, 0.01), (1.1, 0.02), (1.0, 0.03), (0.9, 0.04), (1.0, 0.5))
    assert quiet["noise"] == {"spread": pytest.approx(0.03), "noisy_cases": 1, "noisy": False}
    assert [entry.get("noisy") for entry in quiet["cases"]] == [False, False, False, False, True, None]
    slow = calibrated((1.0, 0.01), (2.0, 0.01), (1.0, 0.5))
    assert [entry.get("noisy") for entry in slow["cases"]] == [False, True, True, None]
    assert slow["noise"]["noisy"] is True


def test_a_noisy_machine_is_said(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(recorded.read_text())
    result["cases"][0]["calibration"] = {"median": 1.0, "q1": 1.0, "q3": 1.5}
    suite.judge_noise(result)
    recorded.write_text(json.dumps(result))
    assert run_bench("--from", recorded, "--report", tmp_path) == 0
    out = capsys.readouterr().out
    assert "NOISY MACHINE: in 1 cases, a loop that never changes took longer" in out
    assert re.search(r"^2\^8 kl .*, NOISY\)$", out, re.MULTILINE)
    page = (tmp_path / bench.REPORT).read_text()
    assert "The machine was too busy for these figures to mean much." in page
    assert re.search("2\\^8 kl <small>[^<]*; noisy</small>", page)


def test_where_the_package_loses_is_said(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(recorded.read_text())
    ours = {**result["cases"][0]["contestants"][1], "name": "fusedvae/mine", "family": "fused"}
    result["cases"][0]["contestants"] = [{**ours, "ratios": {"eager": [0.5, 0.4, 0.6], "compile": [2.0, 1.9, 2.1]}}]
    recorded.write_text(json.dumps(result))
    run_bench("--from", recorded)
    out = capsys.readouterr().out
    assert "slower than eager: 2^8 kl, fusedvae/mine: 0.50x (0.40-0.60)\n" in out
    assert "slower than compile" not in out


def test_directions() -> None:
    for direction in cases.DIRECTIONS:
        assert run_bench(*FAST, "--operations", "latent,elbo", "--directions", direction) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_contestants(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    assert run_bench(*FAST, "--contestants", "eager/*,compile/handwritten,fusedvae/*", "--json", path) == 0
    (entry,) = json.loads(path.read_text())["cases"]
    compiled = {c["name"]: c for c in entry["contestants"] if c["family"] == "compile"}
    assert compiled["compile/handwritten"]["status"] == "ok"
    assert entry["fastest"]["compile"] == "compile/handwritten"
    assert all("compile" in c["ratios"] for c in entry["contestants"])


COMPILES = """
import torch
from fusedvae.cli.bench.contestants import compile_for_processor
x = torch.arange(1024.0)
assert torch.equal(compile_for_processor(lambda x: x + 1.0)(x), x + 1.0)
"""


@pytest.mark.slow
def test_compiled_code_of_short_vectors_is_not_found_for_long_ones(tmp_path: Path) -> None:
    """It would write past the end of its result."""
    if "avx512" not in INSTRUCTION_SETS:
        pytest.skip("needs AVX-512")
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    found = []
    for capability in ("avx2", "avx512"):
        environment["ATEN_CPU_CAPABILITY"] = capability
        subprocess.run([sys.executable, "-c", COMPILES], env=environment, check=True)
        graphs = {path.parent.name for path in tmp_path.glob("fxgraph/*/*/*")}
        assert graphs
        found.append(graphs)
    assert len(found[1]) == len(found[0]) + 1


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    options = ["--device", "cuda", "--operations", "reparameterize,elbo", "--contestants", "eager*,fusedvae"]
    assert run_bench(*FAST, *options, "--json", path) == 0
    for entry in json.loads(path.read_text())["cases"]:
        found = {contestant["name"]: contestant for contestant in entry["contestants"]}
        for name in ("eager/handwritten", "eager/handwritten+graph", "fusedvae/reference"):
            assert found[name]["status"] == "ok"
            assert found[name]["launches"] > 0
        assert found["eager/handwritten"]["memory_bytes"] > 0
        assert found["eager/handwritten+graph"]["memory_bytes"] is None
        if "PYTEST_XDIST_WORKER" not in os.environ:  # others on the GPU would change the times
            eager, graph = found["eager/handwritten"], found["eager/handwritten+graph"]
            assert graph["seconds"]["median"] < eager["seconds"]["median"]


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    out = capsys.readouterr().out
    for name in (*cases.MODELS, cases.SWEEP, *cases.OPERATIONS, *cases.DTYPES, *cases.DIRECTIONS):
        assert re.search(rf"\b{name}\b", out)
    for preset in cases.MODELS.values():
        assert f"source: {preset.source}" in out
    for name in (
        "eager/distributions",
        "compile/handwritten",
        "compile-max-autotune/handwritten",
        "fusedvae/reference",
    ):
        assert f"\n  {name}\n" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--presets", "mnist"], "argument --presets: expected some of mnist-mlp, .* got 'mnist'"),
        (["--operations", "kl,loss"], "argument --operations: expected some of reparameterize, .* got 'loss'"),
        (["--dtypes", "int8"], "argument --dtypes: expected some of float32, bfloat16, float16, .* got 'int8'"),
        (["--seconds", "0"], "argument --seconds: expected a number above 0, got '0'"),
        (["--seconds", "nan"], "argument --seconds: expected a number above 0, got 'nan'"),
        (["--threads", "1.5"], "argument --threads: expected an integer of at least 1, got '1.5'"),
        (["--seed", "-1"], "argument --seed: expected an integer of at least 0, got '-1'"),
        (["--quick", "--full"], "argument --full: not allowed with argument --quick"),
        (["--device", "meta"], "--device meta cannot be used: .*"),
        (["--contestants", "theirs"], "nothing to measure: .*"),
        (["--presets", "video-latent", "--operations", "elbo"], "nothing to measure: .*"),
        (["--json", "/nowhere/run.json"], "--json: cannot write /nowhere/run.json: there is no directory /nowhere"),
        (["--csv", "/"], "--csv: cannot write /: is a directory"),
        (["--compare", "/nowhere/run.json"], "cannot read /nowhere/run.json: .*No such file.*"),
    ],
)
def test_bad_input_is_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bench(*options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(f"fusedvae bench: error: {message}\n", captured.err)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": 0, "cases": []}'])
def test_files_that_are_no_runs(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    path.write_text(content)
    assert run_bench("--from", path) == 2
    assert re.fullmatch(r"fusedvae bench: error: .*run\.json.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("choice", [["--presets", "cifar-conv"], ["--threads", "1"], ["--quick"], ["--list"]], ids=str)
def test_a_run_that_is_there_is_shown_whole(
    recorded: Path, capsys: pytest.CaptureFixture[str], choice: list[str]
) -> None:
    assert run_bench("--from", recorded, *choice) == 2
    message = f"--from uses what was measured, all of it: it takes no {choice[0]}"
    assert capsys.readouterr().err == f"fusedvae bench: error: {message}\n"


def test_a_report_where_a_file_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run_bench(*FAST, "--report", tmp_path / "file") == 2
    assert "--report: cannot make" in capsys.readouterr().err


# --- comparing --------------------------------------------------------------------------------------------------


def result_of(ours: list[float] | None, eager: list[float], *, spread: float = 0.0, status: str = "ok") -> suite.Result:
    """A run of one case with these times."""
    contestant = {"name": "fusedvae/native", "family": "fused", "status": status}
    if status == "ok":
        contestant["times"] = ours
    control = {"name": "eager/handwritten", "family": "eager", "status": "ok", "times": eager}
    entry = {**vars(Case("2^8", "kl")), "status": "done", "contestants": [control] + ([contestant] if ours else [])}
    return {
        "date": "then",
        "noise": {"spread": spread, "noisy_cases": 0, "noisy": False},
        "settings": {"device": "cpu", "threads": 1},
        "environment": {},
        "cases": [entry],
    }


def times(median: float) -> list[float]:
    return list(median * np.random.default_rng(0).lognormal(0, 0.02, 50))


@pytest.mark.parametrize(
    ("now", "eager", "verdict"),
    [
        (1.0, 2.0, "same"),
        (1.3, 2.0, "slower"),
        (0.7, 2.0, "faster"),
        (1.3, 2.6, "same"),  # the machine is slower
        (1.0, 1.4, "slower"),  # the machine is faster, and this is not
        (1.03, 2.0, "same"),  # too little to matter
    ],
)
def test_verdicts(now: float, eager: float, verdict: str) -> None:
    (found,) = compare.verdicts(result_of(times(1.0), times(2.0)), result_of(times(now), times(eager)))
    assert (found.case, found.contestant, found.verdict) == (Case("2^8", "kl"), "fusedvae/native", verdict)
    assert found.is_regression == (verdict == "slower")
    assert found.change is not None
    assert found.change.value == pytest.approx(now / 1.0 * 2.0 / eager, rel=1e-6)


def test_noise_hides_changes() -> None:
    wide = list(np.random.default_rng(0).lognormal(0, 1, 20))
    (found,) = compare.verdicts(result_of(wide, times(2.0)), result_of([1.2 * t for t in wide[::-1]], times(2.0)))
    assert found.verdict == "same"
    (found,) = compare.verdicts(result_of(times(1.0), times(2.0), spread=0.5), result_of(times(1.3), times(2.0)))
    assert found.verdict == "same"


def test_contestants_that_are_new_gone_or_wrong() -> None:
    fine, absent = result_of(times(1.0), times(2.0)), result_of(None, times(2.0))
    wrong = result_of(times(1.0), times(2.0), status="wrong")
    for old, new, verdict in (
        (absent, fine, "new"),
        (fine, absent, "gone"),
        (fine, wrong, "broken"),
        (wrong, fine, "new"),
    ):
        (found,) = compare.verdicts(old, new)
        assert found.verdict == verdict
        assert found.is_regression == (verdict == "broken")


def test_comparing_with_a_run_measures_what_it_measured(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads(recorded.read_text())
    ours = next((c for c in result["cases"][0]["contestants"] if c["family"] == "fused"), None)
    if ours is None:
        pytest.skip("no compiled extension here")
    assert run_bench("--from", recorded, "--compare", recorded) == 0
    assert "  1 of 1 unchanged beyond the noise\n" in capsys.readouterr().out

    result["date"] = "long ago"
    result["noise"]["spread"] = 0.0
    result["environment"]["versions"]["torch"] = "1.0"
    ours["times"] = [t / 1000 for t in ours["times"]]
    (tmp_path / "fast.json").write_text(json.dumps(result))
    path = tmp_path / "now.json"
    assert run_bench("--compare", tmp_path / "fast.json", "--json", path) == 1
    out = capsys.readouterr().out
    assert "compared with the run of long ago:" in out
    assert f"another version of torch: 1.0, now {torch.__version__}" in out
    assert re.search(r"SLOWER  2\^8 kl, fusedvae/native: takes \d+\.\d\d times as long \(", out)
    assert json.loads(path.read_text())["settings"] == result["settings"]


# --- what documents and scripts have ----------------------------------------------------------------------------


def test_documented_commands_are_understood() -> None:
    """Their presets, operations and contestants are there: test_documentation.py has only the parser look at them."""
    for document in ("docs/benchmarks.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text()
        commands = re.findall(r"^ *(fusedvae bench .*?)(?: +#.*)?$", text, re.MULTILINE)
        assert commands
        for command in commands:
            words = shlex.split(command)[1:]
            if "--compare" not in words:
                assert main([*words, "--list"]) == 0


def test_the_default_leaves_out_what_takes_long() -> None:
    assert bench._STANDARD["operations"] == bench._FULL["operations"] == list(cases.STANDARD)
    assert [operation for operation in cases.OPERATIONS if operation in cases.STANDARD] == list(cases.STANDARD)


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What benchmarks/family.py has."""
    if "native" not in fusedvae.backends():
        pytest.skip("no compiled extension here")
    monkeypatch.setattr(cases, "PRESETS", dict(cases.PRESETS))  # the script adds to it
    return runpy.run_path(str(ROOT / "benchmarks" / "family.py"))


def test_the_family_is_measured(
    family: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "family.json"
    options = ["--no-compile", "--shapes", "64x64", "--threads", "1", "--seconds", "0.01", "--json", str(path)]
    monkeypatch.setattr("sys.argv", ["family.py", "--operations", "nll,nll-mse,nll-gaussian-std", *options])
    assert family["main"]() == 0
    out = capsys.readouterr().out
    rows = {row["operation"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["nll", "nll-mse", "nll-gaussian-std"]
    for operation, row in rows.items():
        assert row["elements"] == 4096
        assert row["problems"] == {}
        assert set(row["ratios"]) == ({"eager", "form"} if operation == "nll-gaussian-std" else {"eager"})
        value, low, high = row["ratios"]["eager"]
        assert low <= value <= high
        assert value == pytest.approx(row["microseconds"]["eager"] / row["microseconds"]["fusedvae"])
        assert re.search(rf"^{operation} +4,096 ", out, re.MULTILINE)
    assert {operation: row["written"] for operation, row in rows.items()} == {
        "nll": 7,  # the difference, its square, -logvar, its exponential, a product, a sum of two, that of all
        "nll-mse": 1,
        "nll-gaussian-std": 7,
    }


def test_every_form_has_a_usual_one(family: dict) -> None:
    usual = {name: family["usual_form"](name) for name, spec in cases.SPECS.items() if spec.kind != "step"}
    assert {name for name in usual if usual[name] != name} == set(cases.groups()["forms"])
    assert usual["nll-laplace-scale"] == "nll-laplace"
    assert (usual["nll-gaussian-clamp"], usual["kl-softplus"], usual["latent-var"]) == ("nll", "kl", "latent")


@pytest.mark.parametrize(
    ("name", "value", "written", "elements", "verdict"),
    [
        ("eager", 2.5, 7, 2**21, "MISSED"),
        ("eager", 2.5, 3, 2**21, ""),
        ("eager", 2.5, 7, 2**12, ""),
        ("eager", 3.5, 7, 2**21, ""),
        ("eager", 0.8, 1, 2**12, "MISSED"),
        ("compile", 0.8, 7, 2**12, "MISSED"),
        ("compile", 1.05, 7, 2**21, "?"),
        ("form", 1.2, 7, 2**21, ""),
        ("form", 1.3, 7, 2**21, "?"),
        ("form", 1.6, 7, 2**12, "MISSED"),
    ],
)
def test_goals_of_the_family(family: dict, name: str, value: float, written: int, elements: int, verdict: str) -> None:
    ratios = {name: statistics.Estimate(value, 0.9 * value, 1.1 * value)}
    assert family["Row"]("kl", elements, written, {}, ratios, {}).verdict(name) == verdict


# --- recorded results -------------------------------------------------------------------------------------------


def test_the_page_has_the_figures_of_its_recorded_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    figures = runpy.run_path(str(ROOT / "benchmarks" / "figures.py"))
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    again, made = figures["generated"](text)
    assert again == text
    assert len(figures["BLOCK"].findall(text)) == 5
    assert made
    for name in made:
        assert f"](figures/{name}.svg)" in text
        assert (ROOT / "docs" / "figures" / f"{name}.svg").is_file()


def test_texts_of_figures() -> None:
    assert [table.seconds_text(s) for s in (1.5, 0.0123, 4.56e-6)] == ["1.5 s", "12.3 ms", "4.56 µs"]
    assert [table.bytes_text(b) for b in (12, 2048, 3 * 2**20, 2**31)] == ["12 B", "2 KiB", "3 MiB", "2 GiB"]
