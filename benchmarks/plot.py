"""A picture of the comparison: one panel a case, one bar a kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def group_rows(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The timed rows of every case, fastest first; cases in the order they were measured."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "ms" in row:
            title = f"{row['mask']}, {row['length'] // 1024}K, heads {row['heads']}, D {row['dim']}"
            groups.setdefault(title, []).append(row)
    return {title: sorted(found, key=lambda row: row["ms"]) for title, found in groups.items()}


def plot_rows(rows: list[dict[str, Any]], path: Path) -> bool:
    """Write the picture; False (and a line printed) where matplotlib or rows are missing."""
    groups = group_rows(rows)
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no picture: matplotlib is not installed", flush=True)
        return False
    if not groups:
        print("no picture: no row was timed", flush=True)
        return False
    figure, panels = pyplot.subplots(
        len(groups), 1, squeeze=False, layout="constrained",
        figsize=(8, sum(0.9 + 0.28 * len(found) for found in groups.values())),
        height_ratios=[1 + len(found) for found in groups.values()])
    for panel, (title, found) in zip(panels[:, 0], groups.items(), strict=True):
        names = [row["kernel"] for row in found]
        bars = panel.barh(names, [row["tflops"] for row in found],
                          color=["#c44" if name.startswith("maskdsl") else "#888"
                                 for name in names])
        panel.bar_label(bars, [f" {row['ms']:.3g} ms" for row in found], fontsize=7)
        panel.invert_yaxis()
        panel.set_title(title, fontsize=9, loc="left")
        panel.tick_params(labelsize=8)
        panel.margins(x=0.12)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("TFLOP/s on live pairs", fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
