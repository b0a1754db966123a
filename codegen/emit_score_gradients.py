"""The kernels with the gradients of what score modifiers read: a bias, a table of distances.

Each element has one program that owns it and sums over batch entries, heads and rows in a fixed
order, so that no atomics are needed. A sink logit's gradient is a sum over rows of what is known
already, and needs no kernel; nor do the two ends of a table, which the query gradients add up.
"""

from __future__ import annotations

from maskdsl.codegen.emit import merge_lists, read_template
from maskdsl.codegen.emit_key_walk import ROW_LOADS, key_slots
from maskdsl.codegen.emit_lists import names_text, parameters_text
from maskdsl.codegen.emit_rows import slot_parameters
from maskdsl.codegen.emit_scores import back_lines, score_lines, score_parameters, weight_text
from maskdsl.codegen.emit_walk import INDENT, branch_text, indent
from maskdsl.codegen.listing import Parameter
from maskdsl.codegen.members import LANES, Test, test_any, test_static
from maskdsl.codegen.plan import Plan
from maskdsl.scores import Bias, RelativePosition

ACC = frozenset({"acc"})
BIAS_TEXT = """One program: one tile of the gradient of a bias [own_batches, own_heads, q_len,
    kv_len], summed over the batch entries and heads that share it."""
BIAS_PLACE = (
    "k_tile = program % tl.cdiv(kv_len, BLOCK_N)",
    "q_tile = program // tl.cdiv(kv_len, BLOCK_N) % tl.cdiv(q_len, BLOCK_M)",
    "own = program // tl.cdiv(kv_len, BLOCK_N) // tl.cdiv(q_len, BLOCK_M)",
    "first_row = q_tile * BLOCK_M",
    "p_first = q_offset + first_row",
    "start = k_tile * BLOCK_N",
    "lane = tl.arange(0, BLOCK_N)[None, :]",
)
BIAS_START = ("acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)",)
BIAS_STORE = (
    "row = first_row + tl.arange(0, BLOCK_M)[:, None]",
    "key = start + tl.arange(0, BLOCK_N)[None, :]",
    "place = (own.to(tl.int64) * q_len + row) * kv_len + key",
    "tl.store(data_grad_ptr + place, acc.to(data_grad_ptr.dtype.element_ty),",
    "         mask=(row < q_len) & (key < kv_len))",
)
TABLE_TEXT = """One program: BLOCK_N neighbouring distances of a table, none of them its ends, for
    the heads that share it; float32. All pairs of these distances lie in two tiles of keys a query
    tile; row i of it has distance j in column i + j, BLOCK_M <= BLOCK_N."""
LOADS = tuple(line.replace("USE_TMA", "False") for line in ROW_LOADS)
TABLE_START = ("acc = tl.zeros([BLOCK_N], tl.float32)",)


def score_gradients(plans: tuple[Plan, ...], heads: tuple[int, ...]) -> str:
    """The kernels of all modifiers with data of their own; plans by the tile of these kernels."""
    text = ""
    for i, mod in enumerate(plans[0].scores):
        if isinstance(mod, Bias):
            text += kernel_text(f"bias_gradients{i}", BIAS_TEXT, (BIAS_PLACE, BIAS_START,
                                                                   BIAS_STORE), plans, heads,
                                [bias_walk(plan, i) for plan in plans])
        elif isinstance(mod, RelativePosition):
            place = ("own = program % own_heads",
                     f"nearest = program // own_heads * BLOCK_N + 1 - {mod.reach}")
            store = ("place = program // own_heads * BLOCK_N + 1 + tl.arange(0, BLOCK_N)",
                     f"tl.store(data_grad_ptr + own * {2 * mod.reach + 1} + place, acc, "
                     f"mask=place < {2 * mod.reach})")
            text += kernel_text(f"table_gradients{i}", TABLE_TEXT, (place, TABLE_START, store),
                                plans, heads, [table_walk(plan, i) for plan in plans])
    return text


def score_gradient_parameters(plans: tuple[Plan, ...], heads: tuple[int, ...]) -> list[Parameter]:
    """The arguments of these kernels beyond those of every mask."""
    found = [*slot_parameters(merge_lists(plans)), *score_parameters(plans[0].scores)]
    return [*found, Parameter("head_kinds", True)] if heads else found


def kernel_text(name: str, text: str, parts: tuple[tuple[str, ...], ...], plans: tuple[Plan, ...],
                heads: tuple[int, ...], walks: list[str]) -> str:
    """One kernel; parts: which tile it owns, the start of its sums, the end."""
    found = score_gradient_parameters(plans, heads)
    place, start, store = parts
    template = read_template("backward_scores")
    for mark, piece in {
            "<NAMES>": names_text(found), "<NAME>": name, "<TEXT>": text,
            "<PARAMETERS>": parameters_text(found, 11),
            f"{INDENT}# <PLACE>\n": indent(place), f"{INDENT}# <START>\n": indent(start),
            f"{INDENT * 2}# <SLOTS>\n": indent(key_slots(merge_lists(plans), bool(heads)), 2),
            f"{INDENT * 2}# <WALK>\n": branch_text(walks, ACC, 2),
            f"{INDENT}# <STORE>\n": indent(store)}.items():
        template = template.replace(mark, piece)
    return template


def pair_lines(plan: Plan, test: Test, i: int) -> tuple[str, ...]:
    """Lines from a tile's pairs at `start` to the gradient of what modifier i added."""
    return (
        "keys = load_tile(k_head, k_stride_l, batch, kv_head, start, kv_len, HEAD_DIM, BLOCK_N,",
        "                 QK_BLOCK, ALIGN, False)",
        "values = load_tile(v_head, v_stride_l, batch, kv_head, start, kv_len, VALUE_DIM, BLOCK_N,",
        "                   V_BLOCK, ALIGN, False)",
        *test.loads, "scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)",
        "p = (q_offset + row)[:, None]", *plan.rows, *test.lines,
        *score_lines(plan.scores, keep=True),
        weight_text(plan.scores, "[:, None]", True),
        "grad_scores = tl.dot(grads, tl.trans(values), input_precision=PRECISION)",
        "grad_scores = weights * (grad_scores - delta[:, None])",
        *back_lines(plan.scores, upto=i))


def bias_walk(plan: Plan, i: int) -> str:
    """One head's part of a tile of a bias."""
    lanes = LANES[1:] if plan.lists.listed else ()
    return indent((*lanes, *LOADS, *pair_lines(plan, test_static(plan), i),
                   "acc += grad_scores"), 2)


def table_walk(plan: Plan, i: int) -> str:
    """One head's part of some distances."""
    loop = ("for i in tl.range(0, tl.cdiv(q_len, BLOCK_M)):",)
    head = ("q_tile = tl.zeros([], tl.int32) + i",
            "first_row = q_tile * BLOCK_M", "p_first = q_offset + first_row", *LOADS,
            "for half in tl.static_range(2):")
    step = ("start = p_first + nearest + half * BLOCK_N", "column = start + tl.arange(0, BLOCK_N)",
            *pair_lines(plan, test_any(plan, []), i),
            "near = tl.arange(0, BLOCK_M)[:, None] + tl.arange(0, BLOCK_N)[None, :]",
            "near -= half * BLOCK_N", "inside = (near >= 0) & (near < BLOCK_N)",
            "turned = tl.gather(grad_scores, tl.where(inside, near, 0), 1)",
            "acc += tl.sum(tl.where(inside, turned, 0.0), 0)")
    return indent(loop, 2) + indent(head, 3) + indent(step, 4)
