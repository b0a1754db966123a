"""Several kinds of heads (`PerHead`) in one Hopper launch: what their file has in place of the
parts that one mask decides.

An item is of one kind. The planning warp finds the kind with the item, works out that kind's bounds
and puts the kind's number first among the mask's own numbers of the letter, so that wherever these
are read, the kind is known. The kinds share the names of the numbers: own0, own1, ...
"""

from __future__ import annotations

import re

from maskdsl.codegen.emit import read_template
from maskdsl.codegen.emit_hopper import (
    Place,
    in_gluon,
    interval_words,
    mask_text,
    places_of,
    state_names,
    tile_bounds,
)
from maskdsl.codegen.emit_walk import indent
from maskdsl.codegen.plan import Plan

LENGTHS = "q_len, kv_len, q_offset, total_len, batch, head"


def own_names(plans: tuple[Plan, ...]) -> list[str]:
    """The mask's own numbers of an item, of whichever kind it is."""
    return ["kind", *(f"own{i}" for i in range(max(len(state_names(plan)) for plan in plans)))]


def kind_bounds(plans: tuple[Plan, ...]) -> tuple[str, ...]:
    """The body of `find_tiles`: a call of the kind's own function, alone in its branch."""
    names = own_names(plans)[1:]
    lines = ["loose = gl.to_tensor(0); full = gl.to_tensor(0)",
             *(f"{name} = gl.to_tensor(0)" for name in names)]
    for i, plan in enumerate(plans):
        found = names[:len(state_names(plan))]
        lines += [f"if kind == {i}:", f"    loose, full, {', '.join(found)} = find_tiles_{i}("
                  f"p_first, p_last, {LENGTHS}, BLOCK_N)"]
    return (*lines, f"return loose, full, ({', '.join(own_names(plans))},)")


def kind_place(plans: tuple[Plan, ...], which: int) -> tuple[str, ...]:
    """The body of `grain_at` (which 0) or `full_at` (1)."""
    text = ""
    for i, plan in reversed(list(enumerate(plans))):
        place: Place = places_of(plan)[which]
        own = dict(zip(state_names(plan), own_names(plans)[1:], strict=False))
        found = place.text
        for name, shared in own.items():  # own0, own1, ... are no names of a plan's
            found = re.sub(rf"\b{name}\b", shared, found)
        text = f"gl.where(kind == {i}, {found}, {text})" if text else found
    return in_gluon((f"return {text}",))


def kind_order(plans: tuple[Plan, ...], groups: tuple[int, ...]) -> tuple[str, ...]:
    """What an item is: kinds one after the other, the costliest first; in each the heaviest query
    tiles first, all its heads side by side.

    groups  groups of packed heads of each kind, in one batch entry
    """
    lines = ["# kinds of heads one after the other, the costliest first; heavy query tiles first",
             f"entries = batch_groups // {sum(groups)}", "place = item",
             f"before = 0; kind_groups = {groups[0]}; last_first = {int(plans[0].last_first)}"]
    done = groups[0]
    for i, count in enumerate(groups[1:], start=1):
        lines += [f"later = item >= q_tiles * entries * {done}",
                  f"kind = gl.where(later, {i}, kind)",
                  f"place = gl.where(later, item - q_tiles * entries * {done}, place)",
                  f"before = gl.where(later, {done}, before)",
                  f"kind_groups = gl.where(later, {count}, kind_groups)",
                  f"last_first = gl.where(later, {int(plans[i].last_first)}, last_first)"]
        done += count
    return (*lines, "batch = place // kind_groups % entries",
            "q_tile = place // (kind_groups * entries)",
            "q_tile = gl.where(last_first != 0, q_tiles - 1 - q_tile, q_tile)",
            "head = gl.load(own_table + before + place % kind_groups)")


def kind_functions(plans: tuple[Plan, ...]) -> str:
    """The bounds of every kind, and the functions that mask a tile."""
    text = ""
    for i, plan in enumerate(plans):
        text += (f"@gluon.jit\ndef find_tiles_{i}(p_first, p_last, {LENGTHS},\n"
                 f"                 BLOCK_N: gl.constexpr):\n"
                 f'    """find_tiles of {plan.mask!r}"""\n'
                 f"{indent(in_gluon(tile_bounds(plan, flat=True)))}\n\n")
    return text + kind_masks(plans)


def kind_masks(plans: tuple[Plan, ...]) -> str:
    """The functions that mask a tile. Where all kinds are unions of intervals, a kind makes its own
    words of bits; else it has a whole function of its own, since bits of single pairs that several
    branches hand on would take a register each."""
    words = [interval_words(plan) for plan in plans]
    if any(lines is None for lines in words):
        return whole_masks(plans)
    own, choose = "", ["word = p * 0"]
    for i, (plan, lines) in enumerate(zip(plans, words, strict=True)):
        own += (f"@gluon.jit\ndef live_words_{i}(p, start, {LENGTHS}):\n"
                f'    """live_words of {plan.mask!r}"""\n{indent(lines or ())}\n\n')
        choose += [f"if state[0] == {i}:", f"    word = live_words_{i}(p, start, {LENGTHS})"]
    return own + read_template("hopper_words").replace(
        "    # <WORDS>\n", indent((*choose, "return word")))


def whole_masks(plans: tuple[Plan, ...]) -> str:
    """mask_tile_0, mask_tile_1, ... and the choice among them."""
    text = "".join(re.sub(r"\b(mask_tile|live_words|live_pairs|below)\b", rf"\1_{i}",
                          mask_text(plan)) for i, plan in enumerate(plans))
    given = f"row, first, count, state, q_tile, {LENGTHS}"
    choose = [line for i in range(len(plans)) for line in (
        f"if state[0] == {i}:", f"    s = mask_tile_{i}(s, {given}, SPAN, GRAIN)")]
    return (f"{text}@gluon.jit\ndef mask_tile(s, {given},\n"
            "              SPAN: gl.constexpr, GRAIN: gl.constexpr):\n"
            f'    """Scores of a tile of loose grains, masked as the kind of head is."""\n'
            f"{indent((*choose, 'return s'))}\n\n")
