"""The loops over query tiles for one key tile, or for some gathered columns, and one query head."""

from __future__ import annotations

from maskdsl.codegen.emit_rows import LIST_SETUP, lists_rows, loop_setup, outside_text
from maskdsl.codegen.emit_scores import Spots, back_lines, score_lines, weight_text
from maskdsl.codegen.emit_walk import indent, loop_names, range_text, virtual_lines
from maskdsl.codegen.listing import Lists, Parameter, Segment
from maskdsl.codegen.members import LANES, live_lines, test_loose, test_static
from maskdsl.codegen.plan import Plan
from maskdsl.codegen.row_bounds import KeyPlan
from maskdsl.scores import ScoreMod

KEY_STATE = frozenset({"key_acc", "value_acc"})
ROW_LOADS = (
    "queries = load_tile(q_base, q_stride_l, batch, head, first_row, q_len, HEAD_DIM,",
    "                    BLOCK_M, QK_BLOCK, ALIGN, USE_TMA)",
    "grads = load_tile(g_base, g_stride_l, batch, head, first_row, q_len, VALUE_DIM,",
    "                  BLOCK_M, V_BLOCK, ALIGN, USE_TMA)",
    "row = first_row + tl.arange(0, BLOCK_M)",
    "lse = load_lse(lse_ptr, head_at, first_row, row, q_len, BLOCK_M, USE_TMA)",
    "delta = load_floats(delta_ptr, head_at, first_row, row, q_len, 0.0, BLOCK_M, USE_TMA)",
)
SCORES = "scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)"
COLUMN_SETUP = (
    "columns_at = (batch * columns_batch + kv_head // columns_share).to(tl.int64)",
    "columns_place = count_below(columns_marks + columns_at * columns_words,",
    "                            columns_before + columns_at * columns_words, key, columns_words)",
    "columns_place += (batch * kv_heads + kv_head).to(tl.int64) * columns_capacity",
    "columns_held = has_bit(columns_marks + columns_at * columns_words, key, columns_words)",
    "columns_held = (columns_held & (key < kv_len) & (part == 0))[:, None]",
    "key_acc = tl.load(column_dk + columns_place[:, None] * QK_BLOCK +",
    "                  tl.arange(0, QK_BLOCK)[None, :], mask=columns_held, other=0.0)",
    "value_acc = tl.load(column_dv + columns_place[:, None] * V_BLOCK +",
    "                    tl.arange(0, V_BLOCK)[None, :], mask=columns_held, other=0.0)",
)


def column_parameters() -> list[Parameter]:
    """The arguments with the loose columns of a key/value head, and with what they got."""
    return [*(Parameter(f"columns_{name}", True) for name in ("list", "marks", "before")),
            Parameter("column_dk", True), Parameter("column_dv", True),
            *(Parameter(f"columns_{name}", False)
              for name in ("capacity", "words", "batch", "share"))]


def column_sums(lists: Lists) -> tuple[str, ...]:
    """Lines that start the sums of a key tile with what its columns got."""
    if not lists.columns:
        return ()
    return ("# what keys that are loose columns got from tiles that are not visited here",
            *COLUMN_SETUP)


def key_slots(lists: Lists, kinds: bool) -> tuple[str, ...]:
    """Set-up for one query head: its slots' data, and which kind it is of."""
    return (*loop_setup(lists)[0], *(("kind = tl.load(head_kinds + head)",) if kinds else ()))


def key_step(scores: tuple[ScoreMod, ...], loads: tuple[str, ...], test: tuple[str, ...],
             across: bool) -> tuple[str, ...]:
    """What dK and dV of a key tile take from a query tile, scores held as [keys, queries].

    loads, test  lines before the scores and after; no test: every pair is live
    across       the test is of [queries, keys]
    """
    live = (*test, *(("live = tl.trans(live)",) if across else ()))
    modify: tuple[str, ...] = ()
    if scores:
        modify = ("p_across = (q_offset + row)[None, :]", "k_down = key[:, None]",
                  *score_lines(scores, Spots("p_across", "row[None, :]", "k_down"), keep=True))
    return (*ROW_LOADS, *loads, SCORES, *modify, *live,
            weight_text(scores, "[None, :]", bool(test)),
            "value_acc = tl.dot(weights.to(grads.dtype), grads, value_acc, "
            "input_precision=PRECISION)",
            "grad_scores = tl.dot(values, tl.trans(grads), input_precision=PRECISION)",
            "grad_scores = weights * (grad_scores - delta[None, :])", *back_lines(scores),
            "key_acc = tl.dot(grad_scores.to(queries.dtype), queries, key_acc, "
            "input_precision=PRECISION)")


def masked_key_step(plan: Plan) -> tuple[str, ...]:
    """The step of a query tile that is live in part."""
    if not plan.lists.listed:
        return key_step(plan.scores, (), ("p = (q_offset + row)[None, :]", "k = key[:, None]",
                                          *plan.rows, *live_lines(plan.tests)), False)
    test = test_static(plan)
    return key_step(plan.scores, test.loads, ("p = (q_offset + row)[:, None]", *plan.rows,
                                              *test.lines), True)


