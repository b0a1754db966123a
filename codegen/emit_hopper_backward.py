"""From plans to the sources of two Gluon files for Hopper: dK and dV by key tile, dQ by query tile.

One template serves both: the side that owns rows (keys, or queries) keeps 128 of them, the other
side passes by, 64 rows a step. The mask's own are the functions that tell which rows of the other
side an own tile meets (`find_tiles`, `grain_at`, `full_at`) and the mask of one tile.

A plan by query is one in grains of 32 keys, as in the forward kernel. A plan by key walks tiles of
positions: the 64 passing rows are `SPAN` positions of `64 // SPAN` query heads.
"""

from __future__ import annotations

from maskdsl.codegen.emit import count_text, read_template
from maskdsl.codegen.emit_hopper import (
    INTERVAL,
    Place,
    fill_template,
    in_gluon,
    place_text,
    wrap,
)
from maskdsl.codegen.emit_walk import indent
from maskdsl.codegen.plan import Plan
from maskdsl.codegen.row_bounds import KeyPlan, is_invertible, row_range
from maskdsl.text import write_integer
from maskdsl.trace import K

# compile-time constants that all functions of a file share
CONSTANTS = ("BY_KEY", "OWN_HEADS", "OWN_SPAN", "PASS_HEADS", "TILE", "GRAIN", "SLOTS")
LETTER = ("item", "batch", "head", "tile", "part", "loose", "masked", "full", "first", "last",
          "border")
LETTER_SIZE = 32
OWN_ROWS = {
    False: ("p_first = q_offset + tile * OWN_SPAN",
            "p_last = q_offset + gl.minimum(tile * OWN_SPAN + OWN_SPAN, q_len) - 1"),
    True: ("k_first = tile * OWN_SPAN",
           "k_last = gl.minimum(tile * OWN_SPAN + OWN_SPAN, kv_len) - 1"),
}
PLANNER = """\
        (hand_out, (mail_full, mail_empty, mail, queue, items, tiles, batch_groups, groups,
                    section, split_first, split_count, splits, members, q_len, kv_len, q_offset,
                    total_len,
                    <CONSTANT_NAMES>)),
"""
LOADER = """\
        (produce, (a_desc, b_desc, c_desc, d_desc, c_grain_desc, d_grain_desc, lse_ptr, delta_ptr,
                   a_s, b_s, c_s, d_s, own_full, own_empty, c_full, d_full, empty, mail_full,
                   mail_empty, mail, marks, lse_s, delta_s, items, share, members, heads, q_len,
                   q_offset, scale_log2,
                   <CONSTANT_NAMES>)),
"""


def emit_query_side(plan: Plan) -> str:
    """The file that computes dQ; `plan` is in grains of 32 keys."""
    order = "light - 1 - place" if plan.last_first else "place"
    return _emit(plan, plan.bounds, places_by_query(plan), ("p_first", "p_last"), order,
                 words_by_query(plan))


def emit_key_side(by_key: KeyPlan, last_first: bool) -> str:
    """The file that computes dK and dV; `by_key` walks tiles of positions.

    last_first  whether the last keys are seen most
    """
    order = "light - 1 - place" if last_first else "place"
    return _emit(by_key.plan, by_key.bounds, places_by_key(by_key), ("k_first", "k_last"), order,
                 words_by_key(by_key.plan))


def places_by_query(plan: Plan) -> tuple[Place, Place]:
    """Where the loose grains and the FULL tiles of an own tile of queries lie."""
    return place_text("loose", plan.masked), place_text("full", plan.full)


def places_by_key(by_key: KeyPlan) -> tuple[Place, Place]:
    """Where the MASKED and the FULL tiles of an own tile of keys lie."""
    return place_text("loose", by_key.masked), place_text("full", by_key.full)


def fits_letter(places: tuple[Place, Place]) -> bool:
    """Whether what an item must know of the mask fits a letter."""
    return len(LETTER) + len(state_names(places)) <= LETTER_SIZE


def state_names(places: tuple[Place, Place]) -> list[str]:
    """The mask's own numbers of an item."""
    return [*places[0].names, *places[1].names] or ["nothing"]


def _emit(plan: Plan, bounds: tuple[str, ...], places: tuple[Place, Place],
          ends: tuple[str, str], order: str, words: tuple[str, ...]) -> str:
    """Fill the template.

    ends   names of an own tile's first and last row
    words  text of the mask of 32 places; () where pairs are tested one by one
    """
    by_key = ends[0] == "k_first"
    # every kernel has four first warps, which meet at a barrier before each copy: they load where
    # a step takes two copies, and plan where it takes up to eight
    first, last = (LOADER, PLANNER) if by_key else (PLANNER, LOADER)
    which = "last" if order.startswith("light") else "first"
    return fill_template(read_template("hopper_backward"), {
        "        # <FIRST_WARPS>\n": first, "        # <LAST_WARP>\n": last,
        "<HEADER>\n": header_text(plan, "dK and dV, by key tile" if by_key else
                                  "dQ, by query tile"),
        "    # <TILE_ORDER>\n": indent((f"# the {which} tiles meet most rows: they start first",
                                       f"tile = {order}")),
        **mask_pieces(plan, bounds, places, ends, words),
        **letter_pieces(list(LETTER), state_names(places)),
        "<CONSTANTS>": wrap([f"{name}: gl.constexpr" for name in CONSTANTS], 3, 12),
        "<CONSTANT_NAMES>": wrap(list(CONSTANTS), 6, 20),
    })


