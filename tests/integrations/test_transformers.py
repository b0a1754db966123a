"""transformers: small random models of seven families against their stock implementation."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from maskdsl import (
    BlockDiagonal,
    Causal,
    Chunk,
    Full,
    LastQ,
    Mask,
    Shape,
    Sink,
    Stride,
    VerticalSlash,
    Window,
    dense,
    errors,
    patterns,
)
from maskdsl.integrations.prompts import Lengths, find_segments, shift_mask
from maskdsl.patterns import LayerPolicy

transformers = pytest.importorskip("transformers")
integration = pytest.importorskip("maskdsl.integrations.transformers")

TRIANGLE = Sink(2) | Window(5) | LastQ(3)
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
    "max_position_embeddings": 256, "eos_token_id": None, "bos_token_id": 1}
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": 7}),
    "gemma2": ("Gemma2Config", {**SLIDING, "attn_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3TextConfig", SLIDING),
    "gpt_oss": ("GptOssConfig", {**SLIDING, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "llama4": ("Llama4TextConfig", {
        "attention_chunk_size": 6, "num_local_experts": 2, "intermediate_size_mlp": 48,
        "layer_types": ["chunked_attention", "full_attention"] * 2}),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: a second thread only waits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.no_grad():
            yield
    torch.set_num_threads(threads)


def make_model(family: str, implementation: str = "eager", **options: Any) -> Any:
    """A random model of a family; weights large enough for attention to differ by key."""
    name, extra = FAMILIES[family]
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    config = getattr(transformers, name)(**{**SIZES, **extra, **options})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config,
                                                          attn_implementation=implementation)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


def tokens(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 97, (batch, length), generator=generator)


def ready_masks(model: Any, policy: Mask, shape: Shape) -> Any:
    """The 4D additive masks that make the stock model compute the policy."""
    def additive(mask: Mask) -> torch.Tensor:
        live = dense(Causal() & mask, shape)
        return torch.zeros(live.shape).masked_fill(~live, torch.finfo(torch.float32).min)

    window = getattr(model.config, "sliding_window", None)
    if not getattr(model.config, "layer_types", None) or model.config.model_type == "mistral":
        return additive(policy & Window(window) if window else policy)
    return {"full_attention": additive(policy),
            "chunked_attention": additive(policy & Chunk(6)),
            "sliding_attention": additive(policy & Window(window or 1 << 20))}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", [Full(), TRIANGLE, Stride(3) | Window(2)], ids=repr)
def test_a_prompt_is_the_stock_models_under_the_same_mask(family: str, policy: Mask) -> None:
    model, ids = make_model(family), tokens(20, 2)
    stock = model(ids, attention_mask=ready_masks(model, policy, Shape(20, 20)),
                  use_cache=False).logits
    ours = integration.apply(model, policy)(ids, use_cache=False).logits
    assert torch.allclose(ours, stock, atol=2e-4)
    plain = make_model(family)(ids, use_cache=False).logits
    assert torch.allclose(plain, stock, atol=2e-4) == (policy == Full())


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_dense_policy_is_the_stock_models(family: str) -> None:
    ids, model = tokens(15), make_model(family)
    stock = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(integration.apply(model, Full()).generate(
        ids, max_new_tokens=12, do_sample=False), stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_from_a_padded_batch(family: str) -> None:
    """Prompts and steps of rows of several lengths, as the stock model has them."""
    model, ids = make_model(family), tokens(14, 3, seed=2)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    mask[2, :11] = 0
    more: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    stock = model.generate(ids, **more)
    assert torch.equal(integration.apply(model, Full()).generate(ids, **more), stock)


def test_generation_in_chunks() -> None:
    """generate's own chunked prefill."""
    model, ids = integration.apply(make_model("llama"), TRIANGLE), tokens(23)
    whole = model.generate(ids, max_new_tokens=8, do_sample=False)
    with integration.prompt_length(23):
        parts = model.generate(ids, max_new_tokens=8, do_sample=False, prefill_chunk_size=6)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_the_same_as_alone(family: str, side: str) -> None:
    """Sinks are the first tokens of the prompt, not of the padding; `LastQ` its last ones."""
    model = integration.apply(make_model(family), TRIANGLE)
    ids = tokens(18, 3, seed=4)
    lengths = [18, 11, 4]
    mask = torch.zeros(3, 18, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, 18 - n:] = 1
        if side == "right":
            mask[row] = mask[row].flip(0)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    for row in range(3):
        live = mask[row].bool()
        alone = model(ids[row:row + 1, live], use_cache=False).logits[0]
        assert torch.allclose(together[row, live], alone, atol=2e-4)


