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
from maskdsl.codegen.kernel import LEAST_SCALE, LOG2_E, TritonForward, fits_tma, live_strides
from maskdsl.expr import Mask
from maskdsl.scores import ScoreMod
from maskdsl.settings import debug
from maskdsl.shape import Shape

if TYPE_CHECKING:
    from maskdsl.codegen.gradients import Backward

Tensor = torch.Tensor
SLOTS = {(64, False): 4, (128, False): 3, (128, True): 2}  # passing tiles in flight, by head
# dimension and whether dQ is added up beside dK and dV: what shared memory holds
REGISTERS = {(True, 128): 232, (True, 64): 200, (False, 128): 216, (False, 64): 200}  # of a
# computing thread, by side (keys?) and head dimension: what ptxas needs to spill nothing in loops
ADDS_DIM = 128  # the head dimension at which dQ can be added up beside dK and dV
HALF = 64  # own rows of a computing warp group
SUM_ROWS = 32  # rows a program of the small kernels


def refuse_call(forward: TritonForward, q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why the portable kernels compute the gradients of such a call, [B, H, L, D]; "" where the
    Hopper backward does."""
    if not forward.must:
        return ("the Hopper backward has not yet run on a GPU, so it must be asked for with "
                "backend='hopper'")
    return forward.refuse_hopper(q, k, v) or refuse_mask(forward.mask) or \
        refuse_dims(q.shape[3], v.shape[3])


class HopperBackward:
    """The gradients' kernels of one static mask, for `share` query heads a key/value head; with
    `adds` one kernel computes all, if all are wanted."""

    scores: tuple[ScoreMod, ...] = ()  # it takes no score modifiers

    def __init__(self, mask: Mask, share: int, adds: bool = False) -> None:
        self.by_query, self.by_key = QuerySide(mask, share), KeySide(mask, share)
        self.all_by_key = KeySide(mask, share, True) if adds else None

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
        if dq is not None and dk is not None and dv is not None and self.all_by_key is not None \
                and dim == ADDS_DIM:
            sums = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
            launch(self.all_by_key, call, (k, v), (q, grad_out), (dk, dv), numbers, sums)
            sum_parts[(-(-rows // SUM_ROWS), heads, batch)](
                sums, dq, *dq.stride()[:3], heads, rows, 0, rows, 1, call.scale, DIM=dim,
                BLOCK=SUM_ROWS)
            return dq, dk, dv
        if dq is not None:
            launch(self.by_query, call, (q, grad_out), (k, v), (dq,), numbers)
        if dk is not None and dv is not None:
            launch(self.by_key, call, (k, v), (q, grad_out), (dk, dv), numbers)
        return dq, dk, dv


@lru_cache(maxsize=256)
def hopper_backward_of(mask: Mask, share: int, adds: bool) -> HopperBackward:
    """The Hopper gradients' kernels of a mask; calls of many shapes share them."""
    return HopperBackward(mask, share, adds)


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
    return {**constants, "SLOTS": SLOTS[dim, constants["ADDS"]],
            "REGISTERS": REGISTERS[constants["BY_KEY"], dim],
            # sixteen warps, the last three of them idle, share 64 Ki registers before they trade
            "num_warps": 4, "maxnreg": 128}


@dataclass(frozen=True)
class Launch:
    """One launch of one side's kernel, decided without a GPU.

    own      k and v, or q and the output's gradient; passing: the other two
    results  dk and dv, or dq
    cut      the items; parts: float32 results of those that are cut, for each result
    """

    side: Side
    own: tuple[Tensor, Tensor]
    passing: tuple[Tensor, Tensor]
    results: tuple[Tensor, ...]
    cut: Schedule
    parts: tuple[Tensor, ...]

    @property
    def tiled(self) -> list[tuple[Tensor, tuple[int, ...]]]:
        """What TMA copies, with its boxes, in the kernel's order."""
        tensors = (*self.own, *self.passing, *self.passing, self.results[0], self.results[-1])
        return list(zip(tensors, blocks_of(self.side, self.own[0].shape[3]), strict=True))

    def pointers(self, lse: Tensor, delta: Tensor, sums: Tensor | None,
                 counters: Tensor) -> tuple[Tensor, ...]:
        """The other tensors, in the kernel's order.

        sums  float32 [B, Hq, Lq, D], to which dQ / scale is added, where the side of keys adds
        """
        return (lse, delta, self.parts[0], self.parts[-1], lse if sums is None else sums, counters)

    def numbers(self, shape: Shape, scale: float, heads: int) -> tuple[int | float, ...]:
        """The scalars, in the kernel's order; heads: query heads."""
        batch, owners = self.own[0].shape[:2]
        groups = owners // int(self.side.constants["OWN_HEADS"])
        cut = self.cut
        return (cut.items, cut.q_tiles, groups * batch, groups, cut.section, cut.split_first,
                cut.split_count, cut.splits, self.side.share, self.side.members, heads,
                shape.q_len, shape.kv_len, shape.q_offset, shape.total_len,
                max(scale, LEAST_SCALE) * LOG2_E, scale)


def plan_launch(side: Side, shape: Shape, own: tuple[Tensor, Tensor],
                passing: tuple[Tensor, Tensor], results: tuple[Tensor, ...],
                processors: int) -> Launch:
    """Cut a call for so many multiprocessors, and make room for its parts."""
    batch, owners, _, dim = own[0].shape
    own_heads = int(side.constants["OWN_HEADS"])
    groups = owners // own_heads * batch
    cut = cut_call(side, shape, groups, section_of(side, shape, dim, groups), processors,
                   4 * dim * len(results) * own_heads)
    size = cut.splits * batch * owners * rows_of(side, cut) * dim or 1
    parts = tuple(torch.empty(size, dtype=torch.float32, device=own[0].device) for _ in results)
    return Launch(side, own, passing, results, cut, parts)


def launch(side: Side, call: Backward, own: tuple[Tensor, Tensor], passing: tuple[Tensor, Tensor],
           results: tuple[Tensor, ...], numbers: tuple[Tensor, Tensor],
           sums: Tensor | None = None) -> None:
    """Compute the gradients of one side; numbers: lse and delta, float32 [B, Hq, Lq]."""
    device = own[0].device
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    made = plan_launch(side, call.shape, own, passing, results, processors)
    described = []
    for t, box in made.tiled:
        described.append(describe(t, box))
        described[-1].base = t
    kernel_of(side)[(min(made.cut.items, processors),)](
        *described, *made.pointers(*numbers, sums, queue(device)),
        *made.numbers(call.shape, call.scale, numbers[0].shape[1]),
        **constants_of(side, own[0].shape[3]))
    if made.cut.split_count:
        for part, result in zip(made.parts, results, strict=True):
            join(part, result, side, made.cut)


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