def mask_pieces(plan: Plan, bounds: tuple[str, ...], places: tuple[Place, Place],
                ends: tuple[str, str], words: tuple[str, ...]) -> dict[str, str]:
    """What the mask decides: which tiles an own tile meets and the mask of one; as `_emit`."""
    loose, full = places
    names = state_names(places)
    counts = [f"{place.name}_count{len(place.lines)}" if place.lines else "gl.to_tensor(0)"
              for place in places]
    by_key = ends[0] == "k_first"
    lines = (*(line.replace("BLOCK_M" if by_key else "BLOCK_N", "GRAIN") for line in bounds),
             *loose.lines, *full.lines,
             *(("nothing = gl.to_tensor(0)",) if names == ["nothing"] else ()),
             f"return {', '.join(counts)}, ({', '.join(names)},)")
    return {
        "# <MASK_TILE>\n": mask_text(plan, words, by_key),
        "    # <BOUNDS>\n": indent(in_gluon(lines)),
        "    # <GRAIN_AT>\n": indent(in_gluon((f"return {loose.text}",))),
        "    # <FULL_AT>\n": indent(in_gluon((f"return {full.text}",))),
        "    # <OWN_ROWS>\n": indent(OWN_ROWS[by_key]),
        "<FIRST>": ends[0], "<LAST>": ends[1],
        "<OWN>": "k" if by_key else "p", "<OTHER>": "p" if by_key else "k",
    }


def letter_pieces(letter: list[str], names: list[str]) -> dict[str, str]:
    """How a letter is written and read: its numbers, then the mask's own."""
    count = len(letter) + len(names)
    return {
        "    # <WRITE>\n": indent(tuple(f"text = gl.where(place == {i}, {name}, text)"
                                        for i, name in enumerate([*letter, *names]))),
        "    # <READ>\n": indent((f"return ({words_of(0, len(letter))},",
                                 f"        ({words_of(len(letter), count)},))")),
        "    # <STATE>\n": indent((f"{', '.join(names)}, = state",)),
    }


def words_of(first: int, last: int) -> str:
    """The numbers first, first + 1, ... of a letter."""
    return wrap([f"word_of(letter, {i})" for i in range(first, last)], 4, 12)


def header_text(plan: Plan, what: str) -> str:
    """What the file is, for a reader who finds it in the cache; what: it computes."""
    return (f"mask         {plan.mask!r}\n"
            f"computes     {what}\n"
            f"by query     {count_text(plan.full)} FULL, {count_text(plan.masked)} masked\n")


def mask_text(plan: Plan, words: tuple[str, ...], by_key: bool) -> str:
    """The functions that mask a tile: by words of bits where what an own row meets is a union of
    intervals, else pair by pair."""
    if not words:
        return read_template("hopper_backward_mask").replace(
            "    # <LIVE>\n", indent(in_gluon((*plan.rows, f"return {plan.live}"))))
    own = "k" if by_key else "p"
    lines = (*in_gluon(words[:-1]), f"start = start + {own} * 0", words[-1])
    return read_template("hopper_backward_words").replace("    # <WORDS>\n", indent(lines))


def words_by_query(plan: Plan) -> tuple[str, ...]:
    """Text of the word of 32 keys for rows p; () where the mask of a row is no union of
    intervals."""
    found = [INTERVAL.fullmatch(test) for test in plan.tests]
    if not all(found) or not found:
        return ()
    words = [word_of_interval(*match.groups()) for match in found if match]
    return (*plan.rows, f"return {' | '.join(words)}")


def words_by_key(plan: Plan) -> tuple[str, ...]:
    """Text of the word of 32 positions for keys k: the bounds of the pieces turned round, exactly;
    () where one of them cannot be.

    [p - 511, p + 1)  -->  positions [k, k + 512)
    """
    lines: list[str] = []
    words: list[str] = []
    for i, piece in enumerate(plan.pieces):
        if not (piece.is_exact and all(map(is_invertible, piece.lo + piece.hi))):
            return ()
        low, high, tests = row_range(piece, K + 1, K + 1)
        lines.append(f"sees_lo{i} = {write_integer(low)}")
        text = write_integer(high)
        if tests:
            text = f"tl.where({' & '.join(tests)}, {text}, sees_lo{i})"
        lines.append(f"sees_hi{i} = {text}")
        words.append(word_of_interval(f"sees_lo{i}", f"sees_hi{i}"))
    if not words:
        return ()
    return ("q_end = q_offset + q_len", *lines, f"return {' | '.join(words)}")


def word_of_interval(low: str | None, high: str) -> str:
    """Bits of the places in [low, high), from `start` on."""
    word = f"below({high} - start)"
    return f"({word} & ~below({low} - start))" if low else word
