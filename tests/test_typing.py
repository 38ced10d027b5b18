"""Types, as checkers see them; mypy checks ``typed_script.py`` with the package: see pyproject.toml."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest

from fusedvae import backend, typing
from fusedvae.backend.reference import FORMULAS, LIKELIHOODS
from fusedvae.functional.checks import TOTALS

SCRIPT = Path(__file__).parent / "typed_script.py"


def test_names_are_those_that_functions_take():
    assert get_args(typing.Backend) == ("auto", *backend.NAMES)
    assert get_args(typing.LikelihoodName) == tuple(LIKELIHOODS)
    assert get_args(typing.TermReduction) == (*TOTALS, "none")
    assert get_args(typing.NormalScale) == tuple(FORMULAS["kl_standard_normal"].forms)
    forms = {name for formula in LIKELIHOODS.values() if formula.scales for name in formula.forms}
    assert {name for kind in get_args(typing.LikelihoodScale) for name in get_args(kind)} == forms
    for name, kind in (("laplace", typing.LaplaceScale), ("poisson", typing.Rate)):
        assert get_args(kind) == tuple(LIKELIHOODS[name].forms)
    assert get_args(typing.Dispersion) == tuple(LIKELIHOODS["negative_binomial"].forms)


def test_pyright_understands_a_script(tmp_path: Path):
    """basedpyright brings its own Node.js: pyright's would be downloaded."""
    if find_spec("basedpyright") is None:
        pytest.skip("needs basedpyright")
    settings = {
        "include": [str(SCRIPT)],
        "extraPaths": [str(SCRIPT.parent.parent)],
        "typeCheckingMode": "standard",
        "reportUnnecessaryTypeIgnoreComment": True,
        "enableTypeIgnoreComments": False,  # mypy's
    }
    config = tmp_path / "pyrightconfig.json"
    config.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = json.loads(done.stdout)
    shown = [f"{d['range']['start']['line'] + 1}: {d['message']}" for d in found["generalDiagnostics"]]
    assert not shown
    assert found["summary"]["filesAnalyzed"] == 1
