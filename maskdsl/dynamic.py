"""Atoms whose data arrives at call time: each names a slot, and the call fills it.

    attn = compile(Sink(4) | Window(512) | VerticalSlash("vs"))
    out = attn(q, k, v, vs=VSIndices(vertical, slash))

A node holds the slot's name, never a tensor, so masks stay values. What a slot's data says is
asked through the place a mask is evaluated at: `at.member` for sets of pairs, `at.read` for
numbers that become ordinary interval bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from maskdsl.arguments import integer
from maskdsl.errors import AtomArgumentError
from maskdsl.expr import Bool, Index, Mask, Place, atom
from maskdsl.indices import (
    BlockIndices,
    ColumnIndices,
    Documents,
    PrefixLengths,
    TokenIndices,
    VSIndices,
)

RESERVED = ("q", "k", "v", "scale", "q_offset", "total_len", "return_lse",  # arguments of a call
            "q_len", "kv_len", "batch", "heads", "kv_heads", "head_dim", "value_dim", "chip",
            "estimator")  # and of `explain`
MAX_BLOCK = 1 << 16  # tokens


class SlotMask(Mask):
    """A mask with a slot: base of the atoms in this file."""

    __slots__ = ()
    slot: str
    data: ClassVar[type[Any]]  # what the call must give
    example: ClassVar[str]

    def check_slot(self) -> None:
        """The slot's name can be a keyword argument of a call."""
        if not isinstance(self.slot, str) or not self.slot.isidentifier() or self.slot in RESERVED:
            raise AtomArgumentError(f"{type(self).__name__}({self.slot!r})",
                                    "a slot's name must be an identifier other than "
                                    f"{', '.join(RESERVED)}: it becomes an argument of the call",
                                    f"{type(self).__name__}({self.example!r})")


def slots_of(mask: Mask) -> tuple[SlotMask, ...]:
    """The distinct slot atoms of a mask, in order of their names."""
    found = {node for node in mask.walk() if isinstance(node, SlotMask)}
    return tuple(sorted(found, key=lambda node: node.key))


class ListMask(SlotMask):
    """A slot whose pairs are listed: nothing about them is known before the call."""

    __slots__ = ()

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        return at.member(self, p, k)


@atom
@dataclass(frozen=True, slots=True, repr=False)
class VerticalSlash(ListMask):
    """{(p, k) : k in V or p - k in S}, V and S given at the call as `VSIndices`.

    slash  "exact" (default): exactly this set. "block64": the superset that MInference's kernel
           computes, where each slash is widened to blocks of 64 keys for every 64 query rows, by
           the rule of its index conversion; the same live pairs as theirs, under `Causal()`.

    Source: MInference, arXiv 2407.02490, section 3; its code, `convert_vertical_slash_indexes`.
    """

    slot: str
    slash: str = "exact"
    data: ClassVar[type[Any]] = VSIndices
    example: ClassVar[str] = "vs"

    def __post_init__(self) -> None:
        self.check_slot()
        if self.slash not in ("exact", "block64"):
            raise AtomArgumentError(f"VerticalSlash({self.slot!r}, slash={self.slash!r})",
                                    "unknown way to read slashes",
                                    'slash="exact" or slash="block64"')


@atom
@dataclass(frozen=True, slots=True, repr=False)
class Blocks(ListMask):
    """{(p, k) : key block k // kv_block is listed for row block r // q_block}, r = p - q_offset.

    The lists come at the call as `BlockIndices`, which has a constructor for every format in use.
    r is the query's row in this call, so a chunk of a prompt brings the rows of its own.

    q_block   query rows a block, 1 or more
    kv_block  keys a block, a power of two
    """

    slot: str
    q_block: int = 64
    kv_block: int = 64
    data: ClassVar[type[Any]] = BlockIndices
    example: ClassVar[str] = "blk"

    def __post_init__(self) -> None:
        self.check_slot()
        sizes = integer(self, "q_block", 1), integer(self, "kv_block", 1)
        if sizes[1] & (sizes[1] - 1) or max(sizes) > MAX_BLOCK:
            raise AtomArgumentError(repr(self), "kv_block must be a power of two, and neither "
                                    f"block larger than {MAX_BLOCK}",
                                    f'Blocks("{self.slot}", 64, 64)')

    @property
    def blocks(self) -> tuple[int, int]:
        """(q_block, kv_block)."""
        return self.q_block, self.kv_block


@atom
@dataclass(frozen=True, slots=True, repr=False)
class TokenTopK(ListMask):
    """{(p, k) : k is listed for query row r = p - q_offset}, given at the call as `TokenIndices`.

    The finest of blocks, one token by one token. It takes one bit for every pair (Lq * Lk / 8 bytes
    a head) while the kernel runs.

    Source: DeepSeek sparse attention (DeepSeek-V3.2), token selection by top-k.
    """

    slot: str
    data: ClassVar[type[Any]] = TokenIndices
    example: ClassVar[str] = "idx"

    def __post_init__(self) -> None:
        self.check_slot()

    @property
    def blocks(self) -> tuple[int, int]:
        """(q_block, kv_block)."""
        return 1, 1


@atom
@dataclass(frozen=True, slots=True, repr=False)
class Columns(ListMask):
    """{(p, k) : k in V}, V given at the call as `ColumnIndices` or a tensor int[B, H, N]."""

    slot: str
    data: ClassVar[type[Any]] = ColumnIndices
    example: ClassVar[str] = "cols"

    def __post_init__(self) -> None:
        self.check_slot()


@atom
@dataclass(frozen=True, slots=True, repr=False)
class Document(SlotMask):
    """{(p, k) : p and k belong to one document}, given at the call as `Documents`.

    Packed sequences of varying length. The kernel reads where a row's document starts and ends, so
    tiles inside one document carry no mask, and tiles of other documents are not visited.
    """

    slot: str
    data: ClassVar[type[Any]] = Documents
    example: ClassVar[str] = "doc"

    def __post_init__(self) -> None:
        self.check_slot()

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        return (k >= at.read(self, "start", p)) & (k < at.read(self, "stop", p))


@atom
@dataclass(frozen=True, slots=True, repr=False)
class Prefix(SlotMask):
    """{(p, k) : k < n or k <= p}, n of every batch entry given at the call as a tensor int[B].

    A prefix that sees itself both ways, then causal. Compile it with `causal=False`; the default
    would cut the prefix back to causal. Source: T5, arXiv 1910.10683, section 3.2.1.
    """

    slot: str
    data: ClassVar[type[Any]] = PrefixLengths
    example: ClassVar[str] = "n"

    def __post_init__(self) -> None:
        self.check_slot()

    def contains(self, p: Index, k: Index, at: Place) -> Bool:
        return (k < at.read(self, "length", p)) | (k <= p)
