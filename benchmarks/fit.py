"""Rates of the cost model from measured calls: least squares on relative errors, none negative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

# what a `StepRates` holds, and what of a call's steps each is multiplied with
NAMES = ("item", "full", "masked", "listed_full", "listed_part", "slash", "column", "beside",
         "first")


@dataclass(frozen=True)
class Call:
    """One measured call.

    steps       of all its heads together, in the order of NAMES
    ms          measured, less what is not the kernel's (making lists)
    processors  multiprocessors of the chip
    """

    steps: tuple[float, ...]
    ms: float
    processors: int


def fit_steps(calls: Sequence[Call]) -> dict[str, float]:
    """Microseconds of one multiprocessor for each kind of step.

    Of all choices of steps that cost something, the one whose unrestricted fit has no negative rate
    and the smallest squared relative error: exact for so few unknowns. A kind of step that no call
    makes is left out of the result.
    """
    table = np.array([[x / call.processors / 1e3 / call.ms for x in call.steps] for call in calls])
    seen = [i for i in range(len(NAMES)) if table[:, i].any()]
    ones = np.ones(len(calls))
    best, error = np.zeros(len(NAMES)), float("inf")
    for size in range(1, min(len(seen), len(calls)) + 1):
        for chosen in combinations(seen, size):
            some = table[:, list(chosen)]
            rates = np.linalg.lstsq(some, ones, rcond=None)[0]
            found = float(((some @ rates - ones) ** 2).sum())
            if (rates >= 0).all() and found < error * (1 - 1e-9):
                best, error = np.zeros(len(NAMES)), found
                best[list(chosen)] = rates
    return {NAMES[i]: float(best[i]) for i in seen}


def relative_errors(calls: Sequence[Call], rates: dict[str, float]) -> list[float]:
    """Predicted over measured, minus one, of every call."""
    return [sum(rates.get(name, 0.0) * x for name, x in zip(NAMES, call.steps, strict=True))
            / call.processors / 1e3 / call.ms - 1 for call in calls]
