"""Predictions for a mask on a named chip: its own kernel's tiles, dense attention, where they meet.

What is counted is what the kernel whose rates are given would do there (`rates.target`, the
portable kernel or Hopper's own), whichever backend runs here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from maskdsl.atoms import Causal
from maskdsl.codegen.cost import Prediction, predict
from maskdsl.codegen.hopper_cut import refuse_dims, refuse_mask
from maskdsl.codegen.hopper_work import HopperCut, count_hopper, is_intervals, item_of
from maskdsl.codegen.lists import group_heads, shared_rows, sort_atoms
from maskdsl.codegen.planner import mean_row_width
from maskdsl.codegen.rates import Rates
from maskdsl.codegen.tune import config_for_tile, pick_config
from maskdsl.codegen.visits import Visited
from maskdsl.codegen.workload import CallHeads, KindWork, count_work
from maskdsl.dynamic import slots_of
from maskdsl.expr import Mask
from maskdsl.shape import Shape
from maskdsl.trace import is_traceable

LENGTHS = tuple(1 << n for n in range(8, 18))  # where a crossover is looked for, in tokens
STEP = 128  # tokens a crossover is told to
HOPPER = "hopper"
PAIR_BY_PAIR = ("the mask is tested pair by pair; the Hopper kernel was measured only where "
                "intervals decide")
SIEVED = ("tiles inside the mask's intervals are tested one by one for being dead, which the rates "
          "leave out: too low")


@dataclass(frozen=True, slots=True)
class Forecast:
    """A mask's prediction, with what was counted for it; cut: of the Hopper kernel."""

    prediction: Prediction
    works: tuple[KindWork, ...]
    cut: HopperCut | None = None


def total_visited(works: tuple[KindWork, ...]) -> Visited:
    """The steps of all kinds of heads together."""
    total = Visited()
    for work in works:
        total = total.plus(work.visited)
    return total


def total_pairs(works: tuple[KindWork, ...]) -> int | None:
    """Live pairs of all kinds of heads together; None where one is not known."""
    counts = [work.live_pairs for work in works]
    return None if None in counts else sum(count for count in counts if count is not None)


def tile_on(mask: Mask, arch: str, call: CallHeads,
            chosen: tuple[int, int] | None = None) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_N) of the Triton kernel on a chip, for 16-bit inputs; `chosen` by the user
    goes first."""
    if chosen is not None:
        config = config_for_tile(chosen)
    else:
        width = max(mean_row_width(one) for _, one in group_heads(mask))
        config = pick_config(arch, call.head_dim, call.value_dim, 2, width, shared_rows(mask))
    return config.block_m, config.block_n


def forecast(mask: Mask, rates: Rates, shape: Shape, call: CallHeads,
             data: Mapping[str, Any] | None = None, chosen: tuple[int, int] | None = None,
             estimator: str | None = None) -> Forecast:
    """The prediction for a simplified, traceable mask; without data its lists count as empty. Of
    the Hopper kernel only for a call it takes (`refuse_call_of`)."""
    if rates.target == HOPPER:
        works, cut = count_hopper(mask, shape, call, rates.processors, with_pairs=False)
        visited = total_visited(works)
        found = predict(rates, item_of(mask, call), shape, call, visited, estimator=estimator)
        if visited.masked and not all(is_intervals(work.plan) for work in works):
            found = replace(found, notes=(*found.notes, PAIR_BY_PAIR))
        return Forecast(found, works, cut)
    tile = tile_on(mask, rates.arch, call, chosen)
    works = count_work(mask, tile, shape, call, data, with_pairs=False)
    lists = data is not None and sort_atoms(mask).listed
    found = predict(rates, tile, shape, call, total_visited(works), None, lists, estimator)
    if any(work.plan.sieve is not None for work in works):
        found = replace(found, notes=(*found.notes, SIEVED))
    return Forecast(found, works)


def refuse_call_of(mask: Mask, call: CallHeads, by_name: bool = False) -> str:
    """Why the Hopper kernel does not take a mask in a call; "" where it does.

    by_name  whether it was asked for by name
    """
    if not is_traceable(mask):
        return "the mask holds a function that cannot be compiled into the kernel"
    return refuse_mask(mask, by_name) or refuse_dims(
        call.head_dim, call.value_dim, bool(slots_of(mask)))


def forecast_dense(rates: Rates, shape: Shape, call: CallHeads) -> Prediction:
    """Dense causal attention by the kernel of the rates."""
    return forecast(Causal(), rates, shape, call).prediction


def is_cheap(mask: Mask) -> bool:
    """Whether the mask's tiles are counted from bounds alone, at any length."""
    return all(work.plan.sieve is None for work in count_work(
        mask, (64, 64), Shape(1, 1), CallHeads(), with_pairs=False))


def refuse_crossover(mask: Mask) -> str:
    """Why no crossover is looked for; "" where one is."""
    if sort_atoms(mask).atoms:
        return "at a length that was not looked for: data of one length says nothing of another"
    if not is_cheap(mask):
        return "at a length that was not looked for: every tile would have to be tested"
    return ""


def find_crossover(mask: Mask, rates: Rates, call: CallHeads,
                   dense: Rates | None = None) -> int | None:
    """The shortest square call, in tokens, that the mask makes faster than dense causal attention;
    rounded up to 128. None: at no length up to 128K, or not looked for (`refuse_crossover`).

    dense  the rates of the kernel that dense attention runs; default: the same
    """
    dense = dense or rates
    if refuse_crossover(mask):
        return None

    def wins(length: int) -> bool:
        shape = Shape(length, length)
        return forecast(mask, rates, shape, call).prediction.ms < \
            forecast_dense(dense, shape, call).ms

    found = next((n for n in LENGTHS if wins(n)), None)
    if found is None:
        return None
    low, high = found // 2, found  # dense wins or ties at low
    while high - low > STEP:
        middle = (low + high) // 2 // STEP * STEP
        if middle in (low, high):
            break
        low, high = (low, middle) if wins(middle) else (middle, high)
    return high
