"""Masks beside one another: how much each keeps, and how they lie to one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from maskdsl.api import compile
from maskdsl.atoms import Causal, Empty
from maskdsl.columns import format_number, format_table, plural
from maskdsl.dynamic import SlotMask, slots_of
from maskdsl.errors import MaskTypeError
from maskdsl.explaining import Sizes, predict
from maskdsl.expr import And, Mask, Not, Or, join
from maskdsl.heads import PerHead, count_heads, pick_head
from maskdsl.plot_grid import live_share
from maskdsl.shape import Shape
from maskdsl.simplify import disjoint, includes, simplify
from maskdsl.tile_cells import count_tile_shares


@dataclass(frozen=True, slots=True)
class Compared:
    """One mask of a comparison, in a square call.

    causal_share  live pairs over the causal pairs of the call; mean over heads
    exact         whether pairs were counted; else they are estimated from spread pairs
    keys          live keys of a query row, mean
    full, masked  shares of all 128 x 128 tiles
    ms            predicted milliseconds of the call; None where nothing can be predicted, as where
                  the data of slots decides
    dense_ms      of dense causal attention with as many heads
    """

    mask: str
    causal_share: float
    exact: bool
    keys: float
    full: float
    masked: float
    ms: float | None
    dense_ms: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """`str()` is the table; `relations` says what is proved of every two masks.

    dense_ms  predicted for dense causal attention; call: what the predictions are of; "" for none
    """

    length: int
    masks: tuple[Compared, ...]
    relations: tuple[str, ...]
    dense_ms: float | None
    call: str

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"length": self.length, "relations": list(self.relations),
                "dense_ms": self.dense_ms, "call": self.call,
                "masks": [{name: getattr(row, name) for name in Compared.__slots__}
                          for row in self.masks]}

    def __str__(self) -> str:
        names = [f"{chr(65 + i)}  {row.mask}" if len(self.masks) <= 26 else row.mask
                 for i, row in enumerate(self.masks)]
        header = (f"{self.length:,} tokens", "% of causal", "keys a row", "% FULL tiles",
                  "% MASKED", "ms", "dense/ms")
        rows = [(name, f"{'' if row.exact else '~'}{format_number(100 * row.causal_share)}",
                 format_number(row.keys), format_number(100 * row.full),
                 format_number(100 * row.masked), format_number(row.ms),
                 format_number(row.dense_ms / row.ms if row.ms and row.dense_ms else None))
                for name, row in zip(names, self.masks, strict=True)]
        told = [f"ms: predicted for {self.call}, dense {format_number(self.dense_ms)}"] \
            if self.call else []
        return "\n".join([format_table(header, rows), *told, *self.relations])


def compare_masks(masks: Sequence[Mask], length: int, *, chip: str | None = None, batch: int = 1,
                  heads: int = 32, kv_heads: int = 8, head_dim: int = 128) -> Comparison:
    """Compare masks in a square call of `length` tokens, as they stand.

    chip  "H100": predict for this chip; default: the GPU here, or an H100 where there is none
    batch, heads, kv_heads, head_dim  of the call that is predicted; masks with PerHead have their
          own number of heads

    Slots count as empty, and nothing is predicted for masks with them.
    Errors: MaskTypeError, LengthError, BackendError for a chip that was not measured.
    """
    for mask in masks:
        if not isinstance(mask, Mask):
            raise MaskTypeError(f"compare_masks([{mask!r}])", "not a mask", "Window(512)")
    sizes = Sizes(batch, heads, kv_heads, head_dim)
    dense, _, name = predict_times(Causal(), length, sizes, chip)
    rows = tuple(describe(mask, length, sizes, chip) for mask in masks)
    told = [relate(chr(65 + i), chr(65 + j), masks[i], masks[j])
            for i in range(len(masks)) for j in range(i + 1, len(masks)) if len(masks) <= 6]
    call = f"{name}, batch {batch}, {plural(heads, 'head')} over {kv_heads}, dimension {head_dim}"
    return Comparison(length, rows, tuple(filter(None, told)), dense, call if name else "")


def predict_times(mask: Mask, length: int, sizes: Sizes,
                  chip: str | None) -> tuple[float | None, float | None, str]:
    """(predicted milliseconds of a square call, of dense causal attention with as many heads,
    chip); (None, None, "") where nothing is predicted."""
    count = count_heads(mask)
    if count is not None:
        whole = sizes.kv_heads if count % (sizes.kv_heads or 1) == 0 else count
        sizes = replace(sizes, heads=count, kv_heads=whole)
    shape = Shape(length, length)
    found, dense = (None if slots_of(one) else predict(
        compile(one, causal=False).compiled(), shape, sizes, chip) for one in (mask, Causal()))
    return (None, None, "") if found is None or dense is None else (found.ms, dense.ms, found.chip)


def describe(mask: Mask, length: int, sizes: Sizes, chip: str | None) -> Compared:
    """The numbers of one mask."""
    ms, dense, _ = predict_times(mask, length, sizes, chip)
    name, mask = repr(mask), without_slots(mask)
    heads = [pick_head(mask, head) for head in range(count_heads(mask) or 1)]
    kinds = {head: live_share(head, length) for head in heads}
    tiles = {head: count_tile_shares(head, length) for head in heads}
    share = sum(kinds[head][0] for head in heads) / len(heads)
    full, masked = (sum(tiles[head][i] for head in heads) / len(heads) for i in (0, 1))
    return Compared(name, share, all(exact for _, exact in kinds.values()),
                    share * (length + 1) / 2, full, masked, ms, dense)


def without_slots(mask: Mask) -> Mask:
    """Slot atoms replaced by Empty()."""
    if isinstance(mask, SlotMask):
        return Empty()
    if isinstance(mask, Not):
        return ~without_slots(mask.operand)
    if isinstance(mask, PerHead):
        return PerHead(tuple(map(without_slots, mask.masks)))
    if isinstance(mask, (Or, And)):
        args = tuple(map(without_slots, mask.args))
        return join(Or, args) if isinstance(mask, Or) else join(And, args)
    return mask


def relate(a: str, b: str, one: Mask, two: Mask) -> str:
    """What the geometry proves of two masks; "" where it proves nothing."""
    if count_heads(one) or count_heads(two):
        return f"{a} = {b}" if simplify(one) == simplify(two) else ""
    if slots_of(one) or slots_of(two):
        return ""
    one, two = simplify(one), simplify(two)
    inside, around = includes(two, one), includes(one, two)
    if one == two or (inside and around):
        return f"{a} = {b}: the same pairs at every length"
    if inside or around:
        small, big = (a, b) if inside else (b, a)
        return f"{small} < {big}: every pair of {small} is in {big}, at every length"
    return f"{a} and {b} share no pair" if disjoint(one, two) else ""
