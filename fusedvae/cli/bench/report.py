"""A result as one HTML page that needs nothing beside it, and the plots in it."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..errors import require
from .cases import MODELS, OPERATIONS, PRESETS, SWEEP_EXPONENTS, Case
from .suite import Result, counts
from .table import HEADINGS, case_of, figures


class _Look(NamedTuple):
    label: str
    colour: str
    marker: str


# Colours that stay apart for colour-blind readers (Okabe & Ito 2008), and markers that stay apart without colours.
_LOOKS = {
    "fused": _Look("fusedvae", "#0072B2", "D"),
    "compile": _Look("torch.compile", "#E69F00", "s"),
    "eager": _Look("eager PyTorch", "#555555", "o"),
    "reference": _Look("fusedvae's formulas in plain PyTorch", "#A0A0A0", "^"),
}
_RIVALS = ("eager", "compile")
_COMPARED = ("fused", "compile", "eager")
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.fonttype": "path",
}
_SIZES = {f"2^{exponent}": 2**exponent for exponent in SWEEP_EXPONENTS}


class Plot(NamedTuple):
    """A figure and what it says."""

    name: str
    title: str
    caption: str
    svg: str


def plots(result: Result) -> list[Plot]:
    """Every plot that the result has data for."""
    makers = (_speedup_by_size, _share_by_size, _speedup_by_preset, _memory_by_preset, _step)
    return [plot for plot in (maker(result) for maker in makers) if plot is not None]


def write_html(result: Result) -> str:
    """The page."""
    figures = "\n".join(
        f'<figure id="{plot.name}"><h3>{html.escape(plot.title)}</h3>{plot.svg}'
        f"<figcaption>{html.escape(plot.caption)}</figcaption></figure>"
        for plot in plots(result)
    )
    return _PAGE.format(
        summary=_summary(result),
        figures=figures,
        tables="\n".join(_table(entry) for entry in result["cases"]),
        presets=_presets(result),
        environment=_environment(result),
        command=html.escape(result["command"]),
        date=html.escape(result["date"]),
    )


# --- data of the plots ------------------------------------------------------------------------------------------


def _plain_entries(result: Result, operation: str) -> list[Result]:
    """Those of an operation in float32, contiguous, forward and backward: the plots' subject."""
    return [
        entry
        for entry in result["cases"]
        if entry["status"] == "done" and case_of(entry) == Case(entry["preset"], operation)
    ]


def _fastest(entry: Result, family: str) -> Result | None:
    """The fastest contestant of a family, launched in the ordinary way."""
    found = [
        c for c in entry["contestants"] if c["family"] == family and c["status"] == "ok" and "+graph" not in c["name"]
    ]
    return min(found, key=lambda c: c["seconds"]["median"], default=None)


def _sweeps(result: Result) -> dict[str, list[Result]]:
    found = {}
    for operation in OPERATIONS:
        entries = [entry for entry in _plain_entries(result, operation) if entry["preset"] in _SIZES]
        if len(entries) > 1:
            found[operation] = sorted(entries, key=lambda entry: _SIZES[entry["preset"]])
    return found


def _models(result: Result) -> list[tuple[str, Result]]:
    return [
        (f"{entry['preset']}  {operation}", entry)
        for preset in MODELS
        for operation in OPERATIONS
        if operation != "step"
        for entry in _plain_entries(result, operation)
        if entry["preset"] == preset and _fastest(entry, "fused")
    ]


# --- drawing ----------------------------------------------------------------------------------------------------


def _draw(name: str, width: float, height: float, draw: Callable[[Any], None]) -> str:
    """A figure as SVG that can stand in a page: the same bytes for the same data."""
    matplotlib = require("matplotlib", "bench")
    figure_module = require("matplotlib.figure", "bench")
    out = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = figure_module.Figure((width, height), layout="constrained")
        draw(figure)
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _panels(figure: Any, count: int) -> list[Any]:
    columns = min(3, count)
    axes = figure.subplots(math.ceil(count / columns), columns, squeeze=False, sharey=True)
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.set_axis_off()
    return flat[:count]


def _size_axis(axes: Any) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks([2**exponent for exponent in SWEEP_EXPONENTS][::3])
    axes.set_xlabel("elements")


