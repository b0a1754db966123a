"""What is built is what is in the tree, and it works where the tree is not."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tracked files."""
    folder = tmp_path_factory.mktemp("wheel")
    project = Path(__file__).parents[2]
    copy = folder / "tree"
    for name in ("maskdsl", "codegen", "patterns", "pyproject.toml", "README.md", "LICENSE"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-RP", str(project / name), str(copy / name)], check=True)
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir",
                    str(folder), str(copy)], check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_tree(wheel: Path, project: Path) -> None:
    built = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    suffixes = (".py", ".txt", ".typed", ".html", ".js")
    tree = set()
    for folder, inside in (("maskdsl", "maskdsl"), ("codegen", "maskdsl/codegen"),
                           ("patterns", "maskdsl/patterns"),
                           ("maskdsl/integrations", "maskdsl/integrations")):
        tree |= {f"{inside}/{p.name}" for p in (project / folder).iterdir()
                 if p.suffix in suffixes}
    assert built == tree


@pytest.mark.slow
def test_a_fresh_install_works(wheel: Path, tmp_path: Path) -> None:
    """The wheel alone in a new environment; torch and the rest come from this one."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    zipfile.ZipFile(wheel).extractall(site)
    outside = [p for p in sys.path if p.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(outside) + "\n")
    program = ("import maskdsl, torch, maskdsl.patterns, sys\n"
               f"assert maskdsl.__file__.startswith({str(site)!r}), maskdsl.__file__\n"
               "q = torch.randn(1, 2, 40, 16)\n"
               "attn = maskdsl.compile(maskdsl.patterns.triangle(2, 8, 4), backend=sys.argv[1])\n"
               "print(attn(q, q, q).shape, len(attn.source) > 1000)\n")
    for backend in ("torch", "triton"):
        run = subprocess.run([str(python), "-W", "ignore", "-c", program, backend], text=True,
                             capture_output=True, cwd=tmp_path, check=False,
                             env={"PATH": os.environ["PATH"], "TRITON_INTERPRET": "1",
                                  "MASKDSL_CACHE_DIR": str(tmp_path)})
        assert run.stdout == "torch.Size([1, 2, 40, 16]) True\n", run.stderr


@pytest.mark.parametrize("folder", ["codegen", "patterns"])
def test_the_folders_have_one_import_name(folder: str, project: Path) -> None:
    spec = importlib.util.spec_from_file_location(folder, project / folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=f"maskdsl.{folder}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert (project / "maskdsl" / folder).is_symlink()
    assert os.readlink(project / "maskdsl" / folder) == f"../{folder}"


def test_files_stay_small(project: Path) -> None:
    for folder in ("maskdsl", "codegen", "patterns", "tests", "benchmarks", "examples"):
        for path in (project / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 400, path
