"""The recipes of docs/recipes.md: in each, `before` and `after` have the same values and gradients."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from conftest import Target
from pages import DOCS, blocks
from torch import Tensor, nn

import fusedvae

PAGE = DOCS / "recipes.md"
SIZES = {"B": 5, "N": 11, "D": 6, "C": 4, "H": 3, "W": 7, "T": 8, "K": 9}
NO_GRADIENTS = {"x", "y", "actions", "adjacency", "mask", "weights", "noise", "pos_weight"}

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="needs a checkout")


class Recipe(NamedTuple):
    """A section of the page that has two functions."""

    title: str
    text: str
    blocks: list[str]


def _anchor(title: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


TEXT = PAGE.read_text() if PAGE.exists() else ""
INTRODUCTION, *SECTIONS = re.split(r"^##+ ", TEXT, flags=re.MULTILINE)
RECIPES = [Recipe(text.partition("\n")[0], text, [b.code for b in blocks(text)]) for text in SECTIONS if blocks(text)]
EACH = [pytest.param(recipe, id=_anchor(recipe.title)) for recipe in RECIPES]


def _functions(recipe: Recipe) -> tuple[Callable[..., Any], Callable[..., Any]]:
    (preamble,) = blocks(INTRODUCTION)
    names: dict[str, Any] = {}
    for block in (preamble.code, *recipe.blocks):
        exec(compile(block, recipe.title, "exec"), names)
    return names["before"], names["after"]


def _size(text: str) -> int:
    """Of a dimension: a number, a letter, 2D for twice a letter, or a product."""
    return eval(re.sub(r"(\d)([A-Z])", r"\1 * \2", text), {}, SIZES)


def _shape(text: str) -> tuple[int, ...]:
    return tuple(_size(size) for size in text.split(",") if size.strip())


def _operand(shape: tuple[int, ...], kind: str) -> Tensor:
    normal = torch.randn(shape, dtype=torch.float64)
    if kind == "":
        return normal / 2  # divergences around the free bits of the page
    if kind == "bool":
        return normal > 0
    if kind == "in {0, 1}":
        return (normal > 0).double()
    if kind == "in (0, 1)":
        return normal.sigmoid()
    if kind == "counts":
        return torch.relu(3 * normal).round()
    if kind == "pixels":
        return torch.tanh(2 * normal).mul(127.5).round().div(127.5).clamp(-1, 1)
    if kind == "> 0":
        return normal.exp()
    factor = re.fullmatch(r"\* (\d+)", kind)
    assert factor, f"no such kind: {kind!r}"
    return normal * int(factor[1])


def _operands(recipe: Recipe) -> dict[str, Any]:
    """Random ones of the shapes in the first line: "# a, b: (B, N) in (0, 1); net: N -> D"."""
    line = recipe.blocks[0].partition("\n")[0]
    made: dict[str, Any] = {}
    for part in line.removeprefix("# ").split("; "):
        names, _, what = part.partition(": ")
        if network := re.fullmatch(r"(\w+) -> (\w+)", what):
            made[names] = nn.Linear(_size(network[1]), _size(network[2]), dtype=torch.float64)
            continue
        described = re.fullmatch(r"\(([^)]*)\) ?(.*)", what)
        assert described, f"{recipe.title}: {part!r}"
        for name in names.split(", "):
            operand = _operand(_shape(described[1]), described[2])
            made[name] = operand.requires_grad_(operand.is_floating_point() and name not in NO_GRADIENTS)
    return made


def _results(function: Callable[..., Any], operands: dict[str, Any]) -> dict[str, Tensor]:
    """All that a function returns, and the gradients of a weighted sum of it."""
    leaves: dict[str, Tensor] = {}
    for name, operand in operands.items():
        if isinstance(operand, nn.Module):
            leaves |= {f"{name}.{key}": parameter for key, parameter in operand.named_parameters()}
        elif operand.requires_grad:
            leaves[name] = operand
    for leaf in leaves.values():
        leaf.grad = None
    returned = function(**operands)
    values = [returned] if isinstance(returned, Tensor) else list(returned)
    if values[0].requires_grad:  # else the recipe is of the backward pass too, and did it
        generator = torch.Generator(values[0].device).manual_seed(7)
        factors = [torch.randn(v.shape, dtype=v.dtype, device=v.device, generator=generator) for v in values]
        torch.autograd.backward(values, factors)
    gradients = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    return {f"value {i}": value.detach() for i, value in enumerate(values)} | gradients


@pytest.mark.parametrize("recipe", EACH)
def test_recipe(recipe: Recipe, target: Target) -> None:
    before, after = _functions(recipe)
    assert inspect.signature(before) == inspect.signature(after)
    operands = _operands(recipe)
    expected = _results(before, operands)
    with fusedvae.use_backend(target.backend):
        actual = _results(after, operands)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert value is not None, f"{name}: None from before"
        assert value.isfinite().all(), f"{name}: not finite"
        assert value.any(), f"{name}: 0, which shows nothing"
        size = 1e-9 * value.abs().max().item()  # gradients of a KL whose weight is small are small
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=size, msg=lambda m, name=name: f"{name}: {m}")


def test_there_are_recipes():
    assert len(RECIPES) >= 20
    assert len({recipe.title for recipe in RECIPES}) == len(RECIPES)


@pytest.mark.parametrize("recipe", EACH)
def test_recipes_have_one_form(recipe: Recipe):
    title, *rest = re.split(r"^```(?:python)?\n", recipe.text, flags=re.MULTILINE)
    before, between, after, facts = rest
    assert re.fullmatch(r"[^\n]+\n\nWritten so .+\.\n\n", title, re.DOTALL), "who writes it comes first"
    assert re.match(r"# [^\n]+\ndef before\(", before)
    assert between == "\n"
    assert after.startswith("def after(")
    assert "fused." in after
    assert re.fullmatch(r"\n- \*\*Equal\*\*: \S.+\.\n- \*\*Know\*\*: \S.+\.\n+", facts, re.DOTALL)


def test_contents_list_every_recipe():
    linked = dict(re.findall(r"\[([^\]]+)\]\(#([^)]+)\)", TEXT))
    assert list(linked)[1:] == [recipe.title for recipe in RECIPES]
    titles = {section.partition("\n")[0] for section in SECTIONS}
    assert {(title, _anchor(title)) for title in linked} == set(linked.items())
    assert set(linked) <= titles
