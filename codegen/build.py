"""From emitted text to an importable kernel, through a cache in memory and on disk.

The kernel is a real file, so tracebacks and `inspect.getsource` work, and Triton keeps its
binaries in its own cache under the same source hash. A file is named by the hash of its text and
written under a temporary name, then renamed: two processes can race, a reader sees all of a file
or none of it, and a damaged file does not match its name and is written again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
import threading
import warnings
from pathlib import Path
from types import ModuleType

from maskdsl.settings import cache_dir, debug

_modules: dict[str, ModuleType] = {}
_lock = threading.Lock()


def load_module(source: str) -> ModuleType:
    """The module of an emitted kernel file; the same text gives the same module."""
    digest = hashlib.sha256(source.encode()).hexdigest()
    with _lock:
        if digest not in _modules:
            debug(4, source)
            _modules[digest] = import_file(store_source(source, digest))
        return _modules[digest]


def store_source(source: str, digest: str) -> Path:
    """The path of a file that holds exactly `source`."""
    folder = writable_folder(cache_dir() / "kernels")
    path = folder / f"mask_{digest[:24]}.py"
    if read_or_none(path) == source:
        debug(1, f"kernel file found: {path}")
        return path
    replace_file(path, source)
    debug(1, f"kernel file written: {path}")
    return path


def replace_file(path: Path, text: str) -> None:
    """Write a file whole: another process sees the old text or the new one, never a part."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False,
                                     encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, path)


def read_or_none(path: Path) -> str | None:
    """The text of a file; None when it is missing or is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def writable_folder(folder: Path) -> Path:
    """`folder`, created; a temporary one, with a warning, where that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    temporary = Path(tempfile.gettempdir()) / f"maskdsl-{os.getuid()}"
    temporary.mkdir(mode=0o700, exist_ok=True)
    warnings.warn(f"maskdsl cannot write {folder}; its files go to {temporary} instead. "
                  "Set MASKDSL_CACHE_DIR to a directory you can write.", stacklevel=2)
    return temporary


def import_file(path: Path) -> ModuleType:
    """Import one kernel file under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"maskdsl_kernel_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
