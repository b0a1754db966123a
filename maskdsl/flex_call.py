"""`maskdsl.flex_attention`: FlexAttention's signature, with expressions where it takes tables."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch

from maskdsl import ops
from maskdsl.api import Attention, compile
from maskdsl.atoms import Full
from maskdsl.errors import BackendError, HeadCountError, MaskTypeError, ShapeError
from maskdsl.expr import Mask
from maskdsl.flex import from_block_mask, list_blocks, mask_of_block_mask
from maskdsl.inputs import check_ranks
from maskdsl.scores import ScoreMod, check_scores
from maskdsl.where import Where

Tensor = torch.Tensor
_in_graphs: list[Any] = []  # what graphs know by its address, which must not be used again


@lru_cache(maxsize=256)
def _compiled(mask: Mask, scores: tuple[ScoreMod, ...], backend: str | None) -> Attention:
    return compile(mask, causal=False, scores=scores, backend=backend)


@lru_cache(maxsize=8)  # functions may hold large tensors, and often live for one step
def _compiled_function(mask: Mask, scores: tuple[ScoreMod, ...], backend: str | None) -> Attention:
    return compile(mask, causal=False, scores=scores, backend=backend)


def _attention_of(mask: Mask, scores: tuple[ScoreMod, ...], backend: str | None) -> Attention:
    opaque = any(isinstance(node, Where) for node in mask.walk())
    return (_compiled_function if opaque else _compiled)(mask, scores, backend)


def flex_attention(query: Tensor, key: Tensor, value: Tensor,  # noqa: PLR0913  # theirs
                   score_mod: ScoreMod | Iterable[ScoreMod] | None = None, block_mask: Any = None,
                   scale: float | None = None, enable_gqa: bool = False, return_lse: bool = False,
                   kernel_options: Mapping[str, Any] | None = None, *, return_aux: Any = None,
                   slots: Mapping[str, Any] | None = None, q_offset: int = 0,
                   total_len: int | None = None, backend: str | None = None) -> Any:
    """Attention with the arguments of `torch.nn.attention.flex_attention.flex_attention`.

    query       [B, Hq, Lq, D]; key, value [B, Hkv, Lk, D], [B, Hkv, Lk, Dv]
    score_mod   a score modifier of maskdsl or a list of them; a function is a ScoreModError
    block_mask  an expression, as it stands (nothing is made causal); or a FlexAttention
                `BlockMask`, whose lists and function are both kept; None: every pair
    enable_gqa  False asks that Hq = Hkv, as there
    return_lse, return_aux  as there; `AuxRequest(max_scores=True)` is not supported
    kernel_options  must be empty: they name FlexAttention's own kernels
    slots       data of the expression's slots and of score modifiers, by name
    q_offset    absolute position of query row 0. The default is FlexAttention's, 0, and not the
                bottom-right alignment of `compile`; total_len: see `Shape`
    backend     as for `compile`

    Returns the output, or (output, lse), or (output, AuxOutput). Compiled masks are kept, so a call
    costs little more than that of `compile(...)`'s result. Inside `torch.compile` it is one
    operator; there the mask and the modifiers are told by identity, so make them once, outside.
    Errors: as there, and HeadCountError, BackendError, ScoreModError, MaskTypeError, ShapeError.
    """
    if kernel_options:
        raise BackendError(f"kernel_options={dict(kernel_options)!r}", "these are options of "
                           "FlexAttention's kernels", "no kernel_options; maskdsl.compile(mask, "
                           "tile=(64, 64)) chooses a tile")
    check_ranks(query, key, value, "bhld")
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise HeadCountError(f"{query.shape[1]} query heads on {key.shape[1]} key/value heads",
                             "heads are shared only with enable_gqa=True", "enable_gqa=True")
    if getattr(return_aux, "max_scores", False):
        raise BackendError("AuxRequest(max_scores=True)", "the kernels keep no maximum",
                           "AuxRequest(lse=True)")
    with_lse = return_lse or bool(getattr(return_aux, "lse", False))
    numbers = (scale, q_offset, total_len, with_lse)
    if torch.compiler.is_compiling():
        result = _call_in_graph((query, key, value), score_mod, block_mask, backend, numbers,
                                slots or {})
    else:
        mask, data = _read_block_mask(block_mask, query.shape[2], key.shape[2])
        call: Any = _attention_of(mask, check_scores(score_mod, ()), backend)
        result = call(query, key, value, scale=scale, q_offset=q_offset, total_len=total_len,
                      return_lse=with_lse, **data, **(slots or {}))
    if return_aux is None:
        return result
    from torch.nn.attention.flex_attention import AuxOutput

    out, lse = result if with_lse else (result, None)
    return out, AuxOutput(lse=lse, max_scores=None)


def _read_block_mask(block_mask: Any, q_len: int, kv_len: int) -> tuple[Mask, Mapping[str, Any]]:
    """The expression of what stands for a mask, and its data."""
    if block_mask is None:
        return Full(), {}
    if isinstance(block_mask, Mask):
        return block_mask, {}
    _check_type(block_mask)
    mask, data = from_block_mask(block_mask)
    if data:
        _check_lengths(block_mask, q_len, kv_len)
    return mask, data


def _check_type(block_mask: Any) -> None:
    if not hasattr(block_mask, "kv_indices"):
        raise MaskTypeError(f"block_mask={block_mask!r}", f"a {type(block_mask).__name__}, which "
                            "is no mask", "an expression, such as Causal() & Window(1024), or "
                            "from_mask_mod(fn) for a function")


def _check_lengths(block_mask: Any, q_len: int, kv_len: int) -> None:
    if tuple(block_mask.seq_lengths) != (q_len, kv_len):
        raise ShapeError(f"a BlockMask for {tuple(block_mask.seq_lengths)} tokens with {q_len} "
                         f"queries and {kv_len} keys", "its lists are for other lengths",
                         "an expression, which serves every length")


# --- inside a graph -------------------------------------------------------------------------------


def _key_in_graph(mask_at: int, backend: str | None, *scores_at: int) -> str:
    """The key of the attention, told while a graph is traced, from the addresses of its arguments.

    `id(x)` is how code in a graph asks dynamo (of every version) to guard the identity of x, and
    a number is all that may come here. The expression, the modifiers and the attention are kept, so
    that no other object can come to their address and pass for them. A BlockMask is not: dynamo
    watches it by a weak reference.
    """
    found, scores = _object_at(mask_at), tuple(map(_object_at, scores_at))
    made_inside = MaskTypeError("an expression or a score modifier made inside torch.compile",
                                "a graph cannot hold its making", "the same, made outside of the "
                                "compiled function")
    if any(type(x).__module__.startswith("torch._dynamo") for x in (found, *scores)):
        raise made_inside  # dynamo's notes on such an object
    try:
        mask = Full() if found is None else found if isinstance(found, Mask) else \
            mask_of_block_mask(found)
        attention = _attention_of(mask, check_scores(scores, ()), backend)
    except AttributeError as error:  # or the object itself, but without its fields
        raise made_inside from error
    _in_graphs.append((mask, scores, attention))
    return attention._key


# as torch.compiler.assume_constant_result does, which imports all of dynamo (and Triton) for it
_key_in_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _object_at(address: int) -> Any:
    """The living object of an `id` (an argument of the function that is being traced)."""
    return ctypes.cast(address, ctypes.py_object).value


def _call_in_graph(qkv: tuple[Tensor, Tensor, Tensor], score_mod: Any, block_mask: Any,
                   backend: str | None, numbers: tuple[Any, ...],
                   slots: Mapping[str, Any]) -> Any:
    """The call as an operator: the lists of a BlockMask are tensors of the graph."""
    data = dict(slots)
    if block_mask is not None and not isinstance(block_mask, Mask):
        _check_type(block_mask)
        _check_lengths(block_mask, qkv[0].shape[2], qkv[1].shape[2])
        data.update(list_blocks(block_mask))
    if score_mod is None:
        score_mod = ()
    elif isinstance(score_mod, ScoreMod) or callable(score_mod):
        score_mod = (score_mod,)
    key = _key_in_graph(id(block_mask), backend, *[id(mod) for mod in score_mod])
    return ops.call(qkv, key, numbers, data)
