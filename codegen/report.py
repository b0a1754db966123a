"""An explanation as text, Markdown, HTML and plain data."""

from __future__ import annotations

import html as escape
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from maskdsl.plot_grid import format_runs

if TYPE_CHECKING:
    from maskdsl.codegen.explain import Explanation
    from maskdsl.codegen.hopper_work import HopperCut
    from maskdsl.codegen.workload import KindWork

Table = list[tuple[str, list[str]]]  # (label, lines)
BOUNDS = {"compute": "compute-bound", "memory": "memory-bound",
          "longest item": "bound by its longest item", "host": "bound by the host"}
MANY_HEADS = 8  # kinds of heads told one by one; the rest is summed up
WIDTH = 100  # characters of a line of text
LONGEST_HEADS = 40  # characters of the numbers of heads


def text(table: Table) -> str:
    """Labels in a column of 14 characters, lines beside them, folded at WIDTH characters."""
    return "\n".join(f"{label if i == 0 else '':<14}{line}" for label, lines in table
                     for i, line in enumerate(part for line in lines for part in fold(line)))


def fold(line: str) -> list[str]:
    """A line in lines of up to WIDTH characters, all with its indentation and two spaces more."""
    space = " " * (len(line) - len(line.lstrip(" ")))
    kept = line.replace(" %", "\N{NO-BREAK SPACE}%")
    lines = textwrap.wrap(kept, WIDTH - 14, subsequent_indent=space + "  ", break_long_words=False,
                          break_on_hyphens=False)
    return [part.replace("\N{NO-BREAK SPACE}%", " %") for part in lines] or [line]


def markdown(table: Table) -> str:
    """A Markdown table of two columns."""
    rows = ["| | |", "|---|---|"]
    for label, lines in table:
        cell = "<br>".join(map(plain, lines))
        rows.append(f"| {label} | {cell} |")
    return "\n".join(rows) + "\n"


def plain(line: str) -> str:
    """A line that Markdown leaves as it is, its indentation too."""
    rest = line.lstrip(" ")
    kept = "".join(f"\\{c}" if c in "\\|*_`[]" else c for c in rest)
    return "&nbsp;" * (len(line) - len(rest)) + escape.escape(kept, quote=False)


def html(table: Table) -> str:
    """An HTML table, as notebooks show it."""
    style = "text-align:left;vertical-align:top"
    rows = [f"<tr><th style='{style};white-space:nowrap'>{escape.escape(label)}</th>"
            f"<td style='{style};white-space:pre-wrap'>{escape.escape(chr(10).join(lines))}</td>"
            "</tr>" for label, lines in table]
    return f"<table>{''.join(rows)}</table>"


def rich_table(table: Table) -> Any:
    """A table of the `rich` package, which asks for it and so is there."""
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(show_header=False, box=None, padding=(0, 1))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, lines in table:
        grid.add_row(label, Text("\n".join(lines)))  # as it is: a bracket is no markup
    return grid


