"""``fusedvae train`` in several processes: the curve of one, one checkpoint, and one end for all."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_cli_train import SOURCE, rows

import fusedvae
from fusedvae.cli import checkpoint, main, pictures, timing
from fusedvae.cli.trainer import load_model

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="a PyTorch without torch.distributed")

# 1617 digits to train on: four steps of 404, which three processes cannot share out evenly, and one of a single digit.
DIGITS = ["--arch", "mlp", "--width", "16", "--latent", "3", "--batch", "404", "--threads", "1", "--quiet"]
OPTIONS = {
    "plain": [],
    "parts": ["--grad-accum", "2", "--clip-grad", "20", "--ema", "0.6", "--lr-schedule", "cosine", "--lr-warmup", "1"],
    "iwae": ["--bound", "iwae", "--samples", "3", "--condition", "labels", "--dtype", "float64"],
    "samples": ["--samples", "2", "--likelihood", "bernoulli", "--beta", "2", "--warmup", "1"],
}
SHARDED = ["--clip-grad", "20", "--ema", "0.6", "--grad-accum", "2"]

RUN = """
import os, sys
from fusedvae.cli import main, pictures, timing
timing.SECONDS, timing.ROUNDS = 0.0, (1, 1)
pictures.draw = lambda trainer, directory: None
for line in sys.stdin.read().splitlines():
    os.environ["MASTER_PORT"], *arguments = line.split()
    status = main(["train", *arguments])
    print(f"status {status}", flush=True)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
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


def in_processes(count: int, commands: list[list[str]]) -> list[tuple[str, str]]:
    """Run commands one after the other in a group of so many processes; what each of these printed."""
    ports = free_ports(len(commands))
    lines = "\n".join(" ".join([str(port), *command]) for port, command in zip(ports, commands, strict=True))
    processes = []
    for rank in range(count):
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        environment.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", RUN],
                cwd=SOURCE,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        processes[-1].stdin.write(lines)
        processes[-1].stdin.close()
        processes[-1].stdin = None
    try:
        return [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()


def check_same_curve(one: Path, other: Path) -> None:
    assert len(rows(one)) == len(rows(other)) > 0
    for row, same in zip(rows(one), rows(other), strict=True):
        assert row.keys() == same.keys()
        for name, value in row.items():
            assert same[name] == pytest.approx(value, rel=2e-4, abs=2e-4, nan_ok=True), (one, other, name)
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

    printed = in_processes(
        3,
        [
            *(command(name, "3") for name in OPTIONS),
            [*DIGITS, *SHARDED, "--fsdp", "--epochs", "2", "--out", str(tmp_path / "sharded-3")],
            ["--resume", str(tmp_path / "plain-1-then-3"), "--epochs", "2", "--quiet"],
            [*DIGITS, *OPTIONS["parts"], "--epochs", "1", "--out", str(tmp_path / "parts-3-then-2")],
            ["--data", "absent.npy"],
        ],
    )
    (first, first_error), *others = printed
    assert first.count("status 0") == 7, first_error
    assert first.count("writing to") == 7
    assert "3 processes" in first
    assert first.endswith("status 2\n")
    assert first_error.endswith("fusedvae train: error: no such data: absent.npy\n")
    for out, error in others:  # the first one alone prints
        assert out == "status 0\n" * 7 + "status 2\n"
        assert "no such data" not in error

    ((_, error), _) = in_processes(
        2,
        [
            command("plain", "2"),
            ["--resume", str(tmp_path / "parts-3-then-2"), "--epochs", "2", "--quiet"],
            ["--resume", str(tmp_path / "sharded-3"), "--epochs", "3", "--quiet"],
        ],
    )
    for name in OPTIONS:
        check_same_curve(tmp_path / f"{name}-1", tmp_path / f"{name}-3")
    check_same_curve(tmp_path / "plain-1", tmp_path / "plain-2")
    check_same_curve(tmp_path / "plain-1", tmp_path / "plain-1-then-3")
    one, other = (rows(tmp_path / f"parts-{where}") for where in ("1", "3-then-2"))
    assert other[0]["beta"] == one[0]["beta"]
    assert len(other) == 2, error

    # What three processes spread over them, two go on with, and one reads.
    assert main(["train", "--resume", str(tmp_path / "sharded-1"), "--epochs", "3", "--quiet"]) == 0
    check_same_curve(tmp_path / "sharded-1", tmp_path / "sharded-3")
    load_model(tmp_path / "sharded-3").generate(2)


def test_in_torchrun_the_death_of_one_and_ctrl_c_end_all(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    for name, ending in (("killed", signal.SIGKILL), ("stopped", signal.SIGINT)):
        out = tmp_path / name
        command = ["-m", "fusedvae", "train", *DIGITS, "--epochs", "1000000", "--out", str(out)]
        process = subprocess.Popen(
            [*torchrun, str(free_ports(1)[0]), *command],
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


def worker_of(parent: int, rank: int) -> int:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            status, environment = (path / "status").read_text(), (path / "environ").read_bytes()
        except OSError:
            continue
        if f"PPid:\t{parent}\n" in status and f"RANK={rank}".encode() in environment.split(b"\0"):
            return int(path.name)
    raise AssertionError("no such worker")
