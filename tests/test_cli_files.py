"""What commands write and print: files that are whole, directories with one writer, streams that refuse."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fusedvae
from fusedvae.cli import bench, checkpoint, files, main
from fusedvae.cli.errors import CommandError

SOURCE = Path(fusedvae.__file__).parent.parent
TINY = ["--arch", "mlp", "--width", "8", "--latent", "2", "--threads", "1", "--epochs", "1", "--quiet"]
KL = ["--presets", "mnist-mlp", "--operations", "kl", "--contestants", "fusedvae/native", "--seconds", "0.01"]

pytestmark = [pytest.mark.skipif(files.fcntl is None, reason="POSIX"), pytest.mark.usefixtures("few_objects")]


@pytest.fixture
def table(tmp_path: Path) -> list[str]:
    """Data that are read in no time, for processes of their own."""
    path = tmp_path / "table.npy"
    np.save(path, np.random.default_rng(0).random((60, 7), np.float32))
    return ["--data", str(path)]


def fusedvae_command(*arguments: str, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fusedvae", *arguments], cwd=SOURCE, stderr=subprocess.PIPE, text=True, **options
    )


def test_processes_that_save_to_one_directory_and_are_killed_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    writing = (
        "import sys, pathlib, torch\n"
        "from fusedvae.cli import checkpoint\n"
        "while True: checkpoint.save(pathlib.Path(sys.argv[1]), {'who': sys.argv[2], 't': torch.zeros(300_000)})\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", writing, str(tmp_path), who], cwd=SOURCE, stderr=subprocess.PIPE)
        for who in "ab"
    ]
    seen = set()
    until = time.monotonic() + 60
    while seen != {"a", "b"} and time.monotonic() < until:
        time.sleep(0.01)
        if (tmp_path / checkpoint.CHECKPOINT).exists():
            seen.add(checkpoint.load(tmp_path)["who"])  # whole at any moment
    time.sleep(random.random() / 50)
    for process in processes:
        assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    assert seen == {"a", "b"}
    checkpoint.load(tmp_path)
    checkpoint.save(tmp_path, {"who": "c"})
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.CHECKPOINT]


def test_a_file_that_is_being_written_is_nobodys_leftover(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write(file: object) -> None:
        file.write(b"slow")  # type: ignore[attr-defined]
        files.write_atomically(path, lambda other: other.write(b"fast"))
        assert len(list(tmp_path.glob("*.unfinished"))) == 1

    files.write_atomically(path, write)
    assert path.read_bytes() == b"slow"
    assert list(tmp_path.iterdir()) == [path]


def test_new_files_have_the_mode_that_the_user_wants(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_atomically(tmp_path / "file", lambda file: file.write(b"x"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_links_are_replaced_and_never_followed(tmp_path: Path) -> None:
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    victim.write_text("precious")
    names = [checkpoint.CHECKPOINT, f"{checkpoint.CHECKPOINT}.unfinished", f"{checkpoint.CHECKPOINT}.0.unfinished"]
    for name in names:
        (run / name).symlink_to(victim)
    checkpoint.save(run, {"epoch": 1})
    assert victim.read_text() == "precious"
    assert not (run / checkpoint.CHECKPOINT).is_symlink()
    (run / files.LOCK).symlink_to(victim)
    with pytest.raises(CommandError, match="cannot write to"), files.only_writer(run):
        pass
    assert victim.read_text() == "precious"


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    link, pipe, target = tmp_path / "link", tmp_path / "pipe", tmp_path / "target"
    link.symlink_to(target)
    os.mkfifo(pipe)
    files.write_where_asked(link, b"content")
    assert (link.is_symlink(), target.read_bytes()) == (True, b"content")
    with pytest.raises(CommandError, match="nobody reads that pipe"):
        files.write_where_asked(pipe, b"content")
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    content = bytes(300_000)  # more than a pipe holds
    for _ in range(500):
        try:
            files.write_where_asked(pipe, content)
            break
        except CommandError:
            time.sleep(0.01)
    reader.join()
    assert got == [content]
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        try:
            os.mknod(tmp_path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except PermissionError:
            return
        files.write_where_asked(tmp_path / "null", b"content")
        assert stat.S_ISCHR((tmp_path / "null").lstat().st_mode)


def test_a_directory_has_one_writer_and_says_which(tmp_path: Path) -> None:
    holding = (
        "import sys, pathlib\n"
        "from fusedvae.cli import files\n"
        "with files.only_writer(pathlib.Path(sys.argv[1])): print('held', flush=True), sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", holding, str(tmp_path)]
    for kills in (False, True):
        holder = subprocess.Popen(command, cwd=SOURCE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert holder.stdout.readline() == "held\n"
        expected = rf"is in use: process {holder.pid} on \S+, since 20\S+ \S+ writes to it"
        with pytest.raises(CommandError, match=expected), files.only_writer(tmp_path):
            pass
        if kills:
            holder.kill()
        holder.communicate()
        assert (tmp_path / files.LOCK).exists() == kills
        with files.only_writer(tmp_path):
            assert f"process {os.getpid()} on" in (tmp_path / files.LOCK).read_text()
        assert not (tmp_path / files.LOCK).exists()


def test_a_run_that_another_process_writes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", "--out", str(out), *TINY]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with files.only_writer(out):
        for options in (["--out", str(out), "--overwrite", *TINY], ["--resume", str(out), "--quiet"]):
            capsys.readouterr()
            assert main(["train", *options]) == 2
            assert f"{out} is in use: process {os.getpid()} on " in capsys.readouterr().err
        after = {path.name: path.read_bytes() for path in out.iterdir()}
        assert after.pop(files.LOCK)
        assert after == before


def test_a_crafted_checkpoint_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["train", "--out", str(out), *TINY]) == 0
    whole = checkpoint.load(out)

    def with_moments(change: object) -> dict:
        state = copy.deepcopy(whole)
        for moments in state["optimizer"]["state"].values():
            change(moments)  # type: ignore[operator]
        return state

    crafted = [
        with_moments(lambda moments: moments.update(exp_avg=torch.zeros(1), exp_avg_sq=torch.zeros(1))),
        with_moments(lambda moments: moments.update(exp_avg=moments["exp_avg"].double())),
        with_moments(lambda moments: moments.update(step=torch.zeros(2))),
        with_moments(lambda moments: moments.pop("exp_avg_sq")),
        with_moments(lambda moments: moments.update(max_exp_avg_sq=torch.zeros(1))),
        {**whole, "optimizer": {"state": dict([*whole["optimizer"]["state"].items()][:-1]), "param_groups": []}},
        {**whole, "epoch": -1},
        {**whole, "epoch": 0.5},
        {**whole, "step": 10**9},
        {**whole, "history": []},
        {**whole, "history": [{}]},
        {**whole, "sums": torch.zeros(7)},
        {**whole, "rng": {"cpu": torch.full_like(whole["rng"]["cpu"], 255)}},
    ]
    settings = {"batch": 0, "threads": -1, "seed": -1, "latent": -1, "device": 3, "lr": "x", "epochs": 1.5, "dtype": 0}
    crafted += [{**whole, "settings": {**whole["settings"], name: value}} for name, value in settings.items()]
    crafted += [{**whole, "settings": {**whole["settings"], "nonsense": 1}}]
    capsys.readouterr()
    for state in crafted:
        torch.save(state, out / checkpoint.CHECKPOINT)
        assert main(["train", "--resume", str(out), "--epochs", "3", "--quiet"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "checkpoint.pt: it is damaged" in error
    torch.save({**whole, "format": 1}, out / checkpoint.CHECKPOINT)
    assert main(["train", "--resume", str(out), "--quiet"]) == 2
    assert "is a checkpoint of format 1: this version of fusedvae continues those of format" in capsys.readouterr().err


# --- streams ----------------------------------------------------------------------------------------------------


def test_a_run_goes_on_where_nothing_can_be_printed(tmp_path: Path, table: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = fusedvae_command("train", "--out", str(tmp_path / "a"), *TINY, *table, stdout=full)
    assert done.returncode == 2
    assert done.stderr == "fusedvae train: error: cannot write to standard output: No space left on device\n"
    assert (tmp_path / "a" / "samples.png").exists()
    command = [sys.executable, "-m", "fusedvae", "train", *TINY[:-1], *table, "--out"]  # with the bar
    for name, closed in (("b", "2>&-"), ("c", "<&- >&- 2>&-")):
        words = " ".join([*command, str(tmp_path / name), closed])
        assert subprocess.run(["sh", "-c", words], cwd=SOURCE, capture_output=True).returncode == 0
        assert (tmp_path / name / "samples.png").exists()


def test_a_run_goes_on_when_its_reader_has_gone(tmp_path: Path, table: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fusedvae", "train", *TINY, *table, "--out", str(tmp_path / "a")],
        cwd=SOURCE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b"fusedvae train: error: cannot write to standard output: Broken pipe\n"
    process.stderr.close()
    assert process.wait() == 128 + signal.SIGPIPE
    assert (tmp_path / "a" / "samples.png").exists()


def test_what_a_terminal_cannot_show_is_escaped(tmp_path: Path, table: list[str]) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = fusedvae_command(
        "train", "--out", str(tmp_path / "ü"), *TINY, *table, stdout=subprocess.PIPE, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"writing to .*\\xfc", done.stdout)
    done = fusedvae_command("bench", "--quiet", *KL, stdout=subprocess.PIPE, env=environment)
    assert done.returncode == 0, done.stderr
    assert "\\xb5s" in done.stdout  # µs


def test_output_for_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = fusedvae_command("info", stdout=full)
    assert done.returncode == 2
    assert done.stderr == "fusedvae info: error: cannot write to standard output: No space left on device\n"


# --- bench ------------------------------------------------------------------------------------------------------


def test_a_damaged_result_is_found_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    assert main(["bench", "--quiet", *KL, "--json", str(path)]) == 0
    whole = json.loads(path.read_text())
    monkeypatch.setattr(bench, "measure", lambda *args, **kwargs: pytest.fail("it measures"))

    def without(*keys: str) -> dict:
        result = copy.deepcopy(whole)
        inner = result
        for key in keys[:-1]:
            inner = inner[key] if isinstance(inner, dict) else inner[0]
        del inner[keys[-1]]
        return result

    damaged = [without(name) for name in whole]
    damaged += [without("settings", "threads"), without("noise", "spread"), without("cases", "0", "preset")]
    damaged += [without("cases", "0", "contestants", "0", "times"), without("cases", "0", "contestants", "0", "name")]
    for name, value in (("threads", -1), ("seed", 2**64), ("seconds", "x"), ("presets", 3), ("contestants", [3])):
        damaged.append({**whole, "settings": {**whole["settings"], name: value}})
    damaged += [{**whole, "environment": {"devices": {"cpu": 3}}}, {**whole, "date": 3}, [whole], 3]
    capsys.readouterr()
    for result in damaged:
        path.write_text(json.dumps(result))
        for option in ("--from", "--compare"):
            assert main(["bench", "--quiet", option, str(path)]) == 2, result
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert error.startswith("fusedvae bench: error: ")


@pytest.mark.parametrize(("option", "value"), [("--seed", str(2**64)), ("--threads", "100000"), ("--threads", "0")])
def test_numbers_beyond_reason_are_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *KL, option, value]) == 2
    assert f"{option}: expected " in capsys.readouterr().err
