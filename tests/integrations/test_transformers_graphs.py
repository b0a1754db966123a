"""transformers' models inside torch.compile: dynamo alone ("eager"), where graphs are decided."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_transformers import TRIANGLE, make_model, tokens

from maskdsl import Full, LastQ, Window

transformers = pytest.importorskip("transformers")
integration = pytest.importorskip("maskdsl.integrations.transformers")

KINDS = {"gemma3": ["sliding_attention", "full_attention"],
         "gpt_oss": ["sliding_attention", "full_attention"],
         "llama4": ["chunked_attention", "full_attention"]}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def small(family: str, policy: Any = TRIANGLE) -> Any:
    """A layer of each kind."""
    kinds = {"layer_types": KINDS[family]} if family in KINDS else {}
    count = len(kinds.get("layer_types", "1"))
    return integration.apply(make_model(family, num_hidden_layers=count, **kinds), policy)


def compiled(model: Any, family: str = "llama") -> Any:
    # the experts of gpt_oss break graphs, ours or not
    return torch.compile(model, backend="eager", fullgraph=family != "gpt_oss", dynamic=True)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "llama4"])
def test_a_compiled_model_is_one_graph(family: str) -> None:
    model = small(family)
    run = compiled(model, family)
    for length in (12, 17, 21):
        ids = tokens(length)
        assert torch.allclose(run(ids, use_cache=False).logits,
                              model(ids, use_cache=False).logits, atol=2e-4)
    if family == "llama":  # gpt_oss does not look for packed sequences
        with pytest.raises(RuntimeError, match="packed sequences"):
            run(tokens(12), position_ids=torch.arange(12)[None] % 6, use_cache=False)
        with pytest.raises(RuntimeError, match="padding"):
            run(tokens(12), attention_mask=torch.arange(12)[None] > 3, use_cache=False)


def test_a_mask_of_its_own_is_seen_by_the_device() -> None:
    """Image tokens that see each other: transformers joins such blocks to the causal mask."""
    from transformers import masking_utils

    model = small("gemma3")
    blocks = torch.tensor([[-1] * 4 + [0] * 4 + [-1] * 8])
    inside = model.model.embed_tokens(tokens(16))

    def run(ids: torch.Tensor) -> Any:
        mask = masking_utils.create_causal_mask(
            model.config, inside, None, None, block_sequence_ids=ids)
        return model(inputs_embeds=inside, use_cache=False, attention_mask={
            "full_attention": mask, "sliding_attention": mask}).logits

    call = torch.compile(run, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="no layer tells of"):
        call(blocks)


@pytest.mark.parametrize("family", ["llama", "gemma3", "llama4"])
def test_a_prompt_on_a_static_cache(family: str) -> None:
    """The cache is longer than the prompt: what is not filled yet counts for nothing."""
    model, ids = small(family), tokens(14)
    cache = transformers.StaticCache(config=model.config, max_cache_len=40)
    out = compiled(model)(ids, past_key_values=cache).logits
    assert torch.allclose(out, model(ids, use_cache=False).logits, atol=2e-4)


def test_chunks_of_a_prompt() -> None:
    model, ids = small("llama"), tokens(20)
    whole = model(ids, use_cache=False).logits
    cache, parts = transformers.DynamicCache(config=model.config), []
    run = compiled(model)
    with integration.prompt_length(20):
        for start in range(0, 20, 7):
            parts.append(run(ids[:, start:start + 7], past_key_values=cache).logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=2e-4)


@pytest.mark.parametrize("policy", [TRIANGLE, Window(4) | LastQ(3)], ids=repr)
def test_chunks_on_a_sliding_cache(policy: Any) -> None:
    """Its first tokens are gone: a sink cannot be told, a window can."""
    model, ids = small("gemma3", policy), tokens(18)
    cache, parts = transformers.DynamicCache(config=model.config), []
    with integration.prompt_length(18):
        parts.append(model(ids[:, :9], past_key_values=cache).logits)
        if policy == TRIANGLE:
            with pytest.raises(Exception, match="counts from tokens that are gone"):
                compiled(model)(ids[:, 9:], past_key_values=cache)
            return
        parts.append(compiled(model)(ids[:, 9:], past_key_values=cache).logits)
    whole = model(ids, use_cache=False).logits
    assert torch.allclose(torch.cat(parts, 1), whole, atol=2e-4)


def test_generate_compiles_its_steps() -> None:
    """As generate does on a GPU with a static cache; prompts are padded."""
    model, ids = small("gemma3", Full()), tokens(9, 2)
    config = transformers.CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    options = {"attention_mask": (torch.arange(9) >= torch.tensor([[0], [4]])).long(),
               "max_new_tokens": 6, "do_sample": False}
    made = model.generate(ids, cache_implementation="static", compile_config=config, **options)
    assert torch.equal(made, model.generate(ids, **options))