# gpt_oss does not look for packed sequences
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_packed_sequences_are_the_same_as_alone(family: str) -> None:
    model = integration.apply(make_model(family), TRIANGLE)
    parts = [tokens(n, seed=n) for n in (9, 14, 5)]
    packed = torch.cat(parts, 1)
    positions = torch.cat([torch.arange(p.shape[1]) for p in parts])[None]
    together = model(packed, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(p, use_cache=False).logits for p in parts], 1)
    assert torch.allclose(together, alone, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [5, 7])
def test_chunks_with_the_prompts_length_are_the_whole(family: str, chunk: int) -> None:
    model, ids = integration.apply(make_model(family), TRIANGLE), tokens(23)
    whole = model(ids, use_cache=False).logits
    cache = transformers.DynamicCache(config=model.config)
    parts = []
    with integration.prompt_length(23):
        for start in range(0, 23, chunk):
            parts.append(model(ids[:, start:start + chunk], past_key_values=cache,
                               use_cache=True).logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_chunks_of_padded_rows(family: str, side: str) -> None:
    """Rows that end at different places are told one by one."""
    model, ids, counts = integration.apply(make_model(family), TRIANGLE), tokens(18, 3), (18, 13, 9)
    mask = torch.arange(18) < torch.tensor(counts)[:, None]
    mask = (mask.flip(1) if side == "left" else mask).long()
    ends = [18] * 3 if side == "left" else counts
    cache, parts = transformers.DynamicCache(config=model.config), []
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with integration.prompt_length(ends):
        for part in (slice(0, 7), slice(7, 14), slice(14, 18)):
            parts.append(model(ids[:, part], attention_mask=mask[:, :part.stop],
                               position_ids=positions[:, part], past_key_values=cache).logits)
    for row, live in enumerate(mask.bool()):
        alone = model(ids[row:row + 1, live], use_cache=False).logits[0]
        assert torch.allclose(torch.cat(parts, 1)[row, live], alone, atol=2e-4)
    with pytest.raises(errors.IntegrationError, match="2 rows"), integration.prompt_length([3, 3]):
        model(ids)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_a_static_cache_is_as_good_as_a_dynamic_one(family: str) -> None:
    ids, model = tokens(12), integration.apply(make_model(family), TRIANGLE)
    dynamic = model.generate(ids, max_new_tokens=8, do_sample=False)
    static = model.generate(ids, max_new_tokens=8, do_sample=False,
                            cache_implementation="static", disable_compile=True)
    assert torch.equal(dynamic, static)


def test_decoding_is_dense_or_under_the_policy() -> None:
    """With decode_rows=0 a step computes what the last row of a prompt does."""
    ids = tokens(20)
    for rows in (0, 1):
        model = integration.apply(make_model("llama"), Window(4), decode_rows=rows)
        cache = transformers.DynamicCache(config=model.config)
        model(ids[:, :19], past_key_values=cache, use_cache=True)
        step = model(ids[:, 19:], past_key_values=cache, use_cache=True).logits[:, -1]
        prompt = model(ids, use_cache=False).logits[:, -1]
        assert torch.allclose(step, prompt, atol=2e-4) == (rows == 0)


def test_each_layer_has_its_own_mask() -> None:
    """Layers 2 and 3 see only themselves: nothing of another token reaches them."""
    policy = LayerPolicy([Full(), TRIANGLE, Window(1), Window(1)])
    model, ids = integration.apply(make_model("llama"), policy), tokens(16)
    seen = [model.model.layers[i].self_attn.maskdsl.mask for i in range(4)]
    assert seen == list(policy.masks)
    first = model(ids, use_cache=False).logits
    alone = integration.apply(make_model("llama"), Window(1))
    single = torch.cat([alone(ids[:, i:i + 1], position_ids=torch.tensor([[i]]),
                              use_cache=False).logits for i in range(16)], 1)
    assert torch.allclose(alone(ids, use_cache=False).logits, single, atol=2e-4)
    assert not torch.allclose(first, single, atol=1e-2)


def test_without_apply_a_registered_model_is_dense() -> None:
    integration.register()
    ids = tokens(14)
    ours = make_model("gemma3", "maskdsl")(ids, use_cache=False).logits
    assert torch.allclose(ours, make_model("gemma3")(ids, use_cache=False).logits, atol=2e-4)


def test_slots_are_estimated_for_every_prompt() -> None:
    calls = []

    def estimate(q: torch.Tensor, k: torch.Tensor) -> Any:
        calls.append(q.shape)
        return patterns.vertical_slash(q, k, 50, 50)

    policy = patterns.triangle_mix(4, [0, 1], dense=VerticalSlash("vs"))
    model = integration.apply(make_model("llama"), policy, estimators={"vs": estimate})
    ids = tokens(30)
    ours = model(ids, use_cache=False).logits
    dense_model = integration.apply(make_model("llama"), Full())
    assert torch.allclose(ours, dense_model(ids, use_cache=False).logits, atol=2e-4)  # 30 < 50
    assert calls == [torch.Size([1, 4, 30, 16])] * 2


def test_copies_keep_the_policy() -> None:
    model, ids = integration.apply(make_model("gemma3"), TRIANGLE), tokens(12)
    expected = model(ids, use_cache=False).logits
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for again in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert torch.equal(again(ids, use_cache=False).logits, expected)


def test_training_on_the_torch_backend() -> None:
    model, ids = integration.apply(make_model("gpt_oss"), TRIANGLE, backend="torch"), tokens(12)
    with torch.enable_grad():
        model(ids, use_cache=False).logits.square().mean().backward()
    sinks = model.model.layers[0].self_attn.sinks.grad
    assert sinks is not None and sinks.isfinite().all()


MISTAKES: list[tuple[Any, str]] = [
    (lambda m: integration.apply(m, LayerPolicy([Full()] * 3)), "4 attention layers"),
    (lambda m: integration.apply(m, "triangle"), "neither a policy nor a mask"),
    (lambda m: integration.apply(m, VerticalSlash("vs")), "estimators="),
    (lambda m: integration.apply(torch.nn.Linear(2, 2), Full()), "0 causal attention layers"),
    (lambda m: integration.apply(m, Full())(tokens(9), attention_mask=torch.zeros(1, 1, 9, 9)),
     "4D mask"),
    (lambda m: integration.apply(m, Full())(tokens(5), attention_mask=torch.tensor(
        [[1, 0, 1, 1, 1]])), "zeros between tokens"),
    (lambda m: integration.apply(m, Full()).train()(tokens(9)), "dropout"),
]


@pytest.mark.parametrize(("call", "told"), MISTAKES, ids=[told for _, told in MISTAKES])
def test_what_is_not_supported_raises(call: Any, told: str) -> None:
    model = make_model("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(errors.IntegrationError, match=told):
        call(model)


# --- the parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [TRIANGLE, Stride(3, 1) | Chunk(4), ~Sink(5), Causal() & Sink(9)])
@pytest.mark.parametrize("shift", [3, 4, 8])
def test_a_shifted_mask_is_the_rest_of_the_square(mask: Mask, shift: int) -> None:
    whole = dense(mask, Shape(20, 20))[..., shift:, shift:]
    moved = dense(shift_mask(mask, shift), Shape(20 - shift, 20 - shift))
    assert torch.equal(moved, whole)


def test_masks_that_cannot_be_shifted_are_told() -> None:
    with pytest.raises(errors.IntegrationError, match="sliding cache"):
        shift_mask(BlockDiagonal((4, 5)), 3)


def test_segments_of_a_padded_chunk() -> None:
    """Rows of 3, 3 and 7 tokens, the last 2 of 9 positions in this call, a cache that slid by 4."""
    padding = torch.ones(3, 9, dtype=torch.bool)
    padding[:2, :6] = False
    padding[2, :2] = False
    a, b = find_segments(Lengths(3, 2, 5, 7, 4), padding, None, 12)
    assert a.rows == (0, 1) and (a.k_start, a.k_stop) == (2, 5) and a.shift == 0
    assert (a.q_offset, a.total_len) == (1, 6)
    assert b.rows == (2,) and (b.k_start, b.k_stop, b.shift) == (0, 5, 2)
    assert (b.q_offset, b.total_len) == (3, 8)
