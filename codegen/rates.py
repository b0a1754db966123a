"""What one step of each loop takes, by chip and backend: the measured side of the cost model.

Every number was fitted to measurements that are named beside it, or says that it was not. To add a
chip, or another backend on a known one, run `python -m benchmarks.run cost` there: it prints the
fitted numbers as a `Rates` to put here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

TileKey = tuple[int, int, int]  # (BLOCK_M, BLOCK_N, head dimension rounded up to a power of two)


@dataclass(frozen=True, slots=True)
class StepRates:
    """Microseconds of one whole multiprocessor that a step of each loop takes, at one tile size.

    item         a query tile: its queries in, its output out
    full         a key tile without a mask; masked: with one
    listed_full  a key tile listed by a table, live throughout; listed_part: live in part
    slash        a key tile at a listed distance
    column       a step of gathered columns, as many as a tile has keys
    first        an item's first tile (Hopper kernel), for as many keys as a tile has
    beside       what a static step takes more in a kernel that also has listed loops
    source       the measurements behind the numbers
    """

    item: float
    full: float
    masked: float
    listed_full: float
    listed_part: float
    slash: float
    column: float
    beside: float
    source: str
    first: float = 0.0

    def scaled(self, factor: float, source: str) -> StepRates:
        """The same with every step `factor` times as long, but for the item's own cost."""
        more = {f.name: factor * getattr(self, f.name) for f in fields(self)
                if f.name not in ("item", "source")}
        return replace(self, **more, source=source)


@dataclass(frozen=True, slots=True)
class EstimateRate:
    """An estimator's measured milliseconds at one size.

    power   how it grows with the length: 1 or 2; reasoned from what it reads, not measured
    """

    ms: float
    length: int
    heads: int
    power: int


@dataclass(frozen=True, slots=True)
class Rates:
    """One chip and backend.

    name         the chip, for people
    arch         "sm_90", as `tune` spells it
    target       the backend: "triton" for the portable kernel, "hopper" for Hopper's own
    processors   multiprocessors
    tera_flops   the roof for matrix products in bfloat16, TFLOP/s
    tera_bytes   the roof for memory, TB/s
    call_ms      host time of a warm call: no call takes less
    listing_ms   bit sets and lists made from call-time indices
    steps        by tile size and padded head dimension
    estimates    by estimator
    """

    name: str
    arch: str
    target: str
    processors: int
    tera_flops: float
    tera_bytes: float
    call_ms: float
    listing_ms: float
    steps: MappingProxyType[TileKey, StepRates]
    estimates: MappingProxyType[str, EstimateRate]
    sources: tuple[str, ...]

    def find(self, block_m: int, block_n: int, dim: int) -> StepRates:
        """The rates of a tile size, or those of the nearest measured one, scaled by its work."""
        key = (block_m, block_n, dim)
        if key in self.steps:
            return self.steps[key]

        def gap(other: TileKey) -> tuple[float, float, float]:
            return (abs(other[2] - dim), abs(other[0] * other[1] - block_m * block_n),
                    abs(other[0] - block_m))

        near = min(self.steps, key=gap)
        factor = block_m * block_n * dim / (near[0] * near[1] * near[2])
        return self.steps[near].scaled(factor, f"not measured at {block_m} x {block_n}, D {dim}: "
                                       f"scaled from {near[0]} x {near[1]}, D {near[2]}")


def steps(item: float, full: float, masked: float, source: str, **listed: float) -> StepRates:
    """Rates of a tile size; listed steps that were not measured there keep the ratio to `full` that
    they have at 64 x 64, D 128."""
    ratios: dict[str, Any] = {name: full * value / 0.5166 for name, value in LISTED_64.items()}
    return StepRates(item, full, masked, **(ratios | listed), source=source)


# H100 SXM, 64 x 64 tiles, D 128: nine measured calls at 128K, 32 heads (vertical_slash.json and
# estimate.json: exact, block64, and in a union with a triangle; random indices; top-k blocks),
# relative least squares with the static rates and 0.45 ms of listing given: errors of 0 to 4 %.
# The calls' own indices were not kept; steps were counted on indices drawn by the same rule.
LISTED_64 = {"listed_full": 0.5630, "listed_part": 1.1657, "slash": 0.6835, "column": 1.2233,
             "beside": 0.5848}

