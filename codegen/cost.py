"""Predicted milliseconds of a call, from the steps its loops make and measured rates.

    time of the kernel = max(steps spread over all multiprocessors, the longest item alone,
                             bytes that must cross the memory bus, the host's part of the call)
    time of the call   = that + making the lists from call-time data + estimating that data

Every step costs what it cost in measurements (`rates`), whatever the mask: full tiles, masked ones,
listed ones, gathered columns, and a constant for each query tile. A prediction is never a
measurement and says so; `python -m benchmarks.run cost` measures how far off it is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from maskdsl.codegen.rates import CHIPS, RATES, Rates, StepRates
from maskdsl.codegen.visits import Visited
from maskdsl.codegen.workload import CallHeads
from maskdsl.errors import BackendError
from maskdsl.shape import Shape

ITEM_BYTES = 2  # an element: rates are for 16-bit inputs


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a call is predicted to take, in milliseconds, and why.

    chip           name of the chip; target: the backend whose rates were used
    tile           (queries, keys) per tile; of the Hopper kernel (rows, keys), rows being heads x
                   positions
    ms             the whole call: the sum of the next three
    kernel_ms      the attention kernel; listing_ms: lists from call-time data; estimate_ms: making
                   that data, where an estimator was named
    compute_ms     the steps on all multiprocessors; longest_ms: the longest item alone; memory_ms:
                   queries, keys, values and output once over the bus; host_ms: the host's part
    bound_by       which of the four decides
    tile_tflop     10^12 operations on the visited tiles; live_tflop: on live pairs (None: unknown)
    roof_ms        what the visited tiles would take at the matrix product's measured rate
    notes          what was scaled or assumed
    sources        the measurements behind the rates
    """

    chip: str
    target: str
    tile: tuple[int, int]
    ms: float
    kernel_ms: float
    listing_ms: float
    estimate_ms: float
    compute_ms: float
    longest_ms: float
    memory_ms: float
    host_ms: float
    bound_by: str
    tile_tflop: float
    live_tflop: float | None
    roof_ms: float
    notes: tuple[str, ...]
    sources: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self) | {"tile": list(self.tile), "notes": list(self.notes),
                               "sources": list(self.sources)}


def find_rates(chip: str, target: str = "triton") -> Rates:
    """The rates of a chip ("H100", "sm_90") and backend, or a BackendError."""
    arch = CHIPS.get(chip, chip)
    if (arch, target) not in RATES:
        known = sorted({rates.name for rates in RATES.values()})
        raise BackendError(f"chip={chip!r}, backend {target!r}", "nothing was measured there, so "
                           "nothing can be predicted", " or ".join(
                               f"chip={name.split()[0]!r}" for name in known) +
                           ", or `python -m benchmarks.run cost` on that chip, whose fitted rates "
                           "go into codegen/rates.py")
    return RATES[arch, target]


def padded(dim: int) -> int:
    """A head dimension as the kernel computes with it: the next power of two, at least 64 (smaller
    ones were not measured)."""
    return max(64, 1 << (dim - 1).bit_length())


def step_us(rates: Rates, tile: tuple[int, int], call: CallHeads, visited: Visited) -> float:
    """Microseconds of one multiprocessor for all steps."""
    r = rates.find(*tile, padded(max(call.head_dim, call.value_dim)))
    beside = r.beside * (visited.full + visited.masked) if visited.listed else 0.0
    return (visited.items * r.item + visited.full * r.full + visited.masked * r.masked
            + visited.listed_full * r.listed_full + visited.listed_part * r.listed_part
            + visited.slash * r.slash + visited.columns * r.column + beside
            + visited.first / tile[1] * r.first)


def longest_us(steps: StepRates, tile: tuple[int, int], visited: Visited) -> float:
    """Microseconds of the longest item alone."""
    if not visited.items:
        return 0.0
    first = visited.first / visited.items / tile[1]
    return steps.item + first * steps.first + visited.longest * steps.full


def memory_bytes(shape: Shape, call: CallHeads) -> int:
    """Bytes of queries, keys, values and output, each once."""
    queries = call.heads * shape.q_len * (call.head_dim + call.value_dim)
    keys = call.kv_heads * shape.kv_len * (call.head_dim + call.value_dim)
    return ITEM_BYTES * call.batch * (queries + keys)


def estimate_ms(rates: Rates, estimator: str, shape: Shape, call: CallHeads) -> float:
    """An estimator's predicted milliseconds."""
    if estimator not in rates.estimates:
        raise BackendError(f"estimator={estimator!r}", "it was not measured",
                           " or ".join(map(repr, sorted(rates.estimates))))
    known = rates.estimates[estimator]
    heads = call.batch * call.heads / known.heads
    return known.ms * heads * (shape.kv_len / known.length) ** known.power


def predict(rates: Rates, tile: tuple[int, int], shape: Shape, call: CallHeads, visited: Visited,
            live_pairs: int | None = None, lists: bool = False,
            estimator: str | None = None) -> Prediction:
    """The predicted time of one call.

    visited    steps of all heads together; live_pairs: of all heads together
    lists      whether lists are made from call-time data before the kernel
    estimator  the name of the estimator whose time counts too; None for data that is there
    """
    steps = rates.find(*tile, padded(max(call.head_dim, call.value_dim)))
    times = {
        "compute": step_us(rates, tile, call, visited) / rates.processors / 1e3,
        "longest item": longest_us(steps, tile, visited) / 1e3,
        "memory": memory_bytes(shape, call) / rates.tera_bytes / 1e9,
        "host": rates.call_ms}
    bound_by = max(times, key=lambda name: times[name])
    operations = 2 * (call.head_dim + call.value_dim)
    tile_tflop = operations * tile[0] * (visited.steps * tile[1] + visited.first) / 1e12
    listing = rates.listing_ms if lists else 0.0
    estimate = 0.0 if estimator is None else estimate_ms(rates, estimator, shape, call)
    notes = [steps.source] if steps.source.startswith("not measured") else []
    wide = padded(max(call.head_dim, call.value_dim))
    if (call.head_dim, call.value_dim) != (wide, wide):
        notes.append(f"head dimensions {call.head_dim} and {call.value_dim} taken as {wide}, "
                     "to which the kernel pads")
    return Prediction(
        rates.name, rates.target, tile, times[bound_by] + listing + estimate, times[bound_by],
        listing, estimate, times["compute"], times["longest item"], times["memory"],
        times["host"], bound_by, tile_tflop,
        None if live_pairs is None else operations * live_pairs / 1e12,
        tile_tflop / rates.tera_flops * 1e3, tuple(notes),
        (*(() if notes and notes[0] == steps.source else
           (f"steps of {tile[0]} x {tile[1]} tiles: {steps.source}",)), *rates.sources))