def key_walk(by_key: KeyPlan) -> str:
    """Bounds and the loops over query tiles, for one query head."""
    plan = by_key.plan
    text = indent((*by_key.bounds, *(LANES if plan.lists.listed else ())), 2) + "\n"
    if by_key.full:
        tile, before = loop_head("full", by_key.full, f"FULL tiles of {loop_names(plan, False)}")
        text += indent(before, 2) + indent((f"first_row = ({tile}) * BLOCK_M",
                                            *key_step(plan.scores, (), (), False)), 3) + "\n"
    if by_key.masked:
        text += masked_walk(by_key)
    if lists_rows(plan.lists):
        text += listed_walk(by_key)
    return text


def masked_walk(by_key: KeyPlan) -> str:
    """The loop over query tiles that are live in part, whatever lists say."""
    plan = by_key.plan
    tile, before = loop_head("masked", by_key.masked, f"MASKED tiles of {loop_names(plan, True)}")
    step = masked_key_step(plan)
    sieve = by_key.sieve
    head: tuple[str, ...] = (f"first_row = ({tile}) * BLOCK_M",)
    if plan.lists.listed:
        head = (f"q_tile = {tile}", "first_row = q_tile * BLOCK_M",
                "p_first = q_offset + first_row")
    if sieve is None:
        return indent(before, 2) + indent((*head, *step), 3) + "\n"
    head = (f"tile = {tile}", "first_row = tile * BLOCK_M", "p_first = q_offset + first_row",
            "p_last = q_offset + tl.minimum(first_row + BLOCK_M, q_len) - 1",
            *sieve.setup, *sieve.lines, f"if {sieve.test}:")
    return indent(before, 2) + indent(head, 3) + indent(step, 4) + "\n"


def listed_walk(by_key: KeyPlan) -> str:
    """The loops over the query tiles that call-time data lists, each read one step ahead."""
    plan = by_key.plan
    text = indent(LIST_SETUP, 2)
    names = " | ".join(map(repr, (*plan.lists.tables, *plan.lists.slashes)))
    loops = [("MASKED", "rows_middle", "rows_last", masked_key_step(plan))]
    if by_key.cores:
        loops.insert(0, ("FULL", "rows_first", "rows_middle",
                         key_step(plan.scores, (), (), False)))
    for what, start, stop, step in loops:
        first, last = f"{start}_part", f"{stop}_part"
        text += indent((f"# {what} tiles listed in {names}",
                        f"{first} = {start} + ({stop} - {start}) * part // parts",
                        f"{last} = {start} + ({stop} - {start}) * (part + 1) // parts",
                        f"listed = tl.load(rows_here + {first}, mask={first} < {last}, other=0)",
                        f"for i in tl.range({first}, {last}, num_stages=STAGES):"), 2)
        text += indent(("q_tile = listed", "first_row = q_tile * BLOCK_M",
                        "p_first = q_offset + first_row",
                        f"listed = tl.load(rows_here + i + 1, mask=i + 1 < {last}, other=0)",
                        *step), 3) + "\n"
    return text


def column_walk(by_key: KeyPlan) -> str:
    """The loop over query tiles that may see gathered columns; pairs in tiles that `key_walk`
    visits are left out."""
    plan = by_key.plan
    if not set(plan.lists.columns) & set(plan.lists.atoms):
        return ""  # the columns are those of other heads
    unvisited = [f"(q_tile >= {by_key.first})", f"(q_tile < {by_key.stop})",
                 *outside_text(by_key.hulls)]
    setup: tuple[str, ...] = ()
    if lists_rows(plan.lists):
        setup = ("rows_at = (batch * rows_batch + head // rows_share).to(tl.int64)",
                 "rows_tile = column // BLOCK_N + rows_at * tl.cdiv(kv_len, BLOCK_N)",
                 "rows_full = rows_bits + (rows_tile * 2 * rows_words)[None, :]")
        place = "tl.where(k < kv_len, q_tile, -1)"
        unvisited += [f"~has_bit(rows_full, {place}, rows_words)",
                      f"~has_bit(rows_full + rows_words, {place}, rows_words)"]
    before = (
        "# bounds of the key tiles that the columns lie in, all at once",
        "k_first = (column // BLOCK_N * BLOCK_N)[None, :]",
        "k_last = tl.minimum(k_first + BLOCK_N, kv_len) - 1", *by_key.bounds, *by_key.reach, *setup,
        "there = column[None, :] < kv_len",
        f"walk_first = tl.min(tl.min(tl.where(there, {by_key.first}, row_tiles), 1), 0)",
        f"walk_stop = tl.max(tl.max(tl.where(there, {by_key.stop}, 0), 1), 0)",
        f"# COLUMNS of {' | '.join(map(repr, plan.lists.columns))}",
        "for i in tl.range(0, walk_stop - walk_first, num_stages=STAGES):")
    test = test_loose(plan, unvisited)
    step = key_step(plan.scores, test.loads, ("p = (q_offset + row)[:, None]", *plan.rows,
                                              *test.lines), True)
    head = ("q_tile = walk_first + i", "first_row = q_tile * BLOCK_M",
            "p_first = q_offset + first_row")
    body = tuple(line.replace("key[:, None]", "column[:, None]") for line in step)
    return indent(before, 2) + indent((*head, *body), 3) + "\n"


def loop_head(name: str, segments: tuple[Segment, ...],
              comment: str) -> tuple[str, tuple[str, ...]]:
    """(the tile of step i, all lines up to and with the `for`) of one loop."""
    setup, tile = virtual_lines(name, segments)
    steps = range_text(f"{name}_count{len(segments) - 1}", True)
    return tile, (f"# {comment}", *setup, f"for i in tl.range({steps}, num_stages=STAGES):")
