"""The one owner of the position convention.

Query row r of a call sits at absolute position p = q_offset + r; keys are 0..kv_len-1. By default
the last query row lines up with the last key (bottom-right alignment, as FlashAttention), so a
square call has q_offset 0 and a decoding step sees the whole cache.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from maskdsl.errors import MissingSlotError, ShapeError


def check_length(name: str, value: object, least: int | None = 0) -> int:
    """`value` as an int, or a ShapeError that names the argument."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or (least is not None and number < least):
        bound = "" if least is None else f" >= {least}"
        raise ShapeError(f"{name}={value!r}", f"{name} must be an integer{bound}, in tokens",
                         f"{name}={least or 0} or more")
    return number


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths and position of one attention call, all in tokens.

    q_len      rows of q
    kv_len     keys
    q_offset   absolute position of query row 0; default kv_len - q_len
    total_len  length of the whole prompt, which `LastQ` counts from; default kv_len. In chunked
               prefill give it: a chunk cannot know by itself where the prompt ends.

    >>> Shape(4, 10)
    Shape(q_len=4, kv_len=10, q_offset=6, total_len=10)
    """

    q_len: int
    kv_len: int
    q_offset: int = None  # type: ignore[assignment]  # filled in below
    total_len: int = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        fill = object.__setattr__
        fill(self, "q_len", check_length("q_len", self.q_len))
        fill(self, "kv_len", check_length("kv_len", self.kv_len))
        offset = self.kv_len - self.q_len if self.q_offset is None else self.q_offset
        total = self.kv_len if self.total_len is None else self.total_len
        fill(self, "q_offset", check_length("q_offset", offset, None))
        fill(self, "total_len", check_length("total_len", total))
        if self.total_len < self.kv_len:
            raise ShapeError(f"total_len={self.total_len} with {self.kv_len} keys",
                             "the whole prompt cannot be shorter than the keys of this call",
                             f"total_len={self.kv_len} or more, or leave it out")


@dataclass(frozen=True, slots=True)
class Site:
    """Where a mask is evaluated: the lengths of a call, and a batch and head (ints or arrays).

    heads  query heads of the call
    bound  the call-time data of every slot, as `maskdsl.binding` gives it
    """

    q_len: Any
    kv_len: Any
    total_len: Any
    batch: Any = 0
    head: Any = 0
    heads: int = 1
    bound: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, shape: Shape, batch: Any = 0, head: Any = 0, heads: int = 1,
           bound: Mapping[str, Any] | None = None) -> Site:
        """The site of one batch and head (or arrays of them) of a call."""
        return cls(shape.q_len, shape.kv_len, shape.total_len, batch, head, heads, bound or {})

    def _of_slot(self, atom: Any) -> Any:
        if atom.slot not in self.bound:
            raise MissingSlotError(f"{atom!r} without its data", "which pairs it holds is known "
                                   "at the call only", f"slots={{{atom.slot!r}: "
                                   f"{atom.data.__name__}(...)}}")
        return self.bound[atom.slot]

    def member(self, atom: Any, p: Any, k: Any) -> Any:
        """Whether a slot's data lists the pair."""
        return self._of_slot(atom).member(p, k, self.batch, self.head, self.heads)

    def read(self, atom: Any, name: str, p: Any) -> Any:
        """A number from a slot's data, for every position."""
        return self._of_slot(atom).read(name, p, self.batch)
