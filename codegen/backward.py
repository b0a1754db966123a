"""Launching the gradients' kernels: from tensors to dQ, dK, dV and those of score modifiers' data.

Made here: delta (float32, as large as the lse), lists of call-time data, and the gradients.
Gradients that nobody asked for are not computed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from maskdsl.codegen.build import load_module
from maskdsl.codegen.emit import emit_lister, merge_lists
from maskdsl.codegen.emit_backward import (
    emit_backward,
    end_names,
    key_parameters,
    query_parameters,
)
from maskdsl.codegen.emit_rows import emit_row_lister, lists_rows
from maskdsl.codegen.emit_score_gradients import score_gradient_parameters
from maskdsl.codegen.emit_scores import score_arguments
from maskdsl.codegen.kernel import (
    LEAST_SCALE,
    LOG2_E,
    Variant,
    arch_of,
    common_alignment,
    kernel_constants,
    live_strides,
    slot_arguments,
)
from maskdsl.codegen.lists import group_heads, sort_atoms
from maskdsl.codegen.plan import Plan
from maskdsl.codegen.planner import make_plan, mean_row_width
from maskdsl.codegen.row_bounds import KeyPlan, make_key_plan
from maskdsl.codegen.row_tables import RowTables
from maskdsl.codegen.tables import CallPlan, head_table
from maskdsl.codegen.tune import Config, pick_backward
from maskdsl.expr import Mask
from maskdsl.scores import RelativePosition, ScoreMod, SinkLogits
from maskdsl.settings import debug

if TYPE_CHECKING:
    from maskdsl.codegen.gradients import Backward

Tensor = torch.Tensor
DELTA_ROWS = 32  # query rows a program of `sum_rows`; not measured


@dataclass(frozen=True, slots=True)
class GradientKernels:
    """The kernels for one pair of configs.

    query     plans and what lists their tiles, as for forward
    by_key    the plans by key tile, one for each kind of head
    listers   for each of them, the function that lists query tiles, where there are any
    scored    plans by the tile of the kernels for score modifiers' data
    module    the emitted file
    """

    query: Variant
    by_key: tuple[KeyPlan, ...]
    scored: tuple[Plan, ...]
    listers: tuple[Any, ...]
    module: Any

    @property
    def heads(self) -> tuple[int, ...]:
        """How many heads are of each kind; () for one kind."""
        return tuple(map(len, self.query.heads))


class TritonBackward:
    """The gradients' kernels of one mask."""

    def __init__(self, mask: Mask, config: Config | None,
                 scores: tuple[ScoreMod, ...] = ()) -> None:
        """config: the tile of both walks, where the user chose one."""
        self.mask, self.chosen, self.scores = mask, config, scores
        self.kinds = sorted(group_heads(mask), key=lambda kind: -mean_row_width(kind[1]))
        self.made: dict[tuple[Config, Config], GradientKernels] = {}

    def configs(self, arch: str, head_dim: int, value_dim: int,
                item_size: int) -> tuple[Config, Config]:
        """The configs of the walks by query tile and by key tile."""
        if self.chosen is not None:
            return self.chosen, self.chosen
        more = bool(self.scores) or len(self.kinds) > 1 or any(
            sort_atoms(one).listed for _, one in self.kinds)
        return pick_backward(arch, head_dim, value_dim, item_size, more)

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
        return Run(self, call, tensors, grad_out, grad_lse, data or {}).gradients(
            wanted, names)


