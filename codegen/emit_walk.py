"""The loops that walk a mask by query tile: bounds, then one loop for each kind of tile.

What is done with a tile is a `Step`: forward adds it to the softmax, the query gradients to dQ.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from maskdsl.codegen.emit_lists import column_segments, slash_segments, unvisited
from maskdsl.codegen.emit_scores import FULL, LOG2_E, score_lines
from maskdsl.codegen.listing import Segment
from maskdsl.codegen.members import (
    KEYS,
    LANES,
    Test,
    test_columns,
    test_listed,
    test_slash,
    test_static,
)
from maskdsl.codegen.plan import Plan

INDENT = "    "
SCORES = "scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)"
LOADS = (
    "keys = load_tile(k_base, k_stride_l, batch, kv_head, start, kv_len, HEAD_DIM,",
    "                 BLOCK_N, QK_BLOCK, ALIGN, USE_TMA)",
    "values = load_tile(v_base, v_stride_l, batch, kv_head, start, kv_len, VALUE_DIM,",
    "                   BLOCK_N, V_BLOCK, ALIGN, USE_TMA)",
)
FULL_STEP = (
    "acc, total, peak = attend_full(acc, total, peak, queries, keys, values, scale,",
    "                               PRECISION)",
)
MASKED_STEP = (
    "acc, total, peak = attend_masked(acc, total, peak, scores, values, live, scale, PRECISION)",
)


@dataclass(frozen=True, slots=True)
class Step:
    """What is done with one tile; lines.

    loads   keys and values of the aligned tile at `start`
    full    the rest, every pair live
    masked  the rest, with a test of pairs
    state   the variables that steps hand on
    parts   a program takes the part `part` of `parts` of each loop over tiles known before a call
    """

    loads: tuple[str, ...]
    full: Callable[[Plan], tuple[str, ...]]
    masked: Callable[[Plan, Test], tuple[str, ...]]
    state: frozenset[str]
    parts: bool = False


def range_text(count: str, parts: bool) -> str:
    """The steps of a loop of `count`: all, or the program's part of them."""
    if not parts:
        return f"0, {count}"
    return f"{count} * part // parts, {count} * (part + 1) // parts"


def indent(lines: tuple[str, ...], levels: int = 1) -> str:
    """Lines at a depth, each with its newline."""
    return "".join(f"{INDENT * levels}{line}\n" for line in lines)


def walk_text(plans: tuple[Plan, ...], heads: tuple[int, ...], step: Step) -> str:
    """Bounds and loops; of several plans each in a branch of its own."""
    if not heads:
        return plan_text(plans[0], step)
    return branch_text([plan_text(plan, step) for plan in plans], step.state, 1)


def branch_text(parts: list[str], state: frozenset[str], levels: int) -> str:
    """Texts as branches on `kind`, each with names of its own; the only text as it is."""
    if len(parts) == 1:
        return parts[0]
    text = ""
    for i, part in enumerate(parts):
        test = f"if kind == {i}:" if i == 0 else "else:" if i == len(parts) - 1 else \
            f"elif kind == {i}:"
        lines = own_names(part, f"_{i}", state).splitlines(keepends=True)
        if all(line.lstrip().startswith(("#", "\n")) or not line.strip() for line in lines):
            lines.append(f"{INDENT * levels}pass\n")  # the empty mask has no step at all
        body = "".join(f"{INDENT}{line}" if line.strip() else line for line in lines)
        text += f"{INDENT * levels}{test}\n{body}"
    return text


def own_names(text: str, suffix: str, state: frozenset[str]) -> str:
    """The text with every variable it sets renamed, but for those of `state`: Triton wants a
    variable that two branches set to have one type in both."""
    code = re.compile(r"^\s*(?:for )?(\w+(?:, \w+)*) (?:=|\+=|in) ", re.MULTILINE)
    found = {name for names in code.findall(text) for name in names.split(", ")}
    names = re.compile(rf"\b({'|'.join(sorted(found - state))})\b(?!=)")
    if not found - state:
        return text
    return "".join(line if line.lstrip().startswith("#") else names.sub(rf"\1{suffix}", line)
                   for line in text.splitlines(keepends=True))


