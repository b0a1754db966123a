"""Launching the Hopper kernel: which tensors it takes, and one call of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from maskdsl.codegen.build import load_module
from maskdsl.codegen.emit_hopper import emit_hopper
from maskdsl.codegen.emit_hopper_listed import emit_listed
from maskdsl.codegen.emit_hopper_sieve import LISTS, PAD
from maskdsl.codegen.hopper_cut import (
    GRAIN,
    HopperConfig,
    Schedule,
    head_groups,
    kinds_of,
    make_plans,
    parts_of,
    pick_hopper,
    pick_section,
    refuse_dims,
    schedule,
    value_parts,
)
from maskdsl.codegen.hopper_kernels import combine
from maskdsl.codegen.kept import make_kept, nothing
from maskdsl.codegen.plan import Plan
from maskdsl.codegen.planner import make_plan, mean_row_width
from maskdsl.codegen.tables import head_table
from maskdsl.codegen.tune import power_of_two
from maskdsl.dynamic import slots_of
from maskdsl.expr import Mask
from maskdsl.shape import Shape

if TYPE_CHECKING:
    from maskdsl.codegen.kernel import Call, OutputMaker


BY_SUM, BY_MAXIMUM, GIVEN_UP = 0, 1, 2  # what a launch does, as the kernel calls it
COUNTERS = 3  # of the queue, before its flags
LONG_SHARE = 256  # tiles of keys for each multiprocessor: about 0.2 ms
one_by_one = threading.Lock()


@lru_cache(maxsize=1)
def is_hopper() -> bool:
    """Whether the current GPU is a Hopper one."""
    return torch.version.hip is None and torch.cuda.get_device_capability()[0] == 9


def refuse_call(mask: Mask, q: torch.Tensor, v: torch.Tensor, fits: bool) -> str:
    """Why the Hopper kernel of a mask does not take tensors like these; "" where it does."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"{q.dtype} has no Hopper kernel"
    refused = refuse_dims(q.shape[3], v.shape[3], bool(slots_of(mask)))
    if not refused and not fits:
        return "bases or strides are no multiples of 16 bytes, or a stride is 0"
    return refused


