"""Prints what the package requires, and one of its extras besides: a requirement a line.

python scripts/requirements.py test
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import tomllib

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]


def of_extra(name: str) -> Iterator[str]:
    """Its requirements, with those of the extras that it names."""
    for requirement in PROJECT["optional-dependencies"][name]:
        extras = re.fullmatch(rf"{PROJECT['name']}\[(.+)\]", requirement)
        if extras is None:
            yield requirement
        else:
            for extra in extras[1].split(","):
                yield from of_extra(extra.strip())


if __name__ == "__main__":
    print("\n".join([*PROJECT["dependencies"], *of_extra(sys.argv[1])]))