def _line(axes: Any, x: Sequence[float], y: Sequence[float], look: _Look, label: str) -> None:
    axes.plot(x, y, color=look.colour, marker=look.marker, markersize=3.5, linewidth=1.4, label=label)


def _legend_above(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))


def _speedup_by_size(result: Result) -> Plot | None:
    sweeps = _sweeps(result)
    if not sweeps:
        return None

    def draw(figure: Any) -> None:
        panels = _panels(figure, len(sweeps))
        for axes, (operation, entries) in zip(panels, sweeps.items(), strict=True):
            for family in _RIVALS:
                look = _LOOKS[family]
                points = []
                for entry in entries:
                    ours = _fastest(entry, "fused")
                    if ours is not None and family in ours["ratios"]:
                        points.append((_SIZES[entry["preset"]], *ours["ratios"][family]))
                if not points:
                    continue
                sizes, values, lows, highs = zip(*points, strict=True)
                axes.fill_between(sizes, lows, highs, color=look.colour, alpha=0.2, linewidth=0)
                _line(axes, sizes, values, look, f"over the fastest {look.label}")
            axes.axhline(1, color="black", linewidth=0.8)
            axes.set_title(operation)
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
            _size_axis(axes)
        panels[0].set_ylabel("speed-up")
        _legend_above(figure, panels[0])

    return Plot(
        "speedup-by-size",
        "Speed-up against size",
        "Forward and backward in float32. How many times as long the fastest eager and the fastest compiled version "
        "take as the fastest fused backend; bands are 95 % bootstrap intervals. Above the black line fusedvae is "
        "faster.",
        _draw("speedup-by-size", 9, 0.5 + 2.4 * math.ceil(len(sweeps) / 3), draw),
    )


def _share_by_size(result: Result) -> Plot | None:
    sweeps = {operation: entries for operation, entries in _sweeps(result).items() if "copy_seconds" in entries[0]}
    if not sweeps:
        return None

    def draw(figure: Any) -> None:
        panels = _panels(figure, len(sweeps))
        for axes, (operation, entries) in zip(panels, sweeps.items(), strict=True):
            for family in _COMPARED:
                points = [
                    (_SIZES[e["preset"]], best["share_of_copy"]) for e in entries if (best := _fastest(e, family))
                ]
                if points:
                    sizes, shares = zip(*points, strict=True)
                    _line(axes, sizes, shares, _LOOKS[family], _LOOKS[family].label)
            axes.axhline(1, color="black", linewidth=0.8)
            axes.set_title(operation)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            _size_axis(axes)
        panels[0].set_ylabel("share of a copy's speed")
        panels[0].set_ylim(0, min(panels[0].get_ylim()[1], 1.6))
        _legend_above(figure, panels[0])

    return Plot(
        "share-by-size",
        "Share of the physical limit",
        "The bytes that the operation must move at least, over the time it takes, as a share of the bytes a second "
        "that a copy of as many bytes reaches in the same rounds (the black line). An operation that reads more than "
        "it writes can be faster than a copy.",
        _draw("share-by-size", 9, 0.5 + 2.4 * math.ceil(len(sweeps) / 3), draw),
    )


def _horizontal(figure: Any, labels: list[str]) -> Any:
    axes = figure.add_subplot()
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    axes.tick_params(axis="y", length=0)
    return axes


def _speedup_by_preset(result: Result) -> Plot | None:
    models = _models(result)
    if not models:
        return None

    def draw(figure: Any) -> None:
        axes = _horizontal(figure, [label for label, _ in models])
        for family, shift in zip(_RIVALS, (-0.13, 0.13), strict=True):
            look, rows, values = _LOOKS[family], [], []
            for row, (_, entry) in enumerate(models):
                ours = _fastest(entry, "fused")
                if ours is not None and family in ours["ratios"]:
                    value, low, high = ours["ratios"][family]
                    axes.plot([low, high], [row + shift] * 2, color=look.colour, linewidth=1.2)
                    rows.append(row + shift)
                    values.append(value)
            style = {"color": look.colour, "marker": look.marker, "markersize": 4.5, "linestyle": "none"}
            axes.plot(values, rows, **style, label=f"over the fastest {look.label}")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axes.set_xlabel("speed-up")
        _legend_above(figure, axes)

    return Plot(
        "speedup-by-preset",
        "Speed-up on the shapes of real models",
        "Forward and backward in float32, with 95 % bootstrap intervals. Right of the black line fusedvae is faster.",
        _draw("speedup-by-preset", 9, 1.2 + 0.24 * len(models), draw),
    )