def magic(divisor: int) -> tuple[int, int]:
    """(multiplier as a signed 32-bit number, shift) that divide by `divisor` without a division:
    n // divisor == (2 n * multiplier >> 32) >> shift for 0 <= n < 2**31."""
    shift = max(divisor - 1, 0).bit_length()
    multiplier = -(-(1 << (31 + shift)) // divisor)
    return multiplier - (1 << 32) * (multiplier >> 31), shift


class HopperForward:
    """The Hopper kernels of one mask."""

    def __init__(self, mask: Mask) -> None:
        self.mask = mask
        self.kinds = [one for _, one in kinds_of(mask)]
        self.modules: dict[HopperConfig, tuple[tuple[Plan, ...], Any]] = {}

    def default_plan(self, head_dim: int) -> Plan:
        """The plan for four query heads a key/value head, of the costliest kind of head."""
        return self.plans(self.default_config(head_dim))[0]

    def default_config(self, head_dim: int) -> HopperConfig:
        """The config for four query heads a key/value head; with call-time data for every query
        head of its own."""
        if slots_of(self.mask):
            from maskdsl.codegen.hopper_lists import pick_listed

            return pick_listed(self.mask, 4, 1, head_dim)
        return pick_hopper(self.mask, 4, head_dim)

    def plans(self, config: HopperConfig) -> tuple[Plan, ...]:
        """A plan for every kind of head, costliest first; one where call-time data decides."""
        if slots_of(self.mask):
            return (make_plan(self.mask, config.span, GRAIN, config.tile),)
        return make_plans(self.mask, config.span, config.tile)

    def source(self, config: HopperConfig) -> str:
        """The kernel file for one config."""
        plans = self.plans(config)
        if slots_of(self.mask):
            return emit_listed(plans[0])
        groups = map(len, head_groups(self.mask, config.heads_packed))
        return emit_hopper(*plans, groups=tuple(groups), computing=config.computing)

    def default_source(self, head_dim: int) -> str:
        """The kernel file for four query heads a key/value head."""
        return self.source(self.default_config(head_dim))

    def kernel(self, config: HopperConfig) -> tuple[tuple[Plan, ...], Any]:
        """Plans (costliest kind of head first) and JIT function for one config."""
        if config not in self.modules:
            self.modules[config] = self.plans(config), load_module(self.source(config)).forward
        return self.modules[config]

    def own_table(self, plan: Plan, config: HopperConfig, shape: Shape, programs: int,
                  device: torch.device) -> Callable[[], torch.Tensor]:
        """Makes what the mask needs in memory, int32: the heads by kind, or (anew for each launch)
        room for every program's lists of grains."""
        order = sum(head_groups(self.mask, config.heads_packed), ())
        table = head_table(order or (0,), device)
        if plan.sieve is None:
            return lambda: table
        size = programs * LISTS * (-(-shape.kv_len // GRAIN) + PAD)
        return lambda: torch.empty(size, dtype=torch.int32, device=device)

    def prepare(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: Shape,
                scale: float, make_out: OutputMaker, with_lse: bool,
                config: HopperConfig | None = None) -> Call:
        """A function of (q, k, v, data) for every call that looks like this one."""
        from maskdsl.codegen.hopper_listed import prepare_listed
        from maskdsl.codegen.kernel import rebase

        if slots_of(self.mask):
            return prepare_listed(self, q, k, v, shape, scale, make_out, with_lse, config)
        batch, heads, kv_heads = q.shape[0], q.shape[1], k.shape[1]
        group, device = heads // kv_heads, q.device
        config = config or pick_hopper(self.mask, group, q.shape[3], v.shape[3])
        plans, forward = self.kernel(config)
        groups = heads // config.heads_packed
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        section = pick_section(self.kinds[0], shape.kv_len,
                               k.element_size() * (k.shape[3] + v.shape[3]), groups * batch,
                               group // config.heads_packed)
        cut = schedule(plans[0], config, shape, groups * batch, section, processors, len(plans))
        made = describe_all(q, k, v, make_out(q)[1], config)
        grid = min(cut.items, processors)
        numbers = launch_numbers(cut, batch, groups, group, shape)
        modes = modes_of(self.kinds[0], config, cut, shape, processors, q.dtype)
        constants = constants_of(config, q.shape[3], v.shape[3], with_lse)
        rows = cut.split_count * config.span
        width = constants["V_PARTS"] * made[5].block_shape[3]  # of a row of a part
        sizes = (cut.splits * batch * heads * rows, width)

        own_table = self.own_table(plans[0], config, shape, grid, device)
        no_parts = nothing(torch.float32, device)  # of the type of real ones

        def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            result, out, lse = make_out(q)
            parts = part_lse = no_parts
            if cut.split_count:
                parts = torch.empty(sizes, dtype=torch.float32,
                                    device=device)
                part_lse = torch.empty(sizes[0], dtype=torch.float32, device=device)
            tensors = (q, k, v, k, v, out)
            boxes = [rebase(d, t) for d, t in zip(made, tensors, strict=True)]
            flags, own = queue(device, cut.items), own_table()
            with one_by_one:  # flags belong to one call of a stream at a time
                for mode in modes:
                    forward[(grid,)](*boxes, q if lse is None else lse, parts, part_lse, flags,
                                     own, mode, *numbers, scale, **constants)
            if cut.split_count:
                combine_parts(out, lse, parts, part_lse, cut, config.span, shape.q_len)
            return result

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, data: dict[str, Any]) -> Any:
            if device.index == torch.cuda.current_device():
                return launch(q, k, v)
            with torch.cuda.device(device):
                return launch(q, k, v)

        return call


def modes_of(mask: Mask, config: HopperConfig, cut: Schedule, shape: Shape, processors: int,
             dtype: torch.dtype) -> tuple[int, ...]:
    """The launches of a call: long ones leave out maxima, and end with a second launch for items
    that needed them, which mostly finds none. (fp16 weights would overflow.)"""
    tiles = cut.items * min(mean_row_width(mask), float(shape.kv_len)) / config.block_n
    if dtype == torch.bfloat16 and tiles >= LONG_SHARE * processors:
        return BY_SUM, GIVEN_UP
    return (BY_MAXIMUM,)


def launch_numbers(cut: Schedule, batch: int, groups: int, group: int,
                   shape: Shape) -> tuple[int, ...]:
    """The integers every kernel takes.

    groups  groups of heads of one batch entry, an item each; group: query heads a key/value head
    """
    return (cut.items, cut.q_tiles, groups * batch, groups, cut.section, cut.split_first,
            cut.split_count, cut.splits, group,
            *magic((cut.q_tiles - cut.split_count) * cut.section), *magic(cut.section),
            *magic(groups), shape.q_len, shape.kv_len, shape.q_offset, shape.total_len)


def combine_parts(out: torch.Tensor, lse: torch.Tensor | None, parts: torch.Tensor,
                  part_lse: torch.Tensor, cut: Schedule, span: int, q_len: int) -> None:
    """Join the results of the key ranges of cut items."""
    batch, heads, _, dim = out.shape
    width = parts.shape[1]
    rows, first = cut.split_count * span, cut.split_first * span
    block = 16
    combine[(-(-rows // block), heads, batch)](
        parts, part_lse, out, out if lse is None else lse, out.stride(0), out.stride(1),
        out.stride(2), heads, rows, first, q_len, cut.splits, DIM=dim, STRIDE=width,
        WIDTH=power_of_two(width), BLOCK=block, WITH_LSE=lse is not None)


def constants_of(config: HopperConfig, head_dim: int, value_dim: int,
                 with_lse: bool) -> dict[str, Any]:
    """The constexpr arguments and options of a launch."""
    return {"HEADS_PACKED": config.heads_packed, "SPAN": config.span, "NARROW": config.narrow,
            "BLOCK_N": config.block_n, "GRAIN": GRAIN, "K_SLOTS": config.k_slots,
            "V_SLOTS": config.v_slots, "K_PARTS": parts_of(head_dim, config.padded)[0],
            "V_PARTS": value_parts(head_dim, value_dim, config.padded)[0],
            "Q_LETTERS": config.letters, "WITH_LSE": with_lse, "REGISTERS": config.registers,
            # sixteen warps, two or three of them idle, share 64 Ki registers before they trade
            "num_warps": 4, "maxnreg": 128}


def blocks_of(config: HopperConfig, head_dim: int, value_dim: int) -> list[tuple[int, ...]]:
    """The boxes that TMA copies of q, k, v, grains of k and v, and the output."""
    packed = config.heads_packed
    item, tile, grain = (1, packed, 64 // packed), (1, 1, config.block_n), (1, 1, GRAIN)
    d = parts_of(head_dim, config.padded)[1]
    dv = value_parts(head_dim, value_dim, config.padded)[1]
    return [(*item, d), (*tile, d), (*tile, dv), (*grain, min(d, 64)), (*grain, min(dv, 64)),
            (*item, dv)]


def describe_all(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
                 config: HopperConfig) -> list[Any]:
    """TMA descriptors, templates for `rebase`."""
    blocks = blocks_of(config, q.shape[3], v.shape[3])
    return [describe(t, block) for t, block in zip((q, k, v, k, v, out), blocks, strict=True)]


def describe(t: torch.Tensor, block: tuple[int, ...]) -> Any:
    """One descriptor that does not keep the tensor alive; out of bounds reads give 0."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    dtype = gl.bfloat16 if t.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(list(block), dtype)
    row = 16 * -(-t.shape[3] // 16)  # any legal stride, for dimensions of one entry
    strides = [s if n > 1 else row for s, n in zip(t.stride()[:3], t.shape[:3], strict=True)]
    made = TensorDescriptor(t, list(t.shape), [*strides, 1], list(block), layout)
    made.base = None
    return made


_queues: dict[tuple[int, int], list[torch.Tensor]] = {}


def queue(device: torch.device, items: int = 0) -> torch.Tensor:
    """The queue's three counters and a flag for each of at least `items` items, 0 between calls.

    One for each stream, since launches on two streams may overlap; a graph under capture gets its
    own, since it may be replayed beside anything.
    """
    def zeros() -> torch.Tensor:
        return torch.zeros(COUNTERS + power_of_two(items), dtype=torch.int32, device=device)

    if torch.cuda.is_current_stream_capturing():
        return zeros()
    key = (device.index or 0, torch.cuda.current_stream(device).cuda_stream)
    if key not in _queues or len(_queues[key][-1]) < COUNTERS + items:
        # (one that has become too small is kept: a launch on the stream may still use it)
        _queues.setdefault(key, []).append(make_kept(zeros, device))
    return _queues[key][-1]
