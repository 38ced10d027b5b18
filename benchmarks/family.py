"""Every likelihood and every form of a scale on the CPU, against what people write and against the usual form.

    python benchmarks/family.py [--operations nll-laplace,forms] [--threads 2] [--seconds 2] [--no-compile] [--json F]

Forward and backward pass in float32, on 1.5 million elements and on 2^12. Operations, operands, contestants, checks
(nothing is timed whose values or gradients are not those of float64) and timers are those of `fusedvae bench`; the
usual form (of a log-variance, or of the logarithm of a scale) takes its turns beside the others. A ratio is that of
medians: how many times as long eager PyTorch as people write it takes, and the same under torch.compile; and how many
times as long the operation takes as in the usual form.

Goals: at least 3x eager on the many elements, where eager writes more than three operations; never slower than eager
or compiled; forms take at most 1.35 times as long as the usual one. Behind a ratio stands "MISSED" where a goal is, and
"?" where the 95 % interval has the goal in it: measure longer, or on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fusedvae
from fusedvae.cli import bench
from fusedvae.cli.bench.cases import PRESETS, SPECS, Case, Preset, groups, operands
from fusedvae.cli.bench.contestants import methods, usual_idiom
from fusedvae.cli.bench.measuring import Contestant, interleaved
from fusedvae.cli.bench.statistics import Estimate, ratio, summary
from fusedvae.cli.bench.suite import OperationWork

CPU = torch.device("cpu")
SHAPES = {"64x3x88x88": (64, 3, 88, 88), "64x64": (64, 64)}
MANY = 2**20
"""Elements from which on the goal against eager holds."""
ROUNDS = (15, 2000)
TURN_SECONDS = 2e-3
EAGER_GOAL, EAGER_OPERATIONS = 3.0, 3
"""At least so many times as long as the fused operation, where eager writes more operations than these."""
RIVAL_GOAL = 1.0
FORM_GOAL = 1.35


class _Count(TorchFunctionMode):
    """Counts the operations on as many elements as there are, as they are written down."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        largest = max((a.numel() for a in (*args, result) if isinstance(a, Tensor)), default=0)
        self.count += isinstance(result, Tensor) and largest >= self.elements
        return result


class Row(NamedTuple):
    """What was found out about an operation on so many elements."""

    operation: str
    elements: int
    written: int
    """Operations that eager writes."""
    microseconds: dict[str, float]
    ratios: dict[str, Estimate]
    """Of eager's and the compiled time to the fused one; and of that to the usual form's."""
    problems: dict[str, str]

    def verdict(self, name: str) -> str:
        """What the goal makes of a ratio."""
        if name not in self.ratios:
            return ""
        value, low, high = self.ratios[name]
        if name == "form":
            value, low, high, goal = 1 / value, 1 / high, 1 / low, 1 / FORM_GOAL
        else:
            is_long = self.written > EAGER_OPERATIONS and self.elements >= MANY
            goal = EAGER_GOAL if name == "eager" and is_long else RIVAL_GOAL
        if low < goal <= high:
            return "?"
        return "" if value >= goal else "MISSED"


def usual_form(operation: str) -> str:
    """The operation that is the same in the usual form."""
    spec = SPECS[operation]
    if spec.is_plain:
        return operation
    wanted = spec._replace(scale=next(iter(spec.formula.forms)), clamp=None, description="")
    return next(name for name, other in SPECS.items() if other._replace(description="") == wanted)


