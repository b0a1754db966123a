"""From a plan to the source of one Triton file.

The file stands alone: helpers, then `forward`. Only three stretches of it depend on the mask: the
bounds of the two loops, the mask of a tile, and (where one pays) the dead-tile test.
"""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.resources import files
from typing import Any

from maskdsl.codegen.emit_lists import (
    TILE_SETUP,
    atom_setup,
    column_segments,
    cores_text,
    names_text,
    parameters_text,
    setup_lines,
    slash_segments,
    table_lines,
    unvisited,
)
from maskdsl.codegen.emit_scores import (
    FULL,
    HELPERS,
    LOG2_E,
    score_lines,
    score_parameters,
    sink_lines,
)
from maskdsl.codegen.listing import Lists, Parameter, Segment
from maskdsl.codegen.lists import parameters
from maskdsl.codegen.members import (
    LANES,
    Test,
    test_columns,
    test_listed,
    test_slash,
    test_static,
)
from maskdsl.codegen.plan import Plan

INDENT = "    "


def emit_source(plan: Plan) -> str:
    """The kernel file of a plan; equal plans give equal text."""
    return emit_kernels((plan,), ())


def emit_kernels(plans: tuple[Plan, ...], heads: tuple[int, ...]) -> str:
    """The kernel file of one plan, or of several that share the heads among them.

    heads  how many heads walk each plan, costliest plan first; () for one plan
    """
    template = read_template("forward")
    lists = merge_lists(plans)
    # all heads read one list of columns, so each must tell its own among them
    plans = tuple(replace(plan, lists=replace(plan.lists, columns=lists.columns))
                  if plan.lists.columns else plan for plan in plans)
    scores = plans[0].scores
    found = [*parameters(lists), *score_parameters(scores)]
    if heads:
        found.append(Parameter("head_order", True))
    names = names_text(found)
    pieces = {
        "<HEADER>\n": header_text(plans),
        "# <SLOT_HELPERS>\n": read_template("slots") if lists.atoms else "",
        "# <SCORE_HELPERS>\n": HELPERS if scores else "",
        f"{INDENT}# <SINKS>\n": indent(sink_lines(scores)),
        "<MORE_NAMES>": names,
        "<MORE_PARAMETERS>": parameters_text(found, 12),
        f"{INDENT}# <TILE_ORDER>\n": tile_order_text(plans, heads),
        f"{INDENT}# <SLOTS>\n": indent(tuple(setup_lines(lists))),
        f"{INDENT}# <WALK>\n": walk_text(plans, heads),
    }
    for mark, text in pieces.items():
        template = template.replace(mark, text)
    return template


def emit_lister(plan: Plan) -> str:
    """The kernel file that lists the live key tiles of a plan with tables."""
    found = [p for p in parameters(plan.lists)
             if p.name.startswith("slot_") or p.name.startswith("union_tile_")]
    atoms = [line for atom in plan.lists.atoms for line in atom_setup(atom)]
    pieces = {
        "<HEADER>\n": f"mask  {plan.mask!r}\n"
                      f"tile  {plan.block_m} queries x {plan.block_n} keys\n\n",
        "<SLOT_HELPERS>\n": read_template("slots"),
        "<MORE_NAMES>": names_text(found),
        "<MORE_PARAMETERS>": parameters_text(found, 15),
        f"{INDENT}# <SLOTS>\n": indent((*atoms, *TILE_SETUP)),
        f"{INDENT}# <BOUNDS>\n": indent(plan.bounds),
        "<REACH_LO>": plan.lists.reach[0], "<REACH_HI>": plan.lists.reach[1],
        f"{INDENT * 2}# <LOOK_UP>\n": indent(tuple(table_lines(plan)), 2),
        "<CORES>": cores_text(plan),
    }
    template = read_template("lists")
    for mark, text in pieces.items():
        template = template.replace(mark, text)
    return template


def read_template(name: str) -> str:
    """A part of the kernel that no mask changes."""
    return files("maskdsl.codegen").joinpath(f"{name}.py.txt").read_text()


