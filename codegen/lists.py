"""What runtime slots ask of a kernel: which parts of a mask are known before the data is.

Every slot atom D of a mask E is replaced by what is surely in it, or what may be in it:

    base   E with every D empty: the pairs that are live far from all listed tiles. Its hull is
           walked by the static loops.
    sure   E with D empty where it adds pairs and full where it takes them away: live whatever the
           data says. Its cores are the FULL tiles.
    reach  E with D full where it adds and empty where it takes away: nothing outside can be live,
           so lists are cut to it.

A live pair is in some D, and so in a listed tile, or in none, and so in `base`. Tiles of the static
loops are left out of the lists, every loop tests E itself, and so each live pair is met once.
"""

from __future__ import annotations

from dataclasses import replace

import sympy

from maskdsl.atoms import Empty, Full
from maskdsl.binding import check_names
from maskdsl.codegen.bounds import Bounds, bound_piece, bound_pieces, bound_reach
from maskdsl.codegen.listing import Lists, Parameter, Segment
from maskdsl.dynamic import (
    Blocks,
    Columns,
    Document,
    ListMask,
    Prefix,
    SlotMask,
    TokenTopK,
    VerticalSlash,
)
from maskdsl.expr import And, Mask, Not, Or, join
from maskdsl.heads import count_heads, pick_head
from maskdsl.simplify import simplify
from maskdsl.spans import Piece, spans
from maskdsl.trace import BATCH, HEAD, Condition, Ge, Has, Lookup

SUPERSET = (64, 1)  # blocks of a "block64" vertical-slash: 64 rows, single keys


def blocks_of(atom: ListMask) -> tuple[int, int]:
    """(query rows, keys) of a table's blocks."""
    return atom.blocks if isinstance(atom, (Blocks, TokenTopK)) else SUPERSET


def is_table(atom: SlotMask) -> bool:
    """Whether the atom makes a list of tiles for every query tile."""
    return isinstance(atom, (Blocks, TokenTopK)) or \
        (isinstance(atom, VerticalSlash) and atom.slash == "block64")


def sort_atoms(mask: Mask) -> Lists:
    """The mask's slot atoms by what they make."""
    atoms = check_names(mask)
    lists = [atom for atom in atoms if isinstance(atom, ListMask)]
    return Lists(
        atoms, tuple(a for a in lists if is_table(a)),
        tuple(a for a in lists if isinstance(a, VerticalSlash) and a.slash == "exact"),
        tuple(a for a in lists if isinstance(a, (VerticalSlash, Columns))))


def shared_rows(mask: Mask) -> int:
    """Query rows that share their lists: the smallest block of rows, where tables of blocks are all
    that is listed; 0 where nothing is, or something else."""
    found = [atom for atom in check_names(mask) if isinstance(atom, ListMask)]
    if not found or not all(isinstance(atom, Blocks) for atom in found):
        return 0
    return min(blocks_of(atom)[0] for atom in found)


def replace_lists(mask: Mask, adds: bool, takes: bool, chosen: Mask | None = None,
                  positive: bool = True) -> Mask:
    """The mask with list atoms replaced: those that add pairs by Full if `adds` (else Empty), those
    that take pairs away by Full if `takes`; `chosen` by Full wherever it stands."""
    if isinstance(mask, ListMask):
        full = mask == chosen or (adds if positive else takes)
        return Full() if full else Empty()
    if isinstance(mask, Not):
        return ~replace_lists(mask.operand, adds, takes, chosen, not positive)
    if isinstance(mask, (Or, And)):
        args = tuple(replace_lists(arg, adds, takes, chosen, positive) for arg in mask.args)
        return join(Or, args) if isinstance(mask, Or) else join(And, args)
    return mask


def base_of(mask: Mask) -> Mask:
    """The mask with no list holding anything."""
    return simplify(replace_lists(mask, False, False))