def format_bytes(count: int) -> str:
    """1610612736  -->  1.61 GB."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def format_flops(count: int) -> str:
    """4507413413888  -->  4.51 TFLOP."""
    for unit, size in (("PFLOP", 10**15), ("TFLOP", 10**12), ("GFLOP", 10**9), ("MFLOP", 10**6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,} FLOP"


def format_heads(heads: tuple[int, ...]) -> str:
    """(0, 1, 2, 5)  -->  heads 0-2, 5; of very many the first."""
    told = format_runs(heads)
    if len(told) > LONGEST_HEADS:
        told = f"{told[:LONGEST_HEADS].rsplit(',', 1)[0]}, ... ({len(heads)})"
    return f"head{'' if len(heads) == 1 else 's'} {told}"


def name_heads(kind: KindWork) -> str:
    """Which heads a kind is."""
    return format_heads(kind.which) if kind.which else "all heads"


def share(part: int | None, whole: int) -> str:
    """12 of 48 (25 %)."""
    if part is None:
        return "not counted: too many pairs to test"
    return f"{part:,} of {whole:,} ({100 * part / max(1, whole):.3g} %)"


def table_of(told: Explanation) -> Table:
    """Everything an explanation says, as labels and lines."""
    shape, call = told.shape, told.call
    several = call.batch * call.heads
    heads = f"{call.heads} query head{'' if call.heads == 1 else 's'}"
    table: Table = [
        ("mask", [told.mask]),
        *([("written", [told.written])] if told.laws else []),
        *([("laws used", list(told.laws))] if told.laws else []),
        ("call", [f"{shape.q_len:,} queries at {shape.q_offset:,}, {shape.kv_len:,} keys, prompt "
                  f"of {shape.total_len:,}",
                  f"batch {call.batch}, {heads} over {call.kv_heads}, dimension {call.head_dim}"]),
        ("backend", backend_lines(told)),
        ("live pairs", [share(told.live_pairs, several * shape.q_len * shape.kv_len),
                        *(["all causal pairs: the mask is dense at this length"]
                          if told.is_dense else [])]),
        *([("closed form", told.closed_form.split("\n"))] if told.closed_form else []),
        ("tiles", tile_lines(told)),
        ("work", work_lines(told)),
        ("memory", [f"inputs {format_bytes(told.input_bytes)}, output "
                    f"{format_bytes(told.output_bytes)}; mask: "
                    f"{'its data' if told.mask_bytes is None else f'{told.mask_bytes} bytes'}",
                    f"a dense mask of one head would take {format_bytes(told.dense_bytes)}"]),
        *([("slots", [slot_line(told)])] if told.slots else []),
    ]
    if len(told.kinds) > 1:
        table.append(("heads", [*map(kind_line, told.kinds[:MANY_HEADS]), *more_kinds(told)]))
    if told.pieces or told.slots:
        table.append(("rows", row_lines(told)))
    table += [("predicted", predicted_lines(told)),
              *([("fallback", [told.fallback])] if told.fallback else []),
              *([("rates", list(told.prediction.sources))] if told.prediction else [])]
    return table


def backend_lines(told: Explanation) -> list[str]:
    """What runs here, whose work is counted, and in which tiles."""
    if told.cut is None:
        tiles = f"tiles of {told.tile[0]} queries x {told.tile[1]} keys"
    else:
        config = told.cut.config
        heads = "1 head" if config.heads_packed == 1 else f"{config.heads_packed} heads"
        tiles = (f"items of {told.tile[0]} rows ({heads} x {config.span} positions), tiles of "
                 f"{told.tile[1]} keys")
    here = f"{told.backend} ({told.why})"
    same = told.kernel == told.backend
    lines = [f"{here}, {tiles}"] if same else [here, f"counted for backend {told.kernel}: {tiles}"]
    return lines + ([f"not the Hopper kernel: {told.refused}"] if told.refused else [])


def item_lines(told: Explanation, cut: HopperCut) -> list[str]:
    """Items of the Hopper kernel, and which of them are cut along their keys."""
    lines = [f"{told.visited.items:,} items, each with a first tile of {cut.config.narrow} keys"]
    if cut.schedule.split_count:
        first, stop = cut.cut_rows
        lines.append(f"of rows {first:,} to {min(stop, told.shape.q_len) - 1:,} the keys are cut "
                     f"into {cut.schedule.splits} ranges, an item each")
    return lines


def tile_lines(told: Explanation) -> list[str]:
    """Tiles by loop, and what of their pairs is dead."""
    seen = told.visited
    listed = "".join(f" + {count:,} {name}" for name, count in (
        ("listed full", seen.listed_full), ("listed masked", seen.listed_part),
        ("at listed distances", seen.slash), ("steps of gathered columns", seen.columns)) if count)
    lines = [f"{seen.full:,} full + {seen.masked:,} masked{listed} of {told.all_tiles:,}"
             f"{', dead ones sieved out' if told.sieved else ''}"]
    lines += [] if told.cut is None else item_lines(told, told.cut)
    if told.wasted is not None:
        lines.append(f"{100 * told.wasted:.3g} % of the visited pairs are dead")
    return lines


def work_lines(told: Explanation) -> list[str]:
    """Operations, and what dense causal attention would visit."""
    live = "not known for live pairs" if told.flops is None else \
        f"{format_flops(told.flops)} on live pairs"
    if not told.visited_pairs:
        return [f"{live}; no tile is visited"]
    beside = "" if told.counted or not told.slots else ", what the data lists not counted"
    return [f"{live}, {format_flops(told.visited_flops)} on the tiles visited{beside}",
            f"dense causal attention visits {told.tile_speedup:.3g}x as much"]


def slot_line(told: Explanation) -> str:
    """Whether the lists were counted."""
    names = ", ".join(told.slots)
    if told.counted:
        return f"{names}: counted with the data given"
    return f"{names}: not counted, their data comes at the call; give it to explain(...) too"


def kind_line(kind: KindWork) -> str:
    """One kind of head."""
    pairs = "pairs not counted" if kind.live_pairs is None else f"{kind.live_pairs:,} pairs"
    seen = kind.visited
    listed = f" + {seen.listed:,} listed" if seen.listed else ""
    return (f"{name_heads(kind)}: {kind.mask!r}: {pairs}, tiles {seen.full:,} full + "
            f"{seen.masked:,} masked{listed}")


def more_kinds(told: Explanation) -> list[str]:
    """One line for the kinds that are not told one by one."""
    rest = told.kinds[MANY_HEADS:]
    if not rest:
        return []
    return [f"and {sum(kind.heads for kind in rest)} heads of {len(rest)} more kinds: "
            f"{sum(kind.visited.steps for kind in rest):,} tiles"]


def row_lines(told: Explanation) -> list[str]:
    """Which rows see which keys, a line for each piece of each class of rows."""
    lines = []
    packed = 1 if told.cut is None else told.cut.config.heads_packed
    each = "a head" if packed == 1 else f"for {packed} heads"
    for kind in told.kinds[:MANY_HEADS]:
        head = f"{name_heads(kind)}, " if len(told.kinds) > 1 else ""
        if kind.entries > 1 and (told.counted or not told.slots):
            each = "in its first head"
        for rows in kind.rows:
            tiles = f"{rows.full:,} full + {rows.masked:,} masked" + \
                (f" + {rows.listed:,} listed" if rows.listed else "")
            told_tiles = f"{tiles} tiles {each}" if rows.items else \
                "in the query tiles of the rows after them"
            lines.append(f"{head}{rows.first:,} to {rows.stop - 1:,}: {told_tiles}")
            lines += [f"  {keys}" for keys in rows.keys] or ["  no key"]
    return lines


def predicted_lines(told: Explanation) -> list[str]:
    """Predicted time and the roofs, each named as what it is."""
    found = told.prediction
    if found is None or told.dense is None:
        return [f"nothing: {told.no_prediction}"]
    data = "" if told.counted or not told.slots else "; all tokens taken as one document"
    lines = [f"{ms(found.ms)} on {found.chip} (backend {found.target}, tiles of {found.tile[0]} x "
             f"{found.tile[1]}){data}"]
    if found.listing_ms or found.estimate_ms:
        lines.append(f"of it {ms(found.kernel_ms)} the kernel, {ms(found.listing_ms)} lists from "
                     f"the data, {ms(found.estimate_ms)} estimating the data")
    lines.append(f"{BOUNDS[found.bound_by]}: steps {ms(found.compute_ms)}, longest item "
                 f"{ms(found.longest_ms)}, memory {ms(found.memory_ms)}, host {ms(found.host_ms)}")
    lines.append(f"its tiles at the rate of a matrix product {ms(found.roof_ms)}")
    other = "" if told.dense.target == found.target else f" (backend {told.dense.target})"
    longer = told.dense.ms / found.ms
    lines.append(f"dense causal {ms(told.dense.ms)}{other}: {longer:.3g}x as long")
    lines.append(f"dense is overtaken {told.no_crossover}" if told.crossover is None else
                 f"faster than dense from {told.crossover:,} tokens on")
    lines.append("a prediction from the measured rates below, not a measurement")
    return [*lines, *found.notes]


def ms(value: float) -> str:
    """Milliseconds to three digits."""
    return f"{value:.3g} ms"


def as_dict(told: Explanation) -> dict[str, Any]:
    """Plain numbers, texts, lists and dicts."""
    def kind(one: KindWork) -> dict[str, Any]:
        return {"mask": repr(one.mask), "heads": one.heads, "which": list(one.which),
                "entries": one.entries, "live_pairs": one.live_pairs,
                "visited": asdict(one.visited), "rows": [row.to_dict() for row in one.rows]}

    return {
        "mask": told.mask, "written": told.written, "laws": list(told.laws),
        "backend": told.backend, "why": told.why, "kernel": told.kernel, "refused": told.refused,
        "cut": None if told.cut is None else told.cut.to_dict(), "shape": asdict(told.shape),
        "call": asdict(told.call), "tile": list(told.tile), "pieces": list(told.pieces),
        "sieved": told.sieved, "live_pairs": told.live_pairs, "is_dense": told.is_dense,
        "closed_form": told.closed_form, "full_tiles": told.full_tiles,
        "masked_tiles": told.masked_tiles, "listed_tiles": told.listed_tiles,
        "column_steps": told.column_steps, "visited_tiles": told.visited_tiles,
        "visited_pairs": told.visited_pairs, "all_tiles": told.all_tiles,
        "visited": asdict(told.visited), "wasted": told.wasted,
        "flops": told.flops, "visited_flops": told.visited_flops,
        "tile_speedup": told.tile_speedup if told.visited_pairs else None,
        "mask_bytes": told.mask_bytes,
        "input_bytes": told.input_bytes, "output_bytes": told.output_bytes,
        "dense_bytes": told.dense_bytes, "slots": list(told.slots), "counted": told.counted,
        "kinds": [kind(one) for one in told.kinds],
        "prediction": None if told.prediction is None else told.prediction.to_dict(),
        "no_prediction": told.no_prediction,
        "dense_prediction": None if told.dense is None else told.dense.to_dict(),
        "speedup": told.speedup, "crossover": told.crossover,
        "no_crossover": told.no_crossover, "fallback": told.fallback,
    }
