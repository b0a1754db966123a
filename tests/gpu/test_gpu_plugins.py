"""On a GPU: score modifiers, FlexAttention beside ours, compiled graphs, transformers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as flex

import maskdsl
from maskdsl import (
    ALiBi,
    Bias,
    Causal,
    Chunk,
    Full,
    LastQ,
    PerHead,
    RelativePosition,
    Shape,
    Sink,
    SinkLogits,
    Softcap,
    VerticalSlash,
    VSIndices,
    Window,
    dense,
)
from maskdsl.scores import ScoreMod, ScorePlace, add_sinks, modify_scores, score_mod

pytestmark = pytest.mark.gpu
TRIANGLE = Sink(4) | Window(300) | LastQ(60)
HEADS, KV_HEADS = 8, 2


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch._dynamo.reset()
        counters.clear()
        yield


def inputs(length: int, dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(length)
    return [torch.randn(2, h, length, dim, generator=generator, device="cuda", dtype=dtype)
            for h in (HEADS, KV_HEADS, KV_HEADS)]


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mods: tuple[ScoreMod, ...],
          data: dict[str, Any], mask: Any = TRIANGLE) -> torch.Tensor:
    """Dense attention in float64."""
    q, k, v = (t.double() for t in (q, k, v))
    n = q.shape[2]
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    places = [torch.arange(s, device="cuda").view([-1 if i == j else 1 for j in range(4)])
              for i, s in enumerate((2, HEADS, n, n))]
    scores = modify_scores(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, mods,
                           ScorePlace(*places, 0, HEADS), data)
    live = dense(Causal() & mask, Shape(n, n), 2, HEADS, "cuda")
    scores = scores.masked_fill(~live, -torch.inf)
    out, lse = torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)
    for mod in mods:
        if isinstance(mod, SinkLogits):
            out, _ = add_sinks(out, lse, data[mod.name][:, None])
    return out


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("mods", [
    (Softcap(3.0),), (ALiBi(),), (Bias(),), (RelativePosition("table", 50),), (SinkLogits(),),
    (Softcap(5.0), Bias(), SinkLogits())], ids=repr)
def test_score_modifiers(mods: tuple[ScoreMod, ...], dim: int) -> None:
    q, k, v = inputs(700, dim)
    made = {"bias": torch.randn(1, HEADS, 700, 700, device="cuda"),
            "table": torch.randn(HEADS, 101, device="cuda"),
            "sinks": torch.randn(HEADS, device="cuda")}
    data = {mod.name: made[mod.name] for mod in mods if mod.name}
    out = maskdsl.compile(TRIANGLE, scores=mods)(q, k, v, **data)
    assert torch.allclose(out.double(), exact(q, k, v, mods, data), atol=3e-2)


@pytest.mark.parametrize("mask", [
    Causal() & TRIANGLE, Causal() & Window(500), Causal() & Chunk(300), Full(),
    PerHead([Causal() & TRIANGLE, Causal()] * 4)], ids=lambda m: repr(m)[:30])
@pytest.mark.parametrize("mods", [(), (Softcap(4.0), ALiBi())], ids=repr)
def test_flex_attention_with_our_block_mask(mask: Any, mods: tuple[ScoreMod, ...]) -> None:
    q, k, v = inputs(1000)
    block_mask = mask.block_mask(1000, batch=2, heads=HEADS, device="cuda")
    modify = score_mod(mods, HEADS, {}, device="cuda") if mods else None
    theirs = torch.compile(flex.flex_attention)(q, k, v, modify, block_mask, enable_gqa=True)
    ours = maskdsl.flex_attention(q, k, v, mods, mask, enable_gqa=True)
    back = maskdsl.flex_attention(q, k, v, mods, block_mask, enable_gqa=True)
    assert torch.allclose(ours, theirs, atol=2e-2)
    assert torch.allclose(back, theirs, atol=2e-2)


@pytest.mark.parametrize("mask", [
    Causal() & TRIANGLE, PerHead([Causal() & TRIANGLE, Causal()] * 4)],
    ids=lambda m: repr(m)[:30])
def test_their_gradients_with_our_block_mask(mask: Any) -> None:
    """dK and dV are computed from the transposed lists."""
    leaves = [t.requires_grad_() for t in inputs(1000)]
    ours = mask.block_mask(1000, batch=2, heads=HEADS, device="cuda")
    theirs = flex.create_block_mask(mask.mask_mod(1000, heads=HEADS), 2, HEADS, 1000, 1000, "cuda")
    run = torch.compile(flex.flex_attention)
    grads = [torch.autograd.grad(run(*leaves, None, block_mask, enable_gqa=True).square().sum(),
                                 leaves) for block_mask in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=2e-2, rtol=2e-2)


def test_the_drop_in_is_compiled_once() -> None:
    mask, cap = Causal() & TRIANGLE, Softcap(4.0)  # graphs tell both by identity
    run = torch.compile(maskdsl.flex_attention, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (300, 420, 540):
            q, k, v = inputs(length)
            out = run(q, k, v, cap, mask, enable_gqa=True)
            eager = maskdsl.flex_attention(q, k, v, cap, mask, enable_gqa=True)
            assert torch.allclose(out, eager, atol=1e-2)
    assert counters["stats"]["unique_graphs"] == 1


def test_generate_compiles_its_steps() -> None:
    """With a static cache transformers compiles decoding, with CUDA graphs; prompts are padded."""
    transformers = pytest.importorskip("transformers")
    integration = pytest.importorskip("maskdsl.integrations.transformers")
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=32,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=None)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model = integration.apply(model.to("cuda", torch.float32).eval(), Full())
    ids = torch.randint(1, 97, (2, 40), device="cuda")
    options = {"attention_mask": (torch.arange(40, device="cuda") >= torch.tensor(
        [[0], [9]], device="cuda")).long(), "max_new_tokens": 8, "do_sample": False}
    made = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(made, model.generate(ids, **options))


def test_twenty_lengths_compile_once() -> None:
    attn = maskdsl.compile(TRIANGLE)

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attn(q * 2, k, v) + 1

    run = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in range(400, 800, 20):
            q, k, v = inputs(length)
            assert torch.allclose(run(q, k, v), layer(q, k, v), atol=1e-2)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["graph_break"] == {}


@pytest.mark.parametrize("mask", [TRIANGLE, TRIANGLE | VerticalSlash("vs")], ids=repr)
def test_cuda_graphs(mask: Any) -> None:
    """Captured by hand and by inductor; replayed on other data."""
    attn = maskdsl.compile(mask, scores=SinkLogits("sinks"))
    q, k, v = inputs(600)
    data: dict[str, Any] = {"sinks": torch.randn(HEADS, device="cuda")}
    if mask != TRIANGLE:
        index = torch.randint(0, 600, (1, HEADS, 20), device="cuda", dtype=torch.int32)
        data["vs"] = VSIndices(index, index)
    with torch.no_grad():
        attn(q, k, v, **data)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attn(q, k, v, **data)
        q.copy_(torch.randn_like(q))
        graph.replay()
        assert torch.equal(out, attn(q, k, v, **data))
        run = torch.compile(lambda q: attn(q, k, v, **data), fullgraph=True,
                            mode="reduce-overhead")
        for _ in range(4):
            q = torch.randn_like(q)
            assert torch.allclose(run(q).clone(), attn(q, k, v, **data), atol=1e-2)


def test_autocast() -> None:
    q, k, v = inputs(300, dtype=torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = maskdsl.compile(TRIANGLE)(q, k, v)
    halves = maskdsl.compile(TRIANGLE)(*(t.bfloat16() for t in (q, k, v)))
    assert out.dtype == torch.bfloat16 and torch.equal(out, halves)


def test_a_model_with_sliding_layers() -> None:
    transformers = pytest.importorskip("transformers")
    integration = pytest.importorskip("maskdsl.integrations.transformers")
    config = transformers.Gemma3TextConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=32,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=50, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model = model.to("cuda", torch.float32).eval()
    ids = torch.randint(1, 97, (2, 200), device="cuda")
    with torch.no_grad():
        stock = model(ids, use_cache=False).logits
        text = model.generate(ids, max_new_tokens=8, do_sample=False)
        integration.apply(model, Full())
        assert torch.allclose(model(ids, use_cache=False).logits, stock, atol=1e-3)
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), text)
        integration.apply(model, Sink(4) | Window(60) | LastQ(20))
        sparse = model(ids, use_cache=False).logits
        run = torch.compile(model, fullgraph=True, dynamic=True)
        assert torch.allclose(run(ids, use_cache=False).logits, sparse, atol=1e-2)