def merge_lists(plans: tuple[Plan, ...]) -> Lists:
    """What all the plans together ask of the call's data."""
    def union(name: str) -> tuple[Any, ...]:
        found = {atom for plan in plans for atom in getattr(plan.lists, name)}
        return tuple(sorted(found, key=lambda atom: atom.key))

    return Lists(union("atoms"), union("tables"), union("slashes"), union("columns"))


def header_text(plans: tuple[Plan, ...]) -> str:
    """What the file is, for a reader who finds it in the cache."""
    text = ""
    for plan in plans:
        lists = plan.lists
        more = [name for name, made in (("tiles listed for these rows", lists.tables),
                                        ("tiles at listed distances", lists.slashes)) if made]
        text += (f"mask         {plan.mask!r}\n"
                 f"tile         {plan.block_m} queries x {plan.block_n} keys\n"
                 f"FULL loop    {count_text(plan.full)}{', listed tiles' if lists.cores else ''}, "
                 "no mask\n"
                 f"MASKED loop  {', '.join([count_text(plan.masked), *more])}"
                 f"{', dead tiles skipped by interval arithmetic' if plan.sieve else ''}\n"
                 f"{scores_text(plan)}"
                 f"{'COLUMN loop  loose columns, gathered' + chr(10) if lists.columns else ''}\n")
    return text


def scores_text(plan: Plan) -> str:
    """What is done to the scores."""
    return f"scores       {list(plan.scores)!r}; `scale` holds no log2(e)\n" if plan.scores else ""


def count_text(segments: tuple[Segment, ...]) -> str:
    """How many stretches a loop walks."""
    return f"{len(segments)} segment{'' if len(segments) == 1 else 's'}"


def indent(lines: tuple[str, ...], levels: int = 1) -> str:
    """Lines at a depth, each with its newline."""
    return "".join(f"{INDENT * levels}{line}\n" for line in lines)


def tile_order_text(plans: tuple[Plan, ...], heads: tuple[int, ...]) -> str:
    """The heaviest query tiles start first, so that none of them is left for the end."""
    last_first = plans[0].last_first
    if heads:
        return class_order_text(plans, heads)
    if plans[0].lists.listed:
        return indent(LISTED_ORDER)
    which = "last" if last_first else "first"
    tile = "tl.cdiv(q_len, BLOCK_M) - 1 - program // batch_heads" if last_first else \
        "program // batch_heads"
    return indent((f"# the {which} query tiles see most keys: they start first", f"q_tile = {tile}",
                   "batch = program % batch_heads // heads", "head = program % heads"))


LISTED_ORDER = (
    "# one key/value head after the other, so that its keys stay in the L2 cache while all query",
    "# tiles pick from them; heavy query tiles first",
    "tiles = tl.cdiv(q_len, BLOCK_M)",
    "q_tile = tiles - 1 - program // group % tiles",
    "head = program // group // tiles % (heads // group) * group + program % group",
    "batch = program // group // tiles // (heads // group)",
)


def class_order_text(plans: tuple[Plan, ...], heads: tuple[int, ...]) -> str:
    """Kinds of heads one after the other, the costliest kind first, so that its items do not start
    when the others are done; within a kind the heaviest query tiles first."""
    lines = ["# heads by kind of mask, the costliest kind first; heavy query tiles first in each",
             "tiles = tl.cdiv(q_len, BLOCK_M)",
             "kind, item, before, kind_heads, last_first = 0, program, 0, "
             f"{heads[0]}, {plans[0].last_first}"]
    done = heads[0]
    for i, count in enumerate(heads[1:], start=1):
        first = f"tiles * (batch_heads // heads) * {done}"
        lines += [f"later = program >= {first}", f"kind = tl.where(later, {i}, kind)",
                  f"item = tl.where(later, program - {first}, item)",
                  f"before = tl.where(later, {done}, before)",
                  f"kind_heads = tl.where(later, {count}, kind_heads)",
                  f"last_first = tl.where(later, {plans[i].last_first}, last_first)"]
        done += count
    lines += ["batch = item // kind_heads % (batch_heads // heads)",
              "q_tile = item // kind_heads // (batch_heads // heads)",
              "q_tile = tl.where(last_first, tiles - 1 - q_tile, q_tile)",
              "head = tl.load(head_order + before + item % kind_heads)"]
    return indent(tuple(lines))


