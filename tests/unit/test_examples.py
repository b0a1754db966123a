"""The examples run and say the right thing, and the README's picture is the mask's."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from maskdsl import Causal, LastQ, PerHead, Sink, Window

Out = pytest.CaptureFixture[str]
TESTED = {"quickstart.py", "new_pattern.py", "compare_patterns.py", "head_mixture.py",
          "document_packing.py", "pictures.ipynb", "train.py",
          "gemma.py"}  # needs the extra `model`: tests/integrations/test_gemma.py


def load(project: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, project / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_png(path: Path) -> bool:
    return path.read_bytes()[:4] == b"\x89PNG"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_all_examples_are_here(project: Path) -> None:
    assert {path.name for path in (project / "examples").iterdir()
            if path.suffix in (".py", ".ipynb")} == TESTED
    page = (project / "docs" / "examples.md").read_text()
    assert [name for name in TESTED if f"`{name}`" not in page] == []


def test_quickstart(project: Path, capsys: Out) -> None:
    load(project, "quickstart").main(4096)
    told = capsys.readouterr().out
    assert all(word in told for word in ("live pairs", "tiles", "memory", "x as long"))
    assert is_png(Path("mask.png"))


def test_new_pattern(project: Path, capsys: Out) -> None:
    module = load(project, "new_pattern")
    module.main(2048)
    told = capsys.readouterr().out
    assert float(told.split("difference to dense attention: ")[1].split()[0]) < 1e-5
    assert is_png(Path("new_pattern.png"))
    function = next(node for node in ast.parse(Path(module.__file__ or "").read_text()).body
                    if isinstance(node, ast.FunctionDef))
    assert function.end_lineno is not None
    assert function.end_lineno - function.lineno < 20  # as the page says


def test_compare_patterns(project: Path, capsys: Out) -> None:
    module = load(project, "compare_patterns")
    module.main(1024, 128)
    told = capsys.readouterr().out
    assert len(module.PATTERNS) == 10
    assert told.count("Causal() & ") >= 10
    assert "Pareto front" in told
    assert is_png(Path("patterns.png"))
    assert is_png(Path("patterns_pareto.png"))


def test_head_mixture(project: Path, capsys: Out) -> None:
    mask = load(project, "head_mixture").main(1024)
    assert isinstance(mask, PerHead)
    assert [m == Causal() for m in mask.masks] == [False, True] * 4
    told = capsys.readouterr().out
    assert float(told.split("under the same mask: ")[1].split()[0]) < 1e-4
    assert is_png(Path("heads.png"))


def test_document_packing(project: Path) -> None:
    assert load(project, "document_packing").main((100, 700, 30)) < 1e-5
    assert is_png(Path("documents.png"))


def test_train(project: Path, capsys: Out) -> None:
    """A few steps: both learn the same from the same tokens; that the loss falls takes longer."""
    ours, plain = load(project, "train").main(8, (4, 96, 64, 2)).values()
    assert 3.4 < ours[0] < 4.5 and len(set(ours)) == 8  # log 32: no token is likelier than another
    assert max(abs(a - b) for a, b in zip(ours, plain, strict=True)) < 1e-3
    assert "largest difference" in capsys.readouterr().out
    assert is_png(Path("train.png"))


def test_the_notebook(project: Path) -> None:
    """Its cells run in order; what a cell ends with shows itself as the stored output does."""
    cells = json.loads((project / "examples" / "pictures.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    shown = 0
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        body = ast.parse("".join(cell["source"])).body
        last = body.pop()
        assert isinstance(last, ast.Expr)
        exec(compile(ast.Module(body, []), "<cell>", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
        (stored,) = cell["outputs"]
        if "image/png" in stored["data"]:
            assert value._repr_png_()[:4] == b"\x89PNG"
            shown += 1
    assert shown == 10
    assert Path("mask.html").stat().st_size > 10_000


def test_the_picture_in_the_readme(project: Path) -> None:
    picture = (Causal() & (Sink(1) | Window(2) | LastQ(1))).picture(6)
    text = (project / "README.md").read_text()
    assert "\n".join("    " + line for line in picture.splitlines()) in text
