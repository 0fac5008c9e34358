"""Docstrings for the site: what reStructuredText or this project's own habits write and Markdown cannot show."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

_RULE = r"=+(?: +=+)+\n"
_TABLE = re.compile(rf"^{_RULE}(?:.+\n){{1,3}}?{_RULE}(?:.+\n)*?{_RULE}", re.MULTILINE)
_AS_ANOTHER = re.compile(r"^Raises:\n +What (``\w+``) raises\.", re.MULTILINE)


class Markdown(Extension):
    """Puts tables into a fence, and names sections as the parser knows them."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Change the docstring of one object in place."""
        if obj.docstring is None:
            return
        text = _TABLE.sub(lambda table: f"```text\n{table[0]}```\n", obj.docstring.value + "\n")
        text = _AS_ANOTHER.sub(r"Raises what \1 raises.", text)
        obj.docstring.value = text.replace("\nExample:\n", "\nExamples:\n").rstrip()