def plan_text(plan: Plan, step: Step) -> str:
    """One plan's bounds, row bounds and loops."""
    listed = f"\n{listed_loops_text(plan, step)}" if plan.lists.listed else ""
    lanes = indent(LANES) if plan.lists.listed else ""
    return (f"{indent(plan.bounds)}{indent(plan.rows)}{lanes}\n{full_loop_text(plan, step)}\n"
            f"{masked_loop_text(plan, step)}{listed}")


def virtual_lines(name: str, segments: tuple[Segment, ...],
                  index: str = "i") -> tuple[list[str], str]:
    """One loop over several segments: lines before it, and the tile of virtual index i.

    [a, b) + [c, d)  -->  i in [0, (b - a) + (d - c)), tile = i + (a if i < b - a else c - (b - a))
    """
    lines, done = [], ""
    shifts = []
    for n, segment in enumerate(segments):
        width = segment.stop if segment.start == "0" else f"({segment.stop} - {segment.start})"
        shift = segment.start if not done else f"({segment.start} - {done})"
        shifts.append((shift, done))
        total = f"{name}_count{n}"
        lines.append(f"{total} = {f'{done} + ' if done else ''}{width}".replace(" = (", " = ("))
        done = total
    tile = shifts[-1][0]
    for n in range(len(shifts) - 2, -1, -1):
        tile = f"tl.where({index} < {name}_count{n}, {shifts[n][0]}, {tile})"
    return lines, index if tile == "0" else f"{index} + {tile}"


def loop_names(plan: Plan, masked: bool) -> str:
    """The sub-expressions a loop serves, for its comment."""
    names = [" & ".join(p.origin) for p in plan.pieces if masked or p.fills(plan.block_n)]
    return " | ".join(dict.fromkeys(n for n in names if n)) or repr(plan.mask)


def full_loop_text(plan: Plan, step: Step) -> str:
    """The loop over tiles that are live throughout: no mask in it."""
    if not plan.full:
        return indent(("# no key tile can be live throughout: there is no FULL loop",))
    setup, tile = virtual_lines("full", plan.full)
    steps = range_text(f"full_count{len(plan.full) - 1}", step.parts)
    before = indent((f"# FULL tiles of {loop_names(plan, False)}", *setup,
                     f"for i in tl.range({steps}, num_stages=STAGES):"))
    return before + indent((f"start = ({tile}) * BLOCK_N", *step.loads, *step.full(plan)), 2)


def masked_loop_text(plan: Plan, step: Step) -> str:
    """The loop over tiles that are live in part."""
    if not plan.masked:
        return indent(("# no key tile is known before the call: there is no MASKED loop",)) if \
            plan.lists.listed else indent(("# the mask is empty: there is no MASKED loop",))
    setup, tile = virtual_lines("masked", plan.masked)
    sieve = plan.sieve
    steps = range_text(f"masked_count{len(plan.masked) - 1}", step.parts)
    before = indent((f"# MASKED tiles of {loop_names(plan, True)}", *setup,
                     *(sieve.setup if sieve else ()),
                     f"for i in tl.range({steps}, num_stages=STAGES):"))
    lines = (*step.loads, *step.masked(plan, test_static(plan)))
    if sieve is None:
        return before + indent((f"start = ({tile}) * BLOCK_N", *lines), 2)
    head = indent((f"tile = {tile}", "start = tile * BLOCK_N",
                   "stop = tl.minimum(start + BLOCK_N, kv_len) - 1  # the tile's last key",
                   *sieve.lines, f"if {sieve.test}:"), 2)
    return before + head + indent(lines, 3)


def listed_loops_text(plan: Plan, step: Step) -> str:
    """The loops over tiles and columns that call-time data lists. Each entry of a list is read one
    step ahead, so that no load waits for it."""
    lists = plan.lists
    # Columns first: after the others' loops ptxas gave up keeping tensor core products in flight.
    parts = [column_loop_text(plan, step)] if lists.columns else []
    if lists.tables:
        if lists.cores:
            parts.append(tile_loop_text(plan, step, True))
        parts.append(tile_loop_text(plan, step, False))
    if lists.slashes:
        parts.append(slash_loop_text(plan, step))
    return "\n".join(parts)


