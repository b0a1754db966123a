"""Launching the Hopper kernel: which calls it takes, how it is cut, and one call of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from maskdsl.codegen.build import load_module
from maskdsl.codegen.emit_hopper import emit_hopper, fits_letter
from maskdsl.codegen.hopper_kernels import combine
from maskdsl.codegen.plan import Plan
from maskdsl.codegen.planner import LONG, make_plan, mean_row_width
from maskdsl.codegen.tune import DENSE_WIDTH
from maskdsl.dynamic import slots_of
from maskdsl.expr import Mask
from maskdsl.heads import count_heads
from maskdsl.shape import Shape

if TYPE_CHECKING:
    from maskdsl.codegen.kernel import Call, OutputMaker

ROWS = 128  # of an item: two warp groups of 64
GRAIN, BLOCK_N = 32, 128  # keys of a grain (the bits of a word) and of a tile
TILE = BLOCK_N // GRAIN
L2_BYTES = 32 << 20  # keys and values of the heads that run side by side should fit the L2 cache
SHARE = 0.5  # an item longer than this part of one multiprocessor's work is cut along its keys
LEAST_SHARE = 16.0  # steps; joining the parts costs a launch
MAX_SPLITS = 64


@dataclass(frozen=True, slots=True)
class HopperConfig:
    """How the kernel is cut.

    heads_packed  query heads of an item; they share a key/value head and so its key tiles
    narrow        keys of an item's first tile; every other has BLOCK_N
    k_slots       tiles of keys in flight; v_slots: of values
    """

    heads_packed: int
    narrow: int
    k_slots: int
    v_slots: int
    registers: int = 232

    @property
    def span(self) -> int:
        """Positions of an item."""
        return ROWS // self.heads_packed


@lru_cache(maxsize=1)
def is_hopper() -> bool:
    """Whether the current GPU is a Hopper one."""
    return torch.version.hip is None and torch.cuda.get_device_capability()[0] == 9


@lru_cache(maxsize=256)
def refuse_mask(mask: Mask) -> str:
    """Why the Hopper kernel does not take a mask; "" where it does."""
    if count_heads(mask):
        return "the mask differs by kind of head"
    if slots_of(mask):
        return "the mask reads data that comes with the call"
    if make_plan(mask, 64, 64).sieve is not None:
        return "the mask has dead tiles inside its intervals, which only the portable kernel skips"
    if not fits_letter(make_plan(mask, ROWS // 4, GRAIN, TILE)):
        return "the mask has too many separate intervals"
    return ""


def refuse_call(q: torch.Tensor, v: torch.Tensor, fits: bool) -> str:
    """Why the Hopper kernel does not take tensors like these; "" where it does."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"{q.dtype} has no Hopper kernel"
    if max(q.shape[3], v.shape[3]) > 128:
        return f"head dimension {max(q.shape[3], v.shape[3])} is beyond 128"
    if width_of(v.shape[3]) > width_of(q.shape[3]):
        return "values are wider than queries"
    if not fits:
        return "bases or strides are no multiples of 16 bytes, or a stride is 0"
    return ""


def width_of(dim: int) -> int:
    """Elements of a row in shared memory: whole swizzle lines of 128 bytes."""
    return 64 if dim <= 64 else 128


