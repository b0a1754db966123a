"""The Hopper backward in one pass: dQ, dK and dV of masks that are nearly dense, by atomic sums."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch

from maskdsl.codegen.build import load_module
from maskdsl.codegen.emit_hopper_onepass import emit_one_pass, fits_letter
from maskdsl.codegen.hopper import describe
from maskdsl.codegen.hopper_backward_cut import PASS_ROWS, count_tiles, plan_by_key
from maskdsl.codegen.hopper_cut import ROWS
from maskdsl.codegen.kept import remember
from maskdsl.codegen.kernel import LEAST_SCALE, LOG2_E, rebase
from maskdsl.codegen.row_bounds import KeyPlan
from maskdsl.expr import Mask
from maskdsl.settings import debug
from maskdsl.shape import Shape

if TYPE_CHECKING:
    from maskdsl.codegen.gradients import Backward

Tensor = torch.Tensor
DIM = 128  # the head dimension it takes
SEGMENT_ROWS = 2048, 8192  # queries of a segment, all heads of a key/value head together: a
# quarter of the positions, between these
DENSE = 0.2  # the least part of all keys that a query sees on average; of windows of 32K keys, one
# of 8K was faster in one pass, one of 4K slower
LEAST_STEPS = 256  # of a multiprocessor: 4K tokens and 32 heads are faster in one pass
SUM_BYTES = 512 << 20  # most that the sums of dK and dV may take
MOST_DELAY = 8  # units


@dataclass(frozen=True)
class OnePass:
    """The kernel of one static mask, of any number of heads."""

    mask: Mask

    @cached_property
    def by_key(self) -> KeyPlan:
        """The plan of 128 keys and 64 positions."""
        return plan_by_key(self.mask, PASS_ROWS)

    @cached_property
    def source(self) -> str:
        """The kernel file."""
        return emit_one_pass(self.by_key)

    def count_live(self, shape: Shape) -> int:
        """Tiles of 128 keys that any query of a call sees."""
        by_key = self.by_key
        masked, full = count_tiles(by_key, by_key.run_bounds(shape), "k_first")
        return int(((masked + full) > 0).sum())

    @property
    def constants(self) -> dict[str, Any]:
        """The constexpr arguments and options of a launch."""
        return {"BY_KEY": True, "OWN_SPAN": ROWS, "TILE": 1, "GRAIN": PASS_ROWS, "SLOTS": 3,
                "REGISTERS": 232, "num_warps": 4, "maxnreg": 128}


@lru_cache(maxsize=256)
def kernel_of(side: OnePass) -> Any:
    """The JIT function, written on first use."""
    debug(1, f"Hopper backward in one pass of {side.mask!r}")
    return load_module(side.source).gradients


def blocks_of() -> list[tuple[int, ...]]:
    """The boxes that TMA copies of k, v, q, dO and of dq, dk, dv."""
    tile: tuple[int, ...] = (1, 1, PASS_ROWS, DIM)
    half: tuple[int, ...] = (1, 1, PASS_ROWS, PASS_ROWS)
    return [tile] * 4 + [half] * 3


@dataclass(frozen=True)
class Sums:
    """How a call is cut, and sizes of what its launches need beside their tensors.

    heads  key/value heads, of all batch entries; share: query heads of each
    tiles  of 128 keys; segments: of `span` positions
    delay  units (a segment of a head) after which dQ is rounded
    """

    heads: int
    tiles: int
    segments: int
    span: int
    share: int
    delay: int

    @property
    def ring(self) -> int:
        """Units of which sums of dQ are kept: those not done, and as many to be rounded."""
        return 2 * self.delay + 2

    @property
    def queries(self) -> int:
        """Numbers of the sums of dQ."""
        return self.ring * self.share * self.span * DIM

    @property
    def keys(self) -> int:
        """Numbers of the sums of dK and dV."""
        return 2 * 2 * self.tiles * ROWS * DIM

    @property
    def counters(self) -> int:
        """Counters of items and of what they have done."""
        return 1 + 2 * self.heads * self.segments + self.heads

    @property
    def items(self) -> int:
        """Items of a call."""
        chunks = self.share * self.span // ROWS
        width = self.tiles + chunks
        return self.heads * (self.segments * width + self.tiles) + self.delay * chunks + self.tiles

    def make(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The sums of dQ, those of dK and dV, and the counters, all 0."""
        made = torch.zeros(self.queries + self.keys + self.counters, dtype=torch.float32,
                           device=device)
        end = self.queries + self.keys
        return made[:self.queries], made[self.queries:end], made[end:].view(torch.int32)


