"""Text of the Hopper kernel's tile masks that ask call-time data.

By words where 32 keys of a row are one word of bits from a list, cut by the row's bounds: a pair
then costs what it costs in a static mask. Else pair by pair, with a look-up for each.
"""

from __future__ import annotations

from maskdsl.codegen.emit import read_template
from maskdsl.codegen.emit_hopper import INTERVAL, in_gluon
from maskdsl.codegen.emit_hopper_lists import (
    column_limit,
    first_columns,
    has_sides,
    setup_lines,
    state_line,
)
from maskdsl.codegen.emit_walk import indent
from maskdsl.codegen.listing import PAD, ListedTest
from maskdsl.codegen.lists import blocks_of, is_table
from maskdsl.codegen.members import list_atoms, live_lines, looked_up
from maskdsl.codegen.plan import Plan
from maskdsl.dynamic import Columns, ListMask, VerticalSlash

PAIRS_ASIDE = ("return pair_words(position, start, 0, 3, state, q_tile, q_len, kv_len, q_offset, "
               "total_len<MORE>, batch, head, SPAN, GRAIN)",)
IS_COLUMNS = "(start >= COLUMNS_AT) & (start < FAR)"


def mask_functions(plan: Plan) -> str:
    """The functions that mask a tile."""
    if has_words(plan):
        text = read_template("hopper_list_words").replace("    # <WORDS>\n",
                                                          indent(word_lines(plan)))
    else:
        text = read_template("hopper_list_pairs")
        text = text.replace("        # <COLUMN_KEYS>\n", indent(column_keys(plan), 2))
        text = text.replace("    # <KIND>\n", indent((state_line(plan), *kind_lines(plan))))
        text = text.replace("    # <LIVE>\n", indent(pair_lines(plan)))
    return text + read_template("hopper_list_masks")


def has_words(plan: Plan) -> bool:
    """Whether words of bits tell all: every test is an interval or one list within an interval,
    and no grain asks a list that another loop of it has to answer."""
    listed = {test.text for test in plan.listed_tests}
    if not all(test in listed or INTERVAL.fullmatch(test) for test in plan.tests):
        return False
    if not all(isinstance(test.atom, ListMask) for test in plan.listed_tests):
        return False
    atoms = list_atoms(plan)
    loose = [a for a in atoms if isinstance(a, (VerticalSlash, Columns))]
    if plan.lists.columns and plan.lists.slashes and len(loose) > 1:
        return False
    aligned = not plan.lists.slashes
    return all(blocks_of(a)[1] == 1 or (aligned and blocks_of(a)[1] % plan.block_n == 0)
               for a in atoms if is_table(a))


# --- words -----------------------------------------------------------------------------------


def word_lines(plan: Plan) -> tuple[str, ...]:
    """The body of `live_words`: which of its parts run is the same for all rows."""
    lines = [state_line(plan), *setup_lines(plan), *plan.rows, "begin = start + p * 0",
             "word = begin * 0"]
    listed = {test.text: test for test in plan.listed_tests}
    whole = [listed_term(listed[test]) if test in listed else interval_term(test)
             for test in plan.tests]
    bits = [f"bits_{atom.slot} = {' | '.join(bits_of(plan, atom))}" for atom in list_atoms(plan)]
    inside = [*bits, f"word = {' | '.join(whole)}"]
    if plan.lists.listed:
        depth = 8 if plan.masked else 4
        lines.append("if start < COLUMNS_AT:")
        if plan.masked:
            lines += ["    if i < static_end:", *(f"        {line}" for line in inside),
                      "    else:"]
        terms = [listed_term(test) for test in plan.listed_tests]
        part = [*bits, f"word = {' | '.join(terms) or 'begin * 0'}",
                *leave_out(plan, "i < both_end")]
        lines += [f"{' ' * depth}{line}" for line in part]
    else:
        lines += inside
    if plan.lists.columns:
        lines += [f"if {IS_COLUMNS}:", *(f"    {line}" for line in column_lines(plan))]
    return in_gluon((*lines, "return word"))


def side_functions(plan: Plan) -> str:
    """The functions that mask the tiles of one warp group."""
    lines = side_word_lines(plan) if has_words(plan) else PAIRS_ASIDE
    return read_template("hopper_side_words").replace("    # <SIDE_WORD>\n", indent(lines))


