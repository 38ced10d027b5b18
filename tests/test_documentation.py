"""The documentation: its code runs, its commands are understood, its links lead somewhere, and its site is built."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import DOCS, PAGES, ROOT, blocks

import fusedvae
from fusedvae import dropins
from fusedvae.cli import _parser

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="needs a checkout")

EACH = [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in PAGES]
# The tutorial runs as a notebook: test_examples.py.
WITH_CODE = [param for param in EACH if blocks(param.values[0].read_text()) and param.id != "docs/tutorial.md"]
WITH_COMMANDS = [param for param in EACH if blocks(param.values[0].read_text(), "sh")]


@pytest.mark.parametrize("page", WITH_CODE)
def test_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block after the other, as a reader would run them; what is not served here is compiled."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "__main__"}
    try:
        for block in blocks(page.read_text()):
            code = block.compiled(page)
            if block.is_served:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)  # torch's own, compiling
                    if block.needs is not None:  # a library's own warnings are its own affair
                        warnings.simplefilter("ignore")
                    exec(code, names)
    finally:
        torch.use_deterministic_algorithms(False)
        for patch in list(dropins._active.values()):
            patch.undo()


def test_several_samples_in_a_loop_of_ones_own() -> None:
    """How-to's block with the exact KL: value and gradients of a plain loop over the samples, on the same noise."""
    page = DOCS / "how-to" / "importance-weights.md"
    setting, *others = blocks(page.read_text())
    (block,) = (block for block in others if "nll.mean() + kl.mean()" in block.code)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(setting.compiled(page), names)
    vae, x = names["vae"], names["x"]
    vae.zero_grad()
    exec(block.compiled(page), names)
    gradients = [parameter.grad.clone() for parameter in vae.parameters()]
    noise = ((names["z"] - names["mu"]) / (names["logvar"] / 2).exp()).detach()
    mu, logvar = vae.encode(x)
    loss = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1).mean()
    for of_one in noise:
        logits = vae.decode(mu + (logvar / 2).exp() * of_one).logits
        cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none")
        loss = loss + cross_entropy.sum(1).mean() / len(noise)
    torch.testing.assert_close(names["loss"], loss, rtol=1e-5, atol=0)
    expected = torch.autograd.grad(loss, list(vae.parameters()))
    torch.testing.assert_close(gradients, list(expected), rtol=1e-4, atol=1e-5)


def test_blocks_are_found_with_what_they_need() -> None:
    text = "# A\n\n```python\na = 1\n```\n\n<!-- needs: cuda -->\n```python\nb = 2\n```\n\n"
    text += "- c\n\n    ```python\n    c\n    ```\n<!-- needs: torchrun -->\n```sh\nls\n```\n"
    found = blocks(text)
    assert [(block.code, block.line, block.needs) for block in found] == [
        ("a = 1\n", 3, None),
        ("b = 2\n", 8, "cuda"),
        ("c\n", 14, None),
    ]
    assert [block.is_served for block in found] == [True, torch.cuda.is_available(), True]
    (other,) = blocks(text, "sh")
    assert (other.code, other.is_served) == ("ls\n", False)
    with pytest.raises(ZeroDivisionError) as error:
        exec(blocks("\n\n```python\na = 1\n\n1 / 0\n```\n")[0].compiled(Path("page.md")))
    assert error.traceback[-1].lineno == 5  # counted from 0


def test_no_fence_is_overlooked() -> None:
    """Every fence is of a language that these tests know, and closed."""
    for page in PAGES:
        text = page.read_text()
        fences = re.findall(r"^ *```(\w*)", text, re.MULTILINE)
        assert set(fences[::2]) <= {"python", "sh", "text", "console"}, page
        assert set(fences[1::2]) <= {""}, page
        counted = sum(len(blocks(text, language)) for language in ("python", "sh", "text", "console"))
        assert 2 * counted == len(fences), page


# --- commands ---------------------------------------------------------------------------------------------------


def _commands(page: Path) -> list[list[str]]:
    """The words of each command of a page's blocks."""
    found = []
    for block in blocks(page.read_text(), "sh"):
        subprocess.run(["bash", "-n"], input=block.code, text=True, check=True, timeout=30)
        for line in block.code.replace("\\\n", "").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                found.append(words)
    return found


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_commands_of_a_page_are_understood(page: Path) -> None:
    """Those of the package by its parser; scripts are there, and the extras that pip installs."""
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for words in _commands(page):
        start = 1 if words[0] == "fusedvae" else 0
        if "fusedvae" in words and words[words.index("fusedvae") - 1] == "-m":
            start = words.index("fusedvae") + 1
        if start and "--help" not in words:
            _parser().parse_args(words[start:])  # a CommandError says what is wrong
        for word in words:
            if re.fullmatch(r"(scripts|benchmarks|tests|examples)/[\w/-]+\.(sh|py)", word):
                assert (ROOT / word).is_file(), word
            if extra := re.fullmatch(r"(?:\.|fusedvae)\[([\w,-]+)\].*", word):
                assert set(extra[1].split(",")) <= set(extras), word