class Run:
    """One backward pass: delta, then each gradient that is asked for."""

    def __init__(self, made: TritonBackward, call: Backward, tensors: tuple[Tensor, ...],
                 grad_out: Tensor, grad_lse: Tensor | None, data: dict[str, Any]) -> None:
        q, k, v, out, lse = tensors
        self.made, self.call, self.data = made, call, data
        self.q, self.k, self.v, self.lse = q, k, v, lse
        self.by_query, self.by_key = made.configs(arch_of(q.device), q.shape[3], v.shape[3],
                                                  q.dtype.itemsize)
        self.kernels = made.kernels(self.by_query, self.by_key)
        self.fresh = {"dq": empty_rows(q), "dk": empty_rows(k), "dv": empty_rows(v)}
        strides = {name: live_strides(t) for name, t in (
            ("q", q), ("k", k), ("v", v), ("o", out), ("g", grad_out), *self.fresh.items())}
        self.align = common_alignment(list(strides.values()))
        self.steps = {name: [s // self.align for s in three] for name, three in strides.items()}
        batch, heads = q.shape[:2]
        shape = call.shape
        self.sizes = (batch * heads, heads, heads // k.shape[1], shape.q_len, shape.kv_len,
                      shape.q_offset, shape.total_len)
        self.scales = {"scale_log2": max(call.scale, LEAST_SCALE) * LOG2_E, "scale": call.scale}
        self.delta = torch.empty_like(lse)
        self.kernels.module.sum_rows[(-(-shape.q_len // DELTA_ROWS) * batch * heads,)](
            out, grad_out, lse, self.delta if grad_lse is None else grad_lse, self.delta,
            *self.steps["o"], *self.steps["g"], batch * heads, heads, shape.q_len,
            **row_constants(v.shape[3], self.align, grad_lse is not None))
        self.inputs = (q, k, v, grad_out, lse, self.delta)
        self.shared = [s for name in "qkvg" for s in self.steps[name]]
        self.scores = score_arguments(made.scores, data, heads, q.device)

    def gradients(self, wanted: tuple[bool, bool],
                  names: frozenset[str]) -> tuple[Tensor | None, ...]:
        """As `TritonBackward.run`."""
        tables = any(isinstance(mod, RelativePosition) and mod.name in names
                     for mod in self.made.scores)
        ends = self.query_gradients() if wanted[0] or tables else {}
        more: dict[str, Any] = {}
        if wanted[1] or names - {mod.name for mod in self.made.scores
                                 if isinstance(mod, SinkLogits)}:
            more = self.key_arguments()
        if wanted[1]:
            self.key_gradients(more)
        found = [self.data_gradient(i, mod, more, ends) if mod.name in names else None
                 for i, mod in enumerate(self.made.scores) if mod.name]
        dq, dk, dv = (self.fresh[name] if asked else None for name, asked in
                      (("dq", wanted[0]), ("dk", wanted[1]), ("dv", wanted[1])))
        return dq, dk, dv, *found

    def query_gradients(self) -> dict[str, Tensor]:
        """dQ; the sums of the ends of tables of distances, float32 [B, Hq, Lq] by name."""
        query, shape = self.kernels.query, self.call.shape
        found = query_parameters(query.plans, self.kernels.heads)
        ends = {f"{name}_ptr": torch.empty_like(self.lse)
                for name in end_names(self.made.scores, "")}
        ours = [p for p in found if p.name not in ends]
        more = slot_arguments(query, ours, self.data, shape, self.q.shape[1], self.q, self.k,
                              self.v) if ours else []
        query.forward[(-(-shape.q_len // self.by_query.block_m) * self.sizes[0],)](
            *self.inputs, self.fresh["dq"], *self.shared, *self.steps["dq"], *self.sizes,
            **dict(zip((p.name for p in ours), more, strict=True)), **ends, **self.scales,
            **self.options(self.by_query))
        return ends

    def key_arguments(self) -> dict[str, Any]:
        """What the kernels that loop over heads take of the call's data."""
        kernels, config = self.kernels, self.by_key
        plans = tuple(one.plan for one in kernels.by_key)
        lists = merge_lists(plans)
        by_head = bool(kernels.heads) or any(plan.lists.by_head for plan in plans)
        options = self.options(config)
        tables = RowTables(CallPlan(lists, self.call.shape, self.q.shape[0], self.q.shape[1],
                                    (config.block_m, config.block_n), by_head), self.data)
        found = tables.arguments_for(kernels.listers, kernels.by_key, kernels.query.heads, (
            self.k.shape[1], options["QK_BLOCK"], options["V_BLOCK"])) | self.scores
        if kernels.heads:
            kinds = {head: i for i, heads in enumerate(kernels.query.heads) for head in heads}
            found["head_kinds"] = head_table(tuple(kinds[h] for h in range(len(kinds))),
                                             self.q.device)
        return found

    def key_gradients(self, data: dict[str, Any]) -> None:
        """dK and dV; before them, what loose columns get."""
        kernels, config, shape = self.kernels, self.by_key, self.call.shape
        plans = tuple(one.plan for one in kernels.by_key)
        heads = self.q.shape[0] * self.k.shape[1]
        more = {p.name: data[p.name] for p in key_parameters(plans, kernels.heads)}
        if "columns_list" in more:
            kernels.module.column_gradients[
                (-(-data["columns_capacity"] // config.block_n) * heads,)](
                *self.inputs, *self.shared, *self.sizes, **more, **self.scales,
                **self.options(config))
        kernels.module.key_gradients[(-(-shape.kv_len // config.block_n) * heads,)](
            *self.inputs, self.fresh["dk"], self.fresh["dv"], *self.shared, *self.steps["dk"],
            *self.steps["dv"], *self.sizes, **more, **self.scales, **self.options(config))

    def data_gradient(self, i: int, mod: ScoreMod, data: dict[str, Any],
                      ends: dict[str, Tensor]) -> Tensor:
        """The gradient of what modifier i was given."""
        given: Tensor = self.data[mod.name]
        if isinstance(mod, SinkLogits):
            # a pair without a value: P (0 - delta), summed over all rows
            share = torch.exp(given.float()[:, None] - self.lse).nan_to_num(0.0)
            return -(share * self.delta).sum((0, 2)).to(given.dtype)
        found = score_gradient_parameters(self.kernels.scored, self.kernels.heads)
        config = score_config(self.by_key)
        table = isinstance(mod, RelativePosition)
        own = (1, given.shape[0]) if table else (given.shape[0], given.shape[1])
        made = torch.zeros(given.shape, dtype=torch.float32, device=given.device) if table else \
            torch.empty(given.shape, dtype=given.dtype, device=given.device)
        tiles = -(-max(given.shape[1] - 2, 0) // config.block_n) if table else \
            -(-self.call.shape.q_len // config.block_m) * -(-self.call.shape.kv_len
                                                           // config.block_n)
        if tiles:
            launch = getattr(self.kernels.module, f"{'table' if table else 'bias'}_gradients{i}")
            launch[(tiles * own[0] * own[1],)](
                *self.inputs, made, *self.shared, *self.sizes, *own,
                **{p.name: data[p.name] for p in found}, **self.scales, **self.options(config))
        if table:
            for end, place in (("low", 0), ("high", -1)):
                rows = ends[f"score{i}_{end}_ptr"].sum((0, 2))
                made[:, place] += rows if own[1] > 1 else rows.sum()
        return made.to(given.dtype)

    def options(self, config: Config) -> dict[str, Any]:
        """Constants and launch options of one kernel."""
        return {**backward_constants(config, self.q.dtype, self.q.shape[3], self.v.shape[3],
                                     self.align),
                "num_warps": config.warps, "num_stages": config.stages}


def score_config(config: Config) -> Config:
    """The config of the kernels for score modifiers' data: no more rows than keys a tile. Small
    tiles do not spill (compiled)."""
    block = min(config.block_n, 32)
    return replace(config, block_m=min(config.block_m, 16), block_n=block, warps=4, stages=1)


def without_keys(scores: tuple[ScoreMod, ...], given: list[Tensor | None],
                 grad_lse: Tensor | None) -> list[Tensor | None]:
    """The gradients of score modifiers' data where no row has a key: of sink logits the lse's."""
    found = [None if t is None else torch.zeros_like(t) for t in given]
    for i, mod in enumerate(mod for mod in scores if mod.name):
        made = found[i]
        if isinstance(mod, SinkLogits) and made is not None and grad_lse is not None:
            found[i] = grad_lse.sum((0, 2)).to(made.dtype)
    return found


@lru_cache(maxsize=256)
def backward_of(mask: Mask, config: Config | None,
                scores: tuple[ScoreMod, ...] = ()) -> TritonBackward:
    """The gradients' kernels of a mask; calls of many shapes share them."""
    return TritonBackward(mask, config, scores)


def empty_rows(t: Tensor) -> Tensor:
    """An empty tensor like `t`, with a contiguous last dimension."""
    made = torch.empty_like(t)
    return made if made.stride(3) == 1 else torch.empty(t.shape, dtype=t.dtype, device=t.device)


def backward_constants(config: Config, dtype: torch.dtype, head_dim: int, value_dim: int,
                       align: int) -> dict[str, Any]:
    """The constexpr arguments of `query_gradients` and `key_gradients`."""
    constants = kernel_constants(config, dtype, head_dim, value_dim, align, False, False)
    return {name: value for name, value in constants.items()
            if name not in ("USE_TMA", "WITH_LSE")}


def row_constants(value_dim: int, align: int, with_lse: bool) -> dict[str, Any]:
    """The constexpr arguments of `sum_rows`."""
    return {"VALUE_DIM": value_dim, "V_BLOCK": 1 << (value_dim - 1).bit_length(),
            "BLOCK_M": DELTA_ROWS, "ALIGN": align, "WITH_LSE": with_lse}
