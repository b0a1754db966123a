"""One backward pass: delta, then each gradient that is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from maskdsl.codegen.backward_cut import Cut
from maskdsl.codegen.emit import merge_lists
from maskdsl.codegen.emit_backward import end_names, key_parameters, query_parameters
from maskdsl.codegen.emit_score_gradients import score_gradient_parameters
from maskdsl.codegen.emit_scores import score_arguments
from maskdsl.codegen.kernel import (
    LEAST_SCALE,
    LOG2_E,
    arch_of,
    common_alignment,
    describe,
    fits_tma,
    kernel_constants,
    live_strides,
    slot_arguments,
)
from maskdsl.codegen.row_tables import RowTables
from maskdsl.codegen.tables import CallPlan, head_table
from maskdsl.codegen.tune import Config, score_config
from maskdsl.scores import RelativePosition, ScoreMod, SinkLogits

if TYPE_CHECKING:
    from maskdsl.codegen.backward import TritonBackward
    from maskdsl.codegen.gradients import Backward

Tensor = torch.Tensor
DELTA_ROWS = 32  # query rows a program of `sum_rows`; not measured
PART_ROWS = 16  # rows a program of `sum_parts`: divides every tile


class Run:
    """One backward pass: delta, then each gradient that is asked for."""

    def __init__(self, made: TritonBackward, call: Backward, tensors: tuple[Tensor, ...],
                 grad_out: Tensor, grad_lse: Tensor | None, data: dict[str, Any],
                 wanted: tuple[bool, bool], names: frozenset[str]) -> None:
        """Arguments as of `TritonBackward.run`."""
        q, k, v, out, lse = tensors
        self.wanted, self.names, self.grad = wanted, names, grad_out
        self.made, self.call, self.data = made, call, data
        self.q, self.k, self.v, self.lse = q, k, v, lse
        self.by_query, self.by_key = made.configs(arch_of(q.device), q.shape[3], v.shape[3],
                                                  q.dtype.itemsize)
        self.kernels = made.kernels(self.by_query, self.by_key)
        tables = any(isinstance(mod, RelativePosition) and mod.name in names
                     for mod in made.scores)
        self.fresh = {name: empty_rows(t) for name, t, asked in (
            ("dq", q, wanted[0] or tables), ("dk", k, wanted[1]), ("dv", v, wanted[1])) if asked}
        strides = {name: live_strides(t) for name, t in (
            ("q", q), ("k", k), ("v", v), ("o", out), ("g", grad_out), *self.fresh.items())}
        self.align = common_alignment(list(strides.values()))
        self.constants = backward_constants(self.by_query, q.dtype, q.shape[3], v.shape[3],
                                            self.align)  # but for the tile those of all kernels
        self.strides = strides
        self.steps = {name: [s // self.align for s in three] for name, three in strides.items()}
        batch, heads = q.shape[:2]
        shape = call.shape
        self.sizes = (batch * heads, heads, heads // k.shape[1], shape.q_len, shape.kv_len,
                      shape.q_offset, shape.total_len)
        self.scales = {"scale_log2": max(call.scale, LEAST_SCALE) * LOG2_E, "scale": call.scale}
        self.cuts = self.kernels.cut(shape, batch, (heads, k.shape[1]), processors_of(q.device), (
            4 * self.constants["QK_BLOCK"],
            4 * (self.constants["QK_BLOCK"] + self.constants["V_BLOCK"])))
        self.delta = torch.empty_like(lse)
        self.kernels.module.sum_rows[(-(-shape.q_len // DELTA_ROWS) * batch * heads,)](
            out, grad_out, lse, self.delta if grad_lse is None else grad_lse, self.delta,
            *self.steps["o"], *self.steps["g"], batch * heads, heads, shape.q_len,
            **row_constants(v.shape[3], self.align, grad_lse is not None))
        fits = {name: fits_tma(t, strides[name])
                for name, t in (("q", q), ("k", k), ("v", v), ("g", grad_out))}
        # Copies are for loops that run ahead of them. Modified scores of rows beyond the last may
        # overflow, and inf * 0 is not 0.
        self.copied = (fits["k"] and fits["v"] and self.by_query.stages > 1,
                       fits["q"] and fits["g"] and fits_rows(lse) and not made.scores
                       and self.by_key.stages > 1)
        self.inputs = (q, k, v, grad_out, lse, self.delta)
        self.shared = [s for name in "qkvg" for s in self.steps[name]]
        self.scores = score_arguments(made.scores, data, heads, q.device)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """As `TritonBackward.run`."""
        wanted, names = self.wanted, self.names
        ends = self.query_gradients() if "dq" in self.fresh else {}
        more: dict[str, Any] = {}
        if wanted[1] or names - {mod.name for mod in self.made.scores
                                 if isinstance(mod, SinkLogits)}:
            more = self.key_arguments()
        if wanted[1]:
            self.key_gradients(more)
        found = [self.data_gradient(i, mod, more, ends) if mod.name in names else None
                 for i, mod in enumerate(self.made.scores) if mod.name]
        dq = self.fresh["dq"] if wanted[0] else None
        return dq, self.fresh.get("dk"), self.fresh.get("dv"), *found

    def query_inputs(self) -> tuple[Any, ...]:
        """The tensors that `query_gradients` reads; what the hardware copies, as descriptors."""
        q, k, v, *rest = self.inputs
        if not self.copied[0]:
            return self.inputs
        size = self.by_query.block_n
        return (q, self.tiles_of(k, "k", size, "QK_BLOCK"), self.tiles_of(v, "v", size, "V_BLOCK"),
                *rest)

    def key_inputs(self) -> tuple[Any, ...]:
        """The tensors that `key_gradients` reads; what the hardware copies, as descriptors."""
        q, k, v, grad, *rows = self.inputs
        if not self.copied[1]:
            return self.inputs
        size = self.by_key.block_m
        return (self.tiles_of(q, "q", size, "QK_BLOCK"), k, v,
                self.tiles_of(grad, "g", size, "V_BLOCK"),
                *(describe_rows(t, size) for t in rows))

    def tiles_of(self, t: Tensor, name: str, rows: int, size: str) -> Any:
        """A descriptor of tiles of some rows of one head."""
        made = describe(t, self.strides[name], rows, self.constants[size])
        made.base = t
        return made

    def query_gradients(self) -> dict[str, Tensor]:
        """dQ; the sums of the ends of tables of distances, float32 [B, Hq, Lq] by name."""
        query, shape = self.kernels.query, self.call.shape
        found = query_parameters(query.plans, self.kernels.heads)
        ends = {f"{name}_ptr": torch.empty_like(self.lse)
                for name in end_names(self.made.scores, "")}
        ours = [p for p in found if p.name not in ends]
        more = slot_arguments(query, ours, self.data, shape, self.q.shape[1], self.q, self.k,
                              self.v) if ours else []
        cut, tiles = self.cuts[0], -(-shape.q_len // self.by_query.block_m)
        parts = self.room_for_parts(cut, self.by_query.block_m, self.sizes[0], "QK_BLOCK")
        query.forward[(cut.programs(tiles) * self.sizes[0],)](
            *self.query_inputs(), self.fresh["dq"], parts, *self.shared, *self.steps["dq"],
            *self.sizes, *cut.numbers, **dict(zip((p.name for p in ours), more, strict=True)),
            **ends, **self.scales, **self.options(self.by_query), USE_TMA=self.copied[0])
        self.add_parts(cut, self.by_query.block_m, parts, "dq", self.call.scale)
        return ends

    def room_for_parts(self, cut: Cut, block: int, groups: int, size: str) -> Tensor:
        """Room for the parts of cut tiles of `groups` heads; any float32 tensor for none."""
        if not cut.count:
            return self.delta
        return torch.empty(cut.parts * groups * cut.count * block * self.constants[size],
                           dtype=torch.float32, device=self.q.device)

    def add_parts(self, cut: Cut, block: int, parts: Tensor, name: str, factor: float) -> None:
        """Add up the parts of the cut tiles of one gradient."""
        if not cut.count:
            return
        made, rows = self.fresh[name], cut.count * block
        groups, size = made.shape[0] * made.shape[1], "V_BLOCK" if name == "dv" else "QK_BLOCK"
        self.kernels.module.sum_parts[(rows // PART_ROWS * groups,)](
            parts, made, *self.steps[name], groups, made.shape[1], made.shape[2],
            cut.first * block, rows, cut.parts, factor, DIM=made.shape[3],
            BLOCK=self.constants[size], BLOCK_M=PART_ROWS, ALIGN=self.align)

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
        heads, inputs = self.q.shape[0] * self.k.shape[1], self.key_inputs()
        more = {p.name: data[p.name] for p in key_parameters(plans, kernels.heads)}
        if "columns_list" in more:
            kernels.module.column_gradients[
                (-(-data["columns_capacity"] // config.block_n) * heads,)](
                *self.inputs, *self.shared, *self.sizes, **more, **self.scales,
                **self.options(config), USE_TMA=False)
        cut, tiles = self.cuts[1], -(-shape.kv_len // config.block_n)
        key_parts, value_parts = (self.room_for_parts(cut, config.block_n, heads, size)
                                  for size in ("QK_BLOCK", "V_BLOCK"))
        kernels.module.key_gradients[(cut.programs(tiles) * heads,)](
            *inputs, self.fresh["dk"], self.fresh["dv"], key_parts, value_parts,
            *self.shared, *self.steps["dk"], *self.steps["dv"], *self.sizes, *cut.numbers, **more,
            **self.scales, **self.options(config), USE_TMA=self.copied[1])
        self.add_parts(cut, config.block_n, key_parts, "dk", self.call.scale)
        self.add_parts(cut, config.block_n, value_parts, "dv", 1.0)

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
        return {**self.constants, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
                "STAGES": config.stages, "num_warps": config.warps, "num_stages": config.stages}


def fits_rows(t: Tensor) -> bool:
    """Whether the hardware can copy stretches of the rows' numbers, float32 [B, H, L]: aligned."""
    return t.data_ptr() % 16 == 0 and t.shape[2] % 4 == 0


def describe_rows(t: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of stretches of the rows' numbers, float32 [B, H, L]."""
    heads, length = t.shape[0] * t.shape[1], t.shape[2]
    return TensorDescriptor(t, [heads, length], [length, 1], [1, rows])


def processors_of(device: torch.device) -> int:
    """Multiprocessors of a GPU; of an H100 in the interpreter."""
    if device.type == "cpu":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def without_keys(scores: tuple[ScoreMod, ...], given: list[Tensor | None],
                 grad_lse: Tensor | None) -> list[Tensor | None]:
    """The gradients of score modifiers' data where no row has a key: of sink logits the lse's."""
    found = [None if t is None else torch.zeros_like(t) for t in given]
    for i, mod in enumerate(mod for mod in scores if mod.name):
        made = found[i]
        if isinstance(mod, SinkLogits) and made is not None and grad_lse is not None:
            found[i] = grad_lse.sum((0, 2)).to(made.dtype)
    return found


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
