"""From a plan in grains to the source of one Gluon file for Hopper.

The template is the same for every mask; four short functions in it are the mask's own: which keys
an item sees (`find_tiles`), where its loose grains and FULL tiles lie (`grain_at`, `full_at`), and
the mask of one tile (`live_pairs`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from maskdsl.codegen.emit import count_text, read_template
from maskdsl.codegen.emit_walk import indent
from maskdsl.codegen.listing import Segment
from maskdsl.codegen.plan import Plan

# compile-time constants that all functions of the file share
CONSTANTS = ("HEADS_PACKED", "SPAN", "NARROW", "BLOCK_N", "GRAIN", "K_SLOTS", "V_SLOTS", "K_PARTS",
             "V_PARTS", "Q_LETTERS", "WITH_LSE")

# what a letter holds of every item; the mask's own numbers follow
LETTER = ("item", "batch", "head", "q_tile", "part", "narrow", "rest", "loose", "masked_steps",
          "first", "last")
LETTER_SIZE = 32

# marks of the template that are empty for masks without a table of their own, and without lists;
# a mark that ends another comes after it
NO_TABLE = ("    # <KINDS>\n", "        # <OWN>\n", "    # <OWN>\n")
NO_LISTS = ("        # <JOIN_STATE>\n", "            # <LOAD_SIDES>\n", "        # <SIDES>\n",
            "        # <AFTER_SIDES>\n", "    # <LISTED_FULL>\n", "<MORE>")

BY_SUM = """
Scores of a row are shifted by the maximum of its first tile. In bfloat16 later steps keep that
shift: any is exact unless sums leave the range of float32. An item whose sums do is flagged when it
ends, and a second launch (mode GIVEN_UP) computes flagged items with the maximum of every step.
"""

FIRST_TILE = ("return mask_tile(s, row, 0, narrow, state, q_tile, q_len, kv_len, q_offset, "
              "total_len<MORE>, batch,", "                 head, SPAN, GRAIN)")
FIRST_GRAINS = (  # two grains are mostly borders both
    "if s.shape[1] == 4 * GRAIN:",
    "    return mask_grains(s, row, 0, narrow, state, q_tile, q_len, kv_len, q_offset, total_len,",
    "                       batch, head, SPAN, GRAIN)",
    "else:",
    "    return mask_tile(s, row, 0, narrow, state, q_tile, q_len, kv_len, q_offset, total_len,",
    "                     batch, head, SPAN, GRAIN)")


def emit_hopper(*plans: Plan, groups: tuple[int, ...] = (), computing: int = 2) -> str:
    """The kernel file of a plan whose tiles are grains, or of one for each kind of head, costliest
    first; equal plans give equal text.

    groups     of several kinds: groups of packed heads of each, in one batch entry
    computing  warp groups: two, or three
    """
    from maskdsl.codegen import emit_hopper_kinds as kinds
    from maskdsl.codegen.emit_hopper_sieve import ADD, list_names, sieve_pieces

    plan, several, sieve = plans[0], len(plans) > 1, plans[0].sieve is not None
    assert not (several and any(one.sieve for one in plans))
    loose, full = places_of(plan)
    names = kinds.own_names(plans) if several else state_names(plan)
    own = list_names(plan) if sieve else names
    letter = [*LETTER, *own]
    pieces = common_pieces(*plans, computing=computing, quick=True) | {
        "# <MASK_TILE>\n": kinds.kind_functions(plans) if several else
                           (ADD if sieve else "") + mask_text(plan),
        "    # <WRITE>\n": indent(tuple(f"text = gl.where(place == {i}, {name}, text)"
                                        for i, name in enumerate(letter))),
        "    # <READ>\n": indent((f"return ({words(0, len(LETTER))},",
                                 f"        ({words(len(LETTER), len(letter))},))")),
        "<LETTER_SIZE>": str(LETTER_SIZE),
    }
    if several:
        pieces |= {"    # <BOUNDS>\n": indent(kinds.kind_bounds(plans)),
                   "    # <GRAIN_AT>\n": indent(kinds.kind_place(plans, 0)),
                   "    # <FULL_AT>\n": indent(kinds.kind_place(plans, 1)),
                   "    # <KINDS>\n": indent(kinds.kind_order(plans, groups))}
    elif sieve:
        pieces |= sieve_pieces(plan)
    else:
        pieces |= {"    # <BOUNDS>\n": indent(in_gluon(tile_bounds(plan))),
                   "    # <GRAIN_AT>\n": indent(in_gluon((f"return {loose.text}",))),
                   "    # <FULL_AT>\n": indent(in_gluon((f"return {full.text}",)))}
    # the marks not filled by now, and what lists alone have
    pieces |= {"    # <STATE>\n": indent((f"{', '.join(own)}, = state",))}
    pieces |= dict.fromkeys([mark for mark in (*NO_TABLE, *NO_LISTS) if mark not in pieces], "")
    return fill_template(kernel_template(computing), pieces)


def kernel_template(computing: int = 2) -> str:
    """The template with its warp groups, so many of which compute.

    The first one must have four warps. Two computing groups leave room for four loading warps,
    three for one; the planning warp stands last.
    """
    produce, consume, hand_out = re.findall(r"^        \(\w+, \(.*?\)\),\n",
                                            read_template("hopper_partitions"),
                                            re.DOTALL | re.MULTILINE)
    groups = [consume.replace("<GROUP>", str(i)) for i in range(computing)]
    if computing == 2:
        order, warps = [produce, *groups], "[4, 4, 1], [REGISTERS, REGISTERS, 24]"
    else:
        order, warps = [*groups, produce], "[4, 4, 1, 1], [REGISTERS, REGISTERS, 24, 24]"
    return fill_template(read_template("hopper"), {
        "        # <PARTITIONS>\n": "".join((*order, hand_out)), "<WARPS>": warps})


def common_pieces(*plans: Plan, computing: int = 2, quick: bool = False) -> dict[str, str]:
    """What static masks and those with call-time data fill in alike."""
    apart = tells_apart(plans[0])
    order, which = ("light - 1 - place", "last") if plans[0].last_first else ("place", "first")
    return {
        "    # <MASK_FIRST>\n": indent(FIRST_GRAINS if apart else FIRST_TILE),
        "<MASK_STEP>": "mask_grains" if apart else "mask_tile",
        "<HEADER>\n": "".join(header_text(plan, 64 * computing) for plan in plans),
        "<SUMS>": BY_SUM if quick else "",
        "<QUICK>": str(quick),
        "<COMPUTING>": str(computing),
        "<ROWS>": str(64 * computing),
        "<SLOT_THREADS>": str(128 * computing + (128 if computing == 2 else 32)),
        "    # <TILE_ORDER>\n": indent((
            f"# the {which} query tiles see most keys: they start first", f"q_tile = {order}")),
        "<CONSTANTS>": wrap([f"{name}: gl.constexpr" for name in CONSTANTS], 3, 12),
        "<CONSTANT_NAMES>": wrap(list(CONSTANTS), 6, 20),
    }


def fill_template(template: str, pieces: dict[str, str]) -> str:
    """The template with its marks replaced, in order."""
    for mark, text in pieces.items():
        template = template.replace(mark, text)
    return template


def tile_bounds(plan: Plan, flat: bool = False) -> tuple[str, ...]:
    """The body of `find_tiles`; flat: the mask's own numbers are no tuple of their own, and all are
    tensors, as branches that join must agree in type."""
    loose, full = places_of(plan)
    names = state_names(plan)
    counts = [f"{place.name}_count{len(place.lines)}" if place.lines else "gl.to_tensor(0)"
              for place in (loose, full)]
    none = ("nothing = gl.to_tensor(0)",) if names == ["nothing"] else ()
    result = f"{', '.join(counts)}, ({', '.join(names)},)"
    if flat:
        result = ", ".join(f"gl.to_tensor({name})" for name in (*counts, *names))
    return (*plan.bounds, *loose.lines, *full.lines, *none, f"return {result}")


def words(first: int, last: int) -> str:
    """The numbers first, first + 1, ... of a letter."""
    return wrap([f"word_of(letter, {i})" for i in range(first, last)], 4, 12)


def wrap(parts: list[str], a_line: int, depth: int) -> str:
    """Parts with commas, so many a line."""
    lines = [", ".join(parts[i:i + a_line]) for i in range(0, len(parts), a_line)]
    return f",\n{' ' * depth}".join(lines)


def fits_letter(plan: Plan) -> bool:
    """Whether what an item must know of the mask, and its kind, fits a letter."""
    return len(LETTER) + 1 + len(state_names(plan)) <= LETTER_SIZE


def places_of(plan: Plan) -> tuple[Place, Place]:
    """Where the loose grains and the FULL tiles of an item lie."""
    # the last border first: the causal border and a sink, both narrow, share the first tile then
    stop = len(plan.masked) if plan.borders is None else plan.borders
    borders, over = plan.masked[:stop], plan.masked[stop:]
    return (place_text("loose", borders[-1:] + borders[:-1] + over),
            place_text("full", plan.full))


def tells_apart(plan: Plan) -> bool:
    """Whether masked steps of this plan leave out the mask of grains that need none."""
    return (plan.borders is not None and plan.borders < len(plan.masked)
            and interval_words(plan) is not None and fits_letter(plan))


def state_names(plan: Plan) -> list[str]:
    """The mask's own numbers of an item."""
    loose, full = places_of(plan)
    return [*loose.names, *full.names] or ["nothing"]


