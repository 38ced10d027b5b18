"""``fusedvae train`` in several processes: the curve of one, one checkpoint, and one end for all."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli_train import SOURCE, rows

import fusedvae
from fusedvae.cli import checkpoint, main, pictures, timing
from fusedvae.cli.errors import LostProcessError
from fusedvae.cli.interruption import Interruption
from fusedvae.cli.processes import Alone, noticing_losses

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="a PyTorch without torch.distributed")

# 1617 digits to train on: four steps of 404, which three processes cannot share out evenly, and one of a single digit.
DIGITS = ["--arch", "mlp", "--width", "16", "--latent", "3", "--batch", "404", "--threads", "1", "--quiet"]
OPTIONS = {
    "plain": [],
    "parts": ["--grad-accum", "2", "--clip-grad", "20", "--ema", "0.6", "--lr-schedule", "cosine", "--lr-warmup", "1"],
    "iwae": ["--bound", "iwae", "--samples", "3", "--condition", "labels", "--dtype", "float64"],
    "samples": ["--samples", "2", "--likelihood", "bernoulli", "--beta", "2", "--warmup", "1"],
    "half": ["--amp", "bf16", "--likelihood", "laplace", "--recon-logvar", "learned", "--scale", "softplus"],
}
TOLERANCES = {"half": 5e-3}
"""Of values, where it is not that of float32."""
SHARDED = [
    *("--clip-grad", "20", "--ema", "0.6", "--grad-accum", "2", "--recon-logvar", "learned", "--dtype", "float64"),
    *("--evaluate-every", "1", "--evaluate-samples", "2"),
]

# Groups of processes, each of which is forked when all is imported.
RUN = """
import gc, json, os, signal, sys
import sklearn.datasets, torch._dynamo, torchmetrics.image
from fusedvae.cli import main, pictures, timing
timing.SECONDS, timing.ROUNDS = 0.0, (1, 1)
pictures.draw = lambda trainer, directory: None

def run(rank, size, prefix, commands):
    signal.alarm(200)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{prefix}-{rank}.{name}", os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1")
    for port, *arguments in commands:
        os.environ["MASTER_PORT"] = port
        print(f"status {main(['train', *arguments])}", flush=True)
    sys.stderr.flush()

gc.freeze()
for size, prefix, commands in json.load(sys.stdin):
    children = []
    for rank in range(size):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                run(rank, size, prefix, commands)
            finally:
                os._exit(0)
    for child in children:
        os.waitpid(child, 0)
