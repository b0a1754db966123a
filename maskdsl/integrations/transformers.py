"""Hugging Face transformers: a policy of masks for any model that uses its attention interface.

    from maskdsl.integrations.transformers import apply
    model = AutoModelForCausalLM.from_pretrained(path)
    apply(model, published_triangle_mix("Llama-3.1-8B-Instruct"))

A prompt is computed under the policy, intersected with what each layer masks by itself (causal,
sliding windows); decoding attends densely to the cache. What cannot be honoured raises.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from maskdsl.api import Attention, compile
from maskdsl.arguments import MAX_SIZE
from maskdsl.atoms import Causal, Chunk, Window
from maskdsl.dynamic import slots_of
from maskdsl.errors import IntegrationError
from maskdsl.expr import Mask
from maskdsl.integrations.decoding import attend_dense
from maskdsl.integrations.prompts import (
    Lengths,
    OwnMask,
    Segment,
    find_segments,
    is_unmoved,
    read_function,
    shift_mask,
)
from maskdsl.patterns import LayerPolicy
from maskdsl.scores import ScoreMod, SinkLogits, Softcap

Tensor = torch.Tensor
Estimator = Callable[[Tensor, Tensor], Any]  # (q, k) of one prompt -> the data of a slot
NAME = "maskdsl"
SINKS = "sinks"

_prompt = threading.local()  # .size: an empty tensor as long as the prompt; .rows: ends of rows


@contextmanager
def prompt_length(tokens: int | Sequence[int]) -> Iterator[None]:
    """Tell the length of the whole prompt, padding included, while parts of it are computed.

    tokens  one number, or where rows end at different places (padding on the right) the end of
            each row: the number of positions up to its last token

    Chunked prefill needs it for masks that count from the end (`LastQ`); without it every chunk
    takes itself for the last. It holds for the calls of this thread.
    """
    before = getattr(_prompt, "size", None), getattr(_prompt, "rows", None)
    if isinstance(tokens, int):  # the size of a tensor can vary in a graph
        _prompt.size, _prompt.rows = torch.empty(tokens, 0), None
    else:
        _prompt.size, _prompt.rows = None, tuple(map(int, tokens))
    try:
        yield
    finally:
        _prompt.size, _prompt.rows = before


def told_length(stop: int) -> int | None:
    """What `prompt_length` told, at least `stop`; None where nothing was told."""
    size = getattr(_prompt, "size", None)
    return None if size is None else max(size.shape[0], stop)


@dataclass(slots=True)
class LayerState:
    """What `apply` leaves on an attention module.

    mask         the policy's mask of this layer
    whole        the attention under it and the layer's own mask, for a call with the usual mask
    own          that usual mask: causal, with a window or chunk of so many tokens
    moves        whether both are the same on a cache that slid on
    """

    mask: Mask
    own: Mask
    whole: Attention
    backend: str | None
    decode_rows: int
    window: int | None
    chunk: int | None
    moves: bool
    estimators: Mapping[str, Estimator] = field(default_factory=dict)


def register(name: str = NAME) -> None:
    """Make `attn_implementation="maskdsl"` known to transformers; calling it again is harmless.

    Both registries: with the attention function alone transformers passes no mask at all.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, describe_call)


def apply(model: Any, policy: LayerPolicy | Mask, *, backend: str | None = None,
          decode_rows: int = 1, estimators: Mapping[str, Estimator] | None = None) -> Any:
    """Let a model's prompts be computed under a policy; returns the model.

    model        a decoder of transformers that uses its attention interface
    policy       a mask for every layer, or one mask for all; each is intersected with what the
                 layer masks by itself, so causal and sliding layers stay so
    backend      as for `compile`
    decode_rows  calls that continue a cache with at most so many query rows attend to all of it,
                 as the stock model does; 0: the policy holds there too
    estimators   for every slot of the policy a function (q, k) -> data, called for every prompt

    IntegrationError where the model or the policy does not fit.
    """
    register()
    layers = attention_layers(model)
    masks = policy.masks if isinstance(policy, LayerPolicy) else (policy,) * len(layers)
    check_policy(masks, layers, estimators or {})
    states = [make_state(layer, mask, backend, decode_rows, estimators or {})
              for layer, mask in zip(layers, masks, strict=True)]
    text = getattr(model.config, "get_text_config", lambda: model.config)()
    nested = text is not model.config
    model.set_attn_implementation({"text_config": NAME} if nested else NAME)
    if text._attn_implementation != NAME:
        raise IntegrationError(f"apply({type(model).__name__}, ...)", "this model does not use "
                               "transformers' attention interface", "a model whose attention "
                               "calls ALL_ATTENTION_FUNCTIONS")
    for layer, state in zip(layers, states, strict=True):
        layer.maskdsl = state
    return model