def header_text(plan: Plan, rows: int) -> str:
    """What the file is, for a reader who finds it in the cache."""
    return (f"mask         {plan.mask!r}\n"
            f"item         {rows} rows of {plan.block_m} positions, grains of {plan.block_n} keys\n"
            f"FULL tiles   {count_text(plan.full)}, no mask\n"
            f"loose        {count_text(plan.masked)}"
            f"{', dead grains left out by interval arithmetic' if plan.sieve else ''}\n")


def in_gluon(lines: tuple[str, ...]) -> tuple[str, ...]:
    """Text of a plan, in Gluon's names."""
    return tuple(line.replace("tl.", "gl.") for line in lines)


@dataclass(frozen=True, slots=True)
class Place:
    """Several segments as one range: lines that set counts and shifts, the names `text` needs, and
    the text of the grain at virtual index i."""

    name: str
    lines: tuple[str, ...]
    names: tuple[str, ...]
    text: str


def place_text(name: str, segments: tuple[Segment, ...]) -> Place:
    """[a, b) + [c, d)  -->  count1 = b - a, shift1 = c - count1, count2 = count1 + d - c;
    i + where(i < count1, a, shift1)
    """
    lines: list[str] = []
    names: list[str] = []
    shifts: list[str] = []
    done = ""
    for n, segment in enumerate(segments):
        shift = segment.start
        if done:
            shift = f"{name}_shift{n}"
        shifts.append(shift)
        if not shift.isdigit():
            names.append(shift)
        start, total = segment.start, f"{name}_count{n + 1}"
        width = segment.stop if start == "0" else f"{segment.stop} - {start}"
        lines.append(f"{total} = {done} + {width}; {shift} = {start} - {done}" if done else
                     f"{total} = {width}")
        done = total
    text = shifts[-1] if shifts else "0"
    for n in range(len(shifts) - 2, -1, -1):
        text = f"tl.where(i < {name}_count{n + 1}, {shifts[n]}, {text})"
        names.append(f"{name}_count{n + 1}")
    return Place(name, tuple(lines), tuple(names), f"i + {text}" if text != "0" else "i")


INTERVAL = re.compile(r"\((?:\(k >= (\w+)\) & )?\(?k < (\w+)\)?\)")


def mask_text(plan: Plan) -> str:
    """The functions that mask a tile: by words of bits where the mask of a row is a union of
    intervals, else pair by pair."""
    lines = interval_words(plan)
    if lines is None:
        return read_template("hopper_mask").replace(
            "    # <LIVE>\n", indent(in_gluon((*plan.rows, f"return {plan.live}"))))
    text = read_template("hopper_words").replace("    # <WORDS>\n", indent(lines))
    if tells_apart(plan):
        borders = f"loose_count{plan.borders}" if plan.borders else "0"
        text += read_template("hopper_grains").replace("<BORDERS>", borders)
    return text


def interval_words(plan: Plan) -> tuple[str, ...] | None:
    """The body of `live_words`; None where the mask of a row is no union of intervals."""
    words = []
    for test in plan.tests:
        found = INTERVAL.fullmatch(test)
        if found is None:
            return None
        low, high = found.groups()
        word = f"below({high} - start)"
        words.append(f"({word} & ~below({low} - start))" if low else word)
    return (*in_gluon(plan.rows), "start = start + p * 0",
            f"return {' | '.join(words) or 'start * 0'}")
