"""What `study` found: tables, the Pareto front, pictures of it and of layers and heads."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from maskdsl.cells import PALETTE
from maskdsl.columns import format_number, format_table, plural
from maskdsl.errors import StudyError
from maskdsl.plot import finish, format_tokens, mark_plainly, new_figure, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table: TypeAlias = npt.NDArray[np.float64]
LOSSLESS = 1e-4  # a smaller loss is drawn at the bottom of its logarithmic axis
COST_TITLES = {"pairs": "live pairs, % of dense", "tiles": "tiles visited, % of dense",
               "ms": "predicted milliseconds a layer"}
HEADER = ("pattern", "mass %", "worst head", "recall %", "error %", "pairs %", "tiles %", "ms")


@dataclass(frozen=True, slots=True)
class Cost:
    """From `explain`, mean over layers; None where it cannot tell.

    tiles  pairs in visited tiles over those of dense causal attention, by the kernel here, or that
           of an H100 where there is no GPU; ms: predicted, all heads and batch entries of a layer
    """

    tiles: float | None
    ms: float | None


@dataclass(frozen=True, slots=True)
class Study:
    """Numbers for every pattern, layer and head; `print` it for the table.

    names                the patterns
    q_len, kv_len        tokens; rows: query rows looked at in each head; top: of `recall`
    mass, recall, pairs  float64[patterns, layers, heads], shares in 0..1
    error                the same, relative; None where no values were given
    costs                of each pattern, from `explain`
    """

    names: tuple[str, ...]
    q_len: int
    kv_len: int
    rows: int
    top: int
    mass: Table
    recall: Table
    pairs: Table
    error: Table | None
    costs: tuple[Cost, ...]

    def rows_of_table(self) -> list[tuple[str, ...]]:
        """One row of text a pattern; means over layers and heads."""
        rows = []
        for i, name in enumerate(self.names):
            layer, head = np.unravel_index(self.mass[i].argmin(), self.mass[i].shape)
            cost = self.costs[i]
            numbers = (self.recall[i].mean(), None if self.error is None else self.error[i].mean(),
                       self.pairs[i].mean(), cost.tiles)
            rows.append((shorten(name, 60, 1), format_number(100 * self.mass[i].mean()),
                         f"{format_number(100 * self.mass[i].min())} (L{layer} H{head})",
                         *(format_number(None if x is None else 100 * x) for x in numbers),
                         format_number(cost.ms)))
        return rows

    def __str__(self) -> str:
        told = (f"{self.q_len:,} queries x {self.kv_len:,} keys, {self.describe_model()}, "
                f"{plural(self.rows, 'row')} a head; "
                f"recall of the {plural(self.top, 'largest key')}; "
                "pairs and tiles: share of dense")
        front = ", ".join(self.names[i] for i in self.front())
        return (f"{told}\n{format_table(HEADER, self.rows_of_table())}\n"
                f"Pareto front of mass over {self.cost_name()}: {front}")

    def describe_model(self) -> str:
        """For example "1 layer of 4 heads"."""
        layers, heads = self.mass.shape[1:]
        return f"{plural(layers, 'layer')} of {plural(heads, 'head')}"

    def _repr_html_(self) -> str:
        lines = [HEADER, *self.rows_of_table()]
        cells = ["".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in line)
                 for tag, line in zip(["th"] + ["td"] * (len(lines) - 1), lines, strict=True)]
        return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"

    def cost_name(self, cost: str | None = None) -> str:
        """"pairs", "tiles" or "ms"; a StudyError for what is not known of all patterns.

        cost  None: tiles, which kernels pay for, or pairs where tiles are not known
        """
        known = ["pairs", *(name for name in ("tiles", "ms")
                            if all(getattr(one, name) is not None for one in self.costs))]
        if cost is None:
            return "tiles" if "tiles" in known else "pairs"
        if cost not in known:
            raise StudyError(f"cost={cost!r}", "no such cost, or not known of all patterns",
                             " or ".join(f"cost={name!r}" for name in known))
        return cost

    def cost_of(self, cost: str | None = None) -> Table:
        """What each pattern costs, float64[patterns]: shares in 0..1, or milliseconds."""
        name = self.cost_name(cost)
        if name == "pairs":
            return np.asarray(self.pairs.mean((1, 2)))
        return np.array([getattr(one, name) for one in self.costs], dtype=np.float64)

    def front(self, cost: str | None = None) -> list[int]:
        """Patterns that no other beats: less mass lost for as little cost; from cheap to dear.

        cost  "pairs", "tiles" or "ms"; default: tiles, where they are known of all patterns
        """
        paid, mass = self.cost_of(cost), self.mass.mean((1, 2))
        beaten = [any((paid[j] <= paid[i]) & (mass[j] >= mass[i])
                      & ((paid[j] < paid[i]) | (mass[j] > mass[i]))
                      for j in range(len(paid))) for i in range(len(paid))]
        return sorted((i for i in range(len(paid)) if not beaten[i]), key=lambda i: paid[i])

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"q_len": self.q_len, "kv_len": self.kv_len, "rows": self.rows, "top": self.top,
                "front": [self.names[i] for i in self.front()],
                "patterns": {name: {
                    "mass": self.mass[i].tolist(), "recall": self.recall[i].tolist(),
                    "pairs": self.pairs[i].tolist(), "tiles": self.costs[i].tiles,
                    "ms": self.costs[i].ms,
                    "error": None if self.error is None else self.error[i].tolist()}
                    for i, name in enumerate(self.names)}}

    def plot(self, path: str | Path | None = None, *, cost: str | None = None) -> Figure:
        """What each pattern loses over what it costs (`cost` as in `front`), with the Pareto front;
        a second panel for the output error where values were given.

        Bars reach to the worst and best head; what loses 0.01 % or less lies on a line at the
        bottom."""
        panels = [("attention mass lost, %", 1 - self.mass)]
        if self.error is not None:
            panels.append(("output error, %", self.error))
        figure = new_figure(1.2 + 4.6 * len(panels), 4.9)
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (told, share) in zip(grid, panels, strict=True):
            real = share[share > LOSSLESS]
            floor = real.min() / 3 if real.size else LOSSLESS
            lost = 100 * np.maximum(share, floor)
            if (share <= LOSSLESS).any():
                axes.axhline(100 * floor, color="0.7", linewidth=0.8, linestyle=":")
                axes.annotate(f"{100 * LOSSLESS:g} % or less", (0.01, 100 * floor), fontsize=7,
                              xycoords=("axes fraction", "data"), color="0.4", va="bottom")
            paid = self.cost_of(cost) * (1 if self.cost_name(cost) == "ms" else 100)
            mean = lost.mean((1, 2))
            for i, name in enumerate(self.names):
                bars = np.abs(np.array([[lost[i].min()], [lost[i].max()]]) - mean[i])
                axes.errorbar(paid[i], mean[i], bars, fmt="os^Dvp*X"[i // len(PALETTE) % 8],
                              color=PALETTE[i % len(PALETTE)], capsize=3, elinewidth=0.8,
                              label=shorten(name, 48, 1))
            front = self.front(cost)
            axes.plot(paid[front], mean[front], color="0.6", linewidth=1, zorder=0)
            axes.set(xscale="log", yscale="log", xlabel=COST_TITLES[self.cost_name(cost)])
            mark_plainly(axes.xaxis, axes.yaxis)
            axes.set_title(told, loc="left", fontsize=9)
            axes.grid(alpha=0.3)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8,
                      frameon=False)
        figure.suptitle(f"{format_tokens(self.kv_len)} tokens, {self.describe_model()}; "
                        "line: Pareto front", fontsize=9)
        return finish(figure, path)

    def plot_heads(self, pattern: str, value: str = "mass",
                   path: str | Path | None = None) -> Figure:
        """One number of a pattern as a map of layers and heads.

        value  "mass", "recall", "pairs" or "error"
        """
        table = getattr(self, value, None) if value in ("mass", "recall", "pairs", "error") else \
            None
        if pattern not in self.names or table is None:
            raise StudyError(f"plot_heads({pattern!r}, {value!r})", "no such pattern or number",
                             f"one of {', '.join(map(repr, self.names))}; mass, recall, pairs, or "
                             "error where values were given")
        numbers = 100 * table[self.names.index(pattern)]
        figure = new_figure(max(3.6, 1.6 + 0.32 * numbers.shape[1]),
                            max(2.4, 1.3 + 0.26 * numbers.shape[0]))
        axes = figure.subplots()
        image = axes.imshow(numbers, cmap="viridis", aspect="auto", interpolation="nearest")
        figure.colorbar(image, ax=axes, label=f"{value}, %")
        axes.set(xlabel="head", ylabel="layer")
        axes.locator_params(integer=True)
        axes.set_title(shorten(pattern, 60, 2), fontsize=9, loc="left")
        return finish(figure, path)
