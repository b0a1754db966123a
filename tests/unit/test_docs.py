"""The examples in the documentation show what really comes out."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from pathlib import Path
from typing import Any

import pytest

from maskdsl.codegen.kernel import interpreting
from maskdsl.errors import MaskDSLError

PAGES = ["language.md", "dynamic.md", "compiler.md", "patterns.md", "errors.md", "index.md",
         "flexattention.md",
         pytest.param("models.md", marks=pytest.mark.filterwarnings("ignore"))]


def outcome(example: doctest.Example, names: dict[str, Any]) -> str:
    """What an example prints; for one of our errors its class and text."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile(example.source, "<page>", "single"), names)
        except MaskDSLError as error:
            print(f"{type(error).__name__}: {error}")
    return printed.getvalue()


@pytest.mark.skipif(not interpreting(), reason="pages show what a machine without a GPU prints")
@pytest.mark.parametrize("name", PAGES)
def test_examples_of_a_page(name: str, project: Path) -> None:
    text = (project / "docs" / name).read_text()
    if "import AutoModel" in text:
        pytest.importorskip("transformers")
    blocks = re.findall(r"```pycon\n(.*?)```", text, re.DOTALL)
    assert blocks
    names: dict[str, Any] = {}
    exec("from maskdsl import *", names)
    for block in blocks:
        for example in doctest.DocTestParser().get_examples(block):
            assert outcome(example, names) == example.want, example.source
