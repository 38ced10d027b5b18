"""The canonical form against brute force: a walk must meet every element, in all operands at once, and nothing else."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from fusedvae.layout import Layout, Strides, canonical, contiguous_strides, dense_strides, expanded


@st.composite
def strides_of(draw: st.DrawFn, shape: Sequence[int]) -> Strides:
    """Dimensions in any order, with gaps (slices, halves of a packed tensor) and expanded ones; or anything at all."""
    if draw(st.integers(0, 4)) == 0:  # such as overlapping windows
        return tuple(draw(st.lists(st.integers(0, 30), min_size=len(shape), max_size=len(shape))))
    strides, step = [0] * len(shape), draw(st.sampled_from((1, 1, 1, 2)))
    order = range(len(shape))
    if draw(st.booleans()):
        order = draw(st.permutations(order))
    for d in reversed(order):
        if draw(st.integers(0, 5)) == 0:
            continue
        strides[d] = step
        step *= max(shape[d], 1) + draw(st.sampled_from((0, 0, 0, 1, 3)))
    return tuple(strides)


@st.composite
def problems(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[Strides, ...]]:
    shape = tuple(draw(st.lists(st.sampled_from((0, 1, 2, 2, 3, 3, 4)), min_size=1, max_size=5)))
    return shape, tuple(draw(st.lists(strides_of(shape), min_size=1, max_size=4)))


def offset(position: Sequence[int], strides: Sequence[int]) -> int:
    return sum(p * s for p, s in zip(position, strides, strict=True))


def positions(sizes: Sequence[int]) -> itertools.product:
    return itertools.product(*map(range, sizes))


def check(layout: Layout, shape: tuple[int, ...], operands: Sequence[Strides], keep_batch: bool, indexed: bool) -> None:
    walked = [layout.dense if k in layout.copies else strides for k, strides in enumerate(operands)]
    index = contiguous_strides(shape)

    def along(position: Sequence[int], batch: int, strides: Sequence[Strides], logical: Strides) -> tuple[int, ...]:
        """Where an element lies in every operand, and what of its place among the others matters to the caller."""
        places = [offset(position, s) for s in strides]
        return (*places, batch if keep_batch else 0, offset(position, logical) if indexed else 0)

    expected = Counter(along(p, p[0], walked, index) for p in positions(shape))
    found = Counter(along(p, p[0], layout.strides, layout.logical) for p in positions(layout.extent))
    assert found == expected
    assert all(inner in (0, 1) for _, _, inner in layout.strides)
    if keep_batch:
        assert layout.extent[0] == shape[0]
    # What is copied needs a place of its own for each element, and no room besides.
    assert sorted(offset(p, layout.dense) for p in positions(shape)) == list(range(math.prod(shape)))


@given(problems(), st.booleans(), st.booleans())
@example(((3, 4), ((4, 1), (8, 2))), True, True)
@example(((2, 3, 4), ((12, 1, 3), (12, 4, 1), (1, 2, 6))), True, True)
def test_a_walk_meets_every_element_of_all_operands(
    problem: tuple[tuple[int, ...], tuple[Strides, ...]], keep_batch: bool, indexed: bool
) -> None:
    shape, operands = problem
    check(canonical(shape, operands, keep_batch=keep_batch, indexed=indexed), shape, operands, keep_batch, indexed)


@given(problems(), st.booleans())
def test_copies_are_of_what_does_not_fit_only(
    problem: tuple[tuple[int, ...], tuple[Strides, ...]], keep_batch: bool
) -> None:
    """An operand alone is walked in place if it can be, and always if it is dense."""
    shape, operands = problem
    assume(0 not in shape)
    for strides in operands:
        dense = dense_strides(shape, strides)
        assert not canonical(shape, (dense,), keep_batch=False, indexed=False).copies
        assert not canonical(shape, (contiguous_strides(shape),) * 2, keep_batch=keep_batch, indexed=True).copies
        if canonical(shape, (strides,), keep_batch=keep_batch, indexed=False).copies:
            # Nothing but a fastest stride above 1, or too many dimensions that do not merge, is a reason.
            first, room = (1, 2) if keep_batch else (0, 3)
            steps = [s for s, size in zip(strides[first:], shape[first:], strict=True) if size > 1]
            assert len(steps) > room or min(steps) > 1


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


FORMS = {
    "contiguous": lambda shape: torch.empty(shape),
    "channels_last": lambda shape: channels_last(torch.empty(shape)),
    "a half of a packed tensor": lambda shape: torch.empty(shape[0], 2 * shape[1], *shape[2:]).chunk(2, 1)[1],
    "a half of a channels_last packed tensor": lambda shape: channels_last(
        torch.empty(shape[0], 2 * shape[1], *shape[2:])
    ).chunk(2, 1)[1],
    "a part of a batch": lambda shape: torch.empty(2 * shape[0], *shape[1:])[1 : shape[0] + 1],
    "every second sample": lambda shape: torch.empty(2 * shape[0], *shape[1:])[::2],
    "cropped vectors": lambda shape: torch.empty(shape[0], math.prod(shape[1:]) + 5)[:, 5:].unflatten(1, shape[1:]),
}
SPREADS = [(), (1,), (3, 1, 1), (4, 1, 1, 1), (4, 3, 1, 1), (1, 3, 5, 7), (4, 3, 5, 7)]


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("keep_batch", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_no_copies_of_the_forms_that_need_none(form: str, keep_batch: bool, indexed: bool) -> None:
    shape = (4, 3, 5, 7)
    operand = FORMS[form](shape)
    assert operand.shape == shape
    dense = torch.empty_like(operand)  # a gradient
    for spread in SPREADS:
        if indexed and spread:  # noise is made for the latent, which has no broadcast operands
            continue
        other = expanded(spread, contiguous_strides(spread), shape)
        operands = (operand.stride(), dense.stride(), other)
        layout = canonical(shape, operands, keep_batch=keep_batch, indexed=indexed)
        if "channels_last" in form and spread[1:] == shape[1:]:  # row-major pixels: not the same order in memory
            assert layout.copies <= {2}
        else:
            assert not layout.copies
        check(layout, shape, operands, keep_batch, indexed)


@pytest.mark.parametrize(("shape", "spread"), [((4, 3, 5, 7), (4, 1, 5, 7)), ((4, 3, 5, 7), (7,)), ((4, 6), (6,))])
def test_broadcast_along_channels_or_rows(shape: tuple[int, ...], spread: tuple[int, ...]) -> None:
    operands = (contiguous_strides(shape), expanded(spread, contiguous_strides(spread), shape))
    layout = canonical(shape, operands, keep_batch=True, indexed=False)
    assert not layout.copies
    check(layout, shape, operands, True, False)


def test_a_large_batch_of_images_is_one_run() -> None:
    """What merges is merged: long inner loops are what makes the kernels fast."""
    shape = (64, 3, 64, 64)
    same = (contiguous_strides(shape),) * 3
    count = math.prod(shape)
    assert canonical(shape, same, keep_batch=False, indexed=True).extent == (1, 1, count)
    assert canonical(shape, same, keep_batch=True, indexed=True).extent == (64, 1, count // 64)
    last = (dense_strides(shape, (12288, 1, 192, 3)),) * 3
    assert canonical(shape, last, keep_batch=False, indexed=False).extent == (1, 1, count)


def test_where_the_first_operand_has_no_order_the_next_one_sets_it() -> None:
    """A mean that is expanded lies in every order: data in any are read where they are."""
    shape = (4, 3, 5, 7)
    channels_last = (105, 1, 21, 3)
    layout = canonical(shape, ((0, 0, 0, 0), channels_last, channels_last), keep_batch=True, indexed=False)
    assert not layout.copies
    assert layout.extent == (4, 1, 105)