def entered(case: Case, wanted: list[str]) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Those of the named contestants that give the right answer, by the first parts of their names; and why others do
    not."""
    work = OperationWork(case, CPU, torch.Generator().manual_seed(0))
    work.make_sets()
    found: dict[str, Contestant] = {}
    problems: dict[str, str] = {}
    for method in methods(case, CPU):
        if method.name not in wanted:
            continue
        name = method.name.partition("/")[0]
        try:
            found[name] = work.enter(method)[0]._replace(name=name)
        except Exception as error:  # a wrong answer, or whatever a compiler may raise: the others can still compete
            problems[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, problems


def written_by_eager(case: Case) -> int:
    """How many operations eager PyTorch writes, of those that all elements go through."""
    given = operands(case, torch.Generator().manual_seed(0))
    eager = next(method for method in methods(case, CPU) if method.name == f"eager/{usual_idiom(case.operation)}")
    with _Count(case.elements) as counting:
        eager.operation(case.operation)(*given.arguments)
    return counting.count


def measured(operation: str, shape: str, seconds: float, *, compiles: bool) -> Row:
    torch.compiler.reset()
    case, usual = Case(shape, operation), usual_form(operation)
    idiom = usual_idiom(operation)
    wanted = ["fusedvae/native", f"eager/{idiom}", *([f"compile/{idiom}"] if compiles else [])]
    found, problems = entered(case, wanted)
    if usual != operation:
        beside, _ = entered(Case(shape, usual), ["fusedvae/native"])  # of whose problems its own row tells
        if "fusedvae" in beside:
            found["form"] = beside["fusedvae"]._replace(name="form")
    seconds_of = interleaved(list(found.values()), CPU, seconds=seconds, rounds=ROUNDS, turn=TURN_SECONDS).seconds
    ratios = {}
    if "fusedvae" in found:
        fused = seconds_of["fusedvae"]
        ratios = {name: ratio(seconds_of[name], fused) for name in ("eager", "compile") if name in found}
        if "form" in found:
            ratios["form"] = ratio(fused, seconds_of["form"])
    times = {name: summary(them).median * 1e6 for name, them in seconds_of.items()}
    return Row(operation, case.elements, written_by_eager(case), times, ratios, problems)


HEADING = f"{'':22}{'elements':>10}{'fused':>10}{'written':>8}{'vs eager':>17}{'vs compile':>17}{'to usual form':>17}"


def line(row: Row) -> str:
    cells = [
        f"{row.ratios[name].value:.2f}x {row.verdict(name):6}" if name in row.ratios else ""
        for name in ("eager", "compile", "form")
    ]
    fused = f"{row.microseconds['fusedvae']:.1f}us" if "fusedvae" in row.microseconds else "-"
    text = f"{row.operation:22}{row.elements:>10,}{fused:>10}{row.written:>8}{''.join(f'{c:>17}' for c in cells)}"
    return "\n".join([text.rstrip(), *(f"    {name}: {reason}" for name, reason in row.problems.items())])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [name for name, spec in SPECS.items() if spec.kind in ("kl", "nll", "latent")]
    aliases = {group: [name for name in them if name in default] for group, them in groups().items()}
    names = bench.some_of(default, aliases)
    parser.add_argument("--operations", type=names, default=default, metavar="LIST", help="names or groups of them")
    parser.add_argument("--shapes", type=bench.some_of(list(SHAPES)), default=list(SHAPES), metavar="LIST")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing, for each row")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes longest")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name, shape in SHAPES.items():
        PRESETS[name] = Preset(f"{math.prod(shape):,} elements", "this script", latent=shape, x=shape)
    environment = {
        "torch": torch.__version__,
        "threads": args.threads,
        "backend": fusedvae.backends()["native"].description,
    }
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    print(HEADING)
    rows = []
    for shape in args.shapes:
        for operation in args.operations:
            rows.append(measured(operation, shape, args.seconds, compiles=not args.no_compile))
            print(line(rows[-1]), flush=True)
    verdicts = [row.verdict(name) for row in rows for name in row.ratios]
    print(f"{verdicts.count('MISSED')} of {len(verdicts)} goals missed, {verdicts.count('?')} uncertain")
    if args.json:
        found = [row._asdict() | {"verdicts": {name: row.verdict(name) for name in row.ratios}} for row in rows]
        with open(args.json, "w") as file:
            json.dump({**environment, "rows": found}, file, indent=1)
            file.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