def _memory_by_preset(result: Result) -> Plot | None:
    models = [(label, entry) for label, entry in _models(result) if entry["elements"] >= 2**16]
    if not models:
        return None

    def draw(figure: Any) -> None:
        axes = _horizontal(figure, [label for label, _ in models])
        for number, family in enumerate(_COMPARED):
            bars = [
                (row + 0.26 * (number - 1), best["memory_bytes"] / entry["operand_bytes"])
                for row, (_, entry) in enumerate(models)
                if (best := _fastest(entry, family))
            ]
            if bars:
                look = _LOOKS[family]
                axes.barh(*zip(*bars, strict=True), height=0.24, color=look.colour, label=look.label)
        axes.set_xlabel("peak extra memory, as a multiple of the operands' own")
        _legend_above(figure, axes)

    return Plot(
        "memory-by-preset",
        "Peak extra memory",
        "The most memory allocated at a time by forward and backward pass, results and gradients included, beyond the "
        "operands; of the fastest contestant of each kind, in float32.",
        _draw("memory-by-preset", 9, 1.2 + 0.34 * len(models), draw),
    )


def _step(result: Result) -> Plot | None:
    entries = [
        entry for entry in _plain_entries(result, "step") if any(c["status"] == "ok" for c in entry["contestants"])
    ]
    if not entries:
        return None
    contestants = [c for c in entries[0]["contestants"] if c["status"] == "ok"]

    def draw(figure: Any) -> None:
        axes = _horizontal(figure, [c["name"] for c in contestants])
        for row, contestant in enumerate(contestants):
            seconds = contestant["seconds"]
            middle = 1e3 * seconds["median"]
            axes.barh([row], [middle], height=0.6, color=_LOOKS[contestant["family"]].colour)
            axes.plot([1e3 * seconds["q1"], 1e3 * seconds["q3"]], [row] * 2, color="black", linewidth=1)
            axes.annotate(
                f"{middle:.2f} ms", (1e3 * seconds["q3"], row), (4, 0), textcoords="offset points", va="center"
            )
        axes.set_xlabel("milliseconds a training step (lines: quartiles)")
        axes.margins(x=0.12)

    return Plot(
        "step",
        f"Time of a training step: {entries[0]['preset']}",
        "Networks, sampling, loss, backward pass and Adam. Networks and Adam are the same code for all contestants.",
        _draw("step", 9, 0.8 + 0.26 * len(contestants), draw),
    )


# --- the rest of the page ---------------------------------------------------------------------------------------


def _summary(result: Result) -> str:
    found = counts(result)
    parts = [
        f"{len(result['cases'])} cases; {found['ok']} results agree with float64 in values and gradients, "
        f"{found['wrong']} are wrong, {found['failed']} could not run."
    ]
    noise = result["noise"]
    parts.append(
        f"A loop that never changes varied by {noise['spread']:.1%} between its quartiles; in "
        f"{noise['noisy_cases']} cases by much more, or it took longer than in others: these are marked noisy."
    )
    note = ""
    if result["noise"]["noisy"]:
        note = '<p class="warning">The machine was too busy for these figures to mean much.</p>'
    return f"<p>{html.escape(' '.join(parts))}</p>{note}"


def _table(entry: Result) -> str:
    title = html.escape(str(case_of(entry)))
    if entry["status"] == "skipped":
        return f"<details><summary>{title}</summary><p>Skipped: {html.escape(entry['reason'])}</p></details>"
    headings = (*HEADINGS, "error")
    rows = []
    for c in entry["contestants"]:
        name = html.escape(c["name"])
        if c["status"] != "ok":
            reason = html.escape(f"{c['status']}: {c['reason']}")
            rows.append(f'<tr><th>{name}</th><td class="warning" colspan="{len(headings) - 1}">{reason}</td></tr>')
            continue
        cells = (*figures(c), f"{c['error']:.0e}")
        row = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr class="{c["family"]}"><th>{name}</th>{row}</tr>')
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    about = f"{entry['elements']:,} elements, from {entry['from']}"
    if "copy_bytes_per_second" in entry:
        about += f"; a copy reaches {entry['copy_bytes_per_second'] / 1e9:.3g} GB/s"
    if entry.get("noisy"):
        about += "; noisy"
    return (
        f"<details><summary>{title} <small>{about}</small></summary>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></details>"
    )