"""


@pytest.fixture(autouse=True)
def quick(few_objects: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    monkeypatch.setattr(timing, "ROUNDS", (1, 1))
    monkeypatch.setattr(pictures, "draw", lambda trainer, directory: None)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def in_groups(directory: Path, *groups: tuple[int, list[list[str]]]) -> list[list[tuple[str, str]]]:
    """Run groups of processes one after the other, and in each its commands; what each process printed."""
    plan = []
    for number, (size, commands) in enumerate(groups):
        ports = free_ports(len(commands))
        lines = [[str(port), *command] for port, command in zip(ports, commands, strict=True)]
        plan.append((size, str(directory / f"group-{number}"), lines))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run(
        [sys.executable, "-c", RUN], cwd=SOURCE, env=environment, input=json.dumps(plan), text=True, timeout=420
    )
    return [
        [tuple(Path(f"{prefix}-{rank}.{name}").read_text() for name in ("out", "err")) for rank in range(size)]
        for size, prefix, _ in plan
    ]


def check_same_curve(one: Path, other: Path, tolerance: float = 2e-4) -> None:
    assert len(rows(one)) == len(rows(other)) > 0
    for row, same in zip(rows(one), rows(other), strict=True):
        assert row.keys() == same.keys()
        for name, value in row.items():
            expected = pytest.approx(value, rel=tolerance, abs=tolerance, nan_ok=True)
            assert same[name] == expected, (one, other, name)
    model, same_model = (fusedvae.VAE.from_pretrained(path) for path in (one, other))
    for name, value in model.state_dict().items():
        # Adam makes steps of their size, 1e-3, of gradients that are nothing but rounding.
        torch.testing.assert_close(same_model.state_dict()[name], value, rtol=0, atol=6e-3)


def test_three_processes_and_two_have_the_curve_of_one(tmp_path: Path) -> None:
    def command(name: str, where: str) -> list[str]:
        return [*DIGITS, *OPTIONS[name], "--epochs", "2", "--out", str(tmp_path / f"{name}-{where}")]

    for name in OPTIONS:
        assert main(["train", *command(name, "1")]) == 0
    assert main(["train", *DIGITS, *SHARDED, "--epochs", "2", "--out", str(tmp_path / "sharded-1")]) == 0
    # The end of a run that one process began, and the beginning of one that it ends.
    assert main(["train", *DIGITS, "--epochs", "1", "--out", str(tmp_path / "plain-1-then-3")]) == 0
    assert not torch.distributed.is_initialized()

    three = [
        *(command(name, "3") for name in OPTIONS),
        [*DIGITS, *SHARDED, "--fsdp", "--epochs", "2", "--out", str(tmp_path / "sharded-3")],
        ["--resume", str(tmp_path / "plain-1-then-3"), "--epochs", "2", "--quiet"],
        [*DIGITS, *OPTIONS["parts"], "--epochs", "1", "--out", str(tmp_path / "parts-3-then-2")],
        ["--data", "absent.npy"],
    ]
    two = [
        command("plain", "2"),
        command("half", "2"),
        ["--resume", str(tmp_path / "parts-3-then-2"), "--epochs", "2", "--quiet"],
        ["--resume", str(tmp_path / "sharded-3"), "--epochs", "3", "--quiet"],
    ]
    ((first, first_error), *others), ((_, error), _) = in_groups(tmp_path, (3, three), (2, two))
    runs = len(three) - 1
    assert first.count("status 0") == runs, first_error
    assert first.count("writing to") == runs
    assert "3 processes" in first
    assert first.endswith("status 2\n")
    assert first_error.endswith("fusedvae train: error: no such data: absent.npy\n")
    for out, other_error in others:  # the first one alone prints
        assert out == "status 0\n" * runs + "status 2\n"
        assert "no such data" not in other_error

    for name in OPTIONS:
        check_same_curve(tmp_path / f"{name}-1", tmp_path / f"{name}-3", TOLERANCES.get(name, 2e-4))
    check_same_curve(tmp_path / "plain-1", tmp_path / "plain-2")
    check_same_curve(tmp_path / "half-1", tmp_path / "half-2", TOLERANCES["half"])
    check_same_curve(tmp_path / "plain-1", tmp_path / "plain-1-then-3")
    one, other = (rows(tmp_path / f"parts-{where}") for where in ("1", "3-then-2"))
    assert other[0]["beta"] == one[0]["beta"]
    assert len(other) == 2, error

    # What three processes spread over them, two go on with, and one reads.
    assert main(["train", "--resume", str(tmp_path / "sharded-1"), "--epochs", "3", "--quiet"]) == 0
    check_same_curve(tmp_path / "sharded-1", tmp_path / "sharded-3", 1e-9)
    fusedvae.VAE.from_pretrained(tmp_path / "sharded-3").generate(2)
    assert main(["train", "--resume", str(tmp_path / "sharded-3"), "--epochs", "4", "--quiet"]) == 0
    assert main(["train", "--resume", str(tmp_path / "sharded-1"), "--epochs", "4", "--quiet"]) == 0
    check_same_curve(tmp_path / "sharded-1", tmp_path / "sharded-3", 1e-9)


def test_in_torchrun_the_death_of_one_and_ctrl_c_end_all(tmp_path: Path) -> None:
    np.save(tmp_path / "table.npy", np.random.default_rng(0).random((500, 7), np.float32))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    for name, ending in (("killed", signal.SIGKILL), ("stopped", signal.SIGINT)):
        out = tmp_path / name
        options = [*DIGITS, "--data", str(tmp_path / "table.npy"), "--epochs", "1000000", "--out", str(out)]
        process = subprocess.Popen(
            [*torchrun, str(free_ports(1)[0]), "-m", "fusedvae", "train", *options],
            cwd=SOURCE,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            for _ in range(600):
                if (out / "options.json").exists() or process.poll() is not None:
                    break
                time.sleep(0.1)
            time.sleep(0.5)
            if ending == signal.SIGKILL:
                os.kill(worker_of(process.pid, rank=1), ending)
            else:
                process.send_signal(ending)
            printed, error = process.communicate(timeout=60)
        finally:
            process.kill()
        resuming = f"to go on: fusedvae train --resume {out}"
        if ending == signal.SIGKILL:
            assert "fusedvae train: error: process 0: another process of this run has ended" in error
            assert resuming in error
        else:
            assert resuming in printed, error
            assert printed.count("interrupted in epoch") == 1
            state = checkpoint.load(out)
            assert state["epoch"] + state["step"] > 0
        assert "[rank" not in error  # no traceback of theirs
        epochs = str(checkpoint.load(out)["epoch"] + 1)
        assert main(["train", "--resume", str(out), "--epochs", epochs, "--quiet"]) == 0


def test_who_notices_a_loss_is_not_ended_before_it_says_so() -> None:
    """torchrun ends those that are left, at any time: also while they go back through what they were in."""
    before = signal.getsignal(signal.SIGTERM)
    group = Alone()
    group.size, group.to_go_on = 2, "; to go on"
    try:
        lost = pytest.raises(LostProcessError, match="another process of this run has ended")
        with lost, Interruption(), noticing_losses(group):
            raise RuntimeError("gloo: Connection closed by peer")
        assert group.is_broken
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    with Interruption():
        pass
    assert signal.getsignal(signal.SIGTERM) == before


def worker_of(parent: int, rank: int) -> int:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            status, environment = (path / "status").read_text(), (path / "environ").read_bytes()
        except OSError:
            continue
        if f"PPid:\t{parent}\n" in status and f"RANK={rank}".encode() in environment.split(b"\0"):
            return int(path.name)
    raise AssertionError("no such worker")
