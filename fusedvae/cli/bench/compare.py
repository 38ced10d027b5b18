"""What changed between two recorded runs, beyond the noise."""

from __future__ import annotations

from typing import Any, NamedTuple

from .cases import Case
from .statistics import Estimate, change
from .suite import Result
from .table import case_of

THRESHOLD = 0.05
"""A smaller change is none, however sure it is. On noisy machines, the spread of the calibration's times instead."""


class Verdict(NamedTuple):
    """What became of a fused contestant in a case."""

    case: Case
    contestant: str
    verdict: str
    """"slower", "faster", "same", "broken" (right before, wrong or failing now), "gone", "new"."""
    change: Estimate | None = None
    """How many times as long it takes now, beside what is not this package's."""

    @property
    def is_regression(self) -> bool:
        return self.verdict in ("slower", "broken")


def verdicts(old: Result, new: Result) -> list[Verdict]:
    """A verdict on each fused contestant of either result, in the cases of the new one.

    Times are corrected by those of the contestants that are not this package's, eager and compiled PyTorch: they ran in
    the same rounds, and what they changed by is the machine's or PyTorch's doing.
    """
    threshold = max(THRESHOLD, old["noise"]["spread"], new["noise"]["spread"])
    before, after = _by_case(old), _by_case(new)
    found = []
    for case, now in after.items():
        then = before.get(case, {})
        controls = [
            name
            for name in now
            if name in then and now[name]["family"] in ("eager", "compile") and _timed(now[name]) and _timed(then[name])
        ]
        for name in [*now, *(name for name in then if name not in now)]:
            contestant = now.get(name) or then[name]
            if contestant["family"] == "fused":
                found.append(_verdict(case, name, then, now, controls, threshold))
    return found


def _verdict(
    case: Case, name: str, then: dict[str, Any], now: dict[str, Any], controls: list[str], threshold: float
) -> Verdict:
    if name not in now:
        return Verdict(case, name, "gone")
    if not _timed(now[name]):
        return Verdict(case, name, "broken" if name in then and _timed(then[name]) else "same")
    if name not in then or not _timed(then[name]):
        return Verdict(case, name, "new")
    estimate = change(
        then[name]["times"],
        now[name]["times"],
        [then[control]["times"] for control in controls],
        [now[control]["times"] for control in controls],
    )
    if estimate.low > 1 + threshold:
        return Verdict(case, name, "slower", estimate)
    if estimate.high < 1 / (1 + threshold):
        return Verdict(case, name, "faster", estimate)
    return Verdict(case, name, "same", estimate)


def _by_case(result: Result) -> dict[Case, dict[str, Any]]:
    return {case_of(entry): {c["name"]: c for c in entry["contestants"]} for entry in result["cases"]}


def _timed(contestant: Result) -> bool:
    return bool(contestant["status"] == "ok")


def verdict_lines(old: Result, new: Result, found: list[Verdict]) -> list[str]:
    """The verdicts for people: what changed, then how much did not."""
    lines = [f"compared with the run of {old['date']}:"]
    lines += [f"  another {what}: {then}, now {now}" for what, then, now in _differences(old, new) if then != now]
    for verdict in found:
        if verdict.verdict == "same":
            continue
        text = f"  {verdict.verdict.upper():7} {verdict.case}, {verdict.contestant}"
        if verdict.change is not None:
            value, low, high = verdict.change
            text += f": takes {value:.2f} times as long ({low:.2f}-{high:.2f})"
        lines.append(text)
    same = sum(verdict.verdict == "same" for verdict in found)
    lines.append(f"  {same} of {len(found)} unchanged beyond the noise")
    return lines


def _differences(old: Result, new: Result) -> list[tuple[str, Any, Any]]:
    """What else may have changed a time."""

    def facts(result: Result) -> dict[str, Any]:
        environment = result["environment"]
        device = result["settings"]["device"].partition(":")[0]
        found = {f"version of {name}": version for name, version in environment.get("versions", {}).items()}
        found["number of threads"] = result["settings"]["threads"]
        found["machine"] = ", ".join(environment.get("devices", {}).get(device, {}).get("names", []))
        return found

    before, after = facts(old), facts(new)
    return [(name, before.get(name), after[name]) for name in after]