def _presets(result: Result) -> str:
    used = {entry["preset"] for entry in result["cases"]}
    items = [
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(preset.description)}. Source: {html.escape(preset.source)}.</dd>"
        for name, preset in PRESETS.items()
        if name in used
    ]
    return f"<dl>{''.join(items)}</dl>"


def _environment(result: Result) -> str:
    environment, settings = result["environment"], result["settings"]
    device = settings["device"].partition(":")[0]
    facts = {f"{name}": version for name, version in environment.get("versions", {}).items() if version}
    facts["machine"] = ", ".join(environment.get("devices", {}).get(device, {}).get("names", []))
    facts["platform"] = environment.get("platform", "")
    facts["CPU threads"] = settings["threads"]
    facts["seed"] = settings["seed"]
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fusedvae bench</title>
<style>
body {{ font: 15px/1.55 Georgia, "Times New Roman", serif; color: #1a1a1a; background: #fff; max-width: 62rem;
  margin: 2.5rem auto; padding: 0 1.25rem; }}
h1, h2, h3, summary, table, figcaption, code {{ font-family: "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }}
h1 {{ font-size: 1.7rem; margin: 0 0 .2rem; }}
h2 {{ font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid #ccc; }}
h3 {{ font-size: 1rem; margin: 0 0 .4rem; }}
.byline, small {{ color: #666; font-weight: normal; }}
figure {{ margin: 1.6rem 0 2.2rem; break-inside: avoid; }}
figure svg {{ width: 100%; height: auto; }}
figcaption {{ font-size: .82rem; color: #555; margin-top: .3rem; }}
pre {{ background: #f6f6f6; padding: .7rem .9rem; overflow-x: auto; font-size: .85rem; white-space: pre-wrap; }}
table {{ border-collapse: collapse; font-size: .78rem; width: 100%; margin: .5rem 0 1rem; }}
td, thead th {{ text-align: right; padding: .22rem .5rem; font-variant-numeric: tabular-nums; white-space: nowrap; }}
thead th {{ border-bottom: 1px solid #888; color: #555; font-weight: 600; }}
tbody th {{ text-align: left; font-weight: normal; white-space: nowrap; padding: .22rem .5rem; }}
tbody tr {{ border-bottom: 1px solid #eee; }}
tr.fused {{ background: #eaf3fa; }}
tr.fused th {{ font-weight: 600; }}
.facts td, td.warning {{ text-align: left; white-space: normal; }}
.facts {{ width: auto; }}
.warning {{ color: #b00020; font-weight: 600; }}
details {{ margin: .25rem 0; }}
details > table {{ display: block; overflow-x: auto; }}
summary {{ cursor: pointer; font-size: .9rem; font-weight: 600; }}
dt {{ font-weight: 600; }}
dd {{ margin: 0 0 .5rem 1.2rem; }}
@media print {{ body {{ max-width: none; margin: 0; }} details {{ break-inside: avoid; }} }}
</style>
</head>
<body>
<h1>fusedvae bench</h1>
<p class="byline">{date}</p>
{summary}
<h2>Results</h2>
{figures}
<h2>Every figure</h2>
<p>Ratios say how many times as long the fastest eager, or the fastest compiled, version takes. Times are medians over
rounds in which the contestants took turns.</p>
{tables}
<h2>Shapes</h2>
{presets}
<h2>Method</h2>
<p>Each contestant's values and gradients were compared with formulas in float64 before it was timed; the noise of a
sample was recovered from it and tested. Contestants took turns (A B C, A B C, ...) after a warm-up, on random inputs in
several sets of buffers; cases whose buffers fit into half of the last cache run from there, as they do in training.
Intervals of 95 % come from a paired bootstrap over rounds. Memory and launches (on CPUs: operators dispatched) are
the profiler's. The limit is a copy that moves as many bytes as the operation must, timed in the same rounds.</p>
<h2>Environment</h2>
{environment}
<p>To measure again:</p>
<pre><code>{command}</code></pre>
</body>
</html>
"""
