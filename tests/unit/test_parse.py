"""Texts become masks, and nothing else happens."""

from __future__ import annotations

import builtins
import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import masks

from maskdsl import (
    Band,
    Causal,
    LastQ,
    Mask,
    PerHead,
    Sink,
    Slash,
    VerticalSlash,
    Where,
    Window,
    parse,
)
from maskdsl.errors import AtomArgumentError, ExpressionError, MaskDSLError, SerializationError
from maskdsl.expr import ATOMS
from maskdsl.parse import known_names
from maskdsl.patterns import longformer, triangle


@pytest.mark.parametrize(("text", "mask"), [
    ("Sink(4) | Window(2048) | LastQ(64)", Sink(4) | Window(2048) | LastQ(64)),
    ("  Causal() & ~Window(2)\n", Causal() & ~Window(2)),
    ("Causal() - Window(left=2, right=1)", Causal() - Window(2, 1)),
    ("Window(4 * 1024 - 2 ** 3)", Window(4088)),
    ("Slash(range(0, 100, 10))", Slash(range(0, 100, 10))),
    ("Slash([-1, 3])", Slash([-1, 3])),
    ("Diagonal(-2, 3)", Band(-2, 3)),
    ("PerHead([Causal(), Window(3)])", PerHead([Causal(), Window(3)])),
    ('VerticalSlash("vs", slash="block64")', VerticalSlash("vs", "block64")),
    ("triangle(window=64) | longformer(8, causal=True)",
     triangle(window=64) | longformer(8, causal=True)),
    ('{"Or": [{"Sink": [1]}, {"Window": [2, 0]}]}', Sink(1) | Window(2))])
def test_texts(text: str, mask: Mask) -> None:
    assert parse(text) == mask


@given(masks().filter(lambda mask: not any(isinstance(n, Where) for n in mask.walk())))
def test_parse_undoes_repr(mask: Mask) -> None:
    assert parse(repr(mask)) == mask


@pytest.mark.parametrize(("text", "told"), [
    ("", "not the text"), ("Sink(4", "never closed"), ("Sink(4) |", "invalid syntax"),
    ("Sonk(4)", "unknown name 'Sonk'"), ("Sink", "without its arguments"),
    ("Sink()", "missing 1 required"), ("Sink(4, 5)", "takes 2 positional"),
    ("Sink(4) + Window(2)", "Add between a Sink and a Window"), ("4", "a int, not a mask"),
    ("Sink(4) and Window(2)", "one yes or no"), ("not Sink(4)", "Not of a Sink"),
    ("Where(lambda b, h, q, k: q >= k)", "a function has no text"),
    ("__import__('os').system('true')", "bare names"), ("Sink(4).__class__", "Attribute"),
    ("[Sink(4)][0]", "Subscript"), ("(lambda: Sink(4))()", "bare names"),
    ("Sink(n := 4)", "NamedExpr"), ("Sink(*[4])", "without \\* or"),
    ("Sink(**{'n': 4})", "without \\* or"), ("open('x')", "unknown name 'open'"),
    ("Sink(2 ** 999999)", "too large a power"), ("Sink(1 // 0)", "division by zero"),
    ("Sink(2 ** 40 * 2 ** 40)", "beyond"), ("Slash(range(10 ** 9))", "more than"),
    ("Slash(range(1, 2, 0))", "not a range"), ("Sink(4) if 1 else Sink(5)", "IfExp"),
    ("f'{1}'", "JoinedStr"), ("vertical_slash(4, 4)", "unknown name"),
    ("(" * 500 + "Sink(4)" + ")" * 500, "too many nested|deeply nested"),
    ("~" * 9000 + "Sink(4)", "deeply nested"),
    ("Sink(4)" * 9000, "not the text"), ("Sink(\0)", "null bytes|cannot be read")])
def test_what_is_no_mask_is_told(text: str, told: str) -> None:
    with pytest.raises(ExpressionError, match=told):
        parse(text)


def test_errors_of_atoms_and_json_pass_through() -> None:
    with pytest.raises(AtomArgumentError, match="n must be an integer"):
        parse("Sink(-1)")
    with pytest.raises(SerializationError):
        parse("{}")


def test_the_caret_points_at_the_mistake() -> None:
    with pytest.raises(ExpressionError) as caught:
        parse("Sink(4) | Sonk(4)")
    first, second = str(caught.value).splitlines()[:2]
    assert first[second.index("^"):].startswith("Sonk")


@given(st.text(alphabet="SinkWdow(4)|&~-,[]{}'\"._:* \n", max_size=40))
def test_any_text_is_a_mask_or_an_error_of_ours(text: str) -> None:
    with contextlib.suppress(MaskDSLError):
        assert isinstance(parse(text), Mask)


def test_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("text was run")

    for name in ("eval", "exec", "open"):
        monkeypatch.setattr(builtins, name, refuse)
    assert parse("triangle() | Sink(4)") == triangle() | Sink(4)


def test_every_atom_has_a_name() -> None:
    assert set(ATOMS) <= set(known_names())
    assert "LayerPolicy" not in known_names()
