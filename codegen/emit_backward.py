"""From plans to the source of one Triton file with the gradients' kernels.

As in `emit`, only the bounds of the loops, the mask of a tile and the dead-tile test depend on the
mask. The query gradients walk the plan as forward does, the key gradients its `KeyPlan`.
"""

from __future__ import annotations

from maskdsl.codegen.emit import header_text, merge_lists, read_template, tile_order_text
from maskdsl.codegen.emit_key_walk import (
    KEY_STATE,
    column_parameters,
    column_sums,
    column_walk,
    key_slots,
    key_walk,
)
from maskdsl.codegen.emit_lists import names_text, parameters_text, setup_lines
from maskdsl.codegen.emit_rows import lists_rows, slot_parameters, take_helpers
from maskdsl.codegen.emit_score_gradients import score_gradients
from maskdsl.codegen.emit_scores import (
    HELPERS,
    back_lines,
    score_lines,
    score_parameters,
    weight_text,
)
from maskdsl.codegen.emit_walk import (
    INDENT,
    LOADS,
    SCORES,
    Step,
    branch_text,
    indent,
    names_keys,
    walk_text,
)
from maskdsl.codegen.listing import Parameter
from maskdsl.codegen.lists import parameters
from maskdsl.codegen.members import KEYS, Test
from maskdsl.codegen.plan import Plan
from maskdsl.codegen.row_bounds import KeyPlan
from maskdsl.scores import RelativePosition, ScoreMod

SHARED = ("floor_div", "modulo", "head_base", "load_tile")  # helpers that forward has too
QUERY_STATE = frozenset({"acc"})
STORE_QUERY = (
    "dq_base = head_base(dq_ptr, batch, head, dq_stride_b, dq_stride_h, ALIGN)",
    "store_tile(dq_base, dq_stride_l, row, q_len, acc * scale, HEAD_DIM, QK_BLOCK, ALIGN)",
)
STORE_CUT_QUERY = (
    "if is_cut:",
    f"{INDENT}group_at = part.to(tl.int64) * batch_heads + batch * heads + head",
    f"{INDENT}part_at = (group_at * cut_count + q_tile - cut_first) * BLOCK_M",
    f"{INDENT}store_part(dq_parts, part_at, acc, BLOCK_M, QK_BLOCK)",
    "else:",
    *(f"{INDENT}{line}" for line in STORE_QUERY),
)


def cuts_queries(plans: tuple[Plan, ...], heads: tuple[int, ...]) -> bool:
    """Whether `query_gradients` can cut query tiles: not where lists or kinds of heads order them,
    or where rows of theirs are summed up for the ends of a table."""
    return not (heads or plans[0].lists.listed or end_names(plans[0].scores, ""))


def query_order_text(plans: tuple[Plan, ...], heads: tuple[int, ...]) -> str:
    """As `tile_order_text`, cut tiles before all others."""
    if not cuts_queries(plans, heads):
        return tile_order_text(plans, heads)
    last_first = plans[0].last_first
    return indent((
        "slot = program // batch_heads",
        f"# heavy query tiles first, part by part; then the {'last' if last_first else 'first'}, "
        "which see most keys",
        *cut_order("q_tile", "tl.cdiv(q_len, BLOCK_M)", last_first)[1:],
        "batch = program % batch_heads // heads", "head = program % heads"))


def cut_order(tile: str, tiles: str, last_first: bool) -> tuple[str, ...]:
    """Lines that lead from `slot` to a tile, and to the part of its steps; a comment first."""
    place = "slot - cut_count * cut_parts"
    if last_first:
        place = f"{tiles} - 1 - slot + cut_count * (cut_parts - 1)"
    return ("# heavy tiles first, part by part; then the others in order",
            "is_cut = slot < cut_count * cut_parts",
            "parts = tl.where(is_cut, cut_parts, 1)",
            "part = tl.where(is_cut, slot % cut_parts, 0)",
            f"place = {place}",
            f"{tile} = tl.where(is_cut, cut_first + slot // cut_parts,",
            f"{' ' * len(tile)}          place + tl.where(place >= cut_first, cut_count, 0))")


def query_parameters(plans: tuple[Plan, ...], heads: tuple[int, ...]) -> list[Parameter]:
    """The arguments of `query_gradients` beyond those of every mask."""
    found = [*parameters(merge_lists(plans)), *score_parameters(plans[0].scores)]
    found += [Parameter(name, True) for name in end_names(plans[0].scores, "_ptr")]
    return [*found, Parameter("head_order", True)] if heads else found


