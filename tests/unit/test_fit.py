"""The least squares that turn measured calls into rates of the cost model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def fit(project: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(project))
    from benchmarks import fit as module

    return module


def make_calls(fit: Any, rates: dict[str, float], noise: float) -> list[Any]:
    chance = random.Random(7)
    calls = []
    for _ in range(40):
        steps = tuple(chance.randrange(1, 10**6) if name in rates else 0 for name in fit.NAMES)
        us = sum(rates.get(name, 0.0) * x for name, x in zip(fit.NAMES, steps, strict=True))
        calls.append(fit.Call(steps, us / 132 / 1e3 * chance.uniform(1 - noise, 1 + noise), 132))
    return calls


def test_rates_are_found_again(fit: Any) -> None:
    rates = {"item": 1.8, "full": 0.5, "masked": 0.65, "slash": 0.7, "column": 1.2}
    found = fit.fit_steps(make_calls(fit, rates, 0.0))
    assert found == pytest.approx(rates)
    assert max(map(abs, fit.relative_errors(make_calls(fit, rates, 0.0), found))) < 1e-9


def test_noise_does_not_make_a_rate_negative(fit: Any) -> None:
    rates = {"item": 0.0, "full": 0.5, "masked": 1e-4}
    calls = make_calls(fit, rates, 0.05)
    found = fit.fit_steps(calls)
    assert set(found) == set(rates) and min(found.values()) >= 0
    assert found["full"] == pytest.approx(0.5, rel=0.1)
    assert max(map(abs, fit.relative_errors(calls, found))) < 0.1


def test_the_best_of_all_choices_is_taken(fit: Any) -> None:
    """Two kinds of steps always in one proportion: any split fits, none may be negative."""
    calls = [fit.Call((0, n, 2 * n, 0, 0, 0, 0, 0, 0), n / 1e3, 1) for n in (3, 8, 90)]
    found = fit.fit_steps(calls)
    assert found["full"] + 2 * found["masked"] == pytest.approx(1.0)
