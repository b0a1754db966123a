"""The call-time data of one batch entry and head as numpy, for counting on the host.

Nothing here grows with queries times keys: tables are read a few rows of blocks at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from maskdsl.codegen.lists import blocks_of, is_table
from maskdsl.dynamic import Columns, ListMask, SlotMask, VerticalSlash
from maskdsl.indices import BlockIndices
from maskdsl.shape import Shape
from maskdsl.tiles import Ints

Bools = npt.NDArray[np.bool_]
NEVER = -(1 << 30)
SPARE = 256  # keys behind the last one in the table of a "block64" vertical-slash (`tables.widen`)


@dataclass(frozen=True, slots=True)
class Held:
    """A slot's data under the name by which the bounds text finds it (`names_of`)."""

    data: Any


def to_numpy(tensor: torch.Tensor) -> Ints:
    """Integers of a tensor on any device (this waits for a GPU)."""
    return tensor.detach().cpu().numpy().astype(np.int64)


def row_of(data: Any, batch: int, head: int, heads: int) -> tuple[int, int]:
    """Which entry of the data serves a batch entry and query head."""
    batches, kinds = data.lead
    return batch if batches > 1 else 0, head // (heads // kinds) if kinds > 1 else 0


def members(index: Ints, limit: int) -> Ints:
    """A list as a rising set; what lies outside [0, limit) is dropped."""
    return np.unique(index[(index >= 0) & (index < limit)])


class HeadData:
    """All slots' data for one batch entry and query head of a call.

    data   the slots' data, checked, by name
    heads  query heads of the call
    """

    def __init__(self, data: Mapping[str, Any], shape: Shape, batch: int, head: int,
                 heads: int) -> None:
        self.data, self.shape, self.batch, self.head = data, shape, batch, head
        self.at = {name: row_of(value, batch, head, heads) for name, value in data.items()}
        self._tables: dict[SlotMask, Table] = {}

    @cached_property
    def bound(self) -> dict[str, Held]:
        """The data as `Plan.run_bounds` and `names_of` take it."""
        return {name: Held(value) for name, value in self.data.items()}

    @property
    def reach(self) -> int:
        """The largest distance p - k of the call, plus one."""
        return max(0, self.shape.q_offset + self.shape.q_len)

    def columns(self, atom: ListMask) -> Ints:
        """The loose columns of a slot, rising."""
        if not isinstance(atom, (VerticalSlash, Columns)):
            return np.zeros(0, dtype=np.int64)
        data = self.data[atom.slot]
        index = data.vertical if isinstance(atom, VerticalSlash) else data.index
        return members(to_numpy(index[self.at[atom.slot]]), self.shape.kv_len)

    def slashes(self, atom: ListMask) -> Ints:
        """The exact slashes of a slot, rising distances."""
        if not isinstance(atom, VerticalSlash) or is_table(atom):
            return np.zeros(0, dtype=np.int64)
        return members(to_numpy(self.data[atom.slot].slash[self.at[atom.slot]]), self.reach)

    def table(self, atom: ListMask) -> Table:
        """The table of blocks of a slot."""
        if atom not in self._tables:
            data, at = self.data[atom.slot], self.at[atom.slot]
            self._tables[atom] = WideSlashes(data.slash[at], self.shape) \
                if isinstance(atom, VerticalSlash) else Table(data, at, blocks_of(atom), self.shape)
        return self._tables[atom]


class Table:
    """One head's table of blocks, read by rows.

    blocks  (query rows, keys) of a block
    """

    def __init__(self, data: BlockIndices | None, at: tuple[int, int], blocks: tuple[int, int],
                 shape: Shape) -> None:
        self.blocks = blocks
        self.count = -(-shape.q_len // blocks[0])
        self.columns = -(-shape.kv_len // blocks[1])
        if data is not None:
            self.index = data.index[at].detach().cpu().numpy()
            self.row = None if data.row is None else to_numpy(data.row[at])

    def rows(self, first: int, stop: int) -> Bools:
        """bool[stop - first, columns]: the live blocks of some rows of blocks."""
        live = np.zeros((stop - first, self.columns), dtype=bool)
        if self.row is not None:
            inside = (self.row >= first) & (self.row < stop) & (self.index >= 0) & \
                (self.index < self.columns)
            live[self.row[inside] - first, self.index[inside]] = True
        elif self.index.dtype == bool:
            live[:] = self.index[first:stop, :self.columns]
        else:
            index = self.index[first:stop]
            row, place = np.nonzero((index >= 0) & (index < self.columns))
            live[row, index[row, place]] = True
        return live


class WideSlashes(Table):
    """The table of a "block64" vertical-slash; the rule is told in `binding.widen_slashes`."""

    def __init__(self, slash: torch.Tensor, shape: Shape) -> None:
        super().__init__(None, (0, 0), (64, 1), shape)
        self.columns += SPARE  # as the kernel's table, which is not cut at the last key
        end = np.arange(1, self.count + 1, dtype=np.int64) * 64 + shape.q_offset
        reached = np.full_like(end, NEVER)
        found = []
        for s in np.sort(to_numpy(slash))[::-1]:
            stop = np.maximum(end - s, 64)
            known = (s >= 0) & (s < end)
            fresh = known & (stop > reached + 64)
            longer = known & ~fresh & (stop > reached)
            reached = np.where(fresh, stop, np.where(longer, reached + 64, reached))
            found.append(np.where(fresh | longer, reached - 64, NEVER).astype(np.int32))
        self.begins = np.stack(found) if found else np.zeros((0, self.count), dtype=np.int32)

    def rows(self, first: int, stop: int) -> Bools:
        """bool[stop - first, keys and SPARE more]."""
        which, row = np.nonzero(self.begins[:, first:stop] != NEVER)
        begin = np.maximum(self.begins[:, first:stop][which, row], 0)
        change = np.zeros((stop - first, self.columns + 1), dtype=np.int32)
        np.add.at(change, (row, np.minimum(begin, self.columns)), 1)
        np.add.at(change, (row, np.minimum(begin + 64, self.columns)), -1)
        live: Bools = change.cumsum(1)[:, :-1] > 0
        return live
