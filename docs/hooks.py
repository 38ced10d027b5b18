"""What the documentation site needs beside plugins: formulas as MathML, which browsers show without a script."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# As pymdownx.arithmatex leaves them: <span class="arithmatex">\(...\)</span>, <div class="arithmatex">\[...\]</div>.
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)

# What MathML has no way to say, or latex2mathml does not: letters of other alphabets, and the space after a function.
_REWRITTEN = ((r"\\mathcal N", "𝒩"), (r"\\mathbb E", "𝔼"), (r"\\(log|ln|cos|sin) (?=[\w\\])", r"\\\1\\,"))


def on_page_content(content: str, **_: Any) -> str:
    """Write the formulas of a page."""

    def written(match: re.Match[str]) -> str:
        tag, latex = match.group(1), html.unescape(match[2]).strip()
        for pattern, instead in _REWRITTEN:
            latex = re.sub(pattern, instead, latex)
        formula = convert(latex, display="block" if tag == "div" else "inline")
        return f'<{tag} class="formula">{formula}</{tag}>'

    return _FORMULA.sub(written, content)
