"""What is replaced in a library and how, and how to see that it is what it is taken for."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor


class UnknownShapeError(Exception):
    """Something of a library is not as known."""


class Replacement(Protocol):
    """Something that can take the place of something."""

    name: str
    """Of what it replaces."""

    def do(self) -> None: ...

    def undo(self) -> None: ...


class Method:
    """A method of a class of the library."""

    def __init__(self, owner: type, attribute: str, new: Callable[..., Any]) -> None:
        self.name = f"{owner.__qualname__}.{attribute}"
        self._owner, self._attribute, self._new = owner, attribute, new
        self._original = vars(owner)[attribute]

    def do(self) -> None:
        setattr(self._owner, self._attribute, self._new)

    def undo(self) -> None:
        if vars(self._owner).get(self._attribute) is self._new:  # else somebody else has replaced it since
            setattr(self._owner, self._attribute, self._original)


class Everywhere:
    """A class or a function, wherever a module of the library has it by any name, also in those that are imported
    later."""

    def __init__(self, package: str, original: Any, new: Any) -> None:
        self.name = original.__qualname__
        self._package, self._original, self._new = package, original, new

    def do(self) -> None:
        self._exchange(self._original, self._new)

    def undo(self) -> None:
        self._exchange(self._new, self._original)

    def _exchange(self, old: Any, new: Any) -> None:
        for module in _modules_of(self._package):
            for name in [name for name, value in list(vars(module).items()) if value is old]:
                setattr(module, name, new)


def _modules_of(package: str) -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and (name == package or name.startswith(f"{package}.")):
            yield module


def in_the_place_of(original: type, bases: tuple[type, ...], **attributes: Any) -> type:
    """A class that is found, shown and pickled as another one is, which is among its bases."""
    named = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original.__name__, bases, {**named, **attributes})


def check_signature(owner: Any, name: str, expected: str) -> None:
    """Check that a function of a module, or a method of a class, takes arguments of these names, ``self`` aside."""
    names = list(inspect.signature(getattr(owner, name)).parameters)
    found = ", ".join(names[1:] if isinstance(owner, type) else names)
    if found != expected:
        raise UnknownShapeError(f"{owner.__name__}.{name} takes ({found}), expected ({expected})")


def check_equal(name: str, found: Any, expected: Any) -> None:
    """Check that two results, or sequences of them, agree to the rounding of their dtype."""
    if isinstance(expected, Tensor):
        if found.shape != expected.shape or not torch.allclose(found, expected.to(found.dtype), 1e-6, 1e-6):
            raise UnknownShapeError(f"{name} does not compute what was expected")
        return
    if not isinstance(expected, Sequence) or len(found) != len(expected):
        raise UnknownShapeError(f"{name} returns something else than was expected")
    for one, other in zip(found, expected, strict=True):
        check_equal(name, one, other)


def example(*shape: int, seed: int) -> Tensor:
    """Numbers to compare two functions on; the default generators are left alone."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float64, device="cpu")
