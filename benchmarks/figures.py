r"""Writes the tables and plots of docs/benchmarks.md from recorded runs.

    python benchmarks/figures.py

Each table stands between marks that name the file of its run, in benchmarks/results/. How these are recorded (the first
may be narrowed: the page shows the command that it was):

    fusedvae bench --full --threads 2 --json benchmarks/results/cpu-avx512-2-threads.json
    python benchmarks/cpu_goals.py --json benchmarks/results/cpu-goals-avx512-2-threads.json
    FUSEDVAE_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 python benchmarks/cpu_goals.py --processes 3 \
        --json benchmarks/results/cpu-goals-avx2-2-threads.json
    OUT=results python benchmarks/gpu_check.py    # its gpu_check.json is gpu-h200.json

A file by another name is shown once a mark on the page names it.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

from cpu_goals import LIMITS, goals_of, median_and_range, ratios_of
from gpu_check import CAPTURED, GOALS

from fusedvae.cli.bench import load
from fusedvae.cli.bench.report import Plot, plots
from fusedvae.cli.bench.suite import Result
from fusedvae.cli.bench.table import interval_text, ratio_text, seconds_text
from fusedvae.cli.checkpoint import write_atomically

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
FIGURES = ROOT / "docs" / "figures"
BLOCK = re.compile(r"(<!-- (\w+) of (\S+), by benchmarks/figures.py -->\n).*?(<!-- end of figures -->)", re.DOTALL)
WIDTH = 120
ROWS = (
    ("mnist-mlp", "latent"),
    ("mnist-mlp", "elbo"),
    ("mnist-mlp", "step"),
    ("cifar-conv", "elbo"),
    ("latent-diffusion", "latent"),
    ("latent-diffusion", "elbo"),
    ("single-cell-2k", "elbo"),
    ("single-cell-20k", "elbo"),
    ("video-latent", "latent"),
)
PLOTS = ("speedup-by-size", "share-by-size", "memory-by-preset")


# --- a run of `fusedvae bench` ------------------------------------------------------------------------------------


def of_bench(path: Path) -> Iterator[str]:
    """The rows of models, the command, and the plots."""
    result = load(path)
    environment, settings = result["environment"], result["settings"]
    device = settings["device"].partition(":")[0]
    machine = ", ".join(environment["devices"][device]["names"])
    served = environment["devices"][device]
    kind = served["backends"][served["uses"]]["description"]
    what = (
        f"Forward and backward in float32 on {settings['threads']} threads ({machine}; {kind}), PyTorch "
        f"{environment['versions']['torch']}, {result['date'][:10]}: how many times as long the fastest way to write "
        "it in eager PyTorch takes, and the fastest under `torch.compile`, of those that were measured, with 95 % "
        "intervals."
    )
    if result["noise"]["noisy"]:
        what += " The machine was busy at times, as wide intervals show."
    yield from textwrap.wrap(what, WIDTH)
    yield from ("", "| | against eager | against torch.compile | fusedvae takes |", "| --- | --- | --- | --- |")
    for preset, operation in ROWS:
        ours = _fastest_fused(result, preset, operation)
        if ours is None:
            continue
        cells = [f"`{operation}`, {preset}"]
        for rival in ("eager", "compile"):
            ratio = ours["ratios"].get(rival)
            cells.append(f"{ratio_text(ratio)} ({interval_text(ratio)})" if ratio else "")
        cells.append(seconds_text(ours["seconds"]["median"]))
        yield f"| {' | '.join(cells)} |"
    yield from ("", "The command:", "", "```sh", result["command"], "```")
    for plot in _plots(result):
        yield from ("", f"![{plot.title}](figures/{plot.name}.svg)", "")
        yield from textwrap.wrap(f"**{plot.title}**: {plot.caption}", WIDTH)


def _fastest_fused(result: Result, preset: str, operation: str) -> Result | None:
    found = [
        contestant
        for entry in result["cases"]
        if (entry["preset"], entry["operation"]) == (preset, operation)
        and (entry["dtype"], entry["memory_format"], entry["direction"]) == ("float32", "contiguous", "both")
        for contestant in entry["contestants"]
        if contestant["family"] == "fused" and contestant["status"] == "ok"
    ]
    return min(found, key=lambda contestant: contestant["seconds"]["median"], default=None)


def _plots(result: Result) -> list[Plot]:
    return [plot for plot in plots(result) if plot.name in PLOTS]


# --- runs against goals -------------------------------------------------------------------------------------------


def of_goals(path: Path) -> Iterator[str]:
    """What benchmarks/cpu_goals.py found, each beside its goal."""
    record = json.loads(path.read_text())
    yield f"PyTorch {record['torch']} ({record['rivals']}), {record['threads']} threads, {record['backend']}."
    yield from (
        "",
        "| | against eager | goal | against torch.compile | goal | |",
        "| --- | --- | --- | --- | --- | --- |",
    )
    for case, found in record["cases"].items():
        if case in LIMITS:
            continue
        cells, is_reached, goals = [case], True, goals_of(case)
        for rival, ratios in ratios_of(case, found["microseconds"]).items():
            is_reached = is_reached and statistics.median(ratios) >= goals[rival]
            cells += [median_and_range(ratios), f"{goals[rival]:.1f}x"]
        yield f"| {' | '.join([*cells, _verdict(is_reached)])} |"
    for case, (_, rival, limit) in LIMITS.items():
        if case not in record["cases"]:
            continue
        ratios = [took["fused"] / took[rival] for took in record["cases"][case]["microseconds"]]
        verdict = "within the goal" if statistics.median(ratios) <= limit else "**missed**"
        yield ""
        yield f"{case}: {median_and_range(ratios)} of the time that `{rival}` takes; goal at most {limit}x, {verdict}."


def of_gpu(path: Path) -> Iterator[str]:
    """What benchmarks/gpu_check.py found on a GPU: times, and each goal."""
    record = json.loads(path.read_text())
    machine = record["machine"]
    cases = record["steps"]["speed"]["found"]
    is_captured = any(CAPTURED in name for found in cases.values() for name in found.get("microseconds", {}))
    what = f"µs of a forward and backward pass{', in brackets as a CUDA graph' if is_captured else ''}"
    yield f"{machine['device']}, PyTorch {machine['torch']}, CUDA {machine['cuda']}; {what}."
    yield from ("", "| | eager | torch.compile | native | triton | copy | against eager | against torch.compile |")
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, found in cases.items():
        times = found.get("microseconds", {})
        if not {"eager", "native", "triton", "copy"} <= set(times):
            continue
        ours = min(times["native"], times["triton"])
        cells = [
            (f"{times[key]:,.0f}" if key in times else "-")
            + (f" ({times[key + CAPTURED]:,.0f})" if key + CAPTURED in times else "")
            for key in ("eager", "compile", "native", "triton", "copy")
        ]
        ratios = [f"{times[rival] / ours:.2f}x" if rival in times else "-" for rival in ("eager", "compile")]
        yield f"| {' | '.join([name, *cells, *ratios])} |"
    yield from ("", "| goal | native | triton |", "| --- | --- | --- |")
    for goal in GOALS:
        reached = goal.reached(record["steps"][goal.step]["found"][goal.case]["microseconds"])
        cells = [f"{value:.3f}, {_verdict(value >= goal.at_least)}" for value in reached.values()]
        cells = cells or ["not measured"] * 2
        yield f"| {goal.case}: {goal.rival}'s time over ours at least {goal.at_least:.2f} | {' | '.join(cells)} |"


def _verdict(is_reached: bool) -> str:
    return "reached" if is_reached else "**missed**"


# --- the page -----------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[Path], Iterator[str]]] = {"figures": of_bench, "goals": of_goals, "times": of_gpu}
"""By what a mark says of a file."""


def generated(text: str) -> tuple[str, dict[str, str]]:
    """The page's text with its figures made again, and the plots by their names."""
    made: dict[str, str] = {}

    def written(match: re.Match[str]) -> str:
        begin, kind, name, end = match.groups()
        path = ROOT / name
        if kind == "figures":
            made.update({plot.name: plot.svg for plot in _plots(load(path))})
        return begin + "\n" + "\n".join(KINDS[kind](path)) + "\n\n" + end

    text, count = BLOCK.subn(written, text)
    if not count:
        raise SystemExit(f"{PAGE} has no marks to write between")
    return text, made


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    text, made = generated(PAGE.read_text())
    FIGURES.mkdir(exist_ok=True)
    files = {FIGURES / f"{name}.svg": svg.encode() for name, svg in made.items()}
    for path, data in {**files, PAGE: text.encode()}.items():
        write_atomically(path, lambda file, data=data: file.write(data))


if __name__ == "__main__":
    main()
