"""Laws 1, 2, 7 and 9: operators, simplification, round trips, order of operands."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import FUNCTIONS, masks, shapes

import maskdsl
from maskdsl import (
    Band,
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
    Shape,
    Sink,
    Slash,
    Stride,
    Vertical,
    Where,
    Window,
    dense,
    from_json,
    simplify,
)
from maskdsl.codegen.emit import emit_source
from maskdsl.codegen.planner import make_plan
from maskdsl.expr import And, Or, join
from maskdsl.rewrite import rewrite_mask
from maskdsl.simplify import RULES


@given(masks(), masks(), shapes())
def test_operators_are_those_of_sets(a: Mask, b: Mask, shape: Shape) -> None:
    left, right = dense(a, shape), dense(b, shape)
    assert torch.equal(dense(a | b, shape), left | right)
    assert torch.equal(dense(a & b, shape), left & right)
    assert torch.equal(dense(~a, shape), ~left)
    assert torch.equal(dense(a - b, shape), left & ~right)


@given(masks(max_leaves=8), shapes())
def test_simplifying_keeps_every_pair(mask: Mask, shape: Shape) -> None:
    assert torch.equal(dense(simplify(mask), shape), dense(mask, shape))


EXAMPLES: list[tuple[str, Mask, Mask]] = [
    ("~Full", ~Full(), Empty()),
    ("~Empty", ~Empty(), Full()),
    ("a | ~a", Sink(3) | ~Sink(3), Full()),
    ("a & ~a", Sink(3) & ~Sink(3), Empty()),
    ("Sink(a) | Sink(b)", Sink(3) | Sink(9), Sink(9)),
    ("Sink(a) & Sink(b)", Sink(3) & Sink(9), Sink(3)),
    ("LastQ(a) | LastQ(b)", LastQ(3) | LastQ(9), LastQ(9)),
    ("FirstQ(a) | FirstQ(b)", FirstQ(3) | FirstQ(9), FirstQ(9)),
    ("Window | Window", Window(3, 7) | Window(9), Window(9, 7)),
    ("Window(a, b) & Window(c, d)", Window(3, 7) & Window(9), Window(3)),
    ("Causal & Window(a, b)", Causal() & Window(5, 8), Window(5)),
    ("Causal & PrefixLM(n)", Causal() & PrefixLM(8), Causal()),
    ("Causal | Sink(n)", Causal() | Sink(8), PrefixLM(8)),
    ("KeyRange | KeyRange", KeyRange(3, 9) | KeyRange(9, 20), KeyRange(3, 20)),
    ("KeyRange & KeyRange", KeyRange(3, 9) & KeyRange(5, 20), KeyRange(5, 9)),
    ("QueryRange & QueryRange", QueryRange(3, 9) & QueryRange(12, 20), Empty()),
    ("Chunk(a) & Chunk(b)", Chunk(4) & Chunk(12), Chunk(4)),
    ("Chunk(a) | Chunk(b)", Chunk(4) | Chunk(12), Chunk(12)),
    ("Stride(a) & Stride(b)", Stride(12, 5) & Stride(4, 1), Stride(12, 5)),
    ("Stride(a) & Stride(b)", Stride(12, 5) & Stride(4, 2), Empty()),
    ("Vertical(a) | Vertical(b)", Vertical((1, 5)) | Vertical((3,)), Vertical((1, 3, 5))),
    ("Slash(a) | Slash(b)", Slash((1, 5)) | Slash((3,)), Slash((1, 3, 5))),
    ("a | b --> b", Band(2, 3) | Window(9), Window(9)),
    ("a & b --> a", Band(2, 3) & Window(9), Band(2, 3)),
    ("a & b --> Empty", Sink(4) & KeyRange(8, 20), Empty()),
]


@pytest.mark.parametrize(("law", "mask", "expected"), EXAMPLES, ids=lambda x: str(x)[:40])
def test_each_rule_fires_and_keeps_every_pair(law: str, mask: Mask, expected: Mask) -> None:
    (rule,) = (r for r in RULES if r.law.startswith(law))
    assert rewrite_mask(mask, [rule]) == expected
    for shape in (Shape(40, 40), Shape(7, 30), Shape(30, 7), Shape(9, 20, 3, 60)):
        assert torch.equal(dense(mask, shape), dense(expected, shape))


def test_no_rule_lacks_an_example() -> None:
    for rule in RULES:
        assert any(rule.law.startswith(law) for law, _, _ in EXAMPLES), rule.law


def without_functions(mask: Mask) -> bool:
    return not any(isinstance(node, Where) for node in mask.walk())


@given(masks(max_leaves=8).filter(without_functions))
def test_text_round_trips(mask: Mask) -> None:
    names = {name: getattr(maskdsl, name) for name in maskdsl.__all__}
    assert eval(repr(mask), names) == mask
    assert from_json(mask.to_json()) == mask


@given(masks(max_leaves=8))
def test_pickle_round_trips(mask: Mask) -> None:
    again = pickle.loads(pickle.dumps(mask))
    assert again == mask
    assert hash(again) == hash(mask)


def test_fingerprint_is_the_same_in_every_process() -> None:
    mask = Causal() & (Sink(4) | Window(9) | Vertical((3, 5))) - Chunk(7)
    program = f"from maskdsl import *; print(({mask!r}).fingerprint)"
    for seed in ("1", "2"):
        run = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True,
                             check=True, env=os.environ | {"PYTHONHASHSEED": seed})
        assert run.stdout.strip() == mask.fingerprint


@given(st.lists(masks(max_leaves=2), min_size=2, max_size=5), st.randoms(),
       st.sampled_from([Or, And]))
def test_the_order_of_operands_changes_nothing(args: list[Mask], random: object,
                                               kind: type[Or] | type[And]) -> None:
    mask = join(kind, tuple(args))
    random.shuffle(args)  # type: ignore[attr-defined]
    again = join(kind, tuple(args))
    assert again == mask
    assert hash(again) == hash(mask)
    assert again.fingerprint == mask.fingerprint
    one, two = make_plan(simplify(mask), 16, 16), make_plan(simplify(again), 16, 16)
    assert emit_source(one) == emit_source(two)


def test_functions_are_told_apart() -> None:
    assert len({Where(f) for f in FUNCTIONS}) == len(FUNCTIONS)
    assert Where(FUNCTIONS[0]) == Where(FUNCTIONS[0])


def test_functions_of_one_name_are_told_apart_under_operators() -> None:
    def make(n: int) -> Mask:
        return Where(lambda b, h, q, k: q - k < n)

    a, b = make(3), make(5)
    assert (~a).fingerprint != (~b).fingerprint
    assert (~a | ~b) == (~b | ~a)
    assert (~a | ~b) != (~a | ~a)
