"""Text of what runtime slots add to a kernel: parameters, set-up, membership, listed loops."""

from __future__ import annotations

from maskdsl.codegen.listing import PAD, Lists, Parameter, Segment
from maskdsl.codegen.lists import blocks_of, is_table
from maskdsl.codegen.plan import Plan
from maskdsl.dynamic import Columns, Document, Prefix, SlotMask, VerticalSlash

FAR = str((1 << 31) - 1)


def names_text(found: list[Parameter]) -> str:
    """The integers among the parameters, for `do_not_specialize`."""
    names = [f'"{p.name}"' for p in found if not p.is_pointer]
    return "".join(f",\n    {', '.join(names[i:i + 3])}" for i in range(0, len(names), 3))


def parameters_text(found: list[Parameter], depth: int) -> str:
    """The parameters in a kernel's signature."""
    space = " " * depth
    types = {p.name: "tl.int64" if "_stride_" in p.name else "tl.int32" for p in found}
    words = [p.name if p.is_pointer else f"{p.name}: {types[p.name]}" for p in found]
    return "".join(f"{space}{', '.join(words[i:i + 3])},\n" for i in range(0, len(words), 3))


def atom_setup(atom: SlotMask) -> list[str]:
    """Lines that lead one slot's data to this batch entry and head."""
    name = f"slot_{atom.slot}"
    if isinstance(atom, Document):
        return [f"{name}_start += batch * {name}_batch", f"{name}_stop += batch * {name}_batch"]
    if isinstance(atom, Prefix):
        return [f"{name}_length = tl.load({name}_lengths + batch * {name}_batch)"]
    lines = [f"{name}_row = (batch * {name}_batch + head // {name}_share).to(tl.int64)"]
    if is_table(atom):
        lines.append(f"{name}_table += {name}_row * {name}_rows * {name}_table_words")
    if isinstance(atom, (VerticalSlash, Columns)):
        lines.append(f"{name}_columns += {name}_row * ({name}_column_words + {2 * PAD}) + {PAD}")
    if isinstance(atom, VerticalSlash) and not is_table(atom):
        lines.append(f"{name}_slashes += {name}_row * ({name}_slash_words + {2 * PAD}) + {PAD}")
    return lines


TILE_SETUP = (
    "tile_row = (batch * union_tile_batch + head // union_tile_share).to(tl.int64)",
    "tile_row = tile_row * tl.cdiv(q_len, BLOCK_M) + q_tile",
    "union_tile_list += tile_row * union_tile_capacity",
    "union_tile_bits += tile_row * union_tile_words",
)


def union_setup(lists: Lists) -> list[str]:
    """Lines that lead the lists to this query tile, batch entry and head."""
    lines = []
    for name, made in (("slash", lists.slashes), ("column", lists.columns)):
        if made:
            at = f"union_{name}"
            lines += [f"{name}_row = (batch * {at}_batch + head // {at}_share).to(tl.int64)",
                      f"{at}_list += {name}_row * {at}_capacity",
                      f"{at}_marks += {name}_row * {at}_words",
                      f"{at}_before += {name}_row * {at}_words"]
    if lists.slashes and lists.columns:
        lines.append("union_slash_covered += slash_row * union_slash_words")
    if lists.columns:
        lines += ["key_rows = head_base(union_key_rows, batch, kv_head, k_stride_b, k_stride_h,"
                  " ALIGN)",
                  "value_rows = head_base(union_value_rows, batch, kv_head, v_stride_b, v_stride_h,"
                  " ALIGN)"]
    return lines


def setup_lines(lists: Lists) -> list[str]:
    """All set-up of slots, once a program."""
    lines = [line for atom in lists.atoms for line in atom_setup(atom)]
    if lists.tables:
        lines += [*TILE_SETUP, "full_listed = tl.load(union_tile_counts + 2 * tile_row)",
                  "part_listed = tl.load(union_tile_counts + 2 * tile_row + 1)"]
    lines += union_setup(lists)
    return ["# call-time data of this batch entry and head", *lines] if lines else []


# --- which entries of the lists are left for this query tile --------------------------------------


