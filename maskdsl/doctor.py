"""`maskdsl doctor`: what is installed, what would run, and whether it computes the right thing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from maskdsl.api import compile
from maskdsl.atoms import Causal, LastQ, Sink, Window
from maskdsl.backends import pick_backend
from maskdsl.columns import plural
from maskdsl.dense import dense, dense_attention
from maskdsl.errors import MaskDSLError
from maskdsl.settings import cache_dir, debug_level
from maskdsl.shape import Shape
from maskdsl.version import VERSION

PACKAGES = ("torch", "triton", "numpy", "sympy", "networkx", "platformdirs", "tqdm")
OPTIONAL = {"matplotlib": "pictures"}
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}  # largest difference to float64


@dataclass(slots=True)
class Report:
    """Lines of facts, and problems with their cures. `str()` is the text."""

    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def __str__(self) -> str:
        width = max(map(len, self.facts))
        lines = [f"{name:<{width}}  {told}" for name, told in self.facts.items()]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"PROBLEM: {problem}" for problem in self.problems]
        return "\n".join([*lines, "" if self.problems else "all well"]).rstrip()


def examine() -> Report:
    """Look at everything a run depends on, and run one small mask."""
    report = Report({"maskdsl": VERSION, "python": f"{platform.python_version()} on "
                     f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"})
    look_at_packages(report)
    look_at_devices(report)
    look_at_cache(report)
    run_a_mask(report)
    return report


def version_of(package: str) -> str | None:
    """The installed version; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def look_at_packages(report: Report) -> None:
    """Versions, and what is missing."""
    for package in PACKAGES:
        version = version_of(package)
        report.facts[package] = version or "not installed"
        if version is None and not (package == "triton" and not sys.platform.startswith("linux")):
            report.problems.append(f"{package} is missing: pip install {package}")
    for package, use in OPTIONAL.items():
        report.facts[package] = version_of(package) or "not installed"
        if version_of(package) is None:
            report.notes.append(f"no {package}, so no {use}: pip install 'maskdsl[plot]'")
    numpy = version_of("numpy") or "0.0"
    newer = tuple(map(int, numpy.split(".")[:2])) >= (2, 4)
    if os.environ.get("TRITON_INTERPRET") == "1" and newer:
        report.notes.append(f"TRITON_INTERPRET=1 with numpy {numpy}: the interpreter of triton 3.6 "
                            "fails with numpy 2.4 or later; pip install 'numpy<2.4'")


def look_at_devices(report: Report) -> None:
    """GPUs as torch sees them, and the backend that would be chosen."""
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            one = torch.cuda.get_device_properties(i)
            report.facts[f"gpu {i}"] = (f"{one.name}, sm_{one.major}{one.minor}, "
                                        f"{one.total_memory >> 30} GiB")
    else:
        report.facts["gpu"] = "none that torch can use"
        report.notes.append("without a GPU masks run on the torch backend: right, but slow")
    report.facts["backend"] = f"{pick_backend(None, Causal())} (what compile() picks here)"


def look_at_cache(report: Report) -> None:
    """Where kernels are kept, and whether that can be written."""
    folder = cache_dir() / "kernels"
    kernels = list(folder.glob("mask_*.py")) if folder.is_dir() else []
    report.facts["cache"] = f"{folder}, {plural(len(kernels), 'kernel')}"
    report.facts["debug"] = f"MASKDSL_DEBUG={debug_level()}"
    parent = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not os.access(parent, os.W_OK):
        report.problems.append(f"{folder} cannot be written: set MASKDSL_CACHE_DIR to a directory "
                               "that can")


def run_a_mask(report: Report) -> None:
    """A triangle of 300 tokens against dense attention in float64."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    mask = Sink(4) | Window(64) | LastQ(16)
    q, k, v = (torch.randn(1, 2, 300, 64, device=device, dtype=dtype) for _ in range(3))
    live = dense(Causal() & mask, Shape(300, 300), device=device)
    exact, _ = dense_attention(q.double(), k.double(), v.double(), live)
    try:
        attn = compile(mask)
        error = float((attn(q, k, v).double() - exact).abs().max())
    except MaskDSLError as problem:
        report.problems.append(f"a small mask does not run: {problem}")
        return
    except Exception as problem:  # whatever the driver or the compiler says is what to report
        report.problems.append(f"a small mask does not run: {type(problem).__name__}: {problem}")
        return
    report.facts["check"] = f"{attn.backend} on {device}: difference to dense {error:.1e}"
    if not error <= TOLERANCE[dtype]:
        report.problems.append(f"the result differs from dense attention by {error:.1e}: please "
                               "report it, with the output of `maskdsl doctor`")