def key_parameters(plans: tuple[Plan, ...], heads: tuple[int, ...]) -> list[Parameter]:
    """The arguments of `key_gradients` and `column_gradients` beyond those of every mask."""
    lists = merge_lists(plans)
    found = slot_parameters(lists)
    if lists_rows(lists):
        found += [Parameter(f"rows_{name}", True) for name in ("list", "starts", "bits")]
        found += [Parameter(f"rows_{name}", False)
                  for name in ("capacity", "words", "batch", "share")]
    if lists.columns:
        found += column_parameters()
    found += score_parameters(plans[0].scores)
    return [*found, Parameter("head_kinds", True)] if heads else found


def emit_backward(plans: tuple[Plan, ...], by_key: tuple[KeyPlan, ...],
                  scored: tuple[Plan, ...] = (), heads: tuple[int, ...] = ()) -> str:
    """The gradients' kernel file of one plan, or of several that share the heads among them; equal
    plans give equal text.

    by_key  the plans by key tile, which may be of another tile size
    scored  the plans of the kernels for score modifiers' data
    """
    lists, scores = merge_lists(plans), plans[0].scores
    query, key = query_parameters(plans, heads), key_parameters(plans, heads)
    template = read_template("backward")
    if lists.columns:
        template += read_template("backward_columns")
    helpers = take_helpers("forward", SHARED)
    helpers += f"{read_template('slots').strip()}\n\n\n" if lists.atoms else ""
    helpers += HELPERS if scores else ""
    pieces = {
        "<HEADER>\n": f"By query tile:\n{header_text(plans)}\nBy key tile:\n"
                      f"{header_text(tuple(one.plan for one in by_key))}\n",
        "# <HELPERS>\n": helpers,
        "<QUERY_NAMES>": names_text(query),
        "<QUERY_PARAMETERS>": parameters_text(query, 20),
        f"{INDENT}# <TILE_ORDER>\n": query_order_text(plans, heads),
        f"{INDENT}# <START_ENDS>\n": indent(tuple(
            f"{name} = tl.zeros([BLOCK_M], tl.float32)" for name in end_names(scores, ""))),
        f"{INDENT}# <QUERY_SLOTS>\n": indent(tuple(setup_lines(lists))),
        f"{INDENT}# <QUERY_WALK>\n": walk_text(
            plans, heads, query_step(scores, cuts_queries(plans, heads))),
        f"{INDENT}# <STORE_ENDS>\n": indent(tuple(
            f"tl.store({name}_ptr + rows + row, {name}, mask=row < q_len)"
            for name in end_names(scores, ""))),
        f"{INDENT}# <STORE_QUERY>\n": indent(
            STORE_CUT_QUERY if cuts_queries(plans, heads) else STORE_QUERY),
        f"{INDENT}# <KEY_ORDER>\n": indent(cut_order("k_tile", "tl.cdiv(kv_len, BLOCK_N)", False)),
        "<KEY_NAMES>": names_text(key),
        "<KEY_PARAMETERS>": parameters_text(key, 18),
        f"{INDENT}# <COLUMN_SUMS>\n": indent(column_sums(lists)),
        f"{INDENT * 2}# <KEY_SLOTS>\n": indent(key_slots(lists, bool(heads)), 2),
        f"{INDENT * 2}# <KEY_WALK>\n": branch_text(list(map(key_walk, by_key)), KEY_STATE, 2),
        f"{INDENT * 2}# <COLUMN_WALK>\n": branch_text(list(map(column_walk, by_key)), KEY_STATE, 2),
    }
    for mark, text in pieces.items():
        template = template.replace(mark, text)
    return template + score_gradients(scored or plans, heads)


def end_names(scores: tuple[ScoreMod, ...], suffix: str) -> list[str]:
    """The sums of the two ends of every table of distances."""
    return [f"score{i}_{end}{suffix}" for i, mod in enumerate(scores)
            if isinstance(mod, RelativePosition) for end in ("low", "high")]


def query_step(scores: tuple[ScoreMod, ...], parts: bool = False) -> Step:
    """What dQ takes from a key tile; parts: each program a part of its loops."""
    gradient = (
        "grad_scores = tl.dot(grads, tl.trans(values), input_precision=PRECISION)",
        "grad_scores = weights * (grad_scores - delta[:, None])",
        *back_lines(scores, ends=True),
        "acc = tl.dot(grad_scores.to(keys.dtype), keys, acc, input_precision=PRECISION)")
    modify = score_lines(scores, keep=True) if scores else ()
    weights, live_weights = (weight_text(scores, "[:, None]", tested) for tested in (False, True))

    def full(plan: Plan) -> tuple[str, ...]:
        return (SCORES, *((KEYS, *modify) if modify else ()), weights, *gradient)

    def masked(plan: Plan, test: Test) -> tuple[str, ...]:
        keys = (KEYS,) if modify and not names_keys(test) else ()
        return (*test.loads, SCORES, *test.lines, *keys, *modify, live_weights, *gradient)

    return Step(LOADS, full, masked, QUERY_STATE | frozenset(end_names(scores, "")), parts)
