"""What call-time data adds to the walk by key tile, made on the GPU without a host sync.

The query tiles of every key tile are found as bits, ranked, and written one after the other into
one list a head; its room is what the data can name at most, so no count is read back. Memory: a
quarter of a byte for every pair of tiles, 4 bytes for every entry; columns that are loose take a
row of dK and one of dV in float32 each, while a call runs.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import triton

from maskdsl.codegen import slot_kernels as kernels
from maskdsl.codegen.emit_rows import lists_rows, row_parameters
from maskdsl.codegen.lists import is_table
from maskdsl.codegen.row_bounds import KeyPlan
from maskdsl.codegen.tables import CHUNK, Tables, head_table, list_members, rank, words_for
from maskdsl.dynamic import ListMask, VerticalSlash

Tensor = torch.Tensor


class RowTables(Tables):
    """The arguments that carry call-time data to the walk by key tile."""

    def arguments_for(self, listers: tuple[Any, ...], by_key: tuple[KeyPlan, ...],
                      heads: tuple[tuple[int, ...], ...],
                      columns: tuple[int, int, int]) -> dict[str, Any]:
        """All arguments, under the names the kernels take them by.

        listers, by_key, heads  for each kind of head
        columns                 (key/value heads, QK_BLOCK, V_BLOCK)
        """
        if self.columns:
            self._sum_columns(*columns)
        if lists_rows(self.call.lists):
            self._list_rows(listers, by_key, heads)
        names = [name for name in self.arguments if name.startswith("slot_")]
        moved = {f"{name}_all": self.arguments[name] for name in names}
        return self.arguments | moved

    def _cover_slashes(self) -> None:
        words = self._unite(self.slashes).contiguous()
        before, _ = rank(words)
        self.arguments |= {"slash_set": words, "slash_before": before,
                           "slash_words": words.shape[-1]}
        self._lead("slash", (words.shape[0], words.shape[1]))

    def _list_columns(self) -> None:
        """Made by `_sum_columns`, which knows the key/value heads."""

    def _sum_columns(self, kv_heads: int, dim: int, value_dim: int) -> None:
        """The columns of every key/value head, and room for what they get."""
        call, words = self.call, self._unite(self.columns)
        share = max(1, words.shape[1] // kv_heads)
        if share > 1:  # heads of a group may see different columns
            grouped = words.reshape(words.shape[0], kv_heads, share, words.shape[2])
            words = reduce(torch.bitwise_or, grouped.unbind(2))
        words = words.contiguous()
        before, _ = rank(words)
        members = list_members(words, before, min(call.shape.kv_len, share * sum(
            s.most for s in self.columns)), 0)
        room = members.shape[-1]
        dk, dv = (torch.empty(call.batch, kv_heads, room, size, dtype=torch.float32,
                              device=words.device) for size in (dim, value_dim))
        self.arguments |= {
            "columns_list": members, "columns_marks": words, "columns_before": before,
            "column_dk": dk, "column_dv": dv, "columns_capacity": room,
            "columns_words": words.shape[-1],
            "columns_batch": words.shape[1] if words.shape[0] > 1 else 0,
            "columns_share": kv_heads // words.shape[1]}

    def _list_rows(self, listers: tuple[Any, ...], by_key: tuple[KeyPlan, ...],
                   heads: tuple[tuple[int, ...], ...]) -> None:
        call = self.call
        block_m, block_n = call.tile
        q_tiles, k_tiles = -(-call.shape.q_len // block_m), -(-call.shape.kv_len // block_n)
        leads = [self.data[atom.slot].lead for atom in (*call.lists.tables, *call.lists.slashes)]
        lead = (call.batch, call.heads) if call.by_head else (
            max(b for b, _ in leads), max(h for _, h in leads))
        device = self.arguments[row_parameters(call.lists)[0].name].device
        words = torch.zeros(*lead, k_tiles, 2, words_for(q_tiles), dtype=torch.int32,
                            device=device)
        self.arguments |= {"rows_bits": words, "rows_words": words.shape[-1]}
        self._lead("rows", lead)
        for i, lister in enumerate(listers):
            if lister is not None:
                self._run(lister, by_key[i], heads[i] if heads else (), lead, k_tiles)
        before, _ = rank(words)
        counts = before[..., -1].flatten(2)  # the last word is empty
        starts = torch.zeros(*lead, 2 * k_tiles + 1, dtype=torch.int32, device=device)
        torch.cumsum(counts, -1, dtype=torch.int32, out=starts[..., 1:])
        before += starts[..., :-1].view(*lead, k_tiles, 2, 1)
        most = min(q_tiles * k_tiles, sum(self._most_pairs(atom, q_tiles) for atom in
                                          (*call.lists.tables, *call.lists.slashes)))
        members = torch.empty(*lead, max(most, 1), dtype=torch.int32, device=device)
        sets = words.numel() // words.shape[-1]
        kernels.list_bits[(sets, triton.cdiv(words.shape[-1], 64))](
            words, before, members, words.shape[-1], members.shape[-1], 0, 64,
            SETS=2 * k_tiles)
        self.arguments |= {"rows_list": members, "rows_starts": starts,
                           "rows_capacity": members.shape[-1]}

    def _run(self, lister: Any, by_key: KeyPlan, heads: tuple[int, ...], lead: tuple[int, int],
             k_tiles: int) -> None:
        call, plan = self.call, by_key.plan
        heads = heads or tuple(range(0, call.heads, call.heads // lead[1]))
        device, shape = self.arguments["rows_bits"].device, call.shape
        more = {p.name: self.arguments[p.name] for p in row_parameters(plan.lists)}
        lister[(k_tiles * len(heads) * lead[0],)](
            head_table(heads, device), len(heads), shape.q_len, shape.kv_len, shape.q_offset,
            shape.total_len, **more, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, CHUNK=CHUNK)

    def _most_pairs(self, atom: ListMask, q_tiles: int) -> int:
        """The most pairs of tiles one slot's data may name for a head."""
        block_m, block_n = self.call.tile
        if isinstance(atom, VerticalSlash) and not is_table(atom):
            count = min(self.data[atom.slot].slash.shape[-1], self.slashes[0].most)
            across = -(-(block_m - 1) // block_n) + 1  # key tiles a slash meets in a query tile
            return int(count) * across * q_tiles
        return self._most_tiles(atom) * q_tiles
