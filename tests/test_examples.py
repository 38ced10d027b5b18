"""The examples, and models on several processes: DistributedDataParallel, FSDP, and Lightning's and accelerate's use of
them. Each runs on two processes with gloo, which needs no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pages import DOCS, blocks

EXAMPLES = Path(__file__).parent.parent / "examples"


def _together(command: list[str], processes: int = 1, *, is_sharded: bool = False) -> str:
    """What processes of one command wrote, each with the environment that torchrun gives it; all must succeed.

    How PyTorch ends one whose work is done does not count if that was on distributed tensors (``is_sharded``): their
    caches hold a group for good, one of whose threads may want the interpreter when that is no more.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    running = []
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)} if processes > 1 else {}
        running.append(
            subprocess.Popen(
                [sys.executable, *command],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**environment, **place},
            )
        )
    try:
        said = [process.communicate(timeout=200) for process in running]
    finally:
        for process in running:
            process.kill()
    errors = "".join(err for _, err in said)
    for process, (_, err) in zip(running, said, strict=True):
        is_late = is_sharded and err.endswith("terminate called without an active exception\n")
        assert process.returncode == 0 or (is_late and process.returncode == -signal.SIGABRT), errors[-6000:]
    assert "VAE.loss was called" not in errors
    return "".join(out for out, _ in said)


def _free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


COMMANDS = {
    "ddp": (None, ["with_torchrun.py"], 2),
    "fsdp": (None, ["with_torchrun.py", "--wrapper", "fsdp"], 2),
    "accelerate": ("accelerate", ["with_accelerate.py"], 2),
    "lightning": ("lightning", ["with_lightning.py", "--devices", "2"], 1),  # starts the other itself
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_examples(name: str) -> None:
    """Two processes learn from other data each, and end with the same parameters."""
    library, (script, *options), processes = COMMANDS[name]
    if library is not None and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: see the extra 'interop'")
    said = _together([str(EXAMPLES / script), *options, "--steps", "8"], processes, is_sharded=name == "fsdp")
    lines = re.findall(r"process (\d): loss (\S+) -> (\S+), parameters (\d+\.\d+)", said)
    assert sorted(line[0] for line in lines) == ["0", "1"]
    assert len({line[3] for line in lines}) == 1
    assert len({line[1] for line in lines}) == 2
    for _, first, last, _ in lines:
        assert float(last) < float(first)


_GROUP = """
import copy, os, warnings
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
import fusedvae

dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
plain = fusedvae.VAE(nn.Linear(10, 8), nn.Linear(4, 10), 4, recon_logvar="learned")
rows = torch.rand(8, 10)
mine = rows[4 * rank : 4 * rank + 4]

def generators(first, last):
    return [torch.Generator().manual_seed(k) for k in range(first, last)]

plain(rows, generator=generators(0, 8)).loss(rows, beta=0.5).backward()
expected = {name: p.grad for name, p in plain.named_parameters()}
# What was saved when the learned log-variance was 0-dim.
old = {name: t.view(()) if name == "recon_logvar" else t for name, t in plain.state_dict().items()}

def sharded(vae):
    for part in (vae.encoder, vae.decoder, vae):
        fully_shard(part, mesh=mesh)
    return vae

wrappers = {
    "ddp": DistributedDataParallel,
    "ddp, unused": lambda vae: DistributedDataParallel(vae, find_unused_parameters=True),
    "fsdp 1": lambda vae: FullyShardedDataParallel(vae, use_orig_params=True, device_id=torch.device("cpu")),
    "fsdp 2": sharded,
}
for name, wrap in wrappers.items():
    vae = copy.deepcopy(plain)
    vae.zero_grad()
    vae.load_state_dict(old)
    wrapped = wrap(vae)
    out = wrapped(mine, generator=generators(4 * rank, 4 * rank + 4))
    out.loss(mine, beta=0.5).backward()
    if name == "fsdp 1":
        with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
            found = {n.removeprefix("_fsdp_wrapped_module."): p.grad.clone() for n, p in wrapped.named_parameters()}
    else:
        found = {n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in vae.named_parameters()}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=f"{name}: {key}")

class Whole(nn.Module):
    def __init__(self, vae):
        super().__init__()
        self.vae = vae
    def forward(self, x):
        return self.vae.loss(x)

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    DistributedDataParallel(Whole(copy.deepcopy(plain)))(mine).backward()
assert not said, [str(w.message) for w in said]
inside = DistributedDataParallel(copy.deepcopy(plain)).module
for expected_count in (1, 0):  # once
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        inside.loss(mine)
    assert [("wrapped(x).loss(x)" in str(w.message)) for w in said] == [True] * expected_count
print(f"process {rank} is content", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_wrappers_give_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    """Also with a learned log-variance of shape (1,), and one that was saved without dimensions."""
    script = tmp_path / "group.py"
    script.write_text(_GROUP)
    said = _together([str(script)], 2, is_sharded=True)
    assert sorted(re.findall(r"process (\d) is content", said)) == ["0", "1"]


# --- the notebook -----------------------------------------------------------------------------------------------------


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What docs/notebook.py has."""
    pytest.importorskip("nbclient")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the kernel: the model is small, and other tests run beside this one
    return runpy.run_path(str(DOCS / "notebook.py"))


def test_the_notebook_is_the_tutorial(notebook: dict) -> None:
    """To write it again: python docs/notebook.py."""
    kept = notebook["nbformat"].read(EXAMPLES / "tutorial.ipynb", 4)
    made, page = notebook["notebook"](), (DOCS / "tutorial.md").read_text()
    assert [(cell.cell_type, cell.source) for cell in kept.cells] == [(c.cell_type, c.source) for c in made.cells]
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.source for cell in code] == [block.code.strip() for block in blocks(page)]
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert re.findall(r"\]\((figures/[\w-]+\.png)\)", page) == [
        f"figures/tutorial-{k + 1}.png" for k in range(pictures)
    ]
    assert all((DOCS / "figures" / f"tutorial-{k + 1}.png").is_file() for k in range(pictures))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the kernel's client
def test_the_notebook_runs(notebook: dict) -> None:
    made = notebook["notebook"]()
    pictures = notebook["run"](made)
    assert len(pictures) == 5
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    said = "".join(output.get("text", "") for cell in made.cells for output in cell.get("outputs", []))
    bound, log_p = map(float, re.findall(r"ELBO (-\d+\.\d+), log p\(x\) about (-\d+\.\d+)", said)[0])
    assert -27 < bound < log_p < -22  # untrained, it is below -44
