"""Launching the Hopper backward: which tensors it takes, and one call of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from maskdsl.codegen.build import load_module
from maskdsl.codegen.hopper import describe, queue
from maskdsl.codegen.hopper_backward_cut import (
    PASS_ROWS,
    KeySide,
    QuerySide,
    Side,
    cut_call,
    refuse_dims,
    refuse_mask,
    section_of,
)
from maskdsl.codegen.hopper_backward_kernels import sum_parts, sum_products
from maskdsl.codegen.hopper_cut import GRAIN, ROWS, Schedule
from maskdsl.codegen.hopper_onepass import (
    OnePassKernel,
    count_processors,
    looks_of,
    pays,
)
from maskdsl.codegen.kept import remember
from maskdsl.codegen.kernel import (
    LEAST_SCALE,
    LOG2_E,
    TritonForward,
    fits_tma,
    live_strides,
    rebase,
)
from maskdsl.expr import Mask
from maskdsl.scores import ScoreMod
from maskdsl.settings import debug
from maskdsl.shape import Shape

if TYPE_CHECKING:
    from maskdsl.codegen.gradients import Backward

Tensor = torch.Tensor
SLOTS = {64: 4, 128: 3}  # passing tiles in flight, by head dimension: what shared memory holds
REGISTERS = {(True, 128): 232, (True, 64): 200, (False, 128): 216, (False, 64): 200}  # of a
# computing thread, by side (keys?) and head dimension: what ptxas needs to spill nothing in loops
HALF = 64  # own rows of a computing warp group
SUM_ROWS = 32  # rows a program of the small kernels


def refuse_call(forward: TritonForward, q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why the portable kernels compute the gradients of such a call, [B, H, L, D]; "" where the
    Hopper backward does."""
    return forward.refuse_hopper(q, k, v) or refuse_mask(forward.mask) or \
        refuse_dims(q.shape[3], v.shape[3])