def size_sums(side: OnePass, shape: Shape, heads: int, share: int, processors: int) -> Sums:
    """What a call needs; heads: key/value heads, of all batch entries.

    dQ is rounded when as many tiles have followed as all multiprocessors compute and hold ready,
    and a unit more.
    """
    rows = min(max(shape.q_len // 4, SEGMENT_ROWS[0]), SEGMENT_ROWS[1])
    span = min(-(-shape.q_len // ROWS) * ROWS, max(ROWS, rows // share // ROWS * ROWS))
    live = [side.count_live(part) for part in segments_of(shape, span)]
    delay = 1 - (-2 * processors * len(live) // max(sum(live), 1))
    return Sums(heads, -(-shape.kv_len // ROWS), len(live), span, share, min(delay, MOST_DELAY))


@lru_cache(maxsize=1024)
def pays(side: OnePass, shape: Shape, heads: int, share: int, dim: int, processors: int) -> bool:
    """Whether one pass takes a call, and is faster than two kernels; as `size_sums`."""
    if dim != DIM or not fits_letter(side.by_key):
        return False
    by_key = side.by_key
    masked, full = count_tiles(by_key, by_key.run_bounds(shape), "k_first")
    steps = int((masked + full).sum())
    sums = size_sums(side, shape, heads, share, processors)
    return steps * PASS_ROWS * ROWS >= DENSE * shape.q_len * shape.kv_len and \
        steps * share * heads >= LEAST_STEPS * processors and sums.keys * 4 <= SUM_BYTES


def segments_of(shape: Shape, span: int) -> list[Shape]:
    """The segments of a call, as calls of their own."""
    return [Shape(min(span, shape.q_len - first), shape.kv_len, shape.q_offset + first,
                  shape.total_len) for first in range(0, shape.q_len, span)]


@dataclass(frozen=True)
class Launch:
    """What launches share whose tensors look alike, decided without a GPU.

    tiled    what TMA copies, in the kernel's order: templates for `rebase`
    scalars  in the kernel's order; constants: constexpr arguments and options
    """

    kernel: Any
    grid: tuple[int]
    tiled: tuple[Any, ...]
    sums: Sums
    scalars: tuple[int | float, ...]
    constants: dict[str, Any]

    def run(self, tensors: tuple[Tensor, ...], numbers: tuple[Tensor, Tensor]) -> None:
        """Launch the kernel; tensors: k, v, q, dO, dq, dk and dv, numbers: lse and delta."""
        self.kernel[self.grid](*map(rebase, self.tiled, tensors), *numbers,
                               *self.sums.make(tensors[0].device), *self.scalars, **self.constants)


def plan_launch(side: OnePass, shape: Shape, scale: float, tensors: tuple[Tensor, ...],
                processors: int) -> Launch:
    """Decide all about launches with tensors that look like these, for so many multiprocessors."""
    k, q = tensors[0], tensors[2]
    batch, kv_heads = k.shape[:2]
    sums = size_sums(side, shape, batch * kv_heads, q.shape[1] // kv_heads, processors)
    scalars = (sums.heads, kv_heads, sums.tiles, sums.segments, sums.span, sums.delay, sums.ring,
               sums.share, shape.q_len, shape.kv_len, shape.q_offset, shape.total_len,
               max(scale, LEAST_SCALE) * LOG2_E, scale)
    tiled = tuple(describe(t, box) for t, box in zip(tensors, blocks_of(), strict=True))
    return Launch(kernel_of(side), (min(sums.items, processors),), tiled, sums, scalars,
                  side.constants)


class OnePassKernel:
    """The kernel of one mask and its launches decided so far."""

    def __init__(self, mask: Mask) -> None:
        self.side = OnePass(mask)
        self.launches: dict[tuple[Any, ...], Launch] = {}

    def __call__(self, call: Backward, tensors: tuple[Tensor, ...],
                 numbers: tuple[Tensor, Tensor]) -> None:
        """Compute all gradients; tensors as for `Launch.run`."""
        made = remember(self.launches, looks_of(call, tensors), lambda: plan_launch(
            self.side, call.shape, call.scale, tensors, count_processors(tensors[0].device)))
        made.run(tensors, numbers)


def looks_of(call: Backward, tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """What launches share that are decided once."""
    return (call.shape, call.scale, tensors[0].dtype, tensors[0].device,
            *((t.shape, t.stride()) for t in tensors))


def count_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count
