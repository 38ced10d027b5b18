"""Measure the package against eager PyTorch and torch.compile, on this machine.

Each contestant's values and gradients are first compared with float64: a wrong answer gets no time. Contestants
take turns; ratios are those of medians, with 95 % intervals, and say how many times as long the fastest eager, or
the fastest compiled, version takes. "of copy" is the share of the speed at which a copy moves the bytes that the
operation must. Ctrl-C ends the run with what it has.

Exit statuses: 0, done; 1, a contestant was wrong, or --compare found a regression; 130, interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import info
from ..errors import CommandError, require
from ..files import write_where_asked
from ..interruption import Interruption
from ..options import MOST_THREADS, integer, number, usable_device
from . import report
from .cases import (
    DIRECTIONS,
    DTYPES,
    MEMORY_FORMATS,
    MODELS,
    OPERATIONS,
    PRESETS,
    STANDARD,
    SWEEP,
    SWEEP_EXPONENTS,
    Case,
    groups,
)
from .compare import verdict_lines, verdicts
from .contestants import methods, usual_idiom
from .suite import FORMAT, Result, Settings, counts, measure, new_result
from .table import case_lines, csv_text, heading_line, json_text, list_text, summary_lines

REPORT = "report.html"
"""The file that --report makes in its directory."""

_SWEEP_PRESETS = [f"2^{exponent}" for exponent in SWEEP_EXPONENTS]
_STANDARD: dict[str, Any] = {
    "presets": list(MODELS),
    "operations": list(STANDARD),
    "dtypes": ["float32"],
    "memory_formats": ["contiguous"],
    "directions": ["both"],
    "contestants": [
        "eager/*",
        *dict.fromkeys(f"compile*/{usual_idiom(operation)}" for operation in OPERATIONS),
        "fusedvae/*",
    ],
    "seconds": 2.0,
}
_QUICK: dict[str, Any] = {
    **_STANDARD,
    "presets": ["mnist-mlp", "2^20"],
    "operations": ["latent", "elbo", "step"],
    "contestants": ["eager/handwritten", "eager/diffusers", "compile/handwritten", "fusedvae/*"],
    "seconds": 1.0,
}
_FULL: dict[str, Any] = {**_STANDARD, "presets": list(PRESETS), "contestants": ["*"]}


def some_of(choices: list[str], aliases: dict[str, list[str]] | None = None) -> Callable[[str], list[str]]:
    """A parser of comma-separated choices."""

    def parse(text: str) -> list[str]:
        chosen: list[str] = []
        for name in text.split(","):
            expanded = (aliases or {}).get(name, [name])
            if any(one not in choices for one in expanded):
                raise argparse.ArgumentTypeError(
                    f"expected some of {', '.join([*choices, *(aliases or {})])}, with commas between; got {name!r}"
                )
            chosen += [one for one in expanded if one not in chosen]
        return chosen

    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group(
        "what to measure", "lists have commas between their items; --list shows all of them"
    )
    size = what.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a few cases, within a minute")
    size.add_argument("--full", action="store_true", help="every preset, the sweep over sizes, every contestant")
    aliases = {SWEEP: _SWEEP_PRESETS, "models": list(MODELS)}
    what.add_argument(
        "--presets", type=some_of(list(PRESETS), aliases), metavar="LIST", help="shapes (default: models)"
    )
    what.add_argument(
        "--operations",
        type=some_of(list(OPERATIONS), groups()),
        metavar="LIST",
        help=f"names, or {', '.join(groups())} (default: standard)",
    )
    what.add_argument("--dtypes", type=some_of(list(DTYPES)), metavar="LIST", help="(default: float32)")
    what.add_argument(
        "--memory-formats", type=some_of(list(MEMORY_FORMATS)), metavar="LIST", help="(default: contiguous)"
    )
    what.add_argument("--directions", type=some_of(list(DIRECTIONS)), metavar="LIST", help="(default: both)")
    what.add_argument(
        "--contestants",
        type=lambda text: text.split(","),
        metavar="LIST",
        help=f"names or patterns (default: {','.join(_STANDARD['contestants'])}; with --full all)",
    )
    what.add_argument("--list", action="store_true", help="show what can be chosen, and measure nothing")

    how = parser.add_argument_group("how")
    how.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    how.add_argument("--threads", type=integer(1), metavar="N", help="CPU threads (default: PyTorch's)")
    how.add_argument(
        "--seconds", type=number(0, exclusive=True), metavar="S", help="of timing, for each case (default: 2)"
    )
    how.add_argument("--seed", type=integer(0), metavar="N", help="of the inputs (default: 0)")
    how.add_argument("--quiet", action="store_true", help="no progress bar")

    output = parser.add_argument_group("what to do with it")
    output.add_argument("--json", type=Path, metavar="FILE", help="write every figure and the environment")
    output.add_argument("--csv", type=Path, metavar="FILE", help="write a row for each contestant of each case")
    output.add_argument(
        "--report", type=Path, metavar="DIR", help=f"write {REPORT} with plots, which needs no other file"
    )
    output.add_argument(
        "--compare",
        type=Path,
        metavar="FILE",
        help="measure what an earlier run (its --json) measured, and show what changed beyond the noise",
    )
    output.add_argument("--from", dest="source", type=Path, metavar="FILE", help="measure nothing: use an earlier run")


def run(arguments: argparse.Namespace) -> int:
    if arguments.report is not None:
        require("matplotlib.figure", "bench")
    _check_destinations(arguments)
    old = None if arguments.compare is None else load(arguments.compare)
    if arguments.source is not None:
        _check_measures_nothing(arguments)
        return _finish(arguments, load(arguments.source), old)
    settings = _settings(arguments, {} if old is None else old["settings"])
    if arguments.list:
        print(list_text(_contestant_names(settings)))
        return 0
    if not any(settings.methods(case) for case in settings.cases()):
        raise CommandError("nothing to measure: no preset that was chosen has such an operation and contestant")
    threads_before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        return _measure(arguments, settings, old)
    finally:
        torch.set_num_threads(threads_before)


def _check_measures_nothing(arguments: argparse.Namespace) -> None:
    """Check that nothing is chosen of what has been measured already."""
    given = [name for name in Settings._fields if getattr(arguments, name) is not None]
    given += [name for name in ("quick", "full", "list") if getattr(arguments, name)]
    if given:
        raise CommandError(f"--from uses what was measured, all of it: it takes no --{given[0].replace('_', '-')}")


def _settings(arguments: argparse.Namespace, previous: dict[str, Any]) -> Settings:
    """What was asked for; else what that to compare with was asked for; else what is usual."""
    usual = _QUICK if arguments.quick else _FULL if arguments.full else {**_STANDARD, **previous}
    values: dict[str, Any] = {}
    for name in Settings._fields:
        given = getattr(arguments, name)
        values[name] = usual.get(name) if given is None else given
    values["device"] = usable_device(values["device"] or "auto")
    values["threads"] = values["threads"] or torch.get_num_threads()
    values["seed"] = values["seed"] or 0
    settings = Settings(**values)
    _check_numbers(settings)
    return settings


def _check_numbers(settings: Settings) -> None:
    """Refuse what no machine has, and what ends processes in ways that no message comes from."""
    for name, low, high in (("threads", 1, MOST_THREADS), ("seed", 0, 2**63 - 1), ("seconds", 0, math.inf)):
        value = getattr(settings, name)
        if not low <= value <= high:
            raise CommandError(f"--{name}: expected {low} to {high}, got {value}")


def _contestant_names(settings: Settings) -> list[str]:
    device = torch.device(settings.device)
    operations = [Case("mnist-mlp", operation) for operation in OPERATIONS]
    return list(dict.fromkeys(method.name for case in operations for method in methods(case, device)))


def _check_destinations(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be written before an hour is spent on it."""
    for option in ("json", "csv"):
        path = getattr(arguments, option)
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            reason = "is a directory" if path.is_dir() else f"there is no directory {path.absolute().parent}"
            raise CommandError(f"--{option}: cannot write {path}: {reason}")
    if arguments.report is not None:
        try:
            arguments.report.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(f"--report: cannot make {arguments.report}: {error}") from error


