"""How far off are predicted times? A spread of masks, lengths and heads; and the rates fitted anew.

The rows `fit` are what a `StepRates` in codegen/rates.py would hold by this run. Run on a chip that
has no rates yet, there are no predictions, only the fit. On a Hopper GPU a call that the Hopper
kernel takes is measured twice, with that kernel and with the portable one.

Kernels are compiled in many processes first. Without a GPU this is a rehearsal at tiny sizes, with
TRITON_INTERPRET=1 by the portable kernel and else by the torch backend, and held against the rates
of an H100.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from statistics import median
from typing import Any

import torch

import maskdsl
from benchmarks.cost_cases import Case, all_cases
from benchmarks.fit import NAMES, Call, fit_steps, relative_errors
from benchmarks.measure import Report, device, make_inputs, time_ms
from maskdsl import Causal, Shape
from maskdsl.codegen.cost import padded, predict
from maskdsl.codegen.forecast import HOPPER, refuse_call_of, tile_on, total_visited
from maskdsl.codegen.hopper import is_hopper
from maskdsl.codegen.hopper_work import count_hopper, item_of
from maskdsl.codegen.kernel import arch_of, interpreting
from maskdsl.codegen.lists import sort_atoms
from maskdsl.codegen.rates import H100, RATES
from maskdsl.codegen.visits import Visited
from maskdsl.codegen.workload import CallHeads, count_work
from maskdsl.simplify import simplify

PORTABLE = "triton"
WORKERS = 12  # each holds a CUDA context and at most 3 GB of tensors


def heads_of(case: Case) -> CallHeads:
    """The heads of a case."""
    return CallHeads(1, case.heads, case.kv_heads, case.dim, case.dim)


def backends(case: Case) -> tuple[str, ...]:
    """The backends a case is counted for; a rehearsal counts for both and runs one."""
    refused = refuse_call_of(simplify(Causal() & case.mask), heads_of(case))
    hopper = device() == "cpu" or is_hopper()
    return (PORTABLE,) if refused or not hopper else (HOPPER, PORTABLE)


def runs_on(backend: str) -> str:
    """The backend that runs a case."""
    if device() == "cuda":
        return backend
    return PORTABLE if interpreting() else "torch"


def chip() -> tuple[str, int]:
    """(arch, multiprocessors) of the GPU here; in a rehearsal those of an H100."""
    if device() == "cpu":
        return "sm_90", 132
    one = torch.cuda.get_device_properties(0)
    return arch_of(torch.device("cuda")), one.multi_processor_count


# --- compile ahead --------------------------------------------------------------------------------


def distinct_kernels(cases: list[Case]) -> list[tuple[int, str]]:
    """(number of the case, backend) of each kernel's shortest call."""
    found: dict[Any, tuple[int, str]] = {}
    for i, case in sorted(enumerate(cases), key=lambda pair: pair[1].length):
        for backend in backends(case):
            found.setdefault((case.mask, case.heads, case.kv_heads, case.dim, backend),
                             (i, backend))
    return list(found.values())


def warm(number: int, backend: str) -> float:
    """One call, so that its kernels lie in Triton's cache; seconds."""
    start = time.perf_counter()
    case = all_cases()[number]
    slots = case.make() if case.make else {}
    maskdsl.compile(case.mask, backend=runs_on(backend))(
        *make_inputs(case.length, case.heads, case.kv_heads, case.dim), **slots)
    if device() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def warm_all(report: Report, cases: list[Case]) -> None:
    """Compile in many processes. What fails here fails again, and is told, when it is measured."""
    start, kernels = time.perf_counter(), distinct_kernels(cases)
    workers = min(WORKERS, max(1, (os.cpu_count() or 1) - 1), len(kernels))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        waiting = {pool.submit(warm, *kernel): kernel for kernel in kernels}
        for done in as_completed(waiting):
            if (error := done.exception()) is not None:
                number, backend = waiting[done]
                print(f"{cases[number].mask!r} on {backend}: {error!r:.200}", flush=True)
    report.about["compilation"] = (f"{len(kernels)} kernels in {workers} processes, "
                                   f"{time.perf_counter() - start:.0f} s")
    print(report.about["compilation"], flush=True)


# --- count, measure, predict ----------------------------------------------------------------------