def tile_loop_text(plan: Plan, step: Step, full: bool) -> str:
    """The loop over one query tile's list of key tiles, FULL ones or those live in part."""
    names = " | ".join(map(repr, plan.lists.tables))
    count = "full_listed" if full else "part_listed"
    at = ("0", "i + 1") if full else ("union_tile_capacity - 1", "union_tile_capacity - 2 - i")
    before = (f"# {'FULL' if full else 'MASKED'} tiles listed in {names}",
              f"listed = tl.load(union_tile_list + {at[0]}, mask={count} > 0, other=0)",
              f"for i in tl.range(0, {count}, num_stages=STAGES):")
    head = ("start = listed * BLOCK_N", f"listed = tl.load(union_tile_list + {at[1]}, "
            f"mask=i + 1 < {count}, other=0)")
    lines = step.full(plan) if full else step.masked(plan, test_listed(plan))
    return indent(before) + indent((*head, *step.loads, *lines), 2)


def slash_loop_text(plan: Plan, step: Step) -> str:
    """The loop over tiles at the listed distances from the query tile."""
    lines, segments = slash_segments(plan)
    virtual, place = virtual_lines("slash", segments, "n")
    names = " | ".join(map(repr, plan.lists.slashes))
    total = f"slash_count{len(segments) - 1}"
    before = (f"# MASKED tiles at distances of {names}", *lines, *virtual, "n = 0",
              f"distance = tl.load(union_slash_list + ({place}), mask={total} > 0, other=0)",
              f"for i in tl.range(0, {total}, num_stages=STAGES):")
    body = ("start = p_first - distance", "n = i + 1",
            f"distance = tl.load(union_slash_list + ({place}), mask=n < {total}, other=0)",
            *step.loads, *step.masked(plan, test_slash(plan, unvisited(plan, False))))
    return indent(before) + indent(body, 2)


def column_loop_text(plan: Plan, step: Step) -> str:
    """The loop over loose columns, BLOCK_N of them gathered at a time."""
    lines, segments = column_segments(plan)
    virtual, place = virtual_lines("column", segments, "j")
    total = f"column_count{len(segments) - 1}"
    names = " | ".join(map(repr, plan.lists.columns))
    before = (f"# COLUMNS of {names}", *lines, *virtual,
              f"for i in tl.range(0, tl.cdiv({total}, BLOCK_N), num_stages=STAGES):")
    test = test_columns(plan, unvisited(plan, True))
    body = ("j = i * BLOCK_N + tl.arange(0, BLOCK_N)",
            f"column = tl.load(union_column_list + ({place}), mask=j < {total}, other=kv_len)",
            "keys = load_rows(key_rows, k_stride_l, column, kv_len, HEAD_DIM, QK_BLOCK, ALIGN)",
            "values = load_rows(value_rows, v_stride_l, column, kv_len, VALUE_DIM, V_BLOCK, ALIGN)",
            *step.masked(plan, test))
    return indent(before) + indent(body, 2)


# --- forward --------------------------------------------------------------------------------------


def full_step(plan: Plan) -> tuple[str, ...]:
    """One step of a loop without a mask."""
    if not plan.scores:
        return FULL_STEP
    return (SCORES, KEYS, *score_lines(plan.scores), FULL, *attend_lines(plan))


def masked_step(plan: Plan, test: Test) -> tuple[str, ...]:
    """One step of a loop with a mask; words are loaded before the scores, which hide the wait."""
    return (*test.loads, SCORES, *test.lines, *modified_lines(plan, test), *attend_lines(plan))


def modified_lines(plan: Plan, test: Test) -> tuple[str, ...]:
    """Lines that modify scores after a test, which tells their keys or reads tiles at `start`."""
    lines = score_lines(plan.scores) if plan.scores else ()
    return (KEYS, *lines) if lines and not names_keys(test) else lines


def names_keys(test: Test) -> bool:
    """Whether a test has set `k`."""
    return any(line.startswith("k = ") for line in test.lines)


def attend_lines(plan: Plan) -> tuple[str, ...]:
    """The softmax of one tile; modified scores are in natural units, and scaled already."""
    if not plan.scores:
        return MASKED_STEP
    return tuple(line.replace("scale", LOG2_E) for line in MASKED_STEP)


FORWARD = Step(LOADS, full_step, masked_step, frozenset({"acc", "total", "peak"}))
