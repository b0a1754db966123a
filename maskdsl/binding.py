"""Call-time data meets the slots of a mask: checks, and what the oracle asks of it.

`bind_slots` checks every slot's data against the call and gives, for each, an object that answers
in plain torch whether pairs are live. It is the meaning the kernels are tested against.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from maskdsl.dynamic import Blocks, ListMask, SlotMask, TokenTopK, VerticalSlash, slots_of
from maskdsl.errors import MissingSlotError, SlotDataError, UnknownSlotError
from maskdsl.expr import Mask
from maskdsl.indices import ColumnIndices, PrefixLengths, TokenIndices, mark
from maskdsl.shape import Shape

Tensor = torch.Tensor
SUPERSET = 64  # rows and keys of MInference's blocks
WRAPPED = (ColumnIndices, PrefixLengths, TokenIndices)  # a bare tensor says enough for these


@dataclass(frozen=True, slots=True)
class CallSize:
    """What a call tells about itself, for checks: batch size, heads, device."""

    batch: int
    heads: int
    kv_heads: int
    device: torch.device


def check_names(mask: Mask) -> tuple[SlotMask, ...]:
    """The slots of a mask; a SlotDataError where two atoms want different data by one name."""
    atoms = slots_of(mask)
    for a, b in pairwise(atoms):
        for other in (x for x in atoms if x is not b and x.slot == b.slot):
            raise SlotDataError(f"{other!r} and {b!r} in one mask",
                                f"both want data by the name {b.slot!r}", f"another name for one: "
                                f"{type(a).__name__}({a.slot + '2'!r})")
    return atoms


def check_slots(atoms: tuple[SlotMask, ...], given: Mapping[str, object],
                size: CallSize | None, shape: Shape,
                more: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every slot's data, checked; size None leaves batch, heads and device unchecked.

    more  names of other data the call takes
    """
    known = (*(atom.slot for atom in atoms), *more)
    for name in given:
        if name not in known:
            has = f"its slots are {', '.join(known)}" if known else "it has no slots"
            raise UnknownSlotError(f"attn(q, k, v, {name}=...)",
                                   f"the mask has no slot named {name!r}; {has}",
                                   "only q, k, v, scale, q_offset, total_len, return_lse"
                                   + "".join(f", {n}" for n in known))
    return {atom.slot: check_data(atom, given, size, shape) for atom in atoms}


def wrap(atom: SlotMask, value: object) -> Any:
    """The slot's data in its class, where a bare tensor says enough."""
    return atom.data(value) if isinstance(value, torch.Tensor) and atom.data in WRAPPED else value