def bound_lists(mask: Mask, block_n: int, multiple: int = 1) -> tuple[Bounds, Lists]:
    """The bounds text of the static loops, and what is to be listed besides; `multiple` as in
    `bound_pieces`."""
    lists = sort_atoms(mask)
    base, sure = base_of(mask), simplify(replace_lists(mask, False, True))
    pieces = spans(base)
    bounds = bound_pieces(pieces, block_n, None if sure == base else spans(sure), multiple)
    count = len(bounds.ranges)
    reach = spans(simplify(replace_lists(mask, True, False)))
    bounds.lines.add("# keys that listed tiles may hold")
    ends = bound_reach(bounds.lines, count, reach)
    inside: tuple[Piece, ...] = ()
    if len(lists.tables) == 1:
        bounds.lines.add("# tiles that are live throughout where they are listed")
        inside = spans(simplify(replace_lists(mask, False, True, lists.tables[0])))
    ranges = [bound_piece(bounds.lines, count + len(reach) + i, piece, block_n)
              for i, piece in enumerate(inside)]
    cores = tuple(Segment(r.core_start, r.core_stop) for r in ranges
                  if r.core_start != r.core_stop)
    by_head = any(map(asks_head, (*pieces, *reach, *inside, *spans(sure))))
    return bounds, replace(lists, reach=ends, hulls=bounds.hulls, cores=cores, by_head=by_head)


def group_heads(mask: Mask) -> list[tuple[tuple[int, ...], Mask]]:
    """(query heads, their mask) for every distinct mask; ((), mask) where all heads share one."""
    count = count_heads(mask)
    if count is None:
        return [((), mask)]
    kinds: dict[Mask, list[int]] = {}
    for head in range(count):
        kinds.setdefault(simplify(pick_head(mask, head)), []).append(head)
    if len(kinds) == 1:
        return [((), next(iter(kinds)))]
    return [(tuple(heads), one) for one, heads in kinds.items()]


def asks_head(piece: Piece) -> bool:
    """Whether the piece differs between batches or heads."""
    bounds = piece.lo + piece.hi + piece.first + piece.last
    return any(map(_asks, bounds)) or _condition_asks_head(piece.rest)


def _asks(e: sympy.Expr) -> bool:
    """Whether a number depends on batch or head, or on data that does."""
    return bool(e.has(BATCH, HEAD, Lookup)) or \
        any(str(s).startswith("slot_") for s in e.free_symbols)


def _condition_asks_head(condition: Condition) -> bool:
    if isinstance(condition, Ge):
        return _asks(condition.value)
    if isinstance(condition, Has):
        return True
    return any(map(_condition_asks_head, condition.args))


# --- names the kernels take ---------------------------------------------------------------------


def _named(prefix: str, pointers: str, numbers: str) -> list[Parameter]:
    return [*(Parameter(f"{prefix}_{n}", True) for n in pointers.split()),
            *(Parameter(f"{prefix}_{n}", False) for n in numbers.split())]


def atom_parameters(atom: SlotMask) -> list[Parameter]:
    """The arguments that carry one slot's data."""
    name = f"slot_{atom.slot}"
    if isinstance(atom, Document):
        return _named(name, "start stop", "tokens batch")
    if isinstance(atom, Prefix):
        return _named(name, "lengths", "batch")
    found = []
    if is_table(atom):
        found += _named(name, "table", "rows table_words")
    if isinstance(atom, (VerticalSlash, Columns)):
        found += _named(name, "columns", "column_words")
    if isinstance(atom, VerticalSlash) and atom.slash == "exact":
        found += _named(name, "slashes", "slash_words")
    return found + _named(name, "", "batch share")


def list_parameters(lists: Lists) -> list[Parameter]:
    """The arguments of the lists made from all slots together."""
    found = []
    if lists.tables:
        found += _named("tile", "list counts bits", "capacity words batch share")
    if lists.slashes:
        found += _named("slash", "list marks before covered", "capacity words batch share")
    if lists.columns:
        found += _named("column", "list marks before", "capacity words batch share")
        found += [Parameter("key_rows", True), Parameter("value_rows", True)]
    return [Parameter(f"union_{p.name}", p.is_pointer) for p in found]


def parameters(lists: Lists, unions: bool = True) -> list[Parameter]:
    """All arguments beyond those of a static mask, in order."""
    slots = [p for atom in lists.atoms for p in atom_parameters(atom)]
    return slots + (list_parameters(lists) if unions else [])