def side_word_lines(plan: Plan) -> tuple[str, ...]:
    """The body of `side_word`. Columns are left to the grains of columns, which both warp groups
    see."""
    lines = ["p = tl.expand_dims(position, 1)", state_line(plan), *setup_lines(plan), *plan.rows,
             "near = tl.where(start < COLUMNS_AT, start, p_first)  # always inside the sets"]
    for atom in plan.lists.slashes:
        name = f"slot_{atom.slot}"
        lines += ["place = q_offset + q_len - 1 - p + near",
                  f"words = {name}_slashes + (place >> 5)",
                  f"bits_{atom.slot} = funnel(tl.load(words), tl.load(words + 1), place & 31)"]
        if plan.lists.columns:
            lines += [f"words = {name}_columns + (near >> 5)",
                      f"bits_{atom.slot} = bits_{atom.slot} & ~funnel(tl.load(words), "
                      "tl.load(words + 1), near & 31)"]
    lines.append("begin = start + p * 0")
    terms = [listed_term(test) for test in plan.listed_tests if test.atom in plan.lists.slashes]
    lines += [f"word = {' | '.join(terms) or 'begin * 0'}", *leave_out(plan)]
    return in_gluon((*lines, "return word"))


def cut(low: str, high: str) -> str:
    """The word of the keys from `begin` on in [low, high)."""
    word = f"below({high} - begin)"
    return word if low == "0" else f"({word} & ~below({low} - begin))"


def interval_term(test: str) -> str:
    """The word of a static test: an interval a row."""
    found = INTERVAL.fullmatch(test)
    if found is None:
        return "(begin * 0)"  # "(k < 0)"
    return cut(found[1] or "0", found[2])


def listed_term(test: ListedTest) -> str:
    """The word of a list within row bounds."""
    assert isinstance(test.atom, ListMask)
    return f"(bits_{test.atom.slot} & {cut(test.lo, test.hi)})"


def bits_of(plan: Plan, atom: ListMask) -> list[str]:
    """Words of the keys from `begin` on that one slot holds."""
    name, terms = f"slot_{atom.slot}", []
    if isinstance(atom, (VerticalSlash, Columns)):
        terms.append(f"window({name}_columns, begin, {name}_column_words, {PAD})")
    if isinstance(atom, VerticalSlash) and not is_table(atom):
        terms.append(f"window({name}_slashes, q_offset + q_len - 1 - p + begin, "
                     f"{name}_slash_words, {PAD})")
    if is_table(atom):
        q_block, kv_block = blocks_of(atom)
        row = f"(q_tile * SPAN) // {q_block}" if q_block % plan.block_m == 0 else \
            f"tl.minimum((p - q_offset) // {q_block}, {name}_rows - 1)"
        if kv_block == 1:
            terms.append(f"listed_keys({name}_table + tl.cast({row}, tl.int64) * "
                         f"{name}_table_words, begin, {name}_table_words)")
        else:
            terms.append(f"tl.where(table_bit({name}_table, {row}, begin, {name}_table_words, "
                         f"{kv_block}), -1, 0)")
    return terms


def leave_out(plan: Plan, at_distance: str = "") -> list[str]:
    """Lines that take out of a listed grain what another loop visits.

    at_distance  the test that a grain is one at a distance; "" where it is
    """
    lists, lines = plan.lists, []
    if lists.slashes:
        lines.append("word = word & ~below(0 - begin)  # tiles at a distance begin anywhere")
    for h in lists.hulls:
        start = "0" if h.start == "0" else f"{h.start} * GRAIN"
        lines.append(f"word = word & ~{cut(start, f'{h.stop} * GRAIN')}")
    if lists.slashes and lists.tables:
        lines += ["rest = 32 - (begin & 31)",
                  "tile = begin >> 5",
                  "taken = tl.where(has_bit(tile_bits, tile, union_tile_words), below(rest), 0)",
                  "taken = taken | tl.where(has_bit(tile_bits, tile + 1, union_tile_words), "
                  "~below(rest), 0)",
                  f"word = tl.where({at_distance}, word & ~taken, word)" if at_distance else
                  "word = word & ~taken"]
    return lines


