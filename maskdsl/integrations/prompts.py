"""What transformers says about a call, in our words: the layer's own mask, and where prompts lie.

transformers describes a mask by a function put together from closures, and by tensors for padding
and packing. The functions are read back into expressions; padded and packed rows become *segments*,
each a prompt with positions of its own, so that `Sink(4)` is the first four tokens of the prompt
and not of the padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch

from maskdsl.arguments import MAX_SIZE
from maskdsl.atoms import (
    Band,
    Causal,
    Chunk,
    Empty,
    FirstQ,
    Full,
    KeyRange,
    LastQ,
    PrefixLM,
    QueryRange,
    Sink,
    Window,
)
from maskdsl.errors import IntegrationError
from maskdsl.expr import And, Mask, Not, Or, join
from maskdsl.periodic import Dilated, Slash, Stride, Vertical
from maskdsl.reading import from_mask_mod
from maskdsl.where import Where

UNMOVED = (Causal, Window, Band, Slash, Dilated, Full, Empty, LastQ)  # the same at every offset


@dataclass(frozen=True, slots=True)
class OwnMask:
    """A layer's own mask; `packed` int[B, L] numbers the sequences packed into each row."""

    mask: Mask
    packed: torch.Tensor | None = None


def read_function(function: Callable[..., Any]) -> OwnMask:
    """transformers' mask function as an expression; IntegrationError for what has none.

    and_masks(sliding_window_overlay(512), causal_mask_function)  -->  Window(512)
    """
    name = getattr(function, "__qualname__", "").partition(".")[0]
    inside = closure_of(function)
    if name == "causal_mask_function":
        return OwnMask(Causal())
    if name == "sliding_window_overlay":
        return OwnMask(Window(inside["sliding_window"], MAX_SIZE))
    if name == "packed_sequence_mask_function":
        return OwnMask(Full(), inside["packed_sequence_mask"])
    if name == "remap_positions_for_packed_sequence":
        return read_function(inside["mask_function"])  # each sequence is a segment of its own
    if name == "chunked_overlay":  # counted from the first token of a padded row, as segments are
        return OwnMask(Chunk(inside["chunk_size"]))
    if name == "and_masks":
        parts = [read_function(part) for part in inside["mask_functions"]]
        packed = [part.packed for part in parts if part.packed is not None]
        return OwnMask(join(And, tuple(part.mask for part in parts)),
                       packed[0] if packed else None)
    mask = from_mask_mod(function)
    if any(isinstance(node, Where) for node in mask.walk()):
        raise IntegrationError(f"a model whose mask is {name or function!r}", "this mask function "
                               "of transformers has no expression here",
                               "causal, sliding and chunked masks, padding and packed sequences; "
                               "or attn_implementation='sdpa'")
    return OwnMask(mask)


