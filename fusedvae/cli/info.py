"""Show versions, what was compiled in, and which backend each device uses, and why."""

from __future__ import annotations

import argparse
import json
import os
import platform
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..backend import NAMES, describe, device_types, resolve, unavailable
from ..backend.native import BACKEND, BUILD_RECORD, install_command
from ..version import __version__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    found = collect()
    print(json.dumps(found, indent=2) if arguments.json else _as_text(found))
    return 0


def collect() -> dict[str, Any]:
    """Everything that the command shows, as plain values."""
    return {
        "versions": {
            "fusedvae": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version_of("triton"),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        },
        "build": _build_record(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "openmp": _openmp(),
        "environment": {
            name: os.environ[name]
            for name in ("FUSEDVAE_BACKEND", "FUSEDVAE_CPU_ISA", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
            if name in os.environ
        },
        "devices": {device: _device(device) for device in device_types()},
    }


def _openmp() -> dict[str, Any]:
    """What runs the CPU kernels' threads, and how many really work when all are asked for."""
    runtime, working = BACKEND.openmp()
    return {"runtime": runtime, "working": working}


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _build_record() -> dict[str, Any] | None:
    try:
        record = json.loads(BUILD_RECORD.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _device(device_type: str) -> dict[str, Any]:
    """The backend that serves a device type, and the word of every backend on it."""
    backends = {}
    for name in NAMES:
        reason = unavailable(name, device_type)
        backends[name] = {
            "available": reason is None,
            "description": describe(name, device_type) if reason is None else None,
            "reason": reason,
        }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it would say is shown
            used, problem = resolve(device_type), None
    except (RuntimeError, ValueError) as error:  # what FUSEDVAE_BACKEND asks for is not here, or is no backend
        used, problem = None, str(error)
    if device_type == "cuda":
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    else:
        names = [_cpu_name()]
    return {"names": names, "uses": used, "problem": problem, "backends": backends}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, None) or platform.processor() or platform.machine()


def _as_text(found: dict[str, Any]) -> str:
    versions = found["versions"]
    lines = [
        f"fusedvae {versions['fusedvae']}",
        f"  Python {versions['python']}, PyTorch {versions['torch']}, Triton {versions['triton'] or 'not installed'}",
        f"  {found['platform']}",
        f"  {found['threads']} CPU thread{'s' * (found['threads'] != 1)} (torch.set_num_threads, OMP_NUM_THREADS)",
    ]
    runtime, working = found["openmp"]["runtime"], found["openmp"]["working"]
    if found["devices"]["cpu"]["backends"]["native"]["available"]:
        by = f"of {runtime}" if runtime else "no OpenMP runtime was found in the process"
        lines.append(f"  {working} of them work in the C++ kernels: {by}")
    lines += [f"  {name}={value}" for name, value in found["environment"].items()]
    lines += ["", "compiled in", *(f"  {line}" for line in _build_lines(found["build"]))]
    for device_type, device in found["devices"].items():
        lines += ["", f"{device_type}: {', '.join(device['names'])}"]
        if device["problem"]:
            lines.append(f"  uses nothing: {device['problem']}")
        else:
            lines.append(f"  uses {device['uses']}: {_why(device)}")
        for name, backend in device["backends"].items():
            lines.append(f"  {name:9}  {backend['description'] or 'unavailable: ' + backend['reason']}")
    if "cuda" not in found["devices"]:
        able = versions["cuda"] or versions["hip"]
        lines += ["", f"cuda: none ({'PyTorch sees no GPU' if able else 'this PyTorch serves CPUs only'})"]
    return "\n".join(lines)


def _build_lines(build: dict[str, Any] | None) -> list[str]:
    if build is None:
        return [f"no record of a build: the extension was not built here; to build it: {install_command()}"]
    if build.get("error"):
        return [f"nothing: {build['error']}", f"to build them, where a C++17 compiler is found: {install_command()}"]
    lines = [f"CPU kernels for {', '.join(build.get('cpu') or ['nothing'])} ({build.get('compiler')})"]
    if build.get("cuda"):
        lines.append(f"CUDA kernels for {', '.join(build['cuda'])} ({build.get('cuda_compiler')})")
    else:
        lines.append(f"no CUDA kernels: {build.get('cuda_absent') or 'not asked for'}")
    return lines


def _why(device: dict[str, Any]) -> str:
    """Why ``uses`` is what it is."""
    available = [name for name in NAMES if device["backends"][name]["available"]]
    if device["uses"] != available[0]:
        return "asked for by FUSEDVAE_BACKEND or fusedvae.use_backend"
    if len(available) == len(NAMES):
        return "the first choice"
    return f"the first available of {', '.join(NAMES)}"