def slash_segments(plan: Plan) -> tuple[list[str], tuple[Segment, ...]]:
    """Lines, and the stretches of the distance list to walk: cut to the reach, without tiles that
    lie inside the static loops' tiles. Distances rise, so keys fall along the list."""
    lo, hi = plan.lists.reach
    shift = plan.block_m - 1  # mark i stands for distance i - shift

    def below(distance: str) -> str:
        return (f"count_below(union_slash_marks, union_slash_before, {distance} + {shift}, "
                "union_slash_words)")

    lines = ["# distances whose tiles may hold live keys of these rows",
             f"slash_first = {below(f'p_first - {hi} + 1')}",
             f"slash_last = tl.maximum({below(f'p_first + BLOCK_N - {lo}')}, slash_first)"]
    start, found = "slash_first", []
    for i, hull in enumerate(reversed(plan.lists.hulls)):
        lines += [
            "# without those inside static tiles",
            f"skip_stop{i} = {below(f'p_first - {hull.start} * BLOCK_N + 1')}",
            f"skip_start{i} = tl.where({hull.stop} * BLOCK_N >= {hi}, 0, "
            f"{below(f'p_first - {hull.stop} * BLOCK_N + BLOCK_N')})",
            f"skip_stop{i} = tl.where({hull.stop} > {hull.start}, skip_stop{i}, 0)",
            f"slash_stop{i} = tl.minimum(tl.maximum(skip_start{i}, {start}), slash_last)",
            f"slash_start{i} = tl.minimum(tl.maximum(skip_stop{i}, slash_stop{i}), slash_last)"]
        found.append(Segment(start, f"slash_stop{i}"))
        start = f"slash_start{i}"
    return lines, (*found, Segment(start, "slash_last"))


def column_segments(plan: Plan) -> tuple[list[str], tuple[Segment, ...]]:
    """Lines, and the stretches of the column list that lie outside the static loops' tiles."""
    lo, hi = plan.lists.reach

    def below(key: str) -> str:
        return (f"count_below(union_column_marks, union_column_before, {key}, "
                "union_column_words)")

    lines = ["# loose columns that these rows may see", f"column_first = {below(lo)}",
             f"column_last = tl.maximum({below(hi)}, column_first)"]
    start, found = "column_first", []
    for i, hull in enumerate(plan.lists.hulls):
        lines += [f"column_stop{i} = tl.minimum(tl.maximum({below(f'{hull.start} * BLOCK_N')}, "
                  f"{start}), column_last)",
                  f"column_start{i} = tl.minimum(tl.maximum({below(f'{hull.stop} * BLOCK_N')}, "
                  f"column_stop{i}), column_last)"]
        found.append(Segment(start, f"column_stop{i}"))
        start = f"column_start{i}"
    return lines, (*found, Segment(start, "column_last"))


def unvisited(plan: Plan, after_slashes: bool) -> list[str]:
    """Terms of a test on keys `k` [1, BLOCK_N]: not in the tiles of an earlier loop."""
    terms = []
    if not after_slashes:
        terms = ["(k >= 0)"] + [f"((k < {h.start} * BLOCK_N) | (k >= {h.stop} * BLOCK_N))"
                                for h in plan.lists.hulls]
    if plan.lists.tables:
        terms.append("~has_bit(union_tile_bits, k // BLOCK_N, union_tile_words)")
    if after_slashes and plan.lists.slashes:
        terms.append("~has_bit(union_slash_covered, p_first - k + (BLOCK_M + BLOCK_N), "
                     "union_slash_words)")
    return terms


# --- the kernel that makes the lists of tiles -----------------------------------------------------


def table_lines(plan: Plan) -> list[str]:
    """Lines that set some and every, bool[CHUNK], for the tiles of one chunk."""
    lines = []
    for i, atom in enumerate(plan.lists.tables):
        name = f"slot_{atom.slot}"
        q_block, kv_block = blocks_of(atom)
        call = (f"look_up_tiles({name}_table, q_tile * BLOCK_M // {q_block}, "
                f"last_in_tile // {q_block}, tile, {name}_table_words, {kv_block}, BLOCK_N)")
        if i == 0:
            lines.append(f"some, every = {call}")
        else:
            lines += [f"more, all_of_it = {call}", "some = some | more",
                      "every = every | all_of_it"]
    lines.append("some = some & (tile >= first) & (tile < stop)")
    lines += [f"some = some & ((tile < {h.start}) | (tile >= {h.stop}))" for h in plan.lists.hulls]
    return lines


def cores_text(plan: Plan) -> str:
    """The test that a listed tile may be FULL: in a core of the mask where the table is full."""
    tests = [f"((tile >= {c.start}) & (tile < {c.stop}))" for c in plan.lists.cores]
    return f" & ({' | '.join(tests)})" if tests else " & (tile < 0)"
