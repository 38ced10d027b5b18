"""Writes the README's table and plots of speed from a recorded run.

    python benchmarks/readme.py [benchmarks/results/NAME.json]

Without an argument it is the run that the README names already. The run itself is recorded by

    fusedvae bench --full --threads 2 --json benchmarks/results/NAME.json
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

from fusedvae.cli.bench import load
from fusedvae.cli.bench.report import plots
from fusedvae.cli.bench.suite import Result
from fusedvae.cli.bench.table import interval_text, ratio_text, seconds_text
from fusedvae.cli.checkpoint import write_atomically

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
FIGURES = ROOT / "benchmarks" / "figures"
BLOCK = re.compile(r"(<!-- figures of (\S+), by benchmarks/readme.py -->\n).*?(<!-- end of figures -->)", re.DOTALL)
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


def block(result: Result, source: str) -> str:
    """What stands in the README between the marks."""
    environment, settings = result["environment"], result["settings"]
    device = settings["device"].partition(":")[0]
    machine = ", ".join(environment["devices"][device]["names"])
    served = environment["devices"][device]
    kind = served["backends"][served["uses"]]["description"]
    what = (
        f"Forward and backward in float32 on {settings['threads']} threads ({machine}; {kind}), PyTorch "
        f"{environment['versions']['torch']}, {result['date'][:10]}: how many times as long the fastest way to write "
        "it in eager PyTorch, and the fastest of these under `torch.compile`, take, with 95 % intervals."
    )
    if result["noise"]["noisy"]:
        what += " The machine was busy at times, as wide intervals show."
    how = f"These figures are made from [one recorded run]({source}) by `python benchmarks/readme.py`; its command:"
    lines = [
        *textwrap.wrap(what, WIDTH),
        "",
        "| | against eager | against torch.compile | fusedvae takes |",
        "| --- | --- | --- | --- |",
    ]
    for preset, operation in ROWS:
        ours = _fastest_fused(result, preset, operation)
        if ours is None:
            continue
        cells = [f"`{operation}`, {preset}"]
        for rival in ("eager", "compile"):
            ratio = ours["ratios"].get(rival)
            cells.append(f"{ratio_text(ratio)} ({interval_text(ratio)})" if ratio else "")
        cells.append(seconds_text(ours["seconds"]["median"]))
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        *textwrap.wrap(how, WIDTH, break_long_words=False, break_on_hyphens=False),
        "",
        "```sh",
        result["command"],
        "```",
        "",
        *(f"![{plot.title}](benchmarks/figures/{plot.name}.svg)" for plot in plots(result) if plot.name in PLOTS),
    ]
    return "\n".join(lines) + "\n"


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


def generated(text: str, source: str | None = None) -> tuple[str, dict[str, str]]:
    """The README's text with its figures made again, and the plots by their names."""
    match = BLOCK.search(text)
    if match is None:
        raise SystemExit(f"{README} has no marks to write between")
    source = source or match[2]
    result = load(ROOT / source)
    content = f"<!-- figures of {source}, by benchmarks/readme.py -->\n{block(result, source)}<!-- end of figures -->"
    text = text[: match.start()] + content + text[match.end() :]
    return text, {plot.name: plot.svg for plot in plots(result) if plot.name in PLOTS}


def main() -> None:
    source = None
    if len(sys.argv) > 1:
        source = Path(sys.argv[1]).resolve().relative_to(ROOT).as_posix()
    text, figures = generated(README.read_text(), source)
    FIGURES.mkdir(exist_ok=True)
    for name, svg in figures.items():
        data = svg.encode()
        write_atomically(FIGURES / f"{name}.svg", lambda file, data=data: file.write(data))
    write_atomically(README, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
