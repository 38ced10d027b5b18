"""A result as text: the table in the terminal, and rows for a spreadsheet."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable
from typing import Any

from .cases import DIRECTIONS, DTYPES, MEMORY_FORMATS, MODELS, OPERATIONS, SWEEP, SWEEP_EXPONENTS, Case, groups
from .suite import Result, counts

COLUMNS = (
    "preset",
    "operation",
    "dtype",
    "memory_format",
    "direction",
    "elements",
    "from",
    "contestant",
    "family",
    "status",
    "reason",
    "vs_eager",
    "vs_eager_low",
    "vs_eager_high",
    "vs_compile",
    "vs_compile_low",
    "vs_compile_high",
    "seconds",
    "seconds_q1",
    "seconds_q3",
    "rounds",
    "repeats",
    "memory_bytes",
    "launches",
    "traffic_bytes",
    "bytes_per_second",
    "share_of_copy",
    "error",
)


def case_of(entry: Result) -> Case:
    """The case that an entry of a result is about."""
    return Case(*(entry[name] for name in ("preset", "operation", "dtype", "memory_format", "direction")))


def seconds_text(seconds: float) -> str:
    """A time with three digits."""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 1e-6:.3g} µs"


def bytes_text(count: float) -> str:
    """A size with three digits, in powers of 1024."""
    for power, name in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.3g} {name}"
    return f"{count:.0f} B"


def ratio_text(ratio: list[float] | None) -> str:
    return "" if ratio is None else f"{ratio[0]:.2f}x"


def interval_text(ratio: list[float] | None) -> str:
    return "" if ratio is None else f"{ratio[1]:.2f}-{ratio[2]:.2f}"


HEADINGS = ("", "vs eager", "(95 %)", "vs compile", "(95 %)", "median", "quartiles", "of copy", "memory", "launches")


def case_lines(entry: Result) -> list[str]:
    """A case and its contestants."""
    lines = [f"{case_of(entry)}  {_about(entry)}"]
    for contestant in entry["contestants"]:
        if contestant["status"] != "ok":
            lines.append(f"  {contestant['name']:34} {contestant['status'].upper()}: {contestant['reason']}")
            continue
        lines.append(_line([f"  {contestant['name']}", *figures(contestant)]))
    return lines


def heading_line() -> str:
    """What the columns of `case_lines` are."""
    return _line(HEADINGS)


def _line(cells: Iterable[str]) -> str:
    name, *rest = cells
    widths = (9, 12, 11, 12, 9, 17, 8, 9, 8)
    return f"{name:36}" + " ".join(f"{cell:>{width}}" for cell, width in zip(rest, widths, strict=True)).rstrip()


def figures(contestant: Result) -> list[str]:
    """What `HEADINGS` name, of a contestant that was timed."""
    seconds, ratios = contestant["seconds"], contestant["ratios"]
    share = contestant.get("share_of_copy")
    return [
        ratio_text(ratios.get("eager")),
        interval_text(ratios.get("eager")),
        ratio_text(ratios.get("compile")),
        interval_text(ratios.get("compile")),
        seconds_text(seconds["median"]),
        f"{seconds_text(seconds['q1'])}-{seconds_text(seconds['q3'])}",
        "" if share is None else f"{share:.0%}",
        "" if contestant["memory_bytes"] is None else bytes_text(contestant["memory_bytes"]),
        str(contestant["launches"]),
    ]


def _about(entry: Result) -> str:
    if entry["status"] == "skipped":
        return f"skipped: {entry['reason']}"
    known = [f"{entry['elements']:,} elements"]
    if entry["from"] != "training":
        known.append(f"from {entry['from']}")
    if "copy_bytes_per_second" in entry:
        known.append(f"a copy reaches {entry['copy_bytes_per_second'] / 1e9:.3g} GB/s")
    if entry.get("noisy"):
        known.append("NOISY")
    return f"({', '.join(known)})"


def summary_lines(result: Result) -> list[str]:
    """What the whole result comes to."""
    lines = []
    for entry in result["cases"]:
        for contestant in entry["contestants"]:
            for rival, ratio in contestant.get("ratios", {}).items():
                if contestant["family"] == "fused" and "+graph" not in contestant["name"] and ratio[0] < 1:
                    lines.append(
                        f"slower than {rival}: {case_of(entry)}, {contestant['name']}: "
                        f"{ratio_text(ratio)} ({interval_text(ratio)})"
                    )
    found = counts(result)
    answers = f"{found['ok']} right answers, {found['wrong']} wrong, {found['failed']} failed to run"
    lines.append(f"{len(result['cases'])} cases: {answers}")
    if result["noise"]["noisy"]:
        lines.append(
            f"NOISY MACHINE: in {result['noise']['noisy_cases']} cases, a loop that never changes took longer than in "
            "others or varied much; compare nothing with these figures"
        )
    return lines


def json_text(result: Result) -> str:
    """The result as JSON, with lists of numbers on one line each."""
    text = json.dumps(result, indent=1, ensure_ascii=False)
    return re.sub(r"\[\s+([-+.\de,\s]+?)\s+\]", lambda numbers: f"[{' '.join(numbers[1].split())}]", text) + "\n"


def csv_text(result: Result) -> str:
    """A row for each contestant of each case."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, COLUMNS, restval="")
    writer.writeheader()
    for entry in result["cases"]:
        shared = {name: entry[name] for name in COLUMNS if name in entry and name not in ("status", "reason")}
        if entry["status"] == "skipped":
            writer.writerow({**shared, "status": "skipped", "reason": entry["reason"]})
        for contestant in entry["contestants"]:
            writer.writerow({**shared, **_row(contestant)})
    return out.getvalue()


def _row(contestant: Result) -> dict[str, Any]:
    row = {name: contestant[name] for name in COLUMNS if name in contestant}
    row["contestant"] = contestant["name"]
    if contestant["status"] != "ok":
        return row
    seconds = contestant["seconds"]
    row["seconds"], row["seconds_q1"], row["seconds_q3"] = seconds["median"], seconds["q1"], seconds["q3"]
    row["rounds"], row["repeats"] = seconds["rounds"], seconds["repeats"]
    for family, (value, low, high) in contestant["ratios"].items():
        row[f"vs_{family}"], row[f"vs_{family}_low"], row[f"vs_{family}_high"] = value, low, high
    return row


def list_text(names: list[str]) -> str:
    """Everything that can be chosen; ``names`` are those of the contestants on this machine."""
    lines = ["presets"]
    for name, preset in MODELS.items():
        lines += [f"  {name:18} {preset.description}", f"  {'':18} source: {preset.source}"]
    first, last = SWEEP_EXPONENTS[0], SWEEP_EXPONENTS[-1]
    lines += [f"  {SWEEP:18} 2^{first}, 2^{first + SWEEP_EXPONENTS.step}, ... 2^{last} elements, also one by one"]
    for title, choices in (("operations", OPERATIONS), ("directions", DIRECTIONS)):
        width = max(18, *map(len, choices))
        lines += ["", title, *(f"  {name:{width}} {meaning}" for name, meaning in choices.items())]
    lines += ["", "groups of operations"]
    lines += [f"  {name:18} {'all of these' if name == 'all' else ', '.join(them)}" for name, them in groups().items()]
    lines += ["", f"dtypes             {', '.join(DTYPES)}", f"memory formats     {', '.join(MEMORY_FORMATS)}"]
    lines += ["", "contestants", *(f"  {name}" for name in names)]
    return "\n".join(lines)
