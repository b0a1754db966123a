"""Where is the Hopper kernel the faster one? Head dimensions, masks by kind of head, masks with
dead tiles inside: the portable and the Hopper kernel in turns, on the same inputs, 32K tokens.

Feeds the choice in codegen/hopper_cut.py: what is not faster there is taken only by name.
"""

from __future__ import annotations

import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

import maskdsl
from benchmarks.cases import Pattern
from benchmarks.measure import HEADS, KV_HEADS, Report, make_inputs, time_ms
from maskdsl import Causal, Full, Mask, PerHead, RandomBlocks, Sink, Stride, Window

LENGTH = 32768
ROUNDS = 3  # of both kernels in turns, so that a clock that drifts meets both
MOST = 0.02  # largest difference of two bfloat16 outputs
BACKENDS = ("triton", "hopper")
DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
DENSE: Mask = Full()
TRIANGLE, SMALL = Pattern(64, 1024, 128).mask, Pattern(8, 512, 128).mask
STREAM = Sink(64) | Window(1024)
MASKS: dict[str, tuple[Mask, tuple[tuple[int, int], ...]]] = {
    "dense": (DENSE, DIMS), "triangle-64-1024-128": (TRIANGLE, DIMS),
    "triangle-8-512-128": (SMALL, DIMS),
    "8 heads dense, 24 streaming": (PerHead((DENSE,) * 8 + (STREAM,) * 24), ((128, 128),)),
    "half the heads of every group dense": (PerHead((DENSE, DENSE, STREAM, STREAM) * 8),
                                            ((128, 128),)),
    "random blocks and a window": (RandomBlocks(64, 8) | Window(512), ((128, 128),)),
    "a stride of 256 and a window": (Stride(256) | Window(512), ((128, 128),)),
}
Work = tuple[Mask, int, int, str]


def prepare(mask: Mask, dim: int, value_dim: int, backend: str, length: int) -> tuple[Any, Any]:
    """(compiled mask, inputs)."""
    return (maskdsl.compile(Causal() & mask, backend=backend),
            make_inputs(length, dim=dim, value_dim=value_dim))


def build(work: Work) -> None:
    """Compile one kernel into Triton's cache, in a process of its own."""
    attn, inputs = prepare(*work, 1024)
    attn(*inputs)
    torch.cuda.synchronize()


def run(report: Report) -> None:
    """One row for each mask, head dimension and kernel."""
    work = [(mask, dim, value_dim, backend) for mask, dims in MASKS.values()
            for dim, value_dim in dims for backend in BACKENDS]
    with ProcessPoolExecutor(12, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(build, work))
    for name, (mask, dims) in MASKS.items():
        for dim, value_dim in dims:
            if report.is_late(f"{name} {dim}"):
                return
            measure(report, name, mask, dim, value_dim)


def measure(report: Report, name: str, mask: Mask, dim: int, value_dim: int) -> None:
    """Both kernels in turns."""
    calls = []
    for backend in BACKENDS:
        attn, inputs = prepare(mask, dim, value_dim, backend, LENGTH)
        calls.append(attn)
    gap = (calls[0](*inputs) - calls[1](*inputs)).abs().max().item()
    assert gap < MOST, f"{name}, {dim}: the kernels differ by {gap}"
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, found in zip(calls, times, strict=True):
            found.append(time_ms(call, *inputs, repeat_ms=60))
    portable, hopper = map(statistics.median, times)
    report.add(mask=name, length=LENGTH, heads=f"{HEADS}:{KV_HEADS}",
               head_dim=f"{dim}/{value_dim}", portable_ms=portable, hopper_ms=hopper,
               portable_over_hopper=portable / hopper, largest_difference=gap)
