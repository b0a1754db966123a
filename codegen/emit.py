"""From a plan to the source of one Triton file.

The file stands alone: helpers, then `forward`. Only three stretches of it depend on the mask: the
bounds of the two loops, the mask of a tile, and (where one pays) the dead-tile test.
"""

from __future__ import annotations

from importlib.resources import files

from maskdsl.codegen.plan import Plan, Segment

INDENT = "    "


def emit_source(plan: Plan) -> str:
    """The kernel file of a plan; equal plans give equal text."""
    template = files("maskdsl.codegen").joinpath("forward.py.txt").read_text()
    pieces = {
        "HEADER": header_text(plan),
        "TILE_ORDER": tile_order_text(plan),
        "BOUNDS": indent(plan.bounds),
        "ROWS": indent(plan.rows),
        "FULL_LOOP": full_loop_text(plan),
        "MASKED_LOOP": masked_loop_text(plan),
    }
    for name, text in pieces.items():
        template = template.replace(f"{INDENT}# <{name}>\n" if name != "HEADER" else f"<{name}>\n",
                                    text)
    return template


def header_text(plan: Plan) -> str:
    """What the file is, for a reader who finds it in the cache."""
    return (f"mask         {plan.mask!r}\n"
            f"tile         {plan.block_m} queries x {plan.block_n} keys\n"
            f"FULL loop    {count_text(plan.full)}, no mask\n"
            f"MASKED loop  {count_text(plan.masked)}"
            f"{', dead tiles skipped by interval arithmetic' if plan.sieve else ''}\n\n")


def count_text(segments: tuple[Segment, ...]) -> str:
    """How many stretches a loop walks."""
    return f"{len(segments)} segment{'' if len(segments) == 1 else 's'}"


def indent(lines: tuple[str, ...], levels: int = 1) -> str:
    """Lines at a depth, each with its newline."""
    return "".join(f"{INDENT * levels}{line}\n" for line in lines)


def tile_order_text(plan: Plan) -> str:
    """The heaviest query tiles start first, so that none of them is left for the end."""
    if plan.last_first:
        return indent(("# the last query tiles see most keys: they start first",
                       "q_tile = tl.cdiv(q_len, BLOCK_M) - 1 - program // batch_heads"))
    return indent(("# the first query tiles see most keys: they start first",
                   "q_tile = program // batch_heads"))


def virtual_lines(name: str, segments: tuple[Segment, ...]) -> tuple[list[str], str]:
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
        tile = f"tl.where(i < {name}_count{n}, {shifts[n][0]}, {tile})"
    return lines, "i" if tile == "0" else f"i + {tile}"


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
    return before + indent((f"start = ({tile}) * BLOCK_N", *LOADS, *FULL_STEP), 2)


def masked_loop_text(plan: Plan) -> str:
    """The loop over tiles that are live in part."""
    if not plan.masked:
        return indent(("# the mask is empty: there is no MASKED loop",))
    setup, tile = virtual_lines("masked", plan.masked)
    sieve = plan.sieve
    before = indent((f"# MASKED tiles of {loop_names(plan, True)}", *setup,
                     *(sieve.setup if sieve else ()),
                     f"for i in tl.range(0, masked_count{len(plan.masked) - 1}, "
                     "num_stages=STAGES):"))
    step = (*LOADS, "k = start + tl.arange(0, BLOCK_N)[None, :]", f"live = {plan.tests[0]}",
            *(f"live = live | {test}" for test in plan.tests[1:]), *MASKED_STEP)
    if sieve is None:
        return before + indent((f"start = ({tile}) * BLOCK_N", *step), 2)
    head = indent((f"tile = {tile}", "start = tile * BLOCK_N",
                   "stop = tl.minimum(start + BLOCK_N, kv_len) - 1  # the tile's last key",
                   *sieve.lines, f"if {sieve.test}:"), 2)
    return before + head + indent(step, 3)


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
    "acc, total, peak = attend_masked(acc, total, peak, queries, keys, values, live, scale,",
    "                                 PRECISION)",
)
