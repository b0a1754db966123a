"""The examples run, and the README's picture is the mask's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from maskdsl import Causal, LastQ, Sink, Window


def test_quickstart(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                    capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("quickstart",
                                                  project / "examples" / "quickstart.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(4096)
    told = capsys.readouterr().out
    assert all(word in told for word in ("live pairs", "tiles", "memory", "x as long"))
    assert (tmp_path / "mask.png").read_bytes()[:4] == b"\x89PNG"


def test_the_picture_in_the_readme(project: Path) -> None:
    picture = (Causal() & (Sink(1) | Window(2) | LastQ(1))).picture(6)
    text = (project / "README.md").read_text()
    assert "\n".join("    " + line for line in picture.splitlines()) in text
