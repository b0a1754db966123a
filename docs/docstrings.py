"""For the API page: docstrings keep their lines, as their columns are aligned by hand."""

from __future__ import annotations

from typing import Any

from griffe import Extension, Object


class KeepLines(Extension):
    """The first paragraph of a docstring stays text, the rest becomes a text block."""

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        first, _, rest = obj.docstring.value.partition("\n\n")
        if rest and "```" not in rest:
            obj.docstring.value = f"{first}\n\n```text\n{rest}\n```"