def walk_text(plans: tuple[Plan, ...], heads: tuple[int, ...]) -> str:
    """Bounds and loops; of several plans each in a branch of its own."""
    if not heads:
        return plan_text(plans[0])
    text = ""
    for i, plan in enumerate(plans):
        test = f"if kind == {i}:" if i == 0 else "else:" if i == len(plans) - 1 else \
            f"elif kind == {i}:"
        lines = own_names(plan_text(plan), f"_{i}").splitlines(keepends=True)
        if all(line.lstrip().startswith(("#", "\n")) or not line.strip() for line in lines):
            lines.append(f"{INDENT}pass\n")  # the empty mask has no step at all
        body = "".join(f"{INDENT}{line}" if line.strip() else line for line in lines)
        text += f"{INDENT}{test}\n{body}"
    return text


def own_names(text: str, suffix: str) -> str:
    """The text with every variable it sets renamed, but for the softmax's state: Triton wants a
    variable that two branches set to have one type in both."""
    code = re.compile(r"^\s*(?:for )?(\w+(?:, \w+)*) (?:=|\+=|in) ", re.MULTILINE)
    found = {name for names in code.findall(text) for name in names.split(", ")}
    names = re.compile(rf"\b({'|'.join(sorted(found - {'acc', 'total', 'peak'}))})\b(?!=)")
    if not found - {"acc", "total", "peak"}:
        return text
    return "".join(line if line.lstrip().startswith("#") else names.sub(rf"\1{suffix}", line)
                   for line in text.splitlines(keepends=True))


def plan_text(plan: Plan) -> str:
    """One plan's bounds, row bounds and loops."""
    listed = f"\n{listed_loops_text(plan)}" if plan.lists.listed else ""
    lanes = indent(LANES) if plan.lists.listed else ""
    return (f"{indent(plan.bounds)}{indent(plan.rows)}{lanes}\n{full_loop_text(plan)}\n"
            f"{masked_loop_text(plan)}{listed}")


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


def full_loop_text(plan: Plan) -> str:
    """The loop over tiles that are live throughout: no mask in it."""
    if not plan.full:
        return indent(("# no key tile can be live throughout: there is no FULL loop",))
    setup, tile = virtual_lines("full", plan.full)
    before = indent((f"# FULL tiles of {loop_names(plan, False)}", *setup,
                     f"for i in tl.range(0, full_count{len(plan.full) - 1}, num_stages=STAGES):"))
    return before + indent((f"start = ({tile}) * BLOCK_N", *full_step(plan)), 2)


def masked_loop_text(plan: Plan) -> str:
    """The loop over tiles that are live in part."""
    if not plan.masked:
        return indent(("# no key tile is known before the call: there is no MASKED loop",)) if \
            plan.lists.listed else indent(("# the mask is empty: there is no MASKED loop",))
    setup, tile = virtual_lines("masked", plan.masked)
    sieve = plan.sieve
    before = indent((f"# MASKED tiles of {loop_names(plan, True)}", *setup,
                     *(sieve.setup if sieve else ()),
                     f"for i in tl.range(0, masked_count{len(plan.masked) - 1}, "
                     "num_stages=STAGES):"))
    step = masked_step(plan, test_static(plan))
    if sieve is None:
        return before + indent((f"start = ({tile}) * BLOCK_N", *step), 2)
    head = indent((f"tile = {tile}", "start = tile * BLOCK_N",
                   "stop = tl.minimum(start + BLOCK_N, kv_len) - 1  # the tile's last key",
                   *sieve.lines, f"if {sieve.test}:"), 2)
    return before + head + indent(step, 3)


def full_step(plan: Plan) -> tuple[str, ...]:
    """One step of a loop without a mask."""
    if not plan.scores:
        return (*LOADS, *FULL_STEP)
    return (*LOADS, SCORES, KEYS, *score_lines(plan.scores), FULL, *attend_lines(plan))


def masked_step(plan: Plan, test: Test) -> tuple[str, ...]:
    """One step of a loop with a mask; words are loaded before the scores, which hide the wait."""
    modified: tuple[str, ...] = score_lines(plan.scores) if plan.scores else ()
    if modified and KEYS not in test.lines:
        modified = (KEYS, *modified)
    return (*LOADS, *test.loads, SCORES, *test.lines, *modified, *attend_lines(plan))


