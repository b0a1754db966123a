"""`torch.ops.maskdsl.attention`: what `torch.compile` and `torch.export` see of a compiled mask.

A graph holds tensors, numbers and text, so a compiled mask enters it as text: its key. A key made
of atoms alone is JSON and finds (or builds) its attention in every process; that of a mask that
holds a function is a number of this process. Call-time data is taken apart into tensors and a text
that tells how to put it together.
"""

from __future__ import annotations

import json
import operator
import uuid
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from maskdsl import scores as score_classes
from maskdsl.errors import MissingSlotError, SerializationError
from maskdsl.expr import Mask, from_json
from maskdsl.indices import (
    BlockIndices,
    ColumnIndices,
    Documents,
    PrefixLengths,
    TokenIndices,
    VSIndices,
)
from maskdsl.inputs import gradient_error, second_gradient_error
from maskdsl.scores import ScoreMod

Tensor = torch.Tensor
# class -> (names of its tensors, names of its integers)
PARTS: dict[str, tuple[type, tuple[str, ...], tuple[str, ...]]] = {
    "VSIndices": (VSIndices, ("vertical", "slash"), ()),
    "ColumnIndices": (ColumnIndices, ("index",), ()),
    "BlockIndices": (BlockIndices, ("index", "row"), ("q_block", "kv_block")),
    "TokenIndices": (TokenIndices, ("index", "row"), ("q_block", "kv_block")),
    "Documents": (Documents, ("start", "stop"), ()),
    "PrefixLengths": (PrefixLengths, ("lengths",), ()),
}

_weak: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_kept: dict[str, Any] = {}  # those that nobody else holds, or that a graph needs and no text builds
_builders: list[Callable[..., Any]] = []  # `Attention` itself; it lies above this module


def set_builder(build: Callable[..., Any]) -> None:
    """What makes an attention from (mask, backend, strict, layout, scale, tile,
    scores)."""
    _builders.append(build)


def register(attention: Any, mask: Mask, options: dict[str, Any],
             scores: tuple[ScoreMod, ...]) -> str:
    """The key of a compiled mask, under which the operator finds it."""
    try:
        parts = [{type(mod).__name__: asdict(mod)} for mod in scores]  # type: ignore[call-overload]
        key = json.dumps({"mask": json.loads(mask.to_json()), **options, "scores": parts},
                         sort_keys=True)
    except SerializationError:  # a function
        key = f"#{uuid.uuid4().hex}"  # no other process may take it for one of its own
    _weak[key] = attention
    return key


def find(key: str) -> Any:
    """The compiled mask of a key, built where this process has none."""
    found = _weak.get(key) or _kept.get(key)
    if found is not None:
        return found
    if key.startswith("#"):
        raise SerializationError(f"attention {key} in another process, or after its end", "its "
                                 "mask holds a Python function, which has no text", "a mask of "
                                 "atoms and operators")
    options = json.loads(key)
    mask = from_json(json.dumps(options.pop("mask")))
    parts = options.pop("scores")
    scores = tuple(getattr(score_classes, name)(**fields) for part in parts
                   for name, fields in part.items())
    tile = options.pop("tile")
    built = _builders[0](mask, tile=tuple(tile) if tile else None, scores=scores, **options)
    _kept[key] = built
    return built


def take_apart(data: Mapping[str, Any]) -> tuple[list[Tensor], str]:
    """Call-time data as tensors and text: {"vs": VSIndices(v, s)}  -->  [v, s], "vs VSIndices 11".

    Plain tensors keep no class: the call wraps them itself.
    """
    tensors: list[Tensor] = []
    text: list[str] = []
    for name in sorted(data):
        value = data[name]
        if isinstance(value, Tensor):
            tensors.append(value)
            text.append(f"{name} - 1")
            continue
        kind = type(value).__name__
        if kind not in PARTS:
            raise MissingSlotError(f"{name}={kind} in a compiled call", "not call-time data that "
                                   "a graph can hold", f"{name}= one of {', '.join(PARTS)}, or a "
                                   "tensor")
        _, names, numbers = PARTS[kind]
        held = ""
        for part in names:
            tensor = getattr(value, part)
            held += "0" if tensor is None else "1"
            if tensor is not None:
                tensors.append(tensor)
        # index: a number that dynamo takes for a variable has no text
        sizes = (str(operator.index(getattr(value, n))) for n in numbers)
        text.append(" ".join([name, kind, held, *sizes]))
    return tensors, ";".join(text)


def put_together(tensors: list[Tensor], text: str) -> dict[str, Any]:
    """The data again; nothing is checked a second time but by the call."""
    data: dict[str, Any] = {}
    left = iter(tensors)
    for entry in filter(None, text.split(";")):
        name, kind, held, *given = entry.split(" ")
        if kind == "-":
            data[name] = next(left)
            continue
        cls, names, numbers = PARTS[kind]
        value: Any = object.__new__(cls)
        for part, present in zip(names, held, strict=True):
            object.__setattr__(value, part, next(left) if present == "1" else None)
        for part, number in zip(numbers, given, strict=True):
            object.__setattr__(value, part, int(number))
        data[name] = value
    return data


