"""benchmarks/gpu_check.py, as far as it runs without a GPU."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import threads
from torch import Tensor

import fusedvae
from fusedvae import functional
from fusedvae.cli.bench import cases, contestants, suite

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu_check.py"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs a checkout")


def run(out: Path, *arguments: str) -> tuple[int, dict, str]:
    """Exit status, gpu_check.json and gpu_check.txt of a rehearsal."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", *arguments],
        env={**os.environ, "OUT": str(out)},
        capture_output=True,
        text=True,
    )
    assert (out / "gpu_check.json").exists(), done.stderr
    return done.returncode, json.loads((out / "gpu_check.json").read_text()), (out / "gpu_check.txt").read_text()


@pytest.mark.slow
def test_a_rehearsal_times_and_exercises_every_operation(tmp_path: Path) -> None:
    status, report, text = run(tmp_path, "--steps", "build,speed,exercise")
    steps = report["steps"]
    assert status == 0, text
    assert steps["build"] == {"skipped": "needs a GPU"}
    found = steps["speed"]["found"].values()
    assert {(c["operation"], c["dtype"]) for c in found} == {
        (operation, dtype) for operation in cases.OPERATIONS if operation != "step" for dtype in ("float32", "bfloat16")
    }
    for case in found:
        assert {"eager", "copy", "native"} <= set(case["microseconds"])
        assert case["problems"] == {}
        assert all(0 < time < 1e7 for time in case["microseconds"].values())
    assert steps["exercise"]["found"]["native torch.float16"] == "done"
    assert "elbo bfloat16" in text


def test_a_step_without_time_fails_and_the_next_is_reported_too(tmp_path: Path) -> None:
    status, report, text = run(tmp_path, "--steps", "exercise,streams,speed", "--minutes", "0.01")
    assert status == 1
    assert list(report["steps"]) == ["exercise", "streams", "speed"]
    assert report["steps"]["exercise"]["reason"] == report["steps"]["speed"]["reason"] == "no time was left"
    assert "exercise      FAILED: no time was left" in text
    assert "streams       skipped: needs a GPU" in text


def times_of_kl(monkeypatch: pytest.MonkeyPatch, out: Path, seconds: float) -> dict:
    """What the step "speed" reports when it must exit with an error."""
    script = runpy.run_path(str(SCRIPT))
    monkeypatch.setattr(cases, "OPERATIONS", {"kl": ""})
    report = script["Report"](out / "speed.json")
    with pytest.raises(SystemExit) as exit:
        script["speed"](report, "cpu", time.time() + seconds)
    return {"message": exit.value.code, **report.content}


def test_a_backend_that_is_wrong_or_fails_gets_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def spoilt(method: contestants.Method) -> contestants.Method:
        def operation(name: str) -> contestants.Function:
            return lambda *arguments: tuple(1.1 * value for value in method.operation(name)(*arguments))

        return method if method.family == "eager" else method._replace(operation=operation)

    if "native" not in fusedvae.backends():
        pytest.skip("no compiled extension here")
    original = suite.methods
    monkeypatch.setattr(suite, "methods", lambda case, device: [spoilt(m) for m in original(case, device)])
    found = times_of_kl(monkeypatch, tmp_path, 60)
    assert found["message"].startswith("wrong or failed: kl float32 2^14, native")
    for dtype in ("float32", "bfloat16"):
        case = found[f"kl {dtype} 2^14"]
        assert case["problems"]["native"].startswith("off by more than")
        assert set(case["microseconds"]) == {"eager", "copy"}


def test_times_that_time_does_not_suffice_for_are_no_success(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert times_of_kl(monkeypatch, tmp_path, 1) == {"message": "no time was left from kl float32 2^14 on"}


@pytest.mark.parametrize("step", ["first_calls", "factors", "none", "training", "likelihoods"])
def test_a_rehearsal_of_what_is_right_on_the_cpu_too(step: str, tmp_path: Path) -> None:
    script = runpy.run_path(str(SCRIPT))
    report = script["Report"](tmp_path / "step.json")
    with threads(1):  # two are slow on a machine that has something else to do
        script[step](report, "cpu", time.time() + 60)
    assert report.failures == []
    assert json.loads((tmp_path / "step.json").read_text()) == report.content
    checked = {key: found for key, found in report.content.items() if not isinstance(found, dict)}
    assert set(checked.values()) <= {"right", "done"}
    if "native" in fusedvae.backends():
        assert any("native" in key for key in checked)
    for found in report.content.values():
        if isinstance(found, dict):
            assert found["problems"] == {}
            assert all(0 < microseconds < 1e7 for microseconds in found["microseconds"].values())
    table = list(script["TABLES"].get(step, lambda found: [])(report.content))
    assert len(table) > 1 or step == "first_calls" or "native" not in fusedvae.backends()


def test_a_wrong_gradient_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if "native" not in fusedvae.backends():
        pytest.skip("no compiled extension here")

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: Tensor) -> Tensor:
            return values.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 1.01 * grad

    original = functional.kl_standard_normal

    def spoilt(*arguments: Any, backend: str, **options: Any) -> Tensor:
        values = original(*arguments, backend=backend, **options)
        return Spoilt.apply(values) if backend == "native" else values

    monkeypatch.setattr(functional, "kl_standard_normal", spoilt)
    script = runpy.run_path(str(SCRIPT))
    report = script["Report"](tmp_path / "none.json")
    script["none"](report, "cpu", time.time() + 60)
    (failure,) = report.failures
    assert failure.startswith("kl 256x16, native: AssertionError: result 1")
    assert "native" not in report.content["kl 256x16"]["microseconds"]
    assert "native" in report.content["nll 256x16"]["microseconds"]