@lru_cache(maxsize=256)
def pick_hopper(mask: Mask, group: int, head_dim: int) -> HopperConfig:
    """The config for a mask, heads per key/value head and head dimension."""
    packed = 1
    if not make_plan(mask, ROWS, GRAIN).needs_head:
        packed = next(n for n in (4, 2, 1) if group % n == 0)
    slots = (3, 2) if width_of(head_dim) == 128 else (3, 3)
    plan = make_plan(mask, ROWS // packed, GRAIN, TILE)
    return HopperConfig(packed, pick_narrow(plan), *slots)


def pick_narrow(plan: Plan) -> int:
    """The width of the first tile that leaves the fewest empty columns in a long call."""
    loose, _ = count_grains(plan, LONG)

    def columns(narrow: int) -> float:
        rest = np.maximum(loose - narrow // GRAIN, 0)
        return float((narrow + BLOCK_N * -(-rest // TILE)).mean())

    return min((128, 64, 32), key=columns)


def count_grains(plan: Plan, shape: Shape) -> tuple[Any, Any]:
    """(loose, full) grains of every query tile, int64[query tiles]."""
    values = plan.run_bounds(shape)
    like = np.zeros(len(values["p_first"]), dtype=np.int64)
    loose, full = (sum((stop - start for start, stop in plan.segments(which, values)), like)
                   for which in (plan.masked, plan.full))
    return loose, full


def count_steps(plan: Plan, config: HopperConfig, shape: Shape) -> Any:
    """Steps of every query tile after its first tile, int64[query tiles]."""
    loose, full = count_grains(plan, shape)
    masked = -(-np.maximum(loose - config.narrow // GRAIN, 0) // TILE)
    return np.maximum(masked + full // TILE, 1)


@dataclass(frozen=True, slots=True)
class Schedule:
    """How the items of a call are ordered and cut.

    section                   groups of heads that run side by side
    split_first, split_count  query tiles whose keys are cut into `splits` ranges
    """

    items: int
    q_tiles: int
    section: int
    split_first: int
    split_count: int
    splits: int


def schedule(plan: Plan, config: HopperConfig, shape: Shape, groups: int, section: int,
             processors: int) -> Schedule:
    """Cut the few long items (LastQ rows see the whole prompt), so that none is the tail.

    groups  groups of heads, all batch entries together
    """
    q_tiles = -(-shape.q_len // config.span)
    whole = Schedule(q_tiles * groups, q_tiles, section, 0, 0, 1)
    if plan.needs_head:
        return whole
    steps = count_steps(plan, config, shape) + 1
    share = max(float(steps.sum()) * groups / processors * SHARE, LEAST_SHARE)
    heavy = np.flatnonzero(steps > share)
    if not heavy.size or heavy[-1] - heavy[0] + 1 != heavy.size:
        return whole
    splits = min(-(-int(steps[heavy].max()) // int(share)), MAX_SPLITS,
                 int(steps[heavy].min()) - 1)
    if splits < 2 or heavy.size > q_tiles // 2:
        return whole
    items = (q_tiles - heavy.size) * groups + int(heavy.size) * groups * splits
    return Schedule(items, q_tiles, section, int(heavy[0]), int(heavy.size), splits)


def pick_section(mask: Mask, kv_len: int, row_bytes: int, groups: int, per_kv_head: int) -> int:
    """Groups of heads that run side by side: of a nearly dense mask only as many as keep their
    keys and values in the L2 cache, else all (H100: +5 % dense, -6 to -15 % on triangles)."""
    if mean_row_width(mask) < DENSE_WIDTH:
        return groups
    heads = max(1, L2_BYTES // max(kv_len * row_bytes, 1))
    most = min(groups, heads * per_kv_head)
    return next(n for n in range(most, 0, -1) if groups % n == 0)


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
        self.modules: dict[HopperConfig, tuple[Plan, Any]] = {}
        self.chosen: HopperConfig | None = None  # for trials; default: pick_hopper

    def config(self, group: int, head_dim: int) -> HopperConfig:
        """The config in use."""
        return self.chosen or pick_hopper(self.mask, group, head_dim)

    def kernel(self, config: HopperConfig) -> tuple[Plan, Any]:
        """Plan and JIT function for one config."""
        if config not in self.modules:
            plan = make_plan(self.mask, config.span, GRAIN, TILE)
            self.modules[config] = plan, load_module(emit_hopper(plan)).forward
        return self.modules[config]

    def prepare(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: Shape,
                scale: float, make_out: OutputMaker, with_lse: bool,
                config: HopperConfig | None = None) -> Call:
        """A function of (q, k, v, data) for every call that looks like this one."""
        from maskdsl.codegen.kernel import rebase

        batch, heads, kv_heads = q.shape[0], q.shape[1], k.shape[1]
        group, device = heads // kv_heads, q.device
        config = config or self.config(group, q.shape[3])
        plan, forward = self.kernel(config)
        groups = heads // config.heads_packed
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        section = pick_section(self.mask, shape.kv_len,
                               k.element_size() * (k.shape[3] + v.shape[3]), groups * batch,
                               group // config.heads_packed)
        cut = schedule(plan, config, shape, groups * batch, section, processors)
        made = describe_all(q, k, v, make_out(q)[1], config)
        grid = min(cut.items, processors)
        numbers = (cut.items, cut.q_tiles, groups * batch, groups, cut.section, cut.split_first,
                   cut.split_count, cut.splits, group,
                   *magic((cut.q_tiles - cut.split_count) * cut.section), *magic(cut.section),
                   *magic(groups), shape.q_len, shape.kv_len, shape.q_offset,
                   shape.total_len)
        constants = constants_of(config, with_lse)
        rows = cut.split_count * config.span
        sizes = (cut.splits * batch * heads * rows, v.shape[3])

        nothing = torch.empty(1, dtype=torch.float32, device=device)  # of the type of real parts

        def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            result, out, lse = make_out(q)
            parts = part_lse = nothing
            if cut.split_count:
                parts = torch.empty(sizes[0] * width_of(sizes[1]), dtype=torch.float32,
                                    device=device)
                part_lse = torch.empty(sizes[0], dtype=torch.float32, device=device)
            tensors = (q, k, v, k, v, out)
            forward[(grid,)](*(rebase(d, t) for d, t in zip(made, tensors, strict=True)),
                             q if lse is None else lse, parts, part_lse, queue(device),
                             *numbers, scale, **constants)
            if cut.split_count:
                combine_parts(out, lse, parts, part_lse, cut, config.span, shape.q_len)
            return result

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, data: dict[str, Any]) -> Any:
            if device.index == torch.cuda.current_device():
                return launch(q, k, v)
            with torch.cuda.device(device):
                return launch(q, k, v)

        return call


def combine_parts(out: torch.Tensor, lse: torch.Tensor | None, parts: torch.Tensor,
                  part_lse: torch.Tensor, cut: Schedule, span: int, q_len: int) -> None:
    """Join the results of the key ranges of cut items."""
    batch, heads, _, dim = out.shape
    rows, first = cut.split_count * span, cut.split_first * span
    block = 16
    combine[(-(-rows // block), heads, batch)](
        parts, part_lse, out, out if lse is None else lse, out.stride(0), out.stride(1),
        out.stride(2), heads, rows, first, q_len, cut.splits, DIM=dim, WIDTH=width_of(dim),
        BLOCK=block, WITH_LSE=lse is not None)


def constants_of(config: HopperConfig, with_lse: bool) -> dict[str, Any]:
    """The constexpr arguments and options of a launch."""
    return {"HEADS_PACKED": config.heads_packed, "SPAN": config.span, "NARROW": config.narrow,
            "BLOCK_N": BLOCK_N, "GRAIN": GRAIN, "K_SLOTS": config.k_slots,
            "V_SLOTS": config.v_slots, "WITH_LSE": with_lse, "REGISTERS": config.registers,
            # sixteen warps, the last three of them idle, share 64 Ki registers before they trade
            "num_warps": 4, "maxnreg": 128}


def blocks_of(config: HopperConfig, head_dim: int, value_dim: int) -> list[tuple[int, ...]]:
    """The boxes that TMA copies of q, k, v, grains of k and v, and the output."""
    half = max(config.heads_packed // 2, 1)
    item, tile, grain = (1, half, 64 // half), (1, 1, BLOCK_N), (1, 1, GRAIN)
    d, dv = width_of(head_dim), width_of(value_dim)
    return [(*item, d), (*tile, d), (*tile, dv), (*grain, 64), (*grain, 64), (*item, dv)]


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


_queues: dict[tuple[int, int], torch.Tensor] = {}


def queue(device: torch.device) -> torch.Tensor:
    """The queue's two counters, 0 between launches.

    A pair for each stream, since launches on two streams may overlap; a graph under capture gets
    its own, since it may be replayed beside anything.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, dtype=torch.int32, device=device)
    key = (device.index or 0, torch.cuda.current_stream(device).cuda_stream)
    if key not in _queues:
        _queues[key] = torch.zeros(2, dtype=torch.int32, device=device)
    return _queues[key]
