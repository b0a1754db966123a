"""The examples in the documentation show what really comes out."""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import io
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from maskdsl import errors
from maskdsl.cli import main
from maskdsl.codegen.kernel import interpreting
from maskdsl.errors import MaskDSLError
from maskdsl.expr import ATOMS
from maskdsl.parse import known_names

PAGES = ["language.md", "dynamic.md", "compiler.md", "patterns.md", "errors.md", "index.md",
         "cost.md", "start.md", "how.md", "pictures.md", "study.md", "minference.md",
         "debugging.md", "flexattention.md",
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


def write(example: doctest.Example, want: str) -> str:
    """An example as the page shows it."""
    first, *more = example.source.rstrip("\n").split("\n")
    lines = [f">>> {first}", *(f"... {line}".rstrip() for line in more)]
    return "\n".join([*lines, want]) if want else "\n".join(lines) + "\n"


@pytest.mark.skipif(not interpreting(), reason="pages show what a machine without a GPU prints")
@pytest.mark.parametrize("name", PAGES)
def test_examples_of_a_page(name: str, project: Path, update_golden: bool) -> None:
    path = project / "docs" / name
    text = path.read_text()
    if "import AutoModel" in text:
        pytest.importorskip("transformers")
    blocks = re.findall(r"```pycon\n(.*?)```", text, re.DOTALL)
    assert blocks
    names: dict[str, Any] = {}
    exec("from maskdsl import *", names)
    for block in blocks:
        shown = ""
        for example in doctest.DocTestParser().get_examples(block):
            printed = outcome(example, names)
            shown += write(example, printed)
            assert update_golden or printed == example.want, example.source
        text = text.replace(block, shown, 1)
    if update_golden:
        path.write_text(text)


def test_commands_of_a_page(project: Path, update_golden: bool, capsys: pytest.CaptureFixture[str],
                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = project / "docs" / "cli.md"
    text = path.read_text()
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    assert len(blocks) > 2
    for block in blocks:
        command, want = block.split("\n", 1)
        main(shlex.split(command)[2:])
        told = capsys.readouterr()
        printed = told.out + told.err
        assert update_golden or printed == want
        text = text.replace(block, f"{command}\n{printed}", 1)
    if update_golden:
        path.write_text(text)


def draw_module(project: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw", project / "docs" / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_committed_pictures_are_those_of_the_code(project: Path) -> None:
    drawn = draw_module(project).draw_all()
    committed = {path.name: path.read_text(encoding="utf-8")
                 for path in (project / "docs" / "pictures").glob("*.svg")}
    assert committed == drawn  # python docs/draw.py draws them anew


def test_every_atom_and_pattern_has_its_picture(project: Path) -> None:
    drawn = draw_module(project)
    seen = {type(node).__name__ for mask, _ in drawn.ATOMS.values() for node in mask.walk()}
    assert set(ATOMS) | {"Where"} <= seen
    functions = set(known_names()) - set(ATOMS) - {"Diagonal"}
    assert functions == set(drawn.PATTERNS)
    text = "".join((project / "docs" / name).read_text() for name in ("language.md", "patterns.md"))
    assert all(f"pictures/atom_{name}.svg" in text for name in drawn.ATOMS)
    assert all(f"pictures/pattern_{name}.svg" in text for name in drawn.PATTERNS)


def test_every_error_is_told_of(project: Path) -> None:
    text = (project / "docs" / "errors.md").read_text()
    classes = [name for name, value in vars(errors).items()
               if isinstance(value, type) and issubclass(value, errors.MaskDSLError)]
    assert [name for name in classes if f"[`{name}`](#{name.lower()})" not in text] == []
