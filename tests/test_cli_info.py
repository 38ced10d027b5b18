"""``fusedvae info``: what it shows, and that it shows it whatever is missing."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedvae
from fusedvae import backend
from fusedvae.backend import native
from fusedvae.cli import info, main

RECORD = {
    "version": "1.2.3",
    "error": None,
    "cpu": ["baseline", "avx2"],
    "compiler": "g++ 99.1",
    "cuda": ["sm_80", "compute_80"],
    "cuda_compiler": "nvcc 99.2",
    "cuda_absent": None,
}


def shown(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["info", *options]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def write_record(monkeypatch: pytest.MonkeyPatch, folder: Path, content: str) -> None:
    (folder / "_build.json").write_text(content)
    monkeypatch.setattr(info, "BUILD_RECORD", folder / "_build.json")


def test_versions_threads_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys)
    assert text.startswith(f"fusedvae {fusedvae.__version__}\n")
    assert f"Python {platform.python_version()}, PyTorch {torch.__version__}, Triton " in text
    threads = torch.get_num_threads()
    assert f" {threads} CPU thread{'' if threads == 1 else 's'} (" in text
    assert f"\ncpu: {info._cpu_name()}\n  uses {backend.resolve('cpu')}: " in text
    for name in backend.NAMES:
        assert f"\n  {name:9}  " in text
    if not torch.cuda.is_available():
        assert "cuda: none (" in text


def test_json_has_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(shown(capsys, "--json"))
    assert set(found) == {"versions", "build", "platform", "threads", "openmp", "environment", "devices"}
    assert found["versions"]["fusedvae"] == fusedvae.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    runtime, working = native.BACKEND.openmp()
    assert found["openmp"] == {"runtime": runtime, "working": working}
    assert set(found["devices"]) == set(backend.device_types())
    cpu = found["devices"]["cpu"]
    assert cpu["uses"] == backend.resolve("cpu")
    assert list(cpu["backends"]) == list(backend.NAMES)
    available = [name for name, state in cpu["backends"].items() if state["available"]]
    assert available == [name for name, state in fusedvae.backends().items() if "cpu" in state.devices]
    for name, state in cpu["backends"].items():
        if state["available"]:
            assert state["description"] == backend.describe(name, "cpu")
            assert state["reason"] is None
        else:
            assert state["description"] is None
            assert state["reason"] == backend.unavailable(name, "cpu")


def test_the_instruction_set_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    if "native" not in fusedvae.backends():
        pytest.skip("no compiled extension here")
    assert f"native     {backend.describe('native', 'cpu')}\n" in shown(capsys)


@pytest.mark.parametrize(
    ("openmp", "line"),
    [
        (("/lib/libgomp.so.1", 2), "2 of them work in the C++ kernels: of /lib/libgomp.so.1"),
        ((None, 1), "1 of them work in the C++ kernels: no OpenMP runtime was found in the process"),
    ],
)
def test_the_threads_that_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, openmp: tuple[str | None, int], line: str
) -> None:
    if "native" not in fusedvae.backends():
        pytest.skip("no compiled extension here")
    monkeypatch.setattr(native.BACKEND, "openmp", lambda: openmp, raising=True)
    assert f"\n  {line}\n" in shown(capsys)


def test_what_was_compiled_in(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_record(monkeypatch, tmp_path, json.dumps(RECORD))
    text = shown(capsys)
    assert "CPU kernels for baseline, avx2 (g++ 99.1)\n" in text
    assert "CUDA kernels for sm_80, compute_80 (nvcc 99.2)\n" in text
    assert json.loads(shown(capsys, "--json"))["build"] == RECORD


def test_why_cuda_kernels_were_not_compiled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = {**RECORD, "cuda": [], "cuda_compiler": None, "cuda_absent": "no nvcc on PATH"}
    write_record(monkeypatch, tmp_path, json.dumps(record))
    assert "no CUDA kernels: no nvcc on PATH\n" in shown(capsys)


def test_why_nothing_was_compiled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_record(monkeypatch, tmp_path, json.dumps({"error": "no C++ compiler found", "cpu": []}))
    assert "compiled in\n  nothing: no C++ compiler found\n" in shown(capsys)


@pytest.mark.parametrize("content", [None, "", "{", "[1]"])
def test_without_a_readable_record(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    if content is None:
        monkeypatch.setattr(info, "BUILD_RECORD", tmp_path / "absent.json")
    else:
        write_record(monkeypatch, tmp_path, content)
    assert "no record of a build" in shown(capsys)
    assert json.loads(shown(capsys, "--json"))["build"] is None


def only_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(name: str, device_type: str, index: int | None = None) -> str | None:
        return None if name == "reference" else f"no {name} for {device_type} here"

    monkeypatch.setattr(info, "unavailable", unavailable)
    monkeypatch.setattr(backend, "unavailable", unavailable)


def test_the_reference_is_used_where_nothing_else_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    only_reference(monkeypatch)
    text = shown(capsys)
    assert "uses reference: the first available of native, triton, reference\n" in text
    assert "native     unavailable: no native for cpu here\n" in text
    assert "triton     unavailable: no triton for cpu here\n" in text
    assert "reference  plain PyTorch\n" in text


def test_a_choice_of_ones_own_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with fusedvae.use_backend("reference"):
        text = shown(capsys)
    if len(fusedvae.backends()) > 1:
        assert "uses reference: asked for by FUSEDVAE_BACKEND or fusedvae.use_backend\n" in text


def test_a_choice_that_does_not_serve_the_device_is_explained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(device_type: str) -> str:
        raise RuntimeError("backend 'triton' is unavailable for 'cpu' tensors: no chip")

    monkeypatch.setattr(info, "resolve", resolve)
    assert "uses nothing: backend 'triton' is unavailable for 'cpu' tensors: no chip\n" in shown(capsys)
    assert json.loads(shown(capsys, "--json"))["devices"]["cpu"]["uses"] is None


def test_gpus_are_listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    only_reference(monkeypatch)
    monkeypatch.setattr(info, "device_types", lambda: ("cpu", "cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {'AB'[index]}")
    text = shown(capsys)
    assert "\ncuda: GPU A, GPU B\n  uses reference: " in text
    assert "cuda: none" not in text


def test_the_environment_that_matters(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("OMP_NUM_THREADS", "3"), ("FUSEDVAE_CPU_ISA", "baseline")):
        monkeypatch.setenv(name, value)
        assert f"\n  {name}={value}\n" in shown(capsys)


def test_as_a_module_in_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fusedvae", "info", "--json"],
        cwd=Path(fusedvae.__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["versions"]["fusedvae"] == fusedvae.__version__


def test_unknown_options_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--yaml"]) == 2
    assert capsys.readouterr().err == "fusedvae info: error: unrecognized arguments: --yaml\n"