def attend_lines(plan: Plan) -> tuple[str, ...]:
    """The softmax of one tile; modified scores are in natural units, and scaled already."""
    if not plan.scores:
        return MASKED_STEP
    return tuple(line.replace("scale", LOG2_E) for line in MASKED_STEP)


def listed_loops_text(plan: Plan) -> str:
    """The loops over tiles and columns that call-time data lists. Each entry of a list is read one
    step ahead, so that no load waits for it."""
    lists = plan.lists
    # Columns first: after the others' loops ptxas gave up keeping tensor core products in flight.
    parts = [column_loop_text(plan)] if lists.columns else []
    if lists.tables:
        if lists.cores:
            parts.append(tile_loop_text(plan, True))
        parts.append(tile_loop_text(plan, False))
    if lists.slashes:
        parts.append(slash_loop_text(plan))
    return "\n".join(parts)


def tile_loop_text(plan: Plan, full: bool) -> str:
    """The loop over one query tile's list of key tiles, FULL ones or those live in part."""
    names = " | ".join(map(repr, plan.lists.tables))
    count = "full_listed" if full else "part_listed"
    at = ("0", "i + 1") if full else ("union_tile_capacity - 1", "union_tile_capacity - 2 - i")
    before = (f"# {'FULL' if full else 'MASKED'} tiles listed in {names}",
              f"listed = tl.load(union_tile_list + {at[0]}, mask={count} > 0, other=0)",
              f"for i in tl.range(0, {count}, num_stages=STAGES):")
    head = ("start = listed * BLOCK_N", f"listed = tl.load(union_tile_list + {at[1]}, "
            f"mask=i + 1 < {count}, other=0)")
    step = full_step(plan) if full else masked_step(plan, test_listed(plan))
    return indent(before) + indent((*head, *step), 2)


def slash_loop_text(plan: Plan) -> str:
    """The loop over tiles at the listed distances from the query tile."""
    lines, segments = slash_segments(plan)
    virtual, place = virtual_lines("slash", segments, "n")
    names = " | ".join(map(repr, plan.lists.slashes))
    total = f"slash_count{len(segments) - 1}"
    before = (f"# MASKED tiles at distances of {names}", *lines, *virtual, "n = 0",
              f"distance = tl.load(union_slash_list + ({place}), mask={total} > 0, other=0)",
              f"for i in tl.range(0, {total}, num_stages=STAGES):")
    step = ("start = p_first - distance", "n = i + 1",
            f"distance = tl.load(union_slash_list + ({place}), mask=n < {total}, other=0)",
            *masked_step(plan, test_slash(plan, unvisited(plan, False))))
    return indent(before) + indent(step, 2)


def column_loop_text(plan: Plan) -> str:
    """The loop over loose columns, BLOCK_N of them gathered at a time."""
    lines, segments = column_segments(plan)
    virtual, place = virtual_lines("column", segments, "j")
    total = f"column_count{len(segments) - 1}"
    names = " | ".join(map(repr, plan.lists.columns))
    before = (f"# COLUMNS of {names}", *lines, *virtual,
              f"for i in tl.range(0, tl.cdiv({total}, BLOCK_N), num_stages=STAGES):")
    test = test_columns(plan, unvisited(plan, True))
    step = ("j = i * BLOCK_N + tl.arange(0, BLOCK_N)",
            f"column = tl.load(union_column_list + ({place}), mask=j < {total}, other=kv_len)",
            "keys = load_rows(key_rows, k_stride_l, column, kv_len, HEAD_DIM, QK_BLOCK, ALIGN)",
            "values = load_rows(value_rows, v_stride_l, column, kv_len, VALUE_DIM, V_BLOCK, ALIGN)",
            *test.loads, SCORES, *test.lines,
            *(score_lines(plan.scores) if plan.scores else ()), *attend_lines(plan))
    return indent(before) + indent(step, 2)


KEYS = "k = start + tl.arange(0, BLOCK_N)[None, :]"
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
