"""The kernel cache: one file a text, safe with several processes, proof against damage."""

from __future__ import annotations

import inspect
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from maskdsl.codegen import build

SOURCE = "VALUE = 42\n\n\ndef answer():\n    return VALUE\n"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MASKDSL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_modules", {})
    return tmp_path / "kernels"


def test_a_kernel_is_a_real_file(cache: Path) -> None:
    module = build.load_module(SOURCE)
    assert module.answer() == 42
    assert inspect.getsource(module.answer) == SOURCE[SOURCE.index("def"):]
    assert [p.read_text() for p in cache.iterdir() if p.suffix == ".py"] == [SOURCE]


def test_the_same_text_is_loaded_once(cache: Path) -> None:
    first = build.load_module(SOURCE)
    assert build.load_module(SOURCE) is first
    assert build.load_module(SOURCE) is not build.load_module(SOURCE + "\n")


@pytest.mark.parametrize("damage", [b"", b"VALUE = 41\n", b"\xff\xfe\x00", b"def broken(:\n"])
def test_a_damaged_file_is_written_again(cache: Path, damage: bytes) -> None:
    build.load_module(SOURCE)
    (path,) = cache.glob("*.py")
    path.write_bytes(damage)
    build._modules.clear()
    assert build.load_module(SOURCE).answer() == 42
    assert path.read_text() == SOURCE


def test_a_stale_bytecode_file_is_not_trusted(cache: Path) -> None:
    build.load_module(SOURCE)
    for compiled in cache.glob("__pycache__/*"):
        compiled.write_bytes(b"not bytecode")
    build._modules.clear()
    assert build.load_module(SOURCE).answer() == 42


def test_many_threads_get_one_module(cache: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        modules = list(pool.map(build.load_module, [SOURCE] * 32))
    assert all(module is modules[0] for module in modules)
    assert not list(cache.glob("*.tmp"))


def test_many_processes_share_the_folder(cache: Path) -> None:
    program = ("from maskdsl.codegen.build import load_module\n"
               "for i in range(20):\n"
               f"    assert load_module({SOURCE!r} + '#' * i).answer() == 42\n")
    runs = [subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
            for _ in range(4)]
    told = [run.communicate()[1] for run in runs]  # all are waited for before anything can fail
    assert told == [""] * len(runs)
    assert all(run.returncode == 0 for run in runs)
    assert len(list(cache.glob("*.py"))) == 20
    assert not list(cache.glob("*.tmp"))


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("MASKDSL_CACHE_DIR", str(blocked))
    monkeypatch.setattr(build, "_modules", {})
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    with pytest.warns(UserWarning, match="MASKDSL_CACHE_DIR"):
        assert build.load_module(SOURCE).answer() == 42
