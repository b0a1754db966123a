"""Text that tells which pairs of a tile call-time data holds.

The bits of neighbouring keys are neighbours in a set's words, so a tile reads a few words as
scalars, before its scores are computed, and every row picks its own 32 bits of them: no load a row
or a pair. Only gathered keys, and tables whose bits are not single keys, look up each key.
"""

from __future__ import annotations

from dataclasses import dataclass

from maskdsl.codegen.lists import blocks_of, is_table
from maskdsl.codegen.plan import Plan
from maskdsl.dynamic import Columns, ListMask, VerticalSlash

# Key `lane` is bit lane % 32 of its word. A thread of a tensor core's result holds the keys
# 8 i + 2 t + 0 and 1, t its own number: after one shift by 2 t the bits it asks for are constants.
LANES = ("lane = tl.arange(0, BLOCK_N)[None, :]", "lane_shift = lane & 6",
         "lane_bit = tl.full([1, BLOCK_N], 1, tl.int32) << (lane & 25)")
KEYS = "k = start + tl.arange(0, BLOCK_N)[None, :]"


@dataclass(frozen=True, slots=True)
class Test:
    """Lines that set `live` for one tile: what is loaded before the scores, and what follows."""

    loads: tuple[str, ...]
    lines: tuple[str, ...]


def list_atoms(plan: Plan) -> list[ListMask]:
    """The plan's slots that are lists."""
    return [atom for atom in plan.lists.atoms if isinstance(atom, ListMask)]


def test_static(plan: Plan) -> Test:
    """The test of an aligned tile of the static loops: the whole mask."""
    loads, lines = member_lines(plan, "static")
    return Test(loads, (KEYS, *lines, *live_lines(plan.tests)))


def test_listed(plan: Plan) -> Test:
    """The test of an aligned tile from a list: no static part of the mask holds any of its keys."""
    loads, lines = member_lines(plan, "listed")
    return Test(loads, (KEYS, *lines, *live_lines(tuple(t.text for t in plan.listed_tests))))


def test_slash(plan: Plan, unvisited: list[str]) -> Test:
    """The test of a tile at a fixed distance: as listed, without keys that earlier loops visited.

    Where each test is one slot within row bounds, bounds and visited keys are cut out of the words
    themselves, and one bit a pair is left to ask.
    """
    if not folds(plan):
        before, after = member_lines(plan, "slash")
        tests = live_lines(tuple(t.text for t in plan.listed_tests))
        return Test(before, (KEYS, *after, *tests, f"live = live & {' & '.join(unvisited)}"))
    loads = [line for atom in list_atoms(plan) for line in load_lines(plan, atom)]
    lines: list[str] = []
    names = []
    for i, start in enumerate(part_starts(plan)):
        terms = []
        for test in plan.listed_tests:
            assert isinstance(test.atom, ListMask)
            lines += window_lines(plan, test.atom, i)
            terms.append(f"(bits_{test.atom.slot}_{i} & ~outside({start}, {test.lo}, {test.hi}))")
        lines.append(f"word{i} = ({' | '.join(terms)}) & {allowed_text(plan, start)}")
        names.append(f"word{i}")
    lines.append(f"live = (({pick_word(names)} >> lane_shift) & lane_bit) != 0")
    return Test(tuple(loads), tuple(dict.fromkeys(lines)))


def test_any(plan: Plan, unvisited: list[str]) -> Test:
    """The test of the keys `column` [BLOCK_N], whatever they are and wherever they come from."""
    return _test_keys(plan, "any", unvisited)


def test_loose(plan: Plan, unvisited: list[str]) -> Test:
    """The test of keys `column` that only lists of columns may hold, as every tile that a table or
    a slash meets is `unvisited` no more."""
    return _test_keys(plan, "loose", unvisited)


def _test_keys(plan: Plan, loop: str, unvisited: list[str]) -> Test:
    _, lines = member_lines(plan, loop)
    fresh = " & ".join(("live", *unvisited, "(k >= 0)", "(k < kv_len)"))
    return Test((), ("k = column[None, :]", *lines, *live_lines(plan.tests), f"live = {fresh}"))