def attention_layers(model: Any) -> list[Any]:
    """The causal self-attention modules of a model, first layer first."""
    found = [m for m in model.modules()
             if isinstance(getattr(m, "layer_idx", None), int) and getattr(m, "is_causal", False)]
    found.sort(key=lambda module: module.layer_idx)
    if not found or [m.layer_idx for m in found] != sorted({m.layer_idx for m in found}):
        raise IntegrationError(f"apply({type(model).__name__}, ...)", f"{len(found)} causal "
                               "attention layers with a number of their own were found",
                               "a decoder with one self-attention a layer")
    return found


def check_policy(masks: tuple[Mask, ...], layers: list[Any],
                 estimators: Mapping[str, Estimator]) -> None:
    """As many masks as layers, masks at all, and an estimator for every slot."""
    if not all(isinstance(mask, Mask) for mask in masks):
        raise IntegrationError(f"apply(model, {masks[0]!r})", "neither a policy nor a mask",
                               "a LayerPolicy, such as triangle_mix(32, range(16)), or a mask")
    if len(masks) != len(layers):
        raise IntegrationError(f"a policy for {len(masks)} layers", f"the model has {len(layers)} "
                               "attention layers", f"LayerPolicy of {len(layers)} masks")
    slots = {atom.slot for mask in masks for atom in slots_of(mask)}
    if slots != set(estimators):
        raise IntegrationError(f"a policy with slots {sorted(slots)} and estimators for "
                               f"{sorted(estimators)}", "each slot needs its estimator",
                               "estimators={'vs': maskdsl.patterns.vertical_slash}")


def make_state(layer: Any, mask: Mask, backend: str | None, decode_rows: int,
               estimators: Mapping[str, Estimator]) -> LayerState:
    """What one attention module needs to know."""
    window, chunk = getattr(layer, "sliding_window", None), chunk_of(layer)
    own = Causal() & Window(window) if window else Causal() & Chunk(chunk) if chunk else Causal()
    softcap = getattr(layer, "attn_logit_softcapping", None)
    scores = list_scores(softcap, getattr(layer, "sinks", None))
    wanted = {atom.slot: estimators[atom.slot] for atom in slots_of(mask)}
    return LayerState(mask, own, compiled(own & mask, scores, backend), backend, decode_rows,
                      window, chunk, is_unmoved(own & mask), wanted)


def chunk_of(layer: Any) -> int | None:
    """The tokens of a chunk, for a layer that attends inside chunks (Llama 4)."""
    config = getattr(layer, "config", None)
    kinds = getattr(config, "layer_types", None) or ()
    chunked = layer.layer_idx < len(kinds) and kinds[layer.layer_idx] == "chunked_attention"
    return getattr(config, "attention_chunk_size", None) if chunked else None


@lru_cache(maxsize=512)
def compiled(mask: Mask, scores: tuple[ScoreMod, ...], backend: str | None) -> Attention:
    """One attention for every distinct mask, shared by its layers."""
    return compile(mask, causal=False, layout="blhd", scores=scores, backend=backend)


def list_scores(softcap: float | None, sinks: Tensor | None) -> tuple[ScoreMod, ...]:
    """The score modifiers of a layer."""
    capped: tuple[ScoreMod, ...] = () if softcap is None else (Softcap(float(softcap)),)
    return capped if sinks is None else (*capped, SinkLogits(SINKS))


# --- what transformers calls ----------------------------------------------------------------------


