"""From a plan to the source of one Triton file.

The file stands alone: helpers, then `forward`. Only three stretches of it depend on the mask: the
bounds of the two loops, the mask of a tile, and (where one pays) the dead-tile test.
"""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.resources import files
from typing import Any

from maskdsl.codegen.emit_lists import (
    TILE_SETUP,
    atom_setup,
    cores_text,
    names_text,
    parameters_text,
    setup_lines,
    table_lines,
)
from maskdsl.codegen.emit_scores import HELPERS, score_parameters, sink_lines
from maskdsl.codegen.emit_walk import FORWARD, INDENT, indent, walk_text
from maskdsl.codegen.listing import Lists, Parameter, Segment
from maskdsl.codegen.lists import parameters
from maskdsl.codegen.plan import Plan


def emit_source(plan: Plan) -> str:
    """The kernel file of a plan; equal plans give equal text."""
    return emit_kernels((plan,), ())


def emit_kernels(plans: tuple[Plan, ...], heads: tuple[int, ...]) -> str:
    """The kernel file of one plan, or of several that share the heads among them.

    heads  how many heads walk each plan, costliest plan first; () for one plan
    """
    template = read_template("forward")
    lists = merge_lists(plans)
    # all heads read one list of columns, so each must tell its own among them
    plans = tuple(replace(plan, lists=replace(plan.lists, columns=lists.columns))
                  if plan.lists.columns else plan for plan in plans)
    scores = plans[0].scores
    found = [*parameters(lists), *score_parameters(scores)]
    if heads:
        found.append(Parameter("head_order", True))
    names = names_text(found)
    pieces = {
        "<HEADER>\n": header_text(plans),
        "# <SLOT_HELPERS>\n": read_template("slots") if lists.atoms else "",
        "# <SCORE_HELPERS>\n": HELPERS if scores else "",
        f"{INDENT}# <SINKS>\n": indent(sink_lines(scores)),
        "<MORE_NAMES>": names,
        "<MORE_PARAMETERS>": parameters_text(found, 12),
        f"{INDENT}# <TILE_ORDER>\n": tile_order_text(plans, heads),
        f"{INDENT}# <SLOTS>\n": indent(tuple(setup_lines(lists))),
        f"{INDENT}# <WALK>\n": walk_text(plans, heads, FORWARD),
    }
    for mark, text in pieces.items():
        template = template.replace(mark, text)
    return template


def emit_lister(plan: Plan) -> str:
    """The kernel file that lists the live key tiles of a plan with tables."""
    found = [p for p in parameters(plan.lists)
             if p.name.startswith("slot_") or p.name.startswith("union_tile_")]
    atoms = [line for atom in plan.lists.atoms for line in atom_setup(atom)]
    pieces = {
        "<HEADER>\n": f"mask  {plan.mask!r}\n"
                      f"tile  {plan.block_m} queries x {plan.block_n} keys\n\n",
        "<SLOT_HELPERS>\n": read_template("slots"),
        "<MORE_NAMES>": names_text(found),
        "<MORE_PARAMETERS>": parameters_text(found, 15),
        f"{INDENT}# <SLOTS>\n": indent((*atoms, *TILE_SETUP)),
        f"{INDENT}# <BOUNDS>\n": indent(plan.bounds),
        "<REACH_LO>": plan.lists.reach[0], "<REACH_HI>": plan.lists.reach[1],
        f"{INDENT * 2}# <LOOK_UP>\n": indent(tuple(table_lines(plan)), 2),
        "<CORES>": cores_text(plan),
    }
    template = read_template("lists")
    for mark, text in pieces.items():
        template = template.replace(mark, text)
    return template


def read_template(name: str) -> str:
    """A part of a kernel that no mask changes, with the parts it names put in its place."""
    text = files("maskdsl.codegen").joinpath(f"{name}.py.txt").read_text()
    return re.sub(r"^# <PART (\w+)>$", lambda part: read_template(part[1]).rstrip(), text,
                  flags=re.MULTILINE)


