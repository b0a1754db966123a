"""From a plan to the source of one Triton file with the gradients' kernels.

As in `emit`, only the bounds of the loops, the mask of a tile and the dead-tile test depend on the
mask. The query gradients walk the plan as forward does, the key gradients its `KeyPlan`.
"""

from __future__ import annotations

from maskdsl.codegen.emit import (
    INDENT,
    LOADS,
    SCORES,
    header_text,
    indent,
    loop_names,
    read_template,
    tile_order_text,
    virtual_lines,
)
from maskdsl.codegen.listing import Segment
from maskdsl.codegen.members import live_lines, test_static
from maskdsl.codegen.plan import Plan
from maskdsl.codegen.row_bounds import KeyPlan

SHARED = ("floor_div", "modulo", "head_base", "load_tile")  # helpers that forward has too
NO_TMA = tuple(line.replace("USE_TMA", "False") for line in LOADS)
WEIGHTS = "weights = tl.math.exp2(scores * scale_log2 - lse[:, None])"
QUERY_STEP = (
    "grad_scores = tl.dot(grads, tl.trans(values), input_precision=PRECISION)",
    "grad_scores = weights * (grad_scores - delta[:, None])",
    "acc = tl.dot(grad_scores.to(keys.dtype), keys, acc, input_precision=PRECISION)",
)
ROW_LOADS = (
    "queries = load_tile(q_base, q_stride_l, batch, head, first_row, q_len, HEAD_DIM,",
    "                    BLOCK_M, QK_BLOCK, ALIGN, False)",
    "grads = load_tile(g_base, g_stride_l, batch, head, first_row, q_len, VALUE_DIM,",
    "                  BLOCK_M, V_BLOCK, ALIGN, False)",
    "row = first_row + tl.arange(0, BLOCK_M)",
    "lse = load_lse(lse_ptr, rows, row, q_len)",
    "delta = tl.load(delta_ptr + rows + row, mask=row < q_len, other=0.0)",
    "scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)",
    "weights = tl.math.exp2(scores * scale_log2 - lse[None, :])",
)
DEAD = "weights = tl.where(live, weights, 0.0)"
KEY_STEP = (
    "value_acc = tl.dot(weights.to(grads.dtype), grads, value_acc, input_precision=PRECISION)",
    "grad_scores = tl.dot(values, tl.trans(grads), input_precision=PRECISION)",
    "grad_scores = weights * (grad_scores - delta[None, :])",
    "key_acc = tl.dot(grad_scores.to(queries.dtype), queries, key_acc, input_precision=PRECISION)",
)


def emit_backward(plan: Plan, by_key: KeyPlan) -> str:
    """The gradients' kernel file of one static plan and one plan by key tile, which may be of
    another tile size; equal plans give equal text."""
    pieces = {
        "<HEADER>\n": f"By query tile:\n{header_text((plan,))}\nBy key tile:\n"
                      f"{header_text((by_key.plan,))}\n",
        "# <HELPERS>\n": shared_helpers(),
        f"{INDENT}# <TILE_ORDER>\n": tile_order_text((plan,), ()),
        f"{INDENT}# <QUERY_WALK>\n": query_walk(plan),
        f"{INDENT * 2}# <KEY_WALK>\n": key_walk(by_key),
    }
    template = read_template("backward")
    for mark, text in pieces.items():
        template = template.replace(mark, text)
    return template


def shared_helpers() -> str:
    """The helpers of the forward kernel, as they stand there."""
    blocks = read_template("forward").split("\n\n\n")
    found = [next(block for block in blocks if f"\ndef {name}(" in block) for name in SHARED]
    return "".join(f"{block.strip()}\n\n\n" for block in found)


def query_walk(plan: Plan) -> str:
    """Bounds, row bounds and the two loops over key tiles."""
    text = indent((*plan.bounds, *plan.rows)) + "\n"
    full = (*NO_TMA, SCORES, WEIGHTS, *QUERY_STEP)
    test = test_static(plan)
    masked = (*NO_TMA, SCORES, *test.lines, WEIGHTS, DEAD, *QUERY_STEP)
    tile, before = loop_head("full", plan.full, f"FULL tiles of {loop_names(plan, False)}")
    if plan.full:
        text += indent(before) + indent((f"start = ({tile}) * BLOCK_N", *full), 2) + "\n"
    tile, before = loop_head("masked", plan.masked,
                                    f"MASKED tiles of {loop_names(plan, True)}")
    if not plan.masked:
        return text
    sieve = plan.sieve
    if sieve is None:
        return text + indent(before) + indent((f"start = ({tile}) * BLOCK_N", *masked), 2) + "\n"
    head = (f"tile = {tile}", "start = tile * BLOCK_N",
            "stop = tl.minimum(start + BLOCK_N, kv_len) - 1  # the tile's last key",
            *sieve.lines, f"if {sieve.test}:")
    return text + indent((*sieve.setup, *before)) + indent(head, 2) + indent(masked, 3) + "\n"


def key_walk(by_key: KeyPlan) -> str:
    """Bounds and the two loops over query tiles, for one query head."""
    plan = by_key.plan
    text = indent(by_key.bounds, 2) + "\n"
    test = ("p = (q_offset + row)[None, :]", *plan.rows, *live_lines(plan.tests), DEAD)
    if by_key.full:
        tile, before = loop_head("full", by_key.full,
                                    f"FULL tiles of {loop_names(plan, False)}")
        text += indent(before, 2) + indent((f"first_row = ({tile}) * BLOCK_M", *ROW_LOADS,
                                            *KEY_STEP), 3) + "\n"
    if not by_key.masked:
        return text
    tile, before = loop_head("masked", by_key.masked,
                                f"MASKED tiles of {loop_names(plan, True)}")
    step = (*ROW_LOADS, *test, *KEY_STEP)
    sieve = by_key.sieve
    if sieve is None:
        return text + indent(before, 2) + indent((f"first_row = ({tile}) * BLOCK_M", *step), 3) + \
            "\n"
    head = (f"tile = {tile}", "first_row = tile * BLOCK_M", "p_first = q_offset + first_row",
            "p_last = q_offset + tl.minimum(first_row + BLOCK_M, q_len) - 1",
            *sieve.setup, *sieve.lines, f"if {sieve.test}:")
    return text + indent(before, 2) + indent(head, 3) + indent(step, 4) + "\n"


def loop_head(name: str, segments: tuple[Segment, ...],
              comment: str) -> tuple[str, tuple[str, ...]]:
    """(the tile of step i, all lines up to and with the `for`) of one loop."""
    if not segments:
        return "", ()
    setup, tile = virtual_lines(name, segments)
    return tile, (f"# {comment}", *setup, f"for i in tl.range(0, {name}_count"
                         f"{len(segments) - 1}, num_stages=STAGES):")