def cast_as_sdpa(*tensors: Tensor) -> tuple[Tensor, ...]:
    """q, k and v in the type that autocast would give `scaled_dot_product_attention`."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def call(qkv: tuple[Tensor, Tensor, Tensor], key: str, numbers: tuple[Any, Any, Any, bool],
         slots: Mapping[str, Any], keeps_lse: bool = False) -> Any:
    """The operator with a call's arguments, for a graph.

    numbers    scale, q_offset, total_len, return_lse
    keeps_lse  whether a backward pass will read the lse
    """
    tensors, parts = take_apart(slots)
    scale, q_offset, total_len, with_lse = numbers
    out, lse = attention(*cast_as_sdpa(*qkv), tensors, key, parts, scale, q_offset, total_len,
                         with_lse or keeps_lse)
    return (out, lse) if with_lse else out


# --- the operator ---------------------------------------------------------------------------------

SCHEMA = ("(Tensor q, Tensor k, Tensor v, Tensor[] data, str key, str parts, float? scale, "
          "SymInt? q_offset, SymInt? total_len, bool with_lse)")


@torch.library.custom_op("maskdsl::attention", mutates_args=(),
                         schema=f"{SCHEMA} -> (Tensor, Tensor)")
def attention(q: Tensor, k: Tensor, v: Tensor, data: list[Tensor], key: str, parts: str,
              scale: float | None, q_offset: int | None, total_len: int | None,
              with_lse: bool) -> tuple[Tensor, Tensor]:
    """Output and lse (empty unless asked for) of the compiled mask `key`."""
    found = find(key)
    if key.startswith("#"):  # a graph and its backward pass know no more than the key
        _kept[key] = found
    result = found(q, k, v, scale=scale, q_offset=q_offset, total_len=total_len,
                   return_lse=with_lse, **put_together(data, parts))
    out, lse = result if with_lse else (result, q.new_empty(0, dtype=torch.float32))
    return out.contiguous(), lse


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, data: list[Tensor], key: str, parts: str,
      scale: float | None, q_offset: int | None, total_len: int | None,
      with_lse: bool) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    wide = torch.promote_types(q.dtype, torch.float32)
    if not with_lse:
        return out, q.new_empty(0, dtype=torch.float32)
    b, h, n = q.shape[:3]
    if find(key).layout == "blhd":
        h, n = n, h
    return out, q.new_empty((b, h, n), dtype=wide)


WITH_RESULT = "Tensor?[] results, int[] wanted, "


@torch.library.custom_op("maskdsl::attention_backward", mutates_args=(),
                         schema=f"({WITH_RESULT}{SCHEMA[1:]} -> Tensor[]")
def attention_backward(results: list[Tensor | None], wanted: list[int], q: Tensor, k: Tensor,
                       v: Tensor, data: list[Tensor], key: str, parts: str, scale: float | None,
                       q_offset: int | None, total_len: int | None,
                       with_lse: bool) -> list[Tensor]:
    """Gradients of the tensors that `wanted` counts among q, k, v and the data.

    results  the gradients of output and lse (or None), and for the kernels output and lse

    By the gradients' kernels, from out and lse; on the torch backend by running forward again, with
    `torch.func.vjp`, since autograd itself is off inside an operator.
    """
    tensors, found = [q, k, v, *data], find(key)
    grad_out, grad_lse, out, lse = results
    assert grad_out is not None
    if found.backend != "torch":
        assert out is not None and lse is not None
        names = slot_names(parts)
        made = found.kernel_gradients(
            (q, k, v, out, lse), grad_out, grad_lse, (scale, q_offset, total_len),
            put_together(data, parts), {names[i - 3] if i > 2 else "qkv"[i] for i in wanted})
        return [made[names[i - 3] if i > 2 else "qkv"[i]].contiguous() for i in wanted]
    call = found.prepare_call(q, k, v, scale, q_offset, total_len, with_lse,
                              put_together(data, parts))

    def forward(*floats: Tensor) -> Any:
        filled = list(tensors)
        for i, t in zip(wanted, floats, strict=True):
            filled[i] = t
        return call(*filled[:3], put_together(filled[3:], parts))

    vjp = torch.func.vjp(forward, *(tensors[i] for i in wanted))[1]
    return [g.contiguous() for g in vjp((grad_out, grad_lse) if with_lse else grad_out)]


def slot_names(parts: str) -> list[str]:
    """The name each tensor of the data came by."""
    names: list[str] = []
    for entry in filter(None, parts.split(";")):
        name, _, held, *_ = entry.split(" ")
        names += [name] * held.count("1")
    return names


@attention_backward.register_fake
def _(results: list[Tensor | None], wanted: list[int], q: Tensor, k: Tensor, v: Tensor,
      data: list[Tensor], key: str, parts: str, scale: float | None, q_offset: int | None,
      total_len: int | None, with_lse: bool) -> list[Tensor]:
    tensors = [q, k, v, *data]
    return [tensors[i].new_empty(tensors[i].shape) for i in wanted]


def _refuse_second(ctx: Any, *grads: Any) -> Any:
    raise second_gradient_error()


attention_backward.register_autograd(_refuse_second)


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, data, key, *rest = inputs
    attention = find(key)
    kernels = attention.backend != "torch"
    if kernels and not attention.backward:
        raise gradient_error()
    tensors = (q, k, v, *data)
    ctx.wanted = [i for i, t in enumerate(tensors) if t.requires_grad]
    ctx.save_for_backward(*tensors, *(output if kernels else ()))
    ctx.results, ctx.rest = 2 if kernels else 0, (key, *rest)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    tensors, results = saved[:len(saved) - ctx.results], saved[len(saved) - ctx.results:]
    q, k, v, *data = tensors
    found = torch.ops.maskdsl.attention_backward(
        [grad_out, grad_lse if ctx.rest[-1] else None, *(results or (None, None))], ctx.wanted,
        q, k, v, data, *ctx.rest)
    grads: list[Tensor | None] = [None] * len(tensors)
    for i, gradient in zip(ctx.wanted, found, strict=True):
        grads[i] = gradient
    return (*grads[:3], grads[3:], *(None for _ in ctx.rest))


attention.register_autograd(_backward, setup_context=_set_up)
