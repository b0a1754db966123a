"""What every benchmark shares: inputs, timing, rows of results, and the table they become."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

from maskdsl import Causal, LastQ, Mask, Shape, Sink, Window, __version__
from maskdsl.tiles import count_pairs

HEADS, KV_HEADS, DIM = 32, 8, 128

MASKS: dict[str, tuple[int, int, int]] = {
    "Sink(8) | Window(512) | LastQ(128)": (8, 512, 128),
    "Sink(64) | Window(1024) | LastQ(128)": (64, 1024, 128),
    "Sink(4) | Window(2048) | LastQ(64)": (4, 2048, 64),
}


def mask_of(sizes: tuple[int, int, int]) -> Mask:
    """(sink, window, last) as a mask."""
    return Sink(sizes[0]) | Window(sizes[1]) | LastQ(sizes[2])


@dataclass
class Report:
    """Rows measured in one run, with what they were measured on.

    until   `time.monotonic()` after which a question begins nothing new
    folder  where every row is written as soon as it is there; None: only by `save`
    """

    question: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)
    until: float = math.inf
    folder: Path | None = None
    commit: str = ""

    def add(self, **row: Any) -> None:
        """Keep one row; print and write it at once."""
        self.rows.append(row)
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
                        for k, v in row.items()), flush=True)
        if self.folder is not None:
            self.write(self.folder, {"unfinished": "the run was still going on"})

    def is_late(self, what: str) -> bool:
        """Whether the time is up; then `what` is told to be missing."""
        if time.monotonic() < self.until:
            return False
        self.about["left out"] = ", ".join(filter(None, (self.about.get("left out"), what)))
        print(f"no time left for {what}", flush=True)
        return True

    def save(self, folder: Path, commit: str) -> None:
        """Write the rows as JSON and as a Markdown table."""
        self.commit = commit
        self.write(folder, {})

    def write(self, folder: Path, more: dict[str, str]) -> None:
        """The files as they are now, with `more` about the run."""
        about = describe_machine(self.commit) | self.about | more
        folder.mkdir(parents=True, exist_ok=True)
        data = {"question": self.question, "rows": self.rows, "about": about}
        for name, text in ((f"{self.question}.json", json.dumps(data, indent=1) + "\n"),
                           (f"{self.question}.md", self.markdown(about))):
            part = folder / f".{name}.part"
            part.write_text(text)
            part.replace(folder / name)

    def markdown(self, about: dict[str, str]) -> str:
        """The table for docs/benchmarks."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        lines = [f"# {self.question}", "", *(f"- {k}: {v}" for k, v in about.items()), "",
                 "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
        for row in self.rows:
            cells = (row.get(name, "") for name in names)
            lines.append("| " + " | ".join(f"{c:.4g}" if isinstance(c, float) else
                                           str(c).replace("|", "\\|") for c in cells) + " |")
        return "\n".join(lines) + "\n"


def describe_machine(commit: str) -> dict[str, str]:
    """Device, versions and commit of a run."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {"device": device, "torch": torch.__version__, "triton": triton.__version__,
            "python": platform.python_version(), "maskdsl": f"{__version__} at commit {commit}",
            "date": time.strftime("%Y-%m-%d")}


def current_commit() -> str:
    """The checked-out commit, or "unknown" outside a repository."""
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                         check=False)
    return run.stdout.strip() or "unknown"


def device() -> str:
    """Where benchmarks run: the GPU, or the CPU for a rehearsal of their code."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_inputs(length: int, heads: int = HEADS, kv_heads: int = KV_HEADS,
                dim: int = DIM, value_dim: int = 0) -> tuple[torch.Tensor, torch.Tensor,
                                                             torch.Tensor]:
    """Random normal q, k, v [1, H, length, dim]: bf16 on the GPU, float32 without one; value_dim
    0: dim."""
    where = device()
    dtype = torch.bfloat16 if where == "cuda" else torch.float32
    generator = torch.Generator(device=where).manual_seed(length)
    q, k, v = (torch.randn(1, h, length, d, device=where, dtype=dtype, generator=generator)
               for h, d in ((heads, dim), (kv_heads, dim), (kv_heads, value_dim or dim)))
    return q, k, v


def time_ms(function: Callable[..., Any], *arguments: Any, repeat_ms: int = 150,
            **options: Any) -> float:
    """Median milliseconds of function(*arguments, **options), by CUDA events; on a CPU one call."""

    def call() -> Any:
        return function(*arguments, **options)

    call()
    if device() == "cpu":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    torch.cuda.synchronize()
    return float(triton.testing.do_bench(call, warmup=40, rep=repeat_ms, return_mode="median"))


def tera_flops(mask: Mask, length: int, ms: float, heads: int = HEADS, dim: int = DIM) -> float:
    """TFLOP/s on live pairs: 4 * D operations a pair and head."""
    return 4 * dim * heads * count_pairs(Causal() & mask, Shape(length, length)) / ms / 1e9
