"""What mkdocs draws while it builds: plots of benchmark results, example pictures, a page.

They are made from the code and from docs/benchmarks, and never committed. (The small pictures of
atoms and patterns are: `docs/draw.py`.)
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mkdocs.structure.files import File, Files

import maskdsl as m
from maskdsl import patterns
from maskdsl.cells import PALETTE
from maskdsl.plot import new_figure

RESULTS = Path(__file__).parent / "benchmarks"
MASK = m.Causal() & (m.Sink(4) | m.Window(2048) | m.LastQ(64))
STREAMING = m.Sink(4) | m.Window(64)
HEADS = m.Causal() & m.PerHead([m.Causal(), STREAMING, m.Window(128), STREAMING])
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
        axes.xaxis.set_minor_formatter("")  # their labels would overlap
    axes.set_xlabel(unit)
    figure.suptitle(told, fontsize=8, color="0.4")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return to_svg(figure)


def draw_predictions() -> str:
    """Predicted against measured milliseconds, a point for each call."""
    rows, told = read_results("cost")
    figure = new_figure(6.4, 5.2)
    axes = figure.subplots()
    kinds = {"Hopper kernel": ("hopper", False), "portable, static": ("triton", False),
             "portable, call-time data": ("triton", True)}
    for color, (name, (backend, listed)) in zip(PALETTE, kinds.items(), strict=False):
        found = [row for row in rows if "predicted" in row and row["backend"] == backend
                 and bool(row.get("data")) == listed]
        axes.scatter([row["ms"] for row in found], [row["predicted"] for row in found], 14,
                     color=color, label=name)
    axes.plot([0.05, 60], [0.05, 60], color="0.7", linewidth=1, zorder=0)
    axes.set(xscale="log", yscale="log", xlabel="measured, milliseconds",
             ylabel="predicted, milliseconds")
    axes.legend(frameon=False)
    figure.suptitle(told, fontsize=8, color="0.4")
    return to_svg(figure)


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """A page of results says first what was asked, in the words of the table of all of them."""
    folder, _, name = page.file.src_uri.rpartition("/")
    asked = read_questions().get(name.removesuffix(".md")) if folder == "benchmarks" else None
    if asked is None:
        return markdown
    page.meta["hide"] = ["toc"]  # one heading; the table takes the place
    title, _, rest = markdown.partition("\n")
    return f"{title}\n\n{asked[0].upper()}{asked[1:].rstrip('.')}.\n{rest}"


def read_questions() -> dict[str, str]:
    """question -> what it asks, from the first table of docs/benchmarks/README.md."""
    found = {}
    for line in (RESULTS / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 2:
            found[re.sub(r"\[(\w+)\]\(.*\)", r"\1", cells[0])] = cells[1]
    return found


def draw_study() -> str:
    """The Pareto plot of docs/study.md, from the numbers there."""
    g = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 2048, 32, generator=g)
    keys[:, :, :4] += 1.5
    queries = keys.repeat_interleave(2, 1) + torch.randn(1, 4, 2048, 32, generator=g)
    values = torch.randn(1, 2, 2048, 32, generator=g)
    return to_svg(m.study([(queries, keys, values)], {
        "triangle": patterns.triangle(4, 256, 64), "window": m.Window(256),
        "streaming": patterns.streaming_llm(4, 508), "dense": m.Full()}, progress=False).plot())


def to_svg(figure: Any) -> str:
    """The figure as SVG, without the date it was drawn."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def mask_and_length(row: dict[str, Any]) -> str:
    """What a row of the triangle benchmarks was measured with."""
    return f"{row.get('mask', '')} at {row['length'] // 1024}K:"


def call_size(row: dict[str, Any]) -> str:
    """What a row of the comparison with other kernels was measured with."""
    heads = "" if row["heads"] == "32/8" else f", {row['heads'].partition('/')[0]} heads"
    return f"{row['mask']} at {row['length'] // 1024}K{heads}:"


PICTURES: dict[str, Callable[[], str]] = {
    "perf_compare.svg": lambda: draw_bars(
        "compare_h200", "ms", "milliseconds, logarithmic", call_size,
        lambda row: str(row["kernel"]), True),
    "perf_backward.svg": lambda: draw_bars(
        "backward_h200", "ms", "milliseconds, logarithmic",
        lambda row: f"{row['mask']}, D = {row['dim']}:", lambda row: str(row["kernel"]), True),
    "perf_coverage.svg": lambda: draw_bars(
        "coverage", "portable_over_hopper", "time of the portable over that of the Hopper kernel",
        lambda row: f"{row['mask']}, D = {row['head_dim']}", lambda row: ""),
    "perf_cost.svg": draw_predictions,
    "study_pareto.svg": draw_study,
    "plot_heads.svg": lambda: to_svg(HEADS.plot(512)),
    "plot_layers.svg": lambda: to_svg(m.plot_masks(patterns.triangle_mix(8, [0, 1, 5]), 4096)),
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
