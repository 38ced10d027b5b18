"""What the documentation site needs beside plugins: formulas as MathML, which browsers show without a script."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# As pymdownx.arithmatex leaves them: <span class="arithmatex">\(...\)</span>, <div class="arithmatex">\[...\]</div>.
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Write the formulas of a page."""

    def written(match: re.Match[str]) -> str:
        tag, latex = match.groups()
        formula = convert(html.unescape(latex).strip(), display="block" if tag == "div" else "inline")
        return f'<{tag} class="formula">{formula}</{tag}>'

    return _FORMULA.sub(written, content)