def merge_lists(plans: tuple[Plan, ...]) -> Lists:
    """What all the plans together ask of the call's data."""
    def union(name: str) -> tuple[Any, ...]:
        found = {atom for plan in plans for atom in getattr(plan.lists, name)}
        return tuple(sorted(found, key=lambda atom: atom.key))

    return Lists(union("atoms"), union("tables"), union("slashes"), union("columns"))


def header_text(plans: tuple[Plan, ...]) -> str:
    """What the file is, for a reader who finds it in the cache."""
    text = ""
    for plan in plans:
        lists = plan.lists
        more = [name for name, made in (("tiles listed for these rows", lists.tables),
                                        ("tiles at listed distances", lists.slashes)) if made]
        text += (f"mask         {plan.mask!r}\n"
                 f"tile         {plan.block_m} queries x {plan.block_n} keys\n"
                 f"FULL loop    {count_text(plan.full)}{', listed tiles' if lists.cores else ''}, "
                 "no mask\n"
                 f"MASKED loop  {', '.join([count_text(plan.masked), *more])}"
                 f"{', dead tiles skipped by interval arithmetic' if plan.sieve else ''}\n"
                 f"{scores_text(plan)}"
                 f"{'COLUMN loop  loose columns, gathered' + chr(10) if lists.columns else ''}\n")
    return text


def scores_text(plan: Plan) -> str:
    """What is done to the scores."""
    return f"scores       {list(plan.scores)!r}; `scale` holds no log2(e)\n" if plan.scores else ""


def count_text(segments: tuple[Segment, ...]) -> str:
    """How many stretches a loop walks."""
    return f"{len(segments)} segment{'' if len(segments) == 1 else 's'}"


def tile_order_text(plans: tuple[Plan, ...], heads: tuple[int, ...]) -> str:
    """The heaviest query tiles start first, so that none of them is left for the end."""
    last_first = plans[0].last_first
    if heads:
        return class_order_text(plans, heads)
    if plans[0].lists.listed:
        return indent(LISTED_ORDER)
    which = "last" if last_first else "first"
    tile = "tl.cdiv(q_len, BLOCK_M) - 1 - program // batch_heads" if last_first else \
        "program // batch_heads"
    return indent((f"# the {which} query tiles see most keys: they start first", f"q_tile = {tile}",
                   "batch = program % batch_heads // heads", "head = program % heads"))


LISTED_ORDER = (
    "# one key/value head after the other, so that its keys stay in the L2 cache while all query",
    "# tiles pick from them; heavy query tiles first",
    "tiles = tl.cdiv(q_len, BLOCK_M)",
    "q_tile = tiles - 1 - program // group % tiles",
    "head = program // group // tiles % (heads // group) * group + program % group",
    "batch = program // group // tiles // (heads // group)",
)


def class_order_text(plans: tuple[Plan, ...], heads: tuple[int, ...]) -> str:
    """Kinds of heads one after the other, the costliest kind first, so that its items do not start
    when the others are done; within a kind the heaviest query tiles first."""
    lines = ["# heads by kind of mask, the costliest kind first; heavy query tiles first in each",
             "tiles = tl.cdiv(q_len, BLOCK_M)",
             "kind, item, before, kind_heads, last_first = 0, program, 0, "
             f"{heads[0]}, {plans[0].last_first}"]
    done = heads[0]
    for i, count in enumerate(heads[1:], start=1):
        first = f"tiles * (batch_heads // heads) * {done}"
        lines += [f"later = program >= {first}", f"kind = tl.where(later, {i}, kind)",
                  f"item = tl.where(later, program - {first}, item)",
                  f"before = tl.where(later, {done}, before)",
                  f"kind_heads = tl.where(later, {count}, kind_heads)",
                  f"last_first = tl.where(later, {plans[i].last_first}, last_first)"]
        done += count
    lines += ["batch = item // kind_heads % (batch_heads // heads)",
              "q_tile = item // kind_heads // (batch_heads // heads)",
              "q_tile = tl.where(last_first, tiles - 1 - q_tile, q_tile)",
              "head = tl.load(head_order + before + item % kind_heads)"]
    return indent(tuple(lines))