H100 = Rates(
    name="H100 SXM", arch="sm_90", target="triton", processors=132,
    tera_flops=697, tera_bytes=3.35, call_ms=0.0806, listing_ms=0.45,
    steps=MappingProxyType({
        (64, 64, 128): steps(
            1.8021, 0.5166, 0.6508, "13 calls of sweep.json, forward.json, million.json and "
            "triangle.json (64x64, 4 warps, 3 stages); error 0 to 4 %", **LISTED_64),
        (128, 64, 128): steps(
            1.2361, 1.0584, 1.7343, "7 calls of sweep.json, dense.json and estimate.json (128x64, "
            "8 warps, 3 stages); error 1 to 4 %"),
        (64, 64, 64): steps(
            0.0, 0.3076, 0.8435, "4 calls of sweep.json (64x64, 4 warps, 2 stages); error 1 %, of "
            "calls that were fitted"),
        (64, 128, 64): steps(
            1.6547, 0.5960, 0.4152, "4 calls of sweep.json (64x128, 4 warps, 2 stages); error 0 to "
            "2 %, of calls that were fitted"),
    }),
    estimates=MappingProxyType({
        "vertical_slash": EstimateRate(1.676, 131072, 32, 1),
        "block_topk": EstimateRate(5.452, 131072, 32, 2),
        "flex_prefill": EstimateRate(6.529, 131072, 32, 2),
        "xattention": EstimateRate(14.01, 131072, 32, 2),
    }),
    sources=(
        "docs/benchmarks: sweep, forward, dense, million, triangle, vertical_slash, estimate, host "
        "(one NVIDIA H100 80GB HBM3, torch 2.11, triton 3.6.0)",
        "697 TFLOP/s: bfloat16 product of 8192 x 8192 matrices, measured on the same kind of card",
        "3.35 TB/s: the vendor's data sheet, not measured",
        "0.45 ms of listing: measured at 128K and 32 heads only, taken for all lengths (it is many "
        "small launches)",
        "estimators: measured at 128K and 32 heads (estimate.json); growth with length is reasoned",
    ),
)

MASKED = 1.7780 / 1.6309  # a masked step of the Hopper kernel over a full one, D 128 (below)


def hopper_steps(item: float, full: float, what: str) -> StepRates:
    """Rates fitted to the three calls of coverage.json at one pair of head dimensions, too few to
    tell masked steps from items: masked ones are taken in the ratio of D 128."""
    return StepRates(item=item, full=full, masked=MASKED * full, first=MASKED * full,
                     listed_full=0.0, listed_part=0.0, slash=0.0, column=0.0, beside=0.0,
                     source=f"3 calls of coverage.json at head dimensions of {what}; error 0 to "
                     "4 %, of calls that were fitted")


# The Hopper kernel on the same chip, D 128: eleven measured calls (B = 1, bfloat16; they stand in
# tests/unit/test_hopper_cost.py): five masks with 32 heads over 8 at 128K (dense at 32K), and two
# triangles with 4 and 8 heads and at 512K. Relative least squares: errors of 0 to 3 %. All but the
# dense call have one masked tile in nearly every item, so its cost cannot be told from the item's
# own: it is taken as that of a first tile of 128 keys, which is masked too.
HOPPER = replace(
    H100, target="hopper", steps=MappingProxyType({
        (128, 128, 128): StepRates(
            item=2.7385, full=1.6309, masked=1.7780, first=1.7780, listed_full=0.0,
            listed_part=0.0, slash=0.0, column=0.0, beside=0.0, source="11 calls at D 128 of one "
            "run; error 0 to 3 %"),
        (128, 128, 64): hopper_steps(1.8673, 1.2350, "64"),
        (128, 64, 256): hopper_steps(2.5503, 1.8365, "256"),
        (128, 128, 256): hopper_steps(3.3243, 2.0857, "192 and 128"),
    }),
    sources=(
        "one run of 2026-11-24/25 (NVIDIA H100 80GB HBM3, medians, noise about 3 %) that was not "
        "kept, and coverage.json; 34 later calls (docs/benchmarks/cost.json, 2026-11-25) are "
        "predicted with a median error of 5 %, at most 19 %",
        "measured before bfloat16 calls left out maxima (docs/decisions/0019-sums-instead-of-maxima"
        ".md), which on an H200 made long ones some percent faster, dense ones at D 64 a fifth",
        "host time of a call: that of the portable kernel, taken over and not measured",
        *H100.sources[1:3],
    ),
)

RATES: dict[tuple[str, str], Rates] = {(rates.arch, rates.target): rates
                                       for rates in (H100, HOPPER)}
CHIPS = {"H100": "sm_90", "H100 SXM": "sm_90", "sm_90": "sm_90"}  # names a user may give
