"""Tiles that take far more steps than others, cut into parts that are added up in order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from gradient_oracle import check_gradients
from hypothesis import given
from hypothesis import strategies as st
from oracle import Case, make_inputs

import maskdsl
from maskdsl import (
    Bias,
    Causal,
    Columns,
    Document,
    Documents,
    Full,
    LastQ,
    Mask,
    PerHead,
    QueryRange,
    RelativePosition,
    Shape,
    Sink,
    VerticalSlash,
    VSIndices,
    Window,
    simplify,
)
from maskdsl.codegen import backward, backward_cut
from maskdsl.codegen.backward import GradientKernels, TritonBackward
from maskdsl.codegen.backward_cut import PART_BYTES, Cut, count_steps, cut_tiles
from maskdsl.codegen.kernel import interpreting
from maskdsl.codegen.tune import Config

needs_interpreter = pytest.mark.skipif(not interpreting(), reason="a GPU is here: see tests/gpu")
TRIANGLE = Sink(5) | Window(6) | LastQ(10)
OPTIONS = {"backend": "triton", "tile": (16, 16)}
VS = VSIndices(torch.tensor([[[1, 2, 30, 45]]]), torch.tensor([[[0, 3, 33]]]))


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Cut, Cut]]]:
    """Short calls are cut too; what was cut, by query and by key."""
    seen: list[tuple[Cut, Cut]] = []
    real = GradientKernels.cut

    def cut(self: GradientKernels, *arguments: Any) -> tuple[Cut, Cut]:
        seen.append(real(self, *arguments))
        return seen[-1]

    monkeypatch.setattr(GradientKernels, "cut", cut)
    monkeypatch.setattr(backward_cut, "LEAST_STEPS", 2.0)
    backward.backward_of.cache_clear()  # earlier tests left cuts of their own
    yield seen
    backward.backward_of.cache_clear()


@needs_interpreter
@pytest.mark.parametrize(("mask", "slots", "queries"), [
    (TRIANGLE, {}, True), (VerticalSlash("vs") | TRIANGLE, {"vs": VS}, False),
    (Columns("c") | Sink(5) & QueryRange(0, 90) | Window(6),  # columns of a cut tile, elsewhere
     {"c": torch.tensor([[[0, 3, 9, 60]]])}, False),
    (PerHead([TRIANGLE, Sink(20) | Window(9)]), {}, False),
], ids=lambda x: repr(x)[:40] if isinstance(x, Mask) else "")
def test_gradients(found: list[tuple[Cut, Cut]], mask: Mask, slots: dict[str, Any],
                   queries: bool) -> None:
    """A ragged length; Dv != D and heads that share keys."""
    check_gradients(Case(mask, 125, 125, 1, 2, 1, 16, 32, options=OPTIONS, slots=slots))
    (by_query, by_key), = found
    assert by_key.first == 0 and by_key.count >= 1 and by_key.parts > 1
    assert (by_query.parts > 1) is queries
    if queries:
        assert by_query.first + by_query.count == 8


@needs_interpreter
def test_a_chunk_with_modified_scores(found: list[tuple[Cut, Cut]]) -> None:
    for mod, data in ((Bias("bias"), torch.randn(1, 1, 90, 150)),
                      (RelativePosition("table", 6), torch.randn(1, 13))):
        check_gradients(Case(TRIANGLE, 90, 150, 1, 1, 1, 16, q_offset=60, scores=(mod,),
                             data={mod.name: data}, dtype=torch.float16, options=OPTIONS))
    assert all(by_key.parts > 1 for _, by_key in found)
    assert found[0][0].parts > 1 and found[1][0].parts == 1  # a table's ends are sums by row


@needs_interpreter
def test_the_same_bits_every_time_and_a_layout(found: list[tuple[Cut, Cut]]) -> None:
    tensors = make_inputs(Case(TRIANGLE, 221, 221, 1, 1, 1, 16), "cpu")
    results = []
    for layout in ("bhld", "blhd"):
        turned = layout == "blhd"
        leaves = [(t.transpose(1, 2).contiguous() if turned else t.clone()).requires_grad_()
                  for t in tensors]
        out = maskdsl.compile(TRIANGLE, layout=layout, **OPTIONS)(*leaves)
        grads = torch.autograd.grad((out * torch.arange(16)).sum(), leaves)
        results.append([t.transpose(1, 2) if turned else t for t in grads])
    assert all(by_query.parts > 1 and by_key.parts > 2 for by_query, by_key in found)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def kernels_of(mask: Mask, config: Config) -> GradientKernels:
    return TritonBackward(simplify(mask), None).kernels(config, config)


@needs_interpreter
def test_what_is_cut_on_an_h100() -> None:
    """Sinks and last rows at 32K; no dense mask, and nothing that data may change."""
    config, shape, more = Config(64, 64, 4, 2), Shape(32768, 32768), (4 * 128, 8 * 128)
    made = kernels_of(Causal() & (Sink(8) | Window(512) | LastQ(128)), config)
    by_query, by_key = made.cut(shape, 1, (32, 8), 132, more)
    assert (by_key.first, by_key.count) == (0, 1) and by_key.parts >= 4
    assert (by_query.first, by_query.count) == (510, 2) and by_query.parts >= 2
    for mask in (Causal(), Full(), Causal() & Window(512)):
        assert kernels_of(mask, config).cut(shape, 1, (32, 8), 132, more) == (Cut(), Cut())
    packed = kernels_of(Causal() & Document("d") & (Sink(8) | Window(512)), config)
    assert packed.cut(shape, 1, (32, 8), 132, more) == (Cut(), Cut())


@needs_interpreter
def test_the_longest_program_is_no_tail() -> None:
    """After cutting, no program takes more than a quarter of a multiprocessor's share."""
    config, shape = Config(64, 64, 4, 2), Shape(32768, 32768)
    for mask in (Sink(8) | Window(512) | LastQ(128), Sink(64) | Window(1024) | LastQ(128)):
        made = kernels_of(Causal() & mask, config)
        cuts = made.cut(shape, 1, (32, 8), 132, (4 * 128, 8 * 128))
        for cut, plan, heads, members in zip(cuts, (made.query.plans[0], made.by_key[0]), (32, 8),
                                             (1, 4), strict=True):
            steps = count_steps(plan, shape) * members
            parts = np.ones(len(steps), np.int64)
            parts[cut.first:cut.first + cut.count] = cut.parts
            assert (steps / parts).max() <= steps.sum() * heads / 132 / 4


@given(st.lists(st.integers(0, 5000), max_size=60), st.integers(1, 64), st.integers(1, 200),
       st.integers(1, 1 << 22))
def test_a_cut_pays_and_fits(steps: list[int], groups: int, processors: int,
                             tile_bytes: int) -> None:
    cut = cut_tiles(np.array(steps, np.int64), groups, processors, tile_bytes)
    assert cut.parts >= 1 and (cut.count == 0) == (cut.parts == 1)
    assert cut.first + cut.count <= len(steps)
    if cut.count:
        assert cut.parts * cut.count * groups * tile_bytes <= PART_BYTES
        inside = steps[cut.first:cut.first + cut.count]
        assert min(inside) > max([s for i, s in enumerate(steps)
                                  if not cut.first <= i < cut.first + cut.count], default=0)


@needs_interpreter
def test_documents_are_told_apart() -> None:
    """Documents come with the call: their tiles are not cut, whatever the sizes."""
    docs = Documents.from_ids(torch.tensor([0] * 60 + [1] * 40))
    check_gradients(Case(Document("d") & TRIANGLE, 100, 100, 1, 2, 1, 16, options=OPTIONS,
                         slots={"d": docs}))
