"""Masks by layer."""

from __future__ import annotations

import doctest

import pytest

from maskdsl import Causal, Full, VerticalSlash, Window
from maskdsl.errors import AtomArgumentError
from maskdsl.patterns import LayerPolicy, policy, published_triangle_mix, triangle, triangle_mix


def test_examples() -> None:
    tried = doctest.testmod(policy)
    assert tried.attempted > 0 and tried.failed == 0


@pytest.mark.parametrize(("model", "layers", "dense"), [
    ("Llama-3.1-8B-Instruct", 32, 16), ("Llama-3-8B-Instruct-262K", 32, 16),
    ("Qwen2.5-7B-Instruct", 28, 20)])
def test_published_splits(model: str, layers: int, dense: int) -> None:
    mix = published_triangle_mix(model)
    assert len(mix) == layers
    assert [mix[i] for i in range(layers)] == [Full()] * dense + [triangle()] * (layers - dense)


def test_layers_may_be_any_list() -> None:
    mix = triangle_mix(6, [5, 0, 2])
    assert mix.kinds() == [(Full(), (0, 2, 5)), (triangle(), (1, 3, 4))]


def test_dynamic_sparsity_in_the_dense_layers_or_in_a_union() -> None:
    mix = published_triangle_mix("Qwen2.5-7B-Instruct", slot="vs")
    assert mix[0] == VerticalSlash("vs") and mix[27] == triangle()
    union = triangle_mix(4, [0], sparse=triangle() | VerticalSlash("vs"))
    assert union[1] == triangle() | VerticalSlash("vs") and union[0] == Full()


def test_mistakes_are_told() -> None:
    with pytest.raises(AtomArgumentError, match=r"numbered 0\.\.3"):
        triangle_mix(4, [4])
    with pytest.raises(AtomArgumentError, match="no split was published"):
        published_triangle_mix("GPT-2")
    with pytest.raises(AtomArgumentError, match="one for every layer"):
        LayerPolicy([])
    assert LayerPolicy([Causal(), Window(3)])[1] == Window(3)
