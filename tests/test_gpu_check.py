"""benchmarks/gpu_check.py, as far as it runs without a GPU."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fusedvae
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
