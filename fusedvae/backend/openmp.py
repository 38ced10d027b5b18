"""The OpenMP runtime that PyTorch has loaded, for the CPU kernels to run on its threads.

The extension is linked with no runtime: it takes whichever one is in the process's global scope when it is loaded.
PyTorch's is there on x86-64, for its libtorch_global_deps depends on it; on other processors it need not be, and then
the kernels would run on the calling thread alone.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

ENTRY_POINT = "GOMP_parallel"
"""What the kernels call; the runtimes of GNU, LLVM and Intel all have it."""


def share_runtime() -> None:
    """Have a runtime in the global scope, if one is loaded. To be called before the extension is imported."""
    if sys.platform != "linux" or hasattr(ctypes.CDLL(None), ENTRY_POINT):
        return
    for path in _loaded_runtimes():
        try:  # which loads nothing: what is there already, others can see from now on
            runtime = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_GLOBAL)
        except OSError:  # deleted since, say
            continue
        if hasattr(runtime, ENTRY_POINT):
            return


def _loaded_runtimes() -> list[str]:
    """The files of the runtimes in the process, PyTorch's own first: other packages may have brought some as well."""
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = dict.fromkeys(line[line.index("/") :] for line in mapped if "/" in line)
    found = [path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp"))]
    package = str(Path(torch.__file__).parent)  # and beside it, what its wheel brings: torch.libs
    return sorted(found, key=lambda path: not path.startswith(package))
