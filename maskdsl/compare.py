"""Masks beside one another: how much each keeps, and how they lie to one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from maskdsl.columns import format_number, format_table
from maskdsl.errors import MaskTypeError
from maskdsl.expr import Mask
from maskdsl.heads import count_heads, pick_head
from maskdsl.plot_grid import live_share
from maskdsl.simplify import disjoint, includes, simplify
from maskdsl.tile_cells import count_tile_shares


@dataclass(frozen=True, slots=True)
class Compared:
    """One mask of a comparison, in a square call.

    causal_share  live pairs over the causal pairs of the call; mean over heads
    exact         whether pairs were counted; else they are estimated from spread pairs
    keys          live keys of a query row, mean
    full, masked  shares of all 128 x 128 tiles
    """

    mask: str
    causal_share: float
    exact: bool
    keys: float
    full: float
    masked: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """`str()` is the table; `relations` says what is proved of every two masks."""

    length: int
    masks: tuple[Compared, ...]
    relations: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"length": self.length, "relations": list(self.relations),
                "masks": [{name: getattr(row, name) for name in Compared.__slots__}
                          for row in self.masks]}

    def __str__(self) -> str:
        names = [f"{chr(65 + i)}  {row.mask}" if len(self.masks) <= 26 else row.mask
                 for i, row in enumerate(self.masks)]
        header = (f"{self.length:,} tokens", "% of causal", "keys a row", "% FULL tiles",
                  "% MASKED")
        rows = [(name, f"{'' if row.exact else '~'}{format_number(100 * row.causal_share)}",
                 format_number(row.keys), format_number(100 * row.full),
                 format_number(100 * row.masked))
                for name, row in zip(names, self.masks, strict=True)]
        return "\n".join([format_table(header, rows), *self.relations])


def compare_masks(masks: Sequence[Mask], length: int) -> Comparison:
    """Compare masks in a square call of `length` tokens. Errors: MaskTypeError, LengthError."""
    for mask in masks:
        if not isinstance(mask, Mask):
            raise MaskTypeError(f"compare_masks([{mask!r}])", "not a mask", "Window(512)")
    rows = tuple(describe(mask, length) for mask in masks)
    told = [relate(chr(65 + i), chr(65 + j), masks[i], masks[j])
            for i in range(len(masks)) for j in range(i + 1, len(masks)) if len(masks) <= 6]
    return Comparison(length, rows, tuple(filter(None, told)))


def describe(mask: Mask, length: int) -> Compared:
    """The numbers of one mask."""
    heads = [pick_head(mask, head) for head in range(count_heads(mask) or 1)]
    kinds = {head: live_share(head, length) for head in heads}
    tiles = {head: count_tile_shares(head, length) for head in heads}
    share = sum(kinds[head][0] for head in heads) / len(heads)
    full, masked = (sum(tiles[head][i] for head in heads) / len(heads) for i in (0, 1))
    return Compared(repr(mask), share, all(exact for _, exact in kinds.values()),
                    share * (length + 1) / 2, full, masked)


def relate(a: str, b: str, one: Mask, two: Mask) -> str:
    """What the geometry proves of two masks; "" where it proves nothing."""
    if count_heads(one) or count_heads(two):
        return f"{a} = {b}" if simplify(one) == simplify(two) else ""
    one, two = simplify(one), simplify(two)
    inside, around = includes(two, one), includes(one, two)
    if one == two or (inside and around):
        return f"{a} = {b}: the same pairs at every length"
    if inside or around:
        small, big = (a, b) if inside else (b, a)
        return f"{small} < {big}: every pair of {small} is in {big}, at every length"
    return f"{a} and {b} share no pair" if disjoint(one, two) else ""