def count(case: Case, backend: str,
          slots: dict[str, Any] | None) -> tuple[tuple[int, int], Visited]:
    """(tile, steps) of a case."""
    mask, shape, call = simplify(Causal() & case.mask), Shape(case.length, case.length), \
        heads_of(case)
    arch, processors = chip()
    if backend == HOPPER:
        works, _ = count_hopper(mask, shape, call, processors, with_pairs=False)
        return item_of(mask, call), total_visited(works)
    tile = tile_on(mask, arch, call)
    return tile, total_visited(count_work(mask, tile, shape, call, slots, with_pairs=False))


def steps_of(seen: Visited, block_n: int) -> tuple[float, ...]:
    """The steps in the order of `fit.NAMES`; first tiles in tiles of `block_n` keys."""
    beside = seen.full + seen.masked if seen.listed else 0
    return (seen.items, seen.full, seen.masked, seen.listed_full, seen.listed_part, seen.slash,
            seen.columns, beside, seen.first / block_n)


def measure(report: Report, case: Case, backend: str, calls: dict[Any, list[Call]],
            errors: dict[str, list[float]]) -> None:
    """Measure and predict one call; keep its steps for the fit."""
    slots = case.make() if case.make else None
    attn = maskdsl.compile(case.mask, backend=runs_on(backend))
    took = time_ms(attn, *make_inputs(case.length, case.heads, case.kv_heads, case.dim),
                   **(slots or {}))
    (arch, processors), call = chip(), heads_of(case)
    tile, seen = count(case, backend, slots)
    lists = bool(slots) and sort_atoms(simplify(Causal() & case.mask)).listed
    rates = RATES.get((arch, backend))
    row: dict[str, Any] = {"mask": repr(case.mask) if len(repr(case.mask)) < 90 else "PerHead",
                           "data": case.what, "length": case.length, "heads": case.heads,
                           "dim": case.dim, "backend": backend, "tile": f"{tile[0]}x{tile[1]}",
                           "ms": took}
    if rates is not None:
        found = predict(rates, tile, Shape(case.length, case.length), call, seen, None, bool(lists))
        row |= {"predicted": found.ms, "error": found.ms / took - 1, "bound_by": found.bound_by,
                "rates": found.notes[0] if found.notes else "measured"}
        errors[f"{backend}, {'dynamic' if lists else 'static'}"].append(abs(found.ms / took - 1))
    listing = (rates or H100).listing_ms if lists else 0.0
    if took > 2 * listing and (rates is None or row["bound_by"] == "compute"):
        calls[(backend, *tile, padded(case.dim))].append(
            Call(steps_of(seen, tile[1]), took - listing, processors))
    report.add(**row, steps=dict(zip(NAMES, steps_of(seen, tile[1]), strict=True)))


def run(report: Report) -> None:
    """Every case; then median and largest error, and the fitted rates."""
    calls: dict[Any, list[Call]] = defaultdict(list)
    errors: dict[str, list[float]] = defaultdict(list)
    cases = all_cases()
    if device() == "cuda":
        warm_all(report, cases)
    else:
        report.about["rehearsal"] = "no GPU: tiny calls, whose times and errors say nothing"
    for i, case in enumerate(cases):
        if report.is_late(f"{len(cases) - i} of {len(cases)} calls"):
            break
        for backend in backends(case):
            try:
                measure(report, case, backend, calls, errors)
            except (RuntimeError, maskdsl.MaskDSLError) as error:  # a row, not the run
                report.add(mask=repr(case.mask)[:90], length=case.length, backend=backend,
                           failed=f"{type(error).__name__}: {str(error)[:200]}")
        if device() == "cuda":
            torch.cuda.empty_cache()
    summarise(report, errors)
    fit_all(report, calls)


def summarise(report: Report, errors: dict[str, list[float]]) -> None:
    """A row for each kind of call, and the sentence that docs quote."""
    every = [error for some in errors.values() for error in some]
    for kind, some in [*errors.items(), ("all", every)] if every else ():
        report.add(mask=f"{kind}: {len(some)} calls", data="median error", error=median(some))
        report.add(mask=f"{kind}: {len(some)} calls", data="largest error", error=max(some))


def fit_all(report: Report, calls: dict[Any, list[Call]]) -> None:
    """The rates of each kernel by these measurements."""
    for (backend, block_m, block_n, dim), some in calls.items():
        if len(some) < 2:
            continue
        rates = fit_steps(some)
        left = median(map(abs, relative_errors(some, rates)))
        report.add(mask=f"fit of {backend}, {block_m}x{block_n}, D {dim}: {len(some)} calls",
                   data="median error of the fit", error=left, steps=rates)