def test_columns(plan: Plan, unvisited: list[str]) -> Test:
    """The test of gathered columns."""
    loads, lines = member_lines(plan, "columns")
    fresh = (f"live = live & {' & '.join(unvisited)}",) if unvisited else ()
    tests = live_lines(tuple(t.text for t in plan.listed_tests))
    return Test(loads, ("k = column[None, :]", *lines, *tests, *fresh))


def live_lines(tests: tuple[str, ...]) -> tuple[str, ...]:
    """Lines that set `live`: one test after the other."""
    tests = tests or ("(k < 0)",)
    return (f"live = {tests[0]}", *(f"live = live | {test}" for test in tests[1:]))


def folds(plan: Plan) -> bool:
    """Whether the words alone can tell: every test is one slot within row bounds, and every slot
    has words."""
    return not plan.lists.tables and all(test.atom is not None for test in plan.listed_tests) and \
        all(has_words(plan, atom) for atom in list_atoms(plan))


def member_lines(plan: Plan, loop: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(loads, lines) that set in_<slot>, bool that broadcasts to [BLOCK_M, BLOCK_N].

    loop  "static", "listed" (aligned tiles), "slash" (any start), "columns" (gathered from the
          list of columns), "any" (any keys) or "loose" (keys of columns alone)
    """
    loads: list[str] = []
    lines: list[str] = []
    for atom in list_atoms(plan):
        if loop in ("columns", "any", "loose") or not has_words(plan, atom) or \
                (loop == "listed" and is_whole(plan, atom)):
            lines.append(f"in_{atom.slot} = {' | '.join(looked_up(plan, atom, loop))}")
            continue
        loads += load_lines(plan, atom)
        names = []
        for i, _ in enumerate(part_starts(plan)):
            lines += window_lines(plan, atom, i)
            names.append(f"bits_{atom.slot}_{i}")
        lines.append(f"in_{atom.slot} = (({pick_word(names)} >> lane_shift) & lane_bit) != 0")
    return tuple(loads), tuple(lines)


def part_starts(plan: Plan) -> list[str]:
    """The first keys of a tile's stretches of 32."""
    return [f"start + {shift}" if shift else "start" for shift in range(0, plan.block_n, 32)]


def pick_word(names: list[str]) -> str:
    """The word that holds the lane's bit."""
    text = names[-1]
    for i in range(len(names) - 2, -1, -1):
        text = f"tl.where(lane < {32 * (i + 1)}, {names[i]}, {text})"
    return text


def is_whole(plan: Plan, atom: ListMask) -> bool:
    """Whether a tile is listed only where all its pairs are in the table."""
    if not is_table(atom) or isinstance(atom, VerticalSlash) or len(plan.lists.tables) > 1:
        return False
    return has_scalar_row(plan, atom) and blocks_of(atom)[1] % plan.block_n == 0


def has_scalar_row(plan: Plan, atom: ListMask) -> bool:
    """Whether all rows of a query tile read one row of the table."""
    return blocks_of(atom)[0] % plan.block_m == 0


def has_words(plan: Plan, atom: ListMask) -> bool:
    """Whether the slot's bits are single keys that all rows of a tile read from the same words."""
    return not is_table(atom) or (blocks_of(atom)[1] == 1 and has_scalar_row(plan, atom))


def load_lines(plan: Plan, atom: ListMask) -> list[str]:
    """Lines that load the words of one slot for a tile of neighbouring keys."""
    name, slot = f"slot_{atom.slot}", atom.slot
    parts = len(part_starts(plan))
    lines = []
    if isinstance(atom, VerticalSlash) and not is_table(atom):
        lines += [f"low_{slot} = q_offset + q_len - (p_first - start) - BLOCK_M",
                  # keys far ahead of the query: behind the set lie empty words
                  f"first_{slot} = tl.minimum(low_{slot} >> 5, {name}_slash_words)",
                  *(f"diagonal_{slot}_{m} = tl.load({name}_slashes + first_{slot} + {m})"
                    for m in range(parts + row_words(plan)))]
    if is_table(atom):
        row = f"((q_tile * BLOCK_M) // {blocks_of(atom)[0]}).to(tl.int64)"
        lines += [f"table_{slot} = {name}_table + {row} * {name}_table_words",
                  *(f"listed_{slot}_{m} = tl.load(table_{slot} + (start >> 5) + {m})"
                    for m in range(parts + 1))]
    if isinstance(atom, (VerticalSlash, Columns)):
        lines += [f"column_{slot}_{m} = tl.load({name}_columns + (start >> 5) + {m})"
                  for m in range(parts + 1)]
    return lines


def row_words(plan: Plan) -> int:
    """How many words the first bits of a tile's rows may be apart, and one more for the shift."""
    return (plan.block_m + 30) // 32 + 1


def window_lines(plan: Plan, atom: ListMask, i: int) -> list[str]:
    """Lines that set bits_<slot>_<i>: words of the keys start + 32 i .. + 31, a row each or one."""
    slot, terms, lines = atom.slot, [], []
    if isinstance(atom, VerticalSlash) and not is_table(atom):
        lines.append(f"bit_{slot} = (low_{slot} & 31) + (BLOCK_M - 1 - "
                     "tl.arange(0, BLOCK_M)[:, None])")
        near, far = f"diagonal_{slot}_{i}", f"diagonal_{slot}_{i + 1}"
        for m in range(1, row_words(plan)):
            later = f"bit_{slot} >= {32 * m}"
            near = f"tl.where({later}, diagonal_{slot}_{i + m}, {near})"
            far = f"tl.where({later}, diagonal_{slot}_{i + m + 1}, {far})" \
                if m + 1 < row_words(plan) + 1 else far
        lines += [f"near_{slot} = {near}", f"far_{slot} = {far}"]
        terms.append(f"shift_words(near_{slot}, far_{slot}, bit_{slot} & 31)")
    if is_table(atom):
        terms.append(f"shift_words(listed_{slot}_{i}, listed_{slot}_{i + 1}, start & 31)")
    if isinstance(atom, (VerticalSlash, Columns)):
        terms.append(f"shift_words(column_{slot}_{i}, column_{slot}_{i + 1}, start & 31)")
    return [*lines, f"bits_{slot}_{i} = {' | '.join(terms)}"]


def looked_up(plan: Plan, atom: ListMask, loop: str) -> list[str]:
    """Membership that reads a word for every key (or pair) of its own."""
    name, terms = f"slot_{atom.slot}", []
    if loop == "listed" and is_whole(plan, atom):
        return ["(k < kv_len)"]
    if isinstance(atom, (VerticalSlash, Columns)):
        if loop == "columns" and len(plan.lists.columns) == 1:
            return ["(k < kv_len)"]  # these are the slot's own columns
        terms.append(f"has_bit({name}_columns, k, {name}_column_words)")
    if loop == "loose":
        return terms or ["(k < 0)"]
    if is_table(atom):
        q_block, kv_block = blocks_of(atom)
        row = f"(q_tile * BLOCK_M) // {q_block}" if has_scalar_row(plan, atom) else \
            f"tl.minimum((p - q_offset) // {q_block}, {name}_rows - 1)"
        keys = "start" if kv_block % plan.block_n == 0 and loop in ("static", "listed") else "k"
        terms.append(f"table_bit({name}_table, {row}, {keys}, {name}_table_words, {kv_block})")
    elif isinstance(atom, VerticalSlash):
        terms.append(f"has_bit({name}_slashes, q_offset + q_len - 1 - (p - k), "
                     f"{name}_slash_words)")
    return terms


def allowed_text(plan: Plan, start: str) -> str:
    """A word of the keys from `start` on that exist and that no static loop has visited."""
    words = [f"outside({start}, -{1 << 30}, 0)"]
    words += [f"outside({start}, {h.start} * BLOCK_N, {h.stop} * BLOCK_N)"
              for h in plan.lists.hulls]
    return " & ".join(words)
