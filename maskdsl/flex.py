"""Masks for FlexAttention, and FlexAttention's masks for us.

A `BlockMask` is made from the plan's tiles: no pair is evaluated, so its cost grows with the number
of tiles and not with the square of the length. FlexAttention's own tables stay as wide as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from maskdsl.binding import Bound, bind_slots
from maskdsl.dynamic import MAX_BLOCK, Blocks, slots_of
from maskdsl.errors import ShapeError, SlotDataError
from maskdsl.expr import EXPORTS, Mask
from maskdsl.heads import count_heads, pick_head
from maskdsl.indices import BlockIndices
from maskdsl.inputs import check_heads
from maskdsl.reading import from_mask_mod
from maskdsl.shape import Shape, Site
from maskdsl.trace import (
    BATCH,
    HEAD,
    KV_LEN,
    Q_LEN,
    TOTAL_LEN,
    Condition,
    Ge,
    Has,
    is_traceable,
    trace,
)
from maskdsl.where import Where

Tensor = torch.Tensor
LENGTHS = frozenset({Q_LEN, KV_LEN, TOTAL_LEN})
BLOCK = 128  # FlexAttention's default, tokens


@dataclass(frozen=True, eq=False)
class MaskMod:
    """A mask as FlexAttention's `mask_mod(b, h, q_idx, kv_idx) -> bool`; picklable.

    offset  absolute position of query row 0
    site    the lengths of the call, and the data of the mask's slots
    """

    mask: Mask
    offset: int
    site: Site

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        site = Site(self.site.q_len, self.site.kv_len, self.site.total_len, b, h,
                    self.site.heads, self.site.bound)
        live = self.mask.contains(q_idx + self.offset, kv_idx, site)
        if isinstance(live, bool):  # the same for every pair
            return kv_idx >= 0 if live else kv_idx < 0
        return live


def make_mask_mod(mask: Mask, q_len: int | None = None, kv_len: int | None = None, *,
                  q_offset: int | None = None, total_len: int | None = None,
                  heads: int | None = None,
                  slots: Mapping[str, object] | None = None) -> MaskMod:
    """`Mask.mask_mod`."""
    if q_len is None:
        if slots_of(mask) or asks_for(mask, LENGTHS) or q_offset is not None:
            raise ShapeError(f"({mask!r}).mask_mod()", "this mask depends on the lengths of the "
                             "call", "mask.mask_mod(q_len, kv_len)")
        return MaskMod(mask, 0, Site(0, 0, 0, heads=heads or count_heads(mask) or 1))
    shape = Shape(q_len, q_len if kv_len is None else kv_len, q_offset,  # type: ignore[arg-type]
                  total_len)  # type: ignore[arg-type]
    bound = bind_slots(mask, slots or {}, shape)
    count = count_heads(mask)
    if heads is not None:
        check_heads(count, heads)
    most = max((b.data.lead[1] for b in bound.values()), default=1)
    if heads is None and count is None and most > 1:
        raise ShapeError(f"({mask!r}).mask_mod({q_len}, {shape.kv_len}) with data for {most} "
                         "heads", "which heads share an entry depends on the number of query "
                         "heads", f"mask_mod(..., heads={most})")
    return MaskMod(mask, shape.q_offset, Site.of(shape, heads=heads or count or 1, bound=bound))


@lru_cache(maxsize=1024)
def asks_for(mask: Mask, symbols: frozenset[Any]) -> bool:
    """Whether a part of the mask that can be traced depends on one of the symbols."""
    return any(is_traceable(node) and _asks(trace(node), symbols) for node in mask.walk())


def _asks(condition: Condition, symbols: frozenset[Any]) -> bool:
    if isinstance(condition, Ge):
        return bool(condition.value.free_symbols & symbols)
    return not isinstance(condition, Has) and any(_asks(arg, symbols) for arg in condition.args)


def make_block_mask(mask: Mask, q_len: int, kv_len: int | None = None, *, batch: int = 1,
                    heads: int | None = None, q_offset: int | None = None,
                    total_len: int | None = None, BLOCK_SIZE: int | tuple[int, int] = BLOCK,
                    device: torch.device | str = "cpu", compute_q_blocks: bool = True,
                    slots: Mapping[str, object] | None = None) -> Any:
    """`Mask.block_mask`."""
    from torch.nn.attention.flex_attention import BlockMask

    block = check_block_size(BLOCK_SIZE)
    mask_mod = make_mask_mod(mask, q_len, kv_len, q_offset=q_offset, total_len=total_len,
                             heads=heads, slots=slots)
    site = mask_mod.site
    shape = Shape(site.q_len, site.kv_len, mask_mod.offset, site.total_len)
    some, every = classify_heads(mask, shape, block, batch, site)
    partial, full = (torch.from_numpy(t).to(device) for t in (some & ~every, every))
    ours = "compute_q_blocks" in signature(BlockMask.from_kv_blocks).parameters  # torch >= 2.9
    options: dict[str, Any] = {"compute_q_blocks": False} if ours else {}
    made = BlockMask.from_kv_blocks(*list_tiles(partial), *list_tiles(full), BLOCK_SIZE=block,
                                    mask_mod=mask_mod, seq_lengths=(shape.q_len, shape.kv_len),
                                    **options)
    if compute_q_blocks and ours:  # theirs sort whole tables: at a million tokens for a minute
        made.q_num_blocks, made.q_indices = list_tiles(partial.mT)
        made.full_q_num_blocks, made.full_q_indices = list_tiles(full.mT)
    return made


def check_block_size(size: object) -> tuple[int, int]:
    """(query rows, keys) of a block, or a ShapeError."""
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, tuple) or len(pair) != 2 or \
            not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in pair):
        raise ShapeError(f"BLOCK_SIZE={size!r}", "not a size in tokens, nor a pair of them",
                         "BLOCK_SIZE=128, or (256, 128) for FlashAttention 4 on Blackwell")
    return pair


def classify_heads(mask: Mask, shape: Shape, block: tuple[int, int], batch: int,
                   site: Site) -> tuple[Any, Any]:
    """(some, every), bool[B or 1, H or 1, query blocks, key blocks]; see `codegen.classes`."""
    from maskdsl.codegen.classes import Grid, classify_tiles  # not with `import maskdsl`

    by_batch, by_head = varies(mask, site.bound)
    some, every = [], []
    for b in range(batch if by_batch else 1):
        for h in range(site.heads if by_head else 1):
            grid = Grid(shape, block, b, h, site.heads, site.bound)
            found = classify_tiles(pick_head(mask, h), grid)
            some.append(found.some)
            every.append(found.every)
    size = (batch if by_batch else 1, site.heads if by_head else 1, *some[0].shape)
    whole = np.stack(every).reshape(size)
    # a block that reaches past the end is not full, as in create_block_mask
    whole[..., shape.q_len // block[0]:, :] = False
    whole[..., shape.kv_len // block[1]:] = False
    return np.stack(some).reshape(size), whole


def varies(mask: Mask, bound: Mapping[str, Bound]) -> tuple[bool, bool]:
    """Whether the blocks may differ between batch entries, and between heads."""
    leads = [b.data.lead for b in bound.values()]
    by_batch = any(b > 1 for b, _ in leads) or asks_for(mask, frozenset({BATCH}))
    by_head = any(h > 1 for _, h in leads) or count_heads(mask) is not None or \
        asks_for(mask, frozenset({HEAD}))
    return by_batch, by_head


def list_tiles(flags: Tensor) -> tuple[Tensor, Tensor]:
    """Counts int32[..., rows] and the columns of the set flags, int32[..., rows, columns], zeros
    behind them. FlexAttention reads no further than the count."""
    counts = flags.sum(-1, dtype=torch.int32)
    table = torch.zeros(flags.shape, dtype=torch.int32, device=flags.device)
    row, column = flags.reshape(-1, flags.shape[-1]).nonzero(as_tuple=True)
    first = counts.flatten().cumsum(0) - counts.flatten()
    place = torch.arange(row.numel(), device=flags.device) - first[row]
    table.view(-1, flags.shape[-1])[row, place] = column.to(torch.int32)
    return counts, table


class FlexMask(NamedTuple):
    """A FlexAttention mask as an expression, with the data of its slots.

    Call it with q_offset=0: FlexAttention's query row 0 is position 0.
    """

    mask: Mask
    slots: dict[str, BlockIndices]


_read: WeakKeyDictionary[Any, Mask | None] = WeakKeyDictionary()


def read_mask_mod(mask_mod: Any) -> Mask:
    """`from_mask_mod`, remembered as long as the function lives: a training loop brings one many
    times."""
    try:
        if mask_mod in _read:
            known = _read[mask_mod]
            return Where(mask_mod) if known is None else known
        mask = from_mask_mod(mask_mod)
        # an expression that holds the function would keep it alive
        _read[mask_mod] = None if mask == Where(mask_mod) else mask
    except TypeError:  # a callable object without hash or weak references
        return from_mask_mod(mask_mod)
    return mask


def from_block_mask(block_mask: Any) -> FlexMask:
    """The same set of pairs as a FlexAttention `BlockMask`, lists and function both.

    `Blocks("flex_full") | Blocks("flex_part") & from_mask_mod(block_mask.mask_mod)`, with the two
    slots' data. Where the lists came from the function alone (`create_block_mask`), the function
    says it all: `from_mask_mod(block_mask.mask_mod)` then needs no lists.

    SlotDataError for a sliced BlockMask, which has lost its function.
    """
    return FlexMask(mask_of_block_mask(block_mask), list_blocks(block_mask))


def mask_of_block_mask(block_mask: Any) -> Mask:
    """The expression of `from_block_mask`."""
    name = getattr(block_mask.mask_mod, "__name__", "")
    if name == "_sliced_mask_mod_error":
        raise SlotDataError("from_block_mask of a sliced BlockMask", "slicing drops its mask_mod",
                            "the BlockMask before slicing")
    inside = read_mask_mod(block_mask.mask_mod)
    q_block, kv_block = block_mask.BLOCK_SIZE
    if max(q_block, kv_block) > MAX_BLOCK:  # one block for everything: there is no list
        return inside
    return Blocks("flex_full", q_block, kv_block) | \
        Blocks("flex_part", q_block, kv_block) & inside


def list_blocks(block_mask: Any) -> dict[str, BlockIndices]:
    """The slots' data of `from_block_mask`."""
    if max(block_mask.BLOCK_SIZE) > MAX_BLOCK:
        return {}
    partial, full = BlockIndices.from_block_mask(block_mask)
    return {"flex_full": full, "flex_part": partial}


EXPORTS |= {"mask_mod": make_mask_mod, "block_mask": make_block_mask}
