"""The code on the pages of the documentation, for the tests that run it.

What a block needs is said before it in a comment, which readers do not see: ``<!-- needs: cuda -->``,
``<!-- needs: diffusers -->``. Where that is not there, the block is compiled alone.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])

_BLOCK = re.compile(
    r"^(?:<!-- needs: (?P<needs>[^\n]+) -->\n)?(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """Code between fences."""

    language: str
    code: str
    line: int
    """Where it begins, counted from 0."""
    needs: str | None

    @property
    def is_served(self) -> bool:
        """Whether what it needs is there: CUDA, a library; more processes ("torchrun") are not."""
        if self.needs is None:
            return True
        if self.needs == "cuda":
            return torch.cuda.is_available()
        return self.needs != "torchrun" and importlib.util.find_spec(self.needs) is not None

    def compiled(self, page: Path) -> object:
        """With the line numbers of the page."""
        return compile("\n" * self.line + self.code, str(page), "exec")


def blocks(text: str, language: str = "python") -> list[Block]:
    """The blocks of a language on a page."""
    found = []
    for match in _BLOCK.finditer(text):
        if match["language"] == language:
            code = re.sub(f"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
            found.append(Block(language, code, text.count("\n", 0, match.start("code")), match["needs"]))
    return found