def column_lines(plan: Plan) -> list[str]:
    """Lines that set `word` of a grain of columns: they rise, so a row's bounds cut them too."""
    lines = ["place = start - COLUMNS_AT",
             "lane = tl.arange(0, 32, layout=tl.BlockedLayout([1], [32], [4], [0]))",
             "key = tl.load(column_list + (place + lane), "
             f"mask=place + lane < {column_limit(plan)}, other=FAR)",
             f"fresh = {fresh_text(plan, 'key')}"]
    terms = []
    many = sum(isinstance(a, (VerticalSlash, Columns)) for a in list_atoms(plan)) > 1
    for test in plan.listed_tests:
        if not isinstance(test.atom, (VerticalSlash, Columns)):
            continue
        word = f"below({rank_text(test.hi)} - place)"
        if test.lo != "0":
            word += f" & ~below({rank_text(test.lo)} - place)"
        name = f"slot_{test.atom.slot}"
        if many:
            word += f" & gather_bits(has_bit({name}_columns, key, {name}_column_words))"
        terms.append(f"({word})")
    return [*lines, f"word = ({' | '.join(terms)}) & gather_bits(fresh) | (p * 0)"]


def rank_text(key: str) -> str:
    """How many columns lie below a key."""
    return f"count_below(column_marks, column_before, {key}, union_column_words)"


def fresh_text(plan: Plan, key: str) -> str:
    """Whether a loose column is in no other loop's tiles."""
    lists = plan.lists
    terms = [f"({key} < kv_len)"]
    if lists.tables:
        terms.append(f"~has_bit(tile_bits, {key} >> 5, union_tile_words)")
    if lists.slashes:
        terms.append(f"~has_bit(slash_covered, p_first - {key} + {plan.block_m + plan.block_n}, "
                     "union_slash_words)")
    return " & ".join(terms)


# --- pair by pair ----------------------------------------------------------------------------


def kind_lines(plan: Plan) -> tuple[str, ...]:
    """The body of `kind_of`."""
    lines = ["kind = tl.where(i < static_end, 0, 1)"]
    if plan.lists.slashes:
        lines.append("kind = tl.where((i >= static_end) & (i < both_end), 2, kind)")
    if plan.lists.columns:
        lines.append(f"kind = tl.where((i >= {first_columns(plan)}) & (i < column_end), 4, kind)")
    return in_gluon((*lines, "return kind"))


def column_keys(plan: Plan) -> tuple[str, ...]:
    """Lines that read the keys of a grain of columns."""
    if not plan.lists.columns:
        return ()
    return in_gluon((state_line(plan), f"if {IS_COLUMNS}:",
                     "    place = start - COLUMNS_AT + bit",
                     f"    k = tl.load(column_list + place, mask=place < {column_limit(plan)}, "
                     "other=FAR)"))


def pair_lines(plan: Plan) -> tuple[str, ...]:
    """The body of `live_pairs`."""
    lists = plan.lists
    lines = [state_line(plan), *setup_lines(plan),
             *plan.rows]
    lines += [f"in_{atom.slot} = {' | '.join(looked_up(plan, atom, 'pairs'))}"
              for atom in list_atoms(plan)]
    lines += live_lines(plan.tests)
    if lists.slashes:
        lines.append("live = live & (k >= 0)")
    if lists.listed and lists.hulls:
        outside = " & ".join(f"((k < {h.start} * {plan.block_n}) | (k >= {h.stop} * "
                             f"{plan.block_n}))" for h in lists.hulls)
        lines.append(f"live = live & ((kind == 0) | ({outside}))")
    if lists.tables and (lists.slashes or lists.columns):
        lines.append("live = live & ((kind < 2) | ~has_bit(tile_bits, k >> 5, union_tile_words))")
    if has_sides(plan) and lists.columns:
        lines.append("live = live & ((kind != 3) | ~has_bit(column_marks, k, union_column_words))")
    if lists.slashes and lists.columns:
        lines.append("live = live & ((kind != 4) | ~has_bit(slash_covered, p_first - k + "
                     f"{plan.block_m + plan.block_n}, union_slash_words))")
    return tuple(line.replace("BLOCK_M", "SPAN") for line in in_gluon((*lines, "return live")))