class Call:
    """What `describe_call` hands to every layer of one forward."""

    ndim = 4  # as of a ready mask: `generate` makes it first, and the model then leaves it alone

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.q_length = arguments["q_length"]
        self.dense_mask: Tensor | None = None
        self.has_dense = False
        self.asserted = False
        self.read: tuple[Mask, list[Segment]] | None = None

    @property
    def continues(self) -> bool:
        """Whether keys of earlier calls are in the cache."""
        offset = self.arguments["q_offset"]
        return not isinstance(offset, int) or offset > 0

    def dense(self) -> Tensor | None:
        """The mask that the stock implementation would use: bool[B, 1, Lq, Lk] or None for all."""
        if not self.has_dense:
            from transformers.masking_utils import sdpa_mask

            self.dense_mask = sdpa_mask(**self.arguments)
            self.has_dense = True
        return self.dense_mask

    def segments(self) -> tuple[Mask, list[Segment]]:
        """(the layers' own mask, the prompts of the call)."""
        if self.read is None:
            a = self.arguments
            own: OwnMask = read_function(a["mask_function"])
            lengths = Lengths(a["batch_size"], a["q_length"], a["kv_length"], int(a["q_offset"]),
                              int(a["kv_offset"]))
            self.read = own.mask, find_segments(lengths, a["attention_mask"], own.packed,
                                                getattr(_prompt, "rows", None) or told_length(0))
        return self.read


def describe_call(batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0,
                  kv_offset: Any = 0, mask_function: Any = None,
                  attention_mask: Any = None, **options: Any) -> Call:
    """The mask function of the interface: keeps what a layer needs, computes nothing yet."""
    if isinstance(attention_mask, Call):
        return attention_mask
    if isinstance(q_offset, Tensor):
        q_offset = q_offset.clone()  # a static cache counts on in this very tensor
    return Call({"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length,
                 "q_offset": q_offset, "kv_offset": kv_offset, "mask_function": mask_function,
                 "attention_mask": attention_mask, **options})


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
           dropout: float = 0.0, scaling: float | None = None, softcap: float | None = None,
           s_aux: Tensor | None = None, **options: Any) -> tuple[Tensor, None]:
    """The attention function of the interface.

    query  [B, Hq, Lq, D]; key, value [B, Hkv, Lk, D], heads not repeated

    Returns (output [B, Lq, Hq, D], None). IntegrationError for dropout, position biases, attention
    weights, paged caches and ready-made 4D masks.
    """
    check_options(attention_mask, dropout, options)
    state: LayerState | None = getattr(module, "maskdsl", None)
    call: Call = attention_mask
    rows = 1 if state is None else state.decode_rows
    if call.continues and call.q_length <= rows:
        return attend_dense(query, key, value, call.dense(), scaling, softcap, s_aux), None
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    if torch.compiler.is_compiling():
        assert_usual_mask(state, call, q.device)
        return attend_traced(state, call, q, k, v, scaling, s_aux), None
    own, segments = call.segments()
    data = {} if s_aux is None else {SINKS: s_aux}
    out = None if is_whole(segments, q, k) else q.new_zeros(*q.shape[:3], v.shape[3])
    for part in segments:
        rows_ = slice(None) if len(part.rows) == q.shape[0] else list(part.rows)
        inside = [t[rows_, a:b] for t, a, b in (
            (q, part.q_start, part.q_stop), (k, part.k_start, part.k_stop),
            (v, part.k_start, part.k_stop))]
        for slot, estimate in (state.estimators if state else {}).items():
            data[slot] = estimate(inside[0].transpose(1, 2), inside[1].transpose(1, 2))
        attention = pick_attention(state, own, part.shift, softcap, s_aux)
        found: Any = attention(*inside, scale=scaling, q_offset=part.q_offset,
                               total_len=part.total_len, **data)  # type: ignore[call-overload]
        if out is None:
            return found, None
        out[rows_, part.q_start:part.q_stop] = found
    assert out is not None
    return out, None


def pick_attention(state: LayerState | None, own: Mask, shift: int, softcap: float | None,
                   sinks: Tensor | None) -> Attention:
    """The attention of a layer for one prompt: nearly always the one made by `apply`."""
    if state is None:
        return compiled(shift_mask(own, shift), list_scores(softcap, sinks), None)
    if not shift and own == state.own:
        return state.whole
    return compiled(shift_mask(own & state.mask, shift), list_scores(softcap, sinks),
                    state.backend)


