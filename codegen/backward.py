"""Launching the gradients' kernels: from tensors to dQ, dK, dV and those of score modifiers' data.

Made here: delta (float32, as large as the lse), lists of call-time data, and the gradients.
Gradients that nobody asked for are not computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from maskdsl.codegen.backward_cut import Cut, find_cuts
from maskdsl.codegen.backward_run import Run, without_keys
from maskdsl.codegen.build import load_module
from maskdsl.codegen.emit import emit_lister, merge_lists
from maskdsl.codegen.emit_backward import emit_backward
from maskdsl.codegen.emit_rows import emit_row_lister, lists_rows
from maskdsl.codegen.kept import remember
from maskdsl.codegen.kernel import Variant
from maskdsl.codegen.lists import group_heads, sort_atoms
from maskdsl.codegen.plan import Plan
from maskdsl.codegen.planner import make_plan, mean_row_width
from maskdsl.codegen.row_bounds import KeyPlan, make_key_plan
from maskdsl.codegen.tune import Config, pick_backward, score_config
from maskdsl.dynamic import TokenTopK, slots_of
from maskdsl.expr import Mask
from maskdsl.scores import ScoreMod
from maskdsl.settings import debug
from maskdsl.shape import Shape

if TYPE_CHECKING:
    from maskdsl.codegen.gradients import Backward

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class GradientKernels:
    """The kernels for one pair of configs.

    query     plans and what lists their tiles, as for forward
    by_key    the plans by key tile, one for each kind of head
    listers   for each of them, the function that lists query tiles, where there are any
    scored    plans by the tile of the kernels for score modifiers' data
    module    the emitted file
    cuts      the cut tiles of calls seen so far
    """

    query: Variant
    by_key: tuple[KeyPlan, ...]
    scored: tuple[Plan, ...]
    listers: tuple[Any, ...]
    module: Any
    cuts: dict[Any, tuple[Cut, Cut]] = field(default_factory=dict)

    @property
    def heads(self) -> tuple[int, ...]:
        """How many heads are of each kind; () for one kind."""
        return tuple(map(len, self.query.heads))

    def cut(self, shape: Shape, batch: int, heads: tuple[int, int], processors: int,
            row_bytes: tuple[int, int]) -> tuple[Cut, Cut]:
        """The query tiles and key tiles that are cut.

        heads      query heads, key/value heads
        row_bytes  bytes of the float32 sums of a query row and of a key
        """
        return remember(self.cuts, (shape, batch, heads, processors, row_bytes), lambda: find_cuts(
            self.query.plans, self.by_key, self.heads, (shape, batch, *heads, processors),
            row_bytes))


class TritonBackward:
    """The gradients' kernels of one mask."""

    def __init__(self, mask: Mask, config: Config | None,
                 scores: tuple[ScoreMod, ...] = ()) -> None:
        """config: the tile of both walks, where the user chose one."""
        self.mask, self.chosen, self.scores = mask, config, scores
        self.kinds = sorted(group_heads(mask), key=lambda kind: -mean_row_width(kind[1]))
        self.width = mean_row_width(self.kinds[0][1])
        self.made: dict[tuple[Config, Config], GradientKernels] = {}

    def configs(self, arch: str, head_dim: int, value_dim: int,
                item_size: int) -> tuple[Config, Config]:
        """The configs of the walks by query tile and by key tile."""
        if self.chosen is not None:
            return self.chosen, self.chosen
        more = len(self.kinds) > 1 or any(sort_atoms(one).listed for _, one in self.kinds)
        by_row = any(isinstance(atom, TokenTopK) for atom in slots_of(self.mask))
        return pick_backward(arch, head_dim, value_dim, item_size, more, self.width,
                             by_row or bool(self.scores))

    def plans(self, config: Config) -> tuple[Plan, ...]:
        """A plan for each kind of head; all of them read one list of columns."""
        plans = tuple(make_plan(one, config.block_m, config.block_n) for _, one in self.kinds)
        columns = merge_lists(plans).columns
        return tuple(replace(plan, scores=self.scores, lists=replace(plan.lists, columns=columns))
                     for plan in plans)

    def source(self, by_query: Config, by_key: Config) -> str:
        """The kernel file for two configs."""
        heads = tuple(len(heads) for heads, _ in self.kinds if heads)
        return emit_backward(self.plans(by_query), tuple(map(make_key_plan, self.plans(by_key))),
                             self.plans(score_config(by_key)), heads)

    def kernels(self, by_query: Config, by_key: Config) -> GradientKernels:
        """The kernels for two configs, written on first use."""
        if (by_query, by_key) not in self.made:
            heads = tuple(heads for heads, _ in self.kinds if heads)
            plans = self.plans(by_query)
            by_keys = tuple(map(make_key_plan, self.plans(by_key)))
            scored = self.plans(score_config(by_key))
            module = load_module(self.source(by_query, by_key))
            tiles = tuple(load_module(emit_lister(plan)).list_tiles if plan.lists.tables else None
                          for plan in plans)
            rows = tuple(load_module(emit_row_lister(one)).list_rows
                         if lists_rows(one.plan.lists) else None for one in by_keys)
            query = Variant(plans, heads, by_query, module.query_gradients, {}, tiles)
            self.made[by_query, by_key] = GradientKernels(query, by_keys, scored, rows, module)
            debug(1, f"backward of {self.mask!r}: {by_query} by query, {by_key} by key")
        return self.made[by_query, by_key]

    def run(self, call: Backward, tensors: tuple[Tensor, ...], grad_out: Tensor,
            grad_lse: Tensor | None, wanted: tuple[bool, bool],
            data: dict[str, Any] | None = None,
            names: frozenset[str] = frozenset()) -> tuple[Tensor | None, ...]:
        """(dq, dk, dv) as [B, H, L, D], None where not wanted; and the gradients of the score
        modifiers' data, in order, None where not in `names`.

        tensors   q, k, v, output, all [B, H, L, D] views, and the lse, float32 [B, Hq, Lq]
        grad_lse  float32 [B, Hq, Lq], contiguous
        wanted    dq; dk and dv
        data      call-time data of slots and score modifiers, by name
        """
        given = [(data or {})[mod.name] if mod.name in names else None for mod in self.scores
                 if mod.name]
        if not tensors[0].numel() or not call.shape.kv_len:
            return (*(torch.zeros_like(t) for t in tensors[:3]), *without_keys(
                self.scores, given, grad_lse))
        return Run(self, call, tensors, grad_out, grad_lse, data or {}, wanted, names).gradients()


@lru_cache(maxsize=256)
def backward_of(mask: Mask, config: Config | None,
                scores: tuple[ScoreMod, ...] = ()) -> TritonBackward:
    """The gradients' kernels of a mask; calls of many shapes share them."""
    return TritonBackward(mask, config, scores)