class HopperBackward:
    """The gradients' kernels of one static mask, for `share` query heads a key/value head."""

    scores: tuple[ScoreMod, ...] = ()  # it takes no score modifiers

    def __init__(self, mask: Mask, share: int) -> None:
        self.by_query = SideKernel(QuerySide(mask, share))
        self.by_key = SideKernel(KeySide(mask, share))
        self.one_pass = OnePassKernel(mask)

    def run(self, call: Backward, tensors: tuple[Tensor, ...], grad_out: Tensor,
            grad_lse: Tensor | None, wanted: tuple[bool, bool], data: dict[str, Any],
            names: frozenset[str]) -> tuple[Tensor | None, ...]:
        """(dq, dk, dv) as [B, H, L, D]; None where not wanted. As `TritonBackward.run`."""
        q, k, v, out, lse = tensors
        if not q.numel() or not call.shape.kv_len:
            return tuple(torch.zeros_like(t) for t in (q, k, v))
        if not fits_tma(grad_out, live_strides(grad_out)):
            grad_out = grad_out.contiguous()
        delta = torch.empty_like(lse)
        batch, heads, rows, dim = q.shape
        sum_products[(-(-rows // SUM_ROWS), heads, batch)](
            out, grad_out, lse, delta if grad_lse is None else grad_lse, delta, *out.stride()[:3],
            *grad_out.stride()[:3], heads, rows, DIM=dim, BLOCK=SUM_ROWS,
            WITH_LSE=grad_lse is not None)
        dq = empty_rows(q) if wanted[0] else None
        dk, dv = (empty_rows(k), empty_rows(v)) if wanted[1] else (None, None)
        numbers = lse, delta
        if dq is not None and dk is not None and dv is not None and not (
                call.deterministic or torch.are_deterministic_algorithms_enabled()) and \
                self.pays(call.shape, q, k):
            self.one_pass(call, (k, v, q, grad_out, dq, dk, dv), numbers)
            return dq, dk, dv
        if dq is not None:
            self.by_query(call, (q, grad_out), (k, v), (dq,), numbers)
        if dk is not None and dv is not None:
            self.by_key(call, (k, v), (q, grad_out), (dk, dv), numbers)
        return dq, dk, dv

    def pays(self, shape: Shape, q: Tensor, k: Tensor) -> bool:
        """Whether such a call is computed in one pass, where it need not be deterministic."""
        return pays(self.one_pass.side, shape, k.shape[0] * k.shape[1], q.shape[1] // k.shape[1],
                    q.shape[3], count_processors(q.device))


class SideKernel:
    """The kernel of one side, and its launches decided so far: deciding takes milliseconds."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.launches: dict[tuple[Any, ...], Launch] = {}

    def __call__(self, call: Backward, own: tuple[Tensor, Tensor], passing: tuple[Tensor, Tensor],
                 results: tuple[Tensor, ...], numbers: tuple[Tensor, Tensor]) -> None:
        """Compute the gradients of one side; numbers: lse and delta, float32 [B, Hq, Lq]."""
        looks = looks_of(call, (*own, *passing, *results))
        made = remember(self.launches, looks, lambda: plan_launch(
            self.side, call.shape, call.scale, own, passing, results,
            count_processors(own[0].device)))
        made.run((*own, *passing), results, numbers)


@lru_cache(maxsize=256)
def hopper_backward_of(mask: Mask, share: int) -> HopperBackward:
    """The Hopper gradients' kernels of a mask; calls of many shapes share them."""
    return HopperBackward(mask, share)


@lru_cache(maxsize=256)
def kernel_of(side: Side) -> Any:
    """The JIT function of one side, written on first use."""
    debug(1, f"Hopper backward of {side.mask!r}: {side.constants}")
    return load_module(side.source).gradients


def empty_rows(t: Tensor) -> Tensor:
    """An empty tensor like `t` that TMA can write."""
    made = torch.empty_like(t)
    return made if fits_tma(made, live_strides(made)) and made.stride(3) == 1 else \
        torch.empty(t.shape, dtype=t.dtype, device=t.device)


def blocks_of(side: Side, dim: int) -> list[tuple[int, ...]]:
    """The boxes that TMA copies of a, b, c, d, grains of c and d, and the two results."""
    constants = side.constants
    half = max(constants["OWN_HEADS"] // 2, 1)
    heads = constants["PASS_HEADS"]
    own = (1, half, HALF // half, dim)
    passing = (1, heads, PASS_ROWS // heads, dim)
    grain = (1, 1, GRAIN, 64)
    return [own, own, passing, passing, grain, grain, own, own]


def constants_of(side: Side, dim: int) -> dict[str, Any]:
    """The constexpr arguments and options of a launch."""
    constants = side.constants
    return {**constants, "SLOTS": SLOTS[dim], "REGISTERS": REGISTERS[constants["BY_KEY"], dim],
            # sixteen warps, the last three of them idle, share 64 Ki registers before they trade
            "num_warps": 4, "maxnreg": 128}


@dataclass(frozen=True)
class Launch:
    """What launches of one side share whose tensors look alike, decided without a GPU.

    tiled      what TMA copies, in the kernel's order: templates for `rebase`
    cut        the items
    part_size  elements of the float32 parts of each result; 0 where no item is cut
    scalars    in the kernel's order; constants: constexpr arguments and options
    """

    side: Side
    kernel: Any
    grid: tuple[int]
    tiled: tuple[Any, ...]
    cut: Schedule
    part_size: int
    scalars: tuple[int | float, ...]
    constants: dict[str, Any]

    def run(self, inputs: tuple[Tensor, ...], results: tuple[Tensor, ...],
            numbers: tuple[Tensor, Tensor]) -> None:
        """Launch the kernel, and what adds up parts.

        inputs  the owning two, the passing two; results: dk and dv, or dq
        """
        device = inputs[0].device
        parts = tuple(torch.empty(self.part_size, dtype=torch.float32, device=device)
                      for _ in results if self.part_size)
        self.kernel[self.grid](
            *map(rebase, self.tiled, in_order(inputs, results)),
            *pointers(numbers, parts, queue(device)), *self.scalars, **self.constants)
        for part, result in zip(parts, results, strict=bool(parts)):
            join(part, result, self.side, self.cut)


def in_order(inputs: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors that TMA copies, in the kernel's order; c and d again in grains."""
    return (*inputs, *inputs[2:], results[0], results[-1])


def pointers(numbers: tuple[Tensor, Tensor], parts: tuple[Tensor, ...],
             counters: Tensor) -> tuple[Tensor, ...]:
    """The other tensors, in the kernel's order; any of their type for one that is not used."""
    lse = numbers[0]
    first, last = (parts[0], parts[-1]) if parts else (lse, lse)
    return (*numbers, first, last, counters)


def plan_launch(side: Side, shape: Shape, scale: float, own: tuple[Tensor, Tensor],
                passing: tuple[Tensor, Tensor], results: tuple[Tensor, ...],
                processors: int) -> Launch:
    """Decide all about launches with tensors that look like these, for so many multiprocessors."""
    batch, owners, _, dim = own[0].shape
    own_heads = int(side.constants["OWN_HEADS"])
    groups = owners // own_heads
    cut = cut_call(side, shape, groups * batch, section_of(side, shape, dim, groups * batch),
                   processors, 4 * dim * len(results) * own_heads)
    heads = (passing if isinstance(side, KeySide) else own)[0].shape[1]
    scalars = (cut.items, cut.q_tiles, groups * batch, groups, cut.section, cut.split_first,
               cut.split_count, cut.splits, side.share, side.members, heads, shape.q_len,
               shape.kv_len, shape.q_offset, shape.total_len, max(scale, LEAST_SCALE) * LOG2_E,
               scale)
    tensors = in_order((*own, *passing), results)
    tiled = tuple(describe(t, box) for t, box in zip(tensors, blocks_of(side, dim), strict=True))
    return Launch(side, kernel_of(side), (min(cut.items, processors),), tiled, cut,
                  cut.splits * batch * owners * rows_of(side, cut) * dim, scalars,
                  constants_of(side, dim))


def rows_of(side: Side, cut: Schedule) -> int:
    """Own rows whose items are cut, not clipped to the call."""
    return cut.split_count * int(side.constants["OWN_SPAN"])


def join(part: Tensor, result: Tensor, side: Side, cut: Schedule) -> None:
    """Add up the parts of cut items."""
    batch, heads, length, dim = result.shape
    rows = rows_of(side, cut)
    sum_parts[(-(-rows // SUM_ROWS), heads, batch)](
        part, result, *result.stride()[:3], heads, rows,
        cut.split_first * int(side.constants["OWN_SPAN"]), length, cut.splits, 1.0, DIM=dim,
        BLOCK=SUM_ROWS)


assert ROWS == 2 * HALF