def describe(value: object) -> Any:
    """What a check looks at: classes, shapes, dtypes, devices, block sizes."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.device
    held = getattr(value, "__dict__", {})
    return type(value), *(describe(held[name]) if isinstance(held[name], torch.Tensor) else
                          held[name] for name in sorted(held))


def check_data(atom: SlotMask, given: Mapping[str, object], size: CallSize | None,
               shape: Shape) -> Any:
    """The data of one slot, of its class and fit for the call."""
    wanted = atom.data.__name__
    if given.get(atom.slot) is None:
        raise MissingSlotError("attn(q, k, v)", f"{atom!r} needs data at the call",
                               f"attn(q, k, v, {atom.slot}={wanted}(...))")
    value = wrap(atom, given[atom.slot])
    if not isinstance(value, atom.data):
        raise SlotDataError(f"{atom.slot}={type(value).__name__}", f"{atom!r} takes {wanted}",
                            f"attn(q, k, v, {atom.slot}={wanted}(...))")
    if size is not None:
        check_lead(atom, value, size)
    if isinstance(atom, (Blocks, TokenTopK)):
        check_blocks(atom, value, shape)
    if atom.data.__name__ == "Documents" and value.length < shape.kv_len:
        raise SlotDataError(f"{atom.slot} of {value.length} tokens", f"the call has {shape.kv_len} "
                            "keys", "a document for every key")
    return value


def check_lead(atom: SlotMask, value: Any, size: CallSize) -> None:
    """Batch, heads and device of the data fit the call."""
    batch, heads = value.lead
    if batch not in (1, size.batch):
        raise SlotDataError(f"{atom.slot} for a batch of {batch}", f"the call has {size.batch}",
                            f"{size.batch}, or 1 for the same in every batch entry")
    if heads not in (1, size.kv_heads, size.heads):
        raise SlotDataError(f"{atom.slot} for {heads} heads", f"the call has {size.heads} query "
                            f"heads over {size.kv_heads} key/value heads",
                            f"{size.heads}, {size.kv_heads} or 1 heads")
    if value.device != size.device:
        raise SlotDataError(f"{atom.slot} on {value.device}", f"the call is on {size.device}",
                            f"indices on {size.device}")


def check_blocks(atom: Blocks | TokenTopK, value: Any, shape: Shape) -> None:
    """Block sizes and the number of rows of blocks fit."""
    if (value.q_block, value.kv_block) != atom.blocks:
        raise SlotDataError(f"{atom.slot} with blocks of {value.q_block} x {value.kv_block}",
                            f"{atom!r} has blocks of {atom.blocks[0]} x {atom.blocks[1]}",
                            "the same block sizes in the mask and in the data")
    rows = -(-shape.q_len // value.q_block)
    columns = -(-shape.kv_len // value.kv_block)
    masked = value.index.dtype == torch.bool
    if value.row is None and (value.index.shape[2] < rows
                              or (masked and value.index.shape[3] < columns)):
        raise SlotDataError(f"{atom.slot} {list(value.index.shape)}",
                            f"{shape.q_len} queries and {shape.kv_len} keys make {rows} rows of "
                            f"{columns} blocks", f"data for {rows} rows of blocks")


# --- what the oracle asks -----------------------------------------------------------------------


class Bound:
    """One slot's data as tables of bools, for one call."""

    def __init__(self, atom: SlotMask, data: Any, shape: Shape) -> None:
        self.atom, self.data, self.shape = atom, data, shape
        self.vertical: Tensor | None = None
        self.slash: Tensor | None = None
        self.table: Tensor | None = None
        if isinstance(atom, ListMask):
            self._list()

    def _list(self) -> None:
        atom, shape = self.atom, self.shape
        if isinstance(atom, (Blocks, TokenTopK)):
            rows = -(-shape.q_len // atom.blocks[0])
            self.table = self.data.table(rows, -(-shape.kv_len // atom.blocks[1]))
        elif isinstance(atom, VerticalSlash):
            self.vertical = mark(self.data.vertical, shape.kv_len)
            reach = max(0, shape.q_offset + shape.q_len)
            if atom.slash == "exact":
                self.slash = mark(self.data.slash, reach)
            else:
                self.table = widen_slashes(self.data.slash, shape)
        else:
            self.vertical = mark(self.data.index, shape.kv_len)

    def member(self, p: Tensor, k: Tensor, batch: Any, head: Any, heads: int) -> Tensor:
        """bool, broadcast over all arguments: whether the pair is listed."""
        b, h = self.lead_of(batch, head, heads)
        live = torch.zeros((), dtype=torch.bool, device=k.device)
        if self.vertical is not None and self.vertical.shape[-1]:
            live = live | _look(self.vertical, b, h, k)
        if self.slash is not None and self.slash.shape[-1]:
            live = live | _look(self.slash, b, h, p - k)
        if self.table is not None and self.table.numel():
            q_block, kv_block = (SUPERSET, 1) if isinstance(self.atom, VerticalSlash) else \
                self.atom.blocks  # type: ignore[attr-defined]
            row = (p - self.shape.q_offset) // q_block
            live = live | self.table[b, h, row, k // kv_block]
        return live

    def lead_of(self, batch: Any, head: Any, heads: int) -> tuple[Any, Any]:
        """Which batch entry and head of the data belong to those of the call."""
        batches, kinds = self.data.lead
        return (batch if batches > 1 else batch * 0), (head // (heads // kinds) if kinds > 1 else
                                                       head * 0)

    def read(self, name: str, p: Tensor, batch: Any) -> Tensor:
        """A number for every position: "start" or "stop" of its document, "length" of a prefix."""
        b = batch if self.data.lead[0] > 1 else batch * 0
        if name == "length":
            lengths: Tensor = self.data.lengths
            return lengths[b]
        numbers: Tensor = getattr(self.data, name)
        return numbers[b, p.clamp(-1, self.data.length) + 1]


def _look(table: Tensor, b: Any, h: Any, place: Tensor) -> Tensor:
    """table[b, h, place], False outside."""
    size = table.shape[-1]
    inside = (place >= 0) & (place < size)
    return table[b, h, place.clamp(0, size - 1)] & inside


def widen_slashes(slash: Tensor, shape: Shape) -> Tensor:
    """bool[B, H, row blocks, kv_len]: MInference's live blocks for each 64 query rows.

    For the rows up to `end`, slashes s < end from the farthest to the nearest give a block ending
    at max(end - s, 64): a block more than 64 beyond the range so far starts a new range, one that
    reaches beyond it makes the range 64 longer, any other adds nothing.
    """
    rows = -(-shape.q_len // SUPERSET)
    first = torch.arange(rows, device=slash.device) * SUPERSET + shape.q_offset
    end = (first + SUPERSET).expand(*slash.shape[:2], rows)
    live = torch.zeros(*slash.shape[:2], rows, shape.kv_len + 2 * SUPERSET, dtype=torch.bool,
                       device=slash.device)
    place = torch.arange(live.shape[-1], device=slash.device)
    reached = torch.full_like(end, -(1 << 30))
    for s in slash.long().sort(-1, descending=True).values.unsqueeze(-2).unbind(-1):
        stop = (end - s).clamp(min=SUPERSET)
        known = (s >= 0) & (s < end)
        fresh = known & (stop > reached + SUPERSET)
        longer = known & ~fresh & (stop > reached)
        reached = torch.where(fresh, stop, torch.where(longer, reached + SUPERSET, reached))
        begin = (reached - SUPERSET).unsqueeze(-1)
        block = (place >= begin) & (place < begin + SUPERSET)
        live |= block & (fresh | longer).unsqueeze(-1)
    return live[..., :shape.kv_len]


def bind_slots(mask: Mask, given: Mapping[str, object], shape: Shape,
               size: CallSize | None = None) -> dict[str, Bound]:
    """Every slot of the mask with its checked data, ready to be asked."""
    atoms = check_names(mask)
    data = check_slots(atoms, given, size, shape)
    return {atom.slot: Bound(atom, data[atom.slot], shape) for atom in atoms}
