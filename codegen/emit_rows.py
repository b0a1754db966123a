"""Text of what call-time data adds to the walk by key tile: which query tiles see a key tile.

Tables of blocks and slashes make a list of query tiles for every key tile (`list_rows`), each tile
tested pair by pair as forward tests an aligned tile. Loose columns are gathered, as in forward, and
walk all query tiles that may see them, but for tiles that are visited already.
"""

from __future__ import annotations

import re

from maskdsl.codegen.emit import header_text, read_template
from maskdsl.codegen.emit_lists import atom_setup, names_text, parameters_text
from maskdsl.codegen.emit_walk import INDENT, indent
from maskdsl.codegen.listing import Lists, Parameter, Segment
from maskdsl.codegen.lists import atom_parameters, blocks_of
from maskdsl.codegen.row_bounds import KeyPlan

ROW_SETUP = (
    "rows_at = (batch * rows_batch + head // rows_share).to(tl.int64)",
    "rows_bits += (rows_at * tl.cdiv(kv_len, BLOCK_N) + k_tile) * 2 * rows_words",
)
LIST_SETUP = (
    "rows_at = (batch * rows_batch + head // rows_share).to(tl.int64)",
    "rows_places = rows_starts + rows_at * (2 * tl.cdiv(kv_len, BLOCK_N) + 1) + 2 * k_tile",
    "rows_first = tl.load(rows_places)",
    "rows_middle = tl.load(rows_places + 1)",
    "rows_last = tl.load(rows_places + 2)",
    "rows_here = rows_list + rows_at * rows_capacity",
)


def lists_rows(lists: Lists) -> bool:
    """Whether query tiles are listed for each key tile."""
    return bool(lists.tables or lists.slashes)


def row_parameters(lists: Lists) -> list[Parameter]:
    """The arguments that `list_rows` takes."""
    found = [p for atom in lists.atoms for p in atom_parameters(atom)]
    if lists.slashes:
        found += [Parameter("slash_set", True), Parameter("slash_before", True),
                  *(Parameter(f"slash_{name}", False) for name in ("words", "batch", "share"))]
    return [*found, Parameter("rows_bits", True),
            *(Parameter(f"rows_{name}", False) for name in ("words", "batch", "share"))]


def emit_row_lister(by_key: KeyPlan) -> str:
    """The kernel file that finds the query tiles listed for each key tile."""
    lists = by_key.plan.lists
    found = row_parameters(lists)
    pieces = {
        "<HEADER>\n": header_text((by_key.plan,)) + "\n",
        "<HELPERS>\n": take_helpers("forward", ("floor_div", "modulo")),
        "<SLOT_HELPERS>\n": read_template("slots"),
        "<MORE_NAMES>": names_text(found),
        "<MORE_PARAMETERS>": parameters_text(found, 14),
        f"{INDENT}# <SLOTS>\n": indent((
            *(line for atom in lists.atoms for line in atom_setup(atom)), *slash_setup(lists),
            *ROW_SETUP)),
        f"{INDENT}# <BOUNDS>\n": indent((*by_key.bounds, *by_key.reach)),
        "<FIRST>": by_key.first, "<STOP>": by_key.stop,
        f"{INDENT * 2}# <LOOK_UP>\n": indent(tuple(look_up_lines(by_key)), 2),
        "<CORES>": core_text(by_key),
    }
    template = read_template("rows")
    for mark, text in pieces.items():
        template = template.replace(mark, text)
    return template


def take_helpers(template: str, names: tuple[str, ...]) -> str:
    """Helpers of another kernel, as they stand there."""
    blocks = read_template(template).split("\n\n\n")
    found = [next(block for block in blocks if f"\ndef {name}(" in block) for name in names]
    return "".join(f"{block.strip()}\n\n\n" for block in found)


def slash_setup(lists: Lists) -> tuple[str, ...]:
    """Lines that lead the set of all slashes to this head."""
    if not lists.slashes:
        return ()
    return ("slash_at = (batch * slash_batch + head // slash_share).to(tl.int64) * slash_words",
            "slash_set += slash_at", "slash_before += slash_at")


def look_up_lines(by_key: KeyPlan) -> list[str]:
    """Lines that set some and every, bool[CHUNK], for one chunk of query tiles."""
    plan = by_key.plan
    lines = ["some = tile < 0", f"every = tile {'>=' if plan.lists.tables else '<'} 0"]
    for atom in plan.lists.tables:
        name = f"slot_{atom.slot}"
        q_block, kv_block = blocks_of(atom)
        repeats = -(-plan.block_m // q_block) + (plan.block_m % q_block != 0
                                                  and q_block % plan.block_m != 0)
        blocks = max(1, plan.block_n // kv_block)
        wide = -(-blocks // 32)  # both are powers of two, so a tile's blocks start at a word
        lines += [f"more, all_of_it = look_up_rows({name}_table, tile * BLOCK_M // {q_block}, "
                  f"last_in_tile // {q_block}, start, stop, {name}_table_words, {repeats}, "
                  f"{kv_block}, {wide})",
                  "some = some | more", "every = every | all_of_it" if len(plan.lists.tables) > 1
                  else "every = every & all_of_it"]
    if plan.lists.slashes:
        near = "q_offset + last_in_tile - start + 1"
        far = "q_offset + tile * BLOCK_M - (stop - 1)"
        lines.append(f"some = some | (count_below(slash_set, slash_before, {near}, slash_words) > "
                     f"count_below(slash_set, slash_before, {far}, slash_words))")
    lines.append(f"some = some & (tile >= {by_key.first}) & (tile < {by_key.stop})")
    lines += [f"some = some & ((tile < {h.start}) | (tile >= {h.stop}))" for h in by_key.hulls]
    return lines


def core_text(by_key: KeyPlan) -> str:
    """The test that a listed tile may be FULL: in a core, its keys all there."""
    tests = [f"((tile >= {c.start}) & (tile < {c.stop}))" for c in by_key.cores]
    return f" & (start + BLOCK_N <= kv_len) & ({' | '.join(tests)})" if tests else " & (tile < 0)"


# --- what kernels that loop over heads set up -----------------------------------------------------


def loop_setup(lists: Lists) -> tuple[tuple[str, ...], frozenset[str]]:
    """(lines that lead the slots' data to `batch` and `head` inside a loop, the arguments that must
    be called <name>_all for it): a pointer that moves on in place would move with every head."""
    lines = [line for atom in lists.atoms for line in atom_setup(atom)]
    moved = frozenset(m[1] for line in lines if (m := re.match(r"(\w+) \+= ", line)))
    return tuple(re.sub(r"^(\w+) \+= ", r"\1 = \1_all + ", line) for line in lines), moved


def slot_parameters(lists: Lists) -> list[Parameter]:
    """The arguments with the slots' data, as a kernel that loops over heads calls them."""
    moved = loop_setup(lists)[1]
    found = [p for atom in lists.atoms for p in atom_parameters(atom)]
    return [Parameter(f"{p.name}_all", True) if p.name in moved else p for p in found]


def outside_text(hulls: tuple[Segment, ...]) -> list[str]:
    """Terms: the query tile `q_tile` lies in none of the hulls."""
    return [f"((q_tile < {h.start}) | (q_tile >= {h.stop}))" for h in hulls]
