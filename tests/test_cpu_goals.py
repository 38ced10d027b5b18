"""``benchmarks/cpu_goals.py``: that its contestants compute the same, and that what got slower is found."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "cpu_goals.py"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs a checkout")


@pytest.fixture(scope="module")
def goals() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cpu_goals", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cpu_goals"] = module
    spec.loader.exec_module(module)
    return module


def test_values_per_sample_are_those_of_eager(goals: ModuleType) -> None:
    first, second = torch.randn(50, 3), torch.randn(50, 3)
    for operation, (fused, eager) in goals.PER_SAMPLE.items():
        found, expected = fused(first, second), eager(first, second)
        if operation == "latent":
            found, expected = found[1], expected[1]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_got_slower(goals: ModuleType) -> None:
    def times(fused: float) -> list[dict[str, float]]:
        return [{"fused": fused * f, "eager": 50.0, "compile": 40.0, "randn": 5.0} for f in (0.9, 1.0, 1.1)]

    case = "elbo_loss 32x64, latent 8"
    assert goals.worse(case, times(10.0), times(10.9)) == []
    assert goals.worse(case, times(10.0), times(8.0)) == []
    assert goals.worse(case, times(10.0), times(12.0)) == [
        f"{case}: eager 4.17x, was 4.55-5.56x",
        f"{case}: compile 3.33x, was 3.64-4.44x",
    ]
    assert "eager 5.00x (4.55-5.56), goal 3.20x  " in goals.line(case, times(10.0))
    assert goals.line(case, times(20.0)).count("MISSED") == 2
    noise = "noise of plain PyTorch, 1,048,576"
    assert "MISSED" not in goals.line(noise, times(19.0))
    assert goals.line(noise, times(21.0)).endswith("MISSED")
