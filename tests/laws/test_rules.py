"""Laws 2 and 9 in depth: every rule on random operands, every node shuffled."""

from __future__ import annotations

import random
from functools import reduce

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import PLACE, SIZE, atoms, masks, ranges, shapes, strides

from maskdsl import (
    Causal,
    Chunk,
    Empty,
    FirstQ,
    Full,
    KeyRange,
    LastQ,
    Mask,
    PrefixLM,
    QueryRange,
    Sink,
    Slash,
    Stride,
    Vertical,
    Window,
    dense,
    simplify,
)
from maskdsl.codegen.emit import emit_source
from maskdsl.codegen.planner import make_plan
from maskdsl.expr import And, Not, Or, join, operands
from maskdsl.rewrite import Rule
from maskdsl.simplify import RULES
from maskdsl.spans import spans

OPERANDS: dict[type[Mask], st.SearchStrategy[Mask]] = {
    Mask: atoms(),
    Not: masks(2).map(lambda mask: Not(mask)),
    Full: st.just(Full()), Empty: st.just(Empty()), Causal: st.just(Causal()),
    Sink: st.builds(Sink, SIZE), LastQ: st.builds(LastQ, SIZE), FirstQ: st.builds(FirstQ, SIZE),
    Window: st.builds(Window, SIZE, SIZE), PrefixLM: st.builds(PrefixLM, SIZE),
    KeyRange: ranges(KeyRange), QueryRange: ranges(QueryRange),
    Chunk: st.builds(Chunk, st.integers(1, 12)), Stride: strides(),
    Vertical: st.builds(Vertical, st.lists(PLACE, max_size=5).map(tuple)),
    Slash: st.builds(Slash, st.lists(st.integers(-20, 60), max_size=5).map(tuple)),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.law)
@given(data=st.data())
def test_a_rule_holds_for_any_operands(rule: Rule, data: st.DataObject) -> None:
    args = tuple(data.draw(OPERANDS[kind]) for kind in rule.types)
    result = rule.fire(args)
    if result is not None:
        shape = data.draw(shapes(50))
        whole = Not(args[0]) if rule.kind is Not else rule.kind(args)  # type: ignore[call-arg]
        assert torch.equal(dense(result, shape), dense(whole, shape))


@given(masks(6))
def test_simplifying_ends_and_never_grows(mask: Mask) -> None:
    smaller = simplify(mask)
    assert len(list(smaller.walk())) <= len(list(mask.walk()))
    assert simplify(smaller) == smaller


def test_lists_too_long_for_one_atom_stay_two() -> None:
    for kind in (Vertical, Slash):
        a, b = kind(tuple(range(0, 1200, 4))), kind(tuple(range(2, 1200, 4)))
        assert simplify(a | b) == a | b
        assert len(spans(a | b)) == 2


def shuffle(mask: Mask, source: random.Random) -> Mask:
    """The same expression with the operands of every node written in another order."""
    below = [shuffle(arg, source) for arg in operands(mask)]
    if isinstance(mask, Not):
        return ~below[0]
    if not isinstance(mask, (Or, And)):
        return mask
    source.shuffle(below)
    return reduce(lambda a, b: a | b if isinstance(mask, Or) else a & b, below)


def wide_masks() -> st.SearchStrategy[Mask]:
    """Expressions with several operands a node."""
    return st.builds(lambda kind, parts: join(kind, tuple(parts)), st.sampled_from([Or, And]),
                     st.lists(masks(3), min_size=2, max_size=4))


def source_from_scratch(mask: Mask) -> str:
    """The kernel's text, with no help from what was planned before."""
    make_plan.cache_clear()
    spans.cache_clear()
    return emit_source(make_plan(simplify(mask), 16, 16))


@given(wide_masks(), st.randoms(use_true_random=False))
def test_shuffling_every_node_changes_nothing(mask: Mask, source: random.Random) -> None:
    other = shuffle(mask, source)
    assert other == mask
    assert hash(other) == hash(mask)
    assert other.fingerprint == mask.fingerprint
    assert source_from_scratch(other) == source_from_scratch(mask)


@given(masks(), masks())
def test_fingerprints_differ_where_masks_do(a: Mask, b: Mask) -> None:
    assert (a.fingerprint == b.fingerprint) == (a == b)
