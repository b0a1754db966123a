"""From a plan by key to the source of a Gluon file for Hopper: dQ, dK and dV in one pass.

The mask's own text is that of the key side of the two kernels (`emit_hopper_backward`).
"""

from __future__ import annotations

from maskdsl.codegen.emit import read_template
from maskdsl.codegen.emit_hopper import fill_template, wrap
from maskdsl.codegen.emit_hopper_backward import (
    LETTER_SIZE,
    header_text,
    letter_pieces,
    mask_pieces,
    places_by_key,
    state_names,
    words_by_key,
)
from maskdsl.codegen.row_bounds import KeyPlan

# compile-time constants that all functions of a file share
CONSTANTS = ("BY_KEY", "OWN_SPAN", "TILE", "GRAIN", "SLOTS")
LETTER = ("kind", "batch", "head", "tile", "unit", "first_row", "rows", "masked", "full", "steps",
          "border")
CONSUMER = """\
        (consume, (dq_desc, dk_desc, dv_desc, q_sum_ptr, kv_sum_ptr, counters, k_s, v_s, q_s,
                   do_s, slopes_s, own_full, own_empty, q_full, do_full, mail_full, mail_empty,
                   mail, marks, lse_s, delta_s, head_groups, tiles, segments, span, ring, share,
                   kv_len, q_offset, total_len, scale_log2, scale,
                   <CONSTANT_NAMES>, {group})),
"""


def emit_one_pass(by_key: KeyPlan) -> str:
    """The file; `by_key` walks tiles of 64 positions of one head."""
    places = places_by_key(by_key)
    return fill_template(read_template("hopper_onepass"), {
        "        # <CONSUMERS>\n": CONSUMER.format(group=0) + CONSUMER.format(group=1),
        "<HEADER>\n": header_text(by_key.plan, "dQ, dK and dV"),
        **mask_pieces(by_key.plan, by_key.bounds, places, ("k_first", "k_last"),
                      words_by_key(by_key.plan)),
        **letter_pieces(list(LETTER), state_names(places)),
        "<LETTER>": wrap(list(LETTER), 6, 10),
        "<CONSTANTS>": wrap([f"{name}: gl.constexpr" for name in CONSTANTS], 3, 12),
        "<CONSTANT_NAMES>": wrap(list(CONSTANTS), 6, 20),
    })


def fits_letter(by_key: KeyPlan) -> bool:
    """Whether what an item must know of the mask fits a letter."""
    return len(LETTER) + len(state_names(places_by_key(by_key))) <= LETTER_SIZE