def is_whole(segments: list[Segment], q: Tensor, k: Tensor) -> bool:
    """Whether one segment covers every row and query of the call."""
    return len(segments) == 1 and len(segments[0].rows) == q.shape[0] and \
        segments[0].q_stop - segments[0].q_start == q.shape[1]


def check_options(attention_mask: Any, dropout: float, options: Mapping[str, Any]) -> None:
    """What this attention cannot do is told."""
    wrong = ""
    if not isinstance(attention_mask, Call):
        wrong = "a ready-made 4D mask, a paged cache or a static mask" if attention_mask is not \
            None else "no description of the mask (a paged cache?)"
    elif dropout:
        wrong = "dropout in attention"
    elif options.get("position_bias") is not None:
        wrong = "a position bias"
    elif options.get("output_attentions"):
        wrong = "output_attentions=True"
    elif options.get("is_causal") is False:
        wrong = "bidirectional attention"
    if wrong:
        raise IntegrationError(f"attn_implementation={NAME!r} with {wrong}",
                               "this attention does not do that",
                               "attn_implementation='eager' or 'sdpa' for this model or call")


def attend_traced(state: LayerState | None, call: Call, q: Tensor, k: Tensor, v: Tensor,
                  scaling: float | None, sinks: Tensor | None) -> Tensor:
    """A prompt inside a graph: nothing can be read on the host, so there is one prompt a row."""
    a = call.arguments
    if state is None or state.estimators or a.get("use_vmap"):
        raise IntegrationError("a compiled model with this policy or mask", "a graph holds plain "
                               "masks of layers that `apply` has seen", "maskdsl.integrations."
                               "transformers.apply(model, policy) before torch.compile")
    if getattr(_prompt, "rows", None) is not None:
        raise IntegrationError("prompt_length of single rows inside a compiled model", "a graph "
                               "has one prompt length", "prompt_length(tokens) with one number")
    if not isinstance(a["q_offset"], int) or not isinstance(a["kv_offset"], int):
        raise IntegrationError("a further part of a prompt on a static cache inside a compiled "
                               "model", "where it starts is known to the device alone",
                               "a model compiled for decoding only, as `generate` has it, or a "
                               "DynamicCache")
    if a["kv_offset"] and not state.moves:
        raise IntegrationError("the next part of a prompt on a sliding cache inside a compiled "
                               "model", f"{state.mask!r} counts from tokens that are gone",
                               "this call without torch.compile")
    data = {} if sinks is None else {SINKS: sinks}
    stop = a["q_offset"] + call.q_length
    told = told_length(stop)
    whole = stop if told is None else told
    used = slice(0, stop - a["kv_offset"])  # a static cache is longer
    out: Tensor = state.whole(q, k[:, used], v[:, used],  # type: ignore[call-overload]
                              scale=scaling, q_offset=a["q_offset"] - a["kv_offset"],
                              total_len=whole - a["kv_offset"], **data)
    return out


def assert_usual_mask(state: LayerState | None, call: Call, device: torch.device) -> None:
    """Once a forward, on the device: a graph has no padding, no packed sequences and no masks that
    the layers' own `causal`, window and chunk do not tell.

    The call's function is asked for the pairs where these begin and end: it is a closure, which
    cannot be read in a graph.
    """
    if call.asserted or state is None:
        return
    call.asserted = True
    a = call.arguments
    if a["attention_mask"] is not None:
        torch._assert_async(a["attention_mask"].all(), "maskdsl: padding inside a compiled model")
    batch = torch.arange(a["batch_size"], device=device)[:, None]
    q = torch.arange(call.q_length, device=device)[None] + a["q_offset"]
    window = state.window or MAX_SIZE
    for distance in {-1, 0, 1, window - 1, window}:
        k = q - distance
        inside = (k >= a["kv_offset"]) & (k < a["q_offset"] + call.q_length)
        k = torch.where(inside, k, q)
        own = (k <= q) & (q - k < window)
        if state.chunk:
            own = own & (q // state.chunk == k // state.chunk)
        torch._assert_async((a["mask_function"](batch, batch * 0, q, k) == own).all(),
                            "maskdsl: packed sequences, or a mask that no layer tells of, inside "
                            "a compiled model")
