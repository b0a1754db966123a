"""From call-time data to what the kernels read: sets of bits, and lists made from them.

Everything is launched on the call's stream and nothing is read back, so a call stays free of host
syncs and can be captured in a CUDA graph. Memory: a set takes N / 8 bytes a head; a table of blocks
Mb * Nb / 8; the lists of tiles 4 bytes for every entry a row of blocks may have.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton

from maskdsl.codegen import slot_kernels as kernels
from maskdsl.codegen.kept import make_kept
from maskdsl.codegen.listing import PAD, Lists
from maskdsl.codegen.lists import blocks_of, is_table
from maskdsl.dynamic import Columns, Document, ListMask, Prefix, SlotMask, VerticalSlash
from maskdsl.indices import BlockIndices
from maskdsl.shape import Shape

Tensor = torch.Tensor
Arguments = dict[str, Any]
CHUNK = 256  # key tiles a step of the kernel that lists them; chosen, not measured


@dataclass(frozen=True, slots=True)
class CallPlan:
    """What the tables of one kind of call have in common.

    tile       (BLOCK_M, BLOCK_N)
    by_head    whether lists of tiles differ by batch entry and query head whatever the data says
    """

    lists: Lists
    shape: Shape
    batch: int
    heads: int
    tile: tuple[int, int]
    by_head: bool


@dataclass(frozen=True, slots=True)
class BitSet:
    """Sets of numbers, int32 [B, H, words]; `most` bounds the members of one."""

    words: Tensor
    most: int

    def like(self, batch: int, heads: int) -> Tensor:
        """The words for that many batch entries and heads."""
        words = self.words.repeat_interleave(heads // self.words.shape[1], 1)
        return words.expand(batch, -1, -1)


def words_for(bits: int) -> int:
    """Words of a set of `bits` bits, with the empty one at the end."""
    return bits // 32 + 2


def make_bits(index: Tensor, limit: int, row: Tensor | None = None, rows: int = 1,
              room: int = 0, pad: int = 0, backwards: bool = False) -> Tensor:
    """Sets of the numbers in each list, int32 [lists..., rows, words]; those outside [0, limit) are
    dropped. `room` more bits are left empty behind, `pad` more words on both sides; backwards, x is
    bit limit - 1 - x."""
    lead, count = index.shape[:-1], index.shape[-1]
    index = index.contiguous()
    row = index if row is None else row.contiguous()
    words = torch.zeros(*lead, rows, words_for(limit + room) + 2 * pad, dtype=torch.int32,
                        device=index.device)
    lists = index.numel() // max(1, count)
    if lists and count:
        block = min(1024, triton.next_power_of_2(count))
        kernels.set_bits[(lists, triton.cdiv(count, block))](
            index, row, words, count, rows, limit, words.shape[-1], 32 * pad, row is not index,
            backwards, block)
    return words


def make_table(data: BlockIndices, rows: int, columns: int) -> Tensor:
    """A table of blocks as sets, int32 [B, H, rows, words]."""
    if data.row is not None:
        return make_bits(data.index, columns, data.row, rows, room=256)
    if data.index.dtype != torch.bool:
        return make_bits(data.index[:, :, :rows], columns, room=256)[..., 0, :]
    mask = data.index[:, :, :rows, :columns]
    if mask.stride(-1) != 1 or mask.stride(0) != mask.stride(1) * mask.shape[1]:
        mask = mask.contiguous()
    words = torch.empty(*mask.shape[:3], words_for(columns + 256), dtype=torch.int32,
                        device=mask.device)
    sets = mask.shape[0] * mask.shape[1] * rows
    if sets:
        block = min(64, triton.next_power_of_2(words.shape[-1]))
        kernels.pack_bits[(sets, triton.cdiv(words.shape[-1], block))](
            mask.view(torch.uint8), words, rows, columns, mask.stride(1), mask.stride(2),
            words.shape[-1], block)
    return words


def widen(slash: Tensor, shape: Shape) -> Tensor:
    """The table of a "block64" vertical-slash, int32 [B, H, row blocks, words]."""
    falling = slash.to(torch.int32).sort(-1, descending=True).values.contiguous()
    rows = -(-shape.q_len // 64)
    words = words_for(shape.kv_len + 256)  # a tile of keys past the end is read without a check
    table = torch.zeros(*slash.shape[:2], rows, words, dtype=torch.int32, device=slash.device)
    if rows and slash.numel():
        kernels.widen_slashes[(slash.shape[0] * slash.shape[1], triton.cdiv(rows, 128))](
            falling, table, slash.shape[-1], rows, words, shape.q_offset, 128)
    return table


def rank(words: Tensor, with_last: bool = False) -> tuple[Tensor, Tensor]:
    """(before, last) of sets, int32 like `words`; see `slot_kernels`."""
    before = torch.empty_like(words)
    last = torch.empty_like(words) if with_last else before
    sets = words.numel() // words.shape[-1]
    block = min(4096, triton.next_power_of_2(words.shape[-1]))
    kernels.rank_bits[(sets,)](words, before, last, words.shape[-1], with_last, block)
    return before, last


def list_members(words: Tensor, before: Tensor, capacity: int, shift: int) -> Tensor:
    """Sets as rising lists, int32 [B, H, capacity]."""
    out = torch.empty(*words.shape[:-1], max(capacity, 1), dtype=torch.int32, device=words.device)
    sets = words.numel() // words.shape[-1]
    kernels.list_bits[(sets, triton.cdiv(words.shape[-1], 64))](
        words, before, out, words.shape[-1], out.shape[-1], shift, 64)
    return out


class Tables:
    """The arguments that carry call-time data, made for one call."""

    def __init__(self, call: CallPlan, data: dict[str, Any]) -> None:
        self.call, self.data = call, data
        self.arguments: Arguments = {}
        self.columns: list[BitSet] = []
        self.slashes: list[BitSet] = []
        for atom in call.lists.atoms:
            self._add(atom, data[atom.slot])
        if call.lists.slashes:
            self._cover_slashes()
        if call.lists.columns:
            self._list_columns()

    def _lead(self, name: str, lead: tuple[int, int]) -> None:
        """How a kernel gets from (batch, head) to its entry: batch * `batch` + head // `share`."""
        batch, heads = lead
        self.arguments[f"{name}_batch"] = heads if batch > 1 else 0
        self.arguments[f"{name}_share"] = self.call.heads // heads

    def _add(self, atom: SlotMask, data: Any) -> None:
        name, arguments, shape = f"slot_{atom.slot}", self.arguments, self.call.shape
        if isinstance(atom, Document):
            arguments |= {f"{name}_start": data.start, f"{name}_stop": data.stop,
                          f"{name}_tokens": data.length,
                          f"{name}_batch": data.start.shape[1] if data.lead[0] > 1 else 0}
            return
        if isinstance(atom, Prefix):
            arguments |= {f"{name}_lengths": data.lengths.to(torch.int32),
                          f"{name}_batch": int(data.lead[0] > 1)}
            return
        if isinstance(atom, ListMask) and is_table(atom):
            self._add_table(name, atom, data)
        if isinstance(atom, (VerticalSlash, Columns)):
            index = data.vertical if isinstance(atom, VerticalSlash) else data.index
            words = make_bits(index, shape.kv_len)[..., 0, :]
            self.columns.append(BitSet(words, index.shape[-1]))
            arguments |= {f"{name}_columns": make_bits(index, shape.kv_len, pad=PAD),
                          f"{name}_column_words": words.shape[-1]}
        if isinstance(atom, VerticalSlash) and not is_table(atom):
            reach = max(0, shape.q_offset + shape.q_len)
            words = make_bits(data.slash, reach, room=self.call.tile[0])[..., 0, :]
            self.slashes.append(BitSet(words, reach))
            backwards = make_bits(data.slash, reach, pad=PAD, backwards=True)
            arguments |= {f"{name}_slashes": backwards,
                          f"{name}_slash_words": backwards.shape[-1] - 2 * PAD}
        self._lead(name, data.lead)

    def _add_table(self, name: str, atom: ListMask, data: Any) -> None:
        shape = self.call.shape
        if isinstance(atom, VerticalSlash):
            table = widen(data.slash, shape)
        else:
            q_block, kv_block = blocks_of(atom)
            table = make_table(data, -(-shape.q_len // q_block), -(-shape.kv_len // kv_block))
        self.arguments |= {f"{name}_table": table, f"{name}_rows": table.shape[2],
                           f"{name}_table_words": table.shape[3]}

    def _unite(self, sets: list[BitSet]) -> Tensor:
        """The union of sets for all that any of them tells apart, int32 [B, H, words]."""
        batch = max(s.words.shape[0] for s in sets)
        heads = max(s.words.shape[1] for s in sets)
        if len(sets) == 1:
            return sets[0].words
        words = sets[0].like(batch, heads)
        for other in sets[1:]:
            words = words | other.like(batch, heads)
        return words.contiguous()

    def _cover_slashes(self) -> None:
        """The tiles at fixed distances that cover all slashes, as a set and as a list."""
        block_m, block_n = self.call.tile
        words = self._unite(self.slashes)
        reach = self.slashes[0].most
        _, last = rank(words, with_last=True)
        size = words_for(reach + block_m + block_n + 32)
        marks, covered = torch.zeros(2, *words.shape[:-1], size, dtype=torch.int32,
                                     device=words.device)
        self.arguments["union_slash_covered"] = covered
        sets = words.numel() // words.shape[-1]
        kernels.cover_slashes[(sets,)](words, last, marks, covered, words.shape[-1],
                                       marks.shape[-1], reach, block_m, block_n, num_warps=1)
        self._add_list("slash", marks, -(-(reach + block_m) // block_n) + 1, block_m - 1)

    def _list_columns(self) -> None:
        words = self._unite(self.columns)
        most = min(self.call.shape.kv_len, sum(s.most for s in self.columns))
        self._add_list("column", words, most, 0)

    def _add_list(self, name: str, marks: Tensor, capacity: int, shift: int) -> None:
        before, _ = rank(marks)
        members = list_members(marks, before, capacity, shift)
        self.arguments |= {f"union_{name}_list": members, f"union_{name}_marks": marks,
                           f"union_{name}_before": before,
                           f"union_{name}_capacity": members.shape[-1],
                           f"union_{name}_words": marks.shape[-1]}
        self._lead(f"union_{name}", (marks.shape[0], marks.shape[1]))

    # --- lists of tiles ---------------------------------------------------------------------------

    def room_for_tiles(self) -> None:
        """Allocate the lists of tiles; the emitted kernels of `list_tiles` fill them."""
        call = self.call
        leads = [self.data[atom.slot].lead for atom in call.lists.tables]
        batch = call.batch if call.by_head else max(b for b, _ in leads)
        heads = call.heads if call.by_head else max(h for _, h in leads)
        tiles, columns = -(-call.shape.q_len // call.tile[0]), -(-call.shape.kv_len // call.tile[1])
        capacity = max(1, min(columns, sum(self._most_tiles(atom) for atom in call.lists.tables)))
        device = self.arguments[f"slot_{call.lists.tables[0].slot}_table"].device
        make = {"dtype": torch.int32, "device": device}
        self.arguments |= {
            "union_tile_list": torch.empty(batch, heads, tiles, capacity, **make),
            "union_tile_counts": torch.zeros(batch, heads, tiles, 2, **make),
            "union_tile_bits": torch.zeros(batch, heads, tiles, words_for(columns), **make),
            "union_tile_capacity": capacity, "union_tile_words": words_for(columns)}
        self._lead("union_tile", (batch, heads))

    def _most_tiles(self, atom: ListMask) -> int:
        """The most key tiles the data of one table may name for a query tile."""
        data, (block_m, block_n) = self.data[atom.slot], self.call.tile
        if isinstance(atom, VerticalSlash) or data.row is not None or \
                data.index.dtype == torch.bool:
            return 1 << 30
        q_block, kv_block = blocks_of(atom)
        rows = -(-block_m // q_block) + (block_m % q_block != 0)
        return int(rows * data.index.shape[-1] * max(1, kv_block // block_n))


@lru_cache(maxsize=64)
def head_table(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 tensor of head numbers, kept for later calls."""
    return make_kept(lambda: torch.tensor(heads, dtype=torch.int32, device=device), device)
