"""Expressions: operators, the normal form, and what they refuse."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest

from maskdsl import Causal, LastQ, Mask, Sink, Where, Window, errors, from_json
from maskdsl.expr import And, Not, Or

A, B, C = Sink(1), Window(2), LastQ(3)


def test_normal_form_is_flat_sorted_and_without_duplicates() -> None:
    assert Or((C, A, B)) == (A | B) | (C | A)
    assert repr(C | (B | A)) == "LastQ(3) | Sink(1) | Window(2)"
    assert A | A == A
    assert And((C, A, B)) == (A & B) & (C & A)
    assert isinstance(A | (B & C), Or)


def test_negation_and_difference() -> None:
    assert ~~A == A
    assert A - B == A & ~B
    assert Not(A | B) == ~(A | B)
    assert repr(~(A | B) & C) == "LastQ(3) & ~(Sink(1) | Window(2))"
    assert repr((A | B) & C) == "LastQ(3) & (Sink(1) | Window(2))"


@pytest.mark.parametrize("use", [bool, lambda m: m and A, lambda m: m or A, lambda m: not m,
                                 lambda m: 1 if m else 2])
def test_a_mask_has_no_truth_value(use: Any) -> None:
    with pytest.raises(errors.AmbiguousTruthError, match=r"`\|` for or, `&` for and, `~` for not"):
        use(A | B)


@pytest.mark.parametrize("use", [lambda: A | 3, lambda: A & None, lambda: A - "x",
                                 lambda: A | (lambda b, h, q, k: q >= k)])
def test_only_masks_combine(use: Any) -> None:
    with pytest.raises(errors.MaskTypeError, match="not a mask"):
        use()


def test_masks_are_immutable_keys() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        A.n = 5  # type: ignore[misc]
    assert {A | B: 1}[B | A] == 1
    assert not hasattr(A, "__dict__")


@pytest.mark.parametrize("text", [
    "", "3", "{}", "[]", '{"Sink": [1], "Window": [2]}', '{"Or": []}', '{"Or": [{"Sink": [1]}]}',
    '{"Unknown": [1]}', '{"Sink": 4}', '{"Sink": [1, 2]}', '{"Not": 3}'])
def test_what_is_no_mask_as_json_is_told(text: str) -> None:
    with pytest.raises(errors.SerializationError, match=r"written by mask\.to_json"):
        from_json(text)


def test_a_wrong_argument_in_json_is_told() -> None:
    with pytest.raises((errors.AtomArgumentError, errors.SerializationError), match="n must be"):
        from_json('{"Sink": [-1]}')


def test_a_function_has_no_json() -> None:
    with pytest.raises(errors.SerializationError, match="no JSON form"):
        (A | Where(lambda b, h, q, k: q >= k)).to_json()


def test_errors_pickle_with_their_parts() -> None:
    error = errors.RankError("q [3]", "1 dimension", "4 of them")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is errors.RankError
    assert str(again) == str(error)
    assert again.instead == "4 of them"


def test_walk_visits_every_node() -> None:
    mask: Mask = (A | B) & ~C
    assert {repr(node) for node in mask.walk()} == {repr(mask), repr(A | B), repr(~C), repr(A),
                                                    repr(B), repr(C)}


def test_picture() -> None:
    assert Causal().picture(2, 3) == "##·\n###"
