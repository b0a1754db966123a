"""The drop-in `flex_attention` inside `torch.compile(fullgraph=True)`, where others use it."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as flex

import maskdsl
from maskdsl import (
    ALiBi,
    Causal,
    Document,
    Documents,
    LastQ,
    Mask,
    Sink,
    SinkLogits,
    Softcap,
    Window,
)

TRIANGLE = Causal() & (Sink(3) | Window(9) | LastQ(5))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FlexAttention: slow without a compiler
        yield
    torch._dynamo.reset()


def inputs(length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(2, 2, length, 16, generator=generator) for _ in range(3)]


def attend(q: Any, k: Any, v: Any, mods: Any, mask: Any, **more: Any) -> Any:
    return maskdsl.flex_attention(q * 2, k, v, mods, mask, backend="torch", **more)


def compiled(**options: Any) -> tuple[Any, Any]:
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(attend, backend=counter, fullgraph=True, **options), counter


def test_twenty_lengths_one_graph() -> None:
    run, counter = compiled(dynamic=True)
    for length in range(20, 60, 2):
        made = run(*inputs(length), None, TRIANGLE, return_lse=True)
        for a, b in zip(made, attend(*inputs(length), None, TRIANGLE, return_lse=True),
                        strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    assert counter.frame_count == 1
    assert counters["graph_break"] == {}


def test_torch_compile_of_itself() -> None:
    """As FlexAttention is used: the function is compiled, not a layer around it."""
    run = torch.compile(maskdsl.flex_attention, backend="aot_eager", fullgraph=True)
    ours = run(*inputs(40), None, TRIANGLE)
    theirs = flex.flex_attention(*inputs(40), None, TRIANGLE.block_mask(40))
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("make", [Window, lambda n: Window(n).block_mask(30)],
                         ids=["expression", "BlockMask"])
def test_no_mask_passes_for_another(make: Any) -> None:
    """Guards know an object by its address: one that is gone must not lend it to the next."""
    run, _ = compiled()
    for n in (3, 5, 4):
        mask = make(n)
        assert torch.allclose(run(*inputs(30), None, mask), attend(*inputs(30), None, mask))
        del mask
        gc.collect()


def test_modifiers_with_data_and_gradients() -> None:
    run, _ = compiled()
    mods, results = [Softcap(3.0), ALiBi(), SinkLogits("sinks")], []
    for call in (run, attend):
        leaves = [t.requires_grad_() for t in inputs(30)]
        sinks = torch.ones(2, requires_grad=True)
        call(*leaves, mods, TRIANGLE, slots={"sinks": sinks}).square().sum().backward()
        results.append([t.grad for t in (*leaves, sinks)])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_slots() -> None:
    run, counter = compiled()
    mask = Causal() & Document("doc")
    for border in (10, 25):
        data = Documents.from_ids(torch.tensor([0] * border + [1] * (30 - border)))
        assert torch.allclose(run(*inputs(30), None, mask, slots={"doc": data}),
                              attend(*inputs(30), None, mask, slots={"doc": data}))
    assert counter.frame_count == 1


def block_masks() -> list[Any]:
    ids = torch.tensor([0] * 30 + [1] * 34)
    windowed = lambda b, h, q, k: (q >= k) & (q - k < 9)
    documents = lambda b, h, q, k: (q >= k) & (ids[q] == ids[k])
    theirs = [flex.create_block_mask(fn, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
              for fn in (windowed, documents)]
    return [TRIANGLE.block_mask(64), *theirs]


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize("dynamic", [None, True])
def test_block_masks(i: int, dynamic: bool | None) -> None:
    run, _ = compiled(dynamic=dynamic)
    block_mask = block_masks()[i]
    q, k, v = inputs(64)
    theirs = flex.flex_attention(q * 2, k, v, None, block_mask)
    assert torch.allclose(run(q, k, v, None, block_mask), theirs, atol=1e-5)


def test_a_mask_attribute_may_change() -> None:
    class Layer(torch.nn.Module):
        mask: Mask = Window(9)

        def forward(self, *qkv: torch.Tensor) -> Any:
            return attend(*qkv, None, self.mask)

    layer = Layer()
    run = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for mask in (Window(9), Window(4)):
        layer.mask = mask
        assert torch.allclose(run(*inputs(30)), attend(*inputs(30), None, mask))


@pytest.mark.parametrize(("mods", "mask", "told"), [
    (lambda s, b, h, q, k: s * 2, TRIANGLE, "the modifiers there are have names"),
    (None, lambda b, h, q, k: q >= k, "from_mask_mod"),
    (None, TRIANGLE.block_mask(64), "every length"),
])
def test_mistakes_are_told(mods: Any, mask: Any, told: str) -> None:
    with pytest.raises(Exception, match=told):
        compiled()[0](*inputs(40), mods, mask)


@pytest.mark.parametrize("make", [lambda: (None, Window(9)), lambda: (Softcap(2.0), TRIANGLE),
                                  lambda: ([Softcap(2.0), ALiBi()], TRIANGLE)])
def test_what_is_made_in_the_graph_is_told(make: Any) -> None:
    def layer(*qkv: torch.Tensor) -> Any:
        return attend(*qkv, *make())

    with pytest.raises(Exception, match="outside of the compiled function"):
        torch.compile(layer, backend="aot_eager", fullgraph=True)(*inputs(30))


def test_functions_and_their_tensors_are_let_go() -> None:
    """A training loop that makes a document mask in every step keeps the last few, not all."""
    seen = []

    def step(i: int) -> None:
        ids = torch.arange(32) // (5 + i)
        seen.append(weakref.ref(ids))
        block_mask = flex.create_block_mask(lambda b, h, q, k: ids[q] == ids[k], None, None, 32, 32,
                                            device="cpu", BLOCK_SIZE=32)
        maskdsl.flex_attention(*inputs(32), None, block_mask, backend="torch")

    for i in range(10):
        step(i)
    gc.collect()
    assert sum(ref() is not None for ref in seen) <= 8
