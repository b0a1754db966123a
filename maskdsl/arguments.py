"""Checks on what atoms are built from; each failure is an AtomArgumentError."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from maskdsl.errors import AtomArgumentError
from maskdsl.expr import Bool, Index, Mask

MAX_SIZE = 1 << 30  # tokens; kernels compute positions in 32 bits
MAX_RUNS = 512  # a static list becomes one comparison a run in the kernel's text


def integer(self: Mask, name: str, least: int | None = 0) -> int:
    """The field `name` as an int, or an AtomArgumentError; `least` None allows any integer."""
    value = getattr(self, name)
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or (least is not None and number < least):
        bound = "an integer" if least is None else f"an integer >= {least}"
        raise AtomArgumentError(f"{type(self).__name__}({name}={value!r})",
                                f"{name} must be {bound}, in tokens",
                                f"{type(self).__name__}({name}={max(least or 0, 4)})")
    if abs(number) > MAX_SIZE:
        raise AtomArgumentError(f"{type(self).__name__}({name}={value!r})",
                                f"{name} may be at most {MAX_SIZE}: positions are 32-bit",
                                f"{type(self).__name__}({name}={MAX_SIZE})")
    object.__setattr__(self, name, number)
    return number


def integers(self: Mask, name: str, least: int | None) -> tuple[int, ...]:
    """The field `name` as a tuple of ints, or an AtomArgumentError."""
    value = getattr(self, name)
    wrote = f"{type(self).__name__}({value!r})"
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes)):
        raise AtomArgumentError(wrote, f"{name} must be a list of integers",
                                f"{type(self).__name__}([0, 64, 128])")
    items = tuple(value)
    bad = [i for i in items if isinstance(i, bool) or not hasattr(i, "__index__")
           or (least is not None and operator.index(i) < least) or abs(i) > MAX_SIZE]
    if bad:
        bound = f"integers {'' if least is None else f'>= {least} '}up to {MAX_SIZE}"
        raise AtomArgumentError(wrote, f"{name} must hold {bound}, but it holds {bad[0]!r}",
                                f"{type(self).__name__}([0, 64, 128])")
    return tuple(operator.index(i) for i in items)


def runs_of(values: tuple[int, ...]) -> list[tuple[int, int]]:
    """Sorted distinct integers as half-open runs: 1, 2, 3, 7  -->  [1, 4), [7, 8)."""
    starts = [v for i, v in enumerate(values) if i == 0 or values[i - 1] != v - 1]
    ends = [v + 1 for i, v in enumerate(values) if i + 1 == len(values) or values[i + 1] != v + 1]
    return list(zip(starts, ends, strict=True))


def check_runs(self: Mask, name: str, values: tuple[int, ...]) -> None:
    """Refuse a list that would make the kernel's text too long."""
    runs = len(runs_of(values))
    if runs > MAX_RUNS:
        raise AtomArgumentError(f"{type(self).__name__} with {len(values)} {name}",
                                f"a static list may have at most {MAX_RUNS} separate runs, "
                                f"this one has {runs}",
                                "fewer or adjacent entries, or Where(fn) with a formula")


def in_runs(x: Index, values: tuple[int, ...]) -> Bool:
    """Whether x is one of `values`, as a chain of interval tests; False for an empty list."""
    runs = runs_of(values) or [(0, 0)]
    result: Bool = (x >= runs[0][0]) & (x < runs[0][1])
    for lo, hi in runs[1:]:
        result = result | ((x >= lo) & (x < hi))
    return result
