"""Which settings of the Hopper kernel are fastest: slots of shared memory, the width of the first
tile. Feeds codegen/hopper_cut.py; every setting is checked against the first."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from benchmarks.cases import Pattern
from benchmarks.measure import DIM, HEADS, KV_HEADS, Report, make_inputs, time_ms
from maskdsl import Causal, Mask, Shape, simplify
from maskdsl.codegen.hopper import HopperForward
from maskdsl.codegen.hopper_cut import HopperConfig, pick_hopper
from maskdsl.codegen.kernel import LOG2_E, output_maker

PATTERNS = (Pattern(8, 512, 128), Pattern(window=None), Pattern(64, 1024, 128), Pattern(0, 1024))
LENGTHS = (32768, 131072)
ROUNDS = 3  # of all settings in turns, so that a clock that drifts meets all of them


def configs(mask: Mask, dim: int) -> Iterator[HopperConfig]:
    """The default first."""
    default = pick_hopper(mask, HEADS // KV_HEADS, dim)
    yield default
    if default.k_slots != default.v_slots:
        yield replace(default, k_slots=default.v_slots, v_slots=default.k_slots)
    for narrow in (32, 64, 128):
        if narrow != default.narrow:
            yield replace(default, narrow=narrow)


def prepare(mask: Mask, config: HopperConfig, q: Any, k: Any, v: Any) -> Any:
    """A call of the kernel with one config: (out, lse)."""
    shape = Shape(q.shape[2], k.shape[2])
    return HopperForward(mask).prepare(q, k, v, shape, q.shape[3]**-0.5 * LOG2_E,
                                       output_maker(q, v.shape[3], "bhld", True), True, config)


def build(work: tuple[Mask, HopperConfig, int]) -> None:
    """Compile one kernel into Triton's cache, in a process of its own."""
    mask, config, dim = work
    q, k, v = make_inputs(1024, dim=dim)
    prepare(mask, config, q, k, v)(q, k, v, {})
    torch.cuda.synchronize()


def run(report: Report) -> None:
    """All settings of all masks at D = 128, then at D = 64."""
    work = [(simplify(Causal() & pattern.mask), pattern, config, dim) for dim in (DIM, 64)
            for pattern in PATTERNS
            for config in configs(simplify(Causal() & pattern.mask), dim)]
    with ProcessPoolExecutor(12, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(build, [(mask, config, dim) for mask, _, config, dim in work]))
    for dim in (DIM, 64):
        for length in LENGTHS:
            for pattern in PATTERNS:
                if pattern.window is None and length > LENGTHS[0]:
                    continue
                if report.is_late(f"{pattern.key} {length} D={dim}"):
                    return
                measure(report, pattern, length, dim)


def measure(report: Report, pattern: Pattern, length: int, dim: int) -> None:
    """One row for every setting of one mask."""
    mask = simplify(Causal() & pattern.mask)
    q, k, v = make_inputs(length, dim=dim)
    tried = list(configs(mask, dim))
    calls = [prepare(mask, config, q, k, v) for config in tried]
    first = calls[0](q, k, v, {})
    apart = [max((a - b).nan_to_num().abs().max().item() for a, b in zip(
        first, call(q, k, v, {}), strict=True)) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, found in zip(calls, times, strict=True):
            found.append(time_ms(call, q, k, v, {}, repeat_ms=60))
    medians = [statistics.median(found) for found in times]
    flops = 4 * HEADS * pattern.pairs(length) * dim
    for config, ms, off in zip(tried, medians, apart, strict=True):
        report.add(mask=pattern.key, length=length, dim=dim, k_slots=config.k_slots,
                   v_slots=config.v_slots, narrow=config.narrow, ms=ms, tflops=flops / ms / 1e9,
                   of_default=medians[0] / ms, apart=off)