def test_what_has_a_goal_is_timed_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script, asked = runpy.run_path(str(SCRIPT)), []

    def timed(report: object, operation: str, dtype: str, exponent: int, rivals: list[str], *others: object) -> list:
        asked.append((f"{operation} {dtype} 2^{exponent}", rivals))
        return []

    monkeypatch.setitem(script["speed"].__globals__, "timed", timed)
    script["speed"](script["Report"](tmp_path / "speed.json"), "cuda", time.time() + 1000)
    goals = {goal.case for goal in script["GOALS"] if goal.step == "speed"}
    assert {case for case, _ in asked[: len(goals)]} == goals
    assert len(asked) > len(goals)
    assert all("compile" in rivals for _, rivals in asked)


def test_goals_are_reached_missed_or_not_measured() -> None:
    script = runpy.run_path(str(SCRIPT))
    times = {"eager": 800.0, "compile": 140.0, "copy": 91.0, "native": 100.0, "triton": 130.0}
    captured = {**times, "native, captured": 95.0, "triton, captured": 125.0}
    results = {
        "speed": {
            "found": {"elbo float32 2^26": {"microseconds": times}, "elbo bfloat16 2^26": {"microseconds": captured}}
        },
        "training": {"found": {script["TRAINING"]: {"microseconds": {"eager": 26.0, "native": 20.0}}}},
    }
    lines = list(script["goals_table"](results))
    bound = "elbo float32 2^26, {}'s time over ours at least {}: {} ({})"
    for verdict, *figures in (
        ("pass", "copy", "0.90", "0.91", "native"),
        ("MISSED", "copy", "0.90", "0.70", "triton"),
        ("MISSED", "compile", "1.50", "1.40", "native"),
        ("pass", "eager", "7.00", "8.00", "native"),
        ("MISSED", "eager", "7.00", "6.15", "triton"),
    ):
        assert f"{verdict:8}{bound.format(*figures)}" in lines
    # Kernels alone are a copy's rivals, where their time alone is known.
    of_copy, of_eager = ([line for line in lines if f"elbo bfloat16 2^26, {r}" in line] for r in ("copy", "eager"))
    assert [line.split(": ")[-1] for line in of_copy] == ["0.96 (native, captured)", "0.73 (triton, captured)"]
    assert [line.split(": ")[-1] for line in of_eager] == ["8.00 (native)", "6.15 (triton)"]
    assert "?       latent bfloat16 2^26, copy's time over ours at least 0.85: not measured" in lines
    assert lines[-1].startswith("pass    training step")
    assert lines[-1].endswith(": 1.30 (native)")
    assert all("not measured" in line for line in script["goals_table"]({}))


def test_figures_are_read_out_of_ncus_table() -> None:
    table = (
        "==PROF== Connected to process 7\n"
        '"ID","Process ID","Kernel Name","Context","Stream","Section Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","7","void fusedvae::latent<float, 4>(Task)","1","7","Command line profiler metrics",'
        '"dram__bytes_read.sum","byte","134,217,728"\n'
        '"0","7","void fusedvae::latent<float, 4>(Task)","1","7","Command line profiler metrics",'
        '"dram__throughput.avg.pct_of_peak_sustained_elapsed","%","91.50"\n'
    )
    figures_of = runpy.run_path(str(SCRIPT))["figures_of"]
    expected = {
        "kernel": "void fusedvae::latent<float, 4>(Task)",
        "bytes_read": 134217728.0,
        "dram_percent_of_peak": 91.5,
    }
    assert figures_of(table) == {"0": expected}
    assert figures_of("==ERROR== ERR_NVGPUCTRPERM\n") == {}


@pytest.mark.parametrize("workers", [False, True])
def test_outcomes_of_tests_are_read_and_failures_noted(
    tmp_path: Path, workers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = runpy.run_path(str(SCRIPT))
    source = tmp_path / "test_some.py"
    source.write_text(
        "import pytest\n"
        "@pytest.mark.gpu\n@pytest.mark.parametrize('k', [0, 1, 2])\ndef test_a(k): assert k < 2, 'k is 2'\n"
        "@pytest.mark.gpu\ndef test_b(): pytest.skip('not here')\n"
        "def test_c(): raise AssertionError\n"
    )

    class Check:
        out = tmp_path

        def run(self, log: str, command: list[str], seconds: float, **environment: str) -> dict:
            assert ("-n" in command) == workers
            with open(tmp_path / f"{log}.log", "w") as file:
                done = subprocess.run(
                    [*command[:-1], str(source)], env={**os.environ, **environment}, stdout=file, cwd=tmp_path
                )
            return {"ok": done.returncode == 0, "log": f"{log}.log"}

    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # this test itself may be a worker's
    if not workers:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = script["tests"](Check(), "test", "some")["found"]
    assert sorted(found["summary"].split(", ")) == ["1 failed", "1 skipped", "2 passed"]
    assert found["failures"] == ["test_some.py::test_a[2]: AssertionError: k is 2"]


def test_tests_come_in_an_order_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for all processes, and last: the tests' own order is no help where time does not suffice for all."""
    script = runpy.run_path(str(SCRIPT))

    def shuffled(order: str) -> list[int]:
        monkeypatch.setenv("GPU_CHECK_ORDER", order)
        items = list(range(100))
        script["pytest_collection_modifyitems"](items)
        return items

    assert sorted(shuffled("1")) == list(range(100))
    assert shuffled("1") == shuffled("1") != shuffled("2")
    monkeypatch.delenv("GPU_CHECK_ORDER")
    items = [3, 1, 2]
    script["pytest_collection_modifyitems"](items)
    assert items == [3, 1, 2]
