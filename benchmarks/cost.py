"""How far off are predicted times? A spread of masks, lengths and heads; and the rates fitted anew.

The rows `fit` are what a `StepRates` in codegen/rates.py would hold by this run. Run on a chip that
has no rates yet, there are no predictions, only the fit. On a Hopper GPU a call that the Hopper
kernel takes is measured twice, with that kernel and with the portable one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

import maskdsl
from benchmarks.fit import Call, fit_steps, relative_errors
from benchmarks.measure import MASKS, Report, make_inputs, mask_of, time_ms
from benchmarks.vertical_slash import make_indices
from maskdsl import (
    BlockIndices,
    Blocks,
    Causal,
    Chunk,
    ColumnIndices,
    Columns,
    Full,
    LastQ,
    Mask,
    PerHead,
    RandomBlocks,
    Shape,
    Sink,
    Stride,
    VerticalSlash,
    Window,
)
from maskdsl.codegen.cost import padded, predict
from maskdsl.codegen.forecast import HOPPER, refuse_call_of, tile_on, total_visited
from maskdsl.codegen.hopper import is_hopper
from maskdsl.codegen.hopper_work import count_hopper, item_of
from maskdsl.codegen.kernel import arch_of
from maskdsl.codegen.lists import sort_atoms
from maskdsl.codegen.rates import H100, RATES
from maskdsl.codegen.visits import Visited
from maskdsl.codegen.workload import CallHeads, count_work
from maskdsl.simplify import simplify

TRIANGLES = [mask_of(sizes) for sizes in MASKS.values()]


@dataclass
class Case:
    """One call to measure."""

    mask: Mask
    length: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    slots: dict[str, Any] | None = None
    what: str = ""


def static_cases() -> Iterator[Case]:
    """Narrow and wide masks, short and long calls, few heads, small heads, periodic masks."""
    for length in (2048, 4096, 8192, 16384, 32768):
        yield Case(Full(), length)
    for mask in TRIANGLES:
        for length in (8192, 32768, 131072):
            yield Case(mask, length)
    for width in (256, 1024, 4096, 8192):
        yield Case(Window(width), 32768)
    yield Case(Window(256), 131072)
    yield Case(Chunk(4096), 32768)
    yield Case(Stride(64) | Window(512), 16384)
    yield Case(RandomBlocks(64, 8) | Window(192), 32768)
    for heads, kv_heads in ((4, 1), (8, 2)):
        for mask in (Full(), TRIANGLES[1]):
            yield Case(mask, 32768, heads, kv_heads)
        yield Case(TRIANGLES[0], 131072, heads, kv_heads)
    for mask in (Sink(200) | Window(400), Window(512) & LastQ(30000)):  # several masked tiles
        yield Case(mask, 32768)
    for mask in (Full(), *TRIANGLES):
        yield Case(mask, 16384, dim=64)
    yield Case(PerHead((Full(),) * 8 + (TRIANGLES[0],) * 24), 32768)


def near_and_far_blocks(length: int, block: int, most: int, heads: int = 8) -> BlockIndices:
    """The diagonal block of every row, and others at random before it."""
    rows = length // block
    generator = torch.Generator(device="cuda").manual_seed(length + most)
    row = torch.arange(rows, device="cuda")
    order = torch.rand(1, heads, rows, rows, device="cuda", generator=generator)
    order = order.masked_fill(row[None, :] > row[:, None], -1)
    order[..., row, row] = 2
    top = order.topk(min(most, rows), -1)
    return BlockIndices.from_topk(torch.where(top.values < 0, -1, top.indices), block, block)


def dynamic_cases() -> Iterator[Case]:
    """Vertical-slash of several sizes and spreads, unions, blocks, columns, mixed heads."""
    for length in (16384, 32768, 131072):
        for vertical, slash, run in ((1000, 6096, 64), (512, 2048, 64), (30, 800, 16)):
            vs = make_indices(length, vertical, slash, 8, run)
            about = f"{vertical} columns, {slash} slashes in runs of {run}"
            yield Case(VerticalSlash("vs"), length, slots={"vs": vs}, what=about)
            yield Case(TRIANGLES[0] | VerticalSlash("vs"), length, slots={"vs": vs}, what=about)
    vs = make_indices(32768, 1000, 2048, 8, 1)
    yield Case(VerticalSlash("vs"), 32768, slots={"vs": vs}, what="slashes spread at random")
    one = make_indices(32768, 1000, 2048, 1, 64)
    yield Case(VerticalSlash("vs", "block64"), 32768, slots={"vs": one}, what="2048 slashes")
    for length in (32768, 131072):
        for block, most in ((64, 32), (64, 128), (128, 32)):
            blocks = near_and_far_blocks(length, block, most)
            yield Case(Blocks("b", block, block), length, slots={"b": blocks}, what=f"top {most}")
    blocks = near_and_far_blocks(32768, 64, 32)
    yield Case(Blocks("b", 64, 64) | TRIANGLES[0], 32768, slots={"b": blocks}, what="top 32")
    columns = ColumnIndices(make_indices(32768, 2000, 64, 8, 64).vertical)
    yield Case(Columns("c") | Window(512), 32768, slots={"c": columns}, what="2000 columns")
    vs = make_indices(32768, 1000, 2048, 32, 64)
    yield Case(PerHead((VerticalSlash("vs"),) * 16 + (TRIANGLES[0],) * 16), 32768, slots={"vs": vs})


def backends(case: Case) -> tuple[str, ...]:
    """The backends a case is measured with."""
    mask = simplify(Causal() & case.mask)
    call = CallHeads(1, case.heads, case.kv_heads, case.dim, case.dim)
    return ("triton",) if not is_hopper() or refuse_call_of(mask, call) else (HOPPER, "triton")


def count(case: Case, backend: str, arch: str, processors: int) -> tuple[tuple[int, int], Visited]:
    """(tile, steps) of a case."""
    mask, shape = simplify(Causal() & case.mask), Shape(case.length, case.length)
    call = CallHeads(1, case.heads, case.kv_heads, case.dim, case.dim)
    if backend == HOPPER:
        works, _ = count_hopper(mask, shape, call, processors, with_pairs=False)
        return item_of(call), total_visited(works)
    tile = tile_on(mask, arch, call)
    return tile, total_visited(count_work(mask, tile, shape, call, case.slots, with_pairs=False))


def steps_of(seen: Visited, block_n: int) -> tuple[float, ...]:
    """The steps in the order of `fit.NAMES`; first tiles in tiles of `block_n` keys."""
    beside = seen.full + seen.masked if seen.listed else 0
    return (seen.items, seen.full, seen.masked, seen.listed_full, seen.listed_part, seen.slash,
            seen.columns, beside, seen.first / block_n)


def measure(report: Report, case: Case, backend: str, calls: dict[Any, list[Call]],
            errors: dict[str, list[float]]) -> None:
    """Measure and predict one call; keep its steps for the fit."""
    attn = maskdsl.compile(case.mask, backend=backend)
    q, k, v = make_inputs(case.length, case.heads, case.kv_heads, case.dim)
    slots = case.slots or {}
    took = time_ms(attn, q, k, v, **slots)
    arch, shape = arch_of(q.device), Shape(case.length, case.length)
    mask = simplify(Causal() & case.mask)
    call = CallHeads(1, case.heads, case.kv_heads, case.dim, case.dim)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    tile, seen = count(case, backend, arch, processors)
    row: dict[str, Any] = {"mask": repr(case.mask) if len(repr(case.mask)) < 90 else "PerHead",
                           "data": case.what, "length": case.length, "heads": case.heads,
                           "dim": case.dim, "backend": backend, "tile": f"{tile[0]}x{tile[1]}",
                           "ms": took}
    lists = bool(slots) and sort_atoms(mask).listed
    rates = RATES.get((arch, backend))
    if rates is not None:
        found = predict(rates, tile, shape, call, seen, None, lists)
        row |= {"predicted": found.ms, "error": found.ms / took - 1, "bound_by": found.bound_by}
        errors[f"{backend}, {'dynamic' if lists else 'static'}"].append(abs(found.ms / took - 1))
    listing = (rates or H100).listing_ms if lists else 0.0
    if took > 2 * listing and (rates is None or row["bound_by"] == "compute"):
        kind = (backend, *tile, padded(case.dim))
        calls[kind].append(Call(steps_of(seen, tile[1]), took - listing, processors))
    report.add(**row, steps=dict(zip(("items", "full", "masked", "listed_full", "listed_part",
                                      "slash", "columns", "beside", "first"),
                                     steps_of(seen, tile[1]), strict=True)))


def run(report: Report) -> None:
    """Every case; then median and largest error, and the fitted rates."""
    calls: dict[Any, list[Call]] = defaultdict(list)
    errors: dict[str, list[float]] = defaultdict(list)
    for case in [*static_cases(), *dynamic_cases()]:
        for backend in backends(case):
            measure(report, case, backend, calls, errors)
        torch.cuda.empty_cache()
    errors["all"] = [error for some in errors.values() for error in some]
    for kind, some in errors.items() if errors["all"] else ():
        report.add(mask=f"{kind}: {len(some)} calls", data="median error", error=median(some))
        report.add(mask=f"{kind}: {len(some)} calls", data="largest error", error=max(some))
    for (backend, block_m, block_n, dim), some_calls in calls.items():
        if len(some_calls) < 2:
            continue
        rates = fit_steps(some_calls)
        left = median(map(abs, relative_errors(some_calls, rates)))
        report.add(mask=f"fit of {backend}, {block_m}x{block_n}, D {dim}: {len(some_calls)} calls",
                   data="median error of the fit", error=left, steps=rates)