def test_the_readme_is_a_page() -> None:
    """What is long has a page of its own in docs/."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert {"docs/tutorial.md", "docs/losses.md", "docs/benchmarks.md"} <= set(re.findall(r"\]\(([^)]+)\)", text))


# --- the table of layers ----------------------------------------------------------------------------------------


def _layers() -> dict[str, int]:
    """Paths in CONTRIBUTING's table, each with its row: the later, the higher a layer."""
    found: dict[str, int] = {}
    rows = re.findall(r"^\| (`fusedvae/[^|]*) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    for number, row in enumerate(rows):
        folder = ""
        for path in re.findall(r"`([^`]+)`", row):
            folder = path.rpartition("/")[0] if path.startswith("fusedvae/") and path.endswith(".py") else folder
            found[path if path.startswith("fusedvae/") else f"{folder or 'fusedvae'}/{path}"] = number
    return found


def _layer_of(path: str, layers: dict[str, int]) -> int:
    """A file's own row, else that of its folder."""
    fitting = [name for name in layers if path == name or (name.endswith("/") and path.startswith(name))]
    assert fitting, f"{path} is in no row of CONTRIBUTING's table"
    return layers[max(fitting, key=len)]


def _imported(path: Path) -> set[str]:
    """Modules of the package that a module imports, wherever it does, but for type checkers alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        for name in names:
            place = ROOT.joinpath(*name.split("."))
            for file in (place.with_suffix(".py"), place / "__init__.py"):
                if name.startswith("fusedvae.") and file.is_file():
                    found.add(file.relative_to(ROOT).as_posix())
    return found


def test_layers_know_those_above_them_in_the_table() -> None:
    layers = _layers()
    for path in layers:
        assert (ROOT / path).exists(), path
    wrong, seen = [], 0
    for path in sorted((ROOT / "fusedvae").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name in ("fusedvae/__init__.py", "fusedvae/__main__.py"):  # which are over all of them
            continue
        for other in _imported(path):
            seen += 1
            if _layer_of(other, layers) > _layer_of(name, layers):
                wrong.append(f"{name} imports {other}")
    assert seen > 100
    assert not wrong


# --- links, and the site ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [param for param in EACH if param.values[0].parent == ROOT])
def test_links_lead_to_files(page: Path) -> None:
    """Of pages outside of docs/, whose links the site's builder checks."""
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_page_is_on_the_site(tmp_path: Path) -> None:
    """Built with warnings as errors: links, anchors, pages that no menu has, names that are documented."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: see the extra 'docs'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout  # with --quiet it would be 0, whatever there is to warn of
    for page in DOCS.rglob("*.md"):
        place = page.relative_to(DOCS).with_suffix("")
        built = tmp_path / "site" / (place.parent if place.name == "index" else place) / "index.html"
        text = built.read_text()
        assert "arithmatex" not in text, f"{page}: a formula that is not written"
        assert not re.search(r'(?:src|href)="(?:https?:)?//[^"]*\.(?:js|css|woff2?)"', text), f"{page}: fetched"
        assert not re.search(r":(?:class|func|meth|mod|attr):", text), f"{page}: a role of another system"
    reference = "".join(page.read_text() for page in (tmp_path / "site" / "reference").rglob("index.html"))
    documented = set(re.findall(r'id="(fusedvae\.[\w.]+)"', reference))
    missing = [names for names in _public_names() if not documented & names]
    assert not missing, f"not in docs/reference: {missing}"


def _public_names() -> list[set[str]]:
    """Of what users call, the names it may stand under: where they find it, where it is defined, the package."""
    found = [{"fusedvae.random.normal"}, {"fusedvae.VAE.log_likelihood"}]
    for module in (fusedvae, fusedvae.functional, fusedvae.distributions, fusedvae.networks):
        for name, value in vars(module).items():
            is_own = f"{getattr(value, '__module__', None)}.".startswith(f"{module.__name__}.")
            is_public = name in fusedvae.__all__ if module is fusedvae else is_own and not name.startswith("_")
            if is_public and (inspect.isclass(value) or inspect.isfunction(value)):
                package, *_ = value.__module__.rpartition(".")
                found.append({f"{place}.{name}" for place in (module.__name__, value.__module__, package)})
    return found
