"""Counts what the GPU kernels execute, without a GPU: PTX instructions and bytes of memory an element.

    python tests/ptx/count.py                     # a table of all cases
    python tests/ptx/count.py --backend triton
    python tests/ptx/count.py --backend cuda --profile "latent forward"      # and each instruction, with its count

An instruction that a warp executes counts for its 32 lanes, whether they all take part or not. Operands are dense, of
64 samples by 8,192 elements. For the CUDA kernels, build first: FUSEDVAE_CUDA_ARCHS=90 python setup.py build_ext
--inplace.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
SHAPE = (64, 8192)
BACKENDS = {"cuda": "cuda_on_ptx", "triton": "triton_on_ptx"}
"""What installs each."""
DTYPES = ("float32", "bfloat16")


class Row(NamedTuple):
    backend: str
    case: str
    dtype: str
    instructions: float
    """An element."""
    bytes: float
    """An element, of global memory, read and written."""


def measure(backend: str, profiled: str | None = None) -> list[Row]:
    """The rows of a backend, in this process, which it can be the only one of."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    __import__(BACKENDS[backend])
    import executor
    import torch

    from fusedvae import functional

    if backend == "cuda":
        if not executor.is_built():
            print("the sources have changed since the extension was built", file=sys.stderr)
        for name in executor.cuda_programs():
            if not name.endswith(f" for {executor.ARCHITECTURE}"):
                sys.exit("no PTX for sm_90: FUSEDVAE_CUDA_ARCHS=90 python setup.py build_ext --inplace")
    name = "native" if backend == "cuda" else "triton"
    library = executor.library()
    rows: list[Row] = []

    @contextlib.contextmanager
    def counted(case: str) -> Iterator[None]:
        library.reset_counts()
        yield
        counts, elements = library.counts(), SHAPE[0] * SHAPE[1]
        moved = counts.bytes_read + counts.bytes_written
        rows.append(Row(backend, case, dtype, 32 * counts.instructions / elements, moved / elements))
        if case == profiled:
            show_profile(library.profile(), elements)

    for dtype in DTYPES:
        torch.manual_seed(0)
        mean, target, spread, grad = (torch.randn(SHAPE).to(getattr(torch, dtype)) for _ in range(4))
        inputs = [mean.requires_grad_(), spread.requires_grad_()]
        calls: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {
            "nll with gradients": (target, {}),
            "clamped nll with gradients": (target, {"clamp": (-6.0, 3.0)}),
            "masked nll with gradients": (target, {"weight": mean > 0}),
            "float32 data's nll with gradients": (target.float(), {}),
        }
        for case, (data, options) in calls.items():
            with counted(case):
                functional.gaussian_nll(mean, data, spread, backend=name, **options)
        for case, options in (("latent", {}), ("clamped latent", {"clamp": (-30.0, 20.0)})):
            with counted(f"{case} forward"):
                z, kl = functional.latent(*inputs, backend=name, **options)
            grads = [grad, torch.randn_like(kl)]
            with counted(f"{case} backward"):
                torch.autograd.grad([z, kl], inputs, grads)
    return rows


def show_profile(profile: list[tuple[str, int, int, int, str]], elements: int) -> None:
    """Print the instructions that were executed, in their order, and how often an element."""
    for kernel, line, warps, _, text in profile:
        print(f"{32 * warps / elements:9.4f}  {kernel[:24]}:{line:<6} {text}")


def measure_apart(backend: str) -> list[Row]:
    """The rows of a backend, in a process of its own."""
    command = [sys.executable, __file__, "--backend", backend, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-6000:])
    sys.stderr.write(done.stderr)
    return [Row(*row) for row in json.loads(done.stdout)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", choices=BACKENDS, help="this one alone")
    parser.add_argument("--profile", metavar="CASE", help="show the instructions of a case, such as 'latent backward'")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    arguments = parser.parse_args()
    if not arguments.backend and arguments.json:
        rows = [row for name in BACKENDS for row in measure_apart(name)]
    elif arguments.backend and (arguments.json or arguments.profile):
        rows = measure(arguments.backend, arguments.profile)
    elif arguments.profile:
        parser.error("--profile is of one backend: name it by --backend")
    else:
        rows = [row for name in BACKENDS if arguments.backend in (None, name) for row in measure_apart(name)]
    if arguments.json:
        json.dump(rows, sys.stdout)
        return
    print(f"{'kernels':<9}{'case':<35}{'dtype':<10}{'instructions an element':>25}{'bytes an element':>18}")
    for row in rows:
        print(f"{row.backend:<9}{row.case:<35}{row.dtype:<10}{row.instructions:>25.1f}{row.bytes:>18.2f}")


if __name__ == "__main__":
    main()
