"""`Where`: functions become geometry where they can, and say so where they cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from maskdsl import Causal, Shape, Sink, Where, Window, dense, errors
from maskdsl.codegen.planner import make_plan
from maskdsl.spans import spans
from maskdsl.trace import is_traceable, trace

FLAGS = torch.tensor([True, False] * 50)


def geometry(mask: Any) -> list[tuple[Any, ...]]:
    return [(p.lo, p.hi, p.first, p.last, p.rest) for p in spans(mask)]


@pytest.mark.parametrize(("fn", "same"), [
    (lambda b, h, q, k: (q >= k) & (q - k < 9), Window(9)),
    (lambda b, h, q, k: (k <= q) & (q < k + 9), Window(9)),
    (lambda b, h, q, k: q >= k, Causal()),
    (lambda b, h, q, k: ~(q < k), Causal()),
    (lambda b, h, q, k: k < 4, Sink(4)),
    (lambda b, h, q, k: torch.logical_and(q >= k, torch.abs(q - k) < 9), Window(9)),
])
def test_a_traced_function_has_the_geometry_of_its_atom(fn: Any, same: Any) -> None:
    assert geometry(Where(fn)) == geometry(same)
    assert all(piece.is_exact for piece in spans(Where(fn)))


@pytest.mark.parametrize("fn", [
    lambda b, h, q, k: torch.where(q < 10, k < 4, q - k < 3),
    lambda b, h, q, k: torch.logical_or(torch.logical_not(q >= k), torch.eq(q, k)),
    lambda b, h, q, k: torch.logical_xor(q % 2 == 0, k % 3 == 1),
    lambda b, h, q, k: torch.minimum(q, k) > 4,
    lambda b, h, q, k: torch.maximum(q, k) - 3 <= q,
    lambda b, h, q, k: (q // 4 == k // 4) ^ (k < 7),
    lambda b, h, q, k: (q != k) & True,
    lambda b, h, q, k: (-k + 2 * q) % 5 != 2,
    lambda b, h, q, k: q * q >= k * 3,
    lambda b, h, q, k: q.ge(k) if hasattr(q, "ge") else q >= k,
])
def test_traced_functions_mean_what_they_say(fn: Any) -> None:
    from maskdsl.tiles import rasterise

    for shape in (Shape(20, 20), Shape(9, 30)):
        assert (rasterise(Where(fn), shape) == dense(Where(fn), shape)[0, 0].numpy()).all()


@pytest.mark.parametrize("fn", [
    lambda b, h, q, k: q >= k and k < 4,
    lambda b, h, q, k: 0 <= q - k < 4,
    lambda b, h, q, k: not q >= k,
    lambda b, h, q, k: FLAGS[k],
    lambda b, h, q, k: torch.sin(q) > 0,
    lambda b, h, q, k: q / 2 > k,
    lambda b, h, q, k: q - k,
    lambda b, h, q, k: k % -3 == 0,
    lambda b, h, q, k: k < 1 << 40,
])
def test_what_cannot_be_traced_is_told(fn: Any) -> None:
    assert not is_traceable(Where(fn))
    with pytest.raises(errors.TraceError, match="instead:"):
        trace(Where(fn))


def test_a_function_that_reads_a_tensor_still_has_a_dense_meaning() -> None:
    live = dense(Where(lambda b, h, q, k: FLAGS[k] & (q >= k)), Shape(10, 10))[0, 0]
    assert live.sum(1).tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_a_truth_value_is_told_also_where_nothing_is_traced() -> None:
    mask = Where(lambda b, h, q, k: q >= k and k < 4)
    with pytest.raises(errors.TraceError, match="chained comparison"):
        dense(mask, Shape(8, 8))


def test_heads_may_differ() -> None:
    mask = Where(lambda b, h, q, k: (q >= k) & (q - k < 3 * (h + 1) + b))
    live = dense(mask, Shape(20, 20), batch=2, heads=2)
    assert live[0, 0].sum() < live[1, 0].sum() < live[0, 1].sum()
    assert make_plan(mask, 16, 16).needs_head
    assert not make_plan(Window(3), 16, 16).needs_head


@pytest.mark.parametrize("fn", [3, lambda q, k: q >= k, lambda: True])
def test_what_is_no_mask_mod_is_told(fn: Any) -> None:
    with pytest.raises(errors.AtomArgumentError, match="lambda b, h, q, k"):
        Where(fn)
