"""What mkdocs draws while it builds: plots of benchmark results, example pictures, a page.

They are made from the code and from docs/benchmarks, and never committed. (The small pictures of
atoms and patterns are: `docs/draw.py`.)
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import maskdsl as m
from maskdsl import patterns
from maskdsl.cells import PALETTE
from maskdsl.plot import new_figure

RESULTS = Path(__file__).parent / "benchmarks"
MASK = m.Causal() & (m.Sink(4) | m.Window(2048) | m.LastQ(64))
BAR = 0.3  # inches
Rows = list[dict[str, Any]]


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures to the site."""
    for name, make in PICTURES.items():
        files.append(File.generated(config, f"pictures/{name}", content=make()))
    return files


def read_results(question: str) -> tuple[Rows, str]:
    """The rows of one benchmark, and what they were measured on."""
    found = json.loads((RESULTS / f"{question}.json").read_text(encoding="utf-8"))
    about = found["about"]
    return found["rows"], f"{about['device']}, {about['maskdsl']}, {about['date']}"


def draw_bars(question: str, value: str, unit: str, label: Callable[[dict[str, Any]], str],
              group: Callable[[dict[str, Any]], str], log: bool = False) -> str:
    """One horizontal bar for each row with that value; a colour for each group."""
    rows, told = read_results(question)
    rows = [row for row in rows if isinstance(row.get(value), (int, float))]
    groups = sorted(dict.fromkeys(map(group, rows)), key=lambda name: "maskdsl" not in name)
    figure = new_figure(8.4, 1.1 + BAR * len(rows))
    axes = figure.subplots()
    for i, row in enumerate(rows):
        axes.barh(i, row[value], color=PALETTE[groups.index(group(row)) % len(PALETTE)])
        axes.annotate(f"{row[value]:.3g}", (row[value], i), xytext=(4, 0), va="center",
                      textcoords="offset points", fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{label(row)}  {group(row)}".strip() for row in rows],
                    fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    if log:
        axes.set_xscale("log")
    axes.set_xlabel(unit)
    figure.suptitle(told, fontsize=8, color="0.4")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return to_svg(figure)


def to_svg(figure: Any) -> str:
    """The figure as SVG, without the date it was drawn."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def mask_and_length(row: dict[str, Any]) -> str:
    """What a row of the triangle benchmarks was measured with."""
    return f"{row.get('mask', '')} at {row['length'] // 1024}K:"


PICTURES: dict[str, Callable[[], str]] = {
    "perf_forward.svg": lambda: draw_bars("forward", "ms", "milliseconds", mask_and_length,
                                          lambda row: str(row["kernel"])),
    "perf_triangle.svg": lambda: draw_bars("triangle", "ms", "milliseconds, logarithmic",
                                           mask_and_length, lambda row: str(row["kernel"]), True),
    "perf_dense.svg": lambda: draw_bars("dense", "ms", "milliseconds", mask_and_length,
                                        lambda row: str(row["kernel"])),
    "perf_vertical_slash.svg": lambda: draw_bars(
        "vertical_slash", "ms", "milliseconds",
        lambda row: f"{row['vertical']} columns, {row['slash']} slashes, {row['index_heads']} "
        "index heads:" if "vertical" in row else f"{row.get('mask', '')}",
        lambda row: str(row["kernel"])),
    "perf_cpu.svg": lambda: draw_bars("cpu", "seconds", "seconds, logarithmic", mask_and_length,
                                      lambda row: str(row["kernel"]), True),
    "plot_source.svg": lambda: to_svg(MASK.plot(8192)),
    "plot_tile.svg": lambda: to_svg(MASK.plot(8192, by="tile")),
    "plot_sparsity.svg": lambda: to_svg(m.plot_sparsity({
        "triangle()": m.Causal() & patterns.triangle(),
        "streaming_llm()": m.Causal() & patterns.streaming_llm(),
        "sparse_transformer_strided(128)":
            m.Causal() & patterns.sparse_transformer_strided(128),
        "Causal()": m.Causal()})),
    "triangle.html": lambda: (MASK | m.Causal() & m.Stride(4096)).to_html(None, 131072),
}