def load(path: Path) -> Result:
    """The result in a file that --json wrote."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read {path}: {error}") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT or "cases" not in result:
        raise CommandError(f"{path} holds no run of this version of fusedvae bench")
    try:
        _read_through(result)
    except Exception as error:  # whatever a value that is absent, or of another kind, leads to
        raise CommandError(f"cannot read {path}: it is damaged, or not whole ({error!r})") from error
    return result


def _read_through(result: Result) -> None:
    """Do with a result all that will be done with it: what it lacks is found before an hour of measuring is."""
    settings = Settings(**result["settings"])
    for case in settings.cases():
        settings.methods(case)
    _check_numbers(settings)
    for entry in result["cases"]:
        case_lines(entry)
    summary_lines(result)
    csv_text(result)
    verdict_lines(result, result, verdicts(result, result))
    for text in (result["date"], result["command"]):
        text.lower()
    if not all(isinstance(facts, dict) for facts in result["environment"].get("devices", {}).values()):
        raise TypeError("devices")


def _command(settings: Settings) -> str:
    """The command that measures the same, whatever the defaults of its version are."""
    words = ["fusedvae", "bench"]
    for name, value in settings._asdict().items():
        words += [f"--{name.replace('_', '-')}", ",".join(value) if isinstance(value, list) else str(value)]
    return shlex.join(words)


def _measure(arguments: argparse.Namespace, settings: Settings, old: Result | None) -> int:
    environment = info.collect()
    if runtime := environment["openmp"]["runtime"]:  # where it lies is of no use to who reads a result elsewhere
        environment["openmp"]["runtime"] = Path(runtime).name
    result = new_result(settings, _command(settings), environment)
    cases = settings.cases()
    bar = None
    if not arguments.quiet:
        bar = require("tqdm", "bench").tqdm(total=len(cases), unit="case", disable=None, leave=False)
    written = print if bar is None else lambda line: bar.write(line, file=sys.stdout)

    def progress(what: str) -> None:
        if bar is not None:
            bar.set_postfix_str(what)

    def after_case(entry: Result) -> None:
        for line in case_lines(entry):
            written(line)
        _write_json(arguments, result)  # what ends in another way than by Ctrl-C leaves something, too
        if bar is not None:
            bar.update()

    written(heading_line())
    with Interruption() as interruption:
        try:
            finished = measure(
                settings,
                result,
                progress=progress,
                after_case=after_case,
                stop=lambda: interruption.signal is not None,
            )
        finally:
            if bar is not None:
                bar.close()
    status = _finish(arguments, result, old, listed=True)
    if not finished:
        print(f"interrupted after {len(result['cases'])} of {len(cases)} cases")
        return 143 if interruption.signal == signal.SIGTERM else 130
    return status


def _finish(arguments: argparse.Namespace, result: Result, old: Result | None, *, listed: bool = False) -> int:
    """Say what a result comes to, write it where it is wanted, and compare it."""
    if not listed:
        lines = [heading_line(), *(line for entry in result["cases"] for line in case_lines(entry))]
        print("\n".join(lines))
    print("\n".join(summary_lines(result)))
    _write_json(arguments, result)
    if arguments.csv is not None:
        _write(arguments.csv, csv_text(result))
    if arguments.report is not None:
        _write(arguments.report / REPORT, report.write_html(result))
    regressions = False
    if old is not None:
        found = verdicts(old, result)
        print("\n".join(verdict_lines(old, result, found)))
        regressions = any(verdict.is_regression for verdict in found)
    return int(regressions or counts(result)["wrong"] > 0)


def _write_json(arguments: argparse.Namespace, result: Result) -> None:
    if arguments.json is not None:
        _write(arguments.json, json_text(result))


def _write(path: Path, text: str) -> None:
    write_where_asked(path, text.encode())
