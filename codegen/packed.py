"""Lists of which only the sizes are known: the host's view of call-time data.

What a list holds is known on the device alone, and reading it back would make the host wait. For a
decision before the call each list is taken as packed as tightly as estimators like to make them:
the first columns, the smallest distances, the blocks next to the diagonal. Lists whose entries lie
apart fill more tiles and cost more, so this errs towards the sparse kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from maskdsl.codegen.call_data import Bools, HeadData, Table
from maskdsl.codegen.cost import Prediction, predict
from maskdsl.codegen.forecast import HOPPER, forecast, tile_on
from maskdsl.codegen.lists import blocks_of, group_heads, sort_atoms
from maskdsl.codegen.planner import make_plan
from maskdsl.codegen.rates import Rates
from maskdsl.codegen.visits import Visited, count_visits
from maskdsl.codegen.workload import CallHeads
from maskdsl.dynamic import ListMask, VerticalSlash
from maskdsl.errors import MissingSlotError
from maskdsl.expr import Mask
from maskdsl.indices import BlockIndices, ColumnIndices, ListSizes, VSIndices
from maskdsl.shape import Shape
from maskdsl.tiles import Ints

PACKED = "lists known by size alone, taken as packed: first columns, nearest slashes and blocks"


def sizes_of(value: Any) -> ListSizes | None:
    """The sizes of one slot's lists, from shapes alone; None where shapes do not tell (boolean
    block masks, lists of pairs)."""
    if isinstance(value, ListSizes):
        return value
    if isinstance(value, VSIndices):
        return ListSizes(columns=value.vertical.shape[-1], slashes=value.slash.shape[-1])
    if isinstance(value, ColumnIndices):
        return ListSizes(columns=value.index.shape[-1])
    if isinstance(value, BlockIndices) and value.row is None and value.index.dtype.itemsize > 1:
        return ListSizes(blocks=value.index.shape[-1])
    return None


class PackedData(HeadData):
    """`HeadData` made from sizes. Documents count as one, prefixes as empty."""

    def __init__(self, sizes: Mapping[str, ListSizes], shape: Shape) -> None:
        super().__init__({}, shape, 0, 0, 1)
        self.sizes = sizes

    @property
    def bound(self) -> Any:
        """No data: `names_of` takes its defaults."""
        return None

    def columns(self, atom: ListMask) -> Ints:
        """The first columns."""
        return np.arange(min(self.sizes[atom.slot].columns, self.shape.kv_len), dtype=np.int64)

    def slashes(self, atom: ListMask) -> Ints:
        """The smallest distances."""
        return np.arange(min(self.sizes[atom.slot].slashes, self.reach), dtype=np.int64)

    def table(self, atom: ListMask) -> Table:
        """The blocks that end at the diagonal."""
        sizes = self.sizes[atom.slot]
        wide = isinstance(atom, VerticalSlash)
        return NearTable(blocks_of(atom), sizes.slashes + 63 if wide else sizes.blocks, self.shape)


class NearTable(Table):
    """For every row of blocks the `most` key blocks that end at its last row's own key."""

    def __init__(self, blocks: tuple[int, int], most: int, shape: Shape) -> None:
        super().__init__(None, (0, 0), blocks, shape)
        self.most, self.shape = most, shape

    def rows(self, first: int, stop: int) -> Bools:
        """bool[stop - first, columns]."""
        last = np.minimum(np.arange(first + 1, stop + 1) * self.blocks[0], self.shape.q_len) - 1
        near = (last + self.shape.q_offset)[:, None] // self.blocks[1]
        block = np.arange(self.columns)
        live: Bools = (block <= near) & (block > near - self.most)
        return live


def can_size(mask: Mask, slots: Mapping[str, Any]) -> dict[str, ListSizes] | str:
    """The sizes of all lists of the mask, or the name of a slot whose data does not tell."""
    found = {}
    for atom in sort_atoms(mask).atoms:
        if isinstance(atom, ListMask):
            if atom.slot not in slots:
                raise MissingSlotError("a choice without sizes", f"{atom!r} needs its data, or the "
                                       "sizes of its lists", f"{atom.slot}=ListSizes(...)")
            sizes = sizes_of(slots[atom.slot])
            if sizes is None:
                return atom.slot
            found[atom.slot] = sizes
    return found


def predict_packed(mask: Mask, rates: Rates, shape: Shape, call: CallHeads,
                   sizes: Mapping[str, ListSizes], estimator: str | None = None) -> Prediction:
    """The prediction for a simplified mask whose lists are known by size alone."""
    if rates.target == HOPPER:  # which takes no lists
        return forecast(mask, rates, shape, call, estimator=estimator).prediction
    tile = tile_on(mask, rates.arch, call)
    total = Visited()
    for heads, one in group_heads(mask):
        visited = count_visits(make_plan(one, *tile), shape, PackedData(sizes, shape))
        total = total.plus(visited, call.batch * (len(heads) or call.heads))
    listed = sort_atoms(mask).listed
    found = predict(rates, tile, shape, call, total, None, listed, estimator)
    return replace(found, notes=(*found.notes, PACKED)) if listed else found