def closure_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The variables a nested function took along."""
    code = getattr(function, "__code__", None)
    cells = getattr(function, "__closure__", None) or ()
    return {} if code is None else {name: cell.cell_contents for name, cell in
                                    zip(code.co_freevars, cells, strict=True)}


@dataclass(frozen=True, slots=True)
class Segment:
    """One prompt of some batch rows: where its rows and keys lie in the tensors of the call.

    rows              batch rows
    q_start, q_stop   rows of q; k_start, k_stop: of k
    q_offset          position of its first query row, counted from its first key
    shift             tokens of the prompt that lie before its first key (a sliding cache)
    total_len         length of the prompt, counted from its first key
    """

    rows: tuple[int, ...]
    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    q_offset: int
    shift: int
    total_len: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """The lengths of a call as transformers gives them, in tokens; positions count padding."""

    batch: int
    q_length: int
    kv_length: int
    q_offset: int
    kv_offset: int

    @property
    def stop(self) -> int:
        """The position after the last query row: later keys (of a static cache) are unused."""
        return self.q_offset + self.q_length


def find_segments(lengths: Lengths, padding: torch.Tensor | None, packed: torch.Tensor | None,
                  prompt: int | tuple[int, ...] | None) -> list[Segment]:
    """The segments of a call, equal ones of several batch rows as one.

    padding  bool[B, n], True for tokens; packed  int[B, L] numbers of packed sequences
    prompt   length of the whole prompt (with padding), where the call has a part of it; or the end
             of every row's

    Padding and packing are read on the host: one wait for the device a forward, not one a layer.
    """
    runs: list[tuple[tuple[int, int], ...]] = [((0, lengths.stop),)] * lengths.batch
    if packed is not None:
        runs = [tuple(runs_of_row(row)) for row in packed.tolist()]
    elif padding is not None and not bool(padding[:, :lengths.stop].all()):
        runs = [tokens_of_row(row) for row in padding[:, :lengths.stop].tolist()]
    stops = prompt if isinstance(prompt, tuple) else (prompt,) * lengths.batch
    if len(stops) != lengths.batch:
        raise IntegrationError(f"prompt_length of {len(stops)} rows", f"the batch has "
                               f"{lengths.batch}", "one number, or one for every row")
    rows_of: dict[tuple[int, int, int | None], list[int]] = {}
    for row, parts in enumerate(runs):
        for part in parts:
            rows_of.setdefault((*part, stops[row]), []).append(row)
    found = (place_segment(tuple(rows), start, stop, lengths, whole)
             for (start, stop, whole), rows in rows_of.items())
    return [segment for segment in found if segment.q_stop > segment.q_start]


def runs_of_row(numbers: list[int]) -> list[tuple[int, int]]:
    """[0, 0, 1, 1, 1]  -->  [(0, 2), (2, 5)]."""
    borders = [0, *(i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1]),
               len(numbers)]
    return [(a, b) for a, b in pairwise(borders) if a < b]


def tokens_of_row(row: list[bool]) -> tuple[tuple[int, int], ...]:
    """Where a padded row has its tokens; IntegrationError where they are not in one piece."""
    parts = [(a, b) for a, b in runs_of_row([int(x) for x in row]) if row[a]]
    if len(parts) > 1:
        raise IntegrationError("an attention_mask with zeros between tokens", "padding lies before "
                               "or behind a prompt", "tokens in one piece, or separate batch rows")
    return tuple(parts)


def place_segment(rows: tuple[int, ...], start: int, stop: int, lengths: Lengths,
                  prompt: int | None) -> Segment:
    """The segment of tokens [start, stop), positions of the call, in its tensors."""
    first_key = max(start, lengths.kv_offset)
    shift = first_key - start
    first_row, last_row = max(start, lengths.q_offset), min(stop, lengths.stop)
    whole = stop if prompt is None or stop < lengths.stop else max(prompt, stop)
    return Segment(rows, first_row - lengths.q_offset, last_row - lengths.q_offset,
                   first_key - lengths.kv_offset, min(stop, lengths.stop) - lengths.kv_offset,
                   first_row - first_key, shift, whole - first_key)


def is_unmoved(mask: Mask) -> bool:
    """Whether the mask is the same counted from any token on."""
    return all(isinstance(node, (And, Or, Not, *UNMOVED)) for node in mask.walk())


def shift_mask(mask: Mask, shift: int) -> Mask:
    """The mask on keys and queries that are counted from `shift` on: p -> p + shift, and k.

    shift_mask(Sink(4) | Window(9), 3)  -->  Sink(1) | Window(9)
    """
    if not shift or isinstance(mask, UNMOVED):
        return mask
    if isinstance(mask, (Or, And)):
        args = tuple(shift_mask(arg, shift) for arg in mask.args)
        return join(Or, args) if isinstance(mask, Or) else join(And, args)
    if isinstance(mask, Not):
        return ~shift_mask(mask.operand, shift)
    if isinstance(mask, (Sink, FirstQ, PrefixLM)):
        return type(mask)(max(0, mask.n - shift))
    if isinstance(mask, (KeyRange, QueryRange)):
        return type(mask)(max(0, mask.start - shift), max(0, mask.stop - shift))
    if isinstance(mask, Stride):
        return Stride(mask.step, (mask.offset - shift) % mask.step)
    if isinstance(mask, Vertical):
        return Vertical(tuple(c - shift for c in mask.columns if c >= shift))
    if isinstance(mask, Chunk):
        return move_chunk(mask.size, shift % mask.size)
    raise IntegrationError(f"{mask!r} on a sliding cache", f"its first {shift} tokens are gone, "
                           "and this mask is not told from there on",
                           "a policy with Full() in the sliding layers")


@cache
def move_chunk(size: int, start: int) -> Mask:
    """`Chunk(size)` on positions counted from `start`; the same object for the same numbers."""
    if not start:
        return Chunk(size)
    return Where(lambda b, h, q, k: (q + start) // size == (k + start) // size)
